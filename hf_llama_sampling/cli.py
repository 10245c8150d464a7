"""The command ``hf-llama-sampling``: every option of every command; calls of the package in between, text out.

Wiring only. torch and transformers take seconds to import, so this module imports neither before a command runs.
"""

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checks import check_int, check_seeds, seeds_as_given
from .console import (
    bars_on_terminals,
    check_stdout,
    exit_on_interrupt,
    leave_stdout,
    on_terminal,
    progress,
    quiet_loading,
    read_file,
    read_lines,
    say,
    standard_streams,
    write,
    write_best,
    write_json,
    write_logprobs,
    write_named,
    write_table,
)
from .defaults import BATCH_SIZE, BATCH_TOKENS, SAMPLING_LOGPROBS, TEMPERATURE, TOP_P, WINDOW, __version__
from .sampling.settings import SamplingSettings

BUNDLED = Path(__file__).parent / "tiny_llama"
GEN_LEN = 128
_MODEL_FORMS = (
    "Meta's folder (params.json, consolidated.*.pth), a transformers folder, a Hub id or a GGUF file "
    "(default: the bundled tiny model)"
)
_LEAST = {
    "max_gen_len": 0,
    "max_seq_len": 1,
    "batch_size": 1,
    "batch_tokens": 1,
    "window": 1,
    "top_logprobs": 0,
    "num_fewshot": 0,
    "stride": 1,
}
_SCORES = ("logprobs", "top_logprobs", "logprobs_of", "sampling_logprobs")
# Options of other programs, by the name that they have here.
_MEANT = {
    **dict.fromkeys(("--max-tokens", "--max-new-tokens", "--max_tokens", "--max_new_tokens"), "--max-gen-len"),
    **dict.fromkeys(("--max-length", "--max_length"), "--max-seq-len"),
}
_REFUSALS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. A refusal is one sentence on standard error, and status 2."""
    name = "hf-llama-sampling"
    try:
        arguments = _parse(argv)
        name = f"{name} {arguments.command}"
        with standard_streams():
            _check(arguments)
            status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        say("")
        return 130
    except BrokenPipeError:
        leave_stdout()
        return 0
    except _REFUSALS as error:
        leave_stdout()
        say(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
        return 2


def complete(arguments: argparse.Namespace) -> int:
    """Complete prompts and print them."""
    prompts = _prompts(arguments)
    llama = _load(arguments)
    if arguments.stream:
        return _stream(llama, prompts, arguments)
    from .evaluation.terminal import coloured_answer, write_coloured

    with progress(arguments.max_gen_len) as streamer:
        answers = llama.text_completion(
            prompts,
            details=arguments.json and arguments.logprobs,
            streamer=streamer,
            **_completion_options(arguments),
        )
    _say_if_unshifted(arguments, answers)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if arguments.json:
            write_json({"prompt": prompt, **answer})
            continue
        if len(prompts) > 1:
            write(f"{'' if row == 0 else chr(10)}--- prompt {row + 1}: {prompt}")
        if arguments.logprobs:
            write_coloured(coloured_answer(answer["generation"], answer["tokens"], answer["logprobs"]))
            write_logprobs(answer["tokens"], answer["logprobs"])
        else:
            write(answer["generation"])
        if arguments.sampling_logprobs:
            write_table(
                answer["tokens"], {name: answer[name] for name in ("logprobs", *SAMPLING_LOGPROBS) if name in answer}
            )
        if arguments.top_logprobs:
            best = [[(llama.speller.name_of(token), value) for token, value in top] for top in answer["top_logprobs"]]
            write_best(answer["tokens"], best)
        if arguments.logprobs_of:
            names = [str(token) for token in arguments.logprobs_of]
            write_named(answer["tokens"], names, answer["logprobs_of"])
    return 0


def _say_if_unshifted(arguments: argparse.Namespace, answers: list[Any]) -> None:
    """Say that prompts of one length were scored as the reference scores them, if nothing was generated."""
    asked = arguments.echo and any(getattr(arguments, name) for name in _SCORES)
    quirky = asked and arguments.compat == "meta" and arguments.max_gen_len == 0
    if quirky and len({len(answer["tokens"]) for answer in answers}) == 1:
        say(
            "hf-llama-sampling complete: without new tokens the reference scores prompts of one length unshifted, "
            "each token against itself: add --compat fixed, or take the command score"
        )


def _stream(llama: Any, prompts: list[str], arguments: argparse.Namespace) -> int:
    """Print completions as their tokens come: one as text, or any number as JSON, a line for each event."""
    with contextlib.closing(llama.stream_completion(prompts, **_completion_options(arguments))) as events:
        for event in events:
            if arguments.json:
                said = {name: value for name, value in event._asdict().items() if value is not None}
                write_json({"row": event.row, "id": event.id, "text": event.text, **said})
            else:
                write(event.text, end="")
    if not arguments.json:
        write("")
    return 0


def _completion_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the options that both ways of printing completions take."""
    return {
        "temperature": arguments.settings.temperature,
        "top_p": arguments.settings.top_p,
        "max_gen_len": arguments.max_gen_len,
        "logprobs": arguments.logprobs,
        "top_logprobs": arguments.top_logprobs,
        "logprobs_of": arguments.logprobs_of,
        "sampling_logprobs": arguments.sampling_logprobs,
        "echo": arguments.echo,
        "seeds": arguments.seeds,
        "stop": arguments.stop or None,
        "continuing": True,
    }


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of `complete`: arguments and files, or lines of standard input if there are none."""
    check_stdout("complete")
    prompts = [*arguments.prompts, *(read_file(path) for path in arguments.file)]
    if not prompts and sys.stdin is not None:
        if on_terminal(sys.stdin):
            say("Prompts, one per line; Ctrl-D ends them.")
        prompts = list(read_lines(sys.stdin))
    if not prompts:
        raise ValueError("complete needs a prompt: give it as an argument, by --file, or per line on standard input")
    if arguments.seeds is not None:
        check_seeds(arguments.seeds, len(prompts))
    if arguments.stream and not arguments.json:
        asked = [f"--{name.replace('_', '-')}" for name in _SCORES if getattr(arguments, name)]
        asked += [f"{len(prompts)} prompts"] * (len(prompts) > 1)
        if asked:
            raise ValueError(f"--stream prints the text of one prompt, got {asked[0]}: add --json for a line per token")
    return prompts


def chat(arguments: argparse.Namespace) -> int:
    """Talk with the model, line by line, until /exit, Ctrl-D or Ctrl-C."""
    from .llama.dialog import is_unsafe

    check_stdout("chat")
    if sys.stdin is None:
        raise ValueError("chat reads messages from standard input, and it is closed: open it")
    if arguments.system and is_unsafe([{"role": "user", "content": arguments.system}]):
        raise ValueError(f"a system message must hold none of LLAMA2's tags, got {arguments.system!r}")
    llama = _load(arguments)
    from .llama.conversation import Conversation

    conversation = Conversation(
        llama,
        arguments.settings,
        arguments.max_gen_len,
        system=arguments.system,
        chat_format="llama2" if arguments.llama2_format else "auto",
        stop=arguments.stop,
    )
    terminal = on_terminal(sys.stdin) and on_terminal(sys.stdout)
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # a terminal by itself cuts a line at 4,095 bytes
        say("/reset forgets the conversation, /exit or Ctrl-D ends it.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (said := input("> " if terminal else "").strip()) != "/exit":
            if said == "/reset":
                conversation.reset()
            elif said:
                _answer(conversation, said)
        return 0
    print(file=sys.stdout if terminal else sys.stderr)
    return 0


def _answer(conversation: Any, said: str) -> None:
    """Print the answer to a message as it comes; a refusal leaves the conversation as it was."""
    try:
        conversation.ask(said, lambda text: write(text, end=""))
    except ValueError as error:
        say(f"hf-llama-sampling chat: {error}")
    else:
        write("")


def batch(arguments: argparse.Namespace) -> int:
    """Answer the records of a JSONL file."""
    with exit_on_interrupt():
        from .batch.runner import run_command

    return run_command(arguments, _load)


def parity(arguments: argparse.Namespace) -> int:
    """Compare the package with the plain reference loop on this machine's device."""
    check_stdout("parity")
    with exit_on_interrupt():
        import torch
        import transformers

        from .generation.mixin import with_llama_generation
        from .llama.loading import load_model
        from .llama.placement import check_device, choose_placement
        from .parity import checks

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    placement = choose_placement("float32", check_device(device))
    torch.set_float32_matmul_precision("highest")
    with quiet_loading():
        model: Any = with_llama_generation(load_model(arguments.model, placement))
    results = list(checks(model, **({"rows": 200, "batches": 2} if arguments.quick else {})))
    for check in results:
        write(f"parity: {check}")
    passed = all(check.passed for check in results)
    where = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"
    write(f"parity: {'all equal' if passed else 'NOT EQUAL'} ({where})")
    return 0 if passed else 1


