"""Passes over a model whose weights are kept elsewhere, made together: one reading, and all that comes of it is as one by one."""

from __future__ import annotations

import _thread
import functools
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import offload
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.interrupted import interruptions, standing
from tests.helpers.kept_weights import counted_reads
from uncollapse.anatomy import shared_readings
from uncollapse.anatomy import stages as stages_module
from uncollapse.anatomy.autocast import no_casts_kept
from uncollapse.anatomy.shared_readings import EntangledPasses, all_made, made_together, read_once
from uncollapse.anatomy.stages import can_be_shared, in_flight, stages

WIDTH = 8
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between: Callable[[Block], object] = lambda block: None

    def forward(self, x: Tensor) -> Tensor:
        self.between(self)
        x = x + self.second(self.first(x).relu())
        return x + self.first(x)  # a weight that is wanted again


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in BLOCKS)
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class Scaled(Chain):
    """Holds a weight of its own around its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def elsewhere(kind: type[Chain] = Chain) -> Any:
    torch.manual_seed(0)
    model = kind().eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    return model


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, WIDTH, generator=generator) for _ in range(count)]


def passes(model: Any, given: list[Tensor]) -> list[Callable[[], Any]]:
    return [functools.partial(model, x) for x in given]


def made(model: Any, works: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = []

    def finished(number: int, result: Any) -> None:
        assert number == len(found)
        found.append(result)

    made_together(model, stages(model, BLOCKS), works, finished)
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return counted_reads(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert threading.active_count() == threads


def is_as_found(model: nn.Module) -> bool:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    linear: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    maps = [one._hf_hook.weights_map for one in linear]
    return not any(hooks) and bool(maps) and all(type(each) is offload.PrefixedDataset for each in maps)


@torch.no_grad()
def test_each_weight_is_read_once_for_all_passes_and_they_give_what_they_give_alone(reads: Counter[str]) -> None:
    model, given = elsewhere(), inputs(3)
    alone = [model(x) for x in given]
    assert set(reads.values()) == {3, 6}
    reads.clear()
    together = made(model, passes(model, given))
    assert set(reads.values()) == {1}
    assert len(reads) == 2 * 2 * (len(BLOCKS) + 1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert is_as_found(model)
    reads.clear()
    with read_once(model, stages(model, BLOCKS)):
        assert torch.equal(model(given[0]), alone[0])
    assert set(reads.values()) == {1}
    assert is_as_found(model)


@torch.no_grad()
def test_passes_go_in_turn_and_hold_one_stage_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, met, alive = elsewhere(), list[str](), list[tuple[str, weakref.ref[Tensor]]]()
    read = offload.PrefixedDataset.__getitem__

    def note(name: str, block: Block) -> None:
        met.append(f"{name} {threading.current_thread().name}")

    def copied(self: Any, key: str) -> Tensor:
        tensor: Tensor = read(self, key).clone()
        stage = self.prefix.removesuffix("first.").removesuffix("second.")
        assert {name for name, one in alive if one() is not None} <= {stage}
        alive.append((stage, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(offload.PrefixedDataset, "__getitem__", copied)
    for name in BLOCKS:
        model.get_submodule(name).between = functools.partial(note, name)
    made(model, passes(model, inputs(2)))
    threads = [line.split()[1] for line in met]
    assert [line.split()[0] for line in met] == [name for name in BLOCKS for _ in range(2)]
    assert threads == threads[:2] * 3
    assert len(set(threads)) == 2
    assert len(alive) == 16


@torch.no_grad()
@pytest.mark.parametrize("raising", [{1: 0}, {0: 2, 1: 0}, {0: 1, 2: 0}])
def test_what_is_raised_is_what_the_first_that_raises_raises(raising: dict[int, int]) -> None:
    model, finished = elsewhere(), list[int]()

    def work(number: int, x: Tensor) -> Tensor:
        def fail(block: Block) -> None:
            if mine.number == raising.get(number) and mine.thread == threading.get_ident():
                raise ValueError(f"pass {number}")
            mine.number += 1

        mine = threading.local()
        mine.thread, mine.number = threading.get_ident(), 0
        failing[threading.get_ident()] = fail
        return model(x)

    failing: dict[int, Callable[[Block], None]] = {}
    for name in BLOCKS:
        model.get_submodule(name).between = lambda block: failing[threading.get_ident()](block)
    first = min(raising)
    works = [functools.partial(work, n, x) for n, x in enumerate(inputs(4))]
    with pytest.raises(ValueError, match=f"pass {first}"):
        made_together(model, stages(model, BLOCKS), works, lambda number, _: finished.append(number))
    assert finished == list(range(first))
    assert is_as_found(model)


@pytest.mark.slow
@torch.no_grad()
def test_an_interrupt_ends_all_passes_and_leaves_the_model_as_it_was() -> None:
    model, given = elsewhere(), inputs(3)
    alone, begun = model(given[0]), list[str]()

    def interrupt(block: Block) -> None:
        begun.append(threading.current_thread().name)
        if len(begun) == 2:
            _thread.interrupt_main()
            time.sleep(1.0)  # the caller is told between two of its own lines, and has to be given time for one

    model.blocks[1].between = interrupt
    with pytest.raises(KeyboardInterrupt):
        made(model, passes(model, given))
    assert len(begun) == 2
    assert is_as_found(model)
    model.blocks[1].between = lambda block: None
    assert torch.equal(model(given[0]), alone)


@pytest.mark.slow
@torch.no_grad()
def test_ctrl_c_at_any_line_of_the_callers_leaves_nothing() -> None:
    model, given = elsewhere(), inputs(2)
    alone, before, threads = model(given[0]), standing(nn.Module()), threading.active_count()

    def operation() -> None:
        made(model, passes(model, given))

    lines = 0
    for line, raised in interruptions([shared_readings], operation):
        assert isinstance(raised, KeyboardInterrupt), line
        assert standing(nn.Module()) == before, line
        assert is_as_found(model), line
        assert threading.active_count() == threads, line
        lines += 1
    assert lines > 60
    assert torch.equal(model(given[0]), alone)


def _draws(block: Block) -> None:
    torch.rand(1)


def _notes(block: Block) -> None:
    block.seen = torch.zeros(1)


def _notes_once(block: Block) -> None:
    if not hasattr(block, "seen"):
        block.seen = torch.zeros(1)


class Counting(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        count = self.get_buffer("counter")
        count += 1
        return x + count


class Precise(Chain):
    """Runs its blocks in another default format: for the whole process."""

    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return super().forward(x) + torch.ones(1)
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "between"), [(Chain, _draws), (Chain, _notes), (Chain, _notes_once), (Counting, None), (Precise, None)]
)
def test_passes_that_would_give_something_else_are_not_made_together(
    kind: type[Chain], between: Callable[[Block], None] | None
) -> None:
    model = elsewhere(kind)
    if between is not None:
        model.blocks[1].between = between
    given = inputs(2)
    with pytest.raises(EntangledPasses):
        made(model, passes(model, given))
    assert is_as_found(model)
    tries: list[int] = []

    def afresh() -> list[Callable[[], Any]]:
        tries.append(len(tries))
        model.counter.zero_()
        return passes(model, given)

    model.counter.zero_()
    one_by_one = [model(x) for x in given]
    vars(model.blocks[1]).pop("seen", None)
    assert all(map(torch.equal, all_made(model, BLOCKS, afresh), one_by_one))
    assert tries == [0, 1]


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_pass_runs_under_the_settings_of_its_caller() -> None:
    model = elsewhere()

    def settings() -> tuple[object, ...]:
        modes = torch.overrides._get_current_function_mode_stack()
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            tuple(modes),
            torch.get_default_device(),
            torch.get_num_threads(),
        )

    plain = settings()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.float16, cache_enabled=False),
        torch.device("meta"),
        _Watching(),
    ):
        here = settings()
        assert made(model, [settings, settings]) == [here, here]
        assert settings() == here
    assert sum(a != b for a, b in zip(here, plain, strict=True)) == 7
    with torch.no_grad(), no_casts_kept():
        assert made(model, [settings])[0] == settings() != plain
        assert sum(a != b for a, b in zip(settings(), plain, strict=True)) == 2
    assert settings() == plain


def test_what_a_model_holds_around_its_blocks_keeps_passes_apart() -> None:
    model = elsewhere(Scaled)
    held = stages(model, BLOCKS)
    assert held == [model.begin, model.end, *model.blocks]
    assert not can_be_shared(model, held)
    model = elsewhere()
    assert can_be_shared(model, stages(model, BLOCKS))
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not can_be_shared(model, stages(model, BLOCKS))
    model = Chain()
    assert stages(model, BLOCKS) == []
    assert not can_be_shared(model, [])


def test_as_many_batches_as_room_is_for_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = elsewhere()
    held = stages(model, BLOCKS)
    batches = [{"ids": torch.zeros(2, n, dtype=torch.int64)} for n in (5, 5, 5, 30, 1)]
    assert in_flight(batches, held) == [range(5)]
    # A token keeps 8 copies of 8 numbers of 4 bytes.
    monkeypatch.setattr(stages_module, "AT_LEAST", 2 * 10 * 8 * WIDTH * 4)
    assert in_flight(batches, held) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    # What is no whole number is as large as it is.
    batches = [{"sound": torch.zeros(5, WIDTH), "mask": torch.ones(5, 1).bool()} for _ in range(5)]
    assert in_flight(batches, held) == [range(4), range(4, 5)]
    # At least as much as the largest stage holds: 8 · 8 weights and 8 biases, twice.
    monkeypatch.setattr(stages_module, "AT_LEAST", 0)
    assert in_flight([{"sound": torch.zeros(9)}] * 2, held) == [range(2)]
    assert in_flight([{"sound": torch.zeros(10)}] * 2, held) == [range(1), range(1, 2)]
