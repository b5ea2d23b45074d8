"""One probe pass over a corpus, reduced to running statistics where the numbers appear.

Token clouds are measured at the block boundaries and let go; attention is measured inside the model's own attention call:
a fused call from its queries and keys, a softmax the model ran itself from its weights. Nothing of size tokens × tokens
a head is kept, nor anything that grows with the corpus. The model runs the very operations it would have run, so its
outputs are bit-identical, but for what nobody can look inside: compiled code, flex_attention, and torch's fused layer and
attention run operation by operation, and round otherwise. Hooks and wrapped forwards are gone afterwards, also after an exception
or Ctrl-C.

`capture` observes only the passes that it starts itself. If another thread runs the model meanwhile, or another model that
shares its modules does, their outputs are right and enter no figure; but they see the model in evaluation mode and without
its key-value cache, as the probe does. Do not train in one thread while probing in another. `NextPass` observes one that somebody
else makes, in training.

When not to use this: to look at activations. Nothing is stored; a hook of your own does that better.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.drawn_proof import DrawnProof
from uncollapse.anatomy.expected_runs import runs_checked
from uncollapse.anatomy.interception import ChangedPath, device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.shared_readings import made_together, read_once
from uncollapse.anatomy.stages import can_be_shared, in_flight, stages
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.errors import InputError, UncollapseError
from uncollapse.interventions.without import is_ablated
from uncollapse.measures.shared_out import threads_kept
from uncollapse.probe.activity import Activity, EmbeddingActivity, PartActivity
from uncollapse.probe.attention import Attention, AttentionStatistics, attention_places, attention_statistics
from uncollapse.probe.clouds import Clouds, Told
from uncollapse.probe.corpus import POOLED, Corpus, CorpusStatistics
from uncollapse.probe.observing import Observer, OwnPass, all_handlers
from uncollapse.probe.projections import Digest, Projections
from uncollapse.probe.readers import Readers
from uncollapse.probe.routing import RouterStatistics, Routing
from uncollapse.probe.sites import Sites, SiteStatistics
from uncollapse.probe.sublayers import NormStatistics, Sublayers, UpdateStatistics
from uncollapse.restoring import reduced_as_found, restoring

Progress = Callable[[str, int, int], None]
Level = Literal["core", "full"]
Watched = Literal[
    "sites",
    "corpus",
    "few tokens",
    "all tokens",
    "routers",
    "attention",
    "rows",
    "spectra",
    "projections",
    "sublayers",
    "parts",
]

_BOTH: Final[frozenset[Watched]] = frozenset(
    {"sites", "corpus", "routers", "attention", "rows", "projections", "parts"}
)
WATCHED: Final[Mapping[Level, frozenset[Watched]]] = {
    "core": _BOTH | {"few tokens"},
    "full": _BOTH | {"all tokens", "spectra", "sublayers"},
}


class NotBorneOut(UncollapseError):  # noqa: N818 - what is found, as in the other errors
    """With the model's own weights its blocks are not what they were with drawn ones."""


_NOT_BORNE_OUT = (
    "capture: expected blocks that are what they were with drawn weights in the place of their own, got others. What is measured "
    "may be something else. Prove the model with its own weights."
)


@dataclass
class Observations:
    """What one probe pass saw: a site for each stack's embedding and each of its blocks, stack after stack, and an entry for each
    attention call, for each part, for each embedding, and for each pooling at each site; at level `full` also one for each update
    and for each norm call inside a block. `sequences`, `tokens` (real ones) and `max_tokens` are those of the first stack's
    stream, or, where `uncounted` says why these cannot be told, guesses from what was given: no figures."""

    sites: list[SiteStatistics]
    attention: list[AttentionStatistics]
    updates: list[UpdateStatistics] = field(default_factory=list)
    norms: list[NormStatistics] = field(default_factory=list)
    parts: list[PartActivity] = field(default_factory=list)
    embeddings: list[EmbeddingActivity] = field(default_factory=list)
    corpus: list[CorpusStatistics] = field(default_factory=list)
    routers: list[RouterStatistics] = field(default_factory=list)
    sequences: int = 0
    tokens: int = 0
    max_tokens: int = 0
    uncounted: str = ""

    def all_statistics(self) -> list[object]:
        """Each statistic of each place, in an order that two passes over one anatomy share."""
        several = self.attention, self.updates, self.norms, self.parts, self.embeddings, self.corpus, self.routers
        return [*self.sites, *itertools.chain.from_iterable(several)]


