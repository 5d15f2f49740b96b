"""Several running domains in one backup: one after the other, and two at once."""

import os
import random
import shutil

from content import Text, make_disk
from lab import Domain
from meter import MIB, Failed, cold, same
from tools import Vmkeep

#: written to each domain before each backup, MiB
DIRTY = 4
#: names of the work, by what `-j` is: all are vmkeep
JOBS = {2: "vmkeep", 1: "vmkeep -j 1"}


class Several:
    """Three domains of a few MiB dirty each."""

    WORKS = ["several"]

    def __init__(self, lab, program, folder, results, size):
        self.folder, self.results, self.size = os.path.join(folder, "several"), results, size
        self.domains = [Domain(lab, f"several{number}") for number in (1, 2, 3)]
        self.program, self.random, self.text = program, random.Random(8), Text(seed=8)

    def run(self, rounds):
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.vmkeep = Vmkeep(self.folder, self.program)
        self.vmkeep.reset()
        raw = os.path.join(self.folder, "disk.raw")
        for domain in self.domains:
            make_disk(raw, self.size, self.text)
            domain.start(raw)
        self.backup("full", 1)
        for number in range(rounds):
            # every second time the other way round, so that none is always the first
            for jobs in sorted(JOBS, reverse=number % 2 == 1):
                self.write()
                cold()
                self.results.add(self.backup("inc", jobs), "several", JOBS[jobs], number)
                self.check()
        for domain in self.domains:
            domain.remove()
        shutil.rmtree(self.folder)

    def backup(self, level, jobs):
        names = [domain.name for domain in self.domains]
        return self.vmkeep.vmkeep("-c", self.domains[0].uri(), "backup", "-q", *names, "-l", level, "-j", str(jobs))

    def write(self):
        for domain in self.domains:
            offsets = sorted(self.random.sample(range(0, self.size, MIB), DIRTY))
            domain.write_now(offsets, [self.text.take(MIB) for _ in offsets])

    def check(self):
        """Restores the newest point of each domain."""
        truth, out = (os.path.join(self.folder, f"{name}.raw") for name in ("truth", "out"))
        for domain in self.domains:
            point = self.vmkeep.json("points", domain.name, "--last", "1")["points"][0]
            if point["stats"]["changed_bytes"] != DIRTY * MIB:
                raise Failed(f"{domain.name}: {DIRTY} MiB were written, {point['stats']['changed_bytes']} bytes backed up")
            domain.truth(truth)
            self.vmkeep.vmkeep("restore", "-q", point["point"], "--to", f"vda={out}")
            same(out, truth)
            os.unlink(truth)
            os.unlink(out)
