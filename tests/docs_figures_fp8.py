"""The figures of docs/quantization.md on the LM head, attention and decodes, as docs_figures.py says."""

from docs_values import LLADA_PARAMETERS, lines, named

_ACCURACY = ["fp8_head_accuracy.json"]


def against(base, method):
    """The line of a method that is compared with `base`."""

    def line(report):
        return next(row for row in report["decodes"] if row["method"] == method and f"right_{base}" in row)

    return line


def accuracy(base, method):
    def values(report):
        row = against(base, method)(report)
        answers = row[f"right_{base}"], row["right_fp8"], row["points"], *row["points_95"]
        return [*answers, row["nfe_ratio"], row["equal_canvases"]]

    return values


def most_forwards(report):
    """By how many % they change at most, against bf16; no method may lose a point."""
    rows = [row for row in report["decodes"] if "right_bf16" in row]
    assert min(row["points"] for row in rows) > -1 and all(row["nfe_holds"] for row in rows)
    return [max(100 * abs(row["nfe_ratio"] - 1) for row in rows)]


_ROW = " | {} | {} | {:.2f} [{:.2f}, {:.2f}] | {:.3f} | {} |"
_HEAD_BYTES = 126464 * 4096
_LAYERS = LLADA_PARAMETERS - 2 * _HEAD_BYTES
FP8_HEAD = [
    # The embedding in 16 bits; scales are less than what is shown.
    ("the weights take {:.1f} GB. The hidden", [], lambda: [(_LAYERS + _HEAD_BYTES + 2 * _HEAD_BYTES) / 1e9]),
    *(
        (
            f"| head, {method}, against {shown}{_ROW}",
            _ACCURACY,
            accuracy(base, method),
        )
        for method in ("blockbatch", "prefix_cache", "dual_cache", "local_leap")
        for base, shown in (("bf16", "bf16"), ("layers", "the layers alone"))
    ),
    ("and forwards change by at most {:.1f}%", _ACCURACY, most_forwards),
    (
        "Logits differ from fp32 by {:.1f}% in bf16, {:.1f}% with the layers in e4m3 and {:.1f}% with the "
        "head too",
        _ACCURACY,
        lambda report: [100 * report["logits"][f"error_{kind}"] for kind in ("bf16", "layers", "fp8")],
    ),
]


def head_step(tokens, pages):
    def values(report):
        line = lines({"lines": report["shapes"][0]["steps"]}, tokens=tokens, pages=pages)
        return [line[f"{kind}_ms"] for kind in ("bf16", "fp8", "fp8_all")]

    return values


def decode(prompt_length, setting):
    def values(report):
        line = lines(report, prompt_length=prompt_length, setting=setting)
        times = line["times_as_fast_fp8"], *line["times_as_fast_fp8_95"], line["times_as_fast_fp8-all"]
        return [line["ms"]["bf16"], line["ms"]["fp8"], *times]

    return values


def attention(way, case):
    def values(report):
        times = named(report["models"]["llada-8b"], "case", case)["us"]
        return [times["16 bits"], times[way]]

    return values


_TIMES = " | {:.1f} | {:.1f} | {:.2f} [{:.2f}, {:.2f}] | {:.2f} |"
_WINDOWS = "4+8+16+32+64+128 queries, "
FP8_HEAD += [
    *(
        (f"| {shown} | {{:.2f}} | {{:.2f}} | {{:.2f}} |", ["fp8_head.json"], head_step(tokens, pages))
        for shown, tokens, pages in (
            ("32 tokens", 32, "separate"),
            ("128 tokens", 128, "separate"),
            ("252 tokens, prompt pages shared", 252, "shared"),
        )
    ),
    *(
        (
            f"| prompt of {length}, {shown}{_TIMES}",
            ["clock_fp8.json"],
            decode(length, setting),
        )
        for length in (1024, 160)
        for shown, setting in (
            ("dual cache", "dual_cache"),
            ("LocalLeap", "local_leap"),
            ("BlockBatch as published", "blockbatch"),
            ("preset `fast`", "blockbatch 4..64, leap, open"),
        )
    ),
    *(
        (f"| {shown} | {{:.1f}} | {{:.1f}} |", ["attention_fp8.json"], attention(way, case))
        for shown, way, case in (
            ("1280 keys, 1024 of them shared", "units", _WINDOWS + "1280 keys, 1024 shared"),
            ("1280 keys, every row its own", "tiles", _WINDOWS + "1280 keys, 0 shared"),
            ("4352 keys, every row its own", "tiles", _WINDOWS + "4352 keys, 0 shared"),
            ("a whole row of 1280", "units", "1280 queries, 1280 keys, 0 shared"),
        )
    ),
]
