"""Chapter 1, diffusion: every formula is derived a second time, slowly, and compared in float64.

In two worlds the right answer is known: a Gaussian world, data N(m, v), whose best network is a
straight line; and an oracle that simply knows x0. Numbers of other projects: tests/extras.
"""
import itertools
import math

import pytest
import torch

import diffusion

T = 50
GRIDS = [list(range(1, T + 1)), [1, 9, 20, 37, 50], [3, 30, 50]]
TABLE = torch.ones(T + 1, dtype=torch.float64)                   # a variance as measure_cov's


@pytest.fixture
def alphabar():
    return torch.linspace(0, 1.5, T + 1, dtype=torch.float64).cos() ** 2


@pytest.fixture
def images():
    """x0, x_t, eps, raw: four independent (3, 2, 4, 4) tensors, float64."""
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


def tanh(x_t, t):
    return torch.tanh(x_t)


def best_x0(ab, x_t, m, v):
    """E[x0 | x_t] for data N(m, v): the regression line, slope Cov(x0, x_t) / Var(x_t)."""
    return m + ab.sqrt() * v / (ab * v + 1 - ab) * (x_t - ab.sqrt() * m)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- noise schedules and timesteps


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
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_at_the_last_timestep_hardly_any_signal_is_left_whatever_T(schedule, steps):
    ab = diffusion.SCHEDULES[schedule](steps)
    assert ab[-1] < 1e-3, f"{ab[-1]:.1%} signal at T = {steps}: scale linear betas by 1000 / T"
    assert (ab > 0).all() and (ab[1:] < ab[:-1]).all(), "a beta above 1? cap betas at 0.999"


def test_spaced_timesteps_include_both_ends():
    spaced = diffusion.spaced_timesteps
    assert spaced(1000, 7) == [1, 167, 334, 501, 667, 833, 1000], "1 and T; half to even: 500"
    assert spaced(1000, 25)[:4] == [1, 43, 84, 126] and spaced(7, 4) == [1, 3, 5, 7]
    assert spaced(9, 1) == [9], "one step starts where there is only noise"
    for count in range(2, 1001, 7):
        sums = itertools.accumulate([999 / (count - 1)] * (count - 1), initial=0.0)
        timesteps = spaced(1000, count)
        assert timesteps == [1 + round(c) for c in sums], "strides added up, then rounded, not cut"
        assert len({1, 1000, *timesteps}) == count, "both ends, each timestep once"


def test_the_other_spacings():
    sections = diffusion.section_timesteps(10, [2, 3, 1])                  # 1..4, 5..7, 8..10
    assert sections == [1, 4, 5, 6, 7, 10], "sections of 4, 3, 3; the first take what is over"
    timesteps = diffusion.glide27_timesteps()
    assert timesteps[:3] == [1, 23, 45] and timesteps[-4:] == [601, 800, 801, 998], "many near 0"
    assert diffusion.glide27_timesteps(100)[-4:] == [61, 80, 81, 98], "GLIDE's code takes T - 2"
    assert diffusion.transitions([1, 4, 9]) == [(9, 4), (4, 1), (1, 0)], "the last goes to the data"


# ---------------------------------------------------------------- forward process, x0 and posterior


