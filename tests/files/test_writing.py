"""Where an output goes: files, links, streams and devices, and what is kept of the file that was there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from uncollapse.errors import InputError
from uncollapse.files import writing
from uncollapse.records.encoding import write_atomically


def written(path: Path, text: str = "new") -> None:
    place = writing.destination(path)
    writing.try_out(place)
    writing.write(place, text.encode())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_new_file_gets_the_usual_permissions_and_the_umask_is_not_touched(
    umask: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(_: int) -> int:
        raise AssertionError("the umask belongs to the whole process: another thread may be making a file")

    monkeypatch.setattr(os, "umask", touched)
    written(tmp_path / "r")
    assert stat.S_IMODE(os.stat(tmp_path / "r").st_mode) == 0o640
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o777, 0o2644])
def test_an_existing_file_keeps_its_permissions_and_its_owner(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "r"
    file.write_text("a longer text than the new one")
    if os.getuid() == 0:
        os.chown(file, 1234, 4321)
    file.chmod(mode)
    before = file.stat()
    written(file)
    after = file.stat()
    assert file.read_text() == "new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize("link", ["link", "second", "folder/r"])
def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path, link: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/r")
    (tmp_path / "second").symlink_to(tmp_path / "link")
    (tmp_path / "folder").symlink_to("real")
    for text in ("first", "second"):  # the first time the link leads nowhere yet
        written(tmp_path / link, text)
        assert (tmp_path / "real" / "r").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["r"]


@pytest.mark.parametrize("name", [b"x" * 255, "é".encode() * 127, b"caf\xe9 \xff", b"a\nb\x1b", b"-"])
def test_every_name_that_a_file_can_have(tmp_path: Path, name: bytes) -> None:
    written(tmp_path / os.fsdecode(name))
    written(tmp_path / os.fsdecode(name))
    assert os.listdir(os.fsencode(tmp_path)) == [name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loop", "Too many levels"),
        ("folder", "not a file"),
        ("new/", "not a file"),
        ("folder/.", "not a file"),
        ("", "not a file"),
        ("missing/r", "No such file"),
        ("astray", "No such file"),
        ("file/r", "Not a directory"),
        ("pipe", "pipe or a socket"),
        ("/dev/full", "a device"),
        ("/dev/zero", "a device"),
        ("/dev/fd/97", "Bad file descriptor"),
        ("/proc/self/comm", "file of the system"),
        ("zero\0byte", "zero byte"),
        ("x" * 256, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("missing/r")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    path = os.path.join(tmp_path, name) if name else ""
    with pytest.raises(OSError, match=said):
        writing.destination(path)
    with pytest.raises(InputError, match=rf"write: expected a path that can be written, got .*{said}"):
        write_atomically(path, "new")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_stream_is_written_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("yesterday\n")
    inode = file.stat().st_ino
    with file.open("a") as log:
        log.write("before\n")
        log.flush()
        written(Path(f"/dev/fd/{log.fileno()}"), "record\n")
        log.write("after\n")
    assert file.read_text() == "yesterday\nbefore\nrecord\nafter\n"
    assert file.stat().st_ino == inode


def test_a_stream_that_is_open_for_reading_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("kept")
    with (tmp_path / "r").open() as stream, pytest.raises(OSError, match="Bad file descriptor"):
        writing.destination(f"/dev/fd/{stream.fileno()}")
    assert (tmp_path / "r").read_text() == "kept"


def test_what_was_printed_before_stands_before() -> None:
    code = (
        "from uncollapse.records.encoding import write_atomically\n"
        "print('one'); write_atomically('/dev/stdout', 'two\\n'); print('three')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"one\ntwo\nthree\n"


def test_the_null_device_takes_everything_and_stays() -> None:
    written(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    (tmp_path / "r").write_text("old")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    place = writing.destination(tmp_path / "r")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space"):
        writing.write(place, b"new")
    monkeypatch.undo()
    assert (tmp_path / "r").read_text() == "old"
    assert os.listdir(tmp_path) == ["r"]


def test_an_interrupt_at_any_line_leaves_the_old_or_the_new_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "r"
    outcomes = set()
    for line in range(1, 200):
        file.write_text("old")
        met = 0

        def trace(frame: object, event: str, _: object, line: int = line) -> object:
            nonlocal met
            if getattr(frame, "f_code").co_filename == writing.__file__ and event == "line":  # noqa: B009 - frame is an object here
                met += 1
                if met == line:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            writing.write(writing.destination(file), b"new")
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if met < line:
            break
        outcomes.add(file.read_text())
        assert [each for each in os.listdir(tmp_path) if each != "r"] == [], f"left at line {line}"
    assert outcomes == {"old", "new"}
    assert line > 30


def test_a_file_in_whose_folder_nothing_can_be_made_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r"
    file.write_text("a longer text than the new one")
    inode, real = file.stat().st_ino, os.open

    def no_new_files(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", no_new_files)
    written(file)
    assert (file.read_text(), file.stat().st_ino) == ("new", inode)
    with pytest.raises(PermissionError):
        written(tmp_path / "new")


def test_two_names_of_one_place() -> None:
    def at(name: str) -> writing.Destination:
        return writing.destination(name)

    assert at("nowhere-yet").is_same_as(at("./nowhere-yet"))
    assert not at("nowhere-yet").is_same_as(at("another"))
    assert not at("/dev/null").is_same_as(at("/dev/null"))
