#!/usr/bin/env python3
"""Every way of getting balancekv.h, gone by the program of a user, tests/consumer: a plain
compiler, Meson (a subproject by folder and by wrap file), what `meson install` writes with
pkg-config and with CMake, the recipes of Conan and vcpkg. Each builds from a copy of this tree,
offline.

    test_packaging.py

A tool that is not there is named in a line "left out: ..". vcpkg is rarely there: its port then
runs in plain CMake, with a stand-in for the one function of vcpkg that it calls.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile

from bad_config import ROOT, Tally

CC = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc")
VERSION = re.search(r'#define BKV_VERSION "(.*)"', open(ROOT + "/balancekv.h",
                                                       encoding="utf-8").read())[1]
NAME = "balancekv-" + VERSION


class Routes:
    """A copy of the tree and of the consumer, and checks that say which route they belong to."""

    def __init__(self, tally, folder):
        self.tally, self.folder = tally, folder
        self.tree = self.path(NAME)
        shutil.copytree(ROOT, self.tree, ignore=lambda at, names: [
            n for n in names if n == "__pycache__" or at == ROOT and re.match(r"build|\.git$", n)])
        self.environment = {k: v for k, v in os.environ.items()
                            if not re.match("CMAKE_|PKG_CONFIG_|CONAN_|DESTDIR$|MESON", k)}
        self.environment["CC"] = CC

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def tool(self, route, *names):
        """Whether the tools of a route are there; says so if not."""
        missing = [name for name in names if not shutil.which(name)]
        if missing:
            print("left out: packaging by %s (no %s)" % (route, ", no ".join(missing)))
        return not missing

    def run(self, what, command, good=True, **environment):
        """Runs a command; its output, if it did as expected."""
        result = subprocess.run(command, cwd=self.folder, env={**self.environment, **environment},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                universal_newlines=True, check=False)
        output = "\n".join(result.stdout.splitlines()[-8:])
        if self.tally.check((result.returncode == 0) == good, what, output):
            return result.stdout
        return ""

    def app(self, what, path):
        """The consumer must run with the version of this tree, and weigh what went in."""
        if not self.tally.check(os.path.exists(self.path(path)), what + ": there is a program"):
            return
        output = self.run(what + ": runs", [self.path(path)])
        match = re.search(r"balancekv (\S+) (\S+): 1000 tokens, ok, weight (\d+)", output)
        self.tally.check(match and match[1] == match[2] == VERSION and 500 < int(match[3]) < 2000,
                         what + ": the version and the weight are right", output)

    def consumer(self, name):
        shutil.copytree(self.path(self.tree, "tests", "consumer"), self.path(name))
        return name


def plain(routes):
    app = routes.path(NAME, "tests", "consumer", "app.c")
    routes.run("plain: cc -I. app.c", CC.split() + ["-I" + routes.tree, app, "-o", "plain"])
    routes.app("plain", "plain")


def subproject(routes):
    """By wrap file and archive, then by the folder that this has unpacked; never the copy that this
    machine may have installed."""
    setup = ["meson", "setup", "--force-fallback-for=balancekv"]
    if not routes.tool("Meson", "meson", "ninja"):
        return
    consumer = routes.consumer("subproject")
    files = routes.path(consumer, "subprojects", "packagefiles")
    os.makedirs(files)
    shutil.copy(routes.path(NAME, "packaging", "balancekv.wrap"), os.path.dirname(files))
    with tarfile.open(os.path.join(files, NAME + ".tar.gz"), "w:gz") as archive:
        archive.add(routes.tree, NAME)
    for route in ("wrap", "folder"):
        build = routes.path(consumer, route)
        routes.run(route + ": configures", setup + [build, consumer])
        routes.run(route + ": builds", ["meson", "compile", "-C", build])
        routes.app(route, build + "/app")
        targets = json.loads(routes.run(route + ": lists its targets", [
            "meson", "introspect", "--targets", build]) or "[]")
        routes.tally.check([target["name"] for target in targets] == ["app"],
                           route + ": builds nothing else", str(targets))
        prefix = routes.path(route + " prefix")
        routes.run(route + ": installs", ["meson", "install", "-C", build, "--destdir", prefix])
        routes.tally.check(not os.path.exists(prefix), route + ": a subproject installs nothing")
        shutil.rmtree(files, ignore_errors=True)
    wanted = routes.path(consumer, "wanted")
    routes.run("folder: takes options", setup + [wanted, consumer, "-Dbalancekv:examples=enabled"])
    names = routes.run("folder: lists targets", ["meson", "introspect", "--targets", wanted])
    routes.tally.check('"minimal"' in names, "folder: examples are there when wanted")


def cmake(routes, what, prefix, consumer):
    """A CMake project that finds the package below a prefix."""
    routes.run(what + ": configures", ["cmake", "-S", consumer, "-B", what,
                                       "-DCMAKE_PREFIX_PATH=" + prefix])
    routes.run(what + ": builds", ["cmake", "--build", what])
    routes.app(what, what + "/app")


def installed(routes):
    if not routes.tool("meson install", "meson", "ninja"):
        return
    prefix = routes.path("prefix")
    routes.run("install: configures", [
        "meson", "setup", "install build", routes.tree, "--prefix", prefix,
        "-Dtests=disabled", "-Dbench=disabled", "-Dexamples=disabled"])
    routes.run("install: installs", ["meson", "install", "-C", "install build"])
    found = sorted(os.path.relpath(os.path.join(at, name), prefix)
                   for at, _, names in os.walk(prefix) for name in names)
    wanted = ["include/balancekv.h", "share/balancekv/balancekv-config-version.cmake",
              "share/balancekv/balancekv-config.cmake", "share/pkgconfig/balancekv.pc"]
    routes.tally.check(found == wanted, "install: these files", str(found))

    if routes.tool("pkg-config", "pkg-config"):
        here = {"PKG_CONFIG_PATH": prefix + "/share/pkgconfig"}
        version = routes.run("pkg-config: version", ["pkg-config", "--modversion", "balancekv"],
                             **here)
        routes.tally.check(version.strip() == VERSION, "pkg-config: the version", version)
        flags = shlex.split(routes.run("pkg-config: flags", [
            "pkg-config", "--cflags", "--libs", "balancekv"], **here))
        routes.run("pkg-config: builds", CC.split() + flags + [
            "-std=c99", routes.path(NAME, "tests", "consumer", "app.c"), "-o", "pkg-config app"])
        routes.app("pkg-config", "pkg-config app")

    if routes.tool("CMake", "cmake", "make"):
        moved = routes.path("moved prefix")
        os.rename(prefix, moved)  # CMake's files must not know where they were installed
        consumer = routes.consumer("found")
        cmake(routes, "cmake", moved, consumer)
        lists = routes.path(consumer, "CMakeLists.txt")
        with open(lists, encoding="utf-8") as file:
            text = file.read()
        major, minor, patch = map(int, VERSION.split("."))
        for wanted, good in ((VERSION + " EXACT", True), ("", True),
                             ("%d.%d.%d" % (major, minor, patch + 1), False),
                             ("%d.%d" % (major, minor + 1), False), (str(major + 1), False)):
            with open(lists, "w", encoding="utf-8") as file:
                file.write(text.replace("balancekv 0.1 ", "balancekv %s " % wanted))
            routes.run("cmake: find_package(balancekv %s) %s" % (
                wanted, "succeeds" if good else "fails"),
                ["cmake", "-S", consumer, "-B", "found " + wanted, "-DCMAKE_PREFIX_PATH=" + moved],
                good=good)


def conan(routes):
    if not routes.tool("Conan", "conan", "cmake", "make"):
        return
    home = {"CONAN_HOME": routes.path("conan"), "CC": ""}  # it knows gcc and clang, but not "cc"
    routes.run("conan: detects a profile", ["conan", "profile", "detect"], **home)
    output = routes.run("conan: creates the package and builds the consumer", [
        "conan", "create", routes.path(NAME, "packaging", "conan"), "--no-remote",
        "-c", "tools.cmake.cmake_layout:test_folder=" + routes.path("conan test")], **home)
    routes.tally.check("balancekv/" + VERSION in output, "conan: this version", output[-500:])
    routes.tally.check("balancekv %s %s: 1000 tokens, ok" % (VERSION, VERSION) in output,
                       "conan: the consumer ran", output[-500:])


STAND_IN = """set(PORT balancekv)
set(VERSION "%s")
set(CURRENT_PACKAGES_DIR "%s")
function(vcpkg_install_copyright)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "FILE_LIST")
  configure_file("${arg_FILE_LIST}" "${CURRENT_PACKAGES_DIR}/share/${PORT}/copyright" COPYONLY)
