"""unCLIP, the whole stack: caption -> image embedding -> small image -> larger -> large.

    python unclip.py sample "a small red circle above a large blue square"

The way of one caption through the chapters (Ramesh et al. 2022, fig. 2; "sec." is this paper's):

    caption --tokenizer--> tokens --CLIP text encoder--> z_t                            clip.py
            --prior--> z_i, the embedding of an image nobody has seen                   prior.py
            --decoder--> 64 px (toy: 16)                                                decoder.py
            --upsampler1--> 256 px (toy: 64) --upsampler2--> 1024 px (toy: 256)         decoder.py
"""
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep, so that
os.environ.setdefault("GOMP_SPINCOUNT", "10000")        # two processes do not slow each other down
if os.path.realpath(sys.argv[0]).startswith(os.path.dirname(os.path.realpath(__file__)) + os.sep):
    usual = sys.excepthook               # a command of ours: Ctrl-C while torch loads is one line
    sys.excepthook = lambda kind, *more: (
        print("stopped", file=sys.stderr) if kind is KeyboardInterrupt else usual(kind, *more))

import argparse
import contextlib
import copy
import io
import json
import math
import shutil
import time
import types
import typing
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import clip
import decoder
import diffusion
import prior
from clip import open_image, reading

# ---------------------------------------------------------------- caption -> image
class UnCLIP:
    """The parts of a stack, and what they do together.

    parts      name (see PARTS) -> module, or None where the stack has no such part
    tokenizer  a clip.Tokenizer, or None as long as nothing was trained
    words      the words of the training captions, or () if unknown (public weights)
    """

    def __init__(self, config, parts, tokenizer=None, words=()):
        limits = {c.context for c in (config.diffusion_prior, config.ar_prior, config.decoder) if c}
        if len(limits) > 1 or config.decoder.context < config.clip.context:
            raise ValueError(f"expected one context for priors and decoder, at least CLIP's "
                             f"{config.clip.context} tokens, got {sorted(limits)}")
        self.config, self.parts, self.tokenizer, self.words = config, parts, tokenizer, tuple(words)
        weights = (w for part in parts.values() if part is not None for w in part.parameters())
        self.device, self.low_memory = next(weights).device, False               # see `part`

    @torch.no_grad()
    def sample(self, captions, *, prior="diffusion", guidance=None, prior_guidance=None,
               prior_steps=None, decoder_steps=None, upsampler_steps=None, candidates=None,
               rerank=None, generator=None, progress=True):
        """B captions, or one string -> images (B, 3, H, W) in [-1, 1].

        generator: the source of all randomness; equal seeds, equal noise, on any device. A list
        has one for each image, which then does not depend on the others.
        The other options are explained at `Sampling`; None: as `config.sampling` has it.
        """
        captions = [captions] if isinstance(captions, str) else captions
        n = self.setting("rerank", rerank)
        self.check(len(captions), prior, generator, upsampler_steps, rerank=n, guidance=guidance,
                   prior_guidance=prior_guidance, prior_steps=prior_steps, candidates=candidates,
                   decoder_steps=decoder_steps)

        text = self.encode_text([caption for caption in captions for _ in range(n)])
        z_i = self.sample_prior(text, prior, prior_guidance, prior_steps, candidates, generator,
                                progress)
        small = self.sample_decoder(z_i, text, guidance, decoder_steps, generator, progress)
        small = self.rerank(small, text.z_t[::n]) if n > 1 else small
        return self.upsample(small, upsampler_steps, generator, progress)

    @torch.no_grad()
    def encode_text(self, captions):
        """B captions, or one string -> clip.Text.   ValueError if one is empty or too long."""
        captions = [captions] if isinstance(captions, str) else captions
        if not captions or not all(map(clip.has_text, captions)):
            raise ValueError(f"expected captions with some text, got {captions}")
        if self.tokenizer is None:
            raise ValueError("this stack has fresh weights and no tokenizer; load trained weights")

        # priors and decoder have room for L tokens: the rest is padding
        tokens = self.tokenizer(captions, self.config.clip.context)              # (B, CLIP's L)
        mask = clip.token_mask(tokens, self.tokenizer.end)                       # (B, CLIP's L)
        z_t, states = self.part("clip").encode_text(tokens.to(self.device))      # (B, D), (B, ., W)
        longer = self.config.decoder.context - tokens.shape[1]
        tokens, mask = (F.pad(x, (0, longer)).to(self.device) for x in (tokens, mask))   # (B, L)
        return clip.Text(tokens, mask, z_t, states)

    def sample_prior(self, text, which="diffusion", guidance=None, steps=None, candidates=None,
                     generator=None, progress=False):
        """Text -> z_i (B, D), by the "diffusion" or the "ar" prior.   Sec. 2.2"""
        self.check(1, which, upsampler_steps=(), prior_guidance=guidance, prior_steps=steps,
                   candidates=candidates)
        more = {"steps": self.setting("prior_steps", steps),
                "candidates": self.setting("candidates", candidates)}
        if which == "ar":
            more = {"temperature": self.config.sampling.temperature}
        z_i = self.part(f"{which}_prior").sample(
            text, guidance=self.setting("prior_guidance", guidance), generator=generator,
            progress="prior" if progress else None, **more)
        return expect_finite(z_i, f"the {which} prior")

    def sample_decoder(self, z_i, text, guidance=None, steps=None, generator=None, progress=False,
                       **known):
        """z_i (B, D), text -> small images (B, 3, h, h) in [-1, 1].   Sec. 2.1"""
        part, s = self.part("decoder"), self.config.sampling
        x = part.sample(z_i, text, self.setting("decoder_steps", steps),
                        self.setting("guidance", guidance), generator,
                        "images" if progress else None, s.guidance_above, **known)
        return expect_finite(part.refine(x, z_i, text, s.refine, generator), "the decoder")

    def upsample(self, x, steps=None, generator=None, progress=False):
        """The decoder's (B, 3, h, h) -> (B, 3, H, H), both in [-1, 1]. steps: see `sample`."""
        bar = "upsampling" if progress else None
        for i, n in enumerate(self.setting("upsampler_steps", steps), start=1):
            name = f"upsampler{i}"
            x = expect_finite(self.part(name).sample(x, n, generator, bar), name)
        return x

    def rerank(self, images, z, together=False):
        """Of N images for each of B embeddings the one that is nearest to it by CLIP.

        images (B N, 3, H, W), N in a row; z (B, D), of captions (DALL-E sec. 2.6) or of images
        -> (B, 3, H, W). together: all B keep draw k, the best k on average: a whole path.
        """
        z_i = clip.unit(expect_finite(self.encode_image(images), "CLIP"))        # (B N, D)
        scores = (z_i.unflatten(0, (len(z), -1)) * clip.unit(z)[:, None]).sum(2)   # (B, N)
        scores = scores.mean(0, keepdim=True) if together else scores
        own = images.unflatten(0, (len(z), -1))                            # (B, N, 3, H, W)
        return own[torch.arange(len(z)), scores.argmax(1)]

    @torch.no_grad()
    def encode_image(self, images):
        """Square images (B, 3, S, S) in [-1, 1] of any size -> z_i (B, D)."""
        self.expect_parts("CLIP image encoder")
        if images.shape[1:] != (3, *images.shape[-1:] * 2) or not images.abs().max() <= 1:
            raise ValueError(f"expected square images (B, 3, S, S) in [-1, 1], got {images.shape} "
                             f"in [{images.min():g}, {images.max():g}]; from 0..255: x / 127.5 - 1")
        x = resize(images.to(self.device), self.config.clip.image_size)
        return self.part("clip").encode_image(x)                                 # (B, D)

    # ---- parts, settings, checks

    def part(self, name):
        """The part, on the device; with low_memory all others wait on the CPU."""
        self.expect_parts(name)
        part = self.parts[name]
        if self.low_memory:
            for other in set(self.parts.values()) - {None, part}:
                other.to("cpu")
            part.to(self.device)
        return part

    def expect_parts(self, *names):
        """ValueError that names the first part that these weights do not hold."""
        there = self.parts | {"CLIP image encoder": self.parts["clip"] and self.parts["clip"].image}
        for name in names:
            if there.get(name) is None:
                raise ValueError(f"these weights hold no {name}; train it, or load others "
                                 "(--weights, --clip)")

    def setting(self, name, given):
        """What was given, as a number, or else what the weights bring."""
        if given is None:
            return getattr(self.config.sampling, name)
        return given if name == "upsampler_steps" else RANGES[name](given)

    def check(self, B, prior=None, /, generator=None, upsampler_steps=None, **given):
        """Before minutes of drawing B images: ValueError for options out of range or at odds."""
        steps = self.setting("upsampler_steps", upsampler_steps)
        n = len(self.config.sampling.upsampler_steps)
        if not isinstance(steps, (tuple, list)) or len(steps) not in (0, n):
            raise ValueError(f"expected {n} upsampler_steps, one for each upsampler, got {steps}")
        names = RANGES if prior else ("n", "steps", "eta", "guidance", "rerank", "upsampler_steps")
        for name, value in [*given.items(), *(("upsampler_steps", k) for k in steps)]:
            if name not in names:
                raise TypeError(f"there is no option {name!r}; expected {', '.join(names)}")
            if value is not None:
                RANGES[name](value)

        if isinstance(generator, (list, tuple)) and len(generator) != B:
            raise ValueError(f"expected {B} generators, one for each image, got {len(generator)}")
        if prior not in (None, "diffusion", "ar"):
            raise ValueError(f'expected the prior "diffusion" or "ar", got {prior!r}')
        if prior == "ar" and (given.get("prior_steps") or given.get("candidates")):
            raise ValueError("the AR prior has no prior_steps and no candidates; leave them out")
        choose = (given.get("rerank") or 1) > 1
        if prior is None and choose and not given.get("eta"):
            raise ValueError("with eta 0 all draws of an image are alike; leave rerank out")

        needed = {f"{prior}_prior": prior, "CLIP image encoder": choose,
                  "upsampler1": steps, "upsampler2": len(steps) > 1}
        self.expect_parts(*(name for name, used in needed.items() if used))

    # ---- sec. 3: what one can do with an image once it is an embedding, and noise

    def latent(self, images, steps=250, progress=False, text=None):
        """The bipartite latent of images (B, 3, S, S) in [-1, 1]: z_i (B, D), what CLIP sees in
        them, and x_T (B, 3, h, h), all the rest that it takes to draw them at h px.   Sec. 3

        steps: of DDIM, 2 or more. text: the captions, from `encode_text`; None: no captions.
        """
        z_i, size = self.encode_image(images).float(), self.config.decoder.unet.size
        part, x = self.part("decoder"), F.interpolate(images, (size, size), mode="area")
        text = self.no_caption(len(x)) if text is None else text
        z_i, bar = part.scale(z_i), "inverting" if progress else None
        return z_i, part.invert(x.to(self.device), z_i, text, steps, bar)

    def decode_latent(self, z_i, x_T, *, text=None, eta=0.0, guidance=1.0, steps=250, rerank=1,
                      together=False, upsampler_steps=None, generator=None, progress=False):
        """z_i (B, D), x_T (B, 3, h, h) -> images (B, 3, H, H) in [-1, 1].   Sec. 3

        Nearly inverts `latent`, with guidance 1, eta 0, the same text and steps; with eta 1 little
        of x_T is left. Of `rerank` draws CLIP keeps the one nearest to z_i: see `UnCLIP.rerank`.
        """
        z, x_T = z_i.repeat_interleave(rerank, 0), x_T.repeat_interleave(rerank, 0)
        text = self.no_caption(len(z_i)) if text is None else text
        text = text.map(lambda x: x.repeat_interleave(rerank, 0))
        x = self.part("decoder").decode_latent(z, x_T, text, steps, eta, guidance, generator,
                                               "images" if progress else None)
        x = expect_finite(x, "the decoder")
        x = self.rerank(x, z_i, together) if rerank > 1 else x
        return self.upsample(x, upsampler_steps, generator, progress)

    def no_caption(self, B):
        """The null condition, B rows: for images drawn from an embedding alone."""
        c, device = self.config.clip, self.device
        tokens = torch.zeros(B, self.config.decoder.context, dtype=torch.long, device=device)
        z_t = torch.zeros(B, c.embed_dim, device=device)
        states = torch.zeros(B, c.context, c.text_width, device=device)
        return self.part("decoder").null(clip.Text(tokens, tokens.bool(), z_t, states))

    def variations(self, image, n=8, eta=0.2, *, rerank=None, steps=250, progress=False,
                   **options):
        """n images that share what CLIP sees in one (see `open_image`): (n, 3, H, H).   Sec. 3.1

        The latent is kept; DDIM adds noise on its way, more with a larger eta in [0, 1]; eta 0
        gives the image itself, enlarged again. rerank: None is as `config.sampling` has it.
        options, here and below: those of `decode_latent`, but for text and together.
        """
        rerank = self.setting("rerank", rerank if eta or rerank else 1)
        self.check(n, n=n, eta=eta, rerank=rerank, steps=steps, **options)
        z_i, x_T = self.latent(open_image(image)[None], steps, progress)
        return self.decode_latent(z_i.expand(n, -1), x_T.expand(n, -1, -1, -1), eta=eta,
                                  rerank=rerank, steps=steps, progress=progress, **options)

    def interpolate(self, a, b, n=8, source=None, target=None, *, noise="slerp", steps=250,
                    generator=None, progress=False, **options):
        """n images on the way from a to b (see `open_image`): (n, 3, H, H).   Sec. 3.2

        z_i is turned from a's to b's. noise: "slerp" turns x_T too, as one long vector, so the ends
        show a and b again; "fixed" draws one x_T for all, so only what CLIP sees changes (the
        paper's fig. 4). source, target: their captions, of which the decoder reads the nearer one.
        All noise is the same for all images (of a list of generators the first draws it), so with
        eta > 0 `rerank` draws whole paths, and keeps one.
        """
        if noise not in ("slerp", "fixed"):
            raise ValueError(f'expected noise "slerp" or "fixed", got {noise!r}')
        if (source is None) != (target is None):
            raise ValueError("expected two captions, source and target, or none, got one")
        self.check(n, generator=generator, n=n, steps=steps, **options)
        text = self.no_caption(2) if source is None else self.encode_text([source, target])
        (z_a, x_a), (z_b, x_b) = (
            self.latent(open_image(image)[None], steps, progress, text.map(lambda x: x[i:i + 1]))
            for i, image in enumerate((a, b)))

        # one generator for each image, all in the same state
        first = generator[0] if isinstance(generator, (list, tuple)) else generator
        first = first or torch.default_generator
        generators = [first] + [first.clone_state() for _ in range(n - 1)]

        fraction = torch.linspace(0, 1, n, device=self.device)[:, None]          # (n, 1)
        x_T = slerp(x_a.flatten(1), x_b.flatten(1), fraction).unflatten(1, x_a.shape[1:])
        x_T = diffusion.noise_like(x_T, generators) if noise == "fixed" else x_T
        text = text.map(lambda x: x[(fraction[:, 0] >= 0.5).long()])             # n rows
        return self.decode_latent(slerp(z_a, z_b, fraction), x_T, text=text, steps=steps,
                                  together=True, generator=generators, progress=progress, **options)

    def text_diff(self, image, source, target, n=8, strength=0.5, *, guidance=2.0, steps=250,
                  progress=False, **options):
        """Edit an image: what it shows (source), what it shall show (target).   Sec. 3.3

            z_d = unit(z_t - z_t0),  z = slerp(z_i, z_d, theta),  theta = 0 ... strength; x_T stays
        -> (n, 3, H, H), from the image, decoded again, to the full edit; n = 1: the full edit.
        strength: the fraction of the angle between z_i and z_d, in the paper 0.25 to 0.5.
        z_t and z_t0 are the target's and the source's, of length 1. The decoder reads captions,
        too: the source's on the way to x_T and for the first n // 2 images, then the target's.
        ValueError for captions with equal embeddings.
        """
        self.check(n, n=n, guidance=guidance, steps=steps, **options)
        strength = RANGES["strength"](strength)
        text = self.encode_text([source, target])
        z_t0, z_t = clip.unit(text.z_t.float()).split(1)                                 # (1, D)
        if (z_t - z_t0).norm() < 1e-6:
            raise ValueError(f"expected two different captions, got {source!r} and {target!r}")
        z_i, x_T = self.latent(open_image(image)[None], steps, progress, text.map(lambda x: x[:1]))

        theta = torch.linspace(0, strength, max(2, n), device=self.device)[-n:, None]    # (n, 1)
        z = slerp(z_i, clip.unit(z_t - z_t0) * z_i.norm(), theta)                        # (n, D)
        text = text.map(lambda x: x[[0] * (n // 2) + [1] * (n - n // 2)])                # n rows
        return self.decode_latent(z, x_T.expand(n, -1, -1, -1), text=text, guidance=guidance,
                                  steps=steps, progress=progress, **options)

    def inpaint(self, image, mask, caption, n=4, *, guidance=None, steps=None, upsampler_steps=None,
                generator=None, progress=False):
        """n images (n, 3, H, H) that keep the image where the mask (see `open_mask`) is black; what
        is white is drawn anew, as the caption asks.   RePaint

        The decoder inpaints the small image; a small pixel counts as known if all of it is.
        """
        self.check(n, "diffusion", generator, upsampler_steps, n=n, guidance=guidance, steps=steps)
        image, hole = open_image(image)[None].to(self.device), open_mask(mask).to(self.device)
        if image.shape[2:] != hole.shape[2:] or not hole.any():
            raise ValueError(f"expected a mask of the image's {image.shape[2]} px with something "
                             "white, to be drawn anew, got one of "
                             f"{hole.shape[2]} px, {hole.mean():.0%} of them white")
        text = self.encode_text([caption] * n)
        z_i = self.sample_prior(text, generator=generator, progress=progress)    # (n, D)

        def at(size):
            known = F.interpolate(hole, (size, size), mode="area") == 0
            return resize(image, size).expand(n, -1, -1, -1), known.expand(n, -1, -1, -1)

        # what is known returns, of the small image and of the large one
        small, known = at(self.config.decoder.unet.size)
        x = self.sample_decoder(z_i, text, guidance, steps, generator, progress, known=small,
                                mask=known)
        x = self.upsample(torch.where(known, small, x), upsampler_steps, generator, progress)
        image, known = at(x.shape[2])                                            # (n, ., H, H)
        return torch.where(known, image, x)

    def save(self, path, dtype=None):
        """One file with all that `load` needs. dtype: of the weights in it, not of buffers."""
        parts, weights = {name: part for name, part in self.parts.items() if part is not None}, {}
        for name, part in parts.items():
            learnt = dict(part.named_parameters())
            weights[name] = {key: w.detach().cpu().to(dtype if dtype and key in learnt else w.dtype)
                             for key, w in part.state_dict().items()}
            if bad := [key for key, w in weights[name].items() if not w.isfinite().all()]:
                raise FloatingPointError(f"{name}.{bad[0]} is not finite, and nothing was saved; "
                                         "train this part again")

        config = replace(self.config, **{name: part.config for name, part in parts.items()})
        content = {"format": FORMAT, "config": asdict(config), "weights": weights,
                   "classes": {name: type(part).__name__ for name, part in parts.items()},
                   "tokenizer": self.tokenizer and self.tokenizer.state(), "words": [*self.words]}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(content, file))


def slerp(a, b, fraction):
    """Along the arc from a (0) to b (1), vectors on the last axis; fraction broadcasts, (n, 1).

        sin((1 - f) W) / sin W a + sin(f W) / sin W b,       W the angle between a and b
    Where a and b point the same or opposite ways it is a straight line.
    """
    W = F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).acos()[..., None]
    straight = W.sin().abs() < 1e-4
    W = torch.where(straight, torch.ones_like(W), W)

    arc = (((1 - fraction) * W).sin() * a + (fraction * W).sin() * b) / W.sin()
    return torch.where(straight, (1 - fraction) * a + fraction * b, arc)


# ---------------------------------------------------------------- presets
@dataclass
class Sampling:
    """How a stack is sampled by default."""
    guidance: float = 2.0           # of the decoder; the paper's: 1.25 to 4 (table 2, fig. 9)
    guidance_above: int = 0         # only at t above this (Kynkaanniemi et al. 2024); 0: always
    refine: int = 0                 # predictions averaged after sampling: Decoder.refine; 0: none
    prior_guidance: float = 1.0     # "guiding the prior hurt results" (sec. 5.5)
    prior_steps: int = 64
    decoder_steps: int = 250
    upsampler_steps: tuple = (27, 15)   # one number for each upsampler; (): images stay small
    temperature: float = 1.0        # of the AR prior's codes; below 1 the likelier ones
    candidates: int = 2             # image embeddings drawn, the one nearest the caption is kept
    rerank: int = 1                 # small images drawn, the one CLIP likes best is enlarged


@dataclass
class Config:
    """Everything that tells one stack from another. None: the stack has no such part."""
    name: str
    clip: clip.CLIPConfig
    diffusion_prior: prior.DiffusionPriorConfig | None
    ar_prior: prior.ARPriorConfig | None
    decoder: decoder.DecoderConfig
    upsampler1: decoder.UpsamplerConfig | None
    upsampler2: decoder.UpsamplerConfig | None
    sampling: Sampling = field(default_factory=Sampling)


def toy():
    """16 -> 64 -> 256 px, each four times the last; train_toy.py trains it on a CPU in minutes."""
    return Config(
        "toy",
        clip.CLIPConfig(embed_dim=64, context=20, activation="gelu",
                        pixel_mean=(1.0,) * 3, pixel_std=(0.33,) * 3),           # white is 0
        prior.DiffusionPriorConfig(), prior.ARPriorConfig(),        # sizes: the classes' defaults
        decoder.DecoderConfig(text_layers=0, predicts="v", drop_text=0.25),    # reads CLIP's states
        decoder.UpsamplerConfig(predicts="x0", residual=True),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, out_channels=3,
                                                   channels=16, mults=(1, 1), groups=2),
                                schedule="linear", predicts="x0", residual=True),
        Sampling(guidance=2.0, guidance_above=300, refine=4, prior_steps=1, decoder_steps=12,
                 upsampler_steps=(2, 2), temperature=0.2, candidates=1, rerank=4))


