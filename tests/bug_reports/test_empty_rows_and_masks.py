"""Rows that see nothing, and masks whose geometry is not that of the tensors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import spcomp as sp
from spcomp.errors import MaskOfOtherLength, SpcompError
from spcomp.patterns import moba
from tests import oracle
from tests.bug_reports.make import DEVICE, assert_attends, compiled, dense, qkv, run
from tests.conformance.cases import assert_within


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_items_that_a_mask_hides_are_zero(dtype: torch.dtype) -> None:
    """B01."""
    hidden = torch.zeros(130, dtype=torch.bool)
    hidden[[0, 63, 64, 127]] = True

    @sp.pattern
    def holes(q, k, v):
        seen = sp.mask_mod(lambda b, h, q_idx, kv_idx: ~hidden[q_idx] & (b == 0))
        return sp.attend(q, sp.gather(k, seen), sp.gather(v, seen), mask=None)

    tensors = qkv(2, 2, 1, 130, 130, 16, dtype)
    mask = (~hidden)[None, None, :, None] & (torch.arange(2) == 0)[:, None, None, None]
    out, lse = assert_attends(compiled(holes), *tensors, mask.expand(2, 2, 130, 130))
    assert not out[1].any()
    assert not out[0, :, hidden].any()
    assert bool((lse[1] == -math.inf).all())
    assert bool((lse[0, :, hidden] == -math.inf).all())
    assert bool(lse[0, :, ~hidden].isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 300.0), (torch.bfloat16, 40.0)], ids=str
)
def test_very_negative_logits_are_kept_and_stay_apart_from_hidden_ones(
    dtype: torch.dtype, size: float
) -> None:
    """B03. Logits of -5.8e6 and -1e5; three rows stand above the diagonal."""
    q = torch.full((1, 1, 80, 64), size, dtype=dtype)
    k, v = torch.full_like(q, -size), torch.randn(1, 1, 80, 64).to(dtype)
    attention = compiled(dense(scale=1.0))
    out, lse = run(attention, q, k, v)
    want = v.double().cumsum(2) / torch.arange(1, 81)[:, None]
    plain = v.float().cumsum(2) / torch.arange(1, 81)[:, None]
    allowed = 2 * oracle.error(plain.to(dtype), want) + oracle.TINY[dtype]
    assert oracle.error(out, want) <= allowed
    _, want_lse = oracle.attention(q, k, v, oracle.causal_mask(80, 80), scale=1.0)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=0)
    out, lse = run(attention, q[:, :, :5], k[:, :, :2], v[:, :, :2])
    assert not out[:, :, :3].any()
    assert bool((lse[:, :, :3] == -math.inf).all())
    assert bool(lse[:, :, 3:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1, 3), range(5)], ids=["some", "all"])
def test_query_tiles_without_a_key_block_are_zero(dtype: torch.dtype, rows: range) -> None:
    """B04."""
    marks = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    marks[:, :, list(rows)] = False

    @sp.pattern
    def blocks(q, k, v):
        chosen = sp.block_mask(marks, block=64)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    tensors = qkv(1, 1, 1, 320, 320, 16, dtype)
    mask = marks.repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)
    out, lse = assert_attends(compiled(blocks), *tensors, mask)
    empty = ~mask[0, 0].any(-1)
    assert not out[:, :, empty].any()
    assert bool((lse[:, :, empty] == -math.inf).all())


def test_a_mask_of_other_lengths_is_refused_for_every_item_of_a_batch() -> None:
    """B06. Built for 128 queries and 256 keys, called with fewer of both."""
    marks = torch.ones(2, 1, 8, 16, dtype=torch.bool)

    @sp.pattern
    def masked(q, k, v):
        return sp.attend(q, k, v, mask=sp.block_mask(marks, block=16))

    attention = compiled(masked)
    for length, made in ((2, 1), (100, 7)):
        tensors = (x.to(DEVICE) for x in qkv(2, 2, 1, length, length, 16))
        with pytest.raises(MaskOfOtherLength) as caught:
            attention(*tensors)
        assert (
            "the block_mask tensor of shape [2, 1, 8, 16] was built for 8 x 16 blocks of 16 x 16, "
            f"but q and k are Sq = {length} and Skv = {length}, which make {made} x {made}."
        ) in str(caught.value)


def test_a_list_may_name_units_that_are_not_there_and_they_are_nothing() -> None:
    """B06. In every loop order an index past the last unit reads no memory and counts as none."""
    listed = torch.tensor([[0, 7, -1, 3], [99, 1, 1, 2**27], [3, 2, 1, 0], [4, 5, 6, 7]])
    indices = listed.int()[None, None]

    @sp.pattern
    def picked(q, k, v):
        chosen = sp.block_indices(indices, block=16)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    @sp.pattern
    def picked_by_rows(q, k, v):
        chosen = sp.block_indices(indices[:, :, 1:2], block=(1, 64))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen))

    tensors = qkv(1, 2, 1, 64, 60, 16)
    reads = torch.zeros(4, 4, dtype=torch.bool)
    for row, unit in ((0, 0), (0, 3), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)):
        reads[row, unit] = True
    wide = reads.repeat_interleave(16, 0).repeat_interleave(16, 1)[:, :60]
    assert_attends(compiled(picked), *tensors, wide & oracle.causal_mask(64, 60))
    q, k, v = qkv(1, 2, 1, 1, 100, 16)
    mask = (torch.arange(100) >= 64)[None]
    assert_attends(compiled(picked_by_rows), q, k, v, mask)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("beyond", [2**24, 2**25 - 1, 2**31 - 1, 2**32, 2**40 + 1])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_unit_number_that_loses_its_upper_bits_is_no_other_unit(
    backend: str, beyond: int, rows: int
) -> None:
    """B06. Entries of a list hold 24 bits of a unit, offsets 31, indices of the user 64."""
    indices = torch.tensor([1, beyond]).expand(1, 1, rows, 2)

    @sp.pattern
    def picked(q, k, v):
        chosen = sp.block_indices(indices, block=(1, 64))
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    tensors = qkv(1, 1, 1, rows, 100, 16)
    mask = (torch.arange(100) >= 64).expand(rows, 100)
    if backend == "triton":
        assert_attends(compiled(picked), *tensors, mask)
    else:
        assert_within(*sp.compile(picked)(*tensors, return_lse=True), *tensors, mask)


GUARDED = """
    import ctypes, mmap, sys
    import torch
    import spcomp as sp
    from spcomp.patterns import block_topk, moba, quest

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def guarded(x):
        # The last element of the copy is the last one before a page that nobody may touch.
        size = x.numel() * x.element_size()
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        held = mmap.mmap(-1, pages + mmap.PAGESIZE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(held))
        assert libc.mprotect(at + pages, mmap.PAGESIZE, 0) == 0
        flat = torch.frombuffer(held, dtype=x.dtype, offset=pages - size, count=x.numel())
        return flat.view(x.shape).copy_(x)

    def looked_up(s):
        table = guarded(torch.arange(s) % 3 != 1)

        @sp.pattern
        def rule(q, k, v):
            seen = sp.mask_mod(lambda b, h, q_idx, kv_idx: table[kv_idx] | table[q_idx])
            return sp.attend(q, sp.gather(k, seen), sp.gather(v, seen))

        return rule()

    torch.manual_seed(0)
    for s in (1, 63, 65, 127):
        made = [looked_up(s)]
        if s == 65:
            made += [block_topk(block=16, budget=2, locals=1), moba(block=64, k_blocks=1),
                     moba(block=16, k_blocks=2)]
        if s == 1:
            made += [quest(page=16, budget=32)]
        for pattern in made:
            q = guarded(torch.randn(1, 1, s, 17))
            k, v = (guarded(torch.randn(1, 1, 65 if s == 1 and len(made) > 1 and
                    pattern.name == "quest" else s, 17)) for _ in range(2))
            out, lse = sp.compile(pattern, backend="triton")(q, k, v, return_lse=True)
            want, want_lse = sp.compile(pattern, backend="reference")(q, k, v, return_lse=True)
            torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
            torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-5)
    print("done")
