"""The toy world: pictures whose right caption is known, and the loop that trains on them.

A scene is one or two flat things on a white unit square: a shape, a colour, a size, a relation.
A caption says exactly that ("a small red circle above a large blue square"); what it leaves open
(exact place, exact size, tilt, shade) varies freely. `render` draws a scene, `read` finds it again
in any picture, with no learning in it, so that the accuracy of a caption is exact.

    B pictures   N things or hypotheses   H, W pixels   x, y, r in units of the picture's side;
    y grows downwards, like the rows of a tensor; tilt in degrees, shade in -1..1
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import collections
import copy
import datetime
import functools
import gc
import itertools
import json
import math
import random
import re
import shutil
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import clip
import decoder
import diffusion
import prior
import unclip

matplotlib.use("Agg")                             # draw into files, no window
import matplotlib.pyplot as plt

VOCABULARY = {"toy": 1024, "paper": 16384}        # tokens at most; the toy world needs about 580

# ---- The world: scenes and their captions --------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {                                       # R, G, B in 0..1; a shade adds +-SHADE to all
    "red": (0.88, 0.10, 0.12), "orange": (0.92, 0.50, 0.08), "yellow": (0.92, 0.84, 0.10),
    "green": (0.12, 0.62, 0.20), "cyan": (0.12, 0.78, 0.86), "blue": (0.12, 0.26, 0.88),
    "purple": (0.56, 0.14, 0.72), "black": (0.08, 0.08, 0.08)}
SIZES = {"small": (0.126, 0.148), "large": (0.182, 0.222)}            # range of r
MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT = {("red", "triangle"), ("yellow", "cross"), ("green", "circle"), ("purple", "square")}
SHADE, TILT, MARGIN, GAP = 0.08, 8.0, 0.02, 0.08
DIAGONAL = 0.6           # how far centres may differ on the other axis, as a share of this one
# Times r: a square's half side, a triangle's inner radius, a cross's half length and half width
SQUARE, TRIANGLE, CROSS, ARM = 0.92, 0.675, 1.15, 0.36
AREA = math.pi, 4 * SQUARE ** 2, 27 ** 0.5 * TRIANGLE ** 2, 8 * CROSS * ARM - 4 * ARM ** 2  # r ** 2


@dataclass(frozen=True)
class Thing:
    """What captions say (compared by ==), then what they leave open (not compared)."""
    shape: str
    colour: str
    size: str = ""                                # "" is unstated: the caption does not say
    x: float | None = field(default=None, compare=False)             # centre of mass, 0..1
    y: float | None = field(default=None, compare=False)
    r: float | None = field(default=None, compare=False)
    tilt: float | None = field(default=None, compare=False)          # degrees, clockwise
    shade: float | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Scene:
    """One thing, or two and a relation. "A above B" == "B below A": they are the same picture."""
    things: tuple
    relation: str = ""

    def mirrored(self):
        """The same scene, told from the other thing's side."""
        return Scene(self.things[::-1], MIRROR[self.relation])

    def canonical(self):
        """Of the two ways to tell a scene, the one with "left of" or "above"."""
        return self.mirrored() if self.relation in ("right of", "below") else self

    def said(self):
        """All that == compares."""
        scene = self.canonical()
        return scene.relation, scene.things

    def __eq__(self, other):
        return isinstance(other, Scene) and self.said() == other.said()

    def __hash__(self):
        return hash(self.said())


def caption(scene):
    """"a small red circle", "an orange cross left of a large black square".

    Total: a scene that `read` could not make out has a caption too, which `parse` refuses, such as
    "nothing" or "a small red blob".
    """
    said = [" ".join(filter(None, (t.size, t.colour, t.shape))) for t in scene.things]
    said = [("an " if words[0] in "aeiou" else "a ") + words for words in said]
    return f" {scene.relation or 'and'} ".join(said) or "nothing"


def parse(text):
    """The scene that a caption states, its open attributes None. ValueError for any other text."""
    thing = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    match = re.fullmatch(rf"{thing}(?: ({'|'.join(MIRROR)}) {thing})?", text)
    if not match:
        raise ValueError('expected a caption such as "a small red circle above a large blue square"'
                         f", got {text!r}; use one or two of {', '.join(SHAPES)}, in "
                         f"{', '.join(COLOURS)}, and {', '.join(MIRROR)}")
    size, colour, shape, relation, size2, colour2, shape2 = match.groups(default="")
    first, second = Thing(shape, colour, size), Thing(shape2, colour2, size2)
    return Scene((first, second), relation) if relation else Scene((first,))


def agrees(stated, seen):
    """Is everything that `stated` states right in `seen`? An unstated size is free."""
    a, b = stated.canonical(), seen.canonical()
    return (len(a.things) == len(b.things) and a.relation == b.relation
            and all((s.shape, s.colour) == (t.shape, t.colour) and s.size in ("", t.size)
                    and t.size != "unclear" for s, t in zip(a.things, b.things)))


def split(scene):
    """"held-out" if a colour-shape pair is one that training never shows, else "train" or "test".

    Sizes are not part of the hash: else training could show a test scene with its sizes unstated.
    """
    if any((t.colour, t.shape) in HELD_OUT for t in scene.things):
        return "held-out"
    scene = scene.canonical()
    words = caption(Scene(tuple(Thing(t.shape, t.colour) for t in scene.things), scene.relation))
    return "test" if zlib.crc32(words.encode()) % 8 == 0 else "train"


def stated(scene):
    """The scene as its caption states it, nothing placed."""
    return Scene(tuple(Thing(t.shape, t.colour, t.size) for t in scene.things), scene.relation)


def swaps(scene):
    """Four scenes that share all words with a two-thing scene: itself; colours exchanged; relation
    reversed; shapes exchanged. Stated, not placed. Two things alike give some scenes twice."""
    a, b = (Thing(t.shape, t.colour, t.size) for t in scene.things)
    return [Scene((a, b), scene.relation),
            Scene((replace(a, colour=b.colour), replace(b, colour=a.colour)), scene.relation),
            Scene((a, b), MIRROR[scene.relation]),
            Scene((replace(a, shape=b.shape), replace(b, shape=a.shape)), scene.relation)]


# ---- From a caption to a place for everything ----------------------------------------------------

def random_scene(rng, two=None, part=None, unstated=0.15):
    """A random scene, placed. rng: random.Random; part: "train", "test", "held-out" or any (None).

    Two things with probability 0.7 unless `two` says so; each size is unstated with probability
    `unstated` (about a quarter of the captions leave one open).
    """
    while True:
        both = rng.random() < 0.7 if two is None else two
        things = tuple(Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)),
                             "" if rng.random() < unstated else rng.choice(tuple(SIZES)))
                       for _ in range(1 + both))
        scene = Scene(things, rng.choice(tuple(MIRROR)) if both else "")
        if part is None or split(scene) == part:
            return place(scene, rng)


def reach(shape, r, tilt):
    """How far a shape extends from its centre: ((left, right), (up, down)), each positive."""
    c, s = math.cos(math.radians(tilt)), abs(math.sin(math.radians(tilt)))
    if shape == "triangle":
        corners = [math.radians(tilt + a) for a in (-90, 30, 150)]
        xs = [2 * TRIANGLE * r * math.cos(a) for a in corners]
        ys = [2 * TRIANGLE * r * math.sin(a) for a in corners]
        return (-min(xs), max(xs)), (-min(ys), max(ys))
    half = r * {"circle": 1, "square": SQUARE * (c + s), "cross": CROSS * c + ARM * s}[shape]
    return (half, half), (half, half)


def place(scene, rng):
    """Draw what the caption leaves open: things inside the picture, apart, the relation plain.

    Bounding boxes keep MARGIN from the rim, and GAP from each other along the relation's axis;
    the centres differ on the other axis by at most DIAGONAL of their distance along it.
    """
    if scene.relation in ("right of", "below"):
        return place(scene.mirrored(), rng).mirrored()
    while True:                                   # draw again if too large together, or diagonal
        things = [replace(t, r=rng.uniform(*SIZES[t.size or rng.choice(tuple(SIZES))]),
                          tilt=rng.uniform(-TILT, TILT), shade=rng.uniform(-1, 1))
                  for t in scene.things]
        boxes = [reach(t.shape, t.r, t.tilt) for t in things]
        at = [[rng.uniform(MARGIN + before, 1 - MARGIN - after) for before, after in box]
              for box in boxes]                   # [thing][0: x, 1: y]
        if len(things) == 2:
            main = int(scene.relation == "above")                    # the relation's axis
            (before, after), (before2, after2) = boxes[0][main], boxes[1][main]
            apart = after + GAP + before2                            # least distance of the centres
            slack = 1 - 2 * MARGIN - before - apart - after2
            a, b = sorted((slack * rng.random(), slack * rng.random()))
            at[0][main], at[1][main] = MARGIN + before + a, MARGIN + before + b + apart
            if slack < 0 or abs(at[1][1 - main] - at[0][1 - main]) > DIAGONAL * (b + apart - a):
                continue
        return Scene(tuple(replace(t, x=x, y=y) for t, (x, y) in zip(things, at)), scene.relation)


# ---- Scene -> pixels -----------------------------------------------------------------------------

def render(scene, size):
    """One placed scene -> (3, size, size) in [-1, 1]."""
    return render_many([scene], size)[0]


def render_many(scenes, size):
    """Placed scenes -> (B, 3, size, size) in [-1, 1].

    Below 64 px it draws at 64 px and averages, so a 16 px picture is the 64 px one made smaller.
    Things never overlap: a picture is white minus, for each thing, coverage * (white - colour).
    """
    things = [t for scene in scenes for t in scene.things]
    picture = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.things])
    numbers = torch.tensor([(SHAPES.index(t.shape), t.x, t.y, t.r, t.tilt) for t in things])
    cover = coverage(*numbers.T, max(size, 64))                           # (N, H, W)
    if size < 64:
        cover = F.interpolate(cover[:, None], (size, size), mode="area")[:, 0]
    ink = torch.tensor([[1 - c - SHADE * t.shade for c in COLOURS[t.colour]] for t in things])
    drawn = -2 * ink[:, :, None, None] * cover[:, None]                   # (N, 3, H, W)
    return torch.ones(len(scenes), 3, size, size).index_add_(0, picture, drawn)


def coverage(shape, x, y, r, tilt, size):
    """How much of each pixel a thing covers:  clamp(1/2 - signed distance in pixels).

    index into SHAPES, x, y, r, tilt: (N,) each  ->  (N, size, size) in 0..1
    """
    centre = (torch.arange(size) + 0.5) / size
    cos, sin = tilt.deg2rad().cos()[:, None], tilt.deg2rad().sin()[:, None]
    dx, dy = centre - x[:, None], centre - y[:, None]                     # (N, W), (N, H)
    u = (cos * dx)[:, None, :] + (sin * dy)[:, :, None]                   # (N, H, W)  turned back
    v = (cos * dy)[:, :, None] - (sin * dx)[:, None, :]                   # (N, H, W)
    away = torch.empty_like(u)
    for i, name in enumerate(SHAPES):
        n = (shape == i).nonzero()[:, 0]
        away[n] = distance(name, u[n], v[n], r[n, None, None])
    return (0.5 - size * away).clamp_(0, 1)


