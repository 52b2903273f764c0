"""The build: headers that csrc may use, the search for nvcc, architectures, doctor, import time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gankern import _toolchain

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
STABLE = re.compile(
    r"torch/(csrc/stable/.+\.h|headeronly/.+\.h|csrc/inductor/aoti_torch/c/shim\.h)$"
)
FOREIGN = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/|Python\.h$")

needs_source = pytest.mark.skipif(not CSRC.exists(), reason="needs the source tree, not a wheel")


def includes(folder: Path) -> list[tuple[Path, str]]:
    """(file, header) of every #include in C++ and CUDA files under `folder`."""
    files = [path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
    return [(path, header) for path in files for header in pattern.findall(path.read_text())]


@needs_source
def test_headers_of_torch_are_stable() -> None:
    found = includes(CSRC / "torch")
    assert found
    bad = [
        f"{path.name}: {header}"
        for path, header in found
        if FOREIGN.match(header) and not STABLE.match(header)
    ]
    assert not bad, f"csrc/torch may use PyTorch's stable headers only: {bad}"


@needs_source
@pytest.mark.parametrize("folder", ["kernels", "cpu"])
def test_headers_of_kernels_are_free_of_torch(folder: str) -> None:
    bad = [f"{path.name}: {header}" for path, header in includes(CSRC / folder)]
    bad = [line for line in bad if FOREIGN.match(line.split(": ")[1])]
    assert not bad, f"csrc/{folder} knows no torch: {bad}"


def test_headers_check_knows_the_difference() -> None:
    stable = ("csrc/stable/tensor.h", "headeronly/util/Half.h", "csrc/inductor/aoti_torch/c/shim.h")
    assert all(STABLE.match(f"torch/{header}") for header in stable)
    for header in ("torch/extension.h", "torch/csrc/autograd/variable.h", "ATen/ATen.h"):
        assert FOREIGN.match(header)
        assert not STABLE.match(header)


@needs_source
def test_top_level_layout() -> None:
    wanted = {
        *("csrc", "gankern", "python_tests", "benchmarks", "setup.py", "CMakeLists.txt"),
        *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile"),
    }
    missing = wanted - {path.name for path in ROOT.iterdir()}
    assert not missing
    for op in (ROOT / "csrc" / "kernels").glob("*.cu"):
        for other in (f"torch/{op.stem}.cpp", f"cpu/{op.stem}.cpp"):
            assert (CSRC / other).exists(), f"{op.name} has no csrc/{other}"


@pytest.mark.parametrize(
    ("text", "sm", "ptx"),
    [
        ("8.0;9.0+PTX", ["80", "90"], ["90"]),
        ("8.6 8.9", ["86", "89"], []),
        ("9.0a;10.0f+PTX", ["90a", "100f"], ["100f"]),
        ("Ampere", ["80", "86"], ["86"]),
        ("Turing;Hopper+PTX", ["75", "90"], ["75", "90"]),
        (" 7.5,12.0+PTX ", ["75", "120"], ["120"]),
    ],
)
def test_arch_list(text: str, sm: list[str], ptx: list[str]) -> None:
    assert _toolchain.parse_archs(text) == (sm, ptx)


@pytest.mark.parametrize("text", ["nine", "80", "8.0;;x", "9.0+ptx"])
def test_arch_list_error(text: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: no architecture"):
        _toolchain.parse_archs(text)


def test_gencode_flags() -> None:
    assert _toolchain.gencode_flags(["80", "86", "90"], ["90"], {"86": "80"}) == (
        "'-gencode=arch=compute_80,code=[sm_80,sm_86]' "
        "'-gencode=arch=compute_90,code=[sm_90,compute_90]'"
    )


def test_default_archs_share_ptx() -> None:
    sm, ptx = _toolchain.parse_archs(_toolchain.CUDA_ARCHS)
    assert _toolchain.gencode_flags(sm, ptx, _toolchain.SAME_PTX) == (
        "'-gencode=arch=compute_75,code=[sm_75]' '-gencode=arch=compute_80,"
        "code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80]'"
    )


def fake_toolkit(home: Path, version: str = "13.0.88", headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit; returns its nvcc, a script."""
    for header in ("cuda_runtime.h", "crt/host_config.h", "cccl/nv/target") if headers else ():
        path = home / "include" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return script(
        home / "bin" / "nvcc",
        f"""
        case "$1" in
          --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
          --version) echo 'Cuda compilation tools, release 13.0, V{version}' ;;
        esac""",
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def cuda_torch(cuda: str | None = "13.0") -> _toolchain.Torch:
    return _toolchain.Torch(Path("/nowhere"), "2.14.1", cuda)


def test_nvcc_order(tmp_path: Path) -> None:
    for name in ("home", "path", "site/nvidia/cu13"):
        fake_toolkit(tmp_path / name)
    environ = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path" / "bin")}
    site = [str(tmp_path / "site")]
    origins = []
    for taken_away in ("", "CUDA_HOME", "PATH"):
        environ.pop(taken_away, None)
        origins.append(_toolchain.find_nvcc(cuda_torch(), environ | {"X": ""}, site).origin)
    assert origins == ["CUDA_HOME", "PATH", "PyPI"]


def test_nvcc_behind_a_wrapper(tmp_path: Path) -> None:
    nvcc = fake_toolkit(tmp_path / "cuda-13.0")
    script(tmp_path / "bin" / "nvcc", f'exec {nvcc} "$@"')
    environ = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    found = _toolchain.find_nvcc(cuda_torch(), environ, [])
    assert found.path == tmp_path / "bin" / "nvcc"
    assert found.home == tmp_path / "cuda-13.0"


def test_nvcc_unusable_ones_are_passed_over(tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "old", version="12.4.131")
    fake_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    environ = {"PATH": str(tmp_path / "old" / "bin")}
    found = _toolchain.find_nvcc(cuda_torch(), environ, [str(tmp_path / "site")])
    assert found.origin == "PyPI"


def test_nvcc_reasons(tmp_path: Path) -> None:
    torch = cuda_torch()
    cure = r"pip install 'cuda-toolkit\[nvcc,cccl\]==13.0.\*'"

    def reason(folder: str) -> str:
        return _toolchain.find_nvcc(torch, {"PATH": str(tmp_path / folder / "bin")}, [])

    fake_toolkit(tmp_path / "old", version="12.4.131")
    fake_toolkit(tmp_path / "bare", headers=False)
    script(tmp_path / "broken" / "bin" / "nvcc", "exit 1")
    assert re.fullmatch(f"no nvcc found; {cure}", reason("empty"))
    assert re.fullmatch(
        rf"nvcc 12.4.131 \(PATH\) does not match torch's CUDA 13.0; {cure}", reason("old")
    )
    assert re.fullmatch(
        rf"nvcc 13.0.88 \(PATH\) lacks the header cuda_runtime.h; {cure}", reason("bare")
    )
    assert re.search(rf"is no working nvcc; {cure}$", reason("broken"))
    missing = _toolchain.find_nvcc(torch, {"CUDA_HOME": str(tmp_path / "gone"), "PATH": ""}, [])
    assert "gone/bin/nvcc (CUDA_HOME) does not exist" in missing
    cpu_build = _toolchain.find_nvcc(cuda_torch(cuda=None), {}, [])
    assert cpu_build == "torch 2.14.1 is a CPU build; install a CUDA build of torch"


@needs_source
def test_no_compiler_still_builds(tmp_path: Path) -> None:
    environ = os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not built: no C++ compiler found; install g++" in done.stdout
    about = json.loads(next(tmp_path.rglob("_build.json")).read_text())
    assert not about["cpu"]["built"]
    assert not list(tmp_path.rglob("*.so"))


def seconds_to_run(code: str) -> float:
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_import_is_quick_and_quiet() -> None:
    import_both = "import torch; start = time.perf_counter(); import gankern"
    assert any(seconds_to_run(import_both) < 0.3 for _ in range(3))
    code = (
        "import gankern, sys; print([m for m in sys.modules if m.startswith(('torch', 'numpy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_operations_import_no_compiler_where_triton_cannot_run() -> None:
    code = "import gankern.ops, torch, sys; print('torch._dynamo' in sys.modules, end=' '); "
    code += "print(bool(torch.cuda.device_count()))"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.stdout.split() in (["False", "False"], ["True", "True"]), done


def test_doctor_tells_versions_libraries_and_cures() -> None:
    import torch

    from gankern.cli import main
    from gankern.ops import _impl

    told = CliRunner().invoke(main, ["doctor"])
    assert told.exit_code == 0, told.output
    assert torch.__version__ in told.output
    rows = {line.split()[0]: line.split()[1:] for line in told.output.splitlines() if line.strip()}
    assert rows["bias_act"] == [_impl.default_impl("bias_act", d) for d in ("cpu", "cuda")]
    assert rows["modulated_gemm"] == ["as", "synthesis_layer"] * 2
    for impl in ("cpu", "cuda"):
        assert f"_{impl}.so" in rows
        if _impl.LIBRARIES[impl]:
            assert impl in rows, f"no line says what to do about {impl}"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["no-such"], "gankern: No such command 'no-such' (see gankern --help)"),
        (["doctor", "--what"], "gankern: No such option '--what' (see gankern doctor --help)"),
    ],
)
def test_wrong_usage_is_one_line(args: list[str], line: str) -> None:
    from gankern.cli import main

    told = CliRunner().invoke(main, args)
    assert told.exit_code == 2
    assert told.output.splitlines()[0].lower() == line.lower()
    assert len(told.output.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("batch must be\nat least 1, got 0"), OSError("x")])
def test_expected_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from gankern.cli import doctor, main

    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "read_build", fail)
    told = CliRunner().invoke(main, ["doctor"])
    assert told.exit_code == 2
    assert told.output == f"gankern: {' '.join(str(error).split())}\n"
    debugged = CliRunner().invoke(main, ["doctor", "--debug"])
    assert debugged.exit_code == 2
    assert "Traceback" in debugged.output
