"""The page and the terminal form of an ablation, read back and held against the record they were drawn from."""

from __future__ import annotations

import doctest
import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tests.helpers import records_samples as samples
from tests.helpers.pages import (
    SITE_TITLES,
    Page,
    enough_contrast,
    holds,
    policy_allows_own_scripts_only,
    printed,
    well_formed_and_accessible,
)
from uncollapse.errors import InputError
from uncollapse.records.ablation import AblationRecord, AblationRun
from uncollapse.records.encoding import from_json, to_json
from uncollapse.report import draw, show
from uncollapse.report.ablation import lines as ablation_lines
from uncollapse.report.ablation import wording

RECORDS = ("ablation", "causal_ablation")
MARKS = ["1·1·1", "0·1·1", "1·0·1", "1·1·0", "0·0·1", "0·1·0", "1·0·0", "0·0·0"]
FLOORED = {2: 6, 4: 6, 6: 5, 7: 2}  # run → the first site at the rounding floor, read off the sample by eye


def record_of(name: str) -> AblationRecord:
    record: AblationRecord = getattr(samples, name)()
    return record


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(draw(record_of(name))) for name in RECORDS}


def judged(run: AblationRun) -> list[float | None]:
    """The consensus distances of a run, largest-norm tokens left out where they were: written out again for the test."""
    found: list[float | None] = []
    for site in run.trajectory:
        statistic = site.consensus_distance
        if site.massive_tokens_left_out is not None and site.massive_tokens_left_out.consensus_distance is not None:
            statistic = site.massive_tokens_left_out.consensus_distance
        found.append(None if statistic is None else statistic.mean)
    return found


def drawn(shown: Page, *fields: str) -> list[dict[str, Any]]:
    return shown.rows_of("consensus", *fields)


def words_of(shown: Page) -> str:
    return " ".join(shown.words.split())


# The page -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDS)
def test_every_run_and_site_stands_in_the_page_with_every_figure(pages: dict[str, Page], name: str) -> None:
    compared = 0
    for number, run in enumerate(record_of(name).runs):
        for site in run.trajectory:
            row = f"run-{number}-site-{'in' if site.block is None else site.block}"
            for measure, title in SITE_TITLES.items():
                value = getattr(site, measure)
                if value is not None:
                    holds(pages[name].cells[row, title], value)
                    compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", RECORDS)
def test_all_curves_stand_side_by_side_with_rounding_named(pages: dict[str, Page], name: str) -> None:
    record, shown = record_of(name), pages[name]
    floored = FLOORED if name == "ablation" else {}
    titles = shown.titles["curves-table"]
    assert len(titles) == len(record.runs) + 1
    for number, run in enumerate(record.runs):
        for i, (site, value) in enumerate(zip(run.trajectory, judged(run), strict=True)):
            cell = shown.cells[f"curves-{'in' if site.block is None else site.block}", titles[number + 1]]
            if value is None:
                assert cell["text"] == "–"
                assert cell["title"]
                continue
            assert printed(cell["text"]) == pytest.approx(value, rel=5.1e-3)
            assert (cell["small"] == "rounding") == (i >= floored.get(number, 99))


def test_the_chart_follows_every_run_to_the_floor_and_no_further(pages: dict[str, Page]) -> None:
    points = drawn(pages["ablation"], "run", "depth", "y")
    record = record_of("ablation")
    for number, run in enumerate(record.runs):
        values = judged(run)
        first = FLOORED.get(number, len(values))
        level = {p["depth"]: p["y"] for p in points if p["run"] == number and not p["rounding"]}
        assert level == dict(enumerate(values[:first]))
        rounding = {p["depth"]: p["y"] for p in points if p["run"] == number and p["rounding"]}
        assert set(rounding) == set(range(first, len(values)))
        assert all(y == max(values[depth] or 0.0, 1e-16) for depth, y in rounding.items())


