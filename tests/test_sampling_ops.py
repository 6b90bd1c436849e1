"""lm_head_sample: the reference against its definition, and the backends against the reference."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
import fast_interpreter
from blockbatch_kernels import triton, tuning
from blockbatch_kernels.reference import sampling
from described_tensors import Described
from float_errors import DTYPES
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from sampling_cases import bits_of, check, draw_of, every_rule, rules_of, whole_numbers
from triton_floats import poisoned

pytest.importorskip("triton", reason="the package triton is not installed")
if triton.interpreted():
    fast_interpreter.replace_language_once()

DRAWS, ALL = 8000, range(10)
# Probabilities from about a third to a hundredth.
LOGITS = torch.tensor([0.0, -3.5, -1.5, -1.0, -3.0, -2.0, -2.5, -0.5, -3.2, -4.0])


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton")


def draws(rules, logits=LOGITS, count=DRAWS, vary="position", **options):
    """So many tokens of the same logits, at other positions, by other seeds or in other forwards."""
    hidden = torch.ones(count, 1)
    each = torch.arange(count)
    request, positions = torch.zeros(count).int(), torch.full((count,), 5).int()
    if vary == "position":
        positions = each.int()
    else:
        temperature = rules.temperature.expand(count).contiguous()
        field = {"seed": each, "forward": each.int()}[vary]
        others = {
            name: value.expand(count, *value.shape[1:]).contiguous()
            for name, value in rules._asdict().items()
            if value is not None and name not in ("changed_token", vary)
        }
        rules = rules._replace(**others | {"temperature": temperature, vary: field})
        request = each.int()
    return bbk.lm_head_sample(hidden, logits.unsqueeze(1), rules, request, positions, **options)


def assert_drawn_from(tokens, probabilities):
    """Chi-square: five standard deviations above its mean is out of all chance, and seeds are fixed."""
    counts = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    assert (counts[probabilities == 0] == 0).all()
    possible = probabilities > 0
    expected = probabilities[possible].double() * len(tokens)
    assert expected.min() > 5
    statistic = ((counts[possible] - expected).square() / expected).sum().item()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 3, statistic


@pytest.mark.parametrize("vary", ["position", "seed", "forward"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax(vary, temperature):
    token, confidence, _ = draws(rules_of([temperature]), vary=vary)
    assert_drawn_from(token, (LOGITS / temperature).softmax(0))
    # That of the model, whatever the temperature is.
    assert torch.allclose(confidence, LOGITS.softmax(0)[token.long()])


def test_neighbours_are_drawn_independently():
    for vary in ("position", "seed", "forward"):
        token = draws(rules_of([2.0]), LOGITS[:6], vary=vary)[0].long()
        p = (LOGITS[:6] / 2.0).softmax(0)
        assert_drawn_from(token[:-1] * 6 + token[1:], torch.outer(p, p).flatten())


@pytest.mark.parametrize("top_p, left", [(0.3, [0]), (0.34, [0]), (0.6, [0, 7]), (0.8, [0, 7, 3, 2])])
def test_top_p_leaves_the_highest(top_p, left):
    token = draws(rules_of([1.0], top_p=top_p))[0]
    assert_drawn_from(token, _only(left, LOGITS))


@pytest.mark.parametrize(
    "top_k, left", [(1, [0]), (2, [0, 7]), (4, [0, 7, 3, 2]), (99, range(10)), (0, range(10))]
)
def test_top_k_leaves_the_highest(top_k, left):
    token = draws(rules_of([1.0], top_k=top_k))[0]
    assert_drawn_from(token, _only(left, LOGITS))


def test_filters_go_by_the_tempered_distribution_and_the_smaller_set_counts():
    # At temperature 4 the highest three tokens have less than 0.5.
    kept = {}
    for filters in (dict(top_p=0.5), dict(top_k=3), dict(top_p=0.5, top_k=3), dict(top_p=0.2, top_k=3)):
        kept[str(filters)] = set(draws(rules_of([4.0], **filters))[0].tolist())
    everything, three, both, fewer = kept.values()
    assert len(everything) > 3 and three == both == {0, 7, 3} and fewer < three


def test_equal_logits_stay_together():
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    for filters in (dict(top_k=1), dict(top_k=2), dict(top_p=0.2), dict(top_p=0.5)):
        token = draws(rules_of([1.0], **filters), logits)[0]
        assert_drawn_from(token, _only([1, 2, 3], logits))


def _only(tokens, logits):
    left = torch.full_like(logits, -math.inf)
    left[list(tokens)] = logits[list(tokens)]
    return left.softmax(0)


def test_the_noise_is_what_python_computes():
    seed, forward = torch.tensor([0, 7, 2**40 + 3, 2**63 - 1]), torch.tensor([0, 3, 1, 2**31 - 1])
    positions = torch.tensor([0, 1, 4000, 5]).int()
    bits = sampling.noise_bits(seed, positions, forward.int(), 300)
    for row in range(4):
        about = int(seed[row]), int(positions[row]), int(forward[row])
        assert bits[row].tolist() == [bits_of(*about, token) for token in range(300)]
    # Written down, so that no change of the rule goes unnoticed: texts of a seed would be others.
    known = [bits_of(0, 0, 0, 0), bits_of(1, 2, 3, 4), bits_of(2**40 + 3, 100, 7, 126463)]
    assert known == [3527430153, 2044816356, 1918109862]


def test_gumbel_noise_has_its_distribution():
    noise = sampling.gumbel(torch.arange(0, 2**32, 2**14))
    assert noise.isfinite().all()
    for x in (-2.0, -0.5, 0.3, 2.0, 6.0, 10.0):
        share = (noise <= x).double().mean().item()
        assert share == pytest.approx(math.exp(-math.exp(-x)), abs=1e-5)
    ends = sampling.gumbel(torch.tensor([0, 1, 2**32 - 1]))
    assert ends[0] == pytest.approx(math.log(2**33), rel=1e-6) and ends[1] < ends[0]
    assert ends.isfinite().all()


def test_a_row_depends_on_its_request_and_position_alone():
    """And is what the definition gives in fp64, rounding aside."""
    hidden, weight = whole_numbers(40, 60, 12, torch.float32, 1)
    rules = rules_of([1.0, 0.6, 2.0], seed=[5, 2**50, 5], forward=[0, 2, 0])
    request, positions = torch.arange(40).int() % 3, (torch.arange(40).int() * 7) % 30
    token, confidence, _ = bbk.lm_head_sample(hidden, weight, rules, request, positions)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:23]
    some = bbk.lm_head_sample(hidden[order], weight, rules, request[order], positions[order])
    assert torch.equal(token[order], some[0]) and torch.equal(confidence[order], some[1])
    alone = rules_of([0.6], seed=2**50, forward=2)
    mine = request == 1
    single = bbk.lm_head_sample(hidden[mine], weight, alone, request[mine] * 0, positions[mine])
    assert torch.equal(token[mine], single[0])
    for row, logits in enumerate((hidden.double() @ weight.double().T).tolist()):
        of = int(request[row])
        about = (
            float(rules.temperature[of]),
            int(rules.seed[of]),
            int(positions[row]),
            int(rules.forward[of]),
        )
        best, gap = draw_of(logits, *about)
        assert int(token[row]) == best or gap < 1e-5


def test_bans_and_biases_change_the_distribution():
    rules = rules_of([1.0], changed=(0, 7, 2), bias=(-math.inf, 1.0, 0.0), before=(0, 0, 3))
    changed = LOGITS.clone()
    changed[0], changed[7] = -math.inf, changed[7] + 1.0
    token, confidence, _ = draws(rules, suppress_token=3)
    changed[3] = -math.inf
    assert_drawn_from(token[3:], changed.softmax(0))
    assert torch.allclose(confidence[3:], changed.softmax(0)[token[3:].long()])
    changed[2] = -math.inf  # at the first positions
    assert torch.allclose(confidence[:3], changed.softmax(0)[token[:3].long()])
    assert not (set(token[:3].tolist()) & {0, 2, 3})
    # Banned whatever the logit is; the probe, too.
    logits = torch.tensor([1.0, math.inf, 2.0])
    banned = rules_of([0.0], changed=(1,), bias=(-math.inf,))
    probes = torch.tensor([1]).int()
    got = draws(banned, logits, 1, probe_tokens=probes)
    assert (
        got[0].item() == 2 and got[1].item() == pytest.approx(1 / (1 + math.exp(-1))) and got[2].item() == 0
    )


def test_confidences():
    p = LOGITS.softmax(0)
    entropy = draws(rules_of([1.5]), confidence="entropy", count=4)[1]
    assert torch.allclose(entropy, (p * p.log()).sum().exp().expand(4))
    margin = draws(rules_of([1.5]), confidence="margin", count=4)[1]
    top = p.topk(2).values
    assert torch.allclose(margin, (top[0] - top[1]).expand(4))
    # Of equally likely tokens: one over their number, and none ahead of another.
    for number in (1, 2, 5):
        logits = torch.full((7,), -math.inf)
        logits[:number] = 3.0
        assert draws(rules_of([0.0]), logits, 1, confidence="entropy")[1].item() == pytest.approx(1 / number)
        ahead = draws(rules_of([0.0]), logits, 1, confidence="margin")[1].item()
        assert ahead == (1.0 if number == 1 else 0.0)


def test_temperature_0_is_the_greedy_operator():
    hidden, weight = whole_numbers(30, 90, 12, torch.float32, 3)
    request, positions, probes = torch.zeros(30).int(), torch.arange(30).int(), torch.arange(30).int()
    options = dict(probe_tokens=probes, suppress_token=88)
    greedy = bbk.lm_head_confidence(hidden, weight, **options)
    for rules in (rules_of([0.0]), rules_of([0.0], top_p=0.1, top_k=5)):
        got = bbk.lm_head_sample(hidden, weight, rules, request, positions, **options)
        for one, other in zip(got, greedy, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_rows_without_a_softmax_have_no_confidence(special):
    logits = torch.tensor([1.0, special, 3.0])
    for confidence in bbk.CONFIDENCES:
        for rules in (rules_of([0.0]), rules_of([1.0]), rules_of([1.0], top_p=0.5)):
            assert draws(rules, logits, 2, confidence=confidence)[1].isnan().all()
    everything = rules_of([1.0], changed=(0, 1, 2), bias=(-math.inf,) * 3)
    assert draws(everything, torch.ones(3), 2)[1].isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(confidence="sure"), "confidence: expected one of probability, entropy, margin, got 'sure'"),
        (dict(suppress_token=50), "suppress_token: expected an id below 10, got 50"),
        (dict(request=torch.tensor([3]).int()), "request: expected values from 0 to 0, got 3"),
        (
            dict(rules=rules_of([1.0], changed=(10,))),
            "rules.changed_token: expected values from 0 to 9, got 10",
        ),
        (dict(rules=rules_of([1.0], changed=(1, 1))), "rules.changed_token: expected each id once"),
        (dict(probe_tokens=torch.tensor([11]).int()), "probe_tokens: expected values from 0 to 9, got 11"),
    ],
)
def test_wrong_values_are_named(change, message):
    arguments = dict(hidden=torch.ones(1, 1), weight=LOGITS.unsqueeze(1), rules=rules_of([1.0]))
    arguments |= dict(request=torch.zeros(1).int(), positions=torch.zeros(1).int())
    with pytest.raises(ValueError, match=message):
        bbk.lm_head_sample(**arguments | change)


@in_interpreter
@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_triton(monkeypatch, part_bytes):
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(part_bytes, block=64, num_warps=4))
    for vocab_size, suppress in ((1, None), (3, 2), (130, 129)):
        hidden, weight = whole_numbers(5, vocab_size, 12, torch.float32, vocab_size, DEVICE)
        request, positions = torch.arange(5).int() % 4, torch.arange(5).int() * 3
        kinds = bbk.CONFIDENCES if part_bytes > 1 else ("entropy",)
        for index, (_, rules) in enumerate(every_rule(DEVICE, vocab_size)):
            with poisoned():
                check(
                    hidden, weight, rules, request, positions, suppress, "triton",
                    confidence=kinds[(index + vocab_size) % len(kinds)],
                )  # fmt: skip


@in_interpreter
def test_triton_takes_special_values_as_the_reference():
    assert_special_values_are_the_references("triton", 70)


def assert_special_values_are_the_references(backend, size):
    request, positions = torch.zeros(2, device=DEVICE).int(), torch.arange(2, device=DEVICE).int()
    for special in (math.nan, math.inf, -math.inf):
        for places in ([0], [2, size - 1], range(size)):
            weight = torch.linspace(0, 9, size, device=DEVICE).unsqueeze(1)
            weight[list(places)] = special
            hidden = torch.ones(2, 1, device=DEVICE)
            for rules in (rules_of([0.0], DEVICE), rules_of([2.0], DEVICE, top_k=3)):
                if special == -math.inf and len(places) < size:
                    check(hidden, weight, rules, request, positions, None, backend)
                else:  # what token stands there says nothing
                    got = bbk.lm_head_sample(hidden, weight, rules, request, positions, backend=backend)
                    assert got[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_special_values_on_a_gpu(backend):
    assert_special_values_are_the_references(backend, 5000)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("confidence", bbk.CONFIDENCES)
def test_on_a_gpu(backend, dtype, confidence, monkeypatch):
    for rows, vocab_size in ((1, 1), (5, 7), (33, 4096), (6, 4097), (70, 12289), (9, 126464)):
        hidden, weight = whole_numbers(rows, vocab_size, 16, dtype, vocab_size, "cuda")
        request = torch.arange(rows, device="cuda").int() % 4
        positions = torch.arange(rows, device="cuda").int() * 3
        suppress = None if vocab_size == 1 else vocab_size - 1
        for _, rules in every_rule("cuda", vocab_size):
            with poisoned():
                check(hidden, weight, rules, request, positions, suppress, backend, confidence=confidence)
    monkeypatch.setattr(tuning, "LM_HEAD_LOGITS_BYTES", 1)
    monkeypatch.setattr(tuning, "TRITON_LM_HEAD", tuning.TritonLmHead(1, block=4096, num_warps=8))
    hidden, weight = whole_numbers(7, 12289, 16, dtype, 5, "cuda")
    for _, rules in every_rule("cuda", 12289):
        check(hidden.t().contiguous().t(), weight, rules, request[:7], positions[:7], 3, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("filters", [{}, dict(top_p=0.9, top_k=50)], ids=["all", "filtered"])
def test_inside_a_graph_the_noise_follows_the_forwards(backend, filters):
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(96, 256, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(126464, 256, generator=generator, device="cuda") * 0.3).bfloat16()
    rules = rules_of([1.0, 0.7], "cuda", seed=3, changed=(5, 9), bias=(1.0, -math.inf), **filters)
    request = torch.arange(96, device="cuda").int() % 2
    positions = torch.arange(96, device="cuda").int()

    def run():
        return bbk.lm_head_sample(hidden, weight, rules, request, positions, backend=backend)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    seen = []
    for forward in (0, 1):
        rules.forward.fill_(forward)
        graph.replay()
        for ours, replayed in zip(run()[:2], captured[:2], strict=True):
            assert torch.equal(ours, replayed)
        seen.append(captured[0].clone())
        expected = bbk.lm_head_sample(hidden, weight, rules, request, positions, backend="reference")
        assert (expected[0] == captured[0]).float().mean() > 0.8  # products round their logits apart
    assert (seen[0] != seen[1]).float().mean() > 0.3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(first_token=-1), "first_token: expected at least 0, got -1"),
        (dict(first_piece=-1), "first_piece: expected at least 0, got -1"),
        (dict(first_piece=2), "num_pieces: expected at least 3, got 2"),
        (dict(confidence=3), "confidence: expected code 0, 1 or 2, got 3"),
        (dict(seed=Described((1,))), "seed: expected int64, got float32"),
    ],
)
def test_the_extension_names_what_is_wrong(change, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    ints = Described((2,), torch.int32)
    arguments = dict(
        logits=Described((2, 8)), request=ints, positions=ints, temperature=Described((1,)),
        seed=Described((1,), torch.int64), forward=Described((1,), torch.int32),
        changed_token=Described((0,), torch.int32), logit_bias=Described((1, 0)),
        banned_before=Described((1, 0), torch.int32), least=None, probe_tokens=None,
        partials=Described((2, 2, 8)), first_token=0, first_piece=0, suppress_token=None, confidence=0,
        stream=0,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        extension.lm_head_sample_reduce(**arguments | change)
