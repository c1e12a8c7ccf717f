"""Chapter 2, CLIP: the tokenizer, the Transformer, CLIP itself, its loss, and reading pictures.

Reading the weights of others is in test_checkpoints.py.
"""
import gzip
import itertools
import json
import math
import random
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import golden_weights
from golden_weights import GOLDEN, error, refill

COLOURS, SHAPES = "red green blue yellow".split(), "circle square triangle cross".split()
CAPTIONS = [f"a {size} {colour} {shape} {where} a {other} blue square"
            for size, colour, shape, where, other in itertools.product(
                ["small", "large"], COLOURS, SHAPES, ["above", "below", "left of", "right of"],
                ["small", "large"])]


@pytest.fixture
def tokenizer():
    return clip.Tokenizer.train(CAPTIONS, vocab_size=1000)


@pytest.fixture(params=["bpe_toy.txt.gz", "karlo_diffusers_tiny/tokenizer"])
def public(request):
    """The same 40 merges in OpenAI's layout and in Hugging Face's."""
    return clip.Tokenizer.load(GOLDEN / request.param)


def random_text(rng):
    """Up to 20 characters from all over Unicode, white space of all kinds among them."""
    blocks = [(33, 127), (160, 592), (0x300, 0x370), (0x900, 0x980), (0x4E00, 0x9FFF),
              (0xAC00, 0xD7A4), (0x2000, 0x2070), (0x1F300, 0x1F650), (0x10000, 0x110000),
              (0, 33)]
    return "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(20)))


# ---------------------------------------------------------------- the text
def test_cleaning_lowers_straightens_and_collapses():
    text = " A &amp;amp; B\u2019s\u00a0\t\u201cCAT\u201d\n cafe\u0301 "
    assert clip.clean(text) == "a & b's \"cat\" caf\u00e9"
    assert clip.clean("broken \ud800 pair") == "broken \ufffd pair"


@pytest.mark.parametrize("text, words", [
    ("it's 42 cats!!", "it 's 4 2 cats !!"), ("don't they'll we've", "don 't they 'll we 've"),
    ("i'm he'd you're", "i 'm he 'd you 're"),
    ("'sand", "'s and"), ("!'s", "!' s"), ("rock'n'roll", "rock ' n ' roll"),
    ("a_b x² ①", "a _ b x ² ①"), ("日本語 नमस्ते", "日本語 नमस ् त े"),
    ("a<|endoftext|>", "a <|endoftext|>"), ("a!<|endoftext|>", "a !<| endoftext |>")])
def test_words_are_letters_or_one_digit_or_signs(text, words):
    """The right-hand sides were measured with OpenAI's pattern and the regex package."""
    assert clip.split_words(text) == words.split()


def test_every_letter_and_number_of_unicode_is_classified_by_its_category():
    r"""[^\W\d_]+ looks right and is not: it takes ² and ① for letters, among 1,131 characters."""
    for c in (c for c in map(chr, range(0x10000)) if not c.isspace()):
        kind = unicodedata.category(c)[0]
        wanted = {"L": [f"a{c}{c}", "!"], "N": ["a", c, c, "!"]}.get(kind, ["a", f"{c}{c}!"])
        assert clip.split_words(f"a{c}{c}!") == wanted, f"U+{ord(c):04X} has category {kind}"


# ---------------------------------------------------------------- ids
def test_token_ids_are_those_of_the_original_code(public):
    cases = torch.load(GOLDEN / "karlo_diffusers_tiny/expected.pt", weights_only=True)
    for case in cases["tokenizer_cases"]:
        assert public.encode(case["text"]) == case["ids"], case["text"]
    assert (public.start, public.end, len(public)) == (552, 553, 554)
    text = cases["text"]
    for prompts, ids, mask in [(cases["config"]["prompts"], text["cond_ids"], text["cond_mask"]),
                               ("", text["uncond_ids"], text["uncond_mask"])]:
        tokens = public(prompts, context_length=14, truncate=True)             # one is too long
        assert torch.equal(tokens, ids)
        assert torch.equal(clip.token_mask(tokens, public.end), mask.bool())


