"""Sequences of text: the user's files, or prose that is on every machine already."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from uncollapse.errors import InputError
from uncollapse.files import reading

# Their prose is the same, to the letter, in Python 3.10 to 3.13; it fills the default probe before other topics do.
STABLE_TOPICS = tuple(
    """
    assert async await bltin-code-objects bltin-null-object bltin-type-objects booleans break comparisons
    context-managers continue del dynamic-features else exceptions exprlists global if import in integers lists
    numeric-types objects operator-summary power raise return sequence-types shifting slicings specialattrs
    string-methods truth typesfunctions typesseq typesseq-mutable unary while with yield
    """.split()  # noqa: SIM905 - a list literal of forty names would take forty lines
)
PARAGRAPH_WORDS = range(15, 121)
LIMIT = 512 * 2**20  # bytes of one file: a hundred million words

_QUOTED_OR_EMPHASISED = re.compile(r'[‘’]?("[^"]*")[‘’]?|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*')
_NOTE = re.compile(r"(Changed|New|Deprecated|Added) (in|since) version|See |CPython implementation detail")
_CODE = re.compile(r"[\[\]{}()<>=_\\|`@#%&~/^+$]|\d|\w\.\w|::")


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The sequences in UTF-8 text files, in order: blank lines separate them, lines within one keep their line breaks.

    Line breaks stay because poems and programs need them, and so that what is measured is what the file says.

    Raises `InputError` naming the file where it is missing, empty, larger than `LIMIT` or not UTF-8 text (with the byte offset),
    and where it is a device or a pipe that nobody writes to.
    """
    texts: list[str] = []
    for path in paths:
        texts += _file_texts(os.fspath(path))
    return texts


def _file_texts(name: str) -> list[str]:
    text, size = _file_text(name)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    by_blankness = itertools.groupby(text.split("\n"), key=lambda line: not line.strip())
    texts = ["\n".join(lines) for blank, lines in by_blankness if not blank]
    if not texts:
        raise InputError(
            f"read_texts: expected text, got {name!r} with {size} bytes and no words. "
            "It may not have been written yet. Write one sequence per paragraph, with blank lines between them."
        )
    return texts


def _file_text(name: str) -> tuple[str, int]:
    """The text in a file and how many bytes it has there. Decoded piece by piece: what is no text is not read to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    read = 0
    try:
        for piece in reading.pieces(name, at_most=LIMIT):
            zero = piece.find(b"\0")  # UTF-16 without a mark is valid UTF-8, full of zero bytes
            parts.append(_decoded(decoder, piece if zero < 0 else piece[:zero], read, name))
            if zero >= 0:
                raise _not_utf_8(name, 0, read + zero)
            read += len(piece)
        _decoded(decoder, b"", read, name, final=True)
    except reading.TooLarge:
        raise InputError(
            f"read_texts: expected a text of at most {LIMIT // 2**20} MiB, got {name!r}, which is larger. "
            "It may have no end, or be another kind of file. Pass a part of it, or several files."
        ) from None
    except OSError as error:
        raise InputError(
            f"read_texts: expected a text file, got {name!r} ({error.strerror or error}). "
            "The path may be misspelt, or name a folder. Name a UTF-8 text file."
        ) from None
    return "".join(parts), read


def _decoded(decoder: codecs.IncrementalDecoder, piece: bytes, read: int, name: str, *, final: bool = False) -> str:
    begun = decoder.getstate()[0]  # the first bytes of a character that the last piece ended in
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        raise _not_utf_8(name, (begun + piece)[error.start], read - len(begun) + error.start) from None


def _not_utf_8(name: str, byte: int, offset: int) -> InputError:
    return InputError(
        f"read_texts: expected UTF-8 text, got {name!r} with byte 0x{byte:02x} at offset {offset}. "
        "It may be in another encoding, or not a text file. Save it as UTF-8, for instance with iconv."
    )


def default_texts(count: int, seed: int) -> list[str]:
    """`count` paragraphs of English prose from Python's own language reference (`pydoc_data.topics`), chosen by `seed`.

    They are on every machine, need no download, and are written by people, not drawn at random. Paragraphs are ranked
    by a hash of the seed and their own words, so a release of Python that rewords one of them changes that one and
    moves no other; topics that read the same in Python 3.10 to 3.13 come first and fill the first hundred.

    Raises `InputError` where more paragraphs are asked for than there are.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "default_texts: expected Python's own reference text, got a Python without pydoc_data. "
            "Small distributions leave it out. Pass your own text: texts=, or --text FILE."
        ) from error
    stable = {paragraph for name in STABLE_TOPICS for paragraph in _prose(topics.get(name, ""))}
    other = {paragraph for reference in topics.values() for paragraph in _prose(reference)} - stable
    available = len(stable) + len(other)
    if not 1 <= count <= available:
        raise InputError(
            f"default_texts: expected between 1 and {available} sequences, got {count}. "
            "The default text has no more paragraphs. Ask for fewer, or pass your own text: texts=, or --text FILE."
        )

    def rank(paragraph: str) -> tuple[bool, bytes]:
        return paragraph in other, hashlib.sha256(f"{seed}\n{paragraph}".encode()).digest()

    return sorted(stable | other, key=rank)[:count]


def _prose(reference: str) -> Iterator[str]:
    """The paragraphs of whole sentences in a reference text. Grammar, code, lists, tables and notes are left out."""
    for block in re.split(r"\n[^\S\n]*\n", reference):
        lines = block.strip("\n").split("\n")
        if any(line.startswith((" ", "* ", "-")) for line in lines):
            continue  # indented is code or a definition, and what starts with a mark is a list
        text = re.sub(r"(?<=\w)- (?=[a-z])", "-", " ".join(lines))  # the reference breaks lines after hyphens
        text = _QUOTED_OR_EMPHASISED.sub(lambda found: found[1] or found[2] or found[3], text)
        text = " ".join(re.sub(r" ?\[\d+\]", "", text).split())
        words = text.split()
        if len(words) not in PARAGRAPH_WORDS or not (text[0].isupper() and text.endswith(".")) or _NOTE.match(text):
            continue
        if 10 * sum(bool(_CODE.search(word)) for word in words) <= len(words):
            yield text
