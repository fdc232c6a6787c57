"""What runs here: `python -m edgecolbert_kernels.env` prints the versions, instruction sets, backends and threads.

A plain report to read or to paste into a bug report; `--json` prints the same as one JSON object. The exit status is 1
when EDGECOLBERT_ISA or EDGECOLBERT_BACKEND asks for what cannot run here, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

from edgecolbert_kernels._version import __version__
from edgecolbert_kernels.backends import BACKENDS, ON_GPU, VARIABLE, BackendUnsupported, choose, native, supports

ISA_VARIABLE = "EDGECOLBERT_ISA"


def report() -> dict[str, Any]:
    """Everything that is printed, as JSON types. None stands for what is not there."""
    # Before the compiled module, so that both share torch's OpenMP runtime.
    torch = _torch()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "module": _module(),
        "backends": {name: supports(name, "maxsim", _device(name), "float32") for name in BACKENDS if name != "auto"},
        "backend": _backend(),
        "gpu_backend": _backend("cuda") if torch and torch.get("cuda") else None,
        "torch": torch,
        "threads": {"numpy": native.threads(), "torch": torch.get("threads") if torch else None},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("EDGECOLBERT_")},
    }


def _module() -> dict[str, Any]:
    module = native.module()
    if module is None:
        return {"missing": native.missing()}
    found: dict[str, Any] = {
        "built": module.built_isas(),
        "available": module.available_isas(),
        "openmp": module.has_openmp(),
    }
    try:
        found["isa"] = module.get_isa()
    except RuntimeError as error:
        found["isa"] = None
        found["refused"] = str(error)
    return found


def _device(backend: str) -> str:
    """Where the tensors are that a backend is for."""
    return "cuda" if backend in ON_GPU else "cpu"


def _backend(device: str | None = None) -> dict[str, str]:
    try:
        return {"name": choose("maxsim", device or _device(os.environ.get(VARIABLE, "")), "float32")}
    except (BackendUnsupported, ValueError) as error:
        return {"refused": str(error)}


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        return None if getattr(error, "name", None) == "torch" else {"broken": str(error)}
    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": cuda}


def lines(found: dict[str, Any]) -> list[str]:
    """The report as aligned text."""
    module, torch, threads = found["module"], found["torch"], found["threads"]
    rows = [
        ("edgecolbert_kernels", found["version"]),
        ("Python", f"{found['python']}, {found['platform']}"),
    ]
    if "missing" in module:
        rows += [("instruction set", f"none: {module['missing']}")]
    else:
        rows += [
            ("instruction set", module["isa"] or f"none: {module['refused']}"),
            ("  available", " ".join(module["available"])),
            ("  built", " ".join(module["built"])),
            ("OpenMP", "yes" if module["openmp"] else "no: every call runs on one thread"),
        ]
    rows += [("backend", found["backend"].get("name") or f"none: {found['backend']['refused']}")]
    if found["gpu_backend"]:
        rows += [("  on a GPU", found["gpu_backend"].get("name") or f"none: {found['gpu_backend']['refused']}")]
    rows += [(f"  {name}", "yes" if reason is None else f"no: {reason}") for name, reason in found["backends"].items()]
    if torch is None:
        rows += [("torch", "not installed")]
    elif "broken" in torch:
        rows += [("torch", f"does not import: {torch['broken']}")]
    else:
        rows += [("torch", torch["version"] + "".join(f", {name}" for name in torch["cuda"]))]
    rows += [("threads", f"{threads['numpy']} for numpy arrays")]
    if threads["torch"]:
        rows[-1] = ("threads", f"{threads['torch']} for tensors, {threads['numpy']} for numpy arrays")
    rows += [(name, value) for name, value in found["environment"].items()]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m edgecolbert_kernels.env",
        description="Prints the versions, instruction sets, backends and threads of edgecolbert_kernels here.",
        epilog=f"{ISA_VARIABLE} forces an instruction set, {VARIABLE} a backend, EDGECOLBERT_NUM_THREADS the threads "
        "for numpy arrays (tensors follow torch.get_num_threads()).",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    found = report()
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    return 1 if "refused" in found["module"] or "refused" in found["backend"] else 0


if __name__ == "__main__":
    sys.exit(main())
