"""Writes what was measured as Markdown: medians, ratios to vmkeep, and the goal beside each figure."""

import os
import re
import statistics

import stages
from age import FRESH
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
    "prune-all": "After that a prune that drops every unused chunk",
    "limits": "What bare programs need for the last state",
    "live": "A full of a running domain that holds random data",
    "idle": "An incremental of a running domain, nothing written",
    "live-again": "A full of the domain that holds random data, asked for again, nothing written",
    "several": "An incremental of three running domains, 4 MiB written to each, two at once",
    "writes": "An incremental of 4 KiB writes all over a running domain's disk",
}
#: works of vmkeep alone: states of a repository, whose newest point is restored
AGES = {
    "age": "Restores of a disk that is written all over before each point",
    "points": "Restores of a disk with few and with many points, little written before each",
}
NOTES = {
    "next": "Each state from the disk. vmkeep: out of a domain, by QEMU's dirty bitmaps, libvirt's jobs included. "
    "vmkeep-file and the peers know no bitmap and read whole images. MiB: what the repository grew by.",
    "T1": "As below, the first of them alone.",
    "again": "The image is read once before: it comes from the page cache. MiB: what the repository grew by. Of vmkeep a backup of "
    "the image without `-l`, which reads all of it and compares.",
    "first": "Each image from the disk. MiB: the repository afterwards.",
    "prune": "From the disk, by each tool's own limit of what may stay unused. MiB: the repository afterwards.",
    "prune-all": "From the disk, no limit of what is written anew. borg has done so above. MiB: the repository afterwards.",
    "restore": "From the disk. Compared with the image byte by byte, each time.",
    "check": "From the disk.",
    "limits": "b3sum on two threads over the image, over a copy without its holes (b3sum-data), and on one thread over the "
    "image (b3sum-1): from the page cache. nbdcopy and dd: from the disk, synced at the end, as a restore is.",
    "live": "The domain's image is in the page cache. nbdcopy syncs at the end. virtnbdbackup does not compress, as by default: "
    "nothing would be gained here.",
    "live-again": "`-l full`. The domain's image is in the page cache.",
    "several": "From the disk.",
    "writes": "MiB: what the repository grew by. virtnbdbackup compresses (-z). Beside backup programs: the blocks that have changed, in disk order in one "
    "stream; and every piece of 64 KiB that QEMU's bitmap calls dirty, each for itself.",
}
#: work, what is compared, with whom, the goal for vmkeep's part of it
GOALS = [
    ("first", "wall", "restic", 1 / 6), ("first", "wall", "rustic", 1 / 5), ("first", "wall", "borg", 1 / 2.5),
    ("first", "cpu", "restic", 0.30), ("first", "size", "restic", 0.72), ("first", "size", "borg", 0.78),
    ("next", "wall", "restic", 1 / 9), ("next", "wall", "rustic", 1 / 8), ("next", "size", "restic", 0.66),
    ("T1", "size", "restic", 0.35), ("restore", "wall", "nbdcopy", 1.0), ("again", "wall", "b3sum", 1.3),
    ("check", "wall", "restic", 0.5), ("check", "wall", "rustic", 0.5), ("prune", "wall", "rustic", 1.0),
    ("prune-all", "wall", "rustic", 1.0), ("several", "wall", "vmkeep -j 1", 1.0),
    ("live", "wall", "virtnbdbackup", 1 / 3), ("live", "wall", "nbdcopy", 2.0), ("writes", "size", CHANGED, 1.3),
    ("writes", "size", "virtnbdbackup", 0.15), ("writes", "size", FIXED, 0.15),
]
#: states of the disk that is written all over, whose restore is compared with that of the same disk in a new repository: their
#: names there; what is said where they are not there; goal
AGE_GOALS = [
    (r"point \d+$", "the last point", 3.0), (r"a full after that", "a full after that", 1.5),
    (r"all but the last 3 points forgotten", "all but the last 3 points forgotten, pruned", 1.5),
]
#: what the restore of the last of many points may take beside that of the last of few
MANY_GOAL = 1.1
#: figures of benches/scale that have goals: their names there; what is said where they are not there; goal, unit
LARGE_GOALS = [
    (r"index of .*: rebuild", "Rebuild of an index of 4 million chunks", 10, "s"),
    (r"index of .*look-ups of known", "100,000 look-ups in an index of 16 million chunks", 1, "s"),
    (r"index of .*peak memory", "Peak memory with an index of 16 million chunks", 512, "MiB"),
    (r"16 TiB disk.*peak memory", "Peak memory of any command with a disk of 16 TiB", 512, "MiB"),
    (r"1 TiB disk.*metadata of each", "Metadata of each scattered write on a disk of 1 TiB", 6, "KiB"),
    (r"16 TiB disk.*the last points beside", "The last of 1,000 points of a disk of 16 TiB beside early ones", 1.1, "times"),
    (r"vmkeep points", "vmkeep points, 1,000 points", 0.1, "s"),
    (r"domains, .*peak memory", "Peak memory beside the points of 100 domains in a year", 300, "MiB"),
]
#: of the large disk: what a point takes among few and among many
POINTS_FIGURES = {
    "early": r"16 TiB disk.*: points 5 to 24, ", "late": r"16 TiB disk.*: the last 20 of ",
    "ratio": r"16 TiB disk.*the last points beside",
}
#: of the index of 16 million chunks: 100,000 look-ups, and what reading blocks alone takes
LOOK_UPS = {"known": r"index of .*look-ups of known", "new": r"index of .*look-ups of new", "bare": r"index of .*bare reads"}
#: what tells the tools apart, and what figures do not say
CONDITIONS = [
    "* restic and rustic encrypt, as they always do; vmkeep and borg (`-e none`) do not",
    "* restic and rustic run without their copies of a repository's metadata (`--no-cache`), which would be on the same disk; "
    "vmkeep and borg have what they keep on a host",
    "* RSS is the kernel's maximum for a process, which counts from that of the bench that has started it: what is shown as less "
    "than 50 MiB may be anything below",
]
#: length of the images that the goals are for, and what is said beside smaller ones
GOALS_LEN = 8 << 30
SMALL = "* the data is the small one: the goals are for the full size, and on so little what a program does once weighs more"
WORDS = {"wall": "time", "cpu": "CPU time", "size": "bytes stored"}


