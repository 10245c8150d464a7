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


@pytest.mark.filterwarnings("ignore")  # the libraries that TRL imports warn on their own account
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_a_training_step_takes_its_rollouts_from_our_generate(tmp_path, tiny_tokenizer, trainer):
    """The trainer's temperature, top_p and limit reach our generate, the loss is finite, and the weights move."""
    import datasets
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.pad_token = tokenizer.eos_token
    model = Heard.from_pretrained(TINY, dtype=torch.float32)
    Heard.heard.clear()
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path),
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
    )
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    training = getattr(trl, f"{trainer}Trainer")(
        model=model,
        reward_funcs=lambda completions, **more: [float(len(set(text))) for text in completions],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["ROMEO:", "The king is"] * 2}),
        processing_class=tokenizer,
    )
    training.train()
    assert Heard.heard
    (kwargs, answer), *_ = Heard.heard
    settings = kwargs["generation_config"]
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.9, 0.8, 8)
    assert answer.shape[1] - kwargs["input_ids"].shape[1] <= 8
    assert torch.isfinite(torch.tensor(training.state.log_history[0]["loss"]))
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
