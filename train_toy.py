"""Train the whole stack on a toy world, on a CPU, in minutes.

    python train_toy.py                                    everything, into runs/toy
    python train_toy.py --resume                           go on where that run stopped
    python train_toy.py --data FOLDER                      on your own images and captions
    python train_toy.py evaluate --weights runs/toy/toy.pt

Read `train` first: one loop trains all six parts. Then `losses_of`: what a batch is. `run` puts all
together. The toy world and its exact parser come last.

    B batch   S side of an image in px   D width of an embedding   L tokens   N rows of the data set
"""
import unclip                                     # first: it sets how idle threads wait

import argparse
import contextlib
import copy
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import distributed
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import clip
import decoder
import diffusion
import prior

plt.switch_backend("Agg")                         # draw into files, open no window

# ---------------------------------------------------------------- the training loop
def train(part, recipe, batch_loss, seed=0, state=None, save=None, name="", save_seconds=20.0):
    """Train one nn.Module -> its losses, one for each step; it ends with averaged weights.

    batch_loss(progress) draws a batch and returns its mean loss; progress goes from 0 to 1.
    save(state) receives what a later call needs as `state` to go on, every save_seconds (times d,
    if a save takes d > 1 seconds); the tensors in it change with the next step. Every step seeds
    torch anew: a resumed run draws what it would have drawn.   FloatingPointError: the loss is not
    finite
    """
    part.train()
    weights, optimizers = list(part.parameters()), make_optimizers(part, recipe)
    ema, losses = [w.detach().clone() for w in weights], []
    if state:
        with clip.reading(f"{name} in state.pt", "the state of this part"):
            part.load_state_dict(state["model"])
            for optimizer, moments in zip(optimizers, state["moments"], strict=True):
                optimizer.load_state_dict(copy.deepcopy(moments))
                if any(x.ndim and x.shape != w.shape for w, own in optimizer.state.items()
                       for x in own.values()):
                    raise ValueError("moments of another size")
            ema = [x.to(w, copy=True).view_as(w)
                   for x, w in zip(state["ema"], weights, strict=True)]
            losses = list(state["losses"])

    rank, next_save = rank_and_world()[0], time.monotonic() + save_seconds
    bar = tqdm(range(len(losses), recipe.steps), name, initial=len(losses), total=recipe.steps,
               disable=rank > 0)

    for step in bar:
        draws = ((seed * 1_000_003 + step) * 10_007 + rank) % 2 ** 63
        torch.manual_seed(draws)

        # learning rate: a warm-up, then a cosine to zero
        fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps) if recipe.cosine else 1.0
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * min((step + 1) / (1 + recipe.warmup), fall)

        # forward and backward
        part.zero_grad()
        loss = batch_loss(step / recipe.steps)
        loss.backward()
        if recipe.sam:
            with worst_nearby(weights, recipe.sam):
                torch.manual_seed(draws)          # the same batch
                batch_loss(step / recipe.steps).backward()
        average_over_processes(w.grad for w in weights if w.grad is not None)

        # clip the gradient's norm (but for a scalar, CLIP's temperature), and update
        torch.nn.utils.clip_grad_norm_([w for w in weights if w.ndim], 1.0)
        for optimizer in optimizers:
            optimizer.step()

        # exponential moving average (EMA) of the weights, over fewer steps at the beginning
        decay = min(recipe.ema, (1 + step) / (10 + step))
        for average, w in zip(ema, weights):
            average.lerp_(w.detach(), 1 - decay)

        # report, and save what a resumed run needs
        value = loss.detach()
        average_over_processes([value])
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of {name or 'the part'} is {losses[-1]} at step "
                                     f"{step}; try a smaller learning rate, or another --seed")
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if save and time.monotonic() >= next_save:
            start = time.monotonic()
            save({"model": part.state_dict(), "moments": [o.state_dict() for o in optimizers],
                  "ema": ema, "losses": losses})
            end = time.monotonic()
            next_save = end + save_seconds * max(1, end - start)

    for w, average in zip(weights, ema):
        w.data.copy_(average)
    part.eval()
    return losses


