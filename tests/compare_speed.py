"""What the layout of our networks is worth on a CPU: ratios of interleaved runs, in one process.

    python tests/compare_speed.py [--runs 7]

The U-Net against the same weights in ADM's and GLIDE's layout, written plainly: contiguous tensors,
q, k, v and the context's keys and values each computed where they are used, attention as a matrix
and a softmax, SiLU of the time embedding in every block. Both are checked to say the same. Then the
switches of unclip.py, on a step of training of the toy's decoder and diffusion prior; and the
autoregressive prior with its cache against without.
"""
import argparse
import copy
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import decoder
import diffusion
import prior
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


def compare_unet(config, B, runs):
    """-> ours and plain, medians of seconds: forward, forward and backward."""
    unet, (x, index, context) = settled(config), inputs(config, B)
    other, unet = unet, unclip.channels_last(copy.deepcopy(unet))

    def ours():
        return unet(x, index, None, unet.keys_values(context) if context is not None else ())

    def plain():
        return plain_unet(other, x, index, context)

    def backward(forward):
        unet.zero_grad()
        other.zero_grad()
        forward().square().mean().backward()

    with torch.no_grad():
        assert torch.allclose(ours(), plain(), atol=1e-4), "they must say the same"
        sample = medians({"ours": ours, "plain": plain}, runs)
    train = medians({"ours": lambda: backward(ours), "plain": lambda: backward(plain)}, runs)
    return sample, train


def compare_switches(name, runs):
    """-> {switch: median seconds of a step of training}."""
    ways = {}
    for switch in ("none", "recompute", "bf16", "compile", "AdamW and average not foreach"):
        torch.manual_seed(0)
        part = unclip.channels_last(unclip.PARTS[name](getattr(unclip.toy(), name)).train())
        if switch == "recompute":
            unclip.recompute(part)
        if switch == "compile":
            unclip.compile_blocks(part)
        dtype = torch.bfloat16 if switch == "bf16" else torch.float32
        loss = unclip.training_loss(name, part, 16, "cpu")
        ways[switch] = (one_by_one(part, loss) if "foreach" in switch else
                        unclip.training_step(part, loss, "cpu", dtype))
    return medians(ways, runs)


def one_by_one(part, loss):
    """`unclip.training_step` with a loop over the weights in each of its last three lines."""
    weights = list(part.parameters())
    opt = torch.optim.AdamW(weights, 1e-4, foreach=False)
    ema = [w.detach().clone() for w in weights]

    def step():
        opt.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=False)
        opt.step()
        for average, w in zip(ema, weights):
            average.lerp_(w.detach(), 1e-4)

    return step


def ar_config():
    """320 positions after z_t, as in the paper; narrow, so that a CPU can do without the cache."""
    return prior.ARPriorConfig(components=319, buckets=1024, text_width=256, width=256, layers=2,
                               heads=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=unclip.positive, default=7, help="of each, interleaved")
    runs = parser.parse_args().runs
    print(f"{unclip.machine('cpu')}, torch {torch.__version__}; a large matrix product: "
          f"{unclip.matmul_ceiling('cpu', torch.float32) / 1e9:.0f} GFLOP/s")
    toy = unclip.toy()
    quarter = decoder.UNetConfig(size=32, channels=64, mults=(1, 2, 3, 4), depth=2,
                                 attention=(16, 8, 4), context_width=256)
    for name, config, B in (("toy decoder", toy.decoder.unet, 16),
                            ("toy upsampler 1", toy.upsampler1.unet, 4),
                            ("64 channels, 4 levels", quarter, 2)):
        for what, seconds in zip(("forward", "forward + backward"), compare_unet(config, B, runs)):
            print(f"U-Net, {name}, batch {B}, {what}: {seconds['ours']:.3f} s, plain "
                  f"{seconds['plain']:.3f} s, {seconds['plain'] / seconds['ours']:.2f} times "
                  "as fast", flush=True)
    for name in ("decoder", "diffusion_prior"):
        seconds = compare_switches(name, runs)
        print(f"step of training, toy {name}, batch 16: " + ", ".join(
            f"{switch} {value:.3f} s" for switch, value in seconds.items()), flush=True)
    part = prior.ARPrior(ar_config()).eval()
    for B in (1, 4):
        text = unclip.random_text(part.config, B, "cpu", torch.float32)
        seconds = medians({cached: lambda cached=cached: part.sample(
            text, cached=cached, generator=torch.Generator().manual_seed(0))
            for cached in (True, False)}, min(runs, 3))
        print(f"AR prior, 320 positions, 256 wide, batch {B}: {seconds[True]:.2f} s, without the "
              f"cache {seconds[False]:.2f} s, {seconds[False] / seconds[True]:.1f} times as fast",
              flush=True)


if __name__ == "__main__":
    main()
