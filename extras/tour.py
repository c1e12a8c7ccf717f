"""A notebook of the whole: a section a chapter, each with the source of a function and a picture.

    python extras/tour.py          writes extras/tour.ipynb, after a chapter has changed

Outputs are not stored: they are what you get when you run it (on one core in half a minute).
"""
import argparse
import importlib
import inspect
import sys
import textwrap
from operator import attrgetter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import unclip

REPOSITORY = "https://github.com/OWNER/unclip"          # where a lecturer's fork is

START = f'''# in the cloud, with OWNER replaced: clones the chapters, installs their packages
import subprocess
import sys
from pathlib import Path

roots = [folder for folder in [Path.cwd(), *Path.cwd().parents, Path.cwd() / "unclip"]
         if (folder / "diffusion.py").exists()]
if not roots:
    subprocess.run(["git", "clone", "--depth", "1", "{REPOSITORY}", "unclip"], check=True)
    roots = [Path.cwd() / "unclip"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r",
                    str(roots[0] / "requirements.txt")], check=True)
sys.path.insert(0, str(roots[0]))

import math
import random

import matplotlib.pyplot as plt
import torch
from torch import nn
import clip, diffusion, train_toy, unclip

model = unclip.load(roots[0] / "weights/toy.pt")

def seed(number):
    return torch.Generator().manual_seed(number)

def draw(caption, size, number=0):            # an image of the toy world, (3, size, size)
    scene = train_toy.place(train_toy.parse(caption), random.Random(number))
    return train_toy.render(scene, size)

def show(title, images, labels, columns):     # (B, 3, H, W) in [-1, 1]
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 1.9 * rows + 0.4),
                                layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axis, image, label in zip(axes.flat, images, labels):
        axis.imshow(unclip.to_pil(image))
        axis.set_title(label, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    plt.show()'''

