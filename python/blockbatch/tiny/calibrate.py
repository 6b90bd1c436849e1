"""Temperature of the trained model's head, fitted to parallel commits.

The threshold rule commits every token of a large block at 0.9 or above. Confidences that are right token by
token are too high for that: sixty independent tokens at 0.97 are all right in one case of six. Dividing the
logits by a temperature above 1 leaves each top token as it is and makes the rule wait for what is not yet
certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from blockbatch.tasks.built_in import DrawnProblem
from blockbatch.tiny.evaluate import evaluate
from blockbatch.tiny.train_model import TrainModel

TEMPERATURES = (1.0, 1.5, 2.0, 2.5, 3.0)
_TOLERANCE = 0.01


def family_mean(result: dict[str, Any]) -> float:
    """Mean accuracy over the families of an `evaluate` result."""
    values = [value for key, value in result["accuracy"].items() if "/" not in key]
    return sum(values) / len(values)


@torch.no_grad()
def fit_temperature(
    model: TrainModel, tokenizer: Tokenizer, problems: Sequence[DrawnProblem], *, rows: int, canvas: int
) -> dict[str, Any]:
    """Divide the head by the lowest temperature at which blocks of 128 cost at most a point of accuracy.

    The measure is one token per step in blocks of 32. `problems` should be held out from training and not be
    those of the final test. If no temperature suffices, the highest is taken. Returns what was measured;
    `model.head` is written.
    """
    sizes = {"rows": rows, "canvas": canvas}
    aim = family_mean(evaluate(model, tokenizer, problems, block_size=32, **sizes)) - _TOLERANCE
    trained = model.head.clone()
    tried = []
    for temperature in TEMPERATURES:
        model.head.copy_(trained / temperature)
        result = evaluate(model, tokenizer, problems, block_size=128, threshold=0.9, **sizes)
        accuracy = family_mean(result)
        tried.append({"temperature": temperature, "accuracy": accuracy, "forwards": result["mean_forwards"]})
        if accuracy >= aim:
            break
    return {"temperature": temperature, "aim": aim, "tried": tried}
