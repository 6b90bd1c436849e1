"""Decodes of the built-in block diffusion model: right answers, forwards and seconds, rule against rule.

    python bench/block_decodes.py                                    # all parts
    python bench/block_decodes.py --parts problems --rules static    # one rule anew, others as reported

The parts; each is written into the same report when it is done:

held_out    Settings of BlockBatch on held-out problems. The one to take needs the fewest forwards of those
            with at least as many right answers as the published rule there: the defaults.
problems    Test problems by every rule, each compared with the published one and with the same in joined
            forwards on the same problems: exact McNemar, paired bootstrap of the forwards. `steps` takes the
            saving apart. One token a forward is slow and decodes the first `--static-count` of each family.
seconds     A few of the test problems one at a time, the rules in turn.
texts       Texts of twelve test problems each: right answers by place in the text.

First the decodes are verified: joined stores (`fuse_store`) keep the published tokens and save one forward
for each joined one, and a decode alone is that of a batch. The script ends with status 1 where a problem's
tokens change by joined stores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import block_report
import torch
from block_report import Decodes

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe
from blockbatch.tasks.built_in.several import check_answers, draw_texts, join

RESULT = Path(__file__).parent / "results" / "block_decodes.json"
SEED = 1
GEN_LENGTH, TEXT_LENGTH, PROBLEMS_A_TEXT = 256, 1536, 12
STATIC, PUBLISHED, JOINED, ONE_BRANCH, BLOCKBATCH = (
    "static", "published", "joined", "one_branch", "blockbatch"
)  # fmt: skip
_PUBLISHED = {"method": "block_diffusion", "threshold": 0.9}
RULES: dict[str, dict[str, Any]] = {
    STATIC: {"method": "block_diffusion", "commit": "static", "fuse_store": False},
    PUBLISHED: {**_PUBLISHED, "fuse_store": False},
    JOINED: {**_PUBLISHED, "fuse_store": True},
    ONE_BRANCH: {"block_sizes": (32,)},
    BLOCKBATCH: {},  # the setting to take by the part held_out: the defaults
}
TEXT_RULES = (PUBLISHED, JOINED, BLOCKBATCH)
CANDIDATES: tuple[dict[str, Any], ...] = (
    {},
    {"sync_threshold": 2},
    {"sync_threshold": 4},
    {"block_sizes": (8, 16, 32)},
    {"threshold": 0.85},
    {"threshold": 0.8, "tail_threshold": 0.95},
    {"commit": "local_leap", "leap_threshold": 0.85},
    {"commit": "local_leap", "threshold": 0.95, "leap_threshold": 0.85},
    {"commit": "local_leap", "leap_radius": 1},
    {"threshold": 0.95},
)


def label_of(options: dict[str, Any]) -> str:
    words = [
        f"{name} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in options.items()
    ]
    return ", ".join(words) or BLOCKBATCH


class Judge:
    """Whether answers are right; equal answers are judged once, since code runs in a process of its own."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, problem: tiny.Problem, text: str) -> bool:
        key = problem.prompt, text
        if key not in self._known:
            self._known[key] = tiny.check(problem, text)
        return self._known[key]


def drawn(split: str, count: int) -> list[tiny.Problem]:
    """`count` problems of each family, family by family."""
    return [
        problem for family in tiny.FAMILIES for problem in tiny.generate_problems(family, split, count, SEED)
    ]


def decode(
    model: blockbatch.Model, prompts: Sequence[str], batch_size: int, length: int, **options: Any
) -> list[blockbatch.Result]:
    config = blockbatch.DecodeConfig(gen_length=length, **options)
    results: list[blockbatch.Result] = []
    for first in range(0, len(prompts), batch_size):
        results += blockbatch.generate(model, list(prompts[first : first + batch_size]), config)
    return results


def measure(
    model: blockbatch.Model,
    prompts: Sequence[str],
    judge: Callable[[int, str], Sequence[bool]],
    batch_size: int,
    length: int,
    rule: dict[str, Any],
) -> Decodes:
    """Decodes all prompts by a rule; `judge` says of a prompt's number and text which answers are right."""
    begun = time.perf_counter()
    results = decode(model, prompts, batch_size, length, **rule)
    seconds = time.perf_counter() - begun
    right = [answer for index, one in enumerate(results) for answer in judge(index, one.text)]
    return Decodes(
        options=rule,
        right="".join(str(int(answer)) for answer in right),
        **{kind: [getattr(one.nfe, kind) for one in results] for kind in block_report.KINDS},
        ids=[zlib.crc32(str(one.tokens).encode()) for one in results],
        seconds=round(seconds, 2),
    )


