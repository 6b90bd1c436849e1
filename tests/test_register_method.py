"""`register_method`: one registry behind settings, command line, evaluation, traces and pictures."""

import json
import re
import sys
import textwrap

import pytest
import torch

import blockbatch
from blockbatch.cli import main
from blockbatch.decoding import METHOD_BUILDERS
from blockbatch.methods import METHOD_OPTIONS, METHOD_TABLE
from blockbatch.pictures import style
from blockbatch.registry import registered_methods
from custom_methods import PROBLEMS, nothing, registered, threshold_rule

BUILT_IN = ("blockbatch", "vanilla", "prefix_cache", "dual_cache", "local_leap")


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for name in registered_methods():
        blockbatch.unregister_method(name)
    assert blockbatch.METHODS == BUILT_IN == tuple(METHOD_OPTIONS)[:5]


def test_it_stands_in_every_list():
    builder = blockbatch.commit_rule(threshold_rule, base="blockbatch", options={"threshold": 0.8})
    blockbatch.register_method("own_rule", builder, title="own rule", summary="what I tried")
    assert blockbatch.METHODS == (*BUILT_IN, "own_rule") and "own_rule" in blockbatch.METHODS
    assert blockbatch.METHODS[-1] == "own_rule" and len(blockbatch.METHODS) == 6
    assert tuple(METHOD_BUILDERS) == tuple(METHOD_TABLE) == blockbatch.METHODS == registered_names()
    config = blockbatch.DecodeConfig(method="own_rule", gen_length=32)
    assert (config.threshold, config.block_sizes, config.eos_exit) == (0.8, (4, 8, 16, 32), "prefix")
    assert style.method_name("own_rule") == "own rule"
    assert style.method_look("own_rule") not in [style.method_look(method) for method in BUILT_IN]
    with pytest.raises(ValueError, match="method: expected one of blockbatch, .*own_rule.*, got 'own_rul'"):
        blockbatch.DecodeConfig(method="own_rul")
    blockbatch.unregister_method("own_rule")
    with pytest.raises(ValueError, match="method: expected one of"):
        blockbatch.DecodeConfig(method="own_rule")


def registered_names():
    return (*BUILT_IN, *registered_methods())


def test_options_are_those_of_the_base_without_its_commits():
    blockbatch.register_method("own_rule", blockbatch.commit_rule(nothing))
    assert set(METHOD_OPTIONS["own_rule"]) == {"block_size", "eos_exit", "refresh_scope", "query_span"}
    for options in ({"threshold": 0.5}, {"steps": 8}, {"drafts": (1,)}, {"block_sizes": (4,)}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: not an option of own_rule"):
            blockbatch.DecodeConfig(method="own_rule", **options)
    blockbatch.register_method("other", blockbatch.commit_rule(nothing, options={"threshold": 0.5}))
    with pytest.raises(ValueError, match="threshold: expected a value above 0 and at most 1, got 2"):
        blockbatch.DecodeConfig(method="other", threshold=2)


def test_a_builder_of_whole_methods():
    """Without a rule: the dual cache, whose threshold depends on the block size."""

    def builder(config, spec, eos_token_ids):
        threshold = 0.9 if config.block_size > 8 else 0.6
        base = blockbatch.DecodeConfig(
            method="dual_cache",
            gen_length=config.gen_length,
            block_size=config.block_size,
            threshold=threshold,
        )
        return METHOD_BUILDERS["dual_cache"](base, spec, eos_token_ids)

    model = blockbatch.load_model("tiny", device="cpu")
    blockbatch.register_method("careful_blocks", builder, options={"block_size": 8, "eos_exit": "none"})
    ours = blockbatch.generate(
        model, PROBLEMS[0], blockbatch.DecodeConfig(method="careful_blocks", gen_length=32)
    )
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=32, block_size=8, threshold=0.6)
    published = blockbatch.generate(model, PROBLEMS[0], config)
    assert (ours.canvas, ours.nfe) == (published.canvas, published.nfe)


