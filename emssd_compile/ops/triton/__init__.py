"""The CUDA forms of the ops: Triton kernels, and PyTorch's own ``varlen_attn`` where it can do the same.

`emssd_compile.ops.load_kernels` imports this package when a model on a GPU is compiled, and nothing else does: it needs
Triton.

| module | what is there |
|---|---|
| `launch` | the sizes of a launch, from what the host knows |
| `attention_kernel`, `merge_kernel` | the kernels of ragged attention |
| `ragged_attention` | checks its arguments and launches them |
| `append_kv` | the kernel that writes keys and values, and its launch |
| `move_kv` | the kernel that moves them within their rows, and its launch |
| `varlen` | ragged attention by ``torch.nn.attention.varlen.varlen_attn`` |
| `selection` | remembers which of several forms was measured to be fastest |
| `forms` | what the ops call |
"""
