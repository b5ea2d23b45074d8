"""The four collapses: the symmetry behind each, how far this model is from it along depth, and what keeps it there.

Each collapse brings the model close to a set of states defined by a symmetry. The order parameter is the distance from that
set. Two kinds of components act against a collapse. *Breakers* do not respect the symmetry. *Stabilisers* respect it and still
drive the model away from the collapsed set. Both are read off the records and the proved anatomy. What the groups do to the
live model is measured by `uncollapse symmetries`.

When not to use it: to judge. `findings` decides which value counts as a collapse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.records.common import Phenomenon, Statistic
from uncollapse.records.diagnosis import AttentionRecord, HeadsRecord, SiteRecord
from uncollapse.records.symmetries import SymmetryRecord, WidthScaling
from uncollapse.wrappers import takes

GROUPS: dict[Phenomenon, str] = {
    "rank-collapse-depth": "S_n: permutations of the tokens",
    "rank-collapse-width": "S_n: permutations of the keys alone",
    "head-channel-non-identifiability": "S_H and GL(d_k): permutations of the heads, a change of basis in each",
    "entropy-collapse": "R and R+: shifts and scalings of the logits",
}
MEASURES: dict[Phenomenon, str] = {
    "rank-collapse-depth": "consensus distance",
    "rank-collapse-width": "1 - normalised entropy",
    "head-channel-non-identifiability": "1 - overlap of write spaces",
    "entropy-collapse": "normalised entropy",
}
COLLAPSED = 0.0  # each order parameter is a distance from its collapsed set
NOT_ACTED = "measured by `uncollapse symmetries`"


@dataclass(frozen=True)
class Components:
    """The components of a model that matter for its symmetries, from its proved anatomy. `residuals` counts residual additions."""

    residuals: int
    mlps: int
    is_causal: bool
    takes_positions: bool
    bounds_logits: bool
    is_gated: bool

    @staticmethod
    def of(model: nn.Module, anatomy: Anatomy) -> Components:
        parts = [part for block in anatomy.blocks for part in block.parts]
        return Components(
            residuals=sum(len(block.residuals) for block in anatomy.blocks),
            mlps=sum(part.kind in {"mlp", "mixer"} for part in parts),
            is_causal=any(part.is_causal for part in parts),
            takes_positions=takes(model, "position_ids"),
            bounds_logits=any(norm.role == "inner" for block in anatomy.blocks for norm in block.norms),
            is_gated=any(type(m).__name__ == "PositionGatedProjection" for m in model.modules()),
        )

    def breakers(self, phenomenon: Phenomenon) -> list[str]:
        """The components of this model that do not respect the symmetry, named as in `without` if it can remove them."""
        positions = ["positions"] * self.takes_positions
        mask = ["mask"] * self.is_causal
        return {
            "rank-collapse-depth": positions + mask,
            "rank-collapse-width": ["query and key weights", *positions, *mask],
            "head-channel-non-identifiability": ["position gates"] * self.is_gated,
        }.get(phenomenon, [])

    def stabilisers(self, phenomenon: Phenomenon) -> list[str]:
        """The components of this model that respect the symmetry and still drive the model away from the collapsed set."""
        return {
            "rank-collapse-depth": _counted(self.residuals, "residual addition") + _counted(self.mlps, "MLP"),
            "entropy-collapse": ["query-key norm"] * self.bounds_logits,
        }.get(phenomenon, [])


def symmetry_records(
    trajectory: Sequence[SiteRecord],
    attention: Sequence[AttentionRecord],
    heads: Sequence[HeadsRecord],
    components: Components,
    scaling: Sequence[WidthScaling] = (),
) -> list[SymmetryRecord]:
    """The four records, without the figures that need the groups to act on the live model."""
    slopes = [s.slope for s in scaling if s.slope is not None]
    found = []
    for phenomenon, along_depth in _ORDER_PARAMETERS.items():
        places, values = along_depth(trajectory, attention, heads)
        is_width = phenomenon == "rank-collapse-width"
        unavailable = {"equivariance_defect": NOT_ACTED}
        if not is_width:
            unavailable["slope"] = "only collapse in width depends on the context length"
        elif not slopes:
            unavailable["slope"] = "measured with --context-lengths"
        if not any(values):
            unavailable["order_parameter"] = "nothing was measured on this model and text"
        found.append(
            SymmetryRecord(
                phenomenon=phenomenon,
                group=GROUPS[phenomenon],
                equivariance_defect=None,
                measure=MEASURES[phenomenon],
                places=places,
                order_parameter=values,
                collapsed_value=COLLAPSED,
                slope=_spread(slopes) if is_width else None,
                breakers=components.breakers(phenomenon),
                stabilisers=components.stabilisers(phenomenon),
                scaling=list(scaling) if is_width else [],
                unavailable=unavailable,
            )
        )
    return found


Along = tuple[list[str], list[Statistic | None]]


def _consensus(trajectory: Sequence[SiteRecord], _a: object, _h: object) -> Along:
    """Over the sequences at each site, without massive tokens, which would otherwise decide it alone."""
    return [site.site for site in trajectory], [site.consensus for site in trajectory]


def _distance_from_uniform(_t: object, attention: Sequence[AttentionRecord], _h: object) -> Along:
    return _over_heads(attention, lambda entropy: 1 - entropy)


def _distance_from_frozen(_t: object, attention: Sequence[AttentionRecord], _h: object) -> Along:
    return _over_heads(attention, lambda entropy: entropy)


def _over_heads(attention: Sequence[AttentionRecord], of: Callable[[float], float]) -> Along:
    """A function of the heads' normalised entropies in each attention call: mean, least and greatest head."""
    calls: dict[str, list[float]] = {}
    for record in attention:
        values = calls.setdefault(_place(record), [])
        if record.normalized_entropy is not None:
            values.append(of(record.normalized_entropy.mean))
    return list(calls), [_spread(values) for values in calls.values()]


def _distance_from_interchangeable(_t: object, _a: object, heads: Sequence[HeadsRecord]) -> Along:
    """1 - overlap over the pairs of heads of each projection: mean, closest and farthest pair."""
    values = []
    for record in heads:
        overlap = record.write_space_overlap or []
        values.append(_spread([1 - overlap[g][h] for g in range(len(overlap)) for h in range(g + 1, len(overlap))]))
    return [_place(record) for record in heads], values


_ORDER_PARAMETERS: dict[
    Phenomenon, Callable[[Sequence[SiteRecord], Sequence[AttentionRecord], Sequence[HeadsRecord]], Along]
] = {
    "rank-collapse-depth": _consensus,
    "rank-collapse-width": _distance_from_uniform,
    "head-channel-non-identifiability": _distance_from_interchangeable,
    "entropy-collapse": _distance_from_frozen,
}


def _place(record: AttentionRecord | HeadsRecord) -> str:
    return f"block.{record.block}" + (".cross" if record.kind == "cross" else "")


def _spread(values: Sequence[float]) -> Statistic | None:
    return Statistic.of(sum(values) / len(values), min(values), max(values), len(values)) if values else None


def _counted(count: int, noun: str) -> list[str]:
    return [f"{count} {noun}{'s' if count > 1 else ''}"] if count else []
