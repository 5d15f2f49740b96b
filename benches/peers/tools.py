"""vmkeep and its peers: the same work for each, by its own command line."""

import json
import os
import shutil
import time

from meter import Failed, Sample, cold, measure, output, tree_size


class Tool:
    """A backup program with a repository of its own below `root`."""

    name = ""

    def __init__(self, root):
        self.root = os.path.join(root, self.name)
        self.repo = os.path.join(self.root, "repo")
        self.log = os.path.join(root, f"{self.name}.log")
        self.env = {}

    def reset(self):
        shutil.rmtree(self.root, ignore_errors=True)
        os.makedirs(self.root)
        self.init()

    def run(self, *argv):
        return measure(argv, self.log, self.env)

    def size(self):
        return tree_size(self.repo)

    def restored(self, name, image):
        """Where `restore` has put the disk."""
        return os.path.join(self.root, "out", os.path.relpath(image, "/"))

    def clean(self):
        shutil.rmtree(os.path.join(self.root, "out"), ignore_errors=True)

    def next(self, name, image, step):
        """A later state of the same disk: read as a whole where a tool knows no dirty bitmap."""
        cold()
        return self.backup(name, image)

    def prune_all(self):
        """Reclaims all that nothing needs, however little that is; None where `drop` has done so."""
        return None


class Vmkeep(Tool):
    """vmkeep; later states come out of a domain, by its dirty bitmaps."""

    name = "vmkeep"

    def __init__(self, root, program, domain=None):
        super().__init__(root)
        self.program, self.domain = program, domain
        self.env = {
            "VMKEEP_REPOSITORY": self.repo, "VMKEEP_CACHE_DIR": os.path.join(self.root, "cache"),
            "XDG_CONFIG_HOME": os.path.join(self.root, "config"),
        }
        self.points = {}

    def version(self):
        return output([self.program, "version"]).splitlines()[0]

    def init(self):
        self.points = {}
        self.vmkeep("init")

    def vmkeep(self, *args):
        return self.run(self.program, *args)

    def json(self, *args):
        return json.loads(output([self.program, *args, "--json"], self.env).splitlines()[-1])

    def remember(self, name):
        newest = max(self.json("points")["points"], key=lambda point: point["time"])
        self.points.setdefault(name, []).append(newest["point"])
        self.newest = newest

    def backup(self, name, image, level="auto"):
        domain = name.split(".")[0]
        sample = self.vmkeep("backup", "-q", "--file", image, "--name", domain, "-l", level)
        self.remember(name)
        return sample

    def next(self, name, image, step):
        if self.domain is None:
            return super().next(name, image, step)
        if step == 1:
            # the domain's first point makes the checkpoint that the others go on from; nothing of it is new
            self.domain.start_at_first()
            self.domain_backup("full")
            self.remember("db.T0")
        self.domain.become(step)
        cold()
        sample = self.domain_backup("inc")
        self.remember(name)
        return sample

    def domain_backup(self, level):
        return self.vmkeep("-c", self.domain.uri(), "backup", "-q", self.domain.name, "-l", level)

    def again(self, name, image):
        if self.domain is not None:
            # it has been in all its states; its image takes as much room as the last of them
            self.domain.remove()
        # a full, as every backup of an image; one that is asked for would cut anew what is in pieces
        return self.backup(name + ".again", image)

    def restore(self, name, image):
        os.makedirs(os.path.join(self.root, "out"), exist_ok=True)
        return self.vmkeep("restore", "-q", self.points[name][-1], "--to", f"vda={self.restored(name, image)}")

    def restored(self, name, image):
        return os.path.join(self.root, "out", "disk.raw")

    def check(self):
        return self.vmkeep("verify", "-q", "--data")

    def drop(self, names):
        ids = [point for name in names for point in self.points[name]]
        sample = self.vmkeep("forget", "-q", "-y", "--force", *ids)
        sample.add(self.vmkeep("prune", "-q"))
        return sample

    def prune_all(self):
        return self.vmkeep("prune", "-q", "--max-unused", "0%")


class VmkeepFile(Vmkeep):
    """vmkeep without libvirt: whole images are read, as the peers do."""

    name = "vmkeep-file"


class Restic(Tool):
    name = "restic"

    def __init__(self, root, program="restic"):
        super().__init__(root)
        self.program = program
        self.env = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": self.repo, "RESTIC_COMPRESSION": "auto"}

    def version(self):
        return " ".join(output([self.program, "version"]).split()[:2])

    def init(self):
        self.run(self.program, "-q", "init", "--repository-version", "2")

    def backup(self, name, image, *more):
        return self.run(self.program, "-q", "--no-cache", "backup", *more, "--tag", name, image)

    def again(self, name, image):
        return self.backup(name + ".again", image, "--force")

    def restore(self, name, image):
        out = os.path.join(self.root, "out")
        return self.run(self.program, "-q", "--no-cache", "restore", "latest", "--tag", name, "--target", out)

    def check(self):
        return self.run(self.program, "-q", "--no-cache", "check", "--read-data")

    def drop(self, names):
        ids = [self.snapshot(name) for name in names]
        return self.run(self.program, "-q", "--no-cache", "forget", "--prune", *ids)

    def prune_all(self):
        return self.run(self.program, "-q", "--no-cache", "prune", "--max-unused", "0")

    def snapshot(self, name):
        return json.loads(output([self.program, "snapshots", "--tag", name, "--json"], self.env))[0]["id"]


