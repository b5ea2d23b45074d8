"""The page and the terminal form of the symmetries, and their section on the page of a diagnosis, held against the records."""

from __future__ import annotations

import doctest
import io
import json
import math
import re
from dataclasses import replace
from html import unescape
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from tests.helpers import records_samples as samples
from tests.helpers.pages import (
    Page,
    enough_contrast,
    holds,
    policy_allows_own_scripts_only,
    printed,
    well_formed_and_accessible,
)
from uncollapse.errors import InputError
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import from_json, json_schema, to_json
from uncollapse.records.symmetries import SymmetriesRecord, SymmetryRecord, SymmetryTest
from uncollapse.report import draw, show
from uncollapse.report.symmetries import wording

RECORDS = ("symmetries", "deep", "two_stacks")
ALL = (*RECORDS, "lengths", "translation")
NAMES = {
    "rank-collapse-depth": "Rank collapse in depth",
    "rank-collapse-width": "Rank collapse in width",
    "head-channel-non-identifiability": "Head-channel non-identifiability",
    "entropy-collapse": "Entropy collapse",
}
DEFECTS = {
    "rank-collapse-depth": "0.312 (0.281 … 0.343)",
    "rank-collapse-width": "0.874 (0.787 … 0.961)",
    "head-channel-non-identifiability": "3.90e-7 (3.51e-7 … 4.29e-7)",
}
OUTCOMES = ["broken", "exact", "broken", "none", "exact", "exact", "untested", "exact", "none"]  # of the sample, by eye


def record_of(name: str) -> Any:
    return getattr(samples, name)()


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(draw(record_of(name))) for name in ALL}


def plain(markup: str) -> str:
    """The words of a piece of a page. Code stands in backticks in the record, and options as they are."""
    markup = re.sub(r"<code class=\"option\">(.*?)</code>", r"\1", markup)
    markup = re.sub(r"<code>(.*?)</code>", r"`\1`", markup)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def row_markup(shown: Page, phenomenon: str) -> str:
    """The markup of one of the four rows: up to the next one, or to the line about breakers behind the last."""
    rest = shown.text.split(f'id="symmetry-{phenomenon}"', 1)[1]
    return re.split(r'<div class="phenomenon"|<p class="fine">Breakers are', rest)[0]


def row_words(shown: Page, phenomenon: str) -> str:
    return plain(row_markup(shown, phenomenon))


def words_of_test(shown: Page, number: int) -> str:
    return plain(shown.text.split(f'id="test-{number}-words"', 1)[1].split("</li>")[0])


def changed(record: SymmetriesRecord, number: int, **changes: Any) -> SymmetriesRecord:
    """The record with one of its four symmetries changed."""
    four = [replace(s, **changes) if i == number else s for i, s in enumerate(record.symmetries)]
    return replace(record, symmetries=four)


# The four rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_order_parameter_stands_in_the_page(pages: dict[str, Page], name: str) -> None:
    compared = 0
    for symmetry in record_of(name).symmetries:
        for position, value in enumerate(symmetry.order_parameter):
            key = f"order-{symmetry.phenomenon}-{position}"
            if value is None:
                cell = pages[name].cells[key, "order parameter"]
                assert (cell["text"], cell["sup"] != "") == ("–", True)
                continue
            holds(pages[name].cells[key, "order parameter"], value)
            away = printed(pages[name].cells[key, "distance"]["text"])
            assert away == pytest.approx(abs(value.mean - symmetry.collapsed_value), rel=5.1e-3)
            compared += 1
    assert compared >= 25


@pytest.mark.parametrize("name", ALL)
def test_the_four_rows_say_symmetry_standing_and_what_holds(pages: dict[str, Page], name: str) -> None:
    record, shown = record_of(name), pages[name]
    ids = [key for key in shown.ids() if key.startswith("symmetry-")]
    assert ids == [f"symmetry-{phenomenon}" for phenomenon in NAMES]
    for symmetry in record.symmetries:
        words = row_words(shown, symmetry.phenomenon)
        assert NAMES[symmetry.phenomenon] in words
        assert symmetry.group in words
        for held in (*symmetry.breakers, *symmetry.stabilisers):
            assert held in words
        assert words.count("none in this model") == (not symmetry.breakers) + (not symmetry.stabilisers)
        if symmetry.equivariance_defect is None:
            assert f"Defect: {symmetry.unavailable['equivariance_defect']}." in words
        else:
            assert f"Defect of the model as it is: {DEFECTS[symmetry.phenomenon]}." in words


