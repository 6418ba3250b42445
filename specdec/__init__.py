"""Batched, lossless speculative decoding on stock transformers decoders.

    ModelPair -> Engine(pair, policy) -> submit(Request) / step() -> Completion

This package knows torch and transformers, token ids and tensors. It knows nothing of Ray, files or
jobs.
"""
