"""Random calls of `generate`: everything that a call takes, combined, and what the rule gives for it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.model_based import rule
from tests.model_based.rule import VOCAB, Row

PAD = 0
LETTERS = [chr(ord("a") + token) if token < 26 else chr(ord("A") + token - 26) for token in range(VOCAB)]
IDS = st.integers(0, VOCAB - 1)


def letters() -> Any:
    """A tokenizer of one letter per token."""
    core = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(LETTERS)}, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def bias_of(text: list[int]) -> torch.Tensor:
    """(V,): what the test's own processor adds; a function of the whole text."""
    return ((torch.arange(VOCAB) * 7 + sum(text) * 3 + len(text)) % 5).float() / 2


class BiasByText(LogitsProcessor):
    """A processor that reads all of what it is given."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (B, T); scores: (B, V)."""
        return scores + torch.stack([bias_of(text) for text in input_ids.tolist()])


class EndsBySum(StoppingCriteria):
    """A criterion that reads all of what it is given."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: (B, T). Returns (B,) bool."""
        return input_ids.sum(-1) % 7 == 0


class Collector(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then an id per step."""
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        """Once, at the end."""
        self.ended += 1


@dataclass
class Call:
    """A call, drawn at random; per-prompt values have one entry per prompt."""

    prompts: list[list[int]]
    form: str  # lists, left or right
    max_gen_len: int | list[int]
    max_seq_len: int | None
    temperature: float | list[float]
    top_p: float | list[float]
    stream: str  # greedy, seeds, generator or global
    seeds: int | list[int]
    eos: list[int]
    copies: int
    schedule: str
    compat: str
    edits: dict[str, Any]
    ends: str | None  # a criterion, or a stop string
    cache: str
    wanted: dict[str, Any] = field(default_factory=dict)  # echo, logprobs, top_logprobs, ...

    @property
    def ragged(self) -> bool:
        """Whether prompts differ in length."""
        return len(set(map(len, self.prompts))) > 1

    def per_prompt(self, name: str) -> list[Any]:
        """A setting as a list."""
        value = getattr(self, name)
        return value if isinstance(value, list) else [value] * len(self.prompts)

    def limits(self) -> list[int]:
        """Most new tokens of each prompt."""
        room = self.max_seq_len or rule.CONTEXT
        pairs = zip(self.per_prompt("max_gen_len"), self.prompts, strict=True)
        return [min(wish, room - len(prompt)) for wish, prompt in pairs]

    def temperatures(self) -> list[float]:
        """Of each prompt."""
        return [0.0] * len(self.prompts) if self.stream == "greedy" else self.per_prompt("temperature")

    # --- the call ---

    def keywords(self) -> dict[str, Any]:
        """As `generate` takes them, its prompts included."""
        asked = dict(self.wanted)
        asked |= {"max_gen_len": self.max_gen_len, "schedule": self.schedule, "compat": self.compat}
        asked |= {"temperature": self.temperature, "top_p": self.top_p, "pad_token_id": PAD}
        asked |= {"max_seq_len": self.max_seq_len, "num_return_sequences": self.copies}
        asked["eos_token_id"] = self.eos if len(self.eos) > 1 else self.eos[0]
        if self.stream == "greedy":
            asked["temperature"] = 0
        elif self.stream == "seeds":
            asked["seeds"] = self.seeds
        elif self.stream == "generator":
            asked["generator"] = torch.Generator().manual_seed(self.one_seed())
        for name, value in self.edits.items():
            asked |= {"logits_processor": [BiasByText()]} if name == "processor" else {name: value}
        if self.ends == "criterion":
            asked["stopping_criteria"] = [EndsBySum()]
        elif self.ends is not None:
            asked |= {"stop_strings": [self.ends], "tokenizer": letters()}
        if self.cache == "none":
            asked["use_cache"] = False
        elif self.cache == "static":
            asked["cache_implementation"] = "static"
        elif self.cache == "chunks":
            asked["chunk_bytes"] = 1
        elif self.cache == "given":
            held = torch.tensor([prompt[:-1] for prompt in self.prompts])
            asked["past_key_values"] = rule.tiny()(held, use_cache=True).past_key_values
        if "streamer" in asked:
            asked["streamer"] = Collector()
        return asked | self.inputs()

    def inputs(self) -> dict[str, Any]:
        """Prompts as lists, or as a tensor and its mask, padded on a side."""
        if self.form == "lists":
            return {"inputs": self.prompts}
        longest = max(map(len, self.prompts))
        rows, masks = [], []
        for prompt in self.prompts:
            pads, ones = [PAD] * (longest - len(prompt)), [1] * len(prompt)
            gap = [0] * len(pads)
            rows.append(pads + prompt if self.form == "left" else prompt + pads)
            masks.append(gap + ones if self.form == "left" else ones + gap)
        return {"inputs": torch.tensor(rows), "attention_mask": torch.tensor(masks)}

    def one_seed(self) -> int:
        """For Meta's stream."""
        return self.seeds if isinstance(self.seeds, int) else self.seeds[0]

    # --- the rule ---

    def rows(self) -> list[Row | None]:
        """What the rule gives, row by row; None for second copies on seeds, whose stream is ours to choose."""
        limits, temperatures, top_ps = self.limits(), self.temperatures(), self.per_prompt("top_p")
        count, shortest = len(self.prompts) * self.copies, min(map(len, self.prompts))
        steps = max(len(prompt) + limit for prompt, limit in zip(self.prompts, limits, strict=True)) - shortest
        blocks = []
        if self.stream in ("generator", "global"):
            generator = torch.Generator().manual_seed(self.one_seed())
            blocks = [torch.empty(count, VOCAB).exponential_(generator=generator) for _ in range(steps)]
        seeds = list(range(self.seeds, self.seeds + count)) if isinstance(self.seeds, int) else self.seeds
        made: list[Row | None] = []
        for place in range(count):
            number, copy = divmod(place, self.copies)
            if self.stream == "seeds" and copy:
                made.append(None)
                continue
            row = Row(self.prompts[number], limits[number])
            temperature, top_p = temperatures[number], top_ps[number]
            lag = len(row.prompt) - shortest
            if temperature == 0:
                draws = [rule.greedy] * row.limit
            elif self.stream == "seeds":
                draws = [rule.seeded_draw(seeds[number], temperature, top_p)] * row.limit
            else:
                own = [block[place] for block in blocks[lag : lag + row.limit]]
                draws = [rule.meta_draw(noise, temperature, top_p) for noise in own]
            ends = self.ends_text
            rule.grow(row, draws, temperature, top_p, eos=self.eos, edits=self.plain_edits(), ends=ends)
            made.append(row)
        return made

    def plain_edits(self) -> list[rule.Edit]:
        """The options in force, in transformers' order."""
        make = {
            "repetition_penalty": rule.repetition_penalty,
            "no_repeat_ngram_size": rule.no_repeat_ngram,
            "bad_words_ids": lambda words: rule.bad_words(words, self.eos),
            "min_new_tokens": lambda least: rule.min_new_tokens(least, self.eos),
            "forced_eos_token_id": rule.forced_eos,
            "suppress_tokens": rule.suppress,
            "begin_suppress_tokens": lambda tokens: rule.suppress(tokens, first_only=True),
            "processor": lambda _: rule.by_text(bias_of),
        }
        return [make[name](self.edits[name]) for name in make if name in self.edits]

    def ends_text(self, text: list[int]) -> bool:
        """Whether the criterion or the stop string ends a row here."""
        if self.ends is None:
            return False
        if self.ends == "criterion":
            return sum(text) % 7 == 0
        return "".join(LETTERS[token] for token in text).endswith(self.ends)


EDITS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.5]),
        "no_repeat_ngram_size": st.integers(2, 3),
        "bad_words_ids": st.lists(st.lists(IDS, min_size=1, max_size=2), min_size=1, max_size=4),
        "min_new_tokens": st.integers(1, 4),
        "forced_eos_token_id": IDS,
        "suppress_tokens": st.lists(IDS, min_size=1, max_size=8, unique=True),
        "begin_suppress_tokens": st.lists(IDS, min_size=1, max_size=8, unique=True),
        "processor": st.just(True),
    },
)


