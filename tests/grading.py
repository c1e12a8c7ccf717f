"""Our tests run on a student's functions: `pytest --impl mine.py`.

The functions are put in the place of ours (coursework.swapped), the tests that call them are run,
and a table says how many pass and what the first mistake seems to be. Nobody sees a traceback: an
exception, a wrong shape or dtype, a changed argument and an endless loop are one sentence each.

    pytest --impl mine.py            the quick tests that call these functions
    pytest --impl mine.py --slow     and all that train or draw with the committed weights
    pytest --touches                 find out which test calls which function -> tests/touches.json
    pytest --long                    our own suite with the tests that take long
"""
import contextlib
import copy
import functools
import inspect
import json
import os
import re
import signal
import textwrap

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch; see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def pytest_addoption(parser):
    group = parser.getgroup("coursework")
    group.addoption("--impl", metavar="FILE", help="grade the functions in this file: ours are "
                    "replaced by them (stubs: python tests/coursework.py)")
    group.addoption("--slow", action="store_true", help="with --impl: the slow tests too")
    group.addoption("--impl-seconds", type=float, default=20.0, metavar="S", help="with --impl: "
                    "what a test may take (of CPU time) before it is called an endless loop")
    group.addoption("--touches", action="store_true", help="write tests/touches.json: which quick "
                    "test calls which exercise")
    group.addoption("--long", action="store_true", help="run the tests that are marked long too; "
                    "without it they run if their file or name is given")


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


def is_ours(item):
    """Is this a test of what no student writes: the README's numbers?"""
    return item.get_closest_marker("ours") is not None


def pytest_collection_modifyitems(config, items):
    """`pytest` alone takes three minutes, not ten."""
    if not config.getoption("long") and config.args_source is config.ArgsSource.TESTPATHS:
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def test_name(nodeid):
    """tests/test_clip.py::test_x[a-b] -> test_clip.py::test_x"""
    return nodeid.split("[")[0].rsplit("/", 1)[-1]


# ---------------------------------------------------------------- grading


