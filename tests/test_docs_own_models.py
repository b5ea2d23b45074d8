"""The how-to for one's own model runs, top to bottom."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "own-models.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
