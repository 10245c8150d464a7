"""Prompts, comparisons and planted faults that the tests of `generation` share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_llama_sampling.generation.releases import CACHE_NAME
from hf_llama_sampling.reference import reference_generate
from hf_llama_sampling.sampling import fast_path
from tests.bounds import ROUNDING

BOS, EOS, OFTEN = 1, 2, 989  # 989 is a token that the bundled model likes
SHORT, LONG = [BOS, 5, 6], [BOS, 7, 8, 9, 10, 11, 12]
RAGGED = [SHORT, LONG, [BOS, 40]]


def padded(prompts, side, pad=0):
    """Ids and mask of a batch, padded on one side."""
    longest = max(map(len, prompts))

    def row(filler, items):
        gap = [filler] * (longest - len(items))
        return gap + items if side == "left" else items + gap

    mask = [row(0, [1] * len(prompt)) for prompt in prompts]
    return {
        "inputs": torch.tensor([row(pad, list(p)) for p in prompts]),
        "attention_mask": torch.tensor(mask),
    }


def close(ours, theirs, within=ROUNDING):
    """Rows of logprobs that agree, by default within the bundled model's float32 rounding."""
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    assert all(
        abs(a - b) <= within for mine, yours in zip(ours, theirs, strict=True) for a, b in zip(mine, yours, strict=True)
    )


@torch.no_grad()
def plain_logprobs(model, tokens):
    """(T, V): log_softmax of one row's logits, each row under the token that it predicts; zeros for the first."""
    logits = model(torch.tensor([tokens])).logits[0].float()
    return torch.cat([torch.zeros(1, logits.shape[1]), torch.log_softmax(logits, dim=-1)[:-1]])


def at(logprobs, tokens):
    """The given tokens' entries."""
    return [float(logprobs[position, token]) for position, token in enumerate(tokens)]


def random_case(draw, vocab, *, most_rows=6, longest=12, most_new=8):
    """A ragged batch and settings for it."""
    rows = draw.randint(1, most_rows)
    prompts = [[draw.randrange(vocab) for _ in range(draw.randint(1, longest))] for _ in range(rows)]
    length = max(map(len, prompts))
    settings = {
        "max_gen_len": draw.randint(0, most_new),
        "max_seq_len": draw.choice([512, 512, length + draw.randint(0, most_new)]),
        "temperature": draw.choice([0.0, 0.3, 0.6, 1.0, 1.0, 1.7]),
        "top_p": draw.choice([0.0, 0.5, 0.9, 0.9, 0.99, 1.0]),
        "echo": draw.random() < 0.5,
        "logprobs": draw.random() < 0.5,
    }
    return prompts, settings, draw.choice([[EOS], [EOS, OFTEN], list(range(0, vocab, 7))])


def blocks_drawn(seed, shape, state, most):
    """How many (B, V) draws lead from the seed to a state."""
    generator = torch.Generator().manual_seed(seed)
    for count in range(most + 1):
        if torch.equal(generator.get_state(), state):
            return count
        torch.empty(shape).exponential_(generator=generator)
    raise AssertionError("the state is none of the reference's")


def check_against_the_reference(model, prompts, settings, eos, seed):
    """Dense and padded give the reference's answer; the generator ends where the docstring says."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    tokens, logprobs = reference_generate(model, prompts, eos_ids=eos, generator=generator, **settings)
    for schedule in ("reference", "padded"):
        ours = torch.Generator().manual_seed(seed)
        out = model.generate(prompts, generator=ours, eos_token_id=eos, compat="meta", schedule=schedule, **settings)
        assert out.tokens == tokens, schedule
        if settings["logprobs"]:
            close(out.logprobs, logprobs)
        if not torch.equal(ours.get_state(), generator.get_state()):
            # Allowed in padded alone, where the reference met an EOS beyond the limit of a row that ran into it.
            assert schedule == "padded"
            lengths = [len(prompt) for prompt in prompts]
            steps = min(settings["max_seq_len"], max(lengths) + settings["max_gen_len"]) - min(lengths)
            assert blocks_drawn(seed, (len(prompts), vocab), generator.get_state(), steps) < steps
            assert blocks_drawn(seed, (len(prompts), vocab), ours.get_state(), steps) == steps
            assert "length" in out.finish_reason


class Collect:
    """A streamer for any batch."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "max_position_embeddings": 48}


GROUPED = {**SMALL, **LAYERS, "num_key_value_heads": 1, "intermediate_size": 32}


class Plant:
    """Put a value into a model's logits: in row `row`, where the text's last token stands in column `column`."""

    def __init__(self, model, row, column, value):
        self.row, self.column, self.value, self.seen = row, column, value, 0
        self.handle = model.lm_head.register_forward_hook(self)
        self.counter = model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        past = kwargs.get(CACHE_NAME)
        self.start = past.get_seq_length() if past is not None else 0
        self.end = self.start + ids.shape[1]

    def __call__(self, module, args, logits):
        first = self.end - logits.shape[1]  # generate asks for the last position's logits only
        if first <= self.column < self.end:
            logits = logits.clone()
            logits[self.row, self.column - first, 17] = self.value
        return logits

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.handle.remove()
        self.counter.remove()


STREAMS = {
    "meta": {},
    "seeds": {"seeds": 1},
    "greedy": {"temperature": 0},
    "mixed": {"temperature": [0, 0.5, 1], "seeds": 1},
}


class Count(TorchDispatchMode):
    """How often each operation is dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def computed(self):
        """Operations that do something: not views, not allocations."""
        views = {
            "view",
            "_unsafe_view",
            "slice",
            "select",
            "unsqueeze",
            "squeeze",
            "expand",
            "detach",
            "alias",
            "t",
            "transpose",
            "unbind",
        }
        return sum(count for name, count in self.counts.items() if name not in views | {"empty", "lift_fresh"})


def as_on_another_device(monkeypatch):
    """Take the path of devices other than the CPU: nothing is read on the host, and NumPy has no part in it."""
    monkeypatch.setattr(fast_path, "on_cpu", lambda values: False)
