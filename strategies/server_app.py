"""The ServerApp: the same federation on Flower's own runtimes."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config, load_config
from fedlora.data.tokens import prepare_data
from fedlora.errors import INPUT_MARK, InputError, RunError
from fedlora.results.folder import run_folder
from strategies import get_strategy
from strategies.federation import run_federation

log = logging.getLogger("fedlora")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the config that Flower's run config names.

    ``config`` is a path or TOML text, ``output`` the run folder, and ``resume`` says to go on with the run in it.
    """
    source = str(context.run_config["config"])
    beside = Path(__file__).parents[1] / source if "\n" not in source else Path(source)
    config = resolve(load_config(source if "\n" in source or Path(source).is_file() else beside))
    output = Path(str(context.run_config.get("output") or Path("runs") / config.run.name))
    resume = bool(context.run_config.get("resume", False))
    try:
        with run_folder(output, config, resume=resume) as folder:
            if not folder.finished:
                method = get_strategy(config.method.name)
                tokens = prepare_data(config)
                for note in tokens.notes:
                    log.info("note: %s", note)
                run_federation(config, grid, folder, tokens, method(config))
    except InputError as error:
        # Of an exception Flower passes on the text alone; the mark tells whose mistake it is.
        raise RunError(f"{INPUT_MARK}{error}") from None


def resolve(config: Config) -> Config:
    """Fill in what the method decides: the learning rate."""
    strategy = get_strategy(config.method.name)
    client = config.client
    if client.learning_rate is None:
        client = client.model_copy(update={"learning_rate": strategy.learning_rates[client.optimizer]})
    return config.model_copy(update={"client": client})
