"""The paper's findings at toy scale: tables of settings, and one function that draws a setting.

    python extras/findings.py figures                             all of them, into pictures/
    python extras/findings.py figures --only prior --scenes 4     one of them, in seconds
    python extras/findings.py experiments                         "change one thing"
    python extras/findings.py gallery                             README's first images
    python extras/findings.py bounds                              the lowest possible losses
    python extras/findings.py ablate --seeds 2                    each training trick left out

Images are the decoder's, which the exact parser reads as well as large ones. A number is the mean
and the standard deviation over seeds; each seed has other scenes and other noise.

    B scenes   n images of each   h side of a small image   D width of an embedding
"""
import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import json
import random
import sys
import textwrap
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import unclip                                     # first: it sets how idle threads wait

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import clip
import decoder
import diffusion
import prior
import train_toy
from extras import benchmark
from train_toy import Object, Scene, caption, plt, render_many, stated

STEPS = 25                                        # of DDIM, each way
GROUPS = 300                                      # of training scenes to search, a scene drawn
KINDS = ("colour", "shape", "size")               # attributes of an object

# ---------------------------------------------------------------- a setting, and what it draws


@dataclass(frozen=True)
class Setting:
    """How images are drawn and what is measured. What is not given is as the weights bring it."""
    condition: str = "diffusion prior"            # of train_toy.CONDITIONS, or a key of DRAW
    n: int = 1                                    # images of each scene; 0: its embedding alone
    measures: tuple = ("accuracy",)               # of MEASURES
    sampling: dict = field(default_factory=dict)  # changes of unclip.Sampling
    rerank: int = 1                               # of so many images CLIP chooses one
    wording: str = "as trained"                   # of the captions, see WORDINGS
    upsample: str = ""                            # "network" or "bicubic": to the largest size
    sampler: dict = field(default_factory=dict)   # changed options of diffusion.sample
    bug: str = ""                                 # of extras/museum.py
    eta: float = 0.0                              # this and the next six, of given images: DDIM's
    guidance: float = 1.0                         # DDIM's
    edit: str = ""                                # the attribute that a text diff changes
    strength: float = 0.5                         # of the text diff
    components: int | None = None                 # so many principal components of z_i; x_T is new
    told: bool = False                            # interpolations: the decoder reads captions
    noise: str = "slerp"                          # of interpolations


@torch.no_grad()
def draw(model, scenes, setting, seed=0, baseline=None):
    """B scenes under a setting -> a namespace with images (B, n, 3, h, h) and what is seen there.

    baseline: a stack whose decoder was trained on captions alone; it draws "caption alone".
    """
    captions, targets = zip(*(WORDINGS[setting.wording](scenes, i) for i in range(len(scenes))))
    if setting.edit:
        rng = random.Random(seed)
        targets = [edited(scene, setting.edit, rng) for scene in scenes]
    artist = copy.copy(baseline if baseline and setting.condition == "caption alone" else model)
    sampling = replace(artist.config.sampling, **setting.sampling)
    artist.config = replace(artist.config, sampling=sampling)
    d = SimpleNamespace(
        model=model, artist=artist, setting=setting, seed=seed, scenes=scenes, captions=captions,
        targets=targets, true=render_many(scenes, 64), size=artist.config.decoder.unet.size,
        generator=torch.Generator().manual_seed(seed))

    # a sampler of another kind, or one of the museum's bugs, in place of our function
    sample = diffusion.sample
    changes = {"diffusion.sample": lambda *x, **how: sample(*x, **(how | setting.sampler))}
    if setting.bug:
        import museum
        changes = {museum.BUGS[setting.bug].function: museum.broken(museum.BUGS[setting.bug])}
    with patched(changes):
        d.images = DRAW.get(setting.condition, draw_captions)(d)
    if setting.upsample:
        small, size = d.images.flatten(0, 1), artist.config.upsampler2.unet.size
        large = unclip.resize(small, size) if setting.upsample == "bicubic" else \
            artist.upsample(small, generator=d.generator)
        d.images = large.unflatten(0, d.images.shape[:2])

    # as CLIP and the parser see them
    if setting.n:
        d.z = clip.unit(model.encode_image(d.images.flatten(0, 1)))        # (B n, D)
    d.seen = [[train_toy.read(x) for x in row] for row in d.images]
    d.pairs = [(a, b) for a, row in zip(targets, d.seen) for b in row]
    return d


@contextlib.contextmanager
def patched(changes):
    """{"module.function": another one}, for the time being."""
    with contextlib.ExitStack() as stack:
        for name, new in changes.items():
            stack.enter_context(mock.patch(name, new))
        yield


def draw_captions(d):
    """The condition is one of train_toy.CONDITIONS."""
    images = []
    for _ in range(max(1, d.setting.n)):
        text = d.artist.encode_text([c for c in d.captions for _ in range(d.setting.rerank)])
        d.z_i = train_toy.embedding(d.artist, d.setting.condition, text, d.true, d.generator)
        if d.setting.n:
            x = d.artist.sample_decoder(d.z_i, text, generator=d.generator)
            n = d.setting.rerank
            images.append(d.artist.rerank(x, text.z_t[::n]) if n > 1 else x)
    return torch.stack(images, 1) if images else torch.empty(len(d.scenes), 0)


