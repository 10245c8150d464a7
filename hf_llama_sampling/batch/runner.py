"""JSONL in, JSONL out: many prompts through one model, on one process or many, with nothing lost and nothing twice.

Input is read in windows. A window is sorted by length and cut into batches, and what a batch holds depends on the input
and the batch settings alone: not on the number of processes, nor on what an earlier run has answered already. Together
with one stream per prompt that makes the output the same, byte for byte, however often a run was killed and taken up.

Lines are read in `records`, and `answers` keeps the files of a run. What this module does not do: it spreads no model
over devices (`Llama.build` does), and it never looks at logits.
"""

import argparse
import contextlib
import hashlib
import itertools
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..checks import check_choice, check_int, check_temperature, check_top_p
from ..defaults import BATCH_SIZE, BATCH_TOKENS, SEED, TEMPERATURE, TOP_P, WINDOW, __version__
from ..generation.model_info import vocab_size_of
from ..llama.dialog import UNSAFE_ERROR, is_unsafe
from ..llama.llama import Llama
from .requests import Refused, Survey, canonical, hash64, parse
from .store import ERROR, Answer, Existing, InOrder, Part, Progress, RunFolder, Summary, changes

logger = logging.getLogger(__name__)

T = TypeVar("T")

STREAM = "-"
_FIELDS = ("id", "prompt", "prompt_tokens", "messages", "temperature", "top_p", "max_gen_len", "seed")
_PROMPTS = ("prompt", "prompt_tokens", "messages")
_PROBE = "The quick brown fox, 1234: \n\t\u00e9\u4f60\U0001f600"  # told apart by any two tokenizers
_SAMPLES = 64  # values looked at in each weight
_PATIENCE = timedelta(days=30)  # the processes of a run end hours apart, and accelerate's own limit is minutes


class Question(NamedTuple):
    """A record that can be answered. Its place in the input counts from 0."""

    place: int
    id: Any
    prompt: list[int]
    temperature: float
    top_p: float
    limit: int  # most new tokens
    seed: int


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
    check_choice("existing", existing, ("check", "reuse", "restart"))
    rows = check_int("batch_size", (llama.max_batch_size or BATCH_SIZE) if batch_size is None else batch_size, least=1)
    if llama.max_batch_size is not None and rows > llama.max_batch_size:
        raise ValueError(f"batch_size must not exceed max_batch_size={llama.max_batch_size}, got {rows}: lower it")
    check_int("batch_tokens", batch_tokens, least=1)
    check_int("window", window, least=1)
    asker = Asker(
        llama,
        score=score,
        temperature=check_temperature(temperature),
        top_p=check_top_p(top_p),
        max_gen_len=llama.max_seq_len - 1 if max_gen_len is None else check_int("max_gen_len", max_gen_len, least=0),
        seed=_seed(seed),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        top_logprobs=check_int("top_logprobs", top_logprobs, least=0, most=vocab_size_of(llama.model)),
    )
    state = processes()
    if (getattr(llama.model, "tp_size", None) or 1) > 1 and state.num_processes > 1:
        raise Refused(
            "a batch run deals records out to processes, each with a whole model, but this model is spread over "
            'processes: load it with device_map="auto" in one process, or without tp_plan in each'
        )
    if state.num_processes > 1 and STREAM in (str(input), str(output)):
        raise Refused(f"standard streams belong to one process, but this run has {state.num_processes}: name files")
    folder = None if str(output) == STREAM else RunFolder(output)
    with _opened(input, folder) as file:
        survey = Survey(file, asker.settings)
        worker = _Worker(asker, file, survey, state, strict=strict, rows=rows, tokens=batch_tokens, window=window)
        summary = _to_stream(worker) if folder is None else _to_file(worker, folder, existing)
    return summary._replace(seconds=time.monotonic() - start)


def _to_stream(worker: "_Worker") -> Summary:
    lines = InOrder(sys.stdout.buffer)
    done = bytearray(len(worker.survey))
    with Progress(len(done), 0, [], shown=_on_terminal(worker.state)) as progress:
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
                f"than process 0 ({changes(main_claim, claim)}): load the same files everywhere"
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
        with Progress(len(done), before, others, shown=_on_terminal(state)) as progress:
            worker.work(done, keep, progress)
    _wait(state)
    summary = _on_main(state, lambda: folder.finish(claim, survey))
    return summary._replace(answered=summary.records - before)


def _on_terminal(state: PartialState) -> bool:
    return state.is_main_process and sys.stderr.isatty()


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
def _opened(path: str | Path, folder: RunFolder | None) -> Iterator[BinaryIO]:
    """The input as a file that can be read more than once; a stream is put into a temporary file.

    Raises:
        Refused: it cannot be read, or is a file that the run would write.
    """
    if str(path) == STREAM:
        with contextlib.suppress(OSError):  # a standard input without a file
            if folder is not None:
                folder.refuse_input(sys.stdin.buffer, "standard input")
        with _spooled(sys.stdin.buffer) as spooled:
            yield spooled
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise Refused(f"the input cannot be read: {str(path)!r}: {error.strerror}: check the path") from error
    with file:
        if folder is not None:
            folder.refuse_input(file, path)
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
        limit = check_int("max_gen_len", record.get("max_gen_len", self.max_gen_len), least=0)
        return Question(
            place=place,
            id=record.get("id"),
            prompt=prompt,
            temperature=check_temperature(record.get("temperature", self.temperature)),
            top_p=check_top_p(record.get("top_p", self.top_p)),
            limit=0 if self.score else min(limit, most - len(prompt)),
            # 53 bits, which every JSON reader keeps.
            seed=hash64(self.seed, canonical(record), repeat) >> 11 if own_seed is None else _seed(own_seed),
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
        return [check_int("a token id", token, least=0, most=size - 1, where=f" at {i}") for i, token in enumerate(ids)]

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
    return check_int("seed", value, least=0, most=2**64 - 1)


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
        "model": f"{hash64(canonical(config)):016x}",
        "weights": f"{hash64(_sampled_weights(model)):016x}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": f"{hash64(tokenizer.n_words, tokenizer.bos_id, probed, template):016x}",
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


# The command


def run_command(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Llama]) -> int:
    """The command: 0 where all records were answered, 1 where some became error records, 2 where it was refused.

    Args:
        arguments: those of the command `batch`, see `cli`.
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
    folder = None if arguments.output == STREAM else RunFolder(arguments.output)
    if arguments.input != STREAM:
        with _opened(arguments.input, folder):
            pass
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
