"""The measured cases, a file a model: compressed JSON under .cache/validity, good for as long as the code that decides them."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import torch
from pydantic import TypeAdapter

from studies import fingerprints
from studies.validity.cases import Measured, measured
from studies.validity.models import CACHE, SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
CODE = ("src/uncollapse", "studies/validity")
# What the subjects are made of beside that: the training text, the published weights, the molecules.
SUBJECT_SOURCES = ("studies/language_models.py", "studies/pretrained.py", "studies/weights.py", "studies/molecules.txt")
# Rules, pages and commands work on what was saved. A change of them costs no run.
JUDGING = (
    "src/uncollapse/__main__.py",
    "src/uncollapse/cli",
    "src/uncollapse/judgement/findings.py",
    "src/uncollapse/report",
    "studies/validity/__main__.py",
    "studies/validity/document.py",
    "studies/validity/fresh.py",
    "studies/validity/scoring.py",
)


def deciding(root: Path = ROOT) -> list[Path]:
    """The files under `root` that can change a saved case: all code but what is known to judge only, so that a new module
    counts from its first day."""
    judging = [root / name for name in JUDGING]
    code = [file for folder in CODE for file in (root / folder).rglob("*.py")]
    measuring = [file for file in code if not any(file.is_relative_to(place) for place in judging)]
    return sorted(measuring + [root / name for name in SUBJECT_SOURCES])


def fingerprint(root: Path = ROOT) -> str:
    """Of the code and the libraries whose change makes saved records worthless."""
    return fingerprints.fingerprint(deciding(root), root)


def place(name: str) -> Path:
    return CACHE / f"{name}.json.gz"


def saved(name: str) -> Measured | None:
    """The model's cases as they were saved; None where there are none."""
    if not place(name).exists():
        return None
    return TypeAdapter(Measured).validate_json(gzip.decompress(place(name).read_bytes()))


def measure(name: str, scale: float) -> str:
    """Run one model's cases and save them; what happened, in words."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = measured(SUBJECTS[name], name, fingerprint(), scale)
    CACHE.mkdir(parents=True, exist_ok=True)
    place(name).write_bytes(gzip.compress(TypeAdapter(Measured).dump_json(found), 3))
    return f"{name}: {len(found.cases)} cases, {time.perf_counter() - start:.0f} s"
