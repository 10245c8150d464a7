"""Compiled forwards with static caches: as transformers compiles them itself, and as callers do.

The backends here trace, check shapes and guards, and generate no code; `make test-neighbours` runs the default one.
"""

import copy

import pytest
import torch
from transformers import CompileConfig

from hf_llama_sampling import with_llama_generation
from tests.conftest import compiles_forwards
from tests.generation.helpers import RAGGED, close

pytestmark = [pytest.mark.slow, compiles_forwards]

ASKED = {"max_gen_len": 5, "seeds": 1, "cache_implementation": "static"}
MORE = [{}, {"echo": True, "logprobs": True}]


def compiling(backend):
    """What transformers is told, so that it compiles on the CPU too; on GPUs static caches are enough for it."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.fixture
def counted():
    """A backend that counts graphs, and the count."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("schedule", [pytest.param("reference", marks=pytest.mark.neighbours), pytest.param("padded")])
def test_transformers_compiles_our_steps(tiny_model, counted, schedule):
    """In one graph without a break, once: a second call with other prompts compiles nothing more."""
    backend, graphs = counted
    for more in MORE:
        plain = tiny_model.generate(RAGGED, schedule=schedule, **ASKED, **more)
        ours = tiny_model.generate(RAGGED, schedule=schedule, compile_config=compiling(backend), **ASKED, **more)
        assert ours.tokens == plain.tokens
        if more:
            close(ours.logprobs, plain.logprobs)
    made = len(graphs)
    assert made
    tiny_model.generate(RAGGED[::-1], schedule=schedule, compile_config=compiling(backend), **ASKED)
    assert len(graphs) == made


@pytest.mark.neighbours
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.compile looks at each attribute of a model
@pytest.mark.parametrize("order", ["compiled first", "ours first", "forward alone"])
def test_callers_compile_the_model(tiny_model, order):
    """`torch.compile(model)` before ours, after it, and `model.forward = torch.compile(model.forward)`."""
    expected = tiny_model.generate(RAGGED, **ASKED).tokens
    model = copy.deepcopy(tiny_model)
    if order == "compiled first":
        model = with_llama_generation(torch.compile(model, backend="eager"))
    elif order == "ours first":
        model = torch.compile(with_llama_generation(model), backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    assert model.generate(RAGGED, **ASKED).tokens == expected
    torch._dynamo.reset()


@pytest.mark.neighbours
@pytest.mark.launches
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_code_is_generated_and_runs(tiny_model):
    """torch's own code generator, in float32: the same tokens up to the rounding of the logits."""
    torch._dynamo.reset()
    plain = tiny_model.generate(RAGGED, temperature=0, max_gen_len=5, cache_implementation="static")
    config = compiling("inductor")
    made = tiny_model.generate(
        RAGGED, temperature=0, max_gen_len=5, cache_implementation="static", compile_config=config
    )
    assert made.tokens == plain.tokens
