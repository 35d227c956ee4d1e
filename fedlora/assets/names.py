"""What a config may name: an asset, a path or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.assets.catalogue import find_asset, is_asset
from fedlora.errors import InputError
from fedlora.paths import find_path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""What a repository of the hub may be called."""


def find_model(name: str, field: str = "model.name") -> Path | None:
    """Return the folder that ``model.name`` names; None for an asset or a hub id.

    Parameters
    ----------
    name : str
    field : str
        The config key or option that errors name.

    Raises
    ------
    InputError
        If it is no known model asset, no folder, and cannot be a hub id.
    """
    if is_asset(name):
        find_asset(name, "model", field)
        return None
    path = find_path(name, field)
    if path is None and not HUB_ID.fullmatch(name):
        raise InputError(field, name, "there is no such folder; give asset:NAME, a hub id or an existing folder")
    if path is not None and not path.is_dir():
        raise InputError(field, name, "is a file; give the folder of a model saved by save_pretrained")
    return path
