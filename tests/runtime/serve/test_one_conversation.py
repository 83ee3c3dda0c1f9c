"""A conversation that several clients have open: nobody's answer is ended, and no question ends up behind another's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from selenium import webdriver

from rkruntime.chat.attach import UnixConnection
from rkruntime.chat.remotechat import RemoteChat
from rkruntime.chat.ways import on_this_machine
from rkruntime.errors import ServiceError

from .browsing import BROWSER, DRIVER, Page, chromium, wait

FIRST = "What is the RK3588?"
needs_browser = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or its driver is not installed")


def asked(daemon: Any, name: str, question: str, **more: Any) -> tuple[int, str]:
    """Status, and the code of an error."""
    body = {"content": question, "max_tokens": 3, **more}
    status, _, answer = daemon.request("POST", f"/sessions/{name}/messages", body)
    return status, answer["error"]["code"] if status >= 400 else ""


def test_a_client_that_says_what_it_knows_changes_nothing_else(daemon: Any) -> None:
    """With `after`, a question is never put into another conversation than the client shows."""
    put = partial(daemon.request, "PUT", "/sessions/after")
    changed, gone = (409, "session_changed"), (404, "session_not_found")
    assert asked(daemon, "after", "What is an NPU?", id="1", after="") == (200, "")
    before = daemon.request("GET", "/sessions/after")[2]
    for after in ("", "0"):
        assert asked(daemon, "after", "What is prefill?", id="2", after=after) == changed
        assert put({"system": "x", "after": after})[0] == 409
    assert daemon.request("GET", "/sessions/after")[2] == before
    assert asked(daemon, "after", "What is an NPU?", id="1", after="0") == (200, "")  # once more
    assert asked(daemon, "after", "What is prefill?", id="2", after="1") == (200, "")
    assert put({"system": "Be terse.", "after": "2"})[0] == 200
    assert put({"system": "Be very terse.", "after": "2"})[0] == 200
    assert asked(daemon, "after", "What is a tokenizer?", after="2") == (200, "")  # without a name of its own
    assert asked(daemon, "after", "What is prefill?", id="3", after="2") == changed
    daemon.request("DELETE", "/sessions/after")
    assert asked(daemon, "after", "What is prefill?", id="3", after="2") == gone
    assert daemon.request("GET", "/sessions/after")[0] == 404
    assert put({"system": "mine", "after": ""})[0] == put({"system": "mine", "after": ""})[0] == 200
    assert put({"system": "yours", "after": ""})[0] == 409
    daemon.request("DELETE", "/sessions/after")


def test_an_answer_is_not_ended_by_who_does_not_know_of_it(slow: Any) -> None:
    """But at once by who does, and soon after its own client has gone."""
    question = {"content": "What is the RK3588?", "id": "1"}
    connection = UnixConnection(slow.socket)
    connection.request("POST", "/sessions/busy/messages", json.dumps({**question, "after": ""}))
    stream = connection.getresponse()
    assert b"begin" in stream.readline()
    assert asked(slow, "busy", "What is an NPU?", id="2", after="") == (409, "session_changed")
    assert slow.request("PUT", "/sessions/busy", {"system": "x", "after": ""})[0] == 409
    assert json.loads(stream.read().splitlines()[-1])["type"] == "done"
    connection.request("POST", "/sessions/busy/messages", json.dumps({**question, "id": "3", "after": "1"}))
    stream = connection.getresponse()
    assert b"begin" in stream.readline()
    stream.close()
    connection.close()
    kept = slow.request("GET", "/sessions/busy")[2]
    status = asked(slow, "busy", "What is an NPU?", id="4", after=kept["number"])[0]
    assert status == 200 or slow.request("GET", "/sessions/busy")[2]["number"] == "3"
    slow.request("DELETE", "/sessions/busy")


# --- chats in a terminal


def test_a_chat_whose_conversation_goes_on_elsewhere(slow: Any) -> None:
    """It says so, once, and nothing is asked behind turns that it does not know of."""
    way = on_this_machine(slow.socket, "its log")
    one, two = (RemoteChat(way, session="shared", system="", options={"max_tokens": 3}) for _ in range(2))

    def turns() -> list[str]:
        return [item["content"] for item in slow.request("GET", "/sessions/shared")[2]["messages"][::2]]

    try:
        list(one.ask("one"))
        with pytest.raises(ServiceError, match="went on elsewhere"):
            list(two.ask("two"))
        list(two.ask("two"))
        with pytest.raises(ServiceError, match="went on elsewhere"):
            list(one.ask("three"))
        assert turns() == ["one", "two"]
        list(one.ask("three"))
        list(one.ask("four"))
        one.set_system("Be terse.")
        list(one.ask("five"))
        assert turns() == ["one", "two", "three", "four", "five"]
        slow.request("DELETE", "/sessions/shared")
        with pytest.raises(ServiceError, match="does not have this conversation"):
            list(one.ask("six"))
        list(one.ask("six"))
        assert turns() == ["six"]
        pieces = one.ask("What is the RK3588?")
        next(pieces)
        one.stop()
        list(pieces)
        list(one.ask("eight"))
        assert turns() == ["six", "What is the RK3588?", "eight"]
    finally:
        one.close()
        two.close()
        slow.request("DELETE", "/sessions/shared")


# --- the chat page in two tabs


@pytest.fixture(scope="module")
def pace(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("temperature: 0", RKEMU_TOKEN_US="150000")


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    with chromium("--window-size=1280,800") as one:
        yield one


@pytest.fixture
def page(browser: webdriver.Chrome, pace: Any) -> Page:
    for name in [one["name"] for one in pace.request("GET", "/sessions", headers={})[2]["sessions"]]:
        pace.request("DELETE", f"/sessions/{name}")
    return Page(browser, pace.url)


class Tabs:
    """A page that is open twice."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._first = page.browser.current_window_handle
        page.browser.switch_to.new_window("tab")
        self._second = page.browser.current_window_handle
        self.address(page.url)
        self.first()

    def address(self, address: str) -> None:
        self.page.browser.get(address)
        wait(self.page.browser, lambda: "ready" in self.page.one("#board").text)

    def first(self) -> None:
        self.page.browser.switch_to.window(self._first)

    def second(self) -> None:
        self.page.browser.switch_to.window(self._second)


