"""The layers of ARCHITECTURE.md: imports point down only, and every vendor has one owner."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pe_infer"

# A unit may import units of lower rank only.
LAYERS = [
    {"errors"},
    {"pixels"},
    {"geometry", "result", "machine"},
    {"series", "lattice", "manifest", "onnx_scan", "onnx_vendor"},
    {"certificate"},
    {"bundle", "scope", "half", "engine_manifest"},
    {"engine_folder"},
    {"preprocess", "sequencer", "program"},
    {"cuda", "checks"},
    {"engines"},
    {"executor", "engine_build", "roofline"},
    {"compiled", "engine_store"},
    {"bundle_check", "conclusion"},
    {"stream"},
    {"dicom", "phantom"},
    {"choice"},
    {"detector", "synthetic"},
    {"report", "node", "gpu_selfcheck"},
    {"cli"},
    {"__main__", "schemas"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
# Reading files and making phantoms need no program and no stream.
BELOW_DICOM = {"errors", "pixels", "geometry", "result", "series"}
OWNERS = {
    "pydicom": "dicom",
    "highdicom": "dicom",
    "gdcm": "dicom",
    "openjpeg": "dicom",
    "jpeg_ls": "dicom",
    "pynetdicom": "node",
    "pydantic_settings": "node",
    "prometheus_client": "node",
    "structlog": "node",
    "openvino": "engines/openvino.py",
    "onnxruntime": "engines/onnxruntime.py",
    "onnx": "onnx_vendor.py",
    "tensorrt": "engines/tensorrt_vendor.py",
    "tensorrt_rtx": "engines/tensorrt_vendor.py",
    "cupy": "cuda",
    "pycuda": "cuda",
    "typer": "cli",
    "rich": "cli",
    "pe_infer._native": "preprocess.py",
}
NEVER = {"torch", "tests", "export", "benchmarks", "monai"}

LATE = {
    "onnx",
    "tensorrt",
    "tensorrt_rtx",
    "cupy",
    "pycuda",
    "pynetdicom",
    "pydantic_settings",
    "prometheus_client",
    "structlog",
}  # not installed by default

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in RANK, f"pe_infer/{unit} has no place in the layers"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "pe_infer" or len(parts) < 2 or parts[1] == "_native":
            continue
        other = parts[1]
        if other == unit or other not in RANK:
            continue
        assert RANK[other] < RANK[unit], f"{path}: {unit} imports {other}"
        if unit in {"dicom", "phantom"}:
            assert other in BELOW_DICOM, f"{path}: {unit} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_vendor_has_one_owner(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        assert name.split(".")[0] not in NEVER, f"{path} imports {name}"
        for vendor, owner in OWNERS.items():
            if name == vendor or name.startswith(f"{vendor}."):
                assert place == owner or place.startswith(f"{owner}/"), f"{path} imports {name}"


def test_importing_the_command_line_imports_no_optional_vendor() -> None:
    code = "import sys, pe_infer.cli, pe_infer.engine_build; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not LATE & set(done.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


def test_the_core_knows_neither_python_nor_cuda() -> None:
    for path in [*ROOT.glob("cpp_ext/src/*"), *ROOT.glob("cpp_ext/include/pe_infer/*")]:
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [i for i in includes if re.search(r"pybind11|Python\.h|cuda", i)], path
    bindings = [p for p in ROOT.glob("cpp_ext/**/*") if p.is_file() and "pybind11" in p.read_text()]
    assert {p.parent.name for p in bindings} == {"bindings"}


def test_the_package_only_re_exports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)
