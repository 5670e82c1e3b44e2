"""The micro-benchmark on a CUDA device: cold replays of CUDA graphs for the kernels, trains of calls for the host."""
