"""A run that is killed again and again ends with the bytes of one that was not."""

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train import killed_run

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "vae.safetensors", "state.json")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Children of a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.killed_run"])
    return context


def start(processes: multiprocessing.context.ForkServerContext, out: Path, kill_at: int | None):  # noqa: ANN201
    child = processes.Process(target=killed_run.run, args=(out, kill_at))
    child.start()
    return child


@pytest.fixture(scope="module")
def whole(
    processes: multiprocessing.context.ForkServerContext, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("whole")
    child = start(processes, out, None)
    child.join(120)
    assert child.exitcode == 0
    return out


def assert_same(out: Path, whole: Path) -> None:
    assert sorted(path.name for path in (out / "checkpoint").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (out / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes(), name
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_kills_while_training_and_saving(
    processes: multiprocessing.context.ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    events = int((whole / "events").read_text())
    each = events // killed_run.STEPS  # of a step and its save
    rng = np.random.default_rng(0)
    kills = 0
    for _attempt in range(40):
        # Up to one and a half saves further than the last one: some attempts get nowhere, most do.
        child = start(processes, tmp_path, int(rng.integers(1, each + each // 2)))
        child.join(120)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert child.exitcode == 0 and kills >= 2
    assert_same(tmp_path, whole)


def test_a_kill_from_outside(
    processes: multiprocessing.context.ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    child = start(processes, tmp_path, None)
    while child.is_alive() and not (tmp_path / "checkpoint.new").exists():
        time.sleep(0.001)
    child.kill()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and not (tmp_path / "events").exists()
    child = start(processes, tmp_path, None)
    child.join(120)
    assert child.exitcode == 0
    assert_same(tmp_path, whole)
