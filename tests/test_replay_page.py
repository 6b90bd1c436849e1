"""The replay page in a headless browser, opened from the disk."""

import json

import pytest

import blockbatch
import picture_traces
from blockbatch.pictures import replay
from blockbatch.pictures.states import agreement, expand
from blockbatch.tracing import load_trace
from blockbatch.tracing import replay as replayed
from browser import CHROMIUM, Browser
from command_runs import ROOT

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

CANVASES = """[...document.querySelectorAll('.branch')].map(branch =>
    [...branch.querySelectorAll('.cell')].map(cell => Number(cell.dataset.token)))"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def trace():
    model = blockbatch.load_model("tiny", device="cpu")
    problem = picture_traces.problem("symbolic", 4)
    return picture_traces.decode(model, problem, gen_length=128)[0]


@pytest.fixture
def page(browser, trace, tmp_path):
    """The page of a decode, which a test has to leave without an error or a request."""
    saved = load_trace(picture_traces.write(tmp_path / "trace.json", trace))
    path = replay.draw(saved, tmp_path / "page.html")
    browser.open(path.as_uri())
    yield browser
    assert browser.problems == [] and browser.requests == [path.as_uri()]


def canvases(trace, forwards):
    sizes = trace["block_sizes"]
    return replayed(trace["trace"][:forwards], len(sizes), trace["gen_length"], trace["mask_token_id"])


def step_of(page):
    return int(page.run("document.getElementById('slider').value"))


def move_slider(page, value):
    page.run(f"slider.value = {value}; slider.dispatchEvent(new Event('input'))")


def click(page, selector):
    found = page.run(
        f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
        "found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    page.mouse(*found, click=True)


def opening_of(trace):
    """The first forward after which there is something to compare."""
    records = trace["trace"]
    seen = (
        agreement(expand(trace)).distinct.max(1) > 1,
        [bool(record["merges"]) for record in records],
        [record.get("adopted", 0) > 0 for record in records],
        [bool(record["syncs"]) for record in records],
        [any(record.get("query_stale", [])) for record in records],
    )
    first = (next((step for step, is_it in enumerate(one, 1) if is_it), None) for one in seen)
    return next(filter(None, first), -(-len(records) // 2))


def test_it_opens_where_branches_first_differ_and_plays_from_the_start(page, trace):
    opening = opening_of(trace)
    assert 0 < opening < len(trace["trace"]) and step_of(page) == opening
    assert page.run("document.querySelectorAll('.cell.split').length") > 0
    page.run("speed.value = '0.5'")
    click(page, "#play")
    assert step_of(page) == 0
    click(page, "#play")
    # A place that was chosen is where it plays from.
    move_slider(page, opening)
    click(page, "#play")
    assert step_of(page) == opening
    click(page, "#play")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dual_cache", "threshold": 0.99, "drafts": (1, 2)},
        {"method": "dual_cache", "threshold": 0.99, "query_span": "open"},
        {"method": "dual_cache"},
        {"block_sizes": (8, 16), "merge_threshold": None, "threshold": 0.99},
    ],
    ids=["drafts", "open", "plain", "pair"],
)
def test_where_a_page_opens(browser, tmp_path, options):
    model = blockbatch.load_model("tiny", device="cpu")
    trace = picture_traces.decode(model, picture_traces.problem("symbolic", 4), gen_length=64, **options)[0]
    browser.open(replay.draw(trace, tmp_path / "page.html").as_uri())
    assert step_of(browser) == opening_of(trace) > 0
    browser.open((tmp_path / "page.html").as_uri() + "#forward=1")
    assert step_of(browser) == 1


def test_it_starts_masked_and_ends_as_the_trace(page, trace):
    move_slider(page, 0)
    assert page.run(CANVASES) == canvases(trace, 0)
    assert (
        page.run("new Set([...document.querySelectorAll('.branch .cell')].map(c => c.className)).size") == 1
    )
    move_slider(page, len(trace["trace"]))
    assert page.run(CANVASES) == canvases(trace, len(trace["trace"]))
    winner = trace["block_sizes"].index(trace["winner_block_size"])
    assert page.run(CANVASES)[winner] == trace["canvas"]
    assert page.run("document.querySelectorAll('.badge.winner.on').length") == 1
    nfe = [page.run(f"document.getElementById('nfe-{name}').textContent") for name in trace["nfe"]]
    assert nfe == [str(count) for count in trace["nfe"].values()]
    assert page.run("document.getElementById('text').textContent") == trace["text"]
    assert page.run("document.getElementById('prompt').textContent") == trace["prompt"]


def test_every_step_in_any_order(page, trace):
    total = len(trace["trace"])
    for step in [*range(total + 1), *range(total, -1, -1), total // 2, 0]:
        move_slider(page, step)
        assert page.run(CANVASES) == canvases(trace, step)
    page.run("location.hash = '#forward=2'")
    page.wait("slider.value === '2'")
    assert page.run(CANVASES) == canvases(trace, 2)


def test_play_and_pause(page, trace):
    page.run("speed.value = '10'")
    click(page, "#play")
    assert page.run("play.getAttribute('aria-label')") == "Pause"
    page.wait("Number(slider.value) >= 2")
    click(page, "#play")
    step = step_of(page)
    assert page.run("play.getAttribute('aria-label')") == "Play" and step < len(trace["trace"])
    page.run("new Promise(done => setTimeout(done, 250))")
    assert step_of(page) == step and page.run(CANVASES) == canvases(trace, step)
    click(page, "#play")
    page.wait(f"Number(slider.value) === {len(trace['trace'])}")
    assert page.run("play.getAttribute('aria-label')") == "Play"
    assert page.run(CANVASES) == canvases(trace, len(trace["trace"]))


def test_buttons_and_keys(page, trace):
    total, moves = len(trace["trace"]), []
    move_slider(page, 0)
    for selector in ("#next", "#next", "#back", "#last", "#first"):
        click(page, selector)
        moves.append(step_of(page))
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        page.press(key)
        moves.append(step_of(page))
    assert moves == [1, 2, 1, total, 0] * 2
    page.run("slider.focus()")
    page.press("ArrowRight")
    assert step_of(page) == 1
    page.run("document.activeElement.blur()")
    page.press(" ")
    assert page.run("play.getAttribute('aria-label')") == "Pause"
    page.press(" ")
    assert page.run("play.getAttribute('aria-label')") == "Play"


def test_what_each_forward_did_is_shown(page, trace):
    seen = set()
    for step, record in enumerate(trace["trace"], 1):
        move_slider(page, step)
        assert page.run("document.getElementById('phase').textContent") == record["kind"]
        marked = page.run("document.querySelectorAll('.branch.refresh').length")
        assert marked == (len(record["rows"]) if record["kind"] == "refresh" else 0)
        for branch, window in zip(record["rows"], record["windows"]):
            shown = page.run(
                f"[...document.querySelectorAll('.branch')[{branch}].querySelectorAll('.cell.window')]"
                ".map(cell => Number(cell.dataset.position))"
            )
            assert shown == list(range(*window))
        synced = page.run("[...document.querySelectorAll('.badge.synced')].map(b => b.textContent)")
        leaders = {sync["branch"]: trace["block_sizes"][sync["leader"]] for sync in record["syncs"]}
        assert synced == [f"S ← block {leaders[b]}" if b in leaders else "" for b in range(len(synced))]
        for name, how in (("merges", "merge"), ("commits", "commit"), ("syncs", "sync")):
            fresh = page.run(f"document.querySelectorAll('.branch .cell.fresh.{how}').length")
            if fresh and record[name]:
                seen.add(how)
        seen |= {record["kind"]}
    assert seen == {"init", "block", "refresh", "commit", "merge", "sync"}


def test_a_token_tells_its_story(page, trace):
    commit = trace["trace"][0]["commits"][0]
    branch, position, token = commit["branch"], commit["positions"][0], commit["tokens"][0]
    move_slider(page, 1)
    click(page, f".cell[data-branch='{branch}'][data-position='{position}']")
    told = page.run("document.querySelector('aside').textContent")
    assert f"Position {position} of block {trace['block_sizes'][branch]} (kept)" in told
    assert f"id {token}" in told and f"confidence {commit['confidence'][0]:.3f}" in told
    assert "own commit in forward 1" in told
    assert page.run("document.querySelectorAll('aside tbody tr').length") == len(trace["block_sizes"])
    page.press("ArrowRight", shift=True)
    assert f"Position {position + 1} of" in page.run("document.querySelector('aside').textContent")
    page.press("Escape")
    assert page.run("document.querySelectorAll('.cell.picked').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_color_scheme(page, trace, scheme, tmp_path):
    from matplotlib import image

    page.color_scheme(scheme)
    move_slider(page, len(trace["trace"]) // 2)
    picture = tmp_path / "page.png"
    picture.write_bytes(page.screenshot())
    found = image.imread(picture)[..., :3]
    assert found.std() > 0.05 and (found.mean() > 0.6) == (scheme == "light")


def test_texts_stay_texts(browser, tmp_path):
    attack = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>\u202e\n"
    trace = picture_traces.handmade(
        model=attack, prompt=attack, text=attack, pieces={"1": attack, "2": "\u202e"}
    )
    path = replay.draw(trace, tmp_path / "page.html")
    browser.open(path.as_uri())
    for step in range(5):
        move_slider(browser, step)
        assert browser.run(CANVASES) == canvases(trace, step)
        browser.run("pick(0, 0, true)")
    assert browser.run("window.broken") is None and browser.run("document.images.length") == 0
    assert browser.run("document.getElementById('prompt').textContent") == attack
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert "⟨202e⟩" in browser.run("document.getElementById('branches').textContent")
    assert browser.problems == [] and browser.requests == [path.as_uri()]


def test_a_single_branch_without_texts(browser, tmp_path):
    records = [picture_traces.record("init", {0: (0, 4)}, commits=[(0, [0], [7], [0.5])])]
    trace = picture_traces.handmade(
        block_sizes=[4], winner_block_size=None, trace=records, pieces={}, prompt=None, text=None, canvas=None
    )
    path = replay.draw(trace, tmp_path / "page.html")
    browser.open(path.as_uri())
    move_slider(browser, 1)
    assert browser.run(CANVASES) == canvases(trace, 1)
    assert browser.run("document.querySelector('.branch .cell').textContent") == "#7"
    assert browser.run("getComputedStyle(document.getElementById('prompt-box')).display") == "none"
    assert browser.problems == [] and browser.requests == [path.as_uri()]


def shown_positions(page, branch, selector):
    return page.run(
        f"[...document.querySelectorAll('.branch')[{branch}].querySelectorAll({json.dumps(selector)})]"
        ".map(cell => Number(cell.dataset.position))"
    )


def test_open_queries_and_what_is_stale(browser, tmp_path):
    model = blockbatch.load_model("tiny", device="cpu")
    options = {"gen_length": 64, "query_span": "open", "refresh_interval": 16, "threshold": 0.97}
    trace = picture_traces.decode(model, picture_traces.problem("symbolic", 4), **options)[0]
    path = replay.draw(trace, tmp_path / "page.html")
    browser.open(path.as_uri())
    told = None
    for step, record in enumerate(trace["trace"], 1):
        move_slider(browser, step)
        assert browser.run("document.getElementById('queries').textContent") == str(record["packed_tokens"])
        badges = browser.run("[...document.querySelectorAll('.badge.queries.on')].map(b => b.textContent)")
        assert badges == [f"queries {count}" if count else "shared result" for count in record["queries"]]
        for index, branch in enumerate(record["rows"]):
            positions = record["query_positions"][index] if "query_positions" in record else []
            stale = record["query_stale"][index] if "query_stale" in record else []
            assert shown_positions(browser, branch, ".cell.query") == positions
            assert shown_positions(browser, branch, ".cell.stale") == stale
            if stale and told is None:
                browser.run(f"pick({branch}, {stale[0]}, true)")
                told = browser.run("document.getElementById('detail').textContent")
    assert "its K/V was that of another token" in told
    legend = browser.run("getComputedStyle(document.querySelector('.legend .open-only')).display")
    assert legend != "none" and browser.run("document.querySelectorAll('.drafts-card').length") == 0
    assert browser.problems == []


def test_drafts_stand_apart_from_the_branch(browser, tmp_path):
    model = blockbatch.load_model("tiny", device="cpu")
    options = {"method": "dual_cache", "gen_length": 64, "threshold": 0.99, "drafts": (1, 2, 4)}
    trace = picture_traces.decode(model, picture_traces.problem("symbolic", 4), **options)[0]
    path = replay.draw(trace, tmp_path / "page.html")
    browser.open(path.as_uri())
    for step, record in enumerate(trace["trace"], 1):
        move_slider(browser, step)
        assert browser.run(CANVASES) == canvases(trace, step), "one branch, and no draft among it"
        rows = browser.run(
            "[...document.querySelectorAll('.draft')].map(row => ["
            "row.querySelector('.draft-name').textContent,"
            "[...row.querySelectorAll('.cell')].map(c => [c.dataset.position, c.dataset.token].map(Number)),"
            "row.classList.contains('adopted')])"
        )
        assert rows == [
            [
                f"+{draft['length']}",
                [list(pair) for pair in zip(draft["positions"], draft["tokens"])],
                draft["length"] == record["adopted_length"],
            ]
            for draft in record["drafts"]
        ]
        status = browser.run("document.getElementById('status').textContent")
        assert ("adopted" in status) == (record["adopted"] > 0)
        assert browser.run("document.getElementById('queries').textContent") == str(record["packed_tokens"])
    marks = browser.run("[...document.querySelectorAll('.adopted-mark')].map(mark => mark.textContent)")
    assert marks == ["A" * record["adopted"] for record in trace["trace"] if record["adopted"]] != []
    outcome = browser.run("document.getElementById('outcome').textContent")
    assert f"{sum(record['adopted'] for record in trace['trace'])} drafts adopted" in outcome
    assert browser.problems == []


def test_a_trace_of_an_older_version_opens_where_something_is_to_be_seen(browser, tmp_path):
    trace = load_trace(ROOT / "tests" / "data" / "old_trace.json")
    assert not any("queries" in record or "drafts" in record for record in trace["trace"])
    browser.open(replay.draw(trace, tmp_path / "page.html").as_uri())
    assert step_of(browser) == opening_of(trace) > 0
    assert browser.run(CANVASES) == canvases(trace, step_of(browser))
    assert browser.problems == []
