"""The published rules of SDAR and Fast-dLLM v2, each as a program that asks for one forward after the other.

Written from what the published code does; `BLOCK_DIFFUSION.md` says the rules in words. A program yields
forwards and is sent what they predict. Its return value says why it ended: "eos" or "length".
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from blockbatch.decoding.block_branches import BlockBranches, fp32
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.block_forward import Predicted
from blockbatch.decoding.block_text import BlockText, Forward

Program = Generator[Forward, list[Predicted], str]


def sdar(text: BlockText, method: BlockMethod) -> Program:
    """SDAR and TraDo: denoise a block until it holds no MASK, then store it."""
    size, steps = method.block_size, method.steps
    first = text.prompt_length // size
    last = -(-(text.prompt_length + method.gen_length) // size)
    # What is final once a forward has computed it: the prompt's blocks, later the finished block.
    waiting = _prefill(text, first * size, size)
    for block in range(first, last):
        start, stop = block * size, (block + 1) * size
        if not text.make_room(stop):
            break
        text.ids += [text.mask] * (stop - len(text.ids))
        text.window = (max(start, text.prompt_length), stop)
        if waiting is not None and not method.fuse_store:
            yield waiting
            text.stored, waiting = start, None
        step = 0
        while masks := text.masks(start, stop):
            if step == steps:
                raise _stalled(text)
            row = text.row(start, stop, stop, masks)
            if waiting is None:
                (predicted,) = yield Forward("denoise", [row])
            else:
                *_, predicted = yield Forward("fused", [*waiting.rows, row])
                text.stored, waiting = start, None
            chosen = _chosen(method, predicted, size // steps + (step < size % steps))
            text.write([masks[index] for index in chosen], [predicted[index] for index in chosen])
            step += 1
        waiting = Forward("store", [text.row(start, stop, stop)])
        if text.first_of(method.eos_token_ids, text.window[0]) is not None:
            break
    if waiting is not None:
        yield waiting
        text.stored = len(text.ids) // size * size
    ended = text.first_of(method.eos_token_ids, text.window[0]) is not None
    return "eos" if ended else "length"


def _chosen(method: BlockMethod, predicted: Predicted, quota: int) -> list[int]:
    """Which of a block's MASKs are written, ascending."""
    everything = list(range(len(predicted)))
    if method.commit == "all":
        return everything
    if method.commit == "sequential":
        return everything[:quota]
    if method.commit == "dynamic":
        threshold = fp32(method.threshold)
        sure = [index for index in everything if predicted[index][1] > threshold]
        if len(sure) >= quota:
            return sure
    # The sort is stable: of equal confidences the first counts.
    return sorted(sorted(everything, key=lambda index: -predicted[index][1])[:quota])


