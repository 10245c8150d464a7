"""JSONL in, JSONL out: many prompts through one model, on one process or many, with nothing lost and nothing twice.

The input is read in windows, and each window is cut into batches (`ordering`). A batch's content depends on the input
and the batch limits alone, not on the number of processes or on records that an earlier run has answered. With one
random stream per prompt, this makes the output the same, byte for byte, however often a run was killed and resumed.

This module spreads no model over devices (`Llama.build` does), and it never looks at logits.
"""

import argparse
import contextlib
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

from accelerate import PartialState

from ..checks import check_bool, check_choice, check_int
from ..console import say
from ..defaults import BATCH_SIZE, BATCH_TOKENS, SEED, TEMPERATURE, TOP_P, WINDOW
from ..generation.model_info import vocab_size_of
from ..generation.windows import check_stride
from ..llama.llama import Llama
from ..sampling.settings import SamplingSettings
from .continuous import ContinuousEngine
from .engine import Engine, OutOfMemoryBackoff
from .fingerprint import fingerprint
from .ordering import batches, cost
from .output import Progress, ReorderBuffer, standard_bytes
from .processes import LeastLoaded, leave, on_main, process_state, wait_for_all
from .requests import InputIndex, RecordReader, Refused, Request, Response, bos_in_vocabulary, named_in_vocabulary
from .settings import BatchLimits, FieldNames, RunSettings
from .shards import Shard
from .store import Existing, RunDirectory, Summary, describe_changes

logger = logging.getLogger(__name__)

STREAM = "-"
EngineName = Literal["batches", "continuous"]


