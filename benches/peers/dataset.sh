#!/usr/bin/env bash
# dataset.sh - builds disk images as hosts have them, and the later days of one of them.
#
#   dataset.sh DIR [full|small]
#
# As root: images are loop-mounted, Debian is installed in them by mmdebstrap, from the mirror that apt uses here.
#
#   base base2 web web2 webxfs dev .raw   servers: installed independently, cloned, on ext4 and XFS (small: base web)
#   db.T0.raw                             a PostgreSQL server with a database of pgbench
#   db.T1.raw ...                         the same server later: work, packages, an upgrade, a bulk load, fstrim
#   db.d1.json ...                        what QEMU's dirty bitmap (64 KiB) says was written: [[offset, length], ...]
#
# What is there already is kept. The content differs from day to day, as Debian's packages do.
set -euo pipefail

DIR=${1:?usage: dataset.sh DIR [full|small]} KIND=${2:-full}
WORK=$DIR/work
mkdir -p "$WORK"
say() { printf '%s dataset: %s\n' "$(date +%T)" "$*" >&2; }
die() { say "$*"; exit 1; }

SERVER=systemd-sysv,openssh-server,ca-certificates,rsyslog,cron,logrotate,python3,sudo,less,vim-tiny
WEB=(nginx php-fpm php-mysql)
case $KIND in
  full)
    SIZE=8G SCALE=40 STEPS=5
    SERVER+=,linux-image-cloud-amd64,cloud-init,vim,curl,man-db,locales,qemu-guest-agent,htop,tcpdump,nftables,chrony
    WEB+=(php-gd php-xml php-curl mariadb-server redis-server nodejs wordpress wordpress-l10n certbot python3-django)
    ;;
  # 6 GB are for all of it beside a restored image without holes, which is what one of the peers writes
  small) SIZE=1792M SCALE=4 STEPS=2 ;;
  *) die "no such kind of data: $KIND" ;;
esac
# shellcheck disable=SC2016
sources() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sort -u; }
CODENAME=$(. /etc/os-release && echo "$VERSION_CODENAME")
MIRROR=$(sources | awk -v c="$CODENAME" '$0 !~ /security|updates|backports/ && ($2 == c || $2 ~ /stable/) { print $1; exit }')
[ -n "$MIRROR" ] || die "apt has no source for $CODENAME"

