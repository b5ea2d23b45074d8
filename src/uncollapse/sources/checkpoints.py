"""A checkpoint, looked over before anything of it is opened: what its files are, what they name, and how large it says it is.

Whoever wrote a checkpoint decides what stands in its JSON files. Nothing of that is believed before it was compared with
something else: names with the folder, sizes with the weights that are really there, the number of parameters with a model that
is built on torch's meta device, where tensors have shapes and no numbers.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import re
import reprlib
import stat
import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from uncollapse.errors import InputError
from uncollapse.restoring import restoring

# What transformers may open in a folder. Only such files are looked at; others may lie beside them.
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.py", "*.bin")
LIMIT = 64 * 2**20  # bytes of a configuration; the largest known has a few hundred kilobytes
MANY = 100_000  # layers, heads, experts, labels: a configuration makes lists of as many items before anything can count them
LARGE = 2**53
_COUNT = re.compile(r"layer|block|depth|head|expert|label|stage|group")
# A compressed checkpoint holds several weights in one stored number, and a loader may split one tensor into several.
SLACK = 16
SPARE_NUMBERS, SPARE_TENSORS = 10_000_000, 1000


def require_plain_files(name: str, folder: Path) -> None:
    """Refuse a folder in which a pipe or a device stands where transformers would read a file: it would read for ever."""
    for file in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in READ):
            try:
                mode = file.stat().st_mode
            except OSError:  # a link that leads nowhere is a file that is not there
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(
                    f"load_model: expected files in {name!r}, got {file.name!r}, which is a pipe or a device. "
                    "Reading it might never end. Replace it with the file that it stands for."
                )


def require_sound_configuration(name: str, folder: Path) -> None:
    """Refuse a config.json whose numbers no model can have. What else is wrong with it, transformers says itself."""
    file = folder / "config.json"
    if file.stat().st_size > LIMIT:
        raise InputError(
            f"load_model: expected a config.json of at most {LIMIT // 2**20} MiB in {name!r}, got {file.stat().st_size} bytes. "
            "It may be another file. Save the model again with save_pretrained."
        )
    try:
        configuration = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return
    require_sound_sizes(name, configuration)


def require_sound_sizes(name: str, configuration: Any) -> None:
    """Refuse absurd whole numbers: above 2^53 anywhere, above a hundred thousand where they count what is built."""
    for key, value in _numbers(configuration):
        most = MANY if _COUNT.search(key) and "size" not in key else LARGE
        if abs(value) > most:
            raise InputError(
                f"load_model: expected {key} up to {most} in the config.json of {name!r}, got {reprlib.repr(value)}. "
                "No model has as many. Correct the configuration, or save the model again."
            )


def _numbers(configuration: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers in it, each with the name that it stands under. Without recursion: it may be nested without end."""
    waiting = [("", configuration)]
    while waiting:
        key, held = waiting.pop()
        if isinstance(held, dict):
            waiting += [(str(name), value) for name, value in reversed(held.items())]
        elif isinstance(held, list):
            waiting += [(key, value) for value in reversed(held)]
        elif isinstance(held, int) and not isinstance(held, bool):
            yield key, held


def architecture_of(name: str, config: Any) -> str:
    """The class that the checkpoint was saved from, "AutoModel" where it does not say."""
    named = getattr(config, "architectures", None)
    if named is None or named == []:
        return "AutoModel"
    if not isinstance(named, list | tuple) or not all(isinstance(each, str) for each in named):
        raise InputError(
            f"load_model: expected architectures in the config.json of {name!r} as a list of names, got "
            f"{reprlib.repr(named)}. It may have been edited by hand. Correct it, or save the model again."
        )
    return named[0]


