"""Decodes of the built-in model on a fixed part of the test split.

`python tests/tiny_decodes.py` records them anew in tests/data/tiny_decodes.json, which a new checkpoint or a
change of the problems makes necessary.
"""

import json
from pathlib import Path

import torch

import blockbatch
from blockbatch import tiny

RECORDED = Path(__file__).parent / "data" / "tiny_decodes.json"
GEN_LENGTH, PROBLEMS_PER_FAMILY, SEED = 128, 3, 11


def problems():
    return [
        problem
        for family in tiny.FAMILIES
        for problem in tiny.generate_problems(family, "test", PROBLEMS_PER_FAMILY, SEED)
    ]


def config(method):
    return blockbatch.DecodeConfig(method=method, gen_length=GEN_LENGTH, eos_exit="prefix")


def decode(model, problem, method):
    result = blockbatch.generate(model, problem.prompt, config(method))
    return {
        "method": method,
        "prompt": problem.prompt,
        "canvas": result.canvas,
        "nfe": [result.nfe.init, result.nfe.block, result.nfe.refresh],
        "right": tiny.check(problem, result.text),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = blockbatch.load_model("tiny", device="cpu")
    records = [decode(model, problem, method) for problem in problems() for method in blockbatch.METHODS]
    RECORDED.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    for method in blockbatch.METHODS:
        mine = [record for record in records if record["method"] == method]
        print(
            f"{method:13} {sum(r['right'] for r in mine)}/{len(mine)} {sum(sum(r['nfe']) for r in mine)} NFE"
        )
