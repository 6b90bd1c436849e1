"""Arguments that the operators take, small and on any device."""

import torch

import blockbatch_kernels as bbk

MASK, EOS, VOCABULARY = 49, 48, 50
ROTATED_OPERATORS = ("linear_rope_kv_write", "linear_rope_kv_write_fp8")
QUANTIZED_OPERATORS = ("quantize_rows", "rms_norm_fp8", "swiglu_fp8", "linear_fp8", "linear_swiglu_fp8")
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


def kv_in_e4m3(arguments):
    """The same with caches in e4m3; scales of another power of two for each head."""
    kv_heads, device = arguments["k_cache"].shape[2], arguments["k_cache"].device
    powers = 2.0 ** torch.arange(-4, kv_heads - 4)
    scales = dict(k_scale=powers.to(device), v_scale=(powers * 2).flip(0).to(device))
    for name in ("k", "v"):
        stored = arguments[f"{name}_cache"].float() / scales[f"{name}_scale"][:, None]
        arguments[f"{name}_cache"] = stored.to(torch.float8_e4m3fn)
    return {**arguments, **scales}


def whole_numbers(shape, device, dtype):
    """Small ones: their sums are exact, in whatever order a matrix library adds them."""
    return torch.randint(-2, 3, shape).to(device, dtype)


def linear_rope(device, dtype, heads=4, kv_heads=2, head_dim=64, page_size=16):
    arguments = rope(device, dtype, heads, kv_heads, head_dim, page_size)
    tokens, rows = len(arguments.pop("q")), (heads + 2 * kv_heads) * head_dim
    del arguments["k"], arguments["v"]
    return dict(
        x=whole_numbers((tokens, 64), device, dtype),
        weight=whole_numbers((rows, 64), device, dtype),
        bias=whole_numbers((rows,), device, dtype),
        **arguments,
        num_heads=heads,
    )


def linear_rope_fp8(device, dtype, **sizes):
    """The same by values in e4m3 and scales that are powers of two."""
    arguments = linear_rope(device, dtype, **sizes)
    rows = len(arguments["weight"])
    x, weight = (arguments.pop(name).to(torch.float8_e4m3fn) for name in ("x", "weight"))
    x_scale, weight_scale = torch.full((len(x),), 0.5), 2.0 ** -(torch.arange(rows) % 3)
    scales = dict(x_scale=x_scale.to(device), weight_scale=weight_scale.to(device))
    return dict(x=x, weight=weight, **scales, **arguments, out_dtype=dtype)


def e4m3(shape, device):
    """Small whole numbers: their sums are exact."""
    return whole_numbers(shape, device, torch.float32).to(torch.float8_e4m3fn)


def quantized(operator, device, dtype):
    if operator == "linear_fp8":
        scales = (torch.rand(size).add(0.5).to(device) for size in (5, 32))
        return dict(
            x=e4m3((5, 64), device),
            x_scale=next(scales),
            weight=e4m3((32, 64), device),
            weight_scale=next(scales),
            bias=whole_numbers((32,), device, dtype),
            out_dtype=dtype,
        )
    if operator == "linear_swiglu_fp8":
        ones = torch.ones(5).to(device), torch.full((32,), 2.0**-5).to(device)
        x, weight = e4m3((5, 64), device), e4m3((32, 64), device)
        return dict(x=x, x_scale=ones[0], weight=weight, weight_scale=ones[1], out_dtype=dtype)
    # Norms of 1, halves of SwiGLU that are exact, and a largest magnitude of 448 * 2^n.
    if operator == "rms_norm_fp8":
        signs = torch.randint(0, 2, (2, 5, 64)) * 2.0 - 1
        x, residual = (signs * torch.tensor([3.0, 1.0]).view(2, 1, 1)).to(device, dtype)
        weight = torch.randint(1, 15, (64,)).to(device, dtype)
        return dict(x=x, weight=weight, residual=residual, eps=1e-5)
    if operator == "swiglu_fp8":
        return dict(gate_up=torch.randn(5, 64).to(device, dtype))
    return dict(x=torch.randn(5, 64).to(device, dtype))


def policy(device):
    """Two requests of two branches at their first forward."""
    state = bbk.BranchState.create(
        ints([[1, 2, 3], [4, 5, 0]], device), ints([3, 2], device), ints([4, 8], device), 16, MASK, 14
    )
    plan = bbk.initial_plan(state, PARAMS)
    target = torch.cat((torch.arange(16), torch.arange(32, 48))).to(device)
    top_token, confidence = (target % MASK).int(), torch.linspace(0.5, 1.0, 32, device=device)
    likely_token = torch.stack((top_token, *[torch.full_like(top_token, -1)] * 3), 1)
    likely_probability = torch.where(likely_token < 0, 0.0, confidence.unsqueeze(1))
    predictions = (target, top_token, confidence, confidence / 2, likely_token, likely_probability)
    return state, plan, bbk.Predictions(*predictions)


def sampling_rules(device):
    """Three requests: one of noise alone, one greedy, one with everything that there is."""
    return bbk.SamplingRules(
        temperature=torch.tensor([1.0, 0.0, 0.5], device=device),
        seed=torch.tensor([7, 1, 2**40 + 3], device=device),
        forward=ints([0, 3, 9], device),
        changed_token=ints([2, EOS], device),
        logit_bias=torch.tensor([[0.0, 0.0], [-float("inf"), 1.5], [2.0, 0.0]], device=device),
        banned_before=ints([[0, 0], [0, 0], [0, 6]], device),
        top_p=torch.tensor([1.0, 0.5, 0.8], device=device),
        top_k=ints([0, 3, 5], device),
    )


