"""The build: what the backend hook asks for, what each missing tool is told, what ninja rebuilds and when."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "build_tools").is_dir():
    pytest.skip("build_tools is not beside the tests", allow_module_level=True)

BUILD_VARIABLES = (
    "CXX",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "MAX_JOBS",
    "FASTLAYERS_BUILD_CUDA",
    "FASTLAYERS_CUDA_ARCHS",
)


@pytest.fixture
def native(monkeypatch):
    """build_tools/native.py with no build setting in the environment."""
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    return importlib.import_module("native")


@pytest.fixture
def backend(native):
    return importlib.import_module("backend")


def fake_torch(folder, version, cuda=None):
    """A site folder that holds a torch, as far as the build looks at it."""
    root = folder / "torch"
    (root / "include/torch/csrc/stable").mkdir(parents=True)
    (root / "include/torch/csrc/stable/library.h").touch()
    (root / "version.py").write_text(
        f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\ngit_version = 'abc'\nhip = None\n"
    )
    return folder


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def sentence(failure):
    """The error's text, after checking that it is one sentence that says who speaks."""
    text = str(failure.value)
    assert text.startswith("fastlayers build: ") and text.endswith(".") and "\n" not in text
    return text


class TestHook:
    def requirements(self, backend, monkeypatch, sites, nvcc=None):
        monkeypatch.setattr(backend.native, "site_folders", lambda: sites)
        monkeypatch.setattr(backend.native, "find_nvcc", lambda: nvcc)
        wheel = backend.get_requires_for_build_wheel()
        assert wheel == backend.get_requires_for_build_editable()
        assert backend.get_requires_for_build_sdist() == []
        return wheel

    def test_cpu_torch_needs_nothing(self, backend, monkeypatch, tmp_path):
        sites = [fake_torch(tmp_path, "2.13.0+cpu")]
        assert self.requirements(backend, monkeypatch, sites) == []

    def test_no_torch_asks_for_torch_and_for_nvidias_compiler(self, backend, monkeypatch):
        assert self.requirements(backend, monkeypatch, []) == [backend.TORCH, *backend.NVIDIA_COMPILER]

    def test_old_torch_asks_for_torch(self, backend, monkeypatch, tmp_path):
        sites = [fake_torch(tmp_path, "2.9.1+cu130", "13.0")]
        assert backend.TORCH in self.requirements(backend, monkeypatch, sites)

    def test_cuda_torch_without_nvcc_asks_for_nvidias_compiler(self, backend, monkeypatch, tmp_path):
        sites = [fake_torch(tmp_path, "2.14.1+cu130", "13.0")]
        assert self.requirements(backend, monkeypatch, sites) == backend.NVIDIA_COMPILER

    def test_cuda_12_torch_is_left_without_cuda_kernels(self, backend, monkeypatch, tmp_path):
        sites = [fake_torch(tmp_path, "2.11.0+cu128", "12.8")]
        assert self.requirements(backend, monkeypatch, sites) == []

    def test_nvcc_that_is_there_is_used(self, backend, monkeypatch, tmp_path):
        nvcc = [script(tmp_path / "nvcc", "echo Cuda compilation tools, release 13.0, V13.0.88")]
        sites = [fake_torch(tmp_path, "2.14.1+cu130", "13.0")]
        assert self.requirements(backend, monkeypatch, sites, nvcc) == []

    def test_build_cuda_variable(self, backend, monkeypatch, tmp_path):
        cuda, cpu = tmp_path / "cuda", tmp_path / "cpu"
        fake_torch(cuda, "2.14.1+cu130", "13.0")
        fake_torch(cpu, "2.13.0+cpu")
        monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", "0")
        assert self.requirements(backend, monkeypatch, [cuda]) == []
        monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", "1")
        assert self.requirements(backend, monkeypatch, [cpu]) == backend.NVIDIA_COMPILER

    def test_a_missing_compiler_is_said_before_anything_is_downloaded(self, backend, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SystemExit) as failure:
            backend.get_requires_for_build_wheel()
        assert "install g++ 11 or newer" in sentence(failure)


