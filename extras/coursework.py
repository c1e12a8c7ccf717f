"""Coursework from our own source: five weeks of exercises, hand-outs, a grader, a marking scheme.

    python extras/coursework.py list                        every exercise
    python extras/coursework.py stubs --week 2 > mine.py    stubs: write their bodies
    python extras/coursework.py grade mine.py               points, and a hint for each function
    python extras/coursework.py grade mine.py --week 2 --json results.json
    python extras/coursework.py handout FOLDER --week 2     a repository without the answers
    python extras/coursework.py scheme                      the marking scheme

Stubs and hand-outs are cut from the chapters, so they cannot be out of step. The grader runs our
tests in a copy of the repository from which the body of the graded function is gone: no answer is
left that a student's file could call, read or keep.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHAPTERS = ("diffusion", "clip", "prior", "decoder", "unclip", "train_toy")
WHAT_IT_IS_NOT = "a check of understanding, not of honesty; for marks run it in a container"
POINTS = {"*": 5, "**": 10, "***": 20}       # a line or two, some thought, an evening

# chapter: each function, its difficulty, and where a paper defines it
EXERCISES = {
    "diffusion": """q_sample * DDPM eq. 4; loss ** DDPM alg. 1, IDDPM eq. 16; target * Salimans & Ho
        2022, app. D; to_x0 * DDPM eq. 15; to_eps * DDPM eq. 15; sample *** DDPM alg. 2; q_posterior
        ** DDPM eq. 6-7; guide * GLIDE sec. 2.3; guided ** GLIDE sec. 2.3; cosine_alphabar * IDDPM
        eq. 17; linear_alphabar * DDPM sec. 4; spaced_timesteps * IDDPM sec. 4; ddim_step ** DDIM
        eq. 12, 16; ddim_invert_step * ADM app. F; invert ** ADM app. F; inpaint *** RePaint alg. 1;
        log_var_bounds ** IDDPM sec. 3.1; learned_log_var * IDDPM eq. 15; vlb_loss *** IDDPM eq.
        5, 6; discretized_log_likelihood ** DDPM eq. 13; step_variance ** Analytic-DPM eq. 7;
        measure_cov ** Analytic-DPM eq. 8""",
    "clip": """CLIP.scale * CLIP sec. 2.5; clip_loss ** CLIP fig. 3; zero_shot * CLIP sec. 3.1; unit
        * CLIP fig. 3; ImageEncoder.forward ** CLIP sec. 2.4; TextEncoder.forward ** CLIP sec. 2.4;
        attend ** CLIP sec. 2.4; KVCache.append ** no paper; Block.forward ** CLIP sec. 2.4;
        CaptionEncoder.forward ** GLIDE sec. 4.1; sinusoid ** ADM's code; Text.drop * unCLIP sec.
        2.1, 2.2; split_words ** CLIP sec. 2.4; Tokenizer.train *** CLIP sec. 2.4; Tokenizer.bpe **
        CLIP sec. 2.4; token_mask * CLIP sec. 2.4""",
    "prior": """DiffusionPrior.scale * unCLIP app. C; DiffusionPrior.unscale * unCLIP app. C;
        DiffusionPrior.forward *** unCLIP sec. 2.2; DiffusionPrior.loss ** unCLIP sec. 2.2;
        DiffusionPrior.sample *** unCLIP sec. 2.2; principal_components ** unCLIP sec. 2.2;
        quantile_edges * unCLIP sec. 2.2; ARPrior.fit_codes *** unCLIP sec. 2.2; ARPrior.encode **
        unCLIP sec. 2.2; ARPrior.decode * unCLIP sec. 2.2; ARPrior.dot_code * unCLIP sec. 2.2;
        ARPrior.loss ** unCLIP sec. 2.2""",
    "decoder": """Decoder.condition ** unCLIP sec. 2.1; Decoder.loss ** unCLIP sec. 2.1;
        Upsampler.prepare ** unCLIP sec. 2.1; ResBlock.forward ** ADM sec. 3; Attention.forward **
        GLIDE sec. 4.1; UNet.forward *** ADM sec. 3; shrink * unCLIP sec. 2.1; enlarge * unCLIP
        sec. 2.1; crop_pair ** unCLIP app. C; filter2d ** unCLIP app. C; gaussian_blur * unCLIP
        app. C""",
    "unclip": """UnCLIP.rerank ** DALL-E sec. 2.6; UnCLIP.variations * unCLIP sec. 3.1;
        UnCLIP.interpolate ** unCLIP sec. 3.2; UnCLIP.text_diff ** unCLIP sec. 3.3; slerp ** unCLIP
        sec. 3.2""",
}
EXERCISES = {f"{chapter}.{row.split()[0]}": (" ".join(row.split()[2:]), row.split()[1])
             for chapter, rows in EXERCISES.items() for row in rows.split(";")}   # name: paper, *

WEEKS = (                                    # about an evening each
    ("noise, and what Bayes' rule says about it", "diffusion.cosine_alphabar",
     "diffusion.q_sample", "diffusion.target", "diffusion.to_x0", "diffusion.q_posterior",
     "diffusion.loss"),
    ("samplers and guidance", "diffusion.spaced_timesteps", "diffusion.guide",
     "diffusion.ddim_step", "diffusion.ddim_invert_step", "diffusion.sample", "unclip.slerp"),
    ("CLIP", "clip.attend", "clip.Block.forward", "clip.TextEncoder.forward", "clip.clip_loss",
     "clip.zero_shot", "clip.Tokenizer.bpe"),
    ("the two priors", "prior.DiffusionPrior.scale", "prior.DiffusionPrior.loss",
     "prior.principal_components", "prior.ARPrior.encode", "prior.ARPrior.decode",
     "prior.ARPrior.loss"),
    ("the decoder, and what unCLIP can do", "decoder.ResBlock.forward",
     "decoder.Attention.forward", "decoder.Decoder.loss", "decoder.crop_pair",
     "unclip.UnCLIP.interpolate", "unclip.UnCLIP.text_diff"),
)


def week_of(name):
    """The week of an exercise, or None."""
    return next((week for week, names in enumerate(WEEKS, start=1) if name in names), None)


def of_chapter(chapter, names):
    return [name for name in names if name.split(".")[0] == chapter]


def chapters_of(names):
    return list(dict.fromkeys(name.split(".")[0] for name in names))


# ---------------------------------------------------------------- our source


@functools.cache
def parsed(chapter):
    """A chapter -> its lines and its syntax tree."""
    text = (ROOT / f"{chapter}.py").read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def source(name):
    """"clip.Block.forward" -> its node of the syntax tree.   ValueError if it is none of ours."""
    chapter, *path = name.split(".")
    node = parsed(chapter)[1] if chapter in CHAPTERS else None
    for step in path:
        node = next((child for child in getattr(node, "body", ())
                     if getattr(child, "name", None) == step), None)
    if not isinstance(node, ast.FunctionDef):
        raise ValueError("expected the name of one of our functions, such as diffusion.q_posterior "
                         f"or clip.Block.forward, got {name!r}; see `list`")
    return node


def body_lines(name):
    """The first and the last line of a function's body, without its docstring."""
    lines, node = parsed(name.split(".")[0])[0], source(name)
    first = node.body[0].end_lineno + 1 if ast.get_docstring(node) else node.body[0].lineno
    while lines[first - 2].strip().startswith("#"):
        first -= 1
    return first, node.end_lineno


