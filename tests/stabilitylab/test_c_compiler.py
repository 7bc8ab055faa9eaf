"""A change of a C file, or of a header that it includes, builds it anew."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from stabilitylab.c_compiler import built

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


def test_a_header_that_packages_share_is_included_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "bits.c"
    source.write_text(
        '#include "stabilitylab/formats/float_bits.h"\nuint32_t one(void) { return bits_of(1.0f); }\n'
    )
    assert ctypes.CDLL(str(built(source, ("-std=gnu11",)))).one() == 0x3F800000


def test_a_changed_header_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    source = tmp_path / "answer.c"
    source.write_text('#include <math.h>\n#include "outer.h"\nint answer(void) { return ANSWER; }\n')
    found = []
    for number in (1, 2, 1):
        (tmp_path / "inner.h").write_text(f"#define ANSWER {number}\n")
        path = built(source, ("-std=gnu11",))
        assert ctypes.CDLL(str(path)).answer() == number
        found.append(path)
    assert found[0] == found[2] != found[1]