def verify(model: blockbatch.Model, problems: Sequence[tiny.Problem]) -> None:
    """Raises SystemExit unless the decodes are what the other parts take for granted."""
    prompts = [problem.prompt for problem in problems]
    alone = {
        name: decode(model, prompts, 1, GEN_LENGTH, trace=True, **RULES[name])
        for name in (PUBLISHED, JOINED, BLOCKBATCH)
    }
    together = {name: decode(model, prompts, len(prompts), GEN_LENGTH, **RULES[name]) for name in alone}
    for index, prompt in enumerate(prompts):
        published, joined = alone[PUBLISHED][index], alone[JOINED][index]
        if published.tokens != joined.tokens:
            raise SystemExit(f"block_decodes: joined stores change the tokens of {prompt!r}")
        saved = sum(record["kind"] == "fused" for record in joined.trace)
        if published.nfe.total - joined.nfe.total != saved:
            raise SystemExit(f"block_decodes: {prompt!r}: expected {saved} forwards saved by joined stores")
        for name in alone:
            one, other = alone[name][index], together[name][index]
            if (one.canvas, one.nfe) != (other.canvas, other.nfe):
                raise SystemExit(f"block_decodes: {prompt!r} by {name}: alone not as in a batch")


def held_out(model: blockbatch.Model, options: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """The part of that name."""
    problems, known, found = drawn("held_out", options.held_out_count), Judge(), []
    prompts = [problem.prompt for problem in problems]

    def judge(index: int, text: str) -> list[bool]:
        return [known(problems[index], text)]

    for settings in (RULES[PUBLISHED], *CANDIDATES[: options.candidates]):
        mine = measure(model, prompts, judge, options.batch_size, GEN_LENGTH, settings)
        label = label_of(settings) if found else PUBLISHED
        line = {"setting": label, "options": settings, **block_report.accuracy(mine.right)}
        found.append(line | {"nfe": block_report.mean_nfe(mine)})
        print(f"{label:60} {found[-1]['right']:4} {found[-1]['nfe']['total']:7.3f}", flush=True)
    keeping = [line for line in found[1:] if line["right"] >= found[0]["right"]]
    best = min(keeping, key=lambda line: line["nfe"]["total"]) if keeping else found[1]
    return {"split": "held_out", "seed": SEED, "to_take": best["setting"], "lines": found}


def on_problems(model: blockbatch.Model, options: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """The part "problems"; `kept` is what the report has of it."""
    problems, known = drawn("test", options.count), Judge()
    records = {name: Decodes.read(record) for name, record in kept.get("records", {}).items()}
    for name in options.rules or RULES:
        taken = options.static_count if name == STATIC else options.count
        mine = [problem for at, problem in enumerate(problems) if at % options.count < taken]

        def judge(index: int, text: str, mine: list[tiny.Problem] = mine) -> list[bool]:
            return [known(mine[index], text)]

        prompts = [problem.prompt for problem in mine]
        records[name] = measure(model, prompts, judge, options.batch_size, GEN_LENGTH, RULES[name])
        print(f"{name:12} {block_report.mean_nfe(records[name])}", flush=True)
    records = {name: records[name] for name in RULES if name in records}
    found = {"split": "test", "seed": SEED, "gen_length": GEN_LENGTH, "batch_size": options.batch_size}
    found["lines"] = block_report.lines(records, (PUBLISHED, JOINED), tiny.FAMILIES)
    if set(records) == set(RULES):
        found["steps"] = block_report.steps(*(records[name] for name in list(RULES)[1:]))
    return found | {"records": {name: one.record() for name, one in records.items()}}


def seconds(model: blockbatch.Model, options: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """The part of that name."""
    names = [name for name in RULES if name != STATIC]
    problems, found = drawn("test", options.timed_count), {name: [] for name in names}
    for problem in problems:
        for name in names:
            found[name] += decode(model, [problem.prompt], 1, GEN_LENGTH, **RULES[name])
    times = {name: [one.seconds for one in mine] for name, mine in found.items()}
    return {
        "problems": len(problems),
        "lines": [
            {
                "rule": name,
                "seconds": round(statistics.mean(mine), 4),
                "against_published": block_report.ratio(mine, times[PUBLISHED]),
                "nfe": round(statistics.mean(one.nfe.total for one in found[name]), 3),
            }
            for name, mine in times.items()
        ],
    }


def on_texts(model: blockbatch.Model, options: argparse.Namespace, kept: dict[str, Any]) -> dict[str, Any]:
    """The part "texts"; `kept` is what the report has of it."""
    problems = drawn("test", -(-options.texts * PROBLEMS_A_TEXT // len(tiny.FAMILIES)))
    texts = draw_texts(problems, PROBLEMS_A_TEXT, SEED)[: options.texts]
    pairs = [join(text) for text in texts]
    lengths = [sum(len(model.tokenizer.encode(part)) for part in pair) for pair in pairs]
    prompts = [prompt for prompt, _ in pairs]
    records = {name: Decodes.read(record) for name, record in kept.get("records", {}).items()}

    def judge(index: int, text: str) -> list[bool]:
        return check_answers(texts[index], text)

    for name in options.rules or TEXT_RULES:
        records[name] = measure(model, prompts, judge, options.text_batch, TEXT_LENGTH, RULES[name])
        print(f"{name:12} {block_report.mean_nfe(records[name])}", flush=True)
    records = {name: records[name] for name in TEXT_RULES if name in records}
    found = block_report.lines(records, (PUBLISHED, JOINED), ())
    for line, mine in zip(found, records.values(), strict=True):
        answers = [mine.right[at::PROBLEMS_A_TEXT] for at in range(PROBLEMS_A_TEXT)]
        line["right_by_place"] = [place.count("1") for place in answers]
    return {
        "split": "test",
        "seed": SEED,
        "gen_length": TEXT_LENGTH,
        "texts": len(texts),
        "problems_a_text": PROBLEMS_A_TEXT,
        "batch_size": options.text_batch,
        "tokens_a_text": {
            "least": min(lengths),
            "mean": round(statistics.mean(lengths)),
            "most": max(lengths),
        },
        "lines": found,
        "records": {name: one.record() for name, one in records.items()},
    }


PARTS = {"held_out": held_out, "problems": on_problems, "seconds": seconds, "texts": on_texts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rules", nargs="+", choices=RULES, help="of problems and texts (all)")
    parser.add_argument("--count", type=int, default=200, help="test problems of each family (200)")
    parser.add_argument("--static-count", type=int, default=20, help="of them, by one token a forward (20)")
    parser.add_argument("--timed-count", type=int, default=10, help="of them, one at a time (10)")
    parser.add_argument("--held-out-count", type=int, default=60, help="held-out ones of each family (60)")
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="so many settings (all)")
    parser.add_argument("--batch-size", type=int, default=30, help="problems decoded together (30)")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--text-batch", type=int, default=8, help="texts decoded together (8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = blockbatch.load_model(
        "tiny-block", device=options.device, dtype="float32", backend=options.backend
    )
    header = {
        "command": "python bench/block_decodes.py",  # whose parts may have run apart
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **describe(model.device),
        "dtype": "float32",
        "backend": options.backend,
    }
    verify(model, drawn("test", 1))
    for part in options.parts:
        begun = time.perf_counter()
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        found = PARTS[part](model, options, kept.get(part, {}))
        found |= {"part_seconds": round(time.perf_counter() - begun, 1)}
        # Another process may have written another part meanwhile.
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        report = {**header, **{name: kept[name] for name in PARTS if name in kept}, part: found}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        for line in found["lines"]:
            print(part, {name: value for name, value in line.items() if name != "options"}, flush=True)
            same = line.get("against_published", {}).get("same_tokens", line.get("problems"))
            if line.get("rule") == JOINED and part == "problems" and same != line["problems"]:
                raise SystemExit("block_decodes: joined stores change tokens; see the report")


if __name__ == "__main__":
    main()
