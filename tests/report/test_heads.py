"""The page and the terminal form of the heads' identifiability, read back and held against the record they were drawn from."""

from __future__ import annotations

import doctest
import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from tests.helpers import heads_samples as samples
from tests.helpers.pages import Page, enough_contrast, holds, policy_allows_own_scripts_only, printed
from uncollapse.errors import InputError
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.encoding import from_json, to_json
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import draw, show
from uncollapse.report.heads import tables, wording
from uncollapse.report.wording import number

RECORDS = ("mixed", "healthy", "forced", "single", "crossed", "deep")


@pytest.fixture(scope="module")
def records() -> dict[str, IdentifiabilityRecord]:
    return {name: getattr(samples, name)() for name in RECORDS}


@pytest.fixture(scope="module")
def pages(records: dict[str, IdentifiabilityRecord]) -> dict[str, Page]:
    return {name: Page(draw(record)) for name, record in records.items()}


def short(verdict: str) -> str:
    return verdict.split(" (")[0]


def key(record: HeadsRecord) -> str:
    return "-".join(str(part) for part in (record.stack, record.kind, record.block) if part is not None)


# The answer -------------------------------------------------------------------------------------------------------------

HEADLINES = {
    "mixed": "Yes in block 0, with care in block 1, not in block 2.",
    "healthy": "Yes: in every block a result can be attributed to single heads.",
    "forced": "No: in every block some of what the heads write cannot be told apart.",
    "single": "Yes: in the only block a result can be attributed to single heads.",
    "crossed": "Yes in encoder blocks 0–1; decoder blocks 2–3; decoder block 3 (cross); unknown in decoder block 2 (cross).",
    "deep": "With care in every block",
}


@pytest.mark.parametrize("name", [n for n in RECORDS if n != "deep"])
def test_the_answer_comes_first(records: dict[str, IdentifiabilityRecord], pages: dict[str, Page], name: str) -> None:
    assert wording.headline(records[name]) == HEADLINES[name]
    words = pages[name].words
    assert (
        words.index(wording.FIRST)
        < words.index(HEADLINES[name])
        < words.index("What to do.")
        < words.index("Who sees what, and what stays")
    )


def test_with_care_everywhere_is_a_yes_with_a_reserve(records: dict[str, IdentifiabilityRecord]) -> None:
    record = records["deep"]
    careful = replace(record, heads=[h for h in record.heads if h.condition_number and h.condition_number > 10])
    assert wording.headline(careful).startswith("Yes, with care: in every block the heads can be told apart")
    nothing = replace(record, heads=[replace(record.heads[0], verdict=None)])
    assert wording.headline(nothing) == "Unknown: no output projection could be read."


def test_each_verdict_has_its_blocks_its_reason_and_what_to_do(records: dict[str, IdentifiabilityRecord]) -> None:
    yes, care, no = wording.answers(records["mixed"])
    assert [(a.verdict, a.where, a.sign) for a in (yes, care, no)] == [
        ("attributable", "block 0", "✓"),
        ("attributable with care", "block 1", "!"),
        ("not attributable", "block 2", "✗"),
    ]
    gain = records["mixed"].heads[1].condition_number
    assert gain is not None
    random = records["mixed"].heads[1].random_noise_gain
    assert random is not None
    assert care.why == f"Relative noise gain {gain:#.3g}, as random ({wording.random_range(random)})."
    assert no.why == "Per token, the output projection loses 4 of the dimensions that its heads write."
    assert len({a.remedy for a in (yes, care, no)}) == 3
    (only,) = wording.answers(records["healthy"])
    gains = [h.condition_number for h in records["healthy"].heads if h.condition_number is not None]
    assert only.why.startswith(f"Relative noise gain {min(gains):#.3g} to {max(gains):#.3g}, ")


def test_dependence_without_a_kernel_is_said_as_such(records: dict[str, IdentifiabilityRecord]) -> None:
    dependent = replace(
        records["mixed"].heads[2],
        kernel_dimension=0,
        verdict="not attributable (write spaces dependent to within rounding)",
    )
    (no,) = wording.answers(replace(records["mixed"], heads=[dependent]))
    assert no.why == "Other heads can write what some heads write, up to rounding."


