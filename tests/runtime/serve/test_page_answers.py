"""What a model says, as the chat page shows it: Markdown, never markup, and nothing from elsewhere."""

from __future__ import annotations

import http.server
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver

from .browsing import BROWSER, DRIVER, Page, chromium, wait

pytestmark = pytest.mark.skipif(not (DRIVER and BROWSER), reason="chromium or its driver is not installed")

TEXT = """\
# Small *matrices*

A **bold** word, an *Emphasis*, `code`, ~~no~~ and [a manual](https://example.org/npu "title").
A second line.

1. one
2. two
   - within

7) seven

```python
print("<b>")
```

| type | bits |
|:----:|-----:|
| w8a8 | 8 |

> quoted

---

<https://example.org/>
"""
ALLOWED = {"p", "h3", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "s", "a", "br", "hr"}
ALLOWED |= {"table", "thead", "tbody", "tr", "th", "td", "span", "bdi", "div", "button"}


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium("--window-size=1280,800") as one:
        yield one


@pytest.fixture(scope="module")
def echo(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("", "tests.runtime.serve.echo")


@pytest.fixture(scope="module")
def slow(start_daemon: Callable[..., Any]) -> Any:
    return start_daemon("", "tests.runtime.serve.echo", ECHO_BYTE_S="0.001")


@pytest.fixture
def page(browser: webdriver.Chrome, echo: Any) -> Page:
    return Page(browser, echo.url)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def say(page: Page, text: str) -> None:
    """Have the model say it."""
    page.type(text)
    page.send()
    page.wait_idle(60)


def shape(page: Page) -> Any:
    """Each block of the last answer: the elements in it with their texts."""
    script = """
        const of = (node) => node instanceof Text ? node.data : [node.localName, ...[...node.childNodes].map(of)];
        const said = [...document.querySelectorAll("#turns > .assistant > .said")].at(-1);
        return [...said.children].map(of);
    """
    return page.browser.execute_script(script)


def words(node: Any) -> str:
    return node if isinstance(node, str) else "".join(map(words, node[1:]))


def test_an_answer_has_no_links_to_the_page_itself(page: Page) -> None:
    """Its address can give a tab a key: somebody else's, whose conversations would then be this person's."""
    address = page.browser.execute_script("return location.origin")
    say(page, f"[a]({address}/#key=other) <{address}/> ![b]({address}/x) [c](https://example.org/)")
    links = page.browser.execute_script("return [...document.querySelectorAll('.said a')].map((one) => one.href)")
    assert links == ["https://example.org/"]


def test_markdown(page: Page) -> None:
    say(page, TEXT)
    found = [block for block in shape(page) if words(block)] + [["hr"]]
    link = ["span", ["a", ["bdi", "a manual"]], ["bdi", " (example.org)"]]
    assert found[0] == ["h3", "Small ", ["em", "matrices"]]
    assert [part for part in found[1][1:] if part != ""] == [
        "A ", ["strong", "bold"], " word, an ", ["em", "Emphasis"], ", ", ["code", "code"], ", ", ["s", "no"], " and ",
        link, ".", ["br"], "A second line.",
    ]  # fmt: skip
    assert found[2] == ["ol", ["li", "one"], ["li", "two", ["ul", ["li", "within"]]]]
    assert page.browser.execute_script("return [...document.querySelectorAll('.said ol')].map((one) => one.start)") == [
        1,
        7,
    ]
    assert found[4] == ["div", ["div", ["span", "python"], ["button", "Copy"]], ["pre", ["code", 'print("<b>")\n']]]
    row, head = ["tr", ["td", "w8a8"], ["td", "8"]], ["tr", ["th", "type"], ["th", "bits"]]
    assert found[5] == ["div", ["table", ["thead", head], ["tbody", row]]]
    assert page.one(".said td:last-child").value_of_css_property("text-align") == "right"
    assert found[6] == ["blockquote", ["p", "quoted"]]
    assert found[7][:2] == ["p", ["a", ["bdi", "https://example.org/"]]]
    assert page.all(".said hr")
    assert page.questions() == [TEXT.strip()]
    for one in page.all(".said a"):
        assert one.get_attribute("target") == "_blank"
        assert one.get_attribute("rel") == "noopener noreferrer"


def test_copy_gives_what_was_said_and_what_a_code_block_holds(page: Page) -> None:
    page.browser.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    say(page, TEXT)
    page.one(".said .bar button").click()
    wait(page.browser, lambda: page.browser.execute_script("return window.copied") == 'print("<b>")\n')
    page.one(".tools button:not([hidden])").click()
    wait(page.browser, lambda: page.browser.execute_script("return window.copied") == TEXT.strip())
    assert page.one(".tools button:not([hidden])").text == "Copied"


def test_copy_where_there_is_no_clipboard(page: Page) -> None:
    """As on a page that comes over plain HTTP from another machine."""
    page.browser.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
        "document.addEventListener('copy', () => { window.copied = document.activeElement.value; });"
    )
    say(page, "some *words*")
    page.one(".tools button:not([hidden])").click()
    wait(page.browser, lambda: page.browser.execute_script("return window.copied") == "some *words*")


