"""Jobs on an emulated Slurm cluster of four nodes: how runs end, and that --resume completes them and repeats nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
from slurm_cluster import SlurmCluster, why_not

from smartmoe import record

HERE = Path(__file__).resolve().parent
WAIT_S = 120  # on a machine that is busy otherwise
ROOT = HERE.parents[1]
MODEL = """[tiny]
num_layers = 2
hidden_size = 32
ffn_size = 32
num_heads = 2
seq_len = 32
vocab_size = 512
num_experts = 8
"""
CLUSTER = """device = "{device}"
num_nodes = {nodes}
ranks_per_node = {ranks}
[slurm]
grids = "cpu"
poll_s = 0.3
warn_s = 35
{more}
"""
FIGURE = """figure = "fig8"
[[grid]]
cluster = "cpu"
model = "tiny"
panel = "emulated"
group = "{ranks}/{capacity}"
timeout_s = 65
workload = { global_batch_size = 8, iterations = 8, warmup_iterations = 1, checkpoint_interval = 1, data = ["{data}"] }
gates = [{ kind = "naive" }]
[[grid.systems]]
system = "fastmoe"
[[grid.systems]]
system = "smartmoe_static"
plan = { pp = 2, dp = 0, ep = 1 }
"""
ON_FIRST = f'python = "{HERE / "fake_python"}"\npartition = "left"\ntime_min = 3'
FAKE = """[[grid]]
cluster = "cpu"
model = "tiny"
panel = "seed {seed}"
group = "g"
timeout_s = 5
workload = {{ seed = {seed}, iterations = 6, data = ["{{data}}"] }}
gates = [{{ kind = "naive" }}]
[[grid.systems]]
system = "fastmoe"
"""
REPLAY = """[[grid]]
cluster = "cpu"
entry = "replay"
model = "tiny"
panel = "replay"
group = "g"
timeout_s = 5
workload = { iterations = 6, data = ["{data}"] }
gates = [{ kind = "naive" }]
[[grid.systems]]
system = "smartmoe"
plan = { dp = 4, ep = 4 }
trace_from = "fig8/fastmoe"
"""


def fake(seed):
    return FAKE.format(seed=seed)


def fakes(*seeds):
    return 'figure = "fig8"\n' + "".join(map(fake, seeds))


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with SlurmCluster(num_nodes=4, cpus=16) as running:
        yield running


@pytest.fixture(scope="module")
def declare(tmp_path_factory):
    """Write an experiment for a cluster of jobs, and return the launcher's arguments and the run-set's folder."""

    def write(name, figure, more="", device="cpu", nodes=2, ranks=2):
        folder = tmp_path_factory.mktemp(name)
        for part in ("experiments", "clusters"):
            (folder / part).mkdir()
        (folder / "models.toml").write_text(MODEL)
        table = CLUSTER.format(device=device, nodes=nodes, ranks=ranks, more=more)
        (folder / "clusters" / "jobs.toml").write_text(table)
        (folder / "text").write_text("One token is like another, until an expert sees it. " * 400)
        (folder / "experiments" / "fig8.toml").write_text(figure.replace("{data}", str(folder / "text")))
        out = folder / "out"
        return ["--configs", str(folder), "--out", str(out), "--cluster", "jobs"], out

    return write


def start(cluster, arguments):
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), *arguments]
    return subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout_s=240):
    text, _ = process.communicate(timeout=timeout_s)
    return process.returncode, text


def launch(cluster, arguments):
    return finish(start(cluster, arguments))


def runs_of(out):
    """Run directories by the seed of their run, those of replays and of the real trainer by their system."""
    found = {}
    for path in out.glob("logs/*/*/*/run.json"):
        run = json.loads(path.read_text())
        seed = run["config"]["workload"]["seed"]
        found[seed if seed in range(1, 10) else run["system"]] = path.parent
    return found


def status(folder):
    run = record.read_run(folder)
    return run["status"], run["message"]


def attempts(folder):
    path = folder / "attempts.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def job_of(folder):
    return str(slurm.recall(folder)["job_id"])


def wait_for(condition, process=None, timeout_s=WAIT_S):
    end = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        if time.monotonic() > end:
            if process is not None:
                process.terminate()
            pytest.fail("waited in vain\n" + (process.communicate(timeout=30)[0] if process is not None else ""))
        time.sleep(0.1)


@pytest.fixture(scope="module")
def ends(cluster, declare):
    """Runs that end in every way, left to Slurm by Ctrl-C and followed again: (second launcher, arguments, run-set, text of
    the first launcher). Two of them run into their time limits, which takes half a minute: other tests use that."""
    grids = fakes(2).replace('"fastmoe"', '"fastmoe"\nrecord_trace = true') + REPLAY + "".join(map(fake, (1, 3, 4, 5, 6)))
    arguments, out = declare("ends", grids, ON_FIRST)
    first = start(cluster, arguments)
    wait_for(lambda: len(runs_of(out)) == 7 and all(attempts(runs_of(out)[seed]) for seed in range(1, 7)), first)
    wait_for(lambda: status(runs_of(out)[1])[0] == "ok" and status(runs_of(out)["smartmoe"])[0] == "skipped", first)
    first.send_signal(signal.SIGINT)
    code, text = finish(first)
    assert code == 130, text
    assert "RUNNING" in text
    folders = runs_of(out)
    queued = cluster.ask("squeue", "-h", "-o", "%i").split()
    assert {job_of(folders[seed]) for seed in (3, 4, 5, 6)} < set(queued), "Ctrl-C leaves the jobs"
    second = start(cluster, [*arguments, "--resume"])
    wait_for(lambda: len(attempts(folders[2])) == 2, second)
    cluster.ask("scancel", job_of(folders[3]))
    cluster.ask("scontrol", "requeue", job_of(folders[6]))
    # The controller looks at time limits every 30 s; 35 s before one it sends the warning.
    cluster.ask("scontrol", "update", f"JobId={job_of(folders[4])}", f"EndTime={in_seconds(36)}")
    cluster.ask("scontrol", "update", f"JobId={job_of(folders[5])}", f"EndTime={in_seconds(1)}")
    yield second, arguments, out, text
    if second.poll() is None:
        second.terminate()
        second.communicate()


def in_seconds(seconds):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))


def test_ctrl_c_says_how_to_follow_and_how_to_cancel(ends):
    _, _, out, text = ends
    named = [line.split("scancel ")[1].split() for line in text.splitlines() if "scancel " in line]
    # A job that ended a moment before may be named as well.
    assert len(named) == 1 and {job_of(runs_of(out)[seed]) for seed in (3, 4, 5, 6)} <= set(named[0]), text
    assert "squeue --jobs=" in text and "--resume" in text and "Traceback" not in text


def test_a_node_that_dies_costs_no_work_and_the_figure_is_drawn(cluster, ends, declare):
    arguments, out = declare("real", FIGURE, 'partition = "right"')
    process = start(cluster, [*arguments, "--max-jobs", "1"])
    metrics = lambda: runs_of(out)["fastmoe"] / "metrics.jsonl"  # noqa: E731
    wait_for(lambda: runs_of(out) and metrics().exists() and len(metrics().read_text().splitlines()) >= 3, process)
    before = metrics().read_text().splitlines()
    assert len(cluster.ask("squeue", "-h", "-p", "right").splitlines()) == 1, "--max-jobs 1"
    cluster.kill_node("n4")
    needs_four, _ = declare("four", FIGURE, nodes=4, ranks=1)
    code, text = launch(cluster, needs_four)
    assert code == 2 and "a job needs 4 nodes" in text and "n4 is down (killed)" in text, text
    cluster.start_node("n4")
    code, text = finish(process)
    restarts = record.read_run(runs_of(out)["fastmoe"])["provenance"]["slurm"]["restarts"]  # of the job that lost its node
    if code == 1 and "SIGABRT" in text and len(metrics().read_text().splitlines()) == 8:
        # gloo's threads abort one run in some tens as it leaves, after its last iteration and checkpoint
        code, text = launch(cluster, [*arguments, "--resume"])
    assert code == 0, text
    run = record.read_run(runs_of(out)["fastmoe"])
    assert run["status"] == "ok" and restarts == 1
    assert run["provenance"]["slurm"]["nodes"] == "n[3-4]" and run["provenance"]["num_ranks"] == 4
    iterations = [json.loads(line)["iteration"] for line in metrics().read_text().splitlines()]
    assert iterations == list(range(1, run["config"]["workload"]["iterations"] + 1))
    assert metrics().read_text().splitlines()[:2] == before[:2], "the requeued job went on from its checkpoint"
    assert (out / "fig8.pdf").exists() and (out / "plot.log").exists()
    values = json.loads((out / "values.json").read_text())
    assert "fastmoe" in json.dumps(values)


def test_every_end_has_its_status_and_resume_completes_the_figure(cluster, ends):
    second, arguments, out, _ = ends
    code, text = finish(second)
    folders = runs_of(out)
    assert code == 1, text
    assert "4 runs have a job already" in text and "1 of 7 runs are done already" in text
    found = {key: status(folder) for key, folder in folders.items()}
    assert {key: one[0] for key, one in found.items()} == {
        1: "ok", 2: "ok", 3: "failed", 4: "timeout", 5: "timeout", 6: "ok", "smartmoe": "ok",
    }, text  # fmt: skip
    assert "was cancelled" in found[3][1] and "near its time limit" in found[4][1]
    assert "reached its time limit (Slurm: TIMEOUT)" in found[5][1]
    code, text = launch(cluster, [*arguments, "--resume"])
    assert code == 0, text
    assert {status(folder)[0] for folder in folders.values()} == {"ok"}
    assert {key: len(attempts(folder)) for key, folder in folders.items()} == {
        1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, "smartmoe": 1,
    }  # fmt: skip
    assert attempts(folders[4])[1][-1] == "continued" and attempts(folders[3])[1][-1] == "anew"
    assert attempts(folders[1])[0][1:4] == ["2", "2", "127.0.0.1"]
    assert (out / "fig8.pdf").exists()


def test_a_full_queue_is_waited_for_while_jobs_run_and_a_job_works_alone(cluster, declare, tmp_path):
    arguments, out = declare("full", fakes(3, 1), ON_FIRST)
    cluster.limit_submissions(0)
    try:
        code, text = launch(cluster, arguments)
        assert code == 2 and "job submit limit" in text and "nothing was submitted" in text, text
        cluster.limit_submissions(2)  # one is Slurm's own look at a job
        process = start(cluster, [*arguments, "--resume"])
        wait_for(lambda: len(attempts(runs_of(out)[3])) == 1, process)
        time.sleep(0.5)
        assert not attempts(runs_of(out)[1]) and status(runs_of(out)[1])[0] == "pending"
    finally:
        cluster.limit_submissions(None)
    wait_for(lambda: status(runs_of(out)[1])[0] == "ok", process)
    cluster.ask("scancel", job_of(runs_of(out)[3]))
    code, text = finish(process)
    assert code == 1 and "the queue is full" in text and "was cancelled" in text, text
    run_dir = runs_of(out)[1]
    options = ["--parsable", f"--chdir={ROOT}", f"--output={tmp_path}/%j.out", "--partition=left", "--nodes=2"]
    alone = ["sbatch", *options, str(ROOT / "scripts" / "job.sbatch"), str(run_dir)]
    job = cluster.ask(*alone).strip()
    wait_for(lambda: slurm.OWN_ENDS[0] in cluster.ask("scontrol", "show", "job", job))
    assert "is done already" in (tmp_path / f"{job}.out").read_text()
    assert [len(attempts(folder)) for folder in runs_of(out).values()] == [1, 1], "nothing is run twice"
    record.set_status(run_dir, "failed", "as if")
    cluster.ask(*alone)
    wait_for(lambda: status(run_dir) == ("ok", ""))
    assert len(attempts(run_dir)) == 2


REFUSED = {
    "partition": ({"more": 'partition = "nosuch"'}, 'no partition "nosuch"; there are: left, main, right, shut'),
    "closed partition": ({"more": 'partition = "shut"'}, "partition shut is down"),
    "time": ({"more": "time_min = 90"}, "lets jobs run 60 minutes, the runs ask for 90"),
    "GPUs": ({"device": "cuda"}, "4 nodes with 1 GPUs and 1 CPUs each, but partition main has 0 (n1 has 0 GPUs;"),
    "node too small": ({"more": "cpus_per_rank = 64"}, "(n1 has 16 CPUs;"),
    "else": ({"more": 'sbatch = ["--constraint=nosuch"]'}, "Slurm would refuse the jobs"),
    "key": ({"more": 'partitoin = "main"'}, 'did you mean "partition"'),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_run_is_said_at_once_and_nothing_is_submitted(cluster, declare, why):
    changes, words = REFUSED[why]
    arguments, out = declare("refused", FIGURE, **{"nodes": 4, "ranks": 1, **changes})
    code, text = launch(cluster, arguments)
    assert (code, words in text) == (2, True), text
    assert not out.exists() and not cluster.ask("squeue", "-h", "-p", "main")
