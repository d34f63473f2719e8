"""One call of a pattern: its tensors, its lengths, and what spans all rows, made once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spcomp.backends.reference.pooling import (
    Grid,
    Pooled,
    block_grid,
    compute_dtype,
    fold,
    last_grid,
    pool,
    pooled_grid,
    token_grid,
)
from spcomp.backends.reference.tokens import by_head, centred, similarity
from spcomp.errors import CannotLower, MissingTensor
from spcomp.ir import dims
from spcomp.ir.nodes import (
    Argument,
    Attend,
    Captured,
    Centre,
    Downsample,
    Fold,
    Gather,
    Input,
    Node,
    Permute,
    Probe,
    Score,
    Similar,
    State,
    Stream,
)
from spcomp.ir.program import Program


class Call:
    """A program on the tensors of one call.

    `tensors` holds q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv], what the call brings beside
    them, and the captured tables, by name; `kept` the states that are read instead of being pooled,
    `<name>.max` and, of a minmax pair, `<name>.min`. Pooled units, and keys in the dtype of the
    computation, are made here, so that what runs for each chunk of rows leaves nothing behind (a
    chunk may run twice: once more when its gradient is asked for).
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.program, self.kept = program, kept or {}
        # One layout, so that the strides of the caller change no bit of the result.
        self.tensors = {name: x.contiguous() for name, x in tensors.items()}
        stages = program.stages()
        names: dict[str, str] = {n.role: n.name for n in stages if isinstance(n, Input)}
        q, k, v = (
            tensors[names.get(role, default)]
            for role, default in (("query", "q"), ("key", "k"), ("value", "v"))
        )
        self.env = {
            "B": int(q.shape[0]),
            "Hq": int(q.shape[1]),
            "Hkv": int(k.shape[1]),
            "Sq": int(q.shape[2]),
            "Skv": int(k.shape[2]),
            "D": int(q.shape[3]),
            "Dv": int(v.shape[3]),
        }
        for argument in program.arguments():
            if argument.name not in tensors:
                form = f"[{', '.join(str(d) for d in argument.dims)}]"
                raise MissingTensor(
                    pattern=program.name, name=argument.name, form=form, given="none"
                )
            dims.bind(argument.dims, tensors[argument.name].shape, self.env)
        self.dtype, self.out_dtype, self.device = compute_dtype(q.dtype), q.dtype, q.device
        self._values: dict[Node, Pooled] = {}
        self._grids: dict[Node, Grid] = {}
        self._wide: dict[Node, Pooled] = {}
        # What all rows share and selections read: sums along lines, counts, choices of the head.
        self.known: dict[Node, Tensor] = {}
        self._alike: dict[Node, Tensor] = {}
        for node in stages:
            self._prepare(node)

    def _prepare(self, node: Node) -> None:
        if isinstance(node, (Downsample, State)):
            self.value(node)
            self.grid(node)
        elif isinstance(node, (Centre, Permute)):
            self.value(node)
        elif isinstance(node, Similar):
            self.alike(node)
        elif isinstance(node, Score):
            self.wide(node.k)
        elif isinstance(node, Attend):
            for part in node.streams:
                held = stream_of(part)
                self.wide(held.k)
                self.wide(held.v)

    @property
    def shift(self) -> int:
        """The position of query row 0: Skv - Sq."""
        return self.env["Skv"] - self.env["Sq"]

    def number(self, dim: dims.Dim) -> int:
        """Evaluate a dim for this call."""
        return dims.evaluate(dim, self.env)

    def tensor(self, node: Node) -> Tensor:
        """Give the tensor of an input, or of a value pooled to one tensor."""
        return single(node, self.value(node))

    def value(self, node: Node) -> Pooled:
        """Give a value and, for a minmax pair, its minima: [B,H,U,D] in the dtype of the input."""
        if isinstance(node, (Input, Captured, Argument)):
            return self.tensors[node.name], None
        if isinstance(node, State):
            return self._state(node)
        if isinstance(node, Fold):
            return fold(self.tensor(node.x), node.size, node.reverse), None
        if isinstance(node, Probe):
            q = self.tensor(node.x)
            return q[:, :, max(0, q.shape[2] - node.rows) :], None
        if isinstance(node, (Centre, Permute)):
            if node not in self._values:
                self._values[node] = self._retaken(node), None
            return self._values[node]
        assert isinstance(node, Downsample), node
        if node not in self._values:
            count = self.grid(node).count
            x, padded = self.tensor(node.x), node.tail == "pad"
            self._values[node] = pool(x, node.by, node.block, node.stride, count, padded)
        return self._values[node]

    def _retaken(self, node: Centre | Permute) -> Tensor:
        x = self.tensor(node.x)
        return centred(x) if isinstance(node, Centre) else x[:, :, self.tensor(node.order).long()]

    def alike(self, node: Similar) -> Tensor:
        """Tell which blocks of a similar() are alike, bool [B,H,U]; H is Hq, or Hkv for keys that
        are judged once for the heads of a group. Negation is left to the reader."""
        node = ~node if node.negated else node
        if node not in self._alike:
            values = similarity(self.tensor(node.x), node.block)
            least: float | Tensor | None = node.least
            if node.least_by_head is not None:
                table = self.tensor(node.least_by_head).to(values.dtype)[None, :, None]
                heads = max(table.shape[1], values.shape[1])
                values = by_head(values, heads, "blocks that are judged")
                least = by_head(table, heads, "a least similarity")
            assert least is not None
            self._alike[node] = values > least
        return self._alike[node]

    def _state(self, node: State) -> Pooled:
        """Read a state that is kept, or make its value."""
        if f"{node.name}.max" not in self.kept:
            return self.value(node.value)
        units = self.grid(node).count
        high, low = (self.kept.get(f"{node.name}.{side}") for side in ("max", "min"))
        assert high is not None
        return high[:, :, :units], None if low is None else low[:, :, :units]

    def wide(self, node: Node) -> Pooled:
        """Give a value in the dtype of the computation."""
        if node not in self._wide:
            values, low = self.value(node)
            self._wide[node] = (
                values.to(self.dtype),
                None if low is None else low.to(self.dtype),
            )
        return self._wide[node]

    def grid(self, node: Node) -> Grid:
        """Tell which tokens each unit of a value stands for."""
        if isinstance(node, State):
            return self.grid(node.value)
        if node not in self._grids:
            if isinstance(node, Downsample):
                self._grids[node] = pooled_grid(self.grid(node.x), node)
            elif isinstance(node, Fold):
                self._grids[node] = block_grid(self.grid(node.x).tokens, node.size, self.device)
            elif isinstance(node, Probe):
                self._grids[node] = last_grid(self.grid(node.x), node.rows)
            else:
                self._grids[node] = token_grid(int(self.tensor(node).shape[2]), self.device)
        return self._grids[node]


def single(node: Node, value: Pooled) -> Tensor:
    """Give the one tensor of a value.

    Raises: CannotLower for a minmax pair.
    """
    if value[1] is not None:
        raise CannotLower(
            where=node.where,
            what="a minmax pair in the place of one tensor",
            why="only score() reads a pair",
            way_out="pool it by mean, max or min",
        )
    return value[0]


def stream_of(part: Node) -> Stream:
    """Give the stream an attend reads, gathered or not."""
    held = part.stream if isinstance(part, Gather) else part
    assert isinstance(held, Stream), held
    return held
