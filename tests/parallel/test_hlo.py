"""Programs as text: what a traced one gets for the compiler, and the collectives of a compiled one."""

import pytest

from openmoe.parallel.hlo import Collectives, axes_of, collectives, for_compiler, shapes_of

TRACED = """\
HloModule IrToHlo.9, entry_computation_layout={(f32[8,16]{1,0}, f64[], f32[8,16]{1,0})->(f32[], f32[8,16]{1,0})}

ENTRY %IrToHlo.9 (p0.1: f32[8,16], p1.2: f64[], p10.3: f32[8,16]) -> (f32[], f32[8,16]) {
  %p1.2 = f64[] parameter(1), sharding={replicated}
  %custom-call.9 = f64[] custom-call(f64[] %p1.2), custom_call_target="Sharding", sharding={maximal device=0}
  %p10.3 = f32[8,16]{1,0} parameter(2)
  %custom-call.5 = f32[8,16]{1,0} custom-call(f32[8,16]{1,0} %p10.3), custom_call_target="Sharding", sharding={devices=[1,2,4]0,1,2,3,4,5,6,7 last_tile_dim_replicate}
  %p0.1 = f32[8,16]{1,0} parameter(0)
  %custom-call.4 = f32[8,16]{1,0} custom-call(f32[8,16]{1,0} %p0.1), custom_call_target="Sharding", sharding={devices=[8,1]0,1,2,3,4,5,6,7}
  %add.6 = f32[8,16]{1,0} add(f32[8,16]{1,0} %custom-call.4, f32[8,16]{1,0} %custom-call.5)
  %custom-call.7 = f32[8,16]{1,0} custom-call(f32[8,16]{1,0} %add.6), custom_call_target="Sharding", sharding={devices=[8,1]0,1,2,3,4,5,6,7}
  ROOT %tuple.8 = (f32[], f32[8,16]{1,0}) tuple(f32[] %sum.1, f32[8,16]{1,0} %custom-call.7)
}
"""  # noqa: E501

# Cut out of what libtpu gave for TPU v3.
COMPILED = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add.clone (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(512)} parameter(0)
  ROOT %add.1 = bf16[]{:T(512)} add(bf16[]{:T(512)} %x, bf16[]{:T(512)} %y)
}

%body.2 (param: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-gather.3 = f32[2,8]{1,0:T(2,128)} all-gather(f32[1,8]{1,0:T(1,128)} %g), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}
}

%cond.2 (param: (s32[], bf16[4,8])) -> pred[] {
  ROOT %compare.1 = pred[] compare(s32[] %a, s32[] %b), direction=LT
}

ENTRY %main.7 (p0.1: f32[8,16]) -> (f32[], f32[8,16]) {
  %all-to-all.4 = bf16[2,1,320,64]{3,2,1,0:T(8,128)(2,1)} all-to-all(bf16[2,1,320,64]{3,2,1,0:T(8,128)(2,1)} %fusion.5), channel_id=46, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, metadata={op_name="custom-call.4"}
  %all-reduce.156 = (f32[], s64[2,16]{1,0}, /*index=2*/pred[8]{0}) all-reduce(f32[]{:T(256)} %add.1, s64[2,16]{1,0:T(2,128)S(1)} %s, /*index=2*/pred[8]{0} %p), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add.clone
  %all-reduce-start.1 = bf16[128,64]{1,0} all-reduce-start(bf16[128,64]{1,0:T(8,128)(2,1)} %w), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add.clone
  %all-reduce-done.1 = bf16[128,64]{1,0} all-reduce-done(bf16[128,64]{1,0} %all-reduce-start.1)
  %collective-permute.2 = f32[4]{0} collective-permute(f32[4]{0:T(256)} %q), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %while.1 = (s32[], bf16[4,8]) while((s32[], bf16[4,8]) %t), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"12"}}
  %fusion.9 = f32[8]{0} fusion(f32[8]{0} %all-to-all.4), kind=kLoop, calls=%add.clone
}
"""  # noqa: E501


def test_parameters_get_the_layout_of_the_mark_behind_them():
    """Bugs: the compiler is free to lay parameters out as it likes, so memory is not the run's; p1 gets the
    mark of p10; a number of the host, which has a layout, gets another."""
    lines = {
        line.split(" = ")[0].strip(): line
        for line in for_compiler(TRACED, [(1, 0)]).splitlines()
        if " = " in line
    }
    assert lines["%p0.1"].endswith("parameter(0), sharding={devices=[8,1]0,1,2,3,4,5,6,7}")
    assert lines["%p10.3"].endswith(
        "parameter(2), sharding={devices=[1,2,4]0,1,2,3,4,5,6,7 last_tile_dim_replicate}"
    )
    assert lines["%p1.2"].endswith("parameter(1), sharding={replicated}")


def test_outputs_take_over_memory():
    """Bug: parameters count twice, before and after the update."""
    first, *rest = for_compiler(TRACED, [(1, 0), (2, 2)]).splitlines()
    assert first.startswith(
        "HloModule IrToHlo.9, input_output_alias={ {1}: (0, {}, may-alias), {2}: (2, {}, may-alias) }, entry_"
    )
    assert len(rest) == len(TRACED.splitlines()) - 1


def test_collectives_by_kind_and_axis():
    """Bugs: the second half of an asynchronous pair counts too; a tuple counts its first operand; tiles of a
    layout are read as a shape; a loop counts once; groups are read along the wrong axis."""
    assert collectives(COMPILED, (2, 2, 2)) == [
        Collectives("all-gather", "model", 12, 12 * 8 * 4),
        Collectives("all-reduce", "data x expert", 1, 128 * 64 * 2),
        Collectives("all-reduce", "data x expert x model", 1, 4 + 2 * 16 * 8 + 8),
        Collectives("all-to-all", "expert", 1, 2 * 320 * 64 * 2),
        Collectives("collective-permute", "data", 1, 16),
    ]


def test_a_loop_without_a_known_end_is_an_error():
    """Bug: traffic inside of it is left out."""
    unknown = COMPILED.replace('{"known_trip_count":{"n":"12"}}', "{}")
    with pytest.raises(ValueError, match=r"all-gather in body\.2"):
        collectives(unknown, (2, 2, 2))


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3]], "model"),
        ([[0, 2, 4, 6]], "data x expert"),
        ([[0, 4]], "data"),
        ([[0, 6], [2, 4]], "part of data x expert"),
        ([[3]], "none"),
    ],
)
def test_axes_of_groups(groups, axes):
    """Bug: a group that crosses two axes partly passes for one along them."""
    assert axes_of(groups, (2, 2, 2)) == axes


def test_shapes_of_what_a_collective_gives():
    """Bug: the operands' shapes, so that a gathered weight looks like its part."""
    assert shapes_of(COMPILED, "all-gather") == {(2, 8): 1}
    assert shapes_of(COMPILED, "all-reduce") == {(): 1, (2, 16): 1, (8,): 1, (128, 64): 1}
