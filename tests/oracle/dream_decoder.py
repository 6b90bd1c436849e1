"""Whole decodes by the rule of `dream_policy`, over any model with a `forward` (see `decoders`)."""

from dataclasses import dataclass

import numpy as np
import torch

from oracle import dream_policy as policy


@dataclass(frozen=True)
class DreamConfig:
    """The settings, under their public names."""

    gen_length: int = 256
    block_sizes: tuple = (4, 8, 16, 32, 64, 128)
    threshold: float = 0.9
    sync_threshold: int | None = 8
    refresh_interval: int | None = 32
    eos_exit: str = "none"


@dataclass
class DreamResult:
    """One decode; `tokens` are those before the first EOS, `events` as in tests/data/conformance_dream."""

    canvas: list
    tokens: list
    nfe_init: int
    nfe_block: int
    nfe_refresh: int
    winner: int
    winner_block_size: int
    stop_reason: str
    branches: list
    events: list


def decode(model, prompt, config, region=None):
    """Decode `prompt`, a list of at least one id; region as of `decoders.decode`."""
    state = policy.new_state(prompt, config, model.mask_token_id, model.eos_token_ids, region)
    branches, length = state["branches"], policy.length_of(state)
    offset = model.prediction_offset
    nfe, events = {"init": 1, "block": 0, "refresh": 0}, [["init"]]

    row = model.new_row(length)
    forward = predict(model, branches[0]["tokens"], range(length), row)
    rows = {i: model.copy_row(row) for i in range(len(branches))}
    policy.full_phase(state, config, dict.fromkeys(range(len(branches)), forward))

    while state["winner"] is None:
        running = [i for i, branch in enumerate(branches) if not branch["done"]]
        assert len(running) == len(branches), "a branch that is done ends the decode"
        forwards = {}
        if state["refresh_due"]:
            for i in running:
                rows[i] = model.new_row(length)
                forwards[i] = predict(model, branches[i]["tokens"], range(length), rows[i])
            nfe["refresh"] += 1
            events.append(["refresh", running])
            policy.full_phase(state, config, forwards)
            continue
        windows = []
        for i in running:
            w0, w1 = branches[i]["window"]
            windows.append([i, w0 - len(prompt), w1 - len(prompt)])
            forwards[i] = predict(model, branches[i]["tokens"], range(w0 - offset, w1 - offset), rows[i])
        nfe["block"] += 1
        events.append(["block", windows])
        policy.block_phase(state, config, forwards)
        events += [list(event) for event in state["events"]]
        for source, destination in state["kv_copies"]:
            rows[destination] = model.copy_row(rows[source])

    winner = branches[state["winner"]]
    names = ("block_size", "committed", "merged", "synced")
    return DreamResult(
        canvas=winner["tokens"][len(prompt) :],
        tokens=before_eos(winner["tokens"][len(prompt) :], model.eos_token_ids),
        nfe_init=nfe["init"],
        nfe_block=nfe["block"],
        nfe_refresh=nfe["refresh"],
        winner=state["winner"],
        winner_block_size=winner["block_size"],
        stop_reason=state["stop_reason"],
        branches=[
            dict({name: b[name] for name in names}, tokens=b["tokens"][len(prompt) :]) for b in branches
        ],
        events=events,
    )


def before_eos(tokens, eos_token_ids):
    """The text: also where no token counted as an EOS it ends there."""
    ends = [position for position, token in enumerate(tokens) if token in eos_token_ids]
    return tokens[: ends[0]] if ends else tokens


def predict(model, tokens, queries, row):
    """One forward over the positions `queries`: what `dream_policy` asks of it, by predicted position."""
    queries = list(queries)
    logits = torch.as_tensor(model.forward([tokens[q] for q in queries], queries, row)).float()
    whole = logits.softmax(-1)
    without = logits.clone()
    if model.suppress_mask:
        without[:, model.mask_token_id] = -torch.inf
    tops = np.argmax(without.numpy(), axis=-1).tolist()  # numpy promises the first index on a tie
    without = without.softmax(-1)
    forward = {"top": {}, "confidence": {}, "likely": {}}
    for n, query in enumerate(queries):
        position = query + model.prediction_offset
        if position < len(tokens):
            forward["top"][position] = tops[n]
            forward["confidence"][position] = float(without[n, tops[n]])
            above = (whole[n] > 0.2).nonzero().flatten().tolist()
            forward["likely"][position] = {token: float(whole[n, token]) for token in above}
    return forward
