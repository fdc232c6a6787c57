"""One optimiser step of every stage at the paper's shapes, and one document of 32k tokens: `python -m benchmarks.paper_shapes`.

Ettin 17M and 32M with random weights and their own tokenizer, the configurations of training/configs with the paper's batch
sizes (24,576 and 12,288 pairs through GradCache; 128 queries with 16 documents of 220 tokens), in fp32 on the CPU. Real texts
from $EDGECOLBERT_DATA (in stage 1 the shortest pairs there are). For time and memory it does not matter which documents are
negatives, or what a teacher says of them, so both are drawn at random. Each case runs in a process of its own; `peak_mib` is
the most memory it held, Python and torch included.

    python -m benchmarks.paper_shapes --size 17m --case 1 long      # in pieces; a case replaces its own row
    python -m benchmarks.paper_shapes --quick                       # every case with a hundredth of its batch
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import machine, suite
from benchmarks.memory import resident

SIZES = ("17m", "32m")
CASES = ("1", "2", "3", "4", "long")
CONFIGS = {"1": "ettin-1-contrastive", "2": "ettin-2-finetune", "3": "ettin-3-distill", "4": "ettin-4-colbert"}
PAIRS = {"17m": 24_576, "32m": 12_288}
LONG = 32_768
TOKENIZER = "models/modernbert-tokenizer"


def settings(size: str, case: str, folder: Path, quick: bool) -> Any:
    """The configuration of a stage with the paper's batch, over rows that stand in `folder`."""
    from training import config

    share = 100 if quick else 1
    batch = PAIRS[size] // share if case == "1" else 128 // min(share, 16)
    source = rows(case, batch, folder)
    own = [
        f"output={folder / 'run'}",
        f"model.base=ettin-{size}",
        "model.random=true",
        f"model.tokenizer={data() / TOKENIZER}",
        f"data.sources=[{source}]",
        f"train.batch={batch}",
        # The activations of so many texts are held at once: short ones in stage 1.
        f"train.mini_batch={512 if case == '1' else 32}",
        "train.precision=fp32",
        "train.steps=1",
    ]
    if size == "32m":
        own += {"1": ["optimizer.lr=5e-4"], "4": ["model.dimension=64", "model.head.widths=[768,768,64]"]}.get(case, [])
    os.environ.setdefault("EDGECOLBERT_DATA", str(data()))
    return config.load(Path("training/configs") / f"{CONFIGS[case]}.toml", own)


def rows(case: str, batch: int, folder: Path) -> str:
    """Writes the rows of a stage; the TOML of their source."""
    from training.beir import read_beir

    rng = np.random.default_rng(0)
    path = folder / "rows.jsonl"
    more = ""
    if case == "1":
        with gzip.open(data() / "pairs/wordnet.jsonl.gz", "rt", encoding="utf-8") as file:
            pairs = [json.loads(line) for line in file]
        records = sorted(pairs, key=lambda each: len(each["query"]) + len(each["pos"]))[:batch]
    else:
        task = read_beir(data() / "beir/scifact", "train")
        documents = list(task.documents.values())
        if case == "3":
            records = [{"text": text} for text in documents[:batch]]
            np.save(folder / "teacher.npy", rng.standard_normal((batch, 1024)).astype(np.float16))
            more = f', vectors = "{folder / "teacher.npy"}"'
        else:
            count = {"2": 7, "4": 15}[case]
            records = []
            for query, right in list(task.qrels.items())[:batch]:
                negatives = [documents[int(n)] for n in rng.integers(len(documents), size=count)]
                chosen = [task.documents[next(iter(right))], *negatives]
                records.append(
                    {"query": task.queries[query], "documents": chosen, "scores": sorted(rng.random(count + 1))[::-1]}
                )
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return f'{{path = "{path}"{more}}}'