def paper():
    """Table 3 of the paper: 64 -> 256 -> 1024 px, CLIP ViT-H/16."""
    text = dict(vocab_size=16384, context=256, embed_dim=1024)
    deep = dict(depth=3, mults=(1, 2, 3, 4), dropout=0.1)
    return Config(
        "paper",
        clip.CLIPConfig(embed_dim=1024, image_size=256, patch=16, vocab_size=49408, context=77,
                        image_width=1280, image_layers=32, image_heads=20,
                        text_width=1024, text_layers=24, text_heads=16),

        prior.DiffusionPriorConfig(width=2048, layers=24, heads=32, **text),
        prior.ARPriorConfig(components=319, buckets=1024, width=1664, layers=24, heads=26,
                            text_width=2048, text_layers=24, text_heads=32, **text),

        decoder.DecoderConfig(
            decoder.UNetConfig(size=64, channels=512, attention=(32, 16, 8), context_width=2048,
                               **deep), text_layers=24, text_heads=32, **text),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, channels=320, **deep)),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=1024, in_channels=6, channels=192,
                                                   mults=(1, 1, 2, 2, 4, 4), depth=2),
                                schedule="linear", degradation="bsr"),
        Sampling(guidance=3.0))


PRESETS = {"toy": toy(), "paper": paper()}
PARTS = {"clip": clip.CLIP, "diffusion_prior": prior.DiffusionPrior, "ar_prior": prior.ARPrior,
         "decoder": decoder.Decoder, "upsampler1": decoder.Upsampler,
         "upsampler2": decoder.Upsampler}

