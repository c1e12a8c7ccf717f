"""The notebook is what its generator writes, has the form of nbformat 4.5, and its cells run."""
import json
import re
import sys
from pathlib import Path

import pytest

EXTRAS = Path(__file__).parent.parent.parent / "extras"
sys.path.insert(0, str(EXTRAS))
import tour  # noqa: E402


def test_the_notebook_is_in_step_with_the_chapters():
    written = json.loads((EXTRAS / "tour.ipynb").read_text(encoding="utf-8"))
    assert written == tour.notebook(), "a chapter has changed: python extras/tour.py"
    assert (written["nbformat"], written["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in written["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    sections = {name.split(".")[0] for name, *_ in tour.SECTIONS}
    assert sections == {"diffusion", "clip", "prior", "decoder", "unclip", "train_toy"}


@pytest.mark.slow
def test_every_code_cell_runs_and_each_section_makes_one_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from matplotlib import pyplot as plt
    plt.switch_backend("Agg")
    figures, space = [], {}
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    for cell in tour.notebook()["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    assert len(figures) == len(tour.SECTIONS)
    for k, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{k}.png", dpi=80)
        assert (tmp_path / f"{k}.png").stat().st_size > 5000, "an empty figure"
    plt.close("all")
