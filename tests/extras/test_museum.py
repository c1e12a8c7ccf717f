"""The suite's examination: the quick tests of a chapter notice every bug, and say what it is."""
import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "extras"))
import coursework  # noqa: E402
import museum  # noqa: E402


def test_the_museum_is_large_and_every_bug_is_one_change_of_our_source():
    rooms = collections.Counter(bug.function.split(".")[0] for bug in museum.BUGS.values())
    assert len(museum.BUGS) >= 120 and min(rooms[c] for c in coursework.CHAPTERS) >= 10, rooms
    for name, bug in museum.BUGS.items():
        assert callable(getattr(museum.broken(bug), "__func__", museum.broken(bug))), name
        assert 20 < len(bug.history) < 200 and bug.says, f"{name}: a line of history, and a name"


def test_a_change_of_the_chapter_that_a_bug_spoils_is_noticed():
    bug = museum.Bug("diffusion.guide", "uncond + scales", "uncond", "", "")
    with pytest.raises(ValueError, match="once in diffusion.guide, found it 0 times"):
        museum.broken(bug)


@pytest.mark.long
@pytest.mark.parametrize("name", museum.BUGS)
def test_the_chapters_quick_tests_notice_the_bug_and_name_it(name):
    messages = [message for _, message in museum.examine(name)]
    assert messages, f"no quick test fails with {name}: {museum.BUGS[name].wrong!r}"
    says = museum.BUGS[name].says
    assert any(says in message for message in messages), f"{says!r} is in none of {messages}"


@pytest.mark.slow
def test_images_of_a_harmless_change_are_equal(tmp_path, monkeypatch):
    harmless = museum.Bug("unclip.slerp", "(1 - fraction) * a", "a * (1 - fraction)", "", "")
    monkeypatch.setitem(museum.BUGS, "harmless", harmless)
    assert "both rows are equal" in museum.images("harmless", tmp_path / "x.png")


def test_the_command_lists_them_and_shows_one(capsys):
    museum.main([])
    assert all(name in capsys.readouterr().out for name in ["variance_times_noise"])
    museum.main(["the_other_convention"])
    said = capsys.readouterr().out
    assert "- uncond + scale * (cond - uncond)" in said and "Ho & Salimans" in said
    with pytest.raises(SystemExit, match="2"):
        museum.main(["no_such_bug"])
