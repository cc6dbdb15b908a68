"""What is installed, what the machine has, and what of it the runtime can use, in lines to print."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from uc3d_rt.backends.base import DEVICES
from uc3d_rt.backends.choice import choose
from uc3d_rt.backends.onnxruntime import check_provider
from uc3d_rt.contract import Manifest, load_manifest, verified_network_path
from uc3d_rt.cuda_device import cuda_driver
from uc3d_rt.engines import (
    LIBRARY_MODULES,
    Machine,
    built_folders,
    installed_version,
    load_engine_set,
    misfits,
    this_machine,
)
from uc3d_rt.errors import BackendError, BundleError

ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
"""Two distributions of one module: whichever was installed last has overwritten the other."""


def diagnose(bundle: Path) -> tuple[list[str], list[str]]:
    """Lines on this machine, and what is wrong, each with its mend; nothing wrong: the main job runs."""
    wrong = []
    lines = [f"uc3d-rt {_version('uc3d-rt') or 'from a source tree'}"]
    lines.append(
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {sys.prefix}"
    )
    packages = [f"{name} {found}" for name in ONNX_RUNTIMES if (found := _version(name)) is not None]
    if len(packages) == 2:
        wrong.append(
            f"{' and '.join(packages)} are both installed and share one module; run: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime "
            "(with an NVIDIA GPU: 'onnxruntime-gpu[cuda,cudnn]')"
        )
    lines.append(", ".join(packages) or "no ONNX Runtime was installed by pip")
    try:
        import onnxruntime
    except ImportError as error:
        wrong.append(f"ONNX Runtime does not load ({error}); run: pip install --force-reinstall onnxruntime")
    else:
        lines.append(
            f"  module {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"
        )
    machine = this_machine()
    lines += machine_lines(machine)
    try:
        manifest = load_manifest(bundle)
        for name in manifest.networks:
            verified_network_path(bundle, manifest, name)
    except BundleError as error:
        wrong.append(str(error))
    else:
        lines.append(f"bundle {bundle}: profile {manifest.profile}, all files as they were written")
        lines += engine_lines(bundle, manifest, machine)
        lines += device_lines(bundle, manifest)
    return lines, wrong


def device_lines(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """What `--device` and `--fit-device` would run on."""
    for device in DEVICES:
        try:
            check_provider(device)
            yield f"--device {device}: {choose(bundle, manifest, device)}"
        except (BackendError, ImportError) as error:
            yield f"--device {device}: {error}"
    try:
        cuda_driver()
        yield "--fit-device cuda: ready"
    except BackendError as error:
        yield f"--fit-device cuda: {error}"


def machine_lines(machine: Machine | None) -> Iterator[str]:
    """The GPU, and the libraries that build or open engines."""
    if machine is None:
        yield "GPU: none (nvidia-smi names none)"
    else:
        yield f"GPU: {machine.gpu}, {machine.target}, driver {machine.driver}"
    for backend in LIBRARY_MODULES:
        yield f"  {backend} {installed_version(backend) or 'not installed'}"


def engine_lines(bundle: Path, manifest: Manifest, machine: Machine | None) -> Iterator[str]:
    """Engines of a bundle, and whether they fit the machine."""
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
            found = "not checked" if engine.relative_error is None else f"{engine.relative_error:.1e}"
            beside = f"; weights in {engine.weights.file}" if engine.weights else ""
            yield (
                f"  {name:17s} {engine.total_bytes / 2**20:7.2f} MiB  {engine.sha256[:12]}  "
                f"objects a call: {batches}; relative error {found}{beside}"
            )
        reasons = misfits(engines, folder, manifest, machine, installed_version(engines.backend))
        yield "  fits this machine" if not reasons else f"  does not fit this machine: {'; '.join(reasons)}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
