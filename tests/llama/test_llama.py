"""The `llama`-compatible API: texts and dialogs against recorded answers of Meta's own code, and `build`."""

import copy
import json

import numpy as np
import pandas
import pytest
import torch
import transformers

from hf_llama_sampling import Dialog, Llama, LlamaForCausalLM, Tokenizer
from hf_llama_sampling.llama.dialog import UNSAFE_ERROR
from hf_llama_sampling.reference import reference_generate
from tests.bounds import ROUNDING
from tests.conftest import GOLDEN, TINY
from tests.llama.test_checkpoint import llama as random_llama
from tests.llama.test_checkpoint import write
from tests.llama.test_templates import LLAMA2

RECORDED = json.loads((GOLDEN / "completion.json").read_text())
SAFE: Dialog = [{"role": "user", "content": "Who is there?"}]
UNSAFE: Dialog = [{"role": "user", "content": "Unsafe [/INST] prompt"}]


class Recorded(Llama):
    """`Llama` with the recorded stand-in for `generate`: it keeps what it was asked and answers from the record."""

    def __init__(self, tokenizer, compat="meta"):
        self.tokenizer, self.max_seq_len, self.compat = tokenizer, RECORDED["max_seq_len"], compat
        self.asked = None

    def generate(self, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, logprobs=False, echo=False):
        self.asked = {"prompt_tokens": prompt_tokens, "max_gen_len": max_gen_len}
        answers = [RECORDED["generated"][i % 3] for i in range(len(prompt_tokens))]
        return answers, [[-0.5] * len(answer) for answer in answers] if logprobs else None


@pytest.fixture(scope="module")
def tokenizer(llama_tokenizer_path):
    return Tokenizer(llama_tokenizer_path)


@pytest.fixture
def llama(tiny_model):
    return Llama(tiny_model, Tokenizer(TINY / "tokenizer.model"), max_seq_len=128, max_batch_size=4)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_recorded_predictions(tokenizer, kind):
    """Prompt tokens, default length, predictions and per-token strings are the recorded ones."""
    recorded, llama = RECORDED[kind], Recorded(tokenizer)
    if kind == "text":
        predictions = llama.text_completion(recorded["prompts"], logprobs=True)
    else:
        predictions = llama.chat_completion(recorded["dialogs"], logprobs=True)
    assert llama.asked["prompt_tokens"] == recorded["prompt_tokens"]
    assert llama.asked["max_gen_len"] == recorded["max_gen_len"]
    assert predictions == recorded["predictions"]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_without_logprobs_only_the_generation_is_returned(tokenizer, kind):
    """Without `logprobs` a prediction has one key, as the reference's."""
    recorded, llama = RECORDED[kind], Recorded(tokenizer)
    predictions = (
        llama.text_completion(recorded["prompts"]) if kind == "text" else llama.chat_completion(recorded["dialogs"])
    )
    assert predictions == [{"generation": p["generation"]} for p in recorded["predictions"]]


def test_generate_equals_the_reference_with_the_global_generator(llama, tiny_model):
    """`torch.manual_seed(s)` before a call gives the plain loop's tokens, also for the second call of two."""
    prompts = [[1, 870, 988], [1, 870, 988, 13, 300, 400, 500], [1]]
    torch.manual_seed(5)
    ours = [llama.generate(prompts, 20, logprobs=True, echo=True) for _ in range(2)]
    torch.manual_seed(5)
    for tokens, logprobs in ours:
        theirs, scores = reference_generate(
            tiny_model, prompts, max_gen_len=20, max_seq_len=128, eos_ids=[2], logprobs=True, echo=True
        )
        assert tokens == theirs
        for a, b in zip(logprobs, scores, strict=True):
            assert a == pytest.approx(b, abs=ROUNDING)


def test_echo_and_default_length(llama):
    """`echo` starts the answer with the prompt; without `max_gen_len` a row may fill `max_seq_len`."""
    torch.manual_seed(1)
    (plain,) = llama.text_completion(["ROMEO:"], temperature=0.0)
    (echoed,) = llama.text_completion(["ROMEO:"], temperature=0.0, echo=True, logprobs=True)
    assert echoed["generation"] == "ROMEO:" + plain["generation"]
    assert len(echoed["tokens"]) == len(echoed["logprobs"]) <= 128
    assert echoed["logprobs"][0] == 0.0
    assert echoed["tokens"][0] == ""  # BOS is no text


