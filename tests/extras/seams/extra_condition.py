"""The condition: a class label for the decoder, too; it is dropped for guidance."""
import sys, typing
import torch
sys.path.insert(0, ".")                        # run it from the repository's folder
import clip, decoder, train_toy

class Labelled(typing.NamedTuple):             # in the place of a clip.Text
    text: clip.Text
    label: torch.Tensor                        # (B,) in 1..9; 0 is the null condition
    drop = lambda self, keep: Labelled(self.text.drop(keep), self.label * keep)
    null = lambda self: Labelled(self.text.null(), self.label * 0)
    after = lambda self, a: Labelled(self.text.after(a.text), torch.cat([a.label, self.label]))
    map = lambda self, f: Labelled(self.text.map(f), f(self.label))

class LabelDecoder(decoder.Decoder):
    def condition(self, z_i, given):
        emb, context, mask = super().condition(z_i, given.text)
        return emb + self.label_emb(given.label), context, mask

model, no, z_i = LabelDecoder(decoder.DecoderConfig()), torch.zeros(4, 20), torch.zeros(4, 64)
model.label_emb = torch.nn.Embedding(10, 4 * model.config.unet.channels)
given = Labelled(clip.Text(no.long(), no.bool(), no, no), torch.arange(1, 5))
batch_loss = lambda progress: model.loss(torch.ones(4, 3, 16, 16), z_i, given).mean()
train_toy.train(model, train_toy.Recipe(10, 4, 1e-3), batch_loss)
print("label:", [*model.refine(model.sample(z_i, given, 10, 2.0), z_i, given, draws=2).shape])
