"""Makes lm-evaluation-harness know the model "blockbatch" by its name.

Where blockbatch is installed nothing is to be done: `lm_eval --model blockbatch` finds it. Releases after
0.4.13 look for the entry point `lm_eval.models`. Up to 0.4.13 they look for none; but torch, which they
import before they look for the model, calls its own entry points `torch.backends`, and `register_if_wanted`
is one of them. From a source folder, `python -m blockbatch.evaluation.registration` takes the arguments of
`lm_eval`; a program that has imported torch already calls `register`.
"""

from __future__ import annotations

import sys
from contextlib import suppress

NAME = "blockbatch"
CLASS = "blockbatch.evaluation.harness:BlockBatchLM"


def register() -> None:
    """Adds the model to the registry of lm-evaluation-harness; it is imported when it is first asked for.

    Raises:
        ImportError: the package lm_eval is missing or too old.
    """
    try:
        # Fills the registry, which would not be done any more once it holds something.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ImportError(
            f"expected the package lm_eval 0.4.13 or newer: pip install 'blockbatch[lm-eval]' ({error})"
        ) from error
    if NAME not in model_registry:
        model_registry.register(NAME, target=CLASS)


def register_if_wanted() -> None:
    """`register` where lm-evaluation-harness is what imports torch; anywhere else nothing."""
    if "lm_eval" in sys.modules:
        # An lm_eval that the model does not fit into must not keep torch from being imported.
        with suppress(ImportError):
            register()


def main() -> None:
    """The command `lm_eval`, with the model registered."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
