"""The suite as a teacher: every planted bug is seen and named, and our own functions pass."""
import ast
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import bugs
import coursework
import grading
import pytest

import clip
import diffusion

TESTS = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.long]     # they run the suite within the suite


def grade(impl, *tests, path=bugs.__file__, slow=False, seconds=20.0, stop=True):
    """Run these tests with the functions swapped in -> the Grader."""
    grader = grading.Grader(impl, path, slow, seconds)
    pytest.main([*["-x"] * stop, "-p", "no:terminal", "-p", "no:cacheprovider",
                 *(str(TESTS / t) for t in tests)], plugins=[grader])
    return grader


# ---------------------------------------------------------------- the museum


def test_the_museum_is_large_enough_and_every_exhibit_has_its_line():
    assert len(bugs.BUGS) >= 30
    for name, bug in bugs.BUGS.items():
        assert 20 < len(bug.history) < 200, f"{name}: a line of history"
        assert coursework.source(bug.replaces), bug.replaces


@pytest.mark.parametrize("name", bugs.BUGS)
def test_the_suite_sees_every_bug_and_names_the_mistake(name):
    bug = bugs.BUGS[name]
    grader = grade({bug.replaces: bug.function}, bug.test, slow=True)
    hints = [hint for hint in grader.results.values() if hint]
    assert grader.results, f"{bug.test} is not among the tests that call {bug.replaces}"
    assert hints, f"{bug.test} passes with {name} in place of {bug.replaces}"
    assert bug.says in " ".join(hints), f"the hint should say {bug.says!r}, says {hints[0]!r}"


# ---------------------------------------------------------------- stubs


@pytest.mark.parametrize("name", coursework.EXERCISES)
def test_a_stub_keeps_signature_and_docstring_and_no_body(name):
    tree = ast.parse(coursework.stubs([name]))
    for part in coursework.functions(name):
        ours, node = coursework.source(part)[2], tree
        for step in part.split(".")[1:]:
            node = next(n for n in node.body if getattr(n, "name", None) == step)
        for what in ("args", "decorator_list"):
            got, want = (getattr(f, what) for f in (node, ours))
            assert [*map(ast.dump, [got] if what == "args" else got)] == \
                [*map(ast.dump, [want] if what == "args" else want)]
        assert ast.get_docstring(node) == ast.get_docstring(ours)
        assert ast.unparse(node.body[-1]) == "raise NotImplementedError('your turn')"
        assert len(node.body) == 1 + bool(ast.get_docstring(ours))


def most_specific(n):
    """The n most specific tests of each exercise."""
    return sorted({test for tests in coursework.graded_by().values() for test in tests[:n]})


def written(names, path, solve=False):
    path.write_text(coursework.stubs(names, solve=solve), encoding="utf-8")
    return coursework.load(path)


def test_every_exercise_is_graded_and_a_blank_one_fails(tmp_path):
    path, tests = tmp_path / "mine.py", coursework.graded_by()
    assert all(tests.values()), [name for name in tests if not tests[name]]
    grader = grade(written(coursework.EXERCISES, path), *most_specific(1), path=path, stop=False)
    right = [test for test, hint in grader.results.items() if hint is None]
    assert not right, f"these pass although what they call is blank: {right}"
    assert len({grading.test_name(test) for test in grader.results}) == len(most_specific(1))
    assert "not written yet" in grader.results.values()


def test_our_own_functions_pass_as_a_students_file(tmp_path):
    path = tmp_path / "mine.py"
    impl = written(coursework.EXERCISES, path, solve=True)
    assert len(impl) >= len(coursework.EXERCISES)
    grader = grade(impl, *most_specific(1), path=path, stop=False)
    wrong = {test: hint for test, hint in grader.results.items() if hint}
    assert not wrong and len(grader.results) >= len(most_specific(1))


# ---------------------------------------------------------------- sentences in place of tracebacks

SLIPS = {
    "raise KeyError('w')": "KeyError in line 4 of mine.py: 'w'",
    "return None": "it returns nothing (None) where ours returns a float64 tensor of shape (3, 2",
    "return (uncond + scale * (cond - uncond))[0]": "tensor of shape (2, 4, 4) where ours",
    "return (uncond + scale * (cond - uncond)).float()": "a float32 tensor of shape (3, 2, 4, 4",
    "cond -= uncond; return uncond + scale * cond": "it changes an argument",
    "return cond.mul_(scale)": "it changes an argument",
    "return cond + scale * (cond - uncond)": "scale 0 ignores the caption",
    "while True: pass": "still running after 1 seconds, in line 4 of mine.py: an endless loop?",
    "raise NotImplementedError": "not written yet",
    "return uncond * float('nan')": "not finite",
}


@pytest.mark.parametrize("body", SLIPS)
def test_a_students_slip_is_a_sentence(body, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"import torch\n\ndef guide(uncond, cond, scale):\n    {body}\n")
    grader = grade(coursework.load(path), "test_diffusion.py", path=path, seconds=1.0, stop=False)
    (name, passed, count, hint), = grader.table()
    assert name == "diffusion.guide" and passed < count, (passed, count)
    assert SLIPS[body] in hint and "Traceback" not in hint and "\n" not in hint, hint


