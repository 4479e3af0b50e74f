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
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH_FLOOR = (2, 10)
NVCC_FLOOR = (12, 4)
DEFAULT_CUDA_ARCHS = "75;80;90;90+PTX"

_AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt"
# GCC 12 warns of uninitialised values inside its own AVX-512 intrinsics.
_AVX512 = (
    f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)
ISA_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}


class BuildError(SystemExit):
    """Ends the build with one sentence that says what to install."""

    def __init__(self, sentence):
        super().__init__(f"fastlayers build: {sentence}")


def torch_root():
    """The directory of an installed torch, found without importing it: build environment first, then target."""
    candidates = [Path(p) / "torch" for p in [*sys.path, sysconfig.get_path("purelib")] if p]
    for root in candidates:
        if (root / "include/torch/csrc/stable/library.h").exists():
            return root
    return None


def torch_version(root):
    text = (root / "version.py").read_text()
    return re.search(r"__version__ = '([^']+)'", text).group(1)


def check_torch():
    root = torch_root()
    if root is None:
        raise BuildError("PyTorch's headers were not found; install torch >= 2.10 first (pip install torch).")
    version = torch_version(root)
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_FLOOR:
        raise BuildError(f"torch {version} is too old; install torch >= 2.10 (pip install --upgrade torch).")
    return root, version


def compiler():
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"no C++ compiler ({command[0]}) was found; install g++ 11 or newer (apt install g++) or set CXX."
        )
    probe = subprocess.run(
        [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"], input="", text=True, capture_output=True
    )
    if probe.returncode:
        raise BuildError(f"{shlex.join(command)} does not compile C++20; install g++ 11 or newer or set CXX.")
    version = subprocess.run([*command, "--version"], text=True, capture_output=True).stdout.splitlines()[0]
    return command, version


def find_nvcc():
    """(command, include and library directories) of nvcc: NVCC, CUDA_HOME, PATH, then NVIDIA's pip packages."""
    if "NVCC" in os.environ:
        return shlex.split(os.environ["NVCC"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for path in [*(f"{home}/bin/nvcc" for home in homes if home), shutil.which("nvcc")]:
        if path and Path(path).exists():
            return [path]
    for site in [*sys.path, sysconfig.get_path("purelib")]:
        for path in sorted(Path(site or ".").glob("nvidia/cu*/bin/nvcc")):
            return [str(path)]
    return None


def check_nvcc():
    """nvcc's command and version, or None where CUDA is not built."""
    wanted = os.environ.get("FASTLAYERS_BUILD_CUDA")
    if wanted == "0":
        return None
    command = find_nvcc()
    if command is None:
        if wanted == "1":
            raise BuildError("FASTLAYERS_BUILD_CUDA=1, but nvcc was not found; install the CUDA toolkit or set NVCC.")
        return None
    text = subprocess.run([*command, "--version"], text=True, capture_output=True).stdout
    match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", text)
    if not match:
        raise BuildError(f"{shlex.join(command)} --version printed no release; set NVCC to a working nvcc.")
    if (int(match[1]), int(match[2])) < NVCC_FLOOR:
        raise BuildError(
            f"nvcc {match[3]} is too old; install CUDA 12.4 or newer, or build without CUDA (FASTLAYERS_BUILD_CUDA=0)."
        )
    return command, match[3]


def gencode(archs):
    """nvcc flags for "75;80;90;90+PTX": machine code per architecture, PTX where asked for."""
    flags = []
    for arch in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d*)([a-z]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"FASTLAYERS_CUDA_ARCHS has {arch!r}; write numbers such as 75;80;90+PTX.")
        number = match[1] + match[2] + match[3]
        kind = "compute" if match[4] else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return " ".join(flags)


def object_name(source, suffix=""):
    return str(Path("obj") / source.with_suffix("")) + suffix + ".o"


def ninja_file(root, torch, cxx, nvcc, archs):
    """The text of build.ninja; paths are relative to the project root where they can be."""
    include = f"-isystem {torch}/include"
    common = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Icsrc"
    torch_flags = "-DTORCH_TARGET_VERSION=0x020a000000000000 " + include
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

    x86 = platform.machine() in ("x86_64", "AMD64")
    for source in sorted(p.relative_to(root) for p in (root / "csrc").rglob("*.cpp")):
        if source.name.startswith("cpu_"):
            for isa, flags in ISA_FLAGS.items() if x86 else ():
                compile_with("cxx", source, f".{isa}", f"{flags} -DFL_ISA={isa}")
        else:
            compile_with("cxx", source, "", torch_flags if source.parts[1] == "bindings" else "")

    libs = f"-L{torch}/lib -ltorch_cpu -lc10 -Wl,--no-undefined -Wl,-s"
    if nvcc:
        lines += [
            f"nvcc = {shlex.join(nvcc)}",
            f"nvccflags = -std=c++20 -O3 -lineinfo -Icsrc -Xcompiler -fPIC,-fvisibility=hidden {gencode(archs)}",
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
    torch, version = check_torch()
    cxx, cxx_version = compiler()
    nvcc = check_nvcc()
    archs = os.environ.get("FASTLAYERS_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    write_if_changed(root / "build/build.ninja", ninja_file(root, torch, cxx, nvcc and nvcc[0], archs))
    (root / "fastlayers/lib").mkdir(exist_ok=True)
    subprocess.run([*ninja_command(), "-f", "build/build.ninja"], cwd=root, check=True)
    info = {
        "torch_headers": version,
        "stable_abi_floor": ".".join(map(str, TORCH_FLOOR)),
        "compiler": cxx_version,
        "nvcc": nvcc and nvcc[1],
        "cuda_archs": re.split(r"[;, ]+", archs.strip()) if nvcc else [],
        "cpu_isas": list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else [],
    }
    write_if_changed(root / "fastlayers/lib/build_info.json", json.dumps(info, indent=2) + "\n")
