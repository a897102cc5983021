"""The notebook runs from top to bottom, at a tiny size."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "opt.ipynb"


def test_it_runs_from_top_to_bottom(tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_NOTEBOOK_OUTPUT", str(tmp_path / "run"))
    flags = f"--steps 4 --sequence-length 32 --batch-size 2 --model tiny --cache {cache_folder}"
    monkeypatch.setenv("ALBIREO_NOTEBOOK_FLAGS", flags)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "step    4   evaluation loss" in text
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbformat.validate(notebook)