def hostile(url: str) -> list[str]:
    script = f"fetch('{url}/script');document.title='owned'"
    return [
        f"<script>{script}</script>",
        f"<img src=x onerror=\"{script}\"><img src='{url}/img'>",
        f"<iframe src='{url}/frame'></iframe><object data='{url}/object'></object><embed src='{url}/embed'>",
        f"<svg onload=\"{script}\"><style>@import '{url}/css'</style><link rel=stylesheet href='{url}/link'>",
        f"<meta http-equiv=refresh content='0;url={url}/meta'><base href='{url}/'><form action='{url}/form'>",
        f"![a]({url}/image.png) ![b]({url}/image2.png 'title') [![c]({url}/image3.png)]({url}/link)",
        f"![d][ref]\n\n[ref]: {url}/image4.png",
        f"[a](javascript:{script}) [b](JAVASCRIPT:alert(1)) [c](data:text/html,<script>{script}</script>)",
        f"<javascript:{script}> <data:text/html,x> <{url}/auto>",
        f"![x](data:image/svg+xml,<svg/onload={script}>) [y](vbscript:x) [z](//127.0.0.1/)",
        f'```"onmouseover="{script}\n</code></pre><script>{script}</script>\n```',
        f"| <img src=x onerror={script}> |\n|-|\n| [a](javascript:{script}) |",
        "[\u202egpj.exe](https://evil.example/\u202efdp) \u202eabc \u2066 \x00 \x1b]0;owned\x07 \x9b31m \u200b",
        f"<a href='javascript:{script}'>a</a> <details ontoggle={script} open>",
        "[bank.example](https://evil.example) [https://bank.example/](https://evil.example/)",
        "<!-- <b>x</b> --> &lt;b&gt;x&lt;/b&gt; &#60;script&#62; ]]> <![CDATA[ <?php ?>",
        "[a](http://[::1) [b](http://a:b:c) [c](https://exa mple) [d](http://%zz)",
    ]


def test_what_is_said_is_never_markup_and_loads_nothing(
    page: Page, echo: Any, elsewhere: tuple[str, list[str]]
) -> None:
    url, asked = elsewhere
    page.browser.get_log("browser")
    for text in hostile(url):
        say(page, text)
    used = page.browser.execute_script(
        "return [...new Set([...document.querySelectorAll('.said *')].map((one) => one.tagName.toLowerCase()))]"
    )
    assert set(used) <= ALLOWED
    attributes = page.browser.execute_script(
        "return [...new Set([...document.querySelectorAll('.said *')].flatMap((one) => one.getAttributeNames()))]"
    )
    assert set(attributes) <= {
        "class",
        "href",
        "target",
        "rel",
        "scope",
        "tabindex",
        "role",
        "aria-label",
        "type",
        "start",
    }
    for one in page.all(".said a"):
        assert one.get_attribute("href").startswith(("http://", "https://"))
    assert page.browser.title == "fake"
    assert page.questions() == [text.strip() for text in hostile(url)]
    # What a link leads to is shown, whatever it says of itself.
    assert "bank.example (evil.example)" in page.answers()[14]
    assert "https://bank.example/ (evil.example)" in page.answers()[14]
    page.reload()
    wait(page.browser, lambda: len(page.answers()) == len(hostile(url)) and not page.all("[aria-busy=true]"))
    assert asked == []
    loaded = page.browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(echo.url) for name in loaded), loaded
    # Nothing was even tried: what the policy refuses is logged.
    assert page.browser.get_log("browser") == []


def test_text_that_goes_the_other_way_stays_in_its_place(page: Page) -> None:
    say(page, "first\n\n\u202esecond\n\nthird [a\u202eb](https://evil.example/) after")
    styles = page.browser.execute_script(
        "return [...document.querySelectorAll('.assistant .said p:not(:empty), .said bdi')]"
        ".map((one) => getComputedStyle(one).unicodeBidi)"
    )
    assert len(styles) >= 4
    assert set(styles) <= {"plaintext", "isolate"}


