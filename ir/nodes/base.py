"""What all nodes share: content equality, the user's line, and walking the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from spcomp.errors import Where

N = TypeVar("N", bound="Node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A stage: a frozen value that holds the nodes it reads. `where` takes no part in equality."""

    where: Where | None = field(default=None, compare=False, repr=False)


def operands(node: Node) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a node except its place, in declaration order, `where` left out."""
    for f in fields(node):
        if f.name != "where":
            yield f.name, getattr(node, f.name)


def children(node: Node) -> tuple[Node, ...]:
    """Give the nodes a node reads, in field order."""
    found: list[Node] = []
    for _, value in operands(node):
        if isinstance(value, Node):
            found.append(value)
        elif isinstance(value, tuple):
            found.extend(v for v in value if isinstance(v, Node))
    return tuple(found)


def topological(*roots: Node) -> tuple[Node, ...]:
    """Order all nodes below the roots so that each comes after those it reads, each once."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in order:
            return
        for child in children(node):
            visit(child)
        order[node] = None

    for root in roots:
        visit(root)
    return tuple(order)


def rebuild(node: N, change: Callable[[Node], Node]) -> N:
    """Give the node with `change` applied to each node it reads."""
    updates: dict[str, Any] = {}
    for name, value in operands(node):
        if isinstance(value, Node):
            updates[name] = change(value)
        elif isinstance(value, tuple) and any(isinstance(v, Node) for v in value):
            updates[name] = tuple(change(v) if isinstance(v, Node) else v for v in value)
    return replace(node, **updates) if updates else node
