"""The oracle's scripted model behind the engine's model interface, its "K/V" kept in the real paged cache."""

from types import SimpleNamespace

import torch

import blockbatch_kernels as bbk
from blockbatch.kv_cache import KVCache


class EngineScripted:
    """Stores the token (plus one) of every computed position in its cache slot and reads rows back through
    the page tables, so that a wrong slot, a missing copy or a stale share changes the logits.
    """

    def __init__(self, scripted, page_size=16):
        self.scripted, self.page_size = scripted, page_size
        self.device, self.backend = torch.device("cpu"), None
        self.dtype = self.kv_dtype = torch.float32
        self.tokenizer, self.cache_bytes, self.quantization = None, None, None
        self.eos_token_ids = tuple(sorted(scripted.eos_token_ids))
        self.spec = SimpleNamespace(
            family="dream" if scripted.prediction_offset else "llada",
            num_layers=1,
            hidden_size=2,
            intermediate_size=2,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            vocab_size=scripted.vocab_size,
            max_length=4096,
            mask_token_id=scripted.mask_token_id,
            prediction_offset=scripted.prediction_offset,
            suppress_mask=scripted.suppress_mask,
            leap_threshold=0.75,
        )

    def new_cache(self, num_requests, num_branches, canvas_length):
        return KVCache(
            num_requests,
            num_branches,
            canvas_length,
            num_layers=1,
            num_kv_heads=1,
            head_dim=2,
            dtype=torch.float32,
            device=self.device,
            page_size=self.page_size,
        )

    def predict(self, packed, cache, seqlens_k, probe_tokens=None, *, likely=False):
        slots = packed.slot_mapping
        assert (slots >= 0).all() and len(set(slots.tolist())) == len(slots), "two queries share a slot"
        # Layer 0, K, every head dimension.
        cache.kv[0, 0].flatten(0, 1)[slots] = (packed.input_ids.float() + 1).view(-1, 1, 1)
        hidden = torch.zeros(len(packed.predict_index), self.scripted.vocab_size)
        rows = packed.row_index[packed.predict_index]
        for row in rows.unique().tolist():
            length = int(seqlens_k[row])
            pages = cache.page_table[row, : -(-length // cache.page_size)].long()
            assert (pages >= 0).all()
            seen = cache.kv[0, 0, pages, :, 0, 0].flatten()[:length].long() - 1
            positions = packed.positions[packed.predict_index[rows == row]]
            hidden[rows == row] = self.scripted.logits(seen.numpy(), positions.tolist())
        suppress = self.scripted.mask_token_id if self.scripted.suppress_mask else None
        if likely:
            top, confidence, *likely_ones = bbk.lm_head_likely(
                hidden, torch.eye(self.scripted.vocab_size), suppress_token=suppress
            )
            return bbk.Predictions(packed.predict_target, top, confidence, None, *likely_ones)
        top, confidence, probe = bbk.lm_head_confidence(
            hidden, torch.eye(self.scripted.vocab_size), probe_tokens=probe_tokens, suppress_token=suppress
        )
        return bbk.Predictions(packed.predict_target, top, confidence, probe)
