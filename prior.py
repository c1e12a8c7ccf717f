"""The prior: what would CLIP make of an image of this caption?   P(z_i | y), unCLIP sec. 2.2

Two answers to the same question, with the same interface (`loss` to train, `sample` to use):

    DiffusionPrior   noise -> z_i by diffusion, with a causal Transformer that predicts z_i
    ARPrior          z_i as a sequence of codes: its principal components, quantised, one by one

Both take a clip.Text: the tokens of the captions, and CLIP's embedding z_t of them (here t is for
text, not for time). Both return unit vectors.   unCLIP (Ramesh et al. 2022) sec. 2.2, appendix C

    B batch   L caption tokens   W width   D width of z   K principal components
"""
if __name__ == "__main__":
    import unclip                    # first: Ctrl-C is one line from then on

import math
from dataclasses import dataclass
from functools import partial

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

    The output at the query, which attends to all the others, is the prediction. The diffusion is
    of scaled unit vectors, 17.2 sqrt(D / 1024) long: their elements vary as pixels do (app. C).
    """
    drop_rate = 0.1                 # of the captions in training, for classifier-free guidance
    clamp = None                    # of x0 when sampling; embeddings have no range

    def __init__(self, config):
        super().__init__()
        c, W, self.config = config, config.width, config
        with torch.device("cpu"):                      # the schedule stays there, as float64
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        self.norm = 17.2 * math.sqrt(c.embed_dim / 1024)                       # in the scaled space

        # one embedding for each kind of token, and their positions
        self.tok = nn.Embedding(c.vocab_size, W)
        self.pad = nn.Parameter(torch.randn(c.context, W) * 0.01)        # in place of padding
        self.text_in = nn.Linear(c.embed_dim, W)
        self.time = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W))
        self.image_in = nn.Linear(c.embed_dim, W)
        self.query = nn.Parameter(torch.randn(W) * 0.01)
        self.pos = nn.Parameter(torch.randn(c.context + 4, W) * 0.01)
        nn.init.normal_(self.tok.weight, std=0.02)

        self.blocks = clip.blocks(c.layers, W, c.heads)
        self.ln_out, self.out = nn.LayerNorm(W), nn.Linear(W, c.embed_dim)
        self.register_buffer("cov", torch.zeros(c.T + 1))      # x0's error, of fit_variance

    def forward(self, x_t, t, text, cache=None):
        """x_t (B, D) in the scaled space, t int or (B,) in 1..T, captions -> prediction (B, D).

        cache: an empty clip.KVCache for each block, kept between calls that share the text. Caption
        and z_t do not see x_t: they are computed once, 6 times as fast at Karlo's size.
        """
        t = t + torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)     # (B,), of an int too
        dtype = self.pos.dtype

        # the tokens that change from step to step, (B, 3, W)
        time = self.time(clip.sinusoid(t - 1, self.config.width).to(dtype))    # (B, W)
        x = torch.stack([time, self.image_in(x_t.to(dtype)), self.query.expand_as(time)], dim=1)

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
        z_t = self.text_in(self.scale(text.z_t).to(words.dtype))           # (B, W), of 0 if dropped
        return torch.cat([words, z_t[:, None]], dim=1)

    def attention_mask(self, text, rows):
        """Causal, of the last `rows` tokens: (1, 1, rows, L + 4) bool, True where they attend."""
        S = text.mask.shape[1] + 4
        return text.mask.new_ones(rows, S).tril(S - rows)[None, None]

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
        """z_i (B, D) -> (B,). text.drop(keep) drops tokens and z_t of 10 %, keep = torch.rand(B) >=
        drop_rate, drawn before anything else.   Sec. 2.2"""
        keep = torch.rand(len(z_i), device=z_i.device) >= self.drop_rate
        text = text.drop(keep)
        return diffusion.loss(lambda x_t, t: self(x_t, t, text), self.alphabar, self.scale(z_i),
                              self.config.predicts, t)     # x0 = 0 costs 17.2^2 / 1024 = 0.289

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
                             predicts=self.config.predicts, clamp=self.clamp, generator=generator,
                             variance=self.cov.cpu().double(), progress=progress)

        z = self.unscale(x).unflatten(0, (-1, candidates))                     # (B, n, D)
        similarity = (unit(z) * unit(text.z_t.float())[:, None]).sum(2)        # (B, n)
        return z[torch.arange(len(z)), similarity.argmax(1)]                   # (B, D)

    @torch.no_grad()
    def fit_variance(self, z_i, text, steps=64, generator=None):
        """Measure cov[t], the error of x0 at t, on z_i (N, D), for `step_variance`.   App. C"""
        x0, timesteps = self.scale(z_i), diffusion.spaced_timesteps(self.config.T, steps)
        cov = diffusion.measure_cov(self.denoiser(text), self.alphabar, x0, timesteps, generator,
                                    self.config.predicts)
        self.cov.copy_(cov.clamp(0, x0.pow(2).mean().item()))      # at most that of x0_hat = 0


# ---------------------------------------------------------------- autoregressive prior
@dataclass
class ARPriorConfig:
    """Sizes of the toy's AR prior; in the comments the paper's (unCLIP table 3, sec. 2.2)."""
    embed_dim: int = 64             # D, 1024
    components: int = 32            # K principal components, 319; train_toy keeps 99 % of variance
    buckets: int = 64               # codes per component, 1024
    vocab_size: int = 600           # 16384
    context: int = 20               # L caption tokens, 256
    text_width: int = 128           # 2048
    text_layers: int = 1            # 24
    text_heads: int = 2             # 32
    width: int = 128                # 1664
    layers: int = 3                 # 24
    heads: int = 2                  # 26


class ARPrior(nn.Module):
    """z_i as a sequence of codes, each predicted from caption, z_t and the codes before.   Sec. 2.2

        [z_t, dot, c_1, ..., c_(K-1)]  ->  predictions of c_1, ..., c_K, from the dot token on
    c_k is the k-th principal component of z_i, quantised into equally full buckets. dot is the
    cosine of z_i and z_t, quantised too: in sampling one of the top half, for an image that fits
    its caption. A text encoder of its own gives keys and values for cross-attention.
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

        codes (B, n) c_1 .. c_n, dot (B,) -> logits (B, min(n + 1, K), buckets): [:, k] is of code
        c_(k+1), given c_1 .. c_k.
        cache: one empty clip.KVCache for each block, for calls that add one code each: later ones
        return the newest logits alone, (B, 1, buckets).
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
            mask = text.mask.new_ones(n + 2, L + n + 2).tril(L)[None, None]    # causal after L

        for i, block in enumerate(self.blocks):
            x = block(x, mask, context=context, cache=cache[i] if cache else None)
        x = x if mask is None else x[:, 1:]                        # from the dot token on
        return self.out(self.ln_out(x)).float()

    def loss(self, z_i, text):
        """z_i (B, D) -> (B,) nats, log(buckets) at first. text.drop(keep) drops 10 %."""
        codes, dot = self.encode(z_i), self.dot_code(z_i, text.z_t)            # (B, K), (B,)
        keep = torch.rand(len(z_i), device=z_i.device) >= self.drop_rate
        logits = self(codes, dot, text.drop(keep)).transpose(1, 2)             # (B, buckets, K)
        return F.cross_entropy(logits, codes, reduction="none").mean(1)

    @torch.no_grad()
    def sample(self, text, temperature=1.0, guidance=1.0, generator=None, progress=None):
        """text -> z_i (B, D). A code is drawn from softmax(logits / temperature), as the
        argmax of logits / temperature + Gumbel noise."""
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}; try 1e-4")
        c, B, where = self.config, len(text.tokens), (generator, text.z_t.device)

        # all random numbers; the dot code is one of the top half
        dot = diffusion.draw(partial(torch.randint, c.buckets // 2, c.buckets), [B], *where)
        noise = diffusion.draw(torch.rand, [c.components, B, c.buckets], *where, dim=1)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()                        # (K, B, buckets)
        codes = dot.new_empty(B, 0)

        if guidance != 1:
            text, dot = text.after(text.null()), dot.repeat(2)                 # (2 B, ...)
        cache = [clip.KVCache(text.mask.shape[1] + 1 + c.components) for _ in self.blocks]
        for k in tqdm(range(c.components), desc=progress, leave=False, disable=progress is None):
            logits = self(codes.repeat(len(dot) // len(codes), 1), dot, text, cache)[:, -1]
            if guidance != 1:
                logits = diffusion.guide(*logits.chunk(2), guidance)           # (B, buckets)
            code = (logits / temperature + gumbel[k]).argmax(1, keepdim=True)  # (B, 1)
            codes = torch.cat([codes, code], dim=1)                            # (B, k + 1)
        return self.decode(codes)

    @torch.no_grad()
    def fit_codes(self, z_i, z_t):
        """Choose components, buckets and their values from data, z_i, z_t (N, D): before training.

        Fills mean and basis; edges (of the components) and dot_edges (of the cosines); and values,
        each the mean of a bucket, or its lower edge if empty.   ValueError if N < buckets or K > D.
        """
        N, D, K, buckets = len(z_i), *self.basis.shape, self.config.buckets
        if K > D:
            raise ValueError(f"expected at most as many components as dimensions, {D}, got {K}")
        if N < buckets:
            raise ValueError(f"expected at least as many embeddings as buckets, {buckets}, got {N}")

        mean, basis = principal_components(z_i, keep=1.0)
        self.mean[:], self.basis[:] = mean, basis[:, :K]
        y = (unit(z_i) - self.mean) @ self.basis                               # (N, K)
        dots = (unit(z_i) * unit(z_t)).sum(1, keepdim=True)                    # (N, 1)
        self.edges.copy_(quantile_edges(y, buckets))
        self.dot_edges.copy_(quantile_edges(dots, buckets)[0])

        codes = self.encode(z_i)                                               # (N, K)
        for k in range(K):
            count = torch.bincount(codes[:, k], minlength=buckets)             # (buckets,)
            total = torch.bincount(codes[:, k], y[:, k], minlength=buckets)
            lower = F.pad(self.edges[k], (1, 0), value=float(y[:, k].min()))   # for empty buckets
            self.values[k] = torch.where(count > 0, total / count.clamp(min=1), lower)

    @torch.autocast("cuda", enabled=False)       # in bf16 half of the codes would be wrong
    @torch.autocast("cpu", enabled=False)
    def encode(self, z):
        """z (B, D) -> codes (B, K) in 0..buckets-1: how many of edges[k] are not above y_k."""
        y = (unit(z.to(self.mean)) - self.mean) @ self.basis                   # (B, K)
        return torch.searchsorted(self.edges, y.T.contiguous(), right=True).T

    def decode(self, codes):
        """codes (B, K) -> unit z (B, D): each code becomes the mean of its bucket."""
        y = self.values.gather(1, codes.T).T                                   # (B, K)
        return unit(self.mean + y @ self.basis.T)

    def dot_code(self, z_i, z_t):
        """z_i, z_t (B, D) -> (B,) in 0..buckets-1, the cosine, quantised as in `encode`."""
        return torch.bucketize((unit(z_i) * unit(z_t)).sum(1), self.dot_edges, right=True)


def principal_components(z, keep=0.99):
    """The directions in which unit(z) varies, most important first: z (N, D) -> mean, basis (D, K).

    As many as keep that fraction of the variance (1: all D). float32 on the CPU.
    """
    z = unit(z.cpu().double())
    mean = z.mean(0)
    power, basis = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))       # ascending
    power, basis = power.flip(0), basis.flip(1)
    K = int((power.cumsum(0) < keep * power.sum()).sum()) + 1 if keep < 1 else len(power)
    return mean.float(), basis[:, :K].float()


def quantile_edges(y, buckets):
    """The smallest y of each equally full bucket but the first: (N, K) -> (K, buckets - 1)."""
    first = torch.arange(1, buckets, device=y.device) * len(y) // buckets      # i N // buckets
    return y.sort(0).values[first].T.contiguous()


# ---------------------------------------------------------------- demo: python prior.py
def demo(path=None, steps=64):
    """One z_i is sampled step by step: to which of four captions does it come near?"""
    import unclip                                # a later chapter, which only the demo imports
    captions = ("a small red circle above a large blue square", "a large blue square",
                "a small green cross above a large blue square", "a large yellow triangle")
    model = unclip.load(unclip.HERE / "weights/toy.pt")
    prior, text = model.parts["diffusion_prior"], model.encode_text(captions)
    network, predicts = prior.denoiser(text.map(lambda x: x[:1])), prior.config.predicts
    timesteps, rows = diffusion.spaced_timesteps(prior.config.T, steps), []

    print(f"sampling z_i for {captions[0]!r}; how near is it to CLIP's embedding of\n")
    print("\n".join(f"    {k}  {words}" for k, words in enumerate(captions, start=1)))
    print(f"\ncosine of x_t to {1:6}{'':19}{2:6}{3:6}{4:6}        of the predicted z_i: 1, 2, 3, 4")

    def watch(x_t, t):
        out = network(x_t, t)
        x0 = diffusion.to_x0(prior.alphabar, out, x_t, t, predicts)
        own, *others = (unit(torch.cat([x_t, x0])) @ unit(text.z_t).T).flatten().tolist()
        rows.append([own, *others[:3]])
        if timesteps.index(t) % 7 == 0:
            print(f"t = {t:4d}         {own:6.2f} {'#' * round(18 * max(0, own)):18}"
                  + "{:6.2f}{:6.2f}{:6.2f}        {:6.2f}{:6.2f}{:6.2f}{:6.2f}".format(*others))
        return out

    x = torch.randn(1, prior.config.embed_dim, generator=torch.Generator().manual_seed(0))
    diffusion.sample(watch, prior.alphabar, x, timesteps, predicts=predicts,
                     variance=prior.cov.cpu().double(), generator=torch.Generator().manual_seed(1))
    if path:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([*reversed(timesteps)], rows, label=captions)
        axes.set(xlabel="timestep t", ylabel="cosine of x_t to CLIP's z_t", xlim=(timesteps[-1], 0))
        axes.legend(loc="upper left")
        unclip.save_figure(figure, path, dpi=100)


if __name__ == "__main__":
    unclip.run_demo(demo, "also draw the cosines")
