"""Coursework out of our own source: stubs to hand out, for `pytest --impl` to grade.

    python tests/coursework.py --list                              every exercise
    python tests/coursework.py diffusion.q_posterior > mine.py     a stub: fill it in
    python tests/coursework.py --week 2 > mine.py                  a week of a five-week course
    pytest --impl mine.py                                          what is right, and first hints

A stub is our own text, cut after the docstring, so it can never be out of step. What comes back is
put in our functions' place everywhere (`swapped`) and our own tests run on it (grading.py).
"""
import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHAPTERS = ("diffusion", "clip", "prior", "decoder", "unclip", "train_toy")
TOUCHES = Path(__file__).with_name("touches.json")     # {test: exercises it calls}, see grading.py

# exercise: where a paper says it; how hard it is: 1 a line or two, 2 some thought, 3 an evening
EXERCISES = {
    "diffusion.cosine_alphabar": ("IDDPM eq. 17", 1),
    "diffusion.linear_alphabar": ("DDPM sec. 4", 1),
    "diffusion.spaced_timesteps": ("IDDPM sec. 4", 1),
    "diffusion.section_timesteps": ("GLIDE app. B.2", 2),
    "diffusion.ddim_timesteps": ("ADM's code", 1),
    "diffusion.steps": ("DDPM alg. 2", 1),
    "diffusion.sinusoid": ("ADM's code", 2),
    "diffusion.like": ("-", 1),
    "diffusion.q_sample": ("DDPM eq. 4", 1),
    "diffusion.predict_x0": ("DDPM eq. 15", 1),
    "diffusion.predict_eps": ("DDPM eq. 15", 1),
    "diffusion.eps_from_velocity": ("Salimans & Ho 2022, app. D", 1),
    "diffusion.q_posterior": ("DDPM eq. 6-7", 2),
    "diffusion.log_var_bounds": ("IDDPM sec. 3.1", 2),
    "diffusion.learned_range_log_var": ("IDDPM eq. 15", 1),
    "diffusion.analytic_var": ("Analytic-DPM", 2),
    "diffusion.measure_cov": ("Analytic-DPM", 2),
    "diffusion.discretized_log_likelihood": ("DDPM eq. 13", 2),
    "diffusion.random_times": ("DDPM alg. 1; VDM app. I.1", 1),
    "diffusion.middle_times": ("SD3 sec. 3.1", 1),
    "diffusion.simple_loss": ("DDPM eq. 14", 1),
    "diffusion.vlb_loss": ("IDDPM eq. 5, 6", 3),
    "diffusion.hybrid_loss": ("IDDPM eq. 16", 2),
    "diffusion.guide": ("GLIDE sec. 2.3", 1),
    "diffusion.guide_eps": ("GLIDE sec. 2.3", 1),
    "diffusion.ddim_step": ("DDIM eq. 12, 16", 2),
    "diffusion.ddim_invert_step": ("ADM app. F", 1),
    "diffusion.sample": ("DDPM alg. 2", 3),
    "diffusion.invert": ("ADM app. F", 2),
    "diffusion.slerp": ("unCLIP sec. 3.2", 2),
    "diffusion.mixture_x0": ("Bayes' rule", 2),
    "clip.split_words": ("CLIP sec. 2.4", 2),
    "clip.merge_pair": ("CLIP sec. 2.4", 1),
    "clip.Tokenizer.train": ("CLIP sec. 2.4", 3),
    "clip.Tokenizer.bpe": ("CLIP sec. 2.4", 2),
    "clip.token_mask": ("CLIP sec. 2.4", 1),
    "clip.unit": ("CLIP fig. 3", 1),
    "clip.attend": ("CLIP sec. 2.4", 2),
    "clip.Cache": ("-", 2),
    "clip.Block": ("CLIP sec. 2.4", 2),
    "clip.CaptionEncoder": ("GLIDE sec. 4.1", 2),
    "clip.ImageEncoder": ("CLIP sec. 2.4", 2),
    "clip.TextEncoder": ("CLIP sec. 2.4", 2),
    "clip.CLIP.scale": ("CLIP sec. 2.5", 1),
    "clip.Text.drop": ("unCLIP sec. 2.1, 2.2", 1),
    "clip.clip_loss": ("CLIP fig. 3", 2),
    "clip.apart": ("Wang & Isola 2020", 1),
    "clip.sam_backward": ("unCLIP app. C", 3),
    "clip.zero_shot": ("CLIP sec. 3.1", 1),
    "prior.DiffusionPrior.scale": ("unCLIP app. C", 1),
    "prior.DiffusionPrior.unscale": ("unCLIP app. C", 1),
    "prior.DiffusionPrior.prefix": ("unCLIP sec. 2.2", 2),
    "prior.DiffusionPrior.suffix": ("unCLIP sec. 2.2", 1),
    "prior.DiffusionPrior.visible": ("unCLIP sec. 2.2", 2),
    "prior.DiffusionPrior.forward": ("unCLIP sec. 2.2", 2),
    "prior.DiffusionPrior.loss": ("unCLIP sec. 2.2", 2),
    "prior.DiffusionPrior.sample": ("unCLIP sec. 2.2", 3),
    "prior.principal_components": ("unCLIP sec. 2.2", 2),
    "prior.quantile_edges": ("unCLIP sec. 2.2", 1),
    "prior.ARPrior.fit": ("unCLIP sec. 2.2", 3),
    "prior.ARPrior.encode": ("unCLIP sec. 2.2", 2),
    "prior.ARPrior.decode": ("unCLIP sec. 2.2", 1),
    "prior.ARPrior.dot_code": ("unCLIP sec. 2.2", 1),
    "prior.ARPrior.forward": ("unCLIP sec. 2.2", 2),
    "prior.ARPrior.loss": ("unCLIP sec. 2.2", 2),
    "decoder.ResBlock": ("ADM sec. 3", 2),
    "decoder.Attention": ("GLIDE sec. 4.1", 2),
    "decoder.UNet.forward": ("ADM sec. 3", 3),
    "decoder.to_eps": ("Salimans & Ho 2022, app. D", 1),
    "decoder.Decoder.condition": ("unCLIP sec. 2.1", 2),
    "decoder.Decoder.loss": ("unCLIP sec. 2.1", 2),
    "decoder.Decoder.denoiser": ("unCLIP sec. 2.1", 3),
    "decoder.shrink": ("unCLIP sec. 2.1", 1),
    "decoder.enlarge": ("unCLIP sec. 2.1", 1),
    "decoder.crop_pair": ("unCLIP app. C", 2),
    "decoder.filter2d": ("unCLIP app. C", 2),
    "decoder.gaussian_blur": ("unCLIP app. C", 1),
    "decoder.Upsampler.prepare": ("unCLIP sec. 2.1", 2),
    "unclip.UnCLIP.rerank": ("DALL-E sec. 2.6", 2),
    "unclip.UnCLIP.variations": ("unCLIP sec. 3.1", 1),
    "unclip.UnCLIP.interpolate": ("unCLIP sec. 3.2", 2),
    "unclip.UnCLIP.difference": ("unCLIP sec. 3.3", 1),
    "unclip.UnCLIP.text_diff": ("unCLIP sec. 3.3", 2),
    "train_toy.distance": ("-", 2),
    "train_toy.coverage": ("-", 3),
}

