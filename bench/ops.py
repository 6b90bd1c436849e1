"""Every operator against plain torch and, where they are installed, other packages.

    python bench/ops.py [--shapes llada-8b dream-7b] [--ops rms_norm varlen_attention ...]

For each operator, shape and version: microseconds a call, GB/s, TFLOP/s and the share of the floor, which is
the larger of the least bytes over the measured copy rate and the FLOP over the measured rate of a product.
Calls are timed in a CUDA graph that walks through input sets larger than the L2 cache together; what must be
put back between two calls is timed alone and subtracted. The reference versions of the integer operators
("torch") wait for the host and are timed launch by launch.

Before it is timed, each version of this package must err by no more than twice plain torch (against fp32), or
give the same integers as the reference; a version that does not ends the run with status 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import many_rows_cases
import op_cases
import peers
import sampling_op_cases
import state_op_cases
import torch
from op_cases import Case, Outputs
from random_models import DTYPES, SHAPES
from timing import as_graph, ceilings, clean, device_of, event_ms, parser, rounded, write_report
from verify import Wrong, relative_error

_OURS = ("cuda", "triton", "reference")
_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
_CALLS = 40
BLOCK_STEP, WHOLE_ROWS = (4, 8, 16, 32, 64, 128), 2048


def cases(
    name: str, length: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Operators and what makes a case of each; made one at a time, since some take gigabytes."""
    spec, small = SHAPES[name], name.startswith("small")
    tokens, whole = (12, 24) if small else (256, WHOLE_ROWS)
    windows = (4, 8) if small else BLOCK_STEP
    for count in (tokens, whole):
        yield "rms_norm", partial(op_cases.norm_case, spec, count, device, dtype)
        yield "swiglu", partial(op_cases.swiglu_case, spec, count, device, dtype)
        yield "rope_kv_write", partial(op_cases.rope_case, spec, count, device, dtype)
        yield "linear_rope_kv_write", partial(op_cases.linear_rope_case, spec, count, device, dtype)
    for queries, shared in ((windows, False), (windows, True), ((length,), False)):
        make = partial(op_cases.attention_case, spec, queries, length, shared, device, dtype)
        yield "varlen_attention", make
    for count in (min(windows) * 8, max(windows), sum(windows)):
        yield "lm_head_confidence", partial(op_cases.lm_head_case, spec, count, device, dtype)
    for mode in sampling_op_cases.MODES:
        make = partial(sampling_op_cases.sample_case, spec, max(windows), mode, device, dtype)
        yield "lm_head_sample", make
    yield "copy_pages", partial(state_op_cases.copy_case, spec, length, device, dtype)
    for op in state_op_cases.STEP_OPS:
        yield op, partial(state_op_cases.step_case, op, spec, length, device)
    for op in many_rows_cases.OPS:
        yield op, partial(many_rows_cases.many_rows_case, op, spec, length, device)


def outputs_of(case: Case, version: str) -> Outputs:
    case.reset(0)
    found = (*case.versions[version](0), *case.also_written())
    return tuple(tensor.clone() for tensor in found)


def check(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Raises `Wrong` if a version of this package fails; other packages' failures are only told."""
    plain = outputs_of(case, "torch")
    case.reset(0)
    truth = None if case.truth is None else case.truth()
    found = {}
    for name in case.versions:
        problem = None
        try:
            ours = outputs_of(case, name)
            if truth is None:
                for index, (value, expected) in enumerate(zip(ours, plain, strict=True)):
                    if not torch.equal(value, expected):
                        problem = f"output {index}: expected the reference's values, got others"
                found[name] = {"equal": problem is None}
            else:
                found[name], problem = _errors(ours, plain, truth, dtype)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"[:300]
        if problem:
            if name in _OURS:
                raise Wrong(f"{case.op} ({case.shape}), {name}: {problem}")
            found[name] = {"problem": problem}
    case.reset(0)
    return found


def _errors(
    ours: Outputs, plain: Outputs, truth: Outputs, dtype: torch.dtype
) -> tuple[dict[str, Any], str | None]:
    errors, problem = [], None
    for index, (value, torchs, true) in enumerate(zip(ours, plain, truth)):
        if not value.is_floating_point():
            # Top tokens: bf16 swaps some that are nearly equal.
            wrong, allowed = (int((tokens != true).sum()) for tokens in (value, torchs))
            allowed = 2 * allowed + 2
        else:
            wrong, allowed = relative_error(value, true), 2 * relative_error(torchs, true) + _ROUNDING[dtype]
        errors.append(wrong)
        if not wrong <= allowed:
            problem = f"output {index}: expected an error of at most {allowed:.2e}, got {wrong:.2e}"
    return {"errors": errors}, problem


def microseconds(case: Case, version: str, device: torch.device, repeats: int) -> tuple[float, str]:
    """(time of a call, how it was timed)."""
    run = case.versions[version]
    # The integer operators of the reference wait for the host, which no graph can hold.
    graph = device.type == "cuda" and (version != "torch" or case.truth is not None)
    calls = max(case.sets, _CALLS if graph else 3)

    def all_calls() -> None:
        for index in range(calls):
            if case.reset_each:
                case.reset(index % case.sets)
            run(index % case.sets)

    def resets() -> None:
        for index in range(calls):
            case.reset(index % case.sets)

    def total(work: Callable[[], None]) -> float:
        if graph:
            work = as_graph(work, device)
        else:
            work()
        return min(event_ms(work, device, repeats) for _ in range(2))

    taken = total(all_calls) - (total(resets) if case.reset_each else 0.0)
    case.reset(0)
    return 1e3 * taken / calls, "graph" if graph else "launched"


def measure(case: Case, device: torch.device, dtype: torch.dtype, limits: dict, repeats: int) -> dict:
    checks = check(case, dtype)
    floor = 1e6 * max(case.bytes / limits["copy_gb_per_s"] / 1e9, case.flops / limits["matmul_tflops"] / 1e12)
    versions = {}
    for name in case.versions:
        if "problem" in checks[name]:
            versions[name] = checks[name]
            continue
        taken, how = microseconds(case, name, device, repeats)
        taken = max(taken, 1e-3)
        versions[name] = {
            "us": taken,
            "gb_per_s": case.bytes / taken / 1e3,
            "tflops": case.flops / taken / 1e6,
            "percent_of_floor": 100 * floor / taken,
            "timed": how,
            **checks[name],
        }
    return {
        "op": case.op,
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": floor,
        "versions": versions,
        "absent": case.absent,
    }


def show(line: dict) -> str:
    times = ", ".join(
        f"{name} {value['us']:.1f}" if "us" in value else f"{name} failed ({value['problem'][:80]})"
        for name, value in line["versions"].items()
    )
    return f"{line['op']:20} {line['shape']:60} floor {line['floor_us']:7.1f} us: {times}"


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "ops", ["llada-8b", "dream-7b"])
    arguments.add_argument("--ops", nargs="*")
    arguments.add_argument("--length", type=int, default=1280)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    device, dtype = device_of(options), DTYPES[options.dtype]
    limits = ceilings(device, dtype)
    models = {}
    for name in options.shapes:
        lines = []
        for op, make in cases(name, options.length, device, dtype):
            if options.ops and op not in options.ops:
                continue
            line = measure(make(), device, dtype, limits, options.repeats)
            lines.append(rounded(line))
            print(f"{name} {show(line)}", flush=True)
            clean(device)
        models[name] = lines
    write_report(options, device, ceilings=limits, peers=peers.versions(), models=models)


if __name__ == "__main__":
    main()
