"""README's "to replace X, provide Y": each script is short, public and linked, and it runs."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTS = {"dit": r"DiT: \[4, 3, 16, 16\]", "extra_condition": r"label: \[4, 3, 16, 16\]",
          "own_data": r"trained on flags: \(1, 3, 256, 256\)", "own_loop": r"a classifier.*loss",
          "own_prior": "linear prior: a large green circle",
          "predicts": r"eps: cosine .*, x0: cosine .*, v: cosine",
          "preset": "a tiny stack: 277,734", "siglip": r"SigLIP's loss: ", "solver":
          r"DPM-Solver\+\+\(2M\), 8 steps: a large green circle"}
DEFAULT = ("dit", "extra_condition", "own_loop", "solver")


def marks(name):
    return [pytest.mark.slow] + [pytest.mark.long] * (name not in DEFAULT)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in PRINTS])
def test_a_part_can_be_replaced(name):
    path = f"tests/extras/seams/{name}.py"
    assert f"]({path})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len((ROOT / path).read_text().splitlines()) <= 25
    run = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.match(PRINTS[name], run.stdout.splitlines()[-1]), run.stdout
