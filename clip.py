"""CLIP: pictures and captions in one space, where a picture lies near the captions true of it.

    z_i = encode_image(picture),  z_t = encode_text(caption),   cos(z_i, z_t) is large for pairs

Everything else in unCLIP stands on these two embeddings. The chapter has five parts: the tokenizer
(text -> ids), the Transformer (shared by the prior and the decoder), CLIP with its loss, pictures
(files -> pixels), and reading the weights of others. It is a program, too:

    python clip.py PHOTO.jpg "a cat" "a dog" --weights ViT-L-14.pt --vocab VOCABULARY

    B batch   L tokens   W width of a Transformer   D width of the shared embedding   H heads

Papers: CLIP (Radford et al. 2021; "sec." without a name is its), GLIDE (Nichol et al. 2021) for
the caption encoder, SAM (Foret et al. 2020), unCLIP (Ramesh et al. 2022) appendix C for the sizes.
"""
import argparse
import collections
import contextlib
import gzip
import html
import io
import itertools
import json
import math
import pickle
import re
import sys
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import diffusion

# ---------------------------------------------------------------- text -> tokens
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 48_894                                    # OpenAI's file goes on, CLIP stops reading here
STRAIGHT = str.maketrans("‘’‚‛ʼ“”„‟", "'" * 5 + '"' * 4)
WHOLE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:[stmdſ]|re|ve|ll)")
RUN = re.compile("L+|N|P+| +")                     # letters; one digit; signs and marks; spaces


def clean(text):
    """The text as the tokenizer sees it: "A &amp; B’s\\tCAT " -> "a & b's cat".

    HTML entities are resolved twice (web captions are often escaped twice), curly quotes
    straightened, accents composed (NFC), white space collapsed to single spaces, letters lowered.
    OpenAI's code does more, by calling ftfy: it splits ligatures, narrows full-width forms, drops
    control characters and repairs text that was decoded with the wrong encoding.
    ValueError for anything but a string.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a caption as a string, got {type(text).__name__}: {text!r}")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # half pairs -> �
    text = html.unescape(html.unescape(text)).translate(STRAIGHT)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def split_words(text):
    """Clean text to words: "it's 42 cats!!" -> it 's 4 2 cats !!   No merge crosses their borders.

    A word is a run of letters, a single digit, a run of anything else but spaces, or one of
    's 't 're 've 'm 'll 'd.   Surprise: accents that NFC cannot compose are not letters, and
    Hindi vowel signs are not either, so they cut words in two.
    """
    kinds = "".join(" " if c.isspace() else k if (k := unicodedata.category(c)[0]) in "LN" else "P"
                    for c in text)                 # "it's 42" -> "LLPL NN", one kind a character
    words, i = [], 0
    while i < len(text):
        end = (WHOLE.match(text, i) or RUN.match(kinds, i)).end()
        words.append(text[i:end])
        i = end
    return [word for word in words if not word.isspace()]


def byte_characters():
    """A visible character for each byte, {33: "!", ..., 32: "Ġ", ...}, so merges print as text.

    Bytes that are visible Latin-1 stand for themselves; the other 68 borrow the characters from
    number 256 on. The order of the dict is the order of CLIP's first 256 token ids.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


BYTES = byte_characters()
BYTE_OF = {character: b for b, character in BYTES.items()}
ALPHABET = [*BYTES.values(), *(c + "</w>" for c in BYTES.values())]     # 512; </w> ends a word


def first_line(error):
    return str(error).split("\n")[0]


