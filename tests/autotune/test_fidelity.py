"""Fidelity figures against their definitions, written out densely in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spcomp.autotune import fidelity as fid
from spcomp.errors import ShapeMismatch


def operands(
    batch: int = 2, sq: int = 23, skv: int = 23, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(11)
    keys, values = torch.randn(2, batch, kv_heads, skv, 8)
    return torch.randn(batch, heads, sq, 8), keys, values


def causal_map(sq: int, skv: int) -> Tensor:
    return torch.ones(sq, skv, dtype=torch.bool).tril(skv - sq)


def random_mask(batch: int, heads: int, sq: int, skv: int, share: float = 0.5) -> Tensor:
    """Hide causal pairs at random, whole rows among them."""
    kept = torch.rand(batch, heads, sq, skv) < share
    return kept & causal_map(sq, skv) & (torch.rand(batch, heads, sq, 1) < 0.9)


def probabilities(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax over the visible keys in float64; rows that see nothing are 0."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.double() @ keys.transpose(-1, -2)) * scale
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)


def weighted(probs: Tensor, v: Tensor) -> Tensor:
    return probs @ v.double().repeat_interleave(probs.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize(("sq", "skv"), [(23, 23), (1, 23), (9, 23), (23, 9)])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_every_figure_follows_its_definition(sq: int, skv: int, rows_at_once: int) -> None:
    q, k, v = operands(2, sq, skv)
    mask, causal = random_mask(2, 4, sq, skv), causal_map(sq, skv)
    found = fid.fidelity(q, k, v, mask=mask, scale=0.4, rows_at_once=rows_at_once)
    counted = causal.any(-1)
    dense = probabilities(q, k, causal, 0.4)
    mass = (dense * mask).sum(-1)[:, :, counted]
    out, masked = weighted(dense, v), weighted(probabilities(q, k, mask, 0.4), v)
    error = (masked - out)[:, :, counted]
    assert found.rows == mass.numel()
    assert found.density == mask.sum().item() / (causal.sum().item() * 8)
    assert found.mass_mean == pytest.approx(mass.mean().item(), abs=1e-6)
    assert found.mass_p5 == pytest.approx(torch.quantile(mass, 0.05).item(), abs=1e-6)
    assert found.mass_by_head == pytest.approx(mass.mean((0, 2)).tolist(), abs=1e-6)
    assert found.mass_min_head == min(found.mass_by_head)
    norm = out[:, :, counted].norm().item()
    assert found.out_error == pytest.approx(error.norm().item() / norm, abs=1e-5)
    assert found.out_max_abs == pytest.approx(error.abs().max().item(), abs=1e-5)


def test_all_that_is_causal_keeps_everything() -> None:
    q, k, v = operands()
    found = fid.fidelity(q, k, v, mask=causal_map(23, 23)[None, None])
    assert found.density == 1.0
    assert found.mass_mean == pytest.approx(1.0, abs=1e-6)
    assert found.out_error < 1e-6


def test_nothing_visible_keeps_nothing_and_gives_zero() -> None:
    q, k, v = operands()
    found = fid.fidelity(q, k, v, mask=torch.zeros(1, 1, 23, 23, dtype=torch.bool))
    assert (found.mass_mean, found.density) == (0.0, 0.0)
    assert found.out_error == pytest.approx(1.0)


def test_a_given_output_is_measured_in_place_of_the_masks_own() -> None:
    q, k, v = operands()
    mask = random_mask(2, 4, 23, 23)
    out = fid.dense_attention(q, k, v)
    assert fid.fidelity(q, k, v, mask=mask, out=out).out_error == 0.0
    assert fid.fidelity(q, k, v, out=2 * out).out_error == pytest.approx(1.0)
    assert fid.fidelity(q, k, v, out=out).mass_mean is None


def test_layers_are_pooled_row_by_row_and_heads_are_told_apart() -> None:
    measurement = fid.Measurement()
    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        keys, values = torch.randn(2, 1, 2, 30, 8)
        q, mask = torch.randn(1, 4, 30, 8), random_mask(1, 4, 30, 30, share=0.3 * seed)
        measurement.add(q, keys, values, mask=mask)
        alone.append((fid.fidelity(q, keys, values, mask=mask), q, keys, values, mask))
    found = measurement.result()
    assert found.mass_by_head == alone[0][0].mass_by_head + alone[1][0].mass_by_head
    assert found.rows == sum(one.rows for one, *_ in alone) == 240
    stacked = [torch.cat([one[i] for one in alone]) for i in (1, 2, 3, 4)]
    together = fid.fidelity(*stacked[:3], mask=stacked[3])
    for name in ("mass_mean", "mass_p5", "density", "out_error", "out_max_abs"):
        assert getattr(found, name) == pytest.approx(getattr(together, name), rel=1e-6)


def test_rows_of_a_mask_may_come_a_few_at_a_time() -> None:
    q, k, v = operands()
    mask = random_mask(2, 4, 23, 23)
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return mask[:, :, start:stop]

    whole = fid.fidelity(q, k, v, mask=mask, rows_at_once=10)
    assert fid.fidelity(q, k, v, mask=rows, rows_at_once=10) == whole
    assert asked == [(0, 10), (10, 20), (20, 23)]


def test_without_causality_the_measure_is_full_attention() -> None:
    q, k, v = operands()
    everything = torch.ones(1, 1, 23, 23, dtype=torch.bool)
    found = fid.fidelity(q, k, v, mask=everything, causal=False)
    assert (found.density, found.out_error < 1e-6) == (1.0, True)


def test_a_mask_that_sees_the_future_is_refused() -> None:
    q, k, v = operands()
    mask = causal_map(23, 23)[None, None].clone()
    mask[0, 0, 3, 7] = True
    with pytest.raises(fid.MaskSeesTheFuture) as refused:
        fid.fidelity(q, k, v, mask=mask)
    assert str(refused.value) == (
        "MaskSeesTheFuture: the mask shows 8 (query, key) pairs whose key comes after its query.\n"
        "  help: combine it with the causal mask, or pass causal=False to compare with full "
        "attention."
    )


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(fid.NothingToMeasure, match="neither a mask nor an output"):
        fid.fidelity(*operands())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v, m: (q[0], k, v, m), "[B, H, S, D] is needed, 3, 4 and 4 dimensions"),
        (lambda q, k, v, m: (q, k, v[:, :, 1:], m), "one [B, Hkv, Skv] is needed"),
        (lambda q, k, v, m: (q[..., 1:], k, v, m), "one B and one D is needed"),
        (lambda q, k, v, m: (q, k, v, m.float()), "a bool mask [2, 4, 23, 23] is needed"),
        (lambda q, k, v, m: (q, k, v, m[:, :, 1:]), "a bool mask [2, 4, 23, 23] is needed"),
    ],
    ids=["rank", "kv", "qk", "mask dtype", "mask shape"],
)
def test_shapes_that_do_not_agree_are_refused(change: object, text: str) -> None:
    q, k, v, mask = change(*operands(), causal_map(23, 23)[None, None])  # type: ignore[operator]
    with pytest.raises(ShapeMismatch) as refused:
        fid.fidelity(q, k, v, mask=mask)
    assert text in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands_are_measured_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in operands())
    want = weighted(probabilities(q, k, causal_map(23, 23), 8**-0.5), v)
    got = fid.dense_attention(q, k, v)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


@given(
    sq=st.integers(1, 40), skv=st.integers(1, 40), block=st.integers(1, 17), seed=st.integers(0, 99)
)
def test_a_block_map_counts_the_pairs_of_each_block(
    sq: int, skv: int, block: int, seed: int
) -> None:
    mask = torch.rand(sq, skv, generator=torch.Generator().manual_seed(seed)) < 0.8
    found = fid.block_map(mask, block)
    assert found.dtype == torch.uint8
    assert found.shape == (math.ceil(sq / block), math.ceil(skv / block))
    for i, j in [(i, j) for i in range(found.shape[0]) for j in range(found.shape[1])]:
        cut = mask[i * block : (i + 1) * block, j * block : (j + 1) * block]
        want = fid.FULL if cut.all() else fid.PARTIAL if cut.any() else fid.EMPTY
        assert found[i, j] == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_allows_rounding_and_refuses_one_wrong_key(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in operands())
    mask = random_mask(2, 4, 23, 23) | torch.eye(23, dtype=torch.bool)
    want = weighted(probabilities(q, k, mask, 0.4), v)
    assert fid.agreement(want.to(dtype), q, k, v, mask, scale=0.4).holds
    wrong = mask.clone()
    wrong[1, 2, 22, 3] ^= True
    other = weighted(probabilities(q, k, wrong, 0.4), v).to(dtype)
    assert not fid.agreement(other, q, k, v, mask, scale=0.4).holds


class Bigram:
    """A model whose logits depend on the last token alone."""

    def __init__(self) -> None:
        self.table = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))

    def __call__(self, input_ids: Tensor, **kwargs: object) -> object:
        return type("Output", (), {"logits": self.table[input_ids].bfloat16()})()


@pytest.mark.parametrize("tokens_at_once", [1, 4, 100])
def test_perplexity_counts_every_predicted_token_once(tokens_at_once: int) -> None:
    model, ids = Bigram(), torch.tensor([[0, 1, 4, 2, 2, 3, 1, 0, 4], [4, 4, 1, 2, 3, 3, 0, 1, 2]])
    logp = model.table.bfloat16().double().log_softmax(-1)
    want = -torch.stack([logp[row[:-1], row[1:]] for row in ids]).mean().item()
    found = fid.perplexity(model, ids, tokens_at_once=tokens_at_once)
    assert found.tokens == 16
    assert found.nll_mean == pytest.approx(want, rel=1e-6)
    assert found.value == pytest.approx(math.exp(want), rel=1e-6)


def test_perplexity_of_one_token_is_refused() -> None:
    with pytest.raises(fid.TooFewTokens, match=r"shape \(1, 1\); it needs \[B, S\] with S >= 2"):
        fid.perplexity(Bigram(), torch.zeros(1, 1, dtype=torch.long))