def run(
    llama: Llama,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    score: bool = False,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    max_gen_len: int | None = None,
    seed: int = SEED,
    logprobs: bool = False,
    prompt_logprobs: bool = False,
    top_logprobs: int = 0,
    logprobs_of: Sequence[int | str] | None = None,
    sampling_logprobs: bool = False,
    stop: str | Sequence[str] = (),
    stride: int | None = None,
    bos: int | bool | None = None,
    prompt_field: str | None = None,
    id_field: str | None = None,
    keep_fields: bool | Sequence[str] = False,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    window: int = WINDOW,
    engine: EngineName = "batches",
    strict: bool = False,
    existing: Existing = "check",
) -> Summary:
    """Answer every record of a JSONL file, in its order.

    A record holds one of `prompt` (text, put after a BOS; an empty one is the BOS alone), `prompt_tokens` (ids, taken
    as they are) and `messages` (a dialog: in the tokenizer's own chat format if it came with one, else in LLAMA2's),
    and may hold `temperature`, `top_p`, `max_gen_len` (or `max_tokens`, `max_new_tokens`, `max_completion_tokens`),
    `stop` (a string or several; or `stop_strings`, `stop_sequences`), `seed` and `logprobs_of` of its own, and an `id`
    (or `task_id`, `custom_id`, ...): any JSON value, returned as it is spelled. Its answer holds `id`, `generation`,
    `tokens`, `finish_reason`, `stop_reason` where there were stop strings, `seed`, and on request `logprobs`,
    `top_logprobs`, `logprobs_of`, `prompt_tokens`, `prompt_logprobs` and what `sampling_logprobs` adds. A record that
    cannot be answered becomes `{"id": ..., "error": ..., "line": ...}` and is logged.

    - Output line n answers input line n; empty lines at the end are no records. In float32 the answers do not depend on
      batch, window or number of processes, up to the rounding of the logits; with the batch settings as they were, not
      on that either.
    - Prompt and `generation` add up to the decoded whole: where a word follows, `generation` begins with a space. Of a
      dialog it is the assistant's message.
    - An answer ends right before the first of its stop strings; ids and logprobs are those of the tokens that lie
      wholly before it, and `stop_reason` is the string, or null. Stop strings play no part in the draw.
    - A record without a `seed` gets one from the run's seed and its own content; of records that are equal in
      everything, the second gets another than the first. `seed` in the answer gives the same tokens again, alone.
    - Other fields of a record are data: left out, or copied into the answer by `keep_fields`. Settings that this
      package does not have (`top_k`, ...) or that look mistyped are refused by name.
    - A run that was stopped is taken up where it was by the same call, on any number of processes. The output appears
      when it is complete, at once. Nobody can read it, or the run's other files, who cannot read the input.
    - Records are streamed: memory holds one window, and some 40 bytes for each record of the input.
    - A batch that does not fit the memory is halved, down to single records.

    To be called alike in every process of `accelerate launch` or `torchrun`; each has its own whole model. Several
    machines need the output on a file system that they share.

    Args:
        llama: the model and its tokenizer. Quirks of the reference (`compat`) are mended here whatever it says.
        input, output: paths, or `"-"` for standard streams, which belong to one process; an output that is a stream
            cannot be taken up again.
        score: generate nothing; answers hold `id`, `prompt_tokens`, `prompt_logprobs`, the `total` and the `count` of
            the scored tokens, and, on request, `top_logprobs` and `logprobs_of`; settings of the draw play no part.
            Records may then hold `start`, `stride` and `bos` of their own, as `score_tokens` has them.
        temperature, top_p, max_gen_len: for records without their own; `max_gen_len` None means `max_seq_len - 1`.
        seed: the run's.
        logprobs: whether to return each token's raw logprob.
        prompt_logprobs: whether to return the prompt's ids and their raw logprobs, 0.0 for the first.
        top_logprobs: how many best `[id, logprob]` to return at each token.
        logprobs_of: ids, or texts of one token, to return as `[id, logprob, rank]` at each token, for records without
            their own.
        sampling_logprobs: whether to return the `logprobs`, the `temperature_logprobs`, the `sampled_logprobs` (after
            the nucleus) and the `nucleus_mass` of each token.
        stop: a string or several that end an answer, for records without their own.
        stride: with `score`, a prompt that is longer than `max_seq_len` is scored in windows, each so many tokens after
            the one before, by the rules of `score_tokens`. If not given, such records become errors.
        bos: with `score`, the token before each prompt, so that its first token is scored too: an id, True for the
            tokenizer's BOS, False for none. It takes the place of the BOS of a text or a dialog, and is no part of the
            answer. If not given, a text's BOS is its first token, which is not scored.
        prompt_field: the field that holds the prompt (a text, a list of ids, or messages), if none of the three above.
        id_field: the field that holds the id, if none of the usual.
        keep_fields: names of fields to copy into the answers as they are spelled, or True for all that no rule names.
        batch_size: most rows in a batch; `llama.max_batch_size` if not given, or else 32.
        batch_tokens: most tokens in a batch: rows x (longest prompt + most new tokens). One row may have more.
        window: how many records are ordered together: prompts that share a prefix meet in a batch, of like lengths.
        engine: how requests meet: `"batches"`, each of which is done when its last row is, or `"continuous"`, where a
            row that is done makes room for the next (transformers 5.23). Then `batch_size` bounds the rows in flight,
            and `batch_tokens` the cache.
        strict: whether to stop at the first wrong record.
        existing: what to do about an output that is there already, finished or not. `"check"` takes up or leaves alone
            what the same input and settings made and refuses anything else, `"reuse"` keeps the answers of unchanged
            records and makes all others (errors too, if the output is complete), `"restart"` makes all.

    Returns:
        The `Summary`, in every process.

    Raises:
        Refused: (a `ValueError`) the output belongs to something else, or with `strict` a record is wrong.
        TypeError: a setting is of the wrong type.
        ValueError: a setting is out of range, or a shard is corrupted.
        OSError: a file cannot be read or written; what was answered so far is kept.

    >>> batch.run(Llama.build(ckpt_dir, tokenizer_path, 4096, 32), "in.jsonl", "out.jsonl", max_gen_len=256)
    Summary(records=3, errors=0, tokens=412, answered=3, seconds=9.1)
    """
    start = time.monotonic()
    _check_arguments(llama, input=input, output=output, existing=existing, engine=engine)
    settings = RunSettings(
        draw=SamplingSettings(temperature, top_p),
        max_gen_len=llama.max_seq_len - 1 if max_gen_len is None else max_gen_len,
        seed=seed,
        score=score,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        top_logprobs=top_logprobs,
        logprobs_of=() if logprobs_of is None else named_in_vocabulary(logprobs_of, llama),
        sampling_logprobs=sampling_logprobs,
        stop=stop,  # type: ignore[arg-type]  # becomes a tuple
        stride=check_stride(stride, llama.max_seq_len),
        bos=None if bos is None else bos_in_vocabulary(bos, llama),
        fields=FieldNames(prompt_field, id_field, keep_fields),  # type: ignore[arg-type]  # a list becomes a tuple
    )
    check_int("top_logprobs", top_logprobs, least=0, most=vocab_size_of(llama.model))
    limits = BatchLimits(_rows(llama, batch_size), batch_tokens, window)
    job = Job(llama, settings, limits, check_bool("strict", strict), process_state(), engine)
    summary = _run(job, input, output, existing)
    return summary._replace(seconds=time.monotonic() - start)


