"""Building the state of a batch of requests, and reading results out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import blockbatch_kernels as bbk


@dataclass(frozen=True)
class BranchResult:
    """What one branch did.

    Attributes:
        block_size: its block size.
        committed: tokens that it committed itself.
        merged: tokens that it took from other branches.
        synced: how often it took over the leader's state.
        progress: start of its window in the generation region when the request ended.
        adopted: forwards that it took over from drafts; each is one forward less.
    """

    block_size: int
    committed: int
    merged: int
    synced: int
    progress: int
    adopted: int = 0


@dataclass(frozen=True)
class NFE:
    """Model forwards of a request by phase; one batched forward over all its branches counts once."""

    init: int
    block: int
    refresh: int

    @property
    def total(self) -> int:
        return self.init + self.block + self.refresh


@dataclass(frozen=True)
class BlockNFE:
    """The same with a block-causal model, by what a forward is for.

    Attributes:
        prefill: of the prompt.
        denoise: of a block or a part of it; one that stores the block before on the way counts here.
        store: of finished blocks, alone.
    """

    prefill: int
    denoise: int
    store: int

    @property
    def total(self) -> int:
        return self.prefill + self.denoise + self.store


@dataclass(frozen=True)
class RequestOutcome:
    """The end of one request, on the host; `prefix_tokens` as of `Result`."""

    canvas: list[int]
    nfe: NFE | BlockNFE
    winner: int
    stop_reason: str
    branches: tuple[BranchResult, ...]
    prefix_tokens: int = 0


def pad_prompts(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [Q, longest] int32, zero behind each prompt, and lengths [Q] int32; on the CPU."""
    longest = max(len(prompt) for prompt in prompts)
    kind = dict(dtype=torch.int32, device="cpu")
    padded = torch.zeros(len(prompts), longest, **kind)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, **kind)
    return padded, torch.tensor([len(prompt) for prompt in prompts], **kind)


def empty_state(
    num_requests: int,
    max_prompt: int,
    block_sizes: tuple[int, ...],
    gen_length: int,
    params: bbk.PolicyParams,
    device: torch.device,
) -> bbk.BranchState:
    """A state with room for prompts of up to `max_prompt` tokens, to be `reset` before use."""
    prompts = torch.zeros(num_requests, max_prompt, dtype=torch.int32, device=device)
    lengths = torch.zeros(num_requests, dtype=torch.int32, device=device)
    sizes = torch.tensor(block_sizes, dtype=torch.int32, device=device)
    entries = bbk.map_entries(block_sizes, gen_length) if params.policy == "dream_published" else 0
    return bbk.BranchState.create(prompts, lengths, sizes, gen_length, params.mask_token_id, entries)


def read_outcome(state: bbk.BranchState, request: int, drafts: int = 0) -> RequestOutcome:
    """The result of a finished request.

    Args:
        drafts: rows of a request that are no branches; they stand behind its branches.
    """
    first, count = request * state.num_branches, state.num_branches - drafts
    winner = int(state.winner[request])

    def column(name: str) -> list[int]:
        return getattr(state, name)[first : first + count].tolist()

    names = ("block_size", "committed", "merged", "synced", "progress", "adopted")
    branches = tuple(BranchResult(*values) for values in zip(*(column(name) for name in names), strict=True))
    return RequestOutcome(
        canvas=state.tokens[first + winner].tolist(),
        nfe=NFE(*state.nfe[request].tolist()),
        winner=winner,
        stop_reason=bbk.STOP_REASONS[int(state.stop_reason[request])],
        branches=branches,
    )


def final_prefixes(state: bbk.BranchState, params: bbk.PolicyParams) -> list[list[int]]:
    """For each request the longest prefix of its generation region on which all its branches agree.

    It is final: merges and commits only write where nothing stands, and a sync copies one branch's canvas
    over another's.
    """
    tokens = state.tokens.view(state.num_requests, state.num_branches, -1)
    tokens = tokens[:, : state.num_branches - len(params.drafts)]
    agreed = (tokens == tokens[:, :1]).all(1) & (tokens[:, 0] != params.mask_token_id)  # [Q, G]
    # The host waits once, for both.
    length = agreed.int().cumprod(1).sum(1, keepdim=True, dtype=torch.int32)
    rows = torch.cat((length, tokens[:, 0]), dim=1).tolist()
    return [row[1 : 1 + row[0]] for row in rows]


def end_requests(state: bbk.BranchState, requests: list[int], drafts: int = 0) -> None:
    """Ends running requests where they stand, the most advanced branch (the first on a tie) as the winner.

    Args:
        drafts: as of `read_outcome`.
    """
    index = torch.tensor(requests, device=state.finished.device)
    count = state.num_branches - drafts
    progress = state.progress.view(state.num_requests, state.num_branches)[index, :count]
    order = torch.arange(count, device=index.device)
    # No two branches have the same score: argmax does not say which of two equal ones it takes.
    state.winner[index] = (progress * count - order).argmax(1).int()
    state.finished[index] = True
