"""`train/recipes/edge.sh`, with a `python3` that makes empty files instead of training."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[2] / "train/recipes/edge.sh"

# Knows the verbs of `python3 -m train`; the model verb waits until set 3 has come, as training would.
FAKE_PYTHON = """#!/usr/bin/env bash
verb=$3
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
  cache) sleep 0.05; touch "$(printf '%s/shard-%03d.safetensors' "$out" "$shard")" ;;
  model)
    ls "$cache" > "$out/seen-at-first"
    for _ in $(seq 200); do [ -e "$cache/shard-0003-001.safetensors" ] && break; sleep 0.05; done
    ls "$cache" > "$out/seen-at-last" ;;
esac
"""


def test_sets_come_and_go_while_training_runs(tmp_path: Path) -> None:
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    out = tmp_path / "out"
    settings = {"PATH": f"{python.parent}:{os.environ['PATH']}", "SHARDS_PER_GPU": "2", "KEEP_SETS": "2"}
    settings["SET_PAUSE"] = "0"
    subprocess.run(
        ["bash", str(RECIPE), "objects", str(out)], env=os.environ | settings, check=True, timeout=60
    )
    first = (out / "edge/seen-at-first").read_text().split()
    assert first[:2] == ["shard-0000-000.safetensors", "shard-0000-001.safetensors"]
    last = {name.split("-")[1] for name in (out / "edge/seen-at-last").read_text().split()}
    assert "0003" in last and "0000" not in last and len(last) <= 3
    # Nothing is made any more once training has ended.
    time.sleep(0.3)
    before = sorted(path.name for path in (out / "cache").rglob("*"))
    time.sleep(0.5)
    assert sorted(path.name for path in (out / "cache").rglob("*")) == before
