"""CLIP: images and captions embedded in one space, where a caption is near what it describes.

    z_i = encode_image(image),  z_t = encode_text(caption),   cos(z_i, z_t) is large for pairs

CLIP, its contrastive loss and zero-shot classification come first; then the two encoders, the
Transformer that the prior and the decoder share, the tokenizer (byte-level BPE) and image files.

    python clip.py [PHOTO.jpg "a cat" "a dog" --weights ViT-L-14.pt --vocab VOCABULARY]

    B batch   L tokens   W width of a Transformer   D width of the shared embedding   H heads

Papers: CLIP (Radford et al. 2021; a bare "Sec." is its), GLIDE (Nichol et al. 2021), unCLIP (2022)
"""
if __name__ == "__main__":
    import unclip                    # first: Ctrl-C is one line from then on

import argparse
import collections
import contextlib
import html
import itertools
import math
import os
import pickle
import random
import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

# ---------------------------------------------------------------- CLIP and its loss
class CLIP(nn.Module):
    """An image and a text encoder into one space of D dimensions, and a temperature.   Sec. 2.3"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config) if config.image_layers else None
        self.text = TextEncoder(config) if config.text_layers else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))      # its exp is 14.29

    def forward(self, images, tokens):
        """B pairs -> unit rows z_i, z_t (B, D), which the loss compares."""
        z_i, z_t = self.encode_image(images), self.encode_text(tokens)[0]
        return unit(z_i.float()), unit(z_t.float())

    def encode_image(self, images):
        """(B, 3, S, S) in [-1, 1], S = config.image_size -> z_i (B, D), not normalised."""
        S = self.config.image_size
        if self.image is None:                                     # a checkpoint of half a CLIP
            raise ValueError("this CLIP has no image encoder, only the text half; load the other")
        if images.shape[1:] != (3, S, S):
            raise ValueError(f"expected images (B, 3, {S}, {S}), got {tuple(images.shape)}")
        mean, std = (torch.tensor(numbers).to(images, non_blocking=True).view(3, 1, 1)
                     for numbers in (self.config.pixel_mean, self.config.pixel_std))
        images = ((images + 1) / 2 - mean) / std
        return self.image(images.to(self.image.proj.dtype))

    def encode_text(self, tokens):
        """(B, L) -> z_t (B, D), not normalised, and the hidden states of all tokens (B, L, W)."""
        if self.text is None:
            raise ValueError("this CLIP has no text encoder, only the image half; load the other")
        L = self.config.context
        if tokens.shape[1] > L:
            raise ValueError(f"expected at most {L} tokens, got {tokens.shape[1]}: shorten them")
        return self.text(tokens)

    def scale(self):
        """1 / temperature, at most 100: beyond that training becomes unstable.   Sec. 2.5"""
        return self.logit_scale.exp().clamp(max=100)


def clip_loss(image_emb, text_emb, scale, caption_ids=None):
    """The contrastive loss (InfoNCE): each image picks its caption out of the batch, each caption
    its image; the other rows are negatives.   CLIP fig. 3

    image_emb, text_emb (B, D) with unit rows, scale = 1 / temperature -> scalar in nats.
    caption_ids (B,): equal for equal captions, which share the answer. Expect log(B) from a model
    that knows nothing; the minimum is 0, or the mean of log(how often each caption occurs).
    """
    logits = scale * image_emb @ text_emb.T                               # (B, B)
    if caption_ids is None:
        caption_ids = torch.arange(len(logits), device=logits.device)

    answer = (caption_ids[:, None] == caption_ids[None, :]).to(logits)    # (B, B), symmetric
    answer = answer / answer.sum(1, keepdim=True)                         # rows sum to 1
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


@torch.no_grad()
def zero_shot(model, images, tokens):
    """A classifier without training: how likely is each caption for each image?   Sec. 3.1

    images (B, 3, S, S) in [-1, 1], tokens (N, L) -> probabilities (B, N), rows sum to 1: a softmax
    of model.scale() times the cosines of model.encode_image(.) and model.encode_text(.)[0].
    """
    z_i, z_t = unit(model.encode_image(images)), unit(model.encode_text(tokens)[0])
    return (model.scale() * z_i @ z_t.T).softmax(1)                       # (B, N)


def unit(z):
    """Rows of length 1: (..., D) -> (..., D). A row of zeros stays zero."""
    return F.normalize(z, dim=-1, eps=max(1e-12, torch.finfo(z.dtype).tiny))    # 1e-12 is 0 in half


# ---------------------------------------------------------------- the two encoders
@dataclass
class CLIPConfig:
    """Sizes of a CLIP; the comments give the paper's ViT-H/16.   unCLIP app. C"""
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
    pixel_mean: tuple = (0.48145466, 0.4578275, 0.40821073)    # of CLIP's data set, in [0, 1]
    pixel_std: tuple = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """A Vision Transformer: patches are its tokens, z_i comes from the class token.   Sec. 2.4"""

    def __init__(self, c):
        super().__init__()
        W, n = c.image_width, c.image_size // c.patch
        self.patch = nn.Conv2d(3, W, c.patch, stride=c.patch, bias=False)
        self.cls = nn.Parameter(torch.randn(W) * W ** -0.5)
        self.pos = nn.Parameter(torch.randn(1 + n * n, W) * W ** -0.5)
        self.ln_in, self.ln_out = nn.LayerNorm(W), nn.LayerNorm(W)
        self.blocks = blocks(c.image_layers, W, c.image_heads, activation=c.activation)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, images):                                     # (B, 3, S, S) standardised
        x = self.patch(images).flatten(2).transpose(1, 2)          # (B, patches, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + patches, W)

        x = self.ln_in(x + self.pos)
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x[:, 0]) @ self.proj                    # (B, D)


