#!/usr/bin/env bash
# lab.sh - a private libvirt daemon with throw-away domains, to test backups on.
#
# Everything (configuration, sockets, logs, images, checkpoints) lives under one
# directory, LAB_DIR, so several labs run side by side. No systemd, no system
# service, no change under /etc or /var: the daemon runs in libvirt's *session*
# mode with all XDG paths inside LAB_DIR.
#
# Most domains have no operating system. They sit in the firmware, and `write`
# changes their disks from inside QEMU, so that dirty bitmaps see it. A domain
# with a real Linux in it is made by guest.sh, beside this file.
#
#   lab.sh install [--dev]        install the packages this needs (--dev: the build's too)
#   lab.sh start                  start the daemon
#   lab.sh stop [--purge]         stop domains and daemon; --purge also removes LAB_DIR
#   lab.sh uri                    print the connection URI for clients
#   lab.sh env                    print `export` lines for clients that insist on qemu:///session
#   lab.sh virsh ARGS...          virsh, connected to the lab
#
#   lab.sh define [OPTION...] NAME [DISK...]       define and start a domain
#     DISK     TARGET:FORMAT:SIZE[:OPTION,...]; default: vda:qcow2:1G vdb:qcow2:512M
#     TARGET   vda.. (virtio), sda.. (sata), hda.. (ide)
#     FORMAT   qcow2, raw or cdrom
#     SIZE     as for qemu-img, or the /path of an existing image
#     options  readonly, or an option of `qemu-img create -o`, e.g. cluster_size=4k
#     --mem MIB           memory (default 64)
#     --kernel FILE --initrd FILE --cmdline TEXT     boot a Linux; its console is in LAB_DIR/NAME.console
#     --agent             a channel for the QEMU guest agent
#     --uefi              OVMF firmware with an NVRAM file (package ovmf)
#     --off               define only, do not start
#   lab.sh on NAME                start a domain
#   lab.sh off NAME               stop it (QEMU saves its bitmaps)
#   lab.sh crash NAME             kill -9 its QEMU: its bitmaps become inconsistent
#   lab.sh undefine NAME          stop it and forget it, its checkpoints, images and NVRAM
#
#   lab.sh write NAME DISK OFFSET LENGTH PATTERN   write PATTERN (a byte, e.g. 0xab); `-z` writes zeroes
#   lab.sh discard NAME DISK OFFSET LENGTH         discard a range
#   lab.sh check NAME DISK OFFSET LENGTH PATTERN   fail unless the guest would read PATTERN
#   lab.sh io NAME DISK COMMAND...                 any qemu-io command
#   lab.sh image NAME DISK                         print the path of a disk's image
#   lab.sh truth NAME DISK FILE                    copy what the guest would read now to a raw FILE
#   lab.sh agent NAME [SECONDS]                    wait until the guest agent answers (default 60)
#
#   lab.sh bitmaps NAME           list the dirty bitmaps of a running domain
#   lab.sh begin NAME [INCREMENTAL] [CHECKPOINT]   begin a pull backup of the writable disks; "" = none
#   lab.sh dirty NAME DISK        print the dirty extents of the running backup: OFFSET LENGTH
#   lab.sh end NAME               end the backup
#   lab.sh selftest               the whole cycle of backups in a fresh LAB_DIR, then stop --purge
#
# LAB_DIR    where the lab lives (default /tmp/vmkeep-lab); at most 44 characters,
#            since libvirt puts unix sockets deep below it
# LAB_ACCEL  kvm or qemu (= TCG); default: kvm where /dev/kvm can be opened
# LAB_UID    uid used where root cannot make a user namespace (default 65534)
# LAB_CACHE  the one thing shared between labs: what libvirt found out about this
#            machine's QEMU (8 s with KVM). Default ~/.cache/vmkeep-lab; empty: share nothing
set -euo pipefail

LAB_DIR=${LAB_DIR:-/tmp/vmkeep-lab}
LAB_UID=${LAB_UID:-65534}
LAB_CACHE=${LAB_CACHE-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/vmkeep-lab}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONF=$LAB_DIR/c RUN=$LAB_DIR/r CACHE=$LAB_DIR/k IMG=$LAB_DIR/img BK=$LAB_DIR/bk
PIDFILE=$RUN/daemon.pid
PROBED=libvirt/qemu/capabilities # below CACHE and LAB_CACHE