def draw_image(d):
    """From the bipartite latents of true images: varied, edited, or of few components.   Sec. 3"""
    d.z_i, text = clip.unit(d.model.encode_image(d.true)), None
    if d.setting.edit:                            # as UnCLIP.text_diff, which edits one image
        source = d.artist.encode_text(d.captions)
        text = d.artist.encode_text([caption(target) for target in d.targets])
        x_T = d.artist.latent(d.true, STEPS, text=source)[1]
        z_d = clip.unit(clip.unit(text.z_t) - clip.unit(source.z_t))
        d.z_i = unclip.slerp(d.z_i, z_d, d.setting.strength)
    elif d.setting.components is None:
        x_T = d.artist.latent(d.true, STEPS)[1]
    else:
        mean, basis = components(d.model, 100 * len(d.scenes))
        basis = basis[:, :d.setting.components]
        d.z_i = clip.unit(mean + (d.z_i - mean) @ basis @ basis.T)
        x_T = diffusion.noise_like(torch.empty(len(d.z_i), 3, d.size, d.size), d.generator)

    s = d.setting
    return torch.stack([d.artist.decode_latent(
        d.z_i, x_T, text=text, eta=s.eta, guidance=s.guidance, steps=STEPS,
        rerank=s.rerank if s.eta else 1, upsampler_steps=(), generator=d.generator)
        for _ in range(s.n)], 1)


def draw_path(d):
    """From every second scene to the next one, in n images."""
    s, ends = d.setting, list(zip(d.captions[::2], d.captions[1::2]))
    d.scenes, images = list(zip(d.scenes[::2], d.scenes[1::2])), []
    for a, b, words in zip(d.true[::2], d.true[1::2], ends):
        images.append(d.artist.interpolate(
            a, b, s.n, *(words if s.told else ()), noise=s.noise, eta=s.eta, rerank=s.rerank,
            steps=STEPS, upsampler_steps=(), generator=d.generator))
    d.captions = [" to ".join(words) for words in ends]
    return torch.stack(images)                                             # (B / 2, n, 3, h, h)


def draw_hole(d):
    """Inpainting: the part of the image with the second object is drawn anew, with another one."""
    images, pixel = [], (torch.arange(256) + 0.5) / 256
    for scene, target in zip(d.scenes, d.targets):
        (a, b), axis = scene.objects, int(scene.relation == "above")       # 0: x, 1: y
        end = (a.x, a.y)[axis] + train_toy.reach(a.shape, a.r, a.tilt)[axis][1]
        begin = (b.x, b.y)[axis] - train_toy.reach(b.shape, b.r, b.tilt)[axis][0]
        hole = (pixel > (end + begin) / 2).float().expand(256, 256)
        images.append(d.artist.inpaint(
            train_toy.render(scene, 256), hole.T if axis else hole, caption(target), 1,
            upsampler_steps=(), generator=d.generator))
    return torch.stack(images)


@torch.enable_grad()
def draw_ascent(d):
    """As it was done before unCLIP: gradient ascent of the pixels on CLIP's similarity."""
    z_t, size = clip.unit(d.model.encode_text(d.captions).z_t), d.model.config.clip.image_size
    x = 0.1 * torch.randn(len(z_t), 3, size, size, generator=d.generator) + 0.8
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60):
        z_i = clip.unit(d.model.part("clip").encode_image(x.clamp(-1, 1)))
        x.grad, = torch.autograd.grad(-(z_i * z_t).sum(), x)
        optimizer.step()
    return x.detach().clamp(-1, 1)[:, None]


def draw_nearest(d):
    """In place of each drawn image the training image that CLIP finds nearest to it."""
    z_i = clip.unit(d.model.encode_image(draw_captions(d).flatten(0, 1)))
    scenes, z = training_set(d.model, GROUPS * len(d.scenes))
    return render_many([scenes[i] for i in (z_i @ z.T).argmax(1)], d.size)[:, None]


DRAW = {"image": draw_image, "inpainting": draw_hole, "interpolation": draw_path,
        "gradient ascent on CLIP": draw_ascent, "nearest training image": draw_nearest,
        "true image": lambda d: render_many(d.scenes, d.size)[:, None]}

# ---------------------------------------------------------------- scenes and words


def some_scenes(seed, n, keep=lambda scene: True, **options):
    """n scenes, of the test part with sizes stated unless options (random_scene's) differ."""
    rng, options = random.Random(1000 + seed), {"split_of": "test", "unstated": 0.0} | options
    scenes = (train_toy.random_scene(rng, **options) for _ in itertools.count())
    return list(itertools.islice(filter(keep, scenes), n))


def alike(scene):
    """Two objects that differ in colour alone."""
    a, b = scene.objects
    return a.shape == b.shape and a.size == b.size and a.colour != b.colour


def edited(scene, kind, rng):
    """A scene, its last object of another colour, shape or size; no held-out pair, if possible."""
    *others, last = scene.objects
    values = {"colour": train_toy.COLOURS, "shape": train_toy.SHAPES, "size": train_toy.SIZES}[kind]
    choices = [Scene((*others, replace(last, **{kind: value})), scene.relation)
               for value in values if value != getattr(last, kind)]
    return stated(rng.choice([s for s in choices if train_toy.split(s) != "held-out"] or choices))


