"""The wheel and the source archive, built and installed where nothing else is: the commands answer from there."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("diagnose", "ablate", "heads", "symmetries", "verify")


def _run(*command: str | Path, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, built in an environment that has the build tools only; those are fetched from the package index."""
    folder = tmp_path_factory.mktemp("built")
    venv.create(folder / "tools", with_pip=True)
    python = folder / "tools" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "build", cwd=folder)
    _run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    (wheel,), (source,) = ((folder / "dist").glob(f"*{end}") for end in (".whl", ".tar.gz"))
    return {"wheel": wheel, "sdist": source}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_five_commands_answer_from_an_empty_environment(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    """The package is only what was built. Its dependencies, which are large, are lent by the environment of the tests."""
    venv.create(tmp_path / "empty", with_pip=True)
    folder = tmp_path / "empty" / "bin"
    (lib,) = (tmp_path / "empty" / "lib").glob("python*/site-packages")
    _run(folder / "python", "-m", "pip", "install", "--quiet", "--no-deps", built[kind], cwd=tmp_path)
    (lib / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = _run(folder / "python", "-c", "import uncollapse; print(uncollapse.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(lib)
    for command in COMMANDS:
        assert command in _run(folder / "uncollapse", command, "--help", cwd=tmp_path)
    record = tmp_path / "ledger.json"
    _run(
        folder / "uncollapse", "verify", "head-permutation", "--trials", "2", "--quiet", "--json", record, cwd=tmp_path
    )
    assert "head-permutation" in record.read_text()


@pytest.mark.slow
def test_both_bring_schemas_templates_and_the_mark_of_being_typed(built: dict[str, Path]) -> None:
    wanted = {
        str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.suffix in {".py", ".json", ".j2"}
    }
    wanted.add("uncollapse/py.typed")
    assert wanted <= set(zipfile.ZipFile(built["wheel"]).namelist())
    with tarfile.open(built["sdist"]) as source:
        names = {name.partition("/src/")[2] for name in source.getnames()}
    assert wanted <= names
