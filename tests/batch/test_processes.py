"""Several processes: the same output, byte for byte, whoever is killed and whoever takes it up."""

import filecmp
import os
import random
import socket
import subprocess
import sys

import pytest

from hf_llama_sampling import batch
from hf_llama_sampling.batch.processes import LeastLoaded, leave
from tests.batch.helpers import ONE_THREAD, SETTINGS, read, some_records, write


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_few_records_on_many_processes(llama, tmp_path, launch, processes):
    """0, 1, 2, 5 and 7 records: in order, none lost, none twice, though some processes get nothing."""
    for count in (0, 1, 2, 5, 7):
        source = write(tmp_path / f"in{count}", some_records(count))
        batch.run(llama, source, tmp_path / f"whole{count}", **SETTINGS, batch_size=1)
        ended = launch(
            count=processes, input=source, output=tmp_path / f"out{count}", options={**SETTINGS, "batch_size": 1}
        )
        assert ended.codes == [0] * processes, ended.stderr
        assert filecmp.cmp(tmp_path / f"out{count}", tmp_path / f"whole{count}", shallow=False)
        assert len(read(tmp_path / f"out{count}")) == count


def test_killed_at_20_random_moments(tmp_path, launch):
    """200 records on 2 processes; both or one of them get SIGKILL, and 1, 2 or 3 take the run up.

    The output, logprobs included, is that of an undisturbed run on one process, byte for byte.
    """
    records = [*some_records(196), "{bad", {"prompt": ""}, "", {"prompt": "x", "seed": -1}]
    random.Random(2).shuffle(records)
    source = write(tmp_path / "in", records)
    options = {"max_gen_len": 6, "batch_size": 8, "window": 64, "logprobs": True}
    whole = launch(count=1, input=source, output=tmp_path / "whole", options=options)
    assert whole.codes == [1], whole.stderr
    undisturbed = launch(count=2, input=source, output=tmp_path / "two", options=options)
    assert undisturbed.codes == [1, 1] and filecmp.cmp(tmp_path / "two", tmp_path / "whole", shallow=False)

    rng = random.Random(0)
    interrupted = 0
    for number in range(20):
        output = tmp_path / f"out{number}"
        ranks = [[0, 1], [0, 1], [0], [1]][number % 4]
        kill = {"after": rng.uniform(0, 0.7) * undisturbed.seconds, "ranks": ranks}
        ended = launch(count=2, input=source, output=output, options=options, kill=kill)
        # The one that was left alone ends by itself, by the error, not by the launcher's patience.
        assert all(code in ((-9, 1) if rank in ranks else (1, 2)) for rank, code in enumerate(ended.codes)), ended
        interrupted += -9 in ended.codes and not output.exists()
        again = launch(count=1 + number % 3, input=source, output=output, options=options)
        assert again.codes == [1] * (1 + number % 3), again.stderr
        assert filecmp.cmp(output, tmp_path / "whole", shallow=False)
    assert interrupted >= 12


def test_killed_again_and_again(tmp_path, launch):
    """One run, killed up to eight times, at changing process counts, before it may complete."""
    source = write(tmp_path / "in", some_records(160))
    options = {"max_gen_len": 8, "batch_size": 4}
    whole = launch(count=1, input=source, output=tmp_path / "whole", options=options)
    assert whole.codes == [0], whole.stderr
    rng = random.Random(1)
    output = tmp_path / "out"
    for number in range(8):
        count = (3, 2, 1)[number % 3]
        kill = {"after": rng.uniform(0.05, 0.25), "ranks": list(range(count))}
        launch(count=count, input=source, output=output, options=options, kill=kill)
    ended = launch(count=1, input=source, output=output, options=options)
    assert ended.codes == [0], ended.stderr
    assert filecmp.cmp(output, tmp_path / "whole", shallow=False)


def test_a_refusal_on_many_processes_changes_nothing(llama, tmp_path, launch):
    """Every process ends, and the output is as it was."""
    source = write(tmp_path / "in", some_records(4))
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    before = (tmp_path / "out").read_bytes()
    ended = launch(count=2, input=source, output=tmp_path / "out", options={**SETTINGS, "seed": 9})
    assert ended.codes == [2, 2] and "seed was 3 and is 9" in ended.stderr, ended.stderr
    ended = launch(count=2, input=source, output="-", options=SETTINGS)
    assert ended.codes == [2, 2] and "standard streams belong to one process" in ended.stderr
    assert (tmp_path / "out").read_bytes() == before
    ended = launch(count=2, input=source, output=tmp_path / "out", options=SETTINGS)
    assert ended.codes == [0, 0]


def test_shares_are_even():
    """No process gets more than its share and one batch."""
    rng = random.Random(0)
    costs = sorted((rng.randint(1, 1000) for _ in range(100)), reverse=True)
    for count in (1, 2, 3, 8):
        schedule = LeastLoaded(count)
        loads = [0] * count
        for cost in costs:
            loads[schedule.assign(cost)] += cost
        assert max(loads) - min(loads) <= max(costs)
        assert max(loads) <= 1.02 * sum(costs) / count


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_waits_for_the_others_before_it_closes(lost):
    """torch 2.6 may hang where a process closes while a thread still frees what was broadcast."""
    done = []

    class State:
        num_processes = 2

        def wait_for_everyone(self):
            done.append("wait")
            if lost:
                raise RuntimeError("Connection closed by peer")

        def destroy_process_group(self):
            done.append("close")

    leave(State())
    assert done == ["wait", "close"]


@pytest.mark.launches
def test_launched_by_accelerate(llama, tmp_path):
    """Two processes from the command line: the status, the output, and one sentence where it is refused."""
    source = write(tmp_path / "in", some_records(5))
    batch.run(llama, source, tmp_path / "whole", temperature=0.8, max_gen_len=6)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    with socket.socket() as free:  # the launcher does not look for a port; 0 would leave its processes waiting
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher += ["--main_process_port", port, "-m", "hf_llama_sampling", "batch", source, tmp_path / "out"]
    options = ["--temperature", "0.8", "--max-gen-len", "6"]
    ended = subprocess.run([*launcher, *options], capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert ended.returncode == 0, ended.stderr
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)
    assert ended.stdout == "" and ended.stderr.count("5 records, 0 errors") == 1
