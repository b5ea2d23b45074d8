"""Which rows of which parameter make which channel of which head: found by what the model does, without a table of names.

A group that acts on the weights of attention must know where a head keeps its queries, keys, values and its part of the
output projection: apart or fused, head by head or interleaved, shared by several heads, stored as `nn.Linear` or transposed.
All of it is read from one experiment. The output features of the learned products are replaced by known patterns, the same
for every token, and the operands of the attention call show where each feature has gone:

* Every feature gets a random code of signs. Where an operand repeats the code of a feature, times a constant, it is that
  feature: `Rows.features`. Signs are exact in every number format and pass an RMS norm.
* What a rotary embedding mixes, unit impulses show: the pairs of channels that turn with the position (`pairs`), and those
  that do not.
* An operand that does not grow when the features do passes a norm: of each head by itself, or of all heads together.
* The result of the attention is replaced by codes too, and must come into the output projection as it is.

What cannot be acted on carries a reason in words in `Channels.reasons`: quantised or offloaded weights, a weight with two
roles or users, values that are normalised or gated on their way.

When not to use it: to act on a model that keeps part of its work outside of the recorded pass, such as prefix tuning. Its
channels were not there to be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.examples import example
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import known_example
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, ModuleCall
from uncollapse.restoring import leaves_no_trace
from uncollapse.symmetry.layouts import refused_layout
from uncollapse.symmetry.parameters import refuse_shared, rows_of
from uncollapse.symmetry.patterns import CODES, LOUD, PatternPasses, sign_codes, stacked
from uncollapse.symmetry.studied_calls import ROLES, Place, Role, Rows, StudiedCall

_NORMS: dict[str, Literal["head", "layer"]] = {"head": "head", "layer": "layer"}

AGREEMENT = 0.8  # a copy agrees to 1, behind a layer norm over d_k channels to sqrt(1 - 1/d_k)


@dataclass(frozen=True)
class NormBefore:
    """A layer norm whose output alone some weights read: u.x = u.beta for all that it gives, u = 1/gamma. `normal` is u at root
    mean square 1, `shift` u.beta at that scale (0 where it is 0 but for rounding), `weight_size` the root mean square of the
    weights."""

    normal: Tensor
    shift: float
    weight_size: float


@dataclass(frozen=True)
class Channels:
    """The channels of one attention call. `groups[h]` is the key-value head that head `h` reads. A role is None where it could
    not be found or must not be changed; `reasons` says why, under its name.

    `pairs` are the channels that positions rotate, two by two (empty: none; None: not found, see `reasons["rotary"]`). `norm`
    says whether queries and keys pass a norm of each head or of the whole layer; `reasons["logits"]` is there where the logits
    are not made of products of linear, or alike normalised, queries and keys. `sinks`: the softmax has columns beyond the keys.
    `heads_alike`: heads with equal queries, keys and values give equal outputs; with a bias, a gain or a sink for each head
    they do not (`reasons["heads"]`). `norms_before`: the layer norms that queries, keys and values read, where somebody looked
    (`probe.norms_before`); else `reasons["norm before keys"]` and so on."""

    block: int
    kind: Literal["self", "cross"]
    call: AttentionCall
    groups: tuple[int, ...] = ()
    queries: Rows | None = None
    keys: Rows | None = None
    values: Rows | None = None
    projection: Rows | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    norm: Literal["head", "layer"] | None = None
    sinks: bool = False
    heads_alike: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)
    norms_before: Mapping[str, NormBefore] = field(default_factory=dict)

    @property
    def group_count(self) -> int:
        return len(set(self.groups))

    @property
    def rotary_width(self) -> int | None:
        """How many channels of a head positions rotate."""
        return None if self.pairs is None else 2 * len(self.pairs)

    @property
    def free(self) -> tuple[int, ...]:
        """The channels of queries and keys that positions do not rotate."""
        turned = {c for pair in self.pairs or () for c in pair}
        width = 0 if self.queries is None or self.pairs is None else len(self.queries.features[0])
        return tuple(c for c in range(width) if c not in turned)


@leaves_no_trace
def channels_of(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> list[Channels]:
    """The channels of every attention call of `anatomy`, in the order of the blocks. `batch` is an input of the model; the
    few tokens on which the anatomy was proved are taken instead where they are known.

    Nothing is changed in the model and no exception raised for what cannot be found: see `Channels.reasons`.
    """
    with probing(model):
        probe = _Study(model, anatomy, known_example(model) or example(batch))
        return probe.channels()


class _Study:
    """The passes over one model, and what they showed."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:
        self.model = model
        self.sites = [
            StudiedCall(number, "cross" if part.kind == "cross" else "self", call)
            for number, block in enumerate(anatomy.blocks)
            for part in block.parts
            for call in part.attention
        ]
        for site in self.sites:
            if problem := refused_layout(site.call):
                site.refuse_all(problem)
        self.passes = PatternPasses(model, self.sites, batch)

    # What they say ------------------------------------------------------------------------------------------------
    def channels(self) -> list[Channels]:
        codes: dict[int, Tensor] = {}
        tables: dict[Place, Tensor] = {}
        for place in self.passes.sources:
            tables[place] = stacked(sign_codes(self.passes.widths[place], codes))
        for _, site in self.passes.usual:
            # In another order: values that reach the projection past the attention must not look like its result.
            tables[site.call.product] = stacked(sign_codes(site.call.heads * site.call.head_width, codes).flip(0))
        answers = self.passes.respond(tables) if self.passes.usual else {}
        for number, site in self.passes.usual:
            for role in ROLES:
                self._locate(site, role, answers.get((number, role)), codes)
            self._group(site)
            self._locate_projection(site, answers.get((number, "projection")), codes)
        answers = self.passes.respond(self._impulses(codes)) if self.passes.usual else {}
        for number, site in self.passes.usual:
            self._compare(number, site, answers, codes)
        rows = [rows_of(self.model, site, self.passes.operands) for site in self.sites]
        refuse_shared(self.model, self.sites, [site for _, site in self.passes.usual], rows, self.passes.runs)
        return [
            Channels(
                site.block,
                site.kind,
                site.call,
                site.groups,
                **{role: None if role in site.reasons else found.get(role) for role in (*ROLES, "projection")},  # type: ignore[arg-type]  # the roles come by name
                pairs=site.pairs,
                norm=site.norm,
                sinks=site.sinks,
                heads_alike=site.heads_alike,
                reasons=site.reasons,
            )
            for site, found in zip(self.sites, rows, strict=True)
        ]

    def _locate(self, site: StudiedCall, role: Role, answer: Tensor | None, codes: Mapping[int, Tensor]) -> None:
        """Which feature every channel of a role shows at the first token, and whether it is that and nothing else."""
        place = site.source(role)
        if place is None:
            site.refuse(role, f"the {role} come from several learned products added or joined together, or from none")
            return
        if answer is None:
            site.refuse(role, f"the {role} do not have the axes batch, head, token and channel")
            return
        if not bool(answer[:CODES].isfinite().all()):
            site.refuse(role, f"the {role} are not finite")
            return
        code = codes[self.passes.widths[place]]
        agreement, feature = _agreement(answer[:CODES, :, 0], code).max(-1)
        quiet, loud, silent = answer[0], answer[-1], answer[-2]
        growth = float(loud[:, 0].norm() / quiet[:, 0].norm().clamp_min(1e-300))
        site.law[role] = "norm" if abs(growth - 1) < 0.05 else "linear" if abs(growth / LOUD - 1) < 0.05 else "neither"
        if not bool((agreement > AGREEMENT).all()) or not _is_partition(feature):
            site.refuse(role, f"the {role} are mixtures of what {_name(place)} makes, not its features")
            return
        site.where[role] = feature
        shown = code[:, feature].unsqueeze(2)  # [pattern, head, 1, channel]
        scale = (answer[:CODES] * shown).mean((0, 2))  # [head, channel]
        eps = self._eps()
        rest = (answer[:CODES] - scale.unsqueeze(1) * shown).abs().max()
        even = bool(((scale - scale[0, 0]).abs() <= 16 * eps * scale.abs().max()).all())
        site.is_copy[role] = bool(rest <= 16 * eps * answer[:CODES].abs().max()) and even
        if site.law[role] != "norm" and bool((silent.abs() > 16 * eps * quiet.abs().max()).any()):
            site.refuse(role, f"something is added to the {role} behind {_name(place)}")
        if role == "values" and site.law[role] == "norm":
            site.refuse(role, f"the values are normalised behind {_name(place)}")
        if role == "values" and not site.is_copy[role]:
            site.refuse(role, f"the values are scaled or cut behind {_name(place)}")

    def _eps(self) -> float:
        """The unit of rounding of the model, single precision at best: parts of a model in float64 mostly stay there."""
        kinds = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return max([torch.finfo(k).eps for k in kinds if torch.finfo(k).bits >= 16] + [torch.finfo(torch.float32).eps])

    def _group(self, site: StudiedCall) -> None:
        """Which key-value head every head reads: heads whose keys, or values, are the same features share one."""
        heads = site.call.heads
        asked = site.where.get("queries")
        if asked is not None and (len(asked) != heads or len({tuple(row) for row in asked.tolist()}) != heads):
            site.refuse("queries", f"the queries of {heads} heads could not be told apart")
            del site.where["queries"]
        members: dict[str, tuple[int, ...]] = {}
        for role in ("keys", "values"):
            if role not in site.where:
                continue
            feature = site.where[role]
            if heads % len(feature):
                site.refuse(role, f"{heads} heads of queries meet {len(feature)} of {role}")
                continue
            known: dict[tuple[int, ...], int] = {}
            rows = [tuple(row) for row in feature.tolist()]
            own = [known.setdefault(row, len(known)) for row in rows]
            members[role] = tuple(own[h * len(own) // heads] for h in range(heads))
            site.where[role] = torch.tensor(list(known))
        if not members:
            return
        site.groups = next(iter(members.values()))
        if len(set(members.values())) > 1:
            for role in members:
                site.refuse(role, "keys and values are shared by different heads")
        sizes = {site.groups.count(g) for g in site.groups}
        if len(sizes) > 1:
            site.refuse("heads", "the key-value heads serve different numbers of heads")
            site.heads_alike = False

    def _locate_projection(self, site: StudiedCall, answer: Tensor | None, codes: Mapping[int, Tensor]) -> None:
        call = site.call
        if call.projection is None:
            site.refuse("projection", "no output projection follows this attention")
            return
        mixed = call.heads * call.head_width
        if answer is None or answer.shape[-1] != mixed:
            site.refuse("projection", "the input of the output projection is not the heads side by side")
            return
        code = codes[mixed].flip(0)
        agreement, channel = _agreement(answer[:CODES], code).max(-1)
        shown = code[:, channel]
        scale = (answer[:CODES] * shown).mean(0)
        rest = (answer[:CODES] - scale[0] * shown).abs().max()
        distinct = len(set(channel.tolist())) == mixed
        if not bool((agreement > AGREEMENT).all()) or not distinct or not rest <= 16 * self._eps() * scale[0].abs():
            site.refuse("projection", "the heads are gated, normalised or mixed on their way to the output projection")
            return
        feature = torch.empty(mixed, dtype=torch.long)
        feature[channel] = torch.arange(mixed)
        site.where["projection"] = feature.view(call.heads, call.head_width)

    def _impulses(self, codes: Mapping[int, Tensor]) -> dict[Place, Tensor]:
        """A table for each product of queries or keys: its channels one by one, in all heads alike; then the first code for
        queries alone, keys alone, neither, and both; and both again with the first head loud."""
        widest = max(f.shape[1] for s in self.sites for f in (*s.where.values(), torch.empty(1, 1)))
        tables = {p: torch.zeros(widest + 5, self.passes.widths[p], dtype=torch.float64) for p in self.passes.sources}
        for _, site in self.passes.usual:
            for role, alone in (("queries", -5), ("keys", -4)):
                place = site.source(role)
                if place is None or role not in site.where:
                    continue
                feature, table = site.where[role], tables[place]
                for channel in range(feature.shape[1]):
                    table[channel, feature[:, channel]] = 1.0
                for row in (alone, -2, -1):
                    table[row, feature.flatten()] = codes[self.passes.widths[place]][0, feature.flatten()]
                table[-1, feature[0]] *= LOUD
        return tables

    def _compare(
        self, number: int, site: StudiedCall, answers: Mapping[tuple[int, str], Tensor], codes: Mapping[int, Tensor]
    ) -> None:
        """What happens to queries and keys between their products and the logits."""
        if not {"queries", "keys"} <= site.where.keys():
            for what in ("rotary", "logits", "heads"):
                site.refuse(what, "queries and keys were not both found")
            site.heads_alike = False
            return
        pairs: list[tuple[tuple[int, int], ...] | None] = []
        laws: list[str] = []
        for role in ("queries", "keys"):
            answer = answers[number, role]
            unit = answer[: site.where[role].shape[1]]
            if not bool(((unit - unit[:, :1]).abs() <= 2 * self._eps() * unit.abs().max()).all()):
                site.unlike()
            laws.append(self._law(site, role, answer, codes))
            is_turned = not site.is_copy[role]
            pairs.append(_rotated(unit[:, 0], self._eps(), laws[-1] == "linear") if is_turned else ())
        if site.call.key_value_heads == 1 and laws == ["layer", "head"]:
            laws[1] = "layer"  # with one key head it is the same
        scores = answers.get((number, "scores"))
        if scores is not None and not _alike(scores[:-5], self._eps()):
            site.unlike()
        if "neither" in laws or laws[0] != laws[1]:
            site.refuse("logits", "queries and keys are neither linear in their weights nor normalised in the same way")
        elif (
            laws[0] == "linear"
            and scores is not None
            and not torch.equal(scores[-5:-3], scores[-3:-2].expand(2, -1, -1, -1))
        ):
            site.refuse("logits", "queries or keys enter the logits in another way than by their product")
        else:
            site.norm = _NORMS.get(laws[0])
        if pairs[0] is None or pairs[0] != pairs[1]:
            site.refuse("rotary", "positions do not act on queries and keys by rotating pairs of channels")
        else:
            site.pairs = pairs[0]

    def _law(self, site: StudiedCall, role: Role, answer: Tensor, codes: Mapping[int, Tensor]) -> str:
        """How an operand follows its features: `linear`, normalised by `head` or by `layer`, or `neither`."""
        place, feature = site.source(role), site.where[role]
        assert place is not None
        unit, plain, loud = answer[: feature.shape[1]], answer[-2], answer[-1]
        own = list(site.groups) if role == "keys" else list(range(site.call.heads))
        own = own[:: len(own) // len(plain)]  # of each head of the operand: which head of the features it is
        if site.law[role] == "norm":
            apart = [h for h, head in enumerate(own) if head != 0]
            moved = float((loud - plain)[apart].norm() / plain[apart].norm()) if apart else 0.0
            return "head" if moved < 0.05 else "layer"
        if site.law[role] == "linear":
            signs = codes[self.passes.widths[place]][0, feature][own]
            summed = torch.einsum("hi,ihtc->htc", signs, unit)
            allowed = 64 * feature.shape[1] ** 0.5 * self._eps() * plain.abs().max()
            return "linear" if bool((summed - plain).abs().max() <= allowed) else "neither"
        return "neither"


def _name(place: Place) -> str:
    return place.name if isinstance(place, ModuleCall) else str(place)


def _agreement(answer: Tensor, code: Tensor) -> Tensor:
    """How far every channel [pattern, ...] follows every feature's code [pattern, feature], or its opposite, as behind a gain
    below 0: the absolute value of the correlation [..., feature]."""
    heard = answer - answer.mean(0)
    heard = heard / heard.norm(dim=0).clamp_min(1e-300)
    sent = code - code.mean(0)
    return torch.einsum("p...,pf->...f", heard.float(), (sent / sent.norm(dim=0)).float()).abs()


def _is_partition(feature: Tensor) -> bool:
    """Whether features [head, channel] are each of one channel, and of heads that share all of them or none."""
    rows = {tuple(row) for row in feature.tolist()}
    flat = [f for row in rows for f in row]
    return len(flat) == len(set(flat))


def _rotated(unit: Tensor, eps: float, is_linear: bool) -> tuple[tuple[int, int], ...] | None:
    """The pairs of channels that are turned together, from the images [impulse, token, channel] of the unit impulses: what is
    0 there is exactly 0. None where it is no rotation of pairs, times a number, with the other channels left alone."""
    mixed = (unit != 0).any(1)
    mixed.fill_diagonal_(False)
    if not torch.equal(mixed, mixed.T) or bool((mixed.sum(0) > 1).any()):
        return None
    pairs = tuple((i, int(mixed[i].nonzero())) for i in range(len(mixed)) if bool(mixed[i, i:].any()))
    if not is_linear:
        return pairs
    allowed = 16 * eps * unit.abs().max()
    own = torch.stack([unit[c, :, c] for c in range(len(unit))])  # [channel, token]
    free = [c for c in range(len(unit)) if not bool(mixed[c].any())]
    even = bool(((own[free] - own[free][:1]).abs() <= allowed).all())
    turned = all(
        bool(((own[i] - own[j]).abs() <= allowed).all())
        and bool(((unit[i, :, j] + unit[j, :, i]).abs() <= allowed).all())
        for i, j in pairs
    )
    return pairs if even and turned else None


def _alike(scores: Tensor, eps: float) -> bool:
    """Whether logits [pattern, head, token, key] are the same for all heads."""
    forbidden = scores <= torch.finfo(torch.float16).min / 2
    kept = scores.masked_fill(forbidden, 0)
    return bool(((kept - kept[:, :1]).abs() <= 8 * eps * kept.abs().max().clamp_min(1)).all())
