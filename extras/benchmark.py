"""How fast, how large, how much memory: random weights, real shapes, real step counts.

    python extras/benchmark.py run --preset paper --device cuda --dtype bf16 [--train]
    python extras/benchmark.py run --preset paper --device meta     counted, without a GPU
    python extras/benchmark.py memory --preset paper                GB of every part, fp32 and bf16
    python extras/benchmark.py sizes                                the paper's table of parameters
    python extras/benchmark.py compare [--diffusers]                other layouts, other libraries
    python extras/benchmark.py acceptance --device cuda --out gpu   a GPU's ten minutes: everything

A "share" is FLOP/s as a fraction of what one large matrix product reaches on the same machine.
"""
import argparse
import copy
import datetime
import functools
import gc
import importlib.util
import math
import platform
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import unclip                                        # first: it sets how torch's threads wait

import torch
import torch.nn.functional as F
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

# ---------------------------------------------------------------- what is measured


def fill_zeros(part):
    """Layers that start at zero get small random weights: else half a network would not matter."""
    for w in part.parameters():
        if not w.any():
            torch.nn.init.normal_(w, std=0.02)
    return part


def random_text(part, B):
    """A clip.Text of B full captions, as this part reads them."""
    c, w = part.config, next(part.parameters())
    own = isinstance(getattr(part, "text", None), clip.CaptionStates)
    hidden = part.text.proj if own else getattr(part, "hidden_in", None)       # of CLIP's states
    tokens = torch.randint(max(2, c.vocab_size), (B, c.context), device=w.device)
    return clip.Text(tokens, torch.ones_like(tokens, dtype=torch.bool),
                     torch.randn(B, c.embed_dim, device=w.device, dtype=w.dtype),
                     torch.randn(B, c.context, hidden.in_features if hidden else 0,
                                 device=w.device, dtype=w.dtype))


class Started(Exception):
    """Raised where a sampling loop would begin; its args are (network, x, timesteps)."""


def sampling_step(name, part, s, B):
    """-> (do one step of sampling, how many steps it takes), for one part of a stack.

    The part's own `sample` runs up to its loop. Of s.rerank small images one is upsampled; what
    CLIP takes to choose it is not counted.
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
        if device.type == "meta":
            return parallel(part, small), 1
        return lambda: part.sample(text, guidance=s.prior_guidance), 1

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


def parallel(part, B):
    """The AR prior's work for B images, done at once: its FLOPs without its 319 small steps."""
    codes = torch.zeros(B, part.config.components, dtype=torch.long, device=part.pos.device)
    text = random_text(part, B)
    return lambda: part(codes, codes[:, 0], text)


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


def trainer(part, ema=True, fused=True):
    """-> step(loss): what a step of the paper's training does: gradients, clipping, AdamW, EMA."""
    weights = list(part.parameters())
    opt = torch.optim.AdamW(weights, 1e-4, fused=fused)
    averages = [w.detach().clone() for w in weights] if ema else []

    def step(loss):
        opt.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        if ema:
            torch._foreach_lerp_(averages, [w.detach() for w in weights], 1e-4)

    return step


def switched(part, dtype=torch.float32, **switches):
    """The part with train_toy's switches: bf16 products of float32 weights, recompute, compile."""
    dtype = "bf16" if dtype == torch.bfloat16 else "fp32"
    train_toy.switch_speed(part, train_toy.Settings(dtype=dtype, **switches))
    return part


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


def flops(work):
    """FLOPs of the matrix products, convolutions and attention of one call."""
    fast = torch.cuda.is_available()                     # the CPU's fast kernel is not counted
    with nullcontext() if fast else sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            work()
    return counter.get_total_flops()