class Figures:
    """Medians over all runs: of a work that a round repeats, each counts."""

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


def table(figures, work):
    rows = [f"### {TITLES[work]}", "", *([NOTES[work], ""] if work in NOTES else [])]
    rows += ["| | runs | s | spread | CPU s | RSS MiB | stored MiB | time | CPU | bytes |", "|---|---|---|---|---|---|---|---|---|---|"]
    for tool in figures.tools(work):
        wall, cpu, rss, size = (figures.median(work, tool, what) for what in ("wall", "cpu", "rss", "size"))
        every = figures.values(work, tool, "wall")
        row = [tool, str(len(every))]
        row += [f"{wall:.2f}", f"{min(every):.2f}–{max(every):.2f}", f"{cpu:.2f}", f"{rss:.0f}"]
        # what is nearly nothing is told apart too
        row.append("" if size is None else f"{size / MIB:.1f}" if size >= MIB or size == 0 else f"{size / MIB:.4f}")
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


def reclaimed_rows(figures, facts):
    """What both prunes have made of the repository."""
    texts = []
    for tool, sizes in facts.get("full_size", {}).items():
        before = statistics.median(sizes.values())
        after = [figures.median(work, tool, "size") for work in ("prune-all", "prune")]
        left = next((size for size in after if size is not None), None)
        if left is not None:
            texts.append(f"{tool} {(before - left) / MIB:.1f} of {before / MIB:.1f}")
    if not texts:
        return []
    return ["MiB reclaimed by both: " + "; ".join(texts) + ". A chunk stays as long as any part of it is named.", ""]


