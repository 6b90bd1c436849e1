"""What an evaluation found, in numbers: summaries, comparisons, and what stopping early gives by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockbatch.config import METHODS
from blockbatch.evaluation import statistics
from blockbatch.evaluation.records import Record, Run
from blockbatch.evaluation.settings import EOS_SUFFIX, REFERENCES
from blockbatch.evaluation.statistics import Comparison, Summary

_REFERENCE_LABELS = (*REFERENCES, *(method + EOS_SUFFIX for method in REFERENCES))


@dataclass(frozen=True)
class Exit:
    """What stopping at the end of the text changes for one method.

    Attributes:
        method: its name.
        comparison: with the exit against without it.
        same_text: problems on which both give the same text.
    """

    method: str
    comparison: Comparison
    same_text: int


@dataclass(frozen=True)
class Report:
    """An evaluation in numbers.

    Attributes:
        header: of its file.
        problems: how many of each task.
        overall: a summary of each setting.
        by_task: the same for each task.
        factors: each setting against each reference that was run, on the problems that both decoded.
        verdicts: the comparisons that are put in words.
        exits: what the exit alone gives, for each method that was run both ways.
    """

    header: dict[str, Any]
    problems: dict[str, int]
    overall: dict[str, Summary]
    by_task: dict[str, dict[str, Summary]]
    factors: list[Comparison]
    verdicts: list[Comparison]
    exits: list[Exit]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def build_report(run: Run, *, seed: int = 0) -> Report:
    """All numbers of a run; `seed` draws the resamples.

    Raises:
        ValueError: the run has no record.
    """
    records = run.records
    if not records:
        raise ValueError("run: expected at least one record, got none")
    overall = statistics.summarize(records, seed=seed)
    labels = list(overall)
    tasks = list(dict.fromkeys(record.task for record in records))
    references = [label for label in _REFERENCE_LABELS if label in overall]
    against = [(label, reference) for reference in references for label in labels if label != reference]
    verdicts = _pairs(labels)
    compared = {
        pair: comparison
        for pair in dict.fromkeys([*against, *verdicts])
        if (comparison := statistics.compare(records, *pair, seed=seed)) is not None
    }
    return Report(
        header=run.header,
        problems=dict(
            Counter(task for task, _ in {(record.task, record.problem): None for record in records})
        ),
        overall=overall,
        by_task={
            task: statistics.summarize([record for record in records if record.task == task], seed=seed)
            for task in tasks
        },
        factors=[compared[pair] for pair in against if pair in compared],
        verdicts=[compared[pair] for pair in verdicts if pair in compared],
        exits=list(_exits(records, labels, seed)),
    )


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared in words.

    BlockBatch against every method that stops with the text and the published references; settings of one's
    own against BlockBatch and the references that stop with the text; baselines against one token per step.
    """
    rows = {label for method in METHODS for label in (method, method + EOS_SUFFIX)}
    fair = [label for label in labels if label in rows and label.endswith(EOS_SUFFIX)]
    published = [label for label in labels if label in REFERENCES]
    ours = [label for label in labels if label == "blockbatch"]
    own = [label for label in labels if label not in rows]
    pairs = [(label, other) for label in ours for other in (*fair, *published)]
    yardsticks = [*ours, *(label for label in fair if label in _REFERENCE_LABELS)]
    # Without any of them the first setting is the yardstick.
    yardsticks = yardsticks or fair or published or labels[:1]
    pairs += [(label, other) for label in own for other in yardsticks if label != other]
    one_token = "vanilla" + EOS_SUFFIX
    return pairs + [(label, one_token) for label in fair if one_token in fair and label != one_token]


def _exits(records: Sequence[Record], labels: Sequence[str], seed: int) -> Iterable[Exit]:
    for method in METHODS:
        stopped = method + EOS_SUFFIX
        if method not in labels or stopped not in labels:
            continue
        comparison = statistics.compare(records, stopped, method, seed=seed)
        if comparison is not None:
            texts = [
                {(r.task, r.problem): r.text for r in records if r.setting == label}
                for label in (stopped, method)
            ]
            same = sum(texts[0][key] == texts[1][key] for key in texts[0] if key in texts[1])
            yield Exit(method, comparison, same)
