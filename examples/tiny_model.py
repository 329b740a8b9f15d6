"""Train a small Llama on the documentation that comes with Python, and write it as an mlx-lm folder.

    python examples/tiny_model.py tiny-model            # some minutes on two idle CPU cores
    fatui stream tiny-model --window 124 --text tiny-model/held-out.txt --tokens 12800 --chunk 32 --dtype float32

Tokens are bytes, and every sequence begins with a token of its own, so that the model has a place to attend to when
nothing else matters: what a window without the first tokens takes away.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import mlx.core as mx
import mlx.nn
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from attention import patch_mlx_lm

nn: Any = mlx.nn  # which exports its classes by a star
BEGIN: Final = 256
"""The token before every sequence; those below it are bytes."""
VOCABULARY: Final = 260
HELD_OUT: Final = 0.1
"""Share of the text, at its end, that is not trained on."""
REPORT_STEPS: Final = 20


def configuration(context: int, layers: int, width: int) -> dict[str, Any]:
    """Return the model's config.json: heads of 32, two for each of keys and values."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": BEGIN,
        "eos_token_id": BEGIN + 1,
    }


def text() -> bytes:
    """Return the text: the topics of `help()`, under the licence of Python."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def batches(data: bytes, context: int, batch: int, seed: int) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield inputs and targets (batch, context), each sequence from a random place and after BEGIN, without end."""
    tokens, random = np.frombuffer(data, np.uint8).astype(np.int32), np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(tokens) - context, batch)
        targets = np.stack([tokens[start : start + context] for start in starts])
        inputs = np.concatenate([np.full((batch, 1), BEGIN, np.int32), targets[:, :-1]], axis=1)
        yield mx.array(inputs), mx.array(targets)


def loss_of(model: Any, inputs: mx.array, targets: mx.array) -> mx.array:
    """Return the mean loss of a byte, in nats."""
    loss: mx.array = nn.losses.cross_entropy(model(inputs), targets, reduction="mean")
    return loss


def rate(steps: int, highest: float) -> Callable[[int], float]:
    """Return the learning rate of a step: a short rise, then half a cosine down to a tenth."""
    rise = max(1, steps // 20)
    return lambda step: (
        highest * min((step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))
    )


@mx.custom_function
def product(x: mx.array, weight: mx.array) -> mx.array:
    """Multiply (..., n) by the transpose of (m, n) in numpy: MLX's wheel for Linux CPUs has a BLAS 20 times as slow."""
    return mx.array(np.matmul(np.array(x, copy=False), np.array(weight, copy=False).T))


@product.vjp
def _gradients(inputs: tuple[mx.array, mx.array], gradient: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, weight, above = (np.array(array, copy=False) for array in (*inputs, gradient))
    rows = above.reshape(-1, above.shape[-1])
    return mx.array(np.matmul(above, weight)), mx.array(np.matmul(rows.T, x.reshape(-1, x.shape[-1])))


@contextlib.contextmanager
def products_in_numpy() -> Iterator[None]:
    """Let linear layers multiply in numpy on a CPU while the context is open."""
    if mx.default_device() != mx.Device(mx.cpu):
        yield
        return
    linear, tied = nn.Linear.__call__, nn.Embedding.as_linear
    nn.Linear.__call__ = lambda self, x: product(x, self.weight)  # no biases here
    nn.Embedding.as_linear = lambda self, x: product(x, self.weight)
    try:
        yield
    finally:
        nn.Linear.__call__, nn.Embedding.as_linear = linear, tied


def train(model: Any, data: bytes, arguments: argparse.Namespace) -> float:
    """Train for the steps or the seconds given, whichever end first; return the last losses' mean."""
    mx.eval(model.parameters())
    optimizer = AdamW(learning_rate=arguments.rate, weight_decay=arguments.decay)
    step_of = nn.value_and_grad(model, loss_of)
    schedule, started, losses = rate(arguments.steps, arguments.rate), time.monotonic(), []
    made = batches(data, arguments.context, arguments.batch, arguments.seed)
    for step in range(arguments.steps):
        elapsed = time.monotonic() - started
        if elapsed > arguments.seconds:
            break
        # A run that ends by its seconds still goes down the whole cosine.
        optimizer.learning_rate = schedule(max(step, int(elapsed / arguments.seconds * arguments.steps)))
        loss, gradients = step_of(model, *next(made))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
        if step % REPORT_STEPS == 0:
            print(f"step {step:5}  loss {np.mean(losses[-REPORT_STEPS:]):.3f}  {elapsed:.0f} s", flush=True)
    return float(np.mean(losses[-REPORT_STEPS:]))


def write(model: Any, fields: dict[str, Any], held_out: bytes, folder: Path) -> None:
    """Write the weights, the configuration, a tokenizer of bytes, and the text that was not trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    named: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(named), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    (folder / "held-out.txt").write_bytes(held_out)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are bytes, and which puts BEGIN before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    # The characters by which such tokenizers write bytes: printable ones are themselves, others come after 255.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {character: byte for byte, character in shown.items()} | {"<begin>": BEGIN, "<end>": BEGIN + 1}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<begin>", "<end>"])
    made.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BEGIN)])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    """Train and write the model that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--context", type=int, default=128, help="tokens of a training sequence (128)")
    parser.add_argument("--layers", type=int, default=8, help="layers (8)")
    parser.add_argument("--width", type=int, default=64, help="width of the model, a multiple of 64 (64)")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step (32)")
    parser.add_argument("--steps", type=int, default=650, help="steps at most (650)")
    parser.add_argument("--seconds", type=float, default=900, help="seconds at most (900)")
    parser.add_argument("--rate", type=float, default=6e-3, help="highest learning rate (6e-3)")
    parser.add_argument("--decay", type=float, default=0.01, help="weight decay (0.01)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    arguments = parser.parse_args()
    mx.random.seed(arguments.seed)
    fields = configuration(arguments.context, arguments.layers, arguments.width)
    model = llama.Model(llama.ModelArgs.from_dict(fields))  # type: ignore[no-untyped-call]
    whole = text()
    cut = int(len(whole) * (1 - HELD_OUT))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    with products_in_numpy(), patch_mlx_lm("poc" if on_cpu else "mlx"):
        loss = train(model, whole[:cut], arguments)
    write(model, fields, whole[cut:], arguments.folder)
    print(f"{arguments.folder}: loss {loss:.3f} nats a byte ({len(whole):,} bytes of text)")


if __name__ == "__main__":
    main()
