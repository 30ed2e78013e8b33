"""What psap_core offers."""

from psap_core.allocation import check_reachable, filter_counts, filter_floors, layer_prune_ratios
from psap_core.cost import (
    CostModel,
    LayerCost,
    filters_cost_model,
    layer_table,
    macs,
    macs_cost_model,
    params,
)
from psap_core.errors import InputError
from psap_core.exported import (
    export,
    export_error,
    export_onnx,
    load_exported,
    read_spec,
    save_exported,
)
from psap_core.layers import PrunableLayer, find_layers
from psap_core.plan import LayerPlan, PrunePlan, make_plan
from psap_core.pruner import PSAP, PruneStep
from psap_core.schedule import Schedule, make_schedule
from psap_core.scoring import filter_norms, propose, pulse_margin
from psap_core.sparsity import weight_sparsity_ratio
from psap_core.supervision import PULSE_EPSILON, Supervision, choose_restored, pulse
from psap_core.suspension import (
    FilterTensors,
    Silence,
    Snapshot,
    apply_,
    filter_tensors,
    freeze_,
    restore_,
    suspend_,
)

__all__ = [
    "PSAP",
    "PULSE_EPSILON",
    "CostModel",
    "FilterTensors",
    "InputError",
    "LayerCost",
    "LayerPlan",
    "PrunableLayer",
    "PrunePlan",
    "PruneStep",
    "Schedule",
    "Silence",
    "Snapshot",
    "Supervision",
    "apply_",
    "check_reachable",
    "choose_restored",
    "export",
    "export_error",
    "export_onnx",
    "filter_counts",
    "filter_floors",
    "filter_norms",
    "filter_tensors",
    "filters_cost_model",
    "find_layers",
    "freeze_",
    "layer_prune_ratios",
    "layer_table",
    "load_exported",
    "macs",
    "macs_cost_model",
    "make_plan",
    "make_schedule",
    "params",
    "propose",
    "pulse",
    "pulse_margin",
    "read_spec",
    "restore_",
    "save_exported",
    "suspend_",
    "weight_sparsity_ratio",
]
