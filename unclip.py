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
import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import clip
import decoder
import prior

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
        clip.CLIPConfig(embed_dim=64, image_size=32, patch=4, image_width=96, image_layers=3,
                        image_heads=3, vocab_size=600, context=20, text_width=128, text_layers=3,
                        text_heads=4, activation="gelu", pixel_mean=(1.0,) * 3,   # white is 0
                        pixel_std=(0.33,) * 3),
        prior.DiffusionPriorConfig(embed_dim=64, context=20, width=128, layers=4, heads=4),
        prior.ARPriorConfig(embed_dim=64, context=20),
        decoder.DecoderConfig(
            decoder.UNetConfig(size=16, channels=32, mults=(1, 1, 4), attention=(8, 4),
                               head_channels=32, context_width=64, groups=8),
            embed_dim=64, context=20, text_width=64, text_layers=2, text_heads=2, late=2.0),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=64, in_channels=6, channels=32,
                                                   mults=(1, 1), groups=8),
                                eta=1.0, late=2.0),
        decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, channels=16,
                                                   mults=(1, 1), groups=4),
                                schedule="linear", corruption="bsr", late=2.0, start=450),
        Sampling(guidance=2.0, decoder_steps=50, upsampler_steps=(10, 4)))


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
    """

    def __init__(self, config, parts, tokenizer=None, words=()):
        self.config, self.parts, self.tokenizer, self.words = config, parts, tokenizer, tuple(words)
        self.nothing = None                                      # see `null`

    @property
    def device(self):
        part = next(part for part in self.parts.values() if part is not None)
        return next(part.parameters()).device

    @property
    def sizes(self):
        """The sides of the pictures after each stage, e.g. (16, 64, 256)."""
        stages = [self.config.decoder, self.config.upsampler1, self.config.upsampler2]
        return tuple(stage.unet.size for stage in stages if stage is not None)

    def unknown_words(self, captions):
        """The captions' words that no training caption had, in order; () if that is unknown."""
        known = set(self.words)
        said = [word for text in captions for word in clip.split_words(clip.clean(text))]
        return tuple(dict.fromkeys(word for word in said if known and word not in known))

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions -> clip.Text of B rows.   ValueError for one that is empty or too long."""
        if self.tokenizer is None:
            raise ValueError("this stack has fresh weights and no tokenizer; load trained weights")
        empty = [text for text in captions if not clip.clean(text)]
        if empty or not captions:
            raise ValueError(f"expected captions with some text, got {empty or captions!r}")
        return self._text(captions)

    def _text(self, captions):
        tokens = self.tokenizer(captions, self.config.clip.context)              # (B, L)
        mask = clip.token_mask(tokens, self.tokenizer.end)                       # (B, L)
        z_t, states = self.parts["clip"].encode_text(tokens.to(self.device))
        return clip.Text(tokens.to(self.device), mask.to(self.device), z_t, states)

    @torch.no_grad()
    def null(self, text):
        """What guidance knows as "no caption", for the B rows of text; None: all padding.

        Networks that read CLIP's states (Karlo's) were trained with the empty caption "" instead.
        """
        if self.config.decoder.vocab_size:
            return None
        if self.nothing is None:                                 # one row, kept
            self.nothing = self._text([""])
        return clip.Text(*(x.to(y.device).expand_as(y) for x, y in zip(self.nothing, text)))

    def embed(self, text, *, which="diffusion", guidance=None, steps=None, candidates=None,
              generator=None, progress=None):
        """The prior: text -> z_i (B, D), by the "diffusion" or the "ar" prior."""
        s = self.config.sampling
        guidance = s.prior_guidance if guidance is None else guidance
        model = self.parts.get(f"{which}_prior")
        if model is None:
            have = [p for p in ("diffusion", "ar") if self.parts.get(f"{p}_prior") is not None]
            raise ValueError(f"expected one of the priors {have}, got {which!r}")
        if which == "ar":
            return model.sample(text, guidance=guidance, generator=generator, progress=progress)
        return model.sample(text, steps or s.prior_steps, guidance, candidates or s.candidates,
                            generator, self.null(text), progress)

    def draw(self, z_i, text, *, guidance=None, decoder_steps=None, upsampler_steps=None,
             generator=None, progress=None):
        """The decoder and the upsamplers: z_i (B, D), text -> (B, 3, H, W) in [-1, 1]."""
        s = self.config.sampling
        guidance = s.guidance if guidance is None else guidance
        x = self.parts["decoder"].sample(z_i, text, decoder_steps or s.decoder_steps, guidance,
                                         generator, self.null(text), progress)
        upsampler_steps = s.upsampler_steps if upsampler_steps is None else upsampler_steps
        for i, steps in enumerate(upsampler_steps, start=1):
            if self.parts.get(f"upsampler{i}") is not None:
                x = self.parts[f"upsampler{i}"].sample(x, steps, generator, progress=progress)
        return x

    def sample(self, captions, *, prior="diffusion", guidance=None, prior_guidance=None,
               prior_steps=None, decoder_steps=None, upsampler_steps=None, candidates=None,
               generator=None, progress=True):
        """Captions -> pictures (B, 3, H, W) in [-1, 1]. What is None is as `config.sampling` says.

        guidance          of the decoder: 1 is the plain model, 3 follows the caption more closely
        candidates        embeddings drawn by the diffusion prior for each picture, the best is kept
        upsampler_steps   one number for each upsampler
        generator         the source of all randomness: equal seeds, equal pictures, on any device
        """
        text = self.encode_text(list(captions))
        bar = (lambda name: name) if progress else (lambda name: None)
        z_i = self.embed(text, which=prior, guidance=prior_guidance, steps=prior_steps,
                         candidates=candidates, generator=generator, progress=bar("prior"))
        return self.draw(z_i, text, guidance=guidance, decoder_steps=decoder_steps,
                         upsampler_steps=upsampler_steps, generator=generator,
                         progress=bar("pictures"))

    @torch.no_grad()
    def rerank(self, pictures, captions, keep):
        """Of N pictures of each caption the `keep` nearest to it, says CLIP.   DALL-E sec. 2.6

        pictures (B N, 3, H, W), N in a row for each of B captions -> (B keep, 3, H, W).
        """
        text = self.encode_text(list(captions))
        z_i = self.encode_image(pictures).unflatten(0, (len(captions), -1))      # (B, N, D)
        score = (clip.unit(z_i) * clip.unit(text.z_t)[:, None]).sum(2)           # (B, N)
        best = score.topk(keep, dim=1).indices                                   # (B, keep)
        rows = best + torch.arange(len(best), device=best.device)[:, None] * z_i.shape[1]
        return pictures[rows.flatten()]

    @torch.no_grad()
    def encode_image(self, pictures):
        """Pictures (B, 3, H, W) in [-1, 1] of any size -> z_i (B, D)."""
        model = self.parts["clip"]
        if model.image is None:
            raise ValueError("these weights have no CLIP image encoder; give one with --clip")
        size = model.config.image_size
        x = F.interpolate(pictures.to(self.device), (size, size), mode="bicubic", antialias=True)
        return model.encode_image(x.clamp(-1, 1))

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
                         "words": list(self.words)}, path)


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
    parts = {}
    with torch.device(device):
        for name, kind in PARTS.items():
            sizes = getattr(config, name)
            parts[name] = None if sizes is None else kind(sizes).eval()
    for part in parts.values():
        if part is not None:
            part.to(dtype)
    return UnCLIP(config, parts)


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


def load(path, device="cpu", dtype=torch.float32, clip_path=None):
    """A checkpoint file of ours, or a Karlo folder -> UnCLIP, ready to sample.

    clip_path: for a Karlo folder without image encoder, a CLIP that has one (see load_karlo).
    """
    if Path(path).is_dir():
        return load_karlo(path, device, dtype, clip_path)
    if clip_path is not None:
        raise ValueError(f"{path} has a CLIP of its own; give another only with a Karlo folder")
    content = read_checkpoint(path)
    model = build_from(config_from(content["config"]), "meta", dtype)
    model.words = tuple(content["words"])
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
        part.to(device)
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
        "decoder": decoder.load_karlo_decoder(folder, device, dtype),
        "upsampler1": decoder.load_karlo_upsampler(folder, device, dtype)}
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


def add_image_encoder(model, path, device, dtype):
    """Give a CLIP without image encoder that of the CLIP at `path`."""
    other = clip.load_clip(path, device, dtype)
    c = other.config
    if other.image is None or c.embed_dim != model.config.embed_dim:
        raise ValueError(f"{path} has no image encoder that fits: expected a CLIP with embeddings "
                         f"of {model.config.embed_dim} numbers")
    model.image, model.logit_scale = other.image, other.logit_scale
    model.config = replace(model.config, image_size=c.image_size, patch=c.patch,
                           image_width=c.image_width, image_layers=c.image_layers,
                           image_heads=c.image_heads)


# ---------------------------------------------------------------- pictures in and out


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
    model = load(args.weights, pick_device(args.device), DTYPES[args.dtype])
    unknown = model.unknown_words(args.captions)
    if unknown:
        print(f"These weights have never met: {', '.join(unknown)}. They know: "
              f"{', '.join(sorted(model.words))}.", file=sys.stderr)
    captions = [text for text in args.captions for _ in range(args.n * args.rerank)]
    generator = torch.Generator().manual_seed(args.seed)
    pictures = model.sample(captions, prior=args.prior, guidance=args.guidance,
                            prior_guidance=args.prior_guidance, prior_steps=args.prior_steps,
                            decoder_steps=args.decoder_steps, candidates=args.candidates,
                            upsampler_steps=args.upsampler_steps, generator=generator)
    if args.rerank > 1:
        pictures = model.rerank(pictures, args.captions, keep=args.n)
    save_grid(pictures, args.out, columns=args.n)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} of {tuple(pictures.shape[2:])} "
          f"pixels in {time.perf_counter() - start:.1f} s: {args.out}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def stop_on_error(run, args):
    """Run a command; what the user can mend ends it with one sentence and exit status 2."""
    try:
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive(text):
    """argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="unCLIP: from a caption to a picture.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", default=str(HERE / "weights/toy.pt"), metavar="PATH",
                        help="a checkpoint of train_toy.py, or a Karlo folder")
    common.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    common.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the networks")
    common.add_argument("--seed", type=int, default=0, help="equal seeds, equal pictures")
    common.add_argument("--guidance", type=float,
                        help="of the decoder; 1 is none (default: the weights')")
    common.add_argument("--decoder-steps", type=positive, metavar="N",
                        help="(default: the weights')")
    common.add_argument("--upsampler-steps", type=positive, metavar="N", nargs="+",
                        help="one number for each upsampler (default: the weights')")
    common.add_argument("-o", "--out", default="out.png", help="where to write the picture")

    sub = commands.add_parser("sample", parents=[common], help="captions to pictures",
                              formatter_class=formatter, allow_abbrev=False)
    sub.add_argument("captions", nargs="+", metavar="CAPTION")
    sub.add_argument("-n", type=positive, default=1, help="pictures of each caption")
    sub.add_argument("--prior", choices=("diffusion", "ar"), default="diffusion")
    sub.add_argument("--prior-guidance", type=float, help="(default: the weights')")
    sub.add_argument("--prior-steps", type=positive, metavar="N", help="(default: the weights')")
    sub.add_argument("--candidates", type=positive, metavar="N",
                     help="embeddings drawn for each picture (default: the weights')")
    sub.add_argument("--rerank", type=positive, default=1, metavar="N",
                     help="draw N times as many pictures and keep those that CLIP likes best")
    sub.set_defaults(run=run_sample)

    args = parser.parse_args(argv)
    stop_on_error(args.run, args)


if __name__ == "__main__":
    main()