def test_a_row_says_where_the_model_stands_and_where_it_is_nearest_to_collapse(pages: dict[str, Page]) -> None:
    words = row_words(pages["symmetries"], "rank-collapse-depth")
    assert "From 0.971 at the embedding to 0.922 at block 5; collapse is at 0." in words
    assert "Nearest to collapse: 0.922 at block 5; nearest sequence: 0.830." in words
    width = record_of("symmetries").symmetries[1]
    means = [s.mean for s in width.order_parameter]
    lowest = min(range(6), key=lambda i: means[i])
    words = row_words(pages["symmetries"], "rank-collapse-width")
    assert (
        f"Nearest to collapse: {means[lowest]:#.3g} at block {lowest}; nearest head: {0.3 * means[lowest]:#.3g}"
        in words
    )
    assert "Slope in the context length: measured with --context-lengths." in words


def test_nearness_is_measured_from_the_collapsed_value_and_not_from_zero() -> None:
    values = [Statistic(v, v - 0.02, v + 0.01, 12) for v in (0.2, 0.9, 0.5)]
    record = changed(
        record_of("symmetries"),
        2,
        measure="overlap",
        places=["block.0", "block.1", "block.2"],
        order_parameter=values,
        collapsed_value=1.0,
    )
    shown = Page(draw(record))
    words = row_words(shown, "head-channel-non-identifiability")
    assert "collapse is at 1. Nearest to collapse: 0.900 at block 1; nearest pair of heads: 0.910." in words
    assert printed(shown.cells["order-head-channel-non-identifiability-1", "distance"]["text"]) == pytest.approx(0.1)
    ((level,),) = [[r] for r in shown.rows_of("curve-head-channel-non-identifiability", "words")]
    assert (level["y"], level["words"]) == (1.0, "collapse")


@pytest.mark.parametrize("name", ["symmetries", "deep", "lengths"])
def test_each_curve_has_every_place_its_range_and_the_line_of_collapse(pages: dict[str, Page], name: str) -> None:
    for symmetry in record_of(name).symmetries:
        key = f"curve-{symmetry.phenomenon}"
        drawn = pages[name].rows_of(key, "depth", "y", "low", "high")
        points = [r for r in drawn if "line" in r]
        assert [(r["y"], r["low"], r["high"]) for r in points] == [
            (s.mean, s.min, s.max) for s in symmetry.order_parameter
        ]
        (level,) = pages[name].rows_of(key, "words")
        assert (level["y"], level["words"]) == (symmetry.collapsed_value, "collapse")
        hovered = [r["row"] for r in pages[name].rows_of(key, "row")]
        assert hovered == [f"order-{symmetry.phenomenon}-{i}" for i in range(len(symmetry.places))]
        (scale,) = {
            tuple(layer["encoding"]["y"]["scale"]["domain"])
            for layer in pages[name].spec(key)["layer"]
            if layer["mark"]["type"] == "rule" and "y" in layer["encoding"]
        }
        assert scale[0] <= symmetry.collapsed_value <= scale[1]


def test_places_are_named_as_blocks_along_the_axis(pages: dict[str, Page]) -> None:
    axis = next(
        layer["encoding"]["x"]["axis"]
        for layer in pages["deep"].spec("curve-rank-collapse-depth")["layer"]
        if "axis" in layer["encoding"].get("x", {})
    )
    names = axis["labelExpr"].removesuffix("[datum.value]")
    assert json.loads(names.replace("'", '"')) == ["in", *(str(block) for block in range(40))]
    assert axis["values"] == [0, *range(6, 41, 5)]  # readable on a phone, and no 0 beside “in”


