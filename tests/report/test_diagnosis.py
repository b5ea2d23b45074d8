"""The page and the terminal table, read back and held against the record they were drawn from."""

from __future__ import annotations

import doctest
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import altair
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from uncollapse import legible
from uncollapse.errors import InputError
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import from_json, to_json
from uncollapse.report import anatomy, draw, show, wording
from uncollapse.report.comparison import wording as say_of_comparisons
from uncollapse.report.heads import wording as say_of_heads
from uncollapse.report.page import cells

QUIET = "No warning about depth (7 sites), attention (72 heads) and output projections (6 blocks)."
RECORDS = ("encoder", "quiet", "collapsed", "translation", "single_block")


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(draw(getattr(samples, name)())) for name in RECORDS}


def record_of(name: str) -> DiagnosisRecord:
    record: DiagnosisRecord = getattr(samples, name)()
    return record


LEFT_OUT_TITLES = {
    "tokens_left_out": "tokens left out",
    "consensus_distance": "consensus distance",
    "token_similarity": "token similarity",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "participation_ratio": "participation ratio",
}
HEAD_TITLES = {
    "normalized_entropy": "normalized entropy",
    "entropy": "entropy",
    "entropy_floor": "entropy floor",
    "max_logit": "largest logit",
    "rest_entropy": "entropy without the strongest key",
    "keys_within_reach": "keys within reach",
    "key_share": "share of keys used",
    "value_contraction": "value contraction",
    "susceptibility": "susceptibility",
    "contraction": "contraction",
    "spectral_gap": "spectral gap",
}


def row_id(*parts: object) -> str:
    return "-".join(str(part) for part in parts if part is not None)


@pytest.mark.parametrize("name", RECORDS)
def test_every_site_stands_in_the_page_with_every_figure(pages: dict[str, Page], name: str) -> None:
    compared = 0
    for site in record_of(name).trajectory:
        row = row_id("site", site.stack, "in" if site.block is None else site.block)
        for measure, title in SITE_TITLES.items():
            value = getattr(site, measure)
            if value is not None:
                holds(pages[name].cells[row, title], value)
                compared += 1
        for measure, title in LEFT_OUT_TITLES.items():
            if site.massive_tokens_left_out is not None:
                value = getattr(site.massive_tokens_left_out, measure)
                holds(pages[name].cells[f"{row}-left-out", title], value)
                compared += 1
    assert compared > 15


@pytest.mark.parametrize("name", RECORDS)
def test_every_head_stands_in_the_page_with_every_figure(pages: dict[str, Page], name: str) -> None:
    record = record_of(name)
    assert record.attention
    for head in record.attention:
        row = row_id("head", head.stack, head.kind, head.block, head.head)
        for measure, title in HEAD_TITLES.items():
            value = getattr(head, measure)
            if value is not None:
                holds(pages[name].cells[row, title], value)


@pytest.mark.parametrize("name", RECORDS)
def test_the_head_panel_shows_the_weights_figures_and_multiplies_by_n(pages: dict[str, Page], name: str) -> None:
    record = record_of(name)
    n = round(record.probe.tokens / record.probe.sequences)
    shown = pages[name].cells
    for heads in record.heads:
        row = row_id("block", heads.stack, heads.kind, heads.block)
        assert shown[row, "verdict"]["text"] == heads.verdict
        ambiguous = heads.ambiguous_degrees_of_freedom
        assert ambiguous is not None
        assert printed(shown[row, "ambiguous d.o.f."]["text"]) == ambiguous
        if ambiguous:
            assert printed(shown[row, "ambiguous d.o.f."]["small"].removeprefix("× n = ")) == n * ambiguous
        assert printed(shown[row, "kernel"]["text"]) == heads.kernel_dimension
        assert printed(shown[row, "gauge dimension"]["text"]) == heads.gauge_dimension
        assert printed(shown[row, "rank W_O"]["text"]) == heads.output_projection_rank
        if heads.condition_number is not None:
            assert float(shown[row, "condition"]["v"]) == pytest.approx(heads.condition_number, rel=1e-5)
        if heads.write_space_overlap is not None and heads.heads > 1:
            matrix = heads.write_space_overlap
            best = (-1.0, 0, 0)
            for g in range(heads.heads):
                for h in range(g + 1, heads.heads):
                    best = max(best, (matrix[g][h], g, h))
            assert float(shown[row, "largest overlap"]["v"]) == pytest.approx(best[0], rel=1e-5)
            assert shown[row, "largest overlap"]["small"] == f"heads {best[1]} and {best[2]}"
            for head in range(heads.heads):
                each = row_id("share", heads.stack, heads.kind, heads.block, head)
                others = [matrix[head][other] for other in range(heads.heads) if other != head]
                assert float(shown[each, "largest overlap"]["v"]) == pytest.approx(max(others), rel=1e-5)
                assert matrix[head][int(shown[each, "largest overlap"]["small"].removeprefix("head "))] == max(others)
                assert heads.energy_share is not None
                assert heads.energy_share[head] is not None
                holds(shown[each, "energy share"], heads.energy_share[head])  # type: ignore[arg-type]


