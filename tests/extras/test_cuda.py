"""What only a GPU can show: the CPU's images, bf16, training, the paper's full size.

Skipped without CUDA. `extras/benchmark.py acceptance` runs it, and trains the parts at full size.
"""
from dataclasses import replace

import pytest
import torch

import diffusion
import train_toy
import unclip
from extras import benchmark

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CAPTIONS = ["a small red circle above a large blue square", "a large orange square"]
ROOM = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def load(device, dtype=torch.float32, **options):
    return unclip.load(unclip.HERE / "weights/toy.pt", device, dtype, **options)


def images(model, seed=0, **options):
    """On the CPU, drawn with exact float32 products."""
    with benchmark.float32_as_tf32(False):
        return model.sample(CAPTIONS, generator=torch.Generator().manual_seed(seed),
                            progress=False, **options).cpu().float()


@pytest.fixture(scope="module")
def on_cpu():
    return images(load("cpu"))


def test_a_seed_gives_the_same_images_as_on_the_cpu(on_cpu):
    apart = (on_cpu - images(load("cuda"))).abs()
    assert apart.mean() < 1e-3 and apart.max() < 0.05
    other = (on_cpu - images(load("cuda"), seed=1)).abs()
    assert other.mean() > 20 * apart.mean(), "another seed must be told from the same one"


def test_the_autoregressive_prior_gives_the_same_codes_as_on_the_cpu():
    z_i = []
    for device in ("cpu", "cuda"):
        model = load(device)
        z_i.append(model.sample_prior(model.encode_text(CAPTIONS), "ar",
                                      generator=torch.Generator().manual_seed(0)).cpu())
    assert torch.allclose(*z_i, atol=1e-4)


def test_low_memory_gives_the_same_images_and_keeps_one_part_on_the_gpu(on_cpu):
    model = load("cuda", low_memory=True)
    assert (on_cpu - images(model)).abs().max() < 0.05
    there = [name for name, part in model.parts.items() if next(part.parameters()).is_cuda]
    assert there == ["upsampler2"], "the last part that worked"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shows_the_same_objects(dtype, on_cpu):
    x = images(load("cuda", dtype))
    assert (on_cpu - x).abs().mean() < 0.05
    for caption, image in zip(CAPTIONS, x):
        assert train_toy.agrees(train_toy.parse(caption), train_toy.read(image))


def test_an_image_on_the_gpu_comes_back_from_its_latent(on_cpu):
    model = load("cuda")
    z_i, x_T = model.latent(on_cpu)
    assert z_i.is_cuda and x_T.is_cuda
    small = model.decode_latent(z_i, x_T, guidance=1.0, upsampler_steps=()).cpu()
    expected = torch.nn.functional.interpolate(on_cpu, small.shape[2:], mode="area")
    assert (small - expected).abs().mean() < 0.05


