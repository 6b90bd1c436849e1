"""Gaps inside a text, filled by several methods with the built-in model.

python examples/fill.py
"""

from __future__ import annotations

import blockbatch

TASK = (
    "Implement sum_steps(n) in Python. "
    "It adds up i modulo 9 for every i divisible by 8 from 1 to n and returns that total."
)
# What stands behind a gap counts as much as what stands before: it says that the variable is i. A gap begins
# where a token does: in front of the blank that belongs to a word.
CODE = """\
def sum_steps(n):
    total = 0
    for{2} range(1, n + 1):
        if{7}:
            total += i{3}
    return total"""


def main() -> None:
    model = blockbatch.load_model("tiny")
    for config in (
        blockbatch.DecodeConfig("vanilla"),
        blockbatch.DecodeConfig("dual_cache"),
        blockbatch.DecodeConfig.preset("fast"),
    ):
        result = blockbatch.fill(model, TASK + CODE, config)
        print(f"{config.method}: {result.nfe.total} forwards, {[gap.text for gap in result.gaps]}")
    print(result.text.removeprefix(TASK))


if __name__ == "__main__":
    main()
