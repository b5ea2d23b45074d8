"""Lines for a terminal. Text from outside is printed as plain text: no markup, what cannot be seen spelled out, and nothing that
the terminal cannot encode.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from uncollapse.legible import encodable, legible


def plain(console: Console, words: str, style: str = "") -> Text:
    """`words` as this console can show them."""
    return Text(encodable(legible(words), console.encoding), style)


def say(console: Console, words: str, style: str = "", indent: int = 0) -> None:
    """Print a paragraph, wrapped at the console's width."""
    for line in plain(console, words, style).wrap(console, console.width - indent):
        line.rstrip()
        console.print(Text(" " * indent).append_text(line), highlight=False)