def distance(shape, u, v, r):
    """Signed distance from (u, v) to an upright shape around (0, 0); negative inside.

    For the straight shapes to the nearest side's whole line, so corners stay sharp.
    """
    if shape == "circle":
        return (u * u + v * v).sqrt() - r
    if shape == "triangle":                                               # three half planes
        return torch.maximum(v, 0.75 ** 0.5 * u.abs() - 0.5 * v) - TRIANGLE * r
    long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    if shape == "square":
        return long - SQUARE * r
    return torch.maximum(long - CROSS * r, short - ARM * r)


# ---- Pixels -> scene -----------------------------------------------------------------------------

INK, SPECK, UNEXPLAINED = 0.45, 0.008, 0.10       # limits: ink of a pixel, area, energy of a fit
MOVES = torch.cat([torch.zeros(1, 4), torch.eye(4), -torch.eye(4)])       # (9, 4) of x, y, r, tilt


def read(image):
    """The scene in a picture (3, S, S) in [-1, 1], S >= 16; no learning, exact on clean pictures.

    Find the connected patches of ink (ink = white - pixel), ignore specks, fit every shape to every
    patch and take the one that leaves least unexplained. What is no scene is reported as it is and
    agrees with no caption: no things or more than two; a shape called "blob"; a colour or size
    called "unclear"; two things "beside" one another when they lie on a diagonal.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.shape[1] == image.shape[2] >= 16:
        raise ValueError(f"expected a square picture (3, S, S), S >= 16, got {tuple(image.shape)}; "
                         "crop or resize it")
    if image.max() > 2:
        raise ValueError(f"expected pixels in [-1, 1], got {image.max():g}; divide 0..255 by 127.5 "
                         "and subtract 1")
    size = 32 if image.shape[1] >= 32 else 16
    ink = F.interpolate((1 - image.detach().float().cpu()[None]) / 2, (size, size), mode="area")[0]
    patch = patches(ink.amax(0) > INK)                                    # (N, H, W) bool
    things = tuple(fit(ink, patch)) if len(patch) else ()
    if len(things) != 2:
        return Scene(things)
    across, down = things[1].x - things[0].x, things[1].y - things[0].y
    if 0.8 < abs(across) / (abs(down) + 1e-6) < 1 / 0.8:
        return Scene(things, "beside")
    axis = ("left of", "right of") if abs(across) > abs(down) else ("above", "below")
    return Scene(things, axis[across + down < 0]).canonical()             # the longer one decides


def spread(label):
    """(H, W): each pixel takes the largest number among its own and its eight neighbours'."""
    return F.max_pool2d(label[None], kernel_size=3, stride=1, padding=1)[0]


def patches(mask):
    """(H, W) bool -> (N, H, W) bool: a layer for all pixels that hang together; specks left out."""
    label = torch.arange(1.0, 1 + mask.numel()).view_as(mask) * mask      # all numbers differ
    while True:                                                           # the largest floods
        flooded = spread(label) * mask
        if torch.equal(flooded, label):
            break
        label = flooded
    patch = label == label[mask].unique()[:, None, None]
    return patch[patch.float().mean((1, 2)) > SPECK]


