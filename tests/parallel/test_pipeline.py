"""Which layers a pipeline stage has."""

import pytest

from smartmoe.parallel.pipeline import chunk_layers, chunks_of_stage


@pytest.mark.parametrize("num_layers,num_chunks", [(4, 1), (4, 4), (7, 2), (10, 4), (61, 8)])
def test_chunks_are_contiguous_and_even(num_layers, num_chunks):
    chunks = chunk_layers(num_layers, num_chunks)
    assert [layer for chunk in chunks for layer in chunk] == list(range(num_layers))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_interleaving_passes_through_all_stages():
    assert [chunks_of_stage(stage, pp=3, vpp=2) for stage in range(3)] == [[0, 3], [1, 4], [2, 5]]
