import numpy as np
import pytest

from smartmoe.planner.timeline import Work, fold, join


def _play(pieces, device=0.0, host=0.0):
    """(device, host) when all is done: pieces (work, launches), or the ms that the host waits for the device."""
    for piece in pieces:
        if isinstance(piece, tuple):
            begin, host = max(device, host), host + piece[1]
            device = max(begin + piece[0], host)
        else:
            host = max(device, host) + piece
    return device, host


def _work(pieces):
    return join([Work.piece(*piece) if isinstance(piece, tuple) else Work.wait(piece) for piece in pieces])


def _random(rng, num):
    return [rng.random() if rng.random() < 0.3 else tuple(rng.random(2)) for _ in range(num)]


def test_joined_work_moves_the_clocks_as_its_pieces_do_one_by_one():
    rng = np.random.default_rng(0)
    for num in (0, 1, 2, 7):
        pieces, device, host = _random(rng, num), 3 * rng.random(), 3 * rng.random()
        work, want = _work(pieces), _play(pieces, device, host)
        found = max(device + work.device, host + work.launched), max(device + work.waited, host + work.host)
        assert found == pytest.approx(want) and work.total == pytest.approx(max(_play(pieces)))


def test_a_host_that_is_ahead_costs_nothing_until_it_has_to_wait():
    ahead, behind = [(5.0, 1.0), (1.0, 3.0)], [(1.0, 3.0), (5.0, 1.0)]
    assert _work(ahead).total == 6.0 and _work(behind).total == 8.0
    assert _work([*behind, *ahead]).total == 14.0, "later launches lie under the second piece"
    assert _work([*ahead, 0.5, (1.0, 3.0)]).total == 6.0 + 0.5 + 3.0, "the host knows at 6.5 what to launch"
    assert _work([*ahead, (1.0, 3.0)]).total == 7.0


def test_repeated_work():
    rng = np.random.default_rng(1)
    for _ in range(20):
        pieces = _random(rng, 4)
        work = _work(pieces)
        assert work.times(37).total == pytest.approx(max(_play(37 * pieces)))
        assert (work.times(400).total - work.times(200).total) / 200 == pytest.approx(work.each)
    assert Work.piece(2.0, 1.0).times(0).total == 0.0


def test_stretches_of_many_blocks_at_once():
    rng = np.random.default_rng(2)
    device, host = rng.random((2, 3, 2, 7))
    blocks = Work.piece(device, host).then(Work.wait(0.2))
    parts = [[0, 1, 2], [3], [6, 5, 4], [6, 5, 4, 3, 2]]
    found = fold(blocks, parts)
    assert found.device.shape == (3, 2, 4)
    for place, part in enumerate(parts):
        want = join([blocks.map(lambda x, k=k: x[..., k]) for k in part])
        for mine, theirs in zip(vars(found).values(), vars(want).values(), strict=True):
            assert mine[..., place] == pytest.approx(theirs)
    one = Work.piece(2.0, 3.0).at(-1, 3)
    assert one.total.tolist() == [0, 0, 3] and one.host.tolist() == [0, 0, 3]
