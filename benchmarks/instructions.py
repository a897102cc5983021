"""GPT-2 on instructions, whole, with LoRA and over quantised bases: ours beside peft, bitsandbytes and DDP by hand.

    python benchmarks/instructions.py --base BASE --data alpaca_data.json --batch-sizes 4,16 --steps 40 --output rows.json \
        plain:none plain:lora plain:qlora8 plain:qlora4 gemini:none gemini:lora gemini:qlora8 gemini:qlora4

BASE is a Hugging Face folder of a GPT-2 with its tokenizer. Each row is a process of its own, SYSTEM:ADAPTER[:PRECISION]:
`plain` is a loop as a careful user of peft writes it, with DDP over one rank (fp32 unless told; bitsandbytes' layers for
qlora8 and qlora4), any other system is one of our plugins (bf16 unless told). All take the same batches in the same order,
AdamW, and clip to a norm of 1. Before training and after it the loss of the held-out records is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_GB = 2**30
# As `albireo train` sets it where nobody else has.
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}


def main() -> None:
    """Measure rows, and print each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="SYSTEM:ADAPTER, or SYSTEM:ADAPTER:PRECISION")
    parser.add_argument("--base", help="a Hugging Face folder of a GPT-2")
    parser.add_argument("--data", help="records with instruction, input and output")
    parser.add_argument("--batch-sizes", default="4,16")
    parser.add_argument("--sequence-length", type=int, default=512, help="the most tokens of a sample")
    parser.add_argument("--steps", type=int, default=40, help="all of them; the first 5 are not timed")
    parser.add_argument("--learning-rate", type=float, help="default: 5e-5 for all of the model, 3e-4 for an adapter")
    parser.add_argument("--timeout-seconds", type=float, default=180.0)
    parser.add_argument("--output", type=Path, help="where rows go as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _run_child(json.loads(arguments.child))
        return
    done = []
    for size in (int(word) for word in arguments.batch_sizes.split(",")):
        for row in arguments.rows:
            done.append(_measure(row, size, arguments))
            print(_line(done[-1]), flush=True)
            # After each row: a run that is cut off keeps what it had.
            if arguments.output is not None:
                arguments.output.write_text(json.dumps({"command": sys.argv, "rows": done}, indent=1) + "\n")


def _measure(row: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    system, adapter, *precision = row.split(":")
    with tempfile.TemporaryDirectory(prefix="albireo-instructions-") as folder:
        wanted = {
            "row": row, "system": system, "adapter": adapter, "batch_size": batch_size,
            "precision": precision[0] if precision else "fp32" if system == "plain" else "bf16",
            "base": arguments.base, "data": arguments.data, "sequence_length": arguments.sequence_length,
            "steps": arguments.steps, "folder": folder,
            "learning_rate": arguments.learning_rate or (5e-5 if adapter == "none" else 3e-4),
        }  # fmt: skip
        child = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(wanted)], env=_ENVIRONMENT)
        try:
            child.wait(timeout=arguments.timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        result = Path(folder) / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {"error": f"exit code {child.returncode}"}
    return {**{key: value for key, value in wanted.items() if key not in ("folder", "base", "data")}, **found}


def _line(row: dict[str, Any]) -> str:
    begin = f"ROW batch {row['batch_size']} {row['row']} ({row['precision']}):"
    if "error" in row:
        return f"{begin} {row['error']}"
    memory = ", ".join(
        f"{when} {row[f'{when}_bytes'] / _GB:.3f} / {row[f'{when}_reserved_bytes'] / _GB:.3f}"
        for when in ("before", "after", "peak")
    )
    return (
        f"{begin} {row['steps_per_second']:.2f} it/s; GB allocated / reserved: {memory}; held-out loss "
        f"{row['loss_before']:.4f} to {row['loss_after']:.4f}; saved {row['saved_bytes'] / 2**20:.2f} MB; "
        f"{row['trained']:,} trained"
    )


def _run_child(wanted: dict[str, Any]) -> None:
    from albireo.errors import AlbireoError

    try:
        result = _plain(wanted) if wanted["system"] == "plain" else _ours(wanted)
    except (AlbireoError, ImportError) as error:
        result = {"error": str(error)}
    (Path(wanted["folder"]) / "result.json").write_text(json.dumps(result))


def _config(wanted: dict[str, Any], **more: Any) -> tuple[Any, Any, Any]:
    """Return the configuration of a run, its folder and its world."""
    from albireo.distributed import join_world
    from albireo.training.plan import plan_run
    from albireo.training.start import resolved_config

    options = {
        "model": wanted["base"], "data": wanted["data"], "sequence_length": wanted["sequence_length"],
        "batch_size": wanted["batch_size"], "steps": wanted["steps"], "learning_rate": wanted["learning_rate"],
        "warmup": 0.1, "weight_decay": 0.01, "clip": 1.0, "dropout": 0.0, "eval_every": 0, "save_every": 0, "seed": 42,
        **more,
    }  # fmt: skip
    plan = plan_run(recipe="gpt2", options=options, output=Path(wanted["folder"]) / "run")
    folder = plan.make_folder()
    world = join_world(single=True, always_group=True)
    return resolved_config(plan), folder, world


def _ours(wanted: dict[str, Any]) -> dict[str, Any]:
    import torch

    from albireo.training.assemble import open_session
    from albireo.training.exporting import export_trained
    from albireo.training.loop import train_loop
    from albireo.training.metrics import read_metrics

    config, folder, world = _config(
        wanted, adapter=wanted["adapter"], plugin=wanted["system"], precision=wanted["precision"]
    )
    with open_session(config, folder, world) as session:

        def held_out() -> float:
            batches = session.data.evaluation(16, world, pin=False)
            return float(session.recipe.evaluate(session.model, batches, world))

        before = held_out()
        memory = _Memory(world.device)
        train_loop(session)
        memory.end()
        after = held_out()
        pretrained = session.state.model.unwrap().pretrained
        export_trained(session.state, pretrained, session.data, folder, None, session.files)
        trained = session.trained_parameters
    rows, _ = read_metrics(folder.metrics_path)
    saved = folder.adapter_path if wanted["adapter"] != "none" else folder.model_path
    torch.cuda.empty_cache()
    return _result(memory, [row.step_seconds for row in rows], before, after, saved, trained)


def _plain(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what a loop in plain PyTorch and peft comes to."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from albireo.data import BatchLayout
    from albireo.training.progress import Progress
    from albireo.training.recipes import recipe_of

    config, _, world = _config(wanted, adapter="none")
    device = world.device
    recipe = recipe_of("gpt2")
    planned = recipe.plan(config).fetched(config)
    with ExitStack() as stack:
        data = recipe.load_data(config, planned, stack.enter_context(Progress(enabled=False)))
    model = _plain_model(wanted, device)
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=wanted["learning_rate"], weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear(wanted["steps"]))
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(wanted["precision"])

    def loss_of(batch: Any, call: Callable[..., Any]) -> Any:
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            return call(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss

    def held_out() -> float:
        model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in data.evaluation(16, world, pin=False):
                total += float(loss_of(batch.to(device), model)) * batch.tokens
                count += batch.tokens
        model.train()
        return total / count

    before = held_out()
    memory = _Memory(device)
    seconds = []
    layout = BatchLayout(batch_size=wanted["batch_size"], accumulate=1, rank=0, world_size=1)
    for (batch,) in _steps(data, layout, wanted["steps"], pin=device.type == "cuda"):
        _wait(device)
        start = time.perf_counter()
        loss_of(batch.to(device, non_blocking=True), wrapped).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    memory.end()
    after = held_out()
    saved = Path(wanted["folder"]) / "saved"
    model.save_pretrained(saved)
    return _result(memory, seconds, before, after, saved, sum(p.numel() for p in trained))


def _plain_model(wanted: dict[str, Any], device: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    adapter, more = wanted["adapter"], {}
    if adapter.startswith("qlora"):
        import bitsandbytes  # noqa: F401  a missing one is said here
        from transformers import BitsAndBytesConfig

        computes = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(wanted["precision"], torch.float32)
        more["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if adapter == "qlora8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)
        )
        more["device_map"] = {"": device}
    model = AutoModelForCausalLM.from_pretrained(
        wanted["base"], dtype=torch.float32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **more
    )
    if adapter == "none":
        return model.to(device).train()
    import peft

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    made = peft.get_peft_model(model, lora)
    return (made if more else made.to(device)).train()


def _steps(data: Any, layout: Any, steps: int, *, pin: bool) -> Iterator[list[Any]]:
    loader: Iterable[Any] = data.steps(layout, seed=42, steps=steps, pin=pin)
    for micro_batches in loader:
        yield list(micro_batches)


def _linear(steps: int) -> Callable[[int], float]:
    warmup = max(1, -(-steps // 10))
    return lambda step: (step + 1) / warmup if step < warmup else max(0.0, (steps - step) / (steps - warmup))


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Memory:
    """What torch's allocator holds on the device: now, at the end and at the peak between."""

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self.values: dict[str, int] = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self._note("before")

    def end(self) -> None:
        self._note("after")

    def _note(self, when: str) -> None:
        import torch

        on_gpu = self._device.type == "cuda"
        self.values[f"{when}_bytes"] = torch.cuda.memory_allocated(self._device) if on_gpu else 0
        self.values[f"{when}_reserved_bytes"] = torch.cuda.memory_reserved(self._device) if on_gpu else 0
        self.values["peak_bytes"] = torch.cuda.max_memory_allocated(self._device) if on_gpu else 0
        self.values["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device) if on_gpu else 0


def _result(
    memory: _Memory, seconds: list[float], before: float, after: float, saved: Path, trained: int
) -> dict[str, Any]:
    import torch
    import transformers

    timed = seconds[5:] or seconds
    return {
        **memory.values,
        "loss_before": before,
        "loss_after": after,
        "step_seconds": statistics.median(timed),
        "steps_per_second": 1 / statistics.median(timed),
        "saved_bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors")),
        "trained": trained,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
