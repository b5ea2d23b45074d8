"""What a fresh checkout promises: its tools run from its root, called by hand."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_plain_pytest_finds_everything_that_tests_import() -> None:
    """`python -m pytest` puts the root on the path by itself; the `pytest` command does not."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    pytest = Path(sysconfig.get_path("scripts")) / "pytest"
    run = subprocess.run(
        [pytest, "--collect-only", "tests/studies/test_validity.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tests/studies/test_validity.py::" in run.stdout
