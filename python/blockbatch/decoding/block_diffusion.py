"""Block diffusion (BD3-LM, arXiv 2503.09573) as SDAR and Fast-dLLM v2 decode it.

Attention is bidirectional inside a block and causal across blocks, so K and V of a finished block are final:
the prompt is computed once, and a forward computes one block. `block_programs.py` has the rules.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_branches import BranchRules
from blockbatch.decoding.sampling import SamplingKind
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.methods import PAPER_BLOCK_SIZES
from blockbatch.models.spec import BLOCK_FAMILIES, ModelSpec

# Published defaults.
THRESHOLDS = {"sdar": 0.85, "fast_dllm_v2": 1.0}
SUB_BLOCK_SIZE = 8
# Options of the method that the other family does not have.
_FAMILY_OPTIONS = {
    "sdar": ("steps", "commit", "fuse_store"),
    "fast_dllm_v2": ("sub_block_size", "block_cache", "sampler"),
}


class BlockMethod(NamedTuple):
    """How to decode with a block-causal model.

    Attributes:
        family: of the model.
        mask_token_id, eos_token_ids: what ids mean; an id of the latter ends a text.
        gen_length: tokens to generate; the last block is filled.
        block_size: of the mask, B.
        trained_size: the block size that the model was trained with.
        threshold: write what has more than this confidence.
        steps, commit, fuse_store: SDAR.
        sub_block_size, block_cache, sampler, strict: Fast-dLLM v2.
        grow: whether a text goes on until memory ends.
        prefix_cache: whether finished blocks are kept for other requests.
        block_sizes, rules: of BlockBatch's branches inside the block; none: the family's own rule.
        sampling: what drawing tokens takes; None: they are those of the highest logits.
    """

    family: str
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    gen_length: int
    block_size: int
    trained_size: int
    threshold: float = 1.0
    steps: int = 0
    commit: str = "dynamic"
    fuse_store: bool = False
    sub_block_size: int = 0
    block_cache: bool = False
    sampler: str = "generate"
    strict: bool = False
    grow: bool = False
    prefix_cache: bool = False
    block_sizes: tuple[int, ...] = ()
    rules: BranchRules | None = None
    sampling: SamplingKind | None = None

    @property
    def program(self) -> str:
        """Which of `block_programs.PROGRAMS` runs."""
        return "blockbatch" if self.block_sizes else self.family

    @property
    def drafts(self) -> tuple[int, ...]:
        """None: every row is a branch."""
        return ()

    def positions(self, prompt: int) -> int:
        """Positions that a text behind `prompt` tokens may come to hold, the last block whole."""
        size = self.block_size
        if self.family == "sdar" or self.block_sizes:
            return -(-(prompt + self.gen_length) // size) * size
        return max(prompt, (prompt // size + self.gen_length // size) * size)


def method(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> BlockMethod:
    """
    Raises:
        ValueError: the model's family does not have an option that was given, or sizes do not fit.
    """
    check_family(config, spec)
    for family in BLOCK_FAMILIES:
        for name in _FAMILY_OPTIONS[family]:
            if family != spec.family and getattr(config, name) not in (None, False):
                raise ValueError(
                    f"{name}: expected none for {spec.family}, since it is an option of {family}, got "
                    f"{getattr(config, name)!r}"
                )
    block_size = spec.block_size if config.block_size is None else config.block_size
    threshold = THRESHOLDS[spec.family] if config.threshold is None else config.threshold
    common = dict(
        family=spec.family,
        mask_token_id=spec.mask_token_id,
        eos_token_ids=eos_token_ids,
        gen_length=config.gen_length,
        block_size=block_size,
        trained_size=spec.block_size,
        threshold=threshold,
        grow=config.max_length == "grow",
        prefix_cache=config.prefix_cache,
    )
    if spec.family == "sdar":
        if config.strict_published:
            raise ValueError("strict_published: expected False for sdar, which has no such defect, got True")
        steps = block_size if config.steps is None else config.steps
        if steps > block_size:
            raise ValueError(f"steps: expected at most the block's {block_size} positions, got {steps}")
        return BlockMethod(
            **common,
            steps=steps,
            commit=config.commit or "dynamic",
            fuse_store=config.fuse_store is not False,
        )
    sub_block_size = config.sub_block_size
    if sub_block_size is None:
        sub_block_size = SUB_BLOCK_SIZE if block_size % SUB_BLOCK_SIZE == 0 else block_size
    if block_size % sub_block_size:
        raise ValueError(
            f"sub_block_size: expected a divisor of block_size = {block_size}, got {sub_block_size}"
        )
    if spec.block_size % block_size and not config.strict_published:
        raise ValueError(
            f"block_size: expected a divisor of the trained {spec.block_size}, since the published mask of "
            "other sizes differs between denoising and storing (strict_published=True runs it all the same), "
            f"got {block_size}"
        )
    return BlockMethod(
        **common,
        sub_block_size=sub_block_size,
        block_cache=bool(config.block_cache),
        sampler=config.sampler or "generate",
        strict=config.strict_published,
    )


def branches(config: DecodeConfig, spec: ModelSpec, eos_token_ids: tuple[int, ...]) -> BlockMethod:
    """`method="blockbatch"` on a block-causal model; see `block_branches.py`.

    Raises:
        ValueError: an option that has no meaning inside a block was given, or sizes do not fit.
    """
    check_family(config, spec)
    size = spec.block_size
    for name in ("refresh_interval", "refresh_scope", "query_span", "eos_exit"):
        if not config.has_default(name) and getattr(config, name) is not None:
            raise ValueError(
                f"{name}: expected it left out for {spec.family}, whose stored K/V never change and whose "
                f"text ends before an EOS, got {getattr(config, name)!r}"
            )
    if size % PAGE_SIZE:
        raise ValueError(
            f"method: expected block_diffusion for a model of blocks of {size}, since branches inside a "
            f"block need one of a multiple of {PAGE_SIZE} positions, got 'blockbatch'"
        )
    sizes = config.block_sizes
    if config.has_default("block_sizes"):
        sizes = tuple(one for one in PAPER_BLOCK_SIZES if size % one == 0)
    for one in sizes:
        if size % one:
            raise ValueError(f"block_sizes: expected divisors of the trained block of {size}, got {one}")
    leap_threshold = spec.leap_threshold if config.leap_threshold is None else config.leap_threshold
    return BlockMethod(
        family=spec.family,
        mask_token_id=spec.mask_token_id,
        eos_token_ids=eos_token_ids,
        gen_length=config.gen_length,
        block_size=size,
        trained_size=size,
        block_sizes=sizes,
        rules=BranchRules(
            mask_token_id=spec.mask_token_id,
            eos_token_ids=eos_token_ids,
            threshold=config.threshold,
            tail_threshold=config.tail_threshold,
            # A confidence never exceeds 1, so this threshold lets nothing pass.
            merge_threshold=1.0 if config.merge_threshold is None else config.merge_threshold,
            sync_threshold=size if config.sync_threshold is None else config.sync_threshold,
            leap_radius=config.leap_radius if config.commit == "local_leap" else 0,
            leap_threshold=leap_threshold,
        ),
    )


def check_family(config: DecodeConfig, spec: ModelSpec) -> None:
    """Raises ValueError if the model's attention is not that of the method."""
    if spec.block_size is None:
        raise ValueError(
            f"method: expected one for full attention, as {spec.family} has it, got {config.method!r}"
        )
    if spec.mask_token_id is None:
        raise ValueError(
            "model: expected to know the id of MASK, which neither config.json nor a tokenizer says: "
            "load_model(..., mask_token_id=) does"
        )


def warn_of_size(method: BlockMethod) -> None:
    """Says what is known of a block size that the model was not trained with."""
    size, trained = method.block_size, method.trained_size
    if size == trained:
        return
    evidence = "larger than trained loses accuracy"
    if size < trained:
        evidence = (
            "smaller than trained keeps its accuracy for some models (LLaDA2, TDAR) and loses some for "
            "Fast-dLLM v2"
        )
    warnings.warn(
        f"block_size: expected the trained {trained}, got {size}, which is another mask; "
        f"published: {evidence}",
        stacklevel=4,
    )


BUILDERS = {"block_diffusion": method, "blockbatch": branches}
