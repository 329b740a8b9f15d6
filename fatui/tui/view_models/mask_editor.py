"""The mask of a draft as a kind with parameters, and a small picture of its tiles."""

from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.mask_text import MAX_LENGTH, MaskSpec, parse_mask
from attention.core.workload import Workload
from fatui import formatting
from fatui.quantities import format_number, parse_number

LENGTHS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
PERMILLE: Final = (10, 50, 100, 250, 500, 750, 900, 950, 1000)
STRIDES: Final = (2, 4, 8, 16, 32, 64, 128)
PICTURE_COLUMNS: Final = 16
MAX_PICTURE_KEYS: Final = 32_768
"""Random blocks of more keys take too long to draw while a slider moves, and give an even grey."""


class Parameter(Struct, frozen=True):
    """A number of a mask, on a slider."""

    label: str
    stops: tuple[int, ...]
    read: Callable[[MaskSpec], int]
    write: Callable[[MaskSpec, int], MaskSpec]
    parse: Callable[[str], int]
    say: Callable[[int], str] = format_number


class Kind(Struct, frozen=True):
    """A kind of mask: the parts of its specification that are set, and their parameters."""

    name: str
    mask: str
    """The mask that is chosen first."""
    parameters: tuple[Parameter, ...] = ()


def _whole(text: str) -> int:
    """Parse a number of keys, or the distance between two."""
    return parse_number(text, MAX_LENGTH)


def _length(label: str, field: str) -> Parameter:
    return Parameter(
        label,
        LENGTHS,
        read=lambda spec: int(getattr(spec, field)),
        write=lambda spec, value: structs.replace(spec, **{field: value}),
        parse=_whole,
    )


def _permille(text: str) -> int:
    """Parse a percentage; raises ValueError with what is accepted."""
    try:
        found = round(float(text) * 10)
    except (ValueError, OverflowError):
        found = 0
    if not 1 <= found <= 1000:
        raise ValueError(f"takes a percentage from 0.1 to 100, not '{text}'")
    return found


DENSITY: Final = Parameter(
    "density",
    PERMILLE,
    read=lambda spec: max(1, round(1000 * (spec.blocks or 0.0))),
    write=lambda spec, value: structs.replace(spec, blocks=value / 1000),
    parse=_permille,
    say=lambda value: f"{value / 10:g} %",
)
KEYS: Final = Parameter(
    "keys",
    LENGTHS,
    read=lambda spec: spec.strided[0] if spec.strided else 1,
    write=lambda spec, value: structs.replace(spec, strided=(value, spec.strided[1] if spec.strided else 1)),
    parse=_whole,
)
STRIDE: Final = Parameter(
    "stride",
    STRIDES,
    read=lambda spec: spec.strided[1] if spec.strided else 1,
    write=lambda spec, value: structs.replace(spec, strided=(spec.strided[0] if spec.strided else 1, value)),
    parse=_whole,
)
KINDS: Final = (
    Kind("none", "none"),
    Kind("causal", "causal"),
    Kind("window", "window:256", (_length("window", "window"),)),
    Kind("documents", "documents:256", (_length("documents", "documents"),)),
    Kind("prefix+window", "prefix:128+window:256", (_length("prefix", "prefix"), _length("window", "window"))),
    Kind("blocks", "blocks:0.25", (DENSITY,)),
    Kind("strided", "strided:64,8", (KEYS, STRIDE)),
)
MAX_PARAMETERS: Final = max(len(kind.parameters) for kind in KINDS)


def kind_of(mask: str) -> Kind | None:
    """Return the kind of a mask, or None if its parts are another combination."""
    parts = [part.partition(":")[0] for part in mask.split("+")]
    return next((kind for kind in KINDS if [part.partition(":")[0] for part in kind.mask.split("+")] == parts), None)


def options(chosen: Sequence[str]) -> tuple[str, ...]:
    """Return one mask of each kind: the first chosen one of that kind, if there is one."""
    of_kind = {kind.name: mask for mask in reversed(chosen) if (kind := kind_of(mask))}
    return tuple(of_kind.get(kind.name, kind.mask) for kind in KINDS)


def typed_window(digits: str) -> str:
    """Return the mask of a typed number of keys; raises ValueError with what is accepted."""
    return f"window:{_whole(digits)}"


def say_mask(mask: str) -> str:
    """Return the name of a mask's kind, whose numbers the sliders show; another combination in full."""
    kind = kind_of(mask)
    return kind.name if kind else mask


def sliders(chosen: Sequence[str]) -> list[tuple[Parameter, tuple[int, ...]]]:
    """Return the parameters of the chosen masks with their values; none if the masks are of several kinds.

    Of two parameters at most one may have several values: a slider cannot show which belong together.
    """
    kind = kind_of(chosen[0])
    if kind is None or any(kind_of(mask) is not kind for mask in chosen):
        return []
    specs = [parse_mask(mask) for mask in chosen]
    found = [(each, tuple(sorted({each.read(spec) for spec in specs}))) for each in kind.parameters]
    several = [values for _, values in found if len(values) > 1]
    return found if len(several) < 2 else []


def with_values(chosen: Sequence[str], parameter: Parameter, values: Sequence[int]) -> tuple[str, ...]:
    """Return the chosen masks with other values of a parameter."""
    others = dict.fromkeys(parameter.write(parse_mask(mask), values[0]) for mask in chosen)
    made = [parameter.write(spec, value).text for spec in others for value in values]
    return tuple(dict.fromkeys(made))


def mask_lines(workload: Workload) -> list[str]:
    """Return a picture of the tiles of a workload's first head, with its density beside it; empty without a mask.

    `█` is a full tile, `▒` a partial one, `·` one that is not visited; two rows of tiles are one line of text.
    """
    if workload.mask == "none":
        return []
    density = workload.density
    words = [f"{formatting.percent(density)} of pairs"]
    if workload.kv_seq > MAX_PICTURE_KEYS:
        return [*words, f"no picture beyond {MAX_PICTURE_KEYS:,} keys"]
    try:
        drawn = _picture(workload)
    except UsageError:
        return words
    words += [f"dense: {1 / density:.3g}x" if density else "", "█ full ▒ partial"]
    width = max(len(line) for line in drawn)
    lines = max(len(drawn), len(words))
    padded = [*drawn, *[""] * (lines - len(drawn))], [*words, *[""] * (lines - len(words))]
    return [f"{line:<{width}}  {word}".rstrip() for line, word in zip(*padded, strict=True)]


def _picture(workload: Workload) -> list[str]:
    from attention.masks import pattern_of

    lengths = workload.seq, workload.kv_seq
    block = next((size for size in (32, 64) if size * PICTURE_COLUMNS >= max(lengths)), 128)
    pattern = pattern_of(workload.mask_spec, *lengths, 1)
    assert pattern is not None
    rows = pattern.block_list((1, 1, *lengths), block, block).picture(PICTURE_COLUMNS).splitlines()
    rows += [" " * len(rows[0])] * (len(rows) % 2 and len(rows) > 1)
    if len(rows) == 1:
        return rows
    return ["".join(map(_pair, upper, lower)) for upper, lower in zip(rows[::2], rows[1::2], strict=True)]


def _pair(upper: str, lower: str) -> str:
    """Return one character for two tiles, one above the other."""
    if upper == lower or lower == " ":
        return upper
    if "·" in (upper, lower):
        return "▀" if lower == "·" else "▄"
    return "▒"