def reworded(words):
    """words(the first object) -> (scenes, i) -> caption, target."""
    return lambda scenes, i: (words(scenes[i].objects[0]), stated(scenes[i]))


def three(scenes, i):
    objects = [scenes[j % len(scenes)].objects[0] for j in (i, i + 1, i + 2)]
    return " above ".join(caption(Scene((o,))) for o in objects), Scene(tuple(objects))


NEW = dict(zip(train_toy.COLOURS, "scarlet amber golden emerald turquoise navy violet jet".split()))
WORDINGS = {                                      # (scenes, i) -> caption, the scene it states
    "as trained": lambda scenes, i: (caption(scenes[i]), stated(scenes[i])),
    "rephrased": reworded(lambda o: f"a {o.shape} that is {o.colour} and {o.size}"),
    "partial": lambda scenes, i: (f"something {scenes[i].objects[0].colour}",
                                  Scene((Object("", scenes[i].objects[0].colour),))),
    "a new adjective": reworded(lambda o: f"a shiny {o.size} {o.colour} {o.shape}"),
    "a new word for the colour": reworded(lambda o: f"a {o.size} {NEW[o.colour]} {o.shape}"),
    "three objects": three}


@functools.lru_cache(maxsize=1)
def training_set(model, groups):
    """Scenes of the training set (of seed 0) and CLIP's embeddings of them, (N, D)."""
    scenes = train_toy.World(groups).scenes
    z = [model.encode_image(render_many(scenes[i:i + 500], 64)) for i in range(0, len(scenes), 500)]
    return scenes, clip.unit(torch.cat(z))


@functools.lru_cache(maxsize=1)
def components(model, n):
    """Mean and principal components of the embeddings of n images."""
    images = render_many(some_scenes(9, n, split_of=None), 64)
    return prior.principal_components(model.encode_image(images), keep=1.0)


# ---------------------------------------------------------------- what is measured


def mean(values):
    """0 of nothing: weights that have learnt nothing get low numbers, not a traceback."""
    return float(np.mean(values)) if len(values) else 0.0


def fits(target, seen):
    """Is all that a caption states right? "" is left open; without a relation in any order."""
    if target.relation:
        return train_toy.agrees(target, seen)
    return len(target.objects) == len(seen.objects) and any(
        all(getattr(a, name) in ("", getattr(b, name)) for a, b in zip(target.objects, order)
            for name in KINDS)
        for order in itertools.permutations(seen.objects))


def attribute(scene, name):
    scene = scene.canonical()
    more = {"number": len(scene.objects), "relation": scene.relation}
    return more[name] if name in more else tuple(getattr(o, name) for o in scene.objects)


def right(d, *names):
    """In how many images these attributes are right."""
    return mean([all(attribute(a, name) == attribute(b, name) for name in names)
                 for a, b in d.pairs])


def differ(a, b):
    """Do two parsed scenes differ in place (1/64 of the side), size (5 %) or shade (a tenth)?"""
    return len(a.objects) != len(b.objects) or any(
        max(abs(s.x - t.x), abs(s.y - t.y)) > 1 / 64 or abs(s.r / t.r - 1) > 0.05
        or abs(s.shade - t.shade) > 0.2
        for s, t in zip(a.canonical().objects, b.canonical().objects))


def switches_once(d, name):
    """Where the ends differ in an attribute, how often it changes exactly once on the way."""
    once = []
    for (a, b), row in zip(d.scenes, d.seen):
        first, last, n = attribute(a, name), attribute(b, name), len(row)
        if first != last:
            way = [attribute(scene, name) for scene in row]
            once.append(any(way == [first] * i + [last] * (n - i) for i in range(1, n)))
    return mean(once)


def diversity(d):
    """How far apart two images of a caption are, over that of two true images of it."""
    rng = random.Random(0)
    a, b = (render_many([train_toy.place(stated(s), rng) for s in d.scenes], d.size)
            for _ in range(2))
    return (d.images[:, 0] - d.images[:, 1]).square().mean() / (a - b).square().mean()


def to_true_images(d, z):
    """The Frechet distance of z to ten times as many true images of other scenes."""
    true = render_many(some_scenes(50 + d.seed, 10 * len(d.scenes)), 64)
    return frechet(z, clip.unit(d.model.encode_image(true)))


def frechet(a, b):
    """Frechet distance of embeddings (N, D), (M, D) taken as Gaussians, the F of FID:
    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))"""
    a, b = a.cpu().double(), b.cpu().double()
    power, basis = torch.linalg.eigh(a.T.cov())
    root = basis * power.clamp(min=0).sqrt() @ basis.T                    # cov_a^(1/2)
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    spread_out = a.T.cov().trace() + b.T.cov().trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + spread_out - 2 * cross)


def cosine(a, b):
    return (clip.unit(a) * clip.unit(b)).sum(1).mean()


def psnr(d):
    true = render_many(d.scenes, d.images.shape[-1])
    return mean([train_toy.psnr(x, y) for row, y in zip(d.images, true) for x in row])


