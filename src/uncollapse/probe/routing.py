"""What the routers of a mixture of experts do: how many tokens each expert gets.

Only for routers that were proved (`anatomy.routers`). A choice counts once for each real token and each expert that it names, also
where the expert is full and drops the token.

When not to use it: for how much an expert contributes. The weight of a chosen expert is not read.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.routers import as_rows, chosen_in
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, Place
from uncollapse.measures.even_choice import even_choice
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.observing import looking
from uncollapse.records.common import Stack
from uncollapse.records.diagnosis import RouterRecord

OF_THE_LOAD = ("load", "entropy", "effective_experts", "dead", "random_entropy", "random_dead", "random_load")


@dataclass
class RouterStatistics:
    """How often each expert of one router was chosen for a real token, `load` [expert]. `chosen`: experts for each token. `tokens`:
    real tokens for which it chose. `reason`: why that is not known."""

    block: int
    stack: Stack | None
    experts: int
    load: Tensor
    chosen: int = 0
    tokens: int = 0
    reason: str = ""


class Routing:
    """Counts the choices of every router; an `Observer`."""

    def __init__(self, anatomy: Anatomy, clouds: Clouds, is_own: Callable[[], bool]) -> None:
        self.anatomy, self.clouds, self._is_own = anatomy, clouds, is_own
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self.statistics: list[RouterStatistics] = []
        for number, block in enumerate(anatomy.blocks):
            for router in (part.router for part in block.parts if part.router is not None):
                load = torch.zeros(router.experts, dtype=torch.int64)
                statistics = RouterStatistics(number, block.stack, router.experts, load)
                self.statistics.append(statistics)
                self.handlers[router.point] = looking([functools.partial(self._look, statistics)], is_own)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """It needs no hooks: it stands at operations only."""
        yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Nothing to note: the masks are those of the clouds."""

    def let_go(self) -> None:
        self.handlers.clear()

    def _look(self, statistics: RouterStatistics, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        axes, shape = self.anatomy.blocks[statistics.block].axes, self.clouds.entered.get(statistics.block)
        padding = self.clouds.paddings[self.anatomy.stack_of(statistics.block)]
        chosen = chosen_in(output)
        rows = None if shape is None or chosen is None else as_rows(chosen, math.prod(shape))
        if rows is None or axes is None or (axes.sequence, axes.token) != (0, (1,)) or padding.segments is not None:
            statistics.reason = "the rows of the choice are not those of the stream's tokens, sequence after sequence"
            return
        if padding.mask is not None:
            if padding.mask.numel() != len(rows):
                statistics.reason = "the mask has another number of tokens"
                return
            rows = rows[padding.mask.flatten().to(rows.device)]
        statistics.load += torch.bincount(rows.flatten().cpu(), minlength=statistics.experts)
        statistics.tokens += len(rows)
        statistics.chosen = rows.shape[1]


def router_records(statistics: Sequence[RouterStatistics]) -> list[RouterRecord]:
    """One record for each router."""
    return [_router_record(each) for each in statistics]


def _router_record(statistics: RouterStatistics) -> RouterRecord:
    total = int(statistics.load.sum())
    reason = statistics.reason or ("" if total else "no token was met")
    if reason:
        missing = dict.fromkeys(("chosen", *OF_THE_LOAD), reason)
        return RouterRecord(statistics.block, statistics.stack, statistics.experts, None, 0, unavailable=missing)
    shares = statistics.load.double() / total
    entropy = float(torch.special.entr(shares).sum())
    even = even_choice(statistics.experts, statistics.chosen, statistics.tokens)
    return RouterRecord(
        block=statistics.block,
        stack=statistics.stack,
        experts=statistics.experts,
        chosen=statistics.chosen,
        tokens=statistics.tokens,
        load=shares.tolist(),
        entropy=entropy / math.log(statistics.experts),  # of one expert nothing is chosen: that is no router
        effective_experts=math.exp(entropy),
        dead=(statistics.load == 0).nonzero()[:, 0].tolist(),
        random_entropy=even.entropy,
        random_dead=even.dead,
        random_load=list(even.load),
    )
