"""The U-Net's numbers in the projects that it comes from, and BSR."""
import numpy as np
import torch
import torch.nn.functional as F

import clip
import decoder
import golden_weights
from golden_weights import error


def unet_of(c, **more):
    """The UNetConfig of an original configuration, which gives attention by shrinking factors."""
    size = c.get("image_size", 16)
    return decoder.UNetConfig(
        size=size, channels=c["model_channels"], mults=tuple(c["channel_mult"]),
        depth=c["num_res_blocks"], attention=tuple(size // k for k in c["attention_resolutions"]),
        head_channels=c["num_head_channels"], **more)


def test_the_unet_gives_the_numbers_of_guided_diffusion():
    golden = golden_weights.read("unet_adm.pt")
    c, w, inputs = golden["config"], golden["weights"], golden["inputs"]
    unet = decoder.UNet(unet_of(c)).eval()
    unet.load_state_dict(golden_weights.adm_unet(w, c["num_res_blocks"], c["num_head_channels"]))
    out = unet(inputs["x"], inputs["timesteps"] + 1, emb=w["label_emb.weight"][inputs["y"]])
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
    out = unet(inputs["x"], inputs["timesteps"] + 1, pooled, states)
    assert error(states, want["xf_out"]) < 2e-5, "no causal mask, padding vectors, erf GELU?"
    assert error(pooled, want["xf_proj"]) < 2e-5 and error(out, want["out"]) < 2e-5


# ---------------------------------------------------------------- BSR
def degrade(image, number):
    return decoder.bsr_degrade(image, np.random.default_rng(number))


def test_a_quarter_of_the_side_in_range_mildly_degraded_and_the_rng_decides():
    image = torch.ones(3, 256, 256)
    image[:, 40:140, 40:140] = torch.tensor([0.8, -0.8, -0.8])[:, None, None]
    image[:, 150:220, 120:230] = torch.tensor([-0.8, -0.6, 0.8])[:, None, None]
    before, clean = image.clone(), decoder.shrink(image[None], 64)[0]
    low = torch.stack([degrade(image, number) for number in range(40)])
    assert low.shape == (40, 3, 64, 64) and low.dtype == torch.float32 and low.abs().max() <= 1
    assert (low.amin((1, 2, 3)) < -0.7).all() and (low.amax((1, 2, 3)) > 0.9).all(), "the range?"
    rms = (low - clean).pow(2).mean((1, 2, 3)).sqrt()
    assert 0.02 < rms.median() < 0.2 and len(set(rms.tolist())) == 40, "each its own degradation"
    torch.manual_seed(2), np.random.seed(2)
    assert torch.equal(low[5], degrade(image, 5)), "some draw does not come from rng"
    assert torch.equal(image, before), "the caller's image was changed"
    assert degrade(torch.zeros(3, 64, 96), 0).shape == (3, 16, 24)


def test_colours_stay_and_nothing_drifts():
    """A half-pixel error would be 0.125 or 0.5 low-res pixels, always to the same side."""
    colour = torch.tensor([0.6, -0.2, -0.5])[:, None, None].expand(3, 128, 128)
    for number in range(20):
        moved = (degrade(colour, number) - colour[:, :32, :32]).mean((1, 2))
        assert moved.abs().max() < 4 / 127.5, f"moved by {moved}; R and B swapped, edges black?"

    def centre(x):                                   # of mass of a light object on black, in sides
        light, place = (x.mean(0) + 0.7).relu(), (torch.arange(x.shape[1]) + 0.5) / x.shape[1]
        return torch.stack([light.sum(1) @ place, light.sum(0) @ place]) / light.sum()
    i = torch.arange(128.0)
    blob = 2 * torch.exp(-((i[:, None] - 30.3) ** 2 + (i - 91.8) ** 2) / (2 * 7 ** 2)) - 1
    blob = blob.expand(3, 128, 128)
    drift = 32 * sum(centre(degrade(blob, number)) - centre(blob) for number in range(150)) / 150
    assert drift.abs().max() < 0.05, f"mean drift {drift} low-res pixels"
