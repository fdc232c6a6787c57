"""A text encoder with one vector a token (ColBERT) or one a text (mean pooling), and its files.

Saved in the format of PyLate 1.6 (ColBERT) or of sentence-transformers (dense); sentence-transformers 6 reads both. Loads
those, its own `MultiVectorEncoder` format, and any encoder of transformers. Needs torch and transformers alone.
"""

from __future__ import annotations

import importlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, ModernBertConfig

from training import config as settings
from training.frozen import Frozen

Features = dict[str, Tensor]

TEXTS_A_PIECE = 16

# The Ettin encoders: hidden, intermediate, layers, heads. Random weights in these shapes have 16,797,440 and 31,883,136
# parameters.
ETTIN = {"ettin-17m": (256, 384, 7, 4), "ettin-32m": (384, 576, 10, 6)}
HUB = {name: f"jhu-clsp/{name.replace('-', '-encoder-')}" for name in ETTIN}


@dataclass
class Reading:
    """How texts become tokens. Lengths count special tokens and the prefix."""

    query_prefix: str
    document_prefix: str
    query_length: int
    document_length: int
    query_expansion: bool = False
    attend_to_expansion: bool = False
    skiplist: tuple[str, ...] = ()


class Layer(nn.Module):
    """`activation(W x + b)`, with a residual x (or R x, where the sizes differ)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation
        self.has_residual = residual
        self.residual = nn.Linear(inputs, outputs, bias=False) if residual and inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.linear(x))
        if self.has_residual:
            y = y + (x if self.residual is None else self.residual(x))
        return y


class Encoder(nn.Module):
    """`forward` takes what `tokenize` makes, and returns unit vectors: `[n, L, d]` with a head, else `[n, 1, hidden]`."""

    backbone: Any
    tokenizer: Any
    head: Any

    def __init__(
        self, backbone: nn.Module, tokenizer: Any, reading: Reading, head: nn.Sequential | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.reading, self.head = backbone, tokenizer, reading, head
        # Nothing here uses a pooler; frozen, it stays in the file, and data parallelism does not wait for its gradient.
        for name, parameter in backbone.named_parameters():
            if name.startswith("pooler."):
                parameter.requires_grad_(False)
        self.base = ""
        self.frozen: Frozen | None = None
        self._resolve()

    def _resolve(self) -> None:
        """What tokenisation needs, looked up once."""
        self.skipped = torch.tensor(sorted(set(token_ids(self.tokenizer, self.reading.skiplist))), dtype=torch.long)
        self.prefix_ids = {
            is_query: self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
            for is_query, prefix in ((True, self.reading.query_prefix), (False, self.reading.document_prefix))
        }

    @property
    def dimension(self) -> int:
        return int(self.backbone.config.hidden_size if self.head is None else self.head[-1].linear.out_features)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.training and input_ids.device.type == "cpu":
            return self._in_pieces(input_ids, attention_mask)
        return self._encode(input_ids, attention_mask)

    def _in_pieces(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts of like length together: a CPU gains nothing from more rows, and loses what it spends on padding."""
        lengths = attention_mask.sum(1)
        found: list[Tensor] = [input_ids] * len(input_ids)
        for rows in lengths.argsort(stable=True).split(TEXTS_A_PIECE):
            # Expansion tokens that nobody attends to stand behind the others, and have vectors.
            longest = input_ids.shape[1] if self.reading.query_expansion else int(lengths[rows].max())
            vectors = self._encode(input_ids[rows, :longest], attention_mask[rows, :longest])
            missing = (input_ids.shape[1] if self.head is not None else 1) - vectors.shape[1]
            for row, own in zip(rows.tolist(), nn.functional.pad(vectors, (0, 0, 0, missing)), strict=True):
                found[row] = own
        return torch.stack(found)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[n, L, hidden]`: what the backbone makes of the tokens."""
        if self.frozen is not None:
            return self.frozen(input_ids, attention_mask)
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.states(input_ids, attention_mask)
        if self.head is None:
            weight = attention_mask[..., None].to(hidden.dtype)
            hidden = ((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9))[:, None]
        else:
            hidden = self.head(hidden)
        return nn.functional.normalize(hidden, dim=-1)

    def tokenize(self, texts: Sequence[str], is_query: bool, prompt: str | None = None) -> Features:
        """`input_ids`, `attention_mask` and `score_mask` `[n, L]`: the tokens that get a vector.

        prompt: text before each; None: a dense model's own.
        """
        reading = self.reading
        length = reading.query_length if is_query else reading.document_length
        dense = self.head is None
        if prompt is None:
            prompt = (reading.query_prefix if is_query else reading.document_prefix) if dense else ""
        prefix = [] if dense else self.prefix_ids[is_query]
        lists = self.tokenizer(
            [prompt + text for text in texts],
            truncation=True,
            max_length=length - len(prefix),
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # After the first token, as PyLate does.
        rows = [ids[:1] + prefix + ids[1:] for ids in lists]
        expand = is_query and not dense and reading.query_expansion
        longest = length if expand else max(map(len, rows), default=0)
        filler = self.tokenizer.pad_token_id if dense else expansion_id(self.tokenizer)
        input_ids = torch.full((len(rows), longest), filler, dtype=torch.long)
        for row, ids in zip(input_ids, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        real = torch.arange(longest) < torch.tensor([len(ids) for ids in rows])[:, None]
        attended = torch.ones_like(real) if expand and reading.attend_to_expansion else real
        if is_query:
            scored = torch.ones_like(real) if expand else real
        else:
            scored = real & ~torch.isin(input_ids, self.skipped) if not dense else real
        return {"input_ids": input_ids, "attention_mask": attended.long(), "score_mask": scored}

    def freeze(self, layers: int, folder: Path | None = None) -> None:
        """Train the head and what is above the first `layers` layers alone; `folder` keeps the states below between runs."""
        if self.reading.query_expansion and not self.reading.attend_to_expansion:
            raise settings.ConfigError("model.freeze: with model.query_expansion it wants model.attend_to_expansion")
        self.frozen = Frozen(self.backbone, layers, folder)

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for module in self.frozen.modules if self.frozen else ():
            module.eval()
        return self

    @torch.no_grad()
    def start_at(self, directions: Tensor) -> None:
        """Make the head the projection on `directions [hidden, dimension]`, whatever its depth, for training to go on from."""
        if self.head is None or any(not layer.has_residual for layer in self.head[:-1]):
            raise ValueError("a head that starts at a projection needs a residual in every layer but the last")
        for layer in self.head:
            nn.init.zeros_(layer.linear.weight)
            if layer.linear.bias is not None:
                nn.init.zeros_(layer.linear.bias)
            if layer.residual is not None:
                nn.init.eye_(layer.residual.weight)
        last = self.head[-1]
        if last.has_residual and last.residual is None:
            raise ValueError("the last layer of the head is square: its residual leaves no place for a projection")
        matrix = (last.residual or last.linear).weight
        matrix.zero_()
        matrix[:, : len(directions)] = directions.T.to(matrix.dtype)

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write a folder that PyLate (with a head) or sentence-transformers loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder)
        reading, dense = self.reading, self.head is None
        pad, self.tokenizer.pad_token = (
            self.tokenizer.pad_token,
            (self.tokenizer.pad_token if dense or not self.tokenizer.mask_token else self.tokenizer.mask_token),
        )
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.pad_token = pad
        modules = [("", "sentence_transformers.models.Transformer")]
        longest = max(reading.query_length, reading.document_length) if dense else longest_text(self.backbone)
        facts: dict[str, Any] = {"__version__": versions(), "default_prompt_name": None}
        if dense:
            modules += [("1_Pooling", "sentence_transformers.models.Pooling")]
            modules += [("2_Normalize", "sentence_transformers.models.Normalize")]
            pooling = {"word_embedding_dimension": self.dimension, "pooling_mode_mean_tokens": True}
            write_json(folder / "1_Pooling" / "config.json", pooling)
            (folder / "2_Normalize").mkdir(exist_ok=True)
            facts |= {"prompts": {"query": reading.query_prefix, "document": reading.document_prefix}}
            facts |= {"similarity_fn_name": "cosine", "query_length": reading.query_length}
            facts |= {"document_length": reading.document_length}
        else:
            for prefix in filter(None, (reading.query_prefix, reading.document_prefix)):
                if token_ids(self.tokenizer, [prefix]) != self.tokenizer(prefix, add_special_tokens=False)["input_ids"]:
                    raise ValueError(f"PyLate's format needs the prefix {prefix!r} to be one token of the tokenizer")
            assert self.head is not None
            for number, layer in enumerate(self.head, start=1):
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
        (folder / "README.md").write_text(card or model_card(self), encoding="utf-8")


def create(wanted: settings.Model, stage: str) -> Encoder:
    """The model of a configuration: a checkpoint, or a new one around a backbone, or random weights."""
    folder, backbone, tokenizer = load_backbone(wanted)
    saved, layers = read_checkpoint(folder)
    dense = stage != "colbert"
    head = None
    if not dense:
        if wanted.head is not None or not layers:
            head = build_head(wanted.head or settings.Head(), backbone.config.hidden_size, wanted.dimension)
        else:
            head = nn.Sequential(*layers)

    def choose(name: str, key: str, otherwise: Any) -> Any:
        given = getattr(wanted, name)
        return given if given is not None else saved.get(key, otherwise)

    # Prompts of a dense model are no prefixes of a ColBERT, nor is its reading length.
    saved = saved if dense == ("skiplist_words" not in saved) else {}
    skiplist = choose("skiplist", "skiplist_words", list(string.punctuation))
    if "skiplist_words" not in saved or wanted.skiplist is not None:
        # A word that is no token would stand for all unknown words.
        skiplist = [word for word in skiplist if token_ids(tokenizer, [word]) != [tokenizer.unk_token_id]]
    reading = Reading(
        query_prefix=choose("query_prefix", "query_prefix", "" if dense else "[Q] "),
        document_prefix=choose("document_prefix", "document_prefix", "" if dense else "[D] "),
        query_length=choose("query_length", "query_length", 64 if dense else 32),
        document_length=choose("document_length", "document_length", 128 if dense else 180),
        query_expansion=not dense and choose("query_expansion", "do_query_expansion", False),
        attend_to_expansion=not dense and choose("attend_to_expansion", "attend_to_expansion_tokens", False),
        skiplist=() if dense else tuple(skiplist),
    )
    longest = longest_text(backbone)
    for name in ("query_length", "document_length"):
        if not 4 <= getattr(reading, name) <= longest:
            raise settings.ConfigError(
                f"model.{name} is {getattr(reading, name)}; this encoder reads 4 to {longest} tokens"
            )
    if wanted.lowercase:
        lowercase(tokenizer)
    if not dense:
        add_prefixes(tokenizer, backbone, [reading.query_prefix, reading.document_prefix])
    encoder = Encoder(backbone, tokenizer, reading, head)
    encoder.base = HUB.get(wanted.base, wanted.base)
    if wanted.freeze:
        encoder.freeze(wanted.freeze, Path(wanted.states) if wanted.states else None)
    return encoder


def load(folder: str | Path) -> Encoder:
    """A ColBERT in PyLate's or sentence-transformers' format, or a dense encoder with mean pooling."""
    _, layers = read_checkpoint(Path(folder))
    return create(settings.Model(base=str(folder)), "colbert" if layers else "contrastive").eval()


def load_backbone(wanted: settings.Model) -> tuple[Path, Any, Any]:
    base = wanted.base
    if base.startswith("package:"):
        try:
            base = str(importlib.import_module(base.removeprefix("package:")).get_model_path())
        except ImportError as error:
            raise settings.ConfigError(f"model.base is {wanted.base!r}: {error}") from None
    if base in ETTIN and not wanted.random:
        base = HUB[base]
    try:
        if wanted.random and base in ETTIN:
            backbone = AutoModel.from_config(ettin(base))
        elif wanted.random:
            backbone = AutoModel.from_config(AutoConfig.from_pretrained(base))
        else:
            backbone = AutoModel.from_pretrained(base, dtype=torch.float32)
        source = wanted.tokenizer or HUB.get(base, base)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        place = "is no such folder, and" if "/" in base or base.startswith(".") else "cannot be read:"
        raise settings.ConfigError(f"model.base {wanted.base!r} {place} {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise settings.ConfigError(f"model.tokenizer: {source} has no fast tokenizer")
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer))
    return (Path() if wanted.random else local_folder(base)), backbone, tokenizer


def local_folder(base: str) -> Path:
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, allow_patterns=["*.json", "*Dense/*", "*Mask/*"]))


def ettin(name: str) -> ModernBertConfig:
    hidden, intermediate, layers, heads = ETTIN[name]
    return ModernBertConfig(
        vocab_size=50368,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=7999,
        local_attention=128,
        global_attn_every_n_layers=3,
        hidden_activation="gelu",
        norm_eps=1e-5,
        norm_bias=False,
        attention_bias=False,
        mlp_bias=False,
        global_rope_theta=160000.0,
        local_rope_theta=160000.0,
        bos_token_id=50281,
        eos_token_id=50282,
        cls_token_id=50281,
        sep_token_id=50282,
        pad_token_id=50283,
    )


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


def build_head(head: settings.Head, hidden: int, dimension: int) -> nn.Sequential:
    widths = head.widths or [2 * hidden, dimension]
    if widths[-1] != dimension:
        raise settings.ConfigError(f"model.head.widths ends with {widths[-1]}, but model.dimension is {dimension}")
    residual = head.residual if isinstance(head.residual, list) else [head.residual] * len(widths)
    if len(residual) != len(widths):
        raise settings.ConfigError(f"model.head.residual has {len(residual)} entries; want {len(widths)}, one a layer")
    last = len(widths) - 1
    sizes = zip([hidden, *widths], widths, residual, strict=False)
    return nn.Sequential(
        *(
            Layer(inputs, outputs, head.bias, activation("Identity" if n == last else head.activation), skip)
            for n, (inputs, outputs, skip) in enumerate(sizes)
        )
    )


def activation(name: str) -> nn.Module:
    found = getattr(nn, name.rsplit(".", 1)[-1], None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise settings.ConfigError(f"model.head.activation is {name!r}; want a class of torch.nn, such as SiLU")
    return found()


def save_layer(layer: Layer, folder: Path) -> None:
    kind = type(layer.activation)
    facts = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__name__}",
        "use_residual": layer.has_residual,
    }
    write_json(folder / "config.json", facts)
    weights = {name: tensor.contiguous().cpu() for name, tensor in layer.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_layer(folder: Path) -> Layer:
    facts = read_json(folder / "config.json")
    function = activation(facts.get("activation_function", "Tanh"))
    sizes = facts["in_features"], facts["out_features"]
    layer = Layer(*sizes, facts.get("bias", True), function, facts.get("use_residual", False))
    layer.load_state_dict(load_file(folder / "model.safetensors"))
    return layer.float()


def add_prefixes(tokenizer: Any, backbone: Any, prefixes: Sequence[str]) -> None:
    """Make each prefix one token, which neither lower-casing nor the text after it can break up."""
    from tokenizers import AddedToken

    missing = [prefix for prefix in prefixes if prefix and tokenizer.tokenize(prefix) != [prefix]]
    if missing:
        tokenizer.add_tokens(
            [AddedToken(each, normalized=False, special=True) for each in missing], special_tokens=True
        )
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng():
            # Whatever the seed of a run: frozen layers then make the same of a text in each.
            torch.manual_seed(0)
            backbone.resize_token_embeddings(len(tokenizer))


def lowercase(tokenizer: Any) -> None:
    """In the tokenizer's own file, so that whoever loads it lower-cases too."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    if isinstance(own, normalizers.BertNormalizer):
        own.lowercase = True
    if backend.normalizer is None or backend.normalizer.normalize_str("A") != "a":
        backend.normalizer = normalizers.Sequence([*([] if own is None else [own]), normalizers.Lowercase()])


def longest_text(backbone: Any) -> int:
    return int(getattr(backbone.config, "max_position_embeddings", 0)) or 1 << 30


def token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(list(words)))


def expansion_id(tokenizer: Any) -> int:
    """What queries are filled up with: [MASK], else the end of a text, else padding; as in PyLate."""
    for token in (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither [MASK] nor padding")


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


def read_json(path: Path) -> Any:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