def count(name, kind, config, sampling, B, dtype, train=False, recompute=False):
    """What a stage takes, counted on the meta device: FLOPs, bytes that stay, bytes at the peak.

    The peak is an upper bound: it has matrices of attention that fast kernels never keep, and in
    training all is float32. FLOPs that recompute spends twice count once.
    """
    part = unclip.build_part(kind, config, "meta", torch.float32 if train else dtype).train(train)
    if hasattr(part, "cov"):
        part.cov = torch.zeros(part.cov.shape)                   # sampling reads its numbers
    size = sum(w.numel() for w in part.parameters())
    row = {"stage": name, "parameters": size}
    if train:
        row |= {"steps": 1, "FLOPs": flops(lambda: training_loss(name, part, B)().backward())}
        part.zero_grad()
        switched(part, recompute=recompute)
        with Living(part) as living:
            training_loss(name, part, B)().backward()
        # stay: weight, gradient, Adam's two moments, EMA; the peak has weights and gradients in it
        return row | {"held": 20 * size, "needs": 12 * size + living.peak}

    with torch.no_grad(), Living(part) as living:
        held, made = living.bytes, []
        once = flops(lambda: made.extend(sampling_step(name, part, sampling, B)))
        step, steps = made
        first, later = flops(step), flops(step)                  # the first one may fill a cache
    return row | {"steps": steps, "FLOPs": once + first + later * (steps - 1), "held": held,
                  "needs": living.peak}


# ---------------------------------------------------------------- measuring


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


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


MEMORY = Path("/proc/meminfo")


def free_memory(device):
    """Bytes that can still be had, on the GPU or on the machine."""
    gc.collect()                                         # compiled parts are tied up in themselves
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if not MEMORY.exists():                              # not Linux
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


def machine(device):
    """The name of the GPU, or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in about.read_text().splitlines()
             if line.startswith("model name")] if about.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- tables


def markdown(rows):
    """Dicts -> a Markdown table, with a column for all that any of them has, but for lists."""
    columns = list(dict.fromkeys(c for row in rows for c, value in row.items()
                                 if value is not None and not isinstance(value, list)))
    cells = [columns, *([cell(row.get(c)) for c in columns] for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def cell(value):
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")


def about(device):
    return {"machine": machine(device), "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}


# ---------------------------------------------------------------- run, memory, sizes


def stages(preset):
    """-> the Config of a preset, Karlo's among them, and (name, class, config) of its parts."""
    config, kinds = unclip.PRESETS.get(preset, karlo.PRESET), unclip.PARTS
    kinds = kinds | karlo.CLASSES if preset == "karlo" else kinds
    return config, [(name, kind, getattr(config, name)) for name, kind in kinds.items()
                    if getattr(config, name) is not None]


def run_stage(name, kind, config, s, args, device, dtype):
    """One row of the table, a dict; a note instead of times if it would not fit."""
    row = count(name, kind, config, s, args.batch, dtype, args.train, args.recompute)
    if device.type == "meta":
        return row
    free = free_memory(device)
    least = row["needs"] if device.type == "cpu" else 1.1 * row["held"]  # a full CPU kills programs
    if least > free:
        return row | {"note": f"does not fit: it may take {least / 1e9:.1f} GB, {free / 1e9:.1f} "
                              "GB are free"}

    reset_peak_memory(device)
    with torch.set_grad_enabled(args.train):
        try:
            part = unclip.build_part(kind, config, device, torch.float32 if args.train else dtype)
            switched(part, dtype if args.train else torch.float32, recompute=args.recompute,
                     compile=args.compile)
            before, most = 0.0, max(3, row["steps"])
            if args.train:
                update, loss = trainer(part.train()), training_loss(name, part, args.batch)
                step = lambda: update(loss)
            else:
                begin = lambda: sampling_step(name, part, s, args.batch)[0]
                step, before = begin(), seconds_of(begin, device, limit=0, most=1)
            step()                                       # warms up, and compiles
            seconds = seconds_of(step, device, args.limit_seconds, most)
        except torch.OutOfMemoryError:
            return row | {"note": "did not fit: out of memory"}
    seconds = before + seconds * row["steps"]
    return row | {"seconds": seconds, "FLOP/s": row["FLOPs"] / seconds, "peak": peak_memory(device)}


