"""Builds fastlayers/lib/libfastlayers.so with ninja; packaging metadata stands in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.dist import Distribution

sys.path.insert(0, str(Path(__file__).parent / "build_tools"))
import native


class BuildNative(Command):
    """`python setup.py build_native`: compile what changed, in place."""

    description = "compile the native library into fastlayers/lib"
    user_options = []  # noqa: RUF012 (setuptools' own convention)

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        native.build(Path(__file__).parent)


class BuildPy(build_py):
    """The library has to exist before its package data is collected; files since deleted must not be collected."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        self.run_command("build_native")
        super().run()


class PlatformWheel(bdist_wheel):
    """One binary for every Python 3: nothing in the library is tied to an interpreter."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return True


class EditableWheel(editable_wheel):
    def run(self):
        self.run_command("build_native")
        super().run()


setup(
    distclass=NativeDistribution,
    cmdclass={
        "build_native": BuildNative,
        "build_py": BuildPy,
        "bdist_wheel": PlatformWheel,
        "editable_wheel": EditableWheel,
    },
)