endfunction()
include("%s")
"""


def vcpkg(routes):
    port = routes.path(NAME, "packaging", "vcpkg")
    with open(os.path.join(port, "vcpkg.json"), encoding="utf-8") as file:
        manifest = json.load(file)
    fields = {"name", "version", "description", "homepage", "license"}
    routes.tally.check(set(manifest) == fields and manifest["name"] == "balancekv" and
                       manifest["version"] == VERSION, "vcpkg: the manifest", str(manifest))
    if not routes.tool("vcpkg", "cmake", "make"):
        return
    prefix = routes.path("vcpkg")
    if shutil.which("vcpkg"):
        # An archive of an earlier run would hide what the header says now.
        routes.run("vcpkg: installs", ["vcpkg", "install", "balancekv", "--overlay-ports=" + port,
                                       "--no-binarycaching", "--x-install-root=" + prefix])
        prefix = os.path.join(prefix, next(x for x in os.listdir(prefix) if x != "vcpkg"))
    else:
        print("left out: vcpkg (not installed; its port runs in plain CMake)")
        script = routes.path("port.cmake")
        with open(script, "w", encoding="utf-8") as file:
            file.write(STAND_IN % (VERSION, prefix, os.path.join(port, "portfile.cmake")))
        routes.run("vcpkg: the port runs", ["cmake", "-P", script])
    routes.tally.check(os.path.exists(prefix + "/share/balancekv/copyright"),
                       "vcpkg: the licence is installed")
    cmake(routes, "vcpkg consumer", prefix, routes.consumer("by vcpkg"))


def main():
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="a tree ") as folder:
        routes = Routes(tally, os.path.realpath(folder))
        for route in (plain, subproject, installed, conan, vcpkg):
            route(routes)
    tally.done()


if __name__ == "__main__":
    main()