class TextEncoder(nn.Module):
    """A causal Transformer; z_t comes from the end token, which attends to the whole caption."""

    def __init__(self, c):
        super().__init__()
        W = c.text_width
        self.end = c.vocab_size - 1
        self.tok = nn.Embedding(c.vocab_size, W)
        self.pos = nn.Parameter(torch.randn(c.context, W) * 0.01)
        nn.init.normal_(self.tok.weight, std=0.02)
        self.blocks = blocks(c.text_layers, W, c.text_heads, activation=c.activation)
        self.ln_out = nn.LayerNorm(W)
        self.proj = nn.Parameter(torch.randn(W, c.embed_dim) * W ** -0.5)

    def forward(self, tokens):        # (B, L) -> z_t (B, D), hidden states (B, L, W)
        x = self.tok(tokens) + self.pos[:tokens.shape[1]]          # (B, L, W)
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.ln_out(x)                                         # (B, L, W) hidden states

        # pooling at the first end token (argmax takes the first of equals)
        at_end = (tokens == self.end).int().argmax(1)              # (B,)
        rows = torch.arange(len(x), device=x.device)
        return x[rows, at_end] @ self.proj, x                      # (B, D), (B, L, W)


# ---------------------------------------------------------------- Transformer
def attend(q, k, v, heads, mask=None, causal=False):
    """Multi-head attention:  softmax(q k^T / sqrt(W / H)) v  in each head's slice of the width.

    q (B, L, W), k and v (B, S, W) -> (B, L, W). mask: the attention mask (B or 1, 1, L or 1, S),
    True where a query attends to a key; a query without keys gets zeros. causal: of L = S tokens
    each attends to itself and those before; then without mask.
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))   # (B, H, ., W / H)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)                                        # (B, L, W)


class Block(nn.Module):
    """A pre-LN Transformer block:  x = x + attention(LN(x)),  x = x + MLP(LN(x)).   Sec. 2.4

    With context_width also cross-attention, as in GLIDE: `context` (B, S, context_width) gives S
    more keys and values, before those of x. cache.append(k, v) returns the keys and values of all
    calls so far, the context's, too, so that the context is passed in the first call only.
    """

    def __init__(self, width, heads, layers, activation="gelu", context_width=0):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that is a multiple of {heads} heads, got {width}")
        if activation not in ("gelu", "quick_gelu"):
            raise ValueError(f'expected the activation "gelu" or "quick_gelu", got {activation!r}')
        self.heads, self.activation = heads, activation
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.context = nn.Linear(context_width, 2 * width) if context_width else None

        # as OpenAI's CLIP: what the 2 * layers residual branches add does not grow with the depth
        branch = (2 * layers * width) ** -0.5
        for layer, std in [(self.qkv, width ** -0.5), (self.proj, branch),
                           (self.fc1, (2 * width) ** -0.5), (self.fc2, branch)]:
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask=None, causal=False, context=None, cache=None):     # (B, L, W)
        q, k, v = self.qkv(self.ln1(x)).chunk(3, dim=2)                          # (B, L, W) each

        # cross-attention and KV cache: more keys and values, before those of x
        if context is not None:
            k_context, v_context = self.context(context).chunk(2, dim=2)         # (B, S, W) each
            k, v = torch.cat([k_context, k], dim=1), torch.cat([v_context, v], dim=1)
        if cache is not None:
            k, v = cache.append(k, v)
        x = x + self.proj(attend(q, k, v, self.heads, mask, causal))

        h = self.fc1(self.ln2(x))                                                # (B, L, 4 W)
        h = h * torch.sigmoid(1.702 * h) if self.activation == "quick_gelu" else F.gelu(h)
        return x + self.fc2(h)                                                   # (B, L, W)


def blocks(layers, width, heads, **options):
    """The layers of one Transformer."""
    return nn.ModuleList(Block(width, heads, layers, **options) for _ in range(layers))


class KVCache:
    """The key-value (KV) cache of a causal block: keys and values of earlier tokens are kept."""

    def __init__(self, size):                            # room for `size` tokens, `length` so far
        self.size, self.length, self.k, self.v = size, 0, None, None

    def append(self, k, v):
        """k, v (B, n, W) of n new positions -> keys and values of all so far, (B, length, W)."""
        if self.k is None:
            self.k, self.v = (x.new_empty(x.shape[0], self.size, x.shape[2]) for x in (k, v))
        start, self.length = self.length, self.length + k.shape[1]
        self.k[:, start:self.length], self.v[:, start:self.length] = k, v
        return self.k[:, :self.length], self.v[:, :self.length]


# ---------------------------------------------------------------- for the prior and the decoder
class Text(NamedTuple):
    """A batch of captions as the prior and the decoder receive it."""
    tokens: torch.Tensor            # (B, L)
    mask: torch.Tensor              # (B, L) bool, True up to the end token, included
    z_t: torch.Tensor               # (B, D) CLIP's embedding of the caption
    states: torch.Tensor            # (B, CLIP's L, W) CLIP's hidden states; (B, 0) where unused

    def map(self, f):
        return Text(*(f(x) for x in self))

    def after(self, other):
        """The rows of another Text, then these, as one batch."""
        return Text(*(torch.cat(pair) for pair in zip(other, self)))

    def drop(self, keep):
        """No caption in the rows where keep (B,) is False: all padding, a zero embedding."""
        return self._replace(mask=self.mask & keep[:, None], z_t=self.z_t * keep[:, None])

    def null(self):
        """The null condition in every row, for the unconditional model."""
        return self.drop(torch.zeros_like(self.mask[:, 0]))


class CaptionEncoder(nn.Module):
    """GLIDE's text Transformer; the decoder and the AR prior have one each.   GLIDE sec. 4.1

    Every token attends to every other, and to padding, which is learned vectors; an empty caption
    is all padding.
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


