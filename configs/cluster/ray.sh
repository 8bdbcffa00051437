#!/bin/bash
# The learner on the first SLURM node, and samplers in Ray on the GPUs of all the others; the
# arguments are those of `rl-lora train`.
#
#   sbatch --nodes=5 configs/cluster/ray.sh deepmath_qwen3_8b resources.samplers=32 \
#     sampling.max_staleness=2 run.output_dir=/shared/runs
#
# With an activated environment that has the extra `ray`. The base model has to be on every node: a
# shared folder, or each node's own cache of the hub. Adapters need no shared folder.
#SBATCH --job-name=rl_lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK RAY_USAGE_STATS_ENABLED=0
head=${nodes[0]} port=$((20000 + SLURM_JOB_ID % 20000))

# Only those who know the token may use this Ray (from Ray 2.52 on).
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# On the learner's node Ray gets no GPU, and carries no sampler.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$head" --port="$port" --num-gpus=0 --num-cpus=0 \
  --include-dashboard=false --disable-usage-stats --block &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
others=$((SLURM_JOB_NUM_NODES - 1))
srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" \
  bash -c 'until ray health-check --address "$0" >/dev/null 2>&1; do sleep 2; done
           exec ray start --address "$0" --num-gpus "$SLURM_GPUS_ON_NODE" --block' "$head:$port" &

# One learner process; its GPU is the first one of its node.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" --gpus=1 \
  bash -c 'until ray health-check --address "$0" >/dev/null 2>&1; do sleep 2; done
           exec rl-lora train "$@" --resume' "$head:$port" "$@" "resources.ray_address=$head:$port"
