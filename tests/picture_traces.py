"""Traces for tests of pictures: real ones of the built-in model, and small ones made by hand."""

import blockbatch
from blockbatch import generation, tiny
from blockbatch.tracing import open_recorder, save_trace, trace_header
from blockbatch.tracing.file import check_trace

MASK, EOS = 9, 8


def decode(model, problem, **settings):
    """A trace with its header, and after each record the session's own [branches][gen_length] tokens and
    [branches] numbers of decoded tokens."""
    config = blockbatch.DecodeConfig(trace=True, **settings)
    ids = model.tokenizer.encode(problem.prompt)
    session = generation.open_session(model, ids, config)
    recorder, tokens, decoded = open_recorder(session, config), [], []
    while (step := session.step()) is not None:
        recorder.add(step)
        # A turn without a forward belongs to the forward before it.
        del tokens[len(recorder.traces[0]) - 1 :], decoded[len(recorder.traces[0]) - 1 :]
        tokens.append(session.state.tokens.tolist())
        decoded.append(session.state.decoded.tolist())
    result = generation.build_result(model, session, 0, recorder.traces[0])
    return {**trace_header(model, ids, config, result), "trace": result.trace}, tokens, decoded


def problem(family, index, seed=21):
    return tiny.generate_problems(family, "test", index + 1, seed)[index]


def write(path, trace):
    """Saves a trace as the command line does."""
    header = {name: value for name, value in trace.items() if name != "trace"}
    save_trace(path, trace["trace"], **header)
    return path


def record(kind, windows, *, commits=(), merges=(), syncs=()):
    return {
        "kind": kind,
        "seconds": 0.01,
        "rows": sorted(windows),
        "windows": [list(windows[branch]) for branch in sorted(windows)],
        "packed_tokens": 4,
        "distinct_rows": 1,
        "commits": [dict(zip(("branch", "positions", "tokens", "confidence"), change)) for change in commits],
        "merges": [dict(zip(("branch", "positions", "tokens"), change)) for change in merges],
        "syncs": [dict(zip(("branch", "leader"), change)) for change in syncs],
    }


def handmade(**header):
    """Three branches of block sizes 1, 2 and 4 on four positions, with a bifurcation, a merge and syncs."""
    records = [
        record(
            "init",
            {0: (0, 1), 1: (0, 2), 2: (0, 4)},
            commits=[(0, [0], [1], [0.95]), (1, [0, 1], [1, 2], [0.95, 0.97]), (2, [0], [1], [0.95])],
        ),
        record(
            "block",
            {0: (1, 2), 1: (2, 4), 2: (0, 4)},
            commits=[(0, [1], [3], [0.4]), (1, [2], [4], [0.91]), (2, [2, 3], [4, 8], [0.99, 0.98])],
            merges=[(2, [1], [2])],
        ),
        record(
            "refresh",
            {0: (2, 3), 1: (2, 4)},
            commits=[(1, [3], [8], [0.9])],
            syncs=[(0, 1)],
        ),
        record("block", {1: (3, 4)}, syncs=[(2, 0)]),
    ]
    pieces = {1: "a", 2: " b", 3: "c\n", 4: "\t", 8: "<|end|>", 9: "<|mask|>"}
    found = {
        "model": "by hand",
        "method": "blockbatch",
        "settings": {"threshold": 0.9, "block_sizes": [1, 2, 4], "stop": [], "leap_threshold": None},
        "gen_length": 4,
        "block_sizes": [1, 2, 4],
        "winner_block_size": 2,
        "prompt": "say a b",
        "prompt_tokens": [1, 2],
        "mask_token_id": MASK,
        "eos_token_ids": [EOS],
        "canvas": [1, 2, 4, 8],
        "text": "a b\t",
        "pieces": {str(token): piece for token, piece in pieces.items()},
        "stop_reason": "eos",
        "seconds": 0.25,
        "trace": records,
    }
    return check_trace({**found, **header})
