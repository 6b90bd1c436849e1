"""The inner side of `sandbox`, run as a script of the standard library alone: see `__main__`."""
