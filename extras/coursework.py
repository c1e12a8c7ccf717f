"""Coursework from our own source: five weeks of exercises, hand-outs, a grader, a marking scheme.

    python extras/coursework.py --list                        every exercise
    python extras/coursework.py --handout FOLDER --week 2     a repository without the answers
    python extras/coursework.py --stubs --week 2 > mine.py    only stubs: write their bodies
    python extras/coursework.py --grade mine.py               points and hints; --json results.json
    python extras/coursework.py --scheme                      the marking scheme

Stubs and hand-outs are cut from the chapters, so they cannot be out of step. The grader reads a
file and refuses what no exercise needs. Then it runs our tests in a copy of the repository without
the body of the graded function: no answer is left that a student's file could call, read or keep.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHAPTERS = ("diffusion", "clip", "prior", "decoder", "unclip", "train_toy")
WHAT_IT_IS_NOT = "a check of understanding, not of honesty; for marks run it in a container"
POINTS = {"*": 5, "**": 10, "***": 20}
LEVELS = "* a line or two, ** some thought, *** an evening"

# of each chapter, "where a paper defines it: function, its difficulty, the week of the course"
EXERCISES = {
    "diffusion": """IDDPM eq. 17: cosine_alphabar*1; DDPM sec. 4: linear_alphabar*; DDPM eq. 4:
        q_sample*1; Salimans & Ho 2022, app. D: target*1; DDPM eq. 15: to_x0*1 to_eps*; DDPM eq.
        6-7: q_posterior**1; DDPM alg. 1, IDDPM eq. 16: loss**1; IDDPM sec. 4: spaced_timesteps*2;
        GLIDE sec. 2.3: guide*2 guided**; DDIM eq. 12, 16: ddim_step**2; ADM app. F:
        ddim_invert_step*2 invert**; DDPM alg. 2: p_sample***2 sample*2; RePaint alg. 1:
        inpaint***; IDDPM sec. 3.1: log_var_bounds**; IDDPM eq. 15: learned_log_var*; IDDPM
        eq. 5, 6: vlb_loss***; DDPM eq. 13: discretized_log_likelihood**; Analytic-DPM eq. 7:
        step_variance**; Analytic-DPM eq. 8: measure_cov**""",
    "clip": """CLIP sec. 2.4: attend**3 Block.forward**3 TextEncoder.forward**3
        ImageEncoder.forward** Tokenizer.bpe**3 Tokenizer.train*** split_words** token_mask*; CLIP
        fig. 3: clip_loss**3 unit*; CLIP sec. 3.1: zero_shot*3; CLIP sec. 2.5: CLIP.scale*; no
        paper: KVCache.append**; GLIDE sec. 4.1: CaptionEncoder.forward**; ADM's code: sinusoid**;
        unCLIP sec. 2.1, 2.2: Text.drop*""",
    "prior": """unCLIP app. C: DiffusionPrior.scale*4 DiffusionPrior.unscale*; unCLIP sec. 2.2:
        DiffusionPrior.forward*** DiffusionPrior.loss**4 DiffusionPrior.sample***
        principal_components**4 quantile_edges* ARPrior.fit_codes*** ARPrior.encode**4
        ARPrior.decode*4 ARPrior.dot_code* ARPrior.loss**4""",
    "decoder": """ADM sec. 3: ResBlock.forward**5 UNet.forward***; GLIDE sec. 4.1:
        Attention.forward**5; unCLIP sec. 2.1: Decoder.condition** Decoder.loss**5
        Upsampler.prepare** shrink* enlarge*; unCLIP app. C: crop_pair**5 filter2d**
        gaussian_blur*""",
    "unclip": """unCLIP sec. 3.2: slerp**2 UnCLIP.interpolate**5; unCLIP sec. 3.3:
        UnCLIP.text_diff**5; unCLIP sec. 3.1: UnCLIP.variations*; DALL-E sec. 2.6:
        UnCLIP.rerank**""",
}
EXERCISES = {f"{chapter}.{name}": (" ".join(row.split(":")[0].split()), level, int(week or 0))
             for chapter, rows in EXERCISES.items() for row in rows.split(";")
             for name, level, week in re.findall(r"([\w.]+)(\*+)(\d?)", row)}
TITLES = ("noise, and what Bayes' rule says about it", "samplers and guidance", "CLIP",
          "the two priors", "the decoder, and what unCLIP can do")        # about an evening each
WEEKS = [(title, *(name for name, (_, _, when) in EXERCISES.items() if when == week))
         for week, title in enumerate(TITLES, start=1)]


def points(name):
    return POINTS[EXERCISES[name][1]]


def chapters_of(names):
    return list(dict.fromkeys(name.split(".")[0] for name in names))


# ---------------------------------------------------------------- our source


@functools.cache
def parsed(chapter):
    """A chapter -> its lines and its syntax tree."""
    text = (ROOT / f"{chapter}.py").read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def find(node, *path):
    """"Block", "forward" -> that function's node in a syntax tree, or None."""
    for step in path:
        node = next((child for child in getattr(node, "body", ())
                     if getattr(child, "name", None) == step), None)
    return node if isinstance(node, ast.FunctionDef) else None


