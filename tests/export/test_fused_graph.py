"""Fused graphs: they compute what the bundle's networks compute, with ONNX Runtime's own operators."""

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import fused_block
from export.engine_plan import BuildOptions, engine_batches, plan_build
from export.engines import build
from export.example_inputs import example_inputs
from export.fused_graph import Fuser, fused_graph
from export.graph_writer import MICROSOFT
from export.onnxruntime_builder import build_part
from export.plain_graph import plain_graph
from export.step_graph import step_graph
from export.typed_graph import folded, relative_error
from train.presets import TOY
from uc3d_rt.backends import onnxruntime_engines
from uc3d_rt.backends.base import NetworkSampler
from uc3d_rt.backends.onnxruntime import OnnxRuntimeBackend, open_session
from uc3d_rt.backends.onnxruntime_engines import OnnxRuntimeEngines
from uc3d_rt.contract import NETWORK_NAMES, Manifest, load_manifest, sha256_of
from uc3d_rt.engines import UNET_PARTS, EngineSet, load_engine_set, save_engine_set
from uc3d_rt.errors import BackendError, OutOfMemoryError
from uc3d_rt.sampler import ddim_steps, guided


def sizes(name: str, batch: int) -> dict[str, int]:
    return {"batch": batch} | ({"samples": 6 * batch} if name == "unet" else {})


