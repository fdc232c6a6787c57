"""Keeps encodings between runs, one file for each encoder and task."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from demo.corpus import Task
from demo.vectors import TokenVectors
from edgecolbert_kernels.cli.encoders import Encoder

FORMAT = 2  # to raise whenever the same texts would be encoded differently


def encode(task: Task, encoder: Encoder, folder: Path) -> tuple[TokenVectors, TokenVectors]:
    """Token vectors of the documents and of the queries, read from `folder` if they are there, else left there."""
    texts = [document.text for document in task.documents]
    identity = json.dumps([FORMAT, encoder.fingerprint, texts, task.queries])
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        return _load(path, encoder)
    except FileNotFoundError:
        pass
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({error}); encoding again.")

    with tqdm(total=len(texts), desc="Encoding documents", unit=" documents") as bar:
        encoder.fit(texts)
        documents = TokenVectors.from_texts(encoder.encode_documents(texts, bar.update))
    with tqdm(total=len(task.queries), desc="Encoding queries", unit=" queries") as bar:
        queries = TokenVectors.from_texts(encoder.encode_queries(task.queries, bar.update))
    arrays = {
        "document_values": documents.values,
        "document_offsets": documents.offsets,
        "query_values": queries.values,
        "query_offsets": queries.offsets,
        **{f"encoder_{name}": tensor for name, tensor in encoder.state().items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: a run that is stopped here leaves nothing that looks like an encoding.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in arrays.items()})
    unfinished.replace(path)
    return documents, queries


def _load(path: Path, encoder: Encoder) -> tuple[TokenVectors, TokenVectors]:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    encoder.load_state(
        {name.removeprefix("encoder_"): array for name, array in arrays.items() if name.startswith("encoder_")}
    )
    return (
        TokenVectors(arrays["document_values"], arrays["document_offsets"]),
        TokenVectors(arrays["query_values"], arrays["query_offsets"]),
    )
