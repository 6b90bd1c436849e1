"""Latency of a refresh (whole rows) by the number of rows that differ, in published shapes.

    python bench/refresh.py [--shapes llada-8b dream-7b] [--length 1280]

A request of six branches is brought to a refresh in which only so many of its rows hold different tokens; the
engine computes each distinct row once and shares its pages: all of it (scope "canvas"), or its generation
region alone ("generation"). On each line:

    ours_ms         from the plan on the host to the plan of the next step, median by events: whole rows as
                    CUDA graphs, where the engine captures them
    launched_ms     the same with every operator launched as it is
    turn_ms         the same as graphs and launched, on the host's clock: from a GPU that is idle to the next
                    plan on the host, which is what a turn of the decoding loop takes
    parts_ms        the same by part, from the profiler's times of its kernels (the fastest of three)
    products_ms     the matrix products of those rows alone, by cuBLAS, in a CUDA graph on the same weights,
                    in turns with ours
    over_products_and_attention   ours over products and the engine's own attention together
    eager_ms        the same refresh in plain torch, launched operator by operator (see eager.py)

First every refresh is checked: hidden states, top tokens and confidences of the distinct rows against fp32
arithmetic, with the reference backend's distance from it as the measure, and rows of equal tokens must end
with equal pages, tokens and confidences.
"""

from __future__ import annotations

import parts
import torch
from cases import Snapshot, host_plan, policy
from eager import EagerModel
from products import products
from random_models import DTYPES, product_bytes, random_model, random_prompt, step_flops
from timing import (
    ceilings,
    clean,
    device_of,
    in_turns,
    parser,
    rounded,
    target,
    wall_ms,
    write_report,
)
from verify import Wrong, check_hidden, check_predictions, hidden_states

from blockbatch.config import REFRESH_SCOPES
from blockbatch.decoding import Method, Session
from blockbatch.decoding.forward import whole_rows
from blockbatch.decoding.session import ROW_TOKENS, new_runner
from blockbatch.models import Model
from blockbatch_kernels import PHASES
from blockbatch_kernels.reference.plan import next_plan, write

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)


class RefreshCase:
    """A request whose next forward is a refresh of `distinct` different rows."""

    def __init__(
        self, model: Model, distinct: int, prompt_length: int, gen_length: int, scope: str = "canvas"
    ) -> None:
        self.model = model
        sizes = tuple(size for size in BLOCK_SIZES if size <= gen_length)
        method = Method(sizes, policy(model, refresh_scope=scope))
        runner = new_runner(model, 1, method, gen_length, prompt_length)
        self.batch, self.row_graphs = runner.batch, runner.row_graphs
        session = Session(
            model, [random_prompt(model.spec, prompt_length)], method, gen_length, runner=runner
        )
        session.step()
        # Every row holds the first tokens of one text; rows 1, 2, ... one token more than the row before.
        state = self.batch.state
        text = torch.tensor(random_prompt(model.spec, gen_length, seed=1), dtype=torch.int32)
        state.tokens.fill_(model.spec.mask_token_id)
        for row in range(len(sizes)):
            count = min(row, distinct - 1) + 1
            state.tokens[row, :count] = text[:count].to(model.device)
        state.needs_refresh.fill_(True)
        write(next_plan(state, method.params), self.batch.plan)
        self.plan = host_plan(self.batch)
        rows = [length for length in self.plan.query_lengths if length]
        if PHASES[self.plan.phase] != "refresh" or len(rows) != distinct:
            raise Wrong(f"plan: expected a refresh of {distinct} rows, got rows of {rows} tokens")
        self.tokens, self.predictions = sum(rows), self.plan.predictions
        self.snapshot = Snapshot(self.batch)

    def run(self) -> None:
        whole_rows(self.model, self.batch, self.plan, ROW_TOKENS[self.model.device.type], self.row_graphs)

    def launch(self) -> None:
        """The same without graphs."""
        whole_rows(self.model, self.batch, self.plan, ROW_TOKENS[self.model.device.type])

    def warm(self) -> None:
        """What is captured at all is captured behind the second forward of its sizes."""
        for _ in range(3):
            self.run()
            self.snapshot.restore()


def check(case: RefreshCase) -> dict:
    """Raises `Wrong` if the refresh is further from fp32 arithmetic than its dtype explains."""
    batch, state = case.batch, case.batch.state
    case.snapshot.restore()
    source = batch.plan.source_row.long().clone()
    batch.cache.prepare(batch.plan)
    hidden = hidden_states(case)
    found = check_hidden(hidden, case.model.dtype, None)
    case.snapshot.restore()
    case.run()
    top_token, confidence = (
        values.flatten()[hidden.predict_target] for values in (state.top_token, state.confidence)
    )
    found |= check_predictions(case, hidden, top_token, confidence)
    for name, values in (
        ("pages", batch.cache.page_table),
        ("top tokens", state.top_token),
        ("confidences", state.confidence),
    ):
        if not torch.equal(values, values[source]):
            raise Wrong(f"{name}: expected rows of equal tokens to be equal after a refresh, got others")
    case.snapshot.restore()
    return found