@contextlib.contextmanager
def reading(path, kind):
    """`with reading(path, "a picture"):` - what goes wrong ends in one sentence about the file.

    FileNotFoundError where it is not there, else ValueError: a damaged file may raise anything.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}; expected {kind}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it holds more than tensors, perhaps code, or it is "
                         "no checkpoint at all") from None
    except Exception as error:
        kind_of_error = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} is damaged or not {kind}: {kind_of_error}{first_line(error)}"
                         ) from None


def read_merges(path):
    """A merges file, plain or gzipped -> ["i n", "t h", ...]; line 0 is a header."""
    with reading(path, "a merges file such as bpe_simple_vocab_16e6.txt.gz"):
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        lines = [line.strip() for line in text.split("\n")[:1 + MERGES]]
        if {*lines[0].split()} <= {*ALPHABET}:         # empty, or a merge already
            raise ValueError("it does not begin with a header line")
        return [line for line in lines[1:] if line]


def read_json(path):
    """A JSON file -> dict."""
    with reading(path, "a JSON object, {...}"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
        return content


def spell(word):
    """Before any merge, a word is its UTF-8 bytes, the last one marked: "né" -> n Ã ©</w>."""
    pieces = [BYTES[b] for b in word.encode("utf-8")]
    return [*pieces[:-1], pieces[-1] + "</w>"]


def merge_pair(pieces, pair):
    """Join `pair` wherever it stands, from the left: (a, a) turns a a a b into aa a b.

    One sweep is enough: a joined piece is longer than pair[0], so it cannot open another pair.
    """
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


class Tokenizer:
    """Byte-level BPE, as in CLIP: frequent words are one token, and any text at all can be written.

    merges   "left right" strings, the first learned first
    vocab    {token: id}, or None for OpenAI's order: 256 bytes, the same 256 + </w>, one token per
             merge, START, END. So a toy tokenizer and OpenAI's differ in the merges alone.
    Attributes: ids {token: id}, tokens (the list that undoes it), start and end (two ids).
    """

    def __init__(self, merges, vocab=None):
        self.merges = list(merges)
        pairs = [tuple(merge.split(" ")) for merge in self.merges]
        if bad := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(f"expected merges like 'th e</w>', got {' '.join(bad[0])!r}")
        joined = [left + right for left, right in pairs]
        if vocab is None:                          # a token that two merges make counts once
            vocab = {token: i for i, token in
                     enumerate(dict.fromkeys([*ALPHABET, *joined, START, END]))}
        self.ids, self.tokens = dict(vocab), sorted(vocab, key=vocab.get)
        needed = [*ALPHABET, START, END, *itertools.chain(*pairs), *joined]
        if missing := [token for token in needed if token not in vocab]:
            raise ValueError(f"expected every byte and every part of a merge in the vocabulary, "
                             f"but {missing[0]!r} is missing; are these of the same model?")
        if [repr(vocab[token]) for token in self.tokens] != [str(i) for i in range(len(vocab))]:
            raise ValueError("expected a vocabulary with the ids 0, 1, 2, ... once each")
        self.rank = {pair: n for n, pair in enumerate(pairs)}
        self.start, self.end = vocab[START], vocab[END]
        self.known = {START: [self.start], END: [self.end]}             # {word: ids}, met so far

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges: join the most frequent neighbours, count again, and so on.

        Stops at vocab_size tokens, or earlier when every word is one token. Ties go to the pair
        first in the alphabet, so the order of the texts does not matter. Recounting everything
        for every merge is plain but slow: meant for thousands of different words, not millions.
        """
        if isinstance(texts, str) or vocab_size < len(ALPHABET) + 2:
            raise ValueError(f"expected a list of captions and a vocab_size of at least "
                             f"{len(ALPHABET) + 2} (bytes, start, end), got {type(texts).__name__} "
                             f"and {vocab_size}")
        counts = collections.Counter()             # {word: how often}, all that matters from here
        for text, n in collections.Counter(texts).items():
            for word in split_words(clean(text)):
                counts[word] += n
        spelled = {word: spell(word) for word in counts if word not in (START, END)}
        merges, tokens = [], {*ALPHABET, START, END}
        while len(tokens) < vocab_size:
            pairs = collections.Counter()
            for word, pieces in spelled.items():
                for pair in zip(pieces, pieces[1:]):
                    pairs[pair] += counts[word]
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(" ".join(best))
            tokens.add("".join(best))
            spelled = {word: merge_pair(pieces, best) for word, pieces in spelled.items()}
        return cls(merges)

    @classmethod
    def load(cls, path):
        """OpenAI's bpe_simple_vocab_16e6.txt or .txt.gz, or a folder with vocab.json + merges.txt.

        ValueError or FileNotFoundError, with the file's name, where that is not what is there.
        """
        path = Path(path)
        if not path.is_dir():
            merges, vocab = read_merges(path), None
        else:
            merges, vocab = read_merges(path / "merges.txt"), read_json(path / "vocab.json")
        with reading(path, "a CLIP tokenizer"):
            return cls(merges, vocab)

    def state(self):
        """What a checkpoint stores, as plain strings and numbers; from_state is the inverse."""
        return {"merges": self.merges, "vocab": self.ids}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"], state["vocab"])

    def __len__(self):
        return len(self.tokens)

    def bpe(self, word):
        """One word to its tokens: join the neighbours learned first, until none is left.

        self.rank {(left, right): 0 for the first learned, 1, ...}; "né" begins as spell("né").
        """
        pieces = spell(word)
        while len(pieces) > 1:
            first = min(zip(pieces, pieces[1:]), key=lambda pair: self.rank.get(pair, float("inf")))
            if first not in self.rank:
                break
            pieces = merge_pair(pieces, first)
        return pieces

    def encode(self, text):
        """Text to a list of ids, without start and end.

        Surprise: as in OpenAI's code, a text that spells out <|endoftext|> gets that token's id.
        """
        ids = []
        for word in split_words(clean(text)):
            if word not in self.known:
                self.known[word] = [self.ids[piece] for piece in self.bpe(word)]
            ids += self.known[word]
        return ids

    def decode(self, ids):
        """The ids (list or 1-D tensor) of one caption to text: nothing from the first end on.

        Undoes encode up to the spaces: the result is " ".join(split_words(clean(text))), every
        character of the clean text in order, but a space between any two words: "a cat!" gives
        "a cat !", "don't" gives "don 't". A clean caption of plain words comes back as it was.
        (A text that spells out START or END does not.)
        """
        ids = [int(i) for i in ids]
        if not all(0 <= i < len(self) for i in ids):
            raise ValueError(f"expected token ids in 0..{len(self) - 1}, got {ids}; "
                             "are they from another tokenizer?")
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        text = b""
        for token in (self.tokens[i] for i in ids if i != self.start):
            text += bytes(BYTE_OF[c] for c in token.removesuffix("</w>"))
            text += b" " * token.endswith("</w>")
        return text.decode("utf-8", "replace").removesuffix(" ")

    def __call__(self, texts, context_length, truncate=False):
        """A caption or a list of B captions -> (B, L) long:  start, ids, end, then 0 as padding.

        "" is allowed: [start, end] is the null caption of classifier-free guidance.
        ValueError for a caption of more than L tokens, unless truncate: then it is cut and the
        last id is the end.   Surprise: 0 is also the id of "!", so find the padding by the end
        token (token_mask), not by the zeros.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)      # (B, L)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length and not truncate:
                raise ValueError(f"expected captions of at most {context_length} tokens, start and "
                                 f"end included, got {len(ids)} for {text[:60]!r}; shorten it "
                                 "or let truncate=True cut it")
            ids = [*ids[:context_length - 1], self.end] if len(ids) > context_length else ids
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def token_mask(tokens, end):
    """Which tokens are real: True up to the first end, included.   (B, L) -> (B, L) bool.

    Its row sums are the lengths (2 for ""), and mask.sum(1) - 1 is where CLIP reads its features.
    """
    ends = (tokens == end).long()                        # (B, L)
    return ends.cumsum(1) - ends == 0                    # (B, L)  no end to the left of me


# ---------------------------------------------------------------- Transformer


def unit(z):
    """Rows of length 1: (..., D) -> (..., D). A row of zeros stays zero."""
    return F.normalize(z, dim=-1, eps=max(1e-12, torch.finfo(z.dtype).tiny))      # in half: not 0


def attend(q, k, v, heads, mask=None, causal=False):
    """Attention in `heads` slices of the width:  softmax(q k^T / sqrt(W / H)) v.

    q (B, L, W), k and v (B, S, W) -> (B, L, W). mask (B or 1, 1, L or 1, S) bool: True may be
    looked at; who may look at nothing gets zeros. causal: the same as a lower triangle, L = S.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # (B, H, ., W/H)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)                                           # (B, L, W)


