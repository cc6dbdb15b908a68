"""Engines: built for real by TensorRT-RTX, with or without a GPU, from tiny networks and those that ship."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from export import engine_plan
from export import engines as engines_module
from export.__main__ import cli
from export.engine_plan import BuildOptions, Job, chosen_backend, plan_build
from export.engines import build, first_error
from export.tensorrt_builder import build_engine, check_targets, known_targets
from export.typed_graph import typed_graph
from uc3d_rt.contract import NETWORK_NAMES, NetworkFile, load_manifest, save_manifest, sha256_of
from uc3d_rt.engines import (
    EngineFile,
    EngineSet,
    Machine,
    built_folders,
    load_engine_set,
    misfits,
    save_engine_set,
    this_machine,
)
from uc3d_rt.errors import BackendError, BundleError, OutputError, UsageError
from uc3d_rt.pipeline import default_bundle

pytest.importorskip("tensorrt_rtx", reason="builds engines; install the extra `engines`")

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with its engines; read only."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("built") / "tiny"))
    build(plan_build(BuildOptions(folder, "tensorrt-rtx", TARGETS)))
    return folder


@pytest.fixture
def built_copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tiny"))


def only_folder(bundle: Path) -> Path:
    (folder,) = built_folders(bundle)
    return folder


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_bundle_that_ships(tmp_path: Path) -> None:
    """All five networks, for four generations of GPUs, and a record that is true."""
    bundle = tmp_path / "edge"
    shipped = ROOT / "engines/edge"
    bundle.mkdir()
    for path in shipped.glob("*.*"):
        (bundle / path.name).symlink_to(path)
    result = run("build-engines", "--bundle", bundle, "--target", ",".join(TARGETS))
    assert result.exit_code == 0, result.output
    folder, manifest = only_folder(bundle), load_manifest(bundle)
    engines = load_engine_set(folder)
    assert (engines.backend, engines.targets, engines.profile) == ("tensorrt-rtx", TARGETS, "edge")
    assert set(engines.engines) == set(NETWORK_NAMES)
    assert visible(folder) == {"engines.json"} | {f"{name}.rtx" for name in NETWORK_NAMES}
    release = [int(part) for part in engines.version.split(".")[:3]]
    for name, engine in engines.engines.items():
        path = folder / engine.file
        assert (sha256_of(path), path.stat().st_size) == (engine.sha256, engine.bytes)
        assert engine.source_sha256 == manifest.networks[name].sha256
        assert 1e-5 < engine.relative_error < 3e-3
        # An engine's header: this word, the release that wrote it, and a bit for every target.
        head = path.read_bytes()[:64]
        assert head[:4] == b"vtrt" and list(head[24:27]) == release
        assert int.from_bytes(head[32:36], "little") == 0b11110
    assert engines.engines["unet"].batches == (1, 2)
    assert (
        run("build-engines", "--bundle", bundle, "--target", ",".join(TARGETS)).output.count("up to date")
        == 5
    )


def test_without_a_name_the_bundle_is_the_one_that_runs() -> None:
    assert str(default_bundle()) in run("inspect").output.partition("\n")[0]


def test_a_second_build_does_nothing(built_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = only_folder(built_copy)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(engines_module, "_Workers", None)  # any start of one would fail
    # Named in another order, and twice: the same engines.
    result = run("build-engines", "--bundle", built_copy, "--target", "sm_120,sm_80,sm_89,sm_86,sm_80")
    assert result.exit_code == 0 and result.output.count("up to date") == 5
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def change_weights(bundle: Path, name: str) -> None:
    """Another network of the same shapes, as a new export would leave it."""
    path = bundle / f"{name}.onnx"
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, path)
    manifest = load_manifest(bundle)
    entry = NetworkFile(path.name, sha256_of(path), path.stat().st_size)
    save_manifest(replace(manifest, networks={**manifest.networks, name: entry}), bundle)


def test_an_altered_network_rebuilds_its_own_engine_only(built_copy: Path) -> None:
    folder = only_folder(built_copy)
    before = load_engine_set(folder)
    change_weights(built_copy, "vae_encoder")
    plan = plan_build(BuildOptions(built_copy, "tensorrt-rtx", TARGETS))
    assert [job.name for job in plan.jobs if not job.done] == ["vae_encoder"]
    after = build(plan)
    assert after.engines["vae_encoder"].sha256 != before.engines["vae_encoder"].sha256
    assert {k: v for k, v in after.engines.items() if k != "vae_encoder"} == {
        k: v for k, v in before.engines.items() if k != "vae_encoder"
    }
    assert load_engine_set(folder) == after


@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_a_lost_or_damaged_engine_is_built_again_to_the_same_bytes(built_copy: Path, harm: str) -> None:
    path = only_folder(built_copy) / "projection_heads.rtx"
    good = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    plan = plan_build(BuildOptions(built_copy, "tensorrt-rtx", TARGETS))
    assert [job.name for job in plan.jobs if not job.done] == ["projection_heads"]
    build(plan)
    assert path.read_bytes() == good


def test_other_choices_land_in_other_folders(built: Path) -> None:
    folders = {
        plan_build(BuildOptions(built, "tensorrt-rtx", targets, weights)).folder.name
        for targets in (TARGETS, ("sm_89",), ())
        for weights in ("fp16", "int8")
    }
    assert len(folders) == 6 and only_folder(built).name in folders


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library warns of itself
def test_int8_weights_stay_int8() -> None:
    source = ROOT / "engines/edge/image_encoder.onnx"
    sizes = {
        weights: len(
            build_engine(
                typed_graph(source, {"batch": 1}, weights).SerializeToString(),
                backend="tensorrt-rtx", targets=("sm_89",),
            )
        )
        for weights in ("fp16", "int8")
    }  # fmt: skip
    assert sizes["int8"] < 0.9 * sizes["fp16"]


def test_no_torch_is_needed(tiny_bundle: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from export import engines, inspection\n"
        "from export.tensorrt_builder import build_engine\n"
        "from export.typed_graph import typed_graph\n"
        f"graph = typed_graph(Path({str(tiny_bundle)!r}) / 'vae_decoder.onnx', {{'batch': 1}})\n"
        "engine = build_engine(graph.SerializeToString(), backend='tensorrt-rtx', targets=('sm_89',))\n"
        "assert engine[:4] == b'vtrt' and sys.modules['torch'] is None\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "runtime")))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_writes_nothing(copy: Path) -> None:
    result = run("build-engines", "--bundle", copy, "--target", "sm_89", "--dry-run")
    assert result.exit_code == 0 and result.output.count("would be built") == 5
    assert not (copy / "built").exists()


def test_inspect_tells_all(built_copy: Path) -> None:
    result = run("inspect", "--bundle", built_copy)
    assert result.exit_code == 0
    for text in ("profile tiny", "sm_80, sm_86, sm_89, sm_120", "objects a call: 1 and 2", *NETWORK_NAMES):
        assert text in result.output
    (only_folder(built_copy) / "unet.rtx").unlink()
    assert "unet.rtx is missing" in run("inspect", "--bundle", built_copy).output
    (only_folder(built_copy) / "engines.json").write_text("{")
    result = run("inspect", "--bundle", built_copy)
    assert result.exit_code == 0 and "unusable" in result.output and "is damaged" in result.output


# What can go wrong.


def test_only_known_engines_are_called_deterministic(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="same bits each time is not known; leave --deterministic out"):
        plan_build(BuildOptions(tiny_bundle, "tensorrt-rtx", deterministic=True))
    usual, sure = (
        plan_build(BuildOptions(tiny_bundle, "onnxruntime", deterministic=d)) for d in (False, True)
    )
    assert usual.folder != sure.folder and sure.engines.deterministic and not usual.engines.deterministic
    assert usual.jobs[0].key != sure.jobs[0].key


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--target", "sm_90"], 2, "cannot build for sm_90, only for sm_75"),
        (["--target", "ampere"], 2, "cannot build for ampere"),
        (["--timing-cache", "cache"], 2, "has no timing cache"),
        (["--jobs", "0"], 2, "jobs"),
        (["--backend", "openvino"], 2, "openvino"),
        (["--backend", "tensorrt"], 6, "tensorrt does not load"),
    ],
)
def test_choices_that_cannot_work(tiny_bundle: Path, arguments: list[str], code: int, text: str) -> None:
    result = run("build-engines", "--bundle", tiny_bundle, "--backend", "tensorrt-rtx", *arguments)
    assert result.exit_code == code and text in result.output
    assert not (tiny_bundle / "built").exists()


def test_bundles_that_are_not_whole(copy: Path, tmp_path: Path) -> None:
    for verb in ("build-engines", "inspect"):
        result = run(verb, "--bundle", tmp_path / "none")
        assert result.exit_code == 4 and "no bundle at" in result.output
    with (copy / "unet.onnx").open("ab") as stream:
        stream.write(b"x")
    for verb in ("build-engines", "inspect"):
        result = run(verb, "--bundle", copy)
        assert result.exit_code == 4 and "unet.onnx was altered" in result.output
    (copy / "unet.onnx").unlink()
    assert "unet.onnx is missing" in run("build-engines", "--bundle", copy).output
    assert not (copy / "built").exists()


def test_an_operator_no_engine_has(copy: Path) -> None:
    """The other networks' engines are kept, and a later build has only this one left."""
    path = copy / "vae_encoder.onnx"
    model = onnx.load(path)
    last = model.graph.node[-1]
    values, back = f"{last.output[0]}_values", last.output[0]
    last.output[0] = values
    model.graph.node.extend(
        [
            helper.make_node("Unique", [values], ["unique"], name="the_unique"),
            helper.make_node("Shape", ["unique"], ["count"]),
            helper.make_node("Cast", ["count"], ["count_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["count_float", "zero"], ["nothing"]),
            helper.make_node("Add", [values, "nothing"], [back]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.0), "zero"))
    onnx.save(model, path)
    manifest = load_manifest(copy)
    entry = NetworkFile(path.name, sha256_of(path), path.stat().st_size)
    save_manifest(replace(manifest, networks={**manifest.networks, "vae_encoder": entry}), copy)
    result = run("build-engines", "--bundle", copy, "--target", "sm_89", "--jobs", "1")
    assert result.exit_code == 6
    assert "vae_encoder" in result.output and "Unique" in result.output
    kept = load_engine_set(only_folder(copy))  # those built before it
    assert "unet" in kept.engines and "vae_encoder" not in kept.engines
    assert visible(only_folder(copy)) == {"engines.json"} | {f"{name}.rtx" for name in kept.engines}


def test_models_that_parse_as_nothing() -> None:
    for model in (b"", b"\x00" * 64):
        with pytest.raises(BackendError):
            build_engine(model, backend="tensorrt-rtx")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(copy: Path) -> None:
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",), jobs=1))
    job = next(job for job in plan.jobs if job.name == "vae_decoder")
    plan.folder.mkdir(parents=True)
    engines_module._temporary(job).symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot write .*vae_decoder.rtx: No space left on device"):
        build(plan)
    assert "vae_decoder.rtx" not in visible(plan.folder)
    assert not any(name.startswith(".") for name in visible(plan.folder))


def test_a_full_disk_before_anything(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(filelock.FileLock, "acquire", full)
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",)))
    with pytest.raises(OutputError, match="No space left on device"):
        build(plan)


def test_two_builds_at_once(copy: Path) -> None:
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",)))
    plan.folder.mkdir(parents=True)
    with filelock.FileLock(plan.folder / ".lock"):
        result = run("build-engines", "--bundle", copy, "--target", "sm_89")
    assert result.exit_code == 5 and "another build is writing to" in result.output
    assert visible(plan.folder) == set()


def test_ctrl_c_ends_the_workers_and_leaves_nothing_half_written(copy: Path) -> None:
    command = [sys.executable, "-m", "export", "build-engines", "--bundle", str(copy), "--target", "sm_89"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "runtime")))}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    folder = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",))).folder
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.log")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == "interrupted; finished engines are kept, run again to go on"
    assert {name for name in visible(folder) if name.startswith(".")} == set()
    done = set(load_engine_set(folder).engines) if (folder / "engines.json").exists() else set()
    assert {path.stem for path in folder.glob("*.rtx")} == done