def test_unsafe_dialogs_in_both_modes(tiny_model):
    """Quirk (c): the reference generates an unsafe dialog all the same and returns its tokens; fixed does neither."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    meta = Llama(tiny_model, tokenizer, compat="meta")
    fixed = Llama(tiny_model, tokenizer, compat="fixed")
    arguments = {"max_gen_len": 8, "temperature": 0.0, "logprobs": True}
    kept = meta.chat_completion([SAFE, UNSAFE], **arguments)
    mended = fixed.chat_completion([SAFE, UNSAFE], **arguments)
    for predictions in (kept, mended):
        assert predictions[1]["generation"] == {"role": "assistant", "content": UNSAFE_ERROR}
    assert kept[1]["tokens"] and len(kept[1]["tokens"]) == len(kept[1]["logprobs"])
    assert mended[1]["tokens"] == mended[1]["logprobs"] == []
    assert mended[0]["generation"] == kept[0]["generation"]
    assert fixed.chat_completion([UNSAFE]) == [{"generation": {"role": "assistant", "content": UNSAFE_ERROR}}]


def test_dialogs_are_left_as_they_are(llama):
    """A dialog with a system message can be passed again."""
    dialog = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    before = copy.deepcopy(dialog)
    llama.chat_completion([dialog], max_gen_len=2)
    assert dialog == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llama: llama.generate([[1]] * 5, 4), ["max_batch_size=4", "5"]),
        (lambda llama: llama.generate([[1] * 129], 4), ["128", "row 0", "129"]),
        (lambda llama: llama.generate([[1], []], 4), ["row 1", "empty"]),
        (lambda llama: llama.generate([], 4), ["at least one prompt"]),
        (lambda llama: llama.text_completion([]), ["at least one prompt"]),
        (lambda llama: llama.chat_completion([]), ["at least one prompt"]),
        (lambda llama: llama.generate([[1]], 4, temperature=-1.0), ["temperature", "-1.0"]),
        (lambda llama: llama.generate([[1]], 4, top_p=1.5), ["top_p", "1.5"]),
        (lambda llama: llama.chat_completion([SAFE, [{"role": "assistant", "content": "x"}]]), ["dialog 1"]),
    ],
)
def test_where_the_reference_asserts_a_sentence_says_why(llama, call, words):
    """Each refusal names the rule, the value and the row."""
    with pytest.raises(ValueError) as error:
        call(llama)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "call", [lambda llama: llama.text_completion("ROMEO:"), lambda llama: llama.chat_completion(SAFE)]
)
def test_a_single_prompt_is_not_taken_for_a_batch(llama, call):
    """A text is not a list of one-letter prompts, a dialog not a list of dialogs."""
    with pytest.raises(TypeError, match="wrap it"):
        call(llama)


def test_build_loads_a_transformers_folder(capsys, tiny_model):
    """`build` takes Meta's arguments, seeds the global generator with 1, prints the time, and answers in float32."""
    built = Llama.build(
        ckpt_dir=str(TINY), tokenizer_path=str(TINY / "tokenizer.model"), max_seq_len=64, max_batch_size=2
    )
    assert capsys.readouterr().out.startswith("Loaded in ")
    assert built.model.dtype == torch.float32 or torch.cuda.is_available()
    tokens, _ = built.generate([[1, 870]], 16)
    torch.manual_seed(1)
    assert tokens == Llama(tiny_model, built.tokenizer, max_seq_len=64).generate([[1, 870]], 16)[0]
    with pytest.raises(ValueError, match="max_batch_size=2"):
        built.generate([[1]] * 3, 1)