def without_waiting(step):
    """step() once, which may wait, and again, where waiting for the GPU is an error."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["diffusion_prior", "decoder", "upsampler1", "upsampler2"])
def test_a_sampling_step_does_not_wait_for_the_gpu(name):
    part = unclip.build_part(unclip.PARTS[name], getattr(unclip.toy(), name), "cuda")
    step, _ = benchmark.sampling_step(name, part, unclip.toy().sampling, 2)
    with torch.no_grad():
        without_waiting(step)


@pytest.mark.parametrize("options", [{"eta": 1.0}, {"variance": "large"}, {"variance": "learned"}])
def test_the_noise_between_two_steps_does_not_wait_for_the_gpu(options):
    alphabar, x = diffusion.cosine_alphabar(10), torch.zeros(2, 3, 64, 64, device="cuda")
    without_waiting(lambda: diffusion.sample(lambda x, t: torch.cat([x, x], dim=1), alphabar, x,
                                             [2, 5, 10], clamp=1.0, **options))


@pytest.mark.parametrize("name", unclip.PARTS)
def test_a_training_step_reaches_all_weights_and_does_not_wait_for_the_gpu(name):
    config = getattr(unclip.toy(), name)
    if name in ("decoder", "upsampler1", "upsampler2"):
        config = replace(config, predicts="eps")         # as at the paper's size
    part = unclip.build_part(unclip.PARTS[name], config, "cuda").train()
    benchmark.switched(benchmark.fill_zeros(part), torch.bfloat16)
    loss, step = benchmark.training_loss(name, part, 8), benchmark.trainer(part)
    before = [w.detach().clone() for w in part.parameters()]
    without_waiting(lambda: step(loss))
    for (key, w), old in zip(part.named_parameters(), before):
        assert w.isfinite().all() and not torch.equal(w, old), key
        assert w.grad.any() or key.endswith("pad"), key  # in 8 rows perhaps no caption is dropped


def test_the_toy_trains_by_the_command_and_resumes(tmp_path):
    """A few steps of all six parts; then the finished run is resumed."""
    source = train_toy.World(30)
    settings = train_toy.Settings(out=str(tmp_path), device="cuda", steps_scale=0.003, batch=8)
    for resume in (False, True):
        train_toy.run(source, replace(settings, resume=resume))
    model = unclip.load(tmp_path / "toy.pt", "cuda")
    assert model.sample(CAPTIONS, rerank=1, progress=False).isfinite().all()


def test_a_part_goes_on_where_it_was_stopped(tmp_path):
    """Six steps, and the last three of them again, from what was saved after the third."""
    recipe, ends = replace(train_toy.TOY["decoder"], steps=6, batch=4, whitened=False), []
    state = None
    for start in (0, 3):
        torch.manual_seed(0)
        part = unclip.build_part(unclip.PARTS["decoder"], unclip.toy().decoder, "cuda")
        loss = benchmark.training_loss("decoder", part, 4)

        def save(state):
            torch.save(state, tmp_path / f"{start} {len(state['losses'])}.pt")

        losses = train_toy.train(part, recipe, lambda progress: loss(), state=state, save=save,
                                 save_seconds=0)
        ends.append(part.state_dict())
        state = torch.load(tmp_path / "0 3.pt", weights_only=True, map_location="cpu")
        assert len(losses) == 6 and len(state["losses"]) == 3
    assert not (tmp_path / "3 3.pt").exists() and (tmp_path / "3 4.pt").exists()
    for key, w in ends[0].items():
        assert torch.allclose(w, ends[1][key], atol=1e-4), key


@pytest.mark.skipif(ROOM < 24e9, reason="needs 24 GB")
def test_the_paper_preset_draws_finite_images_of_1024_pixels_in_24_gb():
    model = unclip.build("paper", "cuda", torch.bfloat16)
    model.tokenizer = load("cpu").tokenizer
    torch.cuda.reset_peak_memory_stats()
    x = model.sample(CAPTIONS[:1], prior_steps=2, decoder_steps=2, upsampler_steps=(2, 2),
                     progress=False, generator=torch.Generator().manual_seed(0))
    assert x.shape == (1, 3, 1024, 1024) and x.isfinite().all() and x.abs().max() <= 1
    assert torch.cuda.max_memory_allocated() < 24e9


@pytest.mark.skipif(ROOM < 60e9, reason="needs 60 GB")
def test_eight_images_of_1024_pixels_are_enlarged_as_one_is():
    """Tensors of more than 2^31 numbers."""
    part = unclip.build_part(unclip.PARTS["upsampler2"], unclip.paper().upsampler2, "cuda",
                             torch.bfloat16)
    benchmark.fill_zeros(part)
    x, large = torch.randn(8, 3, 1024, 1024, device="cuda"), torch.rand(8, 3, 1024, 1024).cuda()
    with torch.no_grad():
        eight, one = part(x, 500, large), part(x[7:], 500, large[7:])
    assert (eight[7:] - one).abs().max() < 0.05 * one.abs().max()
