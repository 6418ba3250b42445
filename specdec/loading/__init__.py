"""From disk: models, tokenizers, acceptance heads.

sources        what a model's name means: a folder, a GGUF file, a name on a hub
conversion     the folder that transformers loads; GGUF files are converted to one
gguf_header    what a GGUF file's weights are stored in
loader         transformers' loading of one model, with its errors in one line
eagle_config   what an EAGLE-3 draft is, seen from its config
eagle          its weights, in either format
pair           a target and its draft, checked against each other: `ModelPair`
vocabulary     whether two models have the same tokens, before either is loaded
head_files     acceptance heads
heap           glibc's heap on a CPU
"""
