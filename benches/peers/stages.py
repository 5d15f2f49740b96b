"""Where the time of a few works goes: samples of perf, by stage."""

import os
import re
import shutil
import subprocess

from content import make_noise
from lab import Domain, HistoryDomain
from meter import Failed, cold, output, say, warm
from tools import Vmkeep

#: the work that has nothing to store
UNCHANGED = "full, nothing changed"
#: what the functions of a stage are called, in order: the first that fits counts
STAGES = [
    ("compressing", r"^(ZSTD_(compress|encode|seqToCodes|splitBlock|recordFingerprint|entropy|build(?!.*DTable|.*FSETable_body)|reduce"
     r"|update|hash|fast|opt|store|estimate)|HUF_(compress|build|sort|encode|write|validate)|FSE_(compress|build(?!D)|write|normalize|optimal)"
     r"|HIST_)"),
    ("decompressing, the check of new frames included", r"^(ZSTD_|HUF_|FSE_)"),
    ("hashing", r"blake3"),
    ("cutting", r"fastcdc|cut_gear"),
    ("the local index", r"rocksdb|InlineSkipList"),
    ("copying and comparing in memory", r"mem(move|cpy|set|cmp)|is_zero|mark_if"),
    ("copying from and to the kernel", r"_copy_(to|from)_iter|rep_movs"),
    ("making room in memory", r"page_fault|clear_page|get_page|folio|mm_fault|unmap|compact|pageblock|malloc|_int_free|cfree|isolate|lru_"),
    ("everything else of the kernel", r"\[k\]"),
    ("everything else of vmkeep", r"."),
]


def record(folder, name, argv, env, draws):
    """Runs a command below perf; returns the share of its samples that each stage has, in percent.

    If it `draws`, and inferno is there, `folder`/flame has a flame graph of it too, which takes minutes and gigabytes.
    """
    data = os.path.join(folder, "perf.data")
    draws = draws and shutil.which("inferno-flamegraph") is not None
    stacks = ["--call-graph", "dwarf,4096"] if draws else []
    output(["perf", "record", "-q", "-F", "997", *stacks, "-o", data, *argv], env)
    if draws:
        draw(folder, name, data)
    report = output(["perf", "report", "-i", data, "--stdio", "--no-children", "-g", "none", "--sort", "symbol", "-q"])
    os.unlink(data)
    found = dict.fromkeys((stage for stage, _ in STAGES), 0.0)
    for line in report.splitlines():
        match = re.match(r"\s*([\d.]+)%\s+(\[.\])\s+(.*)", line)
        if match:
            text = match[3].strip() + (" [k]" if match[2] == "[k]" else "")
            stage = next(stage for stage, pattern in STAGES if re.search(pattern, text))
            found[stage] += float(match[1])
    return found


def draw(folder, name, data):
    """Draws a flame graph of what perf has recorded."""
    graphs = os.path.join(folder, "flame")
    os.makedirs(graphs, exist_ok=True)
    graph = os.path.join(graphs, re.sub(r"[^a-z]+", "-", name.lower()).strip("-") + ".svg")
    with open(graph, "w") as out:
        script = subprocess.Popen(["perf", "script", "-i", data, "--no-inline"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        folded = subprocess.Popen(["inferno-collapse-perf"], stdin=script.stdout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        subprocess.run(["inferno-flamegraph", "--title", f"vmkeep: {name}"], stdin=folded.stdout, stdout=out, check=True)
        for process in (script, folded):
            process.stdout.close()
            if process.wait() != 0:
                raise Failed(f"no flame graph of {name}: perf script or inferno-collapse-perf ended with {process.returncode}")
    say(f"drawn: {graph}")


def profile(program, folder, results, history, lab, noise, draws):
    """What vmkeep does with a database server in a few days, work by work; and with a domain of `noise` bytes of random data."""
    if shutil.which("perf") is None:
        say("no perf here: nothing is said about where the time goes")
        return
    domain, random = HistoryDomain(lab, history.data), Domain(lab, "random")
    tool = Vmkeep(folder, program, domain)
    tool.reset()
    first, later = history.image("db.T0"), history.image("db.T2")
    out = os.path.join(folder, "profile.raw")
    shares = {}
    try:
        note = lambda name, *argv: shares.update({name: record(folder, name, [program, *argv], tool.env, draws)})
        note("first backup", "backup", "-q", "--file", first, "--name", "db")
        tool.remember("db.T0")
        tool.next("db.T1", history.image("db.T1"), 1)
        domain.become(2)
        cold()
        note("incremental by dirty bitmap", "-c", domain.uri(), "backup", "-q", domain.name, "-l", "inc")
        domain.remove()
        warm(later)
        note(UNCHANGED, "backup", "-q", "--file", later, "--name", "db")
        note("restore", "restore", "-q", "db", "--to", f"vda={out}")
        os.unlink(out)
        note("verify --data", "verify", "-q", "--data")
        tool.vmkeep("forget", "-q", "-y", "--force", *tool.points["db.T0"])
        note("prune to the last byte", "prune", "-q", "--max-unused", "0%")
        make_noise(out, noise)
        random.start(out)
        warm(random.image)
        note("full of a domain, random data", "-c", random.uri(), "backup", "-q", random.name, "-l", "full")
    except Failed as error:
        say(f"perf: {error}")
    domain.remove()
    random.remove()
    if os.path.exists(out):
        os.unlink(out)
    shutil.rmtree(tool.root)
    results.facts["profile"] = shares


def rows(facts):
    """The table of the report."""
    found = facts.get("profile")
    if not found:
        return ["### Where the time goes", "", "Not measured: perf was not there, or the part `profile` did not run.", ""]
    lines = ["### Where the time goes", "", "Shares of vmkeep's CPU time on all cores, in percent, with the database server but for the last; sampled by perf.",
             "`scripts/bench profile` leaves a flame graph of each in `BENCH_DIR`, but for the small size.", "", "| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, _ in STAGES:
        values = [work.get(name, 0.0) for work in found.values()]
        if max(values) >= 0.5:
            lines.append(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    return [*lines, ""]
