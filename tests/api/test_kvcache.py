"""A cache changes nothing: attending through it equals attending to all tokens at once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.errors import ShapeMismatch
from spcomp.patterns import quest, streaming_llm
from tests.conformance.cases import device_of

HQ, HKV, D = 4, 2, 16
BACKENDS = ["reference", "triton"]


@sp.pattern
def by_mean(q, k, v):
    """One state that is no pair, with pages that no tile divides."""
    pages = sp.cached(sp.downsample(k, block=10, by="mean"), name="means")
    best = sp.topk(sp.score(q, pages), k=3, always=sp.own())
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def complete_pages(q, k, v):
    """Pages that exist once they are full: fewer than the tokens would need."""
    pages = sp.cached(sp.downsample(k, block=16, by="minmax", tail="drop"))
    best = sp.topk(sp.score(q, pages), k=8)
    return sp.attend(q, sp.gather(k, best), sp.gather(v, best))


@sp.pattern
def compressed(q, k, v):
    """Overlapping units as keys and values: what was appended last changes several of them."""
    keys = sp.cached(sp.downsample(k, block=8, stride=4, tail="drop"), name="keys")
    values = sp.cached(sp.downsample(v, block=8, stride=4, tail="drop"), name="values")
    near = sp.attend(q, sp.gather(k, sp.window(6)), sp.gather(v, sp.window(6)))
    return sp.merge(sp.attend(q, keys, values), near)


PATTERNS = {
    "quest": quest(page=16, budget=48),
    "quest by groups": quest(page=8, budget=24, heads="group"),
    "by mean": by_mean(),
    "complete pages": complete_pages(),
    "compressed": compressed(),
    "no state": streaming_llm(sinks=2, recent=20),
}


def _cache(backend: str, pattern: sp.Pattern, capacity: int = 128, batch: int = 1) -> sp.KVCache:
    return sp.KVCache.empty(
        sp.compile(pattern, backend=backend),
        batch=batch,
        kv_heads=HKV,
        head_dim=D,
        capacity=capacity,
        dtype=torch.float32,
        device=device_of(backend),
    )


def _tokens(backend: str, n: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, HKV, n, D).to(device_of(backend))
    return k, v


def _assert_like_all_tokens(cache: sp.KVCache, rows: int, k: Tensor, v: Tensor) -> None:
    """Attend through the cache, and without it to all tokens appended."""
    q = torch.randn(k.shape[0], HQ, rows, D).to(k.device)
    assert cache.length == k.shape[2]
    out, lse = cache.attend(q, return_lse=True)
    want, want_lse = cache.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_appends_of_any_size_equal_one_call_on_all_tokens(backend: str, name: str) -> None:
    batch = 2 if backend == "reference" else 1
    cache = _cache(backend, PATTERNS[name], batch=batch)
    k, v = (x[:, :, :0] for x in _tokens(backend, 1, batch))
    for n in (3, 30, 1, 17, 16):
        new_k, new_v = _tokens(backend, n, batch)
        cache.append(new_k, new_v)
        k, v = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
        _assert_like_all_tokens(cache, 1, k, v)
    _assert_like_all_tokens(cache, 4, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["quest", "by mean"])
@pytest.mark.parametrize("forgotten", [1, 7, 40])
def test_other_tokens_after_a_rewind_leave_no_trace(
    backend: str, name: str, forgotten: int
) -> None:
    cache = _cache(backend, PATTERNS[name])
    k, v = _tokens(backend, 60)
    cache.append(100 * k, v)  # so large that a page's old bound would win
    cache.rewind(60)
    cache.append(k, v)
    cache.rewind(forgotten)
    k, v = k[:, :, : 60 - forgotten], v[:, :, : 60 - forgotten]
    _assert_like_all_tokens(cache, 1, k, v)
    new_k, new_v = _tokens(backend, 5)
    cache.append(new_k / 100, new_v)
    k, v = torch.cat([k, new_k / 100], dim=2), torch.cat([v, new_v], dim=2)
    _assert_like_all_tokens(cache, 1, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_snapshot_is_gone_back_to(backend: str) -> None:
    cache = _cache(backend, PATTERNS["quest"])
    k, v = _tokens(backend, 37)
    cache.append(k, v)
    noted = cache.snapshot()
    q = torch.randn(1, HQ, 1, D).to(k.device)
    before = cache.attend(q)
    for n in (1, 20):
        cache.append(*_tokens(backend, n))
        assert not torch.equal(cache.attend(q), before)
        cache.restore(noted)
        assert cache.length == 37
        assert torch.equal(cache.attend(q), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_at_once_use_the_state_too(backend: str) -> None:
    cache = _cache(backend, PATTERNS["quest by groups"])
    k, v = _tokens(backend, 40)
    cache.append(k, v)
    _assert_like_all_tokens(cache, 20, k, v)


def test_the_state_is_read_and_not_made_again() -> None:
    """Minima and maxima that lie hide a page: it is they that are read."""
    for backend in BACKENDS:
        cache = _cache(backend, quest(page=16, budget=32))
        cache.append(*_tokens(backend, 64))
        q = torch.randn(1, HQ, 1, D).to(cache.k.device)
        honest = cache.attend(q)
        for name, tensor in cache.states.items():
            tensor[:, :, 0] = 1e4 if name.endswith("max") else -1e4
        page = cache.k[:, :, 0:16], cache.v[:, :, 0:16]
        last = cache.k[:, :, 48:64], cache.v[:, :, 48:64]
        two = [torch.cat(x, dim=2) for x in zip(page, last, strict=True)]
        want = sp.compile(streaming_llm(sinks=0, recent=32), backend="reference")(q, *two)
        torch.testing.assert_close(cache.attend(q), want, rtol=0, atol=1e-6)
        assert not torch.equal(honest, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_an_empty_cache(backend: str) -> None:
    cache = _cache(backend, PATTERNS["quest"])
    q = torch.randn(1, HQ, 1, D).to(cache.k.device)
    out, lse = cache.attend(q, return_lse=True)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    k, v = _tokens(backend, 20)
    cache.append(k, v)
    want = cache.attention(q, k, v, scale=0.7)
    torch.testing.assert_close(cache.attend(q, scale=0.7), want, rtol=0, atol=1e-6)
    cache.rewind(20)
    assert not cache.attend(q).any()


def test_values_may_be_narrower_than_keys() -> None:
    attention = sp.compile(quest(page=8, budget=16), backend="reference")
    cache = sp.KVCache.empty(
        attention, batch=1, kv_heads=1, head_dim=8, value_dim=3, capacity=40,
        dtype=torch.float64, device="cpu",
    )  # fmt: skip
    k, v = torch.randn(1, 1, 33, 8).double(), torch.randn(1, 1, 33, 3).double()
    cache.append(k, v)
    q = torch.randn(1, 2, 1, 8).double()
    torch.testing.assert_close(cache.attend(q), attention(q, k, v), rtol=0, atol=1e-12)


def _message(action: object) -> str:
    with pytest.raises(ShapeMismatch) as caught:
        action()  # type: ignore[operator]
    return re.sub(r"--> \S+:\d+", "--> PLACE", str(caught.value))


def test_more_tokens_than_there_is_room_for_are_refused_and_change_nothing() -> None:
    cache = _cache("reference", PATTERNS["quest"], capacity=40)
    k, v = _tokens("reference", 38)
    cache.append(k, v)
    assert _message(lambda: cache.append(*_tokens("reference", 3))) == (
        "ShapeMismatch: 3 tokens to append and a cache of 40 that holds 38 do not agree: "
        "41 do not fit.\n"
        "  help: make the cache with a larger capacity."
    )
    _assert_like_all_tokens(cache, 1, k, v)
    more = _tokens("reference", 2)
    cache.append(*more)
    k, v = (torch.cat(x, dim=2) for x in zip((k, v), more, strict=True))
    _assert_like_all_tokens(cache, 1, k, v)


def test_tokens_of_another_shape_are_refused() -> None:
    cache = _cache("reference", PATTERNS["quest"], capacity=40)
    k, v = torch.randn(1, 1, 3, D), torch.randn(1, HKV, 3, D)
    assert _message(lambda: cache.append(k, v)) == (
        "ShapeMismatch: k with shape [1, 1, 3, 16] and the cache's k with shape [1, 2, 40, 16] do "
        "not agree: [1, 2, 3, 16] is needed.\n"
        "  help: append tokens of the cache's batch, KV heads and head dimension."
    )
    k, v = torch.randn(1, HKV, 3, D), torch.randn(1, HKV, 2, D)
    assert "v with shape [1, 2, 2, 16]" in _message(lambda: cache.append(k, v))
    assert cache.length == 0


@pytest.mark.parametrize("tokens", [-1, 11])
def test_more_tokens_than_are_held_cannot_be_forgotten(tokens: int) -> None:
    cache = _cache("reference", PATTERNS["quest"], capacity=40)
    cache.append(*_tokens("reference", 10))
    assert _message(lambda: cache.rewind(tokens)) == (
        f"ShapeMismatch: {tokens} tokens to forget and a cache that holds 10 do not agree: there "
        "are not that many.\n"
        "  help: rewind at most what was appended."
    )
    assert cache.length == 10


def test_a_snapshot_of_a_longer_cache_cannot_be_restored() -> None:
    cache = _cache("reference", PATTERNS["quest"])
    cache.append(*_tokens("reference", 10))
    noted = cache.snapshot()
    cache.rewind(4)
    assert "-4 tokens to forget" in _message(lambda: cache.restore(noted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_last_page_is_not_written_where_pages_exist_only_when_full(backend: str) -> None:
    cache = _cache(backend, complete_pages(), capacity=24)
    beside = {
        name: torch.full((1, HKV, 3, D), 7.0).to(t.device) for name, t in cache.states.items()
    }
    cache.states = {name: wide[:, :, :1] for name, wide in beside.items()}
    k, v = _tokens(backend, 24)
    for begin, end in ((0, 15), (15, 20), (20, 24)):
        cache.append(k[:, :, begin:end], v[:, :, begin:end])
        assert {t.shape[2] for t in cache.tensors()[2].values()} == {end // 16}
    assert all(bool((wide[:, :, 1:] == 7).all()) for wide in beside.values())
    _assert_like_all_tokens(cache, 1, k, v)
