"""Training of the block-causal model: masks, noisy blocks, decodes in large batches, export, the script."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from blockbatch.tasks.built_in import generate_problems
from blockbatch.tasks.built_in.several import join
from blockbatch.tiny import train_block
from blockbatch.tiny.block_evaluate import decode_blocks, evaluate_texts, text_tokens
from blockbatch.tiny.block_export import export_block
from blockbatch.tiny.block_masking import PART_TOKENS, Slots, combined_parts, draw_noise, draw_slots
from blockbatch.tiny.block_model import BlockModelShape, BlockTrainModel
from blockbatch.tiny.tokenizer import EOS, MASK, load_tokenizer
from plain_models import rms_norm, rotate

SIZE = 8
VOCABULARY = 40
MASK_ID, EOS_ID = 39, 38


def random_model(**sizes):
    """A small model whose every weight is random, so that nothing is the identity."""
    torch.manual_seed(0)
    small = dict(
        vocabulary=VOCABULARY, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, mlp_hidden=48
    )
    shape = BlockModelShape(**{**small, "block_size": SIZE, **sizes})
    model = BlockTrainModel(shape, compiled=False, dtype=torch.float32, longest=512)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.3
            parameter.copy_(1 + noise if name.endswith("norm") else noise * (1 + 2 * (name == "head")))
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def random_rows(rows, length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, length // 3, (rows,), generator=generator)
    content = prompt + torch.randint(5, length // 2, (rows,), generator=generator)
    tokens = torch.randint(0, 38, (rows, length), generator=generator)
    tokens[torch.arange(length) >= content[:, None]] = EOS_ID
    return tokens, prompt, content


def whole_mask(parts, rows, length):
    """[rows, length, length] of the parts' masks; each query occurs once."""
    whole = torch.zeros(rows, length, length, dtype=torch.bool)
    position = torch.arange(length)
    queries = torch.cat([position[part.queries] for part in parts])
    assert torch.equal(queries, position)
    for part in parts:
        keys = torch.cat([position[some] for some in part.keys])
        whole[:, position[part.queries][:, None], keys] = part.mask[:, 0]
    return whole


