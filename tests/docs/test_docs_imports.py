"""The documentation teaches public names only, and every one it names exists."""

import re
from pathlib import Path

import pytest

import uncollapse as uc

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_example_imports_the_package_and_nothing_inside_it(page: Path) -> None:
    imports = [
        line for block in _examples(page) for line in block.splitlines() if re.match(r"\s*(from|import) unc", line)
    ]
    adapters = {f"from uncollapse.{name} import MonitorCallback" for name in ("huggingface", "lightning")}
    assert set(imports) <= {"import uncollapse as uc", *adapters}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_public_name_on_a_page_exists(page: Path) -> None:
    code = " ".join([*_examples(page), *re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))])
    assert {name for name in re.findall(r"\buc\.([A-Za-z_]\w*)", code) if not hasattr(uc, name)} == set()


@pytest.mark.slow
def test_the_first_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(_examples(ROOT / "README.md")[0], "README.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}