class Cache:
    """The keys and values of all that was read: a sampled token is computed once, not L times.

    size: how many there may be. `length` of them are there, 0 at first; who sets it back makes the
    cache forget what came after.
    """

    def __init__(self, size):
        self.size, self.length, self.k, self.v = size, 0, None, None

    def append(self, k, v):
        """k, v (B, n, W), the new ones -> the pair of all so far, k and v (B, length, W)."""
        if self.k is None:
            self.k, self.v = (x.new_empty(x.shape[0], self.size, x.shape[2]) for x in (k, v))
        start, self.length = self.length, self.length + k.shape[1]
        self.k[:, start:self.length], self.v[:, start:self.length] = k, v
        return self.k[:, :self.length], self.v[:, :self.length]


class Block(nn.Module):
    """The pre-LN Transformer block: x + attention(LN(x)), then x + MLP(LN(x)).   CLIP sec. 2.4

    With context_width, `context` (B, S, context_width) becomes keys and values that stand before
    the block's own: the way GLIDE and the AR prior let a sequence look at a caption. qkv gives q,
    k, v one after the other, context k, v; a cache is given what stands before, too.
    """

    def __init__(self, width, heads, layers, activation="gelu", context_width=0):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that is a multiple of the heads, {heads}, got "
                             f"{width}")
        self.heads, self.activation = heads, activation
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.context = nn.Linear(context_width, 2 * width) if context_width else None
        branch = (2 * layers * width) ** -0.5           # 2 branches a layer add up to variance 1
        for layer, std in [(self.qkv, width ** -0.5), (self.proj, branch),
                           (self.fc1, (2 * width) ** -0.5), (self.fc2, branch)]:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask=None, causal=False, context=None, cache=None):     # (B, L, W)
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=2)                          # (B, L, W) each
        if context is not None:
            before = self.context(context).chunk(2, dim=2)                       # (B, S, W) each
            k, v = (torch.cat(pair, dim=1) for pair in zip(before, (k, v)))      # (B, S + L, W)
        if cache is not None:
            k, v = cache.append(k, v)                                            # (B, so far, W)
        x = x + self.proj(attend(q, k, v, self.heads, mask, causal))
        h = self.fc1(self.ln2(x))                                                # (B, L, 4 W)
        h = h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
        return x + self.fc2(h)                                                   # (B, L, W)


def blocks(layers, width, heads, **options):
    """The layers of one Transformer."""
    return nn.ModuleList(Block(width, heads, layers, **options) for _ in range(layers))


class CaptionEncoder(nn.Module):
    """GLIDE's text Transformer; the decoder and the AR prior have one each.   GLIDE sec. 4.1

    Every token sees every other: no causal mask. At padded places a learned vector, one for each
    position, stands in for token + position; nothing is masked. An empty caption is all padding.
    """

    def __init__(self, vocab_size, context, width, layers, heads):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, width)
        self.pos = nn.Parameter(torch.randn(context, width) * 0.01)
        self.pad = nn.Parameter(torch.randn(context, width) * 0.01)
        nn.init.normal_(self.tok.weight, std=0.02)
        self.blocks, self.ln_out = blocks(layers, width, heads), nn.LayerNorm(width)

    def forward(self, tokens, mask):                               # (B, L) long, (B, L) bool
        x = self.tok(tokens) + self.pos                            # (B, L, W)
        x = torch.where(mask[:, :, None], x, self.pad)
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x)                                      # (B, L, W)


# ---------------------------------------------------------------- CLIP


# The mean and std of CLIP's training pictures, for pixels in [0, 1].
PIXEL_MEAN = 0.48145466, 0.4578275, 0.40821073
PIXEL_STD = 0.26862954, 0.26130258, 0.27577711