def score(arguments: argparse.Namespace) -> int:
    """Print how probable a model finds each token of given texts, and their perplexities; write the HTML page."""
    check_stdout("score")
    with exit_on_interrupt():
        from .evaluation.files import check_target, write_whole
        from .evaluation.page import is_page, page
        from .evaluation.perplexity import score_texts, total
        from .evaluation.terminal import write_scores

    kept = [*arguments.files, 0, 1]  # files, standard input and output
    target = None if arguments.html is None else check_target(arguments.html, kept, "page", is_page)
    files = arguments.files or ["-"]
    if "-" in files and on_terminal(sys.stdin):
        say("A text; Ctrl-D ends it.")
    texts = [("standard input" if file == "-" else file, read_file(file)) for file in files]
    how = {name: getattr(arguments, name) for name in ("bos", "max_seq_len", "stride", "top_logprobs", "logprobs_of")}
    scored = score_texts(_load(arguments), texts, **how)
    if target is not None:
        model = "tiny_llama (bundled)" if arguments.model == BUNDLED else str(arguments.model)
        write_whole(check_target(arguments.html, kept, "page", is_page), page(scored, model))
    if arguments.json:
        for text in scored:
            write_json(text.record())
        if len(scored) > 1:
            write_json({"total": total(scored).record()})
    else:
        write_scores(scored)
    if target is not None:
        (say if arguments.json else write)(f"page written to {target}")
    return 0