def mflop(d):
    """Floating-point operations of one embedding, in millions."""
    with FlopCounterMode(display=False) as counter:
        draw_captions(d)
    return counter.get_total_flops() / 1e6 / len(d.captions)


COUNTED = {                                       # fractions, printed in %
    "accuracy": lambda d: mean([fits(a, b) for a, b in d.pairs]),
    "differ": lambda d: mean([differ(*row) for row in d.seen]),
    "swapped": lambda d: mean([train_toy.agrees(train_toy.swaps(a)[1], b) for a, b in d.pairs]),
    "reached": lambda d: right(d, d.setting.edit),
    "rest kept": lambda d: right(d, *({*KINDS} - {d.setting.edit})),
    "ends": lambda d: mean([fits(stated(end), x) for ends, row in zip(d.scenes, d.seen)
                            for end, x in zip(ends, (row[0], row[-1]))]),
    **{f"{name} switches once": functools.partial(switches_once, name=name) for name in KINDS},
    **{name: functools.partial(lambda name, d: right(d, name), name)
       for name in ("number", "relation", *KINDS)}}
MEASURES = COUNTED | {
    "diversity": diversity, "PSNR": psnr, "MFLOP": mflop,
    "Frechet distance": lambda d: to_true_images(d, d.z),
    "Frechet distance of z_i": lambda d: to_true_images(d, d.z_i),
    "IoU": lambda d: mean([iou for row, seen in zip(d.images, d.seen) for x, s in zip(row, seen)
                           for iou, _ in train_toy.outline(x, s)]),
    "cos(image, z_t)": lambda d: cosine(d.z, d.model.encode_text(d.captions).z_t),
    "cos(z_i, true z_i)": lambda d: cosine(d.z_i, d.model.encode_image(d.true)),
    "cos(z_i, z_t)": lambda d: cosine(d.z_i, d.model.encode_text(d.captions).z_t),
    "cos(nearest training image)": lambda d: (
        d.z @ training_set(d.model, GROUPS * len(d.scenes))[1].T).amax(1).mean()}

# ---------------------------------------------------------------- findings: what is varied


@dataclass
class Finding:
    """A row of the table; its figure shows images, a row for each setting, or else curves."""
    paper: str                                    # the figure or table it answers
    title: str
    settings: dict                                # {series: {x: Setting}}
    said: tuple = ()                              # the settings in the answer; (): all
    scenes: dict = field(default_factory=dict)    # options of some_scenes
    n: int = 20
    curves: bool = False

    def rows(self):
        return {f"{series} {x}".strip(): setting for series, settings in self.settings.items()
                for x, setting in settings.items()}

    def answer(self, numbers):
        return "; ".join(
            f"{label}: " + ", ".join(f"{name} {in_words(numbers, label, name)}"
                                     for name in setting.measures)
            for label, setting in self.rows().items() if label in (self.said or [label]))


def vary(name, values, **others):
    """-> {value: Setting}"""
    return {value: Setting(**others, **{name: value}) for value in values}


def sampled(name, values, **others):
    """-> {value: Setting with this option of unclip.Sampling}"""
    return {value: Setting(sampling={name: value}, **others) for value in values}


ONE, PRIORS = {"two": False, "split_of": "train"}, ("diffusion prior", "AR prior")
BOTH = {"n": 2, "measures": ("accuracy", "diversity")}
SHARP = {"condition": "true image embedding", "measures": ("accuracy", "Frechet distance")}
SAMPLERS = {"learned": {}, "fixed small": {"variance": "small"},
            "fixed large": {"variance": "large"}, "DDIM": {"variance": "small", "eta": 0.0}}
