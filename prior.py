"""The prior: what would CLIP make of an image of this caption?   P(z_i | y), unCLIP sec. 2.2

Two answers to the same question, with the same interface (`loss` to train, `sample` to use):

    DiffusionPrior   noise -> z_i by diffusion, with a causal Transformer that predicts z_i
    ARPrior          z_i as a sequence of codes: its principal components, quantised, one by one

Both take a clip.Text: the tokens of the captions, and CLIP's embedding z_t of them (here t is for
text, not for time). Both return unit vectors.

    B batch   L caption tokens   W width   D width of z   K principal components

Paper: unCLIP (Ramesh et al. 2022) sec. 2.2 and appendix C.
"""
import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import clip
import diffusion
from clip import unit

# ---------------------------------------------------------------- diffusion prior


@dataclass
class DiffusionPriorConfig:
    """Sizes of the toy's diffusion prior; in the comments the paper's (unCLIP table 3)."""
    embed_dim: int = 64             # D, 1024
    vocab_size: int = 600           # 16384
    context: int = 20               # L caption tokens, 256
    width: int = 128                # 2048
    layers: int = 4                 # 24
    heads: int = 4                  # 32
    T: int = 1000
    schedule: str = "cosine"
    predicts: str = "x0"            # z_i itself is better than the noise in it (sec. 2.2)