def lm_eval(arguments: argparse.Namespace) -> int:
    """Run lm-evaluation-harness with this package's model class, and print its table."""
    check_stdout("lm-eval")
    with exit_on_interrupt():
        from .evaluation.files import check_target, write_whole
        from .evaluation.report import evaluate, find_tasks, is_results

    target = None if arguments.output is None else check_target(arguments.output, [0, 1], "file of results", is_results)
    names = [name for name in arguments.tasks.split(",") if name]
    manager = find_tasks(names, arguments.include_path)
    llama = _load(arguments)
    with bars_on_terminals():
        table, results = evaluate(
            llama,
            names,
            manager,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            seeds=arguments.seed,
            apply_chat_template=arguments.apply_chat_template,
            system_instruction=arguments.system_instruction,
            fewshot_as_multiturn=arguments.fewshot_as_multiturn,
            gen_kwargs=arguments.gen_kwargs,
        )
    write(table)
    if target is not None:
        write_whole(target, results)
    return 0


def _load(arguments: argparse.Namespace) -> Any:
    """The `Llama` that the options of a command describe."""
    with exit_on_interrupt():
        from .llama.llama import Llama

    with quiet_loading():
        return Llama.build(
            arguments.model,
            arguments.tokenizer or arguments.model,
            arguments.max_seq_len,
            None,
            seed=arguments.seed,
            dtype=arguments.dtype,
            device_map=arguments.device_map,
            compat=arguments.compat,
        )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse values that no model can make right, before anything is loaded; adds `settings`, of the draw."""
    for name, least in _LEAST.items():
        value = getattr(arguments, name, None)
        if value is not None:
            check_int(name, value, least=least)
    if hasattr(arguments, "temperature"):
        arguments.settings = SamplingSettings(arguments.temperature, arguments.top_p)
        if arguments.command == "batch":
            seeds_as_given(arguments.seed)
        else:
            check_int("seed", arguments.seed, least=-(2**63), most=2**64 - 1)
    if arguments.command == "lm-eval":
        seeds_as_given(arguments.seed)
        if not arguments.tasks.strip(","):
            raise ValueError("an evaluation needs at least one task: name it with --tasks")
        if arguments.fewshot_as_multiturn and not arguments.apply_chat_template:
            raise ValueError("examples become turns of a chat template: add --apply-chat-template")
        for setting in (arguments.gen_kwargs or "a=1").split(","):
            if not re.fullmatch(r"\s*\w+=.+", setting):
                raise ValueError(f"gen_kwargs must be NAME=VALUE with commas in between, got {setting!r}: correct it")
        if arguments.limit is not None and not arguments.limit > 0:
            raise ValueError(f"limit must be above 0, got {arguments.limit}: leave it out for all documents")
    if getattr(arguments, "seeds", None) is not None:
        seeds_as_given(arguments.seeds)
    if not isinstance(getattr(arguments, "bos", None), bool | None):
        check_int("bos", arguments.bos, least=0)
    if "" in getattr(arguments, "stop", []):
        raise ValueError("a stop string must hold at least one character, got an empty one")
    for prompt in getattr(arguments, "prompts", []):
        if not prompt.isascii():
            _check_unicode(prompt)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a prompt must be valid Unicode, and {text!r} is not: put it into a file in UTF-8") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; refuse what no command knows with the usage of the command that it was given to."""
    arguments, rest = _parser().parse_known_args(argv)
    texts = next((getattr(arguments, name) for name in ("prompts", "files") if hasattr(arguments, name)), None)
    unknown = next((word for word in rest if word.startswith("-") and word != "-"), None)
    if unknown is not None:
        name = unknown.partition("=")[0]
        options = re.findall(r"--[\w-]+", arguments.sub.format_usage())
        near = [o for o in options if o == _MEANT.get(name)] or difflib.get_close_matches(
            name, options, n=1, cutoff=0.7
        )
        hint = f"did you mean {near[0]}?" if near else "--help lists what it has"
        arguments.sub.error(f"{arguments.command} has no option {name}: {hint}")
    if rest and texts is None:
        arguments.sub.error(f"{arguments.command} has no place for {rest[0]!r}: --help lists what it takes")
    if texts is not None:
        texts += rest  # argparse takes prompts and files from one place of the line, and leaves the others over
    return arguments


