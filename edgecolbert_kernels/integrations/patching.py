"""Patches of another library: applied once, reported, undone exactly.

A function is patched by changing its body (`__code__`), not by putting another function in its place. So the patch reaches
whoever holds the function already: a name copied by `from x import f`, the default argument of a loss, an attribute of a
model made before; such an object pickles as ever; and undoing it is one assignment. What is no Python function is set as
an attribute.

A replacement takes the function's arguments by name and answers the call, or hands it to `original(name)`, which is the
host's own code. Calls that it answers are counted (`hit`), except inside torch.compile, where a counter would be a guard.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

_MISSING = object()
KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# One lock for all hosts: patching is rare, and some hosts import one another.
_lock = threading.RLock()

# By the target's name. Entries stay when a patch is undone: a call may be between the two.
_replacements: dict[str, Callable[..., Any]] = {}
_originals: dict[str, Callable[..., Any]] = {}
_hits: Counter[str] = Counter()


class PatchWarning(UserWarning):
    """Something of the host could not be patched; the message says what, and why."""


@dataclass(frozen=True)
class Target:
    """What to patch.

    Args:
        name: "package.module:function", "package.module:Class.method" or "package.module:Class.attribute".
        replacement: called with the function's arguments by name; or, for an attribute, its value.
        attribute: set the attribute, which need not exist, instead of changing a function.
        optional: some versions of the host do not have it: no warning.
    """

    name: str
    replacement: Any
    attribute: bool = False
    optional: bool = False


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
                reason = _set(target, self._undo) if target.attribute else _change(target, self._undo)
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


def original(name: str) -> Callable[..., Any]:
    """The host's own code of a patched function."""
    return _originals[name]


def hit(name: str) -> None:
    """Count a call that the kernels answer."""
    with _lock:
        _hits[name] += 1


def hits() -> Mapping[str, int]:
    """Calls answered by the kernels since the program started, by target."""
    return dict(_hits)


def replacement(name: str) -> Callable[..., Any]:
    """What a patched body calls."""
    return _replacements[name]


def _find(name: str) -> tuple[Any, str, Any]:
    """The owner of a target, the attribute's name and its value as stored, not as bound; _MISSING if there is none."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, last, vars(owner).get(last, _MISSING)


def _change(target: Target, undo: list[Callable[[], None]]) -> str | None:
    """Swap the body of a function; the reason why not, if that cannot be."""
    try:
        _, _, value = _find(target.name)
    except (ImportError, AttributeError) as error:
        return str(error)
    function = getattr(value, "__func__", value)
    if value is _MISSING:
        return "there is no such function"
    if not isinstance(function, FunctionType):
        return f"it is a {type(function).__name__}, not a Python function"
    if function.__code__.co_freevars:
        return "it is a closure"
    # Not what a decorator says of what it wraps: the parameters that the code has.
    parameters = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    if any(each.kind not in KINDS for each in parameters):
        return "it takes *args, **kwargs or positional-only arguments"
    before, body = function.__code__, _body(function.__name__, parameters, target.name)
    copy = FunctionType(before, function.__globals__, function.__name__, function.__defaults__, None)
    copy.__kwdefaults__ = function.__kwdefaults__
    _originals[target.name], _replacements[target.name] = copy, target.replacement
    function.__code__ = body

    def restore() -> None:
        if function.__code__ is body:
            function.__code__ = before
        else:
            warnings.warn(f"{target.name} was changed by somebody else after this patch: left alone", PatchWarning, 4)

    undo.append(restore)
    return None


def _body(function: str, parameters: list[inspect.Parameter], name: str) -> CodeType:
    """Code with these parameters, so that the function's defaults and signature hold, that calls the replacement."""
    names = [p.name for p in parameters if p.kind is KINDS[0]]
    only = [p.name for p in parameters if p.kind is KINDS[1]]
    signature = ", ".join([*names, *(["*", *only] if only else [])])
    arguments = ", ".join(f"{each}={each}" for each in (*names, *only))
    source = (
        f"def {function}({signature}):\n"
        f"    from {__name__} import replacement as _edgecolbert\n"
        f"    return _edgecolbert({name!r})({arguments})\n"
    )
    made: dict[str, Any] = {}
    exec(compile(source, f"<{name} on edgecolbert_kernels>", "exec"), made)
    return made[function].__code__


def _set(target: Target, undo: list[Callable[[], None]]) -> str | None:
    try:
        owner, last, value = _find(target.name)
    except (ImportError, AttributeError) as error:
        return str(error)
    setattr(owner, last, target.replacement)
    undo.append(lambda: delattr(owner, last) if value is _MISSING else setattr(owner, last, value))
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """`1.6.0rc1` -> (1, 6, 0)."""
    numbers = []
    for part in version.split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
