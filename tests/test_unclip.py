"""Chapter 5, the whole stack: sampling, section 3, checkpoints, the command line and bad input.

The stack under test is the toy's with as little in it as runs, and with random weights everywhere.
"""
import copy
import dataclasses
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

import clip
import decoder
import diffusion
import prior
import unclip

ROOT = Path(unclip.__file__).parent
CAPTION, OTHER = "a small red circle above a large blue square", "a red circle"
TEXTS = [CAPTION, OTHER, *(f"a {size} {colour} {shape}" for size in ("small", "large") for colour in
                           ("red", "blue", "green") for shape in ("circle", "square"))]


def tiny_config():
    """8 -> 32 -> 128 px, one layer of everything."""
    text = dict(embed_dim=16, context=20, vocab_size=600)
    small = dict(text, width=32, layers=1, heads=1)
    clip_config = clip.CLIPConfig(**text | {"context": 18}, image_size=16, image_width=32,
                                  image_layers=1, image_heads=1, text_width=32, text_layers=1,
                                  text_heads=1)
    unet = decoder.UNetConfig(size=8, channels=16, mults=(1, 1), attention=(4,), head_channels=8,
                              context_width=16, groups=4)
    upsamplers = [decoder.UpsamplerConfig(decoder.UNetConfig(
        size=size, in_channels=6, channels=4, mults=(1,), groups=2), predicts="v")
        for size in (32, 128)]
    return unclip.Config(
        "tiny", clip_config, prior.DiffusionPriorConfig(**small),
        prior.ARPriorConfig(components=8, buckets=16, text_width=32, text_layers=1, text_heads=1,
                            **small),
        decoder.DecoderConfig(unet, text_layers=1, text_heads=1, predicts="v", **text), *upsamplers,
        unclip.Sampling(prior_steps=3, decoder_steps=3, upsampler_steps=(2, 2)))


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    tokenizer = clip.Tokenizer.train(TEXTS, 600)
    config = tiny_config()
    for name in ("clip", "diffusion_prior", "ar_prior", "decoder"):
        getattr(config, name).vocab_size = len(tokenizer)
    model = unclip.build(config)
    for part in model.parts.values():                    # zero-initialised layers would hide a lot
        for w in part.parameters():
            if not w.any():
                torch.nn.init.normal_(w, std=0.05)
    model.tokenizer = tokenizer
    model.words = tuple(sorted({word for text in TEXTS for word in text.split()}))
    return model


@pytest.fixture(scope="module")
def photo():
    """A smooth image with no symmetry, (3, 32, 32)."""
    coarse = torch.rand(1, 3, 4, 4, generator=seed(3)) * 2 - 1
    return unclip.resize(coarse, 32)[0]


def seed(number):
    return torch.Generator().manual_seed(number)


def draw(model, captions=(CAPTION,), number=0, **options):
    return model.sample(captions, progress=False, **{"generator": seed(number)} | options)


def same(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)


# ---------------------------------------------------------------- caption -> image


@pytest.mark.parametrize("which", ["diffusion", "ar"])
def test_a_caption_becomes_an_image_in_range(stack, which):
    x = draw(stack, [CAPTION, OTHER], prior=which)
    assert x.shape == (2, 3, 128, 128) and x.isfinite().all() and x.abs().max() <= 1
    assert torch.equal(draw(stack, CAPTION, prior=which), draw(stack, prior=which)), "one string"


@pytest.mark.parametrize("which", ["diffusion", "ar"])
def test_a_seed_is_an_image(stack, which):
    x = draw(stack, prior=which)
    assert torch.equal(x, draw(stack, prior=which)), "equal seeds must give equal images"
    assert not same(x, draw(stack, number=1, prior=which)), "is the seed ignored?"
    assert not same(x, draw(stack, [OTHER], prior=which)), "is the caption ignored?"


def test_the_stages_draw_in_the_documented_order(stack, monkeypatch):
    """prior, decoder, upsamplers; each its first noise and one draw per step that adds noise."""
    sizes, randn = [], torch.randn

    def counting(*shape, **options):
        sizes.append(tuple(torch.empty(*shape, device="meta").shape))     # sizes, or one tuple
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", counting)
    draw(stack)
    assert sizes == [(2, 16)] * 3 + [(1, 3, 8, 8)] * 3 + [(1, 3, 32, 32), (1, 3, 128, 128)], \
        "2 candidates; a start for each stage, one draw per step but the last, none for DDIM"


@pytest.mark.parametrize("options", [
    {"prior": "ar", "rerank": 2}, {"prior": "diffusion", "rerank": 2, "candidates": 3}])
def test_with_a_generator_each_an_image_does_not_depend_on_the_others(stack, options):
    captions = [CAPTION, OTHER, CAPTION, OTHER]
    batch = draw(stack, captions, generator=[seed(s) for s in (7, 8, 9, 10)], **options)
    for row, number in ((2, 9), (3, 10)):
        alone = draw(stack, [captions[row]], generator=[seed(number)], **options)
        assert same(batch[row], alone[0]), "the rows of a generator must be one image's own"
        assert same(alone, draw(stack, [captions[row]], number, **options)), "a list of one is it"
    assert not same(batch[0], batch[2]), "equal captions, other seeds"


def test_every_image_of_a_batch_has_its_own_caption_and_embedding(stack):
    text = stack.encode_text([CAPTION, OTHER])
    z = clip.unit(torch.randn(2, 16, generator=seed(1)))
    a = stack.sample_decoder(z, text, generator=seed(0))
    b = stack.sample_decoder(z * torch.tensor([[1.0], [-1.0]]), text, generator=seed(0))
    assert same(a[0], b[0], 1e-5) and not same(a[1], b[1], 1e-3), "rows must not mix"


