"""Models by name or folder: their shapes, read without MLX and without mlx-lm."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from attention.errors import NoBackendError, UsageError, suggestion
from attention.files import expanded
from attention.workload import ITEM_BYTES, DType, Pass, Workload

FILE: Final = Path(__file__).with_name("configurations.toml")
SHAPES: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads")
ALIASES: Final = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
"""What GPT-2 and its kin call them."""
INSTALL: Final = "models need mlx-lm, which is not installed: pip install 'fatui[models]'"


class Configuration(Struct, frozen=True):
    """A model's shapes."""

    name: str
    """A name of configurations.toml, or the folder as it was given."""
    fields: Mapping[str, Any]
    """As config.json has them."""
    folder: Path | None = None
    """Where its weights are; None for random ones."""

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

    def workload(self, pass_: Pass, dtype: DType, *, batch: int, seq: int, kv_seq: int | None = None) -> Workload:
        """What one layer asks of attention."""
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
        )

    def cache_bytes(self, layers: int, batch: int, length: int, dtype: DType) -> int:
        """Bytes of the keys and values that generation keeps."""
        return 2 * layers * batch * self.kv_heads * length * self.head_dim * ITEM_BYTES[dtype]

    def working_bytes(self, tokens: int, dtype: DType) -> int:
        """Bytes of what one layer has in memory at once besides attention, about: its MLP's three and a few more."""
        wide, narrow = self.fields.get("intermediate_size", 0), self.fields["hidden_size"]
        return tokens * (3 * int(wide) + 6 * int(narrow)) * ITEM_BYTES[dtype]


@cache
def _bundled() -> dict[str, dict[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """The models that need no download."""
    return tuple(_bundled())


def find(model: str) -> Configuration:
    """Returns the model of a name or of a folder of mlx-lm's.

    Raises:
        UsageError: there is none, or its config.json lacks a shape.
    """
    if model in _bundled():
        return Configuration(model, _bundled()[model])
    folder = expanded(model)
    if not folder.is_dir():
        known = ", ".join(names())
        raise UsageError(f"model: got '{model}'; it takes {known}, or an mlx-lm folder{suggestion(model, names())}")
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
    """The fields of a model that also sees, say: those of its language model come first."""
    text = fields.get("text_config")
    return {**fields, **text} if isinstance(text, dict) else dict(fields)


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """The same as mlx-lm completes them: a config.json need not say what is the default of its kind of model.

    This imports mlx-lm, and MLX with it.
    """
    if find_spec("mlx_lm") is None or type(fields.get("model_type")) is not str:
        return {}
    from mlx_lm import utils

    try:
        model_class, args_class = utils._get_classes(fields)  # what load_model takes
        model = model_class(args_class.from_dict(fields))  # makes no weights: MLX is lazy
    except Exception:  # whatever mlx-lm's models raise for fields that they cannot take; loading will say it
        return {}
    parts = (model, getattr(model, "language_model", None), getattr(model, "model", None))
    made: dict[str, Any] = {}
    for part in reversed(parts):
        made |= {name: value for name, value in _plain(getattr(part, "args", None)).items() if value is not None}
    return made


def _plain(arguments: Any) -> dict[str, Any]:
    """A model's arguments by the names that config.json has for them."""
    fields = _with_text_config(dict(getattr(arguments, "__dict__", {})))
    return fields | {name: fields[other] for name, other in ALIASES.items() if name not in fields and other in fields}


def check_mlx_lm() -> None:
    """Raises NoBackendError, saying how to get it, unless mlx-lm is installed."""
    if find_spec("mlx_lm") is None:
        raise NoBackendError(INSTALL)
