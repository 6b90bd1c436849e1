"""Random mixes of requests for the engine: what `generate` gives alone is what each must give in company."""

import random

import blockbatch
from blockbatch.decoding.engine import Engine
from oracle import ScriptedModel
from scripted_engine import EngineScripted

GEN_LENGTHS = (16, 32, 48, 64)


def random_config(rng, vocab_size, dream=False, gen_lengths=GEN_LENGTHS, samples=False):
    """Settings of any method that a model with full attention has."""
    gen_length, given = rng.choice(gen_lengths), {}
    if rng.random() < 0.6:  # so that some texts end before their canvas does
        given = dict(eos_token_ids=tuple(rng.sample(range(vocab_size - 1), 3)))
    if samples and rng.random() < 0.3:
        given |= dict(temperature=rng.choice((0.5, 1.0)), seed=rng.randrange(1000))
        if rng.random() < 0.5:
            given |= dict(top_p=rng.choice((0.5, 0.9)))
    method = rng.choice(["blockbatch"] * 3 + ["dual_cache"] * 2 + ["local_leap", "prefix_cache", "vanilla"])
    options = dict(method=method, gen_length=gen_length, eos_exit=rng.choice(("prefix", "window", "none")))
    sizes = [size for size in (4, 8, 16, 32, 48, 64) if gen_length % size == 0]
    if method == "blockbatch":
        options["block_sizes"] = tuple(rng.sample(sizes, rng.randint(1, min(4, len(sizes)))))
        if dream and rng.random() < 0.5:
            options |= dict(policy="dream_published", eos_exit=rng.choice(("prefix", "none")))
            options |= dict(threshold=rng.choice((0.2, 0.5, 0.9)), refresh_interval=rng.choice((8, 16)))
            return blockbatch.DecodeConfig(**options | given)
        options |= dict(
            merge_threshold=rng.choice((0.5, 0.6, None)),
            sync_threshold=rng.choice((2, 8, None)),
            refresh_interval=rng.choice((8, 16, 32, None)),
            commit=rng.choice(("threshold", "local_leap")),
        )
    else:
        options["block_size"] = rng.choice(sizes)
    if method in ("blockbatch", "dual_cache", "local_leap"):
        options |= dict(
            refresh_scope=rng.choice(("canvas", "generation")), query_span=rng.choice(("window", "open"))
        )
    if method in ("dual_cache", "local_leap") and options["query_span"] == "window" and rng.random() < 0.5:
        options["drafts"] = tuple(sorted(rng.sample(range(1, options["block_size"]), rng.randint(1, 3))))
    if method == "vanilla":
        options["steps"] = gen_length // rng.choice((1, 2, 4))
    else:
        options["threshold"] = rng.choice((0.1, 0.3, 0.6, 0.9))
    if "temperature" in given:
        options.pop("drafts", None)
    return blockbatch.DecodeConfig(**options | given)


def scripted(seed, dream=False, backend=None):
    """A fast model whose logits tell which K/V each query saw."""
    rng = random.Random(seed)
    model = EngineScripted(
        ScriptedModel(
            seed,
            peak=rng.choice(((0.0, 4.0), (1.0, 8.0), (5.0, 10.0))),
            eos_rate=rng.choice((0.0, 0.01, 0.03)),
            prediction_offset=int(dream),
        )
    )
    model.backend = backend
    return model


def random_prompt(rng, vocab_size, longest=40):
    return [rng.randrange(vocab_size - 2) for _ in range(rng.choice((1, 3, 9, 20, longest)))]


def outcome(result):
    """All that must be equal; seconds alone are not."""
    return result.canvas, result.tokens, result.nfe, result.stop_reason, result.block_size, result.branches


def run_mix(model, requests, rng, *, check=None, cancel=0.0, **options):
    """Decodes (prompt, config) pairs in one engine, joining at random forwards, and compares each with
    `generate`; gives the engine and its requests.

    Args:
        check: called with the engine behind every step.
        cancel: share of the requests that are cancelled at some forward.
    """
    engine = Engine(model, **{"max_requests": 6, "cache_tokens": 1 << 14, **options})
    joins = sorted((rng.randrange(3 * len(requests)), index) for index in range(len(requests)))
    handles, ends, step = {}, {}, 0
    while joins or engine.stats().running or engine.stats().waiting:
        while joins and joins[0][0] <= step:
            _, index = joins.pop(0)
            prompt, config = requests[index]
            handles[index] = engine.submit(prompt, config)
            if rng.random() < cancel:
                ends[index] = step + rng.randrange(8)
        for index in [index for index, at in ends.items() if at <= step]:
            engine.cancel(handles[index])
            del ends[index]
        engine.step()
        step += 1
        if check is not None:
            check(engine)
    for index, (prompt, config) in enumerate(requests):
        handle = handles[index]
        if handle.status == "cancelled":
            assert cancel
            continue
        assert handle.status == "finished", handle.error
        if getattr(model, "pool", None) is not None:
            model.pool.forget()  # what the engine kept of this very prompt
        expected = blockbatch.generate(model, prompt, config)
        assert outcome(handle.result) == outcome(expected), (index, config)
        assert handle.nfe == expected.nfe
        assert handle.final == expected.tokens or expected.stop_reason == "stop"
    assert engine.stats().cache_usage == 0 and pages_in_use(engine) == 0
    return engine, [handles[index] for index in range(len(requests))]


def pages_in_use(engine):
    """Pages that requests hold, as the device has it."""
    return engine._lane.pages_in_use()


def random_mix(
    model, seed, number, *, dream=False, gen_lengths=GEN_LENGTHS, config=None, samples=False, **options
):
    """`run_mix` of so many random requests; `config`: that all of them have;
    `samples`: whether some draw their tokens."""
    rng, vocab_size = random.Random(seed), model.spec.vocab_size
    requests = []
    for _ in range(number):
        drawn = config or random_config(rng, vocab_size, dream, gen_lengths, samples)
        requests.append((random_prompt(rng, vocab_size), drawn))
    return run_mix(model, requests, rng, **options)
