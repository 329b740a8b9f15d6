"""Writes the two wgmma instructions of a kernel as CUDA C++: their operand lists depend on the tile's width."""


def wgmma(
    name: str, width: int, element: str, *, a_in_registers: bool, transpose_b: bool, transpose_a: bool = False
) -> str:
    """A function `name(d, a, b, accumulate)`: d (64 x `width`) = a (64 x 16) @ b (16 x `width`), + d if `accumulate`.

    `d` is float32; `a` is four registers, or the descriptor of a tile in shared memory; `b` is a descriptor;
    `element` is "bf16" or "f16".
    """
    count = width // 2
    a_operands = [f"%{count + i}" for i in range(4 if a_in_registers else 1)]
    b_operand, flag = f"%{count + len(a_operands)}", f"%{count + len(a_operands) + 1}"
    accumulators = ", ".join(f"%{i}" for i in range(count))
    a_text = "{" + ", ".join(a_operands) + "}" if a_in_registers else a_operands[0]
    # scale-d, negate a, negate b, then a "transposed" flag for each operand that lies in shared memory
    modifiers = ["p", "1", "1", *([] if a_in_registers else [str(int(transpose_a))]), str(int(transpose_b))]
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a_inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_in_registers else '"l"(a)'
    a_parameter = "const u32 (&a)[4]" if a_in_registers else "u64 a"
    return f"""
DEVICE void {name}(float (&d)[{count}], {a_parameter}, u64 b, bool accumulate) {{
  asm volatile(
      "{{\\n .reg .pred p;\\n setp.ne.b32 p, {flag}, 0;\\n"
      " wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{element}.{element} {{{accumulators}}}, {a_text}, {b_operand},"
      " {", ".join(modifiers)};\\n}}"
      : {outputs}
      : {a_inputs}, "l"(b), "r"(static_cast<int>(accumulate)));
}}
"""
