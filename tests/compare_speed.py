"""What the layout of our networks is worth on a CPU: ratios of interleaved runs, in one process.

    python tests/compare_speed.py [--runs 7] [--diffusers] [--json pictures/speed.json]
    python tests/compare_speed.py --karlo [--device cuda --dtype bf16 --compile --batch 8]

The U-Net against the same weights in ADM's and GLIDE's layout, written plainly: contiguous tensors,
q, k, v and the context's keys and values each computed where they are used, attention as a matrix
and a softmax, SiLU of the time embedding in every block. With --diffusers (to be installed beside
our five packages) also against diffusers' U-Net, given the same weights. All are checked to say the
same. Then the switches of unclip.py, on a step of training of the toy's decoder and diffusion
prior; a step of sampling without what it saves; the autoregressive prior with its cache against
without; and our step of Muon against torch's. A large matrix product takes its turn among the runs:
its FLOP/s, at their best of all comparisons, are the ceiling that shares are of.

--karlo: a whole picture at Karlo's full size, ours against diffusers' networks (random weights, the
same shapes and step counts), which takes 12 GB on a CPU in float32.
"""
import argparse
import copy
import datetime
import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip
import decoder
import diffusion
import prior
import train_toy
import unclip


def plain_res(block, x, emb):
    """ADM's ResBlock, x (B, C, H, W) contiguous, emb (B, E) before its SiLU."""
    h = F.silu(block.norm1(x))
    if block.resample == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif block.resample == "up":
        h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    e = block.emb(F.silu(emb))[:, :, None, None]
    if block.scale_shift:
        scale, shift = e.chunk(2, dim=1)
        h = block.norm2(h) * (1 + scale) + shift
    else:
        h = block.norm2(h + e)
    h = F.dropout(F.silu(h), block.dropout, block.training)
    return block.skip(x) + F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)