say() { printf 'lab: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --- who the daemon runs as ------------------------------------------------
# Session mode is chosen by libvirt when the effective uid is not 0. Root runs
# it in a user namespace where root is called uid 1000: files stay root's and
# /dev/kvm stays usable. Where that is forbidden (chroots, some containers),
# root falls back to LAB_UID, then usually without KVM.
user_mode() {
  if [ "$(id -u)" != 0 ]; then echo self
  elif unshare --user --map-user=1000 --map-group=1000 true 2>/dev/null; then echo userns
  else echo setpriv; fi
}
as_user() {
  local clean=(env -i PATH="$PATH:/usr/sbin:/usr/bin" LC_ALL=C.UTF-8 HOME="$LAB_DIR" XDG_RUNTIME_DIR="$RUN"
    XDG_CONFIG_HOME="$CONF" XDG_CACHE_HOME="$CACHE" XDG_DATA_HOME="$CONF")
  case $(user_mode) in
    self) "${clean[@]}" "$@" ;;
    userns) unshare --user --map-user=1000 --map-group=1000 "${clean[@]}" "$@" ;;
    setpriv) setpriv --reuid "$LAB_UID" --regid "$LAB_UID" --clear-groups "${clean[@]}" "$@" ;;
  esac
}
# gives files of the lab to the daemon's user; files elsewhere stay whose they are
own() {
  local f
  [ "$(user_mode)" = setpriv ] || return 0
  for f; do case $f in "$LAB_DIR" | "$LAB_DIR"/*) chown -R "$LAB_UID:$LAB_UID" "$f" ;; esac; done
}

# --- finding things --------------------------------------------------------
tool() { # tool NAME...: the first one installed
  local t
  for t; do PATH="$PATH:/usr/sbin:/usr/libexec" command -v "$t" && return; done
  die "none of these is installed: $* (try: lab.sh install)"
}
socket() { # the monolithic daemon and the modular one name their sockets differently
  case $(tool libvirtd virtqemud) in
    *libvirtd) echo "$RUN/libvirt/libvirt-sock" ;;
    *) echo "$RUN/libvirt/virtqemud-sock" ;;
  esac
}
uri() { echo "qemu+unix:///session?socket=$(socket)"; }
vsh() { virsh -q -c "$(uri)" "$@"; }
accel() {
  if [ -n "${LAB_ACCEL:-}" ]; then echo "$LAB_ACCEL"
  elif as_user sh -c 'exec 3<>/dev/kvm' 2>/dev/null; then echo kvm
  else echo qemu; fi
}
pid_alive() { # a zombie is dead, though kill -0 likes it
  grep -qs '^State:[[:space:]]*[A-Y]' "/proc/$1/status"
}
pid_dead() { ! pid_alive "$1"; }
daemon_pid() { cat "$PIDFILE" 2>/dev/null; }
daemon_alive() { [ -s "$PIDFILE" ] && pid_alive "$(daemon_pid)"; }
wait_for() { # wait_for SECONDS COMMAND...
  local n=$(($1 * 20))
  shift
  while ! "$@" 2>/dev/null; do
    n=$((n - 1))
    [ $n -gt 0 ] || return 1
    sleep 0.05
  done
}
# the processes of this lab, by their command lines: it finds them even where
# their pid files are gone
lab_pids() {
  local f pid
  for f in $(grep -lsF -- "$LAB_DIR/" /proc/[0-9]*/cmdline || true); do
    pid=${f#/proc/} pid=${pid%/cmdline}
    case $(cat "/proc/$pid/comm" 2>/dev/null || true) in
      libvirtd | virtqemud | qemu-system* | qemu-kvm | qemu-nbd) echo "$pid" ;;
    esac
  done
}

# --- daemon ----------------------------------------------------------------
cmd_install() {
  local groups=(lab)
  if [ "${1:-}" = --dev ]; then groups+=(build oracle guest); fi
  exec "$HERE/../../scripts/setup" "${groups[@]}"
}

