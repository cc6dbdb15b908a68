"""READ FIRST: one picture to a textured mesh, one call a stage.

    preprocess → encode → diffuse → decode → fit → mesh

`generation.py` has the stages from encode to decode.  Each network is opened when it is needed and closed
after that, so that memory holds one at a time; `ladder.py` has what is done where that is too much.  The
same input, options and seed on the same machine give the same mesh.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.backends.base import Backend, Network, Place, Resource, Sampler
from uc3d_rt.backends.choice import Choice, choose, chosen_device
from uc3d_rt.contract import Manifest, SamplingDefaults, load_manifest
from uc3d_rt.device import Scope
from uc3d_rt.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from uc3d_rt.generation import ViewGenerator
from uc3d_rt.gpu_memory import ProcessMemory
from uc3d_rt.ladder import LowMemory, lower_rungs
from uc3d_rt.preprocess import ImageSource, preprocess
from uc3d_rt.stage_clock import Progress, StageClock

if TYPE_CHECKING:
    import trimesh

    from uc3d_rt.cuda_device import CudaDevice
    from uc3d_rt.device import Device
    from uc3d_rt.mesh.build import MeshOptions
    from uc3d_rt.neus.field import DeviceField, Field
    from uc3d_rt.neus.fit_plan import FitOptions

FloatArray = NDArray[np.float32]

Held = TypeVar("Held", bound=Resource)

_CHUNK = 4  # images or latents a call; bounds the autoencoder's memory


@dataclass(frozen=True)
class _OnGpu:
    """What all that ran on a GPU says of its memory.

    Read at the end of each stage, before anything that is large is given back: arenas and pools do not
    shrink while they are held, so that this is the most that the stage took.  All memory of the process
    counts, with the CUDA context and the code of libraries, on the GPU where it has most.
    """

    gpu_mib: dict[str, int] = field(default_factory=dict, kw_only=True)
    """MiB in use at most, a stage; empty on a CPU, and where NVML does not tell."""

    @property
    def gpu_peak_mib(self) -> int | None:
        """MiB in use at most; None on a CPU, and where NVML does not tell."""
        return max(self.gpu_mib.values(), default=None)


@dataclass(frozen=True)
class Views(_OnGpu):
    """The six generated views, azimuths 30 … 330 degrees."""

    color: FloatArray  # (6, H, W, 3), sRGB in [0, 1], white background
    normal: FloatArray  # (6, H, W, 3), unit world normals, zero background
    timings: dict[str, float] = field(default_factory=dict)  # seconds a stage
    notes: tuple[str, ...] = ()  # doubts about the input, for the user


@dataclass(frozen=True)
class Result(_OnGpu):
    """All that one run makes."""

    views: Views
    mesh: trimesh.Trimesh  # +Y up, +Z towards the input camera; see `build_mesh` on seams
    timings: dict[str, float]  # seconds a stage
    notes: tuple[str, ...]


class Pipeline:
    """A bundle and the device it runs on.

    Networks are loaded for each call and freed again; within `with pipeline:` they stay loaded,
    which many pictures in a row want, unless its backend is of low memory.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: Backend,
        choice: Choice | None = None,
        fit_device: str = "cpu",
        mesh_device: str = "cpu",
        gpu_memory: ProcessMemory | None = None,
    ) -> None:
        self.bundle = bundle
        self.fit_device = fit_device
        self.mesh_device = mesh_device
        self.choice = choice  # which backend it is, and why; None if it was given
        self.manifest = manifest
        self._backend = backend
        self._held: dict[str, Resource] | None = None
        self._gpu_memory = gpu_memory  # reads it; None on a CPU
        self._clock = StageClock()  # of the run that goes on, or was the last

    @classmethod
    def from_bundle(
        cls,
        path: str | Path | None = None,
        device: str = "cpu",
        threads: int | None = None,
        backend: str = "auto",
        *,
        fit_device: str | None = None,
        low_memory: LowMemory = False,
        deterministic: bool = False,
        precision: str = "auto",
        mesh_device: str | None = None,
    ) -> Pipeline:
        """Open a bundle; None is the one that ships.

        Args:
            path: folder with `manifest.json`.
            device: "cpu", "cuda" or "cuda:N", and never another than the one asked for; "auto" is the first
                GPU if there is one that can be used, else the CPU, and `choice` says why.
            threads: CPU threads a network may use; None leaves the choice to ONNX Runtime.
            backend: "auto" takes the fastest that fits the device; `choice` says which and why.
            fit_device: "cpu", "cuda" or "cuda:N", of the fit; None = `device`.
            low_memory: name of a rung of `uc3d_rt.ladder.LADDER`, which says what each does: "off", "stages",
                "unet" or "least"; True is "unet".  The views are the same but for rounding; a sample takes
                longer.  No rung is ever taken for another.
            deterministic: run only what gives the same bits each time.  On the CPU everything does; on a
                GPU it is what `python -m export build-engines --deterministic` built.
            precision: "fp16", "int8" or "fp8": run engines of that precision and no others; "auto" takes
                fp16 before others.
            mesh_device: where the surface is extracted and textured: "cpu", or the fit's device; None = that.

        Raises:
            BundleError: the bundle is missing, incomplete or of another format version.
            UsageError: unknown device, backend, precision or rung, a mesh apart from the fit, or `threads`
                below 1.
            BackendError: a device or backend asked for cannot run here.
        """
        asked, (device, why) = device, chosen_device(device)
        places = Place.named(device), Place.named(device if fit_device is None else fit_device)
        bundle = default_bundle() if path is None else Path(path)
        manifest = load_manifest(bundle)
        for name, entry in manifest.networks.items():
            if not (bundle / entry.file).is_file():
                raise BundleError(
                    f"{bundle / entry.file} ({name}) is missing; the bundle is incomplete, "
                    "fetch or export it again"
                )
        choice = choose(
            bundle, manifest, str(places[0]), backend, threads, low_memory, deterministic, precision
        )
        fit_place = places[1]
        if fit_place.kind == "cuda":
            from uc3d_rt.cuda_device import cuda_driver

            try:
                cuda_driver(fit_place.ordinal)  # before any work is done
            except BackendError as error:
                if asked != "auto" or fit_device is not None:
                    raise
                fit_place, why = Place("cpu"), f"{why}; the fit runs on the CPU: {error}"
        mesh_device = str(fit_place) if mesh_device is None else mesh_device
        if mesh_device not in ("cpu", str(fit_place)):
            raise UsageError(
                f"the mesh is made on the CPU or where the fit runs ({fit_place}), not on {mesh_device!r}"
            )
        if asked == "auto":
            choice = replace(choice, reason=f"{why}; {choice.reason}", notable=True)
        gpu_memory = ProcessMemory.opened() if "cuda" in (places[0].kind, fit_place.kind) else None
        return cls(bundle, manifest, choice.backend, choice, str(fit_place), mesh_device, gpu_memory)

    def __call__(
        self,
        image: ImageSource,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise_scale: float | None = None,
        first_step_to: float | None = None,
        mirror: bool | None = None,
        seed: int = 0,
        focal_mm: float | None = None,
        fit_options: FitOptions | None = None,
        mesh_options: MeshOptions | None = None,
        on_progress: Progress | None = None,
    ) -> Result:
        """Reconstruct the object in a picture.

        Args:
            image: path, Pillow image, or RGB / RGBA array (H, W, 3 or 4).
            steps: DDIM steps; None takes the bundle's default.
            guidance: classifier-free guidance scale, 1 = off; None takes the bundle's default.
            noise_scale: of the start noise, 0 to 1: less is smoother and varies less with the seed;
                None takes the bundle's default.
            first_step_to: share of T that the first step reaches, above 0, to 1: less keeps more of the
                mean of what the picture may show; None takes the bundle's default.
            mirror: average the first step with that of the picture's mirror image, for one more call of the
                network; None takes the bundle's default.
            seed: of the start noise and of the fit's ray choice.
            focal_mm: 35 mm-equivalent focal length; overrides EXIF; 0 = orthographic.
            fit_options: None = `FitOptions(seed=seed)`.
            mesh_options: None = `MeshOptions()`.
            on_progress: told `(stage, done, total)`.

        Raises:
            ImageError, UsageError, BundleError, BackendError, FitError: see `uc3d_rt.errors`.
            OutOfMemoryError: saying what would fit; all that was held is freed, and the next call begins
                anew.
        """
        views = self.views(
            image,
            steps=steps,
            guidance=guidance,
            noise_scale=noise_scale,
            first_step_to=first_step_to,
            mirror=mirror,
            seed=seed,
            focal_mm=focal_mm,
            on_progress=on_progress,
        )
        return self.reconstruct(
            views, seed=seed, fit_options=fit_options, mesh_options=mesh_options, on_progress=on_progress
        )

    def views(
        self,
        image: ImageSource,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise_scale: float | None = None,
        first_step_to: float | None = None,
        mirror: bool | None = None,
        seed: int = 0,
        focal_mm: float | None = None,
        on_progress: Progress | None = None,
    ) -> Views:
        """Generate the six views, without the fit; arguments and errors as `__call__`."""
        usual = self.manifest.sampling
        sampling = replace(
            usual,
            steps=usual.steps if steps is None else steps,
            guidance=usual.guidance if guidance is None else guidance,
            noise_scale=usual.noise_scale if noise_scale is None else noise_scale,
            first_step_to=usual.first_step_to if first_step_to is None else first_step_to,
            mirror=usual.mirror if mirror is None else mirror,
        )
        self._check_sampling(sampling, seed)
        self._clock = clock = StageClock(on_progress, self._gpu_memory)
        with clock.stage("preprocess"):
            given = preprocess(image, self.manifest.shape.image_px, focal_mm)
        with self._memory_bound(self._network_mend):
            generator = self._generator()
            with clock.stage("encode"):
                pictures = generator.encode(given.image, sampling.mirror)
            with clock.stage("diffuse") as tick:
                z_0 = generator.diffuse(pictures, given.focal, sampling, seed, tick)
            with clock.stage("decode") as tick:
                color, normal = generator.decode(z_0, tick)
        return Views(color, normal, clock.seconds, given.notes, gpu_mib=clock.gpu_mib)

    def reconstruct(
        self,
        views: Views,
        *,
        seed: int = 0,
        fit_options: FitOptions | None = None,
        mesh_options: MeshOptions | None = None,
        on_progress: Progress | None = None,
    ) -> Result:
        """Fit a surface to six views and mesh it; arguments as `__call__`.

        Raises:
            FitError: the views hold no surface.
            BackendError: the fit's device is not there, or fails; OutOfMemoryError as `__call__`.
        """
        # numba compiles or loads its kernels here: not before the views are there.
        from uc3d_rt.mesh.build import MeshOptions, build_mesh
        from uc3d_rt.neus.fit import fit
        from uc3d_rt.neus.fit_plan import FitOptions

        fit_options = fit_options or FitOptions(seed=seed)
        mesh_options = mesh_options or MeshOptions()
        self._clock = clock = StageClock(on_progress, self._gpu_memory)
        device: CudaDevice | None = None
        fitted = False

        def mend() -> str:
            return self._mesh_mend() if fitted else self._fit_mend(device, views, fit_options)

        with ExitStack() as opened, self._memory_bound(mend), ExitStack() as taken:
            surface: Field | DeviceField
            scope: Device | None = None
            with clock.stage("fit") as tick:
                device = opened.enter_context(self._fit_device())
                counted = self._counted(device)
                if counted is None or self.mesh_device == "cpu":
                    surface = fit(views.color, views.normal, fit_options, tick, counted)
                else:
                    from uc3d_rt.neus.device_fit import fit_on_device

                    scope = taken.enter_context(Scope(counted))
                    surface = fit_on_device(scope, views.color, views.normal, fit_options, tick)
            fitted = True
            with clock.stage("mesh") as tick:
                mesh = build_mesh(surface, views.color, views.normal, mesh_options, tick, scope)
        seconds, gpu_mib = {**views.timings, **clock.seconds}, {**views.gpu_mib, **clock.gpu_mib}
        return Result(views, mesh, seconds, views.notes, gpu_mib=gpu_mib)

    def __enter__(self) -> Pipeline:
        """Keep networks loaded until the `with` block ends, unless the rung of low memory frees them."""
        self._held = None if self._backend.low_memory.frees_stages else {}
        return self

    def __exit__(self, *_: object) -> None:
        """Free the networks."""
        self._free_held()
        self._held = None

    def _generator(self) -> ViewGenerator:
        chunk = 1 if self._backend.low_memory.small_buffers else _CHUNK
        return ViewGenerator(self.manifest, self._network, self._sampler, chunk)

    @contextmanager
    def _network(self, name: str) -> Iterator[Network]:
        opened = partial(self._backend.open, self.bundle, self.manifest, name)
        with self._resource(name, opened) as network:
            yield network

    @contextmanager
    def _sampler(self) -> Iterator[Sampler]:
        with self._resource(
            "sampler", lambda: self._backend.open_sampler(self.bundle, self.manifest)
        ) as sampler:
            yield sampler

    @contextmanager
    def _fit_device(self) -> Iterator[CudaDevice | None]:
        if self.fit_device == "cpu":
            yield None
            return
        from uc3d_rt.cuda_device import CudaDevice

        ordinal = Place.named(self.fit_device).ordinal
        with self._resource("fit device", lambda: CudaDevice(ordinal)) as device:
            yield device

    @contextmanager
    def _resource(self, name: str, opened: Callable[[], Held]) -> Iterator[Held]:
        if self._held is None:
            with opened() as resource:
                yield resource
                self._clock.read_memory()
        else:
            if name not in self._held:
                self._held[name] = opened()
            yield cast(Held, self._held[name])

    def _free_held(self) -> None:
        held = list((self._held or {}).values())
        if self._held:
            self._held.clear()
        for resource in held:
            resource.close()

    def _counted(self, device: CudaDevice | None) -> Device | None:
        """A device whose memory is read before any is given back."""
        if device is None or self._gpu_memory is None:
            return device
        from uc3d_rt.counting_device import CountingDevice

        return cast("Device", CountingDevice(device, self._clock.read_memory))

    @contextmanager
    def _memory_bound(self, mend: Callable[[], str]) -> Iterator[None]:
        """Where memory runs out, say what would fit, and free all that is held."""
        try:
            yield
        except OutOfMemoryError as error:
            told = mend()
            self._free_held()
            cause: BaseException | None = error
            while cause is not None:  # its frames hold sessions and arrays for as long as the error lives
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__
            raise OutOfMemoryError(error.what, told) from error

    def _network_mend(self) -> str:
        last = "no rung of --low-memory is left: free memory of the device, or use another with --device"
        return lower_rungs(self._backend.low_memory) or last

    def _fit_mend(self, device: CudaDevice | None, views: Views, options: FitOptions) -> str:
        if device is None:  # it could not even be opened
            return self._mends(["free memory of the GPU", "add --fit-device cpu"])
        from uc3d_rt.neus.fit_memory import largest_resolution

        free, _ = device.free_memory()
        fits = largest_resolution(views.color, views.normal, options, free)
        if fits is None:
            smaller = f"no --resolution fits into the {free / 2**20:,.0f} MiB that are free"
        else:
            resolution, needed = fits
            smaller = (
                f"use --resolution {resolution}, the largest that would fit: its arrays take "
                f"{needed / 2**20:,.0f} MiB of the {free / 2**20:,.0f} that are free"
            )
        return self._mends([smaller, "add --fit-device cpu"])

    def _mesh_mend(self) -> str:
        return self._mends(["use a smaller --resolution", "add --mesh-device cpu"])

    def _mends(self, ways: list[str]) -> str:
        """Ways out of too little memory for fit or mesh; to free networks comes first where they are held."""
        held = len(self._held or {}) > ("fit device" in (self._held or {}))
        return ", or ".join(["use --low-memory stages, which frees the networks first"] * held + ways)

    def _check_sampling(self, sampling: SamplingDefaults, seed: int) -> None:
        most = self.manifest.schedule.train_steps
        if not 0.0 < sampling.first_step_to <= 1.0:
            raise UsageError(f"first_step_to must be above 0, to 1, got {sampling.first_step_to}")
        # All steps but the first lie below it.
        most = most if sampling.first_step_to >= 1.0 else round(most * sampling.first_step_to) + 1
        if not 1 <= sampling.steps <= most:
            raise UsageError(f"steps must be between 1 and {most}, got {sampling.steps}")
        if not (math.isfinite(sampling.guidance) and sampling.guidance >= 0.0):
            raise UsageError(f"guidance must be a number >= 0 (1 = off), got {sampling.guidance}")
        if not 0.0 <= sampling.noise_scale <= 1.0:
            raise UsageError(f"noise_scale must be between 0 and 1, got {sampling.noise_scale}")
        if seed < 0:
            raise UsageError(f"seed must be 0 or more, got {seed}")


def default_bundle() -> Path:
    """The bundle that ships: inside an installed package, or `engines/edge` of a source tree."""
    here = Path(__file__).resolve()
    installed = here.parent / "bundles" / "edge"
    return installed if installed.is_dir() else here.parents[2] / "engines" / "edge"
