"""Fresh weights."""

from torch import nn

from experiments.schema import Fan
from psap_core.surgery import ScatteredBatchNorm


def initialise_(model: nn.Module, fan: Fan, name: str = "") -> None:
    """Fresh weights: He et al.'s for convolutions and, with fan in, linear layers; torch's own for the others.

    MobileNetV2's classifier, by the network's name, is torchvision's: normal with a standard deviation of 0.01.
    """
    for module in model.modules():
        if isinstance(module, ScatteredBatchNorm):
            module.constant.zero_()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and fan.value == "in"):
            nn.init.kaiming_normal_(module.weight, mode=f"fan_{fan.value}", nonlinearity="relu")  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and name == "mobilenet_v2":
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d, ScatteredBatchNorm)):
            module.reset_parameters()
