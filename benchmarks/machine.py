"""What a result row says about its machine, and the settings that one-thread runs need."""

import contextlib
import ctypes
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from edgecolbert_kernels import __version__

ROOT = Path(__file__).resolve().parent.parent
# What contenders come from; those that are installed are columns of every row.
PACKAGES = (
    "torch",
    "numpy",
    "colbert-ai",
    "flash-maxsim",
    "late-interaction-kernels",
    "maxsim-cpu",
    "numkong",
    "pylate",
    "sentence-transformers",
    "triton",
)


def cpu_model() -> str:
    """The processor's name with family and model, as hypervisors often shorten the name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text.split("\n\n")[0], re.MULTILINE))
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts['model']})"
    return name


def last_level_cache_bytes() -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=32 * 2**20)


def compiled_module():
    """The compiled module, or None where it is not built."""
    try:
        from edgecolbert_kernels import _C
    except ImportError:
        return None
    return _C


@contextlib.contextmanager
def forced_isa(name: str) -> Iterator[None]:
    module = compiled_module()
    before = module.get_isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def compiler() -> str | None:
    """The compiler that the module's ``.comment`` section names."""
    module = compiled_module()
    if module is None:
        return None
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(module.__file__).read_bytes())
    return found[0].decode() if found else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit that is measured; "+" behind it where other files than results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def facts() -> dict[str, object]:
    """The columns that every row of a run shares."""
    module = compiled_module()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "gpu": gpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "isa": module.get_isa() if module else None,
        "compiler": compiler(),
        "python": platform.python_version(),
        "edgecolbert_kernels": __version__,
        "commit": commit(),
        **{package.replace("-", "_"): found for package in PACKAGES if (found := version(package))},
    }


def gpu_facts() -> dict[str, object]:
    """The same for a run on a GPU, without what is of the CPU's kernels, none of which is timed."""
    return {key: value for key, value in facts().items() if key not in ("maxsim_cpu", "isa", "compiler", "load")}


def set_threads(threads: int) -> None:
    """Thread count of PyTorch and of the kernels, which follow it on tensors and the variable on arrays."""
    torch.set_num_threads(threads)
    os.environ["EDGECOLBERT_NUM_THREADS"] = str(threads)


def on_each_core(call: Callable[[], float]) -> list[float]:
    """What ``call`` returns on each core that this thread may use."""
    if not hasattr(os, "sched_setaffinity"):
        return [call()]
    cores, found = os.sched_getaffinity(0), []
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            found.append(call())
    finally:
        os.sched_setaffinity(0, cores)
    return found


def release_free_memory() -> None:
    """Give the heap's free memory back to the system, as in a new process. Nothing where the C library cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def pin_to_one_core() -> None:
    """Keep this process, and every pool it starts from now on, on its highest core.

    Without it maxsim-cpu's thread pool spreads over all cores, and a migration in the middle of a
    call costs the caches.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