def capture(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    anatomy: Anatomy,
    *,
    level: Level = "core",
    watch: Collection[Watched] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_output: Callable[[Mapping[str, Any], Any], None] | None = None,
    digest: Digest | None = None,
    before: Sequence[int] | None = None,
    origins: Sequence[PartActivity] | None = None,
    told: dict[int, Told] | None = None,
    together: bool = False,
    leaving: Callable[[nn.Module, Observations], object] = lambda stage, observed: None,
    forecast: DrawnProof | None = None,
    beside: Callable[[], Sequence[Callable[[], object]]] = lambda: (),
) -> Observations:
    """Run `model` once over `batches` (each a dict of tensors, moved to the model's device) and observe. `on_output` is given
    each batch and the model's output on it.

    watch: what to observe, by default all that belongs to the level (`WATCHED`). `"sites"`: the token clouds between blocks;
    without it they are only counted where they are not finite. `"corpus"`: the cloud over all sequences at every site, a point per
    sequence; `"all tokens"`: that of all tokens, `"few tokens"`: that of a sample of them. `"routers"`: which experts tokens are
    sent to. `"attention"`: whether the pass bears the reading out, and the spread that each head keeps; with `"rows"` also every
    row, with `"spectra"` also the decomposed matrices. `"projections"`: matrix and energy of the output projections. `"sublayers"`:
    what each adds and what each norm does. `"parts"`: whether each part does anything; of heads, as far as their attention and
    projections are watched. What is not watched leaves its statistics empty and changes no other figure.

    digest: is given the statistics of an attention while the matrix of its output projection is there, where that is no tensor of
    the model that stays (sharded, offloaded): it returns their `figures`, and the matrix is let go. None: every matrix is kept.

    before, origins: where `batches` are a share of a corpus (`probe.sharding`), how many sequences of it come before each, and
    what was seen of the parts on its first sequence.

    told: takes what is true of each batch whatever is taken away from the model, by its number, and gives it to the next pass.
    together: pass several batches at a time over a model whose weights are kept elsewhere, as many as `in_flight` says, so that
    each weight is read once for all of them. Every figure is what it is without.
    leaving: where weights are kept elsewhere, is given each module that was run with all its weights held (`stages`), while
    they still are, and what was seen so far.
    forecast: the proof on drawn weights that `anatomy` comes from, to be borne out in this pass. It is made `together` then.
    beside: gives passes that are made beside those of the first batches, where these are made `together`. None is made where not.

    Raises `InputError` where a padded batch meets a model whose token axis does not match the mask, `ChangedPath` where the
    model takes another path on a batch than the one that was proved, `EntangledPasses` where batches cannot be passed `together`,
    `NotBorneOut` where the forecast is not.
    """
    watched = frozenset(WATCHED[level] if watch is None else watch)
    probe = _Probe(model, anatomy, level, watched, digest, seed=seed)
    device = device_of(model)
    held = stages(model, anatomy.own_modules)
    if before is None:
        before = sequences_before(batches, anatomy)
    if origins is not None:
        probe.start_from(origins)
    if together and can_be_shared(model, held) and not is_ablated(model):
        groups = in_flight(batches, held)
        others = [_Probe(model, anatomy, level, watched, digest, seed=seed) for _ in range(max(map(len, groups)) - 1)]
        with contextlib.ExitStack() as stack:
            for each in (probe, *others):
                stack.enter_context(contextlib.closing(each))
            for each in others:
                each.sees_with(probe)
            stack.enter_context(probing(model, seed))
            ahead: Sequence[Callable[[], object]] = beside() if forecast is None else [*forecast.passes, *beside()]
            for group in groups:
                share = [(number, on_device(batches[number], device), before[number]) for number in group]
                _pass_together(
                    [probe, *others], share, held, len(batches), progress, on_output, told, leaving, forecast, ahead
                )
                forecast, ahead = None, ()
        return probe.observations
    if forecast is not None:
        raise NotBorneOut(_NOT_BORNE_OUT)
    with (
        contextlib.closing(probe),
        threads_kept(),
        probing(model, seed),
        read_once(model, held, lambda stage: leaving(stage, probe.observations)),
        probe.installed(),
        runs_checked(model, anatomy) as check,
    ):
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("probe", number, len(batches))
            moved = on_device(batch, device)
            try:
                shown = probe.begin(moved, before[number], None if told is None else told.get(number))
                if told is not None:
                    told[number] = shown
                with check(moved):
                    output = model(**moved)
            except ChangedPath as changed:
                changed.batch = moved
                changed.number = number
                raise
            probe.count()
            if on_output is not None:
                on_output(moved, output)
        if progress is not None:
            progress("probe", len(batches), len(batches))
    return probe.observations


