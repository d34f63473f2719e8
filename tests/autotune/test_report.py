"""The report: what may be claimed, what is read back, and pages that need no other file."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import jinja2.meta
import pytest

from spcomp.autotune.report import json_text, pages, plots, record, tables
from spcomp.autotune.report.json_form import ReportUnreadable
from spcomp.codegen.render import environment

NO_BREAK = "\u00a0"
CARD = "Example Card 80GB"


def timing(kind: str, block: int | None, budget: float) -> record.Timing:
    median = 0.02 + 0.3 * budget * (1 + (block or 64) / 1024)
    spread = 0.004 if kind == "measured" else None
    return record.Timing(
        kind, median, spread, 0.41, CARD if kind == "measured" else "sm90 roofline"
    )


def row(pattern: str, block: int | None, budget: float, kind: str = "predicted") -> record.Row:
    mass = 1 - (1 - budget) ** 2 * (0.2 + (block or 64) / 2048)
    return record.Row(
        pattern=pattern,
        block=block,
        budget=budget,
        mass=record.Mass(mass, mass**4, mass**2),
        out_error=0.4 * (1 - mass) + 1e-7,
        out_max_abs=1.5 * (1 - mass) + 1e-6,
        density=budget**0.7,
        perplexity=7.4 + 3 * (1 - mass),
        flops=int(3e9 * budget),
        bytes=int(4e6 * budget),
        timing=timing(kind, block, budget),
        rung="timed" if kind == "measured" else "matched",
    )


def block_map(layer: int, head: int, block: int = 64) -> record.BlockMap:
    size = 2048 // block
    cells = tuple(
        tuple(
            0 if j > i else 1 if j == i else 2 * (j == 0 or (i * 7 + j * (head + 3)) % 5 == 0)
            for j in range(size)
        )
        for i in range(size)
    )
    return record.BlockMap("block_topk", block, 0.25, layer, head, cells)


def sample(kind: str = "predicted") -> record.ReportRecord:
    """Build a report of invented figures that the rules allow."""
    rows = [
        row("block_topk", b, share, kind)
        for b in (64, 128, 256)
        for share in (0.125, 0.25, 0.5, 1.0)
    ]
    rows += [row("moba", 128, 0.25, kind), row("streaming_llm", None, 0.25, kind)]
    kernels = [
        record.KernelRow(
            f"attend_{b}", "block_topk", b, "sm90", 96 + b // 4, 0, b * 512, "compiled"
        )
        for b in (64, 128, 256)
    ]
    return record.ReportRecord(
        title="Sparse attention on a real model",
        created="2026-01-02T03:04:05Z",
        elapsed_s=187.4,
        environment=record.Environment(
            CARD if kind == "measured" else None, "0.1.0", "2.13.0", "3.7.1", "3.11.7", "abc1234", 0
        ),
        subject=record.Subject(
            "SmolLM2-135M",
            "argparse.py",
            "0" * 64,
            2048,
            1024,
            (0, 9, 19, 29),
            9,
            3,
            64,
            "float32",
            "the reference backend",
        ),
        priced=record.PricedShape(1, 9, 3, 32768, 64, "bfloat16"),
        dense=record.Dense(7.4, 3_000_000_000, 4_000_000),
        rows=tuple(rows),
        kernels=tuple(kernels),
        block_maps=tuple(block_map(layer, head) for layer in (0, 19) for head in (0, 4)),
        notes=("The figures of this page are invented.",),
    )


def changed(**changes: object) -> record.ReportRecord:
    """Change the first row of the sample."""
    whole = sample()
    first = dataclasses.replace(whole.rows[0], **changes)
    return dataclasses.replace(whole, rows=(first, *whole.rows[1:]))


@pytest.mark.parametrize("kind", ["predicted", "measured"])
def test_a_record_reads_back_as_it_was(kind: str, tmp_path: Path) -> None:
    whole = sample(kind)
    pages.write_json(whole, tmp_path / "report.json")
    assert pages.read_json(tmp_path / "report.json") == whole


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"rung": "timed"},
            "the row block_topk, block 64, budget 0.125 says rung 'timed', but the environment "
            "names no card.\n  help: name the card, or claim 'matched' at most.",
        ),
        (
            {"rung": "superb"},
            "the row block_topk, block 64, budget 0.125 says rung 'superb', but the rungs are "
            "emitted, compiled, matched, timed.\n  help: name the highest one that was reached.",
        ),
        (
            {"timing": record.Timing("measured", 1.0, 0.1, 2.0, CARD)},
            "the row block_topk, block 64, budget 0.125 says rung 'matched', but it holds a "
            "measured time.\n  help: a measured time and the rung 'timed' go together.",
        ),
        (
            {"density": 25.0},
            "the row block_topk, block 64, budget 0.125 says density 25, but a share lies between "
            "0 and 1.\n  help: give it as a fraction, 0.25 for 25 %.",
        ),
        (
            {"out_error": float("nan")},
            "the report.rows[0].out_error says nan, but a figure is finite.\n"
            "  help: use None for unknown.",
        ),
    ],
    ids=["timed without a card", "unknown rung", "measured and not timed", "percent", "nan"],
)
def test_a_record_that_claims_too_much_is_refused_by_every_writer(
    changes: dict[str, object], text: str, tmp_path: Path
) -> None:
    for write in (pages.write_html, pages.write_json, pages.write_md):
        with pytest.raises(record.ReportContradiction) as refused:
            write(changed(**changes), tmp_path / "report")
        assert str(refused.value) == f"ReportContradiction: {text}"
    assert not (tmp_path / "report").exists()


def test_a_card_with_a_predicted_time_may_not_claim_timed() -> None:
    whole = sample("measured")
    first = dataclasses.replace(whole.rows[0], timing=timing("predicted", 64, 0.125))
    with pytest.raises(record.ReportContradiction, match="it holds a predicted time"):
        record.check(dataclasses.replace(whole, rows=(first,)))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda d: d.update(schema=99), "its schema is 99"),
        (lambda d: d.update(kind="recipe"), "the document has no kind 'spcomp report'"),
        (lambda d: d["rows"][2].pop("block"), "report.rows[2].block is missing"),
        (
            lambda d: d["rows"][2].update(speed=3),
            "report.rows[2].speed is not a field of this version",
        ),
        (
            lambda d: d["dense"].update(flops="many"),
            "report.dense.flops is a text, not a whole number",
        ),
        (lambda d: d["subject"].update(layers=3), "report.subject.layers is a number, not a list"),
        (
            lambda d: d["rows"][0].update(mass=None),
            "report.rows[0].mass is null, not an object",
        ),
        (
            lambda d: d["rows"][0].update(rung="best"),
            "report.rows[0].rung is 'best', not one of emitted, compiled, matched, timed",
        ),
    ],
)
def test_another_form_of_json_is_refused_with_its_place(edit: object, problem: str) -> None:
    document = json.loads(json_text.to_json(sample()))
    edit(document)  # type: ignore[operator]
    with pytest.raises(ReportUnreadable) as refused:
        json_text.from_json(json.dumps(document))
    assert str(refused.value) == (
        f"ReportUnreadable: the report cannot be read: {problem}.\n"
        "  help: this version reads schema 1; make the report anew with `make demo`."
    )


@pytest.mark.parametrize(
    "text",
    [json_text.to_json(sample())[:100], '{"kind": NaN}', "[" * 100_000, ""],
    ids=["cut", "NaN", "deep", "empty"],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ReportUnreadable, match="the text is no JSON"):
        json_text.from_json(text)


@pytest.mark.parametrize(
    ("name", "context"),
    [("report.html.jinja", pages.HtmlContext), ("report.md.jinja", pages.MarkdownContext)],
)
def test_a_template_reads_exactly_the_fields_of_its_context(name: str, context: type) -> None:
    text = (Path(pages.__file__).parents[2] / "templates" / "report" / name).read_text("utf-8")
    used = jinja2.meta.find_undeclared_variables(environment().parse(text))
    assert used == {field.name for field in dataclasses.fields(context)}


def page(kind: str = "predicted", **changes: object) -> str:
    whole = dataclasses.replace(sample(kind), **changes)
    return (
        environment()
        .get_template("report/report.html.jinja")
        .render(
            {
                field.name: getattr(pages.html_context(whole), field.name)
                for field in dataclasses.fields(pages.HtmlContext)
            }
        )
    )


def without_library(text: str) -> str:
    return text.replace(pages.get_plotlyjs(), "")


def test_the_page_asks_for_nothing_but_itself() -> None:
    text = without_library(page())
    assert text != page(), "the library stands in the page"
    assert not re.search(r"""(src|href|action|poster)\s*=\s*["'](?!data:)""", text)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|https?:", text)
    assert "default-src 'none'" in text


