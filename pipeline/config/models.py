"""The section `models` of the job file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.locations import Location
from pipeline.config.section import Section, example


def _no_mtp(name: str) -> str:
    """The name of a draft, unless it is what servers call heads inside a target's checkpoint.

    Raises:
        ValueError: it is.
    """
    if name.lower() == "mtp":
        raise ValueError(
            "MTP heads inside a target's checkpoint are not read; give an EAGLE-3 draft of the "
            "target, a small model with its tokenizer, or train a draft with `specbatch distill "
            f"--kind eagle3`; for a folder of this name write ./{name}"
        )
    return name


class ModelsConfig(Section):
    """The target whose distribution the output has, and the draft that proposes."""

    model_config = example(
        {
            "target": "Qwen/Qwen2.5-7B-Instruct",
            "draft": "Qwen/Qwen2.5-0.5B-Instruct",
            "dtype": "bfloat16",
        }
    )

    target: Location = Field(
        min_length=1,
        description="The model whose distribution the output has: a hub name (`owner/name` or "
        "`owner/name@revision`), a folder, a `*.gguf` file, or "
        "`pkg:PACKAGE/FILE.gguf`.",
    )
    draft: Annotated[Location, AfterValidator(_no_mtp)] | None = Field(
        default=None,
        min_length=1,
        description="The small model that proposes tokens, in the same forms. It must have the "
        "target's tokenizer. It may be an EAGLE-3 draft for the target. `null`: candidates are "
        "looked up in what was written before, by the policies `goodput` and `suffix`.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights. `auto`: as the target's are stored, where the "
        "device is fast in that.",
    )
    kv_dtype: Literal["auto", "fp8", "int8"] = Field(
        default="auto",
        description="Number format of keys and values of both models. `int8` and `fp8` hold about "
        "twice the tokens of half precision in the same memory, and change the target's "
        "distribution a little: `int8` less. `auto`: as `dtype`.",
    )
    quantization: Literal["int8wo", "int8"] | None = Field(
        default=None,
        description="Quantisation of the target's linear layers, on a CPU. `int8wo`: weights "
        "only. `int8`: weights and activations, faster, at some cost in quality. "
        "`null`: none.",
    )
    draft_quantization: Literal["int8wo", "int8", "none"] | None = Field(
        default=None,
        description="The same for the draft, or `none`. `null`: `int8` on a CPU, which costs no "
        "quality, since the draft only proposes.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use batch-invariant kernels (CPU). Greedy and `coupled` rows then have the "
        "same tokens in any batch, retry and resume, to the last one.",
    )
    device: str | None = Field(
        default=None,
        description="Where the models run, such as `cuda:0` or `cpu`. `null`: the actor's GPU if "
        "it has one, else the CPU.",
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None,
        description="Passed to transformers, such as `auto`: spreads a target over several GPUs "
        "of one actor.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with a model. Only for models whose authors you "
        "trust.",
    )

    @model_validator(mode="after")
    def _kernels_exist(self) -> ModelsConfig:
        if (self.deterministic or self.quantization) and self.dtype not in ("auto", "float32"):
            what = "deterministic" if self.deterministic else f"quantization {self.quantization}"
            raise ValueError(f"{what} goes with dtype float32, not {self.dtype}")
        return self
