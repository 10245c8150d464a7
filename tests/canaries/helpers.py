"""A plain model's greedy calls, and what is seen of them."""

import copy
from dataclasses import fields

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import GenerateDecoderOnlyOutput

IDS = torch.tensor([[1, 5, 6]])


def padded_ids(pads):
    """`IDS` behind padding, and the mask."""
    ids = torch.cat([torch.full((1, pads), 9), IDS], 1)
    return ids, torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(IDS)], 1)


def greedy(model, ids=IDS, *, steps=3, attention_mask=None, **keywords):
    """transformers' own greedy search as this package calls it, on a copy with a fresh config."""
    options = {name: keywords.pop(name) for name in list(keywords) if hasattr(GenerationConfig(), name)}
    view = copy.copy(model)
    view.generation_config = GenerationConfig()
    config = GenerationConfig(do_sample=False, max_new_tokens=steps, return_dict_in_generate=True, **options)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return view.generate(ids, attention_mask=mask, generation_config=config, **keywords)


class Always(LogitsProcessor):
    """One token, as a one-hot row; notes the dtypes of the scores it gets."""

    def __init__(self, token):
        self.token, self.dtypes = token, set()

    def __call__(self, input_ids, scores):
        self.dtypes.add(scores.dtype)
        only = torch.full_like(scores, -torch.inf)
        only[:, self.token] = 0
        return only


class Recorder:
    """Notes what a model's class is called with."""

    @staticmethod
    def of(model):
        """A copy of the model whose class notes each call."""

        def call(self, *args, **kwargs):
            self.__dict__["calls"].append({"args": args, **kwargs})
            return super(noting, self).__call__(*args, **kwargs)

        noting = type(type(model).__name__, (type(model),), {"__call__": call, "__module__": type(model).__module__})
        view = copy.copy(model)
        view.__class__ = noting
        view.__dict__["calls"] = []
        return view

    @staticmethod
    def cache_name():
        """The name of the cache in this release's outputs."""
        names = {field.name for field in fields(GenerateDecoderOnlyOutput)}
        return "cache" if "cache" in names else "past_key_values"
