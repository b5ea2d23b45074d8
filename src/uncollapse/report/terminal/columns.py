"""The columns of a table in a terminal, and how wide they come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column and how the record of a row fills it. In a narrow terminal those of the highest `spare` go first; 0 stays."""

    title: str
    value: Callable[[Row], str]
    spare: int = 0
    left: bool = False


def flat(title: str) -> str:
    return title.replace("-\n", "").replace("\n", " ")


def heading(title: str, text: Callable[..., Text]) -> Text:
    """A heading of one or two lines."""
    return Text("\n").join(text(line) for line in title.split("\n"))


def width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(width=10_000), table).maximum
