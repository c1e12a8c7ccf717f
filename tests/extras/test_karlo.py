"""Public weights: Karlo's numbers, and files that others wrote, read without running any code.

tests/golden/karlo_diffusers_tiny is a complete Karlo folder in small, saved by diffusers, with what
the pipeline made of it. The true weights are not here; their names and shapes are.
"""
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import decoder
import golden_weights
import unclip
from conftest import seed
from extras import karlo
from golden_weights import GOLDEN, error

FOLDER = GOLDEN / "karlo_diffusers_tiny"
VOCAB = str(GOLDEN / "bpe_toy.txt.gz")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return unclip.load(FOLDER)


@pytest.fixture(scope="module")
def expected():
    return torch.load(FOLDER / "expected.pt", weights_only=True)


@pytest.fixture
def folder(tmp_path):
    """A copy of the Karlo folder, to be damaged."""
    return shutil.copytree(FOLDER, tmp_path / "karlo")


def refused(match, load, *args, kind=ValueError):
    """It is refused, in one sentence."""
    with pytest.raises(kind, match=match) as refusal:
        load(*args)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- the three networks
def texts(model, mask, z_t, states):
    """A golden file's captions; and their first half, whose null condition is the rest."""
    text, rows = clip.Text(torch.zeros(mask.shape).long(), mask, z_t, states), len(mask) // 2
    model.null = lambda _: text.map(lambda x: x[rows:])
    return text, text.map(lambda x: x[:rows])


def test_the_prior_gives_karlos_numbers(monkeypatch):
    c, w, given, want, noise = golden_weights.read("karlo_prior.pt")
    model = karlo.KarloPrior(karlo.KarloPriorConfig(
        embed_dim=c["clip_dim"], context=c["text_ctx"], text_width=c["clip_dim"],
        width=c["xf_width"], layers=c["xf_layers"], heads=c["xf_heads"], clamp=c["clip_x0"]))
    golden_weights.load(w, (model, golden_weights.PRIOR))
    model.mean[:], model.std[:] = given.clip_mean, given.clip_std

    text, half = texts(model, given.mask, given.text_emb, given.text_enc)
    assert error(model(given.x, given.timesteps + 1, text), want.model) < 2e-5, \
        "erf GELU, masks, positions, order?"
    golden_weights.play(monkeypatch, noise, rows=2)
    z = model.sample(half, steps=25, guidance=c["guidance"], candidates=1)
    assert error(z, want.sample) < 5e-5, "25 evenly spaced timesteps, clamp, mean?"
    assert torch.allclose(model.scale(model.unscale(z)), z, atol=1e-5)


