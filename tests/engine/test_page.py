"""The live page in a real browser, on a server that learns: with API keys, a state dir, and two API servers.

SCREENSHOTS=docs/images also writes the pictures of the documents.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from browser import FIREFOX, browser_of, engines
from conftest import FLAGS, Stage, running
from playwright.sync_api import Browser, Locator, Page, Route, expect
from served import Documents, Served, completion

pytestmark = pytest.mark.engine

KEY, OTHER = "key-of-the-page", "key-of-somebody-else"
#: The page looks once a second.
SOON = 60_000


@pytest.fixture(scope="module")
def watched(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    stage.stop()
    folder = tmp_path_factory.mktemp("watched")
    flags = [*FLAGS, "--api-key", KEY, OTHER, "--ttt-state-dir", str(folder / "state"), "--api-server-count", "2"]
    with running(folder / "server.log", "vllm_ttt.cli", flags, {}) as served:
        served.http.headers["Authorization"] = f"Bearer {KEY}"
        yield served


@pytest.fixture(scope="module", params=engines())
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with browser_of(request.param) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, watched: Served) -> Iterator[Page]:
    """A tab that sees nothing but this server, and never shows a key in an address."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SOON)
    expect.set_options(timeout=SOON)
    addresses: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.goto(f"{watched.url}/ttt")
    yield page
    addresses.append(page.url)
    context.close()
    assert not wrong
    assert all(url.startswith((f"{watched.url}/", "data:")) for url in addresses), "the page asked somebody else"
    assert not any(KEY in url for url in addresses)


def enter(page: Page, key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Show sessions").click()


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=f"Session {name}", exact=True)


def learn(watched: Served, name: str, ids: list[int], key: str = KEY) -> None:
    body = completion(ids, name)
    answer = watched.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text


def at_rest(watched: Served, name: str) -> dict[str, Any]:
    """The session once nothing of it waits: its next request would be served now."""
    watched.http.post("/v1/completions", json=completion([5, 6, 7], name, vllm_xargs={"ttt_learn": 0}))
    return watched.session(name)


def do(page: Page, name: str, action: str, fill: str | None = None, choose: str | None = None) -> None:
    """Press a button of a session, and answer the question."""
    card(page, name).get_by_role("button", name=action, exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    if fill is not None:
        dialog.get_by_role("textbox").fill(fill)
    if choose is not None:
        dialog.get_by_role("combobox").select_option(choose)
    dialog.get_by_role("button", name=action, exact=True).click()


def test_the_shell_shows_nothing_without_a_key(page: Page, watched: Served, documents: Documents) -> None:
    learn(watched, "secret-name", documents["man2"][0][:300])
    answer = httpx.get(f"{watched.url}/ttt")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text), "nothing comes from elsewhere"
    expect(page.get_by_label("API key")).to_be_focused()
    assert "secret-name" not in page.content()
    assert page.locator("article").count() == 0
    enter(page, "not-the-key")
    expect(page.get_by_text("The server does not know this key.")).to_be_visible()
    assert page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    enter(page)
    expect(card(page, "secret-name")).to_be_visible()
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie.length]") == [1, 0, 0]
    page.reload()
    expect(card(page, "secret-name")).to_be_visible()
    page.get_by_role("button", name="Change key").click()
    assert "secret-name" not in page.content()
    assert page.evaluate("sessionStorage.length") == 0
    watched.http.delete("/v1/ttt/sessions/secret-name")


@pytest.mark.skipif(shutil.which("curl") is None, reason="the empty page shows a command for curl, which is not installed")
def test_from_an_empty_page_to_a_session_that_learns(page: Page, watched: Served, tmp_path: Path) -> None:
    enter(page)
    expect(page.get_by_role("heading", name="No session yet")).to_be_visible()
    command = page.get_by_label("Command").inner_text()
    assert KEY not in command
    screenshot(page, "ttt-empty")
    environment = {**os.environ, "API_KEY": KEY, "no_proxy": "*"}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('"ttt":{"session_id":"first"') == 6, done.stdout
    session = at_rest(watched, "first")
    assert session["version"] == 6
    first = card(page, "first")
    expect(first.locator(".number")).to_have_text("6")
    expect(first.locator("circle.session")).to_have_count(6)
    losses = [chunk["loss"] for chunk in session["losses"]]
    assert losses == sorted(losses, reverse=True), "it learned, so each time the text was less of a surprise"
    first.locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    tokens = session["losses"][-1]["tokens"]
    expect(first.locator(".readout")).to_contain_text(f"version 6 · {tokens} tokens · session {losses[-1]:.2f}")
    page.keyboard.press("ArrowLeft")
    expect(first.locator(".readout")).to_contain_text(f"version 5 · {tokens} tokens")
    assert watched.http.delete("/v1/ttt/sessions/first").status_code == 200
    expect(page.get_by_role("heading", name="No session yet")).to_be_visible()


