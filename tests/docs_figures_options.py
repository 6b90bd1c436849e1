"""Figures of sampling.md, custom_rules.md and engine.md, see `docs_figures.py`."""

from docs_values import named

_CPU = ["sampling_cpu.json"]
_TEMPERATURES = ("0.3", "0.7", "1.0", "1.5")


def sampled(label):
    """Right answers at temperature 0, then right answers and different texts at each other one."""

    def values(report):
        found = named(report["lines"], "label", label)["temperatures"]
        assert found["0"]["equal_to_greedy"] is True
        others = [found[temperature] for temperature in _TEMPERATURES]
        shown = [(100 * one["right"], one["different_texts"]) for one in others]
        return [100 * found["0"]["right"], *(value for pair in shown for value in pair)]

    return values


_STEPS_CPU, _STEPS, _LM_HEAD = ["step_options_cpu.json"], ["step_options.json"], ["ops_lm_head.json"]


def step(report, name, value="ms"):
    """Of the only line, or of that of 128 tokens."""
    line = report["lines"][0] if len(report["lines"]) == 1 else named(report["lines"], "tokens", 128)
    return line["steps"][name][value]


def lm_head(start):
    """Microseconds of the line whose shape has this end."""

    def values(report):
        (line,) = (
            line
            for line in report["models"]["llada-8b"]
            if f"{line['op']} {line['shape']}".endswith(start) and line["shape"].startswith("128 x")
        )
        return [line["versions"][name]["us"] for name in ("triton", "cuda")]

    return values


def most_spread(report):
    """In percent, of a step of 128 tokens."""
    steps = named(report["lines"], "tokens", 128)["steps"].values()
    return 100 * max(one["spread"] for one in steps)


_ROW = " | {:.0f}" + " | {:.0f} ({:.1f})" * 4 + " |"
_LABELS = {
    "blockbatch": "blockbatch",
    "dual cache": "dual cache",
    "dual cache, threshold 0.5": "dual cache, threshold 0.5",
    "dual cache, threshold 0.5, top_p 0.9": "dual cache, threshold 0.5, top_p 0.9",
    "block diffusion, block-causal model": "block diffusion",
}
SAMPLING = [
    *((f"| {shown}{_ROW}", _CPU, sampled(label)) for shown, label in _LABELS.items()),
    (
        "{} problems and {} seeds",
        _CPU,
        lambda report: [report["problems"], report["command"].split("--samples ")[1]],
    ),
    *(
        (f"| {shown} | {{:.0f}} | {{:.0f}} |", _LM_HEAD, lm_head(start))
        for shown, start in (
            ("greedy", "128 x 4096 x 126464"),
            ("temperature 1", "temperature 1"),
            ("the same with the entropy as confidence", "temperature 1, entropy"),
            ("the same with `top_p`", "temperature 1, top_p 0.9"),
        )
    ),
    (
        "took {:.2f} ms greedy, {:.2f} at temperature 1 and {:.2f} with `top_p`",
        _STEPS,
        lambda report: [
            step(report, name) for name in ("greedy", "temperature 1", "temperature 1, top_p 0.9")
        ],
    ),
    (
        "two medians of the same step lie up to {:.1f}% apart",
        _STEPS,
        lambda report: [most_spread(report)],
    ),
    (
        "the built-in model with its {} tokens, {} places a step",
        _STEPS_CPU,
        lambda report: [1416, report["lines"][0]["tokens"]],
    ),
    (
        "greedy {:.1f} ms of processor time, at temperature 1 {:.1f}, with `top_p` {:.1f}",
        _STEPS_CPU,
        lambda report: [
            step(report, name) for name in ("greedy", "temperature 1", "temperature 1, top_p 0.9")
        ],
    ),
]
CUSTOM_RULES = [
    (
        "the built-in model, {} tokens ([step_options_cpu.json]): {:.1f} ms of processor time beside {:.1f}, "
        "where two medians of the same step lie up to {:.0f}% apart. The two surest tokens took {:.1f} ms",
        _STEPS_CPU,
        lambda report: [
            report["lines"][0]["tokens"],
            step(report, "its threshold rule"),
            step(report, "greedy"),
            100 * max(one["spread"] for one in report["lines"][0]["steps"].values()),
            step(report, "the two surest"),
        ],
    ),
    (
        "128 tokens ([step_options.json]): {:.2f} ms beside {:.2f} in a captured step",
        _STEPS,
        lambda report: [step(report, "its threshold rule"), step(report, "greedy")],
    ),
    (
        "a step takes {:.1f} ms on the clock in place of {:.1f}",
        _STEPS,
        lambda report: [
            step(report, name, "clock_ms") for name in ("its threshold rule, no graphs", "greedy")
        ],
    ),
]

_ROW_OPS = ("attention_plan", "copy_pages", "pack_windows", "decode_policy", "share_pages")


def many_rows(report):
    """Microseconds of the CUDA C++ operators around the model."""
    shape = "64 requests, 384 rows, 16128 tokens, 1280 positions"
    ops = report["models"]["llada-8b"]
    return [
        next(op["versions"]["cuda"]["us"] for op in ops if (op["op"], op["shape"]) == (name, shape))
        for name in _ROW_OPS
    ]


MANY_ROWS = [
    (
        "takes {:.0f} us to plan attention, {:.0f} for copy on write, {:.0f} to pack, {:.0f} for the policy "
        "and {:.0f} to share pages",
        ["ops_many_rows.json"],
        many_rows,
    )
]
