"""An ablation: which runs it makes, what it measures of them, and what its figures mean."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from click.testing import CliRunner
from PIL import Image

from tests.train.killed_run import random_cache
from train import ablate as ablate_module
from train.__main__ import cli
from train.ablate import AblationOptions, ablate, variants_of
from train.ablation_around import seen_around
from train.ablation_report import Variant
from train.checkpoint import CheckpointError
from train.consistency import (
    edge_agreement,
    latent_variance,
    outline_agreement,
    reference_heads,
    retrieval_accuracy,
)
from train.model import MultiviewModel
from train.presets import SDXL, TOY, Preset, with_train
from train.vae import Vae
from train.watch import Watch
from uc3d_rt.contract import SamplingDefaults

SMALL = with_train(
    TOY, batch=3, steps=2, warmup=0, losses=replace(TOY.train.losses, var_objects=2, mi_objects=2)
)


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Vae(TOY.vae).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def watch() -> Watch:
    rng = np.random.default_rng(0)
    return Watch(
        picture=rng.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8),
        focal=np.full(2, -1.0, np.float32),
        color=rng.random((2, 6, 32, 32, 3), np.float32),
        normal=np.tile(np.float32([0, 0, 1]), (2, 6, 32, 32, 1)),
        mask=np.ones((2, 6, 32, 32), bool),
    )


def options(out: Path, **changes: object) -> AblationOptions:
    few = AblationOptions(
        out=out, tables=(7,), mi_weights=(0.0, 0.05), sampling=SamplingDefaults(steps=1, guidance=1.0)
    )
    return replace(few, **changes)


def test_the_tables_are_the_papers() -> None:
    default = AblationOptions(out=Path())
    assert [astuple(v) for v in variants_of(4, SDXL, default)] == [
        (0.0, 0.0), (0.01, 0.0), (0.0, 0.05), (0.01, 0.05),
    ]  # fmt: skip
    assert variants_of(6, SDXL, default) == variants_of(4, SDXL, default)
    assert [astuple(v) for v in variants_of(7, SDXL, default)] == [(0.01, 0.01), (0.01, 0.05), (0.01, 0.1)]
    assert [astuple(v) for v in variants_of(8, SDXL, default)] == [(0.005, 0.05), (0.01, 0.05), (0.05, 0.05)]


def astuple(variant: Variant) -> tuple[float, float]:
    return variant.lambda_var, variant.lambda_mi


@pytest.fixture(scope="module")
def sheet_and_post(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("objects")
    arm = trimesh.creation.box((0.7, 0.25, 0.25)).apply_translation((0.45, 0.3, 0.0))
    shapes = {
        "sheet": trimesh.Trimesh([[0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 2]]),
        "post": trimesh.util.concatenate([trimesh.creation.box((0.3, 1.2, 0.3)), arm]),
    }
    for name, shape in shapes.items():
        shape.export(folder / f"{name}.glb")
    return {name: folder / f"{name}.glb" for name in shapes}


def test_runs_figures_and_sheet(
    tmp_path: Path,
    vae: Vae,
    watch: Watch,
    sheet_and_post: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []
    train_model = ablate_module.train_model

    def counted(preset: Preset, *rest: object) -> Path:
        trained.append((preset.train.losses.lambda_mi, rest[3].seed, rest[3].resume))  # type: ignore[attr-defined]
        return train_model(preset, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ablate_module, "train_model", counted)
    monkeypatch.setattr("train.trainer.loss_curves", lambda *_: None)
    monkeypatch.setattr(ablate_module, "reference_heads", lambda *given: reference_heads(*given, steps=1))
    few = partial(latent_variance, draws=2)
    monkeypatch.setattr("train.ablation_measure.latent_variance", few)
    said: list[str] = []
    report = ablate(SMALL, random_cache(), vae, watch, options(tmp_path), say=said.append)
    assert trained == [(0.0, 0, False), (0.05, 0, False), (0.0, 1, False), (0.05, 1, False)]
    assert report == json.loads((tmp_path / "ablation.json").read_text()) and len(said) == 4
    without, with_mi = report["variants"]
    variance = [with_mi["runs"][seed]["latent_variance"] for seed in ("0", "1")]
    assert variance[0] != variance[1] and with_mi["runs"]["0"]["steps"] == 2
    assert with_mi["mean"]["latent_variance"] == pytest.approx(np.mean(variance))
    assert with_mi["std"]["latent_variance"] == pytest.approx(np.std(variance, ddof=1))
    assert without["mean"]["retrieval_own"] is None and 0 <= with_mi["mean"]["retrieval_own"] <= 1
    assert report["true_views"]["psnr"] is not None and report["true_views"]["latent_variance"] is None
    table = (tmp_path / "ablation.md").read_text()
    assert f"{np.mean(variance):.4f} ± {np.std(variance, ddof=1):.4f}" in table and "Table 7" in table
    with Image.open(tmp_path / "ablation.png") as sheet:
        assert sheet.height == 4 * 192  # inputs, true views, two variants

    # Finished runs are kept, one without figures is measured again, a further seed is added.
    figures = tmp_path / "var-0.01-mi-0.05/seed-1/figures.json"
    before = figures.read_text()
    figures.unlink()
    again = ablate(SMALL, random_cache(), vae, watch, options(tmp_path, seeds=(0, 1, 2)), say=said.append)
    assert trained[4:] == [(0.0, 2, False), (0.05, 2, False)] and figures.read_text() == before
    assert again["variants"][0]["runs"]["0"] == without["runs"]["0"]
    assert len(again["variants"][0]["runs"]) == 3

    # Table 6 takes up Table 7's runs and measures them again; two more stand there as finished.
    for mi in ("0", "0.05"):
        for seed in ("seed-0", "seed-1"):
            run = tmp_path / f"var-0.01-mi-{mi}" / seed / "checkpoint"
            shutil.copytree(run, tmp_path / f"var-0-mi-{mi}" / seed / "checkpoint")
    seen = seen_around([sheet_and_post["sheet"], sheet_and_post["post"]], 6, "cpu", 32)
    assert [one.picture.shape for one in seen] == [(6, 32, 32, 3)]  # a sheet has no outline from its edge
    with pytest.raises(ValueError, match="needs objects seen from all around"):
        ablate(SMALL, random_cache(), vae, watch, options(tmp_path, tables=(6,)))
    around = ablate(SMALL, random_cache(), vae, watch, options(tmp_path, tables=(6,)), around=seen)
    assert len(trained) == 6 and len(around["variants"]) == 4
    both = around["variants"][-1]["runs"]["0"]
    assert both["psnr"] == with_mi["runs"]["0"]["psnr"] and 0 < both["around_psnr"] < 30
    # After two steps nothing is drawn, whatever the input: agreement alone says nothing, hence the others.
    assert both["agree_psnr"] == 120.0 and both["around_silhouette_iou"] == 0.0
    true = around["true_views"]
    assert true["spread_psnr"] == 0.0 and true["around_psnr"] == 120.0 and 30 < true["agree_psnr"] < 120
    assert true["agree_silhouette_iou"] > 0.9 and true["agree_normal_deg"] < 8
    assert "Table 6" in (tmp_path / "ablation.md").read_text()
    with pytest.raises(CheckpointError, match="other settings"):
        ablate(SMALL, random_cache(), vae, watch, options(tmp_path, tables=(6,)), around=seen * 2)
    with pytest.raises(CheckpointError, match=r"other settings \(preset.train.steps was 2, now 3\)"):
        ablate(with_train(SMALL, steps=3), random_cache(), vae, watch, options(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": (0,)}, "give --seeds 0,1"),
        ({"seeds": (0, 0)}, "two different seeds"),
        ({"tables": (5,)}, "tables are 4, 6, 7, 8"),
        ({"mi_weights": (-1.0,)}, "must be 0 or more"),
    ],
)
def test_refused_options(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(Path(), **changes)


def test_outline_agreement() -> None:
    color, mask = np.ones((2, 4, 4, 3)), np.zeros((2, 4, 4), bool)
    assert outline_agreement(color, mask) == 1.0  # nothing, twice
    color[0, :2] = 0.5
    mask[0, 1:3] = True
    assert outline_agreement(color, mask) == pytest.approx((4 / 12 + 1) / 2)


def test_edge_agreement() -> None:
    rng = np.random.default_rng(0)
    picture, other = rng.random((2, 16, 16, 3)), rng.random((2, 16, 16, 3))
    assert edge_agreement(picture, 0.5 * picture) == pytest.approx(1.0)
    assert abs(edge_agreement(picture, other)) < 0.2
    assert edge_agreement(picture, np.ones_like(picture)) == 0.0


def test_retrieval_accuracy() -> None:
    unit = np.eye(4)[:, None].repeat(3, axis=1)  # (K, V, D)
    assert retrieval_accuracy([(row, row) for row in unit]) == 1.0
    assert (
        retrieval_accuracy([(row, wrong) for row, wrong in zip(unit, unit[[1, 0, 2, 3]], strict=True)]) == 0.5
    )


def test_latent_variance_is_zero_where_features_ignore_the_noise(vae: Vae) -> None:
    model = MultiviewModel(TOY).eval()
    batch = random_cache().draw(2, torch.Generator().manual_seed(0))
    variance, share = latent_variance(model, batch)
    assert variance > 0 and 0 < share < 1
    assert latent_variance(model, batch) == (variance, share)
    with torch.no_grad():
        model.unet.unet.conv_in.weight.zero_()
    # Rounding alone is left: for the picture's latent, too, comes in there.
    assert latent_variance(model, batch)[1] < 1e-10


def test_reference_heads_learn_which_normals_belong_to_which_colours(vae: Vae) -> None:
    cache = random_cache()
    heads = reference_heads(SMALL, cache, vae, steps=60)
    untrained = reference_heads(SMALL, cache, vae, steps=0)

    def loss(pair: torch.nn.Module) -> float:
        images = vae.decode(cache.z_0[:, 0].float().reshape(-1, 4, 8, 8)).clamp(0, 1).reshape(5, 2, 3, 32, 32)
        a, b = pair(images[:, 0], images[:, 1])
        return float(torch.nn.functional.cross_entropy(a @ b.T / 0.1, torch.arange(5)))

    assert loss(heads) < 0.7 * loss(untrained)


def test_command_line_refuses(tmp_path: Path) -> None:
    where = ["ablate", "--profile", "toy", "--cache", str(tmp_path), "--objects", str(tmp_path), "--out", "x"]

    def said(*more: str) -> str:
        result = CliRunner().invoke(cli, [*where, *more])
        assert result.exit_code in (1, 2) and "Traceback" not in result.output
        return result.output

    assert "two budgets; give one" in said("--steps", "1", "--minutes", "1")
    assert "give --seeds 0,1" in said("--seeds", "3")
    assert "'a,b' is not a list of numbers" in said("--seeds", "a,b")
    assert "holds no object" in said()
    assert "'5' is not one of '4', '6', '7', '8'" in said("--table", "5")
