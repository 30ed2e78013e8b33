"""What a training step minimises: cross-entropy, with smoothed labels and mixed images where they are asked for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from experiments.schema import OptimConfig
from psap_core import InputError

SMALLEST_MIXUP = 0.001  # below it no share is drawn that lies between 0 and 1


@dataclass(frozen=True)
class Loss:
    """The mean loss of a batch.

    Attributes:
        label_smoothing: share of a label that all classes get, in [0, 1).
        mixup: images are mixed in shares drawn from Beta(mixup, mixup) (Zhang et al. 2018); 0: they are not mixed.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar, of logits [B, classes] and labels int64 [B]."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def in_training(self, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar, of images [B, C, S, S], which are mixed with those of the batch in reverse order."""
        if self.mixup == 0:
            return self.of_logits(net(images), labels)
        share = float(Beta(self.mixup, self.mixup).sample())
        logits = net(torch.lerp(images.flip(0), images, share))
        own = self.of_logits(logits, labels)
        others = self.of_logits(logits, labels.flip(0))
        return share * own + (1 - share) * others


def make_loss(cfg: OptimConfig) -> Loss:
    """Raises InputError where a setting is out of its range."""
    if not 0 <= cfg.label_smoothing < 1:
        raise InputError(f"optim.label_smoothing={cfg.label_smoothing} must be in [0, 1)")
    if cfg.mixup != 0 and not SMALLEST_MIXUP <= cfg.mixup <= 100:
        raise InputError(
            f"optim.mixup={cfg.mixup} must be 0 or in [{SMALLEST_MIXUP}, 100]; 0.2 is usual"
        )
    return Loss(cfg.label_smoothing, cfg.mixup)
