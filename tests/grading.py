"""Our tests run on a student's functions: `pytest --impl mine.py`.

The functions are put in the place of ours (coursework.swapped), the tests that call them are run,
and a table says how many pass and what the first mistake seems to be. Nobody sees a traceback: an
exception, a wrong shape or dtype, a changed argument and an endless loop are one sentence each.

    pytest --impl mine.py            the quick tests that call these functions
    pytest --impl mine.py --slow     and all that train or draw with the committed weights
    pytest --touches                 find out which test calls which function -> tests/touches.json
"""
import contextlib
import copy
import functools
import json
import os
import re
import signal
import textwrap

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: idle threads sleep, not spin


def pytest_addoption(parser):
    group = parser.getgroup("coursework")
    group.addoption("--impl", metavar="FILE", help="grade the functions in this file: ours are "
                    "replaced by them (stubs: python tests/coursework.py)")
    group.addoption("--slow", action="store_true", help="with --impl: the slow tests too")
    group.addoption("--impl-seconds", type=float, default=20.0, metavar="S", help="with --impl: "
                    "what a test may take (of CPU time) before it is called an endless loop")
    group.addoption("--touches", action="store_true", help="write tests/touches.json: which quick "
                    "test calls which exercise")


def pytest_configure(config):
    option = config.getoption
    if option("impl"):
        import coursework
        try:
            impl = coursework.load(option("impl"))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        config.pluginmanager.register(Grader(impl, option("impl"), option("slow"),
                                             option("impl_seconds")))
    if option("touches"):
        config.pluginmanager.register(Recorder(write=True))


def test_name(nodeid):
    """tests/test_clip.py::test_x[a-b] -> test_clip.py::test_x"""
    return nodeid.split("[")[0].rsplit("/", 1)[-1]


# ---------------------------------------------------------------- grading


