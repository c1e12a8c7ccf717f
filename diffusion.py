"""Gaussian diffusion: add noise (q_sample), learn to undo it (loss), undo it step by step (sample).

A network is any callable (x_t, t) -> prediction; what it is conditioned on is bound outside. So one
loss trains, and one loop samples, image embeddings, 64-pixel images and 1024-pixel images.

    x0, x_t     (B, ...) the data, embeddings (B, D) or pixels (B, C, H, W), and noised to t
    t, s        timesteps, int or (B,) long on the CPU, 0 <= s < t <= T; 0 is clean data, T noise
    alphabar    (T+1,) the noise schedule: the fraction of signal, 1 at t = 0. float64, cast last:
                1 - alphabar of the first timesteps would keep only three digits in float32
    predicts    what the network predicts: "eps" (the noise), "x0" (the data), "v" (v-prediction)

Papers: DDPM (Ho et al. 2020), IDDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2020), ADM
(Dhariwal & Nichol 2021), v-prediction (Salimans & Ho 2022), GLIDE (Nichol et al. 2021), RePaint
(Lugmayr et al. 2022), Analytic-DPM (Bao et al. 2022).
"""
if __name__ == "__main__":
    import unclip                    # first: Ctrl-C is one line from then on

import math

import numpy as np
import torch
from tqdm import tqdm

# ---------------------------------------------------------------- training   (DDPM algorithm 1)
def q_sample(alphabar, x0, t, eps):
    """The forward process, reparametrised: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps.  DDPM eq. 4"""
    return expand(alphabar[t].sqrt(), x0) * x0 + expand((1 - alphabar[t]).sqrt(), x0) * eps


def loss(network, alphabar, x0, predicts="eps", t=None):
    """Train any diffusion model: x0 (B, ...) -> (B,).   DDPM algorithm 1, one pass of its loop

    network(x_t, t), t (B,) on x0's device, returns a prediction of x0's shape (cast to its dtype).
    With twice the channels the second half, `raw`, gives a variance; then the loss is L_simple +
    0.001 L_vlb (IDDPM eq. 16), at one t L_simple + T / 1000 vlb_loss(.., detached x0_hat, ..).
    Predicting eps = 0 costs 1. t: timesteps (B,) on the CPU; by default each of 1..T is as likely.
    """
    T = len(alphabar) - 1
    t = torch.randint(1, T + 1, (len(x0),)) if t is None else t
    eps = torch.randn_like(x0)
    x_t = q_sample(alphabar, x0, t, eps)

    out = network(x_t, t.to(x0.device, non_blocking=True)).to(x0.dtype)
    out, raw = split_variance(out, x_t)
    error = out - target(alphabar, x0, t, eps, predicts)
    simple = error.pow(2).reshape(len(x0), -1).mean(1)                                 # L_simple
    if raw is None:
        return simple

    # stop-gradient (detach): the bound trains the variance only. T / 1000: one random term stands
    # for the sum over T of them, weighted by 0.001
    x0_hat = to_x0(alphabar, out.detach(), x_t, t, predicts)
    return simple + T / 1000 * vlb_loss(alphabar, x0_hat, raw, x0, x_t, t)


def target(alphabar, x0, t, eps, predicts):
    """The right prediction: eps, x0 or  v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0.   Salimans & Ho"""
    if predicts == "eps":
        return eps
    if predicts == "x0":
        return x0
    if predicts == "v":
        return q_sample(alphabar, eps, t, -x0)
    raise ValueError(f'expected predicts "eps", "x0" or "v", got {predicts!r}')


def to_x0(alphabar, out, x_t, t, predicts):
    """The x0 that a prediction, out (B, ...), implies.

        x0 = x_t / sqrt(ab_t) - sqrt(1 / ab_t - 1) eps                     DDPM eq. 15
        x0 = sqrt(ab_t) x_t - sqrt(1 - ab_t) v
    Note: at t = T an error in eps grows 20,000 times (cosine schedule), one in v never does.
    """
    ab = alphabar[t]
    if predicts == "x0":
        return out
    if predicts == "eps":
        return expand(ab.rsqrt(), x_t) * x_t - expand((1 / ab - 1).sqrt(), x_t) * out
    if predicts == "v":
        return expand(ab.sqrt(), x_t) * x_t - expand((1 - ab).sqrt(), x_t) * out
    raise ValueError(f'expected predicts "eps", "x0" or "v", got {predicts!r}')


