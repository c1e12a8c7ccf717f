"""The training loop: it learns what it should from what it should, resumes exactly, stops when it
must; and runs as a user starts them."""
import copy
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import clip
import train_toy
import unclip
from conftest import rand

ROOT = Path(unclip.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world():
    """-> config, Data of a small training set, embedded by an untrained CLIP."""
    source, config = train_toy.World(40, seed=1), unclip.toy()
    tokenizer = clip.Tokenizer.train(source.captions, 1024)
    for part in (config.clip, config.diffusion_prior, config.ar_prior, config.decoder):
        part.vocab_size = len(tokenizer)
    data = train_toy.Data(source, tokenizer, config, CPU)
    data.embed(train_toy.fresh_part("clip", train_toy.TOY["clip"], data, config, 0))
    return config, data


def few_steps(world, name, state=None, save=None, **changes):
    """A part of the toy after a few steps, and its losses."""
    config, data = world
    recipe = replace(train_toy.TOY[name], **{"steps": 6, "batch": 8, "warmup": 1} | changes)
    part = train_toy.fresh_part(name, recipe, data, config, 0)
    batch_loss = train_toy.losses_of(name, part, data, recipe)
    return part, train_toy.train(part, recipe, batch_loss, 0, state, save, save_seconds=0)


# ---------------------------------------------------------------- the loop


def follow(recipe, w=1.0, loss=None, **options):
    """Train one number by a loss of gradient 1 -> (learning rates, draws of steps, weights)."""
    part, rates, draws, weights = nn.ParameterList([torch.tensor(float(w))]).eval(), [], [], []
    optimizers = train_toy.make_optimizers(part, recipe)

    def batch_loss(progress):
        assert part[0].grad is None, "gradients of the step before pile up: zero_grad is missing"
        assert part.training, "no dropout in training: train() is missing"
        rates.append(optimizers[0].param_groups[1]["lr"])
        draws.append(torch.rand(()).item())
        weights.append(part[0].item())
        return part[0] if loss is None else loss(part, progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "make_optimizers", lambda *_: optimizers)
        train_toy.train(part, recipe, batch_loss, **options)
    return rates, draws, weights + [part[0].item()]


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    recipe = train_toy.Recipe(steps=10, batch=1, lr=0.1, warmup=3)
    want = [0.1 * min((i + 1) / 4, (1 + math.cos(math.pi * i / 10)) / 2) for i in range(10)]
    assert follow(recipe)[0] == pytest.approx(want), "no warm-up, or no cosine?"
    rates = follow(replace(recipe, cosine=False))[0]
    assert rates == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 7)


def test_every_step_and_every_seed_draws_something_else_and_draws_it_again():
    recipe = train_toy.Recipe(steps=8, batch=1, lr=0.1)
    draws = [follow(recipe, seed=seed)[1] for seed in (0, 0, 1, 2 ** 64 - 1)]
    assert len(set(draws[0])) == 8, "the same batch at every step"
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2]), "a seed without effect"
    _, twice, weights = follow(replace(recipe, sam=0.5))
    assert twice[::2] == twice[1::2] == draws[0], "both passes of SAM need the same batch"
    assert weights[1] - weights[0] == pytest.approx(0.5), "the second is at w + rho g / |g|"


def test_the_average_follows_the_weights_with_the_stated_decay():
    """average <- d average + (1 - d) w after each step, d = min(ema, (1 + step) / (10 + step))."""
    recipe, part, after = train_toy.Recipe(4, 1, 0.1, ema=0.2, warmup=0), nn.Linear(1, 1), []
    average = part.weight.item()

    def save(state):
        after.append(state["model"]["weight"].item())
    train_toy.train(part, recipe, lambda p: part(torch.ones(1)).sum(), save=save,
                    save_seconds=0)
    for step, w in enumerate(after):
        d = min(0.2, (1 + step) / (10 + step))
        average = d * average + (1 - d) * w
    assert len(set(after)) == 4, "the weights do not move: is an optimiser called?"
    assert part.weight.item() == pytest.approx(average, abs=1e-6), "d average + (1 - d) w"
    assert part.weight.item() != after[-1], "the average is what a run ends with"
    assert not part.training, "dropout after training: eval() is missing"


def test_only_matrices_decay():
    """Without gradients only weight decay moves a weight: matrices, not gains, biases, scalars."""
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])
            self.scalar = nn.Parameter(torch.ones(()))
            self.emb, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    for muon in (0.0, 0.1):
        part = Part()
        before = {name: w.detach().clone() for name, w in part.named_parameters()}
        recipe = train_toy.Recipe(1, 1, 0.1, muon=muon, weight_decay=0.5, warmup=0)
        train_toy.train(part, recipe, lambda progress: sum(w.sum() * 0 for w in part.parameters()))
        for name, w in part.named_parameters():
            kept = 0.95 if w.ndim > 1 else 1.0
            assert torch.allclose(w, kept * before[name], atol=1e-6), \
                f"{name}, muon {muon}: only matrices decay"


