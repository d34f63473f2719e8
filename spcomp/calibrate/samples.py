"""What the layers of a model hand to attention, read from a file: what a search looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcomp import arguments
from spcomp.errors import SpcompError

Layer = tuple[Tensor, Tensor, Tensor]


class NotASample(SpcompError):
    """A file does not hold the tensors of layers."""

    message = "{path} is no sample: {problem}."
    help = (
        "write one with torch.save([{{'q': q, 'k': k, 'v': v}}, ...], FILE), one entry a layer, as "
        "spcomp.capture.capture_qkv gives them."
    )


def read_sample(path: str | Path) -> tuple[Layer, ...]:
    """Read a list over layers of {"q", "k", "v"} that `torch.save` wrote; nothing in it is run.

    q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] of each layer, on the host.
    Raises: NotASample; and what a call raises for tensors that do not fit each other.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its readers raise, without a base of its own
        reason = str(error).partition("\n")[0].rstrip(".")
        raise NotASample(path=path, problem=f"torch cannot load it ({reason})") from None
    if not isinstance(held, list) or not held:
        raise NotASample(path=path, problem=f"it holds {_shown(held)}, not a list over layers")
    return tuple(_layer(path, number, layer) for number, layer in enumerate(held))


def _layer(path: str | Path, number: int, layer: Any) -> Layer:
    if not isinstance(layer, dict) or not {"q", "k", "v"} <= set(layer):
        raise NotASample(path=path, problem=f"layer {number} is {_shown(layer)}, not q, k and v")
    q, k, v = (layer[name] for name in ("q", "k", "v"))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise NotASample(
                path=path,
                problem=f"{name} of layer {number} is {_shown(tensor)}, not a tensor of rank 4",
            )
    arguments.dims_of(q, k, v)
    return q, k, v


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    return f"a {type(value).__name__}" if value else f"an empty {type(value).__name__}"
