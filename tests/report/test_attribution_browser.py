"""The page of an attribution in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import uncollapse as uc
from tests.helpers.browser import Browser, hover
from tests.helpers.tiny_models import text_batch

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    model = hf.GPT2LMHeadModel(config).eval()
    path = tmp_path_factory.mktemp("pages") / "attribution.html"
    uc.attribute(model, text_batch(), uc.logit_difference(5, 7), exact=True).to_html(path)
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_is_drawn_on_a_phone_in_light_and_dark_and_asks_for_nothing(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.open(page, width=width, dark=dark)
    assert (
        browser.value("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg').length)") == [1] * 3
    )
    assert browser.value("document.querySelectorAll('.failed').length") == 0
    assert browser.value("document.documentElement.scrollWidth") == width
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(17, 21, 24)" if dark else "rgb(247, 246, 243)")
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_a_head_on_the_map_shows_its_row(browser: Browser, page: Path) -> None:
    browser.open(page)
    said = hover(browser, "map-all-self", 0.3, 0.4)
    assert said.startswith("component\nblock 0, head 0")
    assert "behind W_O" in said
