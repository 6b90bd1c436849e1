"""The decodes of published block-causal code in tests/data/block_causal, and how to ask for them."""

import json
import warnings
from pathlib import Path

import blockbatch

DATA = Path(__file__).parent / "data" / "block_causal"
FAMILIES = ("sdar", "fast_dllm_v2")
MASK, PAD = 126, 123


def load(folder, **options):
    return blockbatch.load_model(DATA / folder, mask_token_id=MASK, **{"device": "cpu", **options})


def records(family):
    return json.loads((DATA / family / "trajectories.json").read_text())["trajectories"]


def config(record, **changes):
    """The settings of a record; forwards one by one unless `changes` say otherwise."""
    args = record["args"]
    if record["algorithm"] == "sdar":
        options = dict(
            gen_length=args["gen_length"],
            block_size=args["block"],
            steps=args["steps"],
            commit=args["rule"],
            threshold=args["threshold"],
            eos_token_ids=args["stop"],
            fuse_store=False,
        )
    else:
        options = dict(
            gen_length=args["max_new_tokens"],
            block_size=args["block"],
            sub_block_size=args["sub"],
            threshold=args["threshold"],
            block_cache=args["cache"],
            eos_token_ids=[args["stop"]],
            sampler=record["algorithm"].removeprefix("v2_"),
            strict_published=True,
        )
    return blockbatch.DecodeConfig(method="block_diffusion", **{**options, **changes})


def decode(model, record, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that the model was not trained with
        return blockbatch.generate(model, record["prompt"], config(record, trace=True, **changes))


def expected_canvas(record, result):
    """What the published code left behind the prompt, without the padding of its batch sampler."""
    canvas = record["tokens"][len(record["prompt"]) :]
    length = len(result.canvas)
    if record["algorithm"] == "v2_batch" and set(canvas[length:]) == {PAD}:
        return canvas[:length]
    return canvas


def forwards(result):
    names = ("kind", "packed_tokens", "stored", "input_ids")
    return [[entry[name] for name in names] for entry in result.trace]
