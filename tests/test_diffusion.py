"""Chapter 1, diffusion: every formula is derived a second time, slowly, and compared in float64.

Two worlds in which the right answer is known: a Gaussian world, data N(m, v), whose best denoiser
is a straight line; and an oracle that simply knows x0. Last, numbers of guided-diffusion itself.
"""
import itertools
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion

T = 50
GRIDS = [list(range(1, T + 1)), [1, 9, 20, 37, 50], [3, 30, 50]]


@pytest.fixture
def alphabar():
    return torch.linspace(0, 1.5, T + 1, dtype=torch.float64).cos() ** 2


@pytest.fixture
def pictures():
    """x0, x_t, eps, v: four independent (3, 2, 4, 4) tensors, float64."""
    return torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def rigged(monkeypatch):
    """rigged(list of tensors): the next calls of torch.randn return these, one after the other."""
    def rig(draws):
        draws = iter(draws)
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: next(draws))
    return rig


def close(got, want, hint, tol=1e-9):
    """Equal to tol, relative to the largest number wanted where that exceeds 1."""
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert error <= tol, f"{hint}\nwanted {want.flatten()[:4]}, got {got.flatten()[:4]}"


def denoise_tanh(x_t, t):
    return torch.tanh(x_t)


def best_x0(ab, x_t, m, v):
    """E[x0 | x_t] for data N(m, v): the regression line, slope Cov(x0, x_t) / Var(x_t)."""
    return m + ab.sqrt() * v / (ab * v + 1 - ab) * (x_t - ab.sqrt() * m)


# ---------------------------------------------------------------------------- schedules and times


def test_the_schedules_have_the_published_numbers():
    cosine, linear = diffusion.cosine_alphabar(1000), diffusion.linear_alphabar(1000)
    for ab in (cosine, linear):
        assert ab.shape == (1001,) and ab.dtype == torch.float64 and ab[0] == 1, "0 is the data"
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    close(cosine[:1000], [u / f[0] for u in f[:1000]], "before the cap, alphabar_t is f(t) / f(0)")
    close(1 - cosine[1000] / cosine[999], 0.999, "the last beta is capped at 0.999")
    close([1 - linear[1], 1 - linear[1000] / linear[999]], [1e-4, 0.02], "linear betas")
    close([(1 - cosine[1]) / 4.13e-5, cosine[1000] / 2.43e-9, linear[1000] / 4.04e-5], [1, 1, 1],
          "paper: cosine beta_1 = 4.13e-5, alphabar_T = 2.43e-9; linear alphabar_T = 4.04e-5", 2e-3)


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 21, 50, 100, 1000])
def test_at_the_last_time_hardly_any_signal_is_left_whatever_T(steps):
    for schedule in (diffusion.cosine_alphabar, diffusion.linear_alphabar):
        ab = schedule(steps)
        assert ab[-1] < 1e-3, f"{ab[-1]:.1%} signal at T = {steps}: scale linear betas by 1000 / T"
        assert (ab > 0).all() and (ab[1:] < ab[:-1]).all(), "a beta above 1? cap betas at 0.999"


def test_spaced_timesteps_include_both_ends():
    spaced = diffusion.spaced_timesteps
    assert spaced(1000, 7) == [1, 167, 334, 501, 667, 833, 1000], \
        "both ends, 1 and T; and half to even: 500 from 499.5"
    assert spaced(1000, 25)[:4] == [1, 43, 84, 126] and spaced(7, 4) == [1, 3, 5, 7]
    assert spaced(9, 1) == [9], "one step starts where there is only noise"
    for count in range(2, 1001, 7):
        times, stride = spaced(1000, count), 999 / (count - 1)
        assert times == sorted(set(times)) and len(times) == count, "ascending, each time once"
        assert (times[0], times[-1]) == (1, 1000), "sampling must start at T: include both ends"
        sums = itertools.accumulate([stride] * (count - 1), initial=0.0)
        assert times == [1 + round(c) for c in sums], "strides added up, then rounded, not cut off"


def test_the_other_spacings():
    sections = diffusion.section_timesteps(10, [2, 3, 1])                  # 1..4, 5..7, 8..10
    assert sections == [1, 4, 5, 6, 7, 10], "sections of 4, 3, 3; the first take what is over"
    times = diffusion.glide27_timesteps()
    assert times[:3] == [1, 23, 45] and times[-4:] == [601, 800, 801, 998], "many near the data"
    assert diffusion.glide27_timesteps(100)[-4:] == [61, 80, 81, 98], "GLIDE's code takes T - 2"
    assert diffusion.ddim_timesteps(1000, 15) == list(range(1, 1001, 67)), "smallest whole stride"
    assert diffusion.steps([1, 4, 9]) == [(9, 4), (4, 1), (1, 0)], "the last step goes to the data"


@pytest.mark.ours
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2,), (2, 9, 4, 4), (1, 3, 4, 4)])
def test_a_prediction_of_another_shape_is_refused(shape):
    alphabar = diffusion.cosine_alphabar(10)
    with pytest.raises(ValueError, match=r"expected a prediction like x_t \(2, 3, 4, 4\)"):
        diffusion.sample(lambda x, t: torch.zeros(shape), alphabar, torch.zeros(2, 3, 4, 4), [5])
    x = diffusion.sample(lambda x, t: x, alphabar, torch.ones(4), [5, 10], predicts="x0", eta=0.0)
    assert x.shape == (4,), "numbers are data, too"