"""


def _interpreted(program: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in the interpreter in a process of its own: a wild read ends that one."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "SPCOMP_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages by mprotect")
def test_nothing_is_read_past_the_end_of_a_table_or_a_tensor(tmp_path: Path) -> None:
    """B08. Tables, queries, keys and values end at a page that faults when it is touched."""
    done = _interpreted(GUARDED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


def test_a_rule_that_reads_the_batch_index_is_asked_for_every_item() -> None:
    """B09."""
    lengths = torch.tensor([10, 64, 33])

    @sp.pattern
    def padded(q, k, v):
        real = sp.mask_mod(lambda b, h, q_idx, kv_idx: kv_idx < lengths[b])
        return sp.attend(q, sp.gather(k, real), sp.gather(v, real), mask=None)

    mask = (torch.arange(64) < lengths[:, None])[:, None, None].expand(3, 2, 64, 64)
    attention = compiled(padded)
    assert_attends(attention, *qkv(3, 2, 1, 64, 64, 16), mask)
    four = (x.to(DEVICE) for x in qkv(4, 2, 1, 64, 64, 16))
    with pytest.raises(MaskOfOtherLength, match="which read 0 to 3"):
        attention(*four)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("sq", [1, 130])
def test_a_sparse_call_is_never_served_dense(backend: str, sq: int) -> None:
    """B11. Every query may read block 0 alone; v tells which block was read."""
    units = 3
    listed = torch.zeros(1, 1, 1 if sq == 1 else units, 1, dtype=torch.int32)

    @sp.pattern
    def first(q, k, v):
        chosen = sp.block_indices(listed, block=64)
        return sp.attend(q, sp.gather(k, chosen), sp.gather(v, chosen), mask=None)

    q, k, _ = qkv(1, 2, 1, sq, 130, 64)
    v = torch.eye(units).repeat_interleave(64, 0)[:130].expand(1, 1, -1, -1).contiguous()
    if backend == "triton":
        out, _ = run(compiled(first), q, k, v)
    else:
        out = sp.compile(first, backend="reference")(q, k, v)
    torch.testing.assert_close(out[..., 0], torch.ones(1, 2, sq), rtol=0, atol=1e-6)
    assert not out[..., 1:].any()


def test_an_order_that_does_not_exist_for_a_pattern_is_refused_not_replaced() -> None:
    """B11."""
    tensors = tuple(x.to(DEVICE) for x in qkv(1, 2, 1, 64, 64, 16))
    with pytest.raises(SpcompError, match="cannot be lowered"):
        compiled(dense, order="key_major")(*tensors)
    attention = compiled(moba(block=16, k_blocks=2), order="gather")
    assert attention.built(*tensors).plan.order == "gather"