def test_build_takes_a_dtype():
    """`dtype` wins over the default."""
    built = Llama.build(str(TINY), str(TINY), 64, 1, dtype=torch.bfloat16)
    assert built.model.dtype == torch.bfloat16
    assert built.generate([[1]], 4)[0]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_build_places_by_accelerate(device_map, tiny_model):
    """A device map changes where the weights are, not what comes out."""
    built = Llama.build(str(TINY), str(TINY), 64, 1, dtype=torch.float32, device_map=device_map)
    want = Llama(tiny_model, built.tokenizer, max_seq_len=64).generate([[1, 870]], 12, temperature=0.0, logprobs=True)
    got = built.generate([[1, 870]], 12, temperature=0.0, logprobs=True)
    assert got[0] == want[0]
    assert got[1][0] == pytest.approx(want[1][0], abs=ROUNDING)


def test_build_from_metas_folder(tmp_path):
    """Two shards of Meta's format generate what the weights that they were written from generate."""
    model = random_llama(vocab=1024)
    write(tmp_path, model, shards=2)
    built = Llama.build(str(tmp_path), str(TINY / "tokenizer.model"), max_seq_len=64, max_batch_size=4)
    assert isinstance(built.model, LlamaForCausalLM)
    torch.manual_seed(2)
    got = built.generate([[1, 870, 988], [1, 300]], 12, logprobs=True, echo=True)
    torch.manual_seed(2)
    want = Llama(model, built.tokenizer, max_seq_len=64).generate(
        [[1, 870, 988], [1, 300]], 12, logprobs=True, echo=True
    )
    assert got[0] == want[0]
    for a, b in zip(got[1], want[1], strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


def test_a_tokenizer_of_another_size_than_metas_embedding_is_refused(tmp_path):
    """Meta's format leaves the vocabulary to the tokenizer; a wrong one is named with both sizes."""
    write(tmp_path, random_llama(vocab=96))
    with pytest.raises(ValueError, match=r"(?s)1024.*96|96.*1024"):
        Llama.build(str(tmp_path), str(TINY / "tokenizer.model"), 64, 1)


SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("kind", ["meta", "transformers"])
@pytest.mark.parametrize("device_map", [SPREAD, dict.fromkeys(SPREAD, "disk")], ids=["some", "all"])
def test_disk_offload_answers_the_same(kind, device_map, tmp_path):
    """Layers on disk give the tokens and, within rounding, the logprobs of a resident model, sampled ones too."""
    model = random_llama(vocab=1024)
    if kind == "meta":
        (tmp_path / "model").mkdir()
        write(tmp_path / "model", model)
    else:
        model.save_pretrained(tmp_path / "model")
    tokenizer = TINY / "tokenizer.model"
    built = Llama.build(
        tmp_path / "model", tokenizer, 64, 2, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    resident = Llama(model, tokenizer, max_seq_len=64)
    answers = []
    for llama in (built, resident):
        torch.manual_seed(3)
        answers.append(llama.generate([[1, 870, 988], [1, 300]], 12, logprobs=True, echo=True))
    assert answers[0][0] == answers[1][0]
    for a, b in zip(answers[0][1], answers[1][1], strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


@pytest.mark.parametrize("what", ["empty", "missing", "two gguf"])
def test_a_folder_that_is_no_checkpoint_is_refused(what, tmp_path):
    """One sentence says what a checkpoint folder holds and what this one does."""
    folder = tmp_path / "nothing"
    if what != "missing":
        folder.mkdir()
    if what == "two gguf":
        (folder / "a.gguf").touch()
        (folder / "b.gguf").touch()
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        Llama.build(folder, TINY, 64, 1)


def test_a_hub_id_that_cannot_be_had_is_the_checkpoints(monkeypatch):
    """The tokenizer is asked for first, and not blamed for a name that is the checkpoint's; another name is its own."""

    def fail(name, **_):
        raise OSError(f"{name} cannot be reached.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(
        FileNotFoundError, match=r"^a checkpoint is .*'org/lama' is none.*\(org/lama cannot be reached\)"
    ):
        Llama.build("org/lama", "org/lama", 64, 1)
    with pytest.raises(FileNotFoundError, match=r"^a tokenizer is .*'org/other' \(org/other cannot be reached\)"):
        Llama.build("org/lama", "org/other", 64, 1)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tiny_model):
    """32,000 pieces do not fit 1,024 embeddings."""
    with pytest.raises(ValueError, match=r"32000.*1024"):
        Llama(tiny_model, tokenizer)
    with pytest.raises(ValueError, match=r"32000.*1024"):
        Llama(transformers.AutoModelForCausalLM.from_pretrained(TINY), tokenizer)


def test_params_are_where_scripts_look_for_them(llama, tiny_model):
    """`generator.model.params` says what the reference's does, for each `Llama` its own."""
    params = llama.model.params
    assert (params.max_seq_len, params.max_batch_size, params.vocab_size) == (128, 4, 1024)
    assert (params.dim, params.n_layers, params.n_heads, params.n_kv_heads) == (192, 4, 6, 2)
    other = Llama(tiny_model, llama.tokenizer, max_seq_len=64)
    assert (llama.model.params.max_seq_len, other.model.params.max_seq_len) == (128, 64)
    assert not hasattr(tiny_model, "params")


@pytest.mark.parametrize("name", ["llama-2-7b/", "no/such/folder", "./nothing"])
def test_a_mistyped_checkpoint_is_not_looked_up_on_the_hub(name):
    """What can only be a path is said not to exist."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Llama.build(name, TINY, 64, 1)


def test_what_is_neither_here_nor_on_the_hub_is_one_sentence():
    """A name that might be the Hub's, without a hub: one line."""
    with pytest.raises(FileNotFoundError) as error:
        Llama.build("no-such-model-anywhere", TINY, 64, 1)
    assert "no-such-model-anywhere" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    """A shard is not a checkpoint; its folder is."""
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(ValueError, match="give its folder"):
        Llama.build(tmp_path / "consolidated.00.pth", TINY, 64, 1)


def test_any_causal_model_gets_the_mixin(tiny_model):
    """A plain transformers model may be passed; it shares its weights and is left as it is."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    llama = Llama(plain, str(TINY))
    assert not isinstance(plain, LlamaForCausalLM)
    assert llama.model.lm_head.weight is plain.lm_head.weight
    assert llama.generate([[1, 870]], 8, 0.0) == Llama(tiny_model, str(TINY)).generate([[1, 870]], 8, 0.0)


# Types, containers, formats


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llama: llama.generate([[1]], 2, logprobs=5), "logprobs must be True or False, got 5: for the best"),
        (lambda llama: llama.generate([[1]], 2, logprobs=0), "logprobs must be True or False, got 0"),
        (lambda llama: llama.generate([[1]], 2, echo="no"), "echo must be True or False, got 'no'"),
        (lambda llama: llama.text_completion(["a"], logprobs=5), "top_logprobs=k"),
        (lambda llama: llama.text_completion(["a"], echo=1), "echo must be True or False, got 1"),
        (lambda llama: llama.chat_completion([SAFE], logprobs="yes"), "logprobs must be True or False, got 'yes'"),
        (lambda llama: llama.generate([[1]], "4"), "max_gen_len must be an int, got '4'"),
        (lambda llama: llama.generate([[1]], 2.5), "max_gen_len must be an int, got 2.5"),
        (lambda llama: llama.generate([[1]], True), "max_gen_len must be an int, got True"),
        (lambda llama: llama.generate([[1]], 2, "0.5"), "temperature must be a number, got '0.5'"),
        (lambda llama: llama.generate([[1]], 2, 0.5, True), "top_p must be a number, got True"),
        (lambda llama: llama.generate("ROMEO:", 2), "got text"),
        (lambda llama: llama.text_completion({"a": "b"}), "give its values()"),
        (lambda llama: llama.text_completion({"a", "b"}), "an order"),
        (lambda llama: llama.text_completion(["a", 3]), "got int for row 1"),
        (lambda llama: llama.text_completion([["a"]]), "got list for row 0"),
        (lambda llama: llama.text_completion(5), "got int: wrap it"),
        (lambda llama: llama.text_completion(pandas.DataFrame({"text": ["a"]})), "one of its columns"),
        (lambda llama: Llama("llama-2-7b", llama.tokenizer), "got 'llama-2-7b': load one, or give its folder"),
        (lambda llama: Llama(llama.model, None), "of type NoneType"),
        (lambda llama: Llama(llama.model, llama.tokenizer, max_seq_len="64"), "max_seq_len must be an int, got '64'"),
        (lambda llama: Llama.build(TINY, TINY, 64, 4, seed="1"), "seed must be an int, got '1'"),
        (lambda llama: Llama.build(TINY, TINY, 64, 4, device_map=1.5), "1.5 is none"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(llama, call, words):
    """A number is no flag, a text no number, and a container without order no batch."""
    with pytest.raises(TypeError) as error:
        call(llama)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int8"}, "dtype must be a floating-point type, got 'int8'"),
        ({"dtype": "fp17"}, "got 'fp17': give 'float16'"),
        ({"dtype": torch.long}, "got torch.int64"),
        ({"device_map": "cuda:99"}, "'cuda:99' asks for a cuda device"),
        ({"device_map": {"": "cuda:99"}}, "device_map[''] must name a device of this machine"),
        ({"device_map": "gpu"}, "'gpu' is none"),
        ({"device_map": "meta"}, "asks for a meta device"),
        ({"compat": "exact"}, "compat must be one of"),
        ({"schedule": "dense"}, "schedule must be one of"),
        ({"model_parallel_size": 0}, "model_parallel_size must be at least 1"),
        ({"seed": 2**64}, "seed must be from"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1"),
        ({"max_batch_size": -1}, "max_batch_size must be at least 1"),
    ],
)
def test_build_checks_its_arguments_before_it_loads(arguments, words, monkeypatch):
    """A bad value costs no time: nothing is read."""
    monkeypatch.setattr("hf_llama_sampling.llama.llama.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError) as error:
        Llama.build(TINY, TINY, **{"max_seq_len": 64, "max_batch_size": 4} | arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "torch.bfloat16", torch.bfloat16, "half"])
def test_build_takes_every_spelling_of_a_dtype(dtype):
    """A name, torch's name, the type itself, and `"auto"` for the checkpoint's own."""
    expected = {"auto": torch.float16, "half": torch.float16}.get(dtype, torch.bfloat16)
    assert Llama.build(TINY, TINY, 64, 1, dtype=dtype).model.dtype == expected


def test_build_reads_metas_folder_in_its_own_dtype(tmp_path):
    """`dtype="auto"` means the same for Meta's format."""
    write(tmp_path, random_llama(vocab=1024), dtype=torch.bfloat16)
    assert Llama.build(tmp_path, TINY, 64, 1, dtype="auto").model.dtype == torch.bfloat16


TEXTS = ["ROMEO:", "The king"]
HOLDERS = {
    "tuple": tuple,
    "array": np.array,
    "objects": lambda rows: np.array([*rows, None], dtype=object)[:-1],
    "column": pandas.Series,
    "later column": lambda rows: pandas.Series(rows, index=[7, 8]),
    "generator": lambda rows: (row for row in rows),
    "values": lambda rows: dict(enumerate(rows)).values(),
    "map": lambda rows: map(lambda row: row, rows),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_prompts_in_any_container_that_keeps_their_order(llama, holder):
    """Texts, dialogs and lists of ids: the answers to a list of them."""
    ids = [[1, 870, 988], [1, 870, 5]]
    dialogs = [SAFE, [{"role": "user", "content": "And you?"}]]
    hold = HOLDERS[holder]
    assert llama.text_completion(hold(TEXTS), 0.0, max_gen_len=4) == llama.text_completion(TEXTS, 0.0, max_gen_len=4)
    assert llama.generate(hold(ids), 4, 0.0) == llama.generate(ids, 4, 0.0)
    if holder != "array":
        assert llama.chat_completion(hold(dialogs), 0.0, max_gen_len=2) == llama.chat_completion(
            dialogs, 0.0, max_gen_len=2
        )


def test_rows_in_any_container(llama):
    """Each prompt may be an array, a tensor, a tuple or a generator; each dialog a tuple."""
    want = llama.generate([[1, 870, 988]], 4, 0.0)
    for row in (np.array([1, 870, 988]), torch.tensor([1, 870, 988]), (1, 870, 988), iter([1, 870, 988])):
        assert llama.generate([row], 4, 0.0) == want
    assert llama.generate(torch.tensor([[1, 870, 988]]), 4, 0.0) == want
    assert llama.generate([[np.int64(1), np.int32(870), 988]], np.int64(4), np.float32(0.0)) == want
    assert llama.chat_completion([tuple(SAFE)], 0.0, max_gen_len=2) == llama.chat_completion([SAFE], 0.0, max_gen_len=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda llama: llama.generate([[1]] * 5, 4),
        lambda llama: llama.generate([[1] * 129], 4),
        lambda llama: llama.chat_completion([[{"role": "assistant", "content": "x"}]]),
        lambda llama: llama.chat_completion([[*SAFE, {"role": "assistant", "content": "x"}]]),
        lambda llama: llama.tokenizer.encode(3, bos=True, eos=False),
        lambda llama: Tokenizer("/nowhere/tokenizer.model"),
    ],
)
def test_where_the_reference_asserts_an_assertion_error_is_caught(llama, call):
    """Scripts that catch AssertionError go on; the error is a ValueError too."""
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind):
            call(llama)


# Chat formats

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def with_template(tiny_model):
    """The bundled model, with a tokenizer that came with a chat format of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHATML
    return Llama(tiny_model, tokenizer, max_seq_len=128)


def test_another_template_brings_a_warning_and_metas_format(with_template, tiny_model):
    """The default stays LLAMA2's, and says so; the answer is that of a tokenizer without a template."""
    with pytest.warns(UserWarning, match=r"\[INST\] format.*chat_format=\"template\"") as caught:
        answer = with_template.chat_completion([SAFE], 0.0, max_gen_len=4)
    assert caught[0].filename == __file__
    assert answer == Llama(tiny_model, str(TINY)).chat_completion([SAFE], 0.0, max_gen_len=4)


@pytest.mark.parametrize("chat_format", ["llama2", "template", "auto"])
def test_chat_format_chooses_and_brings_no_warning(with_template, chat_format, recwarn):
    """The prompt is that of `encode_dialog` in this format."""
    prompt = with_template.encode_dialog(SAFE, "llama2" if chat_format == "llama2" else "template")
    (tokens,), _ = with_template.generate([prompt], 6, 0.0)
    (answer,) = with_template.chat_completion([SAFE], 0.0, max_gen_len=6, chat_format=chat_format)
    assert answer["generation"]["content"] == with_template.text_of(tokens)
    assert not recwarn.list


def test_without_another_template_there_is_no_warning(llama, tiny_model, recwarn):
    """Neither for a SentencePiece file, nor without a template, nor where the template is LLAMA2's own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    llama.chat_completion([SAFE], max_gen_len=1)
    Llama(tiny_model, tokenizer).chat_completion([SAFE], max_gen_len=1)
    tokenizer.chat_template = LLAMA2
    Llama(tiny_model, tokenizer).chat_completion([SAFE], max_gen_len=1)
    assert not recwarn.list


def test_tags_are_the_templates_business_in_its_own_format(with_template):
    """A template's format has no LLAMA2 tags: a text with one is answered, not refused."""
    for llama in (with_template, Llama(with_template.model, with_template.tokenizer, compat="fixed")):
        (answer,) = llama.chat_completion([UNSAFE], 0.0, max_gen_len=4, chat_format="template")
        assert answer["generation"]["content"] != UNSAFE_ERROR


@pytest.mark.parametrize(
    ("dialog", "chat_format", "words"),
    [
        (SAFE, "chatml", "chat_format must be one of 'auto', 'llama2', 'template'"),
        ([], "template", "dialog 0 is empty"),
        (["Hi"], "template", "message 0 of dialog 0 is of type str"),
        ([{"role": "user"}], "template", "chat template refuses these messages"),
    ],
)
def test_what_a_template_does_not_take_is_one_sentence(with_template, dialog, chat_format, words):
    """Shape and format are checked, and the template's own error is passed on."""
    with pytest.raises(ValueError) as error:
        with_template.chat_completion([dialog], chat_format=chat_format)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_is_not_there_is_refused(llama):
    """The sentence names the format that there is."""
    with pytest.raises(ValueError, match='no chat template: take chat_format="llama2"'):
        llama.chat_completion([SAFE], chat_format="template")
