"""Seconds and memory of a client's training step on language models of 1B and 8B parameters, against PEFT.

Ours is a whole federation with the defaults of ``fedlora run``, in one process; its step is the training time of a
round, after the first, for as many examples as a step of the peers has: Poisson batches vary. The peers train one
client with transformers and PEFT: without privacy, with gradient checkpointing, under Opacus, and on a base of 4 bits.
All have LoRA of one rank on the same layers, the base in bfloat16, and the same texts. Every measurement runs in a
process of its own. Memory is the most that torch had allocated on the card in the rounds, of which the server's part is
in ours; the start, which checks the model in float32 where there is room, is told apart::

    python -m fedlora.experiments.benchmarks.llm --cases 1b 8b --output llm.json

Longer texts, the largest length that fits, and a card of less memory have cases of their own::

    python -m fedlora.experiments.benchmarks.llm --cases 8b-2048 8b-longest 8b-small-card

So has what is in memory at once (``client.physical_batch_size``), against what fedlora chooses::

    python -m fedlora.experiments.benchmarks.llm --cases 1b 8b --physical-batches 1 2 4 8 16
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch

from fedlora.experiments.benchmarks.kernel_times import KernelTimes
from fedlora.experiments.benchmarks.machine import machine
from fedlora.experiments.benchmarks.own_process import run_module

SECONDS = 400
"""A measurement that takes longer is given up."""

CASE = "case.json"
"""In a case's folder: what a measurement needs to know."""

