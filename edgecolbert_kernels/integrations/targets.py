"""What of a host is patched, and how.

A function is patched by changing its body (`__code__`), not by putting another function in its place. So the patch reaches
whoever holds the function already: a name copied by `from x import f`, the default argument of a loss, an attribute of a
model made before; such an object pickles as ever; and undoing it is one assignment. What is no Python function is set as
an attribute.

A replacement takes the function's arguments by name and answers the call, or hands it to `original(name)`, which is the
host's own code.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

_MISSING = object()
KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

# By the target's name. Entries stay when a patch is undone: a call may be between the two.
_replacements: dict[str, Callable[..., Any]] = {}
_originals: dict[str, Callable[..., Any]] = {}


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


def original(name: str) -> Callable[..., Any]:
    """The host's own code of a patched function."""
    return _originals[name]


def replacement(name: str) -> Callable[..., Any]:
    """What a patched body calls."""
    return _replacements[name]


def patch(target: Target, undo: list[Callable[[], None]]) -> str | None:
    """Patch it and append what undoes that; or the reason why it cannot be reached."""
    return (_set if target.attribute else _change)(target, undo)


def _find(name: str) -> tuple[Any, str, Any]:
    """The owner of a target, the attribute's name and its value as stored, not as bound; _MISSING if there is none."""
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, last, vars(owner).get(last, _MISSING)


def _change(target: Target, undo: list[Callable[[], None]]) -> str | None:
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
