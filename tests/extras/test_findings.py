"""extras/findings.py: what is measured is what it is called, and every row of its tables runs."""
import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "extras"))
import findings
import train_toy
import unclip
from findings import Setting

QUICK = {"fresh": {"priors_cost", "binding", "clip_guided"},            # the others are long
         "committed": {*findings.FINDINGS} - {"refinement"}}             # which enlarges all images


@pytest.fixture
def scenes():
    return findings.some_scenes(0, 3, two=False)


@pytest.fixture(params=["committed", "fresh"])
def weights(request, toy, tmp_path, monkeypatch):
    """The committed weights, or some that have learnt nothing."""
    setting, fewer = unclip.UnCLIP.setting, {"decoder_steps": 2, "prior_steps": 2}
    monkeypatch.setattr(unclip.UnCLIP, "setting", lambda self, name, given: fewer.get(
        name, setting(self, name, given)))
    monkeypatch.setattr(findings, "STEPS", 2)
    monkeypatch.setattr(findings, "GROUPS", 5)
    findings.training_set.cache_clear()
    model = toy
    if request.param == "fresh":
        model = unclip.build(toy.config)
        model.tokenizer, model.words = toy.tokenizer, toy.words
    model.save(tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name, weights", [
    pytest.param(name, kind, marks=() if name in QUICK[kind] else pytest.mark.long)
    for name in findings.FINDINGS for kind in ("committed", "fresh")], indirect=["weights"])
def test_every_finding_draws_a_figure_and_gives_numbers_even_if_nothing_was_learnt(
        name, weights, tmp_path, capsys):
    findings.main(["figures", "--only", name, "--scenes", "2", "--seeds", "2", "--weights",
                   str(weights), "--out", str(tmp_path)])
    row = json.loads((tmp_path / "findings.json").read_text())[name]
    assert (tmp_path / f"{name}.png").stat().st_size > 3000
    assert row["sentence"] in capsys.readouterr().out and "nan" not in json.dumps(row).lower()
    assert all(abs(x) < 1e9 for pair in row["numbers"].values() for x in pair)


