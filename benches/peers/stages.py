"""Where the time of a few works goes: samples of perf, by stage."""

import os
import re
import shutil

from meter import Failed, output, say
from tools import VmkeepFile

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


def shares(folder, argv, env):
    """Runs a command below perf; returns the share of its samples that each stage has, in percent."""
    data = os.path.join(folder, "perf.data")
    output(["perf", "record", "-q", "-F", "997", "-o", data, *argv], env)
    report = output(["perf", "report", "-i", data, "--stdio", "--no-children", "--sort", "symbol", "-q"])
    os.unlink(data)
    found = dict.fromkeys((name for name, _ in STAGES), 0.0)
    for line in report.splitlines():
        match = re.match(r"\s*([\d.]+)%\s+(\[.\])\s+(.*)", line)
        if match:
            text = match[3].strip() + (" [k]" if match[2] == "[k]" else "")
            stage = next(name for name, pattern in STAGES if re.search(pattern, text))
            found[stage] += float(match[1])
    return found


def profile(program, folder, results, image):
    """A first backup of an image, a verify of all data, a restore."""
    if shutil.which("perf") is None:
        say("no perf here: nothing is said about where the time goes")
        return
    tool = VmkeepFile(folder, program)
    tool.reset()
    out = os.path.join(folder, "profile.raw")
    works = {
        "first backup": ["backup", "-q", "--file", image, "--name", "profile"],
        "verify --data": ["verify", "-q", "--data"],
        "restore": ["restore", "-q", "profile", "--to", f"vda={out}"],
    }
    try:
        results.facts["profile"] = {
            name: shares(folder, [program, *argv], tool.env) for name, argv in works.items()
        }
    except Failed as error:
        say(f"perf: {error}")
    if os.path.exists(out):
        os.unlink(out)
    shutil.rmtree(tool.root)
    results.save()


def rows(facts):
    """The table of the report."""
    found = facts.get("profile")
    if not found:
        return []
    lines = ["### Where the time goes", "", "Shares of the CPU time of all cores, in percent, of the database server's first",
             "state; sampled by perf.", "", "| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, _ in STAGES:
        values = [work.get(name, 0.0) for work in found.values()]
        if max(values) >= 0.5:
            lines.append(f"| {name} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    return [*lines, ""]
