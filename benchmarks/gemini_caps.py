"""Gemini under caps: seconds a step, memory as torch and as the driver count it, and the loss, beside FSDP2.

    python benchmarks/gemini_caps.py --model 2.7b --batch-size 16 --precision bf16 --steps 10 \
        fsdp2 torch_fsdp_offload gemini gemini:mem_cap=17 gemini:mem_cap=17,clip=0 gemini:offload_optim_frac=1.0

Each row is a process of its own: `fsdp2` and the plugins as `albireo bench` knows them, or one of ours with more options
of `albireo train` behind a colon. Random tokens, random weights, activation checkpointing. While a row runs, the driver is
asked ten times a second what the device's processes take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_GB = 2**30
# As `albireo train` sets it where nobody else has.
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}


def main() -> None:
    """Measure rows, and print each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="system, or system:option=value,option=value")
    parser.add_argument("--model", default="125m")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--timeout-seconds", type=float, default=300.0)
    parser.add_argument("--output", type=Path, help="where rows go as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        _run_child(json.loads(arguments.child))
        return
    done = []
    for row in arguments.rows:
        done.append(_measure(row, arguments))
        print(_line(done[-1]), flush=True)
        # After each row: a run that is cut off keeps what it had.
        if arguments.output is not None:
            arguments.output.write_text(json.dumps({"command": sys.argv, "rows": done}, indent=1) + "\n")


def _measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    system, _, text = row.partition(":")
    options = {key: _value(value) for key, value in (part.split("=") for part in text.split(",") if part)}
    with tempfile.TemporaryDirectory(prefix="albireo-caps-") as folder:
        wanted = {
            "row": row, "system": system, "options": options, "model": arguments.model,
            "batch_size": arguments.batch_size, "precision": arguments.precision, "steps": arguments.steps,
            "warmup": arguments.warmup, "sequence_length": arguments.sequence_length, "folder": folder,
        }  # fmt: skip
        child = subprocess.Popen([sys.executable, __file__, "--child", json.dumps(wanted)], env=_ENVIRONMENT)
        driver = _DriverPeak()
        try:
            child.wait(timeout=arguments.timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        peak = driver.stop()
        result = Path(folder) / "result.json"
        found = json.loads(result.read_text()) if result.exists() else {"error": f"exit code {child.returncode}"}
    return {**{key: value for key, value in wanted.items() if key != "folder"}, "driver_peak_bytes": peak, **found}


def _run_child(wanted: dict[str, Any]) -> None:
    from albireo.bench.case import OURS
    from albireo.errors import AlbireoError

    try:
        result = _ours(wanted) if wanted["system"] in OURS else _reference(wanted)
    except AlbireoError as error:
        result = {"error": str(error), "cause": str(error.__cause__)}
        print(result["cause"], flush=True)
    (Path(wanted["folder"]) / "result.json").write_text(json.dumps(result))


def _reference(wanted: dict[str, Any]) -> dict[str, Any]:
    from albireo.bench.case import Case
    from albireo.bench.worker import run_case

    names = ("system", "model", "batch_size", "precision", "steps", "warmup", "sequence_length")
    result = run_case(Case(**{name: wanted[name] for name in names}))
    return {
        "error": result.error, "step_seconds": result.step_seconds, "device_peak_bytes": result.device_peak_bytes,
        "reserved_peak_bytes": result.device_reserved_peak_bytes, "host_peak_bytes": result.host_peak_bytes,
        "losses": [result.first_loss, result.last_loss], "versions": result.versions,
    }  # fmt: skip


def _ours(wanted: dict[str, Any]) -> dict[str, Any]:
    import torch

    from albireo.bench.case import OURS
    from albireo.bench.timing import versions
    from albireo.distributed import join_world
    from albireo.training.metrics import read_metrics
    from albireo.training.plan import plan_run
    from albireo.training.start import resolved_config, train_on_rank

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    options = {
        "model": wanted["model"], "init": "random", "data": "random", "precision": wanted["precision"],
        "batch_size": wanted["batch_size"], "sequence_length": wanted["sequence_length"], "checkpointing": True,
        "steps": wanted["warmup"] + wanted["steps"], "eval_every": 0, "save_every": 0,
        **OURS[wanted["system"]], **wanted["options"],
    }  # fmt: skip
    began = time.perf_counter()
    plan = plan_run(recipe="opt", options=options, output=Path(wanted["folder"]) / "run")
    folder = plan.make_folder()
    world = join_world(single=True)
    peaks = train_on_rank(resolved_config(plan), folder, world, export_model=False)
    rows, _ = read_metrics(folder.metrics_path)
    return {
        "step_seconds": statistics.median(row.step_seconds for row in rows[wanted["warmup"] :]),
        "all_seconds": [round(row.step_seconds, 4) for row in rows],
        "device_peak_bytes": peaks.device_peak_bytes,
        "reserved_peak_bytes": peaks.device_reserved_peak_bytes,
        "host_peak_bytes": peaks.host_peak_bytes,
        "losses": [row.loss for row in rows],
        "grad_norms": [row.grad_norm for row in rows],
        "total_seconds": time.perf_counter() - began,
        "versions": versions(world.device),
    }


class _DriverPeak:
    """Asks the driver, on a thread, how much of the device is taken."""

    def __init__(self) -> None:
        self._peak: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int | None:
        """Return the most that was taken, less what was taken at the beginning; None if there is nobody to ask."""
        self._over.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            before = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        except Exception:  # noqa: BLE001  no driver to ask
            return
        while not self._over.wait(0.1):
            self._peak = max(self._peak or 0, pynvml.nvmlDeviceGetMemoryInfo(handle).used - before)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _line(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"ROW {row['row']}: {row['error']}"
    sizes = {name: (row.get(f"{name}_peak_bytes") or 0) / _GB for name in ("device", "reserved", "driver", "host")}
    memory = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
    losses = row["losses"]
    return (
        f"ROW {row['row']}: {row['step_seconds']:.4f} s a step; GB: {memory}; loss {losses[0]:.5f} to {losses[-1]:.5f}; "
        f"first steps {row.get('all_seconds', [])[:3]}, in all {row.get('total_seconds', 0):.0f} s"
    )


if __name__ == "__main__":
    main()