@pytest.mark.parametrize("content", ['["mine"]', '{"pca": "mine"}', '{"pca": {}}', "{", "3"])
def test_what_is_no_table_of_findings_is_named_and_kept(weights, tmp_path, capsys, content):
    (tmp_path / "findings.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        findings.main(["figures", "--weights", str(weights), "--out", str(tmp_path)])
    assert "findings.json cannot be read as findings" in capsys.readouterr().err
    assert (tmp_path / "findings.json").read_text() == content


@pytest.mark.long
def test_the_other_commands_run(weights, tmp_path, capsys):
    where = ["--scenes", "2", "--weights", str(weights)]
    findings.main(["experiments", *where, "--out", str(tmp_path)])
    findings.main(["bounds", *where])
    findings.main(["gallery", *where[2:], "--out", str(tmp_path)])
    findings.main(["ablate", "--scenes", "2", "--out", str(tmp_path), "--groups", "40", "--seeds",
                   "1", "--steps-scale", "0.002", "--only", "z_i", "curriculum", "v_prediction"])
    table = capsys.readouterr().out
    assert re.search(r"\| v prediction \| 0( \| \d\.\d{3}){3} \| decoder \|", table)


@pytest.mark.slow
def test_only_the_true_embedding_is_of_an_image_and_only_the_caption_alone_of_the_baseline(
        toy, scenes):
    """The same captions again, with other true images, or with another decoder as baseline."""
    moved = [train_toy.place(s, findings.random.Random(7)) for s in scenes]
    fresh = copy.copy(toy)
    fresh.parts = toy.parts | {"decoder": unclip.build("toy").parts["decoder"]}
    for condition in ("caption alone", "true image embedding"):
        plain, other, based = (
            findings.draw(toy, some, Setting(condition), 0, baseline).images
            for some, baseline in ((scenes, None), (moved, None), (scenes, fresh)))
        assert torch.equal(plain, other) == (condition == "caption alone"), "z_i: of an image?"
        assert torch.equal(plain, based) == (condition != "caption alone"), condition


def measured(toy, scenes, name, images):
    drawn = findings.SimpleNamespace(model=toy, scenes=scenes, images=images, size=images.shape[-1])
    return float(findings.MEASURES[name](drawn))


def test_psnr_has_a_peak_of_2_and_diversity_is_1_for_true_images(toy, scenes):
    true = train_toy.render_many(scenes, 16)[:, None]
    assert measured(toy, scenes, "PSNR", true + 0.2) == pytest.approx(20.0, abs=1e-3), "peak 1?"
    rng, many = findings.random.Random(1), scenes * 100
    again = [train_toy.render_many([train_toy.place(s, rng) for s in many], 16) for _ in range(2)]
    assert measured(toy, many, "diversity", torch.stack(again, 1)) == pytest.approx(1.0, abs=0.15)


def test_frechet_distances_of_gaussians_are_the_closed_form():
    """|m - m'|^2 + sum (s - s')^2, if the covariances are diagonal."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)            # (8, 3)
    unit = corners * (7 / 8) ** 0.5                                        # covariance: identity
    a, b = unit * torch.tensor([1.0, 2, 3]), 4 + unit * torch.tensor([2.0, 2, 1])
    assert findings.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert findings.frechet(a, b) == pytest.approx(3 * 16 + 1 + 0 + 4), "a root too few?"


def test_rows_of_a_figure_are_settings_and_columns_scenes(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(train_toy, "save_figure", lambda figure, path: kept.append(figure))
    rows = {"first": torch.full((3, 3, 4, 4), -1.0), "second": torch.full((3, 3, 4, 4), 1.0)}
    findings.draw_grid(tmp_path / "a.png", rows, ["a", "b", "c"], "title")
    axes = kept[0].axes
    shades = [int(axis.images[0].get_array().mean()) for axis in axes]
    assert shades == [0, 0, 0, 255, 255, 255] and axes[3].get_ylabel() == "second"
    assert [axis.get_title() for axis in axes] == ["a", "b", "c", "", "", ""]


def test_the_numbers_are_mean_and_deviation_over_the_seeds(monkeypatch):
    monkeypatch.setattr(findings, "draw", lambda model, scenes, setting, seed, baseline: seed)
    monkeypatch.setitem(findings.MEASURES, "accuracy", lambda seed: [1, 2, 6][seed])
    numbers = findings.measure(None, findings.Finding("", "", {"": {"x": Setting()}}), 3, 2)
    assert numbers["x: accuracy"] == pytest.approx((3.0, 7 ** 0.5))        # (4 + 1 + 9) / 2


def test_captions_are_answered_in_any_order_unless_they_state_a_relation():
    a, b = train_toy.Object("circle", "red", "small"), train_toy.Object("cross", "blue", "large")
    anything = train_toy.Scene((train_toy.Object("", "red"),))
    assert findings.fits(anything, train_toy.Scene((a,)))
    assert not findings.fits(anything, train_toy.Scene((b,)))
    assert findings.fits(train_toy.Scene((a, b, a)), train_toy.Scene((b, a, a)))
    assert not findings.fits(train_toy.Scene((a, b), "above"), train_toy.Scene((b, a), "above"))


@pytest.mark.parametrize("way, once", [
    ("red red blue", 1), ("red blue blue", 1), ("red green blue", 0), ("red blue red blue", 0),
    ("blue red blue", 0), ("red red red", 0), ("red - blue", 0)])
def test_an_attribute_switches_once_if_nothing_comes_between_and_nothing_returns(way, once):
    row = [train_toy.Scene(() if colour == "-" else (train_toy.Object("cross", colour, "small"),))
           for colour in way.split()]
    ends = [train_toy.Scene((train_toy.Object("cross", colour, "small"),))
            for colour in ("red", "blue")]
    alike, d = [ends[0], ends[0]], SimpleNamespace
    assert findings.switches_once(d(scenes=[ends], seen=[row]), "colour") == once
    assert findings.switches_once(d(scenes=[ends, alike], seen=[row, row]), "colour") == once, \
        "of pairs that differ alone"


def test_a_path_leads_from_every_second_scene_to_the_next_with_their_captions(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(toy, "interpolate", lambda a, b, n, *words, **how: (
        seen.append((train_toy.read(a), train_toy.read(b), words)), torch.ones(n, 3, 16, 16))[1])
    scenes = findings.some_scenes(0, 4, two=False)
    for told in (False, True):
        findings.draw(toy, scenes, Setting("interpolation", 3, (), told=told))
    ends = [tuple(findings.caption(s) for s in scenes[i:i + 2]) for i in (0, 2)]
    assert [tuple(map(findings.caption, (a, b))) for a, b, _ in seen] == 2 * ends
    assert [words for *_, words in seen] == [(), (), *ends]


def test_the_best_errors_enclose_the_gaussian_closed_form():
    torch.manual_seed(0)
    ab, worlds = torch.tensor([1.0, 0.6]).double(), 0.7 * torch.randn(2, 2000, 2)
    low, high = findings.best_errors(ab, worlds, 1)
    true = 0.49 * 0.4 / (0.6 * 0.49 + 0.4)
    assert 0.9 * true < low < 1.05 * true and 0.95 * true < high < 1.1 * true


def test_each_trick_left_out_changes_a_recipe_a_target_or_a_function():
    for name, trick in findings.TRICKS.items():
        toy, parts = train_toy.TOY, trick.parts
        changed = any(replace(toy[part], **trick.recipe) != toy[part] for part in parts)
        changed |= any(getattr(unclip.PRESETS["toy"], part).predicts != trick.predicts
                       for part in parts if trick.predicts)
        assert changed or trick.changes, name
