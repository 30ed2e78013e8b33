"""Training steps: the captured and the compiled ones train as the eager ones do, whatever a pruning step changes."""

import json

import pytest
import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import data, models, train
from experiments.data import tensor_images
from experiments.data.base import Normalisation, Sharing
from experiments.methods.fpgm import FPGM
from experiments.methods.one_shot import OneShot
from experiments.methods.psap import PSAPCallback
from experiments.schema import DataConfig, Fan, Fast, ResNetConfig, Shortcut
from experiments.training.distributed import World
from experiments.training.loss import Loss
from experiments.training.steps import CapturedSteps, Steps, choose_fast, make_steps, wrapped
from psap_core import PSAP, InputError
from tests.helpers import bits, small

CPU = torch.device("cpu")
RESNET20 = ResNetConfig("resnet20", 0.25, None, Fan("in"), Shortcut.option_a)
IMAGES, BATCH = 88, 32  # the last batch is a smaller one
EPOCHS, RATES = 5, (0.1, 0.1, 0.02, 0.02, 0.02)


class Recorded(TorchDispatchMode):
    """A CUDA graph's contract on a CPU: calls after the second repeat its operations, in order, on the same memory."""

    def __init__(self, launch):
        super().__init__()
        self.launch, self.operations, self.calls, self.replays = launch, [], 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def __call__(self):
        self.calls += 1
        if self.calls == 1:  # the optimiser makes its state
            self.launch()
            return
        if self.calls == 2:
            with self:
                self.launch()
            return
        self.replays += 1
        with torch.no_grad():
            for operation, args, kwargs, before in self.operations:
                for old, new in zip(
                    tree_leaves(before), tree_leaves(operation(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def recording():
    """The graphs that will be captured, and what makes captured steps that add theirs."""
    captured = []

    def capture(launch):
        captured.append(Recorded(launch))
        return captured[-1]

    def make(*arguments):
        return CapturedSteps(*arguments, capture=capture)

    return captured, make


def method_of(name, model, optimizer, images, scope):
    example = torch.zeros(1, 1, 8, 8, device=images.labels.device)
    if name == "psap":
        pruner = PSAP(
            model,
            optimizer,
            example,
            target_macs_cut=0.6,
            total_epochs=EPOCHS,
            start=1,
            ramp_end=2,
            freeze=3,
            pulse_batches=2,
            scope=scope,
        )

        def batches(epochs_done):
            return (part for batch in images.epoch("pulse", epochs_done) for part in batch.parts)

        def loss_of_batch(batch):
            pixels, labels = batch
            return F.cross_entropy(model(pixels), labels)

        return PSAPCallback(pruner, batches, loss_of_batch, lambda *_: None)
    if name == "fpgm":
        return FPGM(model, optimizer, example, 0.6, scope, lambda *_: None)
    return OneShot(model, optimizer, example, 0.6, scope, "l1", 2, 0, lambda *_: None)


def trained(make_steps, name="psap", device=CPU, autocast=None, scope="all", compact=False):
    """Losses of all epochs and all state after training with pruning steps and another learning rate between."""
    torch.manual_seed(0)
    model = models.build(RESNET20, 1, 10).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), RATES[0], momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    train = data.load_resident(
        DataConfig("digits", "unused", 8, IMAGES, 0, True, [0.5], [0.5])
    ).train.to(device)
    images = tensor_images.TensorLoader(
        train, Normalisation((0.5,), (0.5,)), Sharing(BATCH), True, seed=1
    )
    method = method_of(name, model, optimizer, images, scope)
    steps = make_steps(model, optimizer, images, World(), device, autocast, method.after_step)
    losses = []
    for epoch, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        steps.loss_sum.fill_(0.0)
        first = 1 if epoch == 1 else 0  # as a resumed run does
        assert list(steps.epoch(epoch, first)) == [32, 32, 24][first:]
        losses.append(steps.loss_sum.item())
        method.end_epoch(epoch + 1)
        if compact and epoch + 1 == 3:
            method.compact_()
            steps.use(model)
    assert any(method.plan.pruned.values())
    return (
        losses,
        bits(model.state_dict()),
        bits(optimizer.state_dict()["state"]),
        method.plan.to_json(),
    )


@pytest.mark.parametrize("scope", ["coupled", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        ("psap", None),
        pytest.param("psap", torch.bfloat16, marks=pytest.mark.long),
        pytest.param("fpgm", None, marks=pytest.mark.long),
        pytest.param("l1", None, marks=pytest.mark.long),
    ],
)
def test_captured_steps_train_bit_for_bit_as_eager_ones(name, autocast, scope):
    captured, captured_steps = recording()
    replayed = trained(captured_steps, name, autocast=autocast, scope=scope)
    assert replayed == trained(Steps, name, autocast=autocast, scope=scope)
    assert [recorded.replays for recorded in captured] == [1, 4]  # a graph for each learning rate


@pytest.mark.parametrize("name", ["psap", pytest.param("l1", marks=pytest.mark.long)])
def test_a_small_network_is_captured_anew(name):
    captured, captured_steps = recording()
    replayed = trained(captured_steps, name, scope="coupled", compact=True)
    assert replayed == trained(Steps, name, scope="coupled", compact=True)
    assert [recorded.replays for recorded in captured] == [1, 0, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_trains_as_eager_steps(monkeypatch):
    monkeypatch.setattr(
        "experiments.training.cuda_graph.WARM_UP_CALLS", 2
    )  # there are few batches, and momentum needs two
    cuda = torch.device("cuda")
    captured, eager = (trained(make, device=cuda)[0] for make in (CapturedSteps, Steps))
    assert captured == pytest.approx(
        eager, rel=0.05
    )  # kernels round anew at every call, and training amplifies it


@pytest.mark.long
def test_compiled_steps_train_as_eager_ones():
    def losses(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
        images = images_of(Sharing(64))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        net = torch.compile(model, dynamic=False) if compiled else model
        steps = Steps(net, optimizer, images, World(), CPU, None, lambda: None)
        found = []
        for epoch in range(3):
            steps.loss_sum.fill_(0.0)
            assert sum(steps.epoch(epoch, 0)) == len(images)
            found.append(steps.loss_sum.item() / len(images))
        return found

    eager = losses(compiled=False)
    assert eager[-1] < 0.8 * eager[0]
    assert losses(compiled=True) == pytest.approx(eager, rel=1e-4)


@pytest.mark.long
def test_a_compiled_run_prunes_as_an_eager_one(tmp_path, monkeypatch):
    rows = {}
    for fast in ("eager", "compiled"):
        overrides = small(tmp_path / fast, "psap", "optim.lr=0.005", f"runtime.fast={fast}")
        monkeypatch.setattr("sys.argv", ["train", *overrides])
        GlobalHydra.instance().clear()
        train.main()
        (folder,) = tmp_path.glob(f"{fast}/*/*/seed0")
        assert json.loads((folder / "manifest.json").read_text())["fast"] == fast
        rows[fast] = [
            json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
    for eager, compiled in zip(*rows.values(), strict=True):
        assert compiled["train/loss"] == pytest.approx(eager["train/loss"], rel=1e-3)
        assert compiled.get("psap/macs_cut") == eager.get("psap/macs_cut")


def images_of(sharing):
    train = data.load_resident(DataConfig("digits", "unused", 8, 320, 0, True, [0.5], [0.5])).train
    return tensor_images.TensorLoader(train, Normalisation((0.5,), (0.5,)), sharing, True, seed=1)


SGD = torch.optim.SGD([torch.zeros(1)], 0.1)


def test_auto_captures_where_that_is_possible():
    cuda, whole, alone = torch.device("cuda"), images_of(Sharing(64)), World()
    adamw = torch.optim.AdamW([torch.zeros(1)])
    two_parts = images_of(Sharing(64, accumulate=2))
    assert choose_fast(Fast.auto, cuda, whole, alone, SGD) is Fast.captured
    assert choose_fast(Fast.auto, CPU, whole, alone, SGD) is Fast.eager
    assert choose_fast(Fast.auto, cuda, two_parts, alone, SGD) is Fast.eager
    assert choose_fast(Fast.auto, cuda, whole, World(0, 2, 0), SGD) is Fast.eager
    assert choose_fast(Fast.auto, cuda, whole, alone, adamw) is Fast.eager
    assert choose_fast(Fast.auto, cuda, whole, alone, SGD, Loss(mixup=0.2)) is Fast.eager
    assert choose_fast(Fast.auto, cuda, whole, alone, SGD, Loss(0.1)) is Fast.captured
    assert choose_fast(Fast.eager, cuda, whole, alone, SGD) is Fast.eager


def test_the_chosen_steps_are_made():
    model, images = nn.Conv2d(1, 1, 1), images_of(Sharing(64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for fast, kind in ((Fast.eager, Steps), (Fast.compiled, Steps), (Fast.captured, CapturedSteps)):
        steps = make_steps(
            fast, wrapped(model, fast, World()), optimizer, images, World(), CPU, None, lambda: None
        )
        assert type(steps) is kind
        assert (steps.net is model) == (fast is not Fast.compiled)


def test_what_is_not_possible_here_is_refused(monkeypatch):
    with pytest.raises(
        InputError, match="captured needs a CUDA device, digits or CIFAR-10 on it, one process"
    ):
        choose_fast(Fast.captured, CPU, images_of(Sharing(64)), World(), SGD)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler, there is no no-such-compiler"):
        choose_fast(Fast.compiled, CPU, images_of(Sharing(64)), World(), SGD)
