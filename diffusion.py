"""Diffusion in three ideas: add noise (q), learn to undo it (losses), undo it in steps (sample).

Nothing here knows about images, captions or networks. A *denoiser* is any callable
(x_t, t) -> prediction; what it is conditioned on is bound outside. So one loop samples image
embeddings, 64-pixel pictures and 1024-pixel pictures.

    B  batch    ...  any data shape: (D,) embeddings or (C, H, W) pixels
    alphabar    (T+1,) float64: the share of the variance at time t that is signal; alphabar[0] = 1
    t, s        times, int or (B,) long on the CPU, 0 <= s < t <= T; 0 is clean data, T is noise
    x0, x_t     the data, and the data at time t:  x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps

Arithmetic on the schedule is float64 and cast last: near t = 1 alphabar is almost 1, and
1 - alphabar would keep only three digits in float32.

Papers: DDPM (Ho et al. 2020), IDDPM (Nichol & Dhariwal 2021), DDIM (Song et al. 2020),
ADM (Dhariwal & Nichol 2021), GLIDE (Nichol et al. 2021), Analytic-DPM (Bao et al. 2022).
"""
import math

import torch
from tqdm import tqdm

# ---------------------------------------------------------------------------- schedules and times


def _cumulate(betas):
    """betas (T,), the variance each step adds -> alphabar (T+1,). No step destroys everything."""
    alpha = 1 - betas.clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha.cumprod(0)])


def cosine_alphabar(T):
    """The cosine schedule: alphabar falls as a squared cosine, gently at both ends.  IDDPM eq. 17.

        beta_t = 1 - f(t) / f(t-1), at most 0.999,     f(t) = cos((t/T + 0.008) / 1.008 * pi/2) ^ 2
    T -> (T+1,) float64. The cap matters at t = T, where f is 0. alphabar[T] = 2e-9 for T = 1000.
    """
    f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return _cumulate(1 - f[1:] / f[:-1])


def linear_alphabar(T):
    """The linear schedule: beta rises evenly from 1e-4 to 0.02, for T = 1000.   DDPM sec. 4.

    T -> (T+1,) float64, ValueError unless T >= 2. For another T the betas are scaled by 1000 / T
    (else x_T would not be noise) and capped at 0.999 (only T < 21 needs it). alphabar[1000] = 4e-5.
    """
    if T < 2:
        raise ValueError(f"expected T >= 2 for the linear schedule, got {T}; use cosine_alphabar")
    return _cumulate(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T)


SCHEDULES = {"cosine": cosine_alphabar, "linear": linear_alphabar}


def spaced_timesteps(T, K):
    """K ascending times spread evenly over 1..T, both ends included.   IDDPM sec. 4.

        1 + round(c),   c = 0, stride, stride + stride, ...,   stride = (T - 1) / (K - 1)
    spaced_timesteps(1000, 7) -> [1, 167, 334, 501, 667, 833, 1000].   K = 1 gives [T]. To hit the
    published times, add up (do not multiply), round half to even.   ValueError unless 1 <= K <= T.
    """
    if not 1 <= K <= T:
        raise ValueError(f"expected between 1 and {T} sampling steps, got {K}")
    if K == 1:
        return [T]
    times, at, stride = [], 0.0, (T - 1) / (K - 1)
    for _ in range(K):
        times.append(1 + round(at))
        at += stride
    return times


def section_timesteps(T, counts):
    """1..T cut into len(counts) equal sections, each with its own count of times.  IDDPM sec. 4

    Within each as in spaced_timesteps, so one time is the section's last (IDDPM's code takes its
    first); what is left over makes the first sections one longer.
    section_timesteps(10, [2, 3, 1]) -> [1, 4, 5, 6, 7, 10], of 1..4, 5..7 and 8..10.
    """
    sizes = [T // len(counts) + (i < T % len(counts)) for i in range(len(counts))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [start + t for start, size, K in zip(starts, sizes, counts)
            for t in spaced_timesteps(size, K)]


