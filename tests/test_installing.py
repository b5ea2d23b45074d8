"""The wheel and the source archive, built and installed where nothing else is: the commands answer from there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--wheel", "--sdist"])
def test_the_five_commands_answer_from_an_empty_environment(kind: str, tmp_path: Path) -> None:
    """Its dependencies are those of this environment, seen through a path file; the package itself is only what was built."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    builder = (WheelBuilder if kind == "--wheel" else SdistBuilder)(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path / "dist"))
    venv.create(tmp_path / "empty", with_pip=True)
    folder = tmp_path / "empty" / "bin"
    _run(
        folder / "python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        built,
        cwd=tmp_path,
    )
    assert _run(folder / "uncollapse", "--version", cwd=tmp_path)
    for command in ("diagnose", "ablate", "heads", "symmetries", "verify"):
        assert command in _run(folder / "uncollapse", command, "--help", cwd=tmp_path)


@pytest.mark.slow
def test_a_wheel_says_that_it_is_typed_and_brings_its_schemas_and_templates(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(built).namelist()
    here = {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src").rglob("*")
        if p.suffix in {".py", ".json", ".j2", ".typed"}
    }
    assert here <= set(names)
    assert "uncollapse/py.typed" in names
    assert sys.version_info >= (3, 11)
