"""What SpargeAttn refuses, in its own words; and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import spcomp as sp
from spcomp.compiler import plan_for
from spcomp.errors import SpcompError
from spcomp.patterns.spargeattn import spargeattn
from tests import oracle
from tests.systems.sparge import tensors


def said(call: Callable[[], object]) -> str:
    with pytest.raises(SpcompError) as caught:
        call()
    return "\n".join(n for n in str(caught.value).splitlines() if not n.startswith("  -->"))


OUT_OF_DOMAIN = [
    (
        {"theta": 1.5},
        "NotANumber: similar was given least = 1.5 of type float, where a cosine from -1 to 1 is "
        "needed.\n  help: pass a cosine from -1 to 1.",
    ),
    (
        {"tau": -0.1},
        "NotANumber: topp was given p = -0.1 of type float, where a share from 0 to 1 is needed.\n"
        "  help: pass a share from 0 to 1.",
    ),
    (
        {"kappa": 0.0},
        "NotANumber: topk was given fraction = 0.0 of type float, where a share above 0 and at "
        "most 1 is needed.\n  help: pass a share above 0 and at most 1.",
    ),
    (
        {"lam": -1.0},
        "NotANumber: attend was given skip = -1.0 of type float, where a number of 0 or more is "
        "needed.\n  help: pass a number of 0 or more.",
    ),
    (
        {"lam": math.nan},
        "NotANumber: attend was given skip = nan of type float, where a number of 0 or more is "
        "needed.\n  help: pass a number of 0 or more.",
    ),
    (
        {"theta": math.nan},
        "NotANumber: similar was given least = nan of type float, where a cosine from -1 to 1 is "
        "needed.\n  help: pass a cosine from -1 to 1.",
    ),
    (
        {"block_k": 0},
        "NegativeCount: similar was given block = 0, which is below 1.\n"
        "  help: block counts the tokens of a block; give 1 or more.",
    ),
    (
        {"order": torch.tensor([0, 2, 2])},
        "NotAPermutation: permute was given an order of 3 tokens that does not hold each of 0 to "
        "3 - 1 once: sorted, it differs from them at place 1.\n"
        "  help: give each token one place, as torch.randperm(tokens) does.",
    ),
    (
        {"order": torch.arange(8).flip(0), "causal": True},
        "CannotLower: a causal score over permuted tokens cannot be lowered: a place in the new "
        "order tells nothing of what is past.\n"
        "  help: permute only under mask=None, where every query may see every key.",
    ),
]


@pytest.mark.parametrize(("given", "text"), OUT_OF_DOMAIN, ids=lambda x: str(x)[:24])
def test_what_is_out_of_domain_is_refused(given: dict[str, object], text: str) -> None:
    assert said(lambda: sp.compile(spargeattn(**given))) == text


@pytest.mark.parametrize("name", ["theta", "tau", "lam"])
def test_a_table_for_other_heads_is_refused(name: str) -> None:
    q, k, v = tensors((1, 4, 2, 64, 64, 16))
    text = said(lambda: sp.compile(spargeattn(**{name: torch.zeros(3)}))(q, k, v))
    field = {"theta": "least", "tau": "p", "lam": "skip"}[name]
    heads = "Hq = 4" if name == "tau" else "Hq = 4 or Hkv = 2"
    assert text == (
        f"ShapeMismatch: the table of {field} with 3 numbers and q and k with Hq = 4 and Hkv = 2 "
        f"do not agree: it should have one for each of the {heads} heads.\n"
        "  help: give a number for all heads, or a tensor of that length."
    )


def test_an_order_of_other_tokens_is_refused() -> None:
    q, k, v = tensors((1, 4, 2, 64, 64, 16))
    text = said(lambda: sp.compile(spargeattn(order=torch.randperm(65)))(q, k, v))
    assert text == (
        "MaskOfOtherLength: the order that permutes q was built for 65 tokens, but q and k are "
        "Sq = 64 and Skv = 64.\n  help: build it again for these lengths."
    )


def test_whole_numbers_have_no_gradient_and_the_rest_has() -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 1, 70, 70, 8)))
    rounded = sp.compile(spargeattn(int8=True), backend="reference")
    assert said(lambda: rounded(q, k, v)) == (
        "CannotLower: the gradient of products in int8 cannot be lowered: rounding to whole "
        "numbers has none.\n  help: train with quantise=None, or call under torch.no_grad()."
    )
    made = spargeattn(tau=0.5, theta=0.1, lam=2.0, order=torch.randperm(70), block_q=16, block_k=16)
    attention = sp.compile(made, backend="reference")
    attention(q, k, v).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]  # type: ignore[union-attr]
    with torch.no_grad():
        mask = attention.to_mask(q, k)
    for x in (q, k, v):
        x.grad = None
    oracle.attention(q, k, v, mask)[0].square().sum().backward()
    for x, found in zip((q, k, v), got, strict=True):
        assert oracle.error(found, x.grad) < 1e-11  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["sm90", "ascend910b"])
@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "keys less their mean"),
        ({"order": torch.randperm(256)}, "a permutation of tokens"),
    ],
    ids=["plain", "permuted"],
)
def test_no_kernel_makes_it_and_lowering_says_which_part(
    given: dict[str, object], what: str, target: str
) -> None:
    shape = {"Sq": 256, "D": 64, "Dv": 64, "Hq": 4, "Hkv": 2}
    text = said(lambda: plan_for(spargeattn(**given), shape, "float16", None, {}, target))
    assert text == (
        f"CannotLower: {what} cannot be lowered: no kernel makes it yet.\n"
        "  help: use backend='reference'."
    )
