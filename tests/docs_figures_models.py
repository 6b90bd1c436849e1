"""The figures of docs/block_models.md, dream.md, quantization.md and serving.md, as docs_figures.py says."""

from docs_values import lines, named

_DECODES, _STEPS, _DREAM = ["block_decodes.json"], ["block_steps.json"], ["dream_rules.json"]
_PREFILL = {"forward": "prefill", "block_size": 32}
_MODELS = ("sdar-8b", "fast-dllm-v2-7b")


def percent(value):
    return 100 * value


def rule(name):
    """Right answers with their interval, forwards by phase and in all; of the published rule's."""

    def values(report):
        row = named(report["problems"]["lines"], "rule", name)
        found = [percent(value) for value in (row["accuracy"], *row["accuracy_95"])]
        found += [row["nfe"][phase] for phase in ("prefill", "denoise", "store", "total")]
        if "against_published" in row:
            nfe = row["against_published"]["nfe"]
            found += [percent(value) for value in (nfe["ratio"], *nfe["ratio_95"])]
        return found

    return values


def against(report, key="against_published"):
    return named(report["problems"]["lines"], "rule", "blockbatch")[key]


def saved_branches(report):
    way = named(report["problems"]["steps"], "way", "several_branches")["of_the_way_before"]
    low, high = way["ratio_95"]
    return [percent(1 - way["ratio"]), percent(1 - high), percent(1 - low)]


def fewer_than_joined(report):
    nfe = against(report, "against_joined")["nfe"]
    low, high = nfe["ratio_95"]
    return [percent(1 - nfe["ratio"]), percent(1 - high), percent(1 - low)]


def way(name):
    def values(report):
        row = named(report["problems"]["steps"], "way", name)
        return [row["nfe"], percent(row["saved_of_published"])]

    return values


def long_text(name):
    def values(report):
        row = named(report["texts"]["lines"], "rule", name)
        found = [row["right"], row["nfe"]["total"]]
        if name != "published":
            nfe = row["against_published"]["nfe"]
            found += [percent(value) for value in (nfe["ratio"], *nfe["ratio_95"])]
        return found

    return values


def places(name):
    return lambda report: [
        " ".join(map(str, named(report["texts"]["lines"], "rule", name)["right_by_place"]))
    ]


def long_against(report):
    row = named(report["texts"]["lines"], "rule", "blockbatch")["against_published"]
    return [row["only_this_right"], row["only_the_other_right"], row["mcnemar_p"]]


def forward(key, **wanted):
    return lambda report: [lines(report, model=model, **wanted)[key] for model in _MODELS]


def floors(report):
    found = [lines(report, model=model, forward="denoise", branches=1) for model in _MODELS]
    return [line[key] for line in found for key in ("products_ms", "kv_ms")]


def found_prompts(report):
    return [
        lines(report, model=model, forward="found", share=share)["ours_ms"]
        for model in _MODELS
        for share in (0.5, 0.75)
    ]


