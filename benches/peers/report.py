"""Writes what was measured as Markdown: medians, ratios to vmkeep, and the goal beside each figure."""

import datetime
import os
import platform
import statistics

import stages
from meter import MIB
from writes import CHANGED, FIXED

TITLES = {
    "first": "First backup of the images, one after the other",
    "T1": "A light day: the first later state of the database server",
    "next": "All later states of the database server",
    "again": "The last state read as a whole again, nothing changed",
    "restore": "Restore of the last state to a raw file",
    "check": "All data read and checked",
    "prune": "Half of the database server's points dropped, space reclaimed",
    "limits": "What bare programs need for the last state",
    "live": "A full of a running domain that holds random data",
    "idle": "An incremental of a running domain, nothing written",
    "writes": "An incremental of 4 KiB writes all over a running domain's disk",
}
#: works of vmkeep alone: states of a repository, whose newest point is restored
AGES = {
    "age": "Restores of a disk that is written all over, 64 blocks of 4 KiB for each point",
    "points": "Restores of a disk with few and with many points, 4 blocks of 4 KiB written for each",
}
NOTES = {
    "next": "vmkeep: out of a domain, by QEMU's dirty bitmaps, libvirt's jobs included. vmkeep-file and the peers know no "
    "bitmap and read whole images. MiB: what the repository grew by.",
    "T1": "As below, the first of them alone.",
    "again": "From the page cache. MiB: what the repository grew by.",
    "first": "MiB: the repository afterwards.",
    "prune": "MiB: the repository afterwards.",
    "restore": "Compared with the image byte by byte, in each run.",
    "writes": "MiB: what the repository grew by. Beside backup programs: the blocks that have changed, in disk order in one "
    "stream; and every piece of 64 KiB that QEMU's bitmap calls dirty, each for itself.",
}
#: work, what is compared, with whom, the goal for vmkeep's part of it
GOALS = [
    ("first", "wall", "restic", 1 / 6), ("first", "wall", "rustic", 1 / 5), ("first", "wall", "borg", 1 / 2.5),
    ("first", "cpu", "restic", 0.30), ("first", "size", "restic", 0.72), ("first", "size", "borg", 0.78),
    ("next", "wall", "restic", 1 / 9), ("next", "wall", "rustic", 1 / 8), ("next", "size", "restic", 0.66),
    ("T1", "size", "restic", 0.35), ("restore", "wall", "nbdcopy", 1.0), ("again", "wall", "b3sum", 1.3),
    ("check", "wall", "restic", 0.5), ("check", "wall", "rustic", 0.5), ("prune", "wall", "rustic", 1.0),
    ("live", "wall", "virtnbdbackup", 1 / 3), ("live", "wall", "nbdcopy", 2.0), ("writes", "size", CHANGED, 1.3),
    ("writes", "size", "virtnbdbackup", 0.15), ("writes", "size", FIXED, 0.15),
]
WORDS = {"wall": "time", "cpu": "CPU time", "size": "bytes stored"}


class Figures:
    """Medians over the rounds."""

    def __init__(self, samples):
        self.samples = samples

    def tools(self, work):
        return list(dict.fromkeys(sample.tool for sample in self.samples if sample.work == work))

    def values(self, work, tool, what):
        values = [getattr(sample, what) for sample in self.samples if (sample.work, sample.tool) == (work, tool)]
        return [value for value in values if value is not None]

    def median(self, work, tool, what):
        values = self.values(work, tool, what)
        return statistics.median(values) if values else None


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB of memory, Linux {platform.release()}"


def table(figures, work):
    rows = [f"### {TITLES[work]}", "", *([NOTES[work], ""] if work in NOTES else [])]
    rows += ["| | s | spread | CPU s | RSS MiB | stored MiB | time | CPU | bytes |", "|---|---|---|---|---|---|---|---|---|"]
    for tool in figures.tools(work):
        row = [tool]
        wall, cpu, rss, size = (figures.median(work, tool, what) for what in ("wall", "cpu", "rss", "size"))
        every = figures.values(work, tool, "wall")
        row += [f"{wall:.2f}", f"{min(every):.2f}–{max(every):.2f}", f"{cpu:.2f}", f"{rss:.0f}"]
        row.append("" if size is None else f"{size / MIB:.1f}")
        for what, value in (("wall", wall), ("cpu", cpu), ("size", size)):
            ours = figures.median(work, "vmkeep", what)
            row.append(f"{value / ours:.2f}" if ours and value is not None else "")
        rows.append("| " + " | ".join(row) + " |")
    return [*rows, ""]


def writes_rows(facts):
    """What vmkeep itself counted."""
    kept = facts.get("writes")
    if not kept:
        return []
    mib = {name: value / MIB for name, value in kept.items() if isinstance(value, int)}
    return [
        f"{kept['count']} writes over {mib['size']:.0f} MiB: {mib['dirty_bytes']:.1f} MiB dirty, "
        f"{mib['changed_bytes']:.1f} MiB changed; vmkeep stored {mib['stored_bytes']:.2f} MiB of content and "
        f"{mib['metadata_bytes']:.2f} MiB of metadata.",
        "",
    ]


