"""A conversation reads only what a turn brings and answers as from scratch: in `chat`, and in `Llama` if asked."""

import inspect

import pytest
import torch

from hf_llama_sampling import Llama
from hf_llama_sampling.llama.conversation import Conversation
from hf_llama_sampling.sampling.settings import SamplingSettings
from tests.conftest import TINY
from tests.generation.test_prefix import Forwards

pytestmark = pytest.mark.slow

SAID = ["Who is there, and what does he want from the king?", "Speak louder.", "And then?", "Go on, good sir."]
# Of all answers but the last it keeps nothing: the past is another text in each turn.
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' %}[{{ m.content }}]"
    "{% elif loop.index0 == messages | length - 2 %}{{ m.content }};{% endif %}{% endfor %}"
)


@pytest.fixture(params=["llama2", "template", "rewriting"])
def llama(request, tiny_model, tiny_tokenizer):
    """With LLAMA2's format, with a template, and with one that rewrites earlier turns."""
    if request.param == "llama2":
        return Llama(tiny_model, str(TINY / "tokenizer.model"))
    template = FORGETFUL if request.param == "rewriting" else "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer = type(tiny_tokenizer).from_pretrained(TINY)
    tokenizer.chat_template = template
    return Llama(tiny_model, tokenizer)


def talk(llama, temperature, *, anew, system=None):
    """The answers, and the forwards of each turn; `anew` forgets the cache, and nothing else, before each turn."""
    conversation = Conversation(llama, SamplingSettings(temperature, 0.9), 8, system=system)
    torch.manual_seed(7)
    answers, forwarded = [], []
    for said in SAID:
        if anew:
            conversation.prompt_cache.clear()
        with Forwards(llama.model) as forwards:
            conversation.ask(said, lambda text: None)
        answers.append(conversation.messages[-1]["content"])
        forwarded.append(forwards.tokens)
    return answers, forwarded


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_from_scratch(llama, temperature):
    """Same seed, same answers; what a turn reads does not grow with the conversation."""
    talk(llama, temperature, anew=False)  # the trials of a first call are over
    scratch, whole = talk(llama, temperature, anew=True, system="You are a king.")
    answers, new = talk(llama, temperature, anew=False, system="You are a king.")
    assert answers == scratch
    assert new[0] == whole[0] and all(few < all_of_it for few, all_of_it in zip(new[1:], whole[1:], strict=True))
    assert whole[-1] - new[-1] > whole[1] - new[1]


def test_a_reset_frees_the_cache(llama):
    """And the next message is answered as the first one was."""
    conversation = Conversation(llama, SamplingSettings(0.0, 0.9), 8)
    conversation.ask(SAID[0], lambda text: None)
    first = conversation.messages[-1]
    assert len(conversation.prompt_cache) == 1
    conversation.reset()
    assert len(conversation.prompt_cache) == 0
    conversation.ask(SAID[0], lambda text: None)
    assert conversation.messages[-1] == first


def test_an_interrupted_turn_leaves_the_conversation_as_it_was(llama):
    """Ctrl-C in the middle of an answer; the same message asked again is answered as without it."""
    settings = SamplingSettings(0.0, 0.9)
    conversation, other = Conversation(llama, settings, 8), Conversation(llama, settings, 8)
    for one in (conversation, other):
        one.ask(SAID[0], lambda text: None)

    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask(SAID[1], interrupted)
    for one in (conversation, other):
        one.ask(SAID[1], lambda text: None)
    assert conversation.messages == other.messages


def dialogs_of(llama, **asked):
    """Two dialogs of three turns by `chat_completion`, their answers with logprobs, and each turn's forwards."""
    dialogs, answers, forwarded = [[], []], [], []
    for turn in range(3):
        for row, dialog in enumerate(dialogs):
            dialog.append({"role": "user", "content": SAID[turn + row]})
        with Forwards(llama.model) as forwards:
            found = llama.chat_completion(dialogs, max_gen_len=8, chat_format="auto", logprobs=True, **asked)
        for dialog, answer in zip(dialogs, found, strict=True):
            dialog.append(answer["generation"])
        answers += found
        forwarded.append(forwards.tokens)
    return answers, forwarded


@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {"seeds": [3, 4]}, {"temperature": 0.9}], ids=str)
def test_chat_completion_goes_on_where_the_cache_is_kept(llama, tiny_model, asked):
    """Rows of two dialogs: the same tokens with fewer read; logprobs within rounding."""
    keeping = Llama(tiny_model, llama.tokenizer, keep_cache=True)
    dialogs_of(keeping, **asked)
    keeping.prompt_cache.clear()
    torch.manual_seed(1)
    plain, whole = dialogs_of(llama, **asked)
    torch.manual_seed(1)
    kept, new = dialogs_of(keeping, **asked)
    assert [answer["tokens"] for answer in kept] == [answer["tokens"] for answer in plain]
    for mine, other in zip(kept, plain, strict=True):
        assert mine["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    assert new[-1] < whole[-1]


def test_text_completion_goes_on_where_the_cache_is_kept(llama, tiny_model):
    """A text that goes on from its own completion."""
    keeping = Llama(tiny_model, llama.tokenizer, schedule="auto")
    text = "ROMEO: what light through yonder window breaks? It is the east, and Juliet"
    for _ in range(3):
        plain = llama.text_completion([text], temperature=0.0, max_gen_len=12)
        with Forwards(tiny_model) as forwards:
            assert keeping.text_completion([text], temperature=0.0, max_gen_len=12) == plain
        text += plain[0]["generation"] + "\nAnd more"
    assert forwards.tokens < 40


def test_the_reference_schedule_is_bit_for_bit_unless_asked(llama, tiny_model):
    """Nothing is kept by default; `schedule="auto"` keeps, and `keep_cache` says otherwise in both."""
    assert llama.prompt_cache is None
    assert Llama(tiny_model, llama.tokenizer, schedule="auto").prompt_cache is not None
    assert Llama(tiny_model, llama.tokenizer, schedule="auto", keep_cache=False).prompt_cache is None
    assert Llama(tiny_model, llama.tokenizer, keep_cache=True).prompt_cache is not None
    assert inspect.signature(Llama).parameters["keep_cache"].default is None
    for make in (
        lambda: Llama(tiny_model, llama.tokenizer, keep_cache=1),
        lambda: Llama.build("", "", 1, 1, keep_cache=1),
    ):
        with pytest.raises(TypeError, match="keep_cache must be True or False, got 1: leave it out"):
            make()
