"""One packed forward of ragged rows through any transformers decoder.

decoder      `PackedDecoder`, the way in: appends tokens to slots, gives hidden states and logits
rows         which tokens go to which slot and position
cache        keys and values of the slots, their lengths and rollback: `SlotCache`
packing      where the tokens of one forward belong, made once for all layers
attention    what transformers calls in each layer, and the ways to compute it
grid         one of these ways: short rows together, on torch's operators
fused        decoder layers with fewer operators
features     hidden states that a cache keeps for a draft that reads them
eagle        such drafts, and their packed forward: `EagleDecoder`
linear       linear layers for CPUs
graphs       forwards of few tokens, recorded as CUDA graphs
"""
