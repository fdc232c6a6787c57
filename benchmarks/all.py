"""Every suite, each in its own process, then the table: ``python -m benchmarks.all [--quick]``."""

import argparse
import subprocess
import sys
import time

SUITES = ("rerank", "batch", "threads", "isa", "training", "losses", "overhead", "search", "storage")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under 6 minutes")
    options = ["--quick"] if parser.parse_args().quick else []
    start = time.monotonic()
    failed = []
    for number, name in enumerate(SUITES, 1):
        print(f"[{number}/{len(SUITES)}] {name}, {time.monotonic() - start:.0f} s", flush=True)
        # A process each: thread pools and core pinning outlive a suite.
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode:
            failed.append(name)
    subprocess.run([sys.executable, "-m", "benchmarks.report"], check=False)
    print(f"{time.monotonic() - start:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
