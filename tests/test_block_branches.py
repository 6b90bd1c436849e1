"""BlockBatch inside the trained block: its rules against `decode_policy`, and whole decodes."""

import random
import re

import pytest
import torch

import block_models
import blockbatch
import blockbatch_kernels as bbk
from blockbatch.decoding.block_branches import BlockBranches, BranchRules
from blockbatch.tracing import replay
from oracle import block_diffusion as oracle

MASK, EOS = 9, 8


def random_rules(rng):
    threshold = rng.choice((0.3, 0.6, 0.9))
    return dict(
        threshold=threshold,
        tail_threshold=rng.choice((None, None, min(1.0, threshold + 0.2))),
        merge_threshold=rng.choice((0.5, 0.7, 1.0)),
        sync_threshold=rng.choice((0, 2, 8, 40)),
        leap_radius=rng.choice((0, 0, 2)),
        leap_threshold=rng.choice((0.1, 0.5)),
    )


@pytest.mark.parametrize("case", range(60))
def test_rules_are_those_of_decode_policy(case):
    """Turn by turn on random predictions, until a branch holds the block or the policy ends the request."""
    rng = random.Random(case)
    length = rng.choice((8, 16, 32))
    sizes = sorted(rng.sample([size for size in (1, 2, 4, 8, 16, 32) if length % size == 0], 3))
    rules = random_rules(rng)
    params = bbk.PolicyParams(mask_token_id=MASK, eos_token_ids=(EOS,), refresh_interval=None, **rules)
    known = [rng.randrange(EOS) for _ in range(rng.randrange(length))]
    branches = BlockBranches(sizes, BranchRules(MASK, (EOS,), **rules))
    branches.open(0, known + [MASK] * (length - len(known)), 0)

    nothing = torch.zeros(1, 0, dtype=torch.int32)
    sizes_tensor = torch.tensor(sizes, dtype=torch.int32)
    state = bbk.BranchState.create(nothing, torch.zeros(1, dtype=torch.int32), sizes_tensor, length, MASK)
    state.tokens[:, : len(known)] = torch.tensor(known, dtype=torch.int32)
    for row, branch in enumerate(branches.all):
        state.window_start[row], state.window_end[row] = branch.start, branch.end
    plan = bbk.initial_plan(state, params)
    # A token that many predict, so that branches agree often enough to merge.
    likely = [rng.randrange(EOS + 1) if rng.random() < 0.05 else rng.randrange(EOS) for _ in range(length)]
    for _ in range(4 * length):
        predicted, flat = [], []
        for row, branch in enumerate(branches.all):
            values = {}
            for offset, token in enumerate(branch.tokens):
                if token == MASK:
                    top = likely[offset] if rng.random() < 0.8 else rng.randrange(EOS)
                    values[offset] = top, rng.choice((0.1, 0.35, 0.55, 0.65, 0.8, 0.95)) + 0.01 * rng.random()
                    flat.append((row * length + offset, *values[offset]))
            predicted.append(values)
        target, top_token, confidence = zip(*flat)
        predictions = bbk.Predictions(
            torch.tensor(target), torch.tensor(top_token, dtype=torch.int32), torch.tensor(confidence)
        )
        # What the loop does for them: a block step of all branches.
        plan.flags[1] = bbk.PHASES.index("block")
        plan.source_row.copy_(torch.arange(len(sizes)))
        plan, _ = bbk.decode_policy(state, predictions, plan, params, backend="reference")
        branches.after_forward(predicted)
        assert [branch.tokens for branch in branches.all] == state.tokens.tolist()
        for name in ("decoded", "committed", "merged", "synced", "done"):
            assert [getattr(branch, name) for branch in branches.all] == getattr(state, name).tolist(), name
        if bool(state.finished[0]) or bool(state.done.any()):
            break
        assert branches.winner() is None
        assert branches.windows() == list(
            zip(state.window_start.tolist(), state.window_end.tolist(), strict=True)
        )
    eos = bool(state.finished[0]) and int(state.stop_reason[0]) == bbk.STOP_REASONS.index("eos")
    assert (branches.finished is not None) == eos
    assert branches.winner() == (int(state.winner[0]) if eos else state.done.tolist().index(True))