def test_single_heads_are_counted_where_they_differ(records: dict[str, IdentifiabilityRecord]) -> None:
    record = records["mixed"]
    verdicts = [short(v) for h in record.heads for v in h.head_verdict or []]
    yes, care, no = (verdicts.count(v) for v in ("attributable", "attributable with care", "not attributable"))
    assert (yes + care + no, no) == (24, 2)
    first, some, scale = wording.heads_sentences(record)
    assert first == (
        f"Head by head, of 24 heads: {yes} attributable, {care} attributable with care, {no} not attributable."
    )
    assert some.startswith("In block 2 some heads can be told from the rest")
    gain = record.heads[1].absolute_noise_gain
    assert gain is not None
    assert f"an error of {gain * 2**-24:.1e}".replace("e-0", "e-") in scale
    assert scale.endswith("(block 1).")
    assert wording.heads_sentences(records["healthy"]) == []


def test_what_the_shape_forces_is_said(records: dict[str, IdentifiabilityRecord]) -> None:
    (sentence,) = wording.heads_sentences(records["forced"])
    assert sentence == (
        "In blocks 0–3 the heads together are wider (64) than the stream (32), so there is a kernel "
        "whatever the weights are."
    )


def test_rounding_of_a_half_precision_model_is_put_in_percent(records: dict[str, IdentifiabilityRecord]) -> None:
    record = records["mixed"]
    half = replace(record, model=replace(record.model, dtype="bfloat16"))
    gain = record.heads[1].absolute_noise_gain
    assert gain is not None
    assert f"an error of {100 * gain / 256:.1f} % of that output’s size" in wording.rounding_sentence(half)
    assert wording.rounding_sentence(replace(record, model=replace(record.model, dtype="int8"))) == ""


def test_what_was_not_read_says_why(pages: dict[str, Page]) -> None:
    assert (
        "No verdict for decoder block 2 (cross): the output projection is not an affine map." in pages["crossed"].words
    )
    row = pages["crossed"].cells["block-decoder-cross-2", "verdict"]
    assert (row["text"], row["title"]) == ("–", samples.NO_MATRIX)


# Who sees what ----------------------------------------------------------------------------------------------------------


def test_the_observers_have_this_models_figures(records: dict[str, IdentifiabilityRecord]) -> None:
    here = [each.here for each in wording.observers(records["forced"])]
    one = records["forced"].heads[0]
    assert (one.ambiguous_degrees_of_freedom, one.kernel_dimension, one.contribution_ambiguity) == (48, 32, 32)
    assert here == [
        "48 per token",
        "32 per token",
        "32 per token",
        f"{one.factorization_ambiguity:,} in total",
        f"{one.gauge_dimension:,} in total",
    ]
    assert wording.observers(records["forced"])[3].formula.endswith("n = 57")


def test_figures_that_differ_name_their_blocks(records: dict[str, IdentifiabilityRecord]) -> None:
    kernels = wording.observers(records["mixed"])[1].here
    assert kernels == "0 in blocks 0–1; 4 in block 2 (per token)"
    unknown = wording.observers(records["crossed"])[1].here
    assert unknown == (
        "0 in encoder blocks 0–1; decoder blocks 2–3; decoder block 3 (cross); "
        "not known in decoder block 2 (cross) (per token)"
    )
    many = replace(records["deep"], heads=[replace(h, kernel_dimension=h.block) for h in records["deep"].heads])
    assert wording.observers(many)[1].here == "0 to 29 per token"
    gone = [replace(h, gauge_dimension=None) for h in records["deep"].heads]
    assert wording.observers(replace(records["deep"], heads=gone))[4].here == "not known here"


def test_the_five_observers_stand_in_the_page(
    records: dict[str, IdentifiabilityRecord], pages: dict[str, Page]
) -> None:
    for name in RECORDS:
        words = " ".join(pages[name].words.split())
        for each in wording.observers(records[name]):
            assert f"{each.who} cannot know: {each.open} {each.here} {each.formula}" in words


