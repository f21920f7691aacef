"""The registry of training methods."""

from switchtitan.contracts import Method, MethodConfig, OptimizerConfig, TrainedModel
from switchtitan.methods.factors import PlainProductConfig, ProductMethod
from switchtitan.methods.full_rank import FullRank, FullRankConfig
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.methods.projected import ApolloConfig, FiraConfig, GaloreConfig, Projected
from switchtitan.methods.relora import Relora, ReloraConfig
from switchtitan.methods.sltrain import Sltrain, SltrainConfig
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.methods.targets import TargetConfig
from switchtitan.optim.parameters import own_head
from switchtitan.registry import Component, Registry, is_installed, needs_package, toml_value

METHODS: Registry[MethodConfig, Method] = Registry(
    "method",
    {
        "apollo": Component(ApolloConfig, Projected),
        "fira": Component(FiraConfig, Projected),
        "full_rank": Component(FullRankConfig, FullRank),
        "galore": Component(GaloreConfig, Projected),
        "lora": Component(LoraConfig, Lora),
        "low_rank": Component(PlainProductConfig, ProductMethod),
        "relora": Component(ReloraConfig, Relora),
        "sltrain": Component(SltrainConfig, Sltrain),
        "switchlora": Component(SwitchLoraConfig, SwitchLora),
    },
)


def optimizer_problems(
    method: MethodConfig, optimizer: OptimizerConfig, model: TrainedModel
) -> list[str]:
    """Returns why an optimizer cannot train a model with a method, or on this machine."""
    problems, name = [], f"[optimizer] name = {toml_value(optimizer.name)}"
    if method.optimizers is not None and optimizer.name not in method.optimizers:
        problems.append(
            f"{name}: [method] name = {toml_value(method.name)} cannot train with it; choose "
            f"{' or '.join(sorted(method.optimizers))}, or another method"
        )
    if optimizer.package is not None and not is_installed(optimizer.package):
        problems.append(needs_package(name, optimizer.package))
    head = own_head(model)
    if optimizer.needs_head and head is None:
        problems.append(
            f"{name}: treats the head's weight apart, and the model's head is tied to the "
            "embedding, or not known; untie it (for LLaMA, [model] tied_head = false), or choose "
            "another optimizer"
        )
    if optimizer.tuned_hidden_size is not None:
        key = f"[optimizer] tuned_hidden_size = {optimizer.tuned_hidden_size}"
        if method.width_exponents() is None or optimizer.width_exponent is None:
            problems.append(
                f"{key}: was checked with adamw and muon, for full_rank, switchlora, and lora with "
                f'init = "balanced"; remove it, or change [method] or {name}'
            )
        is_target = isinstance(method, TargetConfig) and head in method.targeted(model).values()
        if head is None or model.hidden_size() is None or is_target:
            problems.append(
                f"{key}: was checked for LLaMA with a head of its own that is no target; this "
                "model is another, or its head is tied or a target; remove it"
            )
    return problems