def to_eps(alphabar, x0, x_t, t):
    """The noise, if x0 is the data:  eps = (x_t - sqrt(ab_t) x0) / sqrt(1 - ab_t), t >= 1."""
    return (x_t - expand(alphabar[t].sqrt(), x_t) * x0) * expand((1 - alphabar[t]).rsqrt(), x_t)


# ---------------------------------------------------------------- sampling   (DDPM algorithm 2)
@torch.no_grad()
def sample(network, alphabar, x, timesteps, *, predicts="eps", clamp=None, variance="small",
           eta=None, generator=None, progress=None):
    """Noise x (B, ...) at timesteps[-1] -> data, by network(x_t, t) with t an int.   DDPM alg. 2

    timesteps  ascending, such as spaced_timesteps(T, 64); the last step goes from the first to 0
    clamp      of x0, to [-clamp, clamp]: 1 for pixels, None for embeddings (no range)
    variance   by `step_variance`: "small", "large", "learned", or the table of measure_cov
    eta        None: DDPM (ancestral sampling). A number: DDIM, from 0 (deterministic) to 1 (DDPM)
    generator  a torch.Generator, or a list of G: each draws B / G consecutive rows
    progress   the name of a progress bar
    ValueError for an unknown word, a prediction of another shape, or eta and a variance together.
    """
    for t, s in tqdm(transitions(timesteps), desc=progress, leave=False, disable=progress is None):
        x = p_sample(network, alphabar, x, t, s, predicts, clamp, variance, eta, generator)
    return x


def p_sample(network, alphabar, x_t, t, s, predicts, clamp, variance, eta, generator):
    """One step of the reverse process: x_s drawn from p(x_s | x_t), 0 <= s < t.

    The options are those of `sample`. Noise is drawn (noise_like) only if it is added: not at s =
    0, nor with eta = 0.
    """
    if eta is not None and (torch.is_tensor(variance) or variance != "small"):
        raise ValueError("expected eta (DDIM) or a variance (DDPM), got both; leave one out")
    out, raw = split_variance(network(x_t, t), x_t)
    noise = noise_like(x_t, generator) if s > 0 and eta != 0 else None

    # the data, as the network predicts it
    x0 = to_x0(alphabar, out, x_t, t, predicts)
    if clamp is not None:
        x0 = x0.clamp(-clamp, clamp)

    # a step to s, as if this x0 were the true one
    if eta is not None:
        return ddim_step(alphabar, x_t, t, s, x0, eta, noise)
    mean, var = q_posterior(alphabar, x0, x_t, t, s)
    var = step_variance(alphabar, variance, var, raw, t, s)
    return mean if s == 0 else mean + var.sqrt() * noise


def q_posterior(alphabar, x0, x_t, t, s):
    """Where to land at s < t if we knew x0: the Gaussian q(x_s | x_t, x0), by Bayes' rule.

    Two Gaussian facts about x_s, multiplied together (DDPM eq. 6-7, there with s = t - 1):
        it came from x0:      x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s) noise
        it turned into x_t:   x_t = sqrt(alpha) x_s + sqrt(1 - alpha) noise,   alpha = ab_t / ab_s
    -> mean (B, ...), var () or (B, 1, ...).   ValueError unless 0 <= s < t <= T.
    Note: at s = 0 the mean is x0 and var 0: the last step adds no noise. As s may be any earlier
    timestep, fewer steps need no respaced betas (IDDPM sec. 4; the result is the same).
    """
    ab_t, ab_s = two_timesteps(alphabar, t, s)
    alpha = ab_t / ab_s
    from_x0 = ab_s.sqrt() * (1 - alpha) / (1 - ab_t)
    from_xt = alpha.sqrt() * (1 - ab_s) / (1 - ab_t)
    var = (1 - alpha) * (1 - ab_s) / (1 - ab_t)
    return expand(from_x0, x_t) * x0 + expand(from_xt, x_t) * x_t, expand(var, x_t)


def guide(uncond, cond, scale):
    """Classifier-free guidance: 0 ignores the caption, 1 is the plain model, 3 exaggerates.

    Counted as in GLIDE sec. 2.3; the w of Ho & Salimans, (1 + w) cond - w uncond, is scale - 1.
    """
    return uncond + scale * (cond - uncond)