NONSENSE = {
    "stars": "*" * 3000 + "a" + "*" * 3000,
    "brackets": "[" * 5000,
    "quotes": "> " * 2000,
    "lists": "".join(" " * at + "- a\n" for at in range(150)),
    "fences": "```\n" * 99,
    "table": "|a" * 300 + "|\n" + "|-" * 300 + "|\n" + "|b\n" * 200,
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_page_that_was_told_nonsense_still_works(page: Page, name: str) -> None:
    say(page, NONSENSE[name])
    say(page, "and *on*")
    assert page.answers()[-1] == "and on"


def test_policy(echo: Any) -> None:
    _, headers, body = echo.request("GET", "/", headers={"Accept": "text/html"})
    policy = dict(item.strip().partition(" ")[::2] for item in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert (
        policy["trusted-types"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    )
    assert not re.search(rb"\s(style|on\w+)=|<style|<script(?! type=\"module\" src=)", body)


WATCH = """
    window.posted = [];
    const before = window.fetch;
    window.fetch = (path, given) => {
        if (path === '/markdown') window.posted.push(JSON.parse(given.body).text.length);
        return before(path, given);
    };
"""


@pytest.mark.parametrize("kind", ["paragraphs", "one list"])
def test_a_long_answer_is_not_read_again_and_again(browser: webdriver.Chrome, slow: Any, kind: str) -> None:
    page = Page(browser, slow.url)
    browser.execute_script(WATCH)
    between = "\n\n" if kind == "paragraphs" else "\n"
    text = between.join(f"- item {number} of *many*, with words" for number in range(150))
    if kind == "paragraphs":
        text = text.replace("- ", "")
    page.type(text)
    page.send()
    # It is Markdown while it is still being written.
    wait(browser, lambda: page.all(".busy .said em"))
    page.wait_idle(60)
    assert len(page.all(".assistant .said em")) == 150
    posted = browser.execute_script("return window.posted")
    assert len(posted) > 5
    if kind == "paragraphs":
        assert sum(posted) < 6 * len(text)
    else:
        # It is one block, read whole at each look, so the looks are few: fewer than tokens by far.
        assert len(posted) < len(text) / 50


def test_an_answer_longer_than_is_read_at_once(page: Page) -> None:
    text = (
        "\n\n".join(f"Paragraph {number}, *quite* long: " + "word " * 60 for number in range(80)) + "\n\n" + "x" * 20000
    )
    say(page, text)
    assert len(page.all(".assistant .said em")) == 80
    shown = page.browser.execute_script("return document.querySelector('.assistant .said').textContent")
    assert "".join(shown.split()) == "".join(text.replace("*", "").split())


def test_where_markdown_cannot_be_had_the_text_stays(browser: webdriver.Chrome, slow: Any) -> None:
    page = Page(browser, slow.url)
    browser.execute_script(
        "const before = window.fetch; window.fetch = (path, given) => path === '/markdown' ?"
        " Promise.reject(new TypeError('x')) : before(path, given);"
    )
    say(page, "a *b*\n- c\n\n- d")
    assert page.answers() == ["a *b*\n- c\n\n- d"]


def test_the_files_of_the_page(echo: Any) -> None:
    for name, kind in {"main.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}.items():
        status, headers, _ = echo.request("GET", f"/page/{name}")
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
    for name in ("", "../app.py", "..%2fapp.py", "endpoints.py", "main.js/", "%00"):
        status, _, body = echo.request("GET", f"/page/{name}")
        assert status == 404, name
        assert body["error"]["code"] == "not_found"
    assert json.dumps(echo.request("POST", "/page/main.js", {})[0]) == "405"


STREAM = """
    const [texts, done] = arguments;
    (async () => {
        const { Markdown } = await import("/page/markdown.js");
        const { daemon } = await import("/page/api.js");
        const shown = (box) => {
            box.querySelectorAll(".plain").forEach((one) => one.textContent.trim() || one.remove());
            box.normalize();
            return box.innerHTML.replace(/\\s+(<|$)/g, "$1");
        };
        const found = [];
        for (const pieces of texts) {
            const boxes = [document.createElement("div"), document.createElement("div")];
            const [slow, quick] = boxes.map((box) => new Markdown(box, daemon.blocks));
            for (const piece of pieces) {
                slow.add(piece);
                await new Promise((resolve) => setTimeout(resolve, 40));
            }
            quick.add(pieces.join(""));
            await Promise.all([slow.finish(), quick.finish()]);
            found.push([boxes.map(shown), slow.text === pieces.join("")]);
        }
        done(found);
    })().catch((error) => done(String(error)));
"""


@pytest.mark.long
def test_what_arrives_in_pieces_ends_as_what_arrives_at_once(page: Page) -> None:
    pieces = [
        "a ",
        "b\n",
        "\n\n",
        "- c\n",
        "  - d\n",
        "1. e\n",
        "```\n",
        "**",
        "*f*",
        "`g`",
        "# h\n",
        "> i\n",
        "|a|b|\n",
    ]
    pieces += [
        "|-|-|\n",
        "---\n",
        "    j\n",
        "é😀",
        "[k](http://l.m)",
        "~~",
        "\t",
        "&amp;",
        "<b>",
        "\r\n",
        "\u202e",
        "1. ",
    ]
    chance = random.Random(7)
    texts = [[chance.choice(pieces) for _ in range(25)] for _ in range(12)]
    page.browser.set_script_timeout(60)
    found = page.browser.execute_async_script(STREAM, texts)
    assert not isinstance(found, str), found
    for ((slow, quick), whole), text in zip(found, texts, strict=True):
        assert whole
        assert slow == quick, "".join(text)
        assert len(quick) > 20
