"""Word problems with worked steps; the answer ends with a line `#### n`."""

from __future__ import annotations

import random
import re

from blockbatch.tasks.built_in.drawn import DrawnProblem
from blockbatch.tasks.built_in.words import ITEMS, NAMES

FAMILY = "arithmetic"
KINDS = ("running", "shopping", "compare")
_LARGEST = 120

_OPENINGS = (
    "{name} has {n} {item}.",
    "{name} starts with {n} {item}.",
    "At first {name} has {n} {item}.",
    "In the morning {name} has {n} {item}.",
    "{name} owns {n} {item}.",
)
# verb in the answer, phrase in the story
_GAINS = (
    ("buys", "buys {k} more {item}"),
    ("finds", "finds {k} {item}"),
    ("gets", "gets {k} {item} from {other}"),
    ("wins", "wins {k} {item}"),
    ("takes", "takes {k} {item} from a shelf"),
)
_LOSSES = (
    ("gives", "gives {k} {item} to {other}"),
    ("loses", "loses {k} {item}"),
    ("sells", "sells {k} {item}"),
    ("uses", "uses {k} {item}"),
    ("drops", "drops {k} {item}"),
)
_FACTORS = (("doubles", "doubles the number of {item}", 2), ("triples", "triples the number of {item}", 3))
_HALF = ("halves", "gives away half of the {item}")
_LINKS = ("", "Then ", "Next ", "Later ", "After that ")
_RUNNING_QUESTIONS = (
    "How many {item} does {name} have now?",
    "How many {item} does {name} have at the end?",
    "How many {item} are left?",
    "Find the final number of {item}.",
)


def _running(rng: random.Random) -> DrawnProblem:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    value = rng.randint(6, 30)
    opening, question = rng.randrange(len(_OPENINGS)), rng.randrange(len(_RUNNING_QUESTIONS))
    story = [_OPENINGS[opening].format(name=name, n=value, item=item)]
    lines = [f"{name} starts with {value} {item}."]
    structure = []
    for _ in range(rng.randint(2, 4)):
        choices = ["gain"] * 3
        choices += ["loss"] * 3 if value > 4 else []
        choices += ["factor"] if value * 3 <= _LARGEST else []
        choices += ["half"] if value % 2 == 0 and value > 4 else []
        operation = rng.choice(choices)
        if operation == "half":
            verb, phrase = _HALF
            step, after, k = f"{value}/2", value // 2, 2
        elif operation == "factor":
            verb, phrase, k = rng.choice(_FACTORS)
            step, after = f"{value}*{k}", value * k
        elif operation == "loss":
            verb, phrase = rng.choice(_LOSSES)
            k = rng.randint(2, min(value - 1, 20))
            step, after = f"{value}-{k}", value - k
        else:
            verb, phrase = rng.choice(_GAINS)
            k = rng.randint(2, 20)
            step, after = f"{value}+{k}", value + k
        text = phrase.format(k=k, item=item, other=other)
        story.append(f"{rng.choice(_LINKS)}{name} {text}.")
        lines.append(f"{name} {verb}: {step}={after}")
        structure.append(verb)
        value = after
    story.append(_RUNNING_QUESTIONS[question].format(name=name, item=item))
    lines.append(f"#### {value}")
    shape = f"{opening} {' '.join(structure)} {question}"
    return DrawnProblem(FAMILY, "running", " ".join(story), "\n".join(lines), shape, {"result": value})


_PRICES = (
    "{n} {item} at {p} dollars each",
    "{n} {item} for {p} dollars each",
    "{n} {item} that cost {p} dollars each",
    "{n} {item} with a price of {p} dollars",
)
_SHOP_OPENINGS = ("{name} buys", "{name} orders", "At the market {name} buys", "In a shop {name} picks")
_COUPONS = (
    "A coupon takes {d} dollars off.",
    "The shop gives {d} dollars off.",
    "{name} uses a coupon of {d} dollars.",
)
_PAYMENTS = ("{name} pays with {b} dollars.", "{name} hands over {b} dollars.", "{name} has {b} dollars.")
_TOTAL_QUESTIONS = ("How much does {name} pay?", "What is the total cost?", "Find the cost in dollars.")
_CHANGE_QUESTIONS = (
    "How much money is left?",
    "How much change does {name} get?",
    "Find the change in dollars.",
)


