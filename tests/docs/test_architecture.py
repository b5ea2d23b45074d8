"""The picture of docs/architecture.md is what the packages import."""

from __future__ import annotations

from pathlib import Path

import grimp

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
AT_THE_BOTTOM = {"bounds", "legible", "errors"}  # arrows to them are left out, as the page says
Arrows = dict[str, set[str]]


def imports() -> Arrows:
    """Which packages and modules directly below `uncollapse` each of them imports."""
    graph = grimp.build_graph("uncollapse", cache_dir=None)
    found: Arrows = {}
    for module in graph.modules - {"uncollapse", "uncollapse.__main__"}:
        targets = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
        own = module.split(".")[1]
        found.setdefault(own, set()).update(targets - {own} - AT_THE_BOTTOM)
    return {own: targets for own, targets in found.items() if own not in AT_THE_BOTTOM}


def below(arrows: Arrows, name: str) -> set[str]:
    return arrows[name].union(*(below(arrows, each) for each in arrows[name]))


def test_the_picture_shows_every_import_that_no_longer_way_says() -> None:
    arrows = imports()
    needed = {
        (own, target)
        for own, targets in arrows.items()
        for target in targets
        if not any(target in below(arrows, other) for other in targets)
    }
    picture = PAGE.read_text(encoding="utf-8").split("```mermaid")[1].split("```")[0]
    rows = [line.split("-->") for line in picture.splitlines() if "-->" in line]
    drawn = {(a.strip(), b.strip()) for left, right in rows for a in left.split("&") for b in right.split("&")}
    assert drawn == needed
