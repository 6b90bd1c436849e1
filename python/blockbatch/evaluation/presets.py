"""The settings of the BlockBatch paper (arXiv 2605.29233) by name.

A preset is a benchmark with its number of solved examples in the prompt and its generation length; the
settings of each method are the same for all. (Named settings of a decode, such as "fast", are another table:
`blockbatch.methods.PRESET_TABLE`.) `python -m blockbatch.evaluation.presets gsm8k` prints
the command that runs one with lm-evaluation-harness.

The authors' scripts run Dream, a base model, with more than that (`DREAM_OPTIONS`), which its commands say.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blockbatch.config import DecodeConfig
from blockbatch.methods import BUILT_IN_METHODS, DEFAULT_METHOD, METHOD_TABLE, fitted

METHOD_SETTINGS = {name: METHOD_TABLE[name].published for name in BUILT_IN_METHODS}
# Every prompt begins with the BOS token, and BlockBatch fills its canvas, which is cut at the first EOS.
DREAM_OPTIONS = {"add_bos_token": "true", "eos_exit": "none"}
PAPER_MODELS = ("GSAI-ML/LLaDA-1.5", "GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Base-7B")


@dataclass(frozen=True)
class Preset:
    """One benchmark of the paper.

    Attributes:
        name: what `get_preset` and `preset=` call it.
        task: the name of lm-evaluation-harness.
        num_fewshot: solved examples in front of each problem.
        gen_length: tokens to generate.
        escapes_until: whether the authors leave Dream's texts uncut at the task's stop sequences, to cut and
            judge them in a step of their own.
        runs_code: whether grading executes what the model wrote, which lm-evaluation-harness wants confirmed.
        extra: of the package lm_eval that the task needs; None: none.
    """

    name: str
    task: str
    num_fewshot: int
    gen_length: int = 256
    escapes_until: bool = True
    runs_code: bool = False
    extra: str | None = None

    def options(self, method: str = DEFAULT_METHOD, gen_length: int | None = None) -> dict[str, Any]:
        """The arguments of `DecodeConfig` for a method.

        Args:
            gen_length: another length than the benchmark's; of the published block sizes those stay that
                divide it.

        Raises:
            ValueError: no such method.
        """
        if method not in METHOD_TABLE:
            raise ValueError(f"method: expected one of {', '.join(METHOD_TABLE)}, got {method!r}")
        length = self.gen_length if gen_length is None else gen_length
        return fitted({"method": method, "gen_length": length, **METHOD_TABLE[method].published})

    def config(self, method: str = DEFAULT_METHOD, **changes: Any) -> DecodeConfig:
        """The settings of a method, with some of them changed.

        Raises:
            ValueError, TypeError: as `DecodeConfig`.
        """
        return DecodeConfig(**{**self.options(method, changes.get("gen_length")), **changes})

    def command(self, model: str = "GSAI-ML/LLaDA-8B-Instruct", method: str = DEFAULT_METHOD) -> str:
        """The shell command that runs this benchmark with lm-evaluation-harness.

        A model with Dream in its name gets the arguments of the authors' runs of Dream.
        """
        published = self.options(method)
        arguments = {"pretrained": model, "method": method, "preset": self.name}
        if is_dream(model):
            if "block_sizes" in published:
                arguments["block_sizes"] = ":".join(map(str, published["block_sizes"]))
                # The preset means the same; written out, one sees that the rule is another than LLaDA's.
                arguments["policy"] = "dream_published"
            arguments |= DREAM_OPTIONS
            if self.escapes_until:
                arguments["escape_until"] = "true"
        parts = ["lm_eval", "--model", "blockbatch"]
        parts += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        parts += ["--tasks", self.task, "--num_fewshot", str(self.num_fewshot), "--batch_size", "1"]
        if self.runs_code:
            parts.append("--confirm_run_unsafe_code")
        command = shlex.join(parts)
        # Without it the metric refuses to execute anything.
        return f"HF_ALLOW_CODE_EVAL=1 {command}" if self.runs_code else command


def is_dream(model: str) -> bool:
    """Whether the name of a model is one of Dream's."""
    return "dream" in model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("gsm8k", "gsm8k", num_fewshot=5),
        Preset("math", "minerva_math", num_fewshot=4, escapes_until=False, extra="math"),
        Preset("humaneval", "humaneval", num_fewshot=0, runs_code=True),
        Preset("mbpp", "mbpp", num_fewshot=3, runs_code=True),
    )
}


def get_preset(name: str, known: Sequence[str] = tuple(PRESETS)) -> Preset:
    """The preset of a name.

    Args:
        known: the names that the message about another one lists.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(known)}, got {name!r}")
    return PRESETS[name]


def main(arguments: list[str] | None = None) -> None:
    """Prints the commands of the named presets, of all where none is named."""
    parser = argparse.ArgumentParser(
        prog="python -m blockbatch.evaluation.presets",
        description="Print the lm_eval command of the paper's benchmarks.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PRESETS)} (all)")
    parser.add_argument(
        "--model", default=PAPER_MODELS[1], help=f"a folder or hub id; the paper's: {', '.join(PAPER_MODELS)}"
    )
    parser.add_argument("--method", default=DEFAULT_METHOD, help=", ".join(METHOD_SETTINGS))
    options = parser.parse_args(arguments)
    try:
        for name in options.names or PRESETS:
            preset = get_preset(name)
            if preset.extra is not None:
                print(f"# needs pip install 'lm_eval[{preset.extra}]'")
            if is_dream(options.model) and preset.escapes_until:
                print("# texts stay uncut at stop sequences, as in the authors' run: cut them before judging")
            print(preset.command(options.model, options.method))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
