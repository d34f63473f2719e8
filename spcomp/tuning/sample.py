"""The tensors a tuning measures with, and their way into another process: raw bytes, never pickle.

Strides and alignment travel too, since a kernel is compiled for their class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spcomp.ir import dims
from spcomp.ir.nodes import Argument

ALIGNED_BYTES = 16
INDEX = "tensors.json"


def random_sample(
    shape: Mapping[str, int], dtype: str, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv] from a normal distribution, without
    touching torch's own generators."""
    generator = torch.Generator(device).manual_seed(seed)
    kind = getattr(torch, dtype)
    q, k, v = (
        torch.randn([shape[n] for n in names], generator=generator, device=device, dtype=kind)
        for names in (("B", "Hq", "Sq", "D"), ("B", "Hkv", "Skv", "D"), ("B", "Hkv", "Skv", "Dv"))
    )
    return q, k, v


def random_arguments(
    takes: Sequence[Argument], shape: Mapping[str, int], dtype: str, device: str, seed: int
) -> dict[str, Tensor]:
    """Draw what a call brings beside q, k and v, by name: floats from a normal distribution, and
    zeros for integers. shape: also of the dims that the pattern named."""
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {}
    for node in takes:
        kind = getattr(torch, dtype if node.dtype == "data" else node.dtype)
        sizes = [dims.evaluate(d, shape) for d in node.dims]
        if kind.is_floating_point:
            drawn[node.name] = torch.randn(sizes, generator=generator, device=device, dtype=kind)
        else:
            drawn[node.name] = torch.zeros(sizes, device=device, dtype=kind)
    return drawn


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 of names, dtypes, shapes, layouts and values; "" for no tensors."""
    if not tensors:
        return ""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, _form_of(tensor)]).encode())
        whole.update(_bytes_of(tensor))
    return whole.hexdigest()


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a new folder: one file of values each, and one index."""
    folder.mkdir(mode=0o700)
    for name, tensor in tensors.items():
        (folder / f"{name}.bin").write_bytes(_bytes_of(tensor))
    index = {name: _form_of(tensor) for name, tensor in tensors.items()}
    (folder / INDEX).write_text(json.dumps(index))


def load(folder: Path, device: str) -> dict[str, Tensor]:
    """Read tensors back on a device, with the strides and the alignment they had."""
    index = json.loads((folder / INDEX).read_text())
    return {name: _load(folder / f"{name}.bin", form, device) for name, form in index.items()}


def _form_of(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "misaligned": tensor.data_ptr() % ALIGNED_BYTES,
    }


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _load(path: Path, form: Mapping[str, Any], device: str) -> Tensor:
    dtype, shape, stride = getattr(torch, form["dtype"]), form["shape"], form["stride"]
    data = bytearray(path.read_bytes())
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    offset = form["misaligned"] // dtype.itemsize
    reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n)
    whole = torch.zeros(reach, dtype=dtype, device=device)
    made = whole.as_strided(shape, stride, offset)
    if values.numel():
        # A dimension of stride 0 is one value seen many times: it is written once.
        once = tuple(0 if s == 0 else slice(None) for s in stride)
        made[once].copy_(values.view(shape)[once])
    return made
