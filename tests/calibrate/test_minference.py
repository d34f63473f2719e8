"""MInference's configuration files and offline search: what is read means what is run, what is
wrong is named, and the search finds a shape that was planted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spcomp as sp
from spcomp.calibrate.minference import (
    CANDIDATES,
    UNTUNED,
    Configuration,
    Entry,
    LayerOutside,
    NotAConfiguration,
    load,
    search,
)
from spcomp.patterns.minference import minference
from tests import oracle

LAYERS = [
    {"0": ["stream_llm", 4, 20, 0.5], "1": ["vertical_and_slash", 12, 9, 26958]},
    {"1": ["block_sparse", 8, 1, 0.25], "0": ["vertical_and_slash", 0, 0, 0]},
]
SMALL = {"sinks": 2, "nearest": 5, "block": 16, "last_q": 16}


def written(folder: Path, data: object) -> Path:
    path = folder / "model.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def tensors(heads: int = 2, tokens: int = 130) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(heads + tokens)
    q, k, v = (torch.randn(2, n, tokens, 16, dtype=torch.float64) for n in (heads, 1, 1))
    return 2 * q, k, v


def test_a_file_reads_as_the_official_code_means_it(tmp_path: Path) -> None:
    found = load(written(tmp_path, LAYERS), layers=2, heads=2)
    assert found.layers == (
        (Entry("stream_llm", 4, 20, 0.5), Entry("vertical_and_slash", 12, 9, 26958.0)),
        (Entry("vertical_and_slash", 0, 0, 0.0), Entry("block_sparse", 8, 1, 0.25)),
    )
    found.save(tmp_path / "again.json")
    assert load(tmp_path / "again.json", layers=2, heads=2) == found


def test_each_head_of_a_layer_runs_its_own_shape(tmp_path: Path) -> None:
    found = load(written(tmp_path, LAYERS), layers=2, heads=2)
    q, k, _ = tensors()
    alone = [
        [
            minference(kind="a_shape", initial=4, recent=20),
            minference(columns=12, offsets=9, **SMALL),
        ],
        [minference(columns=2, offsets=5, **SMALL), minference(kind="block_sparse", block=16)],
    ]
    for number, heads in enumerate(alone):
        together = sp.compile(found.layer(number, **SMALL), backend="reference").to_mask(q, k)
        for head, pattern in enumerate(heads):
            one = sp.compile(pattern, backend="reference").to_mask(q, k)
            assert torch.equal(together[:, head], one[:, head]), (number, head)


def test_budgets_are_scaled_and_missing_heads_filled_where_asked(tmp_path: Path) -> None:
    path = written(tmp_path, [{"0": ["vertical_and_slash", 1000, 61, 1]}, {}])
    found = load(path, layers=2, heads=2, missing=UNTUNED, ratio=0.5)
    assert found.layers[0] == (
        Entry("vertical_and_slash", 500, 30, 1.0), Entry("vertical_and_slash", 500, 3048)
    )  # fmt: skip
    assert found.layers[1] == (Entry("vertical_and_slash", 500, 3048),) * 2


FAULTS = [
    ("{", "it cannot be read (Expecting property name"),
    ({"0": {}}, "it holds a dict, where the model has 1 layers"),
    ([{}, {}], "it holds 2 layers, where the model has 1 layers"),
    ([[]], "layer 0 is a list, not an object by head"),
    ([{"0": ["vertical_and_slash", 1, 1, 1]}], "layer 0 has no entry for head 1."),
    ([{}], "layer 0 has no entry for head 0 and 1 more."),
    ([{"2": ["stream_llm", 1, 1, 1]}], "layer 0, head '2' is none of the model's heads 0 to 1"),
    ([{"one": []}], "layer 0, head 'one' is none of the model's heads 0 to 1"),
    ([{"-1": []}], "layer 0, head '-1' is none"),
    ([{"0": ["stream_llm", 1, 1, 1], "00": ["stream_llm", 1, 1, 1]}], "head '00' is there twice"),
    ([{"0": ["stream_llm", 1, 1]}], "head '0' is ['stream_llm', 1, 1], not [type, k_v, k_s, score"),
    ([{"0": ["dense", 1, 1, 1]}], "head '0' is of the type 'dense', which is none of stream_llm"),
    ([{"0": ["stream_llm", -4, 1, 1]}], "has k_v = -4, where an integer from 0 is needed"),
    ([{"0": ["stream_llm", 4, 0, 1]}], "has k_s = 0, where an integer from 1 is needed"),
    ([{"0": ["block_sparse", 4, 1.5, 1]}], "has k_s = 1.5, where an integer from 0 is needed"),
    ([{"0": ["block_sparse", True, 1, 1]}], "has k_v = True"),
    ([{"0": ["block_sparse", 4, 1, None]}], "has the score None, which is no number"),
]


@pytest.mark.parametrize(("data", "said"), FAULTS, ids=str)
def test_a_file_that_does_not_fit_is_refused_by_layer_and_head(
    tmp_path: Path, data: object, said: str
) -> None:
    with pytest.raises(NotAConfiguration) as caught:
        load(written(tmp_path, data), layers=1, heads=2)
    assert said in str(caught.value)


def test_a_missing_file_a_layer_outside_and_a_ratio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAConfiguration, match="it cannot be read"):
        load(tmp_path / "none.json", layers=1, heads=2)
    with pytest.raises(LayerOutside, match="layer 2 was asked for, and the"):
        load(written(tmp_path, LAYERS), layers=2, heads=2).layer(2)
    with pytest.raises(sp.SpcompError, match="ratio = 0"):
        load(written(tmp_path, LAYERS), layers=2, heads=2, ratio=0)


# ---- the search ----------------------------------------------------------------------------------


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """Three heads over 256 tokens: one looks at its last 24 keys, one at a few far keys and
    distances, one at blocks of like tokens."""
    torch.manual_seed(0)
    tokens, d = 256, 64
    t = torch.arange(tokens)
    wanted = torch.zeros(3, tokens, tokens, dtype=torch.float64)
    wanted[0] = (t[:, None] - t[None] < 24).double()
    for key in (60, 99, 141):
        wanted[1, :, key] = 1
    wanted[1] += (t[:, None] - t[None] == 77).double()
    wanted[2] = ((t[:, None] // 16 * 5 + 3) % 16 == t[None] // 16).double()
    wanted[2] += (t[:, None] // 16 == t[None] // 16).double()
    k = torch.eye(tokens, dtype=torch.float64).expand(1, 3, tokens, tokens)
    q = 12 * math.sqrt(tokens) * wanted[None]
    return q, k, torch.randn(1, 3, tokens, d, dtype=torch.float64)


SHAPES = (
    Entry("stream_llm", 2, 24),
    Entry("vertical_and_slash", 6, 6),
    Entry("block_sparse", 100, 1),
)


@pytest.mark.parametrize("by", ["output", "mass"])
def test_the_search_finds_what_was_planted(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spcomp.calibrate.minference.BLOCKS", 2)
    q, k, v = planted()
    found = search(q, k, v, candidates=SHAPES, by=by, **SMALL)  # type: ignore[arg-type]
    assert [e.type for e in found] == ["stream_llm", "vertical_and_slash", "block_sparse"]
    assert all(e.score < 0.2 if by == "output" else e.score > 0.8 for e in found)


def test_scores_are_those_of_masks() -> None:
    q, k, v = tensors(4)
    for entry in SHAPES:
        mask = sp.compile(entry.pattern(**SMALL), backend="reference").to_mask(q, k)
        full = oracle.causal_mask(130, 130)
        want, _ = oracle.attention(q, k, v, full)
        out, _ = oracle.attention(q, k, v, mask)
        keys = k.repeat_interleave(4, 1)
        logits = (q @ keys.mT / 4).masked_fill(~full, -math.inf)
        kept = (torch.softmax(logits, -1) * mask).sum(-1)[:, :, 40:].mean(dim=(0, 2))
        wrong = (out - want)[:, :, 40:].norm(dim=-1).sum(dim=(0, 2))
        wrong /= want[:, :, 40:].norm(dim=-1).sum(dim=(0, 2))
        for by, scores in (("output", wrong), ("mass", kept)):
            given = search(q, k, v, candidates=(entry,), by=by, rows_from=40, **SMALL)  # type: ignore[arg-type]
            got = torch.tensor([e.score for e in given], dtype=torch.float64)
            torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-6)


def test_a_tie_goes_to_the_earlier_candidate_and_rows_without_keys_do_not_count() -> None:
    q, k, v = tensors(tokens=40)
    whole = (Entry("stream_llm", 40, 1, 7.0), Entry("stream_llm", 0, 40))
    for by in ("output", "mass"):
        found = search(q, k[:, :, :30], v[:, :, :30], candidates=whole, by=by)  # type: ignore[arg-type]
        assert {(e.k_v, e.k_s) for e in found} == {(40, 1)}
        assert all(abs(e.score - (by == "mass")) < 1e-6 for e in found)


def test_a_search_makes_a_file(tmp_path: Path) -> None:
    layers = [tensors(), tensors(tokens=100)]
    found = Configuration(tuple(search(*layer, candidates=CANDIDATES) for layer in layers))
    found.save(tmp_path / "made.json")
    assert load(tmp_path / "made.json", layers=2, heads=2) == found


@pytest.mark.parametrize(("given", "said"), [
    ({"by": "speed"}, "search was given by = 'speed'"), ({"candidates": ()}, "candidates = ()"),
])  # fmt: skip
def test_a_wrong_search_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(sp.SpcompError) as caught:
        search(*tensors(), **given)  # type: ignore[arg-type]
    assert said in str(caught.value)
