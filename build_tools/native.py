"""Writes build/build.ninja for the native library and runs it.

Every source is found by its name, so a new kernel file needs no change here:
  csrc/**/cpu_*.cpp   compiled once per CPU instruction set, with -DFL_ISA=<name>
  csrc/**/cuda_*.cu   compiled with nvcc, where there is one
  csrc/**/*.cpp       everything else, portable
The Torch headers are needed by csrc/bindings alone, and only for the stable ABI.
"""

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TORCH_FLOOR = (2, 10)
NVCC_FLOOR = (12, 4)
DEFAULT_CUDA_ARCHS = "75;80;90+PTX"
LAUNCHERS = ("ccache", "sccache", "distcc")

_AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt"
# GCC 12 warns of uninitialised values inside its own AVX-512 intrinsics.
_AVX512 = (
    f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)
_BF16 = f"{_AVX512} -mavx512bf16"
ISA_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _BF16, "amx": f"{_BF16} -mamx-tile -mamx-bf16"}


class BuildError(SystemExit):
    """Ends the build with one sentence that says what to install."""

    def __init__(self, sentence):
        super().__init__(f"fastlayers build: {sentence}")


@dataclass(frozen=True)
class Torch:
    """An installed torch, known without importing it. `cuda`: the CUDA release it was built for, or None."""

    root: Path
    version: str
    cuda: str | None

    @property
    def new_enough(self):
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2]) >= TORCH_FLOOR


def site_folders():
    """Where packages lie: the build environment first, then the environment that pip installs into."""
    schemes = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    return list(dict.fromkeys(Path(folder) for folder in [*sys.path, *schemes] if folder))


def find_torch():
    """The first installed torch that is new enough; else the first that is there at all; else None."""
    found = []
    for root in (folder / "torch" for folder in site_folders()):
        if not (root / "version.py").is_file():
            continue
        text = (root / "version.py").read_text()
        version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b[^=\n]*= ['\"]([^'\"]+)", text, re.MULTILINE)
        found.append(Torch(root, version[1] if version else "0.0", cuda and cuda[1]))
    return next((torch for torch in found if torch.new_enough), found[0] if found else None)


def check_torch():
    torch = find_torch()
    if torch is None:
        raise BuildError("PyTorch's headers were not found; install torch >= 2.10 first (pip install torch).")
    if not torch.new_enough:
        raise BuildError(f"torch {torch.version} is too old; install torch >= 2.10 (pip install --upgrade torch).")
    if not (torch.root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"{torch.root} has no C++ headers; install torch from its wheel (pip install torch).")
    return torch


def is_x86():
    return platform.machine() in ("x86_64", "AMD64")


def compiler():
    """The C++ compiler's command and the first line of its --version."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"no C++ compiler ({command[0]}) was found; install g++ 11 or newer (apt install g++) or set CXX."
        )
    flags = ["-std=c++20", *(ISA_FLAGS["amx"].split() if is_x86() else [])]
    probe = subprocess.run(
        [*command, *flags, "-x", "c++", "-fsyntax-only", "-"],
        input="#include <concepts>\n",
        text=True,
        capture_output=True,
    )
    if probe.returncode:
        raise BuildError(
            f"{shlex.join(command)} does not compile C++20 for AVX-512 and AMX; install g++ 11 or newer or set CXX."
        )
    version = subprocess.run([*command, "--version"], text=True, capture_output=True).stdout.splitlines()[0]
    return command, version


def find_nvcc():
    """nvcc's command: NVCC, CUDA_HOME, CUDA_PATH, PATH, then NVIDIA's pip packages. None where there is none."""
    if os.environ.get("NVCC"):
        return shlex.split(os.environ["NVCC"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for path in [*(f"{home}/bin/nvcc" for home in homes if home), shutil.which("nvcc")]:
        if path and Path(path).exists():
            return [path]
    for folder in site_folders():
        for path in sorted(folder.glob("nvidia/cu*/bin/nvcc")):
            return [str(path)]
    return None


def check_nvcc():
    """nvcc's command and version, or None where CUDA is not built."""
    wanted = os.environ.get("FASTLAYERS_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FASTLAYERS_BUILD_CUDA is {wanted!r}; set it to 1 (need CUDA), to 0 (skip it), or unset it.")
    command = None if wanted == "0" else find_nvcc()
    if command is None:
        if wanted == "1":
            raise BuildError("FASTLAYERS_BUILD_CUDA=1, but nvcc was not found; install the CUDA toolkit or set NVCC.")
        return None
    if shutil.which(command[0]) is None:
        raise BuildError(f"nvcc ({command[0]}) was not found; install CUDA 12.4 or newer, or unset NVCC.")
    text = subprocess.run([*command, "--version"], text=True, capture_output=True).stdout
    match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", text)
    if not match:
        raise BuildError(f"{shlex.join(command)} --version printed no release; set NVCC to a working nvcc.")
    if (int(match[1]), int(match[2])) < NVCC_FLOOR:
        raise BuildError(
            f"nvcc {match[3]} is too old; install CUDA 12.4 or newer, or build without CUDA (FASTLAYERS_BUILD_CUDA=0)."
        )
    return command, match[3]


