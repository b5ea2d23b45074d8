"""Every picture of the documentation is shown somewhere, and one command makes all of them."""

from __future__ import annotations

import re
from pathlib import Path

from studies import pretrained, screens

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"


def shown() -> set[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")) for page in pages]
    return {Path(target).name for targets in found for target in targets}


def test_every_picture_is_shown_and_every_shown_picture_is_there() -> None:
    assert {path.name for path in IMAGES.iterdir()} == shown()


def test_make_pictures_makes_all_of_them() -> None:
    """By the names that the sources of the modules behind the target give them."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\npictures:")[1].split("\n\n")[0]
    modules = re.findall(r"-m studies\.(\w+)", recipe)
    assert {"screens", "tutorial", "results", "position_gates", "early_warning"} == set(modules)
    source = ""
    for module in modules:
        place = ROOT / "studies" / module
        files = place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]
        source += "".join(file.read_text(encoding="utf-8") for file in files)
    named = re.findall(r"[\w{}-]+\.(?:svg|png)", source)
    assert shown() == {name.replace("{key}", key) for name in named for key in pretrained.SUBJECTS}


def test_pictures_fetch_nothing() -> None:
    assert len(screens.TERMINALS) == 2
    for path in IMAGES.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(href|src)\s*=\s*[\"']http|url\(\s*[\"']?http|@import", text), path.name
