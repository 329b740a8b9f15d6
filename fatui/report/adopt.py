"""How to adopt an implementation: snippets that run as they are."""

import json
import shlex

from fatui.report.document import Block, Code, Paragraph

CALL = """from attention import attention

out = attention(q, k, v, mask="causal", implementation={quoted})  # q (B, H, Lq, D), k and v (B, Hkv, Lk, D)"""
MODEL = """from attention import patch_mlx_lm

with patch_mlx_lm({quoted}):  # every model of mlx-lm, loaded or yet to be; undone at the end
    text = mlx_lm.generate(model, tokenizer, prompt)"""
PROGRAM = "python -m attention.patch --implementation {name} your_script.py"


def adopt(name: str) -> list[Block]:
    """Return snippets for one call, for mlx-lm's models, and for a whole script."""
    quoted = json.dumps(name)
    return [
        Paragraph("In your own program:"),
        Code(CALL.format(quoted=quoted), "python"),
        Paragraph("In mlx-lm's models, while the context is open:"),
        Code(MODEL.format(quoted=quoted), "python"),
        Paragraph("Or around an unmodified script:"),
        Code(PROGRAM.format(name=shlex.quote(name)), "sh"),
    ]
