from dataclasses import replace

import pytest

from albireo.cli.features import Feature, Findings, list_features
from albireo.device.probe import GpuFacts, MachineFacts
from albireo.distributed.probe import AllReduceCheck

LAPTOP = MachineFacts(
    system="Linux",
    python="3.12.1",
    processor="a processor",
    logical_cores=8,
    usable_cores=4,
    threads=4,
    torch="2.13.0+cpu",
    transformers="5.20.0",
    datasets=None,
    triton=None,
    cuda=None,
    driver=None,
    nccl=None,
    has_gloo=True,
    compiler=None,
)
SERVER = replace(
    LAPTOP, torch="2.13.0", datasets="5.0.0", peft="0.20.0", triton="3.6.0", cuda="13.0", driver="580.1", nccl="2.29.0"
)
GPU = GpuFacts(0, "H200", 2**37, 2**37, "9.0", has_native_bf16=True)
GLOO = AllReduceCheck("gloo", 2, ok=True, why="", start_seconds=2.0, bytes_per_second=1e9)
NCCL = replace(GLOO, backend="nccl")
CPU_STEPS = {("cpu", kind): None for kind in ("fp32", "bf16", "fp16")}
ALL_STEPS = {**CPU_STEPS, **{("cuda", kind): None for kind in ("fp32", "bf16", "fp16")}}
ON_LAPTOP = Findings(LAPTOP, no_gpu_reason="there is no driver", steps=CPU_STEPS, all_reduces=[GLOO])
ON_SERVER = Findings(SERVER, gpus=[GPU, replace(GPU, index=1)], steps=ALL_STEPS, all_reduces=[GLOO, NCCL])


def features(found: Findings) -> dict[str, Feature]:
    listed = list_features(found)
    assert all(feature.why for feature in listed if feature.status != "ok"), "a no without a reason"
    return {feature.name: feature for feature in listed}


def test_a_laptop_trains_and_what_it_lacks_is_no_fault() -> None:
    statuses = {name: feature.status for name, feature in features(ON_LAPTOP).items()}
    assert statuses == {
        "train on the CPU": "ok",
        "train on a GPU": "missing",
        "bf16": "ok",
        "fp16": "ok",
        "several ranks": "ok",
        "several GPUs": "missing",
        "--compile": "missing",
        "models": "ok",
        "adapters": "missing",
        "data sets of the hub": "missing",
        "hub reachable": "skipped",
    }


def test_all_of_it_works_on_a_server() -> None:
    assert {feature.status for feature in features(replace(ON_SERVER, hub_problem="")).values()} == {"ok"}


@pytest.mark.parametrize(
    ("found", "name", "status", "said"),
    [
        (
            replace(ON_LAPTOP, steps={**CPU_STEPS, ("cpu", "fp32"): "no kernel"}),
            "train on the CPU",
            "failed",
            "no kernel",
        ),
        (
            replace(ON_SERVER, steps={**ALL_STEPS, ("cuda", "fp32"): "CUDA error"}),
            "train on a GPU",
            "failed",
            "CUDA error",
        ),
        (replace(ON_SERVER, steps={**ALL_STEPS, ("cuda", "bf16"): "no such"}), "bf16", "failed", "no such"),
        (replace(ON_SERVER, gpus=[replace(GPU, has_native_bf16=False)]), "bf16", "missing", "--precision fp16"),
        (
            replace(ON_LAPTOP, all_reduces=[replace(GLOO, ok=False, why="refused")]),
            "several ranks",
            "failed",
            "refused",
        ),
        (
            replace(ON_LAPTOP, machine=replace(LAPTOP, has_gloo=False), all_reduces=[]),
            "several ranks",
            "failed",
            "without gloo",
        ),
        (
            replace(ON_SERVER, all_reduces=[GLOO, replace(NCCL, ok=False, why="no peer")]),
            "several GPUs",
            "failed",
            "no peer",
        ),
        (replace(ON_SERVER, gpus=[GPU], all_reduces=[GLOO, NCCL]), "several GPUs", "missing", "NCCL 2.29.0 works"),
        # One GPU whose NCCL does not even work alone is a fault.
        (
            replace(ON_SERVER, gpus=[GPU], all_reduces=[GLOO, replace(NCCL, ok=False, why="bad")]),
            "several GPUs",
            "failed",
            "bad",
        ),
        (replace(ON_SERVER, all_reduces=[GLOO]), "several GPUs", "failed", "without NCCL"),
        (replace(ON_SERVER, machine=replace(SERVER, triton=None)), "--compile", "missing", "pip install triton"),
        (replace(ON_LAPTOP, machine=replace(LAPTOP, compiler="/usr/bin/g++")), "--compile", "ok", "/usr/bin/g++"),
        (replace(ON_LAPTOP, machine=replace(LAPTOP, transformers=None)), "models", "failed", "pip install"),
        (replace(ON_LAPTOP, hub_problem="no route"), "hub reachable", "missing", "no route"),
        (replace(ON_LAPTOP, problems=["host copy: out of memory"]), "measuring", "failed", "host copy: out of memory"),
        (replace(ON_LAPTOP, rates={("cpu", "fp32"): 4.0, ("cpu", "fp16"): 2.0}), "fp16", "ok", "2.0 times slower"),
        (replace(ON_LAPTOP, rates={("cpu", "fp32"): 2.0, ("cpu", "bf16"): 5.0}), "bf16", "ok", "2.5 times as fast"),
    ],
)
def test_each_finding_has_its_word(found: Findings, name: str, status: str, said: str) -> None:
    feature = features(found)[name]
    assert feature.status == status
    assert said in feature.why
