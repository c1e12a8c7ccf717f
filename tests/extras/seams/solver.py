"""The sampler: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) instead of DDPM, in the decoder."""
import sys
sys.path.insert(0, ".")                        # run it from the repository's folder
import decoder, diffusion, train_toy, unclip

class FastDecoder(decoder.Decoder):
    def sample(self, z_i, text, steps, guidance, generator, progress, above):
        network = self.denoiser(z_i, text, guidance, above)
        x = diffusion.noise_like(z_i.new_empty(len(z_i), 3, 16, 16), generator)
        alpha, sigma = self.alphabar.sqrt(), (1 - self.alphabar).sqrt()
        lam, old = (alpha / sigma).log(), None               # half the log signal-to-noise ratio
        for t, s in diffusion.transitions(diffusion.spaced_timesteps(self.config.T, steps)):
            out = diffusion.split_variance(network(x, t), x)[0]
            x0 = diffusion.to_x0(self.alphabar, out, x, t, self.config.predicts).clamp(-1, 1)
            h = lam[s] - lam[t]                              # infinite at s = 0: x becomes d
            d = x0 if old is None or s == 0 else x0 + (x0 - old) * h / h_old / 2
            x, old, h_old = sigma[s] / sigma[t] * x - alpha[s] * (-h).expm1() * d, x0, h
        return x

model = unclip.load("weights/toy.pt")
fast = FastDecoder(model.config.decoder)
fast.load_state_dict(model.parts["decoder"].state_dict())
model.parts["decoder"] = fast.eval()
image = model.sample("a large green circle", decoder_steps=8, progress=False)[0]
print("DPM-Solver++(2M), 8 steps:", train_toy.caption(train_toy.read(image)))