def measure(model: Model, distinct: int, length: int, scope: str, limits: dict, repeats: int) -> dict:
    gen_length = min(256, length // 2)
    case = RefreshCase(model, distinct, length - gen_length, gen_length, scope)
    device = model.device
    case.warm()
    checks = check(case)
    alone = products(model, case.tokens, case.predictions)
    restore = case.snapshot.restore
    (ours, spread), (launched, _), (alone_ms, alone_spread) = in_turns(
        [(case.run, restore), (case.launch, restore), (alone, None)], device, repeats
    )
    turns = {}
    for name, run in (("graphs", case.run), ("launched", case.launch)):
        turns[name] = wall_ms(lambda run=run: (run(), case.batch.host_plan()), device, repeats, restore)
    line = {
        "model": model.name,
        "distinct_rows": distinct,
        "length": length,
        "scope": scope,
        "tokens": case.tokens,
        "predictions": case.predictions,
        "ours_ms": ours,
        "ours_spread": spread,
        "replays": case.row_graphs.replays if case.row_graphs else 0,
        "launched_ms": launched,
        "turn_ms": turns,
        "products_ms": alone_ms,
        "products_spread": alone_spread,
        "over_products": ours / alone_ms,
        "floor_ms": max(
            product_bytes(model.weights) / limits["copy_gb_per_s"] / 1e6,
            step_flops(model.spec, case.tokens, case.predictions, length) / limits["matmul_tflops"] / 1e9,
        ),
    }
    del alone
    eager = RefreshCase(EagerModel(model), distinct, length - gen_length, gen_length, scope)
    line["eager_ms"] = wall_ms(eager.run, device, 2, eager.snapshot.restore)
    line["checks"] = checks
    return line


def add_parts(model: Model, line: dict) -> None:
    """Adds the time of each part of the line's refresh."""
    gen_length = min(256, line["length"] // 2)
    case = RefreshCase(model, line["distinct_rows"], line["length"] - gen_length, gen_length, line["scope"])
    case.warm()
    kernels = parts.record(case.run, model.device, case.snapshot.restore)
    line["parts_ms"] = rounded(parts.split(kernels, model.spec.num_layers))
    line["kernels"] = parts.by_name(kernels, 16)
    without = line["products_ms"] + line["parts_ms"]["attention"]
    line["over_products_and_attention"] = round(line["ours_ms"] / without, 4)


def name_of(line: dict) -> str:
    return f"{line['model']:11} {line['scope']:10} {line['distinct_rows']} rows, {line['tokens']:5} tokens:"


def show(line: dict) -> str:
    return (
        f"{name_of(line)}"
        f" ours {line['ours_ms']:.2f} ms (+-{line['ours_spread']:.1%}), launched {line['launched_ms']:.2f},"
        f" a turn {line['turn_ms']['graphs']:.2f} / {line['turn_ms']['launched']:.2f},"
        f" products {line['products_ms']:.2f},"
        f" floor {line['floor_ms']:.2f}, eager {line['eager_ms']:.1f}"
    )


@torch.inference_mode()
def main() -> None:
    arguments = parser(__doc__, "refresh", ["llada-8b", "dream-7b"])
    arguments.add_argument("--length", type=int, default=1280)
    arguments.add_argument("--rows", nargs="*", type=int, choices=range(1, 7))
    arguments.add_argument("--scopes", nargs="*", default=REFRESH_SCOPES, choices=REFRESH_SCOPES)
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    device = device_of(options)
    limits = ceilings(device, DTYPES[options.dtype])
    lines = []
    for name in options.shapes:
        model = random_model(name, device, DTYPES[options.dtype], backend=options.backend)
        for distinct in options.rows or ((1, 6) if options.quick else range(1, 7)):
            for scope in options.scopes:
                line = measure(model, distinct, options.length, scope, limits, options.repeats)
                lines.append(rounded(line))
                print(show(line), flush=True)
                clean(device)
        del model
    parts.add_to_lines(options, device, lines, add_parts, name_of)
    found = [
        target(
            f"{line['model']}, {line['scope']}, {line['distinct_rows']} rows: times products and attention",
            line["over_products_and_attention"],
            1.15,
        )
        for line in lines
        if "over_products_and_attention" in line
    ]
    write_report(options, device, ceilings=limits, targets=found, lines=lines)


if __name__ == "__main__":
    main()
