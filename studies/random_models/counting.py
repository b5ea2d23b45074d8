"""Many comparisons, counted: by verdict, by piece, by what went wrong, as text that a document can hold."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.random_models.comparing import VERDICTS, Comparison
from studies.random_models.specification import NOT_PROMISED

BEGIN, END = "<!-- random models: begin -->", "<!-- random models: end -->"


def line_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison as one line of JSON: everything that is not right, and counts of the rest."""
    return {
        "seed": comparison.seed,
        "verdict": comparison.verdict,
        "pieces": dict(comparison.pieces),
        "counts": dict(collections.Counter(item.verdict for item in comparison.items)),
        "items": [[i.name, i.verdict, i.detail[:300]] for i in comparison.items if i.verdict != "right"],
        "seconds": round(comparison.seconds, 3),
    }


def is_to_be_read(line: Mapping[str, Any]) -> bool:
    """Whether a reader has no excuse (`Specification.is_to_be_read`)."""
    return all(line["pieces"][name] not in choices for name, choices in NOT_PROMISED.items())


def _shares(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = collections.Counter(line["verdict"] for line in lines)
    return [f"{found[v]:,}" for v in VERDICTS]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many models are right, unavailable, refused, wrong, as a Markdown table."""
    groups = {
        "all": list(lines),
        "to be read": [line for line in lines if is_to_be_read(line)],
        "may be refused": [line for line in lines if not is_to_be_read(line)],
    }
    rows = [
        "| models | number | right | some figure unavailable | refused | silently wrong |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, group in groups.items():
        rows.append(f"| {name} | {len(group):,} | " + " | ".join(_shares(group)) + " |")
    items = collections.Counter[str]()
    for line in lines:
        items.update(line["counts"])
    compared = sum(items[v] for v in VERDICTS)
    rows += [
        "",
        f"Compared: {compared:,} figures and removals. " + ", ".join(f"{items[v]:,} {v}" for v in VERDICTS) + ".",
    ]
    return "\n".join(rows)


def by_piece(lines: Sequence[Mapping[str, Any]]) -> str:
    """The same for every choice of every piece, the worst of each piece first."""
    of: dict[str, dict[str, list[Mapping[str, Any]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in lines:
        for piece, choice in line["pieces"].items():
            of[piece][choice].append(line)
    rows = ["| piece | choice | models | " + " | ".join(VERDICTS) + " |", "|---|---|--:|--:|--:|--:|--:|"]
    for piece, choices in of.items():
        worst_first = sorted(choices, key=lambda c: -sum(x["verdict"] == "wrong" for x in choices[c]) / len(choices[c]))
        for choice in worst_first:
            group = choices[choice]
            rows.append(f"| {piece} | {choice} | {len(group)} | " + " | ".join(_shares(group)) + " |")
    return "\n".join(rows)


def kind_of(item: Sequence[str]) -> str:
    """What an item is about, without the numbers of blocks, heads and batches."""
    name = re.sub(r", batch \d+", "", item[0])
    name = re.sub(r"\.in block \d+", ", one block", name)
    return re.sub(r"\.\d+", "", name)


def by_item(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many models have a figure or removal that is wrong, refused or unavailable."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        for kind, verdict in {(kind_of(item), item[1]) for item in line["items"]}:
            counts[kind][verdict] += 1
    others = ("wrong", "refused", "unavailable", "indistinct")
    rows = ["| figure or removal | " + " | ".join(others) + " |", "|---|--:|--:|--:|--:|"]
    for kind in sorted(counts, key=lambda k: [-counts[k][v] for v in others]):
        rows.append(f"| {kind} | " + " | ".join(str(counts[kind][v]) for v in others) + " |")
    return "\n".join(rows)


def reasons(lines: Iterable[Mapping[str, Any]], verdict: str, most: int = 12) -> str:
    """The commonest reasons of one verdict, numbers and names of modules taken out, each with a seed."""
    counts: collections.Counter[str] = collections.Counter()
    seeds: dict[str, int] = {}
    for line in lines:
        for text in {re.sub(r"[\d.]+(e-?\d+)?", "#", item[2])[:160] for item in line["items"] if item[1] == verdict}:
            counts[text] += 1
            seeds.setdefault(text, line["seed"])
    return "\n".join(f"{n:6}  seed {seeds[text]:<6} {text}" for text, n in counts.most_common(most))


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a document."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"put_between_markers: expected {BEGIN} and {END} in {path}, got neither or one. Put both in.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
