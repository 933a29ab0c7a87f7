"""The notebook, executed from top to bottom on a run small enough to train in a minute.

Its SLAKE and VQA-RAD cells do their work where SLAKE_ROOT and VQA_RAD_ROOT are set, and say that
they are left out where not.
"""

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "tools" / "rg_jax_colab.ipynb"
SMALL = {
    "RG_JAX_STEPS": "12",
    "RG_JAX_SLICES": "96",
    "RG_JAX_TEST_SLICES": "8",
    "RG_JAX_SLAKE_STEPS": "4",
    "RG_JAX_LIMIT": "4",
}


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs_and_says_what_it_is():
    cells = notebook().cells
    assert all(not c.outputs and c.execution_count is None for c in cells if c.cell_type == "code")
    (parameters,) = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    assert parameters is next(c for c in cells if c.cell_type == "code")
    assert all(name in parameters.source for name in SMALL)
    assert "Not a medical device" in cells[0].source
    nbformat.validate(notebook())


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The cells after execution, and the folder that they wrote to."""
    work = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RG_JAX_")]:
            patch.delenv(name)
        for name, value in SMALL.items():
            patch.setenv(name, value)
        patch.setenv("RG_JAX_WORK", str(work))
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        eight = "--xla_force_host_platform_device_count=8"
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(eight, ""))  # as a user has
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
        patch.setenv("IPYTHONDIR", str(work / "ipython"))
        made = notebook()
        client = nbclient.NotebookClient(
            made,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(work)}},
        )
        client.execute()  # an error in any cell ends here, with that cell's traceback
    return made.cells, work


def said(cells) -> str:
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def data_of(cells, kind: str) -> list[str]:
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_it_ends_with_figures_pictures_and_a_page(executed):
    cells, work = executed
    assert all(c.execution_count for c in cells if c.cell_type == "code")
    run = work / "runs" / "phantom"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["set"]["n"] == int(SMALL["RG_JAX_LIMIT"])
    tables = [text for text in data_of(cells, "text/markdown") if "95 % interval" in text]
    assert tables and "| G-IoU |" in tables[0]
    assert len(data_of(cells, "image/png")) >= 2
    frames = [text for text in data_of(cells, "text/html") if "<iframe srcdoc=" in text]
    assert frames and "Samples, worst to best" in frames[0]
    assert str(run / "index.html") in said(cells)


def test_public_sets_are_used_where_they_are_and_named_where_not(executed):
    cells, work = executed
    for variable, name in (("SLAKE_ROOT", "SLAKE"), ("VQA_RAD_ROOT", "VQA-RAD")):
        left_out = f"{name} is left out: set" in said(cells)
        assert left_out == (not os.environ.get(variable))
    if os.environ.get("SLAKE_ROOT"):
        assert (work / "runs" / "slake" / "metrics.json").exists()
        assert len(data_of(cells, "text/html")) >= 2
    if os.environ.get("SLAKE_ROOT") and os.environ.get("VQA_RAD_ROOT"):
        folders = {path.name for path in (work / "runs" / "slake" / "eval").iterdir()}
        assert any("vqa_rad" in name for name in folders)
