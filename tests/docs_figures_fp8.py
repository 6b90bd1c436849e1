"""The figures of docs/quantization.md on the LM head, as docs_figures.py says."""

from docs_values import LLADA_PARAMETERS

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


def more_forwards(base, method):
    """By how many % more, and the interval."""

    def values(report):
        row = against(base, method)(report)
        return [100 * (ratio - 1) for ratio in (row["nfe_ratio"], *row["nfe_ratio_95"])]

    return values


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
        for method in ("dual_cache", "blockbatch")
        for base, shown in (("bf16", "bf16"), ("layers", "the layers alone"))
    ),
    (
        "BlockBatch takes {:.0f}% more forwards than in bf16 on these problems, with an interval from "
        "{:.0f}% to {:.0f}%",
        _ACCURACY,
        more_forwards("bf16", "blockbatch"),
    ),
    (
        "Logits differ from fp32 by {:.1f}% in bf16, {:.1f}% with the layers in e4m3 and {:.1f}% with the "
        "head too",
        _ACCURACY,
        lambda report: [100 * report["logits"][f"error_{kind}"] for kind in ("bf16", "layers", "fp8")],
    ),
]
