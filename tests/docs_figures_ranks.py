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
    """Of one GPU, of two that compute every row together, and by rows dealt out, ms."""

    def values(report):
        line = lines(report, model="llada-8b", kind="refresh", rows=rows)
        together = min(line[way] for way in ("ranks_ms", "two_lanes_ms") if way in line)
        return [line["one_ms"], together, *([line["whole_rows_ms"]] if rows > 1 else [])]

    return values


def sums(tokens):
    """Of an all-reduce by each way, and with the norm, us."""

    def values(report):
        (found,) = (line for line in report["lines"] if line["tokens"] == tokens and "all_reduce_us" in line)
        ways, both = found["all_reduce_us"], found["sum_and_norm_us"]
        return [
            *(ways[way] for way in ("one_shot", "two_shot", "nccl")),
            both["two_steps"],
            both["as_called"],
        ]

    return values


def engine(clients):
    """Of one GPU, of two, of one batch by two, ms; until rank 0 has told the others, us."""

    def values(report):
        line = lines(report, model="llada-8b", clients=clients)
        return [line[name] for name in ("one_ms", "ranks_ms", "batch_ms", "tell_us")]

    return values


_TOKENS = (32, 128, 252)
_ROWS = {2: "two rows", 6: "six rows"}
_SUM = " | {:.1f}" * 5 + " |"
RANKS = [
    *((f"| step of {tokens} tokens | {{:.2f}} | {{:.2f}} |", _BF16, step(tokens)) for tokens in _TOKENS),
    ("| step of 128 tokens, fp8 | {:.2f} | {:.2f} |", _FP8, step(128)),
    ("| step of 252 tokens, fp8 | {:.2f} | {:.2f} |", _FP8, step(252)),
    ("| refresh of one row of 1280 | {:.1f} | {:.1f} |", _BF16, refresh(1)),
    *(
        (f"| refresh of {name} of 1280 | {{:.1f}} | {{:.1f}} | {{:.1f}} |", _BF16, refresh(rows))
        for rows, name in _ROWS.items()
    ),
    *(
        (f"| {clients} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.0f}} |", ["engine_ranks.json"], engine(clients))
        for clients in (1, 8)
    ),
    *((f"| {tokens}{_SUM}", _BF16, sums(tokens)) for tokens in (*_TOKENS, 1280)),
]
