"""The LM head of several ranks against the operator over the whole vocabulary, parts gathered by hand."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch.parallel import head
from blockbatch.parallel.head import ShardedHead
from blockbatch_kernels.reference import sampling_parts
from sampling_cases import every_rule, rules_of, whole_numbers


class Gather:
    """Stands for a group: collects parts in a first round and hands all of them out in a second."""

    def __init__(self, size):
        self.size, self.parts = size, [[] for _ in range(size)]

    def turn(self, rank, collects):
        """Of this rank, from its first part on."""
        self._rank, self._collects, self._asked = rank, collects, 0

    def merge_head(self, parts, *, probes):
        """In two steps: what is gathered here is merged by the head."""

    def all_gather(self, x):
        if self._collects:
            self.parts[self._rank].append(x.clone())
            return x.expand(self.size, *x.shape)
        self._asked += 1
        return torch.stack([parts[self._asked - 1] for parts in self.parts])


class Part:
    """Stands for a `Shard`, as far as the head asks."""

    def __init__(self, rank, size, vocab_size):
        self.vocabulary = range(vocab_size * rank // size, vocab_size * (rank + 1) // size)
        self.spec = self
        self.vocab_size = vocab_size


def by_ranks(operator, hidden, weight, size, weight_scale=None, about=(), **options):
    """What every rank has in the end.

    Args:
        about: arguments behind the weight.
    """
    group = Gather(size)
    shards = [Part(rank, size, len(weight)) for rank in range(size)]
    whole = (weight,) if weight_scale is None else (weight, weight_scale)
    for collects in (True, False):
        found = []
        for rank, shard in enumerate(shards):
            group.turn(rank, collects)
            own = (part[shard.vocabulary.start : shard.vocabulary.stop] for part in whole)
            found.append(getattr(ShardedHead(group, shard), operator)(hidden, *own, *about, **options))
    return found


def random_case(seed, *, ties):
    """Hidden states and weights of small integers, whose products are exact; with ties, many logits equal."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (9, 8), generator=random).float()
    weight = torch.randint(-2, 3, (37, 8), generator=random).float()
    if ties:
        weight = weight[torch.randint(0, 4, (37,), generator=random)]
    probes = torch.randint(0, 37, (9,), generator=random, dtype=torch.int32)
    return hidden, weight, probes


def assert_same(found, expected):
    for ours, right in zip(found, expected, strict=True):
        if right is None or ours is None:
            assert ours is right
        elif right.is_floating_point():
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-7, equal_nan=True)
        else:
            assert ours.dtype == right.dtype and torch.equal(ours, right)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("suppress", [None, 0, 36])
def test_confidence(size, ties, suppress):
    for seed in range(12):
        hidden, weight, probes = random_case(seed, ties=ties)
        for probe_tokens in (None, probes):
            options = dict(probe_tokens=probe_tokens, suppress_token=suppress)
            expected = bbk.lm_head_confidence(hidden, weight, **options)
            for found in by_ranks("lm_head_confidence", hidden, weight, size, **options):
                assert_same(found, expected)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("suppress", [None, 5])
def test_likely(size, ties, suppress):
    seen = set()
    for seed in range(12):
        hidden, weight, _ = random_case(seed, ties=ties)
        if ties:
            # Few tokens that count, equal ones in the parts of different ranks.
            weight[3:36] = -hidden[0] * 4
            hidden = hidden[:1].repeat(3, 1)
            weight[[1, 2, 36]] = hidden[0]
        expected = bbk.lm_head_likely(hidden, weight, suppress_token=suppress)
        seen |= set((expected[2] >= 0).sum(1).tolist())
        for found in by_ranks("lm_head_likely", hidden, weight, size, suppress_token=suppress):
            assert_same(found, expected)
    assert len(seen) > 1 or 3 in seen


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("confidence", bbk.CONFIDENCES)
@pytest.mark.parametrize("suppress", [None, 36])
def test_drawn(size, confidence, suppress, monkeypatch):
    """In pieces of a few rows and tokens, too; of seven tokens some ranks have a piece more than others."""
    seen = set()
    for seed in range(6):
        monkeypatch.setattr(sampling_parts, "_PIECE_TOKENS", 7 if seed % 3 else 4096)
        hidden, weight, probes = random_case(seed, ties=seed % 2 == 0)
        request = torch.arange(len(hidden), dtype=torch.int32) % 4
        positions = 3 * torch.arange(len(hidden), dtype=torch.int32)
        for _, rules in every_rule("cpu", len(weight)):
            options = dict(suppress_token=suppress, confidence=confidence)
            options["probe_tokens"] = probes if seed % 3 else None
            monkeypatch.setattr(head, "_HEAD_ROWS", 4 if seed % 4 else 512)
            about = rules, request, positions
            expected = bbk.lm_head_sample(hidden, weight, *about, **options)
            for found in by_ranks("lm_head_sample", hidden, weight, size, about=about, **options):
                assert_same(found, expected)
            seen |= set(expected[0].tolist())
    assert len(seen) > 5


