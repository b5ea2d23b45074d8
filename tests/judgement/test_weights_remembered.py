"""What the weights say is computed once for a model, anew when they change in whatever way, and keeps no model alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.judgement import identifiability
from uncollapse.measures.weight_marks import weight_marks
from uncollapse.records.diagnosis import HeadsRecord

GIVEN = [text_batch()]


def built(family: str = "bert") -> nn.Module:
    return FAMILIES[family].build().eval()


def weight(model: nn.Module) -> nn.Parameter:
    return model.encoder.layer[1].attention.output.dense.weight  # type: ignore[no-any-return, union-attr, index]


def from_weights(records: list[HeadsRecord]) -> list[tuple[object, ...]]:
    return [tuple(getattr(r, name) for name in identifiability.FROM_WEIGHTS) for r in records]


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every matrix whose figures are computed."""
    met: list[Tensor] = []
    compute = identifiability._weight_figures

    def counted(matrix: Tensor, count: int) -> dict[str, object]:
        met.append(matrix)
        return compute(matrix, count)

    monkeypatch.setattr(identifiability, "_weight_figures", counted)
    return met


@pytest.mark.parametrize("family", ["bert", "gpt2", "albert"])
def test_weights_are_looked_into_once(family: str, decomposed: list[Tensor]) -> None:
    model = built(family)
    first = uc.identify(model, batches=GIVEN).heads
    count = len(decomposed)
    assert count == (1 if family == "albert" else 3)
    assert uc.identify(model, batches=GIVEN).heads == first
    assert uc.diagnose(model, batches=GIVEN).record.heads == first
    assert len(decomposed) == count


def swap_rows(w: Tensor) -> None:
    w.copy_(w[torch.arange(len(w)).flip(0)].clone())


def swap_columns(w: Tensor) -> None:
    w.copy_(w[:, torch.arange(w.shape[1]).roll(8)].clone())


CHANGES: dict[str, Callable[[nn.Parameter], None]] = {
    "in place": lambda w: w.detach().mul_(torch.linspace(1, 2, w.shape[1])),
    "through data": lambda w: w.data[:, :8].zero_(),
    "another tensor": lambda w: setattr(w, "data", torch.randn_like(w)),
    "one entry": lambda w: w.data[3, 5].add_(1.0),
    "rows in another order": lambda w: swap_rows(w.data),
    "heads in another order": lambda w: swap_columns(w.data),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_weights_are_looked_into_anew(change: str, decomposed: list[Tensor]) -> None:
    model = built()
    uc.identify(model, batches=GIVEN)
    decomposed.clear()
    CHANGES[change](weight(model))
    changed = uc.identify(model, batches=GIVEN).heads
    assert len(decomposed) == 1
    identifiability._remembered.clear()
    assert from_weights(uc.identify(model, batches=GIVEN).heads) == from_weights(changed)


def test_a_records_own_lists_are_not_those_that_are_remembered() -> None:
    model = built()
    first = uc.identify(model, batches=GIVEN).heads[0]
    assert first.write_space_overlap is not None
    first.write_space_overlap[0][1] = -1.0
    second = uc.identify(model, batches=GIVEN).heads[0]
    assert second.write_space_overlap is not None
    assert second.write_space_overlap[0][1] >= 0


def test_a_cut_of_a_larger_parameter_is_known_again() -> None:
    """Its bits begin in the middle of a word."""
    whole = torch.randn(1 + 8 * 3, dtype=torch.bfloat16)
    cut = whole[1:].view(8, 3)
    marks = weight_marks(cut)
    assert all(map(torch.equal, marks, weight_marks(cut.clone().as_strided((8, 3), (3, 1)))))
    whole[7] += 1
    assert not torch.equal(marks[0], weight_marks(cut)[0])


def test_what_is_remembered_keeps_no_model_alive() -> None:
    model = built()
    uc.identify(model, batches=GIVEN)
    alive = weakref.ref(model)
    assert model in identifiability._remembered
    del model
    gc.collect()
    assert alive() is None
