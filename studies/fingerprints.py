"""By what a study knows whether its saved numbers are still those of the present code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "transformers")


def fingerprint(files: Iterable[Path], root: Path) -> str:
    """Of these files under `root`, and of the libraries that compute."""
    found = hashlib.sha256(" ".join(metadata.version(name) for name in LIBRARIES).encode())
    for file in sorted(files):
        found.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]
