"""fedlora: federated fine-tuning of transformers, private and measured.

``simulate`` runs a federation on this machine or a Ray cluster; ``load`` gives the model that a run made, ``opt_out``
takes what an owner gave out of it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import InputError, RunError
from fedlora.home import ensure_home

if TYPE_CHECKING:
    from fedlora.results.finished import RunResult
    from fedlora.results.load import load, opt_out
    from fedlora.simulator import simulate

# Before any library looks for it.
ensure_home()

# strategies/, clients/ and experiments/ lie beside this folder, and links in it make them fedlora.strategies and so on.
# Flower leaves links out of the app that it packs: there they are found beside it.
if not (Path(__path__[0]) / "strategies").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

__all__ = ["InputError", "RunError", "RunResult", "load", "opt_out", "simulate"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `fedlora --help` and the config need neither torch nor Ray.
    if name == "simulate":
        from fedlora.simulator import simulate

        return simulate
    if name == "load":
        from fedlora.results.load import load, opt_out

        return load
    if name == "opt_out":
        from fedlora.results.load import opt_out

        return opt_out
    if name == "RunResult":
        from fedlora.results.finished import RunResult

        return RunResult
    raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
