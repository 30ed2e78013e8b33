# shellcheck shell=bash
# shellcheck disable=SC1091,SC2034
# What only your cluster knows. Copy to slurm/site.sh, which git ignores, and fill it in.
# Every job sources it. Source it yourself before sbatch, too, for the SBATCH_* below: source slurm/site.sh

# The environment that `make setup` made, and what it needs.
# module load cuda
source .venv/bin/activate

# The folder that holds the data sets. Unset: data/ in the repository.
# export PSAP_DATA=/path/to/datasets

# Processes per node where Slurm gives the job no GPU; with GPUs it is one per GPU.
PSAP_PROCESSES_PER_NODE=1

# Ports on which the processes of a job may find each other on its first node.
PSAP_PORTS=29500-29999

# Several nodes: the network between them, where the host names do not lead to it.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# sbatch reads these; its own options on the command line win over them.
# export SBATCH_ACCOUNT=...
# export SBATCH_PARTITION=...
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=4
# export SBATCH_CPUS_PER_GPU=16      # JPEG decoding needs them
