import pytest
import torch
from hypothesis import settings

# The same examples on every run, and no limit on an example's time: a slow machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


# Matrices as small as the tests' only lose by threads, which on a busy machine mostly wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
