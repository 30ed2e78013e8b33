# shellcheck shell=bash
# shellcheck disable=SC1091,SC2034
# What only your cluster knows. Copy this file to slurm/site.sh, which git ignores, and fill that in:
#   1. write a value where it says FILL_IN; a job refuses to start while one is left
#   2. choose one block of each section by removing its `# `
# Every job reads it. Read it yourself before sbatch, too, for the SBATCH_ variables: source slurm/site.sh

# --- What every job asks for. sbatch reads these; its options on the command line win over them ---

export SBATCH_ACCOUNT=FILL_IN       # who pays; remove the line if your cluster has no accounts
export SBATCH_PARTITION=FILL_IN     # remove the line for the default partition
export SBATCH_TIMELIMIT=24:00:00    # --time; a job that needs longer writes a checkpoint and queues again

# GPUs, where the cluster knows --gpus-per-node
# export SBATCH_GPUS_PER_NODE=4

# GPUs, where the cluster wants --gres
# export SBATCH_GRES=gpu:4

# Cores to decode JPEGs: ImageNet needs about 20 per GPU
# export SBATCH_CPUS_PER_GPU=16

# --- The data ---

# The folder that holds imagenet/{train,val}/, as every node sees it
export PSAP_DATA=FILL_IN

# Its copy on each node's own disk, where training reads faster: stage_data runs on EVERY node of a job before training
# starts, and has to fill PSAP_NODE_DATA. TMPDIR is the node's folder that your cluster empties after a job.
# PSAP_NODE_DATA=$TMPDIR/data
# stage_data() {
#   mkdir -p "$PSAP_NODE_DATA/imagenet"
#   tar -xf "$PSAP_DATA/imagenet.tar" -C "$PSAP_NODE_DATA/imagenet"
# }

# --- The Python that has this project. Paths begin at the repository ---

# venv, as `make setup` makes it
# source .venv/bin/activate

# conda, as `conda env create --file environment.yml` makes it
# source "$HOME/miniconda3/etc/profile.d/conda.sh"
# conda activate psap

# environment modules, and a venv made with their Python
# source /etc/profile.d/modules.sh
# module load python/3.12 cuda
# source .venv/bin/activate

# Apptainer: an image with this project's packages, bash and pkill. Bind what jobs read: TMPDIR, too, for a copy there
# PSAP_CONTAINER=(apptainer exec --nv --bind "$PWD,$PSAP_DATA" /path/to/image.sif)

# --- Processes ---

# Ports on which the processes of a job may find each other on its first node
PSAP_PORTS=29500-29999

# Processes per node where Slurm gives the job no GPU; with GPUs it is one per GPU
PSAP_PROCESSES_PER_NODE=1

# Several nodes: the network between them, where the host names do not lead to it
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