@st.composite
def calls(draw: Any) -> Call:
    """A call that must be answered."""

    def now_and_then(strategy: Any, otherwise: Any) -> Any:
        return draw(strategy) if draw(st.integers(0, 2)) == 0 else otherwise

    def per_row(strategy: Any) -> Any:
        return draw(st.one_of(strategy, st.lists(strategy, min_size=rows, max_size=rows)))

    rows = draw(st.integers(1, 4))
    width = st.just(draw(st.integers(1, 6))) if draw(st.booleans()) else st.integers(1, 6)
    prompts = []
    for _ in range(rows):
        length = draw(width)
        prompts.append(draw(st.lists(IDS, min_size=length, max_size=length)))
    if draw(st.integers(0, 3)) == 0:
        prompts = [prompts[0]] * rows
    longest = max(map(len, prompts))
    one_length = len(set(map(len, prompts))) == 1
    copies = now_and_then(st.just(2), 1)
    caches = ["none", "static", "chunks"] + ["given"] * (one_length and longest > 1 and copies == 1)
    wanted = {
        name: value
        for name, value in {
            "echo": draw(st.booleans()),
            "logprobs": draw(st.booleans()),
            "top_logprobs": draw(st.sampled_from([0, 0, 1, 3])),
            "return_dict_in_generate": draw(st.booleans()),
            "output_logits": draw(st.booleans()),
            "streamer": rows * copies == 1 and draw(st.booleans()),
        }.items()
        if value
    }
    return Call(
        prompts=prompts,
        form=draw(st.sampled_from(["lists", "left", "right"])),
        max_gen_len=per_row(st.integers(0, 6)),
        max_seq_len=now_and_then(st.integers(longest, longest + 6), None),
        temperature=per_row(st.sampled_from([0.0, 0.5, 1.0, 1.5])),
        top_p=per_row(st.sampled_from([0.0, 0.4, 0.9, 1.0])),
        stream=draw(st.sampled_from(["greedy", "seeds", "seeds", "generator", "global"])),
        seeds=per_row(st.integers(0, 2**40)),
        eos=draw(st.lists(IDS, min_size=1, max_size=5, unique=True)),
        copies=copies,
        schedule=draw(st.sampled_from(["auto", "reference", "padded"])),
        compat=draw(st.sampled_from(["fixed", "fixed", "meta"])),
        edits=now_and_then(EDITS, {}),
        ends=now_and_then(
            st.one_of(st.just("criterion"), st.sampled_from(LETTERS), st.sampled_from(["ab", "cC"])), None
        ),
        cache=now_and_then(st.sampled_from(caches), "default"),
        wanted=wanted,
    )
