"""The toy world: is a picture what its caption says, and does the reader see it?"""
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_toy

Thing, Scene = train_toy.Thing, train_toy.Scene


def scenes(n, seed=0, **kw):
    rng = random.Random(seed)
    return [train_toy.random_scene(rng, **kw) for _ in range(n)]


def stated(scene):
    return train_toy.parse(train_toy.caption(scene))


def corners(thing):
    """The outline of a straight shape, told once more from school geometry: points, clockwise."""
    r, turn = thing.r, math.radians(thing.tilt)
    if thing.shape == "square":
        h = 0.92 * r
        points = [(-h, -h), (h, -h), (h, h), (-h, h)]
    elif thing.shape == "triangle":
        R = 1.35 * r                                                      # points up: y grows down
        third = 2 * math.pi / 3
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


# ---- Words ---------------------------------------------------------------------------------------

def test_a_caption_says_what_the_scene_is():
    s = Scene((Thing("circle", "red", "small"), Thing("square", "blue", "large")), "above")
    assert train_toy.caption(s) == "a small red circle above a large blue square"
    assert train_toy.caption(Scene((Thing("cross", "orange"),))) == "an orange cross"


def test_parse_undoes_caption():
    for s in scenes(500):
        again = stated(s)
        assert again == s and train_toy.caption(again) == train_toy.caption(s)
        assert all(t.x is t.y is t.r is t.tilt is t.shade is None for t in again.things)


@pytest.mark.parametrize("text", [
    "", "a pink circle", "a red circle above", "red circle", "A red circle", "a tiny red circle",
    "a red circle near a blue cross", "a red circle above a blue cross above a red square",
    "nothing", "a red blob"])
def test_parse_refuses_what_the_world_does_not_contain(text):
    with pytest.raises(ValueError, match="expected a caption such as"):
        train_toy.parse(text)


def test_a_scene_equals_its_mirror_image_in_words_and_nothing_else():
    for s in scenes(200, two=True):
        mirrored = s.mirrored()
        assert s == mirrored and hash(s) == hash(mirrored)
        assert train_toy.caption(s) != train_toy.caption(mirrored)
        backwards = Scene(s.things, train_toy.MIRROR[s.relation])
        assert (backwards == s) == (s.things[0] == s.things[1]), f"{s} == {backwards}?"
    assert train_toy.parse("a red cross above a blue square") == train_toy.parse(
        "a blue square below a red cross")
    assert train_toy.parse("a red circle") != train_toy.parse("a small red circle")


def test_agrees_wants_every_stated_word_and_no_more():
    for s in scenes(100, unstated=0):
        bare = Scene(tuple(replace(t, size="") for t in s.things), s.relation)
        assert all(train_toy.agrees(right, s) for right in (s, bare, stated(s)))
        for i, t in enumerate(s.things):
            for wrong in (replace(t, shape="cross" if t.shape != "cross" else "circle"),
                          replace(t, colour="red" if t.colour != "red" else "black"),
                          replace(t, size="small" if t.size != "small" else "large")):
                things = s.things[:i] + (wrong,) + s.things[i + 1:]
                assert not train_toy.agrees(Scene(things, s.relation), s), f"{wrong} is not {t}"
        if len(s.things) == 2:
            assert train_toy.agrees(s.mirrored(), s)
            for wrong in set(train_toy.MIRROR) - {s.relation, train_toy.MIRROR[s.relation]}:
                assert not train_toy.agrees(Scene(s.things, wrong), s)
            assert not train_toy.agrees(Scene(s.things[:1]), s), "one thing was never mentioned"


def test_the_splits_never_leak_and_no_telling_of_a_scene_changes_its_split():
    seen = {"train": 0, "test": 0, "held-out": 0}
    for s in scenes(2000):
        part = train_toy.split(s)
        seen[part] += 1
        bare = Scene(tuple(Thing(t.shape, t.colour) for t in s.things), s.relation)
        assert part == train_toy.split(bare) == train_toy.split(stated(s))
        if len(s.things) == 2:
            assert part == train_toy.split(s.mirrored())
        pairs = {(t.colour, t.shape) for t in s.things}
        assert (part == "held-out") == bool(pairs & train_toy.HELD_OUT)
    assert seen["train"] > 5 * seen["test"] > 500, seen
    assert len({c for c, _ in train_toy.HELD_OUT}) == len({s for _, s in train_toy.HELD_OUT}) == 4
    for part in seen:
        assert {train_toy.split(s) for s in scenes(50, part=part)} == {part}


