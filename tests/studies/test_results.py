"""The sentences of the results page that answer its question follow from the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studies import results

NAMES = {"gemma3": "Gemma-3-270M", "smollm2": "SmolLM2-135M"}


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"A": (0.9, 0.01), "B": (0.8, 0.08)}, "all of them fall to a tenth of the embedding's or less"),
        (
            {"A": (0.9, 0.01), "B": (0.8, 0.4)},
            "1 of them falls to a tenth of the embedding's or less, while B keeps 0.5 of it",
        ),
        (
            {"A": (0.9, 0.01), "B": (0.8, 0.4), "C": (0.5, 0.05)},
            "2 of them fall to a tenth of the embedding's or less, while B keeps 0.5 of it",
        ),
        (
            {"A": (0.9, 0.45), "B": (0.8, 0.4)},
            "none falls to a tenth of the embedding's: A keeps 0.5 of it, B keeps 0.5 of it",
        ),
    ],
)
def test_who_falls_is_read_from_the_distances(ends: dict[str, tuple[float, float]], said: str) -> None:
    assert results.fallen(ends) == said


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"gemma3": 12.6, "smollm2": 24.4}, "the language models do no better than a uniform guess ("),
        ({"gemma3": 3.0, "smollm2": 24.4}, "of the 2 language models 1 still does better than a uniform guess ("),
        ({"gemma3": 3.0, "smollm2": 4.0}, "the language models still do better than a uniform guess ("),
    ],
)
def test_losses_stand_beside_a_uniform_guess(losses: dict[str, float], said: str) -> None:
    sentence = results.against_a_guess(losses, NAMES)
    assert sentence.startswith(said)
    assert "Gemma-3-270M" in sentence
    assert "a uniform guess over 262,144 tokens has 12.5" in sentence


def test_a_part_of_the_sections_does_not_take_the_place_of_the_whole_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "results.md"
    page.write_text("whole", encoding="utf-8")
    monkeypatch.setattr(results, "DOCUMENT", page)
    monkeypatch.setattr(results, "SAVED", tmp_path)
    monkeypatch.setitem(results.SECTIONS, "dong", lambda: {"a": 1})
    results.measure("dong")
    assert results.is_measured("dong")
    assert not results.is_measured("trained")
    results.document()
    assert page.read_text(encoding="utf-8") == "whole"
    assert "trained" in capsys.readouterr().out
    saved = json.loads((tmp_path / "dong.json").read_text(encoding="utf-8"))
    (tmp_path / "dong.json").write_text(json.dumps(saved | {"fingerprint": "of other code"}), encoding="utf-8")
    assert not results.is_measured("dong")