FINDINGS = {
    "variations": Finding(
        "Fig. 3", "Variations: z_i stays, DDIM with eta forgets x_T",
        {"eta": vary("eta", (0.0, 0.2, 0.5, 1.0), condition="image", n=2, rerank=4,
                     measures=("accuracy", "differ", "diversity", "PSNR"))}, n=67),
    "interpolations": Finding(
        "Fig. 4", "Interpolations: z_i is turned, and x_T with it or not",
        {"": {name: Setting("interpolation", 7, (
            "ends", *(f"{kind} switches once" for kind in KINDS)), **how) for name, how in {
                "as they are": {}, "with captions": {"told": True},
                "with captions, fixed noise, best of 4": {
                    "told": True, "noise": "fixed", "eta": 1.0, "rerank": 4}}.items()}},
        scenes=ONE, n=100),
    "text_diffs": Finding(
        "Fig. 5", "Text diffs: z_i is turned towards the difference of two captions",
        {kind: vary("strength", (0.3, 0.4, 0.5, 0.6), condition="image", edit=kind, guidance=2.0,
                    measures=("reached", "rest kept")) for kind in KINDS},
        tuple(f"{kind} 0.5" for kind in KINDS), scenes=ONE, n=67),
    "inpainting": Finding(
        "RePaint", "The part with the second object is drawn anew, with another colour or shape",
        {"": {kind: Setting("inpainting", edit=kind) for kind in ("colour", "shape")}},
        scenes={"two": True, "keep": lambda scene: scene.relation in ("left of", "above")}),
    "pca": Finding(
        "Fig. 7", "Decoded from the first k principal components of z_i",
        {"k =": vary("components", (0, 1, 2, 4, 6, 9, 14, 64), condition="image", guidance=2.0,
                     measures=("number", "colour", "relation", "size", "shape"))},
        ("k = 0", "k = 6", "k = 14", "k = 64")),
    "prior": Finding(
        "Fig. 8, table 2", "What the decoder receives as image embedding",
        {"": vary("condition", train_toy.CONDITIONS[1:], n=2, measures=(
            "accuracy", "diversity", "Frechet distance", "cos(z_i, true z_i)", "cos(z_i, z_t)"))},
        curves=True),
    "guidance": Finding(
        "Fig. 9-11", "Guidance, with a prior and with the caption alone",
        {way: sampled("guidance", (1.0, 2.0, 3.0, 5.0), condition=way, **BOTH)
         for way in ("diffusion prior", "caption alone")}, curves=True),
    "priors_cost": Finding(
        "Table 1", "What one embedding costs",
        {"": vary("condition", PRIORS, n=0, measures=("MFLOP",))}, curves=True),
    "binding": Finding(
        "Fig. 14, 15", "Which of the two is red?",
        {"": vary("condition", ("true image embedding", "diffusion prior", "caption alone"),
                  measures=("accuracy", "swapped"))},
        scenes={"two": True, "keep": alike}),
    "samplers": Finding(
        "Sec. 2.2, app. C", "Samplers and their steps: of the decoder, and of the prior (z_i)",
        {**{name: {k: Setting(sampling={"decoder_steps": k, "refine": 0}, sampler=how, **SHARP)
                   for k in (5, 10, 25, 50)} for name, how in SAMPLERS.items()},
         **{name: sampled("prior_steps", (5, 10, 25, 50), sampler=how, n=0,
                          measures=("Frechet distance of z_i",)) for name, how in {
             "prior, analytic": {}, "prior, fixed small": {"variance": "small"}}.items()}},
        tuple(f"{name} {k}" for name in SAMPLERS for k in (10, 50)), curves=True),
    "refinement": Finding(
        "(ours)", "Predictions of x0 averaged after sampling, see Decoder.refine",
        {"averaged": sampled("refine", (0, 1, 2, 4, 8), condition="diffusion prior",
                             upsample="network", measures=("accuracy", "IoU"))}),
    "clip_guided": Finding(
        "Sec. 6", "Gradient ascent on CLIP's similarity, and unCLIP",
        {"": vary("condition", ("gradient ascent on CLIP", "diffusion prior"),
                  measures=("accuracy", "cos(image, z_t)"))}, scenes={"two": False}),
    "generalisation": Finding(
        "(ours)", "Training captions, worded as in training and otherwise",
        {"": vary("wording", WORDINGS)}, scenes=ONE),
    "memorisation": Finding(
        "(ours)", "Are training images drawn again?",
        {"": vary("condition", ("true image", "diffusion prior", "nearest training image"),
                  measures=("cos(nearest training image)",))})}


def experiment(settings, of=""):
    return Finding("", "", {of: settings}, n=32)


EXPERIMENTS = {
    "guidance": experiment(sampled("guidance", (0.0, 1.0, 2.0, 5.0), **BOTH), "scale"),
    "decoder_steps": experiment(sampled("decoder_steps", (2, 5, 12, 50)), "steps"),
    "prior_steps": experiment(sampled("prior_steps", (1, 4, 16, 64)), "steps"),
    "other_prior": experiment(vary("condition", PRIORS, **BOTH)),
    "candidates": experiment(sampled("candidates", (1, 2, 8)), "candidates"),
    "rerank": experiment(vary("rerank", (1, 2, 4)), "best of"),
    "prior_guidance": experiment(sampled("prior_guidance", (1.0, 2.0, 4.0)), "scale"),
    "no_prior": experiment(vary("condition", ("diffusion prior", "text embedding in its place",
                                              "caption alone"))),
    "enlarging": experiment(
        {"bicubic": Setting("true image", upsample="bicubic", measures=("PSNR",)),
         **sampled("upsampler_steps", ((1, 1), (2, 2), (10, 4)), condition="true image",
                   upsample="network", measures=("PSNR",))}),
    "a_planted_bug": experiment({"ours": Setting(**BOTH), "with the bug": Setting(
        bug="variance_times_noise", **BOTH)})}
GALLERY = ("a small red circle above a large blue square", "a large orange square",
           "a large cyan circle left of a small purple cross",
           "a small yellow circle below a large black cross",
           "a large green square right of a small orange triangle", "a small blue triangle")

# ---------------------------------------------------------------- numbers, figures and tables


@torch.no_grad()
def measure(model, finding, seeds, n=None, baseline=None):
    """Every setting of a finding, on each seed.

    -> {"setting: measure": (mean, standard deviation or, of one seed, None)}
    """
    numbers = {}
    for label, setting in finding.rows().items():
        runs = [draw(model, some_scenes(seed, n or finding.n, **finding.scenes), setting, seed,
                     baseline) for seed in range(seeds)]
        for name in setting.measures:
            values = [float(MEASURES[name](run)) for run in runs]
            deviation = float(np.std(values, ddof=1)) if seeds > 1 else None
            numbers[f"{label}: {name}"] = float(np.mean(values)), deviation
    return numbers