check_place() {
  case $LAB_DIR in /*) ;; *) die "LAB_DIR must be absolute: $LAB_DIR" ;; esac
  [ ${#LAB_DIR} -le 44 ] || die "LAB_DIR is too long for unix sockets (44 characters at most): $LAB_DIR"
  # without /sys domains fail to start with "An error occurred, but the cause is unknown"
  [ -d /sys/devices/system/cpu ] || die "/sys is not mounted"
}
write_config() {
  mkdir -p "$CONF/libvirt" "$RUN" "$CACHE" "$IMG" "$BK"
  chmod 700 "$RUN"
  # QEMU's output straight to a file (else libvirt starts a virtlogd that outlives the lab)
  printf '%s\n' 'stdio_handler = "file"' 'security_driver = "none"' >"$CONF/libvirt/qemu.conf"
  printf 'log_outputs = "3:file:%s"\n' "$LAB_DIR/daemon.log" |
    tee "$CONF/libvirt/libvirtd.conf" >"$CONF/libvirt/virtqemud.conf"
}
# libvirt itself checks that what it finds here still fits QEMU, itself and the
# kernel, so an old cache costs time and nothing else
cache_load() {
  [ -n "$LAB_CACHE" ] && [ -d "$LAB_CACHE/$PROBED" ] || return 0
  mkdir -p "$CACHE/$PROBED"
  cp "$LAB_CACHE/$PROBED"/*.xml "$CACHE/$PROBED/" 2>/dev/null || true
}
cache_save() {
  local f to
  [ -n "$LAB_CACHE" ] && mkdir -p "$LAB_CACHE/$PROBED" 2>/dev/null || return 0
  for f in "$CACHE/$PROBED"/*.xml; do
    to=$LAB_CACHE/$PROBED/${f##*/}
    if [ -s "$f" ] && ! cmp -s "$f" "$to"; then
      # by rename: another lab may be reading
      cp "$f" "$to.$$"
      mv "$to.$$" "$to"
    fi
  done
}
cmd_start() {
  check_place
  if daemon_alive; then say "already running"; return; fi
  write_config
  cache_load
  own "$LAB_DIR"
  local try
  # a daemon on a busy machine now and then drops its first client, who makes it probe every QEMU binary
  for try in 1 2 3; do
    daemon_alive || as_user "$(tool libvirtd virtqemud)" -d -p "$PIDFILE" </dev/null >/dev/null
    wait_for 10 test -S "$(socket)" || die "no socket; see $LAB_DIR/daemon.log"
    if vsh domcapabilities >/dev/null; then break; fi
    [ "$try" != 3 ] || die "daemon does not answer; see $LAB_DIR/daemon.log"
    sleep 1
  done
  cache_save
  say "daemon $(daemon_pid), $(vsh version | sed -n 's/^Running hypervisor: //p'), accel $(accel), run as $(user_mode)"
}

cmd_stop() {
  local d pid
  if daemon_alive; then
    for d in $(vsh list --name || true); do vsh destroy "$d" >/dev/null || true; done
    pid=$(daemon_pid)
    kill "$pid" 2>/dev/null || true
    wait_for 10 pid_dead "$pid" || say "daemon $pid does not stop"
  fi
  for pid in $(lab_pids); do
    kill -9 "$pid" 2>/dev/null || true
    wait_for 10 pid_dead "$pid" || die "process $pid cannot be killed"
    say "killed leftover process $pid"
  done
  if [ "${1:-}" = --purge ]; then rm -rf "$LAB_DIR"; fi
}

# --- domains ---------------------------------------------------------------
image_path() { echo "$IMG/$1-$2.$3"; } # NAME TARGET FORMAT

