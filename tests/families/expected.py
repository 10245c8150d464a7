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
    # Past its context a text is scored only with max_seq_len; and where factors change with the length, as one.
    "llama_dynamic": {"scores": "context", "chunks": "context|raise chunk_bytes"},
    **{name: {"chunks": "raise chunk_bytes"} for name in ("llama_longrope", "phi3_longrope", "minimax")},
}
for _name in ("mamba", "mamba2", "falcon_mamba", "xlstm"):
    REFUSED[_name]["attentions"] = "attentions"  # they have none
for _name in ("recurrent_gemma", "xlstm"):
    REFUSED[_name]["padded"] = "padding"  # their states run through it

# What goes wrong, per test and family. Remove an entry together with its bug.
KNOWN: dict[str, dict[str, str]] = {}
