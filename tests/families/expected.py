"""What the families kit expects beside a right answer: refusals, and known failures."""

RECURRENT = """bailing_hybrid
bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm3 mamba mamba2 nemotron_h
olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba2""".split()  # noqa: SIM905

# What a family is refused, and part of the sentence. Everything else must be right.
REFUSED: dict[str, dict[str, str]] = {
    # Their states go on by one token, not by a chunk; GPT's forward returns nothing to go on with.
    **{name: {"chunks": "raise chunk_bytes"} for name in [*RECURRENT, "openai-gpt"]},
    # Their positions count padding.
    **{
        name: {"padded": "padding"}
        for name in ("bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper")
    },
    # Their caches hold more than keys and values: indices, compressed columns, convolutions.
    **{name: {"chunks": "raise chunk_bytes"} for name in ("deepseek_v32", "deepseek_v4", "inkling2_text")},
    # Its cache forgets what its masks still show.
    "moshi": {"chunks": "raise chunk_bytes"},
    # Each token sees what follows it, or is made from a mask in its place: a forward's logits are no next token's.
    "xlnet": dict.fromkeys(["echo", "scores", "chunks"], "XLNet"),
    "xlm": dict.fromkeys(["echo", "scores", "chunks"], "XLM"),
    "prophetnet": dict.fromkeys(["echo", "scores", "chunks"], "ProphetNet"),
    "bert_not_causal": dict.fromkeys(["echo", "scores", "chunks"], "Bert"),
    # Past its context a text is scored only with max_seq_len; and where factors change with the length, as one.
    "llama_dynamic": {"scores": "context", "chunks": "context|raise chunk_bytes"},
    **{name: {"chunks": "raise chunk_bytes"} for name in ("llama_longrope", "phi3_longrope", "minimax")},
}
for _name in ("mamba", "mamba2", "falcon_mamba", "xlstm"):
    REFUSED[_name]["attentions"] = "attentions"  # they have none
for _name in ("recurrent_gemma", "xlstm"):
    REFUSED[_name]["padded"] = "padding"  # their states run through it

# Refused in every call: they count positions from their pad id on, and transformers' loop tells them others.
REFUSED_AT_ALL = ("roberta", "data2vec-text")

# What goes wrong, per test and family. Remove an entry together with its bug.
KNOWN: dict[str, dict[str, str]] = {}
