"""The figures of docs/performance.md; docs_figures.py says what a row is."""

from docs_values import clock, clock_ms, lines, memory, named

_ROW = " | {:.0f} | {:.0f} | {:.0f} | {:.1f}% | {:.1f} |"
_CLOCK = [
    ("dual cache, as published (Fast-dLLM)", "dual_cache"),
    ("LocalLeap, as published", "local_leap"),
    ("BlockBatch, as published", "blockbatch"),
    ("dual cache, cheaper refreshes", "dual_cache, generation"),
    ("three drafts: `careful`", "dual_cache, generation, drafts 1-2-3"),
    ("LocalLeap, cheaper refreshes", "local_leap, generation"),
    ("LocalLeap, cheaper refreshes, two drafts", "local_leap, generation, drafts 1-2"),
    ("LocalLeap's commit: `fast`", "blockbatch 4..64, leap, open"),
]


_BLOCK_MODELS = ("sdar-8b", "fast-dllm-v2-7b")


def step(model="llada-8b", tokens=252, pages="shared"):
    return lambda report: lines(report, model=model, tokens=tokens, length=1280, pages=pages)


def both(*keys):
    """A value of the step with shared pages, and of that with its own."""

    def values(report):
        found = []
        for pages in ("shared", "separate"):
            line = step(pages=pages)(report)
            for key in keys:
                line = line[key]
            found.append(line)
        return found

    return values


def gemm(tokens):
    def values(report):
        (row,) = (
            row
            for row in report["models"]["llada-8b"]
            if row["product"] == "layers" and row["tokens"] == tokens
        )
        return [tokens, row["ours_ms"], row["cublas_ms"], row["floor_ms"]]

    return values


def refresh(rows):
    def values(report):
        (line,) = (
            line
            for line in report["lines"]
            if (line["model"], line["distinct_rows"]) == ("llada-8b", rows)
            and line.get("scope", "canvas") == "canvas"
        )
        return [rows, line["ours_ms"], line["over_products_and_attention"]]

    return values


def turns(report):
    """Of a refresh of one row and of six, by graphs and launched."""
    found = {line["distinct_rows"]: line["turn_ms"] for line in report["lines"]}
    return [found[rows][way] for rows in (1, 6) for way in ("graphs", "launched")]


def cheaper(name):
    def values(report):
        line = lines(report, model="llada-8b", step=name)
        return [line["tokens"], line["ours_ms"]]

    return values


def drafts(report):
    return [sum(line[key] for line in report["lines"]) for key in ("equal", "total")]


def draft_savings(report):
    saved = [100 * line["block_steps_saved"] for line in report["lines"]]
    return [min(saved), max(saved)]


def decode(name):
    def values(report):
        row = report["models"]["llada-8b"]["random"][name]
        return [row["decode_ms"] / 1e3, row["ms_per_nfe"], row["block_ms"], row["refresh_ms"]]

    return values


def attention(start, pages):
    def values(report):
        (row,) = (
            row
            for row in report["models"]["llada-8b"]
            if row["op"] == "varlen_attention"
            and row["shape"].startswith(start)
            and row["shape"].endswith(pages)
        )
        names = ("cuda", "flashinfer", "flash-attention 2, keys gathered beforehand")
        return [row["versions"][name]["us"] for name in names]

    return values


def step_h200(report):
    """Steps of 64 and 128 tokens, of 252 with shared pages, how far apart, and with own pages."""
    found = {(line["tokens"], line["pages"]): line for line in report["lines"]}
    shared = found[252, "shared"]
    times = found[64, "separate"], found[128, "separate"], shared
    apart = 100 * shared["ours_spread"]
    return [*(line["ours_ms"] for line in times), apart, found[252, "separate"]["ours_ms"]]


def rotated(report):
    row = named(report["models"]["llada-8b"], "op", "linear_rope_kv_write")
    return [row["versions"][name]["us"] for name in ("cuda", "triton", "torch")]


def block_forward(key="ours_ms", **wanted):
    return lambda report: [lines(report, model=model, **wanted)[key] for model in _BLOCK_MODELS]


def block_floor(report):
    found = [lines(report, model=model, forward="denoise", branches=1) for model in _BLOCK_MODELS]
    return [line["products_ms"] + line["kv_ms"] for line in found]