def your_turn(name):
    week = f", in week {week_of(name)}" if week_of(name) else ""
    return f'raise NotImplementedError("your turn{week}: {name}, {EXERCISES[name][0]}")'


def not_yours(name):
    return 'raise RuntimeError("it calls our function, which it should replace")'


def without(chapter, names, statement=your_turn):
    """A chapter's text with one statement in place of the bodies of these functions."""
    lines = parsed(chapter)[0].copy()
    for name in sorted(of_chapter(chapter, names), key=lambda name: -body_lines(name)[0]):
        first, last = body_lines(name)
        lines[first - 1:last] = [" " * (source(name).col_offset + 4) + statement(name)]
    return "\n".join([*lines, ""])


def stubs(names):
    """The text of mine.py: each function cut after its docstring, methods in their class."""
    text = ["# Write the bodies, then: python extras/coursework.py grade THIS_FILE. Helpers of",
            "# your own are welcome; what you leave unwritten costs only its own points.",
            "import math", "", "import torch", "import torch.nn.functional as F", ""]
    text += [f"import {chapter}" for chapter in chapters_of(names)]
    opened = ""
    for name in sorted(names, key=lambda n: n.rsplit(".", 1)[0] if n.count(".") > 1 else ""):
        chapter, *path = name.split(".")
        node, lines = source(name), parsed(chapter)[0]
        indent = " " * node.col_offset
        if len(path) == 1:
            text += [""]
        elif path[0] != opened:
            text += ["", "", *class_head(chapter, path[0])]
        opened = path[0] if len(path) > 1 else ""

        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        paper, level = EXERCISES.get(name, ("no paper", "*"))
        text += ["", f"{indent}# {name}: {paper}, {POINTS[level]} points",
                 *lines[first - 1:body_lines(name)[0] - 1],
                 f'{indent}    raise NotImplementedError("your turn")']
    return "\n".join([*text, ""])


