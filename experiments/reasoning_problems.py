"""Problems of reasoning-gym as conversations: questions with one right answer, made by rule.

    python -m fedlora.experiments.reasoning_problems FOLDER

FOLDER is then a ``datasets`` folder for ``data.name``, with the splits train and test and the columns task, text (the
question), answer and messages (the two as one turn of the user and one of the assistant). The same command makes the
same problems. Needs the extra package: pip install 'fedlora[reasoning]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fedlora.tasks.chat import conversation

TASKS = ("basic_arithmetic", "chain_sum", "gcd", "leg_counting", "simple_equations", "syllogism")
"""Tasks of reasoning-gym whose problems and answers are short."""

TEST_SEED = 10**6


def problems(tasks: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Return problems of each task in turn, in equal parts, at least ``count`` in all.

    Parameters
    ----------
    tasks : sequence of str
        Names of reasoning-gym's data sets.
    count : int
    seed : int
        Seeds that lie further apart than the number of problems give other problems.

    Returns
    -------
    list of dict
        ``task``, ``text`` and ``answer``.
    """
    import reasoning_gym

    return [
        {"task": task, "text": item["question"].strip(), "answer": str(item["answer"])}
        for number, task in enumerate(tasks)
        for item in reasoning_gym.create_dataset(task, size=-(-count // len(tasks)), seed=seed + number)
    ]


def export(folder: Path, tasks: Sequence[str], train: int, test: int) -> None:
    """Write the two splits; test problems whose question is among the training problems are left out."""
    import datasets

    known = problems(tasks, train, seed=0)
    asked = {row["text"] for row in known}
    new = [row for row in problems(tasks, test, seed=TEST_SEED) if row["text"] not in asked]
    splits = {
        name: datasets.Dataset.from_list(
            [{**row, "messages": conversation(row["text"], row["answer"])} for row in rows]
        )
        for name, rows in (("train", known), ("test", new))
    }
    datasets.DatasetDict(splits).save_to_disk(folder)
    print(f"{folder}: {len(known)} training and {len(new)} test problems")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write problems of reasoning-gym as conversations.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--train", type=int, default=2400, help="training problems of all tasks together")
    parser.add_argument("--test", type=int, default=300, help="test problems")
    options = parser.parse_args()
    export(options.folder, options.tasks, options.train, options.test)


if __name__ == "__main__":
    main()
