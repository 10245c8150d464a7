"""Run the tests against the built wheel: `python -m tests.wheel FOLDER [pytest's arguments]`, or `make wheel-test`.

FOLDER then holds the sdist, the wheel that was built from it, a fresh environment with the wheel installed, and the
sdist's tests without the package beside them, so that what they import is the wheel's.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_llama_sampling"


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of this checkout, unpacked, and the wheel that is built from what it holds."""
    builder = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder / "dist")]
    run([*builder, "--target", "sdist"], cwd=ROOT)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    run([*builder, "--target", "wheel"], cwd=source)
    (wheel,) = (folder / "dist").glob("*.whl")
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes; {wheel.name}: {wheel.stat().st_size:,} bytes", flush=True)
    return source, wheel


def install(folder: Path, wheel: Path) -> Path:
    """A fresh environment with the wheel and what its tests need; returns its Python."""
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / "bin" / "python"
    wanted = [f"{wheel}[test,lm-eval]", "--constraint", str(ROOT / "tests" / "constraints.txt")]
    run([str(python), "-m", "pip", "install", "--quiet", *wanted], cwd=folder)
    return python


def run(command: list[str], cwd: Path) -> None:
    """Run a command that must succeed, without the packages of whoever calls."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Build, install, and run mypy on the typed program and pytest on the tests."""
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, wheel = build(folder)
    python = str(install(folder, wheel))
    shutil.rmtree(source / PACKAGE)
    shutil.copy(source / "tests" / "typed_use.py", folder)
    run([python, "-m", "mypy", "--strict", "typed_use.py"], cwd=folder)
    run([python, "-m", "pytest", *sys.argv[2:]], cwd=source)


if __name__ == "__main__":
    main()