def test_muon_moves_matrices_inside_blocks_and_adamw_the_rest(world):
    config, data = world
    part = train_toy.fresh_part("decoder", train_toy.TOY["decoder"], data, config, 0)
    adamw, muon = train_toy.make_optimizers(part, train_toy.TOY["decoder"])
    names = {id(w): name for name, w in part.named_parameters()}
    moved = [[names[id(w)] for g in opt.param_groups for w in g["params"]] for opt in (adamw, muon)]
    assert sorted(moved[0] + moved[1]) == sorted(names.values()), "each weight once"
    assert all("blocks." in n or "unet.down" in n or "unet.mid" in n or "unet.up" in n
               for n in moved[1]) and "unet.conv_in.weight" in moved[0]


def test_newton_schulz_brings_singular_values_near_1_and_keeps_their_directions():
    for rows, columns in [(6, 6), (6, 40)]:
        u = torch.linalg.qr(torch.randn(rows, rows).double()).Q
        v = torch.linalg.qr(torch.randn(columns, rows).double()).Q
        s = torch.logspace(0, -2.5, rows).double()
        s = expected = s / s.norm()
        for _ in range(5):
            expected = 3.4445 * expected - 4.775 * expected ** 3 + 2.0315 * expected ** 5
        update = train_toy.orthogonal(7 * u * s @ v.mT)
        torch.testing.assert_close(update, u * expected @ v.mT, rtol=1e-6, atol=1e-6)
        assert ((0.68 < expected) & (expected < 1.21))[s > 0.002].all()


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8), (8, 4, 3, 3), (40, 2, 3, 3)])
def test_muon_steps_as_torchs_does(shape):
    """torch's computes in bfloat16, ours in float32."""
    ours, matrix = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape).flatten(1))
    muon = train_toy.Muon([ours], lr=0.1, weight_decay=0.5)
    reference = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape)
        matrix.grad = ours.grad.flatten(1)
        muon.step()
        reference.step()
    moved = (ours - 1).flatten(1)
    assert (moved - (matrix - 1)).norm() < 0.01 * moved.norm()


def test_sharpness_aware_steps_take_the_gradient_at_the_worst_nearby_weights():
    """Of (w^4 + u^4) / 4 at w = u = 1 it is (1 + rho / sqrt(2))^3; then weights are as before."""
    w, u = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    ((w ** 4 + u ** 4) / 4).sum().backward()
    with train_toy.worst_nearby([w, u], 0.1):
        ((w ** 4 + u ** 4) / 4).sum().backward()
    want = (1 + 0.1 / math.sqrt(2)) ** 3
    assert w.grad.item() == pytest.approx(want, abs=1e-6), "one norm, over all the parameters"
    assert w.item() == u.item() == 1, "the step to the worst weights is taken back"


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    recipe = train_toy.Recipe(steps=5, batch=1, lr=0.1)
    with pytest.raises(FloatingPointError, match="at step 2"):
        follow(recipe, loss=lambda part, p: part[0] * (math.nan if p == 2 / 5 else 1))


# ---------------------------------------------------------------- what a batch is


def test_every_image_is_trained_with_its_own_caption(world):
    """The images and tokens of a batch, parsed and decoded: both sides of the data agree."""
    config, data = world
    tokenizer = clip.Tokenizer.train(data.source.captions, 1024)
    for rows, size in ((data.groups(24), 32), (data.rows(24), 16)):
        for row, image in zip(rows.tolist(), data.images(rows, size)):
            text = tokenizer.decode(data.tokens[row])
            assert train_toy.agrees(train_toy.parse(text), train_toy.read(image)), text
        off = (data.images(rows, data.size) - data.draw(rows, data.size)).abs().max()
        assert off < 0.501 / 127.5, f"bytes off by {127.5 * off}: truncated, not rounded?"
        assert torch.equal(data.text(rows).z_t, data.z_t[rows])
        assert torch.equal(data.text(rows).tokens, data.tokens[rows])
    model = train_toy.fresh_part("clip", train_toy.TOY["clip"], data, config, 0)
    hidden = model.encode_text(data.tokens[rows])[1]
    assert torch.allclose(data.text(rows).states, hidden, atol=1e-5), "CLIP's hidden states"
    own = replace(config, decoder=replace(config.decoder, text_layers=2))
    papers = train_toy.Data(data.source, tokenizer, own, data.device)
    papers.embed(model)
    assert not papers.text(rows).states.numel(), "a decoder with a text part of its own needs none"
    norms = torch.cat([data.z_i, data.z_t]).norm(dim=1)
    assert (norms - 1).abs().max() < 1e-5, "embeddings of length 1"


@pytest.mark.parametrize("name", ["diffusion_prior", "ar_prior", "decoder"])
def test_what_a_loss_receives_belongs_together(world, name):
    """Image, embedding and caption of each row of a batch are those of one row of the data."""
    config, data = world

    class Part(nn.Module):
        def loss(self, *given):
            self.given = given
            return torch.zeros(1)
    part = Part()
    part.config = getattr(config, name)
    train_toy.losses_of(name, part, data, replace(train_toy.TOY[name], batch=8))(0.0)
    *images, z_i, text = part.given[:3] if name == "decoder" else part.given[:2]
    rows = torch.cdist(z_i, data.z_i).argmin(1)
    assert torch.equal(data.z_i[rows], z_i) and len(rows.unique()) > 1
    assert torch.equal(text.z_t, data.z_t[rows]), "captions of other rows"
    for x in images:
        assert torch.equal(x, data.images(rows, x.shape[2])), "images of other rows"


