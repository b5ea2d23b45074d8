"""The options of the commands, each defined once, and how the longer ones are parsed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from uncollapse import bounds
from uncollapse.errors import InputError
from uncollapse.records.common import Severity

MEASURE, TEXT, OUTPUT, MACHINE = "What to measure", "On what text", "Output", "Machine"

Model = Annotated[
    str, typer.Argument(help="A hub id, a folder written by save_pretrained, or `demo`: the packaged MiniLM, offline.")
]
Record = Annotated[
    str,
    typer.Argument(
        metavar="RECORD", help="A file that `--json`, `to_json` or a monitor wrote; `-` reads it from stdin."
    ),
]
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECORD]...", help="Further records. Each is compared with the first."),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Hub ids, with a revision where one is meant (`org/model@step1000`), folders written by save_pretrained, and folders "
        "of checkpoints (`checkpoint-500`, …), which are sorted by step.",
    ),
]
Level = Annotated[
    Literal["core", "full"],
    typer.Option(
        help="`full` also measures contraction, spectral gap, susceptibility and nonlinear innovation. It takes longer.",
        rich_help_panel=MEASURE,
    ),
]
FailOn = Annotated[
    Severity | None,
    typer.Option(help="Exit with code 1 if a finding is at least this severe.", rich_help_panel=MEASURE),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A UTF-8 file; blank lines separate sequences. Give it again for another file. Default: built-in English prose.",
        rich_help_panel=TEXT,
    ),
]
SequenceLimit = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=bounds.SEQUENCES,
        help="Use at most this many sequences. Default: all of your text, or 64 of the built-in prose.",
        rich_help_panel=TEXT,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(min=2, max=bounds.TOKENS, help="Cut each sequence after this many tokens.", rich_help_panel=TEXT),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=bounds.SEED, help="Selects which paragraphs of the built-in prose are used.", rich_help_panel=TEXT
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the record as JSON, gzipped if the name ends in .gz. With `-` it goes to stdout and everything else to stderr.",
        rich_help_panel=OUTPUT,
    ),
]
Html = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write an HTML page. It opens without a network.", rich_help_panel=OUTPUT),
]
Csv = Annotated[
    str | None,
    typer.Option(
        "--csv",
        metavar="FOLDER",
        help="Write every table of the record as a CSV file into this folder. An empty field was not measured.",
        rich_help_panel=OUTPUT,
    ),
]
Parquet = Annotated[
    str | None,
    typer.Option(
        "--parquet",
        metavar="FOLDER",
        help="The same as Parquet files. Needs pyarrow.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors only: no table, no progress bars.", rich_help_panel=OUTPUT)
]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The folder for the records, one a checkpoint. What is there already is not measured again.",
        rich_help_panel=OUTPUT,
    ),
]
Retry = Annotated[
    bool,
    typer.Option("--retry", help="Measure again what failed before with the same options.", rich_help_panel=OUTPUT),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Take only the I-th of N shares of the checkpoints, counted from 1: for job arrays.",
        rich_help_panel=MACHINE,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Send the checkpoints to a Ray cluster: the one of this machine, or `--ray=ray://host:10001`; `--ray=local` starts "
        "one. Needs uncollapse[ray].",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run: cpu, cuda, cuda:1. Default: cuda if available, otherwise cpu.", rich_help_panel=MACHINE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, float64, or auto: the checkpoint's own. Default: auto.",
        rich_help_panel=MACHINE,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="How much of each device's memory the model may take, such as 3GiB; what does not fit stays on disk.",
        rich_help_panel=MACHINE,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="`auto` spreads a model over all devices when one is too small. Needs uncollapse[large].",
        rich_help_panel=MACHINE,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1, max=bounds.SEQUENCES, help="How many sequences go through the model together.", rich_help_panel=MACHINE
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model. Use it only if you trust the author.",
        rich_help_panel=MACHINE,
    ),
]

MaxParameters = Annotated[
    int,
    typer.Option(
        min=1,
        help="Refuse a model with more parameters than this, before its weights are read.",
        rich_help_panel=MACHINE,
    ),
]

ContextLengths = Annotated[
    str | None,
    typer.Option(
        metavar="64,128,…",
        help="Also fit how the second singular value of the attention matrices falls as the context grows over these lengths.",
        rich_help_panel=MEASURE,
    ),
]


def token_counts(text: str | None) -> list[int] | None:
    """The lengths given to `--context-lengths`. Whether the model and the text have room for them is checked later.

    >>> token_counts("64, 128")
    [64, 128]
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,7}", part) for part in parts):
        raise InputError(
            f"--context-lengths: expected numbers of tokens such as 64,128,256, got {text!r}. "
            "Commas separate them. Pass two or more."
        )
    return [int(part) for part in parts]


