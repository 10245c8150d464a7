"""What several rooms need: the version, default values, and one sentence. Imports nothing."""

__version__ = "0.1.0"

TEMPERATURE = 0.6
TOP_P = 0.9

# Of an output with `sampling_logprobs`, what stands beside `logprobs`, with one item per token.
SAMPLING_LOGPROBS = ("temperature_logprobs", "sampled_logprobs", "nucleus_mass")

# Batch runs
SEED = 1
BATCH_SIZE = 32  # rows
BATCH_TOKENS = 16_384  # rows x (longest prompt + most new tokens)
WINDOW = 1024  # records


def no_model_class(name: str) -> str:
    """The sentence for the two classes of the reference's ``llama.model``."""
    return (
        f"hf_llama_sampling has no {name}, since its models are those of transformers: Llama.build(ckpt_dir, "
        "tokenizer_path, max_seq_len, max_batch_size) reads the same checkpoints, and its model has the fields of "
        "ModelArgs in .params and Transformer's forward(tokens, start_pos)"
    )
