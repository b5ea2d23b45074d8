"""Names and texts from outside, made safe to show: what cannot be seen is spelled out.

A model's name, a path, a token or a message may hold escape sequences, marks that turn the direction of writing, or bytes
that are no characters. On a terminal they would act instead of being read, and on a page they would hide.

When not to use it: on data. What goes into a record stays as it is, and only what is shown is spelled out.
"""

from __future__ import annotations

import unicodedata

_SPACES = ("Zs",)  # a no-break space looks like a space and does nothing else
_PLAIN = str.maketrans(
    {"…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "·": ".", "“": '"', "”": '"', "‘": "'", "’": "'", "→": "->"}
    | {
        "│": "|",
        "─": "-",
        "━": "-",
        "≥": ">=",
        "≤": "<=",
        "≠": "!=",
        "√": "sqrt",
        "∞": "inf",
        "±": "+-",
        "‖": "||",
        "✓": "+",
        "✗": "-",
        "°": " deg",
    }
    | {
        "σ": "sigma",
        "Σ": "sum",
        "ε": "eps",
        "κ": "kappa",
        "½": "1/2",
        "²": "^2",
        "³": "^3",
        "₁": "_1",
        "₂": "_2",
        "ₖ": "_k",
    }
)


def legible(text: str, keep: str = "") -> str:
    r"""`text` with everything that does not show itself spelled out as Python would write it; characters in `keep` stay.

    Spelled out are control and format characters (escape sequences, marks of direction, zero widths), line breaks, lone
    surrogates (bytes of a file name that is not UTF-8), and characters that Unicode does not assign.

    >>> legible("a\x1b[2Jb\u202ec\nd"), legible("caf\udce9 d’été")
    ('a\\x1b[2Jb\\u202ec\\nd', 'caf\\xe9 d’été')
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in keep else _spelled_out(letter) for letter in text)


def _spelled_out(letter: str) -> str:
    if unicodedata.category(letter) in _SPACES:
        return " "
    number = ord(letter)
    if 0xDC80 <= number <= 0xDCFF:  # Python's stand-in for the byte of a name that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def encodable(text: str, encoding: str) -> str:
    """`text` in letters that `encoding` has: typographic ones become plain ones, and the rest is spelled out.

    >>> encodable("2 × 3 … σ☃é", "latin-1")
    '2 × 3 ... sigma\\\\u2603é'
    >>> encodable("‖CA‖ ± 1", "ascii")
    '||CA|| +- 1'
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_in(encoding, letter) for letter in text)
    return text


def _in(encoding: str, letter: str) -> str:
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        plain = letter.translate(_PLAIN)
        return plain if plain.isascii() else _spelled_out(letter)
    return letter
