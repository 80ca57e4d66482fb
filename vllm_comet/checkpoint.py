# SPDX-License-Identifier: Apache-2.0
"""The COMET checkpoint format: the one definition that the calibrator writes and the vLLM plugin reads.

Config section (``quantization_config`` of ``config.json``), linear-layer tensors, bit packing, checksums and
validation. Needs torch and safetensors only; nothing of vLLM, nothing of the calibrator.

A quantised linear layer ``P`` computes ``y = x Wᵀ`` with ``W: [N, K]``. Its K input channels stand in *stored order*:
position ``j`` holds the model's channel ``input_perm[j]`` (identity if the tensor is absent, because the permutation
was folded into the layer that produces x). K is cut in blocks of 128 positions, the last may be short.

    W[n, input_perm[j]] = weight_scale[n] · g[n, j // group_size] · (q[n, j] − 8)

========================  =======  =========================  ====================================================
tensor                    dtype    shape                      meaning
========================  =======  =========================  ====================================================
``P.weight_packed``       int32    ``[N, K/8]``               q in 0..15, compressed-tensors' packing, low nibble first
``P.weight_scale``        float32  ``[N]``                    c, one positive float per output channel
``P.weight_group_scale``  uint8    ``[N, ceil(K/group_size)]``  g in 1..16; absent for group_size −1, where g ≡ 16
``P.input_perm``          int32    ``[K]``                    optional; stays inside each of ``tensor_parallel``
                                                              equal slices of K where a layer is row-parallel
``P.act_bits``            uint8    ``[ceil(K/128)]``          4 or 8: the activation bits that the block tolerates
``P.bias``                float    ``[N]``                    optional, in the model's dtype
========================  =======  =========================  ====================================================

With ``kv_cache.k_offset``, an attention module ``A`` has ``A.k_offset``, float32 ``[KV heads, head_dim]``: what is
subtracted from K, after RoPE, before the 4-bit cache stores it. Softmax does not see it, so nothing adds it back.

Every safetensors file carries a CRC-32 of each tensor in its metadata, so a damaged file is refused by the name of
the tensor and never served.
"""

from __future__ import annotations

import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_comet.checksum import Range, range_crc32s

QUANT_METHOD = "comet"
FORMAT_VERSION = 1
BLOCK = 128
"""Channels that share one activation precision."""
GROUP_SIZES = (128, 64, -1)
ACT_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 96, 128)
CHECKSUM_KEY = "comet_crc32"

WEIGHT_PACKED = "weight_packed"
WEIGHT_SCALE = "weight_scale"
WEIGHT_GROUP_SCALE = "weight_group_scale"
INPUT_PERM = "input_perm"
ACT_BITS_NAME = "act_bits"
COMET_SUFFIXES = (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_GROUP_SCALE, INPUT_PERM, ACT_BITS_NAME)
K_OFFSET = "k_offset"


class CheckpointError(ValueError):
    """A checkpoint that does not follow the format; the message names the tensor or key, what was found and the fix."""


# ---------------------------------------------------------------------------------------------------- config section
@dataclass(frozen=True)
class KVCacheFormat:
    """4-bit asymmetric KV cache: one fp16 scale and zero-point per (token, KV head, ``group_size`` channels).

    k_offset: whether every attention module has an offset for its K; older checkpoints have none.
    """

    group_size: int
    bits: int = 4
    k_offset: bool = False


@dataclass(frozen=True)
class CometFormat:
    """The ``quantization_config`` section of a COMET checkpoint.

    group_size: channels that share one integer weight scale g (128, 64, or -1 for none).
    ignore: module names (exact, or ``re:`` patterns) that stay in the model's dtype, in the checkpoint's naming.
    kv_cache: the 4-bit KV cache the model was calibrated for, or None for the model's dtype.
    tensor_parallel: largest tensor-parallel size the stored permutations allow; every divisor works too.
    producer: free-form record of how the checkpoint was made; never read back by the plugin.
    """

    group_size: int = 128
    ignore: tuple[str, ...] = ("lm_head",)
    kv_cache: KVCacheFormat | None = None
    tensor_parallel: int = 1
    version: int = FORMAT_VERSION
    producer: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "group_size": self.group_size,
            "ignore": list(self.ignore),
            "kv_cache": None if self.kv_cache is None else asdict(self.kv_cache),
            "tensor_parallel": self.tensor_parallel,
            "producer": self.producer,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> CometFormat:
        """Parse and validate; raises CheckpointError naming the key, its value and the allowed ones."""
        known = {"quant_method", "version", "group_size", "ignore", "kv_cache", "tensor_parallel", "producer"}
        _require(raw.get("quant_method") == QUANT_METHOD, "quant_method", raw.get("quant_method"), f"'{QUANT_METHOD}'")
        if raw.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config.version is {raw.get('version')!r}; this vllm-comet reads version "
                f"{FORMAT_VERSION}. Calibrate the model again, or install the vllm-comet that wrote it."
            )
        unknown = sorted(set(raw) - known)
        _require(not unknown, "keys", unknown, f"only {sorted(known)}")
        group_size: Any = raw.get("group_size")
        _require(group_size in GROUP_SIZES, "group_size", group_size, f"one of {GROUP_SIZES}")
        ignore = raw.get("ignore", [])
        ignore_ok = isinstance(ignore, list) and all(isinstance(i, str) for i in ignore)
        _require(ignore_ok, "ignore", ignore, "a list of module names")
        tp = raw.get("tensor_parallel", 1)
        _require(type(tp) is int and tp >= 1, "tensor_parallel", tp, "a positive integer")
        return cls(group_size, tuple(ignore), _parse_kv_cache(raw.get("kv_cache")), tp, FORMAT_VERSION,
                   dict(raw.get("producer") or {}))


