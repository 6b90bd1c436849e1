"""Decodes of the code that BlockBatch's authors published for Dream, through the public interface."""

import pytest

import blockbatch
from blockbatch.generation import build_result, open_session
from oracle import dream_policy
from oracle.dream_decoder import DreamConfig
from test_dream_oracle import DATA, REASONS, RECORDS, settings_of


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model(DATA, device="cpu")


def test_there_are_53_records():
    assert len(RECORDS) == 53


class Events:
    """The events of a session as the records have them.

    A session does not say in which order merges happened, which is that of the windows between commit and
    merge: they are found from canvases that are kept up to date here.
    """

    def __init__(self, session, record):
        self.session, self.found = session, []
        prompt, params = record["prompt"], session.params
        config = DreamConfig(**settings_of(record))
        self.shadow = dream_policy.new_state(prompt, config, params.mask_token_id, params.eos_token_ids)

    def write(self, changed):
        """The tokens that a step wrote into canvases."""
        top_token = self.session.state.top_token.tolist()
        for row, position in changed.nonzero().tolist():
            tokens = self.shadow["branches"][row]["tokens"]
            tokens[self.shadow["prompt_length"] + position] = top_token[row][position]

    def add(self, step):
        rows = [row for row, source in enumerate(step.plan.source_row) if source >= 0]
        of_phase = {"init": [], "refresh": [rows], "block": [[[row, *step.windows[row]] for row in rows]]}
        self.found.append([step.phase, *of_phase[step.phase]])
        self.write(step.events.committed)
        branches = self.shadow["branches"]
        for branch in branches:
            dream_policy.realign(self.shadow, branch)
        merged = step.events.merged.sum(-1).tolist()
        order = [row for row, number in enumerate(merged) if number]
        order.sort(key=lambda row: -branches[row]["window"][1])
        self.found += [["merge", row, merged[row]] for row in order]
        self.write(step.events.merged)
        for row, leader in enumerate(step.events.sync_source.tolist()):
            if leader != row:
                self.found.append(["sync", row, leader])
                branches[row]["tokens"] = list(branches[leader]["tokens"])
        canvases = [branch["tokens"][self.shadow["prompt_length"] :] for branch in branches]
        assert self.session.state.tokens.tolist() == canvases


def check(model, record, **options):
    config = blockbatch.DecodeConfig(
        policy="dream_published", **settings_of(record), **{"trace": True, **options}
    )
    session = open_session(model, record["prompt"], config)
    events = Events(session, record)
    while (step := session.step()) is not None:
        events.add(step)
    result = build_result(model, session, 0)
    assert events.found == record["events"]
    assert result.canvas == record["canvas"]
    assert list(result.nfe.__dict__.values()) == [record[f"nfe_{phase}"] for phase in result.nfe.__dict__]
    assert result.block_size == record["winner_block_size"]
    assert result.stop_reason == REASONS[record["exit_reason"]]
    for name in ("merged", "synced"):
        assert {str(branch.block_size): getattr(branch, name) for branch in result.branches} == record[name]
    assert sum(branch.committed for branch in result.branches) == record["committed"]
    output, (eos,) = record["output"], model.eos_token_ids
    end = output.index(eos) if eos in output else len(output)
    assert result.tokens == output[:end]
    if record["exit_reason"] == "eos_ready":
        assert result.canvas[: len(output)] == output and end == len(output) - 1


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_record(model, record):
    check(model, record)
