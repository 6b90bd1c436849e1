"""NaN and infinity in the operators: none may get lost on its way to the flags that the host reads."""

import math
import random

import pytest
import torch

import blockbatch_kernels as bbk
import drafted
import dream_random
import policy_random
from blockbatch_kernels import reference, triton, tuning
from cuda_places import PLACES, open_place
from interpreter import in_interpreter, run_in_the_interpreter
from random_branches import moved

NAN, INF = math.nan, math.inf
TILES = (1, 191, 192, 4095, 4096)  # where kernels end a part of the vocabulary and begin the next
CPU = torch.device("cpu")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def planted(seed, rows, vocab_size):
    """Logits [rows, vocabulary], the suppressed token, and which rows have no softmax."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    suppress = rng.choice((None, 0, vocab_size - 1, rng.randrange(vocab_size)))
    for row in range(rows):
        kind = rng.choice(("none", "nan", "inf", "-inf", "both", "nothing", "everywhere", "suppressed"))
        edges = [edge for edge in TILES if edge < vocab_size]
        places = rng.sample(range(vocab_size), min(vocab_size, rng.randint(1, 3))) + rng.sample(edges, 1)
        if kind in ("nan", "inf", "-inf"):
            logits[row, places] = float(kind)
        elif kind == "both":
            logits[row, places[0]], logits[row, places[-1]] = NAN, -INF
        elif kind == "nothing":
            logits[row] = -INF
        elif kind == "everywhere":
            logits[row] = rng.choice((NAN, INF))
        elif kind == "suppressed" and suppress is not None:
            logits[row, suppress] = rng.choice((NAN, INF, -INF))
    counted = logits.clone()
    if suppress is not None:
        counted[:, suppress] = -INF
    broken = counted.isnan().any(1) | (counted == INF).any(1) | (counted == -INF).all(1)
    return logits, suppress, broken


def check_lm_head(lm_head, seed, rows, vocab_size, dtype, device, probes=True):
    logits, suppress, broken = planted(seed, rows, vocab_size)
    # The hidden states choose a line each: products with zero would spread a NaN to all rows.
    for row in range(rows):
        hidden = torch.zeros(rows, 8, dtype=dtype, device=device)
        hidden[:, 0] = 1
        weight = torch.zeros(vocab_size, 8, dtype=dtype, device=device)
        weight[:, 0] = logits[row].to(device)
        probe_tokens = torch.full((rows,), vocab_size // 2, dtype=torch.int32, device=device)
        top, confidence, probe = lm_head(
            hidden, weight, suppress_token=suppress, **(dict(probe_tokens=probe_tokens) if probes else {})
        )
        assert confidence.isnan().tolist() == [bool(broken[row])] * rows, (seed, row, suppress)
        assert ((top >= 0) & (top < vocab_size)).all()
        if probes:
            assert probe.isnan().tolist() == [bool(broken[row])] * rows, (seed, row, suppress)
        if not broken[row]:
            expected = reference.lm_head_confidence(hidden[:1], weight, suppress_token=suppress)
            assert top.tolist() == expected[0].tolist() * rows
            torch.testing.assert_close(confidence, expected[1].expand(rows), rtol=1e-4, atol=1e-6)


def likely_of(lm_head_likely, **fixed):
    """`lm_head_likely` as `lm_head_confidence`. Without a softmax none but the suppressed token is likely."""

    def lm_head(hidden, weight, *, suppress_token):
        top, confidence, token, probability = lm_head_likely(
            hidden, weight, suppress_token=suppress_token, **fixed
        )
        token, probability = token[confidence.isnan()], probability[confidence.isnan()]
        assert ((token == -1) | (token == suppress_token)).all()
        assert (probability[token == -1] == 0).all()
        return top, confidence, None

    return lm_head


def check_broken_hidden_states(lm_head, seed, rows, vocab_size, dtype, device):
    """One NaN or infinity in a hidden state breaks its row, and no other."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(vocab_size, 64, generator=generator).to(device, dtype)
    broken = torch.rand(rows, generator=generator) < 0.4
    for row in broken.nonzero().flatten().tolist():
        place = int(torch.randint(64, (), generator=generator))
        hidden[row, place] = (NAN, INF, -INF)[(row + seed) % 3]
    confidence = lm_head(hidden.to(device, dtype), weight, suppress_token=3)[1]
    assert confidence.isnan().tolist() == broken.tolist(), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lm_head_of_the_reference(dtype):
    for seed, vocab_size in enumerate((2, 50, 193, 4097)):
        check_lm_head(reference.lm_head_confidence, seed, 12, vocab_size, dtype, "cpu")
        check_broken_hidden_states(reference.lm_head_confidence, seed, 9, vocab_size + 40, dtype, "cpu")
        check_lm_head(likely_of(reference.lm_head_likely), seed, 12, vocab_size, dtype, "cpu", probes=False)


