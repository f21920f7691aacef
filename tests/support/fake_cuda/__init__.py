"""CUDA paths without a GPU: torch's CPU build runs whole training steps on fake CUDA tensors, as any rank of any number.

Fake tensors have shapes, dtypes and devices, but no values: a step takes neither memory nor a GPU, and what it would ask of a
device can be watched. `FakeTensorMode` makes them; the process group is torch's fake one; a small library of ours, built once
with the C++ compiler, lends torch a CUDA device that does nothing.

It shows mixed devices, copies and reads for which the host would wait for the device, the kernels that are launched, and the
collectives of CUDA branches. It does not show NCCL, Triton, cuBLAS, races between streams or speed.

torch looks the device up once per process, so every check runs in a process of its own: see `process.run_check`.

- `fake_cuda.cpp`, `library`: the device, and how it is built and loaded
- `python_api`: what `torch.cuda` lacks in a CPU build
- `stepper`: a `Stepper` on fake CUDA tensors
- `copies`, `kernels`: watch what a step does
- `checks`: what the tests ask
"""
