"""The README's ten "change one thing" experiments, measured: writes pictures/experiments.json.

    python tests/experiments.py               all ten, some minutes
    python tests/experiments.py guidance      one of them

Each draws 32 captions that training never showed, at the decoder's 16 pixels, and asks the exact
reader; so a share is uncertain by 9 points (one standard deviation).
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bugs
import coursework
import torch
import torch.nn.functional as F

import train_toy
import unclip

FILE = unclip.HERE / "pictures/experiments.json"
CAPTIONS = 32


def scenes():
    return train_toy.some_scenes(0, CAPTIONS)


def draw(model, seed=0, guidance=None, decoder_steps=None, prior_guidance=None, **options):
    """The 32 captions drawn once -> small pictures. The other options are those of `embed`."""
    text = model.encode_text([train_toy.caption(s) for s in scenes()])
    generator = train_toy.seeded(seed)
    z_i = model.embed(text, guidance=prior_guidance, generator=generator, **options)
    return model.draw(z_i, text, guidance=guidance, decoder_steps=decoder_steps,
                      upsampler_steps=(), generator=generator)


def right(x):
    """The share of pictures that agree with their caption, as words."""
    return f"{100 * train_toy.right(scenes(), x):.0f} %"


def spread(model, **options):
    """How far apart two drawings of a caption are, over that of two true pictures, as words."""
    a, b = (draw(model, seed, **options) for seed in (0, 1))
    return f"{right(a)} right and diversity {train_toy.diversity(a, b, scenes()):.2f}"


def guidance(model):
    return "; ".join(f"scale {g:g}: {spread(model, guidance=g)}" for g in (0.0, 1.0, 2.0, 5.0))


def decoder_steps(model):
    return "; ".join(f"{n} steps: {right(draw(model, decoder_steps=n))} right"
                     for n in (2, 5, 12, 50))


def other_prior(model):
    return "; ".join(f"{name}: {spread(model, which=which)}"
                     for name, which in (("diffusion prior", "diffusion"), ("AR prior", "ar")))


def prior_steps(model):
    return "; ".join(f"{n} step{'s' * (n > 1)}: {right(draw(model, steps=n))} right"
                     for n in (1, 4, 16, 64))


def candidates(model):
    return "; ".join(f"{n}: {right(draw(model, candidates=n))} right" for n in (1, 2, 8))


def prior_guidance(model):
    return "; ".join(f"scale {g:g}: {right(draw(model, prior_guidance=g))} right"
                     for g in (1.0, 2.0, 4.0))


def rerank(model):
    captions, shares = [train_toy.caption(s) for s in scenes()], []
    drawn = torch.stack([draw(model, seed) for seed in range(4)], dim=1)       # (32, 4, 3, h, h)
    for n in (1, 2, 4):
        x = model.rerank(drawn[:, :n].flatten(0, 1), captions, keep=1)
        shares.append(f"best of {n}: {right(x)} right")
    return "; ".join(shares)


def no_prior(model):
    text, shares = model.encode_text([train_toy.caption(s) for s in scenes()]), []
    true = train_toy.render_many(scenes(), 64)
    for way in ("diffusion prior", "text embedding in its place", "caption alone"):
        generator = train_toy.seeded(0)
        z_i = train_toy.embeddings(model, text, true, way, generator)
        x = model.draw(z_i, text, upsampler_steps=(), generator=generator)
        shares.append(f"{way}: {right(x)} right")
    return "; ".join(shares)


def a_planted_bug(model):
    name = "variance_times_noise"
    ours, bug = spread(model), bugs.BUGS[name]
    with coursework.swapped({bug.replaces: bug.function}):
        return f"ours: {ours}; with the bug: {spread(model)}"


def enlarging(model):
    few = scenes()[:8]
    small, large = (train_toy.render_many(few, size) for size in (16, 256))
    shares = []
    for steps in ((1, 1), (2, 2), (10, 4)):
        x = model.enlarge(small, steps, train_toy.seeded(0))
        error = (x - large).square().mean().sqrt()
        shares.append(f"{steps[0]} and {steps[1]} steps: off by {error:.3f}")
    plain = F.interpolate(small, 256, mode="bicubic").clamp(-1, 1)
    return "; ".join([*shares, f"bicubic, no network: {(plain - large).square().mean().sqrt():.3f}"
                      " (root mean square, of a range of 2)"])


EXPERIMENTS = {f.__name__: f for f in (
    guidance, decoder_steps, prior_steps, other_prior, candidates, rerank, prior_guidance, no_prior,
    enlarging, a_planted_bug)}


@torch.no_grad()
def main(arguments=None):
    parser = argparse.ArgumentParser(description="Measure the README's experiments.",
                                     allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--out", default=str(FILE), metavar="FILE")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in EXPERIMENTS]:
        print(f"error: expected some of {', '.join(EXPERIMENTS)}, got {unknown[0]!r}",
              file=sys.stderr)
        return 2
    model, out = unclip.load(unclip.HERE / "weights/toy.pt"), Path(args.out)
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for name in args.names or EXPERIMENTS:
        start = time.process_time()
        found[name] = {"answer": EXPERIMENTS[name](model),
                       "seconds of one core": round(time.process_time() - start),
                       "machine": f"{platform.machine()}, torch {torch.__version__}",
                       "date": time.strftime("%Y-%m-%d")}
        print(f"{name}: {found[name]['answer']}", flush=True)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
