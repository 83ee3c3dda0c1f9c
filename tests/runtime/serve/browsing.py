"""Headless Chromium, by its own driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium")


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
