import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartmoe import trace as tr
from smartmoe.trace import ExpertTrace, read_trace, synthetic
from smartmoe.trace_synthetic import SKEWS

TRACE = Path(__file__).resolve().parents[1] / ".." / "shared" / "published" / "trace"
needs_published = pytest.mark.skipif(not TRACE.is_dir(), reason="the published trace (../shared) is not here")
SIZES = {"num_iterations": 4, "num_ranks": 2, "num_layers": 3, "num_micro_batches": 2}
SIZES |= {"num_experts": 8, "num_copies": 96}


def equal(a, b):
    same = np.array_equal(a.counts, b.counts) and np.array_equal(a.iteration, b.iteration)
    return same and a.counts.dtype == b.counts.dtype == np.int32


@pytest.fixture(scope="module")
def published():
    return ExpertTrace.load(TRACE / "moe_trace_it0001_2491.npz")


# ---------------------------------------------------------------------------------------------------------- npz


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 3)] * 5), st.integers(0, 2**31 - 1))
def test_save_and_load(tmp_path_factory, shape, largest):
    counts = np.random.default_rng(0).integers(0, largest + 1, shape)
    trace = ExpertTrace(counts, np.arange(shape[0]) * 10 + 1, {"gate": "naive", "nested": [1, None, "x"]})
    path = tmp_path_factory.mktemp("trace") / "a.npz"
    trace.save(path)
    again = ExpertTrace.load(path)
    assert equal(trace, again) and again.meta == trace.meta and again.iteration.dtype == np.int64
    assert [each.name for each in path.parent.iterdir()] == ["a.npz"]
    again.counts[...] = 0  # writable, so that torch may take it without a copy


def test_plain_npz_without_meta_and_with_two_dimensions(tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((3, 4), ">i2"), iteration=np.array([1, 11, 21], np.int32))
    trace = ExpertTrace.load(tmp_path / "a.npz")
    assert trace.counts.shape == (3, 1, 1, 1, 4) and trace.counts.dtype == np.int32 and trace.meta == {}
    np.savez(tmp_path / "b.npz", counts=np.asfortranarray(np.arange(16).reshape(2, 1, 2, 2, 2)), iteration=[5, 6])
    assert ExpertTrace.load(tmp_path / "b.npz").counts[1, 0, 0, 1].tolist() == [10, 11]


GOOD = {"counts": np.ones((2, 1, 1, 1, 4), np.int32), "iteration": np.array([1, 2])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": None}, 'no array "counts"'),
        ({"iteration": None}, 'no array "iteration"'),
        ({"counts": np.ones((2, 4, 3), np.int32)}, r"shape \(2, 4, 3\)"),
        ({"counts": np.ones((2, 0, 1, 1, 4), np.int32)}, "shape"),
        ({"counts": np.ones((2, 1, 1, 1, 4))}, "dtype float64"),
        ({"counts": np.full((2, 1, 1, 1, 4), -1)}, "0 .. 2"),
        ({"counts": np.full((2, 1, 1, 1, 4), 2**31)}, "0 .. 2"),
        ({"counts": np.array([{"an": "object"}], dtype=object)}, "dtype object"),
        ({"iteration": np.array([1, 2, 3])}, "3 iteration numbers for 2"),
        ({"iteration": np.array([2, 2])}, "rise strictly"),
        ({"iteration": np.array([1, 2**64 - 1], np.uint64)}, "rise strictly"),
        ({"iteration": np.array([1.0, 2.0])}, "dtype float64"),
        ({"meta": np.frombuffer(b"[1]", np.uint8)}, "meta must be a dict"),
        ({"meta": np.frombuffer(b"{", np.uint8)}, "not a valid trace"),
        ({"meta": np.frombuffer(b"[" * 100_000, np.uint8)}, "cannot read"),
        ({"meta": np.frombuffer(b"\xff", np.uint8)}, "not a valid trace"),
    ],
)
def test_malformed_npz_is_refused(tmp_path, change, message):
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        ExpertTrace.load(path)
    assert str(path) in str(error.value)


