"""The whole stack: presets, checkpoints, sampling, the command line, its answers to bad input."""
import argparse
import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clip
import diffusion
import train_toy
import unclip

ROOT = Path(unclip.__file__).parent
CAPTION = "a small red circle above a large blue square"


def tiny_config():
    """The toy's shape with as little in it as runs."""
    config = copy.deepcopy(unclip.PRESETS["toy"])
    config.clip = dataclasses.replace(config.clip, image_width=32, image_layers=1, image_heads=1,
                                      text_width=32, text_layers=1, text_heads=1, embed_dim=16)
    config.diffusion_prior = dataclasses.replace(config.diffusion_prior, embed_dim=16, width=32,
                                                 layers=1, heads=1)
    config.ar_prior = dataclasses.replace(config.ar_prior, embed_dim=16, components=8, buckets=16,
                                          text_width=32, text_layers=1, text_heads=1, width=32,
                                          layers=1, heads=1)
    config.decoder = dataclasses.replace(config.decoder, embed_dim=16, text_layers=1,
                                         text_heads=1)
    config.decoder.unet = dataclasses.replace(config.decoder.unet, mults=(1, 1), attention=(8,))
    config.sampling = unclip.Sampling(prior_steps=3, decoder_steps=3, upsampler_steps=(2, 2))
    return config


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    texts = [train_toy.caption(train_toy.Scene((train_toy.Thing(s, c, z),)))
             for s in train_toy.SHAPES for c in train_toy.COLOURS for z in train_toy.SIZES]
    tokenizer = clip.Tokenizer.train([*texts, CAPTION], 1024)
    config = tiny_config()
    for name in ("clip", "diffusion_prior", "ar_prior", "decoder"):
        getattr(config, name).vocab_size = len(tokenizer)
    model = unclip.build_from(config)
    for part in model.parts.values():                    # zero-initialised layers would hide a lot
        for w in part.parameters():
            if not w.any():
                torch.nn.init.normal_(w, std=0.05)
    model.tokenizer = tokenizer
    model.words = sorted({word for text in [*texts, CAPTION] for word in text.split()})
    return model


def draw(model, captions=(CAPTION,), seed=0, **options):
    return model.sample(captions, generator=torch.Generator().manual_seed(seed), progress=False,
                        **options)


@pytest.mark.parametrize("which", ["diffusion", "ar"])
def test_a_caption_becomes_a_picture_in_range(stack, which):
    x = draw(stack, [CAPTION, "a red circle"], prior=which)
    assert x.shape == (2, 3, 256, 256)
    one = stack.encode_text(CAPTION)
    assert torch.equal(one.tokens, stack.encode_text([CAPTION]).tokens), "a string is one caption"
    assert torch.equal(draw(stack, CAPTION, prior=which), draw(stack, prior=which))
    assert x.isfinite().all() and -1 <= x.min() and x.max() <= 1


def test_a_seed_is_a_picture(stack):
    assert torch.equal(draw(stack), draw(stack)), "equal seeds must give equal pictures"
    assert not torch.equal(draw(stack), draw(stack, seed=1))


def test_the_stages_draw_in_the_documented_order(stack):
    """prior, decoder, upsamplers; each its first noise and one draw per step that adds noise."""
    sizes, randn = [], torch.randn

    def counting(*shape, **options):
        out = randn(*shape, **options)
        sizes.append(tuple(out.shape))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", counting)
        draw(stack)
    D = stack.config.clip.embed_dim
    assert sizes == ([(2, D)] * 3 + [(1, 3, 16, 16)] * 3
                     + [(1, 3, 64, 64), (1, 3, 256, 256)]), \
        "2 candidates; a start for each stage, one draw per step but the last, none for DDIM"


def test_save_and_load_give_the_same_stack(stack, tmp_path):
    stack.save(tmp_path / "stack.pt")
    again = unclip.load(tmp_path / "stack.pt")
    for name, part in stack.parts.items():
        theirs = again.parts[name].state_dict()
        assert all(torch.equal(w, theirs[key]) for key, w in part.state_dict().items()), name
    assert again.config == stack.config and again.words == tuple(stack.words)
    assert torch.equal(draw(again), draw(stack))