_RULE = " | {:.1f} [{:.1f}, {:.1f}] | "
_PHASES = "{:.1f} + {:.1f} + {:.1f}"
_OF = " | {:.1f}% [{:.1f}, {:.1f}] |"
BLOCK_MODELS = [
    (
        "60 of the problems" + _RULE + _PHASES + " | {:.1f} | {:.0f}% [{:.0f}, {:.0f}] |",
        _DECODES, rule("static"),
    ),
    ("threshold 0.9" + _RULE + _PHASES + " | {:.2f} |", _DECODES, rule("published")),
    ("next forward (ours)" + _RULE + "{:.0f} + {:.1f} + {:.0f} | {:.2f}" + _OF, _DECODES, rule("joined")),
    ("4 to 32 (ours)" + _RULE + "{:.0f} + {:.1f} + {:.0f} | {:.2f}" + _OF, _DECODES, rule("blockbatch")),
    (
        "BlockBatch solves {} problems that the published rule does not, and fails {} that it solves "
        "(McNemar, p = {:.2f}; {:+.1f} points [{:.1f}, {:+.1f}])",
        _DECODES,
        lambda report: [
            *(against(report)[key] for key in ("only_this_right", "only_the_other_right")),
            *(against(report)[key] for key in ("mcnemar_p", "points")),
            *against(report)["points_95"],
        ],
    ),
    ("it needs {:.1f}% fewer forwards [{:.1f}, {:.1f}]", _DECODES, fewer_than_joined),
    *[
        (f"| {text} | {{:.2f}} | {{:.1f}}% |", _DECODES, way(name))
        for text, name in (
            ("stores joined with the next forward", "stores_joined"),
            ("last store left out: nobody reads that block's K/V", "last_store_left_out"),
            ("BlockBatch with one branch of 32: ends with the text, not with its block", "one_branch"),
            ("BlockBatch with branches of 4, 8, 16 and 32", "several_branches"),
        )
    ],
    ("the branches alone save {:.1f}% [{:.1f}, {:.1f}]", _DECODES, saved_branches),
    (
        "takes {:.3f} s by the published rule, {:.3f} with joined stores, {:.3f} with one branch and {:.3f}",
        _DECODES,
        lambda report: [
            named(report["seconds"]["lines"], "rule", name)["seconds"]
            for name in ("published", "joined", "one_branch", "blockbatch")
        ],
    ),
    (
        "{} texts, prompt and answers {} to {} tokens long",
        _DECODES,
        lambda report: [
            report["texts"]["texts"], *(report["texts"]["tokens_a_text"][key] for key in ("least", "most"))
        ],
    ),
    ("| published rule | {} | {:.1f} |", _DECODES, long_text("published")),
    ("| stores joined (ours) | {} | {:.1f}" + _OF, _DECODES, long_text("joined")),
    ("| BlockBatch (ours) | {} | {:.1f}" + _OF, _DECODES, long_text("blockbatch")),
    ("{}", _DECODES, places("published")),
    ("{}", _DECODES, places("blockbatch")),
    ("{} answers only BlockBatch has right, {} only the published rule: p = {:.2f}", _DECODES, long_against),
    ("as a CUDA graph | {:.2f} | {:.2f} |", _STEPS, forward("graph_ms", forward="denoise", branches=1)),
    ("its products + K/V | {:.2f} + {:.2f} | {:.2f} + {:.2f} |", _STEPS, floors),
    ("(128 tokens) | {:.2f} | {:.2f} |", _STEPS, forward("graph_ms", forward="denoise", branches=4)),
    ("first denoise | {:.2f} | {:.2f} |", _STEPS, forward("graph_ms", forward="fused")),
    ("prompt of 4096 tokens | {:.1f} | {:.1f} |", _STEPS, forward("ours_ms", **_PREFILL)),
    ("| its products | {:.1f} | {:.1f} |", _STEPS, forward("products_ms", **_PREFILL)),
    ("in the prefix cache | {:.1f}, {:.1f} | {:.1f}, {:.1f} |", _STEPS, found_prompts),
]  # fmt: skip


def dream(label, end="prefix"):
    def values(report):
        line = lines(report, label=label, eos_exit=end)
        return [line["forwards"], line["right"]]

    return values


DREAM = [
    *[
        (f"| {text} | {end} | {{:.2f}} | {{}} |", _DREAM, dream(label, end))
        for text, label in (("LLaDA's", "llada_published"), ("Dream's", "dream_published"))
        for end in ("prefix", "none")
    ],
    *[
        (f"{text} | {{:.2f}} | {{}} |", _DREAM, dream(label))
        for text, label in (
            ("one token, the first MASK", "full_forwards_commit_by_threshold"),
            ("empties it", "full_forwards_leave_the_map"),
            ("with its last such probability", "map_keeps_the_latest_forward"),
            ("the destination's own window", "merge_into_the_sources_windows"),
            ("all tokens held", "leader_by_own_commits"),
            ("the first MASK has moved far enough", "refresh_by_finished_blocks"),
            ("takes the leader's", "sync_leaves_the_counter"),
            ("takes the leader's map", "sync_leaves_the_map"),
            ("the first branch is complete", "all_branches_must_be_done"),
            ("the surest that is not an EOS", "forced_commit_takes_an_eos"),
        )
    ],
]


