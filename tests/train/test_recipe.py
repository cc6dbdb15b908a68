"""`train/recipes/edge.sh`, with a `python3` that makes empty files instead of training."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "train/recipes/edge.sh"

# Knows the verbs of `python3 -m train`; the model verb waits until a set has come, as training would.
FAKE_PYTHON = """#!/usr/bin/env bash
verb=$3 given="$*"
[ "$2" = torch.distributed.run ] && verb=model
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2 ;;
    --seed) seed=$2 ;;
    --shard) shard=$2 ;;
    --cache) cache=$2 ;;
  esac
  shift
done
mkdir -p "$out"
case $verb in
  vae) touch "$out/vae.safetensors" ;;
  cache)
    sleep 0.05
    echo "$given" >> "${MADE:-/dev/null}"
    touch "$(printf '%s/shard-%03d.safetensors' "$out" "$shard")" ;;
  model)
    echo "$given" > "$out/given"
    ls "$cache" > "$out/seen-at-first"
    for _ in $(seq 200); do [ -e "$cache/shard-$WAIT_FOR-001.safetensors" ] && break; sleep 0.05; done
    sleep "${LINGER:-0}"
    ls "$cache" > "$out/seen-at-last" ;;
esac
"""


def run(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    python = folder / "bin/python3"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    settings = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "SHARDS_PER_GPU": "2",
        "SET_PAUSE": "0",
    } | settings
    return subprocess.run(
        ["bash", str(RECIPE), "objects", str(folder / "out")],
        env=os.environ | settings, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_sets_come_and_go_while_training_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, KEEP_SETS="2", WAIT_FOR="0003").returncode == 0
    assert "--start-from" not in (out / "edge/given").read_text()
    first = (out / "edge/seen-at-first").read_text().split()
    assert first[:2] == ["shard-0000-000.safetensors", "shard-0000-001.safetensors"]
    last = {name.split("-")[1] for name in (out / "edge/seen-at-last").read_text().split()}
    assert "0003" in last and "0000" not in last and len(last) <= 3
    # Nothing is made any more once training has ended.
    time.sleep(0.3)
    before = sorted(path.name for path in (out / "cache").rglob("*"))
    time.sleep(0.5)
    assert sorted(path.name for path in (out / "cache").rglob("*")) == before


def test_sets_made_before_training_are_all_trained_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "cache").mkdir(parents=True)
    (out / "cache/shard-0004-000.safetensors").touch()  # a stopped run goes on where it was
    told = tmp_path / "made"
    made = run(
        tmp_path, FIRST_SET="4", SETS_BEFORE="3", WAIT_FOR="0006", LINGER="0.5",
        VARIANTS="9", INPUTS="1", MADE=str(told),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    lines = told.read_text().splitlines()
    assert len(lines) == 2 * 2 and all("--variants 9 --inputs 1 " in line for line in lines)
    seen = (out / "edge/seen-at-first").read_text()
    assert seen == (out / "edge/seen-at-last").read_text()
    assert {name.split("-")[1] for name in seen.split()} == {"0004", "0005", "0006"}
    assert "--split-cache" in (out / "edge/given").read_text()


def test_a_checkpoint_to_begin_with_stands_for_the_autoencoder_too(tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    (start / "vae.safetensors").touch()
    made = run(tmp_path, START=str(start), FIRST_SET="7", SETS="2", WAIT_FOR="0008", LINGER="0.5")
    assert made.returncode == 0, made.stderr
    assert not (out / "vae").exists()
    given = (out / "edge/given").read_text()
    assert f"--vae {start} " in given and f"--start-from {start}" in given
    assert {path.name.split("-")[1] for path in (out / "cache").glob("shard-*")} == {"0007", "0008"}


def test_a_checkpoint_without_autoencoder_is_told_of(tmp_path: Path) -> None:
    made = run(tmp_path, START=str(tmp_path / "nothing"))
    assert made.returncode == 1 and "holds no vae.safetensors; give the folder of a checkpoint" in made.stderr
    assert not (tmp_path / "out/edge").exists()