def _parser() -> argparse.ArgumentParser:
    """The whole command."""
    parser = argparse.ArgumentParser(
        prog="hf-llama-sampling", description="LLAMA2's generation, exactly, on any transformers causal language model."
    )
    parser.add_argument("--version", action="version", version=f"hf-llama-sampling {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    for add in (_add_complete, _add_chat, _add_batch, _add_score, _add_parity, _add_lm_eval):
        add(commands)
    return parser


def _add_complete(commands: Any) -> None:
    sub = _command(commands, "complete", complete, "complete prompts, each after a BOS, and print the completions")
    sub.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="texts to complete; one per line of standard input if none"
    )
    sub.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help='a file in UTF-8 that is one prompt, without the line end at its end; "-" for standard input; may repeat',
    )
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N[,N...]",
        help="a stream of random numbers per prompt: one seed each, or the first one's; a completion then depends on "
        "nothing else that is completed beside it",
    )
    _stop_option(sub)
    sub.add_argument("--echo", action="store_true", help="let the answer start with the prompt")
    sub.add_argument("--logprobs", action="store_true", help="print each token's log-probability, natural logarithm")
    sub.add_argument(
        "--top-logprobs", type=int, default=0, metavar="K", help="print the K best tokens at each position"
    )
    _logprobs_options(sub, "print")
    sub.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    sub.add_argument(
        "--stream",
        action="store_true",
        help="print the text of one prompt as it comes; with --json a line for each token of any number of prompts",
    )


def _add_chat(commands: Any) -> None:
    sub = _command(
        commands,
        "chat",
        chat,
        "talk with a chat model; /reset forgets the conversation, /exit ends it",
        "The model's own chat template is used where its tokenizer has one, LLAMA2's [INST] format otherwise. In a "
        "pipe every line is a message, and only the answers are printed.",
    )
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--system", metavar="TEXT", help="a system message for the whole conversation")
    _stop_option(sub)
    sub.add_argument(
        "--llama2-format", action="store_true", help="LLAMA2's format even if the tokenizer has a template"
    )


def _add_batch(commands: Any) -> None:
    sub = _command(
        commands,
        "batch",
        batch,
        "answer the records of a JSONL file, on one process or many",
        "Each line holds a prompt (text), prompt_tokens (ids) or messages (a dialog), and may hold an id, temperature, "
        "top_p, max_gen_len, stop and seed of its own. A run that was stopped is taken up by the same command. For "
        "several processes: accelerate launch --multi_gpu --num_processes N -m hf_llama_sampling batch IN.jsonl "
        "OUT.jsonl ... "
        "(--multi_gpu on CPU too). Quirks of the reference are mended. Status 1 if some records could not be answered, "
        "2 if the run was refused.",
    )
    _batch_options(sub)
    _model_options(sub, compat=False)
    _stop_option(sub)
    _sampling_options(sub, seed="the run's: each record draws from a stream of its own, from this and its content")


