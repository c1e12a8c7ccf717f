"""Chapter 1, diffusion: every formula is derived a second time, slowly, and compared in float64.

In two worlds the right answer is known: a Gaussian world, data N(m, v), whose best network is a
straight line; and an oracle that simply knows x0. Numbers of other projects: tests/extras.
"""
import itertools
import math

import pytest
import torch

import diffusion
from conftest import seed

T = 50
GRIDS = [list(range(1, T + 1)), [1, 9, 20, 37, 50], [3, 30, 50]]
TABLE = torch.ones(T + 1, dtype=torch.float64)                   # a variance as measure_cov's


@pytest.fixture
def ab():
    return torch.linspace(0, 1.5, T + 1, dtype=torch.float64).cos() ** 2


@pytest.fixture
def images():
    """x0, x_t, eps, raw: four independent (3, 2, 4, 4) tensors, float64."""
    return torch.randn(4, 3, 2, 4, 4, generator=seed()).double()


@pytest.fixture
def rigged(monkeypatch):
    """rigged(tensors): the next calls of torch.randn or randn_like return these, one by one."""
    def rig(draws):
        draws = iter(draws)
        for name in ("randn", "randn_like"):
            monkeypatch.setattr(torch, name, lambda *_, **__: next(draws))
    return rig


def close(got, want, hint, tol=1e-9):
    """Equal to tol, relative to the largest number wanted where that exceeds 1."""
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert error <= tol, f"{hint}\nwanted {want.flatten()[:4]}, got {got.flatten()[:4]}"


def tanh(x_t, t):
    return torch.tanh(x_t)


def noised(a, x0, eps):
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def right(predicts, a, x0, eps):
    return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[predicts]


def best_x0(a, x_t, m, v):
    """E[x0 | x_t] for data N(m, v): the regression line, slope Cov(x0, x_t) / Var(x_t)."""
    return m + a.sqrt() * v / (a * v + 1 - a) * (x_t - a.sqrt() * m)


# ---------------------------------------------------------------- noise schedules and timesteps
def test_the_schedules_have_the_published_numbers_and_end_in_noise_whatever_T():
    cosine, linear = diffusion.cosine_alphabar(1000), diffusion.linear_alphabar(1000)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    close(cosine[:1000], [u / f[0] for u in f[:1000]], "before the cap, alphabar_t is f(t) / f(0)")
    close(1 - cosine[1000] / cosine[999], 0.999, "cap betas at 0.999: the last one")
    close([1 - linear[1], 1 - linear[1000] / linear[999]], [1e-4, 0.02], "linear betas")
    close([(1 - cosine[1]) / 4.13e-5, cosine[1000] / 2.43e-9, linear[1000] / 4.04e-5], [1, 1, 1],
          "paper: cosine beta_1 = 4.13e-5, alphabar_T = 2.43e-9; linear alphabar_T = 4.04e-5", 2e-3)
    for name, steps in itertools.product(("cosine", "linear"), (2, 5, 10, 20, 21, 50, 100, 1000)):
        ab = diffusion.SCHEDULES[name](steps)
        assert ab.shape == (steps + 1,) and ab.dtype == torch.float64 and ab[0] == 1, "0 is data"
        assert ab[-1] < 1e-3, f"{ab[-1]:.1%} signal at T = {steps}: scale linear betas by 1000 / T"
        assert (ab > 0).all() and (ab[1:] < ab[:-1]).all(), "a beta above 1? cap betas at 0.999"


def test_spaced_timesteps_include_both_ends_and_other_spacings_are_as_published():
    spaced = diffusion.spaced_timesteps
    assert spaced(1000, 7) == [1, 167, 334, 501, 667, 833, 1000], "1 and T; half to even: 500"
    assert spaced(1000, 25)[:4] == [1, 43, 84, 126] and spaced(7, 4) == [1, 3, 5, 7]
    assert spaced(9, 1) == [9], "one step starts where there is only noise"
    for count in range(2, 1001, 7):
        sums = itertools.accumulate([999 / (count - 1)] * (count - 1), initial=0.0)
        timesteps = spaced(1000, count)
        assert timesteps == [1 + round(c) for c in sums], "strides added up, then rounded, not cut"
        assert len({1, 1000, *timesteps}) == count, "both ends, each timestep once"
    sections = diffusion.section_timesteps(10, [2, 3, 1])                  # 1..4, 5..7, 8..10
    assert sections == [1, 4, 5, 6, 7, 10], "sections of 4, 3, 3; the first take what is over"
    timesteps = diffusion.glide27_timesteps()
    assert timesteps[:3] == [1, 23, 45] and timesteps[-4:] == [601, 800, 801, 998], "many near 0"
    counts = [sum(200 * i < t <= 200 * i + 200 for t in timesteps) for i in range(5)]
    assert counts == [10, 10, 3, 2, 2], f"27, of each fifth 10, 10, 3, 2, 2: {counts}"
    assert diffusion.glide27_timesteps(100)[-4:] == [61, 80, 81, 98], "GLIDE's code takes T - 2"
    assert diffusion.transitions([1, 4, 9]) == [(9, 4), (4, 1), (1, 0)], "the last goes to the data"


