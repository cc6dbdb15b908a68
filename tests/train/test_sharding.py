"""A model spread over two processes is the model of two whole copies, and resumes exactly."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import killed_run
from train import trainer
from train.presets import with_train
from train.trainer import RunOptions, train_model
from train.vae import Vae


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def train(rank: int, port: int, out: Path) -> None:
    """Whole copies; sharded; sharded, stopped after a step and resumed: in one process group."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = Vae(killed_run.PRESET.vae).eval().requires_grad_(False)

    trainer.loss_curves = lambda *_: None
    preset = with_train(killed_run.PRESET, steps=2)

    def run(name: str, **changes: object) -> None:
        options = RunOptions(out=out / name, sheet_every=99, **changes)  # type: ignore[arg-type]
        train_model(preset, killed_run.random_cache(), vae, None, options)

    run("copies")
    run("sharded", shard=True)
    draw, drawn = killed_run.LatentCache.draw, []

    def stopping(self: killed_run.LatentCache, *given: object):  # noqa: ANN202
        drawn.append(given)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, *given)  # type: ignore[arg-type]

    killed_run.LatentCache.draw = stopping  # type: ignore[method-assign]
    try:
        run("resumed", shard=True, save_every=1)
    except KeyboardInterrupt:
        run("resumed", shard=True, resume=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, port = tmp_path_factory.mktemp("runs"), free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.killed_run"])
    children = [context.Process(target=train, args=(rank, port, out)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(200)
    assert [child.exitcode for child in children] == [0, 0]
    return out


def tensors(out: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "checkpoint" / f"{kind}.safetensors")


@pytest.mark.parametrize("kind", ["model", "ema", "optimizer"])
def test_sharded_is_as_copies(out: Path, kind: str) -> None:
    copies, sharded = tensors(out, "copies", kind), tensors(out, "sharded", kind)
    assert copies.keys() == sharded.keys()
    for name, value in copies.items():
        torch.testing.assert_close(
            sharded[name], value, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["model", "ema", "optimizer"])
def test_a_sharded_run_resumes_exactly(out: Path, kind: str) -> None:
    whole, resumed = tensors(out, "sharded", kind), tensors(out, "resumed", kind)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