def test_rounding_is_hollow_grey_and_joined_to_nothing(pages: dict[str, Page]) -> None:
    spec = pages["ablation"].spec("consensus")
    by_mark: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
    for layer in spec["layer"]:
        by_mark.setdefault(layer["mark"]["type"], []).append((layer["mark"], spec["datasets"][layer["data"]["name"]]))
    (full, line), (dotted, falls) = by_mark["line"]
    assert not [row for row in line if row["rounding"]]
    assert "strokeDash" in dotted
    assert "strokeDash" not in full
    pairs = [(falls[i], falls[i + 1]) for i in range(0, len(falls), 2)]
    assert {a["run"]: (a["rounding"], b["rounding"], b["depth"]) for a, b in pairs} == {
        number: (False, True, first) for number, first in FLOORED.items()
    }
    ((hollow, points),) = by_mark["point"]
    assert hollow["filled"] is False
    assert hollow["color"] == "#8a949e"
    assert all(row["rounding"] for row in points)
    assert len(points) == sum(7 - first for first in FLOORED.values())
    ((_, (band,)),) = [each for each in by_mark["rect"] if "top" in each[1][0]]
    assert (band["y"], band["top"]) == (1e-16, samples.FLOOR)
    ((_, (label,)),) = by_mark["text"]
    assert label["words"] == "rounding floor 3.6e-15: nothing below it can be measured"
    assert '"type": "log"' in json.dumps(spec)
    assert '"domain": [1e-16, 1.0]' in json.dumps(spec)


def test_where_no_floor_is_met_none_is_drawn(pages: dict[str, Page]) -> None:
    shown = pages["causal_ablation"]
    assert not [p for p in drawn(shown, "run") if p["rounding"]]
    assert not drawn(shown, "words")
    assert "rounding floor 0" not in shown.words
    assert '"domain": [0.01, 1.0]' in json.dumps(shown.spec("consensus"))


def test_the_floor_is_judged_by_the_values_and_not_by_what_the_block_is_called() -> None:
    """Blocks are counted through both stacks of an encoder-decoder, sites of the decoder from its own embedding."""
    record = record_of("ablation")
    fallen = record.runs[2]
    decoder = [replace(s, block=None if s.block is None else s.block + 6, stack="decoder") for s in fallen.trajectory]
    encoder = [replace(s, stack="encoder") for s in record.runs[0].trajectory]
    for number in (5, 11):
        assert fallen.rate is not None
        run = replace(
            fallen, trajectory=[*encoder, *decoder], rate=replace(fallen.rate, floor_block=number), without=[]
        )
        assert wording.floor_words(run) == "rounding floor from block 11"
        assert [wording.at_floor(run, i) for i in range(7)] == [False] * 6 + [True]


def test_lines_differ_by_more_than_colour(pages: dict[str, Page]) -> None:
    spec = pages["ablation"].spec("consensus")
    line = next(layer for layer in spec["layer"] if "strokeDash" in layer["encoding"])
    colours = line["encoding"]["color"]["scale"]
    dashes = line["encoding"]["strokeDash"]["scale"]
    assert [label.split()[0] for label in colours["domain"]] == MARKS
    looks = list(zip(colours["range"], map(tuple, dashes["range"]), strict=True))
    assert len(set(looks)) == 8
    for (colour, dash), mark in zip(looks, MARKS, strict=True):
        assert (dash == (1.0, 0.0)) == (mark[0] == "1")  # dashed: without the norms
        assert colour == looks[MARKS.index("1" + mark[1:])][0]


def test_even_fifteen_runs_differ() -> None:
    parts = ["norm", "residual", "mlp", "attention"]
    run = samples.ablation().runs[0]
    chosen = [[p for i, p in enumerate(parts) if number >> i & 1] for number in range(16)]
    spec = Page(draw(replace(samples.ablation(), runs=[replace(run, without=each) for each in chosen], verdicts=[])))
    line = next(layer for layer in spec.spec("consensus")["layer"] if "strokeDash" in layer["encoding"])
    looks = zip(
        line["encoding"]["color"]["scale"]["range"],
        map(tuple, line["encoding"]["strokeDash"]["scale"]["range"]),
        strict=True,
    )
    assert len(set(looks)) == 16


def test_small_multiples_show_the_share_of_the_attainable(pages: dict[str, Page]) -> None:
    shown = pages["ablation"]
    for number, run in enumerate(record_of("ablation").runs):
        rows = shown.rows_of(f"share-{number}", "depth", "y")
        wanted = [s.affine_rank.mean / s.attainable_affine_rank.mean for s in run.trajectory]  # type: ignore[union-attr]
        assert [r["y"] for r in rows] == pytest.approx(wanted)
    assert [a["aria-label"] for a in shown.attributes("div") if a.get("id") == "share-2"] == [
        "Share of the attainable affine rank along depth, without residual. "
        "Its figures are in the tables of this section."
    ]


