"""Ranks on the mesh: DeepSpeed's and Megatron's order."""

import itertools

import pytest

from raptr_ds.parallel.topology import Topology


def test_eight_ranks_by_hand() -> None:
    topology = Topology.of(8, tensor=2, pipeline=2)
    assert topology == Topology(tensor=2, pipeline=2, data=2)
    assert topology.world_size == 8
    assert [topology.coordinates(rank) for rank in range(8)] == [
        (pipeline, data, tensor) for pipeline in (0, 1) for data in (0, 1) for tensor in (0, 1)
    ]


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (4, 1, 2), (2, 3, 2), (1, 4, 3)])
def test_coordinates_are_those_of_deepspeed(tensor: int, pipeline: int, data: int) -> None:
    deepspeed_topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = deepspeed_topology.PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    topology = Topology.of(tensor * pipeline * data, tensor, pipeline)
    for rank in range(topology.world_size):
        coordinate = theirs.get_coord(rank)
        assert topology.coordinates(rank) == (coordinate.pipe, coordinate.data, coordinate.model)


def test_every_place_has_one_rank() -> None:
    topology = Topology.of(24, 2, 3)
    places = {topology.coordinates(rank) for rank in range(24)}
    assert places == set(itertools.product(range(3), range(4), range(2)))
