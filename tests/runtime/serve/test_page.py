"""The chat page in a real browser: headless Chromium, by its own driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rkconvert.demo import questions

from .browsing import BROWSER, DRIVER, chromium, wait

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or its driver is not installed")


@pytest.fixture(scope="module")
def page_daemon(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("max_context: 256", RKEMU_TOKEN_US="60000")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: webdriver.Chrome, page_daemon: Any) -> webdriver.Chrome:
    browser.get(page_daemon.url)
    wait(browser, lambda: "ready" in browser.find_element(By.ID, "board").text)
    return browser


def ask(page: webdriver.Chrome, text: str) -> None:
    page.find_element(By.ID, "text").send_keys(text, Keys.ENTER)


def shown(page: webdriver.Chrome, kind: str) -> list[str]:
    return [element.text for element in page.find_elements(By.CLASS_NAME, kind)]


def test_a_conversation(page: webdriver.Chrome, tmp_path: Path) -> None:
    assert page.find_element(By.ID, "emulated").is_displayed()
    ask(page, FIRST)
    # It streams: a part is there before the whole.
    wait(page, lambda: 0 < len("".join(shown(page, "assistant"))) < len(QA[FIRST]))
    wait(page, lambda: shown(page, "figures"))
    assert shown(page, "assistant") == [QA[FIRST]]
    assert "tokens/s (emulated)" in shown(page, "figures")[0]
    ask(page, "Does it work?")
    wait(page, lambda: len(shown(page, "figures")) == 2)
    assert shown(page, "assistant") == [QA[FIRST], QA["Does it work?"]]
    assert "from the cache" in shown(page, "figures")[1]
    page.save_screenshot(str(tmp_path / "page.png"))
    page.find_element(By.ID, "clear").click()
    assert shown(page, "message") == []


def test_stop_frees_the_board(page: webdriver.Chrome, page_daemon: Any) -> None:
    ask(page, FIRST)
    wait(page, lambda: "".join(shown(page, "assistant")))
    page.find_element(By.ID, "stop").click()
    wait(page, lambda: shown(page, "note") == ["stopped"])
    page_daemon.wait_until(lambda: not page_daemon.request("GET", "/status")[2]["queue"]["busy"])
    assert QA[FIRST].startswith(shown(page, "assistant")[0])
    ask(page, "Does it work?")
    wait(page, lambda: shown(page, "figures"))


def test_clear_during_an_answer_leaves_nothing_of_it(page: webdriver.Chrome) -> None:
    clear = page.find_element(By.ID, "clear")
    for at_once in (False, True):
        ask(page, FIRST)
        wait(page, lambda: "".join(shown(page, "assistant")))
        clear.click()
        assert shown(page, "message") == []
        if not at_once:
            wait(page, lambda: page.find_element(By.ID, "send").is_displayed())
        for number in (1, 2):
            ask(page, "Does it work?")
            wait(page, lambda number=number: len(shown(page, "figures")) == number)
            assert shown(page, "assistant") == number * [QA["Does it work?"]]
            assert shown(page, "error") == shown(page, "note") == []
        said = page.execute_script("return messages.map((message) => message.role)")
        assert said == ["user", "assistant"] * 2
        clear.click()


def test_clear_before_the_answer_begins(page: webdriver.Chrome) -> None:
    """And again and again: what was cleared ends in silence."""
    for _ in range(5):
        ask(page, FIRST)
        page.find_element(By.ID, "clear").click()
    ask(page, "Does it work?")
    wait(page, lambda: shown(page, "figures"))
    assert shown(page, "message") == ["Does it work?", QA["Does it work?"]]
    assert shown(page, "error") == shown(page, "note") == []
    assert page.execute_script("return messages.length") == 2


def test_turns_that_are_dropped_are_shown(page: webdriver.Chrome) -> None:
    text = page.find_element(By.ID, "text")
    for number in range(2):
        page.execute_script("arguments[0].value = 'word '.repeat(120)", text)
        text.send_keys(Keys.ENTER)
        # The demo model may have nothing to say to this.
        wait(page, lambda number=number: len(shown(page, "figures")) == number + 1)
    assert shown(page, "note") == ["The context was full: the oldest turn was dropped."]


def test_what_is_said_is_never_markup(page: webdriver.Chrome) -> None:
    ask(page, "<img src=x onerror=document.title='owned'><b>bold</b>")
    wait(page, lambda: page.find_element(By.ID, "send").is_displayed())
    assert shown(page, "user") == ["<img src=x onerror=document.title='owned'><b>bold</b>"]
    assert page.find_elements(By.CSS_SELECTOR, "main img, main b") == []
    assert page.title != "owned"


def test_an_error_is_shown_and_the_next_question_works(page: webdriver.Chrome) -> None:
    text = page.find_element(By.ID, "text")
    page.execute_script("arguments[0].value = 'word '.repeat(400)", text)
    text.send_keys(Keys.ENTER)
    wait(page, lambda: shown(page, "error"))
    assert "tokens" in shown(page, "error")[0]
    ask(page, "Does it work?")
    wait(page, lambda: shown(page, "figures"))
    assert shown(page, "assistant") == [QA["Does it work?"]]


def test_nothing_is_loaded_from_elsewhere(page: webdriver.Chrome, page_daemon: Any) -> None:
    names = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(page_daemon.url) or name == "data:," for name in names), names
    severe = [
        entry for entry in page.get_log("browser") if entry["level"] == "SEVERE" and "400" not in entry["message"]
    ]
    assert severe == []
