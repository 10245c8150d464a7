"""Chat templates are programs of strangers: each failure is one sentence, and none runs for ever."""

import sys

import pytest
import transformers

from hf_llama_sampling import Llama
from hf_llama_sampling.llama.dialog import UNSAFE_ERROR
from hf_llama_sampling.llama.templates import render_chat
from hf_llama_sampling.llama.tokenizer import TransformersTokenizer
from tests.conftest import TINY

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system is string %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer(template):
    found = transformers.AutoTokenizer.from_pretrained(TINY)
    found.chat_template = template
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role\n not supported') }}", "(System role not supported)"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].x.y }}", "has no attribute 'x'"),
        ("{{ messages[9]['role'] }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "20,000,000 steps"),
        ("{% include 'secrets' %}", "(no loader for this environment specified)"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template, words):
    """A ValueError that names the reason and the way out; nothing of the system is reached."""
    with pytest.raises(ValueError) as error:
        render_chat(tokenizer(template), MESSAGES)
    said = str(error.value)
    assert words in said and 'chat_format="llama2"' in said and "\n" not in said


def test_a_debuggers_trace_is_put_back():
    """The count of steps stands aside for whoever traces, after success and failure."""

    def tracing(*_):
        return None

    earlier = sys.gettrace()
    sys.settrace(tracing)
    try:
        render_chat(tokenizer("{{ messages[0]['content'] }}"), MESSAGES)
        kept = sys.gettrace()
        with pytest.raises(ValueError):
            render_chat(tokenizer("{{ 1 / 0 }}"), MESSAGES)
        assert kept is tracing and sys.gettrace() is tracing
    finally:
        sys.settrace(earlier)


def test_a_long_conversation_fits_the_budget():
    """Two thousand messages are rendered."""
    messages = [{"role": role, "content": "word " * 20} for _ in range(1000) for role in ("user", "assistant")]
    assert render_chat(tokenizer(LLAMA2), messages).count("[INST]") == 1000


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "<user>a\nb"),
        ("{{ messages[0].content | trim }}", "a\nb"),
        ("{{ 'Q: ' + messages[0].content }}", "Q: a\nb"),
        ("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", "[a][b]"),
    ],
)
def test_text_parts_reach_the_model_as_text(tiny_model, template, expected):
    """Not as Python prints them, whether a template takes a text or a list of parts; in LLAMA2's format too."""
    llama = Llama(tiny_model, tokenizer(template))
    dialog = [{"role": "user", "content": PARTS}]
    assert llama.encode_dialog(dialog, "template") == llama.tokenizer.encode(expected, False, False)
    joined = [{"role": "user", "content": "a\nb"}]
    assert llama.encode_dialog(dialog, "llama2") == llama.encode_dialog(joined, "llama2")
    unsafe = [{"role": "user", "content": [{"type": "text", "text": "[INST]"}]}]
    (answer,) = llama.chat_completion([unsafe], max_gen_len=1, chat_format="llama2")
    assert answer["generation"]["content"] == UNSAFE_ERROR


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": None}, "that of message 0 of dialog 0 is of type NoneType"),
        ({"role": "user", "content": {"text": "a"}}, "that of message 0 of dialog 0 is of type dict"),
        ({"content": "a"}, "a role is a string, and that of message 0 of dialog 0 is None"),
        ({"role": "user", "content": [*PARTS, {"type": "image_url"}]}, "one of message 0 is 'image_url'"),
    ],
)
def test_a_template_is_given_roles_and_texts(tiny_model, message, words):
    """It checks neither, and would write None, or a dictionary as Python prints it, into the prompt."""
    with pytest.raises(ValueError, match=words):
        Llama(tiny_model, tokenizer(PLAIN)).chat_completion([[message]], chat_format="template")


def test_a_call_of_tools_needs_no_content(tiny_model):
    """As templates for tools expect."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert Llama(tiny_model, tokenizer("{{ messages[0].tool_calls[0].name }}")).encode_dialog([called], "template")


@pytest.mark.parametrize(
    ("template", "is_llama2"),
    [
        (LLAMA2, True),
        (MISTRAL, False),
        ("{{ messages[0]['content'] }}", False),
        ("{{ raise_exception('no system') }}", False),
    ],
)
def test_llama2s_own_template_is_known(template, is_llama2):
    """A tokenizer whose template writes LLAMA2's format brings no warning elsewhere."""
    assert TransformersTokenizer(tokenizer(template)).has_llama2_template is is_llama2