def test_clip_compares_images_with_their_own_captions(world, monkeypatch):
    (config, data), recipe, given = world, replace(train_toy.TOY["clip"], batch=64), []
    part = train_toy.fresh_part("clip", recipe, data, config, 0)
    monkeypatch.setattr(part, "forward", lambda *x: given.extend(x) or 2 * [torch.eye(64)])
    monkeypatch.setattr(clip, "clip_loss", lambda z_i, z_t, scale, ids: given.append(ids))
    train_toy.losses_of("clip", part, data, recipe)(0.9)
    images, tokens, ids = given
    everything = data.images(torch.arange(len(data)), data.size).flatten(1)
    rows = torch.cdist(images.flatten(1), everything).argmin(1)
    assert torch.equal(tokens, data.tokens[rows, :tokens.shape[1]]), "captions of other rows"
    assert torch.equal(ids, data.ids[rows]) and tokens.shape[1] == data.mask[rows].sum(1).max()
    assert rows.max() >= 0.7 * len(data), "the curriculum has no effect"


@pytest.mark.parametrize("name", ["upsampler1", "upsampler2"])
def test_an_upsampler_is_trained_on_what_it_prepares(world, name):
    (config, data), recipe, given = world, replace(train_toy.TOY[name], batch=8), []
    part = SimpleNamespace(config=getattr(config, name), loss=lambda *x: given.extend(x) or x[0])
    part.prepare = lambda *x: given.extend(x) or (x[0], x[0][..., ::4, ::4].clone())
    train_toy.losses_of(name, part, data, recipe)(0.0)
    images, crops, high, low = given
    assert high is images and torch.equal(low, images[..., ::4, ::4]), "pairs of other images"
    assert crops == recipe.crops and len(high) * max(1, crops) == 8


def test_the_curriculum_begins_with_one_object_and_relations_follow_two_by_two():
    world, seen = train_toy.World(100, seed=1), []
    for progress in (0.0, 0.2, 0.9):
        scenes = world.scenes[:4 * round(100 * world.curriculum(progress))]
        seen.append({scene.relation for scene in scenes})
    assert seen == [{""}, {"", "left of", "above"}, {"", *train_toy.MIRROR}]


def test_groups_are_whole_and_of_the_first_fraction(world):
    _, data = world
    rows = data.groups(64, 0.25).view(-1, 4)
    assert (rows[:, :1] % 4 == 0).all() and (rows - rows[:, :1] == torch.arange(4)).all()
    assert rows.max() < 0.25 * len(data)
    with pytest.raises(ValueError, match="a batch of 6, in whole groups of 4"):
        data.groups(6)


def test_captions_with_equal_tokens_are_one_caption():
    class Source:
        captions = ["A  red circle", "a red circle", "a blue circle", "a red circle "]

        def images(self, rows, size):
            return torch.zeros(len(rows), 3, size, size)
    data = train_toy.Data(Source(), clip.Tokenizer.train(Source.captions, 600), unclip.toy(), CPU)
    assert (data.ids == data.ids[0]).tolist() == [True, True, False, True]
    Source.images = lambda self, rows, size: torch.full((len(rows), 3, size, size), 255.0)
    with pytest.raises(ValueError, match="up to 255"):
        data.draw(torch.arange(2), 8)


def test_the_uniformity_loss_is_left_out_in_the_last_third(world):
    config, data = world
    recipe = train_toy.TOY["clip"]
    part = train_toy.fresh_part("clip", recipe, data, config, 0)
    losses = [train_toy.losses_of("clip", part, data, replace(recipe, uniformity=weight, batch=16))
              for weight in (0.0, 1.0)]

    def more(progress):
        values = [(torch.manual_seed(0), loss(progress).item())[1] for loss in losses]
        return values[1] - values[0]
    assert more(0.0) > 1 and more(0.6) > 1 and more(0.7) == more(1.0) == 0


def test_the_toys_decoder_has_logit_normal_timesteps_the_papers_uniform_ones(world):
    t = train_toy.logit_normal(1000, 4000)
    assert 1 <= t.min() and t.max() <= 1000
    x = torch.logit((t - 0.5).double() / 1000)
    assert abs(x.mean() + 0.1) < 0.01 and abs(x.std() - 1.2) < 0.01, "N(-0.1, 1.2^2)"

    (config, data), given = world, []
    part = SimpleNamespace(config=config.decoder, loss=lambda *x: given.append(x[3]) or x[0])
    for recipe in (train_toy.TOY["decoder"], train_toy.PAPER["decoder"]):
        train_toy.losses_of("decoder", part, data, replace(recipe, batch=8))(0.0)
    assert given[0].shape == (8,) and given[1] is None, "None: diffusion.loss draws uniform ones"


