"""Rows of bare calculations for the trainer: the arithmetic inside the problems, many times per row.

Drills are no problems: nothing is tested on them. They teach calculating in a fraction of the rows.
"""

from __future__ import annotations

import random

_REQUESTS = ("Compute {tasks}.", "Calculate {tasks}.", "Find {tasks}.", "Work out {tasks}.")


def _calculation(rng: random.Random) -> tuple[str, str]:
    """What is asked, and the line that answers it."""
    form = rng.choice(("+", "+", "+", "-", "-", "*", "/2", "mod", "by"))
    if form == "+":
        a, b = rng.randint(0, 150), rng.randint(0, 60)
        return f"{a}+{b}", f"{a}+{b}={a + b}"
    if form == "-":
        a = rng.randint(1, 200)
        b = rng.randint(0, min(a, rng.choice((20, 100))))
        return f"{a}-{b}", f"{a}-{b}={a - b}"
    if form == "*":
        a, b = rng.randint(2, 9), rng.randint(0, 66)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"{a}*{b}", f"{a}*{b}={a * b}"
    if form == "/2":
        a = 2 * rng.randint(1, 100)
        return f"{a}/2", f"{a}/2={a // 2}"
    if form == "mod":
        a, m = rng.randint(0, 120), rng.choice((5, 7, 10, 11, 13))
        return f"{a} mod {m}", f"{a} mod {m}={a % m}"
    b = rng.randint(1, 60)
    a = b * rng.randint(1, 5) + rng.randrange(b)
    return f"{a} by {b}", f"{a // b}*{b}={a // b * b}, {a}-{a // b * b}={a % b}"


def draw_drill(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer: several calculations in a row."""
    tasks, lines = zip(*(_calculation(rng) for _ in range(rng.randint(4, 8))))
    return rng.choice(_REQUESTS).format(tasks=", ".join(tasks)), "\n".join(lines)