def run(args):
    """A table of all parts. --device meta only counts, anywhere, without GPU or memory."""
    dtype, (config, parts) = unclip.DTYPES[args.dtype], stages(args.preset)
    device = torch.device("meta") if args.device == "meta" else unclip.pick_device(args.device)
    ceiling = None if device.type == "meta" else matmul_ceiling(device, dtype)
    options = {name: getattr(args, name) for name in ("preset", "batch", "dtype", "train",
                                                      "recompute", "compile")}
    found = options | about(device) | {"device": str(device), "ceiling FLOP/s": ceiling}
    print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    rows = [run_stage(name, kind, c, config.sampling, args, device, dtype)
            for name, kind, c in parts if name in args.only]

    # one image takes all parts, and one of the two priors
    used = [row for row in rows if row["stage"] != "ar_prior"]
    whole = not args.train and set(args.only) >= {*unclip.PARTS} - {"ar_prior"}
    flops = sum(row["FLOPs"] for row in used) if whole else None
    seconds = sum(row.get("seconds", math.nan) for row in used) if whole and ceiling else math.nan
    seconds = None if math.isnan(seconds) else seconds
    print(markdown([{
        "stage": row["stage"], "M params": row["parameters"] / 1e6, "steps": row["steps"],
        "GFLOP": row["FLOPs"] / 1e9, "needs GB": row["needs"] / 1e9,
        "seconds": row.get("seconds"), "share": row.get("FLOP/s") and row["FLOP/s"] / ceiling,
        "peak GB": row.get("peak") and row["peak"] / 1e9, "note": row.get("note")}
        for row in rows]))
    if whole:
        print(f"one batch of {args.batch} with the diffusion prior: {flops / 1e12:.4g} TFLOP"
              + (f" in {seconds:.3g} s" if seconds else ""))
    if args.json:
        unclip.write_json(args.json, found | {"stages": rows, "total FLOPs": flops,
                                              "total seconds": seconds})


def memory_table(preset, batch=1):
    """What sampling takes in GB, as Markdown, a column for each dtype."""
    (config, parts), table, title = stages(preset), {}, f"GB, {preset}, batch {batch}"
    for name, dtype in unclip.DTYPES.items():
        rows = [count(*part, config.sampling, batch, dtype) for part in parts
                if part[0] != "ar_prior"]
        cells = {f"{row['stage']}: weights, at its peak":
                 f"{row['held'] / 1e9:.2f}, {row['needs'] / 1e9:.2f}" for row in rows}
        together = sum(row["held"] for row in rows) + max(row["needs"] - row["held"]
                                                          for row in rows)
        cells["**all parts on the device**"] = f"**{together / 1e9:.1f}**"
        cells["**one at a time, `--low-memory`**"] = \
            f"**{max(row['needs'] for row in rows) / 1e9:.1f}**"
        for row, text in cells.items():
            table.setdefault(row, {title: row})[name] = text
    return markdown(list(table.values()))


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


def sizes_table():
    """The paper's sizes and ours, counted: parameters, work and memory of one image or step."""
    rows, (config, parts) = [], stages("paper")
    for part in parts:
        name, stated, why = STATED[part[0]]
        a, b = (count(*part, config.sampling, 1, torch.bfloat16, train) for train in (False, True))
        size = a["parameters"] / 1e6
        rows.append({
            "part": name, "stated": stated,
            "built": f"{size / 1e3:.2f} B" if size >= 1e3 else f"{size:.0f} M", "why": why,
            "TFLOP an image": a["FLOPs"] / 1e12, "GB, bf16": f"{a['needs'] / 1e9:.1f}",
            "TFLOP a training step": b["FLOPs"] / 1e12, "GB, training": f"{b['needs'] / 1e9:.1f}"})
    return markdown(rows)


# ---------------------------------------------------------------- compare: runs that take turns

SIDE = 2048                                              # of the matrices whose product is timed


