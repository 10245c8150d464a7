"""A model for lm-evaluation-harness: shared headers and contexts are prefilled once; sampled runs repeat exactly.

The rules for spaces, empty contexts, truncation and token counts are the harness' own
(EleutherAI/lm-evaluation-harness, ``lm_eval/api/model.py``, ``lm_eval/models/huggingface.py``). What this module does
not do: it knows no task.
"""

import contextlib
import hashlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from ..checks import check_bool, check_int, first_not_none
from ..generation.model_info import vocab_size_of
from ..llama.llama import Llama
from ..text.stopping import StopStrings

logger = logging.getLogger(__name__)

_BATCH_SIZE = 8
_MAX_GEN_TOKS = 256  # the harness' own
_NOT_OURS = ("do_sample", "until", "max_gen_toks", "temperature")
_OF_SAMPLING = ("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # play no part in a greedy task


@register_model("hf-llama")
class LlamaLM(TemplateLM):
    """LLAMA2's generation and scoring as a model of lm-evaluation-harness.

    Args:
        pretrained: what `Llama.build` takes as `ckpt_dir` (a transformers folder, Meta's own, a GGUF file, a Hub id), a
            `Llama`, or a transformers model.
        tokenizer: where the tokenizer is, or a tokenizer; where `pretrained` is, if not given. A transformers model
            needs one.
        batch_size: most prompts in one call of `generate`; the harness' `"auto"` and `"auto:N"` mean 8. Scoring
            cuts its work by memory instead.
        max_batch_size: the most that `"auto"` may mean.
        seeds: the run's seed. Each document draws from a stream of its own, from this and its text; 1 if not given.
        max_length: most tokens of a text; the model's context if not given.
        add_bos_token: whether texts start with BOS; the tokenizer's own habit if not given.
        prefix_token_id: stands before a text without context; BOS, or EOS where there is none, if not given.
        max_gen_toks: most new tokens of tasks that do not say; the harness' 256 if not given.
        dtype, device: as `Llama.build` takes them (`device` as its `device_map`).
        others: none. What the harness' own model classes take beside these is refused by name.

    Raises:
        ValueError: a value is out of range, a transformers model comes without its tokenizer, or `trust_remote_code`.
        TypeError: another argument of the harness' own model classes.

    >>> import hf_llama_sampling.evaluation  # registers "hf-llama"
    >>> lm_eval.simple_evaluate(model="hf-llama", model_args="pretrained=FOLDER", tasks=["lambada_openai"])
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        seeds: int = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        dtype: Any = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse_others(others)
        self.llama = _llama(pretrained, tokenizer, dtype, device)
        self.model = self.llama.model
        self.tokenizer = getattr(self.llama.tokenizer, "tokenizer", None)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.seeds = check_int("seeds", seeds, least=0, most=2**64 - 1)
        self.max_length = check_int("max_length", int(first_not_none(max_length, self.llama.max_seq_len)), least=1)
        self.add_bos_token = None if add_bos_token is None else check_bool("add_bos_token", add_bos_token)
        most = vocab_size_of(self.model) - 1
        self._prefix = (
            None if prefix_token_id is None else check_int("prefix_token_id", prefix_token_id, least=0, most=most)
        )
        self.max_gen_toks = check_int("max_gen_toks", max_gen_toks, least=1)

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text; -1 if the tokenizer has none."""
        return int(self.llama.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the id that replaces an empty context: the one asked for, else BOS, or EOS if there is no BOS."""
        if self._prefix is not None:
            return self._prefix
        bos = int(self.llama.tokenizer.bos_id)
        found = bos if bos >= 0 else self.eot_token_id
        if found < 0:
            raise ValueError(
                "a text without context is scored after BOS or EOS, and this tokenizer has neither: give "
                "prefix_token_id"
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, for the harness' caches."""
        name = getattr(self.tokenizer, "name_or_path", type(self.llama.tokenizer).__name__)
        return str(name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, never with two BOS; the call, `add_bos_token` or the tokenizer decides whether to add one."""
        if self.tokenizer is None:
            wanted = first_not_none(add_special_tokens, self.add_bos_token, True)
            ids: list[int] = self.llama.tokenizer.encode(string, bos=wanted, eos=False)
            return ids
        wanted = first_not_none(add_special_tokens, self.add_bos_token)
        has_prefix = self._prefix is not None or max(self.llama.tokenizer.bos_id, self.eot_token_id) >= 0
        bos = self.tokenizer.decode([self.prefix_token_id]) if has_prefix else ""
        if add_special_tokens is None and bos and string.startswith(bos):
            wanted = False
        options = {} if wanted is None else {"add_special_tokens": wanted}
        return [int(token) for token in self.tokenizer.encode(string, **options)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation in the tokenizer's own chat format, as text.

        As in the harness, a template that refuses a system message gets the conversation without it, with a warning.
        """
        if self.tokenizer is None:
            raise ValueError(
                "a chat template comes with a transformers tokenizer, and this is a SentencePiece file: give the "
                "transformers tokenizer, or leave --apply_chat_template out"
            )
        others = [message for message in chat_history if message["role"] != "system"]
        for messages in (chat_history, others):
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
                return str(text)
            except Exception as error:  # a template is a program: it may raise anything
                if messages is others or len(others) == len(chat_history):
                    raise ValueError(
                        f"the tokenizer's chat template refuses these messages ({error}): do without it"
                    ) from error
                logger.warning("the chat template refuses a system message (%s): left out", error)
        raise AssertionError("unreachable")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as the harness does; a continuation that is part of the context's last token, by itself.

        There the harness cuts a continuation without a token off the whole, and stops with an assertion.
        """
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score each (texts, context, continuation): the continuation's logprob, and whether it is the greedy one."""
        wanted: dict[tuple[int, ...], list[int]] = defaultdict(list)  # context -> requests
        _warn_of_cuts([len(context) + len(rest) for _, context, rest in requests], self.max_length + 1)
        for place, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation must hold 1 to max_length={self.max_length} tokens, but that of request {place} "
                    f"has {len(continuation)}: correct the task, or raise max_length"
                )
            # The harness' own truncation: the last `max_length` inputs are kept, and the token after them is scored.
            kept = [*context, *continuation][-(self.max_length + 1) :]
            wanted[tuple(kept[: -len(continuation)])].append(place)
        contexts = list(wanted)
        made = self.model.score_continuations(
            [list(context) for context in contexts],
            [[requests[place][2] for place in wanted[context]] for context in contexts],
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for row, places in enumerate(wanted.values()):
            for column, place in enumerate(places):
                answers[place] = (made.totals[row][column], made.is_greedy[row][column])
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score each whole text, in windows that share one token of context, as the harness cuts them."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows += found
            counts.append(len(found))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm) if windows else [])
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the completion of each context, up to the first of its stop strings."""
        seeds = self._seeds([request.args for request in requests])
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items(), key=str))].append(place)
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for places in groups.values():
                for batch in self._batches([requests[place].args[0] for place in places], places):
                    texts = self._complete(
                        [requests[place].args[0] for place in batch],
                        requests[batch[0]].args[1],
                        [seeds[place] for place in batch],
                    )
                    for place, text in zip(batch, texts, strict=True):
                        answers[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(batch))
        return answers

    def _seeds(self, documents: Sequence[tuple[str, dict[str, Any]]]) -> list[int]:
        """Derive a seed for each document from the run's seed, its text, and the number of equal ones before it."""
        earlier: Counter[str] = Counter()
        seeds = []
        for context, settings in documents:
            what = repr((context, sorted(settings.items(), key=str)))
            digest = hashlib.blake2b(
                f"{self.seeds} {earlier[what]} {what}".encode(errors="surrogatepass"), digest_size=8
            )
            seeds.append(int.from_bytes(digest.digest(), "big"))
            earlier[what] += 1
        return seeds

    def _batches(self, texts: Sequence[str], places: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches of places, longest texts first, so that a batch that does not fit fails at the start."""
        order = sorted(range(len(places)), key=lambda i: (-len(texts[i]), i))
        for start in range(0, len(order), self.batch_size):
            yield [places[i] for i in order[start : start + self.batch_size]]

    def _complete(self, contexts: Sequence[str], settings: dict[str, Any], seeds: list[int]) -> list[str]:
        """Call `generate` once, with settings that all contexts share."""
        given = {name: value for name, value in settings.items() if value is not None}
        asked = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        eot = [self.eot_token_id] if self.eot_token_id >= 0 else []
        eos = (self.tokenizer or self.llama.tokenizer).decode(eot)
        until = handle_stop_sequences(asked.get("until"), eos=eos or None)
        max_gen_toks, sampled = int(asked["max_gen_toks"]), bool(asked.get("do_sample"))
        left_out = _NOT_OURS if sampled else (*_NOT_OURS, *_OF_SAMPLING)
        room = self.max_length - max_gen_toks
        if room < 1:
            raise ValueError(
                f"max_gen_toks must leave room for a prompt in {self.max_length} tokens, got {max_gen_toks}: lower it"
            )
        whole = [self.tok_encode(context) for context in contexts]
        _warn_of_cuts([len(ids) for ids in whole], room)
        prompts = [ids[-room:] for ids in whole]
        stops = StopStrings([text for text in until if text], len(prompts), self.llama.speller.control_tokens)
        output = self.model.generate(
            prompts,
            max_gen_len=max_gen_toks,
            max_seq_len=self.max_length,
            eos_token_id=sorted({self.eot_token_id, *self.llama.eos_ids} - {-1}),
            temperature=asked["temperature"] if sampled else 0,
            seeds=seeds,
            schedule="padded",
            stopping_criteria=[stops.criterion(prompts, self.llama.text_of)],
            **{name: value for name, value in asked.items() if name not in left_out},
        )
        texts = []
        for row, tokens in enumerate(output.tokens):
            text = self.llama.text_of(tokens)
            text = text[: len(text) - stops.cut(row, tokens, self.llama.text_of).dropped]
            texts.append(str(postprocess_generated_text(text, until, think_end_token=None)))
        return texts


def _refuse_others(others: dict[str, Any]) -> None:
    """Refuse arguments of the harness' own model classes, by name; some of them change answers."""
    if others.pop("trust_remote_code", False):
        raise ValueError(
            "code that comes with a checkpoint is never run here: leave trust_remote_code out, or load the model "
            "yourself if you trust it, and give the object as pretrained"
        )
    for name in others:
        raise TypeError(
            f"hf-llama takes no model argument {name!r}: leave it out, or load the model yourself and give the object "
            "as pretrained"
        )


def _warn_of_cuts(lengths: Sequence[int], most: int) -> None:
    """Warn of texts that are cut from the left, as the harness does."""
    longer = sum(length > most for length in lengths)
    if longer:
        logger.warning(
            "%d of %d texts have more tokens than the %d that are read, and are cut from the left: the longest has %d",
            longer,
            len(lengths),
            most,
            max(lengths),
        )


def _batch_size(asked: int | str | None, most: int | None) -> int:
    """Read the batch size that the harness asks for: a number, `"auto"`, or `"auto:N"`, which looks N times."""
    if asked is not None and not str(asked).startswith("auto"):
        return check_int("batch_size", int(asked) if str(asked).isdecimal() else asked, least=1)
    return _BATCH_SIZE if most is None else min(_BATCH_SIZE, check_int("max_batch_size", int(most), least=1))


def _llama(pretrained: Any, tokenizer: Any, dtype: Any, device: str | None) -> Llama:
    """Load `pretrained`, in any form, as a `Llama`."""
    if isinstance(pretrained, Llama):
        return pretrained
    if isinstance(pretrained, str | Path):
        where = pretrained if tokenizer is None else tokenizer
        with contextlib.redirect_stdout(io.StringIO()):  # the harness prints results there
            return Llama.build(pretrained, where, None, None, dtype=dtype, device_map=device)
    if tokenizer is None:
        raise ValueError("a transformers model comes without its tokenizer: pass tokenizer=")
    return Llama(pretrained, tokenizer)
