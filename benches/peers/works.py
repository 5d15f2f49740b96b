"""The works that are measured. Each is the same for every tool, and each restore is compared bit for bit."""

import itertools
import os
import shutil

from content import data_ranges, make_noise
from lab import Domain
from meter import MIB, Failed, Sample, cold, measure, output, same, say, tree_size, warm
from tools import Virtnbdbackup, Vmkeep


class History:
    """First backups of all images, the later states of one, all of it read again, restored, checked, pruned."""

    WORKS = ["first", "next", "T1", "again", "restore", "check", "prune", "prune-all"]

    def __init__(self, data, results, reads=1):
        """`reads`: how often a round restores and checks, which does not last long and changes nothing that matters."""
        self.data, self.results, self.reads = data, results, reads
        self.fleet = [name for name in ("base", "base2", "web", "web2", "webxfs", "dev") if os.path.exists(self.image(name))]
        self.fleet.append("db.T0")
        self.steps = 0
        while os.path.exists(self.image(f"db.T{self.steps + 1}")):
            self.steps += 1
        self.last = f"db.T{self.steps}"

    def image(self, name):
        return os.path.join(self.data, f"{name}.raw")

    def run(self, tools, limits, number):
        """Of each work each of `tools` has its turn before the next work begins, so that those that are compared run within
        minutes, and a busy host is busy for all of them."""
        turns = [self.turn(tool, number) for tool in tools]
        if limits is not None:
            turns.append(limits.turn(number))
        try:
            for _ in itertools.zip_longest(*turns):
                pass
        finally:
            for folder in [tool.root for tool in tools] + ([] if limits is None else [limits.folder]):
                shutil.rmtree(folder, ignore_errors=True)

    def turn(self, tool, number):
        """What one tool does in a round; gives way to the others behind each work."""
        add = lambda work, sample, size=None: self.results.add(sample, work, tool.name, number, size)
        tool.reset()
        first = Sample("", "", 0)
        for name in self.fleet:
            cold()
            first.add(tool.backup(name, self.image(name)))
        before = tool.size()
        add("first", first, before)
        yield
        later = Sample("", "", 0)
        for step in range(1, self.steps + 1):
            name = f"db.T{step}"
            later.add(tool.next(name, self.image(name), step))
            if step == 1:
                add("T1", Sample("", "", 0, later.wall, later.cpu, later.rss), tool.size() - before)
        size = tool.size()
        add("next", later, size - before)
        yield
        warm(self.image(self.last))
        add("again", tool.again(self.last, self.image(self.last)), tool.size() - size)
        if isinstance(tool, Vmkeep):
            self.note("again", tool, number, tool.newest["stats"]["stored_bytes"])
        yield
        for _ in range(self.reads):
            cold()
            add("restore", tool.restore(self.last, self.image(self.last)))
            same(tool.restored(self.last, self.image(self.last)), self.image(self.last))
            tool.clean()
            yield
        for _ in range(self.reads):
            cold()
            add("check", tool.check())
            yield
        yield from self.prune(tool, number, add)

    def note(self, fact, tool, number, value):
        self.results.facts.setdefault(fact, {}).setdefault(tool.name, {})[str(number)] = value

    def prune(self, tool, number, add):
        """Drops points and prunes as each tool does unasked; then once more, so that nothing unused stays."""
        self.note("full_size", tool, number, tool.size())
        cold()
        # the size is taken behind the work
        sample = tool.drop([f"db.T{step}" for step in range(0, self.steps, 2)])
        add("prune", sample, tool.size())
        yield
        cold()
        sample = tool.prune_all()
        if sample is not None:
            add("prune-all", sample, tool.size())
        yield
        self.check_after(tool)

    def check_after(self, tool):
        """What is left has to restore after the prune too."""
        name = f"db.T{1 if self.steps > 1 else self.steps}"
        tool.restore(name, self.image(name))
        same(tool.restored(name, self.image(name)), self.image(name))
        tool.clean()