def npy_bytes(header, data=b""):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + data


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy_bytes({"descr": "<i4", "fortran_order": False, "shape": (1 << 40, 4)}), "declares int32 of shape"),
        (npy_bytes({"descr": "<i4", "fortran_order": False, "shape": (-2, -2)}, b"\0" * 16), "not a valid trace"),
        (npy_bytes({"descr": "|O", "fortran_order": False, "shape": (1,)}, b"cos\nsystem\n."), "dtype object"),
        (b"no npy at all", "not a valid trace"),
        (b"", "not a valid trace"),
    ],
)
def test_lying_members_are_refused_before_memory_is_taken(tmp_path, member, message):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("counts.npy", member)
    with pytest.raises(ValueError, match=message):
        ExpertTrace.load(path)


def test_too_large_truncated_and_absent_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    synthetic("zipf-strong", **SIZES).save(path)
    whole = path.read_bytes()
    for at in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"a\.npz"):
            ExpertTrace.load(path)
    for at in range(0, len(whole), 37):  # a damaged byte gives a clear error or, in unused places, the same trace
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            assert equal(ExpertTrace.load(path), synthetic("zipf-strong", **SIZES))
        except ValueError as error:
            assert "a.npz" in str(error)
    with pytest.raises(ValueError, match="nowhere"):
        ExpertTrace.load(tmp_path / "nowhere.npz")
    path.write_bytes(whole)
    monkeypatch.setattr(tr, "MAX_MEMBER_BYTES", 500)
    with pytest.raises(ValueError, match="more than 500"):
        ExpertTrace.load(path)


