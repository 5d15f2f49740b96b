#!/usr/bin/env bash
# guest.sh - a small real Linux for the lab: kernel and initial RAM disk, no image to download.
#
# It comes from the distribution's own packages, which are unpacked and not
# installed: its cloud kernel, busybox, the QEMU guest agent, e2fsprogs and their
# libraries. What it does is in guest/: it makes an ext4 file system on each new
# disk, answers as a guest agent, and goes on writing, renaming and deleting
# files. At each freeze it lists the SHA-256 of all files on its console.
#
#   guest.sh build [DIR]                  make DIR/kernel and DIR/initrd; nothing to do if they are newer than guest/
#   guest.sh define [OPTION...] NAME [DISK...]     define and start it in the lab; as lab.sh define, and
#     --idle        without the writer
#     --check       do not write; check the file systems and list their files, as for a restored domain
#   guest.sh wait NAME TEXT [SECONDS]     wait until the console has the line "guest: TEXT" (default 90)
#   guest.sh hashes NAME [freeze|check]   print the last listing: SHA-256 and path (DISK/...) of each file
#   guest.sh shutdown NAME                end it by its agent, with clean file systems
#
# LAB_DIR     as for lab.sh
# LAB_ACCEL   as for lab.sh, but qemu (= TCG) by default: it boots this guest in 15 s anywhere, while a
#             KVM inside a virtual machine may need minutes
# GUEST_DIR   default DIR (~/.cache/vmkeep-guest)
set -euo pipefail

LAB_DIR=${LAB_DIR:-/tmp/vmkeep-lab}
GUEST_DIR=${GUEST_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/vmkeep-guest}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB=$HERE/lab.sh
export LAB_DIR LAB_ACCEL=${LAB_ACCEL:-qemu}
# ext4 asks the crypto layer for crc32c by name when it mounts
MODULES=(virtio_pci virtio_blk virtio_console crypto-crc32c ext4)

