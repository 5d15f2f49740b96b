"""The works that are measured. Each is the same for every tool, and each restore is compared bit for bit."""

import json
import os
import shutil

from meter import MIB, Failed, Sample, measure, output, same, say, tree_size


class History:
    """First backups of all images, the later states of one, all of it read again, restored, checked, pruned."""

    WORKS = ["first", "next", "T1", "again", "restore", "check", "prune"]

    def __init__(self, data, results):
        self.data, self.results = data, results
        self.fleet = [name for name in ("base", "base2", "web", "web2", "webxfs", "dev") if os.path.exists(self.image(name))]
        self.fleet.append("db.T0")
        self.steps = 0
        while os.path.exists(self.image(f"db.T{self.steps + 1}")):
            self.steps += 1
        self.last = f"db.T{self.steps}"

    def image(self, name):
        return os.path.join(self.data, f"{name}.raw")

    def run(self, tool, number):
        add = lambda work, sample, size=None: self.results.add(sample, work, tool.name, number, size)
        tool.reset()
        first = Sample("", "", 0)
        for name in self.fleet:
            first.add(tool.backup(name, self.image(name)))
        before = tool.size()
        add("first", first, before)
        later = Sample("", "", 0)
        for step in range(1, self.steps + 1):
            name = f"db.T{step}"
            later.add(tool.next(name, self.image(name), step))
            if step == 1:
                add("T1", Sample("", "", 0, later.wall, later.cpu, later.rss), tool.size() - before)
        size = tool.size()
        add("next", later, size - before)
        add("again", tool.again(self.last, self.image(self.last)), tool.size() - size)
        add("restore", tool.restore(self.last, self.image(self.last)))
        same(tool.restored(self.last, self.image(self.last)), self.image(self.last))
        tool.clean()
        add("check", tool.check())
        add("prune", tool.drop([f"db.T{step}" for step in range(0, self.steps, 2)]), tool.size())
        self.check_after(tool)
        shutil.rmtree(tool.root)

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
        self.image, self.results = history.image(history.last), history.results
        self.out, self.log = os.path.join(folder, "limit.raw"), os.path.join(folder, "limits.log")

    def run(self, number):
        commands = {
            "b3sum": ["b3sum", self.image],
            "b3sum-1": ["b3sum", "--num-threads", "1", self.image],
            "nbdcopy": ["nbdcopy", "--", "[", "qemu-nbd", "-r", "-f", "raw", self.image, "]", self.out],
            "dd": ["dd", f"if={self.image}", f"of={self.out}", "bs=4M", "conv=sparse,fsync"],
        }
        for name, argv in commands.items():
            self.results.add(measure(argv, self.log), "limits", name, number)
            if os.path.exists(self.out):
                same(self.out, self.image)
                os.unlink(self.out)


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
            while block := file.read(4 * MIB):
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
    """A running domain with a full gibibyte that nothing compresses, read over NBD; and one with nothing dirty."""

    WORKS = ["live", "idle"]

    def __init__(self, lab, vmkeep, folder, results, size):
        self.lab, self.vmkeep, self.folder, self.results, self.size = lab, vmkeep, folder, results, size
        self.name, self.log = "live", os.path.join(folder, "live.log")

    def make(self):
        raw, image = os.path.join(self.folder, "live.raw"), os.path.join(self.lab.folder, "img", "live-vda.qcow2")
        with open("/dev/urandom", "rb") as source, open(raw, "wb") as out:
            for _ in range(self.size // MIB):
                out.write(source.read(MIB))
        output(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image])
        self.lab.call("define", self.name, f"vda:qcow2:{self.size}")
        self.lab.rest(self.name)
        return raw

    def run(self, rounds):
        raw = self.make()
        for number in range(rounds):
            self.vmkeep.reset()
            sample = self.vmkeep.run(
                self.vmkeep.program, "-c", self.lab.uri(), "backup", "-q", self.name, "-l", "full")
            self.results.add(sample, "live", "vmkeep", number, self.vmkeep.size())
            self.vmkeep.remember(self.name)
            self.vmkeep.restore(self.name, raw)
            same(self.vmkeep.restored(self.name, raw), raw)
            self.vmkeep.clean()
            self.idle(number)
            self.forget_checkpoints()
            self.nbdcopy(number, raw)
            self.virtnbdbackup(number, raw)
        self.lab.call("undefine", self.name)
        os.unlink(raw)

    def forget_checkpoints(self):
        for checkpoint in reversed(self.lab.call("virsh", "checkpoint-list", "--topological", "--name", self.name).split()):
            self.lab.call("virsh", "checkpoint-delete", self.name, checkpoint)

    def idle(self, number):
        """An incremental of nothing, and libvirt's own backup job without a reader beside it."""
        uri = self.lab.uri()
        sample = self.vmkeep.run(self.vmkeep.program, "-c", uri, "backup", "-q", self.name, "-l", "inc")
        self.results.add(sample, "idle", "vmkeep", number)
        job, place = os.path.join(self.folder, "job.xml"), os.path.join(self.lab.folder, "bk")
        with open(job, "w") as out:
            out.write(f"<domainbackup mode='pull'><server transport='unix' socket='{place}/bench.sock'/><disks>"
                      "<disk name='vda' backup='yes' type='file' backupmode='full' exportname='vda'>"
                      f"<scratch file='{place}/bench.scratch'/></disk></disks></domainbackup>\n")
        script = f"virsh -q -c '{uri}' backup-begin {self.name} {job} && virsh -q -c '{uri}' domjobabort {self.name}"
        self.results.add(measure(["sh", "-c", script], self.log), "idle", "libvirt", number)

    def nbdcopy(self, number, raw):
        out = os.path.join(self.folder, "copy.raw")
        self.lab.call("begin", self.name)
        try:
            address = f"nbd+unix:///vda?socket={self.socket()}"
            self.results.add(measure(["nbdcopy", "--flush", address, out], self.log), "live", "nbdcopy", number)
        finally:
            self.lab.call("end", self.name)
        same(out, raw)
        os.unlink(out)

    def socket(self):
        import xml.etree.ElementTree as tree

        job = tree.fromstring(self.lab.call("virsh", "backup-dumpxml", self.name))
        return job.find("server").get("socket")

    def virtnbdbackup(self, number, raw):
        out = os.path.join(self.folder, "virtnbdbackup")
        shutil.rmtree(out, ignore_errors=True)
        # its scratch files and its socket: where this libvirt's QEMU may write
        bk = os.path.join(self.lab.folder, "bk")
        argv = ["virtnbdbackup", "-U", "qemu:///session", "-d", self.name, "-l", "copy", "-n", "-S", bk,
                "-f", os.path.join(bk, "v.sock"), "-o", out]
        # root's libvirt is looked for at one place only: in a namespace of its own the lab's is there
        script = 'mount -t tmpfs none /run && mkdir /run/libvirt && mount --bind "$1" /run/libvirt && shift && exec "$@"'
        try:
            sample = measure(
                ["unshare", "-m", "sh", "-c", script, "sh", os.path.dirname(self.lab.socket()), *argv], self.log)
            self.results.add(sample, "live", "virtnbdbackup", number, tree_size(out))
        except (Failed, OSError) as error:
            say(f"virtnbdbackup: {error}")
        shutil.rmtree(out, ignore_errors=True)
