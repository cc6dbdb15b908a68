"""What a bundle holds and what its engines were built for, in lines to print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uc3d_rt.contract import load_manifest, network_specs, verified_network_path
from uc3d_rt.doctor import engine_lines, machine_lines
from uc3d_rt.engines import this_machine


def describe(bundle: Path) -> Iterator[str]:
    """Lines on a bundle, its engines and this machine.

    Raises:
        BundleError: the bundle is missing, incomplete or altered; engines that are not are told of.
    """
    manifest = load_manifest(bundle)
    sampling, shape = manifest.sampling, manifest.shape
    yield f"bundle {bundle}: profile {manifest.profile}, {shape.image_px} px, {shape.views} views"
    yield (
        f"  {sampling.steps} steps, guidance {sampling.guidance:g} for t/T in {sampling.guidance_interval}, "
        f"{'with' if sampling.mirror else 'without'} mirror image, predicts {manifest.schedule.prediction}"
    )
    for name, spec in network_specs(shape).items():
        entry = manifest.networks[name]
        verified_network_path(bundle, manifest, name)
        given = ", ".join(f"{t.name} {'x'.join(map(str, t.shape))}" for t in spec.inputs)
        yield f"  {name:17s} {entry.total_bytes / 2**20:7.2f} MiB  {entry.sha256[:12]}  {given}"
    machine = this_machine()
    yield from machine_lines(machine)
    yield from engine_lines(bundle, manifest, machine)
