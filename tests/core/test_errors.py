"""One line of an error, for a report or a message."""

from keysync_jax.core.errors import KeySyncError, first_line, in_one_line


def test_the_first_line_that_says_something():
    assert first_line(ValueError("\n  no such mesh \nmore")) == "no such mesh"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
    assert first_line(ValueError("abcdef"), 3) == "abc"


def test_others_errors_bear_their_type():
    assert in_one_line(KeySyncError("x.mp4 is missing")) == "x.mp4 is missing"
    assert in_one_line(ValueError("bad\nworse")) == "ValueError: bad"
    assert in_one_line(ValueError("bad"), 8) == "ValueErr"
    assert in_one_line(MemoryError()) == "MemoryError"
