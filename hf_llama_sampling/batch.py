"""JSONL in, JSONL out: many prompts through one model, on one process or many, with nothing lost and nothing twice.

Input is read in windows. A window is sorted by length and cut into batches, and what a batch holds depends on the input
and the batch settings alone: not on the number of processes, nor on what an earlier run has answered already. Together
with one stream per prompt that makes the output the same, byte for byte, however often a run was killed and taken up.

Beside ``OUT.jsonl`` stands a folder ``OUT.jsonl.run``::

    run.json     what the run is: its settings, its input, whether it is complete
    part-00000   one per process; a line per answer, appended and synced batch by batch, gone when the run is complete
    keys         of a complete output, 8 bytes a record: which record each line answers

What this module does not do: it spreads no model over devices (`Llama.build` does), and it never looks at logits.
"""

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import stat
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from tqdm import tqdm

from . import TEMPERATURE, TOP_P, __version__
from .arguments import one_of, vocab_size_of, whole
from .dialog import UNSAFE_ERROR, is_unsafe
from .llama import Llama
from .warpers import check_temperature, check_top_p

try:
    import fcntl
except ImportError:  # not on Windows; two runs into one output are then not told from one
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Existing = Literal["check", "reuse", "restart"]

SEED = 1
BATCH_SIZE = 32  # rows
BATCH_TOKENS = 16_384  # rows x (longest prompt + most new tokens)
WINDOW = 1024  # records

STREAM = "-"
ERROR = -1  # in place of a token count
_FIELDS = ("id", "prompt", "prompt_tokens", "messages", "temperature", "top_p", "max_gen_len", "seed")
_PROMPTS = ("prompt", "prompt_tokens", "messages")
_PROBE = "The quick brown fox, 1234: \n\t\u00e9\u4f60\U0001f600"  # told apart by any two tokenizers
_SAMPLES = 64  # values looked at in each weight
_CACHED = 90.0  # seconds after which a network file system shows every machine a new file
_PATIENCE = timedelta(days=30)  # the processes of a run end hours apart, and accelerate's own limit is minutes


class Refused(ValueError):
    """The run is refused, or stopped by `strict`, for a reason that every process of it sees alike."""


class Summary(NamedTuple):
    """What a run came to.

    `records` and `errors` count lines of the output, `tokens` those generated (or scored) for it, by whichever run;
    `answered` counts the lines that this run added, on all processes together, and `seconds` is what it took.
    """

    records: int
    errors: int
    tokens: int
    answered: int
    seconds: float


class Question(NamedTuple):
    """A record that can be answered. Its place in the input counts from 0."""

    place: int
    id: Any
    prompt: list[int]
    temperature: float
    top_p: float
    limit: int  # most new tokens
    seed: int


class Answer(NamedTuple):
    """A line of the output, and the tokens it cost; `ERROR` for an error record."""

    place: int
    record: dict[str, Any]
    tokens: int


def run(
    llama: Llama,
    input: str | Path,
    output: str | Path,
    *,
    score: bool = False,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    max_gen_len: int | None = None,
    seed: int = SEED,
    logprobs: bool = False,
    prompt_logprobs: bool = False,
    top_logprobs: int = 0,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    window: int = WINDOW,
    strict: bool = False,
    existing: Existing = "check",
) -> Summary:
    """Answer every record of a JSONL file, in its order.

    A record holds one of `prompt` (text, put after a BOS), `prompt_tokens` (ids, taken as they are) and `messages` (a
    dialog: in the tokenizer's own chat format if it came with one, else in LLAMA2's), and may hold `temperature`,
    `top_p`, `max_gen_len` and `seed` of its own, and an `id`: any JSON value, returned as it is. Its answer holds `id`,
    `generation`, `tokens`, `finish_reason`, `seed`, and on request `logprobs`, `top_logprobs`, `prompt_tokens` and
    `prompt_logprobs`. A record that cannot be answered becomes `{"id": ..., "error": ..., "line": ...}` and is logged.

    - Output line n answers input line n. In float32 the answers do not depend on batch, window or number of processes,
      up to the rounding of the logits; with the batch settings as they were, not on that either.
    - A record without a `seed` gets one from the run's seed and its own content; of records that are equal in
      everything, the second gets another than the first. `seed` in the answer gives the same tokens again, alone.
    - A run that was stopped is taken up where it was by the same call, on any number of processes. The output appears
      when it is complete, at once.
    - Records are streamed: memory holds one window, and some 40 bytes for each record of the input.
    - A batch that does not fit the memory is halved, down to single records.

    To be called alike in every process of `accelerate launch` or `torchrun`; each has its own whole model. Several
    machines need the output on a file system that they share.

    Args:
        llama: the model and its tokenizer. Quirks of the reference (`compat`) are mended here whatever it says.
        input, output: paths, or `"-"` for standard streams, which belong to one process; an output that is a stream
            cannot be taken up again.
        score: generate nothing; answers hold `id`, `prompt_tokens`, `prompt_logprobs` and, on request, `top_logprobs`,
            and settings of the draw play no part.
        temperature, top_p, max_gen_len: for records without their own; `max_gen_len` None means `max_seq_len - 1`.
        seed: the run's.
        logprobs: whether to return each token's raw logprob.
        prompt_logprobs: whether to return the prompt's ids and their raw logprobs, 0.0 for the first.
        top_logprobs: how many best `[id, logprob]` to return at each token.
        batch_size: most rows in a batch; `llama.max_batch_size` if not given, or else 32.
        batch_tokens: most tokens in a batch: rows x (longest prompt + most new tokens). One row may have more.
        window: how many records are sorted together.
        strict: whether to stop at the first wrong record.
        existing: what to do about an output that is there already, finished or not. `"check"` takes up or leaves alone
            what the same input and settings made and refuses anything else, `"reuse"` keeps the answers of unchanged
            records and makes all others, errors included, `"restart"` makes all.

    Returns:
        The `Summary`, in every process.

    Raises:
        Refused: (a `ValueError`) the output belongs to something else, or with `strict` a record is wrong.
        ValueError: a setting is out of range, or a part file is corrupted.
        OSError: a file cannot be read or written; what was answered so far is kept.

    >>> batch.run(Llama.build(ckpt_dir, tokenizer_path, 4096, 32), "in.jsonl", "out.jsonl", max_gen_len=256)
    """
    start = time.monotonic()
    one_of("existing", existing, ("check", "reuse", "restart"))
    rows = whole("batch_size", (llama.max_batch_size or BATCH_SIZE) if batch_size is None else batch_size, least=1)
    if llama.max_batch_size is not None and rows > llama.max_batch_size:
        raise ValueError(f"batch_size must not exceed max_batch_size={llama.max_batch_size}, got {rows}: lower it")
    whole("batch_tokens", batch_tokens, least=1)
    whole("window", window, least=1)
    asker = Asker(
        llama,
        score=score,
        temperature=check_temperature(temperature),
        top_p=check_top_p(top_p),
        max_gen_len=llama.max_seq_len - 1 if max_gen_len is None else whole("max_gen_len", max_gen_len, least=0),
        seed=_seed(seed),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        top_logprobs=whole("top_logprobs", top_logprobs, least=0, most=vocab_size_of(llama.model)),
    )
    state = processes()
    if (getattr(llama.model, "tp_size", None) or 1) > 1 and state.num_processes > 1:
        raise Refused(
            "a batch run deals records out to processes, each with a whole model, but this model is spread over "
            'processes: load it with device_map="auto" in one process, or without tp_plan in each'
        )
    if state.num_processes > 1 and STREAM in (str(input), str(output)):
        raise Refused(f"standard streams belong to one process, but this run has {state.num_processes}: name files")
    with _opened(input) as file:
        survey = Survey(file, asker.settings)
        worker = _Worker(asker, file, survey, state, strict=strict, rows=rows, tokens=batch_tokens, window=window)
        summary = _to_stream(worker) if str(output) == STREAM else _to_file(worker, RunFolder(output), existing)
    return summary._replace(seconds=time.monotonic() - start)