@pytest.mark.parametrize("name", RECORDS)
def test_the_rates_have_their_figures(pages: dict[str, Page], name: str) -> None:
    shown = pages[name].cells
    for number, run in enumerate(record_of(name).runs):
        row = f"rate-{number}"
        if run.rate is None:
            assert shown[row, "rate"]["title"] == shown[row, "slope"]["title"] == "the consensus distance is not finite"
            continue
        assert shown[row, "rate"]["text"] == run.rate.kind
        assert printed(shown[row, "factor"]["text"]) == pytest.approx(run.rate.factor, rel=5.1e-3)
        assert printed(shown[row, "rounding floor"]["text"]) == pytest.approx(run.rate.floor, rel=5.1e-3)
        if run.rate.slope is None:
            assert "fewer than three" in shown[row, "slope"]["title"]
        else:
            assert printed(shown[row, "slope"]["text"]) == pytest.approx(run.rate.slope, rel=5.1e-3)
            low, high = shown[row, "slope"]["small"].strip("[]").split(", ")
            assert printed(low) == pytest.approx(run.rate.slope_low, rel=5.1e-2)
            assert printed(high) == pytest.approx(run.rate.slope_high, rel=5.1e-2)
        met = FLOORED.get(number) if name == "ablation" else None
        assert shown[row, "rounding floor reached"]["text"] == ("not reached" if met is None else f"block {met - 1}")
        lowest = min(v for v in judged(run) if v is not None)
        assert printed(shown[row, "lowest"]["text"]) == pytest.approx(lowest, rel=5.1e-3)
        assert (shown[row, "lowest"]["small"] == "rounding") == (met is not None)


def test_the_ratio_of_every_block_stands_beside_its_attention(pages: dict[str, Page]) -> None:
    shown, record = pages["ablation"], record_of("ablation")
    titles = shown.titles["contraction-table"]
    for number, run in enumerate(record.runs):
        values, met = judged(run), FLOORED.get(number, 99)
        for block in range(6):
            cell = shown.cells[f"ratio-{block}", titles[number + 1]]
            before, after = values[block], values[block + 1]
            assert before is not None
            assert after is not None
            if block >= met:
                assert (cell["text"], cell["small"]) == ("rounding", "")
                continue
            assert cell["text"].startswith("≤ ") == (block + 1 == met)
            assert printed(cell["text"].removeprefix("≤ ")) == pytest.approx(after / before, rel=5.1e-3)
            assert printed(cell["small"].removeprefix("attention ")) == pytest.approx(0.9 - 0.1 * block, rel=5.1e-3)


def test_attention_that_cannot_be_lined_up_with_the_blocks_is_not_shown(pages: dict[str, Page]) -> None:
    shown = pages["causal_ablation"]
    title = shown.titles["contraction-table"][3]
    assert shown.cells["ratio-0", title]["small"] == "attention –"
    assert shown.cells["ratio-3", title]["text"] == "–"


def test_output_stands_beside_the_collapse(pages: dict[str, Page]) -> None:
    shown, record = pages["causal_ablation"].cells, record_of("causal_ablation")
    for number, run in enumerate(record.runs):
        assert run.loss is not None
        holds(shown[f"quality-{number}", "next-token loss"], run.loss)
        if run.output_shift is not None:
            holds(shown[f"quality-{number}", "output shift"], run.output_shift)
    assert shown["quality-0", "output shift"]["title"] == "this is the whole model"
    assert shown["quality-1", "lowest affine rank"]["text"] == "60 %"
    assert (
        "Not measured, next-token loss: the model has no language-model head with a causal mask"
        in pages["ablation"].words
    )


def test_predictions_are_answered_in_words_and_lead_to_their_row(pages: dict[str, Page]) -> None:
    shown = pages["ablation"]
    answers = [a["class"] for a in shown.attributes("span") if a.get("class", "").startswith("answer")]
    assert answers == ["answer disagrees", "answer agrees", "answer agrees", "answer open"]
    words = words_of(shown)
    assert "exact rank disagrees predicted dimensions are lost observed 100% of the share is left" in words
    assert "consensus distance agrees predicted falls observed consensus distance 0.96 → 0.7 (row of block 5)" in words
    links = [a["href"] for a in shown.attributes("a") if "run-" in a["href"]]
    assert links == ["#run-3-site-5", "#run-2-site-5"]
    assert words.count("The two measures disagree") == 1
    assert "tested without MLP (1·1·0)" in words
    assert "of 4: 2 agree, 1 disagree, 1 open" in words


def test_signs_and_not_only_colours_say_agree_and_disagree(pages: dict[str, Page]) -> None:
    style = pages["ablation"].style
    for answer, sign in wording.SIGNS.items():
        assert f'.answer.{answer}::before {{ content: "{sign}"; }}' in style


