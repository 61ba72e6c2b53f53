"""A single-node SLURM on this machine, as a context manager. Needs root; changes nothing outside its folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv", "unshare")
CONF = """\
ClusterName=bench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE
"""
# In a PID namespace all processes end with the first one, even job steps, which slurmd would leave behind.
DAEMONS = """\
munged --foreground --force --key-file=munge.key --socket=munge.socket --pid-file=munge.pid --log-file=munge.log \
--seed-file=munge.seed &
slurmctld -D -i -f "$SLURM_CONF" &
slurmd -D -f "$SLURM_CONF" &
wait
"""
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


def lacking() -> str:
    """What is missing on this machine, in a sentence; empty if `cluster` works here."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path(os.environ)) is None]:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge util-linux (nothing to configure)"
    return "" if os.geteuid() == 0 else "needs root, who may start slurmd and run jobs of others"


@dataclass(frozen=True)
class Job:
    """The output of `scontrol show job` at one moment."""

    fields: Mapping[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def code(self) -> int:
        """The exit code as a shell reports it: 128 + the number of a signal."""
        code, _, number = self.fields["ExitCode"].partition(":")
        return 128 + int(number) if int(number) else int(code)


@dataclass
class Cluster:
    """Commands of the SLURM in `folder`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of processes that use this SLURM, without the variables of a surrounding one."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return outer | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path(os.environ)}

    def ask(self, *command: str) -> str:
        """Run a SLURM command and return its output. Raises RuntimeError with its error message."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Submit a job and return its number."""
        return self.ask("sbatch", "--parsable", *options, str(script))

    def job(self, number: str) -> Job:
        shown = self.ask("scontrol", "--oneliner", "show", "job", number)
        return Job({key: value for key, _, value in (word.partition("=") for word in shown.split())})

    def until(self, number: str, *states: str, restarts: int = 0, bound: float = 300.0) -> Job:
        """Wait for a state of a job after `restarts` restarts. Raises TimeoutError, also if it ends in another."""
        deadline = time.monotonic() + bound
        while (job := self.job(number)).state not in states or job.restarts < restarts:
            if time.monotonic() > deadline or job.state in ENDED:
                raise TimeoutError(f"job {number} is {job.state} after {job.restarts} restarts, not {states}")
            time.sleep(0.1)
        return job

    def ended(self, number: str, bound: float = 300.0) -> Job:
        return self.until(number, *ENDED, bound=bound)

    def start_now(self, number: str) -> None:
        """Start a requeued job at once; SLURM would let it wait for two minutes."""
        self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")


@contextmanager
def cluster(folder: Path, cpus: int = 2, kill_wait: int = 30) -> Iterator[Cluster]:
    """Start munged, slurmctld and slurmd; on exit kill them and all that they have started.

    folder: for keys, state and logs; its path must be short, as it contains a socket. kill_wait: seconds from SIGTERM
    to SIGKILL.
    """
    if sentence := lacking():
        raise RuntimeError(f"a SLURM of one node {sentence}.")
    _write(folder, cpus, kill_wait)
    namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", DAEMONS]
    command = ["setpriv", "--pdeathsig", "KILL", *namespace]  # also if this process is killed
    here = Cluster(folder)
    with (folder / "daemons.log").open("w") as log:
        daemons = subprocess.Popen(command, cwd=folder, env=here.environment, stdout=log, stderr=log)
    try:
        _await_node(here, daemons)
        yield here
    finally:
        daemons.kill()
        daemons.wait()


def _write(folder: Path, cpus: int, kill_wait: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    conf = CONF.format(host=host, folder=folder, ports=_free_ports(2), cpus=cpus, kill_wait=kill_wait)
    (folder / "slurm.conf").write_text(conf)


def _await_node(here: Cluster, daemons: subprocess.Popen[bytes], bound: float = 60.0) -> None:
    deadline = time.monotonic() + bound
    while time.monotonic() < deadline and daemons.poll() is None:
        try:
            if here.ask("sinfo", "--noheader", "--format=%T") == "idle":
                return
        except RuntimeError:  # nobody listens yet
            pass
        time.sleep(0.2)
    logs = [path.read_text(errors="replace")[-1500:] for path in sorted(here.folder.glob("*.log"))]
    raise RuntimeError("SLURM has not started: " + "\n".join(logs))


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join([environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