def on_cpu(setting):
    def values(report):
        row = named(report["settings"], "setting", setting)
        return [row["seconds_mean"], row["nfe"]]

    return values


def cpu_seconds(*settings):
    return lambda report: [named(report["settings"], "setting", name)["seconds_mean"] for name in settings]


def cpu_decodes(report):
    ends, fills = (
        next(row for row in report["decodes"] if (row["method"], row["eos_exit"]) == ("blockbatch", end))
        for end in ("prefix", "none")
    )
    share = max(ends["share_outside_model_max"], fills["share_outside_model_max"])
    return [
        ends["seconds_median"], ends["seconds_max"], fills["seconds_median"], fills["seconds_max"],
        -(-100 * share // 1), report["peak_memory_bytes"] / 2**20,
    ]  # fmt: skip


def agreement(report):
    fp32 = [line for line in report["lines"] if line["dtype"] == "float32"]
    bf16 = [line for line in report["lines"] if line["dtype"] == "bfloat16"]
    branches = named(bf16, "method", "blockbatch")
    return [
        min(line["equal_to_the_cpu"] for line in fp32), fp32[0]["problems"],
        sum(line["equal_to_the_reference"] for line in bf16), sum(line["problems"] for line in bf16),
        branches["equal_to_the_reference"], branches["problems"], branches["equal_to_fp32"],
        branches["reference_equal_to_fp32"],
    ]  # fmt: skip


def rounding(report):
    kept = [line for line in report["lines"] if line["difference"] != "fp32"]
    branches = [line["equal_to_bf16"] for line in kept if line["method"] == "blockbatch"]
    others = [line["equal_to_bf16"] for line in kept if line["method"] != "blockbatch"]
    return [min(branches), max(branches), kept[0]["problems"], min(others), max(others)]


_graph = block_forward("graph_ms", forward="denoise", branches=1)
_STEP, _BLOCK, _CPU = ["step_latency.json"], ["block_steps.json"], ["clock_cpu.json"]
PERFORMANCE = [
    *[(f"{text}{_ROW}", ["clock.json"], clock(setting)) for text, setting in _CLOCK],
    (
        "on {} test problems, with a canvas of {} places",
        ["clock.json"],
        lambda report: [report["answers"][0]["problems"], report["gen_length"]],
    ),
    (
        "follows {} of these decodes ({} in Dream's shape)",
        ["clock.json"],
        lambda report: [report["sections"][at]["settings"][0]["problems"] for at in (0, 2)],
    ),
    ("| this engine | {:.2f} | {:.2f} |", _STEP, both("ours_ms")),
    ("by cuBLAS | {:.2f} | {:.2f} |", _STEP, both("products_ms")),
    ("FLOP of the step | {:.2f} | {:.2f} |", _STEP, both("floor_ms")),
    ("and varied) | {:.1f} | {:.1f} |", _STEP, both("eager_ms")),
    ("| matrix products | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "products")),
    ("| attention | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "attention")),
    ("SwiGLU | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "norm_rope_swiglu")),
    ("| LM head | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "lm_head")),
    ("policy, pages | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "around_the_model")),
    ("| gaps | {:.2f} | {:.2f} |", _STEP, both("parts_ms", "gaps")),
    (
        "With {} tokens, as a dual cache has them, a step takes {:.2f} ms, of which cuBLAS alone would "
        "need {:.2f}",
        _STEP,
        lambda report: [
            step(tokens=32, pages="separate")(report)[key] for key in ("tokens", "ours_ms", "products_ms")
        ],
    ),
    (
        "the {} tokens take {:.2f} ms with shared pages and {:.2f} without; cuBLAS {:.2f} and {:.2f}",
        _STEP,
        lambda report: [
            252,
            *(step("dream-7b", pages=pages)(report)["ours_ms"] for pages in ("shared", "separate")),
            *(step("dream-7b", pages=pages)(report)["products_ms"] for pages in ("shared", "separate")),
        ],
    ),
    *[("| {} | {:.2f} | {:.2f} | {:.2f} |", ["gemm.json"], gemm(tokens)) for tokens in (32, 160, 252)],
    *[("| {} | {:.1f} | {:.2f} |", ["refresh.json"], refresh(rows)) for rows in (1, 3, 6)],
    (
        "one row takes {:.1f} ms in place of {:.1f}, of six rows {:.1f} in place of {:.1f}",
        ["refresh_graphs.json"],
        turns,
    ),
    *[
        (f"| {text} | {{}} | {{:.2f}} |", ["cheaper_steps.json"], cheaper(name))
        for text, name in (
            ("one window of 32", "one window"),
            ("with one draft", "drafts 1"),
            ("with two", "drafts 2"),
            ("with three", "drafts 3"),
            ("windows of 4, 8, 16, 32, 64", "windows"),
            ("as many queries, scattered", "scattered"),
        )
    ],
    ("{} of {} canvases are equal on a CPU", ["draft_equality.json"], drafts),
    ("with {:.0f} to {:.0f}% fewer block steps", ["draft_equality.json"], draft_savings),
    ("and {} of {} on an H100", ["draft_equality_gpu.json"], drafts),
    *[
        (f"| {text} | {{:.2f}} | {{:.1f}} | {{:.1f}} | {{:.0f}} |", ["decode.json"], decode(name))
        for text, name in (
            ("BlockBatch", "blockbatch, ours"),
            ("dual cache", "dual_cache, ours"),
            ("BlockBatch, plain torch", "blockbatch, eager"),
        )
    ],
    (
        "so {} init, {} block steps and {} refreshes",
        ["decode.json"],
        lambda report: report["models"]["llada-8b"]["random"]["blockbatch, ours"]["nfe"],
    ),
    (
        "the {:.1f} GB cache, {} places take {:.2f} GB",
        ["decode.json"],
        lambda report: [memory(report)[key] for key in ("cache_gb", "canvas_length", "reserved_beyond_gb")],
    ),
    *[
        (f"| {text} | {{:.1f}} | {{:.1f}} | {{:.1f}} |", ["ops.json"], attention(start, pages))
        for text, start, pages in (
            ("six windows, all pages shared", "4+8+16", "shared pages"),
            ("six windows, no page shared", "4+8+16", "separate pages"),
            ("one row of 1280 queries", "1280 queries", "separate pages"),
        )
    ],
    (
        "took {:.2f} ms for a step of 64 tokens, {:.2f} for 128, and for 252 {:.2f} with the prompt's pages "
        "shared (the smaller of two medians {:.0f}% apart) and {:.2f} with every row's own",
        ["step_latency_h200.json"],
        step_h200,
    ),
    (
        "takes {:.1f} us a layer, by cuBLAS and Triton {:.1f}, by plain torch {:.1f}",
        ["ops_rotated.json"],
        rotated,
    ),
    *[
        (f"| {text} | {{:.{places}f}} | {{:.{places}f}} |", _BLOCK, values)
        for text, places, values in (
            ("denoise, one branch, 32 tokens, as a CUDA graph", 2, _graph),
            ("the same with the host's work", 2, block_forward(forward="denoise", branches=1)),
            ("its products and K/V", 2, block_floor),
            ("denoise, two branches, 64 tokens", 2, block_forward(forward="denoise", branches=2)),
            ("denoise, four branches, 128 tokens", 2, block_forward(forward="denoise", branches=4)),
            ("store joined with the next denoise, 64 tokens", 2, block_forward(forward="fused")),
            ("prefill of 4096 tokens, blocks of 32", 1, block_forward(forward="prefill", block_size=32)),
            ("the same, half of it in the prefix cache", 1, block_forward(forward="found", share=0.5)),
        )
    ],
    (
        "blocks 4 to 128 take {:.0f} ms an answer, blocks 4 to 64 take {:.0f} ms. Two branches of 16 "
        "and 64 take "
        "{:.0f} ms, one of 64 alone {:.0f} ms",
        ["clock.json"],
        lambda report: [
            clock_ms(report, f"blockbatch {sizes}, tail, open")
            for sizes in ("4..128", "4..64", "16-64", "64")
        ],
    ),
    (
        "Blocks 4 to 64 take {:.0f} ms without and {:.0f} ms with one",
        ["clock.json"],
        lambda report: [
            clock_ms(report, f"blockbatch 4..64, tail, open{more}") for more in ("", ", refresh 64")
        ],
    ),
    (
        "{:.0f} ms against {:.0f} ms with cheaper refreshes alone",
        ["clock.json"],
        lambda report: [
            clock_ms(report, f"dual_cache, {name}") for name in ("open, generation", "generation")
        ],
    ),
    (
        "{:.0f} ms against {:.0f} ms with two. For the dual cache it gains 2 ms ({:.0f} against {:.0f})",
        ["clock.json"],
        lambda report: [
            clock_ms(report, f"{method}, generation, drafts {number}")
            for method in ("local_leap", "dual_cache")
            for number in ("1-2-3", "1-2")
        ],
    ),
    (
        "the dual cache takes {:.2f} s with two drafts and {:.2f} s without",
        _CPU,
        cpu_seconds("dual_cache, generation, drafts 1-2", "dual_cache, generation"),
    ),
    (
        "Without merge {:.0f}% more forwards, without sync {:.0f}% more, without refresh {:.0f}% more",
        ["ablations/components/summary.json"],
        lambda report: [
            100 * (named(report["rows"], "setting", name)["against_default"]["nfe"]["ratio"] - 1)
            for name in ("merge", "sync", "refresh")
        ],
    ),
    (
        "An answer takes {:.2f} s in the median and {:.2f} s at most when decoding ends with the text, "
        "{:.2f} s and "
        "{:.2f} s when the canvas is filled. At most {:.0f}% of a decode is spent outside the model's "
        "forwards; the "
        "whole process takes {:.0f} MiB",
        ["decode_cpu.json"],
        cpu_decodes,
    ),
    ("scaled as for the clock above, {} problems", _CPU, lambda report: [report["problems"]]),
    *[
        (f"| {text} | {{:.2f}} | {{:.1f}} |", _CPU, on_cpu(setting))
        for text, setting in (
            ("dual cache, as published", "dual_cache"),
            ("LocalLeap, as published", "local_leap"),
            ("BlockBatch, as published", "blockbatch"),
            ("`fast`", "blockbatch 4..64, leap, open"),
            ("`fast` with `block_sizes=(16, 64)`", "blockbatch 16-64, leap, open"),
        )
    ],
    (
        "canvases and NFE on {} of {} problems by each of the five methods. In bf16 its canvases are "
        "those of plain "
        "torch in bf16 in {} of {} decodes by four methods, with as many right answers. By BlockBatch "
        "alone {} of {} "
        "are; {} are those of fp32, of plain torch's {}",
        ["agreement.json"],
        agreement,
    ),
    (
        "keeps {} to {} of its own {} bf16 canvases by BlockBatch and {} or {} by the other three",
        ["rounding.json"],
        rounding,
    ),
    (
        "a batch of {}, all {} had the same canvas and NFE as alone, with confidences that differed by "
        "{:.0e}",
        ["batch_invariance.json"],
        lambda report: [
            report[key]
            for key in ("prompts_in_one_batch", "same_canvas_and_nfe", "largest_confidence_difference")
        ],
    ),
    (
        "{:.3f} s an answer against {:.3f} s with one branch",
        ["block_decodes.json"],
        lambda report: block_seconds(report),
    ),
]


def block_seconds(report):
    rows = report["seconds"]["lines"]
    return [named(rows, "rule", rule)["seconds"] for rule in ("blockbatch", "one_branch")]


PERFORMANCE_WITHOUT_FILE = [
    r"torch 2\.\d+\.0", r"CUDA 13\.0", r"Triton 3\.6\.0", r"H100 80GB", r"prompt of \d+", r"Dream-7B, 1024",
    r"blocks 4 to 64, open", r"chosen on 90 other problems", r"252 packed tokens, canvas of 1280 places",
    r"canvas of 1280:", r"Whole rows of 1280 places", r"prompt of 1024, 128 tokens",
    r"attention over 1280 keys",
    r"FlashInfer 0\.6\.14", r"FlashAttention 2,", r"q, k and v of 256 tokens", r"4096 stored places",
    r"Blocks 4 to 128|Blocks 4 to 64", r"one every 64 tokens", r"256 places", r"v2 7B",
]  # fmt: skip
