"""The decoder turns an image embedding back into a picture; two upsamplers enlarge it.

    decoder     z_i (and the caption) -> 64 px     diffusion, guided; "unCLIP": it inverts CLIP
    upsampler1  64 px -> 256 px                    diffusion, given the small picture; no caption
    upsampler2  256 px -> 1024 px                  the same, larger

All three are one U-Net (ADM's, as GLIDE uses it) with other settings. The toy preset has 16, 64
and 256 px.

    B batch   C channels   E = 4 C of level 0, time embedding   H, W pixels   D width of z_i
    L caption tokens   K context tokens, 4 + L   X width of a context token

Papers: unCLIP (Ramesh et al. 2022) sec. 2.1 and app. C, ADM (Dhariwal & Nichol 2021), GLIDE
(Nichol et al. 2021), IDDPM (Nichol & Dhariwal 2021), LDM (Rombach et al. 2022) for the BSR damage.
"""
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip
import diffusion

# ---------------------------------------------------------------- U-Net


def zero(layer):
    """A layer that starts at zero: the block around it starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """Norm, SiLU, conv; norm, time, SiLU, conv; plus the input.   ADM sec. 3 and its code

    resample: None, "down" (2x2 mean) or "up" (nearest) before the first conv, on both branches.
    scale_shift: norm2(h) (1 + scale) + shift, both from the time embedding, scale first (AdaGN);
    else it is added before that norm. Dropout comes just before the second conv.
    """

    def __init__(self, c_in, c_out, emb, dropout=0.0, scale_shift=True, resample=None, groups=32):
        super().__init__()
        self.resample, self.scale_shift, self.dropout = resample, scale_shift, dropout
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.emb = nn.Linear(emb, 2 * c_out if scale_shift else c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):                               # (B, C_in, H, W), (B, E) after SiLU
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)                # (B, C_in, H / 2, W / 2)
        elif self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2.0) for y in (h, x))  # (B, C_in, 2 H, 2 W)
        h = self.conv1(h)                                                # (B, C, H, W)
        e = self.emb(emb)[:, :, None, None]                              # (B, C or 2 C, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)                             # (B, C, 1, 1) each
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = F.dropout(F.silu(h), self.dropout, self.training)
        return self.skip(x) + self.conv2(h)                              # (B, C, H, W)


class Attention(nn.Module):
    """Pixels look at all pixels and the context: x + proj(attention(norm(x))).   GLIDE sec. 4.1

    The context's keys and values, kv (B, K, 2 C) = k then v, stand before the pixels'; it has no
    norm of its own here. qkv's output is q, k, v one after the other. mask as in clip.attend.
    """

    def __init__(self, channels, head_channels, context_width, groups=32):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"expected channels at attention to be a multiple of head_channels, "
                             f"got {channels} and {head_channels}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = zero(nn.Linear(channels, channels))
        self.context = nn.Linear(context_width, 2 * channels) if context_width else None

    def forward(self, x, kv=None, mask=None):    # (B, C, H, W), (B, K, 2 C), (B, 1, 1, K + H W)
        h = self.norm(x).flatten(2).transpose(1, 2)                      # (B, H W, C)
        q, k, v = self.qkv(h).chunk(3, dim=2)                            # (B, H W, C) each
        if kv is not None:
            k, v = (torch.cat(pair, dim=1)                               # (B, K + H W, C)
                    for pair in zip(kv.chunk(2, dim=2), (k, v)))
        h = self.proj(clip.attend(q, k, v, self.heads, mask))            # (B, H W, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])           # (B, C, H, W)


@dataclass
class UNetConfig:
    """Sizes of a U-Net; in the comments the paper's decoder and two upsamplers (unCLIP table 3)."""
    size: int = 16                  # px of the picture it makes: 64, 256, 1024
    in_channels: int = 3            # 3, 6, 6 (noisy picture, enlarged small picture)
    out_channels: int = 6           # eps, and v for the variance; 3: eps alone (Karlo's upsamplers)
    channels: int = 64              # 512, 320, 192
    mults: tuple = (1, 2, 3)        # channels of each resolution: 1,2,3,4   1,2,3,4   1,1,2,2,4,4
    depth: int = 1                  # res blocks per resolution: 3, 3, 2
    attention: tuple = ()           # px of the levels with attention: (32, 16, 8), none, none
    head_channels: int = 64
    context_width: int = 0          # X, 2048, none, none
    scale_shift: bool = True        # AdaGN; False only in Karlo's upsamplers
    dropout: float = 0.0            # 0.1, 0.1, 0
    groups: int = 32                # of GroupNorm, 32 everywhere but in the toy: one channel to a
    #                                 group would erase each channel's mean, a picture's shade


class Level(nn.Module):
    """One resolution, on the way down or up: res blocks, attention after each, a resampling block.

    c_ins: the input channels of its res blocks; resample: None, "down" or "up".
    """

    def __init__(self, c_ins, c_out, emb, resample, attention, c):
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(c_in, c_out, emb, c.dropout, c.scale_shift, None, c.groups) for c_in in c_ins)
        self.attn = nn.ModuleList(Attention(c_out, c.head_channels, c.context_width, c.groups)
                                  for _ in c_ins if attention)
        self.resample = (ResBlock(c_out, c_out, emb, c.dropout, c.scale_shift, resample, c.groups)
                         if resample else None)


