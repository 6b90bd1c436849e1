"""DecodeConfig: defaults by method, and every option refused with a message that says what was expected."""

import dataclasses
import re

import pytest

from blockbatch import METHODS, DecodeConfig
from blockbatch.config import METHOD_OPTIONS
from blockbatch.decoding import METHOD_BUILDERS
from blockbatch.methods import METHOD_TABLE, OPTIONS
from blockbatch.sampling_options import SAMPLING_NAMES


def test_defaults_are_the_papers():
    config = DecodeConfig()
    assert (config.method, config.gen_length, config.block_sizes) == (
        "blockbatch",
        256,
        (4, 8, 16, 32, 64, 128),
    )
    assert (config.threshold, config.merge_threshold, config.sync_threshold) == (0.9, 0.5, 8)
    assert (config.refresh_interval, config.eos_exit, config.commit) == (32, "prefix", "threshold")
    for method in METHODS[1:]:
        config = DecodeConfig(method=method)
        assert (config.block_size, config.block_sizes, config.eos_exit) == (32, None, "none")
    assert DecodeConfig(method="vanilla").steps == 256
    assert DecodeConfig(method="vanilla").threshold is None


def test_the_tables_of_methods_and_options_are_whole():
    fields = [field.name for field in dataclasses.fields(DecodeConfig)]
    assert sorted(option.name for option in OPTIONS) == sorted(set(fields) - {"trace", "trace_kv"})
    common = {"method", "gen_length", "eos_token_ids", "stop", *SAMPLING_NAMES}
    assert {name for options in METHOD_OPTIONS.values() for name in options} == set(fields[:-2]) - common
    assert METHODS == tuple(METHOD_TABLE) == tuple(METHOD_BUILDERS)
    for name, row in METHOD_TABLE.items():
        assert METHOD_BUILDERS[name].__module__ == row.module
        assert set(row.published) <= set(row.options)
        assert "arXiv" in row.summary and "\n" not in row.summary


def test_default_block_sizes_are_those_that_divide():
    assert DecodeConfig(gen_length=32).block_sizes == (4, 8, 16, 32)
    assert DecodeConfig(gen_length=7).block_sizes == (7,)


def test_block_sizes_are_sorted():
    assert DecodeConfig(gen_length=64, block_sizes=[32, 4]).block_sizes == (4, 32)


def test_replace_keeps_options_that_do_not_apply_as_none():
    config = dataclasses.replace(DecodeConfig(method="dual_cache"), gen_length=64, steps=64)
    assert (config.gen_length, config.block_size, config.block_sizes) == (64, 32, None)


BAD = [
    ({"method": "fast"}, ValueError, "method: expected one of blockbatch, vanilla,"),
    ({"gen_length": 0}, ValueError, "gen_length: expected at least 1, got 0"),
    ({"gen_length": 2.0}, TypeError, "gen_length: expected an integer, got 2.0"),
    (
        {"gen_length": 64, "block_sizes": (4, 24)},
        ValueError,
        "block_sizes: expected divisors of gen_length = 64, got 24",
    ),
    ({"block_sizes": (0, 4)}, ValueError, "block_sizes: expected at least 1, got 0"),
    ({"block_sizes": (-4,)}, ValueError, "block_sizes: expected at least 1, got -4"),
    ({"block_sizes": (4, 4)}, ValueError, "block_sizes: expected different sizes, got (4, 4)"),
    ({"block_sizes": ()}, ValueError, "block_sizes: expected at least one size, got none"),
    ({"block_sizes": 4}, TypeError, "block_sizes: expected a sequence of integers, got 4"),
    ({"block_sizes": "48"}, TypeError, "block_sizes: expected a sequence of integers, got '48'"),
    ({"block_sizes": (4, True)}, TypeError, "block_sizes: expected an integer, got True"),
    ({"block_sizes": None}, TypeError, "block_sizes: expected a sequence of integers, got None"),
    ({"threshold": 0.0}, ValueError, "threshold: expected a value above 0 and at most 1, got 0.0"),
    ({"threshold": 1.01}, ValueError, "threshold: expected a value above 0 and at most 1, got 1.01"),
    ({"threshold": float("nan")}, ValueError, "threshold: expected a value above 0 and at most 1, got nan"),
    ({"threshold": "0.9"}, TypeError, "threshold: expected a number, got '0.9'"),
    ({"threshold": None}, TypeError, "threshold: expected a number, got None"),
    ({"merge_threshold": 0.49}, ValueError, "merge_threshold: expected a value from 0.5 to 1, got 0.49"),
    ({"merge_threshold": 1.1}, ValueError, "merge_threshold: expected a value from 0.5 to 1, got 1.1"),
    ({"sync_threshold": -1}, ValueError, "sync_threshold: expected at least 0, got -1"),
    ({"refresh_interval": 0}, ValueError, "refresh_interval: expected at least 1, got 0"),
    ({"eos_exit": "soon"}, ValueError, "eos_exit: expected one of prefix, window, none, got 'soon'"),
    ({"commit": "all"}, ValueError, "commit: expected one of threshold, local_leap, got 'all'"),
    ({"tail_threshold": 0.8}, ValueError, "tail_threshold: expected a value from 0.9 to 1, got 0.8"),
    ({"method": "dual_cache", "tail_threshold": 0.95}, ValueError, "tail_threshold: not an option"),
    ({"leap_radius": 0}, ValueError, "leap_radius: expected at least 1, got 0"),
    ({"leap_threshold": 0}, ValueError, "leap_threshold: expected a value above 0 and at most 1, got 0"),
    ({"eos_token_ids": 5}, TypeError, "eos_token_ids: expected a sequence of integers, got 5"),
    ({"eos_token_ids": (-1,)}, ValueError, "eos_token_ids: expected at least 0, got -1"),
    ({"trace": 1}, TypeError, "trace: expected True or False, got 1"),
    ({"steps": 64}, ValueError, "steps: not an option of blockbatch"),
    ({"block_size": 32}, ValueError, "block_size: not an option of blockbatch"),
    ({"method": "vanilla", "threshold": 0.9}, ValueError, "threshold: not an option of vanilla"),
    ({"method": "dual_cache", "block_sizes": (4,)}, ValueError, "block_sizes: not an option of dual_cache"),
    ({"method": "dual_cache", "commit": "local_leap"}, ValueError, "commit: not an option of dual_cache"),
    (
        {"method": "dual_cache", "block_size": 48},
        ValueError,
        "block_size: expected divisors of gen_length = 256",
    ),
    ({"method": "local_leap", "threshold": None}, TypeError, "threshold: expected a number, got None"),
    ({"method": "vanilla", "steps": 100}, ValueError, "steps: expected a multiple of the 8 blocks, at most"),
    ({"method": "vanilla", "steps": 512}, ValueError, "steps: expected a multiple of the 8 blocks, at most"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=[str(options) for options, *_ in BAD])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DecodeConfig(**options)