def guided(network, scale, C):
    """(x_t, t) -> the guided prediction; `network` takes 2B rows, B with the null condition first.

    At scale 1 `network` is returned as it is, and takes B rows. The first C channels are guided; a
    learned variance, after them, stays the conditional one.
    """
    def guided_network(x_t, t):
        uncond, cond = network(torch.cat([x_t, x_t]), t).chunk(2)              # (B, C or 2C, ...)
        return torch.cat([guide(uncond[:, :C], cond[:, :C], scale), cond[:, C:]], dim=1)

    return network if scale == 1 else guided_network


def noise_like(x, generator=None):
    """Standard normal noise in x's shape; generator as in `sample`."""
    return draw(torch.randn, x.shape, generator, x.device).to(x.dtype)


def draw(f, shape, generator, device, dim=0):
    """f(shape, ...), drawn on the generator's device; of a list, each draws its rows (axis dim)."""
    if isinstance(generator, (list, tuple)):
        G, B, share = len(generator), shape[dim], [*shape]
        if G == 0 or B % G:
            raise ValueError(f"expected one for each image, got {G} generators for {B} rows")
        share[dim] = B // G
        return torch.cat([draw(f, share, each, device, dim) for each in generator], dim)
    rows = f(shape, generator=generator, device=generator.device if generator else device)
    return rows.to(device, non_blocking=device.type == "cuda")     # without waiting for the GPU


def split_variance(out, x_t):
    """A network's output -> its prediction, and the raw variance or None."""
    if out.shape == x_t.shape:
        return out, None
    if x_t.ndim > 1 and out.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:]):
        return out.chunk(2, dim=1)
    raise ValueError(f"expected a prediction like x_t {tuple(x_t.shape)}, or twice as wide on "
                     f"axis 1 (with a variance), got {tuple(out.shape)}")


def expand(c, x):
    """A coefficient () or (B,) in x's dtype and a shape that multiplies x (B, ...)."""
    if c.ndim == 0:
        return c.to(x.dtype)                         # a number on the CPU multiplies any tensor
    return c.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def two_timesteps(alphabar, t, s, order="s < t (sampling goes towards the data)", first=0):
    """alphabar at t and at s.   ValueError unless first <= s < t <= T."""
    late, early = torch.as_tensor(t), torch.as_tensor(s)
    if not ((first <= early) & (early < late) & (late < len(alphabar))).all():
        raise ValueError(f"expected {order}, both in 0..{len(alphabar) - 1}, got {t} and {s}")
    return alphabar[t], alphabar[s]


# ---------------------------------------------------------------- noise schedules and timesteps
def cosine_alphabar(T):
    """The cosine schedule: alphabar falls as a squared cosine, gently at both ends.   IDDPM eq. 17

        beta_t = 1 - f(t) / f(t-1), at most 0.999,     f(t) = cos((t/T + 0.008) / 1.008 * pi/2) ^ 2
    -> (T+1,) float64. alphabar[1000] = 2e-9; without the cap it would be 0.
    """
    f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return cumulate(1 - f[1:] / f[:-1])


def linear_alphabar(T):
    """Linear: beta from 1e-4 to 0.02, times 1000 / T, else x_T would not be noise.   DDPM sec. 4"""
    if T < 2:
        raise ValueError(f"expected T >= 2 for the linear schedule, got {T}; use cosine_alphabar")
    return cumulate(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T)


def cumulate(betas):
    """betas (T,), the variance each step adds, at most 0.999 -> alphabar (T+1,).   DDPM eq. 4"""
    alpha = 1 - betas.clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)])


SCHEDULES = {"cosine": cosine_alphabar, "linear": linear_alphabar}


def transitions(timesteps):
    """The steps (t, s) of a sampler: [1, 4, 9] -> [(9, 4), (4, 1), (1, 0)]."""
    down = [*reversed(timesteps), 0]
    return list(zip(down, down[1:]))


def spaced_timesteps(T, K):
    """K ascending timesteps spread evenly over 1..T, both ends included.   IDDPM sec. 4

    (1000, 7) -> [1, 167, 334, 501, 667, 833, 1000]: strides of (T - 1) / (K - 1), added up one
    by one in floats as published, which decides the halves; (1000, 1) -> [1000].
    ValueError unless 1 <= K <= T.
    """
    if not 1 <= K <= T:
        raise ValueError(f"expected between 1 and {T} sampling steps, got {K}")
    if K == 1:
        return [T]
    strides = [0.0] + [(T - 1) / (K - 1)] * (K - 1)
    return [1 + round(c) for c in np.cumsum(strides).tolist()]


