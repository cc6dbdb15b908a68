"""Build hook: the default bundle goes into the wheel, so that a plain install has a model."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DefaultBundleHook(BuildHookInterface):
    """Maps `engines/edge/*` to `uc3d_rt/bundles/edge/`; engines under `built/` stay out.

    An editable install needs no copy: the runtime looks into the source tree.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the bundle's own files to a standard wheel."""
        if version == "editable":
            return
        for path in sorted((Path(self.root) / "engines" / "edge").glob("*")):
            if path.is_file():
                build_data["force_include"][str(path)] = f"uc3d_rt/bundles/edge/{path.name}"
