"""The work of `python -m train evaluate` on one object: views, baselines, fits, figures, pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.baselines import (
    FloatArray,
    TrainIndex,
    ViewPair,
    as_object,
    autoencoded,
    copied_input,
    ellipsoid_of,
    image_features,
    index_features,
    placed,
    turntable,
)
from train.mesh_metrics import Triangles, chamfer, volume_iou
from train.metrics import normal_metrics, silhouette, view_metrics
from train.objects import Object, load_object
from train.perceptual import lpips_metric
from train.protocols import EvaluateOptions
from train.report import Record, write_json
from train.sheets import contact_sheet, view_row, write_picture
from train.text import measure_picture
from train.truth import EvalSample, ground_truth
from train.viewpoint import (
    between,
    coinciding,
    input_azimuths,
    mean_and_spread,
    mesh_agreement,
    samples_around,
    view_agreement,
)
from uc3d_rt.backends.base import Network, backend_for
from uc3d_rt.errors import FitError, ImageError
from uc3d_rt.mesh.build import MeshOptions
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.pipeline import Pipeline, Views
from uc3d_rt.views import decode_normals

VIEW_PX = 80  # of a view on a contact sheet
GALLERY_PX = 128  # of a view in the gallery


def opened_pipeline(options: EvaluateOptions, threads: int | None = None) -> Pipeline:
    """The bundle's own files on the CPU; on a GPU the fastest that fits it, and the fit there too."""
    backend = "bundle" if options.device == "cpu" else "auto"
    return Pipeline.from_bundle(options.bundle, options.device, threads, backend)


def record_path(out: Path, name: str) -> Path:
    """Where an object's record stands; its line of the contact sheet is beside it, a PNG."""
    return out / "objects" / f"{name}.json"