def test_unknown_probes_have_no_probability():
    hidden, weight, probes = random_case(1, ties=False)
    probes[:3] = torch.tensor([-1, 37, 2**31 - 1])
    numbers = torch.arange(len(hidden), dtype=torch.int32)
    about = rules_of([1.0]), numbers * 0, numbers
    for _, _, probability in by_ranks("lm_head_sample", hidden, weight, 3, about=about, probe_tokens=probes):
        assert probability[:3].isnan().all() and probability[3:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("confidence", bbk.CONFIDENCES)
@pytest.mark.parametrize("vocab_size, rows", [(3, 2), (37, 9), (8193, 600), (60_001, 3), (126_464, 128)])
def test_drawn_by_the_extension(poisoned, confidence, vocab_size, rows):
    """Of 8193 tokens one of two ranks has a piece more than the other."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = whole_numbers(rows, vocab_size, 16, dtype, vocab_size, "cuda")
        request = torch.arange(rows, device="cuda").int() % 4
        about = request, torch.arange(rows, device="cuda").int() * 3
        probes = torch.arange(rows, device="cuda").int() * 997 % vocab_size
        for probe_tokens, suppress in ((None, 1), (probes, None), (probes, vocab_size - 1)):
            options = dict(probe_tokens=probe_tokens, suppress_token=suppress, confidence=confidence)
            for _, rules in every_rule("cuda", vocab_size):
                whole = bbk.lm_head_sample(hidden, weight, rules, *about, **options, backend="reference")
                for size in (2, 3):
                    arguments = dict(about=(rules, *about), **options, backend="cuda")
                    for found in by_ranks("lm_head_sample", hidden, weight, size, **arguments):
                        assert torch.equal(found[0], whole[0])
                        for ours, right in zip(found[1:], whole[1:], strict=True):
                            if right is not None:  # the bounds of test_sampling_ops.py
                                torch.testing.assert_close(ours, right, rtol=2e-5, atol=1e-7, equal_nan=True)


def test_nothing_is_drawn():
    hidden, weight, _ = random_case(0, ties=False)
    none, rules = torch.empty(0, dtype=torch.int32), rules_of([1.0])
    for found in by_ranks("lm_head_sample", hidden[:0], weight, 2, about=(rules, none, none)):
        assert [len(values) for values in found[:2]] == [0, 0] and found[2] is None


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 20, 36, slice(None), slice(0, 13)])
def test_numbers_without_a_softmax(size, value, place):
    hidden, weight, probes = random_case(3, ties=False)
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[place, 0] = value
    expected = bbk.lm_head_confidence(hidden, weight, probe_tokens=probes)
    for top_token, confidence, probability in by_ranks(
        "lm_head_confidence", hidden, weight, size, probe_tokens=probes
    ):
        assert torch.equal(confidence.isfinite(), expected[1].isfinite())
        assert_same((confidence, probability), expected[1:])
        finite = confidence.isfinite()
        assert torch.equal(top_token[finite], expected[0][finite])
    numbers = torch.arange(len(hidden), dtype=torch.int32)
    about = rules_of([1.0, 0.0]), numbers % 2, numbers
    expected = bbk.lm_head_sample(hidden, weight, *about, probe_tokens=probes)
    for found in by_ranks("lm_head_sample", hidden, weight, size, about=about, probe_tokens=probes):
        assert_same(found[1:], expected[1:])


@pytest.mark.parametrize("size", [2, 3])
def test_logits(size):
    hidden, weight, _ = random_case(4, ties=False)
    for dtype in (torch.float32, torch.bfloat16):
        group, whole = Gather(size), (hidden @ weight.T).to(dtype)
        shards = [Part(rank, size, len(weight)) for rank in range(size)]
        for collects in (True, False):
            found = []
            for rank, shard in enumerate(shards):
                group.turn(rank, collects)
                part = whole[:, shard.vocabulary.start : shard.vocabulary.stop]
                found.append(ShardedHead(group, shard).whole_logits(part))
        assert all(one.dtype == dtype and torch.equal(one, whole) for one in found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size, rows", [(37, 9), (9001, 600), (60_001, 3), (60_001, 128)])
def test_parts_by_the_extension(poisoned, dtype, vocab_size, rows):
    """Through logits and, where parts are long, the product without logits; ties across ranks."""
    random = torch.Generator().manual_seed(vocab_size + rows)
    hidden = torch.randint(-2, 3, (rows, 64), generator=random).to("cuda", dtype)
    weight = torch.randint(-2, 3, (vocab_size, 64), generator=random).to("cuda", dtype)
    weight[vocab_size // 2 :: 7] = weight[: len(weight[vocab_size // 2 :: 7])]
    hidden[-1] = 0.0  # all logits are equal
    probes = torch.randint(0, vocab_size, (rows,), generator=random, dtype=torch.int32).cuda()
    for suppress in (None, 0, vocab_size - 1, int((hidden[0] @ weight.T).argmax())):
        for probe_tokens in (None, probes):
            options = dict(probe_tokens=probe_tokens, suppress_token=suppress)
            expected = bbk.lm_head_confidence(hidden, weight, **options, backend="reference")
            for found in by_ranks("lm_head_confidence", hidden, weight, 2, **options, backend="cuda"):
                assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 20, 36, slice(None), slice(0, 13), slice(0, 19)])
def test_numbers_without_a_softmax_by_the_extension(value, place):
    hidden, weight, probes = (tensor.cuda() for tensor in random_case(3, ties=False))
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[place, 0] = value
    expected = bbk.lm_head_confidence(hidden, weight, probe_tokens=probes, backend="cuda")
    options = dict(probe_tokens=probes, backend="cuda")
    for top_token, confidence, probability in by_ranks("lm_head_confidence", hidden, weight, 2, **options):
        assert_same((confidence, probability), expected[1:])
        finite = confidence.isfinite()
        assert torch.equal(top_token[finite], expected[0][finite])
