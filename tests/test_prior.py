"""Chapter 3, the priors: what must hold for any weights, and what a code, a mask and a step mean.

What starts at zero would let mistakes pass, so the networks under test are `filled` first. Numbers
of Karlo's prior: tests/extras.
"""
import itertools
import math

import numpy as np
import pytest
import torch

import clip
import diffusion
import prior
from clip import unit
from conftest import filled, rand, seed

D, L, W = 8, 8, 8                                    # equal widths: bugs that mix axes hide there


def row(text, i, n=1):
    return text.map(lambda x: x[i:i + 1].expand(n, *x.shape[1:]))    # n times


def near(a, b, atol=1e-5):
    return torch.allclose(a, torch.as_tensor(b).to(a).expand_as(a), rtol=1e-5, atol=atol)


def embeddings(N):
    """Embeddings whose directions vary unequally, and not around zero."""
    rotation = torch.linalg.qr(rand(D, D, number=4))[0]
    return rand(N, D, number=3) * torch.linspace(2, 0.1, D) @ rotation + 1.0


@pytest.fixture
def text():
    """Eight captions of 1 to 8 tokens."""
    tokens = torch.randint(1, 30, (8, L), generator=seed())
    mask = torch.arange(L) <= torch.arange(8)[:, None]
    return clip.Text(tokens, mask, rand(8, D, number=1), torch.zeros(8, 0))


@pytest.fixture
def model():
    """A diffusion prior with random weights."""
    return filled(prior.DiffusionPrior(prior.DiffusionPriorConfig(
        embed_dim=D, vocab_size=30, context=L, width=W, layers=2, heads=2)))


@pytest.fixture
def ar():
    """An AR prior, fitted to made-up embeddings."""
    model = filled(prior.ARPrior(prior.ARPriorConfig(
        embed_dim=D, components=6, buckets=8, vocab_size=30, context=L, text_width=W, text_layers=1,
        text_heads=2, width=W, layers=2, heads=2)))
    model.fit_codes(embeddings(400), rand(400, D, number=5))
    return model


# ---------------------------------------------------------------- diffusion prior: the network
def test_the_network_is_a_causal_transformer_over_caption_z_t_time_x_t_and_query(model, text):
    x_t, time = rand(8, D, number=6), model.time(clip.sinusoid(torch.tensor([299]), W))
    for each in (text, text.null()):
        words = torch.where(each.mask[:, :, None], model.tok(each.tokens), model.pad)  # (8, L, W)
        z_t = model.text_in(model.scale(each.z_t))
        last = [z_t, time.expand(8, -1), model.image_in(x_t), model.query.expand(8, -1)]
        x = torch.cat([words, torch.stack(last, dim=1)], dim=1) + model.pos
        for block in model.blocks:
            x = block(x, causal=True)
        assert near(model(x_t, 300, each), model.out(model.ln_out(x[:, -1]))), \
            "causal; words by tok, model.pad at padded places; x_t should matter, time should " \
            "matter, without a caption too; t - 1, as published checkpoints count from 0; plus pos?"


def test_example_i_does_not_depend_on_example_j(model, ar, text):
    x_t, z_t = (rand(8, D, number=i).requires_grad_() for i in (6, 7))
    text = text._replace(z_t=z_t)
    codes, dot = ar.encode(embeddings(8)), torch.arange(8)
    for out, inputs in ((model(x_t, 300, text), (x_t, z_t)), (ar(codes, dot, text), (z_t,))):
        for grad in torch.autograd.grad(out[1].pow(2).sum(), inputs):
            rows = grad.abs().sum(1).nonzero().flatten().tolist()
            assert rows == [1], f"row 1 of the output depends on rows {rows}"
    alone = torch.cat([ar(codes[i:i + 1], dot[i:i + 1], row(text, i)) for i in range(8)])
    assert near(alone, ar(codes, dot, text))


def test_timesteps_are_embedded_row_by_row_and_not_by_one_linear_map(model, text):
    t, x_t, u = torch.tensor([10, 700, 1, 2, 999, 1000, 500, 500]), rand(8, D), rand(1, W)
    each = torch.stack([model(x_t, int(i), text)[b] for b, i in enumerate(t)])
    assert near(model(x_t, t, text), each, 1e-6), "an int is that t in every row"
    first, _, second = model.time
    assert near(model.time(u), second(torch.nn.functional.silu(first(u)))), \
        "no activation between the two layers of the time path?"


