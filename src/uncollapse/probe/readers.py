"""What the norms that read a residual stream make of it: the token cloud as the next sublayer sees it.

A norm has a gain for each feature and often a shift. One feature can hold nearly all of a stream's energy while the next norm's
gain silences it, so that the stream alone looks like one point where its readers see tokens far apart; the other way round is as
possible. Here each norm's own result is measured, at the norms whose input *is* the stream at a site: those before the sublayers
of the next block, and the last norm of the model. Several norms may read one stream, each with its own gain.

When not to use it: for the stream itself, whoever reads it. `sites` measures that.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, ModuleCall, NormPiece, Place
from uncollapse.measures import geometry
from uncollapse.measures.running import Running
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.sites import SiteStatistics
from uncollapse.restoring import restoring

Meets = Callable[[Tensor, Tensor], None]  # a norm's input and output


class Readers:
    """Measures the norms that read the stream between blocks; an `Observer`. Fills in `readers` of the statistics of the sites."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        statistics: list[SiteStatistics],
        clouds: Clouds,
        is_own: Callable[[], bool],
    ) -> None:
        self.model, self.anatomy, self.clouds, self._is_own = model, anatomy, clouds, is_own
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self._modules: dict[str, dict[int, Meets]] = {}
        self._runs: dict[str, int] = {}
        self._given: dict[tuple[Point, int], Tensor] = {}  # by operation and operand
        self._reading: dict[Point, set[int]] = {}
        self._giving: dict[Point, list[tuple[NormPiece, Meets]]] = {}
        # By site: the stream there, at the end of a stack and where norms read several streams. Else `clouds` has it.
        self._kept: dict[int, Tensor] = {}
        self._sites = statistics
        at_entry, at_end = self._places()
        for number, block in enumerate(anatomy.blocks):
            site = at_entry[number]
            norms = [norm for norm in block.norms if norm.role == "before"]
            if norms:
                # Of several streams side by side a norm reads what the first sublayer reads of them.
                first = [block.parts[part].read for part in block.residuals[0].parts]
                self.streams += [(read, functools.partial(self._keep, site)) for read in first if read is not None]
            for norm in norms:
                self._watch(norm.where, functools.partial(self._read, site, number, str(norm), at_end=False))
        for stack, site in zip(anatomy.stacks, at_end, strict=True):
            last = stack.blocks[-1]
            if anatomy.outer_norms:
                self.streams.append((anatomy.blocks[last].exit, functools.partial(self._keep, site)))
            for where in anatomy.outer_norms:
                self._watch(where, functools.partial(self._read, site, last, _name(where), at_end=True))
        for point in dict.fromkeys([*self._reading, *self._giving]):
            self.handlers[point] = self._at_piece(point)

    def _places(self) -> tuple[dict[int, int], list[int]]:
        """By block the number of the site that enters it; by stack that of its last one."""
        entry: dict[int, int] = {}
        end: list[int] = []
        count = 0
        for stack in self.anatomy.stacks:
            entry |= {block: count + i for i, block in enumerate(stack.blocks)}
            count += 1 + len(stack.blocks)
            end.append(count - 1)
        return entry, end

    def _watch(self, where: ModuleCall | NormPiece, meets: Meets) -> None:
        if isinstance(where, ModuleCall):
            known = self._modules.setdefault(where.name, {})
            known[where.call] = _both(known[where.call], meets) if where.call in known else meets
        else:
            self._reading.setdefault(where.reads, set()).add(where.operand)
            self._giving.setdefault(where.gives, []).append((where, meets))

    # The pass -----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks for the passes inside. Install them inside `intercepted`: operations of theirs must not count as the model's."""
        with restoring() as changes:
            for name in self._modules:
                module, leave = self.model.get_submodule(name), functools.partial(self._leave, name)
                changes.hook(module, "forward", leave, prepend=True, with_kwargs=True)
            yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        for noted in (self._runs, self._given, self._kept):
            noted.clear()

    def let_go(self) -> None:
        self.streams.clear()
        self.handlers.clear()
        self._modules.clear()
        self._giving.clear()
        self._kept.clear()

    def _keep(self, site: int, stream: Tensor) -> None:
        if self._is_own():
            self._kept[site] = stream.detach().clone()  # a copy: a block may add to its stream in place

    def _leave(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._is_own():
            return
        run = self._runs.get(name, 0)
        self._runs[name] = run + 1
        meets = self._modules[name].get(run)
        given, got = next(tensors_in([args, kwargs]), None), next(tensors_in(output), None)
        if meets is not None and given is not None and got is not None:
            meets(given, got)

    def _at_piece(self, point: Point) -> Handler:
        """A norm that is no module begins or ends here."""

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_own():
                for operand in self._reading.get(point, ()):
                    self._given[point, operand] = list(tensors_in([args, kwargs]))[operand].detach().clone()
            output = function(*args, **kwargs)
            if self._is_own():
                for piece, meets in self._giving.get(point, ()):
                    given = self._given.get((piece.reads, piece.operand))
                    if given is not None:
                        meets(given, piece.result(output))
            return output

        return handler

    def _read(self, site: int, number: int, name: str, given: Tensor, got: Tensor, *, at_end: bool) -> None:
        """Measure the norm's result, if it was given the stream of this site: what enters the block, or `at_end` leaves it."""
        kept = self._kept.get(site)
        if kept is None and not at_end:
            kept = self.clouds.entering(number)
        if kept is None or kept.shape != given.shape or not torch.equal(kept.to(given.dtype), given):
            return
        with measuring(got):
            found = self.clouds.tokens_of(number, got, name)
            if found is None:
                return
            cloud, mask = found
            apart = geometry.consensus_distance(cloud, mask)
        known = self._sites[site].readers
        known[name] = known.get(name, Running.empty(1)).add(apart.double().unsqueeze(-1))


def _both(first: Meets, second: Meets) -> Meets:
    def meets(given: Tensor, got: Tensor) -> None:
        first(given, got)
        second(given, got)

    return meets


def _name(where: ModuleCall | NormPiece) -> str:
    return where.name if isinstance(where, ModuleCall) else str(where)