def _to_stream(worker: "_Worker") -> Summary:
    lines = InOrder(sys.stdout.buffer)
    done = bytearray(len(worker.survey))
    with Progress(len(done), 0, []) as progress:
        worker.work(done, lines.put, progress)
    return Summary(len(done), lines.errors, lines.tokens, len(done), 0.0)


def _to_file(worker: "_Worker", folder: "RunFolder", existing: Existing) -> Summary:
    survey, state = worker.survey, worker.state
    claim = {"settings": worker.asker.settings, "input": survey.description}
    with contextlib.ExitStack() as stack:
        # Only the main process looks around and decides: others may see a network file system as it was a minute ago.
        parts: list[Part] = []

        def prepare() -> tuple[dict[str, Any], bytes | Summary]:
            standing = folder.standing(claim, existing)
            if standing == "complete":
                return claim, folder.finished()
            parts.append(stack.enter_context(folder.open_part(0)))
            folder.prepare(claim, standing, mine=parts[0].path, processes=state.num_processes)
            return claim, folder.answered(survey)

        main_claim, found = _on_main(state, prepare)
        if main_claim != claim:
            raise ValueError(
                f"all processes of a run need the same input and model, but process {state.process_index} has another "
                f"than process 0 ({_changes(main_claim, claim)}): load the same files everywhere"
            )
        if isinstance(found, Summary):
            return found
        if not state.is_main_process:
            parts.append(stack.enter_context(folder.open_part(state.process_index)))
        done = bytearray(found)
        before = sum(done)

        def keep(answers: Sequence[Answer]) -> None:
            parts[0].append([(int(survey.keys[answer.place]), answer) for answer in answers])

        others = [path for path in folder.parts() if path != parts[0].path] if state.is_main_process else []
        with Progress(len(done), before, others) as progress:
            worker.work(done, keep, progress)
    _wait(state)
    summary = _on_main(state, lambda: folder.finish(claim, survey))
    return summary._replace(answered=summary.records - before)


# Processes


def processes() -> PartialState:
    """accelerate's view of the processes of this run; one, unless a launcher started more."""
    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # Without an accelerator accelerate sees the processes only if it is told that they run on the CPU.
    state = PartialState(cpu=wanted or not _has_accelerator(), timeout=_PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but accelerate was set up for {state.num_processes} before: "
            "call batch.processes() before anything else uses accelerate"
        )
    return state


def _has_accelerator() -> bool:
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6
    return torch.cuda.is_available() if accelerator is None else bool(accelerator.is_available())


def _wait(state: PartialState) -> None:
    try:
        state.wait_for_everyone()
    except RuntimeError as error:  # what torch raises when a peer's connection closes
        raise _lost() from error


def _lost() -> ConnectionError:
    return ConnectionError(
        "another process of this run ended before its work was done: the same command takes up what is missing"
    )


