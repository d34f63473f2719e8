"""MInference's offline choice of a shape for each head: its configuration files, and the search.

A file is JSON: a list over layers, each an object from a query head's number to [type, k_v, k_s,
score], type one of "stream_llm", "vertical_and_slash", "block_sparse" (microsoft/MInference,
minference/configs)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spcomp import api
from spcomp.dsl import Pattern, attend, pattern
from spcomp.errors import NotANumber, SpcompError, UnknownChoice
from spcomp.patterns.minference import minference

TYPES = ("stream_llm", "vertical_and_slash", "block_sparse")  # in the order of the pattern's KINDS
BLOCKS = 100
Objective = Literal["output", "mass"]


class NotAConfiguration(SpcompError):
    """A configuration file cannot be read, or is that of another model."""

    message = "{path} is no MInference configuration of this model: {problem}."
    help = "{way_out}"


class LayerOutside(SpcompError):
    """A layer was asked for that the configuration does not have."""

    message = "layer {layer} was asked for, and the configuration has layers 0 to {last}."
    help = "layers count from 0."


@dataclass(frozen=True, slots=True)
class Entry:
    """The shape of one head: its type and budgets in the words of the file, and how well it did.

    "stream_llm": the first k_v keys and the last k_s. "vertical_and_slash": k_v keys and k_s
    distances. "block_sparse": `BLOCKS` blocks, as the official code takes whatever k_v says.
    """

    type: str
    k_v: int
    k_s: int
    score: float = 0.0

    def pattern(self, **options: Any) -> Pattern:
        """Give the pattern of heads that all have this shape; options as `minference` takes
        them."""
        made: Pattern = minference(**_numbers(self, options), **options)
        return made


UNTUNED = Entry("vertical_and_slash", 1000, 6096)
"""What the official code takes for a head that its file leaves out."""

CANDIDATES = (
    Entry("stream_llm", 1024, 4096),
    Entry("vertical_and_slash", 30, 2048),
    Entry("vertical_and_slash", 100, 1800),
    Entry("vertical_and_slash", 500, 1500),
    Entry("vertical_and_slash", 3000, 200),
    Entry("block_sparse", BLOCKS, 1),
)
"""The shapes the paper's search compares (arXiv:2407.02490, appendix), of like cost."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The entries of a model, by layer and query head."""

    layers: tuple[tuple[Entry, ...], ...]

    def layer(self, number: int, *, device: str = "cpu", **options: Any) -> Pattern:
        """Give the pattern of one layer, its budgets as tables on a device.

        A budget below what the pattern forces is raised to it, as the official code does. options:
        as `minference` takes them.
        Raises: LayerOutside.
        """
        if not 0 <= number < len(self.layers):
            raise LayerOutside(layer=number, last=len(self.layers) - 1)
        heads = self.layers[number]
        rows = [_numbers(head, options) for head in heads]
        tables = {
            name: torch.tensor([row[name] for row in rows], dtype=torch.int32, device=device)
            for name in rows[0]
            if name != "kind"
        }
        kinds = [TYPES.index(head.type) for head in heads]
        kind = torch.tensor(kinds, dtype=torch.int32, device=device)
        made: Pattern = minference(kind=kind, **tables, **options)
        return made

    def save(self, path: str | Path) -> None:
        """Write the file the official code reads."""
        layers = [
            {str(n): [e.type, e.k_v, e.k_s, e.score] for n, e in enumerate(heads)}
            for heads in self.layers
        ]
        Path(path).write_text(json.dumps(layers), encoding="utf-8")


def _numbers(entry: Entry, options: dict[str, Any]) -> dict[str, Any]:
    """Give the hyper-parameters of one head; the budgets of other shapes are as small as may be."""
    defaults = minference.defaults
    keys, near = (options.get(name, defaults[name]) for name in ("sinks", "nearest"))
    is_lines, is_window = entry.type == "vertical_and_slash", entry.type == "stream_llm"
    return {
        "kind": ("a_shape", "vertical_slash", "block_sparse")[TYPES.index(entry.type)],
        "initial": entry.k_v if is_window else 0,
        "recent": entry.k_s if is_window else 1,
        "columns": max(entry.k_v, keys) if is_lines else keys,
        "offsets": max(entry.k_s, near) if is_lines else near,
        "blocks": BLOCKS if entry.type == "block_sparse" else 0,
    }


# ---- files ---------------------------------------------------------------------------------------


def load(
    path: str | Path, *, layers: int, heads: int, missing: Entry | None = None, ratio: float = 1.0
) -> Configuration:
    """Read a configuration file of a model with so many layers and query heads.

    missing: the entry of a head the file leaves out, such as `UNTUNED`; without it such a file is
    refused. ratio: multiplies both budgets of every entry, as the official `minference_ratio`.
    Raises: NotAConfiguration, naming the layer and head; NotANumber for a ratio not above 0.
    """
    if not ratio > 0:
        raise NotANumber(
            verb="load", name="ratio", value=ratio, kind="number", wanted="a number above 0"
        )
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _fault(path, f"it cannot be read ({error})") from None
    if not isinstance(data, list) or len(data) != layers:
        found = f"{len(data)} layers" if isinstance(data, list) else f"a {type(data).__name__}"
        raise _fault(path, f"it holds {found}, where the model has {layers} layers")
    found_layers = []
    for number, held in enumerate(data):
        entries = _layer(path, number, held, heads)
        absent = [n for n in range(heads) if n not in entries]
        if absent and missing is None:
            raise NotAConfiguration(
                path=path,
                problem=f"layer {number} has no entry for head {absent[0]}"
                + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
                way_out="pass missing=UNTUNED to give such heads what the official code does.",
            )
        whole = [entries.get(n, missing) for n in range(heads)]
        found_layers.append(tuple(_scaled(e, ratio) for e in whole if e is not None))
    return Configuration(tuple(found_layers))


