"""What each vector instruction does to the unified buffer, in NumPy.

Written from the documented behaviour of the instructions, not from the emulator. The buffer is an
array of bytes, so that a byte written too many shows as much as a wrong value. A repeat covers 8
blocks of 32 bytes; block b of repeat r of an operand starts (r * repeat stride + b * block stride)
blocks after its first byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

BLOCK = 32
REPEAT = 256

Bytes = NDArray[np.uint8]
Values = NDArray[Any]


@dataclass(frozen=True)
class Operand:
    """Where an operand starts, in bytes, and how it strides, in blocks."""

    offset: int
    block: int = 1
    repeat: int = 8

    def addresses(self, dtype: DTypeLike, repeat: int, lanes: Sequence[int]) -> NDArray[np.int64]:
        size = np.dtype(dtype).itemsize
        lane = np.asarray(lanes, np.int64)
        block, within = lane * size // BLOCK, lane * size % BLOCK
        return self.offset + (repeat * self.repeat + block * self.block) * BLOCK + within


@dataclass(frozen=True)
class Lanes:
    """The active lanes of each repeat; the count form is one repeat as long as the count."""

    active: tuple[tuple[int, ...], ...]
    width: int

    @staticmethod
    def counted(count: int, width: int) -> Lanes:
        return Lanes((tuple(range(count)),), width)

    @staticmethod
    def leading(mask: int, repeats: int, width: int) -> Lanes:
        return Lanes((tuple(range(mask)),) * repeats, width)

    @staticmethod
    def of_bits(bits: Sequence[int], repeats: int, width: int) -> Lanes:
        on = tuple(lane for lane in range(width) if bits[lane // 64] >> (lane % 64) & 1)
        return Lanes((on,) * repeats, width)

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return iter(enumerate(self.active))

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Every active lane's number, counted over all lanes of all repeats."""
        every = [repeat * self.width + lane for repeat, on in self for lane in on]
        return np.array(every, np.int64)


def lanes_of(dtype: DTypeLike) -> int:
    return REPEAT // np.dtype(dtype).itemsize


def load(ub: Bytes, dtype: DTypeLike, addresses: NDArray[np.int64]) -> Values:
    raw: Bytes = ub[addresses[:, None] + np.arange(np.dtype(dtype).itemsize)]
    values: Values = raw.copy().view(dtype)[:, 0]
    return values


def store(ub: Bytes, addresses: NDArray[np.int64], values: Values) -> None:
    size = values.dtype.itemsize
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
    ub[addresses[:, None] + np.arange(size)] = raw


# ---- Lane by lane


def elementwise(
    ub: Bytes,
    lanes: Lanes,
    out_type: DTypeLike,
    dst: Operand,
    in_type: DTypeLike,
    sources: Sequence[Operand],
    compute: Callable[..., Values],
) -> None:
    """Repeat by repeat, so that a repeat may add onto the result of the one before it."""
    for repeat, on in lanes:
        read = [load(ub, in_type, source.addresses(in_type, repeat, on)) for source in sources]
        with np.errstate(over="ignore"):
            result = compute(*read).astype(out_type)
        store(ub, dst.addresses(out_type, repeat, on), result)


def in_single(function: Callable[..., Values]) -> Callable[..., Values]:
    """half computes in float32 and rounds once."""

    def compute(*values: Values) -> Values:
        wide = [v.astype(np.float32) if v.dtype == np.float16 else v for v in values]
        with np.errstate(all="ignore"):
            return function(*wide)

    return compute


