"""The prior: what would CLIP make of a picture of this caption?   P(z_i | y), unCLIP sec. 2.2

Two answers to the same question, with the same interface (`loss` to train, `sample` to use):

    DiffusionPrior   noise -> z_i in 64 steps (toy: 16), by a causal Transformer that predicts z_i
    ARPrior          z_i as a sentence, word by word: its principal components, each rounded to one
                     of 1024 codes (toy: 64)

Both take a clip.Text (the caption's tokens, and CLIP's embedding z_t of it) and return unit rows
(Karlo's: rows as long as CLIP's).

    B batch   L caption tokens   W width   D width of z   K principal components

Paper: unCLIP (Ramesh et al. 2022) sec. 2.2 and appendix C.
"""
import math
from dataclasses import dataclass
from pathlib import Path

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
    vocab_size: int = 600           # 16384; 0: CLIP's hidden states stand for the tokens (Karlo)
    context: int = 20               # tokens, 256
    text_width: int = 0             # width of CLIP's hidden states, if vocab_size is 0
    width: int = 128                # 2048
    layers: int = 4                 # 24
    heads: int = 4                  # 32
    T: int = 1000
    schedule: str = "cosine"
    whiten: bool = False            # scale by the data's mean and std (Karlo), not to length 17.2
    clamp: float = 0.0              # of the predicted z_i in the scaled space; 0: none (Karlo: 5)