class CaptionStates(nn.Module):
    """CLIP's hidden states in place of a text Transformer of one's own. Padding is learned vectors;
    the last position is the end token's once more."""

    def __init__(self, text_width, context, width):
        super().__init__()
        self.proj, self.ln_out = nn.Linear(text_width, width), nn.LayerNorm(width)
        self.pad = nn.Parameter(torch.randn(context, width) * 0.01)

    def forward(self, states, mask):                               # (B, L, text width), (B, L) bool
        L, end = states.shape[1], (mask.sum(1) - 1).clamp(min=0)
        x = torch.where(mask[:, :L, None], self.proj(states.to(self.pad.dtype)), self.pad[:L])
        x = torch.cat([x, x[torch.arange(len(x)), end, None]], dim=1)
        return self.ln_out(x)                                      # (B, L + 1, width)


def sinusoid(index, width):
    """Sinusoidal embedding:  [cos(i f_k), sin(i f_k)]  with  f_k = 10000^(-2k / width)."""
    k = torch.arange(width // 2, device=index.device)
    frequency = torch.exp(-math.log(10000) * k / (width // 2))     # (width / 2,)
    angle = index.float()[:, None] * frequency                     # (B, width / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)            # (B, width)


# ---------------------------------------------------------------- tokenizer (skip at first reading)
START, END = "<|startoftext|>", "<|endoftext|>"
STRAIGHT = str.maketrans("‘’‚‛ʼ“”„‟", "'" * 5 + '"' * 4, "\ufeff")      # and no byte-order mark
WHOLE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:[stmdſ]|re|ve|ll)")
RUN = re.compile("L+|N|Z+|[MPSC]+")    # of Unicode categories: letters; one digit; spaces; others

# A visible character for each byte, {33: "!", ..., 32: "Ġ"}, so that merges print as text. Visible
# Latin-1 is itself, the other 68 bytes are chr(256), chr(257), ... The order is CLIP's.
BYTES = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTES |= {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*BYTES}))}
BYTE_OF = {character: b for b, character in BYTES.items()}
ALPHABET = [*BYTES.values(), *(c + "</w>" for c in BYTES.values())]    # 512; </w> ends a word


