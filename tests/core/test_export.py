"""Exported equals masked, for every network and scope; and what a folder of an export must be."""

import copy
import json
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from psap_core.allocation import filter_floors
from psap_core.cost import macs, macs_cost_model
from psap_core.errors import InputError
from psap_core.exported import (
    export,
    export_error,
    export_onnx,
    load_exported,
    read_plans,
    read_spec,
    save_exported,
)
from psap_core.files import sealed, sha256, unsealed
from psap_core.groups import Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import PrunePlan, make_plan
from psap_core.suspension import apply_
from tests.core.networks import (
    NETWORKS,
    SCOPES,
    SMALL_NETWORKS,
    SMALL_NETWORKS_AND_SCOPES,
    Small,
    by_topology,
    draw_filters,
    randomise_,
    sgd,
    small_example,
    train_,
)


def masked_network(name: str, scope: Scope, choose) -> tuple[nn.Module, PrunePlan]:
    """A network after training steps (real BatchNorm statistics) with the filters that `choose` names silenced."""
    torch.manual_seed(0)
    make, side, *_ = NETWORKS[name]
    model = make()
    train_(model, sgd(model), side, steps=2, classes=10, batch=4)
    example = torch.zeros(1, 3, side, side)
    groups = find_groups(model, example, scope=scope)
    pruned = {group.name: choose(group.filters) for group in groups}
    cost = macs_cost_model(model, groups, example)
    plan = make_plan(groups, pruned, cost, describe(example), scope)
    apply_(model, groups, plan)
    return model, plan


def odd_widths(filters: int) -> list[int]:
    draw = random.Random(filters)
    kept = min(filters, 2 * draw.randrange(filters // 2) + 1)
    return sorted(draw.sample(range(filters), filters - kept))


def at_min_filters(filters: int) -> list[int]:
    return random.Random(filters).sample(range(filters), filters - filter_floors([filters])[0])


@pytest.mark.parametrize(
    "scope", ["coupled", *(pytest.param(s, marks=pytest.mark.long) for s in ("all", "inner"))]
)
@pytest.mark.parametrize("name", by_topology())
def test_exported_equals_masked(name: str, scope: Scope) -> None:
    model, plan = masked_network(name, scope, odd_widths)
    small = export(model, plan)
    assert export_error(model, small, plan) <= 1e-9
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *(("cifar_resnet20", scope) for scope in SCOPES),
        pytest.param("mobilenet_v2", "coupled", marks=pytest.mark.long),
    ],
)
def test_exported_equals_masked_at_min_filters(name: str, scope: Scope) -> None:
    model, plan = masked_network(name, scope, at_min_filters)
    assert export_error(model, export(model, plan), plan) <= 1e-9
    assert all(part.kept == filter_floors([part.filters])[0] for part in plan.layers)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_exported_equals_masked_whatever_silences(network: str, scope: Scope, seed: int) -> None:
    """30 % of every group; random weights, affines, biases and statistics; float64, by hand."""
    torch.manual_seed(seed)
    model = SMALL_NETWORKS[network]()
    randomise_(model, seed)
    groups = find_groups(model, small_example(), scope=scope)
    cost = macs_cost_model(model, groups, small_example())
    filters = draw_filters(groups, seed=seed)
    plan = make_plan(groups, filters, cost, describe(small_example()), scope)
    dense = copy.deepcopy(model)
    apply_(model, groups, plan)
    small = export(model, plan)
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        of_dense, of_masked, of_small = (
            net.eval().double()(images) for net in (dense, model, small)
        )
    assert (of_small - of_masked).abs().max() <= 1e-12 * of_masked.abs().max()
    assert (of_dense - of_masked).abs().max() > 1e-3 * of_masked.abs().max()
    assert macs(small.float(), small_example()) == plan.macs < plan.dense_macs


def small_masked(
    scope: Scope = "all", make: type[nn.Module] = Small
) -> tuple[nn.Module, PrunePlan]:
    torch.manual_seed(0)
    model = make()
    train_(model, sgd(model), side=8, steps=3)
    pruned = {"stem": [0, 4], "inner": [1, 2, 7], "expand": [0, 9], "project": [3], "last": [2]}
    groups = find_groups(model, small_example(), scope=scope)
    cost = macs_cost_model(model, groups, small_example())
    pruned = {group.name: pruned.get(group.name, []) for group in groups}
    plan = make_plan(groups, pruned, cost, describe(small_example()), scope)
    apply_(model, groups, plan)
    return model, plan


