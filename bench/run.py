"""Runs every benchmark that this machine can run and rewrites its file under bench/results/."""

import subprocess
import sys
from pathlib import Path

import torch

ANYWHERE = ("decode_cpu.py", "batch_invariance.py", "rounding.py", "clock.py --device cpu")
ON_A_GPU = (
    "step_latency.py",
    "refresh.py",
    "cheaper_steps.py",
    "step_options.py",
    "ops.py",
    "gemm.py --candidates",
    "attention.py",
    "decode.py",
    "clock.py",
    "agreement.py",
    "plots.py",
)


def main() -> None:
    for command in ANYWHERE + (ON_A_GPU if torch.cuda.is_available() else ()):
        print(f"== {command}", flush=True)
        name, *options = command.split()
        subprocess.run([sys.executable, str(Path(__file__).parent / name), *options], check=True)


if __name__ == "__main__":
    main()