@needs_browser
def test_the_same_first_question_begins_two_conversations(page: Page) -> None:
    """The second tab asks while the first one's answer is written, and the daemon lists no conversation yet."""
    tabs = Tabs(page)
    page.ask(FIRST)
    wait(page.browser, lambda: page.answers() and page.answers()[0])
    tabs.second()
    page.ask(FIRST)
    page.wait_idle()
    second = page.name(), page.answers()
    tabs.first()
    page.wait_idle()
    assert page.answers() == second[1]
    assert {page.name(), second[0]} == {"what-is-the-rk3588", "what-is-the-rk3588-2"} == set(page.names())
    for name in page.names():
        assert len(page.fetched(f"/sessions/{name}")["messages"]) == 2
        page.fetched(f"/sessions/{name}", "DELETE")


@needs_browser
def test_a_conversation_that_has_gone_on_in_another_tab(page: Page) -> None:
    tabs = Tabs(page)
    page.ask(FIRST)
    page.wait_idle()
    name, address = page.name(), page.browser.current_url
    tabs.second()
    tabs.address(address)
    page.browser.refresh()
    wait(page.browser, lambda: len(page.answers()) == 1)
    page.ask("Does it work?")
    page.wait_idle()
    tabs.first()
    page.ask("What is prefill?")
    wait(page.browser, lambda: "went on elsewhere" in page.one("#problem").text)
    assert page.typed() == "What is prefill?"
    assert len(page.fetched(f"/sessions/{name}")["messages"]) == 4
    page.press("Show it")
    wait(page.browser, lambda: len(page.answers()) == 2)
    wait(page.browser, lambda: page.typed() == "What is prefill?")
    page.send()
    page.wait_idle()
    assert page.questions() == [FIRST, "Does it work?", "What is prefill?"]
    tabs.second()  # once more, and without looking
    page.ask("What is quantization?")
    wait(page.browser, lambda: page.buttons("Send anyway"))
    page.press("Send anyway")
    wait(page.browser, lambda: len(page.fetched(f"/sessions/{name}")["messages"]) == 8)
    page.wait_idle()
    page.fetched(f"/sessions/{name}", "DELETE")
    page.ask("Does it work?")
    wait(page.browser, lambda: "deleted" in page.one("#problem").text)
    assert page.names() == []
    page.press("Ask in a new chat")
    wait(page.browser, lambda: page.typed() == "Does it work?")
    page.send()
    page.wait_idle()
    assert page.names() == ["does-it-work"]
    page.fetched("/sessions/does-it-work", "DELETE")


SLOW_TO_OPEN = """
    const { fetch } = window;
    window.fetch = async (path, options) => {
        if (options.method === "GET" && path.startsWith("/sessions/")) await new Promise((go) => (window.go = go));
        return fetch(path, options);
    };
"""


@needs_browser
def test_what_is_asked_before_a_conversation_is_there_belongs_to_it(page: Page) -> None:
    page.ask(FIRST)
    page.wait_idle()
    name = page.name()
    page.one("#new").click()
    page.type("a draft of another one")
    page.browser.execute_script(SLOW_TO_OPEN)
    page.browser.back()
    wait(page.browser, lambda: page.browser.execute_script("return Boolean(window.go)"))
    assert page.typed() == ""
    page.ask("Does it work?")
    assert page.typed() == "Does it work?"
    page.browser.execute_script("window.go()")
    wait(page.browser, lambda: len(page.answers()) == 2)
    page.wait_idle()
    assert page.names() == [name]
    assert page.questions() == [FIRST, "Does it work?"]
    page.one("#new").click()
    wait(page.browser, lambda: page.typed() == "a draft of another one")
    page.fetched(f"/sessions/{name}", "DELETE")


@needs_browser
def test_one_that_cannot_be_opened_is_not_begun_anew(page: Page) -> None:
    page.browser.get(page.url + "/#chat=nowhere")
    page.browser.refresh()
    wait(page.browser, lambda: "nowhere" in page.one("#problem").text)
    page.ask("Does it work?")
    assert page.typed() == "Does it work?"
    assert page.names() == page.questions() == []
    page.press("Ask in a new chat")
    assert page.typed() == "Does it work?"


@needs_browser
def test_each_tab_has_its_own_draft(page: Page) -> None:
    tabs = Tabs(page)
    page.type("the first tab's")
    tabs.second()
    page.type("the second tab's")
    tabs.first()
    page.reload()
    wait(page.browser, lambda: page.typed() == "the first tab's")
    tabs.second()
    page.one("#text").clear()
    page.ask("Does it work?")
    page.wait_idle()
    tabs.first()
    page.reload()
    wait(page.browser, lambda: page.typed() == "the first tab's")
