"""Content of a disk that compresses as a server's does, and writes that are scattered over it; all from a seed."""

import os
import random

from meter import MIB

#: what a file system writes at once, and what vmkeep compares
BLOCK = 4096


class Text:
    """Lines as a log or a table has them: a phrase that comes again, a word, and a number that does not.

    zstd 3 makes 0.23 of it, 0.30 in pieces of 64 KiB: about what it makes of the blocks that a database has written.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        syllables = [first + second for first in "bcdfghklmnprstvwz" for second in "aeiou"]
        self.words = ["".join(self.random.choices(syllables, k=self.random.randint(1, 4))) for _ in range(4000)]
        self.phrases = [" ".join(self.random.choices(self.words, k=6)) for _ in range(200)]

    def take(self, length):
        """Returns that many bytes, which were never returned before."""
        lines = length // 32 + 1
        numbers = self.random.randbytes(6 * lines).hex()
        phrases, words = self.random.choices(self.phrases, k=lines), self.random.choices(self.words, k=lines)
        places = range(0, len(numbers), 12)
        return "".join(
            f"{phrase} {word} {numbers[place:place + 12]}\n" for phrase, word, place in zip(phrases, words, places)
        ).encode()[:length]


def make_disk(path, size, text):
    with open(path, "wb") as out:
        for _ in range(size // MIB):
            out.write(text.take(MIB))


def make_noise(path, size):
    """A disk that nothing compresses."""
    with open("/dev/urandom", "rb") as source, open(path, "wb") as out:
        for _ in range(size // MIB):
            out.write(source.read(MIB))


def data_ranges(path):
    """Returns the (start, end) of what a sparse file holds."""
    ranges, end = [], os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            ranges.append((start, at))
    return ranges


def scattered(source, ranges, count):
    """Returns the offsets of `count` different blocks inside the ranges, in order; `source` is a random.Random."""
    firsts = [range(start // BLOCK, end // BLOCK) for start, end in ranges]
    chosen = sorted(source.sample(range(sum(map(len, firsts))), count))
    offsets, before, blocks = [], 0, iter(firsts)
    current = next(blocks)
    for number in chosen:
        while number - before >= len(current):
            before += len(current)
            current = next(blocks)
        offsets.append(current[number - before] * BLOCK)
    return offsets
