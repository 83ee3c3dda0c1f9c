"""Headless Chromium, by its own driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium")


# An API key in sessionStorage stays.
_FORGET_DRAFTS = """
    for (const place of [localStorage, sessionStorage])
        for (const name of Object.keys(place)) if (name.startsWith("rkedge.draft.")) place.removeItem(name);
"""


@contextmanager
def chromium(*arguments: str) -> Iterator[webdriver.Chrome]:
    """A browser with more arguments."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    own = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,700")
    for argument in (*own, *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    one = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield one
    finally:
        one.quit()


def wait(browser: webdriver.Chrome, condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Look until `condition` holds; what it returns."""
    return WebDriverWait(browser, seconds, poll_frequency=0.02).until(lambda _: condition())


class Page:
    """The chat page, as a person uses it: opened anew, with nothing that was typed before."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        self.url = url
        browser.get(url + "/health")
        browser.execute_script(_FORGET_DRAFTS)
        browser.get(url)
        self._wait_ready()

    def _wait_ready(self) -> None:
        wait(self.browser, lambda: "ready" in self.one("#board").text)

    def reload(self) -> None:
        self.browser.refresh()
        self._wait_ready()

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText.trim())"
        return list(self.browser.execute_script(script, selector))

    def questions(self) -> list[str]:
        return self.texts("#turns > .user > .said")

    def answers(self) -> list[str]:
        return self.texts("#turns > .assistant > .said")

    def buttons(self, label: str) -> list[Any]:
        script = """
            const visible = (one) => one.checkVisibility({ visibilityProperty: true });
            const all = [...document.querySelectorAll("button")];
            return all.filter((one) => visible(one) && one.innerText.trim() === arguments[0]);
        """
        return list(self.browser.execute_script(script, label))

    def press(self, label: str) -> None:
        self.buttons(label)[-1].click()

    def typed(self) -> str:
        return str(self.one("#text").get_property("value"))

    def type(self, text: str) -> None:
        """As pasted: the driver types thousands of keys slowly."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.browser.execute_script(script, self.one("#text"), text)

    def send(self) -> None:
        self.one("#text").send_keys(Keys.ENTER)

    def ask(self, text: str) -> None:
        self.one("#text").send_keys(text, Keys.ENTER)

    def wait_idle(self, seconds: float = 20) -> None:
        """Until nothing is being written, and the last words are Markdown."""
        wait(self.browser, lambda: self.one("#send").is_displayed() and not self.all("[aria-busy=true]"), seconds)

    def name(self) -> str:
        """The conversation's name with the daemon."""
        return self.browser.current_url.partition("#chat=")[2]

    def names(self) -> list[str]:
        return [one["name"] for one in self.fetched("/sessions")["sessions"]]

    def fetched(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """What the daemon answers the browser's user."""
        script = """
            const [path, method, body, done] = arguments;
            const headers = { "Content-Type": "application/json" };
            const sent = { method, headers, body: body && JSON.stringify(body) };
            fetch(path, sent).then((found) => found.json()).then(done);
        """
        return self.browser.execute_async_script(script, path, method, body)

    @contextmanager
    def offline(self) -> Iterator[None]:
        """No connection to anything meanwhile."""
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.browser.execute_cdp_cmd("Network.enable", {})
        self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**conditions, "offline": True})
        try:
            yield
        finally:
            self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**conditions, "offline": False})
