"""What comes after pruning: train the small network on, save and load it, write it as ONNX, quantise it.

    python examples/after_pruning.py runs/after_pruning

From the freeze on the plan is final: the live network is made small in place, and training goes on with the same
optimizer. ONNX needs onnxscript and onnxruntime. Quantisation is torch's FX graph mode, static and 8 bits for x86 CPUs:
torch still has it and calls it deprecated; its successor is torchao's prepare_pt2e.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.utils.data import DataLoader, TensorDataset

from psap_core import PSAP, export_onnx, load_exported, save_exported


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images [N, 1, 8, 8] in [0, 1], with labels [N]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).div(16)
    y = torch.tensor(labels)
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def make_network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(epochs: int, train_set: TensorDataset) -> tuple[nn.Module, PSAP]:
    """The network, made small half-way, and the pruner."""
    loader = DataLoader(train_set, batch_size=128, shuffle=True, drop_last=True)
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)

    def loss_of_batch(batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    freeze = epochs // 2
    pruner = PSAP(
        model,
        optimizer,
        train_set.tensors[0][:1],
        target_macs_cut=0.5,
        total_epochs=epochs,
        freeze=freeze,
    )
    for _ in range(epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss_of_batch(batch).backward()
            optimizer.step()
        pruner.end_epoch(loader, loss_of_batch)
        if pruner.plan_is_final and not pruner.is_compact:
            pruner.compact_()  # model, parameters and optimizer stay the same objects, smaller
    return model, pruner


def quantise(small: nn.Module, images: Tensor) -> nn.Module:
    """A copy in 8 bits; the images say what ranges the activations have."""
    prepared = prepare_fx(small.eval(), get_default_qconfig_mapping("x86"), (images,))
    with torch.no_grad():
        prepared(images)
    return convert_fx(prepared)


def main(folder: Path, epochs: int = 20) -> tuple[PSAP, dict[str, Tensor]]:
    """The pruner, and the test images' logits [N, 10] by every form of the small network."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    images, labels = test_set.tensors
    small, pruner = train(epochs, train_set)

    save_exported(folder / "small", small, pruner.plan)
    loaded = load_exported(folder / "small", make_network())
    export_onnx(small, folder / "small.onnx", pruner.plan)
    session = onnxruntime.InferenceSession(folder / "small.onnx")
    quantised = quantise(small, train_set.tensors[0][:256])

    with torch.no_grad():
        logits = {"small": small.eval()(images), "loaded": loaded.eval()(images)}
        logits["ONNX"] = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        logits["quantised"] = quantised(images)
    print(f"{pruner.plan.macs_cut:.1%} of the MACs cut")
    for name, output in logits.items():
        print(f"{name}: accuracy {float((output.argmax(1) == labels).float().mean()):.1%}")
    return pruner, logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the exported network")
    main(parser.parse_args().folder)
