"""The HTML page in a browser: what it shows by mouse and by keyboard, in light and dark, wide and narrow."""

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.evaluation.page import page
from hf_llama_sampling.evaluation.perplexity import score_texts
from tests.browser import NAMES, Browser, BrowserEnded, find_browser
from tests.conftest import TINY
from tests.evaluation.test_page import HOSTILE

AA = 4.5  # WCAG 2.1, 1.4.3: contrast of text
TEXT = "To be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 3
# The contrast of each element's text with the nearest background behind it, by WCAG's formula.
CONTRASTS = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = (element) => {
    for (let it = element; it; it = it.parentElement) {
      const color = parse(getComputedStyle(it).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
  };
  const found = {};
  for (const it of document.querySelectorAll("h1, h2, h3, p, dt, dd, th, td, li, button, .context, .t, kbd, a")) {
    const [one, other] = [parse(getComputedStyle(it).color), behind(it)].map(light).sort((a, b) => b - a);
    const name = it.tagName + "." + it.className;
    found[name] = Math.min(found[name] ?? 99, (one + 0.05) / (other + 0.05));
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser, started once."""
    program = find_browser()
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is on the path (Debian: apt-get install chromium)")
    try:
        started = Browser(program, tmp_path_factory.mktemp("profile"))
    except BrowserEnded as error:
        pytest.skip(f"needs a browser: {program} is there and does not start ({error})")
    yield started
    started.close()


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """A page of one text, and one of two of which the first is hostile."""
    llama = Llama(tiny_model, Tokenizer(TINY / "tokenizer.model"))
    folder = tmp_path_factory.mktemp("pages")
    for name, texts in (("one", [("a.txt", TEXT)]), ("two", [("<script>", HOSTILE), ("b.txt", "Good night")])):
        (folder / f"{name}.html").write_text(page(score_texts(llama, texts), "the bundled model"))
    return folder


def details(browser):
    return browser.run("document.getElementById('details').innerText")


def test_a_hostile_text_is_shown_and_not_obeyed(browser, files):
    """Nothing of it runs, nothing is fetched, and no rule of the page's own policy is broken."""
    browser.open(files / "two.html")
    assert browser.run("window.owned") is None
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert "<script>window.owned = 1</script>" in browser.run("document.querySelector('#text0').textContent")
    assert [event for event in browser.events if event.get("method") == "Log.entryAdded"] == []
    asked = [event for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert [event["params"]["request"]["url"] for event in asked] == [(files / "two.html").as_uri()]


def test_the_policy_holds_in_the_browser(browser, files):
    """A script and an image that are put into the page neither run nor load."""
    browser.open(files / "one.html")
    browser.run(
        "(() => { const it = document.createElement('script'); it.textContent = 'window.owned = 1';"
        " document.body.append(it); const image = new Image(); window.loaded = 'not yet';"
        " image.onerror = () => { window.loaded = 'refused'; };"
        " image.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw=';"
        " document.body.append(image); })()"
    )
    assert browser.run("window.owned") is None
    answer = browser.call(
        "Runtime.evaluate", expression="new Promise((done) => setTimeout(done, 100))", awaitPromise=True
    )
    assert answer and browser.run("window.loaded") == "refused"


def test_the_mouse_shows_a_token(browser, files):
    """Its probability, offset, id and alternatives; a click keeps them when the mouse leaves."""
    browser.open(files / "one.html")
    assert "Point at a token" in details(browser)
    browser.point(".text .t:nth-child(3)")
    hovered = details(browser)
    for word in ("probability", "offset", "character 5", "id ", "rank"):
        assert word in hovered
    assert browser.run("document.querySelectorAll('#details .alternatives li').length") == 5
    browser.point(".text .t:nth-child(4)", click=True)
    clicked = details(browser)
    assert clicked != hovered
    browser.point(".text .t:nth-child(8)")
    assert details(browser) != clicked
    browser.point("h1")
    assert details(browser) == clicked


def test_the_keyboard_alone_is_enough(browser, files):
    """Tab reaches the text in a few steps, arrows walk it, and what is shown is said to a screen reader."""
    browser.open(files / "one.html")
    focused = "[...document.querySelectorAll('.text .t')].indexOf(document.activeElement)"
    steps = 0
    while browser.run(focused) < 0 and steps < 20:
        browser.press("Tab")
        steps += 1
    assert browser.run(focused) == 0 and steps < 10
    places = []
    for key in (
        "ArrowRight",
        "ArrowRight",
        "ArrowLeft",
        "ArrowDown",
        "ArrowUp",
        "End",
        "ArrowRight",
        "Home",
        "ArrowLeft",
    ):
        browser.press(key)
        places.append(browser.run(focused))
    last = browser.run("document.querySelectorAll('.text .t').length") - 1
    assert places[:3] == [1, 2, 1] and places[3] > 10 and places[4] == 1 and places[5:] == [last, last, 0, 0]
    assert "offset\ncharacters 0 to 1\n" in details(browser)
    assert browser.run("document.querySelectorAll('.text [tabindex=\"0\"]').length") == 1
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    region = "document.getElementById('details')"
    assert [browser.run(f"{region}.getAttribute('{name}')") for name in ("role", "aria-live")] == ["status", "polite"]
    assert browser.run("[...document.querySelectorAll('.text')].every((it) => it.getAttribute('aria-label'))") is True


def test_a_surprising_token_leads_into_the_text(browser, files):
    """The button of the table's first row goes to that token."""
    browser.open(files / "two.html")
    browser.point("#section0 button", click=True)
    assert browser.run("document.activeElement.closest('.text').id") == "text0"
    shown, listed = (
        browser.run(f"{it}.textContent") for it in ("document.activeElement", "document.querySelector('button')")
    )
    assert shown == listed


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, files, scheme):
    """At least AA in both schemes, each level of the heat map included, and the schemes differ."""
    browser.open(files / "two.html", scheme=scheme)
    browser.run("document.querySelector('.text .t').focus()")
    found = browser.run(CONTRASTS)
    browser.open(files / "one.html", scheme=scheme)
    found |= {f"{name} of one": value for name, value in browser.run(CONTRASTS).items()}
    assert {name[:9] for name in found if name.startswith("SPAN.t s")} == {f"SPAN.t s{level}"[:9] for level in range(6)}
    assert {name: value for name, value in found.items() if value < AA} == {}
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize(("width", "narrow"), [(1280, False), (390, True), (320, True)])
def test_it_fits_the_window(browser, files, width, narrow):
    """Nothing is cut off at the side; on a narrow one the details lie at the bottom and leave the token visible."""
    browser.open(files / "two.html", width=width, height=800)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('#text1 .t').focus()")
    token, panel = (
        browser.run(
            f"(() => {{ const box = {it}.getBoundingClientRect(); return [box.top, box.bottom, box.left]; }})()"
        )
        for it in ("document.activeElement", "document.querySelector('aside')")
    )
    assert token[0] >= 0 and token[1] <= (panel[0] if narrow else 800)
    assert (panel[2] < 20) == narrow
