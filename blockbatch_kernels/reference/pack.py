"""The query tokens of all rows, back to back."""

import torch
from torch import Tensor

from blockbatch_kernels.structs import BranchState, PackedQueries, StepPlan


def pack_windows(
    state: BranchState,
    plan: StepPlan,
    page_table: Tensor,
    *,
    page_size: int,
    capacity: int,
    predict_capacity: int,
    prediction_offset: int,
    scattered: bool = False,
) -> PackedQueries:
    device, num_rows, gen_length = state.tokens.device, state.num_rows, state.gen_length
    lengths = plan.query_end - plan.query_start
    cu_seqlens_q = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens_q[1:])

    index = torch.arange(capacity, dtype=torch.int32, device=device)
    valid = index < cu_seqlens_q[-1]
    row = torch.searchsorted(cu_seqlens_q[1:], index, right=True).clamp_(max=num_rows - 1)
    place = torch.where(valid, plan.query_start[row] + index - cu_seqlens_q[row], 0)
    position = torch.where(valid, plan.query_position[row, place.long()], 0) if scattered else place

    request = row // state.num_branches
    generated = (position - state.prompt_length[request]).long()  # negative inside the prompt
    in_prompt = position.long().clamp(max=state.prompt_tokens.shape[1] - 1)
    prompt_ids = (
        state.prompt_tokens[request, in_prompt] if state.prompt_tokens.shape[1] else torch.zeros_like(index)
    )
    ids = torch.where(generated < 0, prompt_ids, state.tokens[row, generated.clamp(0, gen_length - 1)])

    # A page that does not exist (-1) can only belong to a row without queries.
    page = page_table[row, position.long() // page_size].long()
    slot = torch.where(valid, page * page_size + position % page_size, -1)

    target = generated + prediction_offset
    wanted = valid & (target >= 0) & (target < gen_length)
    wanted &= plan.predict[row, target.clamp(0, gen_length - 1)]
    # Compaction without asking the host how many there are: each wanted token knows its rank, the rest go to
    # a slot behind the end.
    rank = torch.where(wanted, torch.cumsum(wanted, 0) - 1, predict_capacity).clamp_(max=predict_capacity)
    predict_index = torch.zeros(predict_capacity + 1, dtype=torch.int64, device=device).scatter_(
        0, rank, index.long()
    )
    predict_target = torch.full((predict_capacity + 1,), -1, dtype=torch.int64, device=device)
    predict_target.scatter_(0, rank, torch.where(wanted, row * gen_length + target, -1))
    return PackedQueries(
        input_ids=torch.where(valid, ids, 0),
        positions=position,
        row_index=torch.where(valid, row, -1).int(),
        cu_seqlens_q=cu_seqlens_q,
        slot_mapping=slot,
        predict_index=predict_index[:predict_capacity],
        predict_target=predict_target[:predict_capacity],
    )
