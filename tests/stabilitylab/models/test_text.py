"""Text in blocks, tokens in windows: none lost, none twice, limits kept."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from stabilitylab.models.text import BLOCK, TokenWindows, read_text

letters = TokenWindows(encode=lambda text: [ord(c) for c in text], predicts=True)
framed = TokenWindows(encode=lambda text: [ord(c) for c in text], before=(1,), after=(2,), predicts=False)


def flat(windows) -> list[int]:
    return [token for window in windows for token in window.inputs["input_ids"][0].tolist()]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.text("abc\n", max_size=30), max_size=8),
    length=st.integers(2, 12),
    limit=st.none() | st.integers(0, 60),
)
def test_windows_are_the_text_cut(parts, length, limit):
    found = list(letters(iter(parts), length, limit))
    text = "".join(parts)
    tokens = flat(found)
    assert tokens == [ord(c) for c in text[: len(tokens)]]
    assert all(window.tokens == length for window in found[:-1])
    wanted = len(text) if limit is None else min(limit, len(text))
    # A rest of one token has nothing to predict.
    assert wanted - 1 <= len(tokens) <= wanted
    for window in found:
        assert window.targets_BT[0, :-1].tolist() == window.inputs["input_ids"][0, 1:].tolist()
        assert window.targets_BT[0, -1] == -100


@settings(max_examples=60, deadline=None)
@given(text=st.text("abc", max_size=60), length=st.integers(3, 12), limit=st.none() | st.integers(0, 60))
def test_every_window_has_its_frame_within_the_length(text, length, limit):
    found = list(framed(iter([text]), length, limit))
    assert all(w.inputs["input_ids"][0, [0, -1]].tolist() == [1, 2] for w in found)
    assert all(w.tokens <= length for w in found)
    assert limit is None or sum(w.tokens for w in found) <= limit
    if limit is None:
        assert [t for t in flat(found) if t > 2] == [ord(c) for c in text]


def test_a_file_is_read_in_blocks_that_end_before_a_line(tmp_path):
    text = ("a line of text\n\n" * 7 + "x" * 100 + "\n") * 1000
    file = tmp_path / "long.txt"
    file.write_text(text)
    blocks = list(read_text(file))
    assert "".join(blocks) == text
    assert len(blocks) > 2
    assert all(block.endswith("\n") for block in blocks)
    assert all(not block.startswith("\n") for block in blocks)
    assert max(map(len, blocks)) <= 2 * BLOCK


def test_a_stream_is_read_only_as_far_as_needed():
    def endless():
        while True:
            yield "the cat sat\n"

    assert len(list(islice(letters(endless(), 10, None), 5))) == 5
    assert len(flat(letters(endless(), 10, 95))) == 95


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "gives .* no window of tokens: give a longer text"),
        (b" ", "no window of tokens"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "does not exist"),
    ],
    ids=["empty", "no tokens", "bytes", "missing"],
)
def test_texts_that_give_nothing_are_refused(saved, tmp_path, content, said):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    model = open_text_model(saved["llama"])
    with pytest.raises(InputError, match=said):
        list(model.windows(file))


def test_lengths_that_do_not_fit_are_refused(saved):
    model = open_text_model(saved["bert"])
    with pytest.raises(InputError, match="at most 48 tokens at once, got a length of 49"):
        next(model.windows(["the cat"], 49))
    with pytest.raises(InputError, match="length of at least 3"):
        next(model.windows(["the cat"], 2))
    with pytest.raises(InputError, match="within 2 tokens"):
        next(model.windows(["the cat"], 10, 2))
    with pytest.raises(InputError, match="is a folder"):
        next(model.windows(Path("/")))
