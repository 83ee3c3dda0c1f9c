"""The chat page for everybody: axe-core finds nothing in either theme, and it fits a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest
from selenium import webdriver

from .browsing import BROWSER, DRIVER, Page, chromium, wait
from .test_page_answers import TEXT

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or its driver is not installed")

# All of axe-core's rules, those that it calls best practices too.
AXE = "const done = arguments[0]; axe.run(document).then((found) => done(found), (error) => done(String(error)));"


@pytest.fixture(scope="module")
def echo(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("max_context: 2048", "tests.runtime.serve.echo", ECHO_BYTE_S="0.002")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as one:
        one.set_script_timeout(60)
        yield one


def look(browser: webdriver.Chrome, theme: str, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture(
    params=[("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)], ids=lambda it: f"{it[0]}-{it[1]}"
)
def page(request: pytest.FixtureRequest, browser: webdriver.Chrome, echo: Any) -> Page:
    look(browser, *request.param)
    return Page(browser, echo.url)


def check(page: Page) -> None:
    """Nothing that axe-core objects to, and nothing wider than the window."""
    page.browser.execute_script(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.browser.execute_async_script(AXE)
    wrong = [(item["id"], [node["html"][:200] for node in item["nodes"]]) for item in found["violations"]]
    assert wrong == []
    assert {"color-contrast", "button-name", "region", "aria-valid-attr-value"} <= {
        item["id"] for item in found["passes"]
    }
    wide, room = page.browser.execute_script(
        "return [Math.max(...[document.documentElement, document.body, document.getElementById('talk')].map("
        "(one) => one.scrollWidth - one.clientWidth)), document.documentElement.clientWidth]"
    )
    assert wide == 0, f"{wide} pixels wider than {room}"


def test_all_states(page: Page) -> None:
    check(page)
    narrow = page.one("#menu").is_displayed()
    page.one("#system").click()
    check(page)
    page.one("#system-dialog textarea").send_keys("Be brief. " * 9)
    page.press("Save")
    page.type(TEXT)
    page.send()
    wait(page.browser, lambda: page.all(".said em"))
    page.wait_idle()
    check(page)
    page.type("And " + "x" * 500)
    page.send()
    wait(page.browser, lambda: len(page.answers()) == 2 and page.answers()[1])
    page.one("#stop").click()
    wait(page.browser, lambda: page.buttons("Continue"))
    page.wait_idle()
    check(page)
    page.press("Regenerate")
    page.wait_idle()
    page.one(".earlier summary").click()
    page.type("word " * 500)
    page.send()
    wait(page.browser, lambda: page.one("#problem").is_displayed())
    check(page)
    if narrow:
        page.one("#menu").click()
        wait(page.browser, lambda: page.one("#new").is_displayed())
        check(page)
    page.all("#conversations button")[0].click()
    check(page)
    page.press("Delete")
    wait(page.browser, lambda: page.one("#opening").is_displayed())


def test_axe_finds_what_is_wrong(page: Page) -> None:
    """The test above could fail."""
    page.browser.execute_script("document.getElementById('private').style.color = '#777'")
    page.browser.execute_script("document.getElementById('text').removeAttribute('aria-label')")
    with pytest.raises(AssertionError, match="color-contrast"):
        check(page)


def test_the_list_on_a_phone(browser: webdriver.Chrome, echo: Any) -> None:
    look(browser, "light", 400)
    page = Page(browser, echo.url)
    page.type("one")
    page.send()
    page.wait_idle()
    assert not page.one("#side").is_displayed()
    page.one("#menu").click()
    assert page.one("#side").is_displayed()
    page.press("New chat")
    assert not page.one("#side").is_displayed()
    page.one("#menu").click()
    page.all("#conversations a")[0].click()
    wait(browser, lambda: page.answers() == ["one"])
    assert not page.one("#side").is_displayed()
