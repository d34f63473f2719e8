"""SpargeAttn against a second opinion: the map of blocks first, then the output, tile by tile."""

from __future__ import annotations

import math

import pytest
import torch

import spcomp as sp
from spcomp.backends.reference.pattern import run_program, selection_mask
from spcomp.patterns.spargeattn import spargeattn
from tests import oracle
from tests.systems.sparge import (
    BLOCKS,
    NEAR,
    SHAPES,
    Setting,
    assert_same_map,
    maps,
    online,
    tensors,
)

# ---- the map, and the output of it ---------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_and_output_are_those_of_the_paper(
    shape: tuple[int, ...], block_q: int, block_k: int, tau: float, causal: bool
) -> None:
    q, k, v = tensors(shape)
    how = Setting(block_q, block_k, [tau] * shape[1], theta=[0.3] * shape[1], causal=causal)
    made = spargeattn(tau=tau, theta=0.3, causal=causal, block_q=block_q, block_k=block_k)
    attention = sp.compile(made, backend="reference")
    want, near = maps(q, k, how)
    got = attention.to_mask(q, k)
    assert_same_map(got, want, near)
    out, lse = attention(q, k, v, return_lse=True)
    expected, expected_lse = oracle.attention(q, k, v, got)
    assert oracle.error(out, expected) < 1e-12
    assert oracle.error(lse, expected_lse) < 1e-12


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kappa", [(1, 100), (3, 10), (1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_share_of_all_blocks_is_kept(
    shape: tuple[int, ...], kappa: tuple[int, int], causal: bool
) -> None:
    q, k, _ = tensors(shape)
    how = Setting(32, 16, kappa=kappa, theta=[-0.1] * shape[1], causal=causal)
    made = spargeattn(kappa=kappa[0] / kappa[1], theta=-0.1, causal=causal, block_q=32, block_k=16)
    want, near = maps(q, k, how)
    assert_same_map(sp.compile(made, backend="reference").to_mask(q, k), want, near)


def test_the_map_is_sparse_where_tokens_are_alike_and_dense_where_not() -> None:
    q, k, _ = tensors((1, 4, 2, 256, 256, 16))
    density = {}
    for theta in (-0.1, 0.3, 0.7, 1.0):
        made = spargeattn(tau=0.5, theta=theta, block_q=16, block_k=16)
        density[theta] = float(sp.compile(made, backend="reference").to_mask(q, k).float().mean())
    assert density[-0.1] < 0.4 < density[0.3] + 0.2 < density[0.7] + 0.2
    assert density[1.0] == 1.0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_defaults_are_those_of_the_official_code(causal: bool) -> None:
    q, k, v = tensors((1, 2, 1, 400, 460, 32), sharp=0.2)
    # Runs of 16 make no block of 128 alike; two blocks of queries along one direction do, and so do
    # the keys that the mean, which three blocks of keys move, leaves on either side of it.
    direction = torch.randn(32, dtype=torch.float64)
    q[:, :, :256] += 2 * direction
    k[:, :, 128:320] += 8 * direction
    how = Setting(128, 64, [0.98] * 2, theta=[0.6] * 2, causal=causal)
    attention = sp.compile(spargeattn(causal=causal), backend="reference")
    want, near = maps(q, k, how)
    got = attention.to_mask(q, k)
    assert_same_map(got, want, near)
    rows = got.any(dim=1)[0, ::128, ::64].sum(dim=1).tolist()
    assert max(rows[:2]) < 6 and rows[2:] == ([5, 7] if causal else [8, 8])
    out = attention(q, k, v)
    assert oracle.error(out, oracle.attention(q, k, v, got)[0]) < 1e-12


