"""Measures whole processes, and keeps what was measured in a file that later runs add to."""

import datetime
import json
import os
import platform
import re
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
    print(f"{time.strftime('%T')} bench: {text}", file=sys.stderr, flush=True)


def machine():
    """What this is called where results are kept: those of different machines do not compare.

    A model's name alone is the same for many generations of servers, and wide instructions make a program that has
    use for them twice as fast.
    """
    about = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            about.setdefault(name.strip(), value.strip())
    flags = about.get("flags", "").split()
    wide = next((text for flag, text in (("avx512bw", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    kind = ", ".join(text for text in (
        about.get("model name", platform.machine()), f"family {about['cpu family']}" if "cpu family" in about else "",
        f"model {about['model']}" if "model" in about else "", wide,
    ) if text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    release = re.match(r"[\d.]*\d", platform.release())
    return f"{os.cpu_count()} cores ({kind}), {memory:.0f} GiB of memory, Linux {release[0] if release else platform.release()}"


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
    """Fails unless two disks hold the same bytes, and as many. Holes, which are zeroes, are not read."""
    if os.path.getsize(one) != os.path.getsize(other):
        raise Failed(f"{one} and {other} differ in length")
    output(["qemu-img", "compare", "-f", "raw", "-F", "raw", one, other])


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

    def begin(self, part, rounds, code, cold, tools=None):
        """Notes under what a part is measured; of these tools only where they are named, and the rest of it stays."""
        parts, here = self.facts.setdefault("parts", {}), machine()
        of_part = [name for name in parts if name == part or name.startswith(f"{part}: ")]
        elsewhere = next((parts[name]["machine"] for name in of_part if parts[name]["machine"] != here), None)
        name = part
        if tools:
            if elsewhere:
                raise Failed(f"{part} was measured on another machine ({elsewhere}): all of its tools have to be measured here")
            name = f"{part}: {', '.join(tools)}, {code}"
            rounds += parts.get(name, {}).get("rounds", 0)
        else:
            for old in of_part:
                del parts[old]
        # what else is at work makes figures worse: the reader has to know
        parts[name] = {
            "date": datetime.date.today().isoformat(), "code": code, "rounds": rounds, "load": round(os.getloadavg()[0], 1),
            "cold": cold, "machine": here,
        }

    def save(self):
        """One sample to a line: the file is kept beside the report, for runs that measure some parts only."""
        samples = ",\n".join("  " + json.dumps(asdict(sample)) for sample in self.samples)
        facts = ",\n".join(f"  {json.dumps(name)}: {json.dumps(fact)}" for name, fact in self.facts.items())
        with open(self.path + ".new", "w") as file:
            file.write(f'{{\n "samples": [\n{samples}\n ],\n "facts": {{\n{facts}\n }}\n}}\n')
        os.replace(self.path + ".new", self.path)
