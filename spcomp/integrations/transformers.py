"""Run a pattern as the attention of a Hugging Face transformers model.

`using` replaces it for a while, `register` for good under a name. Both register a mask function
beside the attention function: without one the library passes no mask at all, so that padding and
causality would vanish in silence (huggingface/transformers issue 45811).

Layout: the library passes query [B,Hq,Sq,D] and key, value [B,Hkv,Skv,D] after the rotation and the
cache, and takes [B,Sq,Hq,Dv] back. Padding is never seen by a pattern: an item of a padded batch
runs on its real tokens alone, and the rows of the padding are 0.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from spcomp.autotune import fidelity
from spcomp.errors import SpcompError
from spcomp.integrations.masks import MaskReader, Reading


class Attention(Protocol):
    """What `spcomp.compile` gives: q [B,Hq,Sq,D], k, v [B,Hkv,Skv,D] -> out [B,Hq,Sq,Dv]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = ...) -> Any:
        """Attend."""


AttentionTable: TypeAlias = Attention | Mapping[int, Attention]
"""One attention for every layer, or one for each layer index."""


class LayerWithoutAttention(SpcompError):
    """The table has no entry for a layer that the model runs."""

    message = "layer {layer} of {module} has no attention; the table covers {known}."
    help = (
        "add the layer to the table, or name the layers that run a pattern with layers=: "
        "the others then run dense."
    )


class LayersNotInTable(SpcompError):
    """`layers` names layers for which the table holds nothing."""

    message = "layers= names {extra}, but the table covers {known}."
    help = "give an attention for each of them, or drop them from layers=."


class ArgumentNotUnderstood(SpcompError):
    """The model asks of its attention something that a pattern does not do."""

    message = "layer {layer} of {module} passes {name}={value} to its attention, {meaning}."
    help = "{way_out}"


class ModelNotPluggable(SpcompError):
    """The model does not look its attention up in the library's registry."""

    message = "{model} keeps the attention '{kept}' and does not take '{name}'."
    help = "only models that go through transformers.AttentionInterface can run a pattern."


class ModelIgnoredAttention(SpcompError):
    """A forward finished without one call of the attention that was put in."""

    message = "{model} ran without calling the attention that was put in: 0 calls, {layers} layers."
    help = "check that layers= names layers of this model (they count from 0)."


class BadName(SpcompError):
    """The name would be taken for something else by the library."""

    message = "'{name}' cannot name an attention: {why}."
    help = "use letters, digits, '_', '.' and '-', for example 'spcomp'."


class AttentionOutputShape(SpcompError):
    """The attention gave back another shape than it was asked for."""

    message = "the attention of layer {layer} gave {given}, where {wanted} is needed."
    help = "return out [B, Hq, Sq, Dv] in the order of q's heads."


# What models hand through to every layer and attention does not depend on. position_ids are benign
# since a packed batch shows in the mask function, which turns it into a 4-D mask.
_BENIGN = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
_MEANING = {
    "output_attentions": "which asks for the probability map that no pattern keeps",
    "softcap": "which squashes the scores",
    "s_aux": "which adds a value-less sink to the softmax",
    "position_bias": "which adds a bias to the scores",
    "cu_seq_lens_q": "which packs several sequences in one row",
}


