"""The peer of `whole_job.py`: what one writes with Ray Data and vLLM for a job like ours.

    PYTHON_OF_VLLM benchmarks/ray_vllm.py '{"model": "...", "prompts": "...", "out": "...", ...}'

Prints what it took as one line of JSON, last.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from sides import prepare_vllm


class Generate:
    """An actor with vLLM's offline engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        prepare_vllm(job["threads"])
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            model=job["model"], dtype=job["dtype"], max_num_seqs=job["batch"], max_model_len=2048
        )
        self.params = SamplingParams(
            max_tokens=job["tokens"], temperature=job["temperature"], ignore_eos=True
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        chats = [[{"role": "user", "content": str(prompt)}] for prompt in batch["prompt"]]
        outputs = self.llm.chat(chats, self.params, use_tqdm=False)
        batch["completion"] = [each.outputs[0].text for each in outputs]
        batch["output_tokens"] = [len(each.outputs[0].token_ids) for each in outputs]
        batch["seconds"] = [time.perf_counter() - began] * len(outputs)
        return batch


def main() -> None:
    """Run the job and print its output tokens and the seconds of its batches."""
    job = json.loads(sys.argv[1])
    ray.init(num_cpus=job["threads"] + 1, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_parquet(job["prompts"]).map_batches(
        Generate,
        fn_constructor_args=[job],
        batch_size=job["unit_rows"],
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=job["threads"],
    )
    rows.write_parquet(job["out"])
    made = ray.data.read_parquet(job["out"]).to_pandas()
    batches = made.drop_duplicates("seconds")["seconds"].sum()
    answer = {"tokens": int(made["output_tokens"].sum()), "working": float(batches)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
