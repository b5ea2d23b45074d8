"""The options of the commands, each in one place, and what the longer ones mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from uncollapse.errors import InputError
from uncollapse.records.common import Severity

MEASURE, TEXT, OUTPUT, MACHINE = "What to measure", "On what text", "Output", "Machine"

Model = Annotated[
    str, typer.Argument(help="A hub id, a folder that save_pretrained wrote, or `demo`: the packaged MiniLM, offline.")
]
Level = Annotated[
    Literal["core", "full"],
    typer.Option(
        help="`full` adds contraction, spectral gap, susceptibility and nonlinear innovation, and takes longer.",
        rich_help_panel=MEASURE,
    ),
]
FailOn = Annotated[
    Severity | None,
    typer.Option(help="Exit with 1 when a finding is at least this severe.", rich_help_panel=MEASURE),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A UTF-8 file, blank lines between sequences; repeat it for more files. Left out: built-in English prose.",
        rich_help_panel=TEXT,
    ),
]
SequenceLimit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use at most this many sequences. Left out: all of your text, or 64 of the built-in prose.",
        rich_help_panel=TEXT,
    ),
]
MaxTokens = Annotated[int, typer.Option(min=2, help="Cut each sequence at this many tokens.", rich_help_panel=TEXT)]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the paragraphs of the built-in prose.", rich_help_panel=TEXT)]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the record as JSON; `-` puts it on stdout and everything else on stderr.",
        rich_help_panel=OUTPUT,
    ),
]
Html = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write a page that needs no network to be read.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no table and no progress, only errors.", rich_help_panel=OUTPUT)
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to run: cpu, cuda, cuda:1. Left out: cuda where there is one.", rich_help_panel=MACHINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto (the checkpoint's own), float32, bfloat16, float16 or float64. Left out: auto.",
        rich_help_panel=MACHINE,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread a model larger than one device over all of them: auto. Needs uncollapse[large].",
        rich_help_panel=MACHINE,
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Sequences that go through the model together.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that lies beside the model. Only if you trust its author.",
        rich_help_panel=MACHINE,
    ),
]

ContextLengths = Annotated[
    str | None,
    typer.Option(
        metavar="64,128,…",
        help="Also fit how the attention matrices' second singular value falls with the context length, at these lengths.",
        rich_help_panel=MEASURE,
    ),
]


def token_counts(text: str | None) -> list[int] | None:
    """What `--context-lengths` means. Whether the model and the text have room for them is not known here.

    >>> token_counts("64, 128")
    [64, 128]
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,7}", part) for part in parts):
        raise InputError(
            f"--context-lengths: expected numbers of tokens such as 64,128,256, got {text!r}. "
            "They are separated by commas. Pass two or more."
        )
    return [int(part) for part in parts]


Without = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART,PART…",
        help="Parts to take away together: norm, residual, mlp, attention, attention-residual, mlp-residual, mask, positions. "
        "Repeat it for more runs. Left out: mlp; residual; residual,mlp.",
        rich_help_panel=MEASURE,
    ),
]
Grid = Annotated[
    bool,
    typer.Option("--grid", help="All eight combinations of norm, residual and MLP.", rich_help_panel=MEASURE),
]
Blocks = Annotated[
    str | None,
    typer.Option(
        metavar="3-6|3,5|all+outer",
        help="Take away in these blocks only, counted from 0. `all+outer`: in all, and the norms outside them too.",
        rich_help_panel=MEASURE,
    ),
]


def block_numbers(text: str | None) -> list[int] | Literal["all", "all+outer"] | None:
    """What `--blocks` means: numbers and ranges, both ends included. Whether the model has them is not known here.

    >>> block_numbers("3-6"), block_numbers("5, 3"), block_numbers("all+outer")
    ([3, 4, 5, 6], [3, 5], 'all+outer')
    """
    if text is None:
        return None
    if text == "all" or text == "all+outer":
        return "all+outer" if text == "all+outer" else "all"
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        chosen = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
        if not chosen:
            raise InputError(
                f"--blocks: expected block numbers such as 3-6 or 3,5, or all+outer, got {text!r}. "
                "Blocks are counted from 0, a range rises. Pass for example --blocks 3-6."
            )
        numbers.update(chosen)
    return sorted(numbers)


Claims = Annotated[
    list[str] | None, typer.Argument(metavar="CLAIM", help="Ids of claims, listed below. Left out: all of them.")
]
Trials = Annotated[
    int, typer.Option(min=1, help="Scales how many random cases each check draws.", rich_help_panel=MEASURE)
]
Draws = Annotated[
    int, typer.Option("--seed", min=0, help="Fixes the random cases, bit for bit.", rich_help_panel=MEASURE)
]