class Grader:
    """A pytest plugin: swaps {name: function} in, runs the tests that call them, and says why not.

    After the run, `results` is {test id: None or the first hint}. diagnose: compare each answer
    with ours in shape and dtype, which costs twice the time; done for a test that failed.
    """

    def __init__(self, impl, path, slow=False, seconds=20.0, diagnose=False):
        self.impl, self.path, self.slow, self.seconds = impl, os.path.abspath(path), slow, seconds
        self.diagnose, self.results, self.plain, self.hung = diagnose, {}, {}, set()

    def pytest_configure(self, config):
        config.option.tbstyle, config.option.reportchars = "native", ""      # the quickest to make

    def pytest_sessionfinish(self, session):
        session.config.option.tbstyle = "no"                                 # and shown to nobody

    def calls(self, nodeid):
        """Which of the functions this test grades."""
        test = test_name(nodeid)
        return [name for name, tests in self.grades.items() if test in tests]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        import coursework
        self.touches, graded_by = coursework.touches(), coursework.graded_by(wide=self.slow)
        quick = {test_name(i.nodeid) for i in items if not i.get_closest_marker("slow")}
        self.grades = {}
        for name in self.impl:                     # of no exercise it is unknown: all quick tests
            exercise = next((e for e in graded_by if f"{name}.".startswith(f"{e}.")), None)
            self.grades[name] = {*graded_by.get(exercise, quick)}
            if self.slow:
                self.grades[name] |= {test_name(i.nodeid) for i in items} - quick
        keep = [item for item in items if self.calls(item.nodeid)
                and item.path.name != "test_coursework.py"]                # it grades by itself
        config.hook.pytest_deselected(items=[item for item in items if item not in keep])
        items[:] = keep

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self):
        import coursework
        with coursework.swapped({name: guard(name, f, self.diagnose)
                                 for name, f in self.impl.items()}):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        for name in self.hung & {*self.calls(item.nodeid)}:
            pytest.fail(f"not run, as {name} did not come to an end before")
        with self.limit():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with self.limit():
            return (yield)

    @contextlib.contextmanager
    def limit(self):
        """Fail a test that takes too much CPU time (so a busy machine is no one's fault)."""
        if not hasattr(signal, "setitimer"):                           # Windows: no limit
            yield
            return

        def stop(number, frame):
            while frame is not None and frame.f_code.co_filename != self.path:
                frame = frame.f_back
            where = f", in line {frame.f_lineno} of {os.path.basename(self.path)}" if frame else ""
            while frame is not None:
                self.hung |= {name for name, f in self.impl.items() if
                              getattr(getattr(f, "__func__", f), "__code__", 0) is frame.f_code}
                frame = frame.f_back
            pytest.fail(f"still running after {self.seconds:g} seconds{where}: an endless loop?")

        before = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            report.longrepr, plain = self.sentence(item, call.excinfo)
            if self.results.get(item.nodeid) is None:
                self.results[item.nodeid], self.plain[item.nodeid] = report.longrepr, plain
        elif report.when == "call" and report.passed:
            self.results.setdefault(item.nodeid, None)
        return report

    def sentence(self, item, excinfo):
        """What went wrong, in a sentence; and whether that is all there is to say."""
        error, text = excinfo.value, str(excinfo.value).strip()
        kind = type(error).__name__
        mine = [e for e in excinfo.traceback if str(e.path) == self.path]
        what = test_name(item.nodeid).split("::")[1].removeprefix("test_").replace("_", " ")
        if isinstance(error, NotImplementedError) and mine:
            return "not written yet", True
        if isinstance(error, pytest.fail.Exception):
            text = text.replace("DID NOT RAISE", "bad input should raise")
            return text.split("\n")[0], not text.startswith("bad input")
        if isinstance(error, AssertionError) and not mine:
            if text.startswith("Regex pattern did not match"):
                wanted = re.search(r"regex: (.*)", text, re.I)
                return f"the error's message should say {wanted[1] if wanted else what}", True
            lines = [line for line in re.split(r"\nassert |\n +[+-] ", text)[0].split("\n") if line]
            if lines and not lines[0].startswith("assert "):
                return "; ".join(line.strip() for line in lines[:2]), False
            return f"it should hold that {what}, and it does not", False
        first = text.split("\n")[0]
        if mine:
            return (f"{kind} in line {mine[-1].lineno + 1} of {os.path.basename(self.path)}: "
                    f"{first}"), True
        return f"{what}: what it returned led to a {kind}: {first}", False

    # ---- the table

    def first_hint(self, name):
        """The hint of the most specific test that failed; or, if it has one, a plainer reason."""
        failed = [test for test, hint in self.results.items() if hint and name in self.calls(test)]
        failed.sort(key=lambda test: ("not run" in self.results[test],
                                      len(self.touches.get(test_name(test), "unknown")) // 4))
        if not failed or self.plain[failed[0]]:
            return self.results[failed[0]] if failed else ""
        looking = Grader(self.impl, self.path, self.slow, self.seconds, diagnose=True)
        pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", str(self.root / failed[0])],
                    plugins=[looking])
        found = [hint for hint in looking.results.values() if hint and "where ours" in hint]
        return found[0] if found else self.results[failed[0]]

    def table(self):
        """[(function, tests passed, tests that grade it, first hint)]"""
        rows = []
        for name in self.impl:
            mine = [test for test in self.results if name in self.calls(test)]
            passed = sum(self.results[test] is None for test in mine)
            rows.append((name, passed, len(mine), self.first_hint(name)))
        return rows

    def pytest_sessionstart(self, session):
        self.root = session.config.rootpath

    def pytest_terminal_summary(self, terminalreporter):
        write, width = terminalreporter.write_line, terminalreporter._tw.fullwidth
        if self.diagnose:
            return
        names = max(len(name) for name in self.impl)
        write(f"\n{'function':<{names}}  passed   first hint", bold=True)
        for name, passed, count, hint in self.table():
            lines = textwrap.wrap(hint or ("all is well" if count else "no test calls it"),
                                  max(30, width - names - 11))
            write(f"{name:<{names}}  {passed:>3}/{count:<3}  {lines[0]}",
                  green=passed == count, red=passed < count)
            for line in lines[1:]:
                write(" " * (names + 11) + line)


def guard(name, function, diagnose):
    """The function, failing with a sentence if it changes an argument; and, to diagnose, if its
    answer is of another shape or dtype than ours."""
    import coursework
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(guard(name, function.__func__, False))
    owner, attribute = coursework.home(name)
    ours = vars(owner)[attribute]

    @functools.wraps(function)
    def guarded(*args, **options):
        given = [x for x in (*args, *options.values()) if hasattr(x, "_version")]
        before = [x._version for x in given]
        with reference(ours, args, options) if diagnose else contextlib.nullcontext() as want:
            answer = function(*args, **options)
        if any(x._version != v for x, v in zip(given, before)):
            pytest.fail("it changes an argument; work on a copy (x = x * 2, not x *= 2)")
        if diagnose and (complaint := differs(answer, want and want())):
            pytest.fail(complaint)
        return answer

    return guarded


@contextlib.contextmanager
def reference(ours, args, options):
    """Copies of the arguments and of all randomness, made before the student's function runs:
    -> a function that gives our answer to the same question, and leaves no trace."""
    import torch

    def spare(x):
        return x.detach().clone() if torch.is_tensor(x) else copy.copy(x)

    sources = [x for x in (*args, *options.values()) if isinstance(x, torch.Generator)]
    args = [x if isinstance(x, torch.Generator) else spare(x) for x in args]
    options = {k: x if isinstance(x, torch.Generator) else spare(x) for k, x in options.items()}
    states = [torch.get_rng_state(), *(x.get_state() for x in sources)]

    def put(states):
        torch.set_rng_state(states[0])
        for x, state in zip(sources, states[1:]):
            x.set_state(state)

    def answer():
        after = [torch.get_rng_state(), *(x.get_state() for x in sources)]
        put(states)
        try:
            return ours(*args, **options)
        except Exception:
            return None                                      # ours refuses: nothing to compare
        finally:
            put(after)

    yield answer


def differs(got, want):
    """How an answer differs in kind from ours, a sentence; "" if it does not, or ours is None."""
    import torch

    def kind(x):
        if torch.is_tensor(x):
            return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
        if isinstance(x, (tuple, list)):
            return f"{type(x).__name__} of {len(x)}"
        return "nothing (None)" if x is None else type(x).__name__

    if want is None or callable(want):
        return ""
    if isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)) and len(got) == len(want):
        return next(filter(None, map(differs, got, want)), "")
    if torch.is_tensor(want) and torch.is_tensor(got):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"it returns {kind(got)} where ours returns {kind(want)}"
        if want.is_floating_point() and want.isfinite().all() and not got.isfinite().all():
            return "it returns numbers that are not finite where ours are"
        return ""
    if torch.is_tensor(want) != torch.is_tensor(got) or isinstance(want, (tuple, list)):
        return f"it returns {kind(got)} where ours returns {kind(want)}"
    return ""


