"""ViT on one GPU: samples a second and memory by plugin and batch, beside plain PyTorch; and what the loader gives.

    python benchmarks/vit.py --model base --batch-sizes 8,32,64,128 --output rows.json \
        plain torch_ddp plain:fp16 torch_ddp_fp16 fsdp2:bf16 torch_fsdp:bf16 low_level_zero:bf16 gemini:bf16
    python benchmarks/vit.py --loader pictures/

Each row is a process of its own: SYSTEM or SYSTEM:PRECISION. `plain` is a loop by hand (autocast in fp16 and bf16, with a
loss scale in fp16), `fsdp2` torch's own sharding, others are our plugins. Random weights, noise for pictures that lies on
the device already, activation checkpointing everywhere, AdamW, clipping at 1. `--loader` measures how many pictures a
second a folder gives in this process: a core's worth.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GB = 2**30
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
_PRECISIONS = {"plain": "fp32", "torch_ddp": "fp32", "torch_ddp_fp16": "fp16"}


def main() -> None:
    """Measure rows, and print each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="SYSTEM, or SYSTEM:PRECISION")
    parser.add_argument("--model", default="base")
    parser.add_argument("--batch-sizes", default="8,32,64,128")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--timeout-seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path, help="where rows go as JSON")
    parser.add_argument("--loader", help="a folder of pictures, whose loading is measured instead")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _run_child(json.loads(arguments.child))
        return
    if arguments.loader is not None:
        _measure_loader(arguments.loader)
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
    system, _, precision = row.partition(":")
    with tempfile.TemporaryDirectory(prefix="albireo-vit-") as folder:
        wanted = {
            "row": row, "system": system, "precision": precision or _PRECISIONS.get(system, "bf16"),
            "batch_size": batch_size, "model": arguments.model, "steps": arguments.steps, "warmup": arguments.warmup,
            "folder": folder,
        }  # fmt: skip
        child = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(wanted)], env=_ENVIRONMENT)
        try:
            child.wait(timeout=arguments.timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        result = Path(folder) / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {"error": f"exit code {child.returncode}"}
    return {**{key: value for key, value in wanted.items() if key != "folder"}, **found}


def _line(row: dict[str, Any]) -> str:
    begin = f"ROW batch {row['batch_size']} {row['row']} ({row['precision']}):"
    if "error" in row:
        return f"{begin} {row['error']}"
    return (
        f"{begin} {row['samples_per_second']:.1f} samples/s; GB {row['device_peak_bytes'] / _GB:.2f} allocated, "
        f"{row['device_reserved_peak_bytes'] / _GB:.2f} reserved; loss {row['first_loss']:.3f} to {row['last_loss']:.3f}"
    )


def _run_child(wanted: dict[str, Any]) -> None:
    from albireo.errors import AlbireoError

    try:
        result = _measured(wanted)
    except AlbireoError as error:
        result = {"error": str(error)}
    (Path(wanted["folder"]) / "result.json").write_text(json.dumps(result))


def _measured(wanted: dict[str, Any]) -> dict[str, Any]:
    import torch

    from albireo.distributed import join_world
    from albireo.training.assemble import open_session
    from albireo.training.plan import plan_run
    from albireo.training.start import resolved_config

    is_ours = wanted["system"] not in ("plain", "fsdp2")
    options = {
        "model": wanted["model"], "init": "random", "data": "random", "augment": False, "workers": 0,
        "batch_size": wanted["batch_size"], "steps": wanted["steps"] + wanted["warmup"], "eval_every": 0, "save_every": 0,
        "checkpointing": True, "warmup": 0.0, "clip": 1.0, "seed": 42,
        "plugin": wanted["system"] if is_ours else "torch_ddp",
        "precision": wanted["precision"] if is_ours else "fp32",
    }  # fmt: skip
    plan = plan_run(recipe="vit", options=options, output=Path(wanted["folder"]) / "run")
    folder = plan.make_folder()
    world = join_world(single=True, always_group=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with open_session(resolved_config(plan), folder, world) as session:
        batches = []
        for (batch,) in session.batches():
            batches.append(batch.to(world.device))
            if len(batches) == 4:
                break
        if is_ours:

            def step(number: int) -> Any:
                batch = batches[number % len(batches)]
                session.begin_step()
                output = session.booster.train_step(
                    session.model, session.optimizer, [session.recipe.inputs(batch)], [batch.tokens],
                    lr_scheduler=session.scheduler, max_norm=1.0,
                )  # fmt: skip
                return output.loss
        else:
            model = session.model.unwrap()
            session.optimizer.unwrap().state.clear()
            inputs = [session.recipe.inputs(batch) for batch in batches]
            step = _by_hand(wanted, model, inputs, world)
        return _timed(wanted, step, world.device)


def _by_hand(wanted: dict[str, Any], model: Any, inputs: list[dict[str, Any]], world: Any) -> Callable[[int], Any]:
    import torch

    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(wanted["precision"])
    device = world.device
    if wanted["system"] == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        from albireo.models import VIT

        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
        for _, block in VIT.blocks(model.pretrained):
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        narrow = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=narrow == torch.float16)

    def step(number: int) -> Any:
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            loss_sum, _ = model(**inputs[number % len(inputs)])
        loss = loss_sum / wanted["batch_size"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _timed(wanted: dict[str, Any], step: Callable[[int], Any], device: Any) -> dict[str, Any]:
    import torch
    import transformers

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = [], []
    for number in range(wanted["warmup"] + wanted["steps"]):
        start = time.perf_counter()
        loss = step(number)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    median = statistics.median(seconds[wanted["warmup"] :])
    return {
        "step_seconds": median,
        "samples_per_second": wanted["batch_size"] / median,
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        "device_reserved_peak_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else 0,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "device": torch.cuda.get_device_name(0) if on_gpu else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _measure_loader(folder: str) -> None:
    from albireo.data import PictureForm, open_pictures, prepare_pictures

    source = open_pictures(folder, seed=0)
    made = prepare_pictures(
        source, PictureForm(224, 224), holdout_share=0.1, augment=True, max_damaged=0.05, seed=0, cache_folder=None,
        progress=lambda _done, _total: None,
    )  # fmt: skip
    for place in range(20):
        made.train[place]
    start = time.perf_counter()
    count = min(len(made.train), 300)
    for place in range(count):
        made.train[place]
    print(f"LOADER {count / (time.perf_counter() - start):.0f} pictures/s from disk on one core, 224 x 224, augmented")


if __name__ == "__main__":
    main()
