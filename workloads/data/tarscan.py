"""The header scan: what a tar shard holds and where, without reading the pixels.

Headers are read directly, 512 bytes each, which is several times faster than `tarfile`
and gives exact offsets. USTAR, GNU long names and PAX are understood. Nothing that a
shard holds can make the scan fail: what is wrong is set aside in `Scan.quarantined`.

A sample is what WebDataset says it is: consecutive members that share the path up to the first dot of the
basename. Members without a dot, hidden files and `__meta__` are not part of any sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from workloads.data.sources import open_scan

BLOCK = 512
MAX_NAME_BYTES = 1 << 16  # a long-name record above this is an attack or garbage
MAX_PADDING = 1 << 20  # zeros after the end mark; tar itself pads to 10 KiB
MAX_LABEL = 1_000_000  # classes are counted up to the largest label: one wrong digit must not cost all memory
VIDEO_SUFFIXES = ("mp4", "avi", "mov", "mkv", "webm")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "pgm", "ppm", "tif", "tiff")

PRIMARY = ("image", "video", "nii.gz", "nii", "npy", "txt")  # what a sample can be about, the likeliest first

_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # webdataset's base_plus_ext
_META_NAME = re.compile(r"(?:.*/)?__[^/]*__(?:/.*)?", re.DOTALL)


class Member(NamedTuple):
    """One regular file of the archive, or what is wrong with it."""

    name: str
    offset: int  # of its header
    data: int  # offset of its content
    size: int
    fault: str = ""


class TornError(Exception):
    """The archive cannot be read beyond this point."""

    def __init__(self, member: str, offset: int, why: str) -> None:
        super().__init__(member, offset, why)
        self.member, self.offset, self.why = member, offset, why


@dataclass
class Scan:
    """The samples of one shard, and `member at offset N: why` of everything set aside.

    Attributes:
        keys: the name that the members of a sample share.
        offsets: of each sample's first header.
        labels: -1 where there is none.
        members: by name of the member (see `member_name`): number of the sample -> offset and length of the content.
        quarantined: what is not among the samples, and why.
    """

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    members: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)

    def require(self, name: str) -> None:
        """Sets aside the samples without this member."""
        have = self.members.get(name, {})
        if len(have) == len(self.keys):
            return
        number = {old: new for new, old in enumerate(sorted(have))}
        for i in set(range(len(self.keys))) - have.keys():
            got = ", ".join(other for other, rows in self.members.items() if i in rows) or "no content"
            self.quarantined.append(f"{self.keys[i]} at offset {self.offsets[i]}: no {name}, got {got}")
        for column in ("keys", "offsets", "labels"):
            values = getattr(self, column)
            setattr(self, column, [values[i] for i in number])
        self.members = {
            other: {number[i]: place for i, place in rows.items() if i in number}
            for other, rows in self.members.items()
        }


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Regular files of a tar archive of `size` bytes, in their order.

    Raises:
        TornError: the archive ends too early, or what follows is no tar header.
    """
    offset = start = 0  # of a header, and of the first header of its member: a long name comes before
    long_name, pax_size = "", ""
    while offset + BLOCK <= size:
        file.seek(offset)
        header = file.read(BLOCK)
        if not any(header):
            _expect_end(file, offset + BLOCK, size)
            return
        kind, name, length = header[156:157], _text(header[:100]), _number(header[124:136])
        if length is None or not _checksum_fits(header):
            hint = "; it is compressed: decompress it" if header[:2] == b"\x1f\x8b" else ""
            raise TornError("-", offset, f"expected a tar header, got other bytes{hint}")
        if header[257:263] == b"ustar\0" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        data = offset + BLOCK
        if kind in (b"L", b"x", b"K", b"g"):  # a record on the member that follows
            if length > MAX_NAME_BYTES:
                raise TornError(name, offset, f"got a name of {length} bytes, expected at most {MAX_NAME_BYTES}")
            record = file.read(length)
            if kind == b"L":
                long_name = _text(record)
            elif kind == b"x":
                pax = _pax(record)
                long_name, pax_size = pax.get("path", long_name), pax.get("size", "")
        else:
            name, length = long_name or name, int(pax_size) if pax_size.isdecimal() else length
            long_name, pax_size = "", ""
        if data + length > size:
            raise TornError(name, start, f"truncated: got {size - data} of {length} bytes")
        offset = data + -(-length // BLOCK) * BLOCK
        if kind in (b"L", b"x", b"K", b"g"):
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(name, start, data, length, "its path climbs out of the archive" if _climbs(name) else "")
        elif kind != b"5":  # a folder
            yield Member(name, start, data, length, f"a link or special file (type {kind.decode('latin1')!r})")
        start = offset
    raise TornError("-", min(offset, size), "truncated: the archive has no end mark")


def _expect_end(file: BinaryIO, offset: int, size: int) -> None:
    """Zeros may be padding, or the hole that a broken download left; what follows must not get lost silently."""
    if size - offset > MAX_PADDING or any(file.read(size - offset)):
        raise TornError("-", offset, f"got {size - offset} bytes after the end mark, expected padding")


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _number(raw: bytes) -> int | None:
    if raw[0] == 0x80:  # base 256, GNU's way beyond 8 GiB
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0") or b"0"
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _checksum_fits(header: bytes) -> bool:
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * 32


def _pax(record: bytes) -> dict[str, str]:
    """`length key=value\\n` records; what does not follow that form ends the list."""
    found = {}
    while (match := re.match(rb"(\d{1,6}) ([^=]+)=", record)) and len(match[0]) <= int(match[1]) <= len(record):
        end = int(match[1])
        found[_text(match[2])] = _text(record[match.end() : end - 1])
        record = record[end:]
    return found


def _climbs(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` -> ("a/b", "seg.png"); None where the member belongs to no sample."""
    match = _SAMPLE_NAME.fullmatch(name)
    return None if match is None or _META_NAME.fullmatch(name) else (match[1], match[2].lower())


def member_name(suffix: str, taken: Iterable[str] = ()) -> str:
    """The one name of all image formats, the one of all video formats, else the suffix itself: `seg.png`, `txt`."""
    name = "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else suffix
    return suffix if name in taken else name


def scan(path: str, num_classes: int | None = None) -> Scan:
    """Finds the samples of one shard.

    Args:
        path: a tar file, local or remote.
        num_classes: labels must be below it; None when it is not known.

    Raises:
        OSError: the file cannot be read.
    """
    result = Scan()
    seen: set[str] = set()
    opened, size = open_scan(path)
    with opened as file:
        for key, group, fault in _groups(file, size, result.quarantined):
            first = next(iter(group.values()))
            label, why = _read_label(file, group.get("cls"), num_classes)
            if key in seen:
                why = "duplicate key"
            if fault or why:
                result.quarantined.append(f"{key} at offset {first.offset}: {fault or why}")
                continue
            seen.add(key)
            named: dict[str, Member] = {}
            for suffix, member in group.items():
                if suffix != "cls":
                    named[member_name(suffix, named)] = member
            for name, member in named.items():
                result.members.setdefault(name, {})[len(result.keys)] = (member.data, member.size)
            result.keys.append(key)
            result.offsets.append(first.offset)
            result.labels.append(label)
    return result


def _groups(file: BinaryIO, size: int, quarantined: list[str]) -> Iterator[tuple[str, dict[str, Member], str]]:
    """(key, members by suffix, what is wrong) of each sample; members that are none go to `quarantined`."""
    key: str = ""
    group: dict[str, Member] = {}
    previous: set[str] = set()  # suffixes of the sample before
    try:
        for member in members(file, size):
            parts = split_name(member.name)
            if member.fault:
                quarantined.append(f"{member.name} at offset {member.offset}: {member.fault}")
            elif parts is not None:
                if parts[0] != key and group:
                    yield key, group, ""
                    previous, group = set(group), {}
                key = parts[0]
                if parts[1] in group:
                    quarantined.append(f"{member.name} at offset {member.offset}: duplicate key")
                else:
                    group[parts[1]] = member
    except TornError as torn:
        if group:
            next_parts = split_name(torn.member)
            complete = set(group) == previous or (next_parts is not None and next_parts[0] != key)
            yield key, group, "" if complete else "its shard is torn behind it, members may be missing"
        quarantined.append(f"{torn.member} at offset {torn.offset}: {torn.why}")
    else:
        if group:
            yield key, group, ""


def first_sample(path: str, limit: int) -> tuple[bool, int]:
    """Whether something that can be learned from is among the first `limit` members, and how many were looked at.

    Raises:
        OSError: the file cannot be read.
    """
    looked = 0
    opened, size = open_scan(path)
    with opened as file:
        try:
            for member in members(file, size):
                looked += 1
                parts = None if member.fault else split_name(member.name)
                if parts is not None and member_name(parts[1]) in PRIMARY:
                    return True, looked
                if looked == limit:
                    break
        except TornError:
            pass  # the full scan says where and why
    return False, looked


def _read_label(file: BinaryIO, member: Member | None, num_classes: int | None) -> tuple[int, str]:
    """(label, why it is none)."""
    if member is None:
        return -1, ""
    file.seek(member.data)
    text = file.read(min(member.size, 32)).decode("ascii", "backslashreplace").strip()
    if not re.fullmatch(r"\d{1,18}", text):
        return -1, f"label {text!r} is no class number"
    if (limit := MAX_LABEL if num_classes is None else num_classes) <= int(text):
        return -1, f"label {text} is out of range, expected a number below {limit}"
    return int(text), ""
