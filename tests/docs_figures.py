"""Which figures of README.md and docs/ come from which file of bench/results, and how.

A row of `FIGURES[page]`: a text of the page with its figures as fields of `str.format`, the files, and a
function that takes their contents and gives the values of the fields. `WITHOUT_FILE[page]`: patterns of the
numbers that are no results, such as versions, for pages on which every other number stands in such a text.
"""

from docs_figures_fp8 import FP8_HEAD
from docs_figures_models import BLOCK_MODELS, DREAM, IN_SHORT, QUANTIZATION, SERVING
from docs_figures_options import CUSTOM_RULES, MANY_ROWS, SAMPLING
from docs_figures_performance import PERFORMANCE, PERFORMANCE_WITHOUT_FILE
from docs_figures_ranks import RANKS
from docs_values import DREAM_PARAMETERS, LLADA_PARAMETERS, clock, memory, named

_ROW = " | {:.0f} | {:.0f} | {:.0f} | {:.1f}% | {:.1f} |"
_BOLD = " | **{:.0f}** | **{:.0f}** | **{:.0f}** | {:.1f}% | {:.1f} |"
_CLOCK = ["clock.json"]

README = [
    (f"dual cache (Fast-dLLM), as published{_ROW}", _CLOCK, clock("dual_cache")),
    (f"LocalLeap, as published{_ROW}", _CLOCK, clock("local_leap")),
    (f"BlockBatch, as published{_ROW}", _CLOCK, clock("blockbatch")),
    (f"preset `careful`{_ROW}", _CLOCK, clock("dual_cache, generation, drafts 1-2-3")),
    (f"preset `fast`{_BOLD}", _CLOCK, clock("blockbatch 4..64, leap, open")),
    ("a small model on {} problems", _CLOCK, lambda report: [report["answers"][0]["problems"]]),
    ("One answer of up to {} tokens on", _CLOCK, lambda report: [report["gen_length"]]),
    (
        "LLaDA-8B takes {:.1f} GB for its weights in bf16, {:.1f} GB for the cache of six branches of "
        "{} positions, "
        "and {:.1f} GB beside",
        ["decode.json"],
        lambda report: [
            2 * LLADA_PARAMETERS / 1e9,
            memory(report)["cache_gb"],
            memory(report)["canvas_length"],
            memory(report)["reserved_beyond_gb"],
        ],
    ),
]


def demo(*labels):
    def values(report):
        rows = [named(report["rows"], "label", label) for label in labels]
        first = report["rows"][0]["seconds"]
        return [
            value
            for row in rows
            for value in (row["right"], row["judged"], row["nfe"], row["seconds"], first / row["seconds"])
        ]

    return values


_DEMO = "| {}/{} | {:.1f} | {:.2f} | {:.1f} |"
_DEMO_ROWS = ("vanilla", "dual_cache", "local_leap", "vanilla +eos", "dual_cache +eos", "local_leap +eos")
TERMINAL = [
    (f"| {label} {_DEMO}", ["demo.json"], demo(label))
    for label in (*_DEMO_ROWS, "blockbatch", "fast", "careful")
]


def percent(value):
    return 100 * value


def evaluated(label):
    def values(report):
        row = report["overall"][label]
        low, high = map(percent, row["interval_95"])
        nfe = row["nfe"]
        return [
            percent(row["accuracy"]), low, high, nfe["total"], nfe["init"], nfe["block"], nfe["refresh"],
            row["seconds"], row["tokens_per_second"],
        ]  # fmt: skip

    return values


_EVAL = ["eval/summary.json"]
_COMPONENTS, _COMMIT = ["ablations/components/summary.json"], ["ablations/commit/summary.json"]
_FAMILIES = ("arithmetic", "code", "symbolic")


def by_family(label):
    return lambda report: [
        value
        for family in _FAMILIES
        for value in (
            percent(report["by_task"][family][label]["accuracy"]),
            report["by_task"][family][label]["nfe"]["total"],
        )
    ]


def ablated(kind, setting):
    def values(report):
        change = named(report["rows"], "setting", setting)["against_default"]["nfe"]
        return [percent(abs(value - 1)) for value in (change["ratio"], *change["interval_95"])]

    return values


def frontier(report):
    ours, published, dual = report["splits"]["test"]
    against = ours["against"]
    held_out = named(report["splits"]["held_out"], "setting", report["chosen"])["against"]["vanilla"]
    return [
        ours["problems"], percent(1 - against["dual_cache"]["nfe_ratio"]), ours["nfe"], dual["nfe"],
        percent(ours["accuracy"]), percent(dual["accuracy"]), percent(published["accuracy"]),
        published["nfe"],
        against["blockbatch"]["only_this_right"], against["blockbatch"]["only_the_other_right"],
        against["blockbatch"]["mcnemar_p"], 900, held_out["points"], *held_out["points_95"],
    ]  # fmt: skip