def test_swaps_exchange_one_kind_of_word_and_keep_the_others():
    texts = [train_toy.caption(s) for s in train_toy.swaps(train_toy.parse(
        "a small red circle above a large blue square"))]
    assert texts == ["a small red circle above a large blue square",
                     "a small blue circle above a large red square",
                     "a small red circle below a large blue square",
                     "a small red square above a large blue circle"]


def test_the_sheet_of_the_world_is_drawn(tmp_path, capsys):
    train_toy.main(["world", "-o", str(tmp_path / "world.png")])
    assert "world.png" in capsys.readouterr().out and (tmp_path / "world.png").stat().st_size > 2e4


# ---- Places --------------------------------------------------------------------------------------

def outline(thing):
    if thing.shape != "circle":
        return torch.tensor(corners(thing))
    a = torch.linspace(0, 2 * math.pi, 100)
    return torch.stack([thing.x + thing.r * a.cos(), thing.y + thing.r * a.sin()], 1)


def test_things_lie_inside_the_picture_apart_and_as_the_relation_says():
    for s in scenes(1000):
        points = [outline(t) for t in s.things]                           # each (points, 2)
        assert min(p.min() for p in points) > 0.019 and max(p.max() for p in points) < 0.981
        for t in s.things:
            ranges = [train_toy.SIZES[t.size]] if t.size else train_toy.SIZES.values()
            assert any(low <= t.r <= high for low, high in ranges)
        if len(s.things) == 2:
            first, second = points if s.relation in ("left of", "above") else points[::-1]
            axis = 0 if s.relation in ("left of", "right of") else 1
            assert second[:, axis].min() - first[:, axis].max() > 0.079, "too close"
            d = [abs(s.things[0].x - s.things[1].x), abs(s.things[0].y - s.things[1].y)]
            assert d[1 - axis] <= 0.6 * d[axis] + 1e-9, f"{s.relation} is not plain: {d}"


def test_every_caption_can_be_placed_even_two_large_triangles():
    rng = random.Random(0)
    for relation in train_toy.MIRROR:
        text = f"a large red triangle {relation} a large blue triangle"
        s = train_toy.place(train_toy.parse(text), rng)
        assert train_toy.caption(s) == text and train_toy.read(train_toy.render(s, 16)) == s


def test_a_seed_gives_the_same_scenes_and_scenes_vary():
    assert [repr(s) for s in scenes(50)] == [repr(s) for s in scenes(50)]
    rng, s = random.Random(0), train_toy.parse("a red circle")
    xs = torch.tensor([train_toy.place(s, rng).things[0].x for _ in range(500)])
    assert xs.min() < 0.2 and xs.max() > 0.8 and xs.std() > 0.15


# ---- Pixels --------------------------------------------------------------------------------------

def test_coverage_is_the_share_of_each_pixel_inside_the_shape():
    """Ask 16 x 16 points in each pixel whether they are inside. Only at corners may a pixel be off
    by much: clamp(1/2 - distance) is exact for one straight side through a pixel, not for two."""
    p = (torch.arange(64 * 16) + 0.5) / (64 * 16)
    for s in scenes(24, two=False):
        t, = s.things
        inside = is_inside(t, p[None, :], p[:, None]).float()             # (1024, 1024)
        share = F.avg_pool2d(inside[None], 16)[0]                         # (64, 64)
        rgb = torch.tensor(train_toy.COLOURS[t.colour]) + 0.08 * t.shade
        want = 1 - 2 * share * (1 - rgb[:, None, None])                   # (3, 64, 64)
        off = (train_toy.render(s, 64) - want).abs()
        assert off.mean() < 1e-3, f"{t}: off by {off.mean()}; tilted the wrong way?"
        assert off.max() < 0.6 and (off > 0.25).any(0).sum() <= 12, f"{t}: more than corners is off"


def test_shapes_have_about_the_area_of_their_circle():
    for s in scenes(200, two=False):
        t, = s.things
        rgb = torch.tensor(train_toy.COLOURS[t.colour]) + 0.08 * t.shade
        ink = (1 - train_toy.render(s, 64)).mean((1, 2)) / 2              # (3,) area * (1 - rgb)
        area = ink.sum() / (1 - rgb).sum()
        assert 0.7 < area / (math.pi * t.r ** 2) < 1.1
        assert abs(area / t.r ** 2 - train_toy.AREA[train_toy.SHAPES.index(t.shape)]) < 0.04


