#!/usr/bin/env bash
# Make the environment that the Makefile's targets run in: tools/make_environment.sh FOLDER REQUIREMENTS
#
# A finished installation leaves a stamp named by the requirements' content, so that running this again costs nothing and
# an edited requirements file is installed again. An interrupted one is done over from the beginning.
# PYTHON=... chooses the interpreter (3.11 or 3.12).
set -euo pipefail

environment=$1
requirements=$2
installing=$environment/.installing

fail() {
    printf 'make_environment: %s\n' "$*" >&2
    exit 2
}

version_of() { # prints 3.11, say; fails for what is no Python that runs
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_supported() {
    case "$(version_of "$1")" in 3.11 | 3.12) ;; *) return 1 ;; esac
}

find_python() { # prints the interpreter to build on
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12 (got $(version_of "$PYTHON" || echo "nothing that runs"))"
        echo "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.11 python3.12; do
        if is_supported "$name"; then
            [ "$name" = python3 ] || echo "python3 is $(version_of python3 || echo "not there"); using $name" >&2
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed; python3 on PATH is $(version_of python3 || echo "not there")." \
        "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), or say where it is: make PYTHON=/path/to/python3.11"
}

create() { # $1: interpreter
    if [ -e "$environment" ]; then # replaced only if it is what this script makes
        [ -e "$environment/pyvenv.cfg" ] || fail "$environment exists and is no virtual environment; say another: make VENV=FOLDER"
        rm -rf "$environment"
    fi
    if "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv "$environment"
    else # Debian without python3-venv: an empty environment, filled by the interpreter's own pip
        "$1" -m venv --without-pip "$environment"
        "$1" -m pip --python "$environment/bin/python" install --quiet pip setuptools ||
            fail "$1 has neither ensurepip nor a pip of 22.3 or newer. Debian, Ubuntu: apt-get install $(basename "$1")-venv"
    fi
}

digest_of_input() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c 1-16
}

included_by() { # $1: requirements file; prints the files that it includes by -r
    sed -n 's/^-r *//p' "$1"
}

stamp_of() { # $1: requirements file; prints the stamp of its content and of what it includes
    echo "$environment/.requirements-$(included_by "$1" | xargs cat "$1" | digest_of_input)"
}

stamp=$(stamp_of "$requirements")
if [ -e "$stamp" ] && is_supported "$environment/bin/python"; then
    exit 0
fi
if [ -e "$installing" ]; then
    echo "The last installation into $environment was interrupted: starting again."
fi
if [ -e "$installing" ] || ! is_supported "$environment/bin/python" || ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Making $environment with $python ($("$python" -c 'import sys; print(sys.executable, "%d.%d.%d" % sys.version_info[:3])'))"
    create "$python"
fi

echo "Installing $requirements into $environment (a minute or two where packages arrive fast)"
touch "$installing"
rm -f "$environment"/.requirements-*
# Bytecode is compiled afterwards by all processors instead of by pip on one.
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --requirement "$requirements"
# Some packages carry templates that are no Python: those are reported by an exit code that says nothing more.
"$environment/bin/python" -m compileall -qq -j 0 "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
for file in "$requirements" $(included_by "$requirements"); do touch "$(stamp_of "$file")"; done
rm -f "$installing"
