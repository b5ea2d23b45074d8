"""A stored record can be read and shown again, whichever command wrote it.

`golden/` holds one record of each kind, of a Llama with two small blocks, written before records could be read back
(by the code of commit 5923f2d). What a version has written, later versions have to read: these files are never written anew.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

import uncollapse as uc
from tests.helpers.command_line import refused
from uncollapse import records, report
from uncollapse.analyses.ledger import Verification
from uncollapse.cli.commands import main
from uncollapse.records import stored
from uncollapse.records.ablation import AblationRecord
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import to_json
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.records.ledger import Ledger
from uncollapse.records.symmetries import SymmetriesRecord

GOLDEN = Path(__file__).parent / "golden"
SCHEMAS = Path(uc.__file__).parent / "schemas"
# The record's class, what `uc.load` makes of it, and a line that its printout has.
KINDS: dict[str, tuple[type, type, str]] = {
    "diagnosis": (DiagnosisRecord, uc.Diagnosis, "tiny-llama"),
    "ablation": (AblationRecord, uc.Ablation, "doubly exponential"),
    "heads": (IdentifiabilityRecord, uc.Identifiability, "attributable with care in blocks 0–1"),
    "symmetries": (SymmetriesRecord, uc.Symmetries, "tiny-llama"),
    "ledger": (Ledger, Verification, "layernorm-matrix-rank"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `uncollapse show` in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["show", *map(str, arguments)])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


def golden(kind: str) -> Path:
    return GOLDEN / f"{kind}.json"


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every scalar of a document with its place, empty containers too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside or not value:
        yield place, value
    for key, item in inside:
        yield from leaves(item, (*place, key))


# Records of before ----------------------------------------------------------------------------------------------------


@each_kind
def test_a_record_of_before_loads_with_every_figure_and_fits_the_schema(kind: str) -> None:
    old = json.loads(golden(kind).read_text("utf-8"))
    record = records.load(golden(kind))
    assert type(record) is KINDS[kind][0]
    new = json.loads(to_json(record))
    there = dict(leaves(new))
    assert len(dict(leaves(old))) > 50
    assert {place: value for place, value in leaves(old) if there.get(place, "missing") != value} == {}
    schema = json.loads((SCHEMAS / f"{kind}-1.json").read_text("utf-8"))
    jsonschema.validate(new, schema)


@each_kind
def test_what_load_returns_can_do_what_the_first_result_could(kind: str, tmp_path: Path) -> None:
    result = uc.load(golden(kind))
    assert type(result) is KINDS[kind][1]
    printed = io.StringIO()
    result.show(Console(file=printed, width=100))
    assert KINDS[kind][2] in printed.getvalue()
    result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == report.draw(records.load(golden(kind)))
    result.to_json(tmp_path / "again.json")
    assert uc.load(str(tmp_path / "again.json")) == result


@each_kind
def test_a_gzipped_record_is_written_and_read_wherever_a_plain_one_is(kind: str, tmp_path: Path, run: Run) -> None:
    packed = tmp_path / "packed.json.gz"
    first = uc.load(golden(kind))
    first.to_json(packed)
    text = gzip.decompress(packed.read_bytes()).decode()
    assert json.loads(text) == json.loads(first.to_json())
    assert "\n" not in text  # nobody reads it as it is
    assert uc.load(packed) == first
    renamed = packed.rename(tmp_path / "renamed.json")  # what it holds decides, and not what it is called
    assert uc.load(renamed) == first
    assert run(renamed, "--json", tmp_path / "again.json.gz", "--quiet") == (0, "", "")
    assert (tmp_path / "again.json.gz").read_bytes() == renamed.read_bytes()  # the same record, the same bytes
    command = [sys.executable, "-m", "uncollapse", "show", "-", "--json", "-", "--quiet"]
    if kind == "heads":
        done = subprocess.run(command, input=renamed.read_bytes(), capture_output=True, check=True)
        assert done.stdout.decode() == first.to_json()


def test_a_gzipped_record_that_is_no_record_is_refused_in_one_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LIMIT", 3 * 2**20)
    whole = gzip.compress(golden("heads").read_bytes())
    cases = {
        "cut": whole[:-9],
        "page": gzip.compress(b"<!doctype html>"),
        "bomb": gzip.compress(b"{" + b" " * stored.LIMIT),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    refused(run(tmp_path / "cut"), "cut short")
    refused(run(tmp_path / "page"), "JSON object")
    refused(run(tmp_path / "bomb"), "at most 3 MiB")


def test_a_figure_that_changed_is_another_record(tmp_path: Path) -> None:
    changed = json.loads(golden("heads").read_text("utf-8"))
    changed["heads"][0]["condition_number"] += 1
    (tmp_path / "changed.json").write_text(json.dumps(changed), "utf-8")
    assert uc.load(tmp_path / "changed.json") != uc.load(golden("heads"))


def test_keys_of_other_versions_take_their_default_or_are_left_out(tmp_path: Path) -> None:
    other = json.loads(golden("diagnosis").read_text("utf-8"))
    other["a key of a later version"] = 1
    for site in other["trajectory"]:
        del site["consensus_after_norm"], site["massive_tokens_left_out"]
    (tmp_path / "other.json").write_text("\ufeff" + json.dumps(other), "utf-8")  # an editor added a byte-order mark
    record = records.load(tmp_path / "other.json")
    assert isinstance(record, DiagnosisRecord)
    assert {site.consensus_after_norm for site in record.trajectory} == {None}
    report.draw(record)


# What cannot be read --------------------------------------------------------------------------------------------------

HEADS = golden("heads").read_bytes()
REFUSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("which is empty",)),
    "not JSON": (b"# A heading", ("begins with '# A heading'",)),
    "a page": (b"<!doctype html><p>", ("begins with '<!doctype ht'", "A page holds no record")),
    "JSON but no object": (b"[1, 2]", ("expected a JSON object",)),
    "cut short": (HEADS[: len(HEADS) // 2], ("EOF", "cut short")),
    "two in one": (HEADS + HEADS, ("trailing characters",)),
    "nested without end": (b'{"schema":' + b"[" * 100_000, ("recursion",)),
    "nested without end, on a line": (b'{"schema":' + b"[" * 100_000 + b"\n", ("recursion",)),
    "not UTF-8": (HEADS.replace(b"tiny-llama", b"caf\xe9"), ("not UTF-8",)),
    "UTF-16": (HEADS.decode().encode("utf-16"), ("not UTF-8",)),
    "UTF-8 cut inside a letter": ('{"schema": "é'.encode()[:-1], ("not UTF-8",)),
    "NaN": (HEADS.replace(b'"seed": 0', b'"seed": NaN'), ("finite numbers",)),
    "beyond every float": (
        HEADS.replace(b'"condition_number": ', b'"condition_number": 1e999, "x": '),
        ("finite numbers",),
    ),
    "no schema": (b"{}", ("names no schema", "uncollapse/diagnosis/1", "uncollapse/ledger/1")),
    "a later schema": (
        HEADS.replace(b"heads/1", b"heads/2"),
        ("whose schema is 'uncollapse/heads/2'", "later version"),
    ),
    "a schema that is no text": (b'{"schema": [1]}', ("whose schema is [1]",)),
    "a field missing": (HEADS.replace(b'"heads": [', b'"hands": ['), ("IdentifiabilityRecord", "heads", "required")),
    "a field of another type": (HEADS.replace(b'"seed": 0', b'"seed": "x"'), ("probe.seed", "valid integer")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_record_is_refused_in_one_line(case: str, run: Run, tmp_path: Path) -> None:
    content, said = REFUSED[case]
    assert content != HEADS
    (tmp_path / "no record").write_bytes(content)
    with pytest.raises(uc.InputError, match=r"^load: expected ") as caught:
        uc.load(tmp_path / "no record")
    assert repr(str(tmp_path / "no record")) in str(caught.value)
    assert len(str(caught.value)) < 1000
    refused(run(tmp_path / "no record", "--html", tmp_path / "page.html"), "load: expected ", *said)
    assert os.listdir(tmp_path) == ["no record"]


def test_no_file_a_folder_and_a_name_that_is_none(run: Run, tmp_path: Path) -> None:
    refused(run(tmp_path / "none.json"), "none.json", "No such file")
    refused(run(tmp_path), "Is a directory")
    with pytest.raises(uc.InputError, match=r"^load: expected a file that can be read, got 'a\\x00b'"):
        uc.load("a\0b")
    with pytest.raises(uc.InputError, match=r"^load: expected a path, got Diagnosis\. "):
        uc.load(uc.load(golden("diagnosis")))  # type: ignore[arg-type]


def test_no_more_is_read_than_a_record_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        """Gives the same bytes for ever, and counts them."""

        def __init__(self, first: bytes) -> None:
            self.first, self.given = first, 0

        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= 2**24
            data = (self.first if self.given == 0 else b"").ljust(size)
            self.given += size
            return data

    monkeypatch.setattr(stored, "LIMIT", 5 * 2**20)
    record, other = Endless(b"{"), Endless(b"[")
    with pytest.raises(uc.InputError, match="at most 5 MiB, got a stream, which is larger"):
        records.load(record)
    assert record.given < 8 * 2**20
    with pytest.raises(uc.InputError, match="expected a JSON object"):
        records.load(other)
    assert other.given < 2 * 2**20


# The command ----------------------------------------------------------------------------------------------------------


@each_kind
def test_show_prints_the_record_and_writes_its_page(kind: str, run: Run, tmp_path: Path) -> None:
    code, out, err = run(golden(kind), "--html", tmp_path / "page.html", "--json", tmp_path / "again.json")
    assert (code, err) == (0, f"wrote {tmp_path}/page.html\nwrote {tmp_path}/again.json\n")
    assert KINDS[kind][2] in out
    record = records.load(golden(kind))
    assert (tmp_path / "page.html").read_text("utf-8") == report.draw(record)
    assert (tmp_path / "again.json").read_text("utf-8") == to_json(record)


def test_show_reads_a_pipe_writes_json_alone_to_stdout_and_loads_no_torch() -> None:
    program = (
        "import sys\nfrom uncollapse.cli.commands import main\n"
        "try: main(['show', '-', '--json', '-'])\nexcept SystemExit as ended: assert ended.code == 0\n"
        "sys.exit(', '.join(sorted({'torch', 'transformers'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=HEADS, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(to_json(records.load(golden("heads"))))
    assert b"tiny-llama" in done.stderr


def test_quiet_prints_nothing(run: Run) -> None:
    assert run(golden("heads"), "--quiet") == (0, "", "")


def test_help_teaches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for part in ("RECORD", "--json ", "--html ", "--quiet ", "Output", "Examples", "Exit codes"):
        assert part in out
    assert "uncollapse show report.json --html report.html" in out