# ---------------------------------------------------------------- forward process, x0 and posterior
def test_one_jump_equals_many_small_steps(ab):
    one, zero, signal, var = torch.ones(1).double(), torch.zeros(1).double(), 1.0, 0.0
    for t in range(1, T + 1):
        alpha = ab[t] / ab[t - 1]                            # x_t = sqrt(alpha) x_t-1 + noise
        signal, var = alpha.sqrt() * signal, alpha * var + 1 - alpha
        close(diffusion.q_sample(ab, one, t, zero), signal, f"signal at {t}: sqrt(alphabar)?")
        close(diffusion.q_sample(ab, zero, t, one) ** 2, var, f"variance at {t}: no root?")


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_from_the_right_prediction_x0_and_eps_come_back(ab, images, predicts):
    x0, _, eps, _ = images
    for t in (1, 25, T, torch.tensor([1, 30, T])):
        target = diffusion.target(ab, x0, t, eps, predicts)
        close(target, right(predicts, ab[t].reshape(-1, 1, 1, 1), x0, eps),
              "v = sqrt(ab) eps - sqrt(1 - ab) x0; another sign?")
        x_t = noised(ab[t].reshape(-1, 1, 1, 1), x0, eps)
        close(diffusion.to_x0(ab, target, x_t, t, predicts), x0, "solve q_sample's formula for x0")
        close(diffusion.to_eps(ab, x0, x_t, t), eps, "solve q_sample's formula for eps")


@pytest.mark.parametrize("t, s", [(2, 1), (10, 9), (49, 3), (50, 30)])
def test_the_posterior_is_bayes_rule(ab, t, s):
    """Tabulate q(x_t | u) q(u | x0) on a fine grid of u and measure its mean and variance."""
    x0, x_t = torch.tensor([[0.7], [-0.3]], dtype=torch.float64)
    u, alpha = torch.linspace(-6, 6, 400_001, dtype=torch.float64), ab[t] / ab[s]
    p = (-(x_t - alpha.sqrt() * u) ** 2 / (2 * (1 - alpha))
         - (u - ab[s].sqrt() * x0) ** 2 / (2 * (1 - ab[s]))).softmax(0)
    mean = (p * u).sum()
    got, var = diffusion.q_posterior(ab, x0, x_t, t, s)
    close(got, mean, "Bayes' rule gives another mean: are the weights of x0 and x_t swapped?", 1e-8)
    close(var, (p * (u - mean) ** 2).sum(), "Bayes: another var; is it a std, or 1 - alpha?", 1e-8)
    mean, var = diffusion.q_posterior(ab, x0, x_t, t, 0)
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
def test_rows_are_independent_dtypes_kept_and_arguments_left_alone(ab, images, name):
    a, b, c, _ = images
    t, s = torch.tensor([2, 50, 20]), torch.tensor([1, 9, 19])
    before = [x.clone() for x in (ab, a, b, c, t, s)]
    got = CALLS[name](ab, a, b, c, t, s)
    assert all(map(torch.equal, before, (ab, a, b, c, t, s))), f"{name} changed an argument"
    for i in range(3):
        alone = CALLS[name](ab, *(x[i:i + 1] for x in (a, b, c, t, s)))
        close(got[i:i + 1], alone, f"{name}: row {i} feels its batch; coefficients (B, 1, ..)?")
    flat = CALLS[name](ab, *(x.flatten(1) for x in (a, b, c)), t, s)
    close(got.reshape(3, -1), flat.reshape(3, -1), f"{name} must take any shape, (B, D) too")
    single = CALLS[name](ab, a.float(), b.float(), c.float(), t, s)
    assert single.dtype == torch.float32, f"{name} must return x's dtype, not the table's"
    away = CALLS[name](ab, a.to("meta"), b.to("meta"), c.to("meta"), t, s)     # another device
    assert away.device.type == "meta", f"{name}: coefficients must travel to where x is"