def source(name):
    """"clip.Block.forward" -> its node of the syntax tree.   ValueError if it is none of ours."""
    chapter, *path = name.split(".")
    node = find(parsed(chapter)[1], *path) if chapter in CHAPTERS else None
    if node is None:
        raise ValueError("expected the name of one of our functions, such as diffusion.q_posterior "
                         f"or clip.Block.forward, got {name!r}; see --list")
    return node


def body_lines(name):
    """The first and the last line of a function's body, without its docstring."""
    lines, node = parsed(name.split(".")[0])[0], source(name)
    first = node.body[0].end_lineno + 1 if ast.get_docstring(node) else node.body[0].lineno
    while lines[first - 2].strip().startswith("#"):
        first -= 1
    return first, node.end_lineno


def your_turn(name):
    paper, _, week = EXERCISES.get(name, ("no paper", "*", 0))
    when = f", in week {week}" if week else ""
    return f'raise NotImplementedError("your turn{when}: {name}, {paper}")'


def not_yours(name):
    return 'raise RuntimeError("it calls our function, which it should replace")'


def without(chapter, names, statement=your_turn):
    """A chapter's text with one statement in place of the bodies of these functions."""
    lines = parsed(chapter)[0].copy()
    names = {name for name in names if name.split(".")[0] == chapter}          # each once
    for name in sorted(names, key=body_lines, reverse=True):
        first, last = body_lines(name)
        lines[first - 1:last] = [" " * (source(name).col_offset + 4) + statement(name)]
    return "\n".join([*lines, ""])


def stubs(names):
    """The text of mine.py: these functions without their bodies; of their classes also __init__."""
    text = ["# Write the bodies, then: python extras/coursework.py --grade THIS_FILE. Helpers of",
            "# your own are welcome; what you leave unwritten costs only its own points.",
            "import math", "", "import torch", "import torch.nn.functional as F", ""]
    text += [f"import {chapter}" for chapter in chapters_of(name for name in names if source(name))]
    for chapter in chapters_of(names):
        cut = without(chapter, names)
        for node in ast.parse(cut).body:
            name = f"{chapter}.{getattr(node, 'name', '')}"
            if name in names:
                text += ["", *excerpt(cut, node)]
            elif isinstance(node, ast.ClassDef) and any(n.startswith(f"{name}.") for n in names):
                text += ["", "", f"class {node.name}:       # only what is your turn replaces ours"]
                for part in node.body:
                    method = f"{name}.{getattr(part, 'name', '')}"
                    if isinstance(part, ast.Expr) or method in (*names, f"{name}.__init__"):
                        text += excerpt(cut, part)
    return "\n".join([*text, ""])


