"""Files that are given as texts: of any bytes, any kind, any name."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from pathlib import Path

from tests.fuzzing.outcomes import ended
from tests.helpers.tokenizers import WORDS, word_tokenizer
from uncollapse.files import reading
from uncollapse.sources import read_texts, tokenize

_TOKENIZER = word_tokenizer(pad_token="<pad>")
_PIECES = (
    *(
        b" ",
        b"\n",
        b"\r\n",
        b"\n\n",
        b"\t",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"\xc3",
    ),
    *("\u2028".encode(), "\u3000".encode(), b"\x85", b"\x0c", b"\xf0\x9f\x98\x80", b"\xed\xa0\x80"),
    *(word.encode() + b" " for word in WORDS),
)


def text_file(seed: int) -> str:
    """Read and tokenised as a command does; where that succeeds, the tokens are those of the whole text."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = [_file(Path(folder), number, draw) for number in range(draw.choice([1, 1, 1, 2, 3]))]
        return ended(lambda: _read(paths, draw))


def _read(paths: list[str], draw: random.Random) -> None:
    tokens = draw.choice([2, 3, 8, 128])
    patience, reading.PATIENCE = reading.PATIENCE, 0.05
    try:
        texts = read_texts(paths)
    finally:
        reading.PATIENCE = patience
    batches = tokenize(texts, _TOKENIZER, max_tokens=tokens, batch_size=draw.choice([1, 2, 16]))
    found = sorted(
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    wanted = sorted(_TOKENIZER(text, truncation=True, max_length=tokens)["input_ids"] for text in texts)
    if found != wanted:
        raise AssertionError("other tokens than those of the whole text")


def _file(folder: Path, number: int, draw: random.Random) -> str:
    """A name, and whatever it leads to."""
    name = os.fsencode(folder) + b"/" + draw.choice([b"text", b"caf\xe9", b"x" * 250, b"a\nb", "‮".encode()])
    name += str(number).encode()
    kind = draw.choice(
        ["file"] * 12 + ["missing", "folder", "link", "circle", "pipe", "silent pipe", "/dev/zero", "/dev/null"]
    )
    content = _content(draw)
    if kind == "file":
        Path(os.fsdecode(name)).write_bytes(content)
    elif kind == "folder":
        os.mkdir(name)
    elif kind == "link":
        (folder / f"target{number}").write_bytes(content)
        os.symlink(f"target{number}", name)
    elif kind == "circle":
        os.symlink(name, name)
    elif "pipe" in kind:
        os.mkfifo(name)
        if kind == "pipe":
            threading.Thread(target=_write, args=(name, content), daemon=True).start()
    elif kind.startswith("/dev"):
        return kind
    return os.fsdecode(name)


def _write(name: bytes, content: bytes) -> None:
    try:
        with open(os.open(name, os.O_WRONLY), "wb") as stream:  # it is not made again where it has gone
            stream.write(content)
    except OSError:  # whoever reads has left: he found no text
        return


def _content(draw: random.Random) -> bytes:
    match draw.choice(["pieces", "pieces", "bytes", "long", "blank"]):
        case "bytes":
            return draw.randbytes(draw.randrange(300))
        case "long":  # more than is tokenised without asking
            word = draw.choice(WORDS).encode()
            return (word + draw.choice([b" ", b"", b"\n"])) * draw.choice([20_000, 60_000]) + b" fox"
        case "blank":
            return draw.choice([b"\n", b" \n", b"\r"]) * draw.randrange(5000) + draw.choice([b"", b"a quick fox"])
        case _:
            return b"".join(draw.choices(_PIECES, k=draw.randrange(60)))
