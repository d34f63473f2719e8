"""The file of a tuning: its key, what survives an accident, and what is refused by its place."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spcomp.autotune import record_text
from spcomp.autotune.record import RIGHT, Candidate, Kept, Row, Tuning, settled
from spcomp.autotune.record_lines import Dense, Event, Session, header_of, line_of, tuning_of
from spcomp.autotune.record_text import (
    Recorder,
    TuningUnreadable,
    digest_of,
    path_of,
    read,
)
from spcomp.autotune.search import search
from tests.autotune.tuning import CALL, DEFAULT, ROWS, SKIPPED, Timer, one, space_of, timed, write

# ---- the key (B54) -------------------------------------------------------------------------------

OTHER_CALLS = {
    "longer": replace(CALL, shape={**CALL.shape, "Sq": 8192, "Skv": 8192}),
    "longer keys": replace(CALL, shape={**CALL.shape, "Skv": 8192}),
    "wider heads": replace(CALL, shape={**CALL.shape, "D": 128, "Dv": 128}),
    "fewer query heads": replace(CALL, shape={**CALL.shape, "Hq": 8}),
    "fewer KV heads": replace(CALL, shape={**CALL.shape, "Hkv": 1}),
    "two items": replace(CALL, shape={**CALL.shape, "B": 2}),
    "bfloat16": replace(CALL, dtype="bfloat16"),
    "another budget": replace(CALL, pattern="moba(block=512, k_blocks=1)"),
    "another mask": replace(CALL, program_sha256="1" * 64),
    "another table": replace(CALL, tables_sha256="1" * 64),
    "decode": replace(CALL, phase="decode"),
    "another card": replace(CALL, device="Other Card"),
    "no card": replace(CALL, device="none"),
    "another target": replace(CALL, target="sm80"),
    "another backend": replace(CALL, backend="reference"),
    "another Triton": replace(CALL, toolchain={**CALL.toolchain, "triton": "3.8.0"}),
    "another sample": replace(CALL, sample="random, seed 1"),
}


@pytest.mark.parametrize("what", OTHER_CALLS)
def test_a_call_that_differs_in_anything_reuses_nothing(what: str, tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    other = OTHER_CALLS[what]
    with Recorder(tmp_path, other) as recorder:
        assert recorder.known() == ()
        timer = Timer(lambda c: 1.0)
        space = space_of({"attend": (1.0, 4)})
        search(space, timer, budget_s=1e9, seed=0, known=recorder.known())
    assert len(timer.seen) == 5
    with Recorder(tmp_path, CALL) as recorder:
        assert len(recorder.known()) == 3


def test_every_call_has_a_file_of_its_own_that_names_pattern_and_phase(tmp_path: Path) -> None:
    calls = (CALL, *OTHER_CALLS.values())
    paths = {path_of(tmp_path, call) for call in calls}
    assert len(paths) == len(calls)
    assert path_of(tmp_path, CALL).name == f"moba-prefill-{digest_of(CALL)}.jsonl"
    assert len(digest_of(CALL)) == 32


def test_the_key_does_not_depend_on_the_order_of_names() -> None:
    turned = replace(CALL, shape=dict(reversed(CALL.shape.items())))
    assert digest_of(turned) == digest_of(CALL)


def test_a_name_that_no_file_can_have_is_written_in_other_letters(tmp_path: Path) -> None:
    path = path_of(tmp_path, replace(CALL, pattern="../größe/x y(block=1)"))
    assert path.parent == tmp_path
    assert path.name.startswith("_gr_e_x_y-prefill-")


# ---- round trip ----------------------------------------------------------------------------------


def test_a_tuning_reads_back_as_it_was_kept(tmp_path: Path) -> None:
    with Recorder(tmp_path, CALL) as recorder:
        for row in ROWS:
            recorder.row(row)
        recorder.dense(3.5, "FlashAttention")
        recorder.kept(Kept(512, 0.9, 0.5, 0.1, 0.25))
        recorder.note("timed in a CUDA graph")
        recorder.note("timed in a CUDA graph")
        recorder.session(seed=7, elapsed_s=61.5, is_partial=True, created="2026-01-02T03:04:05Z")
        kept = recorder.tuning()
    assert read(recorder.path) == kept
    assert kept == Tuning(
        call=CALL,
        rows=settled(ROWS),
        is_partial=True,
        seed=7,
        elapsed_s=61.5,
        dense_ms=3.5,
        dense_by="FlashAttention",
        kept=Kept(512, 0.9, 0.5, 0.1, 0.25),
        notes=("timed in a CUDA graph",),
        created="2026-01-02T03:04:05Z",
    )
    assert kept.best is not None
    assert kept.best.candidate == one(1)[0]


def test_the_file_is_one_object_a_line_that_a_person_can_read(tmp_path: Path) -> None:
    lines = write(tmp_path, ROWS[1:2]).read_text().splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [
        ["call", "kind", "schema"],
        ["row"],
        ["session"],
    ]
    assert json.loads(lines[0])["call"]["shape"] == CALL.shape
    row = json.loads(lines[1])["row"]
    assert row["candidate"] == {"order": None, "axes": {"attend": {"size": 1}}}


def test_a_session_that_gives_no_date_has_the_present_one_in_utc(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS, created=None)
    assert len(read(path).created) == len("2026-01-02T03:04:05Z")
    assert read(path).created.endswith("Z")


def test_a_later_session_replaces_what_was_skipped_and_adds_its_time(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    path = write(
        tmp_path,
        [timed(SKIPPED[0].candidate, 0.5)],
        seed=3,
        elapsed_s=4.0,
        is_partial=False,
        created="2026-01-03",
    )
    tuning = read(path)
    assert (tuning.seed, tuning.elapsed_s, tuning.created) == (3, 6.5, "2026-01-03")
    assert not tuning.is_partial
    assert {row.candidate for row in tuning.rows} == {DEFAULT, *one(1, 2, 3)}
    assert tuning.best is not None
    assert tuning.best.candidate == SKIPPED[0].candidate


def test_what_was_measured_is_not_lost_to_a_later_row_that_was_not(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    pruned = Row(one(1)[0], "pruned", "emitted", "predicted 9 ms", 9.0)
    tuning = read(write(tmp_path, [pruned]))
    assert tuning.rows == settled(ROWS[:3])


def test_rows_of_a_search_that_never_ended_count_and_are_partial(tmp_path: Path) -> None:
    with Recorder(tmp_path, CALL) as recorder:
        recorder.row(ROWS[0])
    tuning = read(recorder.path)
    assert tuning.is_partial
    assert (tuning.created, tuning.elapsed_s, len(tuning.rows)) == ("", 0.0, 1)
    write(tmp_path, [], is_partial=False)
    assert not read(recorder.path).is_partial
    with Recorder(tmp_path, CALL) as recorder:
        recorder.row(ROWS[1])
    assert read(recorder.path).is_partial


def test_fresh_forgets_what_the_file_held(tmp_path: Path) -> None:
    path = write(tmp_path, ROWS)
    with Recorder(tmp_path, CALL, fresh=True) as recorder:
        assert recorder.known() == ()
        recorder.row(ROWS[0])
    assert [row.candidate for row in read(path).rows] == [DEFAULT]


def test_folder_and_file_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "tuning", ROWS)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


FLOATS = st.floats()
TEXTS = st.text(max_size=20)
CANDIDATES = st.builds(
    lambda order, axes: Candidate(
        order, tuple(sorted((k, tuple(sorted(v.items()))) for k, v in axes.items()))
    ),
    st.sampled_from([None, "query_major", "key_major", "gather"]),
    st.dictionaries(TEXTS, st.dictionaries(TEXTS, st.integers(1, 4096), max_size=3), max_size=3),
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        Row,
        CANDIDATES,
        st.sampled_from(
            ["best", "ok", "wrong", "refused", "failed", "timeout", "pruned", "skipped"]
        ),
        st.sampled_from(["emitted", "compiled", "matched", "timed"]),
        TEXTS,
        st.none() | FLOATS,
        st.none() | st.floats(1e-6, 1e6),
        st.none() | st.floats(0, 1e6),
        st.none() | st.integers(0, 1000),
        st.none() | FLOATS,
        st.none() | FLOATS,
        st.none() | st.integers(0, 10**9),
    ),
    st.builds(Dense, FLOATS, TEXTS),
    st.builds(Kept, st.integers(1, 10**6), FLOATS, FLOATS, FLOATS, FLOATS),
    st.builds(Session, st.integers(), st.floats(0, 1e6), st.booleans(), TEXTS),
    TEXTS,
)


@given(st.lists(EVENTS, max_size=12))
def test_any_events_read_back_as_they_were_written(events: list[Event]) -> None:
    data = header_of(CALL) + b"".join(map(line_of, events))
    found = record_text.parse(data, Path("tuning.jsonl"))
    # Compared as text, since no NaN is equal to itself.
    assert repr(found.events) == repr(events)
    assert repr(tuning_of(found.call, found.events)) == repr(tuning_of(CALL, events))


# ---- what is refused -----------------------------------------------------------------------------

HEADER = header_of(CALL).decode()


def changed_row(**changes: object) -> str:
    row = json.loads(line_of(ROWS[0]))["row"]
    return HEADER + json.dumps({"row": {**row, **changes}}) + "\n"


UNREADABLE = {
    "": "line 1 is cut",
    HEADER[:-1]: "line 1 is cut",
    "{}\n": "line 1 has no kind 'spcomp tuning'",
    "no JSON\n": "line 1 has no kind 'spcomp tuning'",
    HEADER.replace('"schema": 1', '"schema": 2'): "its schema is 2",
    HEADER.replace('"dtype": "float16"', '"dtype": 16'): (
        "line 1.call.dtype is a number, not a text"
    ),
    HEADER.replace('"dtype": "float16", ', ""): "line 1.call.dtype is missing",
    HEADER.replace(
        '"Sq": 1024', '"Sq": "1024"'
    ): "line 1.call.shape.Sq is a text, not a whole number",
    HEADER + '{"row": {}, "note": ""}\n': "line 2 does not hold one event",
    HEADER + "[]\n": "line 2 does not hold one event",
    HEADER + '{"rows": []}\n': "line 2, rows is not one of row, dense, kept, note, session",
    HEADER + '{"row": []}\n': "line 2, row is a list, not an object",
    HEADER + '{"row": {}}\n': "line 2, row.candidate is missing",
    HEADER + '{"note": "a"}\n{"note": 1}\n': "line 3, note is a number, not a text",
    changed_row(speed=1): "line 2, row.speed is not a field of this version",
    changed_row(status="good"): (
        "line 2, row.status is 'good', not one of best, ok, wrong, refused, failed, timeout, "
        "pruned, skipped"
    ),
    changed_row(median_ms="fast"): "line 2, row.median_ms is a text, not a number",
    changed_row(median_ms=True): "line 2, row.median_ms is true or false, not a number",
    changed_row(runs=1.5): "line 2, row.runs is a number, not a whole number",
    changed_row(reason=None): "line 2, row.reason is null, not a text",
    changed_row(candidate={"order": None, "axes": {"attend": {"warps": "8"}}}): (
        "line 2, row.candidate.axes.attend.warps is a text, not a whole number"
    ),
    changed_row(candidate={"order": "rows", "axes": {}}): (
        "line 2, row.candidate.order is 'rows', not one of query_major, query_major_ws, key_major, "
        "gather"
    ),
}


@pytest.mark.parametrize("text", UNREADABLE, ids=list(UNREADABLE.values()))
def test_a_file_that_is_no_tuning_is_refused_by_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    path.write_text(text)
    with pytest.raises(TuningUnreadable) as caught:
        read(path)
    assert str(caught.value) == (
        f"TuningUnreadable: the tuning {path} cannot be read: {UNREADABLE[text]}.\n"
        "  help: this version reads schema 1; move the file away and tune again."
    )


def test_known_rows_are_the_final_ones(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    with Recorder(tmp_path, CALL) as recorder:
        assert {row.candidate for row in recorder.known()} == {DEFAULT, *one(1, 2)}
        assert sum(row.status in RIGHT for row in recorder.known()) == 2