def _add_score(commands: Any) -> None:
    sub = _command(
        commands,
        "score",
        score,
        "print how probable a model finds given texts: perplexity per token, word and byte",
        "On a terminal each token has the colour of its probability (extra report). Words, bytes and the first token "
        "count as in lm-evaluation-harness.",
    )
    sub.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help='texts in UTF-8, each without the line end at its end; "-", or no name, for standard input',
    )
    sub.add_argument(
        "--html", metavar="PAGE", help="write a page that shows each token's alternatives; replaces only such pages"
    )
    sub.add_argument(
        "--json", action="store_true", help="print one JSON object per text and line, and one of their sum"
    )
    sub.add_argument(
        "--top-logprobs", type=int, default=5, metavar="K", help="most probable tokens to keep (default: %(default)s)"
    )
    _named_option(sub, "print")
    _window_options(sub, stride="half of it", bos="BOS, or EOS where there is none")
    _model_options(sub, compat=False)
    sub.set_defaults(seed=1)


def _window_options(sub: Any, *, stride: str, bos: str) -> None:
    """The options of scoring long texts, with what their defaults mean."""
    sub.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help=f"how far the window of --max-seq-len tokens moves over a longer text (default: {stride})",
    )
    sub.add_argument(
        "--bos",
        nargs="?",
        type=_bos,
        const=True,
        metavar="ID",
        help="the token before each text, so that its first one is scored: an id, or none; without a value the "
        f"tokenizer's BOS (default: {bos})",
    )


def _bos(text: str) -> int | bool:
    """An id; False for none."""
    try:
        return False if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an id or none, got {text!r}") from None


def _add_parity(commands: Any) -> None:
    sub = _command(
        commands,
        "parity",
        parity,
        "check this package against the plain reference loop on this machine's GPU or CPU",
        "Draws, generation in both schedules and the per-prompt streams are compared in float32. Status 1 if anything "
        "differs.",
    )
    sub.add_argument("--model", default=BUNDLED, help=_MODEL_FORMS)
    sub.add_argument("--device", help="cuda, cuda:1, mps, cpu, ... (default: the first GPU, else the CPU)")
    sub.add_argument("--quick", action="store_true", help="fewer rows and batches")


def _add_lm_eval(commands: Any) -> None:
    sub = _command(
        commands,
        "lm-eval",
        lm_eval,
        "run tasks of lm-evaluation-harness; needs the extra lm-eval",
        "Headers and contexts are read once for all choices, and sampled tasks repeat exactly. GGUF models too.",
    )
    sub.add_argument("--tasks", required=True, metavar="NAME,...", help="the harness' names of tasks and groups")
    sub.add_argument("--include-path", metavar="FOLDER", help="where task files of your own are")
    sub.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    sub.add_argument("--limit", type=float, metavar="N", help="documents of each task, or a share of them below 1")
    sub.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=1, help="of sampled tasks (default: %(default)s)")
    sub.add_argument("--apply-chat-template", action="store_true", help="write questions in the tokenizer's own format")
    sub.add_argument(
        "--fewshot-as-multiturn", action="store_true", help="with --apply-chat-template: examples as earlier turns"
    )
    sub.add_argument("--system-instruction", metavar="TEXT", help="a system message before each question")
    sub.add_argument(
        "--gen-kwargs",
        metavar="NAME=VALUE,...",
        help="settings of generation in place of the tasks' own: do_sample=True,temperature=0.6,top_p=0.9",
    )
    sub.add_argument("--output", metavar="FILE", help="where to write the results as JSON; replaces only such files")
    _model_options(sub, compat=False)


def _command(commands: Any, name: str, run: Any, what: str, more: str = "") -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}. {more}".strip()
    )
    sub.set_defaults(run=run, sub=sub)
    return sub