class Limits:
    """What bare programs need for reading or copying the last state."""

    WORKS = ["limits"]

    def __init__(self, history, folder):
        self.image, self.results, self.reads = history.image(history.last), history.results, history.reads
        self.folder = os.path.join(folder, "limits")
        self.out, self.log = os.path.join(self.folder, "limit.raw"), os.path.join(folder, "limits.log")

    def turn(self, number):
        """Each as the work that it is compared with, behind the tools' turns of that: hashed out of the page cache, copied from the
        disk and synced."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        # nothing is compared with them: "first" and "next"
        yield
        yield
        dense = os.path.join(self.folder, "limit.data")
        keep_data(self.image, dense)
        for name, threads, path in (("b3sum", 2, self.image), ("b3sum-data", 2, dense), ("b3sum-1", 1, self.image)):
            warm(path)
            self.add(number, name, ["b3sum", "--num-threads", threads, path])
        os.unlink(dense)
        yield
        copies = {
            "nbdcopy": ["nbdcopy", "--flush", "--", "[", "qemu-nbd", "-r", "-f", "raw", self.image, "]", self.out],
            "dd": ["dd", f"if={self.image}", f"of={self.out}", "bs=4M", "conv=sparse,fsync"],
        }
        for _ in range(self.reads):
            for name, argv in copies.items():
                cold()
                self.add(number, name, argv)
                same(self.out, self.image)
                os.unlink(self.out)
            yield

    def add(self, number, name, argv):
        self.results.add(measure(argv, self.log), "limits", name, number)


def keep_data(image, path):
    """Copies what a sparse file holds, without the holes."""
    with open(image, "rb") as file, open(path, "wb") as out:
        for start, end in data_ranges(image):
            for at in range(start, end, 4 * MIB):
                file.seek(at)
                out.write(file.read(min(4 * MIB, end - at)))


def block_offsets(path, length):
    """Where a file has data: the first byte of each block of so many bytes that is not all hole."""
    offsets = set()
    for start, end in data_ranges(path):
        offsets.update(range(start // length * length, end, length))
    return sorted(offsets)


def fixed_blocks(history, folder):
    """Bytes of all images in distinct blocks of 4 MiB, each compressed by zstd 1: what Proxmox Backup Server keeps."""
    import hashlib

    blocks = os.path.join(folder, "blocks")
    shutil.rmtree(blocks, ignore_errors=True)
    os.makedirs(blocks)
    seen, total, batch = set(), 0, []

    def pack():
        nonlocal total, batch
        if batch:
            output(["zstd", "-q", "-1", "--rm", *batch])
            total += tree_size(blocks)
            shutil.rmtree(blocks)
            os.makedirs(blocks)
        batch = []

    for name in history.fleet:
        with open(history.image(name), "rb") as file:
            for at in block_offsets(history.image(name), 4 * MIB):
                file.seek(at)
                block = file.read(4 * MIB)
                if not block.strip(b"\0"):
                    continue
                digest = hashlib.blake2b(block, digest_size=20).hexdigest()
                if digest not in seen:
                    seen.add(digest)
                    batch.append(os.path.join(blocks, digest))
                    with open(batch[-1], "wb") as out:
                        out.write(block)
                    if len(batch) == 64:
                        pack()
    pack()
    shutil.rmtree(blocks)
    say(f"fixed blocks of 4 MiB: {total / MIB:.0f} MiB")
    return total


class Live:
    """A running domain with a full gibibyte that nothing compresses, read over NBD; and the same with nothing written to it."""

    WORKS = ["live", "idle", "live-again"]

    def __init__(self, lab, program, folder, results, size):
        self.lab, self.folder, self.results, self.size = lab, folder, results, size
        self.domain, self.log = Domain(lab, "live"), os.path.join(folder, "live.log")
        self.vmkeep = Vmkeep(folder, program, self.domain)
        self.virtnbdbackup = Virtnbdbackup(folder, self.domain)

    def run(self, rounds):
        raw = os.path.join(self.folder, "live.raw")
        make_noise(raw, self.size)
        self.domain.start(raw)
        turns = [self.turn_of_vmkeep, self.nbdcopy, self.turn_of_virtnbdbackup]
        for number in range(rounds):
            first = number % len(turns)
            for turn in turns[first:] + turns[:first]:
                turn(number, raw)
        self.domain.remove()
        shutil.rmtree(self.vmkeep.root)
        shutil.rmtree(self.virtnbdbackup.root)
        os.unlink(raw)

    def turn_of_vmkeep(self, number, raw):
        self.full(self.vmkeep, "full", number, raw)
        self.idle(number)
        self.again(number)
        self.domain.forget_checkpoints()

    def turn_of_virtnbdbackup(self, number, raw):
        try:
            self.full(self.virtnbdbackup, "copy", number, raw)
        except (Failed, OSError) as error:
            say(f"virtnbdbackup: {error}")

    def full(self, tool, level, number, raw):
        tool.reset()
        warm(self.domain.image)
        self.results.add(tool.domain_backup(level), "live", tool.name, number, tool.size())
        tool.remember(self.domain.name)
        tool.restore(self.domain.name, raw)
        same(tool.restored(self.domain.name, raw), raw)
        tool.clean()

    def idle(self, number):
        """An incremental of nothing, and libvirt's own backup job without a reader beside it."""
        self.results.add(self.vmkeep.domain_backup("inc"), "idle", "vmkeep", number)
        uri, name = self.lab.uri(), self.domain.name
        job, place = os.path.join(self.folder, "job.xml"), os.path.join(self.lab.folder, "bk")
        with open(job, "w") as out:
            out.write(f"<domainbackup mode='pull'><server transport='unix' socket='{place}/bench.sock'/><disks>"
                      "<disk name='vda' backup='yes' type='file' backupmode='full' exportname='vda'>"
                      f"<scratch file='{place}/bench.scratch'/></disk></disks></domainbackup>\n")
        script = f"virsh -q -c '{uri}' backup-begin {name} {job} && virsh -q -c '{uri}' domjobabort {name}"
        self.results.add(measure(["sh", "-c", script], self.log), "idle", "libvirt", number)

    def again(self, number):
        """A full that is asked for, of what is stored already."""
        warm(self.domain.image)
        self.results.add(self.vmkeep.domain_backup("full"), "live-again", "vmkeep", number)
        self.vmkeep.remember(self.domain.name)
        self.results.facts.setdefault("live_again", {})[str(number)] = self.vmkeep.newest["stats"]["stored_bytes"]

    def nbdcopy(self, number, raw):
        out = os.path.join(self.folder, "copy.raw")
        self.lab.call("begin", self.domain.name)
        warm(self.domain.image)
        try:
            address = f"nbd+unix:///vda?socket={self.socket()}"
            self.results.add(measure(["nbdcopy", "--flush", address, out], self.log), "live", "nbdcopy", number)
        finally:
            self.lab.call("end", self.domain.name)
        same(out, raw)
        os.unlink(out)

    def socket(self):
        import xml.etree.ElementTree as tree

        job = tree.fromstring(self.lab.call("virsh", "backup-dumpxml", self.domain.name))
        return job.find("server").get("socket")