@dataclass
class CLIPConfig:
    """Sizes of a CLIP; in the comments the paper's ViT-H/16 (unCLIP app. C).

    One half may be missing, as in public checkpoints of one half: its number of layers is 0.
    """
    embed_dim: int = 128            # D, 1024
    image_size: int = 32            # px, 256
    patch: int = 8                  # px, 16
    image_width: int = 128          # 1280
    image_layers: int = 3           # 32
    image_heads: int = 4            # 20 (not in the paper: width / 64)
    vocab_size: int = 600           # 49408; len(tokenizer), as the last id is the end token
    context: int = 16               # tokens, 77
    text_width: int = 128           # 1024
    text_layers: int = 3            # 24
    text_heads: int = 4             # 16 (not in the paper: width / 64)
    activation: str = "quick_gelu"  # x sigmoid(1.702 x), as in OpenAI's CLIP; or gelu
    apart: float = 0.0              # weight of `apart` in most of the training; the toy's only
    pixel_mean: tuple = PIXEL_MEAN  # what the image encoder subtracts from pixels in [0, 1]
    pixel_std: tuple = PIXEL_STD    # and divides by


def waves(rows, columns, width):
    """Places on a grid as sinusoids, half the width for the row, half for the column.

    -> (rows * columns, width). Positions are learned, but start here: near places are alike at
    once, and a small CLIP finds left and right. (CLIP's start is noise, std width^-0.5.)
    """
    down, across = (diffusion.sinusoid(torch.arange(n), width // 2) for n in (rows, columns))
    grid = [down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)]
    return torch.cat(grid, dim=2).flatten(0, 1)


class ImageEncoder(nn.Module):
    """A Vision Transformer: the picture as a row of patches, read out at a class token. sec. 2.4"""

    def __init__(self, c):
        super().__init__()
        W, n = c.image_width, c.image_size // c.patch
        self.patch = nn.Conv2d(3, W, c.patch, stride=c.patch, bias=False)
        self.cls = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.pos = nn.Parameter(torch.cat([torch.randn(1, W), waves(n, n, W)]) * 0.3)
        self.ln_in, self.ln_out = nn.LayerNorm(W), nn.LayerNorm(W)
        self.blocks = blocks(c.image_layers, W, c.image_heads, activation=c.activation)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, images):                                     # (B, 3, S, S), normalised
        x = self.patch(images).flatten(2).transpose(1, 2)          # (B, patches, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + patches, W)
        x = self.ln_in(x + self.pos)
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x[:, 0]) @ self.proj                    # (B, D)


class TextEncoder(nn.Module):
    """A causal Transformer, read out at the end token, the first that saw the whole caption.

    Surprise: a caption without end token (of a tokenizer of another size) is read at its start.
    """

    def __init__(self, c):
        super().__init__()
        W = c.text_width
        self.end = c.vocab_size - 1
        self.tok = nn.Embedding(c.vocab_size, W)
        self.pos = nn.Parameter(diffusion.sinusoid(torch.arange(c.context), W) * 0.1)
        nn.init.normal_(self.tok.weight, std=0.1)            # CLIP: pos noise of std 0.01, tok 0.02
        self.blocks = blocks(c.text_layers, W, c.text_heads, activation=c.activation)
        self.ln_out = nn.LayerNorm(W)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, tokens):                                     # (B, L)
        x = self.tok(tokens) + self.pos[:tokens.shape[1]]          # (B, L, W)
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.ln_out(x)
        at_end = (tokens == self.end).int().argmax(1)              # (B,)  the first end token
        rows = torch.arange(len(x), device=x.device)
        return x[rows, at_end] @ self.proj, x                      # (B, D), (B, L, W)