def test_norms_updates_and_symmetries_show_their_figures(pages: dict[str, Page]) -> None:
    record, shown = record_of("translation"), pages["translation"].cells
    for index, norm in enumerate(record.norms):
        assert norm.affine_rank_before is not None
        assert norm.affine_rank_after is not None
        assert norm.brackets is not None
        row = f"norm-{index}"
        holds(shown[row, "before"], norm.affine_rank_before)
        holds(shown[row, "after"], norm.affine_rank_after)
        change = printed(shown[row, "change"]["text"])
        gained, lost, also = (printed(shown[row, t]["text"]) for t in ("gained", "lost", "lost#1"))
        assert change == norm.affine_rank_after.mean - norm.affine_rank_before.mean == gained - lost - also
        assert shown[row, "norm"]["text"] == norm.norm
    for update in record.updates:
        row = row_id("update", update.stack, update.kind, update.block, update.sublayer)
        assert update.out_of_span_energy is not None
        assert update.null_out_of_span_energy is not None
        holds(shown[row, "out-of-span energy"], update.out_of_span_energy)
        holds(shown[row, "null value"], update.null_out_of_span_energy)
    assert len(record.symmetries) == 4
    for symmetry in record.symmetries:
        for position, value in enumerate(symmetry.order_parameter):
            row = f"order-{symmetry.phenomenon}-{position}"
            assert value is not None
            holds(shown[row, "order parameter"], value)
            assert printed(shown[row, "distance"]["text"]) == pytest.approx(value.mean, rel=5.1e-3)


@pytest.mark.parametrize("name", RECORDS)
def test_only_panels_with_something_to_show_are_there(pages: dict[str, Page], name: str) -> None:
    record = record_of(name)
    sections = [attributes["id"] for attributes in pages[name].attributes("section")]
    wanted = ["anatomy", "findings", "depth", "attention", "heads"]
    wanted += [panel for panel in ("norms", "updates", "symmetries") if getattr(record, panel)]
    assert sections == [*wanted, "method"]
    linked = [a["href"] for a in pages[name].attributes("a") if a["href"].removeprefix("#") in sections]
    assert {f"#{section}" for section in sections} <= set(linked)


def test_a_record_with_nothing_but_a_model_still_makes_a_page() -> None:
    bare = replace(samples.quiet(), trajectory=[], attention=[], heads=[], findings=[])
    shown = Page(draw(bare))
    assert [attributes["id"] for attributes in shown.attributes("section")] == [
        "anatomy",
        "findings",
        "depth",
        "method",
    ]
    assert shown.charts() == []