def _layer(path: str | Path, number: int, held: Any, heads: int) -> dict[int, Entry]:
    if not isinstance(held, dict):
        raise _fault(path, f"layer {number} is a {type(held).__name__}, not an object by head")
    entries: dict[int, Entry] = {}
    for name, values in held.items():
        place = f"layer {number}, head {name!r}"
        if not (name.isascii() and name.isdigit()) or int(name) >= heads:
            raise _fault(path, f"{place} is none of the model's heads 0 to {heads - 1}")
        if int(name) in entries:
            raise _fault(path, f"{place} is there twice")
        entries[int(name)] = _entry(path, place, values)
    return entries


def _entry(path: str | Path, place: str, values: Any) -> Entry:
    if not (isinstance(values, list) and len(values) == 4 and isinstance(values[0], str)):
        raise _fault(path, f"{place} is {values!r}, not [type, k_v, k_s, score]")
    kind, k_v, k_s, score = values
    if kind not in TYPES:
        raise _fault(path, f"{place} is of the type {kind!r}, which is none of {', '.join(TYPES)}")
    for name, value, least in (("k_v", k_v, 0), ("k_s", k_s, int(kind == "stream_llm"))):
        if type(value) is not int or value < least:
            raise _fault(
                path, f"{place} has {name} = {value!r}, where an integer from {least} is needed"
            )
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise _fault(path, f"{place} has the score {score!r}, which is no number")
    return Entry(kind, k_v, k_s, float(score))


def _scaled(entry: Entry, ratio: float) -> Entry:
    """Multiply the budgets; a window keeps the query's own key."""
    least = int(entry.type == "stream_llm")
    k_v, k_s = int(entry.k_v * ratio), max(int(entry.k_s * ratio), least)
    return Entry(entry.type, k_v, k_s, entry.score)


def _fault(path: str | Path, problem: str) -> NotAConfiguration:
    way_out = "give the file of this model, or make one with search()."
    return NotAConfiguration(path=path, problem=problem, way_out=way_out)


# ---- the search ----------------------------------------------------------------------------------


@pattern
def dense(q, k, v):  # type: ignore[no-untyped-def]
    """Causal attention to every key: what the shapes are measured against."""
    return attend(q, k, v, mask="causal")


@torch.no_grad()
def search(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    candidates: Sequence[Entry] = CANDIDATES,
    by: Objective = "output",
    rows_from: int = 0,
    **options: Any,
) -> tuple[Entry, ...]:
    """Choose the best candidate for each query head of one layer, from what the layer attends to.

    q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] of a long prompt, post-rotation; a batch is
    several prompts. by "output" (the paper): the least error of the output, sum of the rows'
    |out - dense| over sum of |dense|; by "mass" (the official search): the most attention kept,
    mean over rows of exp(lse - dense lse). rows_from: the first query row that counts (the official
    search: 2500). options: as `minference` takes them. A tie goes to the earlier candidate. Each
    entry carries its score.

    The official search also writes a winning "stream_llm" down as lines of the same numbers and
    "block_sparse" as `UNTUNED`; here a winner stays what it is.
    Raises: UnknownChoice, and what a call raises.
    """
    if by not in ("output", "mass"):
        raise UnknownChoice(verb="search", name="by", value=by, choices="'output', 'mass'")
    if not candidates:
        raise UnknownChoice(verb="search", name="candidates", value=(), choices="entries to try")
    want, want_lse = api.compile(dense(), backend="reference")(q, k, v, return_lse=True)
    scores = []
    for candidate in candidates:
        attention = api.compile(candidate.pattern(**options), backend="reference")
        out, lse = attention(q, k, v, return_lse=True)
        rows = slice(rows_from, None)
        if by == "output":
            wrong = (out.float() - want.float())[:, :, rows].norm(dim=-1).sum(dim=(0, 2))
            whole = want.float()[:, :, rows].norm(dim=-1).sum(dim=(0, 2))
            scores.append(wrong / whole.clamp(min=torch.finfo(torch.float32).tiny))
        else:
            kept = (lse - want_lse)[:, :, rows].exp()
            sees = want_lse[:, :, rows] > -torch.inf
            total = kept.masked_fill(~sees, 0.0).sum(dim=(0, 2))
            scores.append(total / sees.sum(dim=(0, 2)).clamp(min=1))
    table = torch.stack(scores)
    ranked = table if by == "output" else -table
    found = []
    for head, column in enumerate(ranked.nan_to_num(nan=torch.inf).T.tolist()):
        place = column.index(min(column))
        chosen = candidates[place]
        found.append(Entry(chosen.type, chosen.k_v, chosen.k_s, float(table[place, head])))
    return tuple(found)
