"""The tables of `blockbatch compare`, as lines of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockbatch.config import DecodeConfig
from blockbatch.methods import PRESET_TABLE

if TYPE_CHECKING:
    from blockbatch.result import Result

_COLUMNS = (("right", 7), ("NFE", 7), ("seconds", 8), ("tokens/s", 9))
_FACTORS = (("speed", 10), ("NFE", 6))
# What the other rows are compared with, where it was run.
_REFERENCES = ("vanilla", "vanilla +eos")
_NOTES = (
    "right     answers that pass their check",
    "NFE       forwards of the model for one answer, mean",
    "seconds   for one answer, mean",
    "tokens/s  tokens before the end of the text; filling behind it does not count",
)
_VANILLA_NOTE = "vanilla   a token a forward; the others write all that the model is sure of"
_FACTOR_NOTE = "vs        times as fast (speed), times fewer forwards (NFE)"


@dataclass
class Row:
    """One method with one way to end, and what it made of every problem."""

    label: str
    config: DecodeConfig
    results: list[Result] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)

    @property
    def nfe(self) -> float:
        """Mean forwards for an answer."""
        return sum(result.nfe.total for result in self.results) / len(self.results)

    @property
    def adopted(self) -> float:
        """Mean forwards that were taken over from drafts."""
        return sum(result.adopted for result in self.results) / len(self.results)

    @property
    def seconds(self) -> float:
        """Mean seconds for an answer."""
        return sum(result.seconds for result in self.results) / len(self.results)

    @property
    def tokens_per_second(self) -> float:
        """Tokens before the end of the texts; what a method fills in behind it does not count."""
        tokens = sum(len(result.tokens) for result in self.results)
        return tokens / sum(result.seconds for result in self.results)


def comparison_table(rows: Sequence[Row]) -> list[str]:
    """One line for each row, grouped by how decoding ends, and what the columns mean."""
    # Counts of three digits on both sides fill their column.
    labels = max(len(row.label) for row in rows) + max(len(right_cell(row.right)) > 6 for row in rows)
    references = [row for name in _REFERENCES for row in rows if row.label == name]
    heading = " " * (labels + sum(width for _, width in _COLUMNS))
    heading += "".join(f"vs {row.label}".rjust(sum(width for _, width in _FACTORS)) for row in references)
    titles = [*_COLUMNS, *(_FACTORS * len(references))]
    header = "method".ljust(labels) + "".join(title.rjust(width) for title, width in titles)
    lines = [*([heading] if references else []), header]
    previous = None
    for row in rows:
        # Block-causal models have no other end than that of the text.
        end = row.config.eos_exit or "prefix"
        if end != previous:
            lines.append(_group_title(row).ljust(len(header), "-"))
            previous = end
        lines.append(_line(row, labels, references))
    notes = [*_NOTES, _FACTOR_NOTE] if references else list(_NOTES)
    if any(row.label == "vanilla" for row in rows):
        notes.append(_VANILLA_NOTE)
    notes += [
        f"{row.label:<10}{PRESET_TABLE[row.label].summary}" for row in rows if row.label in PRESET_TABLE
    ]
    return [*lines, "-" * len(header), *notes]


def _group_title(row: Row) -> str:
    if row.config.eos_exit == "none":
        return f"-- as published: all {row.config.gen_length} positions are filled "
    return "-- decoding ends with the text "


def family_table(rows: Sequence[Row], families: Sequence[str]) -> list[str]:
    """The right answers of each family; `families` names that of every problem."""
    names = list(dict.fromkeys(families))
    labels = max(len(row.label) for row in rows)
    widths = [max(len(name), 7) + 3 for name in names]
    header = "right".ljust(labels) + "".join(
        name.rjust(width) for name, width in zip(names, widths, strict=True)
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        cells = (
            right_cell([right for right, family in zip(row.right, families, strict=True) if family == name])
            for name in names
        )
        line = row.label.ljust(labels) + "".join(
            cell.rjust(width) for cell, width in zip(cells, widths, strict=True)
        )
        lines.append(line)
    return lines


def right_cell(right: Sequence[bool | None]) -> str:
    """k/n over the problems whose answer is known; "-" if there is none."""
    judged = [value for value in right if value is not None]
    return f"{sum(judged)}/{len(judged)}" if judged else "-"


def _line(row: Row, labels: int, references: Sequence[Row]) -> str:
    values = [right_cell(row.right), f"{row.nfe:.1f}", f"{row.seconds:.2f}", f"{row.tokens_per_second:.1f}"]
    for reference in references:
        values += [f"{reference.seconds / row.seconds:.1f}x", f"{reference.nfe / row.nfe:.1f}x"]
    columns = [*_COLUMNS, *(_FACTORS * len(references))]
    return row.label.ljust(labels) + "".join(
        value.rjust(width) for value, (_, width) in zip(values, columns, strict=True)
    )