def class_head(chapter, name):
    """The first lines of a class of stubs: its docstring and, as a comment, its __init__."""
    lines, tree = parsed(chapter)
    node = next(n for n in tree.body if getattr(n, "name", "") == name)
    text = [f"class {name}:               # only the methods written here replace ours"]
    if ast.get_docstring(node):
        text += lines[node.body[0].lineno - 1:node.body[0].end_lineno]
    for init in [n for n in node.body if getattr(n, "name", "") == "__init__"]:
        text += ["", f"    # As it is in {chapter}.py:"]
        text += [f"    # {line[4:]}".rstrip() for line in lines[init.lineno - 1:init.end_lineno]]
    return text


# ---------------------------------------------------------------- hand-outs and marks


def test_files(chapter):
    names = (chapter, "toy_world") if chapter == "train_toy" else (chapter,)
    return [ROOT / f"tests/test_{name}.py" for name in names]


def lay_out(folder, names, statement=your_turn, copy=shutil.copytree):
    """Copy the six files, their tests and the weights, without the bodies of these functions."""
    (folder / "tests/extras").mkdir(parents=True)
    for chapter in CHAPTERS:
        (folder / f"{chapter}.py").write_text(without(chapter, names, statement), encoding="utf-8")
    files = [path for chapter in CHAPTERS for path in test_files(chapter)]
    for path in [*files, ROOT / "tests/conftest.py", ROOT / "pytest.ini"]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    for helper in (ROOT / "tests/extras").glob("golden_weights.py"):
        shutil.copy(helper, folder / "tests/extras")
    for name in ("weights", "tests/golden"):
        copy(ROOT / name, folder / name)


LATER = '''

# ---------------------------------------------------------------- only in this hand-out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that needs a function of a later week is skipped until then."""
    report = yield
    text = str(call.excinfo.value) if call.excinfo else ""
    later = re.search(r"your turn, in week (\\d+): \\S+", text)
    if report.failed and later and int(later[1]) > {week}:
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, later[0])
    return report
'''


def hand_out(folder, week):
    """Write a repository to give away: no function of this week or a later one has its body."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"expected a folder that does not exist yet, got {folder}")
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    lay_out(beside, [name for _, *names in WEEKS[week - 1:] for name in names])
    conftest = beside / "tests/conftest.py"
    text = conftest.read_text(encoding="utf-8").replace("import os\n", "import os\nimport re\n", 1)
    conftest.write_text(text + LATER.format(week=week), encoding="utf-8")
    for name in ("requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, beside)
    (beside / "README.md").write_text(hand_out_page(week), encoding="utf-8")
    os.replace(beside, folder)


def hand_out_page(week):
    """The README of a hand-out."""
    title, *names = WEEKS[week - 1]
    files = " and ".join(f"`{chapter}.py`" for chapter in chapters_of(names))
    tests = " ".join(f"tests/{path.name}" for c in chapters_of(names) for path in test_files(c))
    return f"""# Week {week}: {title}

unCLIP (the system behind DALL-E 2) in six files that one can read: `diffusion.py`, `clip.py`,
`prior.py`, `decoder.py`, `unclip.py`, `train_toy.py`. The bodies of this week's functions are yours
to write, in {files}.
Each docstring says what goes in, what comes out and where a paper defines it.
Functions of later weeks are missing, too; tests that need them are skipped.

    pip install -r requirements.txt
    pytest {tests} -m "not slow" --tb=line -k NAME      # the tests with NAME in theirs
    pytest {tests} -m "not slow" -x                     # the first that fails
    pytest                                              # in the end: everything, some minutes

{marks(week)}

