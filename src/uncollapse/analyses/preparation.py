"""A model and its text, made ready: loaded, proved, and cut into batches."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from uncollapse import bounds, processes, sources
from uncollapse.analyses import agreement
from uncollapse.anatomy.drawn_proof import DrawnProof, drawn_proof
from uncollapse.anatomy.examples import example
from uncollapse.anatomy.interception import ChangedPath, device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.sharded_weights import is_sharded, require_gatherable
from uncollapse.anatomy.shared_readings import EntangledPasses
from uncollapse.anatomy.situations import sizes_of
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Layout
from uncollapse.errors import InputError
from uncollapse.interventions.without import is_ablated
from uncollapse.probe.cache_setting import require_same_without_cache
from uncollapse.probe.passes import Level, NotBorneOut, Observations, Progress, capture
from uncollapse.probe.sharding import capture_shared
from uncollapse.wrappers import class_of, module_of, seen_through, takes

DEFAULT_SEQUENCES = 64
Judged = TypeVar("Judged")
Made = TypeVar("Made")


class ProbeOptions(TypedDict, total=False):
    """The options of a probe pass, shared by `diagnose`, `ablate`, `identify` and `symmetries`.

    tokenizer: needed for texts with a model that is already loaded; a model loaded by name has its own (default `None`).
    batches: dicts of tensors instead of texts, passed to the model unchanged (default `None`).
    sequences: use at most this many of the texts (default `None`: all of yours, or 64 of the built-in prose).
    max_tokens: cut each sequence after this many tokens (default 128).
    batch_size: how many sequences go through the model together (default 16).
    seed: selects the built-in prose, and everything else that is drawn at random (default 0).
    layout: where the blocks are, if the model's graph does not show them; see `uncollapse.Layout` (default `None`).
    name: what the record calls the model (default `None`: its own name).
    device, dtype, device_map: for a model loaded by name, where it runs, in which number format, and over which devices it is
    spread (default `None`: CUDA if available, the checkpoint's own format, one device).
    max_memory: how much of each device's memory a model loaded by name may take, such as `"3GiB"`; what does not fit stays on disk
    (default `None`: as much as there is).
    trust_remote_code: run the Python code that comes with a model loaded by name (default `False`).
    max_parameters: refuse a model loaded by name that has more, before its weights are read (default 2,000,000,000,000).
    command: the command line, for the record (default `""`).
    alone: measure in this process alone, although it is one of a `torch.distributed` group (default `False`). Otherwise all of the
    group call the function with the same input, share out the batches, and get the same result; only the first shows and writes it.
    progress: called with (what, done, total) as the work proceeds (default `None`).
    """

    tokenizer: Any
    batches: Iterable[Mapping[str, Tensor]] | None
    sequences: int | None
    max_tokens: int
    batch_size: int
    seed: int
    layout: Layout | None
    name: str | None
    device: str | None
    dtype: str | None
    device_map: str | None
    max_memory: str | None
    trust_remote_code: bool
    max_parameters: int
    command: str
    alone: bool
    progress: Progress | None


DEFAULTS: Final[ProbeOptions] = {
    "tokenizer": None,
    "batches": None,
    "sequences": None,
    "max_tokens": 128,
    "batch_size": 16,
    "seed": 0,
    "layout": None,
    "name": None,
    "device": None,
    "dtype": None,
    "device_map": None,
    "max_memory": None,
    "trust_remote_code": False,
    "max_parameters": bounds.PARAMETERS,
    "command": "",
    "alone": False,
    "progress": None,
}
RECORDED_OPTIONS = ("sequences", "max_tokens", "batch_size", "seed", "device", "dtype", "device_map", "max_memory")


@dataclass
class Prepared:
    """Everything a probe pass needs: the model, its proved anatomy, the batches, and the resolved options.

    `options` and `command` go into the record. `progress` is called as the work proceeds. `captured` replaces the anatomy when
    a pass shows that it no longer holds, or does not bear out the `forecast` that it comes from. `processes` answer the request
    together; they share out the batches, unless one model is spread over all of them (`shares`).
    """

    loaded: sources.LoadedModel
    anatomy: Anatomy
    batches: list[dict[str, Tensor]]
    source: str
    level: Level
    seed: int
    options: dict[str, Any]
    command: str
    progress: Progress | None
    layout: Layout | None = None
    caller: str = "diagnose"
    processes: int = 1
    shares: bool = False
    forecast: DrawnProof | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process shows and writes what is found."""
        return self.processes == 1 or processes.number() == 0

    def judged(self, judge: Callable[[], Judged]) -> Judged:
        """What `judge` makes of a pass. Of processes that share the batches only the first works it out."""
        return processes.by_the_first(judge, self.caller) if self.shares else judge()

    def require_same(self, what: str, value: object) -> None:
        """Refuse processes that were asked for different things: what they saw could not be put together."""
        if self.processes > 1:
            agreement.require_same(self.caller, what, value)

    def of_each_batch(self, work: Callable[[int], Made]) -> list[Made]:
        """What `work` makes of each batch, which it is given the number of. Processes that share the batches do so here, too, and
        each has all of it in the end."""
        numbers = range(len(self.batches))
        if not self.shares:
            return [work(number) for number in numbers]
        with processes.agreed(self.caller):
            own = {number: work(number) for number in numbers[processes.number() :: processes.count()]}
        made = {number: one for each in processes.gathered(own, self.caller) for number, one in each.items()}
        return [made[number] for number in numbers]

    @property
    def shares_a_reading(self) -> bool:
        """Whether passes share a reading of weights that are kept elsewhere, as far as it shows before they are made."""
        model = self.loaded.model
        return (
            not self.shares and can_be_shared(model, stages(model, self.anatomy.own_modules)) and not is_ablated(model)
        )

    def captured(
        self,
        *,
        begin: Callable[[], object] = lambda: None,
        beside: Callable[[], Sequence[Callable[[], object]]] = lambda: (),
        **options: Any,
    ) -> Observations:
        """One probe pass, with the options of `capture`. Where the model takes another way than was proved, on account of
        something that cannot be seen from outside, it is proved anew on the very batch: once, or once for each size of batch.

        Batches are passed together where their passes share a reading of the weights, until it is seen that they must not be.

        beside: gives the passes that are made beside those of the batches, where these share a reading, anew for each try.
        begin: called before each try. What `on_output` was given in a try that failed does not count.
        """
        model, together = self.loaded.model, not self.shares
        own_weights = functools.partial(proved_anatomy, model, self.batches[0], self.layout)
        tries = len({sizes_of(batch) for batch in self.batches})
        while True:
            try:
                begin()
                sharing = {"together": True, "forecast": self.forecast, "beside": beside} if together else {}
                observed = self._captured(**options, **sharing)
                self.forecast = None  # it is borne out
                return observed
            except EntangledPasses:
                together = False
                if self.forecast is not None:
                    self.anatomy, self.forecast = own_weights(), None
            except NotBorneOut:
                self.anatomy, self.forecast = own_weights(), None
            except ChangedPath as changed:
                if changed.batch is None or is_ablated(model) or not tries:
                    raise
                tries -= 1
                self.forecast = None
                self.anatomy = proved_anatomy(model, changed.batch, self.layout, anew=True)

    def _captured(self, **options: Any) -> Observations:
        model = self.loaded.model
        if self.shares and not self.is_first and options.get("digest") is not None:
            options["digest"] = lambda _: {}  # the first process has met them all, and judges
        if self.shares:
            return capture_shared(model, self.batches, self.anatomy, caller=self.caller, seed=self.seed, **options)
        return capture(model, self.batches, self.anatomy, seed=self.seed, **options)


def prepare(
    function: Callable[..., object],
    model: nn.Module | str | Path,
    texts: Iterable[str] | None,
    probe: ProbeOptions,
    *,
    level: Level = "core",
    head: bool = False,
    forecasts: bool = False,
) -> Prepared:
    """Load, tokenise and prove, for the public `function` that was called with the options `probe`.

    level: what the pass measures. head: keep a language-model head. forecasts: nothing that changes the model is done before
    `captured`, so that the anatomy of one whose weights are kept elsewhere may be a forecast until then. Errors name `function`.

    Raises `TypeError` for an option that it does not have, `InputError` for input that cannot be used, and `UnsupportedModel` if
    the anatomy cannot be proved.
    """
    caller = function.__name__
    chosen = require_options(function, probe, level=level)
    if chosen["alone"] or processes.count() == 1:
        return _prepared(caller, model, texts, chosen, level, head, forecasts)
    processes.met(caller)
    with processes.agreed(caller):
        prepared = _prepared(caller, model, texts, chosen, level, head, forecasts=False)
    asked = prepared.options | {"level": prepared.level}
    agreement.require_same_request(caller, prepared.loaded.model, prepared.batches, asked, shares=prepared.shares)
    return prepared


def _prepared(
    caller: str,
    model: nn.Module | str | Path,
    texts: Iterable[str] | None,
    chosen: ProbeOptions,
    level: Level,
    head: bool,
    forecasts: bool,
) -> Prepared:
    progress, layout = chosen["progress"], chosen["layout"]
    loaded = _loaded(caller, model, chosen, head)
    require_gatherable(caller, loaded.model)
    if chosen["batches"] is not None:
        if texts is not None:
            raise InputError(
                f"{caller}: expected texts or batches, got both. They are two ways to give the same input. Pass one of them."
            )
        source, ready = "batches", sources.check_batches(chosen["batches"], model=loaded.model)
    else:
        source, ready = _text_batches(caller, loaded, texts, chosen)
    if progress is not None:
        progress("anatomy", 0, 1)
    forecast = drawn_proof(loaded.model, ready[0], layout) if forecasts and not is_ablated(loaded.model) else None
    anatomy = proved_anatomy(loaded.model, ready[0], layout) if forecast is None else forecast.anatomy
    require_same_without_cache(caller, loaded.model, ready)
    if progress is not None:
        progress("anatomy", 1, 1)
    options = {
        "level": level,
        **{key: value for key, value in chosen.items() if key in RECORDED_OPTIONS},
        "layout": None if layout is None else list(layout.blocks),
    }
    several = 1 if chosen["alone"] else processes.count()
    return Prepared(
        loaded,
        anatomy,
        ready,
        source,
        level,
        chosen["seed"],
        options,
        chosen["command"],
        progress,
        layout,
        caller,
        several,
        shares=several > 1 and not is_sharded(loaded.model),
        forecast=forecast,
    )


def require_options(function: Callable[..., object], probe: ProbeOptions, *, level: Level = "core") -> ProbeOptions:
    """All options of a pass, the defaults among them, once none of those given to `function` is unknown or absurd.

    Raises `TypeError` for an option that it does not have, and `InputError` for a level or a number that no run can mean.
    """
    _require_known(function, probe)
    chosen: ProbeOptions = {**DEFAULTS, **probe}
    if level not in ("core", "full"):
        raise InputError(f"{function.__name__}: expected level 'core' or 'full', got {level!r}. Pass one of the two.")
    _require_in_bounds(function.__name__, chosen)
    if chosen["progress"] is not None and not callable(chosen["progress"]):
        raise InputError(
            f"{function.__name__}: expected progress as a function of (what, done, total), got {chosen['progress']!r}. In Python "
            "no progress is shown unless it is asked for. Leave it out."
        )
    return chosen


def _require_known(function: Callable[..., object], probe: ProbeOptions) -> None:
    """Refuse an option that neither `function` nor a probe pass has, as Python refuses an unknown keyword."""
    for given in probe:
        if given not in DEFAULTS:
            own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
            close = difflib.get_close_matches(given, [*own, *DEFAULTS], 1)
            hint = f"The nearest is {close[0]!r}" if close else "None of its options is spelt like that"
            raise TypeError(
                f"{function.__name__}: expected an option that it has, got {given!r}. {hint}. "
                f"See help(uncollapse.{function.__name__}) for all of them."
            )


def _require_in_bounds(caller: str, chosen: ProbeOptions) -> None:
    """Refuse numbers that no run can mean, before a model is loaded for them."""
    bounds.require_between(caller, "seed", chosen["seed"], 0, bounds.SEED)
    bounds.require_between(caller, "max_tokens", chosen["max_tokens"], 2, bounds.TOKENS)
    bounds.require_between(caller, "batch_size", chosen["batch_size"], 1, bounds.SEQUENCES)
    if chosen["sequences"] is not None:
        bounds.require_between(caller, "sequences", chosen["sequences"], 1, bounds.SEQUENCES)


def _loaded(caller: str, model: nn.Module | str | Path, chosen: ProbeOptions, head: bool) -> sources.LoadedModel:
    """The model with its tokenizer and its name; a model given by name is loaded here."""
    tokenizer, name, progress = chosen["tokenizer"], chosen["name"], chosen["progress"]
    device, dtype, device_map = chosen["device"], chosen["dtype"], chosen["device_map"]
    model = module_of(model)
    if isinstance(model, nn.Module):
        for option, value in {
            "device": device,
            "dtype": dtype,
            "device_map": device_map,
            "max_memory": chosen["max_memory"],
        }.items():
            if value is not None:
                raise InputError(
                    f"{caller}: expected no {option} with a loaded model, got {value!r}. The model is on a device already. "
                    "Move it with model.to(...) first."
                )
        label = name or _own_name(model)
        return sources.LoadedModel(model, tokenizer, label, None, "directory")
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"{caller}: expected a model, a name or a path, got {type(model).__name__}. "
            "It may be a configuration or a pipeline. Pass the nn.Module itself."
        )
    if progress is not None:
        progress("load", 0, 1)
    loaded = sources.load_model(
        str(model),
        device=device,
        dtype=dtype,
        device_map=device_map,
        max_memory=chosen["max_memory"],
        trust_remote_code=chosen["trust_remote_code"],
        max_parameters=chosen["max_parameters"],
        head=head,
    )
    if progress is not None:
        progress("load", 1, 1)
    if tokenizer is None and name is None:
        return loaded
    return sources.LoadedModel(
        loaded.model, tokenizer or loaded.tokenizer, name or loaded.name, loaded.revision, loaded.source
    )