def test_depth_rate_and_reasons_are_told(page: Page, watched: Served, documents: Documents) -> None:
    """Which layers learn, how fast, and why something was not learned: as it is now, and chunk by chunk."""
    learn(watched, "told", documents["kjv"][3][:1025])
    again = documents["kjv"][4][:40]
    learn(watched, "told", again * 15)
    learn(watched, "told", documents["kjv"][4][:5])
    session = at_rest(watched, "told")
    assert set(session["tokens_skipped"]) >= {"repetition", "short"}
    enter(page)
    expect(page.locator("#depth")).to_contain_text("in every layer: o_proj and down_proj, rank 64")
    facts = card(page, "told").locator(".facts")
    rate = session["rate"]
    expect(facts).to_contain_text(f"{rate:#.2g} (from 0.012)")
    for reason, words in {"repetition": "repeats itself", "short": "too short"}.items():
        count = session["tokens_skipped"][reason]
        expect(facts).to_contain_text(f"{count} tokens: {words}")
    card(page, "told").locator("svg").focus()
    page.keyboard.press("ArrowLeft")
    shown = [chunk for chunk in session["losses"] if chunk["loss"] is not None]
    assert shown[-1]["skipped"] is None, "what repeats itself or is too short is not scored, and has no point"
    rate = shown[-1]["rate"]
    expect(card(page, "told").locator(".readout")).to_contain_text(f"rate {rate:#.2g}")
    watched.http.delete("/v1/ttt/sessions/told")


def test_versions_and_charts_follow_as_it_happens(page: Page, watched: Served, documents: Documents) -> None:
    enter(page)
    learn(watched, "theirs", documents["kjv"][1][:300], key=OTHER)
    for turn in range(3):
        learn(watched, "alice", documents["kjv"][turn][:1025])
        session = at_rest(watched, "alice")
        expect(card(page, "alice").locator(".number")).to_have_text(str(session["version"]))
        shown = [chunk for chunk in session["losses"] if chunk["loss"] is not None]
        expect(card(page, "alice").locator("circle.session, circle.skipped")).to_have_count(len(shown))
        measured = [chunk for chunk in shown if chunk["frozen_loss"] is not None]
        assert measured
        expect(card(page, "alice").locator("circle.base")).to_have_count(len(measured))
    assert page.locator("article").count() == 1, "another key's session is not shown"


def test_a_pointer_that_leaves_before_the_chart_is_there(page: Page, watched: Served, documents: Documents) -> None:
    """It has no points to be read yet; that it is no error is what the fixture of the page says."""
    learn(watched, "slow", documents["man2"][0][:300])
    held: list[Route] = []
    holding = True
    page.route("**/v1/ttt/sessions/slow", lambda route: held.append(route) if holding else route.continue_())
    enter(page)
    chart = card(page, "slow").locator("svg")
    expect(chart).to_be_visible()
    for event in ("pointermove", "pointerleave", "blur"):
        chart.dispatch_event(event)
    page.wait_for_timeout(100)
    assert held, "the chart has not been asked for"
    holding = False
    for route in held:
        route.continue_()
    chart.dispatch_event("pointerleave")
    expect(card(page, "slow").locator(".readout")).to_contain_text("version")
    watched.http.delete("/v1/ttt/sessions/slow")


def test_freeze_and_unfreeze_with_the_keyboard(page: Page, watched: Served, documents: Documents) -> None:
    learn(watched, "frosty", documents["kjv"][0][:300])
    enter(page)
    freeze = card(page, "frosty").get_by_role("button", name="Freeze", exact=True)
    freeze.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Freeze “frosty”?")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(freeze).to_be_focused()
    assert not watched.session("frosty")["frozen"], "to look at the question changes nothing"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(card(page, "frosty").get_by_role("button", name="Unfreeze")).to_be_visible()
    expect(card(page, "frosty").locator(".badge.frozen")).to_be_visible()
    assert watched.session("frosty")["frozen"]
    do(page, "frosty", "Unfreeze")
    expect(card(page, "frosty").locator(".badge.frozen")).to_have_count(0)
    assert not watched.session("frosty")["frozen"]


def test_fork_roll_back_and_reset(page: Page, watched: Served, documents: Documents) -> None:
    enter(page)
    learn(watched, "trunk", documents["legal_a"][0][:600])
    early = at_rest(watched, "trunk")["version"]
    assert watched.http.post("/v1/ttt/sessions/trunk/save").status_code == 200
    learn(watched, "trunk", documents["legal_a"][1][:600])
    late = at_rest(watched, "trunk")["version"]
    assert late > early
    do(page, "trunk", "Fork", fill="not a name")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("1 to 128 characters")
    page.get_by_role("dialog").get_by_role("textbox").fill("branch")
    page.get_by_role("dialog").get_by_role("button", name="Fork").click()
    expect(card(page, "branch").locator(".number")).to_have_text(str(late))
    do(page, "trunk", "Roll back", choose=str(early))
    expect(card(page, "trunk").locator(".number")).to_have_text(str(early))
    assert watched.session("trunk")["version"] == early
    do(page, "branch", "Reset")
    expect(card(page, "branch").locator(".number")).to_have_text("0")
    assert (watched.session("branch")["version"], watched.session("trunk")["version"]) == (0, early)


