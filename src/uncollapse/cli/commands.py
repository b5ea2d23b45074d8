"""The command line: parse, call, show, exit. Nothing about a model is decided here.

Nothing heavy is imported until the arguments have been checked, so `--help` answers at once.

Exit codes: 0 done; 1 done, with a finding at or above `--fail-on`; 2 the input cannot be used (one line on stderr);
130 interrupted; 141 whoever read the output has left. A traceback means a bug.
"""

# Annotations are evaluated here, unlike elsewhere: typer reads options from them. Those for the type checker alone are strings.
import contextlib
import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from uncollapse.bounds import PARAMETERS
from uncollapse.cli import launched, streams
from uncollapse.cli.options import (
    AblatedAs,
    Against,
    BatchSize,
    Blocks,
    Claims,
    ContextLengths,
    Csv,
    Device,
    DeviceMap,
    Draws,
    Dtype,
    Exact,
    FailOn,
    Grid,
    Html,
    Json,
    Level,
    MaxMemory,
    MaxParameters,
    MaxTokens,
    Model,
    Models,
    More,
    Noise,
    Out,
    Parquet,
    Prompt,
    Quiet,
    Ray,
    Record,
    Retry,
    Seed,
    SequenceLimit,
    Shard,
    Subject,
    Target,
    Text,
    Trials,
    TrustRemoteCode,
    Without,
    block_numbers,
    cluster,
    share,
    token_counts,
)
from uncollapse.cli.output import (
    FOUND,
    REFUSED,
    STDIN,
    Outputs,
    Reads,
    deliver,
    progress_on_stderr,
    reaches,
    refusals_in_one_line,
    require_writable,
    say,
)
from uncollapse.records.common import Severity

if TYPE_CHECKING:
    from uncollapse.analyses.ablation import Ablation
    from uncollapse.analyses.attribution import Attribution
    from uncollapse.analyses.comparison import Comparison
    from uncollapse.analyses.diagnosis import Diagnosis
    from uncollapse.analyses.heads import Identifiability
    from uncollapse.analyses.ledger import Verification
    from uncollapse.analyses.preparation import ProbeOptions
    from uncollapse.analyses.result import Recorded
    from uncollapse.analyses.sweep import Sweep
    from uncollapse.analyses.symmetries import Symmetries
    from uncollapse.probe.passes import Progress

# Every error of the command line. Newer versions of typer bring a click of their own, so it is reached through typer's name.
UsageError: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="uncollapse",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback: no boxes, no values of local variables
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Always ends in SystemExit, unless there is a bug."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with streams.standard_streams(), streams.quiet_libraries():
        raise SystemExit(_ended(given))


def _ended(given: list[str]) -> int:
    """Run a command and say how it ended: as an exit code, and where that is 2 as one line on stderr."""
    try:
        # Not in its own standalone mode: that draws boxes around usage errors, and ends a broken pipe with 1, which is a finding.
        # Without a variable of the environment that would ask for shell completions, which are not offered.
        code = app(
            args=_with_an_address(given),
            prog_name="uncollapse",
            obj=shlex.join(["uncollapse", *given]),
            standalone_mode=False,
            complete_var="-",
        )
        sys.stdout.flush()
    except UsageError as error:
        context = getattr(error, "ctx", None)
        at = "uncollapse" if context is None else context.command_path
        say(f"uncollapse: {' '.join(error.format_message().split()).rstrip('.')}. See `{at} --help`.")
        return REFUSED
    except BrokenPipeError:
        streams.let_go_of_stdout()
        return streams.BROKEN_PIPE
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer ends it with 1, which is the code of a finding
            streams.let_go_of_stdout()
            return streams.BROKEN_PIPE
        raise
    except OSError as error:
        if not streams.is_refused_write(error):
            raise
        streams.let_go_of_stdout()
        say(f"uncollapse: {streams.stdout_refused(error)}")
        return REFUSED
    return code if isinstance(code, int) else 0


