"""What the processes of `rank_processes` do with whole rows: each function runs on every rank."""

import torch

import blockbatch
from blockbatch.decoding import dealt_rows, forward, session
from rank_cases import decode, model_of, place


def decode_all(name, cases, dtype="float32", row_tokens=None, **more):
    """What each decode ends with, and the rounds of rows that it dealt: [(phase, rows of each rank)]."""
    found, usual, tokens = [], dealt_rows._round, session.ROW_TOKENS
    if row_tokens is not None:
        session.ROW_TOKENS = dict.fromkeys(tokens, row_tokens)

    def noted(share, batch, plan, each):
        rounds.append((plan.phase, [list(rows) for rows in each]))
        return usual(share, batch, plan, each)

    dealt_rows._round = noted
    try:
        for prompt, options in cases:
            rounds = []
            found.append((decode(name, prompt, options, dtype, whole_rows=True, **more), rounds))
    finally:
        dealt_rows._round, session.ROW_TOKENS = usual, tokens
    return found


def first_forward(name, prompts, options, dtype="float32"):
    """Keys, values and confidences behind the first forward: of dealt rows, and of rows in parts."""
    model, usual, found = model_of(name, dtype, whole_rows=True), forward._apply_policy, []
    whole, kept = model.share.whole, []

    def noted(batch, predictions):
        if kept:  # of later ones some are captured, which must not copy
            return usual(batch, predictions)
        table = batch.cache.page_table.long()
        order = predictions.target.argsort()
        held = batch.cache.kv[:, :, table].float().cpu()  # [layers, 2, rows, pages, page_size, heads, dim]
        kept.append((held, predictions.target[order].cpu(), predictions.confidence[order].cpu()))
        return usual(batch, predictions)

    try:
        forward._apply_policy = noted
        for model.share.whole in (whole, None):
            kept.clear()
            blockbatch.generate(model, prompts, blockbatch.DecodeConfig(**options))
            found.append(kept[0])
    finally:
        model.share.whole, forward._apply_policy = whole, usual
    return found


def exchanged(shape, sends, name="tiny"):
    """Whether this rank received what was meant for it, by parts whose numbers say who sent them whereto."""
    (rank, size), device = place(), model_of(name, whole_rows=True).device
    exchange, found, kept = model_of(name, whole_rows=True).share.exchange, [], []
    for number in range(sends):
        pages = shape[0] + number
        parts = [
            torch.full((2, pages, *shape[1:]), 100.0 * number + 10 * rank + receiver, device=device)
            for receiver in range(size)
        ]
        target = torch.full((size, 2, pages, *shape[1:]), float("nan"), device=device)

        def receive(received, piece, target=target):
            for sender, part in enumerate(received):
                target[sender, :, piece].copy_(part)

        exchange.send(parts, receive)
        kept.append(parts)
        found.append(target)
    exchange.finish()
    return [
        all(bool((target[sender] == 100.0 * number + 10 * sender + rank).all()) for sender in range(size))
        for number, target in enumerate(found)
    ]