WEEKS = (                                    # five weeks, about an evening each
    ("noise, and what Bayes says about it", "diffusion.cosine_alphabar", "diffusion.q_sample",
     "diffusion.predict_x0", "diffusion.q_posterior", "diffusion.simple_loss",
     "diffusion.hybrid_loss"),
    ("samplers and guidance", "diffusion.spaced_timesteps", "diffusion.ddim_step",
     "diffusion.ddim_invert_step", "diffusion.guide", "diffusion.sample", "diffusion.slerp"),
    ("CLIP", "clip.Tokenizer.bpe", "clip.attend", "clip.Block", "clip.TextEncoder",
     "clip.clip_loss", "clip.zero_shot"),
    ("the two priors", "prior.DiffusionPrior.scale", "prior.DiffusionPrior.loss",
     "prior.principal_components", "prior.ARPrior.encode", "prior.ARPrior.decode",
     "prior.ARPrior.loss"),
    ("the decoder, and what unCLIP can do", "decoder.Attention", "decoder.ResBlock",
     "decoder.Decoder.loss", "decoder.crop_pair", "unclip.UnCLIP.interpolate",
     "unclip.UnCLIP.text_diff"),
)


# ---------------------------------------------------------------- our source


def chapter(name):
    """"clip.Block" -> the module clip."""
    return importlib.import_module(name.split(".")[0])


