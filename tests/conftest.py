"""Every test runs offline, from the same seed, on one thread."""

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
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, once for all tests of a file."""
    from tests.helpers.browser import Browser

    executable = shutil.which("chromium")
    assert executable is not None, "these tests look at the page in Debian's chromium: apt-get install chromium"
    with Browser(executable) as opened:
        yield opened
