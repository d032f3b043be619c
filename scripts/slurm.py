"""What the launcher and its jobs ask of Slurm: is a cluster there and large enough, submit, what waits, how a job ended.

Everything goes through Slurm's commands (sbatch, squeue, sinfo, scontrol, and sacct where there is accounting); jobs are
found again by their names, which are made from the run directory. Never imports torch: a login node may not have it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smartmoe import record
from smartmoe.config import ClusterSpec

ROOT = Path(__file__).resolve().parents[1]
ANSWER_S = 30.0  # what a busy controller may take
FULL = ("job submit limit", "sleeping and retrying", "QOSMaxSubmitJob", "AssocMaxSubmitJob", "MaxSubmitJobs")
UNUSABLE = ("down", "drain", "fail", "error", "unknown", "inval", "reboot", "maint")  # in the state of a node
# States in which a job has ended against the will of its run, and what they mean for the run.
ENDS = {
    "TIMEOUT": ("timeout", "reached its time limit"),
    "DEADLINE": ("timeout", "reached its deadline"),
    "OUT_OF_MEMORY": ("oom", "ran out of the host memory it was given"),
    "NODE_FAIL": ("failed", "lost a node"),
    "BOOT_FAIL": ("failed", "could not boot its nodes"),
    "PREEMPTED": ("failed", "was preempted"),
    "CANCELLED": ("failed", "was cancelled"),
    "REVOKED": ("failed", "was revoked"),
}
OWN_ENDS = ("COMPLETED", "FAILED")  # the run's own process says how it went


class QueueFull(Exception):
    """Slurm takes no more jobs for now; the message is Slurm's."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The table [slurm] of a cluster's file: what is particular to a site. Empty or 0 leaves the choice to Slurm.

    time_min: limit of every job (0: that of the run's grid). setup: shell lines before Python starts, for instance
    "module load cuda". container: words in front of the command on each node. sbatch, srun: further options.
    python: the interpreter on the nodes (default: the launcher's). grids: whose [[grid]] tables apply (default: the ones
    with this cluster's own name). warn_s: how long before its time limit a job is asked to save a checkpoint.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time_min: int = 0
    cpus_per_rank: int = 1
    gres: str = "gpu"
    setup: tuple[str, ...] = ()
    container: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    python: str = ""
    grids: str = ""
    warn_s: int = 120
    poll_s: float = 5.0

    def options(self) -> list[str]:
        """sbatch's options for any job at this site."""
        named = (("partition", self.partition), ("account", self.account), ("qos", self.qos))
        return [f"--{key}={value}" for key, value in named if value] + list(self.sbatch)

    def job_options(self, cluster: ClusterSpec, timeout_s: float) -> list[str]:
        """sbatch's options for a job on all nodes of `cluster` whose run should end within `timeout_s`."""
        sizes = [f"--nodes={cluster.num_nodes}", f"--cpus-per-task={self.cpus_per_rank * cluster.ranks_per_node}"]
        if cluster.device == "cuda":
            sizes.append(f"--gres={self.gres}:{cluster.ranks_per_node}")
        limits = [f"--time={self.minutes(timeout_s)}", f"--signal=B:USR1@{self.warn_s}"]
        return self.options() + sizes + limits

    def minutes(self, timeout_s: float) -> int:
        """The time limit of a job whose run should end within `timeout_s`."""
        return self.time_min or -(-int(timeout_s + self.warn_s) // 60)


@dataclass(frozen=True)
class Job:
    """One job as the queue shows it."""

    job_id: str
    state: str
    reason: str
    elapsed: str
    nodes: str


# ------------------------------------------------------------------------------------------------------------ questions


def ask(*command: str, timeout_s: float = ANSWER_S) -> str:
    """What one of Slurm's commands prints. Raises ValueError with its words when it fails or does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, start_new_session=True
        )  # a session of its own: Ctrl-C must not cut a submission in two
    except FileNotFoundError:
        raise ValueError(f"{command[0]} not found: Slurm's commands are not installed here") from None
    except subprocess.TimeoutExpired as error:
        said = _words((error.stderr or b"").decode(errors="replace"))
        raise ValueError(f"{command[0]} did not answer within {timeout_s:.0f} s{': ' + said if said else ''}") from None
    if done.returncode != 0:
        raise ValueError(f"{command[0]}: {_words(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def why_not() -> str:
    """Why no job can be submitted from here; empty when Slurm answers."""
    if not shutil.which("sbatch"):
        return "sbatch not found: this is no node of a Slurm cluster"
    try:
        ask("sinfo", "-h", "-o", "%R", timeout_s=10)
    except ValueError as error:
        return f"Slurm does not answer: {error}"
    return ""


def queue() -> dict[str, Job]:
    """This user's jobs that have not ended, by name. Raises ValueError when Slurm does not answer."""
    jobs = {}
    for line in ask("squeue", "-h", f"--user={os.getuid()}", "-o", "%i|%T|%r|%M|%N|%j").splitlines():
        job_id, state, reason, elapsed, nodes, name = line.split("|", 5)
        jobs[name] = Job(job_id, state, "" if reason == "None" else reason, elapsed, nodes)
    return jobs


def job_name(path: Path) -> str:
    """The name of the job for a run directory or run-set: equal for equal paths, told apart by a hash."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return f"{record.safe_run_id(path.name)[:60]}.{digest}"


def state_of(job_id: str) -> tuple[str, str, str]:
    """(state, reason, exit code) of a job that may have ended; state "" when Slurm knows nothing of it any more.

    The controller forgets a job some minutes after its end; accounting, where there is any, does not.
    """
    try:
        text = ask("scontrol", "show", "job", "-o", job_id)
        found = {key: re.search(rf"\b{key}=(\S+)", text) for key in ("JobState", "Reason", "ExitCode")}
        return tuple(match.group(1) if match else "" for match in found.values())
    except ValueError:
        pass
    try:
        lines = ask("sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,Reason,ExitCode").splitlines()
        state, reason, code = lines[-1].split("|")
        return state.split()[0], reason, code  # "CANCELLED by 1000"
    except (ValueError, IndexError):
        return "", "", ""


# ------------------------------------------------------------------------------------------------------------ submission


def submit(script: str, argument: Path, name: str, output: Path, options: list[str], after: str = "") -> str:
    """Submit scripts/`script` with one argument and return the job's id. `after` is a dependency, for instance "afterok:7".

    Raises QueueFull, or ValueError with Slurm's words when it refuses the job for good.
    """
    command = [
        "sbatch", "--parsable", f"--job-name={name}", f"--chdir={ROOT}",
        f"--output={str(output).replace('%', '%%')}", *options,
    ]  # fmt: skip
    if after:
        command += [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
    try:
        return ask(*command, str(ROOT / "scripts" / script), str(argument)).strip().split(";")[0]
    except ValueError as error:
        if any(words in str(error) for words in FULL):
            raise QueueFull(str(error)) from None
        raise


def preflight(site: Site, cluster: ClusterSpec, timeout_s: float) -> None:
    """Raise ValueError, before anything is submitted, when no job of that size could ever start here: no Slurm, no such
    partition or a closed one, too few nodes that can be reached and have the GPUs and CPUs, a time limit that is too long,
    or what else Slurm finds."""
    if reason := why_not():
        raise ValueError(reason)
    rows = [line.split("|") for line in ask("sinfo", "-h", "-o", "%R|%a|%P|%l").splitlines()]
    partitions = {row[0]: row for row in rows}
    default = next((row[0] for row in rows if row[2].endswith("*")), "")
    name = site.partition or default
    if name not in partitions:
        listed = ", ".join(sorted(partitions)) or "none"
        what = f'no partition "{name}"' if name else "no default partition: name one in the cluster's file"
        raise ValueError(f"Slurm has {what}; there are: {listed}")
    if partitions[name][1] != "up":
        raise ValueError(f"partition {name} is {partitions[name][1]}: it takes no jobs now")
    limit, wanted = _limit_minutes(partitions[name][3]), site.minutes(timeout_s)
    if wanted > limit:
        raise ValueError(f"partition {name} lets jobs run {limit:.0f} minutes, the runs ask for {wanted} (time_min)")
    gpus = cluster.ranks_per_node if cluster.device == "cuda" else 0
    cpus = site.cpus_per_rank * cluster.ranks_per_node
    faults = {}
    for line in ask("sinfo", "-h", "-N", "-p", name, "-o", "%N|%T|%G|%c|%E").splitlines():
        node, state, gres, node_cpus, why = line.split("|", 4)
        faults[node] = _fault(state, why, gpus_of(gres), int(node_cpus), gpus, cpus)
    fitting = [node for node, fault in faults.items() if not fault]
    if len(fitting) < cluster.num_nodes:
        need = f"{cluster.num_nodes} nodes with {f'{gpus} GPUs and ' if gpus else ''}{cpus} CPUs each"
        listed = "; ".join(f"{node} {fault}" for node, fault in faults.items() if fault)
        raise ValueError(f"a job needs {need}, but partition {name} has {len(fitting)} ({listed or 'no other nodes'})")
    try:
        ask("sbatch", "--test-only", *site.job_options(cluster, timeout_s), str(ROOT / "scripts" / "job.sbatch"), "RUN_DIR")
    except ValueError as error:
        if not any(words in str(error) for words in FULL):
            raise ValueError(f"Slurm would refuse the jobs: {error}") from None


def gpus_of(gres: str) -> int:
    """How many GPUs a node has by its generic resources, for instance "gpu:v100:8(S:0-1),nvme:1"."""
    total = 0
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = item.split(":")
        if parts[0] == "gpu":
            total += int(parts[-1]) if parts[-1].isdigit() else 1
    return total


def _fault(state: str, why: str, has_gpus: int, has_cpus: int, gpus: int, cpus: int) -> str:
    if state.endswith("*") or any(word in state for word in UNUSABLE):
        cannot = "cannot be reached" if state.endswith("*") else f"is {state.rstrip('~#%$@+-^!')}"
        return cannot + (f" ({why})" if why not in ("", "none") else "")
    if has_gpus < gpus:
        return f"has {has_gpus} GPUs"
    return f"has {has_cpus} CPUs" if has_cpus < cpus else ""


def _limit_minutes(text: str) -> float:
    """Minutes of a time limit as Slurm prints it: "infinite", "1-00:00:00", "2:00:00", "30:00"."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
    except ValueError:
        return float("inf")
    seconds = sum(part * 60**place for place, part in enumerate(reversed(parts)))
    return int(days or 0) * 1440 + seconds / 60


def _words(text: str) -> str:
    """What a command of Slurm complains about, on one line, without the prefixes."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))[:500]


# ---------------------------------------------------------------------------------------------------------------- results


def remember(run_dir: Path, **facts: object) -> None:
    """Add to what the launcher and the job keep about the run's job in RUN_DIR/slurm.json."""
    record.write_json(run_dir / "slurm.json", {**recall(run_dir), **facts})


def recall(run_dir: Path) -> dict:
    """The facts of `remember`; none when there are none."""
    try:
        facts = json.loads((run_dir / "slurm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def settle(run_dir: Path, job_id: str) -> dict | None:
    """Make the status of a run agree with the end of its job; None while the job has not ended, else run.json.

    The run's own word counts where its process could give it (ok, failed, oom); Slurm's record where the job was ended
    from outside. A run that is ok stays so, whatever became of its job afterwards.
    """
    state, reason, code = state_of(job_id) if job_id else ("", "", "")
    if state and state not in ENDS and state not in OWN_ENDS:
        return None
    run = record.read_run(run_dir)
    status, message = judge(run, job_id, state, reason, code)
    if (status, message) != (run["status"], run["message"]):
        run = record.set_status(run_dir, status, message)
    return run


def judge(run: dict, job_id: str, state: str, reason: str, code: str) -> tuple[str, str]:
    """Status and message of `run` (the contents of run.json) after its job ended in `state`."""
    if run["status"] == "ok" or (run["status"] == "timeout" and state == "FAILED"):
        return run["status"], run["message"]
    if state == "CANCELLED" and run["status"] in ("pending", "skipped") and "Dependency" in reason:
        return "skipped", run["message"] or "needs the trace of a run that did not end well"
    if state in ENDS:
        status, words = ENDS[state]
        return status, f"job {job_id} {words} (Slurm: {state}); go on with --resume"
    if run["status"] in record.ENDED:
        return run["status"], run["message"]
    if not state:
        return "failed", f"job {job_id or 'unknown'} is gone: Slurm knows nothing of it and it left no status"
    return "failed", f"job {job_id} ended before it could say why (Slurm: {state}, exit code {code}); see job.log"


def settle_all(run_dirs: Iterable[Path]) -> None:
    """`settle` every run that has a job and no final status yet."""
    for run_dir in run_dirs:
        job_id = recall(run_dir).get("job_id", "")
        if job_id and record.read_run(run_dir)["status"] != "ok":
            settle(run_dir, str(job_id))