# ---------------------------------------------------------------- build, save, load
HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMAT = "unclip 2"


def build(preset, device="cpu", dtype=torch.float32):
    """A preset's name, or a Config -> UnCLIP with fresh weights; "meta": shapes without memory."""
    if not isinstance(preset, Config) and preset not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, got {preset!r}")
    config = copy.deepcopy(preset if isinstance(preset, Config) else PRESETS[preset])
    return UnCLIP(config, {name: build_part(kind, getattr(config, name), device, dtype)
                           for name, kind in PARTS.items()})


def build_part(kind, config, device="cpu", dtype=torch.float32):
    """One part with fresh weights, in the memory format channels_last; None without a config."""
    if config is None:
        return None
    with torch.device(device):
        part = kind(config).to(memory_format=torch.channels_last).eval()
    for w in part.parameters():                          # buffers stay as they are
        w.data = w.data.to(dtype)
    return part


def load(path, device="cpu", dtype=torch.float32, clip_path=None, low_memory=False):
    """A file of `UnCLIP.save`, or a Karlo folder -> UnCLIP, ready to sample.

    clip_path: for a Karlo folder without image encoder, a CLIP that has one.
    low_memory: parts wait on the CPU and come to the device one at a time.
    Note: a class of your own comes back if the module that defines it was imported before.
    """
    home = "cpu" if low_memory else device
    if Path(path).is_dir():
        from extras import karlo                         # only public weights need extras/
        model = karlo.load_karlo(path, home, dtype, clip_path)
    elif clip_path is not None:
        raise ValueError(f"{path} has a CLIP of its own; give another only with a Karlo folder")
    else:
        model = load_checkpoint(path, home, dtype)
    model.device, model.low_memory = torch.device(device), low_memory
    return model