def glide27_timesteps(T=1000):
    """GLIDE's 27 times for its upsampler: many steps near the data, few in noise.   GLIDE app. B.2.

    Sections of 10, 10, 3, 2 and 2 times, but the last is T - 2, 998 of 1000: at the end of the
    cosine schedule x_t holds next to no signal. T >= 50.
    """
    return [*section_timesteps(T, [10, 10, 3, 2, 2])[:-1], T - 2]


def ddim_timesteps(T, N):
    """N times 1, 1 + n, 1 + 2n, ... with the smallest whole stride n that gives N.   ADM's "ddimN".

    ddim_timesteps(1000, 25) -> [1, 41, ..., 961].   ValueError if no stride does (N = 64).
    """
    for n in range(1, T + 1):
        if len(range(0, T, n)) == N:
            return [1 + i for i in range(0, T, n)]
    raise ValueError(f"no whole stride takes {N} steps through 1..{T}; use spaced_timesteps")


def steps(times):
    """The moves of a sampler over ascending times: [1, 4, 9] -> [(9, 4), (4, 1), (1, 0)]."""
    down = [*reversed(times), 0]
    return list(zip(down, down[1:]))


def sinusoid(index, width):
    """What a network is told about time: [cos(i f_k), sin(i f_k)], f_k = 10000^(-2k / width).

    index (B,) = t - 1 (networks count from 0), width even -> (B, width) float32.   ADM's code.
    """
    k = torch.arange(width // 2, device=index.device)
    angle = index.float()[:, None] * torch.exp(-math.log(10000) * k / (width // 2))  # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)                              # (B, width)


def like(c, x):
    """A coefficient () or (B,), in x's dtype and in a shape that multiplies x (B, ...)."""
    if c.ndim == 0:
        return c.to(x.dtype)                         # stays on the CPU: a number needs no copy
    return c.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------------------------ forward process and posterior


def q_sample(alphabar, x0, t, eps):
    """Jump straight to time t:  x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps.   DDPM eq. 4.

    x0, eps (B, ...), eps standard normal -> x_t (B, ...).
    """
    return like(alphabar[t].sqrt(), x0) * x0 + like((1 - alphabar[t]).sqrt(), x0) * eps


def predict_x0(alphabar, x_t, t, eps):
    """The data if eps is the noise in x_t:  x0 = x_t / sqrt(ab_t) - sqrt(1 / ab_t - 1) eps.

    DDPM eq. 15. Surprise: at t = T = 1000 of the cosine schedule an error in eps comes out 20,000
    times larger; hence pixels are clamped to [-1, 1] after it.
    """
    return like(alphabar[t].rsqrt(), x_t) * x_t - like((1 / alphabar[t] - 1).sqrt(), x_t) * eps


def predict_eps(alphabar, x_t, t, x0):
    """The noise if x0 is the data:  eps = (x_t - sqrt(ab_t) x0) / sqrt(1 - ab_t), t >= 1."""
    return (x_t - like(alphabar[t].sqrt(), x_t) * x0) * like((1 - alphabar[t]).rsqrt(), x_t)


def _two_times(alphabar, t, s, order="s < t (steps go towards the data)"):
    late, early = torch.as_tensor(t), torch.as_tensor(s)
    if not ((0 <= early) & (early < late) & (late < len(alphabar))).all():
        raise ValueError(f"expected {order}, both in 0..{len(alphabar) - 1}, got {t} and {s}")
    return alphabar[t], alphabar[s]


def eps_from_velocity(alphabar, x_t, t, velocity):
    """The noise, of a network that says  velocity = sqrt(ab_t) eps - sqrt(1 - ab_t) x0.

        eps = sqrt(ab_t) velocity + sqrt(1 - ab_t) x_t          Salimans & Ho 2022, app. D
    Such a network need not copy the noise, and an error in velocity is no larger in  x0 =
    sqrt(ab_t) x_t - sqrt(1 - ab_t) velocity, where one in eps is sqrt(1 / ab_t - 1) times larger.
    """
    return like(alphabar[t].sqrt(), x_t) * velocity + like((1 - alphabar[t]).sqrt(), x_t) * x_t


def q_posterior(alphabar, x0, x_t, t, s):
    """Where to land at time s < t if we knew x0: the Gaussian q(x_s | x_t, x0).

    Two Gaussian facts about x_s, multiplied together (DDPM eq. 6-7, there with s = t - 1):
        it came from x0:      x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s) noise
        it turned into x_t:   x_t = sqrt(alpha) x_s + sqrt(1 - alpha) noise,   alpha = ab_t / ab_s
    x0, x_t (B, ...)  ->  mean (B, ...), var () or (B, 1, ...).   ValueError unless 0 <= s < t <= T.
    Surprise: var is 0 at s = 0 and the mean is x0: the last step adds no noise and forgets x_t.
    """
    a_t, a_s = _two_times(alphabar, t, s)
    alpha = a_t / a_s
    from_x0 = a_s.sqrt() * (1 - alpha) / (1 - a_t)
    from_xt = alpha.sqrt() * (1 - a_s) / (1 - a_t)
    var = (1 - alpha) * (1 - a_s) / (1 - a_t)
    return like(from_x0, x_t) * x0 + like(from_xt, x_t) * x_t, like(var, x_t)


# -------------------------------------------------------------------------------------- variances
# A reverse step has the posterior's mean, with the predicted x0. Its variance has four answers.


def log_var_bounds(alphabar, t, s):
    """Two extremes for the log-variance of a step t -> s.   DDPM sec. 3.2, IDDPM sec. 3.1.

        small = log of q_posterior's var       best if x0 is known exactly
        large = log(1 - ab_t / ab_s)           best if the data themselves are N(0, I)
    -> small, large, each () or (B,) float64, in nats.   Surprise: at s = 0 small would be log 0;
    it is replaced by that of the table's step 2 -> 1, as published models do (T >= 2).
    """
    a_t, a_s = _two_times(alphabar, t, s)
    second = (1 - alphabar[2] / alphabar[1]) * (1 - alphabar[1]) / (1 - alphabar[2])
    small = torch.where(a_s < 1, (1 - a_t / a_s) * (1 - a_s) / (1 - a_t), second)
    return small.log(), (1 - a_t / a_s).log()


def learned_range_log_var(alphabar, v, t, s):
    """Between the two bounds, where the network says:  v = -1 small, v = +1 large.   IDDPM eq. 15.

    v (B, ...), the network's raw output, not clamped -> log-variance (B, ...).
    """
    small, large = log_var_bounds(alphabar, t, s)
    share = (v + 1) / 2
    return share * like(large, v) + (1 - share) * like(small, v)


def analytic_var(alphabar, t, s, cov):
    """The best variance for a denoiser: the posterior's, plus its doubt about x0.   Analytic-DPM.

        var = var_small + (weight of x0 in the posterior mean)^2 cov,     cov = E|x0 - x0_hat|^2 / d
    var_small is q_posterior's var, 0 at s = 0. cov () or (B,) float64, measured once on data by
    `measure_cov` -> var () or (B,) float64.
    """
    a_t, a_s = _two_times(alphabar, t, s)
    b = 1 - a_t / a_s
    return b * (1 - a_s) / (1 - a_t) + a_s * (b / (1 - a_t)) ** 2 * cov


def to_device(x, device):
    """x on that device. What goes to a GPU is pinned first, so that nobody waits for the copy."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _draw(x, generator):
    """Noise like x, drawn where the generator lives: a seed means the same on every device."""
    device = "cpu" if generator is None else generator.device
    return to_device(torch.randn(x.shape, generator=generator, device=device), x.device).to(x.dtype)


@torch.no_grad()
def measure_cov(denoise, alphabar, x0, times, generator=None):
    """How far a denoiser is from x0 at each time:  cov[t] = E |x0 - x0_hat|^2 / d.

    For the best possible denoiser this is E tr Cov(x0 | x_t) / d, Analytic-DPM's quantity.
    denoise(x_t, t) -> x0_hat (N, ...), t an int; x0 (N, ...) data  ->  (T+1,) float64, measured at
    `times`, linear in between, 0 at t = 0, constant after the last. One draw of noise per time.
    """
    known = {0: 0.0}
    for t in times:
        x_t = q_sample(alphabar, x0, t, _draw(x0, generator))
        known[t] = (denoise(x_t, t) - x0).double().pow(2).mean().item()
    known.setdefault(len(alphabar) - 1, known[max(known)])
    cov, at = torch.zeros(len(alphabar), dtype=torch.float64), sorted(known)
    for a, b in zip(at, at[1:]):
        cov[a:b + 1] = torch.linspace(known[a], known[b], b - a + 1, dtype=torch.float64)
    return cov


# ----------------------------------------------------------------------------------------- losses


def discretized_log_likelihood(x, mean, log_std):
    """log of the Gaussian mass in x's bin x +- 1/255: pixels are 8-bit numbers.   DDPM eq. 13.

    x (B, ...) in [-1, 1] -> (B, ...) in nats, never below log 1e-12. The bins at -1 and 1 reach to
    infinity. The normal distribution function is that of the published losses:
        Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2
    """
    def cdf(u):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))

    below = cdf((x - mean - 1 / 255) * torch.exp(-log_std))
    above = cdf((x - mean + 1 / 255) * torch.exp(-log_std))
    below = torch.where(x < -0.999, torch.zeros_like(x), below)
    above = torch.where(x > 0.999, torch.ones_like(x), above)
    return (above - below).clamp(min=1e-12).log()


def random_times(T, B):
    """Times to train at, (B,) long, each of 1..T equally likely.   DDPM alg. 1

    One from each of B equal parts of 1..T, so that every batch has its share of early and late
    ones and the gradient less noise.   VDM (Kingma et al. 2021) app. I.1
    Surprise: ascending, so the rows of a batch must stand in random order.
    """
    return 1 + (T * (torch.arange(B) + torch.rand(B)) / B).long().clamp(max=T - 1)


def middle_times(T, B):
    """Times to train at, (B,) long in 1..T, mostly middle ones: t / T = sigmoid(N(-0.1, 0.9^2)).

    That is where shapes and colours are decided: at the ends a network learns to copy what it is
    given. One from each of B equal parts of the normal, ascending, too.   SD3 (Esser et al. 2024)
    sec. 3.1
    """
    u = (torch.arange(B) + torch.rand(B)) / B
    return 1 + (T * torch.sigmoid(0.9 * torch.special.ndtri(u) - 0.1)).long().clamp(max=T - 1)


def drawn(draw, B, share=(0, 1)):
    """The B rows of this process of what is drawn for a whole batch: draw(n) -> (n, ...).

    share is (rank, processes). All draw for all, B * processes rows, and each takes its own: many
    processes train on what one would have drawn.
    """
    rank, processes = share
    return draw(B * processes).chunk(processes)[rank]


def simple_loss(eps_hat, eps):
    """L_simple = |eps_hat - eps|^2 averaged over an example: (B, ...) -> (B,).   DDPM eq. 14.

    Expect 1 from a network that answers 0.
    """
    return (eps_hat - eps).pow(2).flatten(1).mean(1)


def vlb_loss(alphabar, eps_hat, v, x0, x_t, t):
    """One term of the variational bound: how far p(x_s | x_t) is from q(x_s | x_t, x0), s = t - 1.

    KL of the two Gaussians; at t = 1 minus the discretised log-likelihood.   IDDPM eq. 5, 6, 15.
    eps_hat, v, x0, x_t (B, ...), t (B,)  ->  (B,) bits per dimension.  x0_hat is not clamped here.
    """
    s = t - 1
    mean, _ = q_posterior(alphabar, x0, x_t, t, s)
    mean_hat, _ = q_posterior(alphabar, predict_x0(alphabar, x_t, t, eps_hat), x_t, t, s)
    log_var = like(log_var_bounds(alphabar, t, s)[0], x_t)
    log_var_hat = learned_range_log_var(alphabar, v, t, s)
    kl = 0.5 * (log_var_hat - log_var - 1 + torch.exp(log_var - log_var_hat)
                + (mean - mean_hat) ** 2 * torch.exp(-log_var_hat))
    nll = -discretized_log_likelihood(x0, mean_hat, 0.5 * log_var_hat)
    nats = torch.where(like(s, x_t) == 0, nll, kl)
    return nats.flatten(1).mean(1) / math.log(2)


def hybrid_loss(alphabar, out, x0, x_t, t, eps, weight=1.0):
    """L_simple for the mean, the variational bound for the variance.   IDDPM eq. 16.

        L = weight |eps - eps_hat|^2 + (T / 1000) vlb(stopped eps_hat, v)
    out (B, 2C, ...) = eps_hat, then v, on axis 1; x0, x_t, eps (B, C, ...); t (B,)  ->  (B,).
    weight: 1 as published, or (B,).
    Surprise: the paper's 0.001 multiplies a *sum* of T terms, so one sampled term, standing for
    all T, weighs T / 1000. The gradient of the bound reaches v only.
    """
    eps_hat, v = out.chunk(2, dim=1)
    vlb = vlb_loss(alphabar, eps_hat.detach(), v, x0, x_t, t)
    return weight * simple_loss(eps_hat, eps) + (len(alphabar) - 1) / 1000 * vlb


# --------------------------------------------------------------------------------------- guidance


def guide(uncond, cond, scale):
    """Classifier-free guidance: 0 ignores the caption, 1 is the plain model, 3 exaggerates.

    GLIDE sec. 2.3 and unCLIP count so; Ho & Salimans 2022 write (1 + w) cond - w uncond, thus
    w = scale - 1. Any two predictions of one shape and kind: eps, x0, or logits.
    """
    return uncond + scale * (cond - uncond)


def guide_eps(uncond, cond, scale):
    """`guide` for a network that says eps and v, (B, 2C, ...): eps is guided, v stays cond's."""
    eps = guide(uncond.chunk(2, dim=1)[0], cond.chunk(2, dim=1)[0], scale)
    return torch.cat([eps, cond.chunk(2, dim=1)[1]], dim=1)


# --------------------------------------------------------------------------------------- samplers


def ddim_step(alphabar, x_t, t, s, x0, eta=0.0, noise=None):
    """From t to s along the predicted noise, part of it replaced by fresh noise.  DDIM eq. 12, 16.

        x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s - sig^2) eps + sig noise,      eps from x_t and this x0
        sig = eta sqrt((1 - ab_s) / (1 - ab_t)) sqrt(1 - ab_t / ab_s)
    eta in [0, 1]: 0 is deterministic, 1 is DDPM with the small variance. At s = 0 it returns x0.
    ValueError unless 0 <= s < t <= T and 0 <= eta <= 1, or if noise is needed (eta > 0 and s > 0)
    and missing.
    """
    a_t, a_s = _two_times(alphabar, t, s)
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta between 0 (deterministic) and 1 (DDPM), got {eta}")
    var = eta ** 2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    if noise is None and (var > 0).any():
        raise ValueError(f"expected noise of x_t's shape for eta = {eta}, got None")
    eps = predict_eps(alphabar, x_t, t, x0)          # of the *clamped* x0, else the two disagree
    x_s = like(a_s.sqrt(), x_t) * x0 + like((1 - a_s - var).sqrt(), x_t) * eps
    return x_s if noise is None else x_s + like(var.sqrt(), x_t) * noise


def ddim_invert_step(alphabar, x_t, t, u, x0):
    """One step *up*, u > t >= 1, along the predicted noise: undoes `ddim_step` of the same x0.

        x_u = sqrt(ab_u) x0 + sqrt(1 - ab_u) eps,      eps from x_t and x0.   ADM app. F.
    ValueError unless 1 <= t < u <= T: at t = 0 there is no noise whose direction one could follow.
    """
    if int(torch.as_tensor(t).min()) < 1:
        raise ValueError(f"expected t >= 1, got {t}; a clean picture may stand for x_1")
    a_u, _ = _two_times(alphabar, u, t, "u > t (inversion goes towards the noise)")
    eps = predict_eps(alphabar, x_t, t, x0)
    return like(a_u.sqrt(), x_t) * x0 + like((1 - a_u).sqrt(), x_t) * eps


def _x0_and_v(alphabar, out, x_t, t, predicts, clamp):
    """Split a prediction: x0, clamped if asked, and v, which says the variance (None if absent)."""
    wide = [n * (1 + (axis == 1)) for axis, n in enumerate(x_t.shape)]
    if [*out.shape] not in ([*x_t.shape], wide):
        raise ValueError(f"expected a prediction like x_t {tuple(x_t.shape)}, or twice as wide on "
                         f"axis 1 (with v), got {tuple(out.shape)}")
    out, v = (out, None) if out.shape == x_t.shape else out.chunk(2, dim=1)
    x0 = out if predicts == "x0" else predict_x0(alphabar, x_t, t, out)
    return (x0 if clamp is None else x0.clamp(-clamp, clamp)), v


@torch.no_grad()
def sample(denoise, alphabar, x, times, *, predicts="eps", clamp=None, variance="small", eta=None,
           generator=None, progress=None):
    """Noise x (B, ...) at time times[-1] -> data at time 0.   DDPM alg. 2; DDIM if eta is given.

    denoise    (x_t, t) -> eps or x0 (`predicts`), t an int; (B, ...), or (B, 2C, ...) with v after.
    times      ascending, e.g. spaced_timesteps(T, 64); the last step goes from times[0] to 0.
    clamp      x0 is clamped to +-clamp: 1 for pixels, None for embeddings (they have no range).
    variance   of ancestral steps: "small", "large", "learned" (needs v), or measure_cov's table.
    eta        None: ancestral steps. A number: DDIM, 0 deterministic ... 1 as noisy as DDPM.
    generator  one draw of x's shape for each step that adds noise, on the generator's device.
    ValueError for another `predicts` or `variance`, or a prediction of another shape (without v,
    if `variance` needs it).
    """
    if predicts not in ("eps", "x0"):
        raise ValueError(f'expected predicts "eps" or "x0", got {predicts!r}')
    if not torch.is_tensor(variance) and variance not in ("small", "large", "learned"):
        raise ValueError(f'expected "small", "large", "learned" or a table, got {variance!r}')
    for t, s in tqdm(steps(times), desc=progress, leave=False, disable=progress is None):
        x0, v = _x0_and_v(alphabar, denoise(x, t), x, t, predicts, clamp)
        noise = _draw(x, generator) if s > 0 and eta != 0 else None
        if eta is not None:
            x = ddim_step(alphabar, x, t, s, x0, eta, noise)
            continue
        x, var = q_posterior(alphabar, x0, x, t, s)
        if s == 0:
            break                                    # x is x0: no noise on the last step
        if torch.is_tensor(variance):
            var = like(analytic_var(alphabar, t, s, variance[t]), x)
        elif variance == "large":
            var = like(log_var_bounds(alphabar, t, s)[1].exp(), x)
        elif variance == "learned":
            if v is None:
                raise ValueError(f'variance "learned" needs a prediction twice as wide as '
                                 f'{[*x.shape]} on axis 1, with v; use "small" or "large"')
            var = learned_range_log_var(alphabar, v, t, s).exp()
        x = x + var.sqrt() * noise
    return x


@torch.no_grad()
def invert(denoise, alphabar, x, times, *, predicts="eps", clamp=None, progress=None):
    """The noise from which DDIM would draw x: x at time times[0] -> x at times[-1].   ADM app. F.

    Give the picture itself as x: at times[0] it is all but clean. `sample` with the same times and
    clamp and eta = 0 brings it back, up to an error that halves when the steps are doubled.
    ValueError for fewer than two times.
    """
    if len(times) < 2:
        raise ValueError(f"expected at least 2 times to go between, got {list(times)}; take more "
                         "steps")
    moves = list(zip(times, times[1:]))
    for t, u in tqdm(moves, desc=progress, leave=False, disable=progress is None):
        x0, _ = _x0_and_v(alphabar, denoise(x, t), x, t, predicts, clamp)
        x = ddim_invert_step(alphabar, x, t, u, x0)
    return x


def slerp(a, b, share):
    """Along the arc from a (share 0) to b (share 1), vectors on the last axis; share a number or a
    tensor that broadcasts, (n, 1).

        sin((1 - share) W) / sin W a + sin(share W) / sin W b,       W the angle between a and b
    Unit rows stay unit rows. Where a and b point the same or opposite ways it is a straight line
    (between opposite ones through 0).
    """
    cos = (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True)
                                           * b.norm(dim=-1, keepdim=True))
    W = cos.clamp(-1, 1).acos()
    straight = W.sin().abs() < 1e-4
    W = torch.where(straight, torch.ones_like(W), W)
    arc = (((1 - share) * W).sin() * a + (share * W).sin() * b) / W.sin()
    return torch.where(straight, (1 - share) * a + share * b, arc)


# ------------------------------------------------------------------------ demo: python diffusion.py
# Diffusion before there is any network: for a mixture of Gaussians the best denoiser is a formula.


def mixture_x0(alphabar, x_t, t, centres, std):
    """E[x0 | x_t] if x0 comes from equally likely Gaussians: the denoiser that nothing can beat.

    x_t (B, D), centres (K, D), std of each -> (B, D). Bayes: how likely is each centre, given x_t,
    and where would x0 be if it were that one?
    """
    a, var = alphabar[t].sqrt(), alphabar[t] * std ** 2 + 1 - alphabar[t]      # of x_t round a m_k
    off = x_t[:, None] - like(a, x_t) * centres                                # (B, K, D)
    weight = (-off.square().sum(2) / (2 * like(var, x_t))).softmax(1)          # (B, K)
    x0 = centres + like(a * std ** 2 / var, x_t) * off                         # (B, K, D)
    return (weight[:, :, None] * x0).sum(1)


def in_characters(points, rows=11, columns=22, reach=3.0):
    """Points (N, 2) -> lines of text, the darker the more points."""
    counts = torch.histogramdd(points.flip(1), bins=[rows, columns],
                               range=[-reach, reach, -reach, reach]).hist
    shade = (counts / counts.max()).sqrt().mul(9).round().int()
    return ["".join(" .:-=+*#%@"[i] for i in row) for row in shade.tolist()]


def demo():
    torch.manual_seed(0)
    alphabar, std = cosine_alphabar(1000), 0.2
    angle = torch.arange(5) * 2 * math.pi / 5
    centres = 1.8 * torch.stack([angle.sin(), -angle.cos()], dim=1)            # (5, 2) a pentagon
    x0 = centres[torch.randint(5, (4000,))] + std * torch.randn(4000, 2)
    times = [0, 250, 500, 750, 1000]
    noised = [q_sample(alphabar, x0, t, torch.randn_like(x0)) if t else x0 for t in times]
    x, undone = torch.randn(4000, 2), {}

    def denoise(x_t, t):
        undone[t] = x_t
        return mixture_x0(alphabar, x_t, t, centres, std)

    undone[0] = sample(denoise, alphabar, x, list(range(10, 1001, 10)), predicts="x0")
    undone = [undone[t] for t in times]
    for title, clouds in (("data, more and more noise", noised), ("and back, from noise alone:",
                                                                  undone)):
        print(f"\n{title}\n" + "  ".join(f"t = {t}".ljust(22) for t in times))
        for line in zip(*(in_characters(cloud) for cloud in clouds)):
            print("  ".join(line).rstrip())


if __name__ == "__main__":
    demo()
