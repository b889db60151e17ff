#!/bin/sh
# Runs cargo with the arguments given, after making sure of what cargo itself needs on a fresh
# Debian 12: a C toolchain and a Rust new enough for the workspace. Everything else is the business
# of `cargo xtask setup`.
set -eu

wanted=1.95
PATH="$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin"
export PATH

rust_is_there() {
    found=$(cd "$(dirname "$0")/.." && rustc --version 2>/dev/null | cut -d' ' -f2) || return 1
    cargo --version >/dev/null 2>&1 || return 1
    [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n1)" = "$wanted" ]
}

missing=
command -v cc >/dev/null 2>&1 || missing="build-essential"
rust_is_there || missing="${missing:+$missing }rustc-web cargo-web rustfmt-web rust-web-clippy"

if [ -n "$missing" ]; then
    install="apt-get install -y --no-install-recommends --no-remove $missing"
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        echo "This needs a C compiler and Rust $wanted or newer. Either run, as root:" >&2
        echo "    apt-get update && $install" >&2
        echo "or install Rust by rustup (https://rustup.rs), then start again." >&2
        exit 1
    fi
    echo "bootstrap: installing $missing" >&2
    $as_root apt-get -qq update
    DEBIAN_FRONTEND=noninteractive $as_root $install >&2
fi
exec cargo "$@"
