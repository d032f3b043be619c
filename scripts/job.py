"""Inside a Slurm job: do one run on all its nodes and write down how it ended. Started by scripts/job.sbatch.

    python scripts/job.py RUN_DIR

torchrun is started once on each node; they meet at the first. The run continues from its newest checkpoint where there is
one, so a job that Slurm has requeued goes on. On SIGUSR1, which Slurm sends some time before the time limit, the
ranks are asked to save a checkpoint and stop. Exit codes: 0 the run is ok; 1 it did not end well; 2 it was not started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import slurm  # noqa: E402
from grid import ENTRIES  # noqa: E402
from runner import device_name, run_environment, stopped_at  # noqa: E402

from smartmoe import record  # noqa: E402
from smartmoe.config import RunConfig, check, from_dict  # noqa: E402

# A node's task: SIGUSR1 is for the ranks, which install a handler of their own; torchrun inherits that it is ignored.
ON_EACH_NODE = 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job."""

    job_id: str
    num_nodes: int
    first_node: str
    cpus_per_task: str
    restarts: int

    @classmethod
    def of_this_job(cls) -> Allocation:
        """Raises ValueError outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ValueError("this is no Slurm job: submit it with sbatch scripts/job.sbatch RUN_DIR")
        return cls(
            env["SLURM_JOB_ID"],
            int(env["SLURM_JOB_NUM_NODES"]),
            env["SLURMD_NODENAME"],
            env.get("SLURM_CPUS_PER_TASK", ""),
            int(env.get("SLURM_RESTART_COUNT", "0")),
        )


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    run_dir = Path(argv[0]).resolve()
    try:
        allocation = Allocation.of_this_job()
        run = record.read_run(run_dir)
        config = check(from_dict(RunConfig, run["config"], f"{run_dir}/run.json: config"), str(run_dir))
        if run["status"] == "ok":
            print(f"{run_dir} is done already")
            return 0
        refuse_second_job(run_dir, run, allocation)
        command = step_command(run_dir, run, config, allocation)
    except ValueError as error:
        print(f"job: {error}", file=sys.stderr)
        return 2
    return do(run_dir, run, config, allocation, command)


def refuse_second_job(run_dir: Path, run: dict, allocation: Allocation) -> None:
    """Raise ValueError when another job that has not ended is at work on the run."""
    other = str(slurm.recall(run_dir).get("started_by", ""))
    if run["status"] != "running" or other in ("", allocation.job_id):
        return
    state = slurm.state_of(other)[0]
    if state and state not in slurm.ENDS and state not in slurm.OWN_ENDS:
        raise ValueError(f"job {other} ({state}) is at work on {run_dir}: nothing is run twice")


def step_command(run_dir: Path, run: dict, config: RunConfig, allocation: Allocation) -> list[str]:
    """The command that does the run on every node. Raises ValueError when the plan does not fit the allocation."""
    world, nodes = config.plan.world_size, allocation.num_nodes
    if world % nodes:
        raise ValueError(f"the plan has {world} ranks, which {nodes} nodes cannot share evenly: give --nodes to sbatch")
    entry = run.get("provenance", {}).get("entry", "train")
    if entry not in ENTRIES:
        raise ValueError(f"{run_dir}/run.json: entry {entry!r} is not one of {', '.join(ENTRIES)}")
    site = slurm.recall(run_dir)
    sizes = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if allocation.cpus_per_task:  # srun does not take it over from sbatch
        sizes.append(f"--cpus-per-task={allocation.cpus_per_task}")
    torchrun = [
        "--nnodes", str(nodes), "--nproc-per-node", str(world // nodes), "--master-addr", address(allocation.first_node),
        "--master-port", str(free_port()), "-m", ENTRIES[entry], str(run_dir),
    ]  # fmt: skip
    resume = ["--resume"] if entry == "train" else []
    container, python = list(site.get("container", [])), str(site.get("python") or sys.executable)
    return ["srun", *sizes, *site.get("srun", []), *container, "bash", "-c", ON_EACH_NODE, python, *torchrun, *resume]


def address(node: str) -> str:
    """Where the other nodes reach `node`: the address by which Slurm itself does."""
    for word in slurm.ask("scontrol", "show", "node", "-o", node).split():
        if word.startswith("NodeAddr="):
            return word.removeprefix("NodeAddr=")
    return node


def free_port() -> int:
    """A port of this node, the first of the job, that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def do(run_dir: Path, run: dict, config: RunConfig, allocation: Allocation, command: list[str]) -> int:
    """Run `command`, pass requests to stop on, and set the status of the run. Returns the exit code of the job."""
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.append(number))
    (run_dir / "error.json").unlink(missing_ok=True)  # of the attempt that Slurm has requeued
    start(run_dir, run, config, allocation)
    with (run_dir / "console.log").open("ab") as console:
        step = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, cwd=ROOT,
            env=run_environment(config.cluster.device),
        )  # fmt: skip
    asked = False
    while (code := _wait(step)) is None:
        if signal.SIGUSR1 in signals and not asked:
            asked = True
            print("the time limit is near: asking the ranks to save a checkpoint", flush=True)
            _signal_ranks(allocation.job_id)
    status, message = record.outcome(run_dir, code)
    if status != "ok" and signals:
        status, message = stopped(run_dir, allocation.job_id, asked)
    record.set_status(run_dir, status, message)
    print(f"{run_dir}: {status} {message}", flush=True)
    return 0 if status == "ok" else 1


def start(run_dir: Path, run: dict, config: RunConfig, allocation: Allocation) -> None:
    """Write who does the run, where, and that it is running."""
    slurm.remember(run_dir, started_by=allocation.job_id)
    kept = {key: value for key, value in run.get("provenance", {}).items() if key in ("created", "entry", "num_ranks")}
    job = {"job_id": allocation.job_id, "restarts": allocation.restarts, "nodes": os.environ["SLURM_JOB_NODELIST"]}
    run["provenance"] = {**record.provenance(device=device_name(config.cluster)), **kept, "slurm": job}
    record.write_json(run_dir / "run.json", run)
    record.set_status(run_dir, "running")


def stopped(run_dir: Path, job_id: str, near_limit: bool) -> tuple[str, str]:
    """Status and message of a run that was asked to stop."""
    if near_limit:
        return "timeout", f"job {job_id} was near its time limit ({stopped_at(run_dir)}); go on with --resume"
    state, reason, code = slurm.state_of(job_id)  # Slurm writes down why before it signals
    if state in slurm.ENDS:
        return slurm.judge({"status": "running", "message": ""}, job_id, state, reason, code)
    return "failed", f"job {job_id} was told to stop ({stopped_at(run_dir)}); go on with --resume"


def _wait(step: subprocess.Popen) -> int | None:
    try:
        return step.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _signal_ranks(job_id: str) -> None:
    """SIGUSR1 to every process of the job's step on every node."""
    try:
        slurm.ask("scancel", "--signal=USR1", f"{job_id}.0")
    except ValueError as error:
        print(f"job: the ranks could not be told: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
