"""The ledger's page and its terminal form, read back and held against the record they were drawn from."""

from __future__ import annotations

import base64
import doctest
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console
from studies.ledger_page import sections as theory_sections

from uncollapse.claims import verify
from uncollapse.errors import InputError
from uncollapse.measures import exact
from uncollapse.records.encoding import from_json, json_schema, to_json
from uncollapse.records.ledger import ClaimResult, Counterexample, Evidence, Ledger, Verdict
from uncollapse.report import draw, show
from uncollapse.report.ledger import lines, wording

VOID = {"meta"}


class Read(HTMLParser):
    """A page read back: the words and tables of every article, all links in order, matrices with what a button copies."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.article = ""
        self.words: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {}
        self.matrices: dict[str, dict[str, tuple[list[list[str]], str]]] = {}
        self.badges: dict[str, str] = {}
        self.contents: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.style = ""
        self._caption, self._badge, self._matrix = "", "", False
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.article = given["id"].removeprefix("claim-")
            self.words[self.article] = ""
            self.rows[self.article] = []
            self.matrices[self.article] = {}
        elif tag == "figure":
            self._matrix, self._caption = True, ""
            self._grid: list[list[str]] = []
        elif tag == "tr":
            (self._grid if self._matrix else self.rows.setdefault(self.article, [])).append([])
        elif tag == "td":
            (self._grid if self._matrix else self.rows[self.article])[-1].append("")
        elif tag == "script":
            self.scripts.append("")
        elif tag == "button":
            self.matrices[self.article][self._caption] = (self._grid, given["data-copy"])
        elif tag == "a" and "dl" in self.open and not self.article:
            self.contents[self._badge].append(given["href"].removeprefix("#claim-"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "article":
            self.article = ""
        elif tag == "figure":
            self._matrix = False

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.style += data
        else:
            self.words[self.article] = self.words[self.article] + data
            if inside == "td":
                (self._grid if self._matrix else self.rows[self.article])[-1][-1] += data
            elif inside == "figcaption":
                self._caption += data
            elif inside == "span" and self.elements[-1][1].get("class", "").startswith("verdict"):
                if self.article:
                    self.badges[self.article] = data
                else:
                    self._badge = data
                    self.contents[data] = []


def flat(words: str) -> str:
    return " ".join(words.split())


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return verify(trials=10)


@pytest.fixture(scope="module")
def read(ledger: Ledger) -> Read:
    return Read(draw(ledger))


def printed(ledger: Ledger, width: int = 100, **options: Any) -> str:
    stream = io.StringIO()
    show(ledger, Console(file=stream, width=width, **options))
    return stream.getvalue()


def made(*, verdict: Verdict = "holds", evidence: list[Evidence] | None = None, **changes: Any) -> Ledger:
    """A ledger of one claim made by hand."""
    pieces = [Evidence("w", 1, 1, True)] if evidence is None else evidence
    claim = ClaimResult("an-id", "A statement.", "a source", verdict, [], pieces, None)
    return Ledger({"uncollapse": "0"}, 5, 0, [replace(claim, **changes)])


# The page


def test_every_claim_stands_there_with_statement_source_verdict_and_hypotheses(ledger: Ledger, read: Read) -> None:
    assert list(read.rows)[: len(ledger.claims)] == [claim.id for claim in ledger.claims]
    for claim in ledger.claims:
        words = flat(read.words[claim.id])
        assert read.badges[claim.id] == wording.badge(claim.verdict)
        for text in (claim.statement, claim.source, *claim.hypotheses):
            assert flat(text) in words


def test_the_evidence_is_a_table_of_the_record(ledger: Ledger, read: Read) -> None:
    seen = 0
    for claim in ledger.claims:
        rows = [row for row in read.rows[claim.id] if row]
        assert len(rows) == len(claim.evidence)
        for row, piece in zip(rows, claim.evidence, strict=True):
            assert row[0] == {True: "passed", False: "failed", None: "open"}[piece.passed]
            assert row[1] == piece.what
            for text, value in ((row[2], piece.observed), (row[3], piece.expected)):
                if isinstance(value, str):
                    assert text == value
                elif value is None:
                    assert text == "–"
                else:
                    assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-5)
            assert row[4:] == [piece.role, "exact" if piece.exact else "floating point"]
            seen += 1
    assert seen > 100


def test_counterexamples_are_matrices_that_one_can_copy(ledger: Ledger, read: Read) -> None:
    seen = 0
    for claim in ledger.claims:
        if claim.counterexample is None:
            assert not read.matrices[claim.id]
            continue
        words = flat(read.words[claim.id])
        for text in (claim.counterexample.refutes, claim.counterexample.shows, claim.counterexample.minimal):
            assert flat(text) in words
        assert list(read.matrices[claim.id]) == list(claim.counterexample.matrices)
        for name, rows in claim.counterexample.matrices.items():
            shown, copied = read.matrices[claim.id][name]
            assert shown == rows
            pasted = eval(copied, {"Fraction": Fraction})
            assert pasted == [[Fraction(entry) for entry in row] for row in rows]
            assert exact.rational(pasted) == exact.rational([[Fraction(entry) for entry in row] for row in rows])
            seen += 1
    assert seen > 40


def test_every_formula_is_set_as_mathml_and_a_records_own_words_never_are(ledger: Ledger, read: Read) -> None:
    formulas = [claim.formula for claim in ledger.claims if claim.formula]
    written = json.loads(resources.files("uncollapse.report.ledger").joinpath("formulas.json").read_text("utf-8"))
    assert set(written) == set(formulas)  # else: make ledger-page
    allowed = {
        "math",
        "mrow",
        "mi",
        "mo",
        "mn",
        "msub",
        "msup",
        "msubsup",
        "munder",
        "mfrac",
        "msqrt",
        "mspace",
        "mstyle",
        "mtext",
    }
    for text in written.values():
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert names <= allowed
    assert sum(tag == "math" for tag, _ in read.elements) == len(formulas) > 30
    foreign = draw(made(title="<b>Bold</b>", formula="<math><script>alert(1)</script></math>"))
    assert "&lt;math&gt;&lt;script&gt;alert(1)" in foreign
    assert "<b>Bold" not in foreign


def test_a_claim_has_a_title_and_its_place_in_the_theory(ledger: Ledger, read: Read) -> None:
    theory = (Path(__file__).parents[2] / "docs" / "theory.md").read_text("utf-8")
    sections = {part.partition("\n")[0]: part for part in theory.split("\n## ")[1:]}
    for claim in ledger.claims:
        words = flat(read.words[claim.id])
        assert words.startswith(claim.title)
        assert f"Proof and remarks: {claim.theory}." in words
        assert f"`{claim.id}`" in sections[claim.theory]
    assert len({claim.title for claim in ledger.claims}) == len(ledger.claims)
    older = flat(Read(draw(made())).words["an-id"])  # a record without titles
    assert older.startswith("an-id holds A statement.")
    assert "Proof and remarks" not in older
    strange = draw(made(theory="<b>99</b>. A heading of another version"))
    assert "Proof and remarks: docs/theory.md, &lt;b&gt;99&lt;/b&gt;. A heading of another version." in flat(strange)


def test_the_page_carries_the_theory_that_its_claims_need(ledger: Ledger) -> None:
    """In step with docs/theory.md, and only the sections asked for."""
    page = draw(ledger)
    written = json.loads(resources.files("uncollapse.report.ledger").joinpath("theory.json").read_text("utf-8"))
    read = theory_sections((Path(__file__).parents[2] / "docs" / "theory.md").read_text("utf-8"))
    assert written == {heading: read[heading] for heading in written}  # else: make ledger-page
    assert set(written) == {claim.theory for claim in ledger.claims}
    assert all(text in page for text in written.values())
    one = draw(verify(["dispersion"], trials=1))
    assert [text in one for text in written.values()] == [heading == "10. Entropy" for heading in written]
    assert 'href="#theory-10-entropy"' in one
    assert 'id="theory-10-entropy"' in one


def test_a_third_is_copied_as_a_third() -> None:
    assert wording.python([["1/3", "-7/2", "-4"]]) == "[[Fraction(1, 3), Fraction(-7, 2), -4]]"
    assert wording.python([["__import__('os')"]]) == """[["__import__('os')"]]"""  # no rational: only a string


def test_the_contents_list_the_claims_of_each_verdict(ledger: Ledger, read: Read) -> None:
    wanted: dict[str, list[str]] = {}
    for claim in ledger.claims:
        wanted.setdefault(wording.badge(claim.verdict), []).append(claim.id)
    assert read.contents == wanted
    assert next(iter(read.contents)) == "refuted as stated"
    ids = [given["id"] for _, given in read.elements if "id" in given]
    assert len(ids) == len(set(ids))
    links = {given["href"] for tag, given in read.elements if tag == "a"}
    assert {link.removeprefix("#") for link in links if link.startswith("#")} <= set(ids)
    assert {urlsplit(link).hostname for link in links if not link.startswith("#")} == {"arxiv.org", "openreview.net"}


def test_the_page_says_with_what_it_was_checked_and_how_to_read_it(ledger: Ledger, read: Read) -> None:
    words = flat(read.words[""])
    assert "Checked with 12 trials and seed 0" in words  # ten were asked for; fewer than 12 count as 12
    for name, version in ledger.versions.items():
        assert f"{name} {version}" in words
    assert "How to read a verdict: One rule turns the evidence into a verdict" in words
    refuted = sum(claim.verdict == "refuted as stated" for claim in ledger.claims)
    assert f"{len(ledger.claims)} claims: refuted as stated {refuted}, holds " in words


def test_the_policy_allows_the_pages_own_parts_and_nothing_else(read: Read) -> None:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (policy,) = [given["content"] for _, given in read.elements if given.get("http-equiv") == "Content-Security-Policy"]
    assert len(read.scripts) == 1
    assert policy == (
        f"default-src 'none'; script-src {hashed(read.scripts[0])}; style-src {hashed(read.style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    for tag, given in read.elements:
        assert tag not in {"link", "iframe", "img", "object", "base", "form"}
        assert not {"style", "src", "onclick", "onload"} & set(given)
        # Nothing is fetched; a reader may follow a reference.
        assert given.get("href", "#").startswith(("#", "https://"))


def test_the_page_is_small_and_needs_no_drawing_library(ledger: Ledger) -> None:
    assert len(draw(ledger)) < 300_000
    code = (
        "import sys\nfrom uncollapse.report import draw\nfrom uncollapse.claims import verify\n"
        "draw(verify(['pgop-overhead'], trials=1))\n"
        "sys.exit(', '.join({'altair', 'vl_convert', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


HOSTILE = "</script><script>alert(1)</script>\"'&\x1b[31m\u202e"
SPELLED_OUT = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")


def test_what_came_from_outside_stays_text() -> None:
    hostile = made(
        statement=HOSTILE,
        source=HOSTILE,
        hypotheses=[HOSTILE],
        evidence=[Evidence(HOSTILE, HOSTILE, HOSTILE, True)],
        counterexample=Counterexample(HOSTILE, {HOSTILE: [[HOSTILE]]}, HOSTILE, HOSTILE),
    )
    page = draw(hostile)
    assert not {"\x1b", "\u202e"} & set(page)
    read = Read(page)
    assert len(read.scripts) == 1
    assert "alert" not in read.scripts[0]
    shown, copied = read.matrices["an-id"][SPELLED_OUT]
    assert shown == [[SPELLED_OUT]]
    assert eval(copied, {}) == [[SPELLED_OUT]]
    text = printed(hostile, force_terminal=True, color_system=None)
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_page_is_drawn_from_a_file_a_year_later(ledger: Ledger) -> None:
    assert draw(from_json(to_json(ledger), Ledger)) == draw(ledger)


def test_another_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        InputError, match=r"record of the schema uncollapse/ledger/1, got uncollapse/ledger/2\. .*`load`"
    ):
        draw(replace(made(), schema="uncollapse/ledger/2"))


def test_a_ledger_of_nothing_still_makes_a_page_and_lines() -> None:
    empty = Ledger({}, 1, 0, [])
    assert "No claim was checked." in Read(draw(empty)).words[""]
    assert "Claims ledger" in printed(empty)


# The words


@pytest.mark.parametrize(
    ("verdict", "evidence", "line"),
    [
        (
            "refuted as stated",
            [Evidence("a", 1, 1, True), Evidence("b", "2 of 3", "0", False), Evidence("c", 4, None, False)],
            "b: 2 of 3 (expected: 0). 3 checks: 1 passed, 2 failed; all exact.",
        ),
        (
            "undecided",
            [Evidence("a", 1, 1, True), Evidence("b", "between 1 and 2", 2, None)],
            "b: between 1 and 2 (expected: 2). 2 checks: 1 passed, 1 open; all exact.",
        ),
        (
            "undecided",
            [Evidence("a", 1, 1, True), Evidence("b", 0, "at least 1", False, "boundary")],
            "b: 0 (expected: at least 1). 2 checks: 1 passed, 1 failed; all exact.",
        ),
        (
            "measured",
            [Evidence("x", 0, None, True, "context"), Evidence("slope", -0.5, "-1/2", True, exact=False)],
            "slope: -0.500000. 2 checks: 2 passed; 1 in floating point.",
        ),
        ("holds", [Evidence("a", 1, 1, True)], "a: 1. 1 check: 1 passed; all exact."),
        ("undecided", [], "none."),
    ],
)
def test_the_line_of_evidence_is_about_what_decided(verdict: Verdict, evidence: list[Evidence], line: str) -> None:
    assert wording.evidence_line(made(verdict=verdict, evidence=evidence).claims[0]) == line


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(wording)
    assert found.attempted >= 3
    assert not found.failed


def test_every_verdict_has_a_meaning_and_a_colour() -> None:
    assert set(wording.MEANINGS) == set(get_args(Verdict)) == set(lines.STYLES)


# The terminal


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_person_can_read_it_at_any_width(ledger: Ledger, width: int) -> None:
    text = printed(ledger, width)
    assert max(map(len, text.splitlines())) <= width
    blocks = text.split("\n\n")
    for claim, block in zip(ledger.claims, blocks[1:-2], strict=True):
        words = flat(block)
        assert words.startswith(f"{claim.id} {wording.badge(claim.verdict)} {claim.title}. ")
        assert flat(claim.statement) in words
        assert flat(claim.source) in words
        assert all(flat(hypothesis) in words for hypothesis in claim.hypotheses)
        assert f"Evidence: {flat(wording.evidence_line(claim))}" in words
        if claim.counterexample is not None:
            assert flat(claim.counterexample.shows) in words
            for name, rows in claim.counterexample.matrices.items():
                written = ", ".join("[" + ", ".join(row) + "]" for row in rows)
                assert f"{name} = [{written}]" in words
    refuted = [claim.id for claim in ledger.claims if claim.verdict == "refuted as stated"]
    assert len(refuted) >= 4
    assert f"refuted as stated: {', '.join(refuted)}." in flat(text)


def test_a_terminal_of_few_letters_and_no_colour_is_served(ledger: Ledger) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(ledger, Console(file=stream, width=80))
    stream.flush()
    assert b"layernorm-affine-rank" in stream.buffer.getvalue()  # type: ignore[attr-defined]


# The record


def test_the_shipped_schema_is_the_records_own_and_a_real_ledger_fits(ledger: Ledger) -> None:
    shipped = json.loads((resources.files("uncollapse") / "schemas" / "ledger-1.json").read_text("utf-8"))
    assert shipped == json_schema(Ledger), "run `make schema`"
    check = jsonschema.Draft202012Validator(shipped)
    record = json.loads(to_json(ledger))
    check.validate(record)
    assert from_json(to_json(ledger), Ledger) == ledger
    record["claims"][0]["verdict"] = "probably"
    assert not check.is_valid(record)
