"""Whether a pass runs every block as often as in the pass that was proved: no fewer, and no more of them, and no others.

What steers a model need not be seen from outside (`situations`). A loop that runs twice instead of four times would leave two
blocks without figures, one that runs six times would hide two, and a model that leaves early on short texts has blocks that only
longer ones show.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from uncollapse.anatomy.interception import ChangedPath
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.restoring import restoring

Check = Callable[[Mapping[str, Any]], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def runs_checked(model: nn.Module, anatomy: Anatomy) -> Iterator[Check]:
    """Gives a context to run `model` on a batch in. On leaving it after a whole pass, `ChangedPath` is raised unless every block
    ran as often as `anatomy.runs` says, and no module outside the blocks that did not run when the model was read. It bears that
    batch, and so does one that was raised inside."""
    met: Counter[str] = Counter()
    unseen = anatomy.unseen_outside(model)
    thread = threading.get_ident()

    @contextlib.contextmanager
    def check(batch: Mapping[str, Any]) -> Iterator[None]:
        met.clear()
        try:
            yield
            for name, expected in anatomy.runs:
                if met[name] != expected:
                    raise ChangedPath(
                        f"capture: expected {expected} runs of {name} in a pass, got {met[name]}. How often it runs depends on the "
                        "text, or on something outside the model. Diagnose it on inputs of one kind."
                    )
            for name in unseen:
                if met[name]:
                    raise ChangedPath(
                        f"capture: expected the modules that ran when the model was read, got a run of {name}. What it does was "
                        "never looked at. Diagnose it on inputs of one kind."
                    )
        except ChangedPath as changed:
            changed.batch = dict(batch)
            raise

    with restoring() as changes:
        for name in (*(name for name, _ in anatomy.runs), *unseen):

            def count(_: nn.Module, _args: Any, name: str = name) -> None:
                if threading.get_ident() == thread:
                    met[name] += 1

            changes.hook(model.get_submodule(name), "forward_pre", count)
        yield check
