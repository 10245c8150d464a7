"""Run lm-evaluation-harness with `LlamaLM`, and return its results as text.

What this module does not do: it knows no task and no metric.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..llama.llama import Llama


def find_tasks(names: Sequence[str], include_path: str | None = None) -> Any:
    """Return the harness' `TaskManager` that has these tasks; asked before a model is loaded.

    Args:
        names: the harness' names of tasks and groups.
        include_path: a folder with task files of the caller's.

    Raises:
        ImportError: the harness is not installed.
        ValueError: there is no such folder, or no such task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path must be a folder of task files, and {include_path!r} is none: check the path")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "lm-eval needs lm-evaluation-harness: pip install lm_eval (this package's extra lm-eval)"
        ) from error
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"the harness has no task {unknown[0]!r}: check its name, or name its folder (--include-path)")
    return manager


def evaluate(
    llama: Llama,
    tasks: Sequence[str],
    manager: Any,
    *,
    batch_size: int = 8,
    seeds: int = 1,
    **options: Any,
) -> tuple[str, str]:
    """Run tasks; return the harness' own table of metrics, and its results as JSON.

    Args:
        llama: the model and its tokenizer.
        tasks: the harness' names of tasks and groups.
        manager: from `find_tasks`.
        batch_size, seeds: see `LlamaLM`.
        options: further keywords of the harness' `simple_evaluate`.
    """
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    from .harness import LlamaLM

    model = LlamaLM(llama, batch_size=batch_size, seeds=seeds)
    with _no_word_of_git():
        results = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    table = str(make_table(results))
    if "groups" in results:
        table += "\n" + str(make_table(results, "groups"))
    kept = {name: value for name, value in results.items() if name != "samples"}
    return table, json.dumps(kept, indent=1, default=handle_non_serializable)


@contextlib.contextmanager
def _no_word_of_git() -> Iterator[None]:
    """Outside of a repository, answer the harness' question for a commit: git would complain on standard error."""
    from lm_eval import evaluator

    here = Path.cwd()
    asks = getattr(evaluator, "get_git_commit_hash", None)
    if asks is None or any((folder / ".git").exists() for folder in (here, *here.parents)):
        yield
        return
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


def is_results(file: Path) -> bool:
    """Whether a file holds the harness' results as `evaluate` returns them."""
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and "results" in found
