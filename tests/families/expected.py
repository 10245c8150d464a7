"""What the families kit expects beside a right answer: refusals, and known failures."""

RECURRENT = """bailing_hybrid
bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 mamba mamba2 nemotron_h
olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba2""".split()  # noqa: SIM905

# What a family is refused, and part of the sentence. Everything else must be right.
REFUSED: dict[str, dict[str, str]] = {
    # Their states go on by one token, not by a chunk; GPT's forward returns nothing to go on with.
    **{name: {"chunks": "raise chunk_bytes"} for name in [*RECURRENT, "openai-gpt"]},
    "bart": {"padded": "padding"},  # its positions count it
    # Each token sees what follows it, or is made from a mask in its place: a forward's logits are no next token's.
    "xlnet": dict.fromkeys(["echo", "scores", "chunks"], "XLNet"),
    "xlm": dict.fromkeys(["echo", "scores", "chunks"], "XLM"),
    "bert_not_causal": dict.fromkeys(["echo", "scores", "chunks"], "Bert"),
    # Within its context nothing scales; past it a batch cannot be padded and a text cannot be scored.
    "llama_dynamic": dict.fromkeys(["padded", "scores", "chunks"], "context"),
}
for _name in ("mamba", "mamba2", "falcon_mamba", "xlstm"):
    REFUSED[_name]["attentions"] = "attentions"  # they have none
for _name in ("recurrent_gemma", "xlstm"):
    REFUSED[_name]["padded"] = "padding"  # their states run through it

# What goes wrong, per test and family. Remove an entry together with its bug.
KNOWN: dict[str, dict[str, str]] = {
    "a_row_is_what_it_is_alone": {
        "llama_longrope": "rotary factors depend on the longest row",
        "phi3_longrope": "rotary factors depend on the longest row; its cache is dropped where they change",
        "rwkv": "its state mixes the rows of a batch while it decodes",
        "recurrent_gemma": "its recurrence reads padding",
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bart": "its positions count padding as text",
        "bert_not_causal": "it is bidirectional; its scores are no next-token logprobs",
        "xlstm": "its state reads padding",
    },
    "a_batch_of_one_length": {
        "rwkv": "its state mixes the rows of a batch while it decodes",
    },
    "copies_and_limits_per_row": {
        "llama_longrope": "rotary factors depend on the longest row",
        "phi3_longrope": "rotary factors depend on the longest row; its cache is dropped where they change",
        "rwkv": "its state mixes the rows of a batch while it decodes",
        "recurrent_gemma": "its recurrence reads padding",
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bart": "its positions count padding as text",
        "bert_not_causal": "it is bidirectional; its scores are no next-token logprobs",
        "xlstm": "its state reads padding",
    },
    "scores_are_those_of_a_forward": {
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bert_not_causal": "it is bidirectional; its scores are no next-token logprobs",
        "xlm": "generate appends a mask token that a forward does not see",
        "chameleon": "a row of finfo.min logits has no finite sum",
    },
    "logprobs_are_those_of_the_models_own_run": {
        "llama_dynamic": "rotary factors depend on the longest row",
        "llama_longrope": "rotary factors depend on the longest row",
        "phi3_longrope": "rotary factors depend on the longest row; its cache is dropped where they change",
        "rwkv": "its state mixes the rows of a batch while it decodes",
        "recurrent_gemma": "its recurrence reads padding",
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bart": "its positions count padding as text",
        "bert_not_causal": "it is bidirectional; its scores are no next-token logprobs",
        "xlm": "generate appends a mask token that a forward does not see",
        "xlstm": "its state reads padding",
        "chameleon": "a row of finfo.min logits has no finite sum",
    },
    "chunks_score_as_a_whole": {
        "llama_longrope": "rotary factors depend on the longest row",
        "phi3_longrope": "rotary factors depend on the longest row; its cache is dropped where they change",
        "minimax": "its linear attention does not go on after a masked chunk",
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "chameleon": "a row of finfo.min logits has no finite sum",
    },
    "chunks_generate_as_a_whole": {
        "llama_dynamic": "rotary factors depend on the longest row",
        "llama_longrope": "rotary factors depend on the longest row",
        "phi3_longrope": "rotary factors depend on the longest row; its cache is dropped where they change",
        "minimax": "its linear attention does not go on after a masked chunk",
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bart": "its positions count padding as text",
        "chameleon": "a row of finfo.min logits has no finite sum",
    },
    "a_call_leaves_no_state": {
        "xlnet": "its forward sees the token it predicts; its context is -1",
        "bert_not_causal": "it is bidirectional; its scores are no next-token logprobs",
        "xlm": "generate appends a mask token that a forward does not see",
        "qwen2_vl": "its rope_deltas stay on the model from call to call",
        "chameleon": "a row of finfo.min logits has no finite sum",
    },
    "asking_for_more_changes_no_token": {
        "falcon_mamba": "AttributeError for attentions, which it has not",
        "mamba": "AttributeError for attentions, which it has not",
        "mamba2": "AttributeError for attentions, which it has not",
        "xlstm": "AttributeError for attentions, which it has not",
    },
    "extras_do_not_depend_on_echo": {
        "llama": "with echo, attentions and hidden states of the prefill cover one column",
        "gpt2": "with echo, attentions and hidden states of the prefill cover one column",
        "gemma2": "with echo, attentions and hidden states of the prefill cover one column",
        "bamba": "with echo, attentions and hidden states of the prefill cover one column",
        "qwen2_vl": "with echo, attentions and hidden states of the prefill cover one column",
        "chameleon": "with echo, attentions and hidden states of the prefill cover one column",
    },
}
