"""How fast, how large, how much memory: random weights, real shapes, real step counts.

    python extras/benchmark.py run --preset paper --device cuda --dtype bf16 [--train]
    python extras/benchmark.py run --preset paper --device meta     counted, without a GPU
    python extras/benchmark.py memory --preset paper                GB of every part in each dtype
    python extras/benchmark.py sizes                                the paper's table of parameters
    python extras/benchmark.py compare [--diffusers]                other ways, other libraries
    python extras/benchmark.py machine --device cuda                its speed, and the CPU's images
    python extras/benchmark.py acceptance --device cuda --out gpu   a GPU's ten minutes: everything

A "share" is FLOP/s as a fraction of what one large matrix product reaches on the same machine.
"""
import argparse
import datetime
import gc
import importlib.util
import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import unclip                                        # first: it sets how torch's threads wait

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import clip
import decoder
import diffusion
import prior
import train_toy
from extras import karlo

# ---------------------------------------------------------------- a setting, and its work


@dataclass(frozen=True)
class Setting:
    """A part of a stack and what it does: a step of sampling, or of training."""
    part: str                                        # of unclip.PARTS
    preset: str = "toy"                              # or "paper", "karlo"
    batch: int = 1
    dtype: torch.dtype = torch.float32               # of products; trained weights are float32
    train: bool = False
    switches: tuple = ()                             # of SWITCHES

    def build(self, device):
        torch.manual_seed(0)
        kind = (karlo.CLASSES if self.preset == "karlo" else unclip.PARTS)[self.part]
        config = getattr(config_of(self.preset), self.part)
        dtype = torch.float32 if self.train else self.dtype
        return unclip.build_part(kind, config, device, dtype).train(self.train)


def config_of(preset):
    return unclip.PRESETS.get(preset, karlo.PRESET)


def parts_of(preset):
    return [name for name in unclip.PARTS if getattr(config_of(preset), name) is not None]


@contextmanager
def float32_as_tf32(on):
    """On a GPU: products of float32 matrices and convolutions in TF32 (10 bits), or exactly."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# name: what is around each step, a function of the device; None: see `work`
SWITCHES = {
    "compile": None, "recompute": None, "contiguous-weights": None, "AdamW-not-fused": None,
    "tf32": lambda device: float32_as_tf32(True),
    "autocast": lambda device: torch.autocast(device.type, torch.bfloat16),
    "cudnn-benchmark": lambda device: torch.backends.cudnn.flags(True, True, allow_tf32=False),
    "explicit-softmax": lambda device: sdpa_kernel(SDPBackend.MATH),
    "flash-attention": lambda device: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "efficient-attention": lambda device: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn-attention": lambda device: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)}


def work(setting, device):
    """-> begin() -> (do one step, how many steps an image takes)"""
    name, B, switches, part = setting.part, setting.batch, setting.switches, setting.build(device)
    switched(part, setting.dtype if setting.train else torch.float32,
             recompute="recompute" in switches, compile="compile" in switches)
    if "contiguous-weights" in switches:
        part.to(memory_format=torch.contiguous_format)
    if setting.train:
        update = trainer(part, fused="AdamW-not-fused" not in switches)
        loss = training_loss(name, part, B)

    def begin():
        step, steps = (lambda: update(loss)), 1
        if not setting.train:
            step, steps = sampling_step(name, part, config_of(setting.preset).sampling, B)
        for around in filter(None, map(SWITCHES.get, switches)):
            step = around(torch.device(device))(step)
        return step, steps

    return begin


def switched(part, dtype=torch.float32, **switches):
    """The part with train_toy's switches: bf16 products of float32 weights, recompute, compile."""
    dtype = "bf16" if dtype == torch.bfloat16 else "fp32"
    train_toy.switch_speed(part, train_toy.Settings(dtype=dtype, **switches))
    return part


def fill_zeros(part):
    """Layers that start at zero get small random weights: else half a network would not matter."""
    for w in part.parameters():
        if not w.any():
            torch.nn.init.normal_(w, std=0.02)
    return part


def random_text(part, B):
    """A clip.Text of B full captions, with CLIP's hidden states for parts that read those."""
    c, w = part.config, next(part.parameters())
    tokens = torch.randint(max(2, c.vocab_size), (B, c.context), device=w.device)
    return clip.Text(tokens, torch.ones_like(tokens, dtype=torch.bool),
                     torch.randn(B, c.embed_dim, device=w.device, dtype=w.dtype),
                     torch.randn(B, c.context, getattr(c, "text_width", 0),
                                 device=w.device, dtype=w.dtype))


