"""A child forked after (or during) a parallel call computes the same scores: it neither hangs nor crashes."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

PRELUDE = """
import os, sys, threading, time
import torch, edgecolbert_kernels as ek
from cases import embeddings
torch.set_num_threads(4)
# Enough work for our threads, and tensors small enough (32768 elements) for PyTorch's own loops to stay serial: those hang in
# a forked child, D.clone() for one.
Q, D = embeddings(20, 32, 48, seed=1), embeddings(11, 60, 48, seed=2)

def work():
    q, d = Q.clone().requires_grad_(), D.clone().requires_grad_()
    scores = ek.maxsim(q, d)
    scores.sum().backward()
    return scores.detach(), ek.maxsim(Q, D, precision="fast"), q.grad, d.grad

def same(results):
    return all(map(torch.equal, results, wanted))

def wait(child):
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"child ended with {status}"
            return
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise SystemExit("the child hangs")

wanted = work()
"""

BODIES = {
    "child": """
child = os.fork()
if child == 0:
    os._exit(0 if same(work()) else 1)
wait(child)
assert same(work()), "the parent goes on as before"
""",
    "grandchild": """
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if same(work()) else 1)
    wait(grandchild)
    os._exit(0 if same(work()) else 1)
wait(child)
""",
    "many children at once": """
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        os._exit(0 if same(work()) else 1)
    children.append(child)
assert same(work())
for child in children:
    wait(child)
""",
    "fork while another thread is in a call": """
stop = threading.Event()
def loop():
    while not stop.is_set():
        work()
thread = threading.Thread(target=loop)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            os._exit(0 if torch.equal(ek.maxsim(Q, D), wanted[0]) else 1)
    wait(child)
stop.set()
thread.join()
""",
    "multiprocessing pool": """
import multiprocessing
def score(i):
    return ek.maxsim(Q[i : i + 1].numpy(), D.numpy())
with multiprocessing.get_context("fork").Pool(2) as pool:
    rows = pool.map_async(score, range(20)).get(timeout=60)
assert torch.equal(torch.cat([torch.from_numpy(row) for row in rows]), wanted[0])
""",
    "data loader workers": """
class Scores(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        return ek.maxsim(Q[i], D)
loader = torch.utils.data.DataLoader(Scores(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
assert torch.equal(torch.stack(list(loader)), wanted[0])
""",
}


@pytest.mark.parametrize("body", BODIES)
def test_fork(python, body):
    # Python 3.12 and later warn about any fork of a process with threads.
    python(
        "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + PRELUDE + BODIES[body], timeout=100
    )


def test_spawned_child(python):
    """A module imported afresh in the child needs nothing from the parent."""
    source = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]], check=True, timeout=100)\n"
    python(PRELUDE + source, PRELUDE + "assert same(work())")


def test_calls_from_many_threads(python):
    """The GIL is released, so calls overlap; each gets its own result, with an exception in between."""
    python(
        PRELUDE
        + """
from concurrent.futures import ThreadPoolExecutor
def job(i):
    if i % 7 == 3:
        try:
            ek.maxsim(Q, D[..., :5])
        except ValueError:
            return True
    return same(work())
with ThreadPoolExecutor(6) as pool:
    assert all(pool.map(job, range(60)))
"""
    )
