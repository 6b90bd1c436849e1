"""A server with a scripted engine, as a process: `python serving_process.py HOW`; it logs on standard error.

HOW: "crash": the engine breaks once the answer has five tokens; "stuck": no answer ever ends.
"""

import sys

import blockbatch
from blockbatch.serving.server import run
from blockbatch.serving.service import Settings
from serving_fakes import ScriptedEngine


def load(how):
    model = blockbatch.load_model("tiny", device="cpu")
    engine = ScriptedEngine(model, "a b c d e f g h i j", delay=0.01)

    def script(engine):
        if how == "stuck":
            engine.pace = 0
        if how == "crash" and any(len(request.final) >= 5 for request in engine.requests):
            raise RuntimeError("CUDA error: unspecified launch failure")

    engine.script = script
    return model, engine


if __name__ == "__main__":
    settings = Settings("tiny", drain_seconds=0.5)
    sys.exit(run(settings, lambda: load(sys.argv[1]), host="127.0.0.1", port=0, version="0"))
