"""Functions compiled from the registered operators; what each promises alone: test_contracts.py."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

import blockbatch_kernels as bbk

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, EPS = 4, 2, 64, 16, 1e-5
MASK, EOS, VOCABULARY = 49, 48, 50


def ints(*values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


PARAMS = bbk.PolicyParams(mask_token_id=MASK, eos_token_ids=(EOS, 7), refresh_interval=None)


def policy_inputs(device, probe=False):
    """Two requests of two branches at the first forward: state, predictions, plan."""
    state = bbk.BranchState.create(
        torch.arange(10, dtype=torch.int32, device=device).view(2, 5),
        ints(5, 3, device=device),
        ints(4, 8, device=device),
        16,
        MASK,
    )
    plan = bbk.initial_plan(state, PARAMS)
    target = torch.cat((torch.arange(16), torch.arange(16) + 32, torch.tensor([-1]))).to(device)
    top_token = (target % MASK).int()
    confidence = torch.linspace(0.5, 1.0, len(target), device=device)
    return state, bbk.Predictions(target, top_token, confidence, confidence / 2 if probe else None), plan


def copy_pages_inputs(device):
    kv = torch.randn(2, 2, 8, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device)
    page_table = ints(0, 1, 0, 1, 4, 5, 6, 7, device=device).view(4, 2)
    return kv, page_table, ints(3, 17, 0, 2, device=device), ints(9, 20, 0, 30, device=device)


def clones(tree):
    return tree_map_only(torch.Tensor, torch.clone, tree)


def flat(result):
    """The leaves of nested tuples."""
    if isinstance(result, tuple):
        return [leaf for part in result for leaf in flat(part)]
    return [result]


def test_a_plain_call_costs_no_dispatch():
    with torch.profiler.profile() as plain:
        bbk.swiglu(torch.ones(2, 4))
    with torch.profiler.profile() as registered:
        torch.ops.blockbatch_kernels.swiglu(torch.ones(2, 4))
    names = [{event.key for event in profile.key_averages()} for profile in (plain, registered)]
    assert ["blockbatch_kernels::swiglu" in seen for seen in names] == [False, True]


def transformer_layer(x, residual, weights, rope, cache, step, plan_options=None, fused=False):
    """A pre-norm layer as a decoder writes it, from norm to down product; writes residual and cache.

    fused: q, k and v by `linear_rope_kv_write`.
    """
    positions, slots, page_table, cu_seqlens_q, seqlens_k = step
    normed = bbk.rms_norm(x, weights["norm"], eps=EPS, residual=residual)
    where = (positions, slots, *rope, cache[0], cache[1])
    if fused:
        q = bbk.linear_rope_kv_write(normed, weights["qkv"], None, *where, num_heads=HEADS)
    else:
        widths = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        q, k, v = (
            part.unflatten(1, (-1, HEAD_DIM)) for part in F.linear(normed, weights["qkv"]).split(widths, 1)
        )
        bbk.rope_kv_write(q, k, v, *where)
    plan = None
    if plan_options is not None:
        plan = bbk.attention_plan(page_table, cu_seqlens_q, seqlens_k, num_tokens=x.shape[0], **plan_options)
    attended = bbk.varlen_attention(q, cache[0], cache[1], page_table, cu_seqlens_q, seqlens_k, plan=plan)
    normed = bbk.rms_norm(
        F.linear(attended.flatten(1), weights["out"]), weights["norm"], eps=EPS, residual=residual
    )
    return F.linear(bbk.swiglu(F.linear(normed, weights["gate_up"])), weights["down"])


def layer_arguments(device, dtype, tokens):
    """Two rows: all tokens but two belong to the first, the last one is padding."""
    hidden, inner = 96, 160
    torch.manual_seed(tokens)

    def rand(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype)

    weights = dict(
        norm=1 + rand(hidden),
        qkv=rand((HEADS + 2 * KV_HEADS) * HEAD_DIM, hidden),
        out=rand(hidden, HEADS * HEAD_DIM),
        gate_up=rand(2 * inner, hidden),
        down=rand(hidden, inner),
    )
    angle = torch.rand(64, HEAD_DIM // 2, device=device)
    columns = 3
    page_table = torch.arange(2 * columns, dtype=torch.int32, device=device).view(2, columns)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    positions[-2:] = 0
    slots = positions.long()
    slots[-2], slots[-1] = columns * PAGE_SIZE, -1
    seqlens = ints(tokens - 2, 1, device=device)
    step = (positions, slots, page_table, ints(0, tokens - 2, tokens - 1, device=device), seqlens)
    cache = torch.full((2, 2 * columns, PAGE_SIZE, KV_HEADS, HEAD_DIM), 0.5, device=device, dtype=dtype)
    return rand(tokens, hidden), rand(tokens, hidden), weights, (angle.cos(), angle.sin()), cache, step


def assert_same_as_eager(compiled, arguments, *options, rtol=0.0, atol=0.0):
    expected, got = clones(arguments), clones(arguments)
    with torch.inference_mode():
        outputs = transformer_layer(*expected, *options), compiled(*got, *options)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(got[1], expected[1], rtol=rtol, atol=atol)  # residual
    torch.testing.assert_close(got[4], expected[4], rtol=rtol, atol=atol)  # cache


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_plan", [False, True])
def test_a_compiled_layer_equals_the_plain_one(with_plan, fused):
    """One graph without breaks, and the same one for every number of tokens."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(transformer_layer, fullgraph=True, backend=counter, dynamic=True)
    options = dict(page_size=PAGE_SIZE, num_heads=HEADS, num_kv_heads=KV_HEADS) if with_plan else None
    compilations = []
    for tokens in (7, 12, 33):
        assert_same_as_eager(compiled, layer_arguments("cpu", torch.float32, tokens), options, fused)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3


