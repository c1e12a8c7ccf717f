"""The toy world: is an image what its caption states, and does the parser see it?"""
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_toy

Object, Scene = train_toy.Object, train_toy.Scene


def scenes(n, seed=0, **options):
    rng = random.Random(seed)
    return [train_toy.random_scene(rng, **options) for _ in range(n)]


def reparsed(scene):
    return train_toy.parse(train_toy.caption(scene))


def corners(thing):
    """The outline of a straight shape, once more from school geometry: points, clockwise."""
    r, turn = thing.r, math.radians(thing.tilt)
    if thing.shape == "square":
        h = 0.92 * r
        points = [(-h, -h), (h, -h), (h, h), (-h, h)]
    elif thing.shape == "triangle":
        R, third = 1.35 * r, 2 * math.pi / 3                              # points up: y grows down
        points = [(R * math.sin(a), -R * math.cos(a)) for a in (0, third, 2 * third)]
    else:
        L, w = 1.15 * r, 0.36 * r
        points = [(-w, -L), (w, -L), (w, -w), (L, -w), (L, w), (w, w),
                  (w, L), (-w, L), (-w, w), (-L, w), (-L, -w), (-w, -w)]
    return [(thing.x + px * math.cos(turn) - py * math.sin(turn),
             thing.y + px * math.sin(turn) + py * math.cos(turn)) for px, py in points]


def is_inside(thing, px, py):
    """Even-odd rule: a ray from each point crosses the outline an odd number of times."""
    if thing.shape == "circle":
        return (px - thing.x) ** 2 + (py - thing.y) ** 2 < thing.r ** 2
    inside, points = torch.zeros(len(py), px.shape[1], dtype=torch.bool), corners(thing)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        if y0 != y1:
            inside ^= ((y0 > py) != (y1 > py)) & (px < x0 + (py - y0) * (x1 - x0) / (y1 - y0))
    return inside


# ---------------------------------------------------------------- words


def test_a_caption_states_what_the_scene_is():
    s = Scene((Object("circle", "red", "small"), Object("square", "blue", "large")), "above")
    assert train_toy.caption(s) == "a small red circle above a large blue square"
    assert train_toy.caption(Scene((Object("cross", "orange"),))) == "an orange cross"


def test_parse_undoes_caption():
    for s in scenes(300):
        again = reparsed(s)
        assert again == s and train_toy.caption(again) == train_toy.caption(s)
        assert all(o.x is o.y is o.r is o.tilt is o.shade is None for o in again.objects)


@pytest.mark.parametrize("text", [
    "", "a pink circle", "a red circle above", "red circle", "A red circle", "a tiny red circle",
    "a red circle near a blue cross", "a red circle above a blue cross above a red square",
    "nothing", "a red blob"])
def test_parse_refuses_what_the_world_does_not_contain(text):
    with pytest.raises(ValueError, match="expected a caption such as"):
        train_toy.parse(text)


def test_a_scene_equals_its_mirrored_description_and_nothing_else():
    for s in scenes(200, two=True):
        mirrored = s.mirrored()
        assert s == mirrored and hash(s) == hash(mirrored)
        assert train_toy.caption(s) != train_toy.caption(mirrored)
        backwards = Scene(s.objects, train_toy.MIRROR[s.relation])
        assert (backwards == s) == (s.objects[0] == s.objects[1]), f"{s} == {backwards}?"
    assert train_toy.parse("a red circle") != train_toy.parse("a small red circle")


