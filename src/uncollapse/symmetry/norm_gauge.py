"""The directions of attention weights that a layer norm before them hides: they act only on what the norm has removed.

What leaves a layer norm with gains gamma without zeros lies in a hyperplane: u.x = u.beta with u = 1/gamma, entry by entry. So
W -> W + u c^T moves queries, keys or values by the same (u.beta) c at every token. That is nothing at all if u.beta = 0 (in
particular beta = 0), or if the role's own bias takes it back. Else keys add a constant to each row of logits, which a softmax
without sinks does not see on channels that positions do not turn; values add a constant to the output, which the output bias takes
back. The count is that of `heads.gauge_dimension` and `heads.query_key_gauge_dimension` with a norm before, less without one.

These directions belong to the norm and not to the heads. They change no count about heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from uncollapse.symmetry.channels import Channels
from uncollapse.symmetry.weight_groups import BIASES, HeadWeights, Subgroup, refusal, rows_of


@dataclass(frozen=True)
class NormGauge:
    """W -> W + u c^T for queries, keys and values that read a layer norm, with `steps[role]` c [head or group, channel] and
    `normals[role]` (u, u.beta). Where u.beta is not 0 a bias takes u.beta c back, its own or that of the output. The elements add.
    """

    steps: dict[str, Float[Tensor, "head channel"]]
    normals: dict[str, tuple[Float[Tensor, " input"], float]]
    roles: ClassVar[tuple[str, ...]] = ("queries", "keys", "values", "projection")

    def on(self, weights: HeadWeights) -> HeadWeights:
        """The weights with the hidden directions added."""
        for role, step in self.steps.items():
            normal, shift = self.normals[role]
            weight = getattr(weights, role) + normal[:, None] * step[:, None, :]
            weights = replace(weights, **{role: weight})
            bias = getattr(weights, BIASES[role])
            if bias is not None:
                weights = replace(weights, **{BIASES[role]: bias - shift * step})
            elif role == "values" and shift:
                assert weights.projection is not None
                assert weights.output_bias is not None
                own = shift * step[list(weights.groups)]
                output_bias = weights.output_bias - torch.einsum("hc,hcw->w", own, weights.projection)
                weights = replace(weights, output_bias=output_bias)
        return weights

    def compose(self, other: NormGauge) -> NormGauge:
        """Both; the order does not matter."""
        added = {role: step + other.steps.get(role, torch.zeros_like(step)) for role, step in self.steps.items()}
        return NormGauge({**other.steps, **added}, {**other.normals, **self.normals})

    def inverse(self) -> NormGauge:
        """The element that takes it away."""
        return NormGauge({role: -step for role, step in self.steps.items()}, self.normals)

    @classmethod
    def identity(cls, channels: Channels) -> NormGauge:
        """No step in any direction."""
        return cls({}, {})

    @classmethod
    def surviving(cls, channels: Channels) -> Subgroup:
        """A step for each hidden channel of queries, keys and values; where there is none, why not."""
        refused = refusal(channels, cls.roles)
        if refused is not None:
            return refused
        free, words = hidden_channels(channels), []
        for role, which in free.items():
            count = len(rows_of(channels, role).features)
            if which:
                words.append(f"{len(which)} channels of each of {count} heads' {role}")
        dimension = sum(len(rows_of(channels, role).features) * len(which) for role, which in free.items())
        if not dimension:
            told = {
                channels.reasons[f"norm before {role}"] for role in free if f"norm before {role}" in channels.reasons
            }
            return Subgroup(False, f"nothing: {'; '.join(sorted(told)) or 'what the norm adds can be seen'}", 0)
        return Subgroup(
            True,
            f"what the layer norm before them removes, added to {', '.join(words)}; not counted in the other gauges",
            dimension,
        )

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> NormGauge:
        """Steps as large as the weights themselves."""
        steps, normals = {}, {}
        for role, which in hidden_channels(channels).items():
            if which:
                before = channels.norms_before[role]
                features = rows_of(channels, role).features
                step = torch.zeros(len(features), len(features[0]), dtype=torch.float64)
                drawn = torch.randn(len(step), len(which), generator=generator, dtype=torch.float64)
                step[:, list(which)] = before.weight_size * drawn
                steps[role], normals[role] = step, (before.normal, before.shift)
        return cls(steps, normals)


def hidden_channels(channels: Channels) -> dict[str, tuple[int, ...]]:
    """Of queries, keys and values the channels, in every head, whose weights have a direction that nothing shows."""
    found: dict[str, tuple[int, ...]] = {}
    for role in ("queries", "keys", "values"):
        before, rows = channels.norms_before.get(role), rows_of(channels, role)
        every = tuple(range(len(rows.features[0])))
        if before is None:
            found[role] = ()
        elif not before.shift or rows.bias is not None:
            found[role] = every  # queries, keys or values themselves stay as they are
        elif role == "keys" and channels.norm is None and not channels.sinks and "logits" not in channels.reasons:
            found[role] = channels.free
        elif role == "values" and rows_of(channels, "projection").bias is not None and not channels.sinks:
            found[role] = every
        else:
            found[role] = ()
    return found