def grow(patch):
    """(N, H, W) bool -> the same, grown by 1/8 of the picture, but never into another patch."""
    number = torch.arange(1.0, 1 + len(patch))[:, None, None]
    label = (number * patch).sum(0)
    for _ in range(len(label) // 8):
        label = torch.where(label > 0, label, spread(label))
    return label == number


def fit(ink, patch):
    """Least squares over shape, place, size, tilt, colour.   (3, H, W), (N, H, W) -> N Things.

    For a coverage a the best ink colour is  d = <a, ink> / <a, a>;  it explains  <a, a> |d|^2  of
    the energy |ink|^2. The rest is a compass search, for each shape on its own: try a step each way
    in x, y, r and tilt; go to the best of them, or halve the steps where staying is best.
    """
    around, patch = grow(patch).float(), patch.float()
    N, size = len(patch), patch.shape[1]
    centre = (torch.arange(size) + 0.5) / size
    mass = patch.sum((1, 2))                                              # (N,)
    start = torch.stack([patch.sum(1) @ centre / mass, patch.sum(2) @ centre / mass,
                         mass.sqrt() / size, 0 * mass], 1)                # (N, 4) of x, y, r, tilt
    at = start[:, None].repeat(1, 4, 1)                                   # (N, 4, 4), a row a shape
    at[:, :, 2] /= torch.tensor(AREA) ** 0.5
    step = torch.tensor([0.02, 0.02, 0.02, 8.0]).expand(N, 4, 4)
    for _ in range(10):
        trial = at[:, :, None] + step[:, :, None] * MOVES                 # (N, 4, 9, 4)
        trial[..., 3].clamp_(-1.5 * TILT, 1.5 * TILT)                     # else a square on its tip
        d, explained = explain(ink, around, trial)
        best = explained.argmax(2)[:, :, None, None]                      # (N, 4, 1, 1) of 9 moves
        at = trial.gather(2, best.expand(N, 4, 1, 4))[:, :, 0]
        step = step * torch.where(best[:, :, 0] == 0, 0.5, 1.0)
    energy = (around * ink.square().sum(0)).sum((1, 2))                   # (N,)
    lost = 1 - explained.amax(2) / energy[:, None]                        # (N, 4)
    d = d.gather(2, best.expand(N, 4, 1, 3))[:, :, 0]                     # (N, 4, 3)
    shape = lost.argmin(1)                                                # (N,)
    return [in_words(i, lost[n, i], 1 - d[n, i], *at[n, i].tolist()) for n, i in enumerate(shape)]


def explain(ink, around, trial):
    """Hypotheses of x, y, r, tilt (N, 4, 9, 4) -> inks d (N, 4, 9, 3), energies (N, 4, 9)."""
    N, size = len(trial), ink.shape[1]
    shape = torch.arange(4)[None, :, None].expand(N, 4, 9)
    a = coverage(shape.flatten(), *trial.flatten(0, 2).T, 32)             # (36 N, 32, 32)
    a = F.avg_pool2d(a, 2) if size == 16 else a                           # (36 N, H, W)
    a = (a.unflatten(0, (N, 36)) * around[:, None]).flatten(2)            # (N, 36, H W)
    power = a.square().sum(2, keepdim=True).clamp(min=1e-6)               # (N, 36, 1)
    d = a @ ink.flatten(1).T / power                                      # (N, 36, 3)
    explained = (d * d * power).sum(2)                                    # (N, 36)
    return d.unflatten(1, (4, 9)), explained.unflatten(1, (4, 9))


def in_words(shape, lost, rgb, x, y, r, tilt):
    """A fit -> a Thing; "blob" or "unclear" for what is not of this world."""
    off = rgb - torch.tensor(list(COLOURS.values()))                      # (8, 3)
    shade = (off.mean(1) / SHADE).clamp(-2, 2)                            # (8,)
    off = (off - SHADE * shade[:, None]).norm(dim=1)                      # (8,) distance to a shade
    c, half_gap = int(off.argmin()), (SIZES["large"][0] - SIZES["small"][1]) / 2
    size = [s for s, (low, high) in SIZES.items() if low - half_gap < r < high + half_gap]
    return Thing(SHAPES[shape] if lost < UNEXPLAINED else "blob",
                 list(COLOURS)[c] if off[c] < 0.16 else "unclear",
                 size[0] if size else "unclear", x, y, r, tilt, shade[c].item())


# ---- Pictures and captions to train on -----------------------------------------------------------

def edits(scene, rng):
    """A stated scene -> another that differs in one respect. For two things: colours exchanged,
    shapes exchanged, relation reversed, relation turned, a shape or a size changed; for one thing:
    shape, colour or size changed."""
    things = list(stated(scene).things)
    if len(things) == 2 and rng.random() < 4 / 6:
        same, colours, reverse, shapes = swaps(scene)
        turned = rng.choice(("above", "below") if scene.relation in ("left of", "right of")
                            else ("left of", "right of"))
        return rng.choice((colours, reverse, shapes, Scene(same.things, turned)))
    i = rng.randrange(len(things))
    t = things[i]
    things[i] = rng.choice((
        replace(t, shape=rng.choice([s for s in SHAPES if s != t.shape])),
        replace(t, size="large" if t.size == "small" else "small"),
        *[replace(t, colour=rng.choice([c for c in COLOURS if c != t.colour]))
          for _ in range(2 - len(things))]))
    return Scene(tuple(things), scene.relation)


def rivals(rng, two):
    """Four placed training scenes that differ in one respect from the first; half of the one-thing
    groups show all four shapes.

    What shares a batch decides what CLIP learns: only beside "a blue circle above a red square"
    must it know in "a red circle above a blue square" which of the two is red.
    """
    first = random_scene(rng, two=two, part="train")
    others = [Scene(stated(first).things, MIRROR[first.relation])] if two else []
    if not two and rng.random() < 0.5:
        others = [Scene((replace(first.things[0], shape=s),)) for s in SHAPES
                  if s != first.things[0].shape]
    for _ in range(30):                           # some scenes have few neighbours in training
        others = [s for s in others if split(s) == "train"]
        if len(others) == 3:
            break
        new = edits(first, rng)
        others += [new] if new != first and new not in others else []
    others += [first] * (3 - len(others))
    return [first] + [place(s, rng) for s in others]


class World:
    """Scenes of the toy world to train on, in groups of four rivals. The first fifth has one thing,
    in the first two thirds captions say "left of" and "above", but not yet "right of" and "below".
    """
    group, one, plain = 4, 0.2, 0.65

    def __init__(self, groups, seed=0):
        rng, self.scenes = random.Random(seed), []
        for i in range(groups):
            scenes = rivals(rng, two=i >= self.one * groups)
            self.scenes += [s.canonical() for s in scenes] if i < self.plain * groups else scenes
        self.captions = [caption(scene) for scene in self.scenes]

    def lesson(self, progress):
        """Which first share of the groups CLIP sees when so much of its training is over (0..1).

        "A below B" is "B above A". A CLIP that meets both at once has to find out at the same time
        what pictures show and which words mean the same, and for long learns neither.
        """
        return self.one if progress < 0.1 else self.plain if progress < 0.35 else 1.0

    def pictures(self, rows, size):
        """rows, a list of indices -> (B, 3, size, size) in [-1, 1]."""
        return render_many([self.scenes[i] for i in rows], size)


class Folder:
    """The user's own pictures: NAME.png or NAME.jpg beside NAME.txt, of any size.

    Resized and centre-cropped to the size asked for; unreadable pairs are skipped and counted.
    ValueError if fewer than two are left.
    """
    group = 1

    def __init__(self, folder):
        pictures = [p for p in sorted(Path(folder).glob("*"))
                    if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
        self.paths, self.captions = [], []
        for path in pictures:
            try:
                clip.preprocess(path, 8)
                words = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
            except (OSError, ValueError):
                continue
            if words:
                self.paths.append(path)
                self.captions.append(words)
        if len(self.paths) < 2:
            raise ValueError(f"expected NAME.png or NAME.jpg beside NAME.txt in {folder}, found "
                             f"{len(pictures)} pictures and {len(self.paths)} readable pairs; "
                             "at least 2 are needed")
        print(f"{len(self.paths)} captioned pictures in {folder}, "
              f"{len(pictures) - len(self.paths)} skipped")

    def lesson(self, progress):
        """No picture is known to be easier than another."""
        return 1.0

    def pictures(self, rows, size):
        """rows, a list of indices -> (B, 3, size, size) in [-1, 1]."""
        return torch.stack([clip.preprocess(self.paths[i], size) for i in rows])


class Data:
    """A source of pictures and captions, with what is computed from it once.

    pictures   (N, 3, S, S) uint8, S the side that CLIP wants, a multiple of the decoder's
    tokens, mask (N, L);  ids (N,) equal for equal captions;  z_i, z_t (N, D), see `embed`
    """

    def __init__(self, source, model, device):
        self.source, self.device, self.size = source, device, model.config.clip.image_size
        self.read = model.config.clip.context                 # CLIP reads these tokens of L
        tokens = model.tokenizer(source.captions, self.read, truncate=True)
        cut = sum(len(model.tokenizer.encode(text)) > self.read - 2 for text in source.captions)
        if cut:
            print(f"{cut} of {len(tokens)} captions have more than {self.read} tokens, start and "
                  "end included; the rest of them is cut off")
        self.tokens, self.mask = (F.pad(x, (0, model.context - self.read)) for x in (
            tokens, clip.token_mask(tokens, model.tokenizer.end)))
        number = {text: i for i, text in enumerate(dict.fromkeys(source.captions))}
        self.ids = torch.tensor([number[text] for text in source.captions])
        self.pictures = torch.cat([((source.pictures(rows.tolist(), self.size) + 1) * 127.5).round()
                                   .byte() for rows in self.chunks("drawing pictures")])

    def chunks(self, what):
        """All rows, 500 at a time, with a progress bar."""
        return tqdm(torch.arange(len(self.tokens)).split(500), desc=what, leave=False)

    @torch.no_grad()
    def embed(self, model):
        """Once CLIP is trained: what it makes of every picture and caption."""
        self.encode = model.encode_image
        self.z_i = torch.cat([model.encode_image(self.small(rows, self.size))
                              for rows in self.chunks("embedding pictures")])
        self.z_t = torch.cat([model.encode_text(self.to_device(self.tokens[rows, :self.read]))[0]
                              for rows in self.chunks("embedding captions")])

    def to_device(self, x):
        """x, where the model is."""
        return diffusion.to_device(x, self.device)

    def rivals(self, n, share=1.0):
        """About n random rows, (n,), in whole groups, of the first `share` of the groups."""
        g = self.source.group
        first = torch.randint(max(1, int(share * len(self.tokens)) // g), (n // g,)) * g
        return (first[:, None] + torch.arange(g)).flatten()

    def small(self, rows, size):
        """Pictures at CLIP's or the decoder's size: (B, 3, size, size) in [-1, 1]."""
        return decoder.shrink(self.to_device(self.pictures[rows]).float() / 127.5 - 1, size)

    def text(self, rows):
        """-> clip.Text, without CLIP's hidden states."""
        tokens, mask, nothing = map(self.to_device, (self.tokens[rows], self.mask[rows],
                                                     torch.zeros(len(rows), 0)))
        return clip.Text(tokens, mask, self.z_t[self.to_device(rows)], nothing)


# ---- Training: one loop for all ------------------------------------------------------------------

@dataclass
class Stage:
    """How one part is trained: a warm-up, then a cosine to zero, or a constant learning rate.

    Adam with decoupled weight decay (not on gains and biases), as in the paper. With `muon` the
    inner matrices and convolutions are moved by `Muon` at that learning rate instead: in a short
    run it needs about half as many steps.
    """
    steps: int
    batch: int
    lr: float
    muon: float = 0.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema: float = 0.0                              # decay of the averaged weights; 0: none (CLIP)
    eps: float = 1e-8                             # Adam's
    warmup: int = 50                              # steps, at most a fifth of all
    cosine: bool = True                           # False: constant after the warm-up


STAGES = {
    "clip": Stage(steps=1100, batch=128, lr=1e-3, muon=3e-3, weight_decay=0.1, beta2=0.98),
    "diffusion_prior": Stage(steps=350, batch=128, lr=1e-3, muon=3e-3, weight_decay=0.06,
                             beta2=0.96, ema=0.99),
    "ar_prior": Stage(steps=580, batch=64, lr=1e-3, muon=3e-3, weight_decay=0.04, beta2=0.96,
                      ema=0.99),
    "decoder": Stage(steps=1200, batch=64, lr=2e-3, muon=8e-3, ema=0.99),
    "upsampler1": Stage(steps=1200, batch=16, lr=2e-3, muon=1e-2, ema=0.99),
    "upsampler2": Stage(steps=600, batch=8, lr=2e-3, muon=1e-2, ema=0.99),
}
# The paper's table 3, which states no schedule and no warm-up; for CLIP appendix C and Radford et
# al. 2021, with 32 epochs of 650 M pictures.
PAPER_STAGES = {
    "clip": Stage(steps=635_000, batch=32_768, lr=3e-4, weight_decay=0.2, beta2=0.98, eps=1e-6,
                  warmup=2000),
    "diffusion_prior": Stage(steps=600_000, batch=4096, lr=1.1e-4, weight_decay=6e-2, beta2=0.96,
                             eps=1e-6, ema=0.9999, warmup=0, cosine=False),
    "ar_prior": Stage(steps=1_000_000, batch=4096, lr=1.6e-4, weight_decay=4e-2, beta2=0.91,
                      eps=1e-10, ema=0.999, warmup=0, cosine=False),
    "decoder": Stage(steps=800_000, batch=2048, lr=1.2e-4, ema=0.9999, warmup=0, cosine=False),
    "upsampler1": Stage(steps=1_000_000, batch=1024, lr=1.2e-4, ema=0.9999, warmup=0,
                        cosine=False),
    "upsampler2": Stage(steps=1_000_000, batch=512, lr=1e-4, ema=0.9999, warmup=0, cosine=False),
}
RECIPES = {"toy": STAGES, "paper": PAPER_STAGES}
SAVE_SECONDS = {"toy": 20.0, "paper": 1800.0}     # the paper's decoder writes 56 GB each time


def orthogonalizers(grams):
    """A batch of Gram matrices G G^T, (N, m, m) -> Q, (N, m, m), so that Q G is nearly orthogonal.

    Newton-Schulz (Jordan et al. 2024, "Muon"): G is brought to norm 1, then each of five steps
    takes every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. Those that began above 0.002
    end between 0.68 and 1.21. Kept as a = G G^T and as the product q of all steps, all is m x m.
    """
    identity = torch.eye(grams.shape[-1], device=grams.device)

    def factor(a):
        return 3.4445 * identity - 4.775 * a + 2.0315 * a @ a

    square = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-14)   # |G|^2
    a = grams / square
    p = q = factor(a)
    for _ in range(4):
        a = p @ a @ p
        p = factor(a)
        q = p @ q
    return q / square.sqrt()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, so that all directions are learnt at one pace.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al. 2025), but matrices of one
    size go through Newton-Schulz together: on the toy's decoder a step takes at most half of
    the time (tests/compare_speed.py). A convolution is a matrix too, with a row for each output.
    """

    def __init__(self, weights, lr=1e-3, weight_decay=0.0, momentum=0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            sizes = collections.defaultdict(list)
            for w in group["params"]:
                if w not in self.state:
                    self.state[w]["average"] = torch.zeros_like(w)
                average = self.state[w]["average"].lerp_(w.grad, 1 - group["momentum"])
                g = w.grad.lerp(average, group["momentum"]).flatten(1)          # Nesterov's
                sizes[min(g.shape)].append((w, g))
            for some in sizes.values():
                # of the rows, or of the columns if they are fewer
                grams = [full(g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g) for _, g in some]
                for (w, g), q in zip(some, orthogonalizers(torch.stack(grams))):
                    if isinstance(g, DTensor):
                        q = DTensor.from_local(q, g.device_mesh)
                    update = q @ g if g.shape[0] <= g.shape[1] else g @ q
                    w.mul_(1 - group["lr"] * group["weight_decay"])
                    w.sub_(update.view_as(w), alpha=0.2 * max(g.shape) ** 0.5 * group["lr"])


def optimizers(model, stage):
    """-> optimisers, every group with the learning rate at its height ("peak")."""
    inner = ("blocks.", "down.", "mid_", "up.")
    matrices = [w for key, w in model.named_parameters()
                if stage.muon and w.ndim > 1 and any(part in key for part in inner)]
    taken = set(matrices)
    rest = [w for w in model.parameters() if w not in taken]
    adam = torch.optim.AdamW(
        [{"params": [w for w in rest if w.ndim > 1], "peak": stage.lr},
         {"params": [w for w in rest if w.ndim == 1], "peak": stage.lr, "weight_decay": 0.0},
         *({"params": [w], "peak": 10 * stage.lr, "weight_decay": 0.0}          # the temperature
           for w in rest if w.ndim == 0)],
        betas=(0.9, stage.beta2), eps=stage.eps, weight_decay=stage.weight_decay, fused=True)
    if not matrices:
        return [adam]
    return [adam, Muon([{"params": matrices, "peak": stage.muon}],
                       weight_decay=stage.weight_decay)]


def batch_loss(name, model, data, batch, progress, share=(0, 1)):
    """Draw a batch for one part of the stack -> its mean loss. All draws come from torch's seed.

    share: (rank, processes); of a batch's rows each process computes its own, see diffusion.drawn.
    """
    rank, processes = share
    if name == "clip":
        rows = data.rivals(batch, data.source.lesson(progress))
        ids, rows = data.to_device(data.ids[rows]), rows.chunk(processes)[rank]
        tokens = data.to_device(data.tokens[rows, :data.mask[rows].sum(1).max()])
        z_i, z_t = (gather(z, share) for z in model(data.small(rows, data.size), tokens))
        with unclip.autocast(data.device, torch.float32):              # the loss is not rounded
            loss = clip.clip_loss(z_i, z_t, model.scale(), ids)
            weight = model.config.apart if progress < 2 / 3 else 0.0
            return loss + weight * clip.apart(z_i, z_t, ids) if weight else loss
    if name.startswith("upsampler"):
        size = model.config.unet.size
        crops = 4 if size > 64 else 1             # of each picture: large ones take long to draw
        rows = torch.randint(len(data.tokens), (batch // crops,)).chunk(processes)[rank]
        high, low = model.prepare(data.source.pictures(rows.tolist(), size), crops, share)
        return model.loss(data.to_device(high), data.to_device(low), share).mean()
    rows = torch.randint(len(data.tokens), (batch,)).chunk(processes)[rank]
    z_i, text = clip.unit(data.z_i[data.to_device(rows)]), data.text(rows)
    if name == "decoder":
        return model.loss(data.small(rows, model.config.unet.size), z_i, text, share).mean()
    return model.loss(z_i, text, share).mean()


# What the best possible denoiser would reach. Of what a caption leaves open we draw many pictures.
# If only these existed, their mean, each weighted by how likely it made x_t (Bayes), would be best;
# with fewer possibilities it errs less than in the whole world, so its error is a floor. A denoiser
# made from half of them and tried on the other half is never better than the best there is, so its
# error is a ceiling. Both are averages over few pictures: the last digit is not to be trusted.

def best_errors(alphabar, worlds, times):
    """Between which numbers the best possible E|x0 - x0_hat|^2 / d is, at each of n times.

    worlds (C, K, d): for each of C conditions, K things that it may mean -> low, high (n,)
    """
    half = worlds.shape[1] // 2
    known, new = worlds[:, :half], worlds[:, half:]                        # (C, K / 2, d)
    mean = known.mean(1, keepdim=True)                                     # (C, 1, d)
    off = (known - mean).flatten(0, 1)                                     # (C K / 2, d)
    power, basis = torch.linalg.eigh(off.T @ off / (len(off) - len(worlds)))
    low, high = [], []
    for t in times:
        ab = alphabar[t].float()

        def error(of, among):
            """Bayes' mean among (C, J, d) for noised members of (C, I, d) -> its error."""
            x_t = ab.sqrt() * of + (1 - ab).sqrt() * torch.randn_like(of)
            far = torch.cdist(x_t, ab.sqrt() * among).square()             # (C, I, J)
            return ((-far / (2 * (1 - ab))).softmax(2) @ among - of).square().mean()

        noised = ab.sqrt() * (new - mean) + (1 - ab).sqrt() * torch.randn_like(new)
        gain = ab.sqrt() * power.clamp(min=0) / (ab * power.clamp(min=0) + 1 - ab)       # (d,)
        line = ((noised @ basis * gain) @ basis.T - (new - mean)).square().mean()
        low.append(error(worlds, worlds))
        high.append(torch.minimum(error(new, known), line))
    return torch.stack(low), torch.stack(high)


def best_loss(model, times, weight, dropped, worlds):
    """Bounds of the best mean loss, if it is weight[t] |x0 - x0_hat|^2 / d at times such as these,
    and a share `dropped` of the rows has no condition at all.

    times: ints in 1..T; weight (T+1,); worlds (C, K, d) -> (low, high)
    """
    nothing = worlds[:, ::max(1, worlds.numel() // 2 ** 19)].flatten(0, 1)[None]         # (1, N, d)
    nothing = nothing[:, torch.randperm(nothing.shape[1])]
    told, untold = (best_errors(model.alphabar, w, times) for w in (worlds, nothing))
    return [float((weight[times] * ((1 - dropped) * a + dropped * b)).mean())
            for a, b in zip(told, untold)]


@torch.no_grad()
def expectation(name, model, data, batch):
    """What to expect of the loss, a line of text: where it begins, and where it must end."""
    if name == "clip":
        same = data.ids[data.rivals(batch)]
        floor = (same[:, None] == same[None, :]).sum(1).log().mean()
        most, apart = math.log(batch), 2 * model.config.apart
        more = f", and about {apart * most:.2f} for what lies too near" if apart else ""
        return (f"from log({batch}) = {most:.2f}{more}; equal captions put the floor at "
                f"{floor:.2f} in the end")
    if name == "ar_prior":
        return f"from log({model.config.buckets}) = {math.log(model.config.buckets):.2f}, a guess"
    torch.manual_seed(0)
    ab = model.alphabar
    times = decoder.training_times(model.config, 16).tolist() if name == "decoder" else \
        diffusion.random_times(model.config.T, 16).tolist()
    if name == "diffusion_prior":
        start, weight = "0.289 (17.2^2 / 1024) is what predicting 0 gives", torch.ones(len(ab))
    else:                     # |eps - eps_hat|^2 = ab / (1 - ab) |x0 - x0_hat|^2, for the same x_t
        start = "about 1 from a network that says 0"
        weight = ab / (1 - ab) * decoder.eps_weight(model.config, ab, torch.arange(len(ab)))
    if name.startswith("upsampler"):              # given the enlarged picture, off by v from x0
        high, low = model.prepare(data.source.pictures([0, 1], model.config.unet.size), 16)
        v = (decoder.enlarge(low, high.shape[2]) - high).square().mean()
        line = (weight * v * (1 - ab) / (ab * v + 1 - ab))[1:].mean()
        return (f"{start}; {line:.3f} by the best line from the enlarged small picture, less for "
                "who knows edges; the variational bound comes on top")
    if not isinstance(data.source, World):
        return start + ("; the variational bound comes on top" if name == "decoder" else "")
    rng, scenes = random.Random(0), data.source.scenes
    drawn = [place(stated(s), rng) for s in scenes[::max(1, len(scenes) // 32)][:32]
             for _ in range(32)]
    x = render_many(drawn, 64)
    if name == "decoder":
        x = decoder.shrink(x, model.config.unet.size)
        low, high = best_loss(model, times, weight, 0.1 * 0.5, x.flatten(1).unflatten(0, (-1, 32)))
        return (f"{start}; the best possible is between {low:.3f} and {high:.3f} if z_i says "
                "what captions say, less as it says more; the variational bound comes on top")
    z = model.scale(data.encode(decoder.shrink(x, data.size)).to(data.device))
    low, high = best_loss(model, times, weight, 0.1, z.unflatten(0, (-1, 32)).cpu())
    return f"{start}; the best possible is between {low:.3f} and {high:.3f}"


# ---- Many processes: torchrun --nproc-per-node=N train_toy.py ... ----
# Each holds a part of the weights, gradients and averages, and computes its rows of every batch.


def join(device):
    """-> (rank, processes): (0, 1), or this process's place among those that torchrun started."""
    if "RANK" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the first process also draws samples and writes files, for which the others wait
        distributed.init_process_group(timeout=datetime.timedelta(hours=2))
        if distributed.get_rank():
            sys.stdout = open(os.devnull, "w")             # only the first one speaks
    return distributed.get_rank(), distributed.get_world_size()


def shard(part):
    """Spread a part's weights over the processes (FSDP2); a block's come together as it works.

    The U-Net's attention stays with the root: its keys of the context are asked for from outside.
    So does CLIP's temperature, whole in each process: FSDP cannot cut a single number.
    """
    device = next(part.parameters()).device.type         # FSDP alone would take any GPU there is
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for module in part.modules():
        if isinstance(module, (clip.Block, decoder.ResBlock)):
            fully_shard(module, mesh=mesh)
    fully_shard(part, mesh=mesh, ignored_params={w for w in part.parameters() if w.ndim == 0})


def local(tensors):
    """What this process holds of each tensor, in the same memory."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def gather(x, share):
    """The rows of all processes: (b, D) -> (b * processes, D). One process: x.

    Each then computes the whole loss, whose gradient it knows for its own rows alone; as FSDP takes
    the mean over the processes where this wants the sum, it counts so many times.
    """
    rank, processes = share
    if processes == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(processes)]
    distributed.all_gather(rows, x.detach())
    x.register_hook(lambda gradient: processes * gradient)
    return torch.cat([*rows[:rank], x, *rows[rank + 1:]])


def clip_gradients(weights, share, most=1.0):
    """Shrink all gradients together so that their norm, over all processes, is at most `most`."""
    if share[1] == 1:
        torch.nn.utils.clip_grad_norm_(weights, most)
        return
    grads = [w.grad for w in weights]
    own = [g for g in grads if isinstance(g, DTensor) or share[0] == 0]    # count the others once
    square = torch.nn.utils.get_total_norm(local(own)) ** 2
    distributed.all_reduce(square)
    torch._foreach_mul_(local(grads), (most / (square.sqrt() + 1e-6)).clamp(max=1.0))


def numbers(values, share):
    """Numbers on the device -> a list of floats, their means over the processes."""
    values = torch.stack(values)
    if share[1] > 1:
        distributed.all_reduce(values)
        values /= share[1]
    return values.tolist()


def full(x):
    """A tensor, put together again if it is spread over the processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(part):
    """A part's weights on the CPU, put together again where they were spread."""
    return {key: full(w).cpu() for key, w in part.state_dict().items()}


def save_shards(state, out, name):
    """All processes write state["current"][name] into a folder, then the older one goes.

    torch's checkpoint engine finishes a folder by writing .metadata: without it, it does not count.
    """
    folder = out / f"{name}-{state['current'][name]['step']}"
    checkpoint.save(state["current"][name], checkpoint_id=folder)
    if distributed.get_rank() == 0:
        if not (out / "state.pt").exists():
            unclip.save_atomically(state | {"current": {}}, out / "state.pt")
        for old in out.glob(f"{name}-*"):
            if old != folder:
                shutil.rmtree(old)


def saved_shards(out, name):
    """-> {"folder": the newest that save_shards finished}, or {}."""
    folders = [path.parent for path in out.glob(f"{name}-*/.metadata")]
    newest = max(folders, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    return {"folder": str(newest)} if newest else {}


def load_shards(state, model, weights, opts):
    """Read state["folder"] into all that changes, each process its own part; in place."""
    for w in weights:
        w.grad = torch.zeros_like(w)
    for opt in opts:
        opt.step()                                # the moments come to be; all is overwritten now
    folder = state.pop("folder")
    state.update(step=0, losses=[], seconds=0.0, ema=[w.detach().clone() for w in weights],
                 model=model.state_dict(), opts=[opt.state_dict() for opt in opts])
    checkpoint.load(state, checkpoint_id=folder)


# ---- The loop ----

READ_EVERY = 20                                   # steps: reading a loss makes the CPU wait for it


def train(name, stage, model, data, seed, state, save, save_seconds=20.0, sam=0.0,
          dtype=torch.float32, share=(0, 1)):
    """Train one part. `state`, {} or a saved one, holds all that changes; save() is called often.

    Every step seeds torch anew, so a run that was stopped draws what it would have drawn.
    sam: rho of the paper's sharpness-aware steps, 0 for plain ones (which cost half as much).
    dtype: of autocast. share: (rank, processes), with the model spread by `shard`.
    -> the model with averaged weights.   FloatingPointError at a loss that is not finite.
    """
    model.train()
    weights, opts = list(model.parameters()), optimizers(model, stage)
    if "folder" in state:
        load_shards(state, model, weights, opts)
    elif state:
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        state["ema"] = [average.to(w.device) for average, w in zip(state["ema"], weights)]
    else:
        state.update(step=0, losses=[], seconds=0.0, ema=[w.detach().clone() for w in weights])
    warmup = 1 + min(stage.warmup, stage.steps // 5)
    start, saved, before, unread = time.monotonic(), time.monotonic(), state["seconds"], []
    bar = tqdm(range(state["step"], stage.steps), name, initial=state["step"], total=stage.steps,
               disable=share[0] > 0)
    for step in bar:
        def batch():                              # the same batch however often it is asked for
            torch.manual_seed(seed * 1_000_003 + step)
            torch.cuda.manual_seed(seed * 1_000_003 + step + share[0] * 10 ** 12)   # dropout's own
            with unclip.autocast(data.device, dtype):
                return batch_loss(name, model, data, stage.batch, step / stage.steps, share)

        fall = 0.5 + 0.5 * math.cos(math.pi * step / stage.steps) if stage.cosine else 1.0
        height = min((step + 1) / warmup, fall)
        for group in (g for opt in opts for g in opt.param_groups):
            group["lr"] = height * group["peak"]
        model.zero_grad()
        if sam:
            loss = clip.sam_backward(batch, weights, sam)
        else:
            loss = batch()
            loss.backward()
        clip_gradients(weights, share)
        for opt in opts:
            opt.step()
        if name == "clip":                        # a scale above 100 has no gradient: it would stay
            torch._foreach_clamp_max_(local([model.logit_scale.detach()]), math.log(99.99))
        torch._foreach_lerp_(local(state["ema"]), local(w.detach() for w in weights),
                             1 - min(stage.ema, (1 + step) / (10 + step)))
        state["step"] = step + 1
        unread.append(loss.detach().float())
        # ---- only reporting from here; nothing above waits for the device ----
        waited = time.monotonic() - saved
        if (step % READ_EVERY and step + 1 < stage.steps
                and (waited < save_seconds or share[1] > 1)):       # many decide together, below
            continue
        *losses, waited = numbers([*unread, loss.new_tensor(waited)], share)
        unread.clear()
        for at, value in enumerate(losses, start=len(state["losses"])):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of {name} is {value} at step {at}; "
                                         "try a smaller learning rate (STAGES), or another --seed")
        state["losses"] += losses
        bar.set_postfix(loss=f"{np.mean(state['losses'][-100:]):.4f}")
        if waited >= save_seconds:
            state.update(model=model.state_dict(), opts=[opt.state_dict() for opt in opts],
                         seconds=before + time.monotonic() - start)
            save()
            saved = time.monotonic()
    state["seconds"] = before + time.monotonic() - start
    with torch.no_grad():
        for w, average in zip(weights, state["ema"]):
            w.copy_(average)
    return model.eval()


def run(args):
    """Train the stack, part after part, into the folder args.out; or go on where a run stopped."""
    share = rank, processes = join(args.device)
    out, file = Path(args.out), Path(args.out) / "state.pt"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out names a folder")
    if args.steps_scale <= 0:
        raise ValueError(f"expected --steps-scale above 0, got {args.steps_scale:g}")
    about = {"seed": args.seed, "steps_scale": args.steps_scale, "data": args.data or "",
             "groups": args.groups, "sam": args.sam, "preset": args.preset,
             "batch": args.batch or 0, "dtype": args.dtype, "vocab": args.vocab or "",
             "spread": processes > 1}
    if args.sam and processes > 1:
        raise ValueError("--sam is for one process: the paper's replicas perturb one by one")
    state = {"format": "unclip run 2", "about": about, "done": {}, "current": {}, "losses": {},
             "seconds": {}}
    if args.resume:
        state = unclip.read_checkpoint(file, "unclip run 2")
        before = state["about"]
        halfway = bool(state["current"]) or any(saved_shards(out, name) for name in STAGES
                                                if name not in state["done"])
        free = () if halfway else ("batch", "dtype", "spread")      # each part may have its own
        if any(before.get(key) != about[key] for key in about if key not in free):
            raise ValueError(f"{file} is of a run with {before}, got {about}; resume with "
                             "the settings it began with, or choose another --out")
        if before != about:
            state["about"] = about
            if rank == 0:
                unclip.save_atomically(state, file)
    elif file.exists():
        raise ValueError(f"{out} holds a run already; go on with --resume, or choose another --out")
    model, data = set_up(args)
    for name, stage in RECIPES[args.preset].items():       # before hours of training
        batch, skip = args.batch or stage.batch, args.only and name not in (*args.only, "clip")
        fours = processes > 1 or data.source.group == 4 or name.startswith("upsampler")     # crops
        if fours and batch % (4 * processes) and not skip and name not in state["done"]:
            raise ValueError(f"expected a batch that is a multiple of {4 * processes}, got {batch} "
                             f"for {name}; set --batch")
    for number, (name, stage) in enumerate(RECIPES[args.preset].items()):
        stage = replace(stage, steps=max(2, round(stage.steps * args.steps_scale)),
                        batch=args.batch or stage.batch)
        if args.only and name not in (*args.only, "clip", *state["done"]):
            continue
        part = make_part(name, model, data, args.seed + number)
        if name in state["done"]:
            part.load_state_dict(state["done"][name])
            part.eval()
        else:
            print(f"{name}: {sum(w.numel() for w in part.parameters()) / 1e6:.2f} M parameters, "
                  f"{stage.steps} steps of {stage.batch}; loss: "
                  f"{expectation(name, part, data, stage.batch)}", flush=True)
            if processes == 1:                         # FSDP wants the usual order
                unclip.channels_last(part)
            if args.recompute:
                unclip.recompute(part)
            if args.compile:
                unclip.compile_blocks(part)
            state["current"].setdefault(name, {})                      # or it was left halfway
            save = functools.partial(unclip.save_atomically, state, file)
            if processes > 1:
                shard(part)
                state["current"][name] = saved_shards(out, name) if args.resume else {}
                save = functools.partial(save_shards, state, out, name)
            train(name, stage, part, data, args.seed, state["current"][name], save,
                  SAVE_SECONDS[args.preset] if args.save_seconds is None else args.save_seconds,
                  args.sam if name == "clip" else 0.0, unclip.DTYPES[args.dtype], share)
            if processes > 1 or args.recompute or args.compile:        # a plain part goes on
                weights = whole(part)
                part = make_part(name, model, data, args.seed + number)
                part.load_state_dict(weights)
                part.eval()
                gc.collect()                           # the spread one is tied up in itself
            if name == "diffusion_prior":
                rows = torch.arange(len(data.tokens))[::max(1, len(data.tokens) // 500)]
                part.fit_variance(data.z_i[rows], data.text(rows),
                                  generator=torch.Generator().manual_seed(args.seed))
            state["done"][name] = whole(part)
            state["losses"][name], state["seconds"][name] = (
                state["current"][name].pop(key) for key in ("losses", "seconds"))
            del state["current"][name]
            if rank == 0:
                unclip.save_atomically(state, file)
                for old in out.glob(f"{name}-*"):
                    shutil.rmtree(old)
                draw_losses(state["losses"], out / "losses.png")
        model.parts[name] = part
        if name == "clip":
            data.embed(part)
        part.load_state_dict(state["done"][name], assign=True)   # off the GPU: the next needs room
        if rank == 0 and model.parts["decoder"] is not None and not (out / f"{name}.png").exists():
            draw_samples(model, data, out / f"{name}.png")
    model.seconds = state["seconds"]
    if rank == 0:
        model.save(out / f"{args.preset}.pt", dtype=torch.half)
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in state["seconds"].items())
    print(f"wrote {out / args.preset}.pt; trained in {sum(state['seconds'].values()) / 60:.1f} "
          f"minutes: {each}")
    if processes > 1:
        distributed.destroy_process_group()


def set_up(args):
    """-> an UnCLIP without parts yet, whose tokenizer and sizes fit the captions; and the Data."""
    device = unclip.pick_device(args.device)
    source = Folder(args.data) if args.data else World(args.groups, args.seed)
    model = unclip.UnCLIP(copy.deepcopy(unclip.PRESETS[args.preset]), dict.fromkeys(unclip.PARTS))
    model.low_memory = None if device.type == "cpu" else device        # a part at a time is there
    model.tokenizer = (clip.Tokenizer.load(args.vocab) if args.vocab else
                       clip.Tokenizer.train(source.captions, VOCABULARY[args.preset]))
    model.words = sorted({word for text in source.captions
                          for word in clip.split_words(clip.clean(text))})
    for name in ("clip", "diffusion_prior", "ar_prior", "decoder"):
        getattr(model.config, name).vocab_size = len(model.tokenizer)
    return model, Data(source, model, device)


def make_part(name, model, data, seed):
    """A fresh part, with what it takes from the data before any training."""
    torch.manual_seed(seed)
    config = getattr(model.config, name)
    if name == "ar_prior":
        config.components = prior.principal_components(data.z_i)[1].shape[1]
        config.buckets = min(config.buckets, len(data.z_i))
    part = unclip.PARTS[name](config).to(data.device)
    if name == "ar_prior":
        part.fit(data.z_i, data.z_t)
    if name == "decoder":
        part.fit(clip.unit(data.z_i))
    return part


# ---- Looking at it -------------------------------------------------------------------------------

def draw_losses(losses, path):
    """One small chart for each part: the loss, smoothed over 1 % of the steps."""
    figure, axes = plt.subplots(1, len(losses), figsize=(3 * len(losses), 2.4), squeeze=False)
    for axis, (name, values) in zip(axes[0], losses.items()):
        n = max(1, len(values) // 100)
        axis.plot(np.arange(n - 1, len(values)), np.convolve(values, np.ones(n) / n, "valid"))
        axis.set(title=name, xlabel="step", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_samples(model, data, path):
    """Some captions of the data as drawn so far, with the true z_i in the prior's place."""
    n = max(1, 8 * 256 // model.sizes[-1])                            # two of 1024 px
    rows = torch.arange(len(data.tokens))[::max(1, len(data.tokens) // n)][:n]
    pictures = model.draw(clip.unit(data.z_i[rows]), data.text(rows),
                          generator=torch.Generator().manual_seed(0))
    unclip.save_grid(F.interpolate(pictures, 256, mode="nearest"), path, columns=4)


# ---- Is it any good? -----------------------------------------------------------------------------

def frechet(a, b):
    """Frechet distance of two clouds of embeddings taken as Gaussians: (N, D), (M, D) -> >= 0.

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))        the F of FID
    """
    a, b = a.cpu().double(), b.cpu().double()
    power, basis = torch.linalg.eigh(a.T.cov())
    root = basis * power.clamp(min=0).sqrt() @ basis.T                    # cov_a^(1/2)
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
                 - 2 * cross)


WAYS = ("diffusion prior", "AR prior", "true image embedding", "text embedding in its place",
        "caption alone")
BEST = "diffusion prior, best of 4"               # drawn four times, CLIP chooses: the default


def embeddings(model, text, pictures, way, generator):
    """The image embedding that the decoder is given, (B, D), in one of WAYS (paper fig. 8)."""
    if "prior" in way:
        return model.embed(text, which=way.split()[0].lower(), generator=generator)
    return {"true image embedding": clip.unit(model.encode_image(pictures)),
            "text embedding in its place": clip.unit(text.z_t),
            "caption alone": torch.zeros_like(text.z_t)}[way]


def evaluate(args):
    """Draw captions that training never showed, in every way of WAYS, and read the pictures.

    Accuracy: every stated attribute right, by the exact reader, at full size. Frechet distance: of
    CLIP's embeddings of what was drawn to those of true pictures of the captions. Diversity: how
    far apart two drawings of one caption are at the decoder's size, over that of two true pictures.
    """
    model, n = unclip.load(args.weights, unclip.pick_device(args.device)), args.captions
    if n < 3:
        raise ValueError(f"expected at least 3 captions, for one of each kind, got {n}")
    rng, start = random.Random(args.seed), time.monotonic()
    sets = {"one thing": [random_scene(rng, two=False, part="test") for _ in range(2 * n // 5)],
            "two things": [random_scene(rng, two=True, part="test") for _ in range(n - 2 * n // 5)],
            "held-out pairs": [random_scene(rng, part="held-out") for _ in range(2 * n // 5)]}
    scenes, table = [scene for part in sets.values() for scene in part], []
    true = render_many(scenes, model.sizes[-1])
    true_z = clip.unit(torch.cat([model.encode_image(x) for x in true.split(100)]))
    small = [render_many([place(stated(s), rng) for s in scenes[:100]], model.sizes[0])
             for _ in range(2)]
    for way in args.ways:
        generator, seen, drawn, twice = torch.Generator().manual_seed(args.seed), [], [], []

        def draw(i):
            """Small pictures of the captions i to i + 19."""
            captions = [caption(scene) for scene in scenes[i:i + 20]]
            text = model.encode_text([c for c in captions for _ in range(4 if way == BEST else 1)])
            z_i = embeddings(model, text, true[i:i + 20], way, generator)
            x = model.draw(z_i, text, upsampler_steps=(), generator=generator)
            return model.rerank(x, captions, keep=1) if way == BEST else x

        for i in tqdm(range(0, len(scenes), 20), desc=way, leave=False):
            drawing = draw(i)
            pictures = model.enlarge(drawing, generator=generator)
            seen += [agrees(a, read(b)) for a, b in zip(scenes[i:i + 20], pictures)]
            drawn.append(model.encode_image(pictures))
            if i < 100:
                twice.append((drawing - draw(i)).square().mean())
        row, seen = {"way": way}, iter(seen)
        for name, part in sets.items():
            row[name] = float(np.mean([next(seen) for _ in part]))
        row["Frechet distance"] = frechet(clip.unit(torch.cat(drawn)), true_z)
        row["diversity"] = float(torch.stack(twice).mean() / (small[0] - small[1]).square().mean())
        table.append(row)
        print("  ".join(v if k == "way" else f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    print(markdown(table))
    counts = ", ".join(f"{len(part)} {name}" for name, part in sets.items())
    print(f"{counts}; {time.monotonic() - start:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({"captions": counts, "rows": table}, indent=1) + "\n")


def markdown(table):
    """The rows of `evaluate` as the README shows them."""
    lines = ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
    for row in table:
        shares = [f"{100 * v:.1f} %" for v in list(row.values())[1:4]]
        lines.append("| " + " | ".join([row["way"], *shares, f"{row['Frechet distance']:.3f}",
                                        f"{row['diversity']:.2f}"]) + " |")
    return "\n".join(lines)


# ---- The paper's findings, with exact numbers ----------------------------------------------------
# Each finding is a function (model, out) -> (numbers, sentence) that also draws out/NAME.png. All
# is measured on the decoder's small pictures, which the reader reads as exactly as large ones; a
# number is (mean, standard deviation) over SEEDS runs with other scenes and other noise.
# Steps: DDIM's, both ways; a caption is drawn in half as many.

SEEDS, PICTURES, MANY, STEPS = 3, 20, 67, 25      # runs; pictures in each, some in MANY; steps


def over_seeds(measure):
    """measure(seed) -> {key: number}, run for every seed -> {key: (mean, standard deviation)}."""
    runs = [measure(seed) for seed in range(SEEDS)]
    return {key: (float(np.mean([run[key] for run in runs])),
                  float(np.std([run[key] for run in runs], ddof=1))) for key in runs[0]}


def some_scenes(seed, n, **options):
    rng = random.Random(1000 + seed)
    return [random_scene(rng, **({"part": "test", "unstated": 0.0} | options)) for _ in range(n)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw_small(model, scenes, way, generator, **options):
    """The scenes' captions drawn in one of WAYS -> (B, 3, h, h)."""
    text = model.encode_text([caption(s) for s in scenes])
    z_i = embeddings(model, text, render_many(scenes, 64), way, generator)
    return model.draw(z_i, text, decoder_steps=STEPS // 2, upsampler_steps=(),
                      generator=generator, **options)


def small_again(model, z_i, x_T, generator=None, **options):
    return model.decode(z_i, x_T, steps=STEPS, upsampler_steps=(), generator=generator, **options)


def fraction(truths):
    return float(np.mean([bool(truth) for truth in truths]))


def right(scenes, pictures):
    """The share of pictures in which everything stated is right."""
    return fraction(agrees(stated(s), read(x)) for s, x in zip(scenes, pictures))


def diversity(a, b, scenes):
    """How far apart two drawings of each caption are, over that of two true pictures of it."""
    rng, size = random.Random(0), a.shape[2]
    true = [render_many([place(stated(s), rng) for s in scenes], size) for _ in range(2)]
    return float((a - b).square().mean() / (true[0] - true[1]).square().mean())


def differ(a, b):
    """Do two readings differ in place (1/64 of the side), size (5 %) or shade (a tenth of all)?"""
    return any(max(abs(s.x - t.x), abs(s.y - t.y)) > 1 / 64 or abs(s.r / t.r - 1) > 0.05
               or abs(s.shade - t.shade) > 0.2
               for s, t in zip(a.canonical().things, b.canonical().things))


def attributes(scene):
    """What the reader can get right or wrong, one by one, in the order of `canonical`."""
    scene = scene.canonical()
    return {"number": len(scene.things), "relation": scene.relation,
            **{name: tuple(getattr(t, name) for t in scene.things)
               for name in ("colour", "shape", "size")}}


def draw_curves(path, panels, note):
    """One chart for each panel (title, x label, x values, {label: [(mean, deviation), ...]}).

    Points are joined where x are numbers, not where they are names.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.7), squeeze=False)
    for axis, (title, x_label, x, curves) in zip(axes[0], panels):
        for label, points in curves.items():
            mean, deviation = np.array(points).T
            axis.errorbar(range(len(x)), mean, deviation, label=label, marker="o", markersize=3,
                          capsize=2, linestyle="" if isinstance(x[0], str) else "-")
        axis.set(title=title, xlabel=x_label, xticks=range(len(x)), xticklabels=x,
                 ylim=(0, 1.05 * axis.get_ylim()[1]))
        if len(curves) > 1:
            axis.legend(fontsize=7)
    finish(figure, path, note)


def draw_grid(path, rows, row_names, column_names, note):
    """Rows of small pictures (3, h, h), with names at the left and at the top."""
    across, down = len(rows[0]), len(rows)
    figure, axes = plt.subplots(down, across, figsize=(0.9 * across + 1, 0.9 * down + 0.6),
                                squeeze=False)
    for i, j in itertools.product(range(down), range(across)):
        axes[i, j].imshow(unclip.to_pil(rows[i][j]), interpolation="nearest")
        axes[i, j].set(xticks=[], yticks=[])
        if i == 0:
            axes[i, j].set_title(column_names[j], fontsize=7)
        if j == 0:
            axes[i, j].set_ylabel(textwrap.fill(row_names[i], 16), fontsize=6.5, rotation=0,
                                  ha="right", va="center")
    finish(figure, path, note)


def finish(figure, path, note):
    figure.tight_layout()
    figure.text(0.5, -0.02, textwrap.fill(note, 95), ha="center", va="top", fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def find_variations(model, out):
    """Fig. 3: what z_i says stays, the rest varies, more with eta."""
    etas = (0.25, 0.5, 1.0)

    def measure(seed):
        scenes, generator, row = some_scenes(seed, MANY), seeded(seed), {}
        z_i, x_T = model.latent(render_many(scenes, 64), STEPS)
        again = small_again(model, z_i, x_T)
        row["PSNR of the reconstruction"] = psnr(again, render_many(scenes, model.sizes[0]))
        row["kept, eta 0.0"] = right(scenes, again)
        for eta in etas:
            a, b = (small_again(model, z_i, x_T, generator, eta=eta) for _ in range(2))
            row[f"kept, eta {eta}"] = (right(scenes, a) + right(scenes, b)) / 2
            row[f"differ, eta {eta}"] = fraction(differ(read(x), read(y)) for x, y in zip(a, b))
            row[f"spread, eta {eta}"] = diversity(a, b, scenes)
        return row

    numbers, scenes = over_seeds(measure), some_scenes(0, 3)
    z_i, x_T = model.latent(render_many(scenes, 64), STEPS)
    draw_grid(out / "variations.png",
              [[true, *[small_again(model, z_i[i:i + 1], x_T[i:i + 1], seeded(j), eta=eta)[0]
                        for j, eta in enumerate((0.0, 0.25, 0.25, 0.5, 1.0, 1.0))]]
               for i, true in enumerate(render_many(scenes, model.sizes[0]))],
              [caption(s) for s in scenes],
              ["picture", "eta 0", "eta 0.25", "eta 0.25", "eta 0.5", "eta 1", "eta 1"],
              "Variations of a picture (paper, fig. 3): CLIP's embedding stays, the noise changes.")
    return numbers, "; ".join(
        f"eta {eta}: {percent(numbers[f'kept, eta {eta}'])} keep all a caption says, "
        f"{percent(numbers[f'differ, eta {eta}'])} differ in place, size or shade, spread "
        f"{number(numbers[f'spread, eta {eta}'])} of that of fresh pictures" for eta in etas)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], the mean over the batch."""
    return float((-10 * ((a - b).square().flatten(1).mean(1) / 4).log10()).mean())


def find_interpolations(model, out):
    """Fig. 4: from one picture to another, each attribute changes once."""
    K = 7
    shares = torch.linspace(0, 1, K)[:, None]

    def path(a, b):
        (z_a, x_a), (z_b, x_b) = (model.latent(render_many([s], 64), STEPS) for s in (a, b))
        x_T = diffusion.slerp(x_a.flatten(1), x_b.flatten(1), shares).unflatten(1, x_a.shape[1:])
        return small_again(model, diffusion.slerp(z_a, z_b, shares), x_T)

    def measure(seed):
        scenes, ends, once = some_scenes(seed, PICTURES, two=False, part="train"), [], []
        for a, b in zip(scenes[::2], scenes[1::2]):
            seen = [read(x) for x in path(a, b)]
            ends += [agrees(a, seen[0]), agrees(b, seen[-1])]
            for name in ("colour", "shape", "size"):
                first, last = attributes(a)[name], attributes(b)[name]
                way = [attributes(s)[name] for s in seen]
                if first != last:
                    once.append(any(way == [first] * i + [last] * (K - i) for i in range(1, K)))
        return {"ends reconstruct": fraction(ends), "attributes switch once": fraction(once)}

    numbers, scenes = over_seeds(measure), some_scenes(1, 6, two=False, part="train")
    draw_grid(out / "interpolations.png", [path(a, b) for a, b in zip(scenes[::2], scenes[1::2])],
              [f"{caption(a)} to {caption(b)}" for a, b in zip(scenes[::2], scenes[1::2])],
              [f"{float(x):.2f}" for x in shares],
              "From one picture to another (paper, fig. 4): z_i and x_T turned together.")
    return numbers, (f"{percent(numbers['ends reconstruct'])} of the ends come back; "
                     f"{percent(numbers['attributes switch once'])} of the attributes that differ "
                     "switch exactly once")


def edit_of(scene, kind, rng):
    """A one-thing scene with another colour, shape or size, never a held-out pair."""
    t = scene.things[0]
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[kind]
    choices = [Scene((replace(t, **{kind: v}),)) for v in values if v != getattr(t, kind)]
    return stated(rng.choice([s for s in choices if split(s) != "held-out"] or choices))


def find_text_diffs(model, out):
    """Fig. 5: words change what they name and leave the rest."""
    strengths, kinds = (0.25, 0.3, 0.4, 0.5), ("colour", "shape", "size")

    def edited(z_i, x_T, scenes, targets, strength):
        z_d = model.difference([caption(stated(s)) for s in scenes], [caption(s) for s in targets])
        return small_again(model, diffusion.slerp(z_i, z_d, strength), x_T)

    def measure(seed):
        row, scenes = {}, some_scenes(seed, MANY, two=False, part="train")
        latent = model.latent(render_many(scenes, 64), STEPS)
        for kind, strength in itertools.product(kinds, strengths):
            rng = random.Random(seed)
            targets = [edit_of(s, kind, rng) for s in scenes]
            seen = [attributes(read(x)) for x in edited(*latent, scenes, targets, strength)]
            want = [attributes(s) for s in targets]
            row[f"{kind} reached, {strength}"] = fraction(
                a[kind] == b[kind] for a, b in zip(seen, want))
            row[f"rest kept, {kind}, {strength}"] = fraction(
                all(a[k] == b[k] for k in kinds if k != kind) for a, b in zip(seen, want))
        return row

    numbers, scenes = over_seeds(measure), some_scenes(2, 3, two=False, part="train")
    targets = [edit_of(s, kind, random.Random(0)) for s, kind in zip(scenes, kinds)]
    latent = model.latent(render_many(scenes, 64), STEPS)
    columns = [edited(*latent, scenes, targets, strength) for strength in (0.0, *strengths)]
    draw_grid(out / "text_diffs.png", [[c[i] for c in columns] for i in range(3)],
              [f"{caption(s)} to {caption(t)}" for s, t in zip(scenes, targets)],
              ["0 (inverted)", *map(str, strengths)],
              "Edited by words (paper, fig. 5): z_i turned towards the difference of two captions.")
    best = {kind: max(strengths, key=lambda s: numbers[f"{kind} reached, {s}"][0]
                      + numbers[f"rest kept, {kind}, {s}"][0]) for kind in kinds}
    return numbers, "; ".join(
        f"{kind}: {percent(numbers[f'{kind} reached, {s}'])} reach the target, "
        f"{percent(numbers[f'rest kept, {kind}, {s}'])} keep the rest (strength {s})"
        for kind, s in best.items())


def find_pca(model, out):
    """Fig. 7: the first principal components hold what matters most to CLIP."""
    ks = (0, 1, 2, 4, 6, 9, 14, 64)              # 0: the mean of all pictures, a guess
    names = ("number", "colour", "relation", "size", "shape")
    z = clip.unit(model.encode_image(render_many(some_scenes(9, 2000, part=None), 64)))
    mean, basis = prior.principal_components(z, keep=1.0)

    def again(scenes, k, seed):
        z_i, size = clip.unit(model.encode_image(render_many(scenes, 64))), model.sizes[0]
        z_i = clip.unit(mean + (z_i - mean) @ basis[:, :k] @ basis[:, :k].T)
        x_T = torch.randn(len(z_i), 3, size, size, generator=seeded(seed))
        return small_again(model, z_i, x_T)

    def measure(seed):
        row, scenes = {}, some_scenes(seed, PICTURES)
        for k in ks:
            seen = [attributes(read(x)) for x in again(scenes, k, seed)]
            for name in names:
                row[f"{name}, k = {k}"] = fraction(
                    attributes(s)[name] == a[name] for s, a in zip(scenes, seen))
        return row

    numbers, scenes = over_seeds(measure), some_scenes(4, 3, two=True)
    columns = [again(scenes, k, 0) for k in ks]
    draw_grid(out / "pca.png", [[c[i] for c in columns] for i in range(3)],
              [caption(s) for s in scenes], [f"k = {k}" for k in ks],
              "Drawn from the first k principal components of z_i (paper, fig. 7).")
    most = {}
    for name in names:
        guess, *shares = (numbers[f"{name}, k = {k}"][0] for k in ks)
        most[name] = next((k for k, share in zip(ks[1:], shares)
                           if share - guess >= 0.8 * (shares[-1] - guess)), ks[-1])
    return numbers, "components that win 80 % of what all of z_i wins over a guess: " + ", ".join(
        f"{name} {k}" for name, k in sorted(most.items(), key=lambda pair: pair[1]))


def find_prior(model, out):
    """Fig. 8, table 2: is the prior worth its place?  And table 1: which prior?"""
    def measure(seed):
        row, scenes = {}, some_scenes(seed, PICTURES)
        true_z = clip.unit(model.encode_image(render_many(some_scenes(50 + seed, 200), 64)))
        for way in WAYS:
            generator = seeded(seed)
            a, b = (draw_small(model, scenes, way, generator) for _ in range(2))
            row[f"{way}: accuracy"] = (right(scenes, a) + right(scenes, b)) / 2
            row[f"{way}: diversity"] = diversity(a, b, scenes)
            row[f"{way}: Frechet distance"] = frechet(
                clip.unit(model.encode_image(torch.cat([a, b]))), true_z)
        return row

    numbers = over_seeds(measure)
    bars = {key: [numbers[f"{way}: {key}"] for way in WAYS]
            for key in ("accuracy", "diversity", "Frechet distance")}
    short = ["diffusion", "AR", "true z_i", "z_t", "caption"]
    draw_curves(out / "prior.png", [(key, "z_i from", short, {"": points})
                                    for key, points in bars.items()],
                "Five answers to 'which z_i?' under one decoder (paper, fig. 8 and table 2).")
    verdict = numbers["diffusion prior: accuracy"][0] > numbers["caption alone: accuracy"][0]
    return numbers, ", ".join(f"{way} {percent(numbers[f'{way}: accuracy'])}" for way in WAYS) + (
        "; as in the paper the prior beats the caption alone" if verdict else
        "; unlike in the paper the prior does not beat the caption alone")


def find_guidance(model, out):
    """Fig. 9 to 11: guidance costs GLIDE (here: the caption alone) diversity, unCLIP less."""
    scales, ways = (1.0, 2.0, 3.0, 5.0), ("diffusion prior", "caption alone")

    def measure(seed):
        row, scenes = {}, some_scenes(seed, PICTURES)
        for way, scale in itertools.product(ways, scales):
            generator = seeded(seed)
            a, b = (draw_small(model, scenes, way, generator, guidance=scale) for _ in range(2))
            row[f"{way}: accuracy, {scale}"] = (right(scenes, a) + right(scenes, b)) / 2
            row[f"{way}: diversity, {scale}"] = diversity(a, b, scenes)
        return row

    numbers = over_seeds(measure)
    draw_curves(out / "guidance.png",
                [(key, "guidance scale", scales,
                  {way: [numbers[f"{way}: {key}, {s}"] for s in scales] for way in ways})
                 for key in ("accuracy", "diversity")],
                "Guidance for unCLIP and for the same decoder with the caption alone "
                "(paper, fig. 9 to 11).")
    lost = {way: numbers[f"{way}: diversity, 5.0"][0] / numbers[f"{way}: diversity, 1.0"][0]
            for way in ways}
    return numbers, (f"from scale 1 to 5 diversity changes by a factor of {lost[ways[0]]:.2f} for "
                     f"unCLIP and {lost[ways[1]]:.2f} for the caption alone" +
                     ("" if lost[ways[0]] > lost[ways[1]] else " (unlike in the paper)"))


def find_priors_cost(model, out):
    """Table 1, app. C: the AR and the diffusion prior, trained for about the same time."""
    text = model.encode_text([caption(s) for s in some_scenes(0, 8)])
    numbers = {}
    for which in ("diffusion", "ar"):
        with FlopCounterMode(display=False) as counter:
            model.embed(text, which=which, generator=seeded(0))
        numbers[f"{which}: MFLOP an embedding"] = (counter.get_total_flops() / 8e6, 0.0)
        numbers[f"{which}: seconds of training"] = (model.seconds.get(f"{which}_prior", 0.0), 0.0)
    draw_curves(out / "priors_cost.png",
                [(key, "prior", ["diffusion", "AR"],
                  {"": [numbers[f"{which}: {key}"] for which in ("diffusion", "ar")]})
                 for key in ("MFLOP an embedding", "seconds of training")],
                "What the two priors cost; how good they are: prior.png (paper, table 1).")
    return numbers, ", ".join(f"{key} {value[0]:.0f}" for key, value in numbers.items())


def find_binding(model, out):
    """Fig. 14 and 15: which of the two cubes was red?"""
    ways = ("true image embedding", "diffusion prior", "caption alone")

    def measure(seed):
        row, rng, scenes = {}, random.Random(seed), []
        while len(scenes) < PICTURES:
            scene = random_scene(rng, two=True, part="test", unstated=0.0)
            a, b = scene.things
            if a.shape == b.shape and a.size == b.size and a.colour != b.colour:
                scenes.append(scene)
        for way in ways:
            seen = [read(x) for x in draw_small(model, scenes, way, seeded(seed))]
            row[f"{way}: right"] = fraction(agrees(stated(s), x) for s, x in zip(scenes, seen))
            row[f"{way}: swapped"] = fraction(agrees(swaps(s)[1], x) for s, x in zip(scenes, seen))
        return row

    numbers = over_seeds(measure)
    scenes = [place(parse(text), random.Random(0))
              for text in ("a large red square above a large blue square",
                           "a large blue square above a large red square")]
    draw_grid(out / "binding.png",
              [draw_small(model, scenes[i:i + 1] * 6, "diffusion prior", seeded(i))
               for i in range(2)],
              [caption(s) for s in scenes], [""] * 6,
              "'A red cube on top of a blue cube' (paper, fig. 14 and 15).")
    return numbers, "; ".join(f"{way}: {percent(numbers[f'{way}: right'])} right, "
                              f"{percent(numbers[f'{way}: swapped'])} with the colours exchanged"
                              for way in ways)


def find_samplers(model, out):
    """Which sampler needs how many steps?   IDDPM fig. 8, DDIM table 1, Analytic-DPM table 1."""
    counts, d = (5, 10, 25, 50), model.parts["decoder"]
    kinds = {"learned": {"variance": "learned"}, "fixed small": {"variance": "small"},
             "fixed large": {"variance": "large"}, "DDIM": {"eta": 0.0}}
    prior_kinds = {"analytic": model.parts["diffusion_prior"].cov.cpu().double(),
                   "fixed small": "small"}

    def measure(seed):
        row, scenes = {}, some_scenes(seed, PICTURES)
        true = render_many(scenes, 64)
        z_true = clip.unit(model.encode_image(true))
        text, size = model.encode_text([caption(s) for s in scenes]), model.sizes[0]
        denoise = d.denoiser(z_true, text, model.config.sampling.guidance)
        for (kind, options), count in itertools.product(kinds.items(), counts):
            generator = seeded(seed)
            times = (d.ddim_times if "eta" in options else
                     lambda k: diffusion.spaced_timesteps(d.config.T, k))(count)
            x = diffusion.sample(denoise, d.alphabar, torch.randn(
                len(text.z_t), 3, size, size, generator=generator),
                                 times, clamp=1.0, generator=generator, **options)
            row[f"{kind}: accuracy, {count}"] = right(scenes, x)
            row[f"{kind}: Frechet distance, {count}"] = frechet(
                clip.unit(model.encode_image(x.clamp(-1, 1))), z_true)
        p = model.parts["diffusion_prior"]
        denoise = p.denoiser(text)
        for (kind, variance), count in itertools.product(prior_kinds.items(), counts):
            generator = seeded(seed)
            x = diffusion.sample(denoise, p.alphabar,
                                 torch.randn(z_true.shape, generator=generator),
                                 diffusion.spaced_timesteps(p.config.T, count), predicts="x0",
                                 variance=variance, generator=generator)
            row[f"prior, {kind}: Frechet distance, {count}"] = frechet(p.unscale(x), z_true)
        return row

    numbers = over_seeds(measure)
    panels = [(f"decoder: {key}", "steps", counts,
               {kind: [numbers[f"{kind}: {key}, {k}"] for k in counts] for kind in kinds})
              for key in ("accuracy", "Frechet distance")]
    panels.append(("prior: Frechet distance", "steps", counts, {
        kind: [numbers[f"prior, {kind}: Frechet distance, {k}"] for k in counts]
        for kind in prior_kinds}))
    draw_curves(out / "samplers.png", panels,
                "Samplers against the number of steps (IDDPM fig. 8; Analytic-DPM in the prior).")
    return numbers, "accuracy with 10 and 50 steps: " + ", ".join(
        f"{kind} {percent(numbers[f'{kind}: accuracy, 10'])} and "
        f"{percent(numbers[f'{kind}: accuracy, 50'])}" for kind in kinds)


@torch.enable_grad()
def climb(model, captions, steps=60, generator=None):
    """What people did before: pixels moved uphill on CLIP's similarity to the caption.

    -> (B, 3, S, S), S the side that CLIP sees. It fools CLIP rather than drawing anything.
    """
    z_t, size = clip.unit(model.encode_text(captions).z_t), model.config.clip.image_size
    x = 0.1 * torch.randn(len(z_t), 3, size, size, generator=generator) + 0.8
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(steps):
        z_i = clip.unit(model.parts["clip"].encode_image(x.clamp(-1, 1)))
        x.grad, = torch.autograd.grad(-(z_i * z_t).sum(), x)
        optimizer.step()
    return x.detach().clamp(-1, 1)


def find_clip_guided(model, out):
    """Before unCLIP: a picture optimised until CLIP likes it."""
    def measure(seed):
        scenes = some_scenes(seed, PICTURES, two=False)
        texts = [caption(s) for s in scenes]
        a, b = climb(model, texts, generator=seeded(seed)), draw_small(
            model, scenes, "diffusion prior", seeded(seed))
        z_t = clip.unit(model.encode_text(texts).z_t)
        return {f"{name}: {key}": value for name, x in (("ascent", a), ("unCLIP", b))
                for key, value in {"accuracy": right(scenes, x), "cosine": float(
                    (clip.unit(model.encode_image(x)) * z_t).sum(1).mean())}.items()}

    numbers, scenes = over_seeds(measure), some_scenes(3, 6, two=False)
    texts = [caption(s) for s in scenes]
    draw_grid(out / "clip_guided.png", [climb(model, texts, generator=seeded(0)),
                                        draw_small(model, scenes, "diffusion prior", seeded(0))],
              ["gradient ascent on CLIP", "unCLIP"], [textwrap.fill(t, 16) for t in texts],
              "A picture optimised to please CLIP, and one by unCLIP.")
    return numbers, (f"gradient ascent pleases CLIP more (cosine "
                     f"{number(numbers['ascent: cosine'])} against "
                     f"{number(numbers['unCLIP: cosine'])}) but is right in "
                     f"{percent(numbers['ascent: accuracy'])}, unCLIP in "
                     f"{percent(numbers['unCLIP: accuracy'])}")


FINDINGS = {"variations": (find_variations, "Fig. 3"),
            "interpolations": (find_interpolations, "Fig. 4"),
            "text_diffs": (find_text_diffs, "Fig. 5"), "pca": (find_pca, "Fig. 7"),
            "prior": (find_prior, "Fig. 8, table 2"), "guidance": (find_guidance, "Fig. 9-11"),
            "priors_cost": (find_priors_cost, "Table 1"), "binding": (find_binding, "Fig. 14, 15"),
            "samplers": (find_samplers, "Sec. 2.2, app. C"),
            "clip_guided": (find_clip_guided, "Sec. 6")}


def percent(value):
    return f"{100 * value[0]:.0f} ± {100 * value[1]:.0f} %"


def number(value):
    return f"{value[0]:.2f} ± {value[1]:.2f}"


def figures(args):
    """Draw the paper's findings at toy scale, and write all numbers into findings.json."""
    model, out = unclip.load(args.weights), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "findings.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in args.only or FINDINGS:
        find, where = FINDINGS[name]
        start = time.monotonic()
        with torch.no_grad():
            numbers, sentence = find(model, out)
        found[name] = {"paper": where, "sentence": sentence, "numbers": numbers,
                       "seconds": round(time.monotonic() - start)}
        print(f"{name} ({found[name]['seconds']} s): {sentence}", flush=True)
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(findings_table(found))


def findings_table(found):
    """findings.json as the README shows it."""
    return "\n".join(["| finding | paper | here |", "|---|---|---|",
                      *(f"| [{name.replace('_', ' ')}](pictures/{name}.png) | {row['paper']} | "
                        f"{row['sentence']} |" for name, row in found.items())])


GALLERY = ("a small red circle above a large blue square", "a large orange square",
           "a large cyan circle left of a small purple cross",
           "a small yellow circle below a large black cross",
           "a large green square right of a small orange triangle", "a small blue triangle")


def gallery(args):
    """Captions and the pictures made of them, a row of six: the first thing in the README."""
    model = unclip.load(args.weights, unclip.pick_device(args.device))
    pictures = model.sample(GALLERY, generator=torch.Generator().manual_seed(args.seed))
    figure, axes = plt.subplots(1, len(GALLERY), figsize=(2.1 * len(GALLERY), 2.7))
    for axis, text, picture in zip(axes, GALLERY, pictures):
        axis.imshow(unclip.to_pil(picture))
        axis.set_title(textwrap.fill(text, 20), fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100, bbox_inches="tight")
    print(f"wrote {args.out}; the reader sees: " + "; ".join(caption(read(x)) for x in pictures))


def show_world(args):
    """A sheet of random scenes: what the caption says, and what the reader reads."""
    rng = random.Random(args.seed)
    scenes = [random_scene(rng) for _ in range(18)]
    figure, axes = plt.subplots(3, 6, figsize=(12.6, 9.6))
    for axis, scene in zip(axes.flat, scenes):
        picture = render(scene, 256)
        seen = caption(read(picture))
        axis.imshow(unclip.to_pil(picture))
        axis.set_title(textwrap.fill(caption(scene), 24), fontsize=9)
        axis.set_xlabel(textwrap.fill(f"read: {seen}", 26), fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(args.out, dpi=80)
    plt.close(figure)
    print(f"wrote {args.out}: 18 scenes, captions above, what the reader reads below")


def run_read(args):
    picture = clip.read_picture(args.picture)
    print(caption(read(clip.preprocess(picture, min(picture.size)))))


# ---- Command line --------------------------------------------------------------------------------

COMMANDS = {"read": run_read, "evaluate": evaluate, "figures": figures, "gallery": gallery,
            "world": show_world}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else "train"
    parser = argparse.ArgumentParser(
        "train_toy.py" + f" {command}" * (command != "train"), allow_abbrev=False,
        formatter_class=unclip.HelpFormatter,
        description={"read": "Say what is in a picture of the toy world.",
                     "evaluate": "Draw captions that training never showed and read the pictures.",
                     "figures": figures.__doc__, "gallery": gallery.__doc__,
                     "world": show_world.__doc__,
                     "train": "Train the whole stack. Other commands: read PICTURE, world, "
                              "evaluate, figures, gallery (train_toy.py COMMAND --help)."}[command])
    option = parser.add_argument
    if command == "read":
        option("picture")
    else:
        if command not in ("world", "figures"):
            option("--device", default="cpu", help="cpu, cuda, mps")
        if command != "figures":
            option("--seed", type=int, default=0, help="of all randomness")
    if command in ("evaluate", "figures", "gallery"):
        option("--weights", default=str(unclip.HERE / "weights/toy.pt"), metavar="PATH",
               help="a checkpoint of train_toy.py")
    if command == "gallery":
        option("-o", "--out", default="pictures/gallery.png", help="where to write the picture")
    if command == "world":
        option("-o", "--out", default="world.png", help="where to write the sheet")
    if command == "figures":
        option("--out", default="pictures", metavar="FOLDER", help="where to write")
        option("--only", nargs="+", choices=FINDINGS, help="draw these only")
    if command == "evaluate":
        option("--captions", type=unclip.positive, default=500, metavar="N",
               help="2/5 of one thing, 3/5 of two; and as many of held-out pairs as of one")
        option("--ways", nargs="+", choices=(BEST, *WAYS), default=(BEST, *WAYS),
               help="what the decoder is given as image embedding")
        option("--json", metavar="PATH", help="write the table there too")
    if command == "train":
        option("--preset", choices=RECIPES, default="toy", help="the networks and their settings")
        option("--data", metavar="FOLDER", help="your pictures, NAME.png or NAME.jpg beside "
               "NAME.txt (without: the toy world)")
        option("--out", default="runs/toy", metavar="FOLDER", help="where to write")
        option("--resume", action="store_true", help="go on where the run in --out stopped")
        option("--only", nargs="+", choices=STAGES, help="train these parts only, over the CLIP "
               "of the run that is resumed; without one it is trained first")
        option("--steps-scale", type=unclip.finite, default=1.0, metavar="X",
               help="all steps times X")
        option("--batch", type=unclip.positive, metavar="N",
               help="pictures in a step, over all processes (default: the preset's)")
        option("--vocab", metavar="PATH", help="read the tokenizer there (OpenAI's merges file, or "
               "a folder with vocab.json and merges.txt), do not learn it from the captions")
        option("--dtype", default="fp32", choices=("fp32", "bf16"),
               help="of matrix products; the weights are float32")
        option("--recompute", action="store_true",
               help="keep less in memory on the way there, compute it again on the way back")
        option("--compile", action="store_true",
               help="with torch.compile (under torchrun most stays as it is)")
        option("--groups", type=unclip.positive, default=6000, metavar="N",
               help="groups of four scenes in the toy world's training set")
        option("--sam", type=unclip.finite, default=0.0, metavar="RHO",
               help="train CLIP with sharpness-aware steps, as the paper did (0.1)")
        option("--save-seconds", type=unclip.finite, metavar="S",
               help="how often to save what --resume needs (default: every 20 s; with --preset "
               "paper every half hour)")
    args = parser.parse_args(argv if command == "train" else argv[1:])
    unclip.stop_on_error(COMMANDS.get(command, run), args)


if __name__ == "__main__":
    main()
