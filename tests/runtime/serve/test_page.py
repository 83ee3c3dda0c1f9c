"""The chat page in a real browser: headless Chromium, by its own driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rkconvert.demo import questions

from .browsing import BROWSER, DRIVER, Page, chromium, wait

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
ECHO = "tests.runtime.serve.echo"
LONG = "one two three four five six seven eight nine ten " * 8

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or its driver is not installed")


@pytest.fixture(scope="module")
def demo(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("max_context: 256", RKEMU_TOKEN_US="60000")


@pytest.fixture(scope="module")
def echo(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("", ECHO, ECHO_BYTE_S="0.004")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium("--window-size=1280,800") as one:
        yield one


@pytest.fixture
def page(browser: webdriver.Chrome, demo: Any) -> Page:
    return Page(browser, demo.url)


@pytest.fixture
def echoing(browser: webdriver.Chrome, echo: Any) -> Page:
    return Page(browser, echo.url)


# --- questions and answers


def test_a_conversation(page: Page) -> None:
    assert page.one("#emulated").is_displayed()
    page.ask(FIRST)
    # It streams: a part is there before the whole.
    wait(page.browser, lambda: 0 < len("".join(page.answers())) < len(QA[FIRST]))
    page.wait_idle()
    assert page.answers() == [QA[FIRST]]
    assert "tokens/s (emulated)" in page.texts(".figures")[0]
    page.ask("Does it work?")
    page.wait_idle()
    assert page.answers() == [QA[FIRST], QA["Does it work?"]]
    assert "from the cache" in page.texts(".figures")[1]
    assert "first token after" in page.texts(".figures")[1]


def test_an_opening_with_questions_and_what_is_private(page: Page) -> None:
    assert "nowhere else" in page.one("#private").text
    assert "Everybody who can open this page shares them." in page.one("#private").text
    questions = page.all("#questions button")
    assert len(questions) == 3
    text = questions[0].text
    questions[0].click()
    page.wait_idle()
    assert page.questions() == [text]
    assert not page.one("#opening").is_displayed()


def test_stop_frees_the_board_and_the_rest_can_be_had_later(page: Page, demo: Any) -> None:
    page.ask(FIRST)
    wait(page.browser, lambda: "".join(page.answers()))
    page.one("#stop").click()
    wait(page.browser, lambda: page.texts(".reason p") == ["Stopped."])
    demo.wait_until(lambda: not demo.request("GET", "/status")[2]["queue"]["busy"])
    part = page.answers()[0]
    assert QA[FIRST].startswith(part)
    assert part != QA[FIRST]
    page.press("Continue")
    page.wait_idle()
    assert page.answers() == [QA[FIRST]]
    assert page.texts(".reason p") == [""]


def test_an_interrupted_answer_is_there_after_a_reload_and_goes_on(echoing: Page) -> None:
    page, whole = echoing, " ".join(f"word {number}" for number in range(150))
    page.type(whole)
    page.send()
    wait(page.browser, lambda: "".join(page.answers()))
    page.reload()
    wait(page.browser, lambda: "".join(page.answers()))
    assert page.questions() == [whole]
    assert page.typed() == ""
    assert page.answers()[0] != whole
    page.press("Continue")
    page.wait_idle()
    assert page.answers() == [whole]
    page.reload()
    wait(page.browser, lambda: page.answers() == [whole])
    assert page.buttons("Continue") == []


def test_regenerate_replaces_the_answer_and_keeps_the_earlier_in_reach(page: Page) -> None:
    page.ask(FIRST)
    page.wait_idle()
    page.press("Regenerate")
    page.wait_idle()
    assert [page.one("#turns > .assistant > .said").text] == [QA[FIRST]]
    assert "Word for word the same" in page.one("#turns > .assistant > .notes").text
    page.one(".earlier summary").click()
    assert page.one(".earlier .said").text == QA[FIRST]
    page.reload()
    wait(page.browser, lambda: page.answers() == [QA[FIRST]])


def test_regenerate_that_fails_leaves_the_answer(page: Page) -> None:
    page.ask(FIRST)
    page.wait_idle()
    with page.offline():
        page.press("Regenerate")
        wait(page.browser, lambda: "does not answer" in page.one("#problem").text)
    assert page.answers() == [QA[FIRST]]
    page.press("Regenerate")
    page.wait_idle()
    assert page.all(".earlier")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_new_chat_during_an_answer_has_nothing_of_it(page: Page, at_once: bool) -> None:
    page.ask(FIRST)
    if not at_once:
        wait(page.browser, lambda: "".join(page.answers()))
    page.one("#new").click()
    assert page.questions() == page.answers() == []
    page.one("#text").clear()
    for number in (1, 2):
        page.ask("Does it work?")
        page.wait_idle()
        assert page.answers() == number * [QA["Does it work?"]]
        assert page.texts(".reason p") == [""] * number
        assert not page.one("#problem").is_displayed()


def test_turns_that_must_be_forgotten_are_asked_for(page: Page) -> None:
    page.type("word " * 120)
    page.send()
    page.wait_idle()
    page.type("word " * 119)
    page.send()
    wait(page.browser, lambda: page.buttons("Forget the oldest turns and send"))
    assert page.typed() == ("word " * 119).strip()
    page.press("Forget the oldest turns and send")
    page.wait_idle()
    assert "The context was full: the oldest turn was dropped." in page.texts(".notes")[-1]
    assert len(page.questions()) == 2


def test_a_question_for_a_full_conversation_can_move_to_a_new_one(page: Page) -> None:
    for text in ("word " * 120, "word " * 119):
        page.type(text)
        page.send()
        wait(page.browser, lambda: page.one("#send").is_displayed())
    page.press("Ask in a new chat")
    assert page.questions() == []
    assert page.typed().startswith("word word")
    page.send()
    page.wait_idle()
    assert len(page.questions()) == 1


def test_the_system_prompt_belongs_to_the_conversation(page: Page) -> None:
    page.one("#system").click()
    page.one("#system-dialog textarea").send_keys("Be brief.")
    page.press("Save")
    assert "Be brief." in page.one("#instructed").text
    page.reload()
    wait(page.browser, lambda: "Be brief." in page.one("#instructed").text)
    page.ask("Does it work?")
    page.wait_idle()
    assert page.fetched(f"/sessions/{page.name()}")["system"] == "Be brief."
    page.one("#instructed").click()
    page.one("#system-dialog textarea").clear()
    page.press("Save")
    wait(page.browser, lambda: not page.one("#instructed").is_displayed())
    assert page.fetched(f"/sessions/{page.name()}")["system"] == ""
    page.one("#new").click()
    assert not page.one("#instructed").is_displayed()


def test_the_next_question_need_not_wait_for_markdown(page: Page) -> None:
    page.browser.execute_script(
        "const before = window.fetch, pause = () => new Promise((done) => setTimeout(done, 800));"
        "window.fetch = async (path, given) => { if (path === '/markdown') await pause();"
        " return before(path, given); };"
    )
    for _ in range(2):
        page.ask("Does it work?")
        wait(page.browser, lambda: page.one("#send").is_displayed())
    page.press("Regenerate")
    wait(page.browser, lambda: page.one("#send").is_displayed())
    page.ask("Does it work?")
    page.wait_idle()
    assert page.answers() == [QA["Does it work?"]] * 3
    assert len(page.questions()) == 3
    assert page.typed() == ""


# --- nothing that was written is lost


def test_a_draft_outlives_a_reload_and_belongs_to_its_conversation(page: Page) -> None:
    page.ask("Does it work?")
    page.wait_idle()
    page.type("half a\nquestion")
    page.reload()
    wait(page.browser, lambda: page.typed() == "half a\nquestion")
    page.one("#new").click()
    assert page.typed() == ""
    page.type("another one")
    page.browser.back()
    wait(page.browser, lambda: page.typed() == "half a\nquestion")
    page.one("#new").click()
    wait(page.browser, lambda: page.typed() == "another one")
    page.one("#text").clear()


def test_what_is_typed_while_a_question_is_on_its_way_stays(page: Page) -> None:
    page.type("typed before")
    page.browser.execute_script("window.fetch = () => new Promise(() => {})")  # the daemon takes its time
    page.all("#questions button")[0].click()
    assert page.typed() == "typed before"
    page.one("#text").send_keys(", and after")
    asked = page.questions()[0]
    page.reload()
    wait(page.browser, lambda: page.typed() == f"{asked}\n\ntyped before, and after")
    page.one("#text").clear()


def test_a_question_that_could_not_be_sent_comes_back(page: Page) -> None:
    with page.offline():
        page.ask("Does it work?")
        wait(page.browser, lambda: page.typed() == "Does it work?")
        assert "does not answer" in page.one("#problem").text
        assert page.questions() == page.answers() == []
    page.send()
    page.wait_idle()
    assert page.answers() == [QA["Does it work?"]]
    assert not page.one("#problem").is_displayed()


def test_a_question_that_is_too_long_comes_back(page: Page) -> None:
    page.type("word " * 400)
    page.send()
    wait(page.browser, lambda: "tokens" in page.one("#problem").text)
    assert page.typed().count("word") == 400
    page.one("#text").clear()
    page.ask("Does it work?")
    page.wait_idle()
    assert page.answers() == [QA["Does it work?"]]


def test_stop_before_the_first_word_gives_the_question_back(page: Page, demo: Any) -> None:
    for _ in range(4):
        page.type(FIRST)
        page.send()
        page.browser.execute_script("document.getElementById('stop').click()")
        page.wait_idle()
        assert page.typed() == FIRST or page.answers()
        page.one("#new").click()
        page.one("#text").clear()


def test_an_answer_whose_connection_breaks_stays_and_goes_on(echoing: Page) -> None:
    echoing.type(LONG)
    echoing.send()
    wait(echoing.browser, lambda: "".join(echoing.answers()))
    name = echoing.name()
    # Another client takes the conversation over, which ends this stream as a broken line would.
    echoing.fetched(f"/sessions/{name}", "PUT", {})
    echoing.wait_idle()
    assert echoing.texts(".reason p")[0]
    part = echoing.answers()[0]
    assert LONG.startswith(part)
    echoing.press("Continue")
    echoing.wait_idle(60)
    assert echoing.answers() == [LONG.strip()]


# --- conversations


def test_conversations_are_listed_opened_and_deleted(page: Page) -> None:
    for text in ("Does it work?", "问题 是什么", "Does it work?"):
        page.one("#new").click()
        page.ask(text)
        page.wait_idle()
    last = page.names()[:3]
    assert [name.rstrip("-0123456789") for name in last] == ["does-it-work", "chat", "does-it-work"]
    assert len(set(last)) == 3
    wait(
        page.browser, lambda: page.texts("#conversations bdi")[:3] == ["Does it work?", "问题 是什么", "Does it work?"]
    )
    page.all("#conversations a")[1].click()
    wait(page.browser, lambda: page.questions() == ["问题 是什么"])
    wait(page.browser, lambda: page.texts("#conversations [aria-current] bdi") == ["问题 是什么"])
    deleted = page.name()
    page.all("#conversations button")[1].click()
    page.press("Cancel")
    assert deleted in page.names()
    page.all("#conversations button")[1].click()
    page.press("Delete")
    wait(page.browser, lambda: deleted not in page.names())
    assert page.questions() == []
    page.browser.back()
    wait(page.browser, lambda: "no session" in page.one("#problem").text)


def test_one_that_another_client_has_begun_goes_on_here(page: Page) -> None:
    turns = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": QA[FIRST]}]
    kept = {"schema": "rkedge-conversation/1", "system": "", "messages": turns}
    page.fetched("/sessions/from-a-terminal", "PUT", {"conversation": kept})
    page.browser.get(page.url + "/#chat=from-a-terminal")
    page.reload()
    wait(page.browser, lambda: page.answers() == [QA[FIRST]])
    assert page.buttons("Regenerate") == page.buttons("Continue") == []
    page.ask("Does it work?")
    page.wait_idle()
    assert len(page.fetched("/sessions/from-a-terminal")["messages"]) == 4
    page.fetched("/sessions/from-a-terminal", "DELETE")


# --- keys


def test_the_page_of_a_daemon_with_keys(
    browser: webdriver.Chrome, start_daemon: Callable[..., Any], tmp_path: Any
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann {'k' * 32}\n")
    keys.chmod(0o600)
    daemon = start_daemon(f"listen: {{api_keys: {keys}}}", ECHO)
    browser.get(daemon.url)
    wait(browser, lambda: browser.find_element(By.ID, "key-dialog").is_displayed())
    assert browser.find_elements(By.CSS_SELECTOR, "#questions button") == []
    browser.find_element(By.CSS_SELECTOR, "#key-dialog input").send_keys("k" * 32, Keys.ENTER)
    wait(browser, lambda: "ready" in browser.find_element(By.ID, "board").text)
    page = Page(browser, daemon.url)
    assert "Nobody else's page" in page.one("#private").text
    page.ask("one")
    page.wait_idle()
    assert page.answers() == ["one"]


def test_a_link_does_not_decide_who_asks(
    browser: webdriver.Chrome, start_daemon: Callable[..., Any], tmp_path: Any
) -> None:
    """With a key of their own in it, whoever made the link could read what others ask through it."""
    keys = tmp_path / "keys"
    keys.write_text(f"ann {'a' * 32}\neve {'e' * 32}\n")
    keys.chmod(0o600)
    daemon = start_daemon(f"listen: {{api_keys: {keys}}}", ECHO)
    browser.get(f"{daemon.url}/#key={'e' * 32}")
    wait(browser, lambda: browser.find_element(By.ID, "key-dialog").is_displayed())
    browser.find_element(By.CSS_SELECTOR, "#key-dialog input").send_keys("a" * 32, Keys.ENTER)
    wait(browser, lambda: "ready" in browser.find_element(By.ID, "board").text)
    page = Page(browser, daemon.url)
    browser.get(f"{daemon.url}/#key={'e' * 32}&chat=x")
    page.reload()
    wait(browser, lambda: "ready" in browser.find_element(By.ID, "board").text)
    assert browser.execute_script("return Object.values(sessionStorage)").count("a" * 32) == 1
    assert not browser.execute_script("return JSON.stringify(sessionStorage)").count("e" * 32)


# --- by keyboard


def focused(page: Page) -> str:
    return page.browser.execute_script("return document.activeElement.id || document.activeElement.textContent")


def press(page: Page, *keys: str, shift: bool = False) -> None:
    chain = webdriver.ActionChains(page.browser)
    if shift:
        chain.key_down(Keys.SHIFT)
    chain.send_keys(*keys).key_up(Keys.SHIFT).perform()


def test_everything_can_be_reached_by_keyboard(page: Page) -> None:
    assert focused(page) == "text"
    press(page, FIRST)
    press(page, Keys.ENTER, shift=True)
    press(page, "!")
    assert page.typed() == f"{FIRST}\n!"
    page.type("")
    press(page, FIRST, Keys.ENTER)
    wait(page.browser, lambda: "".join(page.answers()))
    press(page, Keys.ESCAPE)
    wait(page.browser, lambda: page.texts(".reason p") == ["Stopped."])
    assert focused(page) == "text"
    reached = []
    for _ in range(99):
        press(page, Keys.TAB, shift=True)
        reached.append(focused(page))
        if reached[-1] == "new":
            break
    assert reached[:4] == ["Regenerate", "Copy", "Continue", "talk"]
    assert reached[-1] == "new"
    press(page, Keys.ENTER)
    assert page.questions() == []
    assert focused(page) == "text"
    for wanted in ("system", "send"):
        press(page, Keys.TAB)
        assert focused(page) == wanted
    page.one("#system").click()
    press(page, "x", Keys.ESCAPE)
    assert focused(page) == "system"
    assert not page.one("#instructed").is_displayed()


def test_what_a_screen_reader_is_told(page: Page) -> None:
    page.ask(FIRST)
    wait(page.browser, lambda: page.one(".assistant").get_attribute("aria-busy") == "true")
    page.wait_idle()
    assert page.one(".assistant").get_attribute("aria-busy") == "false"
    spoken = page.browser.execute_script("return document.getElementById('spoken').textContent")
    assert spoken == QA[FIRST]
    headings = page.browser.execute_script(
        "return [...document.querySelectorAll('#turns h2')].map((h) => h.textContent)"
    )
    assert headings == ["You", "Answer"]
