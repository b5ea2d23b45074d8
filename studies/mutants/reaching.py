"""Which test reaches which line: all tests that may be asked, run once under coverage.py, without any change."""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from studies.mutants.drawing import PACKAGE, PACKAGES, Mutant

TESTS = (*(f"tests/{package}" for package in PACKAGES), "tests/docs/test_theory.py")
# Tests that start another process, which imports the module as it is on the disk: they cannot see the change.
ELSEWHERE = (
    "--deselect=tests/claims/test_claims_ledger.py::test_the_seed_fixes_every_figure_in_another_process_too",
    "--deselect=tests/claims/test_claims_ledger.py::test_the_claims_load_no_transformers",
    "--deselect=tests/measures/test_running.py::test_two_processes_agree_on_the_statistics_of_both",
)
OPTIONS: tuple[str, ...] = ("-x", "-q", "-p", "no:cacheprovider", *ELSEWHERE)
OPTIONS += ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")  # that was the point of it
ASKED = 30.0  # seconds of tests that a mutant meets at most
Lines = tuple[int, int]  # the first and the last


@dataclass(frozen=True)
class Reach:
    """`seconds` of each test, unchanged. `tests[path][line]`: the tests that run the line, and test files whose fixtures do."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]

    def through(self, path: str, span: Lines | None = None) -> set[str]:
        """The tests that reach a line of the span, or any line of the module."""
        lines = self.tests.get(path, {})
        found = {each for line, some in lines.items() if span is None or span[0] <= line <= span[1] for each in some}
        files = {each for each in found if "::" not in each}
        return {t for t in self.seconds if t in found or t.partition("::")[0] in files}

    def asked(self, mutant: Mutant) -> list[str]:
        """The tests that a mutant meets, in order: those that reach its statement, then the others of the same files, whose
        helpers may have kept what the first computed. In both the mirror of the module comes first, and quick tests before slow
        ones."""
        reaching = set().union(*(self.through(path, span) for path, span in where(mutant)))
        files = {test.partition("::")[0] for test in reaching}
        package, _, name = mutant.path.partition("/")
        mirror = f"tests/{package}/test_{name}"

        def place(test: str) -> tuple[bool, bool, float]:
            return test not in reaching, not test.startswith(mirror), self.seconds[test]

        kept: list[str] = []
        total = 0.0
        for test in sorted((t for t in self.seconds if t.partition("::")[0] in files), key=place):
            total += self.seconds[test]
            if kept and total > ASKED:
                break
            kept.append(test)
        return kept


def where(mutant: Mutant) -> list[tuple[str, Lines | None]]:
    """Whose lines tell that the change was met: the statement's own. Of a module's constant, the statements of functions that
    use it; where there are none, the whole module."""
    tree = ast.parse((PACKAGE / mutant.path).read_text("utf-8"))
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _contains(node, mutant)]
    within = [node for node in around if isinstance(node, ast.FunctionDef)]
    if within:
        return [(mutant.path, _header(around[-1]))]
    names, size = _bound(around[:1]), -1
    while size != len(names):  # constants made of this constant
        size = len(names)
        names |= _bound([node for node in tree.body if not isinstance(node, ast.FunctionDef) and _used(node) & names])
    users: list[tuple[str, Lines | None]] = []
    for path in (p for package in PACKAGES for p in (PACKAGE / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and _used(node) & names:
                users.append((str(path.relative_to(PACKAGE)), (node.body[0].lineno, node.end_lineno or 0)))
    return users or [(mutant.path, None)]


def _contains(node: ast.stmt, mutant: Mutant) -> bool:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return (first, 0) <= (mutant.line, mutant.column) <= (node.end_lineno or 0, node.end_col_offset or 0)


def _header(node: ast.stmt) -> Lines:
    """The lines of a statement; of a compound one, those before its body; of a function, its body."""
    body = getattr(node, "body", None)
    if isinstance(node, ast.FunctionDef):
        return node.body[0].lineno, node.end_lineno or 0
    return (node.lineno, max(node.lineno, body[0].lineno - 1)) if body else (node.lineno, node.end_lineno or 0)


def _bound(nodes: list[ast.stmt]) -> set[str]:
    """The names that statements of a module bind."""
    names = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    targets = [t for node in nodes if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return names | {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}


def _used(node: ast.AST) -> set[str]:
    found = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Load)}
    return found | {leaf.attr for leaf in ast.walk(node) if isinstance(leaf, ast.Attribute)}


def reached(kept: Path | None = None) -> Reach:
    """Run all tests once, each folder in a process of its own, and say which lines each test reaches. Ends the program if one
    fails. What is in the file `kept` is taken from there, and the rest is added to it.
    """
    known: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept is not None and kept.exists() else {}
    for folder in TESTS:
        if folder in known:
            continue
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    code = _recorded(folder, Path(file.name))
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"mutants: tests fail without any change. Run them first: pytest {folder}")
            known[folder] = json.load(file)
        if kept is not None:
            kept.write_text(json.dumps(known), "utf-8")
    seconds = {test: taken for one in known.values() for test, taken in one["seconds"].items()}
    tests: dict[str, dict[int, list[str]]] = {}
    for one in known.values():
        for path, lines in one["tests"].items():
            for line, some in lines.items():
                tests.setdefault(path, {}).setdefault(int(line), []).extend(some)
    return Reach(seconds, tests)


def _recorded(folder: str, out: Path) -> int:
    import coverage

    watching = coverage.Coverage(
        data_file=None, config_file=False, include=[str(PACKAGE / package / "*.py") for package in PACKAGES]
    )
    watching.start()
    plugin = _Watch(watching)
    code = pytest.main([*OPTIONS, folder], plugins=[plugin])
    watching.stop()
    data = watching.get_data()
    tests = {}
    for path in data.measured_files():
        contexts = {line: [c for c in some if c] for line, some in data.contexts_by_lineno(path).items()}
        tests[str(Path(path).relative_to(PACKAGE))] = {line: some for line, some in contexts.items() if some}
    out.write_text(json.dumps({"seconds": plugin.seconds, "tests": tests}), "utf-8")
    return int(code)


class _Watch:
    """A plugin of pytest that tells coverage.py which test runs. What a fixture reaches counts for all tests of its file."""

    def __init__(self, watching: Any) -> None:
        self._watching, self.seconds = watching, dict[str, float]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Fixtures: the context is the test's file."""
        return (yield from self._in(item.nodeid.partition("::")[0]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """The test itself."""
        return (yield from self._in(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, call and tear-down add up."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def _in(self, context: str) -> Generator[None, Any, Any]:
        self._watching.switch_context(context)
        try:
            return (yield)
        finally:
            self._watching.switch_context("")
