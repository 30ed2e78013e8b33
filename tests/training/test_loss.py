"""What a step minimises, and with which optimiser and learning rate."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.configuration import compose
from experiments.schema import LRSchedule, OptimizerName
from experiments.training.loss import Loss, make_loss
from experiments.training.optim import learning_rate, make_optimizer
from psap_core import InputError

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def optim():
    return compose("train", ["experiment=digits_resnet20"]).optim


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_smoothed_labels_give_every_class_a_share(net):
    logits = net(IMAGES)
    target = 0.9 * F.one_hot(LABELS, 3) + 0.1 / 3
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert Loss(0.1).of_logits(logits, LABELS).item() == pytest.approx(expected.item())
    assert Loss().of_logits(logits, LABELS).item() == pytest.approx(
        F.cross_entropy(logits, LABELS).item()
    )


def test_mixed_images_count_for_both_labels(net):
    """Zhang et al.: the loss of share * x + (1 - share) * x' is share * loss of y + (1 - share) * loss of y'."""
    torch.manual_seed(2)
    found = Loss(mixup=0.4).in_training(net, IMAGES, LABELS)
    torch.manual_seed(2)
    share = torch.distributions.Beta(0.4, 0.4).sample().item()
    logits = net(share * IMAGES + (1 - share) * IMAGES.flip(0))
    expected = share * F.cross_entropy(logits, LABELS)
    expected += (1 - share) * F.cross_entropy(logits, LABELS.flip(0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0.01 < share < 0.99  # or nothing was mixed


def test_nothing_is_drawn_where_images_are_not_mixed(net):
    before = torch.get_rng_state()
    Loss(0.1).in_training(net, IMAGES, LABELS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label_smoothing": 1.0}, r"optim.label_smoothing=1.0 must be in \[0, 1\)"),
        ({"mixup": -0.1}, "optim.mixup=-0.1 must be 0 or in"),
        ({"mixup": math.nan}, "optim.mixup=nan must be 0 or in"),
    ],
)
def test_losses_that_cannot_be_are_refused(optim, change, sentence):
    with pytest.raises(InputError, match=sentence):
        make_loss(replace(optim, **change))


def test_adamw_decays_and_averages_as_asked(optim, net):
    cfg = replace(
        optim, optimizer=OptimizerName.adamw, weight_decay=0.05, momentum=0.8, decay_all=False
    )
    optimizer = make_optimizer(net, cfg)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}


def test_half_a_cosine_from_the_learning_rate_towards_zero(optim):
    cfg = replace(optim, schedule=LRSchedule.cosine, lr=0.2, warmup_epochs=2, warmup_lr=0.01)
    rates = [learning_rate(cfg, epoch, 12) for epoch in range(12)]
    assert rates[:3] == [0.01, 0.01, 0.2]
    assert rates[7] == pytest.approx(0.1)  # half way
    assert rates[11] == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_trained_weights_start_at_a_tenth_with_a_short_ramp(tmp_path):
    (tmp_path / "pets").mkdir()
    recipe = ["experiment=image_folder", f"data.root={tmp_path / 'pets'}"]
    trained = compose("train", recipe)
    fresh = compose("train", [*recipe, "model.weights=null"])
    assert trained.optim.lr == pytest.approx(fresh.optim.lr / 10)
    assert (trained.method.ramp_end, fresh.method.ramp_end) == (0.2, 0.4)
    assert (trained.method.freeze, fresh.method.freeze) == (0.25, 0.5)
    adamw = compose("train", [*recipe, "optim=finetune_adamw"])
    assert adamw.optim.optimizer is OptimizerName.adamw
    assert adamw.optim.lr == pytest.approx(1e-4)