def test_two_stacks_are_two_lines_and_cross_attention_a_third(pages: dict[str, Page]) -> None:
    shown = pages["two_stacks"]
    depth = [r for r in shown.rows_of("curve-rank-collapse-depth", "line", "y") if r["y"] is not None]
    values = [s.mean for s in record_of("two_stacks").symmetries[0].order_parameter]
    assert [(r["line"], r["depth"], r["y"]) for r in depth] == [
        *(("encoder", i, values[i]) for i in range(5)),
        *(("decoder", i, values[i]) for i in range(5, 10)),
    ]
    width = [r for r in shown.rows_of("curve-rank-collapse-width", "line", "y") if r["y"] is not None]
    places = record_of("two_stacks").symmetries[1].places
    wanted = []
    for name in places[1:]:  # the first one has no value
        block = int(name.split(".")[1])
        stack = "encoder" if block < 4 else "decoder"
        wanted.append((stack + (" cross-attention" if name.endswith("cross") else ""), block))
    assert sorted((r["line"], r["depth"]) for r in width) == sorted(wanted)
    words = row_words(shown, "rank-collapse-depth")
    assert "Encoder: from 0.950 at the embedding to 0.665 at block 3;" in words
    assert "decoder: from 0.950 at the decoder embedding to 0.332 at block 7; collapse is at 0." in words


def test_an_order_parameter_that_was_not_measured_says_why(pages: dict[str, Page]) -> None:
    shown = pages["two_stacks"]
    words = row_words(shown, "head-channel-non-identifiability")
    assert "Not measured: the projection is quantised." in words
    assert "Nearest" not in words
    assert "curve-head-channel-non-identifiability" not in shown.charts()
    cell = shown.cells["order-head-channel-non-identifiability-0", "order parameter"]
    assert cell["title"] == "the projection is quantised"
    assert shown.cells["order-rank-collapse-width-0", "order parameter"]["title"] == "not measured at block 0"


def test_places_of_an_unknown_form_or_named_twice_are_drawn_all_the_same() -> None:
    values = [Statistic(v, v, v, 1) for v in (0.9, 0.5, 0.4, 0.3)]
    places = ["a'\"b</script>", "block.1", "block.1", "elsewhere"]
    shown = Page(draw(changed(record_of("symmetries"), 0, places=places, order_parameter=values)))
    drawn = [r["y"] for r in shown.rows_of("curve-rank-collapse-depth", "line", "y")]
    assert drawn == [0.9, 0.5, 0.4, 0.3]
    assert "script" not in json.dumps(shown.spec("curve-rank-collapse-depth"))
    assert "at the a'\"b</script> to 0.300 at the elsewhere" in row_words(shown, "rank-collapse-depth")


# Findings and their symmetries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_each_finding_leads_to_its_symmetry_and_back(pages: dict[str, Page], name: str) -> None:
    record, shown = record_of(name), pages[name]
    cards = re.findall(r'<article class="finding \w+" id="(finding-\d+)">(.*?)</article>', shown.text, re.S)
    assert cards
    led = set()
    for key, markup in cards:
        code = plain(re.search(r"<code>(.*?)</code>", markup)[1])  # type: ignore[index]
        phenomenon = next(f.phenomenon for f in record.findings if f.code == code)
        assert f'href="#symmetry-{phenomenon}"' in markup
        assert f'href="#{key}"' in row_markup(shown, phenomenon)
        assert code in row_words(shown, phenomenon)
        led.add(phenomenon)
    for phenomenon in NAMES:
        assert ("No finding." in row_words(shown, phenomenon)) == (phenomenon not in led)


def test_what_is_no_number_has_no_symmetry_to_lead_to() -> None:
    lost = replace(samples.FALLING, phenomenon="numerics", code="NUMERICS-NOT-FINITE")
    shown = Page(draw(replace(record_of("symmetries"), findings=[lost])))
    card = shown.text.split('id="finding-0"')[1].split("</article>")[0]
    assert "symmetry" not in card
    assert "finding-0" not in "".join(row_markup(shown, phenomenon) for phenomenon in NAMES)
    text = printout(replace(record_of("symmetries"), findings=[lost]))
    assert "Symmetry:" not in text


