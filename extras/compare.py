"""The layout of our networks against others, on a CPU: ratios of runs that take turns.

    python extras/benchmark.py compare [--runs 7] [--diffusers] [--json pictures/speed.json]

The U-Net against the same weights in GLIDE's layout, written plainly (contiguous tensors, channels
first, attention as a matrix and a softmax), and against diffusers' U-Net if that is installed; a
training step with each switch; a sampling step without what it saves; the AR prior without its KV
cache; our step of Muon against torch's. All outputs are checked to agree.
"""
import copy
import functools
import importlib.util
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import clip
import decoder
import diffusion
import prior
import train_toy
import unclip
from extras import benchmark, karlo

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
    ours = benchmark.fill_zeros(decoder.UNet(config))
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
            times[name].append(benchmark.seconds_of(work, "cpu", limit=0, most=1))
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
            rows.append({"what": what, "passes": passes, "FLOPs": benchmark.flops(calls["ours"]),
                         "seconds": medians(calls | {"product": lambda: matrix @ matrix}, runs)})
    return rows


def training_ways(name):
    """A training step of a toy part: as it is, and with one switch each."""
    ways = {}
    for switch in ("ours", "weights contiguous", "explicit softmax", "AdamW not fused", "compile",
                   "recompute", "bf16"):
        torch.manual_seed(0)
        part = unclip.build_part(unclip.PARTS[name], getattr(unclip.PRESETS["toy"], name)).train()
        benchmark.switched(part, torch.bfloat16 if switch == "bf16" else torch.float32,
                           recompute=switch == "recompute", compile=switch == "compile")
        if switch == "weights contiguous":
            part.to(memory_format=torch.contiguous_format)
        kernels = [SDPBackend.MATH] if switch == "explicit softmax" else list(CPU_KERNELS)
        step = benchmark.trainer(part, fused=switch != "AdamW not fused")
        loss = benchmark.training_loss(name, part, 16)
        ways[switch] = functools.partial(with_kernels, kernels, step, loss)
    return ways


CPU_KERNELS = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION


def with_kernels(kernels, work, *args):
    """work(*args), where attention may use these kernels only."""
    with sdpa_kernel(kernels):
        return work(*args)


def sampling_ways(name, B):
    """Ways to do a guided sampling step of the toy's decoder or diffusion prior."""
    torch.manual_seed(0)
    part = unclip.build_part(unclip.PARTS[name], getattr(unclip.PRESETS["toy"], name))
    text, D = benchmark.random_text(part, B), part.config.embed_dim
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
    text = benchmark.random_text(part, B)

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

    found = benchmark.about("cpu") | {"runs": args.runs, "rows": rows}
    print(f"{found['machine']}, torch {found['torch']}, {found['date']}", compare_table(rows),
          sep="\n\n")
    benchmark.write_json(args.json, found)


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
    return benchmark.markdown(lines)
