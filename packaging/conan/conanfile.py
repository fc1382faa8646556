"""Conan 2 recipe of the tree that it stands in:  conan create packaging/conan"""
import os
import re

from conan import ConanFile
from conan.tools.files import copy, load

ROOT = os.path.join("..", "..")


class BalanceKV(ConanFile):
    name = "balancekv"
    description = "An attention cache of fixed size for language models, in one header"
    license = "MIT OR Unlicense"
    homepage = "https://arxiv.org/abs/2502.07861"
    topics = "attention", "kv-cache", "llm", "header-only"
    package_type = "header-library"
    no_copy_source = True

    def set_version(self):
        header = load(self, os.path.join(self.recipe_folder, ROOT, "balancekv.h"))
        self.version = re.search(r'#define BKV_VERSION "(.*)"', header)[1]

    def export_sources(self):
        for name in ("balancekv.h", "LICENSE"):
            copy(self, name, os.path.join(self.recipe_folder, ROOT), self.export_sources_folder)

    def package(self):
        copy(self, "balancekv.h", self.source_folder, os.path.join(self.package_folder, "include"))
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.bindirs = self.cpp_info.libdirs = []
