"""Random texts with gaps and random settings, for fills against the naive oracle."""

import blockbatch
from oracle import OracleConfig, ScriptedModel
from oracle.dream_decoder import DreamConfig

CHEAPER = ("blockbatch", "dual_cache", "local_leap")
BLOCK_SIZE_SETS = ((4, 8, 16, 32), (1, 2, 4, 8), (8, 32), (16,), (4, 8, 16, 32, 64))


def scripted(rng, offset=None):
    offset = rng.choice((0, 1)) if offset is None else offset
    return ScriptedModel(
        rng.randrange(10**6),
        peak=rng.choice(((0.0, 2.0), (1.0, 8.0), (3.0, 9.0), (7.0, 10.0))),
        agreement=rng.choice((0.5, 0.8, 0.95)),
        eos_rate=rng.choice((0.0, 0.1)),
        eos_count=rng.choice((1, 2)),
        prediction_offset=offset,
        suppress_mask=bool(offset),
    )


def random_region(rng, model, most=90):
    """MASK first, then gaps and given tokens in turn, EOS among them; at times one gap and nothing behind."""
    length, mask = rng.randint(1, most), model.mask_token_id
    region = []
    while len(region) < length:
        region += [mask] * rng.choice((1, 2, 3, 5, 8, 20))
        if rng.random() < 0.9:
            # Every id but MASK, which is the last.
            region += [rng.randrange(mask) for _ in range(rng.choice((1, 1, 2, 4, 9, 40)))]
    return region[:length]


def trimmed(sizes, length):
    """The block sizes that a region of this length has a use for: of those that hold it whole the first."""
    whole = [size for size in sizes if size >= length][:1]
    return tuple([size for size in sizes if size < length] + whole)


def settings(rng, method, length):
    """(OracleConfig, DecodeConfig) of the same meaning in a fill, which no EOS ends."""
    options = {"method": method, "gen_length": 64}
    if method in CHEAPER:
        options["query_span"] = rng.choice(("window", "open"))
        options["refresh_scope"] = rng.choice(("canvas", "generation"))
    if method == "blockbatch":
        options |= {
            "block_sizes": rng.choice(BLOCK_SIZE_SETS),
            "threshold": rng.choice((0.7, 0.9, 0.95)),
            "merge_threshold": rng.choice((0.5, 0.6)),
            "sync_threshold": rng.choice((1, 4, 8)),
            "refresh_interval": rng.choice((8, 32, None)),
            "commit": rng.choice(("threshold", "local_leap")),
            "tail_threshold": rng.choice((None, None, 0.97)),
        }
    else:
        options |= {"block_size": rng.choice((4, 16, 32))}
        steps = rng.choice((16, 32, 64)) if method != "local_leap" else None
        if method == "vanilla":
            options |= {"steps": steps}
        elif steps and rng.random() < 0.4:
            options |= {"threshold": None, "steps": steps}
        else:
            options |= {"threshold": rng.choice((0.7, 0.9))}
    own = dict(options, eos_exit="none")
    if method == "blockbatch":
        own["block_sizes"] = trimmed(options["block_sizes"], length)
    given = dict(options, eos_exit=rng.choice(("prefix", "window", "none")))
    return OracleConfig(**own), blockbatch.DecodeConfig(**given, trace=True)


def dream_settings(rng, length):
    """The same for the rule that BlockBatch's authors published for Dream."""
    options = {
        "gen_length": 64,
        "threshold": rng.choice((0.7, 0.9)),
        "sync_threshold": rng.choice((1, 4, 8, None)),
        "refresh_interval": rng.choice((8, 32, None)),
    }
    sizes = rng.choice(BLOCK_SIZE_SETS)
    given = dict(options, block_sizes=sizes, eos_exit=rng.choice(("prefix", "none")))
    oracle = DreamConfig(**options, block_sizes=trimmed(sizes, length), eos_exit="none")
    return oracle, blockbatch.DecodeConfig(**given, policy="dream_published")


def assert_filled(result, expected, prompt, region, mask, note):
    """What was given stands, and everything else is as the oracle has it."""
    whole = prompt + region
    assert len(result.canvas) == len(whole) and mask not in result.canvas, note
    assert all(token == held for token, held in zip(whole, result.canvas) if token != mask), note
    assert result.canvas == prompt + expected.canvas, note
    nfe = result.nfe.init, result.nfe.block, result.nfe.refresh
    assert nfe == (expected.nfe_init, expected.nfe_block, expected.nfe_refresh), note
    assert result.block_size == expected.winner_block_size and result.stop_reason == "length", note
    for branch, other in zip(result.branches, expected.branches, strict=True):
        for name in ("block_size", "committed", "merged", "synced"):
            assert getattr(branch, name) == other[name], (note, name)
