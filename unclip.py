"""unCLIP, the whole stack: caption -> image embedding -> small picture -> larger -> large.

    python unclip.py sample "a small red circle above a large blue square"

The flow of one caption through the chapters (paper: Ramesh et al. 2022, fig. 2):

    caption --tokenizer--> tokens --CLIP text encoder--> z_t, states                    clip.py
            --prior--> z_i, the embedding of a picture nobody has seen                  prior.py
            --decoder--> 64 px (toy: 16)                                                decoder.py
            --upsampler1--> 256 px (toy: 64) --upsampler2--> 1024 px (toy: 256)         decoder.py
"""
import os

# Before torch is imported: idle threads spin for a moment, then sleep. If they spin on, two
# processes on two cores can be 30 times slower; if they never spin, training is a third slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import copy
import datetime
import gc
import json
import math
import platform
import sys
import time
import weakref
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import clip
import decoder
import diffusion
import prior

torch.backends.cudnn.allow_tf32 = False     # float32 is float32 on a GPU, too: a seed, a picture

# ---------------------------------------------------------------- presets


@dataclass
class Sampling:
    """How a stack is sampled unless told otherwise. In the comments the paper's."""
    guidance: float = 2.0           # of the decoder, 1.25 to 4 (table 2, fig. 9)
    prior_guidance: float = 1.0     # "guiding the prior hurt results" (sec. 5.5)
    prior_steps: int = 64
    decoder_steps: int = 250
    upsampler_steps: tuple = (27, 15)
    candidates: int = 2             # image embeddings drawn, the one nearest the caption is kept
    rerank: int = 1                 # small pictures drawn, the one CLIP likes best is enlarged


@dataclass
class Config:
    """Everything that tells one stack from another. None: the stack has no such part."""
    name: str
    clip: clip.CLIPConfig
    diffusion_prior: prior.DiffusionPriorConfig
    ar_prior: prior.ARPriorConfig | None
    decoder: decoder.DecoderConfig
    upsampler1: decoder.UpsamplerConfig
    upsampler2: decoder.UpsamplerConfig | None
    sampling: Sampling = field(default_factory=Sampling)


def toy():
    """Everything small: 16 -> 64 -> 256 px, trained by train_toy.py on a CPU in minutes."""
    return Config(
        "toy",
        clip.CLIPConfig(embed_dim=64, image_size=32, patch=8, image_width=128, image_layers=3,
                        image_heads=4, vocab_size=600, context=20, text_width=128, text_layers=3,
                        text_heads=4, activation="gelu", pixel_mean=(1.0,) * 3,   # white is 0
                        pixel_std=(0.33,) * 3, apart=1.0),
        prior.DiffusionPriorConfig(), prior.ARPriorConfig(),        # sizes stand in the classes
        decoder.DecoderConfig(velocity=True), decoder.UpsamplerConfig(velocity=True),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, channels=16,
                                                   mults=(1, 1), groups=2),
                                schedule="linear", corruption="bsr", velocity=True),
        Sampling(guidance=2.0, prior_steps=16, decoder_steps=12, upsampler_steps=(2, 2), rerank=4))


def karlo():
    """Karlo v1 alpha, the public unCLIP: 64 -> 256 px, over OpenAI's CLIP ViT-L/14."""
    unet = dict(channels=320, mults=(1, 2, 3, 4), depth=3)
    return Config(
        "karlo",
        clip.CLIPConfig(embed_dim=768, image_size=224, patch=14, image_width=1024, image_layers=24,
                        image_heads=16, vocab_size=49408, context=77, text_width=768,
                        text_layers=12, text_heads=12),
        prior.DiffusionPriorConfig(embed_dim=768, vocab_size=0, context=77, text_width=768,
                                   width=2048, layers=20, heads=32, whiten=True, clamp=5.0),
        None,
        decoder.DecoderConfig(
            decoder.UNetConfig(size=64, attention=(32, 16, 8), context_width=1536, dropout=0.1,
                               **unet),
            embed_dim=768, vocab_size=0, context=77, text_width=768),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, out_channels=3,
                                                   scale_shift=False, **unet),
                                eta=None, last=True),
        None,
        Sampling(guidance=8.0, prior_guidance=4.0, prior_steps=25, decoder_steps=25,
                 upsampler_steps=(7,), candidates=1))


def paper():
    """Table 3 of the paper: 64 -> 256 -> 1024 px, CLIP ViT-H/16."""
    return Config(
        "paper",
        clip.CLIPConfig(embed_dim=1024, image_size=256, patch=16, image_width=1280,
                        image_layers=32, image_heads=20, vocab_size=49408, context=77,
                        text_width=1024, text_layers=24, text_heads=16),
        prior.DiffusionPriorConfig(embed_dim=1024, vocab_size=16384, context=256, width=2048,
                                   layers=24, heads=32),
        prior.ARPriorConfig(embed_dim=1024, components=319, buckets=1024, vocab_size=16384,
                            context=256, text_width=2048, text_layers=24, text_heads=32,
                            width=1664, layers=24, heads=26),
        decoder.DecoderConfig(
            decoder.UNetConfig(size=64, channels=512, mults=(1, 2, 3, 4), depth=3,
                               attention=(32, 16, 8), context_width=2048, dropout=0.1),
            embed_dim=1024, vocab_size=16384, context=256, text_width=2048, text_layers=24,
            text_heads=32),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, channels=320,
                                                   mults=(1, 2, 3, 4), depth=3, dropout=0.1)),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=1024, in_channels=6, channels=192,
                                                   mults=(1, 1, 2, 2, 4, 4), depth=2),
                                schedule="linear", corruption="bsr"),
        Sampling(guidance=3.0))


PRESETS = {"toy": toy(), "karlo": karlo(), "paper": paper()}
PARTS = {"clip": clip.CLIP, "diffusion_prior": prior.DiffusionPrior, "ar_prior": prior.ARPrior,
         "decoder": decoder.Decoder, "upsampler1": decoder.Upsampler,
         "upsampler2": decoder.Upsampler}


# ---------------------------------------------------------------- the stack


