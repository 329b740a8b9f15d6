"""Address spaces, checked by clang's front end for C++ for OpenCL, whose rules are almost those of MSL."""

import re
from typing import Any, Final

from tests.support.metal.verifier.building import HERE
from tests.support.metal.verifier.source import parse

OPTIONS: Final = (
    *("-x", "clcpp", "-cl-std=CLC++2021", "-target", "spir64", "-cl-no-stdinc", "-Wno-everything"),
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space",
    f"-I{HERE / 'shim_cl'}",
)
FILE: Final = "kernel.clcpp"
ERROR: Final = 3


def address_spaces(text: str) -> list[str]:
    """Return the address space errors of a generated source, one per line.

    A pointer without an address space is an error in MSL, where OpenCL would make it generic.
    """
    import clang.cindex as cindex

    unit = cindex.Index.create().parse(FILE, args=list(OPTIONS), unsaved_files=[(FILE, _as_opencl(text))])
    errors = [f"{each.location.line}: {each.spelling}" for each in unit.diagnostics if each.severity >= ERROR]
    return errors + [
        f"{node.location.line}: {node.spelling} is a pointer without an address space ({node.type.spelling})"
        for node in unit.cursor.walk_preorder()
        if _is_generic(node, cindex)
    ]


def _is_generic(node: Any, cindex: Any) -> bool:
    kinds = (cindex.CursorKind.VAR_DECL, cindex.CursorKind.PARM_DECL, cindex.CursorKind.FIELD_DECL)
    if node.kind not in kinds or "__generic" not in node.type.spelling:
        return False
    return node.location.file is not None and "msl_cl" not in node.location.file.name


def _as_opencl(text: str) -> str:
    """Replace template arguments by a type and constants before the kernel: OpenCL's kernels cannot be templates."""
    function, _, body = parse(text)
    found = re.search(r"template <([^>]*)>\n\[\[kernel\]\]", body)
    if found:
        kinds = [each.split() for each in found[1].split(",")]
        values = [each.strip() for each in function[function.index("<") + 1 : function.rindex(">")].split(",")]
        made = " ".join(
            f"using {name} = {value};" if kind == "typename" else f"constexpr __constant {kind} {name} = {value};"
            for (kind, name), value in zip(kinds, values, strict=True)
        )
        body = f"{body[: found.start()]}{made}\n[[kernel]]{body[found.end() :]}"
    body = re.sub(r"\[\[kernel\]\] void", "__kernel void", body)
    body = re.sub(r" \[\[\w+(\(\d+\))?\]\]", "", body)
    body = re.sub(r"^\s*#include <metal_\w+>", "", body, flags=re.MULTILINE)
    return f'#include "msl_cl.h"\n#line 1 "kernel"\n{body}'
