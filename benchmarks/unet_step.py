"""Time a step of the UNet with guidance (12 views) on a GPU: the runtime's engines beside torch.

    python -m export build-engines --backend onnxruntime
    python benchmarks/unet_step.py [--bundle engines/edge] [--compile reduce-overhead] [--steps 50]

torch runs the same network, fp16, channels last, its weights random: eagerly and compiled.  Each is
warmed up and synchronised at every call; medians.  The runtime's step is the whole step: UNet, guidance
and DDIM, as a CUDA graph; two lines time all steps of a sample as users run them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

from export.example_inputs import example_inputs
from uc3d_rt.backends.choice import choose
from uc3d_rt.backends.onnxruntime_engines import StepSampler
from uc3d_rt.contract import Manifest, load_manifest
from uc3d_rt.errors import Uc3dError
from uc3d_rt.sampler import ddim_steps

WARM_UP = 10


@click.command(help=__doc__.split("\n")[0])
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("engines/edge"), show_default=True)
@click.option("--compile", "modes", multiple=True, default=("reduce-overhead",), show_default=True)
@click.option("--calls", default=200, show_default=True)
@click.option("--steps", default=50, show_default=True, help="Of the sample.")
def main(bundle: Path, modes: tuple[str, ...], calls: int, steps: int) -> None:
    manifest = load_manifest(bundle)
    try:
        choice = choose(bundle, manifest, "cuda", "onnxruntime")
    except Uc3dError as error:
        raise click.ClickException(str(error)) from error
    print(choice)
    free = _free_memory()
    sampler = choice.backend.open_sampler(bundle, manifest)
    assert isinstance(sampler, StepSampler)
    inputs = example_inputs(manifest.shape, "unet", 2, seed=1)
    given = {
        "tokens": inputs["tokens"][:1], "image_latent": inputs["image_latent"][:1], "focal": 0.0,
        "z_T": inputs["sample"][: manifest.shape.views],
    }  # fmt: skip
    guided = ddim_steps(manifest.schedule, steps, guidance=3.0)
    step_ms = _line("runtime, step with guidance", sampler.timed_step(calls, guided=True))
    _line("runtime, step without", sampler.timed_step(calls, guided=False))
    usual = manifest.sampling
    plan = ddim_steps(
        manifest.schedule, steps, guidance=usual.guidance, guidance_interval=usual.guidance_interval,
        first_step_to=usual.first_step_to,
    )  # fmt: skip
    rescale = usual.guidance_rescale
    all_guided = _times(lambda: sampler(**given, plan=guided, guidance=3.0, guidance_rescale=rescale), 20)
    share = statistics.median(all_guided) / (steps * step_ms)
    _line(f"{steps} steps, all with guidance", all_guided, f"{share:.2f} of {steps} x the step")
    as_usual = _times(
        lambda: sampler(**given, plan=plan, guidance=usual.guidance, guidance_rescale=rescale), 20
    )
    _line(f"{steps} steps, as the bundle has it", as_usual)
    print(f"GPU memory of the UNet with its CUDA graphs: {(free - _free_memory()) / 2**20:.0f} MiB")
    for mode, milliseconds in _torch_times(manifest, inputs, modes, calls):
        share = step_ms / statistics.median(milliseconds)
        _line(f"torch {mode}", milliseconds, f"runtime / torch {share:.2f}")


def _times(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of calls that return when their work is done."""
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - started))
    return found


def _free_memory() -> int:
    """Bytes free on the GPU; other programs on it are in the difference of two of these."""
    import torch

    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def _line(name: str, milliseconds: list[float], note: str = "") -> float:
    median = statistics.median(milliseconds)
    low, high = np.percentile(milliseconds, [10, 90])
    print(f"{name:40s} {median:8.3f} ms  ({low:.3f} to {high:.3f})  {note}", flush=True)
    return median


def _torch_times(
    manifest: Manifest, inputs: dict[str, np.ndarray], modes: tuple[str, ...], calls: int
) -> Iterator[tuple[str, list[float]]]:
    import torch

    from train.multiview_unet import MultiviewUNet
    from train.presets import PRESETS

    unet = MultiviewUNet(PRESETS[manifest.profile].unet).half().cuda().eval()
    unet = unet.to(memory_format=torch.channels_last)
    tensors = [torch.from_numpy(value).cuda().half() for value in inputs.values()]

    def call(network: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            network(*tensors)
            torch.cuda.synchronize()

        return run

    with torch.no_grad():
        yield "eager", _times(call(unet), calls)
        for mode in modes:
            torch._dynamo.reset()
            yield f"compile, {mode}", _times(call(torch.compile(unet, mode=mode)), calls)


if __name__ == "__main__":
    main()
