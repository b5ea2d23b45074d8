"""One mutant, in a process of its own that imports the changed module and runs the tests it meets."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import pytest

from studies.mutants.drawing import PACKAGE, Mutant
from studies.mutants.reaching import OPTIONS

Outcome = Literal["killed", "survived", "timeout"]


def preload() -> None:
    """The slow imports, once, and nothing of the package itself."""
    import torch

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none of them is needed, and each process would load them
    for name in ("flint", "hypothesis.strategies", "jaxtyping", "numpy", "pydantic", "rich.console", "transformers"):
        importlib.import_module(name)
    torch.set_num_threads(1)


def outcome(mutant: Mutant, source: str, tests: Sequence[str], limit: float) -> Outcome:
    """Run the tests in a forked process that imports the changed module. `survived` if all pass, `timeout` after `limit` seconds:
    a loop without end is noticed, too."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            sys.meta_path.insert(0, _Finder(mutant, source))
            files = dict.fromkeys(test.partition("::")[0] for test in tests)
            code = int(pytest.main([*OPTIONS, *files], plugins=[_Chosen(tests)]))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


class _Chosen:
    """A plugin of pytest that keeps the tests given, in the order given."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep and sort."""
        items[:] = sorted((i for i in items if i.nodeid in self._place), key=lambda item: self._place[item.nodeid])


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
