"""The numbers that an option may have, each in one place: the command line and Python refuse the same ones.

They are far above what anybody needs. Their use is that a slip of the keyboard is refused at once, and does not run for a year
or end in an error of another library.
"""

from __future__ import annotations

import reprlib

from uncollapse.errors import InputError

SEED = 2**32 - 1  # what every generator takes, and every reader of JSON can hold
TRIALS = 100_000
TOKENS = 10_000_000
SEQUENCES = 1_000_000_000
PARAMETERS = 2_000_000_000_000  # twice the largest model that has been published


def require_between(function: str, name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number from `low` to `high`.

    >>> require_between("verify", "trials", 200, 1, TRIALS)

    Raises `InputError` naming `function` and the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(
            f"{function}: expected {name} as a whole number from {low} to {high}, got {reprlib.repr(value)}. "
            f"It may be a slip of the keyboard. Pass {name}={max(low, min(high, DEFAULTS.get(name, low)))}."
        )


DEFAULTS = {
    "seed": 0,
    "trials": 200,
    "max_tokens": 128,
    "batch_size": 16,
    "sequences": 64,
    "max_parameters": PARAMETERS,
}