def test_lm_head_overflows_in_float16():
    hidden = torch.full((2, 4), 200.0, dtype=torch.float16)
    hidden[1] = 1.0
    weight = torch.ones(5, 4, dtype=torch.float16)
    weight[2] = 300.0
    assert bbk.lm_head_confidence(hidden, weight)[1].isnan().tolist() == [True, False]
    wide = bbk.lm_head_confidence(hidden.bfloat16(), weight.bfloat16())
    assert wide[0].tolist() == [2, 2] and wide[1].tolist() == [1.0, 1.0]


@in_interpreter
def test_lm_head_interpreted(monkeypatch):
    for seed in range(6):
        part_bytes = (1, 4 * 6 * 64 * 2, 1 << 20)[seed % 3]
        monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(part_bytes, block=64, num_warps=4))
        check_lm_head(triton.lm_head_confidence, seed, 6, (2, 203)[seed // 3], torch.float32, "cpu")
        check_broken_hidden_states(triton.lm_head_confidence, seed, 9, 203, torch.float32, "cpu")
        lm_head = likely_of(triton.lm_head_likely)
        check_lm_head(lm_head, seed, 6, (2, 203)[seed // 3], torch.float32, "cpu", probes=False)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lm_head_on_a_gpu(backend, dtype):
    def lm_head(*args, **options):
        return bbk.lm_head_confidence(*args, **options, backend=backend)

    for seed, vocab_size in enumerate((2, 193, 4097, 25600, 30000)):
        for probes in (True, False):  # without, the product whose logits nobody stores takes the large ones
            check_lm_head(lm_head, seed, 9, vocab_size, dtype, "cuda", probes)
        check_broken_hidden_states(lm_head, seed, 33, vocab_size + 40, dtype, "cuda")
        likely = likely_of(bbk.lm_head_likely, backend=backend)
        check_lm_head(likely, seed, 9, vocab_size, dtype, "cuda", probes=False)
        check_broken_hidden_states(likely, seed, 33, vocab_size + 40, dtype, "cuda")


def plant(generator, predictions, rate):
    """NaN or infinity in some of the confidences, the padding's included."""
    size = predictions.confidence.shape[0]
    chosen = torch.rand(size, generator=generator) < rate
    values = torch.tensor([NAN, INF, -INF])[torch.randint(3, (size,), generator=generator)]
    return predictions._replace(confidence=torch.where(chosen, values, predictions.confidence))


def counted(state, predictions):
    """Of each request: what it had before, and its predictions without a finite confidence."""
    counts, per_request = state.non_finite.tolist(), state.num_branches * state.gen_length
    for target, confidence in zip(predictions.target.tolist(), predictions.confidence.tolist()):
        if target >= 0 and not math.isfinite(confidence):
            counts[target // per_request] += 1
    return counts


LIMITS = dict(max_requests=3, max_branches=4, max_length=40)


def check_policy(decode_policy, initial_plan, seed, device, rule):
    generator = torch.Generator().manual_seed(seed)
    if rule == "drafts":
        case = drafted.CASES[seed % len(drafted.CASES)]
        state, plan, params = drafted.midway(generator, case, 1 + seed % 3)
        predictions = drafted.predictions_of(generator, state, plan, params)
    else:
        batches = dream_random if rule == "dream" else policy_random
        state, predictions, plan, params = batches.random_batch(seed, **LIMITS)
    if seed % 4 == 0:
        state.non_finite.copy_(torch.randint(0, 3, state.non_finite.shape, generator=generator))
    predictions = plant(generator, predictions, (0.0, 0.02, 0.5)[seed % 3])
    expected = counted(state, predictions)
    ours = moved(state, device)
    new_plan, _ = decode_policy(ours, moved(predictions, device), moved(plan, device), params)
    assert ours.non_finite.tolist() == expected, seed
    broken = torch.tensor(expected).repeat_interleave(state.num_branches) > 0
    stalled = int((broken | (ours.decoded.cpu() > state.gen_length)).sum())
    assert int(new_plan.flags[4]) == stalled, seed
    assert int(initial_plan(ours, params).flags[4]) == stalled, seed
    return sum(expected)


RULES = ("llada", "drafts", "dream")


def check_policies(decode_policy, initial_plan, seeds, device, rules=RULES):
    for rule in rules:
        found = [check_policy(decode_policy, initial_plan, seed, device, rule) for seed in seeds]
        assert any(found) and not all(found)


def test_policy_of_the_reference():
    check_policies(reference.decode_policy, reference.initial_plan, range(150), CPU)


@pytest.mark.parametrize("place", PLACES)
def test_compiled_policy(place):
    place = open_place(place)
    check_policies(place.decode_policy, place.initial_plan, range(150), place.device)


@in_interpreter
def test_policy_interpreted():
    check_policies(triton.decode_policy, triton.initial_plan, range(24), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_policy_of_triton_on_a_gpu(rule):
    seeds = range(20 if rule == "dream" else 60)  # nearly each is compiled anew, which takes seconds
    check_policies(triton.decode_policy, triton.initial_plan, seeds, torch.device("cuda"), [rule])


def check_attention(attention, seed, dtype, device, head_dim):
    """A NaN in a key or value reaches every query of its row, one in a query that query alone; what stands
    beside the rows reaches none."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, heads, kv_heads, page_size = 4, 4, 2, 16
    lengths = [rng.choice((1, 15, 16, 17, 130, 300)) for _ in range(rows)]
    queries = [rng.randint(1, 5) for _ in range(rows)]
    columns = -(-max(lengths) // page_size)
    table = torch.randperm(rows * columns, generator=generator).view(rows, columns).int()
    kv = torch.randn(2, rows * columns, page_size, kv_heads, head_dim, generator=generator)
    for row, length in enumerate(lengths):  # behind the end of each row stands what earlier decodes left
        pages = table[row].long()
        held = torch.arange(columns * page_size).view(columns, page_size) < length
        kv[:, pages] = kv[:, pages].masked_fill(~held[None, :, :, None, None], (NAN, INF)[seed % 2])
    broken = rng.randrange(rows)
    place = rng.randrange(lengths[broken])
    page, slot = int(table[broken, place // page_size]), place % page_size
    side, value = rng.randrange(2), (NAN, INF)[rng.randrange(2)] if seed % 3 else NAN
    if side == 0:
        value = NAN  # a key of infinity may weigh nothing at all
    kv[side, page, slot] = value
    q = torch.randn(sum(queries), heads, head_dim, generator=generator)
    row_of = torch.arange(rows).repeat_interleave(torch.tensor(queries))
    reached = row_of == broken
    lost = rng.randrange(len(q))
    q[lost, :, rng.randrange(head_dim)] = (NAN, INF, -INF)[rng.randrange(3)] if rng.random() < 0.5 else NAN
    reached[lost] = True
    q = q.to(device, dtype)
    bounds = torch.tensor([0, *queries]).cumsum(0).int().to(device)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    k_cache, v_cache = kv.to(device, dtype)
    out = attention(q, k_cache, v_cache, table.to(device), bounds, seqlens)
    finite = out.float().isfinite().flatten(1).cpu()
    assert not finite[reached].any(), seed
    assert finite[~reached].all(), seed


def attention_of(backend):
    def attend(q, k_cache, v_cache, table, bounds, seqlens):
        plan = None
        if backend != "reference":
            plan = bbk.attention_plan(
                table,
                bounds,
                seqlens,
                page_size=k_cache.shape[1],
                num_tokens=q.shape[0],
                num_heads=q.shape[1],
                num_kv_heads=k_cache.shape[2],
                backend=backend,
            )
        return bbk.varlen_attention(q, k_cache, v_cache, table, bounds, seqlens, plan=plan, backend=backend)

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_of_the_reference(dtype):
    for seed in range(30):
        check_attention(attention_of("reference"), seed, dtype, CPU, 32)


@in_interpreter
def test_attention_interpreted():
    for seed in range(8):
        check_attention(attention_of("triton"), seed, torch.float32, CPU, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_on_a_gpu(backend, dtype):
    for seed in range(40):
        check_attention(attention_of(backend), seed, dtype, torch.device("cuda"), (32, 64, 128)[seed % 3])
