from __future__ import annotations

import copy
import io
import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
)

import albireo
from albireo.errors import ConfigError, ModelError
from albireo.models import LazyInitContext, lazy_source_of
from albireo.models.recording import Recording


class Zoo(nn.Module):
    """What people build models of, and do in constructors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 20)
        self.batch_norm = nn.BatchNorm2d(5)
        self.layer_norm = nn.LayerNorm(7)
        self.embedding = nn.Embedding(11, 4, padding_idx=2)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.lstm = nn.LSTM(4, 5, bidirectional=True)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.scales = nn.ParameterList([nn.Parameter(torch.full((3,), 0.1 * number)) for number in range(3)])
        self.table = nn.ParameterDict({"a": nn.Parameter(torch.randn(3, 4) * 0.02)})
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.transposed = nn.Parameter(torch.randn(5, 3).t())
        self.tail = nn.Parameter(torch.arange(12.0)[5:])
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_buffer("positions", torch.arange(12))
        self.register_buffer("rotary", 1 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)
        self.numbers = self.linear.bias.detach().numpy().copy()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]


class Initialised(Zoo):
    """As nanoGPT does it: one rule for all, and exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("linear2.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks.layers)))
        nn.init.trunc_normal_(self.convolution.weight, std=0.1)
        nn.init.eye_(self.table["a"])
        nn.init.orthogonal_(self.lstm.weight_hh_l0)
        with torch.no_grad():
            self.batch_norm.weight[1:3] = 0.25
            self.linear.weight[self.linear.weight > 0.2] = 0.2
            self.kept = self.linear.weight[self.linear.weight > 0].detach()
            self.layer_norm.weight.add_(torch.randn(7)).mul_(self.layer_norm.weight.norm())
            self.linear.bias.copy_(self.linear.weight.sum(dim=1))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


class Reparametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.weight = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))


def seen(build: Callable[[], nn.Module], seed: int = 1024) -> nn.Module:
    """Build with memory, and with the draws of the lazy context."""
    with Recording(seed):
        return build()


def lazily(build: Callable[[], nn.Module], seed: int = 1024) -> nn.Module:
    with LazyInitContext(seed=seed):
        return build()


def value(model: nn.Module, parameter: nn.Parameter, dtype: torch.dtype = torch.float32) -> Tensor:
    source = lazy_source_of(model)
    assert source is not None
    out = torch.full((parameter.numel(),), math.nan, dtype=dtype)
    source.fill(parameter, 0, out)
    return out.view(parameter.shape)


def assert_begins_as(model: nn.Module, eager: nn.Module) -> None:
    wanted = dict(eager.named_parameters(remove_duplicate=False))
    source = lazy_source_of(model)
    assert source is not None
    found = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in found] == list(wanted)
    random.Random(0).shuffle(found)
    for name, parameter in found:
        assert parameter.is_meta, name
        assert (parameter.dtype, parameter.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert parameter.requires_grad == wanted[name].requires_grad, name
        out = torch.full((parameter.numel(),), math.nan)
        cut = parameter.numel() // 3
        source.fill(parameter, cut, out[cut:])
        source.fill(parameter, 0, out[:cut])
        assert torch.equal(out.view(parameter.shape), wanted[name].float()), name
    buffers = dict(eager.named_buffers())
    assert [name for name, _ in model.named_buffers()] == list(buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("build", [Zoo, Initialised, Reparametrised])
def test_each_parameter_alone_is_what_the_constructors_make_of_all(build: Callable[[], nn.Module]) -> None:
    assert_begins_as(lazily(build), seen(build))


def test_values_are_those_that_modules_of_torch_begin_with() -> None:
    zoo = lazily(Zoo)
    assert value(zoo, zoo.batch_norm.weight).eq(1).all()
    assert value(zoo, zoo.layer_norm.bias).eq(0).all()
    assert value(zoo, zoo.temperature).tolist() == 0.5
    assert value(zoo, zoo.tail).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert value(zoo, zoo.scales[2]).tolist() == pytest.approx([0.2] * 3)
    bound = 1 / math.sqrt(10)
    weight = value(zoo, zoo.linear.weight)
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    embedding = value(zoo, zoo.embedding.weight)
    assert zoo.head.weight is zoo.embedding.weight
    assert len(embedding.unique()) == 41  # the padding row is zero: the head took the embedding's weight
    assert zoo.rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


def test_buffers_are_real_at_once() -> None:
    zoo = lazily(Zoo)
    assert zoo.positions.tolist() == list(range(12))
    assert torch.equal(zoo.rotary, 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
    assert zoo.batch_norm.running_var.tolist() == [1.0] * 5
    assert int(zoo.batch_norm.num_batches_tracked) == 0


def _causal(config: PreTrainedConfig, **options: object) -> Callable[[], nn.Module]:
    return lambda: AutoModelForCausalLM.from_config(config, **options)


SMALL = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT_SMALL = OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=12, word_embed_proj_dim=16)
LLAMA_SMALL = LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=2)
VIT_SMALL = ViTConfig(**SMALL, intermediate_size=32, image_size=16, patch_size=8)


@pytest.mark.parametrize(
    "build",
    [
        _causal(OPT_SMALL),
        _causal(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=12)),
        _causal(LLAMA_SMALL),
        _causal(LLAMA_SMALL, dtype=torch.bfloat16),
        lambda: ViTForImageClassification(VIT_SMALL),
    ],
)
def test_models_of_transformers_begin_by_their_own_rules(build: Callable[[], nn.Module]) -> None:
    model, eager = lazily(build), seen(build)
    assert_begins_as(model, eager)
    assert [name for name, buffer in model.named_buffers() if buffer.is_meta] == []


