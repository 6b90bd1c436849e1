"""Runs every benchmark that this machine can run and rewrites its file under bench/results/."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("decode_cpu.py", "batch_invariance.py", "accuracy.py")


def main() -> None:
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / name)], check=True)


if __name__ == "__main__":
    main()