def test_the_cases_hold_merges_and_syncs():
    """So that the comparison above is one."""
    rng, merged, synced = random.Random(3), 0, 0
    for _ in range(20):
        rules = BranchRules(MASK, (EOS,), 0.6, None, 0.5, 2, 0, 0.5)
        branches = BlockBranches((2, 4, 8), rules)
        branches.open(0, [MASK] * 16, 0)
        while branches.winner() is None:
            branches.after_forward(
                [
                    {
                        place: (place % 5, rng.choice((0.4, 0.55, 0.9)))
                        for place in range(16)
                        if branch.tokens[place] == MASK
                    }
                    for branch in branches.all
                ]
            )
        merged += sum(branch.merged for branch in branches.all)
        synced += sum(branch.synced for branch in branches.all)
    assert merged > 20 and synced > 5


@pytest.fixture(scope="module", params=["sdar", "fast_dllm_v2"])
def model(request, tmp_path_factory):
    folder = block_models.write(tmp_path_factory.mktemp("model"), request.param, seed=4, block_size=32)
    loaded = blockbatch.load_model(folder, device="cpu")
    loaded.plain = oracle.PlainBlockModel(folder, block_models.MASK)
    return loaded


def config(**options):
    return blockbatch.DecodeConfig(**{"gen_length": 96, "trace": True, "eos_token_ids": (), **options})


def test_one_branch_of_the_whole_block_is_the_dynamic_rule(model):
    """No confidence is exactly 0.7, where the two rules differ."""
    for length in (1, 32, 45):
        prompt = block_models.prompt(length, 1)
        result = blockbatch.generate(model, prompt, config(block_sizes=(32,), threshold=0.7))
        if model.spec.family == "sdar":
            other = config(method="block_diffusion", threshold=0.7)
        else:
            other = config(method="block_diffusion", threshold=0.7, sub_block_size=32)
        published = blockbatch.generate(model, prompt, other)
        length = min(len(result.canvas), len(published.canvas))
        assert length >= 64 and result.canvas[:length] == published.canvas[:length]


def test_every_forward_sees_what_its_branches_hold(model):
    """Replayed from the trace on the plain model: inputs, top tokens and confidences of all commits."""
    shifted = model.spec.family == "fast_dllm_v2"
    for seed, length in enumerate((3, 32, 70)):
        prompt = block_models.prompt(length, seed)
        result = blockbatch.generate(model, prompt, config(block_sizes=(4, 8, 16, 32), threshold=0.4))
        canvases = [list(prompt) + [block_models.MASK] * 200 for _ in result.branches]
        checked = 0
        for entry in result.trace:
            begin = entry["stored"] + (32 if entry["kind"] == "fused" else 0)
            if entry["kind"] in ("prefill", "fused"):
                begin = (entry["stored"] + len(entry["input_ids"])) // 32 * 32
                begin -= 32 * entry["distinct_rows"] if entry["kind"] == "fused" else 0
            inputs = [entry["input_ids"][i : i + 32] for i in range(0, len(entry["input_ids"]), 32)]
            for commit in entry["commits"]:
                canvas = canvases[commit["branch"]]
                block = canvas[begin : begin + 32] if entry["kind"] not in ("prefill", "store") else None
                if block is None:
                    continue
                assert block in inputs
                logits, _ = model.plain.forward(canvas[: begin + 32], None, 32)
                confidence, top = logits.softmax(-1).max(-1)
                for position, token, sure in zip(
                    commit["positions"], commit["tokens"], commit["confidence"], strict=True
                ):
                    row = max(position + length - shifted, begin)
                    assert int(top[row]) == token and float(confidence[row]) == pytest.approx(sure, abs=1e-4)
                    checked += 1
            for change in entry["commits"] + entry["merges"]:
                for position, token in zip(change["positions"], change["tokens"], strict=True):
                    canvases[change["branch"]][length + position] = token
            for sync in entry["syncs"]:
                canvases[sync["branch"]] = list(canvases[sync["leader"]])
        assert checked > 60
    assert model.pool.pages_in_use == 0