def test_small_and_dark_screens(browser: Browser, page: Page, watched: Served, documents: Documents) -> None:
    for name, domain in {"support.chat-4711": "man2", "a" * 128: "py_dns"}.items():
        learn(watched, name, documents[domain][0][:700])
        at_rest(watched, name)
    enter(page)
    expect(card(page, "a" * 128)).to_be_visible()
    colours = set()
    screens: list[tuple[int, Literal["light", "dark"]]] = [(1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")]
    for width, scheme in screens:
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    plain = FIREFOX and browser.browser_type.name == "firefox"  # as it comes, playwright cannot tell it of dark screens
    assert len(colours) == (1 if plain else 2)


def test_hostile_names_are_only_text(page: Page, watched: Served) -> None:
    """The server lets no such session exist; the page does not rely on that."""
    bad = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>"
    session = {
        "session_id": bad, "version": 1, "tokens_seen": 1, "tokens_learned": 1, "tokens_skipped": {bad: 3}, "tokens_pending": 0,
        "requests_open": 0, "created": 0, "last_used": 0, "norm": {}, "tier": bad, "bytes": 1, "frozen": True, "error": bad,
        "saved_version": None, "losses": [{"version": 1, "tokens": 9, "loss": 1.0, "frozen_loss": None, "skipped": bad}],
        "versions": [1],
    }  # fmt: skip
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": bad}]}))
    page.route("**/v1/ttt/sessions", lambda route: route.fulfill(json={"sessions": [session]}))
    page.route("**/v1/ttt/sessions/*", lambda route: route.fulfill(json=session))
    enter(page)
    expect(card(page, bad).locator(".name")).to_have_text(bad)
    expect(card(page, bad).locator(".error")).to_have_text(bad)
    expect(page.locator("#model")).to_have_text(bad)
    card(page, bad).get_by_role("button", name="Reset").click()
    expect(page.get_by_role("dialog")).to_contain_text(bad)
    assert page.locator("img").count() == 0
    assert page.title() == "vllm-ttt: sessions"


def test_metrics_are_the_same_whichever_api_server_answers(watched: Served, documents: Documents) -> None:
    learn(watched, "counted", documents["man_fr"][0][:700])
    at_rest(watched, "counted")
    listed = [
        session
        for key in (KEY, OTHER)
        for session in watched.http.get("/v1/ttt/sessions", headers={"Authorization": f"Bearer {key}"}).json()["sessions"]
    ]
    learned, holders, texts = set(), set(), []
    for _ in range(16):  # each on a connection of its own, so that both are asked
        text = httpx.get(f"{watched.url}/metrics", timeout=60).text
        texts.append(text)
        learned.add(float(re.findall(r"^vllm:ttt_learned_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)[0]))
        tiers = dict(re.findall(r'^vllm:ttt_sessions\{.*tier="(\w+)"\} (\S+)$', text, re.MULTILINE))
        holders.add(sum(map(float, tiers.values())))
    assert len(learned) == 1
    assert learned.pop() >= sum(session["tokens_learned"] for session in listed if session["session_id"] != "branch") > 0
    assert holders == {float(len(listed))}
    assert all("vllm:num_requests_running" in text for text in texts), "vLLM's own are there too"


def test_pictures_for_the_documents(page: Page, watched: Served, documents: Documents) -> None:
    """What somebody sees who has three sessions: one new, one that learned a lot, one that is frozen."""
    for listed in watched.http.get("/v1/ttt/sessions").json()["sessions"]:
        watched.http.delete(f"/v1/ttt/sessions/{listed['session_id']}")
    for name, texts in {
        "reader": [documents["kjv"][0]] * 3,  # the guard would take more for an attack
        "support.chat-4711": documents["man2"][:3],
        "librarian": documents["py_networkx"][:2],
    }.items():
        for ids in texts:
            learn(watched, name, ids[:1025])
        at_rest(watched, name)
    watched.http.post("/v1/ttt/sessions/librarian/freeze")
    enter(page)
    expect(card(page, "reader").locator(".gain")).to_contain_text("perplexity")
    pictures: list[tuple[int, int, Literal["light", "dark"], str]] = [
        (1280, 900, "light", "ttt"),
        (1280, 900, "dark", "ttt-dark"),
        (390, 844, "light", "ttt-phone"),
    ]
    for width, height, scheme, name in pictures:
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(500)
        screenshot(page, name)
    session = watched.session("reader")
    measured = [chunk for chunk in session["losses"] if chunk["frozen_loss"] is not None]
    assert measured[-1]["frozen_loss"] - measured[-1]["loss"] > 0.3, "the picture would show nothing"


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