def load_checkpoint(path, device, dtype):
    """Our file -> UnCLIP.   ValueError that names the file and the entry that is wrong."""
    content, parts = read_checkpoint(path), dict.fromkeys(PARTS)
    with reading(path, "a checkpoint of this code"):
        config = config_from(Config, content["config"])
        state = content["tokenizer"]
        tokenizer = None if state is None else clip.Tokenizer(**state)
        if tokenizer and tokenizer.end != config.clip.vocab_size - 1:
            raise ValueError("tokenizer and config.clip.vocab_size do not fit")
        for name, value in asdict(config.sampling).items():
            for one in value if isinstance(value, tuple) else [value]:
                RANGES[name](one)

        for name, weights in content["weights"].items():
            with reading(name, "a part of it"):
                part = load_part(name, content["classes"][name], getattr(config, name), weights)
            for w in part.parameters():                  # buffers stay as they are
                w.data = w.data.to(dtype)
            parts[name] = part.to(device, memory_format=torch.channels_last)
        return UnCLIP(config, parts, tokenizer, [word.lower() for word in content["words"]])


def load_part(name, kind, config, weights):
    """One part of a checkpoint, of a class that is ours or was imported, in its own precision."""
    kinds = {kind.__name__: kind for kind in family(PARTS[name])}
    if kind not in kinds:                                # never imported by a name out of a file
        raise ValueError(f"first import the module that defines {kind}")

    part = build_part(kinds[kind], config, "meta")
    expected = part.state_dict()
    if wrong := sorted({*weights} ^ {*expected}):
        raise ValueError(f"{wrong[0]} is {'not of it' if wrong[0] in weights else 'missing'}")
    for key, w in weights.items():
        ours = expected[key]
        if not torch.is_tensor(w) or w.shape != ours.shape:
            raise ValueError(f"{key} is no tensor of {tuple(ours.shape)}")
        if w.is_floating_point() != ours.is_floating_point() or not w.isfinite().all():
            raise ValueError(f"{key} is {w.dtype}, or not finite")
    part.load_state_dict(weights, assign=True)
    return part