class UnCLIP:
    """The parts of a stack and what they do together.

    parts      {"clip", "diffusion_prior", "ar_prior", "decoder", "upsampler1", "upsampler2"} ->
               module, or None where the stack has no such part
    tokenizer  a clip.Tokenizer, or None as long as nothing was trained
    words      the words of the training captions, or () if unknown (a public checkpoint's)
    seconds    {part: how long it was trained}, {} if unknown
    """

    def __init__(self, config, parts, tokenizer=None, words=()):
        c = config
        limits = {part.context for part in (c.diffusion_prior, c.ar_prior, c.decoder) if part}
        if len(limits) > 1 or c.decoder.context < c.clip.context:
            raise ValueError(f"expected one context for priors and decoder, at least CLIP's "
                             f"{c.clip.context} tokens, got {sorted(limits)}")
        self.config, self.parts, self.tokenizer, self.words = config, parts, tokenizer, tuple(words)
        self.seconds = {}
        self.low_memory = None           # a device: see `at_work`. None: parts stay where they are
        self.empty_caption = None                                # see `null`

    @property
    def device(self):
        """Where the parts work."""
        part = next(part for part in self.parts.values() if part is not None)
        return self.low_memory or next(part.parameters()).device

    @contextlib.contextmanager
    def at_work(self, name):
        """`with model.at_work("decoder") as decoder:` - the part, on the device while it works.

        With low_memory parts wait on the CPU, so that the largest decides the memory needed.
        """
        part, home = self.parts[name], None
        if part is None:
            raise ValueError(f"these weights hold no {name}; train it (train_toy.py --resume), or "
                             "load others")
        if self.low_memory is not None:
            home = part.state_dict()                     # these tensors stay on the CPU
            part.to(self.low_memory)
        try:
            yield part
        finally:
            if home is not None:
                part.load_state_dict(home, assign=True)

    @property
    def sizes(self):
        """The sides of the pictures after each stage, e.g. (16, 64, 256)."""
        stages = [self.config.decoder, self.config.upsampler1, self.config.upsampler2]
        return tuple(stage.unet.size for stage in stages if stage is not None)

    @property
    def context(self):
        """L of a clip.Text: captions end at CLIP's context, the rest is padding (77 of 256)."""
        return self.config.decoder.context

    def unknown_words(self, captions):
        """The captions' words that no training caption had, in order; () if that is unknown."""
        known = set(self.words)
        said = [word for text in captions for word in clip.split_words(clip.clean(text))]
        return tuple(dict.fromkeys(word for word in said if known and word not in known))

    @torch.no_grad()
    def encode_text(self, captions):
        """B captions, or one string -> clip.Text.   ValueError if one is empty or too long."""
        captions = [captions] if isinstance(captions, str) else captions
        if self.tokenizer is None:
            raise ValueError("this stack has fresh weights and no tokenizer; load trained weights")
        empty = [text for text in captions if not clip.clean(text)]
        if empty or not captions:
            raise ValueError(f"expected captions with some text, got {(empty or captions)[:1]}")
        return self._text(captions)

    def _text(self, captions):
        tokens = self.tokenizer(captions, self.config.clip.context)              # (B, L)
        mask = clip.token_mask(tokens, self.tokenizer.end)                       # (B, L)
        with self.at_work("clip") as model:
            z_t, states = model.encode_text(tokens.to(self.device))
        tokens, mask = (F.pad(x, (0, self.context - x.shape[1])) for x in (tokens, mask))
        return clip.Text(tokens.to(self.device), mask.to(self.device), z_t, states)

    @torch.no_grad()
    def null(self, text):
        """What guidance knows as "no caption", a clip.Text of as many rows as text has.

        All padding; or, as networks that read CLIP's states (Karlo's) were trained, the caption "".
        """
        if self.config.decoder.vocab_size:
            return text.null()
        if self.empty_caption is None:                           # one row, kept
            self.empty_caption = self._text([""])
        return self.empty_caption.map(
            lambda x: x.to(self.device).expand(len(text.tokens), *x.shape[1:]))

    def no_caption(self, B):
        """B rows of a clip.Text that says nothing, for pictures drawn from an embedding alone."""
        D, tokens = self.config.clip.embed_dim, torch.zeros(B, self.context, dtype=torch.long)
        text = clip.Text(tokens, tokens.bool(), torch.zeros(B, D), torch.zeros(B, 0))
        return self.null(text.map(lambda x: x.to(self.device)))

    def embed(self, text, *, which="diffusion", guidance=None, steps=None, candidates=None,
              generator=None, progress=False):
        """The prior: text -> z_i (B, D), by the "diffusion" or the "ar" prior."""
        s = self.config.sampling
        guidance = s.prior_guidance if guidance is None else guidance
        steps = s.prior_steps if steps is None else steps
        candidates = s.candidates if candidates is None else candidates
        if self.parts.get(f"{which}_prior") is None:
            have = [p for p in ("diffusion", "ar") if self.parts.get(f"{p}_prior") is not None]
            raise ValueError(f"expected one of the priors {have}, got {which!r}" if have else
                             "these weights hold no prior, so they draw from pictures alone "
                             "(variations, interpolate, edit)")
        bar, null = "prior" if progress else None, self.null(text)
        with self.at_work(f"{which}_prior") as model:
            if which == "ar":
                return model.sample(text, guidance=guidance, generator=generator, progress=bar)
            return model.sample(text, steps, guidance, candidates, generator, null, bar)

    def draw(self, z_i, text, *, guidance=None, decoder_steps=None, upsampler_steps=None,
             generator=None, progress=False):
        """The decoder and the upsamplers: z_i (B, D), text -> (B, 3, H, W) in [-1, 1]."""
        s = self.config.sampling
        guidance = s.guidance if guidance is None else guidance
        steps = s.decoder_steps if decoder_steps is None else decoder_steps
        bar, null = "pictures" if progress else None, self.null(text)
        with self.at_work("decoder") as model:
            x = model.sample(z_i, text, steps, guidance, generator, null, bar)
        return self.enlarge(x, upsampler_steps, generator, progress)

    def enlarge(self, x, upsampler_steps=None, generator=None, progress=False):
        """The upsamplers: the decoder's (B, 3, h, h) -> (B, 3, H, H), both in [-1, 1]."""
        if upsampler_steps is None:
            upsampler_steps = self.config.sampling.upsampler_steps
        self.expect_upsampler_steps(upsampler_steps)
        for i, steps in enumerate(upsampler_steps, start=1):
            if self.parts.get(f"upsampler{i}") is not None:
                with self.at_work(f"upsampler{i}") as model:
                    x = model.sample(x, steps, generator, "enlarging" if progress else None)
        return x

    def sample(self, captions, *, prior="diffusion", guidance=None, prior_guidance=None,
               prior_steps=None, decoder_steps=None, upsampler_steps=None, candidates=None,
               rerank=None, generator=None, progress=True):
        """B captions, or one string -> pictures (B, 3, H, W) in [-1, 1].

        What is None is as `config.sampling` says.

        guidance          of the decoder: 1 is the plain model, 3 follows the caption more closely
        candidates        embeddings drawn by the diffusion prior for each picture, the best is kept
        upsampler_steps   one number for each upsampler
        rerank            small pictures drawn for each caption, the one CLIP likes best is enlarged
        generator         the source of all randomness: equal seeds, equal pictures, on any device
        """
        for name, given in {"prior_steps": prior_steps, "decoder_steps": decoder_steps,
                            "candidates": candidates, "rerank": rerank}.items():
            if given is not None and given < 1:                  # said before minutes of drawing
                raise ValueError(f"expected {name} to be at least 1, got {given}")
        if upsampler_steps is not None:
            self.expect_upsampler_steps(upsampler_steps)
        N = self.config.sampling.rerank if rerank is None else rerank
        captions = [captions] if isinstance(captions, str) else captions
        if N > 1:
            self.expect_image_encoder()
        text = self.encode_text([caption for caption in captions for _ in range(N)])
        z_i = self.embed(text, which=prior, guidance=prior_guidance, steps=prior_steps,
                         candidates=candidates, generator=generator, progress=progress)
        small = self.draw(z_i, text, guidance=guidance, decoder_steps=decoder_steps,
                          upsampler_steps=(), generator=generator, progress=progress)
        small = self.rerank(small, captions, keep=1) if N > 1 else small
        return self.enlarge(small, upsampler_steps, generator, progress)

    @torch.no_grad()
    def rerank(self, pictures, captions, keep):
        """Of N pictures of each caption the `keep` nearest to it, says CLIP.   DALL-E sec. 2.6

        pictures (B N, 3, H, W), N in a row for each of B captions -> (B keep, 3, H, W), best first.
        """
        text = self.encode_text(list(captions))
        z_i = self.encode_image(pictures).unflatten(0, (len(captions), -1))      # (B, N, D)
        score = (clip.unit(z_i) * clip.unit(text.z_t)[:, None]).sum(2)           # (B, N)
        best = score.topk(keep, dim=1).indices                                   # (B, keep)
        rows = best + torch.arange(len(best), device=best.device)[:, None] * z_i.shape[1]
        return pictures[rows.flatten()]

    def expect_upsampler_steps(self, steps):
        """ValueError unless there is one number for each upsampler; () is for none of them."""
        n = len(self.config.sampling.upsampler_steps)
        if not isinstance(steps, (tuple, list)) or len(steps) not in (0, n):
            raise ValueError(f"expected {n} number{'s' * (n > 1)} of upsampler steps, one for each "
                             f"upsampler, got {steps}")

    def expect_image_encoder(self):
        if self.parts["clip"].image is None:
            raise ValueError("these weights have no CLIP image encoder; give one with --clip")

    @torch.no_grad()
    def encode_image(self, pictures):
        """Pictures (B, 3, S, S) in [-1, 1] of any size S -> z_i (B, D).   ValueError for others."""
        self.expect_image_encoder()
        square = pictures.ndim == 4 and pictures.shape[2] == pictures.shape[3]
        clip.expect_pixels(pictures, square, "square pictures (B, 3, S, S)")
        size = self.config.clip.image_size
        x = F.interpolate(pictures.to(self.device), (size, size), mode="bicubic", antialias=True)
        with self.at_work("clip") as model:
            return model.encode_image(x.clamp(-1, 1))

    # ---- sec. 3: what one can do with a picture once it is an embedding, and the noise beside it

    def latent(self, pictures, steps=250, progress=False):
        """The bipartite latent of pictures (B, 3, S, S): z_i (B, D), x_T (B, 3, h, h).   Sec. 3

        z_i says what CLIP sees in a picture; x_T, all the rest that it takes to draw it again.
        """
        z_i = self.encode_image(pictures).float()
        z_i = clip.unit(z_i) if self.config.decoder.vocab_size else z_i    # Karlo's decoder: as is
        size = self.config.decoder.unet.size
        x = F.interpolate(pictures.to(self.device), (size, size), mode="area")
        text = self.no_caption(len(x))
        bar, null = "inverting" if progress else None, self.null(text)
        with self.at_work("decoder") as model:
            return z_i, model.invert(x, z_i, text, steps, null, bar)

    def decode(self, z_i, x_T, *, eta=0.0, guidance=1.0, steps=250, upsampler_steps=None,
               generator=None, progress=False):
        """The way back: z_i (B, D), x_T (B, 3, h, h) -> pictures (B, 3, H, H) in [-1, 1].

        eta = 0 follows x_T and makes the picture again; with eta = 1 little of x_T is left.
        """
        text = self.no_caption(len(z_i))
        bar, null = "pictures" if progress else None, self.null(text)
        with self.at_work("decoder") as model:
            x = model.decode(z_i, x_T, text, steps, eta, guidance, generator, null, bar)
        return self.enlarge(x, upsampler_steps, generator, progress)

    def variations(self, image, n=8, eta=0.2, *, guidance=1.0, steps=250, upsampler_steps=None,
                   generator=None, progress=False):
        """Pictures (n, 3, H, H) that share what CLIP sees in one (see `open_picture`).   Sec. 3.1

        The latent is kept; DDIM adds noise on its way, more with a larger eta in [0, 1]. With the
        default nine of ten of the toy's variations keep all that a caption would say.
        """
        if not 0 <= eta <= 1:                                    # said before minutes of inverting
            raise ValueError(f"expected eta between 0 (the picture itself) and 1, got {eta}")
        latent = self.latent(open_picture(image)[None], steps, progress)
        z_i, x_T = (x.expand(n, *x.shape[1:]) for x in latent)
        return self.decode(z_i, x_T, eta=eta, guidance=guidance, steps=steps, generator=generator,
                           upsampler_steps=upsampler_steps, progress=progress)

    def interpolate(self, a, b, n=8, *, noise="slerp", guidance=1.0, steps=250,
                    upsampler_steps=None, generator=None, progress=False):
        """n pictures on the way from a to b (see `open_picture`) -> (n, 3, H, H).   Sec. 3.2

        z_i is turned from a's to b's. noise: "slerp" turns x_T too, so the ends are a and b again;
        "fixed" draws one x_T for all, so only what CLIP sees changes (the paper's fig. 4).
        """
        if noise not in ("slerp", "fixed"):
            raise ValueError(f'expected noise "slerp" or "fixed", got {noise!r}')
        share = torch.linspace(0, 1, n, device=self.device)[:, None]           # (n, 1)
        ends = [self.latent(open_picture(x)[None], steps, progress) for x in (a, b)]
        z_i = diffusion.slerp(ends[0][0], ends[1][0], share)                   # (n, D)
        size = ends[0][1].shape[1:]
        if noise == "slerp":
            x_T = diffusion.slerp(ends[0][1].flatten(1), ends[1][1].flatten(1), share)
        else:
            device = generator.device if generator else None
            x_T = torch.randn(1, size.numel(), generator=generator, device=device).expand(n, -1)
        return self.decode(z_i, x_T.to(self.device).unflatten(1, size), guidance=guidance,
                           steps=steps, generator=generator, upsampler_steps=upsampler_steps,
                           progress=progress)

    def text_diff(self, image, source, target, n=8, strength=0.4, *, guidance=1.0, steps=250,
                  upsampler_steps=None, generator=None, progress=False):
        """Edit a picture (see `open_picture`): what it shows, what it shall show.   Sec. 3.3

        z_i is turned towards the difference of the two captions, x_T kept:
            z_d = norm(z_t - z_t0),   z = slerp(z_i, z_d, theta),   theta = 0 ... strength
        -> (n, 3, H, H), from the picture itself to the full edit; n = 1 gives the full edit.
        strength: the share of the angle between z_i and z_d. The paper's is 0.25 to 0.5, 45 degrees
        if they are at right angles; in the toy they are farther apart, up to 120 degrees.
        """
        z_d = self.difference([source], [target])                              # (1, D)
        z_i, x_T = self.latent(open_picture(image)[None], steps, progress)
        z_d = z_d * z_i.norm()
        theta = torch.linspace(0, strength, max(2, n), device=self.device)[-n:, None]     # (n, 1)
        return self.decode(diffusion.slerp(z_i, z_d, theta), x_T.expand(n, *x_T.shape[1:]),
                           guidance=guidance, steps=steps, generator=generator,
                           upsampler_steps=upsampler_steps, progress=progress)

    def difference(self, source, target):
        """From captions to captions: unit(z_t(target) - z_t(source)), (B, D).

        ValueError if two are equal.
        """
        z_t0, z_t = (clip.unit(self.encode_text(x).z_t.float()) for x in (source, target))
        if (z_t - z_t0).norm(dim=1).min() < 1e-6:
            raise ValueError(f"expected two different captions, got {source} and {target}")
        return clip.unit(z_t - z_t0)

    def save(self, path, dtype=None):
        """One file with weights, configuration, tokenizer and words; loads with weights_only=True.

        dtype: of the weights on disk (torch.half for the committed toy), None: as they are.
        """
        weights = {}
        for name, part in self.parts.items():
            if part is not None:
                parameters = {key for key, _ in part.named_parameters()}
                weights[name] = {key: w.detach().cpu().to(dtype) if dtype and key in parameters
                                 else w.detach().cpu() for key, w in part.state_dict().items()}
        save_atomically({"format": "unclip 1", "config": asdict(self.config), "weights": weights,
                         "tokenizer": self.tokenizer and self.tokenizer.state(),
                         "words": list(self.words), "seconds": self.seconds}, path)


