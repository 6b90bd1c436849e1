"""`decode_policy` and its plan against the naive oracle on very many random states.

    python tests/long_policy.py --states 1000000 --backend cuda --processes 16

The states are those of `oracle.states.random_case`, seed by seed; `--cheaper-forwards` draws open queries,
refreshes of the generation region and the prediction offset too. Backends: "cuda", "reference" (both through
the front door) or "host", the compiled policy in the calling process. Prints the first differences and exits
with 1 if there are any.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda
from oracle import policy
from oracle.states import queries_of, random_case
from policy_bridge import cached_tokens, params_of

PHASE_FUNCTIONS = {"init": policy.init_phase, "block": policy.block_phase, "refresh": policy.refresh_phase}
CHUNK = 500
COUNTERS = ("decoded", "committed", "merged", "synced")
PROGRESS = ("progress", "blocks_since_refresh", "needs_refresh", "done")
DTYPES = {"needs_refresh": np.bool_, "done": np.bool_, "finished": np.bool_, "confidence": np.float32}


def columns_before(state, config):
    """Fields of BranchState that a case sets, as lists over its rows."""
    start, branches = state["prompt_length"], state["branches"]
    gen_length = state["gen_length"]
    windows = [
        (branch["window"] if branch["done"] else policy.window_of(state, config, branch))
        for branch in branches
    ]
    result = {name: [branch[name] for branch in branches] for name in (*COUNTERS, *PROGRESS)}
    result["adopted"] = [0] * len(branches)
    result["block_size"] = [branch["block_size"] for branch in branches]
    result["steps_in_block"] = [branch["steps"] for branch in branches]
    result["window_start"] = [w0 - start for w0, _ in windows]
    result["window_end"] = [w1 - start for _, w1 in windows]
    result["tokens"] = [branch["tokens"][start:] for branch in branches]
    result["cached_token"] = [cached_tokens(state, branch) for branch in branches]
    for name, key in (("top_token", "top"), ("confidence", "confidence")):
        # A state knows the predictions of all positions, in order, or none.
        result[name] = [list(branch[key].values())[start:] or [0] * gen_length for branch in branches]
    return result


def predictions_of(state, forwards):
    """Columns of Predictions, and source_row of the plan, for a request whose first row is 0."""
    start, gen_length = state["prompt_length"], state["gen_length"]
    source_row = [-1] * len(state["branches"])
    target, top, confidence, probe = [], [], [], []
    for branch, forward in forwards.items():
        source_row[branch] = branch
        positions = [position for position in forward["top"] if position >= start]
        target += [branch * gen_length + position - start for position in positions]
        for column, key in ((top, "top"), (confidence, "confidence"), (probe, "probe")):
            column += [forward[key][position] for position in positions]
    return (target, top, confidence, probe), source_row


def scattered_queries(config, phase, queries, gen_length):
    """query_start, query_end, query_position of a plan that computes these positions of every row."""
    places = [[0] * (gen_length + 1) for _ in queries]
    if config.query_span != "open" or phase != "block":
        bounds = [(row[0], row[-1] + 1) if row else (0, 0) for row in queries]
    else:
        bounds = [(0, len(row)) for row in queries]
        for place, row in zip(places, queries):
            place[: len(row)] = row
    return [*zip(*bounds), places]


def expected_plan(state, config):
    """query_start, query_end, query_position, source_row, predict and flags of a running request's plan."""
    start, gen_length, branches = state["prompt_length"], state["gen_length"], state["branches"]
    phase = "refresh" if state["refresh_due"] else "block"
    queries, source_row = [[] for _ in branches], [-1] * len(branches)
    predicted = np.zeros((len(branches), gen_length), np.bool_)
    if phase == "refresh":
        seen = {}
        for index in policy.refresh_rows(state):
            source_row[index] = seen.setdefault(tuple(branches[index]["tokens"]), index)
            if source_row[index] == index:
                queries[index] = list(policy.refresh_queries(state, config))
                predicted[index] = True
    else:
        for index in policy.block_rows(state, config):
            source_row[index] = index
            queries[index], positions = queries_of(phase, config, state, branches[index])
            predicted[index, [position - start for position in positions]] = True
    tokens = np.array([branch["tokens"][start:] for branch in branches])
    wanted = [*state["eos_token_ids"], state["mask_token_id"]]
    predict = np.isin(tokens, wanted).any(0) & predicted
    stalled = sum(branch["decoded"] > gen_length for branch in branches)
    flags = [1, bbk.PHASES.index(phase), sum(map(len, queries)), int(predict.sum()), stalled]
    return [*scattered_queries(config, phase, queries, gen_length), source_row, predict], flags