class CLIP(nn.Module):
    """An image and a text encoder into one space of D dimensions, and a temperature.   sec. 2.3"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config) if config.image_layers else None
        self.text = TextEncoder(config) if config.text_layers else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))      # its exp is 14.29

    def forward(self, images, tokens):
        """Pairs (B, 3, S, S), (B, L) -> unit rows z_i, z_t (B, D): what the loss compares."""
        z_i, z_t = self.encode_image(images), self.encode_text(tokens)[0]
        return unit(z_i.float()), unit(z_t.float())

    def encode_image(self, images):
        """(B, 3, S, S) in [-1, 1], S = config.image_size -> (B, D), not normalised."""
        S = self.config.image_size
        if self.image is None:
            raise ValueError("this CLIP has no image encoder, only the text half; load the other")
        if images.shape[1:] != (3, S, S):
            raise ValueError(f"expected pictures (B, 3, {S}, {S}), got {tuple(images.shape)}; "
                             "use clip.preprocess")
        mean, std = (torch.tensor(x).to(images, non_blocking=True).view(3, 1, 1)
                     for x in (self.config.pixel_mean, self.config.pixel_std))
        images = ((images + 1) / 2 - mean) / std
        return self.image(images.to(self.image.proj.dtype))

    def encode_text(self, tokens):
        """(B, L) -> z_t (B, D), not normalised, and the states of all positions (B, L, W).

        The states are those after the last LayerNorm; z_t is the end token's, projected.
        """
        if self.text is None:
            raise ValueError("this CLIP has no text encoder, only the image half; load the other")
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"expected at most {self.config.context} tokens, got "
                             f"{tokens.shape[1]}; use the tokenizer with this context_length")
        return self.text(tokens)

    def scale(self):
        """1 / temperature, at most 100: beyond that training becomes unstable.   CLIP sec. 2.5"""
        return self.logit_scale.exp().clamp(max=100)


class Text(NamedTuple):
    """Captions as the prior and the decoder receive them. `null()` is "no caption"."""
    tokens: torch.Tensor            # (B, L)
    mask: torch.Tensor              # (B, L) bool, True up to and including the end token
    z_t: torch.Tensor               # (B, D) CLIP's embedding of the caption
    states: torch.Tensor            # (B, CLIP's L, W) CLIP's hidden states; (B, 0): unread

    def map(self, f):
        """f of each tensor."""
        return Text(*(f(x) for x in self))

    def after(self, other):
        """The rows of another Text, then these, as one batch."""
        return Text(*(torch.cat(pair) for pair in zip(other, self)))

    def drop(self, keep):
        """No caption in the rows where keep (B,) is False: all padding, a zero embedding."""
        return self._replace(mask=self.mask & keep[:, None], z_t=self.z_t * keep[:, None])

    def null(self):
        return self.drop(torch.zeros_like(self.mask[:, 0]))


def clip_loss(image_emb, text_emb, scale, caption_ids=None):
    """Every image picks its own caption out of the batch, every caption its image.   CLIP fig. 3

    image_emb, text_emb (B, D) with unit rows, scale = 1 / temperature  ->  scalar in nats.
    caption_ids (B,): equal for equal captions, which share the answer evenly; without it the
    answer is the diagonal. Expect log(B) from a model that knows nothing; the floor is 0 for B
    different captions, else the mean log of how often each caption is in the batch.
    """
    logits = scale * image_emb @ text_emb.T                        # (B, B)  image i vs captions
    if caption_ids is None:
        caption_ids = torch.arange(len(logits), device=logits.device)
    answer = (caption_ids[:, None] == caption_ids[None, :]).to(logits)     # (B, B), symmetric
    answer = answer / answer.sum(1, keepdim=True)                  # rows sum to 1
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def apart(image_emb, text_emb, caption_ids, scale=80.0):
    """How alike each encoder finds what has different captions: `clip_loss` of each with itself.

    As in `clip_loss`; -> scalar in nats. A small CLIP stands still for long before "a red circle
    above a blue square" and its swapped rivals: while pictures do not show the difference captions
    forget it, and the other way round. Pushed apart for their own sake (uniformity, Wang and Isola
    2020) each side keeps the difference until the other has found it; the last third of training
    does without. At most 2 log(B) for B different captions, where all is one; 0 where all are far
    apart.
    """
    return sum(clip_loss(z, z, scale, caption_ids) for z in (image_emb, text_emb))


def sam_backward(loss_fn, parameters, rho):
    """Add to .grad the gradient at the worst nearby weights, w + rho g / |g|.   SAM eq. 2-3

    loss_fn() -> scalar, called twice, so without dropout; parameters: those to move; g: the
    gradient of all of them, |g| its L2 norm over all together (plus 1e-12). Returns the loss at w,
    without a graph; the weights are as before. Points to flat minima. unCLIP trains CLIP so, with
    rho = 0.1, which lowers the rank of the embeddings (app. C, sec. 2.2).
    """
    parameters = list(parameters)
    before = [p.detach().clone() for p in parameters]
    loss = loss_fn()
    grads = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in grads]).norm() + 1e-12
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            p += rho / norm * g
    loss_fn().backward()
    with torch.no_grad():
        for p, w in zip(parameters, before):
            p.copy_(w)
    return loss.detach()


@torch.no_grad()
def zero_shot(model, images, tokens):
    """How well each caption fits each picture, as probabilities over the captions.   CLIP sec. 3.1

    images (B, 3, S, S) in [-1, 1], tokens (N, L) -> (B, N), rows sum to 1.
    """
    z_i, z_t = unit(model.encode_image(images)), unit(model.encode_text(tokens)[0])
    return (model.scale() * z_i @ z_t.T).softmax(1)                # (B, N)


# ---------------------------------------------------------------- pictures


def read_picture(path):
    """A picture file -> PIL image, RGB, turned upright as its camera noted."""
    with reading(path, "a picture"), Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def expect_pixels(x, fits, shape):
    """ValueError unless x fits the shape, as the caller found, and lies in [-1, 1]."""
    if not fits or x.abs().max() > 1:
        raise ValueError(f"expected {shape} in [-1, 1], got {tuple(x.shape)} in "
                         f"[{x.min():g}, {x.max():g}]; from 0..255: x / 127.5 - 1")


def preprocess(picture, size):
    """Any picture as CLIP was shown its own: short side to `size`, bicubic; the middle of the rest.

    picture: the path of a file, a PIL image, or a tensor (3, H, W) in [-1, 1]
    -> (3, size, size) in [-1, 1]. (encode_image does the normalising.)
    """
    if not torch.is_tensor(picture):
        picture = picture if isinstance(picture, Image.Image) else read_picture(picture)
        picture = picture.convert("RGB")
    else:
        expect_pixels(picture, picture.ndim == 3 and len(picture) == 3, "a picture (3, H, W)")
    H, W = picture.shape[1:] if torch.is_tensor(picture) else reversed(picture.size)
    h, w = size * H // min(H, W), size * W // min(H, W)            # the short one is `size`
    if torch.is_tensor(picture):
        x = F.interpolate(picture[None].float(), (h, w), mode="bicubic", antialias=True)[0]
    else:
        x = np.array(picture.resize((w, h), Image.Resampling.BICUBIC))         # (h, w, 3)
        x = torch.from_numpy(x).permute(2, 0, 1).float() / 127.5 - 1           # (3, h, w)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return x[:, top:top + size, left:left + size].clamp(-1, 1)     # bicubic overshoots


# ---------------------------------------------------------------- the weights of others
# Files are data here: nothing in them is ever executed. They are mapped, not read, where the format
# allows it, so loading takes memory only for what has to be joined or converted.

SAFE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}, windows on the file itself (changing one leaves it be).

    8 bytes: N, little-endian; N bytes of JSON {name: {dtype, shape, data_offsets}}; the data, one
    tensor after the other without gaps, offsets counted from its start.   ValueError otherwise.
    """
    with reading(path, "a safetensors file"), open(path, "rb") as file:
        size = Path(path).stat().st_size
        N = int.from_bytes(file.read(8), "little")
        if N > min(size - 8, 100_000_000):
            raise ValueError(f"its header should have {N} bytes, the file has {size}")
        header = json.loads(file.read(N))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + N:]
        tensors, at = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in SAFE:
                raise ValueError(f"{name} is {entry['dtype']}, none of {', '.join(SAFE)}")
            dtype, (begin, end) = SAFE[entry["dtype"]], entry["data_offsets"]
            if begin != at or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{name} should be {entry['dtype']} {entry['shape']} at byte {at},"
                                 f" not at {begin}..{end}")
            if end > len(data):
                raise ValueError(f"{name} ends at byte {end} of {len(data)}; is it cut short?")
            window, at = data[begin:end], end
            if (8 + N + begin) % dtype.itemsize:                   # numbers cannot be read there
                window = window.clone()
            tensors[name] = window.view(dtype).view(entry["shape"])
        if at != len(data):
            raise ValueError(f"it goes on for {len(data) - at} bytes after its last tensor")
        return tensors


