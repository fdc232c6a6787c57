"""Time on a GPU: contenders in turns, by the device's own events, with its cache emptied before each call.

While the device empties its cache and sleeps the host already starts the call, so that a device time holds no launch of the
few kernels that most calls are. `wall` is the other number: from an idle device, the call until its result is there, the
middle of seven in a row, of a long one alone. On a CPU, for dry runs, both are the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

QUANTILES = {"p20": 20, "p50": 50, "p80": 80}
FLUSHED_CACHES = 4  # bytes written to empty the cache, in its sizes
FEWEST_ROUNDS = 5
# Cycles of the device: longer than the host takes to start a few kernels, not the dozens of a small training step, whose
# device time then holds the rest of it.
SLEEP = 500_000
WALL_CALLS = 7
LONG = 20.0  # milliseconds


@dataclass
class Contender:
    """`call(turn)` does the work once, on inputs that rotate with the turn. `missing` says why it cannot run here."""

    name: str
    call: Callable[[int], object] = field(repr=False)
    missing: str | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Times:
    """Milliseconds, one number a round."""

    device: np.ndarray
    wall: np.ndarray


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        if self.on_gpu:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(FLUSHED_CACHES * cache, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def interleave(
        self, contenders: Sequence[Contender], rounds: int, seconds: float, fewest: int = FEWEST_ROUNDS
    ) -> dict[str, Times]:
        """Every contender once a round, in another order each, for at most so many rounds and about so many seconds."""
        for contender in contenders:
            for turn in range(min(2, fewest)):
                contender.call(turn)
        self.synchronize()
        found: dict[str, tuple[list[float], list[float]]] = {contender.name: ([], []) for contender in contenders}
        start = time.perf_counter()
        for turn in range(rounds):
            if turn >= fewest and time.perf_counter() - start > seconds:
                break
            for place in np.random.default_rng(turn).permutation(len(contenders)):
                contender = contenders[place]
                device, wall = found[contender.name]
                device.append(self._on_device(contender, turn))
                wall.append(self._on_the_wall(contender, turn))
        return {name: Times(np.array(device), np.array(wall)) for name, (device, wall) in found.items()}

    def _on_device(self, contender: Contender, turn: int) -> float:
        if not self.on_gpu:
            return self._on_the_wall(contender, turn)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        torch.cuda._sleep(SLEEP)
        begin.record()
        contender.call(turn)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _on_the_wall(self, contender: Contender, turn: int) -> float:
        found = []
        for n in range(1, WALL_CALLS + 1):
            self.synchronize()
            start = time.perf_counter()
            contender.call(turn + n)
            self.synchronize()
            found.append(1e3 * (time.perf_counter() - start))
            if found[-1] > LONG:
                break
        return float(np.median(found))

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        """Bytes beside what was there before, results included; None on a CPU."""
        if not self.on_gpu:
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def peaks(self, small: bool) -> dict[str, float]:
        """What this device reaches: GB/s of a copy, read and written, and TFLOP/s of a half-precision product."""
        size, side = (1 << 20, 128) if small else (1 << 30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        # Random values: zeros switch fewer transistors, and run at a higher clock.
        a, b = (torch.randn(side, side, device=self.device).to(torch.float16) for _ in range(2))
        copy = Contender("copy", lambda _: target.copy_(source))
        product = Contender("product", lambda _: a @ b)
        times = self.interleave([copy, product], 20, 2.0)
        return {
            "GB/s": 2 * size / np.median(times["copy"].device) / 1e6,
            "TFLOP/s": 2 * side**3 / np.median(times["product"].device) / 1e9,
        }


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(f"{np.percentile(values, percent):.4g}") for name, percent in QUANTILES.items()}
