"""What users bring to clip.py: images of every mode, wrong input, and `python clip.py` itself."""
import copy
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import unclip
from extras import karlo


@pytest.fixture
def photo():
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((101, 67), Image.Resampling.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("shape", [(101, 67), (67, 101), (30, 40), (32, 32), (99, 32)])
def test_preprocessing_is_resize_and_centre_crop(photo, shape, size=32):
    photo, (w, h) = photo.resize(shape), shape
    w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
    left, top = int(round((w - size) / 2)), int(round((h - size) / 2))
    want = photo.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    got = clip.preprocess(photo, size)
    assert got.shape == (3, size, size) and torch.allclose(got, pixels(want), atol=1e-6)


def test_an_image_is_opened_as_its_middle_square(photo, tmp_path):
    photo.save(tmp_path / "x.png")
    want = pixels(photo)[:, :, 17:84]
    for image in (photo, tmp_path / "x.png", str(tmp_path / "x.png"), pixels(photo)):
        assert torch.equal(clip.open_image(image), want)
    strip = clip.preprocess(Image.new("RGB", (100_000, 1), "red"), 64)       # only its middle
    assert torch.equal(strip[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(mode, tmp_path):
    solid = Image.new("L", (32, 32))
    solid.paste(255, (8, 8, 24, 24))
    image = Image.composite(Image.new("L", (32, 32), 90), Image.new("L", (32, 32)), solid)
    image, options = image.convert(mode), {}
    if mode in ("RGBA", "LA"):
        image.putalpha(solid)
    else:
        options = {"transparency": image.getpixel((0, 0))}
    image.save(tmp_path / "x.png", **options)
    x = clip.open_image(tmp_path / "x.png")
    assert torch.allclose(x, torch.where(pixels(solid) > 0, 90 / 127.5 - 1, 1.0).float(), atol=1e-6)


def test_other_modes_keep_their_grey_levels_and_photos_are_turned_upright(photo, tmp_path):
    grey = photo.convert("L")
    want = clip.open_image(grey.convert("RGB"))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for name in ("x.png", "x.tif"):
        sixteen.save(tmp_path / name)
        assert torch.equal(clip.open_image(tmp_path / name), want), "16 bits: divide by 257"
    assert torch.equal(clip.open_image(grey), want)
    assert clip.open_image(photo.convert("1")).abs().min() == 1
    assert (clip.open_image(photo.convert("CMYK")) - clip.open_image(photo)).abs().max() < 0.02
    turned = Image.Exif()
    turned[0x0112] = 6                                               # "turn me by 90 degrees"
    photo.save(tmp_path / "x.jpg", exif=turned, quality=95)
    upright = clip.open_image(photo.rotate(-90, expand=True))
    assert (clip.open_image(tmp_path / "x.jpg") - upright).abs().mean() < 0.05
    photo.save(tmp_path / "y.jpg", exif=b"Exif\0\0no TIFF header", quality=95)
    (plain := Image.open(tmp_path / "y.jpg").convert("RGB")).info.clear()
    assert torch.equal(clip.preprocess(tmp_path / "y.jpg", 16), clip.preprocess(plain, 16))


def test_files_that_are_no_images_are_refused_by_name(photo, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone.png cannot be read: .*; expected an image"):
        clip.preprocess(tmp_path / "gone.png", 16)
    photo.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    Image.new("F", (9, 9)).save(tmp_path / "float.tif")
    Image.new("I", (9, 9)).save(tmp_path / "int32.tif")
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "12bits.png")
    Image.fromarray(np.full((9, 9), 9000, np.uint16)).save(tmp_path / "hole.png", transparency=9000)
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    for name in ("cut.png", "text.png", "folder.png", "float.tif", "int32.tif", "bomb.png",
                 "12bits.png", "hole.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: ") as error:
            clip.open_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected the path of an image.*, got ndarray"):
        clip.open_image(np.zeros((9, 9, 3)))


@pytest.mark.parametrize("wrong", [
    torch.full((3, 9, 9), 255.0), torch.zeros(1, 3, 9, 9), torch.zeros(4, 9, 9),
    torch.full((3, 9, 9), math.nan), torch.zeros(3, 0, 9), torch.zeros(3, 9, 9, dtype=torch.uint8)])
def test_tensors_out_of_shape_or_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\(3, H, W\) of floats in \[-1, 1\].*127.5"):
        clip.open_image(wrong)


# ---------------------------------------------------------------- wrong input
@pytest.mark.parametrize("merges, change, message", [
    (["a b c"], {}, "fit: 'a b c'"), (["ab c"], None, "fit: 'ab'"), (["a b"], {}, "fit: 'ab'"),
    ([], {"mine": 514}, "fit: 'mine'"),
    ([], {"!": 512.0}, "once each"), ([], {"!": 1}, "once each"), ([], {"!": "!"}, "once each")])
def test_merges_and_vocabulary_have_to_fit(merges, change, message):
    vocab = None if change is None else clip.Tokenizer([]).ids | change
    with pytest.raises(ValueError, match=message):
        clip.Tokenizer(merges, vocab)


# ---------------------------------------------------------------- the program
@pytest.fixture
def red_circle(tmp_path):
    y, x = np.ogrid[-32:32, -32:32]
    image = np.where((x ** 2 + y ** 2 < 300)[..., None], (224, 30, 34), 255).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.mark.slow
def test_the_program_prints_a_probability_for_each_caption(toy, red_circle, tmp_path, capsys):
    captions = ["a small blue square", "a large red circle"]
    clip.main([red_circle, *captions, "-o", str(tmp_path / "image.jpg")])
    lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    assert [caption for _, caption in lines] == captions
    tokens = toy.tokenizer(captions, toy.config.clip.context)
    want = clip.zero_shot(toy.part("clip"), clip.preprocess(red_circle, 32)[None], tokens)
    assert [float(p) for p, _ in lines] == pytest.approx((100 * want[0]).tolist(), abs=0.01)
    assert want[0, 1] > 0.9, "the toy's CLIP should know a red circle"
    assert Image.open(tmp_path / "image.jpg").size == (128, 128), "at least 128 px wide"


@pytest.mark.slow
def test_the_demo_finds_the_caption_of_each_image(tmp_path, capsys):
    clip.main(["-o", str(tmp_path / "demo.png")])
    rows = [line.split("%")[:-1] for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert np.array(rows, float).argmax(0).tolist() == list(range(6))
    assert Image.open(tmp_path / "demo.png").size == (6 * 130 - 2, 128), "six images in a row"


@pytest.mark.parametrize("arguments, message", [
    (["gone.png", "a"], "gone.png cannot be read: No such file"),
    (["gone.png"], "captions after the image"), (["x.png", "a", "\u200b"], "with some text"),
    (["x.png", "a", "--vocab", "v.txt"], "--weights and --vocab"),
    (["x.png", "a", "--weights", "w.pt"], "--weights and --vocab"),
    (["x.png", "a", "--device", "abacus"], "abacus")])
def test_the_program_refuses_what_it_cannot_use(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        clip.main(arguments)


def test_the_program_refuses_what_is_not_finite_and_misses_extras(toy, red_circle, monkeypatch):
    broken = copy.copy(toy)
    broken.parts = toy.parts | {"clip": copy.deepcopy(toy.part("clip"))}
    broken.parts["clip"].image.proj.data[0, 0] = math.nan
    monkeypatch.setattr(unclip, "load", lambda *_: broken)
    with pytest.raises(ValueError, match="toy.pt is damaged"):
        clip.main([red_circle, "a red circle"])
    monkeypatch.setitem(sys.modules, "extras", None)
    with pytest.raises(SystemExit, match="2"):
        unclip.stop_on_error(clip.main, [red_circle, "a", "--weights", "w.pt", "--vocab", "v.txt"])