def test_the_decoder_gives_karlos_numbers(monkeypatch):
    """To 1e-4, but for a few pixels: at t = T the original's own rounding (x0 = (x - eps) / 5e-5)
    is worth that much; the same run in float64 shows it."""
    c, w, given, want, noise = golden_weights.read("karlo_decoder.pt")
    unet = decoder.UNetConfig(
        size=64, channels=c["num_channels"], mults=tuple(c["mults"]), depth=c["num_res_blocks"],
        head_channels=c["num_head_channels"], context_width=c["xf_width"],
        attention=tuple(64 // k for k in c["attention_ds"]))
    model = karlo.KarloDecoder(karlo.KarloDecoderConfig(
        unet, embed_dim=c["clip_dim"], context=c["text_ctx"], text_width=c["clip_dim"]))
    golden_weights.load(w, (model.unet, golden_weights.adm(unet)), (model, golden_weights.DECODER))
    unet.size = c["pixels"]                                          # a U-Net does not mind

    text, half = texts(model, given.mask, given.txt_feat, given.txt_feat_seq)
    assert error(model(given.x, given.timesteps + 1, given.y, text), want.model) < 2e-5, \
        "image tokens first, context keys first, padding hidden, text in the time embedding?"
    golden_weights.play(monkeypatch, noise, rows=2)
    x = model.sample(given.img_feat, half, steps=5, guidance=c["guidance"])
    off = (x - want.sample).abs()
    assert (off > 1e-4).float().mean() < 0.02 and off.max() < 2e-3, \
        "eps guided and not v, the learned null embedding, learned range, clamp?"


def test_the_upsampler_gives_karlos_numbers(monkeypatch):
    c, w, given, want, noise = golden_weights.read("karlo_sr.pt")
    unet = decoder.UNetConfig(
        size=24, in_channels=6, out_channels=3, channels=c["channels"], depth=c["depth"],
        mults=tuple(c["channels_multiple"]), scale_shift=False)
    model = karlo.KarloUpsampler(decoder.UpsamplerConfig(unet))
    golden_weights.load(w, (model.unet, golden_weights.adm(unet, "model_first_steps.")),
                        (model.last, golden_weights.adm(unet, "model_last_step.")))

    t, large = given.timesteps + 1, decoder.enlarge(given.low, 24)
    assert error(large, given.low_up) < 2e-5, "bicubic with antialias=True, after the clamp?"
    assert error(model(given.x, t, large), want.first) < 2e-5, "noisy image first?"
    assert error(model.last(torch.cat([given.x, given.low_up], dim=1), t), want.last) < 2e-5
    golden_weights.play(monkeypatch, noise, rows=2)
    assert error(model.sample(given.low, steps=7), want.sample) < 1e-4, \
        "small variance, clamp, the second network at the last step only?"


# ---------------------------------------------------------------- the tiny Karlo folder
def test_the_tiny_karlo_does_what_the_pipeline_does(model, expected, monkeypatch):
    """Captions (one is too long) to images with one seeded generator; every draw is checked."""
    c, want, draws, randn = expected["config"], expected["f64_tables"], [], torch.randn
    tokens = model.tokenizer(c["prompts"], 14, truncate=True)
    text = clip.Text(tokens, clip.token_mask(tokens, model.tokenizer.end),
                     *model.parts["clip"].encode_text(tokens))
    for one, kind in ((text, "cond"), (model.no_caption(2).map(lambda x: x[:1]), "uncond")):
        ids, mask, z_t, states = (expected["text"][f"{kind}_{name}"]
                                  for name in ("ids", "mask", "embeds", "hidden"))
        assert torch.equal(one.tokens, ids) and torch.equal(one.mask, mask.bool()), "pad with 0?"
        assert error(one.z_t, z_t) < 2e-5 and error(one.states, states) < 2e-5, "2 heads?"

    def noted(*args, **kwargs):
        draws.append(randn(*args, **kwargs))
        return draws[-1]
    monkeypatch.setattr(torch, "randn", noted)
    generator = seed(c["seed"])
    z_i = model.sample_prior(text, "diffusion", c["guidance"][0], c["steps"][0],
                             generator=generator)
    small = model.sample_decoder(z_i, text, c["guidance"][1], c["steps"][1], generator)
    x = model.upsample(small, (c["steps"][2],), generator)
    assert [[*d.shape] for d in draws] == expected["draws"]["shapes"]
    first = torch.stack([d.flatten()[:4] for d in draws])
    assert torch.allclose(first, expected["draws"]["first4"])
    assert error(z_i, want["image_embeds"]) < 1e-4, "clamp 5, mean and std, null text of 2 tokens?"
    assert error(small, want["image_small"]) < 1e-3
    assert error(x.permute(0, 2, 3, 1) / 2 + 0.5, want["images"]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_gives_nearly_the_same_embedding(model, dtype):
    half = unclip.load(FOLDER, dtype=dtype)
    assert {p.dtype for part in half.parts.values() if part for p in part.parameters()} == {dtype}
    z = [m.sample_prior(m.encode_text(["a red circle"]), guidance=1.0, steps=5, generator=seed())
         for m in (model, half)]
    assert error(z[1], z[0]) < 0.1
    assert half.sample(["a"], generator=seed(), prior_steps=2, decoder_steps=2,
                       progress=False).isfinite().all()


def test_a_saved_karlo_comes_back_with_its_classes_and_its_null_condition(model, tmp_path):
    model.save(tmp_path / "karlo.pt")
    again = unclip.load(tmp_path / "karlo.pt")
    assert again.config == model.config
    few = dict(prior_steps=2, decoder_steps=2, upsampler_steps=(2,), progress=False)
    assert torch.equal(*(m.sample(["a red circle"], generator=seed(), **few)
                         for m in (model, again)))


# ---------------------------------------------------------------- full size
@pytest.mark.parametrize("part, where, table, keys, parameters, others", [
    ("prior", "diffusion_prior", karlo.PRIOR, 338, 1_022_030_080, {"cov", "empty"}),
    ("decoder", "decoder.unet", karlo.UNET, 716, 885_439_686, set()),
    ("text_proj", "decoder", karlo.TEXT_PROJ, 11, 7_878_400, {"unet", "empty"}),
    ("super_res_first", "upsampler1.unet", karlo.UNET, 408, 691_579_523, set()),
    ("super_res_last", "upsampler1.last", karlo.UNET, 408, 691_579_523, set()),
    ("text_encoder", "clip", [("^(image|logit).*", ""), *karlo.HUGGING_FACE], 197, 123_650_304,
     {"image", "logit"}),
    ("image_encoder", "clip", [("^(text|logit).*", ""), *karlo.HUGGING_FACE], 392, 303_966_208,
     {"text", "logit"}),
    ("ViT-L-14.pt", "clip", karlo.OPENAI, 446, 427_616_513, set())])
def test_at_full_size_every_published_key_is_used_once_and_every_weight_filled(
        part, where, table, keys, parameters, others):
    name, *within = where.split(".")
    module = unclip.build_part(karlo.CLASSES[name], getattr(karlo.PRESET, name), "meta")
    module = module.get_submodule(".".join(within))
    names = json.loads((GOLDEN / "full_size_keys.json").read_text())
    shapes, = (shapes for key, shapes in names.items() if key.rsplit("/", 1)[1] == part)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

    renamed = karlo.rename(module, table, karlo.Content(weights, part))
    used = [key for name in renamed for key in karlo.their_names(table, name)[0]]
    assert len(used) == len(set(used)) == len(weights) == keys
    assert sum(w.numel() for w in renamed.values()) == parameters
    left = {name.split("_")[0].split(".")[0] for name in module.state_dict() if name not in renamed}
    assert left == others, "nothing fills it"


def openai_names(model):
    return {karlo.their_names(karlo.OPENAI, ours)[0][0]: w
            for ours, w in model.state_dict().items()}


@pytest.mark.parametrize("sizes, parameters", [
    ((512, 224, 32, 768, 12, 12, 49408, 77, 512, 12, 8), 151_277_313),
    ((512, 224, 16, 768, 12, 12, 49408, 77, 512, 12, 8), 149_620_737),
    ((768, 224, 14, 1024, 24, 16, 49408, 77, 768, 12, 12), 427_616_513),
    ((768, 336, 14, 1024, 24, 16, 49408, 77, 768, 12, 12), 427_944_193),
    ((1024, 224, 14, 1280, 32, 16, 49408, 77, 1024, 24, 16), None)])       # open_clip's alone
def test_openais_archives_are_told_from_open_clips_state_dicts_of_the_same_shapes(
        sizes, parameters, monkeypatch):
    """Both have the same names; open_clip's may be trained with gelu, or with other heads."""
    with torch.device("meta"):
        model = clip.CLIP(clip.CLIPConfig(*sizes))
    weights = openai_names(model)
    assert parameters in (None, sum(w.numel() for w in weights.values()))
    monkeypatch.setattr(karlo, "read_weights", lambda path: karlo.Content(weights, path))
    monkeypatch.setattr(karlo, "fill", lambda kind, config, *_: config)
    refused("x.pt is not OpenAI's own.*gelu.*config.json", karlo.load_clip, "x.pt")
    weights |= dict.fromkeys(NUMBERS, torch.tensor(1))
    if parameters:
        assert karlo.load_clip("x.pt") == model.config
    else:
        refused("x.pt is not OpenAI's own", karlo.load_clip, "x.pt")


# ---------------------------------------------------------------- files of weights
def with_header(header, data=b"", pad=0):
    """The bytes of a safetensors file, as its specification says."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    header += b" " * (-len(header) % 8 + pad)
    return struct.pack("<Q", len(header)) + header + data


def save(weights, path, pad=0):
    """torch.save, or a safetensors file."""
    if path.suffix != ".safetensors":
        torch.save(weights, path)
        return path
    names = {dtype: name for name, dtype in karlo.DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, x in weights.items():
        raw = bytes(x.contiguous().flatten().view(torch.uint8).tolist()) if x.numel() else b""
        header[key] = {"dtype": names[x.dtype], "shape": [*x.shape],
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(with_header(header, data, pad))
    return path


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_safetensors_of_every_kind_come_back_mapped_and_the_file_does_not_change(tmp_path, pad):
    """Also a scalar, an empty one, and tensors at addresses their numbers cannot be read from."""
    tensors = {name: (torch.arange(-3, 3).view(2, 3) * 1.25).to(dtype)
               for name, dtype in karlo.DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
                "byte": torch.tensor([7]).byte(), "after": torch.randn(3, 2)}
    path = save(tensors, tmp_path / "x.safetensors", pad)
    before, got = path.read_bytes(), karlo.read_weights(path)
    assert set(got) == set(tensors)
    for name, x in tensors.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name
    assert got["U8"].untyped_storage().data_ptr() == got["byte"].untyped_storage().data_ptr()
    got["byte"] += 1
    assert got["byte"] == 8 and path.read_bytes() == before

    big = torch.ones(2 ** 19)
    big[-1] = torch.inf
    refused("big is not finite", karlo.read_weights, save({"big": big}, path, pad))


LOADING = """
import dataclasses, sys, torch
from extras import karlo
def memory(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
def model(config):
    return torch.nn.ParameterDict({f"w{n}": torch.empty(2 ** 21) for n in range(10)})
nothing, dtype = dataclasses.make_dataclass("Nothing", [])(), getattr(torch, sys.argv[2])
torch.ones(2 ** 21).to(torch.bfloat16).aminmax()                 # warms up
open("/proc/self/clear_refs", "w").write("5")                    # the highest begins anew
own, rss = memory("RssAnon"), memory("VmRSS")
model = karlo.fill(model, nothing, {"": ([], karlo.read_weights(sys.argv[1]))}, "cpu", dtype)
highest = memory("VmHWM") - rss
assert sum(w.sum() for w in model.values()) == 0                 # every page is touched
print(memory("RssAnon") - own, highest)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux's /proc")
@pytest.mark.parametrize("dtype, own, most", [("bfloat16", 40, 80 + 40 + 16), ("float32", 0, 16)])
def test_loading_takes_the_memory_of_what_is_converted_and_no_more(tmp_path, dtype, own, most):
    """Ten weights of 8 MB, mapped, become bf16 one by one; what stays float32 is not even there."""
    path = tmp_path / "x.safetensors"
    entries = {f"w{n}": dict(dtype="F32", shape=[2 ** 21], data_offsets=[n << 23, n + 1 << 23])
               for n in range(10)}
    path.write_bytes(with_header(entries, bytes(10 << 23)))
    out = subprocess.run([sys.executable, "-c", LOADING, path, dtype], capture_output=True,
                         text=True, check=True, cwd=unclip.HERE,     # freed memory is given back
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}).stdout
    of_its_own, highest = map(float, out.split())
    assert abs(of_its_own - own) < 8
    assert highest < most, "the pages of what is converted, bf16, and a weight or two"


class Trap:
    def __reduce__(self):
        return eval, ("open('trapped', 'w').close()",)


def saved(content, **options):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive_of(data):
    """A TorchScript archive whose data are this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/constants.pkl", b""), archive.writestr("x/data.pkl", data)
    return file.getvalue()


def entry(**changes):
    """A safetensors file of two numbers, or what changes make of it."""
    return with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes},
                       bytes(8))


GOOD, TRAP = entry(), {"w": torch.ones(2), "x": Trap()}
SAFETENSORS = [
    *((data, "") for data in (
        b"", GOOD[:5], GOOD[:30], b"\xff" * 8 + GOOD[8:], struct.pack("<Q", 10 ** 8) + GOOD[8:],
        entry(shape="2"), entry(shape=None), entry(data_offsets=[0]), entry(data_offsets=[0, 8.0]),
        with_header(b"[]"), with_header(b"{{{{"), with_header({"a": 1}), with_header(b'"\xff"'))),
    (GOOD[:-1], "a is said to be .*0..8.* end at 7; is it cut short"),
    (GOOD + b"x", "it goes on for 1 bytes after its last tensor"),
    (GOOD[:-4] + struct.pack("<f", float("nan")), "a is not finite"),
    (entry(dtype="F99"), ".*F99"), (entry(dtype="F64"), r"a is .*float64 \[2\] at 0..8"),
    (entry(shape=[3]), r"a is .* \[3\]"), (entry(shape=[-2]), r"a is .* \[-2\]"),
    (entry(data_offsets=[8, 16]) + bytes(8), "a is .*at 8..16, but the data go on at 0"),
    (entry(data_offsets=[-8, 0]), "a is .*at -8..0"), (entry(data_offsets=[0, 80]), "a is .*80"),
    (entry(data_offsets=[0, 80], shape=[20]), "a is .*at 0..80.* end at 8")]


@pytest.mark.parametrize("name, data, says", [
    *(("bad.safetensors", data, "cannot be read as a safetensors file of weights.*: " + says)
      for data, says in SAFETENSORS),
    *(("bad.bin", data, "cannot be read as .*: it holds more than tensors") for data in (
        saved(TRAP), saved(TRAP, _use_new_zipfile_serialization=False),
        archive_of(pickle.dumps(Trap())))),
    *(("bad.bin", data, "cannot be read as a file of weights") for data in (
        saved(torch.ones(2)), saved({"state_dict": {"w": 1}}), saved({"w": 1}),
        saved({"w": torch.ones(1000)})[:2000], b"PK\x03\x04junk", b"",
        pickle.dumps([1, 2], protocol=2))),
    ("bad.bin", b"not a checkpoint", "cannot be read as")])
def test_a_damaged_file_and_one_that_holds_more_than_weights_are_refused(
        tmp_path, monkeypatch, name, data, says):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    refused(f"^{name} {says}", karlo.read_weights, name)
    assert not Path("trapped").exists(), "the file's code was run"


def module_of(weights):
    """A TorchScript module in which weights may hang under any name; lists are no weights."""
    root = torch.nn.Module()
    root.sizes, root.shares, root.flags = [1, 2], [0.5], [True]
    for key, w in weights.items():
        place, (*path, name) = root, key.split(".")
        for part in path:
            place = place._modules.setdefault(part, torch.nn.Module())
        place.register_buffer(name, w)
    return root


class Restless(torch.nn.Module):
    """A TorchScript module that runs something when it is loaded."""

    @torch.jit.export
    def __getstate__(self):
        return self.training, 1

    @torch.jit.export
    def __setstate__(self, state: tuple[bool, int]):
        self.training = state[0]
        print("I was run")


def archive(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # TorchScript is old
        torch.jit.script(module).save(str(path))
    return path


NUMBERS = {"input_resolution": 28, "context_length": 16, "vocab_size": 100}


def openai_archive(weights, path):
    """As OpenAI published CLIP: half the weights in half precision, three numbers among them."""
    halved = {key: w.half() if w.ndim > 1 and "embedding" not in key else w
              for key, w in weights.items()}
    return archive(module_of(halved | {key: torch.tensor(n) for key, n in NUMBERS.items()}), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archives_code_is_not_run_and_its_lists_are_no_weights(tmp_path, capfd):
    torch.jit.load(str(archive(Restless(), tmp_path / "bad.pt")))
    assert "I was run" in capfd.readouterr().out, "the trap should work at all"
    refused("bad.pt cannot be read as .*more than tensors", karlo.read_weights, tmp_path / "bad.pt")
    assert "I was run" not in capfd.readouterr().out
    w = torch.arange(6.0).view(2, 3).t()
    path = archive(module_of({"a.w": w, "n": torch.tensor(2)}), tmp_path / "x.pt")
    got = karlo.read_weights(path)
    assert torch.equal(got["a.w"], w) and got.keys() == {"a.w", "n"}


# ---------------------------------------------------------------- CLIP and its tokenizer
def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def clip_folder(path, weights, settings, *names):
    """A Hugging Face folder, its weights in one file, or in several with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    where = {key: names[i % len(names)] for i, key in enumerate(sorted(weights))}
    for name in names:
        save({key: w for key, w in weights.items() if where[key] == name}, path / name)
    if len(names) > 1:
        name, variant, kind = re.fullmatch(r"(.*)-1(\.fp16)?\.(.*)", names[0]).groups("")
        index = f"{name}.{kind}.index{variant}.json"                 # as diffusers names it
        (path / index).write_text(json.dumps({"weight_map": where}))
    return path


def image_folder(path, columns=48, **settings):
    """The image half of the golden CLIP alone, with embeddings of so many numbers."""
    c, w, *_ = golden_weights.read("clip_transformers.pt")
    w = {key: x for key, x in w.items() if key.startswith(("vision_model", "visual_"))}
    w["visual_projection.weight"] = w["visual_projection.weight"][:columns].clone()
    return clip_folder(path, w, c["vision_config"] | settings, "model.safetensors")


def prefixed(weights, prefix):
    return {prefix + key: w for key, w in weights.items()}


OWN = {"model_type": "clip", "text_config": {"num_attention_heads": 2},
       "vision_config": {"num_attention_heads": 3}}


@pytest.mark.parametrize("kind, write", [
    ("openai", lambda w, c, p: openai_archive(w, p / "half.pt")),
    ("openai", lambda w, c, p: save(w, p / "x.pt")),
    ("openai", lambda w, c, p: save(w, p / "x.safetensors")),
    ("openai", lambda w, c, p: save(prefixed(w, "module._orig_mod."), p / "x.pt")),
    ("openai", lambda w, c, p: save({"epoch": 3, "state_dict": prefixed(w, "module.")}, p / "x")),
    ("openai", lambda w, c, p: clip_folder(p, w, OWN, "pytorch_model.bin")),
    *(("transformers", lambda w, c, p, names=names: clip_folder(p, w, c, *names.split()))
      for names in ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors",
                    "model-1.safetensors model-2.safetensors",
                    "model-1.fp16.safetensors model-2.fp16.safetensors",
                    "pytorch_model-1.bin pytorch_model-2.bin"))])
def test_each_kind_of_clip_file_gives_the_numbers_of_the_original(kind, write, tmp_path):
    c, w, given, want, _ = golden_weights.read(f"clip_{kind}.pt")
    path = write(w, c, tmp_path)
    model, half = karlo.load_clip(path), path.name == "half.pt"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    z_i = model.image(given.image)                                   # already standardised
    z_t, states = model.encode_text(given.tokens)
    logits = model.logit_scale.exp() * clip.unit(z_i) @ clip.unit(z_t).T
    for got, name in [(z_i, "image_features"), (z_t, "text_features"), (states, "text_hidden"),
                      (logits, "logits_per_image"), (logits.T, "logits_per_text")]:
        if not half or "features" in name:
            assert error(got, getattr(want, name)) < (5e-3 if half else 2e-5), \
                f"{name}: quick GELU, LayerNorm eps 1e-5, causal?"


def test_half_a_hugging_face_clip_is_read_alone_and_its_heads_are_config_jsons(tmp_path):
    _, _, given, want, _ = golden_weights.read("clip_transformers.pt")
    for heads, fits in ((2, True), (4, False)):
        image = karlo.load_clip(image_folder(tmp_path, num_attention_heads=heads))
        assert image.text is None and image.config.image_heads == heads
        assert abs(image.scale() - 100) < 1e-3
        assert (error(image.image(given.image), want.image_features) < 2e-5) == fits


LN = "visual.ln_pre.weight"


@pytest.mark.parametrize("key, how, says", [
    (LN, None, f"lacks {LN}"), (LN, lambda w: torch.cat([w, w]), "does not fit.*384.*192"),
    (LN, torch.Tensor.long, "int64"), (LN, lambda w: w.to(torch.complex64), "complex64"),
    (LN, lambda w: w * torch.nan, f"{LN} is not finite"), (LN, lambda w: w / 0, "is not finite"),
    ("visual.transformer.resblocks.0.extra", torch.ones_like, "holds visual.*extra"),
    *((key, how, key) for how in (None, torch.sum) for key in (
        "visual.conv1.weight", "visual.proj", "text_projection", "visual.positional_embedding",
        "positional_embedding"))])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, key, how, says):
    weights = golden_weights.read("clip_openai.pt")[1]
    w = weights.pop(key, weights[LN])
    torch.save(weights | ({key: how(w)} if how else {}), tmp_path / "bad.pt")
    refused(f"(?=.*bad.pt).*{says}", karlo.load_clip, tmp_path / "bad.pt")


def test_other_clips_and_folders_without_weights_are_refused(tmp_path, monkeypatch):
    save({"visual.layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "RN50.pt")
    refused("RN50.pt is a ResNet CLIP", karlo.load_clip, tmp_path / "RN50.pt")
    weights = golden_weights.read("clip_openai.pt")[1]
    path = save(weights, tmp_path / "x.pt")
    (tmp_path / "open_clip_config.json").write_text("{}")            # with other activations
    refused("x.pt is not OpenAI's own", karlo.load_clip, path)
    clip_folder(tmp_path, weights, OWN | {"model_type": "another"}, "pytorch_model.bin")
    refused("is not OpenAI's own", karlo.load_clip, tmp_path)

    (tmp_path / "pytorch_model.bin").unlink()
    refused("no weights in .*model.safetensors", karlo.load_clip, tmp_path, kind=FileNotFoundError)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    refused(f"{tmp_path}/b cannot be read: No such", karlo.load_clip, tmp_path,
            kind=FileNotFoundError)
    locked = Mock(side_effect=PermissionError(13, "Permission denied"))        # root may read all
    monkeypatch.setattr(karlo, "read_pickle", locked)
    refused("/b cannot be read: Permission", karlo.load_clip, tmp_path, kind=PermissionError)


def test_tokenizers_come_from_a_merges_file_or_a_folder_and_others_are_refused(tmp_path, expected):
    for path in (VOCAB, FOLDER / "tokenizer"):
        tokenizer = karlo.load_tokenizer(path)
        for case in expected["tokenizer_cases"]:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for data, says in ((b"", "header"), (b"t h\n", "header"), (b"\xff\xfe", "utf-8"), (b"#v\nt h e\n", "do not fit: 't h e'"),
                       (b"#v\ntt hh\n", "do not fit: '")):
        (tmp_path / "bad.txt").write_bytes(data)
        refused(f"bad.txt cannot be read as .*{says}", karlo.load_tokenizer, tmp_path / "bad.txt")


# ---------------------------------------------------------------- command lines
@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two images of other shapes, their middles unlike their ends; the current folder is theirs."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").resize((96, 60)).save("a.png")
    Image.linear_gradient("L").resize((60, 96)).save("b.png")
    return tmp_path


def test_a_caption_is_sampled_as_karlo_was_published(model, photos):
    """25 steps of the prior with guidance 4, 25 of the decoder with 8, 7 of the upsampler."""
    unclip.main(["sample", "a red circle", "--weights", str(FOLDER), "-o", "fox.png"])
    x = model.sample(["a red circle"], guidance=8.0, prior_guidance=4.0, prior_steps=25,
                     decoder_steps=25, upsampler_steps=(7,), candidates=1, generator=seed(),
                     progress=False)
    unclip.save_grid(x, "x.png", 1)
    assert (np.array(Image.open("fox.png")) == np.array(Image.open("x.png"))).all()
    refused("at most 14 tokens", model.sample, ["the blue square is left of 3 Green Triangles"])


def variations_folder(folder):
    """What the image-variations folder is: an image encoder beside the rest, and no prior."""
    edit(folder / "model_index.json", _class_name="UnCLIPImageVariationPipeline")
    shutil.rmtree(folder / "prior")
    shutil.rmtree(folder / "prior_scheduler")
    return image_folder(folder / "image_encoder", columns=24)


def openai_clip(model, path):
    """An OpenAI file with the text half of `model` and the golden CLIP's image half beside it."""
    weights = {key: w for key, w in golden_weights.read("clip_openai.pt")[1].items()
               if key.startswith("visual.")}
    weights["visual.proj"] = weights["visual.proj"][:, :24].clone()
    return openai_archive(weights | openai_names(model), path)


@pytest.mark.parametrize("where", ["in the folder", "OpenAI's", "elsewhere"])
@pytest.mark.parametrize("words", [
    ["variations", "a.png", "-n", "2", "--guidance", "8"],
    ["interpolate", "a.png", "b.png", "-n", "3", "--guidance", "1"],
    ["edit", "a.png", "-n", "2", "--source", "a red circle", "--target", "a blue square",
     "--guidance", "1"]])
def test_the_decoder_receives_raw_embeddings_and_the_empty_caption_or_those_of_an_edit(
        where, words, model, expected, folder, photos, monkeypatch):
    """Guidance compares with the learned null embedding, whose caption is "" as well."""
    if where == "OpenAI's":
        eye = openai_clip(model.parts["clip"], photos / "ViT.pt")
    else:
        eye = variations_folder(folder)
        eye = eye.rename(photos / "eye") if where == "elsewhere" else eye
    options = [] if where == "in the folder" else ["--clip", str(eye)]
    seen, condition = [], karlo.KarloDecoder.condition
    monkeypatch.setattr(karlo.KarloDecoder, "condition",
                        lambda *args: seen.append(args[1:]) or condition(*args))

    unclip.main([*words, "--weights", str(folder), *options, "--decoder-steps", "3", "-o", "x.png"])
    encoder = karlo.load_clip(eye)
    a, b = (encoder.encode_image(clip.preprocess(x, encoder.config.image_size)[None])[0]
            for x in ("a.png", "b.png"))
    assert abs(a.norm() - 1) > 0.3, "else nothing tells raw embeddings from unit ones"
    z_i, text = seen[-1]
    assert error(seen[0][0][0], a) < 0.02
    if words[0] == "edit":
        for got, want in zip(text, model.encode_text(["a red circle", "a blue square"])):
            assert error(got.float(), want.float()) < 2e-5
    else:
        assert text.mask.sum(1).tolist() == [2] * len(z_i)
        assert error(text.states[:1], expected["text"]["uncond_hidden"]) < 2e-5
        assert error(text.z_t[:1], expected["text"]["uncond_embeds"]) < 2e-5

    if words[0] == "variations":
        assert error(z_i[2:], a.expand(2, -1)) < 0.02
        null = model.parts["decoder"].null_image
        assert torch.equal(z_i[:2], null.expand(2, -1)) and null.abs().sum() > 0
    elif words[0] == "interpolate":
        assert len(seen) == 3 and error(z_i[0], a) < 0.02 and error(z_i[2], b) < 0.02
    else:
        assert error(z_i[0], a) < 0.02 and abs(z_i[1].norm() / a.norm() - 1) < 0.02, "its length"


@pytest.mark.parametrize("words, says", [
    (["variations", "a.png"], "no CLIP image encoder.*--clip"),
    (["sample", "a", "--rerank", "2"], "no CLIP image encoder.*--clip"),
    (["edit", "a.png", "--source", "a", "--target", "a b", "--clip", "b.png"], "b.png cannot be"),
    (["variations", "a.png", "--clip", "other.pt"], "other.pt is another CLIP"),
    (["variations", "a.png", "--clip", "small.pt"], "small.pt has no image encoder that fits"),
    (["variations", "a.png", "--clip", "variations/text_encoder"], "has no image encoder"),
    (["sample", "a", "--prior", "ar"], "hold no ar_prior"),
    (["sample", "a", "--weights", "variations"], "hold no diffusion_prior")])
def test_what_a_karlo_cannot_do_it_says_in_one_sentence(words, says, folder, photos, capsys):
    """Another CLIP with equal sizes has another space: ViT-L-14-336px.pt beside Karlo's."""
    variations_folder(shutil.copytree(folder, photos / "variations"))
    other = karlo.load_karlo(FOLDER).parts["clip"]
    other.text.proj += torch.randn(24, 24) / 5
    openai_clip(other, "other.pt")
    torch.save(golden_weights.read("clip_openai.pt")[1], "small.pt")
    with pytest.raises(SystemExit) as end:
        unclip.stop_on_error(unclip.main, [words[0], "--weights", str(folder), *words[1:]])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and re.search(says, err), err
    assert err.count("\n") == 1 and "Traceback" not in err and out == ""


# ---------------------------------------------------------------- bad folders
PARTS = ("prior decoder text_proj super_res_first super_res_last text_encoder tokenizer "
         "prior_scheduler decoder_scheduler super_res_scheduler").split()
FILES = ["model_index.json", "prior/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json",
         "decoder/diffusion_pytorch_model.bin", "text_encoder/config.json", "decoder/config.json",
         "decoder_scheduler/scheduler_config.json"]
SETTINGS = {                        # what the code does not do: each is named with its value
    "text_encoder": dict(hidden_act="gelu", vocab_size=9, layer_norm_eps=1e-6, hidden_size=96,
                         num_hidden_layers=9, eos_token_id=5),
    "prior": dict(num_layers=3, added_emb_type=None, embedding_dim=23, time_embed_act_fn="gelu"),
    "prior_scheduler": dict(prediction_type="epsilon", beta_schedule="linear",
                            num_train_timesteps=100, clip_sample=False, clip_sample_range=None),
    "decoder_scheduler": dict(variance_type="fixed_small_log"),
    "super_res_scheduler": dict(clip_sample_range=2),
    "decoder": dict(act_fn="gelu", norm_eps=1e-6, layers_per_block=2, class_embed_type=None),
    "text_proj": dict(clip_extra_context_tokens=3), "super_res_last": dict(sample_size=64)}


@pytest.mark.parametrize("file, how, says", [
    *((file, "absent", "karlo/" + file.split("/diff")[0]) for file in PARTS + FILES),
    *((file, how, f"karlo/{file}") for file in FILES for how in ("cut", "empty", "junk")),
    ("decoder/diffusion_pytorch_model.bin", "code", "pytorch_model.bin cannot .*than tensors"),
    *((f"{part}/diffusion_pytorch_model{end}", "nan", f"{part}/.* is not finite") for part, end in (
        ("prior", ".safetensors"), ("text_proj", ".safetensors"), ("super_res_last", ".bin"))),
    ("tokenizer", "smaller", "tokenizer.* has 553 tokens.*text encoder 554"),
    *((part, {name: value}, f"{part}/.* has {name} = {value!r}; only ")
      for part, settings in SETTINGS.items() for name, value in settings.items()),
    ("model_index", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
    ("text_encoder", {"num_attention_heads": 10 ** 9}, "1000000000 heads"),
    ("text_encoder", {"num_attention_heads": "2"}, "text_heads is '2'"),
    ("prior", {"num_attention_heads": 1}, "prior.* does not fit"),
    ("prior", {"num_attention_heads": 10 ** 9}, "prior"),
    ("decoder", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "decoder"),
    ("decoder", {"down_block_types": None}, "decoder/config.json"),
    ("decoder", {"block_out_channels": [32, 48, 64]}, "down_blocks.*does not fit"),
    ("decoder", {"block_out_channels": [32, 32]}, "decoder"),
    ("decoder", {"attention_head_dim": 17}, "head_channels, got 32 and 17"),
    ("decoder", {"resnet_time_scale_shift": "default"}, "time_emb_proj.*does not fit"),
    ("decoder", {"sample_size": 16}, "sample_size = 32; only 64")])
def test_a_bad_karlo_folder_is_refused_in_a_sentence_that_names_the_part(folder, file, how, says,
                                                                         monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / file
    if isinstance(how, dict):
        for place in (".json", "/config.json", "/scheduler_config.json"):
            if (config := folder / (file + place)).is_file():
                edit(config, **how)
    elif how == "absent":
        path.unlink() if path.is_file() else shutil.rmtree(path)
    elif how == "nan":
        save({key: w * torch.nan for key, w in karlo.read_weights(path).items()}, path)
    elif how == "smaller":
        merges = (path / "merges.txt").read_text().splitlines()
        vocab = json.loads((path / "vocab.json").read_text())
        (path / "merges.txt").write_text("\n".join(merges[:-1]))
        (path / "vocab.json").write_text(json.dumps(
            {token: i - (i > 551) for token, i in vocab.items() if i != 551}))
    else:
        path.write_bytes({"cut": path.read_bytes()[:-40], "empty": b"", "junk": b"\x93junk",
                          "code": saved(TRAP)}[how])
    refused(f"(?=.*karlo/).*({says})", unclip.load, folder,
            kind=FileNotFoundError if how == "absent" else ValueError)
    assert not (folder / "trapped").exists(), "the file's code was run"
