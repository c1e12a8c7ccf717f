"""A museum of wrong versions of our functions. Nothing in it crashes; each was, or could have been,
published, and cost somebody weeks.

    python tests/bugs.py                       the whole collection
    python tests/bugs.py NAME [-o bug.png]     what the bug does to samples of the toy model

Each drop-in is swapped in for ours as a student's function is; test_coursework.py proves that the
test named with it fails and that the first hint names the mistake. Where one line of another's
project is at fault, the drop-in makes that mistake in our code, which is not theirs.
"""
import argparse
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import coursework
import torch
import torch.nn.functional as F

import clip
import decoder
import diffusion
import prior
import train_toy
import unclip
from diffusion import like


@dataclass
class Bug:
    replaces: str          # the function of ours
    says: str              # what the hint says, among other things
    test: str              # the test that sees it
    history: str           # who made it, and what came of it
    function: Callable


BUGS = {}


def bug(replaces, says, test, history):
    def hang(function):
        BUGS[function.__name__] = Bug(replaces, says, test, history, function)
        return function
    return hang


SAMPLE, CLIP_INIT, PRIOR_FORWARD = (diffusion.sample, clip.CLIP.__init__,
                                    prior.DiffusionPrior.forward)       # ours, before any swap


# ---------------------------------------------------------------- schedules and times


@bug("diffusion.linear_alphabar", "scale linear betas",
     "test_diffusion.py::test_at_the_last_time_hardly_any_signal_is_left_whatever_T",
     "tiny-diffusion #4: T = 50 with betas meant for T = 1000. 60 % of x_T was still signal, so "
     "sampling began where training had never been.")
def betas_of_another_T(T):
    if T < 2:
        raise ValueError(f"expected T >= 2 for the linear schedule, got {T}")
    return diffusion._cumulate(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))


@bug("diffusion.cosine_alphabar", "cap betas",
     "test_diffusion.py::test_at_the_last_time_hardly_any_signal_is_left_whatever_T",
     "The cap of IDDPM eq. 17 forgotten: alphabar_T is 0, and x0 = x_T / 0.")
def no_cap(T):
    f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    f[-1] = 0
    return f / f[0]


@bug("diffusion.spaced_timesteps", "both ends",
     "test_diffusion.py::test_spaced_timesteps_include_both_ends",
     "DALLE2-pytorch's first DDIM step: of 10 steps for T = 100 the first is below T, where "
     "alphabar is 0.024, and starts from noise that belongs to T.")
