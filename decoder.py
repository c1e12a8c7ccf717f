"""The decoder turns an image embedding back into an image; two upsamplers enlarge it.

    decoder     z_i (and the caption) -> 64 px     diffusion, guided; "unCLIP": it inverts CLIP
    upsampler1  64 px -> 256 px                    diffusion, conditioned on the small image
    upsampler2  256 px -> 1024 px                  the same, larger

All three are U-Nets, ADM's as GLIDE uses it. The toy makes 16, 64 and 256 px.

    B batch   C channels   H, W pixels   D width of z_i   E width of the timestep embedding
    L caption tokens   K context tokens for cross-attention: 4, and the caption's   X their width

Papers: unCLIP (Ramesh et al. 2022) sec. 2.1 and app. C, ADM (Dhariwal & Nichol 2021), GLIDE (Nichol
et al. 2021), IDDPM (Nichol & Dhariwal 2021), LDM (Rombach et al. 2022) for BSR.
"""
if __name__ == "__main__":
    import unclip                    # first: Ctrl-C is one line from then on

import io
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import clip
import diffusion

# ---------------------------------------------------------------- decoder
class Decoder(nn.Module):
    """Image embedding (and caption) -> image.   unCLIP sec. 2.1

    z_i enters twice: projected and added to the timestep embedding, and projected to four tokens
    that are concatenated to the outputs of the decoder's own text Transformer, for cross-attention.
    Where text_layers is 0 (the toy, Karlo), CLIP's hidden states take the place of the latter.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        X, E = c.unet.context_width, 4 * c.unet.channels
        with torch.device("cpu"):              # float64, and it stays there wherever the weights go
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        self.unet = UNet(c.unet)

        # the caption: read by a text Transformer of its own, or by CLIP's
        if c.text_layers:
            self.text = clip.CaptionEncoder(c.vocab_size, c.context, X, c.text_layers, c.text_heads)
        else:
            self.text = clip.CaptionStates(c.text_width, c.context, X)
        self.text_emb = nn.Linear(X, E)
        self.image_emb = nn.Linear(c.embed_dim, E)
        self.image_tokens = nn.Linear(c.embed_dim, 4 * X)
        self.register_buffer("null_image", torch.zeros(c.embed_dim))    # replaces a dropped z_i

    def condition(self, z_i, text):
        """What conditions the U-Net: emb (B, E), context (B, K, X), mask None (Karlo: (B, K)).

        z_i (B, D) unit, or null_image; text a clip.Text, or your class with drop, null, after, map.
        """
        z_i = z_i.to(self.image_emb.weight.dtype)
        own = self.config.text_layers > 0
        states = self.text(text.tokens if own else text.states, text.mask)     # (B, K - 4, X)

        # added to the timestep embedding: z_i, and the caption's last position as in GLIDE
        emb = self.image_emb(z_i) + self.text_emb(states[:, -1])           # (B, E)

        # for cross-attention: z_i once more, as four tokens, and the caption
        tokens = self.image_tokens(z_i).unflatten(1, (4, -1))              # (B, 4, X)
        return emb, torch.cat([tokens, states], dim=1), None

    def forward(self, x_t, t, z_i, text, condition=None):
        """x_t (B, 3, H, W), t int or (B,) in 1..T -> prediction and variance, (B, 6, H, W)."""
        condition = self.condition(z_i, text) if condition is None else condition
        return self.unet(x_t.to(self.image_emb.weight.dtype), t, *condition).float()

    def loss(self, x0, z_i, text, t=None):
        """x0 (B, 3, H, W) in [-1, 1] -> (B,).   Sec. 2.1; L_hybrid of IDDPM eq. 16

        For classifier-free guidance z_i (unit vectors) is null_image in 10 %, and text.drop(keep)
        drops config.drop_text: rows are kept where torch.rand >= the rate. self(x_t, t, z_i, text)
        predicts.
        """
        keep_z = torch.rand(len(x0), 1, device=x0.device) >= 0.1
        keep_text = torch.rand(len(x0), device=x0.device) >= self.config.drop_text
        z_i, text = torch.where(keep_z, z_i, self.null_image), text.drop(keep_text)
        return diffusion.loss(lambda x_t, t: self(x_t, t, z_i, text), self.alphabar, x0,
                              self.config.predicts, t)

    def denoiser(self, z_i, text, guidance=1.0, guidance_above=0):
        """(x_t, t) -> prediction, with the condition bound: it is the same at every step.

        Guided, rows with the null condition (null_image, no caption) and then with the true one are
        one batch. Only at t > guidance_above: guidance in an interval (Kynkaanniemi et al. 2024).
        """
        def bind(z_i, text):
            condition = self.condition(z_i, text)
            return lambda x_t, t: self(x_t, t, z_i, text, condition)

        plain = bind(z_i, text) if guidance == 1 or guidance_above else None       # B rows
        if guidance == 1:
            return plain

        both = bind(torch.cat([self.null_image.expand_as(z_i), z_i]), text.after(self.null(text)))
        guided = diffusion.guided(both, guidance, 3)
        return lambda x_t, t: guided(x_t, t) if t > guidance_above else plain(x_t, t)

    @torch.no_grad()
    def sample(self, z_i, text, steps=250, guidance=1.0, generator=None, progress=None,
               guidance_above=0, known=None, mask=None, resample=10):
        """z_i (B, D), B captions -> images (B, 3, size, size) in [-1, 1].

        Ancestral sampling (DDPM), its variance learned if the U-Net predicts one; x0 is clamped at
        every step. Inpainting if images `known` are given: they stay where the mask (B, 1, size,
        size) is 1.
        """
        network, S = self.denoiser(z_i, text, guidance, guidance_above), self.config.unet.size
        x_T = diffusion.noise_like(torch.empty(len(z_i), 3, S, S, device=z_i.device), generator)
        timesteps = diffusion.spaced_timesteps(self.config.T, steps)
        learned = self.config.unet.out_channels == 6
        settings = dict(predicts=self.config.predicts, clamp=1.0, generator=generator,
                        variance="learned" if learned else "small", progress=progress)
        if known is None:
            return diffusion.sample(network, self.alphabar, x_T, timesteps, **settings)
        return diffusion.inpaint(network, self.alphabar, x_T, known, mask, timesteps,
                                 resample=resample, **settings)

    @torch.no_grad()
    def refine(self, x, z_i, text, draws, generator=None):
        """Images (B, 3, size, size) with less of the network's error (test-time ensembling).

        At t = 0.3 T, 0.2 T, 0.1 T x becomes the mean of `draws` predictions of x0, each from x and
        new noise: they share the image, not the error. They are conditional, not guided. draws = 0
        leaves x as it is.
        """
        if draws == 0:
            return x

        def rows(x):
            return x.repeat_interleave(draws, 0)

        z_i, text = rows(z_i), text.map(rows)                              # (B draws, ...)
        for t in (max(1, tenths * self.config.T // 10) for tenths in (3, 2, 1)):
            x = rows(x)
            x_t = diffusion.q_sample(self.alphabar, x, t, diffusion.noise_like(x, generator))
            out = diffusion.split_variance(self(x_t, t, z_i, text), x_t)[0]
            x0 = diffusion.to_x0(self.alphabar, out, x_t, t, self.config.predicts).clamp(-1, 1)
            x = x0.unflatten(0, (-1, draws)).mean(1)                       # (B, ...)
        return x

    def null(self, text):
        """The null condition of the caption: all padding."""
        return text.null()

    def scale(self, z_i):
        """CLIP's image embeddings (B, D) as this network is trained on them: unit vectors."""
        return clip.unit(z_i)

    @torch.no_grad()
    def invert(self, x, z_i, text, steps=250, progress=None):
        """The x_T that DDIM turns into x (B, 3, size, size); the bipartite latent is (z_i, x_T)."""
        return diffusion.invert(self.denoiser(z_i, text), self.alphabar, x, progress=progress,
                                timesteps=self.ddim_timesteps(steps), predicts=self.config.predicts)

    @torch.no_grad()
    def decode_latent(self, z_i, x_T, text, steps=250, eta=0.0, guidance=1.0, generator=None,
                      progress=None):
        """z_i (B, D), x_T (B, 3, size, size) -> images in [-1, 1], by DDIM.   Sec. 3.1

        The way back of `invert`. As there x0 is not clamped, unless guided: guidance overshoots.
        """
        network = self.denoiser(z_i, text, guidance)
        x = diffusion.sample(network, self.alphabar, x_T, self.ddim_timesteps(steps),
                             predicts=self.config.predicts, clamp=None if guidance == 1 else 1.0,
                             eta=eta, generator=generator, progress=progress)
        return x.clamp(-1, 1)

    def ddim_timesteps(self, steps):
        """1 to 0.997 T (250: ADM's 1, 5, ..., 997): at T eps hardly gives x0, if unclamped."""
        return diffusion.spaced_timesteps(self.config.T - max(1, 3 * self.config.T // 1000), steps)


# ---------------------------------------------------------------- upsamplers
class Upsampler(nn.Module):
    """Small image -> the same image with sides four times as long.   unCLIP sec. 2.1

    The enlarged small image is concatenated to the noisy one; the caption is not used. As there is
    no attention, the U-Net can train on crops of a quarter of the side and run on whole images.
    """
    eta = 0.0                       # DDIM without noise; None is DDPM

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        if c.residual and c.predicts != "x0":
            raise ValueError(f"expected a residual upsampler to predict x0, got {c.predicts!r}")
        with torch.device("cpu"):              # float64, and it stays there wherever the weights go
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        self.unet = UNet(c.unet)

    def forward(self, x_t, t, large):
        """x_t and the enlarged small image (B, 3, H, W), t int or (B,) in 1..T -> a prediction."""
        x = torch.cat([x_t, large], dim=1)                                     # (B, 6, H, W)
        out = self.unet(x.to(self.unet.conv_in.weight.dtype), t).float()
        if self.config.residual:                                # predicts x0 - large
            out = torch.cat([large + out[:, :3], out[:, 3:]], dim=1)
        return out

    def loss(self, x0, low, t=None):
        """x0 (B, 3, S, S) in [-1, 1], low (B, 3, S / 4, S / 4) -> (B,)."""
        large = enlarge(low, x0.shape[2])
        return diffusion.loss(lambda x_t, t: self(x_t, t, large), self.alphabar, x0,
                              self.config.predicts, t)

    @torch.no_grad()
    def sample(self, low, steps=27, generator=None, progress=None):
        """low (B, 3, h, h) in [-1, 1] -> (B, 3, 4 h, 4 h) in [-1, 1], by DDIM."""
        size, multiple = 4 * low.shape[2], 2 ** (len(self.config.unet.mults) - 1)
        if low.shape[2] != low.shape[3] or size % multiple:
            raise ValueError(f"expected squares, 4 sides a multiple of {multiple}: {[*low.shape]}")
        large = enlarge(low, size)                                             # (B, 3, 4 h, 4 h)
        return diffusion.sample(lambda x_t, t: self(x_t, t, large), self.alphabar,
                                diffusion.noise_like(large, generator), self.timesteps(steps),
                                predicts=self.config.predicts, clamp=1.0, eta=self.eta,
                                generator=generator, progress=progress)

    def timesteps(self, steps):
        """27: GLIDE's. From 15 on, where a stride n gives that many, 1, 1 + n, 1 + 2 n, ...; few of
        these reach T. Else evenly spaced from 1 to T."""
        T, stride = self.config.T, -(-self.config.T // steps)                  # rounded up
        if steps == 27:
            return diffusion.glide27_timesteps(T)
        if steps >= 15 and len(range(0, T, stride)) == steps:
            return list(range(1, T + 1, stride))
        return diffusion.spaced_timesteps(T, steps)

    def prepare(self, high, crops=1):
        """(B, 3, S, S) -> x0 (B * crops, 3, S / 4, S / 4), low (B * crops, 3, S / 16, S / 16).

        Images are shrunk, and (without BSR) half of them blurred, before they are cropped: crops
        are not mirrored at their edges. crops = 0: the whole (B, 3, S, S), (B, 3, S / 4, S / 4).
        """
        S = self.config.unet.size

        # the small images
        if self.config.degradation == "bsr":
            rng = np.random.default_rng(int(torch.randint(2 ** 31, ())))
            low = torch.stack([bsr_degrade(x.cpu(), rng) for x in high]).to(high.device)
        else:
            low = shrink(high, S // 4)                                         # (B, 3, S/4, S/4)
            blurred = (torch.rand(len(low)) < 0.5).to(low.device)
            low = torch.where(blurred[:, None, None, None], gaussian_blur(low), low)

        # crops of them, and of the large ones
        if crops == 0:
            return high, low
        high, low = high.repeat_interleave(crops, dim=0), low.repeat_interleave(crops, dim=0)
        return crop_pair(high, low, S // 4)


# ---------------------------------------------------------------- U-Net
class UNet(nn.Module):
    """ADM's U-Net: a downsampling path, a middle, and an upsampling path with skip connections.

    Each res block on the way up also receives the matching output of the way down, concatenated.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config, E = config, config, 4 * config.channels
        widths = [m * c.channels for m in c.mults]                             # of each level
        sizes = [c.size // 2 ** i for i in range(len(widths))]                 # in pixels

        # timestep embedding
        self.time = nn.Sequential(nn.Linear(c.channels, E), nn.SiLU(), nn.Linear(E, E))

        # downsampling path: remember how many channels each output has
        self.conv_in = nn.Conv2d(c.in_channels, c.channels, 3, padding=1)
        self.down, width, skips = nn.ModuleList(), c.channels, [c.channels]
        for i, C in enumerate(widths):
            resample = "down" if i + 1 < len(widths) else None
            self.down.append(Level([width] + [C] * (c.depth - 1), C, sizes[i], c, resample))
            skips += [C] * (c.depth + (resample is not None))
            width = C

        # middle
        self.mid_res1 = ResBlock(width, width, c)
        self.mid_attn = Attention(width, c) if set(sizes) & set(c.attention) else NoAttention()
        self.mid_res2 = ResBlock(width, width, c)

        # upsampling path, lowest resolution first: a block for each skip connection
        self.up = nn.ModuleList()
        for i, C in reversed(list(enumerate(widths))):
            c_ins = []
            for _ in range(c.depth + 1):
                c_ins.append(width + skips.pop())
                width = C
            self.up.append(Level(c_ins, C, sizes[i], c, "up" if i > 0 else None))

        self.norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = zero(nn.Conv2d(width, c.out_channels, 3, padding=1))

    def forward(self, x, t, emb=None, context=None, mask=None):
        """x (B, in, H, W), t int or (B,) in 1..T -> (B, out, H, W).

        emb (B, E) is added to the timestep embedding; context (B, K, X) is for cross-attention.
        """
        # timestep embedding (published networks count from 0)
        t = t + torch.zeros(len(x), dtype=torch.long, device=x.device)         # (B,), of an int too
        time = self.time(clip.sinusoid(t - 1, self.config.channels).to(x.dtype))       # (B, E)
        emb = F.silu(time if emb is None else time + emb)

        # downsampling path: remember each output
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))          # (B, C, H, W)
        skips = [h]
        for level in self.down:
            for res, attention in zip(level.res, level.attn):
                h = attention(res(h, emb), context, mask)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, emb)                                         # H/2, W/2
                skips.append(h)

        # middle
        h = self.mid_res2(self.mid_attn(self.mid_res1(h, emb), context, mask), emb)

        # upsampling path: skip connections, the latest output first
        for level in self.up:
            for res, attention in zip(level.res, level.attn):
                h = torch.cat([h, skips.pop()], dim=1)
                h = attention(res(h, emb), context, mask)
            if level.resample is not None:
                h = level.resample(h, emb)                                         # 2H, 2W

        # output
        return self.conv_out(F.silu(self.norm_out(h)))                             # (B, out, H, W)


class Level(nn.Module):
    """One resolution of a path: res blocks, attention after each, and maybe a resampling block."""

    def __init__(self, c_ins, C, size, config, resample):
        super().__init__()
        self.res, self.attn = nn.ModuleList(), nn.ModuleList()
        for c_in in c_ins:
            self.res.append(ResBlock(c_in, C, config))
            self.attn.append(Attention(C, config) if size in config.attention else NoAttention())
        self.resample = ResBlock(C, C, config, resample) if resample else None


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, conv, norm, SiLU, conv; plus the input.   ADM sec. 3 and its code

    The timestep embedding sets scale and shift of the second norm (AdaGN), or is added before it.
    """

    def __init__(self, c_in, c_out, config, resample=None):
        super().__init__()
        c, self.config, self.resample = config, config, resample
        self.norm1, self.norm2 = nn.GroupNorm(c.groups, c_in), nn.GroupNorm(c.groups, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.emb = nn.Linear(4 * c.channels, 2 * c_out if c.scale_shift else c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):                               # (B, C_in, H, W), (B, E) after SiLU
        h = F.silu(self.norm1(x))
        if self.resample == "down":                          # on both branches
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)                      # (B, C_in, H/2, W/2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        h = self.conv1(h)                                                      # (B, C, H, W)

        # the timestep (and z_i, the caption)
        emb = self.emb(emb)[:, :, None, None]                                  # (B, C or 2C, 1, 1)
        if self.config.scale_shift:
            scale, shift = emb.chunk(2, dim=1)                                 # (B, C, 1, 1) each
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = F.dropout(F.silu(h), self.config.dropout, self.training)
        return self.skip(x) + self.conv2(h)                                    # (B, C, H, W)


class Attention(nn.Module):
    """Each pixel attends to the context and to all pixels:  x + proj(attention(norm(x)))"""

    def __init__(self, channels, config):
        super().__init__()
        c, self.heads, X = config, channels // config.head_channels, config.context_width
        if channels % c.head_channels:
            raise ValueError(f"no multiple of head_channels, got {channels} and {c.head_channels}")
        self.norm = nn.GroupNorm(config.groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context = nn.Linear(X, 2 * channels) if X else None
        self.proj = zero(nn.Linear(channels, channels))

    def forward(self, x, context=None, mask=None):           # (B, C, H, W), (B, K, X), (B, K) bool
        h = self.norm(x).flatten(2).transpose(1, 2)                            # (B, H W, C)
        q, k, v = self.qkv(h).chunk(3, dim=2)                                  # (B, H W, C) each

        # cross-attention
        if context is not None:
            context_k, context_v = self.context(context).chunk(2, dim=2)       # (B, K, C) each
            k = torch.cat([context_k, k], dim=1)                               # (B, K + H W, C)
            v = torch.cat([context_v, v], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, h.shape[1]), value=True)[:, None, None]     # (B, 1, 1, K + H W)

        h = self.proj(clip.attend(q, k, v, self.heads, mask))                  # (B, H W, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])                 # (B, C, H, W)


class NoAttention(nn.Module):
    def forward(self, x, context=None, mask=None):           # at the other resolutions
        return x


def zero(layer):
    """A layer that starts at zero: its residual branch adds nothing, or the U-Net predicts 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ---------------------------------------------------------------- sizes   (unCLIP table 3)
@dataclass
class UNetConfig:
    """Sizes of a U-Net; in the comments the paper's decoder and two upsamplers."""
    size: int = 16                  # px of the image it makes: 64, 256, 1024
    in_channels: int = 3            # 3, 6, 6 (noisy image, enlarged small image)
    out_channels: int = 6           # a prediction, then its variance; 3: no variance
    channels: int = 64              # 512, 320, 192
    mults: tuple = (1, 2, 3)        # times `channels`, per level: 1,2,3,4   1,2,3,4   1,1,2,2,4,4
    depth: int = 1                  # res blocks per resolution: 3, 3, 2
    attention: tuple = ()           # px of the levels with attention: (32, 16, 8), none, none
    head_channels: int = 64
    context_width: int = 0          # X, 2048, none, none
    scale_shift: bool = True        # AdaGN; False: the timestep is only added (Karlo's upsamplers)
    dropout: float = 0.0            # 0.1, 0.1, 0
    groups: int = 32                # of GroupNorm; fewer than channels, which else lose their mean


@dataclass
class DecoderConfig:
    """Sizes near the toy's (see `unclip.PRESETS`); in the comments the paper's. The toy's
    U-Net is wide where it attends; what that buys is in extras/README.md."""
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(
        size=16, channels=16, mults=(1, 3, 4), attention=(8, 4), head_channels=16,
        context_width=64, groups=8))
    embed_dim: int = 64             # D of z_i, 1024
    vocab_size: int = 600           # 16384
    context: int = 20               # tokens, 256
    text_layers: int = 2            # 24; 0: CLIP's hidden states instead (toy)
    text_heads: int = 2             # 32
    text_width: int = 128           # of CLIP's hidden states (where text_layers is 0)
    drop_text: float = 0.5          # of the captions in training; the toy: 0.25
    T: int = 1000
    schedule: str = "cosine"        # the noise schedule: cosine, linear
    predicts: str = "eps"           # eps, x0 or v; the toy: "v"


@dataclass
class UpsamplerConfig:
    """Sizes of an upsampler, the toy's first; in the comments the paper's two."""
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(
        size=64, in_channels=6, out_channels=3, channels=16, mults=(1, 2, 2), groups=2))
    T: int = 1000
    schedule: str = "cosine"        # cosine, linear
    degradation: str = "blur"       # of the small image in training: blur, bsr
    predicts: str = "eps"           # the toy: "x0"
    residual: bool = False          # x0 is predicted as a correction of the enlarged image


# ---------------------------------------------------------------- degradations
# An upsampler shall not trust every pixel of what another network drew: it trains on worse images.
def shrink(x, size):
    """Area downsampling, each pixel the mean of a block: (B, 3, H, H) -> (B, 3, size, size)."""
    H, W = x.shape[2:]
    if H != W or H % size:
        raise ValueError(f"expected squares of side k * {size}, got {H} x {W}; crop them first")
    return F.avg_pool2d(x, H // size)                                # (B, 3, size, size)


def enlarge(low, size):
    """The upsampler's second input: low, clamped and enlarged (bicubic; antialias: a = -0.5)."""
    low = low.to(torch.promote_types(low.dtype, torch.float32)).clamp(-1, 1)    # at least float32
    return F.interpolate(low, (size, size), mode="bicubic", antialias=True)


def crop_pair(high, low, crop):
    """One random crop per example, the same in both images, drawn on the low-res grid.   App. C

    high (B, 3, k h, k w), low (B, 3, h, w) -> (B, 3, crop, crop), (B, 3, crop / k, crop / k), crop
    a multiple of k that fits. ValueError, too, where high is smaller than low.
    """
    h, w = low.shape[2:]
    k = max(1, high.shape[2] // h)
    side = crop // k                                                 # in pixels of low
    if high.shape[2:] != (k * h, k * w) or crop % k or side > min(h, w):
        raise ValueError(f"expected a multiple of k that fits; got {crop}, {[*high.shape]}")

    top = torch.randint(h - side + 1, (len(high),)).tolist()
    left = torch.randint(w - side + 1, (len(high),)).tolist()

    def cut(images, n):                                              # n pixels per pixel of low
        return torch.stack([x[:, n * i:n * (i + side), n * j:n * (j + side)]
                            for x, i, j in zip(images, top, left)])
    return cut(high, k), cut(low, 1)


def gaussian_blur(x, sigma=0.6, radius=1, centre=0.0, stride=1):
    """The first upsampler's blur, sigma a std: (B, 3, H, W), of its size if stride = 1.   App. C"""
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64) - centre
    weights = (-offset ** 2 / (2 * sigma ** 2)).softmax(0)           # (2 radius + 1,), sum 1
    return filter2d(x, torch.outer(weights, weights), stride)


def filter2d(x, kernel, stride=1):
    """Weighted mean of the neighbours, one kernel for every channel; mirrored at the edges."""
    radius, C = len(kernel) // 2, x.shape[1]
    x = F.pad(x, [radius] * 4, mode="reflect")
    kernel = kernel.to(x).expand(C, 1, *kernel.shape)                # (C, 1, size, size)
    return F.conv2d(x, kernel, stride=stride, groups=C)


# ---------------------------------------------------------------- BSR   (skip at first reading)
# LDM's moderate variant of BSRGAN, x4. Inside, images are (1, 3, ., .) in [0, 1].
def bsr_degrade(image, rng):
    """The second upsampler's degradation: (3, H, W) in [-1, 1] -> (3, H / 4, W / 4), on the CPU."""
    H, W = image.shape[1:]
    if H % 4 or W % 4 or min(H, W) < 64 or image.abs().max() > 1:
        raise ValueError(f"expected sides 4 k >= 64 in [-1, 1], got {[H, W]}, {image.aminmax()}")
    x, factor = (image[None].float() + 1) / 2, 4                     # (1, 3, H, W) in [0, 1]

    # a quarter of the images is halved first
    if rng.random() < 0.25:
        factor, half = 2, (H // 2, W // 2)
        x = (random_resize(x, half, rng) if rng.random() < 0.5 else
             F.interpolate(x, half, mode="bicubic", antialias=True).clamp(0, 1))

    # five steps in random order, the exact resize, "fit", after "downsample"; at last JPEG again
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


def random_blur(x, factor, rng):
    """A Gaussian, half of the time longer in one direction. Even kernels would shift images."""
    if rng.random() < 0.5:
        radius, angle = int(rng.integers(5, 15)) // 2, np.pi * rng.random()
        var = (4 + factor) / 4 * (1 - rng.random(2))                 # along and across; never 0
    else:
        radius, angle = int(rng.integers(5, 8)) // 2, 0.0
        var = np.full(2, (2 + 0.2 * factor) / 4 * (1 - rng.random())) ** 2

    dx = torch.arange(-radius, radius + 1, dtype=torch.float64)
    dy = dx[:, None]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    log_weight = -along ** 2 / (2 * var[0]) - across ** 2 / (2 * var[1])     # (size, size)
    return filter2d(x, log_weight.flatten().softmax(0).view_as(log_weight))


def random_resize(x, size, rng):
    """To size = (h, w) by a random method; bilinear and bicubic without antialias, as in OpenCV."""
    mode = ("bilinear", "bicubic", "area")[rng.integers(3)]
    return F.interpolate(x, size, mode=mode).clamp(0, 1)


def random_downsample(x, factor, rng):
    """Mostly a resize by a wrong factor; else a blur, and one pixel of every block is kept."""
    if rng.random() < 0.8:
        scale = rng.uniform(1, 2 * factor)
        return random_resize(x, (int(x.shape[2] / scale), int(x.shape[3] / scale)), rng)
    sigma, centre = rng.uniform(0.1, 0.6 * factor), (factor - 1) / 2         # of the block
    return gaussian_blur(x, sigma, 12, centre, stride=factor)


def random_noise(x, rng):
    """Sensor noise of 1 or 2 levels of 255: per channel, grey, or correlated (A^T D A)."""
    C, H, W = x.shape[1:]
    std, kind = rng.integers(1, 3) / 255, rng.random()
    mix = np.eye(C) if kind < 0.4 else np.ones((C, 1))               # each its own, or grey
    if kind >= 0.8:
        A = np.linalg.svd(rng.random((C, C)))[0]                     # some orthogonal matrix
        std, mix = 2 / 255, A.T * np.sqrt(rng.random(C))             # mix mix^T = A^T D A
    mix = torch.from_numpy(std * mix).float()                        # (C, sources)
    noise = torch.from_numpy(rng.standard_normal((mix.shape[1], H * W), dtype=np.float32))
    return (x + (mix @ noise).view(1, C, H, W)).clamp(0, 1)


def random_jpeg(x, rng):
    """Save as JPEG of quality 80..95, in memory, and open it again."""
    pixels, file = (255 * x[0]).round().byte().permute(1, 2, 0), io.BytesIO()   # (H, W, 3)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=int(rng.integers(80, 96)))
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255


# ---------------------------------------------------------------- demo: python decoder.py
@torch.no_grad()
def demo(out=None):
    """One image denoised: what the decoder receives at eight timesteps, and what it predicts."""
    import unclip                                # a later chapter: only the demo imports it
    model, generator = unclip.load(unclip.HERE / "weights/toy.pt"), torch.Generator().manual_seed(0)
    text = model.encode_text(["a small red circle above a large blue square"])
    z_i = model.sample_prior(text, generator=generator)
    part, steps = model.parts["decoder"], []
    network = part.denoiser(z_i, text, guidance=2.0)

    def watched(x_t, t):
        out = network(x_t, t)
        x0 = diffusion.to_x0(part.alphabar, out[:, :3], x_t, t, part.config.predicts)
        steps.append((t, x_t.clamp(-1, 1), x0.clamp(-1, 1)))
        return out

    part.denoiser = lambda *_: watched
    part.sample(z_i, text, steps=50, generator=generator)
    ts, noisy, predicted = zip(*steps[::7])
    for t, x0 in zip(ts, predicted):
        print(f"t = {t:4}, rms to the last x0 {(x0 - predicted[-1]).pow(2).mean().sqrt():.2f}")
    if out:                                      # above x_t, below the x0 predicted from it
        sheet = F.interpolate(torch.cat(noisy + predicted), scale_factor=8.0)
        unclip.save_grid(sheet, out, columns=len(ts))


if __name__ == "__main__":
    unclip.run_demo(demo, "also write the images")