def test_the_time_embedding_tells_every_time_apart():
    got = diffusion.sinusoid(torch.tensor([0, 5, 999]), 8)
    assert got.shape == (3, 8) and got.dtype == torch.float32, "one row for each time"
    alone = diffusion.sinusoid(torch.tensor([5]), 8)
    assert torch.equal(alone[0], got[1]), "the row of t = 5 changes with its batch: wrong axis?"
    angles = [[i * 10000 ** (-k / 4) for k in range(4)] for i in (0, 5, 999)]
    want = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    close(got, want, "cosines first, then sines; frequencies 10000^(-2k / width)", 1e-4)


# ------------------------------------------------------------------ forward process and posterior


def test_one_jump_equals_many_small_steps(alphabar):
    one, zero, signal, var = torch.ones(1).double(), torch.zeros(1).double(), 1.0, 0.0
    for t in range(1, T + 1):
        alpha = alphabar[t] / alphabar[t - 1]                # x_t = sqrt(alpha) x_t-1 + noise
        signal, var = alpha.sqrt() * signal, alpha * var + 1 - alpha
        close(diffusion.q_sample(alphabar, one, t, zero), signal, f"signal at {t}: sqrt(alphabar)?")
        close(diffusion.q_sample(alphabar, zero, t, one) ** 2, var, f"variance at {t}: no root?")


def test_x0_and_eps_are_inverse_to_each_other(alphabar, pictures):
    x0, _, eps, _ = pictures
    for t in (1, 25, T, torch.tensor([1, 30, T])):
        x_t = diffusion.q_sample(alphabar, x0, t, eps)
        close(diffusion.predict_x0(alphabar, x_t, t, eps), x0, "solve q_sample's formula for x0")
        close(diffusion.predict_eps(alphabar, x_t, t, x0), eps, "solve q_sample's formula for eps")


@pytest.mark.parametrize("t, s", [(2, 1), (10, 9), (49, 3), (50, 30)])
def test_the_posterior_is_bayes_rule(alphabar, t, s):
    """Tabulate q(x_t | u) q(u | x0) on a fine grid of u and measure its mean and variance."""
    x0, x_t = torch.tensor([[0.7], [-0.3]], dtype=torch.float64)
    u, alpha = torch.linspace(-6, 6, 400_001, dtype=torch.float64), alphabar[t] / alphabar[s]
    p = (-(x_t - alpha.sqrt() * u) ** 2 / (2 * (1 - alpha))
         - (u - alphabar[s].sqrt() * x0) ** 2 / (2 * (1 - alphabar[s]))).softmax(0)
    mean = (p * u).sum()
    got, var = diffusion.q_posterior(alphabar, x0, x_t, t, s)
    close(got, mean, "Bayes' rule gives another mean: are the weights of x0 and x_t swapped?", 1e-8)
    close(var, (p * (u - mean) ** 2).sum(), "Bayes: another var; is it a std, or 1 - alpha?", 1e-8)


def test_the_step_to_the_data_forgets_x_t(alphabar, pictures):
    x0, x_t, _, _ = pictures
    for t in (1, 7, T):
        mean, var = diffusion.q_posterior(alphabar, x0, x_t, t, 0)
        close(mean, x0, "alphabar[0] = 1: mean x0")
        close(var, 0 * var, "alphabar[0] = 1: variance 0")


