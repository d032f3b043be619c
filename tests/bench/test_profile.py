import json

import numpy as np

from smartmoe.bench import measure, profile_cluster
from smartmoe.planner.primitives import KINDS, Primitives, Profile
from tests.dist import spawn

TINY = ["--device", "cpu", "--shapes", "16,32,2,4,2,32,300", "--tokens", "16", "64", "128", "--seconds", "0.001"]


def _run(_world_rank, path):
    args = profile_cluster.parse_args([*TINY, "--out", str(path)])
    profile_cluster.run(args, measure.start_world("cpu"))


def test_two_ranks_profile_every_primitive(tmp_path):
    path = tmp_path / "profile.json"
    spawn(_run, 2, path)
    profile = Profile.load(path)
    assert set(profile.points) == set(KINDS)
    assert profile.facts["ranks"] == 2 and profile.facts["torch"] and profile.dtype == "float32"
    assert any(p.held_out for points in profile.points.values() for p in points)
    exchange = profile.points["all_to_all"]
    assert len({p.sizes["intra_bytes"] for p in exchange}) > 5 and all(p.sizes["inter_bytes"] == 0 for p in exchange)
    primitives = Primitives.fit(profile)
    for name, kind in KINDS.items():
        assert primitives.ms(name, **dict.fromkeys(kind.sizes, 64)) > 0
    assert "held-out sizes" in profile_cluster.format_errors(profile, 1.0)
    assert json.loads(path.read_text())["facts"]["seconds"] > 0


def test_rows_of_an_exchange_and_sizes_between():
    assert profile_cluster.parts.share_rows(100, 4, 1.0).tolist() == [25] * 4
    assert profile_cluster.parts.share_rows(100, 2, 1.5).tolist() == [75, 25]
    assert profile_cluster.parts.share_rows(100, 2, 0.0).tolist() == [0, 100]
    assert profile_cluster.token_grid([64, 128, 256]) == [(64, False), (128, False), (256, False), (96, True)]


def test_ranks_that_wait_for_a_core_count_as_long_as_the_last_one_takes():
    marks_WIM = np.array([[[0.0, 1.0, 3.0]], [[1.0, 2.5, 3.5]]])  # the second rank got a core when the first was done
    assert profile_cluster.slowest_parts(marks_WIM, one_clock=True).tolist() == [[2.5, 1.0]]
    assert profile_cluster.slowest_parts(marks_WIM, one_clock=False).tolist() == [[1.5, 2.0]]
