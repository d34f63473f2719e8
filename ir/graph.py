"""The graphs of both levels: the stages of a program, the launches of a plan, and pictures.

The only module that knows networkx.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx

from spcomp.ir.nodes import Argument, Input, Node, children
from spcomp.ir.plan import Plan, Slabs
from spcomp.ir.plan_rules import base
from spcomp.ir.program import Program
from spcomp.ir.text_values import print_fields


def stage_graph(program: Program) -> nx.DiGraph[int]:
    """Give the graph of a program: node n is the stage that text calls %n, an edge is a value.

    Node attributes: label, kind (class name), stage (the node). Edges go from what is read to what
    reads it.
    """
    graph: nx.DiGraph[int] = nx.DiGraph()
    numbers = {node: n for n, node in enumerate(program.stages())}
    for node, n in numbers.items():
        graph.add_node(n, label=_stage_label(node), kind=type(node).__name__, stage=node)
        for child in children(node):
            graph.add_edge(numbers[child], n)
    return graph


def _stage_label(node: Node) -> str:
    if isinstance(node, (Input, Argument)):
        return node.name
    plain = [f for f in print_fields(node, lambda _: "%") if "%" not in f]
    return f"{type(node).__name__}({', '.join(plain)})"


def launch_graph(plan: Plan) -> nx.DiGraph[str]:
    """Give the graph of a plan: launches "0", "1", … and the buffers between them.

    Node attributes: label, kind ("launch" or that of the buffer), slab (True inside slabs). Edges
    go buffer -> launch -> buffer.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for b in plan.buffers:
        graph.add_node(b.name, label=b.name, kind=b.kind, slab=False)
    inside = {id(x) for s in plan.steps if isinstance(s, Slabs) for x in s.launches}
    for n, launch in enumerate(plan.launches()):
        node = str(n)
        graph.add_node(node, label=launch.kernel, kind="launch", slab=id(launch) in inside)
        graph.add_edges_from((base(name), node) for name in launch.reads())
        graph.add_edges_from((node, base(name)) for name in launch.writes())
    return graph


def launch_order(plan: Plan) -> nx.DiGraph[int]:
    """Give which launch must wait for which: an edge where one writes what the other touches later.

    The order in which the plan lists its launches is a topological order of this graph, so it has
    no circle.
    """
    graph: nx.DiGraph[int] = nx.DiGraph()
    writers: dict[str, list[int]] = {}
    for n, launch in enumerate(plan.launches()):
        graph.add_node(n, label=launch.kernel)
        touched = {base(name) for name in launch.buffers()}
        graph.add_edges_from((w, n) for name in touched for w in writers.get(name, ()))
        for name in launch.writes():
            writers.setdefault(base(name), []).append(n)
    return graph


# ---- pictures ------------------------------------------------------------------------------------


def to_dot(graph: nx.DiGraph[Any]) -> str:
    """Draw a graph in the language of Graphviz."""
    lines = ["digraph {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for node, data in graph.nodes(data=True):
        shape = ", style=filled, fillcolor=lightblue" if data["kind"] == "launch" else ""
        lines.append(f"  {_quoted(node)} [label={_quoted(data['label'])}{shape}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges]
    return "\n".join([*lines, "}", ""])


def _quoted(value: object) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def to_mermaid(graph: nx.DiGraph[Any]) -> str:
    """Draw a graph in the language of Mermaid, which many Markdown pages render."""
    ids = {node: f"n{i}" for i, node in enumerate(graph.nodes)}
    lines = ["flowchart TD"]
    for node, data in graph.nodes(data=True):
        label = data["label"].replace('"', "#quot;")
        lines.append(f'  {ids[node]}["{label}"]')
    lines += [f"  {ids[a]} --> {ids[b]}" for a, b in graph.edges]
    return "\n".join([*lines, ""])


def to_tree(program: Program) -> str:
    """Draw a program as a tree of what its result reads; a stage met again is only named."""
    graph = stage_graph(program)
    root = len(graph) - 1
    return "\n".join([*_branches(graph, root, set(), ""), ""])


def _branches(graph: nx.DiGraph[int], node: int, met: set[int], prefix: str) -> Iterable[str]:
    label = f"%{node} {graph.nodes[node]['label']}"
    readers = list(graph.predecessors(node))
    if node in met and readers:
        yield f"{label} …"
        return
    met.add(node)
    yield label
    for i, child in enumerate(readers):
        last = i == len(readers) - 1
        inner = list(_branches(graph, child, met, ""))
        yield f"{prefix}{'└─ ' if last else '├─ '}{inner[0]}"
        yield from (f"{prefix}{'   ' if last else '│  '}{line}" for line in inner[1:])


def to_json(graph: nx.DiGraph[Any]) -> Mapping[str, Any]:
    """Give a graph as plain lists and strings."""
    nodes = [
        {"id": str(n), "label": d["label"], "kind": d["kind"]} for n, d in graph.nodes(data=True)
    ]
    return {"nodes": nodes, "edges": [[str(a), str(b)] for a, b in graph.edges]}


def to_lines(plan: Plan) -> str:
    """Write a plan as one line a launch: what it reads, its kernel, what it writes."""
    lines = []
    for step in plan.steps:
        inside = isinstance(step, Slabs)
        if isinstance(step, Slabs):
            lines.append("for each slab of query rows:")
        for launch in step.launches if isinstance(step, Slabs) else (step,):
            read, written = (", ".join(names) for names in (launch.reads(), launch.writes()))
            lines.append(f"{'    ' if inside else ''}{read} -> {launch.kernel} -> {written}")
    return "\n".join([*lines, ""])
