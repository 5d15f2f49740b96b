"""Runs vmkeep and its peers on the same work: run.py [PART...]; scripts/bench says what the parts are."""

import argparse
import json
import os
import shutil
import sys
import tempfile

import age
import report
import several
import stages
import works
import writes
from content import Text, make_disk
from lab import HistoryDomain, Lab
from meter import Failed, Results, cold, output, say
from tools import Vmkeep, VmkeepFile, peers

PARTS = ["history", "live", "writes", "age", "points", "profile", "index", "metadata", "scale", "year"]
#: those of which a run makes as many rounds as are asked for
REPEATED = ["history", "live", "writes"]


def history(options, results, lab, folder):
    small = options.size == "small"
    work = works.History(options.data, results, reads=1 if small else 3)
    found, missing = peers(folder, options.tools)
    for text in missing:
        say(f"left out: {text}")
    domain = HistoryDomain(lab, options.data)
    tools = [Vmkeep(folder, options.vmkeep, domain), VmkeepFile(folder, options.vmkeep), *found]
    if options.tools:
        tools = [tool for tool in tools if tool.name in options.tools]
    else:
        results.forget(work.WORKS + ["limits"])
        for fact in ("again", "full_size"):
            results.facts.pop(fact, None)
    results.facts["versions"] = {**results.facts.get("versions", {}), **{tool.name: tool.version() for tool in tools}}
    results.facts["data"] = {"fleet": work.fleet, "steps": work.steps, "virtual": os.path.getsize(work.image("db.T0"))}
    if not options.tools or "limits" in options.tools:
        results.facts["fixed"] = works.fixed_blocks(work, folder)
    # rounds of some tools come behind those that there are: what is noted of a round is not written over
    begun = 1 + max((sample.round for sample in results.samples if sample.work in [*work.WORKS, "limits"]), default=-1)
    for number in range(begun, begun + options.rounds):
        limits = works.Limits(work, folder) if not options.tools or "limits" in options.tools else None
        # each round begins with another one, so that nobody is always the first
        turn = number % max(len(tools), 1)
        in_turn = tools[turn:] + tools[:turn]
        # where there is little room one repository has to go before the next one comes
        for group in ([[tool] for tool in in_turn] or [[]]) if small else [in_turn]:
            work.run(group, limits, number)
            limits = None
    domain.remove()


def live(options, results, lab, folder):
    results.forget(works.Live.WORKS)
    results.facts.pop("live_again", None)
    work = works.Live(lab, options.vmkeep, folder, results, options.live_mib << 20)
    note_version(results, work.virtnbdbackup)
    work.run(options.rounds)
    results.forget(several.Several.WORKS)
    several.Several(lab, options.vmkeep, folder, results, options.live_mib << 16).run(options.rounds)


def scattered(options, results, lab, folder):
    results.forget(writes.Writes.WORKS)
    work = writes.Writes(lab, options.vmkeep, folder, results, options.live_mib << 20)
    note_version(results, work.tools[1])
    work.run(options.rounds)


def aged(options, results, lab, folder):
    marks = [6, 12, 20] if options.size == "small" else [6, 100, 200]
    age.fragments(lab, options.vmkeep, folder, results, text_disk(options, folder), marks, restores(options, "age"))


def pointed(options, results, lab, folder):
    """On the last state of the data where that has been made, and is not kept small; else on a disk of text."""
    small, last = options.size == "small", works.History(options.data, results)
    image = last.image(last.last)
    made = text_disk(options, folder) if small or not os.path.exists(image) else None
    age.many_points(lab, options.vmkeep, folder, results, made or image, [6, 40 if small else 500], restores(options, "points"))
    if made:
        os.unlink(made)


def text_disk(options, folder):
    disk = os.path.join(folder, "text.raw")
    make_disk(disk, options.live_mib << 20, Text(seed=7))
    return disk