# --- images ------------------------------------------------------------------
# a partition on a disk, as an installer makes it
make_image() { # FILE FILESYSTEM
  local device
  truncate -s "$SIZE" "$1"
  echo 'start=2048, type=83' | sfdisk -q "$1"
  device=$(losetup --find --show --offset 1048576 "$1")
  if [ "$2" = xfs ]; then mkfs.xfs -q "$device"; else mkfs.ext4 -q "$device"; fi
  losetup --detach "$device"
}
open_image() { # FILE NAME
  local root=$WORK/$2
  mkdir -p "$root"
  losetup --find --show --offset 1048576 "$1" >"$WORK/$2.loop"
  mount "$(cat "$WORK/$2.loop")" "$root"
}
open_chroot() { # FILE NAME: with what programs in it want to see
  local root=$WORK/$2
  open_image "$1" "$2"
  mkdir -p "$root/proc" "$root/sys" "$root/dev"
  mount -t proc proc "$root/proc"
  mount -t sysfs sys "$root/sys"
  mount --bind /dev "$root/dev"
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  # packages do not start their services
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod 755 "$root/usr/sbin/policy-rc.d"
}
close_image() { # NAME
  local root=$WORK/$1 below
  for below in dev sys proc; do
    if mountpoint -q "$root/$below"; then umount -l "$root/$below"; fi
  done
  sync -f "$root"
  umount "$root"
  losetup --detach "$(cat "$WORK/$1.loop")"
}
close_all() { # whatever is still open after a failure
  local loop
  for loop in "$WORK"/*.loop; do
    [ -e "$loop" ] || continue
    if mountpoint -q "${loop%.loop}"; then close_image "$(basename "${loop%.loop}")" || true; fi
  done
  if [ -n "${DAEMON:-}" ]; then kill "$DAEMON" 2>/dev/null || true; fi
}
trap close_all EXIT

inside() { # NAME COMMAND...
  local name=$1
  shift
  chroot "$WORK/$name" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@" >>"$WORK/$name.log" 2>&1 ||
    die "$name: '$*' failed; see $WORK/$name.log"
}
install() { # NAME PACKAGE...
  local name=$1
  shift
  inside "$name" apt-get -q update
  inside "$name" apt-get -q -y --no-install-recommends install "$@"
}
tidy() { # NAME
  inside "$1" apt-get clean
  sync -f "$WORK/$1"
  fstrim "$WORK/$1"
}

# server NAME [FILESYSTEM] [PACKAGE...]: installed from nothing
server() {
  local name=$1 fs=${2:-ext4} new=$WORK/$1.new
  [ ! -e "$DIR/$name.raw" ] || return 0
  shift 2
  say "$name"
  rm -f "$new"
  make_image "$new" "$fs"
  open_image "$new" "$name"
  mmdebstrap --quiet --variant=minbase --include="$SERVER" "$CODENAME" "$WORK/$name" "deb $MIRROR $CODENAME main" \
    >>"$WORK/$name.log" 2>&1 || die "mmdebstrap failed; see $WORK/$name.log"
  echo "$name" >"$WORK/$name/etc/hostname"
  head -c 8192 /dev/urandom >"$WORK/$name/var/lib/random-seed"
  close_image "$name"
  open_chroot "$new" "$name"
  if [ $# -gt 0 ]; then install "$name" "$@"; fi
  if [ "$name" = db.T0 ]; then fill_database; fi
  tidy "$name"
  close_image "$name"
  mv "$new" "$DIR/$name.raw"
}
# clone NAME FROM PACKAGE...: another server's image, with more in it
clone() {
  local name=$1 from=$2 new=$WORK/$1.new
  [ ! -e "$DIR/$name.raw" ] || return 0
  shift 2
  say "$name, from $from"
  cp --sparse=always "$DIR/$from.raw" "$new"
  open_chroot "$new" "$name"
  echo "$name" >"$WORK/$name/etc/hostname"
  install "$name" "$@"
  tidy "$name"
  close_image "$name"
  mv "$new" "$DIR/$name.raw"
}

# --- the database server -----------------------------------------------------
SERVER_NOW=db.T0
postgres() { inside "$SERVER_NOW" su postgres -c "$*"; }
version() { basename "$(echo "$WORK/$SERVER_NOW"/usr/lib/postgresql/*)"; }
start_database() {
  local v
  v=$(version)
  postgres "/usr/lib/postgresql/$v/bin/pg_ctl -w -D /var/lib/postgresql/$v/main -l /var/log/postgresql/bench.log \
    -o '-c config_file=/etc/postgresql/$v/main/postgresql.conf -c listen_addresses= -c log_min_duration_statement=0' start"
}
stop_database() {
  local v
  v=$(version)
  postgres "/usr/lib/postgresql/$v/bin/pg_ctl -w -D /var/lib/postgresql/$v/main -m fast stop"
}
transactions() { postgres "pgbench -n -c 4 -t $1 postgres"; } # of each of four clients
fill_database() {
  start_database
  postgres "pgbench -q -i -s $SCALE postgres"
  transactions 500
  stop_database
}
day_1() { # light work
  start_database
  transactions 1500
  stop_database
}
day_2() { # packages
  install "$SERVER_NOW" git python3-numpy
  start_database
  transactions 500
  stop_database
  # the small data has no other day for it
  if [ "$KIND" = small ]; then day_5; fi
}
day_3() { # heavy work, things deleted
  start_database
  transactions $((SCALE * 250))
  stop_database
  inside "$SERVER_NOW" rm -rf /usr/share/doc
}
day_4() { # every package that is not the newest, and a log that is rotated
  echo "deb $MIRROR $CODENAME-updates main" >>"$WORK/$SERVER_NOW/etc/apt/sources.list"
  inside "$SERVER_NOW" apt-get -q update
  inside "$SERVER_NOW" apt-get -q -y -o Dpkg::Options::=--force-confold dist-upgrade
  inside "$SERVER_NOW" gzip -k /var/log/postgresql/bench.log
}
day_5() { # a bulk load, a dump, a vacuum, a trim
  start_database
  postgres "psql -q -c 'create table more as select i, md5(i::text) m, now() t from generate_series(1, $SCALE * 15000) i' \
    -c 'create index on more (m)' -c 'vacuum full pgbench_history'"
  transactions 3000
  postgres "pg_dump -Fc -f /var/lib/postgresql/dump postgres"
  stop_database
  fstrim "$WORK/$SERVER_NOW"
}

# --- days, with QEMU's own dirty bitmaps -------------------------------------
# QEMU serves the raw file through FUSE; what is mounted from there is seen by its bitmaps.
qmp() {
  python3 -c '
import json, socket, sys
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(sys.argv[1])
lines = monitor.makefile("rw")
lines.readline()
for text in [json.dumps({"execute": "qmp_capabilities"}), *sys.argv[2:]]:
    lines.write(text + "\n")
    lines.flush()
    answer = {}
    while not answer.keys() & {"return", "error"}:
        answer = json.loads(lines.readline())
    if "error" in answer:
        sys.exit(answer["error"]["desc"])
' "$WORK/qmp.sock" "$@"
}
execute() { printf '{"execute": "%s", "arguments": {%s}}' "$1" "$2"; }
start_daemon() {
  rm -f "$WORK/qmp.sock" "$WORK/nbd.sock"
  : >"$WORK/live.fuse"
  qemu-storage-daemon --blockdev driver=file,filename="$WORK/live.raw",node-name=file,discard=unmap \
    --blockdev driver=raw,file=file,node-name=disk,discard=unmap \
    --chardev socket,path="$WORK/qmp.sock",server=on,wait=off,id=monitor --monitor chardev=monitor \
    --nbd-server addr.type=unix,addr.path="$WORK/nbd.sock" >"$WORK/daemon.log" 2>&1 &
  DAEMON=$!
  for _ in $(seq 100); do
    [ ! -S "$WORK/nbd.sock" ] || return 0
    sleep 0.1
  done
  die "qemu-storage-daemon does not start; see $WORK/daemon.log"
}
day() { # N
  local n=$1
  say "db.T$n"
  SERVER_NOW=db.T$n
  qmp "$(execute block-dirty-bitmap-add "\"node\": \"disk\", \"name\": \"day$n\", \"granularity\": 65536")" \
    "$(execute block-export-add "\"type\": \"fuse\", \"id\": \"fuse$n\", \"node-name\": \"disk\", \"mountpoint\": \"$WORK/live.fuse\", \"writable\": true")"
  open_chroot "$WORK/live.fuse" "$SERVER_NOW"
  "day_$n"
  close_image "$SERVER_NOW"
  qmp "$(execute block-export-del "\"id\": \"fuse$n\"")"
  sleep 1 # the export goes away after the answer
  qmp "$(execute block-dirty-bitmap-disable "\"node\": \"disk\", \"name\": \"day$n\"")" \
    "$(execute block-export-add "\"type\": \"nbd\", \"id\": \"nbd$n\", \"node-name\": \"disk\", \"name\": \"disk\", \"bitmaps\": [\"day$n\"]")"
  nbdinfo --json --map="qemu:dirty-bitmap:day$n" "nbd+unix:///disk?socket=$WORK/nbd.sock" >"$WORK/map.json"
  qmp "$(execute block-export-del "\"id\": \"nbd$n\"")"
  sleep 1
  python3 -c 'import json, sys
dirty = [[part["offset"], part["length"]] for part in json.load(open(sys.argv[1])) if part["type"] & 1]
json.dump(dirty, open(sys.argv[2], "w"))' "$WORK/map.json" "$DIR/db.d$n.json"
  cp --sparse=always "$WORK/live.raw" "$WORK/live.copy"
  mv "$WORK/live.copy" "$DIR/db.T$n.raw"
}
history() {
  local n
  [ ! -e "$DIR/db.T$STEPS.raw" ] || return 0
  cp --sparse=always "$DIR/db.T0.raw" "$WORK/live.raw"
  start_daemon
  for n in $(seq "$STEPS"); do day "$n"; done
  kill "$DAEMON"
  wait "$DAEMON" || true
  DAEMON=''
  rm -f "$WORK/live.raw" "$WORK/live.fuse"
}

server base ext4
server db.T0 ext4 postgresql postgresql-contrib
clone web base "${WEB[@]}"
if [ "$KIND" = full ]; then
  server base2 ext4
  server web2 ext4 "${WEB[@]}"
  server webxfs xfs "${WEB[@]}"
  clone dev base build-essential git gdb cargo python3-dev linux-source
fi
history
say "$(du -sh "$DIR" | cut -f 1) in $DIR"