CALLS = {
    "q_sample": lambda ab, a, b, v, t, s: diffusion.q_sample(ab, a, t, b),
    "predict_x0": lambda ab, a, b, v, t, s: diffusion.predict_x0(ab, a, t, b),
    "predict_eps": lambda ab, a, b, v, t, s: diffusion.predict_eps(ab, a, t, b),
    "q_posterior": lambda ab, a, b, v, t, s: diffusion.q_posterior(ab, a, b, t, s)[0],
    "ddim_step": lambda ab, a, b, v, t, s: diffusion.ddim_step(ab, a, t, s, b, 0.5, v),
    "ddim_invert_step": lambda ab, a, b, v, t, s: diffusion.ddim_invert_step(ab, a, s, t, b),
    "learned_range": lambda ab, a, b, v, t, s: diffusion.learned_range_log_var(ab, v, t, s),
    "guide": lambda ab, a, b, v, t, s: diffusion.guide(a, b, 3.0),
    "vlb_loss": lambda ab, a, b, v, t, s: diffusion.vlb_loss(ab, a, v, b, v, t + 0 * s),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_are_independent_dtypes_kept_and_arguments_left_alone(alphabar, pictures, name):
    a, b, v, _ = pictures
    t, s = torch.tensor([2, 50, 20]), torch.tensor([1, 9, 19])
    before = [x.clone() for x in (alphabar, a, b, v, t, s)]
    got = CALLS[name](alphabar, a, b, v, t, s)
    assert all(map(torch.equal, before, (alphabar, a, b, v, t, s))), f"{name} changed an argument"
    for i in range(3):
        row = slice(i, i + 1)
        alone = CALLS[name](alphabar, a[row], b[row], v[row], t[row], s[row])
        close(got[row], alone, f"{name}: row {i} feels its batch; make coefficients (B, 1, ..)")
    flat = CALLS[name](alphabar, *(x.flatten(1) for x in (a, b, v)), t, s)
    close(got.reshape(3, -1), flat.reshape(3, -1), f"{name} must take any shape, (B, D) too")
    single = CALLS[name](alphabar, a.float(), b.float(), v.float(), t, s)
    assert single.dtype == torch.float32, f"{name} must answer in x's dtype, not the table's"


def test_coefficients_are_computed_in_float64_even_for_float32_data():
    ab, one, zero = diffusion.cosine_alphabar(1000), torch.ones(1, 1), torch.zeros(1, 1)
    noise = diffusion.predict_eps(ab, one, 1, zero)
    close(noise * (1 - ab[1]).sqrt(), 1, "1 - alphabar near t = 1 in float32? cast last", 2e-7)
    assert diffusion.q_posterior(ab, one, one, 2, 1)[1].dtype == torch.float32, "var in x's dtype"
    blow_up = -diffusion.predict_x0(ab, zero, 1000, one)
    close(blow_up / 20291.17, 1, "at t = T an error in eps grows 20,000 times", 1e-6)


# -------------------------------------------------------------------------------------- variances


def test_the_learned_range_ends_at_the_two_bounds(alphabar):
    t, s = torch.tensor([2, 20, 50]), torch.tensor([1, 3, 49])
    one = torch.ones(3, 2, dtype=torch.float64)
    small = diffusion.q_posterior(alphabar, one, one, t, s)[1].log().expand(3, 2)
    large = (1 - alphabar[t] / alphabar[s]).log()[:, None].expand(3, 2)
    learned = diffusion.learned_range_log_var
    close(learned(alphabar, -one, t, s), small, "v = -1 is the small one: is v read as 0..1?")
    close(learned(alphabar, one, t, s), large, "v = +1 is the large one: are the ends swapped?")
    close(learned(alphabar, 2 * one, t, s), 1.5 * large - 0.5 * small, "v is not clamped; logs mix")
    close(learned(alphabar, -one, t * 0 + 1, s * 0), small[0, 0], "at s = 0 use the step 2 -> 1's")


def test_measured_uncertainty_is_the_posterior_variance_of_the_data(alphabar, rigged):
    """x0 = m +- sqrt(v), eps = +-1: four points with a Gaussian's moments, all a line can see."""
    m, v = 0.4, 0.25
    x0 = m + math.sqrt(v) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    rigged([torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)] * 3)
    denoise = lambda x, t: best_x0(alphabar[t], x, m, v)                              # noqa: E731
    cov = diffusion.measure_cov(denoise, alphabar, x0, [10, 20, 40])
    want = [v * (1 - alphabar[t]) / (alphabar[t] * v + 1 - alphabar[t]) for t in (10, 20, 40)]
    close(cov[[10, 20, 40]], want, "the mean squared error of x0_hat, per dimension")
    close(cov[[0, 15, 50]], [0, (want[0] + want[1]) / 2, want[2]], "0 at t = 0, then linear, flat")


# ---------------------------------------------------------------------------------------- samplers


def marginals(rigged, alphabar, times, m, v, **options):
    """The exact mean and variance of x at each time of a sampling run, for data N(m, v).

    With a straight line for a denoiser the run is affine in its noises: row 0 gets none, row 1
    only the start, row k + 1 only draw k, each of size 1. Variances of the rows add up.
    """
    rows, seen = torch.eye(len(times) + 2, dtype=torch.float64)[:, :, None, None], {}
    rigged(rows[2:])

    def denoise(x, t):
        seen[t] = x
        x0 = best_x0(alphabar[t], x, m, v)
        return torch.cat([x0, torch.full_like(x0, options.get("says", 0))], dim=1)

    start, given = rows[1], {k: o for k, o in options.items() if k != "says"}
    seen[0] = diffusion.sample(denoise, alphabar, start, times, predicts="x0", **given)
    law, ab = {}, alphabar[times[-1]]
    for t, x in seen.items():
        response = (x - x[0]).flatten()
        var = response[1] ** 2 * (ab * v + 1 - ab) + (response[2:] ** 2).sum()
        law[t] = (x[0].item() + response[1] * ab.sqrt() * m, var)
    return law


@pytest.mark.parametrize("times", GRIDS)
@pytest.mark.parametrize("m, v, options", [
    (0.4, 0.25, {"variance": "analytic"}), (-1, 3.0, {"variance": "analytic"}),
    (5, 0.0, {"variance": "small"}), (5, 0.0, {"variance": "learned", "says": -1}),
    (0, 1.0, {"variance": "large"}), (0, 1.0, {"variance": "learned", "says": 1}),
    (5, 0.0, {"eta": 0.0}), (5, 0.0, {"eta": 0.7}), (5, 0.0, {"eta": 1.0})])
def test_reverse_steps_retrace_the_forward_marginals_on_any_grid(
        alphabar, rigged, times, m, v, options):
    """Small variance is exact for one known x0 (v = 0), large for N(0, I), analytic for N(m, v)."""
    if options.get("variance") == "analytic":
        cov = v * (1 - alphabar) / (alphabar * v + 1 - alphabar)                # Var[x0 | x_t]
        options = {"variance": cov}
    for t, (mean, var) in marginals(rigged, alphabar, times, m, v, **options).items():
        if t > 0:
            close(mean, alphabar[t].sqrt() * m, f"the mean of x_{t} is off, with {[*options]}")
            close(var, alphabar[t] * v + 1 - alphabar[t], f"the variance of x_{t} is off, with "
                  f"{[*options]}: is the noise multiplied by a variance for a std, or a short "
                  "process given long betas?")