def in_words(numbers, label, name):
    value, spread = numbers[f"{label}: {name}"]
    if name in COUNTED:
        return f"{100 * value:.0f}{'' if spread is None else f' ± {100 * spread:.0f}'} %"
    return f"{value:.3g}" + ("" if spread is None else f" ± {spread:.2g}")


def draw_curves(path, finding, numbers):
    """A chart for each measure: a curve for each series, or points if the settings have names."""
    measures = dict.fromkeys(name for s in finding.rows().values() for name in s.measures)
    figure, axes = plt.subplots(1, len(measures), figsize=(3.2 * len(measures), 3.4), squeeze=False)
    for axis, name in zip(axes[0], measures):
        for series, settings in finding.settings.items():
            points = {str(x): numbers[f"{series} {x}".strip() + f": {name}"]
                      for x, setting in settings.items() if name in setting.measures}
            if points:
                middle, spread = np.array(list(points.values()), float).T
                axis.errorbar(list(points), middle, np.nan_to_num(spread), marker="o", markersize=3,
                              capsize=2, linestyle="-" if series else "", label=series)
        axis.set(title=name, ylim=(0, 1.05 * axis.get_ylim()[1]))
        if series:
            axis.legend(fontsize=7)
        else:
            axis.set_xticks(range(len(points)), [textwrap.fill(x, 12) for x in points], fontsize=5)
    figure.suptitle(finding.title)
    train_toy.save_figure(figure, path)


def draw_grid(path, rows, columns, title, inches=0.9):
    """{name of the row: images (B, 3, h, h)}, B names of columns -> a figure."""
    size = inches * len(columns) + 1.3, inches * len(rows) + 1.1
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        line[0].set_ylabel(textwrap.fill(name, 18), fontsize=7, rotation=0, ha="right", va="center")
        for axis, image in zip(line, images):
            axis.imshow(unclip.to_pil(image), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], columns):
        axis.set_title(textwrap.fill(name, int(18 * inches)), fontsize=6 + inches)
    figure.suptitle(title, fontsize=9)
    train_toy.save_figure(figure, path)


def finding_grid(path, model, finding, baseline=None):
    """A row for each setting and each of its images, a column for each of six scenes; of
    interpolations a row for each path."""
    scenes, rows = some_scenes(1, 6, **finding.scenes), {}
    for label, setting in finding.rows().items():
        d = draw(model, scenes, setting, 0, baseline)
        if setting.condition == "interpolation":
            rows |= {f"{words}, {label}": path for words, path in zip(d.captions, d.images)}
            continue
        if setting.condition == "image":
            rows["the image"] = render_many(scenes, d.size)
        rows |= {label + " again" * i: d.images[:, i] for i in range(setting.n)}
    columns = d.captions if d.setting.wording != "three objects" else [caption(s) for s in scenes]
    if setting.condition == "interpolation":
        columns = [f"{i / (setting.n - 1):.2f}" for i in range(setting.n)]
    draw_grid(path, rows, columns, finding.title)


def measure_table(args):
    """Measure the rows of a table, into OUT: a JSON file, and a figure of each row with a title."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = unclip.writable(args.out / args.file)
    found = read_found(file) if file.exists() else {}
    model = unclip.load(args.weights)
    baseline = unclip.load(args.baseline) if args.baseline else None
    if baseline is None:
        print('Without a --baseline "caption alone" is the same decoder with z_i = 0.')

    for name in args.only:
        start, finding, picture = time.process_time(), args.table[name], args.out / f"{name}.png"
        numbers = measure(model, finding, args.seeds, args.scenes, baseline)
        if finding.curves:
            draw_curves(picture, finding, numbers)
        elif finding.title:
            finding_grid(picture, model, finding, baseline)
        found[name] = {"paper": finding.paper, "sentence": finding.answer(numbers),
                       "numbers": numbers, **benchmark.about("cpu"),
                       "seconds of one core": round(time.process_time() - start)}
        print(f"{name}: {found[name]['sentence']}", flush=True)
        unclip.write_json(file, found)
    print(benchmark.markdown([{"": name.replace("_", " "), "paper": row["paper"],
                               "here": row["sentence"]} for name, row in found.items()]))


def read_found(file):
    """What was measured before: rows of a table, each with its source and its answer."""
    with clip.reading(file, "findings, {name: {paper, sentence, ...}}"):
        found = json.loads(file.read_bytes())
        for name, row in found.items():
            if not isinstance(row, dict) or not isinstance(row["paper"] + row["sentence"], str):
                raise ValueError(f"{name} is no such entry")
        return found


def gallery(args):
    """Draw six captions, the first images of the README: OUT/gallery.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = unclip.image_name(args.out / "gallery.png")
    model = unclip.load(args.weights, unclip.pick_device(args.device))
    images = model.sample(GALLERY, generator=torch.Generator().manual_seed(args.seed))
    draw_grid(path, {"": images}, GALLERY, "", inches=2.0)
    print("the parser reads: " + "; ".join(caption(train_toy.read(x)) for x in images))