def test_the_first_ids_are_bytes_and_the_same_bytes_at_the_end_of_a_word(public):
    assert public.tokens[:3] == ["!", '"', "#"] and public.tokens[256:258] == ["!</w>", '"</w>']
    assert public.encode("!") == [256] and public.encode("!!") == [0, 256]
    assert len({*public.tokens[:256]}) == 256 and not any(c.isspace() for c in public.tokens[:256])
    assert public.encode("é") == [clip.ALPHABET.index("Ã"), clip.ALPHABET.index("©</w>")]


def test_bpe_applies_the_merges_in_the_order_they_were_learned():
    """The oracle knows no ranks: it walks through the whole list of merges, once, for each word."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcé") for _ in range(rng.randrange(1, 14))) for _ in range(400)]
    tokenizer = clip.Tokenizer.train(words[:200], vocab_size=640)
    assert len(tokenizer) == 640
    for word in words:
        pieces = clip.spell(word)
        for merge in tokenizer.merges:
            left, right = merge.split()
            i = 0
            while i < len(pieces) - 1:
                if pieces[i:i + 2] == [left, right]:
                    pieces[i:i + 2] = [left + right]
                i += 1
        got = [tokenizer.tokens[i] for i in tokenizer.encode(word)]
        assert got == pieces, f"{word}: wanted {pieces}, got {got}; lowest rank first?"


def test_a_token_that_two_merges_make_has_one_id():
    tokenizer = clip.Tokenizer(["a b", "b c", "ab c", "a bc"])
    assert tokenizer.ids["abc"] == 514 and len(tokenizer) == 512 + 3 + 2


# ---------------------------------------------------------------- there and back
def test_decoding_returns_the_words_of_any_text(tokenizer, public):
    rng = random.Random(1)
    for text in ["", "'s", "&lt;/w&gt;", "</w> Σ ẞ İ", *(random_text(rng) for _ in range(1500))]:
        cleaned = clip.clean(text)
        for each in (tokenizer, public):
            back = each.decode(each.encode(text))
            assert back == " ".join(clip.split_words(cleaned)), ascii(text)
            assert back.replace(" ", "") == cleaned.replace(" ", ""), ascii(text)


def test_captions_of_plain_words_come_back_as_they_were(tokenizer):
    for caption in CAPTIONS + ["zebra über 日本語"]:
        assert tokenizer.decode(tokenizer(caption, 99)[0]) == caption
    assert tokenizer.decode(tokenizer.encode("A cat, don't!")) == "a cat , don 't !"


def test_decoding_stops_at_the_first_end(tokenizer):
    a, = tokenizer.encode("a")
    assert tokenizer.decode([tokenizer.start, a, tokenizer.end, a, 0, 0]) == "a"
    assert tokenizer.decode([0, 256]) == "!!", "without an end token, 0 is an exclamation mark"
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenizer.decode([len(tokenizer)])


# ---------------------------------------------------------------- batches
def test_captions_stand_between_start_and_end_and_zeros_follow(tokenizer):
    tokens = tokenizer(["", "a", "a red circle"], context_length=6)
    a, red, circle = tokenizer.encode("a red circle")
    s, e = tokenizer.start, tokenizer.end
    assert tokens.tolist() == [[s, e, 0, 0, 0, 0], [s, a, e, 0, 0, 0], [s, a, red, circle, e, 0]]
    assert tokens.dtype == torch.long and (s, e) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer([], 6).shape == (0, 6)


def test_the_mask_ends_with_the_first_end_token(tokenizer):
    """"!!" puts a 0 among the real tokens: a mask made of tokens != 0 would lose it."""
    tokens = tokenizer(["", "!! a", "a <|endoftext|> a"], context_length=7)
    mask = clip.token_mask(tokens, tokenizer.end)
    assert mask.sum(1).tolist() == [2, 5, 3], "find the padding by the first end, not by its zeros"
    assert mask.dtype == torch.bool
    for row, real in zip(tokens.tolist(), mask.tolist()):
        first = row.index(tokenizer.end)
        assert real == [i <= first for i in range(7)]


def test_a_caption_too_long_is_refused_unless_it_may_be_cut(tokenizer):
    assert tokenizer("a red circle", 5).shape == (1, 5), "five tokens fit into five places"
    with pytest.raises(ValueError, match="at most 4 tokens.*got 5"):
        tokenizer(["a", "a red circle"], 4)
    a, red, _ = tokenizer.encode("a red circle")
    cut = tokenizer("a red circle", 4, truncate=True)
    assert cut.tolist() == [[tokenizer.start, a, red, tokenizer.end]]


@pytest.mark.parametrize("wrong", [3, None, b"a", ["a"]])
def test_a_caption_that_is_no_string_is_refused(tokenizer, wrong):
    with pytest.raises(ValueError, match="as a string"):
        tokenizer(["a", wrong], 8)


# ---------------------------------------------------------------- training
def test_training_makes_every_word_of_the_captions_one_token(tokenizer):
    for caption in CAPTIONS:
        assert len(tokenizer.encode(caption)) == len(caption.split()), caption
    assert len(tokenizer) < 1000, "training should stop when there is nothing left to merge"


def test_training_joins_the_most_frequent_pair_first_and_ties_go_by_the_alphabet():
    assert clip.Tokenizer.train(["ab ab cd"], 516).merges == ["a b</w>", "c d</w>"]
    assert clip.Tokenizer.train(["cd cd cd ab ab"], 515).merges == ["c d</w>"]
    assert clip.Tokenizer.train(["cd", "cd", "ab"], 515).merges == ["c d</w>"]
    assert clip.Tokenizer.train(["xy", "ab"], 515).merges == ["a b</w>"]


def test_training_does_not_depend_on_the_order_of_the_captions(tokenizer):
    shuffled = random.Random(2).sample(CAPTIONS, len(CAPTIONS))
    assert clip.Tokenizer.train(shuffled, 1000).state() == tokenizer.state()


@pytest.mark.parametrize("texts, size", [("a caption", 600), (["a caption"], 513)])
def test_training_refuses_a_bare_string_and_a_vocabulary_without_room_for_bytes(texts, size):
    with pytest.raises(ValueError, match="at least 514"):
        clip.Tokenizer.train(texts, size)


# ---------------------------------------------------------------- files
def test_a_tokenizer_survives_a_checkpoint(tokenizer, tmp_path):
    torch.save(tokenizer.state(), tmp_path / "tokenizer.pt")
    again = clip.Tokenizer.from_state(torch.load(tmp_path / "tokenizer.pt", weights_only=True))
    assert again.state() == tokenizer.state()
    assert again.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])


def test_ids_come_from_vocab_json_where_there_is_one(tokenizer, tmp_path):
    backwards = {token: len(tokenizer) - 1 - i for token, i in tokenizer.ids.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(backwards))
    (tmp_path / "merges.txt").write_text("\r\n".join(["#version: 0.2", *tokenizer.merges]), "utf-8")
    loaded = clip.Tokenizer.load(tmp_path)
    mirrored = [len(tokenizer) - 1 - i for i in tokenizer.encode(CAPTIONS[3])]
    assert loaded.encode(CAPTIONS[3]) == mirrored
    assert loaded.decode(loaded(CAPTIONS[3], 20)[0]) == CAPTIONS[3]


def test_of_openais_file_only_the_first_48894_merges_are_read(tmp_path):
    pairs = [f"{a} {b}" for a in clip.ALPHABET[:100] for b in clip.ALPHABET[:500]]
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress("\n".join(["header", *pairs]).encode(), 1))
    assert clip.Tokenizer.load(tmp_path / "long.txt.gz").merges == pairs[:48_894]


MERGES = b"#version: 0.2\na b</w>\n"                           # and the vocabulary that fits:
VOCAB = {t: i for i, t in enumerate([*clip.ALPHABET, "ab</w>", clip.START, clip.END])}


def without(token):
    return json.dumps({t: i for t, i in VOCAB.items() if t != token}).encode()


@pytest.mark.parametrize("name, data, says", [
    ("v.txt.gz", MERGES, "v.txt.gz is damaged or not a merges file"),
    ("v.txt.gz", gzip.compress(MERGES)[:-9], "v.txt.gz is damaged or not a merges file"),
    ("v.txt", "é".encode("latin-1"), "v.txt is damaged or not a merges file"),
    ("v.txt", b"", "v.txt is damaged.*it does not begin with a header"),
    ("v.txt", b"a b</w>\nc d\n", "v.txt is damaged.*it does not begin with a header"),
    ("v.txt", b"A title\nand some prose", "v.txt is .*not a CLIP tokenizer: .* 'and some prose'"),
    ("v.txt", b"#version: 0.2\nab c", "v.txt is .*not a CLIP tokenizer: .*'ab' is missing"),
    ("vocab.json", b"{", "vocab.json is damaged or not a JSON object"),
    ("vocab.json", b"[1, 2]", "vocab.json is .*not a JSON object.*it is a list"),
    ("vocab.json", b'{"a": "b"}', "is .*not a CLIP tokenizer: .*is missing"),
    ("vocab.json", json.dumps(VOCAB | {"ab</w>": float(VOCAB["ab</w>"])}).encode(), "once each"),
    ("vocab.json", json.dumps(VOCAB | {"ab</w>": "ab</w>"}).encode(), "not a CLIP tokenizer"),
    ("vocab.json", json.dumps(VOCAB | {"ab</w>": 0}).encode(), "once each"),
    ("vocab.json", without("ab</w>"), "'ab</w>' is missing"),
    ("vocab.json", without(clip.END), "endoftext.* is missing")])
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(tmp_path, name, data, says):
    (tmp_path / "merges.txt").write_bytes(MERGES)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        clip.Tokenizer.load(tmp_path if name == "vocab.json" else tmp_path / name)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        clip.Tokenizer.load(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        clip.Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_bytes(MERGES)
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        clip.Tokenizer.load(tmp_path)


# ---------------------------------------------------------------- Transformer


W = 8                                                                # width = rows = length: bugs
                                                                     # that mix axes hide there
@pytest.fixture
def block():
    return refill(clip.Block(W, heads=2, layers=1)).double()


@pytest.fixture
def seeing_block():
    return refill(clip.Block(W, heads=2, layers=1, context_width=W)).double()


@pytest.fixture
def caption_encoder():
    return refill(clip.CaptionEncoder(vocab_size=50, context=W, width=W, layers=2, heads=2))


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_that_matter(y, x):
    """Which rows of x the second row of y depends on."""
    grad, = torch.autograd.grad(y[1].pow(2).sum(), x, retain_graph=True)
    return grad.flatten(1).abs().sum(1).gt(0).nonzero().flatten().tolist()


def test_attention_is_a_weighted_mean_by_double_loop():
    q, k, v = rand(2, 3, 4), rand(2, 5, 4, seed=1), rand(2, 5, 4, seed=2)
    mask = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[..., 0] = True
    got = clip.attend(q, k, v, 2, mask)
    for b, h, i in itertools.product(range(2), range(2), range(3)):
        part = slice(2 * h, 2 * h + 2)
        weight = [math.exp(float(q[b, i, part] @ k[b, j, part]) / math.sqrt(2))
                  * bool(mask[b, 0, i, j]) for j in range(5)]
        want = sum(w * v[b, j, part] for j, w in enumerate(weight)) / sum(weight)
        assert torch.allclose(got[b, i, part], want, atol=1e-12), \
            "is it / sqrt(width of a head), heads as slices of the width, True = may be looked at?"


def test_a_row_that_may_look_at_nothing_gets_zeros_and_not_nan():
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 3, 3)
    out = clip.attend(rand(2, 3, 4), rand(2, 3, 4), rand(2, 3, 4), 1, mask)
    assert out[0].abs().min() > 0 and torch.equal(out[1], torch.zeros(3, 4).double())


def test_in_a_causal_block_no_position_sees_a_later_one(block):
    x = rand(1, 6, W)
    other = x.clone()
    other[:, 3] += 1
    moved = (block(x, causal=True) - block(other, causal=True)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3, \
        f"causal: token 3 changed, and these positions moved: {moved.tolist()}"


def test_example_i_of_a_block_never_sees_example_j(block, seeing_block):
    x, context = rand(W, W, W).requires_grad_(), rand(W, W, W, seed=1).requires_grad_()
    assert rows_that_matter(block(x), x) == [1]
    y = seeing_block(x, context=context)
    assert rows_that_matter(y, x) == [1] and rows_that_matter(y, context) == [1]


def test_a_cache_gives_what_reading_everything_again_gives(seeing_block):
    """Seven tokens after three of context: all at once, or 4 + 1 + 2 with the keys kept."""
    x, context = rand(2, 7, W), rand(2, 3, W, seed=1)
    mask = torch.ones(7, 10, dtype=torch.bool).tril(3)[None, None]
    whole = seeing_block(x, mask, context=context)
    cache = clip.Cache(10)
    parts = [seeing_block(x[:, :4], mask[:, :, :4, :7], context=context, cache=cache),
             seeing_block(x[:, 4:5], cache=cache),
             seeing_block(x[:, 5:], mask[:, :, 5:], cache=cache)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


def test_the_context_matters_and_stands_before_the_sequence(seeing_block):
    x, context = rand(1, 4, W), rand(1, 3, W, seed=1)
    hide_first = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    hide_first[..., 0] = False
    changed = context.clone()
    changed[:, 0] += 1
    assert not torch.allclose(seeing_block(x, context=context), seeing_block(x, context=changed))
    assert torch.equal(seeing_block(x, hide_first, context=context),
                       seeing_block(x, hide_first, context=changed)), "key 0 should be context 0"


def test_the_two_activations_are_the_formulas(block):
    x = rand(1, 2, W)
    q, k, v = block.qkv(block.ln1(x)).chunk(3, dim=2)
    y = x + block.proj(clip.attend(q, k, v, 2))
    h = block.fc1(block.ln2(y))
    gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    assert torch.allclose(block(x), y + block.fc2(gelu), atol=1e-12), \
        "the exact GELU, with erf? LayerNorm before each branch, and not after it?"
    block.activation = "quick_gelu"
    quick = h / (1 + torch.exp(-1.702 * h))
    assert torch.allclose(block(x), y + block.fc2(quick), atol=1e-12)


def test_in_the_caption_encoder_every_token_sees_every_other(caption_encoder):
    tokens, mask = torch.arange(1, 1 + W)[None], torch.ones(1, W, dtype=torch.bool)
    other = tokens.clone()
    other[0, -1] = 30
    moved = (caption_encoder(tokens, mask) - caption_encoder(other, mask)).abs().sum(2) > 0
    assert moved.all(), "GLIDE's text Transformer has no causal mask"


def test_in_the_caption_encoder_padding_hides_tokens_but_is_looked_at(caption_encoder):
    tokens, mask = torch.arange(2 * W).view(2, W), torch.ones(2, W, dtype=torch.bool)
    mask[:, 5:] = False
    out, other = caption_encoder(tokens, mask), tokens.clone()
    other[:, 5:] = 40
    assert torch.equal(out, caption_encoder(other, mask)), "padded tokens should not matter"
    with torch.no_grad():
        caption_encoder.pad[6, 0] += 1
    moved = (out - caption_encoder(tokens, mask)).abs()[:, 0].max()
    assert moved > 1e-6, "padding is a learned vector that all look at"
    nothing = caption_encoder(tokens, torch.zeros_like(mask))
    assert torch.equal(nothing[0], nothing[1]), "two captions should agree once dropped"


# ---------------------------------------------------------------- CLIP


@pytest.fixture
def config():
    return clip.CLIPConfig(embed_dim=8, image_size=16, patch=4, image_width=16, image_layers=2,
                           image_heads=2, vocab_size=20, context=8, text_width=8, text_layers=2,
                           text_heads=2)


@pytest.fixture
def model(config):
    return refill(clip.CLIP(config))


@pytest.fixture
def tokens():
    """Eight captions of different lengths: start 18, end 19, padding 0."""
    rows = [[18, *range(1, 1 + n), 19, *[0] * (6 - n)] for n in (0, 1, 2, 3, 4, 5, 6, 6)]
    rows[7][3] = 11
    return torch.tensor(rows)


@pytest.fixture
def images():
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", ["clip_openai.pt", "clip_transformers.pt"])
def test_clip_gives_the_numbers_of_the_original(name, tmp_path):
    golden = golden_weights.read(name)
    path = tmp_path / "weights.pt" if "openai" in name else tmp_path / "pytorch_model.bin"
    torch.save(golden["weights"], path)
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    model = clip.load_clip(path if "openai" in name else tmp_path)
    want, tokens = golden["outputs"], golden["inputs"]["tokens"]
    z_i = model.image(golden["inputs"]["image"])                     # already normalised
    z_t, states = model.encode_text(tokens)
    logits = model.logit_scale.exp() * clip.unit(z_i) @ clip.unit(z_t).T
    for got, name in [(z_i, "image_features"), (z_t, "text_features"), (states, "text_hidden"),
                      (logits, "logits_per_image"), (logits.T, "logits_per_text")]:
        assert error(got, want[name]) < 2e-5, f"{name}: quick GELU, LayerNorm eps 1e-5, causal?"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_stays_zero_and_others_get_length_1(dtype):
    z = clip.unit(torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype))
    assert torch.allclose(z.double(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]).double(), atol=4e-3)


def test_images_are_normalised_as_clip_was_trained(model, images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    want = model.image((images * 0.5 + 0.5 - mean) / std)
    assert torch.allclose(model.encode_image(images), want, atol=1e-5)


def test_a_caption_is_read_at_its_first_end_token_and_not_beyond(model, tokens):
    z_t, states = model.encode_text(tokens)
    assert z_t.shape == (8, 8) and states.shape == (8, 8, 8)
    later = tokens.clone()
    for row in later:
        row[row.tolist().index(19) + 1:] = 7
    assert torch.equal(model.encode_text(later)[0], z_t), "z_t depends on the padding"
    later[0, 4] = 19
    assert torch.equal(model.encode_text(later)[0], z_t), "z_t is read at a second end token"
    for row, z, state in zip(tokens.tolist(), z_t, states):
        assert torch.allclose(state[row.index(19)] @ model.text.proj, z, atol=1e-6)


def test_the_text_encoder_is_causal(model, tokens):
    other = tokens.clone()
    other[:, 4] = 12
    moved = (model.encode_text(tokens)[1] - model.encode_text(other)[1]).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 4


def test_example_i_of_clip_never_sees_example_j(model, tokens, images):
    images = images.requires_grad_()
    assert rows_that_matter(model.encode_image(images), images) == [1]
    alone = torch.cat([model.encode_text(row[None])[0] for row in tokens])
    assert torch.allclose(alone, model.encode_text(tokens)[0], atol=1e-6)


def test_every_patch_and_its_place_matter(model, images):
    for y, x in itertools.product(range(0, 16, 4), repeat=2):
        other = images.clone()
        other[:, :, y:y + 4, x:x + 4] *= -1
        assert not torch.allclose(model.encode_image(other), model.encode_image(images))
    swapped = torch.cat([images[..., 8:], images[..., :8]], dim=3)
    assert not torch.allclose(model.encode_image(swapped), model.encode_image(images))


def test_clip_leaves_its_inputs_alone(model, tokens, images):
    before = images.clone(), tokens.clone()
    model.encode_image(images), model.encode_text(tokens), clip.zero_shot(model, images, tokens)
    text = clip.Text(tokens, tokens > 0, torch.ones(8, 8), torch.ones(8, 8, 8))
    text.null()
    assert torch.equal(images, before[0]) and torch.equal(tokens, before[1])
    assert text.mask.any() and text.z_t.all(), "null() should make a new Text"


def test_wrong_sizes_and_missing_halves_are_refused(config, model, images):
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(8, 3, 8, 16\)"):
        model.encode_image(images[:, :, :8])
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        model.encode_text(torch.zeros(1, 9, dtype=torch.long))
    config.image_layers = config.text_layers = 0
    with pytest.raises(ValueError, match="no image encoder"):
        clip.CLIP(config).encode_image(images)
    with pytest.raises(ValueError, match="no text encoder"):
        clip.CLIP(config).encode_text(torch.zeros(1, 8, dtype=torch.long))


def test_dropped_captions_are_all_padding_with_a_zero_embedding(tokens):
    text = clip.Text(tokens, tokens > 0, torch.ones(8, 8), torch.ones(8, 8, 8))
    keep = torch.arange(8) % 2 == 0
    dropped = text.drop(keep)
    assert torch.equal(dropped.mask[keep], text.mask[keep]), "kept captions stay as they are"
    assert not dropped.mask[~keep].any(), "a dropped caption's mask is all False: padding alone"
    assert dropped.z_t[keep].all() and not dropped.z_t[~keep].any(), "z_t is dropped, too: zero"


# ---------------------------------------------------------------- loss, SAM, zero-shot


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 1, 0]])
def test_the_contrastive_loss_by_double_loop(ids):
    """For every image -log softmax over the captions, averaged over those that are true of it."""
    B, scale = 6, 5.0
    image, text = clip.unit(rand(B, 4)), clip.unit(rand(B, 4, seed=1))
    loss, names = 0.0, ids or list(range(B))
    for a, b in [(image, text), (text, image)]:
        for i in range(B):
            total = sum(math.exp(scale * float(a[i] @ b[j])) for j in range(B))
            true = [j for j in range(B) if names[j] == names[i]]
            loss -= sum(scale * float(a[i] @ b[j]) - math.log(total) for j in true) / len(true)
    got = clip.clip_loss(image, text, scale, None if ids is None else torch.tensor(ids))
    assert abs(got - loss / (2 * B)) < 1e-6, "both directions, halved; equal captions share?"


def test_the_loss_starts_at_log_B_and_ends_at_zero():
    same, B = torch.ones(7, 4) / 2, 7
    assert abs(clip.clip_loss(same, same, 14.29) - math.log(B)) < 1e-6
    assert clip.clip_loss(torch.eye(7), torch.eye(7), 100.0) < 1e-6
    ids = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    floor = (4 * math.log(4)) / 7
    perfect = torch.eye(4)[ids]
    assert abs(clip.clip_loss(perfect, perfect, 100.0, ids) - floor) < 1e-6


def test_apart_pushes_embeddings_of_different_captions_apart_and_of_equal_ones_together():
    """B orthogonal rows: each among B - 1 at cosine 0, so log(1 + (B - 1) e^-s) from each side."""
    B, s, ids = 7, 5.0, torch.arange(7)
    spread, alike = torch.eye(B, dtype=torch.float64), torch.ones(B, B, dtype=torch.float64)
    want = math.log(1 + (B - 1) * math.exp(-s))
    assert abs(clip.apart(spread, spread, ids, s) - 2 * want) < 1e-9, "pictures, and captions"
    alike = clip.unit(alike)
    assert abs(clip.apart(alike, alike, ids, s) - 2 * math.log(B)) < 1e-9
    assert abs(clip.apart(spread, alike, ids, s) - want - math.log(B)) < 1e-9
    assert clip.apart(alike, alike, 0 * ids, s) == clip.apart(alike, alike, 0 * ids, 2 * s), \
        "captions that are all equal: no way is pushed, whatever the scale"
    ids = torch.tensor([0, 0, 1])                     # rows 0 and 1 are of one caption
    z = clip.unit(torch.eye(3, dtype=torch.float64) + 0.3).requires_grad_()     # all equally near
    clip.apart(z, z.detach(), ids, s).backward()
    moved = clip.unit(z.detach() - 1e-3 * z.grad)
    before, after = (x @ x.T for x in (z.detach(), moved))
    assert after[0, 1] > before[0, 1] and after[0, 2] < before[0, 2] and after[1, 2] < before[1, 2]


@torch.no_grad()
def test_a_fresh_clip_knows_nothing():
    torch.manual_seed(0)
    model = clip.CLIP(clip.CLIPConfig())
    z_i = clip.unit(model.encode_image(torch.rand(64, 3, 32, 32) * 2 - 1))
    tokens = torch.randint(1, 598, (64, 16))
    tokens[:, -1] = 599
    z_t = clip.unit(model.encode_text(tokens)[0])
    loss = clip.clip_loss(z_i, z_t, model.scale())
    assert abs(loss - math.log(64)) < 0.5, f"loss {loss}, expected about log 64 = 4.16"


def test_the_temperature_starts_at_007_and_never_exceeds_100(config):
    model = clip.CLIP(config)
    assert abs(model.logit_scale - 2.6593) < 1e-3, "the logit scale starts at log(1 / 0.07)"
    assert abs(model.scale() - 14.2857) < 1e-3, "the logit scale is used with its exp: 1 / 0.07"
    with torch.no_grad():
        model.logit_scale += 50                                      # a huge step
    assert model.scale() == 100


def test_a_sam_step_is_the_gradient_at_the_worst_nearby_point():
    w, rho = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True), 0.1
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def f(w, b):
        return (w ** 4).sum() + (b * w[0]).sin() + b ** 2

    g_w, g_b = torch.autograd.grad(f(w, b), [w, b])
    norm = math.sqrt(float((g_w ** 2).sum() + g_b ** 2))             # over all parameters together
    there = [(x + rho * g / norm).detach().requires_grad_() for x, g in [(w, g_w), (b, g_b)]]
    want = torch.autograd.grad(f(*there), there)
    before = w.detach().clone(), b.detach().clone()
    loss = clip.sam_backward(lambda: f(w, b), [w, b], rho)
    assert loss == f(*before) and not loss.requires_grad
    assert torch.equal(w, before[0]) and torch.equal(b, before[1]), "the weights did not come back"
    for p, g in zip([w, b], want):
        assert torch.allclose(p.grad, g, atol=1e-12), "rho g / |g|, |g| over all the parameters?"


def test_zero_shot_gives_probabilities_that_know_the_better_caption(model, tokens, images):
    shares = clip.zero_shot(model, images, tokens)
    z_i, z_t = model.encode_image(images), model.encode_text(tokens)[0]
    assert shares.shape == (8, 8) and torch.allclose(shares.sum(1), torch.ones(8))
    assert torch.equal(shares.argmax(1), (clip.unit(z_i) @ clip.unit(z_t).T).argmax(1))
    assert torch.allclose(clip.zero_shot(model, images[:1], tokens)[0], shares[0], atol=1e-6)


def test_twenty_steps_on_one_batch_halve_the_loss(config, tokens, images):
    torch.manual_seed(0)
    model = clip.CLIP(config)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(20):
        z_i, z_t = model.encode_image(images), model.encode_text(tokens)[0]
        loss = clip.clip_loss(clip.unit(z_i), clip.unit(z_t), model.scale())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, f"from {losses[0]:.2f} to {losses[-1]:.2f}"


# ---------------------------------------------------------------- pictures


@pytest.fixture
def photo():
    """A PIL image with something in it, (W, H) = (101, 67)."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((101, 67), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape, size", [((101, 67), 32), ((67, 101), 32), ((30, 40), 32),
                                         ((32, 32), 32), ((99, 32), 32)])
