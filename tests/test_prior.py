"""Chapter 3, the priors: the numbers of Karlo's, and what must hold for any weights.

Structure tests first give every layer random weights (refill): what starts at zero would let
mistakes through.
"""
import math
import re

import numpy as np
import pytest
import torch

import clip
import diffusion
import golden_weights
import prior
from golden_weights import error, refill

D, L, W = 8, 8, 8                                    # equal widths: bugs that mix axes hide there


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text():
    """Eight captions of 1 to 8 tokens."""
    tokens = torch.randint(1, 30, (8, L), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(L) <= torch.arange(8)[:, None]
    return clip.Text(tokens, mask, rand(8, D, seed=1), rand(8, L, W, seed=2))


@pytest.fixture
def own_words():
    """A diffusion prior that reads tokens, as in the paper."""
    return refill(prior.DiffusionPrior(prior.DiffusionPriorConfig(
        embed_dim=D, vocab_size=30, context=L, width=W, layers=2, heads=2)))


@pytest.fixture
def clips_states():
    """A diffusion prior that reads CLIP's hidden states, as Karlo's."""
    return refill(prior.DiffusionPrior(prior.DiffusionPriorConfig(
        embed_dim=D, vocab_size=0, context=L, text_width=W, width=W, layers=2, heads=2,
        whiten=True)))


@pytest.fixture(params=["own_words", "clips_states"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def ar():
    """An AR prior, fitted to made-up embeddings."""
    config = prior.ARPriorConfig(embed_dim=D, components=6, buckets=8, vocab_size=30, context=L,
                                 text_width=W, text_layers=1, text_heads=2, width=W, layers=2,
                                 heads=2)
    model = refill(prior.ARPrior(config))
    model.fit(embeddings(400), rand(400, D, seed=5))
    return model


def embeddings(N, seed=3):
    """Embeddings whose directions vary unequally, and not around zero."""
    return rand(N, D, seed=seed) * torch.linspace(2, 0.3, D) @ mixing() + 1.0


def mixing():
    return torch.linalg.qr(rand(D, D, seed=4))[0]


# ---------------------------------------------------------------- golden


@pytest.fixture
def karlo():
    """Karlo's prior with golden weights, the two halves of its text, and the golden file."""
    golden = golden_weights.read("karlo_prior.pt")
    c, w, inputs = golden["config"], golden["weights"], golden["inputs"]
    model = prior.DiffusionPrior(prior.DiffusionPriorConfig(
        embed_dim=c["clip_dim"], vocab_size=0, context=c["text_ctx"], text_width=c["clip_dim"],
        width=c["xf_width"], layers=c["xf_layers"], heads=c["xf_heads"], whiten=True,
        clamp=c["clip_x0"])).eval()
    names = {"time_embed": "time", "text_enc_proj": "hidden_in", "text_emb_proj": "text_in",
             "clip_img_proj": "image_in", "out_proj": "out", "final_ln": "ln_out"}
    w = {re.sub(r"^\w+", lambda m: names.get(m[0], m[0]), key.removeprefix("model.")): x
         for key, x in w.items()}
    ours = golden_weights.glide_transformer(w, c["xf_heads"])
    ours |= {key: x for key, x in w.items() if key.split(".")[0] in names.values()}
    ours |= {"query": w["prd_emb"][0, 0], "pos": w["positional_embedding"][0],
             "mean": inputs["clip_mean"], "std": inputs["clip_std"], "cov": model.cov}
    model.load_state_dict(ours)
    text = clip.Text(torch.zeros(4, c["text_ctx"], dtype=torch.long), inputs["mask"],
                     inputs["text_emb"], inputs["text_enc"])
    return model, text, golden


def test_the_prior_gives_the_numbers_of_karlos(karlo):
    model, text, golden = karlo
    out = model(golden["inputs"]["x"], golden["inputs"]["timesteps"], text)
    assert error(out, golden["outputs"]["model"]) < 2e-5, "erf GELU, masks, positions, time order?"


def test_the_prior_samples_what_karlos_samples(karlo, monkeypatch):
    model, text, golden = karlo
    cond, null = (clip.Text(*(x[half] for x in text)) for half in (slice(2), slice(2, 4)))
    golden_weights.play(monkeypatch, golden["noise"], rows=2)
    z = model.sample(cond, steps=25, guidance=golden["config"]["guidance"], candidates=1, null=null)
    assert error(z, golden["outputs"]["sample"]) < 5e-5, "25 evenly spaced times, clamp, whitening?"


# ---------------------------------------------------------------- diffusion prior


def sequence(model, x_t, index, text):
    """The outputs at all positions (B, L + 4, W), not only at the query."""
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    model(x_t, index, text)
    hook.remove()
    return seen[0].detach()


@pytest.mark.parametrize("what, first", [("word 3", 3), ("z_t", L), ("time", L + 1),
                                         ("x_t", L + 2)])
def test_a_change_moves_its_own_position_and_later_ones_only(model, text, what, first):
    """The sequence is [caption, z_t, time, noised z_i, query], and nobody looks ahead."""
    text = clip.Text(*(x[-1:] for x in text))                         # a caption of full length
    x_t, t = rand(1, D, seed=6), torch.tensor([300])
    before = sequence(model, x_t, t, text)
    if what == "word 3":
        tokens, states = text.tokens.clone(), text.states.clone()
        tokens[:, 3], states[:, 3] = 29 - tokens[:, 3], -states[:, 3]
        text = text._replace(tokens=tokens, states=states)
    elif what == "z_t":
        text = text._replace(z_t=-text.z_t)
    after = sequence(model, -x_t if what == "x_t" else x_t, t + (what == "time"), text)
    moved = (before - after).abs().sum((0, 2)) > 0
    assert moved.tolist() == [i >= first for i in range(L + 4)], f"positions that moved: {moved}"


def test_all_that_it_is_given_matters(model, text):
    x_t, t = rand(8, D, seed=6), torch.full((8,), 300)
    out = model(x_t, t, text)
    other = text._replace(tokens=29 - text.tokens, states=-text.states)
    for name, changed in [("x_t", model(-x_t, t, text)), ("t", model(x_t, t + 1, text)),
                          ("z_t", model(x_t, t, text._replace(z_t=-text.z_t))),
                          ("the caption", model(x_t, t, other))]:
        assert ((changed - out).abs().amax(1) > 1e-6).all(), f"{name} does not matter"


def test_without_a_caption_captions_agree_and_the_noise_still_matters(model, text):
    x_t, t = rand(8, D, seed=6), torch.full((8,), 300)
    null = text.null()
    out = model(x_t[:1].expand(8, -1), t, null)
    assert torch.allclose(out, out[:1].expand(8, -1), atol=1e-6), "a dropped caption shines through"
    for name, changed in [("x_t", model(-x_t, t, null)), ("t", model(x_t, t + 1, null))]:
        moved = (changed - model(x_t, t, null)).abs().amax(1)
        assert (moved > 1e-6).all(), f"{name} should matter without a caption too"


def test_padding_does_not_matter(model, text):
    x_t, t = rand(8, D, seed=6), torch.full((8,), 300)
    other = text._replace(tokens=torch.where(text.mask, text.tokens, 7),
                          states=torch.where(text.mask[:, :, None], text.states, 7.0))
    assert torch.equal(model(x_t, t, text), model(x_t, t, other)), \
        "what stands at padded places should not matter: tokens embedded, then self.pad there?"


def test_example_i_never_sees_example_j(model, text):
    x_t, z_t, states = rand(8, D, seed=6), text.z_t.clone(), text.states.clone()
    for x in (x_t, z_t, states):
        x.requires_grad_()
    out = model(x_t, torch.full((8,), 300), text._replace(z_t=z_t, states=states))
    for x in [x_t, z_t, *([states] if not model.config.vocab_size else [])]:
        grad, = torch.autograd.grad(out[1].pow(2).sum(), x, retain_graph=True)
        rows = grad.flatten(1).abs().sum(1).gt(0).nonzero().flatten().tolist()
        assert rows == [1], f"row 1 of the output depends on rows {rows}"


def test_the_time_path_is_not_one_linear_map_and_rows_are_times(model, monkeypatch):
    a, b = torch.tensor([10]), torch.tensor([700])
    x = rand(2, D)
    both = model.suffix(x, torch.tensor([10, 700]))
    one = model.suffix(x[:1], a)[0]
    assert torch.allclose(one, both[0], atol=1e-6), "time along the batch axis?"
    assert not torch.allclose(model.suffix(x[:1], a), model.suffix(x[:1], b))
    monkeypatch.setattr(diffusion, "sinusoid", lambda index, width: index)

    def f(wave):                                     # the time's token, were this its sinusoid
        return model.suffix(x[:1], wave)[:, 0]
    u, v = rand(1, W, seed=7), rand(1, W, seed=8)
    assert not torch.allclose(f(u) + f(v), f(u + v) + f(torch.zeros(1, W)), atol=1e-4), \
        "the time path is one linear map: no activation between its layers?"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_keeping_the_captions_keys_changes_nothing(model, text, guidance):
    denoise = model.denoiser(text, guidance)
    for t in (900, 3, 500):                                           # one after the other
        x_t, index = rand(8, D, seed=t), torch.full((8,), t - 1)
        want = diffusion.guide(model(x_t, index, text.null()), model(x_t, index, text), guidance)
        assert torch.allclose(denoise(x_t, t), want, atol=1e-5), "is the cache reset every step?"


def test_guidance_0_ignores_the_caption_and_1_is_the_plain_model(model, text):
    x_t = rand(8, D, seed=6)
    plain, null = model.denoiser(text)(x_t, 400), model.denoiser(text.null())(x_t, 400)
    assert torch.allclose(model.denoiser(text, 1 + 1e-9)(x_t, 400), plain, atol=1e-5)
    assert torch.allclose(model.denoiser(text, 0.0)(x_t, 400), null, atol=1e-5)
    other = clip.Text(text.tokens.flip(0), text.mask.flip(0), text.z_t.flip(0), text.states.flip(0))
    guided = model.denoiser(text, 0.0, null=other)(x_t, 400)
    assert torch.allclose(guided, model.denoiser(other)(x_t, 400), atol=1e-5), "null is not used"


def test_the_scaled_space_has_the_variance_of_pixels(own_words):
    z = rand(5, D)
    x = own_words.scale(z)
    assert torch.allclose(x.pow(2).mean(1), torch.full((5,), 17.2 ** 2 / 1024), atol=1e-6), \
        "unit vectors times 17.2 sqrt(D / 1024): an element's square is 17.2^2 / 1024 on average"
    assert torch.allclose(own_words.scale(3 * z), x, atol=1e-6), "the length of z should not matter"
    assert torch.allclose(own_words.unscale(x), z / z.norm(dim=1, keepdim=True), atol=1e-6)
    big = prior.DiffusionPrior(prior.DiffusionPriorConfig(embed_dim=1024, vocab_size=9, context=4,
                                                          width=8, layers=1, heads=1))
    assert torch.allclose(big.scale(rand(3, 1024)).norm(dim=1), torch.tensor(17.2), atol=1e-4)


def test_karlos_space_is_whitened(clips_states):
    clips_states.mean.copy_(rand(D, seed=1))
    clips_states.std.copy_(rand(D, seed=2).exp())
    z = rand(5, D)
    want = (z - clips_states.mean) / clips_states.std
    assert torch.allclose(clips_states.scale(z), want)
    assert torch.allclose(clips_states.unscale(want), z, atol=1e-5)


def test_a_model_that_predicts_zero_has_the_expected_loss(own_words, text):
    torch.nn.init.zeros_(own_words.out.weight)
    torch.nn.init.zeros_(own_words.out.bias)
    loss = own_words.loss(rand(8, D), text)
    assert torch.allclose(loss, torch.full((8,), 0.2889), atol=1e-4), "mean over D, scaled space?"


def test_training_draws_every_time_and_drops_a_tenth_of_the_captions(own_words, text, monkeypatch):
    own_words.config.T, own_words.alphabar = 4, diffusion.cosine_alphabar(4)
    many = clip.Text(*(x[-1:].expand(4000, *x.shape[1:]) for x in text))
    told = []
    monkeypatch.setattr(own_words, "forward", lambda *args: told.append(args) or args[0])
    torch.manual_seed(0)
    own_words.loss(rand(4000, D), many)
    _, index, dropped = told[0]
    counts = torch.bincount(index, minlength=4).tolist()
    assert len(counts) == 4 and min(counts) > 850, f"t - 1 should be 0..3, equally often: {counts}"
    gone = ~dropped.mask.any(1)
    assert torch.equal(gone, ~dropped.z_t.any(1)), "caption and embedding are dropped together"
    assert abs(gone.float().mean() - 0.1) < 0.02, f"{gone.float().mean():.1%} dropped"


def test_the_loss_is_the_error_of_the_prediction_at_the_noised_embedding(own_words, text):
    z_i = rand(8, D)
    torch.manual_seed(5)
    got = own_words.loss(z_i, text)
    torch.manual_seed(5)
    t = diffusion.random_times(1000, 8)
    eps, keep = torch.randn(8, D), torch.rand(8) >= 0.1
    x0 = own_words.scale(z_i)
    ab = own_words.alphabar[t].float()[:, None]
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    want = ((own_words(x_t, t - 1, text.drop(keep)) - x0) ** 2).mean(1)
    assert torch.allclose(got, want, atol=1e-5)


def test_of_the_candidates_the_one_nearest_to_the_caption_is_kept(model, text):
    def seeded():
        return torch.Generator().manual_seed(3)

    three = clip.Text(*(x.repeat_interleave(3, dim=0) for x in text))
    all_of_them = model.sample(three, steps=4, candidates=1, generator=seeded()).view(8, 3, D)
    got = model.sample(text, steps=4, candidates=3, generator=seeded())
    for i in range(8):
        dots = [float(clip.unit(z) @ clip.unit(text.z_t[i])) for z in all_of_them[i]]
        want = all_of_them[i, dots.index(max(dots))]
        assert torch.allclose(got[i], want, atol=1e-5), "the larger dot product, of unit vectors?"


def test_samples_land_on_the_modes_and_not_between(own_words, text, monkeypatch):
    """Two embeddings are possible, the denoiser is Bayes' own: each sample is one of the two."""
    modes = torch.eye(D)[:2]
    centres, many = own_words.scale(modes), clip.Text(*(x.repeat(8, *[1] * (x.ndim - 1))
                                                        for x in text))
    monkeypatch.setattr(own_words, "denoiser", lambda *_: lambda x, t: diffusion.mixture_x0(
        own_words.alphabar, x, t, centres, 1e-3))
    z = own_words.sample(many, steps=30, candidates=1, generator=torch.Generator().manual_seed(0))
    near = (z @ modes.T).amax(1)
    assert (near > 0.99).all(), (f"cosines to the nearest of two modes: {near[:4].tolist()}; is it "
                                 "one pass from noise to the mean of all that could be?")
    shares = (z @ modes.T).argmax(1).float().mean()
    assert 0.3 < shares < 0.7, f"both modes are as likely; one got {shares:.0%}"


def test_samples_are_unit_vectors_and_seeds_decide_them(own_words, text):
    a, b, c = (own_words.sample(text, steps=4, generator=torch.Generator().manual_seed(seed))
               for seed in (1, 1, 2))
    assert torch.allclose(a.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_the_measured_variance_is_the_error_of_the_model_and_widens_the_steps(own_words, text):
    z = rand(8, D)
    own_words.fit_variance(z, text, steps=5, generator=torch.Generator().manual_seed(0))
    cov, denoise, x0 = own_words.cov, own_words.denoiser(text), own_words.scale(z)
    generator = torch.Generator().manual_seed(0)
    for t in diffusion.spaced_timesteps(1000, 5):
        eps = torch.randn(8, D, generator=generator)
        wrong = denoise(diffusion.q_sample(own_words.alphabar, x0, t, eps), t) - x0
        want = min(wrong.pow(2).mean().item(), 17.2 ** 2 / 1024)     # no worse than predicting 0
        assert abs(cov[t] - want) < 1e-5
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    with_cov = own_words.sample(text, steps=5, generator=seeded[0])
    own_words.cov.zero_()
    assert not torch.allclose(with_cov, own_words.sample(text, steps=5, generator=seeded[1]))


def test_sampling_and_training_leave_their_inputs_alone(model, ar, text):
    z = rand(8, D)
    before = [x.clone() for x in (z, *text)]
    for each in (model, ar):
        each.loss(z, text)
        each.sample(text, guidance=2.0)
    model.scale(z), model.unscale(z), ar.fit(rand(20, D), rand(20, D, seed=1))
    assert all(torch.equal(x, y) for x, y in zip(before, (z, *text)))


def test_the_schedule_stays_on_the_cpu_in_float64(model):
    with torch.device("meta"):
        empty = prior.DiffusionPrior(model.config)
    assert empty.alphabar.device.type == "cpu" and empty.alphabar.dtype == torch.float64
    assert empty.pos.is_meta and model.half().alphabar.dtype == torch.float64


# ---------------------------------------------------------------- the AR prior's codes


def test_principal_components_are_those_of_a_singular_value_decomposition():
    z = embeddings(500)
    mean, basis = prior.principal_components(z)
    rows = (z / z.norm(dim=1, keepdim=True)).double().numpy()
    _, s, directions = np.linalg.svd(rows - rows.mean(0))
    share = np.cumsum(s ** 2) / np.sum(s ** 2)
    K = next(k for k in range(1, D + 1) if share[k - 1] >= 0.99)
    assert basis.shape == (D, K), f"99 % of the variance needs {K} components, got {basis.shape[1]}"
    assert torch.allclose(mean.double(), torch.from_numpy(rows.mean(0)), atol=1e-6)
    same = (basis.double().T @ torch.from_numpy(directions[:K].T)).abs()
    assert torch.allclose(same, torch.eye(K).double(), atol=1e-4), "most important first?"


def test_the_basis_is_orthonormal_and_its_variances_fall():
    z = embeddings(500)
    mean, basis = prior.principal_components(z, keep=1)
    assert basis.shape == (D, D)
    assert torch.allclose(basis.T @ basis, torch.eye(D), atol=1e-6)
    var = ((clip.unit(z) - mean) @ basis).var(0)
    assert (var[:-1] >= var[1:]).all(), f"variances {var}"


def test_buckets_are_equally_full(ar):
    codes = ar.encode(embeddings(400))
    assert codes.shape == (400, 6) and codes.min() == 0 and codes.max() == 7
    counts = torch.stack([torch.bincount(column, minlength=8) for column in codes.T])
    assert (counts == 50).all(), \
        f"buckets should be equally full, with 50 of 400 in each, got {counts.tolist()}"
    dots = ar.dot_code(embeddings(400), rand(400, D, seed=5))
    assert (torch.bincount(dots, minlength=8) == 50).all()


def test_larger_components_have_larger_codes(ar):
    z = clip.unit(embeddings(100, seed=9))
    y, codes = (z - ar.mean) @ ar.basis, ar.encode(z)
    order = y.argsort(0)
    assert (codes.gather(0, order).diff(dim=0) >= 0).all()
    dots = (z * clip.unit(rand(100, D))).sum(1)
    assert (ar.dot_code(z, rand(100, D))[dots.argsort()].diff() >= 0).all()


def test_a_code_stands_for_the_mean_of_its_bucket(ar):
    z = embeddings(400)                                              # those it was fitted to
    y, codes = (clip.unit(z) - ar.mean) @ ar.basis, ar.encode(z)
    for k in range(6):
        for bucket in range(8):
            want = y[codes[:, k] == bucket, k].mean()
            assert abs(ar.values[k, bucket] - want) < 1e-6


def test_quantising_all_components_finely_gives_back_the_embedding():
    z, worst = embeddings(2000), []
    for components, buckets in [(3, 64), (D, 8), (D, 64), (D, 256)]:
        model = prior.ARPrior(prior.ARPriorConfig(embed_dim=D, components=components,
                                                  buckets=buckets))
        model.fit(z, z)
        back = model.decode(model.encode(z))
        assert torch.allclose(back.norm(dim=1), torch.ones(2000), atol=1e-5)
        worst.append((back - clip.unit(z)).pow(2).sum(1).mean().item())
    assert worst[0] > worst[1] > worst[2] > worst[3] and worst[3] < 1e-4, worst


def test_a_bucket_that_no_embedding_falls_into_has_a_value_all_the_same():
    z = embeddings(10).repeat(10, 1)                                 # ten values, 16 buckets
    model = prior.ARPrior(prior.ARPriorConfig(embed_dim=D, components=4, buckets=16))
    model.fit(z, z)
    assert model.values.isfinite().all() and model.decode(model.encode(z)).isfinite().all()
    with pytest.raises(ValueError, match="as buckets, 16, got 10"):
        model.fit(z[:10], z[:10])
    with pytest.raises(ValueError, match="components as dimensions"):
        prior.ARPrior(prior.ARPriorConfig(embed_dim=D, components=D + 1, buckets=16)).fit(z, z)


# ---------------------------------------------------------------- the AR prior's network


def test_code_k_is_predicted_from_the_codes_before_it_only(ar, text):
    codes, dot = ar.encode(embeddings(8)), torch.arange(8)
    out = ar(codes, dot, text)
    assert out.shape == (8, 6, 8)
    for k in range(6):
        other = codes.clone()
        other[:, k] = 7 - other[:, k]
        moved = (ar(other, dot, text) - out).abs().amax((0, 2)) > 0
        assert moved.tolist() == [i > k for i in range(6)], \
            f"only the codes before it may matter; code {k} moved the predictions {moved.tolist()}"


def test_every_prediction_knows_dot_embedding_and_caption(ar, text):
    codes, dot = ar.encode(embeddings(8)), torch.arange(8)
    out = ar(codes, dot, text)
    for name, other in [("dot", ar(codes, 7 - dot, text)),
                        ("z_t", ar(codes, dot, text._replace(z_t=-text.z_t))),
                        ("caption", ar(codes, dot, text._replace(tokens=29 - text.tokens)))]:
        assert ((other - out).abs().amax(2) > 1e-7).all(), f"{name} does not matter"
    null = ar(codes[:1].expand(8, -1), dot[:1].expand(8), text.null())
    assert torch.allclose(null, null[:1].expand(8, -1, -1), atol=1e-6)


def test_example_i_of_the_ar_prior_never_sees_example_j(ar, text):
    z_t = text.z_t.clone().requires_grad_()
    out = ar(ar.encode(embeddings(8)), torch.arange(8), text._replace(z_t=z_t))
    grad, = torch.autograd.grad(out[1].pow(2).sum(), z_t)
    assert grad.abs().sum(1).gt(0).nonzero().flatten().tolist() == [1]
    codes = ar.encode(embeddings(8))
    alone = torch.cat([ar(codes[i:i + 1], torch.arange(8)[i:i + 1],
                          clip.Text(*(x[i:i + 1] for x in text))) for i in range(8)])
    assert torch.allclose(alone, ar(codes, torch.arange(8), text), atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_with_a_cache_is_sampling_without(ar, text, guidance):
    with_it, without = (ar.sample(text, guidance=guidance, cached=cached,
                                  generator=torch.Generator().manual_seed(0))
                        for cached in (True, False))
    assert torch.allclose(with_it, without, atol=1e-5)


def test_the_caches_logits_are_those_of_one_pass(ar, text):
    codes, dot = ar.encode(embeddings(8)), torch.arange(8)
    context, x = ar.text(text.tokens, text.mask), ar.start(text.z_t, dot)
    caches, got = [clip.Cache(L + 7) for _ in ar.blocks], []
    for k in range(6):
        got.append(ar.run(x, None if k else context, caches)[:, -1])
        x = (ar.code(codes[:, k]) + ar.pos[2 + k])[:, None] if k < 5 else None
    assert torch.allclose(torch.stack(got, dim=1), ar(codes, dot, text), atol=1e-5)


def test_the_dot_token_is_drawn_from_the_top_half(ar, text, monkeypatch):
    many, drawn = clip.Text(*(x[:1].expand(2000, *x.shape[1:]) for x in text)), []
    start = ar.start
    monkeypatch.setattr(ar, "start", lambda z_t, dot: drawn.append(dot) or start(z_t, dot))
    ar.sample(many, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[0], minlength=8)
    assert not counts[:4].any() and counts[4:].min() > 400, f"codes 4..7 equally, got {counts}"


def test_codes_are_drawn_from_the_softmax(ar, text, monkeypatch):
    """A network that always says log p: the codes' shares are p, or p^(1 / temperature)."""
    p, drawn = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01]), []
    torch.nn.init.zeros_(ar.out.weight)
    ar.out.bias.data = p.log()
    monkeypatch.setattr(ar, "decode", lambda codes: drawn.append(codes))
    many = clip.Text(*(x[:1].expand(5000, *x.shape[1:]) for x in text))
    for temperature, want in [(1.0, p), (0.5, p ** 2 / (p ** 2).sum())]:
        ar.sample(many, temperature, generator=torch.Generator().manual_seed(0))
        shares = torch.bincount(drawn[-1].flatten(), minlength=8) / drawn[-1].numel()
        assert torch.allclose(shares, want, atol=0.012), f"wanted {want}, got {shares}"
    ar.sample(text, 1e-4)
    assert not drawn[-1].any(), "near 0 the likeliest code"
    with pytest.raises(ValueError, match="above 0, got 0"):
        ar.sample(text, 0)


def test_a_model_that_knows_nothing_has_loss_log_buckets(ar, text):
    torch.nn.init.zeros_(ar.out.weight)
    torch.nn.init.zeros_(ar.out.bias)
    loss = ar.loss(embeddings(8), text)
    assert loss.shape == (8,) and torch.allclose(loss, torch.tensor(math.log(8)))


def test_the_ar_loss_is_the_cross_entropy_of_the_codes_by_loop(ar, text, monkeypatch):
    z = embeddings(8)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(*size))     # keep all captions
    logits, codes = ar(ar.encode(z), ar.dot_code(z, text.z_t), text), ar.encode(z)
    for b, got in enumerate(ar.loss(z, text)):
        terms = [-logits[b, k].log_softmax(0)[codes[b, k]] for k in range(6)]
        assert abs(got - sum(terms) / 6) < 1e-5, "is logits[k] compared with code k?"


def test_codes_are_not_rounded_where_products_are(ar, text, monkeypatch):
    """Training in bf16 keeps its targets: those of float32."""
    told, z = [], embeddings(500)
    monkeypatch.setattr(ar, "forward", lambda codes, dot, text: told.append((codes, dot))
                        or torch.zeros(*codes.shape, 8))
    many = clip.Text(*(x[-1:].expand(500, *x.shape[1:]) for x in text))
    with torch.autocast("cpu", torch.bfloat16):
        ar.loss(z, many)
    codes, dot = told[0]
    assert torch.equal(codes, ar.encode(z)) and torch.equal(dot, ar.dot_code(z, many.z_t))


def test_the_ar_prior_drops_a_tenth_of_the_captions(ar, text, monkeypatch):
    many, told = clip.Text(*(x[-1:].expand(4000, *x.shape[1:]) for x in text)), []
    monkeypatch.setattr(ar, "forward", lambda codes, dot, text: told.append(text)
                        or torch.zeros(*codes.shape, 8))
    torch.manual_seed(0)
    ar.loss(rand(4000, D), many)
    gone = ~told[0].mask.any(1)
    assert torch.equal(gone, ~told[0].z_t.any(1)) and abs(gone.float().mean() - 0.1) < 0.02


def test_guidance_1_is_the_plain_ar_prior_and_0_ignores_the_caption(ar, text):
    def sample(text, guidance):
        return ar.sample(text, guidance=guidance, generator=torch.Generator().manual_seed(0))

    assert torch.allclose(sample(text, 1 + 1e-9), sample(text, 1.0), atol=1e-5)
    assert torch.allclose(sample(text, 0.0), sample(text.null(), 1.0), atol=1e-5)
    assert not torch.allclose(sample(text, 6.0), sample(text, 1.0), atol=1e-3)


def test_twenty_steps_on_one_batch_halve_the_loss_of_the_diffusion_prior(text):
    torch.manual_seed(0)
    model = prior.DiffusionPrior(prior.DiffusionPriorConfig(embed_dim=D, vocab_size=30, context=L,
                                                            width=32, layers=2, heads=2))
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        loss = model.loss(rand(8, D).repeat(8, 1), clip.Text(*(x.repeat(8, *[1] * (x.ndim - 1))
                                                               for x in text))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] / 2, f"from {losses[0]:.3f} to {losses[-1]:.3f}"