def _on_main(state: PartialState, work: Callable[[], T]) -> T:
    """What the main process finds, in every process; an error of its is everyone's."""
    box: list[tuple[T | None, str | None]] = [(None, None)]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            box = [(work(), None)]
        except (ValueError, OSError) as error:
            box, failure = [(None, str(error))], error
    _spread(box)
    found, message = box[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise Refused(message)
    return cast(T, found)


def _spread(box: list[Any]) -> None:
    try:
        broadcast_object_list(box)
    except RuntimeError as error:
        raise _lost() from error


class Shares:
    """Deals batches out to processes: each to the one with the least work so far. Every process comes to the same."""

    def __init__(self, count: int) -> None:
        self.loads = [0] * count

    def give(self, cost: int) -> int:
        """Which process gets a batch of this cost."""
        process = self.loads.index(min(self.loads))
        self.loads[process] += cost
        return process


# Input


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The input as a file that can be read more than once; a stream is put into a temporary file."""
    if str(path) == STREAM:
        with _spooled(sys.stdin.buffer) as spooled:
            yield spooled
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise Refused(f"the input cannot be read: {str(path)!r}: {error.strerror}: check the path") from error
    with file:
        if file.seekable():
            yield file
        elif processes().num_processes > 1:
            raise Refused(f"several processes cannot read one stream, and {str(path)!r} is one: give a file")
        else:
            with _spooled(file) as spooled:
                yield spooled


@contextlib.contextmanager
def _spooled(stream: BinaryIO) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        for block in iter(lambda: stream.read(1 << 20), b""):
            file.write(block)
        yield file


def parse(line: bytes) -> dict[str, Any]:
    """One line as a record, without the fields that are null.

    Raises:
        ValueError: it is not one JSON object, or not JSON by the book: nan, infinity, a name twice.
    """
    try:
        record = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("a record must be a flat JSON object, and this is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a record must be UTF-8, and this line is not, at byte {error.start}: convert it") from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} at character {error.pos + 1}" if line.strip() else "it is empty"
        raise ValueError(f"a line must hold one JSON object: {what}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line must hold one JSON object, and this holds a {type(record).__name__}")
    return {name: value for name, value in record.items() if value is not None}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a JSON object names each field once, and this names {_twice(names)!r} twice: drop one")
    return record


def _twice(names: list[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}: give a number or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {text}")
    return number


def content(line: bytes) -> bytes:
    """What a record says, whatever its spacing and the order of its fields; a line that is no record, as it is."""
    try:
        return _canonical(parse(line)).encode()
    except ValueError:
        return b"!" + line.strip()


def _hash(*parts: object) -> int:
    """64 bits that depend on every part, and are the same everywhere and always."""
    text = b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


class Survey:
    """A first pass over the input: how many records there are, and by what they are known.

    `keys` (uint64, one per record) depends on a record's content, the settings, and how many equal ones come before it
    (`repeats`, int32). Nothing depends on line numbers.

    Raises:
        Refused: two different records have one key (one chance in a million, for six million records).
    """

    def __init__(self, file: BinaryIO, settings: dict[str, Any]) -> None:
        salt, whole_input, size = _canonical(settings), hashlib.blake2b(digest_size=16), 0
        digests = array("Q")
        file.seek(0)
        for line in file:
            digests.append(_hash(salt, content(line)))
            whole_input.update(line)
            size += len(line)
        keys: NDArray[np.uint64] = np.array(digests, dtype=np.uint64)
        self.repeats = _repeats(keys)
        for place in np.flatnonzero(self.repeats):
            keys[place] = _hash(int(keys[place]), int(self.repeats[place]))
        self.keys = keys
        self.order = np.argsort(keys, kind="stable")
        self.sorted = keys[self.order]
        if bool((self.sorted[1:] == self.sorted[:-1]).any()):
            raise Refused("two different records have the same 64-bit key: split the input in two")
        self.description = {"records": len(keys), "bytes": size, "blake2b": whole_input.hexdigest()}
        self.stamp = _stamp(file)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Nobody writes to the input while it is read.

        Raises:
            ValueError: it is not as it was in the first pass.
        """
        if _stamp(file) != self.stamp:
            raise ValueError("the input was changed during the run: start again with a file that stays as it is")

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, key: int) -> int | None:
        """Where the record with this key stands, or None if there is none."""
        index = int(np.searchsorted(self.sorted, np.uint64(key)))
        return int(self.order[index]) if index < len(self.sorted) and int(self.sorted[index]) == key else None


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _repeats(digests: NDArray[np.uint64]) -> NDArray[np.int32]:
    """For each value how many equal ones stand before it: [7, 5, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(digests, kind="stable")
    ranks = np.arange(len(order))
    ordered = digests[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    repeats = np.empty(len(order), dtype=np.int32)
    repeats[order] = ranks - np.maximum.accumulate(np.where(first, ranks, 0))
    return repeats


# Asking the model


class Asker:
    """Turns lines into questions and questions into answers. `settings` is all that answers depend on, input aside."""

    def __init__(
        self,
        llama: Llama,
        *,
        score: bool,
        temperature: float,
        top_p: float,
        max_gen_len: int,
        seed: int,
        logprobs: bool,
        prompt_logprobs: bool,
        top_logprobs: int,
    ) -> None:
        if score and logprobs:
            raise ValueError("scoring generates nothing that could have logprobs: the prompt's are always returned")
        self.llama = llama
        self.score = score
        self.temperature = temperature
        self.top_p = top_p
        self.max_gen_len = max_gen_len
        self.seed = seed
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.top_logprobs = top_logprobs
        self.eos_ids = llama._eos_ids()
        draws = {
            "eos_token_id": self.eos_ids,
            "temperature": temperature,
            "top_p": top_p,
            "max_gen_len": max_gen_len,
            "seed": seed,
            "logprobs": bool(logprobs),
            "prompt_logprobs": bool(prompt_logprobs),
        }
        self.settings: dict[str, Any] = {
            **_identity(llama),
            "mode": "score" if score else "generate",
            "top_logprobs": top_logprobs,
            **({} if score else draws),
        }

    def read(self, place: int, line: bytes, repeat: int) -> Question | Answer:
        """The question that a line asks, or the error record that answers it."""
        record: dict[str, Any] = {}
        try:
            record = parse(line)
            return self._question(place, record, repeat)
        except (TypeError, ValueError) as error:
            return _error(place, record.get("id"), str(error))

    def _question(self, place: int, record: dict[str, Any], repeat: int) -> Question:
        for name in record:
            if name not in _FIELDS:
                raise ValueError(
                    f"a record has no field {name!r}, only {', '.join(_FIELDS)}: drop it, or put what is to be carried "
                    "along into id"
                )
        prompt = self._prompt(record)
        most = self.llama.max_seq_len
        if len(prompt) > most:
            raise ValueError(f"a prompt must fit max_seq_len of {most} tokens, got {len(prompt)}: shorten or split it")
        own_seed = record.get("seed")
        limit = whole("max_gen_len", record.get("max_gen_len", self.max_gen_len), least=0)
        return Question(
            place=place,
            id=record.get("id"),
            prompt=prompt,
            temperature=check_temperature(record.get("temperature", self.temperature)),
            top_p=check_top_p(record.get("top_p", self.top_p)),
            limit=0 if self.score else min(limit, most - len(prompt)),
            # 53 bits, which every JSON reader keeps.
            seed=_hash(self.seed, _canonical(record), repeat) >> 11 if own_seed is None else _seed(own_seed),
        )

    def _prompt(self, record: dict[str, Any]) -> list[int]:
        given = [name for name in _PROMPTS if name in record]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"a record must hold one of prompt, prompt_tokens and messages, got {found}")
        value = record[given[0]]
        if given == ["prompt"]:
            return self._text_tokens(value)
        return self._checked_tokens(value) if given == ["prompt_tokens"] else self._dialog_tokens(value)

    def _text_tokens(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"prompt must be a text, got {type(text).__name__}: token ids go into prompt_tokens")
        if not text:
            raise ValueError("prompt must not be empty: to start from nothing, give the BOS in prompt_tokens")
        tokenizer = self.llama.tokenizer
        return tokenizer.encode(text, bos=tokenizer.bos_id >= 0, eos=False)

    def _checked_tokens(self, ids: Any) -> list[int]:
        if not isinstance(ids, list):
            raise TypeError(f"prompt_tokens must be a list of token ids, got {type(ids).__name__}")
        if not ids:
            raise ValueError("prompt_tokens must hold at least one token id: start it with BOS")
        size = vocab_size_of(self.llama.model)
        return [whole("a token id", token, least=0, most=size - 1, where=f" at {i}") for i, token in enumerate(ids)]

    def _dialog_tokens(self, dialog: Any) -> list[int]:
        if not self.llama.has_chat_template:
            if is_unsafe(dialog):
                raise ValueError(UNSAFE_ERROR)
            return self.llama.encode_dialog(dialog)
        if not isinstance(dialog, list) or not dialog or not all(isinstance(message, dict) for message in dialog):
            raise ValueError('messages must be a list such as [{"role": "user", "content": "..."}]')
        try:
            return self.llama.encode_dialog(dialog)
        except ImportError:  # jinja2 is missing, whatever the dialog
            raise
        except Exception as error:  # a template is a program that came with the tokenizer: it may raise anything
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def ask(self, batch: Sequence[Question]) -> list[Answer]:
        """One call of the model."""
        return self._score(batch) if self.score else self._generate(batch)

    def _score(self, batch: Sequence[Question]) -> list[Answer]:
        scored = self.llama.model.score_tokens([question.prompt for question in batch], top_logprobs=self.top_logprobs)
        answers = []
        for row, question in enumerate(batch):
            record = {"id": question.id, "prompt_tokens": question.prompt, "prompt_logprobs": scored.logprobs[row]}
            if self.top_logprobs:
                record["top_logprobs"] = scored.top_logprobs[row]
            answers.append(Answer(question.place, record, len(question.prompt)))
        return answers

    def _generate(self, batch: Sequence[Question]) -> list[Answer]:
        made = self.llama.model.generate(
            [question.prompt for question in batch],
            max_gen_len=[question.limit for question in batch],
            temperature=[question.temperature for question in batch],
            top_p=[question.top_p for question in batch],
            seeds=[question.seed for question in batch],
            max_seq_len=self.llama.max_seq_len,
            eos_token_id=self.eos_ids,
            echo=self.prompt_logprobs,
            logprobs=self.logprobs or self.prompt_logprobs,
            top_logprobs=self.top_logprobs,
        )
        answers = []
        for row, question in enumerate(batch):
            start = len(question.prompt) if self.prompt_logprobs else 0
            tokens = made.tokens[row][start:]
            record = {
                "id": question.id,
                "generation": self.llama.text_of(tokens),
                "tokens": tokens,
                "finish_reason": made.finish_reason[row],
                "seed": question.seed,
            }
            if self.logprobs:
                record["logprobs"] = made.logprobs[row][start:]
            if self.top_logprobs:
                record["top_logprobs"] = made.top_logprobs[row][start:]
            if self.prompt_logprobs:
                record |= {"prompt_tokens": question.prompt, "prompt_logprobs": made.logprobs[row][:start]}
            answers.append(Answer(question.place, record, len(tokens)))
        return answers


def _error(place: int, identity: Any, message: str) -> Answer:
    return Answer(place, {"id": identity, "error": message, "line": place + 1}, ERROR)


def _seed(value: Any) -> int:
    return whole("seed", value, least=0, most=2**64 - 1)


def _identity(llama: Llama) -> dict[str, Any]:
    """What tells this model, tokenizer and package from others, wherever they were loaded from."""
    model, tokenizer = llama.model, llama.tokenizer
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    }
    template = getattr(getattr(tokenizer, "tokenizer", None), "chat_template", None)
    probed = tokenizer.encode(_PROBE, bos=False, eos=False)
    return {
        "version": __version__,
        "model": f"{_hash(_canonical(config)):016x}",
        "weights": f"{_hash(_sampled_weights(model)):016x}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": f"{_hash(tokenizer.n_words, tokenizer.bos_id, probed, template):016x}",
        "max_seq_len": llama.max_seq_len,
    }


def _sampled_weights(model: torch.nn.Module) -> bytes:
    """A digest of some values of every weight; training or merging changes all of them a little."""
    digest = hashlib.blake2b()
    for name, module in model.named_modules():
        for weight_name, weight in module.named_parameters(recurse=False):
            values = _resident(module, weight_name, weight).detach().reshape(-1)
            values = values[:: max(1, len(values) // _SAMPLES)].cpu().contiguous()
            digest.update(f"{name}.{weight_name}{tuple(weight.shape)}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _resident(module: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight's values, also where accelerate has offloaded them."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if weight.device.type == "meta" and getattr(one, "weights_map", None) is not None:
            values: torch.Tensor = one.weights_map[name]
            return values
    return weight


def batches(questions: Iterable[Question], *, rows: int, tokens: int) -> Iterator[list[Question]]:
    """Longest prompts first, as many as fit both limits. What a batch holds depends on the questions alone."""
    batch: list[Question] = []
    for question in sorted(questions, key=lambda q: (-len(q.prompt), -q.limit, q.place)):
        if batch and (len(batch) == rows or cost([*batch, question]) > tokens):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def cost(batch: Sequence[Question]) -> int:
    """Rows x (longest prompt + most new tokens): what a batch takes of cache, and about what it takes of time."""
    return len(batch) * (max(len(q.prompt) for q in batch) + max(q.limit for q in batch))


class Halving:
    """Asks a batch, and where that fails for want of memory or for a row that is wrong, its halves.

    What did not fit once is not tried again at that size.
    """

    def __init__(self, ask: Callable[[Sequence[Question]], list[Answer]]) -> None:
        self.ask = ask
        self.most = math.inf

    def answers(self, batch: Sequence[Question]) -> Iterator[list[Answer]]:
        """All answers, in as many pieces as it takes. A single record that fails gets an error record."""
        if len(batch) == 1 or cost(batch) <= self.most:
            found = self._try(batch)
            if not isinstance(found, str):
                yield found
                return
            # By now the failed call's tensors have gone with its traceback.
            clear_device_cache(garbage_collection=True)
            if len(batch) == 1:
                yield [_error(batch[0].place, batch[0].id, found)]
                return
        half = (len(batch) + 1) // 2
        yield from self.answers(batch[:half])
        yield from self.answers(batch[half:])

    def _try(self, batch: Sequence[Question]) -> list[Answer] | str:
        try:
            return self.ask(batch)
        except (RuntimeError, MemoryError, ValueError) as error:
            if out_of_memory(error):
                if len(batch) > 1:
                    self.most = min(self.most, cost(batch) // 2)
                    logger.warning("out of memory with a batch of %d records: halved", len(batch))
                return "the memory does not hold this record alone: shorten it, lower max_gen_len, or use more memory"
            if not isinstance(error, ValueError):
                raise
            return str(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


class _Worker:
    """One process's way through the input."""

    def __init__(
        self,
        asker: Asker,
        file: BinaryIO,
        survey: Survey,
        state: PartialState,
        *,
        strict: bool,
        rows: int,
        tokens: int,
        window: int,
    ) -> None:
        self.asker = asker
        self.file = file
        self.survey = survey
        self.state = state
        self.strict = strict
        self.rows = rows
        self.tokens = tokens
        self.window = window

    def work(self, done: bytearray, keep: Callable[[Sequence[Answer]], None], progress: "Progress") -> None:
        """Answer this process's share of all records that are not done, batch by batch; the main one reports errors."""
        shares = Shares(self.state.num_processes)
        halving = Halving(self.asker.ask)

        def put(answers: Sequence[Answer]) -> None:
            for answer in answers:
                if answer.tokens == ERROR:
                    if self.strict:
                        raise ValueError(_strictly(answer))
                    logger.warning("%s", _said(answer))
            keep(answers)
            progress.add(answers)

        self.file.seek(0)
        for start in range(0, len(done), self.window):
            lines = list(itertools.islice(self.file, min(self.window, len(done) - start)))
            self.survey.check_unchanged(self.file)
            if all(done[start : start + len(lines)]):
                continue
            questions, wrong = self._read(start, lines)
            if wrong and self.strict:
                raise Refused(_strictly(wrong[0]))  # every process reads the window, and stops here
            wrong = [answer for answer in wrong if not done[answer.place]]
            if wrong and self.state.is_main_process:
                put(wrong)
            for batch in batches(questions, rows=self.rows, tokens=self.tokens):
                batch = [question for question in batch if not done[question.place]]
                if batch and shares.give(cost(batch)) == self.state.process_index:
                    for answers in halving.answers(batch):
                        put(answers)

    def _read(self, start: int, lines: list[bytes]) -> tuple[list[Question], list[Answer]]:
        questions, wrong = [], []
        for place, line in enumerate(lines, start):
            repeat = int(self.survey.repeats[place])
            found = self.asker.read(place, line, repeat)
            questions.append(found) if isinstance(found, Question) else wrong.append(found)
        return questions, wrong