class Started(Exception):
    """Raised where a sampling loop would begin; its args are (network, x, timesteps)."""


def sampling_step(name, part, s, B):
    """-> (do one step of sampling, how many steps it takes), for one part of a stack.

    The part's own `sample` runs up to its loop. Of s.rerank small images one is upsampled; what
    CLIP takes to choose it, and Decoder.refine, are not counted. Each step counts as guided, also
    where s.guidance_above leaves some unguided (4 of the toy's 12).
    """
    def stop(network, alphabar, x, timesteps, **options):
        raise Started(network, x, timesteps)

    c, device = part.config, next(part.parameters()).device
    small = B * s.rerank
    if name == "clip":
        tokens = torch.randint(c.vocab_size, (small, c.context), device=device)
        return lambda: part.encode_text(tokens), 1
    if name == "ar_prior":
        text = random_text(part, small)
        if device.type != "meta":
            return lambda: part.sample(text, guidance=s.prior_guidance), 1
        codes = torch.zeros(small, c.components, dtype=torch.long, device=device)
        return lambda: part(codes, codes[:, 0], text), 1         # the same FLOPs, all at once

    if name.startswith("upsampler"):
        side = c.unet.size // 4
        low = torch.rand(B, 3, side, side, device=device) * 2 - 1
        given = low, s.upsampler_steps[int(name[-1]) - 1]
    elif name == "decoder":
        z_i = clip.unit(torch.randn(small, c.embed_dim, device=device))
        given = z_i, random_text(part, small), s.decoder_steps, s.guidance
    else:
        given = random_text(part, small), s.prior_steps, s.prior_guidance, s.candidates
    with mock.patch.object(diffusion, "sample", stop):
        try:
            part.sample(*given)
        except Started as started:
            network, x, timesteps = started.args
    t = timesteps[len(timesteps) // 2]
    return lambda: network(x, t), len(timesteps)


def training_loss(name, part, B):
    """-> a function: the mean loss of one random batch of B."""
    c, device = part.config, next(part.parameters()).device

    def images(side):
        return torch.rand(B, 3, side, side, device=device) * 2 - 1

    if name == "clip":
        tokens = torch.randint(c.vocab_size, (B, c.context), device=device)
        batch = images(c.image_size), tokens
        return lambda: clip.clip_loss(*part(*batch), part.scale())
    if name.startswith("upsampler"):                     # crops of a quarter of the side
        high = images(c.unet.size // 4)
        batch = high, decoder.shrink(high, c.unet.size // 16)
    else:
        z_i = clip.unit(torch.randn(B, c.embed_dim, device=device))
        batch = z_i, random_text(part, B)
        batch = (images(c.unet.size), *batch) if name == "decoder" else batch
    return lambda: part.loss(*batch).mean()


def trainer(part, fused=True):
    """-> step(loss), as train_toy trains the paper's parts: gradients, clipping, AdamW, EMA."""
    weights = list(part.parameters())
    opt = torch.optim.AdamW(weights, 1e-4, fused=fused)
    averages = [w.detach().clone() for w in weights]

    def step(loss):
        opt.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        torch._foreach_lerp_(averages, [w.detach() for w in weights], 1e-4)

    return step


# ---------------------------------------------------------------- counting, without computing


class Living(TorchDispatchMode):
    """`with Living(part) as living:` - living.peak is the most bytes that tensors took at once.

    On the "meta" device, where nothing is computed: the part's weights, and what every operation
    makes until it is dropped. Not counted: what kernels take, and what an allocator keeps.
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


def flops(step, fast=torch.cuda.is_available()):
    """FLOPs of the matrix products, convolutions and attention of one call.

    fast: by fast kernels of attention; the CPU's would not be counted.
    """
    with nullcontext() if fast else sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def count(setting):
    """What a setting takes, counted on the meta device: FLOPs, GB that stay, GB at the peak.

    The peak is an upper bound: it has matrices of attention that fast kernels never keep, and in
    training all is float32. FLOPs that recompute spends twice count once.
    """
    name, B, part = setting.part, setting.batch, setting.build("meta")
    if hasattr(part, "cov"):
        part.cov = torch.zeros(part.cov.shape)                   # sampling reads its numbers
    size, steps = sum(w.numel() for w in part.parameters()), 1
    if setting.train:
        total = flops(lambda: training_loss(name, part, B)().backward())
        part.zero_grad()
        switched(part, recompute="recompute" in setting.switches)
        with Living(part) as living:
            training_loss(name, part, B)().backward()
        # stay: weight, gradient, Adam's two moments, EMA; the peak has weights and gradients in it
        held, needs = 20 * size, 12 * size + living.peak
    else:
        with torch.no_grad(), Living(part) as living:
            held, made = living.bytes, []
            total = flops(lambda: made.extend(
                sampling_step(name, part, config_of(setting.preset).sampling, B)))
            step, steps = made
            total += flops(step) + (steps - 1) * flops(step)     # the first one may fill a cache
        needs = living.peak
    return {"M params": size / 1e6, "steps": steps, "GFLOP": total / 1e9, "held GB": held / 1e9,
            "needs GB": needs / 1e9}


# ---------------------------------------------------------------- measuring


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


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


def timed(step, device):
    """-> what one call returns, and its seconds"""
    made = []
    seconds = seconds_of(lambda: made.append(step()), device, limit=0, most=1)
    return made[0], seconds


def matmul_ceiling(device, dtype, tf32=False):
    """FLOP/s of one large matrix product of random numbers: what the hardware gives."""
    for n in (8192,) if torch.device(device).type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        with float32_as_tf32(tf32):
            a @ b
            seconds = seconds_of(lambda: a @ b, device, limit=1, most=10)
        if seconds > 0.1:                  # many a CPU takes a minute for the largest one in bf16
            break
    return 2 * n ** 3 / seconds


def free_memory(device):
    """GB that can still be had, on the GPU or on the machine."""
    gc.collect()                                         # compiled parts are tied up in themselves
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] / 1e9
    if not (about := Path("/proc/meminfo")).exists():    # not Linux
        return math.inf
    lines = dict(line.split(":") for line in about.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9        # "16384256 kB"


def reset_peak_memory(device):
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():         # Linux
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """GB at the highest since the last reset: on CUDA of tensors, on the CPU of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if platform.system() == "Windows":
        return None
    import resource
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def about(device):
    """Machine, torch and date: what every number needs beside it."""
    if torch.device(device).type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        known = Path("/proc/cpuinfo")
        names = [line.split(":")[1].strip() for line in known.read_text().splitlines()
                 if line.startswith("model name")] if known.exists() else []
        name = f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def markdown(rows):
    """Dicts -> a Markdown table, with a column for all that any of them has."""
    columns = list(dict.fromkeys(c for row in rows for c, x in row.items() if x not in (None, "")))
    cells = [columns, *([cell(row.get(c)) for c in columns] for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/")


# ---------------------------------------------------------------- run, memory, sizes


def measure(setting, device, limit, ceiling):
    """One row of the table, a dict; a note instead of times if it would not fit."""
    row = count(setting)
    if device.type == "meta":
        return row
    free = free_memory(device)
    least = row["needs GB"] if device.type == "cpu" else 1.1 * row["held GB"]
    if least > free:                                     # a full CPU kills programs
        return row | {"note": f"does not fit: it may take {least:.1f} GB, {free:.1f} GB are free"}

    reset_peak_memory(device)
    with torch.set_grad_enabled(setting.train):
        begin = work(setting, device)
        begin()[0]()                                     # warms up, and compiles
        (step, steps), before = timed(begin, device)
        seconds = before + steps * seconds_of(step, device, limit, max(3, steps))
    return row | {"seconds": seconds, "images/s": setting.batch / seconds,
                  "share": row["GFLOP"] * 1e9 / seconds / ceiling, "peak GB": peak_memory(device)}


def stack(preset, device, dtype):
    """All parts of a preset, with random weights."""
    parts = {name: Setting(name, preset, dtype=dtype).build(device) for name in parts_of(preset)}
    return unclip.UnCLIP(config_of(preset), dict.fromkeys(unclip.PARTS) | parts)


@torch.no_grad()
def whole(preset, B, device, dtype):
    """Images of a caption, by a stack with random weights, from end to end: one row."""
    model = stack(preset, device, dtype)
    model.tokenizer = unclip.load(ROOT / "weights/toy.pt").tokenizer
    for part in filter(None, model.parts.values()):
        fill_zeros(part)
    reset_peak_memory(device)
    x, seconds = timed(lambda: model.sample(CAPTIONS[:1] * B, progress=False), device)
    return {"seconds": seconds, "images/s": B / seconds, "peak GB": peak_memory(device),
            "size": x.shape[3], "finite": bool(x.isfinite().all())}


def add(found, path, row, numbers):
    """One more row: its numbers, or why there are none; on disk at once, as the next may crash."""
    try:
        row |= numbers()
    except RuntimeError as error:                        # torch.OutOfMemoryError is one
        row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    found["rows"].append(row)
    if path:
        unclip.write_json(path, found)
    return row


def run(args):
    """A table of all parts. --device meta only counts, anywhere, without GPU or memory."""
    if args.train and args.dtype == "fp16":
        raise ValueError("--train takes --dtype fp32 or bf16, as train_toy.py does, got fp16")
    dtype, names = unclip.DTYPES[args.dtype], [n for n in parts_of(args.preset) if n in args.only]
    device = torch.device("meta") if args.device == "meta" else unclip.pick_device(args.device)
    ceiling = None if device.type == "meta" else matmul_ceiling(device, dtype)
    found = {"preset": args.preset, "dtype": args.dtype, "train": args.train, "device": str(device),
             **about(device), "ceiling FLOP/s": ceiling}
    print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))

    found["rows"], full = [], set()                      # full: what did not fit, or work
    always = tuple(name for name in ("compile", "recompute") if getattr(args, name))
    ways = [always, *((*always, name) for name in args.switch)]
    for B, switches, name in itertools.product(sorted(args.batch), ways, names):
        if (name, switches) not in full:
            setting = Setting(name, args.preset, B, dtype, args.train, switches)
            row = add(found, args.json,
                      {"part": name, "batch": B, "switches": ", ".join(switches)},
                      lambda: measure(setting, device, args.limit_seconds, ceiling))
            full |= {(name, switches)} if "note" in row else set()

    # one image takes all parts, and one of the two priors
    for B in args.batch:
        used = [row for row in found["rows"] if row["batch"] == B and row["part"] != "ar_prior"
                and row.get("switches") == ", ".join(always)]
        if len(used) == len({*parts_of(args.preset)} - {"ar_prior"}) and not args.train:
            add(found, args.json, {"part": "all, with the diffusion prior", "batch": B}, lambda: {
                key: sum(row[key] for row in used) for key in ("GFLOP", "seconds")
                if all(key in row for row in used)})
        if args.whole:
            add(found, args.json, {"part": "whole images, measured", "batch": B},
                lambda: whole(args.preset, B, device, dtype))
    print(markdown(found["rows"]))


def memory(args):
    """What sampling takes in GB, as Markdown, a column for each dtype."""
    names = [name for name in parts_of(args.preset) if name != "ar_prior"]
    for B in args.batch:
        table = {}
        for kind, dtype in unclip.DTYPES.items():
            rows = [count(Setting(name, args.preset, B, dtype)) for name in names]
            held, needs = ([row[key] for row in rows] for key in ("held GB", "needs GB"))
            together = sum(held) + max(b - a for a, b in zip(held, needs))

            cells = {f"{name}: weights, at its peak": f"{a:.2f}, {b:.2f}"
                     for name, a, b in zip(names, held, needs)}
            cells["**all parts on the device**"] = f"**{together:.1f}**"
            cells["**one at a time, `--low-memory`**"] = f"**{max(needs):.1f}**"
            for row, text in cells.items():
                table.setdefault(row, {f"GB, {args.preset}, batch {B}": row})[kind] = text
        print(markdown(list(table.values())))


# part: its name, the size that the paper's table 3 states, and why ours is another
STATED = {
    "clip": ("CLIP", "not stated", "ViT-H/16 and a text encoder of 1024 x 24"),
    "diffusion_prior": ("diffusion prior", "1 B",
                        "one stack of 2048 x 24 is 1.21 B; tokens and positions are extra"),
    "ar_prior": ("AR prior", "1 B",
                 "its latent decoder is 0.97 B; its text encoder, 1.24 B, is stated separately"),
    "decoder": ("decoder", "3.5 B", ""),
    "upsampler1": ("upsampler 1", "700 M",
                   "the time scales and shifts (AdaGN); 692 M if it were only added"),
    "upsampler2": ("upsampler 2", "300 M",
                   "no attention at all; 311 M with it at 8, 16 and 32 px"),
}


def sizes(args):
    """The paper's sizes and ours, counted: parameters, work and memory of one image or step."""
    rows = []
    for part, (name, stated, why) in STATED.items():
        a, b = (count(Setting(part, "paper", 1, torch.bfloat16, train)) for train in (False, True))
        size = a["M params"]
        rows.append({
            "part": name, "stated": stated,
            "built": f"{size / 1e3:.2f} B" if size >= 1e3 else f"{size:.0f} M", "why": why,
            "TFLOP an image": a["GFLOP"] / 1e3, "GB, bf16": f"{a['needs GB']:.1f}",
            "TFLOP a training step": b["GFLOP"] / 1e3, "GB, training": f"{b['needs GB']:.1f}"})
    print(markdown(rows))


# ---------------------------------------------------------------- compare: runs that take turns


def training_ways(name):
    """A training step of a toy part: as it is, and with one switch each."""
    ways = {"ours": {}, "bf16": {"dtype": torch.bfloat16}}
    ways |= {switch: {"switches": (switch,)} for switch in (
        "contiguous-weights", "explicit-softmax", "AdamW-not-fused", "compile", "recompute")}
    return {way: work(Setting(name, batch=16, train=True, **how), "cpu")()[0]
            for way, how in ways.items()}


@torch.no_grad()
def sampling_ways(name, B):
    """Ways to do a guided sampling step of the toy's decoder or diffusion prior."""
    part = Setting(name).build("cpu")
    text, D = random_text(part, B), part.config.embed_dim
    given = (clip.unit(torch.randn(B, D)),) if name == "decoder" else ()
    x = torch.randn(B, 3, 16, 16) if given else torch.randn(B, D)
    both, one = part.denoiser(*given, text, 2.0), part.denoiser(*given, text)
    none = part.denoiser(*(part.null_image.expand_as(z) for z in given), text.null())
    ways = {"ours": lambda: both(x, 500),
            "what all steps share done at each": lambda: part.denoiser(*given, text, 2.0)(x, 500),
            "guidance as two batches": lambda: diffusion.guide(none(x, 500), one(x, 500), 2.0)}
    return {way: torch.no_grad()(step) for way, step in ways.items()}


def ar_ways(B):
    """320 positions as in the paper, but narrow, with the KV cache and without."""
    part = prior.ARPrior(prior.ARPriorConfig(components=319, buckets=1024, text_width=256,
                                             width=256, layers=2, heads=4, embed_dim=320)).eval()
    text = random_text(part, B)

    def without_cache():
        with mock.patch.object(clip, "KVCache", lambda size: None):
            forward = part.forward
            with mock.patch.object(part, "forward", lambda c, d, text, cache: forward(c, d, text)):
                part.sample(text)
    return {"ours": lambda: part.sample(text), "without the cache": without_cache}


def muon_ways():
    """A step of Muon on the toy's decoder; torch's takes matrices only."""
    part = Setting("decoder").build("cpu")
    ours, theirs = train_toy.make_optimizers(part, train_toy.TOY["decoder"])[1], []
    for w in ours.param_groups[0]["params"]:
        w.grad = torch.randn_like(w)
        theirs.append(torch.nn.Parameter(w.detach().flatten(1).clone()))
        theirs[-1].grad = w.grad.flatten(1)
    theirs = torch.optim.Muon(theirs, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return {"ours": ours.step, "torch.optim.Muon": theirs.step}


def unet_ways(config, B, backward=False):
    """Our U-Net and diffusers' (Karlo's), equal weights and inputs. config.groups must be 32."""
    from diffusers import UNet2DConditionModel
    attends = [config.size // 2 ** i in config.attention for i in range(len(config.mults))]
    torch.manual_seed(0)
    ours, theirs = decoder.UNet(config), UNet2DConditionModel(
        sample_size=config.size, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[m * config.channels for m in config.mults],
        layers_per_block=config.depth, attention_head_dim=config.head_channels,
        cross_attention_dim=config.context_width, resnet_time_scale_shift="scale_shift",
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D"
                          for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D"
                        for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn").train()
    ours.load_state_dict(karlo.rename(
        ours, karlo.UNET, karlo.Content(theirs.state_dict(), "diffusers' U-Net")))
    ours = ours.to(memory_format=torch.channels_last)

    x, t = torch.randn(B, config.in_channels, config.size, config.size), torch.arange(1, B + 1) * 99
    context = torch.randn(B, 24, config.context_width)
    ways = {"ours": lambda: ours(x, t, None, context),
            "diffusers": lambda: theirs(x, t - 1, context).sample}
    with torch.no_grad():
        assert torch.allclose(*(forward() for forward in ways.values()), atol=1e-4), "must agree"
    if not backward:
        return {name: torch.no_grad()(forward) for name, forward in ways.items()}
    return {name: lambda forward=forward: forward().square().mean().backward()
            for name, forward in ways.items()}


SMALL = decoder.UNetConfig(size=32, channels=64, mults=(1, 2, 3, 4), depth=2, attention=(16, 8, 4),
                           context_width=256)
QUARTER = replace(unclip.PRESETS["paper"].decoder.unet, channels=128, context_width=512,
                  dropout=0.0)
COMPARISONS = {                                      # what: -> {name: what to time}, ours first
    "toy decoder, batch 16: a training step": lambda: training_ways("decoder"),
    "toy diffusion prior, batch 16: a training step": lambda: training_ways("diffusion_prior"),
    "toy decoder, guided, batch 4: a sampling step": lambda: sampling_ways("decoder", 4),
    "toy diffusion prior, guided, batch 8: a sampling step": lambda: sampling_ways(
        "diffusion_prior", 8),
    "AR prior, 320 positions, batch 1: sampling": lambda: ar_ways(1),
    "AR prior, 320 positions, batch 4: sampling": lambda: ar_ways(4),
    "Muon on the toy's decoder: a step": muon_ways}
WITH_DIFFUSERS = {
    "U-Net of 64 channels, 32 px, batch 2: forward": lambda: unet_ways(SMALL, 2),
    "U-Net of 64 channels, 32 px, batch 2: both ways": lambda: unet_ways(SMALL, 2, backward=True),
    "the paper's decoder, a quarter as wide, batch 2: forward": lambda: unet_ways(QUARTER, 2),
    "the paper's decoder, a quarter as wide, batch 2: both ways": lambda: unet_ways(
        QUARTER, 2, backward=True)}


def compare(args):
    """Other layouts, switches and libraries: medians of runs that take turns, on the CPU."""
    if args.diffusers and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--diffusers compares with diffusers, which is not installed and not one "
                         "of our five packages; do `pip install diffusers`, or leave it out")
    ceiling, found = matmul_ceiling("cpu", torch.float32), about("cpu") | {"rows": []}

    for what, make in (COMPARISONS | (WITH_DIFFUSERS if args.diffusers else {})).items():
        ways = make()
        turns = [{name: seconds_of(step, "cpu", limit=0.2, most=10) for name, step in ways.items()}
                 for _ in range(args.runs + 1)][1:]          # the first turn warms up
        median = {name: sorted(turn[name] for turn in turns)[args.runs // 2] for name in ways}
        ours, share = median.pop("ours"), flops(ways["ours"], fast=False) / ceiling
        for name, seconds in median.items():
            add(found, args.json, {"what": what, "ours": ours, "against": name, "seconds": seconds},
                lambda: {"times as fast": seconds / ours, "share": share / ours})
    print(f"{found['machine']}, torch {found['torch']}, {found['date']}", markdown(found["rows"]),
          sep="\n\n")


# ---------------------------------------------------------------- a GPU's ten minutes

CAPTIONS = ["a small red circle above a large blue square", "a large orange square"]


def machine(args):
    """What a device multiplies, copies, and draws with the toy's weights, beside the CPU."""
    device, found = unclip.pick_device(args.device), about(args.device) | {"rows": []}
    n = 2 ** 24 if device.type == "cpu" else 2 ** 30
    kinds = {"bf16": (torch.bfloat16, False), "tf32": (torch.float32, True),
             "fp32": (torch.float32, False)}
    for kind, how in kinds.items():
        add(found, args.json, {"what": f"matrix product, {kind}"},
            lambda: {"TFLOP/s": matmul_ceiling(device, *how) / 1e12})

    def copy():
        x, y = torch.ones(n, device=device), torch.empty(n, device=device)
        return {"GB/s": 8 * n / seconds_of(lambda: y.copy_(x), device, limit=1, most=20) / 1e9}

    def images(device, dtype, tf32, prior):
        model = unclip.load(ROOT / "weights/toy.pt", device, dtype)
        with float32_as_tf32(tf32):
            for _ in range(2):                           # the first one warms up
                x, seconds = timed(lambda: model.sample(
                    CAPTIONS, prior=prior, generator=torch.Generator().manual_seed(0),
                    progress=False), device)
        return x.cpu().float(), seconds

    def compared(prior, how):
        x, seconds = images(device, *how, prior)
        apart = (x - on_cpu[0]).abs()
        right = [train_toy.agrees(train_toy.parse(caption), train_toy.read(image))
                 for caption, image in zip(CAPTIONS, x)]
        return {"seconds": seconds, "seconds on the CPU": on_cpu[1], "captions right": sum(right),
                "largest difference": apart.max().item(), "mean difference": apart.mean().item()}

    add(found, args.json, {"what": "copying, read and written"}, copy)
    for prior in ("diffusion", "ar"):
        on_cpu = images("cpu", torch.float32, False, prior)
        for kind, how in kinds.items():
            add(found, args.json, {"what": f"toy, {prior} prior, {kind}"},
                lambda: compared(prior, how))
    print(markdown(found["rows"]))


RUN = ("extras/benchmark.py run --json FOLDER/rows.json --preset {preset} --device {device} "
       "--dtype {dtype} --limit-seconds 2 ")
# name: (words behind `python`, seconds it needs at least and at most), the most informative first
STAGES = {
    "machine": ("extras/benchmark.py machine --json FOLDER/rows.json --device {device}", 3, 90),
    "tests": ("-m pytest -v -rfEs --tb=short --color=no -p no:cacheprovider "
              "tests/extras/test_cuda.py", 60, 120),
    "sampling": (RUN + "--batch 1 {batch} --whole", 10, 150),
    "training decoder": (RUN + "--train --only decoder --batch 1 8 16 32 64 128 --switch recompute",
                         10, 90),
    "training": (RUN + "--train --only clip diffusion_prior ar_prior upsampler1 upsampler2 "
                 "--batch 1 16 64 256", 10, 90),
    "karlo": (RUN + "--preset karlo --batch 1 {batch} --whole", 10, 60),
    "switches": (RUN + "--only decoder --batch {batch} --switch contiguous-weights flash-attention "
                 "efficient-attention cudnn-attention explicit-softmax cudnn-benchmark", 10, 60),
    "switches of float32": (RUN + "--only decoder --batch {batch} --dtype fp32 --switch autocast "
                            "tf32", 10, 60),
    "compile decoder": (RUN + "--only decoder --batch 1 {batch} --switch compile", 30, 110),
    "toy training": (RUN + "--train --preset toy --batch 64", 10, 60),
    "toy training on the CPU": (RUN + "--train --preset toy --batch 64 --device cpu --dtype fp32",
                                10, 60),
    "train_toy.py": ("train_toy.py --device {device} --out FOLDER --steps-scale 0.02", 20, 80),
    "compile the others": (RUN + "--only upsampler2 diffusion_prior --batch 1 {batch} --switch "
                           "compile", 30, 150)}


def acceptance(args):
    """All that only a GPU can show, each stage in a process of its own, which may hang or crash.

    OUT/acceptance.json has at once what each stage found, OUT/acceptance.md the tables.
    """
    device, end, found = unclip.pick_device(args.device), time.time() + args.seconds, {}
    file, page = (Path(args.out) / f"acceptance.{kind}" for kind in ("json", "md"))
    if file.exists():
        raise ValueError(f"{file} is there already; choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    words = {"preset": args.preset, "device": device, "batch": " ".join(map(str, args.batch)),
             "dtype": "bf16" if device.type == "cuda" else "fp32"}

    for name in args.only:
        command, least, most = STAGES[name]
        left = end - time.time()
        found[name] = {"status": f"skipped: {max(0.0, left):.0f} s left, it needs {least}"}
        if left >= least:
            found[name] = stage(command.format(**words).split(), min(most, left))
        print(f"{name}: {found[name]['status']}", flush=True)
        unclip.write_json(file, found)

    text = [", ".join(about(device).values()) + ". A share is of a large matrix product of that "
            "dtype. Seconds are those of one step times the number of steps; only whole images "
            "are drawn from end to end."]
    for name, it in found.items():
        last = "".join(it.get("output", [])[-1:])
        text += [f"### {name}", it["status"], markdown(it["rows"]) if "rows" in it else last]
    unclip.write_atomically(page, lambda f: f.write(("\n\n".join(text) + "\n").encode()))


def stage(words, limit):
    """Python runs these words for so many seconds -> status, the end of the output, the rows."""
    start = time.time()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = [word.replace("FOLDER", folder) for word in words]
        file, log = Path(folder) / "rows.json", Path(folder) / "log"
        with open(log, "wb") as output:
            try:
                status = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=limit,
                                        stdout=output, stderr=subprocess.STDOUT).returncode
            except subprocess.TimeoutExpired:
                status = None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        found = json.loads(file.read_text()) if file.exists() else {}

    status = {0: "done", None: "time limit"}.get(status, f"exit status {status}")
    return {"status": f"{status}, {time.time() - start:.0f} s", "command": " ".join(words),
            "output": lines[-200:], **found}


# ---------------------------------------------------------------- command line

OPTIONS = {
    "--preset": {"choices": ("toy", "paper", "karlo"), "default": "toy", "help": "which sizes"},
    "--device": {"default": "cpu", "help": "cpu, cuda, mps; of `run` also meta: only count"},
    "--dtype": {"choices": unclip.DTYPES, "default": "fp32", "help": "of the products"},
    "--batch": {"type": unclip.positive, "nargs": "+", "default": [1], "help": "images at once"},
    "--train": {"action": "store_true", "help": "a training step instead of sampling"},
    "--compile": {"action": "store_true", "help": "torch.compile the networks"},
    "--recompute": {"action": "store_true", "help": "activation checkpointing"},
    "--switch": {"nargs": "+", "choices": SWITCHES, "default": [], "metavar": "SWITCH",
                 "help": f"measure again with each of {', '.join(SWITCHES)}"},
    "--whole": {"action": "store_true", "help": "also draw whole images, from end to end"},
    "--limit-seconds": {"type": unclip.number(0.0, 1e6), "default": 10.0, "help": "for each part"},
    "--json": {"type": unclip.writable, "metavar": "FILE", "help": "for the numbers"},
    "--runs": {"type": unclip.positive, "default": 7, "help": "of each, taking turns"},
    "--diffusers": {"action": "store_true", "help": "its U-Net too, equal weights"},
    "--out": {"type": unclip.named, "metavar": "FOLDER", "required": True, "help": "for all of it"},
    "--seconds": {"type": unclip.number(0.0, 1e6), "default": 500.0, "help": "for everything"}}
COMMANDS = {                                 # function, choices of --only, options, defaults
    "run": (run, unclip.PARTS, "--preset --device --dtype --batch --train --compile --recompute "
            "--switch --whole --limit-seconds --json", {}),
    "memory": (memory, (), "--preset --batch", {}),
    "sizes": (sizes, (), "", {}),
    "compare": (compare, (), "--runs --diffusers --json", {}),
    "machine": (machine, (), "--device --json", {}),
    "acceptance": (acceptance, STAGES, "--preset --device --batch --out --seconds",
                   {"preset": "paper", "device": "cuda", "batch": [8]})}


def command_line(doc, options, commands, argv):
    """{option: argparse's} and {command: (function, choices of --only, options, defaults)}"""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (work, names, own, defaults) in commands.items():
        words = work.__doc__.split("\n")[0]
        sub = subparsers.add_parser(name, help=words, description=words, allow_abbrev=False,
                                    formatter_class=unclip.HelpFormatter)
        for option in own.split():
            sub.add_argument(option, **options[option])
        if names:
            sub.add_argument("--only", nargs="+", choices=names, default=list(names),
                             metavar="NAME", help=", ".join(names))
        sub.set_defaults(work=work, **defaults)
    args = parser.parse_args(argv)
    return unclip.stop_on_error(args.work, args)


def main(argv=None):
    return command_line(__doc__, OPTIONS, COMMANDS, argv)


if __name__ == "__main__":
    main()
