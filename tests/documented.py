"""Which commands and code of the pages are run, by which test, and why others are not."""

from __future__ import annotations

EXECUTED = {
    "README.md": "",
    "docs/index.md": "",
    "docs/tutorials/first-run.md": "",
    "docs/tutorials/own-data.md": "",
    "docs/tutorials/study.md": "",
    "docs/guides/mixed-ranks.md": "",
    "docs/guides/privacy.md": "docs/index.md",
    "docs/guides/reports.md": "docs/tutorials/first-run.md",
    "docs/guides/results.md": "docs/index.md",
    "docs/guides/resuming.md": "",
}
"""Pages that tests/test_documented_runs.py runs, and the page whose runs each one expects to be there."""

RUN_BY = {
    "docs/adding-a-method.md": "tests/test_adding_a_method.py",
    "docs/example_method/README.md": "tests/test_example_method.py",
    "docs/tutorials/large-model.md": "tests/test_large_model_page.py",
}
"""Pages whose commands or code other tests run, on small models."""

NOT_RUN = {
    r": make (?!quickstart)": "the checks and builds themselves; CI runs them",
    r": (source|export|mkdir|cat|pgrep) ": "the shell's own",
    r": (python -m )?pip install": "changes the environment; make check-wheel has another for that",
    r": (python -m )?pytest |: ruff |: mypy|: lint-imports": "the checks themselves; CI runs them",
    r": flwr (?!run)": "asks a SuperLink; tests/deployment starts one",
    r"gpus.md: flwr run": "tests/test_flower_runtime.py runs it",
    r"benchmarks": "measures for minutes, most of it on a GPU; tests of each benchmark's parts run on small models",
    r"flexmore_study": "an hour on a GPU; tests/test_flexmore_run.py has the same experts on a small model",
    r"flexmore.toml": "a language model of 135 M parameters; tests/test_flexmore_run.py has the same on a small one",
    r"vitaminc.toml": "an encoder of 109 M parameters on a GPU; smoke.toml runs",
    r"reasoning_problems": "needs reasoning-gym; tests/data/test_reasoning_problems.py has a stand-in",
    r"chat.toml": "a language model of 135 M parameters; tests/data/test_messages.py and test_scored_answers.py",
    r"(wire|privacy|privacy_20newsgroups|communication|comparison)\.toml": "hundreds of runs on a GPU; smoke.toml runs",
    r"distributed_noise\.toml": "90 minutes; tests/strategies/test_distributed_noise.py has the mechanism",
    r"gpus_per_worker|ray://": "needs GPUs or a cluster; tests/simulation and tests/training/test_two_gpus.py",
    r"(deployment|real-nodes|two-machines|node-owners)\.md: ": "servers and nodes; tests/deployment has these commands",
    r"studies/.*\.md: fedlora report": "runs of a study that needs a GPU; reports.md has its options",
    r"push-to-hub": "uploads",
}
"""Why no test runs a command: a pattern of ``PAGE: COMMAND``, and the reason."""

PYTHON_RUN_BY = {
    "docs/guides/mixture.md": "tests/test_flexmore_run.py::test_an_owner_leaves_a_finished_run",
}
"""Tests that run the Python of other pages; this page's needs a run of a language model."""
