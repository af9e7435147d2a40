#!/bin/sh
# Install a lock, or this project, into a virtual environment: with uv where that works, else with pip.
#
#   deploy/install.sh VENV LOCK      what the lock lists, each file checked against its hash
#   deploy/install.sh VENV .         this project itself, editable
#
# An installation that is interrupted leaves a mark. The next one then replaces what it finds, whole or not.
set -eu

venv=$1 what=$2
python=$venv/bin/python
quiet=${CI:+--quiet}

if [ "$what" = . ]; then
  mark=$venv/unfinished-project
  set -- --no-deps --no-build-isolation --editable .
else
  mark=$venv/unfinished-$(basename "$what" .txt)
  set -- --require-hashes --no-deps --requirement "$what"
fi

with_uv() {
  if uv=$(command -v uv) || { uv=$venv/bin/uv && [ -x "$uv" ]; }; then
    "$uv" pip install $quiet --python "$python" ${again:+--reinstall} "$@"
  else
    return 1
  fi
}

with_pip() {
  "$python" -m pip --disable-pip-version-check --no-input install $quiet --no-compile ${again:+--force-reinstall} "$@"
}

again=
if [ -e "$mark" ]; then again=yes; fi
touch "$mark"
case $what in
  */uv.txt) command -v uv >/dev/null || with_pip "$@" || echo 'uv: not to be had here; pip installs the rest, more slowly' ;;
  *) with_uv "$@" || with_pip "$@" ;;
esac
rm -f "$mark"