def home(name):
    """"clip.unit" -> (the module clip, "unit"); "clip.Block.forward" -> (clip.Block, "forward")."""
    owner, *path = chapter(name), *name.split(".")[1:]
    for part in path[:-1]:
        owner = getattr(owner, part)
    return owner, path[-1]


@functools.cache
def parsed(path):
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def source(name):
    """A name -> its chapter's lines, the syntax tree of the chapter, and of the name itself.

    ValueError, in a sentence, for what is no function, method or class of a chapter.
    """
    first, *path = name.split(".")
    if first in CHAPTERS and path:
        lines, whole = parsed(ROOT / f"{first}.py")
        node = whole
        for part in path:
            node = next((child for child in getattr(node, "body", ())
                         if getattr(child, "name", None) == part), None)
        if node is not None:
            return lines, whole, node
    raise ValueError(f"expected the name of one of our functions, such as diffusion.q_posterior or "
                     f"clip.Block, got {name!r}; see --list")


def functions(name):
    """The functions that an exercise stands for: itself, or a class's methods but __init__."""
    _, _, node = source(name)
    if not isinstance(node, ast.ClassDef):
        return [name]
    return [f"{name}.{child.name}" for child in node.body
            if isinstance(child, ast.FunctionDef) and child.name != "__init__"]


# ---------------------------------------------------------------- stubs

TURN = 'raise NotImplementedError("your turn")'


def head(lines, node):
    """A function's lines down to the end of its docstring, or of its signature."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    last = (node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1)
    return lines[first - 1:last]


def answer(name):
    """The body that a stub leaves out, for tests and for whoever grades: our own, as a student
    would write it, with the chapter's name before what the chapter itself defines."""
    _, whole, node = source(name)
    ours, mine = vars(chapter(name)), {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                                       and not isinstance(n.ctx, ast.Load)}
    mine |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    imported = {(a.asname or a.name).split(".")[0] for n in whole.body
                if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}

    class Qualify(ast.NodeTransformer):
        def visit_Name(self, n):
            if n.id not in ours or n.id in mine or n.id in imported or n.id.startswith("__"):
                return n
            return ast.Attribute(ast.Name(name.split(".")[0], ast.Load()), n.id, n.ctx)

    body = node.body[1:] if ast.get_docstring(node) else node.body
    indent = " " * (node.col_offset + 4)
    text = "\n".join(ast.unparse(Qualify().visit(statement)) for statement in body)
    return [indent + line for line in text.splitlines()]


def imports(names):
    """The import lines that these exercises need, and their chapters."""
    needed, lines = {"torch"}, {f"import {name.split('.')[0]}" for name in names}
    for name in names:
        _, whole, node = source(name)
        needed |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    for name in names:
        for n in source(name)[1].body:
            if isinstance(n, (ast.Import, ast.ImportFrom)):
                lines |= {ast.unparse(type(n)(**vars(n) | {"names": [a]})) for a in n.names
                          if (a.asname or a.name) in needed}
    return sorted(line for line in lines if line != "from clip import unit") + [""]


