"""Turn a record into a `Request`, or an error `Response`; `InputIndex` identifies a file's records by content.

This module runs no model and writes no file.
"""

import difflib
import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checks import check_int, check_temperature, check_top_p, first_not_none
from ..defaults import SAMPLING_LOGPROBS
from ..generation.model_info import vocab_size_of
from ..generation.windows import check_stride
from ..llama.dialog import UNSAFE_ERROR, is_unsafe, with_plain_contents
from ..llama.llama import Llama
from ..llama.named_tokens import token_id
from ..llama.tokenizer import id_before
from ..text.stopping import check_strings
from .jsonl import TOO_DEEP, Field, canonical, canonical_record, find_value, read_object, read_record
from .settings import FieldNames, RunSettings, check_seed

Value = TypeVar("Value")

PROMPTS = ("prompt", "prompt_tokens", "messages")
LIMITS = ("max_gen_len", "max_tokens", "max_new_tokens", "max_completion_tokens")
STOPS = ("stop", "stop_strings", "stop_sequences")
SETTINGS = ("temperature", "top_p", *LIMITS, *STOPS, "seed", "logprobs_of")
SCORING = ("start", "stride", "bos")  # settings of a run that scores; data in any other
OUTPUTS = (*STOPS, "logprobs_of")  # settings that say what of an answer to return, and change no draw
IDS = ("id", "task_id", "custom_id", "request_id", "question_id", "example_id", "uid", "uuid", "_id")
# Fields of a response: a kept field may not have one of these names.
RESPONSE_FIELDS = {
    *("id", "generation", "tokens", "finish_reason", "stop_reason", "seed", "logprobs", "top_logprobs"),
    *("prompt_tokens", "prompt_logprobs", "error", "line"),
    *("logprobs_of", *SAMPLING_LOGPROBS),
}
SCORE_FIELDS = {"total", "count"}  # further ones of a run that scores
# Settings of other samplers, with the values that ask for nothing. Any other value cannot be honoured.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "num_beams", "num_return_sequences"), (1,)),
    **dict.fromkeys(("typical_p", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "no_repeat_ngram_size", "min_p"), (0,)),
    **dict.fromkeys(("min_tokens", "min_new_tokens", "min_length", "top_logprobs"), (0,)),
    **dict.fromkeys(("logprobs", "prompt_logprobs", "echo", "stream", "ignore_eos"), (False,)),
    **dict.fromkeys(("stop_token_ids", "bad_words_ids", "tools", "functions"), ([], "")),
    **dict.fromkeys(("max_length", "max_seq_len", "eos_token_id", "temp", "epsilon_cutoff", "eta_cutoff"), ()),
    "top_k": (0, -1),
    "do_sample": (True,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    # Those of vLLM, SGLang, text-generation-inference, llama.cpp and Ollama, and newer ones of OpenAI.
    **dict.fromkeys(("use_beam_search", "early_stopping", "include_stop_str_in_output", "no_stop_trim"), (False,)),
    **dict.fromkeys(("continue_final_message", "return_full_text", "penalize_nl"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("beam_width", "repeat_penalty", "tfs_z", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("mirostat", "dynatemp_range", "dry_multiplier", "xtc_probability", "penalty_alpha"), (0,)),
    **dict.fromkeys(("n_probs", "top_n_tokens"), (0,)),
    **dict.fromkeys(("stop_words", "stop_tokens", "bad_words", "suppress_tokens"), ([], "")),
    **dict.fromkeys(("chat_template_kwargs", "structured_outputs", "extra_body"), ({},)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ({}, [], "")),
    **dict.fromkeys(("allowed_token_ids", "add_special_tokens", "truncate_prompt_tokens", "chat_template"), ()),
    **dict.fromkeys(("max_output_tokens", "max_tokens_to_sample", "n_predict", "num_predict", "reasoning_effort"), ()),
}
_REPEAT = "write the record as often, since equal ones get a stream of their own each"
# What to do instead of dropping a setting of `UNSUPPORTED`.
_INSTEAD = {
    **dict.fromkeys(("n", "best_of", "num_return_sequences"), _REPEAT),
    **dict.fromkeys(("logprobs", "top_logprobs", "prompt_logprobs"), "give it to the run (--{option})"),
    **dict.fromkeys(("max_output_tokens", "max_tokens_to_sample", "n_predict", "num_predict"), "name it max_gen_len"),
    **dict.fromkeys(("stop_words", "stop_tokens"), "name it stop"),
    "temp": "name it temperature",
    "do_sample": "give a temperature of 0",
}


class Refused(ValueError):
    """The run is refused, or stopped by `strict`; every process raises it for the same reason."""


@dataclass(frozen=True)
class Request:
    """A record that can be answered.

    `index` counts the input's lines from 0; `id` and `kept` (fields to copy) are JSON text; `limit` is the most new
    tokens that fit; `named` are the ids to score, and `stop` the strings that end the answer, which is a message if
    `is_dialog`. Of a prompt that is scored, `start` is the first position asked for, `stride` moves a window over it if
    it is longer than one, and `bos` is the id before it.
    """

    index: int
    id: str
    prompt: list[int]
    temperature: float
    top_p: float
    limit: int
    seed: int
    kept: tuple[tuple[str, str], ...] = ()
    named: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    is_dialog: bool = False
    start: int = 0
    stride: int | None = None
    bos: int | None = None


@dataclass(frozen=True)
class Response:
    """A line of the output: JSON without a newline, its number of tokens, and the message of an error record."""

    index: int
    json: bytes
    tokens: int
    error: str | None = None


def respond(request: Request, fields: dict[str, Any], tokens: int) -> Response:
    """Build the response to a request: its id, these fields, and the record's kept fields."""
    return Response(request.index, _encode(request.id, fields, request.kept), tokens)


def respond_with_error(index: int, id_json: str, message: str) -> Response:
    """Build the response to a record that cannot be answered."""
    return Response(index, _encode(id_json, {"error": message, "line": index + 1}), 0, message)


def _encode(id_json: str, fields: dict[str, Any], kept: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Encode a line of JSON, unescaped if UTF-8 can hold it. JSON has no infinity: such logprobs become null."""
    try:
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(fields), ensure_ascii=False)
    more = "".join(f", {json.dumps(name)}: {value}" for name, value in kept)
    try:
        return f'{{"id": {id_json}, {text[1:-1]}{more}}}'.encode()
    except UnicodeEncodeError:  # a lone surrogate, in an error message or in a tokenizer's text
        return f'{{"id": {id_json}, {json.dumps(json.loads(text))[1:-1]}{more}}}'.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class RecordReader:
    """Reads records for one model: checks them, and encodes their prompts.

    `unused` collects the names of fields that have no meaning here and are not kept.
    """

    def __init__(self, llama: Llama, settings: RunSettings) -> None:
        self.llama = llama
        self.settings = settings
        self.vocab_size = vocab_size_of(llama.model)
        self.names: FieldNames = settings.fields
        self.prompt_names = PROMPTS if self.names.prompt is None else (self.names.prompt,)
        self.id_names = IDS if self.names.id is None else (self.names.id,)
        scoring = [name for name in SCORING if settings.score and name not in self.prompt_names]
        self.setting_names = (*SETTINGS, *scoring)
        self.used = frozenset({*self.prompt_names, *self.setting_names} - {self.names.id})
        self.unused: set[str] = set()

    def request(self, index: int, line: bytes, repeat: int) -> Request | Response:
        """Read a line as a request, or an error response; `repeat` counts the equal records before it."""
        try:
            record = self._fields(line)
            return self._request(index, record, repeat)
        except (TypeError, ValueError) as error:
            return respond_with_error(index, find_value(line, self.id_names) or "null", str(error))

    def content(self, line: bytes) -> bytes:
        """Normalize a record's spacing and the order of its fields, for comparison; keep other lines unchanged."""
        try:
            return canonical_record(self._fields(line), self.used).encode()
        except ValueError:
            return b"!" + line.strip()

    def _fields(self, line: bytes) -> dict[str, Field]:
        """Read a record's fields; those in the `body` of a request to an OpenAI-like server count as its own."""
        record = read_record(line, self.used)
        if "body" in record and "custom_id" in record and not any(name in record for name in self.prompt_names):
            body = record["body"].json
            if body.startswith("{"):
                record = {name: field for name, field in record.items() if name != "body"}
                record |= read_object(body, self.used)
        return record

    def _request(self, index: int, record: dict[str, Field], repeat: int) -> Request:
        self._check_names(record)
        values = {name: self._value(name, field) for name, field in record.items() if name in self.used}
        bos = self._bos(values)
        prompt = self._prompt(values, bare=bos is not None)
        most = self.llama.max_seq_len
        stride = self._stride(values, len(prompt), bos)
        limit, seed = self._limit(values), values.get("seed")
        if seed is None:
            # 53 bits, which every JSON reader preserves.
            drawn_from = {name: field for name, field in record.items() if name not in OUTPUTS}
            seed = hash64(self.settings.seed, canonical_record(drawn_from, self.used), repeat) >> 11
        return Request(
            index=index,
            id=next((record[name].json for name in self.id_names if name in record), "null"),
            prompt=prompt,
            temperature=check_temperature(values.get("temperature", self.settings.draw.temperature)),
            top_p=check_top_p(values.get("top_p", self.settings.draw.top_p)),
            limit=0 if self.settings.score else min(limit, most - len(prompt)),
            seed=check_seed(seed),
            kept=self._kept(record),
            named=self._named(values),
            stop=self._stop(values),
            is_dialog=self._is_dialog(values),
            start=check_int("start", self._of_scoring("start", values) or 0, least=0, most=len(prompt)),
            stride=stride,
            bos=None if bos is False else bos,
        )

    def _value(self, name: str, field: Field) -> Any:
        if field.value is TOO_DEEP:
            raise ValueError(f"{name} must be flat, and this is nested too deeply")
        return field.value

    # Fields

    def _check_names(self, record: dict[str, Field]) -> None:
        """Refuse settings that cannot be honoured, by name; note which data fields are left out."""
        asked_for = () if isinstance(self.names.keep, bool) else self.names.keep
        for name, field in record.items():
            if name in self.used or name in self.id_names or name in asked_for:
                continue
            if name in UNSUPPORTED:
                if field.value in UNSUPPORTED[name] or self._does_anyway(name, field.value):
                    continue
                way_out = _INSTEAD.get(name, "drop it").format(option=name.replace("_", "-"))
                raise ValueError(
                    f"a record has no field {name!r} here, which asks for what this run does not do: {way_out}, or "
                    f"name it in keep_fields (--keep-field {name}) if it is data"
                )
            meant = _misspelled(name, self.setting_names)
            if meant is not None:
                raise ValueError(
                    f"a record has no field {name!r}, did you mean {meant!r}? Otherwise drop it, or name it in "
                    f"keep_fields (--keep-field {name}) if it is data"
                )
            if not self.names.keep:
                self.unused.add(name)

    def _does_anyway(self, name: str, value: Any) -> bool:
        """Whether the run's own settings give what a record asks for: scores, or that its prompt is echoed."""
        settings, scored = self.settings, self.settings.score
        given = {
            "echo": scored,
            "logprobs": scored or settings.logprobs,
            "prompt_logprobs": scored or settings.prompt_logprobs,
            "top_logprobs": True,
        }
        best = 0 if isinstance(value, bool) else value
        return given.get(name, False) and isinstance(best, int | float) and 0 <= best <= settings.top_logprobs

    def _kept(self, record: dict[str, Field]) -> tuple[tuple[str, str], ...]:
        keep = self.names.keep
        if isinstance(keep, bool):
            names = [name for name in record if keep and name not in self.used and name not in self.id_names]
        else:
            names = [name for name in record if name in keep]
        for name in names:
            if name in RESPONSE_FIELDS or (self.settings.score and name in SCORE_FIELDS):
                raise ValueError(
                    f"a kept field must not be named like one of the response, and {name!r} is: rename it, or name in "
                    "keep_fields (--keep-field) only those to keep"
                )
        return tuple((name, record[name].json) for name in names)

    def _limit(self, values: dict[str, Any]) -> int:
        given = {name: values[name] for name in LIMITS if name in values}
        numbers = {check_int(name, value, least=0) for name, value in given.items()}
        return _one_of_aliases(given, numbers, self.settings.max_gen_len)

    def _stop(self, values: dict[str, Any]) -> tuple[str, ...]:
        """Return the record's own stop strings, else the run's."""
        given = {name: values[name] for name in STOPS if name in values}
        return _one_of_aliases(given, {check_strings(value) for value in given.values()}, self.settings.stop)

    def _named(self, values: dict[str, Any]) -> tuple[int, ...]:
        """Return the ids to score in a record: its own, else the run's."""
        given = values.get("logprobs_of")
        return self.settings.logprobs_of if given is None else named_in_vocabulary(given, self.llama)

    def _of_scoring(self, name: str, values: dict[str, Any]) -> Any:
        return values.get(name) if name in self.setting_names else None

    def _bos(self, values: dict[str, Any]) -> int | None:
        """Return the id before a scored text, the record's own or the run's; see `RunSettings`."""
        given = self._of_scoring("bos", values)
        return self.settings.bos if given is None else bos_in_vocabulary(given, self.llama)

    def _stride(self, values: dict[str, Any], length: int, bos: int | None) -> int | None:
        """Return the stride of a prompt that is longer than a window; refuse a longer one without a stride."""
        most = self.llama.max_seq_len
        stride = check_stride(first_not_none(self._of_scoring("stride", values), self.settings.stride), most)
        put = bos is not None and bos is not False
        if length + put <= most:
            return None
        if stride is None:
            way_out = ", or slide a window over it with stride (--stride)" * self.settings.score
            raise ValueError(
                f"a prompt must fit max_seq_len of {most} tokens, got {length}{' and its BOS' * put}: shorten or split "
                f"it{way_out}"
            )
        return stride

    # Prompts

    def _prompt(self, values: dict[str, Any], *, bare: bool) -> list[int]:
        """Encode a prompt; a `bare` text or dialog without the tokenizer's BOS."""
        given = [name for name in self.prompt_names if name in values]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            *names, last = self.prompt_names
            wanted = f"one of {', '.join(names)} and {last}" if names else repr(last)
            raise ValueError(f"a record must hold {wanted}, got {found}")
        name, value = given[0], values[given[0]]
        if self._is_dialog(values):
            return self._dialog_tokens(name, value, bare=bare)
        if name == "prompt_tokens" or _is_list_of(value, int):
            return self._checked_tokens(name, value)
        return self._text_tokens(name, value, bare=bare)

    def _is_dialog(self, values: dict[str, Any]) -> bool:
        name = next(name for name in self.prompt_names if name in values)
        return name == "messages" or (name != "prompt_tokens" and _is_list_of(values[name], dict))

    def _text_tokens(self, name: str, text: Any, *, bare: bool) -> list[int]:
        if not isinstance(text, str):
            way_out = "give each a record" if _is_list_of(text, str) else "token ids go into prompt_tokens"
            raise TypeError(f"{name} must be a text, got {type(text).__name__}: {way_out}")
        tokenizer = self.llama.tokenizer
        ids = tokenizer.encode(text, bos=tokenizer.bos_id >= 0 and not bare, eos=False)
        if not ids:
            raise ValueError(f"{name} must hold at least one token, and this tokenizer makes none of {text!r}")
        return self._embedded(name, ids)

    def _checked_tokens(self, name: str, ids: Any) -> list[int]:
        if not isinstance(ids, list):
            raise TypeError(f"{name} must be a list of token ids, got {type(ids).__name__}")
        if not ids:
            raise ValueError(f"{name} must hold at least one token id: start it with BOS")
        most = self.vocab_size - 1
        return [check_int("a token id", token, least=0, most=most, where=f" at {i}") for i, token in enumerate(ids)]

    def _dialog_tokens(self, name: str, dialog: Any, *, bare: bool) -> list[int]:
        if not isinstance(dialog, list) or not dialog or not all(isinstance(message, dict) for message in dialog):
            raise ValueError(f'{name} must be a list such as [{{"role": "user", "content": "..."}}]')
        dialog = with_plain_contents(dialog)
        if not self.llama.has_chat_template and is_unsafe(dialog):
            raise ValueError(UNSAFE_ERROR)
        ids = self.llama.encode_dialog(dialog)
        if bare and ids[:1] == [self.llama.tokenizer.bos_id]:
            ids = ids[1:]
        return self._embedded(name, ids)

    def _embedded(self, name: str, ids: list[int]) -> list[int]:
        """Check a text's ids: tokens that were added to the tokenizer may be unknown to the model."""
        beyond = next((token for token in ids if token >= self.vocab_size), None)
        if beyond is not None:
            raise ValueError(
                f"{name} must hold tokens that the model embeds, which has {self.vocab_size}, and the tokenizer makes "
                f"{beyond} of a part: leave it out, or resize the model's embedding"
            )
        return ids


def named_in_vocabulary(given: Any, llama: Llama) -> tuple[int, ...]:
    """Convert a list of ids, and of texts of one token, to ids."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"logprobs_of must be a list of token ids or texts of one token, got {given!r}")
    most = vocab_size_of(llama.model) - 1
    return tuple(check_int("logprobs_of", token_id(one, llama.tokenizer), least=0, most=most) for one in given)


def bos_in_vocabulary(given: Any, llama: Llama) -> int:
    """Convert `bos` of scoring to an id, or False for none."""
    token = id_before(llama.tokenizer, given)
    return False if token is None else check_int("bos", token, least=0, most=vocab_size_of(llama.model) - 1)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _one_of_aliases(given: dict[str, Any], values: set[Value], default: Value) -> Value:
    """Return the value of a setting that has several names, of which some are given."""
    if len(values) > 1:
        raise ValueError(f"{' and '.join(given)} mean the same and differ: give one of them")
    return values.pop() if values else default


def _misspelled(name: str, names: Sequence[str]) -> str | None:
    """Guess the setting that a name means, or None: a mistyped setting must not be taken for data."""
    plain = name.lower().replace("-", "").replace("_", "")
    settings = {setting.replace("_", ""): setting for setting in names}
    long = [setting for setting in settings if len(setting) > 6]
    close = [plain] if plain in settings else difflib.get_close_matches(plain, long, n=1, cutoff=0.88)
    return settings[close[0]] if close else None


def hash64(*parts: object) -> int:
    """Hash the parts to 64 bits, the same on every machine and in every process."""
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class InputIndex:
    """First pass over the input: counts the records, and gives each a key. Empty lines at the end do not count.

    `keys` (uint64, one per record) depends on a record's content, the run's settings, and the number of equal records
    before it (`repeats`, int32). Nothing depends on line numbers.

    Args:
        file: the input, seekable.
        reader: normalizes lines.
        settings: the run's, model included: other settings give other keys.

    Raises:
        Refused: the input is not UTF-8 text, or two different records have one key (one chance in a million, for six
            million records).
    """

    def __init__(self, file: BinaryIO, reader: RecordReader, settings: dict[str, Any]) -> None:
        salt, whole_input, size, blank = canonical(settings), hashlib.blake2b(digest_size=16), 0, 0
        digests = array("Q")
        file.seek(0)
        for line in file:
            if size == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise Refused("the input must be UTF-8, and its first bytes say UTF-16: convert it (iconv -t UTF-8)")
            blank = blank + 1 if not line.strip() else 0
            digests.append(hash64(salt, reader.content(line)))
            whole_input.update(line)
            size += len(line)
        keys: NDArray[np.uint64] = np.array(digests[: len(digests) - blank], dtype=np.uint64)
        self.repeats = _repeats(keys)
        for index in np.flatnonzero(self.repeats):
            keys[index] = hash64(int(keys[index]), int(self.repeats[index]))
        self.keys = keys
        self.order = np.argsort(keys, kind="stable")
        self.sorted = keys[self.order]
        if bool((self.sorted[1:] == self.sorted[:-1]).any()):
            raise Refused("two different records have the same 64-bit key: split the input in two")
        self.description = {"records": len(keys), "bytes": size, "blake2b": whole_input.hexdigest()}
        self.stamp = _stamp(file)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Check that the input's size and time are those of the first pass.

        Raises:
            ValueError: they are not.
        """
        if _stamp(file) != self.stamp:
            raise ValueError("the input was changed during the run: start again with a file that stays as it is")

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: int) -> int | None:
        """Return the index of the record with this key, or None."""
        position = int(np.searchsorted(self.sorted, np.uint64(key)))
        found = position < len(self.sorted) and int(self.sorted[position]) == key
        return int(self.order[position]) if found else None


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _repeats(digests: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Count the equal values before each value: [7, 5, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(digests, kind="stable")
    ranks = np.arange(len(order))
    ordered = digests[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    repeats = np.empty(len(order), dtype=np.int32)
    repeats[order] = ranks - np.maximum.accumulate(np.where(first, ranks, 0))
    return repeats