class DiffusionPrior(nn.Module):
    """A causal Transformer over [caption, z_t, timestep, noised z_i, query].   Sec. 2.2

    The output at the query, which attends to all the others, is the prediction. Diffusion happens
    in a scaled space: unit vectors times 17.2 sqrt(D / 1024), so that their elements vary as much
    as pixels do (app. C).
    """
    drop_rate = 0.1                 # of the captions in training, for classifier-free guidance
    clamp = None                    # of x0 when sampling; embeddings have no range

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        with torch.device("cpu"):                      # the schedule stays there, as float64
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        self.norm = 17.2 * math.sqrt(c.embed_dim / 1024)                       # in the scaled space

        # one embedding for each kind of token, and their positions
        self.tok = nn.Embedding(c.vocab_size, c.width)
        self.pad = nn.Parameter(torch.randn(c.context, c.width) * 0.01)        # in place of padding
        self.text_in = nn.Linear(c.embed_dim, c.width)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.image_in = nn.Linear(c.embed_dim, c.width)
        self.query = nn.Parameter(torch.randn(c.width) * 0.01)
        self.pos = nn.Parameter(torch.randn(c.context + 4, c.width) * 0.01)
        nn.init.normal_(self.tok.weight, std=0.02)

        self.blocks = clip.blocks(c.layers, c.width, c.heads)
        self.ln_out, self.out = nn.LayerNorm(c.width), nn.Linear(c.width, c.embed_dim)
        self.register_buffer("cov", torch.zeros(c.T + 1))      # see fit_variance; 0: "small"

    def forward(self, x_t, t, text, cache=None):
        """x_t (B, D) in the scaled space, t int or (B,) in 1..T, captions -> prediction (B, D).

        cache: one empty clip.KVCache for each block, for calls that differ in x_t and t alone. The
        mask is causal, so caption and z_t never attend to x_t and t: the first call computes their
        keys and values, later ones run three tokens. 16 steps of 8 toy captions then take 43 ms in
        place of 112, 25 steps at Karlo's size (L = 77, W = 2048) a sixth (one CPU core).
        """
        t = t + torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)     # (B,), of an int too
        dtype = self.pos.dtype

        # the tokens that change from step to step
        time = self.time(clip.sinusoid(t - 1, self.config.width).to(dtype))    # (B, W)
        query = self.query.expand_as(time)
        x = torch.stack([time, self.image_in(x_t.to(dtype)), query], dim=1)    # (B, 3, W)

        # before them caption and z_t, unless their keys and values are known
        if not cache or cache[0].length == 0:
            x = torch.cat([self.prefix(text), x], dim=1)                       # (B, L + 4, W)
        x = x + self.pos[-x.shape[1]:]

        mask = self.attention_mask(text, rows=x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, mask, cache=cache[i] if cache else None)
        for layer in cache or []:
            layer.length -= 3                                                  # forget this step
        return self.out(self.ln_out(x[:, -1])).float()                         # (B, D)

    def prefix(self, text):
        """[caption, z_t], the tokens that no timestep changes: (B, L + 1, W)."""
        words = torch.where(text.mask[:, :, None], self.tok(text.tokens), self.pad)    # (B, L, W)
        z_t = self.text_in(self.scale(text.z_t).to(words.dtype))               # (B, W), null: of 0
        return torch.cat([words, z_t[:, None]], dim=1)

    def attention_mask(self, text, rows):
        """Causal, of the last `rows` tokens: (1, 1, rows, L + 4) bool, True where they attend."""
        S = text.mask.shape[1] + 4
        mask = torch.ones(rows, S, dtype=torch.bool, device=text.mask.device)
        return mask.tril(S - rows)[None, None]

    def scale(self, z):
        """CLIP embeddings (B, D), brought to length 1, -> the space of the diffusion (B, D)."""
        return unit(z) * self.norm

    def unscale(self, x):
        """Back again: (B, D) -> unit vectors, as the decoder receives them."""
        return unit(x)

    def null(self, text):
        """The null condition of guidance: no caption, B times."""
        return text.null()

    def loss(self, z_i, text, t=None):
        """z_i (B, D) -> (B,). 10 % of the captions are dropped, tokens and z_t together.   Sec. 2.2

        Expect 0.2889 (17.2^2 / 1024) from a model that predicts x0 = 0. t: see diffusion.loss.
        """
        keep = torch.rand(len(z_i), device=z_i.device) >= self.drop_rate
        text = text.drop(keep)
        return diffusion.loss(lambda x_t, t: self(x_t, t, text), self.alphabar, self.scale(z_i),
                              self.config.predicts, t)

    def denoiser(self, text, guidance=1.0):
        """(x_t, t) -> prediction, the captions bound; guided: 2B rows, without and with them."""
        if guidance != 1:
            text = text.after(self.null(text))                                 # (2 B, ...)
        cache = [clip.KVCache(text.mask.shape[1] + 4) for _ in self.blocks]
        return diffusion.guided(lambda x_t, t: self(x_t, t, text, cache), guidance,
                                self.config.embed_dim)

    @torch.no_grad()
    def sample(self, text, steps=64, guidance=1.0, candidates=2, generator=None, progress=None):
        """text (B captions) -> z_i (B, D): of some candidates the nearest to z_t.   Sec. 2.2"""
        many = text.map(lambda x: x.repeat_interleave(candidates, dim=0))      # (B n, ...)
        noise = diffusion.noise_like(many.z_t.float(), generator)              # (B n, D)
        x = diffusion.sample(self.denoiser(many, guidance), self.alphabar, noise,
                             diffusion.spaced_timesteps(self.config.T, steps),
                             predicts=self.config.predicts, clamp=self.clamp,
                             variance=self.cov.cpu().double(), generator=generator,
                             progress=progress)

        z = self.unscale(x).unflatten(0, (-1, candidates))                     # (B, n, D)
        similarity = (unit(z) * unit(text.z_t.float())[:, None]).sum(2)        # (B, n)
        return z[torch.arange(len(z)), similarity.argmax(1)]                   # (B, D)

    @torch.no_grad()
    def fit_variance(self, z_i, text, steps=64, generator=None):
        """Measure the error of the predictions at each timestep, for Analytic-DPM's variance.

        z_i (N, D) and their captions; run once, on the trained model.   App. C
        """
        timesteps = diffusion.spaced_timesteps(self.config.T, steps)
        x0 = self.scale(z_i)
        cov = diffusion.measure_cov(self.denoiser(text), self.alphabar, x0, timesteps, generator,
                                    self.config.predicts)
        self.cov.copy_(cov.clamp(0, x0.pow(2).mean().item()))      # predicting 0 would be no worse


# ---------------------------------------------------------------- autoregressive prior


@dataclass
class ARPriorConfig:
    """Sizes of the toy's AR prior; in the comments the paper's (unCLIP table 3, sec. 2.2)."""
    embed_dim: int = 64             # D, 1024
    components: int = 32            # K principal components, 319; training takes what 99 % need
    buckets: int = 64               # codes per component, 1024
    vocab_size: int = 600           # 16384
    context: int = 20               # L caption tokens, 256
    text_width: int = 128           # 2048
    text_layers: int = 2            # 24
    text_heads: int = 2             # 32
    width: int = 128                # 1664
    layers: int = 3                 # 24
    heads: int = 2                  # 26


