"""Public ops: plain functions on tensors, each with a PyTorch reference, a C++ and a Triton kernel."""