def clean(text):
    """The text as the tokenizer sees it: "A &amp; B’s\\tCAT " -> "a & b's cat".

    HTML is unescaped twice, accents are composed (NFC). OpenAI's also mends encodings (ftfy).
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a caption as a string, got {type(text).__name__}: {text!r}")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # half pairs -> �
    text = html.unescape(html.unescape(text)).translate(STRAIGHT)
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def has_text(text):
    """Does a caption hold anything that one can see?"""
    return any(c.isprintable() and c != " " for c in clean(text))


def split_words(text):
    """Clean text to words, which no merge crosses: "it's 42 cats!!" -> it 's 4 2 cats !!"""
    categories = "".join(unicodedata.category(c)[0] for c in text)     # "it's 42" -> "LLPLZNN"
    words, i = [], 0
    while i < len(text):
        words.append(text[i:(WHOLE.match(text, i) or RUN.match(categories, i)).end()])
        i += len(words[-1])
    return [word for word in words if word != " "]


def spell(word):
    """Before any merge, a word is its UTF-8 bytes, the last one marked: "né" -> n Ã ©</w>."""
    *pieces, last = (BYTES[b] for b in word.encode("utf-8"))
    return [*pieces, last + "</w>"]


def merge_pair(pieces, pair):
    """Join `pair` everywhere, in one sweep from the left: (a, a) turns a a a b into aa a b."""
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