def test_preprocessing_is_resize_and_centre_crop(photo, shape, size):
    """As torchvision does for OpenAI's CLIP: the short side is `size`, the rest is cut in half."""
    photo = photo.resize(shape)
    w, h = shape
    w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
    left, top = int(round((w - size) / 2)), int(round((h - size) / 2))
    want = photo.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    want = torch.from_numpy(np.array(want)).permute(2, 0, 1) / 255 * 2 - 1
    got = clip.preprocess(photo, size)
    assert got.shape == (3, size, size) and torch.allclose(got, want, atol=1e-6)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1
    close = (clip.preprocess(pixels, size) - want).abs().max()
    assert close < 3 / 127.5, f"tensors are resized as pictures are, but for rounding: {close}"


def test_pictures_of_all_kinds_become_rgb(photo, tmp_path):
    want = clip.preprocess(photo.convert("L").convert("RGB"), 16)
    assert torch.equal(clip.preprocess(photo.convert("L"), 16), want)
    for kind in ("RGBA", "P"):
        photo.convert(kind).save(tmp_path / "x.png")
        assert clip.read_picture(tmp_path / "x.png").mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6                                               # "turn me by 90 degrees"
    photo.save(tmp_path / "x.jpg", exif=turned)
    assert clip.read_picture(str(tmp_path / "x.jpg")).size == (67, 101)


def test_pictures_that_cannot_be_read_are_refused_by_name(photo, tmp_path):
    with pytest.raises(FileNotFoundError, match="x.png; expected a picture"):
        clip.preprocess(tmp_path / "x.png", 16)
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ValueError, match="x.png is damaged or not a picture"):
        clip.preprocess(str(tmp_path / "x.png"), 16)
    photo.save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="x.png is damaged or not a picture"):
        clip.preprocess(tmp_path / "x.png", 16)
    with pytest.raises(ValueError, match="127.5"):
        clip.preprocess(torch.full((3, 9, 9), 255.0), 16)
    with pytest.raises(ValueError, match="expected a picture"):
        clip.preprocess(torch.zeros(1, 3, 9, 9), 16)
