"""Client steps a second under DP-SGD: a cohort in one pass against PEFT + Opacus, one client at a time.

Both train the same FFA-LoRA adapters (and the classification head, where there is one) on query and value, with Poisson
sampling at the same rate and the same numbers of clients' examples, base in bf16, adapters in fp32. The peer keeps its
base model loaded and only resets the adapters between clients, which is the fairest that the stock libraries allow::

    python -m fedlora.experiments.benchmarks.cohort_speed --output cohort_speed.json --sizes minilm bert-large llama-1b
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlora.adapters import adapt
from fedlora.config import Config, load_config
from fedlora.data.tokens import TokenTable
from fedlora.experiments.benchmarks.kernel_times import KernelTimes
from fedlora.experiments.benchmarks.machine import machine
from fedlora.kernels import use_kernels
from fedlora.privacy import PrivacyPlan
from fedlora.tasks import get_task
from fedlora.training import ClientJob, train_cohort
from fedlora.training.fuse import fuse_blocks

EXAMPLES = 10
"""A client holds this many expected batches of examples."""


def build_model(size: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """Make a base model of random weights."""
    shape = {
        k: v for k, v in size.items() if k not in ("architecture", "batch", "tokens", "cohort", "steps", "peer_steps")
    }
    torch.manual_seed(0)
    with torch.device(device):
        return _random_model(size["architecture"], shape).to(dtype).requires_grad_(False)


def _random_model(architecture: str, shape: dict[str, Any]) -> nn.Module:
    if architecture == "bert":
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return BertForSequenceClassification(config)
    return LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))


def build_table(size: dict[str, Any], clients: int) -> TokenTable:
    """Draw random examples, all of the same length."""
    rng = np.random.default_rng(0)
    rows, tokens = clients * size["batch"] * EXAMPLES, size["tokens"]
    ids = rng.integers(5, size["vocab_size"], rows * tokens).astype(np.int32)
    classify = size["architecture"] == "bert"
    labels = rng.integers(0, 2, rows) if classify else None
    start = None if classify else np.zeros(rows, np.int64)
    task = get_task("sequence-classification" if classify else "causal-lm")
    return TokenTable(ids, np.arange(rows + 1) * tokens, labels, start, None, 0, task)


def run_config(settings: dict[str, Any], size: dict[str, Any]) -> Config:
    """Return a config that train_cohort needs."""
    content = {
        "model": {
            "name": "random",
            "task": "sequence-classification" if size["architecture"] == "bert" else "causal-lm",
        },
        "data": {"name": "random", "partition": {"clients": size["cohort"]}},
        "method": {"name": "ffa-lora", "rank": settings["rank"]},
        "client": {"batch_size": size["batch"], "local_steps": size["steps"]},
        "privacy": {"mode": "example", "noise_multiplier": settings["noise_multiplier"]},
    }
    return load_config(content)


def measure_cohort(
    settings: dict[str, Any], size: dict[str, Any], device: str, repeats: int, fuse: str
) -> dict[str, Any]:
    """Time train_cohort, the code that simulated workers run."""
    config = run_config(settings, size)
    base = build_model(size, _dtype(device), device)
    if device == "cuda":
        use_kernels(base)
    adapted = adapt(base, config, "lora")
    if fuse != "none":
        fuse_blocks(adapted, fuse)
    _draw_factors(adapted.parameter, adapted.names(("lora_A",)))
    start = adapted.arrays(adapted.names(tuple(settings["trained"])))
    table = build_table(size, size["cohort"])
    held = size["batch"] * EXAMPLES
    plan = PrivacyPlan(
        settings["sample_rate"],
        settings["noise_multiplier"],
        settings["max_grad_norm"],
        size["batch"],
        1,
        1e-5,
        "rdp",
        None,
    )

    def once(server_round: int) -> None:
        jobs = [
            ClientJob(k, server_round, np.arange(k * held, (k + 1) * held), start, 1e-3, plan)
            for k in range(size["cohort"])
        ]
        train_cohort(adapted, table, jobs, config)

    seconds = _timed(once, repeats, device)
    figures = _figures(seconds, size["cohort"] * size["steps"], device)
    if device == "cuda":
        kernels = KernelTimes()
        kernels.start()
        once(repeats + 1)
        figures["kernels"] = kernels.stop(size["steps"])
    return figures


def measure_peer(settings: dict[str, Any], size: dict[str, Any], device: str, repeats: int) -> dict[str, Any]:
    """Time PEFT's LoRA layers under Opacus' own optimiser and hooks."""
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.optimizers import DPOptimizer
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler
    from peft import LoraConfig, get_peft_model

    classify = size["architecture"] == "bert"
    targets = ["query", "value"] if classify else ["q_proj", "v_proj"]
    peft_config = LoraConfig(r=settings["rank"], lora_alpha=settings["rank"], target_modules=targets)
    model: Any = get_peft_model(build_model(size, _dtype(device), device), peft_config)
    for name, parameter in model.named_parameters():
        trained = "lora_B" in name or "classifier" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    if classify:
        head = model.get_base_model().classifier
        head.register_forward_pre_hook(lambda module, inputs: tuple(x.float() for x in inputs))
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]
    table = build_table(size, 1)
    model.train()

    def once(server_round: int) -> None:
        for p, value in zip(trainable, start, strict=True):
            p.data.copy_(value)
        hooks = GradSampleHooks(model, loss_reduction="sum")
        optimizer = DPOptimizer(
            torch.optim.AdamW(trainable, lr=1e-3),
            noise_multiplier=settings["noise_multiplier"],
            max_grad_norm=settings["max_grad_norm"],
            expected_batch_size=size["batch"],
            generator=torch.Generator(device).manual_seed(server_round),
        )
        sampler = UniformWithReplacementSampler(
            num_samples=len(table), sample_rate=settings["sample_rate"], steps=size["peer_steps"]
        )
        for rows in sampler:
            if not rows:
                continue
            batch = {k: v.to(device) for k, v in table.batch(np.array(rows)).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            table.task.loss(logits, batch["labels"]).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        hooks.cleanup()

    seconds = _timed(once, repeats, device)
    return _figures(seconds, size["peer_steps"], device)


def matrix_rate(device: str) -> float:
    """Measure the card's own bf16 matrix rate in FLOP/s on a large product."""
    n = 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)

    def product(_: int) -> None:
        torch.mm(a, b)

    times = _timed(product, 20, device)
    return 2 * n**3 / statistics.median(times)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _draw_factors(parameter: Callable[[str], nn.Parameter], names: tuple[str, ...]) -> None:
    for name in names:
        if name.endswith("lora_A"):
            p = parameter(name)
            p.data.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5)