def losses_of(name, part, data, recipe):
    """-> batch_loss(progress) for one part of the stack: what it is trained on."""
    batch = recipe.batch // rank_and_world()[1]             # rows of this process

    def clip_batch(progress):
        part.logit_scale.data.clamp_(max=math.log(99.99))  # CLIP sec. 2.5; from 100 on: no gradient
        rows = data.groups(batch, data.curriculum(progress))               # with hard negatives
        tokens = data.tokens[rows, :data.mask[rows].sum(1).max()]

        # the contrastive loss compares the rows of all processes
        z_i, z_t = map(gather, part(data.images(rows, data.size), tokens))
        ids = gather(data.ids[rows])
        loss = clip.clip_loss(z_i, z_t, part.scale(), ids)
        if recipe.uniformity and progress < 2 / 3:
            loss = loss + recipe.uniformity * uniformity_loss(z_i, z_t, ids)
        return loss

    def prior_batch(progress):                              # of either prior
        rows = data.rows(batch)
        return part.loss(data.z_i[rows], data.text(rows)).mean()

    def decoder_batch(progress):
        rows = data.rows(batch)
        t = logit_normal(part.config.T, batch) if recipe.logit_normal else None
        images, text = data.images(rows, part.config.unet.size), data.text(rows)
        return part.loss(images, data.z_i[rows], text, t).mean()

    def upsampler_batch(progress):
        rows = data.rows(batch // max(1, recipe.crops))
        high, low = part.prepare(data.draw(rows, part.config.unet.size), recipe.crops)  # on the CPU
        return part.loss(high.to(data.device), low.to(data.device)).mean()

    return {"clip": clip_batch, "diffusion_prior": prior_batch, "ar_prior": prior_batch,
            "decoder": decoder_batch}.get(name, upsampler_batch)


# ---------------------------------------------------------------- recipes and optimisers
@dataclass
class Recipe:
    """How one part is trained. Weight decay is for matrices: not gains, biases, scalars."""
    steps: int
    batch: int                    # rows in a step, over all processes
    lr: float                     # peak learning rate of AdamW
    muon: float = 0.0             # peak learning rate of Muon, 0: none
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema: float = 0.0              # decay of the averaged weights, 0: none (CLIP)
    eps: float = 1e-8             # Adam's
    warmup: int = 50              # steps
    cosine: bool = True           # False: a constant learning rate after the warm-up
    sam: float = 0.0              # rho of sharpness-aware minimisation, 0: none
    logit_normal: bool = False    # timesteps; else uniform ones
    uniformity: float = 0.0       # weight of CLIP's uniformity_loss
    sinusoidal: bool = False      # CLIP's initial positions
    whitened: bool = False        # the decoder's initial projections of z_i
    crops: int = 4                # of an upsampler's image, a quarter of the side; 0: all of it


TOY = {                           # steps, batch, lr, muon, weight_decay, beta2
    "clip": Recipe(1100, 128, 1e-3, 3e-3, 0.1, 0.98, uniformity=1.0, sinusoidal=True),
    "diffusion_prior": Recipe(350, 128, 1e-3, 0.0, 0.06, 0.96, ema=0.99),
    "ar_prior": Recipe(580, 64, 1e-3, 3e-3, 0.04, 0.96, ema=0.99),
    "decoder": Recipe(2400, 64, 2e-3, 8e-3, ema=0.99, logit_normal=True, whitened=True),
    "upsampler1": Recipe(500, 8, 2e-3, 1e-2, ema=0.99, crops=0),
    "upsampler2": Recipe(500, 8, 2e-3, 1e-2, ema=0.99)}
FLAT = {"warmup": 0, "cosine": False}
PAPER = {                         # table 3 and (CLIP) appendix C; Radford et al. 2021: 32 epochs
    "clip": Recipe(635_000, 32_768, 3e-4, 0.0, 0.2, 0.98, eps=1e-6, warmup=2000),
    "diffusion_prior": Recipe(600_000, 4096, 1.1e-4, 0.0, 6e-2, 0.96, 0.9999, 1e-6, **FLAT),
    "ar_prior": Recipe(1_000_000, 4096, 1.6e-4, 0.0, 4e-2, 0.91, 0.999, 1e-10, **FLAT),
    "decoder": Recipe(800_000, 2048, 1.2e-4, ema=0.9999, **FLAT),
    "upsampler1": Recipe(1_000_000, 1024, 1.2e-4, ema=0.9999, **FLAT),
    "upsampler2": Recipe(1_000_000, 512, 1e-4, ema=0.9999, **FLAT)}
RECIPES = {"toy": TOY, "paper": PAPER}            # of each preset


def make_optimizers(part, recipe):
    """AdamW; or Muon for the matrices and convolutions inside the blocks, AdamW for the rest."""
    inner, rest = [], []
    for name, w in part.named_parameters():
        in_block = recipe.muon and w.ndim > 1 and re.search(r"blocks\.|down\.|mid_|up\.", name)
        (inner if in_block else rest).append(w)
    adamw = torch.optim.AdamW(
        [{"params": [w for w in rest if w.ndim > 1], "peak_lr": recipe.lr},
         {"params": [w for w in rest if w.ndim <= 1], "peak_lr": recipe.lr, "weight_decay": 0.0}],
        betas=(0.9, recipe.beta2), eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True)
    muon = [Muon([{"params": inner, "peak_lr": recipe.muon}], recipe.weight_decay)] if inner else []
    return [adamw, *muon]


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update is made orthogonal: all directions are learnt at one pace
    (Jordan et al. 2024); of a convolution, too: a matrix with a row for each output channel."""

    def __init__(self, weights, weight_decay=0.0, momentum=0.95, lr=1e-3):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group, w in ((group, w) for group in self.param_groups for w in group["params"]):
            if w.grad is None:
                continue

            # momentum, Nesterov's
            average = self.state[w].setdefault("average", torch.zeros_like(w))
            average.lerp_(w.grad, 1 - group["momentum"])
            g = w.grad.lerp(average, group["momentum"]).flatten(1)

            # the shorter side of the matrix first
            update = orthogonal(g) if g.shape[0] <= g.shape[1] else orthogonal(g.T).T
            w.mul_(1 - group["lr"] * group["weight_decay"])
            rate = 0.2 * max(g.shape) ** 0.5 * group["lr"]                 # Liu et al. 2025
            w.sub_(update.reshape(w.shape), alpha=rate)


def orthogonal(g):
    """g (m, n), m <= n, with its singular values s brought near 1 (0.68 to 1.20, if s > 0.002 |g|).

    Newton-Schulz: at norm 1 s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5, five times, by way of
    a = g g^T, which is small: (m, m). q is the product of all steps.
    """
    identity = q = torch.eye(len(g), dtype=g.dtype, device=g.device)
    a = g @ g.T
    square = a.trace().clamp(min=1e-14)                                    # |g|^2
    a = a / square
    for _ in range(5):
        p = torch.addmm(identity, a, a, beta=3.4445, alpha=2.0315) - 4.775 * a
        q, a = p @ q, p @ a @ p
    return q @ g / square.sqrt()


@contextlib.contextmanager
def worst_nearby(weights, rho):
    """Sharpness-aware minimisation: meanwhile the weights are the worst nearby, w + rho g / |g|; a
    second backward pass takes the gradient there.   SAM eq. 2-3; unCLIP app. C: rho = 0.1"""
    weights = [w for w in weights if w.grad is not None]
    before, gradients = [w.detach().clone() for w in weights], [w.grad for w in weights]
    norm = torch.nn.utils.get_total_norm(gradients) + 1e-12
    for w, g in zip(weights, gradients):
        w.data.add_(g, alpha=float(rho / norm))
        w.grad = None
    yield
    for w, old in zip(weights, before):
        w.data.copy_(old)


# ---------------------------------------------------------------- what only the toy needs
# These pay in a run of minutes, the shorter the more; PAPER does without. On one seed CLIP finds
# the caption of an unseen image among the four of `swaps` in 99.5 % of 400; without hard negatives
# in 66.3, without the curriculum in 97.0, without Muon in 96.3. What each buys in the end is in
# extras/README.md, "What a training trick buys".


def sinusoidal_start(part):
    """CLIP's initial positions, by which neighbours are alike, and tokens; without: CLIP 96.8."""
    n, W = part.config.image_size // part.config.patch, part.config.image_width
    row, column = torch.arange(n * n) // n, torch.arange(n * n) % n
    part.image.pos.data[1:] = 0.3 * torch.cat([clip.sinusoid(row, W // 2),
                                               clip.sinusoid(column, W // 2)], dim=1)
    part.text.pos.data = 0.1 * clip.sinusoid(torch.arange(part.config.context),
                                             part.config.text_width)
    nn.init.normal_(part.text.tok.weight, std=0.1)


def whitened_start(part, z_i):
    """The decoder's initial projections of z_i, by which all directions of the data count alike.

    z_i (N, D). Along principal axis k of variance p_k the gain is sqrt(p_k) / (p_k + ridge), the
    ridge 2 % of the largest, so that directions of noise alone stay small.
    """
    power, basis = torch.linalg.eigh(z_i.T.cov())
    gain = power.clamp(min=0).sqrt() / (power + 0.02 * power[-1] + 1e-12)
    white = basis * gain @ basis.T / len(basis) ** 0.5
    for layer in (part.image_emb, part.image_tokens):
        layer.weight.data = torch.randn_like(layer.weight) @ white
        layer.bias.data = -layer.weight.data @ z_i.mean(0)


def uniformity_loss(z_i, z_t, ids, scale=80.0):
    """Pushes different captions, and their images, apart (Wang & Isola 2020): `clip_loss` of each
    modality with itself, from 2 log(B) to 0. Without: CLIP 97.5."""
    return clip.clip_loss(z_i, z_i, scale, ids) + clip.clip_loss(z_t, z_t, scale, ids)


def logit_normal(T, B):
    """Logit-normal timesteps (B,) in 1..T: mostly the middle, where shapes and colours are decided;
    one from each of B parts that are equally likely (SD3, Esser et al. 2024 sec. 3.1)."""
    u = (torch.arange(B) + torch.rand(B)) / B
    t = T * torch.sigmoid(1.2 * torch.special.ndtri(u) - 0.1)
    return 1 + t.long().clamp(max=T - 1)


def hard_negatives(rng, two):
    """Four placed training scenes, three in one respect different from the first (half of the
    one-object groups: all shapes). Only with "a blue circle above a red square" in its batch must
    CLIP know which of the two is red in "a red circle above a blue square"."""
    first = random_scene(rng, two=two, split_of="train")
    others = [Scene(stated(first).objects, MIRROR[first.relation])] if two else []
    if not two and rng.random() < 0.5:
        only = first.objects[0]
        others = [Scene((replace(only, shape=s),)) for s in SHAPES if s != only.shape]

    others = [scene for scene in others if split(scene) == "train"]
    for _ in range(30):                           # some scenes have few neighbours in training
        if len(others) == 3:
            break
        new = edit(first, rng)
        if split(new) == "train" and new != first and new not in others:
            others.append(new)
    others += [first] * (3 - len(others))
    return [first] + [place(scene, rng) for scene in others]


def edit(scene, rng):
    """A stated scene -> one that differs in one respect. Of two objects: colours or shapes
    exchanged, relation reversed or turned, a shape or a size changed; of one: an attribute."""
    objects = list(stated(scene).objects)
    if len(objects) == 2 and rng.random() < 4 / 6:
        _, colours, reverse, shapes = swaps(scene)
        level = scene.relation in ("left of", "right of")
        turned = rng.choice(("above", "below") if level else ("left of", "right of"))
        return rng.choice((colours, reverse, shapes, Scene(tuple(objects), turned)))

    i = rng.randrange(len(objects))
    old = objects[i]
    new = [replace(old, shape=rng.choice([s for s in SHAPES if s != old.shape])),
           replace(old, size="large" if old.size == "small" else "small")]
    if len(objects) == 1:
        new.append(replace(old, colour=rng.choice([c for c in COLOURS if c != old.colour])))
    objects[i] = rng.choice(new)
    return Scene(tuple(objects), scene.relation)


# ---------------------------------------------------------------- data
# A data source is any object with
#     captions              a list of N strings
#     images(rows, size)    -> (len(rows), 3, size, size) in [-1, 1]
# and, if it likes,
#     group                 so many consecutive rows belong together, as hard negatives do; else 1
#     curriculum(progress)  the fraction of the rows, from the start, that CLIP sees; else 1.0


class World:
    """Scenes of the toy world in groups of four: the first fifth has one object; the first two
    thirds use only "left of" and "above", which are "right of" and "below" seen the other way."""
    group, one_object, two_relations = 4, 0.2, 0.65

    def __init__(self, groups, seed=0):
        rng, self.scenes = random.Random(seed), []
        for i in range(groups):
            scenes = hard_negatives(rng, two=i >= self.one_object * groups)
            early = i < self.two_relations * groups
            self.scenes += [scene.canonical() for scene in scenes] if early else scenes
        self.captions = [caption(scene) for scene in self.scenes]

    def curriculum(self, progress):
        early = self.one_object if progress < 0.1 else self.two_relations
        return early if progress < 0.35 else 1.0

    def images(self, rows, size):
        return render_many([self.scenes[i] for i in rows], size)


class Folder:
    """Your own images: NAME.png, or any other kind that Pillow opens, with its caption in NAME.txt;
    scaled and centre-cropped. What cannot be read is left out and counted."""

    def __init__(self, folder):
        self.paths, self.captions, left_out = [], [], []
        with clip.reading(folder, "a folder"):
            paths = sorted(Path(folder) / name for name in os.listdir(folder))
        for path in paths:
            try:
                text = path.with_suffix(".txt")
                if path.suffix.lower() in Image.registered_extensions() or (
                        path != text and text in paths):              # of a kind that is left out
                    clip.preprocess(path, 8)
                    self.captions.append(read_caption(text))
                    self.paths.append(path)
            except (OSError, ValueError) as error:
                left_out.append(f", the first: {path.name} ({error})")

        found = (f"{len(self.paths)} images with captions in {folder}; {len(left_out)} left out"
                 + "".join(left_out[:1]))
        if len(self.paths) < 2:
            raise ValueError("expected two or more images, NAME.png or another kind, each with its "
                             f"caption in NAME.txt, found {found}")
        print(found)

    def images(self, rows, size):
        return torch.stack([clip.preprocess(self.paths[i], size) for i in rows])


def read_caption(path):
    """The text of a file in UTF-8, or in UTF-16 with a mark.   ValueError if it is empty, or other.

    Note: older encodings cannot be told apart; guessing one would train on wrong letters.
    """
    with clip.reading(path.name, "a caption in UTF-8, or UTF-16 with a byte-order mark"):
        data = path.read_bytes()
        utf_16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = data.decode("utf-16" if utf_16 else "utf-8-sig").strip()
        if "\0" in text or not clip.has_text(text):
            raise ValueError("it is empty, or not text")
        return text


class Data:
    """A data source, with what is computed from it once: tokens, mask (N, L), of which CLIP reads
    the first config.clip.context; ids (N,), equal where the tokens are; z_i, z_t (N, D), unit; and
    states, CLIP's (N, CLIP's L, W) if the decoder reads the caption in them, else (N, 0)."""

    def __init__(self, source, tokenizer, config, device):
        self.source, self.device, self.size = source, device, config.clip.image_size
        self.reads_states = config.decoder.text_layers == 0                # CLIP's, by the decoder
        self.group = getattr(source, "group", 1)
        self.curriculum = getattr(source, "curriculum", lambda progress: 1.0)

        # captions
        L = config.clip.context
        tokens = tokenizer(source.captions, L, truncate=True)              # (N, L)
        cut = sum(len(tokenizer.encode(text)) > L - 2 for text in source.captions)
        if cut:
            print(f"{cut} of {len(tokens)} captions have more than {L} tokens, start and end "
                  "included; the rest of them is cut off")
        mask, pad = clip.token_mask(tokens, tokenizer.end), (0, config.decoder.context - L)
        self.tokens, self.mask = F.pad(tokens, pad).to(device), F.pad(mask, pad).to(device)
        self.ids = self.tokens.unique(dim=0, return_inverse=True)[1]       # (N,)

        # images, one byte a channel
        self.stored = torch.cat([((self.draw(rows, self.size) + 1) * 127.5).round().byte()
                                 for rows in self.chunks("drawing images")])

    def __len__(self):
        return len(self.tokens)

    def chunks(self, what):
        return tqdm(torch.arange(len(self)).split(500), desc=what, leave=False)

    def draw(self, rows, size):
        images = self.source.images(rows.tolist(), size)
        if images.shape != (len(rows), 3, size, size) or not images.abs().max() <= 1:
            raise ValueError(f"expected {len(rows)} images (3, {size}, {size}) in [-1, 1] from the "
                             f"data source, got {tuple(images.shape)} up to {images.abs().max():g}")
        return images

    @torch.no_grad()
    def embed(self, model):                       # once CLIP is trained
        found = []
        for rows in self.chunks("embedding"):
            z_t, states = model.encode_text(self.tokens[rows, :model.config.context])
            found.append((model.encode_image(self.images(rows, self.size)), z_t,
                          states if self.reads_states else z_t[:, :0]))
        z_i, z_t, self.states = map(torch.cat, zip(*found))
        self.z_i, self.z_t = clip.unit(z_i), clip.unit(z_t)

    def rows(self, n):                            # random
        return torch.randint(len(self), (n,))

    def groups(self, n, fraction=1.0):            # n random rows in groups, of the first fraction
        if n % self.group or len(self) % self.group:
            raise ValueError(f"expected {len(self)} rows of data, and a batch of {n}, in whole "
                             f"groups of {self.group}; set --batch, or the source's group")
        groups = max(1, int(fraction * len(self)) // self.group)
        first = torch.randint(groups, (n // self.group,)) * self.group
        return (first[:, None] + torch.arange(self.group)).flatten()

    def images(self, rows, size):                 # at most CLIP's size
        return decoder.shrink(self.stored[rows].to(self.device).float() / 127.5 - 1, size)

    def text(self, rows):
        return clip.Text(self.tokens[rows], self.mask[rows], self.z_t[rows], self.states[rows])


# ---------------------------------------------------------------- a run: all parts, into a folder
def option(default, help, **how):                 # a setting and its option on the command line
    how |= {"action": "store_true"} if default is False else {}
    return field(default=default, metadata={"help": help, **how})


@dataclass
class Settings:
    """Of a run, from Python or from the command line.   ValueError out of range"""
    out: str = option("runs/toy", "the folder to write into", type=unclip.named)
    preset: str = option("toy", "the networks and their recipes", choices=RECIPES)
    resume: bool = option(False, "go on where the run in --out stopped")
    only: list | None = option(None, "train only these, over the run's CLIP (if it has none, that "
                               "first)", nargs="+", choices=unclip.PARTS)
    steps_scale: float = option(1.0, "all steps times this", type=unclip.number(1e-12, 1e6))
    batch: int | None = option(None, "rows in a step, over all processes (default: the recipe's)",
                               type=unclip.positive)
    seed: int = option(0, "of all randomness", type=unclip.seed)
    sam: float = option(0.0, "rho of CLIP's sharpness-aware minimisation; the paper's is 0.1",
                        type=unclip.number(0.0, 1e6))
    vocab: str | None = option(None, "a tokenizer to use, not to learn from the captions: OpenAI's "
                               "merges file, or a folder with vocab.json and merges.txt",
                               type=unclip.named)
    save_seconds: float = option(20.0, "seconds between saves; times d, if one takes d > 1",
                                 type=unclip.number(0.0, 1e6))
    device: str = option("cpu", "cpu, cuda, mps")
    dtype: str = option("fp32", "of matrix products; the weights are float32",
                        choices=("fp32", "tf32", "bf16"))
    recompute: bool = option(False, "less memory: compute activations again in the backward pass")
    compile: bool = option(False, "with torch.compile")

    def __post_init__(self):
        for own in fields(self):
            value, check = getattr(self, own.name), own.metadata.get("type")
            if check and (value, own.default) != (None, None):
                setattr(self, own.name, check(value))
            choices = own.metadata.get("choices")
            given = value if own.name == "only" else [value]               # a list, or None
            if choices and not {*(given or ())} <= {*choices}:
                raise ValueError(f"expected {own.name} out of {', '.join(choices)}, got {value!r}")


def run(source, settings):
    """Train the stack on a data source, part after part, into a folder; or go on where a run
    stopped. -> the UnCLIP, which is saved there, too."""
    rank, world = join(settings.device)
    device, out = unclip.pick_device(settings.device), Path(settings.out)
    if settings.dtype == "tf32" and device.type != "cuda":
        raise ValueError("--dtype tf32 speeds up CUDA alone; leave it out, or give --device cuda")
    if settings.resume and not out.exists():
        raise FileNotFoundError(f"there is no run in {out}; --resume needs the --out of one")
    with locked(out) if rank == 0 else contextlib.nullcontext():
        recipes = scaled_recipes(settings, world)
        state = open_run(source, settings, out / "state.pt", rank)
        tokenizer = clip.Tokenizer(**state["tokenizer"])
        words = {word for text in source.captions for word in clip.split_words(clip.clean(text))}
        config = copy.deepcopy(unclip.PRESETS[settings.preset])
        for own in (config.clip, config.diffusion_prior, config.ar_prior, config.decoder):
            own.vocab_size = len(tokenizer)
        data, parts = Data(source, tokenizer, config, device), dict.fromkeys(unclip.PARTS)

        for name, recipe in recipes.items():
            if name not in state["done"]:
                if settings.only and name not in (*settings.only, "clip"):
                    continue
                train_part(name, recipe, data, config, state, settings)
            part = parts[name] = fresh_part(name, recipe, data, config, settings.seed)
            with clip.reading(f"{name} in {out / 'state.pt'}", "weights of this size"):
                part.load_state_dict(state["done"][name])

            # what the next parts are trained on; samples of those trained so far
            if name == "clip":
                data.embed(part)
            model = unclip.UnCLIP(config, parts, tokenizer, sorted(words))
            model.device, model.low_memory = device, device.type != "cpu"
            if rank == 0 and parts["decoder"] and not (out / f"{name}.png").exists():
                draw_samples(model, data, out / f"{name}.png")
            part.to("cpu")                        # the next part needs the room on the GPU

        if rank == 0:
            model.save(out / f"{settings.preset}.pt", dtype=torch.half)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in state["seconds"].items())
    print(f"wrote {out / settings.preset}.pt, trained in {sum(state['seconds'].values()):.0f} s: "
          f"{spent}")
    if world > 1:
        distributed.destroy_process_group()
    return model


def scaled_recipes(settings, world):
    """The preset's recipes with the run's steps and batch.   ValueError for impossible ones."""
    recipes, unit = {}, 4 * world                 # groups of four, four crops, processes
    for name, recipe in RECIPES[settings.preset].items():
        steps = max(2, round(recipe.steps * settings.steps_scale))
        recipes[name] = replace(recipe, steps=steps, batch=settings.batch or recipe.batch,
                                warmup=min(recipe.warmup, steps // 5),
                                sam=settings.sam if name == "clip" else 0.0)
        if recipes[name].batch % unit:
            raise ValueError(f"expected a batch that is a multiple of {unit}, got "
                             f"{recipes[name].batch} for {name}; set --batch")
    return recipes


def open_run(source, settings, file, rank):
    """The state of a run, fresh or resumed.   ValueError if the folder holds another run."""
    digest = zlib.crc32("\n".join(source.captions).encode("utf-8", "replace"))
    new = asdict(settings) | {"captions": f"(--data, --groups) of checksum {digest:x}"}
    if settings.resume:
        state = unclip.read_checkpoint(file, "unclip run 4")
        with clip.reading(file, "the state of a run"):
            for key in ("settings", "tokenizer", "done", "current", "losses", "seconds"):
                state[key].values()
            clip.Tokenizer(**state["tokenizer"])
        halfway = ("batch", "dtype") if any(state["current"].values()) else ()
        for key in ("preset", "seed", "steps_scale", "sam", "vocab", "captions", *halfway):
            if state["settings"].get(key) != new[key]:
                raise ValueError(f"{file} is of a run with {key} {state['settings'].get(key)}, not "
                                 f"{new[key]}; resume with the former, or choose another --out")
        return state | {"settings": new}

    images = [f"{name}.png" for name in ("losses", *unclip.PARTS)]
    for old in map(file.with_name, ("state.pt", f"{settings.preset}.pt", *images)):
        if rank == 0 and old.exists():
            raise ValueError(f"{old} is there already; --resume goes on, or choose another --out")
    if settings.vocab is None:
        most = 1024 if settings.preset == "toy" else 16_384          # the toy world needs 580
        tokenizer = clip.Tokenizer.train(source.captions, most)
    else:
        from extras import karlo                  # public vocabularies: only they need extras/
        tokenizer = karlo.load_tokenizer(settings.vocab)
    return {"format": "unclip run 4", "settings": new, "tokenizer": tokenizer.state(),
            "done": {}, "current": {}, "losses": {}, "seconds": {}}


def train_part(name, recipe, data, config, state, settings):
    """Train one part of a run, which then holds its weights as state["done"][name]."""
    part, out = fresh_part(name, recipe, data, config, settings.seed), Path(settings.out)
    guess = {"clip": math.log(recipe.batch) * (1 + 2 * recipe.uniformity), "diffusion_prior": 0.289,
             "ar_prior": math.log(config.ar_prior.buckets)}.get(name, 1.0)
    print(f"{name}: {sum(w.numel() for w in part.parameters()) / 1e6:.2f} M parameters, "
          f"{recipe.steps} steps of {recipe.batch}; a guess has a loss of {guess:.3g}", flush=True)
    start = time.monotonic() - state["seconds"].get(name, 0.0)

    def save(halfway):
        state["current"][name], state["seconds"][name] = halfway, time.monotonic() - start
        if rank_and_world()[0] == 0:
            unclip.write_atomically(out / "state.pt", lambda file: torch.save(state, file))

    switch_speed(part, settings)
    losses = train(part, recipe, losses_of(name, part, data, recipe), settings.seed,
                   state["current"].get(name), save, name, settings.save_seconds)

    if name == "diffusion_prior":
        rows = torch.arange(len(data))[::max(1, len(data) // 500)]
        part.fit_variance(data.z_i[rows], data.text(rows),
                          generator=torch.Generator().manual_seed(settings.seed))
    state["done"][name] = {key: w.cpu() for key, w in part.state_dict().items()}
    state["losses"][name] = losses
    save({})
    if rank_and_world()[0] == 0:
        draw_losses(state["losses"], out / "losses.png")


def fresh_part(name, recipe, data, config, seed):
    """A part before training, with what it takes from the data."""
    torch.manual_seed((seed + list(unclip.PARTS).index(name)) % 2 ** 63)
    own = getattr(config, name)
    if name == "ar_prior":
        own.components = prior.principal_components(data.z_i)[1].shape[1]
        own.buckets = min(own.buckets, len(data))

    part = unclip.PARTS[name](own)
    if recipe.sinusoidal:
        sinusoidal_start(part)
    if recipe.whitened:
        whitened_start(part, data.z_i.cpu())
    part = part.to(data.device).eval()
    if name == "ar_prior":
        part.fit_codes(data.z_i, data.z_t)
    return part


def switch_speed(part, settings):
    """The speed switches of Settings; what each gains is in extras/README.md."""
    if settings.dtype == "tf32":                  # CUDA: float32 products of 10 bits
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True    # off since unclip.pick_device
    if settings.dtype == "bf16":                  # CUDA; a CPU takes 1.15 to 11 times as long
        device = next(part.parameters()).device.type
        part.forward = torch.autocast(device, torch.bfloat16)(part.forward)

    for block in part.modules():
        if settings.recompute and type(block).__name__ in ("Block", "ResBlock", "Attention"):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if settings.compile and isinstance(block, (clip.Block, decoder.UNet)):
            block.compile(dynamic=False if isinstance(block, decoder.UNet) else None)
    part.to(memory_format=torch.channels_last)    # convolutions: no copies at every call


def locked(folder):
    """-> a file in the folder, made if need be, which no other run can lock while it is open."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --out names a folder")
    folder.mkdir(parents=True, exist_ok=True)
    unclip.writable(folder / "state")             # now, not at the first save
    file = open(folder / "lock", "a")
    with contextlib.suppress(ImportError):        # Windows has no fcntl, and no lock
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is training into {folder}; wait for it, or choose "
                             "another --out") from None
    return file


def draw_losses(losses, path):
    """One small chart for each part: the loss, smoothed over 1 % of the steps."""
    figure, axes = plt.subplots(1, len(losses), figsize=(3 * len(losses), 2.4), squeeze=False)
    for axis, (name, values) in zip(axes[0], losses.items()):
        n = max(1, len(values) // 100)
        axis.plot(np.arange(n - 1, len(values)), np.convolve(values, np.ones(n) / n, "valid"))
        axis.set(title=name, xlabel="step", yscale="log")
    save_figure(figure, path)


def draw_samples(model, data, path):
    """Some captions of the data, drawn by the parts trained so far from the true z_i."""
    n = max(1, 8 * 256 // model.config.upsampler2.unet.size)               # two of 1024 px
    rows, generator = torch.linspace(0, len(data) - 1, n).long(), torch.Generator().manual_seed(0)
    x = model.sample_decoder(data.z_i[rows], data.text(rows), generator=generator)
    for name, steps in zip(("upsampler1", "upsampler2"), model.config.sampling.upsampler_steps):
        if model.parts[name]:
            x = model.part(name).sample(x, steps, generator=generator)
    unclip.save_grid(F.interpolate(x, 256, mode="nearest"), path, columns=4)


def save_figure(figure, path):
    figure.tight_layout()
    unclip.save_figure(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------- many processes
# torchrun --nproc-per-node=N train_toy.py ...: each holds all weights and draws its own rows of
# every batch; gradients are averaged. One process needs none of this.


def join(device):
    """-> (rank, world): (0, 1), or this process's place among those that torchrun started."""
    if "RANK" in os.environ and not distributed.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
        if distributed.get_rank():
            sys.stdout = open(os.devnull, "w")    # only the first one prints
    return rank_and_world()


def rank_and_world():
    one = not distributed.is_initialized()
    return (0, 1) if one else (distributed.get_rank(), distributed.get_world_size())


def average_over_processes(tensors):              # in place
    for x in tensors if distributed.is_initialized() else ():
        distributed.all_reduce(x)
        x /= rank_and_world()[1]


def gather(x):
    """The rows of all processes, (B, ...) -> (B world, ...), with the gradients of its own."""
    rank, world = rank_and_world()
    if world == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(world)]
    distributed.all_gather(rows, x.detach().contiguous())
    if x.requires_grad:                           # they are averaged where the sum is meant
        x.register_hook(lambda gradient: world * gradient)
    return torch.cat([*rows[:rank], x, *rows[rank + 1:]])


# ---------------------------------------------------------------- evaluation

BEST = "diffusion prior, best of 4"               # drawn four times, CLIP chooses: the default
CONDITIONS = (BEST, "diffusion prior", "AR prior", "true image embedding",
              "text embedding in its place", "caption alone")


def evaluate(args):
    """Draw captions that training never showed, under each condition, and parse the images.

    Accuracy: every stated attribute is right, by the exact parser, at full size. Outlines: IoU and
    PSNR, mean and 10th percentile, see `outline`. Then what fails most.
    """
    model, start = unclip.load(args.weights, unclip.pick_device(args.device)), time.monotonic()
    rng, n = random.Random(args.seed), max(1, 2 * args.captions // 5)
    kinds = {"one object": (n, False, "test"), "two objects": (args.captions - n, True, "test"),
             "held-out pairs": (n, None, "held-out")}
    sets = {kind: [random_scene(rng, two, part) for _ in range(many)]
            for kind, (many, two, part) in kinds.items() if many}
    rows = {condition: score(model, sets, condition, args.seed) for condition in args.conditions}

    names = [key for key, value in rows[args.conditions[0]].items() if isinstance(value, float)]
    print("| condition | " + " | ".join(names) + " |\n|" + "---|" * (1 + len(names)))
    for condition, row in rows.items():
        cells = [f"{100 * row[k]:.1f} %" if k in sets else f"{row[k]:.3f}" for k in names]
        print(f"| {condition} | " + " | ".join(cells) + " |")
    for condition, row in rows.items():
        for key in ("wrong attributes", "wrong pairs"):
            most = ", ".join(f"{n} {name}" for name, n in row[key].most_common(3))
            print(f"{condition}, {key}: {most or 'none'}")
    counts = ", ".join(f"{len(scenes)} {name}" for name, scenes in sets.items())
    print(f"{counts}; {time.monotonic() - start:.0f} s")
    if args.json:
        unclip.write_json(args.json, {"captions": counts, "seed": args.seed, "rows": rows})


@torch.no_grad()
def score(model, sets, condition, seed=0):
    """sets {name: scenes} -> all that `evaluate` prints about one of CONDITIONS, a dict."""
    scenes, generator = sum(sets.values(), []), torch.Generator().manual_seed(seed)
    wrong, outlines = [], []
    for i in tqdm(range(0, len(scenes), 20), desc=condition, leave=False):
        some = scenes[i:i + 20]
        captions = [caption(scene) for scene in some for _ in range(4 if condition == BEST else 1)]
        true = render_many(some, model.config.clip.image_size)
        text = model.encode_text(captions)
        z_i = embedding(model, condition, text, true, generator)
        small = model.sample_decoder(z_i, text, generator=generator)
        if condition == BEST:
            small = model.rerank(small, text.z_t[::4])
        for scene, image in zip(some, model.upsample(small, generator=generator).cpu()):
            seen = read(image)
            wrong.append(mistakes(scene, seen))
            outlines += outline(image, seen)

    verdicts = iter(wrong)
    row = {name: float(np.mean([not next(verdicts) for _ in own])) for name, own in sets.items()}
    for name, values in zip(("IoU", "PSNR"), np.array(outlines or [(0.0, 0.0)]).T):
        row[name] = float(values.mean())
        row[f"{name}, 10th percentile"] = float(np.quantile(values, 0.1))
    row["wrong attributes"] = Counter(name for some in wrong for name in some)
    row["wrong pairs"] = Counter(" and ".join(sorted(o.shape for o in scene.objects))
                                 for scene, some in zip(scenes, wrong) if some)
    return row


def embedding(model, condition, text, images, generator):
    """What the decoder receives as image embedding under one of CONDITIONS (paper fig. 8), (B, D);
    only "true image embedding" gets to see the (true) images."""
    if condition == "true image embedding":
        return clip.unit(model.encode_image(images))
    if condition == "text embedding in its place":
        return clip.unit(text.z_t)
    if condition == "caption alone":
        return torch.zeros_like(text.z_t)
    which = "ar" if condition == "AR prior" else "diffusion"
    return model.sample_prior(text, which, generator=generator)


def outline(image, seen):
    """[(IoU, PSNR)] of an image and a clean rendering of what the parser reads in it; [] if there
    is none. IoU: intersection over union of the pixels with ink."""
    if not seen.objects or any(o.shape == "blob" or o.colour == "unclear" for o in seen.objects):
        return []
    clean = render(seen, image.shape[1])
    a, b = (((1 - x) / 2).amax(0) > INK for x in (image, clean))
    return [(float((a & b).sum() / (a | b).sum()), psnr(image, clean))]


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [-1, 1], so the peak is 2:  10 lg(4 / mse)."""
    return float(10 * (4 / (a - b).square().mean()).log10())


# ---------------------------------------------------------------- the toy world: scenes, captions

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {                                       # R, G, B in 0..1; a shade adds +-SHADE to all
    "red": (0.88, 0.10, 0.12), "orange": (0.92, 0.50, 0.08), "yellow": (0.92, 0.84, 0.10),
    "green": (0.12, 0.62, 0.20), "cyan": (0.12, 0.78, 0.86), "blue": (0.12, 0.26, 0.88),
    "purple": (0.56, 0.14, 0.72), "black": (0.08, 0.08, 0.08)}
SIZES = {"small": (0.126, 0.148), "large": (0.182, 0.222)}            # range of r
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT = {("red", "triangle"), ("yellow", "cross"), ("green", "circle"), ("purple", "square")}
SHADE, TILT, MARGIN, GAP = 0.08, 8.0, 0.02, 0.08
DIAGONAL = 0.6         # largest ratio of the centres' distances, across to along the relation
# Times r: a square's half side, a triangle's inner radius, a cross's half length and half width
SQUARE, TRIANGLE, CROSS, ARM = 0.92, 0.675, 1.15, 0.36
AREA = math.pi, 4 * SQUARE ** 2, 27 ** 0.5 * TRIANGLE ** 2, 8 * CROSS * ARM - 4 * ARM ** 2  # r ** 2


@dataclass(frozen=True)
class Object:
    """What captions state (compared by ==), then what they leave open (not compared). x, y, r in
    units of the image's side; y grows downwards, like the rows of a tensor."""
    shape: str
    colour: str
    size: str = ""                                                   # "": unstated
    x: float | None = field(default=None, compare=False)             # centre of mass, 0..1
    y: float | None = field(default=None, compare=False)
    r: float | None = field(default=None, compare=False)
    tilt: float | None = field(default=None, compare=False)          # degrees, clockwise
    shade: float | None = field(default=None, compare=False)         # -1..1


@dataclass(frozen=True, eq=False)
class Scene:
    """One object, or two and a relation. "A above B" == "B below A": they are the same image."""
    objects: tuple
    relation: str = ""

    def mirrored(self):                           # described from the other object's side
        return Scene(self.objects[::-1], MIRROR[self.relation])

    def canonical(self):                          # described by "left of" or "above"
        return self.mirrored() if self.relation in ("right of", "below") else self

    def key(self):                                # all that == compares
        return self.canonical().relation, self.canonical().objects

    def __eq__(self, other):
        return isinstance(other, Scene) and self.key() == other.key()

    def __hash__(self):
        return hash(self.key())


def caption(scene):
    """"a small red circle", "an orange cross left of a large black square". What `read` could not
    make out has a caption, too, which `parse` refuses: "nothing", "a small red blob"."""
    phrases = [" ".join(filter(None, (o.size, o.colour, o.shape))) for o in scene.objects]
    phrases = [("an " if words[0] in "aeiou" else "a ") + words for words in phrases]
    return f" {scene.relation or 'and'} ".join(phrases) or "nothing"


def parse(text):
    """The scene that a caption states, its open attributes None. ValueError for any other text."""
    one = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    match = re.fullmatch(rf"{one}(?: ({'|'.join(MIRROR)}) {one})?", text)
    if not match:
        raise ValueError('expected a caption such as "a small red circle above a large blue square"'
                         f", got {text!r}; use one or two of {', '.join(SHAPES)}, in "
                         f"{', '.join(COLOURS)}, and {', '.join(MIRROR)}")
    size, colour, shape, relation, size2, colour2, shape2 = match.groups(default="")
    first, second = Object(shape, colour, size), Object(shape2, colour2, size2)
    return Scene((first, second), relation) if relation else Scene((first,))


def agrees(stated, seen):
    """Is all that `stated` states right in `seen`? An unstated size may be any but "unclear"."""
    return not mistakes(stated, seen)


def mistakes(stated, seen):
    """What is wrong in `seen`: "number" alone, or "relation", "colour", "shape", "size", as few as
    explain it."""
    a, b = stated.canonical(), seen.canonical()
    if len(a.objects) != len(b.objects):
        return ["number"]

    # the relation holds, or else the objects may be in the other order
    found = []
    for seen_objects, relation in ((b.objects, a.relation != b.relation), (b.objects[::-1], True)):
        pairs = list(zip(a.objects, seen_objects))
        wrong = {"relation": relation,
                 "colour": any(s.colour != t.colour for s, t in pairs),
                 "shape": any(s.shape != t.shape for s, t in pairs),
                 "size": any(t.size == "unclear" or s.size not in ("", t.size) for s, t in pairs)}
        found.append([name for name in wrong if wrong[name]])
    return min(found, key=len)


def stated(scene, sizes=True):
    """The scene as its caption states it, nothing placed; without sizes on request."""
    return Scene(tuple(Object(o.shape, o.colour, o.size if sizes else "") for o in scene.objects),
                 scene.relation)


def split(scene):
    """"held-out" if a colour-shape pair is one that training never shows, else "train" or "test".
    Sizes do not count: else training could show a test scene with its sizes unstated."""
    if any((o.colour, o.shape) in HELD_OUT for o in scene.objects):
        return "held-out"
    words = caption(stated(scene.canonical(), sizes=False))
    return "test" if zlib.crc32(words.encode()) % 8 == 0 else "train"


def swaps(scene):
    """Four scenes, stated, that share all words with a two-object scene: itself; colours exchanged;
    relation reversed; shapes exchanged. Some are equal if the two objects are."""
    a, b = stated(scene).objects
    return [Scene((a, b), scene.relation),
            Scene((replace(a, colour=b.colour), replace(b, colour=a.colour)), scene.relation),
            Scene((a, b), MIRROR[scene.relation]),
            Scene((replace(a, shape=b.shape), replace(b, shape=a.shape)), scene.relation)]


def random_scene(rng, two=None, split_of=None, unstated=0.15):
    """A random scene, placed; rng: random.Random. Of two objects with probability 0.7 unless `two`
    is given; a size is unstated with probability `unstated`; split_of: see `split`, or any."""
    while True:
        both = rng.random() < 0.7 if two is None else two
        objects = [Object(rng.choice(SHAPES), rng.choice(tuple(COLOURS)),
                          "" if rng.random() < unstated else rng.choice(tuple(SIZES)))
                   for _ in range(1 + both)]
        scene = Scene(tuple(objects), rng.choice(tuple(MIRROR)) if both else "")
        if split_of in (None, split(scene)):
            return place(scene, rng)


def place(scene, rng):
    """Draw what the caption leaves open. Bounding boxes keep MARGIN from the rim, and GAP from each
    other along the relation's axis; across it, centres differ by at most DIAGONAL times as much."""
    if scene.relation in ("right of", "below"):
        return place(scene.mirrored(), rng).mirrored()
    while True:                                   # draw again if too large together, or diagonal
        objects = [replace(o, r=rng.uniform(*SIZES[o.size or rng.choice(tuple(SIZES))]),
                           tilt=rng.uniform(-TILT, TILT), shade=rng.uniform(-1, 1))
                   for o in scene.objects]
        boxes = [reach(o.shape, o.r, o.tilt) for o in objects]
        at = [[rng.uniform(MARGIN + before, 1 - MARGIN - after) for before, after in box]
              for box in boxes]                   # [object][0: x, 1: y]

        if len(objects) == 2:
            main = int(scene.relation == "above")                    # the relation's axis
            (before, after), (before2, after2) = boxes[0][main], boxes[1][main]
            least = after + GAP + before2                            # distance of the centres
            slack = 1 - 2 * MARGIN - before - least - after2
            a, b = sorted((slack * rng.random(), slack * rng.random()))
            at[0][main], at[1][main] = MARGIN + before + a, MARGIN + before + b + least
            if slack < 0 or abs(at[1][1 - main] - at[0][1 - main]) > DIAGONAL * (b + least - a):
                continue
        placed = [replace(o, x=x, y=y) for o, (x, y) in zip(objects, at)]
        return Scene(tuple(placed), scene.relation)


def reach(shape, r, tilt):
    """How far a shape extends from its centre: ((left, right), (up, down)), each positive."""
    if shape == "triangle":
        corners = [math.radians(tilt + a) for a in (-90, 30, 150)]
        xs, ys = ([2 * TRIANGLE * r * f(a) for a in corners] for f in (math.cos, math.sin))
        return (-min(xs), max(xs)), (-min(ys), max(ys))
    c, s = math.cos(math.radians(tilt)), abs(math.sin(math.radians(tilt)))
    half = r * {"circle": 1, "square": SQUARE * (c + s), "cross": CROSS * c + ARM * s}[shape]
    return (half, half), (half, half)


# ---------------------------------------------------------------- the toy world: scene -> pixels
def render(scene, size):
    """One placed scene -> (3, size, size) in [-1, 1]."""
    return render_many([scene], size)[0]


def render_many(scenes, size):
    """Placed scenes -> (B, 3, size, size) in [-1, 1]; below 64 px drawn at 64 px and averaged.
    Objects never overlap: an image is white minus, for each, coverage * (white - colour)."""
    objects = [o for scene in scenes for o in scene.objects]
    image = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.objects])
    numbers = torch.tensor([(SHAPES.index(o.shape), o.x, o.y, o.r, o.tilt) for o in objects])
    cover = coverage(*numbers.T, max(size, 64))                           # (N, H, W)
    if size < 64:
        cover = F.interpolate(cover[:, None], (size, size), mode="area")[:, 0]

    ink = torch.tensor([[1 - c - SHADE * o.shade for c in COLOURS[o.colour]] for o in objects])
    drawn = -2 * ink[:, :, None, None] * cover[:, None]                   # (N, 3, H, W)
    return torch.ones(len(scenes), 3, size, size).index_add_(0, image, drawn)


def coverage(shape, x, y, r, tilt, size):
    """How much of each pixel an object covers: clamp(1/2 - signed distance in pixels).
    index into SHAPES, x, y, r, tilt: (N,) each -> (N, size, size) in 0..1"""
    # pixels relative to the centre, turned back by the tilt
    centre = (torch.arange(size) + 0.5) / size
    cos, sin = tilt.deg2rad().cos()[:, None], tilt.deg2rad().sin()[:, None]
    dx, dy = centre - x[:, None], centre - y[:, None]                     # (N, W), (N, H)
    u = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]                   # (N, H, W)
    v = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]                   # (N, H, W)

    away = torch.empty_like(u)
    for i, name in enumerate(SHAPES):
        n = (shape == i).nonzero()[:, 0]
        away[n] = distance(name, u[n], v[n], r[n, None, None])
    return (0.5 - size * away).clamp_(0, 1)


def distance(shape, u, v, r):
    """Signed distance from (u, v) to an upright shape around (0, 0); negative inside. For straight
    shapes the largest to a side's line (cross: of the nearer bar), so that corners stay sharp."""
    if shape == "circle":
        return (u * u + v * v).sqrt() - r
    if shape == "triangle":                                               # three half planes
        return torch.maximum(v, 0.75 ** 0.5 * u.abs() - 0.5 * v) - TRIANGLE * r
    long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    if shape == "square":
        return long - SQUARE * r
    return torch.maximum(long - CROSS * r, short - ARM * r)


# ---------------------------------------------------------------- the exact parser: pixels -> scene

INK, SPECK, UNEXPLAINED = 0.45, 0.008, 0.10       # limits: ink of a pixel, area, energy of a fit
MOVES = torch.cat([torch.zeros(1, 4), torch.eye(4), -torch.eye(4)])       # (9, 4) of x, y, r, tilt


def read(image):
    """The scene in an image (3, S, S) in [-1, 1], S = 16 or S >= 32; exact on clean images.

    No learning: find the connected patches of ink (ink = white - pixel), ignore specks, fit every
    shape to every patch and take the one that leaves least unexplained. What is no scene agrees
    with no caption: none or more than two objects; a shape "blob"; a colour or size "unclear"; two
    objects "beside" one another, on a diagonal.
    """
    S = image.shape[-1]
    if image.shape != (3, S, S) or S != 16 and S < 32:
        raise ValueError("expected a square image (3, S, S), S = 16 or S >= 32, got "
                         f"{tuple(image.shape)}; crop or resize it")
    if not image.abs().max() <= 2:                # NaN is not
        raise ValueError(f"expected pixels in [-1, 1], got {image.max():g}; divide 0..255 by 127.5 "
                         "and subtract 1")
    size = min(S, 32)
    ink = F.interpolate((1 - image.detach().float().cpu()[None]) / 2, (size, size), mode="area")[0]

    patch = patches(ink.amax(0) > INK)                                    # (N, H, W) bool
    objects = tuple(fit(ink, patch)) if len(patch) else ()
    relation = relation_of(*objects) if len(objects) == 2 else ""
    return Scene(objects, relation).canonical()


def relation_of(a, b):
    """Where a lies, seen from b; the longer of the two axes decides."""
    across, down = b.x - a.x, b.y - a.y
    if 0.8 < abs(across) / (abs(down) + 1e-6) < 1 / 0.8:
        return "beside"
    if abs(across) > abs(down):
        return "right of" if across < 0 else "left of"
    return "below" if down < 0 else "above"


def dilate(label):                                # (H, W): the largest of each pixel's neighbours
    return F.max_pool2d(label[None], kernel_size=3, stride=1, padding=1)[0]


def patches(mask):
    """(H, W) bool -> (N, H, W) bool, a layer for each connected patch of more than SPECK. Every
    pixel has its own number; the largest of a patch floods it."""
    label, last = torch.arange(1.0, 1 + mask.numel()).view_as(mask) * mask, None
    while last is None or not torch.equal(label, last):
        label, last = dilate(label) * mask, label
    patch = label == label[mask].unique()[:, None, None]
    return patch[patch.float().mean((1, 2)) > SPECK]


def grow(patch):
    """(N, H, W) bool -> the same, grown by 1/8 of the image, but never into another patch."""
    number = torch.arange(1.0, 1 + len(patch))[:, None, None]
    label = (number * patch).sum(0)
    for _ in range(len(label) // 8):
        label = torch.where(label > 0, label, dilate(label))
    return label == number


def fit(ink, patch):
    """Least squares over shape, place, size, tilt, colour.  (3, H, W), (N, H, W) -> N Objects.
    A compass search for each of the 4 shapes: try a step each way in x, y, r and tilt; go to the
    best of the 9 places, or halve the steps where staying is best."""
    # start from the centre of mass and the area of the patch
    N, around, patch = len(patch), grow(patch).float(), patch.float()
    size, mass = patch.shape[1], patch.sum((1, 2))                        # (N,)
    centre = (torch.arange(size) + 0.5) / size
    at = torch.stack([patch.sum(1) @ centre / mass, patch.sum(2) @ centre / mass,
                      mass.sqrt() / size, 0 * mass], dim=1)               # (N, 4) of x, y, r, tilt
    at = at[:, None].repeat(1, 4, 1)                                      # (N, 4, 4), a row a shape
    at[:, :, 2] /= torch.tensor(AREA) ** 0.5

    # search
    step = torch.tensor([0.02, 0.02, 0.02, 8.0]).expand(N, 4, 4)
    for _ in range(10):
        trial = at[:, :, None] + step[:, :, None] * MOVES                 # (N, 4, 9, 4)
        trial[..., 3].clamp_(-1.5 * TILT, 1.5 * TILT)                     # else a square on its tip
        colour, explained = explain(ink, around, trial)
        best = explained.argmax(2)[:, :, None, None]                      # (N, 4, 1, 1) of 9 moves
        at = trial.gather(2, best.expand(N, 4, 1, 4))[:, :, 0]            # (N, 4, 4)
        step = step * torch.where(best[:, :, 0] == 0, 0.5, 1.0)

    # the shape that leaves the smallest fraction of the ink's energy unexplained
    energy = (around * ink.square().sum(0)).sum((1, 2))                   # (N,)
    lost = 1 - explained.amax(2) / energy[:, None]                        # (N, 4)
    rgb = 1 - colour.gather(2, best.expand(N, 4, 1, 3))[:, :, 0]          # (N, 4, 3)
    return [describe(i, lost[n, i], rgb[n, i], *at[n, i].tolist())
            for n, i in enumerate(lost.argmin(1).tolist())]


def explain(ink, around, trial):
    """Hypotheses (N, 4, 9, 4) of x, y, r, tilt -> best inks (N, 4, 9, 3), energies (N, 4, 9). For a
    coverage a the best ink is d = <a, ink> / <a, a>, which explains the energy <a, a> |d|^2."""
    N, size = len(trial), ink.shape[1]
    shape = torch.arange(4)[None, :, None].expand(N, 4, 9)
    a = coverage(shape.flatten(), *trial.flatten(0, 2).T, 32)             # (36 N, 32, 32)
    a = F.avg_pool2d(a, 2) if size == 16 else a                           # (36 N, H, W)
    a = (a.unflatten(0, (N, 36)) * around[:, None]).flatten(2)            # (N, 36, H W)

    power = a.square().sum(2, keepdim=True).clamp(min=1e-6)               # (N, 36, 1)  <a, a>
    d = a @ ink.flatten(1).T / power                                      # (N, 36, 3)
    explained = (d * d * power).sum(2)                                    # (N, 36)
    return d.unflatten(1, (4, 9)), explained.unflatten(1, (4, 9))


def describe(shape, lost, rgb, x, y, r, tilt):
    """A fit -> an Object; "blob" or "unclear" for what is not of this world."""
    # the nearest colour, each with the shade that suits it best
    off = rgb - torch.tensor(list(COLOURS.values()))                      # (8, 3)
    shade = (off.mean(1) / SHADE).clamp(-2, 2)                            # (8,)
    off = (off - SHADE * shade[:, None]).norm(dim=1)                      # (8,) distance to a shade
    c = int(off.argmin())

    half_gap = (SIZES["large"][0] - SIZES["small"][1]) / 2
    sizes = [s for s, (low, high) in SIZES.items() if low - half_gap < r < high + half_gap]
    return Object(SHAPES[shape] if lost < UNEXPLAINED else "blob",
                  list(COLOURS)[c] if off[c] < 0.16 else "unclear",
                  sizes[0] if sizes else "unclear", x, y, r, tilt, shade[c].item())


# ---------------------------------------------------------------- command line
def run_training(args):
    """Train the whole stack. Other commands: read IMAGE, world, evaluate (COMMAND --help)."""
    if args.data is not None and args.groups is not None:
        raise ValueError("--groups are the toy world's; leave them out with --data")
    if args.data is not None and os.path.realpath(args.data) == os.path.realpath(args.out):
        raise ValueError(f"{args.out} holds your images; --out names another folder")
    source = World(args.groups or 6000, args.seed) if args.data is None else Folder(args.data)
    try:
        run(source, Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}))
    except KeyboardInterrupt:
        how = "; --resume goes on from the last save" * Path(args.out, "state.pt").exists()
        raise KeyboardInterrupt("stopped" + how) from None


def run_read(args):
    """Print the caption of an image of the toy world."""
    print(caption(read(clip.open_image(args.image))))


def run_world(args):
    """A sheet of random scenes: captions above, what the parser reads below."""
    rng, (figure, axes) = random.Random(args.seed), plt.subplots(3, 6, figsize=(12.6, 9.6))
    for axis in axes.flat:
        scene = random_scene(rng)
        image = render(scene, 256)
        axis.imshow(unclip.to_pil(image))
        axis.set_title(caption(scene).replace(" a", "\na"), fontsize=9)
        axis.set_xlabel(f"read: {caption(read(image))}".replace(" a", "\na"), fontsize=8)
        axis.set(xticks=[], yticks=[])
    save_figure(figure, args.out)
    print(f"wrote {args.out}: 18 scenes, captions above, what the parser reads below")


COMMANDS = {"read": run_read, "world": run_world, "evaluate": evaluate, "": run_training}
SHARED = {"read": (), "world": ("seed",), "evaluate": ("seed", "device")}      # with a run


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in SHARED else ""
    parser = argparse.ArgumentParser(
        f"train_toy.py {command}".strip(), description=COMMANDS[command].__doc__.split("\n\n")[0],
        allow_abbrev=False, formatter_class=unclip.HelpFormatter)
    add = parser.add_argument
    for own in fields(Settings):
        if command == "" or own.name in SHARED[command]:
            add("--" + own.name.replace("_", "-"), default=own.default, **own.metadata)

    if command == "read":
        add("image", help="of 16 px, or 32 and more; its middle square is read")
    elif command == "world":
        add("-o", "--out", default="world.png", type=unclip.image_name, help="the file to write")
    elif command == "evaluate":
        add("--weights", default=str(unclip.HERE / "weights/toy.pt"), type=unclip.named,
            help="a checkpoint")
        add("--captions", type=unclip.positive, default=500,
            help="2/5 of one object, 3/5 of two; and as many of held-out pairs as of one")
        add("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS,
            help="what the decoder receives as image embedding")
        add("--json", metavar="PATH", type=unclip.writable, help="write all numbers there, too")
    else:
        add("--data", metavar="FOLDER", type=unclip.named, help="your images, NAME.png or another "
            "kind, each with its caption in NAME.txt (without: the toy world)")
        add("--groups", type=unclip.positive, help="of four scenes, in the toy world: 6000")
    unclip.stop_on_error(COMMANDS[command], parser.parse_args(argv))


if __name__ == "__main__":
    main()
