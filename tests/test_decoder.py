"""Chapter 4, the decoder and the upsamplers: their U-Net's numbers, structure, and the damage that
upsamplers train on.

Structure tests first give every layer random weights (refill): what starts at zero would let
mistakes through.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import decoder
import diffusion
import golden_weights
from golden_weights import error, refill


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def rand(*shape, number=0):
    return torch.randn(*shape, generator=seed(number))


# ---------------------------------------------------------------- golden


def unet_of(c, **more):
    """The UNetConfig of an original configuration, which gives attention by shrinking factors."""
    side = c.get("image_size", 16)
    return decoder.UNetConfig(
        size=side, channels=c["model_channels"], mults=tuple(c["channel_mult"]),
        depth=c["num_res_blocks"], attention=tuple(side // k for k in c["attention_resolutions"]),
        head_channels=c["num_head_channels"], **more)


def test_the_unet_gives_the_numbers_of_guided_diffusion():
    golden = golden_weights.read("unet_adm.pt")
    c, w, inputs = golden["config"], golden["weights"], golden["inputs"]
    unet = decoder.UNet(unet_of(c)).eval()
    unet.load_state_dict(golden_weights.adm_unet(w, c["num_res_blocks"], c["num_head_channels"]))
    out = unet(inputs["x"], inputs["timesteps"], emb=w["label_emb.weight"][inputs["y"]])
    assert error(out, golden["outputs"]["out"]) < 2e-5, \
        "resampling before conv1, 1 + scale, GroupNorm eps, attention scale, cosines first?"


def test_the_unet_and_its_text_give_the_numbers_of_glide():
    golden = golden_weights.read("glide_text2im.pt")
    c, w, inputs, want = (golden[k] for k in ("config", "weights", "inputs", "outputs"))
    text = clip.CaptionEncoder(c["n_vocab"], c["text_ctx"], c["xf_width"], c["xf_layers"],
                               c["xf_heads"])
    text.load_state_dict(golden_weights.glide_transformer(w, c["xf_heads"]) | {
        "tok.weight": w["token_embedding.weight"], "pos": w["positional_embedding"],
        "pad": w["padding_embedding"], "ln_out.weight": w["final_ln.weight"],
        "ln_out.bias": w["final_ln.bias"]})
    unet = decoder.UNet(unet_of(c, context_width=c["xf_width"])).eval()
    unet.load_state_dict(golden_weights.adm_unet(w, c["num_res_blocks"], c["num_head_channels"]))
    states = text(inputs["tokens"], inputs["mask"])
    pooled = F.linear(states[:, -1], w["transformer_proj.weight"], w["transformer_proj.bias"])
    out = unet(inputs["x"], inputs["timesteps"], pooled, unet.keys_values(states))
    assert error(states, want["xf_out"]) < 2e-5, "no causal mask, padding vectors, erf GELU?"
    assert error(pooled, want["xf_proj"]) < 2e-5 and error(out, want["out"]) < 2e-5


@pytest.fixture
def karlo():
    """Karlo's decoder with golden weights, the two halves of its text, and the golden file."""
    golden = golden_weights.read("karlo_decoder.pt")
    c, inputs = golden["config"], golden["inputs"]
    w = {key.removeprefix("model."): x for key, x in golden["weights"].items()}
    side = c["image_size"]
    model = decoder.Decoder(decoder.DecoderConfig(
        decoder.UNetConfig(size=side, channels=c["num_channels"], mults=tuple(c["mults"]),
                           depth=c["num_res_blocks"], head_channels=c["num_head_channels"],
                           attention=tuple(side // k for k in c["attention_ds"]),
                           context_width=c["xf_width"]),
        embed_dim=c["clip_dim"], vocab_size=0, text_width=c["clip_dim"])).eval()
    names = {"clip_emb": "image_emb", "text_feat_proj": "text_emb", "text_seq_proj.0": "hidden_in",
             "text_seq_proj.1": "hidden_ln", "clip_tok_proj": "image_tokens"}
    ours = {}
    for theirs, name in names.items():
        for kind in ("weight", "bias"):
            rows = w[f"{theirs}.{kind}"]
            if name == "image_tokens":                               # rows are channel * 4 + token
                rows = torch.cat([rows[token::4] for token in range(4)])
            ours[f"{name}.{kind}"] = rows
    unet = golden_weights.adm_unet(w, c["num_res_blocks"], c["num_head_channels"])
    model.load_state_dict(ours | {"null_image": w["cf_param"]}
                          | {f"unet.{key}": x for key, x in unet.items()})
    model.unet.config.size = model.config.unet.size = c["pixels"]    # a U-Net does not mind
    text = clip.Text(torch.zeros(4, c["text_ctx"], dtype=torch.long), inputs["mask"],
                     inputs["txt_feat"], inputs["txt_feat_seq"])
    return model, text, golden


def test_the_decoder_gives_the_numbers_of_karlos(karlo):
    model, text, golden = karlo
    inputs = golden["inputs"]
    out = model(inputs["x"], inputs["timesteps"], inputs["y"], text)
    assert error(out, golden["outputs"]["model"]) < 2e-5, \
        "image tokens first, context keys first, padded text hidden, text in the time embedding?"


def test_the_decoder_samples_what_karlos_samples(karlo, monkeypatch):
    """To 1e-4, but for a few pixels: at t = T the original's own rounding (x0 = (x - eps) / 5e-5)
    is worth that much, says the same run in float64."""
    model, text, golden = karlo
    cond, null = (clip.Text(*(x[half] for x in text)) for half in (slice(2), slice(2, 4)))
    golden_weights.play(monkeypatch, golden["noise"], rows=2)
    x = model.sample(golden["inputs"]["img_feat"], cond, steps=5, null=null,
                     guidance=golden["config"]["guidance"])
    off = (x - golden["outputs"]["sample"]).abs()
    assert (off > 1e-4).float().mean() < 0.02 and off.max() < 2e-3, \
        "eps guided and not v, the learned null embedding, learned range, clamp?"


def test_guided_ddim_keeps_x0_among_the_pixels_and_plain_ddim_leaves_it_alone(karlo, monkeypatch):
    """A denoiser that sees x0 = 5, but at the last step a tenth of what it is given."""
    model, text, golden = karlo
    alphabar = model.alphabar

    def denoise(x_t, t):
        x0 = torch.full_like(x_t, 5.0) if t > 1 else x_t / 10
        return diffusion.predict_eps(alphabar, x_t, torch.full((len(x_t),), t), x0).float()
    monkeypatch.setattr(model, "denoiser", lambda *_: denoise)
    z_i, x_T = golden["inputs"]["img_feat"], torch.zeros(2, 3, 8, 8)
    for guidance, x0 in ((1.0, 5.0), (8.0, 1.0)):
        x = model.decode(z_i, x_T, text, steps=5, guidance=guidance)
        assert torch.allclose(x, torch.tensor(x0 / 10), atol=0.01), f"guidance {guidance}"


@pytest.fixture
def karlo_sr():
    """Karlo's two upsampling networks with golden weights, and the golden file."""
    golden = golden_weights.read("karlo_sr.pt")
    c = golden["config"]
    model = decoder.Upsampler(decoder.UpsamplerConfig(
        decoder.UNetConfig(size=24, in_channels=6, out_channels=3, channels=c["channels"],
                           mults=tuple(c["channels_multiple"]), depth=c["depth"],
                           scale_shift=False), eta=None, last=True)).eval()
    for ours, theirs in [(model.unet, "model_first_steps."), (model.last, "model_last_step.")]:
        w = {key.removeprefix(theirs): x for key, x in golden["weights"].items()
             if key.startswith(theirs)}
        ours.load_state_dict(golden_weights.adm_unet(w, c["depth"], 64))
    return model, golden


def test_the_upsampler_gives_the_numbers_of_karlos(karlo_sr, monkeypatch):
    model, golden = karlo_sr
    inputs, want = golden["inputs"], golden["outputs"]
    low_up = decoder.enlarge(inputs["low"], 24)
    assert error(low_up, inputs["low_up"]) < 2e-5, "bicubic with antialias=True, after the clamp?"
    out = model(inputs["x"], inputs["timesteps"], inputs["low"])
    assert error(out, want["first"]) < 2e-5, "noisy picture first; embedding before the norm?"
    x = torch.cat([inputs["x"], inputs["low_up"]], dim=1)
    assert error(model.last(x, inputs["timesteps"]), want["last"]) < 2e-5
    golden_weights.play(monkeypatch, golden["noise"], rows=2)
    assert error(model.sample(inputs["low"], steps=7), want["sample"]) < 1e-4, \
        "small variance, clamp, the second network at the last step only?"


# ---------------------------------------------------------------- U-Net


@pytest.fixture
def unet():
    """Two levels, attention at the lower, a context of width 8."""
    return refill(decoder.UNet(decoder.UNetConfig(
        size=8, channels=32, mults=(1, 2), attention=(4,), head_channels=16, context_width=8)))


@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_fresh_res_block_is_the_identity_but_for_resampling(resample):
    block, x = decoder.ResBlock(32, 32, 16, resample=resample), rand(2, 32, 4, 6)
    want = {None: x, "down": F.avg_pool2d(x, 2), "up": x.repeat_interleave(2, 2)
            .repeat_interleave(2, 3)}[resample]
    assert torch.equal(block(x, rand(2, 16)), want), "2x2 mean, nearest neighbour, zero conv2?"


def test_scale_and_shift_steer_the_second_norm():
    block, x, emb = refill(decoder.ResBlock(32, 64, 16)), rand(2, 32, 4, 4), rand(2, 16)
    scale, shift = block.emb(emb)[:, :64, None, None], block.emb(emb)[:, 64:, None, None]
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    assert torch.allclose(block(x, emb), block.skip(x) + block.conv2(F.silu(h)), atol=1e-5), \
        "norm2 comes first, then times (1 + scale), plus shift, then SiLU and conv2"


def test_a_fresh_unet_predicts_zero():
    fresh = decoder.UNet(decoder.UNetConfig(size=8, channels=32, mults=(1, 2), attention=(4,),
                                            head_channels=16))
    assert not fresh(rand(2, 3, 8, 8), torch.tensor([3, 4])).any()


@pytest.mark.parametrize("attention, looks", [((), [0, 0, 0]), ((8, 4), [1, 1, 0]),
                                              ((2,), [0, 0, 1])])
def test_attention_stands_where_it_was_asked_for_and_in_the_middle(attention, looks):
    unet = decoder.UNet(decoder.UNetConfig(size=8, channels=32, mults=(1, 1, 2), depth=2,
                                           attention=attention, head_channels=16))
    assert [len(level.attn) for level in unet.down] == [2 * look for look in looks]
    assert [len(level.attn) for level in unet.up] == [3 * look for look in reversed(looks)]
    assert (unet.mid_attn is not None) == bool(attention)
    assert all(attn.heads == attn.qkv.in_features // 16 for attn in unet.modules()
               if isinstance(attn, decoder.Attention))


def test_the_unet_hears_picture_time_embedding_and_context(unet):
    x, t, emb, context = rand(2, 3, 8, 8), torch.tensor([10, 700]), rand(2, 128), rand(2, 5, 8)
    out = unet(x, t, emb, unet.keys_values(context))
    for name, args in [("x", (-x, t, emb, context)), ("t", (x, t + 1, emb, context)),
                       ("emb", (x, t, -emb, context)), ("context", (x, t, emb, -context))]:
        other = unet(*args[:3], unet.keys_values(args[3]))
        moved = (other - out).abs().mean((2, 3))                     # (B, 6)
        assert (moved > 1e-6).all(), f"{name} does not move every channel"


def test_times_are_embedded_row_by_row(unet):
    x = rand(1, 3, 8, 8).expand(2, -1, -1, -1)
    both = unet(x, torch.tensor([10, 700]))
    assert torch.allclose(unet(x[:1], torch.tensor([700]))[0], both[1], atol=1e-5)
    a, b, zero = rand(1, 32), rand(1, 32, number=1), torch.zeros(1, 32)
    f = unet.time
    assert not torch.allclose(f(a) + f(b), f(a + b) + f(zero), atol=1e-4), "one linear map?"


def test_masked_context_is_not_looked_at_and_pixels_always_are(unet):
    x, t, context = rand(2, 3, 8, 8), torch.tensor([10, 700]), rand(2, 5, 8)
    mask, other = torch.tensor([True, True, False, True, False]).expand(2, 5), context.clone()
    other[:, [2, 4]] += 3
    out = unet(x, t, None, unet.keys_values(context), mask)
    assert torch.equal(out, unet(x, t, None, unet.keys_values(other), mask))
    other[:, 1] += 3
    assert not torch.allclose(out, unet(x, t, None, unet.keys_values(other), mask), atol=1e-5)
    nothing = unet(x, t, None, unet.keys_values(context), torch.zeros(2, 5, dtype=torch.bool))
    assert torch.allclose(nothing, unet(x, t), atol=1e-5), "without context, pixels see pixels"


# ---------------------------------------------------------------- decoder


def small(**more):
    return decoder.DecoderConfig(
        decoder.UNetConfig(size=8, channels=32, mults=(1, 2), attention=(8, 4), head_channels=16,
                           context_width=8), embed_dim=8, context=8, text_width=8, **more)


@pytest.fixture
def own_words():
    """A decoder with a text Transformer, as the paper's."""
    return refill(decoder.Decoder(small(vocab_size=30, text_layers=1, text_heads=2)))


@pytest.fixture
def clips_states():
    """A decoder that reads CLIP's hidden states, as Karlo's."""
    model = refill(decoder.Decoder(small(vocab_size=0)))
    model.null_image.copy_(rand(8, number=9))
    return model


@pytest.fixture(params=["own_words", "clips_states"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def text():
    """Eight captions of 1 to 8 tokens."""
    tokens = torch.randint(1, 30, (8, 8), generator=seed())
    mask = torch.arange(8) <= torch.arange(8)[:, None]
    return clip.Text(tokens, mask, rand(8, 8, number=1), rand(8, 8, 8, number=2))


@pytest.fixture
def x_t():
    return rand(8, 3, 8, 8, number=3)


@pytest.fixture
def z_i():
    return clip.unit(rand(8, 8, number=4))


T300 = torch.full((8,), 300)


def test_all_that_the_decoder_is_given_matters(model, text, x_t, z_i):
    out = model(x_t, T300, z_i, text)
    assert out.shape == (8, 6, 8, 8)
    other = text._replace(tokens=29 - text.tokens, states=-text.states, z_t=-text.z_t)
    for name, changed in [("x_t", model(-x_t, T300, z_i, text)),
                          ("t", model(x_t, T300 + 1, z_i, text)),
                          ("z_i", model(x_t, T300, -z_i, text)),
                          ("the caption", model(x_t, T300, z_i, other))]:
        assert ((changed - out).abs().mean((2, 3)) > 1e-6).all(), f"{name} does not matter"


def test_the_embedding_enters_twice(own_words, z_i, text):
    """Added to the time embedding, and as four different tokens before the caption's."""
    emb, kv, mask = own_words.condition(z_i, text)
    other, kv_other, _ = own_words.condition(-z_i, text)
    assert mask is None and ((emb - other).abs() > 0).all()
    moved = (kv[0] - kv_other[0]).abs().amax((0, 2)) > 0              # (K,)
    assert moved.tolist() == [True] * 4 + [False] * 8, f"context tokens that know z_i: {moved}"
    tokens = own_words.image_tokens(z_i).unflatten(1, (4, 8))
    assert (torch.cdist(tokens, tokens)[:, 0, 1:] > 1e-3).all(), "four different tokens"


def test_without_a_caption_captions_agree_and_the_noise_still_matters(model, text, x_t, z_i):
    null = text.null()
    same_x, same_z = x_t[:1].expand(8, -1, -1, -1), z_i[:1].expand(8, -1)
    out = model(same_x, T300, same_z, null)
    assert torch.allclose(out, out[:1].expand_as(out), atol=1e-5), "captions shine through"
    out = model(x_t, T300, z_i, null)
    for name, changed in [("x_t", model(-x_t, T300, z_i, null)),
                          ("z_i", model(x_t, T300, -z_i, null))]:
        assert ((changed - out).abs().mean((1, 2, 3)) > 1e-6).all(), f"{name} should still matter"


def test_padding_does_not_matter(model, text, x_t, z_i):
    other = text._replace(tokens=torch.where(text.mask, text.tokens, 7),
                          states=torch.where(text.mask[:, :, None], text.states, 7.0))
    assert torch.equal(model(x_t, T300, z_i, text), model(x_t, T300, z_i, other))


def test_example_i_never_sees_example_j(model, text, x_t, z_i):
    z_t, states = text.z_t.clone(), text.states.clone()
    given = [x_t, z_i, z_t, states]
    for x in given:
        x.requires_grad_()
    out = model(x_t, T300, z_i, text._replace(z_t=z_t, states=states))
    for x in given if not model.config.vocab_size else given[:2]:
        grad, = torch.autograd.grad(out[1].pow(2).sum(), x, retain_graph=True)
        rows = grad.flatten(1).abs().sum(1).gt(0).nonzero().flatten().tolist()
        assert rows == [1], f"row 1 of the output depends on rows {rows}"
    alone = torch.cat([model(x_t[i:i + 1], T300[:1], z_i[i:i + 1],
                             clip.Text(*(x[i:i + 1] for x in text))) for i in range(8)])
    assert torch.allclose(alone, model(x_t, T300, z_i, text), atol=1e-5)


def test_guidance_moves_eps_only_towards_the_caption(model, text, x_t, z_i):
    null = model.null_image.expand(8, -1)
    uncond = model(x_t, T300 - 1, null, text.null())
    cond = model(x_t, T300 - 1, z_i, text)
    for scale in (0.0, 1.0, 1 + 1e-9, 4.0):
        out = model.denoiser(z_i, text, scale)(x_t, 300)
        want = diffusion.guide(uncond[:, :3], cond[:, :3], scale)
        assert torch.allclose(out[:, :3], want, atol=1e-4), "null: no caption and null_image?"
        assert torch.allclose(out[:, 3:], cond[:, 3:], atol=1e-5), "the variance is not guided"
    moved = (model.denoiser(z_i, text, 4.0)(x_t, 300) - cond)[:, :3].abs().mean((2, 3))
    assert (moved > 1e-6).all(), "guidance should reach every channel of eps"


def test_another_null_caption_can_be_given(model, text, x_t, z_i):
    other = clip.Text(*(x.flip(0) for x in text))
    uncond = model(x_t, T300 - 1, model.null_image.expand(8, -1), other)
    got = model.denoiser(z_i, text, 0.0, null=other)(x_t, 300)
    assert torch.allclose(got[:, :3], uncond[:, :3], atol=1e-4)


def test_the_decoder_samples_pixels_in_range_and_seeds_decide_them(model, text, z_i):
    a, b, c = (model.sample(z_i, text, steps=3, guidance=2.0, generator=seed(s)) for s in (1, 1, 2))
    assert a.shape == (8, 3, 8, 8) and a.abs().max() <= 1
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_a_fresh_decoder_starts_at_the_expected_loss(text):
    """It predicts eps = 0, so the simple part is 1; its v = 0 adds the rest, little for most t."""
    fresh = decoder.Decoder(small(vocab_size=30, text_layers=1, text_heads=2))
    many = clip.Text(*(x.repeat(8, *[1] * (x.ndim - 1)) for x in text))
    loss = fresh.loss(rand(64, 3, 8, 8).clamp(-1, 1), rand(64, 8), many)
    assert loss.shape == (64,) and 0.95 < loss.median() < 1.2, f"median {loss.median()}, expected 1"


def test_with_velocity_the_loss_is_the_error_of_the_velocity(text, monkeypatch):
    """A U-Net that says 0 is off by all of sqrt(ab) eps - sqrt(1 - ab) x0."""
    config = small(vocab_size=30, text_layers=1, text_heads=2)
    config.velocity = True
    model, seen = decoder.Decoder(config), {}
    monkeypatch.setattr(diffusion, "vlb_loss", lambda *args: 0.0)
    real = diffusion.q_sample
    monkeypatch.setattr(diffusion, "q_sample", lambda ab, x0, t, eps:
                        seen.update(t=t, eps=eps) or real(ab, x0, t, eps))
    x0 = rand(8, 3, 8, 8).clamp(-1, 1)
    got = model.loss(x0, rand(8, 8), text)
    ab = model.alphabar[seen["t"]].float()[:, None, None, None]
    want = (ab.sqrt() * seen["eps"] - (1 - ab).sqrt() * x0).pow(2).mean((1, 2, 3))
    assert torch.allclose(got, want, rtol=2e-2), (got, want)


def test_training_drops_embeddings_and_captions_and_draws_every_time(own_words, text, monkeypatch):
    own_words.config.T, own_words.alphabar = 4, diffusion.cosine_alphabar(4)
    many, told = clip.Text(*(x[-1:].expand(4000, *x.shape[1:]) for x in text)), []
    own_words.null_image.fill_(7.0)
    monkeypatch.setattr(own_words, "forward", lambda *args: told.append(args)
                        or torch.zeros(4000, 6, 2, 2))
    own_words.loss(torch.zeros(4000, 3, 2, 2), torch.ones(4000, 8), many)
    _, index, z_i, dropped = told[0]
    counts = torch.bincount(index, minlength=4).tolist()
    assert len(counts) == 4 and min(counts) > 850, f"t - 1 should be 0..3, equally often: {counts}"
    no_image, no_text = z_i[:, 0] == 7, ~dropped.mask.any(1)
    assert torch.equal(no_text, ~dropped.z_t.any(1))
    shares = [x.float().mean().item() for x in (no_image, no_text, no_image & no_text)]
    assert np.allclose(shares, [0.1, 0.5, 0.05], atol=0.02), f"dropped: {shares}"


def test_the_decoder_leaves_its_inputs_alone(model, text, x_t, z_i):
    before = [x.clone() for x in (x_t, z_i, *text)]
    model.loss(x_t.clamp(-1, 1), z_i, text)
    model.sample(z_i, text, steps=2, guidance=3.0)
    model.denoiser(z_i, text, 2.0)(x_t, 300)
    assert all(torch.equal(x, y) for x, y in zip(before, (x_t, z_i, *text)))


@pytest.mark.parametrize("make", [lambda: decoder.Decoder(small()), lambda: decoder.Upsampler(
    decoder.UpsamplerConfig())])
def test_the_schedule_stays_on_the_cpu_in_float64(make):
    with torch.device("meta"):
        empty = make()
    assert empty.alphabar.device.type == "cpu" and empty.alphabar.dtype == torch.float64
    assert empty.unet.conv_in.weight.is_meta


# ---------------------------------------------------------------- upsamplers


def test_after_fit_directions_begin_equally_large_but_those_where_data_hardly_differ(own_words):
    """Data with stds 1, 1/2, 1/4 ... along random axes: what a Wiener filter leaves of each."""
    axes = torch.linalg.qr(rand(8, 8))[0]
    std = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 10, 1 / 30, 1 / 100])
    z = rand(4000, 8, number=1) * std @ axes.T + 3
    own_words.fit(z)
    for layer in (own_words.image_emb, own_words.image_tokens):
        assert layer(z).mean(0).abs().max() < 1e-2, "the mean of the data is not subtracted"
        size = (layer.weight @ axes * std).norm(dim=0)               # of what each axis gives
        left = size / (std ** 2 / (std ** 2 + 0.02))
        assert left.max() / left.min() < 1.7, f"{left}: cov^(-1/2), not cov^(-1) or cov^(1/2)"


def test_the_sizes_that_are_there_without_asking_work():
    c = decoder.DecoderConfig()
    text = clip.Text(torch.randint(c.vocab_size, (2, c.context)), torch.ones(2, c.context).bool(),
                     rand(2, c.embed_dim), torch.zeros(2, 0))
    loss = decoder.Decoder(c).loss(rand(2, 3, c.unet.size, c.unet.size).clamp(-1, 1),
                                   rand(2, c.embed_dim), text)
    assert loss.shape == (2,) and loss.isfinite().all()
    with pytest.raises(ValueError, match="multiple of head_channels"):
        decoder.Attention(96, 64, 0)


@pytest.mark.parametrize("T, last", [(1000, 997), (100, 99)])
def test_inversion_ends_before_the_last_time(T, last):
    times = decoder.Decoder(decoder.DecoderConfig(T=T)).ddim_times(10)
    assert (times[0], times[-1], len(times)) == (1, last, 10)


@pytest.mark.parametrize("shape", [(1, 3, 16, 24), (1, 3, 5, 5)])
def test_what_an_upsampler_cannot_enlarge_is_refused(shape):
    """Four times five pixels: 20, 10, 5, and no half of it."""
    model = decoder.Upsampler(decoder.UpsamplerConfig(
        decoder.UNetConfig(size=64, in_channels=6, channels=32, mults=(1, 1, 1, 1))))
    with pytest.raises(ValueError, match="square picture, four times its side a multiple of 8"):
        model.sample(torch.zeros(shape), 1)


@pytest.fixture
def upsampler():
    return refill(decoder.Upsampler(decoder.UpsamplerConfig(
        decoder.UNetConfig(size=64, in_channels=6, channels=32, mults=(1, 1)))))


def test_an_upsampler_has_no_attention(upsampler):
    assert not any(isinstance(m, decoder.Attention) for m in upsampler.modules())


def test_an_upsampler_hears_both_pictures_and_the_time(upsampler):
    x, low, t = rand(2, 3, 16, 16), rand(2, 3, 4, 4, number=1).clamp(-1, 1), torch.tensor([5, 500])
    out = upsampler(x, t, low)
    for name, other in [("x_t", upsampler(-x, t, low)), ("t", upsampler(x, t + 1, low)),
                        ("the small picture", upsampler(x, t, -low))]:
        assert ((other - out).abs().mean((2, 3)) > 1e-6).all(), f"{name} does not matter"
    assert torch.allclose(upsampler(x[1:], t[1:], low[1:]), out[1:], atol=1e-5)


def test_a_thing_that_moves_moves_in_the_output_and_nothing_else_changes(upsampler):
    """So it may train on crops and run on whole pictures: no place is special (but the edges)."""
    upsampler, t = upsampler.double(), torch.tensor([100])           # flat areas round badly
    x, low = torch.zeros(1, 3, 160, 160).double(), torch.zeros(1, 3, 40, 40).double()
    x[:, :, 76:84, 76:84], low[:, :, 19:21, 19:21] = rand(3, 8, 8), 0.5
    moved = upsampler(x.roll((-4, 4), (2, 3)), t, low.roll((-1, 1), (2, 3)))
    out = upsampler(x, t, low).roll((-4, 4), (2, 3))
    inside = slice(48, 112)                                          # the network looks 36 px far
    worst = (moved - out)[..., inside, inside].abs().max()
    assert worst < 1e-9, f"differs by {worst}: positions, attention, or an odd shift?"


def test_training_windows_are_quarters_shrunk_and_half_of_them_blurred(upsampler):
    high = rand(400, 3, 64, 64).clamp(-1, 1)
    x0, low = upsampler.prepare(high)
    assert x0.shape == (400, 3, 16, 16) and low.shape == (400, 3, 4, 4)
    sharp = (decoder.shrink(x0, 4) - low).abs().amax((1, 2, 3)) < 1e-6
    assert 0.4 < sharp.float().mean() < 0.6, f"{sharp.float().mean():.0%} of the windows are sharp"
    x0, low = upsampler.prepare(high[:2], crops=3)
    assert x0.shape == (6, 3, 16, 16)
    assert len({tuple(x.flatten().tolist()) for x in x0}) > 2, "every crop has its own window"


def test_the_second_upsampler_trains_on_bsr_damage():
    model = decoder.Upsampler(decoder.UpsamplerConfig(
        decoder.UNetConfig(size=256, in_channels=6, channels=32, mults=(1,)), corruption="bsr"))
    high = F.interpolate(rand(2, 3, 8, 8), 256, mode="bicubic").clamp(-1, 1)
    x0, low = model.prepare(high)
    assert x0.shape == (2, 3, 64, 64) and low.shape == (2, 3, 16, 16) and low.abs().max() <= 1
    difference = (decoder.shrink(x0, 16) - low).abs().mean()
    assert 0.003 < difference < 0.3, f"{difference}: damaged, but the same window"


def test_without_v_the_upsampler_learns_the_simple_loss():
    fresh = decoder.Upsampler(decoder.UpsamplerConfig(
        decoder.UNetConfig(size=64, in_channels=6, out_channels=3, channels=32, mults=(1,))))
    torch.manual_seed(1)
    loss = fresh.loss(torch.zeros(16, 3, 16, 16), torch.zeros(16, 3, 4, 4))
    torch.manual_seed(1)
    diffusion.random_times(1000, 16)
    want = torch.randn(16, 3, 16, 16).pow(2).mean((1, 2, 3))          # it predicts 0
    assert torch.allclose(loss, want)


def test_training_and_sampling_see_the_small_picture_in_the_same_way(upsampler, monkeypatch):
    """Beyond [-1, 1] it is clamped, then enlarged; both put it after the noisy picture."""
    low, seen = 2 * rand(2, 3, 4, 4), []
    unet = upsampler.unet.forward
    monkeypatch.setattr(upsampler.unet, "forward",
                        lambda x, t: seen.append(x[:, 3:]) or unet(x, t))
    upsampler(rand(2, 3, 16, 16), torch.tensor([3, 4]), low)
    upsampler.sample(low, steps=2)
    want = decoder.enlarge(low.clamp(-1, 1), 16)
    assert len(seen) == 3 and all(torch.allclose(x, want, atol=1e-6) for x in seen)


@pytest.mark.parametrize("eta, steps, want", [
    (0.0, 27, diffusion.glide27_timesteps(1000)), (0.0, 20, list(range(1, 1000, 50))),
    (0.0, 10, diffusion.spaced_timesteps(1000, 10)),
    (0.0, 15, [*range(1, 1000, 67)]), (0.0, 999, diffusion.spaced_timesteps(1000, 999)),
    (0.0, 4, [1, 334, 667, 1000]), (0.0, 1, [1000]), (0.0, 2, [1, 1000]),
    (None, 7, [1, 167, 334, 501, 667, 833, 1000]),
    (None, 27, diffusion.spaced_timesteps(1000, 27))])
def test_the_sampling_times(upsampler, eta, steps, want):
    upsampler.config.eta = eta
    assert upsampler.times(steps) == want


def test_the_last_step_may_have_a_network_of_its_own(upsampler, monkeypatch):
    upsampler.config.eta, told = None, []
    upsampler.last = decoder.UNet(upsampler.config.unet)
    for name in ("unet", "last"):
        monkeypatch.setattr(getattr(upsampler, name), "forward", lambda x, index, name=name:
                            told.append((name, int(index[0]))) or torch.zeros(len(x), 3, 16, 16))
    upsampler.sample(torch.zeros(1, 3, 4, 4), steps=3)
    middle = diffusion.spaced_timesteps(1000, 3)[1]
    assert told == [("unet", 999), ("unet", middle - 1), ("last", 0)]


def test_upsampling_gives_pictures_in_range_and_leaves_its_input_alone(upsampler):
    low = rand(2, 3, 4, 4).clamp(-1, 1)
    before = low.clone()
    a, b = (upsampler.sample(low, steps=4, generator=seed(1)) for _ in range(2))
    assert a.shape == (2, 3, 16, 16) and a.abs().max() <= 1 and torch.equal(a, b)
    upsampler.loss(a, low)
    assert torch.equal(low, before)


def test_twenty_steps_on_one_batch_halve_the_loss_of_the_decoder(text):
    torch.manual_seed(0)
    model = decoder.Decoder(small(vocab_size=30, text_layers=1, text_heads=2))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    x0, z_i = torch.ones(16, 3, 8, 8) * 0.5, rand(8, 8).repeat(2, 1)
    many = clip.Text(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in text))
    for _ in range(25):
        loss = model.loss(x0, z_i, many).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] / 2, f"from {losses[0]:.3f} to {losses[-1]:.3f}"