def age_table(figures, facts, work):
    disk = facts.get(work + ".disk", "")
    rows = [
        f"### {AGES[work]}", "",
        f"{disk}. Restores of the newest point, how many packs they read, and how much of them; the median of the last "
        "increments before it.", "",
        "| | s | spread | CPU s | RSS MiB | packs read | MiB read | repository MiB | s an increment |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label in figures.tools(work):
        fact = facts.get(work, {}).get(label, {})
        wall, cpu, rss = (figures.median(work, label, what) for what in ("wall", "cpu", "rss"))
        every = figures.values(work, label, "wall")
        row = [label, f"{wall:.2f}", f"{min(every):.2f}–{max(every):.2f}", f"{cpu:.2f}", f"{rss:.0f}"]
        row.append(str(fact.get("packs", "")))
        row += [f"{fact[name] / MIB:.1f}" if name in fact else "" for name in ("read", "size")]
        row.append(f"{fact['increment']:.2f}" if "increment" in fact else "")
        rows.append("| " + " | ".join(row) + " |")
    return [*rows, ""]


def absolute(rows, what, goal, value, unit):
    reached = "reached" if value <= goal else "**missed**"
    rows.append(f"| {what} | | ≤ {goal:.4g} {unit} | {value:.3g} {unit} | {reached} |")


def large(facts):
    """All that benches/scale.rs has measured."""
    return facts.get("index", []) + facts.get("scale", [])


def scale_rows(facts):
    """What of it has no goal."""
    figures = [figure for figure in large(facts) if figure["goal"] is None]
    if not figures:
        return []
    rows = [f"| {figure['name']} | {figure['value']:.4g} {figure['unit']} |" for figure in figures]
    return ["### Large repositories", "", "From `cargo bench --bench scale`.", "", "| | |", "|---|---|", *rows, ""]


def goal_rows(figures, facts):
    rows = ["| work | measured against | goal | vmkeep | |", "|---|---|---|---|---|"]

    def row(work, against, goal, ratio):
        reached = "reached" if ratio <= goal else "**missed**"
        rows.append(f"| {work} | {against} | ≤ {goal:.2f} | {ratio:.2f} | {reached} |")

    for work, what, peer, goal in GOALS:
        ours = figures.median(work, "vmkeep", what)
        theirs = figures.median(work if peer not in ("b3sum", "nbdcopy") or work == "live" else "limits", peer, what)
        if ours is not None and theirs:
            row(TITLES[work], f"{WORDS[what]}, {peer}", goal, ours / theirs)
    size = figures.median("first", "vmkeep", "size")
    if size and "fixed" in facts:
        row(TITLES["first"], "bytes stored, fixed 4 MiB blocks with zstd 1", 0.62, size / facts["fixed"])
    first, *_, last = figures.tools("points") or [None, None]
    if first:
        ratio = figures.median("points", last, "wall") / figures.median("points", first, "wall")
        row(f"Restore of a disk's last state, {last}", f"time, {first}", 1.1, ratio)
    idle, own = figures.median("idle", "vmkeep", "wall"), figures.median("idle", "libvirt", "wall")
    if idle is not None and own is not None:
        absolute(rows, TITLES["idle"] + ", beside libvirt's own job", 0.3, max(idle - own, 0), "s")
    peaks = [sample.rss for sample in figures.samples if sample.tool == "vmkeep" or sample.work in AGES]
    if peaks:
        absolute(rows, "Peak memory of any command above", 300, max(peaks), "MiB")
    for figure in large(facts):
        if figure["goal"] is not None:
            absolute(rows, figure["name"], figure["goal"], figure["value"], figure["unit"])
    return rows


def write(results):
    figures, facts = Figures(results.samples), results.facts
    # those in AGES have rounds of their own
    rounds = 1 + max((sample.round for sample in results.samples if sample.work not in AGES), default=0)
    data = facts.get("data", {})
    lines = [
        "# Results",
        "",
        "Written by `scripts/bench`; none of it by hand. Medians of whole processes, with syncs, the check of each encoded",
        "frame and everything else on. Times, CPU times and bytes are also given as ratios to vmkeep's: above 1 vmkeep is",
        "better. What a goal names is vmkeep's figure divided by the other's.",
        "",
        f"* {datetime.date.today().isoformat()}: {machine()}, {rounds} rounds, tools in turn",
        f"* data: {len(data.get('fleet', []))} images of {data.get('virtual', 0) >> 30} GiB ({', '.join(data.get('fleet', []))}), "
        f"{data.get('steps', 0)} later states of db",
        *(f"* {tool}: {version}" for tool, version in facts.get("versions", {}).items()),
        "* load of the machine when each part began: " + ", ".join(f"{part} {load:.1f}" for part, load in facts.get("load", {}).items()),
        "",
        "## Goals",
        "",
        *goal_rows(figures, facts),
        "",
        "## Figures",
        "",
    ]
    for work in TITLES:
        if figures.tools(work):
            lines += table(figures, work)
            if work == "writes":
                lines += writes_rows(facts)
    for work in AGES:
        if figures.tools(work):
            lines += age_table(figures, facts, work)
    lines += stages.rows(facts)
    lines += scale_rows(facts)
    return "\n".join(lines).rstrip() + "\n"