# disk_xml NAME SPEC: creates the image where there is none, prints the device
disk_xml() {
  local name=$1 target format size options file bus o create='' device=disk readonly=''
  IFS=: read -r target format size options <<<"$2"
  case $target in
    vd*) bus=virtio ;; sd*) bus=sata ;; hd*) bus=ide ;;
    *) die "bad target: '$target' in $2" ;;
  esac
  case $format in
    qcow2 | raw) ;;
    cdrom) device=cdrom readonly='<readonly/>' format=raw ;;
    *) die "bad format: '$format' in $2" ;;
  esac
  for o in ${options//,/ }; do
    if [ "$o" = readonly ]; then readonly='<readonly/>'; else create=$create${create:+,}$o; fi
  done
  file=$size
  if [ "${size#/}" = "$size" ]; then
    file=$(image_path "$name" "$target" "$format")
    [ -e "$file" ] || qemu-img create -q -f "$format" ${create:+-o "$create"} "$file" "$size" >&2
  fi
  own "$file"
  # a user alias gives the device a name we know, for `io`
  cat <<XML
    <disk type='file' device='$device'>
      <driver name='qemu' type='$format' discard='unmap'/><source file='$file'/>
      <target dev='$target' bus='$bus'/><alias name='ua-$target'/>$readonly
    </disk>
XML
}
uefi_xml() { # NAME; prints loader and nvram
  local d
  for d in /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/OVMF/OVMF_CODE.fd; do
    [ -e "$d" ] || continue
    printf "<loader readonly='yes' type='pflash'>%s</loader><nvram template='%s'>%s</nvram>" \
      "$d" "${d/CODE/VARS}" "$IMG/$1.nvram"
    return
  done
  die "no UEFI firmware is installed (package ovmf)"
}

cmd_define() {
  local mem=64 kernel='' initrd='' cmdline='' agent='' uefi='' off='' name os devices='' spec
  while [ "${1#--}" != "${1:-}" ]; do
    case $1 in
      --mem) mem=$2; shift ;;
      --kernel) kernel=$2; shift ;;
      --initrd) initrd=$2; shift ;;
      --cmdline) cmdline=$2; shift ;;
      --agent) agent=1 ;;
      --uefi) uefi=1 ;;
      --off) off=1 ;;
      *) die "define: unknown option $1" ;;
    esac
    shift
  done
  [ $# -gt 0 ] || die "define: no name given"
  name=$1
  shift
  # the name is part of socket paths
  [[ $name =~ ^[A-Za-z0-9_.-]{1,20}$ ]] || die "define: a name has 1 to 20 letters, digits or _.- : '$name'"
  [ $# -gt 0 ] || set -- vda:qcow2:1G vdb:qcow2:512M
  for spec; do devices+=$(disk_xml "$name" "$spec")$'\n'; done
  if [ -n "$agent" ]; then
    # a path of our own: libvirt's default one may be too long for a socket
    devices+="<channel type='unix'><source mode='bind' path='$RUN/$name.agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
  fi
  os="<type arch='x86_64' machine='pc'>hvm</type>"
  if [ -n "$uefi" ]; then os+=$(uefi_xml "$name"); fi
  if [ -n "$kernel" ]; then
    os+="<kernel>$kernel</kernel><initrd>$initrd</initrd><cmdline>console=ttyS0 panic=-1 $cmdline</cmdline>"
    devices+="<serial type='file'><source path='$LAB_DIR/$name.console'/></serial>"
  fi
  define_xml "$name" "$mem" "$os" "$devices"
  if [ -n "$off" ]; then say "$name is defined, $# disks"; return; fi
  cmd_on "$name"
  say "$name is running, $# disks"
}
# <acpi/>: without it libvirt 9.0 passes -no-acpi, which QEMU >= 9 refuses
define_xml() { # NAME MEMORY OS DEVICES
  vsh define /dev/stdin <<XML >/dev/null
<domain type='$(accel)'>
  <name>$1</name><memory unit='MiB'>$2</memory><vcpu>1</vcpu>
  <os>$3</os>
  <features><acpi/></features>
  <devices>
    <emulator>$(tool qemu-system-x86_64 qemu-kvm)</emulator>
    $4
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
</domain>
XML
}

cmd_on() { vsh start "$1" >/dev/null; }
cmd_off() {
  vsh destroy --graceful "$1" >/dev/null
  wait_for 10 is_off "$1" || die "$1 is still running"
}
is_off() { [[ $(vsh domstate "$1") == 'shut off'* ]]; }
cmd_crash() {
  local pid
  pid=$(cat "$RUN/libvirt/qemu/run/$1.pid")
  kill -9 "$pid"
  wait_for 10 is_off "$1" || die "$1 is still running"
}
cmd_undefine() {
  is_off "$1" || vsh destroy "$1" >/dev/null
  vsh undefine "$1" --checkpoints-metadata --snapshots-metadata --nvram >/dev/null
  rm -f "$IMG/$1"-*.qcow2 "$IMG/$1"-*.raw "$LAB_DIR/$1.console"
}
cmd_agent() { # NAME [SECONDS]
  wait_for "${2:-60}" agent_answers "$1" || die "the agent of $1 does not answer; see $LAB_DIR/$1.console"
}
agent_answers() { vsh qemu-agent-command "$1" '{"execute":"guest-ping"}' --timeout 5 >/dev/null; }

# --- what the guest writes and reads ----------------------------------------
# qemu-io prints to QEMU's stdout, so to the domain's log; the monitor always says success.
cmd_io() {
  local name=$1 disk=$2 dev log from out
  shift 2
  dev=/machine/peripheral/ua-$disk
  case $disk in vd*) dev=$dev/virtio-backend ;; esac
  log=$CACHE/libvirt/qemu/log/$name.log
  from=$(($(stat -c %s "$log") + 1))
  out=$(vsh qemu-monitor-command "$name" --hmp "qemu-io -d $dev \"$*\"")
  [ -z "${out//[[:space:]]/}" ] || die "$out"
  # QEMU's stdout is line-buffered, and flush and discard print nothing when all is well
  case $1 in flush* | discard*) ;; *) wait_for 1 log_has "$log" "$from" || true ;; esac
  out=$(log_since "$log" "$from")
  if grep -qiE 'failed|error|invalid|not found|out of range' <<<"$out"; then die "$disk: $* -> $out"; fi
  printf '%s\n' "$out" | sed '/^$/d'
}
# libvirt's own lines are not QEMU's answer: it notes the first use of the monitor
log_since() { tail -c "+$2" "$1" | grep -v ' is tainted: ' || true; }
log_has() { [ -n "$(log_since "$1" "$2")" ]; }
cmd_write() {
  local what=(-P "$5")
  if [ "$5" = -z ]; then what=(-z); fi
  [[ $(cmd_io "$1" "$2" write "${what[@]}" "$3" "$4") == wrote\ * ]] || die "not written: $*"
}
cmd_discard() { cmd_io "$1" "$2" discard "$3" "$4" >/dev/null; }
cmd_check() { [[ $(cmd_io "$1" "$2" read -P "$5" "$3" "$4") == read\ * ]] || die "not as expected: $*"; }