def test_the_decoders_projections_of_z_i_start_white(world):
    config, data = world
    part = train_toy.fresh_part("decoder", train_toy.TOY["decoder"], data, config, 0)
    out = part.image_tokens(data.z_i).detach()
    assert abs(out.mean()) < 1e-3 and 0.2 < out.std(0).mean() < 1.5
    plain = nn.Linear(*part.image_tokens.weight.shape[::-1])(data.z_i).detach()
    assert out.std(0).mean() > 3 * plain.std(0).mean()
    alike = copy.copy(data)
    alike.z_i = data.z_i[:1].expand_as(data.z_i)
    part = train_toy.fresh_part("decoder", train_toy.TOY["decoder"], alike, config, 0)
    assert part.image_tokens(data.z_i).isfinite().all(), "images may all be alike"


def test_all_directions_of_z_i_but_noise_count_alike_after_a_whitened_start():
    """Along an axis of variance p the projections vary by p / (p + ridge), the ridge 0.02."""
    torch.manual_seed(0)
    part = SimpleNamespace(image_emb=nn.Linear(3, 9000), image_tokens=nn.Linear(3, 9000))
    x = torch.randn(3000, 3)
    z = torch.linalg.qr(x - x.mean(0))[0] * (2999 * torch.tensor([1.0, 0.09, 1e-6])).sqrt()
    train_toy.whitened_start(part, z)
    size = part.image_emb.weight.norm(dim=0) * z.std(0) / (9000 / 3) ** 0.5
    assert torch.allclose(size, torch.tensor([1 / 1.02, 0.09 / 0.11, 0.0]), atol=0.03)


