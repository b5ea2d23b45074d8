"""What a record can do: show itself in a terminal or a notebook, and write itself as a page or as JSON.

`Diagnosis`, `Ablation` and the claims ledger's result are this, each with short names for what its record holds.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from uncollapse import report
from uncollapse.records.ablation import AblationRecord
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import to_json, write_atomically
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.records.ledger import Ledger
from uncollapse.records.symmetries import SymmetriesRecord

if TYPE_CHECKING:
    from rich.console import Console

AnyRecord = TypeVar("AnyRecord", DiagnosisRecord, AblationRecord, IdentifiabilityRecord, SymmetriesRecord, Ledger)


@dataclass(frozen=True)
class Recorded(Generic[AnyRecord]):
    """A result. `record` is the whole of it, as data."""

    record: AnyRecord

    def show(self, console: Console | None = None) -> None:
        """Print it; in a notebook the object shows its page by itself."""
        from rich.console import Console

        report.show(self.record, console or Console())

    def to_html(self, path: str | Path) -> None:
        """Write the page: one file, no network. Raises `InputError` where the path cannot be written."""
        write_atomically(path, report.draw(self.record))

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON; also written to `path` if given."""
        text = to_json(self.record)
        if path is not None:
            write_atomically(path, text)
        return text

    def _repr_html_(self) -> str:
        page = html.escape(report.draw(self.record), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:800px;border:0" title="uncollapse report"></iframe>'
