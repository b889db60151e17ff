# What `make demo` shows: sh show.sh IMAGE. `testudo` is in the PATH; its parts are beside it.
set -u
IMAGE=$1
FAILED=0
PHASES=""
work=$(mktemp -d /tmp/testudo-demo-XXXXXX)
trap 'rm -rf "$work"' EXIT
export TESTUDO_STATE_DIRECTORY="$work/state" TESTUDO_STATE_RUNTIME="$work/run" TESTUDO_IMAGE_STORE="$work/images"

now() { date +%s%N; }
# phase NAME: what follows until the next one is counted to it.
phase() {
    if [ -n "${PHASE:-}" ]; then
        PHASES="$PHASES$(printf '%7s s  %s' "$(( ($(now) - BEGUN) / 10000000 ))" "$PHASE" | sed -E 's/ *([0-9]*)([0-9]{2}) s/   \1.\2 s/')
"
    fi
    PHASE=${1:-}
    BEGUN=$(now)
    [ -z "$PHASE" ] || printf '\n== %s\n' "$PHASE"
}
show() { printf '$ %s\n' "$*"; "$@"; }
# want WORDS COMMAND…: the command's output, which has to have these words.
want() {
    words=$1
    shift
    printf '$ %s\n' "$*"
    said=$("$@" 2>&1)
    printf '%s\n' "$said"
    case $said in
        *"$words"*) ;;
        *) printf 'demo: this should have said: %s\n' "$words"; FAILED=1 ;;
    esac
}

# passt takes the place of the host's network, so there has to be one; an emulated host has none.
if [ -n "${TESTUDO_LAB:-}" ] && [ -z "$(ip route show default)" ]; then
    ip tuntap add demo0 mode tap && ip address add 10.99.0.1/24 dev demo0 && ip link set demo0 up
    ip route add default via 10.99.0.2 dev demo0
fi
NET=none
command -v passt >/dev/null && NET=user

phase "the image, unpacked and run for the first time"
want "Three layers" testudo run --rm --net none "$IMAGE"

phase "a command in a virtual machine of its own"
want "hello from Linux 6" testudo run --rm --net none "$IMAGE" sh -c 'echo "$GREETING from Linux $(uname -r), as $(id -un), process $$"'

phase "an interactive command"
printf 'ls /etc/leftover\necho $((6 * 7))\nexit\n' > "$work/typed"
want "42" testudo run --rm -i --net none "$IMAGE" sh -c 'sh -x 2>&1' < "$work/typed"

phase "a volume"
mkdir "$work/shared" && echo "written on the host" > "$work/shared/host"
want "written on the host" testudo run --rm --net none -v "$work/shared:/data" "$IMAGE" sh -c 'cat /data/host; echo "written in the guest" > /data/guest'
want "written in the guest" cat "$work/shared/guest"

if [ $NET = user ]; then
    phase "a published port"
    show testudo run -d --name web --net user -p 127.0.0.1:18080:80 "$IMAGE" httpd -f -p 80 -h /srv/www
    want "running" testudo ps
    want "inside a virtual machine" curl --silent --show-error --retry 20 --retry-delay 1 --retry-all-errors http://127.0.0.1:18080/
    want "httpd" testudo exec web ps
    show testudo stop web
    want "exited" testudo ps -a
    show testudo rm web
else
    printf '\n== no published port: passt is not installed\n'
fi

phase
printf '\n== seconds\n%s' "$PHASES"
exit $FAILED