def _pass_together(
    probes: Sequence[_Probe],
    share: Sequence[tuple[int, Mapping[str, Any], int]],
    held: Sequence[nn.Module],
    count: int,
    progress: Progress | None,
    on_output: Callable[[Mapping[str, Any], Any], None] | None,
    told: dict[int, Told] | None,
    leaving: Callable[[nn.Module, Observations], object],
    forecast: DrawnProof | None,
    ahead: Sequence[Callable[[], object]],
) -> None:
    """Pass some of `count` batches together, each in sight of one of `probes`, and other passes `ahead` of them, that of a forecast
    that is to be borne out among these. share: the number of each, and how many sequences of the corpus come before it."""
    model, anatomy = probes[0].model, probes[0].anatomy
    problem: Exception | None = None
    passes: list[Callable[[], Any]] = []

    def observed(probe: _Probe, number: int, batch: Mapping[str, Any]) -> Any:
        try:
            with probe.installed(), runs_checked(model, anatomy) as check:
                probe.own.begin()
                with check(batch):
                    return model(**batch)
        except ChangedPath as changed:
            changed.batch, changed.number = batch, number
            raise

    def finished(place: int, output: Any) -> None:
        place -= len(ahead)
        if place < 0:
            return
        probes[place].count()
        number, batch, _ = share[place]
        if on_output is not None:
            on_output(batch, output)
        if progress is not None and (place + 1 < len(share) or number + 1 == count):
            progress("probe", number + 1, count)

    if progress is not None:
        progress("probe", share[0][0], count)
    for probe, (number, batch, before) in zip(probes, share, strict=False):
        try:
            shown = probe.begin(batch, before)
            if told is not None:
                told[number] = shown
        except Exception as error:  # whatever it is: the batches before it come first
            if isinstance(error, ChangedPath):
                error.batch, error.number = batch, number
            problem = error
            break
        passes.append(functools.partial(observed, probe, number, batch))

    def left(stage: nn.Module) -> None:
        if forecast is not None:
            forecast.prove_within(stage)
        leaving(stage, probes[0].observations)

    made_together(model, held, [*ahead, *passes], finished, left)
    if forecast is not None and not forecast.is_borne_out():
        raise NotBorneOut(_NOT_BORNE_OUT)
    if problem is not None:
        raise problem


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors there. Numbers stay in memory as they lie: in half precision another order rounds otherwise. Ids,
    labels and masks are laid out row after row: they round to nothing, and models call `view` on them."""
    return {k: _laid(v.to(device)) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _laid(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.contiguous()


def sequences_before(batches: Sequence[Mapping[str, Any]], anatomy: Anatomy) -> list[int]:
    """How many sequences come before each batch, as they are given."""
    return [0, *itertools.accumulate(_sequences(batch, anatomy) for batch in batches)][:-1]


def _sequences(batch: Mapping[str, Any], anatomy: Anatomy) -> int:
    """How many there are in a batch: as its token numbers say, or else the first axis of its first tensor."""
    for stack in anatomy.stacks:
        if stack.ids is not None and stack.ids in batch:
            return int(batch[stack.ids].shape[stack.ids_transposed])
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


class NextPass:
    """Observes the next training pass of `model`, which somebody else makes in this thread: on its batch, in training mode, with
    gradients. Passes in evaluation mode or without gradients are let by. It takes itself off when that pass ends; `close` takes it
    off before. Until then no compiled code runs in this thread but as it is written.

    `observations`: what was seen, once the pass is over. None before, and where `problem` says why nothing was. `is_broken`: that
    pass raised an exception, so half of it was seen, and no other one will be; `close` takes it off. Nothing is raised in the
    middle of somebody's training.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, watch: Collection[Watched]) -> None:
        self.observations: Observations | None = None
        self.problem: UncollapseError | None = None
        self.is_broken = False
        self._probe = _Probe(model, anatomy, "core", frozenset(watch), forbearing=True)
        self._thread = threading.get_ident()
        self._checking: contextlib.ExitStack | None = None
        with contextlib.ExitStack() as up:
            up.callback(self._probe.close)
            changes = up.enter_context(restoring())
            # Copies and pickles made meanwhile are of the model as it was found: what is put up here acts on this one.
            for module in model.modules():
                reduced = functools.partial(reduced_as_found, weakref.ref(module))
                changes.place(vars(module), "__reduce_ex__", reduced)
            self._check = changes.enter(runs_checked(model, anatomy))
            # Before all others: what begins a pass for them is not to see the runs that tell its tokens.
            changes.hook(model, "forward_pre", self._begin, prepend=True, with_kwargs=True)
            changes.enter(self._probe.installed(strict=False))
            changes.hook(model, "forward", self._end)
            changes.hook(model, "forward", self._break, always_call=True)
            self._up = up.pop_all()

    @property
    def is_over(self) -> bool:
        """Whether the pass was made."""
        return self.observations is not None or self.problem is not None

    def close(self) -> None:
        """Take all hooks off. May be called twice."""
        self._up.close()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_training = model.training and torch.is_grad_enabled()
        if is_training and self._checking is not None and self._is_in_it():
            # That pass ended with what torch calls no hook for, such as Ctrl-C.
            self.is_broken = True
            self._probe.own.end()
        has_begun = self._checking is not None or self.is_broken
        if has_begun or not is_training or threading.get_ident() != self._thread:
            return
        if _is_inside_compiled():
            self.problem = InputError(
                "Monitor: expected a training pass that runs as it is written, got one of a compiled model. Nobody can look inside "
                "compiled code. Leave out on='train', or torch.compile."
            )
            return
        batch = _by_name(model, args, kwargs)
        try:
            with probing(model):
                self._probe.begin(batch)
        except UncollapseError as error:
            self.problem = error
            return
        with contextlib.ExitStack() as checking:
            checking.enter_context(self._check(batch))
            self._checking = checking.pop_all()

    def _end(self, *_: Any) -> None:
        if not self._is_in_it():
            return
        try:
            if self._checking is not None:
                self._checking.close()
                self._probe.count()
                self.problem = self._probe.clouds.problem
                if self.problem is None:
                    self.observations = self._probe.observations
        except ChangedPath as error:
            self.problem = error
        finally:
            self.close()

    def _break(self, *_: Any) -> None:
        """The pass ended without `_end`. No hook is taken off here: torch is going through them, and would raise over that what
        its caller may not be waiting for."""
        self.is_broken = self.is_broken or self._is_in_it()

    def _is_in_it(self) -> bool:
        """Whether the pass that ends is the one to observe."""
        has_begun = self._checking is not None or self.problem is not None
        return has_begun and not self.is_broken and threading.get_ident() == self._thread


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of `model` gives it, by the names of its parameters."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    others = [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    named = dict(bound.arguments)
    for name in others:
        named |= named.pop(name, {})
    return named


