"""An attention call under study: where its roles come from, what was found of them, and why something was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.vocabulary import AttentionCall, ModuleCall

Place = ModuleCall | Point
Role = Literal["queries", "keys", "values"]
ROLES: tuple[Role, ...] = ("queries", "keys", "values")


@dataclass(frozen=True)
class Rows:
    """Where one role's channels lie. `features[g][c]` is the number of channel `c` of head or key-value head `g` along `axis`
    of the parameter `weight` of the module named `module`, and in its `bias`, where there is one. `axis` is that of the outputs
    for queries, keys and values (0 in `nn.Linear`, 1 where the weight is stored transposed), and that of the inputs for the
    output projection, whose bias has no channels of heads."""

    module: str
    weight: str
    bias: str | None
    axis: int
    features: tuple[tuple[int, ...], ...]

    @property
    def place(self) -> str:
        """The qualified name of the weight."""
        return f"{self.module}.{self.weight}" if self.module else self.weight

    def index(self) -> Tensor:
        """`features` as a tensor [head, channel]."""
        return torch.tensor(self.features)


@dataclass
class StudiedCall:
    """One attention call under study. For each role `where` holds the features found [head, channel], `is_copy` whether the
    operand is just these at every token, and `law` whether it grows with them: `linear`, `norm` or `neither`."""

    block: int
    kind: Literal["self", "cross"]
    call: AttentionCall
    where: dict[str, Tensor] = field(default_factory=dict)
    is_copy: dict[str, bool] = field(default_factory=dict)
    law: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] | None = None
    norm: Literal["head", "layer"] | None = None
    sinks: bool = False
    heads_alike: bool = True
    is_refused: bool = False  # nothing of it can be acted on

    def source(self, role: str) -> Place | None:
        found: Place | None = getattr(self.call, role)
        return found

    def refuse(self, role: str, reason: str) -> None:
        self.reasons.setdefault(role, reason)

    def refuse_all(self, reason: str) -> None:
        """Refuse everything of this call."""
        self.is_refused, self.heads_alike = True, False
        for what in (*ROLES, "projection", "rotary", "logits", "heads"):
            self.refuse(what, reason)

    def unlike(self) -> None:
        """Its heads are not alike."""
        self.heads_alike = False
        self.refuse("heads", "every head has a bias, a gain or a sink of its own, so that equal heads act differently")