def test_transformers_on_its_own_meta_device_has_real_buffers() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(LLAMA_SMALL)

    model, eager = lazily(build), AutoModelForCausalLM.from_config(LLAMA_SMALL)
    buffers = dict(eager.named_buffers())
    assert len(buffers) > 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_draws_depend_on_the_seed_and_not_on_the_global_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = lazily(Zoo)
    assert_begins_as(first, seen(Zoo))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = lazily(Zoo)
    other = lazily(Zoo, seed=1)
    wanted = value(first, first.linear.weight)
    assert torch.equal(value(second, second.linear.weight), wanted)
    assert not torch.equal(value(other, other.linear.weight), wanted)
    assert not torch.equal(value(first, first.head.weight).flatten()[:20], wanted.flatten()[:20])


def test_a_generator_of_the_users_is_not_looked_at() -> None:
    class Model(nn.Module):
        def __init__(self, generator: torch.Generator) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(9, generator=generator)) for _ in range(2))
            nn.init.normal_(self.second, generator=generator)

    models = [lazily(lambda seed=seed: Model(torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    assert torch.equal(value(models[0], models[0].second), value(models[1], models[1].second))
    assert not torch.equal(value(models[0], models[0].first), value(models[0], models[0].second))


MEMORY_PROGRAM = """
import resource, torch
from torch import nn
from albireo import LazyInitContext
from albireo.models import lazy_source_of
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with LazyInitContext():
    model = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(20)])  # 8 GB
source = lazy_source_of(model)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_building_takes_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # kB


def test_a_parameter_under_two_names_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = nn.Parameter(torch.empty(3))
            self.one = own
            self.two = own
            self.register_parameter("three", self.one)
            nn.init.constant_(own, 7.0)  # the one with memory, which the module no longer has

    model = lazily(Twice)
    assert model.one is model.two
    assert model.one is model.three
    assert value(model, model.one).tolist() == [7.0] * 3


def test_deep_copies_begin_alike_until_they_are_changed() -> None:
    def build() -> nn.Module:
        first = nn.Linear(3, 3)
        second = copy.deepcopy(first)
        nn.init.zeros_(second.bias)
        return nn.Sequential(first, second)

    model = lazily(build)
    assert torch.equal(value(model, model[0].weight), value(model, model[1].weight))
    assert value(model, model[0].bias).any()
    assert not value(model, model[1].bias).any()


def test_frozen_parameters_and_attributes_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.marked = nn.Parameter(torch.ones(3))
            self.marked.is_special = True
            late = nn.Parameter(torch.ones(3))
            late.is_special = True
            self.late = late

    model = lazily(Model)
    assert (model.frozen.requires_grad, model.marked.requires_grad) == (False, True)
    assert model.marked.is_special
    assert model.late.is_special


def test_parameters_of_whole_numbers_and_of_other_classes_keep_their_memory() -> None:
    class Special(nn.Parameter):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
            self.special = Special(torch.ones(3))
            self.later = nn.LazyLinear(3)
            self.weight = nn.Parameter(torch.ones(2))

    model = lazily(Model)
    assert model.codes.tolist() == [0, 1, 2, 3]
    assert model.special.tolist() == [1.0] * 3
    assert isinstance(model.later.weight, nn.parameter.UninitializedParameter)
    assert model.weight.is_meta


@pytest.mark.parametrize("within", [True, False])
def test_a_model_may_be_cast(within: bool) -> None:
    with LazyInitContext():
        model = nn.Sequential(nn.Linear(30, 30), nn.LayerNorm(30))
        if within:
            model.to(torch.bfloat16)
    if not within:
        model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    wanted = seen(lambda: nn.Linear(30, 30)).weight
    assert torch.equal(value(model, model[0].weight, torch.bfloat16), wanted.bfloat16())
    # After the context, the numbers of before the cast are still known.
    assert torch.equal(value(model, model[0].weight), wanted.bfloat16().float() if within else wanted)


def test_the_default_dtype_that_was_there_is_the_one_that_counts() -> None:
    def build() -> nn.Module:
        torch.set_default_dtype(torch.bfloat16)
        try:
            module = nn.Linear(30, 30)
            module.extra = nn.Parameter(torch.rand(5) + torch.arange(5) / 3)
            return module
        finally:
            torch.set_default_dtype(torch.float32)

    assert_begins_as(lazily(build), seen(build))


def test_tensors_from_outside_are_read_when_they_are_needed() -> None:
    table = torch.arange(6.0).view(2, 3)

    def build() -> nn.Module:
        embedding = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        with torch.no_grad():
            embedding.weight[0] *= 2
        linear = nn.Linear(3, 2)
        linear.load_state_dict({"weight": table, "bias": torch.tensor([1.0, 2.0])})
        return nn.Sequential(embedding, linear)

    model = lazily(build)
    assert value(model, model[0].weight).tolist() == [[0, 2, 4], [3, 4, 5]]
    assert value(model, model[1].weight).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert value(model, model[1].bias).tolist() == [1, 2]
    assert table.tolist() == [[0, 1, 2], [3, 4, 5]]
    table[1, 1] = 9
    with pytest.raises(ModelError, match="has changed since: leave it as it is until the model is boosted"):
        value(model, model[1].weight)


def test_a_tensor_from_outside_that_is_written_to_within() -> None:
    def build() -> nn.Module:
        noise = torch.from_numpy(torch.ones(4).numpy())
        first = nn.Parameter(noise.clone())
        noise.mul_(3)
        module = nn.Module()
        module.first, module.second = first, nn.Parameter(noise)
        return module

    assert_begins_as(lazily(build), seen(build))


def test_a_parameter_that_nothing_gives_a_value_is_named() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

    with LazyInitContext():
        model = nn.Sequential(nn.Linear(3, 3), Forgetful())
    with pytest.raises(ModelError, match=r"the parameter 1\.weight of a Forgetful never gets a value: give it one"):
        lazy_source_of(model)
    with LazyInitContext():
        skipped = nn.utils.skip_init(nn.Linear, 3, 3)
    with pytest.raises(ModelError, match=r"the parameter weight of a Linear never gets a value"):
        lazy_source_of(skipped)


def test_a_parameter_that_was_copied_afterwards_is_named() -> None:
    with LazyInitContext():
        model = nn.Sequential(nn.Linear(3, 3))
    model.append(copy.deepcopy(model[0]))
    with pytest.raises(ModelError, match=r"nothing says how the parameter 1\.weight begins: .* copy .* within"):
        lazy_source_of(model)


def test_parameters_that_are_added_afterwards_are_their_own_source() -> None:
    with LazyInitContext():
        model = nn.Sequential(nn.Linear(3, 3))
    model.append(nn.Linear(3, 3))
    assert torch.equal(value(model, model[1].weight), model[1].weight)
    assert value(model, model[0].weight).any()


def test_models_that_wait_for_nothing_have_no_source() -> None:
    assert lazy_source_of(nn.Linear(3, 3)) is None
    assert lazy_source_of(nn.Linear(3, 3, device="meta")) is None
    assert lazy_source_of(nn.ReLU()) is None


def test_what_a_parameter_does_not_have_is_refused() -> None:
    with LazyInitContext():
        model = nn.Linear(3, 3)
    source = lazy_source_of(model)
    assert source is not None
    with pytest.raises(ConfigError, match="a parameter of 9 elements cannot fill a tensor of shape"):
        source.fill(model.weight, 8, torch.empty(2))
    with pytest.raises(ConfigError, match=r"a parameter of shape \(3,\) is none of the lazily built model's"):
        source.fill(nn.Parameter(torch.empty(3)), 0, torch.empty(3))
    source.close()


def test_a_parameter_is_itself_after_it_has_got_memory() -> None:
    with LazyInitContext():
        model = nn.Linear(3, 3)
    wanted = value(model, model.weight)
    source = lazy_source_of(model)
    assert source is not None
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.empty(3, 3)))
    out = torch.empty(9)
    source.fill(model.weight, 0, out)
    assert torch.equal(out.view(3, 3), wanted)


def test_within_the_context_parameters_look_as_if_they_had_memory() -> None:
    """torch.nn.init.trunc_normal_, for one, does nothing to a tensor on the meta device."""
    with LazyInitContext():
        model = nn.Linear(3, 3)
        assert not model.weight.is_meta
        assert model.weight.is_cpu
        assert (model.weight * 2).device == torch.device("cpu")
        numbers = model.weight.detach().numpy().copy()
        assert model.weight.tolist() == numbers.tolist()
        assert bool((model.weight.abs() < 1).all())
    assert model.weight.is_meta
    assert torch.equal(value(model, model.weight), torch.from_numpy(numbers))


def test_a_name_of_ones_own_for_a_parameter_sees_what_is_done_to_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = nn.Parameter(torch.ones(3))
            self.weight = own
            nn.init.constant_(self.weight, 2.0)
            self.register_buffer("doubled", own.detach() * 2)
            self.factor = float(own.detach().sum())

    model = lazily(Model)
    assert model.factor == 6.0
    assert model.doubled.tolist() == [4.0] * 3


def test_a_lazily_built_model_can_be_pickled() -> None:
    file = io.BytesIO()
    with LazyInitContext():
        model = nn.Linear(3, 3)
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.weight.is_meta
    assert lazy_source_of(loaded) is None


def test_the_context_leaves_nothing_behind() -> None:
    with pytest.raises(RuntimeError, match="as it happens"), LazyInitContext():
        raise RuntimeError("as it happens")
    assert not nn.Linear(3, 3).weight.is_meta
    context = albireo.LazyInitContext()
    with context:
        model = nn.Linear(3, 3)
    assert model.weight.is_meta
    with pytest.raises(ConfigError, match="entered once"), context:
        pass
    assert not nn.Linear(3, 3).weight.is_meta


def test_one_model_in_another_context_keeps_its_origin() -> None:
    with LazyInitContext(seed=1):
        first = nn.Linear(3, 3)
    with LazyInitContext(seed=2):
        second = nn.Linear(3, 3)
        second.weight = first.weight
    assert torch.equal(value(second, second.weight), value(first, first.weight))
    assert not torch.equal(value(second, second.bias), value(first, first.bias))


def test_everything_but_parameters_is_on_the_default_device() -> None:
    with LazyInitContext(default_device="meta"):
        numbers = torch.arange(3)
        model = nn.Linear(3, 3)
    assert numbers.is_meta
    assert torch.equal(value(model, model.weight), seen(lambda: nn.Linear(3, 3)).weight)


def _rescale(target: Tensor, other: Tensor) -> Tensor:
    return target.mul_(0.5 if other.norm().item() > 1 else 2.0)


def _write_part(target: Tensor, other: Tensor) -> Tensor:
    target[3:7] = other[1:5].clone()
    return target


def _draw_part(target: Tensor, _other: Tensor) -> Tensor:
    target[::2].uniform_()
    return target


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda target, _other: target.normal_(),
    "draw part": _draw_part,
    "zero": lambda target, _other: target.zero_(),
    "copy": lambda target, other: target.copy_(other),
    "add": lambda target, other: target.add_(other, alpha=0.5),
    "write part": _write_part,
    "clone": lambda _target, other: other.clone(),
    "double": lambda _target, other: (other.double() * 2).float(),
    "rand": lambda _target, _other: torch.rand(3, 4).t().reshape(-1),
    "rescale": _rescale,
    "alias": lambda _target, other: other.view(3, 4).view(-1),
    "transpose": lambda _target, other: other.view(3, 4).t().reshape(-1),
    "sort": lambda _target, other: other[other.argsort()],
}


def run_steps(steps: list[tuple[str, int, int]], away: dict[int, int]) -> list[Tensor]:
    """Do steps to four tensors, some of which are sent away before a step; return what they are in the end."""
    with Recording(7) as recording:
        tensors = [torch.full((12,), float(number)) for number in range(4)]
        for number, (step, one, two) in enumerate(steps):
            if number in away and not recording.has_away(tensors[away[number]]):
                tensors[away[number]] = recording.send_away(tensors[away[number]])
            tensors[one] = STEPS[step](tensors[one], tensors[two])
        return [recording.values_of(tensor) if recording.has_away(tensor) else tensor.clone() for tensor in tensors]


@settings(max_examples=400, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), max_size=14),
    away=st.dictionaries(st.integers(0, 13), st.integers(0, 3), max_size=4),
)
def test_whatever_is_done_a_tensor_that_was_away_has_the_same_values(
    steps: list[tuple[str, int, int]], away: dict[int, int]
) -> None:
    for one, two in zip(run_steps(steps, away), run_steps(steps, {}), strict=True):
        assert not one.is_meta
        assert torch.equal(one, two)
