"""The mutation study: which tests a mutant meets, and that the list of equivalents speaks of code that is there."""

from studies.mutants.drawing import PACKAGE, Mutant, equivalents, operations, silent
from studies.mutants.reaching import Reach, where


def at(path: str, text: str) -> Mutant:
    """A mutant that begins where the text first stands."""
    lines = (PACKAGE / path).read_text("utf-8").splitlines()
    line = next(number for number, each in enumerate(lines, 1) if text in each)
    return Mutant(path, "any", 0, line, lines[line - 1].index(text))


def test_every_equivalent_is_a_line_that_is_there() -> None:
    found = equivalents()
    assert found
    for each in found:
        lines = (PACKAGE / each.path).read_text("utf-8").splitlines()
        assert each.before in map(str.strip, lines), each.before
        assert each.before != each.after
        assert each.why
    assert len({(each.path, each.before, each.after) for each in found}) == len(found)


def test_a_mutant_meets_the_tests_that_reach_its_statement_the_nearest_and_quickest_first() -> None:
    mutant = at("measures/student.py", "fmean(values), quantile")
    mirror = "tests/measures/test_student.py"
    seconds = {f"{mirror}::slow": 3.0, f"{mirror}::quick": 1.0, f"{mirror}::other": 0.5, "tests/b.py::far": 0.1}
    seconds |= {"tests/c.py::fixture": 0.2, "tests/d.py::elsewhere": 0.1}
    reaching = [f"{mirror}::slow", f"{mirror}::quick", "tests/b.py::far", "tests/c.py"]  # the last: by a fixture
    reach = Reach(seconds, {mutant.path: {mutant.line: reaching, 1: ["tests/d.py::elsewhere"]}})
    order = [f"{mirror}::quick", f"{mirror}::slow", "tests/b.py::far", "tests/c.py::fixture", f"{mirror}::other"]
    assert reach.asked(mutant) == order
    assert Reach({**seconds, f"{mirror}::slow": 1e4}, reach.tests).asked(mutant) == order[:1]


def test_a_constant_is_met_where_it_is_used() -> None:
    (_, first, last), *more = [(path, *(span or ())) for path, span in where(at("measures/student.py", "12.706"))]
    lines = (PACKAGE / "measures" / "student.py").read_text("utf-8").splitlines()
    assert not more
    assert "return _TABLE[" in "\n".join(lines[first - 1 : last])


def test_a_condition_is_met_at_its_own_line_and_not_in_its_body() -> None:
    mutant = at("measures/line_fit.py", "n < 3")
    assert where(mutant) == [("measures/line_fit.py", (mutant.line, mutant.line))]


def test_how_many_and_how_large_matrices_are_drawn_is_left_out() -> None:
    text = "for _ in range(max(1, trials // 5)):\n    x = draws.matrix(2, 3)\n    y = max(1, 2)\n"
    assert [text.splitlines()[a[0] - 1][a[1] : b[1]] for a, b in silent(text)] == ["max(1, trials // 5)", "2", "3"]


def test_a_star_that_multiplies_nothing_is_no_arithmetic() -> None:
    source = "def f(a, *, b):\n    return g(*a, *b) ** a * c - d\n\n\nf.x *= 2\n"
    lines = source.splitlines()
    signs = {lines[row - 1][first:last].strip() for (row, first), (_, last) in operations(source)}
    assert signs == {"**", "*", "-", "*="}
    assert not any(row == 1 for (row, _), _ in operations(source))