def restores(options, part):
    """How often a part restores each state: what is the same but for a tenth has to be seen in spite of a busy host."""
    return 3 if options.size == "small" else 15 if part == "points" else 5


def profile(options, results, lab, folder):
    # shares of another day, or machine, are not those of this run where it has none
    results.facts.pop("profile", None)
    work = works.History(options.data, results)
    if work.steps >= 2:
        stages.profile(options.vmkeep, folder, results, work, lab, options.live_mib << 20, options.size != "small")


def note_version(results, tool):
    try:
        results.facts["versions"] = {**results.facts.get("versions", {}), tool.name: tool.version()}
    except (Failed, OSError) as error:
        say(f"left out: {tool.name} ({error})")


def large(options, place, parts):
    """What these parts of benches/scale have measured, in a folder of their own."""
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    small = {"GIB": 2, "POINTS": 100, "CHUNKS": 2, "REPACK_GIB": 2, "DOMAINS": 5, "DISK_GIB": 256}
    sizes = {f"VMKEEP_SCALE_{name}": str(value) for name, value in small.items()} if options.size == "small" else {}
    env = {"VMKEEP_SCALE_DIR": place, "VMKEEP_SCALE_PROGRAM": options.vmkeep, **sizes}
    figures = []
    for line in output(["cargo", "bench", "--locked", "--bench", "scale", "--", *parts], env).splitlines():
        if line.startswith("{"):
            figures.append(json.loads(line))
            say(f"{figures[-1]['name']}: {figures[-1]['value']:.3f} {figures[-1]['unit']}")
    return figures


def large_alone(part, *names):
    """A part that these parts of benches/scale are."""
    def run(options, results, lab, folder):
        place = os.path.join(folder, part)
        results.facts[part] = large(options, place, names)
        shutil.rmtree(place)

    return run


def code():
    """Which commit is measured."""
    git = ["git", "-C", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
    try:
        commit = output([*git, "log", "-1", "--format=%h"]).strip()
        changed = output([*git, "status", "--porcelain", "--", "src", "benches/scale", "benches/peers", "Cargo.lock"]).strip()
    except (Failed, OSError):
        return "no commit"
    return commit + (" and changes" if changed else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--vmkeep", required=True)
    parser.add_argument("--lab", required=True, help="tests/lab/lab.sh")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, help="folder for repositories")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="full")
    parser.add_argument("--live-mib", type=int, default=1024)
    parser.add_argument("--tools", type=lambda text: text.split(","), help="only these, added to what was measured")
    parser.add_argument("--report", help="the Markdown file to write")
    options = parser.parse_args()
    os.makedirs(options.work, exist_ok=True)
    # beside the report: a part that is measured on its own, another day or elsewhere, joins what was measured before
    kept = os.path.splitext(options.report)[0] + ".json" if options.report else os.path.join(options.work, "results.json")
    if kept == options.report:
        parser.error("the report's name cannot end in .json: the samples are kept beside it under that name")
    results = Results(kept)
    # a short path: unix sockets live below it
    lab = Lab(options.lab, tempfile.mkdtemp(prefix="vmkb-", dir="/tmp"))
    os.chmod(lab.folder, 0o711)
    alone = [
        large_alone("index", "index", "repack"), large_alone("metadata", "metadata"), large_alone("scale", "disk"),
        large_alone("year", "year"),
    ]
    parts = dict(zip(PARTS, [history, live, scattered, aged, pointed, profile, *alone]))
    try:
        lab.start()
        for part in options.parts or PARTS:
            rounds = restores(options, part) if part in ("age", "points") else options.rounds if part in REPEATED else 1
            results.begin(part, rounds, code(), cold(), options.tools if part == "history" else None)
            parts[part](options, results, lab, options.work)
            # a part that was broken off leaves what was measured before
            results.save()
            if options.report:
                with open(options.report, "w") as out:
                    out.write(report.write(results))
    finally:
        lab.stop()
        shutil.rmtree(lab.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