Hand in {files}.
Each function is marked alone, with all others right: a gap costs only its own points.
Discuss the papers with anyone; write the code yourself.
"""


def marks(week):
    """The table of a week's points."""
    names = WEEKS[week - 1][1:]
    rows = [f"| `{name}` | {EXERCISES[name][0]} | {EXERCISES[name][1]} | {points(name)} |"
            for name in names]
    total = f"| **total** | | | **{sum(map(points, names))}** |"
    head = ["| function | paper | difficulty | points |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, total])


def points(name):
    return POINTS[EXERCISES[name][1]]


def scheme():
    """The marking scheme: one page of Markdown."""
    levels = ", ".join(f"`{level}` {points}" for level, points in POINTS.items())
    parts = [f"""# Marking scheme

- Points by difficulty: {levels} (a line or two, some thought, an evening).
- A function's tests are the quick tests of its chapter that call it. Its points are the share of
  them that it passes, rounded down to a tenth. It replaces ours alone, so no gap elsewhere costs
  anything. Whether it also works with the student's other functions is shown, and costs nothing.
- A function that ends Python, never ends, starts processes, prints without end, or replaces
  anything of the grader, pytest, torch or Python gets no points. Nor does one that only raises.
- To mark: `python extras/coursework.py grade FILE... --week N --json results.json`
  ({WHAT_IT_IS_NOT})."""]
    for week, (title, *_) in enumerate(WEEKS, start=1):
        parts.append(f"## Week {week}: {title}\n\n{marks(week)}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- swapping functions in


def home(name):
    """"clip.Block.forward" -> (clip.Block, "forward"); "clip.unit" -> (the module clip, "unit")."""
    chapter, *path = name.split(".")
    owner = importlib.import_module(chapter)
    for step in path[:-1]:
        owner = getattr(owner, step)
    return owner, path[-1]


def ours(name):
    owner, attribute = home(name)
    return vars(owner)[attribute]


@contextlib.contextmanager
def swapped(impl):
    """With {name: function} in place of ours, wherever a chapter holds them; then ours again."""
    undo = []
    try:
        for name, new in impl.items():
            owner, attribute = home(name)
            old = vars(owner)[attribute]
            if isinstance(owner, type):
                # super() in a student's class must find ours
                for cell in getattr(getattr(new, "__wrapped__", new), "__closure__", None) or ():
                    if isinstance(cell.cell_contents, type):
                        cell.cell_contents = owner
                undo.append((setattr, owner, attribute, old))
                setattr(owner, attribute, new)
                continue

            # the chapters' names, and tables such as SCHEDULES
            spaces = [vars(sys.modules[chapter]) for chapter in CHAPTERS if chapter in sys.modules]
            tables = [value for space in spaces for key, value in space.items()
                      if isinstance(value, dict) and key != "__builtins__"]
            for space in spaces + tables:
                for key in [key for key, value in space.items() if value is old]:
                    undo.append((dict.__setitem__, space, key, old))
                    space[key] = new
        yield
    finally:
        for put, *where in reversed(undo):
            put(*where)


# ---------------------------------------------------------------- one run of our tests

FORBIDDEN = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "os.kill",
             "os.killpg")


class Trial:
    """A pytest plugin: the quick tests, with other functions in place of ours.

    load     called when the tests are collected -> {name: function}
    tests    the ids of the tests to run; None: all quick ones
    file     the student's file, whose lines an error names
    enough   hint -> True if the run may stop
    After the run: results {test: None, or a sentence on what went wrong}, calls and answered {test:
    the functions that it called, and those that returned}, seconds {test: s}, offences [sentence].
    """

    def __init__(self, load, tests=None, file="", enough=lambda hint: False):
        self.load, self.tests, self.file, self.enough = load, tests, str(file), enough
        self.results, self.calls, self.answered, self.seconds, self.offences = {}, {}, {}, {}, []
        self.depth, self.now = 0, ""         # depth > 0: code of the file is running

    def run(self, *paths):
        import pytest
        pytest.main(["-s", "-W", "ignore", "-p", "no:terminal", "-p", "no:cacheprovider", "-c",
                     str(ROOT / "pytest.ini"), *map(str, paths)], plugins=[self])
        return self

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if (self.tests is None or item.nodeid in self.tests)
                    and not any(map(item.get_closest_marker, ("slow", "long")))]

    def pytest_runtestloop(self, session):
        import pytest
        raises, before = pytest.raises, fingerprint()
        self.depth = 1
        impl = {name: self.guarded(name, function) for name, function in self.load().items()}
        self.offences += replaced(before)

        # an error's type is tested, not its wording
        with swapped(impl), pytest.MonkeyPatch.context() as patch:
            patch.setattr(pytest, "raises", lambda *a, match=None, **kw: raises(*a, **kw))
            for item, following in zip(session.items, [*session.items[1:], None]):
                if self.offences or self.enough(self.results.get(self.now) or ""):
                    break
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        self.offences += replaced(before)
        return True

    def pytest_internalerror(self, excinfo):
        self.offences.append(f"{excinfo.typename}: {excinfo.value}")

    def pytest_runtest_logstart(self, nodeid):
        self.now, self.depth, self.seconds[nodeid] = nodeid, 0, 0.0
        self.calls[nodeid], self.answered[nodeid] = set(), set()

    def pytest_runtest_makereport(self, item, call):
        """In place of pytest's report: a sentence, no traceback."""
        import pytest
        hint = self.sentence(item, call.excinfo) if call.excinfo else None
        return pytest.TestReport(item.nodeid, item.location, {}, "failed" if hint else "passed",
                                 hint, call.when, duration=call.duration)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.results[report.nodeid] = self.results.get(report.nodeid) or report.longrepr
        elif report.when == "call":
            self.results[report.nodeid] = None

    def guarded(self, name, function):
        """The function; that it was called, and that it returned, is noted."""
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(self.guarded(name, function.__func__))
        import pytest
        import torch

        @functools.wraps(function)
        def guarded(*args, **options):
            given = [x for x in (*args, *options.values())
                     if torch.is_tensor(x) and not x.is_inference()]
            versions = [x._version for x in given]
            self.calls[self.now].add(name)
            self.depth += 1
            try:
                answer = function(*args, **options)
            finally:
                self.depth -= 1

            if [x._version for x in given] != versions:
                pytest.fail("it changes an argument; work on a copy (x = x * 2, not x *= 2)")
            for kind in map(type, answer if isinstance(answer, tuple) else [answer]):
                if not genuine(kind):
                    pytest.fail(f"it returns an object of its own class, {kind.__name__}")
            self.answered[self.now].add(name)
            return answer
        return guarded

    def sentence(self, item, excinfo):
        """What went wrong, in a sentence."""
        import pytest
        error, text = excinfo.value, str(excinfo.value).strip()
        about = re.sub(r"\[.*|^test_", "", item.name).replace("_", " ")
        line = line_of(error, self.file)
        if isinstance(error, NotImplementedError) and (line or text.startswith("your turn")):
            return "not written yet"
        if isinstance(error, pytest.fail.Exception):
            due = text.startswith("DID NOT RAISE")
            return f"it should raise an error where {about}" if due else text.split("\n")[0]
        if isinstance(error, AssertionError) and not line:
            first = re.split(r"\n?assert |\n", text)[0]
            return first or f"it should hold that {about}, and it does not"
        return f"{type(error).__name__}{line}: {text.split(chr(10))[0] or 'where ' + about}"