def test_a_trajectory_of_nothing_but_absent_values_says_why() -> None:
    nothing = dict.fromkeys(SITE_TITLES)
    sites = [
        replace(site, **nothing, massive_tokens_left_out=None, not_finite=64, unavailable=dict.fromkeys(nothing, "NaN"))  # type: ignore[arg-type]
        for site in samples.encoder().trajectory
    ]
    shown = Page(draw(replace(samples.encoder(), trajectory=sites)))
    assert not [key for key in shown.charts() if key.startswith("depth")]
    assert "Not measured, rank, attainable rank, affine rank" in shown.words
    assert shown.cells["site-3", "sequences with NaN or infinity"]["text"] == "64"
    assert "consensus distance goes from" not in shown.words


def test_absent_values_are_a_dash_with_the_reason_in_tooltip_and_footnote(pages: dict[str, Page]) -> None:
    shown = pages["translation"]
    cell = shown.cells["head-decoder-cross-6-5", "normalized entropy"]
    assert (cell["text"], cell["title"], cell["v"]) == ("–", "one allowed key in every row", "")
    assert cell["sup"] == "1"
    assert "1 normalized entropy, entropy: one allowed key in every row" in shown.words
    assert shown.cells["site-decoder-5", "effective rank"]["title"] == "one sequence held NaN"
    assert "Not measured, susceptibility, contraction, spectral gap: measured at --level full only" in (
        pages["encoder"].words
    )
    assert "susceptibility" not in pages["encoder"].titles["attention-self-table"]
    assert "susceptibility" in shown.titles["attention-encoder-self-table"]


def test_each_reason_has_its_own_footnote() -> None:
    record = samples.encoder()
    first, second, *rest = record.attention
    gone = {"entropy": None, "unavailable": {**first.unavailable, "entropy": "a sink"}}
    also = {"max_logit": None, "unavailable": {**second.unavailable, "max_logit": "too long"}}
    changed = [replace(first, **gone), replace(second, **also), *rest]  # type: ignore[arg-type]
    read = Page(draw(replace(record, attention=changed)))
    assert (read.cells["head-self-0-0", "entropy"]["sup"], read.cells["head-self-0-1", "largest logit"]["sup"]) == (
        "1",
        "2",
    )
    assert "1 entropy: a sink" in read.words
    assert "2 largest logit: too long" in read.words


def test_the_summary_says_where_the_extremes_are(pages: dict[str, Page]) -> None:
    words = " ".join(pages["encoder"].words.split())
    assert "1 warning, 1 finding for information." in words
    assert (
        "The consensus distance goes from 0.971 at the embedding to 0.879 at block 5 (healthy: 0.31 … 0.98). "
        "The lowest sequence has 0.774, at block 5." in words
    )
    assert "The affine rank is as high as attainable at every site." in words
    highest = max(samples.encoder().attention, key=lambda a: a.normalized_entropy.mean if a.normalized_entropy else 0)
    assert f"ranges from 0.0310 at block 4, head 7 to {highest.normalized_entropy.mean:.3f} at " in words  # type: ignore[union-attr]
    assert f"at block {highest.block}, head {highest.head} (healthy: " in words
    assert "“attributable”: blocks 0–4." in words
    fallen = " ".join(pages["collapsed"].words.split())
    assert "1 critical finding, 1 warning, 1 finding for information." in fallen
    assert "The affine rank falls to 0 % of the attainable at block 5." in fallen
    assert QUIET in " ".join(pages["quiet"].words.split())


def test_findings_come_worst_first_and_lead_to_their_row(pages: dict[str, Page]) -> None:
    shown = pages["collapsed"]
    articles = [a["class"] for a in shown.attributes("article")]
    assert articles == ["finding critical", "finding warning", "finding info"]
    links = [a["href"] for a in shown.attributes("a")]
    assert "#site-3" in links
    assert "#head-self-4-7" in links
    marked = {a["id"]: a["class"] for a in shown.attributes("tr") if "class" in a}
    assert marked == {"site-3": "critical", "head-self-4-7": "warning"}