def test_float32_data_lose_no_digits_at_either_end():
    """Near t = 1 in 1 - alphabar; at t = T in x0 by way of eps, whose error grows 20,000 times."""
    ab, one, zero = diffusion.cosine_alphabar(1000), torch.ones(1, 1), torch.zeros(1, 1)
    noise = diffusion.to_eps(ab, zero, one, 1)
    close(noise * (1 - ab[1]).sqrt(), 1, "1 - alphabar near t = 1 in float32? cast last", 2e-7)
    assert diffusion.q_posterior(ab, one, one, 2, 1)[1].dtype == torch.float32, "var in x's dtype"
    blow_up = -diffusion.to_x0(ab, one, zero, 1000, "eps")
    close(blow_up / 20291.17, 1, "at t = T an error in eps grows 20,000 times", 1e-6)
    for t, (v, x_t) in zip((500, 999, 1000), torch.randn(3, 2, 1000, generator=seed())):
        want = ab[t].sqrt() * x_t.double() - (1 - ab[t]).sqrt() * v.double()
        close(diffusion.to_x0(ab, v, x_t, t, "v"), want, f"t = {t}: x0 straight from v", 1e-6)


def test_the_learned_range_ends_at_the_two_bounds(ab):
    t, s = torch.tensor([2, 20, 50]), torch.tensor([1, 3, 49])
    one, learned = torch.ones(3, 2, dtype=torch.float64), diffusion.learned_log_var
    small = diffusion.q_posterior(ab, one, one, t, s)[1].log().expand(3, 2)
    large = (1 - ab[t] / ab[s]).log()[:, None].expand(3, 2)
    close(learned(ab, -one, t, s), small, "raw = -1 is the small one: is it read as 0..1?")
    close(learned(ab, one, t, s), large, "raw = +1 is the large one: are the ends swapped?")
    close(learned(ab, 2 * one, t, s), 1.5 * large - 0.5 * small, "not clamped; logs mix")
    close(learned(ab, -one, t * 0 + 1, s * 0), small[0, 0], "at s = 0 use the step 2 -> 1's")


@pytest.mark.parametrize("predicts", ["x0", "eps"])
def test_the_measured_error_is_the_posterior_variance_of_the_data(ab, rigged, predicts):
    """x0 = m +- sqrt(v), eps = +-1: four points with a Gaussian's moments, all a line can see."""
    m, v = 0.4, 0.25
    x0 = m + math.sqrt(v) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    rigged([torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)] * 3)

    def network(x, t):
        x0_hat = best_x0(ab[t], x, m, v)
        return x0_hat if predicts == "x0" else diffusion.to_eps(ab, x0_hat, x, t)

    default = {} if predicts == "x0" else {"predicts": predicts}
    cov = diffusion.measure_cov(network, ab, x0, [10, 20, 40], **default)
    want = [v * (1 - ab[t]) / (ab[t] * v + 1 - ab[t]) for t in (10, 20, 40)]
    want = [0, want[0] / 2, want[0], (want[0] + want[1]) / 2, *want[1:], want[2]]
    close(cov[[0, 5, 10, 15, 20, 40, 50]], want,
          "the mean squared error of x0_hat, per dimension; 0 at t = 0, linear, then flat")


# ---------------------------------------------------------------- samplers
def marginals(rigged, ab, timesteps, m, v, raw=0.0, **options):
    """The exact mean and variance of x at each timestep of a sampling run, for data N(m, v).

    With a straight line for a network the run is affine in its noises: row 0 gets none, row 1
    only the start, row k + 1 only draw k, each of size 1. Variances of the rows add up.
    """
    rows, seen = torch.eye(len(timesteps) + 2, dtype=torch.float64)[:, :, None, None], {}
    rigged(rows[2:])

    def network(x, t):
        seen[t] = (x - x[0]).flatten(), x[0].item()
        return torch.cat([best_x0(ab[t], x, m, v), torch.full_like(x, raw)], dim=1)

    diffusion.sample(network, ab, rows[1], timesteps, predicts="x0", **options)
    a = ab[timesteps[-1]]
    for t, (response, bias) in seen.items():
        var = response[1] ** 2 * (a * v + 1 - a) + (response[2:] ** 2).sum()
        yield t, bias + response[1] * a.sqrt() * m, var