def test_ddim_tends_to_the_spread_of_the_data(alphabar, rigged):
    """DDIM is Euler's method for a flow from noise to data: twice the steps, half the error."""
    fine = torch.linspace(0, 1.5, 801, dtype=torch.float64).cos() ** 2
    errors = [marginals(rigged, fine, list(range(k, 801, k)), 0.4, 0.25, eta=0.0)[0][1].sqrt() - 0.5
              for k in (8, 4, 2, 1)]
    for coarse, finer in zip(errors, errors[1:]):
        assert 1.7 < coarse / finer < 2.3, f"std minus the data's: {errors}; two tables mixed?"
    assert abs(errors[-1]) < 2e-3, f"800 steps still miss the data's std by {errors[-1]}"


@pytest.mark.parametrize("times", GRIDS + [[T], [20]])
@pytest.mark.parametrize("options", [
    {}, {"variance": "large"}, {"variance": "learned"}, {"variance": torch.ones(T + 1).double()},
    {"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}])
@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_every_sampler_ends_exactly_at_the_data_of_an_oracle(
        alphabar, pictures, times, options, predicts):
    x0, start = pictures[0] + 5, pictures[1]                 # data at 5: nothing may be clamped

    def oracle(x_t, t):
        eps = (x_t - alphabar[t].sqrt() * x0) / (1 - alphabar[t]).sqrt()
        return torch.cat([x0 if predicts == "x0" else eps, torch.zeros_like(x0)], dim=1)

    before = start.clone()
    got = diffusion.sample(oracle, alphabar, start, times, predicts=predicts, **options)
    close(got, x0, "the last step must land on x0: is noise added there, or the step not taken?")
    assert torch.equal(start, before), "sample changed the noise it was given"


@pytest.mark.parametrize("t, s", [(50, 49), (50, 9), (2, 1), (9, 0)])
def test_a_ddim_step_with_the_right_answer_lands_on_the_same_path(alphabar, pictures, t, s):
    x0, _, eps, _ = pictures
    x_t = alphabar[t].sqrt() * x0 + (1 - alphabar[t]).sqrt() * eps
    x_s = alphabar[s].sqrt() * x0 + (1 - alphabar[s]).sqrt() * eps
    close(diffusion.ddim_step(alphabar, x_t, t, s, x0), x_s, "eps belongs to t: two tables mixed?")
    if s > 0:
        close(diffusion.ddim_invert_step(alphabar, x_s, s, t, x0), x_t, "up is down, reversed")


@pytest.mark.parametrize("t, s", [(50, 49), (50, 9), (2, 1), (9, 0)])
def test_ddim_with_eta_one_is_an_ancestral_step(alphabar, pictures, t, s):
    x0, x_t, noise, _ = pictures
    mean, var = diffusion.q_posterior(alphabar, x0, x_t, t, s)
    got = diffusion.ddim_step(alphabar, x_t, t, s, x0, 1.0, noise)
    close(got, mean + var.sqrt() * noise, "eta = 1 is DDPM; is eta ignored, or sig a variance?")
    shift = diffusion.ddim_step(alphabar, x_t, t, s, x0, 0.5, noise)
    shift = shift - diffusion.ddim_step(alphabar, x_t, t, s, x0, 0.5, 0 * noise)
    close(shift, 0.5 * var.sqrt() * noise, "sig is proportional to eta")


def test_x0_is_clamped_and_eps_follows_but_x_t_is_left_alone(alphabar, pictures):
    seen, x = {}, 3 * pictures[0]
    eps_hat = pictures[2]

    def denoise(x_t, t):
        seen[t] = x_t
        return eps_hat

    out = diffusion.sample(denoise, alphabar, x, [20, 50], clamp=1.0, eta=0.0)
    a, b = alphabar[50], alphabar[20]
    x0 = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    close(seen[20], b.sqrt() * x0 + (1 - b).sqrt() * eps, "x_t = sqrt(ab) x0 + sqrt(1 - ab) eps "
          "must hold after the clamp: recompute eps from the clamped x0, and do not clamp x_t")
    assert out.abs().max() <= 1, "the last step returns the clamped x0"
    up = diffusion.invert(denoise, alphabar, x, [20, 50], clamp=1.0)
    x0 = ((x - (1 - b).sqrt() * eps_hat) / b.sqrt()).clamp(-1, 1)
    eps = (x - b.sqrt() * x0) / (1 - b).sqrt()
    close(up, a.sqrt() * x0 + (1 - a).sqrt() * eps, "inversion clamps like the sampler it undoes")


@pytest.mark.parametrize("eta", [None, 0.6, 0.0])
def test_one_draw_of_noise_for_each_step_that_adds_some(alphabar, pictures, eta):
    first, second, third = (torch.Generator().manual_seed(7) for _ in range(3))
    x, times, options = pictures[0], [1, 9, 20, 50], {"predicts": "x0", "eta": eta}
    got = diffusion.sample(denoise_tanh, alphabar, x, times, generator=first, **options)
    for t, s in [(50, 20), (20, 9), (9, 1), (1, 0)]:
        mean, var = diffusion.q_posterior(alphabar, torch.tanh(x), x, t, s)
        noise = torch.randn(x.shape, generator=second).double() if s and eta != 0 else 0 * x
        x = (mean + var.sqrt() * noise if eta is None else
             diffusion.ddim_step(alphabar, x, t, s, torch.tanh(x), eta, noise))
    close(got, x, "same seed, other picture: draw in order, one draw a step, in the shape of x")
    assert torch.equal(first.get_state(), second.get_state()), "3 draws in 4 steps; none for eta 0"
    single = diffusion.sample(denoise_tanh, alphabar, pictures[0].float(), times, generator=third,
                              **options)
    close(single, x, "a seed must mean the same noise in float32 and in float64", 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_seed_gives_the_same_sample_on_the_gpu(alphabar, pictures):
    cpu, gpu = (diffusion.sample(denoise_tanh, alphabar, x, [1, 9, 50], predicts="x0",
                                 generator=torch.Generator().manual_seed(1))
                for x in (pictures[0], pictures[0].cuda()))
    close(gpu.cpu(), cpu, "draw where the generator lives, then move")


# --------------------------------------------------------------------------------------- inversion


def test_inversion_retraces_the_path_of_an_oracle(alphabar, pictures):
    x0, _, eps, _ = pictures
    first, last = (alphabar[t].sqrt() * x0 + (1 - alphabar[t]).sqrt() * eps for t in (1, T))
    up = diffusion.invert(lambda x, t: eps, alphabar, first, GRIDS[1])
    close(up, last, "with the right eps, inversion ends at q_sample(T): K - 1 moves, none beyond T")
    down = diffusion.sample(lambda x, t: eps, alphabar, up, GRIDS[1], eta=0.0)
    close(down, x0, "inversion, then DDIM on the same grid, brings the picture back")


def test_inversion_finds_the_noise_of_a_gaussian_world_and_ddim_brings_the_data_back():
    """The exact flow keeps (x - mean) / std. An error c/n + d/n^2 + ... is extrapolated away."""
    m, v, x0 = 0.4, 0.25, torch.tensor([[1.3, -0.2]], dtype=torch.float64)
    ups, downs = [], []
    for n in (16, 32, 64, 128, 256, 512):
        ab, times = torch.linspace(0, 1.5, n + 1, dtype=torch.float64).cos() ** 2, range(1, n + 1)
        denoise = lambda x, t: best_x0(ab[t], x, m, v)                     # noqa: B023, E731
        ups.append(diffusion.invert(denoise, ab, x0, times, predicts="x0"))
        downs.append(diffusion.sample(denoise, ab, ups[-1], times, predicts="x0", eta=0.0))
    for order in range(1, 6):                                              # Richardson, five times
        ups, downs = ([b + (b - a) / (2 ** order - 1) for a, b in zip(xs, xs[1:])]
                      for xs in (ups, downs))
    x_T = ab[-1].sqrt() * m + (ab[-1] * v + 1 - ab[-1]).sqrt() * (x0 - m) / math.sqrt(v)
    close(ups[0], x_T, "towards finer grids inversion must end at x_T of the exact flow", 1e-6)
    close(downs[0], x0, "towards finer grids the picture must come back", 1e-6)


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (-0.97, 0.01), (1.4, 1.0)])
def test_the_likelihood_of_the_256_pixel_values_sums_to_one(mean, std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(x, mean), torch.full_like(x, math.log(std))
    got = diffusion.discretized_log_likelihood(x, mean, log_std).exp()
    close(got.sum(), 1, "bins are x +- 1/255, the outer ones open: no mass may be lost", 1e-8)
    close(diffusion.discretized_log_likelihood(x, mean + 9e9, log_std)[0], math.log(1e-12), "floor")
    cdf = [0.5 * (1 + math.erf((x[100] + h / 255 - mean[0]) / (std * 2 ** 0.5))) for h in (-1, 1)]
    close(got[100], cdf[1] - cdf[0], "the mass of a normal distribution in the bin", 1e-3)


def test_the_bound_is_zero_for_a_perfect_network(alphabar, pictures):
    x0, _, eps, v = pictures
    t = torch.tensor([2, 20, T])
    x_t = diffusion.q_sample(alphabar, x0, t, eps)
    got = diffusion.vlb_loss(alphabar, eps, -torch.ones_like(v), x0, x_t, t)
    close(got, torch.zeros(3), "right eps and v = -1 is q's own Gaussian: KL 0")
    signs = torch.tensor([[1.0, -1, 1, -1, 1], [2, 2, -2, 2, -2]])
    close(diffusion.simple_loss(0 * signs, signs), [1, 4], "E eps^2, a number for each example")


def test_the_hybrid_loss_adds_a_thousandth_of_the_whole_bound(alphabar, pictures):
    """Expectation over t of the added term = 0.001 * the sum over all t, by torch's own KL."""
    (x0, _, eps, v), normal = pictures[:, :1], torch.distributions.Normal
    kl_divergence = torch.distributions.kl_divergence
    whole, added = 0.0, []
    for t in range(1, T + 1):
        x_t, at = diffusion.q_sample(alphabar, x0, t, eps), torch.tensor([t])
        out = torch.cat([0.9 * eps, v], dim=1)
        loss = diffusion.hybrid_loss(alphabar, out, x0, x_t, at, eps)
        added.append(loss - ((0.1 * eps) ** 2).mean())
        x0_hat = (x_t - (1 - alphabar[t]).sqrt() * 0.9 * eps) / alphabar[t].sqrt()
        mean, var = diffusion.q_posterior(alphabar, x0, x_t, t, t - 1)
        mean_hat, _ = diffusion.q_posterior(alphabar, x0_hat, x_t, t, t - 1)
        std_hat = (diffusion.learned_range_log_var(alphabar, v, t, t - 1) / 2).exp()
        nats = (kl_divergence(normal(mean, var.sqrt()), normal(mean_hat, std_hat)) if t > 1 else
                -diffusion.discretized_log_likelihood(x0, mean_hat, std_hat.log()))
        whole = whole + nats.mean() / math.log(2)
    close(sum(added) / T, 0.001 * whole, "a sampled term stands for T: its weight is T / 1000, not "
          "0.001; in bits (divide by log 2); at t = 1 the discretised likelihood")


def test_velocity_says_the_same_as_eps(alphabar, pictures):
    """By its definition, sqrt(ab) eps - sqrt(1 - ab) x0; its error is that of eps over sqrt(ab)."""
    x0, _, eps, v = pictures
    for t in (1, 20, T):
        x_t, ab = diffusion.q_sample(alphabar, x0, t, eps), alphabar[t]
        velocity = ab.sqrt() * eps - (1 - ab).sqrt() * x0
        close(diffusion.eps_from_velocity(alphabar, x_t, t, velocity), eps, f"t = {t}: velocity is "
              "sqrt(ab) eps - sqrt(1 - ab) x0; another sign?", 1e-9)
        wrong = diffusion.eps_from_velocity(alphabar, x_t, t, velocity + v)
        close((wrong - eps) / ab.sqrt(), v, f"t = {t}: the error", 1e-9)
        off = diffusion.predict_x0(alphabar, x_t, t, wrong) - x0
        close(off, -(1 - ab).sqrt() * v, f"t = {t}: never larger in x0 than it is", 1e-6)


def test_the_weight_of_the_hybrid_loss_is_that_of_the_simple_part(alphabar, pictures):
    x0, _, eps, v = pictures
    t, weight = torch.tensor([2, 20, T]), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    out = torch.cat([0.9 * eps, v], dim=1)
    x_t = diffusion.q_sample(alphabar, x0, t, eps)
    plain, heavy = (diffusion.hybrid_loss(alphabar, out, x0, x_t, t, eps, w) for w in (1.0, weight))
    more = (weight - 1) * diffusion.simple_loss(0.9 * eps, eps)
    close(heavy - plain, more, "weight - 1 times the simple loss")


def test_the_bound_trains_the_variance_only(alphabar, pictures):
    x0, _, eps, v = pictures
    t = torch.tensor([1, 20, T])
    x_t = diffusion.q_sample(alphabar, x0, t, eps)
    out = torch.cat([0.5 * eps, v], dim=1).requires_grad_()
    diffusion.hybrid_loss(alphabar, out, x0, x_t, t, eps).sum().backward()
    for_eps, for_v = out.grad.chunk(2, dim=1)
    close(for_eps, 2 * (0.5 * eps - eps) / eps[0].numel(), "detach eps_hat in the bound")
    assert (for_v.flatten(1).abs().sum(1) > 0).all(), "v learns from the bound at every t"


# ------------------------------------------------------------------------------ guidance and slerp


def test_guidance_at_0_1_and_3(pictures):
    null, cond, _, _ = pictures
    close(diffusion.guide(null, cond, 0), null, "scale 0 ignores the caption; is it Ho & Salimans' "
          "w, which is scale - 1?")
    close(diffusion.guide(null, cond, 1), cond, "scale 1 is the plain model")
    close(diffusion.guide(null, cond, 3), 3 * cond - 2 * null, "1 + w = 3 in Ho & Salimans' count")
    both = diffusion.guide_eps(torch.cat([null, null], 1), torch.cat([cond, pictures[2]], 1), 3)
    close(both[:, :2], 3 * cond - 2 * null, "every channel of eps is guided")
    assert torch.equal(both[:, 2:], pictures[2]), "the variance is the conditional one, unguided"


def test_slerp_walks_the_arc_at_constant_speed(pictures):
    a, b = torch.nn.functional.normalize(pictures[:2].reshape(2, 6, 16), dim=-1)
    angle = (a * b).sum(-1).acos()
    for share in (0.0, 0.25, 0.5, 1.0):
        got = diffusion.slerp(a, b, share)
        close(got.norm(dim=-1), torch.ones(6), "unit rows stay unit rows: not a straight line")
        close((got * a).sum(-1), (share * angle).cos(), "share of the angle, counted from a")
        close((got * b).sum(-1), ((1 - share) * angle).cos(), "the rest of the angle, to b")
        close(diffusion.slerp(3 * a, 3 * b, share), 3 * got, "divide a . b by |a| |b|")
    close(diffusion.slerp(a, 2 * a, 0.5), 1.5 * a, "parallel: the straight line, not 0 / 0")
    close(diffusion.slerp(a, -a, 0.25), 0.5 * a, "opposite: the straight line, not 0 / 0")


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("hint, call", [
    ("s < t", lambda ab, x: diffusion.q_posterior(ab, x, x, 3, 3)),
    ("s < t", lambda ab, x: diffusion.q_posterior(ab, x, x, 3, -1)),
    ("0..50", lambda ab, x: diffusion.q_posterior(ab, x, x, torch.tensor([2, 51]), 1)),
    ("s < t", lambda ab, x: diffusion.ddim_step(ab, x, 3, 4, x)),
    ("u > t", lambda ab, x: diffusion.ddim_invert_step(ab, x, 4, 3, x)),
    ("noise", lambda ab, x: diffusion.ddim_step(ab, x, 4, 3, x, eta=0.5)),
    ("eta", lambda ab, x: diffusion.ddim_step(ab, x, 4, 3, x, eta=1.5, noise=x)),
    ("steps", lambda ab, x: diffusion.spaced_timesteps(10, 11)),
    ("steps", lambda ab, x: diffusion.spaced_timesteps(10, 0)),
    ("stride", lambda ab, x: diffusion.ddim_timesteps(1000, 64)),
    ("T >= 2", lambda ab, x: diffusion.linear_alphabar(1)),
    ("predicts", lambda ab, x: diffusion.sample(None, ab, x, [1], predicts="v")),
    ("learned", lambda ab, x: diffusion.sample(None, ab, x, [1], variance="fixed_small")),
    ("t >= 1", lambda ab, x: diffusion.invert(lambda x, t: x, ab, x, [0, 4])),
    ("at least 2", lambda ab, x: diffusion.invert(lambda x, t: x, ab, x, [4])),
    ("with v", lambda ab, x: diffusion.sample(lambda x, t: x, ab, x, [1, 4], variance="learned")),
    ("axis 1", lambda ab, x: diffusion.sample(lambda x, t: x[:, :, :3], ab, x, [1]))])
def test_bad_input_stops_with_a_sentence(alphabar, pictures, hint, call):
    with pytest.raises(ValueError, match=hint):
        call(alphabar, pictures[0])


# --------------------------------------------------- golden numbers of openai/guided-diffusion


@pytest.fixture(scope="module")
def golden():
    path = Path(__file__).parent / "golden" / "guided_diffusion_math.pt"
    return torch.load(path, weights_only=True)


def double(numbers):
    return {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for k, x in numbers.items()}


LONG = ["cosine||eps|learned_range|1000", "linear||eps|learned_range|1000"]
SHORT = ["cosine|27|eps|learned_range|1000", "linear|ddim25|eps|learned_range|1000",
         "cosine|25|x0|fixed_small|1000", "cosine|7|eps|fixed_small|1000",
         "linear|15|eps|fixed_large|1000"]


@pytest.fixture(params=LONG + SHORT)
def case(request, golden):
    """One setting: numbers wanted, the inputs, and the table of its (perhaps shorter) process."""
    want = double(golden["outputs"][request.param])
    table = diffusion.SCHEDULES[want["schedule"]](1000)
    times = [1 + i for i in golden["timesteps"].get(want["respacing"], range(1000))]
    want.update(name=request.param, t=want["index"] + 1, s=want["index"], times=times, full=table,
                short=table[[0] + times], given=double(golden["inputs"]).values())
    return want


def test_golden_schedules_and_spacings(golden):
    for name, schedule in diffusion.SCHEDULES.items():
        got = schedule(1000)[1:]
        close(got, golden["schedules"][f"{name}_1000"]["alphas_cumprod"], f"{name} schedule", 1e-12)
    for name, want in golden["timesteps"].items():
        got = (diffusion.glide27_timesteps() if name == "fast27"
               else diffusion.ddim_timesteps(1000, int(name[4:])) if name.startswith("ddim")
               else diffusion.section_timesteps(1000, [int(n) for n in name.split(",")]))
        assert [t - 1 for t in got] == want, f"spacing {name}: theirs count from 0; half to even?"


def test_golden_forward_and_reverse_steps(case):
    ab, t, s, (x0, x_t, noise, fresh) = (case[k] for k in ("short", "t", "s", "given"))
    out = case["model_out"]
    raw = out if case["predicts"] == "x0" else diffusion.predict_x0(ab, x_t, t, out[:, :3])
    x0_hat, (mean, var) = raw.clamp(-1, 1), diffusion.q_posterior(ab, x0, x_t, t, s)
    mean_hat, _ = diffusion.q_posterior(ab, x0_hat, x_t, t, s)
    small, large = diffusion.log_var_bounds(ab, t, s)
    log_var = {"fixed_small": small, "fixed_large": torch.where(s > 0, large, small),
               "learned_range": None}[case["variance"]]
    if log_var is None:
        log_var = diffusion.learned_range_log_var(ab, out[:, 3:], t, s)
    std = (log_var / 2).exp().reshape(5, -1, *out.shape[2:] if log_var.ndim > 1 else (1, 1))
    beyond = torch.cat([ab, torch.zeros(1, dtype=torch.float64)])    # they step past the last time
    got = {"q_sample": diffusion.q_sample(ab, x0, t, noise), "posterior_mean": mean,
           "posterior_variance": var.flatten(), "posterior_log_variance": small, "x0": x0_hat,
           "mean": mean_hat, "log_variance": log_var,
           "p_sample": mean_hat + std * fresh * (s > 0).reshape(5, 1, 1, 1),
           "ddim_reverse": diffusion.ddim_invert_step(beyond, x_t, t, t + 1, x0_hat)}
    for eta in (0, 0.5, 1):
        got[f"ddim_eta{eta}"] = diffusion.ddim_step(ab, x_t, t, s, x0_hat, eta, fresh)
    for name in got:
        close(got[name], case[name], f"{name} of {case['name']}", 1e-6)
    size = 1 + case["x0_unclipped"].abs()
    close(raw / size, case["x0_unclipped"] / size, "x0 before the clamp", 1e-6)
    if "betas" in case:
        close(1 - ab[1:] / ab[:-1], case["betas"], "betas of the shorter process", 1e-12)


def test_golden_losses(case):
    ab, t, (x0, _, noise, _) = (case[k] for k in ("short", "t", "given"))
    x_t, out = diffusion.q_sample(ab, x0, t, noise), case["loss_model_out"]
    target = x0 if case["predicts"] == "x0" else noise
    got = {"mse": diffusion.simple_loss(out[:, :3], target)}
    if "vb" in case:
        got["vb_bits"] = diffusion.vlb_loss(ab, out[:, :3], out[:, 3:], x0, x_t, t)
        got["loss"] = diffusion.hybrid_loss(ab, out, x0, x_t, t, noise)
        got["vb"] = got["loss"] - got["mse"]
    for name in got:
        ratio = (1 + got[name]) / (1 + case[name])               # vb grows to thousands of bits
        close(ratio, torch.ones(5), f"{name} of {case['name']}: bits? weight? first step?", 1e-6)


@pytest.mark.parametrize("case", SHORT, indirect=True)
def test_golden_sampling_runs(case, golden, rigged):
    """Whole runs on the *long* table over the kept times: no other table is needed."""
    tag, shape, k = golden["noise"]["tag"], golden["noise"]["shape"], golden["config"]["stand_in"]

    def draw(i):
        seed = zlib.crc32(f"data:{tag}.{i}".encode())
        noise = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        return torch.from_numpy(noise).double()

    def denoise(x, t):
        out = torch.tanh(k["a"] * x + math.sin(k["b"] * (t - 1)))            # networks count from 0
        if case["variance"] == "learned_range":
            out = torch.cat([out, torch.cos(k["c"] * x + k["d"] * (t - 1))], dim=1)
        return out.float().double()                                          # as it was stored

    variance = case["variance"].split("_")[0 if case["variance"] == "learned_range" else 1]
    draws = [draw(i) for i in range(len(case["times"]) + 1)]
    for name, options in {"p_sample_loop": {"variance": variance}, "ddim_loop": {"eta": 0}}.items():
        rigged(draws[1:])
        got = diffusion.sample(denoise, case["full"], draws[0], case["times"], clamp=1.0,
                               predicts=case["predicts"], **options)
        close(got, case[name], f"{name} of {case['name']}: one draw a step, the last unused", 1e-6)


@pytest.mark.parametrize("B", [1, 4, 7])
def test_training_times_are_1_to_T_each_equally_often(B):
    """The usual mistake: 0 is drawn, or T never is."""
    torch.manual_seed(0)
    t = torch.cat([diffusion.random_times(20, B) for _ in range(20_000)])
    share = torch.bincount(t, minlength=21).double() / len(t)
    assert t.min() == 1 and t.max() == 20, f"expected times 1..20, got {t.min()}..{t.max()}"
    close(share[1:], torch.full((20,), 1 / 20), "every time is as likely as any other", 5e-3)


def test_a_batch_has_one_time_from_each_equal_part():
    torch.manual_seed(0)
    for _ in range(100):
        t = diffusion.random_times(1000, 8)
        assert torch.equal((t - 1) // 125, torch.arange(8)), t


def test_middle_times_are_logit_normal():
    """P(t <= T p) = Phi((logit(p) + 0.1) / 0.9), Phi from the error function."""
    torch.manual_seed(0)
    t = torch.cat([diffusion.middle_times(1000, 8) for _ in range(20_000)])
    assert t.min() >= 1 and t.max() <= 1000
    for p in (0.05, 0.2, 0.5, 0.8, 0.95):
        want = 0.5 + 0.5 * math.erf((math.log(p / (1 - p)) + 0.1) / 0.9 / 2 ** 0.5)
        got = (t <= 1000 * p).double().mean().item()
        assert abs(got - want) < 4e-3, f"expected {want:.4f} of them up to {p} T, got {got:.4f}"


# ------------------------------------------------------------------------------------------- demo


def test_the_mixtures_denoiser_is_bayes_on_a_grid(alphabar):
    """E[x0 | x_t] = sum x0 p(x0) p(x_t | x0) / sum p(x0) p(x_t | x0), in one dimension."""
    centres, std = torch.tensor([[-1.5], [0.2], [1.0]], dtype=torch.float64), 0.3
    u = torch.linspace(-6, 6, 40_001, dtype=torch.float64)
    density = torch.exp(-(u[:, None] - centres[:, 0]) ** 2 / (2 * std ** 2)).sum(1)
    x_t = torch.tensor([[-2.0], [0.1], [1.3]], dtype=torch.float64)
    for t in (1, 20, T):
        ab = alphabar[t]
        weight = density * torch.exp(-(x_t - ab.sqrt() * u) ** 2 / (2 * (1 - ab)))     # (3, grid)
        want = (weight * u).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        close(diffusion.mixture_x0(alphabar, x_t, t, centres, std), want, f"t = {t}", 1e-6)


def test_the_demo_ends_where_the_data_are(capsys):
    diffusion.demo()
    blocks = capsys.readouterr().out.split("\n")
    data, again = blocks[3:14], blocks[17:28]
    assert len(data) == len(again) == 11
    a, b = (torch.tensor([[c not in " ." for c in line[:22].ljust(22)] for line in half])
            for half in (data, again))
    assert a.sum() > 20 and (a & b).sum() / (a | b).sum() > 0.7, "the left columns are alike"
