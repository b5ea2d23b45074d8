"""One cloud for the whole corpus at every site: each sequence as one point, and each token.

A sequence is pooled in three ways, over the tokens that the diagnosis counts: the mean of its real tokens, its last real token, its
first. That is a point per sequence and costs next to nothing. The cloud of all tokens costs a product as large as a twelfth of a
block at every site, so it is taken where somebody asks for it (level `full`). At level `core` a uniform sample of the tokens
(`SAMPLED_TOKENS`) stands for it.

When not to use it: for what happens within a sequence. `sites` measures that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.probing import full_precision
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, Place
from uncollapse.measures.running import WIDEST, RunningCloud
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.sites import SiteStatistics
from uncollapse.probe.sizes import single
from uncollapse.records.diagnosis import SAMPLED_TOKENS, Pooling

POOLED: Final[tuple[Pooling, ...]] = ("mean", "last", "first")


@dataclass
class CorpusStatistics:
    """The cloud at one site in one pooling. `before`: the one at the site that enters the block, None at an embedding. `epsilon` is
    the rounding of a point beside its size. `reason` says why there are no points. `most`: keep no more points than these, those
    with the smallest keys; None keeps what a `RunningCloud` keeps. `seen`: with `most`, how many finite points there were."""

    site: SiteStatistics
    pooling: Pooling
    before: CorpusStatistics | None
    epsilon: float = 0.0
    reason: str = ""
    most: int | None = None
    seen: int = 0
    _cloud: RunningCloud | None = None
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, points: Tensor, keys: Tensor, epsilon: float, *, chosen_from: int | None = None) -> None:
        """Further points, each with its key. With `most`, a key of infinity says that this is none, and those with the smallest
        keys are chosen here, if they do not come `chosen_from` so many that are finite."""
        self.epsilon = max(self.epsilon, epsilon)
        if self.most is not None:
            if chosen_from is None:
                points, keys, chosen_from = _with_smallest_keys(points, keys, self.most)
            self.seen += chosen_from
        self._waiting.append((points, keys))
        if sum(len(waiting) for _, waiting in self._waiting) >= WIDEST:
            self._fold()

    def _fold(self) -> None:
        if self._waiting:
            points, keys = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._cloud = RunningCloud.of(points, keys) if self._cloud is None else self._cloud.add(points, keys)
            self._waiting.clear()
            self._thin()

    def _thin(self) -> None:
        cloud = self._cloud
        if cloud is not None and self.most is not None and len(cloud.keys) > self.most:
            points, keys, _ = _with_smallest_keys(cloud.points, cloud.keys, self.most)
            self._cloud = RunningCloud.of(points, keys)

    def put(self, cloud: RunningCloud | None) -> None:
        """Take this in place of what was seen so far: what several processes saw together."""
        self._cloud = cloud
        self._waiting.clear()
        self._thin()

    @property
    def cloud(self) -> RunningCloud | None:
        """What was seen so far; None where no point was."""
        self._fold()
        return self._cloud


def _with_smallest_keys(points: Tensor, keys: Tensor, most: int) -> tuple[Tensor, Tensor, int]:
    """Of the points that are finite, and whose keys are, those with the smallest keys, in their order; their keys; and how many
    there were to choose from."""
    wanted = keys.isfinite()
    fine = points.sum(-1).isfinite()  # one pass that keeps nothing; the sum of finite numbers may leave the format
    if not bool((fine | ~wanted).all()):
        fine = points.isfinite().all(-1)
    places = (fine & wanted).nonzero()[:, 0]
    seen = len(places)
    if seen > most:
        places = places[keys[places].topk(most, largest=False, sorted=False).indices].sort().values
    return points[places], keys[places], seen


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
        tokens: Literal["none", "few", "all"] = "none",
        seed: int = 0,
    ) -> None:
        self.anatomy, self.clouds, self._is_own = anatomy, clouds, is_own
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self.statistics: list[CorpusStatistics] = []
        # Sequences of the corpus before this batch: they decide its keys, so that it has the same ones in whichever process.
        self.before = 0
        self._seed, self._generator = seed, torch.Generator()
        # In this batch: by stack and number of points; by stack, number of tokens and device.
        self._keys: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int, torch.device], Rows] = {}
        self._few: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        wanted: tuple[Pooling, ...] = poolings if tokens == "none" else ("tokens", *poolings)
        most = SAMPLED_TOKENS if tokens == "few" else None
        remaining = iter(sites)
        for stack in anatomy.stacks:
            before: dict[Pooling, CorpusStatistics] = {}
            for number in (None, *stack.blocks):
                site = next(remaining)
                own = [
                    CorpusStatistics(site, pooling, before.get(pooling), most=most if pooling == "tokens" else None)
                    for pooling in wanted
                ]
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
        self._generator.manual_seed(self._seed * 1_000_003 + self.before)
        self._keys.clear()
        self._rows.clear()
        self._few.clear()

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
                if statistics.most is not None:  # no copy of all tokens for a few of them
                    self._take_few(statistics, stack, rows, x, max(epsilon, torch.finfo(x.dtype).eps))
                    continue
                points = rows.pooled(x, statistics.pooling)
                least = torch.finfo(points.dtype).eps
                is_coarse = statistics.pooling == "mean" and epsilon > least
                rounding = epsilon * rows.lessened(cloud) if is_coarse else epsilon
                keys = self._drawn(stack, len(points), points.device)
                statistics.take(points, keys, max(rounding, least))

    def _take_few(self, statistics: CorpusStatistics, stack: int, rows: Rows, x: Tensor, epsilon: float) -> None:
        """Tokens for a cloud that keeps a few. Where all are finite the choice is the same at every site of a stack."""
        assert statistics.most is not None
        drawn, points = self._drawn(stack, rows.points, x.device), x.flatten(0, 1)
        if statistics.site.site not in self.clouds.finite:
            statistics.take(points, rows.laid_out(drawn, x), epsilon)
            return
        place = stack, x.shape[1], x.device
        if place not in self._few:
            keys = rows.laid_out(drawn, x)
            chosen = keys.topk(min(statistics.most, rows.points), largest=False, sorted=False).indices.sort().values
            self._few[place] = chosen, keys[chosen]
        chosen, keys = self._few[place]
        statistics.take(points[chosen], keys, epsilon, chosen_from=rows.points)

    def _drawn(self, stack: int, count: int, device: torch.device) -> Tensor:
        """The keys of this batch's points: the same at every site of a stack, so that the clouds keep the same points."""
        if (stack, count) not in self._keys:
            drawn = torch.rand(count, generator=self._generator, dtype=torch.float64)
            self._keys[stack, count] = drawn.to(device)
        return self._keys[stack, count].to(device)


