"""Every model type of transformers, built tiny from its config, read and proved: an unattended sweep that writes a table.

    make families                                  the whole sweep, about ten minutes on two cores
    python -m studies.families --only bert llama     a few types, with the whole message of a refusal

A type is built tiny from its config and fed with what its forward asks for (`studies.tiny`), traced, and proved. Where a model can
return its own attention weights, the entropies measured are compared with theirs. What cannot be built or fed says so in the table:
that is no verdict on the anatomy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS_A_TYPE = 240
SECONDS_A_START = 600  # imports, on a machine that has other things to do
WORKERS = 2
MEMORY = 10 * 2**30  # of addresses; the largest takes 7
CLOSE = 1e-3  # two entropies, in nats, that are one: float32, and in some models half precision inside

NO_REFERENCE = {
    "falcon": "the weights it returns are not those it uses: they are not causal",
    "cpmant": "of the weights it returns it cuts off those of its prompt",
    "oneformer": "the weights it returns are over the padding of its windows, too",
}


# One type -------------------------------------------------------------------------------------------------------------
def swept(kind: str) -> dict[str, Any]:
    """Everything the table says of one type."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from studies.tiny import built, one_line, without_paths
    from uncollapse.anatomy.probing import probing
    from uncollapse.anatomy.proof import proved_anatomy
    from uncollapse.anatomy.reading import _Reader
    from uncollapse.anatomy.tracing import trace
    from uncollapse.errors import UnsupportedModel

    name = MODEL_MAPPING_NAMES[kind]
    row: dict[str, Any] = {"type": kind, "class": name if isinstance(name, str) else name[0], "built": False}
    try:
        model, batch, strategy = built(kind)
    except Exception as error:
        return row | {"reason": without_paths(str(error))}
    row |= {"built": True, "strategy": strategy, "inputs": "+".join(batch)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        with probing(model):
            recorded = trace(model, batch)
    except Exception as error:
        return row | {"proved": False, "crash": True, "reason": f"trace: {one_line(error)}"}
    called = {type(model.get_submodule(c.name)).__name__ for c in recorded.calls if c.name}
    row["attention_calls"] = len(_Reader(model, recorded).attentions)
    row["named_attention"] = sorted(c for c in called if re.search(r"Att(ention|n)", c))
    try:
        anatomy = proved_anatomy(model, batch)
    except UnsupportedModel as error:
        return row | {
            "proved": False,
            "reason": error.identity or one_line(error),
            "message": str(error),
            "found": error.found,
        }
    except Exception as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        own = [f for f in where if "uncollapse" in f.filename]
        return row | {
            "proved": False,
            "crash": True,
            "reason": f"{one_line(error)} (in {own[-1].name})" if own else one_line(error),
            "message": "".join(traceback.format_exception(error)[-6:]),
        }
    row |= {
        "proved": True,
        "blocks": len(anatomy.blocks),
        "placement": anatomy.norm_placement,
        "parts": ", ".join(dict.fromkeys("+".join(p.kind for p in b.parts) for b in anatomy.blocks)),
        "covered": sum(len(p.attention) for b in anatomy.blocks for p in b.parts),
        "stacks": dict(Counter(str(b.stack) for b in anatomy.blocks)),
        "one_call_a_part": all(len(p.attention) <= 1 for b in anatomy.blocks for p in b.parts),
        "projections": sum(c.projection is not None for b in anatomy.blocks for p in b.parts for c in p.attention),
        "described": anatomy.describe(),
    }
    return row | _captured(model, batch, anatomy)


def _captured(model: Any, batch: dict[str, Any], anatomy: Any) -> dict[str, Any]:
    """Whether the output under capture is the output without, bit for bit; and whether its entropies are the model's own."""
    from studies.tiny import one_line
    from uncollapse.anatomy.probing import probing
    from uncollapse.anatomy.torch_calls import tensors_in
    from uncollapse.probe.passes import capture

    with probing(model):
        plain = [t.clone() for t in tensors_in(model(**batch))]
    seen: list[Any] = []

    def keep(_: Any, _given: Any, output: Any) -> None:
        seen[:] = [t.clone() for t in tensors_in(output)]  # a pass that only sends the model on its way comes before

    hook = model.register_forward_hook(keep)
    try:
        observed = capture(model, [batch], anatomy)
    except Exception as error:
        return {"capture": False, "capture_reason": one_line(error)}
    finally:
        hook.remove()
    same = len(plain) == len(seen) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(plain, seen, strict=True)
    )
    return {
        "capture": same,
        "capture_reason": "" if same else "the output differs",
        "entropy": _compared(model, batch, observed.attention),
    }


