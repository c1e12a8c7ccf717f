"""The golden files: other people's networks with made-up weights, and what came out of them.

Their weights and noise are functions of names; each file says in `about` and `source` what it is.
The layouts here are the original projects' own; extras/karlo.py reads those of Hugging Face's.
"""
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from extras import karlo

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
    """One golden file: config, weights (tensors in place of their shapes), inputs, outputs, noise.

    Inputs and outputs are attributes; Karlo's weights lose their prefix.
    """
    golden = torch.load(GOLDEN / name, weights_only=True)
    weights = {key.removeprefix("model."): fill(key, shape, **golden["fill"])
               for key, shape in golden["weights"].items()}
    return (golden["config"], weights, SimpleNamespace(**golden["inputs"]),
            SimpleNamespace(**golden["outputs"]), golden.get("noise"))


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


# ---------------------------------------------------------------- layouts, as tables of karlo.py
def rows(parts):
    """Rows that stand [head][q|k|v][c], as [q|k|v][head][c]. Heads are 16 wide in all files."""
    return lambda w: w.squeeze(-1).unflatten(0, (-1, parts, 16)).transpose(0, 1).flatten(0, 2)


GLIDE = [                                                            # its Transformer, Karlo's too
    ("ln_out", "final_ln"), (r"\btok\b", "token_embedding"), ("^pos", "positional_embedding"),
    ("^pad", "padding_embedding"), ("^blocks", "transformer.resblocks"), (r"\bln(\d)", r"ln_\1"),
    ("qkv", "attn.c_qkv", rows(3)), (r"(\d)\.proj", r"\1.attn.c_proj"), ("fc1", "mlp.c_fc"),
    ("fc2", "mlp.c_proj")]
PRIOR = GLIDE + [
    ("^(cov|empty_|mean|std).*", ""), ("^time", "time_embed"), ("hidden_in", "text_enc_proj"),
    ("text_in", "text_emb_proj"), ("image_in", "clip_img_proj"), (r"^out\b", "out_proj"),
    ("query", "prd_emb", torch.squeeze), ("^(pos.*)", r"\1", torch.squeeze)]
DECODER = [
    ("^(unet|empty_).*", ""), ("null_image", "cf_param"), ("image_emb", "clip_emb"),
    ("text_emb", "text_feat_proj"), ("hidden_in", "text_seq_proj.0"),
    ("hidden_ln", "text_seq_proj.1"),
    ("image_tokens", "clip_tok_proj", lambda w: torch.cat([w[token::4] for token in range(4)]))]


def adm(c, prefix=""):
    """The U-Net of guided-diffusion, GLIDE and Karlo. c: our configuration of it."""
    last = 2 if c.attention else 1                                   # res block, attention, last

    def place(match):
        """Blocks are numbered through all levels; resampling is a block only on the way down."""
        way, level, kind, number = match.groups()
        n = int(level) * (c.depth + 1) + int(number or c.depth)
        k = {"res": 0, "attn": 1, "resample": 0 if way == "down" else last}[kind]
        return f"input_blocks.{n + 1}.{k}" if way == "down" else f"output_blocks.{n}.{k}"

    return [
        (r"^(down|up)\.(\d+)\.(res|attn|resample)\b(?:\.(\d+))?", place), ("^time", "time_embed"),
        ("conv_in", "input_blocks.0.0"), ("norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_res1", "middle_block.0"), ("mid_attn", "middle_block.1"),
        ("mid_res2", f"middle_block.{last}"), ("norm1", "in_layers.0"), ("conv1", "in_layers.2"),
        (r"\bemb\b", "emb_layers.1"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
        ("skip", "skip_connection"), ("(qkv)", r"\1", rows(3)), ("context", "encoder_kv", rows(2)),
        (r"\bproj\b", "proj_out", lambda w: w.squeeze(-1)), ("^", prefix)]


def load(weights, *pairs):
    """Fill each (module, table) with others' weights, none of which may be left over."""
    weights = karlo.Content(weights, "the golden file")
    for module, table in pairs:
        ours = module.eval().state_dict()
        for name in ours:
            w, names = karlo.take(weights, table, name)
            if names:
                ours[name] = w
                del weights[names[0]]
        module.load_state_dict(ours)
    assert not weights, f"nothing takes {[*weights]}"
