#!/usr/bin/env bash
# One run of any recipe: sbatch slurm/train.sh experiment=<recipe> [hydra overrides ...]
#SBATCH --job-name=psap_train
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=USR1@300
cd "${SLURM_SUBMIT_DIR:-.}" && [ -f slurm/common.sh ] || {
  echo "error: ${SLURM_SUBMIT_DIR:-$PWD} is not the repository's root: submit from there" >&2
  exit 2
}
source slurm/common.sh
train "$@"