class Grader:
    """A pytest plugin: swaps {name: function} in, runs the tests that call them, and says why not.

    After the run, `results` is {test id: None or the first hint} and `blamed` {test id: function},
    where it is known whose fault it is. An error's type is graded, not its wording. diagnose:
    compare each answer with ours, which costs some times the time; done for tests that failed.
    """

    def __init__(self, impl, path, slow=False, seconds=20.0, diagnose=False):
        self.impl, self.path, self.slow, self.seconds = impl, os.path.abspath(path), slow, seconds
        self.diagnose, self.results, self.blamed, self.hung = diagnose, {}, {}, set()
        self.fresh()

    def fresh(self):
        """Before a test: nothing known yet of the calls of the student's functions in it."""
        self.running, self.last, self.fault = [], "", None      # fault: found by a guard
        self.suspects, self.comparing = {False: None, True: None}, False

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
        items[:], ours = ([item for item in items if is_ours(item) == yes] for yes in (False, True))
        quick = {test_name(i.nodeid) for i in items if not i.get_closest_marker("slow")}
        self.grades, self.instead = {}, {}
        for name in self.impl:
            exercise = next((e for e in graded_by if f"{name}.".startswith(f"{e}.")), None)
            if exercise is None:
                self.instead[name] = coursework.callers(name)
            self.grades[name] = {test for e in self.instead.get(name, [exercise])
                                 for test in graded_by[e]}
            if self.slow:
                self.grades[name] |= {test_name(i.nodeid) for i in items} - quick
        keep = [item for item in items if self.calls(item.nodeid)
                and item.path.name != "test_coursework.py"]                # it grades by itself
        config.hook.pytest_deselected(items=ours + [item for item in items if item not in keep])
        items[:] = keep

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self):
        import coursework
        raises = pytest.raises
        with coursework.swapped({name: self.guard(name, f) for name, f in self.impl.items()}), \
                pytest.MonkeyPatch.context() as patch:
            patch.setattr(pytest, "raises", lambda *a, match=None, **options: raises(*a, **options))
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        self.fresh()
        for name in self.hung & {*self.calls(item.nodeid)}:
            self.fault = name
            pytest.fail(f"not run, as {name} did not come to an end before")
        with self.limit():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with self.limit():
            return (yield)

    def owner(self, code):
        """The name of the student's function that this code belongs to, or None."""
        return next((name for name, f in self.impl.items()
                     if getattr(getattr(f, "__func__", f), "__code__", 0) is code), None)

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
                if name := self.owner(frame.f_code):
                    self.hung.add(name)
                    self.fault = self.fault or name                    # the innermost
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
            report.longrepr = self.sentence(item, call.excinfo)
            if self.results.get(item.nodeid) is None:
                raised = [self.owner(e.frame.code.raw) for e in call.excinfo.traceback]
                raised = next(filter(None, reversed(raised)), None)
                certain, drawn = self.suspects[False], self.suspects[True]
                self.results[item.nodeid] = report.longrepr
                self.blamed[item.nodeid] = self.fault or certain or raised or drawn
        elif report.when == "call" and report.passed:
            self.results.setdefault(item.nodeid, None)
        return report

    def sentence(self, item, excinfo):
        """What went wrong, in a sentence."""
        error, text = excinfo.value, str(excinfo.value).strip()
        kind = type(error).__name__
        mine = [e for e in excinfo.traceback if str(e.path) == self.path]
        what = test_name(item.nodeid).split("::")[1].removeprefix("test_").replace("_", " ")
        if isinstance(error, NotImplementedError) and mine:
            return NOT_WRITTEN
        if isinstance(error, pytest.fail.Exception):
            if text.startswith("DID NOT RAISE"):
                wanted = "ValueError" if "ValueError" in text else text.split("'")[1]
                return f"{self.last or 'bad input'} should raise {wanted}"
            return text.split("\n")[0]
        if isinstance(error, AssertionError) and not mine:
            lines = [line for line in re.split(r"\nassert |\n +[+-] ", text)[0].split("\n") if line]
            if lines and not lines[0].startswith("assert "):
                return "; ".join(line.strip() for line in lines[:2])
            return f"it should hold that {what}, and it does not"
        first = text.split("\n")[0]
        if mine:
            return (f"{kind} in line {mine[-1].lineno + 1} of {os.path.basename(self.path)}: "
                    f"{first}")
        return f"{what}: what it returned led to a {kind}: {first}"

    def guard(self, name, function):
        """The function, failing with a sentence if it changes an argument; and, to diagnose, if its
        answer is of another shape or dtype than ours. One with other numbers is a suspect."""
        import coursework
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(self.guard(name, function.__func__))
        owner, attribute = coursework.home(name)
        ours = vars(owner)[attribute]
        compare = self.diagnose and not isinstance(ours, (classmethod, staticmethod))

        @functools.wraps(function)
        def guarded(*args, **options):
            given = [x for x in (*args, *options.values()) if hasattr(x, "_version")]
            before = [x._version for x in given]
            comparing = compare and not self.comparing
            self.running.append(name)
            try:
                with reference(ours, args, options) if comparing else no_reference() as want:
                    answer = function(*args, **options)
            finally:
                self.running.pop()
            if any(x._version != v for x, v in zip(given, before)):
                self.fault = name
                pytest.fail("it changes an argument; work on a copy (x = x * 2, not x *= 2)")
            if not self.running:
                self.last = a_call(name, ours, args, options)
            if comparing:
                self.comparing = True
                (right, drawn), self.comparing = want(), False
                if complaint := differs(answer, right):
                    self.fault = name
                    pytest.fail(complaint)
                if unlike(answer, right):
                    self.suspects[drawn] = self.suspects[drawn] or name
            return answer

        return guarded

    # ---- the table

    def failed(self, name):
        """Its failed tests, the most specific ones first."""
        tests = [test for test, hint in self.results.items() if hint and name in self.calls(test)]
        return sorted(tests, key=lambda test: ("not run" in self.results[test], len(
            self.touches.get(test_name(test), "unknown")) // 4))

    def look_closer(self):
        """The most specific failed tests once more, each answer beside ours: whose fault is it?"""
        closer = {test for name in self.impl for test in [
            test for test in self.failed(name)
            if self.results[test] != NOT_WRITTEN and self.blamed[test] not in self.hung][:8]}
        if not closer:
            return
        looking = Grader(self.impl, self.path, self.slow, self.seconds, diagnose=True)
        pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider",
                     *(str(self.root / test) for test in sorted(closer))], plugins=[looking])
        for test in closer:
            hint, name = looking.results.get(test), looking.blamed.get(test)
            if hint and "where ours" in hint:
                self.results[test] = hint
            self.blamed[test] = name or self.blamed[test] or min(        # else the most specific
                self.calls(test), key=lambda name: len(self.grades[name]))

    def first_hint(self, name):
        """What is wrong with this function; or which other's fault it is that its tests fail."""
        mine = [test for test in [*self.failed(name), *self.results] if self.results[test]
                and self.blamed[test] == name]
        others = [self.blamed[test] for test in self.failed(name) if self.blamed[test]]
        return self.results[mine[0]] if mine else f"fails with {others[0]}" if others else ""

    def table(self):
        """[(function, tests passed, tests that grade it, first hint)]"""
        self.look_closer()
        rows = []
        for name in self.impl:
            mine = [test for test in self.results if name in self.calls(test)]
            wrong = {test_name(test) for test in mine if self.results[test]}
            count, hint = len({*map(test_name, mine)}), self.first_hint(name)
            if name in self.instead:
                known = ", ".join(self.instead[name]) or "nothing we grade"
                hint = f"no test of its own, it is called by {known}" + f"; {hint}" * bool(hint)
            rows.append((name, count - len(wrong), count, hint))
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


