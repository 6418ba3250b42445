"""A GPU: what forwards take against the limit of its memory, and rates against transformers.

    python benchmarks/gpu.py forwards --shape 8b   # torch's operators, kernels, recorded in graphs
    python benchmarks/gpu.py rates                 # policies against each other and `generate`

No checkpoint is needed: models are random, in the shapes of Llama 3, in bfloat16. For `rates` the
draft is the target's first layers, and what the other layers add is scaled until draft and target
agree on `--agreement` of tokens: costs are those of real models, acceptance is chosen.

Each prints a table; each command's `--help` says of what, and how long it takes.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import transformers
import typer
from common import console, interleave, ratios, requests_of, run, spread
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.engine.engine import Engine
from specdec.model.decoder import PackedDecoder
from specdec.model.sharing import common_prefix
from specdec.policies.registry import make_policy

DEVICE = torch.device("cuda")
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip
VOCABULARY = {"8b": 128256, "1b": 128256, "tiny": 512}


@dataclass
class Pair:
    """What `specdec.engine.engine.Pair` asks for."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int
    context_length: int = 8192
    draft_context_length: int = 8192
    eos_token_ids: frozenset[int] = frozenset()


def random_llama(shape: str) -> Any:
    """A random Llama on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY[shape], max_position_embeddings=8192, rope_theta=500000.0,
        tie_word_embeddings=False, dtype="bfloat16", bos_token_id=None, eos_token_id=None,
        **SHAPES[shape],
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """What a forward reads of the weights: all but the embedding."""
    skipped = model.get_input_embeddings().weight
    return sum(p.numel() * p.itemsize for p in model.parameters() if p is not skipped)


def measured_bandwidth() -> float:
    """Bytes a second that a copy within the GPU's memory moves, both ways counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * len(source) / statistics.median(timed(lambda: target.copy_(source)))


def timed(do: Callable[[], object], repeats: int = 10) -> list[float]:
    """Seconds of some calls after three that are not counted, each waited for."""
    found = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        do()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[3:]


@contextmanager
def way(decoder: PackedDecoder, cache: Any, name: str) -> Iterator[None]:
    """Run forwards on torch's operators, with kernels, or recorded."""
    recordings, kernels = decoder.recordings, cache.kernels
    if name != "recorded":
        decoder.recordings = None
    if name == "torch":
        cache.kernels = None
    yield
    decoder.recordings, cache.kernels = recordings, kernels


