"""`ModelLayout`: the shapes and parameter counts of a decoder, from which everything about its size follows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer; every one is a gated MLP of three matrices."""

    # In each layer that has any.
    num_experts: int
    # Inner width of one expert.
    width: int
    # Experts that a token goes through.
    top_k: int


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """One decoder layer."""

    # KV heads, as the model defines them (a runtime may replicate them).
    num_kv_heads: int
    # Of keys and values, and of queries.
    head_dim: int
    # Tokens that attention looks back on; None: all of them.
    sliding_window: int | None
    # Whether it reads an earlier layer's keys and values and keeps none of its own.
    shares_kv: bool
    # Projections of queries, keys, values and output.
    attention_parameters: int
    # MLP that every token goes through, 0 if there is none.
    mlp_parameters: int
    # Whether it has experts as well (Gemma 4) or instead (Qwen3-MoE, Mixtral).
    has_experts: bool
    # Matrix that chooses experts, 0 without experts.
    router_parameters: int
    # Per-layer input gate and projection (Gemma 4 E4B), norms, scales.
    other_parameters: int


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """A decoder as its config.json describes it; counts are of parameters, as in the published checkpoint."""

    # The shipped name, or what the caller calls it.
    name: str
    # Of config.json, such as "gemma4" or "llama".
    model_type: str
    # Weights' type in the checkpoint, such as "bfloat16".
    dtype: str
    hidden_size: int
    vocab_size: int
    num_query_heads: int
    # Longest sequence that the model was made for, tokens.
    max_position_embeddings: int
    layers: tuple[LayerLayout, ...]
    # None: a dense model.
    experts: Experts | None
    # Whether the token embeddings are the output projection, too.
    tied_embeddings: bool
    # Table that holds an input for every layer (Gemma 4 E4B), looked up once a token.
    per_layer_embedding_parameters: int
    # Projection of those inputs, final norm.
    other_parameters: int
    # Vision and audio towers with their projections.
    tower_parameters: int

    @property
    def embedding_parameters(self) -> int:
        """Of the token embeddings; the output projection has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters_per_expert(self) -> int:
        """Gate, up and down projection of one expert."""
        return 3 * self.hidden_size * self.experts.width if self.experts else 0

    @property
    def num_expert_layers(self) -> int:
        return sum(layer.has_experts for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Of all experts."""
        num_experts = self.experts.num_experts if self.experts else 0
        return self.num_expert_layers * num_experts * self.parameters_per_expert

    @property
    def dense_parameters(self) -> int:
        """What every token is multiplied with, without experts and output projection."""
        layers = sum(
            layer.attention_parameters + layer.mlp_parameters + layer.router_parameters + layer.other_parameters
            for layer in self.layers
        )
        return layers + self.other_parameters

    @property
    def body_parameters(self) -> int:
        """What one token is multiplied with, without the output projection."""
        top_k = self.experts.top_k if self.experts else 0
        return self.dense_parameters + self.num_expert_layers * top_k * self.parameters_per_expert

    @property
    def active_parameters(self) -> int:
        """The same with the output projection: 3.8 B of Gemma 4 26B-A4B."""
        return self.body_parameters + self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All of the checkpoint."""
        tables = self.embedding_parameters * (1 if self.tied_embeddings else 2) + self.per_layer_embedding_parameters
        return tables + self.dense_parameters + self.expert_parameters + self.tower_parameters

    @property
    def kv_layers(self) -> tuple[LayerLayout, ...]:
        """Layers that keep keys and values."""
        return tuple(layer for layer in self.layers if not layer.shares_kv)
