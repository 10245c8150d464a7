"""A first look, as `make demo` gives it: completions, the check against the plain loop, a page of token probabilities.

python examples/demo.py FOLDER
"""

import shlex
import sys
from pathlib import Path

from hf_llama_sampling.cli import main as run

TEXT = """HAMLET:
To be, or not to be: that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles,
And by opposing end them? To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd.
"""


def main(folder: str) -> None:
    text = Path(folder, "demo.txt")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(TEXT)
    for command in (
        ["complete", "ROMEO:", "First Citizen:", "--seed", "1", "--max-gen-len", "40", "--logprobs"],
        ["parity", "--quick"],
        ["score", str(text), "--html", str(text.with_suffix(".html"))],
    ):
        print(f"\n$ hf-llama-sampling {shlex.join(command)}", flush=True)
        if status := run(command):
            sys.exit(status)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