def _require(ok: bool, key: str, found: object, allowed: str) -> None:
    if not ok:
        raise CheckpointError(f"quantization_config.{key} is {found!r}; allowed: {allowed}.")


def _parse_kv_cache(raw: Any) -> KVCacheFormat | None:
    if raw is None:
        return None
    _require(isinstance(raw, dict), "kv_cache", raw, "null or {bits, group_size, k_offset}")
    _require(raw.get("bits") == 4, "kv_cache.bits", raw.get("bits"), "4")
    _require(raw.get("group_size") in KV_GROUP_SIZES, "kv_cache.group_size", raw.get("group_size"),
             f"one of {KV_GROUP_SIZES}")
    k_offset = raw.get("k_offset", False)
    _require(type(k_offset) is bool, "kv_cache.k_offset", k_offset, "true or false")
    return KVCacheFormat(raw["group_size"], k_offset=k_offset)


# ------------------------------------------------------------------------------------------------ linear-layer tensors
def num_blocks(k: int) -> int:
    return -(-k // BLOCK)


def num_groups(k: int, group_size: int) -> int:
    return 0 if group_size == -1 else -(-k // group_size)


def linear_tensors(n: int, k: int, group_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every comet tensor of a linear layer ``[n, k]``, by suffix (``input_perm`` is optional)."""
    if k % 8:
        raise CheckpointError(f"a linear layer with K = {k} input channels can't be stored: K must be a multiple of 8. "
                              "Add the layer to `ignore`.")
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        WEIGHT_PACKED: ((n, k // 8), torch.int32),
        WEIGHT_SCALE: ((n,), torch.float32),
        INPUT_PERM: ((k,), torch.int32),
        ACT_BITS_NAME: ((num_blocks(k),), torch.uint8),
    }
    if group_size != -1:
        spec[WEIGHT_GROUP_SCALE] = ((n, num_groups(k, group_size)), torch.uint8)
    return spec


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Codes 0..15, any integer dtype ``[N, K]`` → int32 ``[N, K/8]`` in compressed-tensors' packing."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32((q.to(torch.int16) - 8).to(torch.int8), 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int32 ``[N, K/8]`` → codes 0..15 as uint8 ``[N, K]``; the inverse of :func:`pack_int4`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


def integer_weight(packed: torch.Tensor, group_scale: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """The integer weight g·(q−8) as int8 ``[N, K]``: what every kernel multiplies by. Always fits int8 (−128..112)."""
    q = unpack_int4(packed).to(torch.int16) - 8
    if group_scale is None:
        return (q * 16).to(torch.int8)
    k = q.shape[1]
    g = group_scale.to(torch.int16).repeat_interleave(group_size, dim=1)[:, :k]
    return (q * g).to(torch.int8)


def check_permutation(perm: torch.Tensor, slices: int, name: str) -> None:
    """Raise CheckpointError unless ``perm`` ``[K]`` permutes each of ``slices`` equal parts of 0..K−1 in itself."""
    k = perm.numel()
    if k % slices:
        raise CheckpointError(f"{name}: K = {k} channels can't be cut in {slices} tensor-parallel slices.")
    width = k // slices
    expect = torch.arange(k, dtype=perm.dtype, device=perm.device).view(slices, width)
    found = perm.detach().view(slices, width).sort(dim=1).values
    if not torch.equal(found, expect):
        bad = int((found != expect).any(dim=1).nonzero()[0])
        raise CheckpointError(f"{name} is not a permutation of channels {bad * width}..{(bad + 1) * width - 1} in its "
                              f"positions {bad * width}..{(bad + 1) * width - 1} (slice {bad} of {slices}).")


def check_values(tensors: dict[str, torch.Tensor], prefix: str, k: int) -> None:
    """Raise CheckpointError unless the small tensors of layer ``prefix`` (K = ``k``) hold only allowed values."""
    scale = tensors[WEIGHT_SCALE]
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{prefix}.{WEIGHT_SCALE} holds values that are not positive and finite.")
    bits = tensors[ACT_BITS_NAME]
    if not bool(((bits == 4) | (bits == 8)).all()):
        raise CheckpointError(f"{prefix}.{ACT_BITS_NAME} holds {sorted(set(bits.tolist()))}; allowed: {ACT_BITS}.")
    if k % BLOCK and bool((bits == 8).any()) and int(bits[-1]) != 8:
        raise CheckpointError(f"{prefix}.{ACT_BITS_NAME}: the short last block ({k % BLOCK} channels) must be INT8, "
                              "because other blocks are and INT8 blocks come last.")
    group = tensors.get(WEIGHT_GROUP_SCALE)
    least, most = torch.aminmax(group) if group is not None and group.numel() else (1, 16)
    if not 1 <= least <= most <= 16:
        raise CheckpointError(f"{prefix}.{WEIGHT_GROUP_SCALE} holds values outside 1..16.")


# ----------------------------------------------------------------------------------------------- files and verification
@dataclass(frozen=True)
class CheckpointSummary:
    """What :func:`verify_checkpoint` found: quantised layer names, bytes of all tensors, the bytes they would take with
    the quantised weights in bf16, and the mean INT8 share by channel."""

    layers: tuple[str, ...]
    num_bytes: int
    bf16_bytes: int
    int8_share: float


@dataclass(frozen=True)
class _Entry:
    """One tensor in a safetensors file: dtype as the file spells it, shape, byte range from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    crc32: str | None


_FILE_DTYPES = {torch.int32: "I32", torch.uint8: "U8", torch.float32: "F32"}


def tensor_crc32(tensor: torch.Tensor) -> str:
    """CRC-32 of the tensor's bytes in row-major order, 8 hex digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data):08x}"


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file with the format's metadata (CRC-32 of every tensor)."""
    from safetensors.torch import save_file

    checksums = {name: tensor_crc32(tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt", CHECKSUM_KEY: json.dumps(checksums, sort_keys=True)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file, which the library writes at random: equal tensors make equal bytes."""
    with path.open("r+b") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) > length:
            raise CheckpointError(f"{path}: the header written by safetensors can't be put in order.")
        handle.seek(8)
        handle.write(data.ljust(length))


def verify_checkpoint(directory: Path | str, contents: bool = True) -> CheckpointSummary:
    """Check config, file list, tensor names, shapes, dtypes, values and (``contents``) checksums of a checkpoint.

    Raises CheckpointError naming the file and tensor, what was found and what was expected.
    """
    directory = Path(directory)
    fmt = CometFormat.from_dict(_read_json(directory / "config.json").get("quantization_config") or {})
    entries = _read_entries(directory)
    layers = sorted({name.rsplit(".", 1)[0] for name in entries if name.endswith(f".{WEIGHT_PACKED}")})
    for name in entries:
        layer, _, suffix = name.rpartition(".")
        if suffix in COMET_SUFFIXES and layer not in layers:
            raise CheckpointError(f"{name} has no {layer}.{WEIGHT_PACKED} beside it.")
    for layer in layers:
        _check_layer(layer, entries, fmt)
    _check_offsets(entries, fmt)
    with ThreadPoolExecutor(1) as beside:
        checked = beside.submit(_check_contents, entries if contents else {})
        try:
            return _summarize(layers, entries)
        finally:
            checked.result()  # that a tensor is damaged says more than what its values break


def _summarize(layers: list[str], entries: dict[str, _Entry]) -> CheckpointSummary:
    """Check the values of the small tensors, and sum up."""
    num_bytes = sum(e.end - e.start for e in entries.values())
    bf16_bytes = num_bytes
    channels = high = 0
    for layer in layers:
        n, k = entries[f"{layer}.{WEIGHT_PACKED}"].shape
        k *= 8
        small = {s: read_tensor(entries[f"{layer}.{s}"]) for s in COMET_SUFFIXES[1:] if f"{layer}.{s}" in entries}
        check_values(small, layer, k)
        if INPUT_PERM in small:
            check_permutation(small[INPUT_PERM], 1, f"{layer}.{INPUT_PERM}")
        bits = small[ACT_BITS_NAME].repeat_interleave(BLOCK)[:k]
        high += int((bits == 8).sum())
        channels += k
        bf16_bytes += 2 * n * k - sum(
            entries[f"{layer}.{s}"].end - entries[f"{layer}.{s}"].start for s in (WEIGHT_PACKED, *small))
    return CheckpointSummary(tuple(layers), num_bytes, bf16_bytes, high / max(channels, 1))


def read_tensor(entry: _Entry) -> torch.Tensor:
    dtype = {"I32": torch.int32, "U8": torch.uint8, "F32": torch.float32}[entry.dtype]
    return torch.frombuffer(bytearray(_read_bytes(entry)), dtype=dtype).view(entry.shape)


def _read_bytes(entry: _Entry) -> bytes:
    with entry.file.open("rb") as handle:
        handle.seek(entry.start)
        return handle.read(entry.end - entry.start)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _read_entries(directory: Path) -> dict[str, _Entry]:
    """Headers of all safetensors files that the index (or, without one, the folder) names."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        where: dict[str, str] = _read_json(index).get("weight_map", {})
        files = sorted(set(where.values()))
    else:
        where, files = {}, sorted(p.name for p in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no safetensors file.")
    entries: dict[str, _Entry] = {}
    for name in files:
        entries.update(_read_header(directory / name))
    missing = sorted(tensor for tensor in where if tensor not in entries)
    if missing:
        raise CheckpointError(f"{directory / where[missing[0]]} lacks tensor {missing[0]}, listed in {index.name}.")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing.")
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        checksums = json.loads(metadata.get(CHECKSUM_KEY, "{}"))
        entries = {
            name: _Entry(path, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0],
                         8 + length + info["data_offsets"][1], checksums.get(name))
            for name, info in header.items()
        }
    except (ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}. Copy it again.") from None
    for name, entry in entries.items():
        if entry.end > size:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes, tensor {name} ends at {entry.end}. "
                                  "Copy it again.")
    return entries


def _check_layer(layer: str, entries: dict[str, _Entry], fmt: CometFormat) -> None:
    n, packed = entries[f"{layer}.{WEIGHT_PACKED}"].shape
    spec = linear_tensors(n, packed * 8, fmt.group_size)
    for suffix, (shape, dtype) in spec.items():
        entry = entries.get(f"{layer}.{suffix}")
        if entry is None:
            if suffix == INPUT_PERM:
                continue
            raise CheckpointError(f"{layer}.{suffix} is missing; the layer needs {sorted(set(spec) - {INPUT_PERM})}.")
        if entry.shape != shape or entry.dtype != _FILE_DTYPES[dtype]:
            raise CheckpointError(f"{layer}.{suffix} in {entry.file.name} is {entry.dtype} {list(entry.shape)}; "
                                  f"expected {_FILE_DTYPES[dtype]} {list(shape)} for group_size {fmt.group_size}.")
    if fmt.group_size == -1 and f"{layer}.{WEIGHT_GROUP_SCALE}" in entries:
        raise CheckpointError(f"{layer}.{WEIGHT_GROUP_SCALE} must not be there: group_size is -1.")
    if f"{layer}.weight" in entries:
        raise CheckpointError(f"{layer}.weight stands beside {layer}.{WEIGHT_PACKED}: a layer is quantised or not.")


def _check_offsets(entries: dict[str, _Entry], fmt: CometFormat) -> None:
    wanted = fmt.kv_cache is not None and fmt.kv_cache.k_offset
    attentions = {name.rpartition("self_attn.")[0] + "self_attn" for name in entries if ".self_attn." in name}
    for name in (f"{attention}.{K_OFFSET}" for attention in sorted(attentions)):
        entry = entries.get(name)
        if (entry is not None) != wanted:
            raise CheckpointError(f"{name} is {'missing' if wanted else 'there'}: quantization_config.kv_cache."
                                  f"{K_OFFSET} is {str(wanted).lower()}.")
        if entry is not None and (entry.dtype != "F32" or len(entry.shape) != 2):
            raise CheckpointError(f"{name} in {entry.file.name} is {entry.dtype} {list(entry.shape)}; expected F32 "
                                  "[KV heads, head_dim].")
        if entry is not None and not bool(torch.isfinite(read_tensor(entry)).all()):
            raise CheckpointError(f"{name} in {entry.file.name} holds values that are not finite.")


def _check_contents(entries: dict[str, _Entry]) -> None:
    for name, entry in entries.items():
        if entry.crc32 is None:
            raise CheckpointError(f"{entry.file} carries no checksum for {name}: it was not written by this format.")
    try:
        found = range_crc32s([Range(entry.file, entry.start, entry.end) for entry in entries.values()])
    except EOFError as error:
        raise CheckpointError(f"{error} Copy it again.") from None
    for (name, entry), crc in zip(entries.items(), found, strict=True):
        if f"{crc:08x}" != entry.crc32:
            raise CheckpointError(f"{name} in {entry.file} is damaged: CRC-32 {crc:08x}, expected {entry.crc32}. Copy "
                                  "the file again.")
