"""The command, launched as a person launches it or called in this process."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from hf_llama_sampling import Llama, __version__
from hf_llama_sampling.cli import BUNDLED, main
from hf_llama_sampling.llama.loading import load_model
from hf_llama_sampling.llama.placement import choose_placement
from tests.llama.test_checkpoint import llama, write
from tests.test_console import Terminal


def run(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "hf_llama_sampling", *arguments], input=stdin, capture_output=True, text=True
    )


def test_complete_prints_the_completion_and_nothing_else(capsys):
    """Standard output holds the text that `text_completion` gives for the same seed."""
    assert main(["complete", "ROMEO:", "--max-gen-len", "12", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    llama = Llama.build(BUNDLED, BUNDLED, None, None, seed=3)
    capsys.readouterr()
    assert printed == llama.text_completion(["ROMEO:"], max_gen_len=12)[0]["generation"] + "\n"


def test_complete_json_echo_logprobs_from_standard_input(capsys, monkeypatch):
    """One object a line and prompt, with tokens and logprobs beside each other; echo repeats the prompt."""
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\nThe king\n"))
    assert main(["complete", "--json", "--echo", "--logprobs", "--max-gen-len", "5", "--temperature", "0"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["ROMEO:", "The king"]
    for answer in answers:
        assert answer["generation"].startswith(answer["prompt"])
        assert len(answer["tokens"]) == len(answer["logprobs"])


def test_complete_logprobs_are_printed_beside_their_tokens(capsys):
    """Every token with its logprob after it, spaces inside a token included."""
    main(["complete", "ROMEO:", "--logprobs", "--max-gen-len", "4", "--temperature", "0", "--json"])
    answer = json.loads(capsys.readouterr().out)
    main(["complete", "ROMEO:", "--logprobs", "--max-gen-len", "4", "--temperature", "0"])
    printed = " ".join(capsys.readouterr().out.split())
    for token, value in zip(answer["tokens"], answer["logprobs"], strict=True):
        assert f"{token!r} {value:.4f}" in printed


def test_complete_names_ids_bytes_reasons_and_best_tokens(capsys):
    """In JSON beside the logprobs, in a stream's events, and in text a line per token, special tokens by name."""
    call = ["complete", "ROMEO:", "--max-gen-len", "4", "--temperature", "0", "--top-logprobs", "2"]
    assert main([*call, "--logprobs", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    llama = Llama.build(BUNDLED, BUNDLED, None, None)
    capsys.readouterr()
    made = llama.completions(["ROMEO:"], temperature=0, max_gen_len=4, logprobs=2)["choices"][0]
    assert [llama.text_of([token]) for token in answer["ids"]] == answer["tokens"]
    assert (answer["bytes"], answer["finish_reason"]) == (made["logprobs"]["bytes"], "length")
    assert [top[0][0] for top in answer["top_logprobs"]] == answer["ids"]  # greedy
    assert main([*call, "--stream", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["top"] for event in events[:-1]] == answer["top_logprobs"]
    assert main(call) == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    for line, token, best in zip(lines, answer["tokens"], made["logprobs"]["top_logprobs"], strict=True):
        assert line.strip().startswith(repr(token))
        assert all(f"  {name!r} {value:.4f}" in line for name, value in best.items())


def test_complete_prints_named_tokens_and_the_three_distributions(capsys):
    """In JSON as `text_completion` gives them; in text a line per token, with a column or a pair for each."""
    asked = ["--logprobs-of", " king", "--logprobs-of", "5", "--logprobs-of", "text:I", "--sampling-logprobs"]
    call = ["complete", "ROMEO:", *asked, "--max-gen-len", "4", "--seeds", "3"]
    assert main([*call, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    llama = Llama.build(BUNDLED, BUNDLED, None, None)
    capsys.readouterr()
    (expected,) = llama.text_completion(
        ["ROMEO:"], max_gen_len=4, seeds=3, logprobs_of=[" king", 5, "I"], sampling_logprobs=True
    )
    assert answer == {"prompt": "ROMEO:", **json.loads(json.dumps(expected))}
    assert main(call) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[-9:]]
    assert lines[0].split("  ")[-4:] == ["logprobs", "temperature logprobs", "sampled logprobs", "nucleus mass"]
    for row, token in enumerate(answer["tokens"]):
        numbers = [
            f"{answer[name][row]:.4f}"
            for name in ("logprobs", "temperature_logprobs", "sampled_logprobs", "nucleus_mass")
        ]
        assert lines[1 + row].startswith(repr(token)) and lines[1 + row].split()[-4:] == numbers
        pairs = zip((" king", "5", "I"), answer["logprobs_of"][row], strict=True)
        named = [part for name, (_, value, rank) in pairs for part in (name.strip(), f"{value:.4f}", f"#{rank}")]
        assert lines[5 + row].startswith(repr(token)) and lines[5 + row].split()[-9:] == named


NEVER_LOADED = [
    (["complete", "x", "--temperature", "-1"], "temperature must be 0 (greedy) or a finite number above it, got -1.0"),
    (["complete", "x", "--temperature", "nan"], "got nan"),
    (["complete", "x", "--temperature", "1e999"], "got inf"),
    (["chat", "--temperature", "-1"], "temperature"),
    (["chat", "--top-p", "1.5"], "top_p must lie in [0, 1], got 1.5"),
    (["chat", "--max-gen-len", "-3"], "max_gen_len must be at least 0, got -3"),
    (["chat", "--max-seq-len", "0"], "max_seq_len must be at least 1, got 0"),
    (["chat", "--seed", str(2**64)], "seed must be from"),
    (["chat", "--system", "say [INST]"], "must hold none of LLAMA2's tags"),
    (["complete", "x", "--seed", str(-(2**63) - 1)], "seed must be from"),
    (["complete", "x", "--max-seq-len", "-1"], "max_seq_len must be at least 1, got -1"),
    (["complete", "x", "--device-map", "cuda:77"], "'cuda:77' asks for a cuda device"),
    (["complete", "x", "--device-map", "nonsense"], "'nonsense' is none"),
    (["complete", "a\udcffb"], "must be valid Unicode"),
    (["complete", "--file", "/nowhere/at/all"], "cannot be read"),
    (["complete", "x", "--seeds", "1,2"], "seeds must be one value or one per row, got 2 for 1 rows"),
    (["complete", "x", "--seeds", "-1"], "seeds must lie in [0, 2**64), got -1"),
    (["complete", "x", "--stop", ""], "a stop string must hold at least one character"),
    (["chat", "--stop", ""], "a stop string must hold at least one character"),
    (["parity", "--device", "cuda:77"], "'cuda:77' asks for a cuda device"),
    (["score", "/nowhere/at/all"], "cannot be read"),
    (["score", "x", "--stride", "0"], "stride must be at least 1, got 0"),
    (["score", "x", "--max-seq-len", "0"], "max_seq_len must be at least 1, got 0"),
    (["score", "x", "--top-logprobs", "-1"], "top_logprobs must be at least 0, got -1"),
    (["score", "x", "--bos", "-1"], "bos must be at least 0, got -1"),
    (["score", "x", "--html", "/nowhere/at/all.html"], "is not there: make it, or name another"),
    (["score", "x", "--html", "-"], "the page needs a file of its own"),
    (["score", __file__, "--html", __file__], "must not overwrite what is read"),
    (["batch", "-", "-", "--temperature", "-1"], "temperature"),
    (["batch", "-", "-", "--top-p", "2"], "top_p"),
    (["batch", "-", "-", "--max-gen-len", "-1"], "max_gen_len must be at least 0"),
    (["batch", "-", "-", "--max-seq-len", "0"], "max_seq_len must be at least 1"),
    (["batch", "-", "-", "--batch-size", "0"], "batch_size must be at least 1"),
    (["batch", "-", "-", "--batch-tokens", "0"], "batch_tokens must be at least 1"),
    (["batch", "-", "-", "--window", "0"], "window must be at least 1"),
    (["batch", "-", "-", "--top-logprobs", "-1"], "top_logprobs must be at least 0"),
    (["batch", "-", "-", "--seed", "-1"], "seeds must lie in [0, 2**64), got -1"),
]


@pytest.mark.parametrize(("arguments", "words"), NEVER_LOADED)
def test_a_bad_value_is_refused_before_anything_is_loaded_or_read(capsys, monkeypatch, arguments, words):
    """Status 2 and one sentence, with neither a model read nor a line of standard input."""

    class Unread(io.StringIO):
        def readline(self, *_):
            pytest.fail("read standard input")

    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr("hf_llama_sampling.llama.loading.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr("sys.stdin", Unread())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hf-llama-sampling {arguments[0]}: ") and error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize("arguments", [["complete", "x", "--top-p", "a"], ["chat", "--max-gen-len", "2.5"], ["sing"]])
def test_what_argparse_refuses_is_status_2_too(arguments, capsys):
    """Words for numbers, and commands that there are not."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["complete", "x", "--temprature", "1"], ["batch", "a", "b", "c"], ["chat", "x"]])
def test_what_a_command_does_not_know_is_refused_with_its_own_usage(arguments, capsys):
    """Not with that of `hf-llama-sampling`, which names no option."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: hf-llama-sampling {arguments[0]} [-h]")


def test_prompts_may_stand_on_both_sides_of_an_option(capsys):
    """In their order; argparse by itself takes those of one side."""
    asked = ["complete", "The king", "--max-gen-len", "2", "ROMEO:", "--temperature", "0", "O", "--json"]
    assert main(asked) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["The king", "ROMEO:", "O"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complete", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["complete", "x", "--top-p", "2"], ["top_p", "2"]),
        (["complete", "x", "--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["complete", "x", "--max-gen-len", "-3"], ["max_gen_len", "-3"]),
    ],
)
def test_a_refusal_is_one_sentence_and_status_2(capsys, arguments, words):
    """No traceback: the rule and the value on standard error."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-llama-sampling complete: ") and error.count("\n") == 1
    for word in words:
        assert word in error


def test_complete_without_a_prompt_is_refused(capsys, monkeypatch):
    """Nothing on standard input is no prompt."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["complete"]) == 2
    assert "prompt" in capsys.readouterr().err


@pytest.mark.slow
def test_parity_on_this_machine(capsys):
    """Every comparison with the plain loop is equal, and the last line says so."""
    assert main(["parity", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.endswith(": ok") for line in lines[:4])
    assert lines[-1].startswith("parity: all equal")


def test_parity_takes_every_form_of_checkpoint(capsys, weights_file):
    """A GGUF file as `complete` takes it; a folder that holds none of the forms is refused with the way out."""
    assert main(["parity", "--quick", "--model", str(weights_file.parent.parent)]) == 2
    assert "a checkpoint folder holds" in capsys.readouterr().err
    assert load_model(weights_file, choose_placement("float32", "cpu")).config.vocab_size == 49152


@pytest.mark.slow
def test_parity_on_metas_folder(capsys, tmp_path):
    """Meta's own format, without a tokenizer."""
    write(tmp_path, llama())
    assert main(["parity", "--quick", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("parity: all equal")


@pytest.mark.slow
def test_parity_notices_a_difference(capsys, monkeypatch):
    """A sampler that keeps another nucleus does not pass."""
    from hf_llama_sampling.generation import loop

    class Narrow(loop.TokenSampler):
        def __init__(self, settings, *more, **others):
            super().__init__(dataclasses.replace(settings, top_p=0.3), *more, **others)

    monkeypatch.setattr(loop, "TokenSampler", Narrow)
    assert main(["parity", "--quick"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.launches
def test_chat_in_a_pipe_keeps_history_resets_and_exits():
    """Only answers reach standard output: one per message, the same again after a reset, none after /exit."""
    done = run("chat", "--temperature", "0", "--max-gen-len", "6", stdin="Hello\nAgain\n/reset\nHello\n/exit\nnever\n")
    assert done.returncode == 0, done.stderr
    once = run("chat", "--temperature", "0", "--max-gen-len", "6", stdin="Hello\n")
    assert once.returncode == 0
    answer = once.stdout
    assert done.stdout.startswith(answer) and done.stdout.endswith(answer)
    assert len(done.stdout) > 2 * len(answer)
    assert "Traceback" not in done.stderr


def test_chat_refuses_tags_and_goes_on(capsys, monkeypatch):
    """A message with one of the format's tags is answered by the fixed sentence and forgotten."""
    monkeypatch.setattr("sys.stdin", io.StringIO("say [INST]\nHello\n"))
    assert main(["chat", "--temperature", "0", "--max-gen-len", "4"]) == 0
    with_tag = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    main(["chat", "--temperature", "0", "--max-gen-len", "4"])
    assert with_tag == "Error: special tags are not allowed as part of the prompt.\n" + capsys.readouterr().out


def test_chat_says_when_the_conversation_is_too_long(capsys, monkeypatch):
    """The way out is named, and the conversation goes on without the message."""
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 60 + "\nHi\n"))
    assert main(["chat", "--max-seq-len", "60", "--max-gen-len", "2"]) == 0
    streams = capsys.readouterr()
    assert "/reset" in streams.err and streams.out.strip()


def test_chat_ends_cleanly_on_interrupt(monkeypatch, capsys):
    """Ctrl-C leaves no traceback."""
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["chat"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_batch_says_what_its_seed_is(capsys):
    """A batch run draws from streams of its own, not from torch's generator."""
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "each record draws from a stream of its own" in said and "torch's generator" not in said


@pytest.mark.parametrize("command", ["complete", "chat", "batch", "score", "parity"])
def test_help_names_every_option(capsys, command):
    """`--help` needs no model and explains each option."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_version(capsys):
    """`--version` prints the package's."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.launches
def test_help_imports_neither_torch_nor_transformers(capsys):
    """Options are shown at once."""
    code = (
        "import sys; from hf_llama_sampling.cli import main\n"
        "try: main(['batch', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")


def test_a_file_is_one_prompt(capsys, tmp_path, monkeypatch):
    """A prompt of several lines from --file, once or more, after those in the arguments; "-" is standard input."""
    (tmp_path / "a.txt").write_text("ROMEO:\nI am\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
    files = ["--file", str(tmp_path / "a.txt"), "--file", "-"]
    assert main(["complete", "The king", *files, "--json", "--max-gen-len", "2"]) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["The king", "ROMEO:\nI am", "two\nlines"]


@pytest.mark.launches
@pytest.mark.parametrize(("encoding", "more"), [("ascii", []), ("ascii", ["--json"]), ("cp437", ["--json"])])
def test_no_encoding_loses_an_answer(encoding, more):
    """Text and JSON are printed whatever characters standard output lacks."""
    asked = ["complete", "ROMEO: é 你", "--echo", "--max-gen-len", "2", *more]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "hf_llama_sampling", *asked], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer = done.stdout.decode(encoding)
    assert json.loads(answer)["generation"].startswith("ROMEO: é 你") if more else "ROMEO: " in answer


@pytest.mark.launches
@pytest.mark.parametrize("command", [["complete", "x"], ["chat"], ["parity", "--quick"], ["batch", "-", "-"]])
def test_an_interrupt_while_a_command_imports_leaves_no_traceback(command, tmp_path):
    """Ctrl-C in the middle of `import torch`, which may swallow an exception: status 130, an empty line."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10**8): pass\n"
        "except BaseException: pass\nraise SystemExit('went on')\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "hf_llama_sampling", *command],
        input="",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize("command", [["complete", "x"], ["parity", "--quick"]])
def test_an_interrupt_later_is_status_130(command, monkeypatch, capsys):
    """While a model is loaded or run."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", interrupt)
    monkeypatch.setattr("hf_llama_sampling.llama.loading.load_model", interrupt)
    assert main(command) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of\nmemory"), MemoryError(), ImportError("Please install gguf"), OSError(28, "full")],
)
def test_what_the_machine_lacks_is_one_line(error, monkeypatch, capsys):
    """Memory, a package, a disk: no traceback."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", fail)
    assert main(["complete", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-llama-sampling complete: ") and said.count("\n") == 1


@pytest.mark.launches
def test_a_full_disk_is_a_refusal():
    """An answer that cannot be written is not passed over in silence, nor by the interpreter's own complaint."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hf_llama_sampling", "complete", "x", "--max-gen-len", "2"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.launches
@pytest.mark.parametrize("command", [["complete", "x", "--max-gen-len", "2"], ["chat"], ["parity", "--quick"]])
def test_a_closed_standard_output_is_refused(command):
    """Nobody would read the answers."""
    shell = f'exec "$0" -m hf_llama_sampling {" ".join(command)} >&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b"standard output, and it is closed" in done.stderr


@pytest.mark.launches
def test_control_characters_are_shown_on_a_terminal_and_kept_in_a_pipe():
    """An echoed prompt with an escape sequence, on a pseudo-terminal and through a pipe."""
    command = [sys.executable, "-m", "hf_llama_sampling", "complete", "a\x1b[2J\u202eb", "--echo", "--max-gen-len", "1"]
    piped = subprocess.run(command, capture_output=True).stdout
    assert "a\x1b[2J\u202eb".encode() in piped
    ours, theirs = pty.openpty()
    started = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while block := os.read(ours, 1024):
            shown += block
    os.close(ours)
    assert started.wait() == 0
    assert rb"a\x1b[2J\u202eb" in shown and b"\x1b" not in shown and "\u202e".encode() not in shown


TEMPLATES = {
    "no system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_with_a_template_that_fails(name, capsys, monkeypatch, tmp_path):
    """A system message that the template refuses is refused at once; each message that it refuses is one sentence."""
    monkeypatch.setattr("hf_llama_sampling.llama.templates._STEPS", 1_000_000)
    shutil.copytree(BUNDLED, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATES[name])
    chat = ["chat", "--model", str(tmp_path / "model"), "--max-gen-len", "2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main([*chat, "--system", "Be brief"]) == 2
    error = capsys.readouterr().err
    assert "chat template" in error and error.count("\n") == 1
    assert main(chat) == 0
    refused = capsys.readouterr().err.count("chat template")
    assert refused == (name == "loops")


def test_chat_writes_no_control_tokens_for_a_user(capsys, monkeypatch, tmp_path):
    """What a user types is characters to a template's tokenizer; the conversation goes on."""
    shutil.copytree(BUNDLED, tmp_path / "model")
    template = "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    asked = []
    generate = Llama.generate
    monkeypatch.setattr(
        Llama, "generate", lambda self, *args, **kw: asked.append(args[0]) or generate(self, *args, **kw)
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("x</s><s>y\n"))
    assert main(["chat", "--model", str(tmp_path / "model"), "--max-gen-len", "2"]) == 0
    ((prompt,),) = asked
    assert (prompt.count(1), prompt.count(2)) == (1, 1)


def test_complete_with_seeds_and_stop_strings(capsys):
    """A prompt and its seed give one answer in any company; the text ends before the first stop string."""
    options = ["--json", "--max-gen-len", "20"]
    assert main(["complete", "ROMEO:", "The king", "--seeds", "5", *options]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["complete", "The king", "ROMEO:", "--seeds", "6,5", *options]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == together[::-1]
    assert main(["complete", "ROMEO:", "--seeds", "5", "--stop", "zzz", "--stop", "are", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["generation"] == together[0]["generation"].partition("are")[0] and answer["stop_reason"] == "are"


def test_score_prints_text_and_perplexities(capsys, tmp_path):
    """Each text as it stands, its figures, the sum of several; nothing else on standard output, and no page."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("ROMEO:\nBut soft\n", "The king is dead."), strict=True):
        file.write_text(text)
    assert main(["score", str(files[0])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ROMEO:\nBut soft\n\ntokens ") and "perplexity per word" in printed
    assert main(["score", *map(str, files), "--json", "--top-logprobs", "2"]) == 0
    one, other, both = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["file"] == str(files[0]) and one["num_bytes"] == 15 and one["num_words"] == 3
    assert f"perplexity per token  {one['perplexity']:.4f}\n" in printed
    assert both["total"]["num_tokens"] == one["num_tokens"] + other["num_tokens"]
    assert both["total"]["logprob"] == pytest.approx(one["logprob"] + other["logprob"])
    assert sorted(tmp_path.iterdir()) == files


def test_score_reads_standard_input_and_writes_a_page(capsys, monkeypatch, tmp_path):
    """Without a file, or as "-"; with --json the page is named on standard error, and standard output is JSON alone."""
    for arguments in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The king")))
        assert main(["score", *arguments, "--json", "--html", str(tmp_path / "page.html")]) == 0
        streams = capsys.readouterr()
        assert json.loads(streams.out)["file"] == "standard input"
        assert streams.err == f"page written to {tmp_path / 'page.html'}\n"
    assert "standard input" in (tmp_path / "page.html").read_text()


def test_score_never_counts_the_first_token_as_certain(capsys, monkeypatch):
    """Scored after BOS or another id, or null and not counted: never 0.0."""
    seen = {}
    for name, bos in (("own", ["--bos"]), ("default", []), ("id", ["--bos", "13"]), ("none", ["--bos", "none"])):
        monkeypatch.setattr("sys.stdin", io.StringIO("The king"))
        assert main(["score", "--json", *bos]) == 0
        seen[name] = json.loads(capsys.readouterr().out)
    assert seen["own"] == seen["default"] and seen["own"]["logprobs"][0] < 0 and seen["id"]["logprobs"][0] < 0
    assert seen["none"]["logprobs"][0] is None and seen["none"]["num_scored"] == seen["own"]["num_scored"] - 1


def test_score_slides_a_window(capsys, monkeypatch):
    """A text longer than the limit is scored whole; a stride as long as the window is refused."""
    long = "To be, or not to be: that is the question. " * 8
    monkeypatch.setattr("sys.stdin", io.StringIO(long))
    assert main(["score", "--json", "--max-seq-len", "32"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["num_scored"] == record["num_tokens"] > 64
    monkeypatch.setattr("sys.stdin", io.StringIO(long))
    assert main(["score", "--max-seq-len", "32", "--stride", "32"]) == 2
    assert "stride must be below the window's 32 tokens" in capsys.readouterr().err


def test_complete_colours_its_answers_on_a_terminal(monkeypatch):
    """The text by probability where logprobs are asked for, and plain where not."""
    for asked, colours in (["--logprobs"], True), ([], False):
        monkeypatch.setattr("sys.stdout", Terminal())
        monkeypatch.setenv("TERM", "xterm-256color")
        assert main(["complete", "ROMEO:", "--seed", "1", "--max-gen-len", "12", *asked]) == 0
        assert ("\x1b[" in sys.stdout.getvalue()) == colours


def test_chat_with_stop_strings(capsys, monkeypatch):
    """An answer is printed up to its stop string, and kept so for the next turn."""
    asked = []
    generate = Llama.generate

    def keep(self, prompts, *more, **others):
        asked.append(self.text_of(prompts[0]))
        return generate(self, prompts, *more, **others)

    monkeypatch.setattr(Llama, "generate", keep)
    monkeypatch.setattr("sys.stdin", io.StringIO("Speak\nMore\n"))
    assert main(["chat", "--max-gen-len", "20", "--temperature", "1.5", "--stop", "e", "--seed", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed and "e" not in printed
    assert "e" not in asked[1].partition("[/INST]")[2].partition("[INST]")[0]


def test_complete_says_where_scores_are_the_references_quirk(capsys):
    """Prompts of one length, nothing generated; not where it is mended, where lengths differ, or with new tokens."""
    asked = ["complete", "ROMEO:", "--echo", "--logprobs", "--json"]
    said = []
    for more in (["--max-gen-len", "0"], ["--max-gen-len", "0", "--compat", "fixed"], ["--max-gen-len", "1"]):
        assert main([*asked, *more]) == 0
        captured = capsys.readouterr()
        said.append((json.loads(captured.out)["logprobs"][0] == 0.0, "unshifted" in captured.err))
    assert main([*asked, "The king of all", "--max-gen-len", "0"]) == 0
    assert said == [(False, True), (True, False), (True, False)] and capsys.readouterr().err == ""
