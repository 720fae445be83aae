"""Whether transformers' hybrids run on the real CUDA kernels.

Invariant: a family passes only if its convolution and scan are functions of causal_conv1d and
mamba_ssm that take `seq_idx`. transformers imports both when it is imported itself, catches every
error of that, falls back to a slow path after a mild log line and then filters `seq_idx` out: a
package that is installed but broken would leak one packed document into the next.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from h1r_rl.errors import ConfigError

# transformers' name of the function -> package whose kernel must stand behind it
KERNELS = {
    "causal_conv1d_fn": "causal_conv1d",
    "mamba2_chunk_scan": "mamba_ssm",  # evaluation
    "mamba2_split_conv1d_scan_combined": "mamba_ssm",  # training: both in one
}


def modeling_module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def kernel_problems(family: str) -> list[str]:
    """Why a family must not be trained on CUDA here; empty where its kernels are real."""
    module = modeling_module(family)
    replaced = getattr(module, "h1r_originals", ())  # by boundaries.py, in this order
    originals: dict[str, Any] = {}
    originals.update(zip(("causal_conv1d_fn", "mamba2_chunk_scan"), replaced, strict=False))
    problems = []
    for name, package in KERNELS.items():
        function = originals.get(name) or getattr(module, name, None)
        kernel = _behind(function)
        if kernel is None or not kernel.__module__.partition(".")[0] == package:
            found = getattr(kernel or function, "__module__", "nothing")
            problems.append(
                f"{name} resolves to {found}, expected {package}{_import_error(package)}"
            )
        elif "seq_idx" not in inspect.signature(kernel).parameters:
            problems.append(f"{package}'s {kernel.__name__} takes no seq_idx: too old")
    return problems


def require_kernels(family: str) -> None:
    problems = kernel_problems(family)
    if problems:
        raise ConfigError(
            "training a hybrid on CUDA needs the kernels of mamba_ssm and causal_conv1d, without "
            f"which packed documents leak into each other: {'; '.join(problems)}. Run "
            "`make setup PLATFORM=cuda`; if that was done, the packages were built for another "
            "torch: reinstall them"
        )


def _behind(function: Any) -> Any:
    """What transformers' wrapper calls: its closure holds the implementation chosen at import."""
    try:
        return inspect.getclosurevars(function).nonlocals.get("implementation")
    except TypeError:
        return None


def _import_error(package: str) -> str:
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a broken binary raises is what the user must see
        return f" ({type(error).__name__}: {error})"
    return " (it imports now, but did not when transformers was imported)"
