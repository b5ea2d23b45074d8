"""The examples of docs/theory.md run, top to bottom, and the page speaks of every claim."""

import re
from pathlib import Path

from uncollapse.claims import CLAIMS

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"


def test_the_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def test_every_claim_is_explained_and_every_reference_exists():
    text = PAGE.read_text(encoding="utf-8")
    sections = text.split("## 12.")[0]
    mentioned = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", sections))
    assert set(CLAIMS) <= set(re.findall(r"`([a-z-]+)`", sections))
    assert mentioned <= set(CLAIMS)