def test_a_finding_on_the_page_leads_to_the_place_of_its_order_parameter(pages: dict[str, Page]) -> None:
    links = [a["href"] for a in pages["deep"].attributes("a")]
    assert "#order-rank-collapse-depth-38" in links  # block 37 stands behind the embedding and 37 others
    assert "#order-entropy-collapse-12" in links
    cross = replace(samples.SHARP_HEAD, block=6, stack="decoder", kind="cross")
    shown = Page(draw(replace(record_of("two_stacks"), findings=[cross])))
    position = record_of("two_stacks").symmetries[3].places.index("block.6.cross")
    assert f"#order-entropy-collapse-{position}" in [a["href"] for a in shown.attributes("a")]


# Tests ----------------------------------------------------------------------------------------------------------------


def test_every_test_stands_in_the_page_with_every_figure(pages: dict[str, Page]) -> None:
    shown, record = pages["symmetries"], record_of("symmetries")
    said = {
        "exact": "exact",
        "broken": "broken",
        "none": "not a symmetry",
        "untested": "cannot be tested",
    }
    assert len(record.tests) == len(OUTCOMES)
    for number, (test, outcome) in enumerate(zip(record.tests, OUTCOMES, strict=True)):
        key = f"test-{number}"
        assert shown.cells[key, "what acted"]["text"] == test.action
        assert shown.cells[key, "outcome"]["text"] == said[outcome]
        assert shown.cells[key, "what survives"]["text"] == test.surviving
        taken = ", ".join(test.without).replace("mlp", "MLP") or "nothing"
        assert shown.cells[key, "removed"]["text"] == taken
        words = words_of_test(shown, number)
        assert said[outcome] in words
        assert test.surviving in words
        if test.defect is None:
            assert shown.cells[key, "defect"]["title"] == test.unavailable["defect"]
            assert shown.cells[key, "dimension"]["title"] == test.unavailable["defect"]
            assert f"Cannot be tested: {test.unavailable['defect']}." in words
            continue
        assert test.rounding is not None
        holds(shown.cells[key, "defect"], test.defect)
        holds(shown.cells[key, "rounding"], test.rounding)
        if test.dimension is None:
            assert shown.cells[key, "dimension"]["title"] == "no dimension was counted"
        else:
            assert printed(shown.cells[key, "dimension"]["text"]) == test.dimension
    assert "12,672 dimensions" in words_of_test(shown, 5)
    assert "760,000 times the level of rounding" in words_of_test(shown, 0)  # 0.312 / 4.1e-7
    assert "Means over 16 sequences." in " ".join(shown.words.split())


def test_outcomes_follow_what_was_decided_where_the_model_ran() -> None:
    base = record_of("symmetries").tests[0]
    four = record_of("symmetries").symmetries  # whose breakers in depth are positions

    def outcome(*others: SymmetryTest, **changes: Any) -> str:
        return wording.outcomes([replace(base, **changes), *others], four)[0]

    assert outcome(holds=True) == "exact"
    assert outcome(holds=False) == "broken"
    assert outcome(holds=None, is_symmetry=False) == "none"
    assert outcome(holds=False, is_symmetry=False) == "none"
    assert outcome(holds=None) == "open"
    assert outcome(holds=None, defect=None) == "untested"
    assert outcome(holds=True, is_symmetry=False) == "exact"
    # an action that is a symmetry only once two components are away, one of which is a breaker
    free = replace(base, without=["positions", "mask"], holds=True)
    partly: dict[str, Any] = {"holds": None, "is_symmetry": False}
    assert outcome(free, **partly) == "broken"
    assert outcome(free, without=["mask"], **partly) == "broken"
    assert outcome(free, without=["positions"], **partly) == "exact"
    assert outcome(free, without=["positions"], holds=False, is_symmetry=False) == "broken"
    assert outcome(replace(free, action="another"), without=["mask"], **partly) == "none"
    assert outcome(replace(free, holds=False), without=["mask"], **partly) == "none"
    four = [replace(four[0], breakers=[])]  # neither breaks it alone: of both together nothing was decided
    assert outcome(free, **partly) == "open"
    assert outcome(free, without=["mask"], **partly) == "exact"
    without_rounding = replace(base, rounding=None, unavailable={"rounding": "no block could be moved"})
    shown = Page(draw(replace(record_of("symmetries"), tests=[without_rounding])))
    assert "rounding was not measured" in words_of_test(shown, 0)
    assert "Not measured, rounding: no block could be moved" in shown.words