def test_merges_and_syncs_happen_and_count(model):
    merged = synced = 0
    for seed in range(4):
        options = dict(block_sizes=(4, 8, 32), threshold=0.5, sync_threshold=4, merge_threshold=0.5)
        result = blockbatch.generate(model, block_models.prompt(20, seed), config(**options))
        merged += sum(branch.merged for branch in result.branches)
        synced += sum(branch.synced for branch in result.branches)
        traced = sum(len(change["positions"]) for entry in result.trace for change in entry["merges"])
        assert traced == sum(branch.merged for branch in result.branches)
        assert len(result.canvas) >= 96 and block_models.MASK not in result.canvas
        assert result.block_size in (4, 8, 32)
    assert merged > 0 and synced > 0


def test_branches_need_fewer_forwards_than_the_small_one_alone(model):
    prompt = block_models.prompt(9, 0)
    several = blockbatch.generate(model, prompt, config(block_sizes=(4, 32), threshold=0.6))
    alone = blockbatch.generate(model, prompt, config(block_sizes=(4,), threshold=0.6))
    assert several.nfe.total < alone.nfe.total


def test_an_end_of_text_ends_the_decode(model):
    prompt = block_models.prompt(20, 2)
    free = blockbatch.generate(model, prompt, config())
    stop = free.canvas[40]
    result = blockbatch.generate(model, prompt, config(eos_token_ids=(stop,)))
    assert result.stop_reason == "eos" and stop in result.canvas and stop not in result.tokens
    assert block_models.MASK not in result.tokens and result.nfe.total < free.nfe.total


@pytest.mark.parametrize("method", ["blockbatch", "block_diffusion"])
@pytest.mark.parametrize("length", [20, 33, 63, 64])
def test_an_end_of_text_in_the_prompt_ends_nothing(model, length, method):
    """Prompts of chats hold one shortly before their end, in the block where the text begins."""
    for seed in range(3):
        prompt = block_models.prompt(length, seed)
        stop = 0
        for place in (length - 1, length - 3):
            free, written = None, {stop}
            while stop in written:  # by any branch
                stop += 1
                marked = [*prompt[:place], stop, *prompt[place + 1 :]]
                free = blockbatch.generate(model, marked, config(method=method))
                changes = [c for entry in free.trace for c in entry["commits"] + entry["merges"]]
                written = {token for change in changes for token in change["tokens"]}
            result = blockbatch.generate(model, marked, config(method=method, eos_token_ids=(stop,)))
            assert (result.canvas, result.nfe, result.stop_reason) == (free.canvas, free.nfe, "length")


def test_default_sizes_are_those_inside_the_block(model):
    result = blockbatch.generate(model, [1, 2, 3], config(gen_length=40))
    assert [branch.block_size for branch in result.branches] == [4, 8, 16, 32]


def test_bad_options(model, tmp_path):
    family = model.spec.family
    for options, message in (
        (dict(refresh_interval=16), f"refresh_interval: expected it left out for {family}, .* got 16"),
        (dict(refresh_scope="generation"), "refresh_scope: expected it left out"),
        (dict(query_span="open"), "query_span: expected it left out"),
        (dict(eos_exit="none"), "eos_exit: expected it left out"),
        (dict(block_sizes=(4, 24)), "block_sizes: expected divisors of the trained block of 32, got 24"),
        (dict(method="dual_cache"), f"method: expected block_diffusion or blockbatch for {family}"),
        (dict(trace_kv=True), "trace_kv: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            blockbatch.generate(model, [1], config(**options))
    folder = block_models.write(tmp_path / "small", family, block_size=4)
    small = blockbatch.load_model(folder, device="cpu")
    message = "method: expected block_diffusion for a model of blocks of 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        blockbatch.generate(small, [1], config())
    assert small.pool is None


def test_replay_ends_with_the_canvas(model):
    result = blockbatch.generate(model, block_models.prompt(5, 7), config(block_sizes=(8, 32)))
    canvases = replay(result.trace, 2, len(result.canvas), block_models.MASK)
    assert canvases == [result.canvas] * 2
