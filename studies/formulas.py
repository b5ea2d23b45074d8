"""The formulas of the claims as MathML, for the ledger's page: written once, so that the page needs no library and no network.

    make formulas            # after a formula changed: writes src/uncollapse/report/ledger/formulas.json

docs/decisions/0009-formulas.md says why they are kept written out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from uncollapse.claims import CLAIMS

PLACE = Path(__file__).resolve().parent.parent / "src" / "uncollapse" / "report" / "ledger" / "formulas.json"


def mathml(latex: str) -> str:
    """One formula as a MathML element on a line of its own."""
    from latex2mathml.converter import convert

    text: str = convert(latex, display="block")
    return re.sub(r"&#x([0-9A-Fa-f]+);", lambda found: _character(int(found.group(1), 16)), text)


def _character(code: int) -> str:
    return chr(code) if chr(code) not in "<>&" else f"&#x{code:X};"


def main() -> None:
    """Write the file."""
    formulas = {claim.formula: mathml(claim.formula) for claim in CLAIMS.values() if claim.formula}
    PLACE.write_text(json.dumps(formulas, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