# The tables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDS)
def test_every_block_stands_in_the_table(
    records: dict[str, IdentifiabilityRecord], pages: dict[str, Page], name: str
) -> None:
    cells = pages[name].cells
    for heads in records[name].heads:
        row = f"block-{key(heads)}"
        if heads.verdict is None:
            continue
        assert cells[row, "verdict"]["text"] == short(heads.verdict)
        assert printed(cells[row, "rank W_O"]["text"]) == heads.output_projection_rank
        assert printed(cells[row, "kernel"]["text"]) == heads.kernel_dimension
        assert printed(cells[row, "shared"]["text"]) == heads.contribution_ambiguity
        gain = cells[row, "relative noise gain"]
        absolute = cells[row, "absolute noise gain"]["text"]
        if heads.condition_number is None:
            assert (gain["text"], float(gain["v"])) == ("∞", 1e300)
            assert absolute == "∞"
        else:
            assert printed(absolute) == pytest.approx(heads.absolute_noise_gain, rel=5.1e-3)
            assert heads.random_noise_gain is not None
            beside = wording.beside_random(heads.condition_number, heads.random_noise_gain)
            assert gain.get("small", "") == (beside if heads.heads > 1 else "")
            assert cells[row, "random weights"]["text"] == wording.random_range(heads.random_noise_gain)
            assert printed(gain["text"]) == pytest.approx(heads.condition_number, rel=5.1e-3)
        assert heads.head_verdict is not None
        yes = sum(short(v) == "attributable" for v in heads.head_verdict)
        assert cells[row, "heads attributable"]["text"] == f"{yes} of {heads.heads}"
        if heads.heads < 2:
            assert (row, "largest overlap") not in cells
            continue
        assert heads.write_space_overlap is not None
        assert heads.smallest_principal_angle is not None
        pairs = [(g, h) for h in range(heads.heads) for g in range(h)]
        largest = max(heads.write_space_overlap[g][h] for g, h in pairs)
        assert printed(cells[row, "largest overlap"]["text"]) == pytest.approx(largest, rel=5.1e-3)
        one, other = (int(w) for w in cells[row, "largest overlap"]["small"].split() if w.isdigit())
        assert heads.write_space_overlap[one][other] == pytest.approx(largest)
        angles = [a for g, h in pairs if (a := heads.smallest_principal_angle[g][h]) is not None]
        shown = printed(cells[row, "smallest angle"]["text"])
        assert shown == pytest.approx(math.degrees(min(angles)), rel=5.1e-3, abs=1e-9)


@pytest.mark.parametrize("name", RECORDS)
def test_every_head_stands_in_the_table(
    records: dict[str, IdentifiabilityRecord], pages: dict[str, Page], name: str
) -> None:
    cells, compared = pages[name].cells, 0
    for heads in records[name].heads:
        for head in range(heads.heads):
            row = f"one-{key(heads)}-{head}"
            if heads.head_verdict is None or heads.head_noise_gain is None:
                assert cells[row, "verdict"]["title"] == samples.NO_MATRIX
                continue
            assert cells[row, "verdict"]["text"] == short(heads.head_verdict[head])
            gain = heads.head_noise_gain[head]
            assert (cells[row, "noise gain"]["text"] == "∞") == (gain is None)
            if gain is not None:
                assert printed(cells[row, "noise gain"]["text"]) == pytest.approx(gain, rel=5.1e-3)
            assert heads.energy_share is not None
            share = heads.energy_share[head]
            assert share is not None
            holds(cells[row, "energy share"], share)
            compared += 1
            if heads.heads < 2:
                continue
            assert heads.write_space_overlap is not None
            others = [v for h, v in enumerate(heads.write_space_overlap[head]) if h != head]
            assert printed(cells[row, "largest overlap"]["text"]) == pytest.approx(max(others), rel=5.1e-3)
    assert compared == sum(h.heads for h in records[name].heads if h.verdict is not None)


def test_a_silent_head_has_no_angle_and_says_why(pages: dict[str, Page]) -> None:
    cells = pages["crossed"].cells
    assert cells["one-decoder-cross-3-2", "smallest angle"]["title"] == "a head writes nothing"
    assert printed(cells["one-decoder-cross-3-1", "smallest angle"]["text"]) > 1


def test_copies_name_each_other_and_their_finding_leads_to_the_block(pages: dict[str, Page]) -> None:
    cells = pages["mixed"].cells
    assert cells["one-self-2-3", "largest overlap"]["small"] == "head 7"
    assert cells["one-self-2-7", "smallest angle"]["small"] == "head 3"
    assert "#block-self-2" in [a["href"] for a in pages["mixed"].attributes("a")]
    severities = {a["id"]: a.get("class") for a in pages["mixed"].attributes("tr") if "id" in a}
    assert severities["one-self-2-7"] == severities["block-self-2"] == "warning"
    assert severities["one-self-2-6"] is None


