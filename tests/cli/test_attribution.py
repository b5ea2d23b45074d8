"""`uncollapse attribute`: prompts in, a record, a page and a table out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import uncollapse as uc
from tests.helpers.command_line import refused
from tests.helpers.tokenizers import word_tokenizer
from uncollapse.cli.commands import main

PROMPTS = ["the quick brown fox jumps over", "the dog and the lazy fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=17, bos_token_id=1, eos_token_id=1
    )
    hf.GPT2LMHeadModel(config).save_pretrained(place)
    word_tokenizer().save_pretrained(place)
    return place


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["attribute", *arguments])
    return int(ended.value.code or 0), *capfd.readouterr()


def test_prompts_give_a_record_of_the_model_itself(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    code, out, _ = run(
        capfd, str(folder), *given, "--target", "dog", "--against", "fox", "--json", "-", "--html", str(page)
    )
    assert code == 0
    record = json.loads(out)
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder), word_tokenizer()
    with torch.no_grad():
        rows = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in PROMPTS]
    dog, fox = tokenizer("dog fox")["input_ids"]
    expected = [float(row[dog] - row[fox]) for row in rows]
    assert record["metric"]["value"]["mean"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert (record["metric"]["value"]["min"], record["metric"]["value"]["max"]) == pytest.approx(
        (min(expected), max(expected)), abs=1e-5
    )
    assert record["probe"]["options"]["prompts"] == PROMPTS
    assert sum(effect["direct"]["mean"] for effect in record["effects"]) == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_prompts_may_come_one_by_one(folder: Path) -> None:
    metric = uc.logit_difference("dog", "fox")
    at_once = uc.attribute(folder, PROMPTS, metric, ablated_as=None)
    one_by_one = uc.attribute(folder, (prompt for prompt in PROMPTS), metric, ablated_as=None)
    assert one_by_one.record.effects == at_once.record.effects


def test_what_cannot_be_asked_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ask = [str(folder), "--prompt", PROMPTS[0], "--against", "fox"]
    refused(run(capfd, *ask, "--target", "lazy dog"), "target of one token", "2 ('lazy' 'dog')")
    refused(run(capfd, *ask, "--target", "dog", "--target", "fox"), "one target for all prompts")
    refused(run(capfd, *ask, "--target", "dog", "--max-tokens", "5"), "prompts of up to 5 tokens", "prompt 1 of 1")
    refused(run(capfd, str(folder), "--target", "a", "--against", "the"), "--prompt")
