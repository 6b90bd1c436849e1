"""Traces for tests of plots, and how many colours a plot has."""

import numpy as np

import blockbatch
from blockbatch.tracing import save_trace, trace_header
from blockbatch.tracing.file import check_trace

PROMPT = "In the morning Ann has 7 eggs. Mia has 3 eggs fewer than Ann. How many eggs does Mia have?"
MASK, EOS = 99, 98


def save_decode(model, path, prompt=PROMPT, **options):
    config = blockbatch.DecodeConfig(gen_length=32, trace=True, **options)
    ids = model.tokenizer.encode(prompt)
    result = blockbatch.generate(model, ids, config)
    save_trace(path, result.trace, **trace_header(model, ids, config, result))
    return result


def colours(path):
    """How many colours a PNG holds; a blank one holds one."""
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)
    assert len(pixels) > 200_000
    return len(np.unique(pixels @ (1 << 16, 1 << 8, 1)))


def commit(branch, positions, tokens):
    return {"branch": branch, "positions": positions, "tokens": tokens, "confidence": [0.9] * len(tokens)}


def record(kind="block", branches=3, commits=(), merges=(), syncs=()):
    return {
        "kind": kind,
        "rows": list(range(branches)),
        "windows": [[0, 6]] * branches,
        "commits": list(commits),
        "merges": [{"branch": b, "positions": p, "tokens": t} for b, p, t in merges],
        "syncs": [{"branch": b, "leader": leader} for b, leader in syncs],
    }


def hand_made(records, canvas, block_sizes=(1, 2, 3), **header):
    pieces = {str(token): text for token, text in {1: "1", 2: " two", 3: ".", 4: "\n", 5: "5"}.items()}
    canvas = [*canvas, *[EOS] * (6 - len(canvas))]
    sizes = {"gen_length": len(canvas), "block_sizes": list(block_sizes)}
    ids = {"mask_token_id": MASK, "eos_token_ids": [EOS], "canvas": canvas, "pieces": pieces}
    settings = {"model": "none", "settings": {"threshold": 0.9}}
    return check_trace({**settings, **sizes, **ids, "trace": records, **header})
