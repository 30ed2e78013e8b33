"""The small network that a plan describes: checked beforehand, verified, saved without pickles, written as ONNX."""

import json
import math
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from psap_core.checks import require_packages
from psap_core.cost import macs
from psap_core.errors import InputError
from psap_core.files import make_folder, read_plain, sealed, sha256, unsealed, write_atomically
from psap_core.groups import ChannelGroup, Scope, find_groups
from psap_core.inputs import Description, call, copy_network, draw, map_tensors, tensors_in
from psap_core.plan import LayerPlan, PrunePlan
from psap_core.surgery import cut_, smaller_copy
from psap_core.suspension import (
    PRUNERS,
    SERVING,
    FilterTensors,
    apply_,
    filter_tensors,
    optimizers_in,
)

SPEC_FORMAT = "psap-exported-4"
MAX_RELATIVE_ERROR = 1e-9  # in float64
MAX_RELATIVE_ERROR_FLOAT32 = 1e-4  # of networks that compute something in less
TRIAL_SHARES = (0.3, 1.0)  # of what may go of every group, in the rehearsal


def export(
    model: nn.Module, plan: PrunePlan, *, zero_preserving: Collection[Any] = ()
) -> nn.Module:
    """The network without the plan's filters: the user's own classes and plain torch modules, made smaller.

    The model's pruned filters must be silent already, as PSAP leaves them; a plan from elsewhere is applied
    with `apply_` first. In scope `all`, outputs that end in a sum are scattered into its full width; of those, zero
    weights are enough: what their BatchNorm makes of zeros stays.
    The result is verified on the CPU, in float64 where the network can, against the model as given.

    Args:
        zero_preserving: as it was given to PSAP or `find_groups`.

    Returns:
        A new network, in the model's modes, on its device; the model is untouched.

    Raises:
        InputError: the plan is of another network, the model's pruned filters are live, or the exported network
            computes something else.

    Warns:
        UserWarning: a PSAP is still to change the network's plan.
    """
    _require_model_and_plan(model, plan)
    _warn_unfinished(model, plan)
    groups = _groups_of(model, plan, zero_preserving)
    _check_silent(model, groups, plan)
    small = smaller_copy(model, groups, plan)
    _verify(model, small, plan.inputs)
    return small


def _warn_unfinished(model: nn.Module, plan: PrunePlan) -> None:
    reference = PRUNERS.get(model)
    pruner = reference() if reference is not None else None
    if pruner is None or pruner.plan_is_final:
        return
    warnings.warn(
        f"the plan is not final: end_epoch was called {pruner.epochs_done} times, and has to be "
        f"{pruner.schedule.freeze} times; now it removes {100 * plan.macs_cut:.1f} % of the MACs",
        stacklevel=3,
    )


def compact_(
    model: nn.Module,
    plan: PrunePlan,
    optimizers: Optimizer | Sequence[Optimizer] = (),
    *,
    zero_preserving: Collection[Any] = (),
) -> None:
    """`export` in place: the live network and its optimisers' state become small.

    Parameters stay the same objects, so optimisers and schedulers that hold them go on. Whatever wraps the network
    (DistributedDataParallel, torch.compile, a captured graph) is to be made anew.

    Raises:
        InputError: as in `export`, or an optimiser serves a PSAP, which has a `compact_` of its own, or keeps state
            that cannot be cut; the network is then as before the call.
    """
    _require_model_and_plan(model, plan)
    bare = optimizers_in(optimizers)
    if any(optimizer in SERVING for optimizer in bare):
        raise InputError("the optimizer serves a PSAP: call that one's own compact_()")
    groups = _groups_of(model, plan, zero_preserving)
    _check_silent(model, groups, plan)
    _verify(model, smaller_copy(model, groups, plan), plan.inputs)
    cut_(model, groups, plan, bare)


def export_error(model: nn.Module, small: nn.Module, plan: PrunePlan) -> float:
    """max|a - b| / max|a| of both networks' outputs for random inputs: evaluation mode, CPU.

    In float64, or float32 where the network cannot run in that.
    """
    error, _ = _compare(model, small, plan.inputs)
    return error