class Archived:
    """What stands for a module of a TorchScript archive: its attributes, none of its code."""


class ArchiveReader(pickle.Unpickler):
    """Reads modules and tensors, and refuses to look up anything else.

    torch.jit.load would do, but it runs what an archive defines as __setstate__.
    """

    known = {("torch._utils", "_rebuild_tensor_v2"):
             lambda data, start, shape, stride, *_: data.as_strided(shape, stride, start),
             ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
             **{("torch.jit._pickle", f"build_{kind}list"): list
                for kind in ("int", "double", "bool", "tensor")},
             ("collections", "OrderedDict"): dict,
             ("torch", "DoubleStorage"): torch.float64, ("torch", "FloatStorage"): torch.float32,
             ("torch", "HalfStorage"): torch.float16, ("torch", "LongStorage"): torch.int64,
             ("torch", "BFloat16Storage"): torch.bfloat16, ("torch", "IntStorage"): torch.int32}

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Archived
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.known[module, name]

    def persistent_load(self, key):
        _, dtype, number, _, _ = key                               # "storage", ., ., device, count
        data = bytearray(self.archive.read(f"{self.folder}/data/{number}"))
        return torch.frombuffer(data, dtype=dtype)


def archived_tensors(module, prefix=""):
    """An Archived module, with all modules within -> (name, tensor) pairs, dotted names."""
    for name, value in vars(module).items():
        if isinstance(value, Archived):
            yield from archived_tensors(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            yield prefix + name, value


def read_weights(path):
    """A .safetensors, torch.save or TorchScript file -> {name: tensor}, on the CPU.

    FileNotFoundError, or ValueError for a file that is damaged or holds more than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with reading(path, "a file of weights"):
        if not zipfile.is_zipfile(path):                           # torch.save of long ago
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with zipfile.ZipFile(path) as archive:
                folder = archive.namelist()[0].split("/")[0]
                if f"{folder}/constants.pkl" in archive.namelist():            # TorchScript
                    return dict(archived_tensors(ArchiveReader(archive, folder).load()))
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise ValueError("expected {name: tensor}")
        return {name: weight.detach() for name, weight in weights.items()}


def read_folder(folder):
    """A model's folder, as Hugging Face's libraries write it -> weights, settings, weight file."""
    settings = read_json(folder / "config.json")
    names = [stem + end for end in (".safetensors", ".bin")
             for stem in ("model", "diffusion_pytorch_model", "pytorch_model")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there are no weights in {folder}; expected one of "
                                f"{', '.join(names)}")
    weights = read_weights(path)
    return {k: w for k, w in weights.items() if not k.endswith("position_ids")}, settings, path


def expect(settings, path, **wanted):
    """Compare a configuration with what the code does. What is not mentioned is not compared."""
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path} says {name} = {settings[name]!r}; only {value!r} fits here")


def sizes(settings, path, *names):
    """The numbers that a configuration has to state, as a list of whole numbers from 1 on."""
    for name in names:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise ValueError(f"{path} says {name} = {settings.get(name)!r}; expected a whole "
                             "number from 1 on")
    return [settings[name] for name in names]


def their_names(table, ours):
    """The row of a key table for our name -> the names in their file, and a change to be made.

    table {ours: theirs}: N is a number, * is weight or bias, {q,k,v} are several names. Where
    more than the name differs, theirs is a pair (name, change).   No row: no names.
    """
    for row, theirs in table.items():
        pattern = re.escape(row).replace("N", r"(\d+)").replace(r"\*", "(weight|bias)")
        if match := re.fullmatch(pattern, ours):
            name, change = theirs if isinstance(theirs, tuple) else (theirs, lambda w: w)
            for part in match.groups():
                name = re.sub(r"N|\*", part, name, count=1)
            if several := re.search(r"\{(.*)\}", name):
                return [name.replace(several[0], one) for one in several[1].split(",")], change
            return [name], change
    return [], None


def rename(module, weights, table, path):
    """Others' weights under the names of `module`: {ours: tensor}, for those in the key table.

    Strict: ValueError names the first key that is missing, does not fit, or is left over.
    """
    renamed, left = {}, dict(weights)
    for ours, target in module.state_dict().items():
        names, change = their_names(table, ours)
        if missing := [name for name in names if name not in left]:
            raise ValueError(f"{path} lacks {missing[0]}; is it of another model, or cut?")
        if not names:
            continue
        parts = [left.pop(name) for name in names]
        try:
            got = change(torch.cat(parts) if len(parts) > 1 else parts[0])
        except (RuntimeError, IndexError):             # other shapes than the change was made for
            got = parts[0]
        if got.shape != target.shape or not got.is_floating_point():
            raise ValueError(f"{names[0]} in {path} does not fit: it gives {got.dtype} "
                             f"{[*got.shape]}, {ours} is {[*target.shape]}")
        renamed[ours] = got
    if left:
        raise ValueError(f"{path} holds {min(left)}, which has no place here; is it of another "
                         "model?")
    return renamed


def settle(module, weights, device, dtype):
    """Fill a module made on "meta", one weight at a time to the device and dtype, ready to run."""
    module.load_state_dict(weights, assign=True)
    for p in module.parameters():
        p.data = p.data.to(device, dtype)
    return module.to(device).eval()


OPENAI_BLOCK = {"ln1.*": "ln_1.*", "qkv.*": "attn.in_proj_*", "proj.*": "attn.out_proj.*",
                "ln2.*": "ln_2.*", "fc1.*": "mlp.c_fc.*", "fc2.*": "mlp.c_proj.*"}
OPENAI = {
    "image.patch.weight": "visual.conv1.weight",
    "image.cls": "visual.class_embedding",
    "image.pos": "visual.positional_embedding",
    "image.ln_in.*": "visual.ln_pre.*",
    **{f"image.blocks.N.{a}": f"visual.transformer.resblocks.N.{b}"
       for a, b in OPENAI_BLOCK.items()},
    "image.ln_out.*": "visual.ln_post.*",
    "image.proj": "visual.proj",
    "text.tok.weight": "token_embedding.weight",
    "text.pos": "positional_embedding",
    **{f"text.blocks.N.{a}": f"transformer.resblocks.N.{b}" for a, b in OPENAI_BLOCK.items()},
    "text.ln_out.*": "ln_final.*",
    "text.proj": "text_projection",
    "logit_scale": "logit_scale",
}

HUGGING_FACE_BLOCK = {
    "ln1.*": "layer_norm1.*", "qkv.*": "self_attn.{q,k,v}_proj.*", "proj.*": "self_attn.out_proj.*",
    "ln2.*": "layer_norm2.*", "fc1.*": "mlp.fc1.*", "fc2.*": "mlp.fc2.*"}
HUGGING_FACE = {
    "image.patch.weight": "vision_model.embeddings.patch_embedding.weight",
    "image.cls": "vision_model.embeddings.class_embedding",
    "image.pos": "vision_model.embeddings.position_embedding.weight",
    "image.ln_in.*": "vision_model.pre_layrnorm.*",                # sic
    **{f"image.blocks.N.{a}": f"vision_model.encoder.layers.N.{b}"
       for a, b in HUGGING_FACE_BLOCK.items()},
    "image.ln_out.*": "vision_model.post_layernorm.*",
    "image.proj": ("visual_projection.weight", torch.t),
    "text.tok.weight": "text_model.embeddings.token_embedding.weight",
    "text.pos": "text_model.embeddings.position_embedding.weight",
    **{f"text.blocks.N.{a}": f"text_model.encoder.layers.N.{b}"
       for a, b in HUGGING_FACE_BLOCK.items()},
    "text.ln_out.*": "text_model.final_layer_norm.*",
    "text.proj": ("text_projection.weight", torch.t),
    "logit_scale": "logit_scale",
}


def clip_config(weights, table, settings, path):
    """Sizes from the shapes of the tensors; heads from config.json's settings, or width / 64.

    settings {}: there is no config.json.   ValueError where it contradicts shapes or code.
    """
    there = path.parent / "config.json"

    def shape(ours, dimensions):                                   # "text.pos", 2 -> [77, 768]
        (name,), change = their_names(table, ours)
        if name not in weights:
            raise ValueError(f"{path} lacks {name}; is it a CLIP with a Vision Transformer?")
        if weights[name].ndim != dimensions or not weights[name].numel():
            raise ValueError(f"{name} in {path} is {[*weights[name].shape]}; expected "
                             f"{dimensions} dimensions")
        return change(weights[name]).shape

    def layers(half):
        names = (their_names(table, f"{half}.blocks.{n}.ln1.bias")[0][0] for n in itertools.count())
        return sum(1 for _ in itertools.takewhile(weights.__contains__, names))

    def what_both_have(half, key, heads):                          # heads: transformers' default
        says = settings.get(key, settings)
        if not isinstance(says, dict):
            raise ValueError(f"{there} says {key} = {says!r}; expected {{...}}")
        width, D = shape(f"{half}.proj", 2)
        heads, = sizes({"num_attention_heads": heads if says else max(1, width // 64)} | says,
                       there, "num_attention_heads")
        if width % heads:
            raise ValueError(f"{there} says {heads} heads, which do not divide the width {width}")
        expect(says, there, hidden_size=width, num_hidden_layers=layers(half),
               hidden_act="quick_gelu", layer_norm_eps=1e-5)
        return says, width, heads, D

    c = CLIPConfig(image_layers=layers("image"), text_layers=layers("text"))
    if c.image_layers:
        says, c.image_width, c.image_heads, c.embed_dim = what_both_have("image", "vision_config",
                                                                         12)
        c.patch = shape("image.patch.weight", 4)[3]
        c.image_size = c.patch * math.isqrt(shape("image.pos", 2)[0] - 1)
        expect(says, there, image_size=c.image_size, patch_size=c.patch)
    if c.text_layers or not c.image_layers:
        says, c.text_width, c.text_heads, c.embed_dim = what_both_have("text", "text_config", 8)
        c.vocab_size, c.context = shape("text.tok.weight", 2)[0], shape("text.pos", 2)[0]
        expect(says, there, vocab_size=c.vocab_size, max_position_embeddings=c.context)
        if says.get("eos_token_id") != 2:                          # a known slip
            expect(says, there, eos_token_id=c.vocab_size - 1)
    return c


def load_clip(path, device="cpu", dtype=torch.float32):
    """OpenAI's ViT-*.pt, a state dict with its names, or a Hugging Face CLIP folder -> CLIP.

    A folder may hold one half alone (text_encoder/, image_encoder/ of a Karlo folder).
    ValueError or FileNotFoundError for anything else, a ResNet CLIP among it.
    """
    path, table, settings = Path(path), OPENAI, {}
    if path.is_dir():
        table, (weights, settings, path) = HUGGING_FACE, read_folder(path)
    else:
        weights = read_weights(path)
        for number in ("input_resolution", "context_length", "vocab_size"):    # not weights
            weights.pop(number, None)
    if any(name.startswith("visual.layer1.") for name in weights):
        raise ValueError(f"{path} is a ResNet CLIP, which is not built here; take one whose name "
                         "begins with ViT, such as ViT-L-14.pt")
    config = clip_config(weights, table, settings, path)
    with torch.device("meta"):
        model = CLIP(config)
    if not config.image_layers or not config.text_layers:          # half a model, without a scale:
        weights["logit_scale"] = torch.tensor(math.log(100.0))     # where OpenAI's training ended
    return settle(model, rename(model, weights, table, path), device, dtype)


def check_tokenizer(tokenizer, config, path):
    """ValueError if the vocabulary read from `path` is not that of the text encoder."""
    if len(tokenizer) != config.vocab_size or tokenizer.end != config.vocab_size - 1:
        raise ValueError(f"{path} has {len(tokenizer)} tokens (the end is {tokenizer.end}), the "
                         f"text encoder {config.vocab_size}; they are not of the same model")


def main(arguments=None):
    """The command line: a picture, captions -> how well each fits. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Which caption fits the picture? Prints CLIP's probability of each.",
        allow_abbrev=False)
    parser.add_argument("picture", help="a picture file, of any size")
    parser.add_argument("captions", nargs="+", metavar="caption", help='such as "a cat" "a dog"')
    parser.add_argument("--weights", required=True, help="OpenAI's ViT-*.pt, or a CLIP folder of "
                        "Hugging Face's (config.json, model.safetensors)")
    parser.add_argument("--vocab", help="bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json "
                        "and merges.txt (default: the folder of the weights)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    args = parser.parse_args(arguments)
    try:
        if args.vocab is None and not Path(args.weights).is_dir():
            raise ValueError("expected --vocab with a vocabulary file, such as "
                             "bpe_simple_vocab_16e6.txt.gz, as the weights are a single file")
        model = load_clip(args.weights, args.device)
        vocab = args.vocab or args.weights
        tokenizer = Tokenizer.load(vocab)
        check_tokenizer(tokenizer, model.config, vocab)
        picture = preprocess(args.picture, model.config.image_size)[None].to(args.device)
        tokens = tokenizer(args.captions, model.config.context).to(args.device)
        for share, caption in zip(zero_shot(model, picture, tokens)[0].tolist(), args.captions):
            print(f"{share:7.2%}  {caption}")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # no such device
        print(f"clip.py: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


def demo():
    """Six pictures of the toy world, six captions: what belongs together, says the toy's CLIP."""
    import random

    import train_toy                             # these stand below: only the demo looks there
    import unclip
    captions = ("a small red circle", "a large red circle", "a small red square",
                "a small red circle above a large blue square",
                "a small blue circle above a large red square",
                "a small red circle below a large blue square")
    stack = unclip.load(unclip.HERE / "weights/toy.pt")
    pictures = torch.stack([train_toy.render(train_toy.place(train_toy.parse(text),
                                                             random.Random(0)), 32)
                            for text in captions])
    tokens = stack.tokenizer(captions, stack.config.clip.context)
    shares = zero_shot(stack.parts["clip"], pictures, tokens)                  # (6, 6)
    print("each row a picture; columns: how likely is it of caption A, B, ...?\n" + " " * 50
          + "".join(f"{letter:>6}" for letter in "ABCDEF"))
    for letter, text, row in zip("ABCDEF", captions, shares.tolist()):
        print(f"{letter}  {text:<47}" + "".join(f"{share:6.0%}" for share in row))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main())
    import unclip
    unclip.stop_on_error(demo)