def with_head_in_e4m3(arguments):
    """The same with whole numbers, a head in e4m3 and scales of powers of two: logits are exact but for the
    scale of their row."""
    hidden, weight = arguments["hidden"], arguments["weight"]
    arguments["hidden"] = whole_numbers(hidden.shape, hidden.device, hidden.dtype)
    arguments["weight"] = e4m3(weight.shape, hidden.device)
    powers = torch.randint(-5, -3, (len(weight),)).to(hidden.device)
    return dict(arguments, weight_scale=2.0**powers)


def arguments_of(operator, device="cpu", dtype=torch.float32, seed=0):
    """Keyword arguments that the operator takes, all of them; float tensors in `dtype`."""
    torch.manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape).to(device, dtype)

    if operator == "rms_norm":
        return dict(x=rand(5, 64), weight=rand(64), residual=rand(5, 64), eps=1e-5)
    if operator == "swiglu":
        return dict(gate_up=rand(5, 64))

    if operator in ("linear", "linear_swiglu"):
        x, weight, bias = (whole_numbers(shape, device, dtype) for shape in ((5, 64), (32, 64), (32,)))
        return dict(x=x, weight=weight, bias=bias) if operator == "linear" else dict(x=x / 16, weight=weight)
    if operator in QUANTIZED_OPERATORS:
        return quantized(operator, device, dtype)
    if operator == "rope_kv_write":
        return rope(device, dtype) | dict(q_norm=rand(64), k_norm=rand(64), norm_eps=1e-5)
    if operator == "rope_kv_write_fp8":
        return kv_in_e4m3(rope(device, dtype)) | dict(q_norm=rand(64), k_norm=rand(64), norm_eps=1e-5)
    if operator in ROTATED_OPERATORS:
        return kv_in_e4m3((linear_rope_fp8 if operator.endswith("fp8") else linear_rope)(device, dtype))
    if operator in ("attention_plan", "varlen_attention", "varlen_attention_fp8"):
        tensors = attention(device, dtype)
        table = {name: tensors[name] for name in ("page_table", "cu_seqlens_q", "seqlens_k")}
        table |= dict(page_size=16, num_tokens=10, num_heads=4, num_kv_heads=2)
        if operator == "attention_plan":
            return table
        if operator == "varlen_attention_fp8":
            tensors = kv_in_e4m3(tensors)
        return {**tensors, "plan": bbk.attention_plan(**table)}
    if operator.startswith("lm_head") and operator.endswith("_fp8"):
        arguments = arguments_of(operator.removesuffix("_fp8"), device, dtype, seed)
        return with_head_in_e4m3(arguments)
    if operator == "lm_head_confidence":
        # Logits so small that their rounding hardly shows in the probabilities.
        probes = torch.arange(7, dtype=torch.int32, device=device)
        hidden, weight = rand(7, 64) / 8, rand(VOCABULARY, 64)
        return dict(hidden=hidden, weight=weight, probe_tokens=probes, suppress_token=MASK)
    if operator == "lm_head_sample":
        # Whole numbers: every backend has the same logits.
        hidden, weight = whole_numbers((7, 64), device, dtype), whole_numbers((VOCABULARY, 64), device, dtype)
        return dict(
            hidden=hidden / 8,
            weight=weight,
            rules=sampling_rules(device),
            request=ints([0, 1, 2, 0, 1, 2, 0], device),
            positions=ints([3, 9, 4, 8, 2, 7, 5], device),
            probe_tokens=torch.arange(7, dtype=torch.int32, device=device),
            suppress_token=MASK,
        )
    if operator == "lm_head_likely":
        # The higher half of each row's probabilities falls to one to four tokens.
        weight = rand(VOCABULARY, 64) / 64
        weight[:4], hidden = whole_numbers((4, 64), device, dtype), whole_numbers((7, 64), device, dtype)
        return dict(hidden=hidden, weight=weight, suppress_token=MASK)
    if operator == "share_pages":
        page_table = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
        return dict(page_table=page_table, source_row=ints([0, 0, -1, 2], device))
    if operator == "copy_pages":
        return dict(
            kv_cache=rand(2, 2, 8, 16, 2, 64),
            page_table=ints([[0, 1], [0, 1], [4, 5], [6, 7]], device),
            write_start=ints([3, 17, 0, 2], device),
            write_end=ints([9, 20, 0, 30], device),
            num_branches=2,
            write_positions=torch.arange(32, dtype=torch.int32, device=device).repeat(4, 1),
            pool=bbk.PagePool.of(torch.arange(7, -1, -1, dtype=torch.int32, device=device)),
        )
    state, plan, predictions = policy(device)
    if operator == "pack_windows":
        page_table = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
        sizes = dict(page_size=16, capacity=40, predict_capacity=34)
        return dict(state=state, plan=plan, page_table=page_table, **sizes)
    out = bbk.StepPlan.allocate(4, 16, torch.device(device))
    if operator == "initial_plan":
        return dict(state=state, params=PARAMS, out=out)
    events = bbk.PolicyEvents.allocate(4, 16, torch.device(device))
    return dict(state=state, predictions=predictions, plan=plan, params=PARAMS, out=(out, events))
