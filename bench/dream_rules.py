"""The two rules that BlockBatch's authors published, for LLaDA and for Dream, on the built-in model; and what
each difference between them does.

    python bench/dream_rules.py [--device cuda] [--count 100]

Problems of the built-in model, `--count` of each family, in fp32, with the paper's settings and 128 tokens.
The rule for Dream is meant for models that predict the next position; nothing in it depends on that, so the
built-in model, which predicts its own, runs it here with a prediction offset of 0. A line for each: problems
solved, and forwards a problem (mean). First the two rules with either end, then Dream's rule with one part of
it replaced by what the rule for LLaDA does there. The policy is the reference's in all lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch import tiny
from blockbatch.decoding import METHOD_BUILDERS, Method, Session, batch, forward
from blockbatch.decoding.session import Runner, new_runner
from blockbatch.environment import describe
from blockbatch.generation import build_result
from blockbatch_kernels import reference
from blockbatch_kernels.reference import dream_policy, plan

RESULT = Path(__file__).parent / "results" / "dream_rules.json"
GEN_LENGTH = 128
_ORIGINAL = {name: value for name, value in vars(dream_policy).items() if callable(value)}


def full_forwards_commit_by_threshold() -> dict[str, Callable]:
    def asked(state, params, phase):
        return state.tokens == params.mask_token_id

    def chosen(state, candidates, first_mask, is_block, params):
        return dream_policy._sure(state, candidates, params)

    return {"_chosen": chosen, "_asked_by_dream": asked}


def full_forwards_leave_the_map() -> dict[str, Callable]:
    return {"_empty_map": lambda state, rows: None}


def map_keeps_the_latest_forward() -> dict[str, Callable]:
    def store(state, predictions, rows_and_positions):
        for field in (state.map_token, state.map_probability):
            field.masked_fill_(rows_and_positions.unsqueeze(-1), 0)
        _ORIGINAL["_store"](state, predictions, rows_and_positions)

    return {"_store": store}


def merge_into_the_sources_windows() -> dict[str, Callable]:
    def places(state, compatible):
        window = plan.by_request(state, plan.in_window(state)).unsqueeze(1)
        return (compatible.unsqueeze(-1) & window).any(2)

    return {"_merge_places": places}


def leader_by_own_commits() -> dict[str, Callable]:
    # Fields of the state that this rule has no use for count for the changed one, here and below.
    def chosen(state, *arguments):
        result = _ORIGINAL["_chosen"](state, *arguments)
        state.blocks_since_refresh.add_(result.sum(-1).int())
        return result

    def taken_over(state):
        return (*_ORIGINAL["_taken_over"](state), state.blocks_since_refresh)

    return {
        "_chosen": chosen,
        "_taken_over": taken_over,
        "_progress": lambda state: state.blocks_since_refresh,
    }


def refresh_by_finished_blocks() -> dict[str, Callable]:
    def advance(state, frontier_before, params):
        before = state.window_start.clone()
        _ORIGINAL["_advance"](state, frontier_before, params)
        state.steps_in_block.add_(((state.window_start > before) & ~state.done).int())
        state.steps_in_block.clamp_(min=0)

    def empty_map(state, rows):
        _ORIGINAL["_empty_map"](state, rows)
        # Below zero, since the advance that follows is that of the full forward's own commit.
        state.steps_in_block.masked_fill_(rows, -10)

    def due(state, params):
        return state.steps_in_block * state.block_size >= params.refresh_interval

    return {"_advance": advance, "_empty_map": empty_map, "_due": due}


def sync_leaves_the_counter() -> dict[str, Callable]:
    def taken_over(state):
        return tuple(
            field for field in _ORIGINAL["_taken_over"](state) if field is not state.moved_since_refresh
        )

    return {"_taken_over": taken_over}


def sync_leaves_the_map() -> dict[str, Callable]:
    return {"_taken_over": lambda state: (state.tokens, state.moved_since_refresh)}


def all_branches_must_be_done() -> dict[str, Callable]:
    def finish(state, params):
        rows = dream_policy._look(state, params)
        ready = plan.by_request(state, state.done & (rows.first_eos < state.gen_length)).any(1)
        waits = ~ready & ~plan.by_request(state, state.done).all(1)
        finished = state.finished.clone()
        winner, reason = state.winner.clone(), state.stop_reason.clone()
        _ORIGINAL["_finish"](state, params)
        waits &= ~finished
        state.finished.masked_fill_(waits, False)
        state.winner.copy_(torch.where(waits, winner, state.winner))
        state.stop_reason.copy_(torch.where(waits, reason, state.stop_reason))

    return {"_finish": finish}


def forced_commit_takes_an_eos() -> dict[str, Callable]:
    def sure(state, candidates, params):
        return _ORIGINAL["_sure"](state, candidates, replace(params, eos_exit="none"))

    return {"_sure": sure}


CHANGES = {
    change.__name__: change
    for change in (
        full_forwards_commit_by_threshold,
        full_forwards_leave_the_map,
        map_keeps_the_latest_forward,
        merge_into_the_sources_windows,
        leader_by_own_commits,
        refresh_by_finished_blocks,
        sync_leaves_the_counter,
        sync_leaves_the_map,
        all_branches_must_be_done,
        forced_commit_takes_an_eos,
    )
}


@contextlib.contextmanager
def changed(functions: dict[str, Callable]) -> Iterator[None]:
    """Meanwhile these functions of the reference stand in for its own."""
    places = [(plan if name == "_asked_by_dream" else dream_policy, name) for name in functions]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


class _Operators:
    """The operators as the engine sees them, the policy always the reference's."""

    def __getattr__(self, name):
        return getattr(bbk, name)

    def decode_policy(self, *arguments, backend=None, **options):
        return reference.decode_policy(*arguments, **options)

    def initial_plan(self, *arguments, backend=None, **options):
        return reference.initial_plan(*arguments, **options)


