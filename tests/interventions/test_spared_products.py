"""What a removed MLP would compute is not computed, unless somebody would see it; every figure stays what it was."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.kept_weights import counted_reads
from tests.helpers.own_models import OwnGPT, tokens
from uncollapse.interventions.spared_products import SparedProducts

WIDTH, HIDDEN = 32, 512


def batch(sequences: int = 3, length: int = 9) -> dict[str, Tensor]:
    return {"idx": tokens(sequences, length)}


class MLP(nn.Module):
    """Keeps what it last made of its first product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.up(x)
        made: Tensor = self.down(nn.functional.gelu(self.seen))
        return made


class Model(OwnGPT):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = MLP()


def operations(model: nn.Module, given: dict[str, Tensor], **asked: Any) -> int:
    """Multiplications and additions of an ablation of a model that is known, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        uc.ablate(model, batches=[given], **asked)
    return int(counter.get_total_flops())


def compute_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparedProducts, "away", lambda _: contextlib.nullcontext(False))


def compared(
    model: nn.Module, given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **asked: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runs and verdicts of an ablation, and of one in which everything is computed."""
    spared = asdict(uc.ablate(model, batches=given, **asked).record)
    compute_everything(monkeypatch)
    whole = asdict(uc.ablate(model, batches=given, **asked).record)
    monkeypatch.undo()
    return {k: spared[k] for k in ("runs", "verdicts")}, {k: whole[k] for k in ("runs", "verdicts")}


@pytest.mark.parametrize(
    "kind", ["bert", "albert", "gpt2", "llama", "t5", "bart", "phi", "gemma3", "mixtral", "opt", "olmo2", "vit"]
)
def test_every_figure_is_the_same_in_every_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [inputs_for(FAMILIES[kind], seed=seed) for seed in range(2)]
    spared, whole = compared(FAMILIES[kind].build(), given, monkeypatch, grid=True)
    assert repr(spared) == repr(whole)


@pytest.mark.parametrize(("blocks", "away"), [(None, 3), ([1], 1)])
def test_products_are_not_computed_where_their_mlp_is_away(
    blocks: list[int] | None, away: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sequences, length = Model().eval(), 16, 40
    given = batch(sequences, length)
    asked: dict[str, Any] = {"without": [("mlp",)], "blocks": blocks}
    uc.ablate(model, batches=[given], **asked)
    spared = operations(model, given, **asked)
    compute_everything(monkeypatch)
    saved = operations(model, given, **asked) - spared
    all_of_them = away * 2 * sequences * length * 2 * WIDTH * HIDDEN
    assert 0.8 * all_of_them < saved < all_of_them  # less some passes over a few tokens, by which it is asked


class Telling(Model):
    """Also gives how large its second hidden layer is, by a way on which neither NaN nor infinity stay."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, idx: Tensor) -> Tensor:
        x = super().forward(idx)
        seen = self.blocks[1].mlp.seen
        match self.how:
            case "above":
                return x + (seen.max() > 50).to(x.dtype)
            case "below":
                return x + (seen.min() < -50).to(x.dtype)
        return x + torch.nan_to_num(seen, 0.0, 0.0, 0.0).mean()


@pytest.mark.parametrize("how", ["above", "below", "finite"])
def test_what_is_seen_elsewhere_is_computed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Telling(how).eval()
    spared, whole = compared(model, [batch()], monkeypatch, without=[("mlp",)])
    assert repr(spared) == repr(whole)
    seen: list[Tensor] = []
    own = nn.functional.gelu
    monkeypatch.setattr(nn.functional, "gelu", lambda x: seen.append(x.clone()) or own(x))
    uc.ablate(model, batches=[batch()], without=[("mlp",)])
    assert all(bool(each.any()) for each in seen[-3:])  # those of the last pass


class Long(Model):
    """Reads its second hidden layer on texts of more tokens than it is proved on: in its output, or in its stream."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, idx: Tensor) -> Tensor:
        x, is_long = self.token(idx), idx.shape[1] > 16
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and self.inside and is_long:
                x = x + block.mlp.seen.mean()
        x = self.head(self.norm(x))
        return x + block.mlp.seen.mean() if is_long and not self.inside else x


@pytest.mark.parametrize("inside", [False, True])
def test_what_only_longer_texts_show_is_noticed(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Long(inside).eval()
    given = [batch(4, length) for length in (12, 40)]
    spared, whole = compared(model, given, monkeypatch, grid=True)
    assert repr(spared) == repr(whole)


def test_hooks_of_somebody_else_see_what_the_mlp_makes() -> None:
    model = Model().eval()
    seen: list[Tensor] = []
    model.blocks[2].mlp.register_forward_hook(lambda _module, _args, made: seen.append(made.clone()))
    uc.ablate(model, batches=[batch()], without=[("mlp",)])
    assert all(bool(each.any()) for each in seen)


def test_weights_kept_elsewhere_are_not_read_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    uc.ablate(model, batches=[batch()], without=[("mlp",)])
    reads = counted_reads(monkeypatch)
    uc.ablate(model, batches=[batch()], without=[("mlp",)])
    times = dict(reads)
    compute_everything(monkeypatch)
    reads.clear()
    uc.ablate(model, batches=[batch()], without=[("mlp",)])
    assert times == dict(reads)


def test_the_model_computes_all_of_it_again_afterwards() -> None:
    model, given = Model().eval(), batch()
    with torch.no_grad():
        before = model(**given)
        uc.ablate(model, batches=[given], grid=True)
        assert torch.equal(model(**given), before)
        assert bool(model.blocks[0].mlp.seen.any())