def another_plan(model: nn.Module, pruned: dict[str, list[int]]) -> PrunePlan:
    """Of the network that is given, in scope `all`."""
    groups = find_groups(model, small_example(), scope="all")
    cost = macs_cost_model(model, groups, small_example())
    return make_plan(groups, pruned, cost, describe(small_example()), "all")


@pytest.mark.parametrize(
    ("scope", "stem", "outer"),
    [("coupled", 4, (4, 5)), ("all", 4, (6, 5)), ("inner", 6, (6, 5))],
)
def test_an_exported_network_trains_on(scope: Scope, stem: int, outer: tuple[int, int]) -> None:
    model, plan = small_masked(scope)
    small = export(model, plan).train()
    shapes = {name: p.shape for name, p in small.named_parameters()}
    assert shapes["stem.weight"] == (stem, 3, 3, 3)
    assert shapes["outer.weight"] == (*outer, 3, 3)
    assert shapes["depthwise.weight"] == (8, 1, 3, 3)
    assert shapes["linear.weight"] == (3, 16)
    assert small.depthwise.groups == small.depthwise_bn.num_features == 8
    before = small.linear.weight.clone()
    train_(small, sgd(small), side=8, steps=1)
    assert not torch.equal(before, small.linear.weight)
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_a_coupled_export_is_made_of_the_same_classes() -> None:
    model, plan = small_masked("coupled")
    theirs = [(name, type(module)) for name, module in export(model, plan).named_modules()]
    assert theirs == [(name, type(module)) for name, module in model.named_modules()]


def test_export_refuses_a_model_whose_filters_are_not_silent() -> None:
    model, plan = small_masked()
    with torch.no_grad():
        model.inner_bn.bias[2] = 0.1
    with pytest.raises(InputError, match="apply_"):
        export(model, plan)


def test_a_network_that_returns_zeros_is_exported() -> None:
    model, plan = small_masked()
    *_, classifier = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    assert macs(export(model, plan), small_example()) == plan.macs


def test_what_is_not_finite_is_not_exact() -> None:
    model, plan = small_masked()
    small = export(model, plan)
    ours, theirs = ([*network.parameters()][-1] for network in (model, small))  # of the classifier
    with torch.no_grad():
        theirs[0] = float("nan")
        assert export_error(model, small, plan) == float("inf")
        ours[0] = float("nan")
        with pytest.raises(InputError, match="or its output is not finite"):
            export(model, plan)
        ours[0] = theirs[0] = float("-inf")  # of a mask, for example
        assert export_error(model, small, plan) < 1e-12


def test_the_constant_of_a_residual_filter_with_zero_weights_stays(tmp_path) -> None:
    """What a method leaves that zeroes weights alone, a second pruning of the exported network included."""
    model, plan = small_masked()
    with torch.no_grad():
        for norm, f in ((model.stem_bn, 0), (model.stem_bn, 4), (model.project_bn, 3)):
            norm.weight[f], norm.bias[f] = 0.7, 0.1 + f
    small = export(model, plan)
    assert export_error(model, small, plan) <= 1e-9
    save_exported(tmp_path, small, plan)
    assert export_error(model, load_exported(tmp_path, Small()), plan) <= 1e-9

    again = another_plan(small, {"stem": [1]})
    with torch.no_grad():
        small.stem.weight[1] = 0.0
    smaller = export(small, again)
    assert export_error(small, smaller, again) <= 1e-9
    save_exported(tmp_path, smaller, [plan, again])
    assert read_plans(tmp_path) == [plan, again]
    assert export_error(small, load_exported(tmp_path, Small()), again) <= 1e-9


def test_export_refuses_a_plan_of_another_network() -> None:
    _, plan = small_masked()
    other = NETWORKS["cifar_resnet20"][0]()
    with pytest.raises(
        InputError, match="the plan is of another network: no layer 'stem' with 6 filters"
    ):
        export(other, plan)


def test_the_model_itself_is_untouched() -> None:
    model, plan = small_masked()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


LOAD = """
import sys, torch
from psap_core import load_exported
from tests.core.networks import Small
torch.manual_seed(99)
small = load_exported(sys.argv[1], Small()).eval()
images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
print(small(images).double().flatten().tolist())
"""