def test_the_summary_says_what_holds_the_tokens_apart(pages: dict[str, Page]) -> None:
    words = words_of(pages["ablation"])
    assert (
        "Removing residual alone makes the tokens collapse (doubly exponential); "
        "removing norm or MLP alone does not." in words
    )
    assert "1·0·1 without residual: 0.96 → the rounding floor from block 5, doubly exponential, slope 2.7" in words
    assert "1·1·0 without MLP: 0.96 → 0.70 at block 5, no collapse; affine rank 100 %." in words
    assert "Components were removed in every block." in words
    assert "largest-norm tokens of each sequence are left out" in words
    causal = words_of(pages["causal_ablation"])
    assert "Components were removed in blocks 0–1 and 3 only." in causal
    assert "largest-norm tokens of each sequence are left out" not in causal
    for shown in pages.values():
        assert "Removing a part from a trained model is not the same as training without it." in words_of(shown)


def test_headlines() -> None:
    record = samples.ablation()
    whole, norm, residual, mlp, *_ = record.runs
    both = record.runs[6]

    def said(*runs: AblationRun) -> str:
        return wording.headline(replace(record, runs=list(runs)))

    assert said(whole, both) == "Removing residual and MLP makes the tokens collapse (doubly exponential)."
    assert said(whole, norm, mlp) == "Removing norm or MLP alone does not make the tokens collapse."
    assert said(residual, mlp).startswith("The tokens collapse even in the whole model (doubly exponential). Removing")
    assert said(whole) == "None of the runs without a component could be followed along depth."
    assert "could be followed" in said(whole, replace(mlp, rate=None))


def test_causal_models_are_judged_by_what_causal_masks_do(pages: dict[str, Page]) -> None:
    assert "This model has a causal mask" in pages["causal_ablation"].words
    assert "This model has a causal mask" not in pages["ablation"].words


def test_norms_and_updates_are_shown_where_they_were_measured(pages: dict[str, Page]) -> None:
    common = ["predictions", "depth", "rank", "rates", "output"]
    sections = {name: [a["id"] for a in shown.attributes("section")] for name, shown in pages.items()}
    assert sections["ablation"] == [*common, "method"]
    assert sections["causal_ablation"] == [*common, "norms", "updates", "method"]
    record, shown = record_of("causal_ablation"), pages["causal_ablation"].cells
    for index, norm in enumerate(record.norms):
        holds(shown[f"norm-{index}", "before"], norm.affine_rank_before)  # type: ignore[arg-type]
    assert [key for key in pages["causal_ablation"].charts() if key.startswith("updates")]


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_is_as_sound_as_the_one_of_a_diagnosis(pages: dict[str, Page], name: str) -> None:
    well_formed_and_accessible(pages, name)
    policy_allows_own_scripts_only(pages, name)
    enough_contrast({"encoder": pages[name]})
    assert len(pages[name].text.encode()) < 1_500_000


def test_hostile_text_stays_text_everywhere() -> None:
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"
    record = samples.ablation()
    runs = [replace(run, unavailable=dict.fromkeys(run.unavailable, evil)) for run in record.runs]
    record = replace(
        record,
        model=replace(record.model, name=evil, architecture=evil),
        probe=replace(record.probe, source=evil, command=evil, options={evil: evil}),
        versions={evil: evil},
        runs=[*runs, replace(runs[1], without=[evil])],
        verdicts=[replace(v, prediction=evil, source=evil, predicted=evil, observed=evil) for v in record.verdicts],
    )
    shown, plain = Page(draw(record)), Page(draw(replace(record, runs=[*runs, runs[1]])))
    assert [tag for tag, _ in shown.elements].count("script") == [tag for tag, _ in plain.elements].count("script")
    assert not shown.attributes("img")
    for attributes, text in shown.scripts:
        if attributes.get("type") == "application/json":
            assert "<" not in text


def test_a_page_is_the_same_from_json(pages: dict[str, Page]) -> None:
    for name in RECORDS:
        assert draw(from_json(to_json(record_of(name)), AblationRecord)) == pages[name].text


def test_drawing_leaves_the_record_as_it_was() -> None:
    record = samples.ablation()
    before = to_json(record)
    draw(record)
    show(record, Console(file=io.StringIO()))
    assert to_json(record) == before


def test_another_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^draw: expected a record .* got uncollapse/ablation/9\. .*`load`"):
        draw(replace(samples.ablation(), schema="uncollapse/ablation/9"))  # type: ignore[arg-type]


# The terminal ---------------------------------------------------------------------------------------------------------


