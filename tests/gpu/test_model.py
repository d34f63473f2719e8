"""A model on the card that attends by a pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spcomp.patterns import block_topk, quest, streaming_llm
from tests.gpu.card import DEVICE, compiled

pytestmark = pytest.mark.gpu


def _model() -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=128, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(DEVICE)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 101, (2, 150), device=DEVICE)
    real = torch.ones_like(ids)
    real[0, :37] = 0
    return ids, real


@torch.no_grad()
@pytest.mark.parametrize("name", ["block_topk", "streaming_llm", "quest"])
def test_a_pattern_that_keeps_everything_gives_the_logits_of_the_model(name: str) -> None:
    """B67. With padding on the left of one item."""
    model = _model()
    from spcomp.integrations import transformers as plug

    pattern = {
        "block_topk": block_topk(block=16, budget=1.0),
        "streaming_llm": streaming_llm(sinks=0, recent=512),
        "quest": quest(page=16, budget=512),
    }[name]
    ids, real = _batch()
    want = model(ids, attention_mask=real).logits
    with plug.using(model, compiled(pattern)) as plugged:
        got = model(ids, attention_mask=real).logits
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-4, atol=1e-4)
    assert set(plugged.calls) == {0, 1}


@torch.no_grad()
def test_generation_by_a_sparse_pattern_is_that_of_the_reference() -> None:
    """Token by token through the model's own cache."""
    model = _model()
    import spcomp as sp
    from spcomp.integrations import transformers as plug

    ids, _ = _batch()
    pattern = streaming_llm(sinks=4, recent=20)
    results = []
    for backend in ("triton", "reference"):
        with plug.using(model, sp.compile(pattern, backend=backend)):
            made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        results.append(made)
    assert torch.equal(results[0], results[1])
