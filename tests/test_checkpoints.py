"""Public checkpoints: files that others wrote, read without their code and without running any.

tests/golden/karlo_diffusers_tiny is a complete Karlo folder in small, saved by diffusers, with what
the pipeline made of it. The true weights are not here; their names and shapes are.
"""
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import decoder
import diffusion
import golden_weights
import prior
import unclip
from golden_weights import GOLDEN, error

KARLO = GOLDEN / "karlo_diffusers_tiny"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def karlo():
    return unclip.load(KARLO)


@pytest.fixture(scope="module")
def expected():
    return torch.load(KARLO / "expected.pt", weights_only=True)


@pytest.fixture
def folder(tmp_path):
    """A copy of the Karlo folder, to be damaged."""
    return shutil.copytree(KARLO, tmp_path / "karlo")


# ---------------------------------------------------------------- safetensors


def safetensors(tensors, pad=0):
    """The bytes of a safetensors file, written as its specification says."""
    names = {dtype: name for name, dtype in clip.SAFE.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, x in tensors.items():
        raw = bytes(x.contiguous().flatten().view(torch.uint8).tolist()) if x.numel() else b""
        header[key] = {"dtype": names[x.dtype], "shape": [*x.shape],
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8 + pad)
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_safetensors_of_every_kind_come_back(tmp_path, pad):
    """Also a scalar, an empty one, and tensors at addresses their numbers cannot be read from."""
    tensors = {name: (torch.arange(-3, 3).view(2, 3) * 1.25).to(dtype)
               for name, dtype in clip.SAFE.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4),
                "byte": torch.tensor([7]).byte(), "after": torch.randn(3, 2)}
    (tmp_path / "x.safetensors").write_bytes(safetensors(tensors, pad))
    got = clip.read_safetensors(tmp_path / "x.safetensors")
    assert set(got) == set(tensors)
    for name, x in tensors.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name


def test_a_mapped_file_is_not_copied_and_not_changed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": torch.ones(1000), "b": torch.zeros(500)}))
    before, got = path.read_bytes(), clip.read_safetensors(path)
    assert got["a"].untyped_storage().data_ptr() == got["b"].untyped_storage().data_ptr()
    got["a"] += 1
    assert got["a"].sum() == 2000 and path.read_bytes() == before


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux's /proc")
LOADING = """
import sys, torch, clip
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")]
with torch.device("meta"):
    module = torch.nn.ParameterDict({f"w{n}": torch.empty(2 ** 21) for n in range(10)})
torch.ones(2 ** 21).to(torch.bfloat16).sum()                     # warms up
open("/proc/self/clear_refs", "w").write("5")                    # the highest begins anew
before = memory()
clip.settle(module, clip.read_safetensors(sys.argv[1]), "cpu", torch.bfloat16)
assert sum(w.sum() for w in module.values()) == 0                # every page is touched
after = memory()
print(after[1] - before[1], after[2] - before[0])
"""


@linux
def test_loading_takes_the_memory_of_what_is_converted_and_no_more(tmp_path):
    """Ten float32 weights of 8 MB, mapped, become bf16 one by one: half the file's size, not 1.5.

    In a process of its own, whose allocator gives back what is freed.
    """
    size, path = 80 * 2 ** 20, tmp_path / "x.safetensors"
    head = json.dumps({f"w{n}": {"dtype": "F32", "shape": [2 ** 21], "data_offsets":
                                 [n * 2 ** 23, (n + 1) * 2 ** 23]} for n in range(10)}).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(size))
    out = subprocess.run([sys.executable, "-c", LOADING, path], capture_output=True, text=True,
                         check=True, cwd=Path(clip.__file__).parent,
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}).stdout
    of_its_own, highest = map(int, out.split())
    assert abs(of_its_own - size / 2) < 0.1 * size
    assert highest < 1.5 * size + 3 * 2 ** 23, "the file's pages, bf16, and a weight or two"


@linux
def test_a_karlo_folders_weights_stay_in_the_file_unless_they_are_joined():
    model = prior.load_karlo(KARLO)
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines
              if line.endswith("prior/diffusion_pytorch_model.safetensors")]
    copied = {name for name, w in model.named_parameters()
              if not any(a <= w.data_ptr() < b for a, b in places)}
    assert copied == {f"blocks.{n}.qkv.{kind}" for n in (0, 1) for kind in ("weight", "bias")}


