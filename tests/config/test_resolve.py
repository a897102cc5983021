import pytest

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.errors import ConfigError

CPU = MachineFacts("cpu", 1, bf16_is_native=False)
HOPPER = MachineFacts("cuda", 2, bf16_is_native=True)
TURING = MachineFacts("cuda", 1, bf16_is_native=False)


def test_tiny_has_its_own_defaults() -> None:
    config = resolve(RunConfig(), CPU)
    assert config.model.init == "random"
    assert config.data.sequence_length == 128
    assert config.optimizer.batch_size == 8
    assert config.optimizer.learning_rate == 1e-3
    assert config.schedule.epochs == 1.0


def test_everything_else_is_fine_tuned_from_pretrained_weights() -> None:
    config = resolve(merge(RunConfig(), {"model": "125m"}), CPU)
    assert config.model.init == "pretrained"
    assert config.data.sequence_length == 1024
    assert config.optimizer.learning_rate == 5e-5


@pytest.mark.parametrize(("machine", "precision"), [(CPU, "fp32"), (HOPPER, "bf16"), (TURING, "fp16")])
def test_precision_follows_the_machine(machine: MachineFacts, precision: str) -> None:
    assert resolve(RunConfig(), machine).plugin.precision == precision


def test_what_is_given_stays() -> None:
    given = {"learning_rate": 0.0, "sequence_length": 64, "batch_size": 3, "precision": "fp32", "steps": 5}
    config = resolve(merge(RunConfig(), given), HOPPER)
    assert config.optimizer.learning_rate == 0.0
    assert config.data.sequence_length == 64
    assert config.plugin.precision == "fp32"
    assert (config.schedule.steps, config.schedule.epochs) == (5, None)


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        ({"gpus": 3}, HOPPER, "--gpus 3 asks for more than this machine has: 2 GPUs"),
        ({"mem_cap": 4.0}, CPU, "--mem-cap bounds a GPU's memory"),
        ({"init": "pretrained"}, CPU, "tiny has no pretrained weights"),
        ({"precision": "bf16"}, TURING, "bf16 is not native on this GPU"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], machine: MachineFacts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(merge(RunConfig(), options), machine)