OPTIONS = {"guidance": 5.0, "prior_guidance": 5.0, "prior_steps": 2, "decoder_steps": 2,
           "upsampler_steps": (3, 3), "candidates": 4, "rerank": 3, "prior": "ar",
           "guidance_above": 999, "refine": 2, "temperature": 50.0}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_of_sample_is_without_effect(stack, name):
    """Nor if the weights bring it, as config.sampling."""
    def draws(model, **given):                           # the better candidate may be the first
        return torch.cat([draw(model, [OTHER], s, **given) for s in range(4)])

    value, other = {name: OPTIONS[name]}, copy.copy(stack)
    way = {"prior": "ar"} if name == "temperature" else {}
    if name != "prior":
        other.config = replace(stack.config, sampling=replace(stack.config.sampling, **value))
    changed = draws(stack, prior="ar") if name == "prior" else draws(other, **way)
    assert not same(draws(stack, **way), changed), f"{name} has no effect"
    if name not in ("prior", "guidance_above", "refine", "temperature"):
        assert torch.equal(draws(stack, **value), changed), "not given: as the weights have it"


def test_each_upsampler_takes_its_own_number_of_steps(stack, monkeypatch):
    taken = []
    for name in ("upsampler1", "upsampler2"):
        monkeypatch.setattr(stack.parts[name], "sample",
                            lambda x, steps, *_, name=name: taken.append((name, steps)) or x)
    stack.upsample(torch.zeros(1, 3, 8, 8), (27, 15))
    assert taken == [("upsampler1", 27), ("upsampler2", 15)]


def test_rerank_keeps_of_each_caption_the_image_nearest_to_it(stack):
    images, captions = torch.rand(6, 3, 64, 64, generator=seed(0)) * 2 - 1, [CAPTION, OTHER]
    z_t = stack.encode_text(captions).z_t
    kept = stack.rerank(images, 3 * z_t)
    for row in range(2):
        mine = images[3 * row:3 * row + 3]
        scores = [float(F.cosine_similarity(stack.encode_image(x[None]), z_t[row])) for x in mine]
        best = mine[scores.index(max(scores))]
        assert torch.equal(kept[row], best), "the nearest, and only among its own N in a row"


def test_sampling_with_rerank_upsamples_the_one_that_clip_likes_best(stack):
    generator, captions = seed(5), [CAPTION, OTHER]
    text = stack.encode_text([c for c in captions for _ in range(3)])
    z_i = stack.sample_prior(text, generator=generator)
    small = stack.sample_decoder(z_i, text, generator=generator)
    want = stack.upsample(stack.rerank(small, text.z_t[::3]), generator=generator)
    assert small.shape == (6, 3, 8, 8) and want.shape == (2, 3, 128, 128)
    assert torch.equal(draw(stack, captions, 5, rerank=3), want)


def test_with_low_memory_one_part_at_a_time_is_on_the_device(stack):
    model, log = copy.deepcopy(stack), []
    model.device, model.low_memory = "the device", True
    for name, part in model.parts.items():
        part.to = lambda device, name=name: log.append((name, device))
    model.part("decoder")
    assert log[-1] == ("decoder", "the device") and dict(log[:-1]) == {
        name: "cpu" for name in unclip.PARTS if name != "decoder"}, "first the others make room"


def test_captions_are_padded_at_their_end_up_to_the_decoders_context(stack):
    text, tokens = stack.encode_text([CAPTION, OTHER]), stack.tokenizer([CAPTION, OTHER], 18)
    assert torch.equal(text.tokens, F.pad(tokens, (0, 2))), "18 tokens of CLIP, 20 of the decoder"
    lengths = torch.tensor([[len(stack.tokenizer.encode(c)) + 2] for c in (CAPTION, OTHER)])
    assert torch.equal(text.mask, torch.arange(20) < lengths), "True: a token, also start and end"
    assert all(map(torch.equal, text[2:], stack.parts["clip"].encode_text(tokens)))
    with pytest.raises(ValueError, match="no tokenizer"):
        unclip.build(stack.config).encode_text(OTHER)


def test_captions_are_checked(stack):
    assert draw(stack, ["a crimson circle"]).isfinite().all(), "unknown words are drawn, too"
    for captions, words in ([], "some text"), ([""], "some text"), ([OTHER, "  "], "some text"), \
            (["a red circle " * 9], "18 tokens"):
        with pytest.raises(ValueError, match=words):
            draw(stack, captions)


# ---------------------------------------------------------------- section 3 and inpainting


def test_slerp_follows_the_arc_at_constant_speed():
    a, b = clip.unit(torch.randn(2, 6, 16, generator=seed(0), dtype=torch.float64))
    angle = (a * b).sum(-1).acos()
    for f in (0.0, 0.25, 0.5, 1.0):
        got = unclip.slerp(a, b, f)
        assert same((got * a).sum(-1), (f * angle).cos(), 1e-9), "not a straight line; from a"
        assert same((got * b).sum(-1), ((1 - f) * angle).cos(), 1e-9), "unit rows stay unit rows"
        assert same(unclip.slerp(3 * a, 3 * b, f), 3 * got, 1e-9), "divide a . b by |a| |b|"
    assert same(unclip.slerp(a, 2 * a, 0.5), 1.5 * a, 1e-9), "parallel: a straight line, not 0 / 0"
    assert same(unclip.slerp(a, -a, 0.25), 0.5 * a, 1e-9), "opposite: a straight line, not 0 / 0"


def test_the_latent_is_clips_embedding_and_the_noise_that_ddim_makes_of_the_image(stack, photo):
    z_i, x_T = stack.latent(photo[None], steps=5)
    assert same(z_i, clip.unit(stack.encode_image(photo[None])), 1e-6)
    part, text, x = stack.parts["decoder"], stack.no_caption(1), F.avg_pool2d(photo[None], 4)
    timesteps = part.ddim_timesteps(5)
    for t, u in zip(timesteps, timesteps[1:]):
        x0 = diffusion.to_x0(part.alphabar, part(x, t, z_i, text)[:, :3], x, t, "v")
        x = diffusion.ddim_invert_step(part.alphabar, x, t, u, x0)
    assert same(x_T, x), "no guidance, no caption, the image shrunk to the decoder's size"


def test_decoding_the_latent_brings_the_image_back_the_better_the_more_steps(stack, photo):
    small, errors = F.avg_pool2d(photo[None], 4), []
    for steps in (10, 40, 160):
        again = stack.decode_latent(*stack.latent(photo[None], steps), guidance=1.0, steps=steps,
                                    upsampler_steps=())
        errors.append(float((again - small).square().mean().sqrt()))
    assert errors[2] < errors[1] / 2 < errors[0] / 4, errors


