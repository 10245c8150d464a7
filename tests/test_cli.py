"""The command, launched as a person launches it or called in this process."""

import io
import json
import subprocess
import sys

import pytest

from hf_llama_sampling import Llama, __version__
from hf_llama_sampling.cli import BUNDLED, main
from hf_llama_sampling.llama.loading import load_model
from hf_llama_sampling.llama.placement import choose_placement
from tests.llama.test_checkpoint import llama, write


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


def test_parity_on_metas_folder(capsys, tmp_path):
    """Meta's own format, without a tokenizer."""
    write(tmp_path, llama())
    assert main(["parity", "--quick", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("parity: all equal")


def test_parity_notices_a_difference(capsys, monkeypatch):
    """A sampler that keeps another nucleus does not pass."""
    import hf_llama_sampling.generation.loop as schedules

    right = schedules.sample
    monkeypatch.setattr(
        schedules, "sample", lambda logits, temperature, top_p, *rest: right(logits, temperature, 0.3, *rest)
    )
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


@pytest.mark.parametrize("command", ["complete", "chat", "batch", "parity"])
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
