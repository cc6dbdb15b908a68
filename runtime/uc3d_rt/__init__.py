"""One picture of an object in, a textured mesh out; start reading at `pipeline.py`.

`Pipeline.from_bundle()("shoe.png").mesh.export("shoe.glb")` is the shortest way through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uc3d_rt.errors import Uc3dError as Uc3dError
    from uc3d_rt.pipeline import Pipeline as Pipeline
    from uc3d_rt.pipeline import Result as Result
    from uc3d_rt.pipeline import Views as Views

__all__ = ["Pipeline", "Result", "Uc3dError", "Views", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: training takes `uc3d_rt.views` without loading the pipeline.
    if name in ("Pipeline", "Result", "Views"):
        from uc3d_rt import pipeline

        return getattr(pipeline, name)
    if name == "Uc3dError":
        from uc3d_rt.errors import Uc3dError

        return Uc3dError
    if name == "__version__":
        from importlib.metadata import version

        return version("uc3d-rt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
