"""The look at a cluster's nodes: who is measured with whom, and which node counts as slow."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from launch.slurm.probing import Report, read_report
from sft_dist.probe import tournament


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_pair_of_nodes_is_measured_once_and_no_node_twice_in_a_round(count: int) -> None:
    rounds = list(tournament(count))
    assert sorted(pair for one in rounds for pair in one) == list(combinations(range(count), 2))
    for one in rounds:
        nodes = [node for pair in one for node in pair]
        assert len(nodes) == len(set(nodes))


def pairs(slow: str = "", speed: float = 10e9) -> dict[tuple[str, str], float]:
    names = ["n0", "n1", "n2", "n3"]
    return {pair: speed / 4 if slow in pair else speed for pair in combinations(names, 2)}


def test_a_node_whose_links_are_slow_is_named_with_the_mend() -> None:
    report = Report(["n0", "n1", "n2", "n3"], pairs("n2"))
    assert report.slow == {"n2": 0.25}
    assert report.lines()[-1] == "probe: n2 is slow, 25% of the others' speed; `exclude: n2` avoids it"
    assert "2.50 GB/s between n0 and n2" in report.lines()[1]


def test_nodes_that_are_alike_are_not_slow() -> None:
    assert Report(["n0", "n1", "n2", "n3"], pairs()).slow == {}
    # Of two nodes nobody can say which one it is.
    assert Report(["n0", "n1"], {("n0", "n1"): 1.0}).slow == {}


def test_the_nodes_are_those_of_the_ranks(tmp_path: Path) -> None:
    ranks = [{"rank": rank, "node": f"n{rank // 2}", "group": rank // 2, "gpus": 0} for rank in range(4)]
    held = {"ranks": ranks, "pairs": [{"nodes": ["n0", "n1"], "bytes_per_second": 5e9}]}
    (tmp_path / "probe.json").write_text(json.dumps(held))
    report = read_report(tmp_path / "probe.json")
    assert report.nodes == ["n0", "n1"] and report.pairs == {("n0", "n1"): 5e9}
