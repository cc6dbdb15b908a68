"""The paper's protocols by name: what each measures of a bundle.

| name | after | measures |
| --- | --- | --- |
| all | Tables 1 and 5 | views, normals and meshes of one random input view an object |
| views | Tables 1 and 3 | the six colour views and their silhouettes |
| mesh | Table 1 | Chamfer distance and volume IoU of the fitted meshes |
| normals | Table 5 | angles between the normal maps and the true ones |
| viewpoint | Table 6 | one object from many input azimuths: figures, spread, agreement (`train.viewpoint`) |
| text | Table 2 | views and meshes of pictures made from prompts: FID, CLIP score (`train.text`) |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from train.perceptual import Weights
from uc3d_rt.errors import UsageError


@dataclass(frozen=True)
class Protocol:
    """What is measured of each object."""

    name: str
    colors: bool  # PSNR, SSIM, LPIPS, silhouette IoU
    normals: bool  # angles, over both silhouettes and over the true one
    meshes: bool  # whether meshes are fitted unless they are not wanted
    main: str  # the column that objects are ranked by in the gallery


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("all", colors=True, normals=True, meshes=True, main="psnr"),
        Protocol("views", colors=True, normals=False, meshes=False, main="psnr"),
        Protocol("mesh", colors=False, normals=False, meshes=True, main="chamfer"),
        Protocol("normals", colors=False, normals=True, meshes=False, main="normal_deg"),
        Protocol("viewpoint", colors=True, normals=True, meshes=True, main="psnr"),
        Protocol("text", colors=False, normals=False, meshes=True, main="clip"),
    )
}

AZIMUTHS = 16
"""Inputs of an object in the viewpoint protocol; see `train.viewpoint`."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how."""

    bundle: Path
    objects: Path  # of the text protocol: pictures and prompts.csv
    out: Path
    train_objects: Path | None = None  # None: `objects`' sibling folder `train`, if there is one
    index: Path | None = None  # None: beside `out`
    meshes: bool = True  # False: none are fitted, whatever the protocol
    steps: int | None = None  # None: the bundle's
    guidance: float | None = None  # None: the bundle's
    seed: int = 0
    workers: int = 1
    protocol: str = "all"
    azimuths: int = AZIMUTHS
    device: str = "cpu"  # of networks and fit
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")
        if self.train_objects is not None and self.train_objects.resolve() == self.objects.resolve():
            raise UsageError(f"{self.objects} is given as training folder too; nothing would be measured")
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"unknown protocol {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        if self.protocol == "mesh" and not self.meshes:
            raise UsageError("the mesh protocol measures nothing without meshes; choose another")
        if self.azimuths < 2:
            raise UsageError(f"azimuths must be at least 2, got {self.azimuths}")

    @property
    def measures(self) -> Protocol:
        """What is measured of each object."""
        return PROTOCOLS[self.protocol]

    @property
    def fits(self) -> bool:
        """Whether meshes are fitted."""
        return self.measures.meshes and self.meshes

    @property
    def networks(self) -> tuple[str, ...]:
        """The metrics of this protocol that need weights of others, by name in `Weights`."""
        return ("fid", "clip") if self.protocol == "text" else ("lpips",) if self.measures.colors else ()

    def train_folder(self) -> Path | None:
        """The training objects, if they are there and this protocol looks at them."""
        if self.protocol in ("viewpoint", "text"):
            return None
        sibling = self.objects.resolve().parent / "train"
        if self.train_objects is None and sibling.is_dir() and sibling != self.objects.resolve():
            return sibling
        return self.train_objects
