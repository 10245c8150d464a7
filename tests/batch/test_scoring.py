"""Runs that score: windows over long texts, a BOS before them, spans; by the rules of `score_tokens` and of `score`."""

import json

import pytest

from hf_llama_sampling import Llama, batch
from hf_llama_sampling.batch.requests import Refused
from hf_llama_sampling.cli import main
from tests.batch.helpers import SETTINGS, ask_all, read, write
from tests.bounds import ROUNDING
from tests.conftest import TINY
from tests.generation.test_windows import LONG, by_hand

SIZE, STRIDE, BOS = 16, 6, 1


@pytest.fixture(scope="module")
def narrow(tiny_model):
    """The bundled model with windows of 16 tokens."""
    return Llama(tiny_model, str(TINY), max_seq_len=SIZE)


@pytest.mark.slow
def test_long_texts_equal_a_forward_per_token(narrow, tiny_model, tmp_path):
    """Run's and records' own stride and BOS in one file; each token once in its window, totals and counts of those."""
    cases = [({}, STRIDE, BOS), ({"stride": 15}, 15, BOS), ({"bos": 7}, STRIDE, 7), ({"bos": False}, STRIDE, None)]
    texts = [LONG[:40], LONG[:SIZE], LONG[:5]]
    asked = [(text, *case) for text in texts for case in cases]
    records = [{"prompt_tokens": text, **more} for text, more, _, _ in asked]
    answers = ask_all(narrow, tmp_path, records, score=True, max_gen_len=None, stride=STRIDE, bos=True, batch_size=5)
    for (text, _, stride, bos), answer in zip(asked, answers, strict=True):
        expected = by_hand(tiny_model, text if bos is None else [bos, *text], SIZE, stride)
        assert answer["prompt_tokens"] == text and answer["count"] == len(expected)
        logprobs = answer["prompt_logprobs"]
        assert logprobs == pytest.approx([0.0] * (bos is None) + expected, abs=ROUNDING)
        assert answer["total"] == pytest.approx(sum(logprobs), abs=1e-9)


def test_a_span_begins_at_its_records_start(narrow, tmp_path):
    """Lists begin there, and the total is of what they hold; beside records without a start."""
    whole = ask_all(narrow, tmp_path, [{"prompt_tokens": LONG[:30]}], name="whole", score=True, stride=STRIDE)
    records = [{"prompt_tokens": LONG[:30], "start": start} for start in (0, 1, 20, 30)]
    for start, answer in zip(
        (0, 1, 20, 30), ask_all(narrow, tmp_path, records, score=True, stride=STRIDE), strict=True
    ):
        assert answer["prompt_logprobs"] == pytest.approx(whole[0]["prompt_logprobs"][start:], abs=ROUNDING)
        assert answer["count"] == 30 - max(1, start)
        assert answer["total"] == pytest.approx(sum(answer["prompt_logprobs"]), abs=1e-9)


def test_bos_takes_the_place_of_a_texts_own(narrow, tmp_path):
    """A text or a dialog is scored after one BOS, its own or the one that is named, and never after two."""
    text, dialog = {"prompt": "the king"}, {"messages": [{"role": "user", "content": "hi"}]}
    plain = ask_all(narrow, tmp_path, [text, dialog], name="plain", score=True)
    with_bos = ask_all(narrow, tmp_path, [text, dialog], name="bos", score=True, bos=True)
    bare = ask_all(narrow, tmp_path, [text, dialog], name="bare", score=True, bos=False)
    for own, put, none in zip(plain, with_bos, bare, strict=True):
        assert own["prompt_tokens"] == [BOS, *put["prompt_tokens"]] and none["prompt_tokens"] == put["prompt_tokens"]
        assert own["prompt_logprobs"] == pytest.approx([0.0, *put["prompt_logprobs"]], abs=ROUNDING)
        assert own["count"] == put["count"] == none["count"] + 1
        assert none["prompt_logprobs"][0] == 0.0


def test_figures_are_those_of_the_command_score(tmp_path, capsys):
    """The same sum over the same tokens, for a text that fits and one that does not, with and without BOS."""
    texts = ["The king is dead.", "To be, or not to be: that is the question."]
    source = write(tmp_path / "in", [{"prompt": text} for text in texts])
    files = []
    for text in texts:
        files.append(str(tmp_path / text[:4]))
        (tmp_path / text[:4]).write_text(text)
    for bos in ([], ["none"], ["7"]):
        options = ["--bos", *bos, "--stride", "6", "--max-seq-len", "12"]
        output = tmp_path / f"out{bos}"
        assert main(["batch", str(source), str(output), "--score", *options]) == 0
        capsys.readouterr()
        assert main(["score", *files, "--json", *options]) == 0
        scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"file')]
        for answer, text in zip(read(output), scored, strict=True):
            assert (answer["prompt_tokens"], answer["count"]) == (text["ids"], text["num_scored"])
            assert answer["total"] == pytest.approx(text["logprob"], abs=ROUNDING * text["num_scored"])