def _own_name(model: nn.Module) -> str:
    inner = seen_through(model)
    return getattr(getattr(inner, "config", None), "_name_or_path", "") or class_of(inner).__name__


def _text_batches(
    caller: str, loaded: sources.LoadedModel, texts: Iterable[str] | None, chosen: ProbeOptions
) -> tuple[str, list[dict[str, Tensor]]]:
    """Where the texts come from, and the batches made of them."""
    sequences = chosen["sequences"]
    source = "texts"
    if texts is None:
        source = "English prose from Python's own documentation (pydoc_data.topics)"
        texts = sources.default_texts(sequences or DEFAULT_SEQUENCES, chosen["seed"])
    elif not isinstance(texts, str) and isinstance(texts, Iterable):
        texts = list(itertools.islice(texts, sequences))
    batches = sources.tokenize(
        texts,
        loaded.tokenizer,
        max_tokens=chosen["max_tokens"],
        batch_size=chosen["batch_size"],
        tokenizer_problem=loaded.tokenizer_problem,
    )
    return source, sources.check_batches(with_true_positions(loaded.model, batches), model=loaded.model)


def with_true_positions(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Add explicit `position_ids` to batches padded on the left, if the model takes them and counts from 0.

    Many models count positions from the first column and would shift every shorter sequence. Some (RoBERTa) count from the
    end of the padding themselves, with their own offset. A trial pass finds these, and their batches stay unchanged.
    """
    shifted = [b for b in batches if not bool(b["attention_mask"][:, 0].all())]
    if not shifted or not takes(model, "position_ids"):
        return batches
    batch = example(shifted[0])
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with probing(model):
        device = device_of(model)
        batch = {k: v.to(device) for k, v in batch.items()}
        own = next(tensors_in(model(**batch)))
        told = next(tensors_in(model(**batch, position_ids=positions.to(device))))
    if not torch.equal(own, told):
        return batches
    return [b | {"position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)} for b in batches]
