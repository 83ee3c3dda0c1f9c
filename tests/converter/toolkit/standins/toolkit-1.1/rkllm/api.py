"""A stand-in with the signatures of rkllm-toolkit 1.1.4 (issue 126 quotes them); not the toolkit."""

import os
from typing import ClassVar

if os.environ.get("RKLLM_STANDIN_FAULT") == "import:pkg_resources":
    raise ModuleNotFoundError("No module named 'pkg_resources'")

from rkllm_standin import Standin


class RKLLM(Standin):
    """As documented in the manuals 1.1.0 to 1.1.4, chapter 3."""

    VERSION = "1.1.4"
    TYPES: ClassVar[dict] = {
        "rk3588": ("w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"),
        "rk3576": ("w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8"),
    }
    CORES: ClassVar[dict] = {"rk3588": 3, "rk3576": 2}
    ALGORITHMS = ("normal", "gdq")
    OLD_TYPE_MESSAGE = True

    def load_huggingface(self, model, model_lora=None, device="cpu"):
        return self._load(model, model_lora, device)

    def build(
        self,
        do_quantization=True,
        optimization_level=1,
        quantized_dtype="w8a8",
        quantized_algorithm="normal",
        target_platform="rk3588",
        num_npu_core=3,
        extra_qparams=None,
        dataset=None,
        hybrid_rate=0,
    ):
        return self._build(
            do_quantization,
            optimization_level,
            quantized_dtype,
            quantized_algorithm,
            target_platform,
            num_npu_core,
            dataset,
            hybrid_rate,
            4096,
        )

    def export_rkllm(self, export_path):
        return self._export(export_path)