def cuda_archs():
    """The architectures to compile for, in torch's notation: "75", "9.0", "90a", "90+PTX" (machine code and PTX)."""
    text = os.environ.get("FASTLAYERS_CUDA_ARCHS", "").strip() or DEFAULT_CUDA_ARCHS
    archs = [arch for arch in re.split(r"[;, ]+", text) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d+(\.\d)?[af]?(\+PTX)?", arch):
            raise BuildError(f"FASTLAYERS_CUDA_ARCHS has {arch!r}; write numbers such as 75;80;90+PTX.")
    return [arch.replace(".", "") for arch in archs]


def gencode(archs):
    """nvcc's flags: machine code for each architecture, and PTX where "+PTX" asks for it."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch != number:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def host_compiler(cxx):
    """The compiler itself in a command such as `ccache g++`."""
    return next(word for word in cxx if Path(word).name not in LAUNCHERS)


def object_name(source, suffix=""):
    return str(Path("obj") / source.with_suffix("")) + suffix + ".o"


def ninja_file(root, torch, cxx, nvcc, archs):
    """The text of build.ninja; paths are relative to the project root where they can be."""
    common = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc"
    torch_flags = (
        f"-DTORCH_TARGET_VERSION=0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000 -isystem {torch}/include"
    )
    lines = [
        "ninja_required_version = 1.5",
        "builddir = build",
        f"cxx = {shlex.join(cxx)}",
        f"cxxflags = {common}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $out",
        "rule link",
        "  command = $cxx -shared -o $out $in $libs",
        "  description = link $out",
    ]
    objects = []

    def compile_with(rule, source, suffix, extra):
        target = "build/" + object_name(source, suffix)
        objects.append(target)
        lines.append(f"build {target}: {rule} {source}")
        if extra:
            lines.append(f"  extra = {extra}")

    for source in sorted(p.relative_to(root) for p in (root / "csrc").rglob("*.cpp")):
        if source.name.startswith("cpu_"):
            for isa, flags in ISA_FLAGS.items() if is_x86() else ():
                compile_with("cxx", source, f".{isa}", f"{flags} -DFL_ISA={isa}")
        else:
            compile_with("cxx", source, "", torch_flags if source.parts[1] == "bindings" else "")

    libs = f"-L{torch}/lib -ltorch_cpu -lc10 -Wl,--no-undefined -Wl,-s"
    if nvcc:
        lines += [
            f"nvcc = {shlex.join(nvcc)}",
            f"nvccflags = -std=c++20 -O3 -lineinfo -Icsrc -Xcompiler -fPIC,-fvisibility=hidden"
            f" -ccbin {host_compiler(cxx)} {gencode(archs)}",
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $out",
        ]
        for source in sorted(p.relative_to(root) for p in (root / "csrc").rglob("cuda_*.cu")):
            compile_with("nvcc", source, "", "")
        libs += " " + cudart(nvcc)
    library = "fastlayers/lib/libfastlayers.so"
    lines += [f"build {library}: link {' '.join(objects)}", f"  libs = {libs}", f"default {library}"]
    return "\n".join(lines) + "\n"


def cudart(nvcc):
    """Linker arguments for the static CUDA runtime that belongs to this nvcc."""
    binary = Path(shutil.which(nvcc[-1]) or nvcc[-1])
    shown = subprocess.run([str(binary), "--dryrun", "-x", "cu", "/dev/null"], text=True, capture_output=True).stderr
    folders = re.findall(r'-L"?([^"\s]+)"?', shown)
    folders += [str(binary.resolve().parent.parent / lib) for lib in ("lib64", "lib")]
    for folder in folders:
        if (Path(folder) / "libcudart_static.a").exists():
            return f"-L{folder} -lcudart_static -lrt -lpthread -ldl"
    raise BuildError(f"libcudart_static.a was not found beside {binary}; install the CUDA runtime's static library.")


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ninja_command():
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
    raise BuildError("ninja was not found; install it (pip install ninja).")


def build(root):
    """Compile and link what changed; leave the library and build_info.json in fastlayers/lib."""
    root = Path(root).resolve()
    if platform.system() != "Linux":
        print(f"fastlayers build: the kernels are compiled on Linux alone; {platform.system()} gets the PyTorch code.")
        return
    cxx, cxx_version = compiler()
    nvcc = check_nvcc()
    archs = cuda_archs() if nvcc else []
    torch = check_torch()
    if not nvcc:
        print("fastlayers build: without CUDA kernels (no nvcc was found, or FASTLAYERS_BUILD_CUDA=0).")
    write_if_changed(root / "build/build.ninja", ninja_file(root, torch.root, cxx, nvcc and nvcc[0], archs))
    (root / "fastlayers/lib").mkdir(exist_ok=True)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([*ninja_command(), *jobs, "-f", "build/build.ninja"], cwd=root)
    if done.returncode:
        raise BuildError("the compiler failed; its messages stand above.")
    info = {
        "torch_headers": torch.version,
        "stable_abi_floor": ".".join(map(str, TORCH_FLOOR)),
        "compiler": cxx_version,
        "nvcc": nvcc and nvcc[1],
        "cuda_archs": archs,
        "cpu_isas": list(ISA_FLAGS) if is_x86() else [],
    }
    write_if_changed(root / "fastlayers/lib/build_info.json", json.dumps(info, indent=2) + "\n")