# ---------------------------------------------------------------- which test calls which function


class Recorder:
    """A pytest plugin: which exercises each quick test calls, itself or by its fixtures."""

    def __init__(self, write=False):
        self.write, self.called, self.by_test, self.by_fixture = write, set(), {}, {}

    def pytest_collection_modifyitems(self, config, items):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self):
        import coursework
        names = [part for name in coursework.EXERCISES for part in coursework.functions(name)]
        with coursework.swapped({name: self.noting(name) for name in names}):
            return (yield)

    def noting(self, name):
        import coursework
        owner, attribute = coursework.home(name)
        ours = vars(owner)[attribute]
        plain = getattr(ours, "__func__", ours)

        @functools.wraps(plain)
        def noting(*args, **options):
            self.called.add(name)
            return plain(*args, **options)
        return type(ours)(noting) if plain is not ours else noting

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        outer, self.called = self.called, set()
        try:
            return (yield)
        finally:
            self.by_fixture.setdefault((fixturedef.baseid, fixturedef.argname), set()).update(
                self.called)
            self.called |= outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.called = set()
        result = yield
        for name in item.fixturenames:                       # one that was set up for another test
            for fixture in item._fixtureinfo.name2fixturedefs.get(name, ()):
                self.called |= self.by_fixture.get((fixture.baseid, fixture.argname), set())
        self.by_test.setdefault(test_name(item.nodeid), set()).update(self.called)
        return result

    def lines(self):
        """{test: exercises} as JSON, a line for each test."""
        rows = [f" {json.dumps(test)}: {json.dumps(sorted(names))}"
                for test, names in sorted(self.by_test.items())]
        return "{\n" + ",\n".join(rows) + "\n}\n"

    def pytest_sessionfinish(self, exitstatus):
        import coursework
        if self.write and exitstatus == 0:
            coursework.TOUCHES.write_text(self.lines())
