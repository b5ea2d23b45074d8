"""Of a long text no more is tokenised than decides its first tokens."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.helpers.tokenizers import word_tokenizer
from uncollapse.errors import InputError
from uncollapse.sources import batches, load_model, tokenize


class Counting:
    """A tokenizer that counts the letters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.letters = tokenizer, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.letters += len(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class DigitsFromTheRight:
    """Digits in groups of three from the right, as arithmetic wants them: the last digit decides the first token."""

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
        first = len(text) % 3 or 3
        groups = [text[:first], *(text[i : i + 3] for i in range(first, len(text), 3))]
        return {"input_ids": [1000 * len(group) + int(group) for group in groups[:max_length]]}


def ids(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    return tokenize([text], tokenizer, max_tokens=max_tokens)[0]["input_ids"][0].tolist()


LONG = "the quick brown fox jumps over a lazy dog and then it rests for the quick fox " * 1500
TEXTS = {  # longer than what is looked at without asking
    "prose": LONG,
    "words that the cut breaks": "brown" + " x" * 4093 + " " + LONG,
    "a long word first": "y" * 90_000 + " " + LONG,
    "white space first": " " * 90_000 + LONG,
}


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model("demo").tokenizer


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_tokens", [8, 200])
def test_the_tokens_are_those_of_the_whole_text(demo: Any, text: str, side: str, max_tokens: int) -> None:
    for tokenizer in (word_tokenizer(), demo):
        tokenizer.truncation_side = side
        whole = tokenizer(TEXTS[text], truncation=True, max_length=max_tokens)["input_ids"]
        assert ids(tokenizer, TEXTS[text], max_tokens) == whole


def test_little_of_a_long_line_is_tokenised() -> None:
    tokenizer = Counting(word_tokenizer())
    text = LONG * 100
    began = time.monotonic()
    ids(tokenizer, text, 8)
    assert tokenizer.letters < 50_000 < len(text)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("digits", [200_000, 200_001, 200_002])
def test_where_the_end_decides_the_beginning_the_whole_text_is_tokenised(digits: int) -> None:
    tokenizer = DigitsFromTheRight()
    text = ("1234567890" * (digits // 10 + 1))[:digits]
    assert ids(tokenizer, text, 8) == tokenizer(text, truncation=True, max_length=8)["input_ids"]


def test_a_text_without_tokens_is_refused_before_all_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_most", lambda _: 2**18)
    tokenizer = Counting(word_tokenizer())
    text = "the quick" + " " * 20_000_000
    with pytest.raises(InputError, match="expected 8 tokens within 262144 characters, got fewer in text 1 of 1"):
        ids(tokenizer, text, 8)
    assert tokenizer.letters < len(text) / 4
