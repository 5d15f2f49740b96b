"""Small writes all over a disk: what one incremental of them stores, beside the least that it could."""

import os
import random
import shutil

from content import BLOCK, Text, data_ranges, make_disk, scattered
from lab import PIECE, Domain
from meter import MIB, Failed, measure, same, say, tree_size
from tools import Virtnbdbackup, Vmkeep

#: what is not a backup program: the blocks that have changed, and the pieces of 64 KiB that hold them
CHANGED, FIXED = "changed blocks, zstd 3", "dirty 64 KiB, zstd 3"


class Writes:
    """4000 writes of 4 KiB over 1 GiB; over a smaller disk fewer, just as dense."""

    WORKS = ["writes"]

    def __init__(self, lab, program, folder, results, size):
        self.folder, self.results, self.size = folder, results, size
        self.count = size * 4000 // (1024 * MIB)
        domain = Domain(lab, "writes")
        self.domain, self.log = domain, os.path.join(folder, "writes.log")
        self.tools = [Vmkeep(folder, program, domain), Virtnbdbackup(folder, domain, "-z")]

    def run(self, rounds):
        before, after = (os.path.join(self.folder, f"writes.{name}.raw") for name in ("before", "after"))
        offsets = self.make(before, after)
        for number in range(rounds):
            first = number % len(self.tools)
            for tool in self.tools[first:] + self.tools[:first]:
                try:
                    self.increment(tool, number, before, after, offsets)
                except (Failed, OSError) as error:
                    if tool.name == "vmkeep":
                        raise
                    say(f"{tool.name}: {error}")
            self.least(after, offsets, number)
        for file in (before, after):
            os.unlink(file)

    def make(self, before, after):
        text = Text(seed=4)
        make_disk(before, self.size, text)
        offsets = scattered(random.Random(4), data_ranges(before), self.count)
        shutil.copyfile(before, after)
        with open(after, "r+b") as out:
            for offset in offsets:
                out.seek(offset)
                out.write(text.take(BLOCK))
        return offsets

    def increment(self, tool, number, before, after, offsets):
        """Each tool begins with a full of the same domain: neither goes on where the other's checkpoints are."""
        self.domain.start(before)
        tool.reset()
        tool.domain_backup("full")
        size = tool.size()
        self.domain.write(after, [(offset, BLOCK) for offset in offsets])
        sample = tool.domain_backup("inc")
        self.results.add(sample, "writes", tool.name, number, tool.size() - size)
        tool.remember(self.domain.name)
        if tool.name == "vmkeep":
            stats = tool.json("points")["points"][-1]["stats"]
            self.results.facts["writes"] = {"count": self.count, "size": self.size, **stats}
        tool.restore(self.domain.name, after)
        same(tool.restored(self.domain.name, after), after)
        shutil.rmtree(tool.root)
        self.domain.remove()

    def least(self, after, offsets, number):
        """The blocks in disk order, in one stream; and what whoever stores fixed blocks has to store."""
        changed, fixed = os.path.join(self.folder, "changed"), os.path.join(self.folder, "fixed")
        with open(after, "rb") as file, open(changed, "wb") as out:
            for offset in offsets:
                file.seek(offset)
                out.write(file.read(BLOCK))
        packed = changed + ".zst"
        sample = measure(["zstd", "-q", "-f", "-3", changed, "-o", packed], self.log)
        self.results.add(sample, "writes", CHANGED, number, os.path.getsize(packed))
        shutil.rmtree(fixed, ignore_errors=True)
        os.makedirs(fixed)
        with open(after, "rb") as file:
            for piece in sorted({offset // PIECE for offset in offsets}):
                file.seek(piece * PIECE)
                with open(os.path.join(fixed, str(piece)), "wb") as out:
                    out.write(file.read(PIECE))
        sample = measure(["zstd", "-q", "-3", "--rm", "-r", fixed], self.log)
        self.results.add(sample, "writes", FIXED, number, tree_size(fixed))
        os.unlink(changed)
        os.unlink(packed)
        shutil.rmtree(fixed)
