"""What is measured at a site: the token cloud between two blocks."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, Place, Stack
from uncollapse.measures import geometry
from uncollapse.measures.running import Running
from uncollapse.probe.clouds import Clouds

PLAIN_MEASURES = [
    "rank",
    "affine_rank",
    "attainable_rank",
    "attainable_affine_rank",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
    "rank_gap",
]
MASSIVE_MEASURES = [
    "tokens_left_out",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
]
SIDE_BY_SIDE_MEASURES = [name for name in PLAIN_MEASURES if name != "rank_gap"]
STREAM_MEASURES = ["consensus_after_norm", "stream_carried", "distinct_tokens"]


@dataclass
class SiteStatistics:
    """Running statistics of the token cloud at one site. `not_finite` counts sequences with NaN or infinity in a real
    token; `reason` says why there are none. `readers` has the consensus distance after each norm that reads the stream here, by
    name. Of several streams side by side the token cloud is that of all together, as wide as they all are; `side_by_side` has each
    of them, and `width` is that of one."""

    site: str
    block: int | None
    stack: Literal["encoder", "decoder"] | None
    plain: Running = field(default_factory=lambda: Running.empty(len(PLAIN_MEASURES)))
    massive: Running = field(default_factory=lambda: Running.empty(len(MASSIVE_MEASURES)))
    stream: Running = field(default_factory=lambda: Running.empty(len(STREAM_MEASURES)))
    not_finite: int = 0
    width: int = 0
    reason: str = ""
    readers: dict[str, Running] = field(default_factory=dict)
    side_by_side: list[Running] = field(default_factory=list)


def distinct_tokens(stack: Stack, batch: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """How many different ids each sequence has, padding left out; None where the stack is given none (images, sound)."""
    ids = batch.get(stack.ids or "")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    ids = ids.T if stack.ids_transposed else ids
    real = mask.to(ids.device) if mask is not None and mask.shape == ids.shape else torch.ones_like(ids).bool()
    return torch.tensor([len(row[kept].unique()) for row, kept in zip(ids, real, strict=True)])


class Sites:
    """Measures the token cloud at the entry of each stack and after each block; an `Observer`. Without `measures` it only counts
    the sequences that are not finite, which costs one sum over the stream."""

    def __init__(self, anatomy: Anatomy, clouds: Clouds, is_own: Callable[[], bool], *, measures: bool = True) -> None:
        self.anatomy, self.clouds, self.measures = anatomy, clouds, measures
        self._is_own = is_own
        self.statistics: list[SiteStatistics] = []
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self._distinct: list[Tensor | None] = []  # by stack: different token ids of each sequence
        # What reads the stream takes each token's mean away, if it is a layer norm.
        readers = [n for b in anatomy.blocks for n in b.norms if n.role in {"before", "post"}]
        self._is_centred = any(norm.kind == "layer" for norm in readers)
        named: dict[str, int] = {}
        for stack in anatomy.stacks:
            name = "embedding" if stack.name != "decoder" else "decoder.embedding"
            named[name] = named.get(name, 0) + 1
            embedding = SiteStatistics(name if named[name] == 1 else f"{name}.{named[name]}", None, stack.name)
            self.statistics.append(embedding)
            first = stack.blocks[0]
            self.streams.append((anatomy.blocks[first].entry, functools.partial(self._meet, embedding, first)))
            for number in stack.blocks:
                site = SiteStatistics(f"block.{number}", number, stack.name)
                self.statistics.append(site)
                self.streams.append((anatomy.blocks[number].exit, functools.partial(self._meet, site, number)))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """It needs no hooks: it stands at places of the stream only."""
        yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        if self.measures:
            both = zip(self.anatomy.stacks, self.clouds.paddings, strict=True)
            self._distinct = [distinct_tokens(stack, batch, padding.mask) for stack, padding in both]

    def let_go(self) -> None:
        self.streams.clear()

    def _meet(self, site: SiteStatistics, number: int, stream: Tensor) -> None:
        if self._is_own():
            with measuring(stream):
                cloud = self.clouds.cloud(number, stream)
                if cloud is None:
                    site.width, site.reason = stream.shape[-1], self.clouds.why_not(number)
                    return
                mask = self.clouds.cloud_mask(self.anatomy.stack_of(number), cloud, site.site)
                axes = self.anatomy.blocks[number].axes
                site.width = cloud.shape[-1] if axes is None else stream.shape[axes.width]
                lost = count_not_finite(cloud, mask)
                site.not_finite += lost
                if not lost:
                    self.clouds.finite.add(site.site)
                if self.measures:
                    self._measure(site, number, cloud, mask)
                    if axes is not None and axes.streams is not None:
                        self._measure_each(site, axes.side_by_side(stream), mask)

    def _measure(self, site: SiteStatistics, number: int, cloud: Tensor, mask: Tensor | None) -> None:
        measured = geometry.cloud_measures(cloud, mask, read_centred=self._is_centred)
        gap = measured.rank_gap.masked_fill(measured.rank_gap.isinf(), math.nan)
        plain = [gap if name == "rank_gap" else getattr(measured, name) for name in PLAIN_MEASURES]
        site.plain = site.plain.add(torch.stack([p.double() for p in plain], -1))
        massive = [getattr(measured.without_massive, name).double() for name in MASSIVE_MEASURES]
        site.massive = site.massive.add(torch.stack(massive, -1))
        apart = measured.consensus_after_norm
        carried = distinct = torch.full_like(apart, math.nan)
        if site.block is None:
            counted = self._distinct[self.anatomy.stack_of(number)]
            if counted is not None and len(counted) == len(apart):
                distinct = counted.to(apart)
        else:
            entered = self.clouds.entering(number)
            before = None if entered is None else self.clouds.cloud(number, entered)
            if before is not None and before.shape == cloud.shape:
                is_normalized = self.anatomy.blocks[number].placement == "post"
                carried = geometry.stream_carried(before, cloud, mask, is_normalized=is_normalized)
        site.stream = site.stream.add(torch.stack([apart, carried, distinct], -1))

    def _measure_each(self, site: SiteStatistics, streams: Tensor, mask: Tensor | None) -> None:
        """Each of several streams, [sequence, token, stream, width], by itself."""
        count = streams.shape[2]
        site.side_by_side = site.side_by_side or [Running.empty(len(SIDE_BY_SIDE_MEASURES)) for _ in range(count)]
        for number in range(count):
            measured = geometry.cloud_measures(streams[:, :, number], mask, read_centred=self._is_centred)
            columns = [getattr(measured, name).double() for name in SIDE_BY_SIDE_MEASURES]
            site.side_by_side[number] = site.side_by_side[number].add(torch.stack(columns, -1))


def count_not_finite(cloud: Tensor, mask: Tensor | None) -> int:
    """How many sequences have NaN or infinity in a real token."""
    finite = cloud.sum(-1).isfinite()  # no value but a finite one leaves the sum finite
    if mask is not None:
        finite |= ~mask
    if not bool(finite.all()):  # the sum may have overflowed by itself
        finite = cloud.isfinite().all(-1)
        if mask is not None:
            finite |= ~mask
    return int((~finite.all(-1)).sum())