def test_agrees_wants_every_stated_word_and_no_more_and_mistakes_names_the_wrong_one():
    for s in scenes(100, unstated=0):
        bare = Scene(tuple(replace(o, size="") for o in s.objects), s.relation)
        assert all(train_toy.agrees(right, s) for right in (s, bare, reparsed(s)))
        for i, o in enumerate(s.objects):
            for name, wrong in (("shape", "cross" if o.shape != "cross" else "circle"),
                                ("colour", "red" if o.colour != "red" else "black"),
                                ("size", "small" if o.size != "small" else "large")):
                objects = s.objects[:i] + (replace(o, **{name: wrong}),) + s.objects[i + 1:]
                assert train_toy.mistakes(Scene(objects, s.relation), s) == [name]
        if len(s.objects) == 2:
            assert train_toy.agrees(s.mirrored(), s)
            for wrong in set(train_toy.MIRROR) - {s.relation, train_toy.MIRROR[s.relation]}:
                assert "relation" in train_toy.mistakes(Scene(s.objects, wrong), s)
            assert train_toy.mistakes(Scene(s.objects[:1]), s) == ["number"]
    unclear = Scene((Object("circle", "red", "unclear"),))
    assert not train_toy.agrees(train_toy.parse("a red circle"), unclear)


def test_the_splits_never_leak_and_no_description_of_a_scene_changes_its_split():
    seen = {"train": 0, "test": 0, "held-out": 0}
    for s in scenes(1500):
        part = train_toy.split(s)
        seen[part] += 1
        bare = Scene(tuple(Object(o.shape, o.colour) for o in s.objects), s.relation)
        assert part == train_toy.split(bare) == train_toy.split(reparsed(s))
        if len(s.objects) == 2:
            assert part == train_toy.split(s.mirrored())
        pairs = {(o.colour, o.shape) for o in s.objects}
        assert (part == "held-out") == bool(pairs & train_toy.HELD_OUT)
    assert seen["train"] > 5 * seen["test"] > 350, seen
    assert len({c for c, _ in train_toy.HELD_OUT}) == len({s for _, s in train_toy.HELD_OUT}) == 4
    for part in seen:
        assert {train_toy.split(s) for s in scenes(50, split_of=part)} == {part}


def test_swaps_exchange_one_kind_of_word_and_keep_the_others():
    texts = [train_toy.caption(s) for s in train_toy.swaps(train_toy.parse(
        "a small red circle above a large blue square"))]
    assert texts == ["a small red circle above a large blue square",
                     "a small blue circle above a large red square",
                     "a small red circle below a large blue square",
                     "a small red square above a large blue circle"]


# ---------------------------------------------------------------- places


def outline(thing):
    if thing.shape != "circle":
        return torch.tensor(corners(thing))
    a = torch.linspace(0, 2 * math.pi, 100)
    return torch.stack([thing.x + thing.r * a.cos(), thing.y + thing.r * a.sin()], 1)


def test_objects_lie_inside_the_image_apart_and_as_the_relation_says():
    for s in scenes(600):
        points = [outline(o) for o in s.objects]                          # each (points, 2)
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


def test_every_caption_can_be_placed_even_two_large_triangles():
    rng = random.Random(0)
    for relation in train_toy.MIRROR:
        text = f"a large red triangle {relation} a large blue triangle"
        s = train_toy.place(train_toy.parse(text), rng)
        assert train_toy.caption(s) == text and train_toy.read(train_toy.render(s, 16)) == s


def test_a_seed_gives_the_same_scenes_and_scenes_vary():
    assert [repr(s) for s in scenes(50)] == [repr(s) for s in scenes(50)] != \
        [repr(s) for s in scenes(50, seed=1)]
    rng, s = random.Random(0), train_toy.parse("a red circle")
    xs = torch.tensor([train_toy.place(s, rng).objects[0].x for _ in range(500)])
    assert xs.min() < 0.2 and xs.max() > 0.8 and xs.std() > 0.15


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


def test_shapes_have_about_the_area_of_their_circle():
    for s in scenes(100, two=False):
        o, = s.objects
        rgb = torch.tensor(train_toy.COLOURS[o.colour]) + 0.08 * o.shade
        ink = (1 - train_toy.render(s, 64)).mean((1, 2)) / 2              # (3,) area * (1 - rgb)
        area = ink.sum() / (1 - rgb).sum()
        assert 0.7 < area / (math.pi * o.r ** 2) < 1.1
        assert abs(area / o.r ** 2 - train_toy.AREA[train_toy.SHAPES.index(o.shape)]) < 0.04