# ---------------------------------------------------------------- bounds of the losses (Bayes)


def best_errors(alphabar, worlds, t):
    """Between which numbers the lowest possible E|x0 - x0_hat|^2 / D at timestep t lies.

    worlds (C, K, D): for each of C conditions K examples. If only these existed, the posterior mean
    would be best; fewer possibilities are easier, so its error is a lower bound. The posterior mean
    over one half, or the best linear map, tried on the other half: an upper bound.
    """
    ab, (known, new) = alphabar[t].float(), worlds.chunk(2, dim=1)         # (C, K / 2, D) each

    def noised(x):
        return ab.sqrt() * x + (1 - ab).sqrt() * torch.randn_like(x)

    def error(true, among):
        far = torch.cdist(noised(true), ab.sqrt() * among).square()        # (C, ., .)
        return ((-far / (2 * (1 - ab))).softmax(2) @ among - true).square().mean()

    # the best linear map (Wiener's filter)
    centre = known.mean(1, keepdim=True)
    off, true = (known - centre).flatten(0, 1), new - centre
    power, basis = torch.linalg.eigh(off.T @ off / (len(off) - len(worlds)))
    gain = ab.sqrt() * power.clamp(min=0) / (ab * power.clamp(min=0) + 1 - ab)           # (D,)
    linear = ((noised(true) @ basis * gain) @ basis.T - true).square().mean()
    return error(worlds, worlds), torch.minimum(error(new, known), linear)


