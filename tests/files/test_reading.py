"""Files that never end, and pipes that nobody writes to."""

from __future__ import annotations

import gzip
import os
import threading
import time
from pathlib import Path

import pytest

from uncollapse import records
from uncollapse.errors import InputError
from uncollapse.files import reading
from uncollapse.sources import read_texts, texts


def read(path: Path | str, at_most: int = 2**30) -> bytes:
    return b"".join(reading.pieces(path, at_most=at_most))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.3)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_file_comes_in_pieces_and_up_to_the_bound(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    assert read(tmp_path / "f", len(data)) == data
    with pytest.raises(reading.TooLarge):
        read(tmp_path / "f", len(data) - 1)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom", "/dev/random"])
def test_a_device_is_refused(device: str) -> None:
    with pytest.raises(OSError, match="may have no end"):
        read(device)
    with pytest.raises(InputError, match=f"read_texts: .*{device}.*may have no end"):
        read_texts([device])
    with pytest.raises(InputError, match=f"load: .*{device}.*may have no end"):
        records.load(device)


def test_the_null_device_is_empty() -> None:
    assert read("/dev/null") == b""


def test_a_pipe_without_a_writer_is_refused(pipe: Path) -> None:
    for reader in (lambda: read_texts([pipe]), lambda: records.load(pipe)):
        began = time.monotonic()
        with pytest.raises(InputError, match="nobody writes to it"):
            reader()
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("silent", [0.0, 0.15, 1.0])
def test_a_pipe_with_a_writer_is_read_to_its_end_however_slow_he_is(pipe: Path, silent: float) -> None:
    data = b"a word " * 50_000

    def write() -> None:
        with pipe.open("wb") as stream:  # waits for the reader
            time.sleep(silent)
            stream.write(data)
            stream.flush()
            time.sleep(silent)
            stream.write(b"last")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert read(pipe) == data + b"last"
    finally:
        writer.join()


def test_a_pipe_whose_writer_leaves_without_a_word_is_empty(pipe: Path) -> None:
    writer = threading.Thread(target=lambda: pipe.open("wb").close())
    writer.start()
    assert read(pipe) == b""
    writer.join()


def test_a_folder_and_a_zero_byte_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        read(tmp_path)
    with pytest.raises(OSError, match="zero byte"):
        read("a\0b")


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    before = os.listdir("/proc/self/fd")
    for at_most in (5, 100):
        with pytest.raises(reading.TooLarge) if at_most == 5 else pytest.MonkeyPatch.context():
            read(tmp_path / "f", at_most)
    assert os.listdir("/proc/self/fd") == before


def test_a_text_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LIMIT", 2**20)
    (tmp_path / "t").write_bytes(b"word " * 300_000)
    with pytest.raises(InputError, match=r"a text of at most 1 MiB, got .*larger"):
        read_texts([tmp_path / "t"])


@pytest.mark.parametrize("before", [0, 3, 2**20 - 1, 2**20, 2**21 + 5])
@pytest.mark.parametrize("wrong", [b"\xe9", b"\0", b"\xe2\x82"])
def test_the_offset_of_what_is_no_text_counts_from_the_beginning_of_the_file(
    tmp_path: Path, before: int, wrong: bytes
) -> None:
    (tmp_path / "t").write_bytes(b"a" * before + wrong + b"b" * (5 if wrong != b"\xe2\x82" else 0))
    with pytest.raises(InputError, match=rf"byte 0x{wrong[0]:02x} at offset {before}\."):
        read_texts([tmp_path / "t"])


def test_letters_across_two_pieces_stay_whole(tmp_path: Path) -> None:
    text = "a" + "☃é𝄞" * 300_000
    (tmp_path / "t").write_text(text, encoding="utf-8")
    assert read_texts([tmp_path / "t"]) == [text]


def test_a_million_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("one" + "\n" * 1_000_000 + "two" + "\r\n" * 1_000_000)
    began = time.monotonic()
    assert read_texts([tmp_path / "t"]) == ["one", "two"]
    assert time.monotonic() - began < 20


def unpacked(data: bytes, size: int, at_most: int = 2**30) -> bytes:
    parts = (data[i : i + size] for i in range(0, len(data), size))
    return b"".join(reading.unpacked(parts, at_most=at_most))


@pytest.mark.parametrize("size", [1, 7, 2**20])
def test_what_is_gzipped_is_unpacked_whole_whatever_the_pieces(size: int) -> None:
    text = bytes(range(256)) * 100 + b"\0" * 3_000_000  # the zeros come out of a few bytes, in many pieces
    assert unpacked(gzip.compress(text), size) == text
    assert unpacked(gzip.compress(b"one ") + gzip.compress(text), max(size, 500)) == b"one " + text
    assert unpacked(b"{plain}", size) == b"{plain}"
    assert unpacked(b"\x1f", size) == b"\x1f"
    assert unpacked(b"", size) == b""


def test_what_was_cut_short_or_damaged_or_unpacks_without_end_is_refused() -> None:
    packed = gzip.compress(bytes(range(256)) * 100)
    for cut in range(2, len(packed)):
        with pytest.raises(OSError, match="cut short"):
            unpacked(packed[:cut], 100)
    for damaged in (packed + b"more", packed[:-6] + b"\0" + packed[-5:]):
        with pytest.raises(OSError, match="damaged"):
            unpacked(damaged, 100)
    bomb = gzip.compress(b"\0" * 5_000_000)
    assert len(bomb) < 10_000
    with pytest.raises(reading.TooLarge):
        unpacked(bomb, 100, at_most=4_999_999)
    assert len(unpacked(bomb, 100, at_most=5_000_000)) == 5_000_000