def in_double(function: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """The value nearest to the true one: computed in double, rounded to float32."""

    def compute(values: Values) -> Values:
        with np.errstate(all="ignore"):
            return function(values.astype(np.float64)).astype(np.float32)

    return compute


BINARY: dict[str, Callable[..., Values]] = {
    "Add": in_single(np.add),
    "Sub": in_single(np.subtract),
    "Mul": in_single(np.multiply),
    "Max": in_single(np.maximum),
    "Min": in_single(np.minimum),
    "Div": in_single(np.divide),
    "And": np.bitwise_and,
    "Or": np.bitwise_or,
}
UNARY: dict[str, Callable[[Values], Values]] = {
    "Exp": in_double(np.exp),
    "Ln": in_double(np.log),
    "Sqrt": in_double(np.sqrt),
    "Abs": np.abs,
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Reciprocal": in_double(np.reciprocal),
    "Not": np.invert,
}


def duplicate(ub: Bytes, lanes: Lanes, dtype: DTypeLike, dst: Operand, value: float) -> None:
    for repeat, on in lanes:
        store(ub, dst.addresses(dtype, repeat, on), np.full(len(on), value, dtype))


def create_index(ub: Bytes, lanes: Lanes, dtype: DTypeLike, dst: Operand, first: int) -> None:
    for repeat, on in lanes:
        numbers = first + repeat * lanes.width + np.array(on, np.int64)
        store(ub, dst.addresses(dtype, repeat, on), numbers.astype(dtype))


def brcb(ub: Bytes, repeats: int, dtype: DTypeLike, dst: Operand, src: Operand) -> None:
    size = np.dtype(dtype).itemsize
    for repeat in range(repeats):
        for block in range(8):
            element = src.offset + (repeat * 8 + block) * size
            target = dst.offset + (repeat * dst.repeat + block * dst.block) * BLOCK
            ub[target : target + BLOCK] = np.tile(ub[element : element + size], BLOCK // size)


# ---- Rounding


def rounded(units: Values, mode: str) -> Values:
    """Whole numbers near `units` (float64), in one of the Cast modes."""
    below = np.floor(units)
    if mode == "CAST_FLOOR":
        return below
    if mode == "CAST_CEIL":
        return np.ceil(units)
    if mode == "CAST_TRUNC":
        return np.trunc(units)
    if mode == "CAST_ROUND":
        return np.copysign(np.floor(np.abs(units) + 0.5), units)
    if mode == "CAST_ODD":
        odd = np.where(below % 2 == 1, below, below + 1)
        return np.where(units == below, below, odd)
    return np.rint(units)  # CAST_RINT, and CAST_NONE where it loses bits


def to_float_of(values: Values, mantissa: int, least: int, mode: str) -> Values:
    """float32 values on the grid of a float with `mantissa` stored bits, least exponent `least`."""
    wide = values.astype(np.float64)
    finite = np.isfinite(wide) & (wide != 0)
    exponent = np.frexp(np.where(finite, wide, 1.0))[1] - 1
    unit = np.ldexp(1.0, np.maximum(exponent, least) - mantissa)
    return np.where(finite, rounded(np.where(finite, wide, 0.0) / unit, mode) * unit, wide)


def cast(values: Values, to: str, mode: str) -> Values:
    """bfloat16 travels as the uint16 of its bits; `to` names the result type."""
    if to == "half":
        with np.errstate(over="ignore"):
            return to_float_of(values, 10, -14, mode).astype(np.float16)
    if to == "bfloat16_t":
        with np.errstate(over="ignore"):
            single = to_float_of(values, 7, -126, mode).astype(np.float32)
        return (single.view(np.uint32) >> 16).astype(np.uint16)
    if to == "int32_t":
        return rounded(values.astype(np.float64), mode).astype(np.int32)
    if values.dtype == np.int32:
        return to_float_of(values.astype(np.float64), 23, -126, mode).astype(np.float32)
    return values.astype(np.float32)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- Reductions


def best_lane(values: Values, largest: bool) -> int:
    """The position of the best value; the first of equals."""
    return int(np.argmax(values) if largest else np.argmin(values))


def index_bits(index: int, dtype: DTypeLike) -> Values:
    """An index as the raw bits of a slot."""
    raw = np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint32
    return np.array([index], raw).view(dtype)


def whole_reduce(
    ub: Bytes,
    lanes: Lanes,
    dtype: DTypeLike,
    dst: int,
    gap: int,
    src: Operand,
    kind: str,
    order: str = "ORDER_VALUE_INDEX",
) -> None:
    """kind: Max, Min or Sum. `gap` is in result units: two elements with value and index."""
    size = np.dtype(dtype).itemsize
    for repeat, on in lanes:
        values = load(ub, dtype, src.addresses(dtype, repeat, on))
        if kind == "Sum":
            result = [values.astype(np.float64).sum().astype(dtype).reshape(1)]
        else:
            at = best_lane(values, kind == "Max")
            value, index = values[at : at + 1], index_bits(on[at], dtype)
            result = {
                "ORDER_VALUE_INDEX": [value, index],
                "ORDER_INDEX_VALUE": [index, value],
                "ORDER_ONLY_VALUE": [value],
                "ORDER_ONLY_INDEX": [index],
            }[order]
        first = dst + repeat * gap * len(result) * size
        store(ub, first + size * np.arange(len(result)), np.concatenate(result))


def block_reduce(
    ub: Bytes, lanes: Lanes, dtype: DTypeLike, dst: int, gap: int, src: Operand, kind: str
) -> None:
    """Eight results a repeat, undefined for a block without an active lane."""
    size = np.dtype(dtype).itemsize
    per_block = BLOCK // size
    for repeat, on in lanes:
        for block in range(8):
            inside = [lane for lane in on if lane // per_block == block]
            at = dst + (repeat * gap * 8 + block) * size
            if not inside:
                ub[at : at + size] = 0xFF
                continue
            values = load(ub, dtype, src.addresses(dtype, repeat, inside)).astype(np.float64)
            result = values.max() if kind == "Max" else values.sum()
            store(ub, np.array([at]), np.array([result]).astype(dtype))


def reduce_all(
    ub: Bytes,
    lanes: Lanes,
    dtype: DTypeLike,
    dst: int,
    src: Operand,
    scratch: tuple[int, int],
    kind: str,
    with_index: bool,
) -> None:
    """One result at `dst`. scratch: first and end byte, undefined afterwards."""
    read = [load(ub, dtype, src.addresses(dtype, repeat, on)) for repeat, on in lanes]
    values = np.concatenate(read)
    ub[scratch[0] : scratch[1]] = 0xFF
    if kind == "Sum":
        result = values.astype(np.float64).sum().astype(dtype).reshape(1)
    else:
        at = best_lane(values, kind == "Max")
        result = values[at : at + 1]
        if with_index:
            result = np.concatenate([result, index_bits(int(lanes.numbers[at]), dtype)])
    store(ub, dst + result.dtype.itemsize * np.arange(len(result)), result)


# ---- Masks


COMPARE: dict[str, Callable[..., Values]] = {
    "LT": np.less,
    "GT": np.greater,
    "EQ": np.equal,
    "LE": np.less_equal,
    "GE": np.greater_equal,
    "NE": np.not_equal,
}


def compare(
    ub: Bytes,
    lanes: Lanes,
    dtype: DTypeLike,
    dst: int,
    src0: Operand,
    other: Operand | float,
    mode: str,
) -> None:
    bits: list[Values] = []
    for repeat, on in lanes:
        a = load(ub, dtype, src0.addresses(dtype, repeat, on))
        if isinstance(other, Operand):
            b = load(ub, dtype, other.addresses(dtype, repeat, on))
        else:
            b = np.full(len(on), other, dtype)
        bits.append(COMPARE[mode](a, b))
    packed = np.packbits(np.concatenate(bits), bitorder="little")
    ub[dst : dst + len(packed)] = packed


def select(
    ub: Bytes,
    lanes: Lanes,
    dtype: DTypeLike,
    dst: Operand,
    mask: int,
    src0: Operand,
    other: Operand | float,
    shared: bool,
) -> None:
    """shared: every repeat reads the mask bits of the first."""
    stream = np.unpackbits(ub[mask:], bitorder="little").astype(bool)
    for repeat, on in lanes:
        numbers = np.array(on, np.int64)
        numbers = numbers % lanes.width if shared else repeat * lanes.width + numbers
        a = load(ub, dtype, src0.addresses(dtype, repeat, on))
        if isinstance(other, Operand):
            b = load(ub, dtype, other.addresses(dtype, repeat, on))
        else:
            b = np.full(len(on), other, dtype)
        store(ub, dst.addresses(dtype, repeat, on), np.where(stream[numbers], a, b))


# ---- Gathering


def gather(
    ub: Bytes,
    lanes: Lanes,
    dtype: DTypeLike,
    dst: Operand,
    src: int,
    offsets: int,
    base: int,
) -> None:
    numbers = lanes.numbers
    where = load(ub, np.uint32, offsets + 4 * numbers).astype(np.int64)
    values = load(ub, dtype, src + base + where)
    first = 0
    for repeat, on in lanes:
        store(ub, dst.addresses(dtype, repeat, on), values[first : first + len(on)])
        first += len(on)


def gather_mask(
    ub: Bytes,
    dtype: DTypeLike,
    dst: int,
    src: Operand,
    pattern: int | Operand,
    width: int,
    repeats: int,
) -> int:
    """pattern: 1 to 7, or where its bits start. Packs the kept elements; returns their number."""
    kept: list[Values] = []
    for repeat in range(repeats):
        lane = np.arange(width)
        values = load(ub, dtype, src.addresses(dtype, repeat, list(range(width))))
        if isinstance(pattern, Operand):
            first = pattern.offset + repeat * pattern.repeat * BLOCK
            keep = np.unpackbits(ub[first:], bitorder="little")[:width].astype(bool)
        elif pattern <= 2:
            keep = lane % 2 == pattern - 1
        else:
            keep = (lane % 4 == pattern - 3) | (pattern == 7)
        kept.append(values[keep])
    packed = np.concatenate(kept)
    store(ub, dst + packed.dtype.itemsize * np.arange(len(packed)), packed)
    return len(packed)


# ---- Sorting


def store_pairs(ub: Bytes, dst: int, scores: Values, indices: NDArray[np.uint32]) -> None:
    """8 bytes a pair: the score in the low bytes, the index in the upper four, poison between."""
    pairs = np.full((len(scores), 8), 0xFF, np.uint8)
    size = scores.dtype.itemsize
    pairs[:, :size] = np.ascontiguousarray(scores).view(np.uint8).reshape(-1, size)
    pairs[:, 4:] = np.ascontiguousarray(indices).view(np.uint8).reshape(-1, 4)
    ub[dst : dst + pairs.size] = pairs.ravel()


def load_pairs(
    ub: Bytes, dtype: DTypeLike, src: int, count: int
) -> tuple[Values, NDArray[np.uint32]]:
    at = src + 8 * np.arange(count)
    return load(ub, dtype, at), load(ub, np.uint32, at + 4)


def descending(scores: Values) -> NDArray[np.int64]:
    """The stable order in which scores fall."""
    return np.argsort(-scores.astype(np.float64), kind="stable")


def sort32(ub: Bytes, dtype: DTypeLike, dst: int, src: int, index: int, repeats: int) -> None:
    size = np.dtype(dtype).itemsize
    for repeat in range(repeats):
        lane = repeat * 32 + np.arange(32)
        scores = load(ub, dtype, src + size * lane)
        indices = load(ub, np.uint32, index + 4 * lane)
        order = descending(scores)
        store_pairs(ub, dst + 256 * repeat, scores[order], indices[order])


def merge(
    ub: Bytes,
    dtype: DTypeLike,
    dst: int,
    sources: Sequence[int],
    lengths: Sequence[int],
    suspends: bool = False,
) -> int:
    """Merge descending lists. Returns the number of pairs written."""
    loaded = [load_pairs(ub, dtype, s, n) for s, n in zip(sources, lengths, strict=True)]
    scores = np.concatenate([pair[0] for pair in loaded])
    indices = np.concatenate([pair[1] for pair in loaded])
    order = descending(scores)
    if suspends:  # up to the pair that uses up the first list
        ends = np.cumsum(lengths) - 1
        order = order[: min(int(np.flatnonzero(order == end)[0]) for end in ends) + 1]
    store_pairs(ub, dst, scores[order], indices[order])
    return len(order)