def forwards(
    shape: Annotated[str, typer.Option(help="8b, 1b or tiny")] = "8b",
    context: Annotated[int, typer.Option(help="cached positions of a row")] = 512,
    rows: Annotated[int, typer.Option(help="most rows")] = 64,
    sizes: Annotated[str, typer.Option(help="packed tokens")] = "1,2,4,8,16,32,64,128,256,512",
    kv_dtype: Annotated[str, typer.Option(help="of keys and values: auto, int8 or fp8")] = "auto",
) -> None:
    """Milliseconds of a forward with logits, by packed tokens.

    Prints them on torch's operators, with kernels and recorded, and the limit of the memory. A few
    minutes.
    """
    bandwidth = measured_bandwidth()
    model = random_llama(shape)
    weights = weight_bytes(model)
    with torch.inference_mode():
        decoder = PackedDecoder(model, fuse=True, kv_dtype=kv_dtype)  # type: ignore[arg-type]
        cache = decoder.new_cache(rows, context + 64)
        table = Table(
            "tokens", "rows", "torch, ms", "kernels, ms", "recorded, ms", "limit, ms", "of it"
        )
        for size in map(int, sizes.split(",")):
            n = min(rows, size)
            feed = [(slot, size // n) for slot in range(n)]
            ids = torch.randint(0, decoder.vocab_size, (size,), device=DEVICE)

            def forward(cache: Any = cache, feed: Any = feed, ids: Any = ids) -> Any:
                cache.pretend(context)
                return decoder.logits(decoder.forward(cache, feed, ids))

            found = []
            for name in ("torch", "kernels", "recorded"):
                with way(decoder, cache, name):
                    found.append(statistics.median(timed(forward)))
            limit = (weights + n * context * cache.bytes_per_position) / bandwidth
            table.add_row(
                str(size), str(n), *(f"{1000 * each:.2f}" for each in found),
                f"{1000 * limit:.2f}", f"{limit / found[-1]:.0%}",
            )  # fmt: skip
    name = torch.cuda.get_device_name()
    console.print(
        f"{name}, {bandwidth / 1e12:.2f} TB/s; {shape}, bfloat16, {context} cached, {kv_dtype}"
    )
    console.print(table)


def make_draft(target: Any, layers: int) -> Any:
    """A model of the target's first layers, with its embedding, last norm and LM head."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        draft = LlamaForCausalLM(config)
    draft.model.layers = torch.nn.ModuleList(copy.deepcopy(target.model.layers[:layers]))
    draft.model.embed_tokens, draft.lm_head = target.model.embed_tokens, target.lm_head
    draft.model.norm, draft.model.rotary_emb = target.model.norm, target.model.rotary_emb
    return draft.eval().requires_grad_(False)


@torch.inference_mode()
def align(target: Any, draft: Any, agreement: float) -> float:
    """Scale what the target's later layers add until its argmax is the draft's that often."""
    ids = torch.randint(0, target.config.vocab_size, (4, 128), device=DEVICE)
    wanted = draft(ids, use_cache=False).logits.argmax(-1)
    later = target.model.layers[len(draft.model.layers) :]
    weights = [
        w for each in later for w in (each.self_attn.o_proj.weight, each.mlp.down_proj.weight)
    ]
    low, high, now, share = 0.0, 1.0, 1.0, 0.0
    for _ in range(8):
        middle = (low + high) / 2
        for weight in weights:
            weight.mul_(middle / now)
        now = middle
        share = (target(ids, use_cache=False).logits.argmax(-1) == wanted).float().mean().item()
        low, high = (middle, high) if share > agreement else (low, middle)
    return share


@dataclass
class Load:
    """A turn's prompts of one length, and what made what of them.

    Attributes:
        target: as transformers runs it.
        ids: int64 [rows, prompt].
        tokens: new tokens a row.
        outputs: by side.
    """

    target: Any
    ids: torch.Tensor
    tokens: int
    outputs: dict[str, list[tuple[int, ...]]]

    def generate(self, name: str, **options: Any) -> None:
        """Run transformers."""
        ids = self.ids.to(DEVICE)
        out = self.target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=self.tokens, min_new_tokens=self.tokens, **options,
        )  # fmt: skip
        self.outputs[name] = [tuple(row) for row in out[:, ids.shape[1] :].tolist()]

    def engine(self, name: str, engine: Engine) -> None:
        """Run ours, all rows at once."""
        prompts = [tuple(row) for row in self.ids.tolist()]
        done = engine.generate(requests_of(prompts, self.tokens))
        self.outputs[name] = [each.output_ids for each in done]

    @torch.inference_mode()
    def parting(self, name: str, other: str) -> tuple[int, float]:
        """In how many rows two sides part, and between what logits of the target at most.

        Returns:
            rows, and the largest difference of the two tokens' logits where a row parts, over the
            standard deviation of all logits there.
        """
        gaps = []
        sides = self.outputs[name], self.outputs[other]
        for prompt, one, two in zip(self.ids.tolist(), *sides, strict=True):
            at = common_prefix(one, two)
            if at < self.tokens:
                ids = torch.tensor([prompt + list(one[:at])], device=DEVICE)
                logits = self.target(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
                gap = (logits[one[at]] - logits[two[at]]).abs() / logits.std()
                gaps.append(gap.item())
        return len(gaps), max(gaps, default=0.0)


def rates(
    shape: Annotated[str, typer.Option(help="8b, 1b or tiny")] = "8b",
    draft_layers: Annotated[int, typer.Option(help="layers of the draft")] = 3,
    agreement: Annotated[float, typer.Option(help="of draft and target, greedily")] = 0.7,
    batches: Annotated[str, typer.Option(help="rows in flight")] = "1,2,4,8,16,32,64",
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 256,
    tokens: Annotated[int, typer.Option(help="new tokens a row")] = 192,
    lengths: Annotated[str, typer.Option(help="candidates of fixed")] = "1,2,3,4,6",
    peers: Annotated[str, typer.Option(help="batches that transformers runs, too")] = "1,64",
    repeats: Annotated[int, typer.Option(help="turns that count")] = 2,
) -> None:
    """Tokens a second, greedily, of rows of one length: the best case of a static batch.

    Engines last, as in a job: what the first turn records and learns is there in those that count.
    Prints by number of rows each side's rate, and goodput's over the best of the others. Some 10
    minutes on an H200.
    """
    transformers.logging.set_verbosity_error()
    plain = random_llama(shape)
    small = make_draft(plain, draft_layers)
    share = align(plain, small, agreement)
    packed = [PackedDecoder(copy.deepcopy(model), fuse=True) for model in (plain, small)]
    pair = Pair(packed[0], packed[1], plain.config.vocab_size)
    policies = {"none": make_policy("none")}
    policies |= {f"fixed {k}": make_policy("fixed", k=int(k)) for k in lengths.split(",")}
    policies["goodput"] = make_policy("goodput", k_max=8)
    names = ["generate", "assisted", *policies]
    table = Table("rows", *names, "goodput / best", "goodput / generate", "unlike none, by")
    for batch in map(int, batches.split(",")):
        generator = torch.Generator().manual_seed(batch)
        load = Load(plain, torch.empty(0), tokens, {})
        sides: dict[str, Callable[[], Any]] = {}
        compared = str(batch) in peers.split(",")
        if compared:
            sides["generate"] = partial(load.generate, "generate")
        if compared and batch == 1:
            sides["assisted"] = partial(load.generate, "assisted", assistant_model=small)
        for name, policy in policies.items():
            engine = Engine(pair, policy=policy, slots=batch, control_share=0.0)
            sides[name] = partial(load.engine, name, engine)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(repeats + 1):
            load.ids = torch.randint(0, pair.vocab_size, (batch, prompt), generator=generator)
            taken = interleave(sides, 1)
            if turn:
                times = {name: times[name] + taken[name] for name in sides}
        rate = {name: batch * tokens / statistics.median(taken) for name, taken in times.items()}
        console.log(f"{batch} rows", {name: round(each) for name, each in rate.items()})
        parted, gap = load.parting("goodput", "none")
        best = max((name for name in policies if name != "goodput"), key=lambda name: rate[name])
        table.add_row(
            str(batch),
            *(f"{rate[name]:.0f}" if name in rate else "" for name in names),
            spread(ratios(times[best], times["goodput"])),
            spread(ratios(times["generate"], times["goodput"])) if compared else "",
            f"{parted} rows, {gap:.2f}",
        )
    device = torch.cuda.get_device_name()
    console.print(f"{device}; {shape}, draft of {draft_layers} layers, agreement {share:.2f}")
    console.print("Tokens a second; last, rows that end otherwise than with none, and the largest")
    console.print("difference of two logits that decided so, in standard deviations:", table)


if __name__ == "__main__":
    run(__doc__, forwards, rates)
