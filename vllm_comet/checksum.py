# SPDX-License-Identifier: Apache-2.0
"""CRC-32 of byte ranges of files, in parallel also within a range: an embedding alone is a fifth of some checkpoints.

The CRC of a range follows from those of its pieces (:func:`combine`; Mark Adler's method in zlib's ``crc32_combine``,
which Python doesn't expose).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PIECE = 1 << 26
READ = 1 << 23  # bytes at once, so that threads rarely meet at Python's lock, and into one buffer, as new ones are slow
POLYNOMIAL = 0xEDB88320


class Range(NamedTuple):
    """Bytes ``start .. end`` of a file."""

    path: Path
    start: int
    end: int


def range_crc32s(ranges: Sequence[Range]) -> list[int]:
    """CRC-32 of every range. Raises EOFError naming a file that ends before its range."""
    pieces = [(i, Range(path, first, min(first + PIECE, end)))
              for i, (path, start, end) in enumerate(ranges) for first in range(start, end, PIECE)]
    found = [0] * len(ranges)
    with ThreadPoolExecutor() as pool:
        for (i, piece), crc in zip(pieces, pool.map(lambda item: _piece_crc32(item[1]), pieces), strict=True):
            found[i] = combine(found[i], crc, piece.end - piece.start)
    return found


def _piece_crc32(piece: Range) -> int:
    crc, left = 0, piece.end - piece.start
    buffer = memoryview(bytearray(min(READ, left)))
    with piece.path.open("rb", buffering=0) as handle:
        handle.seek(piece.start)
        while left:
            count = handle.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise EOFError(f"{piece.path} became shorter while it was read.")
            crc, left = zlib.crc32(buffer[:count], crc), left - count
    return crc


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two byte strings, one behind the other, from theirs and the ``length`` of the second."""
    return _multiply(_power_of_x(8 * length), first) ^ second


@functools.cache
def _power_of_x(n: int) -> int:
    """xⁿ modulo the CRC's polynomial; the highest bit is x⁰."""
    power, square = 1 << 31, 1 << 30
    while n:
        if n & 1:
            power = _multiply(power, square)
        square, n = _multiply(square, square), n >> 1
    return power


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product
