"""The chat page in a browser, with a server that answers; skipped where there is no Chromium."""

import os
from pathlib import Path

import pytest

from .chrome import PROGRAM, Page

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
PICTURES = os.environ.get("PAGE_PICTURES")  # a folder for screenshots, to look at


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    one = Page(server, tmp_path_factory.mktemp("browser"))
    one.wait("document.readyState == 'complete' && document.title == 'tiny'")
    yield one
    one.close()


def idle(page, articles):
    page.wait(f"send.textContent == 'Send' && document.querySelectorAll('article').length == {articles}")


def notes(page):
    return page.value("[...document.querySelectorAll('article.assistant footer span')].map(x => x.textContent)")


def texts(page):
    return page.value("[...document.querySelectorAll('article')].map(x => x.firstChild.data)")


def luminance(page):
    return page.value(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b)"
    )


def test_a_chat_by_keyboard(page, llm):
    page.look(1440, "light")
    page.value("temperature.value = 0, max_tokens.value = 12")
    page.wait("document.activeElement.id == 'text'")
    page.type("Hello")
    page.press("Enter")
    idle(page, 2)
    expected = llm.generate("Hello", max_new_tokens=12, temperature=0)
    assert texts(page) == ["Hello", expected]
    (note,) = notes(page)
    assert note.startswith("12 tokens, ")
    assert "tokens/s" in note
    assert page.value("context.textContent").endswith(" of 512 tokens")
    page.wait("document.querySelectorAll('#cache canvas').length >= 1")
    for button, before in (("Regenerate", 2), ("Edit", 0)):
        page.value(
            f"[...document.querySelectorAll('footer button')].filter(x => x.textContent == '{button}').at(-1).focus()"
        )
        page.press("Enter")
        idle(page, before)
        assert texts(page) == ["Hello", expected][:before]
    assert page.value("text.value") == "Hello"
    page.value("max_tokens.value = 450")
    page.press("Enter")
    page.wait("document.querySelectorAll('article')[1]?.firstChild.data.length > 5")
    page.press("Escape")
    idle(page, 2)
    assert notes(page) == ["stopped"]
    page.value("max_tokens.value = 12, system.value = 'x'.repeat(600)")
    page.type("Hello")
    page.press("Enter")
    idle(page, 4)
    assert "leaves no room" in notes(page)[-1]
    page.value("system.value = ''")


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_of_it_is_seen_at_any_width_by_day_and_night(page, width, scheme):
    page.look(width, scheme)
    assert page.value("document.documentElement.scrollWidth") <= width
    for name in ("send", "text", "new"):
        left, right, bottom = page.value(
            f"(r => [r.left, r.right, r.bottom])({name}.getBoundingClientRect())".replace(
                "new", "document.getElementById('new')"
            )
        )
        assert 0 <= left < right <= width
        assert bottom <= 800
    assert (luminance(page) < 200) == (scheme == "dark")
    if PICTURES:
        page.picture(Path(PICTURES) / f"chat-{width}-{scheme}.png")
    narrow = page.value("getComputedStyle(more).display") != "none"
    assert narrow == (width == 390)
    if narrow:
        page.value("more.click()")
        assert page.value("system.getBoundingClientRect().width > 200 && more.getAttribute('aria-expanded') == 'true'")
        assert page.value("document.documentElement.scrollWidth") <= width
        if PICTURES:
            page.picture(Path(PICTURES) / f"settings-{width}-{scheme}.png")
        page.value("more.click()")