@pytest.mark.parametrize("timesteps", GRIDS)
@pytest.mark.parametrize("m, v, options", [
    (0.4, 0.25, {"variance": "analytic"}), (-1, 3.0, {"variance": "analytic"}),
    (5, 0.0, {"variance": "small"}), (5, 0.0, {"variance": "learned", "raw": -1.0}),
    (0, 1.0, {"variance": "large"}), (0, 1.0, {"variance": "learned", "raw": 1.0}),
    (5, 0.0, {"eta": 0.0}), (5, 0.0, {"eta": 0.7}), (5, 0.0, {"eta": 1.0})])
def test_reverse_steps_retrace_the_forward_marginals_on_any_grid(
        ab, rigged, timesteps, m, v, options):
    """Small variance is exact for one known x0 (v = 0), large for N(0, I), analytic for N(m, v)."""
    if options.get("variance") == "analytic":
        options = {"variance": v * (1 - ab) / (ab * v + 1 - ab)}           # Var[x0 | x_t]
    for t, mean, var in marginals(rigged, ab, timesteps, m, v, **options):
        close(mean, ab[t].sqrt() * m, f"the mean of x_{t} is off, with {[*options]}")
        close(var, ab[t] * v + 1 - ab[t], f"the variance of x_{t} is off, with {[*options]}: is "
              "the noise multiplied by a variance for a std, or a short process given long betas?")


def test_ddim_and_its_inversion_follow_one_flow_with_half_the_error_in_twice_the_steps():
    """In a Gaussian world that flow keeps (x - mean) / std; both are Euler's method for it."""
    m, v, x0 = 0.4, 0.25, torch.tensor([[1.3, -0.2]], dtype=torch.float64)
    errors = []
    for n in (256, 512, 1024):
        ab, grid = torch.linspace(0, 1.5, n + 1, dtype=torch.float64).cos() ** 2, range(1, n + 1)
        x_T = noised(ab[-1], m, 0) + (ab[-1] * v + 1 - ab[-1]).sqrt() * (x0 - m) / math.sqrt(v)
        network = lambda x, t: best_x0(ab[t], x, m, v)                     # noqa: B023, E731
        up = diffusion.invert(network, ab, x0, grid, predicts="x0")
        down = diffusion.sample(network, ab, x_T, grid, predicts="x0", eta=0.0)
        errors.append(torch.cat([up - x_T, down - x0]))
    for coarse, fine in zip(errors, errors[1:]):
        ratio = coarse / fine
        assert ((1.9 < ratio) & (ratio < 2.1)).all(), f"up, down: {ratio}; two tables mixed?"
    assert errors[-1].abs().max() < 5e-3, f"1024 steps still miss by {errors[-1]}"


