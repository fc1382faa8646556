#!/bin/sh
# Makes the texts that examples/llm/README.md measures:  sh examples/llm/texts.sh FOLDER
# FOLDER, outside of this tree, gets prose, perldoc, dialogue, jargon, code and tables .txt, some
# 200 KB each, and long.txt, more than 131,072 tokens, for bench/QUALITY.md; anew, from packages
# of Debian 12 (about 15 MB; those that are there are not downloaded again). Needs Debian's
# apt-get and dpkg-deb, and Python 3. Prints a checksum of each: other versions of the packages
# give other texts, and other figures.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
fail() {
    echo "texts.sh: $*" >&2
    exit 2
}
[ $# -eq 1 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
# Looked at before anything is made: where the folder is, or where its nearest parent is.
near=$1
while [ ! -d "$near" ]; do near=$(dirname -- "$near"); done
near=$(CDPATH='' cd -- "$near" && pwd)
case $near/ in "$root"/*) fail "$1 is inside the source tree; give a folder outside" ;; esac
for tool in apt-get dpkg-deb python3; do
    command -v $tool >/dev/null 2>&1 || fail "needs $tool; on another system give texts of your own"
done
mkdir -p "$1" || fail "cannot make $1; give another folder"
folder=$(CDPATH='' cd -- "$1" && pwd)

for package in anarchism perl-doc fortunes jargon-text miscfiles libpython3.11-stdlib; do
    [ ! -d "$folder/packages/$package" ] || continue
    echo "== $package"
    mkdir -p "$folder/packages"
    (cd "$folder/packages" &&
        apt-get -q -o APT::Sandbox::User="$(id -un)" download "$package" >/dev/null) ||
        fail "apt-get cannot download $package; try apt-get update first"
    rm -rf "$folder/packages/unpacked"
    dpkg-deb -x "$folder/packages/$package"_*.deb "$folder/packages/unpacked"
    mv "$folder/packages/unpacked" "$folder/packages/$package"
    rm "$folder/packages/$package"_*.deb
done

python3 - "$folder" <<'PYTHON'
import glob
import gzip
import hashlib
import html
import os
import re
import sys

folder = sys.argv[1]
SIZE = 200000  # characters: more than 8,192 tokens of any of them
LONG = 700000  # and of that which is for growth


def read(*names):
    """All files of the patterns, by name, as one text."""
    texts = []
    for name in names:
        files = sorted(glob.glob(os.path.join(folder, "packages", name)))
        if not files:
            sys.exit("texts.sh: no %s in these packages; they are of another version" % name)
        for file in files:
            with (gzip.open if file.endswith(".gz") else open)(file, "rb") as data:
                texts.append(data.read().decode("utf-8", "replace"))
    return "\n".join(texts)


def words(page):
    """The text of an HTML page."""
    page = re.sub(r"(?is)<(script|style).*?</\1>", "", page)
    page = re.sub(r"(?i)<(p|br|h\d|li|div|tr)\b[^>]*>", "\n", page)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", page)))


def pod(name):
    return read("perl-doc/usr/share/perl/*/pod/%s.pod" % name)


fortunes = "art computers cookie definitions disclaimer drugs education food".split()
tables = "airport countries currency cities.dat na.phone inter.phone".split()
texts = {
    "prose": words(read("anarchism/usr/share/doc/anarchism/html/secA[1-5].html*")),
    "perldoc": re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1",
                      pod("perlfaq4") + pod("perlop") + pod("perlipc") + pod("perlperf")),
    "dialogue": read(*["fortunes/usr/share/games/fortunes/" + x for x in fortunes]).replace(
        "\n%\n", "\n\n"),
    "jargon": read("jargon-text/usr/share/doc/jargon-text/jargon.txt.gz")[20000:],
    "code": read("libpython3.11-stdlib/usr/lib/python3.11/tarfile.py",
                 "libpython3.11-stdlib/usr/lib/python3.11/doctest.py"),
    "tables": read(*["miscfiles/usr/share/misc/%s.gz" % x for x in tables]),
    "long": words(read("anarchism/usr/share/doc/anarchism/html/sec[A-J]*.html*"))}
for name, text in texts.items():
    data = text[:LONG if name == "long" else SIZE].encode()
    with open(os.path.join(folder, name + ".txt"), "wb") as out:
        out.write(data)
    print("%-8s %6d bytes  sha256 %s" % (name, len(data), hashlib.sha256(data).hexdigest()[:16]))
PYTHON
