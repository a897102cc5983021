"""What the process of one case does, and its ranks if it has several."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from albireo.bench.case import Case, CaseResult
from albireo.bench.ours import measure_albireo, plan_albireo
from albireo.bench.reference_inputs import reference_inputs
from albireo.bench.references import REFERENCES
from albireo.bench.timing import time_steps
from albireo.config import RunConfig, config_from_mapping, config_to_mapping
from albireo.device import apply_device_cap
from albireo.distributed import World, join_world, launch_ranks, process_group
from albireo.errors import AlbireoError, OutOfMemoryError
from albireo.models import FAMILIES, configure_model, resolve_model
from albireo.training.memory_needs import is_out_of_memory
from albireo.training.run_folder import RunFolder

__all__ = ["main", "measure_in_rank", "run_case"]

_RESULT = "result.json"


def main(folder: Path) -> None:
    """Read the case, measure it, and leave the result.

    Args:
        folder: has `case.json`, and gets `result.json`.
    """
    result = run_case(Case.from_mapping(json.loads((folder / "case.json").read_text())))
    (folder / _RESULT).write_text(json.dumps(dataclasses.asdict(result)))


def run_case(case: Case) -> CaseResult:
    """Measure a case in this process, or in one for each of its ranks.

    Args:
        case: what to measure.

    Returns:
        What it came to; running out of memory is a result.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="albireo-bench-") as name:
            folder = Path(name)
            run = plan_albireo(case, folder) if case.ours is not None else None
            if case.gpus == 1:
                return _measure(case, run, join_world(single=True))
            payload = {"case": case.mapping(), "result": str(folder / _RESULT)}
            if run is not None:
                payload |= {"config": config_to_mapping(run[0]), "folder": str(run[1].path.resolve())}
            launch_ranks("albireo.bench.worker:measure_in_rank", payload, case.gpus)
            values = json.loads((folder / _RESULT).read_text())
            return CaseResult(**{**values, "case": case})
    except AlbireoError as error:
        # Its one line is the reason; the last line of a traceback would put the class's name before it.
        return CaseResult(case, "out_of_memory" if isinstance(error, OutOfMemoryError) else "failed", error=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            return CaseResult(case, "out_of_memory", error=str(error).splitlines()[0])
        raise


def measure_in_rank(world: World, payload: Mapping[str, Any]) -> None:
    """Measure on one of several ranks; the main one leaves the result.

    Args:
        world: the ranks.
        payload: the case, the file that gets the result, and of ours the configuration and the folder of the run.

    Raises:
        OutOfMemoryError: there was too little memory on this rank.
    """
    case = Case.from_mapping(payload["case"])
    run = None
    if "config" in payload:
        config = config_from_mapping(payload["config"], where="the bench", base=RunConfig.of(case.recipe))
        run = config, RunFolder.open(Path(payload["folder"]))
    try:
        result = _measure(case, run, world)
    except Exception as error:
        if isinstance(error, AlbireoError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(str(error).splitlines()[0]) from error
    if world.is_main:
        Path(payload["result"]).write_text(json.dumps(dataclasses.asdict(result)))


def _measure(case: Case, run: tuple[RunConfig, RunFolder] | None, world: World) -> CaseResult:
    # Fp32 products in TF32 or not: the same for every system, since it is this process's own setting.
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    torch.backends.cudnn.allow_tf32 = case.tf32
    result = _measure_reference(case, world) if run is None else measure_albireo(case, *run, world)
    return dataclasses.replace(result, model_tflops=_model_tflops(case, result))


def _model_tflops(case: Case, result: CaseResult) -> float | None:
    """Return what the model's products come to; None for adapters, which skip some of them."""
    if case.adapter != "none" or result.tokens_per_second is None:
        return None
    choice = resolve_model(case.model, FAMILIES[case.recipe])
    config, _ = configure_model(choice, init="random", sequence_length=case.sequence_length)
    return 6 * choice.family.count_parameters(config) * result.tokens_per_second / case.gpus / 1e12


def _measure_reference(case: Case, world: World) -> CaseResult:
    if case.mem_cap > 0 and world.device.type == "cuda":
        apply_device_cap(world.device, int(case.mem_cap * 2**30))
    model, inputs = reference_inputs(case, world)
    with process_group(world), REFERENCES[case.system](case, model, inputs) as step:
        return time_steps(case, world, step)