BAD = [
    (
        ("dual_cache", nothing),
        ValueError,
        "expected one that is free, got 'dual_cache', which is built in",
    ),
    (("block_diffusion", nothing), ValueError, "got 'block_diffusion', which is built in"),
    (
        ("taken", nothing),
        ValueError,
        "got 'taken', which is registered already",
    ),
    (("two words", nothing), ValueError, "name: expected letters, digits and _, got 'two words'"),
    (("", nothing), ValueError, "name: expected letters, digits and _, got ''"),
    ((5, nothing), TypeError, "name: expected a text, got 5"),
    (
        ("own", "nothing"),
        TypeError,
        "a function of (config, spec, eos_token_ids), got 'nothing'",
    ),
    (("own", None), TypeError, "builder: expected a function"),
    (("own", nothing, {"title": 5}), TypeError, "title: expected a text, got 5"),
    (("own", nothing, {"options": ["eos_exit"]}), TypeError, "options: expected a mapping of options"),
    (("own", nothing, {"options": {"speed": 1}}), ValueError, "options: expected some of block_sizes, "),
    (("own", nothing, {"options": {"sampler": None}}), ValueError, "options: expected some of block_sizes, "),
    (("own", nothing, {"options": {"block_size": 8}}), ValueError, "options: expected eos_exit among them"),
    (
        ("own", nothing, {"options": {"eos_exit": "none"}}),
        ValueError,
        "expected one of block_size and block_sizes",
    ),
    (("dual_cache", nothing, {"replace": True}), ValueError, "got 'dual_cache', which is built in"),
]


@pytest.mark.parametrize("given, error, message", BAD, ids=range(len(BAD)))
def test_bad_registrations(given, error, message):
    blockbatch.register_method("taken", nothing)
    before = blockbatch.METHODS[:]
    name, builder, *options = given
    with pytest.raises(error, match=re.escape(message)):
        blockbatch.register_method(name, builder, **(options[0] if options else {}))
    assert blockbatch.METHODS == before


def test_bad_rules():
    with pytest.raises(TypeError, match=re.escape("rule: expected a function of (state, candidates, conf")):
        blockbatch.commit_rule("threshold")
    with pytest.raises(ValueError, match="base: expected one of dual_cache, .*, got 'local_leap'"):
        blockbatch.commit_rule(nothing, base="local_leap")
    with pytest.raises(ValueError, match="options: expected some of threshold, .*, got 'drafts'"):
        blockbatch.commit_rule(nothing, options={"drafts": (1,)})
    with pytest.raises(TypeError, match="options: expected a mapping, got 'threshold'"):
        blockbatch.commit_rule(nothing, options="threshold")
    with pytest.raises(TypeError, match="memory: expected names with dtypes, got 'seen': 'int32'"):
        blockbatch.commit_rule(nothing, memory={"seen": "int32"})
    with pytest.raises(TypeError, match="graphs: expected True or False, got 1"):
        blockbatch.commit_rule(nothing, graphs=1)
    with pytest.raises(ValueError, match="name: expected a method that was registered, got 'vanilla'"):
        blockbatch.unregister_method("vanilla")


def test_what_a_decode_refuses(tmp_path):
    model = blockbatch.load_model("tiny", device="cpu")

    def run(name, **options):
        config = blockbatch.DecodeConfig(method=name, gen_length=32, **options)
        return blockbatch.generate(model, PROBLEMS[0], config)

    blockbatch.register_method("no_method", lambda config, spec, ends: "soon")
    with pytest.raises(TypeError, match="expected a builder of 'no_method' that returns a Method, got"):
        run("no_method")
    rule = blockbatch.commit_rule(nothing, base="blockbatch")
    blockbatch.register_method("several", rule)
    with pytest.raises(ValueError, match="eos_exit: expected prefix or none with a commit rule on several"):
        run("several", eos_exit="window")

    def with_drafts(config, spec, ends):
        given = blockbatch.DecodeConfig(method="dual_cache", gen_length=32, drafts=(1,))
        method = METHOD_BUILDERS["dual_cache"](given, spec, ends)
        built = blockbatch.commit_rule(nothing)(config, spec, ends)
        return method._replace(rule=built.rule)

    blockbatch.register_method("with_drafts", with_drafts)
    with pytest.raises(ValueError, match="threshold: expected 2.0 with a commit rule, got 0.9"):
        run("with_drafts")
    blocks = blockbatch.load_model("tiny-block", device="cpu")
    with pytest.raises(ValueError, match="expected block_diffusion or blockbatch for .*, got 'several'"):
        blockbatch.generate(blocks, PROBLEMS[0], blockbatch.DecodeConfig(method="several"))


