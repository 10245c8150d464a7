"""`LlamaLM` in lm-evaluation-harness against the harness' own model class, on tasks from local files."""

import copy
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

    sizes = [("auto", None), ("auto", 3), ("auto", 100), ("auto:4", 3), ("5", 3), (None, None)]
    made = [LlamaLM(tiny_model, tiny_tokenizer, batch_size=size, max_batch_size=most) for size, most in sizes]
    assert [model.batch_size for model in made] == [8, 3, 8, 3, 5, 8]
    with pytest.raises(TypeError, match="batch_size must be an int, got 'many'"):
        LlamaLM(tiny_model, tiny_tokenizer, batch_size="many")


def test_every_eos_of_the_checkpoint_ends_a_text(tiny_model, tiny_tokenizer):
    """As in the harness: a chat model's end of a turn is often another token than its tokenizer's EOS."""
    from hf_llama_sampling.evaluation import LlamaLM

    settings = {"until": None, "max_gen_toks": 6}
    (whole,) = LlamaLM(tiny_model, tiny_tokenizer)._complete(["ROMEO:"], settings, [1])
    model = copy.deepcopy(tiny_model)
    model.generation_config.eos_token_id = [2, tiny_tokenizer.convert_tokens_to_ids("f")]
    (text,) = LlamaLM(model, tiny_tokenizer)._complete(["ROMEO:"], settings, [1])
    assert text == whole[: whole.index("f")] and len(whole) > len(text) > 0


def test_a_task_may_end_texts_at_a_control_token(tiny_model, control_f):
    """As many do: `<|im_end|>` in `until` is met, though no decoded text shows it."""
    from hf_llama_sampling.evaluation import LlamaLM

    model = LlamaLM(tiny_model, control_f)
    assert model._complete(["ROMEO:"], {"until": ["f"], "max_gen_toks": 6}, [1]) == ["\nI"]
    assert model._complete(["ROMEO:"], {"until": ["f have"], "max_gen_toks": 4}, [1]) == ["\nI I"]


def test_tokenizers_without_bos_or_eos(tiny_model, tiny_tokenizer):
    """They are evaluated; what needs a token before a text says so, and takes another."""
    from lm_eval.api.instance import Instance

    from hf_llama_sampling.evaluation import LlamaLM

    bare = copy.deepcopy(tiny_tokenizer)
    bare.bos_token = bare.eos_token = None
    model = LlamaLM(tiny_model, bare)
    settings, ids = {"until": ["zz"], "max_gen_toks": 4}, tiny_tokenizer("ROMEO:").input_ids
    expected = tiny_model.generate([ids], max_gen_len=4, temperature=0, eos_token_id=2).tokens[0]
    assert model._complete(["ROMEO:"], settings, [1]) == [tiny_tokenizer.decode(expected, skip_special_tokens=True)]
    asked = [Instance("loglikelihood", {}, ("", " love"), 0)]
    with pytest.raises(ValueError, match="this tokenizer has neither: give prefix_token_id"):
        model.loglikelihood(asked)
    with_bos = LlamaLM(tiny_model, tiny_tokenizer).loglikelihood(asked)[0][0]
    assert LlamaLM(tiny_model, bare, prefix_token_id=1).loglikelihood(asked)[0][0] == pytest.approx(with_bos, abs=1e-3)


def test_a_greedy_task_may_name_settings_of_sampling(ours):
    """They play no part in it, as in the harness; null counts as not given."""
    settings = {"until": ["zz"], "max_gen_toks": 6, "do_sample": False}
    asked = settings | {"top_k": 1, "min_p": 0.5, "top_p": None, "temperature": None}
    assert ours._complete(["ROMEO:"], asked, [1]) == ours._complete(["ROMEO:"], settings, [1])


def test_a_continuation_within_the_contexts_last_token_is_scored(ours, tiny_tokenizer):
    """The harness stops there with an assertion; here it is scored as it is spelled alone."""
    from lm_eval.api.instance import Instance

    before = tiny_tokenizer("The kin").input_ids
    after = tiny_tokenizer("g is", add_special_tokens=False).input_ids
    assert len(tiny_tokenizer("The king is").input_ids) <= len(before)
    (answer,) = ours.loglikelihood([Instance("loglikelihood", {}, ("The kin", "g is"), 0)])
    scores = ours.model.score_tokens([[*before, *after]], start=len(before)).logprobs[0]
    assert answer[0] == pytest.approx(sum(scores), abs=1e-3)


def test_texts_that_are_cut_are_said(tiny_model, tiny_tokenizer, caplog):
    """Contexts of both kinds of task are cut from the left, as in the harness, and a warning says so."""
    from lm_eval.api.instance import Instance

    from hf_llama_sampling.evaluation import LlamaLM

    model = LlamaLM(tiny_model, tiny_tokenizer, max_length=16)
    model.loglikelihood([Instance("loglikelihood", {}, ("love and night " * 9, " love"), 0)])
    model._complete(["love and night " * 9, "I"], {"max_gen_toks": 2}, [1, 2])
    found = [record.getMessage() for record in caplog.records if record.name.startswith("hf_llama_sampling")]
    assert [words.partition(" have")[0] for words in found] == ["1 of 1 texts", "1 of 2 texts"]
    with pytest.raises(ValueError, match="1 to max_length=16 tokens, but that of request 0 has"):
        model.loglikelihood([Instance("loglikelihood", {}, ("I", " love and night" * 9), 0)])


