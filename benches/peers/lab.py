"""Real domains in a private libvirt, and what is written to their disks so that QEMU's bitmaps see it."""

import json
import os
import shlex
import subprocess
import time

from meter import Failed, output

#: bytes that are looked at together for being zero
PIECE = 65536


class Lab:
    """tests/lab/lab.sh in a directory of its own."""

    def __init__(self, script, folder):
        self.script, self.folder = script, folder
        self.env = {"LAB_DIR": folder}

    def call(self, *args):
        return output(["bash", self.script, *args], self.env)

    def start(self):
        self.call("start")

    def stop(self):
        self.call("stop", "--purge")

    def uri(self):
        return self.call("uri").strip()

    def session(self):
        """The environment in which qemu:///session is this libvirt, for programs that want no other address.

        They have to run as its user: see `as_user`.
        """
        words = shlex.split(self.call("env"))
        # named, and not of the session: a client would look for the system's libvirt first
        return {**dict(word.split("=", 1) for word in words if "=" in word), "LIBVIRT_DEFAULT_URI": ""}

    @staticmethod
    def as_user(*argv):
        """Root's session is the system's libvirt. Where root is called 1000, as the lab's daemon is, it is the lab's."""
        return ["unshare", "--user", "--map-user=1000", "--map-group=1000", *argv]


class Domain:
    """A running domain with one disk, which begins as a raw file says."""

    def __init__(self, lab, name):
        self.lab, self.name = lab, name
        self.image = os.path.join(lab.folder, "img", f"{name}-vda.qcow2")
        self.defined = False

    def uri(self):
        return self.lab.uri()

    def start(self, raw):
        self.remove()
        output(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, self.image])
        self.lab.call("define", self.name, f"vda:qcow2:{os.path.getsize(raw)}")
        self.defined = True
        self.rest()

    def rest(self):
        """Pauses it: without a system in it, its firmware would keep a core busy beside what is measured."""
        self.lab.call("virsh", "suspend", self.name)

    def remove(self):
        if self.defined:
            self.lab.call("undefine", self.name)
            self.defined = False

    def forget_checkpoints(self):
        for checkpoint in reversed(self.lab.call("virsh", "checkpoint-list", "--topological", "--name", self.name).split()):
            self.lab.call("virsh", "checkpoint-delete", self.name, checkpoint)

    def write(self, source, extents):
        """Writes extents of a raw file while the domain is off: the image belongs to one program at a time.

        QEMU keeps the bitmaps in the image, so they say what they would say had the guest written it.
        """
        self.lab.call("off", self.name)
        write_extents(self.image, source, extents)
        self.lab.call("on", self.name)
        self.rest()

    def write_now(self, offsets, contents):
        """Writes blocks from inside QEMU, which is a hundred times sooner than turning the domain off."""
        commands, files = [], []
        for number, (offset, content) in enumerate(zip(offsets, contents)):
            # where this libvirt's QEMU may read
            files.append(os.path.join(self.lab.folder, "bk", f"{number}.block"))
            with open(files[-1], "wb") as out:
                out.write(content)
            device = "/machine/peripheral/ua-vda/virtio-backend"
            io = f'qemu-io -d {device} "write -s {files[-1]} {offset} {len(content)}"'
            commands.append(f"qemu-monitor-command {self.name} --hmp '{io}'")
        said = output(["virsh", "-q", "-c", self.uri(), "; ".join(commands)]).strip()
        for file in files:
            os.unlink(file)
        if said:
            raise Failed(f"{self.name}: {said}")

    def truth(self, raw):
        """Copies what the guest would read to a raw file, by QEMU's own tools."""
        self.lab.call("truth", self.name, "vda", raw)


class HistoryDomain(Domain):
    """The domain `db`: a disk that goes through the states T0, T1, ... of the data."""

    def __init__(self, lab, data):
        super().__init__(lab, "db")
        self.data = data

    def start_at_first(self):
        self.start(os.path.join(self.data, "db.T0.raw"))

    def become(self, step):
        """Writes what the history's step has written."""
        with open(os.path.join(self.data, f"db.d{step}.json")) as file:
            extents = json.load(file)
        self.write(os.path.join(self.data, f"db.T{step}.raw"), extents)


def write_extents(image, source, extents):
    """Writes extents of a raw file into a qcow2 image through qemu-nbd; zeroes become holes, as a trim leaves them."""
    import nbd  # of the system's own Python: package python3-libnbd

    socket = image + ".sock"
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "--discard=unmap", "-k", socket, image])
    try:
        connection = nbd.NBD()
        for _ in range(100):
            if os.path.exists(socket):
                break
            time.sleep(0.05)
        connection.connect_unix(socket)
        with open(source, "rb") as file:
            for offset, length in extents:
                for piece in range(offset, offset + length, 4 << 20):
                    file.seek(piece)
                    write_piece(connection, piece, file.read(min(4 << 20, offset + length - piece)))
        connection.flush()
        connection.shutdown()
    finally:
        server.terminate()
        if server.wait() not in (0, -15):
            raise Failed(f"qemu-nbd ended with {server.returncode}")


def write_piece(connection, at, content):
    """Writes runs of pieces that are zero, or not, with a request for each."""
    zero = [not content[i : i + PIECE].strip(b"\0") for i in range(0, len(content), PIECE)]
    first = 0
    while first < len(zero):
        last = first
        while last + 1 < len(zero) and zero[last + 1] == zero[first]:
            last += 1
        part = content[first * PIECE : (last + 1) * PIECE]
        if zero[first]:
            connection.zero(len(part), at + first * PIECE)
        else:
            connection.pwrite(part, at + first * PIECE)
        first = last + 1
