"""A browser behind the tunnel that docs/serve.md names: the daemon's own page works, and no other page gets anything.

`ssh -L` takes a local port to the Unix socket, so that the daemon sees a user of the board. A page from elsewhere tries
what a page can: requests that need no leave, requests that do, and a name of its own that leads to the port.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rkconvert.demo import questions
from rkruntime.errors import UsageError
from rkruntime.serve.settings import Listen, check_listen

from .browsing import BROWSER, DRIVER, chromium, wait
from .sshd import SSHD, connect, forwarding, free_port, running_board

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
EVIL = "evil.example"

pytestmark = pytest.mark.skipif(
    not (DRIVER and BROWSER and Path(SSHD).exists()), reason="chromium, its driver or openssh-server is not installed"
)
# What a page does to the daemon at `target`, and what it can tell of it: for each attempt "error" or the text it read.
ATTACK = """
const [target, done] = arguments;
const chat = JSON.stringify({messages: [{role: "user", content: "steal"}], max_tokens: 3});
const put = JSON.stringify({system: "stolen"});
const form = new URLSearchParams({content: "steal"});
const json = {"Content-Type": "application/json"};
const attempts = {
  "simple get": [target + "/sessions/diary", {}],
  "opaque get": [target + "/sessions/diary", {mode: "no-cors"}],
  "simple post": [target + "/v1/chat/completions", {method: "POST", body: chat}],
  "opaque post": [target + "/v1/chat/completions", {method: "POST", body: chat, mode: "no-cors"}],
  "ollama": [target + "/api/chat", {method: "POST", body: chat, mode: "no-cors"}],
  "blob": [target + "/sessions/diary/messages", {method: "POST", body: new Blob([chat]), mode: "no-cors"}],
  "form": [target + "/sessions/a/messages", {method: "POST", body: form, mode: "no-cors"}],
  "json": [target + "/v1/chat/completions", {method: "POST", body: chat, headers: json}],
  "put": [target + "/sessions/diary", {method: "PUT", body: put, headers: json}],
  "named put": [target + "/sessions/diary", {method: "PUT", body: put, headers: {...json, "X-RKEdge-User": "bob"}}],
  "delete": [target + "/sessions/diary", {method: "DELETE"}],
};
(async () => {
  const found = {beacon: String(navigator.sendBeacon(target + "/v1/chat/completions", chat))};
  for (const [name, [url, options]] of Object.entries(attempts)) {
    try { found[name] = await (await fetch(url, options)).text(); } catch (error) { found[name] = "error"; }
  }
  await new Promise((ready) => {
    const script = document.createElement("script");
    script.onload = () => { found.script = "loaded"; ready(); };
    script.onerror = () => { found.script = "error"; ready(); };
    script.src = target + "/sessions/diary";
    document.head.append(script);
  });
  done(found);
})();
"""
FORM = """
const form = document.createElement("form");
form.method = "POST"; form.enctype = "text/plain"; form.action = arguments[0] + "/v1/chat/completions";
const field = document.createElement("input");
field.name = '{"messages":[{"role":"user","content":"steal"}],"max_tokens":3,"user":"'; field.value = '"}';
form.append(field); document.body.append(form); form.submit();
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of another web server on this machine."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("<!doctype html><title>another page</title><link rel=icon href=data:,><body>")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tunnel(start_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int]]:
    """A daemon, and the near end of a tunnel to its Unix socket."""
    daemon = start_daemon()
    port = free_port()
    with (
        running_board(daemon, tmp_path_factory.mktemp("ssh")) as board,
        forwarding(board, "-L", f"127.0.0.1:{port}:{daemon.socket}", "open"),
    ):
        connect(board, port).close()
        yield daemon, port


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    # As a DNS server of the attacker's would: the name of the page leads to this machine.
    with chromium(f"--host-resolver-rules=MAP {EVIL} 127.0.0.1") as one:
        yield one


def test_the_page_works_through_the_tunnel(browser: webdriver.Chrome, tunnel: tuple[Any, int]) -> None:
    browser.get(f"http://localhost:{tunnel[1]}/")
    wait(browser, lambda: "ready" in browser.find_element(By.ID, "board").text)
    browser.find_element(By.ID, "text").send_keys(FIRST, Keys.ENTER)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".figures li"))
    assert browser.find_element(By.CSS_SELECTOR, ".assistant .said").text == QA[FIRST]