def test_variations_share_the_latent_and_differ_by_their_noise(stack, photo):
    assert stack.variations(photo, 3, steps=4).shape == (3, 3, 128, 128)
    x = stack.variations(photo, 2, eta=1.0, steps=4, upsampler_steps=(), generator=seed(0))
    assert not same(x[0], x[1], 1e-2), "eta without effect"
    with pytest.raises(TypeError, match="no option 'guidence'"):
        stack.variations(photo, 2, guidence=2.0)
    still = stack.variations(photo, 2, eta=0.0, steps=4, upsampler_steps=())
    assert torch.equal(still[0], still[1]), "without noise they are all the reconstruction"
    assert same(still[:1], stack.decode_latent(*stack.latent(photo[None], 4), steps=4,
                                               guidance=1.0, upsampler_steps=())), "not guided"
    each = stack.variations(photo, 2, steps=4, generator=[seed(4), seed(5)])
    assert same(each[1:], stack.variations(photo, 1, steps=4, generator=seed(5)))


def test_of_the_draws_of_a_variation_clip_keeps_the_one_nearest_to_the_image(stack, photo):
    few = dict(eta=1.0, steps=4, upsampler_steps=())
    draws = stack.variations(photo, 6, rerank=1, generator=seed(3), **few)
    kept = stack.variations(photo, 2, rerank=3, generator=seed(3), **few)
    z_i = stack.encode_image(photo[None])
    for row in range(2):
        mine = draws[3 * row:3 * row + 3]
        best = F.cosine_similarity(stack.encode_image(mine), z_i).argmax()
        assert same(kept[row], mine[best]), "the nearest of its own three"
    for way, more in (("variations", {"eta": 0.0}), ("text_diff", {}), ("interpolate", {})):
        with pytest.raises(ValueError, match="with eta 0 all draws of an image are alike"):
            WAYS[way](stack, photo, n=2, rerank=3, **more)


def test_pixels_become_the_nearest_byte_and_do_not_wrap_around():
    levels = torch.tensor([-1.5, -1.0, 0.999, 1.0, 1.5]).expand(3, 1, 5)
    got = np.asarray(unclip.to_pil(levels))[0, :, 0].tolist()
    assert got == [0, 0, 255, 255, 255], f"clamp to [-1, 1], then round, do not truncate: {got}"


def test_interpolation_begins_at_the_first_image_and_ends_at_the_second(stack, photo):
    other, few = photo.flip(2), dict(steps=4, upsampler_steps=())
    path = stack.interpolate(photo, other, 5, **few)
    ends = [stack.latent(x[None], 4) for x in (photo, other)]
    for row, f in ((0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0)):
        z_i, x_T = (unclip.slerp(a.flatten(1), b.flatten(1), torch.tensor(f))
                    for a, b in zip(*ends))
        want = stack.decode_latent(z_i, x_T.view(1, 3, 8, 8), **few)
        assert same(want[0], path[row]), "z_i and x_T both turn, from a to b"
    fixed = [stack.interpolate(photo, photo, 3, noise="fixed", generator=g, **few)
             for g in (seed(1), [seed(s) for s in (1, 2, 3)])]
    assert same(fixed[0][0], fixed[0][2]) and same(*fixed), "one noise, one embedding, one image"
    again = stack.interpolate(photo, photo, 3, noise="fixed", generator=seed(2), **few)
    assert not same(again, fixed[0]), "drawn by the generator"
    assert same(stack.interpolate(photo, other, 1, **few)[0], path[0]), "n = 1: the first image"
    with pytest.raises(ValueError, match="slerp"):
        stack.interpolate(photo, photo, 2, noise="none")
    with pytest.raises(ValueError, match="source and target, or none, got one"):
        stack.interpolate(photo, photo, 2, OTHER)


def test_an_interpolation_reads_the_nearer_caption(stack, photo):
    few, words = dict(steps=4, upsampler_steps=()), (OTHER, CAPTION)
    path = stack.interpolate(photo, photo.flip(2), 5, *words, **few)
    source, target = (stack.encode_text([c]) for c in words)
    ends = [stack.latent(x[None], 4, text=c) for x, c in ((photo, source), (photo.flip(2), target))]
    for row, f, text in ((0, 0.0, source), (1, 0.25, source), (2, 0.5, target), (4, 1.0, target)):
        z_i, x_T = (unclip.slerp(a.flatten(1), b.flatten(1), torch.tensor(f))
                    for a, b in zip(*ends))
        want = stack.decode_latent(z_i, x_T.view(1, 3, 8, 8), text=text, **few)
        assert same(want[0], path[row]), "on the way to x_T, too"


def test_of_whole_paths_that_share_their_noise_clip_keeps_one(stack, photo):
    few = dict(steps=4, eta=1.0, upsampler_steps=())
    alike = stack.interpolate(photo, photo, 3, generator=seed(3), **few)
    assert same(alike[0], alike[2]), "one noise for all images"

    # two images far apart, each drawn by itself, six times, from the same seed
    z_i, x_T = stack.latent(torch.stack([photo, -photo]), 4)
    draws = torch.stack([
        stack.decode_latent(z_i[[i] * 6], x_T[[i] * 6], generator=seed(5), **few) for i in (0, 1)])
    likeness = torch.stack([F.cosine_similarity(stack.encode_image(x), z_i[i:i + 1])
                            for i, x in enumerate(draws)])                 # (2, 6)
    best = likeness.mean(0).argmax()
    assert (likeness.argmax(1) != best).any(), "else this test could not tell paths from images"
    kept = stack.interpolate(photo, -photo, 2, rerank=6, generator=seed(5), **few)
    assert same(kept, draws[:, best]), "nearest on average"