class TestSentences:
    def test_no_compiler(self, native, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(native.BuildError) as failure:
            native.compiler()
        assert "no C++ compiler (g++) was found; install g++ 11 or newer" in sentence(failure)

    def test_old_compiler(self, native, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", script(tmp_path / "g++-9", "echo unrecognized option >&2; exit 1"))
        with pytest.raises(native.BuildError) as failure:
            native.compiler()
        assert "does not compile C++20" in sentence(failure)

    def test_old_nvcc(self, native, monkeypatch, tmp_path):
        monkeypatch.setenv("NVCC", script(tmp_path / "nvcc", "echo Cuda compilation tools, release 11.8, V11.8.89"))
        with pytest.raises(native.BuildError) as failure:
            native.check_nvcc()
        assert "nvcc 11.8.89 is too old; install CUDA 12.4 or newer" in sentence(failure)

    def test_broken_nvcc(self, native, monkeypatch, tmp_path):
        monkeypatch.setenv("NVCC", script(tmp_path / "nvcc", "exit 1"))
        with pytest.raises(native.BuildError) as failure:
            native.check_nvcc()
        assert "set NVCC to a working nvcc" in sentence(failure)

    def test_missing_nvcc(self, native, monkeypatch):
        monkeypatch.setenv("NVCC", "/nowhere/nvcc")
        with pytest.raises(native.BuildError) as failure:
            native.check_nvcc()
        assert "/nowhere/nvcc" in sentence(failure)

    def test_cuda_wanted_but_no_nvcc(self, native, monkeypatch):
        monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", "1")
        monkeypatch.setattr(native, "find_nvcc", lambda: None)
        with pytest.raises(native.BuildError) as failure:
            native.check_nvcc()
        assert "install the CUDA toolkit" in sentence(failure)

    @pytest.mark.parametrize("value", ["yes", "2"])
    def test_build_cuda_has_three_values(self, native, monkeypatch, value):
        monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", value)
        with pytest.raises(native.BuildError) as failure:
            native.check_nvcc()
        assert value in sentence(failure)

    @pytest.mark.parametrize("value", ["sm90", "90-PTX", "turing"])
    def test_unknown_architecture(self, native, monkeypatch, value):
        monkeypatch.setenv("FASTLAYERS_CUDA_ARCHS", value)
        with pytest.raises(native.BuildError) as failure:
            native.cuda_archs()
        assert value in sentence(failure)

    def test_no_torch(self, native, monkeypatch):
        monkeypatch.setattr(native, "site_folders", lambda: [])
        with pytest.raises(native.BuildError) as failure:
            native.check_torch()
        assert "install torch >= 2.10 first" in sentence(failure)

    def test_old_torch(self, native, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "site_folders", lambda: [fake_torch(tmp_path, "2.9.1+cu128", "12.8")])
        with pytest.raises(native.BuildError) as failure:
            native.check_torch()
        assert "torch 2.9.1+cu128 is too old; install torch >= 2.10" in sentence(failure)

    def test_torch_without_headers(self, native, monkeypatch, tmp_path):
        fake_torch(tmp_path, "2.14.0")
        (tmp_path / "torch/include/torch/csrc/stable/library.h").unlink()
        monkeypatch.setattr(native, "site_folders", lambda: [tmp_path])
        with pytest.raises(native.BuildError) as failure:
            native.check_torch()
        assert "has no C++ headers" in sentence(failure)


def test_a_new_torch_is_preferred_to_an_old_one_before_it(native, monkeypatch, tmp_path):
    sites = [fake_torch(tmp_path / "old", "2.6.0"), fake_torch(tmp_path / "new", "2.10.0+cpu")]
    monkeypatch.setattr(native, "site_folders", lambda: sites)
    assert native.check_torch().version == "2.10.0+cpu"


def test_the_torch_in_use_is_found_without_importing_it(native):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_tools')!r}); import native;"
        "assert 'torch' not in sys.modules; print(native.find_torch().root)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import torch

    assert Path(shown.strip()) == Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("90", ["arch=compute_90,code=sm_90"]),
        ("7.5;8.0", ["arch=compute_75,code=sm_75", "arch=compute_80,code=sm_80"]),
        ("90a, 90+PTX", [f"arch=compute_{n}" for n in ("90a,code=sm_90a", "90,code=sm_90", "90,code=compute_90")]),
    ],
)
def test_architectures(native, monkeypatch, archs, flags):
    monkeypatch.setenv("FASTLAYERS_CUDA_ARCHS", archs)
    assert native.gencode(native.cuda_archs()) == " ".join(f"-gencode={flag}" for flag in flags)