class PluggedAttention:
    """The function registered with the library; also counts its calls by layer.

    ``calls``: how often the pattern ran in each layer; dense layers are not counted.
    """

    def __init__(
        self,
        attention: AttentionTable,
        *,
        decode: AttentionTable | None = None,
        layers: Collection[int] | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        self.calls: Counter[int | None] = Counter()
        self._attention = attention
        self._decode = attention if decode is None else decode
        self._layers = None if layers is None else frozenset(layers)
        self._ignore = frozenset(ignore)
        self._reader = MaskReader()
        _check_layers(self._attention, self._layers)
        _check_layers(self._decode, self._layers)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend for one layer and give (out [B,Sq,Hq,Dv], None): no pattern keeps the weights."""
        layer = getattr(module, "layer_idx", None)
        batch, heads, sq, _ = query.shape
        self._refuse_arguments(module, layer, key.shape[2], {"dropout": dropout, **kwargs})
        attention = self._choose(module, layer, is_decode=sq == 1)
        reading = self._reader.read(attention_mask, batch=batch, sq=sq, skv=key.shape[2])
        out = _attend_real(attention, query, key, value, scaling, reading)
        wanted = (batch, heads, sq, value.shape[-1])
        if tuple(out.shape) != wanted:
            raise AttentionOutputShape(layer=layer, given=list(out.shape), wanted=list(wanted))
        return out.transpose(1, 2).contiguous(), None

    def _choose(self, module: nn.Module, layer: int | None, *, is_decode: bool) -> Attention:
        if self._layers is not None and layer not in self._layers:
            return dense_causal
        table = self._decode if is_decode else self._attention
        if not isinstance(table, Mapping):
            self.calls[layer] += 1
            return table
        if layer is None or layer not in table:
            raise LayerWithoutAttention(
                layer=layer, module=type(module).__name__, known=_some(table)
            )
        self.calls[layer] += 1
        return table[layer]

    def _refuse_arguments(
        self, module: nn.Module, layer: int | None, skv: int, arguments: dict[str, Any]
    ) -> None:
        if arguments.get("is_causal") is None:
            arguments["is_causal"] = getattr(module, "is_causal", True)
        for name, value in arguments.items():
            reason = None if name in self._ignore else _refusal(name, value, skv)
            if reason is not None:
                meaning, way_out = reason
                raise ArgumentNotUnderstood(
                    layer=layer,
                    module=type(module).__name__,
                    name=name,
                    value=_short(value),
                    meaning=meaning,
                    way_out=way_out,
                )


def _refusal(name: str, value: Any, skv: int) -> tuple[str, str] | None:
    """Say what an argument means and the way out, or None where a pattern may ignore it."""
    if name == "dropout":
        way_out = "set the model's attention_dropout to 0."
        return ("which drops attention weights at random", way_out) if value > 0 else None
    if name == "is_causal":
        return None if value else ("which lets queries see later keys", _ONLY_CAUSAL)
    if name == "sliding_window":
        has_effect = value is not None and value < skv
        meaning = f"which hides some of the {skv} keys that the pattern chooses from"
        return (meaning, _OTHER_LAYERS) if has_effect else None
    if name in _BENIGN or value is None or value is False:
        return None
    return _MEANING.get(name, "which the pattern knows nothing of"), _OTHER_LAYERS


_ONLY_CAUSAL = "keep this model's own attention: a pattern here is causal."
_OTHER_LAYERS = (
    "leave such layers out with layers=, write its effect into the pattern, or, if it changes "
    "nothing, name it in ignore=."
)


def register(
    attention: AttentionTable,
    name: str = "spcomp",
    *,
    decode: AttentionTable | None = None,
    layers: Collection[int] | None = None,
    ignore: Collection[str] = (),
) -> PluggedAttention:
    """Register an attention, and the mask function it needs, under one name.

    Afterwards ``model.set_attn_implementation(name)``, or ``attn_implementation=name`` when a model
    is loaded, runs it. A name registered before is replaced.

    attention: for every layer, or a table from layer index to attention. A layer that the table
        lacks is an error when it runs.
    decode: the same for calls with one query token; by default ``attention`` serves them too.
    layers: the layers that run a pattern. Only where this is given do the others run dense.
    ignore: names of arguments that the model passes and that change nothing.

    Raises: BadName, LayersNotInTable; when a model runs: MaskNotUnderstood, ArgumentNotUnderstood,
        LayerWithoutAttention.
    """
    _check_name(name)
    plugged = PluggedAttention(attention, decode=decode, layers=layers, ignore=ignore)
    transformers.AttentionInterface.register(name, plugged)
    transformers.AttentionMaskInterface.register(name, real_tokens_mask)
    return plugged


@contextmanager
def using(
    model: transformers.PreTrainedModel,
    attention: AttentionTable,
    *,
    decode: AttentionTable | None = None,
    layers: Collection[int] | None = None,
    ignore: Collection[str] = (),
) -> Iterator[PluggedAttention]:
    """Run the model's attention as ``attention`` inside the block, and restore it afterwards.

    The arguments are those of `register`. The value of the block holds ``calls`` by layer.

    Raises: ModelNotPluggable, and what `register` raises.
    """
    name = f"spcomp-{next(_BLOCKS)}"
    plugged = register(attention, name, decode=decode, layers=layers, ignore=ignore)
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        model.set_attn_implementation(name)
        kept = model.config._attn_implementation
        if kept != name:
            raise ModelNotPluggable(model=type(model).__name__, kept=kept, name=name)
        yield plugged
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        # The registry has no public way out, and an entry would keep the attention alive.
        for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            registry._global_mapping.pop(name, None)


def perplexity(
    model: transformers.PreTrainedModel,
    input_ids: Tensor,
    attention: AttentionTable | None = None,
    *,
    layers: Collection[int] | None = None,
    tokens_at_once: int = 512,
) -> fidelity.Perplexity:
    """Give the model's perplexity of a text, with its attention replaced or (None) as it is.

    input_ids [B, S] int64, S >= 2, without padding; every token but the first of a row is
    predicted, in natural log, from float32 logits.

    Raises: TooFewTokens, ModelIgnoredAttention, and what `using` raises.
    """
    if attention is None:
        return fidelity.perplexity(model, input_ids, tokens_at_once=tokens_at_once)
    with using(model, attention, layers=layers) as plugged:
        result = fidelity.perplexity(model, input_ids, tokens_at_once=tokens_at_once)
    if not plugged.calls:
        count = getattr(model.config, "num_hidden_layers", "unknown")
        raise ModelIgnoredAttention(model=type(model).__name__, layers=count)
    return result


def real_tokens_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Give the mask that `PluggedAttention` reads: None, or bool [B, tokens so far] of real tokens.

    The library calls it once a forward. Its size is linear in the length. Where the model asks for
    more than causality (windows, packed sequences), the whole 4-D map is made instead, so that it
    is judged by what it says and not by how it was asked for.
    """
    if mask_function is not causal_mask_function:
        whole: dict[str, Any] = {**kwargs, "q_offset": q_offset, "kv_offset": kv_offset}
        whole |= {"mask_function": mask_function, "attention_mask": attention_mask}
        whole["allow_is_causal_skip"] = False
        return sdpa_mask(batch_size, q_length, kv_length, **whole)
    # A cache with room left holds more keys than there are tokens so far.
    filled = min(int(q_offset) + q_length - kv_offset, kv_length)
    if attention_mask is None:
        if filled == kv_length:
            return None
        return torch.ones(batch_size, filled, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    real = attention_mask.bool()[:, kv_offset : kv_offset + filled]
    real = torch.nn.functional.pad(real, (0, filled - real.shape[1]))
    return None if filled == kv_length and bool(real.all()) else real


_BLOCKS = itertools.count()


def _attend_real(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float | None, reading: Reading
) -> Tensor:
    if reading is None:
        return _attend(attention, q, k, v, scale)
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    for group in reading:
        if not group.queries:
            continue
        items, keys = group.items, group.keys
        queries = _take(q, items, group.queries)
        part = _attend(attention, queries, _take(k, items, keys), _take(v, items, keys), scale)
        _put(out, items, group.queries, part)
    return out


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    out: Tensor = attention(q, k, v, scale=scale)
    return out


def _take(x: Tensor, items: tuple[int, ...], tokens: tuple[int, ...]) -> Tensor:
    """Cut batch items and tokens out of x [B, H, S, D]: a view where both are runs."""
    return x[_index(items, x.device)][:, :, _index(tokens, x.device)]


def _put(out: Tensor, items: tuple[int, ...], tokens: tuple[int, ...], part: Tensor) -> None:
    """Write part [items, H, tokens, D] to its place in out [B, H, S, D]."""
    rows, columns = _index(items, out.device), _index(tokens, out.device)
    if isinstance(rows, Tensor) and isinstance(columns, Tensor):
        # Two index tensors are paired up by torch and put first, before the heads.
        out[rows[:, None], :, columns] = part.transpose(1, 2)
    else:
        out[rows, :, columns] = part


def _index(places: tuple[int, ...], device: torch.device) -> slice | Tensor:
    if places[-1] - places[0] + 1 == len(places):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from one .gguf file, unpacked to ``dtype``.

    Needs the packages gguf and accelerate. Nothing is looked up on a network.
    """
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    extra: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases can also keep the weights packed where a kernel for that is installed.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, attn_implementation="sdpa", **where, **extra
    )
    return model, tokenizer


def dense_causal(q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
    """Attend densely for the layers that the user left out; causal, aligned bottom-right."""
    sq, skv = q.shape[2], k.shape[2]
    mask = None
    if sq > 1 and sq != skv:
        mask = torch.ones(sq, skv, dtype=torch.bool, device=q.device).tril(skv - sq)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=sq > 1 and mask is None, scale=scale, enable_gqa=True
    )


def _configs(model: transformers.PreTrainedModel) -> list[Any]:
    """List the configurations that hold an attention name, outer ones first."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found.setdefault(id(config), config)
    return list(found.values())


def _check_layers(table: AttentionTable, layers: frozenset[int] | None) -> None:
    if layers is None or not isinstance(table, Mapping):
        return
    extra = sorted(layers - table.keys())
    if extra:
        raise LayersNotInTable(extra=_some(extra), known=_some(table))


def _check_name(name: str) -> None:
    why = None
    if not re.fullmatch(r"[A-Za-z0-9_.\-]+", name):
        why = "the library reads '/' as a hub repository and '|' as a prefix"
    elif "flash" in name:
        why = "the library takes every name with 'flash' in it for FlashAttention"
    elif name in {"eager", "sdpa", "flex_attention"}:
        why = "it is one of the library's own"
    if why is not None:
        raise BadName(name=name, why=why)


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return repr(value)


def _some(layers: Collection[int]) -> str:
    shown = [str(layer) for layer in sorted(layers)]
    return "no layer" if not shown else "layers " + ", ".join(shown)
