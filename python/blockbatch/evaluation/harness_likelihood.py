"""Requests of lm-evaluation-harness for the likelihood of a text, by the bound of `models.likelihood`."""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from blockbatch.config import DecodeConfig
from blockbatch.generation import generate
from blockbatch.models import Model
from blockbatch.models.likelihood import encode_pair


class LikelihoodSettings:
    """How likelihoods are estimated.

    Args:
        samples: maskings of each answer.
        seed: of the maskings.
        check_greedy: whether it is looked up too if greedy decoding, a token a forward, writes the answer.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(self, samples: int = 128, seed: int = 0, check_greedy: bool = False) -> None:
        for name, value, least in (("likelihood_samples", samples, 1), ("likelihood_seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not isinstance(check_greedy, bool):
            raise TypeError(f"check_greedy: expected true or false, got {check_greedy!r}")
        self.samples, self.seed, self.check_greedy = samples, seed, check_greedy


def answers(
    model: Model, settings: LikelihoodSettings, requests: list[Instance], disable_tqdm: bool = False
) -> list[tuple[float, bool]]:
    """The log-likelihood of every request's continuation, and whether greedy decoding writes it (False where
    it was not looked up). Contexts that do not fit lose their beginning."""
    from tqdm import tqdm

    found = []
    for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood requests"):
        before, tokens = encode_pair(model, *request.args)
        # Something must stand in front of the first token where a position is predicted from the one before.
        before = before or _front(model)
        room = model.spec.max_length - len(tokens)
        if room < model.spec.prediction_offset:
            raise ValueError(
                f"requests: expected continuations of less than {model.spec.max_length} tokens, got "
                f"{len(tokens)}"
            )
        before = before[max(0, len(before) - room) :]
        value = model.log_likelihood(before, tokens, samples=settings.samples, seed=settings.seed).value
        found.append((value, settings.check_greedy and _is_greedy(model, before, tokens)))
    return found


def rolling(
    model: Model, settings: LikelihoodSettings, requests: list[Instance], disable_tqdm: bool = False
) -> list[float]:
    """The log-likelihood of every request's whole text, in windows of the model's length."""
    from tqdm import tqdm

    found = []
    for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood_rolling requests"):
        windows = get_rolling_token_windows(
            token_list=model.tokenizer.encode(request.args[0]),
            prefix_token=model.eos_token_ids[0],
            max_seq_len=model.spec.max_length - 1,
            context_len=1,
        )
        total = 0.0
        for before, tokens in map(make_disjoint_window, windows):
            estimate = model.log_likelihood(before, tokens, samples=settings.samples, seed=settings.seed)
            total += estimate.value
        found.append(total)
    return found


def _front(model: Model) -> list[int]:
    return [model.eos_token_ids[0]] if model.spec.prediction_offset else []


def _is_greedy(model: Model, before: list[int], tokens: list[int]) -> bool:
    config = DecodeConfig("vanilla", gen_length=len(tokens), block_size=len(tokens), eos_exit="none")
    return generate(model, [before], config)[0].canvas == tokens
