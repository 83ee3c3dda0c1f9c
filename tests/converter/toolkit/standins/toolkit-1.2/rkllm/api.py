"""A stand-in with the signatures of rkllm-toolkit 1.2.3 (manuals 1.2.1 to 1.2.3, chapter 3); not the toolkit."""

import os
from typing import ClassVar

if os.environ.get("RKLLM_STANDIN_FAULT") == "import:pkg_resources":
    raise ModuleNotFoundError("No module named 'pkg_resources'")

from rkllm_standin import Standin


class RKLLM(Standin):
    """As documented; the defaults of this generation are not, and are those of 1.1.x."""

    VERSION = "1.2.3"
    TYPES: ClassVar[dict] = {
        "rk3588": ("w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"),
        "rk3576": ("w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8"),
        "rk3562": ("w8a8", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w4a8_g32"),
        "rv1126b": ("w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8"),
    }
    CORES: ClassVar[dict] = {"rk3588": 3, "rk3576": 2, "rk3562": 1, "rv1126b": 1}
    ALGORITHMS = ("normal", "grq", "gdq")
    LIMIT = 16384

    def load_huggingface(
        self, model, model_lora=None, device="cpu", dtype="float32", custom_config=None, load_weight=True
    ):
        return self._load(model, model_lora, device, dtype) if custom_config is None and load_weight is True else -1

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
        max_context=4096,
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
            max_context,
        )

    def export_rkllm(self, export_path):
        return self._export(export_path)
