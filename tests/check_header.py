#!/usr/bin/env python3
"""The form of balancekv.h, and that the other files say the same as it does.

    check_header.py
"""
import os
import re

from bad_config import ROOT, Tally

MAX_LINES, MAX_COLUMNS = 3231, 100
MAX_SCREEN = 60  # lines of README before its second heading
# What only section 4 may name. But section 3 decorates its functions before §4 is read: there, from
# the one line to the other, two of the names are allowed.
PLATFORM = re.compile(r"\b(?:__[A-Z0-9]+(?:_[A-Z0-9]+)*(?:__)?|_M_[A-Z0-9_]+|_MSC_\w+|_WIN\d\d"
                      r"|__(?:has_|x86_64|i\d86|amd64|aarch64|arm|clang|riscv|wasm|powerpc|s390)\w*)"
                      r"(?!\w)")
DECORATION = "#ifndef BALANCEKV_API", "#ifdef __cplusplus"
ALLOWED = {"__GNUC__", "__clang__"}


def read(name):
    """The text of a file, or None."""
    try:
        with open(ROOT + "/" + name, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None


def check_lines(tally, lines):
    tally.check(len(lines) <= MAX_LINES, "%d lines, more than %d" % (len(lines), MAX_LINES))
    for fault, found in (
            ("longer than %d columns" % MAX_COLUMNS, lambda line: len(line.encode()) > MAX_COLUMNS),
            ("tabs", lambda line: "\t" in line),
            ("trailing space", lambda line: line != line.rstrip()),
            ("unfinished work", lambda line: re.search(r"\b(TODO|FIXME|XXX)\b", line))):
        tally.check_none(fault, ["balancekv.h:%d: %s" % (number, line)
                                 for number, line in enumerate(lines, 1) if found(line)])


def check_contents(tally, lines):
    """Table of contents and banners agree; returns the section of each line."""
    listed = [match.groups() for match in (re.match(r"\s+§(\d+)\s+>>(\w+)(?:\s|$)", line)
                                           for line in lines) if match]
    banners, section, sections = [], "0", []
    for line in lines:
        match = re.match(r"(?:/\*|  ) ---- §(\d+) \S.*- >>(\w+)(?: \*/)?$", line)
        if match:
            banners.append(match.groups())
            section = match.group(1)
        sections.append(section)
    tally.check(listed == banners, "the table of contents and the section banners differ",
                "listed:  %s\nbanners: %s" % (listed, banners))
    tally.check([number for number, _ in listed] == [str(i + 1) for i in range(len(listed))]
                and len(listed) >= 10, "sections are not numbered 1, 2, 3 ..", str(listed))
    tags = re.findall(r">>([a-z]\w*)", "\n".join(lines))
    tally.check(sorted(tags) == sorted([tag for _, tag in listed] * 2),
                "a >>tag must stand in the contents and at its banner, nowhere else", str(tags))
    return sections


def check_platform(tally, lines, sections):
    first, last = map(lines.index, DECORATION)
    tally.check({*sections[first:last]} == {"3"}, "the decoration is not in section 3")
    named = [set(PLATFORM.findall(line)) for line in lines]
    tally.check_none("compiler or CPU macros outside section 4", [
        "balancekv.h:%d: %s" % (i + 1, line) for i, line in enumerate(lines)
        if sections[i] != "4" and named[i] - (ALLOWED if first < i < last else set())])
    tally.check(any(names for names, section in zip(named, sections) if section == "4"),
                "section 4 names no compiler: is this check still looking?")


def check_readme(tally):
    """Each C block that a preceding line calls examples/minimal.c is that file."""
    readme, example = read("README.md"), read("examples/minimal.c")
    if not tally.check(readme is not None, "README.md is missing") or \
            not tally.check(example is not None, "examples/minimal.c is missing"):
        return
    blocks = [code for before, code in re.findall(r"([^\n]*)\n+```c\n(.*?)```", readme, re.S)
              if "examples/minimal.c" in before]
    tally.check(blocks, "README.md shows no C block as examples/minimal.c")
    for code in blocks:
        tally.check(code == example, "README.md and examples/minimal.c differ")
    screen = readme.split("\n## ", maxsplit=1)[0].count("\n")
    tally.check(screen <= MAX_SCREEN, "README's first screen has %d lines" % screen)


def check_quotes(tally):
    """Code of export.c that its README shows is in it."""
    text, source = read("examples/llm/README.md"), read("examples/llm/export.c")
    blocks = re.findall(r"```c\n(.*?)```", text, re.S)
    tally.check(blocks, "examples/llm/README.md shows no C")
    tally.check_none("examples/llm/README.md shows what is not in export.c",
                     [block for block in blocks if block not in source])


def check_links(tally):
    """Every file that a document points to is there."""
    for at, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(("build", "."))]
        for page in (os.path.join(at, name) for name in names if name.endswith(".md")):
            with open(page, encoding="utf-8") as file:
                links = re.findall(r"\]\(([^)#:\s]+)\)", file.read())
            tally.check_none(os.path.relpath(page, ROOT) + " points to what is not there",
                             [link for link in links if not os.path.exists(os.path.join(at, link))])


def check_version(tally, text):
    version = ".".join(re.findall(r"#define BKV_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text))
    tally.check(text.startswith("/* balancekv.h - v%s - " % version), "line 1 is not " + version)
    for name, pattern in (("meson.build", r"\bversion\s*:\s*'([^']*)'"),
                          ("CHANGELOG.md", r"(?m)^## \[?v?(\d+\.\d+\.\d+)\b"),
                          ("packaging/vcpkg/vcpkg.json", r'"version": "([^"]*)"'),
                          ("packaging/balancekv.wrap", r"directory = balancekv-(\S+)"),
                          ("packaging/balancekv.wrap", r"filename = balancekv-(\S+)\.tar\.gz")):
        other = read(name)
        if tally.check(other is not None, name + " is missing"):
            found = re.search(pattern, other)
            tally.check(found and found.group(1) == version,
                        "%s is not at version %s" % (name, version))


def main():
    tally = Tally()
    text = read("balancekv.h")
    lines = text.split("\n")
    tally.check(lines.pop() == "", "the last line is not ended")
    check_lines(tally, lines)
    sections = check_contents(tally, lines)
    check_platform(tally, lines, sections)
    check_version(tally, text)
    check_readme(tally)
    check_quotes(tally)
    check_links(tally)
    tally.done()


if __name__ == "__main__":
    main()
