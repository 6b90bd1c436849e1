"""Rules and methods for tests of `register_method`."""

import contextlib

import torch

import blockbatch

PROBLEMS = ["Divide with remainder until zero: 51 and 16.", "Divide with remainder until zero: 7 and 3."]


def threshold_rule(state, candidates, confidence):
    """The published rule, once more."""
    return confidence >= state.options["threshold"]


def nothing(state, candidates, confidence):
    return torch.zeros_like(candidates)


@contextlib.contextmanager
def registered(name, rule, *, replace=False, **options):
    """A method of this rule for the length of a test."""
    blockbatch.register_method(name, blockbatch.commit_rule(rule, **options), replace=replace)
    try:
        yield
    finally:
        blockbatch.unregister_method(name)


def told(result):
    """All that a decode says of itself but its times."""
    records = [
        {name: value for name, value in record.items() if name != "seconds"} for record in result.trace or ()
    ]
    return (
        result.canvas, result.nfe, result.branches, result.stop_reason, result.block_size, result.adopted,
        records,
    )  # fmt: skip