def test_one_jump_equals_many_small_steps(alphabar):
    one, zero, signal, var = torch.ones(1).double(), torch.zeros(1).double(), 1.0, 0.0
    for t in range(1, T + 1):
        alpha = alphabar[t] / alphabar[t - 1]                # x_t = sqrt(alpha) x_t-1 + noise
        signal, var = alpha.sqrt() * signal, alpha * var + 1 - alpha
        close(diffusion.q_sample(alphabar, one, t, zero), signal, f"signal at {t}: sqrt(alphabar)?")
        close(diffusion.q_sample(alphabar, zero, t, one) ** 2, var, f"variance at {t}: no root?")


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_from_the_right_prediction_x0_and_eps_come_back(alphabar, images, predicts):
    x0, _, eps, error = images
    for t in (1, 25, T, torch.tensor([1, 30, T])):
        ab = alphabar[t].reshape(-1, 1, 1, 1)
        want = {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[predicts]
        right = diffusion.target(alphabar, x0, t, eps, predicts)
        close(right, want, "v = sqrt(ab) eps - sqrt(1 - ab) x0; another sign?")

        x_t = diffusion.q_sample(alphabar, x0, t, eps)
        got = diffusion.to_x0(alphabar, right, x_t, t, predicts)
        close(got, x0, f"solve q_sample's formula for x0, {predicts} given")
        close(diffusion.to_eps(alphabar, got, x_t, t), eps, "solve q_sample's formula for eps")

        grows = {"eps": -(1 / ab - 1).sqrt(), "x0": 1, "v": -(1 - ab).sqrt()}[predicts]
        off = diffusion.to_x0(alphabar, right + error, x_t, t, predicts) - x0
        close(off, grows * error, f"how an error in {predicts} enters x0")


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
    mean, var = diffusion.q_posterior(alphabar, x0, x_t, t, 0)
    close(torch.stack([mean, mean + var]), torch.stack([x0, x0]), "to 0: x0, no noise")


CALLS = {
    "q_sample": lambda ab, a, b, c, t, s: diffusion.q_sample(ab, a, t, b),
    "target": lambda ab, a, b, c, t, s: diffusion.target(ab, a, t, b, "v"),
    "to_x0 of eps": lambda ab, a, b, c, t, s: diffusion.to_x0(ab, a, b, t, "eps"),
    "to_x0 of v": lambda ab, a, b, c, t, s: diffusion.to_x0(ab, a, b, t, "v"),
    "to_eps": lambda ab, a, b, c, t, s: diffusion.to_eps(ab, a, b, t),
    "q_posterior": lambda ab, a, b, c, t, s: diffusion.q_posterior(ab, a, b, t, s)[0],
    "ddim_step": lambda ab, a, b, c, t, s: diffusion.ddim_step(ab, a, t, s, b, 0.5, c),
    "ddim_invert_step": lambda ab, a, b, c, t, s: diffusion.ddim_invert_step(ab, a, s, t, b),
    "learned_log_var": lambda ab, a, b, c, t, s: diffusion.learned_log_var(ab, c, t, s),
    "guide": lambda ab, a, b, c, t, s: diffusion.guide(a, b, 3.0),
    "vlb_loss": lambda ab, a, b, c, t, s: diffusion.vlb_loss(ab, a, c, b, c, t),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_are_independent_dtypes_kept_and_arguments_left_alone(alphabar, images, name):
    a, b, c, _ = images
    t, s = torch.tensor([2, 50, 20]), torch.tensor([1, 9, 19])
    before = [x.clone() for x in (alphabar, a, b, c, t, s)]
    got = CALLS[name](alphabar, a, b, c, t, s)
    assert all(map(torch.equal, before, (alphabar, a, b, c, t, s))), f"{name} changed an argument"
    for i in range(3):
        row = slice(i, i + 1)
        alone = CALLS[name](alphabar, a[row], b[row], c[row], t[row], s[row])
        close(got[row], alone, f"{name}: row {i} feels its batch; make coefficients (B, 1, ..)")
    flat = CALLS[name](alphabar, *(x.flatten(1) for x in (a, b, c)), t, s)
    close(got.reshape(3, -1), flat.reshape(3, -1), f"{name} must take any shape, (B, D) too")
    single = CALLS[name](alphabar, a.float(), b.float(), c.float(), t, s)
    assert single.dtype == torch.float32, f"{name} must return x's dtype, not the table's"


def test_float32_data_lose_no_digits_at_either_end():
    """Near t = 1 in 1 - alphabar; at t = T in x0 by way of eps, whose error grows 20,000 times."""
    ab, one, zero = diffusion.cosine_alphabar(1000), torch.ones(1, 1), torch.zeros(1, 1)
    noise = diffusion.to_eps(ab, zero, one, 1)
    close(noise * (1 - ab[1]).sqrt(), 1, "1 - alphabar near t = 1 in float32? cast last", 2e-7)
    assert diffusion.q_posterior(ab, one, one, 2, 1)[1].dtype == torch.float32, "var in x's dtype"
    blow_up = -diffusion.to_x0(ab, one, zero, 1000, "eps")
    close(blow_up / 20291.17, 1, "at t = T an error in eps grows 20,000 times", 1e-6)
    for t, (v, x_t) in zip((500, 999, 1000), torch.randn(3, 2, 1000, generator=seeded())):
        want = ab[t].sqrt() * x_t.double() - (1 - ab[t]).sqrt() * v.double()
        close(diffusion.to_x0(ab, v, x_t, t, "v"), want, f"t = {t}: x0 straight from v", 1e-6)


def test_the_learned_range_ends_at_the_two_bounds(alphabar):
    t, s = torch.tensor([2, 20, 50]), torch.tensor([1, 3, 49])
    one, learned = torch.ones(3, 2, dtype=torch.float64), diffusion.learned_log_var
    small = diffusion.q_posterior(alphabar, one, one, t, s)[1].log().expand(3, 2)
    large = (1 - alphabar[t] / alphabar[s]).log()[:, None].expand(3, 2)
    close(learned(alphabar, -one, t, s), small, "raw = -1 is the small one: is it read as 0..1?")
    close(learned(alphabar, one, t, s), large, "raw = +1 is the large one: are the ends swapped?")
    close(learned(alphabar, 2 * one, t, s), 1.5 * large - 0.5 * small, "not clamped; logs mix")
    close(learned(alphabar, -one, t * 0 + 1, s * 0), small[0, 0], "at s = 0 use the step 2 -> 1's")


@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_the_measured_error_is_the_posterior_variance_of_the_data(alphabar, rigged, predicts):
    """x0 = m +- sqrt(v), eps = +-1: four points with a Gaussian's moments, all a line can see."""
    m, v = 0.4, 0.25
    x0 = m + math.sqrt(v) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    rigged([torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)] * 3)

    def network(x, t):
        x0_hat = best_x0(alphabar[t], x, m, v)
        return x0_hat if predicts == "x0" else diffusion.to_eps(alphabar, x0_hat, x, t)

    cov = diffusion.measure_cov(network, alphabar, x0, [10, 20, 40], predicts=predicts)
    want = [v * (1 - alphabar[t]) / (alphabar[t] * v + 1 - alphabar[t]) for t in (10, 20, 40)]
    close(cov[[10, 20, 40]], want, "the mean squared error of x0_hat, per dimension")
    close(cov[[0, 15, 50]], [0, (want[0] + want[1]) / 2, want[2]], "0 at t = 0, then linear, flat")


# ---------------------------------------------------------------- samplers


def marginals(rigged, alphabar, timesteps, m, v, raw=0.0, **options):
    """The exact mean and variance of x at each timestep of a sampling run, for data N(m, v).

    With a straight line for a network the run is affine in its noises: row 0 gets none, row 1
    only the start, row k + 1 only draw k, each of size 1. Variances of the rows add up.
    """
    rows, seen = torch.eye(len(timesteps) + 2, dtype=torch.float64)[:, :, None, None], {}
    rigged(rows[2:])

    def network(x, t):
        seen[t] = x
        return torch.cat([best_x0(alphabar[t], x, m, v), torch.full_like(x, raw)], dim=1)

    seen[0] = diffusion.sample(network, alphabar, rows[1], timesteps, predicts="x0", **options)
    law, ab = {}, alphabar[timesteps[-1]]
    for t, x in seen.items():
        response = (x - x[0]).flatten()
        var = response[1] ** 2 * (ab * v + 1 - ab) + (response[2:] ** 2).sum()
        law[t] = (x[0].item() + response[1] * ab.sqrt() * m, var)
    return law


@pytest.mark.parametrize("timesteps", GRIDS)
@pytest.mark.parametrize("m, v, options", [
    (0.4, 0.25, {"variance": "analytic"}), (-1, 3.0, {"variance": "analytic"}),
    (5, 0.0, {"variance": "small"}), (5, 0.0, {"variance": "learned", "raw": -1.0}),
    (0, 1.0, {"variance": "large"}), (0, 1.0, {"variance": "learned", "raw": 1.0}),
    (5, 0.0, {"eta": 0.0}), (5, 0.0, {"eta": 0.7}), (5, 0.0, {"eta": 1.0})])
def test_reverse_steps_retrace_the_forward_marginals_on_any_grid(
        alphabar, rigged, timesteps, m, v, options):
    """Small variance is exact for one known x0 (v = 0), large for N(0, I), analytic for N(m, v)."""
    if options.get("variance") == "analytic":
        options = {"variance": v * (1 - alphabar) / (alphabar * v + 1 - alphabar)}  # Var[x0 | x_t]
    for t, (mean, var) in marginals(rigged, alphabar, timesteps, m, v, **options).items():
        if t > 0:
            close(mean, alphabar[t].sqrt() * m, f"the mean of x_{t} is off, with {[*options]}")
            close(var, alphabar[t] * v + 1 - alphabar[t], f"the variance of x_{t} is off, with "
                  f"{[*options]}: is the noise multiplied by a variance for a std, or a short "
                  "process given long betas?")


def test_ddim_tends_to_the_spread_of_the_data(rigged):
    """DDIM is Euler's method for a flow from noise to data: twice the steps, half the error."""
    fine = torch.linspace(0, 1.5, 801, dtype=torch.float64).cos() ** 2
    errors = [marginals(rigged, fine, list(range(k, 801, k)), 0.4, 0.25, eta=0.0)[0][1].sqrt() - 0.5
              for k in (8, 4, 2, 1)]
    for coarse, finer in zip(errors, errors[1:]):
        assert 1.7 < coarse / finer < 2.3, f"std minus the data's: {errors}; two tables mixed?"
    assert abs(errors[-1]) < 2e-3, f"800 steps still miss the data's std by {errors[-1]}"


@pytest.mark.parametrize("timesteps", GRIDS + [[T], [20]])
@pytest.mark.parametrize("options", [{}, {"variance": "large"}, {"variance": "learned"},
                                     {"variance": TABLE}, {"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_every_sampler_ends_exactly_at_the_data_of_an_oracle(
        alphabar, images, timesteps, options, predicts):
    x0, start = images[0] + 5, images[1]                     # data at 5: nothing may be clamped

    def oracle(x_t, t):
        eps = (x_t - alphabar[t].sqrt() * x0) / (1 - alphabar[t]).sqrt()
        out = {"x0": x0, "eps": eps, "v": alphabar[t].sqrt() * eps - (1 - alphabar[t]).sqrt() * x0}
        return torch.cat([out[predicts], torch.zeros_like(x0)], dim=1)

    before = start.clone()
    got = diffusion.sample(oracle, alphabar, start, timesteps, predicts=predicts, **options)
    close(got, x0, "the last step must land on x0: is noise added there, or the step not taken?")
    assert torch.equal(start, before), "sample changed the noise it was given"


@pytest.mark.parametrize("t, s", [(50, 49), (50, 9), (2, 1), (9, 0)])
def test_a_ddim_step_with_the_right_x0_stays_on_the_path_and_eta_one_is_ddpm(
        alphabar, images, t, s):
    x0, other, eps, noise = images
    x_t, x_s = (alphabar[i].sqrt() * x0 + (1 - alphabar[i]).sqrt() * eps for i in (t, s))
    close(diffusion.ddim_step(alphabar, x_t, t, s, x0), x_s, "eps belongs to t: two tables mixed?")
    if s > 0:
        close(diffusion.ddim_invert_step(alphabar, x_s, s, t, x0), x_t, "up is down, reversed")

    mean, var = diffusion.q_posterior(alphabar, x0, other, t, s)
    got = diffusion.ddim_step(alphabar, other, t, s, x0, 1.0, noise)
    close(got, mean + var.sqrt() * noise, "eta = 1 is DDPM; is eta ignored, or sig a variance?")
    shift = diffusion.ddim_step(alphabar, other, t, s, x0, 0.5, noise)
    shift = shift - diffusion.ddim_step(alphabar, other, t, s, x0, 0.5, 0 * noise)
    close(shift, 0.5 * var.sqrt() * noise, "sig is proportional to eta")


def test_x0_is_clamped_and_eps_follows_but_x_t_is_left_alone(alphabar, images):
    seen, x, eps_hat = {}, 3 * images[0], images[2]

    def network(x_t, t):
        seen[t] = x_t
        return eps_hat

    out = diffusion.sample(network, alphabar, x, [20, 50], clamp=1.0, eta=0.0)
    a, b = alphabar[50], alphabar[20]
    x0 = ((x - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    close(seen[20], b.sqrt() * x0 + (1 - b).sqrt() * eps, "x_t = sqrt(ab) x0 + sqrt(1 - ab) eps "
          "must hold after the clamp: recompute eps from the clamped x0, and do not clamp x_t")
    assert out.abs().max() <= 1, "the last step returns the clamped x0"

    seen.clear()
    up = diffusion.invert(network, alphabar, x, [20, 50], clamp=1.0)
    assert [*seen] == [20], "inversion calls the network with the timestep of x, not with its index"
    x0 = ((x - (1 - b).sqrt() * eps_hat) / b.sqrt()).clamp(-1, 1)
    eps = (x - b.sqrt() * x0) / (1 - b).sqrt()
    close(up, a.sqrt() * x0 + (1 - a).sqrt() * eps, "inversion clamps like the sampler it undoes")


@pytest.mark.parametrize("eta", [None, 0.6, 0.0])
def test_one_draw_of_noise_for_each_step_that_adds_some(alphabar, images, eta):
    first, second, third = (seeded(7) for _ in range(3))
    x, timesteps, options = images[0], [1, 9, 20, 50], {"predicts": "x0", "eta": eta}
    got = diffusion.sample(tanh, alphabar, x, timesteps, generator=first, **options)
    for t, s in [(50, 20), (20, 9), (9, 1), (1, 0)]:
        mean, var = diffusion.q_posterior(alphabar, torch.tanh(x), x, t, s)
        noise = torch.randn(x.shape, generator=second).double() if s and eta != 0 else 0 * x
        x = (mean + var.sqrt() * noise if eta is None else
             diffusion.ddim_step(alphabar, x, t, s, torch.tanh(x), eta, noise))
    close(got, x, "same seed, other image: draw in order, one draw a step, in the shape of x")
    assert torch.equal(first.get_state(), second.get_state()), "3 draws in 4 steps; none for eta 0"
    single = diffusion.sample(tanh, alphabar, images[0].float(), timesteps, generator=third,
                              **options)
    close(single, x, "a seed must mean the same noise in float32 and in float64", 1e-5)


def test_with_one_generator_for_each_image_images_do_not_depend_on_their_batch(alphabar, images):
    def sample(x, generator):
        return diffusion.sample(tanh, alphabar, x, [1, 9, 50], predicts="x0", generator=generator)

    x = torch.cat([images[0], images[1]])                    # two rows for each of three images
    got = sample(x, [seeded(i) for i in range(3)])
    for i in range(3):
        alone = sample(x[2 * i:2 * i + 2], seeded(i))
        close(got[2 * i:2 * i + 2], alone, f"rows {2 * i} and {2 * i + 1} belong to generator {i}")
    assert torch.equal(diffusion.noise_like(x, seeded()), torch.randn(x.shape, generator=seeded())
                       .double()), "one generator: one draw of x's shape"
    for generators in ([seeded()] * 4, []):
        with pytest.raises(ValueError, match=f"got {len(generators)} generators for 6 rows"):
            sample(x, generators)


def test_inversion_finds_the_noise_of_a_gaussian_world_and_ddim_brings_the_data_back():
    """The exact flow keeps (x - mean) / std. An error c/n + d/n^2 + ... is extrapolated away."""
    m, v, x0 = 0.4, 0.25, torch.tensor([[1.3, -0.2]], dtype=torch.float64)
    ups, downs = [], []
    for n in (16, 32, 64, 128, 256, 512):
        ab, grid = torch.linspace(0, 1.5, n + 1, dtype=torch.float64).cos() ** 2, range(1, n + 1)
        network = lambda x, t: best_x0(ab[t], x, m, v)                     # noqa: B023, E731
        ups.append(diffusion.invert(network, ab, x0, grid, predicts="x0"))
        downs.append(diffusion.sample(network, ab, ups[-1], grid, predicts="x0", eta=0.0))
    for order in range(1, 6):                                              # Richardson, five times
        ups, downs = ([b + (b - a) / (2 ** order - 1) for a, b in zip(xs, xs[1:])]
                      for xs in (ups, downs))
    x_T = ab[-1].sqrt() * m + (ab[-1] * v + 1 - ab[-1]).sqrt() * (x0 - m) / math.sqrt(v)
    close(ups[0], x_T, "towards finer grids inversion must end at x_T of the exact flow", 1e-6)
    close(downs[0], x0, "towards finer grids the image must come back", 1e-6)


def test_inpainting_draws_the_unknown_part_given_the_known_one(alphabar):
    """A pair of correlated Gaussian numbers, of which the first is known: RePaint comes within 0.03

    of the conditional mean m2 + S21 / S11 (x1 - m1) and variance S22 - S21^2 / S11 of the other.
    """
    m = torch.tensor([0.5, -0.3], dtype=torch.float64)
    S = torch.tensor([[1.0, 0.64], [0.64, 0.64]], dtype=torch.float64)
    slope = [torch.linalg.solve(ab * S + (1 - ab) * torch.eye(2).double(), ab.sqrt() * S)
             for ab in alphabar]                                           # of x0 on x_t
    cov = [(S - ab.sqrt() * S @ k).trace() / 2 for ab, k in zip(alphabar, slope)]

    def inpaint(resample):
        x = torch.randn(4000, 2, generator=seeded(1)).double()
        return diffusion.inpaint(
            lambda x, t: m + (x - alphabar[t].sqrt() * m) @ slope[t], alphabar, x,
            torch.full((4000, 2), 1.5).double(), torch.tensor([1, 0]), GRIDS[0], resample=resample,
            predicts="x0", variance=torch.stack(cov), generator=seeded())

    known, unknown = inpaint(30).T
    assert (known == 1.5).all(), "the known part must come back as it was"
    mean, std = m[1] + S[1, 0] / S[0, 0] * (1.5 - m[0]), (S[1, 1] - S[1, 0] ** 2 / S[0, 0]).sqrt()
    close(unknown.mean(), mean, "the mean of the unknown part, given the known one", 0.03)
    close(unknown.std(), std, "and its spread", 0.03)
    assert inpaint(1)[:, 1].mean() < mean - 0.15, "without resampling it should fit less well"


def test_inpainting_repeats_each_step_and_goes_back_up_by_the_forward_process(
        alphabar, images, rigged):
    """From s to t, x_t = sqrt(ab_t / ab_s) x_s + sqrt(1 - ab_t / ab_s) noise; none from 0."""
    seen, (x0, x, noise, fresh) = [], images
    network = lambda x_t, t: seen.append((t, x_t)) or 2 * x0                           # noqa: E731
    rigged([noise, noise, fresh, noise, noise, fresh, noise, noise])
    mask = torch.arange(4) < 2                                             # the two columns left
    got = diffusion.inpaint(network, alphabar, x, x0, mask, [20, 50], resample=3, predicts="x0",
                            clamp=0.5)
    want = torch.where(mask, x0, (2 * x0).clamp(-0.5, 0.5))
    close(got, want, "known: as it was; unknown: what the last step makes of it, clamped")

    assert [t for t, _ in seen] == [50, 50, 50, 20], "`resample` times each step, but the last once"
    mean, var = diffusion.q_posterior(alphabar, (2 * x0).clamp(-0.5, 0.5), x, 50, 20)
    known = alphabar[20].sqrt() * x0 + (1 - alphabar[20]).sqrt() * noise
    x_s, alpha = torch.where(mask, known, mean + var.sqrt() * noise), alphabar[50] / alphabar[20]
    close(seen[1][1], alpha.sqrt() * x_s + (1 - alpha).sqrt() * fresh, "back up by q(x_t | x_s)")


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_error_of_the_prediction_at_the_noised_data(
        alphabar, images, monkeypatch, predicts):
    x0, _, eps, out = images
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    t, seen = torch.tensor([1, 20, T]), []
    got = diffusion.loss(lambda *args: seen.append(args) or out, alphabar, x0, predicts, t)
    for i in range(3):
        ab = alphabar[t[i]]
        want = {"eps": eps[i], "x0": x0[i], "v": ab.sqrt() * eps[i] - (1 - ab).sqrt() * x0[i]}
        close(got[i], ((out[i] - want[predicts]) ** 2).mean(), "the mean of the squared error")
        close(seen[0][0][i], ab.sqrt() * x0[i] + (1 - ab).sqrt() * eps[i], "of x_t, not of x0")
    assert torch.equal(seen[0][1], t), "the network is called with t itself, 1..T"


def test_training_draws_1_to_T_each_equally_often():
    """The usual mistake: 0 is drawn, or T never is."""
    torch.manual_seed(0)
    x0, seen = torch.zeros(20_000, 1), []
    diffusion.loss(lambda x_t, t: seen.append(t) or x_t, diffusion.cosine_alphabar(20), x0)
    counts = torch.bincount(seen[0], minlength=21).double()
    assert len(counts) == 21 and counts[0] == 0, f"expected 1..20, got {counts}"
    close(counts[1:] / 20_000, torch.full((20,), 1 / 20), "each as likely as any other", 8e-3)
    loss = diffusion.loss(lambda x_t, t: 0 * x_t, diffusion.cosine_alphabar(20), x0)
    close(loss.mean(), 1, "predicting eps = 0 costs E eps^2 = 1", 0.05)


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (-0.97, 0.01), (1.4, 1.0)])
def test_the_likelihood_of_the_256_pixel_values_sums_to_one(mean, std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(x, mean), torch.full_like(x, math.log(std))
    got = diffusion.discretized_log_likelihood(x, mean, log_std).exp()
    close(got.sum(), 1, "bins are x +- 1/255, the outer ones open: no mass may be lost", 1e-8)
    close(diffusion.discretized_log_likelihood(x, mean + 9e9, log_std)[0], math.log(1e-12), "floor")
    cdf = [0.5 * (1 + math.erf((x[100] + h / 255 - mean[0]) / (std * 2 ** 0.5))) for h in (-1, 1)]
    close(got[100], cdf[1] - cdf[0], "the mass of a normal distribution in the bin", 1e-3)


def test_the_hybrid_loss_adds_a_thousandth_of_the_whole_bound(alphabar, images, monkeypatch):
    """Expectation over t of the added term = 0.001 * the sum over all t, by torch's own KL."""
    (x0, _, eps, raw), normal = images[:, :1], torch.distributions.Normal
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    kl, whole, added = torch.distributions.kl_divergence, 0.0, []
    out = torch.cat([0.9 * eps, raw], dim=1)
    for t in range(1, T + 1):
        loss = diffusion.loss(lambda x_t, t: out, alphabar, x0, t=torch.tensor([t]))
        added.append(loss - ((0.1 * eps) ** 2).mean())
        x_t = alphabar[t].sqrt() * x0 + (1 - alphabar[t]).sqrt() * eps
        x0_hat = (x_t - (1 - alphabar[t]).sqrt() * 0.9 * eps) / alphabar[t].sqrt()
        mean, var = diffusion.q_posterior(alphabar, x0, x_t, t, t - 1)
        mean_hat, _ = diffusion.q_posterior(alphabar, x0_hat, x_t, t, t - 1)
        std_hat = (diffusion.learned_log_var(alphabar, raw, t, t - 1) / 2).exp()
        nats = (kl(normal(mean, var.sqrt()), normal(mean_hat, std_hat)) if t > 1 else
                -diffusion.discretized_log_likelihood(x0, mean_hat, std_hat.log()))
        whole = whole + nats.mean() / math.log(2)
    close(sum(added) / T, 0.001 * whole, "a sampled term represents all T: its weight is T / 1000, "
          "not 0.001; in bits (divide by log 2); at t = 1 the discretised likelihood")


def test_the_bound_trains_the_variance_only(alphabar, images, monkeypatch):
    x0, _, eps, raw = images
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    out = torch.cat([0.5 * eps, raw], dim=1).requires_grad_()
    diffusion.loss(lambda x_t, t: out, alphabar, x0, t=torch.tensor([1, 20, T])).sum().backward()
    for_eps, for_raw = out.grad.chunk(2, dim=1)
    close(for_eps, 2 * (0.5 * eps - eps) / eps[0].numel(), "detach the prediction in the bound")
    assert (for_raw.flatten(1).abs().sum(1) > 0).all(), "the variance learns at every t"


def test_guidance_at_0_1_and_3_runs_both_conditions_as_one_batch(images):
    null, cond, raw, x_t = images
    close(diffusion.guide(null, cond, 0), null, "scale 0 ignores the caption; is it Ho & Salimans' "
          "w, which is scale - 1?")
    close(diffusion.guide(null, cond, 1), cond, "scale 1 is the plain model")
    close(diffusion.guide(null, cond, 3), 3 * cond - 2 * null, "1 + w = 3 in Ho & Salimans' count")

    halves = torch.cat([torch.cat([null, 0 * raw], dim=1), torch.cat([cond, raw], dim=1)])
    network = lambda x, t: halves * torch.equal(x, torch.cat([x_t, x_t])) * (t == 7)   # noqa: E731
    got = diffusion.guided(network, 3.0, 2)(x_t, 7)
    close(got[:, :2], 3 * cond - 2 * null, "x_t twice, one t; the unconditional rows come first")
    assert torch.equal(got[:, 2:], raw), "the variance is the conditional one, unguided"
    assert diffusion.guided(network, 1, 2) is network, "scale 1: half the work, the same numbers"


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2,), (2, 9, 4, 4), (1, 3, 4, 4), (2, 3, 4)])
def test_a_prediction_of_another_shape_is_refused(alphabar, shape):
    x, network = torch.zeros(2, 3, 4, 4), lambda x, t: torch.zeros(shape)
    for call in (lambda: diffusion.sample(network, alphabar, x, [5]),
                 lambda: diffusion.loss(network, alphabar, x),
                 lambda: diffusion.invert(network, alphabar, x, [1, 5])):
        with pytest.raises(ValueError, match=r"expected a prediction like x_t \(2, 3, 4, 4\)"):
            call()


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
    ("T >= 2", lambda ab, x: diffusion.linear_alphabar(1)),
    ("predicts", lambda ab, x: diffusion.sample(tanh, ab, x, [1], predicts="velocity")),
    ("predicts", lambda ab, x: diffusion.loss(tanh, ab, x, "velocity")),
    ("learned", lambda ab, x: diffusion.sample(tanh, ab, x, [1], variance="fixed_small")),
    ("both", lambda ab, x: diffusion.sample(tanh, ab, x, [1], variance="large", eta=0.0)),
    ("both", lambda ab, x: diffusion.sample(tanh, ab, x, [1], variance=TABLE, eta=0.0)),
    ("twice the", lambda ab, x: diffusion.sample(tanh, ab, x, [1, 4], variance="learned")),
    ("t >= 1", lambda ab, x: diffusion.invert(tanh, ab, x, [0, 4])),
    ("at least 2", lambda ab, x: diffusion.invert(tanh, ab, x, [4])),
    ("resample >= 1", lambda ab, x: diffusion.inpaint(tanh, ab, x, x, x > 0, [4], resample=0))])
def test_bad_input_stops_with_a_sentence(alphabar, images, hint, call):
    with pytest.raises(ValueError, match=hint):
        call(alphabar, images[0])
    x = diffusion.sample(tanh, alphabar, torch.ones(4), [5, 10], predicts="x0", eta=0.0)
    assert x.shape == (4,), "numbers (B,) are data, too"


# ---------------------------------------------------------------- demo


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


def test_the_demo_ends_where_the_data_are(capsys, tmp_path):
    diffusion.demo(tmp_path / "clouds.png")
    blocks = capsys.readouterr().out.split("\n")
    data, again = blocks[3:14], blocks[17:28]
    assert len(data) == len(again) == 11
    a, b = (torch.tensor([[c not in " ." for c in line[:22].ljust(22)] for line in half])
            for half in (data, again))
    assert a.sum() > 20 and (a & b).sum() / (a | b).sum() > 0.7, "the left columns are alike"
    assert 10_000 < (tmp_path / "clouds.png").stat().st_size < 200_000, "an image of at most 200 kB"