def _shopping(rng: random.Random) -> DrawnProblem:
    name = rng.choice(NAMES)
    items = rng.sample(ITEMS, rng.randint(2, 3))
    opening = rng.randrange(len(_SHOP_OPENINGS))
    structure = [str(opening)]
    parts, lines, costs = [], [], []
    for item in items:
        form = rng.randrange(len(_PRICES))
        n, p = rng.randint(2, 9), rng.randint(2, 9)
        parts.append(_PRICES[form].format(n=n, item=item, p=p))
        lines.append(f"{item}: {n}*{p}={n * p}")
        costs.append(n * p)
        structure.append(str(form))
    story = [f"{_SHOP_OPENINGS[opening].format(name=name)} {', '.join(parts[:-1])} and {parts[-1]}."]
    total = costs[0]
    for cost in costs[1:]:
        lines.append(f"total: {total}+{cost}={total + cost}")
        total += cost
    if rng.random() < 0.5:
        form = rng.randrange(len(_COUPONS))
        d = rng.randint(2, min(20, total - 1))
        story.append(_COUPONS[form].format(name=name, d=d))
        lines.append(f"coupon: {total}-{d}={total - d}")
        total -= d
        structure.append(f"coupon{form}")
    if rng.random() < 0.5:
        form = rng.randrange(len(_PAYMENTS))
        paid = rng.choice([b for b in (50, 100, 150, 200, 250, 300) if b > total])
        story.append(_PAYMENTS[form].format(name=name, b=paid))
        lines.append(f"left: {paid}-{total}={paid - total}")
        total = paid - total
        structure.append(f"pay{form}")
        questions = _CHANGE_QUESTIONS
    else:
        questions = _TOTAL_QUESTIONS
    question = rng.randrange(len(questions))
    structure.append(f"question{question}")
    story.append(questions[question].format(name=name))
    lines.append(f"#### {total}")
    return DrawnProblem(
        FAMILY, "shopping", " ".join(story), "\n".join(lines), " ".join(structure), {"result": total}
    )


_MORE = ("{name} has {k} more than {base}.", "{name} has {k} {item} more than {base}.")
_FEWER = ("{name} has {k} fewer than {base}.", "{name} has {k} {item} fewer than {base}.")
_TIMES = ("{name} has {k} times as many as {base}.", "{name} has {k} times as many {item} as {base}.")
_ALL_QUESTIONS = (
    "How many {item} do they have in all?",
    "How many {item} are there together?",
    "Find the sum.",
)
_ONE_QUESTIONS = ("How many {item} does {name} have?", "Find the number of {item} that {name} has.")


def _compare(rng: random.Random) -> DrawnProblem:
    ask_all = rng.random() < 0.6
    names = rng.sample(NAMES, 3 if ask_all and rng.random() < 0.6 else 4)
    item = rng.choice(ITEMS)
    values = [rng.randint(3, 30)]
    opening = rng.randrange(len(_OPENINGS))
    story = [_OPENINGS[opening].format(name=names[0], n=values[0], item=item)]
    lines = [f"{names[0]}: {values[0]}"]
    structure = [str(opening)]
    for index in range(1, len(names)):
        base = rng.randrange(index)
        value = values[base]
        relations = ["more", "more"]
        relations += ["fewer", "fewer"] if value > 3 else []
        relations += ["times"] if value <= 20 else []
        relation = rng.choice(relations)
        if relation == "more":
            forms, k = _MORE, rng.randint(2, 20)
            step, after = f"{value}+{k}", value + k
        elif relation == "fewer":
            forms, k = _FEWER, rng.randint(2, min(20, value - 1))
            step, after = f"{value}-{k}", value - k
        else:
            forms, k = _TIMES, rng.randint(2, 4)
            step, after = f"{value}*{k}", value * k
        form = rng.randrange(2)
        story.append(forms[form].format(name=names[index], base=names[base], k=k, item=item))
        lines.append(f"{names[index]}: {step}={after}")
        structure.append(f"{relation}{form}{base}")
        values.append(after)
    if ask_all:
        question = rng.randrange(len(_ALL_QUESTIONS))
        story.append(_ALL_QUESTIONS[question].format(item=item))
        result = values[0]
        for value in values[1:]:
            lines.append(f"sum: {result}+{value}={result + value}")
            result += value
        structure.append(f"all{question}")
    else:
        question = rng.randrange(len(_ONE_QUESTIONS))
        story.append(_ONE_QUESTIONS[question].format(item=item, name=names[-1]))
        result = values[-1]
        structure.append(f"one{question}")
    lines.append(f"#### {result}")
    return DrawnProblem(
        FAMILY, "compare", " ".join(story), "\n".join(lines), " ".join(structure), {"result": result}
    )


_DRAW = {"running": _running, "shopping": _shopping, "compare": _compare}


def draw(rng: random.Random) -> DrawnProblem:
    """One random problem of a random kind."""
    return _DRAW[rng.choice(KINDS)](rng)


def check(problem: DrawnProblem, text: str) -> bool:
    """True if the last `#### n` line of `text` gives the right number; the steps are not judged."""
    found = re.findall(r"^#### (-?\d+)[ \t]*$", text, flags=re.MULTILINE)
    return bool(found) and int(found[-1]) == problem.payload["result"]
