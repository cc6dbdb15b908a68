"""What a training run would take: parameters, memory of each GPU, time and money, without running it.

Weights, gradients, optimiser state and average are counted.  Activations are traced: one step goes
through forward and backward on tensors without contents, in the types that autocast gives them, and
the most that is alive at once is kept.  The trace knows no workspaces of kernels, no fragmentation
and none of the CUDA context, a few GiB on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from train.checkpoint import build_vae
from train.model import Batch, MultiviewModel
from train.normal_probe import NormalProbe
from train.optimizer import is_matrix
from train.presets import Preset
from train.trainer import recompute_blocks

GIB = 2**30
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Plan:
    """A run that is thought of."""

    preset: Preset
    processes: int = 1
    cache_bytes: int = 0  # of the latents on each GPU
    sharded: bool = False  # weights, gradients, moments and average spread over the processes
    step_seconds: float | None = None
    gpu_hour_price: float | None = None

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"a run has 1 process or more, got {self.processes}")
        for name in ("step_seconds", "gpu_hour_price"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def objects_a_step(self) -> int:
        """Of all processes."""
        return self.preset.train.batch * self.processes

    @property
    def hours(self) -> float | None:
        """Wall time; None without the time of a step."""
        return None if self.step_seconds is None else self.preset.train.steps * self.step_seconds / 3600

    @property
    def price(self) -> float | None:
        """Of all GPUs for all of the time."""
        if self.hours is None or self.gpu_hour_price is None:
            return None
        return self.hours * self.processes * self.gpu_hour_price


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made under it, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def parameter_counts(preset: Preset) -> dict[str, int]:
    """Parameters of each network; the autoencoder's are not trained."""
    with torch.device("meta"):
        model, vae = MultiviewModel(preset), build_vae(preset)
    parts = {"image encoder": model.encoder, "UNet": model.unet, "projection heads": model.heads}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return counts | {"autoencoder": sum(p.numel() for p in vae.state_dict().values())}


def traced_activations(preset: Preset) -> int:
    """Bytes alive at the fullest moment of a step on one GPU, beyond weights and gradients."""
    b, shape = preset.train.batch, preset.shape
    with FakeTensorMode():
        model, vae = MultiviewModel(preset), build_vae(preset).requires_grad_(False)
        model.alpha_bar = torch.zeros(preset.schedule.train_steps)
        probe = NormalProbe(preset.unet.latent_channels).requires_grad_(False)
        if preset.train.gradient_checkpointing:
            recompute_blocks(model, vae)
        if preset.train.losses.lambda_mi == 0:
            model.heads.requires_grad_(False)
        side, channels = shape.latent_px, shape.latent_channels
        batch = Batch(
            z_0=torch.zeros(b, preset.unet.views, 2 * channels, side, side),
            image=torch.zeros(b, 3, shape.image_px, shape.image_px),
            image_latent=torch.zeros(b, channels, side, side),
            focal=torch.zeros(b),
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # counted by itself
        live = _LiveBytes()
        with live:
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(batch, vae, torch.Generator(), probe)
            losses["total"].backward()
    return live.peak


def memory_parts(plan: Plan, activations: int | None = None) -> dict[str, tuple[int, str]]:
    """Bytes on each GPU by part, and how each is known.

    Args:
        activations: measured elsewhere; None traces them.
    """
    preset, spec = plan.preset, plan.preset.train
    with torch.device("meta"):
        model, vae = MultiviewModel(preset), build_vae(preset)
    if spec.losses.lambda_mi == 0:
        model.heads.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained)
    momentum_only = sum(p.numel() for p in trained if is_matrix(p)) if spec.optimizer == "muon" else 0
    parts = plan.processes if plan.sharded else 1
    share = f", one of {parts} parts" if parts > 1 else ""
    found = {
        "weights": (FLOAT * everything // parts, f"counted, float32{share}"),
        "gradients": (FLOAT * count // parts, f"counted, float32{share}"),
        "optimiser state": (
            FLOAT * (2 * count - momentum_only) // parts,
            f"counted, {spec.optimizer}, float32{share}",
        ),
        "moving average": (FLOAT * everything // parts, f"counted, float32{share}"),
        "autoencoder": (FLOAT * sum(p.numel() for p in vae.state_dict().values()), "counted, float32"),
        "latent cache": (
            plan.cache_bytes,
            "counted" if plan.cache_bytes else "none on the GPU, or none given",
        ),
    }
    traced = traced_activations(preset) if activations is None else activations
    return found | {"activations": (traced, "estimated: traced without contents")}


def report(plan: Plan, counts: Mapping[str, int], memory: Mapping[str, tuple[int, str]]) -> str:
    """What a user reads."""
    spec = plan.preset.train
    rows: list[Sequence[str]] = [(name, f"{count / 1e6:,.1f} M") for name, count in counts.items()]
    lines = [f"parameters of `{plan.preset.name}`", *_aligned(rows), "", "memory of each GPU"]
    rows = [(name, f"{size / GIB:.1f} GiB", how) for name, (size, how) in memory.items()]
    total = sum(size for size, _ in memory.values())
    rows.append(("in all", f"{total / GIB:.1f} GiB", "and a few GiB of workspaces, fragments and context"))
    lines += [*_aligned(rows), "", "run"]
    rate = f"{spec.lr:g}, {spec.lr_final:g} from step {spec.lr_drop} on"
    if not spec.lr_drop:
        rate = f"{spec.lr:g} to {spec.lr_final:g} along a cosine"
    rows = [
        ("processes", str(plan.processes), ""),
        ("objects a step", str(plan.objects_a_step), f"{spec.batch} on each"),
        ("steps", str(spec.steps), f"{spec.steps * plan.objects_a_step:,} objects in all"),
        ("learning rate", rate, f"{spec.warmup} steps of warm-up"),
    ]
    if plan.step_seconds is not None and plan.hours is not None:
        rows.append(("a step", f"{plan.step_seconds:g} s", "given"))
        rows.append(("objects a second", f"{plan.objects_a_step / plan.step_seconds:.1f}", ""))
        rows.append(("wall time", f"{plan.hours:.1f} h", f"{plan.hours * plan.processes:.0f} GPU hours"))
    if plan.price is not None:
        rows.append(("cost", f"{plan.price:,.0f}", f"at {plan.gpu_hour_price:g} a GPU hour, given"))
    return "\n".join(lines + _aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {'  '.join(row[2:])}".rstrip() for row in rows]
