"""The mutator finds what it should and nothing else; the bench can tell a mutant from none."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ascendc.mutation.equivalents import Equivalent, equivalents
from tests.ascendc.mutation.judge import Bench, Verdict
from tests.ascendc.mutation.mutants import (
    SYNCHRONISATION,
    Mutant,
    edits_of,
    mutants_of,
    tokens,
    unchanged,
)
from tests.ascendc.mutation.report import Score, print_report, rotten, unexplained
from tests.ascendc.mutation.suites import SUITES

KERNEL = """// SetFlag<HardEvent::V_MTE2>(7);
#include "tiling_2.h"
#define EIGHT 8
/* WaitFlag<HardEvent::V_MTE2>(7);
   PipeBarrier<PIPE_V>(); */
const char* text = "SetFlag(3); 4";  // 5
int32_t Sort32(uint8_t x) { return x < 0x10u ? 0 : 1'000; }
void Go() {
    for (int i = 0; i < 2; ++i) SetFlag<HardEvent::V_MTE2>(i);
    WaitFlag<HardEvent::V_MTE2>(
        0);
    float half = 0.5f, e = 1e3f;
    PipeBarrier<PIPE_V>();
    queue.EnQue(tensor);
}
"""


def mutated(text: str, kind: str) -> list[str]:
    """The lines that a mutation of this kind gives, joined where it spans several."""
    found = []
    for edit in edits_of(text):
        if edit.kind == kind:
            whole = edit.apply(text)
            found.append(whole.splitlines()[edit.line].strip())
    return found


def test_synchronisation_statements_are_removed_and_comments_and_strings_are_not() -> None:
    assert mutated(KERNEL, "sync") == ["for (int i = 0; i < 2; ++i) ;", ";", ";", ";"]
    whole = [edit.apply(KERNEL) for edit in edits_of(KERNEL) if edit.kind == "sync"]
    assert "WaitFlag<HardEvent::V_MTE2>(\n" not in whole[1] and "0);\n    float" not in whole[1]
    assert "queue" not in whole[3]
    assert all(text.count("SetFlag(3)") == 1 for text in whole)


def test_integers_go_one_up_and_one_down_whatever_they_are_written_as() -> None:
    assert mutated(KERNEL, "more") == [
        "int32_t Sort32(uint8_t x) { return x < 17u ? 0 : 1'000; }",
        "int32_t Sort32(uint8_t x) { return x < 0x10u ? 1 : 1'000; }",
        "int32_t Sort32(uint8_t x) { return x < 0x10u ? 0 : 1001; }",
        "for (int i = 1; i < 2; ++i) SetFlag<HardEvent::V_MTE2>(i);",
        "for (int i = 0; i < 3; ++i) SetFlag<HardEvent::V_MTE2>(i);",
        "1);",
    ]
    less = mutated(KERNEL, "less")
    assert len(less) == 6
    assert less[1] == "int32_t Sort32(uint8_t x) { return x < 0x10u ? (-1) : 1'000; }"


@pytest.mark.parametrize("template", ["pool", "topk", "score", "attend_gather"])
def test_every_synchronisation_call_of_a_kernel_is_a_mutant(template: str) -> None:
    """Counted by another means: names before an opening bracket, once comments are gone."""
    names = "|".join(SYNCHRONISATION)
    for suite in SUITES[template]():
        text = suite.text()
        bare = re.sub(r"//.*", "", text)
        calls = len(re.findall(rf"\b(?:{names})(?:<[^;()]*>)?\(", bare))
        edits = list(edits_of(text))
        assert calls > 0
        assert sum(edit.kind == "sync" for edit in edits) == calls
        for edit in edits:
            changed = edit.apply(text)
            assert changed != text
            if edit.kind == "sync":
                assert len(list(tokens(changed))) < len(list(tokens(text)))


def test_a_line_of_several_specialisations_is_mutated_in_all_at_once() -> None:
    texts = {
        "a": "int size = 8;\nint a = 1;\nSetFlag(0);\n",
        "b": "int size = 16;\nint b = 2;\nSetFlag(0);\n",
    }
    made = mutants_of("some", texts)
    assert Counter(tuple(mutant.edits) for mutant in made) == {
        ("a", "b"): 2 + 3,
        ("a",): 2,
        ("b",): 2,
    }
    size = made[0]
    assert (size.before, size.after) == ("int size = 8;", "int size = 9;")
    assert size.edits["b"].apply(texts["b"]).startswith("int size = 17;")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), workers=2)


def pool_mutants() -> tuple[dict[str, object], list[Mutant]]:
    suites = {suite.name: suite for suite in list(SUITES["pool"]())[:1]}
    return suites, mutants_of("pool", {name: suite.text() for name, suite in suites.items()})


def test_the_bench_lets_the_template_pass_and_tells_how_a_mutant_fails(bench: Bench) -> None:
    suites, made = pool_mutants()
    (name,) = suites

    def found(before: str, after: str) -> Mutant:
        return next(m for m in made if m.before.startswith(before) and m.after.startswith(after))

    chosen = [
        unchanged("pool", name),
        found("SetFlag<HardEvent::MTE2_V>", ";"),
        found("constexpr uint32_t kStride = 64", "constexpr uint32_t kStride = 63"),
        found("for (uint32_t left = rows; left > 1;", "for (uint32_t left = rows; left > 0;"),
    ]
    broken = replace(chosen[0], edits={name: replace(chosen[0].edits[name], new="no C++ ")})
    outcomes = {id(m): v.outcome for m, v in bench.judge([*chosen, broken], suites)}
    assert [outcomes[id(m)] for m in (*chosen, broken)] == [
        *("survived", "fault", "result", "timeout", "compiler")
    ]


def test_a_mutant_that_changes_nothing_is_listed_and_fails_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, made = pool_mutants()
    score = Score("pool", made)
    for mutant in made[:19]:
        score.add(mutant, Verdict("fault"))
    assert print_report([score], [], least=0.95) == []
    score.add(made[20], Verdict("survived"))
    score.add(made[21], Verdict("survived"))
    (problem,) = print_report([score], [], least=0.95)
    assert problem == "90.48% of the mutants are noticed, less than 95%."
    (problem,) = print_report([score], [], least=None)
    assert problem == "2 survivors have no proof in equivalents.json."
    printed = capsys.readouterr().out
    assert printed.count("UNEXPLAINED") == 4
    assert made[20].after in printed


def test_a_proof_counts_only_for_a_mutant_that_is_there_and_survives() -> None:
    _, made = pool_mutants()
    score = Score("pool", made)
    score.add(made[0], Verdict("survived"))
    score.add(made[1], Verdict("fault", said="it says so"))

    def claim(mutant: Mutant) -> Equivalent:
        return Equivalent("pool", mutant.before, mutant.after, "because", mutant.below)

    assert unexplained([score], []) == [made[0]]
    assert unexplained([score], [claim(made[0])]) == []
    assert rotten([score], [claim(made[0])]) == []
    (noticed,) = rotten([score], [claim(made[1])])
    assert "claimed equivalent, but noticed: fault, it says so" in noticed
    (gone,) = rotten([score], [replace(claim(made[0]), after="what nobody wrote")])
    assert "has no mutant" in gone


def test_every_proof_is_a_sentence() -> None:
    for claim in equivalents():
        assert len(claim.proof) > 40 and claim.proof.endswith("."), claim


def test_the_folder_of_a_mutant_is_gone_afterwards(tmp_path: Path) -> None:
    suites, made = pool_mutants()
    bench = Bench(tmp_path, workers=1)
    before = {path.name for path in tmp_path.iterdir()}
    list(bench.judge(made[:1], suites))
    assert {path.name for path in tmp_path.iterdir()} == before
