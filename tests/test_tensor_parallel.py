# SPDX-License-Identifier: Apache-2.0
"""vLLM's tensor-parallel slicing of COMET layers: the ranks' parts make up the whole layer at TP 1, 2, 4 and 8."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from vllm_comet import checkpoint as ck
from vllm_comet.attention import select
from vllm_comet.quantization.config import CometConfig

HIDDEN, HEAD, HEADS, KV_HEADS = 256, 64, 8, 2
SLICES = 8
FORMAT = ck.CometFormat(group_size=64, tensor_parallel=SLICES)


@pytest.fixture(autouse=True)
def no_distributed(monkeypatch):
    with set_current_vllm_config(VllmConfig()):
        yield


@contextmanager
def rank_of(rank, size):
    with pytest.MonkeyPatch.context() as patch:
        for module in (vllm_linear, vllm_parameter):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        yield


def config(mapping):
    quant = CometConfig(FORMAT)
    quant.packed_modules_mapping = mapping
    return quant


def feed(layer, members):
    """Feed each member's checkpoint tensors to vLLM's loaders, as a model's load_weights does."""
    for shard, tensors in members.items():
        for name, value in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, value, *([] if shard is None else [shard]))


def load(layer, members):
    feed(layer, members)
    layer.quant_method.process_weights_after_loading(layer)


def run(layer, x):
    return layer.quant_method.apply(layer, x, layer.bias)


