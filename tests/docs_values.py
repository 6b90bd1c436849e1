"""Values out of the files of bench/results, for the figures of the docs."""


def named(rows, key, value):
    return next(row for row in rows if row[key] == value)


def lines(report, **wanted):
    """The only line of a report with these values."""
    (found,) = (
        line for line in report["lines"] if all(line.get(name) == value for name, value in wanted.items())
    )
    return found


def clock(setting):
    """Milliseconds in each section, right answers in % and forwards of a setting."""

    def values(report):
        answers = named(report["answers"], "setting", setting)
        times = [clock_ms(report, setting, index) for index in range(len(report["sections"]))]
        return [*times, 100 * answers["right"] / answers["problems"], answers["nfe"]["total"]]

    return values


def clock_ms(report, setting, section=0):
    return named(report["sections"][section]["settings"], "setting", setting)["decode_ms"]


def memory(report):
    return report["models"]["llada-8b"]["memory"]


def parameters(width, layers, kv_width, hidden, vocabulary):
    """Of a transformer as LLaDA and Dream are, without norms and biases."""
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * hidden
    return layers * layer + 2 * vocabulary * width


LLADA_PARAMETERS = parameters(4096, 32, 4096, 12288, 126464)
DREAM_PARAMETERS = parameters(3584, 28, 512, 18944, 152064)
