"""Answers of the float model itself, which are the best targets: the quantizer should preserve what it does.

The settings follow the vendor's generator (examples/rkllm_api_demo/export/generate_data_quant.py @ 1.3.0): the most
likely token each time, repetition penalty 1.1, 128 new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from rkconvert.output.host_memory import read_memory
from rkruntime.errors import CalibrationError, HostError
from rkruntime.packages import install
from rkruntime.text.tokenizer import Tokenizer

NEW_TOKENS: Final = 128
_REPETITION_PENALTY: Final = 1.1
_NEEDED: Final = ("torch", "transformers")
_OTHER_TARGETS: Final = "Use --targets given with chats that have answers."


def missing_packages() -> list[str]:
    """Return the packages that generation needs but that are not installed."""
    return [name for name in _NEEDED if find_spec(name) is None]


class CpuModel:
    """The model before quantization, on this machine's CPU.

    Args:
        folder: Folder in Hugging Face layout whose files were checked (see toolkit/staging.py).
        nbytes: Size of its weights, which must fit into memory.
        stop: Ids that end an answer.

    Raises:
        HostError: torch or transformers is missing, or there is too little memory.
        CalibrationError: transformers cannot load it.
    """

    def __init__(self, folder: Path, nbytes: int, tokenizer: Tokenizer, stop: Sequence[int]) -> None:
        if missing := missing_packages():
            raise HostError(
                f"To let the model answer, {' and '.join(missing)} must be installed.",
                hint=f"{install(*missing)}; or use --targets given with chats that have answers.",
            )
        if (free := read_memory().available) < nbytes:
            raise HostError(
                f"The model has {nbytes / 1e9:.1f} GB of weights, but only {free / 1e9:.1f} GB of memory is free.",
                hint="Close other programs, or use --targets given with chats that have answers.",
            )
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                # Many releases default to sdpa, which silently omits Gemma 2's soft-cap of the attention scores.
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).eval()
        except ImportError:  # a missing package, reported as for every command
            raise
        except Exception as error:  # Each release raises errors of its own, and of the packages below it.
            raise CalibrationError(f"transformers cannot load the model: {error}.", hint=_OTHER_TARGETS) from error
        # The checkpoint's settings for sampling, beams and lengths must not apply.
        self._model.generation_config = transformers.GenerationConfig()
        self._tokenizer, self._stop = tokenizer, list(stop)

    def answer(self, prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> str:
        """Return the answer to a prompt of token ids, cut after `new_tokens`."""
        import torch
        from transformers import GenerationConfig

        ids = torch.tensor([list(prompt)])
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=_REPETITION_PENALTY,
            eos_token_id=self._stop,
            pad_token_id=self._stop[0],
        )
        try:
            with torch.inference_mode():
                made = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        except Exception as error:  # as above: a model that loads can still fail in its first step
            raise CalibrationError(f"transformers cannot run the model: {error}.", hint=_OTHER_TARGETS) from error
        # Ids that end an answer are control tokens, which have no text.
        return self._tokenizer.decode(made[0, ids.shape[1] :].tolist()).strip()
