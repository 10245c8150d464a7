"""Evaluate a model on a task of your own by lm-evaluation-harness.

python examples/evaluate.py MODEL  # hf_llama_sampling/tiny_llama is the bundled one

Needs the extra `lm-eval`. With `TaskManager()` in place of the local folder, any task of the harness can be named.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from hf_llama_sampling.evaluation import LlamaLM

DOCUMENTS = [{"text": "ROMEO:\nI will", "choices": [" go", " king"]}, {"text": "The", "choices": [" king", " go"]}]
TASK = """
task: who_speaks
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/documents.jsonl}, cache_dir: FOLDER}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
        Path(folder, "who_speaks.yaml").write_text(TASK.replace("FOLDER", folder))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(LlamaLM(name, dtype="float32"), tasks=["who_speaks"], task_manager=tasks)
    for task, values in results["results"].items():
        print(f"{task}: accuracy {values['acc,none']}, standard error {values['acc_stderr,none']:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