def test_many_findings_of_one_rule_share_a_card_and_a_remedy() -> None:
    many = [replace(samples.SHARP_HEAD, head=head, message=f"Message {head}.", value=head / 100) for head in range(6)]
    record = replace(samples.encoder(), findings=[samples.AMBIGUOUS, *many])
    read = Page(draw(record))
    assert [a["class"] for a in read.attributes("article")] == ["finding warning", "finding info"]
    words = " ".join(read.words.split())
    assert "6 places" in words
    for head in range(6):
        assert f"block 4, head {head}: Message {head}. measured {wording.number(head / 100, 4)}" in words
        assert f"#head-self-4-{head}" in [a["href"] for a in read.attributes("a")]
    assert words.count(samples.SHARP_HEAD.remedy) == 1
    assert words.count("threshold 0.05") == 1
    text = " ".join(shown(record, 100).split())
    assert text.count(samples.SHARP_HEAD.remedy) == 1
    assert "Message 2. The same at 3 more places: block 4 (heads 3–5). Remedy:" in text


def test_verdicts_that_differ_in_a_figure_are_summed_up_by_their_words() -> None:
    record = samples.encoder()
    heads = [replace(h, verdict=f"attributable with care (noise gain {h.block})") for h in record.heads]
    read = Page(draw(replace(record, heads=heads)))
    assert "Head verdict “attributable with care”: blocks 0–5." in read.words
    assert read.cells["block-self-3", "verdict"]["text"] == "attributable with care (noise gain 3)"
    assert rows(shown(replace(record, heads=heads), 120))["3"].rstrip().endswith("attributable with care")


def test_a_finding_without_a_block_is_about_the_embedding_or_the_whole_model() -> None:
    lost = replace(samples.FALLING, block=None)
    shown = Page(draw(replace(samples.encoder(), findings=[lost, samples.AMBIGUOUS])))
    assert "#site-in" in [a["href"] for a in shown.attributes("a")]
    assert "the whole model" in shown.words


def test_the_map_marks_the_heads_that_findings_name_and_no_other(pages: dict[str, Page]) -> None:
    cells_drawn = pages["encoder"].rows_of("attention-self", "value", "row")
    record = record_of("encoder")
    values = {(c["block"], c["head"]): c["value"] for c in cells_drawn}
    wanted = {(a.block, a.head): a.normalized_entropy.mean for a in record.attention if a.normalized_entropy}
    assert values == wanted
    assert len(cells_drawn) == len(record.attention) + 1  # every head once, and the marked one again
    assert [c["row"] for c in cells_drawn].count("head-self-4-7") == 2
    overlap = replace(samples.SHARP_HEAD, phenomenon="head-channel-non-identifiability", block=1, head=2)
    other = Page(draw(replace(record, findings=[overlap])))
    assert len(other.rows_of("attention-self", "value", "row")) == len(record.attention)
    assert "block-self-1" in {a["id"] for a in other.attributes("tr") if "class" in a}


def test_zero_is_drawn_at_the_floor_of_the_logarithmic_axis_and_printed_as_zero(pages: dict[str, Page]) -> None:
    drawn = pages["collapsed"].rows_of("depth-consensus-distance", "depth", "line", "y")
    assert [row["y"] for row in drawn] == [0.97, 0.68, 0.23, 1.6e-2, 2.9e-3, 5.5e-6, 1e-17]
    assert pages["collapsed"].cells["site-5", "consensus distance"]["text"] == "0"
    text = json.dumps(pages["collapsed"].spec("depth-consensus-distance"))
    assert '"type": "log"' in text
    assert '"domain": [1e-17, 1.0]' in text
    assert '"domain": [0.1, 1.0]' in json.dumps(pages["encoder"].spec("depth-consensus-distance"))


def test_the_site_a_finding_names_is_ringed(pages: dict[str, Page]) -> None:
    def rings(name: str) -> list[dict[str, Any]]:
        drawn = pages[name].rows_of("depth-consensus-distance", "depth", "y")
        return [row for row in drawn if set(row) == {"depth", "y"}]

    assert rings("collapsed") == [{"depth": 4, "y": 2.9e-3}]
    assert rings("encoder") == []


