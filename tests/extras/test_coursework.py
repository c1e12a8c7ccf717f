"""The grader is fair and is not fooled; stubs and hand-outs hold no answer."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "extras"))
import coursework  # noqa: E402

RIGHT = """
import torch
import diffusion
from diffusion import expand

def q_posterior(alphabar, x0, x_t, t, s):
    late, early = torch.as_tensor(t), torch.as_tensor(s)
    if not ((0 <= early) & (early < late) & (late < len(alphabar))).all():
        raise ValueError("another wording")
    a, b, c = alphabar[t], alphabar[s], alphabar[t] / alphabar[s]
    from_x0, from_xt = b.sqrt() * (1 - c) / (1 - a), c.sqrt() * (1 - b) / (1 - a)
    var = (1 - c) * (1 - b) / (1 - a)
    return expand(from_x0, x_t) * x0 + expand(from_xt, x_t) * x_t, expand(var, x_t)
"""


def grade(tmp_path, text, *options, name="mine.py"):
    """Grade a file as the command does -> (exit status, {function: its entry in the JSON})."""
    path, results = tmp_path / name, tmp_path / "results.json"
    path.write_text(text)
    status = coursework.main(["--grade", str(path), "--json", str(results), *options])
    return status, {test["name"]: test for test in json.loads(results.read_text())["tests"]}


def some_long(cases, quick):
    """Test parameters, of which all but the quick ones are long."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]


# ---------------------------------------------------------------- fair


def test_a_right_function_gets_all_points_and_exit_status_0(tmp_path, capsys):
    status, rows = grade(tmp_path, RIGHT)
    row, said = rows["diffusion.q_posterior"], capsys.readouterr().out
    assert status == 0 and row["score"] == row["max_score"] == 10, row
    assert coursework.WHAT_IT_IS_NOT in said and "all is well" in said


SLIPS = {
    "raise KeyError('w')": "KeyError in line 3 of mine.py: 'w'",
    "cond -= uncond; return uncond + scale * cond": "it changes an argument",
    "return cond + scale * (cond - uncond)": "Ho & Salimans",
    "raise NotImplementedError": "not written yet",
}


@pytest.mark.parametrize("body", some_long(SLIPS, ["raise KeyError('w')"]))
def test_a_slip_is_a_sentence(body, tmp_path, capsys):
    status, rows = grade(tmp_path, f"\ndef guide(uncond, cond, scale):\n    {body}\n")
    row = rows["diffusion.guide"]
    assert status == 1 and row["score"] < row["max_score"], row
    assert re.search(SLIPS[body], row["output"]), row
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("week", range(1, 6))
def test_our_own_chapters_get_full_marks(week):
    """Handed in as a student hands in the files of a hand-out."""
    files = [ROOT / f"{c}.py" for c in coursework.chapters_of(coursework.WEEKS[week - 1][1:])]
    rows = coursework.grade(files, week)
    bad = [row for row in rows if row.points < coursework.points(row.name) or row.together == "no"]
    assert not bad, bad


@pytest.mark.long
def test_a_gap_costs_only_its_own_points(tmp_path):
    """Week 1 with one body taken out: five functions score in full, the unwritten one nothing."""
    text = coursework.without("diffusion", ["diffusion.cosine_alphabar"])
    status, rows = grade(tmp_path, text, "--week", "1", name="diffusion.py")
    gap = rows.pop("diffusion.cosine_alphabar")
    assert status == 1 and gap["score"] == 0 and "not written yet" in gap["output"], gap
    assert len(rows) == 5 and all(r["score"] == r["max_score"] for r in rows.values()), rows


def test_every_exercise_has_tests():
    alone = [name for name in coursework.EXERCISES if not coursework.tests_of(name)]
    assert not alone, f"no quick test of its chapter calls {alone}"


# ---------------------------------------------------------------- and not fooled

