"""A conversation: each message is answered with all earlier turns as context.

What this module does not do: it reads and prints nothing; the command `chat` does.
"""

from collections.abc import Callable, Sequence

from ..generation.prompt_cache import PromptCache
from ..sampling.settings import SamplingSettings
from ..text.stopping import StopStrings
from .dialog import UNSAFE_ERROR, Message, is_unsafe
from .llama import ChatFormat, Llama
from .streaming import TextStreamer


class Conversation:
    """Keeps messages and answers from turn to turn, and the model's cache of them: a turn prefills only new tokens.

    Args:
        llama: the model and its tokenizer.
        settings: temperature and nucleus.
        max_gen_len: most new tokens of an answer.
        system: a system message for the whole conversation.
        chat_format: as in `Llama.encode_dialog`.
        stop: strings that end an answer.

    Raises:
        ValueError: the chat format does not take the system message, or a stop string is empty.
    """

    def __init__(
        self,
        llama: Llama,
        settings: SamplingSettings,
        max_gen_len: int,
        *,
        system: str | None = None,
        chat_format: ChatFormat = "auto",
        stop: Sequence[str] = (),
    ) -> None:
        self.llama = llama
        self.settings = settings
        self.max_gen_len = max_gen_len
        self.stops = StopStrings(stop, 1, llama.speller.control_tokens if stop else None)
        self.llama2_format = chat_format == "llama2" or not llama.has_chat_template
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)
        self.prompt_cache = PromptCache()
        if self.start:
            self._encode([*self.start, {"role": "user", "content": "Hi"}])

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.start)
        self.prompt_cache.clear()

    def ask(self, said: str, write: Callable[[str], object]) -> None:
        """Answer a message, pass the answer to `write` in pieces, and keep both.

        Raises:
            ValueError: the conversation is too long, or its format refuses the message; neither is kept.
        """
        user: Message = {"role": "user", "content": said}
        if self.llama2_format and is_unsafe([user]):
            write(UNSAFE_ERROR)
            return
        asked = [*self.messages, user]
        prompt = self._encode(asked)
        room = self.llama.max_seq_len - len(prompt)
        if room <= 0:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and the model reads {self.llama.max_seq_len}: "
                "/reset starts a new one"
            )
        (answer,), _ = self.llama.generate(
            [prompt],
            min(room, self.max_gen_len),
            self.settings.temperature,  # type: ignore[arg-type]
            self.settings.top_p,  # type: ignore[arg-type]
            streamer=TextStreamer(self.llama.text_of, write, self.stops, self.llama.speller.is_byte),
            stopping_criteria=[self.stops.criterion([prompt], self.llama.text_of)] if self.stops else None,
            prompt_cache=self.prompt_cache,
        )
        cut = self.stops.cut(0, answer, self.llama.text_of)
        text = self.llama.text_of(answer)
        self.messages = [*asked, {"role": "assistant", "content": text[: len(text) - cut.dropped]}]

    def _encode(self, messages: list[Message]) -> list[int]:
        return self.llama.encode_dialog(messages, "llama2" if self.llama2_format else "template")