@pytest.mark.parametrize("which", ["query heads", "KV heads"])
def test_each_head_has_its_own_thresholds(which: str) -> None:
    q, k, v = tensors((2, 4, 2, 130, 130, 16))
    theta = [-0.1, 0.2, 0.4, 1.0] if which == "query heads" else [0.1, 0.4]
    each = theta if which == "query heads" else [0.1, 0.1, 0.4, 0.4]
    tau = [0.2, 0.5, 0.9, 1.0]
    how = Setting(32, 16, tau, theta=each)
    made = spargeattn(tau=torch.tensor(tau), theta=torch.tensor(theta), block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    # The table is float32, so each threshold is the float32 nearest to it.
    how = Setting(32, 16, torch.tensor(tau).tolist(), theta=torch.tensor(each).tolist())
    want, near = maps(q, k, how)
    got = attention.to_mask(q, k)
    assert_same_map(got, want, near)
    assert oracle.error(attention(q, k, v), oracle.attention(q, k, v, got)[0]) < 1e-12


def test_the_sink_is_the_first_key_block() -> None:
    q, k, _ = tensors((1, 2, 2, 160, 160, 16))
    how = Setting(32, 16, [0.1] * 2, theta=[-0.1] * 2, causal=True, attention_sink=True)
    made = spargeattn(tau=0.1, theta=-0.1, causal=True, attention_sink=True, block_q=32, block_k=16)
    want, near = maps(q, k, how)
    got = sp.compile(made, backend="reference").to_mask(q, k)
    assert_same_map(got, want, near)
    assert bool(got[..., 0].all())
    without = spargeattn(tau=0.1, theta=-0.1, causal=True, block_q=32, block_k=16)
    assert not bool(sp.compile(without, backend="reference").to_mask(q, k)[..., 0].all())


def test_a_causal_row_may_see_nothing_and_gives_0() -> None:
    # Block 1 of the keys is the best of the first row of blocks, and its first queries are before.
    torch.manual_seed(3)
    q, k = torch.ones(1, 1, 64, 8).double(), torch.ones(1, 1, 64, 8).double()
    k[:, :, 16:32] *= 4
    k[:, :, 32:] *= -1
    v = torch.randn(1, 1, 64, 8).double()
    made = spargeattn(tau=0.0, theta=-0.1, causal=True, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    out, lse = attention(q, k, v, return_lse=True)
    assert not out[:, :, :16].any() and bool((lse[:, :, :16] == -math.inf).all())
    assert bool(out[:, :, 16:32].any()) and bool(lse[:, :, 16:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_choose_and_attend_as_float64_does(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 4, 2, 250, 250, 16)))
    how = Setting(32, 16, [0.7] * 4, theta=[0.3] * 4)
    made = spargeattn(tau=0.7, theta=0.3, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    want, near = maps(q, k, how, lambda x: x.to(dtype).double())
    got = attention.to_mask(q, k)
    # A mean or a key that float32 rounds to the neighbour in `dtype` moves a score by that step.
    step = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    differs = (got != want).any(dim=-1)
    assert not (differs & (near > step)).any()
    assert float((near > step).float().mean()) > (0.9 if dtype == torch.float32 else 0.25)
    out, lse = attention(q, k, v, return_lse=True)
    expected = oracle.attention(q, k, v, got)
    budgets = oracle.budgets(q, k, v, got)
    for found, right, budget in zip((out, lse), expected, budgets, strict=True):
        assert oracle.error(found, right) <= budget


def test_strides_of_the_caller_change_nothing() -> None:
    q, k, v = tensors((2, 4, 2, 130, 100, 16))
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    made = spargeattn(tau=0.5, theta=0.2, lam=4.0, int8=True, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    assert torch.equal(attention(q, k, v), attention(*wide))


def test_a_number_that_is_none_makes_its_block_dense_and_stays_there() -> None:
    q, k, v = tensors((1, 1, 1, 96, 96, 16))
    q[0, 0, 40, 3] = math.nan
    made = spargeattn(tau=0.3, theta=-0.1, block_q=32, block_k=16)
    attention = sp.compile(made, backend="reference")
    mask, out = attention.to_mask(q, k), attention(q, k, v)
    assert bool(mask[0, 0, 32:64].all())
    assert bool(out[0, 0, 40].isnan().all())
    assert not bool(out[0, 0, :32].isnan().any() | out[0, 0, 41:].isnan().any())


# ---- tiles that are skipped, and products in whole numbers ---------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("lam", [0.0, 2.0, 6.0, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_skipped_as_the_online_softmax_skips_them(
    shape: tuple[int, ...], lam: float, int8: bool, causal: bool
) -> None:
    q, k, v = tensors(shape, sharp=2.5)
    made = spargeattn(tau=0.9, theta=0.2, lam=lam, int8=int8, causal=causal, block_q=32, block_k=16)
    chosen = spargeattn(tau=0.9, theta=0.2, causal=causal, block_q=32, block_k=16)
    mask = sp.compile(chosen, backend="reference").to_mask(q, k)
    attention = sp.compile(made, backend="reference")
    out, lse = attention(q, k, v, return_lse=True)
    left = attention.to_mask(q, k)
    group, dropped = shape[1] // shape[2], 0
    for b in range(shape[0]):
        for h in range(shape[1]):
            want, want_lse, gone, near = online(
                q[b, h], k[b, h // group], v[b, h // group], mask[b, h], (32, 16), lam, int8
            )
            assert near > NEAR  # no tile's fate hangs on rounding
            assert oracle.error(out[b, h], want) < 1e-11
            assert oracle.error(lse[b, h], want_lse) < 1e-11
            dropped += gone
    assert (dropped > 0) == bool((left != mask).any())
    if lam == 0.0 and shape[3] > 64 and shape[4] > 64:
        assert dropped > 0
    if lam == math.inf:
        assert dropped == 0


def test_each_head_skips_at_its_own_distance() -> None:
    q, k, v = tensors((1, 4, 2, 130, 130, 16), sharp=2.5)
    lams = [0.0, 3.0]
    made = spargeattn(tau=1.0, theta=-0.1, lam=torch.tensor(lams), block_q=32, block_k=16)
    out = sp.compile(made, backend="reference")(q, k, v)
    for h in range(4):
        mask = torch.ones(130, 130, dtype=torch.bool)
        want, _, dropped, _ = online(
            q[0, h], k[0, h // 2], v[0, h // 2], mask, (32, 16), lams[h // 2], False
        )
        assert oracle.error(out[0, h], want) < 1e-11
        assert dropped > 0 or h >= 2


def test_chunks_of_rows_that_cut_a_tile_change_nothing() -> None:
    q, k, v = tensors((1, 2, 1, 150, 130, 16), sharp=2.5)
    made = spargeattn(tau=0.9, theta=0.2, lam=2.0, int8=True, block_q=32, block_k=16)
    given = {"q": q, "k": k, "v": v}
    whole_call = run_program(made.program, given)
    for rows in (7, 32, 50):
        cut = run_program(made.program, given, chunk_rows=rows)
        for a, b in zip(cut, whole_call, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    mask = sp.compile(made, backend="reference").to_mask(q, k)
    assert torch.equal(selection_mask(made.program, given, slice(41, 77)), mask[:, :, 41:77])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_numbers_stay_near_what_they_stand_for(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors((2, 4, 2, 250, 250, 16)))
    dense = spargeattn(theta=1.0, int8=True, block_q=32, block_k=16)
    out, lse = sp.compile(dense, backend="reference")(q, k, v, return_lse=True)
    want, want_lse = oracle.attention(q, k, v, torch.ones(250, 250, dtype=torch.bool))
    keys = k.double() - k.double().mean(dim=2, keepdim=True)
    # A number is off by half a delta at most, so is a product by D halves of either side's.
    worst = max(float(x.abs().max()) for x in (q.double(), keys)) ** 2 * 16 / 127 / 4
    assert 1e-6 < oracle.error(lse, want_lse) < worst
    assert oracle.error(out, want) < worst


# ---- tokens in another order ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == s[4]], ids=str)
def test_permuted_tokens_come_back_in_their_places(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = tensors(shape)
    order = torch.randperm(shape[3])
    options = {"tau": 0.5, "theta": 0.1, "lam": 3.0, "block_q": 32, "block_k": 16}
    plain = sp.compile(spargeattn(**options), backend="reference")
    moved = sp.compile(spargeattn(**options, order=order.to(dtype)), backend="reference")
    out, lse = moved(q, k, v, return_lse=True)
    want, want_lse = plain(*(x[:, :, order] for x in (q, k, v)), return_lse=True)
    assert oracle.error(out[:, :, order], want) < 1e-13
    assert oracle.error(lse[:, :, order], want_lse) < 1e-13
    mask = moved.to_mask(q, k)
    inside = plain.to_mask(q[:, :, order], k[:, :, order])
    assert torch.equal(mask[:, :, order][..., order], inside)
    assert not torch.equal(mask, plain.to_mask(q, k)) or shape[3] < 65


@pytest.mark.parametrize("at_once", [7, 32, 1000])
def test_some_rows_of_permuted_queries_are_those_asked_for(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spcomp.backends.reference.pattern.ROWS_AT_ONCE", at_once)
    q, k, _ = tensors((1, 2, 1, 130, 130, 16))
    made = spargeattn(
        tau=0.5, theta=0.1, lam=3.0, order=torch.randperm(130), block_q=32, block_k=16
    )
    mask = sp.compile(made, backend="reference").to_mask(q, k)
    given = {"q": q, "k": k, "v": k, **made.tensors}
    for rows in (slice(0, 130), slice(41, 77), slice(129, 130), slice(5, 5)):
        assert torch.equal(selection_mask(made.program, given, rows), mask[:, :, rows])


def test_dense_attention_is_the_same_in_any_order() -> None:
    q, k, v = tensors((2, 4, 2, 130, 130, 16))
    made = spargeattn(theta=1.0, order=torch.randperm(130), block_q=32, block_k=16)
    out = sp.compile(made, backend="reference")(q, k, v)
    want, _ = oracle.attention(q, k, v, torch.ones(130, 130, dtype=torch.bool))
    assert oracle.error(out, want) < 1e-12
