"""The command ``hf-llama-sampling``: arguments in, calls of the package, text out. Wiring only."""

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .defaults import BATCH_SIZE, BATCH_TOKENS, TEMPERATURE, TOP_P, WINDOW, __version__

BUNDLED = Path(__file__).parent / "tiny_llama"
GEN_LEN = 128
_MODEL_FORMS = (
    "Meta's folder (params.json, consolidated.*.pth), a transformers folder, a Hub id or a GGUF file "
    "(default: the bundled tiny model)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. A refusal is one sentence on standard error, and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-llama-sampling {arguments.command}: {error}", file=sys.stderr)
        return 2


def complete(arguments: argparse.Namespace) -> int:
    """Complete prompts and print them."""
    prompts = arguments.prompts
    if not prompts and sys.stdin is not None:
        if sys.stdin.isatty():
            print("Prompts, one per line; Ctrl-D ends them.", file=sys.stderr)
        prompts = [line.rstrip("\r\n") for line in sys.stdin]
    if not prompts:
        raise ValueError("complete needs a prompt: give it as an argument, or one per line on standard input")
    llama = _load(arguments)
    with _progress(arguments.max_gen_len) as streamer:
        answers = llama.text_completion(
            prompts,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_gen_len=arguments.max_gen_len,
            logprobs=arguments.logprobs,
            echo=arguments.echo,
            streamer=streamer,
        )
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if arguments.json:
            print(json.dumps({"prompt": prompt, **answer}, ensure_ascii=False))
            continue
        if len(prompts) > 1:
            print(f"{'' if row == 0 else chr(10)}--- prompt {row + 1}: {prompt}")
        print(answer["generation"])
        if arguments.logprobs:
            print(_beside(answer["tokens"], answer["logprobs"]))
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with the model, line by line, until /exit, Ctrl-D or Ctrl-C."""
    from .checks import check_temperature, check_top_p
    from .llama.dialog import UNSAFE_ERROR, Message, is_unsafe
    from .llama.llama import TextStreamer

    check_temperature(arguments.temperature)
    check_top_p(arguments.top_p)
    if arguments.system and is_unsafe([{"role": "user", "content": arguments.system}]):
        raise ValueError(f"a system message must hold none of LLAMA2's tags, got {arguments.system!r}")
    llama = _load(arguments)
    start: list[Message] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    dialog = list(start)
    if sys.stdin is None:
        raise ValueError("chat reads messages from standard input, and there is none: open it")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # a terminal by itself cuts a line at 4,095 bytes
        print("/reset forgets the conversation, /exit or Ctrl-D ends it.", file=sys.stderr)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            said = input("> " if terminal else "").strip()
            if said == "/exit":
                return 0
            if said == "/reset":
                dialog = list(start)
            if not said or said == "/reset":
                continue
            asked: list[Message] = [*dialog, {"role": "user", "content": said}]
            own_format = not arguments.llama2_format and llama.has_chat_template
            if not own_format and is_unsafe(asked[-1:]):
                print(UNSAFE_ERROR, flush=True)
                continue
            try:
                prompt = llama.encode_dialog(asked, "template" if own_format else "llama2")
                room = llama.max_seq_len - len(prompt)
                if room <= 0:
                    raise ValueError(
                        f"the conversation has {len(prompt)} tokens and the model reads {llama.max_seq_len}: "
                        "/reset starts a new one"
                    )
                printer = TextStreamer(llama.text_of, lambda text: print(text, end="", flush=True))
                tokens, _ = llama.generate(
                    [prompt],
                    min(room, arguments.max_gen_len),
                    arguments.temperature,
                    arguments.top_p,
                    streamer=printer,
                )
            except ValueError as error:
                print(f"hf-llama-sampling chat: {error}", file=sys.stderr)
                continue
            print(flush=True)
            dialog = [*asked, {"role": "assistant", "content": llama.text_of(tokens[0])}]
    print(file=sys.stderr if not terminal else sys.stdout)
    return 0


def batch(arguments: argparse.Namespace) -> int:
    """Answer the records of a JSONL file."""
    from .batch.runner import run_command

    return run_command(arguments, _load)


def parity(arguments: argparse.Namespace) -> int:
    """Compare the package with the plain reference loop on this machine's device."""
    import torch
    import transformers

    from .generation.mixin import with_llama_generation
    from .llama.llama import load_model
    from .parity import checks

    transformers.utils.logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")
    model: Any = with_llama_generation(load_model(arguments.model, torch.float32, {"device_map": device}))
    size = {"rows": 200, "batches": 2} if arguments.quick else {}
    results = list(checks(model, **size))
    where = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"
    for check in results:
        bound = f", logprobs within {check.difference:.1e}" if "generation" in check.name else ""
        verdict = "ok" if check.passed else "DIFFERENT"
        print(f"parity: {check.name}: {check.equal} of {check.total} rows equal{bound}: {verdict}")
    passed = all(check.passed for check in results)
    print(f"parity: {'all equal' if passed else 'NOT EQUAL'} ({where})")
    return 0 if passed else 1


