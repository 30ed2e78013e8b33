"""What a user of psap_core needs; the equations are importable from their modules."""

from psap_core.cost import macs, params
from psap_core.errors import InputError
from psap_core.exported import (
    compact_,
    export,
    export_error,
    export_onnx,
    load_exported,
    save_exported,
)
from psap_core.plan import PrunePlan
from psap_core.pruner import PSAP, PruneStep, report
from psap_core.reporting import Report
from psap_core.settings import Settings

__all__ = [
    "PSAP",
    "InputError",
    "PrunePlan",
    "PruneStep",
    "Report",
    "Settings",
    "compact_",
    "export",
    "export_error",
    "export_onnx",
    "load_exported",
    "macs",
    "params",
    "report",
    "save_exported",
]
