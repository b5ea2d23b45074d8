"""A corpus shared out over processes: each observes its share, and what they saw is put together.

The batches, longest sequences first, are dealt out in turn. Each figure says how it merges: sums, extremes, or notes that are
joined in the order of the processes. Every process ends with the same `Observations`, those of one process that saw all of the
corpus, up to the order of sums in float64.

What depends on order in one process is kept the same here: which sequences are held out is counted over the whole corpus, and how
far vectors vary is counted from the first vector of the corpus, which every process meets on the corpus's first sequence. Where two
batches give two reasons for one missing figure, another one of them may be told.

When not to use it: for a model whose weights are sharded. All processes run it together then, each on all of the corpus.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse import processes
from uncollapse.anatomy.interception import ChangedPath, device_of
from uncollapse.anatomy.stacks import per_token
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.measures.affine_fit import AffineFit, Sums
from uncollapse.measures.running import Running, RunningCloud
from uncollapse.probe.activity import PartActivity
from uncollapse.probe.attention import AttentionStatistics
from uncollapse.probe.passes import WATCHED, Observations, capture, on_device, sequences_before
from uncollapse.probe.sites import SIDE_BY_SIDE_MEASURES, SiteStatistics
from uncollapse.probe.sublayers import UpdateStatistics


def capture_shared(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    anatomy: Anatomy,
    *,
    caller: str,
    **options: Any,
) -> Observations:
    """What `capture` observes of all `batches`, of which each process runs its share; every process has all of them. `options` are
    those of `capture`; `on_output` is given the process's own, each once.

    Raises what `capture` raises, in every process: `ChangedPath` with the first batch that was met. `LostProcess` where another
    process ended.
    """
    own, counted = range(processes.number(), len(batches), processes.count()), sequences_before(batches, anatomy)
    share, before = [batches[i] for i in own], [counted[i] for i in own]
    counts_distances = "parts" in (options.get("watch") or WATCHED[options.get("level", "core")])
    for start in (few_sequences(batches[0], anatomy), batches[0]):
        changed: ChangedPath | None = None
        origins: list[PartActivity] | None = None
        running: Sequence[int] = [0]  # the numbers of the batches that are run
        with processes.agreed(caller):
            try:
                if counts_distances and share and processes.number():
                    alone = {k: v for k, v in options.items() if k not in {"progress", "on_output", "told"}}
                    origins = capture(model, [start], anatomy, **alone).parts
                running = own
                observed = capture(model, share, anatomy, before=before, origins=origins, **options)
            except ChangedPath as met:
                changed = met
        _raise_first(changed, running, batches, model, caller)
        if not counts_distances or _same_start(observed.parts, origins, caller):
            break
        options["on_output"] = None  # it has all outputs: the pass is made again for its figures alone
    else:
        _lay_starts_apart(observed.parts, caller)
    unite(observed, caller)
    return observed


def few_sequences(batch: Mapping[str, Any], anatomy: Anatomy) -> Mapping[str, Any]:
    """The first sequence of a batch, and of each mask the one with the most padding: some models go another way without any. All
    of the batch, where its sequences are not told by its first axis, or a square tensor may be a mask over pairs of tokens."""
    in_rows = all(b.axes is not None and b.axes.sequence == 0 and not b.chooses_tokens for b in anatomy.blocks)
    if not in_rows or any(stack.ids_transposed for stack in anatomy.stacks):
        return batch
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    size = next((len(value) for value in tensors.values()), 1)
    if {name for name, value in tensors.items() if value.shape == (size, size)} - per_token(anatomy):
        return batch
    masks = [t for t in tensors.values() if t.ndim == 2 and len(t) == size and bool(((t == 0) | (t == 1)).all())]
    rows = sorted({0, *(int(mask.sum(1).argmin()) for mask in masks)})
    return {name: value[rows] if name in tensors and len(value) == size else value for name, value in batch.items()}


def _same_start(parts: Sequence[PartActivity], origins: Sequence[PartActivity] | None, caller: str) -> bool:
    """Whether every process that began somewhere else than the first began at vectors of the same shapes."""

    def shapes(of: Sequence[PartActivity]) -> list[Any]:
        return [None if v.first is None else tuple(v.first.shape) for part in of for v in part.varying()]

    mine = shapes(parts) if processes.number() == 0 else None if origins is None else shapes(origins)
    first, *others = processes.gathered(mine, caller)
    return all(each is None or each == first for each in others)


def _lay_starts_apart(parts: Sequence[PartActivity], caller: str) -> None:
    """Where the corpus does not begin with a vector that every process could count from (its first batch is not finite), vectors
    are at least as far apart as the first ones of two processes: no less than half of what one process says."""
    own = [varying for part in parts for varying in part.varying()]
    several = processes.gathered([None if v.first is None else v.first.cpu() for v in own], caller)
    for place, varying in enumerate(own):
        for other in (each[place] for each in several):
            if varying.first is None or varying.apart is None or other is None or other.shape != varying.first.shape:
                continue
            gap = torch.linalg.vector_norm(varying.first.double() - other.to(varying.first).double(), dim=-1)
            varying.apart = torch.maximum(varying.apart, gap.to(varying.apart))


def _raise_first(
    changed: ChangedPath | None,
    running: Sequence[int],
    batches: Sequence[Mapping[str, Any]],
    model: nn.Module,
    caller: str,
) -> None:
    """Where the model took another path in some process, raise that in all of them, with the first batch that shows it."""
    number = None if changed is None else 0 if changed.number is None else running[changed.number]
    first = min((n for n in processes.gathered(number, caller) if n is not None), default=None)
    if first is not None:
        raised = changed or ChangedPath(f"{caller}: the model took another path in another process")
        raised.batch = on_device(batches[first], device_of(model))
        raise raised


# How everything merges ------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """Numbers that merge element by element. `value` is None where this process did not see any."""

    how: processes.How
    value: Tensor | None
    put: Callable[[Tensor], object]


@dataclass
class Note:
    """Anything else that is small: `join` makes one of what the processes noted, in their order."""

    value: Any
    join: Callable[[list[Any]], Any]
    put: Callable[[Any], object]


def unite(observed: Observations, caller: str) -> None:
    """Make what this process observed what all of them observed together."""
    several = list(notes(observed))
    together = processes.gathered([note.value for note in several], caller)
    for place, note in enumerate(several):
        note.put(note.join([each[place] for each in together]))
    for cloud in observed.corpus:  # one at a time: all of them, from all processes, are gigabytes for a large model
        own = None if cloud.cloud is None else cloud.cloud.on_cpu()
        cloud.put(_merged_clouds(processes.gathered(own, caller)))
    _share_matrices(observed, caller)
    parts = list(figures(observed))
    shapes = processes.gathered([None if p.value is None else tuple(p.value.shape) for p in parts], caller)
    by_kind: dict[processes.How, list[tuple[Figure, Tensor]]] = {}
    for place, part in enumerate(parts):
        shape = next((each[place] for each in shapes if each[place] is not None), None)
        if shape is not None:
            by_kind.setdefault(part.how, []).append((part, own_or_neutral(part, shape)))
    for how, those in by_kind.items():
        for (part, _), merged in zip(those, processes.reduced(how, [t for _, t in those], caller), strict=True):
            part.put(merged)


_NEUTRAL: Mapping[processes.How, float] = {"sum": 0.0, "least": torch.inf, "most": -torch.inf}


def own_or_neutral(part: Figure, shape: tuple[int, ...]) -> Tensor:
    """The numbers of this process in float64, or such as change no others."""
    if part.value is not None and tuple(part.value.shape) == shape:
        return part.value.detach().to("cpu", torch.float64)
    return torch.full(shape, _NEUTRAL[part.how], dtype=torch.float64)


def united_running(several: Sequence[Running], caller: str) -> list[Running]:
    """Statistics that are no part of `Observations`, merged over the processes."""
    total = processes.reduced("sum", [r.total for r in several], caller)
    count = processes.reduced("sum", [r.count.double() for r in several], caller)
    low = processes.reduced("least", [r.low for r in several], caller)
    high = processes.reduced("most", [r.high for r in several], caller)
    return [Running(t, a, b, n.long()) for t, a, b, n in zip(total, low, high, count, strict=True)]


def _share_matrices(observed: Observations, caller: str) -> None:
    """Output projections that the first process did not meet and another did, unless one found a reason against them."""
    having = processes.gathered([s.matrix is not None or s.figures is not None for s in observed.attention], caller)
    for number, statistics in enumerate(observed.attention):
        if "matrix" in statistics.reasons:
            statistics.matrix = statistics.figures = None
        elif any(each[number] for each in having) and not having[0][number]:
            others = processes.gathered(None if statistics.matrix is None else statistics.matrix.cpu(), caller)
            statistics.matrix = next((matrix for matrix in others if matrix is not None), None)


# Figures ----------------------------------------------------------------------------------------------------------------


def figures(observed: Observations) -> Iterator[Figure]:
    """All numbers of a pass, in an order that is the same in all processes."""
    for name in ("sequences", "tokens"):
        yield _number(observed, name, "sum", int)
    yield _number(observed, "max_tokens", "most", int)
    for site in observed.sites:
        for name in ("plain", "massive", "stream"):
            yield from _running(site, name)
        for reader in site.readers:
            yield from _running(site.readers, reader)
        for number in range(len(site.side_by_side)):
            yield from _running(site.side_by_side, number)
        yield _number(site, "not_finite", "sum", int)
        yield _number(site, "width", "most", int)
    for attention in observed.attention:
        for name in ("values", "energy", "tokens"):
            yield from _running(attention, name)
        yield _number(attention, "deviation", "most", float)
        yield _number(attention, "finite", "most", bool)
        yield from _row_sums(attention)
    for update in observed.updates:
        yield from _running(update, "values")
        yield _number(update, "scored", "sum", int)
        yield from _fit(update)
    for norm in observed.norms:
        yield from _running(norm, "values")
    for part in observed.parts:
        yield from _part(part)
    for router in observed.routers:
        yield _tensor(router, "load", "sum", torch.int64)
        yield _number(router, "tokens", "sum", int)
        yield _number(router, "chosen", "most", int)
    for embedding in observed.embeddings:
        yield _number(embedding, "apart", "most", float)
        yield _number(embedding, "pairs", "sum", int)
        yield _number(embedding, "epsilon", "most", float)


def _number(owner: object, name: str, how: processes.How, kind: type[int | float]) -> Figure:
    value = getattr(owner, name)
    known = None if value is None else torch.tensor(float(value), dtype=torch.float64)
    return Figure(how, known, lambda merged: setattr(owner, name, kind(merged.item())))


def _tensor(owner: object, name: str, how: processes.How, dtype: torch.dtype = torch.float64) -> Figure:
    return Figure(how, getattr(owner, name), lambda merged: setattr(owner, name, merged.to(dtype)))


def _running(owner: Any, name: Any) -> Iterator[Figure]:
    """Of an attribute, or of an entry of a mapping or a list."""
    is_entry = isinstance(owner, dict | list)
    now: Running = owner[name] if is_entry else getattr(owner, name)

    def put(field: str, dtype: torch.dtype, merged: Tensor) -> None:
        known: Running = owner[name] if is_entry else getattr(owner, name)
        new = replace(known, **{field: merged.to(dtype)})
        if is_entry:
            owner[name] = new
        else:
            setattr(owner, name, new)

    yield Figure("sum", now.total, partial(put, "total", torch.float64))
    yield Figure("least", now.low, partial(put, "low", torch.float64))
    yield Figure("most", now.high, partial(put, "high", torch.float64))
    yield Figure("sum", now.count, partial(put, "count", torch.int64))


def _row_sums(attention: AttentionStatistics) -> Iterator[Figure]:
    low, high = (torch.tensor(value, dtype=torch.float64) for value in attention.row_sums)
    yield Figure("least", low, lambda merged: _set_row_sums(attention, 0, merged))
    yield Figure("most", high, lambda merged: _set_row_sums(attention, 1, merged))


def _set_row_sums(attention: AttentionStatistics, end: int, merged: Tensor) -> None:
    low, high = attention.row_sums
    attention.row_sums = (merged.item(), high) if end == 0 else (low, merged.item())


def _fit(update: UpdateStatistics) -> Iterator[Figure]:
    """The sums of an affine fit, which are about one origin by now."""
    fit = update.fit
    if fit is None:
        return
    yield _number(fit, "eps", "most", float)
    for split in (False, True):
        known, merged = fit.sums[split], list[Tensor]()
        for place in range(len(Sums._fields)):
            value = None if known is None else torch.as_tensor(known[place], dtype=torch.float64)
            yield Figure("sum", value, partial(_put_sum, fit, split, merged))


def _put_sum(fit: AffineFit, split: bool, merged: list[Tensor], one: Tensor) -> None:
    merged.append(one)
    if len(merged) == len(Sums._fields):
        fit.sums[split] = Sums(int(merged[0].item()), *merged[1:])


def _part(part: PartActivity) -> Iterator[Figure]:
    for varying in part.varying():
        yield _tensor(varying, "apart", "most")
        yield _tensor(varying, "size", "most")
        yield _tensor(varying, "energy", "sum")
        yield _number(varying, "entries", "sum", int)
        yield _number(varying, "tokens", "sum", int)
    for directions in (part.directions, part.stream_directions):
        yield _tensor(directions, "gram", "sum")
        yield _number(directions, "tokens", "sum", int)
    yield _tensor(part.units, "least", "least")
    yield _tensor(part.units, "most", "most")
    yield _tensor(part.units, "zeros", "most", torch.bool)
    yield _number(part.units, "tokens", "sum", int)
    for name in ("update_size", "block_change", "epsilon"):
        yield _number(part, name, "most", float)
    for name in ("logit_range", "head_output"):
        yield _tensor(part, name, "most")


# Notes ------------------------------------------------------------------------------------------------------------------


def notes(observed: Observations) -> Iterator[Note]:
    """All that is no number, in an order that is the same in all processes."""
    yield _noted(observed, "uncounted", _last)
    for site in observed.sites:
        yield _noted(site, "reason", _last)
        yield Note(list(site.readers), _union, partial(_begin_readers, site))
        yield Note(len(site.side_by_side), max, partial(_begin_side_by_side, site))
    for cloud in observed.corpus:
        yield _noted(cloud, "reason", _last)
        yield _noted(cloud, "epsilon", max)
        yield _noted(cloud, "seen", sum)
    for router in observed.routers:
        yield _noted(router, "reason", _last)
    for attention in observed.attention:
        yield _noted(attention, "route", _last)
        yield _noted(attention, "reasons", _joined)
        yield _noted(attention, "forbids", _each_once)
    for statistics in (*observed.updates, *observed.norms, *observed.parts):
        yield _noted(statistics, "reasons", _joined)
    for update in observed.updates:
        if update.fit is not None:
            origins = update.fit.origins
            yield Note(None if origins is None else tuple(t.cpu() for t in origins), _first, partial(_move, update.fit))
    for part in observed.parts:
        yield _noted(part, "copies", _in_all)
        unread = part.units.unread
        yield Note(None if unread is None else unread.cpu(), _first, partial(setattr, part.units, "unread"))


def _merged_clouds(several: list[RunningCloud | None]) -> RunningCloud | None:
    known = [each for each in several if each is not None and each.count]
    return functools.reduce(RunningCloud.merge, known) if known else None


def _noted(owner: object, name: str, join: Callable[[list[Any]], Any]) -> Note:
    return Note(getattr(owner, name), join, partial(setattr, owner, name))


def _last(noted: list[str]) -> str:
    return next((each for each in reversed(noted) if each), "")


def _first(noted: list[Any]) -> Any:
    return next((each for each in noted if each is not None), None)


def _union(noted: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for each in noted for name in each))


def _joined(noted: list[dict[str, str]]) -> dict[str, str]:
    return {key: reason for each in noted for key, reason in each.items()}


def _each_once(noted: list[dict[int, list[Any]]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for each in noted:
        for call, several in each.items():
            known = found.setdefault(call, [])
            known += [one for one in several if one not in known]
    return found


def _in_all(noted: list[set[Any] | None]) -> set[Any] | None:
    known = [each for each in noted if each is not None]
    return set.intersection(*known) if known else None


def _begin_readers(site: SiteStatistics, names: list[str]) -> None:
    site.readers = {name: site.readers.get(name, Running.empty(1)) for name in names}


def _begin_side_by_side(site: SiteStatistics, count: int) -> None:
    site.side_by_side = site.side_by_side or [Running.empty(len(SIDE_BY_SIDE_MEASURES)) for _ in range(count)]


def _move(fit: AffineFit, origins: tuple[Tensor, Tensor] | None) -> None:
    if origins is not None:
        fit.move(origins)
