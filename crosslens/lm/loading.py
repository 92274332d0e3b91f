"""Load weights through transformers, without its chatter and without its leniency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from crosslens.errors import CrosslensError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors from transformers inside the block; its settings are restored after it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_causal_lm(folder: Path, **options: Any) -> nn.Module:
    """The causal language model in `folder`, with no code run from it and no pickle opened.

    Raises:
        CrosslensError: weights are missing, which transformers would fill with random numbers.
        Exception: whatever transformers raises on damaged files.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise CrosslensError(
            f"The weights in {options.get('gguf_file', folder)} are incomplete: {len(missing)} "
            f"tensors are missing (such as {missing[0]}). Fetch or copy the model again."
        )
    loaded: nn.Module = module
    return loaded


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer in `folder`, with no code run from it; raises what transformers raises."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )


def short(error: Exception) -> str:
    """The first line of an error, as a sentence; the next too where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return text[:300].rstrip(". ") + "."