class ARPrior(nn.Module):
    """z_i as a sequence of codes, each predicted from caption, z_t and the codes before.   Sec. 2.2

        [z_t, dot, c_1, ..., c_K-1]  ->  predictions of c_1, ..., c_K, from the dot token on
    c_k is the k-th principal component of z_i, quantised into one of the equally full buckets.
    dot is z_i . z_t, quantised too: true in training, drawn from the top half when sampling, which
    asks for an image that fits its caption. A text encoder of its own turns the caption into keys
    and values for cross-attention in every block.
    """
    drop_rate = 0.1                 # of the captions in training, for classifier-free guidance

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        self.text = clip.CaptionEncoder(c.vocab_size, c.context, c.text_width, c.text_layers,
                                        c.text_heads)
        self.text_in = nn.Linear(c.embed_dim, c.width)
        self.dot = nn.Embedding(c.buckets, c.width)
        self.code = nn.Embedding(c.buckets, c.width)
        self.pos = nn.Parameter(torch.randn(c.components + 1, c.width) * 0.01)
        nn.init.normal_(self.dot.weight, std=0.02)
        nn.init.normal_(self.code.weight, std=0.02)
        self.blocks = clip.blocks(c.layers, c.width, c.heads, context_width=c.text_width)
        self.ln_out, self.out = nn.LayerNorm(c.width), nn.Linear(c.width, c.buckets)

        # the quantisation, set by fit_codes
        edges, values = torch.linspace(-1, 1, c.buckets + 1)[1:-1], torch.linspace(-1, 1, c.buckets)
        self.register_buffer("mean", torch.zeros(c.embed_dim))
        self.register_buffer("basis", torch.eye(c.embed_dim, c.components))
        self.register_buffer("edges", edges.repeat(c.components, 1))
        self.register_buffer("values", values.repeat(c.components, 1))
        self.register_buffer("dot_edges", edges)

    def forward(self, codes, dot, text, cache=None):
        """Logits of each next code, given those before it and the caption.

        codes (B, n) the first n of K, dot (B,) -> logits (B, n + 1, buckets): [:, k] of c_k+1 given
        c_1..c_k. (All K codes -> (B, K, buckets): the last is not needed.)
        cache: one empty clip.KVCache for each block, for calls that add one code each: later ones
        return the newest logits alone, (B, 1, buckets). 19 codes of 8 toy captions: 30 ms, not 138.
        """
        codes = codes[:, :self.config.components - 1]
        n = codes.shape[1]
        if cache and cache[0].length:
            x, mask, context = self.code(codes[:, -1:]) + self.pos[n + 1], None, None    # (B, 1, W)
        else:
            z_t = (unit(text.z_t) * math.sqrt(self.config.embed_dim)).to(self.pos.dtype)
            start = torch.stack([self.text_in(z_t), self.dot(dot)], dim=1)     # (B, 2, W)
            x = torch.cat([start, self.code(codes)], dim=1) + self.pos[:n + 2]
            context = self.text(text.tokens, text.mask)                        # (B, L, text width)
            L = context.shape[1]
            mask = torch.ones(n + 2, L + n + 2, dtype=torch.bool, device=x.device)
            mask = mask.tril(L)[None, None]                                    # causal after L

        for i, block in enumerate(self.blocks):
            x = block(x, mask, context=context, cache=cache[i] if cache else None)
        if mask is not None:
            x = x[:, 1:]                                           # from the dot token on
        return self.out(self.ln_out(x)).float()

    def loss(self, z_i, text):
        """z_i (B, D) -> (B,): mean cross-entropy of the codes in nats; 10 % of captions dropped.

        Expect log(buckets) from a model that knows nothing.
        """
        codes, dot = self.encode(z_i), self.dot_code(z_i, text.z_t)            # (B, K), (B,)
        keep = torch.rand(len(z_i), device=z_i.device) >= self.drop_rate
        logits = self(codes, dot, text.drop(keep)).transpose(1, 2)             # (B, buckets, K)
        return F.cross_entropy(logits, codes, reduction="none").mean(1)

    @torch.no_grad()
    def sample(self, text, temperature=1.0, guidance=1.0, generator=None, progress=None):
        """text (B captions) -> z_i (B, D), code by code.   ValueError unless temperature > 0

        A code is the largest of logits / temperature + Gumbel noise: a sample of their softmax.
        """
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}; 1e-4 takes the "
                             "likeliest codes")
        c, B, device = self.config, len(text.tokens), text.z_t.device

        # all random numbers; the dot code is one of the top half
        dot = diffusion.draw(
            lambda n, **where: torch.randint(c.buckets // 2, c.buckets, (n,), **where),
            B, generator, device)
        noise = diffusion.draw(
            lambda n, **where: torch.rand(c.components, n, c.buckets, **where),
            B, generator, device, dim=1)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()                        # (K, B, buckets)

        if guidance != 1:
            text, dot = text.after(text.null()), dot.repeat(2)                 # (2 B, ...)
        cache = [clip.KVCache(text.mask.shape[1] + 1 + c.components) for _ in self.blocks]
        codes = dot.new_empty(B, 0)
        for k in tqdm(range(c.components), desc=progress, leave=False, disable=progress is None):
            logits = self(codes.repeat(len(dot) // B, 1), dot, text, cache)[:, -1]
            if guidance != 1:
                logits = diffusion.guide(*logits.chunk(2), guidance)           # (B, buckets)
            code = (logits / temperature + gumbel[k]).argmax(1, keepdim=True)  # (B, 1)
            codes = torch.cat([codes, code], dim=1)                            # (B, k + 1)
        return self.decode(codes)

    @torch.no_grad()
    def fit_codes(self, z_i, z_t):
        """Choose components, buckets and their values from data, z_i, z_t (N, D): before training.

        Fills mean, basis (`principal_components` tells how many the config should have); edges, of
        z_i's components, and dot_edges, of the cosines, by `quantile_edges`; and values, the mean
        of each bucket, or of an empty one the cut below it.   ValueError if N < buckets or K > D.
        """
        c = self.config
        if c.components > c.embed_dim:
            raise ValueError(f"expected at most as many components as dimensions, {c.embed_dim}, "
                             f"got {c.components}")
        if len(z_i) < c.buckets:
            raise ValueError(f"expected at least as many embeddings as buckets, {c.buckets}, got "
                             f"{len(z_i)}; use fewer buckets")

        mean, basis = principal_components(z_i, keep=1.0)
        self.mean.copy_(mean)
        self.basis.copy_(basis[:, :c.components])

        y = (unit(z_i) - self.mean) @ self.basis                               # (N, K)
        dots = (unit(z_i) * unit(z_t)).sum(1, keepdim=True)                    # (N, 1)
        self.edges.copy_(quantile_edges(y, c.buckets))
        self.dot_edges.copy_(quantile_edges(dots, c.buckets)[0])

        codes = self.encode(z_i)                                               # (N, K)
        for k in range(c.components):
            count = torch.bincount(codes[:, k], minlength=c.buckets)           # (buckets,)
            total = torch.bincount(codes[:, k], y[:, k], minlength=c.buckets)
            lower = F.pad(self.edges[k], (1, 0), value=float(y[:, k].min()))   # for empty buckets
            self.values[k] = torch.where(count > 0, total / count.clamp(min=1), lower)

    @torch.autocast("cuda", enabled=False)       # in bf16 half of the paper's codes would be others
    @torch.autocast("cpu", enabled=False)
    def encode(self, z):
        """z (B, D) -> codes (B, K) in 0..buckets-1: how many cuts of edges[k] are not above y_k.

        y = (unit(z) - mean) basis, the components.
        """
        y = (unit(z) - self.mean) @ self.basis                                 # (B, K)
        return torch.searchsorted(self.edges, y.T.contiguous(), right=True).T

    def decode(self, codes):
        """codes (B, K) -> unit z (B, D): each code becomes the mean of its bucket."""
        y = self.values[torch.arange(codes.shape[1], device=codes.device), codes]         # (B, K)
        return unit(self.mean + y @ self.basis.T)

    def dot_code(self, z_i, z_t):
        """z_i, z_t (B, D) -> (B,) in 0..buckets-1, the cosine, quantised as in `encode`."""
        return torch.bucketize((unit(z_i) * unit(z_t)).sum(1), self.dot_edges, right=True)


def principal_components(z, keep=0.99):
    """The directions in which unit(z) varies, most important first.   unCLIP sec. 2.2

    As many as keep that fraction of the variance (1: all D, even if N < D):  z (N, D) -> mean (D,),
    basis (D, K) with orthonormal columns, float32 on the CPU.
    """
    z = unit(z.cpu().double())
    mean = z.mean(0)
    power, basis = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))       # ascending
    power, basis = power.flip(0), basis.flip(1)
    K = int((power.cumsum(0) < keep * power.sum()).sum()) + 1 if keep < 1 else len(power)
    return mean.float(), basis[:, :K].float()


def quantile_edges(y, buckets):
    """Quantiles of y, which cut it into equally full buckets: y (N, K) -> (K, buckets - 1).

    A cut is the smallest number of the bucket above it: number i N // buckets of N sorted ones.
    """
    first = torch.arange(1, buckets, device=y.device) * len(y) // buckets      # of every bucket
    return y.sort(0).values[first].T.contiguous()


# ---------------------------------------------------------------- demo: python prior.py

CAPTIONS = ("a small red circle above a large blue square", "a large blue square",
            "a small green cross above a large blue square", "a large yellow triangle")


def save_lines(path, timesteps, cosines):
    """cosines (steps, captions) of x_t along the trajectory, as a PNG file."""
    import unclip                                # a later chapter, which only the demo imports
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(timesteps, cosines, label=CAPTIONS)
    axes.set(xlabel="timestep t (sampling goes to the right)", ylabel="cosine of x_t to CLIP's z_t",
             xlim=(timesteps[0], 0), title=f"sampling z_i for {CAPTIONS[0]!r}")
    axes.legend(loc="upper left")
    unclip.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def demo(output=None, steps=64):
    """One z_i is sampled step by step: to which of four captions does it come near?"""
    import unclip
    model = unclip.load(unclip.HERE / "weights/toy.pt")
    prior, text = model.parts["diffusion_prior"], model.encode_text(CAPTIONS)
    network, table = prior.denoiser(text.map(lambda x: x[:1])), prior.alphabar
    timesteps, predicts = diffusion.spaced_timesteps(prior.config.T, steps), prior.config.predicts
    print(f"sampling z_i for {CAPTIONS[0]!r}; how near is it to CLIP's embedding of\n")
    print("\n".join(f"    {k}  {words}" for k, words in enumerate(CAPTIONS, start=1)))
    print(f"\ncosine of x_t to {1:6}{'':19}{2:6}{3:6}{4:6}        of the predicted z_i: 1, 2, 3, 4")
    rows = []

    def cosines(x):
        return (unit(prior.unscale(x)) @ unit(text.z_t).T)[0].tolist()         # to each caption

    def watch(x_t, t):
        out = network(x_t, t)
        now, later = cosines(x_t), cosines(diffusion.to_x0(table, out, x_t, t, predicts))
        rows.append(now)
        if timesteps.index(t) % 7 == 0:
            print(f"t = {t:4d}         {now[0]:6.2f} {'#' * round(18 * max(0, now[0])):18}"
                  + "".join(f"{c:6.2f}" for c in now[1:]) + " " * 8
                  + "".join(f"{c:6.2f}" for c in later))
        return out

    x = torch.randn(1, prior.config.embed_dim, generator=torch.Generator().manual_seed(0))
    z = diffusion.sample(watch, table, x, timesteps, predicts=predicts,
                         variance=prior.cov.cpu().double(),
                         generator=torch.Generator().manual_seed(1))
    if output:
        save_lines(output, [*reversed(timesteps), 0], [*rows, cosines(z)])


if __name__ == "__main__":
    import unclip
    parser = argparse.ArgumentParser(description=demo.__doc__, allow_abbrev=False)
    parser.add_argument("-o", "--out", metavar="FILE.png", help="also draw the cosines")
    unclip.stop_on_error(demo, parser.parse_args().out)