@pytest.mark.parametrize("kind", ["tunnel", "loopback"])
@pytest.mark.parametrize("host", [EVIL, "127.0.0.1"])
def test_another_page_gets_nothing_and_does_nothing(
    browser: webdriver.Chrome, tunnel: tuple[Any, int], elsewhere: int, kind: str, host: str
) -> None:
    daemon, near = tunnel
    port = near if kind == "tunnel" else daemon.port
    assert daemon.request("PUT", "/sessions/diary", {"system": "secret"})[0] == 200
    before = daemon.metric("rkedge_generated_tokens_total")
    browser.set_script_timeout(30)
    browser.get(f"http://{host}:{elsewhere}/")
    assert browser.title == "another page"
    for target in (f"http://localhost:{port}", f"http://127.0.0.1:{port}", f"http://{EVIL}:{port}"):
        found = browser.execute_async_script(ATTACK, target)
        assert len(found) == 13
        # An opaque answer reads as nothing.
        assert {text for name, text in found.items() if name != "beacon"} <= {"error", ""}, found
        browser.execute_script(FORM, target)
        wait(browser, lambda: browser.current_url.endswith("/v1/chat/completions"))
        assert "refused" in browser.page_source or "does not answer to the name" in browser.page_source
        browser.get(f"http://{host}:{elsewhere}/")
    assert daemon.request("GET", "/sessions/diary")[2] == {
        "schema": "rkedge-conversation/1",
        "messages": [],
        "system": "secret",
    }
    assert daemon.metric("rkedge_generated_tokens_total") == before
    assert not daemon.request("GET", "/status")[2]["queue"]["busy"]


@pytest.mark.parametrize("kind", ["tunnel", "loopback"])
def test_a_name_that_is_made_to_lead_here_gets_nothing(
    browser: webdriver.Chrome, tunnel: tuple[Any, int], kind: str
) -> None:
    """DNS rebinding: to the browser, page and daemon are one origin, and every answer may be read."""
    daemon, near = tunnel
    port = near if kind == "tunnel" else daemon.port
    assert daemon.request("PUT", "/sessions/diary", {"system": "secret"})[0] == 200
    before = daemon.metric("rkedge_generated_tokens_total")
    browser.get(f"http://{EVIL}:{port}/")
    assert "does not answer to the name" in browser.page_source
    found = browser.execute_async_script(ATTACK, f"http://{EVIL}:{port}")
    read = {name: text for name, text in found.items() if name not in ("beacon", "script")}
    assert all(text == "" or "does not answer to the name" in text for text in read.values()), read
    assert found["script"] == "error"
    assert daemon.request("GET", "/sessions/diary")[2]["system"] == "secret"
    assert daemon.metric("rkedge_generated_tokens_total") == before


def test_a_page_that_frames_the_chat_page_shows_nothing(
    browser: webdriver.Chrome, tunnel: tuple[Any, int], elsewhere: int
) -> None:
    browser.get(f"http://127.0.0.1:{elsewhere}/")
    browser.execute_script(
        "const frame = document.createElement('iframe'); frame.src = arguments[0]; document.body.append(frame);",
        f"http://localhost:{tunnel[1]}/",
    )
    browser.switch_to.frame(0)
    assert not browser.find_elements(By.ID, "text")
    browser.switch_to.default_content()


ASK = """
const [target, done] = arguments;
const body = JSON.stringify({messages: [{role: "user", content: "What is the RK3588?"}], seed: 5});
fetch(target + "/v1/chat/completions", {method: "POST", body, headers: {"Content-Type": "application/json"}})
  .then(async (found) => done([(await found.json()).choices[0].message.content, found.headers.get("X-RKEdge-Ignored")]))
  .catch((error) => done(String(error)));
"""


def test_a_page_that_the_settings_name(
    browser: webdriver.Chrome, start_daemon: Callable[..., Any], elsewhere: int
) -> None:
    daemon = start_daemon(f"listen: {{origins: ['http://127.0.0.1:{elsewhere}']}}")
    browser.set_script_timeout(30)
    browser.get(f"http://127.0.0.1:{elsewhere}/")
    assert browser.execute_async_script(ASK, daemon.url) == [QA[FIRST], "seed"]
    browser.get(f"http://localhost:{elsewhere}/")  # another origin, the same server
    assert "TypeError" in browser.execute_async_script(ASK, daemon.url)
    for origin in ("null", "http://evil.example", f"http://127.0.0.1:{elsewhere}.evil.example"):
        headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        assert daemon.request("GET", "/sessions", headers=headers)[0] == 403


@pytest.mark.parametrize("origin", ["*", "null", "http://*.example", "http://a/", "http://a@b", "a", "HTTP://A", ""])
def test_what_is_not_an_origin(origin: str) -> None:
    with pytest.raises(UsageError, match=r"listen\.origins"):
        check_listen(Listen(origins=(origin,)))