def test_every_block_has_a_small_map_with_its_verdict_where_verdicts_differ(
    records: dict[str, IdentifiabilityRecord], pages: dict[str, Page]
) -> None:
    for name in RECORDS:
        shown, heads = pages[name], records[name].heads
        maps = [a for a in shown.attributes("button") if "map" in a.get("class", "")]
        if name == "single":
            assert maps == []  # one head overlaps with nobody
            continue
        assert [int(a["data-block"]) for a in maps] == list(range(len(heads)))
        assert len(shown.attributes("canvas")) == len(maps)
        data = next(json.loads(text) for a, text in shown.scripts if a.get("id") == "chosen-blocks")
        assert [len(d["overlap"]) for d in data] == [h.heads if h.write_space_overlap else 0 for h in heads]
        signs = [a["data-sign"] for a in shown.attributes("span") if "data-sign" in a]
        wanted = {"attributable": "✓", "attributable with care": "!", "not attributable": "✗", "": "?"}
        verdicts = [wanted[short(h.verdict or "")] for h in heads]
        if len(set(verdicts)) == 1:  # said once, in the answer, and not under every map
            assert len(signs) <= 1
        else:
            assert signs[-len(maps) :] == verdicts


# The page as a page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RECORDS if n != "single"])
def test_the_page_is_as_sound_as_the_one_of_a_diagnosis(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    ids = shown.ids()
    assert len(ids) == len(set(ids))
    for _, attributes in shown.elements:
        assert "style" not in attributes
        assert not [k for k in attributes if k.startswith("on")]
        assert all(attributes[k] in ids for k in ("aria-labelledby", "for") if k in attributes)
    assert all(a["href"].startswith("#") and a["href"][1:] in ids for a in shown.attributes("a"))
    levels = [int(tag[1]) for tag, _ in shown.elements if tag in {"h1", "h2", "h3", "h4"}]
    assert levels.count(1) == 1
    policy_allows_own_scripts_only(pages, name)
    enough_contrast({"encoder": shown})
    assert len(shown.text.encode()) < 2_000_000


def test_hostile_text_stays_text_everywhere(records: dict[str, IdentifiabilityRecord]) -> None:
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&"
    record = records["crossed"]
    heads = [replace(h, unavailable=dict.fromkeys(h.unavailable, evil)) for h in record.heads]
    heads[0] = replace(heads[0], verdict=evil, head_verdict=[evil] * 4)
    record = replace(
        record,
        heads=heads,
        model=replace(record.model, name=evil, architecture=evil),
        probe=replace(record.probe, source=evil, command=evil, options={evil: evil}),
        versions={evil: evil},
        findings=[replace(samples.COPIES, code=evil, message=evil, remedy=evil, reference=evil)],
    )
    shown, plain = Page(draw(record)), Page(draw(records["crossed"]))
    assert [tag for tag, _ in shown.elements].count("script") == [tag for tag, _ in plain.elements].count("script")
    assert not shown.attributes("img")
    assert all("<" not in t for a, t in shown.scripts if a.get("type") == "application/json")
    show(record, Console(file=io.StringIO()))


def test_a_page_is_the_same_from_json(records: dict[str, IdentifiabilityRecord], pages: dict[str, Page]) -> None:
    for name in ("mixed", "crossed", "single"):
        assert draw(from_json(to_json(records[name]), IdentifiabilityRecord)) == pages[name].text


def test_another_schema_is_refused_with_what_to_do(records: dict[str, IdentifiabilityRecord]) -> None:
    with pytest.raises(InputError, match=r"^draw: expected a record of the schema uncollapse/heads/1, got .*`load`"):
        draw(replace(records["mixed"], schema="uncollapse/heads/9"))  # type: ignore[arg-type]


def test_an_old_record_without_the_new_keys_still_makes_a_page(records: dict[str, IdentifiabilityRecord]) -> None:
    new = "tokens contribution_ambiguity factorization_ambiguity smallest_principal_angle head_noise_gain head_verdict "
    new += "absolute_noise_gain random_noise_gain random_head_noise_gain"
    heads = [replace(h, **dict.fromkeys(new.split())) for h in records["mixed"].heads]
    old = replace(records["mixed"], heads=heads)
    shown = Page(draw(old))
    assert "Yes in block 0, with care in block 1, not in block 2." in shown.words
    assert ("one-self-0-0", "noise gain") not in shown.cells
    show(old, Console(file=io.StringIO()))


# The terminal -----------------------------------------------------------------------------------------------------------


def shown(record: IdentifiabilityRecord, width: int = 80, encoding: str = "utf-8") -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(record, Console(file=buffer, width=width, color_system=None))
    buffer.seek(0)
    return buffer.read()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("name", RECORDS)
def test_the_terminal_has_one_line_a_block_and_fits(
    records: dict[str, IdentifiabilityRecord], name: str, width: int
) -> None:
    lines = shown(records[name], width).splitlines()
    assert max(map(len, lines)) <= width
    start = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    rows = lines[start + 1 : start + 1 + len(records[name].heads)]
    for heads, row in zip(records[name].heads, rows, strict=True):
        words = "no verdict" if heads.verdict is None else short(heads.verdict)
        assert words in row
        assert f"{heads.block}" in row
        if heads.condition_number is not None:
            assert f" {heads.condition_number:#.3g} ".replace(". ", " ") in row
        elif heads.kernel_dimension is not None:
            assert f" {heads.kernel_dimension} " in f"{row} "
            assert "∞" in row
    assert lines[start + 1 + len(rows)].strip() == ""


def test_the_terminal_answers_first_and_says_what_to_do(records: dict[str, IdentifiabilityRecord]) -> None:
    text = " ".join(shown(records["mixed"], 120).split())
    assert (
        text.index("What each head wrote can always be recorded")
        < text.index(HEADLINES["mixed"])
        < text.index("✓ attributable in block 0")
        < text.index("Attribute to heads by")
    )
    assert text.index("✗ not attributable in block 2") < text.index("! warning HEADS-IDENTICAL (block 2, head 7)")
    assert "Remedy: Attribute to the pair." in text
    assert text.endswith("Look next: the page shows every head and a map of every block.")
    assert "h3,7" in text


def test_what_does_not_fit_is_named(records: dict[str, IdentifiabilityRecord]) -> None:
    assert "Hidden because" not in shown(records["mixed"], 120)
    assert "Hidden because the terminal is only 80 columns wide: smallest angle, largest share." in " ".join(
        shown(records["mixed"]).split()
    )


def test_where_to_look_next_depends_on_how_it_was_asked(records: dict[str, IdentifiabilityRecord]) -> None:
    record = records["healthy"]
    plain = replace(record, probe=replace(record.probe, command="uncollapse heads demo"))
    assert "`uncollapse heads demo --html heads.html` shows every head" in " ".join(shown(plain).split())
    python = replace(record, probe=replace(record.probe, command=""))
    assert '`to_html("heads.html")` shows every head' in " ".join(shown(python).split())


def test_a_terminal_that_knows_only_ascii_gets_ascii(records: dict[str, IdentifiabilityRecord]) -> None:
    assert shown(records["crossed"], encoding="ascii").isascii()


def test_names_are_printed_without_markup_and_control_characters_spelled_out(
    records: dict[str, IdentifiabilityRecord],
) -> None:
    record = replace(records["mixed"], model=replace(records["mixed"].model, name="[red]a\x1b[31mb[/red]"))
    assert shown(record).splitlines()[0] == r"[red]a\x1b[31mb[/red]"


@pytest.mark.parametrize("module", [wording, tables])
def test_the_examples_of_the_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


# The maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RECORDS if n != "single"])
def test_the_maps_say_where_their_colours_end_and_no_more(
    records: dict[str, IdentifiabilityRecord], pages: dict[str, Page], name: str
) -> None:
    found = [
        line[g]
        for heads in records[name].heads
        for h, line in enumerate(heads.write_space_overlap or [])
        for g in range(len(line))
        if g != h
    ]
    words = " ".join(pages[name].words.split())
    end = re.search(r"The colours run from 0 to ([0-9.]+), the largest overlap of two heads here", words)
    assert end is not None
    assert float(end[1]) == pytest.approx(max(found), rel=0.06)
    assert "nearly the same space" not in words
    sizes = {(h.head_width, h.width) for h in records[name].heads if h.write_space_overlap}
    for head_width, width in sizes:
        assert f"{number(head_width / width, 2)} ±" in words


def test_no_map_no_words_about_its_colours(records: dict[str, IdentifiabilityRecord]) -> None:
    assert wording.overlap_scale(records["single"]) == ""
