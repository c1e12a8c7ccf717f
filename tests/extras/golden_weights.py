"""The golden files: other people's networks with made-up weights, and what came out of them.

Their weights and noise are functions of names; each file says in `about` and `source` what it is.
The layouts here are the original projects' own; extras/karlo.py reads those of Hugging Face's.
"""
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


def fill(name, shape, gain=1.0, salt=""):
    """The weight of this name: gains near 1, biases near 0, the rest with std 1 / sqrt(fan-in)."""
    x = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(tuple(shape))
    if len(shape) == 0:
        x = math.log(1 / 0.07) + 0.1 * x                             # logit_scale
    elif len(shape) == 1:
        x = float(name.endswith("weight")) + 0.1 * x
    else:
        x = gain * x / math.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def data(name, *shape):
    """Noise number i of a sampling run is data(f"{tag}.{i}", *shape)."""
    x = np.random.RandomState(zlib.crc32(("data:" + name).encode())).standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32))


def read(name):
    """One golden file, with tensors in place of the weights' shapes."""
    golden = torch.load(GOLDEN / name, weights_only=True)
    golden["weights"] = {key: fill(key, shape, **golden["fill"])
                         for key, shape in golden["weights"].items()}
    return golden


def play(monkeypatch, noise, rows):
    """From now on torch.randn gives the draws of a golden sampling run, one after the other."""
    draws = iter(range(noise["draws"]))

    def randn(*shape, **_):
        x = data(f"{noise['tag']}.{next(draws)}", *noise["shape"])[:rows]
        assert tuple(x.shape) == tuple(torch.Size(shape[0] if len(shape) == 1 else shape))
        return x
    monkeypatch.setattr(torch, "randn", randn)


def error(got, want):
    """The largest difference, relative to the largest wanted value if that is above 1."""
    assert got.shape == want.shape, f"expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    return ((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1)).item()


def refill(module):
    """Random weights in every layer, those that start at zero included, the same every time."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(fill(name, p.shape))
    return module.eval()


# ---------------------------------------------------------------- layouts


def plain_rows(w, heads, parts):
    """Rows that stand [head][q|k|v][c], as [q|k|v][head][c]; parts is 3, or 2 for [k|v]."""
    return w.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)


def glide_transformer(weights, heads):
    """The Transformer of GLIDE and Karlo under our names; other keys are left out."""
    names = {"ln_1": "ln1", "attn.c_qkv": "qkv", "attn.c_proj": "proj", "ln_2": "ln2",
             "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
    ours = {}
    for key, w in weights.items():
        if match := re.fullmatch(r"(?:.*\.)?resblocks\.(\d+)\.(.*)\.(weight|bias)", key):
            n, layer, kind = match.groups()
            w = plain_rows(w, heads, 3) if layer == "attn.c_qkv" else w
            ours[f"blocks.{n}.{names[layer]}.{kind}"] = w
    return ours


RES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb",
       "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "skip"}
ATTENTION = {"norm": "norm", "qkv": "qkv", "encoder_kv": "context", "proj_out": "proj"}


def adm_unet(weights, depth, head_channels):
    """The U-Net of guided-diffusion, GLIDE and Karlo under our names; other keys are left out."""
    ours, flat = {}, {"time_embed.0": "time.0", "time_embed.2": "time.2", "out.0": "norm_out",
                      "input_blocks.0.0": "conv_in", "out.2": "conv_out"}
    for key, w in ((key, w) for key, w in weights.items() if "." in key):
        layer, kind = key.rsplit(".", 1)
        if layer in flat:
            ours[f"{flat[layer]}.{kind}"] = w
        elif match := re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(.*)", layer):
            side, n, rest = match[1], int(match[2]), match[3]
            place = ["mid_res1", "mid_attn", "mid_res2"][n] if side == "middle" else ""
            if side != "middle":
                k, rest = rest.split(".", 1)
                i, j = divmod(n - (side == "input"), depth + 1)
                name = "attn" if rest in ATTENTION else "res"
                resampling = name == "res" and (k != "0" or side == "input" and j == depth)
                way = "down" if side == "input" else "up"
                place = f"{way}.{i}.resample" if resampling else f"{way}.{i}.{name}.{j}"
            elif rest in RES and place == "mid_attn":                # no attention in this network
                place = "mid_res2"
            if rest in ("qkv", "encoder_kv"):
                parts = 3 if rest == "qkv" else 2
                w = plain_rows(w, w.shape[0] // parts // head_channels, parts)
            if rest in ATTENTION and rest != "norm" and kind == "weight":
                w = w.squeeze(2)                                     # a 1-D convolution
            ours[f"{place}.{(RES | ATTENTION)[rest]}.{kind}"] = w
    return ours
