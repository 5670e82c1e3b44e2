"""The columns of each device's report: of its rows in JSON and CSV, and of its text tables."""

from __future__ import annotations

from compacter_kernels.bench.cost import BOTH, FORWARD
from compacter_kernels.bench.gate import LOOSE_UNITS

_TIME = "k d n tokens provider direction ms ms_q20 ms_q80 over_clone over_equal_copy"
_CPU = "dense_over_this model_gb_per_s model_gflops share_of_sgemm"
_CPU_SAMPLES = "samples repeated quiet calls_per_sample page_faults_per_call saved_bytes checked_tokens"
_CUDA = "fraction_of_copy dense_over_this model_gb_per_s eager_us host_us"
_CUDA_SAMPLES = (
    "samples calls_per_replay buffers calls_per_train saved_bytes error_over_limit checked_tokens peak_bytes"
)
ROW = {"cpu": f"{_TIME} {_CPU} {_CPU_SAMPLES}".split(), "cuda": f"{_TIME} {_CUDA} {_CUDA_SAMPLES}".split()}
CSV = {"cpu": ["page_faults", "dtype", "threads", *ROW["cpu"]], "cuda": ["gpu", "dtype", *ROW["cuda"]]}

LAST = "last"  # the last direction in which a provider was timed


def _cuda(title: str, direction: str) -> list[tuple[str, str, str]]:
    return [
        (title, direction, "{time}"),
        ("20-80 %", direction, "{spread}"),
        ("of copy", direction, "{fraction_of_copy:.0%}"),
        ("GB/s", direction, "{model_gb_per_s:,.0f}"),
        ("eager", direction, "{eager_us:.1f}"),
        ("host", direction, "{host_us:.1f}"),
    ]


# Heading, direction and format of each text column; report.py adds time, spread and megabytes.
TEXT = {
    "cpu": [
        ("forward", FORWARD, "{time}"),
        ("20-80 %", FORWARD, "{spread}"),
        ("/clone", FORWARD, "{over_clone:.2f}"),
        ("dense/", FORWARD, "{dense_over_this:.2f}"),
        ("sgemm", FORWARD, "{share_of_sgemm:.0%}"),
        ("fwd+bwd", BOTH, "{time}"),
        ("20-80 %", BOTH, "{spread}"),
        ("/clone", BOTH, "{over_clone:.2f}"),
        ("/copy", BOTH, "{over_equal_copy:.2f}"),
        ("dense/", BOTH, "{dense_over_this:.2f}"),
        ("saved", LAST, "{saved_bytes:,}"),
    ],
    "cuda": [
        *_cuda("forward", FORWARD),
        *_cuda("fwd+bwd", BOTH),
        ("peak", LAST, "{peak_mb:,.1f}"),
        ("saved", LAST, "{saved_mb:,.1f}"),
    ],
}
HEAD = {
    "cpu": "{cpu}, {cores} cores, {memory_gib} GiB; torch {torch}, "
    "compacter_kernels {compacter_kernels} ({revision}), instruction set {isa}, {time}",
    "cuda": "{gpu} ({capability}, {sms} SMs, L2 {l2_mb:.0f} MB, {memory_gib} GiB), copy {copy_gb_per_s:,.0f} GB/s; "
    "driver {driver}, CUDA {cuda}, torch {torch}, triton {triton}, python {python}; {cpu}, {cores} cores; "
    "compacter_kernels {compacter_kernels} ({revision}), {time}; x in {dtype}",
}
LEGEND = {
    "cpu": """\
forward  without grad; fwd+bwd: the output, and the gradients of x and of all parameters
20-80 %  how far these quantiles are from the median, which is the time shown
/clone   over one x.clone() of the same shape (forward: the copy that moves as many bytes)
/copy    over the copy that moves as many bytes as a fused forward and backward: x.clone(), then dx = x + grad
dense/   dense over this: how many times faster than building H in each call
sgemm    share of the sgemm rate of the same rounds, by the model's operations at rank 1
saved    bytes kept for backward beyond x and the parameters
""",
    "cuda": f"""\
forward  without grad; fwd+bwd: the output, and the gradients of x and of all parameters
         cold: replays of a CUDA graph over copies of the buffers, after the L2 was flushed; the median
20-80 %  how far these quantiles are from the median
of copy  the share of the speed of a copy that moves the bytes of the fused call: forward x.clone(), fwd+bwd x.clone()
         and dx = x + grad. 100 % is the limit
GB/s     the bytes of the fused call (2 or 5 times x) over the time
eager    us per call of a train of calls back to back, until the device is done; host: until the host is
peak     memory that a forward and backward takes at once beyond its inputs, in MB
saved    bytes kept for backward beyond x and the parameters, in MB
~        not within the contract's error: computes in x's dtype, within {LOOSE_UNITS} units in its last place
-compiled  torch.compile, fullgraph, once for all token counts above 1, on the shapes of --compiled-shapes
""",
}
