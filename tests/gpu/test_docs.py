"""What the docs show for a card (blocks marked `py`) runs on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spcomp as sp
from spcomp.patterns import block_topk
from tests.gpu.card import tensors
from tests.test_docs import BLOCK, PAGES

pytestmark = pytest.mark.gpu

SHOWN = [
    pytest.param(text, id=page.name)
    for page in PAGES
    for language, text in BLOCK.findall(page.read_text())
    if language == "py"
]


@pytest.mark.parametrize("text", SHOWN)
def test_a_block_runs_and_gives_what_the_call_gives(text: str) -> None:
    q, k, v = tensors((1, 4, 2, 512, 512), 64, torch.bfloat16)
    attend = sp.compile(block_topk(block=64, budget=0.5))
    names: dict[str, Any] = {"torch": torch, "attend": attend, "q": q, "k": k, "v": v}
    exec(text, names)
    assert torch.equal(names["out"], attend(q, k, v))
