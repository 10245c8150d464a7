"""Models spread over processes, or offloaded to disk, generate what a resident one does."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from hf_llama_sampling import Llama
from tests.bounds import ROUNDING
from tests.conftest import HERE, TINY
from tests.generation import tensor_parallel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes answers, with generators seeded differently."""
    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:
        pytest.skip("transformers spreads a model by a function of torch's that this torch has not")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(HERE / "generation" / "tensor_parallel.py"), str(folder)]
    path = os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])  # the packages that this process has
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_the_model_is_spread(ranks):
    """Each process holds half of a layer's weight."""
    assert [rank["part of a weight"] for rank in ranks] == [0.5, 0.5]


@pytest.mark.parametrize("case", tensor_parallel.CASES)
def test_every_rank_ends_with_the_same_tokens(ranks, case, tiny_model):
    """On both contracts, and where rows end by EOS: equal tokens, and those of one process with rank 0's generator."""
    first, second = (rank[case] for rank in ranks)
    assert first["tokens"] == second["tokens"]
    resident = tensor_parallel.answers(tiny_model, 0, {case: tensor_parallel.CASES[case]})[case]
    assert first["tokens"] == resident["tokens"]
    if resident["logprobs"] is not None:
        for one, other, alone in zip(first["logprobs"], second["logprobs"], resident["logprobs"], strict=True):
            assert one == pytest.approx(other, abs=ROUNDING) and one == pytest.approx(alone, abs=ROUNDING)


def test_without_agreement_ranks_part(ranks):
    """The case can tell: where every rank keeps its own draws, the tokens differ."""
    first, second = (rank["each for itself"] for rank in ranks)
    assert first["tokens"] != second["tokens"]


@pytest.mark.parametrize("where", ["some layers", "nearly everything"])
def test_offloaded_to_disk_equals_resident(tiny_model, tmp_path, capsys, where):
    """Weights that accelerate fetches from disk at each step: tokens, logprobs and scores equal bit for bit."""
    devices = {name: "disk" if where == "nearly everything" else "cpu" for name in ("model.embed_tokens", "lm_head")}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    devices |= {f"model.layers.{i}": "disk" if i % 2 or where == "nearly everything" else "cpu" for i in range(4)}
    built = Llama.build(TINY, TINY, None, None, device_map=devices, offload_folder=tmp_path, dtype=torch.float32)
    capsys.readouterr()
    assert built.model.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    few = {name: (prompts, {**asked, "max_gen_len": 2}) for name, (prompts, asked) in tensor_parallel.CASES.items()}
    assert tensor_parallel.answers(built.model, 0, few) == tensor_parallel.answers(tiny_model, 0, few)
    prompts = tensor_parallel.RAGGED
    assert built.model.score_tokens(prompts).logprobs == tiny_model.score_tokens(prompts).logprobs
