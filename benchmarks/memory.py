"""Memory that a process holds, as Linux tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process: now, or (VmHWM) the most that it held.

    Not getrusage: on Linux its maximum outlives exec, so a child has its parent's.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def growth(call: Callable[[], object]) -> int:
    """How far the resident set grows during a call, in bytes."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    call()
    return resident("VmHWM") - before


def own_process(module: str, *arguments: str) -> Any:
    """What `python -m module --memory arguments` prints, as JSON."""
    command = [sys.executable, "-m", module, "--memory", *arguments]
    # Blocks go back to the system when they are freed, so that the resident set is what is in use.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
