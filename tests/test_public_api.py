"""The public names and signatures are a contract: a rename, a moved default or a new positional argument fails here."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import edgecolbert_kernels as ek

NAMES = {
    "BackendUnsupported",
    "GradCache",
    "MaxSimScorer",
    "PackedEmbeddings",
    "PackedFormatError",
    "PackedLocked",
    "PackedWriter",
    "__version__",
    "backend",
    "colbert_kd_scores",
    "colbert_scores",
    "colbert_scores_pairwise",
    "contrastive_loss",
    "distillation_loss",
    "gather_with_gradient",
    "maxsim",
    "maxsim_indexed",
    "maxsim_pairs",
    "maxsim_st",
    "maxsim_varlen",
    "pack",
    "search",
}
OPTIONS = {"normalize": False, "mask_mode": "exclude", "precision": "exact", "out_dtype": (None, torch.float32)}
POSITIONAL = {
    "maxsim": ["Q", "D", "q_mask", "d_mask"],
    "maxsim_pairs": ["Q", "D", "q_mask", "d_mask"],
    "maxsim_varlen": ["Q", "D", "cu_seqlens_q", "cu_seqlens_d", "q_mask", "d_mask"],
    "maxsim_indexed": ["Q", "D", "query_index", "document_index", "q_mask", "d_mask"],
}


def test_names():
    assert set(ek.__all__) == NAMES
    assert all(hasattr(ek, name) for name in NAMES)
    assert set(dir(ek)) >= NAMES


@pytest.mark.parametrize("name", POSITIONAL)
def test_signature(name):
    parameters = inspect.signature(getattr(ek, name)).parameters
    assert [p for p in parameters if parameters[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == POSITIONAL[name]
    assert [p for p in parameters if parameters[p].kind is inspect.Parameter.KEYWORD_ONLY] == list(OPTIONS)
    assert parameters["q_mask"].default is None
    assert parameters["d_mask"].default is None
    for option, default in OPTIONS.items():
        assert parameters[option].default in (default if isinstance(default, tuple) else (default,)), option


def test_gradcache_signature():
    parameters = inspect.signature(ek.GradCache).parameters
    options = [p for p in parameters if parameters[p].kind is inspect.Parameter.KEYWORD_ONLY]
    assert [p for p in parameters if p not in options] == ["encode", "loss_fn", "mini_batch_size"]
    assert options == ["memory_budget", "scaler", "models", "show_progress_bar"]
    assert list(inspect.signature(ek.gather_with_gradient).parameters) == ["embeddings", "mask", "group"]


# Positional names, a star before the keyword-only ones, a question mark after what has a default.
OTHERS = {
    "pack": "hidden mask? weight? bias? * normalize? dtype? device?",
    "search": "Q documents k * q_mask? precision? candidates? filter? ids?",
    "PackedWriter": "folder * dim? dtype?",
    "PackedWriter.append": "self documents ids?",
    "PackedWriter.remove": "self indices? * ids?",
    "PackedWriter.upsert": "self documents ids?",
    "PackedWriter.compact": "self",
    "PackedWriter.close": "self",
    "PackedEmbeddings.from_list": "documents ids? * dtype? dim?",
    "PackedEmbeddings.from_padded": "X mask? ids? * dtype?",
    "PackedEmbeddings.from_arrays": "tokens offsets scales? ids?",
    "PackedEmbeddings.empty": "dim dtype?",
    "PackedEmbeddings.concatenate": "parts",
    "PackedEmbeddings.append": "self documents ids?",
    "PackedEmbeddings.with_ids": "self ids",
    "PackedEmbeddings.remove": "self indices? * ids?",
    "PackedEmbeddings.to": "self dtype",
    "PackedEmbeddings.position": "self name",
    "PackedEmbeddings.save": "self folder * overwrite?",
    "PackedEmbeddings.load": "folder * mmap? verify?",
    "PackedEmbeddings.verify": "folder",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_signatures(name):
    owner, _, method = name.partition(".")
    parameters = inspect.signature(getattr(getattr(ek, owner), method) if method else getattr(ek, owner)).parameters
    found, starred = [], False
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            starred = True
            found.append("*")
        found.append(parameter.name + ("" if parameter.default is inspect.Parameter.empty else "?"))
    assert " ".join(found) == OTHERS[name]


def test_the_hosts_signatures():
    """Of the functions that stand in for PyLate's and sentence-transformers'; tested against theirs where they are."""
    scores = ["queries_embeddings", "documents_embeddings", "queries_mask", "documents_mask", "backend"]
    wanted = {
        "colbert_scores": [*scores, "mask_mode"],
        "colbert_kd_scores": [*scores, "mask_mode"],
        "colbert_scores_pairwise": [*scores[:2], "backend"],
        "maxsim_st": ["a", "b", "a_mask", "b_mask", "chunk_elements", "length_normalize", "device"],
    }
    for name, parameters in wanted.items():
        assert list(inspect.signature(getattr(ek, name)).parameters) == parameters


def test_errors_can_be_caught_as_what_they_are():
    assert issubclass(ek.PackedFormatError, ValueError)
    assert issubclass(ek.PackedLocked, RuntimeError)


@pytest.mark.parametrize("module", ["retrieval", "packing", "packed"])
def test_functions_are_not_hidden_by_modules(python, module):
    """Whatever is imported first, `search` and `pack` are functions."""
    python(f"""
import edgecolbert_kernels.{module}
import edgecolbert_kernels as ek
assert callable(ek.search) and callable(ek.pack)
from edgecolbert_kernels import *
assert search is ek.search and PackedEmbeddings is ek.PackedEmbeddings
try:
    ek.no_such_name
except AttributeError:
    pass
else:
    raise AssertionError
""")


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_docstring(name):
    """Shapes, dtypes and errors are said where a user looks."""
    text = inspect.getdoc(getattr(ek, name))
    assert text
    if name in POSITIONAL:
        for word in ("Lq", "Ld", "d]", "float16", "ValueError", "TypeError", "mask"):
            assert word in text or name != "maxsim", word
        assert re.search(r"\[[^\]]+\]", text), "no shape"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", ek.__version__)
    try:
        assert version("edgecolbert-kernels") == ek.__version__
    except PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")


def test_exception():
    assert issubclass(ek.BackendUnsupported, Exception)


def test_ops_are_registered():
    """Loaded models and exported programs look the ops up by these names."""
    ek.maxsim(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    for op in ("maxsim_forward", "maxsim_backward"):
        assert hasattr(torch.ops.edgecolbert, op)


def test_the_default_out_dtype_is_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert ek.maxsim(torch.ones(2, 3, 4, dtype=dtype), torch.ones(2, 3, 4, dtype=dtype)).dtype == torch.float32