def test_meta_that_is_no_json_is_refused_and_leaves_no_file(tmp_path):
    for meta in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="meta cannot be written"):
            ExpertTrace(GOOD["counts"], GOOD["iteration"], meta).save(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- text tables


def test_text_tables_round_trip(tmp_path):
    trace = synthetic("zipf-strong", **SIZES)
    trace.write_published(tmp_path / "tables")
    assert (tmp_path / "tables" / "table_iter1_rank0.log").read_text().startswith("0:[[")
    (tmp_path / "tables" / "notes.txt").write_text("not a table")
    (tmp_path / "tables" / "xtable_iter1_rank9.log").write_text("not a table")
    assert equal(ExpertTrace.read_published(tmp_path / "tables"), trace)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tables"),
        ("0:[[]]\n", "no tables"),
        ("1:[[1.0]]\n", 'line 1 must start with "0:"'),
        ("0:[[1.0]]\n0:[[1.0]]\n", 'line 2 must start with "1:"'),
        ("0:[[1.0]]\n1:[[1.0, 2.0]]\n", r"line 2 has shape \(1, 2\)"),
        ("0:[1.0]\n", r"line 1 has shape \(1,\)"),
        ("0:[[1.0], [1.0, 2.0]]\n", "not a valid table"),
        ("0:[[1.5]]\n", "no count"),
        ("0:[[-1.0]]\n", "no count"),
        ("0:[[NaN]]\n", "no count"),
        ("0:[[1e300]]\n", "no count"),
        ('0:[["a"]]\n', "not a valid table"),
        ("0:{}\n", "not a valid table"),
        ("0:[[1.0]\n", "not a valid table"),
        ("0:" + "[" * 100_000, "not a valid table"),
        ("0:[[1.0, 2.0], [3.0, 4.0]]\n", r"shape \(1, 2, 2\), but table_iter1_rank0.log has \(1, 1, 2\)"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, text, message):
    (tmp_path / "table_iter1_rank0.log").write_text("0:[[1.0, 2.0]]\n")
    (tmp_path / "table_iter1_rank1.log").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ExpertTrace.read_published(tmp_path)
    assert "table_iter1_rank1.log" in str(error.value)


def test_missing_tables_and_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "tables"
    with pytest.raises(ValueError, match="cannot read this folder"):
        ExpertTrace.read_published(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="no file is called"):
        ExpertTrace.read_published(folder)
    (folder / "table_iter1_rank1.log").write_text("0:[[1.0]]\n")
    with pytest.raises(ValueError, match="table_iter1_rank0.log is missing"):
        ExpertTrace.read_published(folder)
    (tmp_path / "outside.log").write_text("0:[[1.0]]\n")
    (folder / "table_iter1_rank0.log").symlink_to("../outside.log")
    with pytest.raises(ValueError, match="leads out of"):
        ExpertTrace.read_published(folder)
    (folder / "table_iter1_rank0.log").unlink()
    (folder / "table_iter1_rank0.log").symlink_to("table_iter1_rank1.log")
    assert ExpertTrace.read_published(folder).counts.shape == (1, 2, 1, 1, 1)


# --------------------------------------------------------------------------------------------------- published data


@needs_published
def test_published_files_read_and_write_back_byte_for_byte(tmp_path, published):
    for name, row, rank in (("table_iter1_rank0", 0, 0), ("table_iter2491_rank15", 249, 15)):
        text = (TRACE / f"{name}.log").read_text()
        (tmp_path / "in").mkdir(exist_ok=True)
        iteration = name.split("_")[1]
        (tmp_path / "in" / f"table_{iteration}_rank0.log").write_text(text)
        read = ExpertTrace.read_published(tmp_path / "in")
        assert np.array_equal(read.counts[0, 0], published.counts[row, rank])
        read.write_published(tmp_path / "out")
        assert (tmp_path / "out" / f"table_{iteration}_rank0.log").read_text() == text
        (tmp_path / "in" / f"table_{iteration}_rank0.log").unlink()


@needs_published
def test_skew_of_the_published_trace(published):
    """Figures of the published trace, as its inventory states them."""
    assert published.counts.shape == (250, 16, 24, 4, 32) and (published.counts.sum(axis=4) == 4096).all()
    table = {
        1: (1.54, 1.27, 1.86, 0, 0.048, 0.17),
        21: (15.6, 9.8, 16.0, 25.5, 0.487, 0.97),
        501: (9.1, 4.6, 15.8, 2.5, 0.285, 0.65),
    }
    over_mean, idle = published.max_over_mean(), published.idle_experts()
    top1, top4 = published.top_share(1), published.top_share(4)
    for iteration, (mean, low, high, num_idle, share1, share4) in table.items():
        row = published.iteration.tolist().index(iteration)
        assert over_mean[row].mean() == pytest.approx(mean, abs=0.06)
        assert (over_mean[row].min(), over_mean[row].max()) == pytest.approx((low, high), abs=0.06)
        assert idle[row].mean() == pytest.approx(num_idle, abs=0.06)
        assert (top1[row].mean(), top4[row].mean()) == pytest.approx((share1, share4), abs=0.006)
    r = published.correlation(1)
    assert np.nanmean(r[:10]) == pytest.approx(0.776, abs=0.01)
    assert np.nanmean(r[10:50]) == pytest.approx(0.992, abs=0.001) and (r[20:] > 0.9).all()
    layer = ExpertTrace.load(TRACE / "fig13_layer6_rank0_mb0.npz")
    assert np.array_equal(layer.counts[:250, 0, 0, 0], published.counts[:, 0, 6, 0])


# ------------------------------------------------------------------------------------------------ skew and synthetic


def test_skew_by_hand():
    counts = np.zeros((3, 2, 2, 1, 4), np.int32)
    counts[0, :, 0, 0] = [[4, 0, 0, 2], [2, 0, 0, 0]]
    counts[1, :, 0, 0] = [[1, 1, 1, 1], [1, 1, 1, 1]]
    counts[2, 0, 0, 0] = [8, 0, 0, 0]
    trace = ExpertTrace(counts, np.array([1, 2, 3]))
    assert trace.expert_load()[0, 0].tolist() == [6, 0, 0, 2]
    assert trace.max_over_mean()[:, 0].tolist() == [3.0, 1.0, 4.0] and trace.max_over_mean()[0, 1] == 1.0
    assert trace.idle_experts()[:, 0].tolist() == [2, 0, 3] and trace.idle_experts()[0, 1] == 4
    assert trace.top_share(1)[:, 0].tolist() == [0.75, 0.25, 1.0] and trace.top_share(4)[0].tolist() == [1.0, 0.0]
    assert np.isnan(trace.correlation(1)).all()
    assert trace.correlation(2)[0, 0] == pytest.approx(np.corrcoef([6, 0, 0, 2], [8, 0, 0, 0])[0, 1])
    for lag in (0, 3):
        with pytest.raises(ValueError, match="lag"):
            trace.correlation(lag)


@pytest.mark.parametrize("kind", SKEWS)
def test_synthetic_is_seeded_and_complete(kind):
    trace = synthetic(kind, **SIZES, seed=3)
    assert equal(trace, synthetic(kind, **SIZES, seed=3)) and trace.meta["kind"] == kind
    assert not equal(trace, synthetic(kind, **SIZES, seed=4))
    assert trace.counts.shape == (4, 2, 3, 2, 8) and (trace.counts.sum(axis=4) == 96).all()
    assert trace.iteration.tolist() == [1, 2, 3, 4] and json.dumps(trace.meta)


def shares(kind, num_iterations=40, num_experts=32, **changes):
    """[I, L, E] share of the copies that each expert got, from enough copies to be near the chances."""
    sizes = {"num_ranks": 4, "num_layers": 6, "num_micro_batches": 1, "num_copies": 20_000, "seed": 5}
    trace = synthetic(kind, num_iterations=num_iterations, num_experts=num_experts, **sizes, **changes)
    return trace.expert_load() / trace.expert_load().sum(2, keepdims=True)


def test_skew_that_stays_is_as_named():
    assert shares("uniform").max() < 1.15 / 32
    for kind, exponent in (("zipf-mild", 0.5), ("zipf-strong", 1.2)):
        want_E = np.arange(1.0, 33) ** -exponent
        got_ILE = np.sort(shares(kind), axis=2)[:, :, ::-1]
        assert np.allclose(got_ILE.mean(0), want_E / want_E.sum(), atol=2e-3)
        busiest_IL = shares(kind).argmax(2)
        assert (busiest_IL == busiest_IL[0]).all() and len(set(busiest_IL[0].tolist())) > 1  # not the same in all layers
    hot_ILE = np.sort(shares("one-hot"), axis=2)
    assert np.allclose(hot_ILE[:, :, -1], 0.4, atol=0.01) and np.allclose(hot_ILE[:, :, :-1], 0.6 / 31, atol=3e-3)
    assert shares("one-hot", share=1.0).max() == 1.0
    over_mean_L = 32 * shares("layered").max(2).mean(0)
    assert over_mean_L[0] < 1.15 and (np.diff(over_mean_L) > 0).all() and over_mean_L[-1] > 12


def test_skew_that_changes_is_as_named():
    hot_IL = shares("rotating-hot").argmax(2)
    assert (hot_IL.reshape(4, 10, 6) == hot_IL[::10, None]).all() and (hot_IL[10::10] != hot_IL[:-10:10]).all()
    assert set(hot_IL[::10, 0].tolist()).__len__() == 4

    is_burst_I = (shares("bursty", num_iterations=400).max(2) > 0.35).all(1)
    assert 0.1 < is_burst_I.mean() < 0.4  # bursts of 5 that begin in 5 % of the iterations
    starts = np.flatnonzero(np.diff(is_burst_I.astype(int)) == 1)
    ends = np.flatnonzero(np.diff(is_burst_I.astype(int)) == -1)
    assert (ends[ends > starts[0]][: len(starts)] - starts[: len(ends)] >= 5).all()

    share_ILE = shares("alternating")
    assert (share_ILE[:10].argmax(2) == share_ILE[20:30].argmax(2)).all()
    first_LE, second_LE = share_ILE[0], share_ILE[10]
    correlation_L = [np.corrcoef(a, b)[0, 1] for a, b in zip(first_LE, second_LE, strict=True)]
    assert max(correlation_L) < 0.6 and np.mean(correlation_L) < 0.2  # yesterday says nothing about today
    assert np.corrcoef(share_ILE[0, 0], share_ILE[9, 0])[0, 1] > 0.99


def test_bad_kinds_and_numbers_say_what_exists():
    for kind, changes, message in (
        ("odd", {}, 'kind = "odd" is not one of uniform, zipf-mild'),
        ("uniform", {"num_layers": 0}, "layers = 0"),
        ("uniform", {"num_copies": -1}, "num_copies"),
        ("uniform", {"slope": 1}, "no slope; known: chance"),
        ("one-hot", {"share": 1.5}, "share = 1.5 must be at least 0, at most 1"),
        ("one-hot", {"share": float("nan")}, "share"),
        ("alternating", {"period": 0}, "period"),
    ):
        with pytest.raises(ValueError, match=message):
            synthetic(kind, **{**SIZES, **changes})


def test_a_trace_is_named_by_a_path_or_a_class(tmp_path):
    made = synthetic("zipf-strong", **SIZES)
    made.save(tmp_path / "a.npz")
    made.write_published(tmp_path / "tables")
    assert equal(read_trace(tmp_path / "a.npz"), made) and equal(read_trace(str(tmp_path / "tables")), made)
    named = read_trace("synthetic:zipf-strong,iterations=4,ranks=2,layers=3,micro_batches=2,copies=96", experts=8)
    assert equal(named, made)
    assert read_trace("synthetic:one-hot,share=0.8,seed=2,copies=1000").top_share(1).mean() == pytest.approx(0.8, abs=0.02)
    for text, message in (("synthetic:odd", "not one of"), ("synthetic:uniform,seed=x", "invalid literal"),
                          ("synthetic:uniform,ranks=0", "ranks = 0"), ("synthetic:bursty,colour=3", "no colour"),
                          ("nowhere.npz", "nowhere.npz")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_trace(text)


def test_csv_lines_of_one_place_add_up_and_absent_ones_are_none(tmp_path):
    path = tmp_path / "routing.csv"
    path.write_text("note,iteration,layer,expert,count\nx,3,2,1,5\nx,3,2,1,2\n\nx,7,2,0,4\nx,7,5,3,1\n")
    found = read_trace(path)
    assert found.counts.shape == (2, 1, 2, 1, 4) and found.iteration.tolist() == [3, 7]
    assert found.counts[:, 0, :, 0].tolist() == [[[0, 7, 0, 0], [0, 0, 0, 0]], [[4, 0, 0, 0], [0, 0, 0, 1]]]
    path.write_text("\ufeffiteration, rank, layer, micro_batch, expert\n1,0,0,0,1\n1,0,0,0,1\n1,1,0,1,0\n")
    found = read_trace(path)  # a line for each token, and the mark with which spreadsheets begin
    assert found.counts.shape == (1, 2, 1, 2, 2) and found.counts[0, :, 0].tolist() == [[[0, 2], [0, 0]], [[0, 0], [1, 0]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column iteration, layer, expert in line 1, which has: nothing"),
        ("iteration,layer,expert\n", "has no line below its first"),
        ("iteration,layer,expert\n1,0,0\n1,0,x\n", "line 3: needs whole numbers for iteration, layer, expert"),
        ("iteration,layer,expert,count\n1,0,0\n", "line 2: needs whole numbers"),
        ("iteration,layer,expert\n1,0,-1\n", "line 2: a number outside"),
        ("iteration,layer,expert,count\n1,0,0,4\n1,0,0,18446744073709551616\n", "line 3: a number outside"),
        ("iteration,layer,expert,count\n1,0,0,3000000000\n", "counts must lie in 0"),
        ("iteration,layer,expert\n1,0,99999999999\n", "too many"),
    ],
)
def test_a_csv_that_is_no_trace(tmp_path, text, message):
    path = tmp_path / "routing.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_trace(path)
    assert str(path) in str(error.value)