class DiffusionPrior(nn.Module):
    """A causal Transformer over [caption, z_t, time, noised z_i, query].   Sec. 2.2

    The output at the query, which sees all the others, predicts z_i. Diffusion happens in a scaled
    space: unit vectors times 17.2 sqrt(D / 1024), so that their elements vary as much as pixels do
    (app. C). `scale`, `unscale` and, for z_t, `prefix` are the only places that know.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        with torch.device("cpu"):                      # the table stays there, wherever weights go
            self.alphabar = diffusion.SCHEDULES[c.schedule](c.T)
        if c.vocab_size:
            self.tok = nn.Embedding(c.vocab_size, c.width)
            self.pad = nn.Parameter(torch.randn(c.context, c.width) * 0.01)    # as CaptionEncoder's
            nn.init.normal_(self.tok.weight, std=0.02)
        else:
            self.hidden_in = nn.Linear(c.text_width, c.width)
        self.text_in = nn.Linear(c.embed_dim, c.width)
        self.image_in = nn.Linear(c.embed_dim, c.width)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.query = nn.Parameter(torch.randn(c.width) * 0.01)
        self.pos = nn.Parameter(torch.randn(c.context + 4, c.width) * 0.01)
        self.blocks = clip.blocks(c.layers, c.width, c.heads)
        self.ln_out, self.out = nn.LayerNorm(c.width), nn.Linear(c.width, c.embed_dim)
        self.register_buffer("mean", torch.zeros(c.embed_dim))
        norm = 17.2 * math.sqrt(c.embed_dim / 1024)            # of a scaled unit vector
        self.register_buffer("std", torch.full((c.embed_dim,), 1 / norm))      # Karlo's is a std
        self.register_buffer("cov", torch.zeros(c.T + 1))      # see fit_variance; 0: fixed small

    def scale(self, z):
        """CLIP embeddings (B, D) -> the space of the diffusion (B, D): minus mean, by std.

        Before that they are brought to length 1, unless config.whiten.
        """
        return ((z if self.config.whiten else unit(z)) - self.mean) / self.std

    def unscale(self, x):
        """Back again: (B, D) -> unit vectors, as the decoder knows them (whitened: as CLIP's)."""
        z = x * self.std + self.mean
        return z if self.config.whiten else unit(z)

    def prefix(self, text):
        """The part of the sequence that is the same at every step: [caption, z_t] (B, L + 1, W)."""
        if self.config.vocab_size:
            words = torch.where(text.mask[:, :, None], self.tok(text.tokens), self.pad)
        else:
            words = self.hidden_in(text.states)                                # (B, L, W)
        z_t = text.z_t if self.config.whiten else unit(text.z_t) / self.std    # the null stays 0
        z_t = self.text_in(z_t.to(words.dtype))                                # (B, W)
        return torch.cat([words, z_t[:, None]], dim=1) + self.pos[:-3]         # (B, L + 1, W)

    def suffix(self, x_t, index):
        """The part that changes: [time, noised z_i, query] (B, 3, W)."""
        time = diffusion.sinusoid(index, self.config.width)                    # (B, W)
        time = self.time(time.to(x_t.dtype))                                   # (B, W)
        three = torch.stack([time, self.image_in(x_t), self.query.expand_as(time)], dim=1)
        return three + self.pos[-3:]                                           # (B, 3, W)

    def visible(self, mask, rows):
        """Who may look at whom, for the last `rows` of the sequence.

        Causal; and where CLIP's states stand for the words (vocab_size 0), padded ones are hidden.
        mask (B, L) -> (B or 1, 1, rows, L + 4) bool, True where a row may look.
        """
        S = mask.shape[1] + 4
        causal = torch.ones(rows, S, dtype=torch.bool, device=mask.device).tril(S - rows)
        if self.config.vocab_size:
            return causal[None, None]                                          # (1, 1, rows, S)
        return causal & F.pad(mask, (0, 4), value=True)[:, None, None]         # (B, 1, rows, S)

    def forward(self, x_t, index, text):
        """x_t (B, D) in the scaled space, index (B,) = t - 1, a clip.Text -> x0 (B, D)."""
        x = torch.cat([self.prefix(text), self.suffix(x_t, index)], dim=1)     # (B, L + 4, W)
        mask = self.visible(text.mask, x.shape[1])
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.ln_out(x[:, -1]))                                 # (B, D)

    def loss(self, z_i, text, share=(0, 1)):
        """z_i (B, D) -> (B,): squared error of the predicted z_i, the mean over D.   Sec. 2.2

        In the scaled space; 10 % of the captions are dropped, tokens and z_t together. Expect
        0.2889 (17.2^2 / 1024) from a model that predicts 0. Draws the times
        (`diffusion.random_times`), the noise, then a number in [0, 1) a caption, dropped below 0.1.
        share: see `diffusion.drawn`.
        """
        B, x0 = len(z_i), self.scale(z_i)
        t = diffusion.drawn(lambda n: diffusion.random_times(self.config.T, n), B, share)
        eps = diffusion.drawn(lambda n: torch.randn(n, x0.shape[1]), B, share)
        keep = diffusion.drawn(torch.rand, B, share) >= 0.1
        eps, keep, index = (diffusion.to_device(x, x0.device) for x in (eps, keep, t - 1))
        x_t = diffusion.q_sample(self.alphabar, x0, t, eps.to(x0.dtype))       # (B, D)
        out = self(x_t, index, text.drop(keep))                                # (B, D)
        return (out.float() - x0).pow(2).mean(1)

    def denoiser(self, text, guidance=1.0, null=None):
        """(x_t, t) -> x0, with everything that does not change over the steps done beforehand.

        As the mask is causal, the caption never sees the time: its keys and values are computed
        once and kept. Guidance runs caption and no caption (`null`) as one batch, B' = 2 B.
        """
        B = len(text.tokens)
        if guidance != 1:
            text = text.after(text.null() if null is None else null)           # (B', ...)
        x = self.prefix(text)                                                  # (B', L + 1, W)
        known, seen = x.shape[1], self.visible(text.mask, x.shape[1] + 3)
        caches = [clip.Cache(known + 3) for _ in self.blocks]
        for block, cache in zip(self.blocks, caches):
            x = block(x, seen[:, :, :known, :known], cache=cache)

        def denoise(x_t, t):
            index = torch.full((len(text.tokens),), t - 1, device=x_t.device)
            x = x_t.to(self.pos.dtype).repeat(len(index) // B, 1)              # (B', D)
            x = self.suffix(x, index)                                          # (B', 3, W)
            for block, cache in zip(self.blocks, caches):
                cache.length = known                               # forget the step before
                x = block(x, seen[:, :, known:], cache=cache)
            x0 = self.out(self.ln_out(x[:, -1])).float()                       # (B', D)
            return diffusion.guide(*x0.chunk(2), guidance) if guidance != 1 else x0

        return denoise

    @torch.no_grad()
    def sample(self, text, steps=64, guidance=1.0, candidates=2, generator=None, null=None,
               progress=None):
        """text (B captions) -> z_i (B, D): of some candidates the nearest to z_t.   Sec. 2.2

        null: a clip.Text of B rows that stands for "no caption", by default all padding.
        """
        many, many_null = (rows.map(lambda x: x.repeat_interleave(candidates, dim=0))     # (B n, .)
                           for rows in (text, text.null() if null is None else null))
        x = torch.randn(len(many.tokens), self.config.embed_dim, generator=generator,
                        device=generator.device if generator else None)
        x = diffusion.sample(self.denoiser(many, guidance, many_null), self.alphabar,
                             x.to(text.z_t.device),
                             diffusion.spaced_timesteps(self.config.T, steps), predicts="x0",
                             clamp=self.config.clamp or None, variance=self.cov.cpu().double(),
                             generator=generator, progress=progress)
        z = self.unscale(x).unflatten(0, (-1, candidates))                     # (B, n, D)
        fit = (unit(z) * unit(text.z_t.float())[:, None]).sum(2)               # (B, n)
        return z[torch.arange(len(z)), fit.argmax(1)]                          # (B, D)

    @torch.no_grad()
    def fit_variance(self, z_i, text, steps=64, generator=None):
        """Measure how wrong the predictions are at each time, for the analytic variance.

        z_i (N, D) and their captions; run once, on the trained model.   Analytic-DPM (Bao et al.)
        """
        times = diffusion.spaced_timesteps(self.config.T, steps)
        x0 = self.scale(z_i)
        cov = diffusion.measure_cov(self.denoiser(text), self.alphabar, x0, times, generator)
        self.cov.copy_(cov.clamp(0, x0.pow(2).mean().item()))      # predicting 0 would be no worse


# ---------------------------------------------------------------- autoregressive prior


@dataclass
class ARPriorConfig:
    """Sizes of the toy's AR prior; in the comments the paper's (unCLIP table 3, sec. 2.2)."""
    embed_dim: int = 64             # D, 1024
    components: int = 32            # K principal components, 319; training takes what 99 % need
    buckets: int = 64               # codes per component, 1024
    vocab_size: int = 600           # 16384
    context: int = 20               # caption tokens, 256
    text_width: int = 128           # 2048
    text_layers: int = 2            # 24
    text_heads: int = 2             # 32
    width: int = 128                # 1664
    layers: int = 3                 # 24
    heads: int = 2                  # 26


def principal_components(z, keep=0.99):
    """The directions in which unit(z) varies, most important first.   unCLIP sec. 2.2

    As many as keep that share of the variance (1: all D, even if N < D):  z (N, D) -> mean (D,),
    basis (D, K) with orthonormal columns, float32 on the CPU.
    """
    z = unit(z.cpu().double())
    mean = z.mean(0)
    power, basis = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))       # ascending
    power, basis = power.flip(0), basis.flip(1)
    K = int((power.cumsum(0) < keep * power.sum()).sum()) + 1 if keep < 1 else len(power)
    return mean.float(), basis[:, :K].float()