@pytest.mark.parametrize("text, says", [
    ("def guide(:", "mine.py cannot be run, see line 1: SyntaxError"),
    ("x = 1\n1 / 0", "mine.py cannot be run, see line 2: ZeroDivisionError"),
    ("def helper():\n    pass", "defines none of our functions"), (None, "there is no file")])
def test_a_file_that_cannot_be_graded_is_refused_in_a_sentence(tmp_path, text, says):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=says):
        coursework.load(tmp_path / "mine.py")


WHOSE_FAULT = {
    "a root forgotten in what another calls": ("""
import diffusion
from diffusion import like

def predict_eps(alphabar, x_t, t, x0):
    return (x_t - like(alphabar[t].sqrt(), x_t) * x0) * like(1 - alphabar[t], x_t)

def ddim_invert_step(alphabar, x_t, t, u, x0):
    diffusion.q_posterior(alphabar, x0, x_t, u, t)
    eps = diffusion.predict_eps(alphabar, x_t, t, x0)
    return like(alphabar[u].sqrt(), x_t) * x0 + like((1 - alphabar[u]).sqrt(), x_t) * eps
""", {"diffusion.predict_eps": ".", "diffusion.ddim_invert_step": "fails with diffusion.predict"}),
    "an error that another must raise": ("""
import diffusion
from diffusion import like

def predict_eps(alphabar, x_t, t, x0):
    return (x_t - like(alphabar[t].sqrt(), x_t) * x0) * like((1 - alphabar[t]).rsqrt(), x_t)

def ddim_invert_step(alphabar, x_t, t, u, x0):
    eps = diffusion.predict_eps(alphabar, x_t, t, x0)
    return like(alphabar[u].sqrt(), x_t) * x0 + like((1 - alphabar[u]).sqrt(), x_t) * eps
""", {"diffusion.predict_eps": None, "diffusion.ddim_invert_step":
      r"diffusion.ddim_invert_step with .*t = 4, u = 3.* should raise ValueError$"}),
    "a dtype seen far away": ("""
import torch, clip

def eps_weight(config, alphabar, t):
    return torch.ones(len(t)).double()

def crop_pair(high, low, crop, generator=None, share=(0, 1)):
    raise NotImplementedError
""", {"decoder.eps_weight": "no test of its own, it is called by decoder.Decoder.loss; it returns "
      "a float64 tensor .* where ours returns a float32", "decoder.crop_pair": "not written yet"}),
}


@pytest.mark.parametrize("case", WHOSE_FAULT)
def test_a_hint_stands_once_and_at_the_function_that_is_wrong(case, tmp_path):
    path, (text, wanted) = tmp_path / "mine.py", WHOSE_FAULT[case]
    path.write_text(text)
    grader = grade(coursework.load(path), "test_diffusion.py", "test_decoder.py", path=path,
                   stop=False)
    rows = {name: (passed, count, hint) for name, passed, count, hint in grader.table()}
    graded = coursework.graded_by()
    for name, says in wanted.items():
        passed, count, hint = rows[name]
        if says is None:
            assert hint == "" or hint.startswith("fails with"), hint
        else:
            assert passed < count and re.match(says, hint) and hint, (name, hint)
        if name in graded and "ddim" not in name:
            ours = [t for t in graded[name] if t.startswith(("test_diffusion", "test_decoder"))]
            assert count == len(ours), f"{name}: the stub says {len(ours)} of these, got {count}"
    hints = [hint for _, _, hint in rows.values() if hint and not hint.startswith("fails with")]
    assert len(hints) == len(set(hints)), hints


def test_another_wording_of_an_error_is_as_good_as_ours(tmp_path):
    (tmp_path / "mine.py").write_text("""import diffusion

def spaced_timesteps(T, K):
    if not 1 <= K <= T:
        raise ValueError("no")
    times, at = [], 0.0
    for _ in range(K):
        times.append(1 + round(at))
        at += (T - 1) / max(K - 1, 1)
    return times if K > 1 else [T]
""")
    path = tmp_path / "mine.py"
    grader = grade(coursework.load(path), "test_diffusion.py", path=path, stop=False)
    assert "test_diffusion.py::test_bad_input_stops_with_a_sentence" in {
        grading.test_name(test) for test in grader.results}
    assert not any(grader.results.values()), grader.results


def test_tests_of_the_readme_grade_nobody():
    class Names:
        def pytest_collection_finish(self, session):
            self.found = {grading.test_name(item.nodeid) for item in session.items}
    names = Names()
    grader = grading.Grader({"diffusion.like": diffusion.like}, "mine.py", slow=True)
    pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", "--collect-only", str(TESTS)],
                plugins=[grader, names])
    assert any(n.startswith("test_unclip") for n in names.found)
    assert not any(n.startswith("test_readme") or "karlo_needs" in n for n in names.found)