def line_of(error, file):
    """" in line 4 of mine.py", the last line of the file that an error went through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f" in line {lines[-1]} of {Path(file).name}" if lines else ""


def genuine(kind):
    """Is this type Python's, torch's or ours, and not one of a student's file?"""
    if not kind.__flags__ & 1 << 9:          # built in
        return True
    module = sys.modules.get(kind.__module__)
    return getattr(module, kind.__qualname__, None) is kind and module.__name__ != STUDENTS


STUDENTS = "the_students_file"
WATCHED = re.compile(r"(__main__|builtins|os|math|torch|torch\.testing|torch\.nn\.functional|"
                     r"pytest|_pytest\.(runner|python|raises|python_api|reports|outcomes)|"
                     rf"conftest|test_.*|{'|'.join(CHAPTERS)})$")


def fingerprint():
    """{where: what} of all that decides on a result; a file that replaces any gets nothing."""
    found = {}
    for name, module in sys.modules.copy().items():
        if not WATCHED.match(name):
            continue
        found[name] = module
        for key, value in vars(module).copy().items():
            if not callable(value):
                continue
            found[f"{name}.{key}"] = value
            found[f"the code of {name}.{key}"] = getattr(value, "__code__", None)
            if isinstance(value, type) and value.__module__ == name:
                methods = vars(value).copy().items()
                found |= {f"{name}.{key}.{k}": v for k, v in methods if callable(v)}
    return found