class Tokenizer:
    """Byte-level BPE, as in CLIP: frequent words are one token, yet any text can be encoded.

    merges: "left right" strings, as learned. vocab: {token: id}, by default in OpenAI's order.
    """

    def __init__(self, merges, vocab=None):
        self.merges = list(merges)
        pairs = [tuple(merge.split(" ")) for merge in self.merges]

        # the vocabulary: given, as of public weights, or in the order of the merges
        tokens = dict.fromkeys([*ALPHABET, *map("".join, pairs), START, END])    # each once
        vocab = {token: i for i, token in enumerate(tokens)} if vocab is None else vocab
        wrong = [merge for merge, pair in zip(self.merges, pairs) if len(pair) != 2]
        if wrong := [*wrong, *{*tokens, *itertools.chain(*pairs)} ^ {*vocab}]:
            raise ValueError(f"merges and vocabulary do not fit: {wrong[0]!r}")
        if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != [*range(len(vocab))]:
            raise ValueError("expected a vocabulary with the ids 0, 1, 2, ... once each")

        self.ids, self.tokens = dict(vocab), sorted(vocab, key=vocab.get)      # inverses
        self.rank = {pair: n for n, pair in enumerate(pairs)}
        self.start, self.end = vocab[START], vocab[END]
        self.known = {START: [self.start], END: [self.end]}                    # {word: ids}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges: join the most frequent pair of neighbours, count again, and so on.

        Stops at vocab_size tokens, or when every word is one. Slow: for thousands of words.
        """
        if isinstance(texts, str) or vocab_size < len(ALPHABET) + 2:
            raise ValueError(f"expected a list, at least 514 tokens: {texts!r:.30}, {vocab_size}")

        counts = collections.Counter(word for text in texts for word in split_words(clean(text)))
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

    def state(self):
        """What a checkpoint stores; Tokenizer(**state) inverts it."""
        return {"merges": self.merges, "vocab": self.ids}

    def __len__(self):
        return len(self.tokens)

    def bpe(self, word):
        """From the symbols of `spell(word)`, join the pair learned first, until none is left."""
        pieces = spell(word)
        while len(pieces) > 1:
            first = min(zip(pieces, pieces[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if first not in self.rank:
                break
            pieces = merge_pair(pieces, first)
        return pieces

    def encode(self, text):
        """Text to a list of ids, without start and end (unless the text spells one out)."""
        ids = []
        for word in split_words(clean(text)):
            if word not in self.known:
                self.known[word] = [self.ids[piece] for piece in self.bpe(word)]
            ids += self.known[word]
        return ids

    def decode(self, ids):
        """The ids (list or 1-D tensor) of one caption to its words, up to the first end token."""
        ids = [int(i) for i in ids]
        if not all(0 <= i < len(self) for i in ids):
            raise ValueError(f"{ids} are not all below {len(self)}; are they another tokenizer's?")
        ids = ids[:ids.index(self.end)] if self.end in ids else ids
        pieces = [self.tokens[i] for i in ids if i != self.start]
        text = "".join(p[:-4] + " " if p.endswith("</w>") else p for p in pieces)
        return bytes(BYTE_OF.get(c, 32) for c in text).decode("utf-8", "replace").removesuffix(" ")

    def __call__(self, texts, context_length, truncate=False):
        """A caption or a list of B captions -> (B, L) long:  start, ids, end, then 0 as padding.

        ValueError for a caption of more than L tokens, unless truncate cuts it.
        Note: 0 is also the id of "!", so find the padding by token_mask, not by the zeros.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)      # (B, L)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length and truncate:
                ids = [*ids[:context_length - 1], self.end]
            if len(ids) > context_length:
                raise ValueError(f"expected captions of at most {context_length} tokens, start and "
                                 f"end included, got {len(ids)} for {text[:60]!r}; shorten it")
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def token_mask(tokens, end):
    """Which tokens are real: True up to the first end token, included.   (B, L) -> (B, L) bool."""
    ends = (tokens == end).long()                                  # (B, L)
    return ends.cumsum(1) - ends == 0                              # no end token to the left


