"""Every suite, each in its own process, then the table: ``python -m benchmarks.all [--quick] [--pylate PYTHON]``."""

import argparse
import subprocess
import sys
import time

from benchmarks import suite

# In quick runs, the first.
QUICK = ("rerank", "batch", "layouts", "training", "losses", "packing", "overhead")
SLOWER = ("threads", "isa", "scaling", "dtypes", "peers", "gradcache", "storage", "st_maxsim", "search")
PYLATE = ("pylate_rerank", "pylate_step")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all")
    parser.add_argument("--quick", action="store_true", help="the main suites, fewer rounds")
    parser.add_argument("--pylate", metavar="PYTHON", help="interpreter with PyLate 1.6: its suites as well")
    parser.add_argument("--only", nargs="+", metavar="SUITE", help="these alone")
    options = parser.parse_args()
    names = options.only or [*QUICK, *(() if options.quick else SLOWER), *(PYLATE if options.pylate else ())]
    start = time.monotonic()
    failed = []
    for place, name in enumerate(names, 1):
        print(f"[{place}/{len(names)}] {name}, {time.monotonic() - start:.0f} s", flush=True)
        python = options.pylate if name in PYLATE and options.pylate else sys.executable
        # A process each: thread pools and core pinning outlive a suite.
        command = [python, "-m", f"benchmarks.{name}", *["--quick"] * options.quick]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    results = suite.QUICK_RESULTS if options.quick else suite.RESULTS
    command = [sys.executable, "-m", "benchmarks.report", "--terminal", "--results", str(results)]
    subprocess.run(command, check=False)
    print(f"{time.monotonic() - start:.0f} s; rows in {results}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
