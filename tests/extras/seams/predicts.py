"""What a network predicts: one word of its configuration, "eps", "x0" or "v"."""
import sys
import torch

sys.path.insert(0, ".")                        # run it from the repository's folder
import clip
import prior

# 64 captions, each a pair of tokens, and the embeddings that belong to them
tokens = torch.cartesian_prod(torch.arange(8), torch.arange(8))
z_i = clip.unit(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
text = clip.Text(tokens, torch.ones_like(tokens, dtype=torch.bool), z_i, z_i[:, :0])

for predicts in ("eps", "x0", "v"):
    torch.manual_seed(0)
    model = prior.DiffusionPrior(prior.DiffusionPriorConfig(context=2, predicts=predicts))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        model.zero_grad()
        model.loss(z_i, text).mean().backward()
        optimizer.step()
    cosine = (model.eval().sample(text, steps=8) * z_i).sum(1).mean()
    print(f"{predicts}: cosine {cosine:.2f}", end="\n" if predicts == "v" else ", ")