def test_the_row_says_without_what_a_broken_symmetry_is_exact(pages: dict[str, Page]) -> None:
    assert "token permutation: broken, exact without positions" in row_words(pages["symmetries"], "rank-collapse-depth")
    assert "query-key gauge: cannot be tested" in row_words(pages["symmetries"], "head-channel-non-identifiability")
    base = record_of("symmetries").tests[0]

    def said(*tests: tuple[list[str], bool]) -> list[str]:
        made = [(replace(base, without=without), "exact" if holds else "broken") for without, holds in tests]
        return [words for _, words, _ in wording.in_one_line(made)]

    assert said(([], False), (["positions", "mask"], True), (["mask"], False), (["positions"], False)) == [
        "token permutation: broken, exact without positions and mask"
    ]
    assert said(([], False), (["positions", "mask"], True), (["mask"], True), (["positions"], True)) == [
        "token permutation: broken, exact without mask or without positions"
    ]
    assert said(([], False), (["mask"], False)) == ["token permutation: broken"]
    assert said(([], True), (["mask"], True)) == ["token permutation: exact"]
    assert said((["mask"], True)) == ["token permutation, without mask: exact"]


def test_defect_and_rounding_lie_on_one_logarithmic_scale(pages: dict[str, Page]) -> None:
    tests = [test for test in record_of("symmetries").tests if test.defect is not None]
    markup = pages["symmetries"].text.split('<ul class="tests">', 1)[1]
    drawn = re.findall(r'<path class="rounding" d="M([\d.]+) 1V11"/>\s*<circle class="defect" cx="([\d.]+)"', markup)
    assert len(drawn) == len(tests) == 8
    for test, (rounding, defect) in zip(tests, drawn, strict=True):
        assert test.defect is not None
        assert test.rounding is not None
        for value, at in ((test.rounding.mean, rounding), (test.defect.mean, defect)):
            wanted = 0.0 if value == 0 else 100 * (math.log10(value) + 7) / 7  # from 1e-7, the decade below, to 1
            assert float(at) == pytest.approx(wanted, abs=0.06)
    assert "from 1e-7 (left) to 1e0 (right)" in " ".join(pages["symmetries"].words.split())


def test_without_tests_there_is_no_section_about_them(pages: dict[str, Page]) -> None:
    sections = {name: [a["id"] for a in shown.attributes("section")] for name, shown in pages.items()}
    assert sections["symmetries"] == ["symmetries", "tests", "findings", "method"]
    assert sections["deep"] == ["symmetries", "tests", "width", "findings", "method"]
    assert sections["two_stacks"] == ["symmetries", "width", "findings", "method"]
    for name in RECORDS:
        linked = {a["href"] for a in pages[name].attributes("a")}
        assert {f"#{section}" for section in sections[name] if section != "symmetries"} <= linked


# The width of the context ---------------------------------------------------------------------------------------------


def signed(text: str) -> float:
    return float(text.replace("−", "-"))


