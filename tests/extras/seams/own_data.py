"""Replace the data: train_toy.run takes any object with `captions` and `images(rows, size)`."""
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import torch

import train_toy


class Flags:
    captions = ["red over blue", "blue over red", "red over red", "blue over blue"] * 16

    def images(self, rows, size):
        paint = 2 * torch.eye(3)[:, :, None, None].expand(3, 3, size // 2, size) - 1
        red, blue = paint[0], paint[2]
        flags = (red, blue), (blue, red), (red, red), (blue, blue)
        return torch.stack([torch.cat(flags[row % 4], dim=1) for row in rows])


with tempfile.TemporaryDirectory() as out:
    model = train_toy.run(Flags(), train_toy.Settings(out=out, steps_scale=0.002, batch=8))
images = model.sample(["red over blue"], rerank=1, progress=False)
print(f"trained on flags: {tuple(images.shape)}, it knows {', '.join(model.words)}")