def test_a_text_diff_turns_the_embedding_by_the_stated_angle_and_keeps_the_noise(stack, photo):
    few, words = dict(steps=4, upsampler_steps=()), ("a red circle", "a blue circle")
    source, target = (stack.encode_text([c]) for c in words)
    z_i, x_T = stack.latent(photo[None], 4, text=source)
    z_d = clip.unit(clip.unit(target.z_t) - clip.unit(source.z_t))

    path = stack.text_diff(photo, *words, 3, 0.4, **few)
    for x, theta, text in zip(path, (0.0, 0.2, 0.4), (source, target, target)):
        z = unclip.slerp(z_i, z_d, torch.tensor(theta))
        want = stack.decode_latent(z, x_T, text=text, guidance=2.0, **few)
        assert same(x, want[0]), "towards the target, not back; with the nearer caption"
    assert same(stack.text_diff(photo, *words, 1, 0.4, **few)[0], path[-1]), "n = 1: the full edit"
    a, b = (stack.text_diff(photo, *words, 1, 0.4, eta=1.0, rerank=k, generator=seed(2), **few)
            for k in (1, 4))
    assert not same(a, path[-1:]) and not same(a, b), "eta and rerank have an effect"
    with pytest.raises(ValueError, match="different captions"):
        stack.text_diff(photo, OTHER, OTHER, 1)


WAYS = {"variations": lambda m, x, **more: m.variations(x, **more),
        "interpolate": lambda m, x, **more: m.interpolate(x, -x, **more),
        "text_diff": lambda m, x, **more: m.text_diff(x, OTHER, CAPTION, **more),
        "inpaint": lambda m, x, **more: m.inpaint(x, x[0] * 0 + 1, OTHER, **more)}


@pytest.mark.parametrize("way", WAYS)
def test_options_reach_every_way_to_draw_and_equal_seeds_are_equal_images(stack, photo, way):
    def draw(number=0, **options):
        few = dict(n=1, steps=4, upsampler_steps=())
        return WAYS[way](stack, photo, generator=seed(number), **few | options)

    assert torch.equal(draw(), draw()), "equal seeds, equal images"
    assert not same(draw(), draw(guidance=4.0)), "guidance has no effect"
    assert not same(draw(), draw(steps=6)), "steps have no effect"


@pytest.mark.parametrize("way", WAYS)
def test_no_option_of_any_way_to_draw_leaves_its_range(stack, photo, way, monkeypatch):
    monkeypatch.setattr(unclip, "open_image", None)      # before any work
    wrong = dict(n=0, steps=1001, guidance=1e308, upsampler_steps=(1, 0))
    wrong |= {"variations": {"eta": -0.1}, "text_diff": {"strength": 2.1}}.get(way, {})
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"expected {name} from"):
            WAYS[way](stack, photo, **{name: value})
    with pytest.raises(TypeError, match="candidates"):
        WAYS[way](stack, photo, candidates=2)


def test_inpainting_keeps_the_known_pixels_and_draws_the_others_anew(stack, photo):
    mask = torch.zeros(32, 32)
    mask[:, 18:] = 1
    x = stack.inpaint(photo, mask, CAPTION, 2, generator=seed(0))
    want = unclip.resize(photo[None], 128)[0]
    assert torch.equal(x[0, :, :, :72], want[:, :, :72]) and torch.equal(x[1, :, :, :72],
                                                                        want[:, :, :72])
    assert not same(x[0, :, :, 72:], want[:, :, 72:], 0.1) and not same(x[0], x[1], 0.1)
    assert not same(x, stack.inpaint(photo, mask, "a large green square", 2, generator=seed(0)))


def test_a_small_pixel_is_known_to_the_decoder_only_if_all_of_it_is(stack, photo, monkeypatch):
    seen, mask = [], torch.zeros(32, 32)
    mask[:, 18:] = 1                                     # 4 px of the image are one of the decoder
    monkeypatch.setattr(stack.parts["decoder"], "sample", lambda *_, known, mask:
                        seen.append(mask) or known.clone())
    stack.inpaint(photo, mask, CAPTION, 2)
    want = (torch.arange(8) < 4).expand(2, 1, 8, 8)      # columns 16 to 19 are known in part
    assert torch.equal(seen[0] == 1, want), "1 is known; the mask's white is not"


def test_the_upsamplers_receive_the_known_small_pixels_as_they_were(stack, photo, monkeypatch):
    seen, mask = [], torch.zeros(32, 32)
    mask[:, 16:] = 1
    monkeypatch.setattr(stack.config.sampling, "refine", 2)          # else the decoder keeps them
    monkeypatch.setattr(stack, "upsample", lambda x, *_: seen.append(x) or x)
    stack.inpaint(photo, mask, CAPTION, 2)
    for x in seen[0]:
        assert same(x[:, :, :4], unclip.resize(photo[None], 8)[0, :, :, :4])


def test_a_mask_may_be_a_file_and_must_fit(stack, photo, tmp_path):
    mask = torch.zeros(32, 32)
    mask[4:20, 2:30] = 1
    Image.fromarray((mask * 255).byte().numpy()).save(tmp_path / "mask.png")
    assert torch.equal(unclip.open_mask(tmp_path / "mask.png"), mask[None, None])
    assert torch.equal(unclip.open_mask(mask), mask[None, None])
    assert not unclip.open_mask(mask / 2).any(), "grey is not white"
    for wrong in (mask[:16, :16], 0 * mask):
        with pytest.raises(ValueError, match="mask of the image's 32 px with something white"):
            stack.inpaint(photo, wrong, CAPTION)
    for wrong in (255 * mask, mask[None, None], mask * float("nan")):
        with pytest.raises(ValueError, match=r"mask \(S, S\) in 0..1"):
            unclip.open_mask(wrong)


@pytest.mark.parametrize("way", [*WAYS, "sample"])
def test_every_method_that_takes_long_shows_its_progress(stack, photo, capsys, way):
    def bars(**options):
        if way == "sample":
            stack.sample(OTHER, decoder_steps=2, **options)
        else:
            WAYS[way](stack, photo, n=1, steps=2, **options)
        shown = capsys.readouterr().err
        return {word for word in ("prior", "inverting", "images", "upsampling", "%")
                if word in shown}

    first = "prior" if way in ("inpaint", "sample") else "inverting"
    assert bars(progress=True) == {first, "images", "upsampling", "%"}
    assert bars(progress=False) == set()