def starts_below_T(T, K):
    if not 1 <= K <= T:
        raise ValueError(f"expected between 1 and {T} sampling steps, got {K}")
    return [1 + i * (T // K) for i in range(K)]


@bug("diffusion.steps", "the step not taken",
     "test_diffusion.py::test_every_sampler_ends_exactly_at_the_data_of_an_oracle",
     "minDiffusion and DALLE2-pytorch's decoder: the last DDIM step is never taken, and some "
     "noise stays in every picture.")
def last_step_not_taken(times):
    down = [*reversed(times)]
    return list(zip(down, down[1:]))


@bug("diffusion.sinusoid", "wrong axis",
     "test_diffusion.py::test_the_time_embedding_tells_every_time_apart",
     "gmongaras/Diffusion_models_from_scratch #10: sin and cos along the batch axis. t meant "
     "nothing, and the released weights were not retrained.")
def time_along_the_batch(index, width):
    k = torch.arange(width // 2, device=index.device)
    angle = index.float()[:, None] * torch.exp(-math.log(10000) * k / (width // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=0).reshape(len(index), width)


@bug("diffusion.random_times", "expected times 1..20",
     "test_diffusion.py::test_training_times_are_1_to_T_each_equally_often",
     "minDiffusion: t drawn from 1..T-1, while sampling starts at T, where the network has never "
     "been.")
def T_is_never_drawn(T, B):
    return torch.randint(1, T, (B,))


# ---------------------------------------------------------------- forward process and posterior


@bug("diffusion.q_sample", "no root",
     "test_diffusion.py::test_one_jump_equals_many_small_steps",
     "labml #152 (fixed): a wrong sqrt(1 - alphabar).")
def noise_without_its_root(alphabar, x0, t, eps):
    return like(alphabar[t].sqrt(), x0) * x0 + like(1 - alphabar[t], x0) * eps


@bug("diffusion.predict_eps", "cast last",
     "test_diffusion.py::test_coefficients_are_computed_in_float64_even_for_float32_data",
     "Many: the table itself in float32. 1 - alphabar at t = 1 keeps three digits of seven.")
def cast_too_early(alphabar, x_t, t, x0):
    a = alphabar.to(x_t.dtype)[t]
    return (x_t - like(a.sqrt(), x_t) * x0) * like((1 - a).rsqrt(), x_t)


@bug("diffusion.q_posterior", "swapped",
     "test_diffusion.py::test_the_posterior_is_bayes_rule",
     "The commonest slip of every course: the weights of x0 and x_t change places.")
def posterior_weights_swapped(alphabar, x0, x_t, t, s):
    a_t, a_s = diffusion._two_times(alphabar, t, s)
    alpha = a_t / a_s
    from_xt, from_x0 = a_s.sqrt() * (1 - alpha) / (1 - a_t), alpha.sqrt() * (1 - a_s) / (1 - a_t)
    var = (1 - alpha) * (1 - a_s) / (1 - a_t)
    return like(from_x0, x_t) * x0 + like(from_xt, x_t) * x_t, like(var, x_t)


@bug("diffusion.q_posterior", "is it a std",
     "test_diffusion.py::test_the_posterior_is_bayes_rule",
     "diffusers' unCLIP scheduler keeps a std, then a log-variance, under the name `variance`; "
     "whoever reads one for the other gets this.")
def posterior_std(alphabar, x0, x_t, t, s):
    a_t, a_s = diffusion._two_times(alphabar, t, s)
    alpha = a_t / a_s
    mean = (like(a_s.sqrt() * (1 - alpha) / (1 - a_t), x_t) * x0
            + like(alpha.sqrt() * (1 - a_s) / (1 - a_t), x_t) * x_t)
    return mean, like(((1 - alpha) * (1 - a_s) / (1 - a_t)).sqrt(), x_t)


@bug("diffusion.eps_from_velocity", "sign",
     "test_diffusion.py::test_velocity_says_the_same_as_eps",
     "Two papers, two signs of v: progressive distillation's is sqrt(ab) eps - sqrt(1 - ab) x0.")
def velocity_of_the_other_sign(alphabar, x_t, t, velocity):
    return (like((1 - alphabar[t]).sqrt(), x_t) * x_t
            - like(alphabar[t].sqrt(), x_t) * velocity)


# ---------------------------------------------------------------- variances and losses


@bug("diffusion.learned_range_log_var", "0..1",
     "test_diffusion.py::test_the_learned_range_ends_at_the_two_bounds",
     "v of IDDPM eq. 15 is in 0..1, a network's output in -1..1; the line that turns one into the "
     "other is in the code, not in the paper.")
def v_taken_for_a_share(alphabar, v, t, s):
    small, large = diffusion.log_var_bounds(alphabar, t, s)
    return v * like(large, v) + (1 - v) * like(small, v)


@bug("diffusion.vlb_loss", "in bits",
     "test_diffusion.py::test_the_hybrid_loss_adds_a_thousandth_of_the_whole_bound",
     "Nats where the published numbers are bits: 1.44 times off, and nothing looks wrong.")
def bound_in_nats(alphabar, eps_hat, v, x0, x_t, t):
    s = t - 1
    mean, _ = diffusion.q_posterior(alphabar, x0, x_t, t, s)
    x0_hat = diffusion.predict_x0(alphabar, x_t, t, eps_hat)
    mean_hat, _ = diffusion.q_posterior(alphabar, x0_hat, x_t, t, s)
    log_var = like(diffusion.log_var_bounds(alphabar, t, s)[0], x_t)
    log_var_hat = diffusion.learned_range_log_var(alphabar, v, t, s)
    kl = 0.5 * (log_var_hat - log_var - 1 + torch.exp(log_var - log_var_hat)
                + (mean - mean_hat) ** 2 * torch.exp(-log_var_hat))
    nll = -diffusion.discretized_log_likelihood(x0, mean_hat, 0.5 * log_var_hat)
    return torch.where(like(s, x_t) == 0, nll, kl).flatten(1).mean(1)


@bug("diffusion.hybrid_loss", "not 0.001",
     "test_diffusion.py::test_the_hybrid_loss_adds_a_thousandth_of_the_whole_bound",
     "DALLE2-pytorch: 0.001 times the *mean* over t of a bound that is a *sum* over 1000 of them: "
     "1000 times weaker than OpenAI's code.")
def a_thousandth_of_the_mean(alphabar, out, x0, x_t, t, eps, weight=1.0):
    eps_hat, v = out.chunk(2, dim=1)
    vlb = diffusion.vlb_loss(alphabar, eps_hat.detach(), v, x0, x_t, t)
    return weight * diffusion.simple_loss(eps_hat, eps) + 0.001 * vlb


@bug("diffusion.hybrid_loss", "detach eps_hat",
     "test_diffusion.py::test_the_bound_trains_the_variance_only",
     "The stop-gradient of IDDPM sec. 3.1 is half a sentence, easily missed: the noisy gradient "
     "of the bound then reaches the mean.")
def bound_reaches_the_mean(alphabar, out, x0, x_t, t, eps, weight=1.0):
    eps_hat, v = out.chunk(2, dim=1)
    vlb = diffusion.vlb_loss(alphabar, eps_hat, v, x0, x_t, t)
    return weight * diffusion.simple_loss(eps_hat, eps) + (len(alphabar) - 1) / 1000 * vlb


@bug("diffusion.simple_loss", "E eps^2",
     "test_diffusion.py::test_the_bound_is_zero_for_a_perfect_network",
     "smalldiffusion's test helper sums *signed* differences, which cancel; the same slip in a "
     "loss.")
def signed_differences(eps_hat, eps):
    return (eps_hat - eps).flatten(1).mean(1)


# ---------------------------------------------------------------- guidance, samplers, slerp


@bug("diffusion.guide", "Ho & Salimans",
     "test_diffusion.py::test_guidance_at_0_1_and_3",
     "Two conventions of one formula (Ho & Salimans' w is GLIDE's scale - 1): asked about in five "
     "repositories, such as diffusers #5882.")
def the_other_convention(uncond, cond, scale):
    return (1 + scale) * cond - scale * uncond


@bug("diffusion.guide_eps", "the variance is",
     "test_diffusion.py::test_guidance_at_0_1_and_3",
     "DALLE2-pytorch's decoder: guidance also stretches the predicted variance.")
def variance_guided_too(uncond, cond, scale):
    return diffusion.guide(uncond, cond, scale)


@bug("diffusion.guide_eps", "every channel",
     "test_diffusion.py::test_guidance_at_0_1_and_3",
     "DiT: guidance reaches three of four latent channels (knowingly, for reproducibility).")
def some_channels_guided(uncond, cond, scale):
    C = cond.shape[1] // 2 - 1
    return torch.cat([diffusion.guide(uncond[:, :C], cond[:, :C], scale), cond[:, C:]], dim=1)


@bug("diffusion.ddim_step", "two tables mixed",
     "test_diffusion.py::test_a_ddim_step_with_the_right_answer_lands_on_the_same_path",
     "DALLE2-pytorch's prior: eps from one table, the step by another, one index apart. Sampled "
     "std 34 % too small, and more steps make it worse.")
def two_tables(alphabar, x_t, t, s, x0, eta=0.0, noise=None):
    a_t, a_s = diffusion._two_times(alphabar, t, s)
    var = eta ** 2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    eps = diffusion.predict_eps(alphabar, x_t, min(t + 1, len(alphabar) - 1) if t > 1 else 2, x0)
    x_s = like(a_s.sqrt(), x_t) * x0 + like((1 - a_s - var).sqrt(), x_t) * eps
    return x_s if noise is None else x_s + like(var.sqrt(), x_t) * noise


@bug("diffusion.ddim_step", "a variance",
     "test_diffusion.py::test_ddim_with_eta_one_is_an_ancestral_step",
     "sig of DDIM eq. 16 without its roots: eta = 1 is no longer DDPM.")
def ddim_variance_for_std(alphabar, x_t, t, s, x0, eta=0.0, noise=None):
    a_t, a_s = diffusion._two_times(alphabar, t, s)
    std = eta * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    eps = diffusion.predict_eps(alphabar, x_t, t, x0)
    x_s = like(a_s.sqrt(), x_t) * x0 + like((1 - a_s - std ** 2).sqrt(), x_t) * eps
    return x_s if noise is None else x_s + like(std, x_t) * noise


@bug("diffusion.sample", "is noise added",
     "test_diffusion.py::test_every_sampler_ends_exactly_at_the_data_of_an_oracle",
     "labml's DDPM: noise is added on the last step, too.")
def noise_on_the_last_step(denoise, alphabar, x, times, *, generator=None, **options):
    x = SAMPLE(denoise, alphabar, x, times, generator=generator, **options)
    return x + like((1 - alphabar[times[0]]).sqrt(), x) * diffusion._draw(x, generator)


def wrong_sample(denoise, alphabar, x, times, predicts, clamp, eta, generator, kind):
    """A sampler with the mistake `kind`, for the three exhibits below."""
    for t, s in diffusion.steps(times):
        out = denoise(x, t)
        x0, v = diffusion._x0_and_v(alphabar, out, x, t, predicts,
                                    None if kind == "x_t clamped" else clamp)
        noise = diffusion._draw(x, generator) if s > 0 and eta != 0 else 0 * x
        mean, var = diffusion.q_posterior(alphabar, x0, x, t, s)
        if kind == "var" and eta is None:
            x = mean + var * noise
        elif eta is None:
            var = var if v is None or s == 0 else diffusion.learned_range_log_var(
                alphabar, v, t, s).exp()
            x = mean + var.sqrt() * noise
        elif kind == "raw eps" and predicts == "eps":
            x = (like(alphabar[s].sqrt(), x) * x0
                 + like((1 - alphabar[s]).sqrt(), x) * out[:, :x.shape[1]])
        else:
            x = diffusion.ddim_step(alphabar, x, t, s, x0, eta, noise)
        x = x.clamp(-clamp, clamp) if kind == "x_t clamped" and clamp else x
    return x


@bug("diffusion.sample", "a variance for a std",
     "test_diffusion.py::test_reverse_steps_retrace_the_forward_marginals_on_any_grid",
     "mbn312/dalle2: the posterior *variance* multiplies the noise, so almost none is added.")
@torch.no_grad()
def variance_times_noise(denoise, alphabar, x, times, *, predicts="eps", clamp=None,
                         variance="small", eta=None, generator=None, progress=None):
    return wrong_sample(denoise, alphabar, x, times, predicts, clamp, eta, generator, "var")


@bug("diffusion.sample", "do not clamp x_t",
     "test_diffusion.py::test_x0_is_clamped_and_eps_follows_but_x_t_is_left_alone",
     "mbn312/dalle2: x_t instead of x0 is clamped to [-1, 1] at every step, which cuts the noise "
     "and lets x0 run away.")
@torch.no_grad()
def x_t_clamped(denoise, alphabar, x, times, *, predicts="eps", clamp=None, variance="small",
                eta=None, generator=None, progress=None):
    return wrong_sample(denoise, alphabar, x, times, predicts, clamp, eta, generator, "x_t clamped")


@bug("diffusion.sample", "recompute eps",
     "test_diffusion.py::test_x0_is_clamped_and_eps_follows_but_x_t_is_left_alone",
     "denoising-diffusion-pytorch PR 84 (fixed), and diffusers' DDIMScheduler by default: x0 is "
     "clamped, eps not recomputed from it.")
@torch.no_grad()
def eps_not_recomputed(denoise, alphabar, x, times, *, predicts="eps", clamp=None,
                       variance="small", eta=None, generator=None, progress=None):
    return wrong_sample(denoise, alphabar, x, times, predicts, clamp, eta, generator, "raw eps")


@bug("diffusion.slerp", "not a straight line",
     "test_diffusion.py::test_slerp_walks_the_arc_at_constant_speed",
     "Interpolating embeddings in a straight line: half-way they are too short, and the decoder "
     "has never seen such.")
def straight_line(a, b, share):
    return (1 - share) * a + share * b


@bug("diffusion.ddim_invert_step", "up is down, reversed",
     "test_diffusion.py::test_a_ddim_step_with_the_right_answer_lands_on_the_same_path",
     "Inversion with the eps of the time it goes to.")
def inverted_from_the_wrong_end(alphabar, x_t, t, u, x0):
    a_u, _ = diffusion._two_times(alphabar, u, t, "u > t (inversion goes towards the noise)")
    eps = diffusion.predict_eps(alphabar, x_t, u, x0)
    return like(a_u.sqrt(), x_t) * x0 + like((1 - a_u).sqrt(), x_t) * eps


# ---------------------------------------------------------------- CLIP


@bug("clip.attend", "width of a head",
     "test_clip.py::test_attention_is_a_weighted_mean_by_double_loop",
     "Scores divided by the root of the whole width: attention is blurred by the root of the "
     "number of heads.")
def scaled_by_the_whole_width(q, k, v, heads, mask=None, causal=False):
    return ATTEND(q / heads ** 0.5, k, v, heads, mask, causal)


ATTEND = clip.attend


@bug("clip.Block.forward", "LayerNorm",
     "test_clip.py::test_the_two_activations_are_the_formulas",
     "Post-LN, the Transformer of 2017, where CLIP and everything after it is pre-LN.")
def norm_after_the_branch(self, x, mask=None, causal=False, context=None, cache=None):
    q, k, v = self.qkv(x).chunk(3, dim=2)
    if context is not None:
        before = self.context(context).chunk(2, dim=2)
        k, v = (torch.cat(pair, dim=1) for pair in zip(before, (k, v)))
    if cache is not None:
        k, v = cache.append(k, v)
    x = self.ln1(x + self.proj(clip.attend(q, k, v, self.heads, mask, causal)))
    h = self.fc1(x)
    h = h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
    return self.ln2(x + self.fc2(h))


@bug("clip.TextEncoder.forward", "the padding",
     "test_clip.py::test_a_caption_is_read_at_its_first_end_token_and_not_beyond",
     "Many a port of CLIP: the caption is read at the last position, which is padding.")
def read_at_the_last_position(self, tokens):
    x = self.tok(tokens) + self.pos[:tokens.shape[1]]
    for block in self.blocks:
        x = block(x, causal=True)
    x = self.ln_out(x)
    return x[:, -1] @ self.proj, x


@bug("clip.token_mask", "zeros",
     "test_clip.py::test_the_mask_ends_with_the_first_end_token",
     "tokens != 0: but 0 is also the token \"!\" in CLIP's vocabulary.")
def padding_found_by_its_zeros(tokens, end):
    return tokens != 0


@bug("clip.CLIP.scale", "exp",
     "test_clip.py::test_the_temperature_starts_at_007_and_never_exceeds_100",
     "M3D #52: the logit scale is used without its exp.")
def scale_without_exp(self):
    return self.logit_scale.clamp(max=100)


@bug("clip.CLIP.__init__", "1 / 0.07",
     "test_clip.py::test_the_temperature_starts_at_007_and_never_exceeds_100",
     "transformers #13430 (fixed): the logit scale starts at 1, not at log(1 / 0.07).")
def scale_starts_at_1(self, config):
    CLIP_INIT(self, config)
    self.logit_scale.data.fill_(1.0)


@bug("clip.clip_loss", "both directions",
     "test_clip.py::test_the_contrastive_loss_by_double_loop",
     "Half of CLIP's loss: pictures choose captions, captions choose nothing.")
def one_direction(image_emb, text_emb, scale, caption_ids=None):
    logits = scale * image_emb @ text_emb.T
    if caption_ids is None:
        caption_ids = torch.arange(len(logits))
    answer = (caption_ids[:, None] == caption_ids[None, :]).to(logits)
    return F.cross_entropy(logits, answer / answer.sum(1, keepdim=True))


@bug("clip.clip_loss", "equal captions",
     "test_clip.py::test_the_contrastive_loss_by_double_loop",
     "The diagonal is the answer also where a batch holds one caption twice: half of the pairs "
     "are punished for being right.")
def twins_are_wrong_answers(image_emb, text_emb, scale, caption_ids=None):
    logits, answer = scale * image_emb @ text_emb.T, torch.arange(len(image_emb))
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


@bug("clip.sam_backward", "over all the parameters",
     "test_clip.py::test_a_sam_step_is_the_gradient_at_the_worst_nearby_point",
     "The norm of SAM taken for each tensor on its own: other papers' method, and a far larger "
     "step.")
def a_norm_for_each_tensor(loss_fn, parameters, rho):
    parameters = list(parameters)
    before = [p.detach().clone() for p in parameters]
    loss = loss_fn()
    grads = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            p += rho / (g.norm() + 1e-12) * g
    loss_fn().backward()
    with torch.no_grad():
        for p, w in zip(parameters, before):
            p.copy_(w)
    return loss.detach()


@bug("clip.Text.drop", "shines through",
     "test_prior.py::test_without_a_caption_captions_agree_and_the_noise_still_matters",
     "DALLE2-pytorch #235 (fixed): the caption's mask reached no token, so dropped captions were "
     "read all the same.")
def mask_reaches_no_token(self, keep):
    return self._replace(z_t=self.z_t * keep[:, None])


# ---------------------------------------------------------------- priors


@bug("prior.DiffusionPrior.scale", "changes an argument",
     "test_prior.py::test_sampling_and_training_leave_their_inputs_alone",
     "DALLE2-pytorch: `image_embed *= scale` alters the caller's embeddings; their norm was 1, 8, "
     "64, 512 in four calls.")
def scaled_in_place(self, z):
    z *= 1 / z.norm(dim=-1, keepdim=True) / self.std
    return z


@bug("prior.DiffusionPrior.scale", "17.2",
     "test_prior.py::test_the_scaled_space_has_the_variance_of_pixels",
     "17.2 read as the factor for any width: it belongs to 1024 dimensions.")
def seventeen_for_any_width(self, z):
    return clip.unit(z) * 17.2


@bug("prior.DiffusionPrior.prefix", "padded",
     "test_prior.py::test_padding_does_not_matter",
     "mbn312/dalle2: raw token ids enter the prior as a vector of floats.")
def raw_ids(self, text):
    words = text.tokens[:, :, None].float().expand(-1, -1, self.config.width) / 100
    z_t = self.text_in(clip.unit(text.z_t) / self.std)
    return torch.cat([words, z_t[:, None]], dim=1) + self.pos[:-3]


@bug("prior.DiffusionPrior.suffix", "x_t does not matter",
     "test_prior.py::test_all_that_it_is_given_matters",
     "DALLE2-pytorch #71 (fixed): the noised embedding was not among the prior's tokens.")
def x_t_left_out(self, x_t, index):
    time = self.time(diffusion.sinusoid(index, self.config.width).to(x_t.dtype))
    three = torch.stack([time, 0 * time, self.query.expand_as(time)], dim=1)
    return three + self.pos[-3:]


@bug("prior.DiffusionPrior.suffix", "t does not matter",
     "test_prior.py::test_all_that_it_is_given_matters",
     "minDiffusion's superminddpm.py: the network is given t and never uses it.")
def t_never_used(self, x_t, index):
    time = self.time(diffusion.sinusoid(0 * index, self.config.width).to(x_t.dtype))
    three = torch.stack([time, self.image_in(x_t), self.query.expand_as(time)], dim=1)
    return three + self.pos[-3:]


@bug("prior.DiffusionPrior.suffix", "one linear map",
     "test_prior.py::test_the_time_path_is_not_one_linear_map_and_rows_are_times",
     "labml #165 (fixed): two linear layers in a row on the time path and no activation between "
     "them.")
def time_path_is_linear(self, x_t, index):
    first, _, second = self.time
    time = second(first(diffusion.sinusoid(index, self.config.width).to(x_t.dtype)))
    three = torch.stack([time, self.image_in(x_t), self.query.expand_as(time)], dim=1)
    return three + self.pos[-3:]


@bug("prior.DiffusionPrior.forward", "x_t should matter",
     "test_prior.py::test_without_a_caption_captions_agree_and_the_noise_still_matters",
     "DALLE2-pytorch today: the unconditional branch blanks x_t as well, so guidance compares "
     "with a prior that sees nothing.")
def no_caption_no_x_t(self, x_t, index, text):
    return PRIOR_FORWARD(self, x_t * text.mask.any(1, keepdim=True), index, text)


@bug("prior.DiffusionPrior.sample", "one pass",
     "test_prior.py::test_samples_land_on_the_modes_and_not_between",
     "mbn312/dalle2: the \"diffusion\" prior is one forward pass from noise, the mean of all that "
     "could be.")
def one_pass(self, text, steps=64, guidance=1.0, candidates=2, generator=None, null=None,
             progress=None):
    x = torch.randn(len(text.tokens), self.config.embed_dim, generator=generator)
    return self.unscale(self.denoiser(text, guidance, null)(x, self.config.T))


@bug("prior.quantile_edges", "equally full",
     "test_prior.py::test_buckets_are_equally_full",
     "Buckets of equal width: most codes are hardly ever used.")
def buckets_of_equal_width(y, buckets):
    low, high = y.min(0).values, y.max(0).values
    share = torch.arange(1, buckets)[None] / buckets
    return low[:, None] + share * (high - low)[:, None]


@bug("prior.principal_components", "most important first",
     "test_prior.py::test_principal_components_are_those_of_a_singular_value_decomposition",
     "eigh lists eigenvalues in ascending order: the least important directions are kept.")
def ascending_order(z, keep=0.99):
    z = clip.unit(z.cpu().double())
    mean = z.mean(0)
    power, basis = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    down = power.flip(0)
    K = int((down.cumsum(0) < keep * power.sum()).sum()) + 1 if keep < 1 else len(power)
    return mean.float(), basis[:, :K].float()


@bug("prior.ARPrior.forward", "codes before",
     "test_prior.py::test_code_k_is_predicted_from_the_codes_before_it_only",
     "Off by one: the prediction of code k is read where code k is already known. The loss falls "
     "to 0 and samples are noise.")
def reads_the_answer(self, codes, dot, text):
    x = torch.cat([self.start(text.z_t, dot), self.code(codes) + self.pos[-codes.shape[1]:]], dim=1)
    return self.run(x, self.text(text.tokens, text.mask))[:, 2:]


# ---------------------------------------------------------------- decoder, upsamplers, training


@bug("decoder.ResBlock.forward", "1 + scale",
     "test_decoder.py::test_scale_and_shift_steer_the_second_norm",
     "AdaGN without the 1: a fresh block multiplies by about 0, and deep networks do not start.")
def scale_without_one(self, x, emb):
    h = F.silu(self.norm1(x))
    if self.resample == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif self.resample == "up":
        h, x = (F.interpolate(y, scale_factor=2.0) for y in (h, x))
    scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
    h = self.norm2(self.conv1(h)) * scale + shift
    return self.skip(x) + self.conv2(F.dropout(F.silu(h), self.dropout, self.training))


@bug("decoder.Decoder.condition", "depends on rows",
     "test_decoder.py::test_example_i_never_sees_example_j",
     "DALLE2-pytorch: where two widths are equal a projection becomes the identity and a reshape "
     "mixes the rows of a batch.")
def rows_mix(self, z_i, text):
    B = len(z_i)
    tokens = self.image_tokens(z_i).reshape(4, B, -1).transpose(0, 1)
    if self.config.vocab_size:
        states, mask = self.text(text.tokens, text.mask), None
        pooled = states[:, -1]
    else:
        states = self.hidden_ln(self.hidden_in(text.states))
        pooled, mask = text.z_t, F.pad(text.mask, (4, 0), value=True)
    emb = self.image_emb(z_i) + self.text_emb(pooled)
    return emb, self.unet.keys_values(torch.cat([tokens, states], dim=1)), mask


@bug("decoder.enlarge", "clamped",
     "test_decoder.py::test_enlarging_is_catmull_rom_after_a_clamp",
     "imagen-pytorch #160 (fixed): sampling and training treated the small picture differently; "
     "here it is not brought into range before it is enlarged.")
def not_clamped_first(low, size):
    return F.interpolate(low, (size, size), mode="bicubic", antialias=True)


@bug("decoder.enlarge", "antialias",
     "test_decoder.py::test_enlarging_is_catmull_rom_after_a_clamp",
     "DALLE2-pytorch #32 (fixed) and its nearest-neighbour resize: stairs that the upsampler "
     "never saw in training.")
def nearest_neighbour(low, size):
    return F.interpolate(low.clamp(-1, 1), (size, size), mode="nearest")


@bug("decoder.filter2d", "edges go dark",
     "test_decoder.py::test_blur_keeps_a_flat_picture_flat_and_mirrors_at_the_edges",
     "Zeros beyond the edges: every blurred picture gets a dark rim.")
def dark_edges(x, kernel, stride=1):
    C = x.shape[1]
    kernel = kernel.to(x).expand(C, 1, *kernel.shape)
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[2] // 2, groups=C)


@bug("decoder.crop_pair", "the same in both",
     "test_decoder.py::test_both_crops_show_the_same_window",
     "Two crops, two windows: the upsampler learns to ignore the small picture.")
def two_windows(high, low, crop, generator=None):
    def cut(x, side):
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in x.shape[2:])
        return x[:, :, top:top + side, left:left + side]
    return cut(high, crop), cut(low, crop * low.shape[2] // high.shape[2])


@bug("decoder.Upsampler.prepare", "of the windows are sharp",
     "test_decoder.py::test_training_windows_are_quarters_shrunk_and_half_of_them_blurred",
     "DALLE2-pytorch: one random blur for a whole batch, not for each picture.")
def one_coin_for_all(self, high, crops=1, share=(0, 1)):
    S = self.config.unet.size
    low = decoder.shrink(high, S // 4)
    low = decoder.gaussian_blur(low) if torch.rand(()) < 0.5 else low
    return decoder.crop_pair(*(x.repeat_interleave(crops, dim=0) for x in (high, low)), S // 4)


@bug("unclip.UnCLIP.difference", "norm(z_t - z_t0)",
     "test_unclip.py::test_a_text_diff_turns_the_embedding_by_the_stated_angle_and_keeps_the_noise",
     "Turning towards the new caption instead of towards the difference: the edit draws the "
     "caption and forgets the picture.")
def towards_the_caption(self, source, target):
    z_t0, z_t = (clip.unit(self.encode_text(x).z_t.float()) for x in (source, target))
    if (z_t - z_t0).norm(dim=1).min() < 1e-6:
        raise ValueError(f"expected two different captions, got {source} and {target}")
    return z_t


@bug("train_toy.optimizers", "is an optimiser called",
     "test_training.py::test_twenty_steps_lower_the_loss[ar_prior]",
     "minidalle2: loss.backward() in three training scripts, and no optimiser in the repository.")
def no_optimiser(model, stage):
    return []


# ---------------------------------------------------------------- what a bug does

CAPTIONS = ("a large red circle", "a small blue square above a large orange triangle",
            "a small black cross", "a large green cross left of a small purple circle")


def picture(name):
    """What to look at: samples; or, for what is not part of sampling, an edit or a way between two
    pictures. -> (what it is, a function model -> pictures, titles)"""
    import random
    a, b = (train_toy.render(train_toy.place(train_toy.parse(text), random.Random(0)), 64)
            for text in ("a large red circle", "a small black cross"))
    seeded = torch.Generator().manual_seed
    if name in ("diffusion.slerp", "diffusion.ddim_invert_step"):
        return ("from one picture to another", lambda model: model.interpolate(
            a, b, 5, steps=50, generator=seeded(0)), ["from", "", "", "", "to"])
    if name == "unclip.UnCLIP.difference":
        return ("red becomes blue", lambda model: model.text_diff(
            a, "a large red circle", "a large blue circle", 5, 0.5, steps=50, generator=seeded(0)),
                ["before", "", "", "", "after"])
    return ("samples", lambda model: model.sample(CAPTIONS, rerank=1, generator=seeded(0),
                                                  progress=False),
            [textwrap.fill(text, 18) for text in CAPTIONS])


def show(name, path, weights=unclip.HERE / "weights/toy.pt"):
    """Draw the toy model's pictures with our function above, with the bug below -> a sentence."""
    what, draw, titles = picture(BUGS[name].replaces)
    right = draw(unclip.load(weights))
    with coursework.swapped({BUGS[name].replaces: BUGS[name].function}):
        try:
            wrong = draw(unclip.load(weights)).nan_to_num(-1.0)
        except Exception as error:                           # any: it is a bug
            return f"with it the model stops: {type(error).__name__}: {clip.first_line(error)}"
    train_toy.draw_grid(Path(path), [right, wrong], ["ours", name.replace("_", " ")], titles,
                        f"{BUGS[name].replaces}: {what}, and with {name.replace('_', ' ')}.")
    if torch.equal(right, wrong):
        return (f"wrote {path}: both rows are equal, as this one does its harm in training, which "
                "no picture of trained weights can show")
    return (f"wrote {path}: ours above, the bug below; pixels differ by "
            f"{(right - wrong).abs().mean():.3f} of 2 on average")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A museum of bugs; draws what one of them does.",
                                     allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="an exhibit (without: the list)")
    parser.add_argument("-o", "--out", default="bug.png", help="where to write the picture")
    args = parser.parse_args(arguments)
    if args.name is None:
        for name, each in BUGS.items():
            print(f"{name}  ({each.replaces})\n" + textwrap.fill(
                each.history, 92, initial_indent="    ", subsequent_indent="    "))
        return 0
    if args.name not in BUGS:
        print(f"error: expected one of {', '.join(BUGS)}, got {args.name!r}", file=sys.stderr)
        return 2
    print(BUGS[args.name].history)
    unclip.stop_on_error(lambda: print(show(args.name, args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
