"""The examples of the documentation run, top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("own-models.md", 5),
        ("symmetries.md", 2),
        ("monitoring.md", 6),
        ("attribution.md", 2),
        ("corpus-geometry.md", 1),
    ],
)
def test_the_examples_run(page: str, count: int) -> None:
    path = DOCS / page
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == count
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