def quantile_edges(y, buckets):
    """Cuts that put equally many of y's numbers in every bucket: y (N, K) -> (K, buckets - 1).

    A cut is the smallest number of the bucket above it: number i N // buckets of N sorted ones.
    """
    first = torch.arange(1, buckets, device=y.device) * len(y) // buckets      # of every bucket
    return y.sort(0).values[first].T.contiguous()


class ARPrior(nn.Module):
    """z_i as a sequence of codes, each predicted from caption, z_t and the codes before.   Sec. 2.2

        [z_t, dot, c_1, ..., c_K-1]  ->  predictions of c_1, ..., c_K, from the dot token on
    c_k is the k-th principal component of z_i, rounded into one of `buckets` equally full buckets.
    dot is z_i . z_t, rounded too: true in training, drawn from the top half when sampling, which
    asks for a picture that fits its caption. A text encoder of its own turns the caption into keys
    and values before those of the sequence, in every block.
    """

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
        self.register_buffer("mean", torch.zeros(c.embed_dim))                 # all set by `fit`
        self.register_buffer("basis", torch.eye(c.embed_dim, c.components))
        edges, values = torch.linspace(-1, 1, c.buckets + 1)[1:-1], torch.linspace(-1, 1, c.buckets)
        self.register_buffer("edges", edges.repeat(c.components, 1))
        self.register_buffer("values", values.repeat(c.components, 1))
        self.register_buffer("dot_edges", edges)

    @torch.no_grad()
    def fit(self, z_i, z_t):
        """Choose directions, buckets and their values from data: z_i, z_t (N, D). Once, at first.

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
        """codes (B, K) -> unit z (B, D): each code stands for the mean of its bucket."""
        y = self.values[torch.arange(codes.shape[1], device=codes.device), codes]         # (B, K)
        return unit(self.mean + y @ self.basis.T)

    def dot_code(self, z_i, z_t):
        """z_i, z_t (B, D) -> (B,) in 0..buckets-1, the cosine, rounded as in `encode`."""
        return torch.bucketize((unit(z_i) * unit(z_t)).sum(1), self.dot_edges, right=True)

    def run(self, x, context=None, caches=None):
        """x (B, n, W) -> logits (B, n, buckets).

        context (B, P, text width): the n begin the sequence. Without it they go on from the caches.
        """
        mask, n = None, x.shape[1]
        if context is not None:
            P = context.shape[1]
            mask = torch.ones(n, P + n, dtype=torch.bool, device=x.device).tril(P)[None, None]
        for i, block in enumerate(self.blocks):
            x = block(x, mask, context=context, cache=caches and caches[i])
        return self.out(self.ln_out(x))

    def start(self, z_t, dot):
        """The first two tokens: z_t (B, D), brought to length sqrt(D), dot (B,) -> (B, 2, W)."""
        z_t = (unit(z_t) * math.sqrt(self.config.embed_dim)).to(self.pos.dtype)
        return torch.stack([self.text_in(z_t), self.dot(dot)], dim=1) + self.pos[:2]

    def forward(self, codes, dot, text):
        """codes (B, K), dot (B,) -> logits (B, K, buckets): at k those of c_k given c_1..c_k-1."""
        codes = self.code(codes[:, :-1]) + self.pos[2:]                        # (B, K - 1, W)
        x = torch.cat([self.start(text.z_t, dot), codes], dim=1)               # (B, K + 1, W)
        return self.run(x, self.text(text.tokens, text.mask))[:, 1:]           # (B, K, buckets)

    def loss(self, z_i, text, share=(0, 1)):
        """z_i (B, D) -> (B,): mean cross-entropy of the codes in nats; 10 % of captions dropped.

        Expect log(buckets) from a model that knows nothing. share: see `diffusion.drawn`.
        """
        codes, dot = self.encode(z_i), self.dot_code(z_i, text.z_t)            # (B, K), (B,)
        keep = diffusion.drawn(torch.rand, len(z_i), share) >= 0.1
        keep = diffusion.to_device(keep, z_i.device)
        logits = self(codes, dot, text.drop(keep)).float().transpose(1, 2)     # (B, buckets, K)
        return F.cross_entropy(logits, codes, reduction="none").mean(1)

    @torch.no_grad()
    def sample(self, text, temperature=1.0, guidance=1.0, generator=None, cached=True,
               progress=None):
        """text (B captions) -> z_i (B, D), code by code. cached=False: the slow way, for a test.

        Draws the dot codes, then for every code one uniform number per bucket (Gumbel's trick: the
        largest of logits + Gumbel noise is a sample of their softmax, and no step waits for a GPU).
        ValueError unless temperature > 0; near 0 the likeliest codes are taken.
        """
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}; 1e-4 takes the "
                             "likeliest codes")
        c, B, device = self.config, len(text.tokens), text.z_t.device
        at = generator.device if generator else None
        dot = torch.randint(c.buckets // 2, c.buckets, (B,), generator=generator, device=at)
        dot = diffusion.to_device(dot, device)                                 # the top half
        if guidance != 1:
            text, dot = text.after(text.null()), dot.repeat(2)
        context = self.text(text.tokens, text.mask)                            # (B', L, text width)
        x = self.start(text.z_t, dot)                                          # (B', 2, W)
        size = context.shape[1] + 1 + c.components
        caches = [clip.Cache(size) for _ in self.blocks] if cached else None
        noise = torch.rand(c.components, B, c.buckets, generator=generator, device=at)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()                        # (K, B, buckets)
        gumbel, codes = diffusion.to_device(gumbel, device), []
        for k in tqdm(range(c.components), desc=progress, leave=False, disable=progress is None):
            logits = self.run(x, None if cached and k else context, caches)    # (B', n, buckets)
            logits = logits[:, -1].float()                                     # (B', buckets)
            if guidance != 1:
                logits = diffusion.guide(*logits.chunk(2), guidance)           # (B, buckets)
            codes.append((logits / temperature + gumbel[k]).argmax(1))         # (B,)
            if k + 1 < c.components:
                new = self.code(codes[-1]) + self.pos[2 + k]                   # (B, W)
                new = new.repeat(len(context) // B, 1)[:, None]                # (B', 1, W)
                x = new if cached else torch.cat([x, new], dim=1)
        return self.decode(torch.stack(codes, dim=1))


# ---------------------------------------------------------------- the public prior

DIFFUSERS_BLOCK = {"ln1.*": "norm1.*", "qkv.*": "attn1.to_{q,k,v}.*", "proj.*": "attn1.to_out.0.*",
                   "ln2.*": "norm3.*", "fc1.*": "ff.net.0.proj.*", "fc2.*": "ff.net.2.*"}
DIFFUSERS = {
    "hidden_in.*": "encoder_hidden_states_proj.*",
    "text_in.*": "embedding_proj.*",
    "image_in.*": "proj_in.*",
    "time.0.*": "time_embedding.linear_1.*",
    "time.2.*": "time_embedding.linear_2.*",
    "query": ("prd_embedding", lambda w: w[0, 0]),
    "pos": ("positional_embedding", lambda w: w[0]),
    **{f"blocks.N.{a}": f"transformer_blocks.N.{b}" for a, b in DIFFUSERS_BLOCK.items()},
    "ln_out.*": "norm_out.*",
    "out.*": "proj_to_clip_embeddings.*",
    "mean": ("clip_mean", lambda w: w[0]),
    "std": ("clip_std", lambda w: w[0]),
}


def load_karlo(folder, device="cpu", dtype=torch.float32):
    """prior/ and prior_scheduler/ of a Karlo folder -> DiffusionPrior.

    ValueError or FileNotFoundError, naming the file, where something else is there.
    """
    folder = Path(folder)
    weights, says, path = clip.read_folder(folder / "prior")
    there = folder / "prior" / "config.json"
    clip.expect(says, there, additional_embeddings=4, added_emb_type="prd", norm_in_type=None,
                embedding_proj_norm_type=None, encoder_hid_proj_type="linear",
                time_embed_act_fn="silu")
    D, context, layers, heads, head = clip.sizes(
        says, there, "embedding_dim", "num_embeddings", "num_layers", "num_attention_heads",
        "attention_head_dim")
    there = folder / "prior_scheduler" / "scheduler_config.json"
    schedule = clip.read_json(there)
    clip.expect(schedule, there, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small_log",
                prediction_type="sample", num_train_timesteps=1000, clip_sample=True)
    config = DiffusionPriorConfig(
        embed_dim=D, vocab_size=0, context=context, text_width=D, width=heads * head,
        layers=layers, heads=heads, whiten=True, clamp=float(schedule.get("clip_sample_range", 1)))
    with torch.device("meta"):
        model = DiffusionPrior(config)
    weights = clip.rename(model, weights, DIFFUSERS, path)
    return clip.settle(model, weights | {"cov": torch.zeros(config.T + 1)}, device, dtype)


# ---------------------------------------------------------------- demo: python prior.py


def demo(steps=64):
    """One embedding sampled step by step, and which of four captions it comes to mean."""
    import unclip                                # a later chapter: only the demo looks there
    captions = ["a small red circle above a large blue square", "a large blue square",
                "a small green cross above a large blue square", "a large yellow triangle"]
    model = unclip.load(unclip.HERE / "weights/toy.pt")
    part, text = model.parts["diffusion_prior"], model.encode_text(captions)
    mine = text.map(lambda x: x[:1])
    denoise, times = part.denoiser(mine), diffusion.spaced_timesteps(part.config.T, steps)
    print(f"sampling z_i for {captions[0]!r}; how near is it to what CLIP makes of\n")
    print("\n".join(f"    {k}  {words}" for k, words in enumerate(captions, start=1)))
    print(f"\ncosine of x_t to {1:6}{'':19}{2:6}{3:6}{4:6}        of the z_i to expect: 1, 2, 3, 4")

    def watch(x_t, t):
        x0 = denoise(x_t, t)
        if times.index(t) % 7 == 0:
            at, expected = ((unit(part.unscale(x)) @ unit(text.z_t).T)[0].tolist()
                            for x in (x_t, x0))
            print(f"t = {t:4d}         {at[0]:6.2f} {'#' * round(18 * max(0, at[0])):18}"
                  + "".join(f"{c:6.2f}" for c in at[1:]) + " " * 8
                  + "".join(f"{c:6.2f}" for c in expected))
        return x0

    x = torch.randn(1, part.config.embed_dim, generator=torch.Generator().manual_seed(0))
    diffusion.sample(watch, part.alphabar, x, times, predicts="x0",
                     variance=part.cov.cpu().double(),
                     generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    import unclip
    unclip.stop_on_error(demo)
