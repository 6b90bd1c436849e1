"""Block diffusion as published (SDAR, Fast-dLLM v2), naively: a plain model, a mask tensor, one loop a rule.

Shares nothing with the package. `tests/data/block_causal/spec.md` is what it follows.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class PlainBlockModel:
    """A checkpoint of either family in plain torch."""

    def __init__(self, folder, mask_token_id, dtype=torch.float32):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
        self.weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.mask_token_id = mask_token_id
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        self.head_dim = self.config.get("head_dim", hidden // heads)

    def forward(self, ids, stored, size, cached=None):
        """Logits, and K and V of the new tokens by layer.

        ids: new tokens at positions behind `stored`; stored: per layer (k, v) [n, heads, d] or None.

        size: of the mask; None: everything sees everything. cached: (K and V of a block, place of ids in
        it), for a forward of a part of a block: its tokens take their places there.
        """
        before = len(stored[0][0]) if stored else 0
        first = before + (cached[1] if cached else 0)
        positions = torch.arange(first, first + len(ids))
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        new = []
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = (self.heads(h, f"{name}self_attn.{part}", positions) for part in "qkv")
            own = (k, v)
            if cached:
                block, place = cached[0][layer], cached[1]
                own = tuple(
                    torch.cat((old[:place], part, old[place + len(ids) :])) for old, part in zip(block, own)
                )
            new.append(own)
            k, v = (torch.cat((stored[layer][i], own[i])) if stored else own[i] for i in (0, 1))
            x = (
                x
                + self.attention(q, k, v, positions, size) @ self.weights[name + "self_attn.o_proj.weight"].T
            )
            h = self.norm(x, name + "post_attention_layernorm")
            gate, up = (h @ self.weights[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.weights[name + "mlp.down_proj.weight"].T
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self.norm(x, "model.norm") @ head.T, new

    def norm(self, x, name):
        x = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * self.weights[name + ".weight"]

    def heads(self, h, name, positions):
        x = h @ self.weights[name + "_proj.weight"].T
        if name + "_proj.bias" in self.weights:
            x = x + self.weights[name + "_proj.bias"]
        x = x.view(len(h), -1, self.head_dim)
        if name.endswith("v"):
            return x
        if name + "_norm.weight" in self.weights:
            x = self.norm(x, name + "_norm")
        inverse = self.config["rope_theta"] ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle = torch.outer(positions.float(), inverse).repeat(1, 2)[:, None]
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    def attention(self, q, k, v, positions, size):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.head_dim**-0.5
        if size is not None:
            sees = positions[:, None] // size >= torch.arange(len(k)) // size
            scores = scores.masked_fill(~sees, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def top(logits):
    confidence, token = logits.float().softmax(-1).max(-1)
    return token.tolist(), confidence.tolist()


def joined(stored, new):
    if not stored:
        return new
    return [(torch.cat((a, c)), torch.cat((b, d))) for (a, b), (c, d) in zip(stored, new)]


def sdar(model, prompt, gen_length, block, steps, rule, threshold, stop):
    """Returns (prompt and text, forwards as [kind, tokens, stored before, ids])."""
    mask, log, stored = model.mask_token_id, [], None
    blocks = -(-(len(prompt) + gen_length) // block)
    canvas = prompt + [mask] * (blocks * block - len(prompt))
    first = len(prompt) // block
    if first:
        log.append(["prefill", first * block, 0, canvas[: first * block]])
        _, stored = model.forward(canvas[: first * block], None, block)
    for j in range(first, blocks):
        start, end = j * block, (j + 1) * block
        step = 0
        while True:
            ids = canvas[start:end]
            masked = [i for i in range(block) if ids[i] == mask]
            logits, new = model.forward(ids, stored, None)
            log.append(["denoise" if masked else "store", block, start, ids])
            if not masked:
                stored = joined(stored, new)
                break
            quota = block // steps + (step < block % steps)
            tokens, confidence = top(logits)
            ranked = sorted(masked, key=lambda i: -confidence[i])
            sure = [i for i in masked if threshold is not None and confidence[i] > threshold]
            chosen = ranked[:quota]
            if rule == "dynamic" and len(sure) >= quota:
                chosen = sure
            elif rule == "sequential":
                chosen = masked[:quota]
            elif rule == "all":
                chosen = masked
            for i in chosen:
                canvas[start + i] = tokens[i]
            step += 1
        if any(token in stop for token in canvas[len(prompt) : end]):
            break
    return canvas, log


def stopped(tokens, stop, mask, batch):
    """Whether everything up to the first stop id stands; the evaluation's sampler does not ask."""
    return not batch and stop in tokens and mask not in tokens[: tokens.index(stop)]


def fast_dllm_v2(
    model, prompt, max_new_tokens, block, sub, threshold, cache, stop, *, batch=False, fixed=False
):
    """The same; batch: the evaluation's sampler without its padding; fixed: a prompt of one block is read."""
    mask, log, stored, text = model.mask_token_id, [], None, list(prompt)
    trained, p = model.config["bd_size"], len(prompt)
    whole = p // block * block
    if p > block or (fixed and p == block):
        logits, stored = model.forward(prompt[:whole], None, block)
        log.append(["prefill", whole, 0, prompt[:whole]])
        if whole == p:
            text.append(top(logits)[0][-1])
    finished = False
    for _ in range(max_new_tokens // block):
        if not batch and stop in text[p:]:
            break
        start = len(text)
        text += [mask] * (block - start % block)
        base, held = len(text) - block, None
        before = len(stored[0][0]) if stored else 0

        while mask in text[base:] and not stopped(text[start:], stop, mask, batch):
            for a in range(0, block, sub):
                while mask in text[base + a : base + a + sub]:
                    if stopped(text[start:], stop, mask, batch):
                        break
                    if not cache or held is None or text[base + a] == mask:
                        ids = text[base:]
                        logits, new = model.forward(ids, stored, trained)
                        held = new if cache else None
                        log.append(["block", block, before, ids])
                        rows = {o: max(o - 1, 0) for o in range(a, a + sub)}
                    else:
                        ids = text[base + a : base + a + sub]
                        logits, held = model.forward(ids, stored, None, (held, a))
                        log.append(["sub", sub, before, ids])
                        rows = {o: o - 1 - a for o in range(a + 1, a + sub)}
                    tokens, confidence = top(logits)
                    masked = [o for o in range(a, a + sub) if text[base + o] == mask]
                    best = max(masked, key=lambda o: confidence[rows[o]])
                    for o in masked:
                        if confidence[rows[o]] > threshold or o == best:
                            text[base + o] = tokens[rows[o]]
                            finished |= tokens[rows[o]] == stop
        if stopped(text[start:], stop, mask, batch):
            break
        if batch and finished:
            return text[: text.index(stop, p) + 1], log
        logits, new = model.forward(text[base:], stored, block)
        log.append(["store", block, before, text[base:]])
        stored = joined(stored, new)
        text.append(top(logits)[0][-1])
    if not batch and stop in text[p:]:
        text = text[: text.index(stop, p) + 1]
    return text, log