def method_of(model, policy: str, eos_exit: str) -> Method:
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH, eos_exit=eos_exit)
    method = METHOD_BUILDERS["blockbatch"](config, model.spec, model.eos_token_ids)
    return method._replace(params=replace(method.params, policy=policy))


def decode(model, prompts: list[str], method: Method, batch_size: int) -> list[blockbatch.Result]:
    results = []
    for first in range(0, len(prompts), batch_size):
        ids = [model.tokenizer.encode(prompt) for prompt in prompts[first : first + batch_size]]
        runner = new_runner(model, len(ids), method, GEN_LENGTH, max(map(len, ids)))
        session = Session(model, ids, method, GEN_LENGTH, runner=Runner(runner.batch, None))
        session.run()
        results += [build_result(model, session, request) for request in range(len(ids))]
    return results


def line_of(label: str, problems: dict, model, method: Method, batch_size: int) -> dict:
    begun, results, right = time.perf_counter(), [], {}
    for family, of_family in problems.items():
        decoded = decode(model, [problem.prompt for problem in of_family], method, batch_size)
        right[family] = sum(
            tiny.check(problem, result.text) for problem, result in zip(of_family, decoded, strict=True)
        )
        results += decoded

    def mean(values) -> float:
        return round(sum(values) / len(results), 2)

    return {
        "label": label,
        "policy": method.params.policy,
        "eos_exit": method.params.eos_exit,
        "problems": len(results),
        "right": sum(right.values()),
        "right_by_family": right,
        "forwards": mean([result.nfe.total for result in results]),
        "refreshes": mean([result.nfe.refresh for result in results]),
        "merged": mean([sum(branch.merged for branch in result.branches) for result in results]),
        "synced": mean([sum(branch.synced for branch in result.branches) for result in results]),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def lines(problems: dict, model, batch_size: int, changes: list[str]) -> Iterator[dict]:
    for policy in ("llada_published", "dream_published"):
        for eos_exit in ("prefix", "none"):
            yield line_of(policy, problems, model, method_of(model, policy, eos_exit), batch_size)
    for name in changes:
        with changed(CHANGES[name]()):
            method = method_of(model, "dream_published", "prefix")
            yield line_of(name, problems, model, method, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend")
    parser.add_argument("--count", type=int, default=100, help="problems of each family (100)")
    parser.add_argument("--changes", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = blockbatch.load_model("tiny", device=options.device, dtype="float32", backend=options.backend)
    forward.bbk = batch.bbk = _Operators()
    problems = {family: tiny.generate_problems(family, "test", options.count, 1) for family in tiny.FAMILIES}
    report = {
        "command": " ".join(["python", "bench/dream_rules.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **describe(model.device),
        "dtype": "float32",
        "backend": options.backend,
        "gen_length": GEN_LENGTH,
        "batch_size": options.batch_size,
        "lines": [],
    }
    for line in lines(problems, model, options.batch_size, options.changes):
        report["lines"].append(line)
        print(json.dumps(line), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
