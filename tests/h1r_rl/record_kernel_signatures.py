"""Writes kernel_signatures.json from the sdists of mamba-ssm and causal-conv1d.

Versions are those of requirements/cuda-kernels.txt; pip fetches the sdists from wherever it is
configured to look. Nothing of them is built or imported: signatures, argument shapes and checks are
read from their sources. Run by hand when the lock moves:
python tests/h1r_rl/record_kernel_signatures.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE.parents[1] / "requirements" / "cuda-kernels.txt"
FUNCTIONS = {
    "causal-conv1d": {"causal_conv1d/causal_conv1d_interface.py": ["causal_conv1d_fn"]},
    "mamba-ssm": {
        "mamba_ssm/ops/triton/ssd_combined.py": [
            "mamba_chunk_scan_combined",
            "mamba_split_conv1d_scan_combined",
        ]
    },
}
CHECKED_IN = ("csrc/causal_conv1d.cpp", "causal_conv1d_fwd(")  # what the convolution refuses


def fetch(requirement: str, folder: Path) -> Path:
    """The unpacked sdist of `name==version`."""
    skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation",
        "--no-binary", ":all:", "--dest", str(folder), requirement,
    ]  # fmt: skip
    subprocess.run(command, check=True, env=os.environ | skip)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    [root] = (path for path in folder.iterdir() if path.is_dir())
    return root


def described(source: str, name: str) -> dict:
    """A function's signature, and the lines of its docstring that say an argument's shape."""
    [function] = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    lines = (ast.get_docstring(function) or "").splitlines()
    shapes = (re.match(r"\s*(\w+): (\(.+)", line) for line in lines)
    arguments = {argument.arg for argument in function.args.args}
    return {
        "signature": f"({ast.unparse(function.args)})",
        "shapes": {m[1]: m[2] for m in shapes if m and m[1] in arguments},
    }


def checks(source: str, function: str) -> list[str]:
    """Conditions of the TORCH_CHECKs of a C++ function that say something of layout or dtype."""
    body = source[
        source.index(f"\n{function}") if f"\n{function}" in source else source.index(function) :
    ]
    body = body[: body.index("\n}\n")]
    found = re.findall(r"TORCH_CHECK\((.*)\);", body)
    return [line for line in found if re.search(r"stride|contiguous|channel_last|kInt32|% 8", line)]


def main() -> None:
    table = {}
    for requirement in LOCK.read_text().splitlines():
        name, _, version = requirement.partition("==")
        if name not in FUNCTIONS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = fetch(requirement, Path(folder))
            functions = {}
            for file, names in FUNCTIONS[name].items():
                source = (root / file).read_text()
                module = file.removesuffix(".py").replace("/", ".")
                functions |= {f"{module}.{f}": described(source, f) for f in names}
            table[name] = {"version": version, "functions": functions}
            if (root / CHECKED_IN[0]).is_file():
                cpp = (root / CHECKED_IN[0]).read_text()
                table[name]["checks"] = checks(cpp, CHECKED_IN[1])
    (HERE / "kernel_signatures.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
