"""Triton's interpreter without its largest expense."""

from triton.runtime import interpreter


class _Kept:
    def restore(self):
        pass


def replace_language_once():
    """The interpreter replaces `triton.language` before every function that it calls, at several times the cost
    of running it, and puts it back behind every kernel. In a process that only interprets, once is enough."""
    replace, done = interpreter._patch_lang, set()

    def once(function):
        module = function.__module__
        if module not in done:
            done.add(module)
            replace(function)
        return _Kept()

    interpreter._patch_lang = once
