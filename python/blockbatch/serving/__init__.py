"""`blockbatch serve`: an OpenAI-compatible server on the engine. It needs the packages of the extra `serve`.

`protocol`: the bodies of requests; `reading`: what the engine is asked for one; `answers`: texts as JSON and
chunks; `logprobs`: what is told of their tokens; `bridge`: the engine's thread and asyncio; `service`: the
state of the server; `app`: the routes; `server`: the process. `dynamo`, `moves`: a worker of NVIDIA Dynamo in
its place, of the extra `cluster`. Nothing outside this folder imports it but the commands.
"""