def rehearse(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scope: Scope,
    inputs: Description,
    floors: Sequence[int],
) -> None:
    """Export trials: a part of every group, then all but its floor goes from a copy, which must compute the same.

    Raises:
        InputError: the small network fails or computes something else, with the place in the user's code or the groups
            that are to blame.
    """
    for share in TRIAL_SHARES:
        trial = _trial_plan(groups, floors, share, scope, inputs)
        try:
            _try(model, groups, trial)
        except Exception as error:
            culprits = []
            for part in trial.layers:
                if not _works(model, groups, replace(trial, layers=(part,))):
                    culprits.append(part.name)
            advice = ""
            if 0 < len(culprits) < len(groups):  # where every group is one, it is not the groups
                advice = f"; exclude={culprits} leaves such layers alone"
            raise InputError(
                f"{type(model).__name__} cannot lose filters as it is: {_place(error)}{advice}"
            ) from error


def save_exported(
    folder: Path | str,
    small: nn.Module,
    plans: PrunePlan | Sequence[PrunePlan],
    extra: Mapping[str, Any] = {},
) -> None:
    """Write `spec.json` (the plans, and `extra` JSON values) and `weights.safetensors` into a folder.

    Args:
        small: what `export` returns, or the network itself after `compact_`.
        plans: the plan; of a network that was pruned in several rounds the plans of all of them, in order.

    Raises:
        InputError: the network is not of the plan's size, there is no plan, or `extra` holds no JSON values.
    """
    rounds = [plans] if isinstance(plans, PrunePlan) else [*plans]
    if not rounds:
        raise InputError("an export has a plan, or several; none was given")
    for plan in rounds:
        _require_model_and_plan(small, plan)
    _refuse_another_size(small, rounds[-1])
    try:
        refuse_not_finite(small, small.state_dict())
    except RuntimeError as error:
        raise InputError(f"{error}: the training has diverged") from error
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in small.state_dict().items()}
    # With the plans' digests, so that weights are of these plans alone, whichever others leave the same shapes.
    weights = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"plan": " ".join(plan.digest for plan in rounds)},
    )
    spec = {
        **extra,
        "format": SPEC_FORMAT,
        "plans": [json.loads(plan.to_json()) for plan in rounds],
        "weights_sha256": sha256(weights),
    }
    try:
        values = json.loads(json.dumps(spec))  # as a reader will see them
    except (TypeError, ValueError) as error:
        raise InputError(f"extra must hold JSON values: {error}") from error
    make_folder(Path(folder))
    write_atomically(Path(folder) / "weights.safetensors", weights)
    write_atomically(Path(folder) / "spec.json", json.dumps(sealed(values), indent=1).encode())


def load_exported(
    folder: Path | str, dense_model: nn.Module, *, zero_preserving: Collection[Any] = ()
) -> nn.Module:
    """The exported network of a folder, from a freshly built dense network (which is left as it is).

    Returns:
        A network in evaluation mode.

    Raises:
        InputError: the folder holds no export, one of its files was changed, it is of another network, or a value is
            not finite.
    """
    spec = read_spec(folder)
    small = copy_network(dense_model)
    for plan in read_plans(folder):
        cut_(small, _groups_of(small, plan, zero_preserving), plan)
    path = Path(folder) / "weights.safetensors"
    try:
        weights = read_plain(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if sha256(weights) != spec.get("weights_sha256"):
        raise InputError(f"{path} is damaged: it is not what spec.json describes; copy it again")
    try:
        tensors = safetensors.torch.load(weights)
        state = small.state_dict()  # which has the versions that some classes ask for
        refuse_other_kinds(tensors, state)
        refuse_not_finite(small, tensors)
        state.clear()
        state.update(tensors)
        small.load_state_dict(state)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{path} does not match its spec.json here: {' '.join(str(error).split())}"
        ) from error
    return small.eval()