class UNet(nn.Module):
    """Down through the resolutions, through the middle, and up with the way down's outputs beside.

    ADM's. Attention stands in the middle exactly if some level has it.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        E, widths = 4 * c.channels, [m * c.channels for m in c.mults]
        looks = [c.size // 2 ** i in c.attention for i in range(len(widths))]
        self.time = nn.Sequential(nn.Linear(c.channels, E), nn.SiLU(), nn.Linear(E, E))
        self.conv_in = nn.Conv2d(c.in_channels, c.channels, 3, padding=1)
        width, skips = c.channels, [c.channels]      # skips: the widths that the way down leaves
        self.down = nn.ModuleList()
        for i, w in enumerate(widths):
            resample = "down" if i + 1 < len(widths) else None
            self.down.append(Level([width] + [w] * (c.depth - 1), w, E, resample, looks[i], c))
            width, skips = w, skips + [w] * (c.depth + bool(resample))
        self.mid_res1 = ResBlock(width, width, E, c.dropout, c.scale_shift, None, c.groups)
        self.mid_attn = (Attention(width, c.head_channels, c.context_width, c.groups)
                         if any(looks) else None)
        self.mid_res2 = ResBlock(width, width, E, c.dropout, c.scale_shift, None, c.groups)
        self.up = nn.ModuleList()                    # deepest first
        for i, w in reversed(list(enumerate(widths))):
            c_ins = [(w if j else width) + skips.pop() for j in range(c.depth + 1)]
            self.up.append(Level(c_ins, w, E, "up" if i else None, looks[i], c))
            width = w
        self.norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = zero(nn.Conv2d(width, c.out_channels, 3, padding=1))

    def keys_values(self, context):
        """What each attention layer needs of the context, which is the same at every step.

        context (B, K, X) -> a list of (B, K, 2 C), in the order in which `forward` passes them.
        """
        middle = [self.mid_attn] if self.mid_attn is not None else []
        layers = [*(a for level in self.down for a in level.attn), *middle,
                  *(a for level in self.up for a in level.attn)]
        return [attn.context(context) for attn in layers]

    def forward(self, x, index, emb=None, kv=(), mask=None):
        """A picture and a time -> (B, out, H, W); H, W multiples of 2^(levels - 1).

        x (B, in, H, W), index (B,) = t - 1, emb (B, E) is added to the time embedding, kv from
        `keys_values`, mask (B, K) bool: which context tokens may be looked at (None: all).
        """
        time = self.time(diffusion.sinusoid(index, self.config.channels).to(x.dtype))     # (B, E)
        emb = F.silu(time if emb is None else time + emb)    # every res block would begin with it
        kv = list(kv)

        def look(attn, h):
            H, W = h.shape[2:]
            own = None if mask is None else F.pad(mask, (0, H * W), value=True)[:, None, None]
            return attn(h, kv.pop(0) if kv else None, own)   # own (B, 1, 1, K + H W)

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))      # (B, C, H, W)
        skips = [h]
        for level in self.down:
            for i, res in enumerate(level.res):
                h = res(h, emb)
                h = look(level.attn[i], h) if level.attn else h
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, emb)                                     # (B, C, H/2, W/2)
                skips.append(h)
        h = self.mid_res1(h, emb)
        h = look(self.mid_attn, h) if self.mid_attn is not None else h
        h = self.mid_res2(h, emb)
        for level in self.up:
            for i, res in enumerate(level.res):
                h = res(torch.cat([h, skips.pop()], dim=1), emb)     # C + the skip's C go in
                h = look(level.attn[i], h) if level.attn else h
            h = h if level.resample is None else level.resample(h, emb)        # (B, C, 2 H, 2 W)
        return self.conv_out(F.silu(self.norm_out(h)))                         # (B, out, H, W)


# ---------------------------------------------------------------- decoder


def small_decoder_unet():
    return UNetConfig(size=16, channels=32, mults=(1, 1, 4), attention=(8, 4), head_channels=32,
                      context_width=64, groups=8)


@dataclass
class DecoderConfig:
    """Sizes of the toy's decoder; in the comments the paper's (unCLIP table 3)."""
    unet: UNetConfig = field(default_factory=small_decoder_unet)
    embed_dim: int = 64             # D of z_i, 1024
    vocab_size: int = 600           # 16384; 0: CLIP's states, no Transformer of its own (Karlo)
    context: int = 20               # tokens, 256
    text_width: int = 64            # 2048, as unet.context_width; if vocab_size is 0 the width of
    #                                 CLIP's states, which may be another
    text_layers: int = 2            # 24
    text_heads: int = 2             # 32
    T: int = 1000
    schedule: str = "cosine"
    velocity: bool = False          # see `to_eps`, `training_times`; True in the toy only


def to_eps(config, alphabar, out, x_t, t):
    """What a U-Net says, (B, 3 or 6, H, W), with eps in front.

    As it is; with config.velocity the U-Net says the velocity, and eps is computed from it: a small
    network that has to say eps itself spends most of its training on copying the noise.
    """
    if not config.velocity:
        return out
    eps = diffusion.eps_from_velocity(alphabar, x_t, t, out[:, :3])
    return torch.cat([eps, out[:, 3:]], dim=1)


def eps_weight(config, alphabar, t):
    """How much an error in eps counts, t (B,) -> (B,) float32: 1; with config.velocity 1 / ab_t,
    which makes it an error in velocity."""
    return (1 / alphabar[t] if config.velocity else torch.ones(len(t))).float()


def training_times(config, B):
    """The decoder's times for a batch, (B,), all equally likely; with config.velocity mostly middle
    ones: in a short run shapes and colours are learnt sooner. (What is learnt of v then counts the
    middle more than the bound does.)"""
    draw = diffusion.middle_times if config.velocity else diffusion.random_times
    return draw(config.T, B)


class Decoder(nn.Module):
    """Image embedding (and caption) -> picture.   unCLIP sec. 2.1

    z_i enters twice: projected and added to the time embedding, and projected to four tokens in the
    context, before the outputs of the decoder's own text Transformer. Predicts eps and v.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        with torch.device("cpu"):                      # the table stays there, wherever weights go
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        X, E = c.unet.context_width, 4 * c.unet.channels
        if c.vocab_size and c.text_width != X:
            raise ValueError(f"expected text_width to be the U-Net's context_width, {X}, got "
                             f"{c.text_width}")
        self.unet = UNet(c.unet)
        if c.vocab_size:
            self.text = clip.CaptionEncoder(c.vocab_size, c.context, c.text_width, c.text_layers,
                                            c.text_heads)
            self.text_emb = nn.Linear(c.text_width, E)       # of the last position, as in GLIDE
        else:
            self.hidden_in, self.hidden_ln = nn.Linear(c.text_width, X), nn.LayerNorm(X)
            self.text_emb = nn.Linear(c.embed_dim, E)        # of CLIP's text embedding
        self.image_emb = nn.Linear(c.embed_dim, E)
        self.image_tokens = nn.Linear(c.embed_dim, 4 * X)
        self.register_buffer("null_image", torch.zeros(c.embed_dim))     # what a dropped z_i is

    @torch.no_grad()
    def fit(self, z_i):
        """Start the projections of z_i white on data, z_i (N, D). Run once, before training.

        W = R (C + c I)^(-1) C^(1/2), b = -W mean, with R random, C = cov z_i, c 2 % of its largest
        eigenvalue: the mean is taken off, and all directions in which pictures clearly differ start
        equally large. (A network that has to enlarge them itself learns last which thing is red.) A
        Wiener filter against noise of variance c, it stays small where they hardly differ: there
        z_i says little of what captions say, and what edits by words (sec. 3.3) add there means
        nothing.
        """
        power, basis = torch.linalg.eigh(z_i.T.cov())
        white = basis * (power.clamp(min=0).sqrt() / (power + 0.02 * power[-1])) @ basis.T  # (D, D)
        for layer in (self.image_emb, self.image_tokens):
            layer.weight.copy_(torch.randn_like(layer.weight) @ white / len(white) ** 0.5)
            layer.bias.copy_(-layer.weight @ z_i.mean(0))

    def condition(self, z_i, text):
        """All that stays the same over the steps -> emb (B, E), kv, mask (B, K) or None.

        z_i (B, D) as the decoder was trained on (unit rows, except Karlo's), text a clip.Text;
        kv is a list for the U-Net.
        """
        z_i = z_i.to(self.image_emb.weight.dtype)
        tokens = self.image_tokens(z_i).unflatten(1, (4, -1))                  # (B, 4, X)
        if self.config.vocab_size:
            states, mask = self.text(text.tokens, text.mask), None             # (B, L, X)
            pooled = states[:, -1]                                             # (B, X)
        else:
            states = self.hidden_ln(self.hidden_in(text.states))               # (B, L, X)
            pooled, mask = text.z_t, F.pad(text.mask, (4, 0), value=True)      # (B, D), (B, 4 + L)
        emb = self.image_emb(z_i) + self.text_emb(pooled)                      # (B, E)
        context = torch.cat([tokens, states], dim=1)                           # (B, 4 + L, X)
        return emb, self.unet.keys_values(context), mask

    def forward(self, x_t, index, z_i, text):
        """x_t (B, 3, H, W), index (B,) = t - 1 -> eps and v (B, 6, H, W).

        index is best on the CPU, where the table of `to_eps` is.
        """
        out = self.unet(x_t, diffusion.to_device(index, x_t.device), *self.condition(z_i, text))
        return to_eps(self.config, self.alphabar, out, x_t, index.cpu() + 1)

    def loss(self, x0, z_i, text, share=(0, 1)):
        """x0 (B, 3, H, W) in [-1, 1] -> (B,): IDDPM's hybrid loss.   Sec. 2.1

        z_i is dropped in 10 % of the rows, the caption in 50 %, one regardless of the other.
        share: see `diffusion.drawn`.
        """
        B, c = len(x0), self.config
        t = diffusion.drawn(lambda n: training_times(c, n), B, share)
        eps = diffusion.drawn(lambda n: torch.randn(n, *x0.shape[1:]), B, share)
        keep_image = diffusion.drawn(lambda n: torch.rand(n, 1), B, share) >= 0.1
        keep_text = diffusion.drawn(torch.rand, B, share) >= 0.5
        eps, keep_image, keep_text, weight = (
            diffusion.to_device(x, x0.device) for x in (
                eps, keep_image, keep_text, eps_weight(c, self.alphabar, t)))
        z_i = torch.where(keep_image, z_i, self.null_image)                    # (B, D)
        x_t = diffusion.q_sample(self.alphabar, x0, t, eps)
        out = self(x_t, t - 1, z_i, text.drop(keep_text)).float()              # (B, 6, H, W)
        return diffusion.hybrid_loss(self.alphabar, out, x0, x_t, t, eps, weight)

    def denoiser(self, z_i, text, guidance=1.0, null=None):
        """(x_t, t) -> eps and v. All that is constant over the steps is done here, once.

        guidance: eps = eps_null + guidance (eps - eps_null), where null has no caption *and* no
        embedding; both run as one batch, B' = 2 B. null: a clip.Text, by default all padding.
        """
        B = len(z_i)
        if guidance != 1:
            z_i = torch.cat([self.null_image.expand_as(z_i), z_i])             # (B', D)
            text = text.after(text.null() if null is None else null)           # (B', ...)
        emb, kv, mask = self.condition(z_i, text)

        def denoise(x_t, t):
            x = x_t.repeat(len(emb) // B, 1, 1, 1)                             # (B', 3, H, W)
            index = torch.full((len(x),), t - 1, device=x.device)
            out = self.unet(x.to(emb.dtype), index, emb, kv, mask).float()     # (B', 6, H, W)
            out = to_eps(self.config, self.alphabar, out, x, t)
            return diffusion.guide_eps(*out.chunk(2), guidance) if guidance != 1 else out

        return denoise

    @torch.no_grad()
    def sample(self, z_i, text, steps=250, guidance=1.0, generator=None, null=None, progress=None):
        """z_i (B, D), B captions -> pictures (B, 3, size, size) in [-1, 1].

        Ancestral steps with the learned variance; null as in `denoiser`.
        """
        size = self.config.unet.size
        x = torch.randn(len(z_i), 3, size, size, generator=generator,
                        device=generator.device if generator else None)
        x = diffusion.sample(self.denoiser(z_i, text, guidance, null), self.alphabar,
                             x.to(z_i.device),
                             diffusion.spaced_timesteps(self.config.T, steps), clamp=1.0,
                             variance="learned", generator=generator, progress=progress)
        return x.clamp(-1, 1)

    def ddim_times(self, steps):
        """Times for both ways between picture and noise; 250 are ADM's: 1, 5, ..., 997.

        Not t = T: there an error in eps comes out 20,000 times larger in x0.
        """
        last = self.config.T - max(1, 3 * self.config.T // 1000)
        return diffusion.spaced_timesteps(last, steps)

    @torch.no_grad()
    def invert(self, x, z_i, text, steps=250, null=None, progress=None):
        """The noise x_T that DDIM turns into this picture: x (B, 3, size, size) -> the same shape.

        With z_i it is all there is to know of the picture: the "bipartite latent" (z_i, x_T) of
        sec. 3. No guidance and no clamp: both would enlarge the error of the way back, `decode`.
        """
        return diffusion.invert(self.denoiser(z_i, text, null=null), self.alphabar, x,
                                self.ddim_times(steps), progress=progress)

    @torch.no_grad()
    def decode(self, z_i, x_T, text, steps=250, eta=0.0, guidance=1.0, generator=None, null=None,
               progress=None):
        """z_i (B, D) and the noise x_T (B, 3, size, size) -> pictures in [-1, 1].   Sec. 3.1

        DDIM. With guidance 1, eta = 0 and the steps of `invert` the inverted picture comes back;
        a larger eta forgets more of x_T. Guidance drives pixels out of [-1, 1], further at every
        step, so with it x0 is clamped as in `sample`.
        """
        x = diffusion.sample(self.denoiser(z_i, text, guidance, null), self.alphabar, x_T,
                             self.ddim_times(steps), clamp=None if guidance == 1 else 1.0, eta=eta,
                             generator=generator, progress=progress)
        return x.clamp(-1, 1)


# ---------------------------------------------------------------- corruptions
# An upsampler trained on perfect small pictures believes every pixel of them; when sampling they
# come from the stage below and are not perfect. So in training they are damaged a little.


def shrink(x, size):
    """Area downsampling, each pixel the mean of a block: (B, 3, H, H) -> (B, 3, size, size)."""
    H, W = x.shape[2:]
    if H != W or H % size:
        raise ValueError(f"expected squares of side k * {size}, got {H} x {W}; crop them first")
    return F.avg_pool2d(x, H // size)                                # (B, 3, size, size)


def enlarge(low, size):
    """The upsampler's second input: low clamped to [-1, 1], then made bigger, bicubic.

    (B, 3, h, h) -> (B, 3, size, size). Bicubic overshoots at edges: a little beyond [-1, 1].
    Surprise: antialias changes enlarging too, as it selects another cubic (a = -0.5, not -0.75).
    """
    return F.interpolate(low.clamp(-1, 1), (size, size), mode="bicubic", antialias=True)


def crop_pair(high, low, crop, generator=None, share=(0, 1)):
    """One random window per example, cut from both pictures.   unCLIP app. C: a fourth of the side.

    high (B, 3, k h, k w), low (B, 3, h, w), and crop the side in high-res pixels
    -> (B, 3, crop, crop), (B, 3, crop / k, crop / k). The corner is drawn on the low-res grid, so
    both windows show the same thing. Damage low before cropping: no mirrored edges inside.
    ValueError unless high is k times low, and crop a multiple of k that fits. share: see
    `diffusion.drawn`.
    """
    k, (h, w) = max(1, high.shape[2] // low.shape[2]), low.shape[2:]
    side = crop // k                                                 # in low-res pixels
    if high.shape[2:] != (k * h, k * w) or crop % k or side > min(h, w):
        raise ValueError(f"expected high = k * low and a crop that fits, a multiple of k; got "
                         f"{[*high.shape]}, {[*low.shape]}, {crop=}; change the crop")
    top, left = (diffusion.drawn(lambda n: torch.randint(space + 1, (n,), generator=generator),
                                 len(high), share).tolist() for space in (h - side, w - side))

    def cut(pictures, n):                                            # n pixels per low-res pixel
        return torch.stack([x[:, n * i:n * (i + side), n * j:n * (j + side)]
                            for x, i, j in zip(pictures, top, left)])
    return cut(high, k), cut(low, 1)


# ---- blurs ----

def gaussian_taps(reach, var, centre=0.0):
    """Weights of a Gaussian at the offsets -reach..reach: float64 (2 reach + 1,), sum 1."""
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    return (-(offset - centre) ** 2 / (2 * var)).softmax(0)


def filter2d(x, kernel, stride=1):
    """Weighted mean of the neighbours, one kernel for every channel; mirror beyond the edges."""
    reach, C = len(kernel) // 2, x.shape[1]
    x = F.pad(x, [reach] * 4, mode="reflect")
    kernel = kernel.to(x).expand(C, 1, *kernel.shape)                # (C, 1, size, size)
    return F.conv2d(x, kernel, stride=stride, groups=C)


def gaussian_blur(x, sigma=0.6, kernel=3):
    """What the first upsampler's hint suffers.  (B, 3, H, W) -> the same.   unCLIP app. C.

    weight(dy, dx) ~ exp(-(dy^2 + dx^2) / (2 sigma^2)) on kernel x kernel pixels, sum 1.
    """
    if kernel % 2 == 0:
        raise ValueError(f"expected an odd kernel, got {kernel}; an even one shifts the picture")
    taps = gaussian_taps(kernel // 2, sigma ** 2)
    return filter2d(x, torch.outer(taps, taps))


# ---- BSR: the moderate blind-super-resolution damage of LDM.  Here: x (1, 3, ., .) in [0, 1] ----

def random_blur(x, factor, rng):
    """A Gaussian, half the time longer in one direction.

    Surprise: published code also uses even kernels, which move the picture by half a pixel; ours
    gets one more row and column instead and stays where it is.
    """
    if rng.random() < 0.5:
        reach, angle = int(rng.integers(5, 15)) // 2, np.pi * rng.random()
        var = (4 + factor) / 4 * (1 - rng.random(2))                 # along and across; never 0
    else:
        reach, angle = int(rng.integers(5, 8)) // 2, 0.0
        var = np.full(2, (2 + 0.2 * factor) / 4 * (1 - rng.random())) ** 2
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    dy, dx = offset[:, None], offset[None, :]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    log_weight = -along ** 2 / (2 * var[0]) - across ** 2 / (2 * var[1])     # (size, size)
    return filter2d(x, log_weight.flatten().softmax(0).view_as(log_weight))


def random_resize(x, size, rng):
    """To size = (h, w) by a random method; bilinear and bicubic without antialias, as in OpenCV."""
    mode = ("bilinear", "bicubic", "area")[rng.integers(3)]
    return F.interpolate(x, size, mode=mode).clamp(0, 1)


def random_downsample(x, factor, rng):
    """Mostly a resize by a wrong factor; else blur, and keep the corner of every block of pixels.

    The block's centre lies (factor - 1) / 2 pixels beyond its corner, so the blur is centred there;
    otherwise the picture would drift to the upper left.
    """
    if rng.random() < 0.8:
        scale = rng.uniform(1, 2 * factor)
        return random_resize(x, (int(x.shape[2] / scale), int(x.shape[3] / scale)), rng)
    taps = gaussian_taps(12, rng.uniform(0.1, 0.6 * factor) ** 2, centre=(factor - 1) / 2)
    return filter2d(x, torch.outer(taps, taps), stride=factor)


def random_noise(x, rng):
    """Sensor noise of 1 or 2 grey levels: own for each channel, grey, or correlated (A^T D A)."""
    C, H, W = x.shape[1:]
    std, kind = rng.integers(1, 3) / 255, rng.random()
    if kind < 0.4:
        mix = np.eye(C)                                              # each channel its own
    elif kind < 0.8:
        mix = np.ones((C, 1))                                        # grey: one for all
    else:
        A = np.linalg.svd(rng.random((C, C)))[0]                     # some orthogonal matrix
        std, mix = 2 / 255, A.T * np.sqrt(rng.random(C))             # mix mix^T = A^T D A
    mix = torch.from_numpy(std * mix).float()                        # (C, sources)
    noise = torch.from_numpy(rng.standard_normal((mix.shape[1], H * W), dtype=np.float32))
    return (x + (mix @ noise).view(1, C, H, W)).clamp(0, 1)


def random_jpeg(x, rng):
    """Save as JPEG of quality 80..95, in memory, and open it again."""
    pixels, file = (255 * x[0]).round().byte().permute(1, 2, 0), io.BytesIO()   # (H, W, 3)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=int(rng.integers(80, 96)))
    pixels = torch.from_numpy(np.array(Image.open(file)))            # (H, W, 3)
    return pixels.permute(2, 0, 1)[None].float() / 255               # (1, 3, H, W)


def bsr_degrade(image, rng):
    """What the second upsampler's hint suffers, while shrinking by 4.   LDM's bsrgan_light, x4.

    Blur, two resizes, noise and JPEG in random order (the exact resize after the inexact one), then
    JPEG once more; a quarter of the time it is halved before all that. For one picture on the CPU:
    image (3, H, W) in [-1, 1] -> (3, H / 4, W / 4) in [-1, 1], every draw from the numpy rng.
    ValueError unless H, W are multiples of 4, at least 64, and the pixels are in range.
    """
    H, W = image.shape[1:]
    if H % 4 or W % 4 or min(H, W) < 64 or image.abs().max() > 1:
        raise ValueError(f"expected (3, H, W) in [-1, 1] with sides 4 k >= 64, got "
                         f"{tuple(image.shape)} in [{image.min():g}, {image.max():g}]")
    x, factor = (image[None].float() + 1) / 2, 4                     # (1, 3, H, W) in [0, 1]
    if rng.random() < 0.25:
        factor, half = 2, (H // 2, W // 2)
        x = (random_resize(x, half, rng) if rng.random() < 0.5 else
             F.interpolate(x, half, mode="bicubic", antialias=True).clamp(0, 1))
    steps = {"blur": lambda x: random_blur(x, factor, rng),
             "downsample": lambda x: random_downsample(x, factor, rng),
             "fit": lambda x: random_resize(x, (H // 4, W // 4), rng),
             "noise": lambda x: random_noise(x, rng),
             "jpeg": lambda x: random_jpeg(x, rng) if rng.random() < 0.9 else x}
    order = list(rng.permutation(list(steps)))
    i, j = sorted([order.index("downsample"), order.index("fit")])
    order[i], order[j] = "downsample", "fit"
    for name in order:
        x = steps[name](x)
    return 2 * random_jpeg(x, rng)[0] - 1                            # (3, H / 4, W / 4)


# ---------------------------------------------------------------- upsamplers


def small_unet():
    return UNetConfig(size=64, in_channels=6, channels=32, mults=(1, 1), groups=2)


@dataclass
class UpsamplerConfig:
    """Sizes of an upsampler, the toy's first; in the comments the paper's two (unCLIP table 3)."""
    unet: UNetConfig = field(default_factory=small_unet)
    T: int = 1000
    schedule: str = "cosine"        # cosine, linear
    corruption: str = "blur"        # of the small picture in training: blur, bsr
    eta: float | None = 0.0         # DDIM's; None: ancestral steps (Karlo)
    velocity: bool = False          # see `to_eps`; True in the toy only
    last: bool = False              # a second U-Net for the last step (Karlo)


class Upsampler(nn.Module):
    """Small picture -> the same picture with sides four times as long.   unCLIP sec. 2.1

    A U-Net without attention, so it can train on crops of a quarter of the side and run on whole
    pictures. It sees the enlarged small picture beside the noisy one, and no caption.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        with torch.device("cpu"):                      # the table stays there, wherever weights go
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        self.unet = UNet(c.unet)
        self.last = UNet(c.unet) if c.last else None

    def forward(self, x_t, index, low):
        """x_t (B, 3, H, W), index (B,) = t - 1, low (B, 3, H / 4, W / 4) -> eps (and v)."""
        large = enlarge(low, x_t.shape[2]).to(x_t.dtype)                       # (B, 3, H, W)
        out = self.unet(torch.cat([x_t, large], dim=1),
                        diffusion.to_device(index, x_t.device))                # (B, out, H, W)
        return to_eps(self.config, self.alphabar, out, x_t, index.cpu() + 1)

    def prepare(self, high, crops=1, share=(0, 1)):
        """Whole pictures (B, 3, S, S) -> windows for training, each with its damaged small twin.

        -> (B crops, 3, S / 4, S / 4), (B crops, 3, S / 16, S / 16). The whole picture is shrunk and
        damaged first and cropped then, so that windows have no edges of their own. The damage:
        "bsr" is bsr_degrade (its rng seeded from torch's and the process's rank), "blur" a
        gaussian_blur, each picture's with probability 1/2. share: see `diffusion.drawn`; only the
        BSR damage, many draws in a row, is drawn by each process for itself.
        """
        S = self.config.unet.size
        if self.config.corruption == "bsr":
            rng = np.random.default_rng([int(torch.randint(2 ** 31, ())), share[0]])
            low = torch.stack([bsr_degrade(picture, rng) for picture in high])
        else:
            low = shrink(high, S // 4)                                         # (B, 3, S/4, S/4)
            blurred = diffusion.drawn(torch.rand, len(low), share) < 0.5   # sampling: no blur
            blurred = diffusion.to_device(blurred, low.device)
            low = torch.where(blurred[:, None, None, None], gaussian_blur(low), low)
        return crop_pair(*(x.repeat_interleave(crops, dim=0) for x in (high, low)), S // 4,
                         share=share)

    def loss(self, x0, low, share=(0, 1)):
        """x0 (B, 3, S, S) in [-1, 1], low (B, 3, S / 4, S / 4) -> (B,): IDDPM's hybrid loss.

        A network without v learns the simple loss. share: see `diffusion.drawn`.
        """
        B, c = len(x0), self.config
        t = diffusion.drawn(lambda n: diffusion.random_times(c.T, n), B, share)
        eps = diffusion.drawn(lambda n: torch.randn(n, *x0.shape[1:]), B, share)
        eps, weight = (diffusion.to_device(x, x0.device)
                       for x in (eps, eps_weight(c, self.alphabar, t)))
        x_t = diffusion.q_sample(self.alphabar, x0, t, eps)
        out = self(x_t, t - 1, low).float()
        if out.shape[1] == 3:
            return weight * diffusion.simple_loss(out, eps)
        return diffusion.hybrid_loss(self.alphabar, out, x0, x_t, t, eps, weight)

    def times(self, steps):
        """The times to sample at: evenly spaced with both ends, if nothing better is known.

        Better for DDIM: GLIDE's 27, or a whole stride where there is one (it spares t = T), but not
        of fewer than 15, which would begin where x_t still shows the picture.
        """
        if self.config.eta is None or steps < 15:
            return diffusion.spaced_timesteps(self.config.T, steps)
        if steps == 27:
            return diffusion.glide27_timesteps(self.config.T)
        try:
            return diffusion.ddim_timesteps(self.config.T, steps)
        except ValueError:
            return diffusion.spaced_timesteps(self.config.T, steps)

    def denoiser(self, low):
        """(x_t, t) -> eps (and v) for low (B, 3, h, h), which is enlarged once, here."""
        dtype = self.unet.conv_in.weight.dtype
        large = enlarge(low, 4 * low.shape[2]).to(dtype)                       # (B, 3, 4 h, 4 h)

        def denoise(x_t, t):
            unet = self.last if self.last is not None and t == 1 else self.unet
            index = torch.full((len(x_t),), t - 1, device=x_t.device)
            out = unet(torch.cat([x_t.to(dtype), large], dim=1), index).float()
            return to_eps(self.config, self.alphabar, out, x_t, t)

        return denoise

    @torch.no_grad()
    def sample(self, low, steps=27, generator=None, progress=None):
        """low (B, 3, h, h) in [-1, 1] -> (B, 3, 4 h, 4 h) in [-1, 1]; h = config.unet.size / 4.

        Other sizes run too, for pictures unlike those it was trained on.
        ValueError unless low is square and every level of the U-Net has a whole number of pixels.
        """
        size, least = 4 * low.shape[2], 2 ** (len(self.config.unet.mults) - 1)
        if low.shape[2] != low.shape[3] or size % least:
            raise ValueError(f"expected a square picture, four times its side a multiple of {least}"
                             f", got {[*low.shape]}; crop it")
        x = torch.randn(len(low), 3, size, size, generator=generator,
                        device=generator.device if generator else None).to(low.device)
        x = diffusion.sample(self.denoiser(low), self.alphabar, x, self.times(steps), clamp=1.0,
                             eta=self.config.eta, generator=generator, progress=progress)
        return x.clamp(-1, 1)


# ---------------------------------------------------------------- the public decoder and upsamplers

RES = {"norm1.*": "norm1.*", "conv1.*": "conv1.*", "emb.*": "time_emb_proj.*",
       "norm2.*": "norm2.*", "conv2.*": "conv2.*", "skip.*": "conv_shortcut.*"}
ATTENTION = {"norm.*": "group_norm.*", "qkv.*": "to_{q,k,v}.*", "context.*": "add_{k,v}_proj.*",
             "proj.*": "to_out.0.*"}
PLACES = {                                       # both libraries list the way up deepest first
    "down.N.res.N": ("down_blocks.N.resnets.N", RES),
    "down.N.attn.N": ("down_blocks.N.attentions.N", ATTENTION),
    "down.N.resample": ("down_blocks.N.downsamplers.0", RES),
    "mid_res1": ("mid_block.resnets.0", RES),
    "mid_attn": ("mid_block.attentions.0", ATTENTION),
    "mid_res2": ("mid_block.resnets.1", RES),
    "up.N.res.N": ("up_blocks.N.resnets.N", RES),
    "up.N.attn.N": ("up_blocks.N.attentions.N", ATTENTION),
    "up.N.resample": ("up_blocks.N.upsamplers.0", RES),
}
DIFFUSERS_UNET = {
    "time.0.*": "time_embedding.linear_1.*",
    "time.2.*": "time_embedding.linear_2.*",
    "conv_in.*": "conv_in.*",
    **{f"{ours}.{a}": f"{theirs}.{b}"
       for ours, (theirs, layers) in PLACES.items() for a, b in layers.items()},
    "norm_out.*": "conv_norm_out.*",
    "conv_out.*": "conv_out.*",
}


def token_major(w):
    """Rows [channel][token], for four tokens, as [token][channel]: (4 X, ...) -> (4 X, ...)."""
    return w.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


DIFFUSERS_TEXT_PROJ = {
    "null_image": "learned_classifier_free_guidance_embeddings",
    "image_emb.*": "clip_image_embeddings_project_to_time_embeddings.*",
    "text_emb.*": "embedding_proj.*",
    "hidden_in.*": "encoder_hidden_states_proj.*",
    "hidden_ln.*": "text_encoder_hidden_states_norm.*",
    "image_tokens.*": ("clip_extra_context_tokens_proj.*", token_major),
}


def unet_config(says, path):
    """diffusers' config.json of a U-Net -> UNetConfig.   ValueError for what ours does not do."""
    clip.expect(says, path, act_fn="silu", norm_eps=1e-5, norm_num_groups=32, flip_sin_to_cos=True,
                freq_shift=0, center_input_sample=False, time_embedding_type="positional",
                time_embedding_act_fn=None, timestep_post_act=None, mid_block_scale_factor=1,
                resnet_out_scale_factor=1, resnet_skip_time_act=False, only_cross_attention=False,
                cross_attention_norm=None, dual_cross_attention=False)
    size, c_in, c_out, depth = clip.sizes(says, path, "sample_size", "in_channels", "out_channels",
                                          "layers_per_block")
    kinds = says.get("down_block_types")
    kinds = kinds if isinstance(kinds, list) else []
    looks = [kind == "SimpleCrossAttnDownBlock2D" for kind in kinds]
    clip.expect(says, path,
                down_block_types=["SimpleCrossAttnDownBlock2D" if look else
                                  "ResnetDownsampleBlock2D" for look in looks],
                up_block_types=["SimpleCrossAttnUpBlock2D" if look else "ResnetUpsampleBlock2D"
                                for look in reversed(looks)],
                mid_block_type="UNetMidBlock2DSimpleCrossAttn" if any(looks) else "UNetMidBlock2D")
    widths = says.get("block_out_channels")
    if not isinstance(widths, list) or len(widths) != len(kinds) or not widths or any(
            type(w) is not int or w < 32 or w % 32 or w % widths[0] for w in widths):
        raise ValueError(f"{path} says block_out_channels = {widths!r}; expected {len(kinds)} "
                         "multiples of the first, which is one of 32")
    head, context = clip.sizes(says, path, "attention_head_dim", "cross_attention_dim") \
        if any(looks) else (64, 0)
    return UNetConfig(
        size, c_in, c_out, widths[0], tuple(w // widths[0] for w in widths), depth,
        tuple(size // 2 ** i for i, look in enumerate(looks) if look), head, context,
        scale_shift=says.get("resnet_time_scale_shift") == "scale_shift")


def check_scheduler(path, **wanted):
    """ValueError unless the scheduler_config.json is Karlo's: cosine, T = 1000, x0 within +-1."""
    clip.expect(clip.read_json(path), path, beta_schedule="squaredcos_cap_v2", clip_sample=True,
                num_train_timesteps=1000, clip_sample_range=1, prediction_type="epsilon", **wanted)


def load_karlo_decoder(folder, device="cpu", dtype=torch.float32):
    """decoder/, text_proj/ and decoder_scheduler/ of a Karlo folder -> Decoder.

    ValueError or FileNotFoundError, naming the file, where something else is there.
    """
    folder = Path(folder)
    weights, says, path = clip.read_folder(folder / "decoder")
    there = folder / "decoder" / "config.json"
    clip.expect(says, there, class_embed_type="identity", resnet_time_scale_shift="scale_shift")
    unet = unet_config(says, there)
    more, says, more_path = clip.read_folder(folder / "text_proj")
    there = folder / "text_proj" / "config.json"
    clip.expect(says, there, clip_extra_context_tokens=4, cross_attention_dim=unet.context_width,
                time_embed_dim=4 * unet.channels)
    D, = clip.sizes(says, there, "clip_embeddings_dim")
    check_scheduler(folder / "decoder_scheduler" / "scheduler_config.json",
                    variance_type="learned_range")
    with torch.device("meta"):
        model = Decoder(DecoderConfig(unet, embed_dim=D, vocab_size=0, text_width=D))
    weights = clip.rename(model.unet, weights, DIFFUSERS_UNET, path)
    return clip.settle(model, {f"unet.{name}": weight for name, weight in weights.items()}
                       | clip.rename(model, more, DIFFUSERS_TEXT_PROJ, more_path), device, dtype)


def load_karlo_upsampler(folder, device="cpu", dtype=torch.float32):
    """super_res_first/, super_res_last/ and super_res_scheduler/ of a Karlo folder -> Upsampler."""
    folder, files = Path(folder), {}
    check_scheduler(folder / "super_res_scheduler" / "scheduler_config.json",
                    variance_type="fixed_small_log")
    for ours, theirs in [("unet", "super_res_first"), ("last", "super_res_last")]:
        weights, says, path = clip.read_folder(folder / theirs)
        there = folder / theirs / "config.json"
        clip.expect(says, there, add_attention=False, class_embed_type=None,
                    resnet_time_scale_shift="default")
        files[ours] = unet_config(says, there), weights, path
    if files["unet"][0] != files["last"][0]:
        raise ValueError(f"{there} differs from super_res_first's; they should be equal networks")
    with torch.device("meta"):
        model = Upsampler(UpsamplerConfig(files["unet"][0], eta=None, last=True))
    renamed = {f"{ours}.{name}": weight for ours, (_, weights, path) in files.items()
               for name, weight in clip.rename(getattr(model, ours), weights, DIFFUSERS_UNET,
                                               path).items()}
    return clip.settle(model, renamed, device, dtype)


# ---------------------------------------------------------------- demo: python decoder.py


def demo(path="stages.png"):
    """One picture denoised: what the decoder is given at eight times, and what it sees in it."""
    import unclip                                # a later chapter: only the demo looks there
    model = unclip.load(unclip.HERE / "weights/toy.pt")
    text = model.encode_text(["a small red circle above a large blue square"])
    z_i = model.embed(text, generator=torch.Generator().manual_seed(0))
    part, given, seen = model.parts["decoder"], [], []
    denoise = part.denoiser(z_i, text, model.config.sampling.guidance)
    times = diffusion.spaced_timesteps(part.config.T, 50)

    def watch(x_t, t):
        out = denoise(x_t, t)
        if times.index(t) % 7 == 0:
            x0 = diffusion.predict_x0(part.alphabar, x_t, t, out[:, :3])
            given.append(x_t.clamp(-1, 1))
            seen.append(x0.clamp(-1, 1))
        return out

    size = part.config.unet.size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    diffusion.sample(watch, part.alphabar, x, times, clamp=1.0, variance="learned",
                     generator=torch.Generator().manual_seed(2))
    sheet = F.interpolate(torch.cat(given + seen), 8 * size, mode="nearest")
    unclip.save_grid(sheet, path, columns=len(given))
    print(f"wrote {path}: above x_t from noise to picture, below the x0 predicted from each")


if __name__ == "__main__":
    import unclip
    unclip.stop_on_error(demo)
