"""What is packaged: one version everywhere, and types for whoever uses the package."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import uncollapse as uc
from uncollapse import claims
from uncollapse.analyses.recording import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_stands_in_one_place_and_is_the_same_everywhere() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    source = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"', source.read_text("utf-8"), re.MULTILINE)
    assert Path(uc.__file__).read_text("utf-8") == source.read_text("utf-8")
    assert uc.__version__ == version
    assert versions()["uncollapse"] == version
    assert claims.verify(["pgop-overhead"], trials=1).versions["uncollapse"] == version
    # What pip knows is from the last installation: `make` installs again when pyproject.toml changes.
    assert importlib.metadata.version("uncollapse") == version
    said = subprocess.run([sys.executable, "-m", "uncollapse", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"uncollapse {version}\n"


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(uc.__file__).parent / "py.typed").read_bytes() == b""
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_the_classifiers_begin_with_the_oldest_python_that_is_required() -> None:
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["project"]["classifiers"] if re.match(rf"{prefix}3\.", c)]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    assert named == ["3.11", "3.12", "3.13"]


def test_a_type_checker_sees_every_public_name() -> None:
    """They are loaded on first use; what is imported for the type checker must be the same names."""
    tree = ast.parse(Path(uc.__file__).read_text("utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    names = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names | {"__version__"} == set(uc.__all__)
    assert all(hasattr(uc, name) for name in uc.__all__)
