"""examples/ray_batch.py on two actors of this machine: the answers of the command `batch`."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from hf_llama_sampling.cli import main
from tests.batch.helpers import some_records, write
from tests.conftest import HERE, PACKAGE, TINY

EXAMPLE = HERE.parent / "examples" / "ray_batch.py"


@pytest.mark.launches
def test_two_actors_give_the_answers_of_one_batch_run(tmp_path):
    """Line for line: prompts and dialogs, settings of records' own, an error record, in the input's order."""
    pytest.importorskip("ray", reason="needs ray: install the extra ray")
    records = [{"seed": number} | record for number, record in enumerate(some_records(40))]
    records += [{"messages": [{"role": "user", "content": "What is Paris?"}]}, {"id": "wrong", "prompt": 5}]
    asked = write(tmp_path / "in.jsonl", records)
    asked.write_text(asked.read_text().replace("\n", "\n\n", 1))  # a blank line has its error
    command = [sys.executable, EXAMPLE, TINY, asked, tmp_path / "ray.jsonl", "2"]
    paths = os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main(["batch", str(asked), str(tmp_path / "one.jsonl"), "--max-gen-len", "32", "--seed", "1"])

    def answers(name):
        lines = (tmp_path / name).read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "line"} for line in lines]

    assert answers("ray.jsonl") == answers("one.jsonl")


def test_without_ray_the_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"^ray_batch.py needs Ray: pip install 'hf-llama-sampling\[ray\]'$"):
        runpy.run_path(str(EXAMPLE))
