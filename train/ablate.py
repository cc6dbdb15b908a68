"""What the two regularisers are worth: the paper's Tables 4, 6, 7 and 8 at a budget of one's own.

Every variant is trained with every seed by `train_model`, as `python -m train model` does, in
OUT/VARIANT/seed-N, and measured with its averaged weights on objects kept aside.  Finished runs are
kept, interrupted ones go on from their checkpoint, and the tables are written anew after each.
With several processes all of them train one run together and share the objects to measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel

from train.ablation_around import Around
from train.ablation_measure import Measure
from train.ablation_report import (
    AROUND_FIGURES,
    AROUND_TABLE,
    FIGURES,
    TABLES,
    Figures,
    Variant,
    cell,
    markdown,
    sheet,
    summary,
)
from train.cache import Cache
from train.checkpoint import CheckpointError, differences, finish_interrupted_save, load_state
from train.consistency import reference_heads
from train.presets import Preset, with_train
from train.report import write_json, write_text
from train.trainer import RunOptions, train_model
from train.watch import Watch
from uc3d_rt.contract import SamplingDefaults


@dataclass(frozen=True)
class AblationOptions:
    """What a user sets for all runs."""

    out: Path
    tables: tuple[int, ...] = (4, 6, 7, 8)
    seeds: tuple[int, ...] = (0, 1)
    var_weights: tuple[float, ...] = (0.005, 0.01, 0.05)  # Table 8
    mi_weights: tuple[float, ...] = (0.01, 0.05, 0.1)  # Table 7
    minutes: float | None = None
    save_every: int = 1000
    compile: str | None = None
    start_from: Path | None = None
    sampling: SamplingDefaults | None = None  # None: the preset's

    def __post_init__(self) -> None:
        unknown = set(self.tables) - TABLES.keys()
        if unknown or not self.tables:
            raise ValueError(f"tables are {', '.join(map(str, TABLES))}, got {self.tables}")
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise ValueError(
                f"a spread needs two different seeds or more, got {self.seeds}; give --seeds 0,1"
            )
        if not self.var_weights or not self.mi_weights or min(self.var_weights + self.mi_weights) < 0:
            raise ValueError(f"loss weights must be 0 or more, got {self.var_weights} and {self.mi_weights}")


def variants_of(table: int, preset: Preset, options: AblationOptions) -> list[Variant]:
    """The rows of one of the paper's tables, around the preset's own weights."""
    var, mi = preset.train.losses.lambda_var, preset.train.losses.lambda_mi
    if table in (4, AROUND_TABLE):
        return [Variant(0.0, 0.0), Variant(var, 0.0), Variant(0.0, mi), Variant(var, mi)]
    if table == 7:
        return [Variant(var, weight) for weight in options.mi_weights]
    return [Variant(weight, mi) for weight in options.var_weights]


def ablate(
    preset: Preset,
    cache: Cache,
    vae: torch.nn.Module,
    watch: Watch,
    options: AblationOptions,
    unet: Callable[[], UNet2DConditionModel] | None = None,
    say: Callable[[str], None] = print,
    around: Sequence[Around] = (),
) -> dict[str, Any]:
    """Train and measure every variant of the tables with every seed; returns what `ablation.json` gets.

    Args:
        preset: sizes and settings; its loss weights are the middle of the tables.
        cache: latents of the training variants.
        vae: the frozen autoencoder.
        watch: objects kept aside, two or more.
        unet: makes the pretrained UNet that each run begins with.
        around: objects kept aside, from inputs all around; Table 6 wants one or more.

    Raises:
        CheckpointError: OUT holds runs of other settings.
        FloatingPointError: a run diverged.
        ValueError: Table 6 is wanted without `around`.
    """
    if AROUND_TABLE in options.tables and not around:
        raise ValueError(f"Table {AROUND_TABLE} needs objects seen from all around; none is given")
    state = PartialState()
    sampling = options.sampling or preset.sampling
    settings = json.loads(
        json.dumps(
            {
                "preset": asdict(preset),
                "minutes": options.minutes,
                "processes": state.num_processes,
                "start_from": None if options.start_from is None else str(options.start_from),
                "shards": cache.shards,
                "measured_objects": len(watch.picture),
                "sampling": asdict(sampling),
            }
        )
    )
    with state.main_process_first():
        _same_settings(options.out / "settings.json", settings, write=state.is_main_process)
        if AROUND_TABLE in options.tables:
            inputs = {"inputs_around": [len(one.picture) for one in around]}
            _same_settings(options.out / "around.json", inputs, write=state.is_main_process)
    rows = {table: variants_of(table, preset, options) for table in options.tables}
    chosen = list(dict.fromkeys(variant for variants in rows.values() for variant in variants))
    measure = Measure(vae, watch, sampling, reference_heads(preset, cache, vae), around)
    turned = set(rows.get(AROUND_TABLE, ()))
    found = {variant: _kept_figures(options, variant, variant in turned) for variant in chosen}
    truth, true_rows = measure.truth()
    budget = f"{options.minutes:g} minutes" if options.minutes else f"{preset.train.steps} steps"
    head = (
        f"# Ablation of the `{preset.name}` profile\n\n"
        f"{budget} of {preset.train.batch * state.num_processes} objects a run, averaged weights, "
        f"{len(watch.picture)} objects kept aside; mean ± standard deviation over seeds. "
        f"Retrieval by chance: {100 / len(watch.picture):.1f} %."
    )
    report: dict[str, Any] = {}
    # All variants of a seed before the next: an ablation that is stopped is a whole one of fewer seeds.
    for seed in options.seeds:
        for variant in chosen:
            name = f"{variant.folder}, seed {seed}"
            place = options.out / variant.folder / f"seed-{seed}"
            checkpoint = _trained(preset, variant, seed, place, cache, vae, options, unet)
            kept = found[variant].get(seed) if state.is_main_process else None
            if any(gather_object([kept is not None])):
                figures = kept
            else:
                out = place if state.is_main_process else None
                figures = measure.run(preset, checkpoint, out, variant in turned)
            if not state.is_main_process or figures is None:
                continue
            found[variant][seed] = figures
            told = (*FIGURES, *AROUND_FIGURES) if variant in turned else FIGURES
            say(f"{name}: " + "  ".join(f"{f.title} {cell(f, [figures[f.name]])}" for f in told))
            report = {
                "settings": settings,
                "seeds": list(options.seeds),
                "true_views": truth,
                "variants": [summary(v, by_seed) for v, by_seed in found.items() if by_seed],
            }
            write_json(options.out / "ablation.json", report)
            write_text(options.out / "ablation.md", markdown(head, rows, found, truth))
            drawn = {v.title: options.out / v.folder / f"seed-{min(s)}" for v, s in found.items() if s}
            sheet(options.out / "ablation.png", watch, true_rows, drawn)
    state.wait_for_everyone()
    return report


def _trained(
    preset: Preset,
    variant: Variant,
    seed: int,
    out: Path,
    cache: Cache,
    vae: torch.nn.Module,
    options: AblationOptions,
    unet: Callable[[], UNet2DConditionModel] | None,
) -> Path:
    """The checkpoint of one run, trained to its end, from where it stands."""
    checkpoint = out / "checkpoint"
    with PartialState().main_process_first():
        finish_interrupted_save(checkpoint)
    resume = checkpoint.exists()
    if resume:
        state = load_state(checkpoint)
        if state["step"] >= state["total_steps"]:
            return checkpoint
    losses = replace(preset.train.losses, **asdict(variant))
    run = RunOptions(
        out=out, seed=seed, minutes=options.minutes, save_every=options.save_every, sheet_every=1 << 60,
        compile=options.compile, resume=resume, start_from=None if resume else options.start_from,
    )  # fmt: skip
    start = unet() if unet is not None and not resume else None
    return train_model(with_train(preset, losses=losses), cache, vae, None, run, start)


def _kept_figures(options: AblationOptions, variant: Variant, turned: bool) -> dict[int, Figures]:
    """What earlier calls measured of a variant, by seed; with `turned`, only with Table 6's figures."""
    kept: dict[int, Figures] = {}
    for seed in options.seeds:
        place = options.out / variant.folder / f"seed-{seed}"
        if (place / "figures.json").is_file() and (place / "views.png").is_file():
            figures = json.loads((place / "figures.json").read_text(encoding="utf-8"))
            if not turned or AROUND_FIGURES[0].name in figures:
                kept[seed] = figures
    return kept


def _same_settings(path: Path, settings: dict[str, Any], write: bool) -> None:
    """Runs of two settings do not stand in one table."""
    if path.is_file():
        changed = differences(json.loads(path.read_text(encoding="utf-8")), settings)
        if changed:
            raise CheckpointError(
                f"{path.parent} holds runs of other settings ({'; '.join(changed)}); choose another --out"
            )
    elif write:
        write_json(path, settings)
