"""CLIP's loss: SigLIP's (Zhai et al. 2023), a yes or no for each pair of an image and a caption."""
import sys
import torch
import torch.nn.functional as F

sys.path.insert(0, ".")                        # run it from the repository's folder
import clip
import train_toy
import unclip

world, config = train_toy.World(200), unclip.toy()
data = train_toy.Data(world, unclip.load("weights/toy.pt").tokenizer, config, "cpu")
model = clip.CLIP(config.clip)
model.bias = torch.nn.Parameter(torch.tensor(-10.0))


def batch_loss(progress):
    rows = data.rows(64)
    z_i, z_t = model(data.images(rows, 32), data.tokens[rows])
    yes = 2.0 * (data.ids[rows, None] == data.ids[None, rows]) - 1         # (B, B) of 1 and -1
    return -F.logsigmoid(yes * (model.scale() * z_i @ z_t.T + model.bias)).sum(1).mean()


losses = train_toy.train(model, train_toy.Recipe(steps=40, batch=64, lr=1e-3), batch_loss)
print(f"SigLIP's loss: {losses[0]:.2f} -> {losses[-1]:.2f}")