def _run(job: "Job", input: str | os.PathLike[str], output: str | os.PathLike[str], existing: Existing) -> Summary:
    job.check(input, output)
    directory = None if str(output) == STREAM else RunDirectory(output)
    with _open_input(input, directory) as file:
        worker = Worker(job, file)
        return _to_stream(worker) if directory is None else _to_file(worker, directory, existing)


def _check_arguments(llama: object, *, existing: str, engine: str, **paths: object) -> None:
    """Refuse arguments of the wrong kind before anything is read."""
    if not all(hasattr(llama, name) for name in ("model", "tokenizer", "max_seq_len", "max_batch_size")):
        raise TypeError(f"batch.run takes a Llama, got {type(llama).__name__}: make one with Llama(model, tokenizer)")
    _check_paths(**paths)
    check_choice("existing", existing, ("check", "reuse", "restart"))
    check_choice("engine", engine, ("batches", "continuous"))


def _check_paths(**paths: object) -> None:
    for name, value in paths.items():
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f'{name} must be a path, or "-" for a standard stream, got {type(value).__name__}')


def _rows(llama: Llama, batch_size: int | None) -> int:
    rows = (llama.max_batch_size or BATCH_SIZE) if batch_size is None else batch_size
    if llama.max_batch_size is not None and check_int("batch_size", rows, least=1) > llama.max_batch_size:
        raise ValueError(f"batch_size must not exceed max_batch_size={llama.max_batch_size}, got {rows}: lower it")
    return rows


class Job(NamedTuple):
    """The model and the settings of a run; the same in every process except for `state`."""

    llama: Llama
    settings: RunSettings
    limits: BatchLimits
    strict: bool
    state: PartialState
    engine: EngineName = "batches"

    def check(self, input: object, output: object) -> None:
        """Refuse models and streams that several processes cannot use."""
        if self.state.num_processes == 1:
            return
        if (getattr(self.llama.model, "tp_size", None) or 1) > 1:
            raise Refused(
                "a batch run deals records out to processes, each with a whole model, but this model is spread over "
                'processes: load it with device_map="auto" in one process, or without tp_plan in each'
            )
        if STREAM in (str(input), str(output)):
            raise Refused(
                f"standard streams belong to one process, but this run has {self.state.num_processes}: name files"
            )

    @property
    def has_terminal(self) -> bool:
        """Whether to show a progress bar."""
        return self.state.is_main_process and sys.stderr is not None and sys.stderr.isatty()


