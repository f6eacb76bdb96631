"""The C++ compiler of this system, and its command lines. Threads are those of torch's OpenMP, whose library is loaded before:
nothing is linked with another one."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolchain:
    """A kind of compiler.

    Attributes:
        name: of the command, unless `CXX` names another.
        flags: of every unit. Sums may be reordered, for vectors of them; infinities and NaN keep their meaning.
        link: flags that make a library.
        remedy: what to do where it is missing.
    """

    name: str
    flags: tuple[str, ...]
    link: tuple[str, ...]
    remedy: str = ""

    def compiler(self) -> str | None:
        """The path of the command; None if there is none."""
        if "CXX" not in os.environ and self is MACOS and not _has_developer_tools():
            return None
        return shutil.which(os.environ.get("CXX") or self.name)

    def missing(self) -> str:
        """One line about a compiler that is not there."""
        return f"there is no compiler {os.environ.get('CXX') or self.name!r}{self.remedy and f' ({self.remedy})'}"

    def compile_unit(self, flags: Iterable[str], source: Path, target: Path) -> list[str]:
        """Arguments of the command that compiles a unit; `flags` besides those of every unit."""
        return [*self.flags, *flags, "-c", str(source), "-o", str(target)]

    def link_units(self, units: Iterable[Path], target: Path) -> list[str]:
        """Arguments of the command that makes a library of units."""
        return [*self.link, *map(str, units), "-o", str(target)]


_FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC")
_SUMS = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
LINUX = Toolchain("g++", (*_FLAGS, "-fvect-cost-model=dynamic", "-fopenmp", *_SUMS), ("-shared",))
# Apple's compiler knows OpenMP but for the option, and has no library of it
MACOS = Toolchain(
    "clang++",
    (*_FLAGS, "-Xclang", "-fopenmp", *_SUMS),
    ("-shared", "-Wl,-undefined,dynamic_lookup"),
    "xcode-select --install installs it",
)


def toolchain() -> Toolchain:
    """That of this system."""
    return MACOS if platform.system() == "Darwin" else LINUX


def _has_developer_tools() -> bool:
    """Whether macOS has a compiler behind its commands, which otherwise ask in a window to install one."""
    try:
        return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode == 0
    except OSError:
        return False