def _load(arguments: argparse.Namespace) -> Any:
    from .llama.llama import Llama  # torch and transformers take seconds to import; --help should not

    _quiet()
    with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else _Nowhere()):
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


def _quiet() -> None:
    """transformers' own bars and notices stay out of a pipe."""
    if not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


class _Nowhere:
    """A text file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _progress(tokens: int) -> Iterator[Any]:
    """A bar of decoding steps on a terminal's standard error, if it takes longer than two seconds."""
    from tqdm import tqdm

    class Steps:
        def __init__(self, bar: Any) -> None:
            self.bar = bar
            self.started = False

        def put(self, value: object) -> None:
            self.bar.update(self.started)  # the first call is the prompt
            self.started = True

        def end(self) -> None:
            self.bar.close()

    with tqdm(total=tokens, unit="step", disable=None, delay=2.0, leave=False) as bar:
        yield Steps(bar)


def _beside(tokens: Sequence[str], logprobs: Sequence[float]) -> str:
    """Each token with its logprob after it, as many to a line as fit."""
    pairs = (f"{token!r}\u00a0{value:.4f}" for token, value in zip(tokens, logprobs, strict=True))
    # No-break spaces hold a pair together; a token's own blanks are kept by the same trick.
    joined = "  ".join(pair.replace(" ", "\u00a0") for pair in pairs)
    lines = textwrap.wrap(joined, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("\u00a0", " ")


def _parser() -> argparse.ArgumentParser:
    """The whole command."""
    parser = argparse.ArgumentParser(
        prog="hf-llama-sampling", description="LLAMA2's generation, exactly, on any transformers causal language model."
    )
    parser.add_argument("--version", action="version", version=f"hf-llama-sampling {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    sub = _command(commands, "complete", complete, "complete prompts, each after a BOS, and print the completions")
    sub.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="texts to complete; one per line of standard input if none"
    )
    _model_options(sub)
    _sampling_options(sub)
    sub.add_argument("--echo", action="store_true", help="let the answer start with the prompt")
    sub.add_argument("--logprobs", action="store_true", help="print each token's log-probability, natural logarithm")
    sub.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")

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
    sub.add_argument(
        "--llama2-format", action="store_true", help="LLAMA2's format even if the tokenizer has a template"
    )

    sub = _command(
        commands,
        "batch",
        batch,
        "answer the records of a JSONL file, on one process or many",
        "Each line holds a prompt (text), prompt_tokens (ids) or messages (a dialog), and may hold an id, temperature, "
        "top_p, max_gen_len and seed of its own. A run that was stopped is taken up by the same command. For several "
        "processes: accelerate launch --multi_gpu --num_processes N -m hf_llama_sampling batch IN.jsonl OUT.jsonl ... "
        "(--multi_gpu on CPU too). Quirks of the reference are mended. Status 1 if some records could not be answered, "
        "2 if the run was refused.",
    )
    _batch_options(sub)
    _model_options(sub, compat=False)
    _sampling_options(sub, seed="the run's: each record draws from a stream of its own, from this and its content")

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
    return parser


def _command(commands: Any, name: str, run: Any, what: str, more: str = "") -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}. {more}".strip()
    )
    sub.set_defaults(run=run)
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
        "--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on GPUs, else float32"
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
    group = sub.add_argument_group("answers")
    group.add_argument("--score", action="store_true", help="generate nothing, return the prompts' log-probabilities")
    group.add_argument("--logprobs", action="store_true", help="return the tokens' log-probabilities")
    group.add_argument("--prompt-logprobs", action="store_true", help="return the prompts' log-probabilities too")
    group.add_argument("--top-logprobs", type=int, default=0, metavar="K", help="return the K best ids at each token")
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
    group.add_argument("--strict", action="store_true", help="stop at the first record that is wrong")
    group.add_argument(
        "--existing",
        choices=["check", "reuse", "restart"],
        default="check",
        help="an output that is there already: check takes it up if input and settings are the same and else refuses, "
        "reuse keeps the answers of unchanged records, restart makes all anew (default: %(default)s)",
    )
