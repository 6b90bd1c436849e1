"""The operators beside torch in docs/operators.md, and its loop, run as they stand there; and links."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import blockbatch
import blockbatch_kernels as bbk
from operator_arguments import MASK, ROTATED_OPERATORS, arguments_of, linear_rope
from standalone_dual_cache import Transformer

ROOT = Path(__file__).parents[1]
OPERATORS, LOOP = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "operators.md").read_text(), re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")
DATA = Path(__file__).parent / "data" / "conformance"
SIZES = dict(page_size=16, num_heads=4, num_kv_heads=2, head_dim=64, mask_token_id=MASK)


def run(code, names):
    scope = {**names, "bbk": bbk, "torch": torch, "F": F}
    scope = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in scope.items()
    }
    exec(code, scope)
    return scope


def test_every_operator_is_shown():
    for name in vars(bbk.reference):
        if name in bbk.__all__:
            assert f"bbk.{name}(" in OPERATORS


@pytest.mark.parametrize(
    "operator, results",
    [
        ("rms_norm", ["normed", "residual"]),
        ("swiglu", ["activated"]),
        ("quantize_rows", ["values", "scale"]),
        ("rms_norm_fp8", ["values", "scale", "residual"]),
        ("swiglu_fp8", ["values", "scale"]),
        ("linear_fp8", ["product"]),
        ("rope_kv_write", ["q", "k_cache", "v_cache"]),
        ("rope_kv_write_fp8", ["q", "k_cache", "v_cache"]),
        ("linear_rope_kv_write", ["q", "k_cache", "v_cache"]),
        ("linear_rope_kv_write_fp8", ["q", "k_cache", "v_cache"]),
        ("varlen_attention", ["attended"]),
        ("varlen_attention_fp8", ["attended"]),
        ("lm_head_confidence", ["top_token", "confidence", "probe"]),
        ("lm_head_likely", ["top_token", "confidence", "likely_token", "likely_probability"]),
        ("lm_head_confidence_fp8", ["top_token", "confidence", "probe"]),
        ("share_pages", ["page_table"]),
    ],
)
def test_the_same_in_torch(operator, results):
    lines = next(part for part in OPERATORS.split("\n\n") if f"bbk.{operator}(" in part).splitlines()
    names = {**SIZES, **arguments_of(operator)}
    names.pop("plan", None)
    if operator in ("rope_kv_write", "rope_kv_write_fp8"):
        names["slot_mapping"] = torch.arange(9) * 5
    if operator == "linear_rope_kv_write":
        names |= linear_rope("cpu", torch.float32)
    if operator in ROTATED_OPERATORS:
        names |= dict(qkv_weight=names["weight"], qkv_bias=names["bias"])
    if operator == "share_pages":
        names["source_row"] = torch.tensor([0, 0, 3, 2], dtype=torch.int32)
    ours = run("\n".join(line for line in lines if not line.startswith("# ")), names)
    names["attended"] = torch.zeros(10, 4, 64)  # the padding stays zero
    theirs = run("\n".join(line[2:] for line in lines if line.startswith("# ")), names)
    for name in results:
        torch.testing.assert_close(ours[name], theirs[name], check_dtype=False)


def test_the_loop_decodes_as_the_engine_does():
    model, own = blockbatch.load_model(DATA, device="cpu"), Transformer(DATA, "cpu")
    record = json.loads((DATA / "trajectories.json").read_text())[0]
    prompt, gen_length = record["prompt"], record["gen_length"]
    length = len(prompt) + gen_length
    for options in (dict(method="blockbatch", block_sizes=(4, 8, 16, 32)), dict(method="dual_cache")):
        block_sizes = options.get("block_sizes", (32,))
        rows, columns = len(block_sizes), -(-length // 16)
        names = dict(
            prompt_tokens=torch.tensor([prompt], dtype=torch.int32),
            prompt_length=torch.tensor([len(prompt)], dtype=torch.int32),
            block_sizes=torch.tensor(block_sizes, dtype=torch.int32),
            gen_length=gen_length,
            mask_token_id=own.mask_token_id,
            eos_token_ids=(own.eos_token_id,),
            kv_cache=own.new_cache(rows * columns),
            page_table=torch.full((rows, columns), -1, dtype=torch.int32),
            seqlens_k=torch.full((rows,), length, dtype=torch.int32),
            lm_head=own.lm_head,
            transformer=own.forward,
        )
        with torch.inference_mode():
            scope = run(LOOP, names)
        config = blockbatch.DecodeConfig(gen_length=gen_length, eos_exit="prefix", **options)
        expected = blockbatch.generate(model, prompt, config)
        assert scope["tokens"][0].tolist() == expected.canvas
        assert scope["state"].nfe.sum() == expected.nfe.total


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def test_every_page_is_in_the_index():
    index = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert len(index) > 10
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and page.name not in index] == []


def test_anchors_of_links_are_headings():
    found = 0
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text()):
            target = (page.parent / link) if link else page
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (page.name, link, anchor)
            found += 1
    assert found > 3
