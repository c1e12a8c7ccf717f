"""Chapter 4, the decoder and its upsamplers.

What starts at zero would let mistakes pass, so the networks under test are `filled` first.
"""
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import decoder
import diffusion
from conftest import filled, rand, seed

T = torch.arange(100, 900, 100)


@pytest.fixture(autouse=True)
def inputs():
    """Eight of each, made anew for every test; captions of 1 to 8 tokens."""
    global X_T, Z_I, IMAGES, TEXT
    X_T, Z_I = rand(8, 3, 8, 8, number=3), F.normalize(rand(8, 8, number=4), dim=1)
    IMAGES, tokens = X_T.clamp(-1, 1), torch.randint(1, 30, (8, 8), generator=seed())
    TEXT = clip.Text(tokens, torch.ones(8, 8).tril() > 0, rand(8, 8, number=1), rand(8, 8, 6))


def same(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol)


def unet_config(**more):
    """Two levels, attention at the lower, a context of width 8."""
    return decoder.UNetConfig(**dict(size=8, channels=32, mults=(1, 2), attention=(4,),
                                     head_channels=16, context_width=8) | more)


def decoder_config(**more):
    return decoder.DecoderConfig(unet_config(attention=(8, 4)), **dict(
        embed_dim=8, vocab_size=30, context=8, text_layers=1, text_heads=2, text_width=6) | more)


def upsampler_config(out=6, **more):
    return decoder.UpsamplerConfig(decoder.UNetConfig(
        size=64, in_channels=6, out_channels=out, channels=32, mults=(1, 1)), **more)


@pytest.fixture
def model():
    model = filled(decoder.Decoder(decoder_config()))
    model.null_image.copy_(rand(8, number=9))
    return model


@pytest.fixture
def upsampler():
    return filled(decoder.Upsampler(upsampler_config()))


# ---------------------------------------------------------------- U-Net
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_a_res_block_line_by_line(scale_shift, resample):
    block = decoder.ResBlock(32, 64, unet_config(scale_shift=scale_shift), resample).double()
    x, emb = rand(2, 32, 4, 6).double(), rand(2, 128).double()
    other = {None: lambda y: y, "down": lambda y: F.avg_pool2d(y, 2),
             "up": lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)}[resample]
    assert same(block(x, emb), block.skip(other(x)), 1e-12), "fresh, it only resamples: zero conv2?"

    filled(block)
    h, e = block.conv1(other(F.silu(block.norm1(x)))), block.emb(emb)[:, :, None, None]
    h = block.norm2(h) * (1 + e[:, :64]) + e[:, 64:] if scale_shift else block.norm2(h + e)
    assert same(block(x, emb), block.skip(other(x)) + block.conv2(F.silu(h)), 1e-12), \
        "resampling before conv1 on both branches; norm2, then times (1 + scale), plus shift?"


def test_blocks_and_the_output_start_at_zero_and_nothing_else_does():
    fresh = decoder.UNet(unet_config())
    zeros = {name.split(".")[-2] for name, p in fresh.named_parameters()
             if p.ndim > 1 and not p.any()}
    assert zeros == {"conv2", "proj", "conv_out"}
    assert not fresh(X_T, 3, None, rand(8, 5, 8)).any(), "conv_out's bias?"


def test_dropout_in_training_only_and_at_the_configured_rate():
    block, inputs = filled(decoder.ResBlock(32, 32, unet_config(dropout=0.3))), []
    block.conv2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x, emb = rand(4, 32, 16, 16), rand(4, 128)
    assert torch.equal(block(x, emb), block(x, emb)), "dropout while sampling"
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb)), "no dropout while training"
    kept = [(h != 0).float().mean() for h in inputs]
    assert kept[0] == 1 and abs(kept[2] - 0.7) < 0.02, "just before conv2, 30 %"


