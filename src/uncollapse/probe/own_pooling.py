"""The model's own pooling: an output with one row for each sequence, which that sequence alone makes.

An output of two axes may hold anything. So it is poked: one sequence of a small batch is replaced by another. The output is a
pooling if its row becomes the other one's, and no other row moves. Its width must not follow the number of tokens: a figure for
each token (where an answer starts) is none, though the sequence alone makes it. The small batch has fewer tokens to show that.

When not to use it: to pool a stream. `corpus` does that.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse import processes
from uncollapse.anatomy.examples import TOKENS, example_batch
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.shared_readings import all_made
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.measures.running import RunningCloud
from uncollapse.probe.corpus import CorpusStatistics
from uncollapse.probe.sites import SiteStatistics
from uncollapse.probe.sizes import single


class OwnPooling:
    """Collects from a pass every output that may be a pooling; `statistics` gives those that are."""

    def __init__(self, seed: int) -> None:
        self._found: dict[str, CorpusStatistics] = {}
        self._taken: dict[str, int] = {}
        self._poking: _Poking | None = None
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + processes.number())

    def take(self, batch: Mapping[str, Any], output: Any) -> None:
        """The model's output on a batch of the pass."""
        sequences = _sequences(batch)
        candidates = [(name, rows) for name, rows in _rows(output) if len(rows) == sequences]
        keys = torch.rand(sequences if candidates else 0, generator=self._generator, dtype=torch.float64)
        for name, rows in candidates:
            if name not in self._found:
                site = SiteStatistics(name, None, None, width=rows.shape[1])
                self._found[name] = CorpusStatistics(site, "own", None)
            if rows.shape[1] != self._found[name].site.width:
                continue  # no pooling, then, and left out for the sequences that are missing
            self._taken[name] = self._taken.get(name, 0) + sequences
            epsilon = torch.finfo(rows.dtype).eps
            self._found[name].take(single(rows.detach()).clone(), keys.to(rows.device), epsilon)

    def unite(self, caller: str) -> None:
        """Put together what the processes took that share the corpus; see `sharding`."""
        if processes.count() == 1:
            return
        own = {
            name: (
                self._taken[name],
                found.site.width,
                found.epsilon,
                None if found.cloud is None else found.cloud.on_cpu(),
            )
            for name, found in self._found.items()
        }
        several = processes.gathered(own, caller)
        for name in dict.fromkeys(name for each in several for name in each):
            those = [each[name] for each in several if name in each]
            those = [each for each in those if each[1] == those[0][1]]  # as in `take`
            clouds = [cloud for _, _, _, cloud in those if cloud is not None]
            statistics = CorpusStatistics(SiteStatistics(name, None, None, width=those[0][1]), "own", None)
            statistics.epsilon = max(epsilon for _, _, epsilon, _ in those)
            statistics.put(functools.reduce(RunningCloud.merge, clouds) if clouds else None)
            self._found[name], self._taken[name] = statistics, sum(taken for taken, _, _, _ in those)

    def passes(self, model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy) -> list[Callable[[], object]]:
        """The passes that tell which outputs are poolings, to be made within `probing`, for `statistics` of the same model and
        batch; none where that is known."""
        if _known(model, anatomy) is not None:
            return []
        self._poking = _Poking(model, batch)
        return self._poking.passes()

    def statistics(
        self, model: nn.Module, batch: Mapping[str, Any], sequences: int, anatomy: Anatomy
    ) -> list[CorpusStatistics]:
        """The clouds of those outputs that are poolings, as a small piece of `batch` shows; none where the model does not run on
        one. An output that was not met once for each of the corpus' `sequences` is left out. What was found is remembered for as
        long as the model's `anatomy` is."""
        whole = {name: found for name, found in self._found.items() if self._taken[name] == sequences}
        if not whole:
            return []
        known = _known(model, anatomy)
        if known is None or not whole.keys() <= known.keys():
            poking = self._poking or _Poking(model, batch)
            known = poking.widths(list(whole), anatomy)
            _remembered[model] = weakref.ref(anatomy), known
        return [found for name, found in whole.items() if known[name] == found.site.width]


_remembered: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Anatomy], dict[str, int]]] = (
    weakref.WeakKeyDictionary()
)


def _known(model: nn.Module, anatomy: Anatomy) -> dict[str, int] | None:
    """The widths of this model's poolings, 0 of other outputs, if they were asked for since its anatomy was proved."""
    proved, known = _remembered.get(model, (None, None))
    return known if proved is not None and proved() is anatomy else None


class _Poking:
    """Runs a small piece of a batch, and the same with one sequence replaced."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self._model, self._batch = model, batch
        device = device_of(model)
        lengths = [length for v in batch.values() if (length := _length(v)) > 1]
        shorter = example_batch(batch, min([TOKENS, *(length - 1 for length in lengths)]))
        self._piece = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in shorter.items()}
        self._made: list[dict[str, Tensor]] = []
        self._has_failed = False

    def passes(self) -> list[Callable[[], object]]:
        """The passes, in their order; none where the piece has too few sequences to tell. None raises what the model raises."""
        self._made.clear()
        if _sequences(self._piece) < 3:
            return []
        return [functools.partial(self._run, given) for given in (self._piece, _replaced(self._piece))]

    def _run(self, given: Mapping[str, Any]) -> None:
        try:
            self._made.append(dict(_rows(self._model(**given))))
        except Exception:  # the model's own code may raise anything on a piece; then nothing is known of its outputs
            self._has_failed = True

    def widths(self, names: list[str], anatomy: Anatomy) -> dict[str, int]:
        """The width of those of these outputs that are poolings; 0 of the others."""
        if len(self._made) < 2 and not self._has_failed:
            try:
                with probing(self._model):
                    all_made(self._model, anatomy.own_modules, self.passes)
            except Exception:  # the same
                self._has_failed = True
        if len(self._made) < 2 or self._has_failed:
            return dict.fromkeys(names, 0)
        before, after = self._made
        # An output that is as wide as the piece is long, where the corpus is no longer, may be a figure for each token.
        uncut = {length for name, v in self._piece.items() if (length := _length(v)) == _length(self._batch[name])}
        found = {name: before[name].shape[1] for name in names if _is_pooling(before.get(name), after.get(name))}
        return dict.fromkeys(names, 0) | {name: width for name, width in found.items() if width not in uncut}


def _length(value: Any) -> int:
    """How many tokens a tensor may have; 0 where it has none."""
    return value.shape[1] if isinstance(value, Tensor) and value.ndim in (2, 3) else 0


def _sequences(batch: Mapping[str, Any]) -> int:
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 0)


def _rows(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Outputs of two axes, by name."""
    if isinstance(output, Tensor):
        output = {"output": output}
    elif isinstance(output, tuple | list):
        output = {f"output {i}": value for i, value in enumerate(output)}
    if isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() and value.shape[1] > 1:
                yield str(name), value


def _replaced(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The first sequence replaced by the second."""
    many = _sequences(piece)
    order = torch.tensor([1, *range(1, many)])
    return {
        name: value[order.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == many
        else value
        for name, value in piece.items()
    }


def _is_pooling(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None or before.shape != after.shape or not bool(before.isfinite().all()):
        return False
    expected = torch.cat([before[1:2], before[1:]])
    scale = before.abs().amax().clamp(min=torch.finfo(before.dtype).tiny)
    near = 64 * torch.finfo(before.dtype).eps * scale  # a batch of other rows may be summed in another order
    was_moved = bool(((before[0] - before[1]).abs() > near).any())
    return was_moved and bool(((after - expected).abs() <= near).all())
