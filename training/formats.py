"""A model's files, as PyLate 1.6 (ColBERT) or sentence-transformers (dense) write them; reads sentence-transformers 6' too."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.backbones import trained_length
from training.files import read_json, write_json
from training.head import Layer, load_layer, save_layer
from training.tokens import token_ids

if TYPE_CHECKING:
    from training.model import Encoder


def save(encoder: Encoder, folder: str | Path, card: str = "") -> None:
    """Write a folder that PyLate (with a head) or sentence-transformers loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.backbone.save_pretrained(folder)
    reading, dense = encoder.reading, encoder.head is None
    pad, encoder.tokenizer.pad_token = (
        encoder.tokenizer.pad_token,
        (encoder.tokenizer.pad_token if dense or not encoder.tokenizer.mask_token else encoder.tokenizer.mask_token),
    )
    encoder.tokenizer.save_pretrained(folder)
    encoder.tokenizer.pad_token = pad
    modules = [("", "sentence_transformers.models.Transformer")]
    longest = max(reading.query_length, reading.document_length)
    longest = longest if dense else max(longest, trained_length(encoder.backbone))
    facts: dict[str, Any] = {"__version__": versions(), "default_prompt_name": None}
    if dense:
        modules += [("1_Pooling", "sentence_transformers.models.Pooling")]
        modules += [("2_Normalize", "sentence_transformers.models.Normalize")]
        pooling = {"word_embedding_dimension": encoder.dimension, "pooling_mode_mean_tokens": True}
        write_json(folder / "1_Pooling" / "config.json", pooling)
        (folder / "2_Normalize").mkdir(exist_ok=True)
        facts |= {"prompts": {"query": reading.query_prefix, "document": reading.document_prefix}}
        facts |= {"similarity_fn_name": "cosine", "query_length": reading.query_length}
        facts |= {"document_length": reading.document_length}
    else:
        for prefix in filter(None, (reading.query_prefix, reading.document_prefix)):
            if (
                token_ids(encoder.tokenizer, [prefix])
                != encoder.tokenizer(prefix, add_special_tokens=False)["input_ids"]
            ):
                raise ValueError(f"PyLate's format needs the prefix {prefix!r} to be one token of the tokenizer")
        assert encoder.head is not None
        for number, layer in enumerate(encoder.head, start=1):
            modules += [(f"{number}_Dense", "pylate.models.Dense.Dense")]
            save_layer(layer, folder / f"{number}_Dense")
        facts |= {"model_type": "ColBERT", "prompts": {}, "similarity_fn_name": "MaxSim"}
        facts |= {"query_prefix": reading.query_prefix, "document_prefix": reading.document_prefix}
        facts |= {"query_length": reading.query_length, "document_length": reading.document_length}
        facts |= {"attend_to_expansion_tokens": reading.attend_to_expansion}
        facts |= {"skiplist_words": list(reading.skiplist), "do_query_expansion": reading.query_expansion}
    listed = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules)]
    write_json(folder / "modules.json", listed)
    write_json(folder / "config_sentence_transformers.json", facts)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    (folder / "README.md").write_text(card or model_card(encoder), encoding="utf-8")


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], list[Layer]]:
    """What sentence-transformers' files say, under PyLate's names, and the layers of the head; nothing for a bare encoder."""
    if folder == Path() or not (folder / "modules.json").exists():
        return {}, []
    facts = read_json(folder / "config_sentence_transformers.json")
    layers: list[Layer] = []
    multi_vector = facts.get("model_type") in ("ColBERT", "MultiVectorEncoder")
    for module in read_json(folder / "modules.json"):
        kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Dense" and multi_vector:
            layers.append(load_layer(path))
        elif kind == "MultiVectorMask":
            skipped = read_json(path / "config.json")
            facts["skiplist_words"] = skipped.get("skiplist_words") or []
            if skipped.get("skiplist_tasks", ["document"]) != ["document"] or skipped.get("keep_only_token_ids"):
                raise ValueError(f"{path}: only a skiplist for documents is supported")
        elif kind not in ("Transformer", "Normalize", "Pooling"):
            raise ValueError(f"{folder}: a module {module['type']} is not supported")
    if facts.get("model_type") == "ColBERT":
        facts = {"do_query_expansion": True, "skiplist_words": list(string.punctuation), **facts}
        if any((facts.get("prompts") or {}).values()):
            raise ValueError(f"{folder}: prompts besides PyLate's prefixes are not supported")
    else:
        prompts = facts.get("prompts") or {}
        facts["query_prefix"], facts["document_prefix"] = prompts.get("query") or "", prompts.get("document") or ""
    if facts.get("model_type") == "MultiVectorEncoder":
        own = read_json(folder / "sentence_bert_config.json")
        expansion = own.get("query_expansion")
        if expansion and (expansion.get("strategy") != "fixed" or expansion.get("token")):
            raise ValueError(f"{folder}: query_expansion {expansion} is not supported")
        facts["do_query_expansion"] = expansion is not None
        facts["attend_to_expansion_tokens"] = bool(expansion and expansion["attend"])
        lengths = {"query_length": expansion["length"] if expansion else own.get("query_length")}
        lengths["document_length"] = own.get("document_length") or own.get("max_seq_length")
        facts |= {name: length for name, length in lengths.items() if length}
    return facts, layers


def model_card(encoder: Encoder, text: str = "") -> str:
    dense = encoder.head is None
    reading = encoder.reading
    tags = ["sentence-transformers", "feature-extraction"] if dense else ["ColBERT", "PyLate", "sentence-transformers"]
    kind = "one vector a text (mean pooling)" if dense else "one vector a token, scored by MaxSim (ColBERT)"
    loads = (
        f"SentenceTransformer('...')` of sentence-transformers: {encoder.dimension} dimensions"
        if dense
        else "models.ColBERT('...')` of PyLate, or `MultiVectorEncoder('...')` of sentence-transformers 6"
    )
    lines = ["---", "tags:", *(f"- {tag}" for tag in tags)]
    lines += ["pipeline_tag: sentence-similarity", f"library_name: {'sentence-transformers' if dense else 'PyLate'}"]
    if encoder.base and not Path(encoder.base).is_absolute() and ":" not in encoder.base and "/" in encoder.base:
        lines += [f"base_model: {encoder.base}"] if not Path(encoder.base).exists() else []
    lines += ["---", "", "# Model", "", f"A text encoder with {kind}. Load it with `{loads}.", ""]
    lines += [f"- dimensions: {encoder.dimension}", f"- query length: {reading.query_length} tokens"]
    lines += [f"- document length: {reading.document_length} tokens"]
    lines += [f"- prefixes: {reading.query_prefix!r}, {reading.document_prefix!r}"]
    if not dense:
        lines += [f"- query expansion: {'yes' if reading.query_expansion else 'no'}"]
        lines += [f"- document tokens without a vector: {' '.join(reading.skiplist) or 'none'}"]
    lines += [f"- parameters: {sum(p.numel() for p in encoder.parameters()):,}", "", text]
    return "\n".join(lines).rstrip() + "\n"


def versions() -> dict[str, str]:
    import transformers

    # Older loaders compare the major version of sentence-transformers with their own; 5 is what PyLate 1.6 writes.
    found = {"sentence_transformers": "5.3.0", "transformers": transformers.__version__}
    return found | {"pytorch": torch.__version__}
