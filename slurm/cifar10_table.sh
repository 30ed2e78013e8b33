#!/usr/bin/env bash
# One cell of a suite per array task: sbatch --array=0-N slurm/cifar10_table.sh [suite] [hydra overrides ...]
# `python -m experiments.suite plan cifar10_table` prints the runs and their indices.
#SBATCH --job-name=cifar10_table
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/common.sh ] || {
  echo "error: ${SLURM_SUBMIT_DIR:-$PWD} is not the repository's root: submit from there" >&2
  exit 2
}
source slurm/common.sh
suite=cifar10_table
if [[ -n ${1:-} && $1 != *=* ]]; then
  suite=$1
  shift
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "a table is a job array: sbatch --array=0-N slurm/cifar10_table.sh"
run=$(inside python -m experiments.suite show "$suite" "$SLURM_ARRAY_TASK_ID" "$@") || exit 2
mapfile -t run <<<"$run"
train "${run[@]}"