disk_fields() { # NAME: one line "TARGET DEVICE FORMAT READONLY FILE" for each disk
  vsh dumpxml "$1" | python3 -c '
import sys, xml.etree.ElementTree as E
for d in E.parse(sys.stdin).iter("disk"):
    ro = "ro" if d.find("readonly") is not None else "rw"
    file = d.find("source").get("file") if d.find("source") is not None else "-"
    print(d.find("target").get("dev"), d.get("device"), d.find("driver").get("type"), ro, file)'
}
cmd_image() { disk_fields "$1" | awk -v t="$2" '$1 == t { print $5; n = 1 } END { exit !n }' || die "$1 has no disk $2"; }
# The truth is read by another program than the one under test, from the image
# itself. Neither the guest nor QEMU may write meanwhile: the domain is paused
# and QEMU's own caches are flushed.
cmd_truth() {
  local name=$1 disk=$2 file=$3 format image state
  read -r format image < <(disk_fields "$name" | awk -v t="$disk" '$1 == t { print $3, $5 }') || die "$name has no disk $disk"
  state=$(vsh domstate "$name")
  if [ "$state" = running ]; then vsh suspend "$name" >/dev/null; fi
  if [ "$state" != 'shut off' ]; then cmd_io "$name" "$disk" flush; fi
  qemu-img convert -U -f "$format" -O raw "$image" "$file" || { vsh resume "$name" >/dev/null; die "cannot copy $image"; }
  if [ "$state" = running ]; then vsh resume "$name" >/dev/null; fi
}

# --- bitmaps and backups, without the program under test ---------------------
cmd_bitmaps() {
  vsh qemu-monitor-command "$1" '{"execute":"query-named-block-nodes","arguments":{"flat":true}}' | python3 -c '
import json, sys
for node in json.load(sys.stdin)["return"]:
    for b in node.get("dirty-bitmaps", []):
        flags = [f for f in ("recording", "persistent", "busy", "inconsistent") if b.get(f)]
        if b.get("name"): print(node["image"]["filename"], b["name"], b["count"], *flags)'
}
writable_disks() { disk_fields "$1" | awk '$2 == "disk" && $4 == "rw" { print $1, $3 }'; } # TARGET FORMAT

