# shellcheck shell=bash
# What image scripts share. A script sources this, sets nothing global but its own names, and calls
#   build_static PACKAGE BINARY            a static binary; prints its path
#   up_to_date IMAGE HASH                  whether the daemon has the image made of these inputs
#   import_rootfs DIR IMAGE HASH [CHANGE]  the directory becomes the image; CHANGE as in `docker import -c`
#   debian_into DIR SKIP PACKAGE...        unpacks packages of this machine's distribution
set -euo pipefail

IMAGES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
ROOT=$(dirname "$IMAGES")
CACHE=${CLAWHQ_IMAGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clawhq/images}
TARGET=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/clawhq/target}
# A directory of its own: other flags than the rest, so that neither build throws the other's work away.
STATIC_TARGET=${CLAWHQ_STATIC_TARGET_DIR:-$TARGET-static}
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:$HOME/.cargo/bin"
mkdir -p "$CACHE"

say() { printf '%s\n' "$*" >&2; }
die() { printf 'images: %s\n' "$*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || die "$1 is missing: $2"; }
mib() { awk -v n="$1" 'BEGIN { printf "%.1f MiB", n / 1048576 }'; }
report() { printf '%-10s %-26s %s  %s\n' "$1" "$(mib "$3")" "$2" "${4:-}"; }

build_static() {
  local package=$1 binary=$2 triple out
  need cargo 'install Rust (https://rustup.rs)'
  triple=$(cd "$ROOT" && rustc -vV | sed -n 's/^host: //p')
  # With --target, the flags reach the program and not build scripts and macros, which cannot be static.
  (cd "$ROOT" && RUSTFLAGS='-C target-feature=+crt-static' CARGO_TARGET_DIR=$STATIC_TARGET \
    cargo build --quiet --profile small --target "$triple" -p "$package" --bin "$binary" >&2) ||
    die "$package does not build"
  out=$STATIC_TARGET/$triple/small/$binary
  if readelf -l "$out" 2>/dev/null | grep -q INTERP; then die "$out is not static"; fi
  printf '%s\n' "$out"
}

hash_of() { cat "$@" | sha256sum | cut -c 1-32; }

image_label() { docker image inspect -f '{{index .Config.Labels "clawhq.inputs"}}' "$1" 2>/dev/null || true; }

report_image() {
  local id size
  read -r id size < <(docker image inspect -f '{{.Id}} {{.Size}}' "$2")
  report "$1" "$2" "$size" "$id"
}

up_to_date() { [[ -z ${FORCE:-} && $(image_label "$1") = "$2" ]]; }

import_rootfs() {
  local dir=$1 image=$2 hash=$3 change
  local -a changes=()
  shift 3
  for change in "$@" "LABEL clawhq.inputs=$hash"; do changes+=(-c "$change"); done
  # Names in order and one time for all: the same files are the same layer.
  tar -C "$dir" --sort=name --mtime=@0 --numeric-owner -c . | docker import "${changes[@]}" - "$image" >/dev/null
}

# debian_into DIR SKIP PACKAGE...: the packages and all they depend on, except those whose name matches the
# extended regular expression SKIP. This machine's apt fetches them, with its sources, keys and proxies; they are
# unpacked without running their scripts.
debian_into() {
  local dir=$1 skip=$2 debs=$CACHE/debs list link file
  local -a files=() missing=()
  shift 2
  need apt-get 'images are made of Debian or Ubuntu packages'
  need dpkg-deb 'images are made of Debian or Ubuntu packages'
  mkdir -p "$debs"
  if ! list=$(package_files "$@"); then
    say 'refreshing the package lists: they lack something the image is made of'
    apt-get -qq update >&2 || die 'apt-get update failed: is the network up?'
    list=$(package_files "$@") || die "apt does not know all of: $*"
  fi
  mapfile -t files < <(grep -Ev "^($skip)_" <<<"$list")
  for file in "${files[@]}"; do [[ -s $debs/$file ]] || missing+=("${file%%_*}"); done
  if (( ${#missing[@]} )); then
    (cd "$debs" && apt-get -qq -o APT::Sandbox::User=root download "${missing[@]}" >&2) || die 'packages could not be fetched'
  fi
  # Merged as every distribution of today has it, before anything is unpacked.
  for link in bin sbin lib lib64; do
    mkdir -p "$dir/usr/$link"
    ln -sfn "usr/$link" "$dir/$link"
  done
  for file in "${files[@]}"; do
    dpkg-deb --fsys-tarfile "$debs/$file" | tar -C "$dir" --keep-directory-symlink --numeric-owner -xpf -
  done
}

# The files apt would fetch to install the packages where nothing is installed.
package_files() {
  local uris
  uris=$(apt-get -qq -o Dir::State::status=/dev/null --no-install-recommends --print-uris install "$@" 2>/dev/null) &&
    [[ -n $uris ]] && awk '{ print $2 }' <<<"$uris" | sort
}