@pytest.mark.parametrize("timesteps", GRIDS + [[T], [20]])
@pytest.mark.parametrize("options", [{}, {"variance": "large"}, {"variance": "learned"},
                                     {"variance": TABLE}, {"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}])
@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_every_sampler_ends_exactly_at_the_data_of_an_oracle(
        ab, images, timesteps, options, predicts):
    x0, start = images[0] + 5, images[1]                     # data at 5: nothing may be clamped

    def oracle(x_t, t):
        eps = (x_t - ab[t].sqrt() * x0) / (1 - ab[t]).sqrt()
        return torch.cat([right(predicts, ab[t], x0, eps), torch.zeros_like(x0)], dim=1)

    before = start.clone()
    got = diffusion.sample(oracle, ab, start, timesteps, predicts=predicts, **options)
    close(got, x0, "the last step must land on x0: is noise added there, or the step not taken?")
    assert torch.equal(start, before), "sample changed the noise it was given"


@pytest.mark.parametrize("t, s", [(50, 49), (50, 9), (2, 1), (9, 0)])
def test_a_ddim_step_with_the_right_x0_stays_on_the_path_and_eta_one_is_ddpm(ab, images, t, s):
    x0, other, eps, noise = images
    x_t, x_s = noised(ab[t], x0, eps), noised(ab[s], x0, eps)
    close(diffusion.ddim_step(ab, x_t, t, s, x0), x_s, "eps belongs to t: two tables mixed?")
    if s > 0:
        close(diffusion.ddim_invert_step(ab, x_s, s, t, x0), x_t, "up is down, reversed")

    mean, var = diffusion.q_posterior(ab, x0, other, t, s)
    got = diffusion.ddim_step(ab, other, t, s, x0, 1.0, noise)
    close(got, mean + var.sqrt() * noise, "eta = 1 is DDPM; is eta ignored, or sig a variance?")
    with_noise, without = (diffusion.ddim_step(ab, other, t, s, x0, 0.5, k * noise) for k in (1, 0))
    close(with_noise - without, 0.5 * var.sqrt() * noise, "sig is proportional to eta")


def test_x0_is_clamped_and_eps_follows_but_x_t_is_left_alone(ab, images):
    seen, x, eps_hat = {}, 3 * images[0], images[2]

    def network(x_t, t):
        seen[t] = x_t
        return eps_hat

    def step(t, s):
        x0 = ((x - (1 - ab[t]).sqrt() * eps_hat) / ab[t].sqrt()).clamp(-1, 1)
        return noised(ab[s], x0, (x - ab[t].sqrt() * x0) / (1 - ab[t]).sqrt())

    out = diffusion.sample(network, ab, x, [20, 50], clamp=1.0, eta=0.0)
    close(seen[20], step(50, 20), "x_t = sqrt(ab) x0 + sqrt(1 - ab) eps must hold after the clamp: "
          "recompute eps from the clamped x0, and do not clamp x_t")
    assert out.abs().max() <= 1, "the last step returns the clamped x0"

    seen.clear()
    up = diffusion.invert(network, ab, x, [20, 50], clamp=1.0)
    assert [*seen] == [20], "inversion calls the network with the timestep of x, not with its index"
    close(up, step(20, 50), "inversion clamps like the sampler it undoes")


@pytest.mark.parametrize("eta", [None, 0.6, 0.0])
def test_one_draw_of_noise_for_each_step_that_adds_some(ab, images, eta):
    first, second, third = (seed(7) for _ in range(3))
    x, timesteps, options = images[0], [1, 9, 20, 50], {"predicts": "x0", "eta": eta}
    got = diffusion.sample(tanh, ab, x, timesteps, generator=first, **options)
    single = diffusion.sample(tanh, ab, x.float(), timesteps, generator=third, **options)
    for t, s in [(50, 20), (20, 9), (9, 1), (1, 0)]:
        mean, var = diffusion.q_posterior(ab, torch.tanh(x), x, t, s)
        noise = torch.randn(x.shape, generator=second).double() if s and eta != 0 else 0 * x
        x = (mean + var.sqrt() * noise if eta is None else
             diffusion.ddim_step(ab, x, t, s, torch.tanh(x), eta, noise))
    close(got, x, "same seed, other image: draw in order, one draw a step, in the shape of x")
    close(single, x, "a seed must mean the same noise in float32 and in float64", 1e-5)
    assert torch.equal(first.get_state(), second.get_state()), "3 draws in 4 steps; none for eta 0"


@pytest.mark.parametrize("resample", [None, 1, 2])
def test_with_one_generator_for_each_image_images_do_not_depend_on_their_batch(
        ab, images, resample):
    def sample(x, generator):
        options = {"predicts": "x0", "generator": generator}
        network = lambda x, t: torch.tanh(x.flip(3))                       # noqa: E731
        if resample is None:
            return diffusion.sample(network, ab, x, [1, 9, 50], **options)
        return diffusion.inpaint(network, ab, x, x, x > 0, [1, 9, 50], resample=resample, **options)

    x = torch.cat([images[0], images[1]])                    # two rows for each of three images
    got = sample(x, [seed(i) for i in range(3)])
    for i in range(3):
        alone = sample(x[2 * i:2 * i + 2], seed(i))
        close(got[2 * i:2 * i + 2], alone, f"rows {2 * i} and {2 * i + 1} belong to generator {i}")
    for generators in ([seed()] * 4, []):
        with pytest.raises(ValueError, match=f"got {len(generators)} generators for 6 rows"):
            sample(x, generators)


def test_noise_is_drawn_where_its_generator_is_and_each_draws_its_own_rows(ab, images):
    asked, far, pair = [], torch.device("meta"), [seed(), seed(1)]

    def zeros(shape, generator, device):
        asked.append(([*shape], generator, torch.device(device).type))
        return torch.zeros(shape)
    for generator, dim in ((None, 0), (pair[0], 0), (pair, 0), (pair, 1)):
        x = diffusion.draw(zeros, [2, 6], generator, far, dim)
        assert x.shape == (2, 6) and x.device == far, "the noise goes to where x is"
    assert asked == [([2, 6], None, "meta"), ([2, 6], pair[0], "cpu"), *(
        (shape, g, "cpu") for shape in ([1, 6], [2, 3]) for g in pair)], "where the generator is"
    a, b = (diffusion.measure_cov(tanh, ab, images[0], [9], seed()) for _ in range(2))
    assert torch.equal(a, b), "a seed decides what is measured, too"
    both = diffusion.measure_cov(lambda x, t: torch.cat([tanh(x, t)] * 2, 1), ab, images[0], [9],
                                 seed())
    assert torch.equal(a, both), "of a network with a variance its prediction counts"


def test_data_may_be_single_numbers_and_every_row_may_have_its_timesteps(ab, images):
    x0, t, s = images[0, :, 0, 0, 0], torch.tensor([9, 30, 50]), torch.tensor([3, 20, 49])
    assert torch.equal(diffusion.loss(lambda x, t: 0 * x, ab, x0, "x0", t), x0 ** 2)
    small = diffusion.q_posterior(ab, images[0], images[1], t, s)[1]
    for variance in ("small", "large", TABLE):
        got = diffusion.step_variance(ab, variance, small, None, t, s)
        want = [diffusion.step_variance(ab, variance, v, None, *ts) for v, *ts in zip(small, t, s)]
        assert got.shape == small.shape
        close(got.flatten(), torch.stack(want).flatten(), "the variance of each row's own step")


def test_sampling_keeps_no_gradients_and_has_a_bar_only_if_it_has_a_name(ab, images, capsys):
    x, weight = images[0], torch.ones((), requires_grad=True)
    for name, f in itertools.product(["name", None], ("sample", "invert", "inpaint")):
        seen, known = [], (x, x > 0) if f == "inpaint" else ()
        network = lambda x, t: seen.append(t) or weight * x                # noqa: B023, E731
        got = getattr(diffusion, f)(network, ab, x, *known, [1, 20], progress=name)
        assert not got.requires_grad, f"{f} keeps the gradients of all its steps: no_grad"
        assert ("name: " in capsys.readouterr().err) == (name is not None), f
    assert seen == [20] * 10 + [1], "each step of RePaint 10 times, the last once"


def test_inpainting_repeats_each_step_and_goes_back_up_by_the_forward_process(ab, images, rigged):
    """From s to t, x_t = sqrt(ab_t / ab_s) x_s + sqrt(1 - ab_t / ab_s) noise; none from 0."""
    seen, (x0, x, noise, fresh) = [], images
    network = lambda x_t, t: seen.append((t, x_t)) or 2 * x0                           # noqa: E731
    rigged([noise, noise, fresh, noise, noise, fresh, noise, noise])
    mask = torch.tensor([1, 1, 0, 0])                                      # the two columns left
    got = diffusion.inpaint(network, ab, x, x0, mask, [1, 50], resample=3, predicts="x0",
                            clamp=0.5)
    close(got[..., :2], x0[..., :2], "the known part must come back as it was")
    close(got, torch.where(mask > 0, x0, (2 * x0).clamp(-0.5, 0.5)), "the last step, clamped")

    assert [t for t, _ in seen] == [50, 50, 50, 1], "`resample` times each step, but the last once"
    mean, var = diffusion.q_posterior(ab, (2 * x0).clamp(-0.5, 0.5), x, 50, 1)
    x_s = torch.where(mask > 0, noised(ab[1], x0, noise), mean + var.sqrt() * noise)
    close(seen[1][1], noised(ab[50] / ab[1], x_s, fresh), "back up by q(x_t | x_s)")


# ---------------------------------------------------------------- losses and guidance
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_error_of_the_prediction_at_the_noised_data(ab, images, rigged, predicts):
    x0, _, eps, out = images
    rigged([eps, eps.to("meta"), eps, eps])
    t, seen = torch.tensor([1, 20, T]), []
    got = diffusion.loss(lambda *args: seen.append(args) or out, ab, x0, predicts, t)
    for i in range(3):
        a = ab[t[i]]
        want = (out[i] - right(predicts, a, x0[i], eps[i])) ** 2
        close(got[i], want.mean(), "the mean of the squared error")
        close(seen[0][0][i], noised(a, x0[i], eps[i]), "of x_t, not of x0")
    assert torch.equal(seen[0][1], t), "the network is called with t itself, 1..T"
    far, both = x0.to("meta"), torch.cat([x0, out], dim=1)
    diffusion.loss(lambda x_t, t: seen.append((x_t, t)) or x_t, ab, far, predicts, t)
    assert seen[-1][1].device == far.device, "t goes to where x0 is"
    few = both.bfloat16()
    got = diffusion.loss(lambda *_: few, ab, x0, predicts, t)
    want = diffusion.loss(lambda *_: few.double(), ab, x0, predicts, t)
    close(got, want, "the loss of a prediction in bfloat16 is computed in x0's dtype")


def test_training_draws_1_to_T_each_equally_often():
    """The usual mistake: 0 is drawn, or T never is."""
    torch.manual_seed(0)
    x0, seen = torch.zeros(20_000, 1), []
    loss = diffusion.loss(lambda x_t, t: seen.append(t) or 0 * x_t,
                          diffusion.cosine_alphabar(20), x0)
    counts = torch.bincount(seen[0], minlength=21).double()
    assert len(counts) == 21 and counts[0] == 0, f"expected 1..20, got {counts}"
    close(counts[1:] / 20_000, torch.full((20,), 1 / 20), "each as likely as any other", 8e-3)
    close(loss.mean(), 1, "predicting eps = 0 costs E eps^2 = 1", 0.05)


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (-0.97, 0.01), (1.4, 1.0)])
def test_the_likelihood_of_the_256_pixel_values_sums_to_one(mean, std):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(x, mean), torch.full_like(x, math.log(std))
    got = diffusion.discretized_log_likelihood(x, mean, log_std).exp()
    close(got.sum(), 1, "bins are x +- 1/255, the outer ones open: no mass may be lost", 1e-8)
    close(diffusion.discretized_log_likelihood(x, mean + 9e9, log_std)[0], math.log(1e-12), "floor")
    cdf = 0.5 * (1 + torch.erf((x + 1 / 255 - mean) / (std * 2 ** 0.5)))
    close(got.cumsum(0)[:-1], cdf[:-1], "the mass of a normal distribution up to each bin", 1e-3)


def test_the_hybrid_loss_adds_a_thousandth_of_the_whole_bound_for_the_variance(ab, images, rigged):
    """Expectation over t of the added term = 0.001 * the sum over all t, by torch's own KL."""
    (x0, _, eps, raw), normal = images[:, :1], torch.distributions.Normal
    rigged(itertools.repeat(eps))
    out, added, whole = torch.cat([0.9 * eps, raw], dim=1).requires_grad_(), 0.0, 0.0
    for t in range(1, T + 1):
        loss = diffusion.loss(lambda x_t, t: out, ab, x0, t=torch.tensor([t]))
        for_eps, for_raw = torch.autograd.grad(loss.sum(), out)[0].chunk(2, dim=1)
        close(for_eps, -0.2 * eps / eps.numel(), "detach the prediction in the bound")
        assert for_raw.any(), f"the variance learns at every t, not so at {t}"

        added = added + (loss.detach() - ((0.1 * eps) ** 2).mean()) / T
        x_t = noised(ab[t], x0, eps)
        x0_hat = (x_t - (1 - ab[t]).sqrt() * 0.9 * eps) / ab[t].sqrt()
        mean, var = diffusion.q_posterior(ab, x0, x_t, t, t - 1)
        mean_hat, _ = diffusion.q_posterior(ab, x0_hat, x_t, t, t - 1)
        std_hat = (diffusion.learned_log_var(ab, raw, t, t - 1) / 2).exp()
        kl = torch.distributions.kl_divergence
        nats = (kl(normal(mean, var.sqrt()), normal(mean_hat, std_hat)) if t > 1 else
                -diffusion.discretized_log_likelihood(x0, mean_hat, std_hat.log()))
        whole = whole + nats.mean() / math.log(2)
    close(added, 0.001 * whole, "a sampled term represents all T: its weight is T / 1000, not "
          "0.001; in bits (divide by log 2); at t = 1 the discretised likelihood")


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


# ---------------------------------------------------------------- refusals, and the demo
@pytest.mark.parametrize("hint, call", [
    (r"like x_t \(3, 2, 4, 4\)", lambda ab, x: diffusion.loss(lambda x, t: x[:, :1], ab, x)),
    (r"like x_t \(3, 2, 4, 4\)", lambda ab, x: diffusion.sample(lambda x, t: x[:1], ab, x, [5])),
    ("like x_t", lambda ab, x: diffusion.sample(lambda x, t: x.repeat(1, 3, 1, 1), ab, x, [5])),
    ("like x_t", lambda ab, x: diffusion.invert(lambda x, t: x[:, 0, 0, 0], ab, x, [1, 5])),
    ("expected s < t", lambda ab, x: diffusion.q_posterior(ab, x, x, 3, 3)),
    ("expected s < t", lambda ab, x: diffusion.q_posterior(ab, x, x, 3, -1)),
    ("0..50", lambda ab, x: diffusion.q_posterior(ab, x, x, torch.tensor([2, 51]), 1)),
    ("expected s < t", lambda ab, x: diffusion.ddim_step(ab, x, 3, 4, x)),
    ("expected u > t", lambda ab, x: diffusion.ddim_invert_step(ab, x, 4, 3, x)),
    ("noise", lambda ab, x: diffusion.ddim_step(ab, x, 4, 3, x, eta=0.5)),
    ("eta", lambda ab, x: diffusion.ddim_step(ab, x, 4, 3, x, eta=1.5, noise=x)),
    ("steps", lambda ab, x: diffusion.spaced_timesteps(10, 11)),
    ("steps", lambda ab, x: diffusion.spaced_timesteps(10, 0)),
    ("T >= 2", lambda ab, x: diffusion.linear_alphabar(1)),
    ("predicts", lambda ab, x: diffusion.sample(tanh, ab, x, [1], predicts="velocity")),
    ("predicts", lambda ab, x: diffusion.loss(tanh, ab, x, "velocity")),
    ('^expected "small"', lambda ab, x: diffusion.sample(tanh, ab, x, [1], variance="fixed_small")),
    (r"^expected eta \(DDIM\) or a variance \(DDPM\)", lambda ab, x: diffusion.sample(
        tanh, ab, x, [1], variance="large", eta=0.0)),
    ("both", lambda ab, x: diffusion.sample(tanh, ab, x, [1], variance=TABLE, eta=0.0)),
    ("twice the", lambda ab, x: diffusion.sample(tanh, ab, x, [1, 4], variance="learned")),
    ("t >= 1", lambda ab, x: diffusion.invert(tanh, ab, x, [0, 4])),
    ("at least 2", lambda ab, x: diffusion.invert(tanh, ab, x, [4])),
    ("resample >= 1", lambda ab, x: diffusion.inpaint(tanh, ab, x, x, x > 0, [4], resample=0))])
def test_bad_input_stops_with_a_sentence(ab, images, hint, call):
    with pytest.raises(ValueError, match=hint):
        call(ab, images[0])
    x = diffusion.sample(tanh, ab, torch.ones(4), [5, 10], predicts="x0", eta=0.0)
    assert x.shape == (4,), "numbers (B,) are data, too"
    with pytest.raises(ValueError, match="like x_t"):
        diffusion.sample(lambda x, t: x[:2], ab, x, [5])
    for rest in ((), (2,)):
        out = torch.randn(4, 6, *rest)
        mean, raw = diffusion.split_variance(out, out[:, :3])
        assert torch.equal(torch.cat([mean, raw], 1), out) and raw.shape == (4, 3, *rest)


def test_the_mixtures_denoiser_is_bayes_on_a_grid(ab):
    """E[x0 | x_t] = sum x0 p(x0) p(x_t | x0) / sum p(x0) p(x_t | x0), in one dimension."""
    centres, std = torch.tensor([[-1.5], [0.2], [1.0]], dtype=torch.float64), 0.3
    u = torch.linspace(-6, 6, 40_001, dtype=torch.float64)
    density = torch.exp(-(u[:, None] - centres[:, 0]) ** 2 / (2 * std ** 2)).sum(1)
    x_t = torch.tensor([[-2.0], [0.1], [1.3]], dtype=torch.float64)
    for t in (1, 20, T):
        weight = density * torch.exp(-(x_t - ab[t].sqrt() * u) ** 2 / (2 * (1 - ab[t])))
        want = (weight * u).sum(1, keepdim=True) / weight.sum(1, keepdim=True)     # (3, grid)
        close(diffusion.mixture_x0(ab, x_t, t, centres, std), want, f"t = {t}", 1e-6)


def test_the_demo_ends_where_the_data_are(capsys, tmp_path):
    diffusion.demo(tmp_path / "clouds.png")
    blocks = capsys.readouterr().out.split("\n")
    a, b = (torch.tensor([[c not in " ." for c in line[:22].ljust(22)] for line in half])
            for half in (blocks[3:14], blocks[17:28]))
    assert a.sum() > 20 and (a & b).sum() / (a | b).sum() > 0.7, "the left columns are alike"
    assert 10_000 < (tmp_path / "clouds.png").stat().st_size < 200_000, "an image of at most 200 kB"
