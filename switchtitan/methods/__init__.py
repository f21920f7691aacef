"""The registry of training methods."""

from switchtitan.contracts import Method, MethodConfig
from switchtitan.methods.factors import PlainProductConfig, ProductMethod
from switchtitan.methods.full_rank import FullRank, FullRankConfig
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.methods.projected import ApolloConfig, FiraConfig, GaloreConfig, Projected
from switchtitan.methods.relora import Relora, ReloraConfig
from switchtitan.methods.sltrain import Sltrain, SltrainConfig
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.registry import Component, Registry

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