class Evaluator:
    """One process's networks and the work on one object; a context manager."""

    def __init__(self, options: EvaluateOptions, index: TrainIndex | None, threads: int) -> None:
        self.options, self.index = options, index
        self.pipeline = opened_pipeline(options, threads)
        self.image_px = self.pipeline.manifest.shape.image_px
        self._lpips = None
        if "lpips" in options.networks and options.weights.lpips is not None:
            self._lpips = lpips_metric(options.weights.lpips, options.device)
        self._backend = backend_for(options.device, threads)
        self._networks: dict[str, Network] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.pipeline)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._networks.clear()
        self._stack.close()

    def network(self, name: str) -> Network:
        """A network of the bundle, opened when first asked for."""
        if name not in self._networks:
            opened = self._backend.open(self.options.bundle, self.pipeline.manifest, name)
            self._networks[name] = self._stack.enter_context(opened)
        return self._networks[name]

    def index_features(self, path: Path) -> FloatArray:
        """Features (yaws, D) of a training object."""
        return index_features(path, self.network("image_encoder"), self.image_px)

    def measure(self, job: tuple[Path, str]) -> Record:
        """Measure one object and write its record, its pictures, and its line of the contact sheet."""
        path, name = job
        started = time.perf_counter()
        try:
            record = self._record(path, name)
        except ImageError as error:  # too thin to be seen from there
            record = {"left_out": str(error)}
        record = {"name": name, **record, "seconds": round(time.perf_counter() - started, 2)}
        write_json(record_path(self.options.out, name), record)
        return record

    def _record(self, path: Path, name: str) -> Record:
        if self.options.protocol == "text":
            return measure_picture(self.pipeline, self.options, path, name)
        try:
            obj = load_object(path)
        except ValueError as error:
            return {"left_out": str(error)}
        if self.options.protocol == "viewpoint":
            return self._around(obj, name)
        return self._one_view(obj, name, ground_truth(path, self.options.seed, image_px=self.image_px))

    def _views(self, sample: EvalSample) -> Views:
        options = self.options
        return self.pipeline.views(
            sample.input_rgba, steps=options.steps, guidance=options.guidance, seed=options.seed,
            focal_mm=0.0 if sample.focal_mm is None else sample.focal_mm,
        )  # fmt: skip

    def _figures(self, pair: ViewPair, truth: ViewPair) -> dict[str, float]:
        """What the protocol measures of views."""
        measures, figures = self.options.measures, dict[str, float]()
        if measures.colors:
            figures = view_metrics(*pair, *truth)
            if self._lpips is not None:
                figures["lpips"] = self._lpips(pair[0], truth[0])
        if measures.normals:
            return figures | normal_metrics(pair[1], truth[1])
        return {name: value for name, value in figures.items() if name != "normal_deg"}

    def _one_view(self, obj: Object, name: str, sample: EvalSample) -> Record:
        options, measures = self.options, self.options.measures
        views, truth = self._views(sample), true_pair(sample)
        copied = copied_input(obj, sample, self.image_px)
        picture = np.round(copied[0][0] * 255.0).astype(np.uint8)
        pairs: dict[str, ViewPair] = {"model": (views.color, views.normal), "input": copied}
        about: Record = {"yaw_deg": sample.yaw_deg, "elevation_deg": sample.elevation_deg}
        about |= {"focal_mm": sample.focal_mm, "stage_seconds": dict(views.timings)}
        meshes: dict[str, Triangles] = {}
        if self.index is not None and (folder := options.train_folder()) is not None:
            feature = image_features(self.network("image_encoder"), [picture])[0]
            near = self.index.neighbour(folder, feature, self.image_px)
            pairs["nearest"], meshes["nearest"] = near.views, near.object
            about["nearest"] = {
                "file": near.path.relative_to(folder).as_posix(), "yaw_deg": near.yaw_deg,
                "similarity": near.similarity,
            }  # fmt: skip
        pairs["ceiling"] = truth
        if measures.colors or measures.normals:
            encode, decode = self.network("vae_encoder"), self.network("vae_decoder")
            pairs["ceiling"] = autoencoded(encode, decode, *truth)
        rows = {row: self._figures(pair, truth) for row, pair in pairs.items()}
        shown = {"six views": view_row(views.color, views.normal), "truth": view_row(*truth)}
        if options.fits:
            outline, stand_ins = silhouette(copied[1])[0], dict[str, str]()
            for row, pair in {**pairs, "ceiling": truth}.items():
                if row not in meshes:
                    seconds = about["stage_seconds"] if row == "model" else None
                    meshes[row], reason = self._fit(pair, outline, seconds)
                    stand_ins |= {} if reason is None else {row: reason}
            about["stand_ins"] = stand_ins
            true_mesh = placed(obj, sample.object_to_world)
            for row, mesh in meshes.items():
                rows[row] |= mesh_figures(mesh, true_mesh)
            shown["mesh"] = turntable(as_object(meshes["model"]), GALLERY_PX)
            shown["true mesh"] = turntable(true_mesh, GALLERY_PX)
        sheet = record_path(options.out, name).with_suffix(".png")
        contact_sheet(sheet, [picture], [list(shown.values())], VIEW_PX)
        about["pictures"] = gallery_pictures(options.out, name, {"input": picture, **shown})
        return {**about, **finite({"rows": rows}), "stage_seconds": rounded(about["stage_seconds"])}

    def _fit(
        self, pair: ViewPair, outline: NDArray[np.bool_], seconds: dict[str, float] | None = None
    ) -> tuple[Any, str | None]:
        """The mesh of six views, and why an ellipsoid stands in if it does.

        The model's (with `seconds`, which gets those of its stages) is made as users make it, the others'
        without a texture: whether colours are baked or stored with the vertices changes nothing of the shape.
        """
        mesh_options = MeshOptions(texture="vertex") if seconds is None else MeshOptions()
        fit_options = FitOptions(seed=self.options.seed)
        try:
            made = self.pipeline.reconstruct(Views(*pair), fit_options=fit_options, mesh_options=mesh_options)
        except FitError as error:
            return ellipsoid_of(outline), str(error)
        if seconds is not None:
            for stage, spent in made.timings.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
        return made.mesh, None

    def _around(self, obj: Object, name: str) -> Record:
        """The viewpoint protocol; see `train.viewpoint`."""
        options, count = self.options, self.options.azimuths
        placements: list[FloatArray] = []
        pairs: dict[str, list[ViewPair]] = {"model": [], "input": [], "truth": []}
        against: dict[str, list[dict[str, float]]] = {"model": [], "input": []}
        meshes: list[Object] = []  # in the frame of azimuth 0
        seconds: dict[str, float] = {}
        pictures, lines, stand_ins = [], [], dict[str, str]()
        for azimuth, sample in zip(
            input_azimuths(count), samples_around(obj, options.seed, count, self.image_px), strict=True
        ):
            views, truth = self._views(sample), true_pair(sample)
            for stage, spent in views.timings.items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            placements.append(sample.object_to_world)
            copied = copied_input(obj, sample, self.image_px)
            shown = {"model": (views.color, views.normal), "input": copied, "truth": truth}
            for row, pair in shown.items():
                pairs[row].append(pair)
            for row, found in against.items():
                found.append(self._figures(shown[row], truth))
            pictures.append(np.round(copied[0][0] * 255.0).astype(np.uint8))
            lines.append([view_row(views.color, views.normal), view_row(*truth)])
            if options.fits:
                mesh, reason = self._fit(shown["model"], silhouette(copied[1])[0], seconds)
                stand_ins |= {} if reason is None else {f"{azimuth:g}": reason}
                true_mesh = placed(obj, sample.object_to_world)
                against["model"][-1] |= mesh_figures(mesh, true_mesh)
                meshes.append(placed(as_object(mesh), between(sample.object_to_world, placements[0])))
                lines[-1].append(turntable(meshes[-1], VIEW_PX))
        record: Record = {"azimuths": count, "pairs_of_views": len(coinciding(count)), "agreement": {}}
        for row, of_row in pairs.items():
            record["agreement"][row] = view_agreement(of_row, placements, self._figures)
        if options.fits:
            true_mesh = placed(obj, placements[0])
            record["agreement"]["model"] |= mesh_agreement(meshes, true_mesh)
            record["agreement"]["truth"] |= mesh_agreement([true_mesh] * 2, true_mesh)
        both = {row: mean_and_spread([finite(f) for f in found]) for row, found in against.items()}
        record["rows"] = {row: mean for row, (mean, _) in both.items()}
        record["spread"] = {row: spread for row, (_, spread) in both.items()}
        record["by_azimuth"] = [
            {"azimuth_deg": azimuth, **finite(figures)}
            for azimuth, figures in zip(input_azimuths(count), against["model"], strict=True)
        ]
        sheet = record_path(options.out, name).with_suffix(".png")
        contact_sheet(sheet, pictures, lines, VIEW_PX)
        record["pictures"] = [
            ["every input, six views, truth, mesh as from azimuth 0", f"objects/{name}.png"]
        ]
        return {**record, "stand_ins": {"azimuths": stand_ins}, "stage_seconds": rounded(seconds)}