def step(size: str, case: str, folder: Path, quick: bool) -> dict[str, Any]:
    """One step, from texts to changed parameters, as training.train takes it."""
    from accelerate import Accelerator

    from edgecolbert_kernels import GradCache
    from training import data as batches_of
    from training import model, optim, stages, train
    from training.score import vectors

    config = settings(size, case, folder, quick)
    train.seed_everything(0)
    encoder = model.create(config.model, config.stage)
    batches = batches_of.Batches(config, None)
    teacher = [vectors(config.data.sources[0], batches.rows[0], config.teacher)] if case == "3" else []
    stage = stages.build(config, encoder, teacher)
    batches.collate = stage.collate
    optimizers = optim.build(stage.model, config.optimizer)
    accelerator = Accelerator(cpu=True)
    stage.model.train()

    start, cpu = time.perf_counter(), time.process_time()
    batch = batches[0]
    read = time.perf_counter()
    texts = [len(each["input_ids"]) for each in batch["inputs"]]
    passes = 1 if stage.separable else 2
    with tqdm(total=passes * sum(texts), desc=f"{size}, stage {case}", unit="text", mininterval=1) as bar:
        encode = stage.encode

        def told(**features: torch.Tensor) -> Any:
            bar.update(len(features["input_ids"]))
            return encode(**features)

        stage.encode = told  # type: ignore[method-assign]
        cache = GradCache(told, stage.loss, config.train.mini_batch, models=[])
        loss = train.gradients(stage, batch, accelerator, config.train.mini_batch, cache)
    done = time.perf_counter()
    accelerator.clip_grad_norm_(stage.model.parameters(), config.optimizer.clip)
    for optimizer in optimizers:
        optimizer.step()
    end = time.perf_counter()
    return {
        "batch": config.train.batch,
        "texts": sum(texts),
        "tokens": int(sum(each["attention_mask"].sum() for each in batch["inputs"])),
        "mini_batch": config.train.mini_batch,
        "optimizer": config.optimizer.name,
        "loss": round(float(loss), 4),
        "seconds": round(end - start, 1),
        "tokenise_s": round(read - start, 1),
        "gradients_s": round(done - read, 1),
        "update_s": round(end - done, 2),
        "cpu_s": round(time.process_time() - cpu, 1),
    }


def long(size: str, folder: Path, quick: bool) -> dict[str, Any]:
    """A document of 32k tokens through the backbone in one piece, and a query scored against it."""
    from edgecolbert_kernels import maxsim
    from training import config, model

    length = LONG // 8 if quick else LONG
    dimension = 48 if size == "17m" else 64
    torch.manual_seed(0)
    encoder = model.create(
        config.Model(
            base=f"ettin-{size}",
            random=True,
            tokenizer=str(data() / TOKENIZER),
            dimension=dimension,
            document_length=length,
        ),
        "colbert",
    ).eval()
    with gzip.open(data() / "beir/covidqa_long/corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        text = " ".join(json.loads(line)["text"] for line in file)
    start, cpu = time.perf_counter(), time.process_time()
    document, query = encoder.tokenize([text], False), encoder.tokenize(["how is the virus transmitted"], True)
    with torch.inference_mode():
        D = encoder(document["input_ids"], document["attention_mask"])
        encoded = time.perf_counter()
        Q = encoder(query["input_ids"], query["attention_mask"])
        before = time.perf_counter()
        score = maxsim(Q, D.half(), query["score_mask"], document["score_mask"])
    end = time.perf_counter()
    return {
        "batch": 1,
        "texts": 1,
        "tokens": int(document["attention_mask"].sum()),
        "score": round(float(score), 4),
        "seconds": round(end - start, 1),
        "encode_s": round(encoded - start, 1),
        "score_ms": round((end - before) * 1e3, 2),
        "cpu_s": round(time.process_time() - cpu, 1),
    }


def data() -> Path:
    place = os.environ.get("EDGECOLBERT_DATA")
    if not place:
        raise SystemExit("EDGECOLBERT_DATA is not set: the folder with beir/, pairs/ and models/")
    return Path(place)


def measure(size: str, case: str, threads: int, quick: bool) -> dict[str, Any]:
    """In this process: nothing else may have run in it."""
    machine.set_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        found = long(size, Path(name), quick) if case == "long" else step(size, case, Path(name), quick)
    what = "32k document" if case == "long" else f"stage {case}"
    return {"case": f"{size}, {what}", "threads": threads, **found, "peak_mib": resident("VmHWM") // 2**20}


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| | batch | texts | tokens | seconds | CPU seconds | peak MiB |", "|---|---|---|---|---|---|---|"]
    for row in found:
        cells = (f"{row[name]:,}" for name in ("batch", "texts", "tokens", "seconds", "cpu_s", "peak_mib"))
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    return ((size, case) for size in options.size for case in options.case)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES, help="stages, or the long document")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a hundredth of the batch; nothing is written")
    parser.add_argument("--shared", action="store_true", help="say in the rows that others used the machine")
    parser.add_argument("--table", action="store_true", help="only print the rows there are")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = suite.RESULTS / "paper_shapes.jsonl"
    if options.here:
        print(json.dumps(measure(*next(chosen(options)), options.threads, options.quick)))
        return
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    cases = [] if options.table else list(chosen(options))
    for number, (size, case) in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {size}, {case}", flush=True)
        command = [sys.executable, "-m", "benchmarks.paper_shapes", "--here", "--size", size, "--case", case]
        command += ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"suite": "paper_shapes", **json.loads(done.stdout.splitlines()[-1]), **machine.facts()}
        row |= {"shared": options.shared}
        kept = [each for each in kept if (each["case"], each["cpu"]) != (row["case"], row["cpu"])] + [row]
        kept.sort(key=lambda each: (each["cpu"], each["case"]))
        if not options.quick:
            path.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
    print(table(kept))


if __name__ == "__main__":
    main()