class Worker:
    """Answers one process's share of the input.

    Args:
        job: the model and the settings.
        file: the input, seekable. It is read once here, for the index.
    """

    def __init__(self, job: Job, file: BinaryIO) -> None:
        self.job = job
        self.file = file
        self.reader = RecordReader(job.llama, job.settings)
        recorded = {**fingerprint(job.llama), **job.settings.as_dict()}
        self.index = InputIndex(file, self.reader, recorded)
        self.manifest = {"settings": recorded, "input": self.index.description}
        self.answers = _answers(job)
        self.told: set[str] = set()

    def work(self, done: bytearray, keep: Callable[[Sequence[Response]], None], progress: Progress) -> None:
        """Answer this process's share of all records that are not done; the main process reports wrong records.

        Args:
            done: one byte per record.
            keep: stores the responses of each batch.
            progress: counts them.

        Raises:
            Refused: with `strict`, a record is wrong; every process raises the same.
            ValueError: with `strict`, a record could not be answered.
        """
        state, limits = self.job.state, self.job.limits
        schedule = LeastLoaded(state.num_processes)
        self.file.seek(0)
        for start in range(0, len(done), limits.window):
            lines = list(itertools.islice(self.file, min(limits.window, len(done) - start)))
            self.index.check_unchanged(self.file)
            if all(done[start : start + len(lines)]):
                continue
            requests, wrong = self._read(start, lines)
            if wrong and self.job.strict:
                raise Refused(_strict_message(wrong[0]))
            wrong = [response for response in wrong if not done[response.index]]
            if wrong and state.is_main_process:
                self._put(wrong, keep, progress)
            whole_tree = self.job.settings.score
            mine = []
            for batch in batches(requests, rows=limits.rows, tokens=limits.tokens, whole_tree=whole_tree):
                batch = [request for request in batch if not done[request.index]]
                if batch and schedule.assign(cost(batch)) == state.process_index:
                    mine.append(batch)
            for responses in self.answers(mine):
                self._put(responses, keep, progress)

    def _read(self, start: int, lines: list[bytes]) -> tuple[list[Request], list[Response]]:
        """Read a window: its requests, and the responses to its wrong records."""
        requests, wrong = [], []
        for index, line in enumerate(lines, start):
            result = self.reader.request(index, line, int(self.index.repeats[index]))
            requests.append(result) if isinstance(result, Request) else wrong.append(result)
        unused = sorted(self.reader.unused - self.told)
        if unused and self.job.state.is_main_process:
            logger.warning("fields that play no part: %s (keep_fields copies them)", ", ".join(map(repr, unused)))
        self.told.update(unused)
        return requests, wrong

    def _put(
        self, responses: Sequence[Response], keep: Callable[[Sequence[Response]], None], progress: Progress
    ) -> None:
        for response in responses:
            if response.error is not None:
                if self.job.strict:
                    raise ValueError(_strict_message(response))
                logger.warning("line %d: %s", response.index + 1, response.error)
        keep(responses)
        progress.add(responses)


def _answers(job: Job) -> Callable[[Sequence[Sequence[Request]]], Iterator[list[Response]]]:
    """Return the function that answers batches, for the engine that was asked for."""
    backoff = OutOfMemoryBackoff(Engine(job.llama, job.settings).run)
    if job.engine == "continuous":
        return ContinuousEngine(job.llama, job.settings, job.limits, backoff.responses).responses
    return lambda batches: (responses for batch in batches for responses in backoff.responses(batch))


def _strict_message(response: Response) -> str:
    return (
        f"line {response.index + 1}: {response.error} (strict: the run stops here, and keeps what was answered before)"
    )


def _to_stream(worker: Worker) -> Summary:
    buffer = ReorderBuffer(standard_bytes("stdout"))
    done = bytearray(len(worker.index))
    with Progress(len(done), 0, [], shown=worker.job.has_terminal) as progress:
        worker.work(done, buffer.put, progress)
    return Summary(len(done), buffer.errors, buffer.tokens, len(done), 0.0)


def _to_file(worker: Worker, directory: RunDirectory, existing: Existing) -> Summary:
    index, state, manifest = worker.index, worker.job.state, worker.manifest
    with contextlib.ExitStack() as stack:
        # Only the main process inspects the files and decides: others may see an outdated network file system.
        own: list[Shard] = []

        def prepare() -> tuple[dict[str, Any], bytes | Summary]:
            resume = directory.resume_state(manifest, existing)
            if resume == "complete":
                return manifest, directory.clean_up()
            own.append(stack.enter_context(directory.open_shard(0)))
            directory.prepare(manifest, resume, own_shard=own[0].path, processes=state.num_processes)
            return manifest, directory.answered(index)

        main_manifest, found = on_main(state, prepare)
        if main_manifest != manifest:
            raise ValueError(
                f"all processes of a run need the same input and model, but process {state.process_index} has another "
                f"than process 0 ({describe_changes(main_manifest, manifest)}): load the same files everywhere"
            )
        if isinstance(found, Summary):
            return found
        if not state.is_main_process:
            own.append(stack.enter_context(directory.open_shard(state.process_index)))
        done = bytearray(found)
        before = sum(done)

        def keep(responses: Sequence[Response]) -> None:
            own[0].append([int(index.keys[response.index]) for response in responses], responses)

        others = [path for path in directory.shards() if path != own[0].path] if state.is_main_process else []
        with Progress(len(done), before, others, shown=worker.job.has_terminal) as progress:
            worker.work(done, keep, progress)
    wait_for_all(state)
    summary = on_main(state, lambda: directory.finish(manifest, index))
    return summary._replace(answered=summary.records - before)


