"""What is no UTF-8 is named, with what to do."""

import bz2
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_sgl.batch.files import encoding
from tests.unit.batch.files.test_input import good

LINE = good(1).decode()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        *((LINE.encode(codec), "UTF-16") for codec in ("utf-16", "utf-16-le", "utf-16-be")),
        *((LINE.encode(codec), "UTF-32") for codec in ("utf-32", "utf-32-le", "utf-32-be")),
        (bz2.compress(LINE.encode()), "bzip2"),
        (lzma.compress(LINE.encode()), "xz"),
        (b"\x28\xb5\x2f\xfd\0\0", "zstd"),
        (b"PK\x03\x04\0\0", "zip"),
    ],
)
def test_the_beginning_of_a_file_tells(content: bytes, name: str) -> None:
    what_to_do = encoding.what_to_do(content[: encoding.NUM_BYTES])
    assert what_to_do is not None and name in what_to_do and "\n" not in what_to_do


@given(st.text())
def test_utf8_is_taken(text: str) -> None:
    content = ('{"a": "' + text).encode(errors="ignore")
    for start in (content, b"\xef\xbb\xbf" + content, b"\r\n" + content):
        assert encoding.what_to_do(start[: encoding.NUM_BYTES]) is None
        assert encoding.of_text(start) is None


@pytest.mark.parametrize(
    ("codec", "name", "argument"),
    [("latin-1", "Latin-1", "LATIN1"), ("cp1252", "Windows-1252", "Windows-1252")],
)
def test_a_line_of_another_encoding(codec: str, name: str, argument: str) -> None:
    text = {"latin-1": "caf\u00e9", "cp1252": "\u201ccaf\u00e9\u201d"}[codec].encode(codec)
    what_to_do = encoding.of_text(text)
    assert what_to_do is not None
    assert f"is not UTF-8 but, it seems, {name} (byte 0x" in what_to_do
    assert f"iconv -f {argument} -t UTF-8" in what_to_do


def test_a_file_without_a_beginning() -> None:
    assert encoding.what_to_do(b"") is None
    assert encoding.what_to_do(bytes(4)) is None
    assert not encoding.is_gzip(b"")