def test_half_precision_on_disk_is_float32_again_when_loaded(stack, tmp_path):
    stack.save(tmp_path / "full.pt")
    stack.save(tmp_path / "half.pt", dtype=torch.half)
    assert (tmp_path / "half.pt").stat().st_size < 0.7 * (tmp_path / "full.pt").stat().st_size
    again = unclip.load(tmp_path / "half.pt")
    w, v = (m.parts["decoder"].unet.conv_in.weight for m in (stack, again))
    assert v.dtype == torch.float32 and (w - v).abs().max() < 1e-3


def test_a_failed_save_leaves_the_old_file_alone(stack, tmp_path, monkeypatch):
    stack.save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def full_disk(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        stack.save(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"], "nothing half-written may stay behind"


def test_guidance_and_captions_matter(stack):
    x = draw(stack)
    assert not torch.equal(x, draw(stack, guidance=1.0)), "guidance must reach the decoder"
    assert not torch.equal(x, draw(stack, ["a red circle"])), "the caption must reach the picture"
    assert not torch.equal(x, draw(stack, prior="ar"))


def test_rerank_keeps_the_pictures_nearest_to_the_caption(stack):
    pictures = torch.rand(6, 3, 64, 64) * 2 - 1
    captions = [CAPTION, "a red circle"]
    kept = stack.rerank(pictures, captions, keep=2)
    z_t = clip.unit(stack.encode_text(captions).z_t)
    for row in range(2):
        mine = pictures[3 * row:3 * row + 3]
        score = [float(clip.unit(stack.encode_image(x[None]))[0] @ z_t[row]) for x in mine]
        best = sorted(range(3), key=lambda i: -score[i])[:2]
        assert all(torch.equal(a, mine[i]) for a, i in zip(kept[2 * row:2 * row + 2], best))


def test_sampling_with_rerank_enlarges_the_one_that_clip_likes_best(stack):
    """Three drawn for each caption, all of one generator; the decoder's pictures are compared."""
    generator = torch.Generator().manual_seed(5)
    captions = [CAPTION, "a red circle"]
    text = stack.encode_text([c for c in captions for _ in range(3)])
    z_i = stack.embed(text, generator=generator)
    small = stack.draw(z_i, text, upsampler_steps=(), generator=generator)
    want = stack.enlarge(stack.rerank(small, captions, keep=1), generator=generator)
    assert small.shape == (6, 3, 16, 16) and want.shape == (2, 3, 256, 256)
    assert torch.equal(draw(stack, captions, seed=5, rerank=3), want)


def test_with_low_memory_one_part_at_a_time_is_on_the_device(stack):
    model, want = copy.deepcopy(stack), draw(stack)
    model.low_memory = torch.device("meta")
    with model.at_work("decoder") as part:
        assert part is model.parts["decoder"] and all(w.is_meta for w in part.parameters())
        assert not any(w.is_meta for w in model.parts["clip"].parameters())
    assert all(torch.equal(w, v) for w, v in zip(model.parts["decoder"].parameters(),
                                                 stack.parts["decoder"].parameters()))
    model.low_memory = torch.device("cpu")
    assert torch.equal(draw(model), want)


# ---- what one can do with a picture: sec. 3


@pytest.fixture(scope="module")
def photo():
    return train_toy.render(train_toy.place(train_toy.parse(CAPTION), random.Random(0)), 64)


def test_the_latent_is_clips_embedding_and_the_noise_that_ddim_makes_of_the_picture(stack, photo):
    z_i, x_T = stack.latent(photo[None], steps=5)
    assert torch.allclose(z_i, clip.unit(stack.encode_image(photo[None])))
    d, text = stack.parts["decoder"], stack.no_caption(1)
    x, times = torch.nn.functional.avg_pool2d(photo[None], 4), d.ddim_times(5)
    assert times[0] == 1 and times[-1] == 997 and len(times) == 5
    for t, u in zip(times, times[1:]):
        out = d(x, torch.tensor([t - 1]), z_i, text)[:, :3]
        x = diffusion.ddim_invert_step(d.alphabar, x, t, u,
                                       diffusion.predict_x0(d.alphabar, x, t, out))
    assert torch.allclose(x_T, x, atol=1e-4)


def test_decoding_the_latent_brings_the_picture_back_the_better_the_more_steps(stack, photo):
    """The weights are random but smooth; DDIM's error falls with the number of steps."""
    small, errors = torch.nn.functional.avg_pool2d(photo[None], 4), []
    for steps in (10, 40, 160):
        z_i, x_T = stack.latent(photo[None], steps)
        again = stack.decode(z_i, x_T, steps=steps, upsampler_steps=())
        errors.append(float((again - small).square().mean().sqrt()))
    assert errors[2] < errors[1] / 2 < errors[0] / 4, errors


def test_250_steps_of_inversion_are_adms(stack):
    assert stack.parts["decoder"].ddim_times(250) == list(range(1, 1000, 4))


def test_variations_share_the_latent_and_differ_by_their_noise(stack, photo):
    x = stack.variations(photo, 3, eta=1.0, steps=4, generator=torch.Generator().manual_seed(0))
    assert x.shape == (3, 3, 256, 256) and not torch.equal(x[0], x[1])
    still = stack.variations(photo, 2, eta=0.0, steps=4, upsampler_steps=())
    assert torch.equal(still[0], still[1]), "without noise they are all the reconstruction"
    assert torch.allclose(still[:1], stack.decode(*stack.latent(photo[None], 4), steps=4,
                                                  upsampler_steps=()), atol=1e-4)


def test_a_picture_may_be_a_file_a_pil_image_or_a_tensor(stack, photo, tmp_path):
    """Of a wide one the middle square is used, as on the command line."""
    def still(image):
        return stack.variations(image, 1, eta=0.0, steps=4, upsampler_steps=())

    wide = torch.nn.functional.pad(photo, (8, 8, 0, 0), value=1.0)
    assert torch.equal(still(wide), still(photo))
    picture = unclip.to_pil(photo)
    picture.save(tmp_path / "a.png")
    assert torch.equal(still(picture), still(tmp_path / "a.png"))
    assert torch.allclose(still(picture), still(photo), atol=0.05), "but for rounding to 8 bits"


def test_what_cannot_be_meant_is_refused_before_any_work(stack, photo, monkeypatch):
    def never(*args, **options):
        raise AssertionError("it began to work")

    for name, method in [("diffusion_prior", "sample"), ("decoder", "sample"),
                         ("decoder", "invert"), ("clip", "encode_image")]:
        monkeypatch.setattr(stack.parts[name], method, never)
    bytes_ = (photo + 1) * 127.5
    for call, words in [
            (lambda: stack.encode_image(bytes_[None]), r"in \[-1, 1\], got .* x / 127.5 - 1"),
            (lambda: stack.variations(bytes_), r"in \[-1, 1\]"),
            (lambda: stack.latent(photo[None, :, :, 2:]), "expected square pictures"),
            (lambda: stack.variations(photo, eta=2.0), "eta between 0"),
            (lambda: draw(stack, upsampler_steps=5), "expected 2 numbers of upsampler steps"),
            (lambda: draw(stack, upsampler_steps=0), "expected 2 numbers of upsampler steps"),
            (lambda: draw(stack, upsampler_steps=torch.ones(2)), "expected 2 numbers"),
            *((lambda name=name: draw(stack, **{name: 0}), f"expected {name} to be at least 1")
              for name in ("prior_steps", "decoder_steps", "candidates", "rerank"))]:
        with pytest.raises(ValueError, match=words):
            call()


def test_every_method_that_takes_long_shows_its_progress(stack, photo, capsys):
    stack.variations(photo, 1, steps=2, upsampler_steps=(), progress=True)
    said = capsys.readouterr().err
    assert "inverting" in said and "pictures" in said
    stack.variations(photo, 1, steps=2, upsampler_steps=())
    assert capsys.readouterr().err == ""


def test_parts_that_cannot_work_together_are_refused():
    config = tiny_config()
    config.decoder.context -= 1
    with pytest.raises(ValueError, match="one context for priors and decoder"):
        unclip.build_from(config)
    config = tiny_config()
    for part in (config.diffusion_prior, config.ar_prior, config.decoder):
        part.context = config.clip.context - 1
    with pytest.raises(ValueError, match="at least CLIP's"):
        unclip.build_from(config)
    config = tiny_config().decoder
    with pytest.raises(ValueError, match="expected text_width to be the U-Net's context_width"):
        unclip.decoder.Decoder(dataclasses.replace(config, text_width=2 * config.text_width))
    with pytest.raises(ValueError, match="multiple of the heads, 3"):
        unclip.prior.DiffusionPrior(unclip.prior.DiffusionPriorConfig(width=100, heads=3))


def test_interpolation_begins_and_ends_with_the_two_pictures(stack, photo):
    other = photo.flip(2)
    path = stack.interpolate(photo, other, 5, steps=4, upsampler_steps=())
    assert path.shape == (5, 3, 16, 16)
    for x, end in ((photo, path[:1]), (other, path[-1:])):
        again = stack.decode(*stack.latent(x[None], 4), steps=4, upsampler_steps=())
        assert torch.allclose(again, end, atol=1e-4)
    (z_a, x_a), (z_b, x_b) = (stack.latent(x[None], 4) for x in (photo, other))
    half = [diffusion.slerp(a.flatten(1), b.flatten(1), torch.tensor(0.5)) for a, b in
            ((z_a, z_b), (x_a, x_b))]
    middle = stack.decode(half[0], half[1].view_as(x_a), steps=4, upsampler_steps=())
    assert torch.allclose(middle, path[2:3], atol=1e-4)
    fixed = stack.interpolate(photo, photo, 3, noise="fixed", steps=4, upsampler_steps=(),
                              generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fixed[0], fixed[2], atol=1e-4), "one noise, one embedding, one picture"


def test_a_text_diff_turns_the_embedding_by_the_stated_angle_and_keeps_the_noise(stack, photo):
    source, target = "a red circle", "a blue circle"
    path = stack.text_diff(photo, source, target, 3, 0.4, steps=4, upsampler_steps=())
    z_i, x_T = stack.latent(photo[None], 4)
    z_t, z_t0 = (clip.unit(stack.encode_text([c]).z_t) for c in (target, source))
    z_d = clip.unit(z_t - z_t0)
    assert torch.allclose(stack.difference([source], [target]), z_d), "it is norm(z_t - z_t0)"
    for x, theta in zip(path, (0.0, 0.2, 0.4)):
        z = diffusion.slerp(z_i, z_d, torch.tensor(theta))
        want = stack.decode(z, x_T, steps=4, upsampler_steps=())[0]
        assert torch.allclose(x, want, atol=1e-4), theta
    only = stack.text_diff(photo, source, target, 1, 0.4, steps=4, upsampler_steps=())
    assert torch.allclose(only[0], path[-1], atol=1e-4), "n = 1 is the full edit"
    with pytest.raises(ValueError, match="different captions"):
        stack.text_diff(photo, source, source, 1)
    with pytest.raises(ValueError, match="slerp"):
        stack.interpolate(photo, photo, 2, noise="none")


def test_every_picture_of_a_batch_is_independent(stack):
    """z_i and text of one row changed: the others' pictures stay as they are."""
    text = stack.encode_text([CAPTION, "a red circle"])
    z = clip.unit(torch.randn(2, stack.config.clip.embed_dim))
    a = stack.draw(z, text, generator=torch.Generator().manual_seed(0))
    z = z * torch.tensor([[1.0], [-1.0]])
    b = stack.draw(z, text, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(a[0], b[0], atol=1e-5) and not torch.allclose(a[1], b[1], atol=1e-3)


def test_unknown_words_are_named_and_drawn_all_the_same(stack):
    assert stack.unknown_words(["a Crimson circle", "a fox"]) == ("crimson", "fox")
    assert draw(stack, ["a crimson circle"]).isfinite().all()


@pytest.mark.parametrize("captions", [[], [""], ["  "], ["a red circle", ""]])
def test_a_caption_without_text_is_refused(stack, captions):
    with pytest.raises(ValueError, match="some text"):
        draw(stack, captions)


def test_a_caption_beyond_the_context_is_refused(stack):
    with pytest.raises(ValueError, match="at most 20 tokens"):
        draw(stack, ["a red circle " * 9])


COUNTS = {"clip": 986.3, "diffusion_prior": 1258, "ar_prior": 2210, "decoder": 3496.1,
          "upsampler1": 729.7, "upsampler2": 282.1}      # millions, paper.md section 7


@pytest.mark.parametrize("name", COUNTS)
def test_the_paper_preset_has_the_papers_sizes(name):
    part = unclip.build("paper", device="meta").parts[name]
    count = sum(w.numel() for w in part.parameters()) / 1e6
    assert count == pytest.approx(COUNTS[name], rel=2e-3)


def test_build_gives_each_caller_a_configuration_of_their_own():
    unclip.build("toy", device="meta").config.clip.vocab_size = 7
    assert unclip.build("toy", device="meta").config.clip.vocab_size != 7


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(files, monkeypatch, capsys):
    """(main, words) -> exit status, what was printed, what was said on the error channel."""
    def run(main, *words):
        monkeypatch.chdir(files)
        try:
            main(list(words))
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture(scope="module")
def files(stack, tmp_path_factory):
    """Good and bad files to name on the command line."""
    folder = tmp_path_factory.mktemp("files")
    stack.save(folder / "good.pt")
    content = torch.load(folder / "good.pt", weights_only=True)
    (folder / "short.pt").write_bytes((folder / "good.pt").read_bytes()[:5000])
    (folder / "text.pt").write_text("hello")
    torch.save({"some": "thing"}, folder / "other.pt")
    wrong = copy.deepcopy(content)
    wrong["config"]["decoder"]["unet"]["channels"] = 64
    torch.save(wrong, folder / "wrong.pt")
    wrong = copy.deepcopy(content)
    wrong["config"]["clip"]["colour"] = 3
    torch.save(wrong, folder / "setting.pt")
    del content["weights"]["decoder"]
    torch.save(content, folder / "no_decoder.pt")
    return folder


def test_sample_writes_a_picture_and_says_where(files, command):
    status, said, warned = command(unclip.main, "sample", CAPTION, "a mauve circle", "-n", "2",
                                   "--weights", "good.pt", "--rerank", "2", "-o", "two.png")
    assert status == 0 and "two.png" in said
    assert "never met: mauve" in warned and "circle" in warned
    H, W = clip.read_picture(files / "two.png").size
    assert H == W and H > 2 * 256


@pytest.mark.parametrize("words, columns", [
    (["variations", "photo.png", "-n", "2"], 3),
    (["interpolate", "photo.png", "photo.png", "-n", "3", "--noise", "fixed"], 5),
    (["edit", "photo.png", "--source", "a red circle", "--target", "a blue circle", "-n", "2"], 3)])
def test_pictures_can_be_varied_mixed_and_edited_from_the_command_line(command, files, photo, words,
                                                                       columns):
    """A strip: the user's picture, what became of it, and the other end."""
    unclip.save_grid(torch.nn.functional.pad(photo, (0, 40))[None], files / "photo.png", 1)
    status, said, _ = command(unclip.main, *words, "--weights", "good.pt", "--decoder-steps", "3",
                              "-o", "strip.png")
    assert status == 0 and "strip.png" in said
    assert clip.read_picture(files / "photo.png").size == (104, 64), "the user's picture stays"
    W, H = clip.read_picture(files / "strip.png").size
    assert H == 256 and W == columns * 260 - 4
    for bad, says in ((["no.png"], "no.png"), (["good.pt"], "good.pt")):
        status, _, complaint = command(unclip.main, words[0], *bad, *words[2:], "--weights",
                                       "good.pt")
        assert status == 2 and says in complaint and "Traceback" not in complaint


BAD = {
    "an unknown file": (["--weights", "nowhere.pt"], "no file nowhere.pt"),
    "a truncated file": (["--weights", "short.pt"], "short.pt is not a checkpoint, or is cut"),
    "a file that is no checkpoint": (["--weights", "text.pt"], "text.pt is not a checkpoint"),
    "a file of something else": (["--weights", "other.pt"], "other.pt"),
    "another configuration": (["--weights", "wrong.pt"], "do not fit"),
    "an unknown setting": (["--weights", "setting.pt"], "another configuration"),
    "no such device": (["--weights", "good.pt", "--device", "cuda:99"], "no device 'cuda:99'"),
    "a nonsense device": (["--weights", "good.pt", "--device", "toaster"], "no device 'toaster'"),
    "a folder that is not there": (["--weights", "good.pt", "-o", "no/where.png"], "no/where.png"),
    "not a picture's name": (["--weights", "good.pt", "-o", "out.xyz"], "out.xyz cannot be"),
    "a kind that is only read": (["--weights", "good.pt", "-o", "out.psd"], "out.psd cannot be"),
    "a part not trained": (["--weights", "no_decoder.pt"], "hold no decoder"),
    "too few upsamplers": (["--weights", "good.pt", "--upsampler-steps", "2"], "2 numbers"),
    "too many steps": (["--weights", "good.pt", "--decoder-steps", "2000"], "got 2000"),
    "not a number": (["--weights", "good.pt", "-n", "zero"], "whole number"),
    "a number that is none": (["--weights", "good.pt", "--guidance", "nan"], "finite number"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_exit_status_2(command, what):
    options, says = BAD[what]
    status, _, complaint = command(unclip.main, "sample", "a red circle", *options)
    assert status == 2 and says in complaint, complaint
    assert "Traceback" not in complaint


@pytest.mark.parametrize("caption", ["", "a red circle " * 30])
def test_a_bad_caption_is_one_sentence_too(command, caption):
    status, _, complaint = command(unclip.main, "sample", caption, "--weights", "good.pt")
    assert status == 2 and complaint.startswith("error: expected captions")


@pytest.mark.parametrize("main, words", [
    (unclip.main, []), (unclip.main, ["sample"]), (unclip.main, ["variations"]),
    (unclip.main, ["interpolate"]), (unclip.main, ["edit"]), (train_toy.main, []),
    (train_toy.main, ["read"]), (train_toy.main, ["evaluate"]), (train_toy.main, ["figures"]),
    (train_toy.main, ["gallery"]), (train_toy.main, ["world"])])
def test_every_command_explains_itself(command, main, words):
    status, said, _ = command(main, *words, "--help")
    assert status == 0 and said.startswith("usage")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--train", "--batch", "2"],
                                     pytest.param(["--dtype", "bf16"], marks=pytest.mark.long)])
def test_the_benchmark_measures_every_stage(command, monkeypatch, options):
    monkeypatch.setitem(unclip.PRESETS, "toy", tiny_config())
    status, said, _ = command(unclip.main, "benchmark", "--limit-seconds", "0.01", "--json",
                              "bench.json", *options)
    assert status == 0 and "TFLOP/s" in said
    content = json.loads(Path("bench.json").read_text())
    assert [row["stage"] for row in content["stages"]] == list(unclip.PARTS)
    for row in content["stages"]:
        part = unclip.PARTS[row["stage"]](getattr(tiny_config(), row["stage"]))
        assert row["parameters"] == sum(w.numel() for w in part.parameters())
        assert row["FLOPs"] > row["parameters"] and row["seconds"] > 0
    assert content["stages"][3]["steps"] == (1 if "--train" in options else 3)


@pytest.mark.parametrize("options", [[], pytest.param(["--train", "--recompute"],
                                                      marks=pytest.mark.long)])
def test_the_benchmark_counts_the_papers_size_without_a_gpu(command, options):
    """On meta nothing can be copied back to the CPU: a step that waited for the GPU would fail."""
    status, said, _ = command(unclip.main, "benchmark", "--preset", "paper", "--device", "meta",
                              "--dtype", "bf16", "--json", "count.json", *options)
    assert status == 0 and "counted, not run" in said
    rows = json.loads(Path("count.json").read_text())["stages"]
    assert [row["stage"] for row in rows] == list(unclip.PARTS) and "seconds" not in rows[0]
    for row in rows:                              # bf16; or weights, gradients, Adam, average
        assert row["needs"] > row["parameters"] * (20 if options else 2)
    decoder_row = rows[3]
    if not options:                               # 3.03 TFLOP for both halves of guidance
        assert decoder_row["FLOPs"] == pytest.approx(250 * 3.03e12, rel=0.01)


@pytest.mark.parametrize("name", ["clip", "diffusion_prior", "ar_prior", "decoder", "upsampler1"])
def test_recomputing_gives_the_same_gradients_and_keeps_less(name):
    """Bytes that live after the way there, counted on meta; gradients compared on the CPU."""
    kept, grads = [], []
    for again in (False, True):
        with torch.device("meta"):
            part = unclip.PARTS[name](getattr(unclip.toy(), name))
        if again:
            unclip.recompute(part)
        with unclip.Living(part) as living:
            weights, value = living.bytes, unclip.training_loss(name, part, 4, "meta")()
            kept.append(living.bytes - weights)
        torch.manual_seed(0)
        part = unclip.PARTS[name](getattr(unclip.toy(), name))
        if again:
            unclip.recompute(part)
        value = unclip.training_loss(name, part, 4, "cpu")()
        value.backward()
        grads.append([w.grad for w in part.parameters()])
    assert kept[1] < 0.6 * kept[0], f"{kept[1]} of {kept[0]} bytes are still kept"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_the_benchmark_counts_all_pictures_that_reranking_draws(monkeypatch):
    """Four small ones for each large one: four times the work of prior and decoder, not of the
    upsamplers."""
    def flops(name):
        args = argparse.Namespace(preset="toy", batch=1, train=False, recompute=False)
        _, once, work, steps, *_ = unclip.count(name, unclip.PARTS[name], getattr(toy, name), args,
                                                torch.float32)
        return once + work * steps
    toy, names = unclip.PRESETS["toy"], ("diffusion_prior", "decoder", "upsampler1")
    four = [flops(name) for name in names]
    monkeypatch.setattr(toy.sampling, "rerank", 1)
    assert [a / flops(name) for a, name in zip(four, names)] == [4, 4, 1]


def test_the_benchmark_says_what_would_not_fit(command, monkeypatch):
    monkeypatch.setattr(unclip, "free_memory", lambda device: 1e6)
    status, said, _ = command(unclip.main, "benchmark", "--preset", "paper")
    assert status == 0 and said.count("does not fit: it may take") == 6
    sizes = re.findall(r"it may take ([0-9.]+) GB", said)
    assert float(sizes[3]) >= 14.0, "the decoder: 3.5 billion numbers of 4 bytes, and its work"
    command(unclip.main, "benchmark", "--preset", "paper", "--device", "meta", "--json", "a.json")
    counted = json.loads(Path("a.json").read_text())["stages"]
    assert sizes == [f"{row['needs'] / 1e9:.1f}" for row in counted]


def test_free_memory_counts_what_a_cache_would_give_back(monkeypatch, tmp_path):
    monkeypatch.setattr(unclip, "MEMORY", tmp_path / "meminfo")
    assert unclip.free_memory("cpu") == float("inf"), "nobody says"
    unclip.MEMORY.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    assert unclip.free_memory("cpu") == 5000 * 1024


def test_the_benchmark_counts_each_thing_once(command):
    """What all steps share once; a forward pass that recomputing repeats, too."""
    def rows(*options):
        status, said, _ = command(unclip.main, "benchmark", "--device", "meta", "--json",
                                  "count.json", *options)
        assert status == 0, said
        return json.loads(Path("count.json").read_text())["stages"]

    [whole] = rows("--only", "diffusion_prior", "--preset", "paper")
    L, W, layers = 257, 2048, 24
    once, step = (2 * n * 12 * W * W * layers for n in (L, 3))           # products of the blocks
    assert whole["FLOPs"] == pytest.approx(2 * once + 64 * 2 * step, rel=0.15), "2 candidates"
    plain, again = rows("--train", "--only", "decoder"), rows("--train", "--recompute", "--only",
                                                              "decoder")
    assert plain[0]["FLOPs"] == again[0]["FLOPs"]


def test_what_lives_is_counted_once_until_it_is_dropped():
    part = torch.nn.Linear(100, 50, device="meta")                   # 5050 numbers of 4 bytes
    with torch.no_grad(), unclip.Living(part) as living:
        assert living.bytes == 20_200
        x = torch.empty(10, 100, device="meta")
        y = part(x)
        assert living.bytes == 20_200 + 4_000 + 2_000
        del x
        view = y.T[:3]
        assert living.bytes == 20_200 + 2_000, "a view has no memory of its own"
        y.mul_(2)
        del y
        assert living.bytes == 20_200 + 2_000, "the view still needs what it looks at"
        del view
        assert living.bytes == 20_200 and living.peak == 26_200


@pytest.mark.ours
def test_what_karlo_needs_is_told_for_every_setting(command, monkeypatch):
    """The weights as published, and what works beside them: at least the U-Nets' skips."""
    published = {"clip": 427_616_513, "diffusion_prior": 1_022_030_080, "decoder": 893_318_086,
                 "upsampler1": 2 * 691_579_523}
    skips = {"decoder": 2 * 64 ** 2, "upsampler1": 256 ** 2}         # both halves of guidance
    per_pixel = sum(n * width / 4 ** level for n, width, level in    # numbers on the way down
                    [(4, 320, 0), (1, 320, 1), (3, 640, 1), (1, 640, 2), (3, 960, 2), (1, 960, 3),
                     (3, 1280, 3)])
    needed = {name: unclip.memory_needed("karlo", dtype) for name, dtype in unclip.DTYPES.items()}
    for name, parts in needed.items():
        each = 4 if name == "fp32" else 2
        assert {part: round(w / each / 1e4) for part, (w, _) in parts.items()} == {
            part: round(n / 1e4) for part, n in published.items()}
        for part, pixels in skips.items():
            assert parts[part][1] - parts[part][0] > each * pixels * per_pixel
    monkeypatch.setattr(unclip, "memory_needed", lambda preset, dtype, batch: next(
        needed[name] for name, kind in unclip.DTYPES.items() if kind == dtype))
    status, said, _ = command(unclip.main, "memory")
    assert said in (ROOT / "README.md").read_text(encoding="utf-8"), "put this table there"
    table = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    assert status == 0 and table[0] == ["GB, karlo, batch 1", "fp32", "bf16", "fp16"]
    for column, parts in enumerate(needed.values(), start=1):
        together = sum(w for w, _ in parts.values()) + max(p - w for w, p in parts.values())
        assert table[-2][column] == f"{together / 1e9:.1f}"
        assert table[-1][column] == f"{max(p for _, p in parts.values()) / 1e9:.1f}"


def test_the_script_itself_ends_with_status_2_and_no_traceback():
    words = [sys.executable, str(ROOT / "unclip.py"), "sample", "a", "--weights", "no"]
    out = subprocess.run(words, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith("error: there is no file no")
