"""Mutations: does a test notice when one number, sign or comparison of the mathematics, the claims or the findings changes?

    make mutants                                               # a sample of 200, an hour or more
    python -m studies.mutants --count 40 --only measures/exact.py

Cosmic Ray's operators change one place of one module: a number by one, + to -, < to <=, a condition to its negation, True to
False, a loop to none. The mutants are drawn at random, every place with the same chance, so that the share that dies is an
estimate for all of them. Each runs in a process of its own that was forked after the slow imports: no file is changed. First
the tests that mirror the module, then those of what rests on it (`stages`); the first failure kills. Tests of other packages are
not asked, so a survivor of this run may still be noticed by `make test`. All these tests must pass before anything is changed:
else every mutant they meet would seem to die.

A mutant may be *equivalent*: it changes nothing that could be observed, as `<` to `<=` where no two numbers are equal. It counts as
a survivor here all the same; the list is for a person to read. docs/decisions/0010-mutations.md says why this tool.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "uncollapse"
PACKAGES = ("measures", "claims", "judgement")  # mathematics, claims, findings
IMPORTED = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")  # that was the point of it
# Tests that start another process, which imports the module as it is on the disk: they cannot see the change.
ELSEWHERE = (
    "--deselect=tests/claims/test_claims_ledger.py::test_the_seed_fixes_every_figure_in_another_process_too",
    "--deselect=tests/claims/test_claims_ledger.py::test_the_claims_load_no_transformers",
    "--deselect=tests/measures/test_running.py::test_two_processes_agree_on_the_statistics_of_both",
)
# Tests of pieces that belong to several claims.
OTHERS = "smallest or gain or intervals or jacobian or closed_form or ball"
LIMIT = 300.0  # seconds for all tests of one mutant: a loop without end is noticed, too
OPERATORS = (
    "NumberReplacer",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceContinueWithBreak",
    "ReplaceBreakWithContinue",
    "ZeroIterationForLoop",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Not",
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, b in (("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"))),
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, b in (("FloorDiv", "Mul"), ("Pow", "Mul"), ("Mod", "Add"))),
    *(f"ReplaceComparisonOperator_{a}_{b}" for a, b in (("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt"))),
    *(
        f"ReplaceComparisonOperator_{a}_{b}"
        for a, b in (("Lt", "GtE"), ("Gt", "LtE"), ("Eq", "NotEq"), ("NotEq", "Eq"))
    ),
)
Outcome = Literal["killed", "survived", "timeout"]


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place of `operator` in `path` (below the package)."""

    path: str
    operator: str
    occurrence: int

    @property
    def module(self) -> str:
        """The module's import name."""
        return "uncollapse." + self.path.removesuffix(".py").replace("/", ".")


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant, and the line it changed."""

    mutant: Mutant
    outcome: Outcome
    change: str
    seconds: float


def stages(path: str) -> list[list[str]]:
    """The arguments of pytest, one run after the other: the tests that mirror a module, then those that rest on it.

    >>> stages("measures/exact.py")[0]
    ['tests/measures/test_exact.py']
    """
    package, _, name = path.partition("/")
    stem = name.removesuffix(".py")
    if package == "claims":
        claim = stem.replace("_", "-")
        if f'"{claim}",' in (PACKAGE / path).read_text("utf-8"):  # the tests of other claims do not run this one
            return [["tests/claims/test_verdicts.py", "-k", claim], ["tests/claims", "-k", f"{claim} or {OTHERS}"]]
        return [["tests/claims"]]
    mirror = ROOT / "tests" / package / f"test_{stem}.py"
    rest = [f"tests/{package}", *(["tests/claims/test_verdicts.py"] if package == "measures" else [])]
    return [*([[str(mirror.relative_to(ROOT))]] if mirror.exists() else []), rest]


def places(path: Path) -> list[Mutant]:
    """Every mutant of one module, without the places of `silent`."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source, found = path.read_text("utf-8"), []
    tree, spared = get_ast(source), silent(source)
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        starts = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        kept = [i for i, at in enumerate(starts) if not any(first <= at < last for first, last in spared)]
        found += [Mutant(str(path.relative_to(PACKAGE)), name, number) for number in kept]
    return found


def silent(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans (line, column) where a change says nothing about the mathematics: the words of a refusal, `strict=` of a zip, and how
    large the matrices are that a claim draws."""
    spans: list[ast.expr | ast.stmt | ast.keyword] = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "draws":
            assert isinstance(node, ast.Call)
            spans += list(node.args)
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "strict"):
            spans.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in spans]


def mutated(mutant: Mutant) -> str:
    """The module's source with the change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / mutant.path).read_text("utf-8")
    return mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence) or source


