"""Public weights: OpenAI's CLIP, Hugging Face's CLIP folders, and Karlo, the public unCLIP.

    model = load_karlo("karlo-v1-alpha")             text to image, or image variations
    model = load_clip("ViT-L-14.pt")                 or a folder with config.json and weights
    tokenizer = load_tokenizer("bpe_simple_vocab_16e6.txt.gz")     or a folder, merges and vocab

Karlo v1 alpha (Kakao Brain, 2022) differs from the paper in three networks: three subclasses.
Nothing in a file is executed. Weights are mapped into memory where the format allows it.
"""
import gzip
import io
import itertools
import json
import math
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
import decoder
import diffusion
import prior
import unclip
from clip import reading

# ---------------------------------------------------------------- Karlo's three networks
class EmptyCaption:
    """The null condition is the caption "" as CLIP encodes it: one row, kept with the weights."""

    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("empty_tokens", torch.zeros(1, c.context, dtype=torch.long))
        self.register_buffer("empty_mask", torch.arange(c.context)[None] < 2)  # start and end
        self.register_buffer("empty_z_t", torch.zeros(1, c.embed_dim))
        self.register_buffer("empty_states", torch.zeros(1, c.context, c.text_width))

    def null(self, text):
        empty = clip.Text(*(getattr(self, f"empty_{name}") for name in clip.Text._fields))
        return empty.map(lambda x: x.expand(len(text.tokens), *x.shape[1:]))


@dataclass
class KarloPriorConfig(prior.DiffusionPriorConfig):
    vocab_size: int = 1             # unused
    text_width: int = 768           # of CLIP's hidden states
    clamp: float = 5.0              # of the predicted z_i, in the standardised space


class KarloPrior(EmptyCaption, prior.DiffusionPrior):
    """Receives CLIP's hidden states instead of tokens; z_i is standardised, but not normalised."""

    def __init__(self, config):
        super().__init__(config)
        del self.tok, self.pad
        self.clamp = config.clamp
        self.hidden_in = nn.Linear(config.text_width, config.width)
        self.register_buffer("mean", torch.zeros(config.embed_dim))
        self.register_buffer("std", torch.ones(config.embed_dim))

    def scale(self, z):
        return (z - self.mean) / self.std

    def unscale(self, x):
        return x * self.std + self.mean

    def prefix(self, text):
        words = self.hidden_in(text.states.to(self.pos.dtype))                 # (B, L, W)
        z_t = self.text_in(text.z_t.to(words.dtype))                           # (B, W)
        return torch.cat([words, z_t[:, None]], dim=1)

    def attention_mask(self, text, rows):
        causal = super().attention_mask(text, rows)
        return causal & F.pad(text.mask, (0, 4), value=True)[:, None, None]    # (B, 1, rows, L + 4)


KarloDecoderConfig = partial(decoder.DecoderConfig, vocab_size=1, text_layers=0, text_width=768)


class KarloDecoder(EmptyCaption, decoder.Decoder):
    """Receives CLIP's hidden states instead of those of a text Transformer of its own."""

    def __init__(self, config):
        super().__init__(config)
        del self.text
        X = config.unet.context_width
        self.hidden_in, self.hidden_ln = nn.Linear(config.text_width, X), nn.LayerNorm(X)
        self.text_emb = nn.Linear(config.embed_dim, 4 * config.unet.channels)

    def scale(self, z):
        return z                                       # as long as CLIP made it

    def condition(self, z_i, text):
        z_i = z_i.to(self.image_emb.weight.dtype)
        tokens = self.image_tokens(z_i).unflatten(1, (4, -1))                  # (B, 4, X)
        states = self.hidden_ln(self.hidden_in(text.states.to(z_i.dtype)))     # (B, L, X)
        emb = self.image_emb(z_i) + self.text_emb(text.z_t.to(z_i.dtype))      # (B, E)
        return emb, torch.cat([tokens, states], dim=1), F.pad(text.mask, (4, 0), value=True)


class KarloUpsampler(decoder.Upsampler):
    """Takes DDPM steps, not DDIM's, and the one at t = 1 with a second U-Net."""
    eta = None

    def __init__(self, config):
        super().__init__(config)
        self.last = decoder.UNet(config.unet)

    def forward(self, x_t, t, large):
        last = t == 1 if isinstance(t, int) else bool((t == 1).all())
        unet = self.last if last else self.unet
        return unet(torch.cat([x_t, large], dim=1).to(unet.conv_in.weight.dtype), t).float()

    def timesteps(self, steps):
        return diffusion.spaced_timesteps(self.config.T, steps)


