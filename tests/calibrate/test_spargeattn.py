"""The thresholds of SpargeAttn: what a calibration promises of them, and those of a file."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.calibrate.spargeattn import Thresholds, calibrate_spargeattn, thresholds_of
from spcomp.errors import SpcompError
from spcomp.patterns.spargeattn import spargeattn
from tests import oracle

SMALL = {"block_q": 32, "block_k": 16}


def sample(seed: int = 0, tokens: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads: in the first three a run of queries looks at a run of keys, in the fourth
    tokens have nothing in common."""
    torch.manual_seed(seed)
    base = 3.0 * torch.randn(1, 4, tokens // 32, 16).repeat_interleave(32, dim=2)
    q, k = base + torch.randn(1, 4, tokens, 16), base + torch.randn(1, 4, tokens, 16)
    q[:, 3], k[:, 3] = torch.randn(tokens, 16), torch.randn(tokens, 16)
    return q, k, torch.randn(1, 4, tokens, 16)


def errors_of(given: tuple[Tensor, Tensor, Tensor], causal: bool, **options: object) -> Tensor:
    """Give sum |out - dense| / sum |dense| of each head, against the oracle."""
    q, k, v = given
    out = sp.compile(spargeattn(causal=causal, **SMALL, **options), backend="reference")(q, k, v)
    tokens = q.shape[2]
    mask = oracle.causal_mask(tokens, tokens) if causal else torch.ones(tokens, tokens).bool()
    dense, _ = oracle.attention(q, k, v, mask)
    return (out - dense).abs().sum(dim=(0, 2, 3)) / dense.abs().sum(dim=(0, 2, 3))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_error_stays_within_its_bound_and_a_lower_tau_would_pass_it(causal: bool) -> None:
    given = sample()
    found = calibrate_spargeattn(
        [given], tau_error=0.1, lam_error=0.15, thetas=(-0.5,), causal=causal, **SMALL
    )
    assert found.sparsity is not None
    sparse = found.sparsity > 0
    assert int(sparse[:3].sum()) >= 2
    assert bool((errors_of(given, causal, **found.options()) < 0.15).all())
    chosen = errors_of(given, causal, tau=found.tau, theta=found.theta)
    assert bool((chosen < 0.1).all())
    lower = errors_of(given, causal, tau=(found.tau - 2e-3).clamp(min=0), theta=found.theta)
    can_lower = sparse & (found.tau > 2e-3)
    assert bool((lower >= 0.1)[can_lower].any()) or not can_lower.any()
    less = Thresholds(found.tau, found.theta, (found.lam - 0.2).clamp(min=0))
    nearer = errors_of(given, causal, **less.options())
    assert bool((nearer >= 0.15)[sparse & (found.lam > 0.2)].all())


def test_a_head_without_structure_is_dense_and_exact() -> None:
    given = sample()
    found = calibrate_spargeattn(
        [given], tau_error=0.005, lam_error=0.006, thetas=(0.0, 0.25), **SMALL
    )
    assert found.sparsity is not None and float(found.sparsity[3]) == 0
    assert (float(found.tau[3]), float(found.theta[3]), float(found.lam[3])) == (1, 1, float("inf"))
    assert float(errors_of(given, False, **found.options())[3]) < 1e-5


def test_samples_are_pooled_and_the_highest_of_the_best_eighth_is_taken() -> None:
    from spcomp.calibrate.spargeattn import _best

    rows = [  # theta, tau, lam, sparsity, counts, of two heads
        (-0.25, (0.5, 0.5), (3.0, 9.0), (0.3, 0.90), (1, 1)),
        (-0.125, (0.6, 0.6), (2.0, 8.0), (0.4, 0.05), (1, 1)),
        (-0.0625, (0.7, 0.7), (1.0, 7.0), (0.4, 0.95), (1, 0)),
        (-0.25, (0.4, 0.4), (9.0, 6.0), (0.3, 0.05), (1, 1)),
        (-0.125, (0.9, 0.3), (1.5, 5.0), (0.2, 0.02), (1, 1)),
    ]
    points = [
        {
            "theta": torch.full((2,), theta),
            "tau": torch.tensor(tau),
            "lam": torch.tensor(lam),
            "sparsity": torch.tensor(sparsity, dtype=torch.float64),
            "counts": torch.tensor(counts).bool(),
        }
        for theta, tau, lam, sparsity, counts in rows
    ]
    found = _best(points)
    # Head 0: the eighth from -0.125 holds 0.4 + 0.4 + 0.2; head 1: the one from -0.25 0.9 + 0.05.
    for name, want in (("theta", [-0.0625, -0.25]), ("tau", [0.9, 0.5]), ("lam", [2.0, 9.0])):
        torch.testing.assert_close(getattr(found, name), torch.tensor(want))
    torch.testing.assert_close(found.sparsity, torch.tensor([1.0 / 3, 0.475]))


def test_more_samples_ask_for_no_less() -> None:
    one, two = sample(0), sample(1)
    options = {"tau_error": 0.1, "lam_error": 0.15, "thetas": (-0.5,), **SMALL}
    found = [calibrate_spargeattn(s, **options) for s in ([one], [two], [one, two])]
    for name in ("tau", "lam"):
        each = [getattr(f, name)[:3] for f in found]
        torch.testing.assert_close(each[2], torch.maximum(each[0], each[1]))


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(SpcompError, match="two errors above 0, the second the larger"):
        calibrate_spargeattn([sample()], tau_error=0.1, lam_error=0.1)
    with pytest.raises(SpcompError, match="one sample and one cosine at least"):
        calibrate_spargeattn([])
    other = tuple(x[:, :2] for x in sample())
    with pytest.raises(SpcompError, match="a sample with 4 query heads and one with 2"):
        calibrate_spargeattn([sample(), other], thetas=(1.0,), **SMALL)  # type: ignore[list-item]


def test_thresholds_of_a_tuned_model_are_read_by_layer() -> None:
    names = ("cdfthreshd", "simthreshd1", "pvthreshd", "simthreshd2")
    layers = ("blocks.0.attn", "blocks.10.attn")
    state = {
        f"{layer}.{name}": torch.full((4,), n / 8, dtype=torch.bfloat16)
        for n, (layer, name) in enumerate(itertools.product(layers, names))
    }
    found = thresholds_of(state, "blocks.10.attn")
    for name, want in (("tau", 0.5), ("theta", 0.625), ("lam", 0.75)):
        assert torch.equal(getattr(found, name), torch.full((4,), want))
    q, k, v = sample()
    assert sp.compile(spargeattn(**found.options(), **SMALL))(q, k, v).shape == v.shape
    with pytest.raises(SpcompError) as caught:
        thresholds_of(state, "blocks.1.attn")
    assert str(caught.value) == (
        "NoThresholds: the state dict has no cdfthreshd [H] for the layer 'blocks.1.attn'.\n"
        "  help: it has them for blocks.0.attn, blocks.10.attn."
    )
