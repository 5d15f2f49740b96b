"""What scripts/demo asserts about vmkeep's JSON: demo_check.py OUT WHAT ARGUMENT...

OUT has DAY.json, the output of `backup --json` of each day, and diff.json, that
of the last `diff --json`. Whatever is not as it should be ends with status 1.
"""

import json
import os
import sys

BLOCK = 4096
KIB = 1024
NUMBERS = ["dirty", "read", "changed", "new", "stored", "metadata", "since_base"]
LEVELS = {"full": "full", "inc": "incremental", "diff": "differential"}


def fail(text):
    sys.exit(f"demo: {text}")


def summary(out, day):
    """The last line of a backup's output that is its summary."""
    with open(os.path.join(out, f"{day}.json")) as file:
        lines = [json.loads(line) for line in file if line.strip()]
    found = [line for line in lines if line.get("message_type") == "summary"]
    if not found:
        fail(f"{day}: the backup has printed no summary")
    return found[-1]


def number(out, day, name):
    return summary(out, day)["stats"][f"{name}_bytes"]


def people(count):
    """IEC units, at most one digit after the point."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ["KiB", "MiB", "GiB"]:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def equal(what, got, wanted):
    if got != wanted:
        fail(f"{what}: {got} bytes ({people(got)}), and it should be {wanted} ({people(wanted)})")


def point(out, day, level):
    body = summary(out, day)
    if body["level"] != LEVELS[level]:
        fail(f"{day}: asked for {level}, got {body['level']}")
    # as a person would name it
    print(body["point"][:8])


def tell(out, day):
    parts = [f"{name} {people(number(out, day, name))}" for name in NUMBERS[:5]]
    print(f"   point {summary(out, day)['point'][:8]}: " + ", ".join(parts))


def stored_exactly(out, day, kib):
    equal(f"{day}: new content", number(out, day, "new"), int(kib) * KIB)
    if int(kib) == 0:
        equal(f"{day}: stored", number(out, day, "stored"), 0)


def changed_exactly(out, day, kib):
    equal(f"{day}: changed", number(out, day, "changed"), int(kib) * KIB)


def dirty_exactly(out, day, disk, kib):
    found = [body["stats"]["dirty_bytes"] for body in summary(out, day)["disks"] if body["disk"] == disk]
    equal(f"{day}: dirty of {disk}", sum(found), int(kib) * KIB)


def same_since_base(out, day, later):
    equal(f"{later}: since the full", number(out, later, "since_base"), number(out, day, "since_base"))


def truth_differs(old, new):
    """Offsets of the blocks in which two raw images differ."""
    with open(old, "rb") as a, open(new, "rb") as b:
        offset, differ = 0, set()
        while True:
            x, y = a.read(1 << 20), b.read(1 << 20)
            if not x and not y:
                return differ
            if x != y:
                for i in range(0, max(len(x), len(y)), BLOCK):
                    if x[i : i + BLOCK] != y[i : i + BLOCK]:
                        differ.add(offset + i)
            offset += max(len(x), len(y))


def diff_is_truth(out, truth, old, new):
    """`diff` lists just the blocks in which the copies of the guest's disks differ."""
    with open(os.path.join(out, "diff.json")) as file:
        disks = {disk["disk"]: disk for disk in json.load(file)["disks"]}
    total = 0
    for name in sorted(os.listdir(os.path.join(truth, new))):
        wanted = truth_differs(os.path.join(truth, old, name), os.path.join(truth, new, name))
        listed = set()
        for start, length in disks[name]["ranges"] if name in disks else []:
            listed.update(range(start - start % BLOCK, start + length, BLOCK))
        if listed != wanted:
            wrong = min(listed ^ wanted)
            fail(f"diff {old} {new}: {name} at {wrong}: {'not ' if wrong in wanted else ''}listed wrongly")
        total += len(wanted) * BLOCK
    equal(f"{new}: since the full", number(out, new, "since_base"), total)
    print(f"   {old} to {new}: {people(total)} differ, and just those are listed")


def table(out, *days):
    rows = [["day", "level", *NUMBERS]]
    for day in days:
        body = summary(out, day)
        rows.append([day, body["level"], *(people(body["stats"].get(f"{name}_bytes")) for name in NUMBERS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("   " + "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    twice = sum(number(out, day, "since_base") or 0 for day in days)
    print(f"   Differentials as files would have held {people(twice)};", end=" ")
    print(f"what was new on those days is {people(sum(number(out, d, 'new') for d in days if summary(out, d)['level'] == LEVELS['diff']))}.")


if __name__ == "__main__":
    checks = [point, tell, stored_exactly, changed_exactly, dirty_exactly, same_since_base, diff_is_truth, table]
    {check.__name__: check for check in checks}[sys.argv[2]](sys.argv[1], *sys.argv[3:])