@pytest.mark.parametrize("fused", [False, True])
def test_inductor_writes_each_half_of_the_cache(fused):
    """K and V are views of one tensor, whose sizes may be symbols (pytorch/pytorch#198068)."""
    torch.compiler.reset()
    compiled = torch.compile(transformer_layer, fullgraph=True, dynamic=True)
    for tokens in (7, 12):
        arguments = layer_arguments("cpu", torch.float32, tokens)
        assert_same_as_eager(compiled, arguments, None, fused, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_of_the_policy():
    """pack, LM head, policy and pages in one graph, with and without tensors to write into."""
    torch.compiler.reset()

    def step(state, plan, kv, page_table, hidden, head, out=None):
        bbk.copy_pages(kv, page_table, plan.query_start, plan.query_end, num_branches=2)
        packed = bbk.pack_windows(
            state, plan, page_table, page_size=PAGE_SIZE, capacity=45, predict_capacity=33
        )
        top, confidence, _ = bbk.lm_head_confidence(hidden[packed.predict_index], head, suppress_token=MASK)
        predictions = bbk.Predictions(packed.predict_target, top, confidence)
        plan, events = bbk.decode_policy(state, predictions, plan, PARAMS, out=out)
        bbk.share_pages(page_table, events.sync_source)
        return packed, plan, events

    def arguments(with_out):
        torch.manual_seed(1)
        state, _, plan = policy_inputs("cpu")
        kv, page_table = copy_pages_inputs("cpu")[:2]
        hidden, head = torch.randn(45, 32), torch.randn(VOCABULARY, 32)
        out = None
        if with_out:
            sizes = state.num_rows, state.gen_length, torch.device("cpu")
            out = bbk.StepPlan.allocate(*sizes), bbk.PolicyEvents.allocate(*sizes)
        return state, plan, kv, page_table, hidden, head, out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for with_out in (False, True):
        expected, got = arguments(with_out), arguments(with_out)
        results = flat(step(*expected)), flat(compiled(*got))
        for one, other in zip(*results):
            assert torch.equal(one, other)
        for one, other in zip(expected, got):
            if isinstance(one, bbk.BranchState):
                one, other = (
                    tuple(getattr(state, field.name) for field in fields(state)) for state in (one, other)
                )
            for before, after in zip(flat(one), flat(other)):
                assert before is after is None or torch.equal(before, after)


def test_errors_name_the_argument_in_compiled_code_too():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: bbk.swiglu(x) + 1, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="gate_up: expected an even last dimension"):
        compiled(torch.zeros(2, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_layer_on_the_gpu(backend, fused, dtype):
    torch.compiler.reset()
    compiled = torch.compile(transformer_layer, fullgraph=True, backend=backend, dynamic=True)
    options = dict(page_size=PAGE_SIZE, num_heads=HEADS, num_kv_heads=KV_HEADS)
    # Inductor may pick other matrix products than eager torch.
    tolerance = 0.0 if backend == "aot_eager" else 8 * torch.finfo(dtype).eps
    for tokens in (7, 33):
        arguments = layer_arguments("cuda", dtype, tokens)
        assert_same_as_eager(compiled, arguments, options, fused, rtol=tolerance, atol=tolerance)