def run(model: onnx.ModelProto | Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, ["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("name", NETWORK_NAMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_fusing_changes_nothing_in_fp32(bundle: Path, name: str, batch: int) -> None:
    source = bundle / f"{name}.onnx"
    fused = Fuser(folded(source, sizes(name, batch), keep_int8=False)).model()
    inputs = example_inputs(TOY.shape, name, batch, seed=3)
    for found, expected in zip(run(plain_graph(fused), inputs), run(source, inputs), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_unet_is_fused_throughout(bundle: Path) -> None:
    """What the CUDA provider has kernels for is left in no other form."""
    model = fused_graph(bundle / "unet.onnx", sizes("unet", 2))
    count = Counter(node.op_type for node in model.graph.node)
    source = onnx.load(bundle / "unet.onnx").graph.node
    blocks = sum("norm_row/LayerNormalization" in node.name for node in source)
    assert count["MultiHeadAttention"] == 3 * blocks
    assert count["SkipLayerNormalization"] == 4 * blocks and not count["LayerNormalization"]
    assert count["BiasGelu"] == blocks
    assert count["NhwcConv"] == sum(node.op_type == "Conv" for node in source)
    for kind in ("Conv", "InstanceNormalization", "Softmax", "Erf", "Expand"):
        assert count[kind] == 0, kind
    assert count["Transpose"] == 2 + blocks  # to channels last at the start, back at the end; rows to views
    assert {node.domain for node in model.graph.node} == {"", MICROSOFT}


def test_the_bundle_that_ships() -> None:
    """Its groups are even: every norm of a step is fused."""
    shipped = Path(__file__).parents[2] / "engines/edge"
    model = step_graph(shipped / "unet.onnx", load_manifest(shipped).shape, 2)
    count = Counter(node.op_type for node in model.graph.node)
    norms = sum(n.op_type == "InstanceNormalization" for n in onnx.load(shipped / "unet.onnx").graph.node)
    assert count["GroupNorm"] + count["SkipGroupNorm"] == norms > 0
    assert not count["LayerNormalization"] and not count["Softmax"] and not count["Conv"]


def test_wide_layers_have_products_of_their_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, inputs = bundle / "unet.onnx", example_inputs(TOY.shape, "unet", 2, seed=3)
    narrow = Fuser(folded(source, sizes("unet", 2), keep_int8=False)).model()
    monkeypatch.setattr(fused_block, "OWN_PRODUCTS_WIDTH", 1)
    wide = Fuser(folded(source, sizes("unet", 2), keep_int8=False)).model()
    ours, theirs = (Counter(node.op_type for node in model.graph.node) for model in (wide, narrow))
    blocks = ours["MultiHeadAttention"] // 3
    assert ours["MatMul"] == theirs["MatMul"] + 3 * blocks and ours["Gather"] == theirs["Gather"] + blocks
    assert ours["Split"] == theirs["Split"] - 2 * blocks
    for found, expected in zip(run(plain_graph(wide), inputs), run(source, inputs), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_deterministic_graphs_do_without_the_kernel_that_is_not(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    for part, batch in (("unet_step_2", 2), ("vae_decoder", 2)):
        source = bundle / ("unet.onnx" if part.startswith("unet") else f"{part}.onnx")
        usual, _ = build_part(part, source, manifest, batch, check=False)
        model, error = build_part(part, source, manifest, batch, deterministic=True)
        count, norms = (Counter(node.op_type for node in m.graph.node) for m in (model, usual))
        assert not count["GroupNorm"] and not count["SkipGroupNorm"]
        fused = norms["GroupNorm"] + norms["SkipGroupNorm"]
        assert count["LayerNormalization"] == norms["LayerNormalization"] + fused > 0
        assert error is not None and 1e-5 < error < 5e-3


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_little_is_lost_in_fp16(bundle: Path, name: str) -> None:
    source = bundle / f"{name}.onnx"
    inputs = [example_inputs(TOY.shape, name, 1, seed=1)]
    assert 1e-5 < relative_error(source, plain_graph(fused_graph(source, sizes(name, 1))), inputs) < 5e-3


def test_odd_groups_are_computed_without_the_kernel(bundle: Path, tmp_path: Path) -> None:
    """The kernel reads channels in pairs: groups of an odd number of them take another way."""
    from torch import nn

    from export.onnx_bundle import export_network

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)

        def forward(self, image):  # type: ignore[no-untyped-def]
            return nn.functional.silu(self.norm(self.conv(image)))[:, :4, ::4, ::4]

    export_network(TOY, "vae_encoder", Normed(), tmp_path / "odd.onnx")
    model = Fuser(folded(tmp_path / "odd.onnx", {"batch": 1}, keep_int8=False)).model()
    assert not {"GroupNorm", "SkipGroupNorm"} & {node.op_type for node in model.graph.node}
    inputs = example_inputs(TOY.shape, "vae_encoder", 1, seed=3)
    (found,), (expected,) = run(plain_graph(model), inputs), run(tmp_path / "odd.onnx", inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def engines(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineSet]:
    """Engines for ONNX Runtime, their fused operators written with plain ones: a CPU runs them."""
    copy = tmp_path_factory.mktemp("fused") / "toy"
    copy.mkdir()
    for path in bundle.iterdir():
        (copy / path.name).symlink_to(path)
    plan = plan_build(BuildOptions(copy, "onnxruntime"))
    built = build(plan)
    for path in plan.folder.glob("*.onnx"):
        onnx.save(plain_graph(onnx.load(path)), path)
    changed = {name: replace(e, sha256=sha256_of(plan.folder / e.file)) for name, e in built.engines.items()}
    save_engine_set(replace(built, engines=changed), plan.folder)
    return plan.folder, load_engine_set(plan.folder)


def test_what_is_built_for_onnxruntime(engines: tuple[Path, EngineSet], bundle: Path) -> None:
    folder, built = engines
    assert set(built.engines) == {name for name in NETWORK_NAMES if name != "unet"} | set(UNET_PARTS)
    assert (built.backend, built.version, built.targets) == ("onnxruntime", onnxruntime.__version__, ())
    errors = {name: engine.relative_error for name, engine in built.engines.items()}
    assert 0 < errors.pop("unet_guidance") < 1e-6  # in fp32
    assert all(1e-5 < error < 5e-3 for error in errors.values())
    assert engine_batches(TOY.shape, "onnxruntime")["vae_decoder"] == (12,)


def sampler_inputs(manifest: Manifest) -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(5), manifest.shape
    latent = (shape.latent_px, shape.latent_px)
    return {
        "tokens": rng.standard_normal((1, shape.tokens, shape.token_dim), np.float32),
        "image_latent": rng.standard_normal((1, shape.latent_channels, *latent), np.float32),
        "z_T": rng.standard_normal((shape.views, 2 * shape.latent_channels, *latent), np.float32),
    }


@pytest.mark.parametrize("steps", [1, 9, 70])
def test_steps_on_the_device_are_the_steps_of_the_host(
    engines: tuple[Path, EngineSet], bundle: Path, steps: int
) -> None:
    """Guided and unguided steps, odd and even numbers, more than the device holds a plan for."""
    folder, built = engines
    manifest = load_manifest(bundle)
    options = {"guidance": 2.0, "guidance_interval": (0.3, 0.8)}
    plan = ddim_steps(manifest.schedule, steps, **options)
    given = sampler_inputs(manifest)
    backend, told = OnnxRuntimeEngines(folder, built, device="cpu"), []
    host = NetworkSampler(OnnxRuntimeBackend("cpu").open(bundle, manifest, "unet"))
    with backend.open_sampler(bundle, manifest) as sampler, host:
        focals = (0.0, 2.0) if steps == 9 else (2.0,)  # a second call meets what the first left
        for focal in focals:
            found = sampler(
                **given, focal=focal, plan=plan, guidance=2.0, guidance_rescale=0.5,
                on_step=lambda done, total: told.append((done, total)),
            )  # fmt: skip
            expected = host(**given, focal=focal, plan=plan, guidance=2.0, guidance_rescale=0.5)
            assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
        assert told == [(done, steps) for _ in focals for done in range(1, steps + 1)]
        if any(step.guided for step in plan):
            with pytest.raises(BackendError, match="hold a guidance rescaling of 0.5, not 0"):
                sampler(**given, focal=0.0, plan=plan, guidance=2.0)


@pytest.mark.parametrize("rung, steps", [("stages", 4), ("unet", 4), ("unet", 9), (True, 4), ("least", 4)])
def test_low_memory_changes_nothing_but_rounding(
    engines: tuple[Path, EngineSet], bundle: Path, rung: bool | str, steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What makes time and keys is gone when the steps are loaded; then two calls for one object and a sum."""
    alive: dict[str, weakref.ref[object]] = {}
    meetings: list[tuple[str, set[str]]] = []

    def opened(path: Path, *arguments: object, **options: object) -> object:
        meetings.append((path.stem, {name for name, session in alive.items() if session() is not None}))
        session = open_session(path, *arguments, **options)  # type: ignore[arg-type]
        alive[path.stem] = weakref.ref(session)
        return session

    monkeypatch.setattr(onnxruntime_engines, "open_session", opened)
    manifest = load_manifest(bundle)
    given = sampler_inputs(manifest) | {
        "plan": ddim_steps(manifest.schedule, steps, guidance=2.0, guidance_interval=(0.3, 0.9)),
        "focal": 1.0, "guidance": 2.0, "guidance_rescale": 0.5,
    }  # fmt: skip
    assert {step.guided for step in given["plan"]} == {True, False}
    with OnnxRuntimeEngines(*engines, device="cpu").open_sampler(bundle, manifest) as sampler:
        usual = sampler(**given)
        assert {name for name, session in alive.items() if session()} == set(UNET_PARTS) - {"unet_guidance"}
    alive.clear(), meetings.clear()
    backend = OnnxRuntimeEngines(*engines, device="cpu", low_memory=rung)
    with backend.open_sampler(bundle, manifest) as sampler:
        found = sampler(**given)
        again = sampler(**given | {"tokens": 0.5 * given["tokens"]})
    steps_parts = {"unet_step_1", "unet_step_2" if rung == "stages" else "unet_guidance"}
    assert {name for name, _ in meetings} == {"unet_time", "unet_context"} | steps_parts
    assert all(others <= steps_parts for _, others in meetings)
    assert next(others for name, others in meetings if name == "unet_step_1") == set()
    assert not any(session() for session in alive.values())
    assert np.linalg.norm(found - usual) < 1e-3 * np.linalg.norm(usual)
    assert np.linalg.norm(again - usual) > 5e-3 * np.linalg.norm(usual)  # the second picture was looked at


def test_every_rung_captures_cuda_graphs_of_its_steps(
    engines: tuple[Path, EngineSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(
        onnxruntime_engines, "open_session", lambda *_, provider_options, **__: asked.append(provider_options)
    )
    for rung in ("unet", "least"):
        backend = OnnxRuntimeEngines(*engines, device="cuda", low_memory=rung)
        for in_steps in (False, True):
            backend.session("unet_step_1", in_steps)
    assert [options.get("enable_cuda_graph") for options in asked] == [None, "1", None, "1"]
    assert {options["cudnn_conv_algo_search"] for options in asked} == {"HEURISTIC"}


def test_memory_that_runs_out_in_a_step(
    engines: tuple[Path, EngineSet], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls with bindings raise Python's own RuntimeError; that of a callback is no error of ours."""
    manifest = load_manifest(bundle)
    plan = ddim_steps(manifest.schedule, 2, guidance=2.0)
    given = sampler_inputs(manifest) | {"plan": plan, "focal": 1.0, "guidance": 2.0, "guidance_rescale": 0.5}

    class Session:
        """A session that fails when told to."""

        fails = False

        def __init__(self, session: object) -> None:
            self.session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

        def run_with_iobinding(self, *arguments: object) -> None:
            if Session.fails:
                raise RuntimeError(
                    "Error in execution: Non-zero status code returned while running Conv node. Status "
                    "Message: bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 12345"
                )
            self.session.run_with_iobinding(*arguments)  # type: ignore[attr-defined]

    monkeypatch.setattr(onnxruntime_engines, "open_session", lambda *a, **o: Session(open_session(*a, **o)))

    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with OnnxRuntimeEngines(*engines, device="cpu").open_sampler(bundle, manifest) as sampler:
        usual = sampler(**given)
        with pytest.raises(RuntimeError, match="^enough$"):
            sampler(**given, on_step=stop)
        Session.fails = True
        with pytest.raises(OutOfMemoryError, match="^unet ran out of memory in ONNX Runtime .*12345"):
            sampler(**given)
        Session.fails = False
        np.testing.assert_array_equal(sampler(**given), usual)


def test_guidance_of_two_predictions(engines: tuple[Path, EngineSet], bundle: Path) -> None:
    """The sum of low-memory mode against the sampler's own functions, in every row of the plan."""
    rng, shape = np.random.default_rng(2), TOY.shape
    z, c, u = rng.standard_normal((3, shape.views, 8, 8, 8), np.float32)
    plan = rng.standard_normal((64, 3), np.float32)
    session = onnxruntime.InferenceSession(
        engines[0] / "unet_guidance.onnx", providers=["CPUExecutionProvider"]
    )
    for row in (0, 5, 63):
        keep, add, scale = (
            plan[row, 0],
            plan[row, 1] + plan[row, 2],
            plan[row, 1] / (plan[row, 1] + plan[row, 2]),
        )
        given = {"z": z, "step": np.array([row]), "plan": plan, "conditional": c, "unconditional": u}
        found, following = session.run(["z_next", "step_next"], given)
        expected = keep * z + add * guided(c, u, scale, 0.5)
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected) and following == row + 1


def test_networks_of_engines(engines: tuple[Path, EngineSet], bundle: Path) -> None:
    folder, built = engines
    manifest = load_manifest(bundle)
    backend, truth = OnnxRuntimeEngines(folder, built, device="cpu"), OnnxRuntimeBackend("cpu")
    for name in NETWORK_NAMES:
        batch = 2 if name == "unet" else engine_batches(TOY.shape, "onnxruntime")[name][0]
        inputs = example_inputs(TOY.shape, name, batch, seed=2)
        with backend.open(bundle, manifest, name) as network, truth.open(bundle, manifest, name) as expected:
            found, wanted = network(**inputs), expected(**inputs)
        for output, value in wanted.items():
            assert np.linalg.norm(found[output] - value) < 5e-3 * np.linalg.norm(value), (name, output)


def test_a_bundle_of_another_kind_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="no multiview UNet"):
        build_part("unet_step_1", tiny_bundle / "unet.onnx", load_manifest(tiny_bundle), 1)
