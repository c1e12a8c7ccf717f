"""A preset: another stack of networks and how it is trained, under a name of its own."""
import sys
import tempfile
from dataclasses import replace

sys.path.insert(0, ".")                        # run it from the repository's folder
import decoder
import prior
import train_toy
import unclip

unet = decoder.UNetConfig(size=16, channels=16, mults=(1, 2), attention=(8,), head_channels=16,
                          context_width=32, groups=8)
unclip.PRESETS["tiny"] = replace(
    unclip.toy(), name="tiny", decoder=decoder.DecoderConfig(unet, predicts="v"),
    diffusion_prior=prior.DiffusionPriorConfig(width=64, layers=2, heads=2))
train_toy.RECIPES["tiny"] = train_toy.TOY

with tempfile.TemporaryDirectory() as out:
    settings = train_toy.Settings(out=out, preset="tiny", steps_scale=0.002, batch=8)
    model = train_toy.run(train_toy.World(30), settings)
numbers = sum(w.numel() for w in model.parts["decoder"].parameters())
print(f"a tiny stack: {numbers:,} parameters in the decoder")
