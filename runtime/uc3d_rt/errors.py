"""Every exception a user can meet, each with its own exit code.

A message names the values at fault and says the mend.  The command line prints the message as one
line and exits with `exit_code`; library users catch `Uc3dError` or one of its children.
"""


class Uc3dError(Exception):
    """Base of all errors that a user can mend; never raised itself."""

    exit_code = 1


class UsageError(Uc3dError):
    """An option or argument has a value that cannot work (exit code 2, as click's own)."""

    exit_code = 2


class ImageError(Uc3dError):
    """The input image is missing, unreadable, too small, too large or shows no object."""

    exit_code = 3


class BundleError(Uc3dError):
    """The model bundle is missing, incomplete, altered, or of another format version."""

    exit_code = 4


class OutputError(Uc3dError):
    """The output cannot be written: folder missing, not writable, or unknown format."""

    exit_code = 5


class BackendError(Uc3dError):
    """A network cannot be loaded or run on the device that was asked for."""

    exit_code = 6


class OutOfMemoryError(BackendError):
    """A device's memory ran out; what was taken is freed."""

    def __init__(self, what: str, mend: str) -> None:
        """Say `what` ran out of memory, and the mend."""
        super().__init__(f"{what}; {mend}")
        self.what = what
        self.mend = mend


class FitError(Uc3dError):
    """The views hold no surface to reconstruct, for example when every silhouette is empty."""

    exit_code = 7