def test_a_template_that_refuses_a_system_message(tiny_model, tiny_tokenizer, caplog):
    """The conversation goes on without it, as in the harness, and a warning says so; other refusals are errors."""
    from hf_llama_sampling.evaluation import LlamaLM

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "{% if m.content == 'no' %}{{ raise_exception('Never') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    model = LlamaLM(tiny_model, tokenizer)
    system, user = ({"role": role, "content": role} for role in ("system", "user"))
    assert model.apply_chat_template([system, user]) == model.apply_chat_template([user]) == "[user]"
    assert [record.getMessage() for record in caplog.records if "No system role" in record.getMessage()]
    for messages in ([{"role": "user", "content": "no"}], [system, {"role": "user", "content": "no"}]):
        with pytest.raises(ValueError, match=r"chat template refuses these messages \(Never\)"):
            model.apply_chat_template(messages)


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
    bare = LlamaLM(tiny_model, tiny_tokenizer, max_length=128, add_bos_token=False, prefix_token_id=2)
    monkeypatch.setattr(theirs, "add_bos_token", False)
    monkeypatch.setattr(theirs, "custom_prefix_token_id", 2)
    assert bare.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
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
    with pytest.raises(ValueError, match="prefix_token_id must be from 0 to 1023, got 1024"):
        LlamaLM(tiny_model, tiny_tokenizer, prefix_token_id=1024)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        LlamaLM(tiny_model, tiny_tokenizer, max_length=0)
    with pytest.raises(TypeError, match="add_bos_token must be True or False, got 'no'"):
        LlamaLM(tiny_model, tiny_tokenizer, add_bos_token="no")
    with pytest.raises(ValueError, match="code that comes with a checkpoint is never run here"):
        LlamaLM(tiny_model, tiny_tokenizer, trust_remote_code=True)
    with pytest.raises(TypeError, match="takes no model argument 'load_in_8bit'"):
        LlamaLM(tiny_model, tiny_tokenizer, trust_remote_code=False, load_in_8bit=True)
    model = LlamaLM(tiny_model, tiny_tokenizer, max_gen_toks=512)
    with pytest.raises(ValueError, match="max_gen_toks must leave room"):
        model._complete(["a"], {}, [1])
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


def test_the_command_hands_on_what_the_harness_takes(ours, tasks, monkeypatch, capsys):
    """Settings of generation, a system message and turns."""
    from hf_llama_sampling.evaluation import report

    def asked(*options):
        assert main(["lm-eval", "--tasks", "local_generate", *options]) == 0
        capsys.readouterr()
        return found.pop()

    found = []
    monkeypatch.setattr(report, "find_tasks", lambda names, path: tasks)
    monkeypatch.setattr("hf_llama_sampling.cli._load", lambda arguments: ours.llama)
    monkeypatch.setattr(report, "evaluate", lambda *given, **options: found.append(options) or ("", "{}"))
    chat = asked("--apply-chat-template", "--fewshot-as-multiturn", "--system-instruction", "Be brief.")
    assert chat["apply_chat_template"] and chat["fewshot_as_multiturn"] and chat["system_instruction"] == "Be brief."
    plain = asked()
    assert not plain["fewshot_as_multiturn"] and plain["system_instruction"] is plain["gen_kwargs"] is None
    settings = "max_gen_toks=2,do_sample=False,temperature=0"
    assert asked("--gen-kwargs", settings)["gen_kwargs"] == settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "no_such_task_at_all"], "the harness has no task 'no_such_task_at_all'"),
        (["--tasks", "x", "--include-path", "nowhere"], "include_path must be a folder of task files, and 'nowhere'"),
        (["--tasks", ","], "needs at least one task"),
        (["--tasks", "x", "--limit", "0"], "limit must be above 0"),
        (["--tasks", "x", "--num-fewshot", "-1"], "num_fewshot must be at least 0"),
        (["--tasks", "x", "--seed", "-1"], "seeds must"),
        (["--tasks", "x", "--fewshot-as-multiturn"], "add --apply-chat-template"),
        (["--tasks", "x", "--gen-kwargs", "do_sample=True,top_p"], "gen_kwargs must be NAME=VALUE"),
    ],
)
def test_the_command_refuses_by_name(arguments, words, capsys, monkeypatch):
    """Status 2 and one sentence, before a model is loaded."""
    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    assert main(["lm-eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


@pytest.mark.weights
def test_a_gguf_model_is_evaluated(weights_file, weights, weights_tokenizer, tasks, capsys, monkeypatch):
    """The harness' own class scores no GGUF file; here `Llama.build` gets it, and has loaded it before."""

    def build(ckpt_dir, tokenizer_path, *others, **options):
        assert ckpt_dir == tokenizer_path == str(weights_file)
        return Llama(weights, weights_tokenizer)

    monkeypatch.setattr(Llama, "build", build)
    where = ["--model", str(weights_file), "--include-path", str(tasks.folder), "--limit", "2"]
    assert main(["lm-eval", "--tasks", "local_choice", *where]) == 0
    assert "acc_norm" in capsys.readouterr().out