cmd_begin() {
  local name=$1 inc=${2:-} chk=${3:-} args=("$BK/$1.xml")
  backup_xml "$name" "$inc" >"$BK/$name.xml"
  if [ -n "$chk" ]; then
    checkpoint_xml "$name" "$chk" >"$BK/$name-chk.xml"
    args+=("$BK/$name-chk.xml")
  fi
  vsh backup-begin "$name" "${args[@]}" >/dev/null
}
backup_xml() { # NAME INCREMENTAL
  local disk format mode
  echo "<domainbackup mode='pull'><server transport='unix' socket='$BK/$1.sock'/><disks>"
  writable_disks "$1" | while read -r disk format; do
    mode="backupmode='full'" # a raw disk has no bitmaps: it is always read in full
    if [ -n "$2" ] && [ "$format" = qcow2 ]; then mode="backupmode='incremental' incremental='$2'"; fi
    echo "<disk name='$disk' backup='yes' type='file' $mode exportname='$disk'><scratch file='$BK/$1-$disk.scratch'/></disk>"
  done
  echo "</disks></domainbackup>"
}
checkpoint_xml() { # NAME CHECKPOINT; disks must be named: the default takes raw ones too, and then fails
  local disk format kind
  echo "<domaincheckpoint><name>$2</name><disks>"
  writable_disks "$1" | while read -r disk format; do
    case $format in qcow2) kind=bitmap ;; *) kind=no ;; esac
    echo "<disk name='$disk' checkpoint='$kind'/>"
  done
  echo "</disks></domaincheckpoint>"
}
cmd_dirty() { # qemu-img shows a dirty range of the bitmap as "data": false
  qemu-img map --output=json --image-opts \
    "driver=nbd,server.type=unix,server.path=$BK/$1.sock,export=$2,x-dirty-bitmap=qemu:dirty-bitmap:backup-$2" |
    python3 -c 'import json, sys
for e in json.load(sys.stdin):
    if not e["data"]: print(e["start"], e["length"])'
}
cmd_end() {
  vsh domjobabort "$1"
  # the job is gone a moment later: only then may the next one begin
  wait_for 10 no_job "$1" || die "backup of $1 does not end"
}
no_job() { ! vsh backup-dumpxml "$1" >/dev/null; }

