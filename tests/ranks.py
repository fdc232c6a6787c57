"""Processes that stay, joined in a gloo group: `Ranks(2).run(function, per_rank_argument, ...)` calls it in each of them."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120  # until a rank that does not answer counts as hung


class Ranks:
    def __init__(self, size: int, seconds: float = SECONDS) -> None:
        self.size, self.seconds = size, seconds
        self._folder = tempfile.TemporaryDirectory()
        # Spawned: a fork would take along a pool of OpenMP threads that is not there.
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            store = Path(self._folder.name) / "store"
            process = context.Process(target=_serve, args=(there, str(store), rank, size, seconds), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)`, a function of a module, returns on each rank; fails where one raises."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(self.seconds), f"rank {rank} hangs in {function.__name__}"
            answers.append(pipe.recv())
        errors = [error for _, error in answers if error]
        assert not errors, "\n".join(errors)
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Any, store: str, rank: int, size: int, seconds: float) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=seconds)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=wait)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