def test_no_button_of_a_plot_sends_it_anywhere() -> None:
    """plotly 7 has one that uploads a plot, shown unless it is switched off."""
    assert "showSendToCloud: false," in page()
    assert 'plotlyServerURL: "",' in page()


def test_every_row_shows_its_rung_and_whether_its_time_was_measured() -> None:
    for kind in ("predicted", "measured"):
        text = without_library(page(kind))
        body = text[text.index("Every pattern, block size and budget</caption>") :]
        found = re.findall(
            r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", body[: body.index("</table>")]
        )
        assert [name for name, _ in found] == [
            "dense",
            *(r.pattern for r in tables.ordered(sample(kind).rows)),
        ]
        for _, cells in found[1:]:
            assert f" ms {kind}</td>" in cells
            assert ">timed</td>" in cells if kind == "measured" else ">matched</td>" in cells


def test_a_text_that_looks_like_markup_stays_text() -> None:
    evil = '<script>alert("x")</script></script>'
    subject = dataclasses.replace(sample().subject, text=evil)
    rows = (dataclasses.replace(sample().rows[0], pattern=evil),)
    text = without_library(page(subject=subject, rows=rows, title=evil, notes=(evil,)))
    assert "<script>alert" not in text
    assert html.escape(evil, quote=False).replace('"', "&#34;") in text
    specs = re.findall(r'<script type="application/json" id="\w+-data">(.*?)</script>', text)
    assert len(specs) == 3
    for spec in specs:
        json.loads(spec)


