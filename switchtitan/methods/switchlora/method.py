"""The method SwitchLoRA: a model's layers, and the optimizer that switches, then updates."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from switchtitan.contracts import OptimizerConfig, TrainedModel, TrainingOptimizer
from switchtitan.distributed.initial import GeneratorFor
from switchtitan.distributed.rows import (
    RowSpans,
    ShardedRows,
    Spans,
    copy_all_,
    cut,
    gather_rows,
    paired_rows,
)
from switchtitan.distributed.shards import shard_group
from switchtitan.methods.adapter.linear import AdapterLinear, adapter_layers
from switchtitan.methods.adapter.method import AdapterMethod
from switchtitan.methods.adapter.rounding import FrozenWeights
from switchtitan.methods.switchlora.candidates import (
    BUFFERS,
    Candidates,
    DrawnCandidates,
    HostCandidates,
    StoredCandidates,
)
from switchtitan.methods.switchlora.plan import FACTOR_A, FACTOR_B, Plan, Switch, SwitchLoraConfig
from switchtitan.methods.switchlora.update import FactorMuon, Factors, VectorAdamW
from switchtitan.methods.targets import FACTORS
from switchtitan.numerics.random import generator_for
from switchtitan.numerics.split_float import join, split
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.adamw import AdamKeys
from switchtitan.optim.base import SplitOptimizer
from switchtitan.optim.muon import MuonKeys
from switchtitan.regions import region


class SwitchLoraLinear(AdapterLinear):
    """An `AdapterLinear` whose vectors are switched.

    Candidates are random vectors, as many for each factor as the smaller dimension of the weight. A
    and B start as copies of some. With stored candidates, all are in the buffers `candidates_a` [c,
    in] and `candidates_b` [c, out], sharded like the factors.
    """

    def store_candidates(self, on_host: bool) -> None:
        """Adds the buffers; `on_host`: they stay in host memory."""
        self.sharded_buffers, self.host_buffers = BUFFERS, BUFFERS if on_host else ()
        for name, width in zip(BUFFERS, (self.in_features, self.out_features), strict=True):
            self.register_buffer(name, torch.empty(self.num_candidates, width))

    @property
    def num_candidates(self) -> int:
        return min(self.plain_shape)

    def initial_slots(self) -> tuple[Tensor, Tensor]:
        """Returns the candidates that the vectors of A and B are copies of, [rank] each: the last
        ones of the ring, with B's rotated by half a rank."""
        slots = self.num_candidates - self.rank + torch.arange(self.rank)
        return slots, slots.roll(self.rank // 2)

    def initial_tensors(
        self, weight: Tensor, generator_for: GeneratorFor, rows: Mapping[str, range]
    ) -> dict[str, Tensor]:
        tensors = super().initial_tensors(weight, generator_for, rows)
        for name, factor in zip(self.sharded_buffers, FACTORS, strict=False):  # none if drawn
            slots = torch.arange(rows[name].start, rows[name].stop)
            tensors[name] = self.draw(factor, slots, generator_for)
        return tensors


class SwitchLora(AdapterMethod[SwitchLoraConfig]):
    """Low-rank factors whose vectors are exchanged with candidates throughout training."""

    layer_type = SwitchLoraLinear

    def build_layer(self, name: str, linear: nn.Linear) -> SwitchLoraLinear:
        layer = super().build_layer(name, linear)
        assert isinstance(layer, SwitchLoraLinear)
        if self.config.candidates == "swap":
            layer.store_candidates(on_host=self.config.candidates_device == "host")
        return layer

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        layers = adapter_layers(model)
        num_candidates = np.array([min(layer.plain_shape) for layer in layers.values()])
        plan = Plan(self.config, self.num_steps, num_candidates)
        trained = {entry.name: entry for entry in self.trained_parameters(model, config)}
        factors = Factors([trained.pop(f"{name}.{key}") for key in FACTORS for name in layers])
        rule: VectorAdamW | FactorMuon
        if config.orthogonalizes:
            assert isinstance(config, MuonKeys)
            rule = FactorMuon(config, factors, plan, compile_step)
        else:
            assert isinstance(config, AdamKeys)  # see `SwitchLoraConfig.optimizers`
            rule = VectorAdamW(config, factors, plan, compile_step)
        others = OPTIMIZERS.build(config, trained.values(), compile_step)
        weights = FrozenWeights(layers, self.seed, compile_step)
        return SwitchLoraOptimizer(layers, plan, rule, others, self.candidates_of(layers), weights)

    def candidates_of(self, layers: Mapping[str, AdapterLinear]) -> Candidates:
        """Returns the candidates of these layers, by qualified name."""
        modules = list(layers.values())
        if self.config.candidates == "swap":
            is_on_host = self.config.candidates_device == "host"
            return (HostCandidates if is_on_host else StoredCandidates)(modules)
        keys = [
            [generator_for(self.seed, f"{name}.{factor}").initial_seed() for factor in FACTORS]
            for name in layers
        ]
        return DrawnCandidates(modules, torch.tensor(keys))


class SwitchLoraOptimizer(SplitOptimizer):
    """SwitchLoRA (arXiv 2406.06564, Algorithm 2) for all layers, on local shards.

    Neither a torch optimizer nor a hook of one: torch's checkpointing steps an optimizer to create
    its state, and a switch must not happen then. `rule` trains the factors of the layers, which are
    in the order of `plan`, and `others` all other parameters.
    """

    def __init__(
        self,
        layers: Mapping[str, AdapterLinear],
        plan: Plan,
        rule: VectorAdamW | FactorMuon,
        others: TrainingOptimizer,
        candidates: Candidates,
        weights: FrozenWeights,
    ) -> None:
        super().__init__([others, rule])
        self._plan, self._rule, self._candidates, self._weights = plan, rule, candidates, weights
        names = [[f"{name}.{factor}" for factor in FACTORS] for name in layers]
        tables = rule.parameters, rule.weights.low_bits
        # Rows of A and B of each layer, and of their low bits, if they have any.
        self._stored = [
            [[ShardedRows(table[name]) for name in pair if name in table] for pair in names]
            for table in tables
        ]
        self._group = shard_group(rule.parameters[names[0][0]])
        self._last: list[Switch] = []

    def step(self) -> None:
        """Switches vectors, then updates all parameters that are not frozen."""
        with region("switch"):
            self.switch()
        super().step()

    @torch.no_grad()
    def switch(self) -> None:
        """Exchanges vectors for candidates, and resets and freezes their counterparts.

        One fold into each layer's weight, and a few list operations for the rest, for any number of
        vectors. A fold keeps the layer's output (Algorithm 1), one update of rank 2k for vectors I
        of A and J of B, which are disjoint:
        W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]).

        Gradients are those of before the switch. A switched vector's stays right: it depends on the
        counterpart and on W + s B A, which stay. So the incoming vector also inherits the state of
        the outgoing one. A counterpart's gradient and state belong to the vector that has left: it
        is reset, and frozen for some steps, the first of which discards that gradient.
        """
        switches = self._last = self._plan.next()
        self._plan.advance(switches)
        if not switches:
            return
        # A and B of each layer: the rows to write, and I and J of both factors.
        layers, switched = [s.layer for s in switches], [s.vectors for s in switches]
        both = [[sum(vectors, ())] * 2 for vectors in switched]
        involved, low_bits = (rows_of(layers, parts, both) for parts in self._stored)
        requests = [*involved, *self._candidates.row_requests(switches)]
        gathered = gather_rows(requests, self._group, low_bits)
        vectors = gathered[: len(involved)]
        incoming = self._candidates.take(switches, gathered[len(involved) :])
        written = [incoming]
        if low_bits:
            shapes = [rows.shape for rows in incoming]
            high, low = split(torch.cat([rows.flatten() for rows in incoming]).to(torch.float32))
            written, incoming = [cut(high, shapes), cut(low, shapes)], cut(join(high, low), shapes)
        outgoing = [
            rows.narrow(0, factor * switch.num_vectors, switch.num_vectors)
            for (switch, factor), rows in zip(
                product(switches, (FACTOR_A, FACTOR_B)), vectors, strict=True
            )
        ]
        self._candidates.put_back(switches, outgoing)
        # In place: `outgoing` are views of `vectors`, and now hold old - new.
        torch._foreach_sub_(outgoing, incoming)
        folds = zip(layers, vectors[::2], vectors[1::2], strict=True)
        self._weights.add_products_(self._plan.step, folds)
        for parts, rows in zip(self._stored, written, strict=False):
            copy_all_(paired_rows(rows_of(layers, parts, switched), rows))
        self._rule.reset()

    def metrics(self) -> dict[str, float]:
        """Adds, over all layers and both factors, the vectors switched in the last step and in
        total, and the shares of frozen vectors and of candidates used so far."""
        plan = self._plan
        seen = np.minimum(plan.config.rank + plan.num_switched, plan.num_candidates)
        return super().metrics() | {
            "switch/vectors_switched": float(2 * sum(switch.num_vectors for switch in self._last)),
            "switch/vectors_switched_total": float(2 * plan.num_switched.sum()),
            "switch/frozen_share": float(plan.is_frozen().mean()),
            "switch/candidate_coverage": float((seen / plan.num_candidates).mean()),
        }

    def replicated(self) -> dict[str, Tensor]:
        keys = self._weights.replicated() | self._candidates.replicated()
        return super().replicated() | keys

    def state_dict(self) -> dict[str, Tensor]:
        """Candidates still in flight are first written to the model's buffers."""
        self._candidates.flush()
        return super().state_dict() | self._plan.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._plan.load_state_dict(state)


def rows_of(
    layers: list[int], parts: list[list[ShardedRows]], spans: Sequence[Sequence[Spans]]
) -> list[RowSpans]:
    """Returns rows of A, then of B, of these layers; none of a layer without parts."""
    pairs = zip(layers, spans, strict=True)
    return [RowSpans(*item) for layer, of in pairs for item in zip(parts[layer], of, strict=False)]
