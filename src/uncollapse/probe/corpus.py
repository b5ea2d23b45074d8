"""One cloud for the whole corpus at every site: each sequence as one point, and each token.

A sequence is pooled in three ways, over the tokens that the diagnosis counts: the mean of its real tokens, its last real token, its
first. That is a point per sequence and costs next to nothing. The cloud of all tokens costs a product as large as a twelfth of a
block at every site, so it is taken where somebody asks for it (level `full`).

When not to use it: for what happens within a sequence. `sites` measures that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.probing import full_precision
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, Place
from uncollapse.measures.running import WIDEST, RunningCloud
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.sites import SiteStatistics
from uncollapse.probe.sizes import single
from uncollapse.records.diagnosis import Pooling

POOLED: Final[tuple[Pooling, ...]] = ("mean", "last", "first")


@dataclass
class CorpusStatistics:
    """The cloud at one site in one pooling. `before`: the one at the site that enters the block, None at an embedding. `epsilon` is
    the rounding of a point beside its size. `reason` says why there are no points."""

    site: SiteStatistics
    pooling: Pooling
    before: CorpusStatistics | None
    epsilon: float = 0.0
    reason: str = ""
    _cloud: RunningCloud | None = None
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, points: Tensor, keys: Tensor, epsilon: float) -> None:
        """Further points, each with its key."""
        self.epsilon = max(self.epsilon, epsilon)
        self._waiting.append((points, keys))
        if sum(len(waiting) for _, waiting in self._waiting) >= WIDEST:
            self._fold()

    def _fold(self) -> None:
        if self._waiting:
            points, keys = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._cloud = RunningCloud.of(points, keys) if self._cloud is None else self._cloud.add(points, keys)
            self._waiting.clear()

    def put(self, cloud: RunningCloud | None) -> None:
        """Take this in place of what was seen so far: what several processes saw together."""
        self._cloud = cloud
        self._waiting.clear()

    @property
    def cloud(self) -> RunningCloud | None:
        """What was seen so far; None where no point was."""
        self._fold()
        return self._cloud


class Corpus:
    """Pools the stream at every site; an `Observer`. `statistics` has for each of `sites` its poolings, in their order."""

    def __init__(
        self,
        anatomy: Anatomy,
        sites: list[SiteStatistics],
        clouds: Clouds,
        is_own: Callable[[], bool],
        *,
        poolings: tuple[Pooling, ...] = POOLED,
        tokens: bool = False,
        seed: int = 0,
    ) -> None:
        self.anatomy, self.clouds, self._is_own = anatomy, clouds, is_own
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self.statistics: list[CorpusStatistics] = []
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + rank)
        # In this batch: by stack and number of points; by stack, number of tokens and device.
        self._keys: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int, torch.device], Rows] = {}
        wanted: tuple[Pooling, ...] = ("tokens", *poolings) if tokens else poolings
        remaining = iter(sites)
        for stack in anatomy.stacks:
            before: dict[Pooling, CorpusStatistics] = {}
            for number in (None, *stack.blocks):
                site = next(remaining)
                own = [CorpusStatistics(site, pooling, before.get(pooling)) for pooling in wanted]
                before = {statistics.pooling: statistics for statistics in own}
                self.statistics += own
                block = stack.blocks[0] if number is None else number
                place = anatomy.blocks[block].entry if number is None else anatomy.blocks[block].exit
                self.streams.append((place, functools.partial(self._meet, own, block)))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """It needs no hooks: it stands at places of the stream only."""
        yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._keys.clear()
        self._rows.clear()

    def let_go(self) -> None:
        self.streams.clear()

    def _meet(self, own: list[CorpusStatistics], number: int, stream: Tensor) -> None:
        if not self._is_own():
            return
        with full_precision(stream):
            cloud = self.clouds.cloud(number, stream)
            if cloud is None:
                for statistics in own:
                    statistics.reason = self.clouds.why_not(number)
                return
            stack = self.anatomy.stack_of(number)
            mask = self.clouds.cloud_mask(stack, cloud, own[0].site.site)
            rows = self._rows.get((stack, cloud.shape[1], cloud.device))
            if rows is None:
                rows = self._rows[stack, cloud.shape[1], cloud.device] = Rows.of(cloud, mask)
            epsilon, x = torch.finfo(stream.dtype).eps, single(cloud.detach())
            for statistics in own:
                points = rows.pooled(x, statistics.pooling)
                rounding = epsilon * rows.lessens if statistics.pooling == "mean" else epsilon
                keys = self._drawn(stack, len(points), points.device)
                statistics.take(points, keys, max(rounding, torch.finfo(points.dtype).eps))

    def _drawn(self, stack: int, count: int, device: torch.device) -> Tensor:
        """The keys of this batch's points: the same at every site of a stack, so that the clouds keep the same points."""
        if (stack, count) not in self._keys:
            drawn = torch.rand(count, generator=self._generator, dtype=torch.float64)
            self._keys[stack, count] = drawn.to(device)
        return self._keys[stack, count].to(device)


@dataclass(frozen=True)
class Rows:
    """Which tokens of a batch make the points: which sequences have any, the share of each token in its sequence's mean [sequence,
    1, token], the places of the first and the last real token, and the mask (None where every token is real). `lessens`: the
    factor by which a mean lessens rounding errors that are independent."""

    there: Tensor
    shares: Tensor
    first: Tensor
    last: Tensor
    mask: Tensor | None
    lessens: float

    @staticmethod
    def of(cloud: Tensor, mask: Tensor | None) -> Rows:
        """For clouds [sequence, token, width] with this mask [sequence, token]: True for a real token, None where all are."""
        sequences, tokens = cloud.shape[:2]
        real = torch.ones(sequences, tokens, dtype=torch.bool, device=cloud.device) if mask is None else mask
        counts = real.sum(1)
        there = counts.nonzero()[:, 0]
        precision = torch.promote_types(cloud.dtype, torch.float32)
        shares = real[there].to(precision) / counts[there, None].to(precision)
        last = tokens - 1 - real[there].flip(1).int().argmax(1)
        lessens = float(counts[there].double().rsqrt().mean()) if len(there) else 1.0
        return Rows(there, shares[:, None], real[there].int().argmax(1), last, mask, lessens)

    def pooled(self, cloud: Tensor, pooling: Pooling) -> Tensor:
        """The points [point, width] of a cloud in single precision at least. Sequences without a real token have none."""
        if pooling == "tokens":
            # A copy: the next block may add to its stream in place.
            return cloud.flatten(0, 1).clone() if self.mask is None else cloud[self.mask]
        if pooling != "mean":
            return cloud[self.there, self.first if pooling == "first" else self.last]
        cloud = cloud if len(self.there) == len(cloud) else cloud[self.there]
        points = torch.bmm(self.shares, cloud)[:, 0]
        if self.mask is not None and not bool(points.isfinite().all()):
            # Padding may hold what is not finite, and 0 times that is not 0.
            points = torch.bmm(self.shares, torch.where(self.shares.mT > 0, cloud, 0))[:, 0]
        return points
