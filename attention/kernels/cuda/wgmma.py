"""Generator of wgmma wrappers in CUDA C++; the operand list of the instruction depends on the tile width."""


def wgmma(
    name: str, width: int, element: str, *, a_in_registers: bool, transpose_b: bool, transpose_a: bool = False
) -> str:
    """Return the source of `name(d, a, b, accumulate)`: d = a @ b, plus d if `accumulate`.

    `d` is 64 x `width` in float32; `a` (64 x 16) is four registers or a shared-memory descriptor; `b` (16 x `width`) is
    a descriptor; `element` is "bf16" or "f16".
    """
    count = width // 2
    a_operands = [f"%{count + i}" for i in range(4 if a_in_registers else 1)]
    b_operand, flag = f"%{count + len(a_operands)}", f"%{count + len(a_operands) + 1}"
    accumulators = ", ".join(f"%{i}" for i in range(count))
    a_text = "{" + ", ".join(a_operands) + "}" if a_in_registers else a_operands[0]
    # scale-d, scale-a, scale-b, then a transpose flag for each operand in shared memory
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