def test_a_worker_that_dies_is_told_of(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",), jobs=1))

    def kill(event: str, job: Job, _: object) -> None:
        for process, _job in workers[0].running.values():
            process.kill()

    workers: list[engines_module._Workers] = []
    plain = engines_module._Workers.__enter__
    monkeypatch.setattr(
        engines_module._Workers, "__enter__", lambda self: (workers.append(self), plain(self))[1]
    )
    with pytest.raises(
        BackendError, match=r"vae_decoder: the builder died \(SIGKILL; memory may have run out"
    ):
        build(plan, kill)
    assert visible(plan.folder) == set()


def test_a_worker_that_fails_says_why(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = plan_build(BuildOptions(copy, "tensorrt-rtx", ("sm_89",), jobs=1))
    (tmp_path / "tensorrt_rtx.py").write_text("raise RuntimeError('half an installation')\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # of the workers: here the library is imported already
    with pytest.raises(BackendError, match=r"died \(exit code 1: RuntimeError: half an installation\)"):
        build(plan)
    assert visible(plan.folder) == set()


# The parts.


def test_targets() -> None:
    assert set(TARGETS) < set(known_targets("tensorrt-rtx"))
    check_targets("tensorrt-rtx", TARGETS)
    with pytest.raises(UsageError, match="sm_87, sm_110, only for .*sm_120.* need TensorRT itself"):
        check_targets("tensorrt-rtx", ("sm_87", "sm_110", "sm_89"))


@pytest.mark.parametrize(
    ("versions", "gpu", "expected"),
    [
        ({"tensorrt": "11.0", "tensorrt-rtx": "1.7"}, True, "tensorrt"),
        ({"tensorrt": "11.0", "tensorrt-rtx": "1.7"}, False, "tensorrt-rtx"),
        ({"tensorrt-rtx": "1.7"}, True, "tensorrt-rtx"),
    ],
)
def test_auto(versions: dict[str, str], gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plan, "installed_version", versions.get)
    machine = Machine("A GPU", "sm_90", "580.1") if gpu else None
    monkeypatch.setattr(engine_plan, "this_machine", lambda: machine)
    backend, reason = chosen_backend("auto")
    assert backend == expected and reason
    monkeypatch.setattr(engine_plan, "installed_version", {}.get)
    with pytest.raises(BackendError, match="no library that builds engines is installed; pip install"):
        chosen_backend("auto")


def test_the_first_error_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert first_error(log) == ""
    log.write_text("[I] begun\n\x1b[38;5;9m[E] In node 3: the reason\x1b[0m\n[E] CUDA noise\n")
    assert first_error(log) == "[E] In node 3: the reason"


def test_what_does_not_fit(built_copy: Path) -> None:
    folder, manifest = only_folder(built_copy), load_manifest(built_copy)
    engines = load_engine_set(folder)
    ada, hopper = Machine("RTX 4090", "sm_89", "580.1"), Machine("H100", "sm_90", "580.1")
    assert misfits(engines, folder, manifest, ada, engines.version) == []
    (reason,) = misfits(engines, folder, manifest, hopper, engines.version)
    assert reason == "built for sm_80, sm_86, sm_89, sm_120, but H100 is sm_90"
    (reason,) = misfits(engines, folder, manifest, ada, "1.8.0")
    assert reason == f"built by tensorrt-rtx {engines.version}, installed is 1.8.0"
    assert misfits(engines, folder, manifest, ada, None) == ["tensorrt-rtx is not installed"]
    change_weights(built_copy, "unet")
    (reason,) = misfits(engines, folder, load_manifest(built_copy), ada, engines.version)
    assert reason == "unet was built from another unet.onnx than the bundle's"
    with (folder / "vae_encoder.rtx").open("ab") as stream:
        stream.write(b"x")
    assert "vae_encoder.rtx was altered or damaged" in misfits(
        engines, folder, manifest, ada, engines.version
    )


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = EngineFile("unet.rtx", "00", 5, "11", "22", (1, 2), 1e-3)
    engines = EngineSet("tensorrt-rtx", "1.7.1", ("sm_89",), "fp16", "edge", {"unet": file})
    save_engine_set(engines, tmp_path)
    assert load_engine_set(tmp_path) == engines
    data = json.loads((tmp_path / "engines.json").read_text())
    for change, text in (
        ({"format_version": 9}, "format version 9"),
        ({"engines": {"unet": {"file": "../x"}}}, "is damaged"),
        ({"targets": None}, "is damaged"),
    ):
        (tmp_path / "engines.json").write_text(json.dumps(data | change))
        with pytest.raises(BundleError, match=text):
            load_engine_set(tmp_path)
    with pytest.raises(BundleError, match="is missing; run: python -m export build-engines"):
        load_engine_set(tmp_path / "none")
    with pytest.raises(ValueError, match="not an engine of this folder"):
        replace(file, file="../unet.rtx")


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (
            "NVIDIA GeForce RTX 4090, 8.9, 580.65.06\n",
            Machine("NVIDIA GeForce RTX 4090", "sm_89", "580.65.06"),
        ),
        ("RTX 5090, 12.0, 590.1\nRTX 4090, 8.9, 590.1\n", Machine("RTX 5090", "sm_120", "590.1")),
        ("No devices were found\n", None),
    ],
)
def test_this_machine(
    printed: str, expected: Machine | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "said").write_text(printed)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert this_machine() == expected
    second = this_machine(1)
    assert second is None if printed.count("\n") < 2 else second is not None and second.gpu == "RTX 4090"
    monkeypatch.setenv("PATH", "")
    assert this_machine() is None
