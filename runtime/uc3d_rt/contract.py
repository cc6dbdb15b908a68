"""Names, dtypes, shapes and units of every network's tensors, and the bundle manifest.

A bundle is a folder with `manifest.json` and one ONNX file a network.  Training, export and
runtime agree here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from uc3d_rt.errors import BundleError
from uc3d_rt.views import NUM_VIEWS

_LARGE_FILE_BYTES = 64 << 20
"""To read it takes longer than a tick of a file system's clock: who alters it later leaves another time."""

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

FOCAL_UNKNOWN = -1.0
"""Value of the `focal` input that selects the learned "unknown focal length" token."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that fix every tensor of a profile."""

    image_px: int  # side of every image the networks see
    latent_px: int  # side of a latent
    latent_channels: int  # channels of one VAE latent; a view's latent holds colour + normal
    tokens: int  # image tokens the UNet attends to
    token_dim: int
    embedding_dim: int  # of the projection heads
    views: int = NUM_VIEWS

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelShape.{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network; strings in `shape` are free dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


@dataclass(frozen=True)
class NetworkSpec:
    """One network of a bundle."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


NETWORK_NAMES: tuple[str, ...] = (
    "image_encoder",
    "vae_encoder",
    "unet",
    "vae_decoder",
    "projection_heads",
)


def network_specs(shape: ModelShape) -> dict[str, NetworkSpec]:
    """The tensor contract of the five networks, for a profile's sizes.

    Images are sRGB in [0, 1], white background; normal maps are encoded `(n + 1) / 2`.  Latents
    are scaled to about unit variance.  `samples` is `batch * views`, views varying fastest.
    """

    def image(name: str, meaning: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch", 3, shape.image_px, shape.image_px), meaning)

    def latent(name: str, lead: str, channels: int, meaning: str) -> TensorSpec:
        return TensorSpec(name, "float32", (lead, channels, shape.latent_px, shape.latent_px), meaning)

    def batch(name: str, meaning: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch",), meaning)

    def embedding(name: str) -> TensorSpec:
        return TensorSpec(name, "float32", ("batch", shape.embedding_dim), "unit-length embedding")

    c = shape.latent_channels
    tokens = TensorSpec(
        "tokens", "float32", ("batch", shape.tokens, shape.token_dim), "image tokens; zero = no image"
    )
    specs = (
        NetworkSpec("image_encoder", (image("image", "input view, [0, 1]"),), (tokens,)),
        NetworkSpec(
            "vae_encoder", (image("image", "[0, 1]"),), (latent("latent", "batch", c, "scaled latent"),)
        ),
        NetworkSpec(
            "unet",
            (
                latent("sample", "samples", 2 * c, "noisy [colour; normal] latents z_t"),
                batch("timestep", "diffusion step t, 0 = cleanest"),
                tokens,
                latent("image_latent", "batch", c, "E(y); zero = no image"),
                batch("focal", "f~ = focal_mm / 35; 0 = orthographic, -1 = unknown"),
            ),
            (latent("prediction", "samples", 2 * c, "eps or v, as the manifest's schedule says"),),
        ),
        NetworkSpec(
            "vae_decoder", (latent("latent", "batch", c, "scaled latent"),), (image("image", "[0, 1]"),)
        ),
        NetworkSpec(
            "projection_heads",
            (image("color", "[0, 1]"), image("normal", "encoded normals, [0, 1]")),
            (embedding("color_embedding"), embedding("normal_embedding")),
        ),
    )
    return {spec.name: spec for spec in specs}


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process (Eq. 5-6): which alpha_bar, and what the UNet predicts."""

    train_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_curve: Literal["linear", "scaled_linear"] = "linear"
    zero_terminal_snr: bool = False
    prediction: Literal["eps", "v"] = "eps"

    def __post_init__(self) -> None:
        if self.train_steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"not a noise schedule: {self}")
        if self.beta_curve not in ("linear", "scaled_linear"):
            raise ValueError(f"beta_curve must be linear or scaled_linear, got {self.beta_curve!r}")
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be eps or v, got {self.prediction!r}")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError("eps cannot be predicted at zero terminal SNR; use prediction='v'")


@dataclass(frozen=True)
class SamplingDefaults:
    """What the sampler does unless the user asks otherwise."""

    steps: int = 50
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # of t / T where guidance acts
    guidance_rescale: float = 0.0
    noise_scale: float = 1.0  # of the start noise; below 1: nearer to the mean of what may be
    first_step_to: float = 1.0  # t / T that the first step reaches; the others are spaced below it
    mirror: bool = False  # the first step is averaged with that of the picture's mirror image


@dataclass(frozen=True)
class WeightsFile:
    """Weights of a network beside its ONNX file, which refers to them: a file of ONNX ends at 2 GB."""

    file: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"not a file of this folder: {self.file!r}")