REFUSED = {
    "in [-1, 1]; from 0..255|from 0..255: x / 127.5 - 1": [
        lambda m, x: m.encode_image(255 * x[None]), lambda m, x: m.variations(255 * x),
        lambda m, x: m.encode_image(1.01 * x[None] / x.abs().max()),
        lambda m, x: m.encode_image(x[None] / 0)],
    "square images": [lambda m, x: m.latent(x[None, :, :, 2:])],
    "expected 2 upsampler_steps": [
        lambda m, x: draw(m, upsampler_steps=5), lambda m, x: draw(m, upsampler_steps=(5,)),
        lambda m, x: m.variations(x, upsampler_steps=torch.ones(2))],
    "the AR prior has no": [
        lambda m, x: draw(m, prior="ar", candidates=8),
        lambda m, x: draw(m, prior="ar", prior_steps=3),
        lambda m, x: m.sample_prior(m.encode_text(OTHER), "ar", candidates=2)],
    '"diffusion" or "ar"': [lambda m, x: draw(m, prior="gan")],
    "generators, one for each": [lambda m, x: draw(m, generator=[seed(0), seed(1)]),
                                 lambda m, x: m.inpaint(x, x[0] * 0 + 1, OTHER, 2,
                                                        generator=[seed(0)]),
                                 lambda m, x: m.variations(x, 3, generator=[seed(0)])],
    "expected prior_steps from 1": [lambda m, x: draw(m, prior_steps=0)],
    "expected decoder_steps from 1": [lambda m, x: draw(m, decoder_steps=2000)],
    "expected candidates from 1": [lambda m, x: draw(m, candidates=0)],
    "expected rerank from 1": [lambda m, x: draw(m, rerank=1.5)],
    "expected guidance from": [lambda m, x: draw(m, guidance=float("nan"))],
    "expected prior_guidance from": [lambda m, x: draw(m, prior_guidance=1e308)],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_meant_is_refused_before_any_work(stack, photo, words, monkeypatch):
    for name, method in [("diffusion_prior", "sample"), ("ar_prior", "sample"),
                         ("decoder", "sample"), ("decoder", "invert"), ("clip", "encode_image")]:
        monkeypatch.setattr(stack.parts[name], method, None)
    for call in REFUSED[words]:
        with pytest.raises(ValueError) as error:
            call(stack, photo)
        assert any(part in str(error.value) for part in words.split("|"))


@pytest.mark.parametrize("name, options", [
    ("diffusion_prior", {}), ("ar_prior", {"prior": "ar"}), ("decoder", {}), ("upsampler1", {}),
    ("upsampler2", {}), ("clip", {})])
def test_a_missing_part_is_named(stack, name, options):
    model = unclip.UnCLIP(stack.config, stack.parts | {name: None}, stack.tokenizer)
    model.upsample = None                                # before minutes of drawing small images
    with pytest.raises(ValueError, match=f"no {name}; train it"):
        draw(model, **options)


@pytest.mark.parametrize("name, blamed", [
    ("diffusion_prior", "the diffusion prior"), ("decoder", "the decoder"),
    ("upsampler1", "upsampler1"), ("upsampler2", "upsampler2")])
def test_numbers_that_are_not_finite_are_blamed_on_the_part_that_drew_them(stack, name, blamed):
    model = copy.deepcopy(stack)
    for w in model.parts[name].parameters():
        w.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=f"^{blamed} drew"):
        draw(model)
    if name == "decoder":
        with pytest.raises(FloatingPointError, match=f"^{blamed} drew"):
            model.decode_latent(torch.ones(1, 16), torch.ones(1, 3, 8, 8), steps=2)


# ---------------------------------------------------------------- presets and checkpoints

COUNTS = {"clip": 986_339_841, "diffusion_prior": 1_257_905_152, "ar_prior": 2_212_178_816,
          "decoder": 3_496_062_470, "upsampler1": 729_710_726, "upsampler2": 282_064_326}


def test_the_paper_preset_has_the_papers_sizes():
    parts = unclip.build("paper", device="meta").parts
    for name, part in parts.items():
        assert sum(w.numel() for w in part.parameters()) == COUNTS[name], name
        predicts = "x0" if name == "diffusion_prior" else "eps"
        assert getattr(part.config, "predicts", predicts) == predicts, name
    ups = [vars(parts[name].config) for name in ("decoder", "upsampler1", "upsampler2")]
    assert [(c["unet"].dropout, c["schedule"], c.get("degradation")) for c in ups] == [
        (0.1, "cosine", None), (0.1, "cosine", "blur"), (0.0, "linear", "bsr")]


def test_the_committed_weights_are_of_the_toy_preset():
    """But for what a run takes from its data: the words, and how many directions z_i has."""
    own, toy = unclip.read_checkpoint(ROOT / "weights/toy.pt")["config"], unclip.toy()
    for name in ("clip", "diffusion_prior", "ar_prior", "decoder"):
        getattr(toy, name).vocab_size = own[name]["vocab_size"]
    toy.ar_prior.components = own["ar_prior"]["components"]
    assert own == dataclasses.asdict(toy)


def test_build_gives_each_caller_a_configuration_of_their_own():
    half = unclip.build("toy", "meta", torch.half)
    half.config.clip.vocab_size = 7
    assert {w.dtype for w in half.parts["decoder"].parameters()} == {torch.half}
    assert half.parts["ar_prior"].edges.dtype == torch.float32, "buffers keep their digits"
    assert unclip.resize(torch.ones(1, 3, 8, 8).bfloat16(), 16).min() > 0.99
    assert unclip.build("toy", device="meta").config.clip.vocab_size != 7
    with pytest.raises(ValueError, match="preset out of toy, paper"):
        unclip.build("huge")


def test_contexts_that_cannot_work_together_are_refused():
    config = tiny_config()
    config.decoder.context -= 1
    with pytest.raises(ValueError, match="one context for priors and decoder"):
        unclip.build(config)
    config.clip.context, config.diffusion_prior.context, config.ar_prior.context = 30, 19, 19
    with pytest.raises(ValueError, match="at least CLIP's"):
        unclip.build(config)