def fast_dllm_v2(text: BlockText, method: BlockMethod) -> Program:
    """Fast-dLLM v2: sub-blocks one after the other; the stored block predicts the next one's first token."""
    size, prompt_length, stops = method.block_size, text.prompt_length, method.eos_token_ids
    early = method.sampler == "generate"
    whole = prompt_length // size * size
    if prompt_length == size and method.strict:
        # The published code stores nothing here and goes on behind the block, which nothing ever reads.
        text.shift = size
    elif whole:
        # Its last row predicts the text's first token where a block ends with the prompt.
        bonus = _bonus(text, whole)
        prefill = _prefill(text, whole, size, bonus)
        if prefill is not None:
            predicted = yield prefill
            text.stored = whole
            if bonus:
                text.write([whole], predicted[-1])
    for _ in range(method.gen_length // size):
        start = len(text.ids)
        if early and text.first_of(stops, max(prompt_length, start - size)) is not None:
            break
        stop = (start // size + 1) * size
        if not text.make_room(stop):
            break
        text.ids += [text.mask] * (stop - start)
        block = _Block(text, method, start, stop, early)
        yield from block.denoise()
        if block.stopped():
            break
        if block.done and not early:
            return _cut(text, method)
        (predicted,) = yield Forward("store", [text.row(stop - size, stop, stop, [stop - 1], [stop])])
        text.stored = stop - text.shift
        text.window = (stop, stop)
        text.write([stop], predicted)
    return _cut(text, method) if early else "length"


class _Block:
    """The denoising of one block, [stop - size, stop) of the text.

    Attributes:
        done: whether a forward wrote a stop id.
    """

    def __init__(self, text: BlockText, method: BlockMethod, start: int, stop: int, early: bool) -> None:
        self._text, self._method, self._early = text, method, early
        self._start, self._stop = start, stop
        self._cached = False
        self.done = False

    def denoise(self) -> Generator[Forward, list[Predicted], None]:
        text, size, sub = self._text, self._method.block_size, self._method.sub_block_size
        while text.masks(self._stop - size, self._stop) and not self.stopped():
            for first in range(self._stop - size, self._stop, sub):
                text.window = (max(first, text.prompt_length), first + sub)
                while text.masks(first, first + sub) and not self.stopped():
                    yield from self._step(first, first + sub)

    def stopped(self) -> bool:
        """Whether everything up to a stop id stands."""
        if not self._early:
            return False
        at = self._text.first_of(self._method.eos_token_ids, self._start)
        return at is not None and not self._text.masks(self._start, at)

    def _step(self, first: int, end: int) -> Generator[Forward, list[Predicted], None]:
        text, method = self._text, self._method
        begin = self._stop - method.block_size
        masks = text.masks(first, end)
        # The row in front predicts a place; the first place of a block has none and is its own.
        sources = [max(place - 1, begin) for place in masks]
        if not self._cached or text.ids[first] == text.mask:
            # Published: the mask of a denoise forward has the trained size whatever the block's is.
            rows = text.blocks(begin, self._stop, method.trained_size, sources, masks)
            forward = Forward("block", rows)
            self._cached = method.block_cache
        else:
            forward = Forward("sub", [text.row(first, end, self._stop, sources, masks)])
        predicted = [pair for row in (yield forward) for pair in row]
        threshold = fp32(method.threshold)
        highest = max(range(len(masks)), key=lambda index: predicted[index][1])
        chosen = [index for index in range(len(masks)) if predicted[index][1] > threshold or index == highest]
        written = [predicted[index] for index in chosen]
        if all(token == text.mask for token, _ in written):
            raise _stalled(text)
        text.write([masks[index] for index in chosen], written)
        self.done |= any(token in method.eos_token_ids for token, _ in written)


def _prefill(text: BlockText, whole: int, size: int, predict: list[int] = ()) -> Forward | None:
    """The forward of the prompt's whole blocks; None if there are none, or all were found."""
    if not whole:
        return None
    # A prediction needs the last block itself.
    text.find_prefix(whole - size if predict else whole)
    text.make_room(whole)
    if text.stored == whole:
        return None
    # What is predicted stands right behind.
    return Forward("prefill", text.blocks(text.stored, whole, size, predict, [at + 1 for at in predict]))


def _bonus(text: BlockText, whole: int) -> list[int]:
    """The row of a prompt of whole blocks that predicts the text's first token; none of other prompts."""
    return [whole - 1] if 0 < whole == text.prompt_length else []


def _cut(text: BlockText, method: BlockMethod) -> str:
    """Ends the text behind its first stop id, if it holds one."""
    at = text.first_of(method.eos_token_ids, text.prompt_length)
    if at is None:
        return "length"
    del text.ids[at + 1 :]
    return "eos"


def _stalled(text: BlockText) -> RuntimeError:
    return RuntimeError(
        f"model: expected predictions other than MASK (id {text.mask}), got MASK where a token had to be "
        "written: the published rule has no end then"
    )


def blockbatch(text: BlockText, method: BlockMethod) -> Program:
    """BlockBatch on either family; see `block_branches.py`. The last block of a text is not stored."""
    size, shifted = method.block_size, method.family == "fast_dllm_v2"
    branches = text.branches = BlockBranches(method.block_sizes, method.rules)
    first, last = text.prompt_length // size, method.positions(text.prompt_length) // size
    waiting = _prefill(text, first * size, size, _bonus(text, first * size) if shifted else [])
    for block in range(first, last):
        start, stop = block * size, (block + 1) * size
        if waiting is not None and shifted:
            *_, predicted = yield waiting
            text.stored, waiting = start, None
            if len(text.ids) == start:
                text.write([start], predicted)
                if text.ids[start] in method.eos_token_ids:
                    return "eos"
        if not text.make_room(stop):
            break
        text.ids += [text.mask] * (stop - len(text.ids))
        branches.open(start, text.ids[start:stop], max(text.prompt_length - start, 0))
        while (winner := branches.winner()) is None:
            states, readers = _distinct(branches)
            rows = []
            for pages, tokens in zip(text.scratch(start, len(states)), states):
                text.ids[start:stop] = tokens
                masks = text.masks(start, stop)
                sources = [max(place - 1, start) if shifted else place for place in masks]
                rows.append(text.row(start, stop, stop, sources, masks)._replace(pages=pages))
            text.ids[start:stop] = branches.agreed()
            before = [] if waiting is None else waiting.rows
            kind = "fused" if before else "block" if shifted else "denoise"
            places = tuple(len(before) + reader for reader in readers)
            predicted = (yield Forward(kind, [*before, *rows], places))[len(before) :]
            if before:
                text.stored, waiting = start, None
            seen = [
                dict(zip((o for o, token in enumerate(tokens) if token == text.mask), pairs, strict=True))
                for tokens, pairs in zip(states, predicted, strict=True)
            ]
            changes = branches.after_forward([seen[reader] for reader in readers])
            if all(branch.tokens == states[reader] for branch, reader in zip(branches.all, readers)):
                raise _stalled(text)
            text.note(changes)
            text.ids[start:stop] = branches.agreed()
        text.winner = winner
        text.note(branches.take_over(winner))
        text.ids[start:stop] = branches.all[winner].tokens
        if branches.finished is not None:
            return "eos"
        # With shifted logits the stored block predicts the next one's first token.
        bonus = ([stop - 1], [stop]) if shifted else ([], [])
        waiting = Forward("store", [text.row(start, stop, stop, *bonus)])
    return "length"


def _distinct(branches: BlockBranches) -> tuple[list[list[int]], list[int]]:
    """The different ids that branches hold, computed once each, and for each branch which of them it has."""
    states: list[list[int]] = []
    readers = []
    for branch in branches.all:
        if branch.tokens not in states:
            states.append(list(branch.tokens))
        readers.append(states.index(branch.tokens))
    return states, readers


PROGRAMS: dict[str, Callable[[BlockText, BlockMethod], Program]] = {
    "sdar": sdar,
    "fast_dllm_v2": fast_dllm_v2,
    "blockbatch": blockbatch,
}
