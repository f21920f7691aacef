"""CUDA paths without a GPU: torch's CPU build trains on fake CUDA tensors, as any rank.

Fake tensors (`FakeTensorMode`) have shapes, dtypes and devices, but no values: a step requires
neither memory nor a GPU, and its operations can be observed. The process group is torch's fake one.
A small library, built once with the C++ compiler, adds a CUDA device that does nothing.

It shows mixed devices, copies and reads for which the host would wait, missing waits between
streams, kernel launches, and collectives of CUDA branches. It does not show NCCL, Triton, cuBLAS or
speed.

torch looks up the device once per process, so checks run in a new process; see `process.run_check`.

- `process`: loads the device in a new process
- `python_api`: functions that `torch.cuda` lacks in a CPU build; what waits for what
- `waits`, `races`, `collectives`: observe a step
- `cases`: every method, and every option that a step depends on
- `steps`: steps of cases, and reads and waits that are documented
- `checks`: what tests run in a new process
"""
