"""The claims of README.md and extras/README.md: lengths, names, numbers, links, commands."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unclip
from extras import benchmark, coursework, museum

ROOT = Path(unclip.__file__).parent
README, EXTRAS = ((ROOT / name).read_text("utf-8") for name in ("README.md", "extras/README.md"))
CHAPTERS = {name: importlib.import_module(name)
            for name in ("diffusion", "clip", "prior", "decoder", "unclip", "train_toy")}


def recorded(name):
    return json.loads((ROOT / "pictures" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_first_page_is_short():
    assert len(README.split()) <= 2400, f"{len(README.split())} words"


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_table_of_files_has_lengths_and_minutes(name):
    stated = re.search(rf"\| `{name}\.py` \| .* \| (\d+) \| ([\w ]+) \| (\d+) \|", README)
    pace = int(re.search(r"at (\d+) lines a minute", README)[1])
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    heading = next(i for i, line in enumerate(lines) if re.match(rf"# -+ {stated[2]}", line))
    for here, true in ((stated[1], len(lines)), (stated[3], heading / pace)):
        assert abs(int(here) - true) <= 0.1 * true, f"{name}.py: {true:.0f}, the README has {here}"


@pytest.mark.parametrize("section", ["Symbols", "The paper, and where it is"])
def test_every_name_of_the_tables_exists(section):
    table = README.split(f"## {section}\n")[1].split("\n## ")[0]
    source = "\n".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in CHAPTERS)
    for name in (names := set(re.findall(r"`([A-Za-z_][\w.]*)`", table))):
        first, _, method = name.partition(".")
        homes = [module for module in CHAPTERS.values() if hasattr(module, first)]
        symbol = section == "Symbols" and re.search(rf"\b{name}\b", source)
        assert symbol or any(hasattr(getattr(m, first), method or "__doc__") for m in homes), name
    assert len(names) > 15


def test_the_numbers_are_those_that_were_measured():
    for condition, row in recorded("evaluation")["rows"].items():
        cells = [f"{100 * value:.1f} %" for value in list(row.values())[:3]]
        assert f"| {condition} | {' | '.join(cells)} | {row['IoU']:.3f} |" in README
    answers = [row["sentence"] for row in recorded("experiments").values()]
    assert all(answer in EXTRAS for answer in answers)
    assert sum(answer in README for answer in answers) == 3
    assert all(f"](../pictures/{name}.png)" in EXTRAS for name in recorded("findings"))
    assert f"# {len(coursework.EXERCISES)} exercises" in README
    assert f"# {len(museum.BUGS)} bugs" in README


@pytest.mark.long
def test_the_papers_sizes_are_counted_anew(capsys):
    benchmark.main(["sizes"])
    assert capsys.readouterr().out in EXTRAS, "put there what extras/benchmark.py sizes prints"


def test_all_links_lead_somewhere():
    for page, text in (("README.md", README), ("extras/README.md", EXTRAS)):
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {path}"
            titles = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.M) if anchor else []
            known = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in known, f"{page}: #{anchor}"


@pytest.mark.slow
def test_the_example_in_python_runs(monkeypatch, tmp_path):
    [example] = re.findall(r"```python\n(.*?)```", README, re.S)
    for method in (unclip.UnCLIP.variations, unclip.UnCLIP.text_diff):
        monkeypatch.setitem(method.__kwdefaults__, "steps", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    exec(example, {})
    assert (tmp_path / "strip.png").exists()


# What makes a command short; None: it explains itself instead (it takes minutes, or a GPU).
FEW = "-n 2 --decoder-steps 2 --upsampler-steps 1 1"
SHORT = {"cuda|karlo|ViT-|gallery|ablate|bounds|compare|grade|acceptance|handout": None,
         r"unclip.py \w": FEW, "evaluate": "--captions 5", "figures": "--only priors_cost --out .",
         "experiments": "--only rerank --scenes 2 --out .", "run --preset toy": "--limit-seconds 0",
         "--data": "--steps-scale 0.0005 --batch 8",
         r"train_toy.py( -|$)": "--steps-scale 0.0005 --batch 8 --groups 40"}


@pytest.mark.long
def test_every_command_of_both_pages_runs(tmp_path):
    """In one folder, one after the other, as a reader would."""
    (tmp_path / "FOLDER").mkdir()
    for name in ("other.png", "mask.png", "FOLDER/a.png", "FOLDER/b.png"):
        unclip.save_grid(torch.ones(1, 3, 256, 256), tmp_path / name, 1)
        (tmp_path / name).with_suffix(".txt").write_text(f"an image called {name}")
    found = re.findall(r"(?:^|`)python (?!tests)(\S+\.py[^`\n]*)", README + EXTRAS, re.M)
    for command in dict.fromkeys(text.split(" #")[0].strip() for text in found):
        more = next((SHORT[words] for words in SHORT if re.search(words, command)), "")
        line = f"{command} {more}" if more is not None else command.split()[0] + " --help"
        run = subprocess.run(f"{sys.executable} {ROOT}/{line}", shell=True, cwd=tmp_path,
                             capture_output=True, text=True)
        assert run.returncode == 0, f"{command}: {run.stderr[-1000:]}"
