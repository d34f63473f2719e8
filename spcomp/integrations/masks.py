"""Read the attention mask of a host library as "these tokens are real, and attention is causal".

A sparse pattern states its own visibility, so the one thing it needs from the host is which tokens
are padding. A mask that says anything more is refused rather than dropped.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from spcomp.errors import SpcompError

HIDES_AT = -1.0e4
"""An additive mask hides a key at or below this: exp of it is 0 in every float dtype."""


class MaskNotUnderstood(SpcompError):
    """The host's mask says more than padding and causality."""

    message = "the attention mask {problem} (given: {given}; queries: {sq}, keys: {skv})."
    help = (
        "pass the padding mask [B, Skv] (1 = real token), a causal mask with padding columns "
        "hidden, or None; any other visibility belongs into the pattern."
    )


@dataclass(frozen=True, slots=True)
class RealTokens:
    """The real query rows and keys, ascending, of the batch items that are padded alike.

    The last ``len(queries)`` of ``keys`` are the queries' own keys, so causality over the real
    tokens alone is again aligned bottom-right.
    """

    items: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]


Reading: TypeAlias = "tuple[RealTokens, ...] | None"
"""Every batch item is in one entry; None where every token is real."""


class MaskReader:
    """Reads masks, and reads one only once when every layer of a model is given the same tensor."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, int, int] | None = None
        self._reading: Reading = None

    def read(self, mask: Any, *, batch: int, sq: int, skv: int) -> Reading:
        """Give the real tokens of the batch, items that are padded alike together.

        mask: None (all real), [B, n] bool or 0/1 integers with n <= Skv (1 = real; the queries are
        the last Sq of the n), or [B or 1, H or 1, Sq, Skv] bool (True = visible) or additive float.
        A query whose own key is hidden counts as padding.

        Raises: MaskNotUnderstood.
        """
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise MaskNotUnderstood(
                problem="is not a tensor", given=type(mask).__name__, sq=sq, skv=skv
            )
        if self._last is not None:
            known, version, known_sq, known_skv = self._last
            if known() is mask and (version, known_sq, known_skv) == (mask._version, sq, skv):
                return self._reading
        self._reading = read_mask(mask, batch=batch, sq=sq, skv=skv)
        self._last = (weakref.ref(mask), mask._version, sq, skv)
        return self._reading


def read_mask(mask: Tensor, *, batch: int, sq: int, skv: int) -> Reading:
    """Give the real tokens of the batch; see `MaskReader.read`."""
    given = f"{mask.dtype} {list(mask.shape)}"
    try:
        if mask.ndim == 2:
            padding, offset = _read_padding(mask, batch, sq, skv), mask.shape[1] - sq
        elif mask.ndim == 4:
            padding, offset = _read_visibility(mask, batch, sq, skv)
        else:
            raise _Unreadable(f"has {mask.ndim} dimensions where 2 or 4 are understood")
    except _Unreadable as unreadable:
        raise MaskNotUnderstood(problem=str(unreadable), given=given, sq=sq, skv=skv) from None
    if len(padding[0]) == skv and all(all(row) for row in padding):
        return None
    alike: dict[tuple[bool, ...], list[int]] = {}
    for item, row in enumerate(padding):
        alike.setdefault(tuple(row), []).append(item)
    return tuple(_real_tokens(row, tuple(items), offset, sq) for row, items in alike.items())


class _Unreadable(Exception):
    """What is wrong with a mask, before the figures are put beside it."""


def _real_tokens(
    is_real: tuple[bool, ...], items: tuple[int, ...], offset: int, sq: int
) -> RealTokens:
    """Split one padding row; query i has the key ``offset + i`` for its own."""
    return RealTokens(
        items=items,
        queries=tuple(i for i in range(sq) if offset + i >= 0 and is_real[offset + i]),
        keys=tuple(j for j, real in enumerate(is_real) if real),
    )


def _read_padding(mask: Tensor, batch: int, sq: int, skv: int) -> list[list[bool]]:
    rows, tokens = mask.shape
    if rows != batch or not sq <= tokens <= skv:
        raise _Unreadable(f"is not of {batch} rows and {sq} to {skv} columns")
    if mask.is_floating_point() or bool(((mask != 0) & (mask != 1)).any()):
        raise _Unreadable("holds something other than 0 and 1")
    padding: list[list[bool]] = mask.bool().tolist()
    return padding


def _read_visibility(mask: Tensor, batch: int, sq: int, skv: int) -> tuple[list[list[bool]], int]:
    rows, heads = mask.shape[:2]
    if rows not in (1, batch) or tuple(mask.shape[2:]) != (sq, skv):
        raise _Unreadable(f"is not [{batch} or 1, heads or 1, {sq}, {skv}]")
    visible = _visible(mask)
    if heads > 1 and not torch.equal(visible, visible[:, :1].expand_as(visible)):
        raise _Unreadable("differs between heads")
    visible = visible[:, 0]
    real = visible.any(dim=1)  # [rows, Skv]: some query sees this key
    offset = _causal_offset(visible, real)
    padding: list[list[bool]] = real.tolist()
    return padding * (batch if rows == 1 else 1), offset


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise _Unreadable("is of integers, which may mean visible or hidden")
    visible = mask == 0
    if not bool((visible | (mask <= HIDES_AT)).all()):
        raise _Unreadable(f"adds a bias: it holds values between {HIDES_AT:g} and 0, or above 0")
    return visible


def _causal_offset(visible: Tensor, real: Tensor) -> int:
    """Find o such that query i sees exactly the real keys j <= i + o.

    Aligned bottom-right o = Skv - Sq. Keys at the end that no query sees are room left in a cache
    (not there yet, tried first) or padding on the right.
    """
    sq, skv = visible.shape[1:]
    seen = real.any(dim=0).nonzero()
    filled = int(seen[-1]) + 1 if len(seen) else skv
    rows = torch.arange(sq, device=visible.device)[:, None]
    columns = torch.arange(skv, device=visible.device)
    for offset in dict.fromkeys((filled - sq, skv - sq)):
        if torch.equal(visible, real[:, None, :] & (columns <= rows + offset)):
            return offset
    raise _Unreadable("is not causal with padding")