@pytest.mark.parametrize("length, count", [(32, 3), (PART_TOKENS + 64, PART_TOKENS // SIZE + 5)])
def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(length, count):
    blocks = torch.randint(0, length // SIZE, (2, count), generator=torch.Generator().manual_seed(1))
    noisy = count * SIZE
    parts = combined_parts(blocks, length, SIZE)
    assert len(parts) == (2 if length == 32 else 4)
    mask = whole_mask(parts, 2, noisy + length)
    for row in range(2):
        for query in range(0, noisy + length, 3):
            for key in range(noisy + length):
                if key < noisy:
                    sees = query < noisy and query // SIZE == key // SIZE
                elif query < noisy:
                    sees = (key - noisy) // SIZE < blocks[row, query // SIZE]
                else:
                    sees = (key - noisy) // SIZE <= (query - noisy) // SIZE
                assert bool(mask[row, query, key]) == bool(sees), (row, query, key)


def test_slots_hold_the_blocks_of_the_answer_in_turns(generator):
    tokens, prompt, content = random_rows(200, 64)
    slots = draw_slots(prompt, content, 8, SIZE, generator)
    assert slots.positions.shape == slots.open.shape == (200, 64)
    assert torch.equal(slots.open, slots.positions >= prompt[:, None])
    for row in range(200):
        wanted = set(range(int(prompt[row]) // SIZE, int(content[row]) // SIZE + 1))
        dealt = slots.blocks[row].tolist()
        assert set(dealt) == wanted
        counts = [dealt.count(block) for block in wanted]
        assert max(counts) - min(counts) <= 1
        assert slots.positions[row].tolist() == [
            block * SIZE + offset for block in dealt for offset in range(SIZE)
        ]
    assert len({int(first) for first in slots.blocks[:, 0]}) > 2


def test_noise_hides_generated_positions_alone_and_counts_what_it_hides(generator):
    tokens, prompt, content = random_rows(400, 64)
    slots = draw_slots(prompt, content, 8, SIZE, generator)
    masks = draw_noise(slots, content, SIZE, generator)
    position, open_ = slots.positions.view(-1, SIZE), slots.open.view(-1, SIZE)
    assert masks.masked.shape == (400 * 8, SIZE)
    assert not (masks.masked & ~open_).any()
    assert torch.equal(masks.weights > 0, masks.masked)
    filled = position > content.repeat_interleave(8)[:, None]
    assert masks.weights[filled].max() < 0.1 < masks.weights[masks.masked & ~filled].min()
    whole = (masks.masked == open_).all(dim=1).float().mean()
    assert 0.1 < whole < 0.6
    assert 0.3 < masks.masked[open_].float().mean() < 0.8
    later = draw_noise(slots, content, SIZE, generator)
    assert not torch.equal(later.masked, masks.masked)


def test_noisy_blocks_give_the_logits_of_a_decode(model, generator):
    """A slot of the combined forward is what a decode computes: clean before it, masked inside."""
    tokens, prompt, content = random_rows(3, 64)
    slots = draw_slots(prompt, content, 5, SIZE, generator)
    masks = draw_noise(slots, content, SIZE, generator).masked.view(3, -1)
    noisy = torch.where(masks, MASK_ID, tokens.gather(1, slots.positions))
    token, confidence = model.predict_noisy(tokens, noisy, slots)
    for row in range(3):
        for slot in range(5):
            inside = slice(slot * SIZE, (slot + 1) * SIZE)
            begin = int(slots.blocks[row, slot]) * SIZE
            canvas = torch.cat((tokens[row, :begin], noisy[row, inside], torch.full((9,), MASK_ID)))[None]
            expected, expected_confidence = model.predict(canvas)
            assert torch.equal(token[row, inside], expected[0, begin : begin + SIZE])
            assert torch.allclose(
                confidence[row, inside], expected_confidence[0, begin : begin + SIZE], atol=1e-5
            )


def test_a_noisy_block_learns_nothing_from_its_clean_copy_or_what_follows(model):
    tokens, _, _ = random_rows(1, 32)
    slots = Slots(torch.tensor([[2]]), torch.arange(16, 24)[None], torch.ones(1, 8, dtype=torch.bool))
    noisy = torch.full((1, 8), MASK_ID)
    changed = tokens.clone()
    changed[0, 16:] = (changed[0, 16:] + 7) % 38
    earlier = tokens.clone()
    earlier[0, 15] = (earlier[0, 15] + 7) % 38
    _, confidence = model.predict_noisy(tokens, noisy, slots)
    assert torch.equal(confidence, model.predict_noisy(changed, noisy, slots)[1])
    assert not torch.allclose(confidence, model.predict_noisy(earlier, noisy, slots)[1], atol=1e-4)


def plain_decode(model, prompt, canvas, threshold):
    """SDAR's rule for one prompt, with a forward of the text so far alone."""
    text = list(prompt) + [MASK_ID] * (canvas - len(prompt))
    denoise = blocks = 0
    for begin in range(len(prompt) // SIZE * SIZE, canvas, SIZE):
        end = begin + SIZE
        while MASK_ID in text[begin:end]:
            token, confidence = (t[0].tolist() for t in model.predict(torch.tensor([text[:end]])))
            masked = [i for i in range(begin, end) if text[i] == MASK_ID]
            above = [i for i in masked if threshold is not None and confidence[i] > threshold]
            for i in above or [max(masked, key=lambda i: confidence[i])]:
                text[i] = token[i]
            denoise += 1
        blocks += 1
        if EOS_ID in text[len(prompt) : end]:
            break
    ids = [token for token in text[len(prompt) :] if token != MASK_ID]
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids, denoise, blocks


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_decodes_in_batches_follow_the_published_rule(model, threshold):
    prompts = [torch.randint(0, 38, (n,)).tolist() for n in (5, 8, 13, 16, 3, 9)]
    with torch.no_grad():  # a model that never picks MASK and ends now and then
        head = model.head.clone()
        model.head[MASK_ID] = 0
        model.head[EOS_ID] *= 1.6
    decoded = decode_blocks(model, prompts, canvas=48, eos=EOS_ID, mask=MASK_ID, threshold=threshold)
    expected = [plain_decode(model, prompt, 48, threshold) for prompt in prompts]
    with torch.no_grad():
        model.head.copy_(head)
    assert decoded.ids == [ids for ids, _, _ in expected]
    assert decoded.denoise.tolist() == [denoise for _, denoise, _ in expected]
    assert decoded.blocks.tolist() == [blocks for _, _, blocks in expected]
    ended = [len(ids) < 48 - len(prompt) for (ids, _, _), prompt in zip(expected, prompts)]
    assert any(ended) and len(set(decoded.denoise.tolist())) > 1


class Knows:
    """Stands for a model that has learned some texts, given as ids of prompt and answer."""

    def __init__(self, texts):
        self.texts, self.shape = texts, BlockModelShape(VOCABULARY, block_size=32)
        self.embedding = torch.zeros(1)

    def predict(self, tokens):
        eos = load_tokenizer().token_to_id(EOS)
        top = torch.full_like(tokens, eos)
        for row, ids in enumerate(tokens.tolist()):
            for prompt, answer in self.texts:
                if ids[: len(prompt)] == prompt:
                    known = torch.tensor((prompt + answer)[: len(ids)])
                    top[row, : len(known)] = known
        return top, torch.full(tokens.shape, 0.95)


def test_texts_of_several_problems_are_judged_by_place():
    tokenizer = load_tokenizer()
    problems = [p for family in ("arithmetic", "symbolic") for p in generate_problems(family, "test", 6, 1)]
    texts = [problems[0::3], problems[1::3], problems[2::3]]
    pairs = [tuple(tokenizer.encode(part).ids for part in join(text)) for text in texts]
    broken = texts[1][2].answer
    spoiled = join(texts[1])[1].replace(broken, broken[: len(broken) // 2])
    pairs[1] = pairs[1][0], tokenizer.encode(spoiled).ids
    result = evaluate_texts(Knows(pairs), tokenizer, texts, tokens=2 * 1024, canvas=1024, threshold=0.9)
    assert result["accuracy_by_place"] == [1.0, 1.0, 0.6667, 1.0]
    assert [wrong["expected"] for wrong in result["wrong"]] == [broken]
    assert result["tokens_a_text"]["most"] == max(text_tokens(tokenizer, text) for text in texts)
    blocks = [(len(p) + len(a)) // 32 - len(p) // 32 + 1 for p, a in pairs]
    assert result["mean_blocks"] == result["mean_forwards"] == round(sum(blocks) / 3, 2)


def plain_logits(folder, ids):
    """An SDAR folder's forward of ids under the block-causal mask, tensor by tensor as its config says."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    length, size = len(ids), config["block_size"]
    block = torch.arange(length) // size
    mask = block[:, None] >= block
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):

        def linear(value, name, prefix=f"model.layers.{layer}."):
            return F.linear(value, weights[f"{prefix}{name}.weight"])

        def gain(name, prefix=f"model.layers.{layer}."):
            return weights[f"{prefix}{name}.weight"]

        h = rms_norm(x, gain("input_layernorm"), eps)
        q, k, v = (linear(h, f"self_attn.{name}_proj").view(length, -1, config["head_dim"]) for name in "qkv")
        q, k = (
            rotate(
                rms_norm(t, gain(f"self_attn.{name}_norm"), eps), list(range(length)), config["rope_theta"]
            )
            for t, name in ((q, "q"), (k, "k"))
        )
        k, v = (t.repeat_interleave(heads // config["num_key_value_heads"], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * config["head_dim"] ** -0.5
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
        x = x + linear(attended.flatten(1), "self_attn.o_proj")
        h = rms_norm(x, gain("post_attention_layernorm"), eps)
        x = x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return F.linear(rms_norm(x, weights["model.norm.weight"], eps), weights["lm_head.weight"])


def test_the_exported_folder_is_the_trained_model(tmp_path):
    tokenizer = load_tokenizer()
    model = random_model(vocabulary=tokenizer.get_vocab_size())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    export_block(model, tokenizer, tmp_path, {"steps": 1})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "sdar" and config["block_size"] == SIZE
    assert config["mask_token_id"] == tokenizer.token_to_id(MASK)
    stops = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [tokenizer.token_to_id(EOS)]
    assert load_tokenizer(tmp_path / "tokenizer.json").get_vocab() == tokenizer.get_vocab()
    ids = torch.randint(0, tokenizer.get_vocab_size(), (277,))
    token, confidence = model.predict(ids[None])
    assert len(ids) > PART_TOKENS
    top = plain_logits(tmp_path, ids.tolist()).softmax(-1).max(-1)
    assert torch.equal(token[0], top.indices)
    assert torch.allclose(confidence[0], top.values, atol=1e-4)


def test_the_script_trains_and_writes_a_folder(tmp_path, capsys):
    sizes = "--d-model 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --mlp-hidden 64 --device cpu"
    rest = "--steps 6 --problems 1 --tokens 6144 --test-problems 0 --report 2 --causal-part 0.3"
    train_block.main(["--out", str(tmp_path / "out"), *sizes.split(), *rest.split(), "--several-from", "0.6"])
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["steps"] == 6 and [line["step"] for line in record["loss"]] == [2, 4, 6]
    assert record["arguments"]["out"] == "out"
    assert all(line["loss"] > 0 for line in record["loss"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("option", [("--tokens", "6145"), ("--block-size", "12")])
def test_wrong_arguments_of_the_script_are_named(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_block.parse_arguments(["--out", str(tmp_path), *option])
    assert option[0] in capsys.readouterr().err
