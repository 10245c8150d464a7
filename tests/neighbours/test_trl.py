"""TRL's trainers with our model: rollouts come from our generate, and a step of training changes the weights."""

from typing import ClassVar

import pytest
import torch

from hf_llama_sampling import LlamaForCausalLM
from tests.conftest import TINY

pytestmark = [pytest.mark.neighbours, pytest.mark.launches]


class Heard(LlamaForCausalLM):
    """Notes what generate is called with, and what it answers."""

    heard: ClassVar[list] = []

    def generate(self, *args, **kwargs):
        answer = super().generate(*args, **kwargs)
        self.heard.append((kwargs, answer))
        return answer


CONTINUOUS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"max_memory_percent": 0.03},
}


def trainer_of(trl, name, model, folder, **more):
    """A trainer of one step: four rollouts of at most 8 tokens."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.pad_token = tokenizer.eos_token
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        temperature=0.9,
        top_p=0.8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **more,
    )
    return getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=lambda completions, **more: [float(len(set(text))) for text in completions],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["ROMEO:", "The king is"] * 2}),
        processing_class=tokenizer,
    )


@pytest.mark.filterwarnings("ignore")  # the libraries that TRL imports warn on their own account
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_rollouts_by_continuous_batching(tmp_path, trainer):
    """The trainer's config, whose idle options it spells out, is taken; rollouts end at EOS or the limit."""
    import trl

    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    seen, plain = [], model.generate_batch

    def generate_batch(*args, **kwargs):
        seen.append(plain(*args, **kwargs))
        return seen[-1]

    model.generate_batch = generate_batch
    training = trainer_of(trl, trainer, model, tmp_path, **CONTINUOUS)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    training.train()
    rows = [result.generated_tokens for out in seen for result in out.values()]
    assert len(rows) == 4 and all(len(row) == 8 or row[-1] == 2 for row in rows)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.filterwarnings("ignore")  # the libraries that TRL imports warn on their own account
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_a_training_step_takes_its_rollouts_from_our_generate(tmp_path, trainer):
    """The trainer's temperature, top_p and limit reach our generate, the loss is finite, and the weights move."""
    import trl

    model = Heard.from_pretrained(TINY, dtype=torch.float32)
    Heard.heard.clear()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    training = trainer_of(trl, trainer, model, tmp_path)
    training.train()
    assert Heard.heard
    (kwargs, answer), *_ = Heard.heard
    settings = kwargs["generation_config"]
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.9, 0.8, 8)
    assert answer.shape[1] - kwargs["input_ids"].shape[1] <= 8
    assert torch.isfinite(torch.tensor(training.state.log_history[0]["loss"]))
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
