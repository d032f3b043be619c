import itertools
import shutil
from pathlib import Path

import pytest
from grid import ENTRIES, Configs

from smartmoe.config import ClusterSpec, check

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CPU = ClusterSpec(ranks_per_node=4)

MODELS = "[tiny]\nnum_experts = 8\n"
GRID = """figure = "fig8"
[[grid]]
cluster = "cpu"
model = "tiny"
panel = "p"
group = "{ranks}/{capacity}"
gates = [{ kind = "gshard", capacity = 1.2 }, { kind = "naive" }]
[[grid.systems]]
system = "fastmoe"
[[grid.systems]]
system = "smartmoe_static"
plan = { pp = 2, dp = 2, ep = 2 }
gates = ["+inf"]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experiments").mkdir()
    shutil.copytree(SCRIPTS / "clusters", tmp_path / "clusters")
    (tmp_path / "models.toml").write_text(MODELS)
    (tmp_path / "experiments" / "fig8.toml").write_text(GRID)
    return tmp_path


def expand(folder, figures=("fig8",)):
    return Configs(folder).expand(list(figures), "cpu", CPU)


def test_grid_is_systems_times_gates_gate_by_gate(folder):
    runs = expand(folder)
    assert [(run.config.system, run.bars[0]["group"]) for run in runs] == [
        ("fastmoe", "4/1.2"), ("fastmoe", "4/+inf"), ("smartmoe_static", "4/+inf"),
    ]  # fmt: skip
    assert runs[0].config.plan.ep == 4 and runs[2].config.plan.pp == 2
    assert all(check(run.config) for run in runs) and len({run.folder for run in runs}) == 3


def test_a_machine_without_cores_is_refused(folder):
    for line in ("cores_per_rank = 0", "runs_per_world = 0"):
        (folder / "clusters" / "local.toml").write_text(f'device = "cuda"\n[machine]\n{line}\n')
        with pytest.raises(ValueError, match="local.toml: machine: runs_per_world and cores_per_rank must be at least 1"):
            Configs(folder)


def test_a_run_of_two_figures_is_done_once_and_keeps_its_home(folder):
    (folder / "experiments" / "fig10.toml").write_text(GRID.replace("fig8", "fig10").replace("smartmoe_static", "alpa"))
    both = expand(folder, ["fig8", "fig10"])
    assert [len(run.bars) for run in both] == [2, 2, 1, 1]
    alone = expand(folder, ["fig10"])
    assert [run.folder for run in alone] == [run.folder for run in both if run.bars[-1]["figure"] == "fig10"]
    assert alone[0].folder.parts[0] == "fig8" and [bar["figure"] for bar in alone[0].bars] == ["fig10"]


def test_repeats_are_runs_of_other_seeds_for_the_same_bar(folder):
    (folder / "experiments" / "fig8.toml").write_text(GRID.replace('panel', 'repeats = 3\npanel'))
    runs = expand(folder)
    assert len(runs) == 9 and len({run.folder for run in runs}) == 9
    assert [run.repeat for run in runs] == [1, 1, 1, 2, 2, 2, 3, 3, 3], "a run-set cut short has every bar"
    last = [run for run in runs if run.bars[0]["group"] == "4/+inf"]
    assert [(run.config.system, run.repeat) for run in last] == [
        (system, repeat) for repeat in (1, 2, 3) for system in ("fastmoe", "smartmoe_static")
    ]
    assert [run.config.workload.seed for run in last[::2]] == [1234, 1235, 1236]
    assert [run.run_id[-3:] for run in last[::2]] == ["ep4", "-r2", "-r3"] and last[0].bars == last[2].bars


def test_a_batch_may_grow_with_the_ranks(folder):
    experiment = folder / "experiments" / "fig8.toml"
    experiment.write_text(GRID.replace("panel", "samples_per_rank = 6\nworkload = { micro_batch_size = 2 }\npanel"))
    assert {run.config.workload.global_batch_size for run in expand(folder)} == {24}
    experiment.write_text(GRID.replace("panel", "samples_per_rank = 6\nworkload = { global_batch_size = 24 }\npanel"))
    with pytest.raises(ValueError, match="fig8.toml: grid 1: samples_per_rank"):
        expand(folder)


def test_runs_on_several_sizes(folder):
    text = GRID.replace('"cpu"', '"local"').replace("{ pp = 2, dp = 2, ep = 2 }", "{ dp = 0, ep = 0 }")
    (folder / "experiments" / "fig8.toml").write_text(text)
    (folder / "experiments" / "fig12.toml").write_text(text.replace("fig8", "fig12").replace("panel", "min_ranks = 2\npanel"))
    configs = Configs(folder)
    clusters = [ClusterSpec(name="local", device="cuda", ranks_per_node=size, memory_gbytes=139.0) for size in (2, 1)]
    runs, left_out = configs.expand_sizes(["fig8", "fig12"], "local", clusters)
    assert not left_out and [run.config.plan.world_size for run in runs] == [2] * 3 + [1] * 3
    assert {bar["figure"] for run in runs if run.config.plan.world_size == 1 for bar in run.bars} == {"fig8"}
    _, left_out = configs.expand_sizes(["fig8", "fig12"], "local", clusters[1:])
    assert list(left_out) == ["fig12"]


@pytest.mark.parametrize("num_ranks,pp", [(1, 1), (2, 1), (3, 3), (6, 3)])
def test_a_row_may_be_for_some_sizes_of_cluster(folder, num_ranks, pp):
    head, _, row = GRID.rpartition("[[grid.systems]]")
    rows = [row.replace("{ pp = 2, dp = 2, ep = 2 }", "{ dp = 0, ep = 0 }") + "max_ranks = 2\n",
            row.replace("{ pp = 2, dp = 2, ep = 2 }", "{ pp = 3, dp = 0, ep = 1 }") + "min_ranks = 3\n"]  # fmt: skip
    text = "[[grid.systems]]".join([head.partition("[[grid.systems]]")[0], *rows])
    text = text.replace("panel", "workload = { global_batch_size = 24, micro_batch_size = 2 }\npanel")
    (folder / "experiments" / "fig8.toml").write_text(text)
    (run,) = Configs(folder).expand(["fig8"], "cpu", ClusterSpec(ranks_per_node=num_ranks))
    assert run.config.plan.pp == pp and run.config.plan.world_size == num_ranks


def test_a_program_of_its_own_is_the_entry_of_its_runs(folder):
    (folder / "experiments" / "fig8.toml").write_text(GRID.replace('"fastmoe"', '"deepspeed"'))
    runs = expand(folder)
    assert [run.entry for run in runs] == ["deepspeed", "deepspeed", "train"]
    assert runs[0].config.workload.zero == 1 and set(ENTRIES) >= {run.entry for run in runs}


REPLAY = """figure = "fig13"
[[grid]]
cluster = "cpu"
entry = "replay"
model = "tiny"
panel = "p"
group = "g"
gates = [{ kind = "naive" }]
[[grid.systems]]
system = "smartmoe"
series = "every_10"
plan = { dp = 4, ep = 4 }
trace_from = "fig8/smartmoe_static"
"""


@pytest.mark.parametrize("entry", ["replay", "layer_accuracy"])
@pytest.mark.parametrize("figure", ["fig13", "fig7"])
def test_a_replay_brings_the_run_that_records_its_trace(folder, figure, entry):
    """The figure whose run records the trace may come later than the one that replays it."""
    path, text = folder / "experiments" / "fig8.toml", REPLAY.replace("fig13", figure).replace('"replay"', f'"{entry}"')
    (folder / "experiments" / f"{figure}.toml").write_text(text)
    with pytest.raises(ValueError, match="record_trace"):
        expand(folder, [figure])
    path.write_text(GRID + "record_trace = true\n")
    source, replay = expand(folder, [figure])
    assert [run.entry for run in (source, replay)] == ["train", entry]
    assert replay.needs is source and source.bars == [] and source.config.record_trace
    found = Path("/set", replay.folder, replay.config.gate.trace).resolve()
    assert replay.config.gate.kind == "trace" and found == Path("/set", source.folder, "trace.npz")


BROKEN = {
    "unknown key": (GRID.replace("panel", "pannel"), 'unknown key "pannel"; did you mean "panel"'),
    "unknown top key": ("extra = 1\n" + GRID, 'unknown key "extra"'),
    "unknown model": (GRID.replace('"tiny"', '"tinny"'), 'unknown model "tinny"; did you mean "tiny"'),
    "unknown system": (GRID.replace('"fastmoe"', '"fastmoo"'), 'unknown system "fastmoo"'),
    "no system": (GRID.replace('system = "fastmoe"', 'series = "x"'), 'needs system = "NAME"'),
    "plan does not fit": (GRID.replace("pp = 2", "pp = 3"), "grid 1: .*6 ranks"),
    "plan missing": (GRID.replace("plan = { pp = 2, dp = 2, ep = 2 }", ""), "needs a plan"),
    "plan key": (GRID.replace("pp = 2", "ppp = 2"), 'plan: unknown key "ppp"'),
    "gate key": (GRID.replace("capacity = 1.2", "cap = 1.2"), 'gates: unknown key "cap"'),
    "gate subset": (GRID.replace('["+inf"]', '["3.6"]'), "no capacity 3.6"),
    "no gates": (GRID.replace("gates = [{", "# gates = [{"), "needs gates"),
    "entry": (GRID.replace("panel", 'entry = "rm -rf"\npanel'), "entry"),
    "template": (GRID.replace("{capacity}", "{panel.__class__}"), "only {ranks}, {gpus} and {capacity}"),
    "name of the figure": (GRID.replace('"fig8"', '"fig10"'), "must be the name of the file"),
    "nothing": ('figure = "fig8"\n', "give a .*waits_for"),
    "not toml": ("figure = ", "fig8.toml: cannot read"),
    "repeats": (GRID.replace("panel", "repeats = 0\npanel"), "repeats = 0 must be"),
    "repeated trace": (
        GRID.replace("panel", "repeats = 2\npanel").replace('gates = ["+inf"]', "record_trace = true"), "without traces",
    ),
    "host's limits": (GRID.replace('"fastmoe"', '"deepspeed"').replace('"gshard"', '"swipe"'), "cannot do this run"),
    "host's entry": (GRID.replace('"fastmoe"', '"deepspeed"').replace("panel", 'entry = "replay"\npanel'), "no entry"),
    "same bar twice": (GRID.replace('gates = ["+inf"]', 'series = "fastmoe"'), "same bar"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_declarations_name_the_file_and_the_fault(folder, kind):
    text, message = BROKEN[kind]
    (folder / "experiments" / "fig8.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        expand(folder)
    assert kind == "same bar twice" or "fig8.toml" in str(error.value)


def test_hostile_names_stay_inside_the_run_set(folder):
    text = GRID.replace('system = "fastmoe"', 'system = "fastmoe"\nseries = "../../$(reboot); x"')
    (folder / "experiments" / "fig8.toml").write_text(text)
    for run in expand(folder):
        assert len(run.folder.parts) == 3 and ".." not in run.folder.parts and "$" not in str(run.folder)


def test_select_and_left_out(folder):
    (folder / "experiments" / "fig10.toml").write_text('figure = "fig10"\nwaits_for = "a profile"\n')
    configs = Configs(folder)
    assert configs.select([]) == ["fig8", "fig10"] == configs.select(["10", "fig8"])
    with pytest.raises(ValueError, match="unknown figure fig7; there are: 8 10"):
        configs.select(["7"])
    assert configs.left_out(["fig8", "fig10"], "cpu", CPU) == {"fig10": "a profile"}
    assert (
        "no grid for cluster local with 3 ranks"
        in configs.left_out(["fig8"], "local", ClusterSpec(name="local", ranks_per_node=3))["fig8"]
    )


def test_the_declarations_of_the_repository_expand():
    configs = Configs(SCRIPTS)
    figures = [f for f in configs.select([]) if f not in configs.left_out(configs.select([]), "cpu", CPU)]
    assert figures == ["fig8", "fig9", "fig10", "fig11", "fig12", "fig13"]
    runs = configs.expand(figures, "cpu", configs.clusters["cpu"])
    assert sum(run.estimate_s for run in runs) < 15 * 60
    (layers,) = (run for run in runs if run.entry == "layer_accuracy")
    assert layers.needs.config.record_trace and runs.index(layers.needs) < runs.index(layers)
    assert layers.estimate_s <= 40 and layers.bars[0]["figure"] == "fig11"
    groups = {bar["group"] for run in runs for bar in run.bars if bar["figure"] == "fig8"}
    assert groups == {"4/1.2", "4/2.4", "4/4.8", "4/+inf"}


@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_the_declared_experiments_fit_any_number_of_gpus_of_one_machine(num_gpus):
    configs = Configs(SCRIPTS)
    cluster = ClusterSpec(name="local", device="cuda", ranks_per_node=num_gpus, memory_gbytes=139.0)
    figures = configs.select([])
    left_out = configs.left_out(figures, "local", cluster)
    assert set(left_out) == ({"fig10", "fig11", "fig12", "fig13"} if num_gpus == 1 else set())
    runs = configs.expand([figure for figure in figures if figure not in left_out], "local", cluster)
    for run in runs:
        check(run.config)
    places = [(bar["group"], bar["series"]) for run in runs for bar in run.bars if bar["figure"] == "fig8"]
    systems = ("fastmoe", "deepspeed", "tutel", "fastermoe", "megatron", "smartmoe_static")
    capacities = [f"{num_gpus}/{capacity}" for capacity in ("1.2", "2.4", "4.8", "+inf")]
    bars = [*itertools.product(capacities, systems), *([(capacities[-1], "smartmoe")] if num_gpus > 1 else [])]
    assert sorted(places) == sorted(3 * bars), "three runs of each bar"
    swins = sorted((bar["group"], bar["series"]) for run in runs for bar in run.bars if bar["figure"] == "fig9")
    assert swins == sorted(3 * [*itertools.product(capacities[2:], ("fastmoe", "smartmoe_static", "tutel"))])
    if num_gpus > 1:  # names that rows of another figure do not change: --resume finds runs by them
        statics = [run.run_id for run in runs if run.home == "fig13" and run.config.system == "smartmoe_static"]
        assert len(statics) == 2 and statics[1] == f"{statics[0]}-2"


def test_the_papers_run_set_is_declared_for_its_cluster():
    """16 V100 on two nodes: sizes of the artifact's scripts, jobs that any site can submit."""
    configs = Configs(SCRIPTS)
    cluster, site = configs.clusters["v100x16"], configs.sites["v100x16"]
    figures = configs.select([])
    assert not configs.left_out(figures, "v100x16", cluster)
    runs = configs.expand(figures, "v100x16", cluster)
    for run in runs:
        check(run.config)
        model, work = run.config.model, run.config.workload
        if model.swin is not None:
            assert (model.name, work.global_batch_size, work.micro_batch_size, run.home) == ("swin-moe-b", 4096, 16, "fig9")
            assert run.config.plan.ep == (8 if run.config.system == "smartmoe_static" else 16) and work.dtype == "float16"
            continue
        assert (model.num_layers, model.hidden_size, model.num_experts, model.vocab_size) == (16, 1536, 32, 50304)
        assert work.global_batch_size == 256 and work.dtype == "float16" and run.config.plan.world_size == 16
        assert run.estimate_s < run.timeout_s
    bars = {(bar["figure"], bar["group"], bar["series"]) for run in runs for bar in run.bars}
    for capacity in ("1.2", "2.4", "4.8", "+inf"):
        group = f"16/{capacity}"
        series = {bar[2] for bar in bars if bar[:2] == ("fig8", group)}
        assert series >= {"fastmoe", "deepspeed", "deepspeed_artifact", "fastermoe", "smartmoe_static"}
    assert {bar[2] for bar in bars if bar[0] == "fig12"} == {"static", "dynamic", "history"}
    assert "--gres=gpu:8" in site.job_options(cluster, 60.0) and "--nodes=2" in site.job_options(cluster, 60.0)
