#!/bin/bash
# Trains on one or several SLURM nodes of eight GPUs; the arguments are those of `rl-lora train`.
#
#   sbatch configs/cluster/slurm.sh deepmath_qwen3_8b run.output_dir=/shared/runs
#   sbatch --nodes=4 configs/cluster/slurm.sh deepmath_qwen3_8b run.output_dir=/shared/runs
#
# With an activated environment. run.output_dir has to be on a file system that all nodes share, and
# so does the model, or each node needs it in its own cache of the hub.
#SBATCH --job-name=rl_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

launch=(
  --multi_gpu
  --num_machines "$SLURM_JOB_NUM_NODES"
  --num_processes "$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))" # of all nodes
  --main_process_port "$((20000 + SLURM_JOB_ID % 20000))"
  --mixed_precision no --dynamo_backend no # the TOML file says what runs in which precision
  --max_restarts 3
)
if ((SLURM_JOB_NUM_NODES > 1)); then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # c10d: where a process dies, the launchers of all nodes start theirs again.
  launch+=(--main_process_ip "${nodes[0]}" --rdzv_backend c10d)
fi

# One launcher on each node. --resume: a job that was requeued goes on from its last checkpoint.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# shellcheck disable=SC2016 # the node's number is known on the node only
srun --kill-on-bad-exit=1 \
  bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
  "${launch[@]}" -m rl_lora train "$@" --resume
