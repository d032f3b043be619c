"""A Slurm cluster of several nodes emulated on this machine: Debian's munge, slurmctld and one slurmd for each node.

    python tests/scripts/slurm_cluster.py        # start one, print how to use it, stop it at Ctrl-C

Needs root and the packages of PACKAGES. Everything listens on loopback and lives in one scratch folder; each slurmd is
the first process of a PID namespace of its own, so that killing it takes its jobs along, as when a node dies.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
START_S = 30.0
_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec should load nothing

# cred_expire: how long a credential of a dead node blocks its jobs. KillWait: seconds from SIGTERM to SIGKILL.
CONF = """ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
AccountingStorageType=accounting_storage/none
JobSubmitPlugins=lua
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=200000
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdTimeout=30
"""
# Refuses jobs as a site's limit on submitted jobs does, which without an accounting database Slurm cannot have.
SUBMIT_LIMIT = """function slurm_job_submit(job, partitions, uid)
  local file = io.open("{folder}/submit_limit")
  if file == nil then return slurm.SUCCESS end
  local left = tonumber(file:read("*l"))
  file:close()
  if left < 1 then return slurm.ESLURM_ACCOUNTING_POLICY end
  file = io.open("{folder}/submit_limit", "w")
  file:write(left - 1)
  file:close()
  return slurm.SUCCESS
end
function slurm_job_modify() return slurm.SUCCESS end
return slurm.SUCCESS
"""


def why_not() -> str:
    """Why no cluster can be emulated here; empty when one can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install --no-install-recommends {PACKAGES})"
    if os.geteuid() != 0:
        return "emulating nodes needs root"
    alone = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "true"]
    return "" if subprocess.run(alone, capture_output=True).returncode == 0 else "no PID namespaces can be made here"


class SlurmCluster:
    """Nodes n1 .. n`num_nodes` with `cpus` CPUs each. Partition "main" has all of them, "left" and "right" a half each, "shut"
    is closed. A context manager; `env` is the environment in which Slurm's commands find the cluster."""

    def __init__(self, num_nodes: int = 4, cpus: int = 4):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        self.cpus = cpus
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_error) -> None:
        self.stop()

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints. Raises CalledProcessError when it fails."""
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True, timeout=60).stdout

    def limit_submissions(self, left: int | None) -> None:
        """Let the queue be full after `left` more submissions, tests of a submission included; None lifts that."""
        path = self.folder / "submit_limit"
        path.unlink() if left is None else path.write_text(str(left))

    def kill_node(self, name: str) -> None:
        """End the node's slurmd and every process of its jobs at once, and tell the controller that it is gone."""
        process = self.processes.pop(name)
        for child in _children(process.pid):  # the namespace's first process: the kernel ends the others with it
            os.kill(child, signal.SIGKILL)
        process.wait()
        self.ask("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def start_node(self, name: str) -> None:
        """Start (again) the slurmd of a node."""
        spool = self.folder / "spool" / name
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        namespace = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._run(name, [*namespace, "slurmd", "-D", "-N", name])

    def wait_until_idle(self, names: list[str], timeout_s: float = START_S) -> None:
        """Wait until the controller has all of `names` ready for jobs. Raises TimeoutError with what it says instead."""
        end = time.monotonic() + timeout_s
        while True:
            said = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %t"], env=self.env, capture_output=True, text=True)
            states = dict(line.split() for line in said.stdout.splitlines())
            if all(states.get(name) in ("idle", "mix", "alloc") for name in names):
                return
            if time.monotonic() > end:
                raise TimeoutError(f"nodes {states} after {timeout_s:.0f} s: {said.stderr}{self._log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process that was started here, and remove the scratch folder."""
        if "slurmctld" in self.processes:
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=20)
        for name, process in reversed(self.processes.items()):
            for child in _children(process.pid) if name in self.nodes else [process.pid]:
                os.kill(child, signal.SIGKILL if name in self.nodes else signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        first_port = _free_ports(1 + len(self.nodes))
        text = CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], port=first_port)
        for number, name in enumerate(self.nodes, 1):
            sizes = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1"
            text += f"NodeName={name} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1 "
            text += f"Port={first_port + number} {sizes} RealMemory=4000 State=UNKNOWN\n"
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=60 State=UP\n"
        half = len(self.nodes) // 2
        parts = {"left": (self.nodes[:half], "UP"), "right": (self.nodes[half:], "UP"), "shut": (self.nodes, "DOWN")}
        for name, (nodes, state) in parts.items():
            text += f"PartitionName={name} Nodes={','.join(nodes)} MaxTime=60 State={state}\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "job_submit.lua").write_text(SUBMIT_LIMIT.format(folder=self.folder))
        self._start_munged()
        self._run("slurmctld", ["slurmctld", "-D", "-c"])
        for name in self.nodes:
            self.start_node(name)
        self.wait_until_idle(self.nodes)

    def _start_munged(self) -> None:
        """The daemon that signs messages; it refuses to be root, so it is user munge, in a folder of that user."""
        folder = self.folder / "munge"
        folder.mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        files = {"key-file": key, "pid-file": folder / "pid", "log-file": folder / "log", "seed-file": folder / "seed"}
        options = [f"--{option}={path}" for option, path in files.items()]
        link = self.folder / "munge.socket"
        link.symlink_to(folder / "socket")
        self._run("munged", ["munged", "--foreground", f"--socket={folder / 'socket'}", *options], user="munge")
        end = time.monotonic() + START_S
        while not (folder / "socket").exists():
            if time.monotonic() > end or self.processes["munged"].poll() is not None:
                raise TimeoutError(f"munged did not start:\n{(self.folder / 'munged.out').read_text()}")
            time.sleep(0.05)

    def _run(self, name: str, command: list[str], user: str | None = None) -> None:
        """Start a daemon in the foreground of a session of its own: Ctrl-C in a terminal reaches this program alone."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env, cwd=self.folder, user=user,
                group=user, extra_groups=[] if user else None, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _log_tail(self) -> str:
        logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "".join(f"\n== {log.name}\n" + "\n".join(log.read_text().splitlines()[-8:]) for log in logs)


def _end_with_parent() -> None:
    """In the child before exec: ask Linux for a SIGKILL when the program that started the cluster dies, even by kill -9."""
    _LIBC.prctl(1, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _free_ports(count: int) -> int:
    """The first of `count` adjacent ports of loopback that nobody listens on."""
    for first in range(17000 + os.getpid() % 1000 * 10, 32000, count):
        taken = False
        for port in range(first, first + count):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    taken = True
        if not taken:
            return first
    raise OSError("no free ports between 17000 and 32000")


if __name__ == "__main__":
    reason = why_not()
    if reason:
        sys.exit(f"slurm_cluster: {reason}")
    began = time.monotonic()
    with SlurmCluster() as cluster:
        print(f"up after {time.monotonic() - began:.1f} s: export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass
