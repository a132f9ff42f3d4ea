#!/bin/sh
# Makes .venv/ with everything that the other targets need, on a machine that has Python 3.11 or later, and, where
# something else is missing, apt (as root, or with a sudo that asks nothing). Cheap when all of it is there already:
# .venv/.installed holds the checksum of the files that decide what is installed.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
python=$venv/bin/python
log=$venv/install.log

say() { printf 'install: %s\n' "$*"; }
fail() {
    printf 'install: error: %s\n' "$*" >&2
    exit 1
}

checksum() {
    cat requirements.lock tools/bootstrap.sh tools/stack/install.py tools/stack/machine.py tools/stack/java.lock \
        tools/stack/dtls.lock tools/stack/kafka/pom.xml | { sha256sum 2>/dev/null || shasum -a 256 || cksum; }
}

wanted=$(checksum)
if [ -x "$python" ] && [ -x $venv/java ] && [ "$(cat $venv/.installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}
can_install() {
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

find_python() {
    for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
        if command -v $candidate >/dev/null &&
            $candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo $candidate
            return
        fi
    done
}

system_python=$(find_python)
if [ -z "$system_python" ] && can_install; then
    say "no Python 3.11 or later, installing Debian's"
    as_root apt-get update -qq >/dev/null
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null
    system_python=$(find_python)
fi
[ -n "$system_python" ] || fail "Python 3.11 or later is needed and not on PATH; install it and run this again."

if ! "$python" -m pip --version >/dev/null 2>&1; then
    if ! $system_python -c 'import ensurepip, venv' 2>/dev/null; then
        package=$system_python-venv
        can_install || fail "$system_python has no venv module; install it (Debian: sudo apt-get install $package)."
        say "$package is missing, installing it"
        as_root apt-get update -qq >/dev/null
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
            fail "apt-get could not install $package."
    fi
    say "making $venv with $($system_python --version)"
    $system_python -m venv --clear $venv
fi

# Two makes at once wait for each other.
if command -v flock >/dev/null; then
    exec 9>$venv/.lock
    flock 9
    if [ "$(cat $venv/.installed 2>/dev/null)" = "$wanted" ] && [ -x $venv/java ]; then
        exit 0
    fi
fi

say "Python packages (some minutes the first time; $log tells more)"
"$python" -m pip install --disable-pip-version-check --no-input --require-hashes -r requirements.lock >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    fail "pip could not install requirements.lock; the whole story is in $log."
}
"$python" -m tools.stack.install --log "$log" --java-home "${JAVA_HOME:-}"

printf '%s\n' "$wanted" >$venv/.installed
say "done"
