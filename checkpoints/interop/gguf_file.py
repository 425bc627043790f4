"""Writes GGUF: one file of quantised weights, which llama.cpp and all that is built on it run anywhere.

Why GGUF: its library (gguf, kept by llama.cpp's own people) quantises with numpy alone, where torchao and
optimum-quanto want a certain torch and are read by torch only. Blocks of 32 weights share a scale in fp16:
Q8_0 takes 8.5 bits a weight, Q4_0 4.5 (github.com/ggml-org/ggml/blob/master/docs/gguf.md). Under Q4_0 the
two tables of the vocabulary stay in Q8_0, which is where 4 bits hurt most; norms and biases stay in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    dequantize,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quantize,
)

from checkpoints.interop.families import config_of
from checkpoints.interop.huggingface import Export
from checkpoints.interop.shape import Counterpart, Shape
from checkpoints.interop.tokens import Vocabulary

BLOCK = 32  # weights of a row that share a scale
_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
_ROPE_FREQUENCIES = "rope_freqs.weight"

Type = GGMLQuantizationType
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """How weights are stored: all but the tables of the vocabulary, those, and the file's own name for it."""

    weights: GGMLQuantizationType
    tables: GGMLQuantizationType
    file: LlamaFileType


KINDS = {
    "int8": Kind(Type.Q8_0, Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "int4": Kind(Type.Q4_0, Type.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of the file, and what it is made of."""

    name: str
    part: Counterpart
    type: GGMLQuantizationType
    permuted_heads: int  # 0: its rows keep their order

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(quant_shape_to_byte_shape(self.part.shape, self.type))


class File:
    """A GGUF file of a checkpoint."""

    def __init__(self, work: Export, kind: Kind) -> None:
        self.work = work
        self.kind = kind
        self.family = str(config_of(work.shape, work.dtype, 1)["model_type"])
        self.architecture = _ARCHITECTURES[self.family]
        self.pieces = list(self._pieces())

    @property
    def unquantised(self) -> list[str]:
        """Matrices whose rows are no whole blocks: they stay in fp32."""
        return [p.name for p in self.pieces if len(p.part.shape) == 2 and p.type == Type.F32]

    @property
    def bytes(self) -> int:
        return sum(math.prod(piece.byte_shape) for piece in self.pieces)

    def write(
        self, path: Path, positions: int, vocabulary: Vocabulary | None, told: Callable[[int], object]
    ) -> None:
        """A tensor at a time. Raises Missing, Damaged."""
        writer = GGUFWriter(path, self.architecture.name.lower())
        self._tell_model(writer, positions)
        _tell_vocabulary(writer, vocabulary)
        factors = rope_factors(self.work.shape)
        if factors is not None:
            writer.add_tensor_info(_ROPE_FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
        for p in self.pieces:
            size = math.prod(p.byte_shape)
            if p.type == Type.F32:
                writer.add_tensor_info(
                    p.name, p.part.shape, np.dtype(np.float32), 4 * math.prod(p.part.shape)
                )
            else:
                writer.add_tensor_info(p.name, p.byte_shape, np.dtype(np.uint8), size, p.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for p in self.pieces:
            writer.write_tensor_data(self._data(p))
            told(math.prod(p.byte_shape))
        writer.close()

    def weights(self, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """What a written file holds, dequantised, under Hugging Face's names and in their order of rows."""
        held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        for p in self.pieces:
            tensor = held[p.name]
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if p.permuted_heads:
                values = _permuted(values, p.permuted_heads, back=True)
            yield p.part.theirs, torch.from_numpy(values).view(p.part.shape)

    def _data(self, piece: Piece) -> Array:
        values: Array = self.work.tensor(piece.part).to(torch.float32).numpy()
        if piece.permuted_heads:
            values = _permuted(values, piece.permuted_heads)
        return np.ascontiguousarray(quantize(values, piece.type))

    def _pieces(self) -> Iterator[Piece]:
        names = get_tensor_name_map(self.architecture, self.work.shape.layers)
        shape = self.work.shape
        heads = {"q_proj": shape.attention_heads, "k_proj": shape.query_groups}
        for part in self.work.parts:
            name = names.get_name(part.theirs, try_suffixes=(".weight", ".bias"))
            assert name is not None, part.theirs
            permuted = (
                heads.get(part.theirs.split(".")[-2], 0) if self.architecture == MODEL_ARCH.LLAMA else 0
            )
            yield Piece(name, part, self._type(part), permuted)

    def _type(self, part: Counterpart) -> GGMLQuantizationType:
        if len(part.shape) < 2 or part.shape[1] % BLOCK:
            return Type.F32
        table = part.theirs in ("model.embed_tokens.weight", "lm_head.weight")
        return self.kind.tables if table else self.kind.weights

    def _tell_model(self, writer: GGUFWriter, positions: int) -> None:
        shape = self.work.shape
        writer.add_file_type(self.kind.file)
        writer.add_quantization_version(2)  # of the blocks' form: ggml's GGML_QNT_VERSION
        writer.add_context_length(context(shape, positions))
        writer.add_vocab_size(shape.vocabulary_size)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn_hidden_size)
        writer.add_head_count(shape.attention_heads)
        writer.add_head_count_kv(shape.query_groups)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_layer_norm_rms_eps(shape.norm_epsilon)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_base)
        if shape.rope_scaling == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(shape.rope_factor)


def context(shape: Shape, positions: int) -> int:
    """The longest text for which the file computes what the model does: llama.cpp has no windows for these
    families, and up to its length a window changes nothing."""
    return min(positions, shape.sliding_window or positions)


def rope_factors(shape: Shape) -> npt.NDArray[np.float32] | None:
    """fp32 [D / 2]: by how much each pair of a head's values turns more slowly, for "llama3"."""
    if shape.rope_scaling != "llama3":
        return None
    d = shape.head_dim
    plain = shape.rope_base ** -(np.arange(0, d, 2, dtype=np.float64) / d)
    turns = shape.rope_original_positions * plain / (2 * math.pi)
    low, high = shape.rope_low_frequency, shape.rope_high_frequency
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / shape.rope_factor + share)).astype(np.float32)


def _permuted(values: Array, heads: int, *, back: bool = False) -> Array:
    """Rows of queries or keys in the order of llama.cpp's "llama", which turns neighbours, not halves."""
    pairs = (values.shape[0] // heads // 2, 2) if back else (2, values.shape[0] // heads // 2)
    return values.reshape(heads, *pairs, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _tell_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")  # a BPE of bytes, whatever its regular expression
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        if name in vocabulary.special:
            add(vocabulary.special[name])
