"""Symbolic tasks in which every step needs the one before: traces, modular chains, Euclid, Collatz."""

from __future__ import annotations

import random

from blockbatch.tasks.built_in.drawn import DrawnProblem

FAMILY = "symbolic"

_TRACE_REQUESTS = (
    "Trace this program:\n{program}",
    "Run these lines step by step:\n{program}",
    "What are the values after each line?\n{program}",
    "Follow the program:\n{program}",
    "Compute every assignment:\n{program}",
)
_VARIABLES = ("a", "b", "c")


def _trace_line(rng: random.Random, target: str, values: dict[str, int]) -> tuple[str, str, int, str]:
    """One assignment to `target`: source text, the same with numbers, the value, the operation's shape."""
    while True:
        left = rng.choice(list(values))
        operation = rng.choice(("+k", "-k", "*k", "+v", "+v", "-v"))
        if operation[1] == "v":
            right = rng.choice(list(values))
            if right == left:
                continue
            k = values[right]
        else:
            k = rng.randint(2, 3) if operation == "*k" else rng.randint(1, 12)
            right = str(k)
        sign = operation[0]
        value = {"+": values[left] + k, "-": values[left] - k, "*": values[left] * k}[sign]
        if 0 <= value < 100:
            name = right if operation[1] == "v" else "k"
            return f"{left}{sign}{right}", f"{values[left]}{sign}{k}", value, f"{target}={left}{sign}{name}"


def draw_trace(rng: random.Random) -> DrawnProblem:
    values = {"a": rng.randint(1, 20)}
    source, lines, structure = [f"a={values['a']}"], [f"a={values['a']}"], ["a"]
    for _ in range(rng.randint(3, 6)):
        target = rng.choice(_VARIABLES[: len(values) + 1])
        text, numbers, value, shape = _trace_line(rng, target, values)
        values[target] = value
        source.append(f"{target}={text}")
        lines.append(f"{target}={numbers}={value}")
        structure.append(shape)
    lines.append("end " + " ".join(f"{name}={values[name]}" for name in sorted(values)))
    request = rng.randrange(len(_TRACE_REQUESTS))
    prompt = _TRACE_REQUESTS[request].format(program="\n".join(source))
    return DrawnProblem(
        FAMILY, "trace", prompt, "\n".join(lines), f"{request} {' '.join(structure)}", {"lines": lines}
    )


_MODULAR_REQUESTS = (
    "Start with x={x}. Replace x by {a}*x+{b} mod {m}, {k} times.",
    "x is {x}. Apply x -> {a}*x+{b} mod {m} {k} times.",
    "Begin at x={x} and repeat {k} times: x={a}*x+{b} mod {m}.",
    "Let x={x}. Iterate x={a}*x+{b} mod {m} for {k} steps.",
)


def draw_modular(rng: random.Random) -> DrawnProblem:
    a, b, m, k = rng.randint(2, 9), rng.randint(1, 9), rng.choice((5, 7, 10, 11, 13)), rng.randint(3, 6)
    start = x = rng.randrange(m)
    lines = []
    for step in range(1, k + 1):
        total = a * x + b
        lines.append(f"{step}: {a}*{x}+{b}={a * x}+{b}={total} mod {m}={total % m}")
        x = total % m
    lines.append(f"x={x}")
    request = rng.randrange(len(_MODULAR_REQUESTS))
    prompt = _MODULAR_REQUESTS[request].format(x=start, a=a, b=b, m=m, k=k)
    return DrawnProblem(
        FAMILY, "modular", prompt, "\n".join(lines), f"{request} {a} {b} {m} {k}", {"lines": lines}
    )


_EUCLID_REQUESTS = (
    "Find the gcd of {a} and {b} by Euclid.",
    "Use Euclid on {a} and {b}.",
    "Compute gcd({a}, {b}) step by step.",
    "What is the greatest common divisor of {a} and {b}?",
    "Run the Euclidean algorithm with {a} and {b}.",
    "Greatest common divisor of {a} and {b}, with steps.",
    "Divide with remainder until zero: {a} and {b}.",
    "For {a} and {b} find the gcd with all steps.",
)


def draw_euclid(rng: random.Random) -> DrawnProblem:
    while True:
        quotients = [rng.randint(1, 5) for _ in range(rng.randint(3, 4))]
        quotients[-1] = max(quotients[-1], 2)
        gcd = rng.randint(1, 9)
        low, high = 0, gcd
        for quotient in reversed(quotients):
            low, high = high, quotient * high + low
        if high < 120:
            break
    a, b = high, low
    lines = []
    while low:
        product = (high // low) * low
        lines.append(f"{high // low}*{low}={product}, {high}-{product}={high % low}")
        high, low = low, high % low
    lines.append(f"gcd={high}")
    request = rng.randrange(len(_EUCLID_REQUESTS))
    prompt = _EUCLID_REQUESTS[request].format(a=a, b=b)
    shape = f"{request} {' '.join(map(str, quotients))}"
    return DrawnProblem(FAMILY, "euclid", prompt, "\n".join(lines), shape, {"lines": lines})


_COLLATZ_REQUESTS = (
    "Start at {n}. If even halve it, if odd use {rule}. Do {k} steps.",
    "Collatz from {n} with {rule} for odd numbers, {k} steps.",
    "Take {n}. For {k} steps: even numbers are halved, odd ones become {rule}.",
    "Do {k} Collatz steps from {n}, odd rule {rule}.",
    "From {n} go {k} steps: n/2 when even, {rule} when odd.",
    "Let n={n}. Use n/2 for even n and {rule} for odd n, {k} times.",
    "Begin with {n}. Repeat {k} times: halve if even, else {rule}.",
    "Walk {k} steps from {n}: even n/2, odd {rule}.",
)


def draw_collatz(rng: random.Random) -> DrawnProblem:
    while True:
        start = n = rng.randint(2, 99)
        b, k = rng.choice((1, 3, 5, 7)), rng.randint(5, 9)
        lines, shape = [], ""
        for step in range(1, k + 1):
            after = n // 2 if n % 2 == 0 else 3 * n + b
            text = f"{n}/2={after}" if n % 2 == 0 else f"3*{n}+{b}={3 * n}+{b}={after}"
            lines.append(f"{step}: {text}")
            shape += "e" if n % 2 == 0 else "o"
            n = after
            if n > 250:
                break
        else:
            break
    lines.append(f"n={n}")
    request = rng.randrange(len(_COLLATZ_REQUESTS))
    prompt = _COLLATZ_REQUESTS[request].format(n=start, rule=f"3*n+{b}", k=k)
    return DrawnProblem(
        FAMILY, "collatz", prompt, "\n".join(lines), f"{request} {b} {shape}", {"lines": lines}
    )


def check_lines(problem: DrawnProblem, text: str) -> bool:
    """True if every line is the expected one, white space aside: the steps are the answer."""
    lines = ["".join(line.split()) for line in text.strip().split("\n")]
    return lines == ["".join(line.split()) for line in problem.payload["lines"]]
