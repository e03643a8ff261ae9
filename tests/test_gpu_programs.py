"""How `experiments/gpu/compile_steps.py` reads compiled programs; the compiler itself is not needed."""

from experiments.gpu import compile_steps, program

TEXT = """HloModule jit_step, is_scheduled=true

%fused (p.0: f32[8,4], p.1: f32[4,2]) -> f32[8,2] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = f32[4,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (b.0: (s32[], f32[8,4], f32[4,2])) -> (s32[], f32[8,4], f32[4,2]) {
  %b.0 = (s32[], /*index=1*/f32[8,4]{1,0}, f32[4,2]{1,0}) parameter(0)
  %b.1 = f32[8,4]{1,0} get-tuple-element(%b.0), index=1
  %b.2 = f32[4,2]{1,0} get-tuple-element(%b.0), index=2
  %b.3 = f32[8,2]{1,0} fusion(%b.1, %b.2), kind=kCustom, calls=%fused
  ROOT %b.4 = (s32[], f32[8,4]{1,0}, f32[4,2]{1,0}) tuple(%b.0, %b.1, %b.2)
}

ENTRY %main.1 (a: f32[2,12,16,5], k: f32[4,3,3,5], l: (s32[], f32[8,4], f32[4,2])) -> f32[5,3,3,4] {
  %a = f32[2,12,16,5]{3,2,1,0} parameter(0)
  %k = f32[4,3,3,5]{3,2,1,0} parameter(1)
  %l = (s32[], f32[8,4]{1,0}, f32[4,2]{1,0}) parameter(2)
  %loop = (s32[], f32[8,4]{1,0}, f32[4,2]{1,0}) while(%l), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %conv = (f32[2,12,16,4]{3,2,1,0}, u8[1024]{0}) custom-call(%a, %k), window={size=3x3 pad=4_4x4_4 rhs_dilate=4x4}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv(1)/conv"}
  %y = f32[2,12,16,4]{3,2,1,0} get-tuple-element(%conv), index=0
  %wrapped_transpose = f32[4,12,16,2]{3,2,1,0} fusion(%y), kind=kInput, calls=%moved
  %x = f32[5,12,16,2]{3,2,1,0} copy(%a)
  %huge = (f32[5,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %wrapped_transpose), window={size=12x16 pad=4_4x4_4}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="gradient"}
  %filter = (f32[4,3,3,5]{3,2,1,0}, u8[0]{0}) custom-call(%a, %y), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", metadata={op_name="right"}
  %h = f64[7]{0:S(5)} copy-start(%a)
  ROOT %r = f32[5,3,3,4]{3,2,1,0} bitcast(%filter)
}

%moved (q: f32[2,12,16,4]) -> f32[4,12,16,2] {
  %q = f32[2,12,16,4]{3,2,1,0} parameter(0)
  ROOT %t = f32[4,12,16,2]{3,2,1,0} transpose(%q), dimensions={3,1,2,0}
}
"""


def test_calls_operations_and_traffic():
    found = program.read(TEXT)
    conv, huge, gradient = found.convolutions
    assert (conv.kind, conv.window, conv.result, conv.where) == (
        "Forward",
        (3, 3),
        (2, 4, 12, 16),
        "jit(step)/conv(1)/conv",
    )
    assert (huge.kind, huge.window) == ("Forward", (12, 16))
    assert (gradient.kind, gradient.window, gradient.result) == ("BackwardFilter", (3, 3), (4, 5, 3, 3))
    of_conv = 2 * 2 * 12 * 16 * 4 * 3 * 3 * 5
    assert conv.operations == huge.operations == gradient.operations == of_conv
    assert found.operations == 3 * 2 * 8 * 4 * 2 + 3 * of_conv
    assert found.kernels == 3 + 6  # the loop's, and the others
    a, y, k = 4 * 2 * 12 * 16 * 5, 4 * 2 * 12 * 16 * 4, 4 * 4 * 3 * 3 * 5
    loop = 3 * 4 * (8 * 4 + 4 * 2 + 8 * 2)
    assert found.traffic == loop + (a + k + y) + 2 * y + 2 * a + (y + a + k) + (a + y + k) + (a + 8 * 7)
    assert found.moves == (2, 2 * y + 2 * a)
    assert (found.host, found.double) == (["h"], ["h"])


def test_what_is_wrong():
    found, kernels = program.read(TEXT), [(3, 3, 5, 4)]
    large = [call for call in found.convolutions if call.window == (12, 16)]
    wrong = compile_steps.problems(found, large, kernels, found.operations / 1.01)
    assert [line.split()[0:4] for line in wrong] == [
        ["a", "window", "of", "12x16"],
        ["on", "the", "host:", "h"],
        ["float64:", "h"],
    ]
    assert "no BackwardFilter but Forward: gradient" in compile_steps.problems(found, [], kernels, found.operations)[0]
    assert "1.030 times" in " ".join(compile_steps.problems(found, large, kernels, found.operations / 1.03))
