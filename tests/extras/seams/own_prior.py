"""The prior: a linear map from z_t to z_i, fitted by least squares, instead of diffusion."""
import sys
import torch

sys.path.insert(0, ".")                        # run it from the repository's folder
import clip
import prior
import train_toy
import unclip


class LinearPrior(prior.DiffusionPrior):       # of this kind, so that unclip.load finds it again
    def sample(self, text, steps, guidance, candidates, generator, progress):
        return clip.unit(clip.unit(text.z_t) @ self.text_in.weight)


model, world = unclip.load("weights/toy.pt"), train_toy.World(100)
z_i = model.encode_image(world.images(range(400), 32))
z_t = clip.unit(model.encode_text(world.captions).z_t)
linear = LinearPrior(prior.DiffusionPriorConfig(width=64))
linear.text_in.weight.data = torch.linalg.lstsq(z_t, clip.unit(z_i)).solution
model.parts["diffusion_prior"] = linear
image = model.sample("a large green circle", progress=False)[0]
print("linear prior:", train_toy.caption(train_toy.read(image)))
