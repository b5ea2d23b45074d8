"""Every test runs offline, from the same seed, on one thread, and leaves the settings of torch as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch

if TYPE_CHECKING:
    from tests.helpers.browser import Browser


@pytest.fixture(autouse=True)
def _same_start_and_end() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "the test left gradients switched off: each one after it would run without"
    assert torch._C._len_torch_function_stack() == 0, "the test left a function mode: each one after it would run in it"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, once for all tests of a file."""
    from tests.helpers.browser import Browser

    executable = shutil.which("chromium")
    assert executable is not None, "these tests look at the page in Debian's chromium: apt-get install chromium"
    with Browser(executable) as opened:
        yield opened
