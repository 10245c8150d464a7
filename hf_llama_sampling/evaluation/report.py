"""Run lm-evaluation-harness with `LlamaLM`, and return its results as text.

What this module does not do: it knows no task and no metric.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..llama.llama import Llama


def evaluate(
    llama: Llama,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    batch_size: int = 8,
    seeds: int = 1,
    **options: Any,
) -> tuple[str, str]:
    """Run tasks; return the harness' own table of metrics, and its results as JSON.

    Args:
        llama: the model and its tokenizer.
        tasks: the harness' names of tasks and groups.
        include_path: a folder with task files of the caller's.
        batch_size, seeds: see `LlamaLM`.
        options: further keywords of the harness' `simple_evaluate`.

    Raises:
        ImportError: the harness is not installed.
        ValueError: there is no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError as error:
        raise ImportError("lm-eval needs lm-evaluation-harness: pip install 'hf-llama-sampling[lm-eval]'") from error
    from .harness import LlamaLM

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"the harness has no task {unknown[0]!r}: check its name, or name its folder (--include-path)")
    model = LlamaLM(llama, batch_size=batch_size, seeds=seeds)
    results = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    table = str(make_table(results))
    if "groups" in results:
        table += "\n" + str(make_table(results, "groups"))
    kept = {name: value for name, value in results.items() if name != "samples"}
    return table, json.dumps(kept, indent=1, default=handle_non_serializable)


def is_results(file: Path) -> bool:
    """Whether a file holds the harness' results as `evaluate` returns them."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and "results" in found
