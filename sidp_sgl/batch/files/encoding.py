"""How an input's bytes are written: UTF-8, as it is or in gzip, is read; what else it is, is said.

Pure.
"""

_GZIP = b"\x1f\x8b"
_COMPRESSIONS = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
_MARKS = {  # the longer one first: UTF-32's little-endian mark begins like UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
NUM_BYTES = 8  # that tell


def is_gzip(start: bytes) -> bool:
    return start.startswith(_GZIP)


def what_to_do(start: bytes) -> str | None:
    """With an input that begins so; None where it may be UTF-8."""
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            return f"is compressed with {name}: decompress it, or use gzip"
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return f"is {name}: {_convert(name)}"
    # Without a mark: JSON begins with ASCII, which leaves zeros.
    if b"\0" in start and start.strip(b"\0"):
        name = "UTF-32" if start.count(b"\0") > len(start) // 2 else "UTF-16"
        return f"is {name}: {_convert(name)}"
    return None


def of_text(text: bytes) -> str | None:
    """What to do with a line that is not UTF-8; None where it is."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        # Windows-1252 has characters where Latin-1 has none.
        name = "Windows-1252" if any(0x80 <= byte < 0xA0 for byte in text) else "Latin-1"
        where = f"byte 0x{text[error.start]:02X} at column {error.start + 1}"
        return f"is not UTF-8 but, it seems, {name} ({where}): {_convert(name)}"
    return None


def _convert(name: str) -> str:
    codec = "LATIN1" if name == "Latin-1" else name
    return f"convert the file, for example with iconv -f {codec} -t UTF-8"
