"""A museum of bugs: small, silent, most of them published. None of them crashes.

    python extras/museum.py                     the whole collection
    python extras/museum.py NAME                one of them: its line, its history, what tests say
    python extras/museum.py NAME -o bug.png     and what it does to images of the toy model

Each is one changed line of our own source, so it cannot drift from the code that it spoils: if the
line is no longer there, `broken` raises. tests/extras/test_museum.py proves that the quick tests of
the chapter notice each of them, and that a message names the mistake. Where another project is
named, the mistake was theirs, the line is ours.
"""
import argparse
import contextlib
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import coursework
from coursework import ROOT


@dataclass
class Bug:
    function: str          # of ours
    ours: str              # what stands in it once
    wrong: str             # what the bug has in its place
    says: str              # words of the test's message that name the mistake
    history: str           # who published it, and what came of it


def broken(bug):
    """Our function with the bug's one change.   ValueError unless its line stands there once."""
    chapter = bug.function.split(".")[0]
    lines, node = coursework.parsed(chapter)[0], coursework.source(bug.function)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    text = "\n".join(lines[first - 1:node.end_lineno])
    body = "\n".join(lines[coursework.body_lines(bug.function)[0] - 1:node.end_lineno])
    if body.count(bug.ours) != 1:
        raise ValueError(f"expected {bug.ours!r} once in {bug.function}, found it "
                         f"{body.count(bug.ours)} times; the chapter has changed")
    body_at = text.index(body)
    text = text[:body_at] + text[body_at:].replace(bug.ours, bug.wrong)

    # a method needs a class around it, for super()
    module, made = vars(sys.modules.get(chapter) or __import__(chapter)), {}
    if node.col_offset:
        text = "class Method:\n" + text
    exec(compile(text, f"{chapter}.py with a bug", "exec"), module, made)
    return vars(made["Method"])[node.name] if node.col_offset else made[node.name]


def examine(name):
    """The chapter's quick tests on a bug, until a message names it -> [(test, message)]."""
    bug = BUGS[name]
    trial = coursework.Trial(lambda: {bug.function: broken(bug)}, coursework.tests_of(bug.function),
                             enough=lambda message: bug.says in message)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trial.run(*coursework.test_files(bug.function.split(".")[0]))
    if any(offence.startswith("KeyboardInterrupt") for offence in trial.offences):
        raise KeyboardInterrupt              # pytest kept it to itself
    return [(test, message) for test, message in trial.results.items() if message]


def images(name, path):
    """Images of the toy model with our function above, with the bug below -> a sentence."""
    import torch

    import unclip
    captions = ["a large red circle", "a small blue square above a large orange triangle",
                "a small black cross", "a large green cross left of a small purple circle"]

    def draw():
        model, seed = unclip.load(ROOT / "weights/toy.pt"), torch.Generator().manual_seed(0)
        if BUGS[name].function in ("unclip.UnCLIP.text_diff", "unclip.slerp"):
            image = model.sample(captions[0], generator=seed)[0]
            return model.text_diff(image, captions[0], "a large blue circle", 4, steps=50,
                                   generator=seed)
        return model.sample(captions, generator=seed)

    right = draw()
    with coursework.swapped({BUGS[name].function: broken(BUGS[name])}):
        wrong = draw()
    unclip.save_grid(torch.cat([right, wrong]), path, len(captions))
    if torch.equal(right, wrong):
        return f"wrote {path}: both rows are equal; it does its harm elsewhere, such as in training"
    return (f"wrote {path}: ours above, the bug below; pixels differ by "
            f"{(right - wrong).abs().mean():.3f} of 2 on average")


def show(name):
    """What one exhibit says of itself, and what the tests say of it."""
    bug = BUGS[name]
    print(f"{name}: {bug.function}\n\n  - {bug.ours}\n  + {bug.wrong}\n\n"
          + textwrap.fill(bug.history, 96) + "\n", flush=True)
    for test, message in examine(name)[-3:]:
        print(f"{test.split('::')[-1]}\n    {message}")


def main(arguments=None):
    import unclip
    parser = argparse.ArgumentParser(description="A museum of bugs.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", metavar="NAME", help="an exhibit (without: the list)")
    parser.add_argument("-o", "--out", type=unclip.image_name, metavar="FILE",
                        help="draw what it does to images")
    unclip.stop_on_error(run, parser.parse_args(arguments))


def run(args):
    if args.name is None and args.out:
        raise ValueError("expected the NAME of an exhibit to draw; leave -o out for the list")
    if args.name is None:
        for name, bug in BUGS.items():
            print(f"{name}  ({bug.function})\n"
                  + textwrap.indent(textwrap.fill(bug.history, 92), "    "))
    elif args.name not in BUGS:
        raise ValueError(f"expected one of {', '.join(BUGS)}, got {args.name!r}")
    else:
        show(args.name)
        if args.out:
            print(images(args.name, args.out))