BODY = "\ndef q_posterior(alphabar, x0, x_t, t, s):\n    "
END, FAKE = BODY + "return 1, 1", "lambda *a, **k: True"
TOP = "import torch, numpy, typing\nimport diffusion\n"
TRICKS = {                                   # name: (the file, what the hint says)
    "the answer is kept": (TOP + "_ours = diffusion.q_posterior" + BODY
                               + "return _ours(alphabar, x0, x_t, t, s)", "it calls our function"),
    "the report hook is replaced": (f"import __main__\n__main__.Trial.sentence = {FAKE}" + END,
                                    "__main__ in line 1"),
    "Python ends at the top": ("import os\nos._exit(0)" + END, "os._exit in line 2"),
    "sys.exit at the top": ("raise SystemExit" + END, "cannot be loaded: SystemExit in line 1"),
    "Python ends in the body": (BODY + "import os; os._exit(0)", "os in line 3"),
    "SystemExit in the body": (BODY + "raise SystemExit(0)", "SystemExit in line 3 of mine.py"),
    "an endless loop": (BODY + "while True: pass", "line 3 of mine.py: an endless loop"),
    "an endless loop at the top": ("while True: pass" + END, "line 1 of mine.py: an endless"),
    "a fork": (BODY + "diffusion.math.os.fork()", "os in line 3"),
    "printing without end": (BODY + "while True: print('*' * 1000)", "line 3 of mine.py: an end"),
    # and some that issue 22 does not name
    "an object that agrees": ("class Yes:\n    __abs__ = lambda self: 0" + END, "__abs__ in"),
    "a tensor that agrees": (TOP + "class Yes(torch.Tensor): pass" + BODY + "return Yes(1), 1",
                             "of its own class"),
    "errors alone": (BODY + "raise ValueError('expected s < t')", "ValueError in line 3"),
    "a test that is skipped": (BODY + "import pytest; pytest.skip('later')", "pytest in line 3"),
    "the run is ended": (BODY + "raise KeyboardInterrupt", "KeyboardInterrupt"),
    "torch finds all equal": (TOP + f"torch.equal = {FAKE}" + END, "torch.equal in line 3"),
    "... as a method": (TOP + f"class A:\n    def f(self): self.allclose = {FAKE}\nA.f(torch)"
                        + END, "self.allclose in line 4"),
    "pytest.approx": ("from _pytest import python_api as p\np.approx = 1" + END, "_pytest in"),
    "numpy's": (TOP + f"setattr(numpy, 'allclose', {FAKE})" + END, "setattr in line 3"),
    "a module's names": (TOP + f"vars(torch)['equal'] = {FAKE}" + END, "vars in line 3"),
    "sys.modules": ("import sys\ns = sys\ns.modules['pytest'] = 1" + END, "sys in line 2"),
    "sys.settrace": (TOP + "torch.sys.settrace(print)" + END, "sys in line 3"),
    "atexit": ("from torch import os\nos.register_at_fork()" + END, "os in line 1"),
    "a thread": ("import threading" + END, "threading in line 1"),
    "the frames above": (BODY + "try: 1 / 0\n    except Exception as e: e.__traceback__",
                         "e.__traceback__ in line 4"),
    "a generator's frame": (BODY + "g = (g.gi_frame for _ in [1]); next(g)", "gi_frame in line 3"),
    "the source is read": (TOP + "exec(open(diffusion.__file__).read())" + END, "in line 3"),
    "inspect": (BODY + "import inspect; inspect.getsource(q_posterior)", "inspect in line 3"),
    "an annotation": (TOP + "typing.get_type_hints(1)" + END, "get_type_hints in line 3"),
    "match": (BODY + "match x0:\n        case object(__class__=c): pass", "__match__ in line 3"),
    "a file is written": (TOP + "numpy.ones(1).tofile('tests/test_diffusion.py')" + END,
                          "no exercise needs: open"),
    "the arguments are zeros": (BODY + "for a in (x0, x_t): a.data.zero_()\n    return x0, 0",
                                "it changes an argument"),
    "in another exercise": ("def guide(u, c, s):\n    import os; os._exit(0)\ng = guide" + BODY
                            + "g(x0, x_t, 1)", "."),
}


@pytest.mark.parametrize("trick", some_long(TRICKS, [name for name, (_, hint) in TRICKS.items()
                                             if re.search(" in line .$", hint)]))
def test_no_trick_scores_a_point(trick, tmp_path, capsys):
    text, hint = TRICKS[trick]
    status, rows = grade(tmp_path, text)
    row, said = rows["diffusion.q_posterior"], capsys.readouterr().out
    assert status == 1 and row["score"] == 0, f"{trick}: exit status {status}, {row}"
    assert re.search(hint, row["output"]), row
    assert "diffusion.q_posterior" in said and "Traceback" not in said, said