@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.0])
def test_the_cache_changes_nothing_and_guidance_is_of_two_forwards(model, text, guidance):
    network, seen = model.denoiser(text, guidance), []
    model.blocks[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    for t in (900, 3, 500):                                           # one after the other
        x_t, out = rand(8, D, number=t), network(rand(8, D, number=t), t)
        want = diffusion.guide(model(x_t, t, text.null()), model(x_t, t, text), guidance)
        assert near(out, want), "is the last step forgotten?"
    assert seen[::3] == [L + 4, 3, 3], "caption and z_t are computed once"


def test_z_i_and_z_t_enter_at_one_length_whatever_clip_made_them(model, ar, text):
    """In the scaled space of the diffusion prior; of length sqrt(D) in the AR prior."""
    z = rand(5, D)
    assert near(model.scale(z).pow(2).mean(1), 17.2 ** 2 / 1024, 1e-6), \
        "unit vectors times 17.2 sqrt(D / 1024): an element's square is 17.2^2 / 1024 on average"
    assert near(model.scale(3 * z), model.scale(z), 1e-6), "the length of z should not matter"
    assert near(model.unscale(model.scale(z)), z / z.norm(dim=1, keepdim=True), 1e-6)
    for each, want, *args in ((model, 17.2 * math.sqrt(D / 1024), rand(8, D), 300),
                              (ar, math.sqrt(D), ar.encode(embeddings(8)), torch.arange(8))):
        seen = []
        each.text_in.register_forward_hook(lambda _, args, __: seen.append(args[0]))  # noqa: B023
        each(*args, text), each(*args, text._replace(z_t=3 * text.z_t))
        assert near(seen[0].norm(dim=-1), want), f"{type(each).__name__}"
        assert near(seen[0], seen[1]), "the length of z_t should not matter"


@pytest.mark.parametrize("which, starts", [
    ("DiffusionPrior", {"tok.weight": (0.02, 512), "pad": (0.01, L), "pos": (0.01, L + 4),
                        "query": (0.01, 1)}),
    ("ARPrior", {"dot.weight": (0.02, 64), "code.weight": (0.02, 64), "pos": (0.01, 33)})])
def test_every_parameter_learns_and_embeddings_start_small(text, which, starts):
    config = getattr(prior, which + "Config")(vocab_size=512, context=L, layers=1)
    big, text = getattr(prior, which)(config), text._replace(z_t=rand(8, 64))
    for name, (want, rows) in starts.items():
        weight = big.get_parameter(name)
        assert weight.numel() == rows * 128, f"{name}: a vector of width 128 for each of {rows}"
        got = weight.std().item()
        assert abs(got - want) < 0.2 * want, f"{name} starts with std {got:.4f}, not {want}"
    big.loss(rand(8, 64), text).sum().backward()
    idle = [name for name, p in big.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, f"no gradient reaches {idle}: unused, or after a layer that starts at zero?"


def test_all_runs_where_the_weights_are(model, ar, text):
    """On the device "meta", which stands for a GPU: a tensor made on the CPU does not fit there."""
    text, z = text.map(lambda x: x.to("meta")), torch.empty(8, D, device="meta")
    model.to("meta").cov = torch.zeros(1001)                         # a table stays on the CPU
    for each in (model, ar.to("meta")):
        assert each.loss(z, text).is_meta and each.sample(text, guidance=2.0).is_meta
    assert prior.quantile_edges(z, 4).is_meta


def test_the_schedule_stays_on_the_cpu_in_float64(model, ar, text):
    with torch.device("meta"):
        empty = prior.DiffusionPrior(model.config)
    assert empty.alphabar.device.type == "cpu" and empty.alphabar.dtype == torch.float64
    assert empty.pos.is_meta and model.bfloat16().alphabar.dtype == torch.float64
    assert model.sample(text, 2).isfinite().all() and ar.bfloat16().sample(text).isfinite().all()


@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_the_loss_is_the_error_of_the_prediction_that_sampling_uses(model, text, predicts):
    """Training and sampling are one function of (x_t, t, text): no t - 1 in one of them only."""
    model.config.predicts, z_i = predicts, rand(8, D)
    t = torch.tensor([1, 2, 300, 500, 800, 999, 1000, 7])
    torch.manual_seed(5)
    got = model.loss(z_i, text, t)
    torch.manual_seed(5)
    keep, eps, x0 = torch.rand(8) >= 0.1, torch.randn(8, D), model.scale(z_i)
    for i in range(8):
        ab = model.alphabar[t[i]].float()
        x_t = ab.sqrt() * x0[i] + (1 - ab).sqrt() * eps[i]
        want = {"x0": x0[i], "eps": eps[i], "v": ab.sqrt() * eps[i] - (1 - ab).sqrt() * x0[i]}
        out = model.denoiser(row(text.drop(keep), i))(x_t[None], int(t[i]))
        assert abs(got[i] - (out - want[predicts]).pow(2).mean()) < 1e-5, f"at t = {t[i]}"


def test_models_that_know_nothing_have_the_expected_losses(model, ar, text):
    for each in (model, ar):
        torch.nn.init.zeros_(each.out.weight)
        torch.nn.init.zeros_(each.out.bias)
    assert near(model.loss(rand(8, D), text), 0.2889, 1e-4), "mean over D, scaled space?"
    loss = ar.loss(embeddings(8), text)
    assert loss.shape == (8,) and near(loss, math.log(8))


@pytest.mark.parametrize("which", ["model", "ar"])
def test_a_tenth_of_the_captions_is_dropped_both_tokens_and_z_t(which, text, request, monkeypatch):
    each, seen = request.getfixturevalue(which), []
    monkeypatch.setattr(each, "forward", lambda *args: seen.append(args) or (
        args[0] if which == "model" else torch.zeros(*args[0].shape, 8)))    # x_t, or codes
    torch.manual_seed(0)
    for rate in (0.1, 0.5):
        each.drop_rate = rate
        each.loss(embeddings(4000), row(text, 7, 4000))
        gone = ~seen[-1][2].mask.any(1)
        assert torch.equal(gone, ~seen[-1][2].z_t.any(1)), "caption and embedding together"
        assert abs(gone.float().mean() - rate) < 0.02, f"{gone.float().mean():.1%} dropped"
    if which == "model":
        counts = torch.histc(seen[0][1].float(), 4, 1, 1000)
        assert counts.sum() == 4000 and counts.min() > 900, f"t is uniform on 1..T, got {counts}"


def test_of_the_candidates_the_one_nearest_to_the_caption_is_kept(model, text):
    thrice = text.map(lambda x: x.repeat_interleave(3, dim=0))
    each = model.sample(thrice, steps=4, candidates=1, generator=seed()).view(8, 3, D)
    got = model.sample(text, steps=4, candidates=3, generator=seed())
    for i in range(8):
        dots = [float(unit(z) @ unit(text.z_t[i])) for z in each[i]]
        want = each[i, dots.index(max(dots))]
        assert near(got[i], want), "the larger dot product, of unit vectors?"
    assert near(got.norm(dim=1), 1), "samples are unit vectors"
    assert not near(got, model.sample(text, steps=4, candidates=3, generator=seed(2)))
    null = model.sample(text.null(), 4, 1.0, 1, seed())
    assert near(model.sample(text, 4, 0.0, 1, seed()), null), "guidance 0 ignores the caption"


def test_the_defaults_are_the_papers_and_every_option_is_handed_on(
        model, ar, text, monkeypatch, capsys):
    seen, rows, model.clamp = [], [], 0.3
    ar.blocks[1].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    model.image_in.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    model.sample(text), model.fit_variance(rand(8, D), text)
    assert seen == [16] * 64 + [8] * 64, "64 steps, two candidates"
    assert torch.equal(ar.sample(text, generator=seed()), ar.sample(text, 1.0, 1.0, seed()))
    assert rows == 2 * [2, 1, 1, 1, 1, 1], "z_t and dot, then one code at a time"
    monkeypatch.setattr(diffusion, "p_sample", lambda *given: seen.append(given[6]) or given[2])
    for each, name in itertools.product((model, ar), ("name", None)):
        each.sample(text, progress=name)
        assert ("name: " in capsys.readouterr().err) == (name is not None)
    assert seen[-1] == 0.3, "clamp"


@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_samples_land_on_the_modes_and_not_between(model, text, monkeypatch, predicts):
    """Two embeddings are possible, the network is Bayes' own: each sample is one of the two."""
    modes, ab, model.config.predicts = torch.eye(D)[:2], model.alphabar, predicts

    def bayes(x_t, t):
        x0 = diffusion.mixture_x0(ab, x_t, t, model.scale(modes), 1e-3)
        return diffusion.target(ab, x0, t, diffusion.to_eps(ab, x0, x_t, t), predicts)

    monkeypatch.setattr(model, "denoiser", lambda *_: bayes)
    z = model.sample(row(text, 0, 64), steps=30, candidates=1, generator=seed())
    near_one, which = (z @ modes.T).max(1)
    assert (near_one > 0.99).all(), (f"cosines to the nearest of two modes: {near_one[:4]}; is it "
                                     "one pass from noise to the mean of all that could be?")
    assert 0.3 < which.float().mean() < 0.7, f"both are as likely, got {which.float().mean():.0%}"


@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_the_measured_variance_is_the_error_of_the_model_and_widens_the_steps(
        model, text, predicts):
    model.config.predicts, ab, plain = predicts, model.alphabar, model.denoiser
    x0, cap = model.scale(rand(8, D)), 17.2 ** 2 / 1024

    def good(x_t, t):                                # a line: its errors are below the cap
        x0_hat = ab[t].sqrt() * cap / (ab[t] * cap + 1 - ab[t]) * x_t
        return diffusion.target(ab, x0_hat, t, diffusion.to_eps(ab, x0_hat, x_t, t), predicts)

    for network in (good, plain(text)):
        model.denoiser, generator = lambda *_: network, seed()             # noqa: B023
        model.fit_variance(rand(8, D), text, steps=5, generator=seed())
        for t in diffusion.spaced_timesteps(1000, 5):
            x_t = diffusion.q_sample(ab, x0, t, torch.randn(8, D, generator=generator))
            x0_hat = diffusion.to_x0(ab, network(x_t, t), x_t, t, predicts)
            want = min((x0_hat - x0).pow(2).mean().item(), cap)            # no worse than saying 0
            assert abs(model.cov[t] - want) < 1e-5
    model.denoiser = plain
    with_cov = model.sample(text, steps=5, generator=seed(1))
    model.cov.zero_()
    assert not near(with_cov, model.sample(text, steps=5, generator=seed(1)))


def test_with_one_generator_for_each_image_a_sample_does_not_depend_on_its_batch(model, ar, text):
    three = text.map(lambda x: x[:3])
    for each, options in ((model, {"steps": 3, "guidance": 2.0}), (ar, {"guidance": 2.0})):
        got = each.sample(three, generator=[seed(i) for i in range(3)], **options)
        for i in range(3):
            alone = each.sample(row(text, i), generator=seed(i), **options)
            assert near(got[i:i + 1], alone), f"{type(each).__name__}, row {i}"
        with pytest.raises(ValueError, match="4 generators for"):
            each.sample(three, generator=[seed()] * 4)


def test_sampling_and_training_leave_their_inputs_alone(model, ar, text):
    z = rand(8, D)
    before = [x.clone() for x in (z, *text)]
    for each in (model, ar):
        each.loss(z, text)
        each.sample(text, guidance=2.0)
    model.scale(z), model.unscale(z), model.fit_variance(z, text, 2), ar.fit_codes(z, z)
    assert all(torch.equal(x, y) for x, y in zip(before, (z, *text)))


# ---------------------------------------------------------------- autoregressive prior
def test_principal_components_are_those_of_a_singular_value_decomposition():
    z = rand(500, D) * 0.5 ** torch.arange(D) + 0.3                  # some D matter little
    mean, basis = prior.principal_components(z)
    rows = (z / z.norm(dim=1, keepdim=True)).double().numpy()
    _, s, directions = np.linalg.svd(rows - rows.mean(0))
    K = 1 + int((np.cumsum(s ** 2) < 0.99 * np.sum(s ** 2)).sum())
    assert basis.shape == (D, K), f"99 % of the variance needs {K} components, got {basis.shape[1]}"
    assert near(mean.double(), torch.from_numpy(rows.mean(0)), 1e-6)
    same = (basis.double().T @ torch.from_numpy(directions[:K].T)).abs()
    assert near(same, torch.eye(K), 1e-4), "most important first?"
    assert prior.principal_components(z[:3], keep=1)[1].shape == (D, D), "keep = 1: all of them"


def test_buckets_are_equally_full_and_in_order_and_a_code_becomes_the_mean_of_its_bucket(ar):
    z, z_t = embeddings(400), rand(400, D, number=5)                   # those it was fitted to
    codes, dots = ar.encode(z), ar.dot_code(z, z_t)
    assert codes.shape == (400, 6) and codes.min() == 0 and codes.max() == 7
    for column in [*codes.T, dots]:
        counts = torch.bincount(column, minlength=8).tolist()
        assert counts == [50] * 8, f"expected 50 of 400 in each bucket, got {counts}"
    y, cosine = (unit(z) - ar.mean) @ ar.basis, (unit(z) * unit(z_t)).sum(1)
    assert (codes.gather(0, y.argsort(0)).diff(dim=0) >= 0).all(), "larger components, larger codes"
    assert (dots[cosine.argsort()].diff() >= 0).all(), "and larger cosines"
    for k, bucket in [(k, bucket) for k in range(6) for bucket in range(8)]:
        assert abs(ar.values[k, bucket] - y[codes[:, k] == bucket, k].mean()) < 1e-6


def test_finer_codes_give_back_the_embedding_and_what_cannot_be_fitted_is_refused():
    def fitted(K, buckets, z):
        model = prior.ARPrior(prior.ARPriorConfig(embed_dim=D, components=K, buckets=buckets))
        model.fit_codes(z, z)
        return model

    z, worst = embeddings(2000), []
    for K, buckets in [(3, 64), (D, 8), (D, 64), (D, 256)]:
        model = fitted(K, buckets, z)
        back = model.decode(model.encode(z))
        assert near(back.norm(dim=1), 1)
        worst.append((back - unit(z)).pow(2).sum(1).mean().item())
    assert worst[0] > worst[1] > worst[2] > worst[3] and worst[3] < 1e-4, worst
    fresh = prior.ARPrior(prior.ARPriorConfig(embed_dim=D, components=3, buckets=8))
    assert torch.equal(fresh.encode(z), ((unit(z)[:, :3] + 1) * 4).long()), "-1..1 before the fit"
    assert near(fresh.dot_code(z, -z), 0) and near(fresh.values[2], torch.linspace(-1, 1, 8))
    for few in (z[:10].repeat(10, 1), z[:16]):       # ten values for 16 buckets, and one for each
        model = fitted(4, 16, few)
        codes, y = model.encode(few), (unit(few) - model.mean) @ model.basis
        for k, bucket in np.ndindex(4, 16):
            inside = y[codes[:, k] == bucket, k]
            below = model.edges[k, bucket - 1] if bucket else y[:, k].min()
            assert near(model.values[k, bucket], inside.mean() if len(inside) else below), \
                "the mean of a bucket, of an empty one the cut below it"
    fitted(D, 8, rand(40, D) * 0.1 ** torch.arange(D))               # all D, little as they vary
    with pytest.raises(ValueError, match="as buckets, 16, got 10"):
        fitted(4, 16, z[:10])
    with pytest.raises(ValueError, match="components as dimensions"):
        fitted(D + 1, 16, z)


def test_code_k_is_predicted_from_dot_z_t_caption_and_the_codes_before_it(ar, text):
    codes, dot = ar.encode(embeddings(8)), torch.arange(8)
    out, cache, rows = ar(codes, dot, text), [clip.KVCache(L + 7) for _ in ar.blocks], []
    ar.blocks[1].register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    assert out.shape == (8, 6, 8)
    for k in range(6):
        other = torch.where(torch.arange(6) == k, 7 - codes, codes)
        moved = (ar(other, dot, text) - out).abs().amax((0, 2)) > 0
        assert moved.tolist() == [i > k for i in range(6)], \
            f"only the codes before it may matter; code {k} moved the predictions {moved.tolist()}"
        assert near(ar(codes[:, :k], dot, text), out[:, :k + 1]), "of the first k codes, k + 1"
        cached = ar(codes[:, :k], dot, text, cache)[:, -1]
        assert near(cached, out[:, k]), f"code {k} by the cache"
        assert rows[-1] == (1 if k else 2), "with a cache only the newest code is computed"
    for name, other in [("dot", ar(codes, 7 - dot, text)),
                        ("z_t", ar(codes, dot, text._replace(z_t=-text.z_t))),
                        ("caption", ar(codes, dot, text._replace(tokens=29 - text.tokens)))]:
        assert ((other - out).abs().amax(2) > 1e-7).all(), f"{name} does not matter"
    null = ar(codes[:1].expand(8, -1), dot[:1].expand(8), text.null())
    assert near(null, null[:1], 1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
def test_sampling_is_gumbels_trick_on_the_logits_of_forward(ar, text, guidance):
    got, generator = ar.sample(text, 0.7, guidance, seed()), seed()
    dot = torch.randint(4, 8, (8,), generator=generator)             # the top half
    gumbel = -(-torch.rand(6, 8, 8, generator=generator).log()).log()
    codes = torch.zeros(8, 0, dtype=torch.long)
    for k in range(6):
        null, cond = (ar(codes, dot, each)[:, -1] for each in (text.null(), text))
        logits = null + guidance * (cond - null)
        codes = torch.cat([codes, (logits / 0.7 + gumbel[k]).argmax(1, keepdim=True)], dim=1)
    assert near(got, ar.decode(codes)), "order of draws? guidance?"


def test_codes_are_drawn_from_the_softmax_and_dot_from_the_top_half(ar, text, monkeypatch):
    """A network that always predicts log p: the codes' shares are p, or p^(1 / temperature)."""
    p, drawn, dots = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01]), [], []
    torch.nn.init.zeros_(ar.out.weight)
    ar.out.bias.data = p.log()
    monkeypatch.setattr(ar, "decode", drawn.append)
    ar.dot.register_forward_hook(lambda _, args, __: dots.append(args[0]))
    for temperature, want in [(1.0, p), (0.5, p ** 2 / (p ** 2).sum())]:
        ar.sample(row(text, 0, 5000), temperature, generator=seed())
        fractions = torch.bincount(drawn[-1].flatten(), minlength=8) / drawn[-1].numel()
        assert near(fractions, want, 0.012), f"wanted {want}, got {fractions}"
    counts = torch.bincount(dots[0], minlength=8)
    assert not counts[:4].any() and counts[4:].min() > 1100, f"codes 4..7 equally, got {counts}"
    ar.sample(text, 1e-4)
    assert not drawn[-1].any(), "near 0 the likeliest code"
    with pytest.raises(ValueError, match="above 0, got 0"):
        ar.sample(text, 0)


def test_the_ar_loss_is_the_cross_entropy_of_the_codes_by_loop(ar, text, monkeypatch):
    z, ar.drop_rate, seen = embeddings(8), 0.0, []                   # keep all captions
    logits, codes = ar(ar.encode(z), ar.dot_code(z, text.z_t), text), ar.encode(z)
    for b, got in enumerate(ar.loss(z, text)):
        terms = [-logits[b, k].log_softmax(0)[codes[b, k]] for k in range(6)]
        assert abs(got - sum(terms) / 6) < 1e-5, "is logits[k] compared with code k?"

    z, many = embeddings(500), row(text, 7, 500)
    monkeypatch.setattr(ar, "forward", lambda codes, dot, text: seen.append((codes, dot))
                        or torch.zeros(*codes.shape, 8))
    with torch.autocast("cpu", torch.bfloat16):
        ar.loss(z, many)
    assert torch.equal(seen[0][0], ar.encode(z)), "codes are not rounded where products are"
    assert torch.equal(seen[0][1], ar.dot_code(z, many.z_t))


@pytest.mark.slow
def test_the_demo_ends_nearest_to_its_own_caption(capsys, tmp_path):
    prior.demo(tmp_path / "cosines.png")
    last = capsys.readouterr().out.split("\n")[-2].replace("#", "")
    own, *others = [float(x) for x in last.split()[3:7]]
    assert own > 0.8 > max(others), f"its own caption first: {last}"
    assert 5_000 < (tmp_path / "cosines.png").stat().st_size < 200_000, "an image of at most 200 kB"