def replaced(before):
    """What is no longer as it was, a list of at most one sentence; torch may wrap its own."""
    after = fingerprint()
    changed = [key for key, value in before.items() if after.get(key) is not value
               and "/torch/" not in file_of(after.get(key))]
    return [f"it replaces {changed[0]}"] if changed else []


def file_of(value):
    """Where a function or its code was written."""
    return getattr(getattr(value, "__code__", value), "co_filename", "").replace(os.sep, "/")


# ---------------------------------------------------------------- the process of one run


def child():
    """One trial: the job comes from stdin, the verdict goes to a file."""
    job = json.loads(sys.stdin.readline())
    secret, verdict = job.pop("secret"), Path(job.pop("verdict"))
    file, limit = job["file"], job["limit"]

    def finish():
        said = {key: {test: sorted(x) if isinstance(x, set) else x
                      for test, x in getattr(trial, key).copy().items()}
                for key in ("results", "calls", "answered", "seconds")}
        verdict.write_text(json.dumps({"secret": secret, "offences": trial.offences, **said}))

    def too_long():
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None and frame.f_code.co_filename != file:
            frame = frame.f_back
        where = f", in line {frame.f_lineno} of {Path(file).name}" if frame else ""
        trial.offences = [f"still running after {limit:.0f} seconds{where}: an endless loop?"]
        finish()
        os._exit(1)

    def load():
        timer = threading.Timer(limit, too_long)
        timer.daemon = True
        timer.start()
        if not file:                         # only note which test calls which function
            return {name: ours(name) for name in EXERCISES if name.split(".")[0] in sys.modules}
        try:
            return read_functions(Path(file), job["names"])
        except BaseException as error:
            trial.offences.append(f"it cannot be loaded: {type(error).__name__}"
                                  f"{line_of(error, file)}: {error}")
            return {}

    def watch(event, args):
        if event in FORBIDDEN and trial.depth:
            trial.offences.append("it starts or stops processes")
            raise RuntimeError("a function must not start or stop processes")

    trial = Trial(load, job["tests"], file)
    sys.addaudithook(watch)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource                      # what is printed into a variable has an end, too
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    trial.run(*(path for chapter in job["chapters"] for path in test_files(chapter)))
    finish()


def read_functions(path, names):
    """Run a student's file -> {name: function} for these names."""
    spec = importlib.util.spec_from_file_location(STUDENTS, path)
    module = sys.modules[STUDENTS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for name in names:
        value = module
        for step in name.split(".")[1:]:
            value = vars(value)[step]
        found[name] = value

    # its other exercises and its classes are ours again, so that a gap in one costs no other
    for name in written(path):
        if name not in names:
            key = name.split(".")[1]
            vars(module)[key] = vars(importlib.import_module(name.split(".")[0]))[key]
    return found


PRINTED_AT_MOST = 1 << 20                    # bytes


def examine(chapters, tests=None, path=None, names=(), limit=120.0):
    """One trial in a process of its own, in a copy without the bodies of these functions.

    -> what a Trial has after its run, as a dict; only its "offences" if it did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="coursework-") as folder:
        folder = Path(folder).resolve() / "copy"
        lay_out(folder, names, not_yours, copy=link)
        (folder / "extras").mkdir()
        shutil.copy(__file__, folder / "extras/coursework.py")
        file = path and str(shutil.copy(path, folder / "extras" / path.name))
        job = {"secret": secrets.token_hex(), "verdict": str(folder / "verdict.json"), "file": file,
               "names": names, "chapters": chapters, "tests": tests, "limit": limit}
        end = run_child(folder, json.dumps(job), limit + 10)
        try:
            verdict = json.loads((folder / "verdict.json").read_text())
        except (OSError, ValueError):
            verdict = {}
        return verdict if verdict.get("secret") == job["secret"] else {"offences": [end]}


def link(source, target):
    """A link to a folder, or a copy where links are not allowed."""
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


def run_child(folder, job, limit):
    """Run `child`, for a limited time and with limited output -> how it ended, a sentence."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = subprocess.Popen([sys.executable, str(folder / "extras/coursework.py"), "child"],
                               cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    printed, last = 0, b""

    def read():
        nonlocal printed, last
        while (chunk := process.stdout.read1(1 << 16)) and printed < PRINTED_AT_MOST:
            printed, last = printed + len(chunk), (last + chunk)[-500:]
        end()

    def end():
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with contextlib.suppress(OSError):
        process.stdin.write(job.encode() + b"\n")
        process.stdin.close()
    try:
        process.wait(limit)
        how = f"it ended Python itself (exit status {process.returncode})"
    except subprocess.TimeoutExpired:
        how = f"still running after {limit:.0f} seconds: an endless loop?"
    end()                                    # and whatever it left running
    reader.join(1)
    if printed >= PRINTED_AT_MOST:
        return "it prints without end"
    return f"{how} {last.decode(errors='replace').strip()}".strip()


# ---------------------------------------------------------------- grading


@dataclass
class Row:
    """One line of the table."""
    name: str
    passed: int = 0
    tests: int = 0
    points: float = 0.0
    together: str = "-"                      # does it work with the student's other functions?
    hint: str = "not in the file"


def written(path):
    """The exercises that a file defines, without running it.   ValueError if it is no Python."""
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"expected a Python file, NAME.py, got {path}; `stubs` writes one")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is no Python: {error}") from None
    found = set()
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else ()
        found |= {getattr(node, "name", "")}
        found |= {f"{node.name}.{getattr(method, 'name', '')}" for method in inner}
    chapters = [path.stem] if path.stem in CHAPTERS else CHAPTERS
    return [name for name in EXERCISES
            if name.split(".")[0] in chapters and name.split(".", 1)[1] in found]