# ---------------------------------------------------------------- the collection
BUGS = {
    # diffusion.py
    "betas_of_another_T": Bug("diffusion.linear_alphabar", " * 1000 / T", "", "scale linear betas",
        "tiny-diffusion #4: T = 50 with the betas of T = 1000. 60 % of x_T was still signal. "
        "diffusers PR 12341 wants a switch for it."),
    "no_cap": Bug("diffusion.cumulate", "betas.clamp(max=0.999)", "betas", "cap betas", "The cap "
        "of IDDPM eq. 17 forgotten: alphabar_T is 0, and x0 = x_T / 0."),
    "starts_below_T": Bug("diffusion.spaced_timesteps", "[(T - 1) / (K - 1)]", "[T // K]",
        "1 and T", "DALLE2-pytorch's DDIM, and diffusers #2585: 50 steps begin at 981 of 1000, "
        "where training noise is left out."),
    "last_step_not_taken": Bug("diffusion.transitions", "[*reversed(timesteps), 0]",
        "[*reversed(timesteps)]", "the step not taken", "minDiffusion and DALLE2-pytorch's "
        "decoder: the last step is never taken, some noise stays in every image."),
    "T_is_never_drawn": Bug("diffusion.loss", "torch.randint(1, T + 1,", "torch.randint(1, T,",
        "as likely as any other", "minDiffusion: t is drawn from 1..T-1, while sampling starts "
        "at T, where the network has never been."),
    "noise_without_its_root": Bug("diffusion.q_sample", "(1 - alphabar[t]).sqrt()",
        "(1 - alphabar[t])", "no root", "labml #152 (fixed): a wrong sqrt(1 - alphabar). "
        "RePaint's Algorithm 1 prints the same slip (diffusers #1581)."),
    "cast_too_early": Bug("diffusion.to_eps", "(1 - alphabar[t]).rsqrt()",
        "(1 - alphabar.to(x_t.dtype)[t]).rsqrt()", "cast last", "Many: the table itself in "
        "float32. 1 - alphabar at t = 1 keeps three digits of seven."),
    "signed_differences": Bug("diffusion.loss", "error.pow(2)", "error", "E eps^2",
        "smalldiffusion's test helper sums signed differences, which cancel; the same slip in a "
        "loss."),
    "a_thousandth_of_the_mean": Bug("diffusion.loss", "T / 1000 * vlb_loss", "0.001 * vlb_loss",
        "not 0.001", "DALLE2-pytorch: 0.001 times the mean over t of a bound that is a sum of "
        "1000 terms: 1000 times too weak."),
    "bound_reaches_the_mean": Bug("diffusion.loss", "out.detach()", "out", "detach the prediction",
        "The stop-gradient of IDDPM sec. 3.1 is half a sentence: without it the noisy bound "
        "trains the mean, too."),
    "velocity_of_the_other_sign": Bug("diffusion.to_x0",
        "expand(ab.sqrt(), x_t) * x_t - expand((1 - ab).sqrt(), x_t) * out",
        "expand(ab.sqrt(), x_t) * x_t + expand((1 - ab).sqrt(), x_t) * out", "straight from v",
        "Two papers, two signs of v: progressive distillation's is sqrt(ab) eps - sqrt(1 - ab) "
        "x0."),
    "posterior_weights_swapped": Bug("diffusion.q_posterior",
        "expand(from_x0, x_t) * x0 + expand(from_xt, x_t) * x_t",
        "expand(from_xt, x_t) * x0 + expand(from_x0, x_t) * x_t", "swapped", "The commonest slip "
        "of every course: the weights of x0 and x_t change places."),
    "posterior_std": Bug("diffusion.q_posterior", ", expand(var, x_t)", ", expand(var.sqrt(), x_t)",
        "is it a std", "diffusers' unCLIP scheduler keeps a std, then a log-variance, under the "
        "name `variance`; one read for the other."),
    "beta_of_one_step": Bug("diffusion.q_posterior", "alpha = ab_t / ab_s",
        "alpha = ab_t / alphabar[torch.as_tensor(t) - 1]", "Bayes' rule gives another mean",
        "diffusers PR 3006 (fixed): where timesteps are skipped, beta_t is that of one step, not "
        "of the gap. open-dalle-2, too."),
    "variance_times_noise": Bug("diffusion.p_sample", "mean + var.sqrt() * noise",
        "mean + var * noise", "a variance for a std", "mbn312/dalle2: the posterior variance "
        "multiplies the noise, so almost none is added."),
    "noise_on_the_last_step": Bug("diffusion.p_sample",
        "return mean if s == 0 else mean + var.sqrt() * noise",
        "return mean + expand((1 - alphabar[t]).sqrt(), x_t) * noise_like(x_t, generator)",
        "is noise added there", "labml's DDPM: noise is added on the last step, too."),
    "x_t_clamped": Bug("diffusion.p_sample", "x0 = x0.clamp(-clamp, clamp)",
        "x_t = x_t.clamp(-clamp, clamp)", "do not clamp x_t", "mbn312/dalle2 and open-dalle-2: "
        "x_t instead of x0 is clamped at every step, which cuts the noise and lets x0 run away."),
    "clamp_is_not_used": Bug("diffusion.p_sample", "x0 = x0.clamp(-clamp, clamp)", "pass",
        "clamped", "DiffusionDet #30 (fixed): the switch that clamps x0 was read by nobody."),
    "eps_not_recomputed": Bug("diffusion.p_sample",
        "return ddim_step(alphabar, x_t, t, s, x0, eta, noise)",
        "return (expand(alphabar[s].sqrt(), x_t) * x0 + expand((1 - alphabar[s]).sqrt(), "
        "x_t) * to_eps(alphabar, to_x0(alphabar, out, x_t, t, predicts), x_t, t)) if eta == "
        "0 else ddim_step(alphabar, x_t, t, s, x0, eta, noise)", "recompute eps",
        "denoising-diffusion-pytorch PR 84 (fixed), and diffusers' DDIMScheduler by default: x0 "
        "is clamped, eps not recomputed from it."),
    "the_other_convention": Bug("diffusion.guide", "uncond + scale * (cond - uncond)",
        "cond + scale * (cond - uncond)", "Ho & Salimans", "Two conventions of one formula (Ho & "
        "Salimans' w is GLIDE's scale - 1): asked about in five repositories, such as "
        "diffusers #5882."),
    "variance_guided_too": Bug("diffusion.guided",
        "torch.cat([guide(uncond[:, :C], cond[:, :C], scale), cond[:, C:]], dim=1)",
        "guide(uncond, cond, scale)", "the variance is", "DALLE2-pytorch's decoder: guidance "
        "also stretches the predicted variance."),
    "some_channels_guided": Bug("diffusion.guided",
        "guide(uncond[:, :C], cond[:, :C], scale), cond[:, C:]",
        "guide(uncond[:, :C - 1], cond[:, :C - 1], scale), cond[:, C - 1:]",
        "unconditional rows come first", "DiT #41: guidance reaches three of four latent "
        "channels, taken over from GLIDE's three of RGB; SiT, MDT and PixArt inherited it."),
    "two_tables": Bug("diffusion.ddim_step", "to_eps(alphabar, x0, x_t, t)",
        "to_eps(alphabar, x0, x_t, (torch.as_tensor(t) + 1).clamp(max=len(alphabar) - 1))",
        "the mean of x_", "DALLE2-pytorch's prior: eps from one table, the step by another, one "
        "index apart. denoising-diffusion-pytorch #83 was one of its kind."),
    "ddim_variance_for_std": Bug("diffusion.ddim_step", "x_s + expand(var.sqrt(), x_t) * noise",
        "x_s + expand(var, x_t) * noise", "sig a variance", "sig of DDIM eq. 16 without its "
        "roots: eta = 1 is no longer DDPM."),
    "inverted_from_the_wrong_end": Bug("diffusion.ddim_invert_step", "to_eps(alphabar, x0, x_t, t)",
        "to_eps(alphabar, x0, x_t, u)", "up is down, reversed", "Inversion with the eps of the "
        "timestep that it goes to."),
    "inversion_by_index": Bug("diffusion.invert", "network(x, t)",
        "network(x, list(timesteps).index(t) + 1)", "not with its index", "stablediffusion PR "
        "226 (open for years): DDIM inversion calls the network with the index of a timestep."),
    "known_part_lost_at_last": Bug("diffusion.inpaint", "if s > 0 else known", "if s > 0 else x",
        "must come back as it was", "denoising-diffusion-pytorch PR 322 (fixed): in RePaint's "
        "last step the ground truth was not put back."),
    "never_resampled": Bug("diffusion.inpaint", "range(resample if s > 0 else 1)", "range(1)",
        "`resample` times each step", "denoising-diffusion-pytorch #319 (fixed): RePaint's "
        "resampling stood after the sampling loop, not in it."),
    "mask_inverted": Bug("diffusion.inpaint", "torch.where(mask, known_s, x)",
        "torch.where(mask, x, known_s)", "must come back as it was", "RePaint keeps where "
        "its mask is 1, Stable Diffusion repaints there: the wrong part stays."),
    "std_for_variance": Bug("diffusion.step_variance", "learned_log_var(alphabar, raw, t, s).exp()",
        "(0.5 * learned_log_var(alphabar, raw, t, s)).exp()", "a variance for a std",
        "diffusers' unCLIP scheduler returns exp(log_var / 2) as `variance`; used as one it is "
        "far too large."),
    "v_taken_for_a_share": Bug("diffusion.learned_log_var", "(raw + 1) / 2", "raw", "0..1", "v "
        "of IDDPM eq. 15 is in 0..1, a network's output in -1..1; what turns one into the "
        "other is in the code only."),
    "interpolated_without_logs": Bug("diffusion.learned_log_var",
        "return weight * expand(large, raw) + (1 - weight) * expand(small, raw)",
        "return (weight * expand(large.exp(), raw) + (1 - weight) * expand(small.exp(), "
        "raw)).log()", "logs mix", "diffusers PR 2090 (fixed): the learned range interpolated "
        "the variances, not their logarithms."),
    "bound_of_one_step": Bug("diffusion.log_var_bounds",
        "return small.log(), (1 - ab_t / ab_s).log()",
        "return small.log(), (1 - ab_t / alphabar[torch.as_tensor(t) - 1]).log()", "the large one",
        "diffusers PR 3006 (fixed): the larger bound took beta_t where timesteps were skipped."),
    "bound_in_nats": Bug("diffusion.vlb_loss", " / math.log(2)", "", "in bits", "Nats where the "
        "published numbers are bits: 1.44 times off, and nothing looks wrong."),
    "seed_is_ignored": Bug("diffusion.draw",
        "generator=generator, device=generator.device if generator else device",
        "generator=None, device=device", "same seed, other image", "diffusers #7421: a pipeline "
        "that took a generator and drew from another."),

    # clip.py
    "time_along_the_batch": Bug("clip.sinusoid", "torch.cat([angle.cos(), angle.sin()], dim=1)",
        "torch.cat([angle.cos(), angle.sin()], dim=0).reshape(len(index), width)", "cosines first",
        "gmongaras/Diffusion_models_from_scratch #10: sin and cos along the batch axis. t meant "
        "nothing; the weights were not retrained."),
    "scaled_by_the_whole_width": Bug("clip.attend", "is_causal=causal)",
        "is_causal=causal, scale=(heads * q.shape[3]) ** -0.5)", "width of a head", "Scores "
        "divided by the root of the whole width: attention is blurred by the root of the "
        "number of heads."),
    "causal_mask_skipped": Bug("clip.attend", "is_causal=causal", "is_causal=False", "causal",
        "xformers #103 (fixed): the causal mask was skipped where no other mask was given."),
    "norm_after_the_branch": Bug("clip.Block.forward",
        "x = x + self.proj(attend(q, k, v, self.heads, mask, causal))",
        "x = self.ln1(x + self.proj(attend(q, k, v, self.heads, mask, causal)))", "LayerNorm",
        "Post-LN, the Transformer of 2017, where CLIP and everything after it is pre-LN."),
    "the_other_gelu": Bug("clip.Block.forward", "torch.sigmoid(1.702 * h)", "torch.sigmoid(h)",
        "two activations are the formulas", "open_clip warns of it: OpenAI's weights want x "
        "sigmoid(1.702 x); another activation costs accuracy and no error."),
    "cls_without_position": Bug("clip.ImageEncoder.forward", "self.ln_in(x + self.pos)",
        "self.ln_in(torch.cat([x[:, :1], x[:, 1:] + self.pos[1:]], dim=1))", "class token first",
        "labml PR 221 (fixed): the class token had no position."),
    "one_position_for_all": Bug("clip.TextEncoder.forward", "self.pos[:tokens.shape[1]]",
        "self.pos[tokens.shape[1] - 1]", "two positions should differ", "labml #133 (fixed): "
        "positional_encodings[n] for [:n], one position added to every token."),
    "read_at_the_last_position": Bug("clip.TextEncoder.forward", "x[rows, at_end] @ self.proj",
        "x[:, -1] @ self.proj", "the padding", "Many a port of CLIP: the caption is read at the "
        "last position, which is padding."),
    "truncated_without_end": Bug("clip.Tokenizer.__call__", "[*ids[:context_length - 1], self.end]",
        "ids[:context_length]", "between start and end", "open_clip #130 (fixed): a caption that "
        "was cut had no end token, where its embedding is read."),
    "padding_found_by_its_zeros": Bug("clip.token_mask", "return ends.cumsum(1) - ends == 0",
        "return tokens != 0", "not by its zeros", "tokens != 0: but 0 is also the token \"!\" in "
        "CLIP's vocabulary."),
    "joined_from_the_left": Bug("clip.Tokenizer.bpe",
        "min(zip(pieces, pieces[1:]), key=lambda pair: self.rank.get(pair, math.inf))",
        "next((pair for pair in zip(pieces, pieces[1:]) if pair in self.rank), (\"\", \"\"))",
        "lowest rank first", "Hugging Face's course #608: its example joins (h, u) before (u, "
        "g), which was learned first."),
    "scale_without_exp": Bug("clip.CLIP.scale", "self.logit_scale.exp().clamp(max=100)",
        "self.logit_scale.clamp(max=100)", "exp", "M3D #52 and #64, Hugging Face's "
        "api-inference-community PR 349: the logit scale is used without its exp."),
    "scale_without_a_limit": Bug("clip.CLIP.scale", ".clamp(max=100)", "", "never exceeds 100",
        "openai/CLIP PR 530: nothing limits the scale in fine-tuning, and the loss becomes NaN."),
    "scale_starts_at_1": Bug("clip.CLIP.__init__", "torch.tensor(math.log(1 / 0.07))",
        "torch.tensor(1.0)", "log(1 / 0.07)", "transformers #13430 (fixed): the logit scale "
        "starts at 1, not at log(1 / 0.07)."),
    "one_direction": Bug("clip.clip_loss",
        "return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2",
        "return F.cross_entropy(logits, answer)", "both directions", "Half of CLIP's loss: "
        "images choose captions, captions choose nothing."),
    "twins_are_wrong_answers": Bug("clip.clip_loss",
        "(caption_ids[:, None] == caption_ids[None, :])",
        "torch.eye(len(logits), device=logits.device)", "equal captions", "The diagonal is the "
        "answer also where a batch holds one caption twice: half of the pairs are punished for "
        "being right."),
    "mask_reaches_no_token": Bug("clip.Text.drop", "mask=self.mask & keep[:, None], ", "",
        "mask is all False", "DALLE2-pytorch #235 (fixed): the caption's mask reached no token, "
        "so dropped captions were read all the same."),

    # prior.py
    "scaled_in_place": Bug("prior.DiffusionPrior.scale", "unit(z) * self.norm",
        "z.div_(z.norm(dim=-1, keepdim=True)).mul_(self.norm)", "changes an argument",
        "DALLE2-pytorch: `image_embed *= scale` alters the caller's embeddings; their norm was "
        "1, 8, 64, 512 in four calls."),
    "seventeen_for_any_width": Bug("prior.DiffusionPrior.__init__",
        "17.2 * math.sqrt(c.embed_dim / 1024)", "17.2", "17.2 sqrt(D / 1024)", "17.2 read as the "
        "factor for any width: it belongs to 1024 dimensions."),
    "raw_ids": Bug("prior.DiffusionPrior.prefix", "self.tok(text.tokens)",
        "text.tokens[:, :, None].float().expand(-1, -1, self.config.width) / 100",
        "words by tok", "mbn312/dalle2: raw token ids enter the prior as a vector of "
        "floats."),
    "padding_is_a_word": Bug("prior.DiffusionPrior.prefix",
        "torch.where(text.mask[:, :, None], self.tok(text.tokens), self.pad)",
        "self.tok(text.tokens)", "padded places", "DALLE2-pytorch #38 (fixed): what stands for "
        "\"no caption\" was not one thing."),
    "x_t_left_out": Bug("prior.DiffusionPrior.forward", "self.image_in(x_t.to(dtype))",
        "torch.zeros_like(time)", "x_t should matter", "DALLE2-pytorch #71 (fixed): the noised "
        "embedding was not among the prior's tokens."),
    "t_never_used": Bug("prior.DiffusionPrior.forward", "clip.sinusoid(t - 1,",
        "clip.sinusoid(0 * t,", "time should matter", "minDiffusion's superminddpm.py: the "
        "network is given t and never uses it."),
    "times_counted_from_1": Bug("prior.DiffusionPrior.forward", "clip.sinusoid(t - 1,",
        "clip.sinusoid(t,", "count from 0", "Published networks count timesteps from 0: one off, "
        "and hardly visible."),
    "time_path_is_linear": Bug("prior.DiffusionPrior.__init__", "nn.SiLU()", "nn.Identity()",
        "no activation between", "labml #165 (fixed): two linear layers in a row on the time "
        "path and no activation between them."),
    "no_caption_no_x_t": Bug("prior.DiffusionPrior.forward", "self.image_in(x_t.to(dtype))",
        "self.image_in((x_t * text.mask.any(1, keepdim=True)).to(dtype))", "x_t should matter",
        "DALLE2-pytorch today: the unconditional branch blanks x_t as well, so guidance compares "
        "with a prior that sees nothing."),
    "captions_never_dropped": Bug("prior.DiffusionPrior.loss", "text = text.drop(keep)", "pass",
        "0.0% dropped", "open-diffusion #6, Sana #188: no caption is dropped in training, and "
        "guidance is used all the same."),
    "nine_of_ten_dropped": Bug("prior.DiffusionPrior.loss", ">= self.drop_rate", "< self.drop_rate",
        "% dropped", "A comparison turned round: 90 % of the captions are dropped. GLIGEN #60 "
        "drops 50 % where its paper has 10 %."),
    "one_pass": Bug("prior.DiffusionPrior.sample",
        "diffusion.spaced_timesteps(self.config.T, steps),", "[self.config.T],", "one pass",
        "mbn312/dalle2: the \"diffusion\" prior is one forward pass from noise, the mean of all "
        "that could be."),
    "captions_change_places": Bug("prior.DiffusionPrior.sample",
        "x.repeat_interleave(candidates, dim=0)", "x.repeat(candidates, *[1] * (x.ndim - 1))",
        "row 0", "repeat for repeat_interleave: candidates are drawn for one caption and "
        "compared with another."),
    "answer_in_sight": Bug("prior.ARPrior.forward", ".tril(L)[None, None]",
        ".tril(L + 1)[None, None]", "only the codes before it", "Off by one: code k "
        "is predicted where code k is known. The loss falls to 0 and samples are noise (minGPT "
        "#75 found another way there)."),
    "position_of_another_code": Bug("prior.ARPrior.forward", "self.pos[n + 1]", "self.pos[n]",
        "by the cache", "tiny-llm PR 46 (fixed), rotary-embedding-torch #11 (fixed): positions "
        "are off as soon as a KV cache is used."),
    "any_image_will_do": Bug("prior.ARPrior.sample",
        "torch.randint, c.buckets // 2", "torch.randint, 0", "codes 4..7 equally", "The dot code "
        "from all buckets, where the paper takes the top half (sec. 2.2)."),
    "buckets_of_equal_width": Bug("prior.quantile_edges",
        "return y.sort(0).values[first].T.contiguous()",
        "return torch.stack([torch.linspace(float(c.min()), float(c.max()), buckets + "
        "1)[1:-1] for c in y.T])", "in each bucket", "Buckets of equal width: most codes are "
        "hardly ever used."),
    "ascending_order": Bug("prior.principal_components", "power.flip(0), basis.flip(1)",
        "power.flip(0), basis", "most important first", "eigh lists eigenvalues in ascending "
        "order: the least important directions are kept."),

    # decoder.py
    "rows_mix": Bug("decoder.Decoder.condition", "self.image_tokens(z_i).unflatten(1, (4, -1))",
        "self.image_tokens(z_i).reshape(4, len(z_i), -1).transpose(0, 1)",
        "rows of a batch are independent", "DALLE2-pytorch: where two widths are equal a "
        "projection becomes the identity and a reshape mixes the rows of a batch."),
    "pooled_at_the_start": Bug("decoder.Decoder.condition", "states[:, -1]", "states[:, 0]", "last",
        "GLIDE pools at the last position; the first is another vector."),
    "dropped_together": Bug("decoder.Decoder.loss", "text.drop(keep_text)",
        "text.drop(keep_z[:, 0])", "dropped:", "DALLE2-pytorch #38 (fixed): one rate for image "
        "embedding and caption, where the paper has 10 % and 50 %."),
    "unconditional_has_the_caption": Bug("decoder.Decoder.denoiser", "text.after(self.null(text))",
        "text.after(text)", "null condition", "The unconditional half is given the caption: "
        "guidance towards what both have."),
    "not_clamped_first": Bug("decoder.enlarge", ".clamp(-1, 1)", "", "clamped first",
        "imagen-pytorch #160 (fixed): sampling and training treated the small image differently."),
    "nearest_neighbour": Bug("decoder.enlarge", "mode=\"bicubic\", antialias=True",
        "mode=\"nearest\"", "antialias", "DALLE2-pytorch #32 (fixed) and its nearest-neighbour "
        "resize: stairs that the upsampler never saw in training."),
    "pixels_dropped": Bug("decoder.shrink", "F.avg_pool2d(x, H // size)",
        "x[:, :, ::H // size, ::H // size]", "mean of every block", "Every k-th pixel, not their "
        "mean: the aliasing that clean-fid (Parmar et al. 2022) found in most resizers."),
    "dark_edges": Bug("decoder.filter2d", "mode=\"reflect\"", "mode=\"constant\"", "edges go dark",
        "Zeros beyond the edges: every blurred image gets a dark rim."),
    "std_taken_for_variance": Bug("decoder.gaussian_blur", "(2 * sigma ** 2)", "(2 * sigma)",
        "sigma is a std", "A std where a variance is asked for: 0.6 blurs more than it should."),
    "two_windows": Bug("decoder.crop_pair", "zip(images, top, left)",
        "zip(images, top if n > 1 else top[::-1], left)", "the same in both", "diffusers PR "
        "1529, realfill #4 (fixed): image and mask were cropped at two places; the network "
        "learns to ignore one."),
    "one_coin_for_all": Bug("decoder.Upsampler.prepare", "torch.rand(len(low)) < 0.5",
        "torch.rand(1).expand(len(low)) < 0.5", "of the crops are sharp", "DALLE2-pytorch: one "
        "random blur for a whole batch, not for each image."),
    "crops_of_other_images": Bug("decoder.Upsampler.prepare", "low.repeat_interleave(crops, dim=0)",
        "low.repeat(crops, 1, 1, 1)", "crops of another image", "repeat for repeat_interleave: "
        "the small image belongs to another one."),
    "heads_for_head_channels": Bug("decoder.Attention.__init__", "channels // config.head_channels",
        "config.head_channels", "sqrt(head_channels)", "diffusers #2011: attention_head_dim was "
        "the number of heads; published configs keep the misnomer."),
    "attention_starts_loud": Bug("decoder.Attention.__init__",
        "zero(nn.Linear(channels, channels))", "nn.Linear(channels, channels)", "start at zero",
        "diffusers #639 (fixed): proj_out did not start at zero, as the original does."),
    "block_starts_loud": Bug("decoder.ResBlock.__init__",
        "zero(nn.Conv2d(c_out, c_out, 3, padding=1))", "nn.Conv2d(c_out, c_out, 3, padding=1)",
        "zero conv2", "Palette #71: the zeroed layers are initialised anew afterwards."),
    "dropout_while_sampling": Bug("decoder.ResBlock.forward", "self.config.dropout, self.training",
        "self.config.dropout, True", "dropout while sampling", "nanoGPT PR 240, "
        "facebookresearch/DME #3 (fixed): F.dropout without its `training` drops at "
        "evaluation, too."),
    "no_dropout": Bug("decoder.ResBlock.forward", "self.config.dropout, self.training",
        "0.0, self.training", "no dropout while training", "An option without effect: the "
        "paper's 0.1 never comes."),
    "scale_without_one": Bug("decoder.ResBlock.forward", "(1 + scale)", "scale", "(1 + scale)",
        "AdaGN without the 1: a fresh block multiplies by about 0, and deep networks do not "
        "start."),
    "skips_before": Bug("decoder.UNet.forward", "torch.cat([h, skips.pop()], dim=1)",
        "torch.cat([skips.pop(), h], dim=1)", "behind h", "The other order of the concatenation: "
        "published weights load, and draw noise."),
    "context_ignored": Bug("decoder.Attention.forward", "k = torch.cat([context_k, k], dim=1)",
        "k = torch.cat([0 * context_k, k], dim=1)", "context's k and v", "All tokens of the "
        "context have one key: each is attended to alike."),
    "ddim_from_T": Bug("decoder.Decoder.ddim_timesteps",
        "self.config.T - max(1, 3 * self.config.T // 1000)", "self.config.T",
        "inversion and its way back", "Inversion up to T, where eps says nothing about x0 and "
        "its error is multiplied by 20,000."),

    # unclip.py
    "straight_line": Bug("unclip.slerp",
        "return torch.where(straight, (1 - fraction) * a + fraction * b, arc)",
        "return (1 - fraction) * a + fraction * b", "not a straight line", "Interpolating "
        "embeddings in a straight line: half-way they are too short, and the decoder has never "
        "seen such."),
    "towards_the_caption": Bug("unclip.UnCLIP.text_diff", "clip.unit(z_t - z_t0)", "z_t",
        "towards the target", "Turning towards the new caption, not the difference: the edit "
        "draws the caption and forgets the image."),
    "eta_is_ignored": Bug("unclip.UnCLIP.variations", "expand(n, -1, -1, -1), eta=eta",
        "expand(n, -1, -1, -1), eta=0.0", "eta without effect", "An option without effect: all "
        "variations are one image."),
    "captions_interleaved": Bug("unclip.UnCLIP.sample",
        "[caption for caption in captions for _ in range(n)]",
        "[caption for _ in range(n) for caption in captions]", "the rows of a generator",
        "Candidates of one caption are ranked by another."),
    "the_worst_one": Bug("unclip.UnCLIP.rerank", "argmax(1)", "argmin(1)", "the nearest, and",
        "The least fitting image is kept."),
    "rounded_down": Bug("unclip.to_pil", ".round().byte()", ".byte()", "do not truncate", "NegPy "
        "PR 897 (fixed): pixels are cut off, not rounded; every image is half a level too dark."),
    "pixels_wrap_around": Bug("unclip.to_pil", "x.clamp(-1, 1)", "x", "clamp to [-1, 1]",
        "torchvision PR 121 (fixed): without a clamp 256 becomes 0, specks of noise in the "
        "brightest places."),
    "half_for_everything": Bug("unclip.UnCLIP.save",
        "dtype if dtype and key in learnt else w.dtype", "dtype or w.dtype", "diffusion_prior cov",
        "Buffers saved in half: edges of codes and variances lose seven of ten digits."),
    "hole_and_rest_swapped": Bug("unclip.UnCLIP.inpaint", "mode=\"area\") == 0",
        "mode=\"area\") != 0", "the mask's white", "The hole is kept and the rest drawn anew."),
    "known_pixels_redrawn": Bug("unclip.UnCLIP.inpaint", "return torch.where(known, image, x)",
        "return x", "keeps the known pixels", "The upsamplers redraw what should stay: seams and "
        "drifting colours."),
    "edit_backwards": Bug("unclip.UnCLIP.text_diff", "clip.unit(z_t - z_t0)",
        "clip.unit(z_t0 - z_t)", "towards the target", "The edit leads away from "
        "what was asked for."),

    # train_toy.py
    "no_optimiser": Bug("train_toy.train", "optimizer.step()", "pass", "is an optimiser called",
        "minidalle2: loss.backward() in three training scripts, and no optimiser in the "
        "repository."),
    "gradients_pile_up": Bug("train_toy.train", "part.zero_grad()", "pass", "pile up",
        "facebookresearch/nwm #16 (fixed): zero_grad was missing in the bfloat16 branch; "
        "gradients piled up in silence."),
    "no_warm_up": Bug("train_toy.train", "min((step + 1) / (1 + recipe.warmup), fall)", "fall",
        "no warm-up", "unsloth PR 8593 (fixed): six presets recommended a warm-up that no "
        "scheduler made."),
    "average_backwards": Bug("train_toy.train", "1 - decay)", "decay)", "d average + (1 - d) w",
        "levanter PR 883 (fixed): beta backwards, the average is last step's weights."),
    "average_forgets": Bug("train_toy.train", "decay = min(recipe.ema, (1 + step) / (10 + step))",
        "decay = 1 - min(recipe.ema, (1 + step) / (10 + step))", "d average + (1 - d) w",
        "diffusers #1864 (fixed): decay was overwritten by 1 - decay each step and settled at "
        "0.5."),
    "dropout_after_training": Bug("train_toy.train", "part.eval()", "pass",
        "dropout after training", "ethos-ares #20: no eval() in the repository, and the paper's "
        "numbers were measured with dropout."),
    "no_dropout_in_training": Bug("train_toy.train", "part.train()", "pass",
        "no dropout in training", "A module that was evaluated before stays in eval mode: no "
        "dropout, no error."),
    "steps_not_counted": Bug("train_toy.train",
        "batch_loss(step / recipe.steps)\n        loss.backward()",
        "batch_loss(0.0)\n        loss.backward()", "a loss that is not finite", "A schedule "
        "that is always at its beginning."),
    "the_same_batch_always": Bug("train_toy.train", "seed * 1_000_003 + step", "seed * 1_000_003",
        "the same batch", "pytorch #5059: for years every worker and every epoch drew the same "
        "numbers; thousands of repositories had it."),
    "decay_for_gains": Bug("train_toy.make_optimizers", ", \"weight_decay\": 0.0}", "}",
        "only matrices decay", "lit-llama #254: weight decay on norms and biases, which nanoGPT "
        "spares."),
    "momentum_forgotten": Bug("train_toy.Muon.step",
        "w.grad.lerp(average, group[\"momentum\"])", "w.grad", "muon steps",
        "optax PR 1170 (fixed): its Muon orthogonalised the gradient, not the momentum."),
    "a_norm_for_each_tensor": Bug("train_toy.worst_nearby", "alpha=float(rho / norm)",
        "alpha=float(rho / (g.norm() + 1e-12))", "over all the parameters", "The norm of SAM "
        "taken for each tensor on its own: other papers' method, and a far larger step."),
    "captions_of_other_rows": Bug("train_toy.losses_of",
        "part.config.unet.size), data.text(rows)",
        "part.config.unet.size), data.text(rows.flip(0))", "captions of other rows",
        "cloneofsimo/lora #197: images sorted, captions not. diffusers #14430: cached latents "
        "meet the captions of another order."),
    "embeddings_of_other_rows": Bug("train_toy.losses_of",
        "part.loss(data.z_i[rows], data.text(rows))",
        "part.loss(data.z_i[rows.flip(0)], data.text(rows))", "captions of other rows",
        "diffusers #14430: cached by position, read in another order."),
    "pushed_at_the_end": Bug("train_toy.losses_of", "progress < 2 / 3", "progress > 2 / 3",
        "uniformity loss", "A term of the loss in the wrong third of the training."),
    "hard_negatives_apart": Bug("train_toy.Data.groups",
        "first[:, None] + torch.arange(self.group)",
        "first[:, None] + 0 * torch.arange(self.group)", "groups are whole", "One row four times "
        "for four hard negatives."),
    "peak_of_1": Bug("train_toy.psnr", "(4 / ", "(1 / ", "peak 1 gives 14 dB", "PSNR of images "
        "in [-1, 1] with a peak of 1: 6 dB too low."),
    "half_a_pixel": Bug("train_toy.coverage", "(torch.arange(size) + 0.5) / size",
        "torch.arange(size) / size", "off by", "Pixel corners for pixel centres: everything half "
        "a pixel off, and differently at each size."),
    "y_upwards": Bug("train_toy.relation_of", "\"below\" if down < 0 else \"above\"",
        "\"above\" if down < 0 else \"below\"", "was read as", "Rows of an image run downwards."),
    "tilted_the_other_way": Bug("train_toy.coverage",
        "(cos * dx)[:, None, :] + (sin * dy)[:, :, None]",
        "(cos * dx)[:, None, :] - (sin * dy)[:, :, None]", "tilted the wrong way", "One sign of "
        "a rotation matrix: a shear."),
}


if __name__ == "__main__":
    main()