def share(text: str | None) -> tuple[int, int] | None:
    """The share given to `--shard`. Whether there is such a share is checked later.

    >>> share("2/8")
    (2, 8)
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None:
        raise InputError(
            f"--shard: expected I/N such as 2/8, got {text!r}. Shares are counted from 1. In a job array of 8 pass "
            "--shard $((TASK + 1))/8 where TASK counts from 0."
        )
    return int(found[1]), int(found[2])


def cluster(text: str | None) -> str | None:
    """The address given to `--ray`.

    >>> cluster("auto"), cluster("ray://host:10001")
    ('auto', 'ray://host:10001')
    """
    if text is None or text in ("auto", "local") or re.fullmatch(r"(ray://)?[^/\s]+:[0-9]+", text):
        return text
    raise InputError(
        f"--ray: expected an address such as ray://host:10001, host:6379, auto or local, got {text!r}. It may be a model. "
        "Write --ray last, or --ray=auto."
    )


Without = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART,PART…",
        help="Parts to remove in one run: norm, residual, mlp, attention, block, head, attention-residual, mlp-residual, "
        "mask, positions. Of single heads the block and the number: head:5.3. "
        "Give it again for another run. Default: three runs, without mlp, without residual, without both.",
        rich_help_panel=MEASURE,
    ),
]
Grid = Annotated[
    bool,
    typer.Option("--grid", help="Run all eight combinations of norm, residual and MLP.", rich_help_panel=MEASURE),
]
Blocks = Annotated[
    str | None,
    typer.Option(
        metavar="3-6|3,5|all+outer",
        help="Remove parts in these blocks only, counted from 0. `all+outer`: in all of them, and the norms outside them too.",
        rich_help_panel=MEASURE,
    ),
]


def block_numbers(text: str | None) -> list[int] | Literal["all", "all+outer"] | None:
    """The blocks given to `--blocks`: numbers and ranges, both ends included. Whether the model has them is checked later.

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
                "Blocks are counted from 0, and a range must rise. Pass for example --blocks 3-6."
            )
        numbers.update(chosen)
    return sorted(numbers)


Subject = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A language model: a hub id, or a folder written by save_pretrained, with its tokenizer."
    ),
]
Prompt = Annotated[
    list[str],
    typer.Option(
        "--prompt", metavar="TEXT", help="What the model reads. Give it again for another prompt.", rich_help_panel=TEXT
    ),
]
Target = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="TOKEN",
        help="The continuation that is asked about, one token (mind the space: ' Mary'). One for all prompts, or one for each.",
        rich_help_panel=TEXT,
    ),
]
Against = Annotated[
    list[str],
    typer.Option(
        "--against",
        metavar="TOKEN",
        help="The continuation it is compared with. One for all prompts, or one for each.",
        rich_help_panel=TEXT,
    ),
]
AblatedAs = Annotated[
    Literal["zero", "mean", "resample", "none"],
    typer.Option(
        help="What stands in the place of a component that is taken away for its total effect. `none` leaves these out.",
        rich_help_panel=MEASURE,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Also measure direct effects with all norms scaling anew. It takes longer.",
        rich_help_panel=MEASURE,
    ),
]
Noise = Annotated[
    float,
    typer.Option(
        min=1e-6,
        max=0.999,
        help="The error of an observer behind the output projection, as a share of what the layer writes.",
        rich_help_panel=MEASURE,
    ),
]

Claims = Annotated[
    list[str] | None,
    typer.Argument(metavar="CLAIM", help="Ids of the claims to check, listed below. Default: all of them."),
]
Trials = Annotated[
    int,
    typer.Option(
        min=1,
        max=bounds.TRIALS,
        help="How many random cases to draw; each check scales its own number by it, and fewer than 12 count as 12.",
        rich_help_panel=MEASURE,
    ),
]
Draws = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=bounds.SEED,
        help="Fixes the random cases: the same seed draws the same ones.",
        rich_help_panel=MEASURE,
    ),
]
