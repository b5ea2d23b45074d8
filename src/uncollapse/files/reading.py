"""Files read without waiting for somebody who will not come, and no further than a bound.

A name given on a command line may lead to anything: a device that never ends, a pipe that nobody writes to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
import zlib
from collections.abc import Generator, Iterable, Iterator

PATIENCE = 5.0  # seconds in which somebody may begin to write to a named pipe
PIECE = 2**20  # bytes
GZIP = b"\x1f\x8b"  # what a gzipped file begins with


class TooLarge(OSError):  # noqa: N818 - it reads as a statement where it is caught
    """There is more to read than the bound."""


def pieces(name: str | os.PathLike[str], *, at_most: int) -> Generator[bytes, None, None]:
    """The bytes of a file, a pipe or a terminal, about a mebibyte at a time.

    Raises `OSError` with the reason where it cannot be read: also where it is a device, which may have no end, and where nobody
    writes to the pipe within `PATIENCE` seconds. Raises `TooLarge` after `at_most` bytes.
    """
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(name, flags | getattr(os, "O_BINARY", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "a zero byte is in the name") from None
    with _closing(descriptor):
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        null = stat.S_ISCHR(mode) and os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev
        if (stat.S_ISCHR(mode) and not null and not os.isatty(descriptor)) or stat.S_ISBLK(mode):
            raise OSError(errno.ENODEV, "that is a device, which may have no end")
        piece = _first(descriptor) if stat.S_ISFIFO(mode) else b""
        if not stat.S_ISREG(mode):
            os.set_blocking(descriptor, True)
        read = 0
        while piece := piece or os.read(descriptor, PIECE):
            read += len(piece)
            if read > at_most:
                raise TooLarge(errno.EFBIG, f"larger than {at_most // 2**20} MiB")
            yield piece
            piece = b""


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _first(pipe: int) -> bytes:
    """What is in the pipe first: nothing where somebody wrote nothing and has left."""
    given_up = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while True:
        seen = bool(poll.poll(50))  # something to read, or a writer who has left again
        try:
            piece = os.read(pipe, PIECE)
        except BlockingIOError:  # somebody has it open and is silent as yet: that is worth waiting for
            os.set_blocking(pipe, True)
            return os.read(pipe, PIECE)
        if piece or seen:
            return piece
        if time.monotonic() > given_up:
            raise OSError(errno.ENXIO, "that is a pipe, and nobody writes to it")


def unpacked(read: Iterable[bytes], *, at_most: int) -> Iterator[bytes]:
    """The same pieces, unpacked if they are gzipped. What a file is called does not matter.

    A small file may unpack to an endless one: raises `TooLarge` after `at_most` bytes. Raises `OSError` where the packed file is
    damaged or was cut short.
    """
    left = iter(read)
    first = b""
    for piece in left:  # a pipe may give a single byte at first
        first += piece
        if len(first) >= len(GZIP):
            break
    if not first.startswith(GZIP):
        yield from filter(None, (first,))
        yield from left
        return
    unpacking, unread, size = zlib.decompressobj(wbits=31), first, 0
    while True:
        if unpacking.eof and unread:  # several packed files, one after the other, are one
            unpacking = zlib.decompressobj(wbits=31)
        try:
            piece = unpacking.decompress(unread, PIECE)
        except zlib.error as error:
            raise OSError(errno.EIO, f"its gzip data are damaged: {error}") from None
        unread = unpacking.unused_data if unpacking.eof else unpacking.unconsumed_tail
        size += len(piece)
        if size > at_most:
            raise TooLarge(errno.EFBIG, f"larger than {at_most // 2**20} MiB")
        yield from filter(None, (piece,))
        if not unread and len(piece) < PIECE:  # else there is more to come of what was read
            unread = next(left, b"")
            if not unread:
                break
    if not unpacking.eof:
        raise OSError(errno.EIO, "its gzip data were cut short")
