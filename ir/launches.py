"""The launches a plan is made of. Each class says what its kernel computes; a backend says how.

Row-like buffers of a slab hold slab-local rows: row 0 is query row R0. Lists are indices
[B|1,Hl,Nr,K] i32 ascending, -1 at the end, and counts [B|1,Hl,Nr] i32; their heads are Hq, Hkv or
1, told by the buffer's dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spcomp.ir import dims
from spcomp.ir.dims import Dim
from spcomp.ir.expr import Expr
from spcomp.ir.nodes.downsample import Pooling
from spcomp.ir.nodes.score import Activation, HeadSharing, Joining, Reduction
from spcomp.ir.nodes.select import Crossing
from spcomp.ir.plan import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLaunch(Launch):
    """Downsample x [B,H,S,D] to out [B,H,U,D]; `minmax` also writes the minima to low."""

    x_buf: str
    out_buf: str
    low_buf: str = ""
    block: int
    stride: int
    by: Pooling

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "pool"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.out_buf, self.low_buf) if self.low_buf else (self.out_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """What a score means, for the launches that compute it; `activation` and the weights of a
    launch come before heads are joined.

    `visible` and `forced` are predicates over q_lo, q_hi (the row's first and last query), k (the
    unit), b, h, Sq, Skv."""

    heads: HeadSharing
    reduce: Reduction
    scale: float
    granule: int
    visible: Expr
    forced: Expr
    activation: Activation = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectLaunch(Launch):
    """Score and exact top-k in one kernel: a program scores a tile of rows and keeps their best
    units.

    keys_buf is scratch of [programs' rows, units] int32 that rows longer than one tile use.
    weights_buf, when named, is [B,Hq,Sq]: what the scores of a head and row are multiplied by.
    """

    rows_buf: str
    units_buf: str
    low_buf: str = ""
    weights_buf: str = ""
    keys_buf: str
    indices_buf: str
    counts_buf: str
    rule: ScoreRule
    k: Dim
    width: Dim

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "select"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.keys_buf, self.indices_buf, self.counts_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLaunch(Launch):
    """Scores alone, [B,Hl,Nr,Nk] f32: -inf for units that are no candidate, +inf for forced
    ones. weights_buf as in SelectLaunch."""

    rows_buf: str
    units_buf: str
    low_buf: str = ""
    weights_buf: str = ""
    scores_buf: str
    rule: ScoreRule

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "score"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.scores_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKLaunch(Launch):
    """Exact top-k of each row of scores; ties go to the lower index."""

    scores_buf: str
    indices_buf: str
    counts_buf: str
    k: Dim
    width: Dim

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "topk"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.indices_buf, self.counts_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRule:
    """The logits of a map: one for each fine row of queries and each unit of keys.

    A product sums the dot products of `size` pairs of tokens, without folding of one; with
    `is_crossed` the first query of a row meets the last key of a unit. It is multiplied by `scale`
    and, with `is_head_scaled`, by 1/sqrt(D). A fine row stands for `granule` queries. `visible`
    tells over q_lo, q_hi (its first and last query) and k (the unit), Sq and Skv which units are
    its candidates; what one row sees of the units is a prefix of them."""

    size: int = 1
    is_crossed: bool = False
    scale: float = 1.0
    is_head_scaled: bool = False
    granule: int = 1
    visible: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsLaunch(Launch):
    """The log-sum-exp of each part of a fine row: of `part` (an axis) units in a row.

    parts [B,Hq,Nf,ceil(units/part)] f32, natural log, -inf where a part has no candidate."""

    rows_buf: str
    units_buf: str
    low_buf: str = ""
    parts_buf: str
    rule: MapRule
    units: Dim

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "part_lse"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.parts_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLseLaunch(Launch):
    """The log-sum-exp of each fine row from those of its parts: lse [B,Hq,Nf] f32, -inf for a row
    without candidates."""

    parts_buf: str
    lse_buf: str

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "row_lse"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.lse_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSumsLaunch(Launch):
    """Block scores [B,Hl,Nr,Nb] f32 by sums of probabilities, from parts that are the blocks.

    A block's score is the sum of exp(part - lse) over the fine rows of its row and the heads of its
    list. Marked as ScoreLaunch marks them, by `rule`, whose granule is that of a row."""

    parts_buf: str
    lse_buf: str
    scores_buf: str
    fine: int
    rule: ScoreRule

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "block_sums"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.scores_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScoresLaunch(Launch):
    """Block scores [B,Hl,Nr,Nb] f32 from logits, which it computes.

    With lse_buf a unit's value is exp(logit - lse of its fine row), else its logit. Values of the
    heads of a list are joined by rule.reduce, then those of the units that touch a block, and of
    the fine rows of a row, by `by`: a sum weighs each unit by its tokens in the block over
    `stride`. A unit that is no candidate is left out; a block without any has 0, or the lowest
    finite number by "max" of plain logits. Marked as ScoreLaunch marks them, by `rule`.

    span, stride: tokens of a unit, and from one to the next. block: tokens of a block."""

    rows_buf: str
    units_buf: str
    low_buf: str = ""
    lse_buf: str = ""
    scores_buf: str
    logits: MapRule
    units: Dim
    span: int
    stride: int
    block: int
    by: Joining
    rule: ScoreRule

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "block_scores"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.scores_buf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopPLaunch(Launch):
    """Keep the best units of each row of scores that together hold a share of it (see
    `ir.nodes.TopP`); -inf in scores: no candidate. `forced` is as in ScoreRule, of rows of
    `granule` queries. The share is `p`, or that of the list's head in share_buf [Hl] f32."""

    scores_buf: str
    indices_buf: str
    counts_buf: str
    share_buf: str = ""
    p: float = 0.0
    crossing: Crossing
    least: int
    granule: int
    forced: Expr
    width: Dim

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "topp"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.indices_buf, self.counts_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListLeaf:
    """A list inside a tile predicate: row r covers `granule` query rows, an index `unit` key
    tokens."""

    granule: int
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesLaunch(Launch):
    """Lists of the key tiles of each query tile, partial ones first, then full ones.

    tiles [B|1,Hl,Nt,C] i32: tile number in the low 24 bits, bit 24+n set when list n chose it;
    partial, total [B|1,Hl,Nt] i32. `everywhere` and `somewhere` bound `predicate` over a tile
    (q_lo..q_hi, k_lo..k_hi); when `exact` is False the elements decide. `counter`, when named, is
    set to 0 for the launch that takes its work from there. `keys` counts the entries of the stream;
    k is an entry's number, Sq and Skv stay token lengths."""

    list_bufs: tuple[str, ...]
    count_bufs: tuple[str, ...]
    leaves: tuple[ListLeaf, ...]
    table_bufs: tuple[str, ...] = ()
    tiles_buf: str
    partial_buf: str
    total_buf: str
    counter_buf: str = ""
    predicate: Expr
    everywhere: Expr
    somewhere: Expr
    exact: bool
    capacity: Dim
    keys: Dim = dims.Skv

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "tiles"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        written = (self.tiles_buf, self.partial_buf, self.total_buf)
        return (*written, self.counter_buf) if self.counter_buf else written


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendRule:
    """What an attend computes on a pair: the predicate, the score hook, the softmax scale.

    `flags` are the symbols chosen0… the predicate reads, taken from the entries of a tile list.
    scale None: 1/sqrt(D)."""

    predicate: Expr
    flags: tuple[str, ...] = ()
    score_mod: Expr | None = None
    scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendLaunch(Launch):
    """Query-major: a program holds a tile of queries and walks its list of key tiles.

    `keys` counts the entries of the stream, tokens or units. sinks_buf [Hq], when named: logits
    that join the denominator once lse is taken. Only the launch that ends the softmax has them, the
    one that writes the results."""

    q_buf: str
    k_buf: str
    v_buf: str
    out_buf: str
    lse_buf: str
    tiles_buf: str
    partial_buf: str
    total_buf: str
    table_bufs: tuple[str, ...] = ()
    sinks_buf: str = ""
    rule: AttendRule
    keys: Dim = dims.Skv

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "attend"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.out_buf, self.lse_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpsLaunch(AttendLaunch):
    """Query-major, warp-specialised: one warp copies tiles while others multiply; programs stay and
    draw their work from `counter`, which the launch before has set to 0.

    A program holds `heads` query heads of one list over `block_q` queries; a step takes `entries`
    of the list, `block_k` keys each."""

    counter_buf: str
    entries: int

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "attend_ws"

    @property
    def rows(self) -> int:
        """Rows (queries x heads) of a program."""
        return self.axis("heads") * self.axis("block_q")

    @property
    def step(self) -> int:
        """Keys of a step."""
        return self.entries * self.axis("block_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherLaunch(Launch):
    """A program gathers the keys of one list row for the query heads that share it.

    A row covers `granule` query rows, an index `unit` of the `keys` entries of the stream. With
    `splits` > 1 the keys of a row are split over programs, and out and lse have a leading axis of
    that length for `MergeLaunch`. sinks_buf: as in `AttendLaunch`."""

    q_buf: str
    k_buf: str
    v_buf: str
    out_buf: str
    lse_buf: str
    list_buf: str
    count_buf: str
    table_bufs: tuple[str, ...] = ()
    sinks_buf: str = ""
    granule: int
    unit: int
    splits: Dim
    rule: AttendRule
    keys: Dim = dims.Skv

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "attend_gather"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.out_buf, self.lse_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertLaunch(Launch):
    """Turn lists of units per row into lists of rows per unit.

    step "count": counts of each chunk of rows [B,Hl,Nk,C]; "scan": their exclusive prefix in place,
    and the first entry and first row tile of each unit, [B,Hl,Nk+1]; "fill": entries [B,Hl,Nr*K] =
    row*K + slot, grouped by unit, rows ascending."""

    step: Literal["count", "scan", "fill"]
    list_buf: str
    count_buf: str
    prefix_buf: str
    unit_start_buf: str
    tile_start_buf: str
    entries_buf: str
    units: Dim

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return f"invert_{self.step}"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return {
            "count": (self.prefix_buf,),
            "scan": (self.prefix_buf, self.unit_start_buf, self.tile_start_buf),
            "fill": (self.entries_buf,),
        }[self.step]

    def reads(self) -> tuple[str, ...]:
        """Give the buffers it reads."""
        return {
            "count": (self.list_buf, self.count_buf),
            "scan": (self.prefix_buf,),
            "fill": (self.list_buf, self.count_buf, self.prefix_buf, self.unit_start_buf),
        }[self.step]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysLaunch(Launch):
    """Key-major: a program holds queries that chose one unit and walks its keys.

    Writes parts [B,Hq,R,K,Dv] f32 and their lse [B,Hq,R,K], slab-local rows, one slot a list entry.
    `keys` counts the entries of the stream.
    """

    q_buf: str
    k_buf: str
    v_buf: str
    part_buf: str
    part_lse_buf: str
    entries_buf: str
    unit_start_buf: str
    tile_start_buf: str
    table_bufs: tuple[str, ...] = ()
    unit: int
    units: Dim
    everywhere: Expr
    somewhere: Expr
    exact: bool
    rule: AttendRule
    keys: Dim = dims.Skv

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "attend_keys"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.part_buf, self.part_lse_buf)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLaunch(Launch):
    """Join parts by LSE, or by gates [B,Hq,Sq,P] where gates_buf names them; the lse is that of all
    their keys either way.

    axis 0: parts [P,B,Hq,R,Dv], all valid. axis 3: parts [B,Hq,R,P,Dv], of which row r has
    count_buf[b, head, r] (when named). sinks_buf: as in `AttendLaunch`."""

    part_buf: str
    part_lse_buf: str
    count_buf: str = ""
    sinks_buf: str = ""
    gates_buf: str = ""
    out_buf: str
    lse_buf: str
    parts: Dim
    part_axis: Literal[0, 3]

    @property
    def kernel(self) -> str:
        """The template that makes it."""
        return "merge"

    def writes(self) -> tuple[str, ...]:
        """Give the buffers it writes."""
        return (self.out_buf, self.lse_buf)


LAUNCHES: dict[str, type[Launch]] = {
    c.__name__: c
    for c in (
        PoolLaunch,
        SelectLaunch,
        ScoreLaunch,
        TopKLaunch,
        PartsLaunch,
        RowLseLaunch,
        BlockSumsLaunch,
        BlockScoresLaunch,
        TopPLaunch,
        TilesLaunch,
        AttendLaunch,
        WarpsLaunch,
        GatherLaunch,
        InvertLaunch,
        KeysLaunch,
        MergeLaunch,
    )
}