@dataclass(frozen=True)
class NetworkFile:
    """One network's file in a bundle."""

    file: str
    sha256: str
    bytes: int
    weights: WeightsFile | None = None

    @property
    def total_bytes(self) -> int:
        """With the weights beside it."""
        return self.bytes + (self.weights.bytes if self.weights else 0)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: all the runtime must know of a bundle."""

    profile: str
    shape: ModelShape
    schedule: NoiseSchedule
    sampling: SamplingDefaults
    networks: dict[str, NetworkFile]
    training: dict[str, Any] = field(default_factory=dict)  # data, licences, steps, losses
    parity: dict[str, Any] = field(default_factory=dict)  # measured at export
    quality: dict[str, Any] = field(default_factory=dict)  # measured by `train evaluate`
    format_version: int = FORMAT_VERSION


def save_manifest(manifest: Manifest, bundle: Path) -> None:
    """Write `manifest.json` into a bundle folder, atomically."""
    target = bundle / MANIFEST_NAME
    temporary = bundle / f".{MANIFEST_NAME}.{os.getpid()}.tmp"
    data = asdict(manifest)
    data["networks"] = {name: without_nothing(entry) for name, entry in data["networks"].items()}
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def without_nothing(entry: dict[str, Any]) -> dict[str, Any]:
    """A file's record as it is written: nothing of weights that do not stand beside it."""
    return {key: value for key, value in entry.items() if key != "weights" or value is not None}


def load_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        BundleError: the folder or file is missing, is no JSON, or is of another format version.
    """
    path = bundle / MANIFEST_NAME
    if not bundle.is_dir():
        raise BundleError(f"no bundle at {bundle}: give the folder that holds {MANIFEST_NAME}")
    if not path.is_file():
        raise BundleError(f"{path} is missing; the bundle is incomplete, fetch or export it again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{path} has format version {version}, this runtime reads {FORMAT_VERSION}; "
                "export the bundle again with the matching version"
            )
        sampling = dict(data["sampling"])
        sampling["guidance_interval"] = tuple(sampling["guidance_interval"])
        manifest = Manifest(
            profile=data["profile"],
            shape=ModelShape(**data["shape"]),
            schedule=NoiseSchedule(**data["schedule"]),
            sampling=SamplingDefaults(**sampling),
            networks={
                name: NetworkFile(**{**entry, "weights": weights_of(entry)})
                for name, entry in data["networks"].items()
            },
            training=data["training"],
            parity=data["parity"],
            quality=data["quality"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error}); fetch or export the bundle again") from error
    missing = [name for name in NETWORK_NAMES if name not in manifest.networks]
    if missing:
        raise BundleError(f"{path} names no {', '.join(missing)}; export the bundle again")
    if manifest.shape.views != NUM_VIEWS:
        raise BundleError(
            f"{path} is of {manifest.shape.views} views, this runtime has cameras for {NUM_VIEWS}"
        )
    return manifest


def weights_of(entry: dict[str, Any]) -> WeightsFile | None:
    """The weights beside a network, of its record in a file of JSON."""
    found = entry.get("weights")
    return None if found is None else WeightsFile(**found)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces; a large one that did not change is read once a process."""
    state = path.stat()
    if state.st_size < _LARGE_FILE_BYTES:
        return _sha256(path)
    return _known_sha256(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _known_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verified_network_path(bundle: Path, manifest: Manifest, name: str) -> Path:
    """Path of a network's file after checking that it is the one the manifest was written for.

    Raises:
        BundleError: the file is missing, or its SHA-256 differs.
    """
    entry = manifest.networks[name]
    path = bundle / entry.file
    if Path(entry.file).name != entry.file:
        raise BundleError(f"{bundle / MANIFEST_NAME} names a file outside the bundle: {entry.file!r}")
    if not path.is_file():
        raise BundleError(f"{path} is missing; the bundle is incomplete, fetch or export it again")
    actual = sha256_of(path)
    if actual != entry.sha256:
        raise BundleError(
            f"{path} was altered: SHA-256 {actual[:12]}… instead of {entry.sha256[:12]}…; "
            "fetch or export the bundle again"
        )
    beside = weights_fault(entry.weights, bundle)
    if beside is not None:
        raise BundleError(f"{bundle / beside}; fetch or export the bundle again")
    return path


def weights_fault(weights: WeightsFile | None, folder: Path) -> str | None:
    """What is wrong with the weights beside a network, if anything: "NAME is missing" and the like."""
    if weights is None:
        return None
    path = folder / weights.file
    if not path.is_file():
        return f"{weights.file} is missing"
    if path.stat().st_size != weights.bytes or sha256_of(path) != weights.sha256:
        return f"{weights.file} was altered or damaged"
    return None