def refuse_other_kinds(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where a tensor is of another kind of number than the network's."""
    for name, tensor in tensors.items():
        own = expected.get(name)
        if own is not None and own.is_floating_point() != tensor.is_floating_point():
            raise RuntimeError(f"{name} holds {tensor.dtype}, the network has {own.dtype}")


def refuse_not_finite(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where a parameter is not finite; a buffer may be infinite, as masks are, but no NaN."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in tensors.items():
        bad = ~tensor.isfinite() if name in parameters else tensor.isnan()
        if bad.any():
            raise RuntimeError(f"{name} holds values that are not finite")


def _require_model_and_plan(model: Any, plan: Any) -> None:
    """Refuse other things in their place."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, not a {type(model).__name__}")
    if not isinstance(plan, PrunePlan):
        raise InputError(f"plan must be a PrunePlan, as pruner.plan, not a {type(plan).__name__}")


def read_spec(folder: Path | str) -> dict[str, Any]:
    """The content of a folder's `spec.json`. Raises InputError if it is not one."""
    path = Path(folder) / "spec.json"
    try:
        spec: dict[str, Any] = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder} holds no exported network: {error}") from error
    if not isinstance(spec, dict) or spec.get("format") != SPEC_FORMAT:
        raise InputError(f"{path} is not a spec of format {SPEC_FORMAT!r}")
    if not isinstance(spec.get("plans"), list) or not spec["plans"]:
        raise InputError(f"{path} is not a spec of format {SPEC_FORMAT!r}: it has no plans")
    try:
        return unsealed(spec)
    except (InputError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from error


def read_plans(folder: Path | str) -> list[PrunePlan]:
    """The plans of an exported network, one for each round in which it was pruned."""
    return [PrunePlan.from_json(json.dumps(plan)) for plan in read_spec(folder)["plans"]]


def export_onnx(small: nn.Module, path: Path | str, plan: PrunePlan) -> None:
    """Write the network as ONNX (dynamo exporter), evaluation mode. Needs onnx and onnxscript.

    Any batch size; of images any height and width as well, where the network allows that.

    Raises:
        InputError: the network is not of the plan's size, a package is missing, or ONNX has no form of the network.
    """
    _require_model_and_plan(small, plan)
    require_packages("ONNX", "onnx", "onnxscript")
    _refuse_another_size(small, plan)
    inputs = draw(plan.inputs, torch.Generator().manual_seed(0))
    example = map_tensors(inputs, _twice)  # a size of one would be taken for a constant
    network = copy_network(small).cpu().eval()
    with torch.no_grad():
        output = call(network, _in_type_of(network, example))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.onnx.export(
            network,
            ()
            if isinstance(example, dict)
            else example
            if isinstance(example, tuple)
            else (example,),
            path,
            kwargs=example if isinstance(example, dict) else None,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(example),
            external_data=False,
            verbose=False,
            input_names=["images"] if isinstance(example, Tensor) else None,
            output_names=["logits"] if isinstance(output, Tensor) else None,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason, *_ = str(error.__cause__ or error).strip().splitlines()
        raise InputError(f"{type(small).__name__} cannot be written as ONNX: {reason}") from error


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def _dynamic_shapes(example: Any) -> Any:
    automatic = torch.export.Dim.AUTO

    def shape_of(tensor: Tensor) -> dict[int, Any]:
        return dict.fromkeys((0, *range(2, tensor.ndim)), automatic)

    if isinstance(example, dict):
        return map_tensors(example, shape_of)
    return map_tensors(example if isinstance(example, tuple) else (example,), shape_of)


def _groups_of(
    model: nn.Module, plan: PrunePlan, zero_preserving: Collection[Any]
) -> tuple[ChannelGroup, ...]:
    """The network's groups in the plan's scope, whatever of it is trained."""
    device = next(model.parameters()).device
    try:
        example = draw(plan.inputs, torch.Generator().manual_seed(0), device=device)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"the plan's description of the inputs is damaged: {error!r}") from error
    example = _in_type_of(model, example)
    everything = [name for name, _ in model.named_parameters()]
    return find_groups(
        model, example, scope=plan.scope, zero_preserving=zero_preserving, trained=everything
    )


def _in_type_of(model: nn.Module, example: Any) -> Any:
    dtype = next(model.parameters()).dtype

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return map_tensors(example, convert)


def _check_silent(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan) -> None:
    live = 0
    for group, part in plan.match(groups):
        tensors = filter_tensors(model, group)
        names = [tensors.silencers]
        if group.scattered is not None:  # a constant stays behind zero weights
            names.append(tensors.writers)
        live += min(_count_live(tensors, kind, part) for kind in names)
    if live:
        raise InputError(
            f"the model's weights do not fit the plan: {live} of the filters that it prunes are live; take weights "
            "from after the freeze (a best checkpoint or an average may be older), or silence a plan of your own "
            "with psap_core.suspension.apply_"
        )


def _count_live(tensors: FilterTensors, names: Sequence[str], part: LayerPlan) -> int:
    """How many of the pruned filters have an entry that is not zero in the named parameters."""
    index = tensors.index(part.pruned)
    live = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    for name in names:
        rows = tensors.parameters[name].take(index)
        live |= rows.detach().flatten(1).ne(0).any(1)
    return int(live.sum())


def _refuse_another_size(small: nn.Module, plan: PrunePlan) -> None:
    """A dense network beside a plan would be written without a word, and never be loaded."""
    example = draw(plan.inputs, torch.Generator().manual_seed(0))
    network = copy_network(small).cpu().eval()
    count = macs(network, _in_type_of(network, example))
    if count != plan.macs:
        raise InputError(
            f"the network has {count:,} MACs and its plan leaves {plan.macs:,}: give what export() returns"
        )


def _verify(model: nn.Module, small: nn.Module, inputs: Description) -> None:
    error, limit = _compare(model, small, inputs)
    if error <= limit:
        return
    if not _compare(model, model, inputs)[0] <= limit:
        raise InputError(
            f"{type(model).__name__} draws random numbers in evaluation mode, or its output is not finite: "
            "what an exported network computes cannot be compared with it"
        )
    raise InputError(f"the exported network computes something else: it differs by {error:.1e}")


def _compare(model: nn.Module, small: nn.Module, inputs: Description) -> tuple[float, float]:
    """max|a - b| / max|a| over all outputs, and how much is allowed; in float64 where both run in that."""
    precision = _Precision()
    try:
        error = _difference(model, small, inputs, double=True, watch=precision)
    except Exception:
        precision.is_double = False
        error = _difference(model, small, inputs, double=False, watch=precision)
    return error, MAX_RELATIVE_ERROR if precision.is_double else MAX_RELATIVE_ERROR_FLOAT32


class _Precision(TorchFunctionMode):
    """Sees whether a network that was made float64 computes something in less."""

    is_double = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_constant = next(tensors_in(args), None) is None
        if not is_constant:
            for tensor in tensors_in(result):
                if tensor.is_floating_point() and tensor.dtype != torch.float64:
                    self.is_double = False
        return result


def _difference(
    model: nn.Module, small: nn.Module, inputs: Description, double: bool, watch: _Precision
) -> float:
    """max|a - b| / max|a| over all outputs, on the CPU in evaluation mode, in float64 or float32."""
    example = draw(inputs, torch.Generator().manual_seed(0), double)
    outputs = []
    with torch.no_grad():
        for network in (model, small):
            twin = copy_network(network).cpu().eval()
            twin = twin.double() if double else twin.float()
            batch = map_tensors(example, torch.clone)
            with watch:
                tensors = tensors_in(call(twin, batch))
            outputs.append([tensor.double() for tensor in tensors])
    gap, size = 0.0, 0.0
    for ours, theirs in zip(*outputs, strict=True):
        if ours.shape != theirs.shape:
            return math.inf
        if ours.numel():
            gap = max(gap, _gap(ours, theirs))
            size = max(size, float(ours.abs().nan_to_num(0.0, posinf=0.0).max()))
    return gap / max(size, 1e-300)  # equal zeros are equal


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b|: equal infinities do not differ, what is no number differs from everything, infinitely."""
    gaps = torch.where(ours == theirs, 0.0, ours - theirs).abs()
    return float(gaps.nan_to_num(math.inf, posinf=math.inf).max())


def _trial_plan(
    groups: Sequence[ChannelGroup],
    floors: Sequence[int],
    share: float,
    scope: Scope,
    inputs: Description,
) -> PrunePlan:
    """A share of what the floors let go of every group, at least one filter, drawn at random."""
    layers = []
    for group, floor in zip(groups, floors, strict=True):
        count = max(1, int(share * (group.filters - floor)))
        generator = torch.Generator().manual_seed(group.filters)
        draws = torch.randperm(group.filters, generator=generator)
        layers.append(LayerPlan(group.name, group.filters, tuple(sorted(draws[:count].tolist()))))
    return PrunePlan(tuple(layers), scope, inputs, 1, 1)


def _try(model: nn.Module, groups: Sequence[ChannelGroup], trial: PrunePlan) -> None:
    masked = copy_network(model)
    apply_(masked, groups, trial)
    _verify(masked, smaller_copy(masked, groups, trial), trial.inputs)


def _works(model: nn.Module, groups: Sequence[ChannelGroup], trial: PrunePlan) -> bool:
    try:
        _try(model, groups, trial)
    except Exception:
        return False
    return True


def _place(error: Exception) -> str:
    """The reason of an error and the line of the user's code that it came from."""
    reason = " ".join(str(error).split()) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if "/torch/" not in f.filename and "/psap_core/" not in f.filename]
    if isinstance(error, InputError) or not foreign:
        return reason
    last = foreign[-1]
    return f"{last.filename}:{last.lineno}, `{last.line}`, says: {reason}"