def plain_attention(layer, x, context):
    """`decoder.Attention` as GLIDE has it: channels first, a matrix of weights and a softmax."""
    B, C, H, W = x.shape
    h = layer.norm(x).flatten(2)                                               # (B, C, H W)
    q, k, v = (torch.einsum("oc,bcl->bol", w, h) + b[:, None] for w, b in zip(
        layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)))                   # (B, C, H W) each
    if context is not None:
        more = [torch.einsum("oc,blc->bol", w, context) + b[:, None] for w, b in zip(
            layer.context.weight.chunk(2), layer.context.bias.chunk(2))]       # (B, C, K) each
        k, v = torch.cat([more[0], k], dim=2), torch.cat([more[1], v], dim=2)
    q, k, v = (y.reshape(B * layer.heads, C // layer.heads, -1) for y in (q, k, v))
    scale = (C // layer.heads) ** -0.25
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
    h = torch.einsum("bts,bcs->bct", weight, v).reshape(B, C, H * W)
    h = torch.einsum("oc,bcl->bol", layer.proj.weight, h) + layer.proj.bias[:, None]
    return x + h.reshape(B, C, H, W)


def plain_unet(unet, x, t, context):
    """`decoder.UNet.forward` with contiguous tensors and plain attention."""
    def run(level, h, skip):
        for res, attention in zip(level.res, level.attn):
            h = attend(attention, res(skip(h), emb))
            yield h
        if level.resample is not None:
            yield level.resample(h, emb)

    def attend(layer, h):
        return plain_attention(layer, h, context) if isinstance(layer, decoder.Attention) else h

    emb = F.silu(unet.time(clip.sinusoid(t - 1, unet.config.channels)))
    skips = [unet.conv_in(x)]
    for level in unet.down:
        for h in run(level, skips[-1], lambda h: h):
            skips.append(h)
    h = attend(unet.mid_attn, unet.mid_res1(skips[-1], emb))
    h = unet.mid_res2(h, emb)
    for level in unet.up:
        for h in run(level, h, lambda h: torch.cat([h, skips.pop()], dim=1)):
            pass
    return unet.conv_out(F.silu(unet.norm_out(h)))


def unets(config, B, with_diffusers=False):
    """Ways to run one U-Net with the same weights on the same inputs: {name: (module, forward)}."""
    torch.manual_seed(0)
    ours = fill_zeros(decoder.UNet(config))
    x, t = torch.randn(B, config.in_channels, config.size, config.size), torch.arange(1, B + 1) * 99
    context = torch.randn(B, 24, config.context_width) if config.context_width else None
    plain, ways = copy.deepcopy(ours), {}
    if with_diffusers:
        theirs = unet_of_diffusers(config)
        ours.load_state_dict(karlo.rename(
            ours, karlo.UNET, karlo.Content(theirs.state_dict(), "diffusers' U-Net")))
        ways["diffusers"] = theirs, lambda: theirs(x, t - 1, context).sample
    else:
        ways["ADM's layout written plainly"] = plain, lambda: plain_unet(plain, x, t, context)
    ours = ours.to(memory_format=torch.channels_last)
    return {"ours": (ours, lambda: ours(x, t, None, context))} | ways


def unet_of_diffusers(config):
    """diffusers' U-Net of Karlo's decoder, random weights. config.groups must be 32."""
    from diffusers import UNet2DConditionModel
    attends = [config.size // 2 ** i in config.attention for i in range(len(config.mults))]
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=config.size, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[m * config.channels for m in config.mults],
        layers_per_block=config.depth, attention_head_dim=config.head_channels,
        cross_attention_dim=config.context_width, resnet_time_scale_shift="scale_shift",
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D"
                          for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D"
                        for a in reversed(attends)],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn").train()


def medians(ways, runs):
    """{name: a function} -> {name: its median seconds}, taking turns; the first turn warms up."""
    times = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, work in ways.items():
            times[name].append(seconds_of(work, "cpu", limit=0, most=1))
    return {name: sorted(seconds[1:])[len(seconds[1:]) // 2] for name, seconds in times.items()}


def compare_unets(what, ways, runs):
    """-> a row for the forward pass, and one for both passes; their outputs must agree."""
    def there_and_back(network, forward):
        network.zero_grad()
        forward().square().mean().backward()

    with torch.no_grad():
        first, *others = [forward() for _, forward in ways.values()]
    assert all(torch.allclose(first, other, atol=1e-4) for other in others), "they must agree"
    matrix, rows = torch.randn(SIDE, SIDE), []
    for passes in ("forward", "forward and backward"):
        back = passes != "forward"
        calls = {name: functools.partial(there_and_back, *way) if back else way[1]
                 for name, way in ways.items()}
        with torch.set_grad_enabled(back):
            rows.append({"what": what, "passes": passes, "FLOPs": flops(calls["ours"]),
                         "seconds": medians(calls | {"product": lambda: matrix @ matrix}, runs)})
    return rows


def training_ways(name):
    """A training step of a toy part: as it is, and with one switch each."""
    ways = {}
    for switch in ("ours", "weights contiguous", "explicit softmax", "AdamW not fused", "compile",
                   "recompute", "bf16"):
        torch.manual_seed(0)
        part = unclip.build_part(unclip.PARTS[name], getattr(unclip.PRESETS["toy"], name)).train()
        switched(part, torch.bfloat16 if switch == "bf16" else torch.float32,
                           recompute=switch == "recompute", compile=switch == "compile")
        if switch == "weights contiguous":
            part.to(memory_format=torch.contiguous_format)
        kernels = [SDPBackend.MATH]
        if switch != "explicit softmax":
            kernels.append(SDPBackend.FLASH_ATTENTION)
        step = sdpa_kernel(kernels)(trainer(part, fused=switch != "AdamW not fused"))
        ways[switch] = functools.partial(step, training_loss(name, part, 16))
    return ways


def sampling_ways(name, B):
    """Ways to do a guided sampling step of the toy's decoder or diffusion prior."""
    torch.manual_seed(0)
    part = unclip.build_part(unclip.PARTS[name], getattr(unclip.PRESETS["toy"], name))
    text, D = random_text(part, B), part.config.embed_dim
    given = (clip.unit(torch.randn(B, D)),) if name == "decoder" else ()
    x = torch.randn(B, 3, 16, 16) if given else torch.randn(B, D)
    both, one = part.denoiser(*given, text, 2.0), part.denoiser(*given, text)
    none = part.denoiser(*(part.null_image.expand_as(z) for z in given), text.null())
    return {"ours": lambda: both(x, 500),
            "what all steps share done at each": lambda: part.denoiser(*given, text, 2.0)(x, 500),
            "guidance as two batches": lambda: diffusion.guide(none(x, 500), one(x, 500), 2.0)}


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
    part = unclip.build_part(decoder.Decoder, unclip.PRESETS["toy"].decoder)
    ours, theirs = train_toy.make_optimizers(part, train_toy.TOY["decoder"])[1], []
    for w in ours.param_groups[0]["params"]:
        w.grad = torch.randn_like(w)
        theirs.append(torch.nn.Parameter(w.detach().flatten(1).clone()))
        theirs[-1].grad = w.grad.flatten(1)
    theirs = torch.optim.Muon(theirs, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return {"ours": ours.step, "torch.optim.Muon": theirs.step}


def compare(args):
    """Ratios of runs that take turns, on the CPU; a large matrix product takes its turn, too."""
    if args.diffusers and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--diffusers compares with diffusers, which is not installed and not one "
                         "of our five packages; do `pip install diffusers`, or leave it out")
    toy, rows = unclip.PRESETS["toy"], []
    small = decoder.UNetConfig(size=32, channels=64, mults=(1, 2, 3, 4), depth=2,
                               attention=(16, 8, 4), context_width=256)
    quarter = replace(unclip.PRESETS["paper"].decoder.unet, channels=128, context_width=512,
                      dropout=0.0)
    jobs = [("U-Net of the toy's decoder, batch 16", toy.decoder.unet, 16, False),
            ("U-Net of upsampler 1, batch 4", toy.upsampler1.unet, 4, False),
            ("U-Net of 64 channels, 32 px, batch 2", small, 2, False),
            ("the paper's decoder, a quarter as wide, batch 2", quarter, 2, False)]
    jobs += [(f"{what}, diffusers' weights", config, B, True) for what, config, B, _ in jobs[2:]
             if args.diffusers]
    for what, config, B, theirs in jobs:
        rows += compare_unets(what, unets(config, B, theirs), args.runs)
    for name in ("decoder", "diffusion_prior"):
        rows.append({"what": f"toy {name}, batch 16", "passes": "a training step",
                     "seconds": medians(training_ways(name), args.runs)})
    with torch.no_grad():
        for name, B in (("decoder", 4), ("diffusion_prior", 8)):     # a caption: 4 drawn, 2 each
            rows.append({"what": f"toy {name}, guided, batch {B}", "passes": "a sampling step",
                         "seconds": medians(sampling_ways(name, B), 10 * args.runs)})
    for B in (1, 4):
        rows.append({"what": f"AR prior, 320 positions, batch {B}", "passes": "sampling",
                     "seconds": medians(ar_ways(B), args.runs)})
    rows.append({"what": "Muon on the toy's decoder", "passes": "a step",
                 "seconds": medians(muon_ways(), args.runs)})

    found = about("cpu") | {"runs": args.runs, "rows": rows}
    print(f"{found['machine']}, torch {found['torch']}, {found['date']}", compare_table(rows),
          sep="\n\n")
    if args.json:
        unclip.write_json(args.json, found)


def compare_table(rows):
    """The comparisons as Markdown, a line for each against each."""
    best = max(2 * SIDE ** 3 / row["seconds"]["product"] for row in rows
               if "product" in row["seconds"])
    lines = []
    for row in rows:
        ours = row["seconds"]["ours"]
        share = f"{100 * row['FLOPs'] / ours / best:.0f} %" if "FLOPs" in row else ""
        lines += [{"": f"{row['what']}: {row['passes']}", "seconds": f"{ours:.3f}",
                   "against": f"{seconds:.3f}, {name}", "times as fast": f"{seconds / ours:.2f}",
                   "share": share}
                  for name, seconds in row["seconds"].items() if name not in ("ours", "product")]
    return markdown(lines)


# ---------------------------------------------------------------- command line


def dispatch(args):
    from extras import acceptance                        # which imports this module
    commands = {"run": run, "compare": compare, "acceptance": acceptance.acceptance,
                "memory": lambda args: print(memory_table(args.preset, args.batch)),
                "sizes": lambda args: print(sizes_table())}
    commands[args.command](args)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help, presets=(), batch=1):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if presets:
            sub.add_argument("--preset", choices=presets, default=presets[0], help="which sizes")
            sub.add_argument("--batch", type=unclip.positive, default=batch, help="images at once")
        return sub

    one = command("run", "how fast each part is, and whether it fits", ("toy", "paper", "karlo"))
    one.add_argument("--device", default="cpu", help="cpu, cuda, mps; meta counts and runs nothing")
    one.add_argument("--dtype", choices=unclip.DTYPES, default="fp32", help="of the products")
    one.add_argument("--only", nargs="+", choices=unclip.PARTS, default=list(unclip.PARTS),
                     metavar="PART", help=f"of {', '.join(unclip.PARTS)}")
    one.add_argument("--train", action="store_true", help="a training step instead of sampling")
    one.add_argument("--compile", action="store_true", help="torch.compile the networks")
    one.add_argument("--recompute", action="store_true", help="activation checkpointing")
    seconds = unclip.number(0.0, 1e6)
    one.add_argument("--limit-seconds", type=seconds, default=10.0, help="for each part")
    command("memory", "GB that sampling takes, part by part", ("toy", "paper", "karlo"))
    command("sizes", "the paper's table of parameters, and ours")

    other = command("compare", "with other layouts, and with diffusers if it is installed")
    other.add_argument("--runs", type=unclip.positive, default=7, help="of each, taking turns")
    other.add_argument("--diffusers", action="store_true", help="its U-Net too, equal weights")
    for sub in (one, other):
        sub.add_argument("--json", type=unclip.writable, metavar="FILE", help="for the numbers")

    gpu = command("acceptance", "all that only a GPU can show, within --seconds", ("paper", "toy"),
                  batch=8)
    gpu.add_argument("--device", default="cuda", help="cuda; cpu tries the program itself")
    gpu.add_argument("--out", type=unclip.named, required=True, metavar="FOLDER",
                     help="for the JSON and the tables")
    gpu.add_argument("--seconds", type=seconds, default=500.0, help="for everything")
    gpu.add_argument("--only", nargs="+", metavar="STAGE", help="machine, toy, tests, sampling, "
                     "training, karlo, switches, \"compile decoder\", ...; default: all of them")
    gpu.add_argument("--until", type=float, help=argparse.SUPPRESS)      # of the working process
    return unclip.stop_on_error(dispatch, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
