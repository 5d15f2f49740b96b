"""What becomes of restores when a disk is backed up again and again: many points, and content in many places."""

import os
import random
import re
import shutil
import statistics
from dataclasses import dataclass

from content import BLOCK, Text, data_ranges, scattered
from lab import Domain
from meter import MIB, Failed, cold, output, same, say
from tools import Vmkeep

#: increments before a state, whose times count for it
RECENT = 20
#: written before each point of the disk that is written all over: after 200 of them its content is in small pieces
BLOCKS = 512
#: the state that the others are compared with
FRESH = "the same disk in a new repository"


@dataclass
class State:
    """The repository as it was once, in a copy; its newest point has to restore to the file `truth`."""

    label: str
    tool: Vmkeep
    truth: str


class Aging:
    """A domain whose disk is written to here and there, and then backed up, again and again."""

    def __init__(self, lab, program, folder, results, work, seed):
        self.folder = os.path.join(folder, work)
        self.program, self.results, self.work = program, results, work
        self.domain = Domain(lab, work)
        self.random, self.text = random.Random(seed), Text(seed)
        self.states, self.increments, self.truth = [], [], None

    def begin(self, raw, blocks):
        """The first point: a full of a disk that holds what `raw` does; `blocks` are written before each that follows."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.vmkeep = Vmkeep(self.folder, self.program, self.domain)
        self.vmkeep.reset()
        self.results.forget([self.work])
        self.results.facts[self.work] = {}
        self.ranges = data_ranges(raw)
        held = sum(end - start for start, end in self.ranges) / MIB
        self.results.facts[self.work + ".disk"] = (
            f"{os.path.basename(raw)}, {held:.0f} MiB of data; {blocks} blocks of 4 KiB written before each point"
        )
        self.blocks = blocks
        self.domain.start(raw)
        self.vmkeep.domain_backup("full")
        self.points = 1

    def increment_to(self, point):
        """Increments, until the domain has `point` points."""
        blocks = self.blocks
        while self.points < point:
            offsets = scattered(self.random, self.ranges, blocks)
            self.domain.write_now(offsets, [self.text.take(BLOCK) for _ in offsets])
            self.increments.append(self.vmkeep.domain_backup("inc").wall)
            self.points += 1
            self.truth = None
        stats = self.vmkeep.json("points", "--last", "1")["points"][0]["stats"]
        if stats["changed_bytes"] != blocks * BLOCK:
            raise Failed(f"{self.work}: {blocks} blocks were written, {stats['changed_bytes']} bytes were backed up")

    def keep(self, label):
        """Copies the repository, so that this state can be restored in turn with the others."""
        if self.truth is None:
            self.truth = os.path.join(self.folder, f"truth{self.points}.raw")
            self.domain.truth(self.truth)
        tool = self.another()
        os.makedirs(tool.root)
        output(["cp", "-a", self.vmkeep.repo, tool.repo])
        tool.remember(label)
        times, self.increments = self.increments[-RECENT:], []
        self.note(label, tool, **({"increment": statistics.median(times)} if times else {}))

    def keep_with_full(self, label):
        """This state, and a full in the copy alone: what comes next is as if it had not been made."""
        tool = self.another()
        os.makedirs(tool.root)
        output(["cp", "-a", self.vmkeep.repo, tool.repo])
        tool.vmkeep("backup", "-q", "--file", self.truth, "--name", self.domain.name, "-l", "full")
        tool.remember(label)
        self.note(label, tool)

    def keep_fresh(self, label):
        """The same disk in a repository that holds nothing else: as good as a restore can be."""
        tool = self.another()
        tool.reset()
        tool.backup(label, self.truth)
        self.note(label, tool)

    def another(self):
        return Vmkeep(os.path.join(self.folder, f"state{len(self.states)}"), self.program)

    def note(self, label, tool, **facts):
        self.states.append(State(label, tool, self.truth))
        facts = {"size": tool.size(), **facts, **self.reads(self.states[-1])}
        self.results.facts[self.work][label] = facts
        say(f"{self.work}: {label}: {facts}")

    def reads(self, state):
        """Restores under strace, for which packs are read, and how much of them; it also makes the copy's index."""
        tool, trace = state.tool, os.path.join(self.folder, "trace")
        strace = ["strace", "-f", "-y", "-s", "0", "-e", "trace=read,pread64", "-o", trace]
        try:
            output([*strace, "true"])
        except (Failed, OSError) as error:
            say(f"reads are not counted: {error}")
            strace = []
        os.makedirs(os.path.join(tool.root, "out"))
        point = tool.points[state.label][-1]
        output([*strace, tool.program, "restore", "-q", point, "--to", f"vda={tool.restored('', '')}"], tool.env)
        same(tool.restored("", ""), state.truth)
        tool.clean()
        return count_reads(trace, os.path.join(tool.repo, "packs")) if strace else {}

    def forget_all_but(self, points):
        self.vmkeep.vmkeep("forget", "-q", "-y", "--force", "--keep-last", str(points))
        self.vmkeep.vmkeep("prune", "-q")

    def restore(self, rounds):
        """Restores the states so many times, in turn, every second time backwards, so that none is always the first."""
        self.domain.remove()
        shutil.rmtree(self.vmkeep.root)
        for number in range(rounds):
            for state in self.states[:: -1 if number % 2 else 1]:
                cold()
                self.results.add(state.tool.restore(state.label, state.truth), self.work, state.label, number)
                same(state.tool.restored(state.label, state.truth), state.truth)
                state.tool.clean()
        shutil.rmtree(self.folder)


def count_reads(trace, packs):
    """Counts in strace's output the files below `packs` that were read, and the bytes."""
    files, total, waiting = set(), 0, {}
    with open(trace) as file:
        for line in file:
            process = line.split()[0]
            place = re.search(r"\w+\(\d+<([^>]*)>", line)
            # a call that another process interrupts in the list has its end in a line of its own
            path = place.group(1) if place else waiting.pop(process, "")
            if line.rstrip().endswith("<unfinished ...>"):
                waiting[process] = path
                continue
            done = re.search(r"= (\d+)$", line.rstrip())
            if done and path.startswith(packs + "/"):
                files.add(path)
                total += int(done.group(1))
    return {"packs": len(files), "read": total}


def fragments(lab, program, folder, results, raw, marks, rounds):
    """Writes all over the disk; then what heals it: prune, and a new full. Removes `raw`."""
    aging = Aging(lab, program, folder, results, "age", seed=5)
    aging.begin(raw, BLOCKS)
    # the domain has a copy, and the states and what they restore to want the room
    os.unlink(raw)
    for point in marks:
        aging.increment_to(point)
        aging.keep(f"point {point}")
    aging.keep_with_full("a full after that, nothing pruned")
    aging.forget_all_but(3)
    aging.keep("all but the last 3 points forgotten, pruned")
    aging.vmkeep.domain_backup("full")
    aging.keep("after that a full")
    aging.forget_all_but(1)
    aging.keep("all but that forgotten, pruned")
    aging.keep_fresh(FRESH)
    aging.restore(rounds)


def many_points(lab, program, folder, results, raw, marks, rounds):
    """A few blocks for each point: the number of points alone should not matter."""
    aging = Aging(lab, program, folder, results, "points", seed=6)
    aging.begin(raw, 4)
    for point in marks:
        aging.increment_to(point)
        aging.keep(f"point {point}")
    aging.restore(rounds)