# the function; the idea; the cell that uses it; what to change
SECTIONS = [("diffusion.sample", """\
Adding noise to data is easy; a network that guesses the data in a noisy sample can undo it. Each
step moves a little towards that guess and, by Bayes' rule, adds a little fresh noise. Here the best
guess is a formula, so that all you see is the sampler's doing.""", '''\
eta = None
angle = torch.arange(5) * 2 * math.pi / 5
centres = 1.8 * torch.stack([angle.sin(), angle.cos()], dim=1)
alphabar = diffusion.cosine_alphabar(1000)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
figure.suptitle("Five Gaussians, sampled from noise")
for axis, K in zip(axes, [1, 3, 10, 100]):
    x = diffusion.sample(lambda x_t, t: diffusion.mixture_x0(alphabar, x_t, t, centres, 0.2),
                         alphabar, torch.randn(1500, 2, generator=seed(0)),
                         diffusion.spaced_timesteps(1000, K), predicts="x0", eta=eta,
                         generator=seed(1))
    axis.plot(*x.T, ".", markersize=2, alpha=0.5)
    axis.set(title=f"steps: {K}", xlim=(-3, 3), ylim=(-3, 3), aspect=1, xticks=[], yticks=[])
plt.show()''', "`eta = 0.0`: DDIM, without fresh noise. How many steps does it need?"),

("clip.zero_shot", """\
CLIP embeds images and captions in one space, where the two of a pair lie close. So captions
classify images with no training for it: the closest caption wins. A dark diagonal means that all
are right.""", '''\
captions = ["a small red circle", "a large red circle", "a small red square", "a large blue cross",
            "a small red circle above a large blue square",
            "a small blue circle above a large red square"]
part = model.part("clip")
images = torch.stack([draw(caption, part.config.image_size) for caption in captions])
tokens = model.tokenizer(captions, part.config.context)
probabilities = clip.zero_shot(part, images, tokens)        # (B, N)

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
axis.imshow(probabilities, cmap="Blues", vmin=0, vmax=1)
axis.set(title="Probability of each caption, for each image", xlabel="caption", ylabel="image of",
         xticks=range(len(captions)), yticks=range(len(captions)), yticklabels=captions)
axis.set_xticklabels(range(1, 1 + len(captions)))
for i, row in enumerate(probabilities.tolist()):
    for j, p in enumerate(row):
        axis.text(j, i, f"{p:.0%}", ha="center", va="center", color="gray", fontsize=8)
plt.show()''', 'Add `"a small blue square below a large red circle"`. Is the diagonal still dark?'),

("prior.DiffusionPrior.sample", """\
A caption fits many images, so one embedding of it cannot stand for them all. The prior draws one of
the image embeddings that the caption allows, by diffusion. Its samples (dots) should lie where the
embeddings of true images lie (rings).""", '''\
candidates, guidance = 1, 1.0
captions = ["a large red circle", "a large blue square", "a small green cross"]
text = model.encode_text(captions)
many = text.map(lambda x: x.repeat_interleave(40, dim=0))
z = model.part("diffusion_prior").sample(many, guidance=guidance, candidates=candidates,
                                         generator=seed(0))
images = torch.stack([draw(caption, 64, k) for caption in captions for k in range(40)])
true = clip.unit(model.encode_image(images))
plane = torch.pca_lowrank(true, 2)[2]                       # (D, 2) two principal components

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for k, caption in enumerate(captions):
    rows = slice(40 * k, 40 * k + 40)
    axis.plot(*(true[rows] @ plane).T, "o", color=f"C{k}", fillstyle="none", alpha=0.6)
    axis.plot(*(clip.unit(z[rows]) @ plane).T, ".", color=f"C{k}", label=caption)
axis.set(title="Rings: embeddings of true images; dots: drawn by the prior",
         xlabel="first principal component", ylabel="second")
axis.legend()
plt.show()''', "`candidates = 16`, or `guidance = 4.0`: does it still reach all of the rings?"),

("decoder.Decoder.denoiser", """\
The decoder is a diffusion model whose network is told the image embedding. Guidance runs it twice,
with and without the condition, and goes further in the direction of the difference. All columns
begin with the same noise.""", '''\
caption, scales = "a small red circle above a large blue square", [0.0, 1.0, 2.0, 5.0]
text = model.encode_text([caption] * 3)
z_i = model.sample_prior(text, generator=seed(0))
rows = [model.part("decoder").sample(z_i, text, steps=27, guidance=scale, generator=seed(1))
        for scale in scales]
show(f"{caption}, 16 px", torch.stack(rows, dim=1).flatten(0, 1),
     [f"guidance {scale}" for scale in scales] + [""] * 8, columns=4)''',
"`text = text.null()` below `z_i = ...`: what is lost without the caption?"),

("unclip.UnCLIP.text_diff", """\
All parts together invert CLIP: an image becomes its embedding and the noise that draws it again.
Turn the embedding in the direction from one caption to another, keep the noise, and the image is
edited. Left is the image, decoded again without an edit.""", '''\
source, target, strength = "a large red circle", "a large blue circle", 0.5
edits = model.text_diff(draw(source, 256), source, target, n=5, strength=strength, steps=50,
                        generator=seed(0))
show(f"from {source} to {target}", edits,
     [f"theta = {strength * k / 4:.2f}" for k in range(5)], columns=5)''',
'`target = "a large red square"`: is a shape edited as easily as a colour?'),

("train_toy.train", """\
One loop trains every part: draw a batch, take the gradient, step, average the weights. It takes any
module, and a function that returns the loss of a batch. Here a small network learns what the first
section had as a formula.""", '''\
predicts, steps = "eps", 800

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(34, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                                    nn.Linear(128, 2))

    def forward(self, x_t, t):                              # (B, 2), int or (B,) -> (B, 2)
        t = torch.as_tensor(t).expand(len(x_t))
        return self.layers(torch.cat([x_t, clip.sinusoid(t - 1, 32)], dim=1))

def batch_loss(progress):
    x0 = centres[torch.randint(5, (256,))] + 0.2 * torch.randn(256, 2)
    return diffusion.loss(network, alphabar, x0, predicts).mean()

network = Small()
losses = train_toy.train(network, train_toy.Recipe(steps, 256, 5e-3, ema=0.99), batch_loss)
x = diffusion.sample(network, alphabar, torch.randn(1500, 2, generator=seed(0)),
                     diffusion.spaced_timesteps(1000, 64), predicts=predicts, generator=seed(1))

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
left.plot(torch.tensor(losses).unfold(0, 20, 1).mean(1))
left.set(title="Loss, mean of 20 steps", xlabel="step", ylim=(0, None))
right.plot(*x.T, ".", markersize=2, alpha=0.5)
right.set(title="Samples of the trained network", xlim=(-3, 3), ylim=(-3, 3), aspect=1)
plt.show()''', '`predicts = "x0"`, then `"v"`; `steps = 100`. The loss of which means most?')]


def notebook():
    """-> the notebook, nbformat 4.5 as a dict: a start, then three cells for each chapter."""
    texts = [("markdown", "# A tour of unclip\n\nHow DALL·E 2 works, chapter by chapter: "
              "the idea, the code itself, a picture, one thing to change."), ("code", START)]
    for name, idea, code, change in SECTIONS:
        chapter, _, path = name.partition(".")
        source = inspect.getsource(attrgetter(path)(importlib.import_module(chapter)))
        texts += [("markdown", f"## {chapter}.py\n\n{idea}\n\n`{name}`:\n\n```python\n"
                               f"{textwrap.dedent(source)}```"),
                  ("code", code), ("markdown", f"**Change one thing.** {change}")]
    cells = []
    for i, (kind, text) in enumerate(texts):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write():
    unclip.write_json(HERE / "tour.ipynb", notebook())
    print("wrote extras/tour.ipynb")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write extras/tour.ipynb anew.").parse_args()
    unclip.stop_on_error(write)