def family(kind):
    """The class and all of its subclasses that the program has imported so far."""
    return [kind] + [k for child in kind.__subclasses__() for k in family(child)]


def config_from(kind, plain, name="config"):
    """asdict's inverse -> `kind`, or the subclass of it that has just these settings."""
    wrong = {k: {f.name for f in fields(k)} ^ set(plain) for k in family(kind)}
    kind = min(wrong, key=lambda k: len(wrong[k]))
    if wrong[kind]:
        raise ValueError(f"{name} has other settings: {', '.join(sorted(wrong[kind]))}")

    hints, values, unions = typing.get_type_hints(kind), {}, (typing.Union, types.UnionType)
    for key, value in plain.items():
        origin = typing.get_origin(hints[key]) or hints[key]           # of tuple[int, ...]: tuple
        kinds = typing.get_args(hints[key]) if origin in unions else (origin,)
        if isinstance(value, dict):
            value = config_from(kinds[0], value, f"{name}.{key}")

        wrong = not isinstance(value, (*kinds, int) if float in kinds else kinds)
        if isinstance(value, int):                                     # True is an int, too
            wrong |= value < 0 or isinstance(value, bool) != (bool in kinds)
        if wrong:
            raise ValueError(f"{name}.{key} is {value!r}; expected {kinds[0].__name__}")
        values[key] = value
    return kind(**values)


