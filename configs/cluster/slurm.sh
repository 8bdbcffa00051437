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
#SBATCH --signal=B:USR1@120
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# One launcher on each node; the TOML file says what runs in which precision, not the launcher.
train() {
  # shellcheck disable=SC2016 # a node's number is known on the node only
  srun --kill-on-bad-exit=1 \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --multi_gpu \
    --num_machines "$SLURM_JOB_NUM_NODES" \
    --num_processes "$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))" \
    --main_process_ip "${nodes[0]}" \
    --main_process_port "$((20000 + (SLURM_JOB_ID + SECONDS) % 20000))" \
    --mixed_precision no --dynamo_backend no \
    -m rl_lora train "$@" --resume
}

# SLURM's notice, 120 s before the time limit: all processes write a checkpoint and end.
is_over='' is_interrupted=''
trap 'is_over=yes is_interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# bash runs a trap during `wait`, which then ends early, and not while a command runs. A second
# `wait` gives the launcher's exit code, also when it has ended meanwhile.
run() {
  local launcher code
  train "$@" &
  launcher=$!
  while is_interrupted=''; wait "$launcher"; code=$?; [[ $is_interrupted ]]; do :; done
  return "$code"
}

# A process that dies ends those of all nodes; the job then resumes from its last checkpoint. What
# fails within five minutes is a mistake, and is not repeated. (--max_restarts is for one node: the
# launchers of several do not agree on the attempt, pytorch#135712.)
for _ in 1 2 3 4; do
  started=$SECONDS code=0
  run "$@" || code=$?
  if ((code != 0)) && [[ $is_over ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  if ((code == 0 || SECONDS - started < 300)) || [[ $is_over ]]; then break; fi
done
exit "$code"