def _is_inside_compiled() -> bool:
    """Whether a compiled model is running in this thread."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    frame: FrameType | None = sys._getframe(1)  # not this one: what it holds would hold it
    while frame is not None and not isinstance(frame.f_locals.get("self"), dynamo.OptimizedModule):
        frame = frame.f_back
    return frame is not None


class _Probe:
    """One pass: the observers that were asked for, and what they share."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        level: Level,
        watch: frozenset[Watched],
        digest: Digest | None = None,
        *,
        seed: int = 0,
        forbearing: bool = False,
    ) -> None:
        self.model, self.anatomy = model, anatomy
        self.own = OwnPass()
        keeps = bool(watch & {"sites", "parts"})
        self.clouds = Clouds(model, anatomy, self.own.is_own, keeps=keeps, forbearing=forbearing)
        attending = [
            (block.parts[index], attention_statistics(number, block, block.parts[index]))
            for number, index in attention_places(anatomy)
            for block in (anatomy.blocks[number],)
        ]
        sites = Sites(anatomy, self.clouds, self.own.is_own, measures="sites" in watch)
        self.observations = Observations(sites.statistics, [statistics for _, statistics in attending])
        self.observers: list[Observer] = [sites]
        self.counting: list[Corpus | Sublayers] = []  # those that ask how much of the corpus comes before a batch
        if watch & {"corpus", "few tokens", "all tokens"}:
            corpus = Corpus(
                anatomy,
                sites.statistics,
                self.clouds,
                self.own.is_own,
                poolings=POOLED if "corpus" in watch else (),
                tokens="all" if "all tokens" in watch else "few" if "few tokens" in watch else "none",
                seed=seed,
            )
            self.observations.corpus = corpus.statistics
            self.observers.append(corpus)
            self.counting.append(corpus)
        if "routers" in watch:
            routing = Routing(anatomy, self.clouds, self.own.is_own)
            self.observations.routers = routing.statistics
            self.observers.append(routing)
        activity = None
        if "sites" in watch:
            self.observers.append(Readers(model, anatomy, sites.statistics, self.clouds, self.own.is_own))
        if "parts" in watch:
            activity = Activity(model, anatomy, attending, self.clouds, self.own.is_own)
            self.observations.parts, self.observations.embeddings = activity.parts, activity.embeddings
            self.observers.append(activity)
        self.projections = projections = None
        if "projections" in watch:
            self.projections = projections = Projections(
                model,
                anatomy,
                attending,
                self.clouds,
                self.own.is_own,
                contributed=None if activity is None else activity.contributed,
                digest=digest,
            )
        if watch & {"attention", "rows", "spectra"}:
            attention = Attention(
                anatomy,
                attending,
                self.clouds,
                self.own.is_own,
                rows="rows" in watch,
                susceptibility=level == "full",
                spectra="spectra" in watch,
                hand_on=None if projections is None else projections.mixed,
                operands=None if activity is None else activity.attend,
            )
            self.observers.append(attention)
        if projections is not None:
            self.observers.append(projections)
        self.sublayers = None
        if "sublayers" in watch:
            self.sublayers = sublayers = Sublayers(model, anatomy, self.clouds.tokens_of, self.own.is_own)
            self.observations.updates, self.observations.norms = sublayers.updates, sublayers.norms
            self.observers.append(sublayers)
            self.counting.append(sublayers)

    def sees_with(self, first: _Probe) -> None:
        """Add what is seen to the statistics of another probe of the same model, batch by batch in turn with that one, and read no
        weight anew that it has read."""
        for own, known in zip(self.observations.all_statistics(), first.observations.all_statistics(), strict=True):
            own.__dict__ = known.__dict__  # both are the same statistics from now on, whoever has a hold of them
        self.observations = first.observations
        if self.projections is not None and first.projections is not None:
            self.projections.read_with(first.projections)
        if self.sublayers is not None and first.sublayers is not None:
            self.sublayers.read_with(first.sublayers)

    @contextlib.contextmanager
    def installed(self, *, strict: bool = True) -> Iterator[None]:
        streams = [*self.clouds.streams, *(action for observer in self.observers for action in observer.streams)]
        with restoring() as changes:
            changes.hook(self.model, "forward", self.own.end, always_call=True)
            # Before the hooks: what they compute must not count as operations of the module that calls theirs.
            changes.enter(met(self.model, streams, handlers=all_handlers(self.observers), strict=strict))
            for observer in self.observers:
                changes.enter(observer.installed())
            yield

    def start_from(self, origins: Sequence[PartActivity]) -> None:
        """Count how far vectors vary from where another pass over the same anatomy began."""
        for own, known in zip(self.observations.parts, origins, strict=bool(self.observations.parts)):
            own.start_from(known)

    def begin(self, batch: Mapping[str, Any], before: int = 0, told: Told | None = None) -> Told:
        """A batch comes, with so many sequences of the corpus before it. What has to be run to tell its tokens, where that is not
        `told`, is run before the pass is the probe's own."""
        told = self.clouds.begin(batch, told)
        for counting in self.counting:
            counting.before = before
        for observer in self.observers:
            observer.begin(batch)
        self.own.begin()
        return told

    def count(self) -> None:
        """Count the sequences and tokens of the batch that was run."""
        sequences, tokens, longest = self.clouds.counted()
        self.observations.sequences += sequences
        self.observations.tokens += tokens
        self.observations.max_tokens = max(self.observations.max_tokens, longest)
        self.observations.uncounted = self.clouds.uncounted() or self.observations.uncounted

    def close(self) -> None:
        """Be no part of a cycle any more: that would keep the model in memory until Python looks for such."""
        self.clouds.let_go()
        for observer in self.observers:
            observer.let_go()