# ---------------------------------------------------------------- image files
@contextlib.contextmanager
def reading(path, kind):
    """`with reading("x.png", "an image"):` what goes wrong within is one sentence on the file."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"{path} cannot be read: {error.strerror}; expected {kind}") from None
    except torch.OutOfMemoryError:                                 # of a GPU: not the file's fault
        raise
    except Exception as error:                                     # a damaged file may raise any
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, or no weights"
        reason = reason.split("\n")[0][:200]
        raise ValueError(f"{path} cannot be read as {kind}: {reason}") from None


def read_image(image):
    """A path or a PIL image of any mode -> RGB, turned upright (EXIF), transparency on white."""
    opened = isinstance(image, Image.Image)
    if not opened and not isinstance(image, (str, os.PathLike)):
        raise ValueError("expected the path of an image, a PIL image or a tensor (3, H, W) in "
                         f"[-1, 1], got {type(image).__name__}")

    name = getattr(image, "filename", "") if opened else image
    with reading(name or "the image", "an image"):
        image = image if opened else Image.open(image)
        image = ImageOps.exif_transpose(image)

        # numbers of more than 8 bits
        if image.mode.startswith("I;16"):                          # 0..65535 -> 0..255
            levels = np.asarray(image)
            if image.has_transparency_data:
                raise ValueError("it has transparency in 16 bits; save it as 8 bits")
            if 0 < levels.max() < 4096:
                raise ValueError(f"levels up to {levels.max()} of 65535, is it of 12 bits? save it "
                                 "as 8 bits")
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("the range of 32-bit numbers is not known; save it as 8 or 16 bits")

        # transparency
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info.pop("exif", None)                               # it is upright now
        return image


def open_image(image):
    """A path, a PIL image or a tensor (3, H, W) in [-1, 1] -> its middle square (3, S, S)."""
    if not torch.is_tensor(image):
        x = torch.from_numpy(np.array(read_image(image))).permute(2, 0, 1) / 127.5 - 1
    elif image.ndim == 3 and len(image) == 3 and image.is_floating_point() and image.numel() and (
            image.abs().max() <= 1):                               # NaN is not
        x = image.float()
    else:
        raise ValueError("expected an image (3, H, W) of floats in [-1, 1], got "
                         f"{image.dtype} {tuple(image.shape)}; from 0..255: x / 127.5 - 1")

    S = min(x.shape[1:])
    top, left = (round((side - S) / 2) for side in x.shape[1:])
    return x[:, top:top + S, left:left + S]


def preprocess(image, size):
    """As CLIP was trained: a path or PIL image, shrunk (bicubic), middle square (3, size, size)."""
    image = read_image(image)
    W, H = image.size
    short = min(W, H)
    w, h = min(W, 4 * short), min(H, 4 * short)                    # of a long strip, its middle
    box = (W - w) / 2, (H - h) / 2, (W + w) / 2, (H + h) / 2
    w, h = size * w // short, size * h // short                    # the short one is `size`
    return open_image(image.resize((w, h), Image.Resampling.BICUBIC, box=box))


# ---------------------------------------------------------------- the program
DEMO = ("a small red circle", "a large red circle", "a small red square",
        "a small red circle above a large blue square",
        "a small blue circle above a large red square",
        "a small red circle below a large blue square")


def main(arguments=None):
    """Which caption fits the image? Prints CLIP's probability of each."""
    import unclip
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("image", nargs="?", help="an image file; default: six of the toy world")
    add("captions", nargs="*", metavar="caption", help='such as "a cat" "a dog"')
    add("--weights", type=unclip.named, help="OpenAI's ViT-*.pt, or Hugging Face's CLIP folder; "
        "default: the toy's")
    add("--vocab", type=unclip.named, help="bpe_simple_vocab_16e6.txt.gz; default: in that folder")
    add("--device", default="cpu", help="cpu, cuda or mps; default: cpu")
    add("-o", "--out", type=unclip.image_name, metavar="FILE.png", help="write the images, in the "
        "order of the columns")
    args = parser.parse_intermixed_args(arguments)
    if args.image is not None and not args.captions:
        raise ValueError('expected captions after the image, such as "a cat" "a dog"')
    if not all(map(has_text, args.captions)):
        raise ValueError(f"expected captions with some text, got {args.captions}")

    # CLIP and its tokenizer: the toy's, or public ones
    device = unclip.pick_device(args.device)
    if args.weights is None and args.vocab is None:
        toy = unclip.load(unclip.HERE / "weights/toy.pt", device)
        model, tokenizer = toy.part("clip"), toy.tokenizer
    else:
        from extras import karlo
        model, tokenizer = karlo.open_clip(args.weights, args.vocab, device)

    # an image file, or the toy world's images of the captions
    size, captions = model.config.image_size, args.captions or DEMO
    if args.image is not None:
        images = preprocess(args.image, size)[None]                            # (1, 3, S, S)
    else:
        import train_toy
        scenes = [train_toy.place(train_toy.parse(text), random.Random(0)) for text in DEMO]
        images = torch.stack([train_toy.render(scene, size) for scene in scenes])
        print("each column is an image, of the captions in this order")
    if args.out is not None:
        unclip.save_grid(F.interpolate(images, max(128, size)), args.out, columns=len(images))

    tokens = tokenizer(captions, model.config.context).to(device)              # (N, L)
    probabilities = zero_shot(model, images.to(device), tokens)                # (B, N)
    if not probabilities.isfinite().all():
        raise ValueError(f"{args.weights or 'toy.pt'} is damaged: probabilities are not finite")
    for caption, row in zip(captions, probabilities.T.tolist()):
        print(" ".join(f"{x:7.2%}" for x in row), caption, sep="  ")


if __name__ == "__main__":
    unclip.stop_on_error(main)