CLASSES = {"clip": clip.CLIP, "diffusion_prior": KarloPrior, "decoder": KarloDecoder,
           "upsampler1": KarloUpsampler}
WIDTHS = dict(channels=320, mults=(1, 2, 3, 4), depth=3)
PRESET = unclip.Config(
    "karlo", clip.CLIPConfig(768, 224, 14, 1024, 24, 16, 49408, 77, 768, 12, 12),
    KarloPriorConfig(embed_dim=768, context=77, width=2048, layers=20, heads=32), None,
    KarloDecoderConfig(decoder.UNetConfig(size=64, attention=(32, 16, 8), context_width=1536,
                                          dropout=0.1, **WIDTHS), embed_dim=768, context=77),
    decoder.UpsamplerConfig(decoder.UNetConfig(size=256, in_channels=6, out_channels=3,
                                               scale_shift=False, **WIDTHS)), None,
    unclip.Sampling(guidance=8.0, prior_guidance=4.0, prior_steps=25, decoder_steps=25,
                    upsampler_steps=(7,), candidates=1))


# ---------------------------------------------------------------- files
class Content(dict):
    """What the file at `path` holds, by name: weights or settings."""

    def __init__(self, content, path):
        super().__init__(content)
        self.path = path

    def __missing__(self, name):
        raise ValueError(f"{self.path} lacks {name}; is it of another model, or cut short?")

    def expect(self, **wanted):
        """The settings; ValueError where they contradict what the code does."""
        for name, value in wanted.items():
            if self.get(name, value) != value:
                raise ValueError(f"{self.path} has {name} = {self[name]!r}; only {value!r} fits")
        return self

    def count(self, name):
        """How many layers there are: "blocks.{}.bias" counts blocks.0.bias, blocks.1.bias, ..."""
        return next(n for n in itertools.count() if name.format(n) not in self)


def read_json(path, **wanted):
    """A JSON file of settings -> Content; see `expect`."""
    with reading(path, "a JSON object, {...}"):
        settings = Content(json.loads(path.read_bytes()).items(), path)
    return settings.expect(**wanted)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def check(name, w):
    """The tensor w.   ValueError if it holds NaN or infinity."""
    if w.is_floating_point() and w.numel() and not torch.stack(w.aminmax()).isfinite().all():
        raise ValueError(f"{name} is not finite")
    return w.detach()


def read_safetensors(path):
    """A safetensors file -> {name: tensor}, views of the mapped file.

    8 bytes: N, little-endian; N bytes of JSON {name: {dtype, shape, data_offsets}}; the data, one
    tensor after the other without gaps.
    """
    size, tensors, at = path.stat().st_size, {}, 0
    with open(path, "rb") as file:
        N = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(N, size)))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + N:]

        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            if begin != at or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
                raise ValueError(f"{name} is said to be {dtype} {shape} at {begin}..{end}, but the "
                                 f"data go on at {at} and end at {len(data)}; is it cut short?")

            # checked piece by piece: what is read through the mapping stays in memory
            for start in range(begin, end, 2 ** 20):
                piece = bytearray(file.read(min(2 ** 20, end - start)))
                check(name, torch.frombuffer(piece, dtype=dtype))
            aligned = (8 + N + begin) % dtype.itemsize == 0    # else numbers cannot be read there
            raw, at = data[begin:end], end
            tensors[name] = (raw if aligned else raw.clone()).view(dtype).view(shape)

    if at != len(data):
        raise ValueError(f"it goes on for {len(data) - at} bytes after its last tensor")
    return tensors