# ---------------------------------------------------------------- damage


@pytest.fixture
def shapes():
    """Coloured shapes on white, (3, 256, 256) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.ones(3, 256, 256)
    image[:, (y - 90) ** 2 + (x - 90) ** 2 < 50 ** 2] = torch.tensor([[0.8], [-0.8], [-0.8]])
    image[:, 140:220, 120:230] = torch.tensor([-0.8, -0.6, 0.8])[:, None, None]
    return image


def degrade(image, number):
    return decoder.bsr_degrade(image, np.random.default_rng(number))


# ---- shrink, enlarge, crop_pair ----

def test_shrinking_takes_the_mean_of_every_block():
    x = torch.randn(2, 3, 12, 12).double()
    got = decoder.shrink(x, 3)
    assert got.shape == (2, 3, 3, 3)
    for i in range(3):
        for j in range(3):
            block = x[:, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
            assert torch.allclose(got[:, :, i, j], block.sum((2, 3)) / 16, atol=1e-12)
    with pytest.raises(ValueError, match=r"k \* 5, got 12"):
        decoder.shrink(x, 5)


def test_enlarging_is_catmull_rom_after_a_clamp():
    """Cubic with a = -1/2 through four neighbours, along both axes, edges left out."""
    low = 2 * torch.randn(1, 1, 10, 10).double()

    def cubic(d, a=-0.5):
        d = abs(d)
        return ((a + 2) * d ** 3 - (a + 3) * d ** 2 + 1 if d < 1 else
                a * (d ** 3 - 5 * d ** 2 + 8 * d - 4) if d < 2 else 0.0)
    got, clamped = decoder.enlarge(low, 40), low.clamp(-1, 1)
    for i, j in [(10, 11), (17, 20), (28, 29), (14, 27)]:
        y, x = (i + 0.5) / 4 - 0.5, (j + 0.5) / 4 - 0.5
        want = sum(cubic(y - u) * cubic(x - v) * clamped[0, 0, u, v]
                   for u in range(10) for v in range(10))
        assert abs(got[0, 0, i, j] - want) < 1e-9, "is it clamped first, and antialias=True?"


def test_both_crops_show_the_same_window():
    high = torch.randn(64, 3, 48, 32).double()
    low = torch.nn.functional.avg_pool2d(high, 4)
    high_crop, low_crop = decoder.crop_pair(high, low, 16, torch.Generator().manual_seed(1))
    assert high_crop.shape == (64, 3, 16, 16) and low_crop.shape == (64, 3, 4, 4)
    error = (decoder.shrink(high_crop, 4) - low_crop).abs().max()
    assert error < 1e-12, f"off by {error}; is the corner a multiple of 4, the same in both?"


def test_every_example_has_its_own_window_and_every_corner_is_reached():
    number = torch.arange(8 * 8.0).view(1, 1, 8, 8).expand(2000, 1, 8, 8)    # pixel = its address
    high = number.repeat_interleave(4, 2).repeat_interleave(4, 3)
    corner = decoder.crop_pair(high, number, 8)[1][:, 0, 0, 0].tolist()
    want = {8.0 * i + j for i in range(7) for j in range(7)}
    assert set(corner) == want, "2000 windows should start at all 49 places, and nowhere else"
    again = [decoder.crop_pair(high, number, 8, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0]), "the generator should decide the windows"


@pytest.mark.parametrize("crop", [10, 36])
def test_a_crop_that_has_no_low_res_twin_is_refused(crop):
    high, low = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 8, 8)
    for pair in ((high, low), (low, high)):
        with pytest.raises(ValueError, match="a multiple of k"):
            decoder.crop_pair(*pair, crop)


# ---- blur ----

@pytest.mark.parametrize("sigma, size", [(0.6, 3), (1.3, 7)])
def test_the_blur_of_a_dot_is_a_gaussian_that_sums_to_one(sigma, size):
    dot, r = torch.zeros(1, 3, 15, 15).double(), size // 2
    dot[..., 7, 7] = 1
    want = torch.zeros(15, 15).double()
    for dy in range(-r, r + 1):
        for dx in range(-r, r + 1):
            want[7 + dy, 7 + dx] = math.exp(-(dy ** 2 + dx ** 2) / (2 * sigma ** 2))
    got = decoder.gaussian_blur(dot, sigma, size)
    assert torch.allclose(got, (want / want.sum()).expand(1, 3, 15, 15), atol=1e-12)


def test_the_default_blur_is_the_papers():
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(decoder.gaussian_blur(x), decoder.gaussian_blur(x, sigma=0.6, kernel=3))


def test_blur_keeps_a_flat_picture_flat_and_mirrors_at_the_edges():
    flat = torch.full((2, 3, 9, 9), 0.37).double()
    assert torch.allclose(decoder.gaussian_blur(flat), flat, atol=1e-12), "do the edges go dark?"
    x = torch.randn(1, 3, 9, 9).double()
    framed = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect"))
    inside = decoder.gaussian_blur(framed)[:, :, 1:-1, 1:-1]
    assert torch.allclose(decoder.gaussian_blur(x), inside, atol=1e-12)


def test_blur_mixes_neither_examples_nor_channels():
    x = torch.randn(3, 3, 3, 8, requires_grad=True)               # equal sizes: bugs hide there
    grad, = torch.autograd.grad(decoder.gaussian_blur(x)[1, 2].pow(2).sum(), x)
    touched = grad.abs().sum((2, 3)).nonzero().tolist()
    assert touched == [[1, 2]], f"example 1, channel 2 depends on {touched}"


# ---- BSR ----

def test_degrading_gives_a_quarter_of_the_side_in_range_and_leaves_its_input_alone(shapes):
    before = shapes.clone()
    for number in range(20):
        low = degrade(shapes, number)
        assert low.shape == (3, 64, 64) and low.dtype == torch.float32
        assert low.min() >= -1 and low.max() <= 1
        assert low.min() < -0.7 and low.max() > 0.9, "was [-1, 1] turned into another range?"
    assert torch.equal(shapes, before), "the caller's picture was changed"
    assert degrade(torch.zeros(3, 64, 96), 0).shape == (3, 16, 24)


def test_the_rng_decides_everything(shapes):
    torch.manual_seed(1)
    first = degrade(shapes, 5)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, degrade(shapes, 5)), "some draw does not come from rng"
    rng = np.random.default_rng(5)
    twice = [decoder.bsr_degrade(shapes, rng) for _ in range(2)]
    assert torch.equal(twice[0], first)
    assert not torch.equal(twice[1], first), "two pictures in a row got the same damage"


def test_a_flat_picture_keeps_its_mean_colour():
    colour = torch.tensor([0.6, -0.2, -0.5])
    for number in range(20):
        low = degrade(colour[:, None, None].expand(3, 128, 128), number)
        error = (low.mean((1, 2)) - colour).abs().max()
        assert error < 4 / 127.5, f"colour moved by {error}; are R and B swapped, or edges black?"


def test_the_damage_is_mild_but_there(shapes):
    clean = decoder.shrink(shapes[None], 64)[0]
    rms = torch.stack([(degrade(shapes, number) - clean).pow(2).mean().sqrt()
                       for number in range(40)])
    assert 0.02 < rms.median() < 0.2, f"median error {rms.median():.3f} of a range of 2"
    assert len(set(rms.tolist())) == 40, "every seed should do its own damage"


def centre_of_mass(x):
    """Of a light thing on black, x (3, H, W): (y, x) in units of the side."""
    light = (x.double().mean(0) + 0.7).relu()                     # (H, W) without noise on black
    place = (torch.arange(len(light)) + 0.5).double() / len(light)
    return torch.stack([(light.sum(1) * place).sum(), (light.sum(0) * place).sum()]) / light.sum()


def test_nothing_drifts():
    """A half-pixel error would be 0.125 or 0.5 low-res pixels, always to the same side."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    blob = 2 * torch.exp(-((y - 30.3) ** 2 + (x - 91.8) ** 2) / (2 * 7 ** 2)).expand(3, -1, -1) - 1
    drift = 32 * sum(centre_of_mass(degrade(blob, s)) - centre_of_mass(blob) for s in range(150))
    assert (drift / 150).abs().max() < 0.05, f"mean drift {drift / 150} low-res pixels"