def dense(tensors):
    """Float64 ``[N, K]`` in the model's channel order."""
    w = ck.integer_weight(tensors[ck.WEIGHT_PACKED], tensors.get(ck.WEIGHT_GROUP_SCALE), FORMAT.group_size).double()
    w *= tensors[ck.WEIGHT_SCALE][:, None]
    if ck.INPUT_PERM in tensors:
        w = w[:, torch.argsort(tensors[ck.INPUT_PERM].long())]
    return w


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_qkv_parallel(tp):
    torch.manual_seed(0)
    order = tiny.input_order(HIDDEN, 1, 0.3, True)
    rows = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
    members = {s: tiny.linear(n, HIDDEN, FORMAT, order) | {"bias": torch.randn(n)} for s, n in rows.items()}
    x, parts = torch.randn(5, HIDDEN), {s: {} for s in rows}
    for rank in range(tp):
        with rank_of(rank, tp):
            layer = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, quant_config=config({}), prefix="l.qkv_proj")
            load(layer, members)
            q, k, v = run(layer, x).split([HEADS // tp * HEAD] + [layer.num_kv_heads * HEAD] * 2, dim=1)
            head = rank // layer.num_kv_head_replicas
            parts["q"][rank], parts["k"][head], parts["v"][head] = q, k, v
    for shard, found in parts.items():
        whole = torch.cat([found[i] for i in sorted(found)], dim=1)
        exact = x.double() @ dense(members[shard]).T + members[shard]["bias"]
        assert whole.shape == exact.shape and (whole - exact).norm() / exact.norm() < 1e-2
        assert torch.equal(whole, run_alone(members[shard], x)), "column slices do not change the arithmetic"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_ranks_k_offset_is_that_of_its_heads(monkeypatch, tp):
    loaded = torch.randn(4, HEAD)
    for rank in range(tp):
        monkeypatch.setattr(select, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(select, "get_tensor_model_parallel_world_size", lambda: tp)
        layer = torch.nn.Module()
        layer.num_kv_heads, layer.head_size = max(1, 4 // tp), HEAD
        select.add_k_offset(layer)
        parameter = layer.k_offset
        select.add_k_offset(layer)  # vLLM asks twice
        assert layer.k_offset is parameter and parameter.dtype == torch.float32
        parameter.weight_loader(parameter, loaded)
        first = rank * 4 // tp
        assert torch.equal(parameter.data, loaded[first : first + layer.num_kv_heads])
    with pytest.raises(ck.CheckpointError, match="a checkpoint's k_offset is .3, 64.; its share of this rank"):
        parameter.weight_loader(torch.zeros(2, HEAD), torch.randn(3, HEAD))


def run_alone(tensors, x):
    with rank_of(0, 1):
        layer = MergedColumnParallelLinear(x.shape[1], [len(tensors[ck.WEIGHT_PACKED])], bias="bias" in tensors,
                                           quant_config=config({}), prefix="l.alone")
        load(layer, {0: tensors})
        return run(layer, x)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_gate_up_and_down(tp):
    torch.manual_seed(1)
    width = 128 * SLICES * 2
    order = tiny.input_order(HIDDEN, 1, 0.3, True)
    gate_up = {i: tiny.linear(width, HIDDEN, FORMAT, order) for i in (0, 1)}
    down = tiny.linear(HIDDEN, width, FORMAT, tiny.input_order(width, SLICES, 0.5, True))
    x, gates, total = torch.randn(3, HIDDEN), [], torch.zeros(3, HIDDEN, dtype=torch.float64)
    h = torch.randn(3, width)
    for rank in range(tp):
        with rank_of(rank, tp):
            column = MergedColumnParallelLinear(HIDDEN, [width] * 2, bias=False, quant_config=config({}), prefix="l.gu")
            load(column, gate_up)
            gates.append(run(column, x).chunk(2, dim=1))
            row = RowParallelLinear(width, HIDDEN, bias=False, quant_config=config({}), prefix="l.down_proj")
            load(row, {None: down})
            total += run(row, h.chunk(tp, dim=1)[rank]).double()
    for i in (0, 1):
        assert torch.equal(torch.cat([g[i] for g in gates], dim=1), run_alone(gate_up[i], x))
    exact = h.double() @ dense(down).T
    assert (total - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_ranks_tensors_are_slices_of_the_checkpoints(tp):
    """Column parallel: rows, and all that belongs to the input. Row parallel: channels, and all scales of rows."""
    width = 128 * SLICES
    gate_up = {i: tiny.linear(width, HIDDEN, FORMAT, tiny.input_order(HIDDEN, 1, 0.3, True)) for i in (0, 1)}
    gate_up[1].update({name: gate_up[0][name] for name in (ck.INPUT_PERM, ck.ACT_BITS_NAME)})
    down = tiny.linear(HIDDEN, width, FORMAT, tiny.input_order(width, SLICES, 0.5, True))
    for rank in range(tp):
        with rank_of(rank, tp):
            column = MergedColumnParallelLinear(HIDDEN, [width] * 2, bias=False, quant_config=config({}), prefix="l.gu")
            row = RowParallelLinear(width, HIDDEN, bias=False, quant_config=config({}), prefix="l.down_proj")
        feed(column, gate_up)
        feed(row, {None: down})
        for name in (ck.WEIGHT_PACKED, ck.WEIGHT_SCALE, ck.WEIGHT_GROUP_SCALE):
            rows = torch.cat([gate_up[i][name].chunk(tp)[rank] for i in (0, 1)])
            assert torch.equal(getattr(column, name).data, rows)
        for name in (ck.INPUT_PERM, ck.ACT_BITS_NAME):
            assert torch.equal(getattr(column, name).data, gate_up[0][name])
            assert torch.equal(getattr(row, name).data, down[name].chunk(tp)[rank])
        for name in (ck.WEIGHT_PACKED, ck.WEIGHT_GROUP_SCALE):
            assert torch.equal(getattr(row, name).data, down[name].chunk(tp, dim=1)[rank])
        assert torch.equal(row.weight_scale.data, down[ck.WEIGHT_SCALE])


@pytest.mark.parametrize("name, permuted", [("l.o_proj", True), ("l.down_proj", False)])
@pytest.mark.parametrize("rank, tp", [(0, 1), (1, 2)])
def test_dummy_weights_are_valid_and_permuted_where_the_calibrators_are(monkeypatch, rank, tp, name, permuted):
    engine = VllmConfig()
    monkeypatch.setattr(engine.load_config, "load_format", "dummy")
    with set_current_vllm_config(engine), rank_of(rank, tp):
        layer = RowParallelLinear(1024, 64, bias=False, quant_config=config({}), prefix=name)
        layer.quant_method.process_weights_after_loading(layer)
        assert (layer.comet_kernel.perm is not None) == permuted
        assert layer.comet_kernel.low.shape[1] == round(0.84 * 1024 // tp / 128) * 128
        assert run(layer, torch.randn(3, 1024 // tp)).std() > 0


def test_row_parallel_slices_that_are_no_multiple_of_128_are_refused():
    message = "l.o_proj: 640 input channels over tensor-parallel size 4 leave 160 a rank, no multiple of 128"
    with rank_of(0, 4), pytest.raises(ck.CheckpointError, match=message):
        RowParallelLinear(640, 64, bias=False, quant_config=config({}), prefix="l.o_proj")


def test_a_permutation_across_slices_is_refused():
    down = tiny.linear(64, 512, FORMAT, tiny.input_order(512, 1, 0.3, True))
    with rank_of(1, 2):
        layer = RowParallelLinear(512, 64, bias=False, quant_config=config({}), prefix="l.down_proj")
        message = "this checkpoint's channel order allows tensor-parallel size 8 and its divisors, not 2. .*-parallel 2"
        with pytest.raises(ck.CheckpointError, match=message):
            load(layer, {None: down})


def test_fused_members_with_different_permutations_are_refused():
    orders = [tiny.input_order(HIDDEN, 1, 0.3, True) for _ in range(2)]
    members = {i: tiny.linear(128, HIDDEN, FORMAT, order) for i, order in enumerate(orders)}
    with rank_of(0, 1):
        layer = MergedColumnParallelLinear(HIDDEN, [128] * 2, bias=False, quant_config=config({}), prefix="l.gu")
        with pytest.raises(ck.CheckpointError, match="l.gu.input_perm: .* differ between the layers"):
            load(layer, members)


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop(ck.WEIGHT_SCALE), "l.alone.weight_scale is missing from the checkpoint: 0 of 1"),
    (lambda t: t.update(weight_scale=t[ck.WEIGHT_SCALE].half()), "l.alone.weight_scale is torch.float16; the"),
    (lambda t: t.update(weight_packed=t[ck.WEIGHT_PACKED][:, :-1]), r"shape .64, 31. does not fit the .* .64, 32."),
])
def test_wrong_tensors_are_refused_by_name(damage, message):
    tensors = tiny.linear(64, HIDDEN, FORMAT, tiny.input_order(HIDDEN, 1, 0.3, True))
    damage(tensors)
    with pytest.raises(ck.CheckpointError, match=message):
        run_alone(tensors, torch.randn(1, HIDDEN))


def test_ignored_members_must_agree():
    quant = config({"gate_up_proj": ["gate_proj", "up_proj"]})
    quant.ignore = ["l.gate_proj"]
    with rank_of(0, 1), pytest.raises(ValueError, match="l.gate_up_proj"):
        MergedColumnParallelLinear(HIDDEN, [128] * 2, bias=False, quant_config=quant, prefix="l.gate_up_proj")
    quant.ignore = ["re:l.*(gate|up)_proj"]
    with rank_of(0, 1):
        layer = MergedColumnParallelLinear(HIDDEN, [128] * 2, bias=False, quant_config=quant, prefix="l.gate_up_proj")
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"
