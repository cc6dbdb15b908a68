#!/usr/bin/env bash
# Makes the edge checkpoint from a folder of objects: autoencoder, latent cache, multiview model.
#
#   GPUS=4 bash train/recipes/edge.sh OBJECTS OUT [options of `python -m train model`]
#
# Stages whose result is already in OUT are kept, so a stopped run goes on where it was; the model
# continues from OUT/edge/checkpoint if there is one.  Shard processes share the GPUs: reading and
# drawing up views is work for the CPU, and one process feeds no more than a fifth of a fast GPU.
#
# START, the folder of a checkpoint, stands for weights to begin with, and for the autoencoder, which is
# then not trained:  python -m export checkpoint --out START  makes one of the bundle that ships.
#
# The cache is sets of VARIANTS variants of every object: what is seen too often is learned by heart.
# SETS_BEFORE sets are made before training begins.  While it runs, more are made with new random
# numbers up to SETS in all, and the newest KEEP_SETS are trained on; KEEP_SETS=1, the default where
# SETS_BEFORE is above 1, makes no more.  Making one beside the training takes longer, and the training
# goes at half its speed meanwhile: SET_PAUSE seconds lie between two.
# A set of 12 variants of 2 200 objects takes 8 GB, shared out among the GPUs (--split-cache).  A variant has one
# input picture, since training changes it a little whenever it is drawn; INPUTS=2 takes 14 GB.
#
# Where NVIDIA's Multi-Process Service runs (nvidia-cuda-mps-control -d), the processes that make a set
# use a GPU at the same time instead of in turns, and need a third less time.
set -euo pipefail
objects=$1 out=$2
shift 2
gpus=${GPUS:-1} variants=${VARIANTS:-16} inputs=${INPUTS:-1} shards_per_gpu=${SHARDS_PER_GPU:-5} cache=${CACHE:-$out/cache}
before=${SETS_BEFORE:-1} pause=${SET_PAUSE:-180} sets=${SETS:-1000} first=${FIRST_SET:-0}
keep_sets=${KEEP_SETS:-$((before > 1 ? 1 : 2))}
vae=${START:-$out/vae}
mkdir -p "$out" "$cache"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if [ ! -e "$vae/vae.safetensors" ]; then
  [ -z "${START:-}" ] || { echo "START=$START holds no vae.safetensors; give the folder of a checkpoint" >&2; exit 1; }
  # A batch of 24 and many steps measured better than larger batches in the same minutes.
  CUDA_VISIBLE_DEVICES=0 python3 -m train vae --objects "$objects" --out "$out/vae" \
    --minutes "${VAE_MINUTES:-3}" --batch 24 --lr 7e-4 --limit 1000 --workers 12
fi

# make_set SEED NICENESS: shard-SEED-*.safetensors appear in the cache together, when all are there.
make_set() {
  local work="$cache/.set-$1" shards=$((gpus * shards_per_gpu)) shard pids=()
  for shard in $(seq 0 $((shards - 1))); do
    [ -e "$(printf '%s/shard-%03d.safetensors' "$work" "$shard")" ] && continue
    CUDA_VISIBLE_DEVICES=$((shard % gpus)) nice -n "$2" python3 -m train cache --objects "$objects" \
      --vae "$vae" --out "$work" --variants "$variants" --inputs "$inputs" --seed "$1" --shard "$shard" \
      --shards "$shards" --workers 3 > "$out/cache-$shard.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]:+${pids[@]}}"; do wait "$pid"; done
  for file in "$work"/shard-*.safetensors; do
    mv "$file" "$cache/shard-$(printf '%04d' "$1")-${file##*/shard-}"
  done
  rmdir "$work"
}

newest_set() { find "$cache" -name 'shard-*-*.safetensors' | sed 's|.*/shard-0*\([0-9]*\)-.*|\1|' | sort -n | tail -1; }

more_sets() {
  local seed=$1
  while [ "$((seed + 1))" -lt "$((first + sets))" ]; do
    sleep "$pause"
    seed=$((seed + 1))
    make_set "$seed" 10
    for old in $(seq "$first" "$((seed - keep_sets))"); do
      rm -f "$cache/shard-$(printf '%04d' "$old")"-*.safetensors
    done
  done
}

newest=$(newest_set)
while [ -z "$newest" ] || [ "$((newest + 1 - first))" -lt "$before" ]; do
  newest=$((${newest:-$((first - 1))} + 1))
  make_set "$newest" 0
done
if [ "$keep_sets" -gt 1 ]; then
  set -m # a group of its own, so that all of it can be stopped
  more_sets "$newest" &
  trap 'kill -- -'"$!"' 2> /dev/null || true' EXIT
  set +m
fi

begin=()
[ -z "${START:-}" ] || begin=(--start-from "$START")
[ ! -e "$out/edge/checkpoint/state.json" ] || begin=(--resume)
python3 -m torch.distributed.run --nproc_per_node="$gpus" -m train model --vae "$vae" --cache "$cache" \
  --growing-cache --split-cache --objects "$objects" --out "$out/edge" --batch 128 --compile unet --cuda-graphs \
  "${begin[@]:+${begin[@]}}" "$@"
