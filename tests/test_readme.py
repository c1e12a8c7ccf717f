"""The README's claims: its tables, the names it mentions, the commands it shows."""
import json
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bugs
import compare_speed
import coursework
import experiments
import pytest
import sizes
import symbols
import torch
from torch.utils.flop_counter import FlopCounterMode

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

pytestmark = pytest.mark.ours                     # never graded, whoever's functions are in use


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
def test_a_demo_without_its_weights_ends_with_a_sentence(tmp_path):
    """The chapters alone in a folder: no traceback, and status 2."""
    for chapter in CHAPTERS:
        (tmp_path / f"{chapter}.py").write_bytes((ROOT / f"{chapter}.py").read_bytes())
    demos = [subprocess.Popen([sys.executable, f"{name}.py"], cwd=tmp_path, text=True,
                              stderr=subprocess.PIPE) for name in ("clip", "prior", "decoder")]
    for demo in demos:
        said = demo.communicate()[1]
        assert demo.returncode == 2 and "Traceback" not in said
        assert said.startswith("error: there is no file") and "toy.pt" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "clip", "prior", "decoder"])
def test_every_chapter_shows_something(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CHAPTERS[name].demo()
    assert len(capsys.readouterr().out) > 60
    if name == "decoder":
        assert (tmp_path / "stages.png").stat().st_size > 1000


def test_the_symbols_are_where_the_table_says():
    assert symbols.table() in README, "python tests/symbols.py writes the table anew"
    for _, _, name, file, line in symbols.SYMBOLS:
        known = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{word}\b", known) for word in name.split(", ")), name


def test_the_experiments_are_those_that_were_measured():
    found = json.loads(experiments.FILE.read_text(encoding="utf-8"))
    assert set(found) == set(experiments.EXPERIMENTS) and len(found) == 10
    for name, row in found.items():
        stated = (f"({row['seconds of one core']} s)\n   <details><summary>Answer</summary>"
                  f"{row['answer']}")
        assert stated in README, f"{name} was measured anew: {stated}"
    assert len(re.findall(r"<details><summary>Answer</summary>", README)) == 10


def test_the_counts_of_exercises_and_bugs_are_right():
    assert f"# {len(coursework.EXERCISES)} exercises" in README
    assert f"each of the {len(bugs.BUGS)} bugs of the museum" in README


def test_the_papers_sizes_are_those_that_the_benchmark_counted():
    sampling, training = sizes.read()
    assert sizes.table(sampling, training) in README, "put there what tests/sizes.py prints"
    assert sizes.totals(sampling, training) in " ".join(README.split())
    assert sizes.conditions() in " ".join(README.split())


@pytest.mark.parametrize("part", sizes.STATED)
def test_the_counted_parameters_are_those_of_the_papers_networks(part):
    built = unclip.build("paper", device="meta").parts[part]
    size = sum(w.numel() for w in built.parameters())
    for rows in sizes.read():
        assert rows[part]["parameters"] == size, f"{part} is {size} large: run the benchmark again"
        assert list(rows) == list(sizes.STATED) == list(unclip.PARTS)


def test_the_reasons_for_other_sizes_are_counted():
    """Built as each reason says, the network has the number that the reason states."""
    def million(part):
        return sum(w.numel() for w in part.parameters()) / 1e6

    parts = unclip.build("paper", device="meta").parts
    ar, stack = parts["ar_prior"], parts["diffusion_prior"].blocks
    one, two = (parts[name].config.unet for name in ("upsampler1", "upsampler2"))
    with torch.device("meta"):
        added = decoder.UNet(replace(one, scale_shift=False))
        looking = decoder.UNet(replace(two, size=256, attention=(32, 16, 8)))    # px of its crops
    for part, said in [("diffusion_prior", f"{million(stack) / 1000:.2f} B"),
                       ("ar_prior", f"{(million(ar) - million(ar.text)) / 1000:.2f} B"),
                       ("ar_prior", f"{million(ar.text) / 1000:.2f} B"),
                       ("upsampler1", f"{million(added):.0f} M"),
                       ("upsampler2", f"{million(looking):.0f} M")]:
        assert said in sizes.STATED[part][2], f"the reason at {part} should say {said}"


def test_the_speeds_are_those_that_were_measured():
    found = json.loads((ROOT / "pictures/speed.json").read_text(encoding="utf-8"))
    for text in (compare_speed.table(found), compare_speed.switches_table(found)):
        assert text in README, f"put there what compare_speed.py printed:\n{text}"
    for text in (compare_speed.conditions(found), compare_speed.summary(found)):
        assert text in " ".join(README.split()), f"put there: {text}"


def test_a_share_is_the_counted_work_by_the_time_and_the_ceiling():
    """A product of 2048 x 2048 in 1 s is 2 * 2048^3 FLOP/s; half of that work in 2 s, a fourth."""
    row = {"what": "U-Net", "passes": "forward", "FLOPs": 2048 ** 3,
           "seconds": {"ours": 2.0, "plain": 3.0, "product": 1.0}}
    assert "| U-Net: forward | 2.000 | 3.000, plain | 1.50 | 25 % |" in compare_speed.table(
        {"rows": [row]})
    busy = row | {"seconds": row["seconds"] | {"product": 2.0}}           # the best product counts
    assert compare_speed.share_of(busy, {"rows": [row, busy]}) == 25


def test_compare_counts_as_much_work_as_there_is(monkeypatch):
    """A matrix of 8 x 6 applied to 5 rows: 2 * 8 * 6 * 5, backward as much for each of its inputs
    (for the weight alone, where x wants no gradient)."""
    monkeypatch.setattr(compare_speed, "SIDE", 4)
    layer, x = torch.nn.Linear(6, 8, bias=False), torch.randn(5, 6)
    ways = {name: (layer, lambda: layer(x)) for name in ("ours", "another")}
    forward, both = compare_speed.compare(ways, 1)
    assert (forward["FLOPs"], both["FLOPs"]) == (480, 960)
    assert set(both["seconds"]) == {"ours", "another", "product"}
    ways["another"] = (layer, lambda: layer(x) + 1)
    with pytest.raises(AssertionError, match="must agree"):
        compare_speed.compare(ways, 1)


SMALL = decoder.UNetConfig(size=8, channels=32, mults=(1, 2), attention=(8, 4), head_channels=32,
                           context_width=32)


def test_the_plain_layout_says_the_same_and_takes_as_much_work():
    ways = compare_speed.networks(SMALL, 2)
    work = compare_speed.compare(ways, 1)[0]["FLOPs"]        # raises where outputs differ
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ways["ADM's layout written plainly"][1]()            # einsums only: each is counted
    assert work == counter.get_total_flops(), "is attention's fast kernel left out?"


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
def test_the_ways_to_do_a_step_of_sampling_agree(name):
    with torch.no_grad():
        ours, again, two = (step() for step in compare_speed.steps_of_sampling(name, 2).values())
    assert torch.allclose(ours, again) and torch.allclose(ours[:, :3], two[:, :3], atol=1e-5)


@pytest.mark.slow
def test_the_unet_of_diffusers_says_the_same_with_the_same_weights():
    pytest.importorskip("diffusers")
    forward, both = compare_speed.compare(compare_speed.networks_of_diffusers(SMALL, 2), 1)
    assert forward["FLOPs"] < both["FLOPs"]


def test_compare_speed_says_in_a_sentence_that_diffusers_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(compare_speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        compare_speed.main(["--diffusers"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: --diffusers") and said.count("\n") == 1


def test_compare_speed_refuses_what_it_would_not_use(capsys):
    with pytest.raises(SystemExit) as end:
        compare_speed.main(["--batch", "4"])
    assert end.value.code == 2 and "belong to --karlo" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["candidates", "enlarging"])
def test_an_experiment_is_measured(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "CAPTIONS", 3)
    assert experiments.main([name, "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found[name]["answer"] in capsys.readouterr().out
    assert experiments.main(["nothing"]) == 2


@pytest.mark.slow
@pytest.mark.ours
def test_the_example_in_python_runs(monkeypatch, tmp_path):
    [example] = re.findall(r"```python\n(.*?)```", README, re.S)
    for method in (unclip.UnCLIP.variations, unclip.UnCLIP.text_diff):
        monkeypatch.setitem(method.__kwdefaults__, "steps", 4)              # 250 take too long here
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    exec(example, {})
    assert (tmp_path / "strip.png").exists()


# ---------------------------------------------------------------- every command, run

# What makes a command a matter of seconds; the last of two equal options counts.
FEW = ["--decoder-steps", "2", "--upsampler-steps", "1", "1"]
SHORT = {"sample": [*FEW, "--prior-steps", "2", "--rerank", "1"], "variations": [*FEW, "-n", "2"],
         "interpolate": [*FEW, "-n", "2"], "edit": [*FEW, "-n", "2"],
         "benchmark": ["--limit-seconds", "0.01"],
         "train": ["--groups", "30", "--steps-scale", "0.0005"],
         "figures": ["--only", "priors_cost"],
         "evaluate": ["--captions", "5", "--ways", "caption alone"]}
NOT_HERE = {"ViT-L-14.pt": "ViT-L-14.pt",                 # real weights are not ours; what they
            "image-variations/": "there is no file",      # do, test_checkpoints.py does with others
            "--device cuda": "there is no device"}
ANEW = "tests/symbols.py", "tests/compare_speed.py"       # would write README.md; takes minutes


def commands():
    """All of the README's commands that begin with python, in its order, each once."""
    lines = re.findall(r"^(?:.*&& )?(python \S+\.py[^\n]*)|`(python \S+\.py[^`]*)`", README, re.M)
    return list(dict.fromkeys(" ".join((a or b).split(" # ")[0].split()) for a, b in lines))


@pytest.mark.slow
@pytest.mark.long
def test_every_command_runs(tmp_path, monkeypatch, capsys):
    """In one folder, one after the other, as a reader would; ANEW, whose work other tests here
    repeat, only explain themselves."""
    monkeypatch.chdir(tmp_path)
    few = unclip.Sampling(prior_steps=2, decoder_steps=2, upsampler_steps=(1, 1))
    monkeypatch.setattr(unclip.PRESETS["toy"], "sampling", few)
    monkeypatch.setattr(bugs, "CAPTIONS", bugs.CAPTIONS[:1])
    monkeypatch.setattr(experiments, "CAPTIONS", 2)
    (tmp_path / "karlo-v1-alpha").symlink_to(ROOT / "tests/golden/karlo_diffusers_tiny")
    for folder in ("FOLDER", "pictures"):
        (tmp_path / folder).mkdir()
    for i in range(6):
        scene = train_toy.random_scene(random.Random(i))
        picture = unclip.to_pil(train_toy.render(scene, 64))
        for name in [f"FOLDER/{i}.png", "other.png", "photo.jpg"]:
            picture.save(tmp_path / name)
        (tmp_path / f"FOLDER/{i}.txt").write_text(train_toy.caption(scene))
    mains = {"unclip.py": unclip.main, "train_toy.py": train_toy.main, "tests/bugs.py": bugs.main,
             "tests/coursework.py": coursework.main, "tests/experiments.py": experiments.main,
             "tests/compare_speed.py": compare_speed.main, "tests/sizes.py": sizes.main}
    assert len(commands()) > 25
    for command in commands():
        if "--device cuda" in command and torch.cuda.is_available():
            continue                                     # minutes to hours at full size
        _, file, *words = shlex.split(command.split(" > ")[0])
        kind = next((w for w in words[:1] if w in SHORT), "train" if file == "train_toy.py" and (
            not words or words[0].startswith("-")) else "")
        if kind == "train" and "--out" in words:         # one part is enough, the second time
            words += ["--only", "decoder"]
        if "karlo-v1-alpha/" in words:                   # the small one knows 14 tokens a caption
            words[1] = "a fox"
        status, anew = 0, command.startswith(tuple(f"python {file}" for file in ANEW))
        try:
            if anew:
                if file != "tests/symbols.py":
                    mains[file](["--help"])
            elif file == "tests/experiments.py":
                status = mains[file]([*words, "candidates", "--out", "experiments.json"])
            elif file in mains:
                short = SHORT.get(kind, [])
                if "karlo-v1-alpha" in command:              # it has one upsampler
                    short = [*FEW[:-1], *short[len(FEW):]]
                status = mains[file]([*words, *short]) or 0
            elif words:                                  # without: a demo, see above
                status = CHAPTERS[file[:-3]].main(words)
        except SystemExit as end:
            status = end.code or 0
        said = "".join(capsys.readouterr())
        sorry = next((says for part, says in NOT_HERE.items() if part in command and not anew),
                     None)
        if sorry and not (sorry == "there is no device" and torch.cuda.is_available()):
            assert status == 2 and sorry in said, f"{command}: {said}"
        else:
            assert status == 0, f"{command}: {said}"
