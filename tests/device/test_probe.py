from pathlib import Path

import pytest
import torch

from albireo.device.probe import probe_gpus, probe_machine, reason_for_no_gpu


def test_the_machine_that_runs_this_is_described() -> None:
    machine = probe_machine()
    assert machine.torch == torch.__version__
    assert machine.threads == torch.get_num_threads()
    assert 1 <= machine.usable_cores <= machine.logical_cores
    assert machine.has_gloo
    assert machine.transformers is not None
    assert machine.transformers.startswith("5.")


def test_the_drivers_version_is_read_where_its_module_says_it(tmp_path: Path) -> None:
    assert probe_machine(tmp_path).driver is None
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    # The two forms that drivers of the last years have.
    for text, version in (
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@U22)",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023", "535.54.03"),
    ):
        (folder / "version").write_text(text + "\nGCC version:  gcc version 12.3.0\n")
        assert probe_machine(tmp_path).driver == version


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_there_is_no_gpu_is_said(tmp_path: Path) -> None:
    assert probe_gpus() == []
    machine = probe_machine(tmp_path)
    assert reason_for_no_gpu(machine) == "there is no NVIDIA driver on this machine"
