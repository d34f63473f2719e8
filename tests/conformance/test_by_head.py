"""Rules that differ by head are data: a window, a sink and a choice by table, on every backend that
takes them, against their definition."""

from __future__ import annotations

import pytest
import torch

import spcomp as sp
from spcomp.backends import registry
from spcomp.errors import CannotLower, Refused
from tests import oracle
from tests.conformance.cases import device_of, why_not

SINKS, SIZES, WHICH = [0, 3, 1, 40, 2, 2], [4, 1, 90, 2, 17, 33], [0, 1, 0, 0, 2, 1]


@sp.pattern
def by_head(q, k, v, *, sinks, sizes, which):
    """A window and a sink of each head's own sizes, a fixed window, or everything."""
    own = sp.sink(sinks) | sp.window(sizes)
    chosen = sp.per_head(which, own, sp.window(5), sp.everything())
    return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))


def tables(device: str) -> dict[str, torch.Tensor]:
    made = {"sinks": SINKS, "sizes": SIZES, "which": WHICH}
    return {n: torch.tensor(x, dtype=torch.int32, device=device) for n, x in made.items()}


@pytest.mark.parametrize("backend", registry.names())
@pytest.mark.parametrize("shape", [(2, 2, 70, 70), (1, 6, 1, 90), (3, 1, 129, 257), (1, 3, 50, 33)],
                         ids=str)  # fmt: skip
def test_each_head_follows_its_own_rule(backend: str, shape: tuple[int, int, int, int]) -> None:
    reason = why_not(backend)
    if reason is not None:
        pytest.skip(f"the {backend} backend cannot run here: {reason}")
    batch, hkv, sq, skv = shape
    device = device_of(backend)
    torch.manual_seed(sq)
    q, k, v = (
        torch.randn(batch, heads, rows, 32, device=device)
        for heads, rows in ((6, sq), (hkv, skv), (hkv, skv))
    )
    attention = sp.compile(by_head(**tables(device)), backend=backend)
    try:
        with torch.no_grad():
            out, lse = attention(q, k, v, return_lse=True)
    except (CannotLower, Refused) as refusal:
        assert backend == "ascendc", refusal
        assert "cannot be lowered" in str(refusal) or "refuses" in str(refusal)
        return
    mask = torch.zeros(batch, 6, sq, skv, dtype=torch.bool)
    for h, (sinks, size, case) in enumerate(zip(SINKS, SIZES, WHICH, strict=True)):
        mask[:, h] = (
            oracle.sink_window_mask(sq, skv, sinks, size),
            oracle.window_mask(sq, skv, 5),
            oracle.causal_mask(sq, skv),
        )[case]
    q, k, v = (x.cpu() for x in (q, k, v))
    want, want_lse = oracle.attention(q, k, v, mask)
    budget, budget_lse = oracle.budgets(q, k, v, mask)
    assert oracle.error(out.cpu(), want) <= budget
    assert oracle.error(lse.cpu(), want_lse) <= budget_lse


@pytest.mark.parametrize("backend", registry.names())
def test_a_table_for_other_heads_is_refused_before_any_compile(backend: str) -> None:
    q, k = torch.randn(1, 4, 8, 32), torch.randn(1, 2, 8, 32)
    with pytest.raises(sp.SpcompError) as caught, torch.no_grad():
        sp.compile(by_head(**tables("cpu")), backend=backend)(q, k, k)
    assert "with 6 numbers and q and k with Hq = 4 and Hkv = 2 do not agree" in str(caught.value)