def test_clip_starts_from_sinusoidal_positions_of_rows_and_columns(world):
    part = train_toy.fresh_part("clip", train_toy.TOY["clip"], world[1], world[0], 0)
    pos, words = part.image.pos.data[1:] / 0.3, part.text.pos.data / 0.1
    n, half = round(len(pos) ** 0.5), pos.shape[1] // 2
    waves = clip.sinusoid(torch.arange(n), half)
    want = torch.stack([torch.cat([waves[i // n], waves[i % n]]) for i in range(n * n)])
    assert torch.allclose(pos, want, atol=1e-6), "half of it for the row, half for the column"
    assert torch.allclose(words, clip.sinusoid(torch.arange(len(words)), words.shape[1]), atol=1e-6)
    assert abs(part.text.tok.weight.std() - 0.1) < 0.002, "the std of a start"


def test_a_temperature_that_overshot_can_come_back(world):
    """scale = min(exp(tau), 100) has no gradient in tau beyond 100."""
    config, data = world
    part = train_toy.fresh_part("clip", train_toy.TOY["clip"], data, config, 0)
    part.logit_scale.data.fill_(6.0)
    train_toy.losses_of("clip", part, data, replace(train_toy.TOY["clip"], batch=8))(1.0).backward()
    assert 99 < part.scale() <= 100 and part.logit_scale.grad.abs() > 0


# ---------------------------------------------------------------- all parts


@pytest.mark.parametrize("wrong", [{"dtype": "fp64"}, {"only": ["clip", "x"]}, {"preset": "x"},
                                   {"seed": -1}, {"steps_scale": 0.0}])
def test_settings_out_of_range_are_refused_from_python_too(wrong):
    with pytest.raises(ValueError, match="expected"):
        train_toy.Settings(**wrong)


def test_a_runs_settings_reach_every_recipe():
    assert type(train_toy.Settings(Path("x")).out) is str, "a Path is no plain entry of state.pt"
    plain, settings = train_toy.TOY, train_toy.Settings(steps_scale=0.01, batch=8, sam=0.1)
    assert train_toy.scaled_recipes(train_toy.Settings(), 1) == plain, "no setting, no change"
    for name, recipe in train_toy.scaled_recipes(settings, 2).items():
        steps = round(plain[name].steps / 100)
        assert recipe == replace(plain[name], steps=steps, batch=8, warmup=min(50, steps // 5),
                                 sam=0.1 if name == "clip" else 0.0), f"{name}: a setting is lost"


@pytest.mark.parametrize("name", train_toy.TOY)
def test_a_seed_is_a_fresh_part(world, name):
    a, b, c = (train_toy.fresh_part(name, train_toy.TOY[name], *world[::-1], seed).state_dict()
               for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a), "drawn before the seed is set"
    assert any(not torch.equal(a[key], c[key]) for key in a), "a seed without effect"


@pytest.mark.parametrize("name", [name if "prior" in name else pytest.param(
    name, marks=pytest.mark.slow) for name in train_toy.TOY])
def test_six_steps_are_three_steps_saved_loaded_and_three_more(world, name, tmp_path):
    def save(state):
        if len(state["losses"]) == 3:
            torch.save(state, tmp_path / "state.pt")
    part, losses = few_steps(world, name, save=save)
    again, resumed = few_steps(world, name, torch.load(tmp_path / "state.pt", weights_only=True))
    assert losses == resumed, "a resumed run draws what it would have drawn"
    for key, w in part.state_dict().items():
        assert torch.equal(w, again.state_dict()[key]), f"{key}: weight, average or moment is lost"


def test_training_goes_on_from_one_state_twice_and_without_gradients_of_some_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])   # the second: unused

    def trained(**options):
        net = Net()
        recipe = train_toy.Recipe(6, 1, 1e-2, muon=1e-2, sam=0.1)
        return net, train_toy.train(net, recipe, lambda progress: (
            net.blocks[0](torch.randn(4, 3)) - 1).square().mean(), **options)

    states = []
    net, losses = trained(save=lambda state: states.append(copy.deepcopy(state)), save_seconds=0)
    for _ in range(2):
        again, resumed = trained(state=states[2])
        assert resumed == losses, "the state has changed"
        assert torch.equal(net.blocks[0].weight, again.blocks[0].weight)
    moments = states[2]["moments"][0]["state"]
    moments[next(iter(moments))]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="moments of another size"):
        trained(state=states[2])
    assert torch.equal(net.blocks[1].weight, Net().blocks[1].weight), "no gradient, no step"


@pytest.mark.long
def test_the_papers_preset_trains_by_the_same_loop(tmp_path, command, monkeypatch):
    """Narrow, in bfloat16 and recomputing, with dropout and predicting eps; then other parts over
    the CLIP that is there, with another batch; but not half of a part so and half otherwise."""
    config = unclip.toy()
    config.name, config.clip = "paper", replace(config.clip, context=18)
    for name in ("decoder", "upsampler1", "upsampler2"):
        setattr(config, name, replace(getattr(config, name), predicts="eps"))
    config.upsampler1.residual = False
    config.decoder.unet = replace(config.decoder.unet, dropout=0.1)
    config.sampling = unclip.Sampling(prior_steps=2, decoder_steps=2, upsampler_steps=(2, 2))
    monkeypatch.setitem(unclip.PRESETS, "paper", config)
    options = ["--preset", "paper", "--groups", "20", "--batch", "8", "--steps-scale", "1e-9",
               "--dtype", "bf16", "--recompute", "--out", tmp_path]
    said, code = command(*options, "--only", "clip")
    assert code == 0, said
    said, code = command(*options, "--resume", "--only", "decoder", "diffusion_prior", "--batch", 4)
    assert code == 0 and "clip:" not in said, said
    model = unclip.load(tmp_path / "paper.pt")
    assert model.config.name == "paper" and model.parts["ar_prior"] is None
    assert model.sample(["a red circle"], upsampler_steps=(), progress=False).isfinite().all()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    stopped = state | {"current": {"ar_prior": {"losses": []}}}
    torch.save(stopped, tmp_path / "state.pt")
    said, code = command(*options[:8], "--out", tmp_path, "--resume", "--batch", 4)
    assert code == 2 and "dtype bf16" in said, said


TABLE_3 = {"clip": (32_768, 635_000, 3e-4, 0.2, 0.98, 1e-6, 0.0),      # appendix C
           "ar_prior": (4096, 1_000_000, 1.6e-4, 4e-2, 0.91, 1e-10, 0.999),
           "diffusion_prior": (4096, 600_000, 1.1e-4, 6e-2, 0.96, 1e-6, 0.9999),
           "decoder": (2048, 800_000, 1.2e-4, 0, 0.999, 1e-8, 0.9999),
           "upsampler1": (1024, 1_000_000, 1.2e-4, 0, 0.999, 1e-8, 0.9999),
           "upsampler2": (512, 1_000_000, 1.0e-4, 0, 0.999, 1e-8, 0.9999)}


@pytest.mark.parametrize("name", TABLE_3)
def test_the_papers_recipes_are_those_of_its_table_3(name):
    r = train_toy.PAPER[name]
    assert (r.batch, r.steps, r.lr, r.weight_decay, r.beta2, r.eps, r.ema) == TABLE_3[name]
    plain = train_toy.Recipe(r.steps, r.batch, r.lr)
    for toys in ("muon", "logit_normal", "uniformity", "sinusoidal", "whitened", "sam"):
        assert getattr(r, toys) == getattr(plain, toys), f"{toys} is not in the paper"
    assert (r.cosine, r.warmup) == ((True, 2000) if name == "clip" else (False, 0))


# ---------------------------------------------------------------- whole runs, as a user starts them

TINY = ["--groups", "20", "--steps-scale", "0.002", "--batch", "8", "--save-seconds", "0"]


@pytest.fixture
def command(capsys):
    """Options -> what train_toy.py prints, and its exit status."""
    def run(*options):
        try:
            train_toy.main([str(option) for option in options])
            status = 0
        except SystemExit as end:
            status = end.code
        return "".join(capsys.readouterr()), status
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train_toy.main([*TINY, "--out", str(out)])
    return out


@pytest.mark.slow
def test_a_run_writes_weights_curves_and_samples(finished):
    model = unclip.load(finished / "toy.pt")
    assert all(part is not None for part in model.parts.values())
    done = torch.load(finished / "state.pt", weights_only=True)["done"]
    for name, part in model.parts.items():
        for key, w in part.state_dict().items():
            same = torch.equal(w.half(), done[name][key].half())
            assert same, f"{name}.{key}: not what was trained"
    for name in ("losses.png", "decoder.png", "upsampler1.png", "upsampler2.png"):
        assert clip.open_image(finished / name).shape[1] > 150
    assert "circle" in model.words and "above" in model.words


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_to_the_same_weights(finished, tmp_path, command,
                                                                 monkeypatch):
    """Killed in CLIP and in the decoder, another part trained between: the same file."""
    write, kill = unclip.write_atomically, ["clip", "decoder"]

    def write_and_die(path, writer):
        write(path, writer)
        if path.name == "state.pt":
            state = torch.load(path, weights_only=True)
            if kill and kill[0] in state["current"]:
                kill.pop(0)
                raise KeyboardInterrupt

    monkeypatch.setattr(unclip, "write_atomically", write_and_die)
    for drawing in ("draw_losses", "draw_samples"):
        monkeypatch.setattr(train_toy, drawing, lambda *_: None)
    for options in ((), ("--resume",), ("--resume", "--only", "upsampler2"), ("--resume",)):
        said, code = command(*TINY, "--out", tmp_path, *options)
        assert code in (0, 130), said
    assert code == 0 and not kill
    one, other = (torch.load(p / "state.pt", weights_only=True)["done"]
                  for p in (finished, tmp_path))
    assert list(one) != list(other), "another order"
    for part in one:
        for key, w in one[part].items():
            assert torch.equal(w, other[part][key]), f"{part}.{key} differs"


@pytest.mark.parametrize("options, complaint", [
    ((), "state.pt is there already"), (("--resume", "--seed", "5"), "with seed 0, not 5"),
    (("--resume", "--steps-scale", "0.003"), "steps_scale 0.002"),
    (("--resume", "--sam", "0.1"), "sam 0.0"), (("--resume", "--dtype", "bf16"), "dtype fp32"),
    (("--resume", "--batch", "4"), "batch 8"), (("--resume", "--groups", "21"), "captions"),
    (("--batch", "6"), "multiple of 4"), (("--steps-scale", "0"), "steps-scale"),
    (("--sam", "-1"), "--sam"), (("--data", ""), "--data"), (("--out", ""), "--out"),
    (("--vocab", ""), "--vocab"), (("--save-seconds", "-5"), "--save-s"),
    (("--data", "."), "--groups"), (("--dtype", "tf32"), "--dtype tf32"),
    (("--groups", "1000000000"), "--groups")])
def test_a_run_is_not_overwritten_and_not_resumed_as_another(tmp_path, command, options, complaint):
    settings = train_toy.Settings(str(tmp_path), steps_scale=0.002, batch=8)
    state = train_toy.open_run(train_toy.World(20), settings, tmp_path / "state.pt", 0)
    torch.save(state | {"current": {"clip": {"losses": [1.0]}}}, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    said, code = command(*TINY, "--out", tmp_path, *options)
    assert code == 2 and complaint in said and "Traceback" not in said, said
    assert {p.name for p in tmp_path.iterdir()} <= {"state.pt", "lock"}
    assert before == (tmp_path / "state.pt").read_bytes()


def test_a_folder_of_other_weights_of_a_running_run_or_a_file_is_refused(tmp_path, command):
    (tmp_path / "toy.pt").write_bytes(b"weights that this run did not make")
    said, code = command(*TINY, "--out", tmp_path)
    assert code == 2 and "toy.pt is there already" in said, said
    said, code = command(*TINY, "--out", tmp_path / "toy.pt")
    assert code == 2 and "is a file" in said, said
    (tmp_path / "toy.pt").rename(tmp_path / "losses.png")
    said, code = command(*TINY, "--out", tmp_path)
    assert code == 2 and "losses.png is there already" in said, said
    said, code = command("--data", tmp_path, "--out", tmp_path)
    assert code == 2 and "holds your images" in said, said
    with train_toy.locked(tmp_path):
        said, code = command(*TINY, "--out", tmp_path)
    assert code == 2 and "another run is training" in said, said
    torch.save({"format": "unclip run 3"}, tmp_path / "state.pt")
    said, code = command(*TINY, "--out", tmp_path, "--resume")
    assert code == 2 and "unclip run 4" in said, said
    said, code = command(*TINY, "--out", tmp_path / "typo", "--resume")
    assert code == 2 and "no run in" in said and not (tmp_path / "typo").exists(), said


@pytest.mark.slow
@pytest.mark.parametrize("spoil, complaint", [
    (lambda state: state.pop("done"), "state.pt cannot be read as the state of a run: KeyError"),
    (lambda state: state.update(seconds=[]), "state.pt cannot be read as the state of a run"),
    (lambda state: state["tokenizer"].update(merges=[]), "merges and vocabulary do not fit"),
    (lambda state: state["done"]["clip"].popitem(), "clip in .*state.pt cannot be read as weights"),
    (lambda state: state["current"].update(upsampler2=state["done"].pop("upsampler2")),
     "upsampler2 in state.pt cannot be read"),
    (lambda state: state["settings"].pop("seed"), "with seed None, not 0")])
def test_a_state_with_wrong_contents_is_named_and_kept(finished, tmp_path, command, spoil,
                                                       complaint):
    state = torch.load(finished / "state.pt", weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    said, code = command(*TINY, "--out", tmp_path, "--resume")
    assert code == 2 and re.search(complaint, said) and "Traceback" not in said, said
    assert before == (tmp_path / "state.pt").read_bytes()


@pytest.fixture
def own(tmp_path):
    """Eight images of every kind that Pillow opens, and seven that cannot be read."""
    data, rng = tmp_path / "data", random.Random(0)
    data.mkdir()
    for i, kind in enumerate(("png", "jpg", "webp", "bmp", "gif", "tif", "PNG", "jpeg")):
        scene = train_toy.random_scene(rng)
        image = unclip.to_pil(train_toy.render(scene, 64)).resize((80 + i, 70))
        image.save(data / f"{i}.{kind}")
        encoding = ("utf-8", "utf-8-sig", "utf-16")[i % 3]
        (data / f"{i}.txt").write_text(train_toy.caption(scene) + " in a café", encoding=encoding)
    for name, text in (("a", b"\xef\xbb\xbf"), ("b", b"&nbsp;"), ("c", b"\xe2\x80\x8b"),
                       ("cp1252", b"a caf\xe9"), ("utf-16-without-a-mark", b"a\0 \0c\0")):
        Image.new("RGB", (9, 9)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_bytes(text)
    (data / "broken.png").write_bytes(b"no image")
    (data / "x.heic").write_bytes(b"of a kind that Pillow cannot read")
    (data / "x.txt").write_text("a circle")
    (data / "0.txt").write_text("a red circle, as round as one can be, " * 4)
    return data


def test_a_folder_of_images_names_what_it_leaves_out(own, capsys):
    source = train_toy.Folder(own)
    assert "8 images" in (said := capsys.readouterr().out), said
    assert "; 7 left out, the first: a.png (a.txt cannot be read as a caption" in said
    assert len(source.captions) == 8 and all(text.endswith("café") for text in source.captions[1:])
    for i, path in enumerate(source.paths):
        want = clip.preprocess(path, 16)
        assert torch.equal(source.images([i, 0], 16)[0], want), "scaled and centre-cropped"
    (own / "e.txt").write_bytes("né".encode("utf-16-be"))
    with pytest.raises(ValueError, match="e.txt cannot be read as a caption"):
        train_toy.read_caption(own / "e.txt")
    (own / "e.txt").write_bytes(b"\xfe\xff" + "né".encode("utf-16-be"))
    assert train_toy.read_caption(own / "e.txt") == "né"


@pytest.mark.slow
def test_your_own_images_train_it_too(own, tmp_path, command):
    said, code = command("--data", own, "--out", tmp_path / "run", "--only", "decoder",
                         "--steps-scale", "0.001", "--batch", "8")
    assert code == 0 and "7 left out, the first: a.png" in said, said
    assert "1 of 8 captions have more than 20 tokens" in said
    assert "café" in unclip.load(tmp_path / "run/toy.pt").words


def test_a_folder_without_pairs_is_one_sentence_and_exit_status_2(tmp_path, command):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for folder, complaint in (("", "each with its caption in NAME.txt"), ("none", "none cannot be"),
                              ("a.png", "a.png cannot be read as a folder")):
        said, code = command("--data", tmp_path / folder, "--out", tmp_path / "run")
        assert code == 2 and complaint in said, said


def test_read_prints_what_is_in_an_image_and_world_draws_a_sheet(tmp_path, command):
    scene = train_toy.random_scene(random.Random(3), two=True, unstated=0)
    unclip.to_pil(train_toy.render(scene, 256)).save(tmp_path / "a.png")
    said, code = command("read", tmp_path / "a.png")
    assert code == 0 and train_toy.parse(said.strip()) == scene
    said, code = command("read", tmp_path / "c.png")
    assert code == 2 and "c.png" in said
    said, code = command("world", "-o", tmp_path / "world.png")
    assert code == 0 and (tmp_path / "world.png").stat().st_size > 2e4


def test_every_option_of_a_run_reaches_its_settings(command, monkeypatch):
    runs = []
    monkeypatch.setattr(train_toy, "run", lambda *given: runs.append(given))
    monkeypatch.setattr(train_toy, "World", lambda *given: given)
    for words in ("", "--groups 5 --out x --preset paper --resume --only clip decoder --batch 8 "
                  "--steps-scale 0.5 --seed 3 --sam 0.1 --vocab v --save-seconds 9 --device d "
                  "--dtype bf16 --recompute --compile"):
        command(*words.split())
    assert runs == [((6000, 0), train_toy.Settings()), ((5, 3), train_toy.Settings(
        "x", "paper", True, ["clip", "decoder"], 0.5, 8, 3, 0.1, "v", 9.0, "d", "bf16", True,
        True))]


# ---------------------------------------------------------------- evaluation


class Painter:
    """A model that draws what a caption states, but what is green in a colour of its own."""
    def __init__(self, green="green"):
        self.seen, self.captions, self.green, self.config = [], [], green, unclip.toy()

    def encode_text(self, captions):
        self.captions += captions
        rows = torch.arange(len(captions))[:, None]
        return clip.Text(rows, rows, 1.0 + rows.expand(-1, 2), rows)

    def encode_image(self, images):
        return images.mean((2, 3))

    def sample_prior(self, text, which="diffusion", generator=None):
        self.seen.append(which)
        return text.z_t

    def sample_decoder(self, z_i, text, generator):
        assert generator.initial_seed() == 0, "a seed without effect"
        self.seen.append(z_i)
        scenes = [train_toy.parse(text.replace("green", self.green)) for text in
                  self.captions[-len(z_i):]]
        return train_toy.render_many([train_toy.place(s, random.Random(0)) for s in scenes], 16)

    def upsample(self, x, generator):
        assert generator.initial_seed() == 0, "a seed without effect"
        return nn.functional.interpolate(x, 64, mode="bicubic")

    def rerank(self, images, z_t):
        assert z_t[:, 0].tolist() == [*range(1, len(images) + 1, 4)], "each caption once"
        return images[::4]


@pytest.mark.parametrize("condition", train_toy.CONDITIONS)
def test_each_condition_receives_what_it_must_and_nothing_else(condition):
    rng, model = random.Random(0), Painter()
    scenes = [train_toy.random_scene(rng) for _ in range(12)]
    row = train_toy.score(model, {"a": scenes[:6], "b": scenes[6:]}, condition)
    assert row["a"] == row["b"] == 1 and not row["wrong attributes"] and not row["wrong pairs"]
    images = train_toy.render_many(scenes, model.config.clip.image_size)
    want = {"caption alone": torch.zeros(12, 2), "true image embedding": clip.unit(
        images.mean((2, 3))), "text embedding in its place": clip.unit(model.encode_text(
            12 * [""]).z_t)}.get(condition)
    if want is not None:
        assert torch.allclose(model.seen[0], want, atol=1e-5), f"{condition} got something else"
    else:
        assert model.seen[0] == ("ar" if "AR" in condition else "diffusion")
        assert len(model.seen[1]) == (48 if condition == train_toy.BEST else 12)


def test_evaluate_shows_what_training_never_did_and_counts_what_is_right(tmp_path, command,
                                                                         monkeypatch):
    """By a model that paints blue what is green: wrong by the colour, where a caption has green."""
    model, cells = Painter("blue"), []
    monkeypatch.setattr(unclip, "load", lambda *_: model)
    late = command("evaluate", "--json", tmp_path / "no/e.json")
    assert late[1] == 2 and "--json" in late[0] and not model.captions, "refused before any work"
    said, code = command("evaluate", "--captions", 40, "--json", tmp_path / "e.json",
                         "--conditions", "caption alone")
    numbers = json.loads((tmp_path / "e.json").read_text())
    row = numbers["rows"]["caption alone"]
    assert numbers["seed"] == 0 and numbers["captions"].startswith("16 one object, 24 two"), numbers
    scenes = [train_toy.parse(text) for text in model.captions]
    for kind, a, b, part in (("one object", 0, 16, "test"), ("two objects", 16, 40, "test"),
                             ("held-out pairs", 40, 56, "held-out")):
        assert {train_toy.split(s) for s in scenes[a:b]} == {part}, f"{kind}: shown in training?"
        right = np.mean(["green" not in text for text in model.captions[a:b]])
        assert 0 < row[kind] == right < 1, kind
        cells.append(f"{100 * right:.1f} %")
    assert "| caption alone | " + " | ".join(cells) + " | 0." in said and code == 0, said
    assert "16 one object, 24 two objects, 16 held-out pairs; " in said and len(scenes) == 56
    wrong = sum("green" in text for text in model.captions)
    assert row["wrong attributes"]["colour"] == sum(row["wrong pairs"].values()) == wrong
    assert 0.5 < row["IoU, 10th percentile"] < row["IoU"] < 1 and row["IoU"] > 0.8
    assert 10 < row["PSNR, 10th percentile"] < row["PSNR"] < 40, "in dB"


@pytest.mark.long
def test_two_processes_lose_what_one_loses_and_go_on_in_any_number(tmp_path):
    """Clipped norms, averages, Muon, the contrastive loss over all rows: alike."""
    script = ROOT / "tests/extras/two_processes.py"
    for start in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], []):
        subprocess.run([sys.executable, *start, str(script), str(tmp_path)], check=True)
    two, one = (torch.load(tmp_path / f"results{n}.pt", weights_only=True) for n in (2, 1))
    for name in train_toy.TOY:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
        assert two[name] == two[f"{name} resumed"], "two go on as two"
        assert one[f"{name} resumed"] == pytest.approx(two[name], rel=1e-5), "two go on as one"
        for key, w in two[f"{name} weights"].items():
            assert torch.equal(w, two[f"{name} resumed weights"][key]), f"{name}.{key}"
