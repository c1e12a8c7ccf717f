"""The U-Net: a small DiT (Peebles & Xie 2023) in its place; caption and z_i are tokens, too."""
import sys, torch
sys.path.insert(0, ".")                        # run it from the repository's folder
import clip, decoder, train_toy

class DiT(torch.nn.Module):
    def __init__(self, size, W, E, patch=4):
        super().__init__()
        self.patch, self.emb = torch.nn.Conv2d(3, W, patch, patch), torch.nn.Linear(E, W)
        self.pos = torch.nn.Parameter(torch.randn((size // patch) ** 2, W))
        self.blocks = torch.nn.Sequential(*clip.blocks(2, W, 2))
        self.out = torch.nn.Linear(W, 6 * patch ** 2)

    def forward(self, x, t, emb, context, mask):                                # t: int or (B,)
        emb = emb + clip.sinusoid(torch.as_tensor(t).expand(len(x)) - 1, emb.shape[1])
        h = self.patch(x).flatten(2).transpose(1, 2) + self.pos + self.emb(emb)[:, None]
        h = self.blocks(torch.cat([context, h], dim=1))[:, -len(self.pos):]     # (B, patches, W)
        h = self.out(h).transpose(1, 2)                                         # (B, ., patches)
        return torch.nn.functional.fold(h, x.shape[2:], self.patch.stride, stride=self.patch.stride)

model, no, z = decoder.Decoder(decoder.DecoderConfig()), torch.zeros(4, 20), torch.zeros(4, 64)
model.unet, text = DiT(16, 64, 64), clip.Text(no.long(), no.bool(), no, no)
train_toy.train(model, train_toy.Recipe(20, 4, 1e-3),
                lambda progress: model.loss(torch.ones(4, 3, 16, 16), z, text).mean())
print("DiT:", [*model.sample(z, text, steps=10, guidance=2.0).shape])