def test_attention_pixel_by_pixel():
    """Loops: a pixel's query against the context's keys, where the mask allows, and all pixels'."""
    layer = filled(decoder.Attention(32, unet_config())).double()
    x, context = rand(2, 32, 2, 3).double(), rand(2, 4, 8).double()
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    got, want, two = layer(x, context, mask), x.clone(), (slice(16), slice(16, 32))
    for b in range(2):
        h = layer.norm(x)[b].flatten(1).T                            # (6, 32), row by row
        q, k, v = layer.qkv(h).split(32, dim=1)
        k_c, v_c = layer.context(context[b][mask[b]]).split(32, dim=1)
        k, v = torch.cat([k_c, k]), torch.cat([v_c, v])
        for i in range(6):
            heads = [(k[:, c] @ q[i, c] / 4).softmax(0) @ v[:, c] for c in two]
            want[b, :, i // 3, i % 3] += layer.proj(torch.cat(heads))
    assert same(got, want, 1e-12), "1 / sqrt(head_channels), context's k and v, mask, pre-norm?"


@pytest.mark.parametrize("attention, expected", [((), "..."), ((8, 4), "xx."), ((2,), "..x")])
def test_attention_is_where_it_was_asked_for_and_in_the_middle(attention, expected):
    unet = decoder.UNet(unet_config(mults=(1, 1, 2), depth=2, attention=attention))
    count = [sum(isinstance(layer, decoder.Attention) for layer in level.modules())
             for level in [*unet.down, *unet.up, unet.mid_attn]]
    at = [x == "x" for x in expected]
    assert count == [2 * x for x in at] + [3 * x for x in reversed(at)] + [any(at)]
    with pytest.raises(ValueError, match="multiple of head_channels"):
        decoder.Attention(96, unet_config(head_channels=64))
    assert decoder.Attention(32, unet_config(context_width=0)).context is None


@pytest.mark.parametrize("t", [7, torch.tensor([3, 900])])
def test_a_unet_is_levels_inside_levels(t):
    """The same network by recursion: a level calls the one below, and gets its own outputs back."""
    unet = filled(decoder.UNet(unet_config(mults=(1, 2, 2), depth=2))).double()
    x, emb, context = rand(2, 3, 8, 8).double(), rand(2, 128).double(), rand(2, 5, 8).double()
    mask, f = torch.tensor([[1, 0, 1, 1, 0]] * 2).bool(), [10000 ** (-k / 16) for k in range(16)]
    e = torch.tensor([[math.cos((i - 1) * w) for w in f] + [math.sin((i - 1) * w) for w in f]
                      for i in torch.as_tensor(t).expand(2).tolist()], dtype=torch.float64)
    first, _, second = unet.time
    e = F.silu(second(F.silu(first(e))) + emb)

    def level(i, h, entered):
        down, up, outputs = unet.down[i], unet.up[2 - i], [entered]
        for res, attention in zip(down.res, down.attn):
            h = attention(res(h, e), context, mask)
            outputs.append(h)
        if i == 2:
            h = unet.mid_res2(unet.mid_attn(unet.mid_res1(h, e), context, mask), e)
        else:
            h = down.resample(h, e)
            assert h.shape[2:] == (4 // 2 ** i, 4 // 2 ** i), "each level has half the side"
            h = unet.up[1 - i].resample(level(i + 1, h, h), e)
        for res, attention, skip in zip(up.res, up.attn, reversed(outputs)):
            h = attention(res(torch.cat([h, skip], 1), e), context, mask)
        return h

    h = unet.conv_in(x)
    want = unet.conv_out(F.silu(unet.norm_out(level(0, h, h))))
    assert same(unet(x, t, emb, context, mask), want, 1e-4), "t - 1; skips last first, behind h?"


# ---------------------------------------------------------------- decoder
@pytest.mark.parametrize("text_layers, words", [(1, "tokens"), (0, "states")])
def test_the_embedding_enters_twice_and_the_caption_too(text_layers, words):
    model = filled(decoder.Decoder(decoder_config(text_layers=text_layers)))
    emb, context, mask = model.condition(Z_I, TEXT)
    states, tokens = model.text(getattr(TEXT, words), TEXT.mask), model.image_tokens(Z_I)
    assert same(emb, model.image_emb(Z_I) + model.text_emb(states[:, -1])), \
        "added to the timestep embedding, with the caption's *last* position"
    want = torch.cat([*(tokens[:, None, 8 * i:8 * i + 8] for i in range(4)), states], dim=1)
    assert same(context, want) and mask is None, "four different tokens of z_i, then the caption's"
    out = model(X_T, 300, Z_I, TEXT)
    assert out.shape == (8, 6, 8, 8) and same(out, model.unet(X_T, 300, emb, context))
    assert torch.equal(model(X_T, 300, None, None, (emb, context, mask)), out), "known already"


def test_rows_of_a_batch_are_independent(model):
    alone = [model(X_T[i:i + 1], T[i:i + 1], Z_I[i:i + 1], TEXT.map(lambda x: x[i:i + 1]))
             for i in range(8)]
    assert same(torch.cat(alone), model(X_T, T, Z_I, TEXT))


def test_guidance_runs_the_null_condition_and_then_the_true_one(model, monkeypatch):
    """Null: null_image *and* no caption. Only the prediction is guided, not its variance."""
    null = model.null_image.expand(8, -1)
    uncond, cond = model(X_T, 300, null, TEXT.null()), model(X_T, 300, Z_I, TEXT)
    seen, condition = [], model.condition
    monkeypatch.setattr(model, "condition", lambda *given: seen.append(given) or condition(*given))
    for scale in (0.0, 1.0, 1 + 1e-9, 4.0):
        out = model.denoiser(Z_I, TEXT, scale)(X_T, 300)
        assert same(out[:, :3], diffusion.guide(uncond[:, :3], cond[:, :3], scale), 1e-4)
        assert same(out[:, 3:], cond[:, 3:]), "the variance is not guided"
    network, count = model.denoiser(Z_I, TEXT, 4.0), len(seen)
    network(X_T, 300), network(X_T, 2)
    assert len(seen) == count, "the condition is the same at every step: computed once"
    z, both = seen[-1]
    assert torch.equal(z, torch.cat([null, Z_I])), "null first, in order"
    assert not both.mask[:8].any() and torch.equal(both.mask[8:], TEXT.mask)


def test_guidance_in_an_interval_is_the_plain_network_at_small_t(model):
    network, rows = model.denoiser(Z_I, TEXT, 4.0, guidance_above=300), []
    model.unet.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    for t, scale in [(301, 4.0), (300, 1.0), (1, 1.0)]:
        assert torch.equal(network(X_T, t), model.denoiser(Z_I, TEXT, scale)(X_T, t)), f"t = {t}"
    assert rows[::2] == [16, 8, 8], "half the work below"
    a, b = (model.sample(Z_I, TEXT, 4, 4.0, seed(), guidance_above=above) for above in (0, 1000))
    assert torch.equal(b, model.sample(Z_I, TEXT, 4, 1.0, seed())) and not same(a, b)


def test_refining_averages_predictions_from_new_noise_at_three_falling_timesteps(model):
    x, generator, ab = X_T.clamp(-1, 1), seed(4), model.alphabar.float()
    got = model.refine(x, Z_I, TEXT, 3, seed(4))
    for t in (300, 200, 100):
        eps = torch.randn(24, 3, 8, 8, generator=generator)
        rows = []
        for i, row in enumerate(x):
            condition = Z_I[i:i + 1].expand(3, -1), TEXT.map(lambda v: v[[i] * 3])
            x_t = ab[t].sqrt() * row + (1 - ab[t]).sqrt() * eps[3 * i:3 * i + 3]
            out = model(x_t, t, *condition)[:, :3]
            x0 = (x_t - (1 - ab[t]).sqrt() * out) / ab[t].sqrt()
            rows.append(x0.clamp(-1, 1).mean(0))
        x = torch.stack(rows)
    assert same(got, x, 1e-5), "own condition, own noise, clamp, mean"
    assert model.refine(X_T, Z_I, TEXT, 0) is X_T, "0: as it is"


def test_refining_takes_the_error_away_that_the_predictions_do_not_share(model, monkeypatch):
    """A network that errs by 0.1 times fresh noise: the mean of n predictions errs by 1/sqrt(n)."""
    x, errors = torch.full((8, 3, 8, 8), 0.25), []
    monkeypatch.setattr(diffusion, "to_x0", lambda ab, out, x_t, t, predicts:
                        0.25 + 0.1 * torch.randn(x_t.shape, generator=seed(t)))
    for draws in (4, 64):
        errors.append(float((model.refine(x, Z_I, TEXT, draws, seed()) - x).square().mean().sqrt()))
    assert abs(errors[0] - 0.05) < 0.004 and abs(errors[1] - 0.0125) < 0.001, errors


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_the_loss_is_the_error_of_the_prediction_that_sampling_uses(
        model, upsampler, predicts, monkeypatch):
    """Training and sampling are one function: no other timestep, order or scale."""
    model.config.predicts = upsampler.config.predicts = predicts
    eps, ab, low = rand(8, 3, 8, 8), model.alphabar[T].view(8, 1, 1, 1), rand(8, 3, 2, 2)
    x_t = (ab.sqrt() * IMAGES + (1 - ab).sqrt() * eps).float()
    want = {"eps": eps, "x0": IMAGES, "v": ab.sqrt() * eps - (1 - ab).sqrt() * IMAGES}[predicts]
    out = model.denoiser(Z_I, TEXT)(x_t, T)[:, :3]
    up = upsampler(x_t, T, decoder.enlarge(low, 8))[:, :3]
    monkeypatch.setattr(diffusion, "vlb_loss", lambda *_: 0.0)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.ones(shape))       # drop nothing
    for got, out in ((model.loss(IMAGES, Z_I, TEXT, T), out), (upsampler.loss(IMAGES, low, T), up)):
        assert same(got, (out - want).pow(2).mean((1, 2, 3)).float())


def test_training_drops_embeddings_and_captions_independently(model, monkeypatch):
    assert decoder.DecoderConfig().drop_text == 0.5, "the paper's"
    model.config.drop_text = 0.3
    seen, z_i, x0 = [], torch.ones(4000, 8), torch.zeros(4000, 3, 2, 2)
    monkeypatch.setattr(model, "forward", lambda x_t, *given: seen.append(given)
                        or torch.zeros(4000, 6, 2, 2))
    many = TEXT.map(lambda x: x[-1:].expand(4000, *x.shape[1:]))
    model.loss(x0, z_i, many), model.loss(x0, z_i, many, torch.full((4000,), 7))
    (t, z_i, dropped), (given_t, *_) = seen
    no_image, no_text = (z_i == model.null_image).all(1), ~dropped.mask.any(1)
    rates = [x.float().mean().item() for x in (no_image, no_text, no_image & no_text)]
    assert np.allclose(rates, [0.1, 0.3, 0.03], atol=0.02), f"dropped: {rates}"
    assert (z_i[~no_image] == 1).all() and torch.equal(dropped.mask[~no_text], many.mask[~no_text])
    assert t.min() >= 1 and t.max() <= 1000 and abs(t.float().mean() - 500.5) < 20
    assert (given_t == 7).all(), "timesteps that are given are used"


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_sampling_is_ddpm_with_the_learned_variance_and_clamped_x0(model, predicts):
    model.config.predicts, g, before = predicts, seed(1), [x.clone() for x in (Z_I, *TEXT)]
    want = diffusion.sample(model.denoiser(Z_I, TEXT, 2.0), model.alphabar, torch.randn(
        8, 3, 8, 8, generator=g), diffusion.spaced_timesteps(1000, 3), predicts=predicts, clamp=1.0,
        variance="learned", generator=g)
    got, other = (model.sample(Z_I, TEXT, 3, 2.0, seed(number)) for number in (1, 2))
    assert torch.equal(got, want) and got.abs().max() <= 1 and not same(got, other)
    each = model.sample(Z_I, TEXT, 3, 2.0, [seed(number) for number in range(8)])
    alone = model.sample(Z_I[5:6], TEXT.map(lambda x: x[5:6]), 3, 2.0, seed(5))
    assert same(each[5:6], alone, 1e-4), "one generator for each image"
    model.loss(got, Z_I, TEXT)
    assert all(torch.equal(x, y) for x, y in zip(before, (Z_I, *TEXT))), "inputs are changed"


def test_a_decoder_without_a_variance_samples_with_the_small_one():
    config = decoder_config()
    config.unet.out_channels, g = 3, seed(1)
    model, x_T = filled(decoder.Decoder(config)), torch.randn(8, 3, 8, 8, generator=g)
    want = diffusion.sample(model.denoiser(Z_I, TEXT), model.alphabar, x_T,
                            diffusion.spaced_timesteps(1000, 3), clamp=1.0, generator=g)
    assert torch.equal(model.sample(Z_I, TEXT, 3, generator=seed(1)), want)


def test_inpainting_keeps_the_known_pixels_and_draws_the_others(model):
    mask, calls = (torch.arange(8) < 4).float().expand(8, 1, 8, 8), []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    a, b, c = (model.sample(Z_I, TEXT, 3, 2.0, seed(number), known=IMAGES, mask=mask, resample=2)
               for number in (1, 1, 2))
    assert same(a[..., :4], IMAGES[..., :4]) and a.abs().max() <= 1, "mask 1 is known"
    assert torch.equal(a, b) and not same(a, c) and not same(a[..., 4:], IMAGES[..., 4:])
    assert len(calls) == 3 * 5, "of 3 steps the first two are made `resample` = 2 times"


def test_all_runs_where_the_weights_are(model, upsampler):
    """On the device "meta", which stands for a GPU: a tensor made on the CPU does not fit there."""
    x, z_i, text = IMAGES.to("meta"), Z_I.to("meta"), TEXT.map(lambda x: x.to("meta"))
    model.to("meta"), upsampler.to("meta")
    assert model.loss(x, z_i, text, T).is_meta and model.sample(z_i, text, 2, 2.0).is_meta
    assert upsampler.sample(x, 2).is_meta and decoder.gaussian_blur(x).is_meta


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_inversion_and_its_way_back(model, predicts):
    """A fresh decoder predicts 0. eps = 0 leaves the signal, v = 0 both: a turn by an angle."""
    fresh = decoder.Decoder(decoder_config(predicts=predicts))
    ab, angle, steps = fresh.alphabar, fresh.alphabar.sqrt().acos(), fresh.ddim_timesteps(5)

    def along(path):
        pairs = torch.tensor([*zip(path, path[1:])]).T
        factors = {"eps": (ab[pairs[1]] / ab[pairs[0]]).sqrt(), "v": angle[pairs].diff(dim=0).cos()}
        return factors[predicts].prod().float()
    x_T = fresh.invert(IMAGES, Z_I, TEXT, 5)
    assert steps[0] == 1 and steps[-1] == 997 and same(x_T, IMAGES * along(steps))
    back = fresh.decode_latent(Z_I, x_T, TEXT, 5)
    assert same(back, (x_T * along([*steps[::-1], 0])).clamp(-1, 1))
    fresh.config.T = 100
    assert fresh.ddim_timesteps(10)[::9] == [1, 99], "up to T - 0.3 %, at most T - 1"
    a, b, c, d, e = (model.decode_latent(Z_I, X_T, TEXT, 5, eta, generator=seed(number))
                     for eta, number in [(0.0, 1), (0.0, 2), (0.5, 1), (0.5, 2), (0.5, 1)])
    assert torch.equal(a, b) and torch.equal(c, e) and not same(c, d), "without eta x_T decides"


def test_guided_ddim_clamps_x0_and_plain_ddim_does_not(model, monkeypatch):
    """A denoiser that predicts x0 = 5, but at the last step a tenth of its input."""
    def denoise(x_t, t):
        x0 = torch.full_like(x_t, 5.0) if t > 1 else x_t / 10
        return diffusion.to_eps(model.alphabar, x0, x_t, t).float()
    monkeypatch.setattr(model, "denoiser", lambda *_: denoise)
    for guidance, x0 in ((1.0, 5.0), (8.0, 1.0)):
        x = model.decode_latent(Z_I, torch.zeros(8, 3, 8, 8), TEXT, 5, guidance=guidance)
        assert same(x, torch.full_like(x, x0 / 10), 0.01), f"guidance {guidance}"


@pytest.mark.parametrize("make, given", [
    (lambda: decoder.Decoder(decoder.DecoderConfig()),
     (torch.ones(2, 64), clip.Text(torch.ones(2, 20).long(), torch.ones(2, 20) > 0, None, None))),
    (lambda: decoder.Upsampler(decoder.UpsamplerConfig()), (torch.zeros(2, 3, 16, 16),))])
def test_the_schedule_stays_on_the_cpu_in_float64_and_half_precision_samples_float32(make, given):
    with torch.device("meta"):
        empty = make().half()
    assert empty.alphabar.device.type == "cpu" and empty.alphabar.dtype == torch.float64
    assert empty.unet.conv_in.weight.is_meta and "alphabar" not in empty.state_dict()
    x = make().bfloat16().sample(*given, 2)
    assert x.dtype == torch.float32 and x.isfinite().all()


# ---------------------------------------------------------------- upsamplers
def test_an_upsampler_is_a_unet_of_both_images_enlarged_alike_in_training(upsampler, monkeypatch):
    low, seen, real = 2 * rand(2, 3, 4, 4), [], upsampler.forward
    x, large, t = rand(2, 3, 16, 16), decoder.enlarge(low.clamp(-1, 1), 16), torch.tensor([5, 500])
    assert not any(isinstance(m, decoder.Attention) for m in upsampler.modules())
    out = upsampler(x, t, large)
    assert same(out, upsampler.unet(torch.cat([x, large], 1), t)), "the noisy image comes first"
    assert same(upsampler(x[1:], 500, large[1:]), out[1:]), "rows are not independent"

    monkeypatch.setattr(upsampler, "forward", lambda *given: seen.append(given) or real(*given))
    upsampler.loss(torch.zeros(2, 3, 16, 16), low), upsampler.sample(low, steps=2)
    assert [t for _, t, _ in seen[1:]] == [1000, 1] and all(same(x, large) for _, _, x in seen)


@pytest.mark.parametrize("out", [3, 6])
def test_a_fresh_residual_upsampler_enlarges_bicubically_in_any_number_of_steps(out, monkeypatch):
    model = decoder.Upsampler(upsampler_config(out, predicts="x0", residual=True)).eval()
    low, x0 = rand(2, 3, 4, 4).clamp(-1, 1), rand(2, 3, 16, 16, number=1)
    large = decoder.enlarge(low, 16)
    for steps in (1, 2, 9, 27):
        assert same(model.sample(low, steps), large.clamp(-1, 1), 1e-4), f"{steps} steps"
    monkeypatch.setattr(diffusion, "vlb_loss", lambda *_: 0.0)
    assert same(model.loss(x0, low), (x0 - large).pow(2).mean((1, 2, 3))), "x0 = large + output"
    raw = filled(model).unet(torch.cat([x0, large], 1), 9)
    assert same(model(x0, 9, large), torch.cat([raw[:, :3] + large, raw[:, 3:]], 1))
    with pytest.raises(ValueError, match="to predict x0, got 'eps'"):
        decoder.Upsampler(upsampler_config(residual=True))


def test_upsampling_is_ddim_stays_in_range_and_leaves_its_input_alone(upsampler):
    low, g, first, upsampler.config.predicts = rand(2, 3, 4, 4).clamp(-1, 1), seed(1), seed(1), "v"
    before, a, b = low.clone(), upsampler.sample(low, 4, g), upsampler.sample(low, 4, seed(1))
    assert a.shape == (2, 3, 16, 16) and a.abs().max() <= 1 and torch.equal(a, b)
    assert torch.equal(low, before)
    want = diffusion.sample(
        lambda x, t: upsampler(x, t, decoder.enlarge(low, 16)), upsampler.alphabar, torch.randn(
            2, 3, 16, 16, generator=first), [1, 334, 667, 1000], predicts="v", clamp=1.0, eta=0.0)
    upsampler.eta = None                                     # DDPM, as a subclass may have it
    c, d = (upsampler.sample(low, 4, seed(1)) for _ in range(2))
    assert torch.equal(a, want) and torch.equal(c, d) and not same(a, c)
    assert torch.equal(first.get_state(), g.get_state()), "eta = 0 draws x_T and nothing more"
    for steps, want in [(27, diffusion.glide27_timesteps(1000)), (20, list(range(1, 1000, 50))),
                        (15, list(range(1, 1000, 67))), (4, [1, 334, 667, 1000]), (1, [1000]),
                        *((n, diffusion.spaced_timesteps(1000, n)) for n in (10, 999)),
                        (1000, list(range(1, 1001)))]:
        assert upsampler.timesteps(steps) == want, f"{steps} steps"
    upsampler.config.unet.mults = (1, 1, 1, 1)       # 4 * 5 pixels: 20, 10, 5, and no half of it
    for shape in ((1, 3, 16, 24), (1, 3, 5, 5)):
        with pytest.raises(ValueError, match="expected squares, 4 sides a multiple of 8"):
            upsampler.sample(torch.zeros(shape), 1)


def test_training_crops_are_quarters_shrunk_and_half_of_them_blurred(upsampler):
    high = rand(400, 3, 64, 64).clamp(-1, 1)
    x0, low = upsampler.prepare(high)
    assert x0.shape == (400, 3, 16, 16) and low.shape == (400, 3, 4, 4)
    sharp = (decoder.shrink(x0, 4) - low).abs().amax((1, 2, 3)) < 1e-6
    assert 0.4 < sharp.float().mean() < 0.6, f"{sharp.float().mean():.0%} of the crops are sharp"
    i = int(sharp.int().argmin())                    # an edge of a crop is no edge of the image
    windows = decoder.gaussian_blur(decoder.shrink(high[i:i + 1], 16))[0].unfold(1, 4, 1)
    off = (windows.unfold(2, 4, 1) - low[i][:, None, None]).abs().amax((0, 3, 4))      # (13, 13)
    assert off.min() < 1e-6, "blurred crops are crops of blurred images: nothing mirrored inside"

    flat = torch.tensor([-1.0, 1]).view(2, 1, 1, 1).expand(2, 3, 64, 64)
    for crops in upsampler.prepare(flat, crops=3):
        assert crops[:, 0, 0, 0].sign().tolist() == [-1, -1, -1, 1, 1, 1], "crops of another image"
    x0, _ = upsampler.prepare(high[:1], crops=9)
    assert len({tuple(x.flatten().tolist()) for x in x0}) > 3, "every crop has its own window"


def test_the_second_upsampler_trains_on_bsr_degradations(upsampler, monkeypatch):
    upsampler.config.unet.size, upsampler.config.degradation = 256, "bsr"
    high = F.interpolate(rand(2, 3, 8, 8), 256, mode="bicubic").clamp(-1, 1)
    x0, low = upsampler.prepare(high)
    assert x0.shape == (2, 3, 64, 64) and low.shape == (2, 3, 16, 16) and low.abs().max() <= 1
    difference = (decoder.shrink(x0, 16) - low).abs().mean()
    assert 0.003 < difference < 0.3, f"{difference}: degraded, but the same window"
    assert not torch.equal(low, upsampler.prepare(high)[1]), "each batch its own degradation"
    a, b = (upsampler.prepare(high)[1] for _ in range(2) if torch.manual_seed(7))
    assert torch.equal(a, b), "torch's seed decides"
    monkeypatch.setattr(decoder, "bsr_degrade", lambda x, rng: decoder.shrink(x[None], 64)[0] + 1)
    assert same(upsampler.prepare(high, crops=0)[1], decoder.shrink(high, 64) + 1), "BSR, not blur"


def test_every_sampler_names_its_bar_and_takes_the_papers_steps(model, upsampler, monkeypatch):
    bars, rows = [], []
    model.unet.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    monkeypatch.setattr(diffusion, "tqdm", lambda steps, desc, **_: bars.append((desc, len(steps)))
                        or steps[-1:])                                      # takes only the last
    model.sample(Z_I, TEXT, progress="sample"), model.invert(X_T, Z_I, TEXT, progress="invert")
    model.sample(Z_I, TEXT, known=IMAGES, mask=IMAGES[:, :1] > 0, progress="inpaint")
    model.decode_latent(Z_I, X_T, TEXT, progress="decode")
    upsampler.sample(IMAGES, progress="enlarge")
    assert bars == [("sample", 250), ("invert", 249), ("inpaint", 250), ("decode", 250),
                    ("enlarge", 27)] and {*rows} == {8}, "without guidance: B rows"
    fresh = decoder.Decoder(decoder_config())
    assert same(fresh.scale(3 * Z_I), Z_I) and not fresh.null_image.any()


# ---------------------------------------------------------------- degradations
def test_shrinking_takes_the_mean_of_every_block():
    x, want = rand(2, 3, 12, 12).double(), torch.zeros(2, 3, 3, 3).double()
    for i, j in np.ndindex(12, 12):
        want[:, :, i // 4, j // 4] += x[:, :, i, j] / 16
    assert same(decoder.shrink(x, 3), want, 1e-12)
    with pytest.raises(ValueError, match=r"k \* 5, got 12"):
        decoder.shrink(x, 5)


def test_enlarging_is_catmull_rom_after_a_clamp():
    """Cubic with a = -1/2 through four neighbours, along both axes, edges left out."""
    low = 2 * rand(1, 1, 10, 10).double()

    def cubic(d, a=-0.5):
        d = abs(d)
        return ((a + 2) * d ** 3 - (a + 3) * d ** 2 + 1 if d < 1 else
                a * (d ** 3 - 5 * d ** 2 + 8 * d - 4) if d < 2 else 0.0)
    got, clamped = decoder.enlarge(low, 40), low.clamp(-1, 1)
    for i, j in [(10, 11), (17, 20), (28, 29), (14, 27)]:
        y, x = (i + 0.5) / 4 - 0.5, (j + 0.5) / 4 - 0.5
        want = sum(cubic(y - u) * cubic(x - v) * clamped[0, 0, u, v] for u, v in np.ndindex(10, 10))
        assert abs(got[0, 0, i, j] - want) < 1e-9, "is it clamped first, and antialias=True?"


def test_both_crops_are_the_same_window_and_every_window_is_reached():
    number = torch.arange(8 * 6.0).view(1, 1, 8, 6).expand(2000, 1, 8, 6)    # pixel = its address
    high = number.repeat_interleave(4, 2).repeat_interleave(4, 3)
    high_crop, low_crop = decoder.crop_pair(high, number, 8)
    assert high_crop.shape == (2000, 1, 8, 8) and low_crop.shape == (2000, 1, 2, 2)
    assert torch.equal(high_crop, low_crop.repeat_interleave(4, 2).repeat_interleave(4, 3)), \
        "is the corner a multiple of 4, and the same in both?"
    want = {6.0 * i + j for i in range(7) for j in range(5)}
    assert set(low_crop[:, 0, 0, 0].tolist()) == want, "all 35 corners, and nothing else"
    assert decoder.crop_pair(high, number, 24)[1].shape == (2000, 1, 6, 6), "the whole width fits"
    for pair in ((high, number, 10), (high, number, 36), (number, high, 8)):
        with pytest.raises(ValueError, match="a multiple of k"):
            decoder.crop_pair(*pair)


@pytest.mark.parametrize("more, sigma, r", [({}, 0.6, 1), ({"sigma": 1.3, "radius": 3}, 1.3, 3)])
def test_a_blur_is_a_gaussian_that_mirrors_at_the_edges_and_mixes_no_channels(more, sigma, r):
    """out = sum over (dy, dx) of weight(dy, dx) * neighbour, from an image framed by its mirror."""
    x = rand(3, 3, 9, 9).double().requires_grad_()
    framed = torch.from_numpy(np.pad(x.detach(), [(0, 0), (0, 0), (r, r), (r, r)], mode="reflect"))
    want, total = torch.zeros(3, 3, 9, 9).double(), 0.0
    for dy, dx in np.ndindex(2 * r + 1, 2 * r + 1):
        weight = math.exp(-((dy - r) ** 2 + (dx - r) ** 2) / (2 * sigma ** 2))
        want += weight * framed[:, :, dy:dy + 9, dx:dx + 9]
        total += weight
    got = decoder.gaussian_blur(x, **more)
    assert same(got[:, :, r:-r, r:-r], (want / total)[:, :, r:-r, r:-r], 1e-12), \
        "sigma is a std; 3 x 3; weights sum to 1"
    assert same(got, want / total, 1e-12), "do the edges go dark?"
    grad, = torch.autograd.grad(got[1, 2].pow(2).sum(), x)
    assert grad.abs().sum((2, 3)).nonzero().tolist() == [[1, 2]], "rows or channels mixed"


# ---------------------------------------------------------------- BSR
class Script:
    """A random generator that draws what it is given; `asked` is what it was asked for."""
    def __init__(self, *draws):
        self.draws, self.asked = list(draws), []

    def __getattr__(self, name):
        return lambda *given, **_: self.asked.append((name, *given)) or self.draws.pop(0)


@pytest.mark.parametrize("draws, want", [
    ((0.25, ["fit", "noise", "downsample", "jpeg", "blur"], 0.9),
     [("downsample", 4), ("noise",), ("resize", (16, 24)), ("blur", 4), ("jpeg",)]),
    ((0.24, 0.49, ["jpeg", "blur", "downsample", "noise", "fit"], 0.89),
     [("resize", (32, 48)), ("jpeg",), ("blur", 2), ("downsample", 2), ("noise",),
      ("resize", (16, 24)), ("jpeg",)]),
    ((0.24, 0.5, ["blur", "fit", "jpeg", "noise", "downsample"], 0.9),
     [("blur", 2), ("downsample", 2), ("noise",), ("resize", (16, 24)), ("jpeg",)])])
def test_bsr_takes_its_steps_in_the_order_drawn(draws, want, monkeypatch):
    """A quarter is halved first; the resize to a fixed size comes after the other, JPEG last."""
    image, steps = rand(3, 64, 96).sign().double(), []
    for name in ("blur", "downsample", "resize", "noise", "jpeg"):
        def spy(x, *given, name=name):
            steps.append((name, *given[:-1]))
            return F.interpolate(x, given[0]) if name == "resize" else x
        monkeypatch.setattr(decoder, f"random_{name}", spy)
    got, x = decoder.bsr_degrade(image, Script(*draws)), (image[None].float() + 1) / 2
    assert steps == want, "blur, downsample, fit, noise, JPEG; halved images count half"
    if draws[1] == 0.5:
        x = F.interpolate(x, (32, 48), mode="bicubic", antialias=True).clamp(0, 1)
    assert got.dtype == torch.float32 and same(got, 2 * F.interpolate(x, (16, 24))[0] - 1), "range"
    for wrong in (image[:, :62], image[:, :, :66], image[:, :60], image[..., :60], 1.01 * image):
        with pytest.raises(ValueError, match="expected sides 4 k >= 64"):
            decoder.bsr_degrade(wrong, Script())


@pytest.mark.parametrize("factor, draws, radius, angle, along, across", [
    (4, (0.49, 14, 0.1, np.array([0.2, 0.7])), 7, 0.1 * math.pi, 1.6, 0.6),
    (2, (0.49, 5, 0.8, np.array([0.2, 0.7])), 2, 0.8 * math.pi, 1.2, 0.45),
    (4, (0.5, 7, 0.2), 3, 0.0, 0.56 ** 2, 0.56 ** 2)])
def test_a_random_blur_is_the_gaussian_of_its_draws(factor, draws, radius, angle, along, across):
    """Turned and stretched half of the time: weight exp(-u^2 / 2 along - v^2 / 2 across)."""
    rng, dot, want = Script(*draws), torch.zeros(2, 1, 3, 17, 17).double(), 0.0
    dot[0, ..., 8, 8] = 1
    for dy, dx in np.ndindex(2 * radius + 1, 2 * radius + 1):
        y, x = dy - radius, dx - radius
        u = x * math.cos(angle) + y * math.sin(angle)
        v = y * math.cos(angle) - x * math.sin(angle)
        dot[1, ..., 8 + y, 8 + x] = math.exp(-u ** 2 / (2 * along) - v ** 2 / (2 * across))
    assert same(decoder.random_blur(dot[0], factor, rng), dot[1] / dot[1, 0, 0].sum(), 1e-12), \
        "along and across are variances; of a round blur the std is drawn"
    assert rng.asked == ([("random",), ("integers", 5, 8), ("random",)] if angle == 0 else
                         [("random",), ("integers", 5, 15), ("random",), ("random", 2)])


def test_random_resizes_are_without_antialias_and_the_kept_pixel_is_a_blocks_centre():
    x = 1.5 * rand(1, 3, 64, 96).double()
    for number, mode in enumerate(("bilinear", "bicubic", "area")):
        rng = Script(0.79, 2.5, number)
        want = F.interpolate(x, (25, 38), mode=mode).clamp(0, 1)
        assert same(decoder.random_downsample(x, 4, rng), want, 1e-12), f"{mode}, in [0, 1]"
        assert rng.asked == [("random",), ("uniform", 1, 8), ("integers", 3)]

    # a parabola, blurred, is higher by the variance: i^2 at the centre of each block, + sigma^2
    rng, i = Script(0.8, 1.2), torch.arange(64).double()
    got = decoder.random_downsample((i[:, None] ** 2 + 3 * i ** 2).expand(1, 3, 64, 64), 4, rng)
    y = (4 * torch.arange(16) + 1.5).double() ** 2 + 1.2 ** 2
    want = (y[:, None] + 3 * y)[4:12, 4:12].expand(1, 3, 8, 8)
    assert same(got[..., 4:12, 4:12], want, 1e-8), "sigma is a std; the centre is (factor - 1) / 2"
    assert rng.asked[1][1:] == (0.1, 0.6 * 4) and got.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("level, kind, more", [
    (2, 0.39, ()), (1, 0.79, ()), (1, 0.4, ()), (1, 0.8, (rand(3, 3).numpy(), np.arange(3) / 3))])
def test_noise_has_the_covariance_of_its_kind(level, kind, more):
    n, grey = 1 if kind in (0.4, 0.79) else 3, torch.full((1, 3, 8, 8), 0.5)
    draws = (level, kind, *more, 9 * np.eye(n, 64, dtype=np.float32))      # each source once
    rng, edges = Script(*draws), rand(1, 3, 8, 8).sign().relu()
    noise = decoder.random_noise(grey, rng) - grey
    want = level ** 2 * (np.eye(3) if n == 3 else np.ones((3, 3)))
    if more:
        A = np.linalg.svd(more[0])[0]
        want = 2 ** 2 * A.T @ np.diag(more[1]) @ A
    mix = 255 / 9 * noise[0].flatten(1)[:, :n]
    assert np.allclose(mix @ mix.T, want, atol=1e-3), "levels are stds; D holds variances"
    assert same(decoder.random_noise(edges, Script(*draws)), (edges + noise).clamp(0, 1)), "range"
    asked = [("random", (3, 3)), ("random", 3)] if more else []
    assert rng.asked == [("integers", 1, 3), ("random",), *asked, ("standard_normal", (n, 64))]


def test_jpeg_is_what_a_file_of_that_quality_holds():
    x, rng, file = rand(1, 3, 16, 24).sigmoid(), Script(80), io.BytesIO()
    pixels = np.floor(255 * x[0].permute(1, 2, 0).double().numpy() + 0.5).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    want = torch.from_numpy(np.array(Image.open(file)) / 255).permute(2, 0, 1)[None].float()
    assert torch.equal(decoder.random_jpeg(x, rng), want), "rounded, not cut; RGB, in [0, 1]"
    assert rng.asked == [("integers", 80, 96)]
