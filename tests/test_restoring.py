"""A model is as it was, whatever happens: Ctrl-C at every line, contexts left in any order, copies made inside."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import uncollapse as uc
from tests.helpers.interrupted import BATCH, interruptions, llama, standing
from tests.helpers.own_models import OwnGPT, tokens
from uncollapse import restoring as restoring_module
from uncollapse.analyses import symmetries as symmetries_module
from uncollapse.anatomy import autocast, influence, interception, module_states, probing, situations, streams, turns
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.gates import installation, token_positions
from uncollapse.interventions import token_order
from uncollapse.interventions import without as without_module
from uncollapse.probe import passes
from uncollapse.probe.passes import capture
from uncollapse.restoring import SharedSetting, leaves_no_trace, restoring
from uncollapse.symmetry import acting
from uncollapse.symmetry.acting import drawn, transformed
from uncollapse.symmetry.channels import channels_of
from uncollapse.symmetry.weight_groups import HeadPermutation, ValueOutputGauge

Operation = Callable[[nn.Module, dict[str, Tensor]], object]
BASIS = [restoring_module, turns]
PROBE = [*BASIS, probing, module_states, autocast, interception, streams, situations]


def outputs(model: nn.Module, batch: dict[str, Tensor] = BATCH) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0].clone()


def captured(model: nn.Module, batch: dict[str, Tensor]) -> None:
    capture(model, [batch], proved_anatomy(model, batch))


def removed(*components: str) -> Operation:
    def operation(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with uc.without(model, *components, batch=batch):
            model(**batch)

    return operation


def gated(model: nn.Module, batch: dict[str, Tensor]) -> None:
    uc.install_gates(model, batch=batch)
    uc.remove_gates(model, fold=True)


def gauged(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with probing.probing(model):
        channels = channels_of(model, proved_anatomy(model, batch), batch)
        with transformed(model, drawn(ValueOutputGauge, channels, torch.Generator().manual_seed(0))):
            model(**batch)


def swept(modules: list[types.ModuleType], operation: Operation) -> int:
    """How many interruptions there were; none left anything behind."""
    model = llama()
    proved_anatomy(model, BATCH)
    with probing.probing(model):  # what the first run of anything leaves: caches of torch and transformers
        model(**BATCH)
    torch.manual_seed(5)
    before, count, left = standing(model), 0, []
    for line, raised in interruptions(modules, lambda: operation(model, BATCH)):
        count += raised is not None
        if standing(model) != before:
            left.append(line)
            assert len(left) < 5, left
    assert not left
    return count


@pytest.mark.parametrize(
    ("modules", "operation", "least"),
    [
        (BASIS, captured, 80),
        ([probing, module_states, autocast], captured, 40),
        ([without_module, restoring_module], removed("mlp"), 100),
        ([acting], gauged, 25),
    ],
    ids=["mechanism", "probing", "without", "transformed"],
)
def test_ctrl_c_at_any_line_leaves_the_model_as_it_was(
    modules: list[types.ModuleType], operation: Operation, least: int
) -> None:
    assert swept(modules, operation) >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "operation"),
    [
        ([*PROBE, passes], captured),
        ([*PROBE, influence], lambda model, batch: uc.diagnose(model, batches=[batch])),
        ([*PROBE, without_module], removed("attention", "norm")),
        ([*BASIS, without_module, token_order], removed("mask")),
        ([*BASIS, without_module, token_order], removed("positions", "mask")),
        ([*PROBE, acting], gauged),
        ([*BASIS, acting, symmetries_module], lambda model, batch: uc.symmetries(model, batches=[batch])),
        ([*BASIS, without_module], lambda model, batch: uc.ablate(model, batches=[batch], without=[("mlp",)])),
    ],
)
def test_ctrl_c_at_any_line_of_all_that_restores(modules: list[types.ModuleType], operation: Operation) -> None:
    assert swept(modules, operation) > 50


def test_ctrl_c_while_gates_are_installed_or_removed_leaves_all_of_them_or_none() -> None:
    modules = [installation, token_positions]
    model = llama()
    plain = standing(model)

    def install() -> None:
        uc.install_gates(model, batch=BATCH)

    for line, raised in interruptions(modules, install, lambda: uc.remove_gates(model)):
        assert raised is not None
        torch.set_rng_state(torch.tensor(plain["process"][-1], dtype=torch.uint8))
        assert standing(model) == plain, line
    install()
    whole, count = list(standing(model)), 0
    for line, _ in interruptions(modules, lambda: uc.remove_gates(model, fold=True), install):
        now = standing(model)
        torch.set_rng_state(torch.tensor(plain["process"][-1], dtype=torch.uint8))
        if list(now) != whole:
            assert {**now, "process": 0} == {**plain, "process": 0}, line
            install()
            count += 1
    assert count > 3


def test_contexts_may_be_left_in_any_order() -> None:
    model = llama().eval()
    before = standing(model)
    alone = {}
    for component in ("mlp", "residual", "norm"):
        with uc.without(model, component, batch=BATCH):
            alone[component] = outputs(model)
    first, second, third = (uc.without(model, c, batch=BATCH) for c in ("mlp", "norm", "residual"))
    first.__enter__()
    second.__enter__()
    third.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(outputs(model), alone["residual"])
    third.__exit__(None, None, None)
    assert standing(model) == before


def test_transformations_may_be_left_in_any_order() -> None:
    model = llama().eval()
    channels = channels_of(model, proved_anatomy(model, BATCH), BATCH)
    before, generator = standing(model), torch.Generator().manual_seed(1)
    one, two = drawn(HeadPermutation, channels, generator), drawn(ValueOutputGauge, channels, generator)
    with transformed(model, two):
        alone = [p.detach().clone() for p in model.parameters()]
    first, second = transformed(model, one), transformed(model, two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(map(torch.equal, alone, model.parameters()))
    second.__exit__(None, None, None)
    assert standing(model) == before


@pytest.mark.parametrize("components", [("residual",), ("mlp",), ("norm",), ("mask",), ("positions", "mask")])
def test_a_copy_made_inside_without_is_the_whole_model(components: tuple[str, ...]) -> None:
    model = llama().eval()
    whole = outputs(model)
    with uc.without(model, *components, batch=BATCH):
        assert not torch.equal(outputs(model), whole)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [
            copy.deepcopy(model),
            copy.deepcopy(nn.ModuleList([model]))[0],
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ]
        assert all(torch.equal(outputs(each), whole) for each in copies)
    with torch.no_grad():
        next(model.parameters()).zero_()
    plain = standing(llama().eval())
    for each in copies:
        assert torch.equal(outputs(each), whole)  # weights of its own
        assert {k: v[2:5] for k, v in standing(each).items() if k != "process"} == {
            k: v[2:5] for k, v in plain.items() if k != "process"
        }


def test_a_copy_that_would_keep_a_removal_is_refused() -> None:
    class Own(OwnGPT):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("not reached")

    model, batch = Own().eval(), {"idx": tokens()}
    with uc.without(model, "mlp", batch=batch), pytest.raises(uc.UnsupportedModel, match="copied whole"):
        copy.deepcopy(model)


def test_a_call_that_ctrl_c_cut_off_on_its_way_out_puts_nothing_back_in_the_midst_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[contextlib._GeneratorContextManager[Any]] = []
    leave = contextlib._GeneratorContextManager.__exit__

    def cut_off(self: Any, *error: Any) -> Any:
        if self.gen.__name__ == "restoring" and not seen:
            seen.append(self)  # what a traceback keeps until somebody has dealt with it
            raise KeyboardInterrupt
        return leave(self, *error)

    @leaves_no_trace
    def first() -> None:
        torch.set_grad_enabled(False)
        BaseTorchFunctionMode().__enter__()

    @leaves_no_trace
    def second() -> list[int]:
        torch.set_grad_enabled(False)
        gathered = list(map(id, restoring_module._gathering.changes))
        with BaseTorchFunctionMode():
            seen.pop().gen.close()
            assert torch._C._len_torch_function_stack() == 1
        assert not torch.is_grad_enabled()
        assert list(map(id, restoring_module._gathering.changes)) == gathered
        return gathered

    with monkeypatch.context() as patched:
        patched.setattr(contextlib._GeneratorContextManager, "__exit__", cut_off)
        with pytest.raises(KeyboardInterrupt):
            first()
    assert torch.is_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0
    assert len(second()) == 1
    assert torch.is_grad_enabled()


def test_what_fails_to_be_undone_keeps_nothing_else_from_being_undone() -> None:
    owner, done = types.SimpleNamespace(value=1), []

    def fails() -> None:
        done.append("tried")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), restoring() as changes:  # noqa: PT012 - the undo raises
        changes.set(owner, "value", 2)
        changes.undo(fails)
        changes.undo(lambda: done.append("later"))
    assert owner.value == 1
    assert done == ["later", "tried", "tried"]


def test_a_setting_of_the_process_comes_back_with_the_last_who_wanted_it() -> None:
    setting = {"value": 0}
    shared = SharedSetting(lambda: setting["value"], lambda v: setting.__setitem__("value", v), 7)

    @contextlib.contextmanager
    def held() -> Any:
        with restoring() as changes:
            shared.hold(changes)
            yield

    first, second = held(), held()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting["value"] == 7
    second.__exit__(None, None, None)
    assert setting["value"] == 0


@pytest.mark.parametrize("found", [{}, {"name": "own"}])
def test_what_several_placed_under_one_name_is_taken_out_in_any_order(found: dict[str, str]) -> None:
    mapping = dict(found)

    @contextlib.contextmanager
    def placed(value: str) -> Any:
        with restoring() as changes:
            changes.place(mapping, "name", value)
            yield

    first, second = placed("first"), placed("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert mapping == {"name": "second"}
    second.__exit__(None, None, None)
    assert mapping == found