def test_zeros_are_written_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(coursework, "alone", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grade(tmp_path, RIGHT, "--week", "1")
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert len(tests) == 6 and {test["score"] for test in tests} == {0}
    assert {*tests[0]} == {"name", "score", "max_score", "output"}, "Gradescope's names"


@pytest.mark.parametrize("text, says", [("def guide(:", "is no Python: .*line 1"),
                                        ("x = 1", "got none"), (None, "expected a Python file")])
def test_what_cannot_be_graded_is_a_sentence_and_exit_status_2(text, says, tmp_path, capsys):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        coursework.main(["--grade", str(tmp_path / "mine.py")])
    assert re.search(rf"^error: .*{says}.*\n$", capsys.readouterr().err)


# ---------------------------------------------------------------- stubs, hand-outs, the scheme


def test_a_stub_keeps_signature_and_docstring_and_no_body():
    for name in coursework.EXERCISES:
        node, ours = ast.parse(coursework.stubs([name])), coursework.source(name)
        for step in name.split(".")[1:]:
            node = next(n for n in node.body if getattr(n, "name", None) == step)
        assert ast.dump(node.args) == ast.dump(ours.args), name
        assert [*map(ast.dump, node.decorator_list)] == [*map(ast.dump, ours.decorator_list)], name
        assert ast.get_docstring(node) == ast.get_docstring(ours), name
        assert re.match("raise NotImplementedError..your turn", ast.unparse(node.body[-1])), name
        assert len(node.body) == 1 + bool(ast.get_docstring(ours)), name


def test_a_name_given_twice_is_cut_once():
    for name in ("diffusion.q_posterior", "diffusion.ddim_step"):
        assert coursework.stubs([name, name]) == coursework.stubs([name]), "the next one is eaten"


@pytest.mark.parametrize("week", range(1, 6))
def test_a_hand_out_holds_no_answer(week, tmp_path):
    """No distinctive line of a missing body stands anywhere in it."""
    coursework.hand_out(tmp_path / "out", week)
    everything = "\n".join(path.read_text() for path in (tmp_path / "out").rglob("*.py"))
    there = {line.strip() for line in everything.splitlines()}
    ours = "\n".join((ROOT / f"{chapter}.py").read_text() for chapter in coursework.CHAPTERS)
    for name in [name for _, *names in coursework.WEEKS[week - 1:] for name in names]:
        first, last = coursework.body_lines(name)
        body = coursework.parsed(name.split(".")[0])[0][first - 1:last]
        left = [line for line in map(str.strip, body)
                if len(line) > 30 and line in there and ours.count(line) == 1]
        assert not left, f"{name}: the hand-out still holds {left}"
        assert f": {name}, {coursework.EXERCISES[name][0]}" in everything, "the paper's section"
    assert not list((tmp_path / "out").rglob("*.pyc")) and not (tmp_path / "out/extras").exists()
    with pytest.raises(ValueError, match="does not exist yet"):
        coursework.hand_out(tmp_path / "out", week)


@pytest.mark.long
@pytest.mark.parametrize("week", range(1, 6))
def test_with_the_bodies_written_the_hand_outs_own_tests_pass(week, tmp_path):
    out, later = tmp_path / "out", [name for _, *names in coursework.WEEKS[week:] for name in names]
    coursework.hand_out(out, week)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    touched = [f"tests/test_{c}.py" for c in coursework.chapters_of(coursework.WEEKS[week - 1][1:])]
    blank = subprocess.run([*command, "-x", *touched], cwd=out, capture_output=True, text=True)
    assert blank.returncode == 1 and f"your turn, in week {week}" in blank.stdout, blank.stdout
    for chapter in coursework.CHAPTERS:
        (out / f"{chapter}.py").write_text(coursework.without(chapter, later))
    written = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert written.returncode == 0, written.stdout[-3000:]


def test_five_weeks_a_list_and_a_scheme(capsys):
    assert len(coursework.WEEKS) == 5
    for _, *names in coursework.WEEKS:
        assert 5 <= len(names) <= 7 and set(names) <= set(coursework.EXERCISES)
    assert coursework.main(["--list"]) == coursework.main(["--scheme"]) == 0
    said = capsys.readouterr().out
    assert all(f"`{name}`" in said for name in coursework.EXERCISES)
    assert said.count("| **total** |") == 10


def test_what_is_no_exercise_is_refused_and_the_list_may_be_cut_by_head(capsys):
    for words in (["--stubs", "diffusion.nothing"], ["--stubs", "os.remove"], ["--handout", ""],
                  ["--list", "--json", "x.json"], ["--scheme", "--week", "2"]):
        with pytest.raises(SystemExit, match="2"):
            coursework.main(words)
        assert re.match("error: expected|usage: ", capsys.readouterr().err)
    reader, writer = os.pipe()
    os.close(reader)
    out = subprocess.run([sys.executable, str(ROOT / "extras/coursework.py"), "--list"],
                         stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert out.returncode == 1 and not out.stderr, out.stderr
