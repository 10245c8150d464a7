"""`LlamaLM` in lm-evaluation-harness against the harness' own model class, on tasks from local files."""

import json

import pytest

from hf_llama_sampling import Llama, Tokenizer, with_llama_generation
from hf_llama_sampling.cli import main
from tests.conftest import TINY

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: install the extra lm-eval")
# The harness' own imports, and the libraries that it pulls in, warn on their own account.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.launches]  # the harness asks git for its version

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "the"], max_gen_toks: 12, do_sample: {sample}, temperature: {temperature}}}
metric_list: [{{metric: exact_match}}]
"""
HEADER = "Speak, and answer with a word.\nROMEO: love\nJULIET: night\n"
DOCUMENTS = [
    {"question": f"{HEADER}{name}:", "choices": [" love", " night and day", " I", "\n"], "answer": place % 4}
    for place, name in enumerate(["KING", "The queen of all", "First Citizen", "DUKE ", "KING", "A"])
] + [{"question": "", "choices": ["ROMEO", "the king"], "answer": 1}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A multiple-choice task and a generative one, greedy and sampled."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text, more in [
        ("choice", CHOICE, {}),
        ("generate", GENERATE, {"sample": "false", "temperature": 0.0}),
        ("sampled", GENERATE, {"sample": "true", "temperature": 0.8}),
    ]:
        task = text.format(file=folder / "docs.jsonl", **more).replace("local_generate", f"local_{name}")
        (folder / f"{name}.yaml").write_text(task)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    manager.folder = folder
    return manager


@pytest.fixture(scope="module")
def ours(tiny_model, tiny_tokenizer):
    from hf_llama_sampling.evaluation import LlamaLM

    return LlamaLM(tiny_model, tiny_tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def theirs(tiny_model, tiny_tokenizer):
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(TINY, dtype=tiny_model.dtype).eval()
    return HFLM(pretrained=plain, tokenizer=tiny_tokenizer, batch_size=3)


def evaluated(model, tasks, task, **more):
    return lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **more)


def outcome(results, task):
    """Answers per document, and metrics."""
    answers = [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]
    metrics = {name: value for name, value in results["results"][task].items() if "," in name and "stderr" not in name}
    return answers, metrics


def test_multiple_choice_equals_the_harness_model(ours, theirs, tasks):
    """Loglikelihoods within 1e-3, each `is_greedy`, each metric; an empty context, trailing spaces and repeats too."""
    (mine, my_metrics), (other, metrics) = (
        outcome(evaluated(model, tasks, "local_choice"), "local_choice") for model in (ours, theirs)
    )
    assert my_metrics == metrics
    for row, expected in zip(mine, other, strict=True):
        for ((total, greedy),), ((expected_total, expected_greedy),) in zip(row, expected, strict=True):
            assert total == pytest.approx(expected_total, abs=1e-3)
            assert greedy == expected_greedy


def test_greedy_generation_equals_the_harness_model(ours, theirs, tasks):
    """Texts are cut at the stop strings, and equal."""
    assert outcome(evaluated(ours, tasks, "local_generate"), "local_generate") == outcome(
        evaluated(theirs, tasks, "local_generate"), "local_generate"
    )


def test_a_sampled_evaluation_repeats_exactly(ours, tasks, tiny_model, tiny_tokenizer):
    """In any batch size; another seed gives other texts; equal documents get streams of their own."""
    from hf_llama_sampling.evaluation import LlamaLM

    first = outcome(evaluated(ours, tasks, "local_sampled"), "local_sampled")
    again = LlamaLM(tiny_model, tiny_tokenizer, batch_size=1)
    assert outcome(evaluated(again, tasks, "local_sampled"), "local_sampled") == first
    other = LlamaLM(tiny_model, tiny_tokenizer, batch_size=4, seeds=2)
    assert outcome(evaluated(other, tasks, "local_sampled"), "local_sampled")[0] != first[0]
    assert len(set(ours._seeds([("same", {}), ("same", {}), ("other", {})]))) == 3


def test_a_stop_string_in_a_prompt_stops_nothing(ours):
    """Each completion is what it is alone, however long the prompts beside it are and whatever these hold."""
    contexts = ["ROMEO:", "Speak, the king of all the land and more to the", "The queen: the end"]
    settings = {"until": ["the"], "max_gen_toks": 12, "do_sample": False}
    alone = [ours._complete([context], settings, [1])[0] for context in contexts]
    assert ours._complete(contexts, settings, [1, 2, 3]) == alone
    assert all(len(text) > 1 for text in alone)


def test_the_harness_own_words_for_a_batch_size(tiny_model, tiny_tokenizer):
    """`"auto"` means 8 at most, and fewer where the harness says so."""
    from hf_llama_sampling.evaluation import LlamaLM

    sizes = [("auto", None), ("auto", 3), ("auto", 100), ("5", 3), (None, None)]
    made = [LlamaLM(tiny_model, tiny_tokenizer, batch_size=size, max_batch_size=most) for size, most in sizes]
    assert [model.batch_size for model in made] == [8, 3, 8, 5, 8]


@pytest.mark.parametrize("length", [5, 40, 127, 128, 129, 300])
def test_rolling_and_truncation_equal_the_harness_model(tiny_model, tiny_tokenizer, theirs, length, monkeypatch):
    """Texts around and beyond the longest that is read at once."""
    from lm_eval.api.instance import Instance

    from hf_llama_sampling.evaluation import LlamaLM

    ours = LlamaLM(tiny_model, tiny_tokenizer, max_length=128)
    monkeypatch.setattr(theirs, "_max_length", 128)
    text = ("To be, or not to be, that is the question. " * 40)[: 3 * length]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    asked = [Instance("loglikelihood", {}, (text, " the king"), 0)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    (mine,), (other,) = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]


def test_it_is_found_by_name(tasks):
    """After one import, by folder; the numbers are those of the loaded model."""
    import hf_llama_sampling.evaluation  # noqa: F401

    results = evaluated("hf-llama", tasks, "local_choice", model_args=f"pretrained={TINY},dtype=float32")
    assert results["results"]["local_choice"]["acc,none"] >= 0


def test_a_llama_with_a_sentencepiece_tokenizer(tiny_model, ours):
    """The numbers of a text do not depend on the tokenizer's class."""
    from lm_eval.api.instance import Instance

    from hf_llama_sampling.evaluation import LlamaLM

    plain = LlamaLM(Llama(tiny_model, Tokenizer(TINY / "tokenizer.model")))
    asked = [Instance("loglikelihood", {}, ("ROMEO:", " love"), 0), Instance("loglikelihood", {}, ("", "love"), 0)]
    for mine, expected in zip(plain.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(expected[0], abs=1e-3)
    with pytest.raises(ValueError, match="a chat template comes with a transformers tokenizer"):
        plain.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_bad_values_are_refused_by_name(tiny_model, tiny_tokenizer):
    """Constructor, and settings of a task."""
    from hf_llama_sampling.evaluation import LlamaLM

    with pytest.raises(ValueError, match="comes without its tokenizer: pass tokenizer="):
        LlamaLM(with_llama_generation(tiny_model))
    with pytest.raises(ValueError, match="seeds must be"):
        LlamaLM(tiny_model, tiny_tokenizer, seeds=-1)
    model = LlamaLM(tiny_model, tiny_tokenizer)
    with pytest.raises(ValueError, match="max_gen_toks must leave room"):
        model._complete(["a"], {"max_gen_toks": 512}, [1])
    with pytest.raises(ValueError, match="top_k=5 has no place"):
        model._complete(["a"], {"max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "top_k": 5}, [1])


def test_the_command_prints_the_table(tasks, ours, tmp_path, capfd, monkeypatch):
    """Nothing else, in a pipe; the metrics are those of `simple_evaluate`; results are written as JSON on request."""
    where = ["--include-path", str(tasks.folder), "--output", str(tmp_path / "results.json")]
    monkeypatch.chdir(tmp_path)  # no repository, of which git would complain
    assert main(["lm-eval", "--tasks", "local_choice", "--dtype", "float32", *where]) == 0
    printed = capfd.readouterr()
    assert "local_choice" in printed.out and printed.err == ""
    written = json.loads((tmp_path / "results.json").read_text())["results"]["local_choice"]
    metrics = outcome(evaluated(ours, tasks, "local_choice"), "local_choice")[1]
    assert {name: written[name] for name in metrics} == metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "no_such_task_at_all"], "the harness has no task 'no_such_task_at_all'"),
        (["--tasks", "x", "--include-path", "nowhere"], "include_path must be a folder of task files, and 'nowhere'"),
        (["--tasks", ","], "needs at least one task"),
        (["--tasks", "x", "--limit", "0"], "limit must be above 0"),
        (["--tasks", "x", "--num-fewshot", "-1"], "num_fewshot must be at least 0"),
        (["--tasks", "x", "--seed", "-1"], "seeds must"),
    ],
)
def test_the_command_refuses_by_name(arguments, words, capsys, monkeypatch):
    """Status 2 and one sentence, before a model is loaded."""
    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(["lm-eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


@pytest.mark.weights
def test_a_gguf_model_is_evaluated(weights_file, tasks, capsys):
    """The harness' own class scores no GGUF file."""
    where = ["--model", str(weights_file), "--include-path", str(tasks.folder), "--limit", "2"]
    assert main(["lm-eval", "--tasks", "local_choice", *where]) == 0
    assert "acc_norm" in capsys.readouterr().out
