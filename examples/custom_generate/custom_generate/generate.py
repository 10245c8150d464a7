"""LLAMA2's generation for any decoder-only model of transformers, as a custom generation method."""

from hf_llama_sampling import with_llama_generation


def generate(model, **arguments):
    """Generate with LLAMA2's rule: `model.generate(..., custom_generate=FOLDER, trust_remote_code=True)`.

    Takes everything that `LlamaGenerationMixin.generate` takes: `max_gen_len`, `temperature`, `top_p`, `echo`,
    `logprobs`, `seeds`, `schedule`, ... and what transformers' own `generate` takes.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return with_llama_generation(model).generate(**given)