# The input


@contextlib.contextmanager
def _open_input(path: str | os.PathLike[str], directory: RunDirectory | None) -> Iterator[BinaryIO]:
    """Open the input as a file that can be read more than once; copy a stream into a temporary file.

    Raises:
        Refused: it cannot be read, or is a file that the run would write.
    """
    if str(path) == STREAM:
        stream = standard_bytes("stdin")
        if directory is not None:
            with contextlib.suppress(OSError, AttributeError):  # a standard input without a file
                directory.take_input(stream, "standard input")
        with _copied(stream) as copy:
            yield copy
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise Refused(f"the input cannot be read: {str(path)!r}: {error.strerror}: check the path") from error
    with file:
        if directory is not None:
            directory.take_input(file, path)
        if file.seekable():
            yield file
        elif process_state().num_processes > 1:
            raise Refused(f"several processes cannot read one stream, and {str(path)!r} is one: give a file")
        else:
            with _copied(file) as copy:
                yield copy


@contextlib.contextmanager
def _copied(stream: BinaryIO) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        for block in iter(lambda: stream.read(1 << 20), b""):
            file.write(block)
        yield file


# The command


def run_command(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Llama]) -> int:
    """Run the command; return its exit status: 0 if all records were answered, 1 if some became errors, 2 if refused.

    Args:
        arguments: those of the command `batch`, see `cli`.
        load: makes a `Llama` from them; with several processes, `device_map` is this process's GPU.
    """
    _occupy_standard_descriptors()
    state = process_state()
    if state.num_processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        # `accelerate launch` was asked for several processes; on CPU or one GPU it starts them only with --multi_gpu.
        logger.warning("accelerate launch started a single process: with --multi_gpu it starts all, on CPU too")
    try:
        summary = _run_with(arguments, load, state)
    except Refused as error:
        # Every process gets here. The main one prints; the others wait, or the launcher would end it before it has.
        if state.is_main_process:
            say(f"hf-llama-sampling batch: {error}")
        leave(state)
        return 2
    except KeyboardInterrupt:
        if state.is_main_process:
            say(f"hf-llama-sampling batch: {_interrupted(arguments.output)}")
        return 130
    if state.is_main_process:
        say(_describe(summary))
    leave(state)
    return 1 if summary.errors and state.is_main_process else 0


def _occupy_standard_descriptors() -> None:
    """Open /dev/null for closed standard streams: else our files may get descriptors 1 and 2, where libraries write."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _run_with(
    arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Llama], state: PartialState
) -> Summary:
    # Refuse bad file names before the weights are loaded.
    directory = None if arguments.output == STREAM else RunDirectory(arguments.output)
    if arguments.output == STREAM:
        standard_bytes("stdout")
    if arguments.input == STREAM:
        standard_bytes("stdin")
    else:
        with _open_input(arguments.input, directory):
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
        logprobs_of=arguments.logprobs_of,
        sampling_logprobs=arguments.sampling_logprobs,
        stop=arguments.stop,
        stride=arguments.stride,
        bos=arguments.bos,
        prompt_field=arguments.prompt_field,
        id_field=arguments.id_field,
        keep_fields=arguments.keep_field or arguments.keep_fields,
        batch_size=arguments.batch_size,
        batch_tokens=arguments.batch_tokens,
        window=arguments.window,
        engine=arguments.engine,
        strict=arguments.strict,
        existing=arguments.existing,
    )


def _interrupted(output: str) -> str:
    if output == STREAM:
        return "interrupted: what was written is whole lines, in the input's order"
    if any(shard.stat().st_size for shard in RunDirectory(output).shards()):
        return f"interrupted: what was answered is kept in {output}.run, and the same command makes the rest"
    return "interrupted before the first batch was answered"


def _describe(summary: Summary) -> str:
    if summary.records and not summary.answered:
        return f"complete already: {summary.records} records, {summary.errors} errors, {summary.tokens} tokens"
    kept = summary.records - summary.answered
    earlier = f" ({kept} of them by an earlier run)" if kept else ""
    return (
        f"{summary.records} records{earlier}, {summary.errors} errors, {summary.tokens} tokens, {summary.seconds:.1f} s"
    )
