"""Graphs and pictures of programs and plans, and the lifetimes of buffers."""

from __future__ import annotations

import networkx as nx
import pytest

from spcomp.ir.graph import (
    launch_graph,
    launch_order,
    stage_graph,
    to_dot,
    to_json,
    to_lines,
    to_mermaid,
    to_tree,
)
from spcomp.ir.lifetimes import Lifetime, lifetimes
from spcomp.ir.plan import Phase
from tests.ir.programs import LOWERED, PATTERNS, PHASES, plan_of


@pytest.mark.parametrize("name", PATTERNS)
def test_stage_graph_ends_in_the_result_alone(name: str) -> None:
    program = PATTERNS[name].program
    graph = stage_graph(program)
    assert nx.is_directed_acyclic_graph(graph)
    ends = [n for n in graph if graph.out_degree(n) == 0]
    assert [graph.nodes[n]["stage"] for n in ends] == [program.result]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", LOWERED)
def test_the_order_of_a_plan_is_a_topological_order(name: str, phase: Phase) -> None:
    graph = launch_order(plan_of(name, phase))
    assert all(before < after for before, after in graph.edges)


def test_launches_of_different_inputs_do_not_wait_for_each_other() -> None:
    plan = plan_of("block_topk")
    kernels = [x.kernel for x in plan.launches()]
    assert kernels == ["pool", "pool", "select", "tiles", "attend"]
    assert set(launch_order(plan).edges) == {(0, 2), (1, 2), (2, 3), (3, 4)}


def test_buffers_made_once_live_until_the_slabs_end_and_others_until_their_last_reader() -> None:
    assert lifetimes(plan_of("block_topk")) == {
        "q_mean": Lifetime(0, 4),
        "k_mean": Lifetime(1, 4),
        "keys": Lifetime(2, 2),
        "indices": Lifetime(2, 3),
        "counts": Lifetime(2, 3),
        "tiles": Lifetime(3, 4),
        "partial": Lifetime(3, 4),
        "total": Lifetime(3, 4),
    }


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [((0, 2), (2, 3), True), ((0, 1), (2, 3), False), ((0, 9), (3, 4), True)],
)
def test_lifetimes_meet_when_one_launch_touches_both(
    a: tuple[int, int], b: tuple[int, int], meet: bool
) -> None:
    assert Lifetime(*a).meets(Lifetime(*b)) is meet
    assert Lifetime(*b).meets(Lifetime(*a)) is meet


def test_tree_names_a_stage_met_again_without_its_branches() -> None:
    assert to_tree(PATTERNS["joined"].program) == (
        "%11 Merge()\n"
        "├─ %6 Attend()\n"
        "│  ├─ %0 q\n"
        "│  └─ %5 Gather()\n"
        "│     ├─ %3 Stream()\n"
        "│     │  ├─ %1 k\n"
        "│     │  └─ %2 v\n"
        "│     └─ %4 Local(count=16)\n"
        "└─ %10 Merge()\n"
        "   └─ %9 Attend()\n"
        "      ├─ %0 q\n"
        "      └─ %8 Gather()\n"
        "         ├─ %3 Stream() …\n"
        '         └─ %7 MaskMod(predicate=k <= (q - 16), name="<lambda>")\n'
    )


def test_lines_say_what_each_launch_reads_and_writes() -> None:
    assert to_lines(plan_of("streaming_llm")) == (
        "for each slab of query rows:\n"
        "     -> tiles -> tiles, partial, total\n"
        "    q, k, v, tiles, partial, total -> attend -> out, lse\n"
    )


def test_dot_and_mermaid_draw_every_node_and_edge() -> None:
    graph = launch_graph(plan_of("streaming_llm"))
    dot, mermaid = to_dot(graph), to_mermaid(graph)
    assert '  "tiles" -> "1";' in dot
    assert '  "1" [label="attend", style=filled, fillcolor=lightblue];' in dot
    assert dot.count(" -> ") == mermaid.count(" --> ") == graph.number_of_edges()
    assert mermaid.startswith("flowchart TD\n")


def test_labels_with_quotes_stay_inside_their_strings() -> None:
    graph = stage_graph(PATTERNS["block_topk"].program)
    assert 'heads=\\"group\\"' in to_dot(graph)
    assert "heads=#quot;group#quot;" in to_mermaid(graph)


def test_json_names_nodes_and_edges() -> None:
    graph = to_json(launch_graph(plan_of("streaming_llm")))
    assert {"id": "1", "label": "attend", "kind": "launch"} in graph["nodes"]
    assert ["1", "out"] in graph["edges"]
