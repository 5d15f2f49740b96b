# shellcheck shell=bash
# common.sh - what the scripts share; it is sourced, not run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT
# daemons are in sbin, which an ordinary user's PATH may lack
export PATH="$PATH:/usr/sbin:/sbin"
# outside the work tree, so that a new clone does not compile RocksDB again
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/vmkeep-target}"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# new_enough HAVE WANT: compares versions
new_enough() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]; }

# use_cargo: puts a cargo that is new enough for Cargo.toml in front of PATH; fails where there is none
use_cargo() {
  local want have try home=${CARGO_HOME:-${HOME:-/root}/.cargo}
  want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
  # PATH as it is; rustup's own directory; there, a newer toolchain than the default one
  for try in "" "$home/bin" stable; do
    case $try in
      /*) [ -x "$try/cargo" ] || continue; export PATH="$try:$PATH" ;;
      stable) [ -x "$home/bin/rustup" ] || continue; export RUSTUP_TOOLCHAIN=stable ;;
    esac
    have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || continue
    if new_enough "$have" "$want"; then return 0; fi
  done
  return 1
}
