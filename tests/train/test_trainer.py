"""Training runs: exact resumption, refusals, and what a run leaves behind."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from train.__main__ import cli
from train.average import update_average
from train.cache import LatentCache, load_cache, reload_cache, vae_fingerprint
from train.checkpoint import CheckpointError, load_state, save_vae
from train.presets import TOY, Preset, with_train
from train.schedule import Planner, learning_rate, step_generator
from train.trainer import RunOptions, train_model
from train.vae import Vae
from train.watch import Watch

SMALL = with_train(
    TOY, batch=3, steps=6, warmup=2, losses=replace(TOY.train.losses, var_objects=2, mi_objects=2)
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(TOY.vae).eval().requires_grad_(False)


def tensors(objects: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z_0 = torch.randn((2 * objects, 6, 8, 8, 8), generator=generator)
    return {
        "z_0": z_0.half(),
        "image": torch.randint(0, 256, (2 * objects, 2, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "image_latent": torch.randn((2 * objects, 2, 4, 8, 8), generator=generator).half(),
        "focal": torch.rand((2 * objects, 2), generator=generator),
    }


class Cache(LatentCache):
    """Random latents; the draw number `kill_at` kills the run."""

    kill_at = -1
    draws = 0

    def draw(self, count: int, generator: torch.Generator):  # noqa: ANN201
        """As the parent, until killed."""
        if type(self).draws == self.kill_at:
            raise KeyboardInterrupt
        type(self).draws += 1
        return super().draw(count, generator)


@pytest.fixture
def cache() -> Cache:
    Cache.draws, Cache.kill_at = 0, -1
    return Cache(**tensors(), objects=5)


def options(out: Path, **changes: object) -> RunOptions:
    return replace(RunOptions(out=out, save_every=3, sheet_every=99, log_every=2), **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, vae: Vae) -> Path:
    """The checkpoint of six steps in one go."""
    torch.set_num_threads(1)
    cache = LatentCache(**tensors(), objects=5)
    return train_model(SMALL, cache, vae, None, options(tmp_path_factory.mktemp("whole")))


def test_resume_goes_on_exactly(whole: Path, tmp_path: Path, cache: Cache, vae: Vae) -> None:
    Cache.kill_at = 5  # dies two steps after the checkpoint of step 3
    with pytest.raises(KeyboardInterrupt):
        train_model(SMALL, cache, vae, None, options(tmp_path))
    assert load_state(tmp_path / "checkpoint")["step"] == 3
    Cache.draws, Cache.kill_at = 0, -1
    resumed = train_model(SMALL, cache, vae, None, options(tmp_path, resume=True))
    assert Cache.draws == 3
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, resumed))
        assert a.keys() == b.keys() and len(a) > 50
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert load_state(whole) == load_state(resumed)
    # Step 4 was logged before the kill and again after it; the log says it once.
    logs = [(folder.parent / "log.jsonl").read_text() for folder in (whole, resumed)]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [2, 3, 4, 6]


def test_a_log_entry_is_the_mean_of_its_steps(whole: Path, tmp_path: Path, cache: Cache, vae: Vae) -> None:
    """Also where a checkpoint between two log lines cuts it short."""
    each = train_model(SMALL, cache, vae, None, options(tmp_path, log_every=1))
    by_step = {entry["step"]: entry for entry in load_state(each)["history"]}
    begin = 1
    for entry in load_state(whole)["history"]:
        steps = range(begin, entry["step"] + 1)
        for name in ("diffusion", "var", "mi", "total", "grad_norm"):
            mean = np.mean([by_step[step][name] for step in steps])
            assert entry[name] == pytest.approx(mean, rel=1e-5)
        begin = entry["step"] + 1
    assert begin == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 5e-4}, "train.lr was 0.001, now 0.0005"),
        ({"batch": 4}, "batch of all devices was 3, now 4"),
        ({"losses": replace(SMALL.train.losses, lambda_mi=0.0)}, "losses.lambda_mi was 0.05, now 0.0"),
    ],
)
def test_resume_refuses_other_settings(
    tmp_path: Path, cache: Cache, vae: Vae, change: dict[str, object], said: str
) -> None:
    train_model(with_train(SMALL, steps=1), cache, vae, None, options(tmp_path))
    with pytest.raises(CheckpointError, match=said):
        train_model(with_train(SMALL, **change), cache, vae, None, options(tmp_path, resume=True))
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        train_model(SMALL, cache, vae, None, options(tmp_path, resume=True, seed=1))


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(
    tmp_path: Path, cache: Cache, vae: Vae
) -> None:
    cache.z_0[:] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged at step 2.*lower the learning rate"):
        train_model(SMALL, cache, vae, None, options(tmp_path))
    # Nor between two log lines.
    with pytest.raises(FloatingPointError, match="diverged at step 1"):
        train_model(SMALL, cache, vae, None, options(tmp_path, save_every=1, log_every=99))
    assert not (tmp_path / "checkpoint").exists()


def test_runs_without_the_regularisers(tmp_path: Path, cache: Cache, vae: Vae) -> None:
    preset = with_train(SMALL, steps=2, losses=replace(SMALL.train.losses, lambda_var=0.0, lambda_mi=0.0))
    first = train_model(preset, cache, vae, None, options(tmp_path, save_every=1))
    assert set(load_state(first)["history"][-1]) == {"step", "diffusion", "total", "grad_norm"}
    train_model(preset, cache, vae, None, options(tmp_path, resume=True))


def test_start_from_begins_with_the_averaged_weights(
    whole: Path, tmp_path: Path, cache: Cache, vae: Vae
) -> None:
    frozen = with_train(SMALL, steps=1, lr=1e-12, lr_final=0.0, weight_decay=0.0)
    begun = train_model(frozen, cache, vae, None, options(tmp_path / "b", start_from=whole))
    ema, start = load_file(whole / "ema.safetensors"), load_file(begun / "model.safetensors")
    assert all(torch.allclose(ema[name], start[name], atol=1e-6) for name in ema)
    with pytest.raises(FileNotFoundError, match="ema.safetensors is missing"):
        train_model(frozen, cache, vae, None, options(tmp_path / "c", start_from=tmp_path))


def test_sample_sheets(tmp_path: Path, cache: Cache, vae: Vae, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    watch = Watch(
        picture=rng.integers(0, 255, (1, 32, 32, 3), dtype=np.uint8),
        focal=np.full(1, -1.0, np.float32),
        color=rng.random((1, 6, 32, 32, 3), np.float32),
        normal=np.tile(np.float32([0, 0, 1]), (1, 6, 32, 32, 1)),
        mask=np.ones((1, 6, 32, 32), bool),
    )
    train_model(with_train(SMALL, steps=1), cache, vae, watch, options(tmp_path))
    assert (tmp_path / "sheet-000001.png").is_file() and (tmp_path / "loss.png").is_file()
    assert "sheet-000001 guidance 3.0: psnr" in capsys.readouterr().out


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_average_follows_the_parameters() -> None:
    net, average = torch.nn.Linear(1, 1, bias=False), {}
    for value in (1.0, 3.0):
        torch.nn.init.constant_(net.weight, value)
        update_average(average, net, 0.75)
    assert float(average["weight"]) == pytest.approx(1.5)


def test_steps_draw_their_own_numbers() -> None:
    cpu = torch.device("cpu")
    draws = {
        key: float(torch.rand(1, generator=step_generator(cpu, *key)))
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(set(draws.values())) == 4
    assert draws[0, 0, 0] == float(torch.rand(1, generator=step_generator(cpu, 0, 0, 0)))


def test_planner_fits_steps_into_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        device, num_processes = torch.device("cpu"), 1
        print = staticmethod(lambda *_, **__: None)

    clock = [0.0]
    monkeypatch.setattr("train.schedule.time.monotonic", lambda: clock[0])
    planner = Planner(10_000, minutes=10.0, first=5, every=10)
    for step in range(1, 16):
        clock[0] += 30.0 if step <= 5 else 0.5  # a slow start, then two steps a second
        planner.update(step, Alone())  # type: ignore[arg-type]
    assert planner.total == pytest.approx(15 + 2 * (600 - 155), abs=2)
    step = 15
    while step < planner.total:
        step += 1
        clock[0] += 1.5 if step % 100 < 30 else 0.5  # now and then something else slows the machine
        planner.update(step, Alone())  # type: ignore[arg-type]
    assert clock[0] == pytest.approx(600, abs=15)


def test_shards_that_are_added_while_training_runs(
    tmp_path: Path, vae: Vae, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = {"objects": json.dumps(list("abcde")), "variants": "2", "vae": vae_fingerprint(vae)}
    first = tmp_path / "cache" / "shard-000.safetensors"
    first.parent.mkdir()
    save_file(tensors(), first, meta)
    drawn_from = []

    def draw(self: LatentCache, count: int, generator: torch.Generator):  # noqa: ANN202
        drawn_from.append(self.objects)
        if len(drawn_from) == 3:
            save_file(tensors(), first.with_name("shard-001.safetensors"), meta)
        return plain_draw(self, count, generator)

    plain_draw = LatentCache.draw
    monkeypatch.setattr(LatentCache, "draw", draw)
    choices = options(tmp_path / "run", refresh_from=first.parent, refresh_every=2)
    cache = load_cache(first.parent, vae, torch.device("cpu"))
    train_model(SMALL, cache, vae, None, choices)
    assert drawn_from == [5, 5, 5, 5, 10, 10]
    assert cache.z_0.untyped_storage().nbytes() == 0  # never two of them on the device
    assert "step 4: 20 variants, shard-000.safetensors ... shard-001.safetensors" in capsys.readouterr().out


def test_a_shard_that_goes_while_it_is_read(
    tmp_path: Path, vae: Vae, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {"objects": json.dumps(list("abcde")), "variants": "2", "vae": vae_fingerprint(vae)}
    save_file(tensors(), tmp_path / "shard-001.safetensors", meta)
    gone, there = "shard-000.safetensors", "shard-001.safetensors"
    listings = iter([(gone, there), (there,)])  # the first was made a moment too early
    monkeypatch.setattr("train.cache.shard_names", lambda *_: next(listings))
    cache = reload_cache(tmp_path, vae, torch.device("cpu"), wait_s=0.0)
    assert cache.shards == (there,) and cache.z_0.shape[0] == 10
    monkeypatch.setattr("train.cache.shard_names", lambda *_: (gone, there))
    with pytest.raises(CheckpointError, match="go faster than they can be read"):
        reload_cache(tmp_path, vae, torch.device("cpu"), wait_s=0.0)


# The command line.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, vae: Vae) -> Path:
    """Folders `vae/`, `other_vae/` and `cache/`."""
    root = tmp_path_factory.mktemp("made")
    save_vae(vae, root / "vae")
    torch.manual_seed(7)
    save_vae(Vae(TOY.vae), root / "other_vae")
    (root / "cache").mkdir()
    meta = {"objects": json.dumps(list("abcdefghijkl")), "variants": "2", "vae": vae_fingerprint(vae)}
    save_file(tensors(objects=12), root / "cache/shard-000.safetensors", meta)
    (root / "empty").mkdir()
    return root


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def model(made: Path, out: Path, *more: object, vae: str = "vae", cache: str = "cache") -> tuple[int, str]:
    where = ("--vae", made / vae, "--cache", made / cache, "--out", out)
    return run("model", "--profile", "toy", *where, *more)


def test_model_then_resume(made: Path, tmp_path: Path) -> None:
    code, output = model(made, tmp_path, "--steps", 2, "--save-every", 1)
    assert code == 0 and "24 variants of 12 objects" in output
    assert load_state(tmp_path / "checkpoint")["step"] == 2
    assert model(made, tmp_path, "--resume")[0] == 0
    code, output = model(made, tmp_path, "--steps", 2)
    assert code == 2 and "--resume, or choose another --out" in output
    code, output = model(made, tmp_path, "--resume", "--lr", 0.1)
    assert code == 1 and "train.lr was 0.001, now 0.1" in output
    where = ("--vae", made / "vae", "--cache", made / "cache", "--out", tmp_path)
    code, output = run("model", "--profile", "edge", *where, "--resume")
    assert code == 1 and "profile was toy, now edge" in output


@pytest.mark.parametrize(
    ("more", "folders", "said"),
    [
        (("--resume",), {}, "Error: no checkpoint at"),
        ((), {"vae": "empty"}, "vae.safetensors is missing; make one with: python -m train vae"),
        ((), {"cache": "empty"}, "no shards in"),
        ((), {"vae": "other_vae"}, "was encoded by another autoencoder"),
        (("--profile", "edge"), {}, "is of another architecture"),
        (("--objects", "."), {}, "holds no object"),
        (("--batch", "4"), {}, "leaves no object to train the unconditional branch"),
        (("--lambda-mi", "-1"), {}, "loss weights must be 0 or more"),
        (("--resume", "--start-from", "."), {}, "give one"),
        (("--pretrained", "."), {}, "--pretrained is for the sdxl profile"),
        (("--start-from", "."), {}, "ema.safetensors is missing; give the folder of a checkpoint"),
        (("--bf16-gradients",), {}, "is for several CUDA devices"),
        (("--cuda-graphs",), {}, "with --compile unet"),
        (("--last-share", "2"), {}, "is not in the range"),
    ],
)
def test_mistakes_are_told_in_a_line(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: Sequence[str],
    folders: dict[str, str],
    said: str,
) -> None:
    monkeypatch.chdir(made / "empty")
    code, output = model(made, tmp_path, "--steps", 1, *more, **folders)
    assert code in (1, 2) and said in output and "Traceback" not in output
    assert not (tmp_path / "checkpoint").exists()


def test_sdxl_asks_for_its_weights(made: Path, tmp_path: Path) -> None:
    where = ("--cache", made / "cache", "--out", tmp_path)
    code, output = run("model", "--profile", "sdxl", *where)
    assert code == 2 and "sdxl needs --pretrained DIR" in output
    code, output = run("model", "--profile", "sdxl", *where, "--pretrained", made / "empty")
    assert code == 1 and "has no vae/config.json" in output
    code, output = run("model", "--profile", "toy", *where)
    assert code == 2 and "--vae is missing; make one" in output


def test_unreadable_objects(made: Path, tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "broken.glb").write_bytes(b"glTF")
    for verb in (("vae",), ("cache", "--vae", made / "vae", "--device", "cpu")):
        more = ("--profile", "toy", "--objects", tmp_path / "objects", "--out", tmp_path / "out")
        code, output = run(*verb, *more)
        assert code == 1 and "broken.glb" in output and "repair or remove it" in output
    code, output = run("cache", *more, "--vae", made / "vae", "--shard", 2, "--shards", 2)
    assert code == 2 and "--shard 2 is not below --shards 2" in output


def test_help_teaches() -> None:
    code, output = run("--help")
    assert code == 0
    for verb in ("toy", "vae", "cache", "model", "evaluate"):
        assert f"python -m train {verb}" in output
    for verb in ("vae", "cache", "model", "probe", "sweep", "toy"):
        lines = run(verb, "--help")[1].splitlines()
        assert all(line.strip().count(" ") for line in lines if line.startswith("  --")), verb


def test_presets_stay_as_they_are() -> None:
    assert isinstance(with_train(TOY, batch=None, lr=0.5), Preset)
    assert with_train(TOY, lr=0.5).train == replace(TOY.train, lr=0.5)
