"""The pictures of the sampling rule."""

import runpy

from tests.conftest import HERE


def test_the_pictures_are_drawn(tmp_path, capsys):
    """One file with four panels, from the bundled model."""
    example = runpy.run_path(str(HERE.parent / "examples" / "plot_sampling.py"))
    example["main"](str(tmp_path / "sampling.png"))
    assert (tmp_path / "sampling.png").read_bytes().startswith(b"\x89PNG")
