"""A model is freed with `del`, by reference count alone, and a process that diagnoses for hours stays as it is."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import uncollapse as uc
from tests.helpers.interrupted import BATCH, llama, standing
from tests.helpers.own_models import OwnGPT, tokens
from uncollapse.analyses.result import Recorded


def entered(model: nn.Module, batch: Any) -> None:
    with uc.without(model, "mlp", batch=batch), uc.without(model, "norm"):
        model(**batch)


def gated(model: nn.Module, batch: Any) -> None:
    uc.install_gates(model, batch=batch)
    model(**batch)


def gated_and_freed_of_it(model: nn.Module, batch: Any) -> None:
    gated(model, batch)
    uc.remove_gates(model)


def refused(model: nn.Module, batch: Any) -> None:
    with pytest.raises(uc.UncollapseError):
        uc.diagnose(model, batches=[{k: v[:, :0] for k, v in batch.items()}])


USES: list[Callable[[nn.Module, Any], object]] = [
    lambda model, batch: uc.diagnose(model, batches=[batch], level="full"),
    lambda model, batch: uc.ablate(model, batches=[batch], without=[("mlp",)]),
    lambda model, batch: uc.identify(model, batches=[batch]),
    lambda model, batch: uc.symmetries(model, batches=[batch]),
    lambda model, batch: list(uc.head_contributions(model, batch)),
    entered,
    gated,
    gated_and_freed_of_it,
    refused,
]


@pytest.fixture
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
@pytest.mark.parametrize("kind", ["transformers", "own"])
def test_a_model_is_freed_with_del(use: Callable[[nn.Module, Any], object], kind: str) -> None:
    model: nn.Module = llama().eval() if kind == "transformers" else OwnGPT().eval()
    batch = BATCH if kind == "transformers" else {"idx": tokens()}
    found = use(model, batch)
    freed = weakref.ref(model)
    del model
    assert freed() is None
    assert found is None or isinstance(found, (Recorded, list))


STATM = Path("/proc/self/statm")


def resident() -> float:
    """MiB held now. The peak of the process would hide a leak behind whatever an earlier test has taken."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")
def test_five_hundred_diagnoses_leave_no_hook_and_take_no_memory() -> None:
    model = llama()
    uc.diagnose(model, batches=[BATCH])
    before = standing(model)
    sizes = []
    for number in range(500):
        uc.diagnose(model, batches=[BATCH])
        if number in (50, 499):
            gc.collect()
            sizes.append(resident())
        torch.set_rng_state(torch.tensor(before["process"][-1], dtype=torch.uint8))
    assert standing(model) == before
    assert sizes[1] - sizes[0] < 30, sizes  # MiB
