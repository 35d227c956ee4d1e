"""The ServerApp: the same federation on Flower's own runtimes."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config, load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import INPUT_MARK, InputError, RunError
from fedlora.results.folder import run_folder
from fedlora.results.identity import check_data
from fedlora.results.user_code import with_user_code
from fedlora.status import DOING, written
from fedlora.strategies.base import get_strategy
from fedlora.strategies.federation import Federation

log = logging.getLogger("fedlora")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the config that Flower's run config names.

    ``config`` is a path or TOML text, ``output`` the run folder (runs/NAME, or
    runs/NAME-2 and so on where that exists), and ``resume`` says to go on with the run in it.
    """
    source = str(context.run_config["config"])
    beside = Path(__file__).parents[1] / source if "\n" not in source else Path(source)
    read = load_config(source if "\n" in source or Path(source).is_file() else beside)
    config = resolve(with_user_code(read, {}))
    resume = bool(context.run_config.get("resume", False))
    given = str(context.run_config.get("output") or "")
    output = Path(given or Path("runs") / config.run.name)
    # Who sends a config as text (fedlora run --on) looks for the run by its name.
    if not given and not resume and "\n" not in source:
        output = free_folder(output)
    print(f"The run folder is {output.absolute()}", flush=True)
    try:
        with run_folder(output, config, resume=resume) as folder, written(output / DOING):
            if not folder.finished:
                method = get_strategy(config.method.name)
                data = prepare_data(config)
                check_data(folder, config, data)
                Federation(config, grid, folder, data, method(config)).run()
    except InputError as error:
        # Of an exception Flower passes on the text alone; the mark tells whose mistake it is.
        raise RunError(f"{INPUT_MARK}{error}") from None


def free_folder(path: Path) -> Path:
    """Return the path, or the first of PATH-2, PATH-3, ... that is not there, if it is."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not os.path.lexists(found))


def resolve(config: Config) -> Config:
    """Fill in what the method decides: the learning rate."""
    strategy = get_strategy(config.method.name)
    client = config.client
    if client.learning_rate is None:
        client = client.model_copy(update={"learning_rate": strategy.learning_rates[client.optimizer]})
    return config.model_copy(update={"client": client})