def stubs(names, solve=False):
    """The text of mine.py: every exercise cut after its docstring, the methods of a class together.

    solve: with our own bodies instead of "your turn".
    """
    names, text, open_class = list(dict.fromkeys(names)), [], None
    tests = graded_by()
    for name in sorted(names, key=lambda n: n.rsplit(".", 1)[0] if n.count(".") > 1 else ""):
        lines, whole, node = source(name)
        where, level = EXERCISES.get(name, ("-", 0))
        about = (f"# {name}: {where}" + f", difficulty {level} of 3" * bool(level)
                 + (f", graded by {len(tests[name])} test" + "s" * (len(tests[name]) > 1)
                    if name in tests else ", no test of its own"))
        parts = functions(name)
        if isinstance(node, ast.ClassDef) or name.count(".") > 1:
            kind = source(".".join(parts[0].split(".")[:2]))[2]
            if open_class != kind.name:
                text += ["", "", f"class {kind.name}:             # only the methods written "
                         "here are taken, all the rest stays ours"]
                if ast.get_docstring(kind):
                    text += lines[kind.body[0].lineno - 1:kind.body[0].end_lineno]
                given = [n for n in kind.body if getattr(n, "name", "") == "__init__"]
                text += ["", f"    # As it stands in {name.split('.')[0]}.py:"] * bool(given)
                for n in given:
                    text += ["    # " + line[4:] for line in lines[n.lineno - 1:n.end_lineno]]
            open_class = kind.name
            text += ["", "    " + about]
        else:
            open_class = None
            text += ["", "", about]
        for i, part in enumerate(parts):
            _, _, f = source(part)
            text += [""] * (i > 0) + head(lines, f)
            text += answer(part) if solve else [" " * (f.col_offset + 4) + TURN]
    return "\n".join(["# Write the bodies, then: pytest --impl THIS_FILE. Helpers of your own are "
                      "welcome.", "# Only the functions in the file are graded: a file with one of "
                      "them takes seconds.", *imports(names), *text[1:], ""])


# ---------------------------------------------------------------- swapping


def load(path):
    """A student's file -> {"diffusion.q_posterior": function, "clip.Block.forward": function, ...}.

    A name at the top of the file is ours if a chapter has it; other names are the student's own.
    ValueError, in a sentence, for a file that cannot be run or holds none of ours.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}; write one with tests/coursework.py")
    if path.suffix != ".py":
        raise ValueError(f"expected a Python file, NAME.py, got {path.name}")
    spec = importlib.util.spec_from_file_location("the_students_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = getattr(error, "lineno", None) or next(
            (f.tb_lineno for f in traceback(error) if f.tb_frame.f_code.co_filename == str(path)),
            "?")
        raise ValueError(f"{path.name} cannot be run, see line {line}: {type(error).__name__}: "
                         f"{error}") from None
    found = {}
    for key, value in vars(module).items():
        if getattr(value, "__module__", "") != "the_students_file":
            continue
        ours = [f"{c}.{key}" for c in CHAPTERS
                if getattr(vars(importlib.import_module(c)).get(key), "__module__", "") == c]
        ours = [name for name in ours if any(e.startswith(name) for e in EXERCISES)] or ours
        if ours and isinstance(value, type):
            for method, f in vars(value).items():
                if hasattr(f, "__get__") and method in vars(getattr(chapter(ours[0]), key)):
                    if isinstance(f, (types.FunctionType, classmethod, staticmethod)):
                        found[f"{ours[0]}.{method}"] = f
        elif ours and callable(value):
            found[ours[0]] = value
    if not found:
        raise ValueError(f"{path.name} defines none of our functions; begin with a stub of "
                         "tests/coursework.py")
    return found


def traceback(error):
    """The entries of an exception's traceback, innermost first."""
    entries, tb = [], error.__traceback__
    while tb is not None:
        entries.insert(0, tb)
        tb = tb.tb_next
    return entries


def holders():
    """Every dict that may hold one of our functions: the chapters, and tables such as SCHEDULES."""
    for name in CHAPTERS:
        names = vars(importlib.import_module(name))
        yield names
        for value in list(names.values()):
            if isinstance(value, dict) and value is not names.get("__builtins__"):
                yield value


