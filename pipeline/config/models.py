"""The section `models` of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.settings import PlainString, Settings


class ModelsConfig(Settings):
    """The target whose distribution the output has, and the draft that proposes."""

    target: PlainString = Field(
        min_length=1, description="hub name, folder, *.gguf file, or pkg:PACKAGE/FILE.gguf"
    )
    draft: PlainString | None = Field(
        default=None, min_length=1, description="same forms; not needed with policy none"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: as the target's weights are stored, where the device is fast in that",
    )
    quantization: Literal["int8wo", "int8"] | None = Field(default=None, description="CPU only")
    draft_quantization: Literal["int8wo", "int8", "none"] | None = Field(
        default=None,
        description="of the draft alone; null: int8 on a CPU, since it only proposes",
    )
    deterministic: bool = Field(
        default=False, description="batch-invariant kernels: bit-exact results under any batching"
    )
    device: str | None = Field(
        default=None, description="null: cuda if the actor has one, else cpu"
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="passed to transformers: a target over several GPUs of one actor"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model"
    )

    @model_validator(mode="after")
    def _kernels_exist(self) -> ModelsConfig:
        if (self.deterministic or self.quantization) and self.dtype not in ("auto", "float32"):
            what = "deterministic" if self.deterministic else f"quantization {self.quantization}"
            raise ValueError(f"{what} goes with dtype float32, not {self.dtype}")
        return self
