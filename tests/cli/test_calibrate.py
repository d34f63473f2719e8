"""`spcomp calibrate minference`: a sample becomes a configuration; what is no sample is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from spcomp.calibrate.minference import load, search
from spcomp.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", "minference", *map(str, arguments)])


def saved(folder: Path, held: object) -> Path:
    torch.save(held, folder / "sample.pt")
    return folder / "sample.pt"


def layers(count: int = 2) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        {"q": torch.randn(1, 4, 150, 16), "k": torch.randn(1, 2, 150, 16),
         "v": torch.randn(1, 2, 150, 16)} for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("by", ["output", "mass"])
def test_a_sample_becomes_the_file_of_the_search(tmp_path: Path, by: str) -> None:
    sample, target = layers(), tmp_path / "config.json"
    result = run("--sample", saved(tmp_path, sample), "--by", by, "--rows-from", 40,
                 "-o", target, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = load(target, layers=2, heads=4)
    want = tuple(
        search(x["q"], x["k"], x["v"], by=by, rows_from=40)  # type: ignore[arg-type]
        for x in sample
    )
    assert found.layers == want
    rows = json.loads(result.stdout)
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(sum(row[t] for t in ("stream_llm", "vertical_and_slash", "block_sparse")) == 4
               for row in rows)  # fmt: skip
    assert f"wrote {target}" in result.stderr


def test_the_table_names_the_worst_head(tmp_path: Path) -> None:
    result = run("--sample", saved(tmp_path, layers(1)), "-o", tmp_path / "config.json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].split() == [
        "layer", "stream_llm", "vertical_and_slash", "block_sparse", "worst", "output", "of", "head"
    ]  # fmt: skip
    assert len(result.stdout.splitlines()) == 2


ONE = torch.zeros(1, 1, 4, 8)
WRONG = [
    ({}, "it holds a dict of nothing, not a list over layers"),
    ([], "it holds an empty list, not a list over layers"),
    ([ONE], "layer 0 is a tensor of shape [1, 1, 4, 8], not q, k and v"),
    ([{"q": ONE, "k": ONE}], "layer 0 is a dict of q, k, not q, k and v"),
    ([{"q": ONE, "k": ONE, "v": ONE[0]}], "v of layer 0 is a tensor of shape [1, 4, 8]"),
    ([{"q": ONE, "k": ONE, "v": 1}], "v of layer 0 is a int, not a tensor of rank 4"),
    ([{"q": ONE, "k": ONE, "v": ONE[:, :, :3]}], "ShapeMismatch"),
]


@pytest.mark.parametrize(("held", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_no_sample_is_refused(tmp_path: Path, held: object, said: str) -> None:
    result = run("--sample", saved(tmp_path, held), "-o", tmp_path / "config.json")
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "config.json").exists()


def test_a_file_that_is_no_tensor_file_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_text("nothing")
    result = run("--sample", other, "-o", tmp_path / "config.json")
    assert result.exit_code == 1
    assert "torch cannot load it" in result.stderr and "Traceback" not in result.stderr
    gone = tmp_path / "gone" / "config.json"
    result = run("--sample", saved(tmp_path, layers(1)), "-o", gone)
    assert result.exit_code == 2
    assert f"cannot write {gone}: No such file or directory." in result.stderr
