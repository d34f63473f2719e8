"""Odd head dimensions, ragged tails, batches, strides, and tensors on other devices."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.backends.triton import executor
from spcomp.errors import DeviceClash, LastStrideNotOne, NotOnThisDevice
from spcomp.patterns import block_topk, moba, quest, streaming_llm
from tests import oracle
from tests.bug_reports.make import assert_attends, compiled, dense, qkv, run

FAMILIES = {
    "block_topk": block_topk(block=32, budget=2, locals=1),
    "moba": moba(block=64, k_blocks=1),
    "quest": quest(page=16, budget=48),
    "streaming_llm": streaming_llm(sinks=4, recent=20),
}


@pytest.mark.parametrize("sq", [1, 33])
@pytest.mark.parametrize("d", [1, 17, 31, 40, 72, 96, 160, 256])
def test_any_head_dimension_in_prefill_and_decode(d: int, sq: int) -> None:
    """B12."""
    dtype = torch.float16 if d % 2 else torch.bfloat16
    mask = oracle.sink_window_mask(sq, 50, 3, 30)
    attention = compiled(streaming_llm(sinks=3, recent=30))
    assert_attends(attention, *qkv(1, 1, 1, sq, 50, d, dtype), mask)


@pytest.mark.parametrize(
    ("block", "length"),
    [(16, 1), (16, 15), (16, 100), (32, 17), (48, 97), (64, 100), (64, 129), (128, 129), (256, 99)],
)
def test_any_block_with_a_ragged_tail(block: int, length: int) -> None:
    """B14."""
    units = -(-length // block)
    marks = torch.rand(1, 1, units, units) < 0.6

    @sp.pattern
    def blocks(q, k, v):
        chosen = sp.block_mask(marks, block=block)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    wide = marks.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)
    mask = wide[..., :length, :length] & oracle.causal_mask(length, length)
    assert_attends(compiled(blocks), *qkv(1, 1, 1, length, length, 16), mask)


@pytest.mark.parametrize("name", ["block_topk", "quest", "streaming_llm"])
def test_decode_steps_continue_the_prefill_of_the_same_object(name: str) -> None:
    """B15. One row, then four of a speculative step, after keys the prefill did not have."""
    attention = compiled(FAMILIES[name])
    q, k, v = qkv(1, 1, 1, 66, 66, 16)
    mask = attention.to_mask(q, k)
    if name == "block_topk":  # a list serves a block of rows: only a row of its own can be cut off
        mask = sp.compile(FAMILIES[name], backend="reference").to_mask(q[:, :, :64], k[:, :, :64])
        assert_attends(attention, q[:, :, :64], k[:, :, :64], v[:, :, :64], mask)
    else:
        assert_attends(attention, q, k, v, mask)
    for rows, keys in ((1, 65), (1, 66), (4, 66)):
        part = q[:, :, keys - rows : keys], k[:, :, :keys], v[:, :, :keys]
        step = attention.to_mask(*part[:2])
        if name != "block_topk":
            assert torch.equal(step, mask[:, :, keys - rows : keys, :keys])
        assert_attends(attention, *part, step)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_item_of_a_batch_does_not_feel_the_others(name: str) -> None:
    """B16."""
    attention = compiled(FAMILIES[name])
    rows = {"quest": 2, "moba": 18}.get(name, 40)
    one, other = qkv(1, 2, 1, rows, 70, 16), qkv(1, 2, 1, rows, 70, 16)
    out, lse = run(attention, *(torch.cat([a, b, a]) for a, b in zip(one, other, strict=True)))
    assert torch.equal(out[0], out[2])
    assert torch.equal(lse[0], lse[2])
    for n, alone in enumerate((one, other)):
        single, single_lse = run(attention, *alone)
        torch.testing.assert_close(single[0], out[n], rtol=0, atol=1e-6)
        torch.testing.assert_close(single_lse[0], lse[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("skv", [1, 2, 15, 16, 17, 20, 127, 129])
def test_one_query_row_over_few_keys(skv: int) -> None:
    """B18."""
    dtype = torch.float16 if skv % 2 else torch.bfloat16
    mask = torch.ones(1, skv, dtype=torch.bool)
    assert_attends(compiled(dense), *qkv(2, 2, 1, 1, skv, 128, dtype), mask)
    everything = compiled(quest(page=16, budget=160, heads="group"))
    assert_attends(everything, *qkv(1, 2, 1, 1, skv, 128, dtype), mask)


def _layouts() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    b, hq, hkv, s, d = 2, 2, 1, 50, 16
    swapped = tuple(torch.randn(b, s, h, d).transpose(1, 2) for h in (hq, hkv, hkv))
    fused = torch.randn(b, s, (hq + 2 * hkv) * d).unflatten(-1, (hq + 2 * hkv, d)).transpose(1, 2)
    shared = torch.randn(b, 1, s, d).expand(-1, 2, -1, -1)
    one = torch.randn(1, hkv, s, d).expand(b, -1, -1, -1)
    return {  # type: ignore[return-value]
        "swapped": swapped,
        "fused": fused.split([hq, hkv, hkv], dim=1),
        "expanded heads": (torch.randn(b, hq, s, d), shared, shared),
        "expanded batch": (torch.randn(b, hq, s, d), one, one),
        "sliced": tuple(torch.randn(b, h, s + 9, d)[:, :, 5 : 5 + s] for h in (hq, hkv, hkv)),
        "padded": tuple(torch.randn(b, h, s, d + 3)[..., :d] for h in (hq, hkv, hkv)),
        "reversed heads": tuple(torch.randn(h, b, s, d).transpose(0, 1) for h in (hq, hkv, hkv)),
    }


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("name", ["block_topk", "quest"])
def test_strides_change_no_bit(layout: str, name: str) -> None:
    """B19. Of quest, the row of a decode step."""
    q, k, v = _layouts()[layout]
    assert not all(x.is_contiguous() for x in (q, k, v))
    attention = compiled(FAMILIES[name])
    rows = slice(None) if name == "block_topk" else slice(49, 50)
    out, lse = run(attention, q[:, :, rows], k, v)
    want, want_lse = run(attention, *(x.contiguous() for x in (q[:, :, rows], k, v)))
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_a_last_stride_of_two_is_refused_with_its_figure() -> None:
    """B19."""
    q, k, v = qkv(1, 2, 1, 32, 32, 32)
    with pytest.raises(LastStrideNotOne, match="v has stride 2 in its last dimension"):
        run(compiled(dense), q, k, v[..., ::2])


def test_tensors_on_another_card_are_launched_on_that_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """B22, by a stand-in for a second card."""
    entered: list[Any] = []

    def switch(device: Any) -> Any:
        entered.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", switch)
    for index, expected in ((0, []), (1, [torch.device("cuda:1")])):
        entered.clear()
        q: Any = SimpleNamespace(device=torch.device("cuda", index))
        with executor._on_device(q, index):
            assert entered == expected


def test_tensors_on_two_devices_are_refused_by_name() -> None:
    """B22."""
    q, k, v = qkv(1, 2, 1, 32, 32, 16)
    for name, tensors in (("k", (q, k.to("meta"), v)), ("v", (q, k, v.to("meta")))):
        with pytest.raises(DeviceClash, match=f"q is on cpu and {name} is on meta"):
            sp.compile(dense)(*tensors)
    table = torch.ones(32, dtype=torch.bool, device="meta")

    @sp.pattern
    def looked_up(q, k, v):
        return sp.attend(q, k, v, mask=sp.mask_mod(lambda b, h, i, j: table[j]))

    with pytest.raises(DeviceClash, match="the pattern's tensor table0 is on meta and q is on cpu"):
        sp.compile(looked_up)(q, k, v)


def test_cpu_tensors_without_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """B22."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotOnThisDevice, match="cannot run on cpu, since Triton's interpreter is"):
        sp.compile(dense, backend="triton")(*qkv(1, 2, 1, 32, 32, 16))