@torch.no_grad()
def bounds(args):
    """Print between which numbers the lowest possible losses of the toy's diffusion parts lie."""
    model, rng, n = unclip.load(args.weights), random.Random(0), min(32, args.scenes or 32)
    torch.manual_seed(0)
    scenes = [train_toy.place(stated(scene), rng)
              for scene in some_scenes(0, n, split_of="train") for _ in range(32)]
    x = render_many(scenes, model.config.decoder.unet.size).flatten(1)
    z = model.part("diffusion_prior").scale(model.encode_image(render_many(scenes, 64))).cpu()

    neither = 0.1 * model.config.decoder.drop_text
    for name, data, dropped in (("diffusion_prior", z, 0.1), ("decoder", x, neither)):
        part = model.parts[name]
        times = torch.linspace(1, part.config.T, 16).long()
        if train_toy.TOY[name].logit_normal:
            times = train_toy.logit_normal(part.config.T, 16)

        # a fraction `dropped` of the rows has no condition: for them anything is possible
        told, ab = data.unflatten(0, (-1, 32)), part.alphabar              # (n, 32, D)
        untold = data[::max(1, data.numel() // 2 ** 19)]
        untold = untold[torch.randperm(len(untold))][None]                 # (1, N, D)
        with_it, without = (torch.tensor([best_errors(ab, w, int(t)) for t in times])
                            for w in (told, untold))                       # (16, 2)
        from_x0 = {"x0": torch.ones_like(ab), "v": 1 / (1 - ab), "eps": ab / (1 - ab)}
        weight = from_x0[part.config.predicts][times, None]
        low, high = (weight * ((1 - dropped) * with_it + dropped * without)).mean(0)
        print(f"{name}: between {low:.3f} and {high:.3f}")
    print("The decoder's are without the variational bound, for a z_i that holds what captions do.")


# ---------------------------------------------------------------- ablation: what each trick buys


@dataclass
class Trick:
    """A training trick left out. `parts` are trained anew, the others are those with all tricks."""
    parts: tuple = ()
    recipe: dict = field(default_factory=dict)    # changes of these parts' recipes
    predicts: str = ""                            # what these parts predict
    changes: dict = field(default_factory=dict)   # {"module.function": another one}
    code: str = ""                                # its functions
    condition: str = "diffusion prior"


ALL, NETS = ("clip", "diffusion_prior", "decoder"), ("decoder", "upsampler1", "upsampler2")
LOSS = decoder.Decoder.loss
TRICKS = {
    "muon": Trick((*ALL, "upsampler1", "upsampler2"), {"muon": 0.0}, code="Muon orthogonal"),
    "uniformity": Trick(ALL, {"uniformity": 0.0}, code="uniformity_loss"),
    "sinusoidal_start": Trick(ALL, {"sinusoidal": False}, code="sinusoidal_start"),
    "curriculum": Trick(ALL, code="World.curriculum", changes={
        "train_toy.World.curriculum": lambda self, progress: 1.0,
        "train_toy.World.two_relations": 0.0}),
    "hard_negatives": Trick(ALL, code="hard_negatives edit", changes={
        "train_toy.hard_negatives": lambda rng, two: [
            train_toy.random_scene(rng, two=two, split_of="train") for _ in range(4)]}),
    "whitened_start": Trick(("decoder",), {"whitened": False}, code="whitened_start"),
    "v_prediction": Trick(("decoder",), predicts="eps"),
    "logit_normal": Trick(("decoder",), {"logit_normal": False}, code="logit_normal"),
    # no trick: a decoder trained on captions alone, whose checkpoint can be the --baseline
    "z_i": Trick(("decoder",), condition="caption alone", changes={
        "decoder.Decoder.loss": lambda self, x0, z_i, text, t=None: LOSS(
            self, x0, torch.zeros_like(z_i), text, t)})}
ABLATION = {                                      # measure, captions, upsample, options of them
    "accuracy, two objects": ("accuracy", 600, "", {"two": True}),
    "accuracy, held-out pairs": ("accuracy", 600, "", {"split_of": "held-out"}),
    "IoU, two objects": ("IoU", 100, "network", {"two": True})}


def train_without(name, seed, args):
    """One run, which goes on where it stopped -> UnCLIP. "nothing": with all tricks."""
    trick, out = TRICKS.get(name, Trick()), args.out / f"{name}-{seed}"
    recipes, config = dict(train_toy.TOY), copy.deepcopy(unclip.PRESETS["toy"])
    for part in trick.parts:
        recipes[part] = replace(recipes[part], **trick.recipe)
        if trick.predicts:
            getattr(config, part).predicts = trick.predicts

    presets = {"train_toy.RECIPES": {"toy": recipes}, "unclip.PRESETS": {"toy": config}}
    with patched(trick.changes | presets):
        source, file = train_toy.World(args.groups, seed), out / "state.pt"
        settings = train_toy.Settings(str(out), steps_scale=args.steps_scale, seed=seed)
        if trick.parts and not file.exists():
            # the other parts are those of the run with all tricks; the AR prior is not needed
            base = torch.load(args.out / f"nothing-{seed}/state.pt", weights_only=True)
            state = train_toy.open_run(source, settings, file, rank=0)
            state["done"] = {part: weights for part, weights in base["done"].items()
                             if part not in (*trick.parts, "ar_prior")}
            out.mkdir(parents=True, exist_ok=True)
            unclip.write_atomically(file, lambda f: torch.save(state, f))
        only = list(trick.parts) or ["clip", "diffusion_prior", *NETS]
        return train_toy.run(source, replace(settings, resume=file.exists(), only=only))


def lines_of(code):
    """How many lines a trick's functions have in train_toy.py."""
    functions = [functools.reduce(getattr, name.split("."), train_toy) for name in code.split()]
    return sum(len(inspect.getsource(function).splitlines()) for function in functions)


def ablate(args):
    """Train without each trick, over some seeds: a table, OUT/ablation.json and checkpoints.

    All draw the same captions, once. Accuracy is counted on many small images, IoU on few large.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    file, found = unclip.writable(args.out / "ablation.json"), {}
    for name in ["nothing", *args.only]:
        models = [train_without(name, seed, args) for seed in range(args.seeds)]
        trick = TRICKS.get(name, Trick())
        found[name] = {"lines of code": lines_of(trick.code)}
        for column, (number, n, upsample, options) in ABLATION.items():
            scenes = some_scenes(0, args.scenes or n, **options)
            drawn = (draw(model, scenes, Setting(trick.condition, upsample=upsample))
                     for model in models)
            found[name][column] = ", ".join(f"{MEASURES[number](d):.3f}" for d in drawn)
        found[name]["trained anew"] = ", ".join(trick.parts)
        unclip.write_json(file, found)
    print(benchmark.markdown([{"without": name.replace("_", " ")} | found[name] for name in found]))


# ---------------------------------------------------------------- command line


def path(name):
    return Path(unclip.named(name))


OPTIONS = {
    "--scenes": {"type": unclip.number(2, 10 ** 6), "help": "of each seed; few make it quick"},
    "--out": {"type": path, "default": unclip.HERE / "pictures", "help": "where to write"},
    "--seeds": {"type": unclip.positive, "default": 1, "help": "runs of each setting"},
    "--weights": {"type": path, "default": unclip.HERE / "weights/toy.pt", "help": "a checkpoint"},
    "--baseline": {"type": path, "help": "a checkpoint trained on captions alone"},
    "--device": {"default": "cpu", "help": "cpu, cuda, mps"},
    "--seed": {"type": unclip.seed, "default": 0, "help": "of all randomness"},
    "--groups": {"type": unclip.positive, "default": 6000, "help": "groups of scenes to train on"},
    "--steps-scale": {"type": unclip.number(1e-12, 1e6), "default": 1.0,
                      "help": "all training steps times this"}}
COMMANDS = {                                      # function, choices of --only, options, defaults
    "figures": (measure_table, FINDINGS, "--scenes --seeds --out --weights --baseline",
                {"seeds": 3, "table": FINDINGS, "file": "findings.json"}),
    "experiments": (measure_table, EXPERIMENTS, "--scenes --out --weights --baseline",
                    {"seeds": 1, "table": EXPERIMENTS, "file": "experiments.json"}),
    "gallery": (gallery, (), "--seed --out --weights --device", {}),
    "bounds": (bounds, (), "--scenes --weights", {}),
    "ablate": (ablate, TRICKS, "--scenes --seeds --out --groups --steps-scale",
               {"seeds": 2, "out": Path("runs/ablation")})}


def main(argv=None):
    return benchmark.command_line(__doc__, OPTIONS, COMMANDS, argv)


if __name__ == "__main__":
    main()
