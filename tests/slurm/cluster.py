"""A private Slurm cluster on this machine: own configuration, key, socket and ports; no other Slurm is touched.

Its two nodes are this machine under its two names, and only pretend to have GPUs.
"""

import os
import pwd
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "srun")
PATIENCE_SECONDS = 600  # of a wait that ends in failure; a busy machine may take long
CPUS, GPUS = 64, 4  # per node; what the machine really has does not matter

# cred_expire is also how long a requeued job waits; Slurm takes no less than 5 seconds.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
JobRequeue=1
KillWait=60
MinJobAge=3600
ReturnToService=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:{gpus}
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=2880 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=2880 PriorityTier=2 PreemptMode=OFF
"""


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS
) -> None:
    """Return when `condition` holds; fail when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.1)


class Cluster:
    """Slurm's commands, spoken to the private cluster."""

    def __init__(self, folder: Path, controller_port: int) -> None:
        self.folder = folder
        self.controller_port = controller_port
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "PSAP_DATA")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(foreign)
        }
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def call(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """What the command prints; it must succeed."""
        done = self.call(*command, cwd=cwd)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job or an array task, by the names that it uses."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: str, *states: str) -> None:
        """Wait until the job is in one of the states."""
        wait_until(lambda: self.state(job) in states, f"job {job} {' or '.join(states)}")


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start munged, slurmctld and one slurmd per node in `folder`; stop them on the way out."""
    host = socket.gethostname().split(".")[0]
    user = pwd.getpwuid(os.getuid()).pw_name
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "plugstack.conf").touch()
    for index in range(GPUS):
        (folder / f"gpu{index}").symlink_to("/dev/null")  # Slurm wants a device
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    ports = _free_ports(3)
    filled = SLURM_CONF.format(
        folder=folder, host=host, user=user, ports=ports, cpus=CPUS, gpus=GPUS
    )
    (folder / "slurm.conf").write_text(filled)
    for name in ("state", f"spool-{host}", "spool-localhost"):
        (folder / name).mkdir()
    files = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    cluster = Cluster(folder, ports[0])
    with ExitStack() as stack:
        stack.enter_context(_daemon(cluster, "munged", "--foreground", "--force", *munge))
        wait_until((folder / "munge.socket").exists, "munged")
        stack.enter_context(_daemon(cluster, "slurmctld", "-D"))
        for node in (host, "localhost"):
            stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", node))
        idle = "State=IDLE "
        wait_until(
            lambda: cluster.call("scontrol", "show", "nodes").stdout.count(idle) == 2,
            "slurmctld and slurmd",
        )
        try:
            yield cluster
        finally:  # Slurm ends what a failed test has left, while its daemons live
            cluster.call("scancel", "--full", "--signal=KILL", f"--user={user}")
            cluster.call("scancel", f"--user={user}")
            wait_until(
                lambda: not cluster.call("squeue", "--noheader").stdout, "the end of all jobs", 30
            )


@contextmanager
def _daemon(cluster: Cluster, *command: str) -> Iterator[None]:
    with (cluster.folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=cluster.folder,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
