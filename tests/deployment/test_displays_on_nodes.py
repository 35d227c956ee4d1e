"""While a run is on nodes, whoever submitted it, the server and each node see what goes on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import tomli_w

from tests.deployment.federation import NAME, Federation
from tests.deployment.test_federation import config_of

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]

LIMIT = 10.0


def test_no_display_is_silent_during_a_run(federation: Federation, examples: Path) -> None:
    federation.set_policy(allow_non_private=True)
    content = config_of(
        examples,
        "shown",
        run={"rounds": 2},
        client={"local_steps": 30},
        privacy={"mode": "none"},
        server={"timeout": 600.0},
    )
    path = federation.folder / "shown.run.toml"
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    federation.start("shown", "run", path, "--on", NAME)
    process = federation.processes.pop("shown")
    began = time.monotonic()
    heard, silent, known = began, 0.0, ""
    while process.poll() is None:
        if (text := federation.output("shown")) != known:
            heard, known = time.monotonic(), text
        silent = max(silent, time.monotonic() - heard)
        time.sleep(0.2)
    assert process.returncode == 0, federation.output("shown")
    assert time.monotonic() - began > 2 * LIMIT  # else nobody had to say anything
    assert silent <= LIMIT
    assert re.search(rf"server {NAME}: rounds 0/2.*, training clients 0/3", federation.output("shown"))
    assert "INFO server: run shown: rounds" in federation.output("server")
    for name in federation.data:
        assert f"INFO node {name}: waiting for messages" in federation.output(name)
        assert f"INFO node {name}: local steps" in federation.output(name)
        assert "INFO local steps" in (federation.folder / f"state-{name}" / "worker" / "worker.log").read_text()