def section_timesteps(T, counts):
    """counts[i] timesteps of each equal section of 1..T: (10, [2, 3, 1]) -> [1, 4, 5, 6, 7, 10]"""
    timesteps = []
    for section, K in zip(np.array_split(range(T), len(counts)), counts):
        timesteps += [int(section[0]) + t for t in spaced_timesteps(len(section), K)]
    return timesteps


def glide27_timesteps(T=1000):
    """GLIDE's 27, many near the data, few in the noise; the last is T - 2.   GLIDE app. B.2"""
    return [*section_timesteps(T, [10, 10, 3, 2, 2])[:-1], T - 2]


# ---------------------------------------------------------------- DDIM and its inversion
def ddim_step(alphabar, x_t, t, s, x0, eta=0.0, noise=None):
    """From t to s along the predicted noise, part of it replaced by fresh noise.   DDIM eq. 12, 16

        x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s - sig^2) eps + sig noise,      eps from x_t and this x0
        sig = eta sqrt((1 - ab_s) / (1 - ab_t)) sqrt(1 - ab_t / ab_s)
    eta from 0 (deterministic) to 1 (DDPM, small variance); noise (B, ...), or None if sig is 0.
    t, s int or (B,). ValueError for another eta, missing noise, or unless 0 <= s < t.
    """
    ab_t, ab_s = two_timesteps(alphabar, t, s)
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta between 0 (deterministic) and 1 (DDPM), got {eta}")
    var = eta ** 2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
    if noise is None and (var > 0).any():
        raise ValueError(f"expected noise of x_t's shape for eta = {eta}, got None")

    eps = to_eps(alphabar, x0, x_t, t)               # of the *clamped* x0, else the two disagree
    x_s = expand(ab_s.sqrt(), x_t) * x0 + expand((1 - ab_s - var).sqrt(), x_t) * eps
    return x_s if noise is None else x_s + expand(var.sqrt(), x_t) * noise


def ddim_invert_step(alphabar, x_t, t, u, x0):
    """One step up, u > t >= 1, along the noise of x_t and x0: undoes `ddim_step`.   ADM app. F

    t, u int or (B,). ValueError unless u > t >= 1 (`two_timesteps`).
    """
    two_timesteps(alphabar, u, t, "u > t >= 1 (towards noise; a clean image may be x_1)", first=1)
    return q_sample(alphabar, x0, u, to_eps(alphabar, x0, x_t, t))


@torch.no_grad()
def invert(network, alphabar, x, timesteps, *, predicts="eps", clamp=None, progress=None):
    """The noise from which DDIM would draw x: x at timesteps[0] -> x at timesteps[-1].   ADM app. F

    x is the image itself: at timesteps[0] it is nearly clean. `sample` with eta = 0 and the same
    timesteps (two or more) and clamp brings it back; twice the steps halve the error.
    """
    if len(timesteps) < 2:
        raise ValueError(f"expected at least 2 timesteps, got {list(timesteps)}; take more steps")
    pairs = list(zip(timesteps, timesteps[1:]))
    for t, u in tqdm(pairs, desc=progress, leave=False, disable=progress is None):
        x0 = to_x0(alphabar, split_variance(network(x, t), x)[0], x, t, predicts)
        x0 = x0 if clamp is None else x0.clamp(-clamp, clamp)
        x = ddim_invert_step(alphabar, x, t, u, x0)
    return x