_FULL = (
    "| {} | {{:.0f}} [{{:.0f}}, {{:.0f}}] | {{:.1f}} ({{:.0f}} + {{:.1f}} + {{:.1f}}) | {{:.2f}} | {{:.0f}} |"
)
EVALUATION = [
    (_FULL.format(label), _EVAL, evaluated(label))
    for label in (
        "dual_cache", "prefix_cache +eos", "dual_cache +eos", "local_leap +eos", "blockbatch", "tail",
    )
] + [
    (
        f"| {label} | {{:.0f}}%, {{:.1f}} | {{:.0f}}%, {{:.1f}} | {{:.0f}}%, {{:.1f}} |",
        _EVAL,
        by_family(label),
    )
    for label in ("prefix_cache +eos", "dual_cache +eos", "local_leap +eos", "blockbatch")
] + [
    (
        "On {} test problems it needs {:.0f}% fewer forwards than the dual cache with the same end "
        "({:.2f} against "
        "{:.2f}), with {:.1f}% right against {:.1f}%; the published rule has {:.1f}% at {:.2f} ({} "
        "problems only the "
        "option solves, {} only the published rule, p = {:.2f}). On {} held-out problems it is {:+.1f} "
        "points "
        "[{:+.1f}, {:+.1f}]",
        ["frontier.json"],
        frontier,
    ),
    ("Without sync a decode needs {:.0f}% more forwards [-{:.0f}, +{:.0f}]", _COMPONENTS,
     ablated("components", "sync")),
    ("without merge {:.0f}% more [-{:.0f}, +{:.0f}]", _COMPONENTS,
     ablated("components", "merge")),
    ("without all three {:.0f}% more [+{:.0f}, +{:.0f}]", _COMPONENTS,
     ablated("components", "all three")),
    ("it needs {:.0f}% fewer [-{:.0f}, -{:.0f}]", _COMMIT, ablated("commit", "local_leap")),
]  # fmt: skip


def _dream_memory():
    return [2 * DREAM_PARAMETERS / 1e9, 2 * 2 * 28 * 512 / 1e6]


REAL_WEIGHTS = [
    (
        "six branches of {} places takes {:.1f} GB of cache in LLaDA-8B and {:.1f} GB beside",
        ["decode.json"],
        lambda report: [memory(report)[key] for key in ("canvas_length", "cache_gb", "reserved_beyond_gb")],
    ),
    (
        "| LLaDA-8B, LLaDA-1.5 | {:.1f} GB | {:.2f} MB |",
        [],
        lambda: [2 * LLADA_PARAMETERS / 1e9, 2 * 2 * 32 * 4096 / 1e6],
    ),
    (
        "| Dream-7B | {:.1f} GB | {:.2f} MB |",
        [],
        lambda: [2 * DREAM_PARAMETERS / 1e9, 2 * 2 * 28 * 512 / 1e6],
    ),
]

FIGURES = {
    "README.md": [*README, *IN_SHORT],
    "docs/performance.md": PERFORMANCE,
    "docs/terminal.md": TERMINAL,
    "docs/evaluation.md": EVALUATION,
    "docs/real_weights.md": REAL_WEIGHTS,
    "docs/block_models.md": BLOCK_MODELS,
    "docs/dream.md": DREAM,
    "docs/quantization.md": [*QUANTIZATION, *FP8_HEAD],
    "docs/sampling.md": SAMPLING,
    "docs/custom_rules.md": CUSTOM_RULES,
    "docs/tensor_parallel.md": RANKS,
    "docs/serving.md": SERVING,
    "docs/engine.md": MANY_ROWS,
}
WITHOUT_FILE = {
    "README.md": [
        r"prompt of \d+", r"Dream-7B, 1024", r"torch 2\.11\.0, CUDA 13\.0", r"H100 80GB", r"LLaDA-1\.5",
        r"Python 3\.10",
        r"RTX \d+", r"a GPU of 24 GB", r"`\d`: never", r"Apache-2\.0", r"arXiv \d+\.\d+",
        # Of the paper's table, which docs/real_weights.md has as a whole.
        r"256 tokens \(its Table 1\).*?63\.2",
    ],
    "docs/performance.md": PERFORMANCE_WITHOUT_FILE,
}  # fmt: skip
