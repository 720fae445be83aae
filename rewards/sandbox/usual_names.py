"""What solutions use without importing it: LiveCodeBench's own grader puts these names there.

They are as after LiveCodeBench's preamble, `from string import *` to `from typing import *`, then
`import string` and so on, with a higher recursion limit; but only names that a program mentions
are looked up, so that it pays for no module that it does not use. The prompt's own imports follow.

Invariant: runs in the jail (or in a service's process), before the program and with its rights. It
stands on nothing but the standard library: `http_executor` sends this file's text.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterable
from typing import Any

RECURSION_LIMIT = 50_000

# In LiveCodeBench's order: of two modules with the same name the later one has it.
STARRED = (
    "string", "re", "collections", "heapq", "bisect", "copy", "math", "itertools", "functools",
    "operator", "io", "sys", "typing",
)
# Modules that are imported only when one of these, or their own name, is mentioned.
ON_DEMAND = {
    "datetime": "MAXYEAR MINYEAR UTC date time timedelta timezone tzinfo",
    "json": "JSONDecodeError JSONDecoder JSONEncoder dump dumps load loads",
    "random": "Random SystemRandom betavariate choice choices expovariate gammavariate gauss "
    "getrandbits getstate lognormvariate normalvariate paretovariate randbytes randint "
    "randrange sample seed setstate shuffle triangular uniform vonmisesvariate "
    "weibullvariate",
    "statistics": "NormalDist StatisticsError correlation covariance fmean geometric_mean "
    "harmonic_mean linear_regression mean median median_grouped median_high median_low mode "
    "multimode pstdev pvariance quantiles stdev variance",
}
_OWNER = {name: module for module, names in ON_DEMAND.items() for name in names.split()}


def prepare(namespace: dict[str, Any], code: types.CodeType, imports: Iterable[str]) -> None:
    """Into `namespace`: usual names that `code` mentions, and what the prompt imports."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    builtin = vars(importlib.import_module("builtins"))
    for name in _mentioned(code):
        if name not in builtin and name not in namespace and not name.startswith("_"):
            _provide(namespace, name)
    for statement in imports:
        try:
            exec(statement, namespace)
        except Exception:  # prose, or a module that is not there: the program may do without
            continue


def _provide(namespace: dict[str, Any], name: str) -> None:
    if name in STARRED or name in ON_DEMAND:
        namespace[name] = importlib.import_module(name)
        return
    if name in ("exit", "quit"):  # which interpreters without `site` do not have
        namespace[name] = sys.exit
        return
    owners = (_OWNER[name],) if name in _OWNER else reversed(STARRED)
    for module in map(importlib.import_module, owners):
        public = getattr(module, "__all__", None)
        if (public is None or name in public) and hasattr(module, name):
            namespace[name] = getattr(module, name)
            return


def _mentioned(code: types.CodeType) -> set[str]:
    """Names that the program or a function in it uses, those of attributes among them."""
    names, left = set(), [code]
    while left:
        one = left.pop()
        names.update(one.co_names)
        left += [const for const in one.co_consts if isinstance(const, types.CodeType)]
    return names
