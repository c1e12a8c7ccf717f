"""The suite as a teacher: every planted bug is seen and named, and our own functions pass."""
import ast
import gc
import re
import subprocess
import sys
from pathlib import Path

import bugs
import coursework
import grading
import pytest
import torch

import clip
import diffusion

TESTS = Path(__file__).parent


def grade(impl, *tests, path=bugs.__file__, slow=False, seconds=20.0):
    """Run these tests with the functions swapped in -> the Grader."""
    grader = grading.Grader(impl, path, slow, seconds)
    pytest.main(["-x", "-p", "no:terminal", "-p", "no:cacheprovider",
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
