"""Can the signal of one head be read off the sum, where the same contents recur at several positions?

Two observers, both of whom know the gates:

* *shared channel*: sees S_p = sum_h g_h(p) O_h, d_k numbers a position, the count of the paper's n (H-1) d_k. One position gives
  one equation for H unknowns; m positions give G [m, H], and O_h = (G^+ S)_h up to H - rank G directions.
* *stream*: sees Y_p = sum_h g_h(p) O_h W_h, as wide as the model, and knows W_O. Where W_O has full row rank one position is
  enough in exact arithmetic, with gates or without; how much rounding is amplified is another question.

What is seen is rounded to bfloat16; the rest is float64. An error is ||C (found - true)|| / ||C true||, C leaving the mean over
contents out: 1 is no better than to guess a head's mean. The contents are head outputs of held-out text, put at the m positions
by hand. `recurring` puts nothing anywhere: it repeats a passage in the text and takes the head outputs as they come.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import uncollapse as uc
from studies.language_models import CONTEXT, HEADS, LanguageModel
from studies.position_gates.training import windows

POSITIONS = (1, 2, 4, 8, 16, 32, 64)
CONTENTS = 512
PASSAGE = 16


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def shared_channel(contents: Tensor, gates: Tensor) -> dict[str, Any]:
    """contents [content, head, head_width], gates [position, head]: the error of every head, and what the noise alone predicts."""
    seen = torch.einsum("ph,chk->cpk", gates, contents)
    inverse = torch.linalg.pinv(gates)
    found = torch.einsum("hp,cpk->chk", inverse, rounded(seen))
    noise = (rounded(seen) - seen).square().mean((0, 2))  # by position
    size = _centred(contents).square().mean((0, 2)).sqrt()
    return {
        "errors": errors(found, contents),
        "from_noise": ((inverse.square() @ noise).sqrt() / size).tolist(),
        "unresolved": gates.shape[1] - int(torch.linalg.matrix_rank(gates)),
    }


def stream(contents: Tensor, gates: Tensor, W: Tensor) -> dict[str, Any]:
    """The same for who sees the whole projected sum and knows W_O [mixed, width]."""
    K = torch.cat([g.repeat_interleave(len(W) // len(g))[:, None] * W for g in gates], 1)  # [mixed, position·width]
    found = rounded(contents.flatten(1) @ K) @ torch.linalg.pinv(K)
    return {
        "errors": errors(found.view_as(contents), contents),
        "unresolved": len(W) - int(torch.linalg.matrix_rank(K)),
    }


def errors(found: Tensor, true: Tensor) -> list[float]:
    """By head."""
    return (_centred(found - true).square().sum((0, 2)) / _centred(true).square().sum((0, 2))).sqrt().tolist()


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def spread(positions: int, context: int = CONTEXT) -> Tensor:
    return torch.linspace(0, context - 1, positions).round().long()


@torch.no_grad()
def head_outputs(made: LanguageModel, ids: Tensor) -> list[Tensor]:
    """[sequence, token, head, head_width] for every block, before gates and projection, in float64."""
    caught: list[Tensor] = []
    handles = [
        block.projection.register_forward_pre_hook(lambda _, given: caught.append(given[0].unflatten(-1, (HEADS, -1))))
        for block in made.blocks
    ]
    made(ids)
    for handle in handles:
        handle.remove()
    return [x.double() for x in caught]


def gates_of(projection: nn.Module, positions: Tensor, arm: str) -> Tensor:
    """[position, head]; ones where there are none."""
    if not isinstance(projection, uc.PositionGatedProjection):
        return torch.ones(len(positions), HEADS, dtype=torch.float64)
    with torch.no_grad():
        return projection.gates(positions * (arm != "constant")).double()


def weight_of(projection: nn.Module) -> Tensor:
    inner = projection.projection if isinstance(projection, uc.PositionGatedProjection) else projection
    assert isinstance(inner, nn.Linear)
    return inner.weight.detach().double().T


def placed(
    made: LanguageModel, arm: str, held_out: Tensor, positions: tuple[int, ...] = POSITIONS
) -> list[dict[str, Any]]:
    """Both observers, for every block and number of positions."""
    text = windows(held_out, most=64)[:, :-1]
    found = []
    for number, (block, outputs) in enumerate(zip(made.blocks, head_outputs(made, text), strict=True)):
        flat = outputs.flatten(0, 1)
        contents = flat[torch.linspace(0, len(flat) - 1, CONTENTS).long()]
        for m in positions:
            gates = gates_of(block.projection, spread(m), arm)
            common = {"block": number, "positions": m}
            found.append({**common, "observer": "shared channel", **shared_channel(contents, gates)})
            found.append({**common, "observer": "stream", **stream(contents, gates, weight_of(block.projection))})
    return found


def recurring(made: LanguageModel, arm: str, held_out: Tensor) -> list[dict[str, Any]]:
    """Passages repeated until the context is full. How far are a head's outputs at the copies from their mean, and what does the
    observer of the shared channel find who takes them for the same?"""
    passages = windows(held_out, PASSAGE - 1, most=64)
    copies = CONTEXT // PASSAGE
    found = []
    for number, (block, outputs) in enumerate(
        zip(made.blocks, head_outputs(made, passages.repeat(1, copies)), strict=True)
    ):
        x = outputs.unflatten(1, (copies, PASSAGE))  # [sequence, copy, place, head, head_width]
        gates = gates_of(block.projection, torch.arange(CONTEXT), arm).view(copies, PASSAGE, -1)
        seen = torch.einsum("cph,scphk->scpk", gates, x)
        inverse = torch.linalg.pinv(gates.transpose(0, 1))  # [place, head, copy]
        recovered = torch.einsum("phc,scpk->sphk", inverse, rounded(seen))
        mean = x.mean(1)
        variation = (
            (x - mean[:, None]).square().sum((0, 1, 2, 4)) / copies / _centred(mean.flatten(0, 1)).square().sum((0, 2))
        )
        found.append(
            {
                "block": number,
                "variation": variation.sqrt().tolist(),
                "errors": errors(recovered.flatten(0, 1), mean.flatten(0, 1)),
            }
        )
    return found
