"""The toy world: is an image what its caption states, and does the parser see it?"""
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_toy
from train_toy import Object, Scene

TWO = "a small red circle above a large blue square"


def scenes(n, seed=0, **options):
    rng = random.Random(seed)
    return [train_toy.random_scene(rng, **options) for _ in range(n)]


def reparsed(scene):
    return train_toy.parse(train_toy.caption(scene))


def outline(thing):
    """Points around a shape, clockwise, once more from school geometry; y grows down."""
    def ring(n, R):
        return [(R * math.sin(2 * math.pi * i / n), -R * math.cos(2 * math.pi * i / n))
                for i in range(n)]

    h, L, w, turn = 0.92 * thing.r, 1.15 * thing.r, 0.36 * thing.r, math.radians(thing.tilt)
    points = {"circle": ring(100, thing.r), "triangle": ring(3, 1.35 * thing.r),
              "square": [(-h, -h), (h, -h), (h, h), (-h, h)],
              "cross": [(-w, -L), (w, -L), (w, -w), (L, -w), (L, w), (w, w),
                        (w, L), (-w, L), (-w, w), (-L, w), (-L, -w), (-w, -w)]}[thing.shape]
    return [(thing.x + px * math.cos(turn) - py * math.sin(turn),
             thing.y + px * math.sin(turn) + py * math.cos(turn)) for px, py in points]


def is_inside(thing, px, py):
    """Even-odd rule: a ray from each point crosses the outline an odd number of times."""
    if thing.shape == "circle":
        return (px - thing.x) ** 2 + (py - thing.y) ** 2 < thing.r ** 2
    inside, points = torch.zeros(len(py), px.shape[1], dtype=torch.bool), outline(thing)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        if y0 != y1:
            inside ^= ((y0 > py) != (y1 > py)) & (px < x0 + (py - y0) * (x1 - x0) / (y1 - y0))
    return inside


# ---------------------------------------------------------------- words
def test_a_caption_states_what_the_scene_is_and_parse_undoes_it():
    s = Scene((Object("circle", "red", "small"), Object("square", "blue", "large")), "above")
    assert train_toy.caption(s) == TWO
    assert train_toy.caption(Scene((Object("cross", "orange"),))) == "an orange cross"
    for s in scenes(300):
        again = reparsed(s)
        assert again == s and train_toy.caption(again) == train_toy.caption(s)
        assert all(o.x is o.y is o.r is o.tilt is o.shade is None for o in again.objects)


@pytest.mark.parametrize("name, given, complaint", [
    *(("parse", text, "expected a caption such as") for text in (
        "", "a pink circle", "a red circle above", "red circle", "A red circle", "nothing",
        "a tiny red circle", "a red circle near a blue cross", "a red blob",
        "a red circle above a blue cross above a red square")),
    *(("read", torch.ones(shape), "square image") for shape in (
        (1, 3, 64, 64), (3, 64, 32), (3, 8, 8))),
    ("read", torch.full((3, 64, 64), 2.1), "127.5"), ("read", torch.zeros(3, 24, 24), "S = 16 or"),
    ("read", torch.full((3, 64, 64), math.nan), "got nan")])
