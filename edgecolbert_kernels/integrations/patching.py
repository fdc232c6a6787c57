"""Patches of another library: applied once, reported, undone exactly.

`targets` says how a function is reached. What answers a call instead of the host counts it (`hit`), except inside
torch.compile, where a counter would be a guard.
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edgecolbert_kernels.integrations import targets as reach
from edgecolbert_kernels.integrations.targets import PatchWarning as PatchWarning
from edgecolbert_kernels.integrations.targets import Target as Target
from edgecolbert_kernels.integrations.targets import original as original

# One lock for all hosts: patching is rare, and some hosts import one another.
_lock = threading.RLock()
_hits: Counter[str] = Counter()


@dataclass(frozen=True)
class Report:
    """What a patch reached (names as in `Target`) and what it could not, with the reason."""

    host: str
    version: str
    reached: tuple[str, ...]
    missed: Mapping[str, str] = field(default_factory=dict)

    @property
    def hits(self) -> Mapping[str, int]:
        """Calls answered by the kernels since the program started, outside torch.compile."""
        return MappingProxyType({name: _hits[name] for name in self.reached if name in _hits})

    def __str__(self) -> str:
        lines = [f"{self.host} {self.version}", *(f"  {name}" for name in self.reached)]
        return "\n".join([*lines, *(f"  not {name}: {reason}" for name, reason in self.missed.items())])


class Patch:
    """All targets of one host.

    `apply` holds the patch until `undo`; every `using` block holds it too, in whatever thread. It is undone when nobody
    holds it any more. While somebody does, other options are refused: they would change under him.
    """

    def __init__(self, host: str, targets: Callable[..., Sequence[Target]], versions: tuple[str, str]) -> None:
        """`targets` makes the targets from the options; `versions` are the oldest and the first too new one."""
        self.host, self._targets, self._versions = host, targets, versions
        self._applied = False
        self._open = 0
        self._options: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._report: Report | None = None

    def apply(self, **options: Any) -> Report:
        """Patch the host; harmless when it is patched. Raises ImportError where the host is not installed."""
        with _lock:
            report = self._hold(options, self._open > 0)
            self._applied = True
            return report

    def undo(self) -> None:
        """Give every original back, once no `using` block is open; harmless when nothing is patched."""
        with _lock:
            self._applied = False
            self._release()

    @contextmanager
    def using(self, **options: Any) -> Iterator[Report]:
        with _lock:
            report = self._hold(options, self._open > 0 or self._applied)
            self._open += 1
        try:
            yield report
        finally:
            with _lock:
                self._open -= 1
                self._release()

    def _hold(self, options: dict[str, Any], held: bool) -> Report:
        if self._report is not None and options != self._options:
            if held:
                raise RuntimeError(f"{self.host} is patched with {self._options}, and in use so; undo that first")
            self._restore()
        if self._report is None:
            self._options = options
            self._report = self._patch(self._targets(**options))
        return self._report

    def _release(self) -> None:
        if not self._applied and not self._open:
            self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._report = None

    def _patch(self, targets: Sequence[Target]) -> Report:
        version = importlib.metadata.version(self.host)
        missed, reached = {}, []
        oldest, newest = self._versions
        if not _numbers(oldest) <= _numbers(version) < _numbers(newest):
            warnings.warn(
                f"{self.host} {version} is not one of the versions that were tested, {oldest} to before {newest}",
                PatchWarning,
                stacklevel=6,
            )
        try:
            for target in targets:
                reason = reach.patch(target, self._undo)
                if reason is None:
                    reached.append(target.name)
                elif not target.optional:
                    missed[target.name] = reason
        except BaseException:
            self._restore()
            raise
        for name, reason in missed.items():
            warnings.warn(f"{self.host} {version}: {name} is not patched: {reason}", PatchWarning, stacklevel=6)
        return Report(self.host, version, tuple(reached), missed)


def hit(name: str) -> None:
    """Count a call that the kernels answer."""
    with _lock:
        _hits[name] += 1


def hits() -> Mapping[str, int]:
    """Calls answered by the kernels since the program started, by target."""
    return dict(_hits)


def _numbers(version: str) -> tuple[int, ...]:
    """`1.6.0rc1` -> (1, 6, 0)."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
