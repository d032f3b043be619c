"""Stands in for torchrun + an entry: `fake_entry.py RUN_DIR ..`; workload.seed of each run says how it behaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BEHAVIOUR = {
    1: "ok", 2: "fails", 3: "killed", 4: "hangs", 5: "oom", 6: "silent", 7: "family", 8: "rank killed", 9: "waits", 1001: "ok",
    1002: "ok", 1003: "quiet",
}  # fmt: skip

for run_dir in map(Path, sys.argv[1:]):
    config = json.loads((run_dir / "run.json").read_text())["config"]
    does = BEHAVIOUR[config["workload"]["seed"]]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 1, "step_ms": 5.0}) + "\n")
    if config["record_trace"]:
        (run_dir / "trace.npz").write_bytes(b"trace")
    (run_dir / "env.txt").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    (run_dir / "gpus.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    (run_dir / "world.txt").write_text(str(os.getpid()))
    if does in ("fails", "oom"):
        error = {"type": "ValueError", "message": "out of memory, it says", "rank": 2, "oom": does == "oom"}
        (run_dir / "error.json").write_text(json.dumps(error))
        sys.exit(1)
    if does == "quiet":
        sys.exit(7)
    if does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "silent":
        print("RuntimeError: something odd\n  exitcode  : -15 (pid: 76)\nRoot Cause:\n  exitcode  : 7 (pid: 77)\n")
        sys.exit(7)
    if does == "rank killed":
        print("  exitcode  : 1 (pid: 76)\nRoot Cause (first observed failure):\n  exitcode  : -9 (pid: 77)\n")
        sys.exit(1)
    if does == "family":  # like torchrun's workers: in a session of its own, and deaf to SIGTERM
        code = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
        )
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()
        (run_dir / "child.pid").write_text(str(child.pid))
    if does == "waits":  # for a run beside it that waits, too
        run_sets = run_dir.parents[2]
        end = time.monotonic() + 4
        while len(list(run_sets.glob("*/*/*/waits"))) < 2 and time.monotonic() < end:
            (run_dir / "waits").touch()
            time.sleep(0.05)
    if does in ("hangs", "family"):
        (run_dir / "fake.pid").write_text(str(os.getpid()))
        time.sleep(600)
    if len(sys.argv) > 2:  # as smartmoe.sequence
        (run_dir / "finished.json").write_text("{}")
if len(sys.argv) > 2:
    time.sleep(0.5)  # processes take a moment to leave
