"""The pages of a tuning: every candidate with its reason, and nothing claimed that was not done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spcomp.autotune.record import Candidate, Row, Tuning, settled
from spcomp.autotune.report import (
    tuning_facts,
    tuning_json,
    tuning_pages,
    tuning_plots,
    tuning_tables,
)
from spcomp.autotune.report.json_form import ReportUnreadable
from tests.autotune.tuning import CALL, one, timed
from tests.autotune.tunings import MERGE, TILES, WARPS, measured, predicted
from tests.backends.triton.rendering import field_names, variables_of

NO_BREAK = "\u00a0"
EVIL = '<script>alert("x")</script></script>'
LINE = (
    'attention = sp.compile(moba(block=512, rule="a<b|c"), axes={"attend_keys": {"block_k": 64, '
    '"block_m": 128, "stages": 3, "warps": 4}})'
)


def many(count: int = 250) -> Tuning:
    """Give a tuning of many candidates: a fifth of each of five statuses."""
    statuses = ("ok", "wrong", "refused", "pruned", "skipped")
    rows = [timed(Candidate(None, ()), 2.0)]
    for n, candidate in enumerate(one(*range(1, count))):
        status = statuses[n % 5]
        rows.append(
            timed(candidate, 2.0 + n / count)
            if status == "ok"
            else Row(candidate, status, "emitted", f"reason {n}", 3.0)
        )
    return replace(measured(), rows=settled(rows))


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("tuning.html.jinja", tuning_pages.TuningHtmlContext),
        ("tuning.md.jinja", tuning_pages.TuningMarkdownContext),
    ],
)
def test_a_template_reads_exactly_the_fields_of_its_context(name: str, context: type) -> None:
    assert variables_of(f"report/{name}") == field_names(context)


# ---- the file ------------------------------------------------------------------------------------


def test_tunings_read_back_as_they_were() -> None:
    broken = replace(measured().rows[3], error=float("inf"))
    held = (measured(), predicted(), replace(measured(), rows=(broken,)))
    assert tuning_json.from_json(tuning_json.to_json(held)) == held


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda d: d.update(schema=0), "its schema is 0"),
        (lambda d: d.update(kind="x"), "the document has no kind 'spcomp tuning report'"),
        (lambda d: d.update(tunings=[]), "report.tunings is empty"),
        (lambda d: d["tunings"][0].pop("seed"), "report.tunings[0].seed is missing"),
        (
            lambda d: d["tunings"][0].update(seed="1"),
            "report.tunings[0].seed is a text, not a whole number",
        ),
        (
            lambda d: d["tunings"][0]["rows"][1].update(status="good"),
            "report.tunings[0].rows[1].status is 'good', not one of best, ok, wrong, refused, "
            "failed, timeout, pruned, skipped",
        ),
    ],
)
def test_another_form_of_json_is_refused_with_its_place(
    edit: Callable[[Any], None], problem: str
) -> None:
    document = json.loads(tuning_json.to_json((measured(),)))
    edit(document)
    with pytest.raises(ReportUnreadable) as caught:
        tuning_json.from_json(json.dumps(document), "here.json")
    assert str(caught.value) == (
        f"ReportUnreadable: here.json cannot be read: {problem}.\n"
        "  help: this version reads schema 1; make the report anew with `spcomp tune`."
    )


# ---- the tables ----------------------------------------------------------------------------------


def texts(table: tuning_tables.Table, name: str) -> list[str]:
    place = [column.name for column in table.columns].index(name)
    return [row[place].text for row in table.rows]


def test_every_candidate_stands_in_one_group_with_its_reason() -> None:
    groups = tuning_tables.groups(measured())
    tables = [table for group in groups for table in (group.shown, group.folded)]
    assert [status for table in tables for status in texts(table, "status")] == [
        "best", "ok", "ok", "wrong", "failed", "timeout", "refused", "pruned", "skipped"
    ]  # fmt: skip
    assert [group.shown.caption for group in groups if group.has_shown] == [
        "3 candidates that came out right",
        "3 candidates that did not come out right",
    ]
    assert [group.folded.caption for group in groups if group.has_folded] == [
        "1 candidate that spcomp refuses to build",
        "1 candidate that the cost model ruled out",
        "1 candidate that had no turn",
    ]
    assert texts(groups[1].shown, "reason")[0] == "error 3.1e-02 > 4.0e-03 allowed"
    assert all(reason for group in groups[1:] for reason in texts(group.shown, "reason"))
    assert all(reason for group in groups[1:] for reason in texts(group.folded, "reason"))


def test_of_many_candidates_the_fastest_are_in_view_and_none_is_lost() -> None:
    tuning = many()
    right, wrong, *others = tuning_tables.groups(tuning)
    for group in (right, wrong):
        assert len(group.shown.rows) == 20
    assert right.folded.caption == "31 more candidates that came out right"
    medians = texts(right.shown, "median ms") + texts(right.folded, "median ms")
    assert medians == sorted(medians), "best first, then by time"
    assert [len(group.shown.rows) for group in others] == [0, 0, 0]
    tables = [t for group in (right, wrong, *others) for t in (group.shown, group.folded)]
    assert sum(len(table.rows) for table in tables) == len(tuning.rows) == 250


def test_ratios_compare_like_with_like() -> None:
    right = tuning_tables.groups(measured())[0].shown
    assert texts(right, "median ms") == ["1.2500", "1.5000", "3.5000"]
    assert texts(right, "vs dense") == ["4.00×", "3.33×", "1.43×"]
    assert texts(right, "vs default") == ["1.20×", "1.00×", "0.43×"]
    assert texts(right, "spills") == ["0", "0", "–"]
    ranked = tuning_tables.groups(predicted())[0].shown
    assert texts(ranked, "median ms") == ["–", "–"]
    assert texts(ranked, "vs dense") == ["2.00×", "1.96×"]
    assert {row[4].kind for row in ranked.rows} == {"predicted"}


def test_a_measured_time_is_never_set_against_a_predicted_one() -> None:
    """Of a tuning on a card a row may have no time of its own."""
    matched = Row(Candidate(None, MERGE), "ok", "matched", "", 0.5)
    tuning = replace(measured(), rows=(*measured().rows[:3], matched))
    right = tuning_tables.groups(tuning)[0].shown
    place = texts(right, "median ms").index("–")
    assert texts(right, "vs dense")[place] == "–"
    assert texts(right, "vs default")[place] == "2.00×"
    assert right.rows[place][5].kind == "predicted"


def test_the_environment_names_device_sample_and_toolchain() -> None:
    rows = {row[0].text: row[1].text for row in tuning_tables.environment_table((measured(),)).rows}
    assert rows == {
        "device": "Example Card 80GB",
        "target": "sm90",
        "call": "prefill, B=1, Hq=32, Hkv=8, Sq=1024, Skv=1024, D=64, Dv=64, float16",
        "sample": "random, seed 0",
        "density": f"25{NO_BREAK}%",
        "attention kept": "over the first 4096 tokens",
        "dense attention": "5.0000 ms, torch's dense attention, measured",
        "backend": "triton",
        "spcomp": "0.1.0",
        "torch": "2.13.0",
        "triton": "3.7.1",
        "seed": "7",
        "made": "2026-11-25T08:00:00Z",
        "search": "62 s",
    }
    given = replace(predicted(), call=replace(CALL, device="none", sample="ab" * 32))
    rows = {row[0].text: row[1].text for row in tuning_tables.environment_table((given,)).rows}
    assert rows["device"] == "no card: times are predicted"
    assert rows["sample"] == "given, SHA-256 abababababab"
    assert rows["attention kept"] == rows["density"] == "–"


def test_meanings_differ_in_one_environment_where_they_do() -> None:
    other = replace(measured(64), dense_ms=5.5, seed=8)
    table = tuning_tables.environment_table((measured(), other))
    rows = {row[0].text: row[1].text for row in table.rows}
    assert rows["seed"] == "7 / 8"
    assert rows["dense attention"].count("measured") == 2
    assert rows["search"] == "123 s"


def test_text_for_a_terminal_ends_with_the_line_to_paste() -> None:
    lines = tuning_tables.text((measured(),)).splitlines()
    assert lines[0] == "moba(block=512, rule=a<b|c), dense 5.0000 ms"
    assert lines[1].split()[:4] == ["best", "1.2500", "ms", "timed"]
    assert lines[4].split()[:3] == ["wrong", "–", "ms"], "what is wrong has no speed"
    assert lines[-1] == f"  {LINE}"
    assert "  a note <b>in bold</b>" in lines


# ---- what the page leads with --------------------------------------------------------------------


def plain(text: str) -> str:
    return text.replace(NO_BREAK, " ")


def led_by(*tunings: Tuning) -> dict[str, str]:
    return {plain(f.figure): plain(f.words) for f in tuning_pages.findings(tunings)}


def warned(*tunings: Tuning) -> dict[str, str]:
    return {f.figure: f.words for f in tuning_pages.warnings(tunings)}


def test_a_page_leads_with_the_winner_its_gain_and_the_noise() -> None:
    assert led_by(measured()) == {
        "1.2500 ms": "best schedule, measured",
        "4.00×": "faster than dense attention, measured",
        "1.20×": "faster than the default schedule",
        "+0.2500 ms": "to the runner-up, where the noise is 0.0125 ms",
        "95.1 %": "of dense attention's probability kept over the first 4096 tokens of random "
        "input",
    }
    assert led_by(measured(), measured(64))["95.1 %"].endswith(
        "random input, the most of all: block=512, rule=a<b|c"
    )
    assert "1.2500 ms" in led_by(predicted(), measured()), "what is predicted leads nowhere else"


def test_a_choice_within_the_noise_is_called_a_tie() -> None:
    rows = settled((timed(Candidate(None, ()), 1.005, 0.02), timed(Candidate(None, WARPS), 1.0)))
    tuning = replace(measured(), rows=rows)
    assert led_by(tuning)["a tie"] == (
        "with the runner-up: 0.0050 ms apart, where the noise is 0.0100 ms"
    )
    assert plain(tuning_pages.winners((tuning,))[0].words) == (
        "1.0050 ms (spread 0.0200 ms) measured, 4.98× faster than dense attention, the default "
        "schedule itself. The runner-up takes 0.0050 ms less, which is within the noise of "
        "0.0100 ms: equal ones are taken in a fixed order."
    )


def test_what_keeps_all_of_attention_since_the_text_was_short_is_no_finding() -> None:
    kept = measured().kept
    assert kept is not None
    whole = replace(measured(), kept=replace(kept, density=1.0, mass_mean=1.0))
    assert not any("kept" in words for words in led_by(whole).values())
    table = tuning_tables.environment_table((whole,))
    assert ("attention kept", "over the first 4096 tokens, too few for the pattern to leave "
            "anything out") in [(row[0].text, row[1].text) for row in table.rows]  # fmt: skip
    assert "fidelity" not in {plot.name for plot in tuning_plots.plots((whole,))}


def test_a_reader_is_warned_of_what_was_not_done() -> None:
    partial = {"Partial": "the search ended early, and 1 candidate had no turn"}
    assert warned(measured()) == partial
    assert warned(predicted()) == {
        "Ranked by the cost model, not timed": "no card was there: every time on this page is "
        "predicted"
    }
    assert warned(replace(measured(), is_partial=False)) == {}
    mixed = warned(replace(measured(), is_partial=False), predicted())
    assert mixed == {
        "Ranked by the cost model, not timed": "no time was taken: moba(block=512, k_blocks=8) is "
        "predicted"
    }
    lost = replace(measured(), rows=measured().rows[3:6], is_partial=False)
    assert warned(lost) == {
        "No winner": "moba(block=512, rule=a<b|c): none of 3 candidates came out right; the tables "
        "say why"
    }
    assert tuning_pages.findings((lost,)) == tuning_pages.winners((lost,)) == ()


def test_a_winner_is_pinned_by_one_line() -> None:
    assert [winner.line for winner in tuning_pages.winners((measured(), predicted()))] == [
        LINE,
        "attention = sp.compile(moba(block=512, k_blocks=8))",
    ]


# ---- the plots -----------------------------------------------------------------------------------


def data_of(name: str, *tunings: Tuning) -> list[dict[str, Any]]:
    (plot,) = [plot for plot in tuning_plots.plots(tunings) if plot.name == name]
    found: list[dict[str, Any]] = json.loads(plot.spec)["data"]
    return found


def test_a_candidate_has_a_dot_on_the_line_of_each_axis_it_sets() -> None:
    rows = [timed(Candidate(None, ()), 3.0), timed(Candidate(None, WARPS), 2.0)]
    rows += [timed(Candidate("gather", TILES), 1.0), timed(Candidate("gather", ()), 4.0)]
    ok, best, default = data_of("candidates-0", replace(measured(), rows=settled(rows)))
    assert list(zip(best["y"], best["x"], strict=True)) == [
        ("order = gather", 1.0),
        ("attend_keys block_k = 32", 1.0),
        ("attend_keys block_m = 64", 1.0),
        ("attend_keys stages = 2", 1.0),
    ], "warps has one value, so it parts nothing"
    assert ("order = chosen", 3.0) in list(zip(ok["y"], ok["x"], strict=True))
    assert len(ok["x"]) == 1 + 4 + 1
    assert set(default["x"]) == {3.0}
    assert "order gather" in best["hovertext"][0]
    assert "measured 1.0000" in best["hovertext"][0]


def test_fidelity_stands_against_time_with_dense_as_the_measure() -> None:
    first, second, dense = data_of("fidelity", measured(), measured(64))
    assert (first["x"], first["y"], first["name"]) == ([1.25], [0.9512], "block=512, rule=a<b|c")
    assert second["y"] == [0.9064]
    assert (dense["x"], dense["y"]) == ([5.0], [1.0])


def test_prediction_is_plotted_against_measurement_only_where_both_are_known() -> None:
    line, dots = data_of("model", measured())
    assert line["x"] == line["y"] == [0, 3.5]
    assert (dots["x"], dots["y"]) == ([1.0, 1.0, 2.0], [1.25, 1.5, 3.5])
    assert [plot.name for plot in tuning_plots.plots((predicted(),))] == ["candidates-0"]


# ---- the pages -----------------------------------------------------------------------------------


def test_html_and_markdown_hold_the_same_rows_and_keep_text_as_text(tmp_path: Path) -> None:
    html, _, markdown = tuning_pages.write_all((measured(), many()), tmp_path)
    page, text = html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")
    assert "<b>in bold</b>" not in page and "a note &lt;b&gt;in bold" in page
    assert "rule=a<b" not in page
    for row in (*measured().rows, *many().rows):
        assert row.reason.replace(">", "&gt;") in page and row.reason in text
    assert page.count('<tr><th scope="row">') == text.count("\n| ") - text.count("\n| ---") * 2
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables}
    assert widths == {2, 6, len(tuning_tables.MEANING_COLUMNS), len(tuning_tables.RIGHT_FIGURES)}
    assert LINE in text
    assert "<details>" in page


def test_a_text_that_looks_like_markup_stays_text_in_the_plots_too(tmp_path: Path) -> None:
    tuning = replace(measured(), call=replace(CALL, pattern=f"mine(rule={EVIL})"), notes=(EVIL,))
    page = tuning_pages.write_all((tuning, tuning), tmp_path)[0].read_text(encoding="utf-8")
    assert "<script>alert" not in page
    specs = re.findall(r'<script type="application/json" id="[\w-]+-data">(.*?)</script>', page)
    assert len(specs) == page.count('class="plot"') == 4
    for spec in specs:
        json.loads(spec)


@pytest.mark.parametrize("rows", [(), measured().rows[3:]], ids=["no row", "no right row"])
def test_a_tuning_without_a_winner_is_still_a_page(rows: tuple[Row, ...], tmp_path: Path) -> None:
    tuning = replace(measured(), rows=rows, kept=None, dense_ms=None, notes=(), created="")
    html, _, markdown = tuning_pages.write_all((tuning,), tmp_path / "new" / "folder")
    assert 'class="plot"' not in html.read_text(encoding="utf-8")
    assert "No winner" in markdown.read_text(encoding="utf-8")


def test_a_right_candidate_without_any_time_is_a_row_and_no_dot() -> None:
    row = Row(Candidate(None, ()), "best", "matched")
    tuning = replace(measured(), rows=(row,), dense_ms=None, kept=None)
    assert tuning_plots.plots((tuning,)) == ()
    assert tuning_facts.ms(tuning_facts.time_of(row)) == "–"
    assert tuning_pages.findings((tuning,)) == ()
    assert tuning_pages.winners((tuning,))[0].line.startswith("attention = sp.compile(moba(")
