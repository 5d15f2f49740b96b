"""A real domain in a private libvirt, whose disk becomes what the data's history says."""

import json
import os
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

    def socket(self):
        return self.uri().split("socket=")[1]

    def rest(self, name):
        """Pauses a domain: without a system in it, its firmware would keep a core busy beside what is measured."""
        self.call("virsh", "suspend", name)


class Domain:
    """The domain `db`: a disk that goes through the states T0, T1, ... of the data."""

    name = "db"

    def __init__(self, lab, data):
        self.lab, self.data = lab, data
        self.image = os.path.join(lab.folder, "img", f"{self.name}-vda.qcow2")
        self.defined = False

    def uri(self):
        return self.lab.uri()

    def start_at_first(self):
        first = os.path.join(self.data, "db.T0.raw")
        self.remove()
        output(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", first, self.image])
        self.lab.call("define", self.name, f"vda:qcow2:{os.path.getsize(first)}")
        self.defined = True
        self.lab.rest(self.name)

    def remove(self):
        if self.defined:
            self.lab.call("undefine", self.name)
            self.defined = False

    def become(self, step):
        """Writes what the history's step has written, so that QEMU's bitmaps say what they said then.

        The domain is off meanwhile: the image belongs to one program at a time. QEMU keeps the bitmaps in it.
        """
        with open(os.path.join(self.data, f"db.d{step}.json")) as file:
            extents = json.load(file)
        self.lab.call("off", self.name)
        write_extents(self.image, os.path.join(self.data, f"db.T{step}.raw"), extents)
        self.lab.call("on", self.name)
        self.lab.rest(self.name)


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
