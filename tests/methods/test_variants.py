"""Variants of PSAP for the study: what each changes, and that it changes nothing else."""

import pytest
import torch
import torch.nn.functional as F

from experiments import models
from experiments.methods.variants import GRADE, PSAPVariant
from experiments.schema import Fan, ResNetConfig, Rule, Shortcut
from psap_core import PSAP, InputError
from psap_core.suspension import filter_tensors

RESNET20 = ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a)
SETTINGS = {
    "target_macs_cut": 0.6,
    "total_epochs": 6,
    "start": 1,
    "ramp_end": 4,
    "freeze": 5,
    "pulse_batches": 3,
}


class Training:
    """Some epochs of two batches each; `pruner` may be of any class."""

    def __init__(self, make=PSAP, **settings):
        torch.manual_seed(0)
        self.model = models.build(RESNET20, 1, 10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, nesterov=True)
        self.images, self.labels = torch.randn(4, 32, 1, 8, 8), torch.randint(10, (4, 32))
        self.pruner = make(self.model, self.optimizer, self.images[0, :1], **SETTINGS, **settings)

    def loss(self, number):
        return F.cross_entropy(self.model(self.images[number]), self.labels[number])

    def epoch(self):
        for number in (0, 1):
            self.optimizer.zero_grad()
            self.loss(number).backward()
            self.optimizer.step()
        return self.pruner.end_epoch((1, 2, 3), self.loss)


def variant(rule, seed=0, **settings):
    return Training(PSAPVariant, rule=rule, seed=seed, **settings)


def test_stage_width_gives_all_layers_of_a_width_their_mean_ratio():
    plain, ours = Training().epoch().weight_sparsity_ratio, variant(Rule.stage_width)
    found = ours.epoch().weight_sparsity_ratio
    groups = ours.pruner.groups
    for group in groups:
        same = [plain[other.name] for other in groups if other.filters == group.filters]
        assert found[group.name] == pytest.approx(sum(same) / len(same))
    assert len({round(ratio, 9) for ratio in found.values()}) == 3  # stages


def test_permuted_gives_every_layer_another_ones_ratio():
    plain = Training().epoch().weight_sparsity_ratio
    first, again, other = (
        variant(Rule.permuted, seed).epoch().weight_sparsity_ratio for seed in (0, 0, 1)
    )
    assert sorted(first.values()) == sorted(plain.values())
    assert first == again != other
    assert list(first) == list(plain)
    for found in (first, other):
        assert all(found[name] != plain[name] for name in plain)


@pytest.mark.long
@pytest.mark.parametrize("scope", ["all", "coupled"])
@pytest.mark.parametrize("rule", [Rule.return_exact, Rule.return_graded])
def test_filters_of_earlier_steps_return_by_utility(rule, scope):
    training, returned = variant(rule, scope=scope), 0
    for _ in range(3):
        pruner, earlier = training.pruner, training.pruner.plan.pruned
        snapshots = pruner._snapshots
        step = training.epoch()
        for group, part in zip(pruner.groups, step.plan.layers, strict=True):
            name = group.name
            utility = {f: mean for f, (mean, _) in step.utility[name].items()}
            back = step.restored[name]
            assert set(back) | set(part.pruned) == set(utility) == set(step.proposed[name])
            if back and part.pruned:
                assert min(utility[f] for f in back) >= max(utility[f] for f in part.pruned)
            grade = GRADE if rule is Rule.return_graded else 1.0
            for f in set(back) & set(earlier[name]):
                tensors = filter_tensors(training.model, group, training.optimizer)
                saved = snapshots[name].select([f]).rows
                graded = {*tensors.silencers} - {*tensors.constants}
                graded |= {f"{silencer}:momentum_buffer" for silencer in graded}
                for tensor, rows in tensors.everything.items():
                    factor = grade if tensor in graded else 1.0
                    assert torch.equal(rows.take(tensors.index([f])), saved[tensor] * factor)
                returned += 1
    assert returned > 0


def test_lowest_utility_restores_the_other_end_of_what_was_proposed():
    training = variant(Rule.lowest_utility)
    first, second = training.epoch(), training.epoch()
    checked = 0
    for earlier, step in (({}, first), (first.plan.pruned, second)):
        for name, back in step.restored.items():
            utility = {f: mean for f, (mean, _) in step.utility[name].items()}
            anew = [f for f in step.proposed[name] if f not in earlier.get(name, ())]
            left = [utility[f] for f in anew if f not in back]
            if back and left:
                assert max(utility[f] for f in back) <= min(left)
                checked += 1
    assert checked > 0


def test_streams_only_chooses_by_utility_where_several_layers_write_and_by_norm_elsewhere():
    plain = Training(scope="coupled").epoch()
    training = variant(Rule.streams_only, scope="coupled")
    measure, measured = training.pruner._measure, []

    def measure_and_tell(tensors):
        measured.append(measure(tensors))
        return measured[-1]

    training.pruner._measure = measure_and_tell
    ours = training.epoch()
    ((_, norms),) = measured
    assert ours.utility == plain.utility
    chosen_otherwise = []
    for group in training.pruner.groups:
        name, back = group.name, ours.restored[group.name]
        if len(group.writers) > 1:
            assert back == plain.restored[name]
            continue
        left = {*ours.proposed[name]}.difference(back)
        if back and left:
            sizes = norms[name].tolist()
            assert min(sizes[f] for f in back) >= max(sizes[f] for f in left)
        if back != plain.restored[name]:
            chosen_otherwise.append(name)
    assert chosen_otherwise  # the norm and the utility do not agree in every layer


def test_plain_psap_gives_back_no_filter_of_an_earlier_step_while_counts_grow():
    training = Training()
    for _ in range(3):
        earlier = training.pruner.plan.pruned
        step = training.epoch()
        counts = {part.name: len(part.pruned) for part in step.plan.layers}
        for name, filters in earlier.items():
            assert counts[name] < len(filters) or not set(filters) & set(step.restored[name])


def test_a_return_by_utility_needs_the_pulse():
    with pytest.raises(InputError, match="rule=return_exact chooses by the pulse: it needs method"):
        Training(PSAPVariant, rule=Rule.return_exact, seed=0, protection=False)


def test_streams_only_needs_streams():
    with pytest.raises(InputError, match=r"streams_only needs groups .* method\.scope=coupled"):
        variant(Rule.streams_only, scope="all")


def test_a_state_of_another_rule_is_refused():
    state = variant(Rule.return_exact).pruner.state_dict()
    with pytest.raises(InputError, match="saved with rule"):
        variant(Rule.return_graded).pruner.load_state_dict(state)
