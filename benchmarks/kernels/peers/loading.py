"""Single files of a package whose own `__init__` wants more than a benchmark has (servers, datasets, Ray).

The file is found where the distribution was installed and loaded under a name of ours, so that nothing of the real package is
replaced; a stub stands in for a module that it imports and whose few names are given.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def package_folder(package: str) -> Path:
    """Raises ImportError where the package is not installed. Does not import it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def load(package: str, module: str, stubs: Mapping[str, Mapping[str, object]] | None = None) -> types.ModuleType:
    """package.module from its file, as `_peer_package.module`: its relative imports stay inside that name, its absolute ones find
    the stubs (by full name) while it loads, and the real modules where there is no stub."""
    alias = f"_peer_{package}"
    folder = package_folder(package)
    parts = module.split(".")
    for depth in range(len(parts)):
        name = ".".join([alias, *parts[:depth]])
        if name not in sys.modules:
            shell = types.ModuleType(name)
            shell.__path__ = [str(folder.joinpath(*parts[:depth]))]  # type: ignore[attr-defined]
            sys.modules[name] = shell
    before = {name: sys.modules.get(name) for name in stubs or {}}
    for name, members in (stubs or {}).items():
        stub = types.ModuleType(name)
        stub.__dict__.update(members)
        sys.modules[name] = stub
    try:
        return importlib.import_module(f"{alias}.{module}")
    finally:
        for name, old in before.items():
            if name.startswith(alias):
                continue  # ours to keep: imported again at every call
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