def test_small_images_are_large_ones_made_smaller():
    some = scenes(32)
    large = train_toy.render_many(some, 64)
    for size in (16, 32):
        want = F.avg_pool2d(large, 64 // size)
        assert (train_toy.render_many(some, size) - want).abs().max() < 1e-5
    assert (large - F.avg_pool2d(train_toy.render_many(some, 256), 4)).abs().mean() < 2e-3


def test_pixels_lie_in_range_and_do_not_depend_on_the_batch():
    some = scenes(12)
    for size in (16, 64, 256):
        batch = train_toy.render_many(some, size)
        assert batch.shape == (12, 3, size, size) and batch.dtype == torch.float32
        assert batch.min() >= -1 and batch.max() <= 1 and batch.max() > 0.999
        for s, image in zip(some, batch):
            assert (train_toy.render(s, size) - image).abs().max() < 1e-5


def test_no_shade_of_one_colour_looks_like_a_shade_of_another():
    """Two lines of shades, sampled: nowhere closer than 0.25, three times what a shade can add."""
    rgb = torch.tensor(list(train_toy.COLOURS.values()))                  # (8, 3)
    shades = rgb[:, None] + torch.linspace(-0.08, 0.08, 17)[None, :, None]
    apart = torch.cdist(shades.flatten(0, 1), shades.flatten(0, 1)).view(8, 17, 8, 17).amin((1, 3))
    assert (apart + torch.eye(8)).min() > 0.25
    assert shades.min() >= 0 and shades.max() <= 1


# ---------------------------------------------------------------- the exact parser


@pytest.mark.parametrize("size, n", [(16, 200), (64, 200), (256, 40)])
def test_the_parser_is_right_about_every_clean_image(size, n):
    for s in scenes(n, seed=size, unstated=0):
        seen = train_toy.read(train_toy.render(s, size))
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"


def test_the_parser_finds_place_size_and_shade():
    for s in scenes(30, seed=5, unstated=0):
        seen = train_toy.read(train_toy.render(s, 64)).canonical()
        for o, u in zip(s.canonical().objects, seen.objects):
            assert abs(o.x - u.x) < 0.01 and abs(o.y - u.y) < 0.01 and abs(o.r - u.r) < 0.01
            assert abs(o.shade - u.shade) < 0.1


def test_the_parser_forgives_noise_blur_specks_and_a_shift_of_colour():
    g = torch.Generator().manual_seed(0)
    for s in scenes(40, seed=9, unstated=0):
        image = F.avg_pool2d(train_toy.render(s, 64), 3, 1, 1, count_include_pad=False)
        image = image + 0.08 * torch.randn(3, 64, 64, generator=g)
        image += torch.tensor([0.06, -0.06, 0.03])[:, None, None]
        image[:, :2, :2] = -1              # a black speck in a corner
        seen = train_toy.read(image)
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"


def test_the_parser_forgives_enlarging_16_pixels():
    for s in scenes(40, seed=10, unstated=0):
        small = train_toy.render(s, 16)[None]
        seen = train_toy.read(F.interpolate(small, 64, mode="bicubic")[0])
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"


def garbage():
    g = torch.Generator().manual_seed(0)
    p = (torch.arange(64) + 0.5) / 64 - 0.5
    x, y = p[None, :].expand(64, 64), p[:, None].expand(64, 64)
    far = (x * x + y * y).sqrt()

    def disc(at_x, at_y):
        return (x - at_x) ** 2 + (y - at_y) ** 2 < 0.135 ** 2

    masks = {"ring": (far < 0.2) & (far > 0.1), "bar": (x.abs() < 0.3) & (y.abs() < 0.06),
             "half disc": (far < 0.25) & (y < 0), "all ink": far < 9, "no ink": far < 0,
             "triangle upside down": torch.maximum(-y, 0.866 * x.abs() + 0.5 * y) < 0.13,
             "tiny disc": far < 0.07, "stripes": (20 * x).sin() > 0,
             "diamond": x.abs() + y.abs() < 0.25,
             "three discs": disc(-0.33, 0) | disc(0, 0) | disc(0.33, 0),
             "two discs that touch": disc(-0.13, 0) | disc(0.13, 0),
             "two discs on a diagonal": disc(-0.2, -0.2) | disc(0.2, 0.2)}
    images = {k: torch.where(m, torch.tensor([-0.76, -0.48, 0.76])[:, None, None], 1.0)
              for k, m in masks.items()}
    images["pink disc"] = 1 - (far < 0.2) * torch.tensor([0.1, 1.0, 0.5])[:, None, None]
    images["two-coloured disc"] = 1 - 1.7 * (far < 0.2) * torch.stack([x < 0, x < 2, x > 0])
    images["noise"] = torch.rand(3, 64, 64, generator=g) * 2 - 1
    images["not a number"] = torch.full((3, 64, 64), math.nan)
    return images.items()


@pytest.mark.parametrize("name, image", garbage())
def test_garbage_agrees_with_no_caption(name, image):
    seen = train_toy.read(image)
    with pytest.raises(ValueError):
        train_toy.parse(train_toy.caption(seen))
    for shape in train_toy.SHAPES:
        for colour in train_toy.COLOURS:
            assert not train_toy.agrees(Scene((Object(shape, colour),)), seen), f"{name}: {seen}"


@pytest.mark.parametrize("image, complaint", [
    (torch.ones(1, 3, 64, 64), "square image"), (torch.ones(3, 64, 32), "square image"),
    (torch.ones(3, 8, 8), "square image"), (torch.full((3, 64, 64), 255.0), "127.5")])
def test_the_parser_names_what_it_cannot_take(image, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_toy.read(image)


# ---------------------------------------------------------------- what is measured with it


def test_hard_negatives_differ_in_one_respect_and_never_leave_the_training_set():
    rng = random.Random(0)
    for two in (False, True) * 60:
        first, *others = train_toy.hard_negatives(rng, two)
        assert len(others) == 3 and all(len(s.objects) == 1 + two for s in others)
        for scene in (first, *others):
            assert train_toy.split(scene) == "train", train_toy.caption(scene)
        words = sorted(train_toy.caption(first).split())
        assert any(train_toy.caption(s) != train_toy.caption(first) for s in others), words


def test_psnr_counts_from_a_peak_of_2():
    """Images in [-1, 1], all wrong by 0.2:  20 lg(2 / 0.2) = 20 dB."""
    image = torch.zeros(3, 8, 8)
    assert train_toy.psnr(image, image + 0.2) == pytest.approx(20, abs=1e-4), "peak 1 gives 14 dB"


def test_outlines_of_clean_images_are_clean_and_of_grown_ones_are_not():
    """The parser's own error in place and size costs 1 % of the IoU."""
    clean_iou, clean_psnr = [], []
    for s in scenes(12, seed=3):
        clean = train_toy.render(s, 256)
        seen = train_toy.read(clean)
        (iou, psnr), = train_toy.outline(clean, seen)
        clean_iou.append(iou)
        clean_psnr.append(psnr)

        grown = -F.max_pool2d(-clean[None], 9, 1, 4)[0]                   # 4 px more on each side
        (iou, _), = train_toy.outline(grown, seen)
        small, large = (((1 - x) / 2).amax(0).gt(train_toy.INK).sum() for x in (clean, grown))
        assert iou == pytest.approx(float(small / large), abs=0.03), "the smaller over the larger"
    assert sum(clean_iou) / 12 > 0.98 and sum(clean_psnr) / 12 > 36
    assert train_toy.outline(torch.ones(3, 64, 64), Scene(())) == []


def test_the_frechet_distance_of_gaussians_is_the_textbooks():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2; clouds with exactly these moments."""
    D, N = 3, 64
    x = torch.linalg.qr(torch.randn(N, D + 1, dtype=torch.float64)
                        .index_fill(1, torch.tensor([0]), 1.0))[0][:, 1:] * (N - 1) ** 0.5
    s1, s2 = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 2, 1]).double()
    got = train_toy.frechet(x * s1, x * s2 + 1)
    assert got == pytest.approx(3 + float(((s1 - s2) ** 2).sum()), abs=1e-9)
    assert train_toy.frechet(x, x) == pytest.approx(0, abs=1e-9)