def grade(paths, week=None, results=None):
    """Grade files -> Rows. The file `results` gets them as Gradescope reads them, zeros first."""
    asked = WEEKS[week - 1][1:] if week else EXERCISES
    write_results(results, [Row(name) for name in asked] if week else [])
    where = {name: Path(path).resolve() for path in paths for name in written(Path(path))
             if name in asked}
    if not where:
        raise ValueError(f"expected {f'functions of week {week}' if week else 'exercises'} in "
                         f"{', '.join(map(str, paths))}, got none; begin with `stubs`")
    rows = {name: Row(name) for name in asked if week or name in where}
    write_results(results, rows.values())

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(recorded, chapters_of(where)))
        passed = dict(zip(where, pool.map(lambda name: alone(rows[name], where[name]), where)))
        for path in {*where.values()}:
            together([rows[name] for name in where if where[name] == path and passed[name]],
                     passed, path)
    write_results(results, rows.values())
    return [*rows.values()]


@functools.cache
def recorded(chapter):
    """The verdict on our own functions: which test calls which function, and how long it takes."""
    verdict = examine([chapter])
    if verdict["offences"]:
        raise ValueError(f"expected the tests of {chapter}.py to run; {verdict['offences'][0]}")
    return verdict


def tests_of(name):
    """The tests that grade a function, those that call few other functions first."""
    known = recorded(name.split(".")[0])
    tests = [test for test, called in known["calls"].items()
             if name in called and known["results"].get(test, "no result") is None]
    return sorted(tests, key=lambda test: (len(known["calls"][test]), test))


def time_limit(tests, *chapters):
    """Seconds that these tests may take: four times what they take with our functions, and 4."""
    return 4 + 4 * sum(recorded(chapter)["seconds"].get(test, 0) for chapter in chapters
                       for test in tests)


def alone(row, path):
    """Grade one function, all others being ours: fill its row -> the tests that it passes."""
    chapter, tests = row.name.split(".")[0], tests_of(row.name)
    verdict = examine([chapter], tests, path, [row.name], time_limit(tests, chapter))
    row.tests = len(tests)
    if verdict["offences"]:
        row.hint = verdict["offences"][0]
        return []
    hints = {test: verdict["results"].get(test, "not run") for test in tests}
    passed = [test for test in tests if hints[test] is None]
    row.hint = next(filter(None, hints.values()), "all is well" if passed else "no test calls it")

    # whoever only raises errors raises the right ones by chance
    if not any(row.name in verdict["answered"][test] for test in passed):
        return []
    row.passed = len(passed)
    row.points = math.floor(10 * points(row.name) * len(passed) / len(tests)) / 10
    return passed