def _said(answer: Answer) -> str:
    return f"line {answer.record['line']}: {answer.record['error']}"


def _strictly(answer: Answer) -> str:
    return f"{_said(answer)} (strict: the run stops here, and keeps what was answered before)"


# Output


class InOrder:
    """Lines for a stream, each as soon as all before it are there."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.held: dict[int, bytes] = {}
        self.next = self.errors = self.tokens = 0

    def put(self, answers: Sequence[Answer]) -> None:
        """Write what can be written."""
        for answer in answers:
            self.held[answer.place] = encoded(answer.record)
            self.errors += answer.tokens == ERROR
            self.tokens += max(0, answer.tokens)
        while self.next in self.held:
            self.stream.write(self.held.pop(self.next) + b"\n")
            self.next += 1
        self.stream.flush()


def encoded(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON, readable where UTF-8 can hold it."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(record, allow_nan=False).encode()


class Line(NamedTuple):
    """A line of a part file: ``key crc left tokens json``. `left` counts the lines of its batch that follow it."""

    key: int
    left: int
    tokens: int
    json: bytes

    def packed(self) -> bytes:
        """With its checksum and newline."""
        body = b"%d %d %s" % (self.left, self.tokens, self.json)
        return b"%016x %08x %s\n" % (self.key, _checksum(self.key, body), body)


def _checksum(key: int, body: bytes) -> int:
    return zlib.crc32(body, key & 0xFFFFFFFF)


def unpacked(line: bytes) -> Line | None:
    """A part file's line, or None if it is not whole."""
    pieces = line.split(b" ", 2)
    try:
        key, checksum = int(pieces[0], 16), int(pieces[1], 16)
        if not line.endswith(b"\n") or _checksum(key, pieces[2][:-1]) != checksum:
            return None
        left, tokens, text = pieces[2][:-1].split(b" ", 2)
        return Line(key, int(left), int(tokens), text)
    except (ValueError, IndexError):
        return None


