"""Other packages on the same model and texts, each doing all that it does by itself, as ratios to the plain forward pass.

    make peers                        in an environment of its own; these packages are no part of the project's
    python -m bench.peers --only nnsight --threads 2

Each peer runs in a process of its own, between plain passes over the same length-sorted batches. The ratio is to their mean, of
processor time with one thread, of elapsed time with several `--threads`; the best of `--rounds` is reported. The model is the
packaged MiniLM, or GPT-2 small with random weights where a package takes only that kind. What a package does not batch is given
text by text, as its own documentation has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import uncollapse as uc
from bench.calls import gpt2, minilm
from bench.diagnose import plain
from uncollapse import sources

Action = Callable[[], object]
SEQUENCES, TOKENS = 64, 128


def attnspectra(model: Any, batches: Any) -> Action:
    import attnspectra
    import transformers

    eager = transformers.AutoModel.from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    adapter = attnspectra.HFTransformerAdapter(eager, None, device=torch.device("cpu"))

    def run() -> object:
        found = []
        for batch in batches:  # its captures hold one sequence
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                found.append(attnspectra.capture_and_compute(adapter, ids[mask.bool()][None]))
        return found

    adapter._decode_tokens = lambda ids: [str(i) for i in ids]
    return run


def nnsight(model: Any, batches: Any) -> Action:
    import nnsight

    traced = nnsight.NNsight(model)

    def run() -> object:
        found = []
        for batch in batches:
            with torch.no_grad(), traced.trace(**batch):
                kept = nnsight.save([block.output for block in traced.encoder.layer])
            for site in kept:
                hidden = site[0] if isinstance(site, tuple) else site
                hidden = hidden if hidden.ndim == 3 else hidden[None]
                found += [
                    torch.linalg.svdvals(x[real.bool()])
                    for x, real in zip(hidden, batch["attention_mask"], strict=True)
                ]
        return found

    return run


def transformer_lens(model: Any, batches: Any) -> Action:
    import transformers
    from transformer_lens.model_bridge.bridge import TransformerBridge

    head = transformers.GPT2LMHeadModel(model.config).eval()
    head.transformer.load_state_dict(model.state_dict())
    folder = tempfile.mkdtemp()
    head.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=head)

    def run() -> object:
        found = []
        for batch in batches:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(batch["input_ids"])
            for block in range(model.config.n_layer):
                pattern = cache[f"blocks.{block}.attn.hook_pattern"]
                found.append(torch.special.entr(pattern).sum(-1))
                found.append(torch.linalg.svdvals(cache[f"blocks.{block}.hook_out"]))
        return found

    return run


def spectral_trust(model: Any, batches: Any) -> Action:
    import spectral_trust as package

    loaded, folder = sources.load_model("demo"), tempfile.mkdtemp()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    options = {"save_plots": False, "save_intermediate": False, "verbose": False, "local_files_only": True}
    framework = package.GSPDiagnosticsFramework(
        package.GSPConfig(model_name=folder, max_length=TOKENS, device="cpu", output_dir=tempfile.mkdtemp(), **options)
    )
    framework.instrumenter.load_model(folder)
    texts = (sources.default_texts(64, 0) * 2)[:SEQUENCES]
    return lambda: [framework.analyze_text(text, save_results=False) for text in texts]


def weightwatcher(model: Any, batches: Any) -> Action:
    import weightwatcher

    return lambda: weightwatcher.WeightWatcher(model=model).analyze()


def representation_geometry(model: Any, batches: Any) -> Action:
    import representation_geometry

    return lambda: representation_geometry.analyze_model(model=model, dataloader=batches, max_tokens=None)


def ours(level: str) -> Callable[[Any, Any], Action]:
    def prepared(model: Any, batches: Any) -> Action:
        uc.diagnose(model, batches=batches, level=level)  # warm, as every other row is
        return lambda: uc.diagnose(model, batches=batches, level=level)

    return prepared


PEERS: dict[str, tuple[Callable[[Any, Any], Action], str, str]] = {
    "uncollapse": (ours("core"), "minilm", "clouds, rows, head weights, dead parts, corpus: all of level core"),
    "uncollapse full": (ours("full"), "minilm", "and spectra of patterns, norms, updates"),
    "attnspectra": (attnspectra, "minilm", "of attention: entropy, singular values, Gini, distance"),
    "nnsight": (nnsight, "minilm", "singular values of the clouds, written by hand"),
    "spectral-trust": (spectral_trust, "minilm", "spectra of the graph Laplacian of attention, energies of the clouds"),
    "weightwatcher": (weightwatcher, "minilm", "spectra of the weights alone; no text"),
    "uncollapse (GPT-2)": (ours("core"), "gpt2", "all of level core"),
    "transformer-lens": (transformer_lens, "gpt2", "entropy of patterns, singular values of the clouds, by hand"),
    "representation-geometry": (representation_geometry, "gpt2", "spectra of one covariance per site, over the corpus"),
}


def measured(name: str, rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    prepare, kind, computes = PEERS[name]
    model, batches = minilm(SEQUENCES, TOKENS, None) if kind == "minilm" else gpt2(16, TOKENS, None)
    action, ratios = prepare(model, batches), []
    plain(model, batches)
    for _ in range(rounds):
        took = []
        for step in (lambda: plain(model, batches), action, lambda: plain(model, batches)):
            start = clock()
            step()
            took.append(clock() - start)
        ratios.append(2 * took[1] / (took[0] + took[2]))
    return {"name": name, "model": kind, "ratio": round(min(ratios), 2), "computes": computes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.only:
        print("\n" + json.dumps(measured(given.only, given.rounds, given.threads)))
        return
    print("| package | model | passes | what it computes |\n|---|---|---|---|")
    for name in PEERS:
        command = [sys.executable, "-m", "bench.peers", "--only", name, "--rounds", str(given.rounds)]
        command += ["--threads", str(given.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["ended without a word"])[-1]
            print(f"| {name} | {PEERS[name][1]} | did not run | {last[:160]} |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {found['model']} | {found['ratio']} | {found['computes']} |", flush=True)


if __name__ == "__main__":
    main()