def test_massive_tokens_get_a_dashed_line_where_they_change_the_figure(pages: dict[str, Page]) -> None:
    both = pages["encoder"].rows_of("depth-consensus-distance", "depth", "line", "y")
    lines = {row["line"] for row in both}
    assert lines == {"all tokens", "largest-norm tokens left out"}
    record = record_of("encoder")
    rest = [row["y"] for row in both if row["line"] == "largest-norm tokens left out"]
    assert rest == [s.massive_tokens_left_out.consensus_distance.mean for s in record.trajectory]  # type: ignore[union-attr]
    assert "largest-norm tokens left out" in pages["encoder"].words
    alike = [
        replace(
            site,
            massive_tokens_left_out=replace(
                site.massive_tokens_left_out,
                consensus_distance=site.consensus_distance,
                token_similarity=site.token_similarity,
            ),
        )
        for site in record.trajectory
    ]
    same = Page(draw(replace(record, trajectory=alike)))
    assert {r["line"] for r in same.rows_of("depth-consensus-distance", "line")} == {"consensus distance"}


def test_ranks_are_drawn_over_the_attainable(pages: dict[str, Page]) -> None:
    record = record_of("translation")
    decoder = [site for site in record.trajectory if site.stack == "decoder"]
    rows = pages["translation"].rows_of("depth-decoder-ranks", "depth", "y")
    attainable = [row["y"] for row in rows if "line" not in row]
    assert attainable == [site.attainable_rank.mean for site in decoder]  # type: ignore[union-attr]
    effective = [row["y"] for row in rows if row.get("line") == "effective rank"]
    assert effective == [site.effective_rank and site.effective_rank.mean for site in decoder]
    assert None in effective


def test_the_chosen_blocks_carry_their_overlaps_and_shares(pages: dict[str, Page]) -> None:
    record = record_of("translation")
    chosen = next(json.loads(text) for a, text in pages["translation"].scripts if a.get("id") == "chosen-blocks")
    assert len(chosen) == len(record.heads) == len(pages["translation"].attributes("option"))
    for data, heads in zip(chosen, record.heads, strict=True):
        if heads.write_space_overlap is None:
            assert data["overlap"] == data["energy"] == []
            continue
        flat = [v for row in data["overlap"] for v in row]
        true = [v for row in heads.write_space_overlap for v in row]
        assert max(abs(v / 1000 - t) for v, t in zip(flat, true, strict=True)) <= 0.0005 + 1e-12
        assert data["energy"] == [[s.mean, s.min, s.max] for s in heads.energy_share or [] if s is not None]


@pytest.mark.parametrize("name", RECORDS)
def test_every_panel_says_what_good_looks_like(pages: dict[str, Page], name: str) -> None:
    text = pages[name].text
    sections = text.split("<section ")[1:]
    for section in sections:
        good = re.findall(r'<p class="good"><b>Good looks like:</b> (.*?)</p>', section)
        assert len(good) == 1
        assert good[0].endswith(".")


def test_hostile_text_stays_text_everywhere() -> None:
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"
    record = samples.translation()
    record = replace(
        record,
        model=replace(record.model, name=evil, revision=evil, architecture=evil, dtype=evil, attention_backend=evil),
        probe=replace(record.probe, source=evil, command=evil, options={evil: [evil], "text": evil}),
        versions={evil: evil},
        trajectory=[replace(s, effective_rank=None, unavailable={"effective_rank": evil}) for s in record.trajectory],
        attention=[replace(a, route=evil) for a in record.attention],
        heads=[replace(h, verdict=evil) for h in record.heads],
        norms=[replace(n, norm=evil) for n in record.norms],
        symmetries=[
            replace(s, group=evil, measure=evil, breakers=[evil], stabilisers=[evil]) for s in record.symmetries
        ],
        findings=[replace(f, code=evil, message=evil, remedy=evil, reference=evil) for f in record.findings],
    )
    shown = Page(draw(record))
    plain = Page(draw(samples.translation()))
    assert [tag for tag, _ in shown.elements].count("script") == [tag for tag, _ in plain.elements].count("script")
    assert "alert(1)" not in "".join(text for _, text in shown.scripts).replace("\\u003c", "<").replace(evil, "")
    assert not shown.attributes("img")
    assert shown.words.count(evil) >= 12
    for attributes, text in shown.scripts:
        if attributes.get("type") == "application/json":
            assert "<" not in text


