"""Run the suite on several releases of transformers and torch: `python -m tests.matrix [NAME ...] [-- ARGUMENTS]`.

Each release has an environment of its own in build/matrix, which a later call reuses; the other packages are those of
tests/constraints.txt where the release takes them. `make matrix` runs all of them and ends with a line for each.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / "build" / "matrix"
# By name: the requirements that differ from tests/constraints.txt. docs/versions.md says how each came out.
RELEASES = {
    "floor": ["transformers==5.23.0", "torch==2.6.0"],
    "pinned": ["transformers==5.23.0", "torch==2.13.0"],
    "newest": ["transformers==5.24.0", "torch==2.14.1"],
}
# A release of transformers brings its own of these.
FOLLOW = {"transformers", "tokenizers", "huggingface_hub", "torch", "numpy"}


def constraints(requirements: list[str]) -> str:
    """tests/constraints.txt without what a release decides, and with what it asks for."""
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if re.split(r"[=#]", line)[0] not in FOLLOW]
    return "\n".join([*kept, *requirements]) + "\n"


def environment(name: str) -> Path:
    """The Python of a release's environment, made and filled where it is not there."""
    folder = ENVIRONMENTS / name
    python, said = folder / "bin" / "python", folder / "constraints.txt"
    wanted = constraints(RELEASES[name])
    if not said.is_file() or said.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        said.with_suffix(".new").write_text(wanted)
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", said.with_suffix(".new")]
        subprocess.run([*command, "--editable", f"{ROOT}[test,lm-eval]"], check=True)
        said.with_suffix(".new").rename(said)
    return python


def run(name: str, arguments: list[str]) -> str:
    """The last line that pytest prints in a release's environment."""
    python = environment(name)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return last.strip("= ") + ("" if process.returncode == 0 else f" (status {process.returncode})")


def main() -> int:
    """Run each release that is named, or all; 1 if the tests of one of them fail."""
    names, _, arguments = " ".join(sys.argv[1:]).partition("--")
    chosen = names.split() or list(RELEASES)
    ends = {name: run(name, arguments.split()) for name in chosen}
    for name, end in ends.items():
        print(f"{name} ({', '.join(RELEASES[name])}): {end}")
    return int(any("status" in end for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
