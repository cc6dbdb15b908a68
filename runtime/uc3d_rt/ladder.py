"""The rungs of `--low-memory`: each needs less memory than the one before, or as much, and takes longer."""

from __future__ import annotations

from dataclasses import dataclass

from uc3d_rt.errors import UsageError


@dataclass(frozen=True)
class Rung:
    """What is done to need less memory; what is computed stays the same but for rounding."""

    name: str
    what: str  # it does beyond the rung before it
    frees_stages: bool = False
    """Every network is freed before the next is loaded, within `with pipeline:` and within a stage too, and
    ONNX Runtime takes no more at a time than is asked for."""
    one_object: bool = False
    """Guidance is two calls of the UNet for one object each: half its working memory, and one copy of it."""
    small_buffers: bool = False
    """No trials of convolutions' algorithms, one latent a call of the decoder where that was not fixed
    beforehand: nothing that engines have not already."""


OFF = Rung("off", "within `with pipeline:` all that was loaded stays loaded")
STAGES = Rung("stages", "every network is freed before the next is loaded", frees_stages=True)
UNET = Rung("unet", "guidance calls the UNet for one object at a time", frees_stages=True, one_object=True)
LEAST = Rung(
    "least", "no trials of convolutions' algorithms, the decoder one latent at a time (engines: as unet)",
    frees_stages=True, one_object=True, small_buffers=True,
)  # fmt: skip

LADDER: tuple[Rung, ...] = (OFF, STAGES, UNET, LEAST)
PLAIN = UNET
"""What `--low-memory` without a name means, and `low_memory=True`."""

LowMemory = bool | str | Rung


def rung_of(asked: LowMemory) -> Rung:
    """The rung of a name; True is `PLAIN`, False `OFF`.

    Raises:
        UsageError: there is none of that name.
    """
    if isinstance(asked, Rung):
        return asked
    if isinstance(asked, bool):
        return PLAIN if asked else OFF
    for rung in LADDER:
        if rung.name == asked:
            return rung
    names = ", ".join(rung.name for rung in LADDER)
    raise UsageError(f"unknown rung {asked!r} of --low-memory; choose one of {names}")


def lower_rungs(rung: Rung) -> str:
    """How to go down from a rung, for the user; empty at the last."""
    first, *others = [lower.name for lower in LADDER[LADDER.index(rung) + 1 :]] or [""]
    if not first:
        return ""
    return f"use --low-memory {first}" + (f" or, for less still, {' or '.join(others)}" if others else "")
