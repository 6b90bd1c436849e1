"""The page at / in a headless browser: it shows the canvases that the decode had, and breaks nothing."""

import itertools
import json

import pytest

import blockbatch
import picture_traces
from blockbatch.tracing import replay
from browser import CHROMIUM, Browser
from serving_fakes import HTTP, ScriptedEngine, events_of, post, serving, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

CANVASES = """[...document.querySelectorAll('#branches .branch')].map(branch =>
    [...branch.querySelectorAll('.cell')].map(cell => Number(cell.dataset.token)))"""
VISITS = itertools.count()
PROMPT = "Divide with remainder until zero: 51 and 16."


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def server(model):
    with serving(model, ScriptedEngine(model)) as made:
        yield made


def visit(browser, server):
    """Opens the page anew."""
    address = f"{server.url}/?{next(VISITS)}"
    browser.open(address)
    browser.wait(f"location.href === '{address}' && document.readyState === 'complete'")


def start(browser, server, tokens=64, settings="", prompt=PROMPT):
    visit(browser, server)
    given = {"prompt": prompt, "tokens": tokens, "settings": settings}
    browser.run(
        ";".join(f"byId({json.dumps(name)}).value = {json.dumps(value)}" for name, value in given.items())
    )
    browser.run("document.getElementById('go').click()")


def decode_of(model, prompt=PROMPT, **options):
    config = blockbatch.DecodeConfig(**{"gen_length": 64, "trace": True, **options})
    return blockbatch.generate(model, prompt, config)


def test_a_prompt_denoises_before_ones_eyes(browser, server, model):
    result = decode_of(model)
    start(browser, server)
    browser.wait("document.querySelectorAll('#branches .branch').length > 0")
    seen = [browser.run(CANVASES)]
    while browser.run("document.getElementById('phase').textContent") != "done":
        seen.append(browser.run(CANVASES))
    mask = model.spec.mask_token_id
    branches = len(result.branches)
    states = [replay(result.trace[:count], branches, 64, mask) for count in range(len(result.trace) + 1)]
    assert all(canvases in states for canvases in seen) and browser.run(CANVASES) == states[-1]
    assert len({json.dumps(canvases) for canvases in seen}) > 2
    assert browser.run("document.getElementById('text').textContent") == result.text
    status = browser.run("document.getElementById('status').textContent")
    assert f"{len(result.tokens)} tokens in {result.nfe.total} forwards" in status
    (winner,) = browser.run(
        "[...document.querySelectorAll('.winner.on')].map(found => found.previousSibling.textContent)"
    )
    assert winner == f"block {result.block_size}"
    asked = {address.split("?")[0] for address in browser.requests}
    assert browser.problems == [] and asked <= {server.url + "/", server.url + "/live", "data:,"}


@pytest.mark.parametrize("settings", ["method dual_cache", "preset careful", "preset fast"])
def test_other_settings(browser, server, model, settings):
    kind, name = settings.split()
    config = blockbatch.DecodeConfig.preset(name, gen_length=64) if kind == "preset" else None
    config = config or blockbatch.DecodeConfig(method=name, gen_length=64)
    result = blockbatch.generate(model, PROMPT, config)
    start(browser, server, settings=settings)
    browser.wait("document.getElementById('phase').textContent === 'done'")
    assert browser.run("document.getElementById('text').textContent") == result.text
    assert browser.run("document.querySelectorAll('#branches .branch').length") == len(result.branches)
    assert browser.problems == []


def test_an_empty_answer_says_why(browser, server, model):
    prompt = "Reverse: 3 1 4 1 5"
    assert decode_of(model, prompt).text == ""
    start(browser, server, prompt=prompt)
    browser.wait("document.getElementById('phase').textContent === 'done'")
    status = browser.run("document.getElementById('status').textContent")
    assert status.endswith("; the answer shows nothing: the model ends its text with the first token")
    assert browser.problems == []


def test_stop_and_start_again(browser, server):
    start(browser, server, tokens=512, settings="method vanilla")
    browser.wait("document.querySelectorAll('#branches .cell.commit').length > 1")
    browser.run("document.getElementById('halt').click()")
    browser.wait("document.getElementById('status').textContent === 'stopped'")
    until(lambda: not server.service.live.locked())
    browser.run("tokens.value = 32; settings.value = ''; document.getElementById('go').click()")
    browser.wait("document.getElementById('phase').textContent === 'done'")
    assert browser.problems == []


def test_what_is_refused_is_said(browser, server):
    start(browser, server, tokens=2000)
    browser.wait("document.getElementById('phase').textContent === 'failed'")
    assert "to fit in 1024 positions" in browser.run("document.getElementById('status').textContent")
    # The browser itself notes every answer that is no success.
    assert all("400" in str(problem) for problem in browser.problems)


def test_texts_stay_texts(browser, server):
    attack = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
    start(browser, server, tokens=32, prompt=attack)
    browser.wait("document.getElementById('phase').textContent === 'done'")
    assert browser.run("window.broken") is None and browser.run("document.images.length") == 0
    assert browser.problems == []


def test_a_key_is_asked_for(browser, model):
    with serving(model, ScriptedEngine(model), api_key="secret") as server:
        visit(browser, server)
        assert browser.run("document.getElementById('key-box').hidden") is False
        browser.run("tokens.value = 32; document.getElementById('go').click()")
        browser.wait("document.getElementById('phase').textContent === 'failed'")
        browser.run("key.value = 'secret'; document.getElementById('go').click()")
        browser.wait("document.getElementById('phase').textContent === 'done'")


def test_one_is_shown_at_a_time(server):
    body = {"prompt": PROMPT, "max_tokens": 256, "blockbatch": {"method": "vanilla", "eos_exit": "none"}}
    with HTTP.stream("POST", server.url + "/live", json=body) as first:
        assert first.status_code == 200
        second = post(server, "/live", {"prompt": PROMPT})
        assert second.status_code == 503 and "another is shown" in second.json()["error"]["message"]
    until(lambda: not server.service.live.locked())
    assert post(server, "/live", {"prompt": PROMPT, "max_tokens": 32}).status_code == 200


def test_block_causal_models(browser):
    model = blockbatch.load_model("tiny-block", device="cpu")
    problem = picture_traces.problem("symbolic", 4)
    with serving(model, ScriptedEngine(model)) as server:
        text = post(server, "/live", {"prompt": problem.prompt, "max_tokens": 64}).text
        told = events_of(text.splitlines())[0]
        result = decode_of(model, problem.prompt, trace=False)
        assert told[-1]["end"]["text"] == result.text
        start(browser, server, prompt=problem.prompt)
        browser.wait("document.getElementById('phase').textContent === 'done'")
        assert browser.run("document.getElementById('text').textContent") == result.text
        assert browser.problems == []


def test_no_page(model):
    with serving(model, ScriptedEngine(model), page=False) as server:
        assert HTTP.get(server.url + "/").status_code == 404
        assert HTTP.post(server.url + "/live", json={"prompt": "a"}).status_code == 404