# --- selftest --------------------------------------------------------------
expect() { # expect WHAT ACTUAL WANTED
  [ "$2" = "$3" ] || die "selftest: $1: got '$2', wanted '$3'"
  say "ok: $1"
}
backup_dirty() { # backup_dirty NAME INC CHK: a whole backup; prints the dirty offsets of vda in MiB
  cmd_begin "$@"
  cmd_dirty "$1" vda | awk '{ printf "%s%d+%d", sep, $1 / 1048576, $2 / 65536; sep = " " }'
  cmd_end "$1"
}
cmd_selftest() {
  [ ! -e "$LAB_DIR" ] || die "selftest wants a LAB_DIR that does not exist yet: $LAB_DIR"
  trap 'cmd_stop' EXIT # the files stay, to look at what failed
  cmd_start
  test_writes one
  test_week one
  test_crash one
  test_purge
  trap - EXIT
  say "selftest passed"
}
test_writes() {
  cmd_define "$1" vda:qcow2:256M vdb:qcow2:64M:cluster_size=4k vdc:raw:16M vdd:qcow2:1M:readonly sda:cdrom:1M
  expect "disks to back up" "$(writable_disks "$1" | xargs)" "vda qcow2 vdb qcow2 vdc raw"
  cmd_write "$1" vda 32M 1M 0x99
  cmd_write "$1" vda 32M 4k -z
  cmd_discard "$1" vda 32832k 64k
  cmd_check "$1" vda 32M 4k 0
  cmd_check "$1" vda 32772k 4k 0x99
  cmd_check "$1" vda 32832k 64k 0
  expect "a wrong pattern is noticed" "$( (cmd_check "$1" vda 32772k 4k 0x98) 2>&1 | grep -ciE 'failed')" 1
  cmd_truth "$1" vda "$LAB_DIR/truth"
  expect "the truth is what the guest reads" \
    "$(od -An -tx1 -j $((32 * 1048576 + 4095)) -N 2 "$LAB_DIR/truth" | xargs)" "00 99"
}
test_week() {
  local t=$1 c
  cmd_write "$t" vda 1M 64k 0x11
  cmd_begin "$t" "" mon
  cmd_write "$t" vda 1M 64k 0x12
  expect "a backup does not see later writes" \
    "$(qemu-io -r -f raw -c 'read -P 0x11 1M 64k' "nbd+unix:///vda?socket=$BK/$t.sock" | grep -c '^read')" 1
  cmd_end "$t"
  expect "full: nothing left behind" "$(find "$BK" -name '*.sock' -o -name '*.scratch')" ""
  cmd_write "$t" vda 2M 512 0x21
  expect "inc1 (tue) since full" "$(backup_dirty "$t" mon tue)" "1+1 2+1"
  cmd_write "$t" vda 3M 64k 0x31
  expect "inc2 (wed) since inc1" "$(backup_dirty "$t" tue wed)" "3+1"
  cmd_write "$t" vda 4M 64k 0x41
  expect "diff1 (thu) since FULL" "$(backup_dirty "$t" mon thu)" "1+1 2+1 3+1 4+1"
  cmd_write "$t" vda 5M 64k 0x51
  expect "inc3 (fri) since diff1" "$(backup_dirty "$t" thu fri)" "5+1"
  cmd_write "$t" vda 6M 64k 0x61
  expect "diff2 (sat) since FULL" "$(backup_dirty "$t" mon sat)" "1+1 2+1 3+1 4+1 5+1 6+1"
  for c in tue wed thu fri; do vsh checkpoint-delete "$t" $c >/dev/null; done
  expect "pruned to full + last" "$(vsh checkpoint-list "$t" --name --topological | xargs)" "mon sat"
  cmd_write "$t" vda 7M 64k 0x71
  expect "diff3 after the prune" "$(backup_dirty "$t" mon sun)" "1+1 2+1 3+1 4+1 5+1 6+1 7+1"
}
test_crash() {
  local t=$1 c
  cmd_off "$t"
  cmd_on "$t"
  expect "bitmaps survive a stop" "$(cmd_bitmaps "$t" | grep -c ' mon ')" 2
  cmd_crash "$t"
  cmd_on "$t"
  expect "bitmaps are inconsistent after a crash" "$(cmd_bitmaps "$t" | grep ' mon ' | grep -c inconsistent)" 2
  expect "then an incremental is refused" "$(cmd_begin "$t" mon x 2>&1 | grep -oE "missing or broken bitmap 'mon'")" \
    "missing or broken bitmap 'mon'"
  for c in mon sat sun; do vsh checkpoint-delete "$t" $c >/dev/null; done
  cmd_begin "$t" "" again
  cmd_end "$t"
  expect "a new full starts over" "$(vsh checkpoint-list "$t" --name | xargs)" again
}
test_purge() { # the worst case: the daemon dies, its domain lives on, the pid files are gone
  kill -9 "$(daemon_pid)"
  rm -rf "$RUN"
  expect "a domain outlives its daemon" "$(lab_pids | wc -l)" 1
  cmd_stop --purge
  expect "purge leaves no process" "$(lab_pids)" ""
  expect "purge leaves no file" "$(ls -d "$LAB_DIR" 2>/dev/null || true)" ""
}

usage() { sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//'; }
case ${1:-} in
  install | start | stop | define | on | off | crash | undefine | write | discard | check | io | image | truth | agent | \
    bitmaps | begin | dirty | end | selftest) c=$1; shift; "cmd_$c" "$@" ;;
  uri) uri ;;
  env) printf 'export %s\n' "XDG_RUNTIME_DIR=$RUN" "XDG_CONFIG_HOME=$CONF" "XDG_CACHE_HOME=$CACHE" "LIBVIRT_DEFAULT_URI=$(uri)" ;;
  virsh) shift; vsh "$@" ;;
  -h | --help | help) usage ;;
  *) usage >&2; exit 2 ;;
esac
