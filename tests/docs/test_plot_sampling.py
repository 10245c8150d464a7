"""The pictures of the sampling rule."""

import runpy

import matplotlib.pyplot as plt
import pytest
import torch

from tests.conftest import HERE

pytestmark = pytest.mark.slow


def test_the_pictures_are_drawn(tmp_path, capsys):
    """One file with four panels, from the bundled model."""
    example = runpy.run_path(str(HERE.parent / "examples" / "plot_sampling.py"))
    example["main"](str(tmp_path / "sampling.png"))
    assert (tmp_path / "sampling.png").read_bytes().startswith(b"\x89PNG")
    heat, flat, peaked, edge = plt.gcf().axes
    for place, temperature in enumerate((0.1, 0.5, 1, 2)):
        heights = [bar.get_height() for bar in heat.patches[5 * place : 5 * place + 5]]
        expected = torch.softmax(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0]) / temperature, -1).tolist()
        assert heights == pytest.approx(expected) and heat.get_legend_handles_labels()[1][place].endswith(
            str(temperature)
        )
    ends = [axes.lines[0].get_xdata()[0] for axes in (flat, peaked)]  # of the nucleus, in ranks
    assert ends[0] > 4 * ends[1] > 1
    ours, theirs = ([bar.get_height() > 0 for bar in edge.patches[start : start + 3]] for start in (0, 3))
    assert ours == [True, True, False] and theirs == [True, False, False]
    plt.close("all")
