"""The planner: what it counts is exact, what it proposes is allowed, memory falls where it must."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.sharded import local_parameter_shapes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixtral_ms.config import MixtralConfig, RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config, find_contradictions
from mixtral_ms.config.loading.resolve import rank_count
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.config.sections.run_section import ModelSection
from mixtral_ms.parallel.grid import sharding_rules as layout
from mixtral_ms.parallel.planner.hccl_buffers import hccl_buffers
from mixtral_ms.parallel.planner.layout_search import judge, plan_layouts
from mixtral_ms.parallel.planner.memory_model import NetworkTensors, memory_plan
from mixtral_ms.parallel.planner.time_model import Cluster
from mixtral_ms.parallel.planner.traffic_model import Group, passes, traffic_groups, traffic_plan
from mixtral_ms.train.report.flops import flops_per_token

BIG = Path(__file__).parents[3] / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
GIB = 2**30
SIZES = st.sampled_from([1, 2, 4])


def run(grid=None, *, model=None, batch=1, accumulation=1, zero=False, recompute=False, **more):
    """A training run of a small network on a grid."""
    network = MixtralConfig(
        **{
            "hidden_size": 32,
            "num_layers": 8,
            "num_heads": 8,
            "n_kv_heads": 4,
            "vocab_size": 64,
            "intermediate_size": 48,
            "seq_length": 64,
            "compute_dtype": "float32",
            "moe_config": {"expert_num": 4, "num_experts_chosen": 2},
            **(model or {}),
        }
    )
    config = RunConfig(model=ModelSection(network), moe_config=network.moe_config, **more)
    config.use_parallel = True
    config.parallel_config = grid or ParallelConfig()
    config.parallel.enable_parallel_optimizer = zero
    config.recompute_config.recompute = recompute
    config.runner_config.batch_size = batch
    config.runner_config.gradient_accumulation_steps = accumulation
    config.optimizer.learning_rate = 1e-3
    assert find_contradictions(config) == []
    return config


def token_flops(config):
    model = config.model.model_config
    return flops_per_token(model, model.seq_length)


@settings(max_examples=60)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from([1, 2]), *[st.booleans()] * 3)
def test_values_are_those_of_the_layout_table(dp, mp, ep, pp, cp, tied, split_embedding, zero):
    """Parameters and moments of every rank, tensor by tensor."""
    assume(ep <= dp * cp * mp)
    grid = ParallelConfig(dp, mp, ep, pp, cp, vocab_emb_dp=not split_embedding)
    model = run(model={"tie_word_embeddings": tied}).model.model_config
    shapes = layout.parameter_shapes(model)
    moments = [prefix + name for name in shapes for prefix in layout.MOMENTS]
    placed = layout.placements(model, grid, moments, zero=zero)
    for stage, values in enumerate(NetworkTensors(model).on_stages(grid, zero=zero)):
        local = local_parameter_shapes(model, grid, stage)
        assert values.parameters == sum(map(math.prod, local.values()))
        assert values.trained + values.trained_experts == values.parameters
        assert values.trained_experts == sum(
            math.prod(shape) for name, shape in local.items() if "routed_experts.ffn" in name
        )
        assert values.moments == sum(
            math.prod(placed[name][stage].local_shape(shapes[layout.parameter_of(name)]))
            for name in moments
            if stage in placed[name]
        )


def test_a_rank_of_8x7b_counts_every_parameter():
    config = load_config(BIG, ["use_parallel=False"])
    (values,) = NetworkTensors(config.model.model_config).on_stages(ParallelConfig(), zero=False)
    assert values.parameters == 46_702_792_704
    assert values.moments == 2 * 46_702_792_704


def test_adapters_alone_have_gradients_and_moments():
    pet = {"lora_rank": 4, "target_modules": ".*layers.[57].*(wq|w2)"}
    grid = ParallelConfig(pipeline_stage=2, micro_batch_num=2, model_parallel=2)
    config = run(grid, model={"pet_config": pet})
    first, last = NetworkTensors(config.model.model_config).on_stages(grid, zero=False)
    plain = NetworkTensors(run(grid).model.model_config).on_stages(grid, zero=False)
    assert first.parameters == plain[0].parameters
    assert first.trained == first.trained_experts == first.moments == 0
    # layers 5 and 7; of wq B is cut, of w2 A
    assert last.trained == 2 * (4 * 32 + 32 * 4 // 2)
    assert last.trained_experts == 2 * 4 * (4 * 48 // 2 + 32 * 4)
    adapters = last.trained + last.trained_experts
    assert last.parameters == plain[1].parameters + adapters
    assert last.moments == 2 * adapters
    assert [rank.gradients for rank in memory_plan(config)] == [0, 4 * adapters]
    assert traffic_plan(config)[1].data_parallel == 0


GRIDS = {
    "dp4": ParallelConfig(data_parallel=4),
    "dp2 mp2 ep2": ParallelConfig(data_parallel=2, model_parallel=2, expert_parallel=2),
    "dp2 pp2": ParallelConfig(data_parallel=2, pipeline_stage=2, micro_batch_num=8),
    "dp2 cp2 ep4": ParallelConfig(context_parallel=2, data_parallel=2, expert_parallel=4),
    "mp4 ep2": ParallelConfig(model_parallel=4, expert_parallel=2),
}
DOUBLED = ("expert_parallel", "model_parallel", "pipeline_stage", "context_parallel")
IMPOSSIBLE = {("dp2 cp2 ep4", "expert_parallel"), ("mp4 ep2", "model_parallel")}


def largest(config):
    return max(rank.total for rank in memory_plan(config))


@pytest.mark.parametrize(
    "name, key", [(n, k) for n in GRIDS for k in DOUBLED if (n, k) not in IMPOSSIBLE]
)
def test_memory_falls_with_more_ranks(name, key):
    grid = GRIDS[name]
    more = replace(grid, **{key: 2 * getattr(grid, key)}, micro_batch_num=8)
    assert largest(run(more)) < largest(run(grid))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_memory_falls_with_shards_and_recompute(grid):
    before = largest(run(grid))
    assert largest(run(grid, recompute=True)) < before
    assert largest(run(grid, zero=True)) < before


def test_the_reference_s_layout_of_8x7b_fits_its_machines():
    """dp 8, mp 1, ep 8, pp 2 on two machines of 8 devices with 64 GB."""
    config = load_config(BIG)
    grid = config.parallel_config
    sizes = (grid.data_parallel, grid.model_parallel, grid.expert_parallel, grid.pipeline_stage)
    assert sizes == (8, 1, 8, 2)
    cluster = Cluster(16, 0.9 * 64 * GIB)
    assert judge(config, cluster, token_flops(config)).fullest.total < cluster.memory
    plan = plan_layouts(config, cluster, token_flops(config))
    assert grid in [one.config.parallel_config for one in plan.fitting]


def without_split(one):
    """The grid of a layout, whichever variant of it was the best."""
    return replace(one.config.parallel_config, use_seq_parallel=False)


@settings(max_examples=25)
@given(
    devices=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    rows=st.sampled_from([8, 12, 48]),
    megabytes=st.sampled_from([0.2, 1, 4]),
    experts=st.sampled_from([3, 4, 6]),
    layers=st.sampled_from([6, 8]),
    tied=st.booleans(),
)
@pytest.mark.slow
def test_what_is_proposed_is_allowed(devices, rows, megabytes, experts, layers, tied):
    config = run(
        model={
            "num_layers": layers,
            "tie_word_embeddings": tied,
            "moe_config": {"expert_num": experts},
        }
    )
    cluster = Cluster(devices, megabytes * 2**20, devices_per_host=4)
    plan = plan_layouts(config, cluster, token_flops(config), global_batch_size=rows)
    for one in plan.fitting:
        check_config(one.config, world_size=None, needs_paths=False)
        assert rank_count(one.config) == devices
        runner, grid = one.config.runner_config, one.config.parallel_config
        assert one.micro_batches * runner.batch_size * grid.data_parallel == rows
        assert max(rank.total for rank in memory_plan(one.config)) <= cluster.memory
        assert 0 <= one.time.bubble < 1
    for one in plan.too_large:
        assert largest(one.config) > cluster.memory
    steps = [one.time.step for one in plan.fitting]
    assert steps == sorted(steps)
    judged = [*plan.fitting, *plan.too_large]
    assert len({repr(without_split(one)) for one in judged}) == len(judged)


def test_more_memory_never_loses_a_layout():
    config, before = run(), set()
    for megabytes in (0.3, 0.6, 1.2, 100):
        cluster = Cluster(8, megabytes * 2**20)
        plan = plan_layouts(config, cluster, token_flops(config), global_batch_size=16)
        fitting = {repr(without_split(one)) for one in plan.fitting}
        assert before <= fitting
        before = fitting
    assert plan.too_large == ()


def test_why_grids_are_refused():
    config = run()
    plan = plan_layouts(config, Cluster(16, GIB), token_flops(config), global_batch_size=24)
    assert any("n_kv_heads 4 is not divisible by" in reason for reason in plan.refused)
    assert any(
        "a global batch of 24 sequences is not divisible by" in reason for reason in plan.refused
    )


def test_fixed_sizes_are_kept():
    config = run()
    fixed = {"model_parallel": 2, "context_parallel": 1}
    plan = plan_layouts(
        config, Cluster(8, GIB), token_flops(config), global_batch_size=16, fixed=fixed
    )
    assert plan.fitting
    for one in plan.fitting:
        grid = one.config.parallel_config
        assert (grid.model_parallel, grid.context_parallel) == (2, 1)


def test_one_device_sends_nothing():
    (traffic,) = traffic_plan(run())
    assert traffic.total == 0


# T = 64 tokens, D = 32, float32: one T D of activations
TD = 64 * 32 * 4
LAYERS = 8


@pytest.mark.parametrize("recompute, passes", [(False, 2), (True, 3)])
def test_bytes_sent_for_activations(recompute, passes):
    def sent(grid, **more):
        return traffic_plan(run(grid, recompute=recompute, **more))[0]

    # two all-reduces a layer and pass, one more for the head: each 2 (4 - 1) / 4 of T D
    tensor = sent(ParallelConfig(model_parallel=4))
    assert tensor.tensor_parallel == tensor.total == 1.5 * (2 * passes * LAYERS + 1) * TD
    # two all-to-alls of 2 rows a token; 2 of 4 ranks' experts are elsewhere
    expert = sent(ParallelConfig(data_parallel=2, expert_parallel=2), accumulation=3)
    assert expert.expert_parallel == 0.5 * 2 * passes * LAYERS * 2 * TD * 3
    # T / 2 tokens' keys and values of 4 heads of 4
    context = sent(ParallelConfig(context_parallel=2))
    assert context.context_parallel == passes * LAYERS * 32 * (2 * 4 * 4) * 4


@pytest.mark.parametrize(
    "keeps, recompute, first, last",
    [
        ("layer_inputs", False, 3, 2),
        ("layer_inputs", True, 3, 3),
        ("stage_input", False, 3, 2),
        ("stage_input", True, 4, 3),
    ],
)
def test_passes_of_pipeline_stages(keeps, recompute, first, last):
    grid = ParallelConfig(pipeline_stage=2, micro_batch_num=2, stage_keeps=keeps)
    config = run(grid, recompute=recompute)
    assert [passes(config, grid, stage) for stage in (0, 1)] == [first, last]


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_what_a_stage_keeps(recompute):
    def first_two(keeps):
        grid = ParallelConfig(pipeline_stage=4, micro_batch_num=8, stage_keeps=keeps)
        return [one.activations for one in memory_plan(run(grid, recompute=recompute))[:2]]

    inputs, whole = first_two("layer_inputs"), first_two("stage_input")
    # one more micro batch under way: the inputs of 2 layers, probabilities and logits of 4 experts
    routing = 2 * 64 * 4 * 4
    assert inputs[0] - inputs[1] == 2 * (TD + routing)
    assert whole[0] - whole[1] == TD
    # without recompute a stage that is computed again is there with all its layers
    assert (whole[0] > inputs[0]) != recompute


def test_bytes_sent_between_stages():
    grid = ParallelConfig(pipeline_stage=4, micro_batch_num=8)
    first, second, _, last = (one.pipeline for one in traffic_plan(run(grid)))
    assert first == last == 8 * TD and second == 2 * first
    split = replace(grid, model_parallel=2, use_seq_parallel=True)
    assert traffic_plan(run(split))[0].pipeline == first / 2


def test_bytes_sent_for_gradients():
    count = layout.parameter_count(run().model.model_config)
    (plain,) = traffic_plan(run(ParallelConfig(data_parallel=4)))
    assert plain.data_parallel == plain.total == 2 * 0.75 * 4 * count
    # experts that are on one rank only have nobody to sum with
    (alone,) = traffic_plan(run(ParallelConfig(data_parallel=4, expert_parallel=4)))
    experts = 8 * 3 * 4 * 48 * 32
    assert alone.data_parallel == 2 * 0.75 * 4 * (count - experts)
    tied = ParallelConfig(pipeline_stage=2, micro_batch_num=2)
    for one in traffic_plan(run(tied, model={"tie_word_embeddings": True})):
        assert one.data_parallel == 4 * 64 * 32


def test_moments_that_tensor_ranks_share_out_are_gathered_from_all_of_them():
    grid = ParallelConfig(data_parallel=2, model_parallel=2)
    (whole,), (cut,) = (traffic_plan(run(grid, zero=zero)) for zero in (False, True))
    # the embedding, the norms and the routers, which tensor ranks hold too, in 4 parts
    held = 64 * 32 + (2 * LAYERS + 1) * 32 + LAYERS * 4 * 32
    assert cut.data_parallel == whole.data_parallel + 0.75 * 4 * held


def test_dropless_experts_have_room_for_every_row_of_the_ranks_that_share_them():
    alone, shared = (
        memory_plan(run(ParallelConfig(data_parallel=4, expert_parallel=ep)))[0].activations
        for ep in (1, 4)
    )
    # 3 times 64 tokens' 2 rows more: each in and out of the experts, and 3 widths between
    assert shared - alone == LAYERS * 3 * 64 * 2 * (2 * 32 + 3 * 48) * 4


def test_parts_of_summed_gradients_stand_beside_the_sums():
    grid = ParallelConfig(data_parallel=4)
    one, several = (memory_plan(run(grid, zero=True, accumulation=n))[0] for n in (1, 2))
    assert several.gradients == one.gradients + one.optimizer // 2
    # experts of one rank alone have whole moments, which are of the sums themselves
    grid = replace(grid, expert_parallel=4)
    one, several = (memory_plan(run(grid, zero=True, accumulation=n))[0] for n in (1, 2))
    experts = LAYERS * 3 * 48 * 32
    assert several.gradients == one.gradients + one.optimizer // 2 - 4 * experts


@pytest.mark.parametrize(
    "group, devices, inside",
    [
        (Group(1, 64), 64, True),
        (Group(8, 1), 64, True),
        (Group(4, 2), 64, True),
        (Group(8, 2), 64, False),
        (Group(3, 1), 24, False),  # the third group begins in one host and ends in the next
        (Group(4, 2), 8, True),
        (Group(2, 8), 16, False),
    ],
)
def test_which_groups_stay_in_a_host(group, devices, inside):
    hosts = [
        {(start + offset + i * group.step) // 8 for i in range(group.size)}
        for start in range(0, devices, group.size * group.step)
        for offset in range(group.step)
    ]
    assert all(len(one) == 1 for one in hosts) == inside
    assert group.inside(devices, 8) == inside
    assert (group.share_outside(devices, 8) == 0) == inside


@given(size=st.integers(2, 9), step=st.integers(1, 9), times=st.integers(1, 4))
def test_how_many_of_a_ranks_peers_are_on_other_hosts(size, step, times):
    devices = size * step * times
    most = 0
    for start in range(0, devices, size * step):
        for offset in range(step):
            ranks = [start + offset + i * step for i in range(size)]
            for me in ranks:
                most = max(most, sum(me // 8 != other // 8 for other in ranks))
    assert Group(size, step).share_outside(devices, 8) == most / (size - 1)


def test_groups_of_a_grid():
    grid = ParallelConfig(4, 2, 8, 2, micro_batch_num=2)
    spans = traffic_groups(grid)
    assert spans["tensor_parallel"] == (Group(2, 1),)
    assert spans["expert_parallel"] == (Group(4, 2),)  # the other factor of 2 is tensor parallel
    assert spans["pipeline"] == (Group(2, 8),)
    assert spans["data_parallel"] == (Group(4, 2), Group(1, 8))


def test_time_of_a_pipeline():
    """Stages of as many layers without communication; a slower link takes longer.

    All stages but the last compute forwards twice, so take 4 parts of time to its 3.
    """
    free = Cluster(4, GIB, memory_bandwidth=1e30, bandwidth_inside=1e30, bandwidth_between=1e30)
    grid = ParallelConfig(pipeline_stage=4, micro_batch_num=12)
    config = run(grid)
    flops = token_flops(config) | {"lm_head": 0.0}
    time = judge(config, free, flops).time
    assert time.bubble == pytest.approx(1 - 12 * (15 / 4) / (11 * 4 + 15))
    rate = free.flops * free.efficiency
    assert time.step == pytest.approx((11 * 4 + 15) / 3 * 64 * flops["total"] / 4 / rate)
    slow = replace(free, bandwidth_inside=1e6)
    sent = 12 * 2 * TD / 1e6
    longer = judge(config, slow, flops).time
    assert longer.exposed["pipeline"] == pytest.approx(sent)
    assert longer.step > time.step + sent


def test_recompute_takes_a_third_longer():
    free = Cluster(1, GIB, memory_bandwidth=1e30)
    plain, again = run(), run(recompute=True)
    flops = token_flops(plain) | {"lm_head": 0.0}
    times = [judge(config, free, flops).time.step for config in (plain, again)]
    assert times[1] / times[0] == pytest.approx(4 / 3)


def test_working_weights_are_counted_beside_the_masters():
    def plan(*overrides):
        return memory_plan(load_config(BIG, overrides))[0]

    wrapper = "runner_wrapper.working_weights={}".format
    without, given, default = (
        plan(wrapper(False)),
        plan(wrapper(True)),
        plan(wrapper("null")),
    )
    assert given == default  # on Ascend
    # 16 layers: experts' w1, w2, w3 of one of 8 ranks, attention's four matrices; 16 bits each
    cast = 16 * (3 * 14336 * 4096 + 2 * 4096 * (4096 + 1024))
    assert given.parameters - without.parameters == 2 * cast
    assert plan(wrapper(True), "model.model_config.compute_dtype=float32").parameters == (
        without.parameters
    )


def test_sums_that_are_cut_like_moments():
    shard = "parallel.parallel_optimizer_config.gradient_accumulation_shard=True"
    cut, whole = (memory_plan(load_config(BIG, flags))[0] for flags in ([shard], []))
    assert cut.gradients == cut.optimizer // 2 < whole.gradients
    without = memory_plan(load_config(BIG, [shard, "parallel.enable_parallel_optimizer=False"]))[0]
    assert without.gradients == without.parameters


def test_buffers_are_those_of_the_groups_that_a_rank_makes():
    """Two of 200 MB a group: the world, the stage (tokens and exchange are its ranks), the pair."""
    grid = load_config(BIG, []).parallel_config
    assert hccl_buffers(grid) == (3, 3 * 400 << 20)
    sizes = "parallel_config.hccl_buffer_size={pair: 32, tokens: 64}"
    assert hccl_buffers(load_config(BIG, [sizes]).parallel_config) == (3, (400 + 128 + 64) << 20)
    assert hccl_buffers(ParallelConfig()) == (0, 0)
