"""heatssl's models among timm's, without importing timm: that takes seconds, and ``heatssl --help`` needs no model."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_MODELS = "heatssl.backbones.models"


def register_with_timm() -> None:
    """Register the models now, if timm is imported already, or else as soon as somebody imports it."""
    if "timm" in sys.modules:
        importlib.import_module(_MODELS)
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as everybody else would, and sees to it that the models are registered once it is there."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The protocol of import: None leaves the search to others.

        Who only looks whether timm is there does not import it, so the finder stays until somebody does.
        """
        if fullname != "timm" or self not in sys.meta_path:
            return None
        # Only those behind it: who imports heatssl twice has two of these, which would ask each other without end.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterTimm)]
        importlib.import_module(_MODELS)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_data and others, for those who ask a module's loader
