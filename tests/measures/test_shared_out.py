"""Works side by side: what they return, in which threads they run, and what is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from uncollapse.measures.shared_out import shared_out, threads_kept
from uncollapse.measures.symmetric_eigenvalues import LEAST_WORK, eigenvalues


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before, running = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    assert threading.active_count() == running
    torch.set_num_threads(before)


def met_by(count: int) -> list[int]:
    """The threads of works that wait for each other."""
    together = threading.Barrier(count, timeout=20)

    def work() -> int:
        together.wait()
        return threading.get_ident()

    return shared_out([work] * count)


def test_works_run_side_by_side_and_return_in_order() -> None:
    assert len(set(met_by(3))) == 3
    assert shared_out([lambda n=n: n for n in range(10)]) == list(range(10))  # type: ignore[misc]


def test_torch_divides_no_work_any_further_and_what_is_set_here_stays() -> None:
    assert shared_out([torch.get_num_threads] * 5) == [1] * 5
    assert shared_out([lambda: shared_out([threading.get_ident] * 2)] * 2)[0][0] != threading.get_ident()
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [3]


def test_threads_are_kept_within_the_block_and_by_this_thread_alone() -> None:
    with threads_kept():
        first = set(met_by(3))
        assert set(met_by(3)) == first
        others: list[set[int]] = []
        other = threading.Thread(target=lambda: others.append(set(shared_out([threading.get_ident] * 3))))
        torch.set_num_threads(3)
        other.start()
        other.join()
        assert not others[0] & first


def test_all_are_over_before_the_first_error_is_raised() -> None:
    over: list[int] = []
    begun = threading.Event()

    def fail() -> None:
        begun.wait(20)
        raise ValueError("the second")

    def last() -> None:
        begun.set()
        threading.Event().wait(0.2)
        over.append(1)
        raise KeyError("the third")

    with threads_kept():
        with pytest.raises(ValueError, match="the second"):
            shared_out([lambda: None, fail, last])
        assert over == [1]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_works_run_under_the_settings_of_their_caller(grad: bool, inference: bool) -> None:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert shared_out([lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())] * 3) == [expected] * 3


class Functions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Functions, Operations])
def test_who_watches_operations_sees_them(kind: type[Functions] | type[Operations]) -> None:
    x = torch.ones(3)
    with kind() as watching:
        assert shared_out([threading.get_ident] * 3) == [threading.get_ident()] * 3
        shared_out([lambda: x + x] * 3)
    assert watching.seen >= 3


def test_eigenvalues_are_those_of_each_matrix_however_they_are_shared_out() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randn(n, side, side, generator=generator, dtype=torch.float64) for n, side in [(1, 150), (4, 90)]]
    given = [half @ half.mT for half in halves]
    assert sum(len(each) * each.shape[-1] ** 3 for each in given) > LEAST_WORK
    for found, each in zip(eigenvalues(given), given, strict=True):
        for values, matrix in zip(found, each, strict=True):
            expected = torch.linalg.svdvals(matrix).flip(0)
            assert torch.allclose(values, expected, rtol=1e-9, atol=1e-9 * float(expected.max()))
