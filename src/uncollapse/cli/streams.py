"""The streams that a command is started with, whatever their state: closed, full, in another encoding, at the end of a pipe.

A command prints what it found to stdout and everything else to stderr. What cannot be printed to stdout is an error, in one line
and with its own exit code. What cannot be printed to stderr is lost: there is no other place to say so.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from uncollapse.errors import InputError
from uncollapse.files import writing
from uncollapse.legible import encodable

BROKEN_PIPE = 141  # what a shell reports of a program that was ended by SIGPIPE
NARROW, USUAL, WIDE = 40, 80, 1000  # columns of a terminal that says nothing sensible about itself
_WIDTHS = {"COLUMNS": (NARROW, WIDE), "LINES": (1, WIDE), "TERMINAL_WIDTH": (NARROW, WIDE)}
_REFUSED_WRITES = (errno.EBADF, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENXIO, errno.EPERM)


class _Lossy(io.TextIOBase):
    """A stream like the one it holds, which never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed meanwhile
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has an attribute here; this one follows the stream's
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]  # likewise
        return self._stream.errors


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Bring stdin, stdout, stderr and the width of the terminal into a state that everybody can work with."""
    _occupy_closed_descriptors()
    said = {name: os.environ.get(name) for name in _WIDTHS}
    stdout, stderr = sys.stdout, sys.stderr
    errors = [(stream, stream.errors) for stream in (stdout, stderr) if isinstance(stream, io.TextIOWrapper)]
    try:
        _sensible_width()
        for stream, _ in errors:
            stream.reconfigure(errors=_ERRORS)
        sys.stderr = _Lossy(stderr)
        yield
    finally:
        for name, value in said.items():
            if value is not None:
                os.environ[name] = value
        sys.stderr.flush()
        sys.stdout, sys.stderr = stdout, stderr  # typer puts others in their place where a pipe is broken
        for stream, before in errors:
            with contextlib.suppress(OSError, ValueError):  # it may be full or gone: whatever it still held is lost
                stream.reconfigure(errors=before)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """What of other libraries does not load here is not the user's concern. Not through `restoring`: that would import torch, and
    the process ends with the command."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _occupy_closed_descriptors() -> None:
    """Give a closed stream a descriptor that fails as a closed one does. The next file opened would else become stdout."""
    for number, name, flags, mode in (
        (0, "stdin", os.O_WRONLY, "r"),
        (1, "stdout", os.O_RDONLY, "w"),
        (2, "stderr", os.O_WRONLY, "w"),
    ):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free, which is this one
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open


def _sensible_width() -> None:
    """What the environment says of the terminal's size, where it is a number that one can print in; otherwise nothing."""
    for name, (least, most) in _WIDTHS.items():
        given = os.environ.get(name)
        if given is None:
            continue
        if re.fullmatch(r"[0-9]{1,9}", given) and int(given) > 0:
            os.environ[name] = str(max(least, min(most, int(given))))
        else:
            del os.environ[name]


def require_stdout(needed_by: str) -> None:
    """Refuse a stdout that is closed, or a device that keeps nothing, before the work whose result would be lost."""
    try:
        writing.stream(sys.stdout.fileno())
    except (AttributeError, io.UnsupportedOperation):  # no stream of the system: a notebook's, or a test's
        return
    except OSError as error:
        raise stdout_refused(error, needed_by) from None


def stdout_refused(error: OSError, needed_by: str = "the result") -> InputError:
    return InputError(
        f"stdout: expected a stream that takes {needed_by}, got one that does not ({error.strerror or error}). "
        "It may be closed, or its disk full. Redirect it, or pass --quiet with --json FILE or --html FILE."
    )


def is_refused_write(error: OSError) -> bool:
    """Whether a stream of the process refused to take more, as opposed to a file that could not be opened."""
    return error.errno in _REFUSED_WRITES and error.filename is None


def let_go_of_stdout() -> None:
    """Point stdout at the null device. What it still holds would fail again when Python ends, and change the exit code."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
        os.dup2(null, sys.stdout.fileno())
        sys.stdout.flush()
    os.close(null)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: letters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return encodable(error.object[error.start : error.end], error.encoding), error.end


_ERRORS = "uncollapse.legible"
codecs.register_error(_ERRORS, _spelled_out)
