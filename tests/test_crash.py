"""SIGKILL at random moments of a process that appends: what it had committed is there, and nothing else is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from edgecolbert_kernels import PackedEmbeddings, PackedWriter

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")

KILLS = int(os.environ.get("EDGECOLBERT_CRASH_KILLS", "200"))

# Says "n?" before and "n" after the commit of document n; starts where the folder stands.
CHILD = """
import os, sys
import numpy as np
from edgecolbert_kernels import PackedEmbeddings, PackedWriter

PackedEmbeddings.from_list([np.zeros((1, 16), np.float32)])  # loads the kernels, which a commit would wait for
with PackedWriter(sys.argv[1]) as writer:
    n = len(writer)
    os.write(1, b"ready\\n")
    while True:
        document = np.full((n % 7, 16), n % 1000, np.float32)
        os.write(1, b"%d?\\n" % n)
        writer.append([document], [f"document {n}"])
        os.write(1, b"%d\\n" % n)
        n += 1
"""


@pytest.fixture
def fast_folder(tmp_path):
    """In memory where there is such a disk, so that commits take so little that a kill hits any moment of one."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def test_kills(fast_folder):
    folder, moments = fast_folder / "packed", random.Random(1)
    PackedEmbeddings.empty(16).save(folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    committed = 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", CHILD, folder], env=environment, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(moments.expovariate(1 / 0.004))
            child.send_signal(signal.SIGKILL)
            reports = child.stdout.read().decode().splitlines()
        assert child.returncode == -signal.SIGKILL
        done = [int(line) + 1 for line in reports if line.isdecimal()]
        tried = [int(line[:-1]) + 1 for line in reports if line.endswith("?")]
        committed = done[-1] if done else committed
        packed = PackedEmbeddings.load(folder, verify=True)
        # The one that was under way is there or not.
        assert committed <= len(packed) <= (tried[-1] if tried else committed)
        committed = len(packed)
        for n in range(max(0, committed - 10), committed):
            assert packed.lengths[n] == n % 7
            assert (packed[n] == n % 1000).all()
    assert packed.ids == [f"document {n}" for n in range(committed)]
    assert all((packed[n] == n % 1000).all() for n in range(committed))
    assert committed > KILLS, "hardly anything was written: the kills came too early to mean something"
    with PackedWriter(folder) as writer:
        writer.append([np.zeros((1, 16), np.float32)], ["last"])
    assert len(PackedEmbeddings.load(folder, verify=True)) == committed + 1