def test_a_function_without_a_test_of_its_own_is_said_to_have_none():
    assert coursework.callers("decoder.eps_weight") == ["decoder.Decoder.loss"]
    assert "clip.CLIP.scale" in coursework.callers("clip.CLIP.__init__")
    assert "# decoder.eps_weight: -, no test of its own" in coursework.stubs(["decoder.eps_weight"])


def test_the_list_may_be_cut_by_head():
    reader, writer = os.pipe()
    os.close(reader)                                                # head has gone
    out = subprocess.run([sys.executable, str(TESTS / "coursework.py"), "--list"], stdout=writer,
                         stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert out.returncode == 0 and not out.stderr, out.stderr


def test_the_command_prints_a_table_and_nothing_of_a_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import diffusion\n\ndef guide(uncond, cond, scale):\n"
                                      "    return uncond + scale * (cond - uncond)\n\n"
                                      "def simple_loss(eps_hat, eps):\n    return eps.mean(1)\n")
    out = subprocess.run([sys.executable, "-m", "pytest", f"--impl={tmp_path / 'mine.py'}",
                          "-k", "guidance_at or perfect_network"], cwd=TESTS.parent,
                         capture_output=True, text=True)
    assert out.returncode == 1 and "Traceback" not in out.stdout, out.stdout
    assert re.search(r"diffusion.guide +1/1 +all is well", out.stdout), out.stdout
    assert re.search(r"diffusion.simple_loss +0/1 +E eps\^2, a number for", out.stdout), out.stdout


# ---------------------------------------------------------------- swapping


def test_a_swap_reaches_every_place_that_holds_our_function():
    """Who holds a function itself, and not the chapter's name for it, would go on using ours."""
    for name in coursework.EXERCISES:
        for part in coursework.functions(name):
            owner, attribute = coursework.home(part)
            ours = vars(owner)[attribute]
            with coursework.swapped({part: lambda *_: None}):
                held = [d for d in gc.get_referrers(ours) if isinstance(d, dict)
                        and d.get("__name__") in coursework.CHAPTERS]
                assert vars(owner)[attribute] is not ours and not held, part
            assert vars(owner)[attribute] is ours, part
    new = lambda *_: None                                                     # noqa: E731
    with coursework.swapped({"clip.unit": new, "diffusion.cosine_alphabar": new}):
        assert coursework.chapter("prior.").unit is new is diffusion.SCHEDULES["cosine"]
    assert coursework.chapter("prior.").unit is clip.unit


def test_a_class_that_calls_super_may_take_our_classs_place(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch.nn as nn\n\nclass Attention(nn.Module):\n"
        "    def __init__(self, channels, head_channels, context_width, groups=32):\n"
        "        super().__init__()\n        self.mine = True\n")
    with coursework.swapped(coursework.load(tmp_path / "mine.py")):
        assert coursework.chapter("decoder.").Attention(32, 8, 0).mine


# ---------------------------------------------------------------- which test grades what


def test_the_map_of_tests_and_exercises_is_true():
    """All quick tests are on it and no others, and for a file of tests it is measured again."""
    class Names:
        def pytest_collection_modifyitems(self, items):
            self.quick = {grading.test_name(item.nodeid) for item in items
                          if not item.get_closest_marker("slow") and not grading.is_ours(item)}
    names, recorder, mend = Names(), grading.Recorder(), "run pytest --touches and commit the file"
    options = ["-p", "no:terminal", "-p", "no:cacheprovider"]
    pytest.main([*options, "--collect-only", str(TESTS)], plugins=[names])
    known = coursework.touches()
    assert names.quick == set(known), f"{mend}: {sorted(names.quick ^ set(known))[:5]}"
    pytest.main([*options, str(TESTS / "test_prior.py")], plugins=[recorder])
    for test, called in recorder.by_test.items():
        assert sorted(called) == known[test], f"{mend}: {test} calls {called ^ set(known[test])}"


def test_the_list_shows_every_exercise_and_five_weeks():
    text = coursework.listing()
    for name in coursework.EXERCISES:
        assert re.search(rf"^  {re.escape(name)} .*\*.* [1-9]\d* tests", text, re.M), name
    assert len(coursework.WEEKS) == 5
    for _, *names in coursework.WEEKS:
        assert len(names) >= 5 and set(names) <= set(coursework.EXERCISES)


@pytest.mark.parametrize("words", [[], ["diffusion.nothing"], ["guide"], ["os.remove"]])
def test_what_is_no_exercise_is_refused_in_a_sentence(words, capsys):
    assert coursework.main(words) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: expected") and said.err.count("\n") == 1


@pytest.mark.parametrize("name, says", [("variance_times_noise", "pixels differ"),
                                        ("bound_in_nats", "both rows are equal")])
def test_a_bug_is_drawn_beside_the_right_pictures(name, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bugs, "CAPTIONS", bugs.CAPTIONS[:1])
    assert bugs.main([name, "-o", str(tmp_path / "bug.png")]) == 0
    assert says in capsys.readouterr().out and (tmp_path / "bug.png").stat().st_size > 5000
    assert bugs.main(["no_such_bug"]) == 2