# ---------------------------------------------------------------- inpainting   (RePaint)
@torch.no_grad()
def inpaint(network, alphabar, x, known, mask, timesteps, *, resample=10, predicts="eps",
            clamp=None, variance="small", generator=None, progress=None):
    """Noise x -> data that equals `known` (B, ...) where mask is True or 1.   RePaint algorithm 1

    Each step samples the unknown part and noises `known` to the same timestep. So that they fit, x
    is noised from s back to t and the step is made again, `resample` times in all.
    Note: an approximation of p(unknown | known). More repetitions give a better mean, but with
    variance "small" also less spread: use "learned" or a table of measure_cov.
    """
    if resample < 1:
        raise ValueError(f"expected resample >= 1, how often each step is made, got {resample}")
    mask = mask.bool()
    for t, s in tqdm(transitions(timesteps), desc=progress, leave=False, disable=progress is None):
        for repetition in range(resample if s > 0 else 1):

            # back up from s to t: the forward process, begun at s
            if repetition > 0:
                x = q_sample(alphabar / alphabar[s], x, t, noise_like(x, generator))

            # down from t to s: the unknown part by the network, the known part by q_sample
            x = p_sample(network, alphabar, x, t, s, predicts, clamp, variance, None, generator)
            known_s = q_sample(alphabar, known, s, noise_like(x, generator)) if s > 0 else known
            x = torch.where(mask, known_s, x)
    return x


# ---------------------------------------------------------------- the variance of a DDPM step
def step_variance(alphabar, variance, small, raw, t, s):
    """The variance of p(x_s | x_t) by its name in `sample`; small is that of q_posterior.

    A table cov (unCLIP's prior, app. C) gives the best one for this network, which adds the
    uncertainty about x0:  small + (weight of x0 in the mean)^2 cov_t.   Analytic-DPM
    """
    if torch.is_tensor(variance):
        ab_t, ab_s = alphabar[t], alphabar[s]
        weight = ab_s.sqrt() * (1 - ab_t / ab_s) / (1 - ab_t)
        return small + expand(weight ** 2 * variance[t], small)
    if variance == "small":
        return small
    if variance == "large":
        return expand(1 - alphabar[t] / alphabar[s], small)
    if variance == "learned" and raw is not None:
        return learned_log_var(alphabar, raw, t, s).exp()
    raise ValueError('expected "small", "large", a table, or "learned" of a network with twice the '
                     f'channels of x_t, got {variance!r}')


def learned_log_var(alphabar, raw, t, s):
    """The log-variance as a network interpolates it: raw = -1 is small, +1 large.   IDDPM eq. 15"""
    small, large = log_var_bounds(alphabar, t, s)
    weight = (raw + 1) / 2                                                     # not clamped
    return weight * expand(large, raw) + (1 - weight) * expand(small, raw)


def log_var_bounds(alphabar, t, s):
    """Two extremes for the log-variance of a step t -> s.   DDPM sec. 3.2, IDDPM sec. 3.1

        small = log of q_posterior's var       best if x0 is known exactly
        large = log(1 - ab_t / ab_s)           best if the data themselves are N(0, I)
    -> each () or (B,) float64. At s = 0, instead of log 0, small is that of the step 2 -> 1, as
    published.
    """
    ab_t, ab_s = two_timesteps(alphabar, t, s)
    second = (1 - alphabar[2] / alphabar[1]) * (1 - alphabar[1]) / (1 - alphabar[2])
    small = torch.where(ab_s < 1, (1 - ab_t / ab_s) * (1 - ab_s) / (1 - ab_t), second)
    return small.log(), (1 - ab_t / ab_s).log()


def vlb_loss(alphabar, x0_hat, raw, x0, x_t, t):
    """One term of the variational bound: KL of q(x_s | x_t, x0) and p(x_s | x_t), s = t - 1.

    At t = 1 minus the discretised log-likelihood. x0_hat, raw (B, ...) are predictions, t (B,)
    -> (B,) bits per dimension. L_simple is its squared error, unweighted (IDDPM eq. 5-6, DDPM 3.4).
    """
    mean, _ = q_posterior(alphabar, x0, x_t, t, t - 1)
    mean_hat, _ = q_posterior(alphabar, x0_hat, x_t, t, t - 1)
    log_var = expand(log_var_bounds(alphabar, t, t - 1)[0], x_t)
    log_var_hat = learned_log_var(alphabar, raw, t, t - 1)

    kl = 0.5 * (log_var_hat - log_var - 1 + torch.exp(log_var - log_var_hat)
                + (mean - mean_hat) ** 2 * torch.exp(-log_var_hat))
    nll = -discretized_log_likelihood(x0, mean_hat, 0.5 * log_var_hat)
    nats = torch.where(expand(t, x_t) == 1, nll, kl)
    return nats.reshape(len(x0), -1).mean(1) / math.log(2)


