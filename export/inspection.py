"""What a bundle holds and what its engines were built for, in lines to print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from export.tensorrt_builder import LIBRARIES, installed_version
from uc3d_rt.contract import load_manifest, network_specs, verified_network_path
from uc3d_rt.engines import built_folders, load_engine_set, misfits, this_machine
from uc3d_rt.errors import BundleError


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
        f"predicts {manifest.schedule.prediction}"
    )
    for name, spec in network_specs(shape).items():
        entry = manifest.networks[name]
        verified_network_path(bundle, manifest, name)
        given = ", ".join(f"{t.name} {'x'.join(map(str, t.shape))}" for t in spec.inputs)
        yield f"  {name:17s} {entry.bytes / 2**20:7.2f} MiB  {entry.sha256[:12]}  {given}"

    machine = this_machine()
    if machine is None:
        yield "this machine: no NVIDIA GPU (nvidia-smi names none)"
    else:
        yield f"this machine: {machine.gpu}, {machine.target}, driver {machine.driver}"
    for backend in LIBRARIES:
        yield f"  {backend} {installed_version(backend) or 'not installed'}"

    folders = built_folders(bundle)
    if not folders:
        yield "engines: none; make them with: python -m export build-engines"
    for folder in folders:
        yield f"engines {folder}"
        try:
            engines = load_engine_set(folder)
        except BundleError as error:
            yield f"  unusable: {error}"
            continue
        yield (
            f"  {engines.backend} {engines.version}, {engines.precision}, for "
            f"{', '.join(engines.targets) or 'every GPU that it knows'}"
        )
        for name, engine in engines.engines.items():
            batches = " and ".join(map(str, engine.batches))
            yield (
                f"  {name:17s} {engine.bytes / 2**20:7.2f} MiB  {engine.sha256[:12]}  "
                f"objects a call: {batches}; fp16 relative error {engine.relative_error:.1e}"
            )
        reasons = misfits(engines, folder, manifest, machine, installed_version(engines.backend))
        yield "  fits this machine" if not reasons else f"  does not fit this machine: {'; '.join(reasons)}"