def true_pair(sample: EvalSample) -> ViewPair:
    """The true views as the metrics take them."""
    normal, _ = decode_normals(sample.normal / 255.0)
    return sample.color.astype(np.float32) / np.float32(255.0), normal


def mesh_figures(mesh: Triangles, truth: Triangles) -> dict[str, float]:
    """Chamfer distance and volume IoU."""
    return {"chamfer": chamfer(mesh, truth), "volume_iou": volume_iou(mesh, truth)}


def gallery_pictures(
    out: Path, name: str, pictures: dict[str, NDArray[np.uint8]], px: int = GALLERY_PX
) -> list[Sequence[str]]:
    """Write an object's pictures for the gallery; `(title, path from OUT)` of each."""
    written: list[Sequence[str]] = []
    for title, pixels in pictures.items():
        path = Path("gallery") / name / f"{title.replace(' ', '_')}.png"
        height = 2 * px
        width = round(pixels.shape[1] * height / pixels.shape[0])
        write_picture(out / path, Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
        written.append((title, path.as_posix()))
    return written


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """To hundredths."""
    return {stage: round(value, 2) for stage, value in seconds.items()}


def finite(record: Record) -> Record:
    """A record with None where a figure is none."""
    return {
        key: finite(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and not math.isfinite(value) else value)
        for key, value in record.items()
    }