def discretized_log_likelihood(x, mean, log_std):
    """log of the Gaussian mass in x's bin x +- 1/255: pixels are 8-bit numbers.   DDPM eq. 13

    x (B, ...) in [-1, 1] -> (B, ...) nats, at least log 1e-12. The bins at -1 and 1 are open.
    Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2, as in the published losses.
    """
    def cdf(u):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))

    below = torch.where(x < -0.999, 0.0, cdf((x - mean - 1 / 255) * torch.exp(-log_std)))
    above = torch.where(x > 0.999, 1.0, cdf((x - mean + 1 / 255) * torch.exp(-log_std)))
    return (above - below).clamp(min=1e-12).log()


@torch.no_grad()
def measure_cov(network, alphabar, x0, timesteps, generator=None, predicts="x0"):
    """The error of a network's x0:  cov[t] = E |x0 - x0_hat|^2 / d  over data x0 (N, ...).

    -> (T+1,) float64: 0 at t = 0, measured at `timesteps`, linear in between, constant after.
    """
    error = {0: 0.0}
    for t in sorted(timesteps):
        x_t = q_sample(alphabar, x0, t, noise_like(x0, generator))
        x0_hat = to_x0(alphabar, split_variance(network(x_t, t), x_t)[0], x_t, t, predicts)
        error[t] = (x0_hat - x0).double().pow(2).mean().item()
    return torch.from_numpy(np.interp(range(len(alphabar)), [*error], [*error.values()]))


# ---------------------------------------------------------------- demo: python diffusion.py
def mixture_x0(alphabar, x_t, t, centres, std):
    """E[x0 | x_t] of equally likely Gaussians at centres (K, D): by Bayes' rule the best x0_hat."""
    a, var = alphabar[t].sqrt(), alphabar[t] * std ** 2 + 1 - alphabar[t]
    offset = x_t[:, None] - expand(a, x_t) * centres                           # (B, K, D)
    weight = (-offset.square().sum(2) / (2 * expand(var, x_t))).softmax(1)     # (B, K)
    x0 = centres + expand(a * std ** 2 / var, x_t) * offset                    # (B, K, D)
    return (weight[:, :, None] * x0).sum(1)


def demo(path=None):
    """Five Gaussians become noise, and come back: their best denoiser is a formula, no network."""
    import unclip                                # a later chapter, which only the demo imports
    from matplotlib.figure import Figure
    torch.manual_seed(0)
    alphabar, std, timesteps = cosine_alphabar(1000), 0.2, [0, 250, 500, 750, 1000]
    angle = torch.arange(5) * 2 * math.pi / 5
    centres = 1.8 * torch.stack([angle.sin(), -angle.cos()], dim=1)            # (5, 2) a pentagon
    x0 = centres[torch.randint(5, (4000,))] + std * torch.randn(4000, 2)
    forward = {t: q_sample(alphabar, x0, t, torch.randn_like(x0)) for t in timesteps[1:]} | {0: x0}
    reverse, x_T = {}, torch.randn(4000, 2)

    def network(x_t, t):
        reverse[t] = x_t
        return mixture_x0(alphabar, x_t, t, centres, std)

    reverse[0] = sample(network, alphabar, x_T, range(10, 1001, 10), predicts="x0")
    rows = {"data, more and more noise": forward, "and back, from noise alone:": reverse}

    figure = Figure(figsize=(10, 4.3), layout="constrained")
    for axes, (title, x) in zip(figure.subplots(2, 5), rows.items()):
        print(f"\n{title}\n" + "  ".join(f"t = {t}".ljust(22) for t in timesteps))
        blocks = []
        for axis, t in zip(axes, timesteps):
            axis.plot(*x[t][:1500].T, ".", markersize=2, alpha=0.5)
            axis.set(title=f"t = {t}", xlim=(-3, 3), ylim=(3, -3), xticks=[], yticks=[], aspect=1)
            count = torch.histogramdd(x[t].flip(1), bins=[11, 22], range=[-3.0, 3.0] * 2).hist
            shade = (count / count.max()).sqrt().mul(9).round().int().tolist()
            blocks.append(["".join(" .:-=+*#%@"[i] for i in row) for row in shade])
        print("\n".join("  ".join(line).rstrip() for line in zip(*blocks)))
    if path:
        unclip.save_figure(figure, path, dpi=100)


if __name__ == "__main__":
    unclip.run_demo(demo, "also draw the clouds")