@contextlib.contextmanager
def swapped(impl):
    """With {name: function} in our functions' place, wherever these are held; then ours again."""
    undo = []
    try:
        for name, new in impl.items():
            owner, attribute = home(name)
            old = vars(owner)[attribute]
            if isinstance(owner, type):
                for cell in getattr(getattr(new, "__wrapped__", new), "__closure__", None) or ():
                    if isinstance(cell.cell_contents, type):       # so that super() finds our class
                        cell.cell_contents = owner
                undo.append((setattr, owner, attribute, old))
                setattr(owner, attribute, new)
                continue
            for holder in holders():
                for key in [key for key, value in holder.items() if value is old]:
                    undo.append((dict.__setitem__, holder, key, old))
                    holder[key] = new
        yield
    finally:
        for put, *what in reversed(undo):
            put(*what)


# ---------------------------------------------------------------- which tests grade what


def touches():
    """{test: names of the functions it calls}, as `pytest --touches` wrote it."""
    return json.loads(TOUCHES.read_text()) if TOUCHES.exists() else {}


WIDE = 22                                    # tests that call more exercises run the whole stack


def graded_by(wide=False):
    """{exercise: the tests that grade it}: those that call it, the most specific ones first.

    Those that sample the whole stack are left out where there are others, unless `wide`: they say
    little of one function, and take long.
    """
    known, tests = touches(), {}
    for name in EXERCISES:
        found = [test for part in functions(name) for test in known if part in known[test]]
        narrow = [test for test in found if wide or len(known[test]) <= WIDE]
        tests[name] = sorted({*narrow} or {*found}, key=lambda test: (len(known[test]), test))
    return tests


def callers(name):
    """The exercises that call a function which is none, directly or by way of such others; of a
    method also those of its class."""
    owner = name.rsplit(".", 1)[0]
    found = [e for e in EXERCISES if e.startswith(f"{owner}.") and "." in owner]
    todo, others = [owner if name.endswith(".__init__") else name], [
        f"{c}.{n.name}" for c in CHAPTERS for n in parsed(ROOT / f"{c}.py")[1].body
        if isinstance(n, ast.FunctionDef) and f"{c}.{n.name}" not in EXERCISES]
    for wanted in todo:                                            # which grows
        found += [e for e in EXERCISES if e not in found and calls(e, wanted)]
        todo += [other for other in others if other not in todo and calls(other, wanted)]
    return found


def calls(name, wanted):
    """Does one function speak of another: by its name, its chapter and name, or as a method?"""
    first, *path, word = wanted.split(".")
    return any(isinstance(n, ast.Attribute) and n.attr == word
               and (bool(path) or getattr(n.value, "id", "") == first)
               or isinstance(n, ast.Name) and n.id == word and not path
               and name.startswith(f"{first}.") for n in ast.walk(source(name)[2]))


def listing():
    """What --list prints."""
    tests, text, week_of = graded_by(), [], {}
    for number, (_, *names) in enumerate(WEEKS, start=1):
        week_of |= dict.fromkeys(names, f"week {number}")
    for c in CHAPTERS:
        text += ["", f"{c}.py"]
        for name, (where, level) in EXERCISES.items():
            if name.split(".")[0] == c:
                text.append(f"  {name:<38} {where:<28} {'*' * level:<4}{len(tests[name]):>3} tests"
                            f"   {week_of.get(name, '')}".rstrip())
    text += ["", "A course of five weeks: python tests/coursework.py --week N > mine.py"]
    for number, (title, *names) in enumerate(WEEKS, start=1):
        text += [f"  {number}  {title}: {', '.join(n.split('.', 1)[1] for n in names)}"]
    text += ["", f"{len(EXERCISES)} exercises, * to ***: a line or two, some thought, an evening"]
    return "\n".join(text[1:])


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write stubs of our functions, to be filled in "
                                     "and graded by `pytest --impl FILE`.", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as diffusion.q_posterior, "
                        "clip.Block, prior.ARPrior.encode")
    parser.add_argument("--list", action="store_true", help="show every exercise")
    parser.add_argument("--week", type=int, choices=range(1, len(WEEKS) + 1),
                        help="the exercises of this week of a course")
    args = parser.parse_args(arguments)
    names = [*args.names, *(WEEKS[args.week - 1][1:] if args.week else ())]
    try:
        if not names and not args.list:
            raise ValueError("expected the names of exercises, --week N or --list")
        print(listing() if args.list else stubs(names), flush=True)
    except BrokenPipeError:                                # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
