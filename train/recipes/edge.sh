#!/usr/bin/env bash
# Makes the edge checkpoint from a folder of objects: autoencoder, latent cache, multiview model.
#
#   GPUS=4 bash train/recipes/edge.sh OBJECTS OUT [options of `python -m train model`]
#
# Stages whose result is already in OUT are kept, so a stopped run goes on where it was; the model
# continues from OUT/edge/checkpoint if there is one.  Shard processes share the GPUs: reading and
# drawing up views is work for the CPU, and one process feeds no more than a fifth of a fast GPU.
set -euo pipefail
objects=$1 out=$2
shift 2
gpus=${GPUS:-1} variants=${VARIANTS:-16} shards_per_gpu=${SHARDS_PER_GPU:-5} cache=${CACHE:-$out/cache}
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if [ ! -e "$out/vae/vae.safetensors" ]; then
  # A batch of 24 and many steps measured better than larger batches in the same minutes.
  CUDA_VISIBLE_DEVICES=0 python3 -m train vae --objects "$objects" --out "$out/vae" \
    --minutes "${VAE_MINUTES:-3}" --batch 24 --lr 7e-4 --limit 1000 --workers 12
fi

shards=$((gpus * shards_per_gpu))
pids=()
for shard in $(seq 0 $((shards - 1))); do
  [ -e "$(printf '%s/shard-%03d.safetensors' "$cache" "$shard")" ] && continue
  CUDA_VISIBLE_DEVICES=$((shard % gpus)) python3 -m train cache --objects "$objects" --vae "$out/vae" \
    --out "$cache" --variants "$variants" --inputs 2 --shard "$shard" --shards "$shards" --workers 3 \
    > "$out/cache-$shard.log" 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]:+${pids[@]}}"; do wait "$pid"; done

resume=()
[ -e "$out/edge/checkpoint/state.json" ] && resume=(--resume)
python3 -m torch.distributed.run --nproc_per_node="$gpus" -m train model --vae "$out/vae" --cache "$cache" \
  --objects "$objects" --out "$out/edge" --batch 128 --compile "${resume[@]:+${resume[@]}}" "$@"
