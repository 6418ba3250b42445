"""One side of `peers.py`, in a process of its own: a way to generate, driven over a pipe.

    python benchmarks/sides.py '{"side": "generate", "target": "...", "batch": 16, ...}'

Each line of standard input is a `Work` in JSON, each line of standard output what came of it. It
runs with the Python of the side, so that a peer may live in a virtual environment of its own, and
imports nothing but that side's library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Outputs = list[list[int]]


@dataclass(frozen=True)
class Side:
    """How to generate.

    Attributes:
        side: a function of this file.
        target, draft: folders of safetensors; without a draft nothing is speculated.
        dtype: of weights and activations, float32 or bfloat16.
        batch: most rows in flight.
        threads: for the models.
        options: the side's own.
    """

    side: str
    target: str
    draft: str | None
    dtype: str
    batch: int
    threads: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What to generate: a number of tokens for each prompt, wherever a text would end."""

    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]
    temperature: float


def specbatch(side: Side) -> Callable[[Work], Outputs]:
    """Our engine; options: `policy`, `k`, `quantization`."""
    import torch
    from common import requests_of

    from specdec.engine.engine import Engine
    from specdec.loading.pair import ModelPair
    from specdec.policies.registry import make_policy

    torch.set_num_threads(side.threads)
    options = side.options
    pair = ModelPair.load(
        side.target,
        side.draft,
        dtype=side.dtype,  # type: ignore[arg-type]
        quantization=options.get("quantization"),
    )
    policy = make_policy(options.get("policy", "none"), k=options.get("k", 4), k_max=16)

    def run(work: Work) -> Outputs:
        engine = Engine(pair, policy=policy, slots=side.batch, control_share=0.0)
        requests = requests_of(work.prompts, work.lengths, work.temperature)
        return [list(done.output_ids) for done in engine.generate(requests)]

    return run


def _transformers(side: Side, folder: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(side.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, side.dtype)
    )
    return model.eval()


def _sampling(work: Work) -> dict[str, Any]:
    if work.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}


def generate(side: Side) -> Callable[[Work], Outputs]:
    """transformers `generate` on static batches; with a draft, assisted generation, row by row.

    Options: `schedule` and `k` of the assistant, `confidence` below which it stops.
    """
    model = _transformers(side, side.target)
    more: dict[str, Any] = {}
    if side.draft:
        assistant = more["assistant_model"] = _transformers(side, side.draft)
        settings = assistant.generation_config
        settings.num_assistant_tokens = side.options.get("k", 4)
        settings.num_assistant_tokens_schedule = side.options.get("schedule", "constant")
        settings.assistant_confidence_threshold = side.options.get("confidence", 0.0)

    return lambda work: static_batches(model, work, side.batch, **more)


def static_batches(model: Any, work: Work, batch: int, **options: Any) -> Outputs:
    """transformers' `generate`, so many rows at a time, each batch as long as its longest row."""
    import torch

    outputs: Outputs = []
    for begin in range(0, len(work.prompts), batch):
        part = work.prompts[begin : begin + batch]
        lengths = work.lengths[begin : begin + batch]
        width = max(map(len, part))
        padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=max(lengths),
            min_new_tokens=max(lengths),
            pad_token_id=0,
            **_sampling(work),
            **options,
        )
        made = out[:, width:].tolist()
        outputs += [row[:length] for row, length in zip(made, lengths, strict=True)]
    return outputs


def generate_batch(side: Side) -> Callable[[Work], Outputs]:
    """transformers' continuous batching."""
    model = _transformers(side, side.target)
    return lambda work: continuous_batch(model, work)


def continuous_batch(model: Any, work: Work) -> Outputs:
    """transformers' `generate_batch`. It knows one length for all rows: the longest."""
    import transformers

    config = transformers.GenerationConfig(
        max_new_tokens=max(work.lengths), eos_token_id=-1, pad_token_id=0, **_sampling(work)
    )
    prompts = [list(prompt) for prompt in work.prompts]
    out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    made = [list(out[key].generated_tokens) for key in out]
    return [row[:length] for row, length in zip(made, work.lengths, strict=True)]


def prepare_vllm(threads: int) -> None:
    """What vLLM's CPU build reads from the environment; before it is imported."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"


def vllm(side: Side) -> Callable[[Work], Outputs]:
    """vLLM's offline engine; options: `method` (draft_model, eagle3 or ngram) and `k`, `eager`."""
    prepare_vllm(side.threads)
    from vllm import LLM, SamplingParams, TokensPrompt

    options = side.options
    speculative: dict[str, Any] = {}
    if method := options.get("method"):
        found: dict[str, Any] = {"method": method, "num_speculative_tokens": options.get("k", 4)}
        found |= {"prompt_lookup_max": 4} if method == "ngram" else {"model": side.draft}
        speculative = {"speculative_config": found}
    llm = LLM(
        model=side.target,
        dtype=side.dtype,
        max_num_seqs=side.batch,
        max_model_len=2048,
        enforce_eager=options.get("eager", False),
        enable_prefix_caching=False,  # a second run of the same prompts would not prefill them
        disable_log_stats=True,
        **speculative,
    )

    def run(work: Work) -> Outputs:
        params = [
            SamplingParams(max_tokens=length, temperature=work.temperature, ignore_eos=True, seed=i)
            if work.temperature
            else SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
            for i, length in enumerate(work.lengths)
        ]
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in work.prompts]
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    return run


SIDES = {f.__name__: f for f in (specbatch, generate, generate_batch, vllm)}


def main() -> None:
    """Load the side, then answer work until there is no more."""
    # Libraries write to standard output as they please; answers go where it was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    run = SIDES[side.side](side)
    print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        work = Work(**json.loads(line))
        began = time.perf_counter()
        outputs = run(work)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "outputs": outputs}), file=answers, flush=True)


def command(python: str, side: Side) -> list[str]:
    """What starts a side."""
    return [python, __file__, json.dumps(asdict(side))]


if __name__ == "__main__":
    main()