# Entropies ------------------------------------------------------------------------------------------------------------
def _compared(model: Any, batch: dict[str, Any], measured: list[Any]) -> dict[str, Any]:
    """The entropies measured, compared with those of the weights that the model returns itself. `equal`, `unequal` and `null`
    count attention sublayers; `reason` says why nothing was compared, or what was not. A model may return the weights of some
    sublayers only (Swin: of the last in a stage): what is left when all of them were found has nothing to be compared with."""
    from uncollapse.probe.attention import ATTENTION_MEASURES

    counts: dict[str, Any] = {
        "equal": 0,
        "unequal": 0,
        "null": 0,
        "reason": NO_REFERENCE.get(model.config.model_type, ""),
    }
    if counts["reason"]:
        return counts
    references, by_module, counts["reason"] = _own_entropies(model, batch)
    owned = [known for several in by_module.values() for known in several]
    references = [one for one in references if not any(_are_close(one, known) for known in owned)]
    row = ATTENTION_MEASURES.index("entropy")
    unlike: list[str] = []
    alone: list[str] = []
    for statistics in measured if references or by_module else []:
        if "entropy" in statistics.reasons:
            counts["null"] += 1
            counts["reason"] = counts["reason"] or str(statistics.reasons["entropy"])
            continue
        own = [statistics.values.summary(row, head)[0] for head in range(statistics.call.heads)]
        of_module = by_module.get(statistics.call.product.owner)
        among = references if of_module is None else of_module
        gaps = [
            (max(abs(a - b) for a, b in zip(own, reference * (len(own) // len(reference)), strict=True)), i)
            for i, reference in enumerate(among)
            if reference and len(own) % len(reference) == 0  # of heads that mix two sets of values, ours count twice
        ]
        gap, nearest = min(gaps, default=(float("inf"), -1))
        if gap <= CLOSE:
            counts["equal"] += 1
            del among[nearest]  # each is that of one sublayer
        else:
            (alone if of_module is None else unlike).append(f"off by {gap:.2g} in block {statistics.block}")
    unlike += alone[: len(references)]  # what no module returns by itself may be any of those that are left
    counts["unequal"] = len(unlike)
    counts["reason"] = unlike[0] if unlike else counts["reason"]
    return counts


def _are_close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= CLOSE for a, b in zip(one, other, strict=True))


def _own_entropies(model: Any, batch: dict[str, Any]) -> tuple[list[list[float]], dict[str, list[list[float]]], str]:
    """Mean entropies [head] of every attention whose weights the model returns; by name those of modules that return their own, one
    for each run; and why there are none."""
    import torch

    from studies.tiny import one_line
    from uncollapse.anatomy.probing import probing
    from uncollapse.anatomy.torch_calls import tensors_in

    before = getattr(model.config, "_attn_implementation", None)
    runs: dict[str, list[Any]] = {}

    def note(name: str, output: Any) -> None:
        for weights in output[1:] if isinstance(output, tuple) else ():
            is_matrix = isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.is_floating_point()
            if is_matrix and weights.any() and _is_distribution(weights):  # T5 also returns the bias of its positions
                runs.setdefault(name, []).append(weights.double())

    with probing(model), torch.no_grad():
        torch.manual_seed(0)
        plain = [t.clone() for t in tensors_in(model(**batch)) if t.is_floating_point()]
    with contextlib.suppress(Exception):  # it has eager attention and no other
        model.set_attn_implementation("eager")
    try:
        with probing(model), torch.no_grad():
            torch.manual_seed(0)
            eager = [t.clone() for t in tensors_in(model(**batch)) if t.is_floating_point()]
            torch.manual_seed(0)
            with contextlib.ExitStack() as hooked:
                for name, module in model.named_modules():
                    hook = module.register_forward_hook(lambda _, __, found, name=name: note(name, found))
                    hooked.callback(hook.remove)
                output = model(**batch, output_attentions=True)
    except Exception as error:
        return [], {}, f"returns no weights: {one_line(error, 80)}"
    finally:
        with contextlib.suppress(Exception):
            model.set_attn_implementation(before)
    weights = [w.double() for w in _attentions(output) if w.ndim == 4 and w.is_floating_point()]
    if not weights and not runs:
        return [], {}, "returns no weights"
    if not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(plain, eager, strict=False)
    ):
        return [], {}, "with eager attention, which returns weights, it computes something else"
    found = [_mean_entropies(own) for own in weights if not bool(own.isnan().any())]
    by_module = {
        name: [_mean_entropies(own) for own in several if not bool(own.isnan().any())] for name, several in runs.items()
    }
    return (
        found,
        by_module,
        "" if len(found) == len(weights) else "some of what it returns as weights is something else",
    )


def _is_distribution(weights: Any) -> bool:
    return bool(((weights >= 0) & (weights.sum(-1, keepdim=True) < 1 + 1e-3)).all())


def _mean_entropies(weights: Any) -> list[float]:
    """By head, of weights [sequence, head, query, key]."""
    import torch

    if not _is_distribution(weights):
        weights = weights.softmax(-1)  # ProphetNet returns logits
    rows = weights / weights.sum(-1, keepdim=True)  # a sink leaves a row short of one
    entropies: list[float] = (-torch.xlogy(rows, rows).sum(-1)).nanmean((0, 2)).tolist()
    return entropies


def _attentions(output: Any, wanted: bool = False) -> Any:
    """The tensors in whatever a model's output calls attentions."""
    import torch

    if isinstance(output, torch.Tensor):
        if wanted:
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            yield from _attentions(value, wanted or "attention" in str(name))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _attentions(value, wanted)


# The pool -------------------------------------------------------------------------------------------------------------
def work() -> None:
    """A worker: types in on stdin, one JSON line each out. Models print; their prints must not meet the protocol."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch
    import transformers

    from studies.tiny import one_line

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                row = swept(line.strip())
            except Exception as error:
                row = {"type": line.strip(), "built": False, "reason": one_line(error)}
        row["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(row), file=out, flush=True)


class _Worker:
    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "studies.families", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        self.answers = self.process.stdout
        self.kind = ""
        self.since = time.monotonic()

    def give(self, kind: str) -> None:
        self.kind, self.since = kind, time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def sweep(kinds: list[str], workers: int = WORKERS, kept: Path | None = None) -> list[dict[str, Any]]:
    """All types over a few workers; a type that hangs or takes its worker down costs that worker, not the sweep. Rows are added to
    the file `kept` as they come, and those that are in it are not swept again."""
    rows: list[dict[str, Any]] = []
    if kept is not None and kept.exists():
        rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    known = {row["type"] for row in rows}
    waiting = [kind for kind in reversed(kinds) if kind not in known]
    selector = selectors.DefaultSelector()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        _progress(row, len(rows), len(kinds))

    def start() -> None:
        worker = _Worker()
        selector.register(worker.answers, selectors.EVENT_READ, worker)

    def replace(worker: _Worker, reason: str) -> None:
        selector.unregister(worker.answers)
        worker.end()
        if worker.kind:
            add({"type": worker.kind, "built": False, "crash": True, "reason": reason})
        if waiting:
            start()

    for _ in range(min(workers, len(waiting))):
        start()
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            worker: _Worker = key.data
            line = worker.answers.readline()
            if not line:
                replace(worker, "the process died (out of memory, or a crash in native code)")
                continue
            if line.strip() != "ready":
                add(json.loads(line))
            if waiting:
                worker.give(waiting.pop())
            else:
                worker.kind = ""
                selector.unregister(worker.answers)
                worker.end()
        for key in list(selector.get_map().values()):
            worker = key.data
            if time.monotonic() - worker.since > (SECONDS_A_TYPE if worker.kind else SECONDS_A_START):
                replace(worker, f"more than {SECONDS_A_TYPE} seconds")
    return sorted(rows, key=lambda row: row["type"])


def _progress(row: dict[str, Any], done: int, of: int) -> None:
    if sys.stderr.isatty() or done % 25 == 0 or done == of:
        print(f"{done}/{of} {row['type']}", file=sys.stderr)


# The table ------------------------------------------------------------------------------------------------------------
def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    attending = [r for r in rows if r.get("attention_calls")]
    return {
        "types": len(rows),
        "built and run": sum(r["built"] for r in rows),
        "with attention": len(attending),
        "proved": sum(bool(r.get("proved")) for r in attending),
        "capture bit-identical": sum(r.get("capture") is True for r in attending),
        "entropy compared": sum(bool(_counted(r, "equal") or _counted(r, "unequal")) for r in attending),
        "all equal": sum(bool(_counted(r, "equal") and not _counted(r, "unequal")) for r in attending),
    }


def _counted(row: dict[str, Any], what: str) -> int:
    return int(row.get("entropy", {}).get(what, 0))


def _entropy_cell(row: dict[str, Any]) -> str:
    """How many sublayers have the model's own entropies, of those compared; why the others were not."""
    equal, unequal, null = (_counted(row, what) for what in ("equal", "unequal", "null"))
    reason = row.get("entropy", {}).get("reason", "")
    if not equal + unequal:
        return reason
    said = f"{equal} of {equal + unequal}" + (f", {null} null" if null else "")
    return said + (f": {reason}" if reason else "")


def table(rows: list[dict[str, Any]]) -> str:
    import torch
    import transformers

    counts = summary(rows)
    lines = [
        "# Which model types are read and proved",
        "",
        f"This page is written by `make families`, with transformers {transformers.__version__} and torch {torch.__version__}.",
        "",
        "Every model type of transformers is built small from its config and given the inputs that its forward asks for. Then",
        "its parts are read and proved, and a capture is run. *Attention calls* are the calls that belong to a proved block, of",
        "all calls in one forward pass. *Placement* says where the norms stand. *Bit-identical* means that the output under",
        "capture is the output without it, in every bit. *Entropy* says for how many attention sublayers the mean entropy of every",
        "head is that of the weights the model itself returns, within 1e-3 nats. A type that could not be built or run here is not",
        "a refusal: nothing is known about it. A dash means that the model makes no attention calls.",
        "",
        "| " + " | ".join(counts) + " |",
        "|" + "---|" * len(counts),
        "| " + " | ".join(str(v) for v in counts.values()) + " |",
        "",
        "| type | class | built | attention calls | blocks | placement | parts | proved | capture | entropy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        calls = r.get("attention_calls")
        attention = "" if calls is None else str(calls) if not r.get("proved") else f"{r['covered']} of {calls}"
        proved = "" if not r["built"] else "yes" if r.get("proved") else f"no: {r['reason']}" if calls else "–"
        capture = {True: "bit-identical", False: f"no: {r.get('capture_reason')}", None: ""}[r.get("capture")]
        cells = [
            r["type"],
            r.get("class", ""),
            "yes" if r["built"] else f"no: {r['reason']}",
            attention,
            str(r.get("blocks", "")),
            r.get("placement", ""),
            r.get("parts", ""),
            proved,
            capture,
            _entropy_cell(r),
        ]
        lines.append("| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="TYPE", help="sweep these types in this process, and say everything"
    )
    parser.add_argument("--out", type=Path, help="where to write the table (Markdown)")
    parser.add_argument("--json", type=Path, help="where to keep the raw rows, a line each: goes on where it stopped")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes at a time, one thread each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.only:
        for kind in options.only:
            print(json.dumps(swept(kind), indent=1).replace("\\n", "\n"))
        return
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    rows = sweep(list(MODEL_MAPPING_NAMES), options.workers, options.json)
    if options.out:
        options.out.write_text(table(rows), encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
