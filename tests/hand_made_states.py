"""States of the oracle's policy, made by hand: a prompt of two tokens, MASK is 9, EOS 8."""

from oracle import OracleConfig, policy


def make_state(config, rows, **fields):
    """A state whose branches hold `rows`; each field is a list with one entry per branch."""
    state = policy.new_state([0, 0], config, 9, [7, 8])
    for i, (branch, row) in enumerate(zip(state["branches"], rows, strict=True)):
        branch["tokens"] = [0, 0, *row]
        branch["decoded"] = 1
        branch.update({name: values[i] for name, values in fields.items()})
    return state


def forward(start, tops, confidences, probes=None):
    places = range(start, start + len(tops))
    probes = probes or [0.0] * len(tops)
    names = {"top": tops, "confidence": confidences, "probe": probes}
    return {name: dict(zip(places, values, strict=True)) for name, values in names.items()}


def config_of(**options):
    options = {"gen_length": 4, "block_sizes": (4,), "eos_exit": "none", **options}
    return OracleConfig(**options).resolve()
