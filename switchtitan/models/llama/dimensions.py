"""The numbers that determine the shapes and the function of a LLaMA-like model."""

from dataclasses import asdict, dataclass

from switchtitan.models.llama.rope import Rope


@dataclass(frozen=True)
class LlamaDimensions:
    """Everything that determines a model's shapes and function, with `size` resolved."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of one attention head."""
    vocab_size: int
    norm_eps: float
    rope: Rope
    tied_head: bool
    init_std: float
    biased_layers: tuple[str, ...] = ()
    """Local names of the linear layers with a bias."""

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; equals that of all value heads."""
        return self.num_kv_heads * self.head_dim

    def architecture(self) -> dict[str, object]:
        """Returns what weights depend on, as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "init_std"}

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of all linear layers and an untied head, by qualified name, in
        order."""
        hidden, wide = self.hidden_size, self.intermediate_size
        of_block = {
            "self_attn.q_proj": (self.q_size, hidden),
            "self_attn.k_proj": (self.kv_size, hidden),
            "self_attn.v_proj": (self.kv_size, hidden),
            "self_attn.o_proj": (hidden, self.q_size),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shapes = {
            f"model.layers.{index}.{name}": shape
            for index in range(self.num_layers)
            for name, shape in of_block.items()
        }
        return shapes if self.tied_head else {**shapes, "lm_head": (self.vocab_size, hidden)}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all parameters of the plain model by state-dict name."""
        linears = self.linear_shapes()
        norms = [
            f"model.layers.{index}.{norm}.weight"
            for index in range(self.num_layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            **{f"{name}.weight": shape for name, shape in linears.items()},
            **{
                f"{name}.bias": (out,)
                for name, (out, _) in linears.items()
                if name.rpartition(".")[2] in self.biased_layers
            },
            **dict.fromkeys([*norms, "model.norm.weight"], (self.hidden_size,)),
        }

    def num_flops_per_token(self, seq_len: int) -> int:
        """Returns 6 N + 12 L H Q S, forward and backward (PaLM, arXiv 2204.02311, appendix B).

        N is the number of weights of all linear layers and the head, without embedding, norms and
        biases; L layers, H heads of Q features, S = `seq_len`. As in PaLM, attention is not halved
        for the causal mask, so that MFU is comparable with published figures.
        """
        num_weights = sum(out * into for out, into in self.linear_shapes().values())
        if self.tied_head:
            num_weights += self.vocab_size * self.hidden_size
        return 6 * num_weights + 12 * self.num_layers * self.q_size * seq_len
