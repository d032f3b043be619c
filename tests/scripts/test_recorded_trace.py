"""The traces of the repository, and the figure that replays one."""

import dataclasses
from pathlib import Path

import pytest
from grid import Configs

from smartmoe.bench.replay import open_trace
from smartmoe.cli import read_config
from smartmoe.trace import ExpertTrace

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "moe_trace" / "gpt-l16-h768-naive-32experts.npz"


@pytest.mark.parametrize("path", sorted((ROOT / "moe_trace").glob("*.npz")), ids=lambda path: path.stem)
def test_a_trace_is_small_and_every_copy_is_counted(path):
    trace = ExpertTrace.load(path)
    copies = trace.counts.sum(-1)
    assert path.stat().st_size < 2e6 and (copies == copies.flat[0]).all()
    assert copies.flat[0] == trace.meta["tokens_per_micro_batch_and_rank"] * trace.meta["top_k"]


def test_the_recorded_trace_is_that_of_its_declaration():
    trace, config = ExpertTrace.load(RECORDED), read_config(ROOT / "moe_trace" / "gpt-l16-h768.toml", None)
    model, work = config.model, config.workload
    assert config.record_trace and config.gate.kind == trace.meta["gate"] == "naive" and config.gate.capacity is None
    assert trace.counts.shape == (work.iterations, 1, model.num_layers, config.num_micro_batches, model.num_experts)
    assert trace.iteration.tolist() == list(range(1, 1201))


@pytest.mark.parametrize("ranks", [2, 4])
def test_figure_13_replays_it_on_gpus(ranks):
    configs = Configs(ROOT / "scripts")
    cluster = dataclasses.replace(configs.clusters["local"], ranks_per_node=ranks)
    replays = configs.expand(["fig13"], "local", cluster)
    runs = [run for run in replays if (run.config.gate.trace or "").endswith(RECORDED.name)]
    assert [run.bars[0]["series"] for run in runs] == ["static", "every_100", "every_10", "history"]
    assert len({run.folder for run in runs}) == 4 and {run.entry for run in runs} == {"replay"}
    for run in runs:
        gate = dataclasses.replace(run.config.gate, trace=str(ROOT / run.config.gate.trace))
        config, trace = open_trace(dataclasses.replace(run.config, gate=gate), ROOT / "no-run")
        assert config.online.interval == run.config.online.interval and len(trace.iteration) == config.workload.iterations
