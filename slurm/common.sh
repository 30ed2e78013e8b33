# shellcheck shell=bash
# What the job scripts share. They source it at the repository's root, inside a job, and call `train` last.
# docs/slurm.md says what the exit codes mean and who sends which signal.

refuse() {
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "psap: job $job, restart ${SLURM_RESTART_COUNT:-0}: $*" >&2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a job script: submit it with sbatch"
[ -f slurm/site.sh ] || refuse "slurm/site.sh is missing: copy slurm/site.example.sh to it and fill it in"
PSAP_CONTAINER=()
# shellcheck source=slurm/site.example.sh
source slurm/site.sh
unfilled=$(sed -nE 's/^ *(export )?([A-Z_]+)=FILL_IN( .*)?$/\2/p' slurm/site.sh | paste -s -d , | sed 's/,/, /g')
[ -z "$unfilled" ] || refuse "slurm/site.sh: fill in $unfilled"
set -uo pipefail

# Run a command in the environment of slurm/site.sh.
inside() {
  "${PSAP_CONTAINER[@]}" "$@"
}

has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
inside python -c "$has_torch" 2>/dev/null ||
  refuse "slurm/site.sh activates no environment whose python has torch: choose one of its blocks"

# An array's last task has the id of the whole array, so a task goes by the array's id and its index.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}

# imagenet NETWORK [pretrained] [hydra overrides ...]
imagenet() {
  local recipe=imagenet_$1
  shift
  if [ "${1:-}" = pretrained ]; then
    recipe+=_pretrained
    shift
  fi
  train experiment="$recipe" "$@"
}

# train HYDRA_OVERRIDES ...: train, or continue, this run on all nodes of the job, then leave: 0 done, 1 failed,
# 2 refused, 75 interrupted with a checkpoint.
train() {
  local before status step code
  trap '' TERM USR1 # nothing to stop yet, nor to lose
  before=$(inside python -m experiments.status "$@") || exit 2
  if [ "$before" = "done" ]; then
    inside python -m experiments.train "$@" >/dev/null || exit 2 # if it was trained for no suite, now it counts for this one
    say "done already"
    exit 0
  fi
  stage

  read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  choose_port
  export PSAP_RENDEZVOUS=$head_node:$port PSAP_PROCESSES_PER_NODE=${PSAP_PROCESSES_PER_NODE:-1}
  # The first node that ends leaves the others time for a checkpoint, and does not let them wait for it for ever.
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=120 \
    "${PSAP_CONTAINER[@]}" bash -c "$on_each_node" torchrun "$@" &
  step=$!
  # Slurm signals the step, seldom this shell. srun passes SIGUSR1 on, but answers SIGTERM by killing the step.
  trap 'kill -USR1 "$step" 2>/dev/null' TERM USR1
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  trap '' TERM USR1
  wait "$step"
  code=$? # the highest of all nodes

  # Nodes can end unlike each other, and some are killed: whether the run is whole or has a checkpoint, its folder says.
  status=$(inside python -m experiments.status "$@")
  case $status in
    done) say "done"; exit 0 ;;
    interrupted*) [ "$status" = "$before" ] || requeue ;; # an older interruption is no reason
  esac
  if [ "$code" = 2 ]; then
    say "refused: the error is above"
    exit 2
  fi
  say "failed: the error is above"
  exit 1
}

# If the site has a stage_data, run it on every node, wait for the slowest, and let training read PSAP_NODE_DATA. Signals
# do not stop it: a job that is preempted meanwhile is ended and requeued by Slurm.
stage() {
  declare -F stage_data >/dev/null || return 0
  [ -n "${PSAP_NODE_DATA:-}" ] || refuse "slurm/site.sh has stage_data, but no PSAP_NODE_DATA"
  export PSAP_NODE_DATA
  export -f stage_data
  srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    bash -c 'trap "" TERM USR1; set -euo pipefail; stage_data' ||
    refuse "stage_data of slurm/site.sh failed: the reason is above"
}

# Who gets a signal that Slurm sends to the step depends on its ProctrackType: with cgroup (the usual one) this shell
# only, with linuxproc torchrun and its workers, too, some twice. Only the workers answer, and a second signal does
# them no harm: torchrun would die of SIGUSR1, and of a second SIGTERM, before they have written their checkpoint.
# They begin to listen when they have what to save; until then they ignore both, as torchrun does.
# shellcheck disable=SC2016
on_each_node='
  trap "" TERM USR1
  export PSAP_DATA="${PSAP_NODE_DATA:-${PSAP_DATA:-data}}"
  python -m experiments.training.torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-$PSAP_PROCESSES_PER_NODE}" \
    --rdzv-backend=c10d --rdzv-endpoint="$PSAP_RENDEZVOUS" --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --local-addr="$SLURMD_NODENAME" \
    --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m experiments.train "$@" &
  agent=$!
  trap "pkill -USR1 -P $agent" TERM USR1
  while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done
  wait "$agent"'

# The first port of the site's range on which nobody answers. Jobs begin their search at different places, as
# those of an array start on one node at the same moment. This shell runs on the head node.
choose_port() {
  local first last offset
  [[ ${PSAP_PORTS:-} =~ ^([0-9]+)-([0-9]+)$ ]] || refuse "PSAP_PORTS in slurm/site.sh must be a range as in 29500-29999"
  first=${BASH_REMATCH[1]} last=${BASH_REMATCH[2]}
  for ((offset = 0; offset <= last - first; offset++)); do
    port=$((first + (SLURM_JOB_ID + offset) % (last - first + 1)))
    (: <>"/dev/tcp/$head_node/$port") 2>/dev/null || return 0
  done
  refuse "no free port on $head_node in PSAP_PORTS=$PSAP_PORTS: widen the range in slurm/site.sh"
}

# Back into the queue under the same id. A job that Slurm is ending (scancel, the time limit, preemption without
# grace) is not running any more: what becomes of it is not for us to say.
requeue() {
  if [[ $(scontrol show job "$job") == *JobState=RUNNING* ]] && scontrol requeue "$job"; then
    say "interrupted with a checkpoint, requeued"
  else
    say "interrupted with a checkpoint, not requeued; submitted again, it continues"
  fi
  exit 75
}