def require_only_safetensors(name: str, config: Any, folder: Path) -> None:
    """Refuse weights that the folder's own files would have read from elsewhere, or from a pickle.

    An index, `transformers_weights` and an adapter each name files, and transformers opens what they name.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        _require_weights_in(name, folder, "config.json", named, or_index=True)
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"load_model: expected the adapter in {name!r} as adapter_model.safetensors, got an adapter_config.json without. "
            "A pickle can run code when it is opened. Save the adapter again, or merge it into its model."
        )
    for index in sorted(folder.glob("*.index.json")):
        if index.name.endswith(".safetensors.index.json") or index.name == named:
            require_sound_index(name, index)


def require_sound_index(name: str, index: Path) -> None:
    """Refuse an index of weights that names anything but .safetensors files beside it."""
    if index.stat().st_size > LIMIT * 4:
        raise _bad_index(name, index, f"{index.stat().st_size} bytes")
    try:
        found = json.loads(index.read_bytes())
        files = found["weight_map"].values()
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise _bad_index(name, index, "no weight_map in it") from None
    if not files:
        raise _bad_index(name, index, "an empty weight_map")
    for file in {reprlib.repr(file): file for file in files}.values():
        _require_weights_in(name, index.parent, index.name, file)


def _bad_index(name: str, index: Path, got: str) -> InputError:
    return InputError(
        f"load_model: expected {index.name} in {name!r} to say in which file each weight is, got {got}. "
        "The copy may be incomplete. Save or download the model again."
    )


def _require_weights_in(name: str, folder: Path, by: str, file: object, *, or_index: bool = False) -> None:
    good = isinstance(file, str) and file.endswith((".safetensors", *[".safetensors.index.json"] * or_index))
    parts = Path(str(file)).parts
    if not good or Path(str(file)).is_absolute() or ".." in parts or "\\" in str(file) or not parts:
        raise InputError(
            f"load_model: expected {by} in {name!r} to name .safetensors files in the same folder, got "
            f"{reprlib.repr(file)}. A pickle can run code when it is opened, and files elsewhere are none of this model. "
            "Convert it with save_pretrained where you trust it, and name the result."
        )


def stored(folder: Path) -> tuple[int, int] | None:
    """How many numbers and how many tensors the .safetensors files of a folder hold; None where one cannot be read."""
    from safetensors import safe_open

    numbers = tensors = 0
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    tensors += 1
                    numbers += _product(opened.get_slice(key).get_shape())
        except Exception:  # damaged or cut short: the loader says so, in its own words
            return None
    return numbers, tensors


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


class _TooLarge(Exception):  # noqa: N818 - a signal out of a constructor, turned into a refusal here
    pass


def require_affordable(
    name: str, build: Callable[[], object], *, max_parameters: int, held: tuple[int, int] | None = None
) -> None:
    """Build a model on the meta device and refuse it once it has too much.

    build: makes the model. max_parameters: how many parameters it may have; a buffer may have as many numbers, too.
    held: how many numbers and tensors the checkpoint holds. A model that asks for many times as many would be filled with
    random numbers, and is refused before there is memory for it. Whatever else keeps the model from being built is left for
    the loader to say.
    """
    try:
        with restoring() as changes:
            changes.default_device("meta")
            changes.enter(counted(max_parameters=max_parameters, held=held))
            build()
    except _TooLarge as error:
        raise refusal(name, error, max_parameters=max_parameters) from None
    except Exception:  # the loader builds the same model and says what is wrong with it
        return


def refusal(name: str, error: Exception, *, max_parameters: int) -> InputError:
    """What to say of a model that `counted` stopped."""
    if str(error) == "parameters":
        return InputError(
            f"load_model: expected a model of at most {max_parameters:,} parameters, got {name!r}, which has more by its "
            "config.json. A size there may be wrong. If it is right, raise max_parameters (--max-parameters)."
        )
    return InputError(
        f"load_model: expected a config.json of about the size of the weights in {name!r}, got one for a model more than "
        f"{SLACK} times as large. They may not belong together. Save the model again with save_pretrained."
    )


@contextlib.contextmanager
def counted(*, max_parameters: int, held: tuple[int, int] | None = None) -> Iterator[None]:
    """Count what modules made by this thread register, and stop the one that goes too far."""
    thread = threading.get_ident()
    numbers = tensors = 0

    def parameter(_: nn.Module, __: str, value: Tensor | None) -> None:
        nonlocal numbers, tensors
        if value is None or threading.get_ident() != thread:
            return
        numbers += value.numel()
        tensors += 1
        if numbers > max_parameters:
            raise _TooLarge("parameters")
        if held and (numbers > SLACK * held[0] + SPARE_NUMBERS or tensors > SLACK * held[1] + SPARE_TENSORS):
            raise _TooLarge("weights")

    def buffer(_: nn.Module, __: str, value: Tensor | None) -> None:
        if value is not None and threading.get_ident() == thread and value.numel() > max_parameters:
            raise _TooLarge("parameters")

    with restoring() as changes:
        for hooks, register, hook in (
            (
                registration._global_parameter_registration_hooks,
                registration.register_module_parameter_registration_hook,
                parameter,
            ),
            (
                registration._global_buffer_registration_hooks,
                registration.register_module_buffer_registration_hook,
                buffer,
            ),
        ):
            changes.undo(functools.partial(_take_off, hooks, hook))
            register(hook)
        yield


def _take_off(hooks: MutableMapping[int, Any], hook: Callable[..., Any]) -> None:
    """Found by its function: the handle would be lost to an exception on its way here."""
    for number in [number for number, each in list(hooks.items()) if each is hook]:
        hooks.pop(number, None)
