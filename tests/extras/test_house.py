"""The six files need neither extras/ nor tests/; and a change of them changes no image.

    python tests/extras/test_house.py             records what the committed weights draw
"""
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import unclip

import pytest
import torch

import decoder
import train_toy

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

GOLDEN = ROOT / "tests/golden/toy_images.pt"      # of large images every eighth pixel
CAPTIONS = ["a small red circle above a large blue square", "a large green cross"]


def draw(model):
    """Name -> what the committed weights draw for fixed seeds: both priors, and section 3."""
    def seed(number):
        return {"generator": torch.Generator().manual_seed(number), "progress": False}
    found = {f"sample {prior}": model.sample(CAPTIONS, prior=prior, rerank=2, **seed(i))
             for i, prior in enumerate(("diffusion", "ar"))}
    a, b = found["sample diffusion"]
    found["variations"] = model.variations(a, 2, 0.2, steps=25, **seed(4))
    found["interpolate"] = model.interpolate(a, b, 3, steps=25, **seed(5))
    found["text_diff"] = model.text_diff(a, *CAPTIONS, 2, steps=25, **seed(6))
    hole = torch.zeros(256, 256)
    hole[128:] = 1
    found["inpaint"] = model.inpaint(a, hole, CAPTIONS[0], 2, steps=10, **seed(7))
    return {name: x[:, :, ::8, ::8].contiguous() for name, x in found.items()}


@pytest.mark.slow
def test_the_committed_weights_draw_the_same_images(toy):
    golden = torch.load(GOLDEN, weights_only=True)
    for name, x in draw(toy).items():
        assert (x - golden[name]).abs().max() < 1e-2, f"{name} is another image"


@pytest.mark.slow
def test_more_steps_of_the_first_upsampler_are_not_worse(toy):
    rng = random.Random(0)
    true = train_toy.render_many([train_toy.random_scene(rng) for _ in range(12)], 64)
    small, part = decoder.shrink(true, 16), toy.parts["upsampler1"]
    few, many = (train_toy.psnr(part.sample(small, steps), true) for steps in (2, 10))
    assert few > 36 and many > few - 0.5, f"{few:.1f} dB in 2 steps, {many:.1f} dB in 10"


if __name__ == "__main__":
    torch.save(draw(unclip.load(unclip.HERE / "weights/toy.pt")), GOLDEN)
