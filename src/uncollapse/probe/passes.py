"""One probe pass over a corpus, reduced to running statistics where the numbers appear.

Token clouds are measured at the block boundaries and let go; attention is measured inside the model's own attention call:
a fused call from its queries and keys, a softmax the model ran itself from its weights. Nothing of size tokens × tokens
a head is kept, nor anything that grows with the corpus. The model runs the very operations it would have run, so its
outputs are bit-identical; hooks and wrapped forwards are gone afterwards, also after an exception or Ctrl-C.

Only the passes that the probe itself starts are observed. If another thread runs the model meanwhile, or another model that
shares its modules does, their outputs are right and enter no figure; but they see the model in evaluation mode and without
its key-value cache, as the probe does. Do not train in one thread while probing in another.

When not to use this: to look at activations. Nothing is stored; a hook of your own does that better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import Tensor, nn

from uncollapse.anatomy.expected_runs import runs_checked
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.probe.activity import Activity, EmbeddingActivity, PartActivity
from uncollapse.probe.attention import Attention, AttentionStatistics, attention_statistics
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.corpus import POOLED, Corpus, CorpusStatistics
from uncollapse.probe.observing import Observer, OwnPass, all_handlers
from uncollapse.probe.projections import Projections
from uncollapse.probe.readers import Readers
from uncollapse.probe.routing import RouterStatistics, Routing
from uncollapse.probe.sites import Sites, SiteStatistics
from uncollapse.probe.sublayers import NormStatistics, Sublayers, UpdateStatistics
from uncollapse.restoring import restoring

Progress = Callable[[str, int, int], None]
Level = Literal["core", "full"]
Watched = Literal[
    "sites", "corpus", "corpus tokens", "routers", "attention", "rows", "spectra", "projections", "sublayers", "parts"
]

WATCHED: Final[Mapping[Level, frozenset[Watched]]] = {
    "core": frozenset({"sites", "corpus", "routers", "attention", "rows", "projections", "parts"}),
    "full": frozenset(
        {
            "sites",
            "corpus",
            "corpus tokens",
            "routers",
            "attention",
            "rows",
            "spectra",
            "projections",
            "sublayers",
            "parts",
        }
    ),
}


@dataclass
class Observations:
    """What one probe pass saw: a site for each stack's embedding and each of its blocks, stack after stack, and an entry for each
    attention call, for each part, for each embedding, and for each pooling at each site; at level `full` also one for each update
    and for each norm call inside a block. `sequences`, `tokens` (real ones) and `max_tokens` are those of the first stack's
    stream."""

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
) -> Observations:
    """Run `model` once over `batches` (each a dict of tensors, moved to the model's device) and observe. `on_output` is given
    each batch and the model's output on it.

    watch: what to observe, by default all that belongs to the level (`WATCHED`). `"sites"`: the token clouds between blocks;
    without it they are only counted where they are not finite. `"corpus"`: the cloud over all sequences at every site, a point per
    sequence; `"corpus tokens"`: that of all tokens. `"routers"`: which experts tokens are sent to. `"attention"`: whether the
    pass bears the reading out, and the spread that each head keeps; with `"rows"` also every row, with `"spectra"` also the
    decomposed matrices. `"projections"`: matrix and energy of the output projections. `"sublayers"`: what each adds and what each
    norm does. `"parts"`: whether each part does anything; of heads, as far as their attention and projections are watched. What
    is not watched leaves its statistics empty and changes no other figure.

    Raises `InputError` where a padded batch meets a model whose token axis does not match the mask, `ChangedPath` where the
    model takes another path on a batch than the one that was proved.
    """
    probe = _Probe(model, anatomy, level, frozenset(WATCHED[level] if watch is None else watch), seed)
    device = device_of(model)
    with contextlib.closing(probe), probing(model, seed), probe.installed(), runs_checked(model, anatomy) as check:
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("probe", number, len(batches))
            on_device = {k: v.to(device).contiguous() if isinstance(v, Tensor) else v for k, v in batch.items()}
            probe.begin(on_device)
            with check(on_device):
                output = model(**on_device)
            probe.count()
            if on_output is not None:
                on_output(on_device, output)
        if progress is not None:
            progress("probe", len(batches), len(batches))
    return probe.observations


class _Probe:
    """One pass: the observers that were asked for, and what they share."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, level: Level, watch: frozenset[Watched], seed: int) -> None:
        self.model = model
        self.own = OwnPass()
        self.clouds = Clouds(model, anatomy, self.own.is_own, keeps=bool(watch & {"sites", "parts"}))
        attending = [
            (part, attention_statistics(number, block, part))
            for number, block in enumerate(anatomy.blocks)
            for part in block.parts
            if part.kind in {"attention", "cross"}
        ]
        sites = Sites(anatomy, self.clouds, self.own.is_own, measures="sites" in watch)
        self.observations = Observations(sites.statistics, [statistics for _, statistics in attending])
        self.observers: list[Observer] = [sites]
        if watch & {"corpus", "corpus tokens"}:
            corpus = Corpus(
                anatomy,
                sites.statistics,
                self.clouds,
                self.own.is_own,
                poolings=POOLED if "corpus" in watch else (),
                tokens="corpus tokens" in watch,
                seed=seed,
            )
            self.observations.corpus = corpus.statistics
            self.observers.append(corpus)
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
        projections = None
        if "projections" in watch:
            projections = Projections(
                model,
                anatomy,
                attending,
                self.clouds,
                self.own.is_own,
                contributed=None if activity is None else activity.contributed,
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
        if "sublayers" in watch:
            sublayers = Sublayers(model, anatomy, self.clouds.tokens_of, self.own.is_own)
            self.observations.updates, self.observations.norms = sublayers.updates, sublayers.norms
            self.observers.append(sublayers)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        streams = [*self.clouds.streams, *(action for observer in self.observers for action in observer.streams)]
        with restoring() as changes:
            changes.hook(self.model, "forward", self.own.end, always_call=True)
            # Before the hooks: what they compute must not count as operations of the module that calls theirs.
            changes.enter(met(self.model, streams, handlers=all_handlers(self.observers)))
            for observer in self.observers:
                changes.enter(observer.installed())
            yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch comes. What has to be run to tell its tokens is run before the pass is the probe's own."""
        self.clouds.begin(batch)
        for observer in self.observers:
            observer.begin(batch)
        self.own.begin()

    def count(self) -> None:
        """Count the sequences and tokens of the batch that was run."""
        sequences, tokens, longest = self.clouds.counted()
        self.observations.sequences += sequences
        self.observations.tokens += tokens
        self.observations.max_tokens = max(self.observations.max_tokens, longest)

    def close(self) -> None:
        """Be no part of a cycle any more: that would keep the model in memory until Python looks for such."""
        self.clouds.let_go()
        for observer in self.observers:
            observer.let_go()