@dataclass(frozen=True)
class Rows:
    """Which tokens of a batch make the points: which sequences have any, how many each of these has, the places of the first and
    the last, the mask (None where every token is real), and how many there are in all."""

    there: Tensor
    counts: Tensor
    first: Tensor
    last: Tensor
    mask: Tensor | None
    points: int

    @staticmethod
    def of(cloud: Tensor, mask: Tensor | None) -> Rows:
        """For clouds [sequence, token, width] with this mask [sequence, token]: True for a real token, None where all are."""
        sequences, tokens = cloud.shape[:2]
        mask = None if mask is None else mask.to(cloud.device)
        real = torch.ones(sequences, tokens, dtype=torch.bool, device=cloud.device) if mask is None else mask
        counts = real.sum(1)
        there = counts.nonzero()[:, 0]
        last = tokens - 1 - real[there].flip(1).int().argmax(1)
        return Rows(there, counts[there], real[there].int().argmax(1), last, mask, int(counts.sum()))

    def lessened(self, cloud: Tensor) -> float:
        """The factor by which a mean lessens the rounding errors of its tokens. Errors of tokens that differ are independent; an
        element that repeats the one of the token before repeats its error, and where all tokens are one nothing is lessened."""
        differing = (cloud[:, 1:] != cloud[:, :-1]).mean(-1, dtype=torch.float32)
        if self.mask is not None:
            differing = differing * (self.mask[:, 1:] & self.mask[:, :-1])
        independent = 1 + differing.sum(1)[self.there].double()
        return float(independent.rsqrt().mean()) if len(self.there) else 1.0

    def laid_out(self, keys: Tensor, cloud: Tensor) -> Tensor:
        """The keys of the real tokens, with infinity for those that are padding: one for each token of the cloud."""
        if self.mask is None:
            return keys
        found = keys.new_full(cloud.shape[:2], torch.inf)
        found[self.mask] = keys
        return found.flatten()

    def pooled(self, cloud: Tensor, pooling: Pooling) -> Tensor:
        """The points [point, width] of a cloud in single precision at least. Sequences without a real token have none."""
        if pooling == "tokens":
            # A copy: the next block may add to its stream in place.
            return cloud.flatten(0, 1).clone() if self.mask is None else cloud[self.mask]
        if pooling != "mean":
            return cloud[self.there, self.first if pooling == "first" else self.last]
        # `sum` adds in pairs: a product that adds one after another errs more than the format.
        totals = cloud.sum(1) if self.mask is None else (cloud * self.mask[..., None].to(cloud.dtype)).sum(1)
        if self.mask is not None and not bool(totals.isfinite().all()):  # padding may hold what is not
            totals = torch.where(self.mask[..., None], cloud, 0).sum(1)
        return totals[self.there] / self.counts[:, None]
