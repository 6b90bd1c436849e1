"""Triton's interpreter without its largest expense."""


class _Kept:
    def restore(self):
        pass


def replace_language_once():
    """For a process that only interprets.

    Triton replaces `triton.language` before every function that it interprets, at several times the cost of
    running it, and puts it back behind every kernel.
    """
    from triton.runtime import interpreter

    replace, done = interpreter._patch_lang, set()

    def once(function):
        module = function.__module__
        if module not in done:
            done.add(module)
            replace(function)
        return _Kept()

    interpreter._patch_lang = once
