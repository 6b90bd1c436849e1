r"""What drawing tokens and a commit rule of one's own add to a block step.

    python bench/step_options.py [--shapes llada-8b] [--tokens 32 128 252]
    python bench/step_options.py --device cpu --dtype float32 --shapes tiny --tokens 32 --length 256 \
        --repeats 60 --out bench/results/step_options_cpu.json

The same step with tokens of the highest logits ("greedy"), drawn in several ways, and with rules of
`blockbatch.commit_rule` in the place of the threshold rule. In turns, so that all meet the same clocks:

    ms        the step on the device, median by events; on a CPU processor time, which other programs of the
              machine hardly change; the better of two repeats
    clock_ms  clock time of a step of a decode, with the wait of the loop; the better of two (on a GPU)

"its threshold rule" is the built-in rule written as a rule of one's own, once captured in graphs and once
without; "the two surest" is examples/top_two.py. Every step is checked before it is timed; one that fails
ends the run with status 1. Weights are random ones, but for "tiny", the built-in model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import fields
from typing import Any, NamedTuple

import step_latency
import torch
from cases import StepCase
from random_models import DTYPES, random_model
from timing import clean, device_of, in_turns, parser, rounded, synchronize, target, write_report
from verify import Wrong, check_hidden, check_policy, check_step, hidden_states, relative_error

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.decoding.forward import block_denoise
from blockbatch.decoding.rule import CHOSEN, CommitRule

THRESHOLD = 0.9
# "No price that can be measured" at so many tokens: as much as two medians of the same step lie apart.
LIMIT_TOKENS, LIMIT = 128, 1.01
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def threshold_rule(state: Any, candidates: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    return confidence >= state.options["threshold"]


def two_surest(state: Any, candidates: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    best = confidence.topk(2, dim=1).indices
    return torch.zeros_like(candidates).scatter(1, best, True)


class Way(NamedTuple):
    """How the tokens of a step come about: sampling options, or a rule and whether it is captured."""

    drawn: dict[str, Any] | None = None
    rule: Any = None
    graphs: bool = True


WAYS = {
    "greedy": Way(),
    "temperature 1": Way(dict(temperature=1.0)),
    "temperature 1, entropy": Way(dict(temperature=1.0, confidence="entropy")),
    "temperature 1, min_tokens": Way(dict(temperature=1.0, min_tokens=16)),
    "temperature 1, top_p 0.9": Way(dict(temperature=1.0, top_p=0.9)),
    "its threshold rule": Way(rule=threshold_rule),
    "its threshold rule, no graphs": Way(rule=threshold_rule, graphs=False),
    "the two surest": Way(rule=two_surest),
}


def make_case(model: blockbatch.Model, tokens: int, length: int, way: Way) -> StepCase:
    gen_length, options = min(256, length // 2), {"threshold": THRESHOLD}
    if way.rule is not None:
        options["rule"] = CommitRule("measured", way.rule, tuple(options.items()), graphs=way.graphs)
        options["threshold"] = CHOSEN
    if way.drawn is not None:
        options["drawing"] = blockbatch.DecodeConfig(gen_length=gen_length, seed=1, **way.drawn)
    case = StepCase(model, step_latency.BLOCK_SIZES[tokens], length - gen_length, gen_length, **options)
    if case.tokens != tokens:
        raise SystemExit(f"expected a step of {tokens} packed tokens, got {case.tokens}")
    case.run()  # the first run of a size captures it
    return case


def check_drawn(case: StepCase) -> dict[str, Any]:
    """Raises `Wrong` unless the tokens are those that fp32 arithmetic draws, but for what rounding changes,
    and the policy makes of them what the reference's makes."""
    case.restore()
    hidden = hidden_states(case)
    draw = case.batch.sampling.draw(case.batch.state, hidden.predict_target)
    found = check_hidden(hidden, case.model.dtype, None)
    ours = check_policy(case, hidden.predict_target)[:2]
    weight = case.model.weights.lm_head

    def by_reference(states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return bbk.lm_head_sample(
            states[hidden.predict_index],
            weight,
            draw.rules,
            draw.request,
            draw.positions,
            suppress_token=case.model.spec.mask_token_id,
            confidence=draw.confidence,
            backend="reference",
        )[:2]

    truth = by_reference(hidden.truth, weight.float())
    plain = by_reference(hidden.reference, weight)
    wrong, allowed = (int((tokens != truth[0]).sum()) for tokens in (ours[0], plain[0]))
    if not wrong <= 2 * allowed + 2:
        raise Wrong(f"drawn tokens: expected at most {2 * allowed + 2} other than in fp32, got {wrong}")
    same = (ours[0] == truth[0]) & (plain[0] == truth[0])
    errors = [relative_error(values[1][same], truth[1][same]) for values in (ours, plain)]
    if not errors[0] <= 2 * errors[1] + _ROUNDING[case.model.dtype]:
        raise Wrong(f"confidences: expected an error of at most twice {errors[1]:.2e}, got {errors[0]:.2e}")
    case.restore()
    share = 1 - wrong / len(truth[0])
    return found | {"drawn_tokens_equal_to_fp32": share, "confidence_error": errors[0]}


def check_greedy_by_drawing(greedy: StepCase, length: int) -> dict[str, Any]:
    """Raises `Wrong` unless the operator that draws gives the greedy tokens at temperature 0, but for what
    rounding changes."""
    banned = dict(bad_token_ids=(greedy.model.spec.mask_token_id,))
    drawn = make_case(greedy.model, greedy.tokens, length, Way(banned))
    found = check_drawn(drawn)
    greedy.restore()
    predicted, tokens = greedy.batch.plan.predict.clone(), []
    for case in (greedy, drawn):
        case.restore()
        case.run()
        tokens.append(case.batch.state.top_token[predicted].clone())
        case.restore()
    return {**found, "tokens_equal_to_greedy": float((tokens[0] == tokens[1]).float().mean())}


def check_rule(case: StepCase, greedy: StepCase, rule: Any) -> dict[str, Any]:
    """Raises `Wrong` unless a rule's step ends where the built-in rule's does, or commits two in each row."""
    case.restore()
    found = check_hidden(hidden_states(case), case.model.dtype, None)
    before = case.batch.state.committed.clone()
    if case.graphs is not None:
        case.run()
    else:  # padded as the captured steps are: products of other sizes may round otherwise
        block_denoise(case.model, case.batch, case.tokens, case.tokens)
    committed = (case.batch.state.committed - before).tolist()
    if rule is threshold_rule:
        greedy.restore()
        greedy.run()
        for field in fields(greedy.batch.state):
            ours, builtin = (getattr(one.batch.state, field.name) for one in (case, greedy))
            if not torch.equal(ours, builtin):
                raise Wrong(f"state.{field.name}: expected the built-in rule's, got another")
        if not torch.equal(case.batch.plan.host_part(), greedy.batch.plan.host_part()):
            raise Wrong("plan: expected the built-in rule's, got another")
        greedy.restore()
    elif committed != [2] * len(committed):
        raise Wrong(f"commits of each row: expected 2, got {committed}")
    case.restore()
    return {**found, "committed": committed}


def check(case: StepCase, greedy: StepCase, way: Way) -> dict[str, Any]:
    if way.rule is not None:
        return check_rule(case, greedy, way.rule)
    return check_step(case) if way.drawn is None else check_drawn(case)


def clock_ms(case: StepCase, steps: int) -> float:
    """Median clock time of a decode's steps."""
    case.restore()
    case.session.step()
    synchronize(case.model.device)
    clock = [time.perf_counter()]
    for _ in range(steps):
        case.session.step()
        clock.append(time.perf_counter())
    case.restore()
    return 1e3 * statistics.median(end - begin for begin, end in zip(clock, clock[1:], strict=False))


def processor_ms(cases: list[StepCase], repeats: int) -> list[tuple[float, float]]:
    """As `in_turns`, on a CPU."""

    def medians() -> list[float]:
        taken: list[list[float]] = [[] for _ in cases]
        for _ in range(repeats):
            for case, spans in zip(cases, taken, strict=True):
                case.restore()
                begun = time.process_time()
                case.run()
                spans.append(1e3 * (time.process_time() - begun))
        return [statistics.median(spans) for spans in taken]

    pairs = list(zip(medians(), medians(), strict=True))
    return [(min(pair), abs(pair[0] - pair[1]) / min(pair)) for pair in pairs]


def measure(model: blockbatch.Model, tokens: int, length: int, repeats: int) -> dict:
    cases = {name: make_case(model, tokens, length, way) for name, way in WAYS.items()}
    greedy = cases["greedy"]
    checks = {name: check(case, greedy, WAYS[name]) for name, case in cases.items()}
    at_zero = check_greedy_by_drawing(greedy, length)
    if model.device.type == "cuda":
        taken = in_turns([(case.run, case.restore) for case in cases.values()], model.device, repeats)
    else:
        taken = processor_ms(list(cases.values()), repeats)
    steps = {
        name: {"ms": ms, "spread": spread, "over_greedy": ms / taken[0][0], "checks": checks[name]}
        for name, (ms, spread) in zip(cases, taken, strict=True)
    }
    if model.device.type == "cuda":
        rounds = [{name: clock_ms(case, 10) for name, case in cases.items()} for _ in range(2)]
        for name, step in steps.items():
            step["clock_ms"] = min(one[name] for one in rounds)
    return {
        "model": model.name,
        "tokens": tokens,
        "length": length,
        "branches": list(step_latency.BLOCK_SIZES[tokens]),
        "predictions": greedy.predictions,
        "temperature_0": at_zero,
        "steps": steps,
    }


def show(line: dict) -> None:
    print(f"{line['model']}, {line['tokens']} tokens of {line['length']}")
    for name, step in line["steps"].items():
        clock = f", clock {step['clock_ms']:.3f} ms" if "clock_ms" in step else ""
        times = f"{step['ms']:8.3f} ms (+-{step['spread']:.1%}), {step['over_greedy']:.4f} of greedy"
        print(f"  {name:30} {times}{clock}", flush=True)


def model_of(name: str, device: torch.device, options: argparse.Namespace) -> blockbatch.Model:
    dtype = DTYPES[options.dtype]
    if name == "tiny":
        return blockbatch.load_model("tiny", device=str(device), dtype=dtype, backend=options.backend)
    return random_model(name, device, dtype, backend=options.backend)


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "step_options", ["llada-8b"])
    arguments.add_argument("--tokens", nargs="*", type=int, default=[32, 128, 252])
    arguments.add_argument("--length", type=int, default=1280)
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    device, lines = device_of(options), []
    for name in options.shapes:
        model = model_of(name, device, options)
        for tokens in options.tokens:
            lines.append(rounded(measure(model, tokens, options.length, options.repeats)))
            show(lines[-1])
            clean(device)
    targets = [
        target(f"step of {line['tokens']} tokens, {name}, over greedy", step["over_greedy"], LIMIT)
        for line in lines
        if (line["model"], line["tokens"]) == ("llada-8b", LIMIT_TOKENS)
        for name, step in line["steps"].items()
        if name == "temperature 1"
    ]
    write_report(options, device, targets=targets, lines=lines)


if __name__ == "__main__":
    main()