def _model_options(sub: argparse.ArgumentParser, *, compat: bool = True) -> None:
    group = sub.add_argument_group("model")
    group.add_argument(
        "--model",
        default=BUNDLED,
        help=_MODEL_FORMS,
    )
    group.add_argument(
        "--tokenizer", help="a SentencePiece file or where a transformers tokenizer is (default: --model)"
    )
    group.add_argument("--max-seq-len", type=int, metavar="N", help="most tokens per row, prompt included")
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="auto is the checkpoint's own (default: float16 on GPUs, else float32)",
    )
    group.add_argument(
        "--device-map", metavar="WHERE", help='"auto", "cpu", "cuda:0", ... (default: the first GPU, else CPU)'
    )
    if not compat:
        sub.set_defaults(compat="fixed")
        return
    group.add_argument(
        "--compat", choices=["meta", "fixed"], default="meta", help="keep or mend the reference's quirks"
    )


def _stop_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a string that ends an answer, which is cut right before it; may repeat",
    )


def _named_option(sub: Any, verb: str) -> None:
    sub.add_argument(
        "--logprobs-of",
        action="append",
        type=_token,
        metavar="TOKEN",
        help=f"{verb} the log-probability and the rank of this token at each position: an id, or a text that is one "
        "token, with the space before it if it has one (text:5 for the text 5); may repeat",
    )


def _logprobs_options(sub: Any, verb: str) -> None:
    _named_option(sub, verb)
    sub.add_argument(
        "--sampling-logprobs",
        action="store_true",
        help=f"{verb} each token's log-probability also after temperature and after the nucleus, and the nucleus' mass",
    )


def _token(text: str) -> int | str:
    """A token id, or a text; one of digits alone begins with ``text:``."""
    return int(text) if text.isdecimal() else text.removeprefix("text:")


def _seeds(text: str) -> int | list[int]:
    """One seed, or several with commas in between."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"seeds are ints with commas in between, got {text!r}") from None
    return seeds if len(seeds) > 1 else seeds[0]


def _sampling_options(sub: argparse.ArgumentParser, *, seed: str = "of torch's generator, as the reference's") -> None:
    group = sub.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=TOP_P, help="the nucleus (default: %(default)s)")
    group.add_argument(
        "--max-gen-len", type=int, default=GEN_LEN, metavar="N", help="most new tokens (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=1, help=f"{seed} (default: %(default)s)")


def _batch_options(sub: argparse.ArgumentParser) -> None:
    """The options of `batch` that are neither the model's nor the draw's."""
    sub.add_argument("input", metavar="IN.jsonl", help='records, one JSON object a line; "-" for standard input')
    sub.add_argument("output", metavar="OUT.jsonl", help='answers, in the input\'s order; "-" for standard output')
    _batch_answer_options(sub)
    group = sub.add_argument_group("fields")
    group.add_argument(
        "--prompt-field", metavar="NAME", help="the field with the prompt (default: prompt, prompt_tokens or messages)"
    )
    group.add_argument(
        "--id-field", metavar="NAME", help="the field with the id (default: id, task_id, custom_id and the like)"
    )
    group.add_argument("--keep-fields", action="store_true", help="copy fields that no rule names into the answers")
    group.add_argument(
        "--keep-field", action="append", metavar="NAME", help="copy this field into the answers; may be repeated"
    )
    group = sub.add_argument_group("run")
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
    group.add_argument(
        "--engine",
        choices=["batches", "continuous"],
        default="batches",
        help="continuous lets the next record in when one is done; --batch-size then bounds the records in flight, and "
        "--batch-tokens the cache (default: %(default)s)",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first record that is wrong")
    group.add_argument(
        "--existing",
        choices=["check", "reuse", "restart"],
        default="check",
        help="an output that is there already: check takes it up if input and settings are the same and else refuses, "
        "reuse keeps the answers of unchanged records, restart makes all anew (default: %(default)s)",
    )


def _batch_answer_options(sub: argparse.ArgumentParser) -> None:
    """The options that say what an answer of `batch` holds."""
    group = sub.add_argument_group("answers")
    group.add_argument("--score", action="store_true", help="generate nothing, return the prompts' log-probabilities")
    group.add_argument("--logprobs", action="store_true", help="return the tokens' log-probabilities")
    group.add_argument("--prompt-logprobs", action="store_true", help="return the prompts' log-probabilities too")
    group.add_argument("--top-logprobs", type=int, default=0, metavar="K", help="return the K best ids at each token")
    _logprobs_options(group, "return")
    group = sub.add_argument_group("scores (with --score)")
    _window_options(group, stride="such records are errors", bos="a text's BOS is its first token, which is not scored")
