"""The README's claims: its tables, the names it mentions, the commands it shows."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import clip
import decoder
import diffusion
import prior
import train_toy
import unclip

ROOT = Path(unclip.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = {"diffusion": diffusion, "clip": clip, "prior": prior, "decoder": decoder,
            "unclip": unclip, "train_toy": train_toy}


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_file_table_has_every_chapter_and_its_length(name):
    stated = re.search(rf"\| `{name}\.py` \|.*\| (\d+) \|", README)
    assert stated, f"{name}.py is missing in the table of files"
    lines = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert abs(int(stated[1]) - lines) <= 0.05 * lines, f"{name}.py has {lines} lines"


def test_every_function_on_the_map_exists():
    section = README.split("## The paper, and where it is")[1].split("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", section))
    assert len(names) > 20
    for name in names:
        first, *rest = name.strip(".").split(".")
        homes = [module for module in CHAPTERS.values() if hasattr(module, first)]
        found = any(not rest or hasattr(getattr(m, first), rest[0]) for m in homes)
        method = any(hasattr(kind, first) for m in CHAPTERS.values() for kind in vars(m).values()
                     if isinstance(kind, type))
        assert found or method, f"the README mentions {name}, which is nowhere"


def test_the_numbers_are_those_that_evaluate_wrote():
    content = json.loads((ROOT / "pictures/evaluation.json").read_text())
    for line in train_toy.markdown(content["rows"]).splitlines():
        assert line in README, f"not in the README: {line}"
    assert content["captions"] in README


def test_the_findings_are_those_that_figures_wrote():
    found = json.loads((ROOT / "pictures/findings.json").read_text(encoding="utf-8"))
    assert set(found) <= set(train_toy.FINDINGS)
    assert train_toy.findings_table(found) in README, "put the table that `figures` prints there"


def test_every_picture_is_there():
    for path in re.findall(r"\[[^]]*\]\(([^)]+\.png)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_a_demo_without_its_weights_ends_with_a_sentence(name, tmp_path):
    """The chapters alone in a folder: no traceback, and status 2."""
    for chapter in CHAPTERS:
        (tmp_path / f"{chapter}.py").write_bytes((ROOT / f"{chapter}.py").read_bytes())
    out = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True,
                         text=True)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr.startswith("error: there is no file") and "toy.pt" in out.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "clip", "prior", "decoder"])
def test_every_chapter_shows_something(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CHAPTERS[name].demo()
    assert len(capsys.readouterr().out) > 60
    if name == "decoder":
        assert (tmp_path / "stages.png").stat().st_size > 1000


def test_every_command_is_one_that_exists(monkeypatch, capsys):
    """Each `python FILE WORDS` of the README is understood; it stops where it would begin to work."""
    begun = []
    monkeypatch.setattr(unclip, "stop_on_error", lambda run, *args: begun.append(run))
    lines = re.findall(r"^(?:.*&& )?python (\S+\.py)([^\n#]*)", README, re.M)
    assert len(lines) >= 7
    for file, words in lines:
        if file == "clip.py":                            # it begins by looking for its files
            assert clip.main(shlex.split(words)) == 2
            assert "ViT-L-14.pt" in capsys.readouterr().err
        else:
            {"unclip.py": unclip, "train_toy.py": train_toy}[file].main(shlex.split(words))
            assert begun.pop(), f"python {file}{words}"