def read_checkpoint(path, kind=FORMAT):
    """A file of torch.save -> its content.   FileNotFoundError; ValueError if it is damaged."""
    with reading(path, "a checkpoint of train_toy.py"):
        with zipfile.ZipFile(path) as file:
            if name := file.testzip():                   # compares the CRC of every entry
                raise ValueError(f"{name} is damaged; make or download the file again")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != kind:
            raise ValueError(f"it holds no {kind!r}")
        return content


def write_atomically(path, write):
    """write(file) beside `path`, then rename: whatever happens, `path` is whole, old or new."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{os.urandom(8).hex()}{Path(path).suffix}")

    try:
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

        if target.exists():
            shutil.copymode(target, beside)              # who may read it
        os.replace(beside, target)
    except (OSError, RuntimeError) as error:     # torch's RuntimeError hides Ctrl-C, a full disk
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise OSError(f"could not write {path}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()                              # if it was not renamed


# ---------------------------------------------------------------- images in and out
def open_mask(mask):
    """A path, a PIL image or (S, S) in 0..1 -> (1, 1, S, S): 1 where more than half white, or 0."""
    if torch.is_tensor(mask):
        if mask.ndim != 2 or not 0 <= mask.min() <= mask.max() <= 1:
            raise ValueError(f"expected a mask (S, S) in 0..1, got {tuple(mask.shape)} in "
                             f"{mask.min():g}..{mask.max():g}")
        mask = mask.expand(3, -1, -1) * 2.0 - 1
    return (open_image(mask).mean(0) > 0).float()[None, None]


def resize(images, size):
    """(B, 3, S, S) in [-1, 1] -> (B, 3, size, size); bicubic overshoots, so it is clamped."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))        # at least float32
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def to_pil(x):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(images, path, columns):
    """Images (B, 3, H, W) in [-1, 1], row by row with white gaps, to a PNG or JPEG file."""
    path, (B, _, H, W) = image_name(path), images.shape
    rows, gap = math.ceil(B / columns), 0 if B == 1 else max(2, H // 64)
    sheet = Image.new("RGB", (columns * (W + gap) - gap, rows * (H + gap) - gap), "white")
    for i, x in enumerate(images):
        sheet.paste(to_pil(x), (i % columns * (W + gap), i // columns * (H + gap)))
    write_atomically(path, sheet.save)                   # Pillow takes the kind from the name


def save_figure(figure, path, dpi=80):
    """A figure of matplotlib's, to an image file."""
    kind = Path(image_name(path)).suffix[1:]
    write_atomically(path, lambda file: figure.savefig(file, dpi=dpi, format=kind))


def write_json(path, content):
    """Numbers and names, for other programs."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def image_name(path):
    """The name of an image file that can be written.   OptionError"""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "no kind")
    file = io.BytesIO()
    try:
        Image.new("RGB", (516, 64)).save(file, kind)
        assert Image.open(file).size == (516, 64)        # an icon would be smaller
    except Exception:                                    # Pillow only reads some kinds
        raise OptionError(f"{str(path)!r} cannot be written: expected a name that ends in .png or "
                          ".jpg") from None
    return writable(path)


# ---------------------------------------------------------------- options and errors
class OptionError(argparse.ArgumentTypeError, ValueError):
    """A wrong value, at the command line (argparse prints it, with the option) or in Python."""


def named(path):
    """A name that is not "", as of a shell's variable that was never set.   OptionError"""
    if not str(path):
        raise OptionError("expected a name, got ''")
    return str(path)


def writable(path):
    """The name of a file that can be written; refused before minutes of work.   OptionError"""
    file = Path(os.path.realpath(path))                  # where a link leads
    with contextlib.suppress(OSError):                   # such as a name that is too long
        mine = file.is_file() and file.suffix != ".pt" and os.access(file, os.W_OK)
        room = file.parent.is_dir() and os.access(file.parent, os.W_OK)
        if str(path) and room and (mine or not file.exists()):
            return path
    raise OptionError(f"{str(path)!r} cannot be written: expected a name in a folder that exists, "
                      "writable both, and no device or checkpoint")


def number(low, high, name="a value"):
    """-> f(value or text): the number, if it is in this range, and whole if `low` is."""
    def read(value):
        try:
            x = type(low)(str(value))
        except ValueError:
            x = math.nan
        if low <= x <= high:
            return x
        what = "whole" if isinstance(low, int) else "finite"
        raise OptionError(f"expected {name} from {low} to {high}, a {what} number, got {value!r}")
    return read


positive, seed = number(1, 10 ** 6), number(0, 2 ** 64 - 1)
RANGES = {name: number(low, high, name) for low, high, names in (
    (1, 1000, "n rerank candidates steps prior_steps decoder_steps upsampler_steps"),
    (-100.0, 100.0, "guidance prior_guidance"), (-2.0, 2.0, "strength"), (0.0, 1.0, "eta"),
    (0, 1000, "guidance_above refine"), (0.001, 100.0, "temperature")) for name in names.split()}


def expect_finite(x, name):
    """x, or FloatingPointError that names what drew it."""
    if not x.isfinite().all():
        raise FloatingPointError(f"{name} drew no finite numbers; try --dtype fp32, less guidance")
    return x


def pick_device(name):
    """"cpu", "cuda", "cuda:1", "mps" -> torch.device.   ValueError if the machine has none."""
    try:
        torch.zeros(1, device=name).item()               # "meta" has no items
    except Exception as error:                           # of many kinds
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"no device {name!r} here ({reason}); use --device cpu") from None
    torch.backends.cudnn.allow_tf32 = False              # equal seeds, equal images, on CUDA, too
    return torch.device(name)


class Stream:
    """stdout or stderr; where it is closed, full or without a reader, work goes on, and `error` is
    kept. Characters that the terminal's encoding lacks are printed as escapes."""

    def __init__(self, stream):
        self.stream, self.error = stream or open(os.devnull, "w"), None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text=""):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    flush = write


def stop_on_error(run, *args):
    """run(*args), a command: what the user can mend ends it with one sentence, exit status 2."""
    out, err = Stream(sys.stdout), Stream(sys.stderr)

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result, message, status = run(*args), "", 1 if out.error else 0
        except KeyboardInterrupt as stop:
            message, status = str(stop) or "stopped", 130
        except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
            message, status = f"error: {error}", 2
        except (MemoryError, RuntimeError) as error:
            if "memory" not in f"{type(error)} {error}".lower():
                raise
            reason = str(error).split("\n")[0][:80]
            message, status = (f"error: too large for this machine's memory ({reason}); try fewer "
                               "images at once, or --dtype bf16"), 2

        if message:
            print(message, file=sys.stderr)
    if status:
        sys.exit(status)
    return result


def run_demo(demo, help):
    """The command of a chapter that shows something: demo(out), out None or an image file."""
    parser = argparse.ArgumentParser(description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("-o", "--out", type=image_name, metavar="FILE.png", help=help)
    stop_on_error(demo, parser.parse_args().out)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action):
        has_one = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_one else action.help


# ---------------------------------------------------------------- command line
def run(draw, out, weights, clip_path, device, dtype, low_memory, seed, **options):
    """What all commands share. options: the arguments of draw(model, ...)."""
    start, device, n = time.perf_counter(), pick_device(device), options["n"]
    if low_memory and device.type == "cpu":
        raise ValueError("--low-memory spares the memory of a GPU; give its --device, too")
    given = {name: options[name] for name in ("image", "a", "b", "mask") if name in options}
    if os.path.realpath(out) in map(os.path.realpath, given.values()):
        raise ValueError(f"{out} is what you gave; choose another name to write, with -o")
    given = {name: open_image(path) for name, path in given.items() if name != "mask"}
    model = load(weights, device, DTYPES[dtype], clip_path, low_memory)

    # each image has a seed of its own: the third of --seed 7 is the first of --seed 9
    seeds = [seed + i for _ in options.get("captions", [""]) for i in range(n)]
    generators = [torch.Generator().manual_seed(s % 2 ** 64) for s in seeds]
    x = draw(model, generator=generators, progress=True, **options | given)
    done = f"{len(x)} image{'s' * (len(x) > 1)} of {tuple(x.shape[2:])} pixels"

    # a strip: the user's image, what became of it, and the other end
    if given:
        first, *last = (resize(image[None].to(x), x.shape[2]) for image in given.values())
        x = torch.cat([first, x, *last])
    save_grid(x, out, len(x) if given else n)
    print(f"{done} in {time.perf_counter() - start:.1f} s: {out}")


def draw_sample(model, captions, n, steps, **options):
    """n images of each caption, and a warning of words that no training caption had."""
    words = dict.fromkeys(clip.split_words(clip.clean(" ".join(captions))))
    unknown = ", ".join(word for word in words if model.words and word not in model.words)
    if unknown:
        print(f"These weights were not trained on: {unknown}. They know: "
              f"{', '.join(sorted(model.words))}.", file=sys.stderr)
    return model.sample([c for c in captions for _ in range(n)], decoder_steps=steps, **options)


SHARED = {
    "-n": dict(help="how many images"),
    "-o --out": dict(metavar="PATH", type=image_name, help="the file to write"),
    "--weights": dict(default=str(HERE / "weights/toy.pt"), type=named,
                      help="a file, or a Karlo folder"),
    "--clip": dict(dest="clip_path", type=named,
                   help="ViT-L-14.pt, if a Karlo folder has no image encoder"),
    "--device": dict(default="cpu", help="cpu, cuda, mps"),
    "--dtype": dict(default="fp32", choices=DTYPES, help="of the networks"),
    "--low-memory": dict(action="store_true", help="parts come to the device one at a time"),
    "--seed": dict(default=0, type=seed, metavar="N", help="of the first image; others count on"),
    "--guidance": dict(help="classifier-free guidance of the decoder; 1 is none"),
    "--decoder-steps": dict(dest="steps", help="of diffusion"),
    "--upsampler-steps": dict(nargs="+", help="one number for each upsampler")}

IMAGE, TEXT = dict(help="a file; its middle square is used"), dict(required=True, metavar="CAPTION")
RERANK = dict(help="small images drawn for each; the one CLIP likes best is enlarged")
FEW = {"n": 8, "steps": 250, "guidance": 1.0}
COMMANDS = {                                    # name: help, what draws, defaults, its own options
    "sample": ("captions to images", draw_sample, {"n": 1, "out": "out.png"}, {
        "captions": dict(nargs="+", metavar="CAPTION", help="-n images are drawn of each"),
        "--prior": dict(default="diffusion", choices=("diffusion", "ar"), help="draws embeddings"),
        "--prior-guidance": dict(help="classifier-free guidance of the prior; 1 is none"),
        "--prior-steps": dict(help="of diffusion"),
        "--candidates": dict(help="embeddings drawn for each image; the best is kept"),
        "--rerank": RERANK}),
    "variations": ("images like an image (sec. 3.1)", UnCLIP.variations, FEW, {
        "image": IMAGE, "--rerank": RERANK,
        "--eta": dict(default=0.2, help="noise on the way, from 0, none, to 1")}),
    "interpolate": ("from one image to another (sec. 3.2)", UnCLIP.interpolate, FEW, {
        "a": IMAGE, "b": IMAGE,
        "--seed": SHARED["--seed"] | dict(help="of the noise, the same for all images"),
        "--source": dict(metavar="CAPTION", help="what a shows, for the decoder"),
        "--target": dict(metavar="CAPTION", help="what b shows"),
        "--noise": dict(default="slerp", choices=("slerp", "fixed"), help="fixed: one for all"),
        "--eta": dict(default=0.0, help="noise on the way, from 0, none, to 1"),
        "--rerank": RERANK | dict(default=1, help="with eta: paths drawn; CLIP keeps one")}),
    "edit": ("change an image by words (sec. 3.3)", UnCLIP.text_diff, FEW | {"guidance": 2.0}, {
        "image": IMAGE,
        "--source": TEXT | dict(help="what the image shows"),
        "--target": TEXT | dict(help="what it shall show"),
        "--strength": dict(default=0.5, help="how far the embedding is turned; 1 is all the way")}),
    "inpaint": ("draw a part of an image anew", UnCLIP.inpaint, {"n": 4}, {
        "image": IMAGE, "caption": dict(help="what the whole image shall show"),
        "--mask": dict(required=True, help="an image of that size: what is white is drawn anew")})}


def main(argv=None):
    parser = argparse.ArgumentParser(description="unCLIP: from a caption to an image.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help, draw, defaults, options) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help, description=help, allow_abbrev=False, formatter_class=HelpFormatter,
            epilog="What has no default here is as the weights have it.")
        for flags, option in (SHARED | options).items():
            dest = flags.split()[-1].strip("-").replace("-", "_")
            ranged = dict(type=RANGES[dest], metavar="N") if dest in RANGES else {}
            sub.add_argument(*flags.split(), **ranged | option)
        sub.set_defaults(draw=draw, **{"out": f"{name}.png"} | defaults)
    stop_on_error(lambda: run(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
