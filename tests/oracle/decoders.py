"""Whole decodes of one request: the loop around the policy, over any model with a `forward`.

A model has `forward(token_ids, positions, row) -> logits [n, vocabulary]` (K/V of these positions written
to `row`, attention over the whole row), `new_row(length)`, `copy_row(row)`, `mask_token_id`,
`eos_token_ids`, `prediction_offset` (logits at position i predict position i + offset) and `suppress_mask`
(the MASK logit counts as minus infinity). `PlainModel` and `ScriptedModel` are such models.
"""

from dataclasses import dataclass

import numpy as np
import torch

from oracle import policy


@dataclass
class OracleResult:
    """One decode. All token ids are ints: `canvas` has gen_length, `tokens` those before the first EOS.

    branches: per branch block_size, committed, merged, synced, decoded and tokens (its canvas).
    log: one record per phase: phase ("init", "block", "refresh"), rows (branches whose forward it was),
    queries (for each branch the positions computed, none where it takes another's result), forwards (what
    the policy was given), state (a copy of the policy's state afterwards). A block phase without rows had no
    forward.
    """

    canvas: list
    tokens: list
    nfe_init: int
    nfe_block: int
    nfe_refresh: int
    winner: int
    winner_block_size: int
    stop_reason: str
    branches: list
    log: list

    @property
    def nfe(self):
        return self.nfe_init + self.nfe_block + self.nfe_refresh


def decode(model, prompt, config, region=None):
    """Decode `prompt` (a list of ids) by `config.method`. config: an OracleConfig.

    region: what stands behind the prompt, MASK where it is to be decoded, MASK first; None: gen_length MASKs.

    Raises RuntimeError after 4 * gen_length + 16 forwards: a model that goes on predicting MASK never ends.
    """
    config = config.resolve()
    state = policy.new_state(
        prompt, config, model.mask_token_id, model.eos_token_ids, model.prediction_offset, region
    )
    branches = state["branches"]
    length = policy.length_of(state)
    nfe = {"init": 0, "block": 0, "refresh": 0}
    log = []

    row = model.new_row(length)
    forward = predict(model, branches[0]["tokens"], range(length), row)
    rows = {i: model.copy_row(row) for i in range(len(branches))}
    nfe["init"] += 1
    forwards = dict.fromkeys(range(len(branches)), forward)
    policy.init_phase(state, config, forwards)
    record(log, "init", forwards, state, [0])
    copy_rows(model, state, rows)

    while state["winner"] is None:
        if sum(nfe.values()) > 4 * config.gen_length + 16:
            raise RuntimeError(f"no end after {sum(nfe.values())} forwards: the model keeps predicting MASK")
        forwards = {}
        if state["refresh_due"]:
            computed = {}  # rows with equal tokens are one computation
            for i in policy.refresh_rows(state):
                key = tuple(branches[i]["tokens"])
                if key not in computed:
                    # K/V that the refresh leaves as they are: those of the prompt, or none.
                    keeps = config.refresh_scope == "generation"
                    row = model.copy_row(rows[i]) if keeps else model.new_row(length)
                    queries = policy.refresh_queries(state, config)
                    computed[key] = i, predict(model, branches[i]["tokens"], queries, row), row
                forwards[i] = computed[key][1]
                rows[i] = model.copy_row(computed[key][2])
            nfe["refresh"] += 1
            policy.refresh_phase(state, config, forwards)
            record(log, "refresh", forwards, state, [first for first, _, _ in computed.values()])
            continue
        for i in policy.block_rows(state, config):
            queries = block_queries(model, state, config, branches[i])
            kept = None
            if config.query_span == "open":
                kept = range(*policy.window_of(state, config, branches[i]))
            forwards[i] = predict(model, branches[i]["tokens"], queries, rows[i], kept)
        nfe["block"] += 1 if forwards else 0
        policy.block_phase(state, config, forwards)
        record(log, "block", forwards, state, list(forwards))
        copy_rows(model, state, rows)

    return result(state, nfe, log)


def block_queries(model, state, config, branch):
    """Positions that a block denoise of this branch computes."""
    if config.query_span == "open":
        return policy.open_queries(state, config, branch)
    length = policy.length_of(state)
    start, end = policy.window_of(state, config, branch)
    if config.method == "vanilla":
        return range(length)
    if config.method == "prefix_cache":
        return range(start - model.prediction_offset, length)
    return range(start - model.prediction_offset, end - model.prediction_offset)


def predict(model, tokens, queries, row, kept=None):
    """One forward over the positions `queries`: top token, confidence and probe by predicted position.

    kept: the positions whose predictions count; None: all.
    """
    queries = list(queries)
    logits = torch.as_tensor(model.forward([tokens[q] for q in queries], queries, row)).clone()
    if model.suppress_mask:
        logits[:, model.mask_token_id] = -torch.inf
    tops = np.argmax(logits.numpy(), axis=-1).tolist()  # numpy promises the first index on a tie
    probabilities = logits.softmax(-1).tolist()
    forward = {"top": {}, "confidence": {}, "probe": {}, "queries": queries}
    for n, query in enumerate(queries):
        position = query + model.prediction_offset
        if position < len(tokens) and (kept is None or position in kept):
            forward["top"][position] = tops[n]
            forward["confidence"][position] = probabilities[n][tops[n]]
            forward["probe"][position] = probabilities[n][tokens[position]]
    return forward


def copy_rows(model, state, rows):
    for source, destination in state["kv_copies"]:
        rows[destination] = model.copy_row(rows[source])


def record(log, phase, forwards, state, computed):
    queries = [forwards[i]["queries"] if i in computed else [] for i in range(len(state["branches"]))]
    log.append(
        {
            "phase": phase,
            "rows": sorted(forwards),
            "queries": queries,
            "forwards": forwards,
            "state": snapshot(state),
        }
    )


def snapshot(state):
    """A copy of a state that later phases leave alone."""
    copy = dict(state, kv_copies=list(state["kv_copies"]))
    copy["branches"] = [
        dict(b, tokens=list(b["tokens"]), **{name: dict(b[name]) for name in ("top", "confidence", "cached")})
        for b in state["branches"]
    ]
    return copy


def result(state, nfe, log):
    start = state["prompt_length"]
    winner = state["branches"][state["winner"]]
    eos = policy.first_eos(state, winner)
    return OracleResult(
        canvas=winner["tokens"][start:],
        tokens=winner["tokens"][start:eos],
        nfe_init=nfe["init"],
        nfe_block=nfe["block"],
        nfe_refresh=nfe["refresh"],
        winner=state["winner"],
        winner_block_size=winner["block_size"],
        stop_reason=state["stop_reason"],
        branches=[
            dict(
                {name: b[name] for name in ("block_size", "committed", "merged", "synced", "decoded")},
                tokens=b["tokens"][start:],
            )
            for b in state["branches"]
        ],
        log=log,
    )
