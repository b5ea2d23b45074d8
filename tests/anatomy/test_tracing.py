"""The dataflow graph: names without spelling variants, values in single assignment form, learned ancestry."""

from __future__ import annotations

import gc
import operator
import weakref

import pytest
import torch
from torch import Tensor, nn

from uncollapse.anatomy.torch_calls import operation_name, writes_in_place
from uncollapse.anatomy.tracing import trace


@pytest.mark.parametrize(
    ("function", "name", "in_place"),
    [
        (torch.add, "add", False),
        (Tensor.add, "add", False),
        (Tensor.add_, "add", True),
        (Tensor.__add__, "add", False),
        (Tensor.__radd__, "add", False),
        (Tensor.__iadd__, "add", True),
        (Tensor.__setitem__, "setitem", True),
        (Tensor.__matmul__, "matmul", False),
        (Tensor.__rmul__, "mul", False),
        (torch.nn.functional.softmax, "softmax", False),
        (torch.nn.functional.scaled_dot_product_attention, "scaled_dot_product_attention", False),
        (torch.dropout_, "dropout", True),
    ],
)
def test_one_operation_has_one_name(function: object, name: str, in_place: bool) -> None:
    assert operation_name(function) == name  # type: ignore[arg-type]
    assert writes_in_place(function) is in_place  # type: ignore[arg-type]


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        view = x.view(-1, 3)
        y = self.linear(x)
        x = x.to(x.dtype)  # returns its own input: no new value
        x += y  # a new value of x and of its view
        return view * 2


def test_in_place_writes_reach_every_view_and_no_ops_make_no_value() -> None:
    model = Steps()
    recorded = trace(model, {"x": torch.randn(2, 3)})
    names = [n.operation for n in recorded.nodes]
    assert "to" not in names
    addition = names.index("add")
    last = names.index("mul")
    assert recorded.nodes[last].inputs == (addition,)
    assert recorded.learned(addition, 0)  # through the linear map
    assert recorded.is_learned_product(names.index("linear"))
    assert not recorded.is_data_product(names.index("linear"))
    assert [c.name for c in recorded.calls] == ["", "linear"]
    assert not model.linear._forward_hooks


def test_what_only_adds_a_constant_is_not_learned() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return operator.add(x * 2, 1)

    recorded = trace(Shift(), {"x": torch.randn(2, 3)})
    assert not any(recorded.learned_ancestors)
    assert all(n.is_data for n in recorded.nodes)


def test_hooks_are_gone_after_a_failing_model() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.linear(x)
            raise RuntimeError("the model's own")

    model = Fails()
    with pytest.raises(RuntimeError, match="the model's own"):
        trace(model, {"x": torch.randn(2, 3)})
    assert not model.linear._forward_hooks
    assert not model.linear._forward_pre_hooks


class Keeping(nn.Module):
    """Keeps a large table in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.ones(300, 300), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table[: len(x), :3])


def test_a_tensor_that_outlives_the_trace_is_no_longer_watched() -> None:
    model = Keeping()
    trace(model, {"x": torch.ones(2, 3)})
    gc.collect()
    assert weakref.getweakrefcount(model.table) == 0
