"""The README's table of symbols: letters of the papers, names in our code, and where they are.

    python tests/symbols.py          write the table into README.md, with the lines as they are now
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- symbols -->", "<!-- end of symbols -->"

SYMBOLS = (                     # letter, what it is, our name, file, the line that introduces it
    ("x", "a picture, in [-1, 1]", "x0", "decoder.py", "def loss(self, x0, z_i, text"),
    ("y", "a caption", "text", "clip.py", "class Text(NamedTuple):"),
    ("z_i", "CLIP's embedding of a picture", "z_i", "clip.py", "def encode_image(self, images):"),
    ("z_t", "CLIP's embedding of a caption", "z_t", "clip.py", "def encode_text(self, tokens):"),
    ("tau", "log of 1 / temperature", "logit_scale", "clip.py", "self.logit_scale = nn.Parameter"),
    ("P(z_i given y)", "the prior", "DiffusionPrior", "prior.py", "class DiffusionPrior("),
    ("P(z_i given y)", "the other prior", "ARPrior", "prior.py", "class ARPrior(nn.Module):"),
    ("P(x given z_i, y)", "the decoder", "Decoder", "decoder.py", "class Decoder(nn.Module):"),
    ("f(z^(t), t, y)", "the prior's prediction of z_i", "forward", "prior.py",
     "def forward(self, x_t, index, text):"),
    ("L_prior", "its loss", "loss", "prior.py", "def loss(self, z_i, text, share=(0, 1)):"),
    ("T", "number of times", "T", "prior.py", "T: int = 1000"),
    ("t - 1", "what a network is told about time", "index", "diffusion.py",
     "def sinusoid(index, width):"),
    ("alpha-bar", "share of signal at each time", "alphabar", "diffusion.py",
     "def cosine_alphabar(T):"),
    ("beta", "variance that a step adds", "betas", "diffusion.py", "def _cumulate(betas):"),
    ("epsilon", "the noise", "eps", "diffusion.py", "def q_sample(alphabar, x0, t, eps):"),
    ("x_t", "the data at time t", "x_t", "diffusion.py",
     "def predict_x0(alphabar, x_t, t, eps):"),
    ("mu-tilde, beta-tilde", "mean and variance of x_s given x_t, x0", "mean, var", "diffusion.py",
     "def q_posterior(alphabar, x0, x_t, t, s):"),
    ("v", "where in its range the log-variance is", "v", "diffusion.py",
     "def learned_range_log_var(alphabar, v, t, s):"),
    ("L_simple", "squared error of the noise", "simple_loss", "diffusion.py",
     "def simple_loss(eps_hat, eps):"),
    ("L_vlb", "a term of the variational bound", "vlb_loss", "diffusion.py",
     "def vlb_loss(alphabar, eps_hat, v, x0, x_t, t):"),
    ("eta", "noise that DDIM adds", "eta", "diffusion.py",
     "def ddim_step(alphabar, x_t, t, s, x0, eta=0.0, noise=None):"),
    ("x_T", "the noise that decodes to a picture", "x_T", "unclip.py",
     "def latent(self, pictures, steps=250, progress=False):"),
    ("slerp, theta", "along an arc, its share or angle", "slerp", "diffusion.py",
     "def slerp(a, b, share):"),
    ("z_d", "difference of two captions", "z_d", "unclip.py",
     "def difference(self, source, target):"),
    ("s, w", "guidance scale", "scale", "diffusion.py", "def guide(uncond, cond, scale):"),
    ("17.2", "what embeddings are scaled by", "norm", "prior.py", "norm = 17.2 * math.sqrt"),
    ("rho", "radius of sharpness-aware steps", "rho", "clip.py",
     "def sam_backward(loss_fn, parameters, rho):"),
)


def table():
    """The table as Markdown. ValueError if a line is not in its file; of several, the first."""
    rows = ["| paper | what it is | code | line |", "|---|---|---|---|"]
    for letter, what, name, file, line in SYMBOLS:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        at = [i for i, text in enumerate(lines, start=1) if text.strip().startswith(line)]
        if not at:
            raise ValueError(f"expected a line of {file} to begin with {line!r}, found none")
        rows.append(f"| {letter} | {what} | `{name}` | [{file}:{at[0]}]({file}#L{at[0]}) |")
    return "\n".join(rows)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
