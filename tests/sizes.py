"""The README's table of the paper's sizes, from the two files that the benchmark wrote.

    python unclip.py benchmark --preset paper --device meta --dtype bf16 [--train] --json FILE
    python tests/sizes.py

FILE is pictures/paper_sampling.json, with --train pictures/paper_training.json.
"""
import argparse
import json
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "pictures"
# part: its name, the size that the paper states (table 3), and why ours is another
STATED = {
    "clip": ("CLIP", "not stated", "ViT-H/16 and a text encoder of 1024 x 24"),
    "diffusion_prior": ("diffusion prior", "1 B",
                        "one stack of 2048 x 24 is 1.21 B; tokens and positions beside it"),
    "ar_prior": ("AR prior", "1 B",
                 "its latent decoder is 0.97 B; its text encoder, 1.24 B, is stated apart"),
    "decoder": ("decoder", "3.5 B", ""),
    "upsampler1": ("upsampler 1", "700 M",
                   "the time scales and shifts (AdaGN); 692 M if it were only added"),
    "upsampler2": ("upsampler 2", "300 M",
                   "no attention at all; 311 M with it at 8, 16 and 32 px"),
}


def files():
    """-> what the benchmark wrote, of sampling and of training."""
    return [json.loads((PICTURES / f"paper_{kind}.json").read_text(encoding="utf-8"))
            for kind in ("sampling", "training")]


def read():
    """-> what the benchmark counted for sampling and for training, each {part: its row}."""
    return [{row["stage"]: row for row in file["stages"]} for file in files()]


def conditions():
    """When and with what it was counted, and what one picture takes in all: a sentence."""
    sampling, training = files()
    return (f"Counted, not run, by torch {sampling['torch']} "
            f"({sampling['machine'].split(',')[0]}, {max(sampling['date'], training['date'])}). "
            f"One picture takes {sampling['total FLOPs'] / 1e12:,.0f} TFLOP with the diffusion "
            "prior; what all steps share is done and counted once.")


def shown(parameters):
    """3496111111 -> "3.50 B"."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def table(sampling, training):
    """The table as Markdown."""
    lines = ["| part | stated | built | why | TFLOP a picture | GB, bf16 | TFLOP a step | "
             "GB, training |", "|---" * 8 + "|"]
    for part, (name, stated, why) in STATED.items():
        a, b = sampling[part], training[part]
        lines.append(f"| {name} | {stated} | {shown(a['parameters'])} | {why} | "
                     f"{a['FLOPs'] / 1e12:.3g} | {a['needs'] / 1e9:.1f} | "
                     f"{b['FLOPs'] / 1e12:.3g} | {b['needs'] / 1e9:.1f} |")
    return "\n".join(lines)


def totals(sampling, training):
    """The two sentences below it: does a picture fit, does the decoder's training?"""
    weights = {part: 2 * row["parameters"] for part, row in sampling.items()}        # bf16
    work = max(row["needs"] - weights[part] for part, row in sampling.items())
    alone = max(row["needs"] for row in sampling.values())
    masters, copies = training["decoder"]["needs"] / 1e9, weights["decoder"] / 1e9
    return (f"By that count all weights in bf16 are {sum(weights.values()) / 1e9:.1f} GB and the "
            f"hungriest stage works with {work / 1e9:.1f} GB beside them, "
            f"{(sum(weights.values()) + work) / 1e9:.1f} GB for one picture; with `--low-memory`, "
            f"{alone / 1e9:.1f} GB. To train the decoder takes 20 bytes a parameter (weight, "
            f"gradient, Adam's two averages, our average, all float32), {masters:.1f} GB, and "
            f"{copies:.1f} GB for copies in bf16; so {141 - masters - copies:.0f} GB of 141 are "
            "left for a batch.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.parse_args(argv)
    sampling, training = read()
    print(table(sampling, training), conditions(), totals(sampling, training), sep="\n\n")


if __name__ == "__main__":
    main()
