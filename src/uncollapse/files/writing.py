"""Where an output goes, and how it gets there.

A name may lead to a file, to nothing yet, to a device, or to a stream that this process already has open (`/dev/stdout`,
`/dev/fd/3`). `destination` follows it as the system would and refuses what would lose something. `write` then writes a file so
that a reader sees either the old one or the complete new one, and a stream as a stream.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import select
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_LINKS = 40  # as many as the system follows
_PRIVATE = 0o700
# A folder in which no file can be made, or a file that cannot be exchanged: the file itself may still be writable.
_NOT_EXCHANGED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


@dataclass(frozen=True)
class Destination:
    """A place that an output can be written to.

    path: the file behind all links, in a folder that exists; None for a stream of this process.
    descriptor: the number of that stream. existing: what is there now, None where nothing is.
    """

    path: str | None
    descriptor: int | None
    existing: os.stat_result | None

    @property
    def is_file(self) -> bool:
        """Whether it is, or will be, a file with content, and not a device or a pipe."""
        return self.existing is None or stat.S_ISREG(self.existing.st_mode)

    def is_same_as(self, other: Destination) -> bool:
        """Whether what is written to the one ends up in the other, too. What goes to the null device ends up nowhere."""
        if self.existing is None or other.existing is None:
            return self.path is not None and self.path == other.path
        return os.path.samestat(self.existing, other.existing) and not _is_null(self.existing)


def destination(name: str | os.PathLike[str]) -> Destination:
    """What `name` leads to, following links.

    Raises `OSError` with the reason where nothing can be written: a folder, a missing folder, links in a circle, a closed
    stream, a named pipe (nobody may ever read it), a device that keeps nothing or is no terminal, a file of the system.
    """
    path = os.fspath(name)
    if "\0" in path:
        raise OSError(errno.EINVAL, "a zero byte is in the name")
    for _ in range(_LINKS):
        folder, last = os.path.split(path)
        if last in ("", ".", ".."):
            raise OSError(errno.EISDIR, "that is not a file")
        folder = os.path.realpath(folder or ".", strict=True)
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path = os.path.join(folder, last)
        descriptor = _descriptor(folder, last)
        if descriptor is not None:
            return stream(descriptor)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return Destination(path, None, None)
        if not stat.S_ISLNK(found.st_mode):
            return _file(path, folder, found)
        path = os.path.join(folder, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def stream(descriptor: int) -> Destination:
    """The stream of this process with that number. Raises `OSError` where it is closed, only for reading, or keeps nothing."""
    found = os.fstat(descriptor)
    if stat.S_ISCHR(found.st_mode) and not _is_null(found) and not os.isatty(descriptor):
        raise OSError(errno.ENODEV, "that is a device")
    if stat.S_ISBLK(found.st_mode):
        raise OSError(errno.ENODEV, "that is a device")
    os.write(descriptor, b"")  # a stream that is open for reading only says so
    return Destination(None, descriptor, found)


def _descriptor(folder: str, last: str) -> int | None:
    own = rf"/dev/fd|/proc/(self|thread-self|{os.getpid()})(/task/\d+)?/fd"
    return int(last) if re.fullmatch(own, folder) and re.fullmatch(r"[0-9]{1,9}", last) else None


def _file(path: str, folder: str, found: os.stat_result) -> Destination:
    mode = found.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "that is not a file")
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.ENODEV, "that is a pipe or a socket, and nobody may be reading it")
    if not stat.S_ISREG(mode) and not _is_null(found) and not _is_terminal(path, found):
        raise OSError(errno.ENODEV, "that is a device")
    if stat.S_ISREG(mode) and re.match(r"/(proc|sys)/", folder + "/"):
        raise OSError(errno.EPERM, "that is a file of the system")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return Destination(path, None, found)


def _is_null(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat(os.devnull).st_rdev


def _is_terminal(path: str, found: os.stat_result) -> bool:
    if not stat.S_ISCHR(found.st_mode):
        return False
    with _opened(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY) as descriptor:
        return os.isatty(descriptor)


@contextlib.contextmanager
def _opened(path: str, flags: int, mode: int = 0o666) -> Iterator[int]:
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_out(place: Destination) -> None:
    """Do what `write` will do later, without a trace. Raises `OSError` where it could not."""
    if place.path is None or not place.is_file:
        return
    try:
        with _temporary(place):
            pass
    except OSError as error:
        if place.existing is None or error.errno not in _NOT_EXCHANGED:
            raise
        with _opened(place.path, os.O_WRONLY):
            pass


def write(place: Destination, data: bytes) -> None:
    """Write `data` to the place: a file completely or not at all, with the permissions and the owner of the one before.

    Where no file can be made beside it, or nobody else may own it, the file itself is rewritten, after room was made for all of
    it. Raises `OSError`; no temporary file remains.
    """
    if place.path is None:
        assert place.descriptor is not None
        into_stream(place.descriptor, data)
    elif not place.is_file:
        with _opened(place.path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)) as descriptor:
            _all(descriptor, data)
    else:
        try:
            _exchange(place, data)
        except OSError as error:
            if place.existing is None or error.errno not in _NOT_EXCHANGED:
                raise
            _rewrite(place.path, data)


def into_stream(descriptor: int, data: bytes) -> None:
    """Write to a stream of this process, after what was printed to it before."""
    for printed in (sys.stdout, sys.stderr):
        if printed is not None:
            printed.flush()
    _all(descriptor, data)


def _exchange(place: Destination, data: bytes) -> None:
    assert place.path is not None
    with _temporary(place) as (temporary, descriptor):
        _all(descriptor, data)
        if place.existing is not None:
            _keep(place.path, place.existing, descriptor)
        os.replace(temporary, place.path)


@contextlib.contextmanager
def _temporary(place: Destination) -> Iterator[tuple[str, int]]:
    """A new file beside the destination, under a name of its own: the destination's may be as long as a name can be."""
    assert place.path is not None
    name = os.path.join(os.path.dirname(place.path), f".uncollapse-{secrets.token_hex(8)}.tmp")
    # Nobody else may read it before it has the permissions of the file that it replaces. A new file gets the usual ones.
    mode = 0o666 if place.existing is None else stat.S_IMODE(place.existing.st_mode) & _PRIVATE
    try:
        with _opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as descriptor:
            yield name, descriptor
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _keep(path: str, existing: os.stat_result, descriptor: int) -> None:
    """Give the new file the owner, the attributes and the permissions of the old one. Raises `PermissionError` if it may not."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (existing.st_uid, existing.st_gid):
        os.fchown(descriptor, existing.st_uid, existing.st_gid)
    with contextlib.suppress(OSError, AttributeError):  # no system but Linux has them, and not every file system
        for attribute in os.listxattr(path):
            os.setxattr(descriptor, attribute, os.getxattr(path, attribute))
    os.chmod(descriptor, stat.S_IMODE(existing.st_mode))


def _rewrite(path: str, data: bytes) -> None:
    with _opened(path, os.O_WRONLY) as descriptor:
        before = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, 0, max(len(data), 1))  # a full disk says so before a byte has changed
        except AttributeError:  # no such call on this system
            pass
        except OSError as error:  # no such call on this file system
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                os.ftruncate(descriptor, before)
                raise
        _all(descriptor, data)
        os.ftruncate(descriptor, len(data))


def _all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # somebody set the stream so that it does not wait: wait here
            select.select([], [descriptor], [])
