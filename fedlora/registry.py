"""Named choices of the config, each in a file of its own: fedlora's, and those of other packages.

A registry belongs to one package of fedlora. A file ``NAME.py`` in its folder is the choice ``NAME`` (``-`` in a name
is ``_`` in the file's) and defines one concrete subclass of the package's base class, with ``name = "NAME"``. Nothing
else has to be edited. Files whose names begin with ``_`` are no choices.

Another package adds a choice by an entry point: its name is the choice's, its value the class. ::

    [project.entry-points."fedlora.codecs"]
    my-codec = "my_package.codecs:MyCodec"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from fedlora.errors import InputError


class Registry:
    """The choices of one kind, by name. Names are known from files and metadata alone: nothing is imported for them.

    Parameters
    ----------
    base : str
        ``package:Class``: the package whose files are the choices, and the class that they subclass.
    group : str
        Entry points of this group are choices too.
    field : str
        The config key that takes a name, for errors.
    """

    def __init__(self, base: str, group: str, field: str) -> None:
        self.package, _, self.base_name = base.partition(":")
        self.group, self.field = group, field
        self._classes: dict[str, type[Any]] = {}
        self._made: dict[type[Any], Any] = {}

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted({*self._files, *self._entry_points})

    def check(self, name: str) -> str:
        """Return a name that is there: a validator for pydantic.

        Raises
        ------
        PydanticCustomError
            Listing the names.
        """
        if name not in self._files and name not in self._entry_points:
            raise PydanticCustomError("unknown_name", "{text}", {"text": f"should be {_either(self.names())}"})
        return name

    def get(self, name: str) -> type[Any]:
        """Import and return a choice's class.

        Raises
        ------
        InputError
            If nothing has that name, two things have it, or the package that registers it does not load.
        TypeError
            If the file or the entry point does not hold what it should; the text is for its author.
        """
        if name not in self._classes:
            self._classes[name] = self._load(name)
        return self._classes[name]

    def made(self, name: str) -> Any:
        """Return the one instance of a choice whose class takes nothing and keeps nothing; raises as :meth:`get`."""
        kind = self.get(name)
        if kind not in self._made:
            self._made[kind] = kind()
        return self._made[kind]

    def _load(self, name: str) -> type[Any]:
        added = self._entry_points.get(name, [])
        owners = [*(["fedlora"] if name in self._files else []), *map(_owner, added)]
        if not owners:
            raise InputError(self.field, name, f"there is no such choice; take {_either(self.names())}")
        if len(owners) > 1:
            raise InputError(self.field, name, f"is registered by {' and by '.join(owners)}; uninstall one of them")
        base = getattr(importlib.import_module(self.package), self.base_name)
        if not added:
            module = importlib.import_module(f"{self.package}.{self._files[name]}")
            found = [kind for kind in vars(module).values() if _is_choice(kind, base, name)]
            if len(found) != 1:
                raise TypeError(f"{module.__name__} should define one concrete {self.base_name} with name = {name!r}")
            return found[0]
        try:
            loaded = added[0].load()
        except Exception as error:
            remedy = f"does not load from {owners[0]} ({type(error).__name__}: {error}); fix or uninstall that package"
            raise InputError(self.field, name, remedy) from error
        if not _is_choice(loaded, base, name):
            raise TypeError(f"{added[0].value} should be a concrete {self.base_name} with name = {name!r}")
        return loaded

    @cached_property
    def _files(self) -> dict[str, str]:
        """Modules by the names of their choices. By path: importing the package could import torch."""
        folder = Path(__file__).parent.joinpath(*self.package.split(".")[1:])
        modules = [module.name for module in pkgutil.iter_modules([str(folder)])]
        return {module.replace("_", "-"): module for module in modules if not module.startswith("_")}

    @cached_property
    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found


def _is_choice(kind: Any, base: type, name: str) -> bool:
    concrete = inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    return concrete and getattr(kind, "name", None) == name


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _either(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


ACCOUNTANTS = Registry("fedlora.privacy.accountants:Accountant", "fedlora.accountants", "privacy.accountant")
MECHANISMS = Registry("fedlora.privacy.mechanisms:Mechanism", "fedlora.mechanisms", "privacy.mode")
CODECS = Registry("fedlora.communication.codecs:Codec", "fedlora.codecs", "wire.codec")
SERVER_OPTIMIZERS = Registry(
    "fedlora.server.optimizers:ServerOptimizer", "fedlora.server_optimizers", "server.optimizer"
)
CORRECTIONS = Registry("fedlora.corrections:Correction", "fedlora.corrections", "client.correction")
AGGREGATORS = Registry("fedlora.server.aggregators:Aggregator", "fedlora.aggregators", "server.aggregator")
CLIENT_SAMPLINGS = Registry("fedlora.server.sampling:ClientSampling", "fedlora.client_samplings", "server.sampling")
PARAMETERISATIONS = Registry(
    "fedlora.adapters.parameterisations:Parameterisation", "fedlora.parameterisations", "parameterisation"
)
