"""Whole rows as ranks compute them, one rank after the other in one process."""

import dataclasses

import pytest

import blockbatch
import rank_cases
from blockbatch.decoding import dealt_rows, forward
from blockbatch.models.spec import ModelSpec
from blockbatch.parallel.share import WHOLE
from test_whole_rows import CASES


class Shard:
    """All heads belong to this rank."""

    def __init__(self, spec: ModelSpec, rank: int) -> None:
        self.rank, self._spec = rank, spec

    def kv_heads(self, rank: int) -> range:
        return range(self._spec.num_kv_heads)


class Parts:
    """An exchange of ranks that take turns: what each sent, layer by layer, is received by the last one."""

    def __init__(self, size: int) -> None:
        self._sent, self._size = [], size

    def of(self, rank: int) -> "Parts":
        self._sent.append([])
        assert len(self._sent) == rank + 1
        return self

    def send(self, parts, receive) -> None:
        self._sent[-1].append(parts[0].clone())
        if len(self._sent) == self._size:
            layer = len(self._sent[-1]) - 1
            receive([sent[layer] for sent in self._sent], slice(0, parts[0].shape[1]))

    def finish(self) -> None:
        pass


@dataclasses.dataclass
class Alone:
    """Stands for a `RankShare` of `size` ranks, as rank `shard.rank`."""

    whole: object
    size: int
    shard: Shard
    exchange: Parts


def predict_in_turns(share, batch, plan, each):
    """`dealt_rows._round` of every rank, one after the other, with the predictions of each one's own rows."""
    usual, found, parts = dealt_rows._of_all, [], Parts(share.size)
    dealt_rows._of_all = lambda share, dealt, own: own
    try:
        for rank in range(share.size):
            share.shard, share.exchange = Shard(share.whole.spec, rank), parts.of(rank)
            found.append(USUAL_ROUND(share, batch, plan, each))
    finally:
        dealt_rows._of_all = usual
    return found


USUAL_ROUND = dealt_rows._round


@pytest.fixture(
    params=[
        "cpu",
        *(pytest.param(backend, marks=pytest.mark.gpu) for backend in ("reference", "triton", "cuda")),
    ]
)
def model(request):
    if request.param == "cpu":
        return blockbatch.load_model("tiny", device="cpu")
    return blockbatch.load_model("tiny", device="cuda", dtype="float32", backend=request.param)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_of_ranks_in_turns_are_those_of_one(model, monkeypatch, size, case):
    prompt, options = CASES[case]
    config = blockbatch.DecodeConfig(**options)
    expected = rank_cases.outcomes(blockbatch.generate(model, prompt, config))
    rounds = []

    def noted(share, batch, plan, each):
        rounds.append(each)
        return predict_in_turns(share, batch, plan, each)

    def predict_dealt(_, batch, plan, max_tokens):
        share = Alone(model, size, Shard(model.spec, 0), Parts(size))
        return dealt_rows.predict_dealt(share, batch, plan, max_tokens)

    monkeypatch.setattr(dealt_rows, "_round", noted)
    monkeypatch.setattr(forward, "predict_dealt", predict_dealt)
    stand_in = type("Share", (), {"whole": model, "lanes": WHOLE.lanes, "size": 1, "num_lanes": 1})()
    monkeypatch.setattr(forward, "share_of", lambda model: stand_in)
    found = rank_cases.outcomes(blockbatch.generate(model, prompt, config))
    assert rounds or size > len(prompt)
    assert found == expected, len(rounds)
