"""From the final plan on, the network in training is the small one, and an epoch costs what that one costs."""

from typing import Any

from experiments.methods.base import Callback, Method, Metrics
from experiments.training.setup import Setup
from experiments.training.steps import Steps
from psap_core import export_error
from psap_core.inputs import copy_network


class Compaction(Callback):
    """A method whose network becomes the small one when its plan is final.

    Model, parameters and optimiser stay the same objects. The wrapper that a step calls is made anew.

    Args:
        steps: of the training, told about the new wrapper.

    Attributes:
        relative_error: max|a - b| / max|a| of the networks' outputs before and after, in float64; None: it is to come.
    """

    def __init__(self, method: Method, setup: Setup, steps: Steps) -> None:
        self.method, self.setup, self.steps = method, setup, steps
        self.relative_error: float | None = None

    def before_train(self) -> None:
        self.method.before_train()
        self._compact_if_final(0)

    def after_step(self) -> None:
        self.method.after_step()

    def end_epoch(self, epochs_done: int) -> Metrics:
        plan = self.method.plan
        network_macs = plan.macs if self.method.is_compact else plan.dense_macs
        epoch_macs = len(self.setup.images) * network_macs
        metrics = self.method.end_epoch(epochs_done)
        self._compact_if_final(epochs_done)
        return {"train/macs": epoch_macs, **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {**self.method.state_dict(), "relative_error": self.relative_error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a network that was small becomes small, and is to be given its weights after this."""
        self.relative_error = state["relative_error"]
        self.method.load_state_dict(state)
        if self.method.is_compact:
            self._wrap_again()

    def _compact_if_final(self, epochs_done: int) -> None:
        if self.method.is_compact or not self.method.plan_is_final(epochs_done):
            return
        model = self.setup.model
        before = copy_network(model)
        self.method.compact_()
        self.relative_error = export_error(before, model, self.method.plan)
        self._wrap_again()

    def _wrap_again(self) -> None:
        self.setup.wrap_again()
        self.steps.use(self.setup.net)
