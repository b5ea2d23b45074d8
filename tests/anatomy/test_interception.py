"""Points: the n-th operation of a module's own forward, whatever its children do; everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from uncollapse.anatomy.interception import Point, device_of, intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.summands import left_of, summand
from uncollapse.errors import UncollapseError


class Child(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 100) + 1000


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y = self.child(y)
        y += x
        return torch.add(y, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parent = Parent()

    def forward(self, x: Tensor) -> Tensor:
        return self.parent(self.parent(x))


def negate(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return -function(*args, **kwargs)


def by_hand(x: float, negated: int | None) -> float:
    y = x + 1
    y = -y if negated == 0 else y
    y = y + 1100
    y = y + x
    y = -y if negated == 1 else y
    y = y + x
    return -y if negated == 2 else y


@pytest.mark.parametrize("ordinal", [0, 1, 2])
@pytest.mark.parametrize("run", [0, 1, None])
def test_a_handler_acts_at_its_own_operation_and_run_only(ordinal: int, run: int | None) -> None:
    model = Model()
    with intercepted(model, {Point("parent", run, "add of 1 axes", ordinal): negate}):
        for _ in range(2):  # every pass counts from the start
            got = model(torch.tensor([3.0]))
            first = by_hand(3.0, ordinal if run in (0, None) else None)
            assert got.item() == by_hand(first, ordinal if run in (1, None) else None)


def test_owners_inside_owners_keep_their_own_count() -> None:
    model = Model()
    points = {Point("parent", 0, "add of 1 axes", 0): negate, Point("parent.child", 0, "add of 1 axes", 1): negate}
    with intercepted(model, points):
        got = model(torch.tensor([3.0]))
    first = -((-(3.0 + 1)) + 100 + 1000) + 3.0 + 3.0
    assert got.item() == by_hand(first, None)


def test_everything_is_put_back_after_an_exception_and_an_own_forward_is_kept() -> None:
    model = Model()

    def replaced(x: Tensor) -> Tensor:
        return x + 5

    model.parent.forward = replaced

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intercepted(model, {Point("parent", 0, "add of 1 axes", 0): fail}):
        model(torch.ones(1))
    assert model.parent.forward is replaced
    assert not model.parent.child._forward_hooks
    assert not model.parent.child._forward_pre_hooks
    assert not model._forward_pre_hooks
    assert model(torch.ones(1)).item() == 11
    del model.parent.forward
    with intercepted(model, {Point("parent", 0, "add of 1 axes", 0): negate}):
        pass
    assert "forward" not in vars(model.parent)


def test_a_missed_operation_is_an_error_not_a_silence() -> None:
    model = Model()
    with (
        pytest.raises(UncollapseError, match=r"expected add of 1 axes #7 of parent"),
        intercepted(model, {Point("parent", 0, "add of 1 axes", 7): negate}),
    ):
        model(torch.ones(1))


@pytest.mark.parametrize("keep", [0, 1])
def test_one_operand_of_an_addition_keeps_its_shape_and_dtype(keep: int) -> None:
    wide, narrow = torch.arange(6.0, dtype=torch.float64).reshape(2, 3), torch.arange(3.0)
    expected = [wide, narrow.double().expand(2, 3)][keep]
    kept = left_of(torch.add, (wide, narrow), {}, {1 - keep})
    assert kept.dtype == torch.float64
    assert torch.equal(kept, expected)
    written = wide.clone()
    assert left_of(Tensor.add_, (written, narrow), {}, {1 - keep}) is written
    assert torch.equal(written, expected)
    assert torch.equal(left_of(torch.add, (), {"input": wide, "other": narrow}, {1 - keep}), expected)


def test_a_summand_is_what_the_operation_makes_of_its_operand() -> None:
    x, gate, update = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]), torch.tensor([4.0, 8.0])
    assert summand(torch.add, (x, update), {}, 1) is update
    assert torch.equal(summand(torch.add, (x, update), {"alpha": 2}, 1), 2 * update)
    assert torch.equal(summand(torch.sub, (x, update), {}, 1), -update)
    assert torch.equal(summand(torch.addcmul, (x, gate, update), {}, 2), gate * update)
    assert torch.equal(summand(torch.lerp, (x, update, 0.25), {}, 0), 0.75 * x)
    assert torch.equal(summand(Tensor.add_, (x, update), {"alpha": 3}, 1), 3 * update)
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_probing_restores_mode_gradients_and_random_state() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    model.train()
    model[1].eval()
    state = torch.get_rng_state()

    def run_and_fail() -> None:
        with probing(model, seed=3):
            assert not model.training
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run_and_fail()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_probing_restores_the_random_state_of_every_gpu_not_only_of_those_the_model_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A seed is given to all of them at once, also for a model that is offloaded or stands elsewhere."""
    states = {device: torch.tensor([device]) for device in range(3)}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    with probing(nn.Linear(2, 2)):
        states.update({device: torch.tensor([-1]) for device in states})
    assert [int(state) for state in states.values()] == [0, 1, 2]


# Where a model is --------------------------------------------------------------------------------------------------------


def placed(*places: str) -> nn.Module:
    return nn.ParameterList(torch.empty(2, device=place) for place in places)


def test_a_model_is_where_its_first_tensor_that_is_somewhere_is() -> None:
    with FakeTensorMode():  # tensors that know a device without having one
        assert device_of(placed("meta", "cuda:1", "cpu")) == torch.device("cuda:1")
        assert device_of(placed("cpu", "cuda:1")) == torch.device("cpu")
        away = placed("meta", "meta")
        away.register_buffer("frequencies", torch.empty(2, device="cuda:0"))  # accelerate leaves buffers on the device
        assert device_of(away) == torch.device("cuda:0")
    assert device_of(placed("meta")) == device_of(nn.Identity()) == torch.device("cpu")


def test_what_a_handler_computes_for_itself_counts_in_no_other_context() -> None:
    """A part removed inside a measurement: its handlers run their own additions, and must not shift the model's."""
    model, x = Model(), torch.tensor([1.0])
    met: list[Tensor] = []

    def adding(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        zero = torch.zeros(1) + 0  # one of its own
        return function(args[0] + zero, *args[1:], **kwargs)

    def noting(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        met.append(args[0].clone())
        return function(*args, **kwargs)

    first, second = (Point("parent", 0, "add of 1 axes", ordinal) for ordinal in range(2))
    expected = model(x)
    with intercepted(model, {first: adding}), intercepted(model, {second: noting}):
        assert torch.equal(model(x), expected)
    with intercepted(model, {second: noting}), intercepted(model, {first: adding}):
        assert torch.equal(model(x), expected)
    assert [float(y) for y in met] == [1102.0] * 2


def test_a_context_that_is_closed_late_leaves_the_handlers_of_another_one_alone() -> None:
    # Ctrl-C on its way out leaves a context to garbage collection, which comes whenever it likes.
    model, x = Model(), torch.tensor([1.0])
    points = [Point("parent", run, "add of 1 axes", ordinal) for run in (0, 1) for ordinal in (0, 1, 2)]
    with intercepted(model, dict.fromkeys(points, negate)):
        expected = model(x)
    late = intercepted(model, {Point("parent.child", 1, "add of 1 axes", 0): negate})
    late.__enter__()
    model.parent.child.register_forward_pre_hook(lambda *_: late.gen.close())
    with intercepted(model, dict.fromkeys(points, negate)):
        assert torch.equal(model(x), expected)
    assert torch._C._len_torch_function_stack() == 0
