"""What the ledger's page takes from elsewhere, written out once: the claims' formulas as MathML, and the theory as HTML.

    make ledger-page         # after a formula or docs/theory.md has changed

It writes formulas.json and theory.json beside the page, so that the page needs no library, no network and no checkout.
docs/decisions/0009-formulas.md says why they are kept written out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from uncollapse.claims import CLAIMS

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "src" / "uncollapse" / "report" / "ledger"
THEORY = ROOT / "docs" / "theory.md"


def mathml(latex: str) -> str:
    """One formula as a MathML element on a line of its own."""
    from latex2mathml.converter import convert

    text: str = convert(latex, display="block")
    text = text.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # not as high as a sum beside it
    return re.sub(r"&#x([0-9A-Fa-f]+);", lambda found: _character(int(found.group(1), 16)), text)


def _character(code: int) -> str:
    return chr(code) if chr(code) not in "<>&" else f"&#x{code:X};"


def sections(markdown: str) -> dict[str, str]:
    """The text below each second heading, as HTML without the heading. Links lead to the web or are no links: a page that was sent
    to somebody has no other documents beside it."""
    from markdown_it import MarkdownIt

    written = re.sub(r"\[([^]]+)\]\((?!https:)[^)]*\)", r"\1", markdown)
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    parts = (part.partition("\n") for part in written.split("\n## ")[1:])
    return {heading.strip(): render(text) for heading, _, text in parts}


def main() -> None:
    """Write the files."""
    formulas = {claim.formula: mathml(claim.formula) for claim in CLAIMS.values() if claim.formula}
    theory = sections(THEORY.read_text("utf-8"))
    for name, found in (
        ("formulas", formulas),
        ("theory", {heading: theory[heading] for heading in dict.fromkeys(c.theory for c in CLAIMS.values())}),
    ):
        (PLACE / f"{name}.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