def excerpt(text, node):
    """The lines of a node, decorators included, after an empty one."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    return ["", *text.splitlines()[first - 1:node.end_lineno]]


# ---------------------------------------------------------------- hand-outs and marks


def test_files(chapter):
    names = (chapter, "toy_world") if chapter == "train_toy" else (chapter,)
    return [ROOT / f"tests/test_{name}.py" for name in names]


def lay_out(folder, names, statement=your_turn):
    """Copy the six files, their tests and the weights, without the bodies of these functions."""
    for name in ("weights", "tests/golden"):
        shutil.copytree(ROOT / name, folder / name, copy_function=shutil.copyfile)
    (folder / "tests/extras").mkdir()
    helpers = [path for path in (ROOT / "tests/extras").glob("*.py") if path.name[:5] != "test_"]
    files = [ROOT / name for name in ("pytest.ini", "requirements.txt", "LICENSE")]
    for path in [*(ROOT / "tests").glob("*.py"), *helpers, *files]:
        shutil.copyfile(path, folder / path.relative_to(ROOT))
    for chapter in CHAPTERS:
        (folder / f"{chapter}.py").write_text(without(chapter, names, statement), encoding="utf-8")


LATER = '''

_raises = pytest.raises
pytest.raises = lambda *kinds, match=None: _raises(*kinds)       # an error's wording is yours


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that needs a function of a later week is skipped until then."""
    report = yield
    text = str(call.excinfo.value) if call.excinfo else ""
    if report.failed and any(f"your turn, in week {{week}}:" in text for week in {later}):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "for a later week")
    return report
