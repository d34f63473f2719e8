"""NumPy models of the data movement and of the matrix product, element by element.

A model takes flat arrays and returns the destination after the instruction. Elements are opaque
bit patterns, except in `fixpipe` and `mmad`. `UNDEFINED` bytes stand where the hardware leaves
anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]

UNDEFINED = 0xFF  # every byte of an element that has no defined value
BLOCK = 32  # bytes: the unit of strides on chip
FRACTAL = 512  # bytes: 16 rows of one block


def copy_rows(dst: Bits, src: Bits, *, rows: int, blocks: int, src_gap: int, dst_gap: int) -> Bits:
    """Rows of 32 B blocks; a gap lies between the end of a row and the start of the next."""
    out: Bits = dst.copy()
    to, of = out.view(np.uint8), src.view(np.uint8)
    for row in range(rows):
        for byte in range(blocks * BLOCK):
            at_dst = row * (blocks + dst_gap) * BLOCK + byte
            to[at_dst] = of[row * (blocks + src_gap) * BLOCK + byte]
    return out


def pad_in(
    dst: Bits,
    src: Bits,
    *,
    rows: int,
    row_bytes: int,
    src_gap_bytes: int,
    dst_gap_blocks: int,
    is_pad: bool,
    left: int,
    right: int,
    value: Bits,
) -> Bits:
    """Rows of bytes from GM; in UB each begins on a block and is filled to the next one."""
    out: Bits = dst.copy()
    size = out.dtype.itemsize
    length = row_bytes // size
    used = left + length + right
    total = -(-used * size // BLOCK) * BLOCK // size
    for row in range(rows):
        line = src.view(np.uint8)[row * (row_bytes + src_gap_bytes) :][:row_bytes].view(out.dtype)
        start = row * (total + dst_gap_blocks * BLOCK // size)
        undefined = np.full(total * size, UNDEFINED, np.uint8).view(out.dtype)
        out[start : start + total] = line[0] if left == right == 0 else undefined
        if is_pad:
            out[start : start + left] = value
            out[start + left + length : start + used] = value
        out[start + left : start + left + length] = line
    return out


def pad_out(
    dst: Bits, src: Bits, *, rows: int, row_bytes: int, src_gap_blocks: int, dst_gap_bytes: int
) -> Bits:
    """Exactly `row_bytes` of each row that UB holds on block boundaries."""
    out: Bits = dst.copy()
    to, of = out.view(np.uint8), src.view(np.uint8)
    pitch = (-(-row_bytes // BLOCK) + src_gap_blocks) * BLOCK
    for row in range(rows):
        start = row * (row_bytes + dst_gap_bytes)
        to[start : start + row_bytes] = of[row * pitch : row * pitch + row_bytes]
    return out


def nd2nz(
    dst: Bits,
    src: Bits,
    *,
    matrices: int,
    rows: int,
    columns: int,
    src_matrix: int,
    src_row: int,
    dst_c0: int,
    dst_row: int,
    dst_matrix: int,
) -> Bits:
    """Columns of blocks: element (r, c) goes to block c // C0 and row r, place c % C0."""
    out: Bits = dst.copy()
    c0 = BLOCK // out.dtype.itemsize
    for matrix in range(matrices):
        for row in range(rows):
            for column in range(-(-columns // c0) * c0):
                at = (
                    matrix * dst_matrix + (column // c0 * dst_c0 + row * dst_row) * c0 + column % c0
                )
                of = matrix * src_matrix + row * src_row + column
                out[at] = src[of] if column < columns else out.dtype.type(0)
    return out


def load_2d(
    dst: Bits, src: Bits, *, start: int, repeat: int, src_stride: int, dst_gap: int, transpose: bool
) -> Bits:
    """Whole fractals, the i-th from start + i * src_stride to i * (1 + dst_gap)."""
    out: Bits = dst.copy()
    size = FRACTAL // out.dtype.itemsize
    for i in range(repeat):
        fractal = src[(start + i * src_stride) * size :][:size].reshape(16, -1)
        out[i * (1 + dst_gap) * size :][:size] = (fractal.T if transpose else fractal).ravel()
    return out


def fixpipe(
    dst: Bits, src: Bits, *, columns: int, rows: int, src_stride: int, dst_stride: int, relu: bool
) -> Bits:
    """L0C in columns of fractals to rows in GM; the type of `dst` says the conversion."""
    out: Bits = dst.copy()
    for row in range(rows):
        for column in range(columns):
            value = src[(column // 16 * src_stride + row) * 16 + column % 16]
            out[row * dst_stride + column] = max(value, src.dtype.type(0)) if relu else value
    return out


def to_fractals(matrix: Bits, *, column_major_blocks: bool) -> Bits:
    """Cut into fractals, 16 rows by one block each and row-major inside, and line these up.

    Row by row gives ZZ, the order of L0A; column by column NZ, the order of L1. L0B holds the
    transposed operand [n, k] in the latter (ZN of [k, n]). Missing rows and columns are 0.
    """
    c0 = BLOCK // matrix.dtype.itemsize
    rows, columns = -(-matrix.shape[0] // 16) * 16, -(-matrix.shape[1] // c0) * c0
    whole = np.zeros((rows, columns), matrix.dtype)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocks = whole.reshape(rows // 16, 16, columns // c0, c0)
    image: Bits = blocks.transpose((2, 0, 1, 3) if column_major_blocks else (0, 2, 1, 3)).ravel()
    return image


def from_l0c(image: Bits, rows: int, columns: int) -> Bits:
    """The [rows, columns] matrix that an L0C image in 16 x 16 fractals holds."""
    high, wide = -(-rows // 16), -(-columns // 16)
    blocks = image[: high * wide * 256].reshape(wide, high, 16, 16).transpose(1, 2, 0, 3)
    matrix: Bits = blocks.reshape(high * 16, wide * 16)[:rows, :columns]
    return matrix


def widen(bits: Bits, kind: str) -> Bits:
    """Operands as the accumulator sees them; `bf16` travels as uint16 patterns."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.int32 if kind == "int8" else np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as uint16 patterns; no NaN among the values."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def draw_operand(rng: np.random.Generator, kind: str, rows: int, columns: int) -> Bits:
    """A random matrix of an operand type of the cube."""
    if kind == "int8":
        return rng.integers(-128, 128, (rows, columns), np.int8)
    values = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    if kind == "bf16":
        return to_bf16(values)
    return values.astype(np.float16) if kind == "half" else values


def mmad(c: Bits, a: Bits, b: Bits) -> Bits:
    """c + a [m, k] @ b [k, n], one rank-one update after the other in ascending k."""
    out: Bits = c.copy()
    for depth in range(a.shape[1]):
        out = out + a[:, depth, None] * b[None, depth, :]
    return out