def test_a_run_goes_on_with_its_own_windows_only(narrow, tmp_path):
    """Another stride or BOS is another run; True is the tokenizer's BOS, and the id 0 is not none."""
    source = write(tmp_path / "in", [{"prompt_tokens": LONG[:20]}])
    settings = {"score": True, "stride": STRIDE, "bos": 0}
    batch.run(narrow, source, tmp_path / "out", **settings)
    assert batch.run(narrow, source, tmp_path / "out", **settings).answered == 0
    for changed, words in [
        ({"stride": 7}, "stride was 6 and is 7"),
        ({"stride": None, "bos": 0}, "stride was 6"),
        ({"bos": True}, "bos was 0 and is 1"),
        ({"bos": False}, "bos was 0 and is 'none'"),
        ({"bos": None}, "bos was 0"),
    ]:
        with pytest.raises(Refused, match=words):
            batch.run(narrow, source, tmp_path / "out", **{**settings, **changed})
    batch.run(narrow, source, tmp_path / "own", **{**settings, "bos": True})
    assert batch.run(narrow, source, tmp_path / "own", **{**settings, "bos": BOS}).answered == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"stride": SIZE}, ValueError, "stride must be below the window's 16 tokens"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": "8"}, TypeError, "stride must be an int, got '8'"),
        ({"bos": 1024}, ValueError, "bos must be from 0 to 1023, got 1024"),
        ({"bos": "<s>"}, TypeError, "bos must be an int, got '<s>'"),
        ({"score": False, "stride": 4}, ValueError, "stride is of scoring, and this run generates"),
        ({"score": False, "bos": True}, ValueError, "bos is of scoring, and this run generates"),
    ],
)
def test_wrong_settings_are_refused_by_name(narrow, tmp_path, options, error, words):
    """Before anything is scored."""
    with pytest.raises(error, match=words):
        ask_all(narrow, tmp_path, [{"prompt": "a"}], **{"score": True, **options})


def test_wrong_records_become_errors(narrow, tmp_path):
    """A text that is too long says what windows would do; bad values are named, and the rest is scored."""
    tokens = {"prompt_tokens": LONG[:SIZE]}
    cases = [
        ({"prompt_tokens": LONG[: SIZE + 1], "bos": False}, "got 17: shorten or split it, or slide a window"),
        (tokens, "max_seq_len of 16 tokens, got 16 and its BOS"),
        ({**tokens, "stride": 16}, "stride must be below the window's 16 tokens"),
        ({**tokens, "bos": 5000}, "bos must be from 0 to 1023, got 5000"),
        ({**tokens, "start": 17, "stride": 4}, "start must be from 0 to 16, got 17"),
        ({"prompt": "a", "start": "last"}, "start must be an int"),
        ({**tokens, "Stride": 4}, "did you mean 'stride'?"),
        ({"prompt": "a", "total": 5, "count": 6}, "one of the response, and 'total' is"),
    ]
    answers = ask_all(
        narrow, tmp_path, [record for record, _ in cases], score=True, bos=True, keep_fields=["total", "count"]
    )
    for (_, words), answer in zip(cases, answers, strict=True):
        assert words in answer["error"]


def test_names_of_scoring_are_data_where_a_run_generates(narrow, tmp_path):
    """`start`, `bos`, `total` and the like of a data set are copied, and may be the prompt's or the id's field."""
    data = {"start": "x", "bos": "y", "stride": 0, "total": 3, "count": 0}
    (kept,) = ask_all(narrow, tmp_path, [{"prompt": "the", **data}], keep_fields=True)
    assert "error" not in kept and data.items() <= kept.items()
    for score in (False, True):
        (answer,) = ask_all(
            narrow,
            tmp_path,
            [{"start": "the king", "bos": 5}],
            name=f"mapped{score}",
            prompt_field="start",
            id_field="bos",
            score=score,
            max_gen_len=None if score else SETTINGS["max_gen_len"],
        )
        assert answer["id"] == 5 and "error" not in answer