SEARCH = {"clients": 1, "batches": 1, "steps": 1, "rounds": 1, "smallest": True}
"""Settings of a search for the largest length: one step, which draws all examples, of the smallest passes there are."""


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Save a Llama of random weights, or a BERT (``architecture``), and a tokenizer of one word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {key: value for key, value in shape.items() if key != "architecture"}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device(_device()):
        model: Any
        if shape.get("architecture") == "bert":
            model = BertModel(BertConfig(**sizes, pad_token_id=0))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2**20, **ids))
    for earlier in folder.glob("model*"):
        earlier.unlink()
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the measurements are other processes on the same card
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(len(special), shape["vocab_size"]))]
    known = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_texts(file: Path, rows: int, tokens: int, vocabulary: int, labels: int = 0) -> None:
    """Write texts of so many tokens, with the one that ends them, and a label each if there are some."""
    drawn = np.random.default_rng(0).integers(4, vocabulary, (rows, tokens - 1))
    texts = (" ".join(f"w{word}" for word in row) for row in drawn)
    said = ({"text": text} | ({"label": i % labels} if labels else {}) for i, text in enumerate(texts))
    lines = (json.dumps(row) for row in said)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def ours(settings: dict[str, Any], case: dict[str, Any], run: str, folder: Path) -> dict[str, Any]:
    """Return seconds a client step, of each round after the first, the start's time and memory, and what fedlora chose.

    The start begins with the process, and ends when the first client is asked to train.
    """
    from fedlora import simulate
    from fedlora.strategies.callbacks import Progress
    from fedlora.training import cohort
    from fedlora.training.batches import poisson_batches

    content = run_config(settings, case, folder)
    content["simulation"] = {"workers": 0, "gpus_per_worker": 1.0 if torch.cuda.is_available() else 0.0}
    if "private" not in run:
        del content["privacy"]
    if "nf4" in run:
        content["model"]["quantization"] = "nf4"
    for name, method in settings["methods"].items():
        if name in run:
            content["method"] = {"name": name, **method}
    if found := re.search(r"physical batch (\d+)", run):
        content["client"] |= {"physical_batch_size": int(found[1]), "gradient_checkpointing": False}
        content["simulation"]["cohort_size"] = 1
    if settings.get("smallest"):  # what fedlora chooses where nothing else fits, without trying more
        content["client"] |= {"physical_batch_size": 1, "gradient_checkpointing": True}
        content["simulation"]["cohort_size"] = 1
        content["server"]["evaluate_start"] = False
    start: dict[str, Any] = {}
    drawn: list[int] = []
    profiled = settings["rounds"] - 1  # the first round warms up, and the last is evaluated, too
    kernels = KernelTimes() if settings["profile"] and profiled > 1 and torch.cuda.is_available() else None
    table: list[dict[str, Any]] = []
    steps = settings["clients"] * settings["steps"]

    def count(*arguments: Any) -> Iterator[Any]:
        for batch in poisson_batches(*arguments):
            drawn.append(len(batch))
            yield batch

    def begin(*_: int) -> None:
        start.update(start_seconds=time.time() - psutil.Process().create_time(), start_peak_bytes=_peak())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_round(line: dict[str, Any]) -> None:
        if kernels is None:
            return
        if line["round"] == profiled - 1:
            kernels.start()
        elif line["round"] == profiled:
            table.extend(kernels.stop(sum(drawn[-steps:]) / case["batch"] if drawn else steps))

    with tempfile.TemporaryDirectory() as place, patch.object(cohort, "poisson_batches", count):
        simulate(content, output=Path(place) / "run", progress=Progress(on_start=begin, on_round=on_round))
        lines = [json.loads(line) for line in (Path(place) / "run" / "rounds.jsonl").read_text().splitlines()]
        chosen = tomllib.loads((Path(place) / "run" / "config.toml").read_text())
    examples = [case["batch"] * steps] * len(lines)  # without privacy batches are full
    if drawn:
        before = len(drawn) - steps * len(lines)  # checks of the start
        examples = [sum(drawn[i : i + steps]) for i in range(before, len(drawn), steps)]
    seconds = [line["seconds"]["train"] / n * case["batch"] for line, n in zip(lines, examples, strict=True)]
    first = min(1, len(lines) - 1)  # of several rounds the first warms up
    measured = [i for i in range(first, len(lines)) if kernels is None or i != profiled - 1]
    return {
        "seconds": [seconds[i] for i in measured],
        "examples": [examples[i] for i in measured],
        "kernels": table,
        **start,
        "cohort": chosen["simulation"]["cohort_size"],
        "physical_batch": chosen["client"].get("physical_batch_size", case["batch"]),
        "checkpointing": chosen["client"]["gradient_checkpointing"] is True,
    }


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def run_config(settings: dict[str, Any], case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config of a private run on the model and the examples in a folder; where it runs is left open."""
    return {
        "run": {"rounds": settings["rounds"]},
        "model": {"name": str(folder), "task": "causal-lm", "dtype": "bfloat16", "max_length": case["tokens"]},
        "data": {
            "name": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "partition": {"clients": settings["clients"]},
        },
        "method": {"name": "fedit", "rank": settings["rank"], "target_modules": settings["target_modules"]},
        "client": {"batch_size": case["batch"], "local_steps": settings["steps"]},
        "server": {"evaluate_every": settings["rounds"]},
        "privacy": {
            "mode": "example",
            "noise_multiplier": settings["noise_multiplier"],
            "target_delta": 1e-3,
            "max_grad_norm": settings["max_grad_norm"],
        },
    }


def peer(settings: dict[str, Any], case: dict[str, Any], run: str, folder: Path) -> dict[str, Any]:
    """Return seconds of each training step with transformers and PEFT, and with Opacus where it is asked for."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.optimizers import DPOptimizer
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": _device()}}
    if "nf4" in run:
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **kind)
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["rank"],
        target_modules=settings["target_modules"],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options), lora)
    if "checkpointed" in run:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-3)
    if "opacus" in run:
        GradSampleHooks(model, loss_reduction="mean")
        noise, norm = settings["noise_multiplier"], settings["max_grad_norm"]
        optimizer = DPOptimizer(
            optimizer, noise_multiplier=noise, max_grad_norm=norm, expected_batch_size=case["batch"]
        )
    vocabulary = model.get_base_model().config.vocab_size
    times = []
    for step in range(2 + settings["peer_steps"]):
        rng = np.random.default_rng(step)
        ids = torch.from_numpy(rng.integers(4, vocabulary, (case["batch"], case["tokens"]))).to(_device())
        began = time.perf_counter()
        with torch.autocast(_device(), torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"seconds": times[2:]}


def measure(run: str, folder: Path) -> dict[str, Any]:
    """Measure one run in this process: seconds a step, and the most memory that torch had allocated."""
    known = json.loads((folder / CASE).read_text(encoding="utf-8"))
    settings, case, limit = known["settings"], known["case"], known["memory_limit"]
    if limit and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    found = (ours if run.startswith("fedlora") else peer)(settings, case, run, folder)
    return {**found, "median": statistics.median(found["seconds"]), "peak_bytes": _peak()}