@pytest.mark.parametrize("factor", [2, 4])
def test_blur_and_pick_keeps_a_symmetric_picture_symmetric(factor):
    class Draw:                                                   # a rng that takes this branch
        def random(self):
            return 0.9

        def uniform(self, low, high):
            return 0.5 * (low + high)
    x = torch.rand(1, 3, 64, 64).double()
    x = x + x.flip(2)
    x = x + x.flip(3)
    low = decoder.random_downsample(x, factor, Draw())
    assert low.shape == (1, 3, 64 // factor, 64 // factor)
    centre = low[:, :, 6:-6, 6:-6] if factor == 2 else low[:, :, 3:-3, 3:-3]     # edges mirror
    for axis in (2, 3):
        error = (centre - centre.flip(axis)).abs().max()
        assert error < 1e-6, f"asymmetric by {error}; is the kernel shifted to the block's centre?"


def test_a_random_blur_is_a_gaussian_of_an_allowed_size():
    """Measure the kernel's moments on a dot: centre 0, variance at most that of the recipe."""
    dot = torch.zeros(1, 3, 33, 33).double()
    dot[..., 16, 16] = 1
    offset, correlations = torch.arange(-16, 17).double(), []
    for number in range(60):
        k = decoder.random_blur(dot, 4, np.random.default_rng(number))[0, 0]
        y, x = (k.sum(1) * offset).sum(), (k.sum(0) * offset).sum()
        xy = (k * torch.outer(offset, offset)).sum()
        var = (k.sum(1) * offset ** 2).sum(), (k.sum(0) * offset ** 2).sum()
        assert abs(k.sum() - 1) < 1e-12 and k.min() >= 0
        assert not k[:9].any() and not k[:, :9].any(), "the largest kernel is 14 (here 15) wide"
        assert abs(y) < 1e-9 and abs(x) < 1e-9, f"seed {number}: centre ({y}, {x}); even kernel?"
        assert max(var) <= 2, f"seed {number}: variances {var}, at most (4 + 4) / 4"
        correlations.append(xy / (var[0] * var[1]).sqrt().clamp(min=1e-12))
    tilted = (torch.stack(correlations).abs() > 0.05).sum()
    assert 12 <= tilted <= 40, f"{tilted} of 60 blurs are tilted; expected up to about half"


def test_the_noise_has_the_stated_levels_and_kinds():
    grey, kinds = torch.full((1, 3, 64, 64), 0.5), []
    for number in range(200):
        noisy = decoder.random_noise(grey, np.random.default_rng(number))
        noise = 255 * (noisy - grey)[0].flatten(1)
        cov = noise.double().cov()                                # (3, 3)
        if torch.equal(noise[0], noise[1]):
            kinds.append("grey")
        elif (cov - cov[0, 0] * torch.eye(3)).abs().max() < 0.35 and min(
                abs(cov[0, 0] - 1), abs(cov[0, 0] - 4)) < 0.35:
            kinds.append("per channel")
        else:
            kinds.append("correlated")
        assert cov.diag().max() < 4.6, "no noise is above two grey levels"
    share = [kinds.count(kind) / 200 for kind in ("per channel", "grey", "correlated")]
    assert np.allclose(share, [0.4, 0.4, 0.2], atol=0.1), share


@pytest.mark.parametrize("image", [torch.zeros(3, 66, 64), torch.zeros(3, 32, 32),
                                   torch.full((3, 64, 64), 255.0)])
def test_pictures_it_cannot_degrade_are_refused(image):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        degrade(image, 0)