@pytest.mark.parametrize("dtype", [None, torch.half])
def test_what_is_loaded_is_what_was_saved_bit_by_bit(stack, tmp_path, dtype):
    """In half precision only the weights: a table such as the prior's variance keeps its digits."""
    stack.parts["diffusion_prior"].cov.uniform_()
    stack.save(tmp_path / "a.pt", dtype)
    again = unclip.load(tmp_path / "a.pt")
    for name, part in stack.parts.items():
        theirs, learnt = again.parts[name].state_dict(), dict(part.named_parameters())
        for key, w in part.state_dict().items():
            w = w.half().float() if dtype and key in learnt else w
            assert torch.equal(w, theirs[key]) and theirs[key].dtype == w.dtype, f"{name} {key}"
        assert not again.parts[name].training
    assert again.config == stack.config and again.words == stack.words
    assert again.tokenizer([CAPTION], 20).equal(stack.tokenizer([CAPTION], 20))
    conv = again.parts["decoder"].unet.conv_in.weight
    assert conv.is_contiguous(memory_format=torch.channels_last) and not stack.low_memory
    spare = unclip.load(tmp_path / "a.pt", dtype=dtype or torch.float32, low_memory=True)
    assert spare.low_memory and {w.dtype for w in spare.parts["decoder"].parameters()} == {
        dtype or torch.float32} and spare.parts["decoder"].alphabar.dtype == torch.float64
    if dtype is None:
        assert torch.equal(draw(again), draw(stack)) and torch.equal(draw(spare), draw(stack))


def test_a_class_of_your_own_comes_back(stack, tmp_path):
    @dataclasses.dataclass
    class WideConfig(decoder.DecoderConfig):
        strength: float = 2.0
        pair: tuple[int, ...] = (1, 2)

    class Wide(decoder.Decoder):
        pass

    config = WideConfig(**vars(stack.config.decoder), strength=5.0, pair=(3, 4))
    mine = unclip.UnCLIP(replace(stack.config, decoder=config),
                         stack.parts | {"decoder": Wide(config)})
    mine.save(tmp_path / "a.pt")
    again = unclip.load(tmp_path / "a.pt").parts["decoder"]
    assert type(again) is Wide and type(again.config) is WideConfig and again.config == config

    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["classes"]["decoder"] = "Unseen"
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="import the module that defines Unseen"):
        unclip.load(tmp_path / "b.pt")


