"""Numbers of openai/guided-diffusion: schedules, spacings, losses, whole sampling runs."""
import math

import pytest
import torch

import diffusion
import golden_weights
from golden_weights import error

GOLDEN = torch.load(golden_weights.GOLDEN / "guided_diffusion_math.pt", weights_only=True)
CASES = GOLDEN["outputs"]
RUNS = [name for name in CASES if "p_sample_loop" in CASES[name]]


def setting(name):
    """The numbers wanted, our table for 1..1000, and the timesteps that are kept."""
    timesteps = GOLDEN["timesteps"].get(CASES[name]["respacing"], range(1000))
    return (CASES[name], diffusion.SCHEDULES[CASES[name]["schedule"]](1000),
            [i + 1 for i in timesteps])                              # theirs count from 0


def test_golden_schedules_and_spacings():
    for name, schedule in diffusion.SCHEDULES.items():
        want = GOLDEN["schedules"][f"{name}_1000"]["alphas_cumprod"]
        assert error(schedule(1000)[1:], want) < 1e-12, f"{name} schedule"
    for name, want in GOLDEN["timesteps"].items():
        got = (diffusion.glide27_timesteps() if name == "fast27"
               else list(range(1, 1001, -(-1000 // int(name[4:])))) if name.startswith("ddim")
               else diffusion.section_timesteps(1000, [int(n) for n in name.split(",")]))
        assert [t - 1 for t in got] == want, f"spacing {name}: theirs count from 0; half to even?"


@pytest.mark.parametrize("name", CASES)
def test_golden_losses(name, monkeypatch):
    """On the table of the kept timesteps alone."""
    (want, alphabar, timesteps), inputs = setting(name), GOLDEN["inputs"]
    short, out = alphabar[[0] + timesteps], want["loss_model_out"].double()
    monkeypatch.setattr(torch, "randn_like", lambda x: inputs["noise"].double())

    def loss(out):
        return diffusion.loss(lambda x_t, t: out, short, inputs["x0"].double(), want["predicts"],
                              want["index"] + 1)
    got = {"mse": loss(out[:, :3])}
    if "vb" in want:
        got["loss"] = loss(out)
        got["vb"] = got["loss"] - got["mse"]
        got["vb_bits"] = got["vb"] * 1000 / len(timesteps)
    for key in got:                                                  # up to thousands of bits
        off = error((1 + got[key]) / (1 + want[key].double()), torch.ones(5))
        assert off < 1e-6, f"{key} of {name}: bits? weight? first step?"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_loop"])
def test_golden_sampling_runs(name, loop, monkeypatch):
    """Whole runs on the *long* table over the kept timesteps: no other table is needed."""
    (want, alphabar, timesteps), k = setting(name), GOLDEN["config"]["stand_in"]
    learned = want["variance"] == "learned_range"

    def network(x, t):
        out = torch.tanh(k["a"] * x + math.sin(k["b"] * (t - 1)))            # networks count from 0
        if learned:
            out = torch.cat([out, torch.cos(k["c"] * x + k["d"] * (t - 1))], dim=1)
        return out.float().double()                                          # as it was stored

    variance = "learned" if learned else want["variance"].removeprefix("fixed_")
    options = {"variance": variance} if loop == "p_sample_loop" else {"eta": 0}
    golden_weights.play(monkeypatch, GOLDEN["noise"] | {"draws": len(timesteps) + 1}, 5)
    x_T = torch.randn(5, 3, 4, 4).double()
    got = diffusion.sample(network, alphabar, x_T, timesteps, clamp=1.0,
                           predicts=want["predicts"], **options)
    assert error(got, want[loop]) < 1e-6, "one draw a step, the last unused"
