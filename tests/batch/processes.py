"""A warm launcher of batch runs: loads the model once, then forks the processes of each run, and kills them on request.

Importing torch and transformers takes seconds, and `tests/test_batch.py` starts some hundred processes. One JSON object
a line on standard input starts a run, one on standard output tells how its processes ended:

    {"count": 2, "kill": {"after": 0.3, "ranks": [0, 1]}, "input": ..., "output": ..., "options": {...}}
    {"codes": [-9, -9], "stderr": "...", "seconds": 1.2, "processor_seconds": [0.9, 1.0]}

A code is an exit status, or a signal's number below 0; 100 means an exception, which stderr shows. The clock of a kill
starts when all processes of the run have joined. Two more keys are `limit`, on file sizes, in bytes, and
`patience`: after so many seconds all are killed.
"""

import contextlib
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import hf_llama_sampling
from hf_llama_sampling import Llama, batch

TINY = Path(hf_llama_sampling.__file__).parent / "tiny_llama"
PATIENCE = 60  # seconds; a run takes a few


def child(task, rank, port, ready, log, llama):
    """One process of a run; never returns."""
    os.dup2(log, 2)
    code = 100
    try:
        if task["count"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(task["count"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        if "limit" in task:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], task["limit"]))
        batch.process_state()
        os.write(ready, b".")
        summary = batch.run(llama, task["input"], task["output"], **task["options"])
        code = 1 if summary.errors else 0
    except (ValueError, OSError) as error:
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port():
    """A port that nobody listens on, as far as can be known."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(task, llama):
    """Start the processes of one run and wait for their end."""
    port = free_port()
    readable, ready = os.pipe()
    with tempfile.TemporaryFile() as log:
        pids = []
        for rank in range(task["count"]):
            pid = os.fork()
            if pid == 0:
                child(task, rank, port, ready, log.fileno(), llama)
            pids.append(pid)
        os.close(ready)
        joined = 0
        while joined < task["count"]:
            got = os.read(readable, 100)
            if not got:  # one ended before
                break
            joined += len(got)
        start = time.monotonic()
        codes, used = [None] * task["count"], [0.0] * task["count"]
        kill = task.get("kill")
        while None in codes:
            now = time.monotonic() - start
            if kill is not None and now >= kill["after"]:
                for rank in kill["ranks"]:
                    if codes[rank] is None:
                        os.kill(pids[rank], signal.SIGKILL)
                kill = None
            if now > task.get("patience", PATIENCE):
                for pid, code in zip(pids, codes, strict=True):
                    if code is None:
                        os.kill(pid, signal.SIGKILL)
            for rank, pid in enumerate(pids):
                if codes[rank] is None:
                    ended, status, usage = os.wait4(pid, os.WNOHANG)
                    if ended:
                        codes[rank] = os.waitstatus_to_exitcode(status)
                        used[rank] = usage.ru_utime + usage.ru_stime
            time.sleep(0.005)
        os.close(readable)
        log.seek(0)
        seconds = time.monotonic() - start
        return {"codes": codes, "stderr": log.read().decode(), "seconds": seconds, "processor_seconds": used}


def main():
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        llama = Llama.build(TINY, TINY, None, None)
    llama.model.generate([[1, 5], [1, 6, 7]], max_gen_len=2, seeds=1)  # what is done once is done here
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), llama)), flush=True)


if __name__ == "__main__":
    main()
