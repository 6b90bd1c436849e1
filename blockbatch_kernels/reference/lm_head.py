"""Top token and its softmax probability for every hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows whose logits exist at the same time: 256 x 126,464 fp32 logits are 130 MB.
_CHUNK_ROWS = 256


def lm_head_confidence(
    hidden: Tensor, weight: Tensor, *, probe_tokens: Tensor | None = None, suppress_token: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows = hidden.shape[0]
    top_token = torch.empty(num_rows, dtype=torch.int32, device=hidden.device)
    confidence = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    probe_probability = torch.empty_like(confidence) if probe_tokens is not None else None
    for start in range(0, num_rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        logits = F.linear(hidden[chunk], weight).float()
        if suppress_token is not None:
            logits[:, suppress_token] = float("-inf")
        highest, top_token[chunk] = logits.amax(dim=-1), logits.argmax(dim=-1).int()
        weights = (logits - highest.unsqueeze(-1)).exp_()
        total = weights.sum(dim=-1)
        confidence[chunk] = 1.0 / total
        if probe_tokens is not None:
            probed = weights.gather(-1, probe_tokens[chunk].long().unsqueeze(-1)).squeeze(-1)
            probe_probability[chunk] = probed / total
    return top_token, confidence, probe_probability