def plain_attention(layer, x, context):
    """GLIDE's attention over the pixels of x (B, C, H, W) and the context (B, K, X) before them."""
    B, C, H, W = x.shape
    h = layer.norm(x).reshape(B, C, H * W)
    q, k, v = (torch.einsum("oc,bcl->bol", w, h) + b[:, None] for w, b in zip(
        layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)))               # (B, C, H W) each
    if context is not None:
        more = [torch.einsum("oc,blc->bol", w, context) + b[:, None] for w, b in zip(
            layer.context.weight.chunk(2), layer.context.bias.chunk(2))]   # (B, C, K) each
        k, v = torch.cat([more[0], k], dim=2), torch.cat([more[1], v], dim=2)
    q, k, v = (y.reshape(B * layer.heads, C // layer.heads, -1) for y in (q, k, v))
    scale = (C // layer.heads) ** -0.25
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
    h = torch.einsum("bts,bcs->bct", weight, v).reshape(B, C, H * W)
    h = torch.einsum("oc,bcl->bol", layer.proj.weight, h) + layer.proj.bias[:, None]
    return x + h.reshape(B, C, H, W)


def plain_unet(unet, x, index, context):
    """`decoder.UNet.forward` in the plain layout."""
    emb = unet.time(diffusion.sinusoid(index, unet.config.channels))
    h = unet.conv_in(x)
    skips = [h]
    for level in unet.down:
        for i, res in enumerate(level.res):
            h = plain_res(res, h, emb)
            h = plain_attention(level.attn[i], h, context) if level.attn else h
            skips.append(h)
        if level.resample is not None:
            h = plain_res(level.resample, h, emb)
            skips.append(h)
    h = plain_res(unet.mid_res1, h, emb)
    h = plain_attention(unet.mid_attn, h, context) if unet.mid_attn is not None else h
    h = plain_res(unet.mid_res2, h, emb)
    for level in unet.up:
        for i, res in enumerate(level.res):
            h = plain_res(res, torch.cat([h, skips.pop()], dim=1), emb)
            h = plain_attention(level.attn[i], h, context) if level.attn else h
        h = h if level.resample is None else plain_res(level.resample, h, emb)
    return unet.conv_out(F.silu(unet.norm_out(h)))


def settled(config):
    """A U-Net whose zero layers are not zero: else half of it would not matter."""
    torch.manual_seed(0)
    unet = decoder.UNet(config)
    for w in unet.parameters():
        if not w.any():
            torch.nn.init.normal_(w, std=0.02)
    return unet


def medians(ways, runs):
    """{name: a function} -> {name: its median seconds}, the ways taking turns."""
    times = {name: [] for name in ways}
    for run in range(runs + 1):                          # the first one warms up
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if run:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


def inputs(config, B):
    """-> x, index, context (None where the U-Net has none)."""
    g = torch.Generator().manual_seed(1)
    context = (torch.randn(B, 24, config.context_width, generator=g) if config.context_width
               else None)
    return (torch.randn(B, config.in_channels, config.size, config.size, generator=g),
            torch.arange(B) * 100, context)


def networks(config, B):
    """The U-Net in both layouts, on the same inputs -> {name: (the network, its forward pass)}."""
    unet, (x, index, context) = settled(config), inputs(config, B)
    other, unet = unet, unclip.channels_last(copy.deepcopy(unet))
    return {"ours": (unet, lambda: unet(x, index, None, unet.keys_values(context)
                                        if context is not None else ())),
            "ADM's layout written plainly": (other, lambda: plain_unet(other, x, index, context))}


def networks_of_diffusers(config, B):
    """diffusers' U-Net of Karlo's decoder, ours with its weights -> as `networks`.

    config.groups must be 32 and its picture be looked at with a context.
    """
    from diffusers import UNet2DConditionModel
    levels = len(config.mults)
    looks = [config.size // 2 ** i in config.attention for i in range(levels)]
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=config.size, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=[m * config.channels for m in config.mults],
        layers_per_block=config.depth, attention_head_dim=config.head_channels,
        cross_attention_dim=config.context_width, resnet_time_scale_shift="scale_shift",
        down_block_types=["SimpleCrossAttnDownBlock2D" if look else "ResnetDownsampleBlock2D"
                          for look in looks],
        up_block_types=["SimpleCrossAttnUpBlock2D" if look else "ResnetUpsampleBlock2D"
                        for look in reversed(looks)],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn").train()
    ours = decoder.UNet(config)
    ours.load_state_dict(clip.rename(ours, theirs.state_dict(), decoder.DIFFUSERS_UNET,
                                     "diffusers' U-Net"))
    ours, last = unclip.channels_last(ours), unclip.channels_last(copy.deepcopy(theirs))
    x, index, context = inputs(config, B)
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {"ours": (ours, lambda: ours(x, index, None, ours.keys_values(context))),
            "diffusers": (theirs, lambda: theirs(x, index, context).sample),
            "diffusers, channels_last": (last, lambda: last(x_last, index, context).sample)}


SIDE = 2048                                              # of the matrices whose product is timed


def compare(ways, runs):
    """{name: (network, forward pass)} -> a row for the forward pass, one for both passes.

    A row is {"FLOPs": counted, "seconds": {name: median}}, "product" among the names.
    """
    matrix, out = torch.randn(SIDE, SIDE), {name: forward for name, (_, forward) in ways.items()}

    def there_and_back(network, forward):
        network.zero_grad()
        forward().square().mean().backward()

    back = {name: lambda way=way: there_and_back(*way) for name, way in ways.items()}
    rows = []
    for passes, calls in (("forward", out), ("forward and backward", back)):
        with torch.set_grad_enabled(calls is back):
            if calls is out:
                first, *others = [forward() for forward in out.values()]
                assert all(torch.allclose(first, o, atol=1e-4) for o in others), "they must agree"
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                calls["ours"]()                          # the CPU's fast kernel is not counted
            rows.append({"passes": passes, "FLOPs": counter.get_total_flops(), "seconds": medians(
                calls | {"product": lambda: matrix @ matrix}, runs)})
    return rows


SWITCHES = ("as it is", "weights contiguous", "explicit softmax", "AdamW not fused",
            "neither fused nor foreach", "compile", "recompute", "bf16")


def compare_switches(name, runs):
    """-> {switch: median seconds of a step of training}."""
    ways = {}
    for switch in SWITCHES:
        torch.manual_seed(0)
        part = unclip.PARTS[name](getattr(unclip.toy(), name)).train()
        part = part if switch == "weights contiguous" else unclip.channels_last(part)
        if switch == "recompute":
            unclip.recompute(part)
        if switch == "compile":
            unclip.compile_blocks(part)
        dtype = torch.bfloat16 if switch == "bf16" else torch.float32
        loss = unclip.training_loss(name, part, 16, "cpu")
        ways[switch] = (other_step(part, loss, foreach="nor foreach" not in switch)
                        if "fused" in switch else unclip.training_step(part, loss, "cpu", dtype))
    ways["explicit softmax"] = with_softmax(ways["explicit softmax"])
    return medians(ways, runs)


def with_softmax(work):
    """Attention as a matrix and a softmax."""
    def slowly():
        with sdpa_kernel(SDPBackend.MATH):
            work()
    return slowly


def other_step(part, loss, foreach):
    """`unclip.training_step` without the fused AdamW; or with loops over the weights, too."""
    weights = list(part.parameters())
    opt = torch.optim.AdamW(weights, 1e-4, foreach=foreach)
    ema = [w.detach().clone() for w in weights]

    def step():
        opt.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=foreach)
        opt.step()
        if foreach:
            torch._foreach_lerp_(ema, [w.detach() for w in weights], 1e-4)
        else:
            for average, w in zip(ema, weights):
                average.lerp_(w.detach(), 1e-4)

    return step


def steps_of_sampling(name, B):
    """Ways to do a guided step of sampling, of the toy's decoder or diffusion prior."""
    torch.manual_seed(0)
    part = unclip.channels_last(unclip.PARTS[name](getattr(unclip.toy(), name)).eval())
    text = unclip.random_text(part.config, B, "cpu", torch.float32)
    decodes = name == "decoder"
    given = (torch.randn(B, part.config.embed_dim),) if decodes else ()
    x = torch.randn(B, 3, 16, 16) if decodes else torch.randn(B, part.config.embed_dim)
    both = part.denoiser(*given, text, 2.0)
    one = part.denoiser(*given, text)
    other = part.denoiser(*(torch.zeros_like(z) for z in given), text.null())
    return {"ours": lambda: both(x, 500),
            "what all steps share done at each": lambda: part.denoiser(*given, text, 2.0)(x, 500),
            "guidance as two batches": lambda: diffusion.guide(other(x, 500), one(x, 500), 2.0)}


def karlo_of_diffusers(name, B, device, dtype):
    """A guided step of one of Karlo's networks as diffusers' pipeline does it, random weights."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    c, s = getattr(unclip.karlo(), name), unclip.karlo().sampling
    make = dict(device=device, dtype=dtype)
    if name == "diffusion_prior":
        part = PriorTransformer(num_attention_heads=c.heads, attention_head_dim=c.width // c.heads,
                                num_layers=c.layers, embedding_dim=c.embed_dim,
                                num_embeddings=c.context, additional_embeddings=4)
        part = part.eval().to(**make)
        x, z_t = torch.randn(B, c.embed_dim, **make), torch.randn(2 * B, c.embed_dim, **make)
        words = torch.randn(2 * B, c.context, c.text_width, **make)
        mask = torch.ones(2 * B, c.context, dtype=torch.bool, device=device)
        return part, lambda: diffusion.guide(*part(
            torch.cat([x, x]), 500, z_t, words, mask).predicted_image_embedding.chunk(2),
            s.prior_guidance)
    u = c.unet
    sizes = dict(sample_size=u.size, in_channels=u.in_channels, out_channels=u.out_channels,
                 block_out_channels=[m * u.channels for m in u.mults], layers_per_block=u.depth)
    if name == "decoder":
        part = UNet2DConditionModel(
            **sizes, attention_head_dim=u.head_channels, cross_attention_dim=u.context_width,
            resnet_time_scale_shift="scale_shift", class_embed_type="identity",
            down_block_types=["ResnetDownsampleBlock2D"] + 3 * ["SimpleCrossAttnDownBlock2D"],
            up_block_types=3 * ["SimpleCrossAttnUpBlock2D"] + ["ResnetUpsampleBlock2D"],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn")
        part = unclip.channels_last(part.eval().to(**make))
        x = torch.randn(B, 3, u.size, u.size, **make)
        words = torch.randn(2 * B, c.context + 4, u.context_width, **make)
        emb = torch.randn(2 * B, 4 * u.channels, **make)
        return part, lambda: diffusion.guide_eps(*part(
            torch.cat([x, x]), 500, words, class_labels=emb).sample.chunk(2), s.guidance)
    part = UNet2DModel(**sizes, down_block_types=4 * ["ResnetDownsampleBlock2D"],
                       up_block_types=4 * ["ResnetUpsampleBlock2D"], add_attention=False)
    part = unclip.channels_last(part.eval().to(**make))
    x = torch.randn(B, u.in_channels, u.size, u.size, **make)
    return part, lambda: part(x, 500).sample


@torch.no_grad()
def compare_karlo(args):
    """-> {part: {"steps", "seconds" of one: {"ours", "diffusers"}}} of a picture at full size."""
    device, dtype, found = unclip.pick_device(args.device), unclip.DTYPES[args.dtype], {}
    config = unclip.karlo()
    for name in ("diffusion_prior", "decoder", "upsampler1"):
        part = unclip.channels_last(unclip.fresh(unclip.PARTS[name], getattr(config, name), device,
                                                 dtype).eval())
        theirs, their_step = karlo_of_diffusers(name, args.batch, device, dtype)
        a, b = (sum(w.numel() for w in p.parameters()) for p in (part, theirs))
        if args.compile:
            unclip.compile_blocks(part)
            theirs.compile()
        step, steps = unclip.sampling_work(name, part, config.sampling, args.batch, device, dtype)
        ways = {kind: lambda work=work: (work(), unclip.synchronize(device))
                for kind, work in (("ours", step), ("diffusers", their_step))}
        found[name] = {"steps": steps, "parameters": {"ours": a, "diffusers": b},
                       "seconds": medians(ways, args.runs)}
        print(name, found[name], flush=True)
        del part, theirs, step, their_step, ways
        unclip.free_memory(device)
    total = {kind: sum(row["steps"] * row["seconds"][kind] for row in found.values())
             for kind in ("ours", "diffusers")}
    print(f"Karlo at full size, batch {args.batch}, {args.dtype}, {unclip.machine(device)}, torch "
          f"{torch.__version__}, {datetime.date.today()}: {total['ours']:.3g} s, with diffusers' "
          f"networks {total['diffusers']:.3g} s, {total['diffusers'] / total['ours']:.2f} times as "
          "long")
    return {"machine": unclip.machine(device), "torch": torch.__version__, "dtype": args.dtype,
            "batch": args.batch, "compile": args.compile, "runs": args.runs,
            "date": datetime.date.today().isoformat(), "parts": found, "seconds": total}


def ar_config():
    """320 positions after z_t, as in the paper; narrow, so that a CPU can do without the cache."""
    return prior.ARPriorConfig(components=319, buckets=1024, text_width=256, width=256, layers=2,
                               heads=4)


def muons():
    """Two ways to do a step of Muon on the toy's decoder; torch's takes matrix after matrix."""
    part = decoder.Decoder(unclip.toy().decoder)
    ours = train_toy.optimizers(part, train_toy.STAGES["decoder"])[1]
    matrices = []
    for w in ours.param_groups[0]["params"]:
        w.grad = torch.randn_like(w)
        matrices.append(torch.nn.Parameter(w.detach().flatten(1).clone()))
        matrices[-1].grad = w.grad.flatten(1)
    theirs = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return {"ours": ours.step, "torch.optim.Muon": theirs.step}


def measure(runs, with_diffusers):
    """-> all that the README's tables need, and on what it was measured."""
    toy = unclip.toy()
    small = decoder.UNetConfig(size=32, channels=64, mults=(1, 2, 3, 4), depth=2,
                               attention=(16, 8, 4), context_width=256)
    quarter = replace(unclip.paper().decoder.unet, channels=128, context_width=512, dropout=0.0)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {"machine": unclip.machine("cpu"), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "date": datetime.date.today().isoformat(), "runs": runs,
             "other programs": "load average in the minute before: "
                               f"{'unknown' if load is None else f'{load:.1f}'}",
             "rows": [], "steps of training": {}}
    compared = [("U-Net of the toy's decoder, batch 16", networks(toy.decoder.unet, 16)),
                ("U-Net of upsampler 1, batch 4", networks(toy.upsampler1.unet, 4)),
                ("U-Net of 64 channels, 32 px, batch 2", networks(small, 2)),
                ("the paper's decoder, a quarter as wide, batch 2", networks(quarter, 2))]
    if with_diffusers:
        import diffusers
        found["diffusers"] = diffusers.__version__
        compared += [(what + ", diffusers' weights", networks_of_diffusers(config, 2))
                     for (what, _), config in zip(compared[2:], (small, quarter))]
    for what, ways in compared:
        found["rows"] += [{"what": what} | row for row in compare(ways, runs)]
        print(what, *found["rows"][-2:], sep="\n", flush=True)
    for name in ("decoder", "diffusion_prior"):
        found["steps of training"][name] = compare_switches(name, runs)
        print(f"a step of training, toy {name}:", found["steps of training"][name], flush=True)
    for name, B in (("decoder", 4), ("diffusion_prior", 8)):         # a caption: 4 drawn, 2 each
        with torch.no_grad():
            seconds = medians(steps_of_sampling(name, B), 10 * runs)
        found["rows"].append({"what": f"toy {name.replace('_', ' ')}, guided, batch {B}",
                              "passes": "a step of sampling", "FLOPs": None, "seconds": seconds})
        print(found["rows"][-1], flush=True)
    part, threads = prior.ARPrior(ar_config()).eval(), torch.get_num_threads()
    for B, n in ((1, threads), (4, threads), (1, 1)):    # two threads wait for one another often
        torch.set_num_threads(n)
        text = unclip.random_text(part.config, B, "cpu", torch.float32)
        seconds = medians({name: lambda cached=cached: part.sample(
            text, cached=cached, generator=torch.Generator().manual_seed(0))
            for name, cached in (("ours", True), ("without the cache", False))}, runs)
        found["rows"].append({"what": f"AR prior, 320 positions, batch {B}, threads: {n}",
                              "passes": "sampling", "FLOPs": None, "seconds": seconds})
        print(found["rows"][-1], flush=True)
    torch.set_num_threads(threads)
    found["rows"].append({"what": "Muon on the toy's decoder", "passes": "a step",
                          "FLOPs": None, "seconds": medians(muons(), runs)})
    print(found["rows"][-1], flush=True)
    return found


def ceiling(row):
    """FLOP/s of the matrix product that took turns with a row's runs."""
    return 2 * SIDE ** 3 / row["seconds"]["product"]


def share_of(row, found):
    """How much of the best product's FLOP/s our network reaches, in percent."""
    best = max(ceiling(other) for other in found["rows"] if other["FLOPs"])
    return 100 * row["FLOPs"] / row["seconds"]["ours"] / best


def table(found):
    """The comparisons as Markdown, a line for each against each."""
    lines = ["| | seconds | against | times as fast | share of the ceiling |",
             "|---|---|---|---|---|"]
    for row in found["rows"]:
        ours = row["seconds"]["ours"]
        share = f"{share_of(row, found):.0f} %" if row["FLOPs"] else ""
        lines += [f"| {row['what']}: {row['passes']} | {ours:.3f} | {seconds:.3f}, {name} | "
                  f"{seconds / ours:.2f} | {share} |"
                  for name, seconds in row["seconds"].items() if name not in ("ours", "product")]
    return "\n".join(lines)


def switches_table(found):
    """Seconds of a step of training with each switch, as Markdown."""
    lines = [f"| seconds of a step, batch 16 | {' | '.join(SWITCHES)} |",
             "|---" * (1 + len(SWITCHES)) + "|"]
    for name, seconds in found["steps of training"].items():
        lines.append(f"| toy {name.replace('_', ' ')} | "
                     + " | ".join(f"{seconds[switch]:.3f}" for switch in SWITCHES) + " |")
    return "\n".join(lines)


def conditions(found):
    """On what, with what and when it was measured: a sentence."""
    speeds = sorted(ceiling(row) / 1e9 for row in found["rows"] if row["FLOPs"])
    beside = f", diffusers {found['diffusers']}" if "diffusers" in found else ""
    return (f"{found['machine']}, torch {found['torch']}{beside}, {found['date']}; a large matrix "
            f"product ran at {speeds[0]:.0f} to {speeds[-1]:.0f} GFLOP/s; "
            f"{found['other programs']}.")


def summary(found):
    """The U-Nets' results in a sentence, from the slowest comparison to the fastest."""
    rows, parts = [row for row in found["rows"] if row["FLOPs"]], []
    for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
        if name not in ("ours", "product"):
            ratios = [row["seconds"][name] / row["seconds"]["ours"] for row in rows
                      if name in row["seconds"]]
            slower = sum(ratio < 1 for ratio in ratios)
            parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as {name} (slower "
                         f"in {slower} of {len(ratios)})")
    shares = [share_of(row, found) for row in rows]
    return (f"Our U-Nets were {', '.join(parts)}, and reached {min(shares):.0f} to "
            f"{max(shares):.0f} % of what a matrix product reaches.")


def run(args):
    if (args.diffusers or args.karlo) and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--diffusers and --karlo compare with diffusers, which is not installed "
                         "and not one of our five packages; do `pip install diffusers`, or leave "
                         "it out")
    others = args.device != "cpu" or args.dtype != "fp32" or args.batch != 1 or args.compile
    if others and not args.karlo:
        raise ValueError("--device, --dtype, --batch and --compile belong to --karlo; add it, or "
                         "leave them out")
    if args.karlo:
        found = compare_karlo(args)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    found = measure(args.runs, args.diffusers)
    print(conditions(found), table(found), summary(found), switches_table(found), sep="\n\n")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=unclip.positive, default=7, help="of each, interleaved")
    parser.add_argument("--diffusers", action="store_true", help="against its U-Net, too")
    parser.add_argument("--karlo", action="store_true", help="a picture at Karlo's full size, "
                        "against diffusers' networks, and nothing else")
    parser.add_argument("--device", default="cpu", help="of --karlo: cpu, cuda")
    parser.add_argument("--dtype", default="fp32", choices=unclip.DTYPES, help="of --karlo")
    parser.add_argument("--batch", type=unclip.positive, default=1, help="of --karlo")
    parser.add_argument("--compile", action="store_true", help="of --karlo: both compiled")
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    return unclip.stop_on_error(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