def age_table(figures, facts, work):
    disk, labels = facts.get(work + ".disk", ""), figures.tools(work)
    # where there is no new repository to compare with, the first state is
    beside = FRESH if FRESH in labels else labels[0]
    base = figures.median(work, beside, "wall")
    rows = [
        f"### {AGES[work]}", "",
        f"{disk}. Restores of the newest point, from the disk, how many packs they read, and how much of them; the median "
        f"of the last increments before it. Time: beside {beside}.", "",
        "| | s | spread | CPU s | RSS MiB | packs read | MiB read | repository MiB | s an increment | time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in labels:
        fact = facts.get(work, {}).get(label, {})
        wall, cpu, rss = (figures.median(work, label, what) for what in ("wall", "cpu", "rss"))
        every = figures.values(work, label, "wall")
        row = [label, f"{wall:.2f}", f"{min(every):.2f}–{max(every):.2f}", f"{cpu:.2f}", f"{rss:.0f}"]
        row.append(str(fact.get("packs", "")))
        row += [f"{fact[name] / MIB:.1f}" if name in fact else "" for name in ("read", "size")]
        row.append(f"{fact['increment']:.2f}" if "increment" in fact else "")
        row.append(f"{wall / base:.2f}" if base else "")
        rows.append("| " + " | ".join(row) + " |")
    return [*rows, ""]


def absolute(rows, what, goal, value, unit):
    if value is None:
        rows.append(f"| {what} | | ≤ {goal:.4g} {unit} | | **not measured** |")
        return
    reached = "reached" if value <= goal else "**missed**"
    rows.append(f"| {what} | | ≤ {goal:.4g} {unit} | {value:.3g} {unit} | {reached} |")


def relative(rows, what, against, goal, ours, theirs):
    if ours is None or not theirs:
        rows.append(f"| {what} | {against} | ≤ {goal:.2f} | | **not measured** |")
        return
    reached = "reached" if ours / theirs <= goal else "**missed**"
    rows.append(f"| {what} | {against} | ≤ {goal:.2f} | {ours / theirs:.2f} | {reached} |")


def large(facts):
    """All that benches/scale has measured."""
    return [figure for part in ("index", "metadata", "scale", "year") for figure in facts.get(part, [])]


def scale_rows(facts):
    """What of it has no goal."""
    figures = [figure for figure in large(facts) if figure["goal"] is None]
    if not figures:
        return []
    rows = [f"| {figure['name']} | {figure['value']:.4g} {figure['unit']} |" for figure in figures]
    title = ["### Large repositories", "", "From `cargo bench --bench scale -- index disk metadata repack year`.", "", "| | |", "|---|---|"]
    return [*title, *rows, "", *first_run_rows(facts), *each_point_rows(facts)]


def first_run_rows(facts):
    """Why the first of the later points of the large disk takes so long, and what a write takes in those behind it."""
    found, rows = facts.get("scale", []), []
    of = lambda figure: re.search(r"16 TiB disk.*: point of (\d+) scattered writes$", figure["name"])
    points = [(int(of(figure)[1]), figure["value"]) for figure in found if of(figure)]
    if len(points) > 1:
        (few, took), *others = points
        each = "; ".join(f"of {count} writes {1000 * seconds / count:.1f}" for count, seconds in others)
        rows = [
            f"Each phase is a process of its own. What a process has stored the next one takes into the local index: in the {took:.0f} s of "
            f"the point of {few} writes are the chunks of the whole first point. Of the points behind it each write takes, in ms: {each}.",
            "",
        ]
    return rows


def each_point_rows(facts):
    """What the points that there are add to the backup of one domain."""
    found = []
    for figure in facts.get("year", []):
        beside = re.search(r"(\d+) points: the backup of one domain", figure["name"])
        if beside:
            found.append((int(beside.group(1)), figure["value"]))
    if len(found) < 2:
        return []
    (few, early), (many, late) = min(found), max(found)
    return [
        f"For each point that there is, the backup of one domain takes {1e6 * (late - early) / (many - few):.0f} µs more: whatever "
        "was written, it lists all outcomes and segments, since what the storage holds is the only truth about which points there "
        "are, and reads all outcomes, none of which it keeps on the host. Of packs it looks at those that it meets.",
        "",
    ]


def goal_rows(figures, facts):
    """Every goal, whether there is a figure for it or not."""
    rows = ["| work | measured against | goal | vmkeep | |", "|---|---|---|---|---|"]
    for work, what, peer, goal in GOALS:
        ours = figures.median(work, "vmkeep", what)
        theirs = theirs_of(figures, work, peer, what)
        relative(rows, TITLES[work], f"{WORDS[what]}, {peer}", goal, ours, theirs)
    size = figures.median("first", "vmkeep", "size")
    relative(rows, TITLES["first"], "bytes stored, fixed 4 MiB blocks with zstd 1", 0.62, size, facts.get("fixed"))
    again = [stored for rounds in facts.get("again", {}).values() for stored in rounds.values()]
    absolute(rows, TITLES["again"] + ": bytes of content stored", 0, max(again, default=None), "bytes")
    again = facts.get("live_again", {}).values()
    absolute(rows, TITLES["live-again"] + ": bytes of content stored", 0, max(again, default=None), "bytes")
    states = figures.tools("points")
    first, last = (states[0], states[-1]) if len(states) > 1 else ("point 6", "point 500")
    walls = [figures.median("points", state, "wall") for state in (last, first)]
    relative(rows, f"Restore of a disk's last state, {last}", f"time, {first}", MANY_GOAL, *walls)
    for pattern, otherwise, goal in AGE_GOALS:
        state = aged_state(figures, pattern) or otherwise
        walls = [figures.median("age", label, "wall") for label in (state, FRESH)]
        relative(rows, f"Restore of a disk that is written all over before each point: {state}", "time, in a new repository", goal, *walls)
    idle, own = figures.median("idle", "vmkeep", "wall"), figures.median("idle", "libvirt", "wall")
    beside = None if idle is None or own is None else max(idle - own, 0)
    absolute(rows, TITLES["idle"] + ", beside libvirt's own job", 0.3, beside, "s")
    peaks = [sample.rss for sample in figures.samples if sample.tool.startswith("vmkeep") or sample.work in AGES]
    absolute(rows, "Peak memory of any command above", 300, max(peaks, default=None), "MiB")
    return rows + large_rows(facts)


def theirs_of(figures, work, peer, what):
    """A peer's figure; what bare programs do is measured once, for all works but those of a running domain."""
    return figures.median(work if peer not in ("b3sum", "nbdcopy") or work == "live" else "limits", peer, what)


def hashing_rows(figures, facts):
    """What of a full with nothing changed is hashing, beside the same data hashed in one piece."""
    machines = {facts.get("parts", {}).get(part, {}).get("machine") for part in ("profile", "history")}
    if len(machines) > 1:
        return []
    share = facts.get("profile", {}).get(stages.UNCHANGED, {}).get("hashing")
    ours, bare = figures.median("again", "vmkeep", "cpu"), figures.median("limits", "b3sum-data", "cpu")
    if not (share and ours and bare):
        return []
    return [
        f"Of hashing: a full with nothing changed spends about {share * ours / 100:.2f} s of its CPU time on it, chunk by chunk; "
        f"b3sum takes {bare:.2f} s for the same data in one piece. BLAKE3 computes 16 KiB at once; what is left of a chunk "
        "behind its last 16 KiB takes about as long again.",
        "",
    ]


def drawn_rows(figures, work):
    """How much restic's bytes for the same work differ from round to round."""
    sizes, ours = sorted(figures.values(work, "restic", "size")), figures.median(work, "vmkeep", "size")
    if len(sizes) < 2 or not ours:
        return []
    return [
        f"restic draws at random for each repository where it cuts: it stored from {sizes[0] / MIB:.1f} "
        f"to {sizes[-1] / MIB:.1f} MiB; vmkeep's {ours / MIB:.1f} are {ours / sizes[-1]:.2f} to {ours / sizes[0]:.2f} of that.",
        "",
    ]


def named(figures, patterns):
    """Those of benches/scale that these patterns name, by their keys."""
    return {key: figure for figure in figures for key, pattern in patterns.items() if re.search(pattern, figure["name"])}


def look_up_rows(facts):
    """What a look-up of a chunk that the index has is made of, if its goal is missed."""
    found = named(facts.get("index", []), LOOK_UPS)
    if len(found) < len(LOOK_UPS) or found["known"]["value"] <= found["known"]["goal"]:
        return []
    known, new, bare = (found[key]["value"] for key in LOOK_UPS)
    millions = re.search(r"\d+ million", found["known"]["name"]).group(0)
    return [
        f"Of 100,000 look-ups: of chunks that the index has they take {known:.2f} s, of others, for which the filters are asked and "
        f"then mostly nothing, {new:.2f} s. What is left, {10 * (known - new):.1f} µs for one, is finding the block in which the chunk "
        f"stands, and having it: of {millions} chunks nearly each that is asked for stands in a block of its own, which is read from "
        "the page cache, checked, and takes the place of another one in RocksDB's cache of 40 MiB. As a rough measure: reading pages of 4 KiB "
        f"all over the same files, and nothing else, takes {bare:.2f} s.",
        "",
    ]


def aged_state(figures, pattern):
    """The state of the disk that is written all over; of several it is the last: the one with most points."""
    return next((state for state in reversed(figures.tools("age")) if re.match(pattern, state)), None)


def aged_rows(figures, facts):
    """What the restore after a full beside old points is made of, if our goal for it is missed."""
    (points, *_), (full, _, goal), _ = AGE_GOALS
    last, state = aged_state(figures, points), aged_state(figures, full)
    kept = facts.get("age", {})
    if not all("read" in kept.get(label, {}) for label in (last, state, FRESH)):
        return []
    if figures.median("age", state, "wall") <= goal * figures.median("age", FRESH, "wall"):
        return []
    stored, read = kept[state]["size"] - kept[last]["size"], kept[state]["read"]
    return [
        f"Of the restore after a full, nothing pruned: the full has stored {stored / MIB:.0f} MiB, cut anew; the restore reads "
        f"{read / MIB:.0f} MiB of packs, in a new repository {kept[FRESH]['read'] / MIB:.0f}. So at least {(read - stored) / MIB:.0f} MiB are "
        "frames of old increments, for what was not cut anew, among much that has been overwritten since. A prune that may drop "
        "the old points puts it together.",
        "",
    ]


def restored_rows(figures, facts):
    """What a restore among many points has to read that one among few has not, if its goal is missed."""
    states, kept = figures.tools("points"), facts.get("points", {})
    if len(states) < 2 or not all("packs" in kept.get(state, {}) for state in states):
        return []
    few, many = states[0], states[-1]
    (wall, cpu), (wall_of_many, cpu_of_many) = ([figures.median("points", state, what) for what in ("wall", "cpu")] for state in (few, many))
    more = kept[many]["packs"] - kept[few]["packs"]
    if wall_of_many <= MANY_GOAL * wall or more <= 0:
        return []
    return [
        f"Of the restore of {many}: it takes {wall_of_many - wall:.2f} s and {cpu_of_many - cpu:.2f} s of CPU time more than that of {few}. "
        f"It reads {kept[many]['packs']} packs instead of {kept[few]['packs']}, two of each point, which are opened and read from the disk one "
        f"by one, {1000 * (wall_of_many - wall) / more:.1f} ms for each, and all outcomes. What is read of packs is "
        f"{kept[many]['read'] / kept[few]['read']:.2f} times as much. A prune puts small packs together; none ran here.",
        "",
    ]


def points_rows(facts):
    """What the points that there are add to the next one, if its goal is missed."""
    found = named(facts.get("scale", []), POINTS_FIGURES)
    if len(found) < len(POINTS_FIGURES) or found["ratio"]["value"] <= found["ratio"]["goal"]:
        return []
    count = int(re.search(r"the last 20 of (\d+) points", found["late"]["name"]).group(1))
    each = (found["late"]["value"] - found["early"]["value"]) / (count - 24)
    return [
        f"Of the last of {count:,} points: they took {found['late']['value']:.3f} s and the early ones {found['early']['value']:.3f}, "
        f"a difference of {1e6 * each:.0f} µs for each point that there is.",
        "",
    ]


def limit_rows(figures, facts):
    """What the goals that are missed would need: of time and of bytes."""
    cores, late = os.cpu_count() or 1, []
    for work, what, peer, goal in GOALS:
        ours, cpu = figures.median(work, "vmkeep", what), figures.median(work, "vmkeep", "cpu")
        theirs = theirs_of(figures, work, peer, what)
        if what == "wall" and ours and theirs and ours > goal * theirs:
            busy = figures.median(work, "vmkeep", "busy")
            all_at_work = "" if busy is None else f"{busy / cores:.2f}"
            row = [TITLES[work], peer, f"{goal * theirs:.2f}", f"{ours:.2f}", f"{cpu / cores:.2f}", all_at_work]
            late.append("| " + " | ".join(row) + " |")
    rows = []
    if late:
        rows = [
            f"Of time: the goal, what vmkeep took, and what its CPU time would take if all {cores} cores computed for it from "
            "beginning to end: no less is possible without computing less (below is said what is computed); and the same for "
            "the whole machine, since QEMU and libvirt compute on the same cores where a domain is read. What is left of the "
            "time nobody computed: the disk was waited for, or one stage for another, or the host gave the cores to others.",
            "",
            "| work | goal beside | goal, s | vmkeep, s | its CPU time on all cores, s | the machine's, s |",
            "|---|---|---|---|---|---|", *late, "",
        ]
    if any(TITLES["again"] in row for row in late):
        rows += hashing_rows(figures, facts)
    changed, kept = figures.median("writes", CHANGED, "size"), facts.get("writes", {})
    if changed and "metadata_bytes" in kept:
        content, metadata, room = kept["stored_bytes"] / MIB, kept["metadata_bytes"] / MIB, 1.3 * changed / MIB
        rows += [
            f"Of bytes, {kept['count']} writes: the goal is {room:.2f} MiB. The new chunks take {content:.2f}, which leaves "
            f"{room - content:.2f} for maps and index; they take {metadata:.2f}. The writes meet nearly every MiB of the disk, "
            "so each leaf of the map is new. Of a leaf's bytes nearly all are ids of 32 bytes of its chunks, old and new ones, "
            "which do not compress, and each leaf is kept twice. Smaller leaves name fewer old chunks, but more inner nodes "
            "name them.",
            "",
        ]
    for figure in facts.get("metadata", []):
        of_one = re.search(r"of 1 scattered writes: metadata", figure["name"])
        if of_one and figure["goal"] and figure["value"] > figure["goal"]:
            rows += [
                "Of the metadata of one write alone: its leaf, the inner nodes above it and the point's record stand in two packs, "
                "each with a table, and a segment lists both. Most of that are ids of what is beside the write. Further writes "
                "share the inner nodes, the tables and the segment.",
                "",
            ]
    rows += look_up_rows(facts) + aged_rows(figures, facts) + restored_rows(figures, facts) + points_rows(facts)
    return ["## What the missed goals would need", "", *rows] if rows else []


def large_rows(facts):
    """The goals of benches/scale: as it prints them, and those of what it did not measure."""
    rows, judged = [], [figure for figure in large(facts) if figure["goal"] is not None]
    for figure in judged:
        absolute(rows, figure["name"], figure["goal"], figure["value"], figure["unit"])
    for pattern, what, goal, unit in LARGE_GOALS:
        if not any(re.search(pattern, figure["name"]) for figure in judged):
            absolute(rows, what, goal, None, unit)
    return rows


def parts_rows(facts):
    """When, where and with which code each part was measured."""
    parts = facts.get("parts", {})
    machines = list(dict.fromkeys(part["machine"] for part in parts.values()))
    places = {machine: chr(ord("A") + number) for number, machine in enumerate(machines)}
    rows = [f"* machine {place}: {machine}" for machine, place in places.items()]
    if len(machines) > 1:
        rows.append("* each part on one machine, its tools in turn: times of different machines do not compare with each other")
    rows += ["", "| part of `scripts/bench` | date | machine | code | rounds | load when it began |", "|---|---|---|---|---|---|"]
    for name, part in parts.items():
        place = places[part["machine"]]
        # of some tools alone: the commit is in the name, so that no run's row takes the place of another's
        rows.append(f"| {name.removesuffix(', ' + part['code'])} | {part['date']} | {place} | {part['code']} | {part['rounds']} | {part['load']:.1f} |")
    # nothing there is sure to be from the disk
    kept = [name for name, part in parts.items() if not part["cold"]]
    return [*rows, "", *([f"The page cache was not emptied for {', '.join(kept)}.", ""] if kept else [])]


def write(results):
    figures, facts = Figures(results.samples), results.facts
    data = facts.get("data", {})
    lines = [
        "# Results",
        "",
        "Written by `scripts/bench`; none of it by hand. Medians of whole processes, with syncs, the check of each encoded",
        "frame and everything else on. Times, CPU times and bytes are also given as ratios to vmkeep's: above 1 vmkeep is",
        "better. What a goal names is vmkeep's figure divided by the other's.",
        "",
        f"* data: {len(data.get('fleet', []))} images of {data.get('virtual', 0) / (1024 * MIB):g} GiB ({', '.join(data.get('fleet', []))}), "
        f"{data.get('steps', 0)} later states of db",
        *(f"* {tool}: {version}" for tool, version in facts.get("versions", {}).items()),
        *([SMALL] if 0 < data.get("virtual", 0) < GOALS_LEN else []),
        *CONDITIONS,
        *parts_rows(facts),
        "## Goals",
        "",
        *goal_rows(figures, facts),
        "",
        *limit_rows(figures, facts),
        "## Figures",
        "",
    ]
    for work in TITLES:
        if figures.tools(work):
            lines += table(figures, work)
            if work in ("first", "T1"):
                lines += drawn_rows(figures, work)
            if work == "writes":
                lines += writes_rows(facts)
            if work == "prune-all":
                lines += reclaimed_rows(figures, facts)
    for work in AGES:
        if figures.tools(work):
            lines += age_table(figures, facts, work)
            if work == "age":
                lines += [
                    "A full that is asked for cuts anew what lies in pieces of less than 8 KiB on average, and stores that once "
                    "more; a prune puts together what it keeps of packs. A chunk stays as long as any part of it is named.", "",
                ]
    lines += stages.rows(facts)
    lines += scale_rows(facts)
    return "\n".join(lines).rstrip() + "\n"