class Batch:
    """Cases of one shape, stacked; each is run on its own slice, since each has its own settings."""

    def __init__(self, cases, device):
        self.cases, self.count = cases, len(cases[0][2]["branches"])
        self.gen_length = cases[0][2]["gen_length"]
        rows, requests = len(cases) * self.count, len(cases)
        before = [columns_before(state, config) for _, config, state, _ in cases]
        columns = {
            name: np.array([row for case in before for row in case[name]], DTYPES.get(name, np.int32))
            for name in before[0]
        }
        columns["prompt_length"] = np.array([case[2]["prompt_length"] for case in cases], np.int32)
        columns["prompt_tokens"] = np.zeros((requests, 1), np.int32)
        columns["adopted"], columns["moved_since_refresh"] = np.zeros((2, rows), np.int32)
        columns["map_token"] = np.zeros((rows, self.gen_length, 0), np.int32)
        columns["map_probability"] = np.zeros((rows, self.gen_length, 0), np.float32)
        columns["nfe"] = np.zeros((requests, 3), np.int32)
        for name in ("finished", "winner", "stop_reason", "non_finite"):
            columns[name] = np.zeros(requests, DTYPES.get(name, np.int32))
        self.state = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
        self.plans = bbk.StepPlan.allocate(rows, self.gen_length, device)
        self.flags = torch.zeros(requests, 5, dtype=torch.int32, device=device)
        self.events = bbk.PolicyEvents.allocate(rows, self.gen_length, device)
        self._upload_predictions(device)

    def _upload_predictions(self, device):
        self.ends, all_columns, sources, flags = [0], [[], [], [], []], [], []
        plans = [[], [], []]
        for phase, config, state, forwards in self.cases:
            columns, source_row = predictions_of(state, forwards)
            for column, more in zip(all_columns, columns):
                column += more
            self.ends.append(len(all_columns[0]))
            sources += source_row
            queries = [forwards[i]["queries"] if i in forwards else [] for i in range(self.count)]
            for column, more in zip(plans, scattered_queries(config, phase, queries, self.gen_length)):
                column += more
            flags.append([1, bbk.PHASES.index(phase), 0, 0, 0])
        dtypes = (torch.int64, torch.int32, torch.float32, torch.float32)
        self.predictions = [
            torch.tensor(column, dtype=dtype).to(device) for column, dtype in zip(all_columns, dtypes)
        ]
        self.plans.source_row.copy_(torch.tensor(sources, dtype=torch.int32))
        for name, column in zip(("query_start", "query_end", "query_position"), plans):
            getattr(self.plans, name).copy_(torch.tensor(column, dtype=torch.int32))
        self.flags.copy_(torch.tensor(flags, dtype=torch.int32))

    def run(self, decode_policy):
        per_request = {"prompt_length", "prompt_tokens", "nfe", "finished", "winner", "stop_reason"}
        per_request.add("non_finite")
        for i, (_, config, state, _) in enumerate(self.cases):
            rows = slice(i * self.count, (i + 1) * self.count)
            fields = {
                name: column[i : i + 1] if name in per_request else column[rows]
                for name, column in self.state.items()
            }
            predictions = [column[self.ends[i] : self.ends[i + 1]] for column in self.predictions]
            columns = {name: column[rows] for name, column in self.plans._asdict().items()}
            plan = bbk.StepPlan(**{**columns, "flags": self.flags[i]})
            events = bbk.PolicyEvents(*(column[rows] for column in self.events))
            decode_policy(
                bbk.BranchState(**fields),
                bbk.Predictions(*predictions),
                plan,
                params_of(config, state),
                out=(plan, events),
            )

    def differences(self):
        """(index of the case, field) for all that differs from the oracle's state after its phase."""
        ours = {name: column.cpu().numpy() for name, column in self.state.items()}
        plans = {name: column.cpu().numpy() for name, column in self.plans._asdict().items()}
        flags, sync_source = self.flags.cpu().numpy(), self.events.sync_source.cpu().numpy()
        found = []
        for i, (_, config, state, _) in enumerate(self.cases):
            rows = slice(i * self.count, (i + 1) * self.count)
            branches, ended = state["branches"], state["winner"] is not None

            def check(name, got, expected, index=i):
                if not np.array_equal(got, expected):
                    found.append((index, name))

            start = state["prompt_length"]
            check("tokens", ours["tokens"][rows], [branch["tokens"][start:] for branch in branches])
            if config.query_span == "open":
                cached = [cached_tokens(state, branch) for branch in branches]
                check("cached_token", ours["cached_token"][rows], cached)
            check("finished", ours["finished"][i], ended)
            for name in COUNTERS:
                check(name, ours[name][rows], [branch[name] for branch in branches])
            if ended:
                outcome = [state["winner"], bbk.STOP_REASONS.index(state["stop_reason"])]
                check("outcome", [ours["winner"][i], ours["stop_reason"][i]], outcome)
                check("running", flags[i][0], 0)
                continue
            for name in PROGRESS:
                check(name, ours[name][rows], [branch[name] for branch in branches])
            leaders = list(range(self.count))
            for source, destination in state["kv_copies"]:
                leaders[destination] = source
            check("sync_source", sync_source[rows], leaders)
            for row, branch in zip(range(rows.start, rows.stop), branches):
                if not branch["done"]:
                    window = ours["window_start"][row] + start, ours["window_end"][row] + start
                    check("window", window, policy.window_of(state, config, branch))
            columns, expected_flags = expected_plan(state, config)
            names = ("query_start", "query_end", "query_position", "source_row", "predict")
            for name, column in zip(names, columns):
                check(name, plans[name][rows], column)
            check("flags", flags[i], expected_flags)
        return found


