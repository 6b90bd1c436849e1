"""Arguments that the operators take, small and on any device."""

import torch

import blockbatch_kernels as bbk

MASK, EOS, VOCABULARY = 49, 48, 50
PARAMS = bbk.PolicyParams(mask_token_id=MASK, eos_token_ids=(EOS,))


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def attention(device, dtype, heads=4, kv_heads=2, head_dim=64, page_size=16):
    """Two rows of 3 and 6 queries over 70 and 40 keys; one token of padding."""
    lengths, columns = (70, 40), -(-70 // page_size)
    shape = (2 * columns, page_size, kv_heads, head_dim)
    return dict(
        q=torch.randn(10, heads, head_dim).to(device, dtype),
        k_cache=torch.randn(shape).to(device, dtype),
        v_cache=torch.randn(shape).to(device, dtype),
        page_table=torch.randperm(2 * columns).int().view(2, columns).to(device),
        cu_seqlens_q=ints([0, 3, 9], device),
        seqlens_k=ints(lengths, device),
    )


def rope(device, dtype, heads=4, kv_heads=2, head_dim=64, page_size=16):
    tokens = 9
    angle = torch.rand(40, head_dim // 2)
    caches = torch.randn(2, 3, page_size, kv_heads, head_dim).to(device, dtype)
    slots = torch.randperm(3 * page_size)[:tokens] if page_size >= 3 else torch.arange(3 * page_size)
    slots = torch.cat((slots, torch.full((tokens - len(slots),), -1)))
    return dict(
        q=torch.randn(tokens, heads, head_dim).to(device, dtype),
        k=torch.randn(tokens, kv_heads, head_dim).to(device, dtype),
        v=torch.randn(tokens, kv_heads, head_dim).to(device, dtype),
        positions=torch.randint(0, 40, (tokens,)).int().to(device),
        slot_mapping=slots.to(device),
        cos=angle.cos().to(device),
        sin=angle.sin().to(device),
        k_cache=caches[0],
        v_cache=caches[1],
    )


def policy(device):
    """Two requests of two branches at their first forward."""
    state = bbk.BranchState.create(
        ints([[1, 2, 3], [4, 5, 0]], device), ints([3, 2], device), ints([4, 8], device), 16, MASK
    )
    plan = bbk.initial_plan(state, PARAMS)
    target = torch.cat((torch.arange(16), torch.arange(32, 48))).to(device)
    top_token, confidence = (target % MASK).int(), torch.linspace(0.5, 1.0, 32, device=device)
    return state, plan, bbk.Predictions(target, top_token, confidence, confidence / 2)


def calls(device="cpu", dtype=torch.float32):
    """Operator -> arguments that it takes."""
    torch.manual_seed(0)
    state, plan, predictions = policy(device)
    out = bbk.StepPlan.allocate(4, 16, torch.device(device))
    events = bbk.PolicyEvents.allocate(4, 16, torch.device(device))
    work = attention(device, dtype)
    table = {name: work[name] for name in ("page_table", "cu_seqlens_q", "seqlens_k")}
    sizes = dict(page_size=16, num_tokens=10, num_heads=4, num_kv_heads=2)
    return {
        "rms_norm": dict(
            x=torch.randn(5, 64).to(device, dtype),
            weight=torch.randn(64).to(device, dtype),
            residual=torch.randn(5, 64).to(device, dtype),
            eps=1e-5,
        ),
        "swiglu": dict(gate_up=torch.randn(5, 64).to(device, dtype)),
        "rope_kv_write": rope(device, dtype),
        "attention_plan": {**table, **sizes},
        "varlen_attention": {**work, "plan": bbk.attention_plan(**table, **sizes)},
        "lm_head_confidence": dict(
            hidden=torch.randn(7, 64).div(8).to(device, dtype),
            weight=torch.randn(VOCABULARY, 64).to(device, dtype),
            probe_tokens=torch.arange(7, dtype=torch.int32, device=device),
            suppress_token=MASK,
        ),
        "pack_windows": dict(
            state=state,
            plan=plan,
            page_table=torch.arange(8, dtype=torch.int32, device=device).view(4, 2),
            page_size=16,
            capacity=40,
            predict_capacity=34,
        ),
        "share_pages": dict(
            page_table=torch.arange(8, dtype=torch.int32, device=device).view(4, 2),
            source_row=ints([0, 0, -1, 2], device),
        ),
        "copy_pages": dict(
            kv_cache=torch.randn(2, 2, 8, 16, 2, 64).to(device, dtype),
            page_table=ints([[0, 1], [0, 1], [4, 5], [6, 7]], device),
            write_start=ints([3, 17, 0, 2], device),
            write_end=ints([9, 20, 0, 30], device),
            num_branches=2,
        ),
        "initial_plan": dict(state=state, params=PARAMS, out=out),
        "decode_policy": dict(
            state=state, predictions=predictions, plan=plan, params=PARAMS, out=(out, events)
        ),
    }