def _with_an_address(given: list[str]) -> list[str]:
    """`--ray` without an address means the cluster of this machine. typer knows no option whose value may be left out.

    >>> _with_an_address(["sweep", "a", "--ray", "--quiet"]), _with_an_address(["sweep", "a", "--ray", "local"])
    (['sweep', 'a', '--ray', 'auto', '--quiet'], ['sweep', 'a', '--ray', 'local'])
    """
    if given[:1] != ["sweep"] or "--ray" not in given:
        return given
    at = given.index("--ray") + 1
    return given if at < len(given) and not given[at].startswith("-") else [*given[:at], "auto", *given[at:]]


@app.callback(invoke_without_command=True, epilog="Start here: `uncollapse diagnose` looks at a small packaged model.")
def uncollapse(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Diagnose, explain and undo representational collapse in Transformers."""
    if version:
        from uncollapse import __version__

        typer.echo(f"uncollapse {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def on_a_model(*, epilog: str, judges: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a command of a function `name(model, text, *, its own options, **probe)` that returns what was found.

    The command has the function's name and docstring, its own options first, and then the shared ones: text, output, machine.
    A function that takes several models says so in the annotation of `model`.
    `judges`: the result has `findings`, which `--fail-on` can turn into an exit code.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(
            context: typer.Context,
            model: Model = "demo",
            fail_on: FailOn = None,
            text: Text = None,
            sequences: SequenceLimit = None,
            max_tokens: MaxTokens = 128,
            seed: Seed = 0,
            json: Json = None,
            html: Html = None,
            csv: Csv = None,
            parquet: Parquet = None,
            quiet: Quiet = False,
            device: Device = None,
            dtype: Dtype = None,
            device_map: DeviceMap = None,
            max_memory: MaxMemory = None,
            batch_size: BatchSize = 16,
            max_parameters: MaxParameters = PARAMETERS,
            trust_remote_code: TrustRemoteCode = False,
            **own: Any,
        ) -> None:
            def found(progress: "Progress | None") -> Any:
                return function(
                    model,
                    text,
                    **own,
                    sequences=sequences,
                    max_tokens=max_tokens,
                    batch_size=batch_size,
                    seed=seed,
                    device=device,
                    dtype=dtype,
                    device_map=device_map,
                    max_memory=max_memory,
                    max_parameters=max_parameters,
                    trust_remote_code=trust_remote_code,
                    command=context.obj or "",
                    progress=progress,
                )

            reads = Reads([("--text", str(file)) for file in text or ()], [model] if isinstance(model, str) else model)
            carry_out(
                found,
                reads=reads,
                outputs=Outputs(json, html, csv, parquet),
                quiet=quiet,
                fail_on=fail_on,
                together=True,
            )

        first, *rest = (p for p in inspect.signature(run).parameters.values() if p.kind is not p.VAR_KEYWORD)
        own_options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        of_models = inspect.signature(function).parameters["model"].annotation
        if of_models is Models:
            rest[0] = rest[0].replace(annotation=of_models, default=inspect.Parameter.empty)
        if not judges:
            rest = [p for p in rest if p.name != "fail_on"]
        as_keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in (first, rest[0], *own_options, *rest[1:])]
        # typer reads both, and neither may name what is imported for the type checker alone: it would be evaluated.
        run.__signature__ = inspect.Signature(as_keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in as_keywords}
        app.command(function.__name__, help=function.__doc__, epilog=epilog)(run)
        return function

    return register


def carry_out(
    found: "Callable[[Progress | None], Any]",
    *,
    outputs: Outputs,
    quiet: bool,
    reads: Reads | None = None,
    fail_on: Severity | None = None,
    together: bool = False,
) -> None:
    """The body of every command: check the outputs, do the work with progress bars, deliver the result, set the exit code. Of the
    processes that torchrun starts all work `together`, or only the first does."""
    first = launched.is_first()
    if not (first or together):
        return
    with refusals_in_one_line(), launched.joined() if together else contextlib.nullcontext():
        with launched.agreed() if together else contextlib.nullcontext():
            if first:
                require_writable(outputs, quiet=quiet, reads=reads)
        with progress_on_stderr(quiet or not first) as progress, contextlib.redirect_stdout(sys.stderr):
            # stdout is kept for the result: whatever a library or a model's own code prints meanwhile goes to stderr.
            result = found(progress)
        if not first:
            return
        deliver(result, outputs, quiet=quiet)
        if fail_on is not None and reaches(result.findings, fail_on):
            raise typer.Exit(FOUND)


def texts_in(files: list[Path] | None) -> list[str] | None:
    """The texts of `--text`; without it None, which means the built-in prose."""
    from uncollapse.sources import read_texts

    if not files:
        return None
    return launched.read_by_the_first(lambda: read_texts(files))


@on_a_model(
    judges=True,
    epilog="""
**Examples**

The packaged model, offline, with a page to read:

    uncollapse diagnose --html report.html

Your own checkpoint on your own text:

    uncollapse diagnose ./checkpoint --text corpus.txt --max-tokens 256

In a training script: exit with code 1 if something critical is found:

    uncollapse diagnose ./checkpoint --quiet --fail-on critical

Does attention narrow to a plain average as the context grows?

    uncollapse diagnose --context-lengths 32,64,128,256 --html report.html

Only JSON on stdout, for another program:

    uncollapse diagnose org/model --json - | jq .findings

**Exit codes**: 0 done; 1 done, with a finding at or above --fail-on; 2 the input cannot be used; 130 interrupted.
""",
)
def diagnose(
    model: str,
    text: Text,
    *,
    level: Level = "core",
    context_lengths: ContextLengths = None,
    **probe: "Unpack[ProbeOptions]",
) -> "Diagnosis":
    """Measure where and how the token representations of a model collapse, and report what was found."""
    lengths = token_counts(context_lengths)
    from uncollapse.analyses.diagnosis import diagnose as diagnosis

    return diagnosis(model, texts_in(text), level=level, context_lengths=lengths, **probe)


@on_a_model(
    epilog="""
**Examples**

What keeps the tokens of the packaged model apart? Followed down to 1e-15, with a page to read:

    uncollapse ablate demo --grid --dtype float64 --html grid.html

The whole model and two more runs, on your own checkpoint and text:

    uncollapse ablate ./checkpoint --without mlp --without residual,mlp --text corpus.txt

In blocks 3 to 6 only:

    uncollapse ablate org/model --without residual --blocks 3-6

Only the verdicts, for another program:

    uncollapse ablate --grid --json - | jq '.verdicts[] | {prediction, measure, agrees}'

Removing a part from a trained model is not the same as training without it.

**Exit codes**: 0 done; 2 the input cannot be used; 130 interrupted.
""",
)
def ablate(
    model: str,
    text: Text,
    *,
    level: Level = "core",
    without: Without = None,
    grid: Grid = False,
    blocks: Blocks = None,
    **probe: "Unpack[ProbeOptions]",
) -> "Ablation":
    """Run a model without some of its parts, and find out which of them keeps its tokens apart."""
    wanted = block_numbers(blocks)
    combinations = [tuple(part.strip() for part in each.split(",")) for each in without] if without else None
    from uncollapse.analyses.ablation import ablate as ablation

    return ablation(model, texts_in(text), without=combinations, grid=grid, blocks=wanted, level=level, **probe)


@on_a_model(
    judges=True,
    epilog="""
**Examples**

Can a result be attributed to a single head of the packaged model? With a page that shows every head:

    uncollapse heads demo --html heads.html

Your own checkpoint; the text matters only for how much each head writes:

    uncollapse heads ./checkpoint --text corpus.txt

In a script: exit with code 1 if heads have become copies of each other:

    uncollapse heads ./checkpoint --quiet --fail-on warning

Block by block, for another program:

    uncollapse heads --json - | jq -r '.heads[] | [.block, .verdict] | @tsv'

**Verdicts**: attributable; attributable with care (noise gain); not attributable (kernel). They say what can be read off a
layer's output. What each head wrote can always be recorded before the sum: `uncollapse.head_contributions` in Python.

**Exit codes**: 0 done; 1 done, with a finding at or above --fail-on; 2 the input cannot be used; 130 interrupted.
""",
)
def heads(model: str, text: Text, **probe: "Unpack[ProbeOptions]") -> "Identifiability":
    """Say for each block whether a result can be attributed to a single head, and what stays ambiguous for which observer."""
    from uncollapse.analyses.heads import identify

    return identify(model, texts_in(text), **probe)


@on_a_model(
    epilog="""
**Examples**

Which symmetries are exact on the packaged model, which are broken, and by what? With a page to read:

    uncollapse symmetries --html symmetries.html

Your own checkpoint, and how its attention changes as the context grows:

    uncollapse symmetries ./checkpoint --text corpus.txt --context-lengths 64,128,256

In double precision, where exact symmetries hold to 1e-14:

    uncollapse symmetries --dtype float64

Only the tests, for another program:

    uncollapse symmetries --json - | jq '.tests[] | {action, without, holds, dimension}'

The tests use a few sequences. Weights that a test transforms are restored bit for bit.

**Exit codes**: 0 done; 2 the input cannot be used; 130 interrupted.
""",
)
def symmetries(
    model: str,
    text: Text,
    *,
    context_lengths: ContextLengths = None,
    **probe: "Unpack[ProbeOptions]",
) -> "Symmetries":
    """Let four symmetry groups act on a model: which symmetries hold, what breaks them, how far is each collapse?"""
    lengths = token_counts(context_lengths)
    from uncollapse.analyses.symmetries import symmetries as acting

    return acting(model, texts_in(text), context_lengths=lengths, **probe)


@on_a_model(
    judges=True,
    epilog="""
**Examples**

All checkpoints of a training run, on your own text, with a page that shows where it went wrong:

    uncollapse sweep runs/llama --out sweep --text corpus.txt --html sweep.html

Revisions of a model on the hub:

    uncollapse sweep EleutherAI/pythia-70m@step{0,512,1000,143000} --out sweep

One of eight jobs of an array, each on its own share, and then the page of all of them:

    uncollapse sweep runs/llama --out sweep --shard 3/8 --quiet

    uncollapse sweep runs/llama --out sweep --html sweep.html

On a Ray cluster:

    uncollapse sweep runs/llama --out sweep --ray=ray://head:10001

What changed between two of them:

    uncollapse compare sweep/llama-checkpoint-500-*.json.gz sweep/llama-checkpoint-1000-*.json.gz

What has failed, for another program:

    uncollapse sweep runs/llama --out sweep --json - | jq -r '.runs[].checkpoints[] | select(.failure) | .name'

**Going on.** Stop it when you like and call it again: what is in the folder is not measured again, unless its weights, the text or
an option that decides the figures have changed. Several runs may work on one folder at the same time, on one machine or on a
shared file system with locks; each waits for what the others are still at. A checkpoint that cannot be measured ends nothing. Its
reason is kept as a record, too; `--retry` tries it again.

**Exit codes**: 0 done, failures or not; 1 done, with a finding at or above --fail-on; 2 the input cannot be used; 130 interrupted.
""",
)
def sweep(
    model: Models,
    text: Text,
    *,
    out: Out,
    level: Level = "core",
    context_lengths: ContextLengths = None,
    retry: Retry = False,
    shard: Shard = None,
    ray: Ray = None,
    **probe: "Unpack[ProbeOptions]",
) -> "Sweep":
    """Diagnose many checkpoints into a folder, one record each. It can be stopped and gone on with at any time."""
    lengths, part, address = token_counts(context_lengths), share(shard), cluster(ray)
    from uncollapse.analyses.sweep import sweep as over_all

    return over_all(
        model,
        texts_in(text),
        out=out,
        level=level,
        context_lengths=lengths,
        retry=retry,
        shard=part,
        ray=address,
        **probe,
    )


@app.command(
    epilog="""
**Examples**

Which heads make a model prefer *are* to *is* after a plural subject?

    uncollapse attribute ./SmolLM2-135M --prompt "The keys to the cabinet" --target " are" --against " is"

Several prompts, so that every figure has an interval, and a page to read:

    uncollapse attribute ./SmolLM2-135M --prompt "The keys to the cabinet" --prompt "The letters from my aunt"
    --target " are" --against " is" --html attribution.html

Direct and first-order effects only, which take a few passes in all:

    uncollapse attribute ./model --prompt "…" --target " a" --against " b" --ablated-as none

A checkpoint in half precision, measured in float32, where it can be told whether the effects add up:

    uncollapse attribute ./model --prompt "…" --target " a" --against " b" --dtype float32

The heads, largest first, for another program:

    uncollapse attribute ./model --prompt "…" --target " a" --against " b" --json - |
    jq '[.effects[] | select(.kind == "head")] | sort_by(-(.direct.mean | fabs))[:10]'

In Python any function of the output can be attributed: `uncollapse.attribute(model, batch, metric)`.

**Exit codes**: 0 done; 2 the input cannot be used; 130 interrupted.
"""
)
def attribute(
    context: typer.Context,
    model: Subject,
    prompt: Prompt,
    target: Target,
    against: Against,
    ablated_as: AblatedAs = "zero",
    exact: Exact = False,
    noise: Noise = 0.01,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    json: Json = None,
    html: Html = None,
    csv: Csv = None,
    parquet: Parquet = None,
    quiet: Quiet = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_parameters: MaxParameters = PARAMETERS,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say which heads, MLPs and biases make a model prefer one next token to another, and what may be said of a single head."""

    def found(progress: "Progress | None") -> "Attribution":
        from uncollapse.analyses.attribution import attribute as attribution
        from uncollapse.probe.metrics import logit_difference

        return attribution(
            model,
            prompt,
            logit_difference(target, against),
            ablated_as=None if ablated_as == "none" else ablated_as,
            exact=exact,
            noise=noise,
            max_tokens=max_tokens,
            seed=seed,
            device=device,
            dtype=dtype,
            device_map=device_map,
            max_parameters=max_parameters,
            trust_remote_code=trust_remote_code,
            command=context.obj or "",
            progress=progress,
        )

    carry_out(found, reads=Reads((), [model]), outputs=Outputs(json, html, csv, parquet), quiet=quiet, together=True)


# The ids stand here as text, so that the help need not import what checks them; a test holds them against the ledger.
@app.command(
    epilog="""
**Examples**

The whole ledger, in seconds, with a page of evidence and matrices to copy:

    uncollapse verify --html ledger.html

One claim, with ten times the random cases:

    uncollapse verify layernorm-affine-rank --trials 2000

Which claims are refuted, for another program:

    uncollapse verify --json - | jq -r '.claims[] | select(.verdict == "refuted as stated") | .id'

**Collapse in depth**: attention-only-collapse, causal-collapse-is-geometric,
relative-bias-collapse-is-geometric, leaders, attention-never-gains-rank, consensus-is-invariant,
residual-obstructs-collapse, residual-needs-no-mlp, random-residuals-are-geometric

**Norms**: layernorm-affine-rank, layernorm-rank-formula, layernorm-matrix-rank, rmsnorm-rank, layernorm-and-distance

**What an MLP adds**: mlp-leaves-the-span, mlp-leaves-the-reachable-space, attention-is-affine-given-patterns,
ffn-width-four

**Heads and gates**: head-channel-ambiguity, head-observers, mlp-cannot-unmix, pgop-overhead, pgop-gauge, pgop-recovery,
channel-gates, attention-weights-unidentifiable

**Width and entropy**: width-collapse, last-token-collapse, entropy-floor, dispersion, scaling-fixed-points,
sinks-against-overmixing

**Symmetries**: four-symmetries, token-permutation, head-permutation, value-output-gauge, query-key-gauge, gauge-with-norms

**Verdicts**: holds; holds generically; holds under hypotheses; refuted as stated; measured; undecided. Every one of them is
a result; none is a failure of the run.

**Exit codes**: 0 done; 2 the input cannot be used; 130 interrupted.
"""
)
def verify(
    claims: Claims = None,
    trials: Trials = 200,
    seed: Draws = 0,
    json: Json = None,
    html: Html = None,
    csv: Csv = None,
    parquet: Parquet = None,
    quiet: Quiet = False,
) -> None:
    """Check claims about Transformers, in exact arithmetic where possible, and print each verdict with its evidence."""

    def found(progress: "Progress | None") -> "Verification":
        from uncollapse.analyses.ledger import verify as verification

        return verification(
            list(dict.fromkeys(claims)) if claims else None,
            trials=trials,
            seed=seed,
            # One bar for all the claims, not one for each.
            progress=progress and (lambda _, done, total: progress("claims", done, total)),
        )

    carry_out(found, outputs=Outputs(json, html, csv, parquet), quiet=quiet)


@app.command(
    epilog="""
**Examples**

What did fine-tuning do to the heads? With a page to read:

    uncollapse diagnose org/base --text corpus.txt --json base.json
    uncollapse diagnose ./tuned --text corpus.txt --json tuned.json
    uncollapse compare base.json tuned.json --html comparison.html

In a training script: exit with code 1 if something got worse by half or more:

    uncollapse compare last.json this.json --quiet --fail-on warning

The figures that moved, for another program:

    uncollapse compare base.json tuned.json --json - | jq '.heads[] | select(.moved)'

Several checkpoints beside the one they came from, on one page:

    uncollapse compare base.json step-500.json step-1000.json --html comparison.html

Diagnose all on the same text: only then can single heads be compared.

**Exit codes**: 0 done; 1 done, with a finding at or above --fail-on; 2 the records cannot be used; 130 interrupted.
"""
)
def compare(
    before: Record,
    after: Record,
    more: More = None,
    fail_on: FailOn = None,
    json: Json = None,
    html: Html = None,
    csv: Csv = None,
    parquet: Parquet = None,
    quiet: Quiet = False,
) -> None:
    """Lay diagnoses beside each other: what changed since the first, block by block and head by head?"""

    def found(_: "Progress | None") -> "Comparison":
        from uncollapse.analyses.comparison import compare as comparison

        return comparison(*(_stored(name) for _, name in given))

    given = [("BEFORE", before), ("AFTER", after), *((f"RECORD {n}", name) for n, name in enumerate(more or [], 3))]
    reads = Reads(given)
    carry_out(found, reads=reads, outputs=Outputs(json, html, csv, parquet), quiet=quiet, fail_on=fail_on)


@app.command(
    epilog="""
**Examples**

A page for a record that another machine wrote:

    uncollapse show report.json --html report.html

The table again, of whichever command wrote the record:

    uncollapse show grid.json

A run that is being monitored, while it goes on:

    uncollapse show run.jsonl --html run.html

From a pipe, with nothing stored:

    ssh cluster uncollapse diagnose ./checkpoint --json - | uncollapse show - --html report.html

A record of an earlier version, with the keys of this one:

    uncollapse show old.json --json new.json --quiet

Nothing is measured and no model is loaded: a record is complete in itself. `uncollapse.load` reads one in Python.

**Exit codes**: 0 done; 2 the record cannot be used; 130 interrupted.
"""
)
def show(
    record: Record,
    json: Json = None,
    html: Html = None,
    csv: Csv = None,
    parquet: Parquet = None,
    quiet: Quiet = False,
) -> None:
    """Show a stored record or a monitor's trail, in the terminal, as a page or as JSON."""

    def found(_: "Progress | None") -> "Recorded[Any]":
        from uncollapse.analyses.result import Recorded

        return Recorded(_stored(record))

    carry_out(found, reads=Reads([("RECORD", record)]), outputs=Outputs(json, html, csv, parquet), quiet=quiet)


def _stored(name: str) -> Any:
    """The record in a file, or the one on stdin."""
    from uncollapse import records

    return records.load(sys.stdin.buffer if name == STDIN else name)