def test_a_notebook_cell_that_runs_again():
    """The new function decodes, not a step that was kept of the old one."""
    model = blockbatch.load_model("tiny", device="cpu")
    with registered("cell", nothing):
        config = blockbatch.DecodeConfig(method="cell", gen_length=32)
        assert blockbatch.generate(model, PROBLEMS[0], config).nfe.total == 32
        everything = blockbatch.commit_rule(lambda state, candidates, confidence: torch.ones_like(candidates))
        blockbatch.register_method("cell", everything, replace=True)
        assert blockbatch.generate(model, PROBLEMS[0], config).nfe.total == 1


PLUGIN = """
import torch
import blockbatch

def half(state, candidates, confidence):
    return confidence > 0.5

blockbatch.register_method("half", blockbatch.commit_rule(half), title="one half", replace=True)
"""
GIVEN = ["--device", "cpu", "--gen-length", "32"]


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my_rules.py"
    path.write_text(PLUGIN)
    return str(path)


def test_the_command_line(plugin, tmp_path, capsys, monkeypatch):
    trace = tmp_path / "trace.json"
    arguments = ["generate", PROBLEMS[0], *GIVEN, "--plugin", plugin, "--method", "half"]
    assert main([*arguments, "--json", "--trace", str(trace)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "half" and report["settings"]["block_size"] == 32
    assert blockbatch.load_trace(trace)["method"] == "half"
    blockbatch.unregister_method("half")
    # The picture of a trace needs no plugin.
    page = tmp_path / "page.html"
    assert main(["picture", "replay", str(trace), "--out", str(page)]) == 0 and "half" in page.read_text()
    monkeypatch.syspath_prepend(tmp_path)
    arguments[arguments.index(plugin)] = "my_rules"
    assert main(arguments) == 0
    sys.modules.pop("my_rules")


def test_an_evaluation(plugin, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "eval",
        *GIVEN,
        "--plugin",
        plugin,
        "--tasks",
        "arithmetic",
        "--limit",
        "2",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--methods", "half,dual_cache", "--set", "mine:method=half,block_size=8"]) == 0
    printed = capsys.readouterr().out
    assert "half +eos" in printed and "mine" in printed
    header = json.loads((out / "results.jsonl").read_text().splitlines()[0])["run"]
    assert header["settings"]["half"]["method"] == "half"
    assert (out / "report.md").exists()


def test_plugins_that_are_refused(tmp_path, capsys):
    def error_of(name):
        assert main(["generate", "x", *GIVEN, "--plugin", str(name)]) == 2
        return capsys.readouterr().err

    assert "expected a module or a Python file, got" in error_of(tmp_path / "nowhere.py")
    assert "expected a module that can be imported, got 'no_such_module'" in error_of("no_such_module")
    broken = tmp_path / "broken.py"
    broken.write_text(textwrap.dedent("import blockbatch\nblockbatch.register_method('vanilla', print)\n"))
    assert "expected a file that runs, got" in (said := error_of(broken)) and "which is built in" in said


def test_the_harness(plugin, tmp_path):
    pytest.importorskip("lm_eval")
    from blockbatch.evaluation.harness import BlockBatchLM

    given = f"pretrained=tiny,device=cpu,plugin={plugin},method=half,gen_length=32,block_size=16"
    model = BlockBatchLM.create_from_arg_string(given)
    from blockbatch.evaluation.harness_options import Wishes

    assert model._config(Wishes((), 32)).method == "half"
    with pytest.raises(FileNotFoundError, match="adapter: expected a folder with adapter_config.json, got"):
        BlockBatchLM.create_from_arg_string(f"pretrained=tiny,device=cpu,adapter={tmp_path / 'nowhere'}")