@pytest.mark.long
def test_a_fresh_process_loads_the_same_network(tmp_path) -> None:
    model, plan = small_masked()
    small = export(model, plan).eval()
    save_exported(tmp_path, small, plan, {"note": "kept"})
    assert read_spec(tmp_path)["note"] == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spec.json", "weights.safetensors"]
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    printed = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == small(images).double().flatten().tolist()


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_a_folder_gives_the_same_network_back(network: str, scope: Scope, tmp_path) -> None:
    model = SMALL_NETWORKS[network]()
    randomise_(model)
    groups = find_groups(model, small_example(), scope=scope)
    cost = macs_cost_model(model, groups, small_example())
    plan = make_plan(groups, draw_filters(groups), cost, describe(small_example()), scope)
    apply_(model, groups, plan)
    small = export(model, plan)
    save_exported(tmp_path, small, plan)
    loaded = load_exported(tmp_path, SMALL_NETWORKS[network]())
    assert read_plans(tmp_path) == [plan]
    assert str(loaded) == str(small)
    expected = small.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())


class Versioned(Small):
    """A class that asks for its version when weights are loaded, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *others) -> None:
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, local_metadata, *others)


def test_a_class_that_asks_for_its_version_is_loaded(tmp_path) -> None:
    model, plan = small_masked(make=Versioned)
    save_exported(tmp_path, export(model, plan), plan)
    assert isinstance(load_exported(tmp_path, Versioned()), Versioned)


class SinglePrecisionHead(Small):
    """Computes its last layer in float32, whatever the rest is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().softmax(1)


def test_what_is_computed_in_float32_is_compared_in_float32() -> None:
    model, plan = small_masked(make=SinglePrecisionHead)
    small = export(model, plan)
    assert export_error(model, small, plan) < 1e-6
    with torch.no_grad():
        next(small.parameters()).mul_(1.1)
    assert export_error(model, small, plan) > 1e-4


def write_spec(folder, spec) -> None:
    (folder / "spec.json").write_text(json.dumps(sealed(spec)))


def test_a_spec_that_does_not_match_its_weights(tmp_path) -> None:
    model, plan = small_masked()
    save_exported(tmp_path, export(model, plan), plan)
    other = another_plan(model, {"inner": [0]})
    spec = read_spec(tmp_path)
    spec["plans"] = [json.loads(other.to_json())]
    write_spec(tmp_path, spec)
    with pytest.raises(InputError, match=r"does not match its spec\.json"):
        load_exported(tmp_path, Small())
    spec["plans"][0]["layers"][1]["pruned"] = [0, 1]
    write_spec(tmp_path, spec)
    with pytest.raises(InputError, match="the pruning plan was edited or damaged"):
        load_exported(tmp_path, Small())


def test_every_field_of_a_spec_is_under_its_seal(tmp_path) -> None:
    model, plan = small_masked()
    save_exported(tmp_path, export(model, plan), plan, {"note": {"of": [1, 2.5, None, True]}})
    text = (tmp_path / "spec.json").read_text()
    spec = json.loads(text)
    load_exported(tmp_path, Small())

    def changed(value):
        """Every value that differs in one place."""
        if isinstance(value, dict):
            for key, part in value.items():
                yield {other: each for other, each in value.items() if other != key}
                for other in changed(part):
                    yield {**value, key: other}
        elif isinstance(value, list):
            for index, part in enumerate(value):
                for other in changed(part):
                    yield [*value[:index], other, *value[index + 1 :]]
        else:
            yield [value]

    every = list(changed(spec))
    assert len(every) > 60
    for other in every:
        (tmp_path / "spec.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"spec\.json"):
            load_exported(tmp_path, Small())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensor: tensor.to(torch.int32), "holds torch.int32, the network has torch.float32"),
        (lambda tensor: torch.full_like(tensor, torch.nan), "holds values that are not finite"),
        (lambda tensor: torch.full_like(tensor, torch.inf), "holds values that are not finite"),
    ],
)
def test_tensors_that_no_network_has_are_refused(change, sentence, tmp_path) -> None:
    model, plan = small_masked()
    save_exported(tmp_path, export(model, plan), plan)
    path = tmp_path / "weights.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    data = safetensors.torch.save({**tensors, "linear.bias": change(tensors["linear.bias"])})
    path.write_bytes(data)
    write_spec(tmp_path, read_spec(tmp_path) | {"weights_sha256": sha256(data)})
    with pytest.raises(InputError, match=f"linear.bias {sentence}"):
        load_exported(tmp_path, Small())