def shown(record: AblationRecord, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(record, Console(file=stream, width=width))
    stream.seek(0)
    return stream.read()


def rows(text: str) -> list[list[str]]:
    """The lines of each run's row in the table."""
    body = text.split("─\n", 1)[1].split("\n\nA mark", 1)[0].splitlines()
    found: list[list[str]] = []
    for line in body:
        if line[:1] in "01" and "·" in line[:3]:
            found.append([])
        found[-1].append(line.rstrip())
    return found


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", RECORDS)
def test_the_terminal_has_one_row_a_run_and_fits(name: str, width: int) -> None:
    record = record_of(name)
    text = shown(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    marks = [lines[0].split()[0] for lines in rows(text)]
    assert marks == (MARKS if name == "ablation" else ["1·1·1·1", "1·0·1·1", "0·1·1·0"])


@pytest.mark.parametrize(("width", "sites"), [(80, ["in", "1", "3", "5"]), (120, ["in", "0", "1", "2", "3", "4", "5"])])
def test_as_many_sites_as_fit_show_the_distances(width: int, sites: list[str]) -> None:
    record = record_of("ablation")
    text = shown(record, width)
    heading = next(line for line in text.splitlines() if line.startswith("removed"))
    assert heading.split("rank")[0].split()[1:] == sites
    for number, (lines, run) in enumerate(zip(rows(text), record.runs, strict=True)):
        values = lines[0].split()[1 : 1 + len(sites)]
        for name, value in zip(sites, values, strict=True):
            position = 0 if name == "in" else int(name) + 1
            if position >= FLOORED.get(number, 99):
                assert value == "floor"
            else:
                true = judged(run)[position]
                assert true is not None
                assert printed(value) == pytest.approx(true, rel=5.1e-2)


def test_a_row_says_what_is_gone_how_it_falls_and_what_it_costs() -> None:
    table = [" ".join(" ".join(lines).split()) for lines in rows(shown(record_of("ablation"), 120))]
    assert "nothing" in table[0]
    assert "100 % none 0.98 norm" in table[1]
    assert "0 % doubly exponential 1 residual slope 2.7 [2.7, 2.8] floor from block 5" in table[2]
    assert "too few points" in table[7]
    assert "floor from block 1" in table[7]
    assert "norm + residual" in table[7]
    causal = [" ".join(" ".join(lines).split()) for lines in rows(shown(record_of("causal_ablation"), 120))]
    assert "60 % geometric 0.70 7.50 residual ×0.55 per block" in causal[1]
    assert "– 0.30 9.10" in causal[2]


def test_the_verdicts_follow_in_words_and_the_caveat_closes() -> None:
    text = " ".join(shown(record_of("ablation"), 100).split())
    wanted = [
        "Removing residual alone makes the tokens collapse (doubly exponential); removing norm or MLP",
        "The MLP prevents the collapse Dong, Cordonnier, Loukas 2021, arXiv 2103.03404; tested without MLP (1·1·0).",
        "✗ disagrees in exact rank predicted: dimensions are lost observed: 100% of the share is left ✓ agrees in",
        "consensus distance predicted: falls observed: consensus distance 0.96 → 0.7 (block 5)",
        "The two measures disagree",
        "Layer normalisation is rank-neutral",
        "? open in exact rank",
        "Removing a part from a trained model is not the same as training without it.",
        "Look next: `uncollapse ablate demo --grid --html ablation.html` draws every run along depth.",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)
    assert "This model has a causal mask" not in text
    assert "This model has a causal mask" in shown(record_of("causal_ablation"))
    assert '`to_html("ablation.html")`' in shown(record_of("causal_ablation"), 120)


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    assert "doubly exponential" in shown(record_of("ablation"), 100, "ascii")


def test_names_are_printed_without_markup_or_control_characters() -> None:
    record = record_of("ablation")
    hostile = replace(record.verdicts[0], observed="[b]z[/b] \x1b[31m")
    text = shown(replace(record, model=replace(record.model, name="[red]x\x07"), verdicts=[hostile]))
    assert text.startswith("[red]x\\x07\n")
    assert "[b]z[/b]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("module", [wording, ablation_lines])
def test_the_examples_of_the_docstrings(module: Any) -> None:
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


def test_the_left_out_distance_is_what_a_site_is_judged_by() -> None:
    plain, massive = samples.site("embedding", 0.5), samples.site("embedding", 0.5, massive=0.8)
    assert plain.consensus == plain.consensus_distance
    assert massive.consensus is not None
    assert math.isclose(massive.consensus.mean, 0.8)
    assert "consensus" not in json.loads(to_json(massive))
