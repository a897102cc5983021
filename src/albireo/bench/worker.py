"""What the process of one case does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from albireo.bench.case import Case, CaseResult
from albireo.bench.ours import measure_albireo
from albireo.bench.reference_inputs import reference_inputs
from albireo.bench.references import REFERENCES
from albireo.bench.timing import time_steps
from albireo.device import apply_device_cap, select_device
from albireo.errors import AlbireoError, OutOfMemoryError
from albireo.models import FAMILIES, configure_model, resolve_model
from albireo.training.memory_needs import is_out_of_memory

__all__ = ["main", "run_case"]


def run_case(case: Case) -> CaseResult:
    """Measure a case in this process.

    Args:
        case: what to measure.

    Returns:
        What it came to; running out of memory is a result.
    """
    # Fp32 products in TF32 or not: the same for every system, since it is this process's own setting.
    torch.backends.cuda.matmul.allow_tf32 = case.tf32
    torch.backends.cudnn.allow_tf32 = case.tf32
    try:
        result = measure_albireo(case) if case.ours is not None else _measure_reference(case)
        return dataclasses.replace(result, model_tflops=_model_tflops(case, result))
    except AlbireoError as error:
        # Its one line is the reason; the last line of a traceback would put the class's name before it.
        return CaseResult(case, "out_of_memory" if isinstance(error, OutOfMemoryError) else "failed", error=str(error))
    except Exception as error:
        if is_out_of_memory(error):
            return CaseResult(case, "out_of_memory", error=str(error).splitlines()[0])
        raise


def _model_tflops(case: Case, result: CaseResult) -> float | None:
    """Return what the model's products come to; None for adapters, which skip some of them."""
    if case.adapter != "none" or result.tokens_per_second is None:
        return None
    choice = resolve_model(case.model, FAMILIES[case.recipe])
    config, _ = configure_model(choice, init="random", sequence_length=case.sequence_length)
    return 6 * choice.family.count_parameters(config) * result.tokens_per_second / 1e12


def _measure_reference(case: Case) -> CaseResult:
    device = select_device(0)
    if case.mem_cap > 0 and device.type == "cuda":
        apply_device_cap(device, int(case.mem_cap * 2**30))
    model, inputs = reference_inputs(case, device)
    with REFERENCES[case.system](case, model, inputs) as step:
        return time_steps(case, device, step)


def main(folder: Path) -> None:
    """Read the case, measure it, and leave the result.

    Args:
        folder: has `case.json`, and gets `result.json`.
    """
    case = Case.from_mapping(json.loads((folder / "case.json").read_text()))
    result = run_case(case)
    values = dataclasses.asdict(result)
    (folder / "result.json").write_text(json.dumps(values))
