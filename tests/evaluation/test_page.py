"""The HTML page: escaped and self-contained."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.evaluation.page import page
from hf_llama_sampling.evaluation.perplexity import score_texts
from tests.conftest import TINY

HOSTILE = (
    '<script>window.owned = 1</script><img src=x onerror="window.owned = 1">\n&amp; "q" \'s\' --> ]]> </span></div>'
    "</script><!-- \x1b[31m \x00 \r \u202e turned \u2028 \u4f60\u597d \U0001f642 \u0633\u0644\u0627\u0645\ttab"
)


@pytest.fixture(scope="module")
def scored(tiny_model):
    """Two texts, one of them hostile, under hostile names."""
    llama = Llama(tiny_model, Tokenizer(TINY / "tokenizer.model"))
    return score_texts(llama, [("<b>&'\"\u202e.txt", HOSTILE), ("plain.txt", "To be, or not to be: " * 8)])


class Read(HTMLParser):
    """The elements of a page, and the text within those of a class."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.inside, self.texts = [], None, []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "text":
            self.inside, self.depth = [], 0
        if self.inside is not None:
            self.depth += 1

    def handle_endtag(self, tag):
        if self.inside is not None:
            self.depth -= 1
            if self.depth == 0:
                self.texts.append("".join(self.inside))
                self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.inside.append(data)


def test_every_text_is_escaped(scored):
    """No element but ours, whatever texts and names hold; the text itself is there, with the unseen spelled out."""
    read = Read(page(scored, "<i>model</i>"))
    tags = [tag for tag, _ in read.elements]
    assert {"img", "b"} & set(tags) == set() and tags.count("script") == 3  # ours, and the data of two texts
    assert not any(name.startswith("on") or name == "style" for _, attributes in read.elements for name in attributes)
    shown = HOSTILE
    for character, spelled in (("\x1b", "\\x1b"), ("\x00", "\\x00"), ("\r", "\\r"), ("\u202e", "\\u202e")):
        shown = shown.replace(character, spelled)
    assert read.texts[0] == shown.replace("\u2028", "\\u2028")
    assert read.texts[1] == scored[1].text


def test_the_data_cannot_end_its_element(scored):
    """JSON without a "<", that reads back as the scores of each token."""
    content = page(scored, "model")
    found = re.findall(r'<script type="application/json" id="scores\d">(.*?)</script>', content, flags=re.DOTALL)
    assert len(found) == 2 and not any("<" in data for data in found)
    for data, text in zip(map(json.loads, found), scored, strict=True):
        assert data["ids"] == text.ids and data["logprobs"] == pytest.approx(text.logprobs, abs=1e-5)
        assert {str(token) for top in text.top_logprobs for token, _ in top} <= set(data["names"])
        assert [first for _, first, _ in data["pieces"]] == [piece.first for piece in text.pieces]


def test_the_policy_lets_nothing_in(scored):
    """One policy, before everything else in the head, that names our script and style by their hashes."""
    content = page(scored, "model")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', content)
    assert content.index(policy) < content.index("<style>") and "unsafe" not in policy
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for rule, tag in (("style-src", "style"), ("script-src", "script")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"


def test_nothing_outside_is_named(scored):
    """No address, no source, no import: the page is one file."""
    content = page(scored[1:], "model")
    for word in ("http://", "https://", "src=", "@import", "url(", "fetch(", "XMLHttpRequest"):
        assert word not in content.replace("default-src", ""), word


def test_the_page_is_the_same_each_time(scored):
    """No date, no chance: pages of two runs can be compared."""
    assert page(scored, "model") == page(scored, "model")
