"""What a run is said to take, against what is counted and measured."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from click.testing import CliRunner

from benchmarks.train_step import Result, scaling_table
from train.__main__ import cli
from train.dry_run import GIB, Plan, memory_parts, parameter_counts, report, traced_activations
from train.model import MultiviewModel
from train.optimizer import build_optimizers
from train.presets import SDXL, TOY, with_train
from train.schedule import learning_rate

RECIPES = Path(__file__).resolve().parents[2] / "train/recipes"


def test_parameters_and_memory_are_those_of_the_networks() -> None:
    model = MultiviewModel(TOY)
    count = sum(p.numel() for p in model.parameters())
    counts = parameter_counts(TOY)
    assert sum(counts.values()) - counts["autoencoder"] == count
    memory = {name: size for name, (size, _) in memory_parts(Plan(TOY, cache_bytes=7), activations=5).items()}
    assert memory["weights"] == memory["gradients"] == memory["moving average"] == 4 * count
    assert memory["optimiser state"] == 8 * count and memory["latent cache"] == 7
    assert memory["activations"] == 5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimiser_state_is_that_of_the_optimisers(kind: str) -> None:
    model = MultiviewModel(TOY)
    optimizers = build_optimizers(model.parameters(), kind, 1e-3, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(
        4 * value.numel()
        for optimizer in optimizers
        for entry in optimizer.state.values()
        for value in entry.values()
        if value.ndim > 0
    )
    plan = Plan(with_train(TOY, optimizer=kind))
    assert memory_parts(plan, activations=0)["optimiser state"][0] == held


def test_traced_activations() -> None:
    small, large = (traced_activations(with_train(TOY, batch=batch)) for batch in (8, 16))
    assert 1.5 * small < large < 2.2 * small
    recomputed = with_train(TOY, batch=16, gradient_checkpointing=True)
    assert traced_activations(recomputed) < 0.9 * large


def test_time_and_cost() -> None:
    plan = Plan(SDXL, processes=8, step_seconds=6.0, gpu_hour_price=2.5)
    assert plan.objects_a_step == 192 and plan.hours == 100.0 and plan.price == 2000.0
    text = report(plan, {"UNet": 10**9}, {"weights": (3 * GIB, "counted")})
    for said in (r"objects a step +192 +24 on each", r"wall time +100.0 h +800 GPU hours", r"cost +2,000"):
        assert re.search(said, text), text
    assert re.search(r"learning rate +0.0001, 1e-05 from step 10000 on", text)
    assert Plan(SDXL).price is None and "cost" not in report(Plan(SDXL), {"a": 1}, {"b": (1, "c")})
    with pytest.raises(ValueError, match="step_seconds must be above 0"):
        Plan(SDXL, step_seconds=0.0)


def test_sdxl_has_the_papers_schedule() -> None:
    spec = SDXL.train
    assert spec.batch * 8 == 192 and spec.steps == 60_000
    rates = [
        learning_rate(step, spec.steps, spec.warmup, spec.lr, spec.lr_final, spec.lr_drop)
        for step in (0, 1, 9_999, 10_000, 59_999)
    ]
    assert rates == [1e-4, 1e-4, 1e-4, 1e-5, 1e-5]
    with pytest.raises(ValueError, match="lr_drop=10 lies within the warm-up of 20 steps"):
        with_train(TOY, lr_drop=10)


def test_dry_run_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.dry_run.traced_activations", lambda preset: preset.train.batch * GIB)

    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["model", "--profile", "toy", *map(str, words)])
        return result.exit_code, result.output

    plan = ("--processes", 4, "--step-seconds", 2, "--gpu-hour-price", 9)
    code, output = run("--dry-run", "--steps", 3600, "--batch", 9, *plan)
    assert code == 0
    for said in (
        r"objects a step +36 +9 on each",
        r"wall time +2.0 h +8 GPU",
        r"cost +72",
        r"activations +9.0",
    ):
        assert re.search(said, output), output
    code, output = run()
    assert code == 2 and "--cache and --out must be given, but for a --dry-run" in output
    code, output = run("--cache", tmp_path, "--out", tmp_path / "x", *plan)
    assert code == 2 and "--processes, --step-seconds, --gpu-hour-price: for --dry-run only" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_accelerate_reads_the_recipes(name: str) -> None:
    config = ClusterConfig.from_yaml_file(str(RECIPES / name))
    assert config.num_processes == 8 and config.num_machines == 1 and config.mixed_precision == "bf16"
    assert config.num_processes * SDXL.train.batch == 192
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp": "FSDP"}[name.split("-")[0]]


def test_scaling_is_against_one_process() -> None:
    one = Result("edge", "GPU", 1, 64, 100.0, 50.0, 640.0, 9.0, 20.0)
    eight = replace(one, processes=8, step_ms=125.0, objects_per_s=4096.0, peak_gib=21.0)
    table = scaling_table([one, eight])
    assert "| 1 | 64 | 100.0 | 640.00 | 20.0 | 100 % |" in table
    assert "| 8 | 512 | 125.0 | 4096.00 | 21.0 | 80 % |" in table
    assert scaling_table([eight]).endswith("| – |")
