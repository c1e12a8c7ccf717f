"""The U-Net's numbers in the projects that it comes from."""
import torch
import torch.nn.functional as F

import clip
import decoder
import golden_weights
from golden_weights import error


def unet_of(c, **more):
    """A U-Net of an original configuration, which gives attention by shrinking factors."""
    return decoder.UNet(decoder.UNetConfig(
        size=16, channels=c["model_channels"], mults=tuple(c["channel_mult"]),
        depth=c["num_res_blocks"], attention=tuple(16 // k for k in c["attention_resolutions"]),
        head_channels=c["num_head_channels"], **more))


def test_the_unet_gives_the_numbers_of_guided_diffusion():
    c, w, given, want, _ = golden_weights.read("unet_adm.pt")
    unet, emb = unet_of(c), w.pop("label_emb.weight")[given.y]
    golden_weights.load(w, (unet, golden_weights.adm(unet.config)))
    assert error(unet(given.x, given.timesteps + 1, emb=emb), want.out) < 2e-5, \
        "resampling before conv1, 1 + scale, GroupNorm eps, attention scale, cosines first?"


def test_the_unet_and_its_text_give_the_numbers_of_glide():
    c, w, given, want, _ = golden_weights.read("glide_text2im.pt")
    text = clip.CaptionEncoder(c["n_vocab"], c["text_ctx"], c["xf_width"], c["xf_layers"],
                               c["xf_heads"])
    unet = unet_of(c, context_width=c["xf_width"])
    proj = [w.pop(f"transformer_proj.{kind}") for kind in ("weight", "bias")]
    golden_weights.load(w, (text, golden_weights.GLIDE), (unet, golden_weights.adm(unet.config)))
    states = text(given.tokens, given.mask)
    pooled = F.linear(states[:, -1], *proj)
    out = unet(given.x, given.timesteps + 1, pooled, states)
    assert error(states, want.xf_out) < 2e-5, "no causal mask, padding vectors, erf GELU?"
    assert error(pooled, want.xf_proj) < 2e-5 and error(out, want.out) < 2e-5

