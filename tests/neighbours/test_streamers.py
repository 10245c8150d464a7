"""transformers' own text streamers with our generate: printed, read by another thread, read by coroutines."""

import asyncio
import threading

import pytest
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

ASKED = {"max_gen_len": 20, "seeds": 3, "temperature": 0.8}


@pytest.fixture(scope="module")
def prompt(tiny_tokenizer):
    return tiny_tokenizer("First Citizen:").input_ids


@pytest.fixture(scope="module")
def text(tiny_model, tiny_tokenizer, prompt):
    """What comes out without a streamer."""
    return tiny_tokenizer.decode(tiny_model.generate([prompt], **ASKED).tokens[0], skip_special_tokens=True)


def test_a_text_streamer_prints_the_text(tiny_model, tiny_tokenizer, prompt, text, capsys):
    """On standard output, without the prompt and with it."""
    tiny_model.generate(
        [prompt], streamer=TextStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True), **ASKED
    )
    assert capsys.readouterr().out == text + "\n"
    tiny_model.generate([prompt], streamer=TextStreamer(tiny_tokenizer, skip_special_tokens=True), **ASKED)
    assert capsys.readouterr().out == f"First Citizen:{text}\n"


def test_an_iterator_is_read_while_the_text_is_made(tiny_model, tiny_tokenizer, prompt, text):
    """Pieces arrive one by one, before generate has returned."""
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    worker = threading.Thread(target=tiny_model.generate, args=([prompt],), kwargs={"streamer": streamer, **ASKED})
    worker.start()
    pieces = list(streamer)
    worker.join()
    assert "".join(pieces) == text and len([piece for piece in pieces if piece]) > 1


def test_coroutines_read_while_the_text_is_made(tiny_model, tiny_tokenizer, prompt, text):
    """`async for`, two streams at once; an error ends the stream for its reader."""

    async def read(**more):
        streamer = AsyncTextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
        work = asyncio.to_thread(tiny_model.generate, [prompt], streamer=streamer, **{**ASKED, **more})
        task = asyncio.create_task(work)
        pieces = [piece async for piece in streamer]
        await task
        return "".join(pieces)

    async def both():
        return await asyncio.gather(read(), read())

    assert asyncio.run(both()) == [text, text]
    with pytest.raises(ValueError, match=r"top_p must lie in \[0, 1\]"):
        asyncio.run(read(top_p=2))
