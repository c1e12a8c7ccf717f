"""Numbers of openai/guided-diffusion: schedules, spacings, losses, whole sampling runs."""
import math
import zlib

import numpy as np
import pytest
import torch

import diffusion
from golden_weights import GOLDEN

LONG = ["cosine||eps|learned_range|1000", "linear||eps|learned_range|1000"]
SHORT = ["cosine|27|eps|learned_range|1000", "linear|ddim25|eps|learned_range|1000",
         "cosine|25|x0|fixed_small|1000", "cosine|7|eps|fixed_small|1000",
         "linear|15|eps|fixed_large|1000"]


def close(got, want, hint, tol=1e-6):
    """Equal to tol, relative to the largest number wanted where that exceeds 1."""
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert error <= tol, f"{hint}: off by {error:.1e}"


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "guided_diffusion_math.pt", weights_only=True)


@pytest.fixture(params=LONG + SHORT)
def case(request, golden):
    """One setting: numbers wanted, the inputs, and the table of its (perhaps shorter) process."""
    want = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for k, x in golden["outputs"][request.param].items()}
    full = diffusion.SCHEDULES[want["schedule"]](1000)
    timesteps = [1 + i for i in golden["timesteps"].get(want["respacing"], range(1000))]
    return want | {"name": request.param, "t": want["index"] + 1, "s": want["index"], "full": full,
                   "timesteps": timesteps, "short": full[[0] + timesteps],
                   "given": [x.double() for x in golden["inputs"].values()]}


def test_golden_schedules_and_spacings(golden):
    for name, schedule in diffusion.SCHEDULES.items():
        want = golden["schedules"][f"{name}_1000"]["alphas_cumprod"]
        close(schedule(1000)[1:], want, f"{name} schedule", 1e-12)
    for name, want in golden["timesteps"].items():
        got = (diffusion.glide27_timesteps() if name == "fast27"
               else list(range(1, 1001, -(-1000 // int(name[4:])))) if name.startswith("ddim")
               else diffusion.section_timesteps(1000, [int(n) for n in name.split(",")]))
        assert [t - 1 for t in got] == want, f"spacing {name}: theirs count from 0; half to even?"


def test_golden_losses(case, monkeypatch):
    (x0, _, noise, _), out = case["given"], case["loss_model_out"]
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    options = {"predicts": case["predicts"], "t": case["t"]}
    got = {"mse": diffusion.loss(lambda x_t, t: out[:, :3], case["short"], x0, **options)}
    if "vb" in case:
        got["loss"] = diffusion.loss(lambda x_t, t: out, case["short"], x0, **options)
        got["vb"] = got["loss"] - got["mse"]
        got["vb_bits"] = got["vb"] * 1000 / (len(case["short"]) - 1)
    for name in got:
        ratio = (1 + got[name]) / (1 + case[name])               # vb grows to thousands of bits
        close(ratio, torch.ones(5), f"{name} of {case['name']}: bits? weight? first step?")


@pytest.mark.parametrize("case", SHORT, indirect=True)
def test_golden_sampling_runs(case, golden, monkeypatch):
    """Whole runs on the *long* table over the kept timesteps: no other table is needed."""
    tag, shape, k = golden["noise"]["tag"], golden["noise"]["shape"], golden["config"]["stand_in"]

    def draw(i):
        seed = zlib.crc32(f"data:{tag}.{i}".encode())
        noise = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        return torch.from_numpy(noise).double()

    def network(x, t):
        out = torch.tanh(k["a"] * x + math.sin(k["b"] * (t - 1)))            # networks count from 0
        if case["variance"] == "learned_range":
            out = torch.cat([out, torch.cos(k["c"] * x + k["d"] * (t - 1))], dim=1)
        return out.float().double()                                          # as it was stored

    variance = case["variance"].split("_")[0 if case["variance"] == "learned_range" else 1]
    for name, options in {"p_sample_loop": {"variance": variance}, "ddim_loop": {"eta": 0}}.items():
        draws = iter(range(1, len(case["timesteps"]) + 1))
        monkeypatch.setattr(torch, "randn", lambda *_, **__: draw(next(draws)))  # noqa: B023
        got = diffusion.sample(network, case["full"], draw(0), case["timesteps"], clamp=1.0,
                               predicts=case["predicts"], **options)
        close(got, case[name], f"{name} of {case['name']}: one draw a step, the last unused")