say() { printf 'guest: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --- build -------------------------------------------------------------------
kernel_package() { # the one that the distribution's meta package stands for today
  local meta
  for meta in linux-image-cloud-amd64 linux-image-virtual; do
    apt-cache depends --important "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' || true
  done | head -n 1
}
# With an empty list of installed packages apt chooses a set that fits itself,
# whatever this machine has.
user_packages() { # WORK
  apt-get -o Dir::State::status="$1/nothing" -o Dir::Cache::archives="$1" --no-install-recommends --print-uris -y \
    install busybox-static qemu-guest-agent e2fsprogs |
    sed -n "s/^'[^']*' \([a-z0-9.+-]*\)_.*/\1/p" | grep -E '^(busybox-static|qemu-guest-agent|e2fsprogs|zlib1g|lib.*)$' |
    grep -v perl
}
unpack() { # DIR PACKAGE...: downloads and unpacks; DIR has merged directories, as the distributions do
  local dir=$1 d deb
  shift
  mkdir -p "$dir/debs"
  for d in bin sbin lib lib64; do
    mkdir -p "$dir/usr/$d"
    ln -sfn "usr/$d" "$dir/$d"
  done
  (cd "$dir/debs" && apt-get -q -o APT::Sandbox::User=root download "$@" >/dev/null) || die "cannot download: $*"
  for deb in "$dir"/debs/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$dir" --keep-directory-symlink
  done
  rm -r "$dir/debs"
}
# modules ROOT KERNEL_TREE: puts MODULES and what they need into ROOT, and their order into its etc/modules
modules() {
  local root=$1 tree=$2 version kind file rest m
  version=$(basename "$tree"/lib/modules/*)
  depmod -b "$tree" "$version"
  mkdir -p "$root/lib/modules"
  for m in "${MODULES[@]}"; do
    # one that this kernel does not know is built in, or not needed any more
    modprobe -d "$tree" -S "$version" --show-depends "$m" 2>/dev/null || true
  done | awk '!seen[$0]++' | while read -r kind file rest; do
    [ "$kind" = insmod ] || continue
    m=/lib/modules/$(basename "$file" | sed 's/\.ko.*/.ko/')
    case $file in
      *.xz) xz -dc "$file" ;;
      *.zst) zstd -qdc "$file" ;;
      *) cat "$file" ;;
    esac >"$root$m"
    echo "$m"
  done >"$root/etc/modules"
}
programs() { # ROOT USER_TREE
  local root=$1 tree=$2 f
  cp -a "$tree/usr/lib/x86_64-linux-gnu" "$root/usr/lib/"
  cp -a "$tree/usr/lib64/." "$root/usr/lib64/"
  # only the libraries themselves: not character sets, locales and other loadable parts
  find "$root/usr/lib/x86_64-linux-gnu" -mindepth 1 -maxdepth 1 -type d -exec rm -r {} +
  cp -a "$tree"/usr/bin/busybox "$root/usr/bin/"
  for f in qemu-ga mke2fs mkfs.ext4 e2fsck; do cp -a "$tree/usr/sbin/$f" "$root/usr/sbin/"; done
  cp "$tree/etc/mke2fs.conf" "$root/etc/"
  for f in $("$tree/usr/bin/busybox" --list); do
    [ -e "$root/usr/bin/$f" ] || [ -e "$root/usr/sbin/$f" ] || ln -s busybox "$root/usr/bin/$f"
  done
  # these are ours, and stand before busybox's in PATH
  cp "$HERE"/guest/{writer,listing,shutdown} "$root/usr/sbin/"
  cp "$HERE/guest/fsfreeze-hook" "$root/etc/qemu/"
  cp "$HERE/guest/init" "$root/init"
}
cmd_build() { # DIR
  local dir=$1 work root kernel d
  if [ -s "$dir/initrd" ] && [ -z "$(find "$HERE/guest" "$HERE/guest.sh" -newer "$dir/initrd")" ]; then return; fi
  [ -n "$(kernel_package)" ] || update_lists
  kernel=$(kernel_package)
  [ -n "$kernel" ] || die "apt knows no kernel for virtual machines"
  mkdir -p "$dir"
  work=$(mktemp -d "$dir/work.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  root=$work/root
  for d in bin sbin lib lib64; do
    mkdir -p "$root/usr/$d"
    ln -s "usr/$d" "$root/$d"
  done
  mkdir -p "$root"/{dev,proc,sys,run,mnt,tmp,var,etc/qemu}
  : >"$work/nothing"
  mkdir -p "$work/partial"
  say "building from $kernel"
  # shellcheck disable=SC2046
  unpack "$work/user" $(user_packages "$work")
  # shellcheck disable=SC2046
  unpack "$work/kernel" "$kernel" $(apt-cache depends --important "$kernel" | sed -n 's/^ *Depends: \(linux-modules-[^ ]*\)$/\1/p')
  programs "$root" "$work/user"
  modules "$root" "$work/kernel"
  (cd "$root" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -n -6) >"$work/initrd"
  cp "$work"/kernel/boot/vmlinuz-* "$work/kernel.new"
  chmod 644 "$work/initrd" "$work/kernel.new"
  # the initrd last: it is what tells that both are there
  mv "$work/kernel.new" "$dir/kernel"
  mv "$work/initrd" "$dir/initrd"
  say "$dir: kernel $(du -h "$dir/kernel" | cut -f1), initrd $(du -h "$dir/initrd" | cut -f1)"
}
update_lists() {
  say "apt has no package lists yet: fetching them"
  if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi || true
}

# --- in the lab --------------------------------------------------------------
cmd_define() {
  local mode=quiet options=() name
  while [[ ${1:-} == --* ]]; do
    case $1 in
      --idle | --check) mode="quiet guest.${1#--}" ;;
      --off | --uefi) options+=("$1") ;;
      *) options+=("$1" "$2"); shift ;;
    esac
    shift
  done
  [ $# -gt 0 ] || die "define: no name given"
  name=$1
  shift
  [ $# -gt 0 ] || set -- vda:qcow2:128M vdb:qcow2:64M
  cmd_build "$GUEST_DIR"
  # into the lab: its user may not be able to read our cache
  mkdir -p "$LAB_DIR/guest"
  cp -u "$GUEST_DIR/kernel" "$GUEST_DIR/initrd" "$LAB_DIR/guest/"
  "$LAB" define --mem 256 --kernel "$LAB_DIR/guest/kernel" --initrd "$LAB_DIR/guest/initrd" --cmdline "$mode" --agent \
    "${options[@]}" "$name" "$@"
}
console() { [ -e "$LAB_DIR/$1.console" ] && tr -d '\r' <"$LAB_DIR/$1.console"; }
cmd_wait() { # NAME TEXT [SECONDS]
  local n=$((${3:-90} * 10))
  while ! console "$1" | grep -qxF "guest: $2"; do
    n=$((n - 1))
    [ $n -gt 0 ] || die "$1 does not say '$2'; see $LAB_DIR/$1.console"
    if console "$1" | grep -F 'guest: FAILED' >&2; then exit 1; fi
    sleep 0.1
  done
}
cmd_hashes() { # NAME [KIND]
  console "$1" | awk -v kind="${2:-freeze}" '
    $0 == "guest: " kind " begin" { text = ""; inside = 1; next }
    $0 == "guest: " kind " end" { last = text; inside = 0; done = 1; next }
    inside { sub("  [.]/", "  "); text = text $0 "\n" }
    END { printf "%s", last; exit !done }' || die "$1 has listed nothing"
}
cmd_shutdown() {
  local n=300
  "$LAB" virsh shutdown "$1" --mode agent >/dev/null
  until [[ $("$LAB" virsh domstate "$1") == 'shut off'* ]]; do
    n=$((n - 1))
    [ $n -gt 0 ] || die "$1 does not shut down; see $LAB_DIR/$1.console"
    sleep 0.1
  done
}

case ${1:-} in
  build) cmd_build "${2:-$GUEST_DIR}" ;;
  define | wait | hashes | shutdown) c=$1; shift; "cmd_$c" "$@" ;;
  *) sed -n '2,/^set -euo/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
