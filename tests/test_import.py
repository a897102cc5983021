"""Importing the package changes nothing, and is quick."""

import subprocess
import sys

PROGRAM = """
import os, sys, threading
before = dict(os.environ)
import albireo
import albireo.cli.main
assert dict(os.environ) == before, "an environment variable changed"
assert threading.active_count() == 1, "a thread was started"
heavy = {"torch", "transformers", "datasets", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, f"imported for nothing: {heavy}"
"""

TORCH_PROGRAM = """
import os, sys, threading
import torch, transformers
from transformers import PreTrainedModel  # transformers' own import sets a variable
state = torch.get_rng_state()
settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)
before, threads = dict(os.environ), threading.active_count()
import albireo.training.start, albireo.bench.report, albireo.booster
assert torch.equal(torch.get_rng_state(), state), "the random state moved"
assert settings == (torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)
changed = {key for key in os.environ if os.environ[key] != before.get(key)}
assert not changed, f"environment variables changed: {changed}"
assert threading.active_count() == threads, "a thread was started"
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_nothing_heavy_and_changes_nothing() -> None:
    run(PROGRAM)


def test_importing_everything_changes_nothing() -> None:
    run(TORCH_PROGRAM)


NAMES_PROGRAM = """
import sys
import albireo
assert set(albireo.__all__) <= set(dir(albireo))
try:
    albireo.no_such_name
except AttributeError as error:
    assert "no attribute 'no_such_name'" in str(error)
else:
    raise AssertionError("a name that is not there was found")
assert "torch" not in sys.modules
for name in albireo.__all__:
    found = getattr(albireo, name)
    assert name == "__version__" or (callable(found) and found.__name__ == name), (name, found)
# A module of the same name as a function must not hide it, whatever was imported first.
import albireo.distributed.launch
from albireo import launch
assert callable(launch)
assert "transformers" not in sys.modules, "a script of one's own pays for what it does not use"
"""


def test_the_names_of_the_package_are_there_when_they_are_asked_for() -> None:
    run(NAMES_PROGRAM)
