"""The worked claim of CONTRIBUTING.md can be copied: it is a claim, holds, and notices its corruption."""

import re
from pathlib import Path
from typing import Any

from uncollapse.claims.ledger import Claim

ROOT = Path(__file__).parents[2]


def test_the_example_of_a_claim_holds_and_its_corruption_is_refuted() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "CLAIM = " in b]
    names: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    claim = names["CLAIM"]
    assert isinstance(claim, Claim)
    assert f"## {claim.theory}" in (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert claim.run(12, 0).verdict == "holds"
    assert claim.run(12, 0, beyond=-1).verdict == "refuted as stated"
