"""Every mutant there is, a sample of them, and what each one looks like."""

from __future__ import annotations

import ast
import difflib
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "uncollapse"
PACKAGES = ("measures", "claims", "judgement")  # mathematics, claims, findings
EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
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
Span = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of the first character and of that after the last


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place of `operator` in `path` (below the package), which begins at `line` and `column`."""

    path: str
    operator: str
    occurrence: int
    line: int
    column: int

    @property
    def module(self) -> str:
        """The module's import name."""
        return "uncollapse." + self.path.removesuffix(".py").replace("/", ".")


@dataclass(frozen=True)
class Equivalent:
    """A mutant that changes nothing that could be observed: its line before and after, and why."""

    path: str
    before: str
    after: str
    why: str


def modules(only: Sequence[str]) -> list[Path]:
    """The modules to change: all of the three packages, or those whose path begins as one of `only`."""
    every = sorted(p for package in PACKAGES for p in (PACKAGE / package).glob("*.py") if p.name != "__init__.py")
    return [p for p in every if not only or any(str(p.relative_to(PACKAGE)).startswith(each) for each in only)]


def drawn(paths: Sequence[Path], count: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of `count` mutants without replacement, and how many there are. A longer sample begins with the shorter one."""
    every = [mutant for path in paths for mutant in places(path)]
    random.Random(seed).shuffle(every)
    return every[:count], len(every)


def places(path: Path) -> list[Mutant]:
    """Every mutant of one module, without the places of `silent`, and of arithmetic only at `operations`."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source, found = path.read_text("utf-8"), []
    tree, spared, signs = get_ast(source), silent(source), operations(source)
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        starts = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        kept = [(i, at) for i, at in enumerate(starts) if not any(first <= at < last for first, last in spared)]
        if name.startswith("ReplaceBinaryOperator"):
            kept = [(i, at) for i, at in kept if any(first <= at < last for first, last in signs)]
        found += [Mutant(str(path.relative_to(PACKAGE)), name, number, *at) for number, at in kept]
    return found


def silent(source: str) -> list[Span]:
    """Spans where a change says nothing about the mathematics: the words of a refusal, `strict=` of a zip, and how many matrices a
    claim draws (`max(1, trials // 5)`), and how large ones."""
    spans: list[ast.expr | ast.stmt | ast.keyword] = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "draws":
            assert isinstance(node, ast.Call)
            spans += list(node.args)
        elif isinstance(called, ast.Name) and called.id == "max" and "trials" in ast.dump(node):
            assert isinstance(node, ast.Call)
            spans.append(node)
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "strict"):
            spans.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in spans]


def operations(source: str) -> list[Span]:
    """Where the signs of arithmetic stand. Not every star is one: to Cosmic Ray the star of a signature is a product, too."""
    spans: list[Span] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            spans.append(
                ((node.left.end_lineno or 0, node.left.end_col_offset or 0), (node.right.lineno, node.right.col_offset))
            )
        elif isinstance(node, ast.AugAssign):
            ends = node.target.end_lineno or 0, node.target.end_col_offset or 0
            spans.append((ends, (node.value.lineno, node.value.col_offset)))
    return spans


def mutated(mutant: Mutant) -> str:
    """The module's source with the change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (PACKAGE / mutant.path).read_text("utf-8")
    return mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence) or source


def change(mutant: Mutant, source: str) -> tuple[str, str]:
    """The lines before and after, in one line each."""
    before, after = (PACKAGE / mutant.path).read_text("utf-8").splitlines(), source.splitlines()
    parts = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = [part for part in parts if part[0] != "equal"]
    if not changed:
        return "", ""
    (_, i, _, k, _), (_, _, j, _, m) = changed[0], changed[-1]
    return " ".join(map(str.strip, before[i:j])), " ".join(map(str.strip, after[k:m]))


def equivalents() -> list[Equivalent]:
    """The mutants that a person has found to be equivalent."""
    return [Equivalent(**entry) for entry in tomllib.loads(EQUIVALENTS.read_text("utf-8")).get("equivalent", [])]
