"""The engine: requests that join and leave at any forward decode as they do alone."""

import pytest

import blockbatch
from engine_mixes import random_mix
from plain_models import write_dream, write_llada


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    write_llada(folder, sharpness=3.0, seed=1)
    return blockbatch.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    write_dream(folder, sharpness=3.0, seed=1)
    return blockbatch.load_model(folder, device="cpu")


@pytest.mark.parametrize("seed", range(4))
def test_random_mixes_decode_as_alone(llada, seed):
    random_mix(llada, seed, 24)


@pytest.mark.parametrize("seed", range(4))
def test_random_mixes_on_dream_decode_as_alone(dream, seed):
    random_mix(dream, 100 + seed, 24, dream=True)
