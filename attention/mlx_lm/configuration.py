"""Model configurations by name or folder, read without MLX and without mlx-lm."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from attention.core.errors import NoBackendError, Remedy, UsageError, suggestion
from attention.core.files import expand_home
from attention.core.kv_format import DENSE, parse_kv_format
from attention.core.workload import ITEM_BYTES, DType, Pass, Workload
from attention.mlx_lm.hub import CONFIGURATION, cached_folder, is_hub_name

FILE: Final = Path(__file__).with_name("configurations.toml")
SHAPES: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads")
ALIASES: Final = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
"""GPT-2's names of these fields."""


class Configuration(Struct, frozen=True):
    """The shapes of a model."""

    name: str
    """A name in configurations.toml, or the folder as given."""
    fields: Mapping[str, Any]
    """The fields of config.json."""
    folder: Path | None = None
    """Folder of the weights; None for random weights."""

    @property
    def layers(self) -> int:
        """Layers of the whole model."""
        return int(self.fields["num_hidden_layers"])

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.fields["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.fields.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.fields.get("head_dim") or self.fields["hidden_size"] // self.heads)

    def workload(
        self,
        pass_: Pass,
        dtype: DType,
        *,
        batch: int,
        seq: int,
        kv_seq: int | None = None,
        kv_format: str = DENSE,
        ranks: int = 1,
    ) -> Workload:
        """Return the attention workload of one layer."""
        return Workload(
            batch=batch,
            seq=seq,
            kv_seq=kv_seq or seq,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            mask="none" if pass_ == "decode" else "causal",
            pass_=pass_,
            kv_format=kv_format,
            ranks=ranks,
        )

    def check_kv_format(self, kv_format: str) -> None:
        """Raise UsageError unless a cache of this model can have the format."""
        formats = parse_kv_format(kv_format)
        for form in () if formats is None else (formats.key, formats.value):
            if form.width_problem(self.head_dim):
                raise UsageError(
                    f"kv_format: got {form.text}, whose groups of {form.group_size} do not divide the heads of "
                    f"{self.name}, which are {self.head_dim} wide"
                )

    def token_bytes(self, dtype: DType, kv_format: str = DENSE) -> int:
        """Return the bytes of the keys and values of one token in one layer."""
        formats, item = parse_kv_format(kv_format), ITEM_BYTES[dtype]
        if formats is None:
            return 2 * self.kv_heads * self.head_dim * item
        return self.kv_heads * sum(form.row_bytes(self.head_dim, item) for form in (formats.key, formats.value))

    def cache_bytes(self, layers: int, batch: int, length: int, dtype: DType, kv_format: str = DENSE) -> int:
        """Return the bytes of the KV cache."""
        return layers * batch * length * self.token_bytes(dtype, kv_format)

    def activation_bytes(self, tokens: int, dtype: DType) -> int:
        """Estimate the bytes of a layer's activations besides attention: three of the MLP and a few more."""
        wide, narrow = self.fields.get("intermediate_size", 0), self.fields["hidden_size"]
        return tokens * (3 * int(wide) + 6 * int(narrow)) * ITEM_BYTES[dtype]


@cache
def _bundled() -> dict[str, dict[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def bundled_names() -> tuple[str, ...]:
    """Return the names of the bundled configurations, which need no download."""
    return tuple(_bundled())


def _folder_of(model: str) -> Path | None:
    """Return the folder that a model's name stands for, which may not exist; None if the hub's cache lacks it."""
    return cached_folder(model, CONFIGURATION) if is_hub_name(model) else expand_home(model)


def configuration_time(model: str) -> int:
    """Return when the configuration of a model was written, in nanoseconds; 0 for one that is bundled or missing."""
    if model in _bundled():
        return 0
    folder = _folder_of(model)
    try:
        return 0 if folder is None else (folder / "config.json").stat().st_mtime_ns
    except OSError:
        return 0


def find_model(model: str) -> Configuration:
    """Return the configuration of a bundled name, of an mlx-lm model folder, or of a name in the hub's cache.

    Raises:
        UsageError: it does not exist, or its config.json lacks a shape.
    """
    if model in _bundled():
        return Configuration(model, _bundled()[model])
    folder = _folder_of(model)
    if folder is None:
        raise UsageError(f"model: '{model}' is neither a folder nor in the hub's cache on this machine")
    if not folder.is_dir():
        known = ", ".join(bundled_names())
        raise UsageError(
            f"model: got '{model}'; it takes {known}, ORG/NAME of Hugging Face's hub, or an mlx-lm folder"
            f"{suggestion(model, bundled_names())}"
        )
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"model: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"model: {path} has no {', '.join(SHAPES)}")
    shapes = _with_text_config(fields)
    if _missing(shapes):
        shapes = _with_defaults(fields) | shapes
    if missing := _missing(shapes):
        raise UsageError(f"model: {path} has no {', '.join(missing)}")
    return Configuration(model, shapes, folder)


def _missing(fields: Mapping[str, Any]) -> list[str]:
    return [name for name in SHAPES if type(fields.get(name)) is not int or fields[name] < 1]


def _with_text_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields of a multimodal model: those of its language model take precedence."""
    text = fields.get("text_config")
    return {**fields, **text} if isinstance(text, dict) else dict(fields)


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Complete the fields with mlx-lm's defaults: a config.json may omit the defaults of its model type.

    This imports mlx-lm, and with it MLX.
    """
    if find_spec("mlx_lm") is None or type(fields.get("model_type")) is not str:
        return {}
    from mlx_lm import utils

    try:
        model_class, args_class = utils._get_classes(fields)  # what load_model takes
        model = model_class(args_class.from_dict(fields))  # makes no weights: MLX is lazy
    except Exception:  # mlx-lm's models raise anything for invalid fields; loading reports it
        return {}
    parts = (model, getattr(model, "language_model", None), getattr(model, "model", None))
    made: dict[str, Any] = {}
    for part in reversed(parts):
        made |= {name: value for name, value in _plain(getattr(part, "args", None)).items() if value is not None}
    return made


def _plain(arguments: Any) -> dict[str, Any]:
    """Return a model's arguments by their names in config.json."""
    fields = _with_text_config(dict(getattr(arguments, "__dict__", {})))
    return fields | {name: fields[other] for name, other in ALIASES.items() if name not in fields and other in fields}


def check_mlx_lm() -> None:
    """Raise NoBackendError unless mlx-lm is installed."""
    if find_spec("mlx_lm") is None:
        raise NoBackendError("models need mlx-lm, which is not installed", remedy=Remedy.INSTALL_MLX_LM)