def test_a_small_page_is_small(pages: dict[str, Page]) -> None:
    for shown in pages.values():
        assert len(shown.text.encode()) < 1_500_000


def test_a_page_is_the_same_each_time_and_from_json(pages: dict[str, Page]) -> None:
    record = record_of("translation")
    assert draw(record) == pages["translation"].text
    assert draw(from_json(to_json(record), DiagnosisRecord)) == pages["translation"].text


def test_a_theme_of_the_session_does_not_leak_into_the_page(pages: dict[str, Page]) -> None:
    with altair.theme.enable("dark"):
        same = draw(record_of("encoder")) == pages["encoder"].text
    assert same


def test_method_names_versions_command_options_and_seed(pages: dict[str, Page]) -> None:
    text = pages["encoder"].text
    record = record_of("encoder")
    assert f"<pre><code>{record.probe.command}</code></pre>" in text
    for name, value in {**record.versions, "batch_size": "8", "fail_on": "null", "seed": "0"}.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in text


def test_another_record_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^draw: expected a record .* got uncollapse/diagnosis/9\. .*`load`"):
        draw(replace(samples.encoder(), schema="uncollapse/diagnosis/9"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"got dict\."):
        draw({})  # type: ignore[arg-type]


def test_importing_the_package_draws_nothing_in() -> None:
    code = (
        "import sys, uncollapse, uncollapse.report; "
        "print(sorted({'altair', 'vl_convert', 'narwhals'} & set(sys.modules)), 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


# The terminal ---------------------------------------------------------------------------------------------------------


def shown(record: DiagnosisRecord, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    show(record, Console(file=stream, width=width, **options))
    return stream.getvalue()


def rows(text: str) -> dict[str, str]:
    """The lines of the table by their first word or two."""
    lines = text.split("─\n", 1)[1].split("\n\nMeans", 1)[0].split("\n\nOne seq", 1)[0].splitlines()
    return {re.match(r"((enc |dec )?(in|\d+))", line)[1]: line for line in lines if line.strip()}  # type: ignore[index]


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", [*RECORDS, "large"])
def test_the_terminal_table_has_one_row_a_site_and_fits(name: str, width: int) -> None:
    record = record_of(name)
    text = shown(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text
    stacks = {"encoder": "enc ", "decoder": "dec ", None: ""}
    names = [stacks[s.stack] + ("in" if s.block is None else str(s.block)) for s in record.trajectory]
    assert list(rows(text)) == names


def test_the_terminal_names_the_worst_beside_every_mean() -> None:
    record = record_of("encoder")
    table = rows(shown(record, 120))
    for site in record.trajectory[1:]:
        line = table[str(site.block)]
        heads = [a for a in record.attention if a.block == site.block]
        lowest = heads[0]
        total = 0.0
        for head in heads:
            total += head.normalized_entropy.mean  # type: ignore[union-attr]
            if head.normalized_entropy.mean < lowest.normalized_entropy.mean:  # type: ignore[union-attr]
                lowest = head
        assert f"{lowest.normalized_entropy.mean:#.3g} h{lowest.head}" in line  # type: ignore[union-attr]
        assert f" {total / len(heads):#.3g} " in line
        for value in (site.consensus_distance.mean, site.consensus_distance.min):  # type: ignore[union-attr]
            assert f" {value:#.3g} " in line
        for value in (site.token_similarity.mean, site.token_similarity.max):  # type: ignore[union-attr]
            assert f" {value:.3f} " in line
        assert " 43/43 " in line
        assert " 42/42 " in line
    assert table["4"].startswith("4 ! ")
    assert table["5"].rstrip().endswith("attributable with care")


def test_cross_attention_is_named_in_the_terminal() -> None:
    record = record_of("translation")
    block = [a for a in record.attention if a.block == 6 and a.normalized_entropy is not None]
    lowest = min(block, key=lambda a: a.normalized_entropy.mean)  # type: ignore[union-attr]
    assert lowest.kind == "cross"
    assert f"h{lowest.head} cross" in rows(shown(record, 120))["dec 6"]


def test_what_does_not_fit_is_named_and_the_verdicts_are_said_below() -> None:
    narrow, wide = shown(record_of("translation"), 80), shown(record_of("translation"), 120)
    assert "Hidden because the terminal is only 80 columns wide: similarity." in narrow
    assert "Hidden because" not in wide
    assert "Head verdict “attributable”: encoder blocks 0–3; decoder blocks 4–7;" in narrow
    assert "Head verdict" not in wide
    assert "head verdict" in wide


def test_findings_are_printed_worst_first_with_their_remedy() -> None:
    text = " ".join(shown(record_of("collapsed"), 100).split())
    wanted = [
        "1 critical finding, 1 warning, 1 finding for information.",
        f"!! critical consensus-falls (block 3) {samples.FALLING.message} Remedy: {samples.FALLING.remedy}",
        f"! warning sharp-head (block 4, head 7) {samples.SHARP_HEAD.message} Remedy: {samples.SHARP_HEAD.remedy}",
        f"i info heads-ambiguous (the whole model) {samples.AMBIGUOUS.message} Remedy: {samples.AMBIGUOUS.remedy}",
        "Look next at block 3 (consensus-falls); the page shows every head, with charts.",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)


def test_without_findings_the_terminal_says_so_and_where_to_look_next() -> None:
    record = record_of("quiet")
    text = " ".join(shown(record).split())
    assert QUIET in text
    assert text.endswith("`--level full` adds contraction and spectral gaps; the page shows every head, with charts.")
    silent = replace(record, probe=replace(record.probe, command="uncollapse diagnose demo", level="full"))
    assert "Look next: `uncollapse diagnose demo --html report.html` shows every head" in " ".join(
        shown(silent).split()
    )
    called = replace(record, probe=replace(record.probe, command=""))
    assert '`to_html("report.html")` shows every head' in " ".join(shown(called).split())


def test_one_sequence_has_no_worst_sequence() -> None:
    assert "worst" not in shown(record_of("single_block"), 120)


def test_names_are_printed_as_they_are_without_markup_and_control_characters_spelled_out() -> None:
    record = replace(
        samples.encoder("[red]x[/red] \x1b[31my\x07"), findings=[replace(samples.SHARP_HEAD, message="[b]z")]
    )
    text = shown(record)
    assert text.startswith(r"[red]x[/red] \x1b[31my\x07" + "\n")
    assert "   [b]z\n" in text
    assert "\x1b[1;33m! " in shown(samples.encoder(), force_terminal=True, color_system="standard")


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(samples.translation(), Console(file=stream, width=100))
    stream.seek(0)
    assert "dec 6" in stream.read()


# Wording --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [wording, cells, anatomy, legible, say_of_comparisons, say_of_heads])
def test_the_examples_of_the_docstrings(module: Any) -> None:
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


@given(st.floats(min_value=1e-300, max_value=1e12) | st.floats(min_value=-1e12, max_value=-1e-300))
def test_a_printed_number_is_the_number_to_three_digits(value: float) -> None:
    text = wording.number(value)
    assert printed(text) == pytest.approx(value, rel=5.0001e-3)
    assert len(text) <= 15


@given(st.floats(min_value=0, max_value=1))
def test_a_percentage_is_100_only_for_the_whole(share: float) -> None:
    assert (wording.percent(share) == "100 %") == (share == 1.0)


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_is_well_formed_and_accessible(pages: dict[str, Page], name: str) -> None:
    well_formed_and_accessible(pages, name)


@pytest.mark.parametrize("name", RECORDS)
def test_the_policy_allows_the_pages_own_scripts_and_nothing_else(pages: dict[str, Page], name: str) -> None:
    policy_allows_own_scripts_only(pages, name)


def test_light_and_dark_have_enough_contrast(pages: dict[str, Page]) -> None:
    enough_contrast(pages)
