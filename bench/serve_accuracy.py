"""What settings for a server under load cost in right answers and save in tokens, on the built-in model.

    python bench/serve_accuracy.py [--count 100]

All problems of the test split go through one engine. Of every setting: right answers, with those of the dual
cache beside them (McNemar's test on the same problems), forwards of an answer, and packed tokens that were
forwarded for each token before the end of the texts. "One branch" is what an engine that is full gives.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from frontier import Judge
from serve_settings import SETTINGS, config_of
from timing import write_report

import blockbatch
from blockbatch import tiny
from blockbatch.decoding.engine import Engine
from blockbatch.evaluation import statistics

RESULTS = Path(__file__).parent / "results"
_REFERENCE = "dual_cache"
# Name -> setting and branches; None: as the setting says.
_RUNS = {
    "dual_cache": ("dual_cache", None),
    "careful": ("careful", None),
    "dual_cache, open, generation": ("dual_cache, open, generation", None),
    "fast": ("fast", None),
    "fast, one branch": ("fast, branches by load", 1),
    "blockbatch": ("blockbatch", None),
    "blockbatch, one branch": ("blockbatch, branches by load", 1),
}


def answers(model: Any, problems: list[Any], name: str, options: argparse.Namespace) -> dict[str, Any]:
    setting, branches = _RUNS[name]
    config = config_of(setting, options.gen_length, branches)
    engine = Engine(model, max_requests=options.at_a_time, max_queue=len(problems))
    requests = [engine.submit(model.tokenizer.encode(problem.prompt), config) for problem in problems]
    engine.run_until_idle()
    failed = [request.error for request in requests if request.error is not None]
    if failed:
        raise SystemExit(f"{name}: {failed[0]!r}")
    stats = engine.stats()
    engine.close()
    tokens = sum(len(request.result.tokens) for request in requests)
    return {
        "texts": [request.result.text for request in requests],
        "nfe": sum(request.nfe.total for request in requests) / len(requests),
        "forwarded_per_token": stats.tokens / tokens,
        "tokens": tokens / len(requests),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=100, help="problems of each family")
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--at-a-time", type=int, default=32)
    parser.add_argument("--runs", nargs="*", choices=_RUNS, default=list(_RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_accuracy.json")
    parser.set_defaults(dtype="float32", backend=None)
    options = parser.parse_args()
    model = blockbatch.load_model("tiny", device=options.device, dtype=options.dtype)
    problems = [
        problem
        for family in tiny.FAMILIES
        for problem in tiny.generate_problems(family, "test", options.count, seed=0)
    ]
    judge, lines, reference = Judge(), [], None
    for name in options.runs:
        found = answers(model, problems, name, options)
        right = judge(problems, found.pop("texts"))
        reference = right if name == _REFERENCE else reference
        line = {"run": name, "options": SETTINGS[_RUNS[name][0]], "problems": len(right), "right": sum(right)}
        line |= {"right_95": list(statistics.wilson(sum(right), len(right))), **found}
        if reference is not None and name != _REFERENCE:
            pairs = list(zip(right, reference, strict=True))
            only, other = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            line |= {"only_this": only, "only_dual_cache": other, "p": statistics.mcnemar(only, other)}
        lines.append(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
        )
        print(json.dumps(lines[-1]), flush=True)
    write_report(options, model.device, model="tiny", gen_length=options.gen_length, lines=lines)


if __name__ == "__main__":
    main()