'''


def hand_out(folder, week):
    """Write a repository to give away: no function of this week or a later one has its body."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"expected a folder that does not exist yet, got {folder}")
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as whole:
        beside = Path(whole, folder.name)
        try:
            lay_out(beside, [name for _, *names in WEEKS[week - 1:] for name in names])
        except shutil.Error as error:        # it lists (from, to, why)
            raise OSError(f"could not write {folder}: {error.args[0][0][2]}") from None
        with open(beside / "tests/conftest.py", "a", encoding="utf-8") as file:
            file.write(LATER.format(later=[*range(week + 1, len(WEEKS) + 1)]))
        (beside / "README.md").write_text(hand_out_page(week), encoding="utf-8")
        beside.rename(folder)


def hand_out_page(week):
    """The README of a hand-out."""
    title, *names = WEEKS[week - 1]
    files = " and ".join(f"`{chapter}.py`" for chapter in chapters_of(names))
    tests = " ".join(f"tests/test_{chapter}.py" for chapter in chapters_of(names))
    return f"""# Week {week}: {title}

unCLIP (the system behind DALL-E 2) in six files that one can read: `diffusion.py`, `clip.py`,
`prior.py`, `decoder.py`, `unclip.py`, `train_toy.py`. The bodies of this week's functions are yours
to write, in {files}.
Each docstring says what goes in, what comes out and where a paper defines it. Functions of later
weeks are missing, too; tests that need them are skipped.

    pip install -r requirements.txt
    pytest {tests} -m "not slow" --tb=line -x           # the first that fails
    pytest --tb=line                                    # in the end: everything, some minutes

{marks(names)}

Hand in {files}.
Each function is marked alone, with all others right: a gap costs only its own points. The grader
refuses modules, and their names, that no exercise needs, such as os and functools, open, getattr.
Discuss the papers with anyone; write the code yourself.
"""


def marks(names):
    """A table of exercises and their points."""
    rows = [f"| `{name}` | {paper} | {level} | {week or ''} | {POINTS[level]} |"
            for name, (paper, level, week) in EXERCISES.items() if name in names]
    return "\n".join(["| function | paper | difficulty | week | points |", "|---|---|---|---|---|",
                      *rows, f"| **total** | | | | **{sum(map(points, names))}** |"])


def listing():
    """Every exercise, by chapter."""
    parts = [f"{chapter}.py\n\n" + marks([n for n in EXERCISES if n.startswith(f"{chapter}.")])
             for chapter in chapters_of(EXERCISES)]
    weeks = [f"week {week}: {title}" for week, title in enumerate(TITLES, start=1)]
    return "\n\n".join([*parts, f"difficulty: {LEVELS}", "\n".join(weeks)])


def scheme():
    """The marking scheme: one page of Markdown."""
    levels = ", ".join(f"`{level}` {points}" for level, points in POINTS.items())
    parts = [f"""# Marking scheme

- Points by difficulty: {levels} ({LEVELS}).
- A function's tests are the quick tests of its chapter that call it. Its points are the share of
  them that it passes, rounded down to a tenth. It replaces ours alone, so no gap elsewhere costs
  anything. Whether it also works with the student's other functions is shown, and costs nothing.
- A function that ends Python, never ends, prints without end or uses what no exercise needs (as
  other modules, `open`, `getattr`) gets no points. Nor does one that only raises.
- To mark: `python extras/coursework.py --grade FILE... --week N --json results.json`
  ({WHAT_IT_IS_NOT})."""]
    parts += [f"## Week {week}: {title}\n\n{marks(names)}"
              for week, (title, *names) in enumerate(WEEKS, start=1)]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- swapping functions in


def home(name):
    """"clip.Block.forward" -> (clip.Block, "forward"); "clip.unit" -> (the module clip, "unit")."""
    chapter, *path, attribute = name.split(".")
    return functools.reduce(getattr, path, importlib.import_module(chapter)), attribute


@contextlib.contextmanager
def swapped(impl):
    """With {name: function} in place of ours, wherever a chapter holds them; then ours again."""
    with pytest.MonkeyPatch.context() as patch:
        for name, new in impl.items():
            owner, attribute = home(name)
            old = vars(owner)[attribute]
            if isinstance(owner, type):
                # super() in a student's class must find ours
                for cell in getattr(getattr(new, "__wrapped__", new), "__closure__", None) or ():
                    if isinstance(cell.cell_contents, type):
                        cell.cell_contents = owner
                patch.setattr(owner, attribute, new)
                continue

            # the chapters' names, and tables such as SCHEDULES
            spaces = [vars(sys.modules[chapter]) for chapter in CHAPTERS if chapter in sys.modules]
            tables = [value for space in spaces for key, value in space.items()
                      if isinstance(value, dict) and key != "__builtins__"]
            for space in spaces + tables:
                for key in [key for key, value in space.items() if value is old]:
                    patch.setitem(space, key, new)
        yield


# ---------------------------------------------------------------- one run of our tests

STUDENTS = "the_students_file"
LIMIT = 5                                    # seconds of the processor for one test
FORBIDDEN = re.compile(r"os\.(fork|exec|posix_spawn|system|kill)|subprocess|ctypes|"
                       r"sys\.set|gc\.|open .*[wax+]")


class Trial:
    """A pytest plugin: the quick tests, with other functions in place of ours.

    load     called when the tests are collected -> {name: function}
    tests    the ids or the names of the tests to run; None: all quick ones
    file     the student's file, whose lines an error names
    enough   hint -> True if the run may stop
    After the run: results {test: None, or a sentence on what went wrong}, calls and answered {test:
    the functions that it called, and those that returned}, offences [sentence].
    """

    def __init__(self, load, tests=None, file="", enough=lambda hint: False):
        self.load, self.tests, self.file, self.enough = load, tests, str(file), enough
        self.results, self.calls, self.answered, self.offences = {}, {}, {}, []
        self.depth, self.now, self.started = 0, "", 0.0    # depth > 0: code of the file is running

    def run(self, *paths):
        pytest.main(["-s", "-W", "ignore", "-p", "no:terminal", "-p", "no:cacheprovider", "-c",
                     str(ROOT / "pytest.ini"), *map(str, paths)], plugins=[self])
        return self

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items
                    if (self.tests is None or {item.nodeid, item.originalname} & {*self.tests})
                    and not any(map(item.get_closest_marker, ("slow", "long")))]

    def pytest_runtestloop(self, session):
        raises, self.depth = pytest.raises, 1
        impl = {name: self.guarded(name, function) for name, function in self.load().items()}
        self.depth = 0

        # an error's type is tested, not its wording
        with swapped(impl), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pytest, "raises", lambda *a, match=None, **kw: raises(*a, **kw))
            for item, following in zip(session.items, [*session.items[1:], None]):
                if self.offences or self.enough(self.results.get(self.now) or ""):
                    break
                self.now, self.depth, self.started = item.nodeid, 0, time.process_time()
                self.calls[self.now], self.answered[self.now] = set(), set()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return True

    def pytest_internalerror(self, excinfo):
        self.offences.append(f"{excinfo.typename}: {excinfo.value}")

    pytest_keyboard_interrupt = pytest_internalerror

    def pytest_runtest_makereport(self, item, call):
        """In place of pytest's report: a sentence, no traceback."""
        test, hint = item.nodeid, self.sentence(item, call.excinfo) if call.excinfo else None
        if hint or call.when == "call":
            self.results[test] = self.results.get(test) or hint
        return pytest.TestReport(test, item.location, {}, "failed" if hint else "passed", hint,
                                 call.when)

    def guarded(self, name, function):
        """The function; that it was called, and that it returned, is noted."""
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(self.guarded(name, function.__func__))
        import torch

        @functools.wraps(function)
        def guarded(*args, **options):
            given = [x for x in (*args, *options.values()) if torch.is_tensor(x) and not x.is_meta]
            modules = [x for x in args if self.file and isinstance(x, torch.nn.Module)]
            given += [w for module in modules for w in module.parameters() if not w.is_meta]
            before = [x.detach().clone() for x in given]
            self.calls[self.now].add(name)
            self.depth += 1
            try:
                answer = function(*args, **options)
            finally:
                self.depth -= 1

            if not all(((x == y) | (x != x)).all() for x, y in zip(given, before)):
                pytest.fail("it changes an argument; work on a copy (x = x * 2, not x *= 2)")
            for x in answer if isinstance(answer, tuple) else [answer]:
                if type(x).__module__ == STUDENTS:
                    pytest.fail(f"it returns an object of its own class, {type(x).__name__}")
            self.answered[self.now].add(name)
            return answer
        return guarded

    def sentence(self, item, excinfo):
        """What went wrong, in a sentence."""
        error, text = excinfo.value, str(excinfo.value).strip()
        about = re.sub(r"\[.*|^test_", "", item.name).replace("_", " ")
        line = line_of(traceback.extract_tb(error.__traceback__), self.file)
        if isinstance(error, NotImplementedError) and (line or text.startswith("your turn")):
            return "not written yet"
        if isinstance(error, pytest.fail.Exception):
            due = text.startswith("DID NOT RAISE")
            return f"it should raise an error where {about}" if due else text.split("\n")[0]
        if isinstance(error, AssertionError) and not line:
            first = re.split(r"\n?assert |\n", text)[0]
            return first or f"it should hold that {about}, and it does not"
        return f"{type(error).__name__}{line}: {text.split(chr(10))[0] or 'where ' + about}"


def line_of(stack, file):
    """" in line 4 of mine.py", the last line of the file in a stack of calls."""
    lines = [frame.lineno for frame in stack if frame.filename == str(file)]
    return f" in line {lines[-1]} of {Path(file).name}" if lines else ""


# ---------------------------------------------------------------- reading a file, and running it

IMPORTS = {*"""__future__ math itertools collections typing re random unicodedata numpy torch
           tqdm""".split(), *CHAPTERS}
REFUSED = {*sys.stdlib_module_names, *"""* ForwardRef Image Path breakpoint compile dataclass
           delattr distributed eval exec export from_file fx get_type_hints getattr gi_frame globals
           hub jit library load locals onnx open ops overrides save serialization setattr testing
           utils vars""".split()}
REFUSED -= {*IMPORTS, *"""array chunk code copy numbers queue select signal stat statistics string
            test time token trace""".split()}


def pieces(tree):
    """(name, node) of the statements of a file, those of a class one by one."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for part in (*node.bases, *node.keywords, *node.decorator_list, *node.body):
                yield f"{node.name}.{getattr(part, 'name', '')}", part
        else:
            yield getattr(node, "name", ""), node


@functools.cache
def our_lines():
    return {ast.dump(node) for chapter in CHAPTERS for _, node in pieces(parsed(chapter)[1])}


def with_only(path, names):
    """A file's text with only these of its exercises; of a hand-out's file also only what is not
    ours to the letter. What stays keeps its line numbers."""
    text = path.read_text(encoding="utf-8")
    lines, others = text.splitlines(), {name.split(".", 1)[1] for name in {*EXERCISES} - {*names}}
    for key, node in pieces(ast.parse(text)):
        ours = path.stem in CHAPTERS and ast.dump(node) in our_lines()
        asked = key in {name.split(".", 1)[1] for name in names}
        if isinstance(node, ast.stmt) and not asked and (ours or key in others):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            gap = [" " * node.col_offset + "pass", *[""] * (node.end_lineno - first)]
            lines[first - 1:node.end_lineno] = gap
    return "\n".join([*lines, ""])


def refused(text, file):
    """What no exercise needs and a file uses all the same: a sentence, or None."""
    nodes = (node for _, piece in pieces(ast.parse(text)) if ast.dump(piece) not in our_lines()
             for node in ast.walk(piece))
    return next((f"{word} in line {node.lineno} of {file}: refused, as no exercise needs it; there "
                 f"are {', '.join(sorted(IMPORTS))}" for node in nodes
                 if (word := refused_word(node))), None)


def refused_word(node):
    """The word of a syntax tree's node that is refused, or ""."""
    mine = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
    if isinstance(node, ast.Attribute):      # only KVCache.append sets attributes
        kept = isinstance(node.ctx, ast.Load) or mine and node.attr in ("k", "v", "length")
        if not kept or node.attr.startswith("_") and not mine:
            return ast.unparse(node)

    # modules; variables, attributes and what is defined; `match` reads attributes, type makes one
    paths = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    paths += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
    foreign = [path for path in paths if path.split(".")[0] not in IMPORTS]
    paths += ["__match__"] if isinstance(node, ast.Match) else []
    paths += ["__type__"] if getattr(node, "id", "") == "type" else []
    paths += [getattr(node, kind, None) or "" for kind in ("id", "attr", "name")]
    return next((word for word in [*foreign, *".".join(paths).split(".")] if word in foreign
                 or word in REFUSED and not mine
                 or word[:2] == "__" and word not in ("__init__", "__name__", "__future__")), "")


def child(folder, file, names, tests, verdict):
    """One trial in a copy of the repository: the verdict goes to a file, prints go nowhere."""
    global ROOT
    ROOT, file = folder, folder / "extras" / file
    sys.path[:] = [path for path in sys.path if not Path(path, "diffusion.py").exists()]
    sys.dont_write_bytecode = True
    os.environ.update(CUDA_VISIBLE_DEVICES="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
                      PYTEST_ADDOPTS="")
    os.chdir(ROOT)
    if hasattr(os, "fork"):                  # locks, as tqdm's, that leave nothing behind
        multiprocessing.set_start_method("fork", force=True)
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    import torch
    torch.set_num_threads(1)

    def finish():
        said = {key: vars(trial)[key] for key in ("results", "calls", "answered", "offences")}
        verdict.write_text(json.dumps(said, default=sorted))
        os._exit(0)                          # nothing of the student's runs after this

    def watch_the_clock():
        while time.process_time() - trial.started < LIMIT:
            time.sleep(0.05)
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        trial.offences = [f"it takes far longer than ours{line_of(stack, file)}: an endless loop?"]
        finish()

    def load():
        trial.started = time.process_time()
        threading.Thread(target=watch_the_clock, daemon=True).start()
        try:
            return read_functions(file, names)
        except BaseException as error:
            where = line_of(traceback.extract_tb(error.__traceback__), file)
            trial.offences += [f"it cannot be loaded: {type(error).__name__}{where}: {error}"]
            return {}

    def watch(event, args):
        student = trial.depth and threading.current_thread() is threading.main_thread()
        if student and FORBIDDEN.match(f"open {args[1]}" if event == "open" else event):
            trial.offences.append(f"it does what no exercise needs: {event}")
            raise RuntimeError(trial.offences[-1])

    trial = Trial(load, tests, file)
    sys.addaudithook(watch)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                      # what is printed into a variable has an end, too
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    trial.run(*(path for chapter in chapters_of(names) for path in test_files(chapter)))
    finish()


def read_functions(path, names):
    """Run a student's file -> {name: function} for these names."""
    spec = importlib.util.spec_from_file_location(STUDENTS, path)
    module = sys.modules[STUDENTS] = importlib.util.module_from_spec(spec)

    # all else of its chapters is ours, also their classes, so that a gap in one costs no other
    ours = {key: value for chapter in chapters_of(names)
            for key, value in vars(importlib.import_module(chapter)).items() if key[:2] != "__"}
    vars(module).update(ours)
    spec.loader.exec_module(module)
    found = {name: vars(functools.reduce(getattr, name.split(".")[1:-1], module))[
        name.split(".")[-1]] for name in names}
    vars(module).update({key: kind for key, kind in ours.items() if isinstance(kind, type)})
    return found


def examine(tests, text, file, names, patience=100):
    """One trial in a process of its own, in a copy without the bodies of these functions.

    The process is a fork of one that has imported torch and no chapter (on Windows a new one).
    -> what a Trial has after its run, as a dict; only its "offences" if it did not end well.
    """
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["torch", "numpy", "pytest"])
    with tempfile.TemporaryDirectory(prefix="coursework-") as folder:
        folder = Path(folder).resolve()
        lay_out(folder, names, not_yours)
        (folder / "extras").mkdir()
        (folder / "extras" / file).write_text(text, encoding="utf-8")
        verdict = folder / secrets.token_hex()           # a name that no student's file can know
        process = context.Process(target=child, args=(folder, file, names, tests, verdict))
        process.start()
        process.join(patience)
        end = (f"it ended Python itself (exit status {process.exitcode})" if not process.is_alive()
               else f"no end after {patience} seconds")
        process.kill()
        process.join()
        with contextlib.suppress(OSError, ValueError):
            return json.loads(verdict.read_text())
        return {"offences": [end]}


# ---------------------------------------------------------------- grading


@dataclass
class Row:
    """One line of the table."""
    name: str
    passed: tuple = ()                       # its tests that pass, all others being ours
    tests: int = 0
    points: float = 0.0
    together: str = "-"                      # do they, with the student's other functions?
    hint: str = "not in the file"


def written(path):
    """The exercises that a file defines, without running it.   ValueError if it is no Python."""
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"expected a Python file, NAME.py, got {path}; --stubs writes one")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is no Python: {error}") from None
    chapters = [path.stem] if path.stem in CHAPTERS else CHAPTERS
    return [name for name in EXERCISES
            if name.split(".")[0] in chapters and find(tree, *name.split(".")[1:])]


def grade(paths, week=None, results=None):
    """Grade files -> Rows. The file `results` gets them as Gradescope reads them, zeros first."""
    asked = WEEKS[week - 1][1:] if week else EXERCISES
    write_results(results, map(Row, asked))
    where = {name: Path(path).resolve() for path in paths for name in written(Path(path))
             if name in asked}
    if not where:
        raise ValueError(f"expected {f'functions of week {week}' if week else 'exercises'} in "
                         f"{', '.join(map(str, paths))}, got none; begin with --stubs")
    rows = {name: Row(name) for name in asked if week or name in where}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            list(pool.map(lambda name: alone(rows[name], where[name]), where))
        except BaseException:                # Ctrl-C: nothing to wait for
            for process in multiprocessing.active_children():
                process.kill()
            raise
    for path in {*where.values()}:
        together([row for row in rows.values() if where.get(row.name) == path and row.passed], path)
    write_results(results, rows.values())
    return [*rows.values()]


IMPLICIT = ("__init__", "__call__", "forward")          # whose object is made, they may be called


@functools.cache
def mentions(chapter):
    """{name: the names in its body}, of all that a chapter and its tests define."""
    found = collections.defaultdict(set)
    texts = [path.read_text(encoding="utf-8") for path in test_files(chapter)]
    for tree in [parsed(chapter)[1], *map(ast.parse, texts)]:
        for key, node in pieces(tree):
            key = key or getattr(getattr(node, "targets", [0])[0], "id", "")      # or a table
            found[key.split(".")[0]] |= {f"{key.split('.')[0]}.{name}" for name in IMPLICIT}
            found[short(key)] |= {getattr(n, kind) for n in ast.walk(node)
                                  for kind in ("id", "attr", "arg", "value")
                                  if isinstance(getattr(n, kind, None), str)
                                  and getattr(getattr(n, "value", 0), "id", "") != "F"}
    return found


def short(key):
    return key if key.endswith(IMPLICIT) else key.split(".")[-1]


def tests_of(name):
    """The names of the tests that may call a function, not only by a command; the direct first."""
    chapter, key = name.split(".", 1)
    found, reach = mentions(chapter), [short(key)]
    for step in reach:                       # grows while it runs
        reach += [who for who in found if step in found[who] and who not in (*reach, "main")]
    return [test for test in reach if test.startswith("test_")]


def alone(row, path):
    """Grade one function, all others being ours: fill its row."""
    order, text = tests_of(row.name), with_only(path, [row.name])
    row.hint = refused(text, path.name)
    verdict = {} if row.hint else examine(order, text, path.name, [row.name])
    row.hint = row.hint or next(iter(verdict["offences"]), None)
    if row.hint:
        return
    tests = [test for test, called in verdict["calls"].items() if row.name in called]
    tests.sort(key=lambda test: order.index(re.split(r"::|\[", test)[1]))
    hints = {test: verdict["results"].get(test, "not run") for test in tests}
    passed = [test for test in tests if hints[test] is None]
    row.tests = len(tests)
    row.hint = next(filter(None, hints.values()), "all is well" if passed else "no test calls it")

    # whoever only raises errors raises the right ones by chance
    if any(row.name in verdict["answered"][test] for test in passed):
        row.passed = passed
        row.points = math.floor(10 * points(row.name) * len(passed) / len(tests)) / 10


def together(rows, path):
    """Do the tests that each function passes alone also pass with the others of its file?"""
    if len(rows) > 1:
        names = [row.name for row in rows]
        tests = sorted({test for row in rows for test in row.passed})
        results = examine(tests, with_only(path, names), path.name, names).get("results", {})
        for row in rows:
            bad = [test for test in row.passed if results.get(test, "not run") is not None]
            row.together = "no" if bad else "yes"


def write_results(path, rows):
    """Results as Gradescope reads them: tests with name, score, max_score and output."""
    tests = [{"name": row.name, "score": row.points, "max_score": points(row.name),
              "output": f"{len(row.passed)} of {row.tests} tests: {row.hint}\n"
                        f"works with your other functions: {row.together}"} for row in rows]
    if path:
        import unclip                        # not at the top: the graded process has its own
        unclip.write_json(path, {"output": WHAT_IT_IS_NOT, "tests": tests})


def table(rows):
    """The rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'function':<{width}}   tests  points  with your others  hint"]
    lines += [f"{row.name:<{width}} {len(row.passed):>3}/{row.tests:<3} {row.points:>4g}/"
              f"{points(row.name):<3} {row.together:^16}  {row.hint}" for row in rows]
    scored, most = sum(row.points for row in rows), sum(points(row.name) for row in rows)
    return "\n".join([*lines, f"{scored:g} of {most} points ({WHAT_IT_IS_NOT})"])


# ---------------------------------------------------------------- command line


def run(args):
    """One command -> its exit status."""
    names = WEEKS[args.week - 1][1:] if args.week else []
    if args.grade:
        rows = grade(args.grade, args.week, args.json)
        print(table(rows), flush=True)
        return int(any(row.points < points(row.name) for row in rows))
    if args.handout:
        hand_out(args.handout, args.week)
        print(f"wrote {args.handout}: week {args.week}, {TITLES[args.week - 1]}")
    elif args.stubs is not None:
        print(stubs([*args.stubs, *names]), flush=True)
    else:
        print(listing() if args.list else scheme(), flush=True)
    return 0


def main(arguments=None):
    import unclip
    parser = argparse.ArgumentParser(
        description="Coursework from our own source.", allow_abbrev=False,
        epilog=f"The grader is {WHAT_IT_IS_NOT}. Its exit status is 0 only if all points were "
               "scored, 1 if not, 2 if a file cannot be graded.")
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--list", action="store_true", help="show every exercise")
    command.add_argument("--handout", type=unclip.named, metavar="FOLDER",
                         help="write a repository without answers")
    command.add_argument("--stubs", nargs="*", metavar="NAME",
                         help="print stubs of these functions (diffusion.guide), or of a week")
    command.add_argument("--grade", nargs="+", metavar="FILE",
                         help="grade a student's files: stubs, or files of a hand-out")
    command.add_argument("--scheme", action="store_true", help="show the marking scheme")
    parser.add_argument("--week", type=int, choices=range(1, len(WEEKS) + 1))
    parser.add_argument("--json", type=unclip.writable, metavar="FILE",
                        help="also write results in Gradescope's form")
    args = parser.parse_args(arguments)
    if not args.week and (args.handout or args.stubs == []):
        parser.error("expected --week N, too")
    if args.json and not args.grade or args.week and (args.list or args.scheme):
        parser.error("--json goes with --grade; --week with --grade, --stubs and --handout")
    return unclip.stop_on_error(run, args)


if __name__ == "__main__":
    sys.exit(main())
