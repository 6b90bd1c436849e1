"""bench/step_options.py in its smallest form, on the CPU."""

from bench_scripts import run


def test_steps_that_draw_and_steps_under_rules(tmp_path):
    report = run(
        "step_options.py", tmp_path / "options.json", "--dtype", "float32", "--shapes", "small-dream", "tiny",
        "--tokens", "32", "--length", "256", "--repeats", "1",
    )  # fmt: skip
    small, tiny = report["lines"]
    assert (small["model"], tiny["model"]) == ("small-dream", "tiny")
    for line in (small, tiny):
        assert line["tokens"] == 32 and line["temperature_0"]["tokens_equal_to_greedy"] == 1.0
        assert len(line["steps"]) == 8
        for name, step in line["steps"].items():
            assert step["ms"] > 0
            if name.startswith("temperature"):
                assert step["checks"]["drawn_tokens_equal_to_fp32"] == 1.0
        # The same rule twice, and one that commits two.
        steps = [line["steps"][name] for name in ("greedy", "its threshold rule", "the two surest")]
        committed = [step["checks"]["committed"] for step in steps]
        assert committed[0] == committed[1] and committed[2] == [2]
    assert small["steps"]["greedy"]["checks"]["committed"] == [1]