def a_call(name, ours, args, options):
    """A call in words: "diffusion.ddim_step with x_t (2, 3), t = 4, s = 3, eta = 1.5"."""
    import torch

    def show(key, x):
        if torch.is_tensor(x):
            few = x.numel() < 4 and x.device.type == "cpu"
            return f"{key} = {x.tolist()}" if few else f"{key} {tuple(x.shape)}"
        return f"{key} = {x!r:.40}" if isinstance(x, (int, float, str, type(None))) else key
    given = inspect.signature(getattr(ours, "__func__", ours)).bind(*args, **options).arguments
    words = [show(key, x) for key, x in given.items() if key not in ("self", "cls")]
    return f"{name} with {', '.join(words)}" if words else name


@contextlib.contextmanager
def no_reference():
    yield None


@contextlib.contextmanager
def reference(ours, args, options):
    """Copies of the arguments and of all randomness, made before the student's function runs:
    -> a function that gives our answer to the same question (REFUSED if it is a ValueError, None if
    unknown) and whether it drew random numbers, and leaves no trace."""
    import torch

    def spare(x):
        if torch.is_tensor(x):
            return x.detach().clone()
        try:
            return copy.deepcopy(x) if isinstance(x, torch.nn.Module) else copy.copy(x)
        except Exception:                                    # holds what cannot be copied so
            return copy.copy(x)

    sources = [x for x in (*args, *options.values()) if isinstance(x, torch.Generator)]
    args = [x if isinstance(x, torch.Generator) else spare(x) for x in args]
    options = {k: x if isinstance(x, torch.Generator) else spare(x) for k, x in options.items()}

    def states():
        return [torch.get_rng_state(), *(x.get_state() for x in sources)]

    def put(states):
        torch.set_rng_state(states[0])
        for x, state in zip(sources, states[1:]):
            x.set_state(state)

    before = states()

    def answer():
        after, right = states(), None
        put(before)
        try:
            right = ours(*args, **options)
        except ValueError:
            right = REFUSED
        except Exception:
            pass                                             # nothing to compare
        drawn = any((a != b).any() for a, b in zip(before, states()))
        put(after)
        return right, drawn

    yield answer


NOT_WRITTEN, REFUSED = "not written yet", object()


def unlike(got, want):
    """Are these other numbers? (Of what cannot be compared nothing is said.)"""
    import torch
    if want is REFUSED:
        return True
    if torch.is_tensor(want) and torch.is_tensor(got) and not want.is_meta:
        if not want.is_floating_point():
            return not torch.equal(got, want)
        exact = {torch.float64: 1e-10, torch.float32: 1e-5}.get(want.dtype, 2e-2)
        size = want.detach().abs().nan_to_num(0, 0, 0).max().item() if want.numel() else 0.0
        return not torch.allclose(got, want, rtol=exact, atol=exact * size, equal_nan=True)
    if isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)):
        return len(got) != len(want) or any(map(unlike, got, want))
    return isinstance(want, (bool, int, float, str, bytes)) and got != want


def differs(got, want):
    """How an answer differs in kind from ours, a sentence; "" if it does not, or ours is None."""
    import torch

    def kind(x):
        if torch.is_tensor(x):
            return f"a {str(x.dtype).removeprefix('torch.')} tensor of shape {tuple(x.shape)}"
        if isinstance(x, (tuple, list)):
            return f"{type(x).__name__} of {len(x)}"
        return "nothing (None)" if x is None else type(x).__name__

    if want is None or want is REFUSED or callable(want):
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
        left = [item for item in items if item.get_closest_marker("slow") or is_ours(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]

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