def test_small_pictures_are_large_pictures_made_smaller():
    some = scenes(32)
    large = train_toy.render_many(some, 64)
    for size in (16, 32):
        want = F.avg_pool2d(large, 64 // size)
        assert (train_toy.render_many(some, size) - want).abs().max() < 1e-5
    assert (large - F.avg_pool2d(train_toy.render_many(some, 256), 4)).abs().mean() < 2e-3


def test_pixels_lie_in_range_and_do_not_depend_on_the_batch():
    some = scenes(16)
    for size in (16, 64, 256):
        batch = train_toy.render_many(some, size)
        assert batch.shape == (16, 3, size, size) and batch.dtype == torch.float32
        assert batch.min() >= -1 and batch.max() <= 1 and batch.max() > 0.999
        for s, picture in zip(some, batch):
            assert (train_toy.render(s, size) - picture).abs().max() < 1e-5


def test_no_shade_of_one_colour_looks_like_a_shade_of_another():
    """Two lines of shades, sampled: nowhere closer than 0.25, three times what a shade can add."""
    rgb = torch.tensor(list(train_toy.COLOURS.values()))                  # (8, 3)
    shades = rgb[:, None] + torch.linspace(-0.08, 0.08, 17)[None, :, None]
    apart = torch.cdist(shades.flatten(0, 1), shades.flatten(0, 1)).view(8, 17, 8, 17).amin((1, 3))
    assert (apart + torch.eye(8)).min() > 0.25
    assert shades.min() >= 0 and shades.max() <= 1


# ---- Reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, n", [(16, 400), (64, 400), (256, 60)])
def test_the_reader_is_right_about_every_clean_picture(size, n):
    for s in scenes(n, seed=size, unstated=0):
        seen = train_toy.read(train_toy.render(s, size))
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"


def test_the_reader_finds_place_and_size():
    for s in scenes(30, seed=5, unstated=0):
        seen = train_toy.read(train_toy.render(s, 64)).canonical()
        for t, u in zip(s.canonical().things, seen.things):
            assert abs(t.x - u.x) < 0.01 and abs(t.y - u.y) < 0.01 and abs(t.r - u.r) < 0.01


def test_the_reader_forgives_noise_blur_specks_and_a_shift_of_colour():
    g = torch.Generator().manual_seed(0)
    for s in scenes(60, seed=9, unstated=0):
        picture = F.avg_pool2d(train_toy.render(s, 64), 3, 1, 1, count_include_pad=False)
        picture = picture + 0.08 * torch.randn(3, 64, 64, generator=g)
        picture += torch.tensor([0.06, -0.06, 0.03])[:, None, None]
        picture[:, :2, :2] = -1            # a black speck in a corner
        seen = train_toy.read(picture)
        assert seen == s, f"{train_toy.caption(s)} was read as {train_toy.caption(seen)}"


def test_the_reader_forgives_enlarging_16_pixels():
    for s in scenes(60, seed=10, unstated=0):
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
    pictures = {k: torch.where(m, torch.tensor([-0.76, -0.48, 0.76])[:, None, None], 1.0)
                for k, m in masks.items()}
    pink = torch.tensor([0.1, 1.0, 0.5])[:, None, None]
    pictures["pink disc"] = 1 - (far < 0.2) * pink
    pictures["two-coloured disc"] = 1 - 1.7 * (far < 0.2) * torch.stack([x < 0, x < 2, x > 0])
    pictures["noise"] = torch.rand(3, 64, 64, generator=g) * 2 - 1
    pictures["not a number"] = torch.full((3, 64, 64), math.nan)
    return pictures.items()


@pytest.mark.parametrize("name, picture", garbage())
def test_garbage_agrees_with_no_caption(name, picture):
    seen = train_toy.read(picture)
    with pytest.raises(ValueError):                                       # no caption says so
        said = train_toy.parse(train_toy.caption(seen))
        assert False, f"{name} was read as {said}"
    for t in train_toy.SHAPES:
        for c in train_toy.COLOURS:
            assert not train_toy.agrees(Scene((Thing(t, c),)), seen)


@pytest.mark.parametrize("picture, complaint", [
    (torch.ones(1, 3, 64, 64), "square picture"), (torch.ones(3, 64, 32), "square picture"),
    (torch.ones(3, 8, 8), "square picture"), (torch.full((3, 64, 64), 255.0), "127.5")])
def test_the_reader_says_what_it_cannot_take(picture, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_toy.read(picture)