def save_atomically(content, path):
    """torch.save beside the file, then rename: whatever happens, `path` is whole, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:             # a full disk is torch's RuntimeError
        beside.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; is the disk full?") from None


def build_from(config, device="cpu", dtype=torch.float32):
    """A Config -> UnCLIP with fresh weights."""
    return UnCLIP(config, {name: None if getattr(config, name) is None else
                           channels_last(fresh(kind, getattr(config, name), device, dtype)).eval()
                           for name, kind in PARTS.items()})


def fresh(kind, config, device, dtype):
    """One part with fresh weights, never in more memory than it needs in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).to(dtype)
    finally:
        torch.set_default_dtype(before)


def build(preset, device="cpu", dtype=torch.float32):
    """A preset's name -> UnCLIP with fresh weights; device "meta" gives shapes without memory."""
    if preset not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, got {preset!r}")
    return build_from(copy.deepcopy(PRESETS[preset]), device, dtype)


def read_checkpoint(path, kind="unclip 1"):
    """A file of `save_atomically` -> its content.   FileNotFoundError, ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; give another, or train with "
                                "train_toy.py")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:           # torch raises many kinds for what is no checkpoint
        raise ValueError(f"{path} is not a checkpoint, or is cut short "
                         f"({type(error).__name__}); train or download it again") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path} holds no {kind!r}; make one with train_toy.py")
    return content


def config_from(plain):
    """asdict's inverse: nested dicts of numbers -> Config.   ValueError for unknown settings."""
    def make(kind, values):
        return None if values is None else kind(**{k: tuple(v) if isinstance(v, list) else v
                                                   for k, v in values.items()})

    def with_unet(kind, values):
        return None if values is None else make(kind, values | {"unet": make(decoder.UNetConfig,
                                                                             values["unet"])})

    try:
        return Config(plain["name"], make(clip.CLIPConfig, plain["clip"]),
                      make(prior.DiffusionPriorConfig, plain["diffusion_prior"]),
                      make(prior.ARPriorConfig, plain["ar_prior"]),
                      with_unet(decoder.DecoderConfig, plain["decoder"]),
                      with_unet(decoder.UpsamplerConfig, plain["upsampler1"]),
                      with_unet(decoder.UpsamplerConfig, plain["upsampler2"]),
                      make(Sampling, plain["sampling"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"the checkpoint is of another configuration: {error}") from None


def load(path, device="cpu", dtype=torch.float32, clip_path=None, low_memory=False):
    """A checkpoint file of ours, or a Karlo folder -> UnCLIP, ready to sample.

    clip_path: for a Karlo folder without image encoder, a CLIP that has one (see load_karlo).
    low_memory: parts wait on the CPU and come to the device one at a time.
    """
    if low_memory:
        model = load(path, "cpu", dtype, clip_path)
        model.low_memory = torch.device(device)
        return model
    if Path(path).is_dir():
        return load_karlo(path, device, dtype, clip_path)
    if clip_path is not None:
        raise ValueError(f"{path} has a CLIP of its own; give another only with a Karlo folder")
    content = read_checkpoint(path)
    model = build_from(config_from(content["config"]), "meta", dtype)
    model.words, model.seconds = tuple(content["words"]), content["seconds"]
    model.tokenizer = content["tokenizer"] and clip.Tokenizer.from_state(content["tokenizer"])
    for name in [name for name, part in model.parts.items() if part is not None]:
        if name not in content["weights"]:
            model.parts[name] = None
            continue
        part = model.parts[name]
        try:
            part.load_state_dict(content["weights"][name], assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise ValueError(f"the weights of {name} in {path} do not fit its configuration: "
                             f"{first}") from None
        for p in part.parameters():
            p.data = p.data.to(dtype)
        channels_last(part.to(device))
    return model


# ---------------------------------------------------------------- public checkpoints


def load_karlo(folder, device="cpu", dtype=torch.float32, clip_path=None):
    """A Karlo folder, as Hugging Face's diffusers keeps it -> UnCLIP.

    karlo-v1-alpha (from text), or karlo-v1-alpha-image-variations (an image encoder, no prior).
    clip_path: OpenAI's ViT-L-14.pt or a CLIP folder; its image half joins the folder's text half.
    FileNotFoundError or ValueError, naming the file, where a part is missing or does not fit.
    """
    folder = Path(folder)
    index = clip.read_json(folder / "model_index.json").get("_class_name")
    if index not in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        raise ValueError(f"{folder / 'model_index.json'} is of a {index}; expected UnCLIPPipeline "
                         "or UnCLIPImageVariationPipeline, a Karlo folder")
    model = clip.load_clip(folder / "text_encoder", device, dtype)
    if model.text is None:
        raise ValueError(f"{folder / 'text_encoder'} holds an image encoder; is it misnamed?")
    tokenizer = clip.Tokenizer.load(folder / "tokenizer")
    clip.check_tokenizer(tokenizer, model.config, folder / "tokenizer")
    if clip_path is not None or (folder / "image_encoder").is_dir():
        add_image_encoder(model, clip_path or folder / "image_encoder", device, dtype)
    parts = dict.fromkeys(PARTS) | {
        "clip": model,
        "diffusion_prior": (prior.load_karlo(folder, device, dtype)
                            if index == "UnCLIPPipeline" else None),
        "decoder": channels_last(decoder.load_karlo_decoder(folder, device, dtype)),
        "upsampler1": channels_last(decoder.load_karlo_upsampler(folder, device, dtype))}
    configs = {name: part and part.config for name, part in parts.items()}
    configs["decoder"].context = model.config.context
    for name in ("diffusion_prior", "decoder"):
        c, ours = configs[name], model.config
        if c is not None and (c.embed_dim, c.text_width, c.context) != (
                ours.embed_dim, ours.text_width, ours.context):
            raise ValueError(f"the {name} in {folder} was made for another text_encoder")
    small, large = configs["decoder"].unet.size, configs["upsampler1"].unet.size
    if large != 4 * small:
        raise ValueError(f"{folder / 'super_res_first'} makes {large} px of {small}; expected 4 "
                         "times as many")
    config = Config("karlo", **configs, sampling=replace(PRESETS["karlo"].sampling))
    return UnCLIP(config, parts, tokenizer)


def same_space(a, b):
    """Are two projections the same but for rounding, so that what they make can be compared?"""
    return a.shape == b.shape and bool((a - b).norm() < 0.02 * b.norm())


def add_image_encoder(model, path, device, dtype):
    """Give a CLIP without image encoder that of the CLIP at `path`."""
    other = clip.load_clip(path, device, dtype)
    c = other.config
    if other.image is None or c.embed_dim != model.config.embed_dim:
        raise ValueError(f"{path} has no image encoder that fits: expected a CLIP with embeddings "
                         f"of {model.config.embed_dim} numbers")
    if other.text is not None and not same_space(other.text.proj, model.text.proj):
        raise ValueError(f"{path} is another CLIP than the folder's text_encoder, so its pictures "
                         "lie elsewhere; Karlo's is ViT-L-14.pt")
    model.image, model.logit_scale = other.image, other.logit_scale
    model.config = replace(model.config, image_size=c.image_size, patch=c.patch,
                           image_width=c.image_width, image_layers=c.image_layers,
                           image_heads=c.image_heads)


# ---------------------------------------------------------------- pictures in and out


def open_picture(picture):
    """A file's path, a PIL image or (3, H, W) in [-1, 1] -> its middle square, (3, S, S)."""
    if not torch.is_tensor(picture) and not isinstance(picture, Image.Image):
        picture = clip.read_picture(picture)
    size = picture.shape[1:] if torch.is_tensor(picture) else picture.size
    return clip.preprocess(picture, min(size))


def to_pil(x):
    """(3, H, W) in [-1, 1] -> a PIL image."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_grid(pictures, path, columns):
    """Pictures (B, 3, H, W) in [-1, 1], row by row with a white rim, to a PNG or JPEG file."""
    B, _, H, W = pictures.shape
    rows, gap = math.ceil(B / columns), 0 if B == 1 else max(2, H // 64)
    sheet = torch.ones(3, rows * (H + gap) - gap, columns * (W + gap) - gap)
    for i, x in enumerate(pictures):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[:, top:top + H, left:left + W] = x
    path = Path(path)
    beside = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        to_pil(sheet).save(beside)
        os.replace(beside, path)
    except (OSError, ValueError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; is the folder there, does the name end in "
                      ".png?") from None


# ---------------------------------------------------------------- speed
# What trades memory for time, or time for a compiler, is switched here; numbers are in the README.


def autocast(device, dtype):
    """Weights stay in float32, products are computed in `dtype`; with float32 nothing happens.

    For GPUs: on CPUs without bf16 units a toy step took 1.15 to 11 times as long.
    """
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def channels_last(part):
    """Convolutions' weights in the order of memory that a U-Net's pictures have.

    In the other order every call puts them into this one again. (On a GPU tensor cores want this
    order, but torch's GroupNorm gives the other one back: --compile spares the copies between.)
    """
    return part.to(memory_format=torch.channels_last)


def recompute(part):
    """Activation checkpointing: keep each block's input alone, and compute the rest once more.

    Training of a part then needs less memory; a toy step takes 40 to 50 % longer.
    """
    def again(forward):                                  # a function: torch.compile sees into it
        return lambda *a, **options: checkpoint(forward, *a, use_reentrant=False, **options)

    for block in part.modules():
        if isinstance(block, (clip.Block, decoder.ResBlock, decoder.Attention)):
            block.forward = again(block.forward)


def compile_blocks(part):
    """torch.compile, a Transformer block or a whole U-Net at a time.

    On a CPU a toy step gains little, and the first one takes a minute: off by default.
    """
    for module in part.modules():
        if isinstance(module, clip.Block):
            module.compile()
        if isinstance(module, decoder.UNet):
            module.compile(dynamic=False)        # code for every size: for any, torch 2.13 may fail


# ---------------------------------------------------------------- benchmark
# Random weights, real shapes and step counts: how fast is each stage, and does it fit?


def random_text(c, B, device, dtype):
    """A clip.Text of B full captions for a part with configuration c."""
    L, states = c.context, 0 if c.vocab_size else c.text_width
    tokens = torch.randint(max(2, c.vocab_size), (B, L), device=device)
    return clip.Text(tokens, torch.ones_like(tokens, dtype=torch.bool),
                     torch.randn(B, c.embed_dim, device=device, dtype=dtype),
                     torch.randn(B, L, states, device=device, dtype=dtype))


def sampling_work(name, part, s, B, device, dtype):
    """-> (do one step, how many steps a picture takes) for a part of a stack, s its Sampling.

    Of s.rerank small pictures one is enlarged; what CLIP takes to choose it is not counted.
    """
    c, t = part.config, 500
    B = B if name.startswith("upsampler") else B * s.rerank
    if name == "clip":
        tokens = torch.randint(c.vocab_size, (B, c.context), device=device)
        return lambda: part.encode_text(tokens), 1
    if name.startswith("upsampler"):
        low = torch.rand(B, 3, c.unet.size // 4, c.unet.size // 4, device=device) * 2 - 1
        denoise, x = part.denoiser(low), torch.randn(B, 3, c.unet.size, c.unet.size, device=device)
        return lambda: denoise(x, t), s.upsampler_steps[int(name[-1]) - 1]
    if name == "ar_prior":
        text = random_text(c, B, device, dtype)
        if torch.device(device).type == "meta":          # all codes at once: as much work, counted
            codes = torch.zeros(B, c.components, dtype=torch.long, device=device)    # in no time
            return lambda: part(codes, codes[:, 0], text), 1
        return lambda: part.sample(text, guidance=s.prior_guidance), 1
    if name == "diffusion_prior":
        text = random_text(c, B * s.candidates, device, dtype)
        denoise = part.denoiser(text, s.prior_guidance)
        x = torch.randn(B * s.candidates, c.embed_dim, device=device)
        return lambda: denoise(x, t), s.prior_steps
    text, size = random_text(c, B, device, dtype), c.unet.size
    denoise = part.denoiser(torch.randn(B, c.embed_dim, device=device), text, s.guidance)
    x = torch.randn(B, 3, size, size, device=device)
    return lambda: denoise(x, t), s.decoder_steps


def training_loss(name, part, B, device):
    """-> the mean loss of a batch of B, as a function, for a part of a stack."""
    c = part.config
    if name == "clip":
        images = torch.rand(B, 3, c.image_size, c.image_size, device=device) * 2 - 1
        tokens = torch.randint(c.vocab_size, (B, c.context), device=device)

        def loss():
            return clip.clip_loss(*part(images, tokens), part.scale())
    elif name.startswith("upsampler"):
        side = c.unet.size // 4                                          # crops of a quarter
        high = torch.rand(B, 3, side, side, device=device) * 2 - 1
        low = decoder.shrink(high, side // 4)

        def loss():
            return part.loss(high, low).mean()
    else:
        text = random_text(c, B, device, torch.float32)
        z_i = torch.randn(B, c.embed_dim, device=device)
        more = (z_i, text) if name.endswith("prior") else (
            torch.rand(B, 3, c.unet.size, c.unet.size, device=device) * 2 - 1, z_i, text)

        def loss():
            return part.loss(*more).mean()

    return loss


def training_step(part, loss, device, dtype):
    """-> do what a step of the paper's training does: loss, gradients, clipping, AdamW, average."""
    weights = list(part.parameters())
    opt = torch.optim.AdamW(weights, 1e-4, fused=True)
    ema = [w.detach().clone() for w in weights]

    def step():
        opt.zero_grad()
        with autocast(device, dtype):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        torch._foreach_lerp_(ema, [w.detach() for w in weights], 1e-4)

    return step


class Living(TorchDispatchMode):
    """`with Living(part) as living:` - living.peak is the most bytes that tensors took at once.

    For the "meta" device, where a tensor has a shape and no numbers: nothing is computed, so the
    largest networks can be asked. Counts the part's weights, and what every operation makes until
    it is dropped. Not counted: what kernels take for themselves, and what an allocator keeps.
    """

    def __init__(self, part):
        super().__init__()
        self.known, self.bytes, self.peak = weakref.WeakSet(), 0, 0
        self.count([*part.parameters(), *part.buffers()])

    def count(self, tensors):
        for x in tensors:
            if torch.is_tensor(x) and x.is_meta and x.untyped_storage() not in self.known:
                self.known.add(x.untyped_storage())              # views share one
                self.add(x.untyped_storage().nbytes())
                weakref.finalize(x.untyped_storage(), self.add, -x.untyped_storage().nbytes())

    def add(self, size):
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.count(tree_iter(out))
        return out


def count(name, kind, config, args, dtype):
    """What a stage takes, counted on the meta device, where nothing is computed.

    -> its parameters; FLOPs that are spent once, FLOPs of a step, steps; bytes that stay, bytes at
    the peak. The peak is an upper bound: matrices of attention are counted, which fast kernels
    never keep; in training all is float32. What --recompute does twice counts once as FLOPs.
    """
    with torch.device("meta"):
        part = kind(config)
    size = sum(w.numel() for w in part.parameters())
    if args.recompute:
        recompute(part)
    part = part.train() if args.train else part.eval().to(dtype)
    with torch.set_grad_enabled(args.train), Living(part) as living:
        weights = living.bytes
        with FlopCounterMode(display=False) as once:
            if args.train:
                loss, steps = training_loss(name, part, args.batch, "meta"), 1
            else:
                step, steps = sampling_work(name, part, PRESETS[args.preset].sampling, args.batch,
                                            "meta", dtype)
        with FlopCounterMode(display=False) as each:
            loss().backward() if args.train else step()
    flops = each.get_total_flops()
    if args.recompute:
        plain = argparse.Namespace(**vars(args) | {"recompute": False})
        flops = count(name, kind, config, plain, dtype)[2]
    if not args.train:
        return size, once.get_total_flops(), flops, steps, weights, living.peak
    # Stay: weight, gradient, Adam's two averages, ours. The peak has weights and gradients in it.
    return size, 0, flops, steps, 20 * size, 12 * size + living.peak


def seconds_of(step, device, limit, most):
    """Time of one call, the median of up to `most` calls within `limit` seconds (one at least)."""
    times, start = [], time.perf_counter()
    while not times or (len(times) < most and time.perf_counter() - start < limit):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matmul_ceiling(device, dtype):
    """FLOP/s of one large matrix product: what the hardware gives when nothing is in its way."""
    for n in (8192,) if torch.device(device).type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        a @ b
        seconds = seconds_of(lambda: a @ b, device, limit=1, most=10)
        if seconds > 0.1:                  # many a CPU takes a minute for the largest one in bf16
            break
    return 2 * n ** 3 / seconds


MEMORY = Path("/proc/meminfo")


def free_memory(device):
    """Bytes that can still be had."""
    gc.collect()                                         # compiled parts are tied up in themselves
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if not MEMORY.exists():                              # not Linux: nobody says
        return math.inf
    lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])              # "16384256 kB"


def reset_peak_memory(device):
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():         # Linux
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes at the highest since the last reset: on CUDA of tensors, on the CPU of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return math.nan
    import resource
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def benchmark_stage(name, kind, config, args, device, dtype):
    """One row of the table, a dict; a note instead of times if it would not fit."""
    size, once, flops, steps, held, needs = count(name, kind, config, args, dtype)
    total = once + flops * steps
    row = {"stage": name, "parameters": size, "steps": steps, "FLOPs": total, "needs": needs,
           "note": ""}
    if torch.device(device).type == "meta":
        return row
    free = free_memory(device)
    least = needs if torch.device(device).type == "cpu" else 1.1 * held  # a full CPU kills programs
    if least > free:
        return row | {"note": f"does not fit: it may take {least / 1e9:.1f} GB, {free / 1e9:.1f} "
                              "GB are free"}
    if needs > free:
        print(f"{name} may not fit: at most {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
              flush=True)
    with torch.set_grad_enabled(args.train):
        try:
            reset_peak_memory(device)
            part = channels_last(fresh(kind, config, device,
                                       torch.float32 if args.train else dtype)).train(args.train)
            if args.recompute:
                recompute(part)
            if args.compile:
                compile_blocks(part)

            def begin():
                if args.train:
                    loss = training_loss(name, part, args.batch, device)
                    return training_step(part, loss, device, dtype)
                return sampling_work(name, part, PRESETS[args.preset].sampling, args.batch, device,
                                     dtype)[0]

            step = begin()
            step()                                       # warms up, and compiles
            before = 0.0 if args.train else seconds_of(begin, device, limit=0, most=1)
            seconds = seconds_of(step, device, args.limit_seconds, max(3, steps))
        except torch.OutOfMemoryError:
            return row | {"note": "did not fit: out of memory"}
    seconds = before + seconds * steps
    return row | {"seconds": seconds, "FLOP/s": total / seconds, "peak": peak_memory(device)}


def machine(device):
    """What is measured on: the name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in about.read_text().splitlines()
             if line.startswith("model name")] if about.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def run_benchmark(args):
    """A table of all stages. --device meta counts only, anywhere, without GPU or memory."""
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    ceiling, rows = None if device.type == "meta" else matmul_ceiling(device, dtype), []
    today, where = datetime.date.today().isoformat(), machine(device)
    print(f"{args.preset}, batch {args.batch}, {device}, {args.dtype}, "
          f"{'training steps' if args.train else 'sampling'}; {where}, torch {torch.__version__}, "
          f"{today}" + (f"; a large matrix product runs at {ceiling / 1e12:.3g} TFLOP/s"
                        if ceiling else "; counted, not run"))
    line = "{:<16} {:>9} {:>6} {:>10} {:>9} {:>9} {:>9} {:>8} {:>8}"
    print(line.format("stage", "M params", "steps", "GFLOP", "needs GB", "seconds", "TFLOP/s",
                      "share", "peak GB"))
    for name, kind in PARTS.items():
        config = getattr(PRESETS[args.preset], name)
        if config is None or name not in args.only:
            continue
        row = benchmark_stage(name, kind, config, args, device, dtype)
        rows.append(row)
        measured = ([f"{row['seconds']:.3g}", f"{row['FLOP/s'] / 1e12:.3g}",
                     f"{row['FLOP/s'] / ceiling:.0%}", f"{row['peak'] / 1e9:.2f}"]
                    if "seconds" in row else [""] * 4)
        print(line.format(name, f"{row['parameters'] / 1e6:.1f}", row["steps"],
                          f"{row['FLOPs'] / 1e9:.0f}", f"{row['needs'] / 1e9:.2f}", *measured)
              + row["note"], flush=True)
    used = [row for row in rows if row["stage"] != "ar_prior"]
    whole = not args.train and set(args.only) >= {*PARTS} - {"ar_prior"}
    flops = sum(row["FLOPs"] for row in used) if whole else None
    ran = whole and all("seconds" in row for row in used)
    total = sum(row["seconds"] for row in used) if ran else None
    if whole:
        print(f"one batch of {args.batch} with the diffusion prior: {flops / 1e12:.4g} TFLOP")
    if ran:
        print(f"in {total:.3g} s, {60 * args.batch / total:.3g} pictures a minute")
    if args.json:
        Path(args.json).write_text(json.dumps({
            "preset": args.preset, "batch": args.batch, "device": str(device), "dtype": args.dtype,
            "machine": where, "date": today, "recompute": args.recompute,
            "torch": torch.__version__, "train": args.train, "compile": args.compile,
            "ceiling FLOP/s": ceiling, "stages": rows, "total FLOPs": flops, "total seconds": total,
            "pictures a minute": total and 60 * args.batch / total}, indent=1) + "\n")


def memory_needed(preset, dtype, batch=1):
    """What sampling takes, in bytes: {part: (weights, weights and the rest at the peak)}."""
    args = argparse.Namespace(preset=preset, batch=batch, train=False, recompute=False)
    return {name: count(name, kind, getattr(PRESETS[preset], name), args, dtype)[4:]
            for name, kind in PARTS.items()                      # one prior is enough
            if getattr(PRESETS[preset], name) is not None and name != "ar_prior"}


def memory_table(preset, batch=1):
    """memory_needed as Markdown, in GB, a column for each dtype."""
    columns = [memory_needed(preset, dtype, batch) for dtype in DTYPES.values()]
    rows = {f"{name}: weights, at its peak": [f"{needed[name][0] / 1e9:.2f}, "
                                              f"{needed[name][1] / 1e9:.2f}" for needed in columns]
            for name in columns[0]}
    rows["**all parts on the device**"] = [
        f"**{(sum(w for w, _ in n.values()) + max(p - w for w, p in n.values())) / 1e9:.1f}**"
        for n in columns]
    rows["**one at a time, `--low-memory`**"] = [f"**{max(p for _, p in n.values()) / 1e9:.1f}**"
                                                 for n in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [
        [f"GB, {preset}, batch {batch}", *DTYPES], ["---"] * (1 + len(DTYPES)),
        *([name, *cells] for name, cells in rows.items())])


# ---------------------------------------------------------------- command line

HERE = Path(__file__).resolve().parent


def pick_device(name):
    """"cpu", "cuda", "cuda:1", "mps" -> torch.device.   ValueError if the machine has none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({str(error).splitlines()[0]}); "
                         "use --device cpu") from None
    return device


def run_sample(args):
    start = time.perf_counter()
    model = open_weights(args)
    unknown = model.unknown_words(args.captions)
    if unknown:
        print(f"These weights have never met: {', '.join(unknown)}. They know: "
              f"{', '.join(sorted(model.words))}.", file=sys.stderr)
    captions = [text for text in args.captions for _ in range(args.n)]
    generator = torch.Generator().manual_seed(args.seed)
    pictures = model.sample(captions, prior=args.prior, guidance=args.guidance,
                            prior_guidance=args.prior_guidance, prior_steps=args.prior_steps,
                            decoder_steps=args.decoder_steps, candidates=args.candidates,
                            upsampler_steps=args.upsampler_steps, rerank=args.rerank,
                            generator=generator)
    show(pictures, args, start, columns=args.n)


def run_variations(args):
    start, model = time.perf_counter(), open_weights(args)
    image = open_picture(args.image)
    pictures = model.variations(image, args.n, args.eta, **from_picture(args))
    show(beside([image], pictures), args, start)


def run_interpolate(args):
    start, model = time.perf_counter(), open_weights(args)
    a, b = open_picture(args.a), open_picture(args.b)
    pictures = model.interpolate(a, b, args.n, noise=args.noise, **from_picture(args))
    show(beside([a], pictures, [b]), args, start)


def run_edit(args):
    start, model = time.perf_counter(), open_weights(args)
    image = open_picture(args.image)
    pictures = model.text_diff(image, args.source, args.target, args.n, args.strength,
                               **from_picture(args))
    show(beside([image], pictures), args, start)


def open_weights(args):
    """What every command that draws begins with."""
    out = Path(args.out)
    kind = Image.registered_extensions().get(out.suffix.lower())
    if not out.parent.is_dir() or kind not in Image.SAVE:
        raise ValueError(f"{out} cannot be written: expected a folder that exists and a name that "
                         "ends in .png or .jpg")                 # said before minutes of drawing
    model = load(args.weights, pick_device(args.device), DTYPES[args.dtype], args.clip,
                 args.low_memory)
    model.expect_upsampler_steps(args.upsampler_steps or ())
    return model


def from_picture(args):
    """What the commands that begin with a picture share."""
    return {"guidance": 1.0 if args.guidance is None else args.guidance,
            "steps": args.decoder_steps or 250,
            "upsampler_steps": args.upsampler_steps, "progress": True,
            "generator": torch.Generator().manual_seed(args.seed)}


def beside(before, pictures, after=()):
    """Pictures of any size before and after (B, 3, H, H), all in one batch of that size."""
    def fit(images):
        return [F.interpolate(x[None], pictures.shape[2:], mode="bicubic",
                              antialias=True).clamp(-1, 1).to(pictures.device) for x in images]
    return torch.cat([*fit(before), pictures, *fit(after)])


def show(pictures, args, start, columns=None):
    """Write the pictures in rows of `columns` (all in one) and say so."""
    save_grid(pictures, args.out, columns or len(pictures))
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} of {tuple(pictures.shape[2:])} "
          f"pixels in {time.perf_counter() - start:.1f} s: {args.out}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def stop_on_error(run, *args):
    """Run a command; what the user can mend ends it with one sentence and exit status 2."""
    try:
        run(*args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: {clip.first_line(error)} Try --low-memory, --dtype bf16, fewer pictures.",
              file=sys.stderr)
        sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of each option that has one."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def positive(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def finite(text):
    """argparse type: a number, neither infinite nor nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description="unCLIP: from a caption to a picture.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", default=str(HERE / "weights/toy.pt"), metavar="PATH",
                        help="a checkpoint of train_toy.py, or a Karlo folder")
    common.add_argument("--clip", metavar="PATH", help="for a Karlo folder without image encoder: "
                        "OpenAI's ViT-L-14.pt, or a CLIP folder")
    common.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    common.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the networks")
    common.add_argument("--low-memory", action="store_true",
                        help="parts come to the device one at a time")
    common.add_argument("--seed", type=int, default=0, help="equal seeds, equal pictures")
    common.add_argument("--guidance", type=finite,
                        help="of the decoder; 1 is none (default: the weights'; "
                        "from pictures: 1)")
    common.add_argument("--decoder-steps", type=positive, metavar="N",
                        help="(default: the weights'; from pictures: 250)")
    common.add_argument("--upsampler-steps", type=positive, metavar="N", nargs="+",
                        help="one number for each upsampler (default: the weights')")

    sub = commands.add_parser("sample", parents=[common], help="captions to pictures",
                              formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("captions", nargs="+", metavar="CAPTION")
    sub.add_argument("-n", type=positive, default=1, help="pictures of each caption")
    sub.add_argument("--prior", choices=("diffusion", "ar"), default="diffusion")
    sub.add_argument("--prior-guidance", type=finite, help="(default: the weights')")
    sub.add_argument("--prior-steps", type=positive, metavar="N", help="(default: the weights')")
    sub.add_argument("--candidates", type=positive, metavar="N",
                     help="embeddings drawn for each picture (default: the weights')")
    sub.add_argument("--rerank", type=positive, metavar="N", help="draw N small pictures for each "
                     "one, enlarge the one CLIP likes best (default: the weights')")
    sub.add_argument("-o", "--out", default="out.png", help="where to write the picture")
    sub.set_defaults(run=run_sample)

    sub = commands.add_parser("variations", parents=[common], help="pictures like a picture",
                              formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("image", metavar="PICTURE", help="any picture file; its middle square is used")
    sub.add_argument("-n", type=positive, default=8, help="how many")
    sub.add_argument("--eta", type=finite, default=0.2, help="noise on the way: 0 draws the "
                     "picture itself, 1 little but what CLIP sees")
    sub.add_argument("-o", "--out", default="variations.png", help="where to write the picture")
    sub.set_defaults(run=run_variations)

    sub = commands.add_parser("interpolate", parents=[common], help="from one picture to another",
                              formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("a", metavar="FROM")
    sub.add_argument("b", metavar="TO")
    sub.add_argument("-n", type=positive, default=8, help="pictures on the way")
    sub.add_argument("--noise", choices=("slerp", "fixed"), default="slerp",
                     help="slerp: the ends are the two pictures; fixed: one noise for all")
    sub.add_argument("-o", "--out", default="interpolation.png", help="where to write the picture")
    sub.set_defaults(run=run_interpolate)

    sub = commands.add_parser("edit", parents=[common], help="change a picture by words",
                              formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("image", metavar="PICTURE")
    sub.add_argument("--source", required=True, metavar="CAPTION", help="what the picture shows")
    sub.add_argument("--target", required=True, metavar="CAPTION", help="what it shall show")
    sub.add_argument("-n", type=positive, default=8, help="pictures on the way there")
    sub.add_argument("--strength", type=finite, default=0.4, metavar="SHARE",
                     help="how far to turn the embedding towards the change, at most; 1 is all the "
                     "way")
    sub.add_argument("-o", "--out", default="edit.png", help="where to write the picture")
    sub.set_defaults(run=run_edit)

    sub = commands.add_parser("benchmark", help="how fast is each stage, and does it fit?",
                              formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("--preset", choices=PRESETS, default="toy")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, mps; meta: count, do not run")
    sub.add_argument("--dtype", default="fp32", choices=DTYPES,
                     help="of the weights; in training, of autocast")
    sub.add_argument("--batch", type=positive, default=1, metavar="N")
    sub.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART",
                     help="of these parts")
    sub.add_argument("--train", action="store_true", help="steps of training instead of sampling")
    sub.add_argument("--compile", action="store_true", help="with torch.compile")
    sub.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    sub.add_argument("--limit-seconds", type=finite, default=20.0, metavar="S",
                     help="for each stage: measure a few steps and scale")
    sub.add_argument("--json", metavar="PATH", help="write the table there too")
    sub.set_defaults(run=run_benchmark)

    sub = commands.add_parser("memory", help="what does each part take to sample? Counts, runs "
                              "nothing", formatter_class=HelpFormatter, allow_abbrev=False)
    sub.add_argument("--preset", choices=PRESETS, default="karlo")
    sub.add_argument("--batch", type=positive, default=1, metavar="N")
    sub.set_defaults(run=lambda args: print(memory_table(args.preset, args.batch)))

    args = parser.parse_args(argv)
    stop_on_error(args.run, args)


if __name__ == "__main__":
    main()
