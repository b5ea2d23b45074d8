"""Several checkpoints in order, and what tells the weights of one from those of any other.

`series` turns what a user names (hub ids with revisions, folders, folders of checkpoints) into a list. `weights_fingerprint` is the
same for the same weights, configuration, tokenizer and code, wherever they lie and whatever they are called.

When not to use it: for a single model. `load_model` takes it by name.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from uncollapse.errors import InputError
from uncollapse.files import writing
from uncollapse.sources.checkpoints import READ
from uncollapse.sources.loading import identified, on_the_hub

_STEP = re.compile(
    r"(?:^|[-_])(?:global[-_]?)?(?:checkpoint|ckpt|step|iter|iteration|epoch)[-_]?([0-9]{1,15})(?![0-9])", re.I
)
_MODELS = ("config.json", "adapter_config.json")  # a folder with one of them is a model
_SETTLED = 2.0  # seconds after which a file that changes again gets another time of change on any file system
_PIECE = 2**22  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """One of a series. `name` is what `load_model` takes, `run` the folder or hub id that it belongs to, `step` the number in its
    name; None where it has none."""

    name: str
    run: str
    step: int | None

    @property
    def label(self) -> str:
        """A short name that a file can bear.

        >>> Checkpoint("org/model@step1000", "org/model", 1000).label, Checkpoint("runs/a/checkpoint-5", "runs/a", 5).label
        ('org-model-step1000', 'a-checkpoint-5')
        """
        name = os.path.abspath(os.path.expanduser(self.name)) if _is_folder(self.name) else os.path.normpath(self.name)
        parts = name.split("/")[-2:]
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.")[:80] or "model"


def series(names: Iterable[str | os.PathLike[str]]) -> list[Checkpoint]:
    """The checkpoints that are meant, each once: the runs in the order in which they are first named, each sorted by step.

    A folder that holds folders such as `checkpoint-500` stands for all of these, and then for the model that lies in it itself, if
    there is one: a trainer leaves the finished one there. Nothing is opened.

    Raises `InputError` where nothing is named.
    """
    found: dict[str, list[Checkpoint]] = {}
    for given in names:
        name = os.fspath(given)
        for each in _inside(name) or [name]:
            checkpoint = _checkpoint(each)
            run = found.setdefault(checkpoint.run, [])
            if checkpoint not in run:
                run.append(checkpoint)
    if not found:
        raise InputError("sweep: expected at least one model, got none. Nothing was named. Pass hub ids or folders.")
    return [each for run in found.values() for each in sorted(run, key=_order)]


def _order(checkpoint: Checkpoint) -> tuple[bool, int]:
    return checkpoint.step is None, checkpoint.step or 0


def _is_folder(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name))


def _inside(name: str) -> list[str]:
    """The checkpoints in a folder, and the folder where it is a model, too; empty where it is none, or holds none, or is a
    checkpoint itself."""
    if not _is_folder(name) or _STEP.search(os.path.basename(os.path.normpath(name))):
        return []
    within = [entry.name for entry in os.scandir(os.path.expanduser(name)) if entry.is_dir()]
    found = [os.path.join(name, each) for each in sorted(within) if _STEP.search(each)]
    is_model = any(os.path.isfile(os.path.join(os.path.expanduser(name), file)) for file in _MODELS)
    return [*found, name] if found and is_model else found


def _checkpoint(name: str) -> Checkpoint:
    if _is_folder(name):
        name = os.path.normpath(name)
        step = _STEP.search(os.path.basename(name))
        return Checkpoint(name, (os.path.dirname(name) or ".") if step else name, int(step[1]) if step else None)
    place, revision = on_the_hub(name)
    step = _STEP.search(revision or "")
    return Checkpoint(name, place, int(step[1]) if step else None)


def weights_fingerprint(name: str, *, remembered: Path) -> str:
    """A digest of a checkpoint: of every byte that could be read from it where it is a folder, else of the hub's own commit.

    remembered: a folder for the digests of files that have not changed since (their sizes, times and inodes say so), so that
    gigabytes are read once only.

    Raises `InputError` where there is no such model, or the hub does not answer and nothing of it is stored.
    """
    return _fingerprint(name, remembered, frozenset())


def _fingerprint(name: str, remembered: Path, above: frozenset[str]) -> str:
    """`above` are the adapters on the way here: two may name each other, and loading them will say so."""
    meant = identified(name)
    if meant.folder is None:
        return hashlib.sha256(meant.fixed.encode()).hexdigest()
    above |= {os.path.realpath(meant.folder)}
    files = _files(name, meant.folder)
    base = _adapted(meant.folder)
    found = _of_files(name, files, remembered)
    if base is None or os.path.realpath(os.path.expanduser(base)) in above:
        return found
    return hashlib.sha256(f"{found} {_fingerprint(base, remembered, above)}".encode()).hexdigest()


def _of_files(name: str, files: list[tuple[str, Path]], remembered: Path) -> str:
    try:
        states = [os.stat(file) for _, file in files]
        known = remembered / hashlib.sha256(repr([*zip(files, map(_state, states), strict=True)]).encode()).hexdigest()
        with contextlib.suppress(OSError):
            if re.fullmatch("[0-9a-f]{64}", text := known.read_text("ascii", "replace")):
                return text
        found = _digest(files)
    except OSError as error:
        raise InputError(
            f"sweep: expected files that can be read in {name!r}, got {error.strerror or error} ({error.filename}). "
            "The copy may be incomplete. Save or download the model again."
        ) from None
    if time.time() - max((s.st_ctime for s in states), default=0.0) > _SETTLED:
        with contextlib.suppress(OSError):
            remembered.mkdir(exist_ok=True)
            writing.write(writing.destination(known), found.encode())
    return found


def _files(name: str, folder: Path) -> list[tuple[str, Path]]:
    """What transformers could open of a folder, each with its name there: the files in it, and those that an index names."""
    try:
        there = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError as error:
        raise InputError(
            f"sweep: expected a folder that can be read, got {name!r} ({error.strerror or error}). It may belong to somebody else. "
            "Name a folder of yours."
        ) from None
    named = {file for file in there if any(fnmatch.fnmatch(file, pattern) for pattern in READ)}
    for index in sorted(file for file in named if file.endswith(".index.json")):
        named |= {file for file in _named_by(folder / index) if (folder / file).is_file()}
    return [(file, folder / file) for file in sorted(named)]


def _adapted(folder: Path) -> str | None:
    """The model that the adapter in a folder is for: its weights are read, too, from wherever they are."""
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (ValueError, RecursionError, TypeError, KeyError, OSError):
        return None  # no adapter; or loading it will say what is wrong with it
    return base if isinstance(base, str) and base else None


def _named_by(index: Path) -> Iterator[str]:
    try:
        weights = json.loads(index.read_bytes())["weight_map"].values()
        yield from {file for file in weights if isinstance(file, str)}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OSError):
        return  # loading it will say what is wrong with it


def _state(found: os.stat_result) -> tuple[int, ...]:
    """What differs once a file has been written to or replaced."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def _digest(files: list[tuple[str, Path]]) -> str:
    whole = hashlib.sha256()
    for name, file in files:
        one = hashlib.sha256()
        with open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                one.update(piece)
        whole.update(f"{len(name)} {name} {one.hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
