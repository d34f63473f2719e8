"""A card that is not there: plans for sm_90 run on CPU tensors, and launches are noted, not made.

Run in a process of its own, without Triton's interpreter: `python pretend.py SCENARIO` prints what
a scenario saw as one line of JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import spcomp as sp
from spcomp import compiler
from spcomp.api import Attention
from spcomp.backends.base import Specialisation
from spcomp.backends.triton import TritonBackend, generated, launcher, store
from spcomp.backends.triton.bind import bind
from spcomp.backends.triton.generated import Generated
from spcomp.backends.triton.manifest import best_class, manifest_of, options_of, signature_of
from spcomp.backends.triton.offline import build_offline
from spcomp.backends.triton.store import Form, gpu_target
from spcomp.backends.triton.targets import TARGETS
from spcomp.cache import default_store
from spcomp.dsl.pattern import Pattern
from spcomp.kvcache import KVCache
from spcomp.patterns import block_topk, moba, quest, streaming_llm

ROOT = Path(__file__).resolve().parents[3]
PATTERNS: dict[str, Pattern] = {
    "streaming_llm": streaming_llm(sinks=4, recent=100),
    "block_topk": block_topk(block=32, budget=4),
    "quest": quest(page=16, budget=64),
    "moba": moba(block=64, k_blocks=2),
}
Shape = tuple[int, int, int, int, int, int]  # B, Hq, Hkv, Sq, Skv, D


@dataclass(frozen=True, slots=True)
class Noted:
    """One launch as the C launcher would get it."""

    kernel: str
    grid: int
    stream: int
    arguments: dict[str, Any]


class NotedKernel:
    """In place of Triton's compiled kernel."""

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, generated: Generated, into: list[Noted]) -> None:
        self.generated, self.into = generated, into
        self.metadata = SimpleNamespace(global_scratch_size=512 if generated.is_gluon else 0)

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        """Note a launch."""
        function, packed, metadata, enter, leave, *arguments = rest
        assert (y, z, function, packed) == (1, 1, self.function, self.packed_metadata)
        assert (metadata, enter, leave) == (None, None, None)
        named = dict(zip(self.generated.arg_names, arguments, strict=True))
        self.into.append(Noted(f"{self.generated.kernel}_kernel", x, stream, named))


@contextmanager
def card() -> Iterator[list[Noted]]:
    """Put the card in place; gives the list of launches."""
    noted: list[Noted] = []
    launcher.obtain = lambda form: NotedKernel(form.generated, noted)
    launcher.current_target = lambda: gpu_target("cuda:90", 32)
    launcher.raw_stream = lambda device: 7
    TritonBackend.target_of = lambda self, device: TARGETS["sm90"]
    yield noted


def tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Make q, k, v in bfloat16."""
    b, hq, hkv, sq, skv, d = shape
    q = torch.zeros(b, hq, sq, d, dtype=torch.bfloat16)
    k = torch.zeros(b, hkv, skv, d, dtype=torch.bfloat16)
    return q, k, torch.zeros_like(k)


def attention(name: str) -> Attention:
    """Compile a pattern for the card."""
    return sp.compile(PATTERNS[name], backend="triton")


def lengths() -> object:
    """Count what other lengths compile, by pattern, phase and head dimension."""
    seen = {}
    with card():
        for name in PATTERNS:
            for phase, rows in (("prefill", (100, 128, 333, 1000, 2048)), ("decode", (1, 3))):
                for dim in (64, 80, 17):
                    counts = []
                    attend = attention(name)
                    for n in rows:
                        for more in (0, 37, 700) if phase == "decode" else (0, 5):
                            before = launcher.STATS.forms
                            attend(*tensors((2, 6, 2, n, 300 + n + more, dim)))
                            counts.append(launcher.STATS.forms - before)
                    seen[f"{name} {phase} {dim}"] = counts
    return seen


def strides() -> object:
    """Count what tensors of other alignment compile: rows of 72 elements, and a start off 16."""
    q, k, v = tensors((1, 4, 2, 256, 256, 64))
    loose = torch.zeros(1, 2, 256, 72, dtype=torch.bfloat16)[..., :64]
    moved = torch.zeros(k.numel() + 1, dtype=torch.bfloat16)[1:].view(k.shape)
    counts = {}
    with card() as noted:
        attend = attention("streaming_llm")
        for name, given in (
            ("first", k),
            ("loose", loose),
            ("loose again", loose),
            ("moved", moved),
        ):
            before = launcher.STATS.forms
            attend(q, given, v)
            counts[name] = launcher.STATS.forms - before
        readers = {n.kernel for n in noted if "k_ptr" in n.arguments}
        counts["kernels that read k"] = sorted(readers)
    return counts


def warm() -> object:
    """Count preparations and compilations of a repeated call, and note its stream and pointers."""
    q, k, v = tensors((1, 4, 2, 256, 256, 64))
    with card() as noted:
        attend = attention("block_topk")
        attend(q, k, v)
        first, before = len(noted), (launcher.STATS.prepared, launcher.STATS.forms)
        out, lse = attend(q, k, v, return_lse=True)
        last = noted[-1]
        return {
            "launches": [first, len(noted) - first, len(attend.built(q, k, v).plan.launches())],
            "more": [
                launcher.STATS.prepared - before[0],
                launcher.STATS.forms - before[1],
            ],
            "streams": sorted({n.stream for n in noted}),
            "is_given": [
                last.arguments["q_ptr"] == q.data_ptr(),
                last.arguments["k_ptr"] == k.data_ptr(),
                last.arguments["out_ptr"] == out.data_ptr(),
                last.arguments["lse_ptr"] == lse.data_ptr(),
            ],
        }


def threads() -> object:
    """Attend from four threads with more shapes than are kept."""
    failures: list[str] = []
    with card() as noted:
        attend = attention("streaming_llm")
        attend(*tensors((1, 4, 2, 32, 32, 64)))
        compiled = launcher.STATS.forms

        def work(first: int) -> None:
            try:
                for n in range(300):
                    attend(*tensors((1, 4, 2, 32 + (first * 100 + n) % 350, 400, 64)))
            except Exception as error:
                failures.append(repr(error))

        running = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return {
            "failures": failures,
            "compiled": launcher.STATS.forms - compiled,
            "launches": len(noted),
        }


def cache() -> object:
    """Count what steps of decoding with a cache compile, and launches of an append."""
    with card() as noted:
        attend = attention("quest")
        held = KVCache.empty(attend, batch=1, kv_heads=2, head_dim=64, capacity=512, device="cpu")
        q, k, v = tensors((1, 4, 2, 1, 100, 64))
        counts = []
        held.append(k, v)
        for n in range(40):
            if n == 2:
                launcher.STATS.forms = 0
            held.append(k[:, :, :1], v[:, :, :1])
            noted.clear()
            held.attend(q)
            counts.append([n.kernel for n in noted])
        return {"compiled": launcher.STATS.forms, "kernels": counts[-1]}


def stored() -> object:
    """Compile a kernel, load it again from the cache, and once more after the cache is gone."""
    chip, spec = TARGETS["sm90"], Specialisation("bfloat16", 64, 64)
    backend = TritonBackend()
    plan = compiler.lower(PATTERNS["streaming_llm"], backend=backend, target=chip, spec=spec)
    source = backend.emit(plan, chip, spec)
    built = build_offline(source)[0]
    launch = next(iter(plan.launches()))
    text = generated.read(launch.kernel, source.files[0].text)
    manifest = manifest_of(bind(launch, plan), plan, spec.dtype)
    signature = signature_of(text, manifest, best_class(manifest))
    form = Form(text, signature, gpu_target("cuda:90", 32), options_of(launch, text))
    compiles: list[str] = []
    compile_form = store.compile_form
    store.compile_form = lambda f, at: compiles.append(f.generated.kernel) or compile_form(f, at)
    loaded = store.obtain(form)
    after_load = len(compiles)
    shutil.rmtree(default_store().path_of(form.key))
    fresh = store.obtain(form)
    again = store.obtain(form)
    return {
        "compiles": [after_load, len(compiles)],
        "binaries": [k.kernel == built.binary for k in (loaded, fresh, again)],
        "packed": [k.packed_metadata == fresh.packed_metadata for k in (loaded, again)],
        "files": sorted(p.name for p in default_store().path_of(form.key).iterdir()),
        "names": [loaded.name, fresh.name],
        "lines": generated.without_header(source.files[0].text)
        == generated.without_header(
            (default_store().path_of(form.key) / "tiles.py").read_text(encoding="utf-8")
        ),
    }


SCENARIOS: dict[str, Callable[[], object]] = {
    f.__name__: f for f in (lengths, strides, warm, threads, cache, stored)
}


def run(scenario: str) -> Any:
    """Run a scenario in a process without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, scenario], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]]()))