class ArchiveReader(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive, and refuses to look up anything else.

    Note: torch.jit.load would run what an archive defines as __setstate__.
    """
    known = {"torch._utils._rebuild_tensor_v2":
             lambda data, start, shape, stride, *_: data.as_strided(shape, stride, start),
             "torch.jit._pickle.restore_type_tag": lambda value, tag: value,
             "collections.OrderedDict": dict}
    known |= {f"torch.jit._pickle.build_{kind}list": list
              for kind in ("int", "double", "bool", "tensor")}
    known |= {f"torch.{kind}Storage": getattr(torch, kind.lower())
              for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int")}

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if module.startswith("__torch__"):             # a module: its attributes, none of its code
            return SimpleNamespace
        if f"{module}.{name}" in self.known:
            return self.known[f"{module}.{name}"]
        raise pickle.UnpicklingError

    def persistent_load(self, key):
        _, dtype, number, _, _ = key                   # "storage", dtype, number, device, count
        data = bytearray(self.archive.read(f"{self.folder}/data/{number}"))
        return torch.frombuffer(data, dtype=dtype)


def named_tensors(module, prefix=""):
    """A module out of an archive, and all modules within -> (name, tensor) pairs."""
    for name, value in vars(module).items():
        if isinstance(value, SimpleNamespace):
            yield from named_tensors(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            yield prefix + name, value


def read_pickle(path):
    """What torch.save or TorchScript wrote, without running any of its code."""
    is_zip = zipfile.is_zipfile(path)                  # torch.save of long ago wrote no zip
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            folder = archive.namelist()[0].split("/")[0]
            if f"{folder}/constants.pkl" in archive.namelist():                # TorchScript
                return dict(named_tensors(ArchiveReader(archive, folder).load()))
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def read_weights(path):
    """A .safetensors, torch.save or TorchScript file of finite numbers -> Content, on the CPU.

    {"state_dict": ...} is unwrapped, and the prefixes of DataParallel and torch.compile dropped.
    """
    path = Path(path)
    safe = path.suffix == ".safetensors"
    with reading(path, f"a {'safetensors ' * safe}file of weights, {{name: tensor}}"):
        weights = read_safetensors(path) if safe else read_pickle(path)
        if not safe:
            weights = weights.get("state_dict", weights)
            weights = {name: check(name, w) for name, w in weights.items()}
        return Content({re.sub(r"(?<![^.])(module|_orig_mod)\.", "", name): w
                        for name, w in weights.items()}, path)


def read_folder(folder, **wanted):
    """A model's folder, as Hugging Face's libraries write it -> weights, settings."""
    settings = read_json(folder / "config.json", **wanted)
    paths = [path for end in ("", ".fp16") for kind in ("safetensors", "bin")
             for name in (f"*model{end}.{kind}", f"*model.{kind}.index{end}.json")
             for path in folder.glob(name)]
    if not paths:
        raise FileNotFoundError(f"there are no weights in {folder}, such as model.safetensors")

    weights, files = Content({}, paths[0]), [paths[0].name]
    if weights.path.suffix == ".json":                 # {"weight_map": {name: file}}
        with reading(weights.path, "an index of files of weights"):
            files = {Path(x).name for x in read_json(weights.path)["weight_map"].values()}
    for name in sorted(files):
        weights.update(read_weights(folder / name))
    return weights, settings


# ---------------------------------------------------------------- names
# A row (pattern, theirs) is a re.sub from our name to theirs; all rows apply, in order. Where more
# than the name differs, a third entry changes the weight. "" is a name that no file has.

OPENAI = [
    (r"^text\.proj", "text_projection"), (r"^text\.ln_out", "ln_final"), (r"^text\.", ""),
    (r"^image\.", "visual."), ("patch", "conv1"), ("cls", "class_embedding"),
    (r"\btok\b", "token_embedding"), (r"\bpos$", "positional_embedding"), ("ln_in", "ln_pre"),
    ("ln_out", "ln_post"), ("blocks", "transformer.resblocks"), (r"\bln(\d)", r"ln_\1"),
    (r"qkv\.", "attn.in_proj_"), (r"(\d)\.proj", r"\1.attn.out_proj"), ("fc1", "mlp.c_fc"),
    ("fc2", "mlp.c_proj")]
HUGGING_FACE = [
    (r"^image\.proj", "visual_projection.weight", torch.t),
    (r"^text\.proj", "text_projection.weight", torch.t),
    (r"^image\.ln_in", "vision_model.pre_layrnorm"),                           # sic
    (r"^image\.ln_out", "vision_model.post_layernorm"), (r"^image\.", "vision_model."),
    (r"^text\.", "text_model."), ("ln_out", "final_layer_norm"),
    ("patch", "embeddings.patch_embedding"), ("cls", "embeddings.class_embedding"),
    (r"\btok\b", "embeddings.token_embedding"),
    (r"\bpos$", "embeddings.position_embedding.weight"), ("blocks", "encoder.layers"),
    (r"\bln(\d)", r"layer_norm\1"), ("qkv", "self_attn.{q,k,v}_proj"),
    (r"(\d)\.proj", r"\1.self_attn.out_proj"), (r"\bfc", "mlp.fc")]
TIME = [(r"time\.0", "time_embedding.linear_1"), (r"time\.2", "time_embedding.linear_2")]
PRIOR = TIME + [
    ("^(cov|empty_).*", ""), ("hidden_in", "encoder_hidden_states_proj"),
    ("text_in", "embedding_proj"), ("image_in", "proj_in"), ("ln_out", "norm_out"),
    ("query", "prd_embedding", torch.squeeze), ("^pos", "positional_embedding", torch.squeeze),
    ("^(mean|std)", r"clip_\1", torch.squeeze),                        # theirs are (1, ...)
    (r"^out\b", "proj_to_clip_embeddings"), ("^blocks", "transformer_blocks"), ("ln1", "norm1"),
    ("ln2", "norm3"), ("qkv", "attn1.to_{q,k,v}"), (r"\.proj", ".attn1.to_out.0"),
    ("fc1", "ff.net.0.proj"), ("fc2", "ff.net.2")]
UNET = TIME + [                                        # both list the upsampling path deepest first
    ("norm_out", "conv_norm_out"), (r"^(down|up)(.*)resample", r"\1\2\1samplers.0"),
    ("^(down|up)", r"\1_blocks"), (r"\.res\.", ".resnets."), (r"\.attn\.", ".attentions."),
    ("mid_res1", "mid_block.resnets.0"), ("mid_attn", "mid_block.attentions.0"),
    ("mid_res2", "mid_block.resnets.1"), (r"\.emb\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.proj", r"\1.to_out.0"), ("qkv", "to_{q,k,v}"),
    (r"\.context\.", ".add_{k,v}_proj.")]
TEXT_PROJ = [
    ("^(unet|empty_).*", ""), ("null_image", "learned_classifier_free_guidance_embeddings"),
    ("^image_emb", "clip_image_embeddings_project_to_time_embeddings"),
    ("^text_emb", "embedding_proj"), ("^hidden_in", "encoder_hidden_states_proj"),
    ("^hidden_ln", "text_encoder_hidden_states_norm"),
    ("^image_tokens", "clip_extra_context_tokens_proj",                # rows: 4 channel + token
     lambda w: torch.cat([w[token::4] for token in range(4)]))]


def their_names(table, ours):
    """Our name -> the names in their file, and a change to be made. {q,k,v} are several names."""
    name, change = ours, lambda w: w
    for pattern, theirs, *more in table:
        if re.search(pattern, name):
            name, change = re.sub(pattern, theirs, name), more[0] if more else change
    before, _, rest = name.partition("{")
    several, _, after = rest.partition("}")
    return [before + one + after for one in several.split(",") if name], change


def take(weights, table, ours):
    """Our weight as others' file has it, and its names there; (None, []) if it has none."""
    names, change = their_names(table, ours)
    parts = [weights[name] for name in names]
    if not names:
        return None, names
    with reading(weights.path, f"a file whose {names[0]} fits here"):
        return change(torch.cat(parts) if len(parts) > 1 else parts[0]), names


def rename(module, table, weights):
    """{our name: others' weight} for `module`. Each has to fit, and none may be left over."""
    renamed, left = {}, set(weights)
    for ours, target in module.state_dict().items():
        w, names = take(weights, table, ours)
        if not names:
            continue
        if w.shape != target.shape or not w.is_floating_point():
            raise ValueError(f"{names[0]} in {weights.path} does not fit: it gives {w.dtype} "
                             f"{[*w.shape]}, {ours} is {[*target.shape]}")
        renamed[ours] = w
        left -= {*names}
    if left:
        raise ValueError(f"{weights.path} holds {min(left)}, too; is it of another model?")
    return renamed


def fill(kind, config, files, device, dtype, **more):
    """A network of others' weights. files: {part: (table, its weights)}; more: other entries.

    Weights move one at a time, and those that stay as they are stay in their file.
    """
    folder = next(iter(files.values()))[1].path.parent
    with reading(folder, "a network that is built here"), torch.device("meta"):
        model = kind(unclip.config_from(type(config), asdict(config), kind.__name__))
    for part, (table, weights) in files.items():
        more |= {f"{part}.{name}".lstrip("."): w
                 for name, w in rename(model.get_submodule(part), table, weights).items()}
    model.load_state_dict(more, assign=True)
    for p in model.parameters():
        p.data = p.data.to(device, dtype)
    return model.to(device, memory_format=torch.channels_last).eval()


# ---------------------------------------------------------------- CLIP and its tokenizer
# What OpenAI published: width, layers, patch and px of the image encoder. Its archives hold three
# numbers, too, which nobody else's state dict of the same names and shapes has.
OPENAIS = [(768, 12, 32, 224), (768, 12, 16, 224), (1024, 24, 14, 224), (1024, 24, 14, 336)]
NUMBERS = {"input_resolution", "context_length", "vocab_size"}
NO_WEIGHTS = NUMBERS | {f"{half}_model.embeddings.position_ids" for half in ("text", "vision")}


def load_clip(path, device="cpu", dtype=torch.float32):
    """OpenAI's ViT-*.pt, or a Hugging Face CLIP folder, which may hold one half -> clip.CLIP.

    A state dict with OpenAI's names leaves heads and activation open, so it has to lie in a folder
    with config.json.   ValueError or OSError, naming the file, for anything else.
    """
    path = Path(path)
    alone = not path.is_dir()
    weights, settings = (read_weights(path), Content({}, path)) if alone else read_folder(path)
    table = OPENAI if alone or "visual.proj" in weights else HUGGING_FACE
    numbers = NUMBERS <= {*weights}
    for name in NO_WEIGHTS & {*weights}:
        del weights[name]
    if any(name.startswith("visual.layer1.") for name in weights):
        raise ValueError(f"{path} is a ResNet CLIP, which is not built here; take a ViT-*.pt")

    # are heads and activation known?
    c = clip_config(weights, table, settings)
    known = settings.get("model_type") == "clip"
    if alone and not (path.parent / "open_clip_config.json").exists():
        sizes = c.image_width, c.image_layers, c.patch, c.image_size
        widths = {c.image_width, c.text_width}
        small = max(widths) < 256 and not any(w % 64 for w in widths if w > 64)    # of tests
        known = numbers and sizes in OPENAIS or small
    if table is OPENAI and not known:
        raise ValueError(f"{path} is not OpenAI's own file, and weights alone tell neither "
                         "heads nor activation (quick_gelu fits, gelu does not); make a folder "
                         "of pytorch_model.bin and Hugging Face's config.json")

    if not c.image_layers or not c.text_layers:        # half a model, without a temperature:
        weights["logit_scale"] = torch.tensor(math.log(100.0))     # where OpenAI's training ended
    return fill(clip.CLIP, c, {"": (table, weights)}, device, dtype)


def clip_config(weights, table, settings):
    """Sizes from the shapes of the weights; heads from the settings, or width / 64 without any."""
    def size(ours, axis=0):
        w, names = take(weights, table, ours)
        with reading(weights.path, f"a file whose {names[0]} fits here"):
            return range(1, w.shape[axis] + 1)[-1]     # IndexError also for none

    c = clip.CLIPConfig(image_layers=0, text_layers=0)
    for half, key, heads in (("image", "vision_config", 12), ("text", "text_config", 8)):
        first = their_names(table, f"{half}.blocks.0.ln1.bias")[0][0]
        layers = weights.count(first.replace(".0.", ".{}."))
        if not layers and (half == "image" or c.image_layers):
            continue                                   # the other half alone

        width = size(f"{half}.ln_out.bias")
        with reading(settings.path, "a configuration of CLIP"):
            stated = {"num_attention_heads": heads if settings else max(1, width // 64)}
            stated = Content(stated | settings.get(key, settings), settings.path)
        stated.expect(hidden_size=width, num_hidden_layers=layers, layer_norm_eps=1e-5,
                      hidden_act="quick_gelu")
        c = replace(c, embed_dim=size(f"{half}.proj", 1), **{
            f"{half}_width": width, f"{half}_layers": layers,
            f"{half}_heads": stated["num_attention_heads"]})

        if half == "image":
            c.patch = size("image.patch.weight", 3)
            c.image_size = c.patch * math.isqrt(size("image.pos") - 1)
        else:
            c.vocab_size, c.context = size("text.tok.weight"), size("text.pos")
            end = 2 if stated.get("eos_token_id") == 2 else c.vocab_size - 1       # OpenAI's slip
            stated.expect(vocab_size=c.vocab_size, eos_token_id=end)
    return c


def load_tokenizer(path, config=None):
    """bpe_simple_vocab_16e6.txt or .txt.gz, or a folder with vocab.json and merges.txt.

    ValueError if it is not that of the text encoder with this configuration.
    """
    path, vocab = Path(path), None
    if path.is_dir():
        path, vocab = path / "merges.txt", read_json(path / "vocab.json")
    with reading(path, "a merges file such as bpe_simple_vocab_16e6.txt.gz"):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        header, *lines = [line.strip() for line in text.split("\n")[:48895]]   # CLIP reads no more
        if {*header.split()} <= {*clip.ALPHABET}:      # empty, or a merge already
            raise ValueError("it does not begin with a header line")
        merges = [line for line in lines if line]
        tokenizer = clip.Tokenizer(merges, vocab)

    n, end = len(tokenizer), tokenizer.end
    if config and (n != config.vocab_size or end != n - 1):
        raise ValueError(f"{path} has {n} tokens (the end is {end}), the text encoder "
                         f"{config.vocab_size}; they are not of the same model")
    return tokenizer


def open_clip(weights, vocab, device):
    """CLIP and its tokenizer for `python clip.py`; weights may be a folder that holds both."""
    if not weights or not vocab and not Path(weights).is_dir():
        raise ValueError("expected --weights and --vocab (such as bpe_simple_vocab_16e6.txt.gz), "
                         "or as --weights a folder that holds both")
    model = load_clip(weights, device)
    return model, load_tokenizer(vocab or weights, model.config)


# ---------------------------------------------------------------- Karlo's folder
def load_karlo(folder, device="cpu", dtype=torch.float32, clip_path=None):
    """A folder of karlo-v1-alpha (from text), or -image-variations (no prior), as Hugging Face's
    diffusers keeps it -> UnCLIP.   ValueError or FileNotFoundError that names the wrong file.

    clip_path: OpenAI's ViT-L-14.pt or a CLIP folder; its image half joins the folder's text half.
    """
    folder, where = Path(folder), (device, dtype)
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        raise ValueError(f"{folder / 'model_index.json'} is of a {kind}, not of a Karlo folder, "
                         "which has UnCLIPPipeline or UnCLIPImageVariationPipeline")

    model = load_clip(folder / "text_encoder", *where)
    tokenizer = load_tokenizer(folder / "tokenizer", model.config)
    if clip_path is not None or (folder / "image_encoder").is_dir():
        add_image_encoder(model, clip_path or folder / "image_encoder", *where)

    # the null condition
    tokens = tokenizer("", model.config.context).to(device)
    with torch.no_grad():
        text = clip.Text(tokens, clip.token_mask(tokens, tokenizer.end), *model.encode_text(tokens))
    empty = {f"empty_{name}": x for name, x in text._asdict().items()}

    parts = dict.fromkeys(unclip.PARTS) | {"clip": model}
    if kind == "UnCLIPPipeline":
        parts["diffusion_prior"] = load_prior(folder, model.config, where, empty)
    parts["decoder"] = load_decoder(folder, model.config, where, empty)
    parts["upsampler1"] = load_upsampler(folder, 4 * parts["decoder"].config.unet.size, where)
    configs = {name: part and part.config for name, part in parts.items()}
    return unclip.UnCLIP(replace(PRESET, sampling=replace(PRESET.sampling), **configs), parts,
                         tokenizer)


def add_image_encoder(model, path, device, dtype):
    """Give a CLIP without image encoder that of the CLIP at `path`."""
    other, D = load_clip(path, device, dtype), model.config.embed_dim
    if other.image is None or other.config.embed_dim != D:
        raise ValueError(f"{path} has no image encoder that fits, with embeddings of {D} numbers")
    if other.text is not None:                         # the same CLIP, up to rounding?
        a, b = other.text.proj, model.text.proj
        if a.shape != b.shape or (a - b).norm() > 0.02 * b.norm():
            raise ValueError(f"{path} is another CLIP than the folder's text_encoder, so its images"
                             " lie elsewhere; Karlo's is ViT-L-14.pt")
    model.image, model.logit_scale = other.image, other.logit_scale
    model.config = replace(model.config, patch=other.config.patch, **{
        name: value for name, value in vars(other.config).items() if name.startswith("image_")})


def check_schedule(folder, variance, prediction, clamp):
    read_json(folder / "scheduler_config.json", beta_schedule="squaredcos_cap_v2", clip_sample=True,
              num_train_timesteps=1000, variance_type=variance, prediction_type=prediction,
              clip_sample_range=clamp)


def load_prior(folder, c, where, empty):
    """prior/ and prior_scheduler/ -> KarloPrior. c: CLIP's configuration."""
    check_schedule(folder / "prior_scheduler", "fixed_small_log", "sample", 5)
    weights, stated = read_folder(folder / "prior", embedding_dim=c.embed_dim, added_emb_type="prd",
                                  time_embed_act_fn="silu")
    layers = weights.count("transformer_blocks.{}.norm1.bias")
    stated.expect(num_layers=layers)
    with reading(stated.path, "the configuration of a prior"):
        heads, size = stated["num_attention_heads"], stated["attention_head_dim"]
        config = KarloPriorConfig(c.embed_dim, context=c.context, text_width=c.text_width,
                                  width=heads * size, layers=layers, heads=heads)
    return fill(KarloPrior, config, {"": (PRIOR, weights)}, *where, cov=torch.zeros(config.T + 1),
                **empty)


def read_unet(folder, **wanted):
    """A folder with a U-Net of diffusers -> weights, UNetConfig."""
    weights, stated = read_folder(
        folder, act_fn="silu", norm_eps=1e-5, norm_num_groups=32, flip_sin_to_cos=True,
        freq_shift=0, center_input_sample=False, time_embedding_type="positional",
        time_embedding_act_fn=None, timestep_post_act=None, mid_block_scale_factor=1,
        resnet_out_scale_factor=1, resnet_skip_time_act=False, **wanted)
    depth = weights.count("down_blocks.0.resnets.{}.conv1.bias")
    stated.expect(layers_per_block=depth)

    with reading(stated.path, "the configuration of a U-Net that is built here"):
        size, widths = stated["sample_size"], stated["block_out_channels"]
        attend = [i for i, kind in enumerate(stated["down_block_types"]) if "CrossAttn" in kind]
        return weights, decoder.UNetConfig(
            size, stated["in_channels"], stated["out_channels"], widths[0],
            tuple(width // widths[0] for width in widths), depth,
            tuple(size // 2 ** i for i in attend), stated["attention_head_dim"] if attend else 64,
            stated["cross_attention_dim"] if attend else 0,
            scale_shift=stated["resnet_time_scale_shift"] == "scale_shift")


def load_decoder(folder, c, where, empty):
    """decoder/, text_proj/ and decoder_scheduler/ -> KarloDecoder. c: CLIP's configuration."""
    check_schedule(folder / "decoder_scheduler", "learned_range", "epsilon", 1)
    weights, unet = read_unet(folder / "decoder", class_embed_type="identity")
    more, _ = read_folder(folder / "text_proj", clip_extra_context_tokens=4)
    config = KarloDecoderConfig(unet, embed_dim=c.embed_dim, context=c.context,
                                text_width=c.text_width)
    return fill(KarloDecoder, config, {"unet": (UNET, weights), "": (TEXT_PROJ, more)}, *where,
                **empty)


def load_upsampler(folder, size, where):
    """super_res_first/, super_res_last/, super_res_scheduler/ -> KarloUpsampler, to `size` px."""
    check_schedule(folder / "super_res_scheduler", "fixed_small_log", "epsilon", 1)
    (first, unet), (last, _) = (
        read_unet(folder / name, sample_size=size, add_attention=False, class_embed_type=None)
        for name in ("super_res_first", "super_res_last"))
    return fill(KarloUpsampler, decoder.UpsamplerConfig(unet),
                {"unet": (UNET, first), "last": (UNET, last)}, *where)
