"""Planted tasks for one attention layer: must its heads be told apart by position, and can they be?

Two heads read fixed places of a sequence of Gaussian contents, A the token before and B the token after (attention that is
sharp and does not learn). The stream is as wide as one head, so the output projection adds both in the same d_k channels. What
is learned is the projection and what comes behind it. Asked for is, at each position, A or B, by a rule of the position.

What no model without gates can do. Let O = (A_i, B_i) be the 2 d_k numbers of a token, independent and standard normal, and
Y = O W with any W [2 d_k, d_k]. Given Y the covariance of O is I - P, P the projector onto the r <= d_k columns of W, hence
tr Cov(A | Y) + tr Cov(B | Y) = 2 d_k - r >= d_k. No function of Y and the position, however large, has a mean squared error
below the conditional variance. Where A is asked for at half of the positions and B at the others, the error is therefore at
least d_k / 2 a token: half of the target's variance, whatever stands behind the sum. With gates the projected sum changes with
the position, and the error is about (g_B / g_A)^2 where A is asked for: as small as the gates can make it.

`switching` is the counterpart where the attention itself learns and sees positions: a head may then look elsewhere at every
position, and nothing has to be told apart behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from studies.position_gates import recovery

TOKENS, HEADS, HEAD_WIDTH, FEATURES = 32, 2, 8, 8
BATCH, STEPS, RATE, HIDDEN = 64, 500, 1e-2, 32
EVERY = 20
TASKS = ("halves", "even and odd", "everywhere alike")
ARMS = ("sinusoidal gates", "learned gates", "no gates, MLP behind")
FLOOR = {"halves": 0.5, "even and odd": 0.5, "everywhere alike": 0.0}  # of the target's variance, without gates


class WithMLP(nn.Module):
    """A plain projection, and behind it a residual MLP that knows the position: more parameters than any gates here."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(HEADS * HEAD_WIDTH, HEAD_WIDTH)
        self.table = nn.Embedding(TOKENS, FEATURES)
        self.wide, self.narrow = nn.Linear(HEAD_WIDTH + FEATURES, HIDDEN), nn.Linear(HIDDEN, HEAD_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.projection(x)
        known = torch.cat([y, self.table.weight.expand(*y.shape[:-1], -1)], -1)
        return y + self.narrow(functional.gelu(self.wide(known)))


def layer(arm: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if arm == "no gates, MLP behind":
        return WithMLP()
    return uc.PositionGatedProjection(
        nn.Linear(HEADS * HEAD_WIDTH, HEAD_WIDTH),
        HEADS,
        positions="learned" if arm == "learned gates" else "sinusoidal",
        position_width=FEATURES,
        max_positions=TOKENS,
        seed=seed,
    )


def head_outputs(contents: Tensor) -> Tensor:
    """[batch, token, 2 d_k]: head A reads the token before, head B the token after, around the ends."""
    return torch.cat([contents.roll(1, -2), contents.roll(-1, -2)], -1)


def target(task: str, outputs: Tensor) -> Tensor:
    """[batch, token, d_k], of variance 1."""
    A, B = outputs.chunk(2, -1)
    i = torch.arange(outputs.shape[-2])[:, None]
    if task == "everywhere alike":
        return (A + B) / 2**0.5
    return torch.where(i < len(i) // 2 if task == "halves" else i % 2 == 0, A, B)


class Switching(nn.Module):
    """Attention that learns and sees positions, before one of the projections above. The values carry contents only."""

    def __init__(self, arm: str, seed: int) -> None:
        super().__init__()
        self.behind = layer(arm, seed)
        self.table = nn.Embedding(TOKENS, 2 * HEAD_WIDTH)
        self.queries, self.keys = (nn.Linear(3 * HEAD_WIDTH, HEADS * HEAD_WIDTH) for _ in range(2))
        self.values = nn.Linear(HEAD_WIDTH, HEADS * HEAD_WIDTH)

    def forward(self, contents: Tensor) -> Tensor:
        z = torch.cat([contents, self.table.weight.expand(*contents.shape[:-1], -1)], -1)
        given = (self.queries(z), self.keys(z), self.values(contents))
        mixed = functional.scaled_dot_product_attention(*(x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in given))
        return self.behind(mixed.transpose(1, 2).flatten(2))


class Fixed(nn.Module):
    """The fixed attention before one of the projections."""

    def __init__(self, arm: str, seed: int) -> None:
        super().__init__()
        self.behind = layer(arm, seed)

    def forward(self, contents: Tensor) -> Tensor:
        return self.behind(head_outputs(contents))


def run(task: str, arm: str, seed: int, *, switching: bool = False, steps: int = STEPS) -> dict[str, Any]:
    """Train one layer; the error as a share of the target's variance, on contents it never saw."""
    model = Switching(arm, seed) if switching else Fixed(arm, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    draws = torch.Generator().manual_seed(seed)
    judged = torch.randn(256, TOKENS, HEAD_WIDTH, generator=torch.Generator().manual_seed(10_000 + seed))

    def loss_on(contents: Tensor) -> Tensor:
        return functional.mse_loss(model(contents), target(task, head_outputs(contents)))

    curve = []
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                curve.append((step, float(loss_on(judged))))
        if step == steps:
            break
        loss = loss_on(torch.randn(BATCH, TOKENS, HEAD_WIDTH, generator=draws))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = {"task": task, "arm": arm, "seed": seed, "curve": curve, "loss": curve[-1][1]}
    found["parameters"] = sum(p.numel() for p in model.behind.parameters())
    return found if switching else found | {"recovered": recovered(model.behind, judged)}


@torch.no_grad()
def recovered(behind: nn.Module, contents: Tensor) -> list[dict[str, Any]]:
    """What the observer of the sum recovers of both heads where the same contents recur. Here the sum is narrower than the heads
    together, and W_O has a kernel."""
    true = head_outputs(contents)[:, 0].unflatten(-1, (HEADS, -1)).double()
    found = []
    for m in (1, 2, 4, 8, TOKENS):
        at = recovery.spread(m, TOKENS)
        gated = isinstance(behind, uc.PositionGatedProjection)
        gates = behind.gates(at).double() if gated else torch.ones(m, HEADS, dtype=torch.float64)
        found.append({"positions": m, **recovery.stream(true, gates, recovery.weight_of(behind.projection))})
    return found