def policy_of(backend):
    if backend == "host":
        return cuda.decode_policy
    return lambda *args, **options: bbk.decode_policy(*args, **options, backend=backend)


def compare(task):
    """Number of cases compared from a range of seeds, how many of them ended, and the differences."""
    backend, cheaper_forwards, first, behind = task
    torch.set_num_threads(1)
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    shapes = {}
    for seed in range(first, behind):
        case = random_case(seed, cheaper_forwards)
        phase, config, _, forwards = case
        if phase == "refresh" and not forwards:
            continue  # every branch is done: such a request has ended before
        shapes.setdefault((len(config.block_sizes), config.gen_length), []).append((seed, case))
    compared = ended = 0
    differences = []
    for numbered in shapes.values():
        seeds, cases = zip(*numbered)
        batch = Batch(cases, device)
        batch.run(policy_of(backend))
        for phase, config, state, forwards in cases:
            PHASE_FUNCTIONS[phase](state, config, forwards)
            ended += state["winner"] is not None
        compared += len(cases)
        differences += [(seeds[index], cases[index][0], name) for index, name in batch.differences()]
    return compared, ended, differences


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--backend", choices=("cuda", "host", "reference"), default="host")
    parser.add_argument("--cheaper-forwards", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    behind = args.first_seed + args.states
    tasks = [
        (args.backend, args.cheaper_forwards, first, min(first + CHUNK, behind))
        for first in range(args.first_seed, behind, CHUNK)
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
        print("seed {} ({}): {} differs".format(*difference))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
