"""An owner leaves a finished run: its expert is taken out of everything that the run left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedlora.errors import InputError
from fedlora.experts.folder import EXPERTS, MIXTURE, folder_name
from fedlora.experts.mixture import Mixture
from fedlora.methods import BEST
from fedlora.models import quiet
from fedlora.results.checkpoint import Checkpoint
from fedlora.results.folder import to_json, write_atomically
from fedlora.results.load import load
from fedlora.results.outputs import find_outputs, write_sums


def opt_out(folder: Path, owner: str) -> Mixture:
    """Remove an owner's expert from a finished run: from its mixture, its experts/ and its checkpoint.

    The model of the best round, if the run kept one, is deleted.

    Parameters
    ----------
    folder : Path
        A run folder.
    owner : str

    Returns
    -------
    Mixture
        The new content of ``mixture/``. It equals a mixture without that expert, except where the router was tuned
        (``router_tuned`` in summary.json): the other rows keep what they learned beside that expert.

    Raises
    ------
    InputError
        If the folder holds no mixture, or that owner has no expert in it.
    """
    kept = folder / MIXTURE
    if not (kept / "config.json").is_file():
        raise InputError("FOLDER", str(folder), "holds no mixture; give the folder of a finished run")
    mixture: Mixture
    mixture, tokenizer = load(folder)
    mixture.remove_expert(owner)
    new, old = folder / f".{MIXTURE}.new", folder / f".{MIXTURE}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with quiet():
        mixture.save_pretrained(new)
    tokenizer.save_pretrained(new)
    checkpoint = Checkpoint(folder / "checkpoint" / "state.sqlite")
    try:
        arrays = checkpoint.get_arrays("trained") or {}
        checkpoint.set_arrays("trained", {n: a for n, a in arrays.items() if n.rpartition("/")[0] != owner})
        checkpoint[BEST] = None  # that model goes as a whole
        checkpoint.set_arrays(BEST, {})
        checkpoint.commit()
        checkpoint.forget_previous()  # which still holds the expert
        kept.rename(old)
        new.rename(kept)
        shutil.rmtree(old)
        for gone in (folder / EXPERTS / folder_name(owner), folder / BEST):
            shutil.rmtree(gone, ignore_errors=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        summary["opted_out"] = [*summary.get("opted_out", []), owner]
        write_atomically(folder / "summary.json", to_json(summary, indent=2) + "\n")
        outputs = find_outputs(folder, (MIXTURE, EXPERTS))
        write_sums(folder, outputs)
        checkpoint["outputs"] = outputs
        checkpoint.commit()
        checkpoint.forget_previous()
    finally:
        checkpoint.close()
    return mixture
