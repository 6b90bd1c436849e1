"""`blockbatch serve`: an OpenAI-compatible server on the engine. It needs the packages of the extra `serve`.

`protocol`: the bodies of requests; `reading`: what the engine is asked for one; `answers`: texts as JSON and
chunks; `bridge`: the engine's thread and asyncio; `service`: the state of the server; `app`: the routes;
`server`: the process. Nothing outside this folder imports it but the command.
"""