def test_what_can_be_saved_can_be_loaded(tmp_path) -> None:
    """A mask holds infinities; a parameter must not."""
    model, plan = small_masked()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    dense = Small()
    dense.register_buffer("mask", torch.zeros(2))
    small = export(model, plan)
    save_exported(tmp_path / "a", small, plan)
    assert load_exported(tmp_path / "a", dense).mask[1] == -torch.inf
    nn.init.constant_(small.linear.bias, torch.inf)
    with pytest.raises(
        InputError, match=r"linear\.bias holds values that are not finite: the train"
    ):
        save_exported(tmp_path / "b", small, plan)
    assert not (tmp_path / "b").exists()


def test_weights_of_another_plan_with_the_same_widths(tmp_path) -> None:
    model, plan = small_masked()
    small = export(model, plan)
    other = another_plan(model, plan.pruned | {"stem": [1, 5]})
    save_exported(tmp_path / "a", small, plan)
    save_exported(tmp_path / "b", small, other)
    (tmp_path / "b" / "spec.json").replace(tmp_path / "a" / "spec.json")
    with pytest.raises(InputError, match="it is not what spec"):
        load_exported(tmp_path / "a", Small())


def test_folders_that_hold_no_export(tmp_path) -> None:
    model, plan = small_masked()
    with pytest.raises(InputError, match="holds no exported network"):
        load_exported(tmp_path, Small())
    save_exported(tmp_path, export(model, plan), plan)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        load_exported(tmp_path, Small())
    weights.unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        load_exported(tmp_path, Small())
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(InputError, match="is not a spec"):
        load_exported(tmp_path, Small())


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path) -> None:
    model, plan = small_masked()
    small = export(model, plan)
    save_exported(tmp_path, small, plan)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.ones_(small.linear.bias)
    with pytest.raises(InputError, match="extra must hold JSON values"):
        save_exported(tmp_path, small, plan, {"loss": torch.zeros(1)})
    with pytest.raises(InputError, match="none was given"):
        save_exported(tmp_path, small, [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("inputs", [None, {}, {"shape": [1], "dtype": "none", "low": 0, "high": 0}])
def test_a_plan_whose_inputs_are_damaged(inputs, tmp_path) -> None:
    model, plan = small_masked()
    save_exported(tmp_path, export(model, plan), plan)
    spec = read_spec(tmp_path)
    spec["plans"][0] = sealed(unsealed(spec["plans"][0]) | {"inputs": inputs})
    write_spec(tmp_path, spec)
    with pytest.raises(InputError, match=r"plan was edited or damaged: .*input"):
        load_exported(tmp_path, Small())


def test_a_plan_of_what_is_small_already_or_wrapped() -> None:
    model, plan = small_masked()
    small = export(model, plan)
    with pytest.raises(InputError, match="cut already, nothing is left to export"):
        export(small, plan)
    with pytest.raises(InputError, match="if the network is wrapped, give the bare one"):
        export(nn.DataParallel(model), plan)


@pytest.mark.long
def test_onnx_computes_the_same_for_any_batch_size(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, plan = small_masked()
    small = export(model, plan).eval()
    export_onnx(small, tmp_path / "small.onnx", plan)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), small(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("cifar_resnet20_projection", "coupled"),
        ("mobilenet_v2", "coupled"),
        *(
            pytest.param(name, scope, marks=pytest.mark.long)
            for name, scope in [
                ("cifar_resnet20_projection", "inner"),
                ("resnet50", "inner"),
                ("resnet50", "coupled"),
                ("mobilenet_v2", "inner"),
                ("vgg16_bn", "coupled"),
                ("vgg16_bn", "inner"),
            ]
        ),
    ],
)
def test_plain_exports_agree_with_torch_pruning(name: str, scope: Scope) -> None:
    """Where nothing is scattered; our groups need not be told to Torch-Pruning, which finds its own."""
    torch_pruning = pytest.importorskip("torch_pruning")
    model, plan = masked_network(name, scope, odd_widths)
    ours = export(model, plan)
    side = NETWORKS[name][1]
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=torch.zeros(1, 3, side, side)
    )
    for part in plan.layers:
        layer = model.get_submodule(part.name)
        if part.pruned:
            prune = torch_pruning.prune_conv_out_channels
            if isinstance(layer, nn.Linear):
                prune = torch_pruning.prune_linear_out_channels
            graph.get_pruning_group(layer, prune, idxs=list(part.pruned)).prune()
    theirs = dict(model.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[parameter_name]), parameter_name