def header(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


GOOD = header()


@pytest.mark.parametrize("data, says", [
    (b"", "header should have 0 bytes, the file has 0"),
    (GOOD[:5], "header should have .* the file has 5"),
    (GOOD[:30], "header should have .* the file has 30"),
    (b"\xff" * 8 + GOOD[8:], "header should have 18446744073709551615 bytes"),
    (struct.pack("<Q", 200_000_000) + GOOD[8:], "header should have 200000000 bytes"),
    (GOOD[:-1], "a ends at byte 8 of 7; is it cut short"),
    (GOOD + b"x", "goes on for 1 bytes after its last tensor"),
    (header(dtype="F99"), "a is F99, none of F64, F32"),
    (header(dtype="F64"), r"a should be F64 \[2\] at byte 0, not at 0..8"),
    (header(shape=[3]), r"a should be F32 \[3\]"), (header(shape=[-2]), r"a should be F32 \[-2\]"),
    (header(data_offsets=[8, 16]) + bytes(8), "at byte 0, not at 8..16"),
    (header(data_offsets=[-8, 0]), "not at -8..0"), (header(data_offsets=[0, 80]), "not at 0..80"),
    (header(data_offsets=[0, 80], shape=[20]), "a ends at byte 80 of 8"),
    (header(shape="2"), ""), (header(shape=None), ""), (header(data_offsets=[0]), ""),
    (header(data_offsets=[0, 8.0]), ""), (struct.pack("<Q", 2) + b"[]", ""),
    (struct.pack("<Q", 4) + b"{{{{", ""), (struct.pack("<Q", 9) + b'{"a": 1} ', ""),
    (struct.pack("<Q", 3) + b'"\xff"', "")])
def test_a_damaged_safetensors_file_is_refused_in_one_sentence(tmp_path, data, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.safetensors is .*safetensors file: .*{says}") as no:
        clip.read_weights(path)
    assert "\n" not in str(no.value)


# ---------------------------------------------------------------- pickles and archives


class Trap:
    def __reduce__(self):
        return eval, ("open('trapped', 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Trap()}, "bad.bin",
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="bad.bin is refused: it holds more than tensors"):
        clip.read_weights("bad.bin")
    assert not (tmp_path / "trapped").exists(), "the file's code was run"


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", pickle.dumps([1, 2], protocol=2),
                                  b"PK\x03\x04junk"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, data):
    (tmp_path / "bad.bin").write_bytes(data)
    with pytest.raises(ValueError, match="bad.bin") as refusal:
        clip.read_weights(tmp_path / "bad.bin")
    assert "\n" not in str(refusal.value)


def test_a_cut_file_and_a_file_of_other_things_are_refused(tmp_path):
    path = tmp_path / "bad.bin"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="bad.bin is damaged"):
        clip.read_weights(path)
    for content in (torch.ones(2), {"state_dict": {"w": torch.ones(2)}}, {"w": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="expected {name: tensor}"):
            clip.read_weights(path)
    with pytest.raises(FileNotFoundError, match="nowhere.bin"):
        clip.read_weights(tmp_path / "nowhere.bin")


class Node(torch.nn.Module):
    """A module that does nothing, in which weights may hang under any name."""

    def forward(self, x):
        return x


class Restless(Node):
    """A TorchScript module that runs something when it is loaded."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.w, self.training = state[0], state[1]
        print("I was run")


class Listing(Node):
    """A TorchScript module with lists among its attributes."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.sizes, self.shares, self.flags = [1, 2], [0.5], [True]


def archive(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # TorchScript is old
        torch.jit.script(module).save(str(path))


def openai_archive(weights, path):
    """As OpenAI published CLIP: half the weights in half precision, three numbers among them."""
    root = Node()
    numbers = {"input_resolution": 28, "context_length": 16, "vocab_size": 100}
    for key, w in (weights | {k: torch.tensor(n) for k, n in numbers.items()}).items():
        *places, name = key.split(".")
        node = root
        for place in places:
            if not hasattr(node, place):
                node.add_module(place, Node())
            node = getattr(node, place)
        if w.is_floating_point():
            halved = w.ndim > 1 and "embedding" not in key
            node.register_parameter(name, torch.nn.Parameter(w.half() if halved else w))
        else:
            node.register_buffer(name, w)
    archive(root, path)


def test_an_archives_code_is_not_run(tmp_path, capfd):
    archive(Restless(), tmp_path / "bad.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(str(tmp_path / "bad.pt"))
    assert "I was run" in capfd.readouterr().out, "the trap should work at all"
    with pytest.raises(ValueError, match="bad.pt is refused"):
        clip.read_weights(tmp_path / "bad.pt")
    assert "I was run" not in capfd.readouterr().out


def test_an_archives_lists_are_no_weights_and_no_danger(tmp_path):
    archive(Listing(), tmp_path / "x.pt")
    (name, w), = clip.read_weights(tmp_path / "x.pt").items()
    assert name == "w" and torch.equal(w, torch.arange(6.0).view(2, 3).t())


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def openai():
    return golden_weights.read("clip_openai.pt")


@pytest.fixture(scope="module")
def transformers():
    return golden_weights.read("clip_transformers.pt")


def clip_folder(golden, path, keep="", **config):
    """A Hugging Face folder of the golden CLIP, or of the half whose names begin with `keep`."""
    path.mkdir(parents=True)
    weights = {k: w for k, w in golden["weights"].items() if k.startswith(keep or ("",))}
    (path / "model.safetensors").write_bytes(safetensors(weights))
    settings = {k: golden["config"][k] | config for k in ("text_config", "vision_config")}
    if keep:
        settings = settings["text_config" if "text_model" in keep else "vision_config"]
    (path / "config.json").write_text(json.dumps(settings))
    return path


def features(model, golden):
    return model.image(golden["inputs"]["image"]), model.encode_text(golden["inputs"]["tokens"])[0]


def test_openais_archive_is_read_as_its_state_dict_is(openai, tmp_path):
    openai_archive(openai["weights"], tmp_path / "ViT.pt")
    torch.save(openai["weights"], tmp_path / "state.pt")
    model, same = clip.load_clip(tmp_path / "ViT.pt"), clip.load_clip(tmp_path / "state.pt")
    assert model.config == same.config and model.config.image_heads == 3
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for got, plain, name in zip(features(model, openai), features(same, openai),
                                ("image_features", "text_features")):
        assert error(got, openai["outputs"][name]) < 5e-3, "half precision costs no more"
        assert error(plain, openai["outputs"][name]) < 2e-5


@pytest.mark.parametrize("name, sizes, parameters", [
    ("ViT-B-32", (512, 224, 32, 768, 12, 12, 49408, 77, 512, 12, 8), 151_277_313),
    ("ViT-B-16", (512, 224, 16, 768, 12, 12, 49408, 77, 512, 12, 8), 149_620_737),
    ("ViT-L-14", (768, 224, 14, 1024, 24, 16, 49408, 77, 768, 12, 12), 427_616_513),
    ("ViT-L-14-336px", (768, 336, 14, 1024, 24, 16, 49408, 77, 768, 12, 12), 427_944_193)])
def test_the_sizes_of_openais_models_are_told_by_their_weights(name, sizes, parameters):
    config = clip.CLIPConfig(*sizes)
    with torch.device("meta"):
        model = clip.CLIP(config)
    weights = {clip.their_names(clip.OPENAI, ours)[0][0]: w for ours, w in
               model.state_dict().items()}
    assert sum(w.numel() for w in weights.values()) == parameters
    assert clip.clip_config(weights, clip.OPENAI, {}, Path(name + ".pt")) == config


def test_halves_of_a_hugging_face_clip_are_read_alone(transformers, tmp_path):
    text = clip.load_clip(clip_folder(transformers, tmp_path / "t", ("text_model", "text_proj")))
    image = clip.load_clip(clip_folder(transformers, tmp_path / "i", ("vision_model", "visual_")))
    assert text.image is None and image.text is None and abs(text.scale() - 100) < 1e-3
    want = transformers["outputs"]
    assert error(image.image(transformers["inputs"]["image"]), want["image_features"]) < 2e-5
    z_t, states = text.encode_text(transformers["inputs"]["tokens"])
    assert error(z_t, want["text_features"]) < 2e-5 and error(states, want["text_hidden"]) < 2e-5


def test_heads_come_from_config_json(transformers, tmp_path):
    model = clip.load_clip(clip_folder(transformers, tmp_path / "x", num_attention_heads=4))
    assert model.config.image_heads == model.config.text_heads == 4
    z_i, _ = features(model, transformers)
    assert error(z_i, transformers["outputs"]["image_features"]) > 1e-3


@pytest.mark.parametrize("config, says", [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'quick_gelu'"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps"), ({"hidden_size": 96}, "hidden_size = 96"),
    ({"num_hidden_layers": 9}, "num_hidden_layers = 9"), ({"num_attention_heads": 7}, "7 heads"),
    ({"num_attention_heads": "2"}, "num_attention_heads = '2'"),
    ({"eos_token_id": 5}, "eos_token_id = 5")])
def test_a_config_that_the_code_or_the_weights_contradict_is_refused(transformers, tmp_path, config,
                                                                     says):
    path = clip_folder(transformers, tmp_path / "x", **config)
    with pytest.raises(ValueError, match=f"config.json says {says}"):
        clip.load_clip(path)


def change(weights, key, how):
    weights = dict(weights)
    if how == "missing":
        del weights[key]
    elif how == "extra":
        weights["visual.transformer.resblocks.0.extra"] = torch.ones(2)
    elif how == "shape":
        weights[key] = torch.cat([weights[key], weights[key]])
    elif how == "integers":
        weights[key] = weights[key].long()
    return weights


@pytest.mark.parametrize("how, says", [
    ("missing", "lacks visual.ln_pre.weight"), ("extra", "holds visual.*extra"),
    ("shape", "visual.ln_pre.weight in .* does not fit.*384.*192"), ("integers", "int64")])
def test_weights_that_do_not_fit_are_refused_by_name(openai, tmp_path, how, says):
    torch.save(change(openai["weights"], "visual.ln_pre.weight", how), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=says) as refusal:
        clip.load_clip(tmp_path / "bad.pt")
    assert "bad.pt" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["visual.conv1.weight", "visual.proj", "text_projection",
                                 "visual.positional_embedding", "positional_embedding"])
@pytest.mark.parametrize("how", ["missing", "flat"])
def test_sizes_that_cannot_be_told_are_refused(openai, tmp_path, key, how):
    weights = change(openai["weights"], key, how)
    if how == "flat":
        weights[key] = torch.tensor(1.0)
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt"):
        clip.load_clip(tmp_path / "bad.pt")


def test_a_resnet_clip_and_a_folder_without_weights_are_refused(tmp_path):
    torch.save({"visual.layer1.0.conv1.weight": torch.ones(1), "text_projection": torch.ones(1)},
               tmp_path / "RN50.pt")
    with pytest.raises(ValueError, match="RN50.pt is a ResNet CLIP"):
        clip.load_clip(tmp_path / "RN50.pt")
    with pytest.raises(FileNotFoundError, match="config.json"):
        clip.load_clip(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights in .*model.safetensors"):
        clip.load_clip(tmp_path)


# ---------------------------------------------------------------- the command line of clip.py


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture
def weights(openai, tmp_path):
    """An OpenAI CLIP whose vocabulary is the toy one."""
    torch.save(openai["weights"] | {"token_embedding.weight": torch.randn(554, 128)},
               tmp_path / "ViT.pt")
    return str(tmp_path / "ViT.pt")


def run(capsys, *arguments):
    status = clip.main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_the_command_line_prints_a_probability_for_each_caption(photo, weights, capsys):
    status, out, _ = run(capsys, photo, "a red circle", "two", "--weights", weights,
                         "--vocab", GOLDEN / "bpe_toy.txt.gz")
    shares = [float(line.split("%")[0]) for line in out.splitlines()]
    assert status == 0 and abs(sum(shares) - 100) < 0.02
    assert [line.split("%")[1].strip() for line in out.splitlines()] == ["a red circle", "two"]
    model, tokenizer = clip.load_clip(weights), clip.Tokenizer.load(GOLDEN / "bpe_toy.txt.gz")
    want = clip.zero_shot(model, clip.preprocess(photo, 28)[None],
                          tokenizer(["a red circle", "two"], 16))[0]
    assert torch.allclose(torch.tensor(shares) / 100, want, atol=1e-3)


@pytest.mark.parametrize("wrong, says", [
    ({"picture": "nowhere.jpg"}, "there is no nowhere.jpg; expected a picture"),
    ({"--weights": "no.pt"}, "there is no no.pt; expected a file of weights"),
    ({"--vocab": "no.gz"}, "there is no no.gz; expected a merges file"),
    ({"--vocab": None}, "expected --vocab"),
    ({"caption": "word " * 40}, "at most 16 tokens"), ({"--device": "abacus"}, "abacus")])
def test_bad_input_ends_in_one_sentence_and_status_2(photo, weights, capsys, wrong, says):
    given = {"picture": photo, "caption": "a", "--weights": weights,
             "--vocab": str(GOLDEN / "bpe_toy.txt.gz")} | wrong
    options = [x for k, v in given.items() if k.startswith("--") and v for x in (k, v)]
    status, out, err = run(capsys, given["picture"], given["caption"], *options)
    assert status == 2 and out == "" and says in err and err.count("\n") == 1


def test_a_vocabulary_of_another_model_is_refused(photo, openai, tmp_path, capsys):
    torch.save(openai["weights"], tmp_path / "ViT.pt")
    status, _, err = run(capsys, photo, "a", "--weights", tmp_path / "ViT.pt",
                         "--vocab", GOLDEN / "bpe_toy.txt.gz")
    assert status == 2 and "554 tokens" in err and "not of the same model" in err


# ---------------------------------------------------------------- Karlo


def test_the_tiny_karlo_encodes_text_as_the_pipeline_does(karlo, expected):
    for prompts, kind in [(expected["config"]["prompts"], "cond"), ([""], "uncond")]:
        tokens = karlo.tokenizer(prompts, 14, truncate=True)
        z_t, states = karlo.parts["clip"].encode_text(tokens)
        want = expected["text"]
        assert torch.equal(tokens, want[f"{kind}_ids"])
        assert torch.equal(clip.token_mask(tokens, karlo.tokenizer.end), want[f"{kind}_mask"])
        assert error(z_t, want[f"{kind}_embeds"]) < 2e-5, "pooled at the end token, 2 heads?"
        assert error(states, want[f"{kind}_hidden"]) < 2e-5, "padded with 0?"


def test_the_tiny_karlo_paints_what_the_pipeline_paints(karlo, expected, monkeypatch):
    """Caption to picture with one seeded generator; every draw is checked on the way."""
    c, draws, randn = expected["config"], [], torch.randn

    def noted(*args, **kwargs):
        draws.append(randn(*args, **kwargs))
        return draws[-1]
    tokens = karlo.tokenizer(c["prompts"], 14, truncate=True)        # one prompt is too long
    text = clip.Text(tokens, clip.token_mask(tokens, karlo.tokenizer.end),
                     *karlo.parts["clip"].encode_text(tokens))
    generator = torch.Generator().manual_seed(c["seed"])
    monkeypatch.setattr(torch, "randn", noted)
    z_i = karlo.embed(text, guidance=c["guidance"][0], steps=c["steps"][0], generator=generator)
    x = karlo.draw(z_i, text, guidance=c["guidance"][1], decoder_steps=c["steps"][1],
                   upsampler_steps=(c["steps"][2],), generator=generator)
    want = expected["f64_tables"]
    assert [[*d.shape] for d in draws] == expected["draws"]["shapes"]
    first = torch.stack([d.flatten()[:4] for d in draws])
    assert torch.allclose(first, expected["draws"]["first4"])
    assert error(z_i, want["image_embeds"]) < 1e-4, "clamp 5, whitening, null text of 2 tokens?"
    assert error(x.permute(0, 2, 3, 1) / 2 + 0.5, want["images"]) < 1e-3


def test_the_small_picture_is_the_pipelines(karlo, expected):
    c, want = expected["config"], expected["f64_tables"]
    tokens = karlo.tokenizer(c["prompts"], 14, truncate=True)
    text = clip.Text(tokens, clip.token_mask(tokens, karlo.tokenizer.end),
                     *karlo.parts["clip"].encode_text(tokens))
    generator = torch.Generator().manual_seed(c["seed"])
    for _ in range(c["steps"][0]):
        torch.randn(2, 24, generator=generator)                      # what the prior draws
    x = karlo.parts["decoder"].sample(want["image_embeds"], text, c["steps"][1], c["guidance"][1],
                                      generator, karlo.null(text))
    assert error(x, want["image_small"]) < 1e-3


def test_sampling_takes_the_folders_defaults_and_refuses_long_captions(karlo, monkeypatch):
    pictures = karlo.sample(["a red circle", "a"], generator=torch.Generator().manual_seed(0),
                            progress=False)
    assert pictures.shape == (2, 3, 32, 32) and pictures.abs().max() <= 1
    s = karlo.config.sampling
    assert (s.prior_steps, s.prior_guidance, s.decoder_steps, s.guidance, s.upsampler_steps,
            s.candidates) == (25, 4.0, 25, 8.0, (7,), 1)
    with pytest.raises(ValueError, match="at most 14 tokens"):
        karlo.sample(["the blue square is on the left of 3 Green Triangles"])
    with pytest.raises(ValueError, match="no image encoder"):
        karlo.parts["clip"].encode_image(torch.zeros(1, 3, 32, 32))


def test_no_caption_is_the_empty_caption_for_karlo_and_padding_for_others(karlo, expected):
    text = karlo.encode_text(["a red circle", "a"])
    null = karlo.null(text)
    assert null.mask.sum(1).tolist() == [2, 2] and null.z_t.shape == text.z_t.shape
    assert error(null.states[:1], expected["text"]["uncond_hidden"]) < 2e-5
    other = unclip.build("toy").null(text)
    assert not other.mask.any() and not other.z_t.any(), "all padding"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_gives_nearly_the_same_embedding(karlo, dtype):
    half = unclip.load(KARLO, dtype=dtype)
    assert {p.dtype for part in half.parts.values() if part for p in part.parameters()} == {dtype}
    z = [m.embed(m.encode_text(["a red circle"]), steps=5, guidance=1.0,
                 generator=torch.Generator().manual_seed(0)) for m in (karlo, half)]
    assert error(z[1], z[0]) < 0.1
    assert half.sample(["a"], generator=torch.Generator().manual_seed(0), prior_steps=2,
                       decoder_steps=2, progress=False).isfinite().all()


def image_encoder(folder, dim=24):
    """Adds image_encoder/ to a folder: the golden CLIP's image half with other widths."""
    golden = golden_weights.read("clip_transformers.pt")
    golden["weights"]["visual_projection.weight"] = torch.randn(dim, 128) / 11
    return clip_folder(golden, folder / "image_encoder", ("vision_model", "visual_"))


def test_an_image_encoder_beside_the_rest_or_elsewhere_joins_the_clip(folder, tmp_path):
    beside = image_encoder(folder)
    model = unclip.load(folder).parts["clip"]
    assert model.text is not None and model.config.image_size == 24
    z = model.encode_image(torch.zeros(1, 3, 24, 24))
    assert z.shape == (1, 24) and model.encode_text(torch.full((1, 3), 553))[0].shape == (1, 24)
    beside.rename(tmp_path / "elsewhere")
    other = unclip.load(folder, clip_path=tmp_path / "elsewhere").parts["clip"]
    assert torch.equal(other.encode_image(torch.zeros(1, 3, 24, 24)), z)
    with pytest.raises(ValueError, match="text_encoder has no image encoder"):
        unclip.load(folder, clip_path=folder / "text_encoder")
    image_encoder(folder, dim=20)
    with pytest.raises(ValueError, match="embeddings of 24 numbers"):
        unclip.load(folder)


def make_variations_folder(folder):
    """What the image-variations folder is: an image encoder beside the rest, and no prior."""
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "UnCLIPImageVariationPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "prior")
    shutil.rmtree(folder / "prior_scheduler")
    image_encoder(folder)


def test_the_image_variations_folder_has_no_prior(folder):
    make_variations_folder(folder)
    model = unclip.load(folder)
    assert model.parts["diffusion_prior"] is None and model.config.diffusion_prior is None
    with pytest.raises(ValueError, match="hold no prior"):
        model.sample(["a"])
    z_i = model.parts["clip"].encode_image(torch.zeros(1, 3, 24, 24))
    assert model.draw(z_i, model._text([""]), decoder_steps=2).shape == (1, 3, 32, 32)


# ---------------------------------------------------------------- Karlo from the command line


@pytest.fixture
def used(monkeypatch):
    """Notes what is sampled: (rows, steps) of each stage, and how often each guidance was used."""
    seen, sample, guide = {"stages": [], "guidance": Counter()}, diffusion.sample, diffusion.guide

    def noted_sample(denoise, alphabar, x, times, **options):
        seen["stages"].append((len(x), len(times)))
        return sample(denoise, alphabar, x, times, **options)

    def noted_guide(uncond, cond, scale):
        seen["guidance"][scale] += 1
        return guide(uncond, cond, scale)
    monkeypatch.setattr(diffusion, "sample", noted_sample)
    monkeypatch.setattr(diffusion, "guide", noted_guide)
    return seen


def pixels(path):
    return torch.from_numpy(np.array(clip.read_picture(path))).float()


def test_a_caption_is_sampled_as_karlo_was_published(karlo, used, tmp_path):
    """25 steps of the prior with guidance 4, 25 of the decoder with 8, 7 of the upsampler."""
    path = tmp_path / "fox.png"
    unclip.main(["sample", "a red circle", "--weights", str(KARLO), "-o", str(path)])
    assert used == {"stages": [(1, 25), (1, 25), (1, 7)], "guidance": {4.0: 25, 8.0: 25}}
    x = karlo.sample(["a red circle"], generator=torch.Generator().manual_seed(0), progress=False)
    unclip.save_grid(x, tmp_path / "same.png", 1)
    assert torch.equal(pixels(path), pixels(tmp_path / "same.png"))


@pytest.mark.parametrize("more", [[], ["--low-memory"], ["--dtype", "bf16"]])
def test_every_option_of_karlo_can_be_given(used, tmp_path, more):
    unclip.main(["sample", "a red circle", "a", "--weights", str(KARLO), "--prior-steps", "3",
                 "--prior-guidance", "2", "--candidates", "4", "--decoder-steps", "5", "--guidance",
                 "1.5", "--upsampler-steps", "2", "-o", str(tmp_path / "x.png"), *more])
    assert used == {"stages": [(8, 3), (2, 5), (2, 2)], "guidance": {2.0: 3, 1.5: 5}}


def openai_clip(model, path):
    """An OpenAI file with the text half of `model` and the golden CLIP's image half beside it."""
    weights = {k: w for k, w in golden_weights.read("clip_openai.pt")["weights"].items()
               if k.startswith("visual.")}
    weights["visual.proj"] = weights["visual.proj"][:, :24].clone()
    for ours, w in model.state_dict().items():
        (name,), _ = clip.their_names(clip.OPENAI, ours)
        weights[name] = w
    openai_archive(weights, path)


@pytest.fixture(params=["an image encoder in the folder", "OpenAI's CLIP"])
def seeing(request, folder, karlo, tmp_path):
    """A Karlo that sees pictures -> the options that say so, and its image encoder."""
    if request.param == "OpenAI's CLIP":
        openai_clip(karlo.parts["clip"], tmp_path / "ViT.pt")
        return ["--weights", str(folder), "--clip", str(tmp_path / "ViT.pt")], \
            clip.load_clip(tmp_path / "ViT.pt")
    make_variations_folder(folder)
    return ["--weights", str(folder)], clip.load_clip(folder / "image_encoder")


@pytest.fixture
def photos(tmp_path):
    """Two pictures of other shapes, their middles unlike their ends, and how CLIP was shown such:
    the short side resized, the middle cropped."""
    across, down = torch.linspace(-1, 1, 96)[None], torch.linspace(-1, 1, 60)[:, None]
    a = torch.stack([(3 * across).sin() * down, across.square() - down, (across * down).cos() - 1])
    for name, x in (("a.png", a), ("b.png", -a.transpose(1, 2))):
        unclip.to_pil(x).save(tmp_path / name)
    return [str(tmp_path / name) for name in ("a.png", "b.png")]


@pytest.fixture
def told(monkeypatch):
    """Notes what the decoder is conditioned on: a list of (z_i, clip.Text)."""
    seen, condition = [], decoder.Decoder.condition

    def noted(self, z_i, text):
        seen.append((z_i, text))
        return condition(self, z_i, text)
    monkeypatch.setattr(decoder.Decoder, "condition", noted)
    return seen


def run_pictures(seeing, tmp_path, *words):
    """Runs a command on three steps -> how the image encoder sees a photo."""
    options, model = seeing
    unclip.main([*words, *options, "--decoder-steps", "3", "-o", str(tmp_path / "strip.png")])
    return lambda path: model.encode_image(clip.preprocess(path, model.config.image_size)[None])


def test_variations_are_told_raw_features_and_the_empty_caption(seeing, photos, told, expected,
                                                                karlo, tmp_path):
    """Guidance compares with the learned null embedding, which says "" as well."""
    see = run_pictures(seeing, tmp_path, "variations", photos[0], "-n", "2", "--guidance", "8")
    (inverted, _), (z_i, text) = told
    want = see(photos[0])
    assert abs(want.norm() - 1) > 0.3, "else nothing tells raw features from unit ones"
    assert error(inverted, want) < 0.02 and error(z_i[2:], want.expand(2, -1)) < 0.02
    assert torch.equal(z_i[:2], karlo.parts["decoder"].null_image.expand(2, -1))
    assert text.mask.sum(1).tolist() == [2] * 4
    assert error(text.states, expected["text"]["uncond_hidden"].expand(4, -1, -1)) < 2e-5
    assert error(text.z_t, expected["text"]["uncond_embeds"].expand(4, -1)) < 2e-5
    assert clip.read_picture(tmp_path / "strip.png").size == (3 * 32 + 2 * 2, 32)


def test_interpolations_turn_from_one_pictures_features_to_the_others(seeing, photos, told,
                                                                      tmp_path):
    see = run_pictures(seeing, tmp_path, "interpolate", *photos, "-n", "3")
    a, b, middle = see(photos[0]), see(photos[1]), told[-1][0][1:2]
    z_i = told[-1][0]
    assert len(told) == 3 and z_i.shape == (3, 24)
    assert error(z_i[:1], a) < 0.02 and error(z_i[2:], b) < 0.02
    angle = torch.cosine_similarity(torch.cat([a, b, a]), torch.cat([b, middle, middle])).acos()
    assert torch.allclose(angle[1:], angle[0] / 2, atol=0.1), "half way, by angle"
    assert clip.read_picture(tmp_path / "strip.png").size == (5 * 32 + 4 * 2, 32)


def test_edits_turn_towards_the_difference_of_the_captions_and_keep_the_length(seeing, photos, told,
                                                                               karlo, tmp_path):
    words = "a red circle", "a blue square"
    see = run_pictures(seeing, tmp_path, "edit", photos[0], "--source", words[0], "--target",
                       words[1], "-n", "2", "--strength", "0.5")
    a, (same, turned) = see(photos[0])[0], told[-1][0]
    source, target = clip.unit(karlo.encode_text(list(words)).z_t)
    assert error(same, a) < 0.02
    half = clip.unit(clip.unit(a) + clip.unit(target - source))      # 0.5 is half the arc
    assert torch.cosine_similarity(turned, half, dim=0) > 0.999
    assert abs(turned.norm() / a.norm() - 1) < 0.02
    assert clip.read_picture(tmp_path / "strip.png").size == (3 * 32 + 2 * 2, 32)


@pytest.mark.parametrize("words", [["variations", "a.png"], ["interpolate", "a.png", "b.png"],
                                   ["edit", "a.png", "--source", "a", "--target", "a red circle"]])
def test_low_memory_changes_nothing_and_half_precision_little(words, folder, photos, tmp_path,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_variations_folder(folder)
    for name, more in (("plain", []), ("low", ["--low-memory"]), ("half", ["--dtype", "fp16"])):
        unclip.main([*words, "-n", "2", "--weights", str(folder), "--decoder-steps", "3", "-o",
                     f"{name}.png", *more])
    assert torch.equal(pixels("plain.png"), pixels("low.png"))
    assert (pixels("plain.png") - pixels("half.png")).abs().mean() < 5


@pytest.mark.parametrize("words, says", [
    (["variations", "a.png"], "no CLIP image encoder; give one with --clip"),
    (["sample", "a", "--rerank", "2"], "no CLIP image encoder; give one with --clip"),
    (["edit", "a.png", "--source", "a", "--target", "a b", "--clip", "b.png"], "b.png is refused"),
    (["variations", "a.png", "--clip", "other.pt"], "other.pt is another CLIP"),
    (["variations", "a.png", "--clip", "small.pt"], "small.pt has no image encoder that fits"),
    (["sample", "a", "--prior", "ar"], r"expected one of the priors \['diffusion'\], got 'ar'"),
    (["sample", "a", "--weights", "variations"], "hold no prior, so they draw from pictures")])
def test_what_a_karlo_cannot_do_it_says_in_one_sentence(words, says, folder, photos, tmp_path,
                                                        monkeypatch, capsys):
    """Another CLIP with equal sizes has another space: ViT-L-14-336px.pt beside Karlo's."""
    monkeypatch.chdir(tmp_path)
    make_variations_folder(shutil.copytree(folder, tmp_path / "variations"))
    other = unclip.load(KARLO).parts["clip"]
    other.text.proj += torch.randn(24, 24) / 5
    openai_clip(other, "other.pt")
    torch.save(golden_weights.read("clip_openai.pt")["weights"], "small.pt")
    with pytest.raises(SystemExit) as end:
        unclip.main([words[0], "--weights", str(folder), "-o", "x.png", *words[1:]])
    complaint = capsys.readouterr().err
    assert end.value.code == 2 and re.search(says, complaint) and complaint.count("\n") == 1


def test_too_little_memory_ends_in_a_sentence_that_says_what_helps(monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")
    monkeypatch.setattr(decoder.Decoder, "sample", full)
    with pytest.raises(SystemExit) as end:
        unclip.main(["sample", "a", "--weights", str(KARLO), "--prior-steps", "2"])
    complaint = capsys.readouterr().err
    assert end.value.code == 2 and "--low-memory, --dtype bf16" in complaint
    assert "Traceback" not in complaint and "More." not in complaint


# ---------------------------------------------------------------- full size


def published():
    return json.loads((GOLDEN / "full_size_keys.json").read_text())


@pytest.fixture(scope="module")
def full_size():
    """The network for each list of published names, as the presets describe it, without memory."""
    model = unclip.build("karlo", device="meta")
    whole = model.parts["clip"]
    return {"prior": (model.parts["diffusion_prior"], prior.DIFFUSERS),
            "decoder": (model.parts["decoder"].unet, decoder.DIFFUSERS_UNET),
            "text_proj": (model.parts["decoder"], decoder.DIFFUSERS_TEXT_PROJ),
            "super_res_first": (model.parts["upsampler1"].unet, decoder.DIFFUSERS_UNET),
            "super_res_last": (model.parts["upsampler1"].last, decoder.DIFFUSERS_UNET),
            "text_encoder": (whole, {k: v for k, v in clip.HUGGING_FACE.items()
                                     if k.startswith("text.")}),
            "image_encoder": (whole, {k: v for k, v in clip.HUGGING_FACE.items()
                                      if k.startswith("image.")}),
            "ViT-L-14.pt": (whole, clip.OPENAI)}


@pytest.mark.parametrize("part, keys, parameters", [
    ("prior", 338, 1_022_030_080), ("decoder", 716, 885_439_686), ("text_proj", 11, 7_878_400),
    ("super_res_first", 408, 691_579_523), ("super_res_last", 408, 691_579_523),
    ("text_encoder", 197, 123_650_304), ("image_encoder", 392, 303_966_208),
    ("ViT-L-14.pt", 446, 427_616_513)])
def test_at_full_size_every_published_key_is_used_once_and_none_is_missing(full_size, part, keys,
                                                                           parameters):
    module, table = full_size[part]
    names, = (names for key, names in published().items() if key.endswith("/" + part))
    weights = {key: torch.empty(shape, device="meta") for key, shape in names.items()}
    renamed = clip.rename(module, weights, table, part)
    used = [key for name in renamed for key in clip.their_names(table, name)[0]]
    assert len(used) == len(set(used)) == len(names) == keys
    assert sum(w.numel() for w in renamed.values()) == parameters


def test_at_full_size_every_weight_of_the_stack_is_filled(full_size):
    for parts in [["prior"], ["decoder"], ["super_res_first"], ["super_res_last"], ["ViT-L-14.pt"],
                  ["text_proj"]]:
        module, table = full_size[parts[0]]
        left = [name for name in module.state_dict() if not clip.their_names(table, name)[0]
                and not (parts == ["text_proj"] and name.startswith("unet."))]
        assert left == (["cov"] if parts == ["prior"] else []), f"nothing fills {left}"


# ---------------------------------------------------------------- bad folders


@pytest.mark.parametrize("part", ["prior", "decoder", "text_proj", "super_res_first",
                                  "super_res_last", "text_encoder", "tokenizer", "prior_scheduler",
                                  "decoder_scheduler", "super_res_scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"karlo.{part}"):
        unclip.load(folder)


@pytest.mark.parametrize("file", [
    "model_index.json", "prior/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json",
    "decoder/diffusion_pytorch_model.bin", "text_encoder/config.json", "decoder/config.json"])
@pytest.mark.parametrize("how", ["absent", "cut", "empty", "junk"])
def test_a_bad_file_is_named_in_one_sentence(folder, file, how):
    path = folder / file
    data = {"cut": path.read_bytes()[:-40], "empty": b"", "junk": b"\x93junk"}.get(how)
    path.unlink() if data is None else path.write_bytes(data)
    kind = FileNotFoundError if how == "absent" else ValueError
    with pytest.raises(kind) as refusal:
        unclip.load(folder)
    named = str(path.parent if how == "absent" and "diffusion" in file else path)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_with_code_in_it_is_refused_and_the_code_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"w": Trap()}, folder / "decoder/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="decoder/diffusion_pytorch_model.bin is refused"):
        unclip.load(folder)
    assert not (folder / "trapped").exists(), "the file's code was run"


@pytest.mark.parametrize("file, settings, says", [
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("text_encoder/config.json", {"vocab_size": 9}, "vocab_size = 9"),
    ("prior/config.json", {"num_attention_heads": 1}, "does not fit"),
    ("prior/config.json", {"num_layers": 3}, "lacks transformer_blocks.2.norm1.weight"),
    ("prior/config.json", {"num_layers": 1}, "holds transformer_blocks.1"),
    ("prior/config.json", {"num_layers": None}, "num_layers = None; expected a whole number"),
    ("prior/config.json", {"added_emb_type": None}, "added_emb_type = None"),
    ("prior/config.json", {"embedding_dim": 23}, "does not fit"),
    ("prior_scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type"),
    ("prior_scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
    ("decoder_scheduler/scheduler_config.json", {"variance_type": "fixed_small_log"}, "variance"),
    ("super_res_scheduler/scheduler_config.json", {"clip_sample_range": 2}, "clip_sample_range"),
    ("decoder/config.json", {"act_fn": "gelu"}, "act_fn = 'gelu'"),
    ("decoder/config.json", {"norm_eps": 1e-6}, "norm_eps"),
    ("decoder/config.json", {"down_block_types": ["DownBlock2D"] * 3}, "down_block_types"),
    ("decoder/config.json", {"down_block_types": None}, "down_block_types"),
    ("decoder/config.json", {"block_out_channels": [32, 48, 64]}, "block_out_channels"),
    ("decoder/config.json", {"block_out_channels": [32, 32]}, "block_out_channels"),
    ("decoder/config.json", {"layers_per_block": 2}, "lacks"),
    ("decoder/config.json", {"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift"),
    ("decoder/config.json", {"sample_size": 16}, "makes 32 px of 16"),
    ("text_proj/config.json", {"clip_extra_context_tokens": 3}, "clip_extra_context_tokens"),
    ("super_res_last/config.json", {"sample_size": 64}, "differs from super_res_first")])
def test_a_setting_that_the_code_does_not_do_is_refused(folder, file, settings, says):
    old = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(old | settings))
    with pytest.raises(ValueError, match=says) as refusal:
        unclip.load(folder)
    assert "karlo" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tokenizer_of_another_model_is_refused(folder):
    merges = (folder / "tokenizer/merges.txt").read_text().splitlines()[:-1]
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
    last, = {t: i for t, i in vocab.items() if i == 551}
    smaller = {t: i - (i > 551) for t, i in vocab.items() if t != last}
    (folder / "tokenizer/merges.txt").write_text("\n".join(merges))
    (folder / "tokenizer/vocab.json").write_text(json.dumps(smaller))
    with pytest.raises(ValueError, match="tokenizer has 553 tokens.*text encoder 554"):
        unclip.load(folder)


def test_the_readers_leave_room_for_the_priors_own_clamp(folder):
    path = folder / "prior_scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample_range": 10.0}))
    assert unclip.load(folder).parts["diffusion_prior"].config.clamp == 10.0


def test_another_clip_is_refused_with_a_checkpoint_of_our_own(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="CLIP of its own"):
        unclip.load(tmp_path / "x.pt", clip_path="ViT-L-14.pt")


def test_the_null_embedding_is_karlos_learned_one(karlo):
    assert karlo.parts["decoder"].null_image.abs().sum() > 0
    assert not math.isclose(karlo.parts["diffusion_prior"].std.mean().item(), 1)
