"""The measured cases, a file a model: compressed JSON under .cache/validity, good for as long as the code that decides them."""

from __future__ import annotations

import gzip
import hashlib
import time
from pathlib import Path

import torch
from pydantic import TypeAdapter

from bench.validity.cases import Measured, measured
from bench.validity.models import CACHE, SUBJECTS

ROOT = Path(__file__).resolve().parents[2]
# What decides the records: what is planted, and what is measured of it.
PLANTED = ("models", "planting", "cases")
MEASURES = ("geometry", "mixing", "heads", "capture")


def fingerprint() -> str:
    """Of the code whose change makes saved records worthless."""
    files = [Path(__file__).parent / f"{n}.py" for n in PLANTED] + [ROOT / f"src/uncollapse/{n}.py" for n in MEASURES]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


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
