"""The U-Net's numbers in the projects that it comes from."""
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
