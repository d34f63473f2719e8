"""A pattern as the attention of a transformers model: padding, masks, caches, refusals."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spcomp.integrations import transformers as plug
from spcomp.integrations.masks import MaskNotUnderstood, MaskReader

VOCABULARY = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        attn_implementation="eager",
        **SIZES,
        **HEADS,
    )
    return transformers.LlamaForCausalLM(config).eval()


def causal(q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
    """Plain attention that knows nothing of padding."""
    return windowed(q, k, v, scale=scale, window=k.shape[2] + 1)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None, window: int = 3
) -> Tensor:
    """Keep the sink key and the last ``window`` keys, written from the definition."""
    sq, skv, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    own = torch.arange(sq)[:, None] + skv - sq
    key = torch.arange(skv)[None, :]
    visible = (key <= own) & ((own - key < window) | (key == 0))
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return probs @ v.repeat_interleave(group, 1)


class Layer(nn.Module):
    """What a model passes as itself."""

    def __init__(self, layer_idx: int | None = 0, is_causal: bool = True) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.num_key_value_groups = 2


def operands(batch: int = 2, sq: int = 6, skv: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    keys, values = torch.randn(2, batch, 2, skv, 8)
    return torch.randn(batch, 4, sq, 8), keys, values


def call(mask: object, *, attention: plug.AttentionTable = causal, **kwargs: object) -> Tensor:
    q, k, v = operands()
    out, weights = plug.PluggedAttention(attention)(Layer(), q, k, v, mask, scaling=0.3, **kwargs)
    assert weights is None
    return out


def padded_batch(side: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    ids = torch.randint(1, VOCABULARY, (2, 9))
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return ids, real


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_eager_on_real_tokens(side: str) -> None:
    model = tiny_llama()
    ids, real = padded_batch(side)
    with torch.no_grad():
        want = model(ids, attention_mask=real).logits
        with plug.using(model, causal) as plugged:
            got = model(ids, attention_mask=real).logits
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-5, atol=1e-6)
    assert plugged.calls == {0: 1, 1: 1, 2: 1}


def test_a_sparse_pattern_never_counts_padding_as_its_sink_or_window() -> None:
    model = tiny_llama()
    ids, real = padded_batch("left")
    with torch.no_grad(), plug.using(model, windowed):
        together = model(ids, attention_mask=real).logits
        alone = model(ids[:1, 4:]).logits
    torch.testing.assert_close(together[:1, 4:], alone, rtol=1e-5, atol=1e-6)


def test_one_registration_fills_both_registries() -> None:
    plug.register(causal, "spcomp-test-both")
    assert "spcomp-test-both" in transformers.AttentionInterface()
    assert "spcomp-test-both" in transformers.AttentionMaskInterface()


def test_a_registered_name_serves_a_model_from_its_first_forward() -> None:
    plug.register(causal, "spcomp-test-name")
    model = tiny_llama()
    ids, real = padded_batch("left")
    want = model(ids, attention_mask=real).logits[real.bool()]
    model.set_attn_implementation("spcomp-test-name")
    got = model(ids, attention_mask=real).logits[real.bool()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_without_a_mask_the_pattern_alone_is_causal() -> None:
    q, k, v = operands()
    assert torch.equal(call(None), causal(q, k, v, scale=0.3).transpose(1, 2))


@pytest.mark.parametrize("kind", ["padding", "bool", "float", "float-infinite", "per head"])
def test_every_kind_of_mask_hides_the_same_padding(kind: str) -> None:
    q, k, v = operands()
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    visible = real.bool()[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = {"float": torch.finfo(torch.float32).min, "float-infinite": -torch.inf}.get(kind, 0.0)
    mask = {
        "padding": real,
        "bool": visible,
        "per head": visible.expand(2, 4, 6, 6),
    }.get(kind, torch.zeros(2, 1, 6, 6).masked_fill(~visible, hidden))
    got = call(mask)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-5, atol=1e-6)
    assert not got[0, :2].any(), "rows of padding are 0"


@given(data=st.data(), batch=st.integers(1, 3), sq=st.integers(1, 7), before=st.integers(0, 5))
def test_any_padding_reads_the_same_from_two_and_from_four_dimensions(
    data: st.DataObject, batch: int, sq: int, before: int
) -> None:
    skv = sq + before
    bits = st.lists(st.booleans(), min_size=skv, max_size=skv)
    real = torch.tensor(data.draw(st.lists(bits, min_size=batch, max_size=batch)))
    real[:, -1] = True  # a batch whose last key is hidden everywhere is a cache with room left
    own = torch.arange(sq)[:, None] + before
    visible = real[:, None, None, :] & (torch.arange(skv) <= own)
    read = MaskReader().read
    assert read(real, batch=batch, sq=sq, skv=skv) == read(visible, batch=batch, sq=sq, skv=skv)


@given(data=st.data(), sq=st.integers(1, 6), before=st.integers(0, 4))
def test_any_padded_call_equals_the_masked_softmax_on_real_tokens(
    data: st.DataObject, sq: int, before: int
) -> None:
    skv = sq + before
    bits = st.lists(st.booleans(), min_size=skv, max_size=skv)
    real = torch.tensor(data.draw(st.lists(bits, min_size=3, max_size=3)))
    q, k, v = operands(3, sq, skv)
    out, _ = plug.PluggedAttention(causal)(Layer(), q, k, v, real, scaling=0.3)
    own = torch.arange(sq)[:, None] + before
    visible = real[:, None, None, :] & (torch.arange(skv) <= own)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    own_is_real = real[:, before:]
    torch.testing.assert_close(out[own_is_real], want[own_is_real], rtol=1e-5, atol=1e-6)
    assert not out[~own_is_real].any()


def future() -> Tensor:
    return torch.ones(2, 1, 6, 6, dtype=torch.bool)


def biased() -> Tensor:
    return torch.zeros(2, 1, 6, 6).masked_fill(~future().tril(), -torch.inf) - 0.5


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (future(), "is not causal with padding (given: torch.bool [2, 1, 6, 6]"),
        (future().tril().triu(-2), "is not causal with padding (given: torch.bool [2, 1, 6, 6]"),
        (
            biased(),
            "adds a bias: it holds values between -10000 and 0, or above 0 "
            "(given: torch.float32 [2, 1, 6, 6]",
        ),
        (
            future().tril().expand(2, 4, 6, 6).clone().index_fill_(1, torch.tensor([2]), False),
            "differs between heads (given: torch.bool [2, 4, 6, 6]",
        ),
        (
            future().tril().long(),
            "is of integers, which may mean visible or hidden (given: torch.int64 [2, 1, 6, 6]",
        ),
        (
            future()[:, 0],
            "has 3 dimensions where 2 or 4 are understood (given: torch.bool [2, 6, 6]",
        ),
        (
            torch.ones(2, 5, dtype=torch.long),
            "is not of 2 rows and 6 to 6 columns (given: torch.int64 [2, 5]",
        ),
        (
            torch.full((2, 6), 2),
            "holds something other than 0 and 1 (given: torch.int64 [2, 6]",
        ),
        ({"full_attention": None}, "is not a tensor (given: dict"),
    ],
    ids=["future", "window", "bias", "heads", "integers", "3-D", "short", "twos", "dict"],
)
def test_a_mask_that_says_more_is_refused(mask: object, problem: str) -> None:
    with pytest.raises(MaskNotUnderstood) as refused:
        call(mask)
    assert str(refused.value) == (
        f"MaskNotUnderstood: the attention mask {problem}; queries: 6, keys: 6).\n"
        "  help: pass the padding mask [B, Skv] (1 = real token), a causal mask with padding "
        "columns hidden, or None; any other visibility belongs into the pattern."
    )


def test_a_packed_batch_is_refused() -> None:
    model = tiny_llama()
    ids = torch.arange(1, 7)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    refused = pytest.raises(MaskNotUnderstood, match="not causal with padding")
    with plug.using(model, causal), refused:
        model(ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_gives_the_tokens_of_eager(cache: str) -> None:
    model = tiny_llama()
    ids, real = padded_batch("left")
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted |= {"attention_mask": real, "cache_implementation": cache, "disable_compile": True}
    want = model.generate(ids, **wanted)
    with plug.using(model, causal) as plugged:
        got = model.generate(ids, **wanted)
    assert torch.equal(got, want)
    assert plugged.calls[0] == 6


def test_prefill_in_chunks_into_a_static_cache_equals_eager() -> None:
    model = tiny_llama()
    ids, _ = padded_batch("left")

    def run() -> list[Tensor]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        chunks = (ids[:, :5], ids[:, 5:8], ids[:, 8:])
        with torch.no_grad():
            return [model(chunk, cache=cache).logits for chunk in chunks]

    want = run()
    with plug.using(model, causal):
        got = run()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_decode_has_an_attention_of_its_own_where_one_is_given() -> None:
    lengths: list[tuple[str, int, int]] = []

    def note(phase: str) -> plug.Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
            lengths.append((phase, q.shape[2], k.shape[2]))
            return causal(q, k, v, scale=scale)

        return attend

    model = tiny_llama()
    ids, _ = padded_batch("left")
    with plug.using(model, note("prefill"), decode=note("decode")):
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert lengths == [("prefill", 9, 9)] * 3 + [("decode", 1, 10)] * 3


def test_a_layer_missing_from_the_table_is_refused_rather_than_run_dense() -> None:
    model = tiny_llama()
    ids, _ = padded_batch("left")
    with (
        plug.using(model, {0: causal, 2: causal}),
        pytest.raises(plug.LayerWithoutAttention) as refused,
    ):
        model(ids)
    assert str(refused.value) == (
        "LayerWithoutAttention: layer 1 of LlamaAttention has no attention; the table covers "
        "layers 0, 2.\n  help: add the layer to the table, or name the layers that run a pattern "
        "with layers=: the others then run dense."
    )


def test_layers_outside_the_named_ones_run_dense_with_the_same_padding() -> None:
    model = tiny_llama()
    ids, real = padded_batch("left")
    want = model(ids, attention_mask=real).logits[real.bool()]
    with plug.using(model, {1: causal}, layers=[1]) as plugged:
        got = model(ids, attention_mask=real).logits[real.bool()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert plugged.calls == {1: 1}


def test_layers_beyond_the_table_are_refused() -> None:
    with pytest.raises(plug.LayersNotInTable) as refused:
        plug.PluggedAttention({0: causal}, layers=[0, 5])
    assert str(refused.value) == (
        "LayersNotInTable: layers= names layers 5, but the table covers layers 0.\n"
        "  help: give an attention for each of them, or drop them from layers=."
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"dropout": 0.1},
            "dropout=0.1 to its attention, which drops attention weights at random.",
        ),
        (
            {"is_causal": False},
            "is_causal=False to its attention, which lets queries see later keys.",
        ),
        (
            {"sliding_window": 4},
            "sliding_window=4 to its attention, which hides some of the 6 keys that the pattern "
            "chooses from.",
        ),
        ({"softcap": 50.0}, "softcap=50.0 to its attention, which squashes the scores."),
        (
            {"s_aux": torch.zeros(4)},
            "s_aux=a tensor [4] to its attention, which adds a value-less sink to the softmax.",
        ),
        ({"warp": 3}, "warp=3 to its attention, which the pattern knows nothing of."),
    ],
    ids=["dropout", "is_causal", "sliding_window", "softcap", "s_aux", "unknown"],
)
def test_what_a_pattern_does_not_do_is_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(plug.ArgumentNotUnderstood) as refused:
        call(None, **arguments)
    first, _ = str(refused.value).split("\n  help: ")
    assert first == f"ArgumentNotUnderstood: layer 0 of Layer passes {text}"


@pytest.mark.parametrize(
    "arguments",
    [{"dropout": 0.0}, {"sliding_window": 6}, {"softcap": None}, {"use_cache": True}],
    ids=["dropout", "sliding_window", "softcap", "use_cache"],
)
def test_arguments_without_effect_are_let_through(arguments: dict[str, object]) -> None:
    assert torch.equal(call(None, **arguments), call(None))


def test_an_argument_named_in_ignore_is_let_through() -> None:
    q, k, v = operands()
    plugged = plug.PluggedAttention(causal, ignore=["warp"])
    plugged(Layer(), q, k, v, None, warp=3)
    assert plugged.calls == {0: 1}


def test_a_module_that_is_not_causal_is_refused() -> None:
    q, k, v = operands()
    with pytest.raises(plug.ArgumentNotUnderstood, match="lets queries see later keys"):
        plug.PluggedAttention(causal)(Layer(is_causal=False), q, k, v, None)


def test_an_output_of_another_shape_is_refused() -> None:
    def half(q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
        return q[:, :2]

    with pytest.raises(plug.AttentionOutputShape) as refused:
        call(None, attention=half)
    assert str(refused.value).startswith(
        "AttentionOutputShape: the attention of layer 0 gave [2, 2, 6, 8], where [2, 4, 6, 8] "
    )


@pytest.mark.parametrize("name", ["sdpa", "my-flash", "org/attention", "paged|x", ""])
def test_names_the_library_reads_otherwise_are_refused(name: str) -> None:
    with pytest.raises(plug.BadName):
        plug.register(causal, name)


def test_the_model_gets_its_attention_back_even_after_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(KeyError), plug.using(model, causal):
        inside = model.config._attn_implementation
        assert inside in transformers.AttentionInterface()
        raise KeyError
    assert model.config._attn_implementation == "eager"
    assert inside not in transformers.AttentionInterface()
    assert inside not in transformers.AttentionMaskInterface()


def test_blocks_nest() -> None:
    model = tiny_llama()
    ids, _ = padded_batch("left")
    with plug.using(model, causal) as outer:
        with plug.using(model, windowed) as inner:
            model(ids)
        model(ids)
    assert (outer.calls[0], inner.calls[0]) == (1, 1)


def test_a_model_that_cannot_take_an_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    refused = pytest.raises(plug.ModelNotPluggable, match="keeps the attention 'eager'")
    with refused, plug.using(model, causal):
        pass


def test_gradients_flow_through_a_padded_batch() -> None:
    model = tiny_llama().train()
    ids, real = padded_batch("left")
    # The last row of the padding predicts the first real token: its label is left out too.
    labels = ids.masked_fill(real.roll(1, 1) * real == 0, -100)

    def gradient() -> Tensor:
        model.zero_grad()
        model(ids, attention_mask=real, labels=labels).loss.backward()
        found = model.model.layers[0].self_attn.k_proj.weight.grad
        assert found is not None
        return found.clone()

    want = gradient()
    with plug.using(model, causal):
        torch.testing.assert_close(gradient(), want, rtol=1e-4, atol=1e-6)


def test_perplexity_is_the_exponential_of_the_loss_over_every_token() -> None:
    model = tiny_llama()
    ids, _ = padded_batch("left")
    loss = model(ids, labels=ids).loss.item()
    dense = plug.perplexity(model, ids, tokens_at_once=3)
    plugged = plug.perplexity(model, ids, causal)
    sparse = plug.perplexity(model, ids, windowed)
    assert dense.nll_mean == pytest.approx(loss, rel=1e-6)
    assert dense.tokens == 16
    assert plugged.value == pytest.approx(dense.value, rel=1e-6)
    assert abs(sparse.value / dense.value - 1) > 1e-5, "the pattern reached the logits"


def test_a_perplexity_in_which_no_layer_ran_the_pattern_is_refused() -> None:
    ids, _ = padded_batch("left")
    with pytest.raises(plug.ModelIgnoredAttention) as refused:
        plug.perplexity(tiny_llama(), ids, causal, layers=[7])
    assert str(refused.value) == (
        "ModelIgnoredAttention: LlamaForCausalLM ran without calling the attention that was put "
        "in: 0 calls, 3 layers.\n  help: check that layers= names layers of this model (they "
        "count from 0)."
    )