def test_whatever_happens_the_old_file_is_whole_and_the_true_cause_is_named(stack, tmp_path):
    def full_disk(file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def too_wide(file):
        raise OSError("encoder error -2")                          # Pillow's, without a number

    (tmp_path / "a").write_text("old")
    for write, cause in ((full_disk, "No space left on device"), (too_wide, "encoder error -2")):
        with pytest.raises(OSError, match=f"a: {cause}$"):
            unclip.write_atomically(tmp_path / "a", write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")], "no half files"
    (tmp_path / "a").chmod(0o600)
    unclip.write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600, "who may read it is the user's choice"


def test_ctrl_c_while_torch_writes_is_ctrl_c(tmp_path):
    def interrupted(file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")           # torch.save's, on its way out

    with pytest.raises(KeyboardInterrupt):
        unclip.write_atomically(tmp_path / "a", interrupted)
    assert not [*tmp_path.iterdir()]


def test_weights_that_are_not_finite_are_not_saved(stack, tmp_path):
    broken = copy.copy(stack)
    broken.parts = stack.parts | {"decoder": copy.deepcopy(stack.parts["decoder"])}
    broken.parts["decoder"].image_emb.bias.data[0] = 1e5           # infinite in half precision
    with pytest.raises(FloatingPointError, match="decoder.image_emb.bias is not finite"):
        broken.save(tmp_path / "a.pt", torch.half)
    assert not [*tmp_path.iterdir()]
    broken.save(tmp_path / "a.pt")


def test_numbers_figures_and_grids_are_written_whole(tmp_path, monkeypatch, photo):
    unclip.write_json(tmp_path / "a.json", {"é": [1.5]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "é": [\n  1.5\n ]\n}\n'
    unclip.save_figure(Figure(figsize=(2, 1)), tmp_path / "a.png", dpi=50)
    assert Image.open(tmp_path / "a.png").size == (100, 50)
    for captions, columns, size in [(2, 1, (32, 66)), (3, 2, (66, 66)), (1, 1, (32, 32))]:
        unclip.save_grid(photo.expand(captions, -1, -1, -1), tmp_path / "a.jpg", columns)
        assert Image.open(tmp_path / "a.jpg").size == size, "a rim of 2 pixels between images"

    seen = []
    for words in (["-o", "a.png"], ["--out", "a.png"], []):
        monkeypatch.setattr(sys, "argv", ["chapter.py", *words])
        unclip.run_demo(seen.append, "help")
    assert seen == ["a.png", "a.png", None]


def wrong_contents(good):
    """{what: (a spoilt checkpoint, a word of what is printed)}"""
    def spoil(*keys, value=None):
        content = copy.deepcopy(good)
        *path, last = keys
        place = content
        for key in path:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
        return content

    unet, key = ("config", "decoder", "unet"), ("weights", "decoder", "image_emb.bias")
    bias = good["weights"]["decoder"]["image_emb.bias"]
    return {
        "other weights": (spoil(*unet, "channels", value=64), "decoder"),
        "an unknown setting": (spoil("config", "clip", "colour", value=3), "colour"),
        "a missing setting": (spoil("config", "ar_prior", "buckets"), "buckets"),
        "another type": (spoil(*unet, "size", value="8"), "config.decoder.unet.size"),
        "a negative size": (spoil(*unet, "groups", value=-1), "config.decoder.unet.groups is -1"),
        "a truth value": (spoil(*unet, "depth", value=True), "config.decoder.unet.depth is True"),
        "an empty tokenizer": (spoil("tokenizer", value={}), "merges"),
        "another shape": (spoil(*key, value=bias[1:]), "image_emb.bias is no tensor of"),
        "no tensor": (spoil(*key, value=[1.0]), "image_emb.bias is no tensor of"),
        "too many weights": (spoil("weights", "decoder", "x", value=bias), "x is not of it"),
        "no heads": (spoil("config", "diffusion_prior", "heads", value=0), "diffusion_prior"),
        "an unknown schedule": (spoil("config", "decoder", "schedule", value="x"), "decoder"),
        "no words": (spoil("words"), "words"), "no weights": (spoil("weights"), "weights"),
        "a missing weight": (spoil(*key), "image_emb.bias"),
        "not a number": (spoil(*key, value=bias * torch.nan), "decoder cannot be read as"),
        "complex": (spoil(*key, value=bias * 1j), "image_emb.bias is torch.complex64"),
        "whole numbers": (spoil(*key, value=bias.int()), "image_emb.bias is torch.int32"),
        "words that are none": (spoil("words", value=torch.ones(2)), "words"),
        "no steps": (spoil("config", "sampling", "decoder_steps", value=0), "decoder_steps from 1"),
        "no merges": (spoil("tokenizer", "merges", value=[]), "merges and vocabulary do not fit"),
        "another tokenizer": (spoil("config", "clip", "vocab_size", value=514), "tokenizer and"),
        "no decoder": (spoil("weights", "decoder"), "hold no decoder"),
        "of something else": ({"some": "thing"}, "holds no 'unclip 2'"),
    }


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def files(stack, photo, tmp_path_factory):
    """Good and bad files to name on the command line."""
    folder = tmp_path_factory.mktemp("files")
    stack.save(folder / "good.pt")
    good = (folder / "good.pt").read_bytes()
    (folder / "short.pt").write_bytes(good[:5000])
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    (folder / "text.pt").write_text("hello")
    contents = wrong_contents(torch.load(folder / "good.pt", weights_only=True))
    for what, (content, _) in contents.items():
        torch.save(content, folder / f"{what}.pt")
    unclip.save_grid(F.pad(photo, (0, 8))[None], folder / "photo.png", 1)
    Image.new("L", (40, 32), 255).save(folder / "mask.png")
    return folder, {what: word for what, (_, word) in contents.items()}


@pytest.fixture
def command(files, monkeypatch, capsys):
    """words -> exit status, what was printed, what was printed on the error channel."""
    def run(*words):
        monkeypatch.chdir(files[0])
        try:
            unclip.main(list(words))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return run


def test_sample_writes_a_grid_with_a_row_for_each_caption(stack, files, command):
    """The columns are seeds: the third of --seed 7 is the first of --seed 9."""
    words = ("--weights", "good.pt", "--rerank", "2", "-o", "grid.png")
    status, printed, warned = command("sample", CAPTION, "a mauve ball", "-n", "3", "--seed", "7",
                                      *words)
    assert status == 0 and "6 images" in printed and "grid.png" in printed
    assert "not trained on: mauve, ball. They know: a, above, " in warned
    assert all(f"{bar}: " in warned for bar in ("prior", "images", "upsampling")), "its progress"
    pixels = torch.tensor(np.array(Image.open(files[0] / "grid.png")))
    grid = pixels.permute(2, 0, 1) / 127.5 - 1
    for row, caption in enumerate((CAPTION, "a mauve ball")):
        for column in range(3):
            want = draw(stack, [caption], 7 + column, rerank=2)[0]
            top, left = 130 * row, 130 * column
            assert same(grid[:, top:top + 128, left:left + 128], want, 0.01), (row, column)


@pytest.mark.parametrize("words, columns", [
    (["variations", "photo.png", "-n", "2"], 3),
    (["interpolate", "photo.png", "photo.png", "-n", "3", "--noise", "fixed"], 5),
    (["edit", "photo.png", "--source", OTHER, "--target", CAPTION, "-n", "2"], 3),
    (["inpaint", "photo.png", CAPTION, "--mask", "mask.png", "-n", "2"], 3)])
def test_commands_that_begin_with_an_image_write_a_strip(command, files, words, columns):
    """The user's image, what became of it, and the other end."""
    before = (files[0] / "photo.png").read_bytes()
    status, printed, _ = command(*words, "--weights", "good.pt", "--decoder-steps", "3", "-o",
                                 "s.png")
    assert status == 0 and "s.png" in printed
    assert (files[0] / "photo.png").read_bytes() == before, "the user's image stays"
    assert Image.open(files[0] / "s.png").size == (columns * 130 - 2, 128)
    for bad in ("no.png", "good.pt"):
        status, _, printed = command(words[0], bad, *words[2:], "--weights", "good.pt")
        assert status == 2 and bad in printed and printed.count("\n") == 1


COMMAND_LINES = {
    "sample x -n 3 -o o.png --weights w --clip c --device d --dtype bf16 --low-memory --seed 7 "
    "--guidance 3 --decoder-steps 5 --upsampler-steps 2 4 --prior ar --prior-guidance 2 "
    "--prior-steps 4 --candidates 6 --rerank 8": dict(
        captions=["x"], n=3, out="o.png", weights="w", clip_path="c", device="d", dtype="bf16",
        low_memory=True, seed=7, guidance=3.0, steps=5, upsampler_steps=[2, 4], prior="ar",
        prior_guidance=2.0, prior_steps=4, candidates=6, rerank=8),
    "sample x": dict(n=1, out="out.png", prior="diffusion", seed=0, dtype="fp32", guidance=None),
    "variations i": dict(image="i", eta=0.2, rerank=None, n=8, steps=250, guidance=1.0,
                         out="variations.png"),
    "interpolate i j": dict(a="i", b="j", source=None, noise="slerp", guidance=1.0, eta=0.0,
                            rerank=1, draw=unclip.UnCLIP.interpolate),
    "interpolate i j --source x --target y --eta 1 --rerank 4": dict(
        source="x", target="y", eta=1.0, rerank=4),
    "edit i --source x --target y": dict(image="i", source="x", target="y", strength=0.5,
                                         guidance=2.0),
    "inpaint i x --mask m": dict(image="i", caption="x", mask="m", n=4, steps=None)}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_every_word_on_the_command_line_reaches_its_command(words, command, monkeypatch):
    seen = {}
    monkeypatch.setattr(unclip, "run", lambda **options: seen.update(options))
    assert command(*words.split())[0] == 0 and seen == seen | COMMAND_LINES[words]


BAD = {
    "--weights nowhere.pt": "nowhere.pt cannot be read: No such file",
    "--weights short.pt": "short.pt cannot be read as a checkpoint", "--weights ": "--weights: ",
    "--weights flipped.pt": " is damaged; make or download the file again",
    "--weights text.pt": "text.pt cannot be read as a checkpoint",
    "--weights good.pt --clip x": "CLIP of its own", "--device cuda:99": "no device 'cuda:99'",
    "--device toaster": "no device 'toaster'", "--device meta": "no device 'meta'",
    "--device hpu": "no device 'hpu'",
    "--low-memory": "memory of a GPU", "-o no/where.png": "no/where.png",
    "-o out.xyz": "'out.xyz' cannot be", "-o out": "'out' cannot be",
    "-o out.psd": "'out.psd' cannot be", "-o out.ico": "'out.ico' cannot be",
    "-o ": "'' cannot be", "-o out.bufr": "'out.bufr' cannot",
    "--upsampler-steps 2": "2 upsampler_steps", "--decoder-steps 2000": "got '2000'",
    "-n zero": "whole number", "-n 1000000000": "n from 1 to 1000",
    "--guidance nan": "finite number", "--guidance 1e30": "guidance from",
    "--seed -1": "from 0", "--seed 18446744073709551616": "from 0 to 18446744073709551615",
    "--prior ar --candidates 8": "the AR prior has no", "--guid 2": "unrecognized",
    "--eta 1": "unrecognized",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_sentence_and_exit_status_2(command, options):
    status, _, printed = command("sample", "--weights", "good.pt", OTHER, *options.split(" "))
    assert status == 2 and BAD[options] in printed, printed
    assert printed.startswith(("error: ", "usage: ")) and "Traceback" not in printed


def test_what_was_given_is_not_overwritten_by_default(files, command):
    for words in (("variations", "variations.png"),
                  ("inpaint", "photo.png", OTHER, "--mask", "inpaint.png")):
        own = files[0] / words[-1]
        own.write_bytes((files[0] / "photo.png").read_bytes())
        status, _, printed = command(*words, "--weights", "good.pt")
        assert status == 2 and f"{own.name} is what you gave" in printed, printed
        assert own.read_bytes() == (files[0] / "photo.png").read_bytes()


def test_a_checkpoint_with_wrong_contents_is_one_sentence_with_file_and_entry(command, files):
    for what, word in files[1].items():
        status, _, printed = command("sample", OTHER, "--weights", f"{what}.pt")
        assert status == 2 and word in printed and printed.count("\n") == 1, f"{what}: {printed}"
        assert what == "no decoder" or f"{what}.pt" in printed, "name the file"


@pytest.mark.parametrize("words", [[], ["sample"], ["variations"], ["interpolate"], ["edit"],
                                   ["inpaint"]])
def test_every_command_explains_itself_with_its_defaults(command, words):
    status, printed, _ = command(*words, "--help")
    assert status == 0 and printed.startswith("usage") and (not words or "(default: " in printed)


@pytest.mark.parametrize("error, status, printed", [
    (KeyboardInterrupt(), 130, "stopped\n"),
    (KeyboardInterrupt("stopped; go on"), 130, "stopped; go"),
    (ValueError("expected x"), 2, "error: expected x\n"),
    (MemoryError("9 GB"), 2, "this machine's memory"),
    (RuntimeError("can't allocate memory: 9 GB"), 2, "this machine's memory")])
def test_the_guard_around_every_main(error, status, printed, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        unclip.stop_on_error(fail)
    assert end.value.code == status and printed in capsys.readouterr().err
    unclip.stop_on_error(int)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(KeyError):
        unclip.stop_on_error({}.__getitem__, "a mistake of ours keeps its traceback")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, as Linux has it")
def test_what_cannot_be_printed_is_still_written_and_the_exit_status_is_honest(tmp_path):
    code = ("import sys, unclip; unclip.stop_on_error(lambda: (print('a'), print('b', file=sys."
            "stderr), unclip.write_json(sys.argv[1], {})))")
    status = {">/dev/full": 1, "2>/dev/full": 0, ">&-": 0, "2>&-": 0, ">&- 2>&-": 0}
    runs = {streams: subprocess.Popen(
        f'PYTHONPATH="{ROOT}" "{sys.executable}" -c "{code}" {n}.json {streams}', shell=True,
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n, streams in enumerate(status)}
    for n, (streams, run) in enumerate(runs.items()):
        assert "Error" not in run.communicate()[1] and run.returncode == status[streams], streams
        assert (tmp_path / f"{n}.json").read_text() == "{}\n", streams


def test_no_checkpoint_is_overwritten_by_an_option(tmp_path, monkeypatch):
    for name in ("a.pt", "a.json"):
        (tmp_path / name).touch()
    assert unclip.writable(tmp_path / "a.json") and unclip.writable(tmp_path / "new.json")
    with pytest.raises(ValueError, match="no device or checkpoint"):
        unclip.writable(tmp_path / "a.pt")
    (tmp_path / "link.json").symlink_to(tmp_path / "a.pt")
    for name in (os.devnull, tmp_path / "link.json", tmp_path / "a.json/b.json", "a" * 300,
                 tmp_path / "none/a.json"):                        # a rename would replace a device
        with pytest.raises(ValueError, match="no device or checkpoint"):
            unclip.writable(name)
    for forbidden in (tmp_path, tmp_path / "a.json"):              # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != forbidden)
        with pytest.raises(ValueError, match="in a folder that exists, writable both"):
            unclip.writable(tmp_path / "a.json")


def test_a_terminal_without_unicode_and_a_closed_pipe_are_no_errors():
    code = "import unclip; unclip.stop_on_error(lambda: print('caf\\xe9 ' * 100000))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env=env, cwd=ROOT)
    assert run.stdout.read(7) == b"caf\\xe9"
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 1