class Part:
    """A part file, open for one process to append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        if not _lock(self.file):
            self.file.close()
            raise BlockingIOError(
                f"another run is writing this output ({str(path)!r} is in use): wait for its end, or stop it first"
            )

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, answers: Sequence[tuple[int, Answer]]) -> None:
        """Keep the answers of a batch, all or none of them: they are on the disk when this returns.

        Raises:
            OSError: they could not be written, or the file has been removed.
        """
        last = len(answers) - 1
        lines = [
            Line(key, last - i, answer.tokens, encoded(answer.record)).packed()
            for i, (key, answer) in enumerate(answers)
        ]
        rest = memoryview(b"".join(lines))
        with _explained(f"answers cannot be written to {str(self.path)!r}"):
            while rest:
                rest = rest[self.file.write(rest) or 0 :]
            os.fsync(self.file.fileno())
            if not self.path.exists():
                raise FileNotFoundError(
                    f"the part file {str(self.path)!r} was removed during the run: the same command makes its answers "
                    "again, and keeps those of the other part files"
                )


def _lock(file: BinaryIO | Any) -> bool:
    """Whether this process has the file for itself, until it closes the file or ends, however it ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else the file system has no locks
    return True


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """The system's errors in one sentence with a way out; ours pass."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        ways_out = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EFBIG: "raise the limit on file sizes",
            errno.EROFS: "name an output where files can be written",
            errno.EACCES: "name an output where files can be written",
            errno.EPERM: "name an output where files can be written",
        }
        way_out = ways_out.get(error.errno, "see to that")
        raise OSError(
            f"{what}: {error.strerror}: {way_out} and give the same command again, which keeps what was answered so far"
        ) from error


class RunFolder:
    """The files of a run: the output, and the folder beside it."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f"{self.output.name}.run")
        self.claim_file = self.folder / "run.json"
        self.keys_file = self.folder / "keys"
        if not self.output.parent.is_dir():
            raise Refused(f"the output's folder does not exist: {str(self.output.parent)!r}: create it")
        if self.output.exists() and not stat.S_ISREG(self.output.stat().st_mode):
            raise Refused(f'the output must be a file, and {str(self.output)!r} is none: name one, or "-"')

    def parts(self) -> list[Path]:
        """All part files, also those of processes that this run does not have."""
        return sorted(self.folder.glob("part-*"))

    def open_part(self, process: int) -> "Part":
        """The part file of a process; only one run may have it. The main process makes the folder and all files in it.

        Raises:
            OSError: another run has it, or it cannot be written.
        """
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            path = self.folder / f"part-{process:05d}"
            if process == 0:
                self.folder.mkdir(exist_ok=True)
            elif not _comes_to_be(path):
                raise FileNotFoundError(
                    f"process {process} does not see {str(path)!r}, which process 0 made: name an output on a file "
                    "system that all machines share"
                )
            return Part(path)

    def standing(self, claim: dict[str, Any], existing: Existing) -> Literal["new", "kept", "reused", "complete"]:
        """What there is of this output already, and what is to become of it.

        Raises:
            Refused: it was not made with this input and these settings.
        """
        if existing == "restart":
            return "new"
        old = self._old_claim()
        exists = self.output.exists()
        if old is None:
            if exists:
                raise Refused(
                    f"the output {str(self.output)!r} exists, and nothing tells what it was made of: name another, or "
                    'replace it with existing="restart" (--existing restart)'
                )
            return "kept"
        if not exists and not any(part.stat().st_size for part in self.parts()):
            return "new"
        self._check_same("settings", old, claim, "made with other settings")
        whole_output = bool(old.get("complete")) and exists and self.output.stat().st_size == old["output_bytes"]
        if existing == "reuse":
            return "reused" if whole_output else "kept"
        self._check_same(
            "input", old, claim, "made of another input", 'existing="reuse" (--existing reuse) keeps what still fits; '
        )
        if not old.get("complete"):
            return "kept"
        if not exists:
            return "new"
        if not whole_output:
            raise Refused(
                f"the output {str(self.output)!r} was changed after it was complete: name another, or replace it with "
                'existing="restart" (--existing restart)'
            )
        return "complete"

    def _old_claim(self) -> dict[str, Any] | None:
        try:
            old = json.loads(self.claim_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            old = None
        if not isinstance(old, dict) or not isinstance(old.get("settings"), dict):
            raise Refused(
                f"{str(self.claim_file)!r} should tell what the output was made of, but is corrupted: name another "
                'output, or start anew with existing="restart" (--existing restart)'
            )
        return old

    def _check_same(self, part: str, old: dict[str, Any], claim: dict[str, Any], found: str, way_out: str = "") -> None:
        changes = _changes({part: old.get(part, {})}, {part: claim[part]})
        if changes:
            raise Refused(
                f"the output {str(self.output)!r} was {found} ({changes}): name another output; {way_out}"
                'existing="restart" (--existing restart) replaces it'
            )

    def prepare(self, claim: dict[str, Any], standing: str, *, mine: Path, processes: int) -> None:
        """Bring the folder into order for so many processes; `mine` is the main process's own, locked part file.

        Raises:
            Refused: another run is at work here.
            ValueError: a part file is corrupted.
        """
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            for path in self.parts():
                if path != mine:
                    Part(path).__exit__()
            if standing == "new":
                for path in self.parts():
                    os.truncate(path, 0)
            if standing == "reused" and self.keys_file.exists():
                self._reuse_output()
            for path in self.parts():
                repair(path)
            for process in range(processes):
                (self.folder / f"part-{process:05d}").touch()
            _write(self.claim_file, _pretty({**claim, "complete": False}))

    def _reuse_output(self) -> None:
        """The answers of a complete output as a part file, without its errors."""
        keys = np.frombuffer(self.keys_file.read_bytes(), dtype="<u8")
        with open(self.output, "rb") as lines, _replacing(self.folder / "part-earlier") as part:
            for key, line in zip(keys, lines, strict=False):
                record = json.loads(line)
                if "error" not in record:
                    tokens = record.get("tokens", record.get("prompt_tokens", []))
                    part.write(Line(int(key), 0, len(tokens), line.rstrip(b"\n")).packed())

    def answered(self, survey: Survey) -> bytes:
        """One byte per record: whether some part file holds its answer."""
        done = bytearray(len(survey))
        for path in self.parts():
            for _, line in lines_of(path):
                place = survey.place(line.key)
                if place is not None:
                    done[place] = 1
        return bytes(done)

    def finish(self, claim: dict[str, Any], survey: Survey) -> Summary:
        """Merge the parts into the output, which appears at once, and let them go.

        Raises:
            FileNotFoundError: answers are missing.
            ValueError: a part file is corrupted.
        """
        paths = self.parts()
        which, where = np.full(len(survey), -1, dtype=np.int32), np.zeros(len(survey), dtype=np.int64)
        errors = tokens = 0
        for number, path in enumerate(paths):
            for offset, line in lines_of(path):
                place = survey.place(line.key)
                if place is not None and which[place] < 0:
                    which[place], where[place] = number, offset
                    errors += line.tokens == ERROR
                    tokens += max(0, line.tokens)
        missing = int((which < 0).sum())
        if missing:
            raise FileNotFoundError(
                f"{missing} of {len(survey)} answers are gone, so a part file in {str(self.folder)!r} was removed or "
                "emptied during the run: the same command makes them again, and keeps the others"
            )
        with _explained(f"the output {str(self.output)!r} cannot be written"):
            size = self._merge(paths, which, where)
            _write(self.keys_file, survey.keys.astype("<u8").tobytes())
            found = {"complete": True, "output_bytes": size, "errors": errors, "tokens": tokens}
            _write(self.claim_file, _pretty({**claim, **found}))
        return self.finished()

    def _merge(self, paths: list[Path], which: NDArray[np.int32], where: NDArray[np.int64]) -> int:
        """Bytes written. Reads here and there, though within a window: parts are in the order of work."""
        with contextlib.ExitStack() as stack, _replacing(self.output, self.folder / "merged") as merged:
            files = [stack.enter_context(open(path, "rb")) for path in paths]
            for number, offset in zip(which, where, strict=True):
                files[number].seek(int(offset))
                line = unpacked(files[number].readline())
                if line is None:
                    raise corrupted(paths[number], int(offset))
                merged.write(line.json + b"\n")
            return merged.tell()

    def finished(self) -> Summary:
        """The summary of a complete output, whose part files are removed."""
        for path in self.parts():
            path.unlink(missing_ok=True)
        claim = self._old_claim()
        assert claim is not None and claim["complete"]
        return Summary(claim["input"]["records"], claim["errors"], claim["tokens"], 0, 0.0)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In words, what differs in two claims."""
    return "; ".join(
        f"{name} was {old[part].get(name)!r} and is {new[part].get(name)!r}"
        for part in new
        for name in sorted({*old[part], *new[part]})
        if old[part].get(name) != new[part].get(name)
    )


def _comes_to_be(path: Path) -> bool:
    """Whether there is such a file, now or soon."""
    patience = time.monotonic() + _CACHED
    while not path.exists():
        if time.monotonic() > patience:
            return False
        time.sleep(0.1)
    return True


def lines_of(path: Path) -> Iterator[tuple[int, Line]]:
    """The lines of a repaired part file, each with where it begins."""
    offset = 0
    with open(path, "rb") as file:
        for text in file:
            line = unpacked(text)
            if line is None:
                raise corrupted(path, offset)
            yield offset, line
            offset += len(text)


def repair(path: Path) -> None:
    """Cut off what follows the last whole batch: the torn end that a killed process or a full disk leaves.

    Raises:
        ValueError: what is broken is not the end.
    """
    whole_until = offset = 0
    broken: int | None = None
    with open(path, "r+b") as file:
        for text in file:
            line = unpacked(text)
            if line is None:
                broken = offset if broken is None else broken
            elif broken is not None:
                raise corrupted(path, broken)
            offset += len(text)
            if line is not None and line.left == 0:
                whole_until = offset
        if whole_until < offset:
            file.truncate(whole_until)
            os.fsync(file.fileno())


def corrupted(path: Path, offset: int) -> ValueError:
    """The error for a part file that something else than this program has changed."""
    return ValueError(
        f"the part file {str(path)!r} is corrupted at byte {offset}: restore it, or remove it, and the same command "
        "makes its answers again and keeps those of the other part files"
    )


@contextlib.contextmanager
def _replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file that takes its name at once, when it is whole and on the disk."""
    temporary = temporary or path.with_name(f"{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it is in the way
        raise
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Names in a folder are kept like its files; Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with _replacing(path) as file:
        file.write(content)


def _pretty(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


class Progress:
    """A bar on a terminal's standard error: records of all processes, and their tokens per second."""

    def __init__(self, total: int, done: int, others: list[Path]) -> None:
        shown = PartialState().is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="record", disable=not shown, dynamic_ncols=True)
        self.read = {path: path.stat().st_size for path in others}
        self.tokens = 0
        self.start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, answers: Sequence[Answer]) -> None:
        """Count these, and what other processes have added since."""
        if self.bar.disable:
            return
        found = [answer.tokens for answer in answers]
        for path, offset in self.read.items():
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(offset)
                for text in file:
                    line = unpacked(text)
                    if line is None:  # being written
                        break
                    self.read[path] += len(text)
                    found.append(line.tokens)
        self.tokens += sum(max(0, tokens) for tokens in found)
        self.bar.update(len(found))
        self.bar.set_postfix_str(f"{self.tokens / (time.monotonic() - self.start):.0f} tokens/s")


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command that are not those of the model and the draw."""
    parser.add_argument("input", metavar="IN.jsonl", help='records, one JSON object a line; "-" for standard input')
    parser.add_argument("output", metavar="OUT.jsonl", help='answers, in the input\'s order; "-" for standard output')
    group = parser.add_argument_group("answers")
    group.add_argument("--score", action="store_true", help="generate nothing, return the prompts' log-probabilities")
    group.add_argument("--logprobs", action="store_true", help="return the tokens' log-probabilities")
    group.add_argument("--prompt-logprobs", action="store_true", help="return the prompts' log-probabilities too")
    group.add_argument("--top-logprobs", type=int, default=0, metavar="K", help="return the K best ids at each token")
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="most records in a batch (default: %(default)s)"
    )
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="most tokens in a batch: records x (longest prompt + most new tokens) (default: %(default)s)",
    )
    group.add_argument(
        "--window", type=int, default=WINDOW, metavar="N", help="records sorted together (default: %(default)s)"
    )
    group.add_argument("--strict", action="store_true", help="stop at the first record that is wrong")
    group.add_argument(
        "--existing",
        choices=["check", "reuse", "restart"],
        default="check",
        help="an output that is there already: check takes it up if input and settings are the same and else refuses, "
        "reuse keeps the answers of unchanged records, restart makes all anew (default: %(default)s)",
    )


def main(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Llama]) -> int:
    """The command: 0 where all records were answered, 1 where some became error records, 2 where it was refused.

    Args:
        arguments: those of `add_arguments`, of the draw (`temperature`, `top_p`, `max_gen_len`, `seed`), of the model.
        load: makes the `Llama` of them; `device_map` is set to this process's GPU where there are several processes.
    """
    state = processes()
    if state.num_processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        # Set by `accelerate launch` for several processes, which it starts on CPU, and on one GPU, only if forced to.
        logger.warning("accelerate launch started a single process: with --multi_gpu it starts all, on CPU too")
    try:
        summary = _run(arguments, load, state)
    except Refused as error:
        # Everyone comes here; the main one speaks, and the others do not leave before, or the launcher would end it.
        if state.is_main_process:
            print(f"hf-llama-sampling batch: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(ConnectionError):
            _wait(state)
        return 2
    if state.is_main_process:
        print(_told(summary), file=sys.stderr)
    if state.num_processes > 1:
        state.destroy_process_group()
    return 1 if summary.errors and state.is_main_process else 0


def _run(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Llama], state: PartialState) -> Summary:
    # What is wrong with the files shows before the weights are loaded.
    if arguments.input != STREAM:
        with _opened(arguments.input):
            pass
    if arguments.output != STREAM:
        RunFolder(arguments.output)
    if state.num_processes > 1 and arguments.device_map is None and state.device.type != "cpu":
        arguments.device_map = str(state.device)
    return run(
        load(arguments),
        arguments.input,
        arguments.output,
        score=arguments.score,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_gen_len=arguments.max_gen_len,
        seed=arguments.seed,
        logprobs=arguments.logprobs,
        prompt_logprobs=arguments.prompt_logprobs,
        top_logprobs=arguments.top_logprobs,
        batch_size=arguments.batch_size,
        batch_tokens=arguments.batch_tokens,
        window=arguments.window,
        strict=arguments.strict,
        existing=arguments.existing,
    )


def _told(summary: Summary) -> str:
    if not summary.answered:
        return f"complete already: {summary.records} records, {summary.errors} errors, {summary.tokens} tokens"
    kept = summary.records - summary.answered
    earlier = f" ({kept} of them by an earlier run)" if kept else ""
    return (
        f"{summary.records} records{earlier}, {summary.errors} errors, {summary.tokens} tokens, {summary.seconds:.1f} s"
    )
