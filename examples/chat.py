"""A conversation in the terminal: a line is a message, an empty line the end.

An answer shows while it is decoded, at most 256 tokens of it or as many as the second argument says.

    python examples/chat.py GSAI-ML/LLaDA-8B-Instruct
"""

from __future__ import annotations

import sys

import blockbatch


def main(model_name: str, gen_length: str = "256") -> None:
    model = blockbatch.load_model(model_name)
    config = blockbatch.DecodeConfig.preset("fast", gen_length=int(gen_length))
    messages = []
    while line := input("> "):
        messages.append({"role": "user", "content": line})
        with blockbatch.stream(model, model.chat_ids(messages), config) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        result = pieces.result
        print(f"\n[{len(result.tokens)} tokens, {result.nfe.total} forwards, {result.seconds:.1f} s]")
        messages.append({"role": "assistant", "content": result.text})
    print(f"{len(messages) // 2} answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