def test_what_the_world_does_not_contain_is_refused(name, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        getattr(train_toy, name)(given)


def test_a_scene_equals_its_mirrored_description_and_nothing_else():
    for s in scenes(200, two=True):
        mirrored = s.mirrored()
        assert s == mirrored and hash(s) == hash(mirrored)
        assert train_toy.caption(s) != train_toy.caption(mirrored)
        backwards = Scene(s.objects, train_toy.MIRROR[s.relation])
        assert (backwards == s) == (s.objects[0] == s.objects[1]), f"{s} == {backwards}?"
    assert train_toy.parse("a red circle") != train_toy.parse("a small red circle")


def test_agrees_wants_every_stated_word_and_no_more_and_mistakes_names_the_wrong_one():
    words = {"shape": ("cross", "circle"), "colour": ("red", "black"), "size": ("small", "large")}
    for s in scenes(100, unstated=0):
        bare = Scene(tuple(replace(o, size="") for o in s.objects), s.relation)
        assert all(train_toy.agrees(right, s) for right in (s, bare, reparsed(s)))
        for i, (name, (word, other)) in itertools.product(range(len(s.objects)), words.items()):
            objects = [*s.objects]
            wrong = other if getattr(objects[i], name) == word else word
            objects[i] = replace(objects[i], **{name: wrong})
            assert train_toy.mistakes(Scene(tuple(objects), s.relation), s) == [name]
        if len(s.objects) == 2:
            assert train_toy.agrees(s.mirrored(), s)
            for wrong in set(train_toy.MIRROR) - {s.relation, train_toy.MIRROR[s.relation]}:
                assert "relation" in train_toy.mistakes(Scene(s.objects, wrong), s)
            reverse = Scene(s.objects, train_toy.MIRROR[s.relation])
            assert len(train_toy.mistakes(reverse, s)) < 2, "one word explains it"
            assert train_toy.mistakes(Scene(s.objects[:1]), s) == ["number"]
    unclear = Scene((Object("circle", "red", "unclear"),))
    assert not train_toy.agrees(train_toy.parse("a red circle"), unclear)


def test_the_splits_never_leak_and_no_description_of_a_scene_changes_its_split():
    seen = {"train": 0, "test": 0, "held-out": 0}
    for s in scenes(1500):
        bare = Scene(tuple(Object(o.shape, o.colour) for o in s.objects), s.relation)
        same = [s, bare, reparsed(s), s.mirrored() if s.relation else s]
        part, = {train_toy.split(each) for each in same}
        seen[part] += 1
        pairs = {(o.colour, o.shape) for o in s.objects}
        assert (part == "held-out") == bool(pairs & train_toy.HELD_OUT)
    assert seen["train"] > 5 * seen["test"] > 350, seen
    assert len({c for c, _ in train_toy.HELD_OUT}) == len({s for _, s in train_toy.HELD_OUT}) == 4
    for part in seen:
        assert {train_toy.split(s) for s in scenes(50, split_of=part)} == {part}


def test_no_hard_negative_is_of_another_part_even_the_last_that_is_tried(monkeypatch):
    unseen = train_toy.parse("a red triangle")
    monkeypatch.setattr(train_toy, "edit", lambda scene, rng: unseen)
    for seed in range(4):
        group = train_toy.hard_negatives(random.Random(seed), two=False)
        assert {train_toy.split(scene) for scene in group} == {"train"}, "a leak into training"


def test_swaps_and_hard_negatives_change_one_kind_of_word_and_stay_in_the_training_set():
    assert [train_toy.caption(s) for s in train_toy.swaps(train_toy.parse(TWO))] == [
        TWO, "a small blue circle above a large red square",
        "a small red circle below a large blue square",
        "a small red square above a large blue circle"]
    rng = random.Random(0)
    for two in (False, True) * 60:
        first, *others = train_toy.hard_negatives(rng, two)
        assert len(others) == 3 and all(len(s.objects) == 1 + two for s in others)
        assert {train_toy.split(s) for s in (first, *others)} == {"train"}
        assert {train_toy.caption(s) for s in others} != {train_toy.caption(first)}
    old = train_toy.parse("a large red circle")
    new = [train_toy.edit(old, rng).objects[0] for _ in range(60)]
    assert all(sum(getattr(o, key) != getattr(old.objects[0], key)
                   for key in ("size", "colour", "shape")) == 1 for o in new), "in one respect"
    assert {o.size for o in new} == {"small", "large"}


# ---------------------------------------------------------------- places
def test_objects_lie_inside_the_image_apart_and_as_the_relation_says():
    for s in scenes(600):
        points = [torch.tensor(outline(o)) for o in s.objects]            # each (points, 2)
        assert min(p.min() for p in points) > 0.019 and max(p.max() for p in points) < 0.981
        for o in s.objects:
            ranges = [train_toy.SIZES[o.size]] if o.size else train_toy.SIZES.values()
            assert any(low <= o.r <= high for low, high in ranges)
        if len(s.objects) == 2:
            first, second = points if s.relation in ("left of", "above") else points[::-1]
            axis = 0 if s.relation in ("left of", "right of") else 1
            assert second[:, axis].min() - first[:, axis].max() > 0.079, "too close"
            d = [abs(s.objects[0].x - s.objects[1].x), abs(s.objects[0].y - s.objects[1].y)]
            assert d[1 - axis] <= 0.6 * d[axis] + 1e-9, f"{s.relation} is not plain: {d}"


def test_every_caption_can_be_placed_anew_and_a_seed_gives_the_same_scenes():
    rng, circle = random.Random(0), train_toy.parse("a red circle")
    for relation in train_toy.MIRROR:                                     # the hardest to place
        text = f"a large red triangle {relation} a large blue triangle"
        s = train_toy.place(train_toy.parse(text), rng)
        assert train_toy.caption(s) == text and train_toy.read(train_toy.render(s, 16)) == s
    placed = [train_toy.place(circle, rng).objects[0] for _ in range(500)]
    for name, low, high in (("x", 0.15, 0.85), ("y", 0.15, 0.85), ("r", 0.126, 0.222),
                            ("tilt", -8, 8), ("shade", -1, 1)):
        got = torch.tensor([getattr(o, name) for o in placed])
        assert got.min() < low + 0.1 * (high - low) and got.max() > high - 0.1 * (high - low), name
        assert abs((got.mean() - low) / (high - low) - 0.5) < 0.06, f"{name} is lopsided"
    a, b, c = ([repr(s) for s in scenes(50, seed)] for seed in (0, 0, 1))
    assert a == b != c


# ---------------------------------------------------------------- pixels
def test_coverage_is_the_share_of_each_pixel_inside_the_shape():
    """Ask 16 x 16 points in each pixel whether they are inside. Only at corners may a pixel be off
    by much: clamp(1/2 - distance) is exact for one straight side through a pixel, not for two."""
    p = (torch.arange(64 * 16) + 0.5) / (64 * 16)
    for s in scenes(24, two=False):
        o, = s.objects
        inside = is_inside(o, p[None, :], p[:, None]).float()             # (1024, 1024)
        share = F.avg_pool2d(inside[None], 16)[0]                         # (64, 64)
        rgb = torch.tensor(train_toy.COLOURS[o.colour]) + 0.08 * o.shade
        want = 1 - 2 * share * (1 - rgb[:, None, None])                   # (3, 64, 64)
        off = (train_toy.render(s, 64) - want).abs()
        assert off.mean() < 1e-3, f"{o}: off by {off.mean()}; tilted the wrong way?"
        assert off.max() < 0.6 and (off > 0.25).any(0).sum() <= 12, f"{o}: more than corners is off"
        area = inside.mean() / o.r ** 2
        assert abs(area - train_toy.AREA[train_toy.SHAPES.index(o.shape)]) < 0.01
        assert 0.7 < area / math.pi < 1.1, "shapes have about the area of their circle"


def test_images_of_any_size_and_batch_are_one_image_and_pixels_lie_in_range():
    some = scenes(24)
    large, fine = (train_toy.render_many(some, size) for size in (64, 256))
    assert (large - F.avg_pool2d(fine, 4)).abs().mean() < 2e-3
    for size in (16, 32, 64, 256):
        batch = train_toy.render_many(some, size)
        assert batch.shape == (24, 3, size, size) and batch.dtype == torch.float32
        assert batch.min() >= -1 and 0.999 < batch.max() <= 1
        for s, image in zip(some, batch):
            assert (train_toy.render(s, size) - image).abs().max() < 1e-5
        if size < 64:
            assert (batch - F.avg_pool2d(large, 64 // size)).abs().max() < 1e-5


def test_no_shade_of_one_colour_looks_like_a_shade_of_another():
    """Two lines of shades, sampled: nowhere closer than 0.25, three times what a shade can add."""
    rgb = torch.tensor(list(train_toy.COLOURS.values()))                  # (8, 3)
    shades = rgb[:, None] + torch.linspace(-0.08, 0.08, 17)[None, :, None]
    apart = torch.cdist(shades.flatten(0, 1), shades.flatten(0, 1)).view(8, 17, 8, 17).amin((1, 3))
    assert (apart + torch.eye(8)).min() > 0.25
    assert shades.min() >= 0 and shades.max() <= 1


# ---------------------------------------------------------------- the exact parser
def spoilt(image):
    """Blurred and noisy, another hue, a black speck in a corner."""
    noise = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(int(image.sum())))
    image = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) + 0.08 * noise
    image += torch.tensor([0.06, -0.06, 0.03])[:, None, None]
    image[:, :2, :2] = -1
    return image


@pytest.mark.parametrize("size, n, seed, change", [
    (16, 200, 16, None), (64, 200, 64, None), (64, 30, 5, None), (256, 40, 256, None),
    (64, 40, 9, spoilt), (16, 40, 10, lambda x: F.interpolate(x[None], 64, mode="bicubic")[0])])
def test_the_parser_is_right_about_clean_and_spoilt_and_enlarged_images(size, n, seed, change):
    for s in scenes(n, seed, unstated=0):
        image = train_toy.render(s, size)
        seen = train_toy.read(change(image) if change else image)
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"
        for o, u in zip(s.canonical().objects, seen.canonical().objects):
            if seed in (5, 256):
                assert max(abs(o.x - u.x), abs(o.y - u.y), abs(o.r - u.r)) < 0.01
                assert abs(o.shade - u.shade) < 0.1


def garbage():
    p = (torch.arange(64) + 0.5) / 64 - 0.5
    x, y = p[None, :].expand(64, 64), p[:, None].expand(64, 64)
    far = (x * x + y * y).sqrt()

    def discs(*centres):
        return sum((x - a) ** 2 + (y - b) ** 2 < 0.135 ** 2 for a, b in centres) > 0

    masks = {"ring": (far < 0.2) & (far > 0.1), "bar": (x.abs() < 0.3) & (y.abs() < 0.06),
             "half disc": (far < 0.25) & (y < 0), "all ink": far < 9, "no ink": far < 0,
             "triangle upside down": torch.maximum(-y, 0.866 * x.abs() + 0.5 * y) < 0.13,
             "tiny disc": far < 0.07, "stripes": (20 * x).sin() > 0,
             "diamond": x.abs() + y.abs() < 0.25,
             "three discs": discs((-0.33, 0), (0, 0), (0.33, 0)),
             "two discs that touch": discs((-0.13, 0), (0.13, 0)),
             "two discs on a diagonal": discs((-0.2, -0.2), (0.2, 0.2))}
    blue, disc = torch.tensor([-0.76, -0.48, 0.76])[:, None, None], far < 0.2
    return [*((name, torch.where(mask, blue, 1.0)) for name, mask in masks.items()),
            ("pink disc", 1 - disc * torch.tensor([0.1, 1.0, 0.5])[:, None, None]),
            ("two-coloured disc", 1 - 1.7 * disc * torch.stack([x < 0, x < 2, x > 0])),
            ("noise", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)]


@pytest.mark.parametrize("name, image", garbage())
def test_garbage_agrees_with_no_caption(name, image):
    seen = train_toy.read(image)
    with pytest.raises(ValueError):
        train_toy.parse(train_toy.caption(seen))
    for each in itertools.product(train_toy.SHAPES, train_toy.COLOURS):
        assert not train_toy.agrees(Scene((Object(*each),)), seen), f"{name}: {seen}"


# ---------------------------------------------------------------- what is measured with it
def test_psnr_counts_from_a_peak_of_2():
    """Images in [-1, 1], all wrong by 0.2:  20 lg(2 / 0.2) = 20 dB."""
    image = torch.zeros(3, 8, 8)
    assert train_toy.psnr(image, image + 0.2) == pytest.approx(20, abs=1e-4), "peak 1 gives 14 dB"


def test_outlines_of_clean_images_are_clean_and_of_grown_or_shrunk_ones_are_not():
    """The parser's own error in place and size costs 1 % of the IoU."""
    clean_scores = []
    for s in scenes(12, seed=3):
        clean = train_toy.render(s, 256)
        seen = train_toy.read(clean)
        clean_scores += train_toy.outline(clean, seen)
        for sign in (-1, 1):                                              # 4 px more or less ink
            other = sign * F.max_pool2d(sign * clean[None], 9, 1, 4)[0]
            (iou, _), = train_toy.outline(other, seen)
            small, large = sorted(((1 - x) / 2).amax(0).gt(train_toy.INK).sum().item()
                                  for x in (clean, other))
            assert iou == pytest.approx(small / large, abs=0.03), "the smaller over the larger"
    iou, psnr = torch.tensor(clean_scores).mean(0)
    assert len(clean_scores) == 12 and iou > 0.98 and psnr > 36
    assert train_toy.outline(torch.ones(3, 64, 64), Scene(())) == []