class Rustic(Restic):
    name = "rustic"
    #: what is not needed goes now, and not by a later prune
    AT_ONCE = ["--instant-delete", "--keep-delete", "0s"]

    def __init__(self, root, program="rustic"):
        super().__init__(root, program)
        self.env = {"RUSTIC_PASSWORD": "bench", "RUSTIC_REPOSITORY": self.repo}
        self.quiet = [self.program, "--no-progress", "--no-cache", "--log-level", "warn"]

    def version(self):
        return output([self.program, "--version"]).strip()

    def init(self):
        self.run(*self.quiet, "init")

    def backup(self, name, image, *more):
        return self.run(*self.quiet, "backup", *more, "--tag", name, image)

    def restored(self, name, image):
        return os.path.join(self.root, "out", os.path.basename(image))

    def restore(self, name, image):
        source = f"{self.snapshot(name)}:{os.path.dirname(image)}"
        return self.run(*self.quiet, "restore", source, os.path.join(self.root, "out"))

    def check(self):
        return self.run(*self.quiet, "check", "--read-data")

    def drop(self, names):
        ids = [self.snapshot(name) for name in names]
        return self.run(*self.quiet, "forget", "--prune", *self.AT_ONCE, *ids)

    def prune_all(self):
        return self.run(*self.quiet, "prune", "--max-unused", "0", *self.AT_ONCE)

    def snapshot(self, name):
        said = output([*self.quiet[:-1], "off", "snapshots", "--filter-tags", name, "--json"], self.env)
        return next(snapshot["id"] for snapshot in snapshots_in(json.loads(said)))


def snapshots_in(value):
    """The snapshots in rustic's answer, however its groups are nested."""
    if isinstance(value, dict) and "id" in value and "tree" in value:
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from snapshots_in(inner)


class Borg(Tool):
    """borg with fixed blocks of 4 MiB, which is what suits disk images."""

    name = "borg"
    OPTIONS = ["--compression", "zstd,3", "--files-cache=disabled", "--chunker-params", "fixed,4194304", "--sparse"]

    def __init__(self, root, program="borg"):
        super().__init__(root)
        self.program = program
        self.env = {"BORG_BASE_DIR": os.path.join(self.root, "base"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}

    def version(self):
        return output([self.program, "--version"]).strip() + ", fixed 4 MiB, zstd 3"

    def init(self):
        self.run(self.program, "init", "-e", "none", self.repo)

    def backup(self, name, image):
        return self.run(self.program, "create", *self.OPTIONS, f"{self.repo}::{name}", image)

    def again(self, name, image):
        return self.backup(name + ".again", image)

    def restore(self, name, image):
        out = os.path.join(self.root, "out")
        os.makedirs(out, exist_ok=True)
        return measure([self.program, "extract", "--sparse", f"{self.repo}::{name}"], self.log, self.env, cwd=out)

    def check(self):
        return self.run(self.program, "check", "--verify-data", self.repo)

    def drop(self, names):
        sample = Sample("", "", 0)
        for name in names:
            sample.add(self.run(self.program, "delete", f"{self.repo}::{name}"))
        sample.add(self.run(self.program, "compact", "--threshold", "0", self.repo))
        return sample


def peers(root, wanted):
    """The peers that are installed here; those that are not are named."""
    found, missing = [], []
    for kind in (Restic, Rustic, Borg):
        if wanted and kind.name not in wanted:
            continue
        tool = kind(root)
        try:
            tool.version()
            found.append(tool)
        except (OSError, Failed) as error:
            missing.append(f"{kind.name} ({error})")
    return found, missing


class Virtnbdbackup(Tool):
    """virtnbdbackup, on a domain of the lab. Its repository is the folder of one chain of backups."""

    name = "virtnbdbackup"

    def __init__(self, root, domain, *options):
        super().__init__(root)
        self.domain, self.options = domain, options

    def version(self):
        return "virtnbdbackup " + output(["virtnbdbackup", "--version"]).strip()

    def init(self):
        pass  # it makes the folder

    def session(self, *argv):
        lab = self.domain.lab
        # its socket, and with -S its scratch files: where this libvirt's QEMU may write
        socket = os.path.join(lab.folder, "bk", "v.sock")
        return measure(lab.as_user(*argv, "-U", "qemu:///session", "-n", "-f", socket), self.log, lab.session())

    def domain_backup(self, level):
        scratch = os.path.join(self.domain.lab.folder, "bk")
        return self.session("virtnbdbackup", "-d", self.domain.name, "-l", level, "-S", scratch, "-o", self.repo, *self.options)

    def remember(self, name):
        pass  # it restores the chain's last backup

    def restore(self, name, image):
        """Restores to the qcow2 that it writes, and makes a raw file of that."""
        out = os.path.join(self.root, "out")
        sample = self.session("virtnbdrestore", "-i", self.repo, "-o", out, "-L", self.log + ".restore")
        made = os.path.join(out, os.path.basename(self.domain.image))
        # it leaves its qemu-nbd behind, which holds the image a moment longer
        for wait in (0.2, 1, 5, None):
            try:
                output(["qemu-img", "convert", "-O", "raw", made, self.restored(name, image)])
                break
            except Failed:
                if wait is None:
                    raise
                time.sleep(wait)
        return sample

    def restored(self, name, image):
        return os.path.join(self.root, "out", "disk.raw")