def test_a_report_without_rows_kernels_or_maps_is_still_a_page(tmp_path: Path) -> None:
    empty = dataclasses.replace(sample(), rows=(), kernels=(), block_maps=(), notes=())
    for path in pages.write_all(empty, tmp_path / "new" / "folder"):
        assert path.stat().st_size > 500
    text = without_library((tmp_path / "new" / "folder" / "report.html").read_text("utf-8"))
    assert 'class="plot"' not in text
    assert "kernels-title" not in text


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    rows = (dataclasses.replace(sample().rows[0], pattern="a|b"), *sample().rows[1:])
    pages.write_md(dataclasses.replace(sample(), rows=rows), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines]
    widths = [len(tables.ROW_COLUMNS)] * (2 + 1 + 14) + [len(tables.KERNEL_COLUMNS)] * (2 + 3)
    assert cells == widths + [2] * (2 + 15)
    assert "a\\|b" in text
    assert "- The figures of this page are invented." in text


def test_plots_hold_the_figures_of_the_rows() -> None:
    recall, perplexity, speed = plots.plots(sample())
    assert [plot.name for plot in (recall, perplexity, speed)] == ["recall", "perplexity", "speed"]
    assert speed.title == "Speed against block size, predicted"
    traces = json.loads(recall.spec)["data"]
    (means,) = [t for t in traces if t["name"] == "block_topk, block 128" and t.get("showlegend")]
    want = [r for r in sample().rows if (r.pattern, r.block) == ("block_topk", 128)]
    assert means["x"] == [0.125, 0.25, 0.5, 1.0]
    assert means["y"] == pytest.approx([r.mass.mean for r in want])
    bars = json.loads(speed.spec)["data"]
    budgets = [bar["text"][0].replace(NO_BREAK, " ") for bar in bars]
    assert budgets == ["12.5 %", "25 %", "50 %", "100 %"]
    assert bars[1]["y"][0] == pytest.approx(0.41 / timing("predicted", 64, 0.25).median_ms)


def test_without_times_and_perplexity_only_recall_is_drawn() -> None:
    rows = tuple(dataclasses.replace(r, timing=None, perplexity=None) for r in sample().rows)
    found = plots.plots(dataclasses.replace(sample(), rows=rows))
    assert [plot.name for plot in found] == ["recall"]


def test_a_block_map_becomes_runs_of_equal_cells() -> None:
    cells = ((1, 0, 0), (2, 1, 0), (2, 2, 1))
    picture = plots.map_picture(record.BlockMap("quest", 64, 0.5, 3, 1, cells))
    assert picture.runs == (
        plots.Run(0, 0, 1, "partial"),
        plots.Run(0, 1, 1, "full"),
        plots.Run(1, 1, 1, "partial"),
        plots.Run(0, 2, 2, "full"),
        plots.Run(2, 2, 1, "partial"),
    )
    assert picture.words == "quest, block 64, budget 50\u00a0%: 6 of 9 blocks visible"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (1000, "1 k"), (1234567, "1.23 M"), (9996e8, "1 T")],
)
def test_counts_have_three_figures(value: int | None, text: str) -> None:
    assert tables.count(None if value is None else int(value)) == text


@pytest.mark.parametrize(("share", "text"), [(0.125, "12.5 %"), (1.0, "100 %"), (0.0, "0 %")])
def test_shares_are_percentages_without_idle_zeros(share: float, text: str) -> None:
    assert tables.percent(share) == text.replace(" ", NO_BREAK)


def test_findings_name_the_row_they_come_from() -> None:
    found = pages.findings(sample())
    assert [f.figure.replace(NO_BREAK, " ") for f in found] == ["1.0e-07", "87 %", "6.9×", "3"]
    whole, best, fastest, compiled = [f.words.replace(NO_BREAK, " ") for f in found]
    assert whole == "largest output error of a 100 % budget against dense"
    assert best == (
        "of attention kept by block_topk, block 64, which reads 37.9 % of the pairs (the most of "
        "all that read half or less)"
    )
    assert "predicted: block_topk, block 64, at a budget of 12.5 % (sm90 roofline)" in fastest
    assert compiled == "kernels compiled for sm90; none spills registers"
