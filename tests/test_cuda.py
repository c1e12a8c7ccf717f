"""What only a GPU can show: the same pictures as on the CPU, bf16, the paper's full size.

Skipped without CUDA. The last ones need 80 GB and some minutes.
"""
import argparse
import copy
import gc
import math
from dataclasses import replace

import pytest
import torch

import diffusion
import train_toy
import unclip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CAPTIONS = ["a small red circle above a large blue square", "a large orange square"]
ROOM = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def draw(device, dtype=torch.float32, **options):
    model = unclip.load(unclip.HERE / "weights/toy.pt", device, dtype)
    text = model.encode_text(CAPTIONS)
    z_i = model.embed(text, generator=torch.Generator().manual_seed(0))
    x = model.draw(z_i, text, generator=torch.Generator().manual_seed(1), **options)
    return x.cpu().float()


def test_a_seed_is_the_same_picture_on_cpu_and_gpu():
    a, b = draw("cpu"), draw("cuda")
    assert (a - b).abs().mean() < 1e-3 and (a - b).abs().max() < 0.05


def test_bf16_is_close_to_float32():
    a, b = draw("cuda"), draw("cuda", torch.bfloat16)
    assert (a - b).abs().mean() < 0.05
    for x in b:                                          # and still says the same
        assert len(train_toy.read(x).things) in (1, 2)


def expect_no_waiting(step):
    """step() a first time, which may wait, and once more, where that is an error."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["diffusion_prior", "decoder", "upsampler1", "upsampler2"])
def test_a_step_of_sampling_does_not_wait_for_the_gpu(name):
    """What the loop does from one step to the next, with synchronising forbidden."""
    with torch.device("cuda"):
        part = unclip.PARTS[name](getattr(unclip.toy(), name)).eval()
    step, _ = unclip.sampling_work(name, part, unclip.toy().sampling, 2, "cuda", torch.float32)
    with torch.no_grad():
        expect_no_waiting(step)


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"variance": "large"}, {"variance": "learned"}])
def test_the_noise_between_two_steps_does_not_wait_for_the_gpu(options):
    """The whole loop, with a network that costs nothing."""
    alphabar, x = diffusion.cosine_alphabar(10), torch.zeros(2, 3, 64, 64, device="cuda")
    expect_no_waiting(lambda: diffusion.sample(lambda x, t: torch.cat([x, x], dim=1), alphabar, x,
                                               [2, 5, 10], clamp=1.0, **options))


@pytest.mark.parametrize("name", unclip.PARTS)
def test_a_step_of_training_does_not_wait_for_the_gpu(name):
    with torch.device("cuda"):
        part = unclip.PARTS[name](getattr(copy.deepcopy(unclip.toy()), name)).train()
    if name in ("decoder", "upsampler1", "upsampler2"):
        part.config.velocity = False                     # the paper's presets say eps
    loss = unclip.training_loss(name, part, 4, "cuda")
    expect_no_waiting(unclip.training_step(part, loss, "cuda", torch.bfloat16))


@pytest.mark.skipif(ROOM < 24e9, reason="needs 24 GB")
def test_the_paper_preset_draws_finite_pictures_of_1024_pixels_in_24_GB():
    model = unclip.build("paper", device="cuda", dtype=torch.bfloat16)
    model.tokenizer = unclip.load(unclip.HERE / "weights/toy.pt").tokenizer
    torch.cuda.reset_peak_memory_stats()
    x = model.sample(CAPTIONS[:1], prior_steps=2, decoder_steps=2, upsampler_steps=(2, 2),
                     generator=torch.Generator().manual_seed(0), progress=False)
    assert x.shape == (1, 3, 1024, 1024) and x.isfinite().all() and x.abs().max() <= 1
    assert torch.cuda.max_memory_allocated() < 24e9


@pytest.mark.parametrize("name", unclip.PARTS)
def test_a_step_of_training_at_full_size(name):
    gc.collect()                                         # what ran before may be tied up in itself
    torch.cuda.empty_cache()
    config = getattr(unclip.paper(), name)
    size = sum(w.numel() for w in unclip.build("paper", device="meta").parts[name].parameters())
    if ROOM < 24 * size:
        pytest.skip(f"needs {24 * size / 1e9:.0f} GB")
    with torch.device("cuda"):
        part = unclip.PARTS[name](config).train()
    unclip.recompute(part)
    loss = unclip.training_loss(name, part, 2, "cuda")
    zeros = [w for w in part.parameters() if not w.any()]             # weight decay leaves them so
    step = unclip.training_step(part, loss, "cuda", torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    step()
    assert all(w.isfinite().all() for w in part.parameters())
    assert any(w.any() for w in zeros), "the step moved nothing"
    step()                                               # with Adam's averages there
    counted = unclip.count(name, unclip.PARTS[name], config, argparse.Namespace(
        preset="paper", batch=2, train=True, recompute=True), torch.float32)[5]
    assert torch.cuda.max_memory_allocated() < counted + 4 * size, "and copies in bf16"


@pytest.mark.skipif(ROOM < 100e9, reason="needs 100 GB")
def test_eight_pictures_of_1024_pixels_are_enlarged_at_once():
    """Tensors of more than 2^31 numbers."""
    with torch.device("cuda"):
        part = unclip.PARTS["upsampler2"](unclip.paper().upsampler2).eval().to(torch.bfloat16)
    for w in part.parameters():
        if not w.any():
            torch.nn.init.normal_(w, std=0.02)
    part = unclip.channels_last(part)
    low = torch.rand(8, 3, 256, 256, device="cuda") * 2 - 1
    x = torch.randn(8, 3, 1024, 1024, device="cuda")
    with torch.no_grad():
        all_eight, last = part.denoiser(low)(x, 500), part.denoiser(low[7:])(x[7:], 500)
    assert (all_eight[7:] - last).abs().max() < 0.05 * last.abs().max()


def test_the_toy_trains(tmp_path):
    """A few steps of all six parts by the command, each after the ones before went to the CPU."""
    train_toy.main(["--device", "cuda", "--groups", "30", "--steps-scale", "0.0005", "--out",
                    str(tmp_path)])
    assert unclip.load(tmp_path / "toy.pt").parts["upsampler2"] is not None


def test_a_part_goes_on_where_it_was_stopped(tmp_path):
    """Saved after three of six steps and read back, as --resume does: on the CPU at first."""
    model, data = train_toy.set_up(argparse.Namespace(
        preset="toy", data=None, groups=100, seed=0, device="cuda", vocab=None))
    stage = replace(train_toy.STAGES["upsampler1"], steps=6, batch=4)
    state, file = {}, tmp_path / "state.pt"

    def save():
        torch.save(state, file)
        if state["step"] == 3:
            raise KeyboardInterrupt

    part = train_toy.make_part("upsampler1", model, data, 0)
    with pytest.raises(KeyboardInterrupt):
        train_toy.train("upsampler1", stage, part, data, 0, state, save, save_seconds=0.0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    part = train_toy.make_part("upsampler1", model, data, 0)
    train_toy.train("upsampler1", stage, part, data, 0, state, lambda: None)
    assert state["step"] == 6 and all(map(math.isfinite, state["losses"]))
