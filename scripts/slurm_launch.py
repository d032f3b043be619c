"""Do runs on a Slurm cluster: a job for each, followed until the last has ended or the user leaves them to Slurm."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import slurm
from grid import Run
from runner import Interrupted, Launcher, last_metric, summary
from slurm import Job, QueueFull, Site

from smartmoe import record

PATIENCE_S = 600.0  # how long the controller may be silent before following is given up


@dataclass
class Campaign:
    """The jobs of one run-set. `again` is the command line that follows or completes it later."""

    launcher: Launcher
    site: Site
    out: Path
    runs: list[Run]
    max_jobs: int
    again: str
    job_of: dict[str, str] = field(default_factory=dict)  # key of a run -> its job's id
    ended: dict[str, str] = field(default_factory=dict)  # key of a run -> its final status
    waiting: list[Run] = field(default_factory=list)  # have no job yet
    shown: dict[str, str] = field(default_factory=dict)
    refusal: str = ""  # why the queue took no more jobs, "" when it does
    plot_job: str = ""
    silent_since: float = 0.0

    def directory(self, run: Run) -> Path:
        return self.launcher.root / run.folder

    def do(self) -> int:
        """Submit what is to be done, follow it, and return the exit code. Raises Interrupted when the user leaves, and
        ValueError when nothing could be submitted."""
        self.adopt(slurm.queue())
        self.say_plan()
        while True:
            queued = self.look()
            if queued is not None:
                self.settle(queued)
                self.feed(queued)
                self.plot(queued)
                self.show(queued)
                if not self.waiting and len(self.ended) == len(self.runs) and not self.is_plotting(queued):
                    break
                if self.refusal and not self.active():
                    words = f"the queue takes no jobs now: {self.refusal}; {len(self.waiting)} runs have none"
                    if not self.job_of:
                        raise ValueError(f"{words}; nothing was submitted; later: {self.again}")
                    print(f"{words}; later: {self.again}")
                    return 1
            time.sleep(self.site.poll_s)
        return self.report()

    def adopt(self, queued: dict[str, Job]) -> None:
        """Sort the runs: done, in the queue already (nothing is run twice), or to be submitted. Ends what earlier jobs could
        not write down themselves. Raises ValueError when a job of another config is at work on a run."""
        for run in self.runs:
            run_dir = self.directory(run)
            facts = slurm.recall(run_dir)
            job = queued.get(slurm.job_name(run_dir))
            if job is None and (self.launcher.existing(run) or {}).get("status") in ("running", "pending", "failed"):
                started = str(facts.get("started_by") or facts.get("job_id") or "")
                alive = started and slurm.settle(run_dir, started) is None
                job = Job(started, "", "", "", "") if alive else None
            if job is not None:
                if self.launcher.existing(run) is None:
                    raise ValueError(f"job {job.job_id} is at work on {run_dir} with another config: scancel {job.job_id}")
                self.job_of[run.key] = job.job_id
            elif self.launcher.needs_running(run):
                self.waiting.append(run)
                self.launcher.declare(run)
                write_site(run_dir, self.site)
            else:
                self.ended[run.key] = "ok"
                self.launcher.keep(run)
        write_site(self.out, self.site)
        if old := queued.get(self.plot_name):  # it waits for earlier jobs only
            slurm.ask("scancel", old.job_id)

    def say_plan(self) -> None:
        done, there = len(self.ended), len(self.job_of)
        if done:
            print(f"{done} of {len(self.runs)} runs are done already")
        if there:
            print(f"{there} runs have a job already: {' '.join(self.job_of.values())}")
        print(f"{len(self.waiting)} runs to submit, in {self.launcher.root}", flush=True)

    @property
    def plot_name(self) -> str:
        return f"plot.{slurm.job_name(self.out)}"

    def active(self) -> dict[str, str]:
        """Key of a run -> job, of the jobs that have not ended."""
        return {key: job for key, job in self.job_of.items() if key not in self.ended}

    def look(self) -> dict[str, Job] | None:
        """The queue, or None while the controller does not answer. Raises ValueError when that lasts."""
        try:
            queued = slurm.queue()
        except ValueError as error:
            self.silent_since = self.silent_since or time.monotonic()
            if time.monotonic() - self.silent_since > PATIENCE_S:
                raise ValueError(f"{error}; the jobs are not touched; later: {self.again}") from None
            return None
        self.silent_since = 0.0
        return queued

    def settle(self, queued: dict[str, Job]) -> None:
        """Take up the ends of jobs that have left the queue."""
        waiting_ids = {job.job_id for job in queued.values()}
        for run in self.runs:
            job_id = self.active().get(run.key)
            if job_id is None or job_id in waiting_ids:
                continue
            ended = slurm.settle(self.directory(run), job_id)
            if ended is not None:
                self.end(run, ended["status"], ended["message"], f"job {job_id}")

    def end(self, run: Run, status: str, message: str, by: str) -> None:
        self.ended[run.key] = status
        more = summary(self.directory(run), run) if status == "ok" else f": {message}"
        clear_table(self.shown)
        place = self.runs.index(run) + 1
        print(f"[{place}/{len(self.runs)}] {run.folder} {by} {status}{more}", flush=True)

    def feed(self, queued: dict[str, Job]) -> None:
        """Submit runs while there is room, in order. A replay waits in the queue for the run whose trace it needs."""
        was_full, self.refusal = bool(self.refusal), ""
        for run in list(self.waiting):
            source = run.needs
            if source and self.ended.get(source.key, "ok") != "ok":
                message = f"needs the trace of {source.folder}, which did not end well"
                record.set_status(self.directory(run), "skipped", message)
                self.waiting.remove(run)
                self.end(run, "skipped", message, "")
                continue
            if self.max_jobs and len(self.active()) >= self.max_jobs:
                return
            try:
                self.job_of[run.key] = self.submit(run)
            except QueueFull as error:
                self.refusal = str(error)
                if not was_full and self.active():
                    clear_table(self.shown)
                    print(f"the queue is full: {error}; the next jobs follow when some have ended", flush=True)
                return
            self.waiting.remove(run)

    def submit(self, run: Run) -> str:
        """Submit the job of `run` and return its id. Raises QueueFull, or ValueError when Slurm refuses it for good."""
        run_dir, options = self.directory(run), self.site.job_options(run.config.cluster, run.timeout_s)
        source = self.active().get(run.needs.key) if run.needs else None
        after = f"afterok:{source}" if source else ""
        job_id = slurm.submit("job.sbatch", run_dir, slurm.job_name(run_dir), run_dir / "job.log", options, after)
        slurm.remember(run_dir, job_id=job_id)
        return job_id

    def plot(self, queued: dict[str, Job], leaving: bool = False) -> None:
        """Once all runs have jobs (or the user leaves): a job that draws the figures when the last of them has ended."""
        jobs = list(self.active().values())
        if self.plot_job or not jobs or (self.waiting and not leaving):
            return
        after, options = "afterany:" + ":".join(jobs), self.site.options()
        try:
            self.plot_job = slurm.submit("plot.sbatch", self.out, self.plot_name, self.out / "plot.log", options, after)
        except QueueFull:
            return  # tried again at the next look; without it the launcher's caller draws

    def is_plotting(self, queued: dict[str, Job]) -> bool:
        return self.plot_name in queued

    def show(self, queued: dict[str, Job]) -> None:
        """The live table on a terminal; elsewhere a line for each change."""
        rows = []
        for run in self.runs:
            if run.key in self.ended:
                continue
            job_id = self.job_of.get(run.key, "-")
            job = next((job for job in queued.values() if job.job_id == job_id), None)
            state = job.state if job else ("not submitted" if job_id == "-" else "ending")
            rows.append((run, job_id, state, job))
        if sys.stdout.isatty():
            self.draw(rows)
            return
        for run, job_id, state, job in rows:
            why = f" ({job.reason})" if job and job.reason else ""
            line = f"{run.folder} job {job_id} {state}{why}"
            if job and self.shown.get(run.key) != line:
                print(line, flush=True)
            self.shown[run.key] = line

    def draw(self, rows: list[tuple[Run, str, str, Job | None]]) -> None:
        columns, lines_left = shutil.get_terminal_size()
        states = [state.lower() for _, _, state, _ in rows]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        table = [f"{len(self.ended)} of {len(self.runs)} ended{', ' if counts else ''}{counts}"]
        for run, job_id, state, job in rows[: max(1, lines_left - 4)]:
            last = last_metric(self.directory(run)) if state == "RUNNING" else {}
            done = f"{last['iteration']}/{run.config.workload.iterations}" if "iteration" in last else ""
            loss = f"loss {last['lm_loss']:.3f}" if last.get("lm_loss") else ""
            place = (job.nodes or job.reason) if job else ""
            table.append(f"{job_id:>8} {state:<13} {job.elapsed if job else '':>9} {done:>9} {loss:<11} {run.folder}  {place}")
        clear_table(self.shown)
        print("\n".join(line[: columns - 1] for line in table), flush=True)
        self.shown["table"] = str(len(table))

    def leave(self) -> None:
        """The user goes: the jobs stay. Say how to follow or cancel them."""
        clear_table(self.shown)
        try:
            self.plot({}, leaving=True)
        except ValueError as error:
            print(f"no job will draw the figures: {error}", file=sys.stderr)
        jobs = [*self.active().values(), *([self.plot_job] if self.plot_job else [])]
        if jobs:
            print(f"{len(jobs)} jobs stay in the queue\n  see them:    squeue --jobs={','.join(jobs)}", file=sys.stderr)
            print(f"  cancel them: scancel {' '.join(jobs)}", file=sys.stderr)
        if self.plot_job:
            print(f"  figures:     job {self.plot_job} draws them when the others have ended", file=sys.stderr)
        if self.waiting:
            print(f"{len(self.waiting)} runs have no job yet", file=sys.stderr)
        print(f"  go on:       {self.again}", file=sys.stderr)

    def report(self) -> int:
        bad = [run for run in self.runs if self.ended[run.key] != "ok"]
        if bad:
            names = ", ".join(str(run.folder) for run in bad)
            print(f"{len(bad)} of {len(self.runs)} runs did not end well: {names}\nagain: {self.again}")
        return 1 if bad else 0


def write_site(folder: Path, site: Site) -> None:
    """Put what the site needs before Python starts into `folder`/site.sh, and what the job needs beside it."""
    python = site.python or sys.executable
    lines = ["# from the cluster's file", *site.setup, f"PY={shlex.quote(sys.executable)}"]
    (folder / "site.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
    slurm.remember(folder, job_id="", started_by="", python=python, container=list(site.container), srun=list(site.srun))


def clear_table(shown: dict[str, str]) -> None:
    """Take the table off the terminal, so that a line can be printed in its place."""
    if lines := shown.pop("table", ""):
        print(f"\033[{lines}A\033[J", end="")


def do_all(campaign: Campaign) -> int:
    """Do all runs; returns the exit code. Interrupted by the user it leaves the jobs to Slurm and raises Interrupted."""
    try:
        return campaign.do()
    except Interrupted:
        campaign.leave()
        raise
