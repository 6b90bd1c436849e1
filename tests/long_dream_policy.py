"""Dream's published rule against the naive oracle on very many random states.

    python tests/long_dream_policy.py --states 100000 --backend cuda --processes 16

The states are those of `oracle.dream_states.random_case`, seed by seed. Backends: "cuda", "triton" and
"reference" through the front door (Triton on a GPU), or "host", the compiled policy in the calling process.
Prints the first differences and exits with 1 if there are any.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import blockbatch_kernels as bbk
import dream_bridge
from blockbatch_kernels import cuda
from oracle.dream_states import random_case
from oracle.states import EOS
from policy_random import to_device

CHUNK = 200


def compare(task):
    """Numbers of cases compared and of those that ended, and (seed, message) of what differs."""
    backend, first, behind = task
    torch.set_num_threads(1)
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    differences, ended = [], 0
    for seed in range(first, behind):
        phase, config, state, forwards = random_case(seed)
        params = dream_bridge.params_of(config, state, EOS)
        inputs = (dream_bridge.to_tensors(state, params), *dream_bridge.step_inputs(state, forwards, phase))
        tensors, plan, predictions = (to_device(record, device) for record in inputs)
        if backend == "host":
            plan, events = cuda.decode_policy(tensors, predictions, plan, params)
        else:
            plan, events = bbk.decode_policy(tensors, predictions, plan, params, backend=backend)
        dream_bridge.FUNCTIONS[phase](state, config, forwards)
        ended += state["winner"] is not None
        try:
            records = (to_device(record, "cpu") for record in (tensors, plan, events))
            dream_bridge.assert_same(state, config, *records)
        except AssertionError as error:
            differences.append((seed, str(error)))
    return behind - first, ended, differences


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--backend", choices=("cuda", "triton", "host", "reference"), default="host")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    behind = args.first_seed + args.states
    tasks = [
        (args.backend, first, min(first + CHUNK, behind)) for first in range(args.first_seed, behind, CHUNK)
    ]
    begun = time.perf_counter()
    compared = ended = 0
    differences = []
    # A process forked from one that has touched the GPU could not use it.
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for number, ends, found in pool.imap_unordered(compare, tasks):
            compared, ended = compared + number, ended + ends
            differences += found
    seconds = time.perf_counter() - begun
    print(
        f"{args.backend}: {compared} states compared ({ended} of them end) from seed {args.first_seed} on, "
        f"{len(differences)} differences, {seconds:.1f} s, {compared / seconds:.0f} states/s"
    )
    for difference in sorted(differences)[:20]:
        print("seed {}: {}".format(*difference))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