def fp8_step(tokens, pages):
    def values(report):
        (step,) = (
            row for row in report["shapes"][0]["steps"] if (row["tokens"], row["pages"]) == (tokens, pages)
        )
        return [step["bf16_ms"], step["fp8_ms"], step["fp8_kv8_ms"]]

    return values


def fp8_products(tokens, *ways):
    """Of all layers, ms."""

    def values(report):
        products = [row["ms"] for row in report["shapes"][0]["products"] if row["tokens"] == tokens]
        return [sum(times[way] for times in products) for way in ways]

    return values


_FP8 = ["fp8_step.json"]
QUANTIZATION = [
    ("| step of 32 tokens | {:.2f} | {:.2f} | {:.2f} |", _FP8, fp8_step(32, "separate")),
    ("| step of 128 tokens | {:.2f} | {:.2f} | {:.2f} |", _FP8, fp8_step(128, "separate")),
    (
        "| step of 252 tokens, prompt pages shared | {:.2f} | {:.2f} | {:.2f} |",
        _FP8,
        fp8_step(252, "shared"),
    ),
    (
        "| step of 252 tokens, every row its own pages | {:.2f} | {:.2f} | {:.2f} |",
        _FP8,
        fp8_step(252, "separate"),
    ),
    (
        "| a whole row of 1280 tokens | {:.1f} | {:.1f} |",
        _FP8,
        lambda report: [report["shapes"][0]["row"][name] for name in ("bf16_ms", "fp8_ms")],
    ),
    (
        "The four products of all layers with 128 tokens take {:.2f} ms in bf16, {:.2f} by the matrix "
        "library's kernels for e4m3 with a scale for each row, {:.2f} by ours, and {:.2f} by the library "
        "with one scale",
        _FP8,
        fp8_products(128, "bf16", "library", "ours", "one_scale"),
    ),
]


def fp8_accuracy(method):
    def values(report):
        row = named(report["decodes"], "method", method)
        return [
            *(row[name] for name in ("right_bf16", "right_fp8", "points")),
            *row["points_95"],
            *(row[name] for name in ("nfe_ratio", "equal_canvases")),
        ]

    return values


QUANTIZATION += (
    [
        (
            f"| {method} | {{}} | {{}} | {{:.2f}} [{{:.2f}}, {{:.2f}}] | {{:.3f}} | {{}} |",
            ["fp8_accuracy.json"],
            fp8_accuracy(method),
        )
        for method in ("blockbatch", "prefix_cache", "dual_cache", "local_leap")
    ]
    + [
        (
            f"| K/V, {method} | {{}} | {{}} | {{:.2f}} [{{:.2f}}, {{:.2f}}] | {{:.3f}} | {{}} |",
            ["fp8_kv_accuracy.json"],
            fp8_accuracy(method),
        )
        for method in ("blockbatch", "prefix_cache", "dual_cache", "local_leap")
    ]
    + [
        (
            "behind all eight layers differ from fp32 by {:.1f}% in bf16 and {:.1f}% with e4m3",
            ["fp8_accuracy.json"],
            lambda report: [percent(report["layers"][-1][name]) for name in ("error_bf16", "error_fp8")],
        )
    ]
)


def served(by, streams):
    def values(report):
        return [
            next(
                line["tokens_per_s"]
                for line in report["lines"]
                if (line["setting"], line["by"], line["at_a_time"]) == (setting, by, streams)
            )
            for setting in ("dual_cache", "blockbatch, branches by load")
        ]

    return values


def answered(run):
    def values(report):
        line = next(line for line in report["lines"] if line["run"] == run)
        return [line["right"], line["nfe"], line["forwarded_per_token"]]

    return values


def engine_line(report, setting, clients):
    wanted = setting, clients
    return next(line for line in report["lines"] if (line["setting"], line["at_a_time"]) == wanted)


