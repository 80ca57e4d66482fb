# SPDX-License-Identifier: Apache-2.0
"""The format: packing, config schema, and a verification that names what is wrong."""

import json
import zlib

import pytest
import tiny
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vllm_comet import checkpoint as ck
from vllm_comet import checksum

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40).map(lambda n: 8 * n))


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_pack_round_trip_in_compressed_tensors_layout(shape, seed):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))
    packed = ck.pack_int4(codes)
    assert packed.shape == (shape[0], shape[1] // 8) and packed.dtype == torch.int32
    assert torch.equal(ck.unpack_int4(packed), codes.to(torch.uint8))
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size(shape)), (codes - 8).to(torch.int8))


@pytest.mark.parametrize("group_size", ck.GROUP_SIZES)
@pytest.mark.parametrize("k", [128, 200, 576, 1536])
def test_integer_weight_is_group_scale_times_centred_code(group_size, k):
    codes = torch.randint(0, 16, (5, k))
    scale = None if group_size == -1 else torch.randint(1, 17, (5, ck.num_groups(k, group_size)), dtype=torch.uint8)
    weight = ck.integer_weight(ck.pack_int4(codes), scale, group_size)
    for n, j in ((0, 0), (4, k - 1), (2, k // 2)):
        g = 16 if scale is None else int(scale[n, j // group_size])
        assert int(weight[n, j]) == g * (int(codes[n, j]) - 8)
    assert weight.dtype == torch.int8


formats = st.builds(
    ck.CometFormat,
    group_size=st.sampled_from(ck.GROUP_SIZES),
    ignore=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    kv_cache=st.none() | st.builds(
        ck.KVCacheFormat, group_size=st.sampled_from(ck.KV_GROUP_SIZES), k_offset=st.booleans()),
    tensor_parallel=st.integers(1, 8),
)


@given(formats)
def test_config_round_trip_through_json(fmt):
    assert ck.CometFormat.from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


@pytest.mark.parametrize("change, message", [
    ({"version": 2}, "version is 2; this vllm-comet reads version 1"),
    ({"group_size": 32}, r"group_size is 32; allowed: one of \(128, 64, -1\)"),
    ({"kv_cache": {"bits": 8, "group_size": 64}}, "kv_cache.bits is 8; allowed: 4"),
    ({"kv_cache": {"bits": 4, "group_size": 48}}, "kv_cache.group_size is 48"),
    ({"kv_cache": {"bits": 4, "group_size": 64, "k_offset": 1}}, "kv_cache.k_offset is 1; allowed: true or false"),
    ({"ignore": "lm_head"}, "ignore is 'lm_head'; allowed: a list"),
    ({"tensor_parallel": 0}, "tensor_parallel is 0"),
    ({"wieghts": 1}, "keys is .'wieghts'."),
])
def test_config_errors_name_key_value_and_allowed(change, message):
    with pytest.raises(ck.CheckpointError, match=message):
        ck.CometFormat.from_dict(ck.CometFormat().to_dict() | change)


def test_a_section_from_before_k_offset_has_none():
    section = ck.CometFormat(kv_cache=ck.KVCacheFormat(64, k_offset=True)).to_dict()
    del section["kv_cache"]["k_offset"]
    assert ck.CometFormat.from_dict(section).kv_cache == ck.KVCacheFormat(64)


@pytest.mark.parametrize("perm, slices, ok", [
    ([1, 0, 3, 2], 2, True), ([2, 0, 3, 1], 1, True), ([2, 0, 3, 1], 2, False), ([0, 0, 2, 3], 1, False),
])
def test_permutation_stays_in_its_slices(perm, slices, ok):
    if ok:
        ck.check_permutation(torch.tensor(perm), slices, "p")
    else:
        with pytest.raises(ck.CheckpointError, match="p is not a permutation of channels 0"):
            ck.check_permutation(torch.tensor(perm), slices, "p")


@pytest.fixture
def checkpoint(tmp_path):
    return tiny.write(tmp_path / "model")


def test_verify_accepts_a_good_checkpoint(checkpoint):
    summary = ck.verify_checkpoint(checkpoint)
    assert len(summary.layers) == 14 and 0.3 < summary.int8_share < 0.6


LAYER = "model.layers.1.mlp.down_proj"
OFFSET = "model.layers.1.self_attn.k_offset"


@pytest.mark.parametrize("tensor, edit, message", [
    (f"{LAYER}.weight_scale", None, f"{LAYER}.weight_scale is missing"),
    (f"{LAYER}.act_bits", lambda t: t[:-1], rf"{LAYER}.act_bits in model.safetensors is U8 .3.; expected U8 .4."),
    (f"{LAYER}.weight_scale", lambda t: t.double(), rf"{LAYER}.weight_scale .* is F64 .*; expected F32"),
    (f"{LAYER}.weight_scale", lambda t: t * 0, f"{LAYER}.weight_scale holds values that are not positive"),
    (f"{LAYER}.act_bits", lambda t: t + 1, rf"{LAYER}.act_bits holds .5, 9.; allowed"),
    (f"{LAYER}.weight_group_scale", lambda t: t * 0 + 17, f"{LAYER}.weight_group_scale holds values outside 1..16"),
    (f"{LAYER}.weight_packed", None, f"has no {LAYER}.weight_packed beside it"),
    (f"{LAYER}.weight", lambda t: torch.ones(2), f"{LAYER}.weight stands beside"),
    (OFFSET, None, f"{OFFSET} is missing: quantization_config.kv_cache.k_offset is true"),
    (OFFSET, lambda t: t.half(), rf"{OFFSET} in model.safetensors is F16 .2, 64.; expected F32 .KV heads, head_dim."),
    (OFFSET, lambda t: t * torch.inf, f"{OFFSET} in model.safetensors holds values that are not finite"),
])
def test_verify_names_the_wrong_tensor(checkpoint, tensor, edit, message):
    tensors = load_file(checkpoint / "model.safetensors")
    old = tensors.pop(tensor, None)
    if edit is not None:
        tensors[tensor] = edit(old)
    ck.save_shard(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ck.CheckpointError, match=message):
        ck.verify_checkpoint(checkpoint)


def test_verify_refuses_an_offset_that_the_config_denies(tmp_path):
    model = tiny.write(tmp_path / "model", k_offset=False)
    ck.verify_checkpoint(model)
    tensors = load_file(model / "model.safetensors") | {OFFSET: torch.zeros(2, 64)}
    ck.save_shard(tensors, model / "model.safetensors")
    with pytest.raises(ck.CheckpointError, match=f"{OFFSET} is there: .*k_offset is false"):
        ck.verify_checkpoint(model)


@pytest.mark.parametrize("piece,read", [(1 << 26, 1 << 20), (1000, 1 << 20), (1000, 77), (1 << 26, 1000)])
def test_crc32_of_ranges(tmp_path, monkeypatch, piece, read):
    monkeypatch.setattr(checksum, "PIECE", piece)
    monkeypatch.setattr(checksum, "READ", read)
    data = torch.randint(0, 256, (5003,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "data").write_bytes(data)
    bounds = [(0, 5003), (0, 0), (17, 18), (1, 1001), (3, 4500), (5000, 5003), (2000, 4000)]
    found = checksum.range_crc32s([checksum.Range(tmp_path / "data", *b) for b in bounds])
    assert found == [zlib.crc32(data[start:end]) for start, end in bounds]
    with pytest.raises(EOFError, match="data became shorter"):
        checksum.range_crc32s([checksum.Range(tmp_path / "data", 0, 5004)])


def test_verify_reads_a_tensor_in_pieces(checkpoint, monkeypatch):
    monkeypatch.setattr(checksum, "PIECE", 1000)
    ck.verify_checkpoint(checkpoint)
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last piece of the last tensor
    path.write_bytes(data)
    with pytest.raises(ck.CheckpointError, match="is damaged: CRC-32"):
        ck.verify_checkpoint(checkpoint)


def test_verify_names_the_damaged_tensor(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(ck.CheckpointError, match=r"model\.\S+ in .*model.safetensors is damaged: CRC-32"):
        ck.verify_checkpoint(checkpoint)


def test_verify_names_the_truncated_file(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ck.CheckpointError, match="model.safetensors is truncated"):
        ck.verify_checkpoint(checkpoint)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ck.CheckpointError, match="not a readable safetensors file"):
        ck.verify_checkpoint(checkpoint)


def test_verify_checks_the_index(checkpoint):
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "nowhere.weight": "model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ck.CheckpointError, match="lacks tensor nowhere.weight"):
        ck.verify_checkpoint(checkpoint)