def change(mutant: Mutant, source: str) -> str:
    """The line before and after, with its number."""
    before = (PACKAGE / mutant.path).read_text("utf-8").splitlines()
    lines = difflib.SequenceMatcher(None, before, source.splitlines(), autojunk=False).get_opcodes()
    parts = [
        f"{mutant.path}:{i + 1}: {' '.join(map(str.strip, before[i:j]))}  →  {' '.join(map(str.strip, source.splitlines()[k:m]))}"
        for tag, i, j, k, m in lines
        if tag != "equal"
    ]
    return "; ".join(parts)


class _Source(importlib.machinery.SourceFileLoader):
    """A module from given source instead of its file's; no compiled file is read or written."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> Any:
        """The code of the given source."""
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant, source: str) -> None:
        self._mutant, self._source = mutant, source

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The changed module; everything else is found as usual."""
        if fullname != self._mutant.module:
            return None
        file = str(PACKAGE / self._mutant.path)
        return importlib.util.spec_from_file_location(fullname, file, loader=_Source(fullname, file, self._source))


def passes(mutant: Mutant, source: str) -> Outcome:
    """Run the tests in a forked process that imports the changed module; `survived` if all pass."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            sys.meta_path.insert(0, _Finder(mutant, source))
            code = _tested(mutant.path)
        finally:
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _tested(path: str) -> int:
    import pytest

    for arguments in stages(path):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *IMPORTED, *ELSEWHERE, *arguments])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return 1
    return 0


def drawn(paths: Sequence[Path], count: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of `count` mutants without replacement, and how many there are. A longer sample begins with the shorter one."""
    every = [mutant for path in paths for mutant in places(path)]
    random.Random(seed).shuffle(every)
    return every[:count], len(every)


def modules(only: Sequence[str]) -> list[Path]:
    """The modules to change: all of the three packages, or those whose path begins as one of `only`."""
    every = sorted(p for package in PACKAGES for p in (PACKAGE / package).glob("*.py") if p.name != "__init__.py")
    return [p for p in every if not only or any(str(p.relative_to(PACKAGE)).startswith(each) for each in only)]


def main() -> None:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants to draw (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a path below src/uncollapse, or how it begins")
    parser.add_argument("--out", type=Path, help="one JSON line a mutant; goes on where it stopped")
    given = parser.parse_args()
    os.chdir(ROOT)
    sample, total = drawn(modules(given.only), given.count, given.seed)
    known = {v.mutant: v for v in _read(given.out)}
    _preload()
    if not sample:
        sys.exit(
            f"mutants: expected modules of {', '.join(PACKAGES)}, got --only {' '.join(given.only)}. Nothing to draw."
        )
    for package in dict.fromkeys(mutant.path.partition("/")[0] for mutant in sample):
        clean = Mutant(f"{package}/__init__.py", "none", 0)  # its tests are those of the whole package
        if passes(clean, (PACKAGE / clean.path).read_text("utf-8")) != "survived":
            (tests,) = stages(clean.path)
            sys.exit(f"mutants: tests fail without any change. Run them first: pytest {' '.join(tests)}")
    verdicts = []
    for number, mutant in enumerate(sample, 1):
        verdict = known.get(mutant)
        if verdict is None:
            start, source = time.monotonic(), mutated(mutant)
            outcome = passes(mutant, source)
            verdict = Verdict(mutant, outcome, change(mutant, source), time.monotonic() - start)
            if given.out is not None:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
        verdicts.append(verdict)
        if verdict.outcome == "survived":
            print(f"survived  {verdict.change}", flush=True)
        elif number % 20 == 0:
            print(f"{number} of {len(sample)}", file=sys.stderr, flush=True)
    dead = sum(v.outcome != "survived" for v in verdicts)
    print(
        f"{dead} of {len(verdicts)} mutants die ({dead / len(verdicts):.1%}), drawn from {total} with seed {given.seed}."
    )


def _read(path: Path | None) -> Iterator[Verdict]:
    if path is None or not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut short
            found = json.loads(line)
            yield Verdict(Mutant(**found.pop("mutant")), **found)


def _preload() -> None:
    """The slow imports, once, and nothing of the package itself."""
    import torch

    for name in ("flint", "numpy", "transformers"):
        importlib.import_module(name)
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