def together(rows, passed, path):
    """Do the tests that each function passes alone also pass with the others of its file?"""
    if len(rows) < 2:
        return
    names = [row.name for row in rows]
    tests = sorted({test for name in names for test in passed[name]})
    limit = time_limit(tests, *chapters_of(names))
    results = examine(chapters_of(names), tests, path, names, limit).get("results", {})
    for row in rows:
        all_pass = all(results.get(test, "not run") is None for test in passed[row.name])
        row.together = "yes" if all_pass else "no"


def write_results(path, rows):
    """Results as Gradescope reads them: tests with name, score, max_score and output."""
    if path is None:
        return
    tests = [{"name": row.name, "score": row.points, "max_score": points(row.name),
              "output": f"{row.passed} of {row.tests} tests: {row.hint}\n"
                        f"works with your other functions: {row.together}"} for row in rows]
    content = {"output": WHAT_IT_IS_NOT, "tests": tests} if rows else {"score": 0}
    Path(f"{path}.part").write_text(json.dumps(content, indent=1))
    os.replace(f"{path}.part", path)


def table(rows, width):
    """The rows as text."""
    names = max(len(row.name) for row in rows)
    lines = [f"{'function':<{names}}   tests  points  with your others  hint"]
    for row in rows:
        first, *more = textwrap.wrap(row.hint, max(40, width - names - 35)) or [""]
        lines.append(f"{row.name:<{names}} {row.passed:>3}/{row.tests:<3} {row.points:>4g}/"
                     f"{points(row.name):<3} {row.together:^16}  {first}")
        lines += [" " * (names + 35) + line for line in more]
    scored, most = sum(row.points for row in rows), sum(points(row.name) for row in rows)
    return "\n".join([*lines, f"{scored:g} of {most} points ({WHAT_IT_IS_NOT})"])


# ---------------------------------------------------------------- command line


def listing():
    """What `list` prints."""
    text = []
    for chapter in chapters_of(EXERCISES):
        text += ["", f"{chapter}.py"]
        for name in of_chapter(chapter, EXERCISES):
            paper, level = EXERCISES[name]
            week = f"week {week_of(name)}" if week_of(name) else ""
            text.append(f"  {name:<37} {level:<4} {paper:<28} {week}".rstrip())
    text += ["", "difficulty: * a line or two, ** some thought, *** an evening", "", "weeks:"]
    text += [f"  {week}  {title}" for week, (title, *_) in enumerate(WEEKS, start=1)]
    return "\n".join(text[1:])


def run(args):
    """One command -> its exit status."""
    if args.command == "grade":
        rows = grade(args.files, args.week, args.json)
        print(table(rows, shutil.get_terminal_size((110, 20)).columns), flush=True)
        return int(any(row.points < points(row.name) for row in rows))
    if args.command == "handout":
        hand_out(args.folder, args.week)
        print(f"wrote {args.folder}: week {args.week}, {WEEKS[args.week - 1][0]}")
    elif args.command == "stubs":
        names = dict.fromkeys([*args.names, *(WEEKS[args.week - 1][1:] if args.week else ())])
        if not names:
            raise ValueError("expected the names of exercises or --week N")
        print(stubs(names), flush=True)
    else:
        print(listing() if args.command == "list" else scheme(), flush=True)
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Coursework from our own source.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    week = dict(type=int, choices=range(1, len(WEEKS) + 1), help="a week of the course")
    commands.add_parser("list", help="show every exercise")
    commands.add_parser("scheme", help="show the marking scheme, one page of Markdown")
    command = commands.add_parser("stubs", help="write the text of a file of stubs")
    command.add_argument("names", nargs="*", metavar="NAME", help="such as diffusion.q_posterior")
    command.add_argument("--week", **week)
    command = commands.add_parser("handout", help="write a repository without the answers")
    command.add_argument("folder", metavar="FOLDER")
    command.add_argument("--week", required=True, **week)
    command = commands.add_parser("grade", help="grade a student's files", description=(
        f"Grade the exercises in these files: {WHAT_IT_IS_NOT}. Exit status 0 only if all points "
        "were scored, 1 if not, 2 if a file cannot be graded."))
    command.add_argument("files", nargs="+", metavar="FILE", help="stubs, or files of a hand-out")
    command.add_argument("--week", **week)
    command.add_argument("--json", metavar="FILE", help="write results in Gradescope's form, too")
    try:
        return run(parser.parse_args(arguments))
    except BrokenPipeError:                  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(child() if sys.argv[1:] == ["child"] else main())
