"""What the processes of `rank_processes` do with a block-causal model: each function runs on every rank."""

import contextlib

import blockbatch
import rank_processes
from block_causal_data import load, records
from blockbatch.decoding.engine import Engine
from blockbatch.generation import open_session
from rank_cases import place
from test_block_conformance import check


def fresh(name):
    return blockbatch.load_model(
        name, device=rank_processes.DEVICE, dtype="float32", tensor_parallel=place()[1]
    )


def check_records(family, indices):
    model, known = load(family, tensor_parallel=place()[1], device=rank_processes.DEVICE), records(family)
    for index in indices:
        check(model, known[index])


def diverge(name, at_forward, prompt, options):
    """A decode whose last rank holds another token from some forward on: how far each rank comes."""
    model = fresh(name)
    session = open_session(model, model.tokenizer.encode(prompt), blockbatch.DecodeConfig(**options))
    rank, size = place()
    forwards = 0
    try:
        while session.step() is not None:
            forwards += 1
            if forwards == at_forward and rank == size - 1:
                session.texts[0].ids[0] += 1  # of the prompt, whose keys are computed
    except blockbatch.RankError as error:
        return forwards, str(error)
    return forwards, "none"


def diverge_in_engine(name, at_forward, prompt, options):
    """The same of a request in an engine."""
    model = fresh(name)
    engine = Engine(model, max_requests=2, cache_tokens=1 << 12)
    run, forwards = engine._lane._run, 0

    def counted(seats):
        nonlocal forwards
        forwards += 1
        if forwards == at_forward and place()[0] == place()[1] - 1:
            seats[0].place.texts[0].ids[0] += 1
        return run(seats)

    engine._lane._run = counted
    try:
        if place()[0]:
            engine.follow()
            return "none"
        with contextlib.closing(engine):
            request = engine.submit(model.tokenizer.encode(prompt), blockbatch.DecodeConfig(**options))
            engine.run_until_idle()
            return f"{request.status}"
    except blockbatch.RankError as error:
        return str(error)


def poison(name, prompt, options):
    """Decodes of a model one of whose ranks holds a NaN, in its part of a product or of the LM head."""
    errors = []
    for field in ("down_weight", "lm_head"):
        model = fresh(name)
        if place()[0] == place()[1] - 1:
            weights = model.weights
            part = weights.lm_head if field == "lm_head" else weights.layers[0].down_weight
            part[3] = float("nan")
        try:
            blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options))
        except RuntimeError as error:
            errors.append(str(error))
    return errors