@pytest.mark.parametrize("name", ["deep", "two_stacks", "lengths"])
def test_every_slope_stands_in_the_page_with_every_figure(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    fitted = record_of(name).symmetries[1].scaling
    assert fitted
    for each in fitted:
        key = "-".join(str(part) for part in ("scaling", each.stack, each.kind, each.block) if part is not None)
        assert shown.cells[key, "regime"]["text"] == each.regime
        assert each.regime in shown.words
        if each.slope is None:
            assert (shown.cells[key, "slope"]["text"], shown.cells[key, "slope"]["title"]) == ("–", each.regime)
            assert shown.cells[key, "σ₂ at n = 64"]["title"] == "not measured at this length"
            assert f"{key}-chart" not in shown.charts()
            continue
        assert signed(shown.cells[key, "slope"]["text"]) == pytest.approx(each.slope, abs=5.1e-3)
        small = shown.cells[key, "slope"]["small"]
        if each.slope_low is None:
            assert small == "no interval"
        else:
            low, high = small.strip("[]").split(", ")
            assert signed(low) == pytest.approx(each.slope_low, abs=5.1e-3)
            assert signed(high) == pytest.approx(each.slope_high, abs=5.1e-3)
            assert f"{shown.cells[key, 'slope']['text']} {small}" in shown.words  # beside the small chart
        for length, value in zip(each.context_lengths, each.second_singular_value, strict=True):
            holds(shown.cells[key, f"σ₂ at n = {length}"], value)
        points = shown.rows_of(f"{key}-chart", "n", "low")
        assert [(p["n"], p["y"], p["low"], p["high"]) for p in points] == [
            (n, s.mean, s.min, s.max) for n, s in zip(each.context_lengths, each.second_singular_value, strict=True)
        ]


def test_the_line_in_a_small_chart_is_the_least_squares_one_beside_that_of_independent_logits() -> None:
    lengths = [16, 64, 100, 400]
    values = [0.7, 0.31, 0.4, 0.2]
    slope, intercept = np.polyfit(np.log(lengths), np.log(values), 1)
    fitted = replace(
        samples.scaling(0, float(slope), "falls"),
        context_lengths=lengths,
        second_singular_value=[Statistic(v, 0.0, v, 12) for v in values],
    )
    shown = Page(draw(changed(record_of("symmetries"), 1, scaling=[fitted], slope=Statistic(slope, slope, slope, 1))))
    key = "scaling-self-0-chart"
    independent, line = [layer["data"]["name"] for layer in shown.spec(key)["layer"] if layer["mark"]["type"] == "line"]
    ends = shown.spec(key)["datasets"][line]
    assert [end["n"] for end in ends] == [16, 400]
    assert [end["y"] for end in ends] == pytest.approx([math.exp(intercept) * n**slope for n in (16, 400)])
    ends = shown.spec(key)["datasets"][independent]
    assert [end["y"] for end in ends] == pytest.approx([0.7, 0.7 / 5])  # from 16 to 400 tokens, the root of 25
    assert [point["low"] for point in shown.rows_of(key, "low")] == values  # 0 has no place on a logarithmic axis
    text = json.dumps(shown.spec(key))
    assert text.count('"type": "log"') >= 4
    assert "mean of 1 attention layer)" in row_words(shown, "rank-collapse-width")
    assert "slopes" not in shown.charts()  # one slope is no curve


def test_slopes_along_depth_lie_between_no_change_and_independent_logits(pages: dict[str, Page]) -> None:
    shown = pages["deep"]
    fitted = record_of("deep").symmetries[1].scaling
    points = shown.rows_of("slopes", "line", "y", "low", "high")
    assert [p["y"] for p in points] == [each.slope for each in fitted]
    assert (points[9]["low"], points[9]["high"]) == (fitted[9].slope, fitted[9].slope)  # no interval
    assert {row["y"] for row in shown.rows_of("slopes", "words")} == {0.0, -0.5}
    words = row_words(shown, "rank-collapse-width")
    slopes = [each.slope for each in fitted if each.slope is not None]
    mean = f"{sum(slopes) / len(slopes):.2f}".replace("-", "−")
    assert (
        f"n as n to the power {mean} (mean of 39 attention layers, from {min(slopes):.2f}".replace("from -", "from −")
        in words
    )


def test_regimes_are_counted_in_words(pages: dict[str, Page]) -> None:
    words = " ".join(pages["lengths"].words.split())
    assert f"2 attention layers: {samples.INDEPENDENT}" in words
    assert f"2 attention layers: {samples.SLOWER}" in words
    assert "1 attention layer: no slope:" in " ".join(pages["deep"].words.split())


def test_40_blocks_stay_readable(pages: dict[str, Page]) -> None:
    shown = pages["deep"]
    assert len([key for key in shown.charts() if key.startswith("scaling-")]) == 39
    assert len(shown.text.encode()) < 1_500_000


# The page of a diagnosis ----------------------------------------------------------------------------------------------


def test_a_diagnosis_shows_the_same_rows_and_says_where_defects_come_from(pages: dict[str, Page]) -> None:
    for name in ("lengths", "translation"):
        for phenomenon in NAMES:
            words = row_words(pages[name], phenomenon)
            assert "Defect: measured by `uncollapse symmetries`." in words
            assert "exact" not in words.split("Defect")[0]
    assert "scaling-table" in pages["lengths"].ids()
    assert "scaling-table" not in pages["translation"].ids()
    assert len([key for key in pages["lengths"].charts() if key.startswith("scaling-")]) == 6


# Soundness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RECORDS, "lengths"])
def test_the_page_is_as_sound_as_the_others(pages: dict[str, Page], name: str) -> None:
    well_formed_and_accessible(pages, name)
    policy_allows_own_scripts_only(pages, name)
    enough_contrast({"encoder": pages[name]})


def test_outcomes_differ_by_sign_and_not_only_by_colour(pages: dict[str, Page]) -> None:
    style = pages["symmetries"].style
    assert set(wording.SIGNS) == set(wording.OUTCOMES)
    assert len(set(wording.SIGNS.values())) == len(wording.OUTCOMES)
    for outcome, sign in wording.SIGNS.items():
        assert f'.outcome.{outcome}::before, .tested .{outcome}::before {{ content: "{sign}"; }}' in style


def test_hostile_text_stays_text_everywhere() -> None:
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"

    def spoilt(symmetry: SymmetryRecord) -> SymmetryRecord:
        return replace(
            symmetry,
            group=evil,
            measure=evil,
            places=[evil] * len(symmetry.places),
            breakers=[evil],
            stabilisers=[evil],
            scaling=[replace(each, regime=evil) for each in symmetry.scaling],
            unavailable=dict.fromkeys(("equivariance_defect", "slope", "order_parameter"), evil),
        )

    record = record_of("deep")
    record = replace(
        record,
        model=replace(record.model, name=evil, architecture=evil),
        probe=replace(record.probe, source=evil, command=evil, options={evil: evil}),
        versions={evil: evil},
        symmetries=[spoilt(symmetry) for symmetry in record.symmetries],
        tests=[
            replace(test, action=evil, surviving=evil, without=[evil], unavailable={"defect": evil})
            for test in record.tests
        ],
        findings=[replace(f, code=evil, message=evil, remedy=evil, reference=evil) for f in record.findings],
    )
    shown = Page(draw(record))
    own = [a for a, _ in shown.scripts]
    assert len([a for a in own if "type" not in a]) == 3
    assert len(own) == 3 + len(shown.charts())
    assert not shown.attributes("img")
    assert shown.words.count(evil) > 100
    for attributes, text in shown.scripts:
        if attributes.get("type") == "application/json":
            assert "<" not in text


def test_a_page_is_the_same_from_json_and_drawing_changes_nothing(pages: dict[str, Page]) -> None:
    for name in RECORDS:
        record = record_of(name)
        before = to_json(record)
        assert draw(from_json(before, SymmetriesRecord)) == pages[name].text
        show(record, Console(file=io.StringIO()))
        assert to_json(record) == before
    assert draw(from_json(to_json(record_of("lengths")), DiagnosisRecord)) == pages["lengths"].text


def test_another_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^draw: expected a record .* got uncollapse/symmetries/9\. .*`load`"):
        draw(replace(record_of("symmetries"), schema="uncollapse/symmetries/9"))


def test_a_record_with_nothing_but_a_model_still_makes_a_page() -> None:
    bare = replace(record_of("symmetries"), symmetries=[], tests=[], findings=[])
    shown = Page(draw(bare))
    assert shown.charts() == []
    assert "Nothing was judged." in shown.words
    assert "No warning" not in printout(bare)


def test_the_shipped_schema_is_the_records_own_and_real_records_fit() -> None:
    shipped = json.loads((resources.files("uncollapse") / "schemas" / "symmetries-1.json").read_text("utf-8"))
    assert shipped == json_schema(SymmetriesRecord), "run `make schema`"
    check = jsonschema.Draft202012Validator(shipped)
    for name in RECORDS:
        check.validate(json.loads(to_json(record_of(name))))
    spoilt = json.loads(to_json(record_of("symmetries")))
    spoilt["tests"][0]["holds"] = "perhaps"
    assert not check.is_valid(spoilt)


# The terminal ---------------------------------------------------------------------------------------------------------


def printout(record: SymmetriesRecord | DiagnosisRecord, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(record, Console(file=stream, width=width))
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", RECORDS)
def test_the_terminal_fits_and_hides_nothing(name: str, width: int) -> None:
    record = record_of(name)
    text = printout(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text.replace(" … ", "")
    joined = " ".join(text.split())
    for symmetry in record.symmetries:
        assert f"{NAMES[symmetry.phenomenon]}: " in joined
        assert f"Breakers: {', '.join(symmetry.breakers) or 'none'}." in joined
        assert f"Stabilisers: {', '.join(symmetry.stabilisers) or 'none'}." in joined


def test_the_terminal_has_a_row_a_test() -> None:
    text = printout(record_of("symmetries"), 100)
    lines = text.split("─\n", 1)[1].split("\n\n", 1)[0].splitlines()
    assert [line.split()[0] for line in lines] == ["≠", "=", "≠", "~", "=", "=", "–", "=", "~"]
    assert lines[1].split() == [
        "=",
        "exact",
        "token",
        "permutation,",
        "without",
        "positions",
        "4.30e-7",
        "4.10e-7",
        "–",
    ]
    assert lines[5].split()[-3:] == ["6.20e-7", "4.10e-7", "12,672"]
    joined = " ".join(text.split())
    assert "9 tests: 4 exact, 2 broken, 2 not a symmetry, 1 cannot be tested." in joined
    assert "query-key gauge: cannot be tested: the queries and keys come out of one quantised weight." in joined


def test_the_terminal_says_where_the_model_stands_and_the_slopes() -> None:
    text = " ".join(printout(record_of("symmetries")).split())
    assert (
        "Consensus distance: from 0.971 at the embedding to 0.922 at block 5; collapse is at 0. Nearest to collapse: 0.922 at "
        "block 5; nearest sequence: 0.830. Defect of the model as it is: 0.312 (0.281 … 0.343)."
    ) in text
    assert "shifting and scaling the logits ! warning ENTROPY-FROZEN (block 4, head 7)" in text
    deep = " ".join(printout(record_of("deep")).split())
    assert "1 attention layer: no slope: the second singular value could not be measured at two lengths" in deep
    assert "! warning ENTROPY-FROZEN (block 3, head 3 and 2 more)" in deep
    silent = replace(record_of("symmetries"), probe=replace(record_of("symmetries").probe, command=""))
    assert '`to_html("symmetries.html")`' in " ".join(printout(silent).split())
    asked = replace(silent, probe=replace(silent.probe, command="uncollapse symmetries demo"))
    assert "`uncollapse symmetries demo --html symmetries.html`" in " ".join(printout(asked).split())


@pytest.mark.parametrize("name", ["symmetries", "lengths"])
def test_a_finding_in_the_terminal_names_its_symmetry(name: str) -> None:
    text = " ".join(printout(record_of(name), 100).split())
    sharp = text.rindex(samples.SHARP_HEAD.remedy)
    assert text[sharp + len(samples.SHARP_HEAD.remedy) :].startswith(
        " Symmetry: shifting and scaling the logits (entropy collapse)."
    )
    heads = text.rindex(samples.AMBIGUOUS.remedy)
    assert text[heads + len(samples.AMBIGUOUS.remedy) :].startswith(
        " Symmetry: exchanging heads and mixing inside them (head-channel non-identifiability)."
    )


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    assert "token permutation, without positions" in printout(record_of("symmetries"), 100, "ascii")


def test_names_are_printed_without_markup_or_control_characters() -> None:
    record = record_of("symmetries")
    hostile = replace(record.tests[0], action="[b]z[/b] \x1b[31m")
    text = printout(replace(record, model=replace(record.model, name="[red]x\x07"), tests=[hostile]))
    assert text.startswith("[red]x\\x07\n")
    assert "[b]z[/b]" in text
    assert "\x1b" not in text


def test_the_examples_of_the_docstrings() -> None:
    done = doctest.testmod(wording)
    assert done.attempted > 5
    assert done.failed == 0
