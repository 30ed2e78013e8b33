"""The small network that a plan describes: built, verified against the masked one, saved without pickles."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from psap_core.errors import InputError
from psap_core.layers import PrunableLayer, analyse
from psap_core.plan import PrunePlan

SPEC_FORMAT = "psap-exported-2"
MAX_RELATIVE_ERROR = 1e-9


class ScatteredBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the kept channels, scattered into the full-width stream: [N, kept, H, W] -> [N, width, H, W].

    Other channels are what `norm` made of zeros: zero behind a silenced affine, a constant behind zeroed weights alone.
    Convert to SyncBatchNorm before pruning, not after: a conversion would make this a plain one.
    """

    kept: Tensor
    constant: Tensor

    def __init__(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm, kept: Tensor) -> None:
        like: Any = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        super().__init__(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            **like,
        )
        before = getattr(
            norm, "kept", torch.arange(norm.num_features, device=kept.device)
        )  # exported once already?
        self.register_buffer("kept", before[kept], persistent=False)
        zeros = torch.zeros(2, norm.num_features, 1, 1, device=kept.device, dtype=torch.float64)
        self.register_buffer(
            "constant", copy.deepcopy(norm).double().eval()(zeros)[0].flatten().detach()
        )

    def forward(self, input: Tensor) -> Tensor:
        thin = super().forward(input)
        layout = torch.contiguous_format if thin.is_contiguous() else torch.channels_last
        full = self.constant.to(thin.dtype)[:, None, None].expand(
            thin.shape[0], -1, *thin.shape[2:]
        )
        return full.clone(memory_format=layout).index_copy_(1, self.kept, thin)


def export(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """The network without the plan's filters: inner ones removed, outputs of residual ones scattered.

    The model's pruned filters must be silent already, as PSAP leaves them; a plan from elsewhere is applied
    with `apply_` first. Of residual ones zero weights are enough: what their BatchNorm makes of zeros stays.
    The result is verified on the CPU in float64 against the model as given.

    Returns:
        A new network, in the model's modes, on its device; the model is untouched.

    Raises:
        InputError: the plan is of another network, or the exported network computes something else.
    """
    small = _shrink(model, plan)
    if not (error := export_error(model, small, plan)) <= MAX_RELATIVE_ERROR:
        raise InputError(
            f"the export differs from the model by {error:.1e}: silence the filters with apply_"
        )
    return small


def export_error(model: nn.Module, small: nn.Module, plan: PrunePlan) -> float:
    """max|a - b| / max|a| of both networks' outputs: evaluation mode, CPU, float64, two random inputs."""
    example = torch.randn(
        2, *plan.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with torch.no_grad():
        masked, exported = (
            copy.deepcopy(net).cpu().double().eval()(example) for net in (model, small)
        )
    return float(
        (masked - exported).abs().max() / masked.abs().max().clamp(min=1e-300)
    )  # equal zeros are equal


def save_exported(
    folder: Path | str, small: nn.Module, plan: PrunePlan, extra: Mapping[str, Any] = {}
) -> None:
    """Write `spec.json` (the plan, and `extra` JSON values) and `weights.safetensors` into a folder."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in small.state_dict().items()
    }
    spec = {**extra, "format": SPEC_FORMAT, "plan": json.loads(plan.to_json())}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "weights.safetensors").write_bytes(
        safetensors.torch.save(tensors, {"plan": plan.digest})
    )
    (Path(folder) / "spec.json").write_text(json.dumps(spec, indent=1))


def load_exported(folder: Path | str, dense_model: nn.Module) -> nn.Module:
    """The exported network of a folder, from a freshly built dense network (which is left as it is).

    Raises:
        InputError: the folder holds no export, it is of another network, or spec and weights do not match.
    """
    plan = PrunePlan.from_json(json.dumps(read_spec(folder)["plan"]))
    small = _shrink(dense_model, plan)
    path = Path(folder) / "weights.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() != {"plan": plan.digest}:
                raise RuntimeError("the weights are of another plan")
            small.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (FileNotFoundError, safetensors.SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{path} does not match its spec.json here: {' '.join(str(error).split())}"
        ) from error
    return small


def read_spec(folder: Path | str) -> dict[str, Any]:
    """The content of a folder's `spec.json`. Raises InputError if it is not one."""
    path = Path(folder) / "spec.json"
    try:
        spec: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputError(f"{folder} holds no exported network: {error}") from error
    if not isinstance(spec, dict) or spec.get("format") != SPEC_FORMAT or "plan" not in spec:
        raise InputError(f"{path} is not a spec of format {SPEC_FORMAT!r}")
    return spec


def export_onnx(small: nn.Module, path: Path | str, plan: PrunePlan) -> None:
    """Write the network as ONNX (dynamo exporter), any batch size, evaluation mode. Needs onnxscript."""
    example, batch = torch.zeros(2, *plan.input_shape), torch.export.Dim("batch", min=1)
    torch.onnx.export(
        copy.deepcopy(small).cpu().eval(),
        (example,),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _shrink(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of the model with the plan's filters cut out of every tensor that holds them."""
    small, first = copy.deepcopy(model), next(model.parameters())
    layers, _ = analyse(small, first.detach().new_zeros(1, *plan.input_shape))
    for layer, part in plan.match(layers):
        kept = sorted(set(range(part.filters)).difference(part.pruned))
        if part.pruned:
            _cut_filters_(small, layer, torch.tensor(kept, device=first.device))
    return small


def _cut_filters_(model: nn.Module, layer: PrunableLayer, kept: Tensor) -> None:
    if layer.role == "residual":
        norm: Any = model.get_submodule(layer.affine)
        scattered = ScatteredBatchNorm2d(norm, kept).train(norm.training)
        scattered.load_state_dict(norm.state_dict() | {"constant": scattered.constant})
        model.set_submodule(layer.affine, scattered)
    for member in layer.members:
        module = model.get_submodule(member)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach()[kept], parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.ndim and name not in ("kept", "constant"):
                setattr(module, name, buffer[kept])
        if isinstance(module, nn.Conv2d):
            module.out_channels = len(kept)
            if module.groups > 1:
                module.groups = module.in_channels = len(kept)
        else:
            module.num_features = len(kept)  # type: ignore[assignment]
    for consumer in layer.consumers:
        _cut_inputs_(model.get_submodule(consumer), layer.filters, kept)


def _cut_inputs_(module: Any, channels: int, kept: Tensor) -> None:
    """Drop a convolution's input channels, or the columns of a linear layer that a flattened channel feeds."""
    weight = module.weight.detach()
    by_channel = weight.reshape(weight.shape[0], channels, -1, *weight.shape[2:])[:, kept]
    module.weight = nn.Parameter(by_channel.flatten(1, 2), module.weight.requires_grad)
    setattr(
        module,
        "in_channels" if isinstance(module, nn.Conv2d) else "in_features",
        module.weight.shape[1],
    )