@pytest.fixture
def project(tmp_path, native, monkeypatch):
    """A small native project in the layout that the build expects, its build function and what was compiled."""
    sources = {
        "csrc/common/shared.h": "int shared();\n",
        "csrc/common/shared.cpp": '#include "common/shared.h"\nint shared() { return 1; }\n',
        "csrc/op/cpu_kernel.cpp": '#include "common/shared.h"\nnamespace FL_ISA { int k() { return shared(); } }\n',
        "csrc/bindings/binding.cpp": "int binding() { return TORCH_TARGET_VERSION != 0; }\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "fastlayers").mkdir()
    monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", "0")
    return tmp_path


def compiled(native, project, capfd):
    """Build; the objects and the library that ninja made, by name."""
    capfd.readouterr()
    native.build(project)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    return {line.rpartition("/")[2] for line in lines}


KERNELS = {"cpu_kernel.avx2.o", "cpu_kernel.avx512.o", "cpu_kernel.avx512_bf16.o", "cpu_kernel.amx.o"}
LIBRARY = {"libfastlayers.so"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the kernels' instruction sets are x86-64's")
class TestRebuilds:
    def test_only_what_changed_is_compiled(self, native, project, capfd):
        assert compiled(native, project, capfd) == {"shared.o", "binding.o", *KERNELS, *LIBRARY}
        assert compiled(native, project, capfd) == set()
        (project / "csrc/bindings/binding.cpp").write_text("int binding() { return 2; }\n")
        assert compiled(native, project, capfd) == {"binding.o", *LIBRARY}
        (project / "csrc/common/shared.h").write_text("int shared();\nint more();\n")
        assert compiled(native, project, capfd) == {"shared.o", *KERNELS, *LIBRARY}

    def test_a_new_source_is_picked_up_and_a_deleted_one_left_out(self, native, project, capfd):
        compiled(native, project, capfd)
        extra = project / "csrc/common/extra.cpp"
        extra.write_text("int extra() { return 3; }\n")
        assert compiled(native, project, capfd) == {"extra.o", *LIBRARY}
        extra.unlink()
        assert compiled(native, project, capfd) == LIBRARY

    def test_changed_flags_rebuild(self, native, project, capfd, monkeypatch):
        compiled(native, project, capfd)
        monkeypatch.setitem(native.ISA_FLAGS, "avx2", native.ISA_FLAGS["avx2"] + " -fno-trapping-math")
        assert compiled(native, project, capfd) == {"cpu_kernel.avx2.o", *LIBRARY}
        monkeypatch.setenv("CXX", "g++ -g0")
        assert compiled(native, project, capfd) == {"shared.o", "binding.o", *KERNELS, *LIBRARY}

    def test_a_compile_error_ends_in_one_sentence(self, native, project, capfd):
        (project / "csrc/common/shared.cpp").write_text("not C++\n")
        with pytest.raises(native.BuildError) as failure:
            native.build(project)
        assert "the compiler failed" in sentence(failure)
        assert "shared.cpp" in capfd.readouterr().out

    def test_build_info(self, native, project):
        native.build(project)
        info = json.loads((project / "fastlayers/lib/build_info.json").read_text())
        assert info["cuda_archs"] == [] and info["nvcc"] is None
        assert info["stable_abi_floor"] == "2.10"
        assert info["cpu_isas"] == ["avx2", "avx512", "avx512_bf16", "amx"]

    def test_cuda_sources(self, native, project, capfd, monkeypatch):
        monkeypatch.delenv("FASTLAYERS_BUILD_CUDA")
        if native.find_nvcc() is None:
            pytest.skip("no nvcc here")
        (project / "csrc/op/cuda_kernel.cu").write_text(
            "__global__ void kernel() {}\nvoid go() { kernel<<<1, 1>>>(); }\n"
        )
        monkeypatch.setenv("FASTLAYERS_CUDA_ARCHS", "90")
        assert {"cuda_kernel.o", *LIBRARY} <= compiled(native, project, capfd)
        info = json.loads((project / "fastlayers/lib/build_info.json").read_text())
        assert info["cuda_archs"] == ["90"]
        monkeypatch.setenv("FASTLAYERS_CUDA_ARCHS", "80+PTX")
        assert compiled(native, project, capfd) == {"cuda_kernel.o", *LIBRARY}
        monkeypatch.setenv("FASTLAYERS_BUILD_CUDA", "0")
        assert compiled(native, project, capfd) == LIBRARY


def test_sdist_holds_the_sources_and_no_binary(tmp_path):
    """`python -m build --sdist` in short: the file list that setuptools would pack."""
    code = (
        "import sys; sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', sys.argv[1]];"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    listed = set((tmp_path / "fastlayers.egg-info/SOURCES.txt").read_text().split("\n"))
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    wanted = {*sources, "build_tools/native.py", "build_tools/backend.py", "setup.py", "tests/test_packaging.py"}
    assert wanted <= listed
    assert not [name for name in listed if name.endswith((".so", ".o", ".pyc"))]