def _child(run: str, folder: Path) -> dict[str, Any]:
    return run_module(__spec__.name, ["--child", run, str(folder)], SECONDS)


def _shown(case: str, run: str, row: dict[str, Any], best: float | None) -> str:
    if "error" in row:
        return f"{case:8} {run:34} {row['error'][:80]}"
    memory = f"{row['peak_bytes'] / 2**30:6.1f} GiB" if row["peak_bytes"] else ""
    ratio = f"{row['median'] / best:6.2f} of peft" if best else ""
    if row.get("start_peak_bytes"):
        memory += f" (start {row['start_peak_bytes'] / 2**30:.1f})"
    if "start_seconds" in row:
        memory += f", begun after {row['start_seconds']:.0f} s"
    chosen = f"cohort {row['cohort']}, physical batch {row['physical_batch']}" if "cohort" in row else ""
    chosen += ", checkpointing" if row.get("checkpointing") else ""
    return f"{case:8} {run:34} {row['median']:8.3f} s {memory} {ratio} {chosen}".rstrip()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_texts(folder: Path, settings: dict[str, Any], case: dict[str, Any], limit: float | None) -> None:
    """Write a case's texts beside its model, and what its measurements need to know."""
    vocabulary = settings["shapes"][case["shape"]]["vocab_size"]
    rows_of_train = settings["clients"] * case["batch"] * settings["batches"]
    for file, count in (("train", rows_of_train), ("test", case["batch"])):
        make_texts(folder / f"{file}.jsonl", count, case["tokens"], vocabulary)
    known = {"settings": settings, "case": case, "memory_limit": limit}
    (folder / CASE).write_text(json.dumps(known), encoding="utf-8")


def chosen_runs(arguments: argparse.Namespace, case: dict[str, Any]) -> list[str]:
    """Return the names of what is measured of a case."""
    if arguments.physical_batches:
        first = (arguments.runs or ["fedlora private"])[0]
        return [first, *(f"{first}, physical batch {n}" for n in arguments.physical_batches)]
    return [run for run in case["runs"] if not arguments.runs or run in arguments.runs]


def measurements(
    arguments: argparse.Namespace, settings: dict[str, Any], case: dict[str, Any], folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure a case, run by run; with ``longest`` the first run at lengths that double, as far as they fit."""
    limit = case.get("memory_limit")
    if "longest" not in case:
        write_texts(folder, settings, case, limit)
        for run in chosen_runs(arguments, case):
            yield run, _child(run, folder)
        return
    run, tokens = chosen_runs(arguments, case)[0], case["tokens"]
    while tokens <= case["longest"]:
        write_texts(folder, settings | SEARCH, case | {"tokens": tokens}, limit)
        found = _child(run, folder)
        yield f"{run}, {tokens} tokens", found
        if "error" in found:
            return
        tokens *= 2


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--cases", nargs="+", default=["1b", "8b"])
    parser.add_argument("--runs", nargs="+", help="only these of a case's runs")
    parser.add_argument("--tokens", type=int, help="of a text, instead of the case's")
    parser.add_argument("--batch", type=int, help="examples of a client and step, instead of the case's")
    parser.add_argument("--physical-batches", type=int, nargs="+", help="measure the first run with each of them")
    parser.add_argument("--profile", action="store_true", help="say of one round of ours where the GPU's time goes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("RUN", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the chosen cases, print a table and write the raw figures."""
    arguments = parsed()
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], Path(arguments.child[1]))))
        return
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8")) | {"profile": arguments.profile}
    cases = {case["name"]: case for case in settings["cases"]}
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "cases": {}}
    lines, made, folder = [], None, Path(tempfile.mkdtemp(prefix="llm-"))
    for name in arguments.cases:
        given = {"tokens": arguments.tokens, "batch": arguments.batch}
        case = cases[name] | {key: value for key, value in given.items() if value}
        rows = results["cases"].setdefault(name, {})
        if case["shape"] != made:  # cases of one shape, one after the other, share the weights
            made = case["shape"]
            make_model(folder, settings["shapes"][made])
        for run, row in measurements(arguments, settings, case, folder):
            rows[run] = row
            print(_shown(name, run, row, None), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        best = rows.get("peft", {}).get("median")
        lines += [_shown(name, run, row, best) for run, row in rows.items()]
    shutil.rmtree(folder)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
