"""Rules and hidden states for tests of lm_head_sample, and a second witness of its noise."""

import math

import torch
import torch.nn.functional as F

import blockbatch_kernels as bbk
from blockbatch_kernels.ops.sampling import sampling_of

LOW = 0xFFFFFFFF


def rules_of(temperature, device="cpu", *, seed=0, forward=0, changed=(), bias=(), before=(), **filters):
    """Of as many requests as there are temperatures; `bias` and `before` are one line for all of them."""
    count = len(temperature)

    def each(value, dtype):
        values = value if isinstance(value, (list, tuple)) else [value] * count
        return torch.tensor(values, dtype=dtype, device=device)

    def lines(values, dtype):
        row = torch.tensor(list(values) or [0] * len(changed), dtype=dtype, device=device)
        return row.repeat(count, 1)

    return bbk.SamplingRules(
        temperature=each(temperature, torch.float32),
        seed=each(seed, torch.int64),
        forward=each(forward, torch.int32),
        changed_token=torch.tensor(list(changed), dtype=torch.int32, device=device),
        logit_bias=lines(bias, torch.float32),
        banned_before=lines(before, torch.int32),
        top_p=each(filters["top_p"], torch.float32) if "top_p" in filters else None,
        top_k=each(filters["top_k"], torch.int32) if "top_k" in filters else None,
    )


def heads_of(logits):
    """Hidden states and weights whose product is exactly `logits`."""
    return torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device), logits.t().contiguous()


def whole_numbers(rows, vocab_size, dim, dtype, seed, device="cpu", scale=0.5):
    """Multiples of a half, whose products every order of summation gives exactly: the same logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (rows, dim), generator=generator) * scale
    weight = torch.randint(-1, 2, (vocab_size, dim), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype)


def mixed(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & LOW
    x ^= x >> 15
    x = x * 0x846CA68B & LOW
    return x ^ x >> 16


def bits_of(seed, position, forward, token):
    """The 32 bits of one token's noise, in Python's integers."""
    keys = []
    for key in (0x243F6A88, 0x85A308D3):
        for word in (seed & LOW, seed >> 32, position & LOW, forward & LOW):
            key = mixed((key ^ word) + 0x9E3779B9 & LOW)
        keys.append(key)
    return mixed(mixed(token + keys[0] & LOW) ^ keys[1])


def draw_of(logits, temperature, seed, position, forward):
    """The drawn token of one row of logits, in fp64; and by how much it won."""
    scores = []
    for token, logit in enumerate(logits):
        v = min((bits_of(seed, position, forward, token) + 0.5) / 2**32, 1 - 2**-24)
        scores.append(logit / temperature - math.log(-math.log1p(-v)))
    best = max(range(len(scores)), key=scores.__getitem__)
    second = max(score for token, score in enumerate(scores) if token != best)
    return best, scores[best] - second


def check(hidden, weight, rules, request, positions, suppress, backend, **options):
    """What a backend gives against the reference, into memory full of NaN."""
    arguments = (hidden, weight, rules, request, positions)
    options |= dict(suppress_token=suppress)
    if weight.shape[0] > 1:
        probes = torch.arange(len(hidden), device=hidden.device) % weight.shape[0]
        options |= dict(probe_tokens=probes.int())
    expected = bbk.lm_head_sample(*arguments, **options, backend="reference")
    got = bbk.lm_head_sample(*arguments, **options, backend=backend)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2e-5, atol=1e-7, equal_nan=True)
    if expected[2] is not None:
        torch.testing.assert_close(got[2], expected[2], rtol=2e-5, atol=1e-30, equal_nan=True)
    check_given_logits(arguments, options, got, backend)
    return got


def check_given_logits(arguments, options, got, backend):
    """The same from the logits themselves, which stay as they are.

    In bits, but on a GPU's Triton: it adds up in another order where the number of tokens in a part is not a
    multiple of 16. The bounds are those of another order in `check`.
    """
    hidden, weight, *about = arguments
    logits = F.linear(hidden, weight)
    before = logits.clone()
    found = sampling_of(hidden, backend).sample_logits(logits, *about, **options)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(found, got, strict=True):
        if other is None:
            assert one is None
        elif backend == "triton" and one.is_cuda and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7, equal_nan=True)
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def every_rule(device, vocab_size):
    """Rules of four requests: noise, none, filters, everything; by what they are."""
    changed = (
        dict(changed=(0, vocab_size // 2), bias=(-math.inf, 1.5), before=(0, 6)) if vocab_size > 3 else {}
    )
    about = dict(
        temperature=[1.0, 0.0, 0.5, 3.0], seed=[1, 2, 2**40 + 3, 2**63 - 1], forward=[0, 5, 9, 70000]
    )
    filters = dict(top_p=[1.0, 0.5, 0.8, 0.6], top_k=[0, 2, 7, 3])
    yield "plain", rules_of(**about, device=device)
    yield "changed", rules_of(**about, device=device, **changed)
    yield "top_p", rules_of(**about, device=device, top_p=filters["top_p"])
    yield "all", rules_of(**about, device=device, **changed, **filters)