def loaded(setting):
    def values(report):
        few, many = (engine_line(report, setting, clients) for clients in (8, 32))
        return [few["tokens_per_s"], many["tokens_per_s"], many["forwarded_per_token"]]

    return values


def forwarded(report):
    line = engine_line(report, "dual_cache", 32)
    return [line["tokens_per_s"] * line["forwarded_per_token"]]


LOADED = [
    (f"| {label} | {{:.0f}} | {{:.0f}} | {{:.1f}} |", ["serve_engine.json"], loaded(setting))
    for label, setting in (
        ("dual cache, as published", "dual_cache"),
        ("`careful`, drafts by load", "careful, by load"),
        ("dual cache, open queries, refreshes of the generation region", "dual_cache, open, generation"),
        ("`fast`, branches by load", "fast, branches by load"),
    )
] + [("as published runs {:,.0f} tokens a second", ["serve_engine.json"], forwarded)]


def measured(setting, *lines):
    """Of serve.json: tokens a second of the lines that (by, at_a_time) name."""

    def values(report):
        found = {(one["setting"], one["by"], one["at_a_time"]): one for one in report["lines"]}
        return [found[setting, by, clients]["tokens_per_s"] for by, clients in lines]

    return values


def late(report):
    """Seconds to the first text and to the end in the median, of 32 streams."""
    line = lines(report, by="server", setting=_BY_LOAD, at_a_time=32)
    return [line["first_s"]["p50"], line["whole_s"]["p50"]]


_SERVE = ["serve.json"]
_FEW = ("one by one", 1), ("engine", 8), ("server", 8), ("engine", 32), ("server", 32), ("server", 64)
_BY_LOAD = "fast, branches by load"
IN_SHORT = [
    (
        "32 streams of the preset `fast` get {:.0f} tokens a second, one by one {:.0f}",
        _SERVE,
        measured(_BY_LOAD, ("server", 32), ("one by one", 1)),
    )
]
SERVED_ON_A_GPU = [
    (f"| {label}{' | {:.0f}' * len(_FEW)} |", _SERVE, measured(setting, *_FEW))
    for label, setting in (
        ("dual cache, as published", "dual_cache"),
        ("`fast`, branches by load", _BY_LOAD),
    )
] + [
    ("of `fast` gave {:.0f} tokens a second", _SERVE, measured(_BY_LOAD, ("server", 32))),
    ("after {:.2f} s and the end of an answer after {:.2f} s", _SERVE, late),
    (
        "{:.0f} tokens a second in place of {:.0f} with 8 requests",
        ["serve_fixed.json"],
        lambda report: [line["tokens_per_s"] for line in reversed(report["lines"])],
    ),
    (
        "gave {:.0f} tokens a second\nwith 32 of them, and no request's window waited longer than {:.1f} ms",
        ["serve_budgets.json"],
        lambda report: [report["lines"][0]["tokens_per_s"], report["lines"][0]["held_up_ms"]["longest"]],
    ),
]
SERVING = (
    SERVED_ON_A_GPU
    + [
        (f"| {label} | {{}} | {{:.2f}} | {{:.1f}} |", ["serve_accuracy.json"], answered(run))
        for label, run in (
            ("dual cache, as published", "dual_cache"),
            ("dual cache, open queries, refreshes of the generation region", "dual_cache, open, generation"),
            ("`fast`, one branch, as under load", "fast, one branch"),
            ("`fast`, all branches", "fast"),
        )
    ]
    + [
        (f"| {label} | {{:.0f}} | {{:.0f}} |", ["serve_cpu.json"], served(by, streams))
        for label, by, streams in (
            ("one by one", "one by one", 1),
            ("batches of 8", "batches of 8", 8),
            ("batches of 24", "batches of 24", 24),
            ("server, 1 stream", "server", 1),
            ("server, 8 streams", "server", 8),
            ("server, 24 streams", "server", 24),
        )
    ]
)
SERVING += LOADED
