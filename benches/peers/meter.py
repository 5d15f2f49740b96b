"""Measures whole processes, and keeps what was measured in a file that later runs add to."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

MIB = 1 << 20


@dataclass
class Sample:
    """One measured piece of work of one tool."""

    work: str
    tool: str
    round: int
    #: seconds
    wall: float = 0.0
    #: seconds of all cores, user and system
    cpu: float = 0.0
    #: MiB, of the largest single process
    rss: float = 0.0
    #: bytes in the repository, or that the work added to it
    size: int | None = None
    #: seconds of all cores that the whole machine was at work meanwhile
    busy: float | None = None

    def add(self, other):
        self.wall += other.wall
        self.cpu += other.cpu
        self.busy = None if other.busy is None else (self.busy or 0.0) + other.busy
        self.rss = max(self.rss, other.rss)


class Failed(Exception):
    """A tool did not do its work."""


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def busy():
    """Seconds that all cores have been at work since the system began."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _wait, irq, softirq = map(int, stat.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(argv, log, env=None, cwd=None, user=None):
    """Runs a command to its end; what it prints goes to the file `log`. Returns a Sample without names.

    The kernel's own accounting of the finished process and of the children that it waited for.
    """
    with open(log, "ab") as out:
        out.write(f"\n$ {' '.join(map(str, argv))}\n".encode())
        out.flush()
        os.sync()
        start, before = time.monotonic(), busy()
        child = subprocess.Popen(
            [str(arg) for arg in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd,
            env={**os.environ, **(env or {})}, user=user,
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall, at_work = time.monotonic() - start, busy() - before
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        with open(log, "rb") as out:
            end = out.read()[-1500:].decode(errors="replace")
        raise Failed(f"{' '.join(map(str, argv))} ended with {child.returncode}:\n{end}")
    cpu = usage.ru_utime + usage.ru_stime
    return Sample("", "", 0, wall, cpu, usage.ru_maxrss / 1024, busy=at_work)


def cold():
    """Empties the page cache: what is measured next reads its files from the disk. Returns whether that could be done."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3\n")
    except OSError as error:
        say(f"the page cache stays as it is: {error}")
        return False
    return True


def warm(path):
    """Reads a file: what is measured next has it in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(16 * MIB):
            pass


def output(argv, env=None):
    """Runs a command that is not measured, and returns what it prints."""
    done = subprocess.run(
        [str(arg) for arg in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env={**os.environ, **(env or {})},
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    return done.stdout


def tree_size(path):
    """Bytes in the files below `path`."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            total += os.lstat(os.path.join(folder, name)).st_size
    return total


def same(one, other):
    """Fails unless two files hold the same bytes, and as many."""
    if os.path.getsize(one) != os.path.getsize(other):
        raise Failed(f"{one} and {other} differ in length")
    output(["cmp", one, other])


class Results:
    """What was measured, in a JSON file."""

    def __init__(self, path):
        self.path = path
        self.samples, self.facts = [], {}
        if os.path.exists(path):
            with open(path) as file:
                kept = json.load(file)
            self.samples = [Sample(**sample) for sample in kept["samples"]]
            self.facts = kept["facts"]

    def forget(self, works):
        self.samples = [sample for sample in self.samples if sample.work not in works]

    def add(self, sample, work, tool, number, size=None):
        sample.work, sample.tool, sample.round, sample.size = work, tool, number, size
        self.samples.append(sample)
        stored = "" if size is None else f" {size / MIB:8.1f} MiB"
        say(f"{work:12} {tool:18} {sample.wall:7.2f} s {sample.cpu:7.2f} s CPU {sample.rss:5.0f} MiB RSS{stored}")
        self.save()

    def save(self):
        with open(self.path + ".new", "w") as file:
            json.dump({"samples": [asdict(sample) for sample in self.samples], "facts": self.facts}, file, indent=1)
        os.replace(self.path + ".new", self.path)
