"""The six files need neither extras/ nor tests/; and their images are those of the first edition.

tests/golden/first_edition.pt holds what the first edition drew with its weights for fixed seeds, of
large images every eighth pixel. What predicts v differs a little: it went from v to x0 through eps
there, which at t = T cost four digits.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unclip

ROOT = Path(unclip.__file__).parent
FILES = ["diffusion.py", "clip.py", "prior.py", "decoder.py", "unclip.py", "train_toy.py"]
FEW = "--decoder-steps 3 --upsampler-steps 1 1"
TRAIN = "train_toy.py --groups 40 --steps-scale 0.01 --out run"
COMMANDS = [
    f"unclip.py sample 'a red circle' 'a blue square' -n 1 --prior ar --rerank 1 {FEW}",
    f"unclip.py sample 'a red circle' --rerank 1 {FEW} -o out.png",
    f"unclip.py variations out.png -n 1 {FEW}",
    f"unclip.py interpolate out.png out.png -n 1 {FEW}",
    f"unclip.py edit out.png --source 'a red circle' --target 'a blue circle' -n 1 {FEW}",
    f"unclip.py inpaint out.png 'a red circle' --mask mask.png -n 1 {FEW}",
    TRAIN, f"{TRAIN} --resume", f"unclip.py sample 'a red circle' --weights run/toy.pt {FEW}",
    "train_toy.py evaluate --captions 3 --conditions 'text embedding in its place'",
    "train_toy.py read out.png", "train_toy.py world",
    "diffusion.py", "clip.py", "prior.py", "decoder.py",
]


@pytest.mark.long
def test_the_deletion_test(tmp_path):
    """Copied without extras/ and tests/, the six files draw, train, resume and demonstrate."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    mask = torch.ones(1, 3, 256, 256)
    mask[:, :, :128] = -1
    unclip.save_grid(mask, tmp_path / "mask.png", 1)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    for command in COMMANDS:
        out = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, env=env,
                             capture_output=True, text=True)
        assert out.returncode == 0, f"python {command}: {out.stderr[-2000:]}"


# ---------------------------------------------------------------- the same images


@pytest.fixture(scope="module")
def golden():
    return torch.load(Path(__file__).parent.parent / "golden/first_edition.pt")


def seed(number):
    return torch.Generator().manual_seed(number)


def same(a, b, atol):
    return (a - b.float()).abs().max() < atol


@pytest.mark.slow
@pytest.mark.parametrize("which", ["diffusion", "ar"])
def test_priors_and_decoder_draw_what_the_first_edition_drew(toy, golden, which):
    text, z_i = toy.encode_text(golden["captions"]), golden[f"z_i {which}"]
    assert same(toy.sample_prior(text, which, generator=seed(1)), z_i, 1e-5)
    small = toy.sample_decoder(z_i, text, generator=seed(2))
    assert same(small, golden[f"small {which}"], 1e-2)


@pytest.mark.slow
def test_a_caption_becomes_the_image_of_the_first_edition(toy, golden):
    x = toy.sample(golden["captions"], rerank=2, generator=seed(3), progress=False)
    assert same(x[:, :, ::8, ::8], golden["sample diffusion"], 1e-2)


@pytest.mark.slow
def test_section_3_draws_what_the_first_edition_drew(toy, golden):
    a, b = golden["a"], golden["b"]
    z_i, x_T = toy.latent(a[None], 25)
    assert same(z_i, golden["latent z_i"], 1e-5) and same(x_T, golden["latent x_T"], 1e-2)
    x = toy.variations(a, 4, 0.2, steps=25, generator=seed(4))
    assert same(x[:, :, ::8, ::8], golden["variations"], 1e-2)
    x = toy.interpolate(a, b, 4, steps=25, generator=seed(5))
    assert same(x[:, :, ::8, ::8], golden["interpolate"], 1e-2)
    x = toy.text_diff(a, "a large red circle above a small blue square",
                      "a large green circle above a small blue square", 4, steps=25,
                      generator=seed(7))
    assert same(x[:, :, ::8, ::8], golden["text_diff"], 1e-2)