def _timed(call: Callable[[int], None], repeats: int, device: str) -> list[float]:
    times = []
    for i in range(repeats + 1):
        _synchronize(device)
        began = time.perf_counter()
        call(i)
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return times[1:]  # the first warms up


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _figures(seconds: list[float], steps: int, device: str) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"seconds": seconds, "client_steps_a_second": steps / statistics.median(seconds), "peak_bytes": peak}


def main() -> None:
    """Measure the chosen sizes, print a table and write the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--sizes", nargs="+", default=["minilm", "bert-large", "llama-1b"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fuse", nargs="+", default=["none", "islands"], choices=["none", "islands", "layers"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"machine": machine(), "settings": settings, "sizes": {}}
    if device == "cuda":
        results["matrix_flops"] = matrix_rate(device)
    print(f"{'size':12} {'fused':8} {'cohort':>8} {'peer':>8} {'ratio':>7}   client steps a second")
    for name in arguments.sizes:
        size = settings["sizes"][name]
        peer = measure_peer(settings, size, device, arguments.repeats)
        results["sizes"][name] = {"peer": peer, "cohort": {}}
        for fuse in arguments.fuse:
            ours = measure_cohort(settings, size, device, arguments.repeats, fuse)
            ours["ratio"] = ours["client_steps_a_second"] / peer["client_steps_a_second"]
            results["sizes"][name]["cohort"][fuse] = ours
            rates = f"{ours['client_steps_a_second']:8.1f} {peer['client_steps_a_second']:8.1f}"
            print(f"{name:12} {fuse:8} {rates} {ours['ratio']:7.1f}", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
