"""A Llama of transformers as an OpenVINO model with state, in the operators that OpenVINO's own fusions look for."""

import json
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from safetensors.numpy import load_file


def to_openvino(source: Path, target: Path) -> None:
    """Write the float32 weights and sizes in the folder `source` as `openvino_model.xml` in the folder `target`."""
    ov.save_model(_Llama(source).model(), target / "openvino_model.xml", compress_to_fp16=False)


class _Llama:
    def __init__(self, source: Path) -> None:
        self.config = json.loads((source / "config.json").read_text())
        self.weights = {name: op.constant(weight) for name, weight in load_file(source / "model.safetensors").items()}
        self.heads, self.kv_heads = (self.config[f"num_{name}_heads"] for name in ("attention", "key_value"))
        self.head_dim = self.config["head_dim"]
        self.inputs = [
            op.parameter(shape, np.int64, name=name)
            for name, shape in (("input_ids", [-1, -1]), ("attention_mask", [-1, -1]), ("position_ids", [-1, -1]))
        ]
        self.inputs.append(op.parameter([-1], np.int32, name="beam_idx"))
        for each in self.inputs:
            each.output(0).set_names({each.friendly_name})
        self.sinks: list[ov.Node] = []

    def model(self) -> ov.Model:
        tokens, padding, positions, self.beams = self.inputs
        embedding = "model.embed_tokens.weight"
        hidden = op.gather(self.weights[embedding], op.convert(tokens, "i32"), np.int32(0))
        self.rows = op.gather(op.shape_of(tokens), np.array([0]), np.int32(0))
        self.cos_sin = self._rotations(positions)
        self.mask = self._causal(positions, padding)
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{prefix}.input_layernorm")
            hidden = op.add(hidden, self._attention(normed, f"{prefix}.self_attn"))
            normed = self._norm(hidden, f"{prefix}.post_attention_layernorm")
            gate, up = (self._linear(normed, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
            hidden = op.add(hidden, self._linear(op.multiply(op.swish(gate), up), f"{prefix}.mlp.down_proj"))
        head = "lm_head.weight" if "lm_head.weight" in self.weights else embedding
        logits = op.result(self._linear(self._norm(hidden, "model.norm"), head.removesuffix(".weight")), name="logits")
        logits.output(0).set_names({"logits"})
        return ov.Model([logits], self.sinks, self.inputs)

    def _linear(self, value: ov.Node, name: str) -> ov.Node:
        return op.matmul(value, self.weights[f"{name}.weight"], False, True)

    def _norm(self, value: ov.Node, name: str) -> ov.Node:
        mean = op.reduce_mean(op.power(value, _number(2, 3)), np.array([-1]), keep_dims=True)
        scale = op.divide(_number(1, 3), op.sqrt(op.add(mean, _number(self.config["rms_norm_eps"], 3))))
        return op.multiply(op.multiply(value, scale), self.weights[f"{name}.weight"])

    def _rotations(self, positions: ov.Node) -> tuple[ov.Node, ov.Node]:
        """Cosine and sine, [B, 1, S, D] each."""
        base = self.config["rope_parameters"]["rope_theta"]
        frequencies = base ** -(np.arange(0, self.head_dim, 2, dtype=np.float32) / self.head_dim)
        places = op.convert(op.unsqueeze(positions, np.int32(2)), "f32")
        angles = op.matmul(places, frequencies[None, None], False, False)
        angles = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(angles), np.int32(1)), op.unsqueeze(op.sin(angles), np.int32(1))

    def _causal(self, positions: ov.Node, padding: ov.Node) -> ov.Node:
        """What a query sees, [B, 1, S, T]; pipelines that page the KV cache drop it."""
        known = op.unsqueeze(op.cum_sum(padding, np.int32(1)), np.array([1, 2]))  # [B, 1, 1, T]
        seen = op.less_equal(known, op.add(op.unsqueeze(positions, np.array([1, 3])), np.int64(1)))
        return op.logical_and(seen, op.convert(op.unsqueeze(padding, np.array([1, 2])), "boolean"))

    def _rotate(self, value: ov.Node) -> ov.Node:
        cos, sin = self.cos_sin
        halves = op.variadic_split(value, np.int32(3), np.array([self.head_dim // 2, self.head_dim // 2]))
        turned = op.concat([op.multiply(halves.output(1), _number(-1, 4)), halves.output(0)], -1)
        return op.add(op.multiply(value, cos), op.multiply(turned, sin))

    def _by_heads(self, value: ov.Node, heads: int) -> ov.Node:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        return op.transpose(op.reshape(value, np.array([0, 0, heads, self.head_dim]), True), np.array([0, 2, 1, 3]))

    def _cached(self, value: ov.Node, name: str) -> ov.Node:
        """The keys or values of the text so far, for all query heads: [B, Hq, T, D]."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self.kv_heads, -1, self.head_dim])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        shape = op.concat([self.rows, np.array([self.kv_heads]), np.array([0]), np.array([self.head_dim])], 0)
        past = op.gather(op.read_value(op.broadcast(np.float32(0), shape), variable), self.beams, np.int32(0))
        known = op.concat([past, value], -2)
        self.sinks.append(op.assign(known, variable))
        copies = self.heads // self.kv_heads
        if copies == 1:
            return known
        apart = op.unsqueeze(known, np.int32(2))
        spread = op.broadcast(apart, np.array([1, 1, copies, 1, 1]), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(spread, np.array([0, self.heads, -1, self.head_dim]), True)

    def _attention(self, hidden: ov.Node, name: str) -> ov.Node:
        query, key, value = (
            self._by_heads(self._linear(hidden, f"{name}.{part}_proj"), heads)
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        key = self._cached(self._rotate(key), f"{name}.key")
        value = self._cached(value, f"{name}.value")
        mixed = op.scaled_dot_product_attention(self._rotate(query), key, value, self.mask)
        side_by_side = np.array([0, 0, self.heads * self.head_dim])
        mixed = op.reshape(op.transpose(mixed, np.array([0, 2, 1, 3])), side_by_side, True)
        return self._linear(mixed, f"{name}.o_proj")


def _number(value: float, rank: int) -> np.ndarray:
    """One float32 of so many dimensions."""
    return np.full((1,) * rank, value, dtype=np.float32)
