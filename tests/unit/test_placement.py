"""Cores are shared among the processes of one node, whatever other nodes have."""

from __future__ import annotations

import os

import pytest

from fastlt.device.placement import Placement, core_share, node_ranks


def nodes(count: int, per_node: int, cores: int, *, bound: bool = False) -> list[Placement]:
    """Processes on `count` nodes of so many cores; bound: each to cores of its own, as Slurm does."""
    each = cores // per_node
    return [
        Placement(
            f"host{node}", f"host{node} {node}", frozenset(range(each * i, each * (i + 1)) if bound else range(cores))
        )
        for node in range(count)
        for i in range(per_node)
    ]


@pytest.mark.parametrize("bound", [False, True], ids=["all use all cores", "each is bound to its own"])
@pytest.mark.parametrize(
    ("count", "per_node", "cores", "share"), [(1, 1, 2, 2), (2, 2, 4, 2), (2, 1, 2, 2), (8, 8, 96, 12), (8, 8, 128, 16)]
)
def test_a_process_has_its_share_of_the_cores_of_its_node(count, per_node, cores, share, bound):
    placements = nodes(count, per_node, cores, bound=bound)
    assert {core_share(placements, rank) for rank in range(count * per_node)} == {share}


def test_nodes_may_differ_and_a_core_is_the_least():
    placements = [*nodes(1, 4, 2), Placement("large", "large 1", frozenset(range(16)))]
    assert [core_share(placements, rank) for rank in range(5)] == [1, 1, 1, 1, 16]
    assert node_ranks(placements, 2) == [0, 1, 2, 3]
    assert node_ranks(placements, 4) == [4]


def test_of_cores_that_some_share_each_has_a_part():
    on_node = [frozenset({0, 1, 2, 3}), frozenset({0, 1, 2, 3}), frozenset({4, 5, 6})]
    assert [core_share([Placement("a", "a", cores) for cores in on_node], rank) for rank in range(3)] == [2, 2, 3]


def test_two_launchers_on_one_machine_are_two_nodes(monkeypatch):
    here = []
    for group in ("0", "1"):
        monkeypatch.setenv("GROUP_RANK", group)
        here.append(Placement.here())
    assert here[0].host == here[1].host
    assert node_ranks(here, 1) == [1]
    assert here[0].cores == os.sched_getaffinity(0)
