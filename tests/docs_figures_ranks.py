"""The figures of docs/tensor_parallel.md, as docs_figures.py says."""

from docs_values import lines

_BF16, _FP8 = ["tensor_parallel.json"], ["tensor_parallel_fp8.json"]


def step(tokens):
    """Of one GPU and of two, ms."""

    def values(report):
        line = lines(report, model="llada-8b", kind="step", tokens=tokens)
        return [line["one_ms"], line["ranks_ms"]]

    return values


def refresh(rows):
    def values(report):
        line = lines(report, model="llada-8b", kind="refresh", rows=rows)
        ways = ("ranks_ms", "two_lanes_ms")
        return [line["one_ms"], min(line[way] for way in ways if way in line)]

    return values


def sums(tokens):
    """Of an all-reduce by each way, us."""

    def values(report):
        (found,) = (line for line in report["lines"] if line["tokens"] == tokens and "all_reduce_us" in line)
        return [found["all_reduce_us"][way] for way in ("one_shot", "two_shot", "nccl")]

    return values


_TOKENS = (32, 128, 252)
RANKS = [
    *((f"| step of {tokens} tokens | {{:.2f}} | {{:.2f}} |", _BF16, step(tokens)) for tokens in _TOKENS),
    *(
        (f"| step of {tokens} tokens, fp8 | {{:.2f}} | {{:.2f}} |", _FP8, step(tokens))
        for tokens in (128, 252)
    ),
    ("| refresh of one row of 1280 | {:.1f} | {:.1f} |", _BF16, refresh(1)),
    ("| refresh of six rows | {:.1f} | {:.1f} |", _BF16, refresh(6)),
    *((f"| {tokens} | {{:.1f}} | {{:.1f}} | {{:.1f}} |", _BF16, sums(tokens)) for tokens in (*_TOKENS, 1280)),
]
